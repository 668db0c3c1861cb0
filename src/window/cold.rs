//! States of entities that had no event for long, out of memory where it has a limit.
//!
//! When a task holds more than it may, states go to its [`ColdStore`], the longest untouched ones first, and come back, the
//! same to the bit, when an event touches their entity. What stays of an entity is its key, the time of its newest event and
//! a mark: so the sweep can forget a quiet entity without reading it. The store is a cache: a checkpoint has what
//! it holds, and nothing of it outlives the process.
//!
//! The longest untouched are found by a hand that goes round: where it passes it leaves a mark, which the next event of the
//! entity takes away; an entity that still has it when the hand comes by again goes out.
//!
//! Of an entity with many single events (an exact window keeps them all), chunks of them go out by themselves, each as a
//! *block*, while the entity stays: those that were of no use since the hand last came by. What stays of a chunk is its
//! aggregate. Its events come back when the beginning of a window moves into it, when an out-of-order event joins it, or when
//! it is merged into tiles. They do not change, so a chunk that goes out again need not be written again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use super::WindowError;
use super::engine::{Engine, Source};
use super::entities::{Entities, EntityId};
use super::snapshot::{Packed, PackedRows};
use super::state::{Horizon, State};
use super::texts::Texts;

/// Mark in [`Entity::changed`](super::entities::Entity::changed): the states are in the cold store.
pub(super) const OUT: u32 = 1 << 31;
/// Mark there: not touched since the hand went by.
pub(super) const UNTOUCHED: u32 = 1 << 30;
/// The rest of that word.
pub(super) const GENERATION: u32 = UNTOUCHED - 1;

/// States that go out in one call of [`ColdStore::put`], in bytes, by the last one.
const PUT_BYTES: usize = 1 << 20;

/// Numbers in the store from here on are those of blocks, below it those of entities.
const BLOCKS: u64 = 1 << 32;

/// What is no longer needed is removed so many at a time.
const REMOVED_AT: usize = 64;

/// Where states are while they are not in memory. Nothing of it is needed once the task is gone.
pub trait ColdStore: std::fmt::Debug + Send {
    /// Keeps these bytes under their numbers, in place of what was there.
    ///
    /// # Errors
    /// What is wrong, in words, and what to do.
    fn put(&mut self, states: &[(u64, Vec<u8>)]) -> Result<(), String>;

    /// The bytes that were kept last under a number.
    ///
    /// # Errors
    /// What is wrong, in words, and what to do.
    fn get(&self, number: u64) -> Result<Vec<u8>, String>;

    /// Forgets what is kept under these numbers, where there is anything.
    ///
    /// # Errors
    /// What is wrong, in words, and what to do.
    fn remove(&mut self, numbers: &[u64]) -> Result<(), String>;

    /// Bytes on disk.
    fn disk_bytes(&self) -> u64;

    /// Bytes in memory.
    fn memory_bytes(&self) -> usize;
}

/// Events of a chunk in the store, which forgets them once nobody has this.
#[derive(Debug)]
pub(super) struct Block {
    number: u64,
    freed: Sender<u64>,
}

impl Block {
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // Without its store there is nothing to forget.
        let _ = self.freed.send(self.number);
    }
}

/// A task's cold store, and how much the task may hold in memory.
#[derive(Debug)]
pub(super) struct Cold {
    store: Box<dyn ColdStore>,
    limit: usize,
    hand: EntityId,
    /// Entities whose states are out.
    out: usize,
    /// The blocks of those, in the order of their chunks.
    blocks: HashMap<EntityId, Vec<Arc<Block>>>,
    next_block: u64,
    freed: (Sender<u64>, Receiver<u64>),
    /// Numbers of what the store may forget.
    stale: HashSet<u64>,
    /// What went wrong. The task is not to be used any more.
    failed: Option<String>,
}

