//! The retrain worker: one request at a time, from the retraining topic to the moved alias, each step on the audit trail.
//!
//! A request is done when its last step ([`Step::is_last`]) is on the audit topic; only then is its offset committed. After a
//! crash the request is taken up again: a candidate that was registered for it is found by its lineage and not registered
//! twice, and a request whose last step is there already is passed over.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::error::ArrowError;
use serde::Serialize;
use serde_json::json;

use super::RetrainingEvent;
use super::audit::{AuditRecord, Step};
use super::gates::{self, Metrics, Verdict};
use super::trainer::{self, Progress, Trainer};
use super::training_set::{LABEL, Labels, TrainingSet};
use crate::broker::{
    Broker, BrokerError, Consumer, ConsumerSettings, NextOffset, Offsets, OutRecord, Producer, SchemaRegistry, StartAt,
    TopicPartition,
};
use crate::config::plan::{LabelsPlan, MonitorWindow, Plan, RetrainingPlan, ScorePlan};
use crate::model::{Bundle, ModelError, Registry, SessionOptions, Version};
use crate::runtime::backoff::Backoff;
use crate::runtime::shutdown::Stop;
use crate::runtime::{clock, failpoint};
use crate::score::Scorer;
use crate::source::SourceError;
use crate::store::{OfflineError, OfflineStore};

/// How long a poll waits; also how soon a stop is noticed while something else goes on.
const BREATH: Duration = Duration::from_millis(100);
/// Time between two looks at the labels topic.
const LOOK: Duration = Duration::from_millis(500);
/// Share of the labelled rows since the shift that are held out for the gates: the latest ones.
const HELD_OUT: f64 = 0.3;
/// Fewest rows that gates are judged on.
const FEWEST_HELD_OUT: usize = 50;
/// Times that one row is scored to measure the candidate's latency.
const LATENCY_RUNS: usize = 200;

