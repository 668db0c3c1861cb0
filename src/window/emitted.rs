//! Windows that are emitted when they close.
//!
//! A window closes when the watermark of its source's partition reaches its end: no event that belongs to it is accepted
//! any more. Its row is then emitted, once. When that happens depends on the partition's log alone, so each row has an
//! offset: that of the event that moved the watermark. A replay closes the same windows at the same offsets.
//!
//! Rows that one event closes are ordered by the windows' ends, then by key.

mod buffer;
mod capture;
mod panes;
pub(super) mod pieces;
mod sessions;

use std::sync::Arc;

use arrow::datatypes::{DataType as ArrowType, Field, Schema, SchemaRef};

use self::buffer::EmittedBuffer;
use self::capture::{Capture, Telling};
use self::panes::Panes;
use self::sessions::Sessions;
use super::aggregate::{self, Lanes, Member, Outline};
use super::capture::{Extent, Slice};
use super::engine::Engine;
use super::entities::hash;
use super::ordered::visit;
use super::texts::Texts;
use super::watermark::SourceTime;
use super::{EmittedRows, WindowError, emitted_columns};
use crate::config::plan::{Column, DataType, EmittedPlan, Function, Span};

/// How the columns of one series are read.
#[derive(Debug, Clone, Default)]
struct Reading {
    /// Functions that give one value.
    functions: Vec<Function>,
    /// The column of each.
    columns: Vec<usize>,
    /// Those that give a list: its longest, and its column.
    lists: Vec<(u16, usize)>,
}

/// The windows of one table `[windows.NAME]`, compiled.
#[derive(Debug)]
pub(super) struct Emitted {
    pub name: String,
    pub source: usize,
    span: Span,
    early: Option<i64>,
    /// The events that belong to these windows.
    member: Member,
    lanes: Lanes,
    /// For each series, which is all events or those of a category.
    readings: Vec<Reading>,
    columns: Vec<Column>,
    /// What changes the meaning of a piece of state besides its layout.
    meaning: String,
    /// Lanes that hold the number of a text.
    text_lanes: Vec<usize>,
    schema: SchemaRef,
}

/// Which events of a source are in the windows of one table, and which of those in each category.
#[derive(Debug)]
pub(super) struct Membership {
    pub all: Member,
    pub categories: Vec<Member>,
}

impl Emitted {
    /// Compiles a plan's windows over a source whose rows have `mask_words` words of masks.
    pub fn new(
        plan: &EmittedPlan,
        keys: &[Column],
        Membership { all, categories }: Membership,
        mut outline: Outline,
        mask_words: usize,
        is_text: bool,
    ) -> Self {
        plan.functions.iter().for_each(|(function, _)| outline.parts.include(*function, outline.kind));
        let lanes = Lanes::of_windows(outline, categories, mask_words);
        let mut readings = vec![Reading::default(); lanes.series()];
        for (at, (function, _)) in plan.functions.iter().enumerate() {
            let reading = &mut readings[plan.by.as_ref().map_or(0, |by| by.of_feature[at])];
            if let Function::LastN(most) = function {
                reading.lists.push((*most, at));
                continue;
            }
            reading.functions.push(*function);
            reading.columns.push(at);
        }
        let by = plan.by.as_ref().map(|by| format!(" by {} {:?}", by.column.name, by.categories));
        let decay = plan.half_life_ms.map(|half_life| format!(" half-life {half_life}"));
        let columns: Vec<Column> = plan.functions.iter().map(|(_, column)| column.clone()).collect();
        let time = DataType::Timestamp.to_arrow();
        let keys = keys.iter().map(|key| Field::new(key.name.as_ref(), key.data_type.to_arrow(), false));
        let bounds = [emitted_columns::START, emitted_columns::END].map(|name| Field::new(name, time.clone(), false));
        let values = columns.iter().map(|column| Field::new(column.name.as_ref(), column.data_type.to_arrow(), true));
        let rest = [
            Field::new(emitted_columns::FINAL, ArrowType::Boolean, false),
            Field::new(emitted_columns::OFFSET, ArrowType::Int64, false),
        ];
        Self {
            name: plan.name.clone(),
            source: plan.source,
            span: plan.span,
            early: plan.early_ms,
            member: all,
            text_lanes: (0..lanes.series()).flat_map(|at| lanes.value_lanes(at)).filter(|_| is_text).collect(),
            lanes,
            readings,
            meaning: [by, decay].into_iter().flatten().collect(),
            schema: Arc::new(Schema::new(keys.chain(bounds).chain(values).chain(rest).collect::<Vec<_>>())),
            columns,
        }
    }

