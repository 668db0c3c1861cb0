//! A consumer group within one process: who owns what, and since when.
//!
//! Eager, as in Kafka: when a member comes or goes, every member first gives back what it has, at its next poll, and only
//! then are partitions handed out again under the next generation. A member may commit until it gives back, and never
//! under an old generation. One that does not poll for too long is left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::broker::TopicPartition;

/// How long the others wait for a member to give back its partitions.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Members of one group.
#[derive(Default)]
pub(super) struct Group {
    generation: u64,
    members: BTreeMap<u64, Member>,
    /// Members replaced by a newer one of the same static name.
    fenced: BTreeSet<u64>,
    /// Set while members give back: when those who have not are left behind.
    gathering: Option<Instant>,
}

struct Member {
    topics: Vec<Arc<str>>,
    static_name: Option<String>,
    owned: Vec<TopicPartition>,
    /// Owns nothing (any more) and waits for the next generation.
    waiting: bool,
    /// Has heard what it owns.
    told: bool,
}

/// What a member learns at its poll.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing has changed.
    Same,
    /// Give these back.
    Revoked(Vec<TopicPartition>),
    /// Take these up, under this generation.
    Assigned(Vec<TopicPartition>, u64),
    /// The group went on without this member.
    LeftBehind,
    /// A newer member has this one's static name.
    Fenced,
}

impl Group {
    /// Adds a member.
    pub(super) fn join(&mut self, id: u64, topics: Vec<Arc<str>>, static_name: Option<String>, now: Instant) {
        if static_name.is_some() {
            let older: Vec<u64> =
                self.members.iter().filter(|(_, m)| m.static_name == static_name).map(|(id, _)| *id).collect();
            for id in older {
                self.members.remove(&id);
                self.fenced.insert(id);
            }
        }
        self.members.insert(id, Member { topics, static_name, owned: Vec::new(), waiting: true, told: true });
        self.gathering = Some(now + PATIENCE);
    }

    /// Removes a member.
    pub(super) fn leave(&mut self, id: u64, now: Instant) {
        self.fenced.remove(&id);
        if self.members.remove(&id).is_some() {
            self.gathering = Some(now + PATIENCE);
        }
    }

