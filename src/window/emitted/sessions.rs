//! Session windows: runs of an entity's events, each less than a gap after the one before it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use hashbrown::HashTable;

use super::capture::{NEW, Telling};
use crate::window::aggregate::Lanes;

/// Words of a piece of state before its lanes: first event, last event, and whether it changed since the last early results.
pub(super) const HEAD: usize = 3;

/// Bytes of an entity with one session besides its lanes, its key taken to have 16 bytes.
pub(super) const ENTRY_BYTES: usize =
    size_of::<Entity>() + 16 + size_of::<Session>() + 2 * size_of::<u32>() + size_of::<(i64, u32)>();

/// See the module.
#[derive(Debug)]
pub(super) struct Sessions {
    gap: i64,
    table: HashTable<u32>,
    /// By number; a free one has no sessions.
    entities: Vec<Entity>,
    free: Vec<u32>,
    /// When entities are to be looked at: no later than when their first session closes. Entries that an entity does not
    /// have any more are passed over.
    calendar: BinaryHeap<Reverse<(i64, u32)>>,
    sessions: usize,
    width: usize,
}

/// The open sessions of one entity.
#[derive(Debug)]
struct Entity {
    hash: u64,
    key: Box<[u8]>,
    /// Ascending, at least a gap between them.
    sessions: Vec<Session>,
    /// Its entry in the calendar.
    scheduled: i64,
    /// The generation in which it last changed, as `capture.rs` counts.
    changed: u32,
}

#[derive(Debug)]
struct Session {
    start: i64,
    last: i64,
    fresh: bool,
    lanes: Box<[u64]>,
}

impl Entity {
    /// A number that is not in use has the empty key.
    fn new(hash: u64, key: &[u8]) -> Self {
        Self { hash, key: key.into(), sessions: Vec::new(), scheduled: i64::MAX, changed: NEW }
    }

    /// Calls `piece` with the key, head and lanes of each session.
    fn pieces(&self, piece: &mut impl FnMut(&[u8], &[u64], &[u64])) {
        for session in &self.sessions {
            let head = [session.start as u64, session.last as u64, u64::from(session.fresh)];
            piece(&self.key, &head, &session.lanes);
        }
    }

    /// The sessions are about to change.
    fn tell(&mut self, number: u32, to: &mut Telling<'_>) {
        if !to.is_told(self.changed) && to.before_change((0, number as usize), &mut self.changed) {
            self.pieces(&mut |key, head, lanes| to.put(key, head, lanes));
        }
    }
}

impl Sessions {
    pub fn new(gap: i64) -> Self {
        Self {
            gap,
            table: HashTable::new(),
            entities: Vec::new(),
            free: Vec::new(),
            calendar: BinaryHeap::new(),
            sessions: 0,
            width: 0,
        }
    }

    pub fn due(&self) -> i64 {
        self.calendar.peek().map_or(i64::MAX, |Reverse((due, _))| *due)
    }

    /// Number of pieces.
    pub fn len(&self) -> usize {
        self.sessions
    }

    /// Takes the checkpoint's walk on from the entity of a number. True at the end.
    pub fn walk(&self, from: usize, to: &mut Telling<'_>) -> bool {
        for (number, entity) in self.entities.iter().enumerate().skip(from) {
            match to.visit((0, number), entity.changed) {
                Some(true) => entity.pieces(&mut |key, head, lanes| to.put(key, head, lanes)),
                Some(false) => (),
                None => return false,
            }
        }
        true
    }

    pub fn insert(&mut self, lanes: &Lanes, hash: u64, key: &[u8], row: &[u64], to: &mut Telling<'_>) {
        self.width = lanes.width();
        let time = row[0] as i64;
        let number = self.entity(hash, key);
        self.entities[number as usize].tell(number, to);
        let sessions = &mut self.entities[number as usize].sessions;
        // Sessions before this one end too early for the event.
        let at = sessions.partition_point(|session| session.last.saturating_add(self.gap) <= time);
        let joins = |session: &Session| time.saturating_add(self.gap) > session.start;
        if !sessions.get(at).is_some_and(joins) {
            let mut empty = vec![0; lanes.width()].into_boxed_slice();
            lanes.clear(&mut empty);
            sessions.insert(at, Session { start: time, last: time, fresh: true, lanes: empty });
            self.sessions += 1;
        }
        let session = &mut sessions[at];
        session.start = session.start.min(time);
        session.last = session.last.max(time);
        session.fresh = true;
        lanes.add_event(&mut session.lanes, row);
        // It may have closed the gap to the session after it.
        let end = session.last.saturating_add(self.gap);
        if sessions.get(at + 1).is_some_and(|next| next.start < end) {
            let mut later = sessions.remove(at + 1);
            let session = &mut sessions[at];
            lanes.unite(&mut later.lanes, &session.lanes);
            *session = Session { start: session.start, fresh: true, ..later };
            self.sessions -= 1;
        }
        self.schedule(number);
    }

