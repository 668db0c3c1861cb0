//! Fuzzing of every decoder: no input, however odd, may make driftline panic or ask for memory without bounds.
//!
//! Each test takes valid inputs of one decoder, changes them at random in ways that keep most of their structure (bytes, words
//! of a text, nodes of a JSON document), and decodes what comes out. Where that panics, the test fails with the number of the
//! case, a smaller input that still panics, and how to run it again. docs/fuzzing.md says how to run it for hours.

mod definitions;
mod files;
mod harness;
mod keys;
mod mutate;
mod records;
mod stores;

use driftline::config;
use driftline::config::plan::Plan;

use crate::process::root;

#[global_allocator]
static ALLOCATOR: harness::Watched = harness::Watched;

/// A record of [`schema`] as JSON.
const VISIT: &str = r#"{"customer_id": "c1", "branch": 7, "at": 1700000000000, "page": "start", "kind": "b", "price": "12.50",
  "id": "abcd", "ratio": 0.5, "weight": 2.25, "ok": true, "day": 19000, "tags": ["x", "y"], "more": {"k": [null, "a"]},
  "next": null, "device": {"os": "linux"}}"#;

/// A file of `tests/pipelines/fuzz`.
fn file(name: &str) -> String {
    let path = root().join("tests/pipelines/fuzz").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// An Avro schema with every kind of type.
fn schema() -> String {
    file("visit.avsc")
}

/// A pipeline that uses most of what can be defined.
fn plan() -> Plan {
    config::load(&root().join("tests/pipelines/fuzz"), &|_| None)
        .unwrap_or_else(|faults| panic!("{}", faults.render(false)))
}
