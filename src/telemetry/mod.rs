//! Metrics, logs and the board: what a running process tells about itself.
//!
//! [`log`] sets up human or JSON logs, [`metrics`] names every metric, [`board`] holds the numbers and happenings that the
//! live view, the plain lines and `/status` show, [`http`] serves `/metrics`, `/health`, `/ready` and `/status`.

pub mod board;
pub mod http;
pub mod latency;
pub mod log;
pub mod metrics;
pub mod screen;
pub mod view;
