//! `status`: where a pipeline stands, asked of the log, the offline store and the registry, and of a process that runs it; of
//! this alone where the embedded log is in its hands.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Failure, Outcome, load, printed, runtime};
use crate::broker::{self, Broker, BrokerError, NextOffset, TopicPartition};
use crate::cli::StatusArgs;
use crate::config::plan::Plan;
use crate::model;
use crate::store::{OfflineStore, Role};
use crate::telemetry::view;

pub(super) fn run(args: &StatusArgs) -> Outcome {
    let plan = load(&args.pipeline)?;
    let runtime = runtime()?;
    let status = match broker::open(&plan.broker, "driftline-status") {
        Ok(broker) => {
            let mut status = gather(&plan, broker.as_ref(), &runtime)?;
            // Another pipeline's process may listen there, or none.
            let running = runtime.block_on(ask_process(&args.address)).ok();
            status["running"] = running.filter(|running| running["pipeline"] == plan.name).unwrap_or_default();
            status
        }
        Err(error @ BrokerError::Locked { .. }) => match runtime.block_on(ask_process(&args.address)) {
            Ok(running) => json!({ "pipeline": plan.name, "running": running }),
            Err(reason) => {
                return Err(Failure::Failed(format!(
                    "{error}\n(and no running process answered at {}: {reason}; --address says where it listens)",
                    args.address
                )));
            }
        },
        Err(error) => return Err(Failure::failed(error)),
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        let text = serde_json::to_string_pretty(&status).map_err(Failure::failed)?;
        return printed(writeln!(out, "{text}"));
    }
    printed(write!(out, "{}", render(&status)))
}

async fn ask_process(address: &str) -> Result<Value, String> {
    let client = reqwest::Client::builder().timeout(Duration::from_secs(5)).build().map_err(|e| e.to_string())?;
    let answer = client.get(format!("http://{address}/status")).send().await.map_err(|e| e.to_string())?;
    answer.json().await.map_err(|e| e.to_string())
}