    /// Words of a piece of state before its lanes.
    fn head(&self) -> usize {
        match self.span {
            Span::Hopping { .. } => panes::HEAD,
            Span::Session { .. } => sessions::HEAD,
        }
    }

    /// What the words of a piece of state mean.
    pub fn layout_in_words(&self) -> String {
        let head = match self.span {
            Span::Hopping { length_ms, step_ms } => format!("length {length_ms} step {step_ms} piece: start fresh"),
            Span::Session { gap_ms } => format!("gap {gap_ms} piece: start last fresh"),
        };
        let lanes: Vec<String> = self.lanes.names().collect();
        format!("{} early {:?}{} {head} {}\n", self.name, self.early, self.meaning, lanes.join(" "))
    }

    /// Bytes of a pane or a session of one entity, whose key is taken to have 16 bytes.
    pub fn piece_bytes(&self) -> usize {
        8 * self.lanes.width()
            + match self.span {
                Span::Hopping { .. } => panes::ENTRY_BYTES,
                Span::Session { .. } => sessions::ENTRY_BYTES,
            }
    }

    fn open(&self) -> Open {
        match self.span {
            Span::Hopping { length_ms, step_ms } => Open::Panes(Panes::new(length_ms, step_ms)),
            Span::Session { gap_ms } => Open::Sessions(Sessions::new(gap_ms)),
        }
    }
}

/// What is open of one table's windows.
#[derive(Debug)]
enum Open {
    Panes(Panes),
    Sessions(Sessions),
}

impl Open {
    fn insert(&mut self, lanes: &Lanes, hash: u64, key: &[u8], row: &[u64], to: &mut Telling<'_>) {
        match self {
            Self::Panes(panes) => panes.insert(lanes, hash, key, row, to),
            Self::Sessions(sessions) => sessions.insert(lanes, hash, key, row, to),
        }
    }

    /// Number of pieces.
    fn len(&self) -> usize {
        match self {
            Self::Panes(panes) => panes.len(),
            Self::Sessions(sessions) => sessions.len(),
        }
    }

    /// The first watermark at which a window closes; `i64::MAX` where nothing is open.
    fn due(&self) -> i64 {
        match self {
            Self::Panes(panes) => panes.due(),
            Self::Sessions(sessions) => sessions.due(),
        }
    }
}

/// All windows of a task that are open, and the rows of those that have closed.
#[derive(Debug)]
pub(super) struct OpenWindows {
    tables: Vec<Table>,
    /// By source: what its next event may do.
    ticks: Vec<Tick>,
    capture: Capture,
}

#[derive(Debug)]
struct Table {
    open: Open,
    rows: EmittedBuffer,
}

/// When something has to be done for the windows of a source.
#[derive(Debug, Clone, Copy)]
struct Tick {
    /// From this watermark on a window closes.
    due: i64,
    /// From this event time on early results are due.
    early: i64,
    /// Highest event time before the next event.
    seen: Option<i64>,
}

/// An event on its way into windows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Event<'a> {
    /// Its source.
    pub source: usize,
    /// Its offset.
    pub offset: i64,
    /// Its key's bytes.
    pub key: &'a [u8],
    /// Its row: time, mask, values.
    pub row: &'a [u64],
}

impl OpenWindows {
    pub fn new(engine: &Engine) -> Self {
        let table = |emitted: &Emitted| Table { open: emitted.open(), rows: EmittedBuffer::new(emitted.columns.len()) };
        Self {
            tables: engine.emitted.iter().map(table).collect(),
            ticks: vec![Tick { due: i64::MAX, early: i64::MAX, seen: None }; engine.sources()],
            capture: Capture::default(),
        }
    }

    /// The pieces that come back from now on are of a later checkpoint.
    pub fn next_checkpoint(&mut self) {
        self.capture.next_generation();
    }

