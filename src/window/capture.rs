//! What changed since the last checkpoint, and the checkpoint being taken: a little at a time, while events go on.
//!
//! A checkpoint holds the state of one instant. Then nothing is copied but positions and the numbers of the entities to
//! write; those are encoded later, slice by slice between two batches of events, and an entity that an event or the sweep is
//! about to change is encoded before that. So no single pause grows with the state.
//!
//! A checkpoint is *whole* or holds what *changed* since the one before: the entities with events, those that the sweep has
//! merged, and the keys of those that it has forgotten. A whole one is due when there is none yet, when those that follow it
//! would together be as large as it, and after [`MOST_UPDATES`] of them: so a restore reads at most twice the state, and a
//! bounded number of files.
//!
//! Each entity carries the *generation* in which it last changed: the number of the checkpoint that will hold it. That
//! number is all that an event has to compare.

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use super::cold::{Cold, GENERATION, OUT};
use super::emitted::OpenWindows;
use super::engine::Engine;
use super::entities::{Entities, Entity, EntityId, Keys, Visit};
use super::snapshot::{Encoder, words};
use super::state::State;
use super::texts::Texts;

/// Checkpoints of changes between two whole ones, at most.
const MOST_UPDATES: u32 = 32;

/// A slice ends at this many words for each entity that it may encode.
const SLICE_WORDS: usize = 32;

/// Did not change since it was written, or restored.
pub(super) const CLEAN: u32 = 0;
/// Is in the checkpoint being taken, and did not change since.
const DONE: u32 = GENERATION - 1;
/// Is in no checkpoint, nor in the one being taken.
pub(super) const NEW: u32 = GENERATION;

/// How much of the state a checkpoint holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    Whole,
    /// What changed since the checkpoint before, which it follows.
    Changes,
}

/// A piece of a checkpoint.
#[derive(Debug, Clone, Default)]
pub struct Slice {
    /// Batches that are ready, in their order.
    pub batches: Vec<RecordBatch>,
    /// These were the last.
    pub last: bool,
}

/// Sizes of the checkpoints that a restore reads, in words.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Chain {
    /// Of the whole one, and the entities in it; `None` where there is none yet.
    pub whole: Option<(usize, usize)>,
    /// Of those that follow it, together.
    pub updates_words: usize,
    /// Number of those that follow it.
    pub updates: u32,
}

impl Chain {
    /// How much the next checkpoint holds, and how many it follows.
    fn next(&self, changed: usize, entities: usize) -> (Extent, u32) {
        let Some((words, of)) = self.whole else { return (Extent::Whole, 0) };
        let expected = changed.saturating_mul(words) / of.max(1);
        if self.updates < MOST_UPDATES && changed < entities && self.updates_words + expected < words {
            (Extent::Changes, self.updates + 1)
        } else {
            (Extent::Whole, 0)
        }
    }

    /// A checkpoint at this place comes: a whole one leaves behind what was before.
    fn start(&mut self, place: u32) {
        if place == 0 {
            *self = Self::default();
        }
    }

