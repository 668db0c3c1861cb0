//! What scripts may rely on: exit codes, JSON that parses, quiet standard output.

use std::process::Output;

use driftline::broker::SchemaRegistry;
use driftline::source::avro::{AvroEncoder, AvroSchema};
use serde_json::{Value, json};

use crate::process::World;
use crate::servers::{self, Kafka, unique};

const CHURN: &str = "pipelines/churn";

/// A small pipeline on an embedded log that has run to its end.
fn small() -> (World, String) {
    let world = World::new();
    let set = format!("broker.path={}", world.path("log").display());
    world.run(&["generate", CHURN, "--set", &set, "--customers", "50", "--days", "10"]);
    world.run(&["run", CHURN, "--set", &set, "--until-end", "--listen", "none"]);
    (world, set)
}

fn parsed(text: &str) -> Value {
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

    let status = parsed(&world.run(&["status", CHURN, "--set", &set, "--json"]));
    let features = status["stages"]["features"].as_array().unwrap();
    assert!(features.len() == 4 && features.iter().all(|topic| topic["lag"] == 0), "{status}");
    assert_eq!(status["models"]["aliases"]["production"], "1");

    let prediction = world.run(&["topic", "tail", "churn.predictions", "--embedded", &log, "-n", "1"]);
    let prediction = parsed(parsed(&prediction)["value"].as_str().unwrap());
    let customer = prediction["entity"]["customer_id"].as_str().unwrap();
    let found = parsed(&world.run(&["get", CHURN, customer, "--set", &set, "--json"]));
    assert_eq!(found["key"]["customer_id"], customer);
    assert_ne!(found["groups"]["orders"]["status"], "NOT_FOUND");

    let unknown = world.run(&["get", CHURN, "nobody", "--set", &set]);
    assert_eq!(unknown, "customer customer_id=nobody\n\nNOT_FOUND: no feature of it is stored\n\n");
    let unknown = parsed(&world.run(&["get", CHURN, "nobody", "--set", &set, "--json"]));
    assert_eq!(unknown["groups"]["orders"]["status"], "NOT_FOUND");
}

#[test]
fn log_lines_are_json_where_asked_for() {
    let world = World::new();
    let set = format!("broker.path={}", world.path("log").display());
    let output =
        world.output(&["generate", CHURN, "--set", &set, "--customers", "5", "--days", "2", "--log-format", "json"]);
    assert_eq!(code(&output), 0);
    let lines: Vec<Value> = errors(&output).lines().map(parsed).collect();
    assert_eq!(lines.len(), 5, "one topic created a line: {lines:?}");
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
    let no_log = world.path("no-log").display().to_string();
    world.run(&["topic", "create", "churn.other", "--embedded", &log]);
    let failures: [&[&str]; 5] = [
        &["topic", "tail", "churn.nope", "--embedded", &log],
        &["topic", "tail", "churn.nope", "--embedded", &no_log],
        &["topic", "list", "--embedded", &no_log],
        &["run", CHURN, "--set", "broker.path=/proc/no/such/folder", "--listen", "none"],
        &["check", CHURN, "--set", &set, "--set", "registry.initial=nowhere", "--servers"],
    ];
    for arguments in failures {
        let output = world.output(arguments);
        assert_eq!(code(&output), 1, "{arguments:?}: {}", errors(&output));
        assert!(errors(&output).contains("error: "), "{arguments:?}: {}", errors(&output));
    }
    assert!(!world.path("no-log").exists(), "looking at a log makes none");
}

#[test]
fn faults_are_json_where_asked_for() {
    let world = World::new();
    let output = world.output(&["check", CHURN, "--json", "--set", "monitor.alpha=7", "--set", "score.threads=0"]);
    assert_eq!(code(&output), 2);
    let faults: Vec<Value> = String::from_utf8(output.stdout).unwrap().lines().map(parsed).collect();
    assert_eq!(faults.len(), 2, "{faults:?}");
    assert!(faults.iter().all(|fault| fault["message"].is_string() && fault["line"].is_u64()));
    let schema = parsed(&world.run(&["check", "--schema"]));
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

#[test]
fn tail_shows_framed_avro_on_kafka_and_survives_what_is_broken() {
    const SCHEMA: &str = r#"{"type": "record", "name": "R", "fields": [{"name": "who", "type": "string"},
        {"name": "amount", "type": ["null", "double"]}]}"#;
    let (world, kafka) = (World::new(), Kafka::shared());
    let url = servers::SchemaRegistry::shared().url();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let registry = SchemaRegistry::new(&url, runtime.handle().clone()).unwrap();
    let topic = kafka.topic("tailed", 1);
    let id = registry.register(&format!("{topic}-value"), SCHEMA).unwrap();
    let encode = |id| {
        let encoder = AvroEncoder::framed(AvroSchema::parse(SCHEMA).unwrap(), id);
        encoder.to_vec(&json!({"who": "Ada", "amount": 2.5})).unwrap()
    };
    let (good, unknown) = (encode(id), encode(4_000_002));
    let values = [&good[..], &good[..good.len() - 1], &unknown, b"{\"plain\": 1}", b"\xff"];
    kafka.produce(&topic, values.map(|value| (0, &b"key"[..], value)));

    let (brokers, registry) = (kafka.address(), ["--schema-registry", &url]);
    let tail = ["topic", "tail", &topic, "--brokers", &brokers];
    let told: Vec<Value> = world.run(&[&tail[..], &registry].concat()).lines().map(parsed).collect();
    assert_eq!(told.len(), values.len());
    assert_eq!(told[0]["value"], json!({"who": "Ada", "amount": 2.5}));
    for (line, reason) in [(1, "cut short"), (2, "does not know schema id 4000002")] {
        let error = told[line]["error"].as_str().unwrap();
        assert!(error.contains(reason) && told[line]["value_base64"].is_string(), "{error}");
    }
    assert_eq!((&told[3]["value"], &told[4]["value_base64"]), (&json!("{\"plain\": 1}"), &json!("/w==")));

    // Without a registry nothing is lost either, and the line says what is missing.
    let told: Vec<Value> = world.run(&tail).lines().map(parsed).collect();
    assert!(told[0]["error"].as_str().unwrap().contains("--schema-registry"), "{told:?}");
    let listed = world.run(&["topic", "list", "--brokers", &brokers]);
    assert!(listed.lines().any(|line| line.starts_with(&topic)), "{listed}");
}

#[test]
fn topics_are_created_and_filled_on_kafka() {
    let (world, topic) = (World::new(), unique("made"));
    let brokers = Kafka::shared().address();
    let at = ["--brokers", &brokers];
    world.run(&[&["topic", "create", &topic, "--partitions", "1"][..], &at].concat());
    let lines = world.path("lines.txt");
    std::fs::write(&lines, "a:1\nb:2\n").unwrap();
    let file = lines.to_str().unwrap();
    world.run(&[&["topic", "send", &topic, "--key", ":", "--header", "from=file", "--file", file][..], &at].concat());
    let told: Vec<Value> =
        world.run(&[&["topic", "tail", &topic, "--from", "-1"][..], &at].concat()).lines().map(parsed).collect();
    assert_eq!((told.len(), &told[0]["key"], &told[0]["value"]), (1, &json!("b"), &json!("2")));
    assert_eq!(told[0]["headers"], json!([{"name": "from", "value": "file"}]));
}