    fn entity(&mut self, hash: u64, key: &[u8]) -> u32 {
        let entities = &self.entities;
        if let Some(&number) = self.table.find(hash, |&number| *entities[number as usize].key == *key) {
            return number;
        }
        let entity = Entity::new(hash, key);
        let number = match self.free.pop() {
            Some(number) => {
                self.entities[number as usize] = entity;
                number
            }
            None => {
                self.entities.push(entity);
                u32::try_from(self.entities.len() - 1).expect("a task has fewer than 2³² entities")
            }
        };
        let entities = &self.entities;
        self.table.insert_unique(hash, number, |&number| entities[number as usize].hash);
        number
    }

    /// Puts an entity into the calendar where its first session would close before it is looked at.
    fn schedule(&mut self, number: u32) {
        let entity = &mut self.entities[number as usize];
        let Some(first) = entity.sessions.first() else { return };
        let end = first.last.saturating_add(self.gap);
        if end < entity.scheduled {
            entity.scheduled = end;
            self.calendar.push(Reverse((end, number)));
        }
    }

    /// Emits all sessions that end at `watermark` or before: key, start, end, lanes.
    pub fn close(&mut self, watermark: i64, to: &mut Telling<'_>, mut emit: impl FnMut(&[u8], i64, i64, &[u64])) {
        let mut closed: Vec<(i64, u32, Session)> = Vec::new();
        let mut ended = Vec::new();
        while let Some(&Reverse((due, number))) = self.calendar.peek()
            && due <= watermark
        {
            self.calendar.pop();
            let entity = &mut self.entities[number as usize];
            if entity.scheduled != due {
                continue;
            }
            entity.scheduled = i64::MAX;
            let count = entity.sessions.partition_point(|session| session.last.saturating_add(self.gap) <= watermark);
            if count > 0 {
                entity.tell(number, to);
            }
            closed.extend(entity.sessions.drain(..count).map(|s| (s.last.saturating_add(self.gap), number, s)));
            if entity.sessions.is_empty() {
                ended.push(number);
            } else {
                self.schedule(number);
            }
        }
        self.sessions -= closed.len();
        let key = |number: u32| &*self.entities[number as usize].key;
        closed.sort_unstable_by(|(end_a, a, _), (end_b, b, _)| (end_a, key(*a)).cmp(&(end_b, key(*b))));
        for (end, number, session) in &closed {
            emit(key(*number), session.start, *end, &session.lanes);
        }
        for number in ended {
            let hash = self.entities[number as usize].hash;
            if let Ok(entry) = self.table.find_entry(hash, |&other| other == number) {
                entry.remove();
            }
            to.before_end((0, number as usize), self.entities[number as usize].changed);
            self.entities[number as usize] = Entity::new(0, &[]);
            self.free.push(number);
        }
    }

    /// Emits all open sessions with new events since the last call.
    pub fn early(&mut self, to: &mut Telling<'_>, mut emit: impl FnMut(&[u8], i64, i64, &[u64])) {
        let fresh = |entity: &&Entity| entity.sessions.iter().any(|session| session.fresh);
        let mut entities: Vec<&Entity> = self.entities.iter().filter(fresh).collect();
        entities.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        for entity in entities {
            for session in entity.sessions.iter().filter(|session| session.fresh) {
                emit(&entity.key, session.start, session.last.saturating_add(self.gap), &session.lanes);
            }
        }
        for (number, entity) in self.entities.iter_mut().enumerate() {
            if entity.sessions.iter().any(|session| session.fresh) {
                entity.tell(number as u32, to);
                entity.sessions.iter_mut().for_each(|session| session.fresh = false);
            }
        }
    }

    pub fn bytes(&self) -> usize {
        let entity = size_of::<Entity>() + 16 + size_of::<Session>();
        self.table.allocation_size()
            + entity * self.entities.capacity()
            + (size_of::<Session>() + 8 * self.width) * self.sessions
            + size_of::<(i64, u32)>() * self.calendar.capacity()
    }

    pub fn for_each_lanes(&mut self, change: &mut impl FnMut(&mut [u64])) {
        let sessions = self.entities.iter_mut().flat_map(|entity| &mut entity.sessions);
        sessions.for_each(|session| change(&mut session.lanes));
    }

    pub fn for_each_piece(&self, piece: &mut impl FnMut(&[u8], &[u64], &[u64])) {
        self.entities.iter().for_each(|entity| entity.pieces(piece));
    }

    /// Puts a piece back. The pieces of an entity that are of one generation take the place of all before.
    pub fn restore_piece(&mut self, hash: u64, key: &[u8], words: &[u64], generation: u32) {
        self.width = words.len() - HEAD;
        let number = self.entity(hash, key);
        let entity = &mut self.entities[number as usize];
        if std::mem::replace(&mut entity.changed, generation) != generation {
            self.sessions -= entity.sessions.len();
            entity.sessions.clear();
        }
        let session = Session {
            start: words[0] as i64,
            last: words[1] as i64,
            fresh: words[2] != 0,
            lanes: words[HEAD..].into(),
        };
        let sessions = &mut self.entities[number as usize].sessions;
        let at = sessions.partition_point(|other| other.start < session.start);
        sessions.insert(at, session);
        self.sessions += 1;
        self.schedule(number);
    }
}
