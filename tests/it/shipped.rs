//! What the repository ships: pipelines that load, bundles that are whole, schemas that the messages fit.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use apache_avro::types::Value as Avro;
use driftline::config;
use driftline::drift::profile::Profile;
use driftline::model::Bundle;
use serde_json::{Value, json};

use crate::process::{World, python, root};

const CHURN: &str = "pipelines/churn";

/// All pipelines of the repository.
fn pipelines() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = ["pipelines", "tests/pipelines"]
        .iter()
        .flat_map(|folder| std::fs::read_dir(root().join(folder)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|folder| folder.join(config::FILE_NAME).exists())
        .collect();
    found.sort();
    assert!(found.contains(&root().join(CHURN)));
    found
}

#[test]
fn every_pipeline_checks_without_a_fault() {
    let world = World::new();
    for folder in pipelines() {
        let plan = config::load(&folder, &|_| None).unwrap_or_else(|faults| panic!("{}", faults.render(false)));
        let folder = folder.display().to_string();
        let explained = world.run(&["check", &folder]);
        assert!(explained.starts_with(&format!("pipeline {} (definition {})", plan.name, plan.definition)));
        assert_eq!(world.run(&["check", &folder, "--json"]), "", "one object a fault, and there is none");
    }
}

#[test]
fn every_bundle_is_whole_and_fits_its_pipeline() {
    for folder in pipelines() {
        let plan = config::load(&folder, &|_| None).unwrap();
        let Some(initial) = &plan.registry.initial else { continue };
        let bundle = Bundle::load(initial).unwrap();
        bundle.check_against(&plan).unwrap();
        assert_eq!(bundle.manifest.name, plan.score.as_ref().unwrap().model);
        assert!(!bundle.preprocessor().is_empty() && !bundle.model().is_empty());

        let profile = Profile::parse(bundle.profile(), "the bundle's profile").unwrap();
        let profiled: Vec<&str> = profile.columns().iter().map(|column| column.name()).collect();
        let mut watched: Vec<&str> = bundle.manifest.signature.inputs.iter().map(|input| input.name.as_str()).collect();
        watched.push("score");
        assert_eq!(profiled, watched, "{}", initial.display());

        let metrics = &bundle.manifest.metrics;
        let metric = &plan.retraining.as_ref().unwrap().gates.metric;
        assert!(metrics.values().all(|value| value.is_finite()) && metrics.contains_key(metric), "{metrics:?}");
        for key in ["training_set_sha256", "training_rows", "holdout_rows", "from", "to", "seed", "onnxruntime"] {
            assert!(bundle.manifest.lineage.contains_key(key), "{}: lineage lacks {key}", initial.display());
        }
        let trained_on = bundle.manifest.lineage["definition"].as_str();
        assert_eq!(trained_on, Some(&*plan.definition), "{}: train it on this definition", initial.display());
    }
}

