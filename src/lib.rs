//! driftline: Kafka topics in; fresh features, predictions and retraining out.
//!
//! ```text
//!  broker ──> source ──> window ──> store            log → columns → aggregates → Redis, Arrow files
//!                          │
//!                          └──────> score ──> broker feature rows → ONNX → predictions topic
//!                                     │
//!                            model ───┘              bundles, registry, sessions
//!                                     drift          predictions → verdicts → drift topic
//!                                     retrain        retraining topic → trainer → gates → alias
//! ```
//!
//! `generate` makes up the events of the churn pipeline.
//!
//! Read the modules in that order and you read the data's way. Each stage knows the messages of its neighbours, never their
//! insides; only `pipeline` sees them all.

#![warn(missing_docs)]

// What unit tests share with integration tests and benches names the crate as those do.
#[cfg(test)]
extern crate self as driftline;

pub mod config;

pub mod broker;
pub mod source;
pub mod window;
pub mod store;
pub mod model;
pub mod score;
pub mod drift;
pub mod retrain;

pub mod pipeline;
pub mod generate;

pub mod runtime;
pub mod telemetry;

pub mod cli;
pub mod command;