impl Cold {
    pub fn new(store: Box<dyn ColdStore>, limit: usize) -> Self {
        Self {
            store,
            limit,
            hand: 0,
            out: 0,
            blocks: HashMap::new(),
            next_block: BLOCKS,
            freed: mpsc::channel(),
            stale: HashSet::new(),
            failed: None,
        }
    }

    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    pub fn disk_bytes(&self) -> u64 {
        self.store.disk_bytes()
    }

    pub fn memory_bytes(&self) -> usize {
        self.store.memory_bytes()
    }

    /// What went wrong since the last call.
    pub fn check(&mut self) -> Result<(), WindowError> {
        self.failed.take().map_or(Ok(()), |reason| Err(WindowError::Cold { reason }))
    }

    fn fetch(&self, engine: &Engine, id: EntityId) -> Result<Packed, String> {
        let bytes = self.store.get(u64::from(id))?;
        Packed::from_bytes(engine, &bytes).ok_or_else(damaged)
    }

    fn events(&self, source: &Source, block: u64) -> Result<PackedRows, String> {
        PackedRows::from_bytes(source, &self.store.get(block)?).ok_or_else(damaged)
    }

    /// The states of an entity that is out, with all events.
    pub fn get(&self, engine: &Engine, id: EntityId) -> Result<Packed, String> {
        self.fetch(engine, id)?.with_events(engine, |source, block| self.events(source, block))
    }

    /// States that are in memory but for some events, with these.
    pub fn pack(&self, engine: &Engine, states: &[State], texts: &Texts) -> Result<Packed, String> {
        Packed::of(engine, states, texts).with_events(engine, |source, block| self.events(source, block))
    }

    /// What was read; nothing where that failed, which [`Cold::check`] then tells.
    pub fn or_nothing(&mut self, engine: &Engine, read: Result<Packed, String>) -> Packed {
        read.unwrap_or_else(|reason| {
            self.failed.get_or_insert(reason);
            Packed::empty(engine)
        })
    }

    /// Brings the states of an entity back, if they are out.
    pub fn awake(&mut self, engine: &Engine, entities: &mut Entities, texts: &mut Texts, id: EntityId) {
        if entities.get(id).changed & OUT != 0 {
            let fetched = self.fetch(engine, id);
            let blocks = self.blocks.remove(&id).unwrap_or_default();
            let states = self.or_nothing(engine, fetched).into_states(engine, texts, blocks);
            entities.put_back(id, states);
            self.out -= 1;
        }
        entities.get_mut(id).changed &= GENERATION;
    }

    /// An entity is forgotten, or made anew; `out` says whether its states are out.
    pub fn forget(&mut self, id: EntityId, out: bool) {
        self.out -= usize::from(out);
        self.blocks.remove(&id);
        self.stale.insert(u64::from(id));
    }

    /// Brings the events of these chunks back.
    pub fn bring_back(&mut self, source: &Source, texts: &mut Texts, state: &mut State, chunks: &[usize]) {
        for &at in chunks {
            let chunk = &mut state.chunks()[at];
            let block = chunk.block().expect("what is not in memory is in a block").number();
            let rows = match self.events(source, block) {
                Ok(events) => events.into_rows(source, texts),
                Err(reason) => {
                    self.failed.get_or_insert(reason);
                    // What goes on with them is told to nobody, but needs events of these times.
                    let mut rows = vec![0; 2 * source.layout.row];
                    rows[0] = chunk.first().cast_unsigned();
                    rows[source.layout.row] = chunk.last().cast_unsigned();
                    rows
                }
            };
            chunk.bring_back(rows);
        }
        state.account();
    }

    /// Merges what needs events on disk, a chunk at a time. Says whether there was any.
    pub fn merge(&mut self, source: &Source, texts: &mut Texts, state: &mut State, horizon: &Horizon) -> bool {
        let mut changed = false;
        while let Some((chunk, merge)) = state.missing_to_merge(&source.layout, horizon) {
            self.bring_back(source, texts, state, &[chunk]);
            changed |= state.merge(&source.layout, &Horizon { merge, ..horizon.clone() });
        }
        changed
    }

