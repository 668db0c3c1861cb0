//! What all threads of a run share.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::RunError;
use super::instance::Instance;
use super::role;
use crate::broker::{self, Broker, BrokerError, Offsets, OutRecord, SchemaRegistry, TopicPartition, TopicSettings};
use crate::config::plan::{BrokerPlan, OnlinePlan, Plan, RekeyPlan, SourcePlan};
use crate::config::units;
use crate::drift::IncidentState;
use crate::drift::worker::DriftObservation;
use crate::model::{self, ModelEvent, ModelSlot, ModelWatch, Registry};
use crate::retrain::RetrainingEvent;
use crate::retrain::audit::Step;
use crate::retrain::worker::RetrainObservation;
use crate::runtime::backoff::Backoff;
use crate::runtime::clock;
use crate::runtime::shutdown::Stop;
use crate::score::Scorer;
use crate::store::{self, DiskStates, OfflineStore, OnlineStore, Role};
use crate::telemetry::board::{Board, Kind, Milestone};
use crate::telemetry::metrics as names;
use crate::window::{ColdStore, Engine};

/// Which stages run in this process. Features and score together are fused: rows reach the model without passing a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stages {
    /// Events to feature rows.
    pub features: bool,
    /// Feature rows to predictions.
    pub score: bool,
    /// Predictions to drift events.
    pub drift: bool,
    /// Retraining events to model versions.
    pub retrain: bool,
}

impl Stages {
    /// All that the plan defines.
    pub fn all(plan: &Plan) -> Self {
        Self {
            features: true,
            score: plan.score.is_some(),
            drift: plan.monitor.is_some(),
            retrain: plan.retraining.is_some(),
        }
    }

    /// Short name for transactional ids and client ids.
    fn name(self) -> &'static str {
        match (self.features, self.score, self.drift) {
            (true, true, _) => "run",
            (true, false, _) => "features",
            (_, true, _) => "score",
            (_, _, true) => "drift",
            _ => "retrain",
        }
    }
}

/// How to run.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Worker threads; `None` chooses.
    pub workers: Option<usize>,
    /// Stop once everything that is there now has been processed.
    pub until_end: bool,
    /// Start over from the beginning of the topics.
    pub rebuild: bool,
    /// A version that follows writes its output to topics of its own.
    pub shadow_topics: bool,
    /// Name of this process; `None` takes a free slot of the host.
    pub instance: Option<String>,
}

/// The outside world of a run.
#[derive(Clone)]
pub struct Wiring {
    /// The log.
    pub broker: Arc<dyn Broker>,
    /// What this process may do with its definition.
    pub role: Role,
    /// The online store, where features are computed by the version that serves.
    pub online: Option<Arc<dyn OnlineStore>>,
    /// The online store, where features of other entities are read from it.
    pub lookups: Option<Arc<dyn OnlineStore>>,
    /// The offline store.
    pub offline: Arc<OfflineStore>,
    /// The model registry.
    pub registry: Arc<dyn Registry>,
    /// The schema registry, where one is configured.
    pub schemas: Option<Arc<SchemaRegistry>>,
    /// The same for each of the plan's other entities, which have stores of their own.
    pub others: Vec<Wiring>,
}

/// What the plans of all entities share.
struct Shared {
    broker: Arc<dyn Broker>,
    registry: Arc<dyn Registry>,
    schemas: Option<Arc<SchemaRegistry>>,
}

