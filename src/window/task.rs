//! One partition number across the sources: rows in, feature rows out.

mod current;

use std::ops::Range;
use std::sync::Arc;

use arrow::array::RecordBatch;

use super::capture::{Captures, Chain, Extent, Slice};
use super::channels::Channels;
use super::cold::{Cold, ColdStore, OUT};
use super::emitted::{Event, OpenWindows};
use super::engine::{Engine, Reading};
use super::entities::{Entities, EntityId, Visit};
use super::held::Held;
use super::rows::{Origin, RowBuffer};
use super::snapshot::{self, Restore};
use super::state::{Horizon, State};
use super::synchroniser::{Finished, Synchroniser};
use super::texts::Texts;
use super::tile::{Cuts, Limits};
use super::watermark::{SourceTime, TaskTime};
use super::{Applied, Counts, Failures, Late, Memory, Published, TaskClock, WindowError};
use crate::broker::NextOffset;
use crate::source::SourceBatch;

/// Fewest entities that a call of [`Task::advance`] looks after besides those it touches.
const SWEPT_AT_LEAST: usize = 64;

/// The state and the clock of one partition number.
#[derive(Debug)]
pub struct Task {
    pub(super) engine: Arc<Engine>,
    pub(super) partition: i32,
    pub(super) entities: Entities,
    pub(super) texts: Texts,
    pub(super) time: TaskTime,
    /// For each source: the offset after the highest one applied.
    pub(super) applied: Vec<i64>,
    pub(super) windows: OpenWindows,
    pub(super) captures: Captures,
    /// Where memory has a limit.
    pub(super) cold: Option<Cold>,
    /// Rows applied so far, where they do not come in the order of their offsets: makes the sequence rise.
    pub(super) reordered: i64,
    synchroniser: Synchroniser,
    /// What waits for the watermark, where rows are applied in event-time order. The synchroniser then has nothing between
    /// two calls.
    pub(super) held: Option<Held>,
    /// By source: event time of the partitions before, where it is keyed anew. As of the last row offered.
    channels: Vec<Option<Channels>>,
    /// The same as of the last output.
    pub(super) settled_channels: Vec<Option<Channels>>,
    /// Event time as of the last row offered, to tell late rows early.
    pub(super) offered: Vec<SourceTime>,
    /// What offering found and the next output has to tell.
    counts: Vec<Counts>,
    failures: Failures,
    output: Output,
}

/// What the calls of [`Task::advance`] fill. Kept between them for its allocations.
#[derive(Debug)]
struct Output {
    rows: RowBuffer,
    online: RowBuffer,
    /// The row of an entity without any event.
    empty: RowBuffer,
    touched: Vec<Touched>,
    late: Vec<Late>,
    reader: Reader,
    horizon: Horizon,
}

/// An entity with new events.
#[derive(Debug, Clone, Copy)]
struct Touched {
    entity: EntityId,
    /// Its last applied event.
    source: usize,
    offset: i64,
    sequence: i64,
    /// The row of that event, if it is as of the entity's newest event and lacks nothing.
    row: Option<usize>,
}

/// The instant that a row is as of.
#[derive(Debug, Clone, Copy)]
struct AsOf {
    time: i64,
    /// Events of this instant count if their source is not after this one.
    source: usize,
}

impl AsOf {
    /// Time of the last events of `source` that count.
    #[inline]
    fn last(self, source: usize) -> i64 {
        if source <= self.source { self.time } else { self.time.saturating_sub(1) }
    }
}

impl Task {
    /// An empty task.
    pub fn new(engine: Arc<Engine>, partition: i32) -> Self {
        let positions = vec![None; engine.sources()];
        Self::at(engine, partition, positions)
    }

    /// An empty task that goes on at these offsets.
    pub(super) fn at(engine: Arc<Engine>, partition: i32, positions: Vec<Option<NextOffset>>) -> Self {
        let offered: Vec<SourceTime> = engine.sources.iter().map(SourceTime::of).collect();
        // What waited for the watermark is applied in order: nothing before a row is still to come.
        let applied = match engine.event_time {
            true => engine.sources.iter().map(SourceTime::in_order).collect(),
            false => offered.clone(),
        };
        let time = TaskTime::new(applied, engine.on);
        Self {
            partition,
            entities: Entities::new(engine.sources()),
            texts: Texts::default(),
            channels: engine.sources.iter().map(|source| source.rekeyed.then(Channels::default)).collect(),
            settled_channels: vec![None; offered.len()],
            offered,
            time,
            held: engine.event_time.then(|| Held::new(&positions)),
            applied: vec![0; engine.sources()],
            windows: OpenWindows::new(&engine),
            captures: Captures::new(Chain::default()),
            cold: None,
            reordered: 0,
            synchroniser: Synchroniser::new(positions),
            counts: vec![Counts::default(); engine.sources()],
            failures: Failures::default(),
            output: Output::new(&engine),
            engine,
        }
    }