fn gather(plan: &Arc<Plan>, broker: &dyn Broker, runtime: &tokio::runtime::Runtime) -> Result<Value, Failure> {
    let offline = OfflineStore::open(plan, runtime.handle().clone()).map_err(Failure::failed)?;
    let role = offline.role().map_err(Failure::failed)?;
    let versions = offline.versions().map_err(Failure::failed)?;
    let mut stages = serde_json::Map::new();
    let mut stage = |name: &str, topics: Vec<Arc<str>>| -> Result<(), Failure> {
        let committed = broker.committed(&plan.group(name), &topics).map_err(Failure::failed)?;
        let mut rows = Vec::new();
        for topic in topics {
            let Some(info) = broker.topic(&topic).map_err(Failure::failed)? else {
                rows.push(json!({ "topic": topic, "missing": true }));
                continue;
            };
            let (mut read, mut lag) = (0, 0);
            for (partition, (earliest, end)) in info.partitions.iter().enumerate() {
                let at = TopicPartition::new(Arc::clone(&topic), i32::try_from(partition).unwrap_or(i32::MAX));
                let next = committed.get(&at).copied().unwrap_or(*earliest).max(*earliest);
                read += next.0 - earliest.0;
                lag += (end.0 - next.0).max(0);
            }
            rows.push(json!({ "topic": topic, "partitions": info.partitions.len(), "read": read, "lag": lag }));
        }
        stages.insert(name.to_owned(), Value::Array(rows));
        Ok(())
    };
    stage("features", plan.sources.iter().map(|s| Arc::clone(&s.topic)).collect())?;
    for (source, rekeyed) in plan.rekeyed() {
        stage(&format!("rekey.{}", source.name), vec![Arc::clone(&rekeyed.from.topic)])?;
    }
    for other in &plan.others {
        let topics = other.sources.iter().map(|s| Arc::clone(&s.topic)).collect();
        // Its group is `<pipeline>.by-<entity>.features`.
        stage(&format!("by-{}.features", other.entity.name), topics)?;
    }
    if plan.score.is_some() && broker.topic(&plan.features_topic()).map_err(Failure::failed)?.is_some() {
        stage("score", vec![plan.features_topic().into()])?;
    }
    if let (Some(_), Some(score)) = (&plan.monitor, &plan.score) {
        stage("drift", vec![Arc::clone(&score.topic)])?;
    }
    if let Some(retraining) = &plan.retraining {
        stage("retrain", vec![Arc::clone(&retraining.topic)])?;
    }
    let checkpoints: Vec<Value> = offline
        .summary()
        .map_err(Failure::failed)?
        .iter()
        .map(|p| {
            json!({
                "partition": p.partition, "sequence": p.sequence, "created_at": p.created_at, "definition": p.definition,
                "rows": p.rows, "files": p.files, "bytes": p.bytes, "state_bytes": p.state_bytes,
            })
        })
        .collect();
    let mut models = Value::Null;
    if let Some(score) = &plan.score {
        let registry = model::open_registry(&plan.registry).map_err(Failure::failed)?;
        let versions: Vec<String> =
            registry.versions(&score.model).map_err(Failure::failed)?.iter().map(ToString::to_string).collect();
        let aliases: serde_json::Map<_, _> = registry
            .aliases(&score.model)
            .map_err(Failure::failed)?
            .into_iter()
            .map(|(alias, version)| (alias, json!(version.to_string())))
            .collect();
        models = json!({ "model": score.model, "versions": versions, "aliases": aliases });
    }
    let last = |topic: &str| last_record(broker, topic).map_err(Failure::failed);
    Ok(json!({
        "pipeline": plan.name,
        "definition": plan.definition,
        "version": role_in_words(role),
        "versions": versions.map(|versions| versions.versions.len()),
        "broker": broker.describe(),
        "stages": stages,
        "offline": { "url": offline.describe(), "checkpoints": checkpoints },
        "models": models,
        "dead_letters": broker.topic(&plan.dead_letter_topic()).map_err(Failure::failed)?.map_or(0, |t| t.partitions.iter().map(|(a, b)| b.0 - a.0).sum::<i64>()),
        "last_drift_event": plan.monitor.as_ref().map(|m| last(&m.topic)).transpose()?,
        "last_audit_record": plan.retraining.as_ref().map(|r| last(&r.audit_topic)).transpose()?,
    }))
}

/// Where this definition stands among the pipeline's versions.
fn role_in_words(role: Role) -> String {
    match role {
        Role::Serving { version, .. } => format!("version {version} serves"),
        Role::Following { version, serving } => format!("version {version}, version {serving} serves"),
        Role::Unknown { serving, .. } => format!("none yet, version {serving} serves"),
    }
}

/// The newest committed record of a one-partition topic, as JSON.
fn last_record(broker: &dyn Broker, topic: &str) -> Result<Value, BrokerError> {
    let Some(info) = broker.topic(topic)? else { return Ok(Value::Null) };
    let mut newest = Value::Null;
    for (partition, (earliest, end)) in info.partitions.iter().enumerate() {
        let at = TopicPartition::new(topic, i32::try_from(partition).unwrap_or(i32::MAX));
        // Transaction markers take offsets too, so a few more than one have to be read.
        let mut next = NextOffset((end.0 - 16).max(earliest.0));
        while next < *end {
            let (records, after) = broker.read(&at, next, 64, Duration::from_secs(2))?;
            if let Some(value) = records.len().checked_sub(1).and_then(|last| records.values.get(last)) {
                newest = serde_json::from_slice(value).unwrap_or(Value::Null);
            }
            if after == next {
                break;
            }
            next = after;
        }
    }
    Ok(newest)
}

/// What a running process holds.
fn held(running: &Value) -> String {
    let number = |name: &str| running[name].as_u64().unwrap_or(0);
    let (entities, memory) = (view::count(number("entities")), view::bytes(number("state_bytes")));
    format!("state: {entities} keys, {memory} in memory, {} on disk", view::bytes(number("state_disk_bytes")))
}

