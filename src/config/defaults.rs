//! Every default of `pipeline.toml`, in one place. The JSON Schema takes them from here, and so does the documentation.

use super::plan::{Delivery, Emit, Unavailable};
use super::spec::{Metric, Provider};

/// `broker.partitions`: partitions of topics that driftline creates.
pub fn partitions() -> u32 {
    4
}

/// `broker.replication`: −1 leaves it to the Kafka cluster's own default.
pub fn replication() -> i32 {
    -1
}

/// `broker.path` and `online.path`: folder of the pipeline's embedded log and store, from the project's root.
pub fn embedded_path(pipeline: &str) -> String {
    format!("data/{pipeline}")
}

/// `lookups.<lookup>.timeout`.
pub fn lookup_timeout() -> String {
    "1s".into()
}

/// `lookups.<lookup>.unavailable`.
pub fn unavailable() -> Unavailable {
    Unavailable::Wait
}

/// `lookups.<lookup>.stale_for`.
pub fn stale_for() -> String {
    "5m".into()
}

/// `lookups.<lookup>.stale_entities`.
pub fn stale_entities() -> u32 {
    100_000
}

/// `offline.url`.
pub fn offline_url() -> String {
    "file://./data".into()
}

/// `offline.checkpoint.interval`.
pub fn checkpoint_interval() -> String {
    "30s".into()
}

/// `offline.checkpoint.rows`.
pub fn checkpoint_rows() -> u64 {
    200_000
}

/// `state.path`.
pub fn state_path() -> String {
    "data/state".into()
}

/// `registry.url`.
pub fn registry_url() -> String {
    "file://./data/models".into()
}

/// `sources.<name>.out_of_order`.
pub fn out_of_order() -> String {
    "10s".into()
}

/// `sources.<name>.ahead`.
pub fn ahead() -> String {
    "1h".into()
}

/// `sources.<name>.idle_after`.
pub fn idle_after() -> String {
    "30s".into()
}

/// `score.emit`.
pub fn emit() -> Emit {
    Emit::Arrival
}

/// `score.alias`.
pub fn alias() -> String {
    "production".into()
}

/// `score.batch.rows`.
pub fn batch_rows() -> u32 {
    1024
}

/// `score.batch.wait`.
pub fn batch_wait() -> String {
    "5ms".into()
}

/// `score.batch.bytes`.
pub fn batch_bytes() -> String {
    "4MiB".into()
}

/// `score.poll_alias`.
pub fn poll_alias() -> String {
    "2s".into()
}

/// `score.delivery`.
pub fn delivery() -> Delivery {
    Delivery::ExactlyOnce
}

/// `score.providers`: the first that works.
pub fn providers() -> Vec<Provider> {
    vec![Provider::Cuda, Provider::Cpu]
}

/// `score.threads`: more is slower for tree ensembles of the usual sizes.
pub fn threads() -> u32 {
    1
}

/// `monitor.window.rows`, where neither `rows` nor `time` is given.
pub fn monitor_rows() -> u64 {
    5000
}

/// `monitor.warm_up`.
pub fn warm_up() -> String {
    "0s".into()
}

/// `monitor.alpha`.
pub fn alpha() -> f64 {
    0.05
}

/// `monitor.horizon_windows`.
pub fn horizon_windows() -> u32 {
    200
}

/// `monitor.tolerance`.
pub fn tolerance() -> f64 {
    0.02
}

/// `monitor.resolve_after`.
pub fn resolve_after() -> u32 {
    3
}

/// `retraining.when`.
pub fn when() -> String {
    "drifted_features >= 1 for 2 windows".into()
}

/// `retraining.cooldown`.
pub fn cooldown() -> String {
    "30d".into()
}

/// `retraining.timeout`.
pub fn timeout() -> String {
    "30m".into()
}

/// `retraining.lookback`.
pub fn lookback() -> String {
    "365d".into()
}

/// `retraining.fresh_labels`.
pub fn fresh_labels() -> u64 {
    5000
}

/// `retraining.gates.metric`.
pub fn metric() -> Metric {
    Metric::Auc
}

/// `retraining.gates.min_gain`.
pub fn min_gain() -> f64 {
    0.0
}

/// `online.enabled` and `offline.rows`.
pub fn yes() -> bool {
    true
}
