//! The entities of a task: from key bytes to a small number, and the states behind it.

use std::hash::Hasher;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray};
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::datatypes::Int64Type;
use hashbrown::HashTable;
use rustc_hash::FxHasher;

use super::capture::{CLEAN, NEW};
use super::cold::OUT;
use super::state::State;
use crate::config::plan::{Column, DataType};

/// Key bytes of the rows of a batch. An `Int64` is eight bytes, little-endian; a text is its UTF-8, after its length as
/// four bytes, little-endian, where the key has more than one part.
#[derive(Debug, Default)]
pub(super) struct Keys {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Keys {
    /// Encodes the columns `columns` of a batch. `Err` with a column's position if it has a null or another type.
    pub fn encode(batch: &RecordBatch, columns: &[usize], types: &[Column]) -> Result<Self, usize> {
        enum Part<'a> {
            Integer(&'a [i64]),
            Text(&'a StringArray),
        }
        let mut parts = Vec::with_capacity(columns.len());
        for (part, (&column, key)) in columns.iter().zip(types).enumerate() {
            let array = batch.column(column);
            let typed = match key.data_type {
                DataType::Int64 => array.as_primitive_opt::<Int64Type>().map(|array| Part::Integer(array.values())),
                _ => array.as_string_opt::<i32>().map(Part::Text),
            };
            parts.push(typed.filter(|_| array.null_count() == 0).ok_or(part)?);
        }
        let mut keys = Self { bytes: Vec::new(), ends: Vec::with_capacity(batch.num_rows()) };
        for row in 0..batch.num_rows() {
            for part in &parts {
                match part {
                    Part::Integer(values) => keys.bytes.extend_from_slice(&values[row].to_le_bytes()),
                    Part::Text(values) => {
                        let text = values.value(row).as_bytes();
                        if parts.len() > 1 {
                            keys.bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
                        }
                        keys.bytes.extend_from_slice(text);
                    }
                }
            }
            keys.ends.push(keys.bytes.len());
        }
        Ok(keys)
    }

    #[inline]
    pub fn get(&self, row: usize) -> &[u8] {
        let start = if row == 0 { 0 } else { self.ends[row - 1] };
        &self.bytes[start..self.ends[row]]
    }

    /// Adds a key.
    pub fn push(&mut self, key: &[u8]) {
        self.bytes.extend_from_slice(key);
        self.ends.push(self.bytes.len());
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn bytes(&self) -> usize {
        self.bytes.capacity() + size_of::<usize>() * self.ends.capacity()
    }
}

/// Columns of keys.
pub(super) fn decode_keys<'a>(keys: impl Iterator<Item = &'a [u8]>, types: &[Column]) -> Vec<ArrayRef> {
    enum Part {
        Integer(Vec<i64>),
        Text(Vec<u8>, Vec<i32>),
    }
    let mut parts: Vec<Part> = types
        .iter()
        .map(|key| match key.data_type {
            DataType::Int64 => Part::Integer(Vec::with_capacity(keys.size_hint().0)),
            _ => Part::Text(Vec::new(), vec![0]),
        })
        .collect();
    let single = parts.len() == 1;
    for mut key in keys {
        for part in &mut parts {
            match part {
                Part::Integer(values) => {
                    let (value, rest) = key.split_first_chunk().expect("an integer part has eight bytes");
                    values.push(i64::from_le_bytes(*value));
                    key = rest;
                }
                Part::Text(bytes, ends) => {
                    let mut length = key.len();
                    if !single {
                        let (prefix, rest) = key.split_first_chunk().expect("a text part starts with its length");
                        (length, key) = (u32::from_le_bytes(*prefix) as usize, rest);
                    }
                    let (text, rest) = key.split_at(length);
                    bytes.extend_from_slice(text);
                    ends.push(i32::try_from(bytes.len()).expect("keys of one batch stay below 2 GiB"));
                    key = rest;
                }
            }
        }
    }
    parts
        .into_iter()
        .map(|part| match part {
            Part::Integer(values) => std::sync::Arc::new(Int64Array::from(values)) as ArrayRef,
            Part::Text(bytes, ends) => {
                let offsets = OffsetBuffer::new(ScalarBuffer::from(ends));
                std::sync::Arc::new(StringArray::new(offsets, bytes.into(), None)) as ArrayRef
            }
        })
        .collect()
}

/// Number of an entity within its task. Reused once the entity is forgotten.
pub(super) type EntityId = u32;

/// What a task knows of an entity besides its states.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entity {
    /// Where its key starts in the arena; `FREE` where the number is not in use.
    key: u64,
    /// Time of its newest event.
    pub newest: i64,
    /// Its place among those touched since the last output, if that place says so too.
    pub touched: u32,
    /// When it last changed, as `capture.rs` counts.
    pub changed: u32,
}

const FREE: u64 = u64::MAX;

/// An entity, being looked after.
pub(super) struct Visit<'a> {
    pub id: EntityId,
    pub key: &'a [u8],
    pub entity: &'a mut Entity,
    pub states: &'a mut [State],
}