    /// The task that [`Task::snapshot`] was taken of, or a checkpoint: then `snapshot` are the batches of a whole one and of
    /// those that follow it, in their order. Rows that were offered but not applied are not in it: read on from [`Task::next`].
    ///
    /// # Errors
    /// The snapshot is of another definition, another partition or another format, or damaged.
    pub fn restore(engine: Arc<Engine>, partition: i32, snapshot: &[RecordBatch]) -> Result<Self, WindowError> {
        let mut restore = Restore::new(engine, partition, None);
        snapshot.iter().try_for_each(|batch| restore.push(batch))?;
        restore.finish()
    }

    /// As [`Task::restore`], or an empty task where there is no batch, with at most `limit` bytes of state in memory and the
    /// rest in `store`: keys and some words an entity stay in memory however low the limit is.
    ///
    /// # Errors
    /// As [`Task::restore`], and where a batch is an error or the store fails.
    pub fn restore_within<E: From<WindowError>>(
        engine: Arc<Engine>,
        partition: i32,
        snapshot: impl Iterator<Item = Result<RecordBatch, E>>,
        cold: Option<(Box<dyn ColdStore>, usize)>,
    ) -> Result<Self, E> {
        let cold = cold.map(|(store, limit)| Cold::new(store, limit));
        let mut snapshot = snapshot.peekable();
        if snapshot.peek().is_none() {
            return Ok(Self { cold, ..Self::new(engine, partition) });
        }
        let mut restore = Restore::new(engine, partition, cold);
        for batch in snapshot {
            restore.push(&batch?)?;
        }
        Ok(restore.finish()?)
    }

    /// Changes how many bytes of state may be in memory, where there is a limit.
    pub fn set_limit(&mut self, bytes: usize) {
        if let Some(cold) = &mut self.cold {
            cold.set_limit(bytes);
        }
    }

    /// Reads on from these offsets, with nothing buffered.
    pub(super) fn go_on_at(&mut self, positions: Vec<Option<NextOffset>>) {
        self.held = self.engine.event_time.then(|| Held::new(&positions));
        self.synchroniser = Synchroniser::new(positions);
    }

    /// Buffers rows, which must follow the source's last batch. Tells those that are late: they are reported once more in
    /// [`Applied::late`] when their turn comes, which is when they become dead letters.
    ///
    /// # Errors
    /// The batch does not have the plan's columns, has a null key, or overlaps an earlier one.
    pub fn offer(&mut self, batch: SourceBatch) -> Result<Vec<Late>, WindowError> {
        let index = batch.source;
        let first = batch.offsets.first().copied().unwrap_or(batch.next);
        let expected = match &self.held {
            Some(held) => held.expected(index),
            None => self.synchroniser.expected(index),
        };
        if let Some(NextOffset(expected)) = expected.filter(|&NextOffset(expected)| first < expected) {
            return Err(WindowError::Batch {
                source_name: self.engine.sources[index].name.clone(),
                partition: batch.partition,
                offset: first,
                reason: format!("the offsets before {expected} were offered already"),
            });
        }
        let prepared = self.engine.prepare(&batch, &mut self.texts, &mut self.failures)?;
        let offered = &mut self.offered[index];
        if let Some(held) = &mut self.held {
            let times = self.channels[index].is_some().then(|| prepared.times.clone());
            let late = held.push(index, prepared, offered, &mut self.counts[index]);
            if let (Some(channels), Some(batch), Some(times)) = (&mut self.channels[index], &batch.rekeyed, times) {
                channels.take(batch, &times);
                offered.newest = offered.newest.max(channels.newest());
            }
            return Ok(late);
        }
        let times = prepared.times.iter().zip(&prepared.offsets);
        let late = times.filter_map(|(&time, &offset)| offered.late(index, offset, time)).collect();
        if let Some(finished) = self.synchroniser.push(index, prepared) {
            finish(&mut self.counts[index], finished);
        }
        Ok(late)
    }

