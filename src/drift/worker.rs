//! The drift stage: one thread that reads predictions, feeds the monitor and publishes what it finds.
//!
//! Where a window closes, one transaction holds the drift events, the retraining event, the dead letters, the monitor's state and
//! the offsets up to exactly the row that closed it. So a restart takes up the newest state and the rows after it: no alarm is
//! repeated, none is lost. Two instances would tell each other's state: the transactional id fences the older one.

mod session;
mod state;

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use super::monitor::{Monitor, MonitorError, NoProfile, Profiles, WindowClosed};
use super::profile::Profile;
use crate::broker::{Broker, BrokerError};
use crate::config::plan::{MonitorPlan, Plan, ScorePlan};
use crate::model::{ModelError, Registry, Version};
use crate::runtime::shutdown::Stop;

use self::session::{Ended, Session};

/// Name of the stage: of its consumer group, its transactional id and its dead letters.
pub const STAGE: &str = "drift";

/// How long a broker or a registry that is away is left alone before it is asked again.
const PAUSE: Duration = Duration::from_secs(1);
/// Sessions in a row that may be fenced without having committed anything: another instance is at work.
const MOST_FENCED: u32 = 3;

/// What can end the drift stage.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriftError {
    /// The monitor cannot work with this plan or this state.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The log failed.
    #[error("drift monitor: {0}")]
    Broker(#[from] BrokerError),
    /// The state topic holds something else.
    #[error(
        "drift monitor: the record at {topic}, offset {offset}, is no state of this monitor: {reason}; a newer driftline may have written it"
    )]
    State {
        /// State topic.
        topic: String,
        /// Offset of the record.
        offset: i64,
        /// What is wrong with it.
        reason: String,
    },
    /// A failpoint of a test.
    #[error("drift monitor: failpoint {0}")]
    Failpoint(&'static str),
}

impl DriftError {
    /// True where going on with the committed state may succeed without anybody changing anything.
    pub fn is_retriable(&self) -> bool {
        match self {
            // The next session's producer settles a commit whose outcome is open.
            Self::Broker(BrokerError::Aborted { .. } | BrokerError::Undecided { .. }) => true,
            Self::Broker(error) => error.is_retriable() || error.is_fenced() || error.is_spent(),
            Self::Failpoint(_) => true,
            Self::Monitor(_) | Self::State { .. } => false,
        }
    }
}

/// What an observer of the stage is told, on the stage's thread.
#[derive(Debug, Clone)]
pub enum DriftObservation {
    /// Rows were taken and committed.
    Progress {
        /// Rows since the last such observation.
        rows: u64,
        /// Predictions that are in the log and not taken yet.
        lag: u64,
    },
    /// A window closed, and all it led to is in the log.
    Window {
        /// Verdict, drift events and retraining event.
        closed: Box<WindowClosed>,
        /// Predictions that are in the log and not taken yet.
        lag: u64,
    },
    /// Predictions of a model version cannot be judged. They are counted.
    Unmonitored {
        /// The version.
        model_version: String,
        /// Why.
        reason: String,
    },
    /// Something is away; the stage waits for it. Told once until anything is committed again, or the reason changes.
    Held {
        /// `broker` or `registry`.
        what: &'static str,
        /// What it said.
        reason: String,
    },
}

/// See the module.
pub struct DriftWorker {
    plan: Arc<Plan>,
    monitor: MonitorPlan,
    score: ScorePlan,
    broker: Arc<dyn Broker>,
    registry: Arc<dyn Registry>,
}

impl DriftWorker {
    /// Prepares the stage.
    ///
    /// # Errors
    /// Where the plan has nothing to monitor, or its retraining policy cannot be understood.
    pub fn new(plan: Arc<Plan>, broker: Arc<dyn Broker>, registry: Arc<dyn Registry>) -> Result<Self, DriftError> {
        let missing = |section| MonitorError::NotPlanned { pipeline: plan.name.clone(), section };
        let monitor = plan.monitor.clone().ok_or_else(|| missing("monitor"))?;
        let score = plan.score.clone().ok_or_else(|| missing("score"))?;
        Monitor::new(&plan)?;
        Ok(Self { plan, monitor, score, broker, registry })
    }

    /// Runs until `stop` is requested, or, once `drain` is, until all predictions in the log are taken. Blocks.
    ///
    /// The topics of predictions and of the monitor's output have to be there.
    ///
    /// # Errors
    /// What cannot be mended by waiting: another instance, a missing topic, a state that cannot be read.
    pub fn run(self, stop: &Stop, drain: &Stop, observer: &dyn Fn(DriftObservation)) -> Result<(), DriftError> {
        let reporter = Reporter { observer, held: RefCell::new(None) };
        let mut fenced = 0;
        loop {
            let mut session = match Session::open(&self, &reporter) {
                Ok(session) => session,
                Err(error) if error.is_retriable() => {
                    reporter.held("broker", error.to_string());
                    if stop.wait(PAUSE) {
                        return Ok(());
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            match session.run(stop, drain) {
                Ok(Ended::Stopped | Ended::Drained) => return Ok(()),
                Ok(Ended::Rebalanced) => {}
                Err(error) if error.is_retriable() => {
                    let is_fenced = matches!(&error, DriftError::Broker(error) if error.is_fenced());
                    fenced = if is_fenced && !session.has_committed() { fenced + 1 } else { 0 };
                    if fenced >= MOST_FENCED {
                        return Err(error);
                    }
                    reporter.held("broker", error.to_string());
                    if stop.wait(PAUSE) {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Tells the observer, but not the same hold again and again.
struct Reporter<'a> {
    observer: &'a dyn Fn(DriftObservation),
    held: RefCell<Option<String>>,
}

impl Reporter<'_> {
    fn tell(&self, observation: DriftObservation) {
        (self.observer)(observation);
    }

    fn held(&self, what: &'static str, reason: String) {
        if self.held.borrow().as_ref() != Some(&reason) {
            *self.held.borrow_mut() = Some(reason.clone());
            (self.observer)(DriftObservation::Held { what, reason });
        }
    }

    fn goes_on(&self) {
        *self.held.borrow_mut() = None;
    }
}

/// Profiles out of a registry's bundles.
struct RegistryProfiles<'a> {
    registry: &'a dyn Registry,
    model: &'a str,
}

impl Profiles for RegistryProfiles<'_> {
    fn profile(&self, model_version: &str) -> Result<Arc<Profile>, NoProfile> {
        let version = Version::from(model_version);
        let bundle = self.registry.load(self.model, &version).map_err(|error: ModelError| {
            let reason = format!("model {} version {model_version}: {error}", self.model);
            if error.is_retriable() { NoProfile::Later(reason) } else { NoProfile::Never(reason) }
        })?;
        let origin = format!("of model {} version {model_version}", self.model);
        Profile::parse(bundle.profile(), &origin).map(Arc::new).map_err(|error| NoProfile::Never(error.to_string()))
    }
}
