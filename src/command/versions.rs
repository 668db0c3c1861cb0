//! `versions`: a changed definition beside the one that serves.

mod compare;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::run::{Which, start};
use super::{Failure, Outcome, load, open_existing, printed, runtime};
use crate::broker::{Broker, NextOffset, Offsets, TopicPartition};
use crate::cli::{PipelineArgs, RunArgs, VersionsArgs, VersionsCommand};
use crate::config::plan::{BrokerPlan, Plan};
use crate::runtime::clock;
use crate::runtime::failpoint;
use crate::store::{Action, Definition, OfflineStore, Version, Versions};

pub(super) fn run(args: &VersionsArgs) -> Outcome {
    match &args.command {
        VersionsCommand::List { pipeline, json } => list(pipeline, *json),
        VersionsCommand::Bootstrap { run, until_caught_up, shadow_topics } => {
            bootstrap(run, *until_caught_up, *shadow_topics)
        }
        VersionsCommand::Compare { pipeline, base, with, tolerance, strict, json } => {
            let place = Place::open(pipeline)?;
            let versions = place.versions()?;
            let base = place.number(&versions, base.unwrap_or(versions.serving))?;
            let newest = versions.versions.iter().rev().find(|v| v.dropped_at.is_none() && v.number != base.number);
            let own = versions.of(&place.definition()).filter(|v| v.number != base.number);
            let with = match (with, own.or(newest)) {
                (Some(number), _) => place.number(&versions, *number)?,
                (None, Some(found)) => found.clone(),
                (None, None) => return Err(Failure::Failed(format!("{} has one version only", place.plan.name))),
            };
            compare::run(&place, &base, &with, *tolerance, *strict, *json)
        }
        VersionsCommand::Switch { pipeline, to, anyway } => switch(pipeline, *to, *anyway),
        VersionsCommand::Rollback { pipeline } => {
            let place = Place::open(pipeline)?;
            let record = place.change(|versions| {
                let none = || {
                    Failure::Failed(format!(
                        "no version served before version {}, or its files were dropped",
                        versions.serving
                    ))
                };
                let previous = versions.previous.ok_or_else(none)?;
                versions.switched(previous, Action::RolledBack, clock::now_ms()).ok_or_else(none)
            })?;
            told(&place, &record)
        }
        VersionsCommand::Drop { pipeline, number } => {
            let place = Place::open(pipeline)?;
            let versions = place.versions()?;
            // A record that was written before its files were removed is taken up again.
            let dropped = versions.versions.iter().any(|v| v.number == *number && v.dropped_at.is_some());
            if !dropped {
                place.number(&versions, *number)?;
                place.change(|versions| {
                    versions.dropped(*number, clock::now_ms()).ok_or_else(|| {
                        Failure::Failed(format!("version {number} serves; switch to another one before it is dropped"))
                    })
                })?;
            }
            let files = place.offline.remove_version(*number).map_err(Failure::failed)?;
            printed(writeln!(std::io::stdout(), "version {number} is dropped: {files} files removed"))
        }
    }
}

/// A pipeline and its offline store.
struct Place {
    plan: Arc<Plan>,
    offline: OfflineStore,
    _runtime: tokio::runtime::Runtime,
}

impl Place {
    fn open(args: &PipelineArgs) -> Result<Self, Failure> {
        let (plan, runtime) = (load(args)?, runtime()?);
        let offline = OfflineStore::open(&plan, runtime.handle().clone()).map_err(Failure::failed)?;
        Ok(Self { plan, offline, _runtime: runtime })
    }

    /// The newest record. A pipeline from before there were records has one version: that of its checkpoints.
    fn versions(&self) -> Result<Versions, Failure> {
        if let Some(versions) = self.offline.versions().map_err(Failure::failed)? {
            return Ok(versions);
        }
        let (definitions, topics) = self.offline.checkpointed().map_err(Failure::failed)?;
        let mut definitions = definitions.into_iter();
        match (definitions.next(), definitions.next()) {
            (Some(definition), None) => {
                let topics = topics.into_iter().collect();
                let definition = Definition { features: definition, windows: String::new() };
                let mut record = Versions::first(&self.plan.name, &definition, topics, clock::now_ms());
                // Its checkpoints do not tell.
                record.versions.iter_mut().for_each(|version| version.windows = None);
                Ok(record)
            }
            (None, _) => Err(Failure::Failed(format!(
                "{} has no checkpoint in {}: nothing serves yet, `driftline run` begins its first version",
                self.plan.name,
                self.offline.describe()
            ))),
            (Some(_), Some(_)) => Err(Failure::Failed(format!(
                "the checkpoints in {} are of several definitions: a --rebuild has not come to all partitions; run it again",
                self.offline.describe()
            ))),
        }
    }

