//! States of entities that had no event for long, out of memory where it has a limit.
//!
//! When a task holds more than it may, states go to its [`ColdStore`], the longest untouched ones first, and come back, the
//! same to the bit, when an event touches their entity. What stays of an entity is its key, the time of its newest event and
//! a mark: so the sweep can forget a quiet entity without reading it. The store is a cache: a checkpoint has what
//! it holds, and nothing of it outlives the process.
//!
//! The longest untouched are found by a hand that goes round: where it passes it leaves a mark, which the next event of the
//! entity takes away; an entity that still has it when the hand comes by again goes out.

use super::WindowError;
use super::engine::Engine;
use super::entities::{Entities, EntityId};
use super::snapshot::Packed;
use super::texts::Texts;

/// Mark in [`Entity::changed`](super::entities::Entity::changed): the states are in the cold store.
pub(super) const OUT: u32 = 1 << 31;
/// Mark there: not touched since the hand went by.
pub(super) const UNTOUCHED: u32 = 1 << 30;
/// The rest of that word.
pub(super) const GENERATION: u32 = UNTOUCHED - 1;

/// States that go out in one call of [`ColdStore::put`], in bytes, by the last one.
const PUT_BYTES: usize = 1 << 20;

/// Where states are while they are not in memory. Nothing of it is needed once the task is gone.
pub trait ColdStore: std::fmt::Debug + Send {
    /// Keeps these bytes under their numbers, in place of what was there.
    ///
    /// # Errors
    /// What is wrong, in words, and what to do.
    fn put(&mut self, states: &[(u32, Vec<u8>)]) -> Result<(), String>;

    /// The bytes that were kept last under a number.
    ///
    /// # Errors
    /// What is wrong, in words, and what to do.
    fn get(&self, number: u32) -> Result<Vec<u8>, String>;

    /// Bytes on disk.
    fn disk_bytes(&self) -> u64;

    /// Bytes in memory.
    fn memory_bytes(&self) -> usize;
}

/// A task's cold store, and how much the task may hold in memory.
#[derive(Debug)]
pub(super) struct Cold {
    store: Box<dyn ColdStore>,
    limit: usize,
    hand: EntityId,
    /// Entities whose states are out.
    pub out: usize,
    /// What went wrong. The task is not to be used any more.
    failed: Option<String>,
}

impl Cold {
    pub fn new(store: Box<dyn ColdStore>, limit: usize) -> Self {
        Self { store, limit, hand: 0, out: 0, failed: None }
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

    /// The states of an entity that is out.
    pub fn get(&self, engine: &Engine, id: EntityId) -> Result<Packed, String> {
        let bytes = self.store.get(id)?;
        Packed::from_bytes(engine, &bytes).ok_or_else(|| "a state is damaged; start again".to_owned())
    }

    /// As [`Cold::get`]; empty ones where they cannot be read, which [`Cold::check`] then tells.
    pub fn read(&mut self, engine: &Engine, id: EntityId) -> Packed {
        self.get(engine, id).unwrap_or_else(|reason| {
            self.failed.get_or_insert(reason);
            Packed::empty(engine)
        })
    }

    /// Brings the states of an entity back, if they are out.
    pub fn awake(&mut self, engine: &Engine, entities: &mut Entities, texts: &mut Texts, id: EntityId) {
        if entities.get(id).changed & OUT != 0 {
            let states = self.read(engine, id).into_states(engine, texts);
            entities.put_back(id, states);
            self.out -= 1;
        }
        entities.get_mut(id).changed &= GENERATION;
    }

    /// Sends states out until the task holds no more than it may, `besides` being what it holds besides its entities.
    pub fn settle(&mut self, engine: &Engine, entities: &mut Entities, texts: &Texts, besides: usize) {
        let all = 2 * entities.end() as usize;
        let besides = besides + self.memory_bytes();
        let (mut packed, mut bytes) = (Vec::new(), 0);
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
            if *mark & UNTOUCHED == 0 {
                *mark |= UNTOUCHED;
                continue;
            }
            let states = Packed::of(engine, entities.states(id), texts).to_bytes();
            bytes += states.len();
            packed.push((id, states));
            entities.take_out(id);
            self.out += 1;
            if bytes >= PUT_BYTES {
                self.put(&mut packed);
                bytes = 0;
            }
        }
        self.put(&mut packed);
    }

    fn put(&mut self, packed: &mut Vec<(u32, Vec<u8>)>) {
        if !packed.is_empty()
            && let Err(reason) = self.store.put(packed)
        {
            self.failed.get_or_insert(reason);
        }
        packed.clear();
    }
}