    /// Applies all rows whose turn has come, at most `limit`.
    ///
    /// # Errors
    /// A column of features cannot be built. The state is then ahead of its output: drop the task and restore it.
    pub fn advance(&mut self, clock: &TaskClock<'_>, limit: usize) -> Result<Applied, WindowError> {
        // What is keyed anew says itself when it holds back nothing.
        let idle = clock.idle.iter().zip(&self.channels);
        let idle: Vec<bool> =
            idle.map(|(idle, channels)| channels.as_ref().map_or(*idle, Channels::are_idle)).collect();
        let clock = &TaskClock { idle: &idle, ..*clock };
        self.time.update(clock);
        self.output.clear();
        let applied =
            if self.held.is_some() { self.apply_released(clock, limit) } else { self.apply_all(clock, limit) };
        if let Some(held) = &mut self.held {
            held.settle(&self.offered);
            if !held.is_resuming() {
                self.settled_channels.clone_from(&self.channels);
            }
        }
        self.add_online_rows();
        let output = self.build(clock);
        self.sweep(applied);
        if self.texts.wants_collection() {
            self.collect_texts();
        }
        self.settle()?;
        output
    }

    /// Sends states out where the task holds more than it may.
    pub(super) fn settle(&mut self) -> Result<(), WindowError> {
        if let Some(cold) = &mut self.cold {
            let besides = self.windows.bytes() + self.texts.bytes() + self.captures.bytes();
            cold.settle(&self.engine, &mut self.entities, &self.texts, besides);
            cold.check()?;
        }
        Ok(())
    }

    /// Applies the rows whose turn has come, at most `limit`, and returns how many.
    fn apply_all(&mut self, clock: &TaskClock<'_>, limit: usize) -> usize {
        let mut left = limit;
        while left > 0
            && let Some((source, rows)) = self.synchroniser.turn(clock, left)
        {
            left -= rows.len();
            self.apply(source, rows);
        }
        limit - left
    }

    /// Applies what the watermark has passed, and returns how many rows.
    fn apply_released(&mut self, clock: &TaskClock<'_>, limit: usize) -> usize {
        let Some(held) = &mut self.held else { return 0 };
        self.output.late.append(&mut held.late);
        let widths: Vec<usize> = self.engine.sources.iter().map(|source| source.layout.row).collect();
        let released = held.release(self.time.passed(&self.offered), limit, clock.caught_up, &widths);
        for (source, rows) in released.into_iter().enumerate().filter(|(_, rows)| !rows.times.is_empty()) {
            self.synchroniser.push(source, rows);
        }
        // Nothing earlier can come: what has not been let go is not to be waited for.
        let all = vec![true; self.engine.sources()];
        self.apply_all(&TaskClock { caught_up: &all, idle: &all }, usize::MAX)
    }