    /// That of pipeline.toml.
    fn definition(&self) -> Definition {
        Definition::of(&self.plan)
    }

    fn number(&self, versions: &Versions, number: u32) -> Result<Version, Failure> {
        versions.number(number).cloned().ok_or_else(|| {
            Failure::Failed(format!("{} has no version {number}; `driftline versions list` has them", self.plan.name))
        })
    }

    /// Makes a change the newest record. Where somebody else changes something at once, it is made to what they left.
    fn change(&self, change: impl Fn(&Versions) -> Result<Versions, Failure>) -> Result<Versions, Failure> {
        loop {
            let versions = self.versions()?;
            // The first record of a pipeline from before there were records is what it is, not this change.
            if self.offline.versions().map_err(Failure::failed)?.is_none() {
                self.offline.record_versions(&versions).map_err(Failure::failed)?;
                continue;
            }
            let next = change(&versions)?;
            if next == versions || self.offline.record_versions(&next).map_err(Failure::failed)? {
                return Ok(next);
            }
        }
    }

    /// The store of a version's files.
    fn files(&self, version: &Version) -> Result<OfflineStore, Failure> {
        self.offline.of_version(version.number, &version.recorded()).map_err(Failure::failed)
    }

    /// Next offset of each source's partition in a version's newest checkpoints.
    fn checkpointed(&self, version: &Version) -> Result<Offsets, Failure> {
        let partitions = self.files(version)?.summary().map_err(Failure::failed)?;
        Ok(partitions.into_iter().flat_map(|partition| partition.next).collect())
    }

    /// What the version that serves has committed.
    fn committed(&self, broker: &dyn Broker, versions: &Versions) -> Result<Offsets, Failure> {
        let topics: Vec<Arc<str>> = versions
            .number(versions.serving)
            .into_iter()
            .flat_map(|version| version.topics.iter().map(|topic| Arc::from(topic.as_str())))
            .collect();
        broker.committed(&self.plan.group("features"), &topics).map_err(Failure::failed)
    }
}

fn told(place: &Place, record: &Versions) -> Outcome {
    let before = record.previous.map(|previous| format!(" instead of version {previous}")).unwrap_or_default();
    let next = match place.plan.broker {
        BrokerPlan::Kafka { .. } => "its processes take over within seconds",
        BrokerPlan::Embedded { .. } => "the process that runs ends; start it with the definition of that version",
    };
    printed(writeln!(std::io::stdout(), "version {} serves{before}; {next}", record.serving))
}

fn bootstrap(run: &RunArgs, until_caught_up: bool, shadow_topics: bool) -> Outcome {
    {
        let place = Place::open(&run.pipeline)?;
        let versions = place.versions()?;
        let definition = &place.definition();
        // Of one from before windows were told it is not known whether they have changed.
        let known = versions.of(definition).filter(|version| version.is(definition));
        match known {
            Some(version) if version.number == versions.serving => {
                return Err(Failure::Failed(format!(
                    "version {} has this definition and serves: nothing has changed",
                    version.number
                )));
            }
            Some(version) => tracing::info!(version = version.number, "going on beside version {}", versions.serving),
            None => {
                let topics: Vec<String> = place.plan.sources.iter().map(|source| source.topic.to_string()).collect();
                let record = place.change(|versions| {
                    let bootstrapped = versions.bootstrapped(definition, topics.clone(), clock::now_ms());
                    Ok(bootstrapped.map_or_else(|| versions.clone(), |(record, _)| record))
                });
                let number = record?.of(definition).map_or(0, |version| version.number);
                tracing::info!(version = number, %definition, "computing it beside version {}", versions.serving);
                failpoint::hit("versions.bootstrapped");
            }
        }
        warn_of_expired(&place)?;
    }
    let mut run = run.clone();
    run.until_end |= until_caught_up;
    start(&run, Which::All, shadow_topics, |_| Ok(()))
}

/// Says from when on there is history, where the topics do not reach back to their beginning.
fn warn_of_expired(place: &Place) -> Outcome {
    let broker = open_existing(&place.plan.broker, "driftline-versions")?;
    for source in &place.plan.sources {
        let Some(info) = broker.topic(&source.topic).map_err(Failure::failed)? else { continue };
        for (partition, (earliest, end)) in info.partitions.iter().enumerate() {
            if earliest.0 == 0 || earliest == end {
                continue;
            }
            let at = TopicPartition::new(Arc::clone(&source.topic), i32::try_from(partition).unwrap_or(i32::MAX));
            let (first, _) = broker.read(&at, *earliest, 1, Duration::from_secs(10)).map_err(Failure::failed)?;
            let from = first.timestamps.first().map_or_else(|| "its end".to_owned(), |ms| instant(*ms));
            tracing::warn!("{at}: the records before offset {} have expired; history begins at {from}", earliest.0);
        }
    }
    Ok(())
}