impl Wiring {
    /// Opens everything that the stages need. A broker or an online store that is away is waited for, each for at most
    /// `patience`.
    ///
    /// # Errors
    /// What could not be opened, where, and what to do; [`RunError::Interrupted`] where a stop was asked for while waiting.
    pub fn open(
        plan: &Plan,
        stages: Stages,
        runtime: &Handle,
        stop: &Stop,
        patience: Duration,
    ) -> Result<Self, RunError> {
        let client_id = format!("driftline-{}", plan.name);
        let open_broker = || broker::open(&plan.broker, &client_id);
        let broker = wait_for("broker", stop, patience, open_broker, BrokerError::is_retriable)?;
        let schemas = match &plan.broker {
            BrokerPlan::Kafka { schema_registry: Some(url), .. } => {
                Some(Arc::new(SchemaRegistry::new(url, runtime.clone())?))
            }
            _ => None,
        };
        let registry = model::open_registry(&plan.registry)?;
        let shared = Shared { broker, registry, schemas };
        let of = |plan: &Plan| Self::of(plan, stages, &shared, runtime, stop, patience);
        let others = plan.others.iter().filter(|_| stages.features).map(|other| of(other)).collect::<Result<_, _>>()?;
        Ok(Self { others, ..of(plan)? })
    }

    /// The stores of one entity's plan, and what all share.
    fn of(
        plan: &Plan,
        stages: Stages,
        shared: &Shared,
        runtime: &Handle,
        stop: &Stop,
        patience: Duration,
    ) -> Result<Self, RunError> {
        let offline = OfflineStore::open(plan, runtime.clone())?;
        let role = offline.role()?;
        let (mut online, mut lookups) = (None, None);
        let kept = !matches!(plan.online, OnlinePlan::Off);
        if stages.features && kept && !(role.is_following() && plan.lookups.is_empty()) {
            let store = store::open_online_at(plan, role.epoch(), runtime.clone())?;
            wait_for("online store", stop, patience, || store.ping(), store::OnlineError::is_retriable)?;
            lookups = (!plan.lookups.is_empty()).then(|| Arc::clone(&store));
            online = (!role.is_following()).then_some(store);
        }
        Ok(Self {
            broker: Arc::clone(&shared.broker),
            role,
            online,
            lookups,
            offline: Arc::new(offline),
            registry: Arc::clone(&shared.registry),
            schemas: shared.schemas.clone(),
            others: Vec::new(),
        })
    }
}

