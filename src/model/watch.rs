//! Following an alias: a thread asks the registry, makes the next version ready beside the running one, and leaves it where
//! the scoring threads pick it up between two batches.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::ModelError;
use super::bundle::Manifest;
use super::onnx::{Model, Provider, SessionOptions};
use super::registry::{Registry, Version};
use crate::config::plan::Plan;
use crate::runtime::clock;
use crate::telemetry::metrics::{MODEL_LOAD, MODEL_REFUSED, MODEL_SWAPS};

/// A refused version is tried again this often, because someone may have mended its files in place.
const RETRY_REFUSED: Duration = Duration::from_secs(60);

/// What happens to the model that a pipeline scores with.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelEvent {
    /// A version is ready; each scoring thread changes to it before its next batch.
    Ready {
        /// Model name.
        model: Arc<str>,
        /// The version.
        version: Version,
        /// The one it replaces; none at the start.
        previous: Option<Version>,
        /// What computes it.
        provider: Provider,
        /// How long it took to load, check and warm up.
        took: Duration,
    },
    /// A version cannot be used. The running one stays.
    Refused {
        /// Model name.
        model: Arc<str>,
        /// The version.
        version: Version,
        /// Why, and what to do.
        reason: String,
    },
    /// The registry does not answer, or the alias is gone. The running version stays.
    Unresolved {
        /// Why.
        reason: String,
    },
    /// The registry answers again.
    Resolved,
}

/// One version of a model with sessions of its own.
#[derive(Debug)]
pub struct ServingModel {
    /// Model name.
    pub name: Arc<str>,
    /// Version.
    pub version: Version,
    /// Its bundle's description.
    pub manifest: Arc<Manifest>,
    /// Its sessions.
    pub model: Model,
}

/// Follows an alias until it is dropped.
#[derive(Debug)]
pub struct ModelWatch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A scoring thread's own sessions, replaced between two batches when the alias has moved.
#[derive(Debug)]
pub struct ModelSlot {
    shared: Arc<Shared>,
    index: usize,
    generation: u64,
    current: ServingModel,
}

#[derive(Debug)]
struct Shared {
    /// Rises when all of `next` has been filled.
    generation: AtomicU64,
    /// What each slot changes to.
    next: Vec<Mutex<Option<ServingModel>>>,
    control: Mutex<Control>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Control {
    stop: bool,
    /// Ask the registry now.
    ask: bool,
    /// Sessions nobody uses any more: freed by the watching thread, not by the scoring ones.
    retired: Vec<ServingModel>,
}

impl ModelWatch {
    /// Loads the version that the pipeline's alias means, once for each of `sessions` scoring threads, and follows the alias
    /// from then on. `on_event` runs on the watching thread, and here for the first [`ModelEvent::Ready`].
    ///
    /// # Errors
    /// No model behind the alias, or one that cannot be used: there is nothing to go on with at the start.
    pub fn start(
        plan: &Plan,
        registry: Arc<dyn Registry>,
        sessions: usize,
        mut on_event: impl FnMut(ModelEvent) + Send + 'static,
    ) -> Result<(Self, Vec<ModelSlot>), ModelError> {
        let loader = Loader::new(plan, registry, sessions)?;
        let version = loader.resolve()?.ok_or_else(|| loader.unknown_alias())?;
        let (models, took) = loader.load(&version)?;
        for (provider, reason) in models.first().map(|m| m.model.passed_over()).unwrap_or_default() {
            // A library for CPUs alone is a choice; a provider that is there and fails is a fault.
            if reason.contains("not enabled in this build") {
                tracing::info!(provider = provider.name(), "this ONNX Runtime library lacks the execution provider");
            } else {
                tracing::warn!(provider = provider.name(), reason, "execution provider cannot be used");
            }
        }
        on_event(loader.ready(&models, None, took));

        let shared = Arc::new(Shared {
            generation: AtomicU64::new(0),
            next: models.iter().map(|_| Mutex::new(None)).collect(),
            control: Mutex::default(),
            wake: Condvar::new(),
        });
        let slot = |(index, current)| ModelSlot { shared: shared.clone(), index, generation: 0, current };
        let slots = models.into_iter().enumerate().map(slot).collect();
        let follower = Follower {
            next_ask: clock::monotonic() + loader.poll,
            loader,
            shared: shared.clone(),
            serving: version,
            refused: None,
            unresolved: None,
            on_event: Box::new(on_event),
        };
        let builder = std::thread::Builder::new().name("model-watch".to_owned());
        let thread = builder.spawn(move || follower.run()).map_err(ModelError::Thread)?;
        Ok((Self { shared, thread: Some(thread) }, slots))
    }