    fn apply(&mut self, index: usize, range: Range<usize>) {
        let engine = &*self.engine;
        let source = &engine.sources[index];
        let layout = &source.layout;
        let batch = self.synchroniser.batch(index);
        let count = range.len();
        let late_before = self.output.late.len();
        for row in range {
            let (time, offset) = (batch.times[row], batch.offsets[row]);
            if self.held.is_some() && source.table.is_none() {
                self.time.sources[index].pass(time, self.offered[index].watermark());
            } else if let Some(late) = self.time.sources[index].late(index, offset, time) {
                self.output.late.push(late);
                continue;
            }
            self.time.follow(index);
            self.applied[index] = self.applied[index].max(offset + 1);
            self.reordered += i64::from(engine.event_time);
            let key = batch.keys.get(row);
            let words = &batch.rows[row * layout.row..][..layout.row];
            if source.emits {
                let event = Event { source: index, offset, key, row: words };
                self.windows.take(engine, &self.texts, event, &self.time.sources[index]);
            }
            // Derived features alone make rows of the events that ask for one.
            if engine.features.is_empty() && engine.on != Some(index) {
                continue;
            }
            let entity = self.entities.entity(key);
            if self.captures.is_unchanged(self.entities.get(entity)) {
                if let Some(cold) = &mut self.cold {
                    cold.awake(engine, &mut self.entities, &mut self.texts, entity);
                }
                self.captures.before_change(engine, &mut self.entities, &self.texts, self.cold.as_mut(), entity);
            }
            let known = self.entities.get_mut(entity);
            known.newest = known.newest.max(time);
            let (newest, touched) = (known.newest, known.touched as usize);
            if source.table.is_some() || words[1..].iter().zip(&source.kept).any(|(mask, kept)| mask & kept != 0) {
                let state = self.entities.state(entity, index);
                let before = state.bytes();
                if source.table.is_some() {
                    let deletions = self.time.sources[index].watermark().unwrap_or(i64::MIN);
                    if time < deletions {
                        state.forget_deletion(layout, time, deletions);
                    }
                }
                if let Some(cold) = &mut self.cold
                    && let Some(chunk) = state.missing_at(time)
                {
                    cold.bring_back(source, &mut self.texts, state, &[chunk]);
                }
                if state.insert(layout, words) {
                    self.output.horizon.set(layout, &self.time, engine.on, index, newest);
                    if let Some(cold) = &mut self.cold {
                        cold.merge(source, &mut self.texts, state, &self.output.horizon);
                    }
                    state.merge(layout, &self.output.horizon);
                    state.account();
                }
                let after = state.bytes();
                self.entities.state_bytes = self.entities.state_bytes + after - before;
            }
            let sequence = self.applied.iter().sum::<i64>() + self.reordered;
            let slot = match self.output.touched.get(touched) {
                Some(slot) if slot.entity == entity => touched,
                _ => {
                    let slot = self.output.touched.len();
                    self.output.touched.push(Touched { entity, source: index, offset, sequence, row: None });
                    self.entities.get_mut(entity).touched = slot as u32;
                    slot
                }
            };
            let mut full = None;
            if engine.on == Some(index) {
                let as_of = AsOf { time, source: index };
                let watermark = if engine.event_time { Some(time) } else { self.time.watermark };
                let origin = Origin { entity, source: index, offset, sequence, event_time: time, watermark };
                let Output { rows, empty, reader, .. } = &mut self.output;
                let states = States::new(&mut self.entities, &mut self.texts, &mut self.cold);
                reader.read(engine, states, as_of, rows, origin, empty);
                let later = &self.entities.states(entity)[index + 1..];
                let complete = time == newest
                    && later
                        .iter()
                        .zip(&engine.sources[index + 1..])
                        .all(|(state, source)| state.newest(&source.layout) < time);
                full = complete.then(|| rows.len() - 1);
            }
            self.output.touched[slot] = Touched { entity, source: index, offset, sequence, row: full };
        }
        let late = (self.output.late.len() - late_before) as u64;
        let counts = &mut self.counts[index];
        counts.read += count as u64;
        counts.late += late;
        counts.applied += count as u64 - late;
        finish(counts, self.synchroniser.applied(index, count));
    }

    fn add_online_rows(&mut self) {
        if !self.engine.online {
            return;
        }
        let Output { rows, online, empty, touched, reader, .. } = &mut self.output;
        for &Touched { entity, source, offset, sequence, row } in touched.iter() {
            let time = self.entities.get(entity).newest;
            let as_of = if self.engine.event_time { Some(time) } else { self.time.watermark };
            let watermark = row.map_or(as_of, |row| rows.watermark(row));
            let origin = Origin { entity, source, offset, sequence, event_time: time, watermark };
            if let Some(row) = row {
                online.push(origin, rows, row);
            } else {
                let as_of = AsOf { time, source: self.engine.sources() };
                let states = States::new(&mut self.entities, &mut self.texts, &mut self.cold);
                reader.read(&self.engine, states, as_of, online, origin, empty);
            }
        }
    }

    fn build(&mut self, clock: &TaskClock<'_>) -> Result<Applied, WindowError> {
        let mut failures = std::mem::take(&mut self.failures);
        let mut build =
            |rows: &RowBuffer| rows.build(&self.engine, &self.entities, &self.texts, self.partition, &mut failures);
        let (rows, online) = (build(&self.output.rows)?, build(&self.output.online)?);
        Ok(Applied {
            rows,
            online,
            emitted: self.windows.build(&self.engine, &self.texts)?,
            late: std::mem::take(&mut self.output.late),
            next: self.next(),
            counts: std::mem::replace(&mut self.counts, vec![Counts::default(); self.engine.sources()]),
            failures,
            watermark: self.held.as_ref().map_or(self.time.watermark, Held::frontier),
            more: self.held.as_ref().map_or_else(|| self.synchroniser.turn(clock, 1).is_some(), Held::more),
        })
    }