fn instant(ms: i64) -> String {
    chrono::DateTime::from_timestamp_millis(ms)
        .map_or_else(|| ms.to_string(), |at| at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true))
}

fn switch(args: &PipelineArgs, to: Option<u32>, anyway: bool) -> Outcome {
    let place = Place::open(args)?;
    let versions = place.versions()?;
    let to = match to {
        Some(number) => place.number(&versions, number)?,
        None => versions.of(&place.definition()).cloned().ok_or_else(|| {
            Failure::Failed("pipeline.toml is none of the versions; `driftline versions bootstrap` comes first".into())
        })?,
    };
    if to.number == versions.serving {
        return Err(Failure::Failed(format!("version {} serves already", to.number)));
    }
    let next = place.checkpointed(&to)?;
    // An embedded log in a running process's hands cannot be asked; its offsets are in that version's checkpoints.
    let committed = match open_existing(&place.plan.broker, "driftline-versions") {
        Ok(broker) => place.committed(broker.as_ref(), &versions)?,
        Err(_) if matches!(place.plan.broker, BrokerPlan::Embedded { .. }) => {
            place.checkpointed(&place.number(&versions, versions.serving)?)?
        }
        Err(failure) => return Err(failure),
    };
    let missing: Vec<String> = committed
        .iter()
        .filter(|(at, committed)| {
            to.topics.iter().any(|t| **t == *at.topic) && committed.0 > 0 && !next.contains_key(at)
        })
        .map(|(at, _)| at.to_string())
        .collect();
    if !missing.is_empty() && !anyway {
        return Err(Failure::Failed(format!(
            "version {} has no checkpoint of {} yet: `driftline versions bootstrap --until-caught-up` comes first (--anyway switches all the same; nothing is published until it has computed them)",
            to.number,
            missing.join(", ")
        )));
    }
    let record = place.change(|versions| {
        versions
            .switched(to.number, Action::Switched, clock::now_ms())
            .ok_or_else(|| Failure::Failed(format!("version {} serves already, or was dropped just now", to.number)))
    })?;
    told(&place, &record)
}

fn list(args: &PipelineArgs, as_json: bool) -> Outcome {
    let place = Place::open(args)?;
    let versions = place.versions()?;
    let broker = open_existing(&place.plan.broker, "driftline-versions").ok();
    let committed = broker.map(|broker| place.committed(broker.as_ref(), &versions)).transpose()?;
    let mut rows = Vec::new();
    for version in &versions.versions {
        let role = match version.number {
            _ if version.dropped_at.is_some() => "dropped",
            number if number == versions.serving => "serving",
            number if Some(number) == versions.previous => "previous",
            _ => "beside",
        };
        let mut behind = BTreeMap::new();
        if version.dropped_at.is_none()
            && let Some(committed) = &committed
        {
            let next = place.checkpointed(version)?;
            for (at, committed) in committed {
                let next = next.get(at).copied().unwrap_or(NextOffset(0));
                *behind.entry(at.topic.to_string()).or_insert(0) += (committed.0 - next.0).max(0);
            }
        }
        rows.push(json!({
            "number": version.number, "role": role, "definition": version.definition,
            "windows": version.windows,
            "is_pipeline_toml": version.is(&place.definition()),
            "created_at": version.created_at, "served_from": version.served_from, "served_to": version.served_to,
            "dropped_at": version.dropped_at,
            "checkpoints_behind": committed.as_ref().map(|_| json!(behind)),
        }));
    }
    let mut out = std::io::stdout().lock();
    if as_json {
        let text = json!({ "pipeline": place.plan.name, "serving": versions.serving, "epoch": versions.epoch,
            "changed_at": versions.at, "action": versions.action, "versions": rows });
        return printed(writeln!(out, "{}", serde_json::to_string_pretty(&text).map_err(Failure::failed)?));
    }
    let mut table =
        format!("{:<8} {:<9} {:<18} {:<21} {}\n", "version", "role", "definition", "since", "checkpoints behind");
    for row in &rows {
        let since = row["served_from"].as_i64().or(row["created_at"].as_i64()).map(instant).unwrap_or_default();
        let behind = row["checkpoints_behind"].as_object().map(|topics| {
            let sum: i64 = topics.values().filter_map(Value::as_i64).sum();
            format!("{sum} records")
        });
        let mine = if row["is_pipeline_toml"] == true { " (pipeline.toml)" } else { "" };
        table += &format!(
            "{:<8} {:<9} {:<18} {:<21} {}{mine}\n",
            row["number"].as_u64().unwrap_or_default(),
            row["role"].as_str().unwrap_or_default(),
            row["definition"].as_str().unwrap_or_default(),
            since,
            behind.unwrap_or_default(),
        );
    }
    printed(write!(out, "{table}"))
}
