//! Integration tests: one binary, one module a topic. They run against real servers and fail without them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod broker;
mod bundles;
mod cdnow;
mod chaos;
mod commands;
mod dead_letters;
mod drift;
mod faults;
mod fuzz;
mod golden;
mod lookups;
mod models;
mod outcome;
mod process;
mod protobuf;
mod registry;
mod rekey;
mod scoring_plan;
mod servers;
mod shipped;
mod source_plan;
mod stores;
mod tables;
mod versions;
mod window_versions;
mod windows;
mod workers;
