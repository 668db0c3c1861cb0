//! Every metric by name: `driftline_<stage>_<noun>_<unit>[_total]`; seconds and bytes only; moved once a batch.

use std::sync::Arc;
use std::time::Instant;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::runtime::clock;

macro_rules! names {
    ($($(#[doc = $doc:literal])+ $kind:ident $name:ident = $text:literal;)+) => {
        $($(#[doc = $doc])+ pub const $name: &str = $text;)+

        /// Kind, name and meaning of every metric, in the order of the file: the source of docs/metrics.md.
        pub const ALL: &[(&str, &str, &str)] = &[$((stringify!($kind), $text, concat!($($doc),+))),+];
    };
}

names! {
    /// Records read from a source, kept or not. Labels: pipeline, source.
    counter SOURCE_READ = "driftline_source_records_read_total";
    /// Records keyed anew, written to the topic of their new key. Labels: pipeline, source.
    counter REKEYED = "driftline_rekey_records_written_total";
    /// Rows applied to window state. Labels: pipeline, source.
    counter WINDOW_APPLIED = "driftline_window_rows_applied_total";
    /// Records that a source's `where` left out. Labels: pipeline, source.
    counter SOURCE_FILTERED = "driftline_source_records_filtered_total";
    /// Times that a source's partition was not fetched for a while, because its rows wait for another source. Labels: pipeline, source.
    counter SOURCE_PAUSES = "driftline_source_pauses_total";
    /// NaN and infinite values in records that were decoded; they became null. Labels: pipeline, source.
    counter NONFINITE = "driftline_source_values_nonfinite_total";
    /// Rows later than `out_of_order` allows. Labels: pipeline, source.
    counter WINDOW_LATE = "driftline_window_rows_late_total";
    /// Records written to the dead-letter topic. Labels: pipeline, stage, reason.
    counter DEAD_LETTERS = "driftline_dead_letters_total";
    /// Feature rows computed for scoring. Labels: pipeline.
    counter FEATURE_ROWS = "driftline_window_feature_rows_total";
    /// Rows of emitted windows, early results among them. Labels: pipeline, window.
    counter WINDOW_EMITTED = "driftline_window_rows_emitted_total";
    /// Entities in window state. Labels: pipeline, worker.
    gauge ENTITIES = "driftline_window_entities";
    /// Bytes of window state in memory, that of open windows among it. Labels: pipeline, worker.
    gauge STATE_BYTES = "driftline_window_state_bytes";
    /// Bytes of window state on disk, where memory has a limit. Labels: pipeline, worker.
    gauge STATE_DISK_BYTES = "driftline_window_state_disk_bytes";
    /// Records between the group's position and the end of the log. Labels: pipeline, stage.
    gauge LAG = "driftline_source_lag_records";
    /// Seconds from a record's timestamp in the log to its committed prediction (or feature row). Labels: pipeline.
    histogram END_TO_END = "driftline_run_event_to_output_seconds";
    /// Seconds a batch spent in one step. Labels: pipeline, step (decode, window, online, online_and_score, score, encode, commit, checkpoint).
    histogram STEP = "driftline_run_step_seconds";
    /// Micro-batches by the reason they closed for. Labels: pipeline, reason (rows, bytes, linger, checkpoint, shutdown).
    counter BATCHES = "driftline_score_batches_total";
    /// Predictions committed. Labels: pipeline, model_version.
    counter PREDICTIONS = "driftline_score_predictions_total";
    /// Rows that the model could not score. Labels: pipeline.
    counter SCORE_FAILED = "driftline_score_rows_failed_total";
    /// Model versions that came into use. Labels: pipeline.
    counter MODEL_SWAPS = "driftline_model_swaps_total";
    /// Model versions that could not be used. Labels: pipeline, reason (bundle, signature, graph, storage, other).
    counter MODEL_REFUSED = "driftline_model_versions_refused_total";
    /// Seconds to load, check and warm up a model version. Labels: pipeline.
    histogram MODEL_LOAD = "driftline_model_load_seconds";
    /// Rows written to the online store. Labels: pipeline.
    counter ONLINE_ROWS = "driftline_online_rows_written_total";
    /// Values looked up of other entities. Labels: pipeline, lookup, status (PRESENT, STALE, NULL_VALUE, NOT_FOUND, OUTSIDE_MAX_AGE, NULL_KEY, UNAVAILABLE): all but the first two are null.
    counter LOOKED_UP = "driftline_online_values_read_total";
    /// Feature rows committed to offline files. Labels: pipeline.
    counter OFFLINE_ROWS = "driftline_offline_rows_written_total";
    /// Checkpoints committed. Labels: pipeline.
    counter CHECKPOINTS = "driftline_checkpoint_commits_total";
    /// Seconds that a worker's thread stood still for a checkpoint at a time: to begin it, and for each slice of state copied. Labels: pipeline.
    histogram CHECKPOINT_PAUSE = "driftline_checkpoint_pause_seconds";
    /// Bytes of state written in committed checkpoints. Labels: pipeline, extent (whole, changes).
    counter CHECKPOINT_BYTES = "driftline_checkpoint_state_bytes_total";
    /// Waits for something that was away and came back or did not. Labels: pipeline, what (broker, online, offline, registry).
    counter HOLDS = "driftline_run_holds_total";
    /// Windows judged by the drift monitor. Labels: pipeline.
    counter DRIFT_WINDOWS = "driftline_drift_windows_total";
    /// Drift events emitted. Labels: pipeline, state.
    counter DRIFT_EVENTS = "driftline_drift_events_total";
    /// PSI of a watched column in the newest window. Labels: pipeline, column.
    gauge DRIFT_PSI = "driftline_drift_psi_ratio";
    /// Evidence (e-value) of a watched column in the newest window. Labels: pipeline, column.
    gauge DRIFT_EVIDENCE = "driftline_drift_evidence_ratio";
    /// Retraining steps. Labels: pipeline, step.
    counter RETRAINING_STEPS = "driftline_retraining_steps_total";
}

/// docs/metrics.md.
pub fn document() -> String {
    let mut text = String::from(
        "# Metrics\n\nServed at `/metrics` by every stage (`--listen`). Names follow `driftline_<stage>_<noun>_<unit>[_total]`; units are \
         seconds, bytes and counts. Histograms have `_bucket`, `_sum` and `_count`. `deploy/` has a Grafana dashboard and alerting rules.\n\n\
         | metric | kind | meaning |\n|---|---|---|\n",
    );
    for (kind, name, help) in ALL {
        text += &format!("| `{name}` | {kind} | {} |\n", help.trim());
    }
    text + "\nThe ledger: for every source, read = applied + filtered + late + dead letters of the stages `decode` and `window` once the \
            task has applied what it read. `/status` and `driftline status` show the same numbers.\n"
}

/// Bucket bounds of all histograms, in seconds.
const BOUNDS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// Installs the recorder for the process.
///
/// # Errors
/// Only if one is installed already.
pub fn install() -> Result<PrometheusHandle, String> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), BOUNDS)
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|e| format!("metrics could not be set up: {e}"))?;
    for (kind, name, help) in ALL {
        let help = help.trim();
        match *kind {
            "counter" => metrics::describe_counter!(*name, help),
            "gauge" => metrics::describe_gauge!(*name, help),
            _ => metrics::describe_histogram!(*name, help),
        }
    }
    Ok(handle)
}

