//! What scripts may rely on: exit codes, JSON that parses, quiet standard output.

use std::process::Output;

use serde_json::Value;

use crate::process::World;

const CHURN: &str = "pipelines/churn";

/// A small pipeline on an embedded log that has run to its end.
fn small() -> (World, String) {
    let world = World::new();
    let set = format!("broker.path={}", world.path("log").display());
    world.run(&["generate", CHURN, "--set", &set, "--customers", "50", "--days", "10"]);
    world.run(&["run", CHURN, "--set", &set, "--until-end", "--listen", "none"]);
    (world, set)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("it ended by itself")
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn answers_are_json_where_asked_for() {
    let (world, set) = small();
    let log = world.path("log").display().to_string();

    let status = json(&world.run(&["status", CHURN, "--set", &set, "--json"]));
    let features = status["stages"]["features"].as_array().unwrap();
    assert!(features.len() == 3 && features.iter().all(|topic| topic["lag"] == 0), "{status}");
    assert_eq!(status["models"]["aliases"]["production"], "1");

    let prediction = world.run(&["topic", "tail", "churn.predictions", "--embedded", &log, "-n", "1"]);
    let prediction = json(json(&prediction)["value"].as_str().unwrap());
    let customer = prediction["entity"]["customer_id"].as_str().unwrap();
    let found = json(&world.run(&["get", CHURN, customer, "--set", &set, "--json"]));
    assert_eq!(found["key"]["customer_id"], customer);
    assert_ne!(found["groups"]["orders"]["status"], "NOT_FOUND");

    let unknown = world.run(&["get", CHURN, "nobody", "--set", &set]);
    assert_eq!(unknown, "customer customer_id=nobody\n\nNOT_FOUND: no feature of it is stored\n\n");
    let unknown = json(&world.run(&["get", CHURN, "nobody", "--set", &set, "--json"]));
    assert_eq!(unknown["groups"]["orders"]["status"], "NOT_FOUND");
}

#[test]
fn log_lines_are_json_where_asked_for() {
    let world = World::new();
    let set = format!("broker.path={}", world.path("log").display());
    let output =
        world.output(&["generate", CHURN, "--set", &set, "--customers", "5", "--days", "2", "--log-format", "json"]);
    assert_eq!(code(&output), 0);
    let lines: Vec<Value> = errors(&output).lines().map(json).collect();
    assert_eq!(lines.len(), 4, "one topic created a line: {lines:?}");
    assert!(lines.iter().all(|line| line["level"] == "INFO" && line["topic"].is_string()));
}

#[test]
fn exit_codes_tell_wrong_usage_from_failure() {
    let world = World::new();
    let log = world.path("log").display().to_string();
    let set = format!("broker.path={log}");
    let usage: [&[&str]; 9] = [
        &[],
        &["chek"],
        &["check", "nowhere"],
        &["check", CHURN, "--set", "monitor.alpha=7"],
        &["check", CHURN, "--set", "monitor"],
        &["topic", "list"],
        &["topic", "tail", "x", "--embedded", &log, "--from", "yesterday"],
        &["get", CHURN, "a", "b", "--set", &set],
        &["--log", "a=b=c", "status", CHURN, "--set", &set],
    ];
    for arguments in usage {
        let output = world.output(arguments);
        assert_eq!(code(&output), 2, "{arguments:?}: {}", errors(&output));
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{arguments:?}");
    }
    let failures: [&[&str]; 3] = [
        &["topic", "tail", "churn.nope", "--embedded", &log],
        &["run", CHURN, "--set", "broker.path=/proc/no/such/folder", "--listen", "none"],
        &["check", CHURN, "--set", &set, "--set", "registry.initial=nowhere", "--servers"],
    ];
    for arguments in failures {
        let output = world.output(arguments);
        assert_eq!(code(&output), 1, "{arguments:?}: {}", errors(&output));
        assert!(errors(&output).contains("error: "), "{arguments:?}: {}", errors(&output));
    }
}

#[test]
fn faults_are_json_where_asked_for() {
    let world = World::new();
    let output = world.output(&["check", CHURN, "--json", "--set", "monitor.alpha=7", "--set", "score.threads=0"]);
    assert_eq!(code(&output), 2);
    let faults: Vec<Value> = String::from_utf8(output.stdout).unwrap().lines().map(json).collect();
    assert_eq!(faults.len(), 2, "{faults:?}");
    assert!(faults.iter().all(|fault| fault["message"].is_string() && fault["line"].is_u64()));
    let schema = json(&world.run(&["check", "--schema"]));
    assert_eq!(schema["title"], "driftline pipeline");
}

#[test]
fn an_embedded_log_is_named_before_all_else() {
    let mut world = World::new();
    let log = world.path("log").display().to_string();
    world.run(&["topic", "create", "t", "--embedded", &log, "--partitions", "2"]);
    // Nobody listens there.
    world.set("KAFKA_BROKERS", "127.0.0.1:9");
    let table = world.run(&["topic", "list", "--embedded", &log]);
    assert_eq!(table.lines().count(), 3, "{table}");
}

#[test]
fn every_shell_gets_completions_for_every_command() {
    let world = World::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = world.run(&["completions", shell]);
        for command in ["generate", "completions", "retrain"] {
            assert!(script.contains(command), "{shell} lacks {command}");
        }
    }
}