fn render(status: &Value) -> String {
    let mut text = String::new();
    let number = |v: &Value| view::count(v.as_u64().unwrap_or(0));
    let word = |v: &Value| v.as_str().unwrap_or("-").to_owned();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "pipeline {}  {}", word(&status["pipeline"]), word(&status["broker"]));
    if let Some(running) = status["running"].as_object().filter(|_| status["broker"].is_null()) {
        let _ = writeln!(text, "{}", held(&status["running"]));
        let _ = writeln!(text, "a running process holds the embedded log; it says:");
        let _ = writeln!(text, "{}", serde_json::to_string_pretty(running).unwrap_or_default());
        return text;
    }
    let _ = writeln!(text, "definition {}: {}", word(&status["definition"]), word(&status["version"]));
    let _ = writeln!(text, "\n{:<10} {:<28} {:>10} {:>14} {:>12}", "stage", "topic", "partitions", "read", "lag");
    for stage in ["features", "score", "drift", "retrain"] {
        for row in status["stages"][stage].as_array().into_iter().flatten() {
            if row["missing"].as_bool() == Some(true) {
                let _ = writeln!(text, "{stage:<10} {:<28} {:>10}", word(&row["topic"]), "missing");
            } else {
                let _ = writeln!(
                    text,
                    "{stage:<10} {:<28} {:>10} {:>14} {:>12}",
                    word(&row["topic"]),
                    number(&row["partitions"]),
                    number(&row["read"]),
                    number(&row["lag"])
                );
            }
        }
    }
    if status["running"].is_object() {
        let _ = writeln!(text, "\n{}", held(&status["running"]));
    }
    let _ = writeln!(text, "\noffline files at {}", word(&status["offline"]["url"]));
    let _ = writeln!(
        text,
        "{:<10} {:>10} {:>18} {:>12} {:>8} {:>12} {:>12}",
        "partition", "checkpoint", "taken", "rows", "files", "size", "state"
    );
    for p in status["offline"]["checkpoints"].as_array().into_iter().flatten() {
        let _ = writeln!(
            text,
            "{:<10} {:>10} {:>18} {:>12} {:>8} {:>12} {:>12}",
            p["partition"],
            number(&p["sequence"]),
            view::date(p["created_at"].as_i64().unwrap_or(0)),
            number(&p["rows"]),
            number(&p["files"]),
            view::bytes(p["bytes"].as_u64().unwrap_or(0)),
            view::bytes(p["state_bytes"].as_u64().unwrap_or(0)),
        );
    }
    if status["models"].is_object() {
        let aliases: Vec<String> = status["models"]["aliases"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(a, v)| format!("{a} = {}", word(v)))
            .collect();
        let versions = status["models"]["versions"].as_array().map_or(0, Vec::len);
        let _ = writeln!(
            text,
            "\nmodel {}: {versions} version(s), {}",
            word(&status["models"]["model"]),
            aliases.join(", ")
        );
    }
    let _ = writeln!(text, "dead letters: {}", number(&status["dead_letters"]));
    let drift = &status["last_drift_event"];
    if drift.is_object() {
        let _ = writeln!(
            text,
            "last drift event: {} ({}): {}",
            word(&drift["incident_id"]),
            word(&drift["state"]),
            word(&drift["reason"])
        );
    }
    let audit = &status["last_audit_record"];
    if audit.is_object() {
        let _ = writeln!(text, "last retraining step: {} of {}", word(&audit["step"]), word(&audit["retraining_id"]));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_what_a_running_process_holds() {
        let running = json!({ "entities": 12_345, "state_bytes": 3 << 20, "state_disk_bytes": 5_u64 << 30 });
        let line = format!("state: {} keys, 3.0 MiB in memory, 5.0 GiB on disk\n", view::count(12_345));
        let locked = render(&json!({ "pipeline": "shop", "running": running }));
        let asked = render(&json!({ "pipeline": "shop", "broker": "kafka", "running": running }));
        assert!(locked.contains(&line) && locked.contains("it says:"), "{locked}");
        assert!(asked.contains(&line) && asked.contains("offline files"), "{asked}");
        let alone = render(&json!({ "pipeline": "shop", "broker": "kafka", "running": null }));
        assert!(!alone.contains("state: "), "{alone}");
    }
}