    /// Goes on from the clocks of the sources, once all pieces of state are back. What had closed before the last of them
    /// was told is forgotten.
    pub fn restored(&mut self, engine: &Engine, texts: &Texts, clocks: &[SourceTime]) {
        for (table, (open, emitted)) in self.tables.iter_mut().zip(&engine.emitted).enumerate() {
            let Some(watermark) = clocks[emitted.source].watermark() else { continue };
            let to = &mut Telling { capture: &mut self.capture, engine, texts, table };
            match &mut open.open {
                Open::Panes(panes) => panes.closed_to(watermark),
                Open::Sessions(sessions) => sessions.close(watermark, to, |_, _, _, _| ()),
            }
        }
        self.capture.next_generation();
        for (source, clock) in clocks.iter().enumerate() {
            self.set_tick(engine, source, clock.newest);
        }
    }

    /// Takes an event that is not late, after the clock of its source has seen it.
    #[inline]
    pub fn take(&mut self, engine: &Engine, texts: &Texts, event: Event<'_>, clock: &SourceTime) {
        let tick = self.ticks[event.source];
        let time = event.row[0] as i64;
        if tick.seen.is_none() {
            self.set_tick(engine, event.source, clock.newest);
        } else if clock.watermark().is_some_and(|watermark| watermark >= tick.due) || time >= tick.early {
            self.tick(engine, texts, event, clock);
        }
        let mut hashed = None;
        for (number, (table, emitted)) in self.tables.iter_mut().zip(&engine.emitted).enumerate() {
            if emitted.source == event.source && emitted.member.has(event.row) {
                let hash = *hashed.get_or_insert_with(|| hash(event.key));
                let to = &mut Telling { capture: &mut self.capture, engine, texts, table: number };
                table.open.insert(&emitted.lanes, hash, event.key, event.row, to);
                let due = &mut self.ticks[event.source].due;
                *due = (*due).min(table.open.due());
            }
        }
    }

    /// Closes what the watermark has passed, then gives early results, where they are due. The event itself is not in them.
    #[cold]
    fn tick(&mut self, engine: &Engine, texts: &Texts, event: Event<'_>, clock: &SourceTime) {
        let (source, at) = (event.source, (event.offset, event.row[0] as i64));
        let Some(watermark) = clock.watermark() else { return };
        let tables = self.tables.iter_mut().zip(&engine.emitted).enumerate();
        for (number, (table, emitted)) in tables.filter(|(_, (_, emitted))| emitted.source == source) {
            let to = &mut Telling { capture: &mut self.capture, engine, texts, table: number };
            let rows = &mut table.rows;
            let mut put = |last: bool, key: &[u8], start: i64, end: i64, lanes: &[u64]| {
                rows.push(key, start, end, last, at);
                let span = aggregate::Span { as_of: end, seconds: (end - start) as f64 / 1000.0 };
                for (series, Reading { functions, columns, lists }) in emitted.readings.iter().enumerate() {
                    emitted.lanes.read(series, functions, lanes, span, |at, value| rows.set(columns[at], value));
                    for &(most, column) in lists {
                        rows.set_list(column, emitted.lanes.read_list(series, most, lanes));
                    }
                }
            };
            match &mut table.open {
                Open::Panes(panes) => panes.close(&emitted.lanes, watermark, to, |k, s, e, l| put(true, k, s, e, l)),
                Open::Sessions(sessions) => sessions.close(watermark, to, |k, s, e, l| put(true, k, s, e, l)),
            }
            if emitted.early.is_some_and(|every| crosses(self.ticks[source].seen, clock.newest, every)) {
                match &mut table.open {
                    Open::Panes(panes) => panes.early(&emitted.lanes, to, |k, s, e, l| put(false, k, s, e, l)),
                    Open::Sessions(sessions) => sessions.early(to, |k, s, e, l| put(false, k, s, e, l)),
                }
            }
        }
        self.set_tick(engine, source, clock.newest);
    }

    fn set_tick(&mut self, engine: &Engine, source: usize, newest: Option<i64>) {
        let own = || self.tables.iter().zip(&engine.emitted).filter(|(_, emitted)| emitted.source == source);
        let next = |every: i64| newest.map_or(i64::MIN, |newest| (newest.div_euclid(every) + 1).saturating_mul(every));
        let early = own().filter_map(|(_, emitted)| emitted.early).map(next).min().unwrap_or(i64::MAX);
        let due = own().map(|(table, _)| table.open.due()).min().unwrap_or(i64::MAX);
        self.ticks[source] = Tick { due, early, seen: newest };
    }

