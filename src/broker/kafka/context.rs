//! What librdkafka says on its own: log lines, lost brokers, failed deliveries.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Message};
use rdkafka::producer::ProducerContext;
use rustc_hash::FxHashMap;

use crate::runtime::clock;

/// One line of a facility in this time; what is left out is counted on the next one.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Shared by a client and the threads of librdkafka.
#[derive(Default)]
pub(super) struct Context {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Set from the moment that no broker is left until one answers.
    down: bool,
    /// The newest failure that librdkafka reported on its own.
    fault: Option<(RDKafkaErrorCode, String)>,
    /// The first record that could not be delivered since it was last asked for: topic and reason.
    undelivered: Option<(String, RDKafkaErrorCode)>,
    /// By facility: when its newest line was let through, and how many were held back since.
    lines: FxHashMap<String, (Instant, u64)>,
}

impl Context {
    /// True while no broker answers.
    pub(super) fn is_down(&self) -> bool {
        self.state.lock().down
    }

    /// A broker has answered.
    pub(super) fn is_up(&self) {
        let mut state = self.state.lock();
        state.down = false;
        state.fault = None;
    }

    /// The newest failure that librdkafka reported on its own.
    pub(super) fn fault(&self) -> Option<(RDKafkaErrorCode, String)> {
        self.state.lock().fault.clone()
    }

    /// Takes the first failed delivery: topic and reason.
    pub(super) fn take_undelivered(&self) -> Option<(String, RDKafkaErrorCode)> {
        self.state.lock().undelivered.take()
    }

    /// True where a delivery has failed since it was last asked for.
    pub(super) fn has_undelivered(&self) -> bool {
        self.state.lock().undelivered.is_some()
    }

    /// Keeps a failure that the client reported on its own.
    pub(super) fn fail(&self, code: RDKafkaErrorCode, reason: &str) {
        let mut state = self.state.lock();
        tracing::debug!(target: "driftline::broker::kafka", ?code, reason, "client error");
        match code {
            // Says how many are down; the line before it said why.
            RDKafkaErrorCode::AllBrokersDown => {
                state.down = true;
                state.fault.get_or_insert_with(|| (code, reason.to_owned()));
            }
            _ => state.fault = Some((code, reason.to_owned())),
        }
    }

    /// Passes a line on to the log, unless its facility has just spoken.
    pub(super) fn line(&self, level: i32, facility: &str, text: &str) {
        // Properties of the other kind of client, which share one table in pipeline.toml.
        if facility == "CONFWARN" {
            tracing::debug!(target: "librdkafka", facility, "{text}");
            return;
        }
        let held_back = {
            let mut state = self.state.lock();
            let now = clock::monotonic();
            match state.lines.get_mut(facility) {
                Some((last, held_back)) if now.duration_since(*last) < LOG_EVERY => {
                    *held_back += 1;
                    return;
                }
                Some((last, held_back)) => {
                    *last = now;
                    std::mem::take(held_back)
                }
                None => {
                    state.lines.insert(facility.to_owned(), (now, 0));
                    0
                }
            }
        };
        match level {
            0..=3 => tracing::error!(target: "librdkafka", facility, held_back, "{text}"),
            4 => tracing::warn!(target: "librdkafka", facility, held_back, "{text}"),
            5 | 6 => tracing::info!(target: "librdkafka", facility, held_back, "{text}"),
            _ => tracing::debug!(target: "librdkafka", facility, held_back, "{text}"),
        }
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        self.line(level as i32, facility, text);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.fail(error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown), reason);
    }
}

impl ConsumerContext for Context {}

impl ProducerContext for Context {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        let Err((error, message)) = result else { return };
        let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
        // Purged is what an abort does; the reason of the abort is known already.
        if !matches!(code, RDKafkaErrorCode::PurgeQueue | RDKafkaErrorCode::PurgeInflight) {
            self.state.lock().undelivered.get_or_insert_with(|| (message.topic().to_owned(), code));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_survives_the_news_that_all_are_down() {
        let context = Context::default();
        context.fail(RDKafkaErrorCode::Resolve, "kafka:9092: Name or service not known");
        context.fail(RDKafkaErrorCode::AllBrokersDown, "1/1 brokers are down");
        assert!(context.is_down());
        assert_eq!(context.fault().expect("a fault").1, "kafka:9092: Name or service not known");
        context.is_up();
        assert!(!context.is_down() && context.fault().is_none());
    }

    #[test]
    fn a_chatty_facility_is_held_back() {
        let context = Context::default();
        for _ in 0..5 {
            context.line(3, "FAIL", "connection refused");
        }
        context.line(3, "OTHER", "something else");
        let state = context.state.lock();
        assert_eq!(state.lines["FAIL"].1, 4);
        assert_eq!(state.lines["OTHER"].1, 0);
    }
}
