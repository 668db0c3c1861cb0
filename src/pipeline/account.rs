//! What a worker counts of its batches once they are committed. The metrics' handles are made once, not once a batch.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram};

use super::context::Context;
use crate::broker::Records;
use crate::config::plan::EmittedPlan;
use crate::runtime::clock;
use crate::score::{CloseReason, Scores};
use crate::source::DeadLetter;
use crate::telemetry::board::Board;
use crate::telemetry::metrics as names;
use crate::window::Applied;

/// Records of a poll whose latency is told.
const SAMPLES: usize = 16;

/// When a few of these records arrived in the log, wall clock in milliseconds. The timestamp of a record without a value is
/// the instant since when a table's row is gone, which may be long before it came: it tells nothing here.
pub(super) fn sample(records: &Records) -> impl Iterator<Item = i64> + '_ {
    let stride = records.len().div_ceil(SAMPLES).max(1);
    let some = records.timestamps.iter().copied().enumerate().step_by(stride);
    some.filter(|(row, at)| *at > 0 && records.values.get(*row).is_some()).map(|(_, at)| at)
}

/// What every worker counts.
pub(super) struct Account {
    board: Arc<Board>,
    pipeline: String,
    worker: usize,
    /// By the number of the reason.
    batches: [Counter; CloseReason::ALL.len()],
    rows_failed: Counter,
    latency: Histogram,
    lag: Gauge,
    /// Versions that have scored. There are few in a worker's life.
    predictions: Vec<(Arc<str>, Counter)>,
    /// Stage and reason of the dead letters so far.
    dead_letters: Vec<((&'static str, &'static str), Counter)>,
}

impl Account {
    /// Of a worker of `stage`.
    pub fn new(context: &Context, stage: &'static str, worker: usize) -> Self {
        Self::of(&context.plan.name, Arc::clone(&context.board), stage, worker)
    }

    fn of(pipeline: &str, board: Arc<Board>, stage: &'static str, worker: usize) -> Self {
        let name = || pipeline.to_owned();
        Self {
            board,
            pipeline: name(),
            worker,
            batches: CloseReason::ALL
                .map(|reason| metrics::counter!(names::BATCHES, "pipeline" => name(), "reason" => reason.name())),
            rows_failed: metrics::counter!(names::SCORE_FAILED, "pipeline" => name()),
            latency: metrics::histogram!(names::END_TO_END, "pipeline" => name()),
            lag: metrics::gauge!(names::LAG, "pipeline" => name(), "stage" => stage, "worker" => worker.to_string()),
            predictions: Vec::new(),
            dead_letters: Vec::new(),
        }
    }

    /// Counts a committed batch: why it closed, what became of its rows, and when some of its records had `arrived`.
    pub fn committed(
        &mut self,
        reason: CloseReason,
        dead: &[DeadLetter],
        scores: Option<&Scores>,
        arrived: impl IntoIterator<Item = i64>,
    ) {
        self.batches[reason as usize].increment(1);
        let pipeline = &self.pipeline;
        for letter in dead {
            let of = |(stage, reason): &(&'static str, &'static str)| metrics::counter!(names::DEAD_LETTERS, "pipeline" => pipeline.clone(), "stage" => *stage, "reason" => *reason);
            handle(&mut self.dead_letters, (letter.stage, letter.reason), of).increment(1);
        }
        if let Some(scores) = scores {
            let failed = scores.failed.len();
            let scored = (scores.scores.len() - failed) as u64;
            let of = |version: &Arc<str>| metrics::counter!(names::PREDICTIONS, "pipeline" => pipeline.clone(), "model_version" => version.to_string());
            handle(&mut self.predictions, Arc::clone(&scores.version), of).increment(scored);
            self.rows_failed.increment(failed as u64);
            self.board.predicted(&scores.version, scored);
        }
        let now = clock::now_ms();
        for at in arrived {
            let latency = Duration::from_millis(u64::try_from(now - at).unwrap_or(0));
            self.board.latency.add(latency);
            self.latency.record(latency.as_secs_f64());
        }
    }

    /// Notes how far behind the log the worker is, and what it holds.
    pub fn holds(&self, lag: u64, entities: u64, bytes: (u64, u64)) {
        self.lag.set(lag as f64);
        self.board.set_worker(self.worker, lag, entities, bytes);
    }
}

/// The handle of a label that is only known when it occurs.
fn handle<K: PartialEq>(known: &mut Vec<(K, Counter)>, key: K, make: impl FnOnce(&K) -> Counter) -> &Counter {
    let place = known.iter().position(|(other, _)| *other == key).unwrap_or_else(|| {
        let made = make(&key);
        known.push((key, made));
        known.len() - 1
    });
    &known[place].1
}

/// The ledger of the sources, and what the windows made of them.
pub(super) struct Ledger {
    sources: Vec<Source>,
    /// One for each of the plan's emitted windows.
    emitted: Vec<Counter>,
    rows: Counter,
    online_rows: Counter,
    entities: Gauge,
    state_bytes: Gauge,
    state_disk_bytes: Gauge,
}

struct Source {
    read: Counter,
    applied: Counter,
    filtered: Counter,
    late: Counter,
    nonfinite: Counter,
}