    /// When waiting for the others ends at latest, while members give back.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.gathering
    }

    /// A member's poll. `partitions` is the number of partitions of a topic.
    pub(super) fn turn(&mut self, id: u64, now: Instant, partitions: impl Fn(&str) -> u32) -> Turn {
        if self.fenced.contains(&id) {
            return Turn::Fenced;
        }
        let Some(member) = self.members.get_mut(&id) else { return Turn::LeftBehind };
        let mut given_back = Vec::new();
        if let Some(deadline) = self.gathering {
            member.waiting = true;
            given_back = std::mem::take(&mut member.owned);
            if now >= deadline {
                self.members.retain(|_, m| m.waiting);
            }
            if self.members.values().all(|m| m.waiting) {
                self.hand_out(partitions);
            }
        }
        let member = self.members.get_mut(&id).expect("a member that waits is not left behind");
        if !given_back.is_empty() {
            return Turn::Revoked(given_back);
        }
        if member.told {
            return Turn::Same;
        }
        member.told = true;
        Turn::Assigned(member.owned.clone(), self.generation)
    }

    /// True where the member still owns what it had under this generation.
    pub(super) fn may_commit(&self, id: u64, generation: u64) -> bool {
        generation == self.generation && self.members.get(&id).is_some_and(|m| !m.waiting)
    }

    /// Range assignment: of each topic, consecutive partitions to members in order, the first ones getting one more where it
    /// does not divide; so one member gets the same numbers of all topics with equally many partitions.
    fn hand_out(&mut self, partitions: impl Fn(&str) -> u32) {
        self.generation += 1;
        self.gathering = None;
        for member in self.members.values_mut() {
            (member.waiting, member.told) = (false, false);
        }
        let topics: BTreeSet<Arc<str>> = self.members.values().flat_map(|m| m.topics.iter().cloned()).collect();
        for topic in topics {
            let mut readers: Vec<&mut Member> =
                self.members.values_mut().filter(|m| m.topics.contains(&topic)).collect();
            let all = partitions(&topic) as usize;
            let (each, more) = (all / readers.len(), all % readers.len());
            let mut next = 0;
            for (i, member) in readers.iter_mut().enumerate() {
                let count = each + usize::from(i < more);
                let numbers = next..next + count;
                next += count;
                member.owned.extend(numbers.map(|n| {
                    TopicPartition::new(topic.clone(), i32::try_from(n).expect("a topic has few partitions"))
                }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::clock;

    fn p(topic: &str, numbers: impl IntoIterator<Item = i32>) -> Vec<TopicPartition> {
        numbers.into_iter().map(|n| TopicPartition::new(topic, n)).collect()
    }

    fn five(_: &str) -> u32 {
        5
    }

    #[test]
    fn partitions_move_only_after_they_were_given_back() {
        let (mut group, now) = (Group::default(), clock::monotonic());
        group.join(1, vec!["t".into()], None, now);
        assert_eq!(group.turn(1, now, five), Turn::Assigned(p("t", 0..5), 1));
        assert_eq!(group.turn(1, now, five), Turn::Same);

        group.join(2, vec!["t".into()], None, now);
        assert_eq!(group.turn(2, now, five), Turn::Same, "the first has not given back");
        assert!(group.may_commit(1, 1), "what it has read it may commit");
        assert_eq!(group.turn(1, now, five), Turn::Revoked(p("t", 0..5)));
        assert!(!group.may_commit(1, 1));
        assert_eq!(group.turn(2, now, five), Turn::Assigned(p("t", 3..5), 2));
        assert_eq!(group.turn(1, now, five), Turn::Assigned(p("t", 0..3), 2));
        assert!(group.may_commit(1, 2) && group.may_commit(2, 2));

        group.leave(2, now);
        assert!(!group.may_commit(2, 2));
        assert_eq!(group.turn(1, now, five), Turn::Revoked(p("t", 0..3)));
        assert_eq!(group.turn(1, now, five), Turn::Assigned(p("t", 0..5), 3));
    }

    #[test]
    fn a_member_that_does_not_poll_is_left_behind() {
        let (mut group, now) = (Group::default(), clock::monotonic());
        group.join(1, vec!["t".into()], None, now);
        group.turn(1, now, five);
        group.join(2, vec!["t".into()], None, now);
        assert_eq!(group.turn(2, now, five), Turn::Same);
        assert_eq!(group.turn(2, now + PATIENCE, five), Turn::Assigned(p("t", 0..5), 2));
        assert!(!group.may_commit(1, 1));
        assert_eq!(group.turn(1, now, five), Turn::LeftBehind);
    }

    #[test]
    fn a_static_name_belongs_to_the_newest() {
        let (mut group, now) = (Group::default(), clock::monotonic());
        group.join(1, vec!["t".into()], Some("m".into()), now);
        group.turn(1, now, five);
        group.join(2, vec!["t".into()], Some("m".into()), now);
        assert_eq!(group.turn(2, now, five), Turn::Assigned(p("t", 0..5), 2));
        assert_eq!(group.turn(1, now, five), Turn::Fenced);
    }

    #[test]
    fn a_member_gets_the_same_numbers_of_all_topics_and_may_get_none() {
        let (mut group, now) = (Group::default(), clock::monotonic());
        for id in 1..=3 {
            group.join(id, vec!["a".into(), "b".into()], None, now);
        }
        let two = |_: &str| 2;
        let both = |n| [p("a", [n]), p("b", [n])].concat();
        assert_eq!(group.turn(1, now, two), Turn::Assigned(both(0), 1));
        assert_eq!(group.turn(2, now, two), Turn::Assigned(both(1), 1));
        assert_eq!(group.turn(3, now, two), Turn::Assigned(Vec::new(), 1));
    }
}