    /// Looks after some entities in turn, so that those that went quiet are merged and forgotten.
    fn sweep(&mut self, applied: usize) {
        let (engine, time, horizon) = (&self.engine, &self.time, &mut self.output.horizon);
        let quiet = time.quiet();
        let (captures, texts, cold) = (&mut self.captures, &mut self.texts, &mut self.cold);
        // An entity that is quiet since then has nothing that any window reaches.
        let mut gone = i64::MAX;
        for (index, source) in engine.sources.iter().enumerate().filter(|_| cold.is_some()) {
            horizon.set(&source.layout, time, engine.on, index, quiet);
            gone = gone.min(if source.layout.windows.lifetime { i64::MIN } else { horizon.limits.oldest });
        }
        self.entities.sweep(SWEPT_AT_LEAST.max(applied / 4), |mut visit| {
            if visit.entity.changed & OUT != 0 {
                let forget = visit.entity.newest < quiet && visit.entity.newest <= gone;
                if forget {
                    captures.before_sweep(engine, &mut visit, texts, cold.as_mut());
                    captures.forgotten(visit.key);
                    cold.iter_mut().for_each(|cold| cold.forget(visit.id, true));
                }
                return forget;
            }
            captures.before_sweep(engine, &mut visit, texts, cold.as_mut());
            let Visit { id, key, entity, states } = visit;
            let horizon_of = if entity.newest < quiet { quiet } else { entity.newest };
            let mut changed = false;
            for (index, state) in states.iter_mut().enumerate().filter(|(_, state)| !state.is_empty()) {
                let layout = &engine.sources[index].layout;
                horizon.set(layout, time, engine.on, index, horizon_of);
                if let Some(cold) = cold.as_mut() {
                    changed |= cold.merge(&engine.sources[index], texts, state, horizon);
                }
                changed |= state.sweep(layout, horizon);
            }
            let forget = entity.newest < quiet && states.iter().all(State::is_empty);
            if forget {
                captures.forgotten(key);
                cold.iter_mut().for_each(|cold| cold.forget(id, false));
            } else if changed {
                captures.swept(id, entity);
            }
            forget
        });
    }

    fn collect_texts(&mut self) {
        let old = self.texts.start_over();
        let texts = &mut self.texts;
        let mut renumber = |word: &mut u64| {
            if *word != 0 {
                *word = texts.number(old.get(*word));
            }
        };
        let sources = &self.engine.sources;
        self.entities.for_each_state(|index, state| {
            let source = &sources[index];
            state.for_each_word(&source.layout, &source.text_words, &source.text_lanes, &mut renumber);
        });
        for (index, source) in sources.iter().enumerate() {
            let mut renumber_rows = |rows: &mut [u64]| {
                super::ordered::visit(rows, source.layout.row, 0, &source.text_words, &mut renumber);
            };
            self.synchroniser.for_each_batch(index, &mut renumber_rows);
            if let Some(held) = &mut self.held {
                held.for_each_batch(index, &mut renumber_rows);
            }
        }
        self.windows.for_each_text(&self.engine, &mut renumber);
        self.texts.collected();
    }

    /// First unapplied offset of each source; `None` before its first batch.
    pub fn next(&self) -> Vec<Option<NextOffset>> {
        match &self.held {
            Some(held) => held.left().into_iter().map(|left| left.next).collect(),
            None => self.synchroniser.next(),
        }
    }

    /// What the last [`Task::advance`] has settled of each source: all rows below the offset are applied or late, but for
    /// those that are held, which lie after [`Task::frontier`]. Where nothing is held, the same as [`Task::next`].
    pub fn settled(&self) -> Vec<Option<NextOffset>> {
        self.held.as_ref().map_or_else(|| self.synchroniser.next(), Held::read)
    }

    /// Where rows are applied in event-time order: of the rows below [`Task::settled`], those up to this instant (ms,
    /// inclusive) are applied, and none after it. `None` before the first, and where rows are applied as they arrive.
    pub fn frontier(&self) -> Option<i64> {
        self.held.as_ref().and_then(Held::frontier)
    }

