//! What every stage stands on: the clock, failpoints, shutdown, the process's layout of threads.

pub mod backoff;
pub mod clock;
pub mod failpoint;
pub mod guard;
pub mod shutdown;