/// All entities of a task.
#[derive(Debug)]
pub(super) struct Entities {
    table: HashTable<EntityId>,
    /// Keys, each after its length as four bytes.
    arena: Vec<u8>,
    /// Bytes of the arena that belong to forgotten entities.
    garbage: usize,
    entities: Vec<Entity>,
    free: Vec<EntityId>,
    /// One a source for each entity.
    states: Vec<State>,
    sources: usize,
    /// Bytes held by all states beyond their own size.
    pub state_bytes: usize,
    /// Where the next sweep goes on.
    swept: usize,
}

impl Entities {
    pub fn new(sources: usize) -> Self {
        Self {
            table: HashTable::new(),
            arena: Vec::new(),
            garbage: 0,
            entities: Vec::new(),
            free: Vec::new(),
            states: Vec::new(),
            sources,
            state_bytes: 0,
            swept: 0,
        }
    }

    /// The entity with this key, made if it is new.
    #[inline]
    pub fn entity(&mut self, key: &[u8]) -> EntityId {
        let hash = hash(key);
        let (arena, entities) = (&self.arena, &self.entities);
        if let Some(&id) = self.table.find(hash, |&id| key_at(arena, entities[id as usize].key) == key) {
            return id;
        }
        self.insert(hash, key)
    }

    fn insert(&mut self, hash: u64, key: &[u8]) -> EntityId {
        let entity = Entity { key: self.arena.len() as u64, newest: i64::MIN, touched: u32::MAX, changed: NEW };
        self.arena.extend_from_slice(&(key.len() as u32).to_le_bytes());
        self.arena.extend_from_slice(key);
        let id = if let Some(id) = self.free.pop() {
            self.entities[id as usize] = entity;
            id
        } else {
            let id = EntityId::try_from(self.entities.len()).expect("a task has fewer than 2³² entities");
            self.entities.push(entity);
            self.states.resize_with(self.entities.len() * self.sources, State::default);
            id
        };
        let (arena, entities) = (&self.arena, &self.entities);
        self.table.insert_unique(hash, id, |&id| self::hash(key_at(arena, entities[id as usize].key)));
        id
    }

    #[inline]
    pub fn get_mut(&mut self, id: EntityId) -> &mut Entity {
        &mut self.entities[id as usize]
    }

    #[inline]
    pub fn get(&self, id: EntityId) -> &Entity {
        &self.entities[id as usize]
    }

    #[inline]
    pub fn key(&self, id: EntityId) -> &[u8] {
        key_at(&self.arena, self.entities[id as usize].key)
    }

    #[inline]
    pub fn state(&mut self, id: EntityId, source: usize) -> &mut State {
        &mut self.states[id as usize * self.sources + source]
    }

    #[inline]
    pub fn states(&self, id: EntityId) -> &[State] {
        &self.states[id as usize * self.sources..][..self.sources]
    }

    /// Counts the bytes of all states anew.
    pub fn account(&mut self) {
        self.states.iter_mut().for_each(State::account);
        self.state_bytes = self.states.iter().map(State::bytes).sum();
    }

    /// All numbers in use are below this.
    pub fn end(&self) -> EntityId {
        self.entities.len() as EntityId
    }

    /// True for the number of an entity, false for one that waits to be used again.
    pub fn is_used(&self, id: EntityId) -> bool {
        self.entities[id as usize].key != FREE
    }

    /// All entities are as they are in the checkpoint that they were restored from.
    pub fn all_clean(&mut self) {
        self.entities.iter_mut().for_each(|entity| entity.changed = entity.changed & OUT | CLEAN);
    }