    /// True where rows are held until the watermark has passed them.
    pub fn is_in_event_time(&self) -> bool {
        self.held.is_some()
    }

    /// Says what was published of a source before the task was restored, so that [`Published::after`] can go on telling it.
    pub fn resume(&mut self, source: usize, published: &Published) {
        if let (Some(held), Some(frontier)) = (&mut self.held, published.frontier) {
            held.resume(source, published.next, frontier);
        }
    }

    /// Says that nothing more will come: the next calls of [`Task::advance`] apply what is held, in its order. What comes all
    /// the same, and is not after that, is applied as it comes.
    pub fn end(&mut self) {
        if let Some(held) = &mut self.held {
            held.end();
        }
    }

    /// Partition number.
    pub fn partition(&self) -> i32 {
        self.partition
    }

    /// True where rows of this source wait, or would, for what another source has still to bring. Its partition can then be
    /// paused without holding back the others.
    pub fn is_held_back(&self, source: usize) -> bool {
        match &self.held {
            // What was held before a restoration is all read again before anything is let go.
            Some(held) if held.is_resuming() => false,
            Some(_) => self.offered[source].watermark() > self.time.passed(&self.offered),
            // A source with waiting rows is not the one that others wait for.
            None => self.engine.sources() > 1 && self.synchroniser.waiting(source) > 0,
        }
    }

    /// Rows of a source that wait for their turn.
    pub fn buffered(&self, source: usize) -> usize {
        self.synchroniser.waiting(source) + self.held.as_ref().map_or(0, |held| held.waiting(source))
    }

    /// Entities with state.
    pub fn entities(&self) -> usize {
        self.entities.len()
    }

    /// Bytes held.
    pub fn memory(&self) -> Memory {
        Memory {
            state: self.entities.bytes()
                + self.windows.bytes()
                + self.texts.bytes()
                + self.captures.bytes()
                + self.cold.as_ref().map_or(0, Cold::memory_bytes),
            buffered: self.synchroniser.bytes() + self.held.as_ref().map_or(0, Held::bytes),
            on_disk: self.cold.as_ref().map_or(0, Cold::disk_bytes),
        }
    }

    /// Goes on from the event times of the partitions before, of the sources that are keyed anew.
    pub(super) fn restore_channels(&mut self, saved: Vec<Option<Channels>>) {
        for (channels, saved) in self.channels.iter_mut().zip(&saved).filter(|(channels, _)| channels.is_some()) {
            channels.clone_from(saved);
        }
        self.settled_channels = saved;
    }

    /// The whole state as of the last [`Task::advance`], at least one batch. Its schema, and what the words in it mean, are
    /// described in `window/snapshot.rs`.
    ///
    /// # Errors
    /// Columns cannot be built.
    pub fn snapshot(&self) -> Result<Vec<RecordBatch>, WindowError> {
        snapshot::take(self)
    }

    /// Begins a checkpoint of the state as of the last [`Task::advance`]. The task may go on; [`Task::checkpoint_slice`] gives
    /// what it was at this instant.
    ///
    /// # Errors
    /// Columns cannot be built.
    pub fn begin_checkpoint(&mut self) -> Result<Extent, WindowError> {
        let (_, follows) = self.captures.next(&self.entities, &self.windows);
        let schema = snapshot::schema(self, follows)?;
        Ok(self.captures.begin(&self.entities, &mut self.windows, self.engine.sources(), schema))
    }

    /// True from [`Task::begin_checkpoint`] to the last slice.
    pub fn is_in_checkpoint(&self) -> bool {
        self.captures.is_running()
    }

    /// The next piece of the checkpoint that was begun, of at most `most` entities or entries of windows. All slices' batches, at least one, are what
    /// [`Task::restore`] needs, after those of the checkpoints that it follows.
    ///
    /// # Errors
    /// States on disk cannot be read: drop the task and restore it.
    pub fn checkpoint_slice(&mut self, most: usize) -> Result<Slice, WindowError> {
        let Self { engine, entities, windows, texts, cold, .. } = self;
        let slice = self.captures.slice(engine, entities, windows, texts, cold, most);
        self.cold.as_mut().map_or(Ok(()), Cold::check)?;
        Ok(slice)
    }
}

fn finish(counts: &mut Counts, finished: Finished) {
    counts.read += finished.filtered + finished.dead;
    counts.filtered += finished.filtered;
    counts.dead += finished.dead;
}