/// What can go wrong in a retraining.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RetrainError {
    /// The pipeline lacks what retraining needs.
    #[error("retraining needs [{0}] in pipeline.toml")]
    Missing(&'static str),
    /// The log.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The offline files.
    #[error(transparent)]
    Offline(#[from] OfflineError),
    /// The labels.
    #[error(transparent)]
    Labels(#[from] SourceError),
    /// The registry or a model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The training command.
    #[error("training command '{command}': {reason}")]
    Command {
        /// Command line.
        command: String,
        /// What happened.
        reason: String,
    },
    /// What the training command left is no bundle for this pipeline.
    #[error("the trained bundle cannot be used: {0}")]
    Bundle(String),
    /// A file of the work folder.
    #[error("{path}: {source}; check the folder and the free space")]
    File {
        /// File.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// Columns.
    #[error("training set: {0}")]
    Columns(#[from] ArrowError),
}

impl RetrainError {
    /// True where the request itself is not to blame: the worker waits and takes it up again.
    fn is_retriable(&self) -> bool {
        match self {
            Self::Broker(e) => e.is_retriable(),
            Self::Offline(e) => e.is_retriable(),
            Self::Model(e) => e.is_retriable(),
            _ => false,
        }
    }
}

/// A step, for who watches.
pub struct RetrainObservation<'a> {
    /// The request.
    pub event: &'a RetrainingEvent,
    /// As on the audit topic.
    pub record: &'a AuditRecord,
}

/// What a training command finds in the file named by `DRIFTLINE_REQUEST`.
#[derive(Debug, Serialize)]
struct Request<'a> {
    event: &'a RetrainingEvent,
    model: &'a str,
    definition: &'a str,
    parent_version: Option<String>,
    task: &'static str,
    keys: Vec<&'a str>,
    features: &'a [String],
    label: &'static str,
    training_set: &'a Path,
    output: &'a Path,
    /// Rows with event time (ms) at or after this are held out.
    holdout_from: i64,
    /// The reference profile describes the rows from this event time (ms) on.
    reference_from: i64,
    /// Rows of the monitor's windows.
    window_rows: u64,
    seed: u64,
    horizon_ms: u64,
}

/// See the module.
pub struct RetrainWorker {
    plan: Arc<Plan>,
    broker: Arc<dyn Broker>,
    registry: Arc<dyn Registry>,
    offline: Arc<OfflineStore>,
    schemas: Option<Arc<SchemaRegistry>>,
}

/// Why a request is left unfinished.
enum Pause {
    /// A stop was asked for, the partition went to another worker, or outcomes are missing at the end of a run to the end:
    /// somebody takes it up again.
    Left,
    Error(RetrainError),
}

impl<E: Into<RetrainError>> From<E> for Pause {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

/// Connections of a running worker.
struct Run<'a> {
    worker: &'a RetrainWorker,
    score: &'a ScorePlan,
    retraining: &'a RetrainingPlan,
    labels: &'a LabelsPlan,
    consumer: Box<dyn Consumer>,
    producer: Box<dyn Producer>,
    stop: &'a Stop,
    /// What is there is to be finished, and nothing more is to be waited for.
    drain: &'a Stop,
    observer: &'a dyn Fn(RetrainObservation<'_>),
}

impl RetrainWorker {
    /// A worker for a pipeline.
    ///
    /// # Errors
    /// A pipeline without scoring, labels or retraining.
    pub fn new(
        plan: Arc<Plan>,
        broker: Arc<dyn Broker>,
        registry: Arc<dyn Registry>,
        offline: Arc<OfflineStore>,
        schemas: Option<Arc<SchemaRegistry>>,
    ) -> Result<Self, RetrainError> {
        for (there, section) in [
            (plan.score.is_some(), "score"),
            (plan.labels.is_some(), "labels"),
            (plan.retraining.is_some(), "retraining"),
        ] {
            if !there {
                return Err(RetrainError::Missing(section));
            }
        }
        Ok(Self { plan, broker, registry, offline, schemas })
    }

    /// Works until a stop is asked for, or until `drain` is and nothing is left to do.
    ///
    /// # Errors
    /// What cannot be mended by waiting; a request that fails is recorded and is none.
    pub fn run(
        &self,
        stop: &Stop,
        drain: &Stop,
        observer: &dyn Fn(RetrainObservation<'_>),
    ) -> Result<(), RetrainError> {
        let score = self.plan.score.as_ref().ok_or(RetrainError::Missing("score"))?;
        let retraining = self.plan.retraining.as_ref().ok_or(RetrainError::Missing("retraining"))?;
        let labels = self.plan.labels.as_ref().ok_or(RetrainError::Missing("labels"))?;
        let consumer = self.broker.consumer(ConsumerSettings {
            group: self.plan.group("retrain"),
            topics: vec![Arc::clone(&retraining.topic)],
            client_id: format!("{}-retrain", self.plan.name),
            start: Box::new(|_| StartAt::Committed),
            static_member: Some(format!("{}-retrain", self.plan.name)),
        })?;
        let producer = self.broker.producer(None)?;
        Run { worker: self, score, retraining, labels, consumer, producer, stop, drain, observer }.work()
    }

    /// The last step of each finished request, from the audit topic.
    fn finished(&self) -> Result<BTreeMap<String, Step>, RetrainError> {
        let mut finished = BTreeMap::new();
        let Some(retraining) = &self.plan.retraining else { return Ok(finished) };
        let Some(info) = self.broker.topic(&retraining.audit_topic)? else { return Ok(finished) };
        for (partition, (earliest, end)) in info.partitions.iter().enumerate() {
            let at =
                TopicPartition::new(Arc::clone(&retraining.audit_topic), i32::try_from(partition).unwrap_or(i32::MAX));
            let mut next = *earliest;
            while next < *end {
                let (records, after) = self.broker.read(&at, next, 10_000, Duration::from_secs(1))?;
                for row in 0..records.len() {
                    // Anything else on the topic is not ours to judge.
                    let record = records.values.get(row).and_then(|v| serde_json::from_slice::<AuditRecord>(v).ok());
                    if let Some(record) = record.filter(|r| r.step.is_last()) {
                        finished.insert(record.retraining_id, record.step);
                    }
                }
                if after == next {
                    break;
                }
                next = after;
            }
        }
        Ok(finished)
    }

    /// The version that was registered for a request.
    fn registered_for(&self, model: &str, id: &str) -> Result<Option<Version>, RetrainError> {
        for version in self.registry.versions(model)?.into_iter().rev() {
            // A version that does not load is not one that this worker registered.
            let lineage = self.registry.load(model, &version).ok().map(|b| b.manifest.lineage);
            if lineage.as_ref().and_then(|l| l.get("retraining_event_id")).and_then(|v| v.as_str()) == Some(id) {
                return Ok(Some(version));
            }
        }
        Ok(None)
    }
}

impl Run<'_> {
    fn work(mut self) -> Result<(), RetrainError> {
        let mut backoff = Backoff::for_server();
        loop {
            if self.stop.requested() {
                return Ok(());
            }
            let poll = match self.consumer.poll(1, BREATH) {
                Ok(poll) => poll,
                Err(error) if error.is_retriable() => {
                    backoff.wait(self.stop);
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            backoff = Backoff::for_server();
            for records in &poll.records {
                for row in 0..records.len() {
                    let next = NextOffset(records.offsets[row] + 1);
                    let event = records.values.get(row).map(serde_json::from_slice::<RetrainingEvent>);
                    if let Some(Err(error)) = &event {
                        let (at, offset) = (&records.partition, records.offsets[row]);
                        tracing::warn!(%at, offset, "not a retraining event, passed over: {error}");
                    }
                    if let Some(Ok(event)) = event
                        && !self.take_up(&event, &records.partition)?
                    {
                        return Ok(());
                    }
                    self.consumer.commit(&Offsets::from([(records.partition.clone(), next)]))?;
                }
            }
            if self.drain.requested() && poll.is_empty() && self.at_end()? {
                return Ok(());
            }
        }
    }

    fn at_end(&self) -> Result<bool, RetrainError> {
        let Some(info) = self.worker.broker.topic(&self.retraining.topic)? else { return Ok(true) };
        let at =
            |p: usize| TopicPartition::new(Arc::clone(&self.retraining.topic), i32::try_from(p).unwrap_or(i32::MAX));
        Ok((0..info.partitions.len()).all(|p| self.consumer.caught_up(&at(p))))
    }

    /// Works on a request until its last step is recorded. False where a stop came first.
    fn take_up(&mut self, event: &RetrainingEvent, at: &TopicPartition) -> Result<bool, RetrainError> {
        if let Some(step) = self.worker.finished()?.get(&event.id) {
            tracing::info!(id = event.id, step = step.name(), "this retraining is finished already");
            return Ok(true);
        }
        self.consumer.pause(std::slice::from_ref(at))?;
        self.record(
            event,
            Step::Requested,
            format!("{} asked for it: {}", event.cause, event.policy),
            json!({ "drifted": event.drifted, "since": event.since }),
        )?;
        let mut backoff = Backoff::for_server();
        let finished = loop {
            match self.retrain(event) {
                Ok(()) => break true,
                Err(Pause::Left) => break false,
                Err(Pause::Error(error)) if error.is_retriable() => {
                    if backoff.attempts() == 0 {
                        tracing::warn!(id = event.id, "the retraining waits: {error}");
                    }
                    if backoff.wait(self.stop) || !self.breathe()? {
                        break false;
                    }
                }
                Err(Pause::Error(error)) => {
                    self.record(event, Step::Failed, error.to_string(), serde_json::Value::Null)?;
                    break true;
                }
            }
        };
        self.consumer.resume(std::slice::from_ref(at))?;
        Ok(finished)
    }

    /// Lets the group know that this member lives. False where the work is to be left.
    fn breathe(&mut self) -> Result<bool, BrokerError> {
        match self.consumer.poll(1, BREATH) {
            Ok(poll) => Ok(poll.revoked.is_empty() && !self.stop.requested()),
            Err(error) if error.is_retriable() => Ok(!self.stop.wait(BREATH)),
            Err(error) => Err(error),
        }
    }

    fn retrain(&mut self, event: &RetrainingEvent) -> Result<(), Pause> {
        let model = self.score.model.clone();
        let version = match self.worker.registered_for(&model, &event.id)? {
            Some(version) => version,
            None => {
                let Some((folder, verdict)) = self.candidate(event)? else { return Ok(()) };
                failpoint::hit("retrain.before_register");
                let version = self.worker.registry.register(&model, &folder)?;
                failpoint::hit("retrain.after_register");
                self.record(
                    event,
                    Step::Registered,
                    format!("version {version} of {model}"),
                    json!({ "version": version.to_string(), "metrics": verdict.candidate }),
                )?;
                version
            }
        };
        self.worker.registry.set_alias(&model, "staging", &version)?;
        failpoint::hit("retrain.before_promote");
        self.worker.registry.set_alias(&model, &self.score.alias, &version)?;
        failpoint::hit("retrain.after_promote");
        let detail = format!("{model} {} is version {version} now", self.score.alias);
        Ok(self.record(
            event,
            Step::Promoted,
            detail,
            json!({ "version": version.to_string(), "alias": self.score.alias, "previous": event.model_version }),
        )?)
    }

    /// Trains a candidate and judges it: its folder, or nothing where it was turned down.
    fn candidate(&mut self, event: &RetrainingEvent) -> Result<Option<(PathBuf, Verdict)>, Pause> {
        let set = self.training_set(event)?;
        let folder = self.folder(event)?;
        let file = folder.join("training.arrow");
        let (output, request_file, log) =
            (folder.join("bundle"), folder.join("request.json"), folder.join("train.log"));
        let fresh = set.rows_since(event.since);
        let labelled = set.rows.num_rows();
        let held_out = ((fresh as f64 * HELD_OUT) as usize).clamp(FEWEST_HELD_OUT.min(labelled / 2), labelled);
        let holdout_from = set.times().get(labelled - held_out).copied().unwrap_or(i64::MAX);
        set.write(&file)?;
        let facts = json!({ "rows": labelled, "rows_since_shift": fresh, "held_out": set.rows_since(holdout_from), "seen": set.seen, "unlabelled": set.unlabelled, "file": file });
        self.record(
            event,
            Step::TrainingSetBuilt,
            format!("{labelled} labelled rows, {fresh} of them since the shift"),
            facts,
        )?;

        let plan = &self.worker.plan;
        let request = Request {
            event,
            model: &self.score.model,
            definition: &plan.definition,
            parent_version: self.worker.registry.resolve(&self.score.model, &self.score.alias)?.map(|v| v.to_string()),
            task: "binary_classification",
            keys: plan.entity.keys.iter().map(|k| k.name.as_ref()).collect(),
            features: &self.score.features,
            label: LABEL,
            training_set: &file,
            output: &output,
            holdout_from,
            reference_from: if fresh > 0 { event.since } else { i64::MIN },
            window_rows: match plan.monitor.as_ref().map(|m| m.window) {
                Some(MonitorWindow::Rows(rows)) => rows,
                _ => 1000,
            },
            seed: 7,
            horizon_ms: u64::try_from(self.labels.horizon.as_millis()).unwrap_or(u64::MAX),
        };
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| RetrainError::File { path, source }
        };
        if output.exists() {
            std::fs::remove_dir_all(&output).map_err(io(&output))?;
        }
        std::fs::create_dir_all(&output).map_err(io(&output))?;
        let text = serde_json::to_vec_pretty(&request).map_err(|e| RetrainError::Bundle(e.to_string()))?;
        std::fs::write(&request_file, text).map_err(io(&request_file))?;
        let variables = [
            (trainer::TRAINING_SET, file.as_path()),
            (trainer::OUTPUT, output.as_path()),
            (trainer::REQUEST, request_file.as_path()),
        ];
        let started = clock::monotonic();
        let mut trainer = Trainer::start(&self.retraining.command, &variables, &log, self.retraining.timeout)?;
        while let Progress::Running = trainer.poll()? {
            if !self.breathe()? {
                return Err(Pause::Left);
            }
        }
        let took = started.elapsed();
        let bundle = Bundle::load(&output).map_err(|e| RetrainError::Bundle(e.to_string()))?;
        bundle.check_against(plan).map_err(|e| RetrainError::Bundle(e.to_string()))?;
        let facts = json!({ "seconds": took.as_secs_f64(), "metrics": bundle.manifest.metrics, "log": log });
        self.record(event, Step::Trained, format!("a candidate after {:.1} s", took.as_secs_f64()), facts)?;

        let verdict = self.judge(&bundle, &set, labelled - held_out)?;
        let facts = json!({ "candidate": verdict.candidate, "champion": verdict.champion, "reasons": verdict.reasons });
        if verdict.passed {
            self.record(event, Step::GatesPassed, verdict.reasons.join("; "), facts)?;
            Ok(Some((output, verdict)))
        } else {
            self.record(event, Step::GatesFailed, verdict.reasons.join("; "), facts)?;
            self.record(event, Step::Rejected, "the champion stays".into(), serde_json::Value::Null)?;
            Ok(None)
        }
    }

    /// Waits until enough outcomes since the shift are known, then joins.
    fn training_set(&mut self, event: &RetrainingEvent) -> Result<TrainingSet, Pause> {
        let lookback = i64::try_from(self.retraining.lookback.as_millis()).unwrap_or(i64::MAX);
        let mut labels = Labels::new(&self.worker.plan, self.labels, self.worker.schemas.clone())?;
        let mut told = false;
        loop {
            let last_look = self.drain.requested();
            labels.refresh(self.worker.broker.as_ref(), event.train_from)?;
            let from = event.train_from.max(labels.newest().unwrap_or(event.asked_at).saturating_sub(lookback));
            // Joining reads all files, so it waits until labels alone could be enough.
            if labels.since(event.since) >= self.retraining.fresh_labels {
                let set =
                    TrainingSet::join(&self.worker.plan, &self.worker.offline, &labels, &self.score.features, from)?;
                if set.rows_since(event.since) >= self.retraining.fresh_labels {
                    return Ok(set);
                }
            }
            if !told {
                told = true;
                let detail = format!("{} labelled rows since the shift are needed", self.retraining.fresh_labels);
                self.record(
                    event,
                    Step::WaitingForLabels,
                    detail,
                    json!({ "labels_since_shift": labels.since(event.since) }),
                )?;
            }
            if last_look {
                tracing::info!(id = event.id, "the retraining is left waiting for outcomes; the next run takes it up");
                return Err(Pause::Left);
            }
            let until = clock::monotonic() + LOOK;
            while clock::monotonic() < until {
                if !self.breathe()? {
                    return Err(Pause::Left);
                }
            }
        }
    }

    fn judge(&self, bundle: &Bundle, set: &TrainingSet, first: usize) -> Result<Verdict, RetrainError> {
        let rows = set.rows.slice(first, set.rows.num_rows() - first);
        let labels = set.labels(first);
        let options = SessionOptions::of(self.score)?;
        let mut candidate = Scorer::of_bundle(bundle, Version::from("candidate"), &options)?;
        let metrics = |scorer: &mut Scorer| -> Result<Option<Metrics>, RetrainError> {
            let scores = scorer.score(&rows)?;
            let good: Vec<usize> = (0..scores.scores.len()).filter(|row| scores.scores[*row].is_finite()).collect();
            Ok(Metrics::of(
                &good.iter().map(|r| scores.scores[*r]).collect::<Vec<_>>(),
                &good.iter().map(|r| labels[*r]).collect::<Vec<_>>(),
            ))
        };
        let found = metrics(&mut candidate)?.ok_or_else(|| RetrainError::Bundle("it scores no held-out row".into()))?;
        let champion = match self.worker.registry.resolve(&self.score.model, &self.score.alias)? {
            Some(version) => {
                let champion = self.worker.registry.load(&self.score.model, &version)?;
                metrics(&mut Scorer::of_bundle(&champion, version, &options)?)?
            }
            None => None,
        };
        let latency = match self.retraining.gates.max_latency {
            Some(_) => Some(p99_of_one_row(&mut candidate, &rows)?),
            None => None,
        };
        Ok(gates::judge(&self.retraining.gates, found, champion, latency))
    }

    /// Folder of a request's files: beside the offline files, or in the system's temporary folder.
    fn folder(&self, event: &RetrainingEvent) -> Result<PathBuf, RetrainError> {
        let base = self.worker.offline.folder().map_or_else(|| std::env::temp_dir().join("driftline"), Path::to_owned);
        let name: String =
            event.id.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect();
        let folder = base.join("retraining").join(name);
        std::fs::create_dir_all(&folder).map_err(|source| RetrainError::File { path: folder.clone(), source })?;
        std::path::absolute(&folder).map_err(|source| RetrainError::File { path: folder, source })
    }

    fn record(
        &mut self,
        event: &RetrainingEvent,
        step: Step,
        detail: String,
        facts: serde_json::Value,
    ) -> Result<(), RetrainError> {
        let record = AuditRecord {
            at: clock::now_ms(),
            retraining_id: event.id.clone(),
            pipeline: event.pipeline.clone(),
            model: event.model.clone(),
            step,
            detail,
            facts,
        };
        let value = serde_json::to_vec(&record).map_err(|e| RetrainError::Bundle(e.to_string()))?;
        self.producer.send(OutRecord {
            topic: &self.retraining.audit_topic,
            key: Some(event.id.as_bytes()),
            value: Some(&value),
            ..OutRecord::default()
        })?;
        self.producer.commit(&Offsets::new(), None)?;
        (self.observer)(RetrainObservation { event, record: &record });
        Ok(())
    }
}

fn p99_of_one_row(scorer: &mut Scorer, rows: &arrow::array::RecordBatch) -> Result<Duration, RetrainError> {
    let mut times = Vec::with_capacity(LATENCY_RUNS);
    for run in 0..LATENCY_RUNS {
        let row = rows.slice(run % rows.num_rows().max(1), 1);
        let started = clock::monotonic();
        scorer.score(&row)?;
        times.push(started.elapsed());
    }
    times.sort_unstable();
    Ok(times[LATENCY_RUNS * 99 / 100])
}