/// All committed values and headers of a topic on an embedded log.
fn records(world: &World, log: &str, topic: &str) -> Vec<Value> {
    let lines = world.run(&["topic", "tail", topic, "--embedded", log]);
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The messages of a topic, which are JSON.
fn messages(world: &World, log: &str, topic: &str) -> Vec<Value> {
    let text = |record: &Value| serde_json::from_str(record["value"].as_str().unwrap()).unwrap();
    records(world, log, topic).iter().map(text).collect()
}

#[test]
fn what_a_pipeline_writes_fits_the_published_schemas() {
    let world = World::new();
    let log = world.path("log").display().to_string();
    let set = format!("broker.path={log}");
    // Prices double after two months, and one record of each kind cannot be read.
    let shift = ["--customers", "2000", "--days", "120", "--shift", "amount*2@60"];
    world.run(&[&["generate", CHURN, "--set", &set][..], &shift].concat());
    let broken = world.path("broken.txt");
    std::fs::write(&broken, "{\"customer_id\": \"C1\"}\n").unwrap();
    for topic in ["churn.purchases", "churn.support"] {
        world.run(&["topic", "send", topic, "--embedded", &log, "--file", broken.to_str().unwrap()]);
    }
    world.run(&[
        "run",
        CHURN,
        "--set",
        &set,
        "--set",
        "monitor.window.rows=500",
        "--set",
        "monitor.warm_up=0s",
        "--set",
        "retraining.fresh_labels=500",
        // Whether the candidate is any good is another test's question.
        "--set",
        "retraining.gates={ min_gain = -1.0, max_ece = 1.0 }",
        "--until-end",
        "--listen",
        "none",
    ]);
    // The same events once more through the features stage alone, whose rows go to a topic, with windows that are emitted.
    let apart = World::new();
    let apart_log = apart.path("log").display().to_string();
    let apart_set = format!("broker.path={apart_log}");
    apart.run(&["generate", CHURN, "--set", &apart_set, "--customers", "100", "--days", "20"]);
    let windows = "windows.days={ source = \"purchases\", of = \"amount\", functions = [\"count\", \"std\"], tumbling = \"1d\", early = \"1h\" }";
    apart.run(&["features", CHURN, "--set", &apart_set, "--set", windows, "--until-end", "--listen", "none"]);

    let headers = |record: &Value| -> Value {
        let pairs = record["headers"].as_array().unwrap().iter();
        pairs.map(|header| (header["name"].as_str().unwrap().to_owned(), header["value"].clone())).collect()
    };
    let dead: Vec<Value> = records(&world, &log, "churn.dead-letters").iter().map(headers).collect();
    assert_eq!(dead.len(), 2);
    // Put back, they die again.
    world.run(&["dead-letters", "replay", CHURN, "--set", &set]);
    world.run(&["features", CHURN, "--set", &set, "--until-end", "--listen", "none"]);
    let dead: Vec<Value> = records(&world, &log, "churn.dead-letters").iter().map(headers).collect();
    assert_eq!(dead.len(), 4);
    let audit = messages(&world, &log, "churn.audit");
    assert_eq!(audit.last().unwrap()["step"], "promoted", "{audit:?}");
    let written = [
        ("prediction", messages(&world, &log, "churn.predictions")),
        ("feature-row", messages(&apart, &apart_log, "churn.features")),
        ("window-row", messages(&apart, &apart_log, "churn.windows.days")),
        ("drift-event", messages(&world, &log, "churn.drift")),
        ("retraining-event", messages(&world, &log, "churn.retraining")),
        ("audit-record", audit),
        ("dead-letter-headers", dead),
    ];
    let mut cases = Vec::new();
    for (name, messages) in &written {
        let schema = root().join(format!("schemas/driftline/{name}.schema.json"));
        assert!(!messages.is_empty(), "no {name} was written");
        for message in messages {
            cases.push(json!({"schema": schema, "message": message}).to_string());
        }
    }
    let published = std::fs::read_dir(root().join("schemas/driftline")).unwrap().count();
    assert_eq!(published, written.len(), "every schema is checked");
    check_schemas(&cases.join("\n"));
}

/// Lets Python's jsonschema judge.
fn check_schemas(cases: &str) {
    let mut child = Command::new(python())
        .arg(root().join("tests/it/json_schema.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(cases.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{errors}");
}

fn avro_schema(path: &Path) -> apache_avro::Schema {
    apache_avro::Schema::parse_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn generated_events_fit_the_schemas_of_their_topics() {
    let world = World::new();
    let log = world.path("log").display().to_string();
    let set = format!("broker.path={log}");
    let generate = ["generate", CHURN, "--set", &set, "--customers", "200", "--days", "30"];
    world.run(&generate);
    let mut as_json: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for line in world.run(&[&generate[..], &["--stdout"]].concat()).lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        as_json.entry(event["source"].as_str().unwrap().to_owned()).or_default().push(event["record"].clone());
    }
    let in_order = |mut records: Vec<Value>| {
        records.sort_by_key(Value::to_string);
        records
    };

    // Avro, read by another implementation, is what the JSON lines say.
    let read = |schema: &str, record: &Value| -> Value {
        if record["value"].is_null() && record["value_base64"].is_null() {
            return Value::Null;
        }
        let encoded = record["value_base64"].as_str().expect("Avro is no text here");
        let bytes = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, encoded).unwrap();
        let mut rest = &bytes[..];
        let value = apache_avro::from_avro_datum(&avro_schema(&root().join(schema)), &mut rest, None).unwrap();
        assert!(rest.is_empty());
        value.try_into().unwrap()
    };
    let of_topic = |topic: &str, schema: &str| -> Vec<Value> {
        records(&world, &log, topic).iter().map(|record| read(schema, record)).collect()
    };
    let purchases = of_topic("churn.purchases", "schemas/churn/purchase.avsc");
    assert!(!purchases.is_empty());
    assert_eq!(in_order(purchases), in_order(as_json.remove("purchases").unwrap()));

    // A table: an account that is closed has no value.
    let customers = of_topic("churn.customers", "schemas/churn/customer.avsc");
    assert!(customers.contains(&Value::Null) && customers.iter().any(|facts| facts["born"].is_null()));
    assert_eq!(in_order(customers), in_order(as_json.remove("profile").unwrap()));

    // So does driftline, which is told the schema by the pipeline.
    let tailed = world.run(&["topic", "tail", "churn.purchases", "--pipeline", CHURN, "--set", &set, "-n", "1"]);
    let tailed: Value = serde_json::from_str(&tailed).unwrap();
    assert!(tailed["value"]["purchased_at"].is_i64() && tailed["value"]["customer_id"] == tailed["key"], "{tailed}");

    // JSON with a schema file.
    let contact = avro_schema(&root().join("schemas/churn/contact.avsc"));
    let apache_avro::Schema::Record(fields) = &contact else { panic!("a record's schema") };
    let contacts = messages(&world, &log, "churn.support");
    assert!(!contacts.is_empty());
    for contact_json in &contacts {
        let names: Vec<&String> = contact_json.as_object().unwrap().keys().collect();
        let mut expected: Vec<&String> = fields.fields.iter().map(|field| &field.name).collect();
        expected.sort();
        assert_eq!(names, expected);
        Avro::from(contact_json.clone()).resolve(&contact).unwrap_or_else(|error| panic!("{contact_json}: {error}"));
    }
    assert_eq!(in_order(contacts), in_order(as_json.remove("support").unwrap()));

    // JSON with fields declared in pipeline.toml.
    let plan = config::load(&root().join(CHURN), &|_| None).unwrap();
    let logins = plan.sources.iter().find(|source| *source.name == *"logins").unwrap();
    let written = messages(&world, &log, &logins.topic);
    for login in &written {
        for field in &logins.fields {
            assert!(!login[&*field.name].is_null(), "{login} lacks {}", field.name);
        }
    }
    assert_eq!(in_order(written), in_order(as_json.remove("logins").unwrap()));
}

/// What a prediction takes to be true of a customer is what the newest record at the purchase's instant says.
#[test]
fn predictions_know_the_facts_as_of_their_purchase() {
    const DAY: i64 = 86_400_000;
    let world = World::new();
    let log = world.path("log").display().to_string();
    let set = format!("broker.path={log}");
    let generate = ["generate", CHURN, "--set", &set, "--customers", "600", "--days", "80"];
    world.run(&generate);
    world.run(&["run", CHURN, "--set", &set, "--until-end", "--listen", "none"]);

    let mut facts: BTreeMap<String, BTreeMap<i64, Value>> = BTreeMap::new();
    for line in world.run(&[&generate[..], &["--stdout"]].concat()).lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        let record = &event["record"];
        if event["source"] == "profile" {
            let (customer, since) = match record {
                Value::Null => (&event["key"], &event["timestamp"]),
                _ => (&record["customer_id"], &record["changed_at"]),
            };
            let customer = facts.entry(customer.as_str().unwrap().to_owned()).or_default();
            customer.insert(since.as_i64().unwrap(), record.clone());
        }
    }
    let plans = ["free", "plus", "premium"];
    let (mut newer, mut changed) = (0, 0);
    let predictions = messages(&world, &log, "churn.predictions");
    for prediction in &predictions {
        let at = prediction["event_time"].as_i64().unwrap();
        let of_customer = &facts[prediction["entity"]["customer_id"].as_str().unwrap()];
        let (since, known) = of_customer.range(..=at).next_back().unwrap();
        let features = &prediction["features"];
        let number = |name: &str| features[name].as_f64();
        assert_eq!(
            number("profile_tier"),
            plans.iter().position(|plan| known["plan"] == *plan).map(|tier| tier as f64)
        );
        assert_eq!(number("profile_newsletter"), Some(f64::from(known["newsletter"] == true)));
        assert_eq!(number("profile_islands"), Some(f64::from(known["region"] == "islands")));
        let day = |instant: &Value| instant.as_i64().unwrap().div_euclid(DAY) as f64;
        assert_eq!(number("tenure_days"), Some(at.div_euclid(DAY) as f64 - day(&known["signed_up_at"])));
        assert_eq!(number("plan_days"), Some(at.div_euclid(DAY) as f64 - day(&known["plan_since"])));
        assert_eq!(number("age").is_some(), known["born"].is_i64());
        newer += u32::from(*since > 1_735_689_600_000);
        changed += u32::from(of_customer.range(at + 1..).next().is_some());
    }
    assert!(newer > 200 && changed > 200, "{newer} know more than the first day, {changed} not yet what came later");
}
