//! What is open of windows, on its way into checkpoints a little at a time, as entities are (see `window/capture.rs`).
//!
//! Pieces lie in a fixed order of places, and a walk goes through them slice by slice while events go on. What an event is
//! about to change ahead of the walk is put before that; so is what closes. Each entry carries the generation in which it
//! last changed, which tells what a checkpoint of changes has to hold.
//!
//! Nothing tells that a window has closed: the watermark of a checkpoint does.

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use super::pieces::Pending;
use crate::window::capture::Extent;
use crate::window::engine::Engine;
use crate::window::texts::Texts;

/// Generation of an entry that is in no checkpoint, nor in the one being taken.
pub(super) const NEW: u32 = u32::MAX;

/// Entries that a slice looks at for each that it may put.
const LOOKS: usize = 16;

/// Where an entry lies: its table, the start of its pane or 0, its number there.
pub(super) type Place = (usize, i64, usize);

/// What of the open windows is in checkpoints.
#[derive(Debug)]
pub(super) struct Capture {
    /// The checkpoint that will hold what changes now.
    generation: u32,
    /// Entries of this generation.
    pub changed: usize,
    running: Option<Running>,
}

/// A checkpoint being taken.
#[derive(Debug)]
struct Running {
    extent: Extent,
    /// All entries before this place are done.
    next: Place,
    /// Entries that may yet be put, and looked at, in this slice.
    left: (usize, usize),
    pending: Pending,
    schema: SchemaRef,
    ready: Vec<RecordBatch>,
    pieces: usize,
}

impl Default for Capture {
    fn default() -> Self {
        Self { generation: 1, changed: 0, running: None }
    }
}

impl Capture {
    /// The checkpoint that will hold what changes now; while a task is restored, the one that is read.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// What was told so far is in an earlier checkpoint than what follows.
    pub fn next_generation(&mut self) {
        self.generation += 1;
        self.changed = 0;
    }

    /// Begins a checkpoint of what is open now.
    pub fn begin(&mut self, extent: Extent, schema: SchemaRef) {
        self.next_generation();
        self.running = Some(Running {
            extent,
            next: (0, i64::MIN, 0),
            left: (0, 0),
            pending: Pending::default(),
            schema,
            ready: Vec::new(),
            pieces: 0,
        });
    }

    /// Goes on with the walk: at most `most` entries more.
    pub fn start_slice(&mut self, most: usize) {
        if let Some(running) = &mut self.running {
            running.left = (most, most.saturating_mul(LOOKS));
        }
    }

    /// Where the walk goes on; `None` where the slice has had enough, or nothing is running.
    pub fn next(&self) -> Option<Place> {
        self.running.as_ref().filter(|running| running.left.0 > 0 && running.left.1 > 0).map(|running| running.next)
    }

    /// Says that the walk has come to this place.
    pub fn walked_to(&mut self, place: Place) {
        if let Some(running) = &mut self.running {
            running.next = place;
        }
    }

    /// Batches that are full; at the end all, and the number of the pieces in the checkpoint.
    pub fn take(&mut self, engine: &Engine, end: bool) -> (Vec<RecordBatch>, usize) {
        if !end {
            return (self.running.as_mut().map_or_else(Vec::new, |running| std::mem::take(&mut running.ready)), 0);
        }
        let Some(mut running) = self.running.take() else { return (Vec::new(), 0) };
        if !running.pending.is_empty() {
            running.ready.push(running.pending.close(engine, &running.schema));
        }
        (running.ready, running.pieces)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.running.as_ref().map_or(0, |running| {
            running.pending.bytes() + running.ready.iter().map(RecordBatch::get_array_memory_size).sum::<usize>()
        })
    }
}

/// The open windows of one table, telling what becomes of them.
pub(super) struct Telling<'a> {
    pub capture: &'a mut Capture,
    pub engine: &'a Engine,
    pub texts: &'a Texts,
    pub table: usize,
}

impl Telling<'_> {
    /// True where the entry has changed since the last checkpoint began: [`Telling::before_change`] has nothing to do.
    #[inline]
    pub fn is_told(&self, changed: u32) -> bool {
        changed == self.capture.generation
    }

    /// An entry that is not told so far is about to change: true where its pieces have to be [put](Telling::put) before.
    pub fn before_change(&mut self, (major, minor): (i64, usize), changed: &mut u32) -> bool {
        let awaited = self.awaits((major, minor), *changed);
        if *changed != self.capture.generation {
            *changed = self.capture.generation;
            self.capture.changed += 1;
        }
        awaited
    }

    /// An entry is about to go: true where its pieces have to be [put](Telling::put) before.
    pub fn before_end(&mut self, (major, minor): (i64, usize), changed: u32) -> bool {
        self.capture.changed -= usize::from(changed == self.capture.generation);
        self.awaits((major, minor), changed)
    }

    fn awaits(&self, (major, minor): (i64, usize), changed: u32) -> bool {
        let now = self.capture.generation;
        self.capture.running.as_ref().is_some_and(|running| match running.extent {
            _ if (self.table, major, minor) < running.next => false,
            Extent::Whole => changed != now && changed != NEW,
            Extent::Changes => changed == now - 1,
        })
    }

    /// The walk comes by an entry: `None` where the slice has had enough, else whether its pieces have to be put.
    pub fn visit(&mut self, (major, minor): (i64, usize), changed: u32) -> Option<bool> {
        let awaited = self.awaits((major, minor), changed);
        let running = self.capture.running.as_mut()?;
        running.next = (self.table, major, minor);
        let (put, looks) = &mut running.left;
        if *put == 0 || *looks == 0 {
            return None;
        }
        *looks -= 1;
        *put -= usize::from(awaited);
        running.next.2 += 1;
        Some(awaited)
    }

    /// Puts a piece into the checkpoint being taken.
    #[cold]
    pub fn put(&mut self, key: &[u8], head: &[u64], lanes: &[u64]) {
        let Some(running) = &mut self.capture.running else { return };
        running.pieces += 1;
        running.pending.add(self.engine, self.texts, self.table, key, head, lanes);
        if running.pending.is_full() {
            let full = std::mem::take(&mut running.pending);
            running.ready.push(full.close(self.engine, &running.schema));
        }
    }
}