    /// Asks the registry now instead of at the next poll: whoever has just moved the alias need not wait.
    pub fn ask_now(&self) {
        self.shared.control.lock().ask = true;
        self.shared.wake.notify_one();
    }
}

impl Drop for ModelWatch {
    fn drop(&mut self) {
        self.shared.control.lock().stop = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the hook, and the sessions in use do not depend on the thread.
            let _ = thread.join();
        }
    }
}

impl ModelSlot {
    /// A slot whose model never changes: for backfills, gates and tests.
    pub fn fixed(model: ServingModel) -> Self {
        let shared = Shared {
            generation: AtomicU64::new(0),
            next: vec![Mutex::new(None)],
            control: Mutex::default(),
            wake: Condvar::new(),
        };
        Self { shared: Arc::new(shared), index: 0, generation: 0, current: model }
    }

    /// The sessions to score the next batch with. Call it once a batch, so that no batch is scored by two versions.
    pub fn current(&mut self) -> &mut ServingModel {
        let generation = self.shared.generation.load(Ordering::Acquire);
        if generation != self.generation {
            self.generation = generation;
            if let Some(next) = self.shared.next[self.index].lock().take() {
                let retired = std::mem::replace(&mut self.current, next);
                self.shared.control.lock().retired.push(retired);
                self.shared.wake.notify_one();
            }
        }
        &mut self.current
    }
}

/// Makes versions ready.
struct Loader {
    plan: Plan,
    registry: Arc<dyn Registry>,
    model: Arc<str>,
    alias: String,
    poll: Duration,
    options: SessionOptions,
    sessions: usize,
}

impl Loader {
    fn new(plan: &Plan, registry: Arc<dyn Registry>, sessions: usize) -> Result<Self, ModelError> {
        let score = plan.score.as_ref().ok_or_else(|| ModelError::NoScore { pipeline: plan.name.clone() })?;
        Ok(Self {
            plan: plan.clone(),
            registry,
            model: score.model.as_str().into(),
            alias: score.alias.clone(),
            poll: score.poll_alias,
            options: SessionOptions::of(score)?,
            sessions: sessions.max(1),
        })
    }

    fn resolve(&self) -> Result<Option<Version>, ModelError> {
        self.registry.resolve(&self.model, &self.alias)
    }

    fn unknown_alias(&self) -> ModelError {
        let versions = self.registry.versions(&self.model).unwrap_or_default();
        let advice = match versions.last() {
            None => "the model has no version at all: set [registry] initial, or register a bundle".to_owned(),
            Some(newest) => format!("its newest version is {newest}: give it the alias"),
        };
        ModelError::Unknown {
            registry: self.registry.describe(),
            model: self.model.to_string(),
            what: format!("alias '{}'", self.alias),
            advice,
        }
    }

    /// A version's bundle, checked against the pipeline, with warm sessions for every slot.
    fn load(&self, version: &Version) -> Result<(Vec<ServingModel>, Duration), ModelError> {
        let started = clock::monotonic();
        let bundle = self.registry.load(&self.model, version)?;
        bundle.check_against(&self.plan)?;
        let manifest = Arc::new(bundle.manifest.clone());
        let serving = |model| ServingModel {
            name: self.model.clone(),
            version: version.clone(),
            manifest: manifest.clone(),
            model,
        };
        let models = (0..self.sessions).map(|_| Model::load(&bundle, &self.options).map(serving));
        let models = models.collect::<Result<Vec<_>, _>>()?;
        let took = clock::monotonic() - started;
        let pipeline = self.plan.name.clone();
        metrics::histogram!(MODEL_LOAD, "pipeline" => pipeline).record(took.as_secs_f64());
        Ok((models, took))
    }

    fn ready(&self, models: &[ServingModel], previous: Option<&Version>, took: Duration) -> ModelEvent {
        let first = models.first().expect("there is at least one session");
        let provider = first.model.provider();
        tracing::info!(
            model = &*self.model,
            version = %first.version,
            previous = previous.map(|version| &*version.0),
            provider = provider.name(),
            milliseconds = took.as_millis(),
            "model ready"
        );
        metrics::counter!(MODEL_SWAPS, "pipeline" => self.plan.name.clone()).increment(1);
        ModelEvent::Ready {
            model: self.model.clone(),
            version: first.version.clone(),
            previous: previous.cloned(),
            provider,
            took,
        }
    }
}

