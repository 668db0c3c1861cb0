//! One commit of output and offsets, repeated until the broker has it.

use super::RunError;
use crate::broker::{BrokerError, Consumer, Offsets, Producer};
use crate::runtime::backoff::Backoff;
use crate::runtime::failpoint;
use crate::runtime::shutdown::Stop;
use crate::source::DeadLetter;

/// Attempts after a stop was asked for: a broker that only stumbled gets the open batch still, one that is away does not
/// hold up the end.
const LAST_ATTEMPTS: u32 = 2;

/// The two ends of a worker, and how they commit.
pub(super) struct Publisher<'a> {
    /// Writes output.
    pub producer: &'a mut dyn Producer,
    /// Proves membership, or commits by itself where there is no transaction.
    pub consumer: &'a mut dyn Consumer,
    /// Output and offsets in one transaction.
    pub transactional: bool,
    /// Topic of dead letters.
    pub dead_letters: &'a str,
    /// Ends the waiting for a broker.
    pub stop: &'a Stop,
    /// Is told what the commit waits for.
    pub holding: &'a dyn Fn(&BrokerError, &Backoff),
}

impl Publisher<'_> {
    /// Sends output and dead letters and commits with the offsets. A broker that is away is waited for; a transaction that
    /// was rolled back is sent again. Once the broker was asked to commit and has not answered, nothing but further
    /// commits may follow: what was sent may be visible already.
    ///
    /// # Errors
    /// Where this worker has lost its right to publish, or a record is refused. [`RunError::Interrupted`] where a stop was
    /// asked for while the broker is away: whether the batch is committed, the next start reads from the log.
    pub fn publish(
        &mut self,
        offsets: &Offsets,
        dead: &[DeadLetter],
        send: impl Fn(&mut dyn Producer) -> Result<(), BrokerError>,
    ) -> Result<(), RunError> {
        let mut backoff = Backoff::for_server();
        let mut undecided = false;
        let mut last_attempts = 0;
        loop {
            let sent = if undecided { Ok(()) } else { self.send(dead, &send) };
            let error = match sent.and_then(|()| self.commit(offsets)) {
                Ok(()) => return Ok(()),
                Err(error) if error.is_retriable() || error.is_aborted() || error.is_undecided() => error,
                Err(error) => return Err(error.into()),
            };
            (self.holding)(&error, &backoff);
            if backoff.wait(self.stop) {
                last_attempts += 1;
                if last_attempts == LAST_ATTEMPTS {
                    return Err(RunError::Interrupted { what: "broker", reason: error.to_string() });
                }
            }
            undecided = error.is_undecided() || (undecided && error.is_retriable());
            if !undecided {
                // What was sent before the failure must not become visible twice. What cannot be rolled back now, the next
                // beginning rolls back.
                match self.producer.abort() {
                    Err(error) if !error.is_retriable() && !error.is_aborted() => return Err(error.into()),
                    _ => {}
                }
            }
        }
    }

    fn send(
        &mut self,
        dead: &[DeadLetter],
        send: &impl Fn(&mut dyn Producer) -> Result<(), BrokerError>,
    ) -> Result<(), BrokerError> {
        self.producer.begin()?;
        send(self.producer)?;
        for letter in dead {
            let headers = letter.out_headers();
            self.producer.send(letter.to_record(self.dead_letters, &headers))?;
        }
        failpoint::hit("publish.before_commit");
        Ok(())
    }

    fn commit(&mut self, offsets: &Offsets) -> Result<(), BrokerError> {
        if self.transactional {
            let token = self.consumer.token()?;
            self.producer.commit(offsets, Some(&token))
        } else {
            self.producer.commit(&Offsets::new(), None)?;
            self.consumer.commit(offsets)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;
    use std::sync::Arc;
    use std::time::Duration;

    use parking_lot::Mutex;
    use rstest::rstest;

    use super::*;
    use crate::broker::{GroupToken, NextOffset, Notes, OutRecord, Poll, TopicPartition};

    /// What a commit is answered with.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Answer {
        Done,
        Away,
        Undecided,
        Aborted,
        Fenced,
        Spent,
    }
    use Answer::*;

    impl Answer {
        fn result(self) -> Result<(), BrokerError> {
            let (id, reason) = (|| "id".to_owned(), || "scripted".to_owned());
            match self {
                Done => Ok(()),
                Away => Err(BrokerError::Unreachable { address: "nowhere".into(), reason: reason() }),
                Undecided => Err(BrokerError::Undecided { transactional_id: id(), reason: reason() }),
                Aborted => Err(BrokerError::Aborted { transactional_id: id(), reason: reason() }),
                Fenced => Err(BrokerError::Fenced { taken: id() }),
                Spent => Err(BrokerError::Spent { transactional_id: id(), reason: reason() }),
            }
        }
    }

    /// Keeps the contract of transactions, answers commits by a script, and notes the calls.
    struct Scripted {
        answers: VecDeque<Answer>,
        undecided: bool,
        calls: Arc<Mutex<Vec<&'static str>>>,
        /// Requested at the last answer of the script, which is then given again and again.
        stop: Option<Stop>,
    }

    impl Scripted {
        fn call(&self, name: &'static str) -> Result<(), BrokerError> {
            self.calls.lock().push(name);
            assert!(!self.undecided || name == "commit", "{name} while the outcome is open");
            Ok(())
        }
    }

    impl Producer for Scripted {
        fn note(&mut self, _: &Notes) {}

        fn begin(&mut self) -> Result<(), BrokerError> {
            self.call("begin")
        }

        fn send(&mut self, _: OutRecord<'_>) -> Result<(), BrokerError> {
            self.call("send")
        }

        fn commit(&mut self, offsets: &Offsets, token: Option<&GroupToken>) -> Result<(), BrokerError> {
            self.call("commit")?;
            assert!(offsets.len() == 1 && token.is_some(), "the same arguments each time");
            let answer = match &self.stop {
                Some(stop) if self.answers.len() == 1 => {
                    stop.request();
                    self.answers[0]
                }
                _ => self.answers.pop_front().expect("the script is long enough"),
            };
            self.undecided = answer == Undecided || (answer == Away && self.undecided);
            answer.result()
        }

        fn abort(&mut self) -> Result<(), BrokerError> {
            self.call("abort")
        }
    }

    struct Member;

    impl Consumer for Member {
        fn note(&mut self, _: &Notes) {}

        fn token(&self) -> Result<GroupToken, BrokerError> {
            Ok(GroupToken::Embedded { group: "g".into(), member: 1, generation: 1 })
        }

        fn poll(&mut self, _: usize, _: Duration) -> Result<Poll, BrokerError> {
            unreachable!("publishing does not poll")
        }

        fn commit(&mut self, _: &Offsets) -> Result<(), BrokerError> {
            unreachable!("the transaction commits the offsets")
        }

        fn committed(&self, _: &[TopicPartition]) -> Result<(Offsets, Notes), BrokerError> {
            unreachable!("publishing does not ask for what is committed")
        }

        fn end(&self, _: &TopicPartition) -> Option<NextOffset> {
            None
        }

        fn caught_up(&self, _: &TopicPartition) -> bool {
            false
        }

        fn seek(&mut self, _: &Offsets) -> Result<(), BrokerError> {
            Ok(())
        }

        fn pause(&mut self, _: &[TopicPartition]) -> Result<(), BrokerError> {
            Ok(())
        }

        fn resume(&mut self, _: &[TopicPartition]) -> Result<(), BrokerError> {
            Ok(())
        }
    }

    /// Publishes one record against a script; the result, the calls, and how often it said that it waits.
    fn publish(answers: &[Answer], stop: &Stop, stops: bool) -> (Result<(), RunError>, Vec<&'static str>, u32) {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let mut producer = Scripted {
            answers: answers.iter().copied().collect(),
            undecided: false,
            calls: Arc::clone(&calls),
            stop: stops.then(|| stop.clone()),
        };
        let held = RefCell::new(0);
        let result = Publisher {
            producer: &mut producer,
            consumer: &mut Member,
            transactional: true,
            dead_letters: "dead",
            stop,
            holding: &|_, _| *held.borrow_mut() += 1,
        }
        .publish(&Offsets::from([(TopicPartition::new("t", 0), NextOffset(1))]), &[], |producer| {
            producer.send(OutRecord::default())
        });
        let calls = calls.lock().clone();
        (result, calls, held.take())
    }

    const SEND: [&str; 3] = ["begin", "send", "commit"];

    #[rstest]
    #[case::at_once(&[Done], &[], true)]
    #[case::away(&[Away, Done], &["abort", "begin", "send", "commit"], true)]
    #[case::rolled_back(&[Aborted, Done], &["abort", "begin", "send", "commit"], true)]
    #[case::open_then_committed(&[Undecided, Undecided, Done], &["commit", "commit"], true)]
    #[case::open_while_away(&[Undecided, Away, Done], &["commit", "commit"], true)]
    #[case::open_then_rolled_back(&[Undecided, Aborted, Done], &["commit", "abort", "begin", "send", "commit"], true)]
    #[case::open_then_fenced(&[Undecided, Fenced], &["commit"], false)]
    #[case::fenced(&[Fenced], &[], false)]
    #[case::open_then_spent(&[Undecided, Spent], &["commit"], false)]
    #[case::spent(&[Spent], &[], false)]
    fn a_commit_whose_outcome_is_open_is_followed_by_nothing_but_commits(
        #[case] answers: &[Answer],
        #[case] after_first: &[&str],
        #[case] succeeds: bool,
    ) {
        let (result, calls, held) = publish(answers, &Stop::new(), false);
        assert_eq!(calls, [&SEND, after_first].concat());
        assert_eq!(held as usize, answers.iter().filter(|a| !matches!(a, Done | Fenced | Spent)).count());
        match result {
            Ok(()) => assert!(succeeds),
            Err(error) => assert!(!succeeds && error.is_lost(), "{error}"),
        }
    }

    #[rstest]
    #[case::away(Away, &["abort", "begin", "send", "commit"])]
    #[case::open(Undecided, &["commit"])]
    fn a_stop_leaves_a_broker_that_stays_away(#[case] answer: Answer, #[case] after_first: &[&str]) {
        let (result, calls, _) = publish(&[answer], &Stop::new(), true);
        assert!(matches!(result, Err(RunError::Interrupted { what: "broker", .. })), "{result:?}");
        assert_eq!(calls, [&SEND, after_first].concat(), "one more attempt, and no more");
    }
}