/// Tries until it works, for at most `patience`. Says at once, and once, what it waits for.
fn wait_for<T, E: std::fmt::Display + Into<RunError>>(
    what: &'static str,
    stop: &Stop,
    patience: Duration,
    mut attempt: impl FnMut() -> Result<T, E>,
    retriable: impl Fn(&E) -> bool,
) -> Result<T, RunError> {
    let deadline = clock::monotonic() + patience;
    let mut backoff = Backoff::for_server();
    loop {
        match attempt() {
            Ok(found) => {
                if backoff.attempts() > 0 {
                    tracing::info!("the {what} answers now");
                }
                return Ok(found);
            }
            Err(error) if retriable(&error) && clock::monotonic() < deadline => {
                if backoff.attempts() == 0 {
                    tracing::warn!("waiting for at most {}: {error}", units::label(patience));
                }
                if backoff.wait(stop) {
                    return Err(RunError::Interrupted { what, reason: error.to_string() });
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// What the re-keyers of a process wrote.
#[derive(Default)]
pub(super) struct Rekeyed {
    /// They have committed something. The last record of each partition is then a mark, perhaps with the marker of its
    /// transaction behind it.
    pub wrote: AtomicBool,
    /// Once they have ended: the ends of their topics' partitions.
    pub ends: Mutex<Option<Offsets>>,
}

/// Where a task's states go that are not in memory, and the bytes that may be.
pub(super) type ColdStates = (Box<dyn ColdStore>, usize);

/// See the module.
pub struct Context {
    /// The pipeline.
    pub plan: Arc<Plan>,
    /// Stages of this process.
    pub stages: Stages,
    /// The outside world.
    pub wiring: Wiring,
    /// The feature stage of the pipeline's other entities.
    pub others: Vec<Arc<Context>>,
    /// Numbers and happenings.
    pub board: Arc<Board>,
    /// Ends everything in order.
    pub stop: Stop,
    /// How to run.
    pub options: RunOptions,
    /// Worker threads.
    pub workers: usize,
    pub(super) engine: Arc<Engine>,
    pub(super) models: Mutex<Option<ModelWatch>>,
    /// Model sessions of the workers that have not taken theirs yet.
    slots: Mutex<Vec<Option<ModelSlot>>>,
    pub(super) instance: Instance,
    /// Stages as asked for, by their short name.
    stage_name: &'static str,
    /// The version's role is another by now.
    pub(super) new_role: AtomicBool,
    /// Partitions whose state has been started over.
    pub(super) rebuilt: Mutex<BTreeSet<i32>>,
    /// Partitions owned by the workers, for `/ready`.
    pub(super) owned: Mutex<BTreeMap<usize, Vec<i32>>>,
    /// With `--until-end`: partitions that a worker of this process has read to their ends, committed, and kept in a checkpoint.
    pub(super) finished: Mutex<BTreeSet<i32>>,
    /// What the re-keyers of this process wrote. Shared by all entities' contexts.
    pub(super) rekeyed: Arc<Rekeyed>,
    /// Asks the monitor to end once it has read all predictions.
    pub(super) drain_drift: Stop,
    /// Asks the retrain worker to end once it has read all retraining events.
    pub(super) drain_retrain: Stop,
}

impl Context {
    /// Brings the plan and the outside world together; loads the model where this process scores.
    ///
    /// # Errors
    /// What does not fit: the model's signature, a changed definition, sources with different numbers of partitions.
    pub fn new(
        plan: Arc<Plan>,
        mut stages: Stages,
        mut wiring: Wiring,
        board: Arc<Board>,
        options: RunOptions,
        stop: Stop,
    ) -> Result<Arc<Self>, RunError> {
        let engine = Engine::new(&plan)?;
        let stage_name = stages.name();
        if stages.features {
            let found = role::begin(&plan, &wiring.offline, &options)?;
            // Whatever was opened, was opened for the role of that time.
            if found.is_following() != wiring.role.is_following() || found.epoch() != wiring.role.epoch() {
                return Err(RunError::Definition(
                    "another version of the pipeline began to serve just now; start again".into(),
                ));
            }
            wiring.role = found;
        }
        // Rows of another definition would all be dead letters.
        if stages.score
            && matches!(wiring.role, Role::Unknown { .. })
            && let Some(versions) = wiring.offline.versions()?
        {
            return Err(role::no_version(&plan, &versions));
        }
        if stages.features && wiring.role.is_following() {
            let score = stages.score && options.shadow_topics;
            stages = Stages { features: true, score, drift: false, retrain: false };
        }
        let instance = match &options.instance {
            Some(name) => Instance::named(name),
            None => Instance::acquire(&plan.name, stage_name).map_err(|e| {
                RunError::Definition(format!("no instance name could be taken: {e}; give one with --instance"))
            })?,
        };
        let rekeyed = Arc::default();
        let mut others = Vec::new();
        for (other, wiring) in plan.others.iter().zip(std::mem::take(&mut wiring.others)) {
            let stages = Stages { features: true, score: false, drift: false, retrain: false };
            let board = Board::new(other.sources.iter().map(|source| source.name.as_ref()));
            let context = Self::new(Arc::clone(other), stages, wiring, board, options.clone(), stop.clone())?;
            others.push(context);
        }
        for other in &mut others {
            let other = Arc::get_mut(other).expect("nobody else has it yet");
            other.rekeyed = Arc::clone(&rekeyed);
        }
        let mut context = Self {
            plan,
            stages,
            wiring,
            others,
            rekeyed,
            board,
            stop,
            workers: 1,
            options,
            engine,
            models: Mutex::new(None),
            slots: Mutex::default(),
            instance,
            stage_name,
            new_role: AtomicBool::new(false),
            rebuilt: Mutex::default(),
            owned: Mutex::default(),
            finished: Mutex::default(),
            drain_drift: Stop::new(),
            drain_retrain: Stop::new(),
        };
        if stages.features || stages.score {
            context.workers = context.choose_workers()?;
        }
        if stages.score || stages.retrain {
            model::ensure_initial(context.wiring.registry.as_ref(), &context.plan)?;
        }
        if stages.score {
            let board = Arc::clone(&context.board);
            let registry = Arc::clone(&context.wiring.registry);
            let (watch, slots) =
                ModelWatch::start(&context.plan, registry, context.workers, move |event| show_model(&board, event))?;
            context.models = Mutex::new(Some(watch));
            context.slots = Mutex::new(slots.into_iter().map(Some).collect());
        }
        Ok(Arc::new(context))
    }

    /// The scorer of a worker; `None` where this process does not score. Can be taken once.
    pub(super) fn scorer(&self, worker: usize) -> Option<Scorer> {
        let slot = self.slots.lock().get_mut(worker).and_then(Option::take)?;
        self.plan.score.as_ref().map(|score| Scorer::new(score, slot))
    }

    /// True where the task of a partition is to start over: `--rebuild`, once a partition.
    pub(super) fn is_rebuilt(&self, partition: i32) -> bool {
        self.options.rebuild && !self.rebuilt.lock().contains(&partition)
    }

    fn choose_workers(&self) -> Result<usize, RunError> {
        let input = if self.stages.features { self.source_topics()[0].to_string() } else { self.features_topic() };
        let topic = self.hold("broker", BrokerError::is_retriable, || self.wiring.broker.topic(&input))?;
        let partitions = topic.map_or(usize::MAX, |t| t.partitions.len().max(1));
        let wanted = match (&self.plan.broker, self.options.workers) {
            (_, Some(n)) => n,
            (BrokerPlan::Embedded { .. }, None) => 1,
            (BrokerPlan::Kafka { .. }, None) => std::thread::available_parallelism().map_or(1, usize::from),
        };
        Ok(wanted.min(partitions).max(1))
    }

    /// Workers that key a source anew: as many as read it, and no more than it has partitions.
    ///
    /// # Errors
    /// The log's.
    pub(super) fn rekeyers(&self, plan: &RekeyPlan) -> Result<usize, RunError> {
        let partitions = self.wiring.broker.topic(&plan.from.topic)?.map_or(1, |topic| topic.partitions.len());
        Ok(self.workers.min(partitions).max(1))
    }

    /// Topics of the sources, in the plan's order.
    pub(super) fn source_topics(&self) -> Vec<Arc<str>> {
        self.plan.sources.iter().map(|s| Arc::clone(&s.topic)).collect()
    }

    /// Transactional id of a thread. The same whether the version serves or follows, so that what a killed run has left
    /// open is rolled back by the next one in either role; another for another version.
    pub(super) fn transactional_id(&self, thread: &str) -> String {
        let id = format!("{}-{}-{}-{thread}", self.plan.name, self.stage_name, self.instance.name());
        if self.wiring.role.version() > 1 { format!("{id}-v{}", self.wiring.role.version()) } else { id }
    }

    /// Checks that the inputs are there and fit together, and creates the outputs that are not there yet. On the embedded
    /// log the inputs are created too, since nobody else can.
    ///
    /// # Errors
    /// A source topic that does not exist, or sources that do not fit together.
    pub fn prepare_topics(&self) -> Result<(), RunError> {
        let broker = &self.wiring.broker;
        let (embedded, default_partitions) = match &self.plan.broker {
            BrokerPlan::Embedded { partitions, .. } => (true, *partitions),
            BrokerPlan::Kafka { partitions, .. } => (false, *partitions),
        };
        let log = |partitions| TopicSettings { partitions, compacted: false, retention_ms: None };
        let mut partitions = default_partitions;
        if self.stages.features {
            let mut found: Vec<(String, usize)> = Vec::new();
            for (topic, source) in self.source_topics().iter().zip(&self.plan.sources) {
                let read = source.rekeyed.as_ref().map_or(topic, |plan| &plan.from.topic);
                if embedded {
                    let compacted = source.table.is_some();
                    broker.create_topic(read, &TopicSettings { compacted, ..log(default_partitions) })?;
                }
                let no_topic = || BrokerError::NoSuchTopic { topic: read.to_string(), broker: broker.describe() };
                let mut partitions = broker.topic(read)?.ok_or_else(no_topic)?.partitions.len();
                if let Some(plan) = &source.rekeyed {
                    partitions = self.prepare_rekeyed(source, plan, partitions)?;
                }
                found.push((topic.to_string(), partitions));
            }
            if found.iter().any(|(_, n)| *n != found[0].1) {
                let list: Vec<_> = found.iter().map(|(t, n)| format!("{t} has {n}")).collect();
                return Err(RunError::Definition(format!(
                    "the sources and tables of a pipeline must have the same number of partitions, because one task reads the same partition of all of them, but {}; recreate the smaller ones",
                    list.join(", ")
                )));
            }
            partitions = u32::try_from(found[0].1).unwrap_or(default_partitions);
            if self.is_silent() {
                return Ok(());
            }
            for windows in &self.plan.windows {
                broker.create_topic(&self.out_topic(&windows.topic), &log(partitions))?;
            }
            if !self.stages.score && self.plan.score.is_some() {
                broker.create_topic(&self.features_topic(), &log(partitions))?;
            }
        } else if let Some(info) = broker.topic(&self.features_topic())? {
            partitions = u32::try_from(info.partitions.len()).unwrap_or(default_partitions);
        }
        broker.create_topic(&self.out_topic(&self.plan.dead_letter_topic()), &log(1))?;
        if !self.stages.features && self.stages.score {
            broker.create_topic(&self.features_topic(), &log(partitions))?;
        }
        if let Some(score) = &self.plan.score {
            broker.create_topic(&self.out_topic(&score.topic), &log(partitions))?;
        }
        if self.is_following() {
            return Ok(());
        }
        if let Some(labels) = &self.plan.labels
            && embedded
        {
            broker.create_topic(&labels.topic, &log(default_partitions))?;
        }
        if let Some(monitor) = &self.plan.monitor {
            broker.create_topic(&monitor.topic, &log(1))?;
            broker.create_topic(
                &monitor.state_topic,
                &TopicSettings { partitions: 1, compacted: true, retention_ms: None },
            )?;
        }
        if let Some(retraining) = &self.plan.retraining {
            broker.create_topic(&retraining.topic, &log(1))?;
            broker.create_topic(&retraining.audit_topic, &log(1))?;
        }
        Ok(())
    }

    /// Creates the topic of a source that is keyed anew, or checks the one that is there. Returns its number of partitions.
    fn prepare_rekeyed(&self, source: &SourcePlan, plan: &RekeyPlan, of_source: usize) -> Result<usize, RunError> {
        let (broker, topic) = (&self.wiring.broker, &*source.topic);
        let partitions = plan.partitions.map_or(of_source, |partitions| partitions as usize);
        let settings = TopicSettings {
            partitions: u32::try_from(partitions).unwrap_or(u32::MAX),
            compacted: false,
            retention_ms: plan.retention.map(|retention| i64::try_from(retention.as_millis()).unwrap_or(i64::MAX)),
        };
        broker.create_topic(topic, &settings)?;
        let found = broker.topic(topic)?.map_or(0, |info| info.partitions.len());
        if found != partitions {
            let wanted = match plan.partitions {
                Some(_) => "declared".to_owned(),
                None => format!("what '{}' has", plan.from.topic),
            };
            return Err(RunError::Definition(format!(
                "topic '{topic}' has {found} partitions, and {partitions} are {wanted}: events would change their partition; say partitions = {found} in [rekey], or name a new topic there"
            )));
        }
        self.check_retention(source, plan)?;
        Ok(found)
    }

    /// Checks that the topic of a source that is keyed anew keeps what is written to it.
    fn check_retention(&self, source: &SourcePlan, plan: &RekeyPlan) -> Result<(), RunError> {
        let SourcePlan { name, topic, .. } = source;
        let Some(kept) = self.wiring.broker.retention(topic)? else { return Ok(()) };
        if kept.compacted {
            return Err(RunError::Definition(format!(
                "topic '{topic}' is compacted: it would keep the newest event of each key and lose the others; set cleanup.policy = delete on it, or name another topic in [rekey.{name}]"
            )));
        }
        let wanted = plan.retention;
        let ms = |kept: &i64| Duration::from_millis(kept.unsigned_abs());
        let short =
            kept.ms.as_ref().map(ms).filter(|kept| wanted.is_none_or(|wanted| *kept < wanted)).map(units::label);
        let few = kept.bytes.map(|bytes| format!("{bytes} bytes a partition"));
        if let Some(most) = short.or(few) {
            let wanted = wanted.map_or_else(|| "for ever".to_owned(), |wanted| format!("for {}", units::label(wanted)));
            self.board.say(
                Kind::Warning,
                None,
                format!(
                    "topic '{topic}' keeps {most} of events, which are to be kept {wanted}: older ones, by their timestamps, are lost where they are not read in time, and to --rebuild; set retention.ms and retention.bytes on the topic, or say retention in [rekey.{name}]"
                ),
            );
        }
        Ok(())
    }

    /// Puts a request for retraining on the retraining topic, as the monitor would; returns its id.
    ///
    /// # Errors
    /// A pipeline without retraining, or the log's.
    pub fn ask_for_retraining(&self) -> Result<String, RunError> {
        let (Some(score), Some(retraining)) = (&self.plan.score, &self.plan.retraining) else {
            return Err(RunError::Definition("this pipeline has no [retraining]".into()));
        };
        self.prepare_topics()?;
        let asked_at = clock::now_ms();
        let version =
            self.wiring.registry.resolve(&score.model, &score.alias)?.map(|v| v.to_string()).unwrap_or_default();
        let event = RetrainingEvent {
            id: format!("{}-manual-{asked_at}", self.plan.name),
            pipeline: self.plan.name.clone(),
            definition: self.plan.definition.clone(),
            model: score.model.clone(),
            model_version: version,
            cause: "manual".into(),
            policy: "driftline retrain --now".into(),
            incident_id: None,
            drifted: Vec::new(),
            since: i64::MIN,
            train_from: i64::MIN,
            asked_at,
        };
        let value = serde_json::to_vec(&event).map_err(|e| RunError::Definition(e.to_string()))?;
        let mut producer = self.wiring.broker.producer(None)?;
        producer.send(OutRecord {
            topic: &retraining.topic,
            key: Some(self.plan.name.as_bytes()),
            value: Some(&value),
            ..OutRecord::default()
        })?;
        producer.commit(&Offsets::new(), None)?;
        Ok(event.id)
    }

    /// True once partitions are assigned and, where this process scores, a model is in use.
    pub fn is_ready(&self) -> bool {
        let assigned =
            !(self.stages.features || self.stages.score) || self.owned.lock().values().any(|p| !p.is_empty());
        assigned && (!self.stages.score || self.board.model().is_some())
    }

    /// With `until_end`: lets each stage end once those before it have, given the names of the threads that still run.
    pub(super) fn drain(&self, running: &[String]) {
        if !self.options.until_end {
            return;
        }
        if !running.iter().any(|name| name.starts_with("rekey-")) {
            self.rekeyed.ends.lock().get_or_insert_with(|| self.rekeyed_ends());
        }
        let scoring = running.iter().any(|name| name.starts_with("worker-") || name.starts_with("score-"));
        if !scoring {
            self.drain_drift.request();
        }
        if !scoring && !running.iter().any(|name| name == "drift") {
            self.drain_retrain.request();
        }
    }

    /// The ends of the topics that are keyed anew. One that the log does not tell is taken to be read once it is caught up with.
    fn rekeyed_ends(&self) -> Offsets {
        let mut ends = Offsets::new();
        for (source, _) in self.plan.rekeyed() {
            let info = self.wiring.broker.topic(&source.topic).ok().flatten();
            for (partition, (_, end)) in (0..).zip(info.iter().flat_map(|info| &info.partitions)) {
                ends.insert(TopicPartition::new(Arc::clone(&source.topic), partition), *end);
            }
        }
        ends
    }

    /// Stops following the alias.
    pub(super) fn end_models(&self) {
        drop(self.models.lock().take());
    }

    /// Bytes of state that each task of this process may have in memory, where there is a limit.
    pub(super) fn state_limit(&self) -> Option<usize> {
        let tasks: usize = self.owned.lock().values().map(Vec::len).sum();
        self.plan.state.memory.map(|memory| memory / tasks.max(1))
    }

    /// Where a task's states go that are not in memory, and its limit, where there is one.
    pub(super) fn cold_states(&self, partition: i32) -> Result<Option<ColdStates>, RunError> {
        let Some(limit) = self.state_limit() else { return Ok(None) };
        let name = format!("{}-{partition}", self.plan.name);
        let states = DiskStates::open(&self.plan.state.path, &name)?;
        Ok(Some((Box::new(states), limit)))
    }

    /// Tries until it works, saying what it waits for.
    ///
    /// # Errors
    /// What waiting does not mend; [`RunError::Interrupted`] where a stop came first.
    pub(super) fn hold<T, E>(
        &self,
        what: &'static str,
        is_retriable: fn(&E) -> bool,
        mut attempt: impl FnMut() -> Result<T, E>,
    ) -> Result<T, RunError>
    where
        E: std::fmt::Display + Into<RunError>,
    {
        let mut backoff = Backoff::for_server();
        loop {
            match attempt() {
                Err(error) if is_retriable(&error) => {
                    self.holding(what, &error, &backoff);
                    if backoff.wait(&self.stop) {
                        return Err(RunError::Interrupted { what, reason: error.to_string() });
                    }
                }
                other => return other.map_err(Into::into),
            }
        }
    }

    /// Says that something is away (once a spell, and then every half minute), and counts it.
    pub(super) fn holding(&self, what: &'static str, error: &dyn std::fmt::Display, backoff: &Backoff) {
        if backoff.attempts() == 0 {
            metrics::counter!(names::HOLDS, "pipeline" => self.plan.name.clone(), "what" => what).increment(1);
            self.board.say(Kind::Warning, None, format!("holding: {error}"));
        } else if backoff.attempts().is_multiple_of(12) {
            tracing::warn!(attempts = backoff.attempts(), "still holding: {error}");
        }
    }
}

fn show_model(board: &Board, event: ModelEvent) {
    match event {
        ModelEvent::Ready { model, version, previous, provider, took } => {
            board.set_model(&version.0);
            board.reach(Milestone::InUse { version: version.to_string() });
            let before = previous.map(|p| format!(", instead of version {p}")).unwrap_or_default();
            board.say(
                Kind::Model,
                None,
                format!(
                    "model {model} version {version} is in use{before} ({}, ready in {} ms)",
                    provider.name(),
                    took.as_millis()
                ),
            );
        }
        ModelEvent::Refused { model, version, reason } => {
            board.say(
                Kind::Warning,
                None,
                format!("model {model} version {version} is refused, the running one stays: {reason}"),
            );
        }
        ModelEvent::Unresolved { reason } => board.say(
            Kind::Warning,
            None,
            format!("the model registry does not answer, the running version stays: {reason}"),
        ),
        ModelEvent::Resolved => board.say(Kind::Model, None, "the model registry answers again"),
    }
}

pub(super) fn show_retraining(board: &Board, observation: RetrainObservation<'_>) {
    let record = observation.record;
    metrics::counter!(names::RETRAINING_STEPS, "pipeline" => record.pipeline.clone(), "step" => record.step.name())
        .increment(1);
    let kind = if record.step == Step::Failed { Kind::Warning } else { Kind::Retraining };
    board.say(kind, None, format!("retraining {}: {}", record.step.name().replace('_', " "), record.detail));
    match record.step {
        Step::TrainingSetBuilt => board.reach(Milestone::Training),
        Step::Trained => board.reach(Milestone::Trained),
        Step::Promoted => board
            .reach(Milestone::Promoted { version: record.facts["version"].as_str().unwrap_or_default().to_owned() }),
        Step::Rejected | Step::Failed => board.reach(Milestone::NotPromoted),
        _ => {}
    }
}

pub(super) fn show_drift(board: &Board, plan: &Plan, observation: DriftObservation) {
    let pipeline = plan.name.clone();
    let lag_is = |lag: u64| {
        metrics::gauge!(names::LAG, "pipeline" => pipeline.clone(), "stage" => "drift", "worker" => "0").set(lag as f64)
    };
    match observation {
        DriftObservation::Progress { lag, .. } => lag_is(lag),
        DriftObservation::Window { closed, lag } => {
            lag_is(lag);
            board.windows.fetch_add(1, Ordering::Relaxed);
            metrics::counter!(names::DRIFT_WINDOWS, "pipeline" => pipeline.clone()).increment(1);
            for column in &closed.columns {
                metrics::gauge!(names::DRIFT_PSI, "pipeline" => pipeline.clone(), "column" => column.name.clone())
                    .set(column.psi);
                metrics::gauge!(names::DRIFT_EVIDENCE, "pipeline" => pipeline.clone(), "column" => column.name.clone())
                    .set(column.e_value);
            }
            let shown = closed.columns.iter().map(|c| (c.name.clone(), c.psi, c.e_value, c.drifted)).collect();
            board.set_drift(shown, closed.incident.clone());
            for event in &closed.events {
                let state = match event.state {
                    IncidentState::Opened => "opened",
                    IncidentState::Ongoing => "ongoing",
                    IncidentState::Resolved => "resolved",
                };
                metrics::counter!(names::DRIFT_EVENTS, "pipeline" => pipeline.clone(), "state" => state).increment(1);
                board.say(
                    Kind::Drift,
                    Some(event.to),
                    format!(
                        "drift {state} (model version {}, window {}): {}",
                        event.model_version, event.window, event.reason
                    ),
                );
                let incident = event.incident_id.clone();
                match event.state {
                    IncidentState::Opened => {
                        let columns = event.columns.iter().filter(|c| c.drifted).map(|c| c.name.clone()).collect();
                        board.reach(Milestone::DriftOpened { incident, columns });
                    }
                    IncidentState::Ongoing => {}
                    IncidentState::Resolved => board.reach(Milestone::DriftResolved { incident }),
                }
            }
            if let Some(retraining) = &closed.retraining {
                board.say(
                    Kind::Retraining,
                    Some(retraining.asked_at),
                    format!("retraining asked for: {}", retraining.policy),
                );
                board.reach(Milestone::RetrainingAsked { id: retraining.id.clone() });
            }
        }
        DriftObservation::Unmonitored { model_version, reason } => {
            board.say(
                Kind::Warning,
                None,
                format!("predictions of model version {model_version} cannot be judged: {reason}"),
            );
        }
        DriftObservation::Held { what, reason } => {
            metrics::counter!(names::HOLDS, "pipeline" => pipeline.clone(), "what" => what).increment(1);
            tracing::warn!("the drift monitor waits: {reason}");
        }
    }
}