impl Output {
    fn new(engine: &Engine) -> Self {
        let mut empty = RowBuffer::new(engine);
        let origin = Origin { entity: 0, source: 0, offset: 0, sequence: 0, event_time: 0, watermark: None };
        let mut row = empty.push_nulls(origin);
        for source in &engine.sources {
            let mut lanes = vec![0; source.layout.lanes.width()];
            source.layout.lanes.clear(&mut lanes);
            for reading in &source.readings {
                // All windows are empty: one stands for each.
                let first = Reading { lanes: 0, ..reading.clone() };
                first.read(&source.layout.lanes, &lanes, 0, &mut row);
            }
        }
        Self {
            rows: RowBuffer::new(engine),
            online: RowBuffer::new(engine),
            empty,
            touched: Vec::new(),
            late: Vec::new(),
            reader: Reader::new(engine),
            horizon: Horizon { merge: i64::MIN, limits: Limits::unknown(), deletions: i64::MIN },
        }
    }

    fn clear(&mut self) {
        self.rows.clear();
        self.online.clear();
        self.touched.clear();
        self.late.clear();
    }
}

/// The states that rows are read from, and what brings back those that are not in memory.
struct States<'a> {
    entities: &'a mut Entities,
    texts: &'a mut Texts,
    cold: &'a mut Option<Cold>,
}

impl<'a> States<'a> {
    fn new(entities: &'a mut Entities, texts: &'a mut Texts, cold: &'a mut Option<Cold>) -> Self {
        Self { entities, texts, cold }
    }
}

/// Reads rows out of states.
#[derive(Debug)]
struct Reader {
    /// By source: beginnings of its windows.
    cuts: Vec<Cuts>,
    /// Windows of one source.
    windows: Vec<u64>,
}

impl Reader {
    fn new(engine: &Engine) -> Self {
        let words = engine.sources.iter().map(|source| source.layout.windows_words()).max();
        Self { cuts: vec![Cuts::new(); engine.sources()], windows: vec![0; words.unwrap_or(0)] }
    }

    /// Appends the row of an entity as of `as_of` to `rows`.
    #[inline]
    fn read(
        &mut self,
        engine: &Engine,
        states: States<'_>,
        as_of: AsOf,
        rows: &mut RowBuffer,
        origin: Origin,
        empty: &RowBuffer,
    ) {
        let States { entities, texts, cold } = states;
        let mut row = rows.push(origin, empty, 0);
        for (index, source) in engine.sources.iter().enumerate() {
            let state = entities.state(origin.entity, index);
            if state.is_empty() {
                continue;
            }
            let layout = &source.layout;
            if let Some(facts) = &source.table {
                if let Some(newest) = state.row_at(layout, as_of.last(index)) {
                    facts.iter().for_each(|fact| row.set(fact.feature, fact.of(newest)));
                }
                continue;
            }
            let windows = &mut self.windows[..layout.windows_words()];
            let cuts = self.cuts[index].at(&layout.windows, as_of.time);
            if state.is_spilled()
                && let Some(cold) = cold.as_mut()
            {
                let (missing, before) = (state.missing(layout, as_of.last(index), cuts), state.bytes());
                if !missing.is_empty() {
                    cold.bring_back(source, texts, state, &missing);
                    let after = state.bytes();
                    entities.state_bytes = entities.state_bytes + after - before;
                }
            }
            let state = entities.state(origin.entity, index);
            state.windows(layout, as_of.last(index), cuts, windows);
            for reading in &source.readings {
                reading.read(&layout.lanes, windows, as_of.time, &mut row);
            }
        }
    }
}

impl Horizon {
    /// What may be merged and forgotten of a state of source `index`, where no row of its entity will be asked for as of
    /// an instant before the task's settled time and before `newest`.
    fn set(&mut self, layout: &super::state::Layout, time: &TaskTime, on: Option<usize>, index: usize, newest: i64) {
        let horizon = time.settled.min(newest);
        // A row of source `on` does not see the events of the same instant of the sources after it.
        let after = on.is_some_and(|on| index > on);
        self.merge = if after { horizon.saturating_sub(1) } else { horizon };
        layout.windows.limits(horizon, &mut self.limits);
        self.merge = self.merge.min(self.limits.single);
        self.deletions = time.sources[index].watermark().unwrap_or(i64::MIN);
    }
}
