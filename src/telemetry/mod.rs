//! Metrics, logs, status.
