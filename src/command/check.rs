//! `check`: all faults at once, then the plan.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use super::{Failure, Outcome, printed, runtime};
use crate::broker::Broker;
use crate::cli::CheckArgs;
use crate::config;
use crate::config::plan::{BrokerPlan, Format, Plan};
use crate::model::Bundle;
use crate::pipeline::{Stages, Wiring};
use crate::runtime::shutdown::Stop;
use crate::store;

pub(super) fn run(args: &CheckArgs) -> Outcome {
    let mut out = std::io::stdout().lock();
    let Some(pipeline) = &args.pipeline else {
        return printed(writeln!(out, "{}", config::json_schema()));
    };
    let plan = match config::load_with(pipeline, &|name| std::env::var(name).ok(), &args.set) {
        Ok(plan) => Arc::new(plan),
        Err(faults) => {
            if args.json {
                printed(writeln!(out, "{}", faults.to_json_lines().trim_end()))?;
            } else {
                eprint!("{}", faults.render(std::io::IsTerminal::is_terminal(&std::io::stderr())));
            }
            return Err(Failure::Usage(String::new()));
        }
    };
    if !args.json {
        printed(write!(out, "{}", plan.explain()))?;
    }
    if !args.servers {
        return Ok(());
    }
    let found = ask_servers(&plan)?;
    printed(writeln!(out, "\nservers"))?;
    for (good, line) in &found {
        printed(writeln!(out, "  {} {line}", if *good { "ok  " } else { "FAIL" }))?;
    }
    match found.iter().filter(|(good, _)| !good).count() {
        0 => Ok(()),
        n => Err(Failure::Failed(format!("{n} of {} checks against the servers failed", found.len()))),
    }
}

/// What the servers say of the plan: a line each, good or not.
fn ask_servers(plan: &Arc<Plan>) -> Result<Vec<(bool, String)>, Failure> {
    let runtime = runtime()?;
    let wiring = Wiring::open(plan, Stages::all(plan), runtime.handle(), &Stop::new(), Duration::ZERO)
        .map_err(Failure::failed)?;
    // A version that does not serve has opened none.
    let asked = || store::open_online(plan, runtime.handle().clone()).and_then(|store| store.ping().map(|()| store));
    let online = match wiring.online.map_or_else(asked, Ok) {
        Ok(store) => (true, format!("online store {}", store.describe())),
        Err(store::OnlineError::Off) => (true, "online store: none".to_owned()),
        Err(error) => (false, error.to_string()),
    };
    let mut found = vec![(true, format!("broker {}", wiring.broker.describe())), online];
    found.extend(topics(plan, wiring.broker.as_ref()));
    if let Some(registry) = &wiring.schemas {
        for source in &plan.sources {
            if let Format::Avro { schema } = &source.format {
                let subject = format!("{}-value", source.topic);
                found.push(match registry.is_compatible(&subject, schema) {
                    Ok(answer) if answer.compatible => (true, format!("schema of {subject} fits the registered one")),
                    Ok(answer) => (
                        false,
                        format!("schema of {subject} does not fit the registered one: {}", answer.messages.join("; ")),
                    ),
                    Err(error) => (false, error.to_string()),
                });
            }
        }
    }
    if let Some(score) = &plan.score {
        let fits = |bundle: Result<Bundle, String>| bundle?.check_against(plan).map_err(|e| e.to_string());
        found.push(match wiring.registry.resolve(&score.model, &score.alias) {
            Ok(Some(version)) => match fits(wiring.registry.load(&score.model, &version).map_err(|e| e.to_string())) {
                Ok(()) => (
                    true,
                    format!("model {} {} is version {version} and fits the feature list", score.model, score.alias),
                ),
                Err(error) => (false, error),
            },
            Ok(None) if let Some(initial) = &plan.registry.initial => {
                match fits(Bundle::load(initial).map_err(|e| e.to_string())) {
                    Ok(()) => (
                        true,
                        format!(
                            "model {} is not registered yet; the initial bundle fits the feature list",
                            score.model
                        ),
                    ),
                    Err(error) => (false, error),
                }
            }
            Ok(None) => (
                false,
                format!(
                    "{} has no version of model '{}' with alias '{}'",
                    wiring.registry.describe(),
                    score.model,
                    score.alias
                ),
            ),
            Err(error) => (false, error.to_string()),
        });
    }
    Ok(found)
}

fn topics(plan: &Plan, broker: &dyn Broker) -> Vec<(bool, String)> {
    let embedded = matches!(plan.broker, BrokerPlan::Embedded { .. });
    let mut counts = Vec::new();
    let mut found = Vec::new();
    for source in &plan.sources {
        match broker.topic(&source.topic) {
            Ok(Some(info)) => {
                counts.push(info.partitions.len());
                found.push((true, format!("topic {} with {} partitions", source.topic, info.partitions.len())));
            }
            Ok(None) if embedded => found.push((true, format!("topic {} will be created", source.topic))),
            Ok(None) => found.push((
                false,
                format!(
                    "topic {} does not exist; driftline topic create --pipeline … --sources creates all",
                    source.topic
                ),
            )),
            Err(error) => found.push((false, error.to_string())),
        }
    }
    if counts.windows(2).any(|w| w[0] != w[1]) {
        found.push((false, "the topics of sources and tables have different numbers of partitions: one task reads the same partition of all of them".into()));
    }
    found
}