impl Ledger {
    /// Of a worker.
    pub fn new(context: &Context, worker: usize) -> Self {
        let name = || context.plan.name.clone();
        let of = |source: &crate::config::plan::SourcePlan| {
            let counter = |metric| metrics::counter!(metric, "pipeline" => name(), "source" => source.name.to_string());
            Source {
                read: counter(names::SOURCE_READ),
                applied: counter(names::WINDOW_APPLIED),
                filtered: counter(names::SOURCE_FILTERED),
                late: counter(names::WINDOW_LATE),
                nonfinite: counter(names::NONFINITE),
            }
        };
        let emitted = |windows: &EmittedPlan| metrics::counter!(names::WINDOW_EMITTED, "pipeline" => name(), "window" => windows.name.clone());
        let gauge = |metric| metrics::gauge!(metric, "pipeline" => name(), "worker" => worker.to_string());
        Self {
            sources: context.plan.sources.iter().map(of).collect(),
            emitted: context.plan.windows.iter().map(emitted).collect(),
            rows: metrics::counter!(names::FEATURE_ROWS, "pipeline" => name()),
            online_rows: metrics::counter!(names::ONLINE_ROWS, "pipeline" => name()),
            entities: gauge(names::ENTITIES),
            state_bytes: gauge(names::STATE_BYTES),
            state_disk_bytes: gauge(names::STATE_DISK_BYTES),
        }
    }

    /// Counts values of a decoded poll that became null.
    pub fn nonfinite(&self, source: usize, values: u64) {
        self.sources[source].nonfinite.increment(values);
    }

    /// Counts what a committed batch accounts for.
    pub fn committed<'a>(&self, board: &Board, applied: impl Iterator<Item = &'a Applied>) {
        let (mut rows, mut online, mut newest) = (0, 0, 0);
        for applied in applied {
            for ((counts, metrics), (_, totals)) in applied.counts.iter().zip(&self.sources).zip(&board.sources) {
                let moved = [
                    (&metrics.read, &totals.read, counts.read),
                    (&metrics.applied, &totals.applied, counts.applied),
                    (&metrics.filtered, &totals.filtered, counts.filtered),
                    (&metrics.late, &totals.late, counts.late),
                ];
                for (metric, total, count) in moved {
                    metric.increment(count);
                    total.fetch_add(count, Ordering::Relaxed);
                }
                totals.dead.fetch_add(counts.dead, Ordering::Relaxed);
            }
            for (counter, emitted) in self.emitted.iter().zip(&applied.emitted) {
                counter.increment(emitted.as_ref().map_or(0, |rows| rows.batch.num_rows() as u64));
            }
            rows += applied.rows.batch.num_rows() as u64;
            online += applied.online.batch.num_rows() as u64;
            newest = newest.max(applied.watermark.unwrap_or(0));
        }
        self.rows.increment(rows);
        self.online_rows.increment(online);
        board.rows.fetch_add(rows, Ordering::Relaxed);
        board.event_time.fetch_max(u64::try_from(newest).unwrap_or(0), Ordering::Relaxed);
    }

    /// Notes what the window state holds.
    pub fn holds(&self, entities: u64, (bytes, on_disk): (u64, u64)) {
        self.entities.set(entities as f64);
        self.state_bytes.set(bytes as f64);
        self.state_disk_bytes.set(on_disk as f64);
    }
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;
    use crate::broker::TopicPartition;
    use crate::source::dead_letter;

    #[test]
    fn a_batch_moves_every_metric_that_it_should() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let board = Board::new(["purchases"]);
        let mut records = Records::new(TopicPartition::new("purchases", 0));
        let now = clock::now_ms();
        (0..105).for_each(|offset| records.push(offset, now - 40_000, None, Some(b"")));
        // Its turn to be sampled, but it has no value.
        records.push(105, now - 400_000_000, Some(b"C1"), None);
        let dead = |reason| dead_letter::from_records(&records, 0, "score", reason, String::new());
        let scores = Scores {
            scores: vec![0.5, f64::NAN, 0.25],
            labels: vec![None; 3],
            model: "m".into(),
            version: "7".into(),
            failed: vec![(1, "infinite".into())],
        };
        metrics::with_local_recorder(&recorder, || {
            let mut account = Account::of("shop", Arc::clone(&board), "features", 2);
            let dead = [dead("unscorable"), dead("malformed"), dead("unscorable")];
            account.committed(CloseReason::Linger, &dead, Some(&scores), sample(&records));
            account.committed(CloseReason::Rows, &[], None, []);
            account.committed(CloseReason::Linger, &[], Some(&scores), []);
            account.holds(11, 22, (33, 0));
        });
        let text = recorder.handle().render();
        for line in [
            r#"driftline_score_batches_total{pipeline="shop",reason="linger"} 2"#,
            r#"driftline_score_batches_total{pipeline="shop",reason="rows"} 1"#,
            r#"driftline_score_rows_failed_total{pipeline="shop"} 2"#,
            r#"driftline_score_predictions_total{pipeline="shop",model_version="7"} 4"#,
            r#"driftline_dead_letters_total{pipeline="shop",stage="score",reason="unscorable"} 2"#,
            r#"driftline_dead_letters_total{pipeline="shop",stage="score",reason="malformed"} 1"#,
            r#"driftline_source_lag_records{pipeline="shop",stage="features",worker="2"} 11"#,
            r#"driftline_run_event_to_output_seconds_count{pipeline="shop"} 15"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert_eq!(board.predictions.load(Ordering::Relaxed), 4);
        let slowest = board.latency.take().quantile(1.0).expect("latencies were added");
        assert!((40..50).contains(&slowest.as_secs()), "{slowest:?}");
    }
}