    /// The rows since the last call, one batch a table; none where there are no rows.
    pub fn build(&mut self, engine: &Engine, texts: &Texts) -> Result<Vec<Option<EmittedRows>>, WindowError> {
        let tables = self.tables.iter_mut().zip(&engine.emitted);
        tables.map(|(table, emitted)| table.rows.build(emitted, &engine.keys, texts)).collect()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let open = |open: &Open| match open {
            Open::Panes(panes) => panes.bytes(),
            Open::Sessions(sessions) => sessions.bytes(),
        };
        self.tables.iter().map(|table| open(&table.open)).sum::<usize>() + self.capture.bytes()
    }

    /// Number of pieces of state.
    pub fn pieces(&self) -> usize {
        self.tables.iter().map(|table| table.open.len()).sum()
    }

    /// About how many of them have changed since the last checkpoint began.
    pub fn changed(&self) -> usize {
        self.capture.changed
    }

    /// Begins a checkpoint of what is open now, in batches of this schema.
    pub fn begin_checkpoint(&mut self, extent: Extent, schema: SchemaRef) {
        self.capture.begin(extent, schema);
    }

    /// The next piece of the checkpoint that was begun, of at most `most` changed entries, and at the end the number of pieces in it.
    pub fn checkpoint_slice(&mut self, engine: &Engine, texts: &Texts, most: usize) -> (Slice, usize) {
        self.capture.start_slice(most);
        while let Some((table, major, minor)) = self.capture.next() {
            let Some(open) = self.tables.get(table).map(|table| &table.open) else {
                let (batches, pieces) = self.capture.take(engine, true);
                return (Slice { batches, last: true }, pieces);
            };
            let to = &mut Telling { capture: &mut self.capture, engine, texts, table };
            let ended = match open {
                Open::Panes(panes) => panes.walk(engine.emitted[table].lanes.width(), (major, minor), to),
                Open::Sessions(sessions) => sessions.walk(minor, to),
            };
            if ended {
                self.capture.walked_to((table + 1, i64::MIN, 0));
            }
        }
        let (batches, _) = self.capture.take(engine, false);
        (Slice { batches, last: false }, 0)
    }

    /// Calls `change` with every word that holds the number of a text.
    pub fn for_each_text(&mut self, engine: &Engine, mut change: impl FnMut(&mut u64)) {
        for (table, emitted) in self.tables.iter_mut().zip(&engine.emitted) {
            let (width, lanes) = (emitted.lanes.width(), &emitted.text_lanes);
            let mut all = |words: &mut [u64]| visit(words, width.max(1), 0, lanes, &mut change);
            match &mut table.open {
                Open::Panes(panes) => panes.for_each_lanes(&mut all),
                Open::Sessions(sessions) => sessions.for_each_lanes(&mut all),
            }
        }
    }

    /// Calls `piece` with the number of a table, a key, and the head and the lanes of each piece of state.
    pub fn for_each_piece(&self, engine: &Engine, mut piece: impl FnMut(usize, &[u8], &[u64], &[u64])) {
        for (index, (table, emitted)) in self.tables.iter().zip(&engine.emitted).enumerate() {
            let mut put = |key: &[u8], head: &[u64], lanes: &[u64]| piece(index, key, head, lanes);
            match &table.open {
                Open::Panes(panes) => panes.for_each_piece(emitted.lanes.width(), &mut put),
                Open::Sessions(sessions) => sessions.for_each_piece(&mut put),
            }
        }
    }

    /// Puts a piece of state back. False where its words do not fit.
    pub fn restore_piece(&mut self, engine: &Engine, table: usize, key: &[u8], words: &[u64]) -> bool {
        let emitted = &engine.emitted[table];
        if words.len() != emitted.head() + emitted.lanes.width() {
            return false;
        }
        let generation = self.capture.generation();
        match &mut self.tables[table].open {
            Open::Panes(panes) => panes.restore_piece(&emitted.lanes, hash(key), key, words, generation),
            Open::Sessions(sessions) => sessions.restore_piece(hash(key), key, words, generation),
        }
        true
    }
}

impl Emitted {
    /// Words of a piece of state that hold the number of a text.
    pub fn text_words(&self) -> impl Iterator<Item = usize> + '_ {
        self.text_lanes.iter().map(|lane| self.head() + lane)
    }
}

/// True where a multiple of `every` lies after `before` and not after `newest`.
fn crosses(before: Option<i64>, newest: Option<i64>, every: i64) -> bool {
    match (before, newest) {
        (Some(before), Some(newest)) => before.div_euclid(every) < newest.div_euclid(every),
        _ => false,
    }
}