    /// Sends states out until the task holds no more than it may, `besides` being what it holds besides its entities.
    pub fn settle(&mut self, engine: &Engine, entities: &mut Entities, texts: &Texts, besides: usize) {
        self.tidy();
        let all = 2 * entities.end() as usize;
        let besides = besides + self.memory_bytes();
        let mut waiting = Waiting::default();
        for _ in 0..all {
            if besides + entities.bytes() <= self.limit || self.failed.is_some() {
                break;
            }
            let id = self.hand;
            self.hand = (id + 1) % entities.end();
            if !entities.is_used(id) || entities.get(id).changed & OUT != 0 || !entities.has_states(id) {
                continue;
            }
            let mark = &mut entities.get_mut(id).changed;
            let touched = *mark & UNTOUCHED == 0;
            *mark |= UNTOUCHED;
            self.spill(engine, entities, texts, id, false, &mut waiting);
            if !touched && besides + entities.bytes() > self.limit {
                self.spill(engine, entities, texts, id, true, &mut waiting);
                waiting.add(u64::from(id), Packed::of(engine, entities.states(id), texts).to_bytes());
                let blocks: Vec<_> = entities.states(id).iter().flat_map(State::blocks).collect();
                if !blocks.is_empty() {
                    self.blocks.insert(id, blocks);
                }
                entities.take_out(id);
                self.out += 1;
            }
            if waiting.bytes >= PUT_BYTES {
                self.put(&mut waiting);
            }
        }
        self.put(&mut waiting);
    }

    /// Sends chunks of an entity out: those that were of no use since the last call, or all.
    fn spill(
        &mut self,
        engine: &Engine,
        entities: &mut Entities,
        texts: &Texts,
        id: EntityId,
        all: bool,
        waiting: &mut Waiting,
    ) {
        for (index, source) in engine.sources.iter().enumerate() {
            let state = entities.state(id, index);
            if !state.has_chunks() {
                continue;
            }
            let before = state.bytes();
            let chunks = state.chunks();
            let newest = chunks.len() - 1;
            for (at, chunk) in chunks.iter_mut().enumerate() {
                let keep = !all && (chunk.rest() || at == newest);
                if keep || chunk.is_out() {
                    continue;
                }
                let block = chunk.block().cloned().unwrap_or_else(|| {
                    let number = self.next_block;
                    self.next_block += 1;
                    waiting.add(number, PackedRows::of(source, chunk.rows(), texts).to_bytes());
                    Arc::new(Block { number, freed: self.freed.0.clone() })
                });
                chunk.put_out(block);
            }
            state.account();
            let after = state.bytes();
            entities.state_bytes = entities.state_bytes + after - before;
        }
    }

    /// Removes what is no longer needed, where it is much.
    fn tidy(&mut self) {
        self.stale.extend(self.freed.1.try_iter());
        if self.stale.len() < REMOVED_AT {
            return;
        }
        let numbers: Vec<u64> = self.stale.drain().collect();
        if let Err(reason) = self.store.remove(&numbers) {
            self.failed.get_or_insert(reason);
        }
    }

    fn put(&mut self, waiting: &mut Waiting) {
        let Waiting { states, .. } = std::mem::take(waiting);
        states.iter().for_each(|(number, _)| {
            self.stale.remove(number);
        });
        if !states.is_empty()
            && let Err(reason) = self.store.put(&states)
        {
            self.failed.get_or_insert(reason);
        }
    }
}

/// What is about to go out.
#[derive(Debug, Default)]
struct Waiting {
    states: Vec<(u64, Vec<u8>)>,
    bytes: usize,
}

impl Waiting {
    fn add(&mut self, number: u64, state: Vec<u8>) {
        self.bytes += state.len();
        self.states.push((number, state));
    }
}

fn damaged() -> String {
    "a state is damaged; start again".to_owned()
}