/// Part of the work on a batch, as `driftline_run_step_seconds` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Records of a poll become columns.
    Decode,
    /// Columns are applied to window state.
    Window,
    /// The online store is written.
    Online,
    /// The online store is written while the model scores.
    OnlineAndScore,
    /// The model scores, where scoring runs apart.
    Score,
    /// Output becomes records.
    Encode,
    /// Records are sent and committed.
    Commit,
    /// A checkpoint is written.
    Checkpoint,
}

impl Step {
    /// All of them, in the order of their numbers.
    const ALL: [Self; 8] = [
        Self::Decode,
        Self::Window,
        Self::Online,
        Self::OnlineAndScore,
        Self::Score,
        Self::Encode,
        Self::Commit,
        Self::Checkpoint,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Window => "window",
            Self::Online => "online",
            Self::OnlineAndScore => "online_and_score",
            Self::Score => "score",
            Self::Encode => "encode",
            Self::Commit => "commit",
            Self::Checkpoint => "checkpoint",
        }
    }
}

/// Times the steps of a thread's batches. A clone costs a counter: the metric's handles are made once.
#[derive(Clone)]
pub struct Steps(Arc<[metrics::Histogram]>);

impl Steps {
    /// For the batches of a pipeline.
    pub fn of(pipeline: &str) -> Self {
        let handle = |step: Step| metrics::histogram!(STEP, "pipeline" => pipeline.to_owned(), "step" => step.name());
        Self(Step::ALL.into_iter().map(handle).collect())
    }

    /// Starts the clock at the first step of a batch.
    pub fn start(&self) -> StepClock {
        StepClock { steps: self.clone(), last: clock::monotonic() }
    }
}

/// The running clock of one batch.
pub struct StepClock {
    steps: Steps,
    last: Instant,
}

impl StepClock {
    /// Ends a step and begins the next one.
    pub fn end(&mut self, step: Step) {
        let now = clock::monotonic();
        self.steps.0[step as usize].record((now - self.last).as_secs_f64());
        self.last = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_lists_every_metric() {
        // After a change: driftline's own text is the source, docs/metrics.md a copy.
        assert_eq!(include_str!("../../docs/metrics.md"), document());
    }

    #[test]
    fn dashboards_and_alerts_name_metrics_that_exist() {
        for text in
            [include_str!("../../deploy/alerts.yml"), include_str!("../../deploy/grafana/dashboards/driftline.json")]
        {
            for word in
                text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|w| w.starts_with("driftline_"))
            {
                let base = ["_bucket", "_sum", "_count"].iter().find_map(|s| word.strip_suffix(s)).unwrap_or(word);
                assert!(ALL.iter().any(|(_, name, _)| *name == base), "{word} is not a metric");
            }
        }
    }

    #[test]
    fn names_follow_the_rule() {
        for (kind, name, help) in ALL {
            assert!(name.starts_with("driftline_"), "{name}");
            assert_eq!(*kind == "counter", name.ends_with("_total"), "{name}");
            if *kind == "histogram" {
                assert!(name.ends_with("_seconds"), "{name}");
            }
            assert!(help.contains("Labels:"), "{name} does not name its labels");
        }
        let mut names: Vec<_> = ALL.iter().map(|(_, name, _)| name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }
}
