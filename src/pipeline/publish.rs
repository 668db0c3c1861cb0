//! One commit of output and offsets, repeated until the broker has it.

use super::RunError;
use super::context::Context;
use crate::broker::{BrokerError, Consumer, Offsets, Producer};
use crate::runtime::backoff::Backoff;
use crate::runtime::failpoint;
use crate::source::DeadLetter;

/// The two ends of a worker, and how they commit.
pub(super) struct Publisher<'a> {
    /// Writes output.
    pub producer: &'a mut dyn Producer,
    /// Proves membership, or commits by itself where there is no transaction.
    pub consumer: &'a mut dyn Consumer,
    /// Output and offsets in one transaction.
    pub transactional: bool,
}

impl Publisher<'_> {
    /// Sends output and dead letters and commits with the offsets. A broker that is away is waited for; a transaction that
    /// was rolled back is sent again.
    ///
    /// # Errors
    /// Where this worker has lost its right to publish, a record is refused, or a stop was asked for while the broker is away.
    pub fn publish(
        &mut self,
        context: &Context,
        offsets: &Offsets,
        dead: &[DeadLetter],
        send: impl Fn(&mut dyn Producer) -> Result<(), BrokerError>,
    ) -> Result<(), RunError> {
        let mut backoff = Backoff::for_server();
        loop {
            let error = match self.attempt(context, offsets, dead, &send) {
                Ok(()) => return Ok(()),
                Err(error) if error.is_retriable() || error.is_aborted() => error,
                Err(error) => return Err(error.into()),
            };
            context.holding("broker", &error, &backoff);
            if backoff.wait(&context.stop) && backoff.attempts() > 3 {
                return Err(error.into());
            }
            // What was sent before the failure must not become visible twice.
            match self.producer.abort() {
                Err(error) if !error.is_retriable() && !error.is_aborted() => return Err(error.into()),
                _ => {}
            }
        }
    }

    fn attempt(
        &mut self,
        context: &Context,
        offsets: &Offsets,
        dead: &[DeadLetter],
        send: &impl Fn(&mut dyn Producer) -> Result<(), BrokerError>,
    ) -> Result<(), BrokerError> {
        self.producer.begin()?;
        send(self.producer)?;
        let topic = context.plan.dead_letter_topic();
        for letter in dead {
            let headers = letter.out_headers();
            self.producer.send(letter.to_record(&topic, &headers))?;
        }
        failpoint::hit("publish.before_commit");
        if self.transactional {
            let token = self.consumer.token()?;
            self.producer.commit(offsets, Some(&token))
        } else {
            self.producer.commit(&Offsets::new(), None)?;
            self.consumer.commit(offsets)
        }
    }
}