/// The watching thread.
struct Follower {
    loader: Loader,
    shared: Arc<Shared>,
    next_ask: Instant,
    serving: Version,
    /// The version that was refused last, why, and when it is tried again.
    refused: Option<(Version, String, Instant)>,
    /// Why the alias could not be resolved, while that lasts.
    unresolved: Option<String>,
    on_event: Box<dyn FnMut(ModelEvent) + Send>,
}

impl Follower {
    fn run(mut self) {
        while let Some((ask, retired)) = self.wait() {
            drop(retired);
            if ask {
                self.ask();
                self.next_ask = clock::monotonic() + self.loader.poll;
            }
        }
    }

    /// Waits for the next poll, or for something to free. `None` at the end.
    fn wait(&self) -> Option<(bool, Vec<ServingModel>)> {
        let mut control = self.shared.control.lock();
        loop {
            if control.stop {
                return None;
            }
            let due = clock::monotonic() >= self.next_ask;
            if due || control.ask || !control.retired.is_empty() {
                let ask = std::mem::take(&mut control.ask) || due;
                return Some((ask, std::mem::take(&mut control.retired)));
            }
            self.shared.wake.wait_until(&mut control, self.next_ask);
        }
    }

    fn ask(&mut self) {
        let version = match self.loader.resolve() {
            Ok(Some(version)) => version,
            Ok(None) => return self.unresolved(self.loader.unknown_alias()),
            Err(error) => return self.unresolved(error),
        };
        if self.unresolved.take().is_some() {
            tracing::info!(registry = self.loader.registry.describe(), "the model registry answers again");
            (self.on_event)(ModelEvent::Resolved);
        }
        if version == self.serving {
            self.refused = None;
            return;
        }
        let waits =
            |(refused, _, until): &(Version, String, Instant)| *refused == version && clock::monotonic() < *until;
        if self.refused.as_ref().is_some_and(waits) {
            return;
        }
        match self.loader.load(&version) {
            Ok((models, took)) => self.publish(version, models, took),
            Err(error) => self.refuse(version, &error),
        }
    }

    fn publish(&mut self, version: Version, models: Vec<ServingModel>, took: Duration) {
        let event = self.loader.ready(&models, Some(&self.serving), took);
        for (slot, model) in self.shared.next.iter().zip(models) {
            // A version that a slow thread never picked up is freed here.
            drop(slot.lock().replace(model));
        }
        self.shared.generation.fetch_add(1, Ordering::Release);
        self.serving = version;
        self.refused = None;
        (self.on_event)(event);
    }

    fn refuse(&mut self, version: Version, error: &ModelError) {
        let reason = error.to_string();
        let known = self.refused.as_ref().is_some_and(|(refused, why, _)| *refused == version && *why == reason);
        if !known {
            let model = &*self.loader.model;
            tracing::warn!(model, %version, serving = %self.serving, reason, "model version refused, the running one stays");
            let pipeline = self.loader.plan.name.clone();
            metrics::counter!(MODEL_REFUSED, "pipeline" => pipeline, "reason" => refusal(error)).increment(1);
            let model = self.loader.model.clone();
            (self.on_event)(ModelEvent::Refused { model, version: version.clone(), reason: reason.clone() });
        }
        // Storage that fails is asked again at the next poll; a broken bundle stays broken until someone mends it.
        let pause = if error.is_retriable() { Duration::ZERO } else { RETRY_REFUSED };
        self.refused = Some((version, reason, clock::monotonic() + pause));
    }

    fn unresolved(&mut self, error: ModelError) {
        let reason = error.to_string();
        if self.unresolved.as_ref() != Some(&reason) {
            tracing::warn!(serving = %self.serving, reason, "the model registry does not answer, the running version stays");
            (self.on_event)(ModelEvent::Unresolved { reason: reason.clone() });
            self.unresolved = Some(reason);
        }
    }
}

/// Fixed word for metrics.
fn refusal(error: &ModelError) -> &'static str {
    match error {
        ModelError::Bundle(_) => "bundle",
        ModelError::Signature(_) => "signature",
        ModelError::Graph { .. } | ModelError::Session { .. } | ModelError::Run { .. } => "graph",
        ModelError::Storage { .. } => "storage",
        _ => "other",
    }
}