    /// Numbers of all entities.
    pub fn ids(&self) -> impl Iterator<Item = EntityId> {
        let all = self.entities.iter().enumerate();
        all.filter(|(_, entity)| entity.key != FREE).map(|(id, _)| id as EntityId)
    }

    /// Number of entities.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Visits the next `count` numbers in turn. `tend` may change the states and says whether the entity is to be forgotten.
    pub fn sweep(&mut self, count: usize, mut tend: impl FnMut(Visit<'_>) -> bool) {
        for _ in 0..count.min(self.entities.len()) {
            let id = self.swept;
            self.swept = (id + 1) % self.entities.len();
            let entity = &mut self.entities[id];
            if entity.key == FREE {
                continue;
            }
            let key = key_at(&self.arena, entity.key);
            let states = &mut self.states[id * self.sources..][..self.sources];
            let before: usize = states.iter().map(State::bytes).sum();
            let forget = tend(Visit { id: id as EntityId, key, entity, states });
            states.iter_mut().for_each(State::account);
            let after: usize = states.iter().map(State::bytes).sum();
            self.state_bytes = self.state_bytes + after - before;
            if forget {
                self.forget(id as EntityId);
            }
        }
        if self.garbage > 4096 && self.garbage > self.arena.len() / 2 {
            self.compact();
        }
    }

    /// Forgets the entity with this key. Its number, if there was one, and whether its states were out.
    pub fn remove(&mut self, key: &[u8]) -> Option<(EntityId, bool)> {
        let (arena, entities) = (&self.arena, &self.entities);
        let id = *self.table.find(hash(key), |&id| key_at(arena, entities[id as usize].key) == key)?;
        self.states[id as usize * self.sources..][..self.sources].fill_with(State::default);
        self.forget(id);
        Some((id, self.entities[id as usize].changed & OUT != 0))
    }

    /// True where any state of the entity has anything in memory.
    pub fn has_states(&self, id: EntityId) -> bool {
        self.states(id).iter().any(|state| !state.is_empty())
    }

    /// Marks an entity as out, and drops its states.
    pub fn take_out(&mut self, id: EntityId) {
        let states = &mut self.states[id as usize * self.sources..][..self.sources];
        self.state_bytes -= states.iter().map(State::bytes).sum::<usize>();
        states.fill_with(State::default);
        self.entities[id as usize].changed |= OUT;
    }

    /// Takes back the states of an entity that was out.
    pub fn put_back(&mut self, id: EntityId, states: Vec<State>) {
        self.state_bytes += states.iter().map(State::bytes).sum::<usize>();
        self.states.splice(id as usize * self.sources..(id as usize + 1) * self.sources, states);
        self.entities[id as usize].changed &= !OUT;
    }

    fn forget(&mut self, id: EntityId) {
        let key = self.key(id);
        let (hash, length) = (hash(key), key.len());
        let found = self.table.find_entry(hash, |&found| found == id);
        found.expect("every entity in use is in the table").remove();
        self.entities[id as usize].key = FREE;
        self.free.push(id);
        self.garbage += length + 4;
    }

    /// Calls `change` with every state.
    pub fn for_each_state(&mut self, mut change: impl FnMut(usize, &mut State)) {
        let sources = self.sources;
        self.states.iter_mut().enumerate().for_each(|(at, state)| change(at % sources, state));
    }

    fn compact(&mut self) {
        let mut arena = Vec::with_capacity(self.arena.len() - self.garbage);
        for entity in self.entities.iter_mut().filter(|entity| entity.key != FREE) {
            let start = entity.key as usize;
            let length = key_at(&self.arena, entity.key).len() + 4;
            entity.key = arena.len() as u64;
            arena.extend_from_slice(&self.arena[start..start + length]);
        }
        self.arena = arena;
        self.garbage = 0;
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let table = self.table.allocation_size();
        table
            + self.arena.capacity()
            + size_of::<Entity>() * self.entities.capacity()
            + size_of::<EntityId>() * self.free.capacity()
            + size_of::<State>() * self.states.capacity()
            + self.state_bytes
    }
}

#[inline]
pub(super) fn hash(key: &[u8]) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(key);
    hasher.finish()
}

#[inline]
fn key_at(arena: &[u8], at: u64) -> &[u8] {
    let at = at as usize;
    let (length, rest) = arena[at..].split_first_chunk().expect("each key starts with its length");
    &rest[..u32::from_le_bytes(*length) as usize]
}