    /// Counts a part of the checkpoint at this place.
    pub fn add(&mut self, place: u32, words: usize, entities: usize) {
        if place == 0 {
            let (had_words, had) = self.whole.unwrap_or_default();
            self.whole = Some((had_words + words, had + entities));
        } else {
            self.updates = place;
            self.updates_words += words;
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Captures {
    /// The checkpoint that will hold what changes now.
    generation: u32,
    /// Entities of this generation. A number that was used again may be there twice.
    changed: Vec<EntityId>,
    /// Keys of entities that were forgotten in this generation.
    dropped: Keys,
    chain: Chain,
    running: Option<Running>,
}

/// A checkpoint being taken.
#[derive(Debug)]
struct Running {
    extent: Extent,
    place: u32,
    /// Keys of forgotten entities: they are the first to be written.
    dropped: Keys,
    dropped_done: usize,
    /// Entities of the generation; nothing where all are to be written.
    changed: Vec<EntityId>,
    /// How many of those, or of all numbers, are done.
    done: usize,
    end: usize,
    encoder: Encoder,
    encoded: usize,
    words: usize,
    ready: Vec<RecordBatch>,
}

impl Captures {
    /// Of a task whose checkpoints so far are these.
    pub fn new(chain: Chain) -> Self {
        Self { generation: 1, changed: Vec::new(), dropped: Keys::default(), chain, running: None }
    }

    /// True where the entity is as it was at the last checkpoint: [`Captures::before_change`] must know before it changes.
    #[inline]
    pub fn is_unchanged(&self, entity: &Entity) -> bool {
        entity.changed != self.generation
    }

    /// An entity that is unchanged so far is about to change.
    #[cold]
    pub fn before_change(
        &mut self,
        engine: &Engine,
        entities: &mut Entities,
        texts: &Texts,
        cold: Option<&mut Cold>,
        id: EntityId,
    ) {
        if entities.get(id).changed == self.generation {
            return;
        }
        if let Some(running) = self.running.as_mut().filter(|r| r.awaits(id, entities.get(id), self.generation)) {
            running.encode(engine, entities.key(id), entities.get(id), entities.states(id), texts, cold);
        }
        entities.get_mut(id).changed = self.generation;
        self.changed.push(id);
    }

    /// The sweep is about to look after an entity whose states are in memory, or to forget one whose states are not.
    pub fn before_sweep(&mut self, engine: &Engine, visit: &mut Visit<'_>, texts: &Texts, cold: Option<&mut Cold>) {
        let Visit { id, key, entity, states } = visit;
        if let Some(running) = self.running.as_mut().filter(|r| r.awaits(*id, entity, self.generation)) {
            match cold {
                Some(cold) if entity.changed & OUT != 0 => running.encode_out(engine, key, entity, cold, *id),
                cold => running.encode(engine, key, entity, states, texts, cold),
            }
            entity.changed = entity.changed & !GENERATION | DONE;
        }
    }

    /// The sweep has changed an entity.
    pub fn swept(&mut self, id: EntityId, entity: &mut Entity) {
        if entity.changed & GENERATION != self.generation {
            entity.changed = entity.changed & !GENERATION | self.generation;
            self.changed.push(id);
        }
    }

    /// The sweep has forgotten an entity.
    pub fn forgotten(&mut self, key: &[u8]) {
        self.dropped.push(key);
    }

    /// True between [`Captures::begin`] and the last slice.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// How much the next checkpoint will hold, and how many it follows since the whole one.
    pub fn next(&self, entities: &Entities, windows: &OpenWindows) -> (Extent, u32) {
        let changed = self.changed.len() + self.dropped.len() + windows.changed();
        self.chain.next(changed, entities.len() + windows.pieces())
    }

    /// Begins a checkpoint of the state as it is now: the [next](Captures::next).
    pub fn begin(
        &mut self,
        entities: &Entities,
        windows: &mut OpenWindows,
        sources: usize,
        schema: SchemaRef,
    ) -> Extent {
        debug_assert!(self.running.is_none(), "the last one has ended");
        let (extent, place) = self.next(entities, windows);
        windows.begin_checkpoint(extent, schema.clone());
        let (changed, dropped) = (std::mem::take(&mut self.changed), std::mem::take(&mut self.dropped));
        let (changed, dropped, end) = match extent {
            Extent::Whole => (Vec::new(), Keys::default(), entities.end() as usize),
            Extent::Changes => {
                let end = changed.len();
                (changed, dropped, end)
            }
        };
        self.generation += 1;
        self.running = Some(Running {
            extent,
            place,
            dropped,
            dropped_done: 0,
            changed,
            done: 0,
            end,
            encoder: Encoder::new(schema, sources),
            encoded: 0,
            words: 0,
            ready: Vec::new(),
        });
        extent
    }

    /// Encodes what the checkpoint still needs of at most `most` entities, and after those of as many entries of windows.
    pub fn slice(
        &mut self,
        engine: &Engine,
        entities: &mut Entities,
        windows: &mut OpenWindows,
        texts: &Texts,
        cold: &mut Option<Cold>,
        most: usize,
    ) -> Slice {
        let Some(running) = &mut self.running else { return Slice { batches: Vec::new(), last: true } };
        if running.dropped_done < running.dropped.len() {
            return running.slice_of_dropped(engine, most);
        }
        let mut left = most;
        let most_words = running.words + SLICE_WORDS * most;
        while running.done < running.end && left > 0 && running.words < most_words {
            let id = match running.extent {
                Extent::Whole => running.done as EntityId,
                Extent::Changes => running.changed[running.done],
            };
            left -= 1;
            if entities.is_used(id) {
                let (entity, key) = (entities.get(id), entities.key(id));
                let awaited = running.awaits(id, entity, self.generation);
                match cold.as_mut() {
                    _ if !awaited => (),
                    Some(cold) if entity.changed & OUT != 0 => running.encode_out(engine, key, entity, cold, id),
                    cold => running.encode(engine, key, entity, entities.states(id), texts, cold),
                }
                let changed = &mut entities.get_mut(id).changed;
                if awaited || *changed & GENERATION == DONE {
                    *changed = *changed & !GENERATION | CLEAN;
                }
            }
            running.done += 1;
        }
        if running.done < running.end {
            return Slice { batches: std::mem::take(&mut running.ready), last: false };
        }
        let (slice, pieces) = windows.checkpoint_slice(engine, texts, left);
        running.words += slice.batches.iter().map(words).sum::<usize>();
        running.encoded += pieces;
        running.ready.extend(slice.batches);
        if !slice.last {
            return Slice { batches: std::mem::take(&mut running.ready), last: false };
        }
        let mut running = self.running.take().expect("it was there above");
        if !running.encoder.is_empty() || running.ready.is_empty() {
            running.ready.push(running.encoder.close(engine));
        }
        self.chain.start(running.place);
        self.chain.add(running.place, running.words, running.encoded);
        Slice { batches: running.ready, last: true }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        size_of::<EntityId>() * self.changed.capacity()
            + self.dropped.bytes()
            + self.running.as_ref().map_or(0, |running| {
                let ready = running.ready.iter().map(RecordBatch::get_array_memory_size).sum::<usize>();
                8 * running.encoder.words()
                    + ready
                    + size_of::<EntityId>() * running.changed.capacity()
                    + running.dropped.bytes()
            })
    }
}

impl Running {
    /// True for an entity that is still to be encoded. Changes since the checkpoint began have the generation `now`.
    fn awaits(&self, id: EntityId, entity: &Entity, now: u32) -> bool {
        let changed = entity.changed & GENERATION;
        match self.extent {
            Extent::Whole => (self.done..self.end).contains(&(id as usize)) && ![now, NEW, DONE].contains(&changed),
            Extent::Changes => changed == now - 1,
        }
    }

    fn encode(
        &mut self,
        engine: &Engine,
        key: &[u8],
        entity: &Entity,
        states: &[State],
        texts: &Texts,
        cold: Option<&mut Cold>,
    ) {
        self.words += match cold.filter(|_| states.iter().any(State::is_spilled)) {
            Some(cold) => {
                let packed = cold.pack(engine, states, texts);
                self.encoder.add_packed(key, entity.newest, cold.or_nothing(engine, packed))
            }
            None => self.encoder.add(engine, key, entity.newest, states, texts),
        };
        self.close_if_full(engine);
    }

    fn encode_out(&mut self, engine: &Engine, key: &[u8], entity: &Entity, cold: &mut Cold, id: EntityId) {
        let packed = cold.get(engine, id);
        self.words += self.encoder.add_packed(key, entity.newest, cold.or_nothing(engine, packed));
        self.close_if_full(engine);
    }

    fn close_if_full(&mut self, engine: &Engine) {
        self.encoded += 1;
        if self.encoder.is_full() {
            self.ready.push(self.encoder.close(engine));
        }
    }

    /// Keys of forgotten entities have an encoder of their own, because an entity of the same key may be among those that
    /// are encoded already, and is to be read after them.
    fn slice_of_dropped(&mut self, engine: &Engine, most: usize) -> Slice {
        let mut encoder = Encoder::new(self.encoder.schema(), engine.sources());
        let end = self.dropped.len().min(self.dropped_done.saturating_add(most));
        for at in self.dropped_done..end {
            self.words += encoder.add_gone(engine, self.dropped.get(at));
        }
        self.dropped_done = end;
        Slice { batches: vec![encoder.close(engine)], last: false }
    }
}
