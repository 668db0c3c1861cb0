use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;

use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::*;
use crate::config::plan::{
    BrokerPlan, Delivery, Emit, EntityPlan, GatesPlan, MonitorPlan, OfflinePlan, OnlinePlan, RegistryPlan,
    RetrainingPlan, ScorePlan, StatePlan,
};
use crate::drift::IncidentState;
use crate::drift::profile::ProfileBuilder;

const FEATURES: [&str; 3] = ["amount", "visits", "age"];
const ROWS: u64 = 500;
const DAY: i64 = 86_400_000;

fn plan(window: MonitorWindow, when: &str) -> Plan {
    Plan {
        others: Vec::new(),
        pipeline: None,
        name: "shop".into(),
        folder: PathBuf::new(),
        root: PathBuf::new(),
        definition: "d0".into(),
        broker: BrokerPlan::Embedded { path: PathBuf::new(), partitions: 2 },
        online: OnlinePlan::Embedded { path: PathBuf::new(), project: "shop".into() },
        offline: OfflinePlan {
            url: "file:///".into(),
            rows: true,
            checkpoint_interval: Duration::from_secs(30),
            checkpoint_rows: 1000,
        },
        state: StatePlan::default(),
        registry: RegistryPlan { url: "file:///".into(), initial: None },
        entity: EntityPlan { name: "customer".into(), keys: Vec::new() },
        sources: Vec::new(),
        groups: Vec::new(),
        derived: Vec::new(),
        windows: Vec::new(),
        lookups: Vec::new(),
        score: Some(ScorePlan {
            on: 0,
            model: "churn".into(),
            alias: "production".into(),
            features: FEATURES.map(String::from).to_vec(),
            batch_rows: 1,
            batch_bytes: 1,
            batch_wait: Duration::ZERO,
            poll_alias: Duration::ZERO,
            delivery: Delivery::ExactlyOnce,
            emit: Emit::Arrival,
            topic: "shop.predictions".into(),
            providers: Vec::new(),
            threads: 1,
        }),
        labels: None,
        monitor: Some(MonitorPlan {
            window,
            features: FEATURES.map(String::from).to_vec(),
            warm_up: Duration::ZERO,
            alpha: 0.05,
            horizon_windows: 200,
            tolerance: 0.02,
            resolve_after: 3,
            topic: "shop.drift".into(),
            state_topic: "shop.monitor-state".into(),
        }),
        retraining: Some(RetrainingPlan {
            when: when.into(),
            cooldown: Duration::from_secs(30 * 86_400),
            command: Vec::new(),
            timeout: Duration::ZERO,
            lookback: Duration::from_secs(365 * 86_400),
            fresh_labels: 1,
            gates: GatesPlan { metric: "auc".into(), min_gain: 0.0, threshold: None, max_ece: None, max_latency: None },
            topic: "shop.retraining".into(),
            audit_topic: "shop.audit".into(),
        }),
    }
}

fn monitor() -> Monitor {
    Monitor::new(&plan(MonitorWindow::Rows(ROWS), "drifted_features >= 1 for 2 windows")).unwrap()
}

/// Rows of one version, an hour apart, from two partitions in turn.
struct Stream {
    rng: ChaCha8Rng,
    rows: PredictionRows,
    offset: i64,
}

impl Stream {
    fn new() -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(9), rows: PredictionRows::new(4), offset: 0 }
    }

    /// Adds rows whose columns are moved by these standard deviations: three features, then the score.
    fn add(&mut self, version: &str, rows: u64, shift: [f64; 4]) -> &mut Self {
        for _ in 0..rows {
            let values = shift.map(|shift| shift + Distribution::<f64>::sample(&StandardNormal, &mut self.rng));
            let (time, partition) = (self.offset * 3_600_000, (self.offset % 2) as i32);
            self.rows.push(time, partition, self.offset / 2, version, &values);
            self.offset += 1;
        }
        self
    }
}

fn reference() -> Arc<Profile> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut builder = ProfileBuilder::new(FEATURES.iter().copied().chain([SCORE]), ROWS);
    for time in 0..10_000 {
        builder.push(time, &[0.0; 4].map(|_: f64| StandardNormal.sample(&mut rng)));
    }
    Arc::new(builder.finish())
}

/// Knows versions `1` and up; `0` is away for now, anything else is not known.
struct Known(Arc<Profile>);

impl Profiles for Known {
    fn profile(&self, model_version: &str) -> Result<Arc<Profile>, NoProfile> {
        match model_version.parse::<u32>() {
            Ok(0) => Err(NoProfile::Later("away".into())),
            Ok(_) => Ok(Arc::clone(&self.0)),
            Err(_) => Err(NoProfile::Never("no such version".into())),
        }
    }
}

fn known() -> Known {
    Known(reference())
}

fn observe_all(
    monitor: &mut Monitor,
    rows: &PredictionRows,
    from: usize,
    profiles: &dyn Profiles,
) -> Vec<WindowClosed> {
    let mut closed = Vec::new();
    let mut next = from;
    while next < rows.len() {
        let observed = monitor.observe(rows, next..rows.len(), profiles);
        assert_eq!(observed.held, None);
        next = observed.next;
        closed.extend(observed.closed);
    }
    closed
}

/// Window number and state of all events.
fn states(closed: &[WindowClosed]) -> Vec<(u64, IncidentState)> {
    closed.iter().flat_map(|closed| closed.events.iter().map(|event| (closed.window, event.state))).collect()
}

const STILL: [f64; 4] = [0.0; 4];

#[test]
fn windows_of_rows_close_on_their_last_row() {
    let mut stream = Stream::new();
    stream.add("1", 2 * ROWS + 3, STILL);
    let closed = observe_all(&mut monitor(), &stream.rows, 0, &known());
    assert_eq!(closed.len(), 2);
    assert_eq!((closed[1].window, closed[1].rows, closed[1].model_version.as_str()), (2, ROWS, "1"));
    assert_eq!((closed[1].from, closed[1].to), (500 * 3_600_000, 999 * 3_600_000));
    assert!(closed.iter().all(|closed| closed.events.is_empty() && closed.incident.is_none()));
    assert_eq!(closed[0].columns.len(), 4);
    assert!(closed[0].columns.iter().all(|column| !column.drifted && column.psi < 0.1 && column.p_value > 0.5));
}

#[test]
fn windows_of_time_lie_at_multiples_of_their_length_and_close_on_the_next_row() {
    let mut monitor = Monitor::new(&plan(MonitorWindow::Time(Duration::from_secs(86_400)), "score_drifted")).unwrap();
    let mut stream = Stream::new();
    stream.offset = 5;
    stream.add("1", 100, STILL);
    let closed = observe_all(&mut monitor, &stream.rows, 0, &known());
    assert_eq!(closed.iter().map(|closed| closed.rows).collect::<Vec<_>>(), [19, 24, 24, 24]);
    assert_eq!((closed[1].from, closed[1].to), (DAY, 2 * DAY - 3_600_000));
}

#[test]
fn a_shift_opens_an_incident_that_grows_asks_for_retraining_once_and_is_resolved() {
    let mut stream = Stream::new();
    stream.add("1", 4 * ROWS, STILL);
    stream.add("1", 4 * ROWS, [1.0, 0.0, 0.0, 0.0]);
    stream.add("1", 4 * ROWS, [1.0, 0.0, 1.0, 0.0]);
    stream.add("1", 5 * ROWS, STILL);
    let closed = observe_all(&mut monitor(), &stream.rows, 0, &known());

    use IncidentState::{Ongoing, Opened, Resolved};
    assert_eq!(states(&closed), [(5, Opened), (9, Ongoing), (15, Resolved)]);
    let events: Vec<&DriftEvent> = closed.iter().flat_map(|closed| &closed.events).collect();
    assert!(events.iter().all(|event| event.incident_id == events[0].incident_id));
    assert_eq!(events[0].reason, "amount moved");
    assert_eq!(events[1].reason, "age moved too: 2 columns now");
    assert_eq!(events[0].since, 2000 * 3_600_000);
    assert_eq!(events[0].evidence, BTreeMap::from([(0, (1000, 1249)), (1, (1000, 1249))]));
    assert_eq!((events[0].columns[0].name.as_str(), events[0].columns[0].drifted), ("amount", true));
    assert_eq!(closed[4].incident.as_deref(), Some(events[0].incident_id.as_str()));
    assert_eq!(closed[14].incident, None);

    let asked: Vec<(u64, &RetrainingEvent)> =
        closed.iter().filter_map(|closed| Some((closed.window, closed.retraining.as_ref()?))).collect();
    assert_eq!(asked.len(), 1);
    let (window, event) = asked[0];
    assert_eq!((window, event.drifted.as_slice()), (6, ["amount".to_owned()].as_slice()));
    assert_eq!(event.incident_id.as_deref(), Some(events[0].incident_id.as_str()));
    assert_eq!(event.policy, "drifted_features >= 1 for 2 windows");
    assert_eq!(event.asked_at, 2999 * 3_600_000);
    assert_eq!(event.train_from, event.asked_at - 365 * DAY);
}

#[test]
fn the_same_predictions_give_the_same_ids() {
    let mut stream = Stream::new();
    stream.add("1", 6 * ROWS, [0.0, 2.0, 0.0, 0.0]);
    let ids = || -> Vec<String> {
        let closed = observe_all(&mut monitor(), &stream.rows, 0, &known());
        let events = closed.iter().flat_map(|closed| closed.events.iter().map(|event| event.incident_id.clone()));
        events.chain(closed.iter().filter_map(|closed| Some(closed.retraining.as_ref()?.id.clone()))).collect()
    };
    assert_eq!(ids().len(), 2);
    assert_eq!(ids(), ids());
}

#[test]
fn retraining_waits_for_the_cooldown_since_the_last_one() {
    // An hour a row: the cooldown is 720 rows, the second incident opens within it and lasts beyond it.
    let mut plan = plan(MonitorWindow::Rows(100), "score_drifted or drifted_features >= 1");
    plan.monitor.as_mut().unwrap().resolve_after = 1;
    let mut monitor = Monitor::new(&plan).unwrap();
    let mut stream = Stream::new();
    stream.add("1", 200, [0.0, 0.0, 0.0, 3.0]).add("1", 200, STILL).add("1", 800, [0.0, 0.0, 3.0, 0.0]);
    let closed = observe_all(&mut monitor, &stream.rows, 0, &known());
    let asked: Vec<u64> =
        closed.iter().filter(|closed| closed.retraining.is_some()).map(|closed| closed.window).collect();
    assert_eq!(asked, [1, 9]);
    assert_eq!(closed[0].events[0].reason, "the prediction moved");
}

#[test]
fn an_incident_ends_when_another_version_has_taken_over_and_is_quiet() {
    let mut stream = Stream::new();
    stream.add("1", 3 * ROWS, [1.0, 0.0, 0.0, 0.0]);
    stream.add("2", ROWS / 2, STILL).add("1", 10, STILL).add("2", 5 * ROWS, STILL);
    let mut monitor = monitor();
    let closed = observe_all(&mut monitor, &stream.rows, 0, &known());
    let events: Vec<&DriftEvent> = closed.iter().flat_map(|closed| &closed.events).collect();
    assert_eq!(
        events.iter().map(|event| event.state).collect::<Vec<_>>(),
        [IncidentState::Opened, IncidentState::Resolved]
    );
    assert_eq!((events[1].model_version.as_str(), &events[1].incident_id), ("1", &events[0].incident_id));
    assert_eq!(events[1].reason, "version 2 is in use instead, and 3 of its windows in a row were quiet");
    let resolved = closed.iter().position(|closed| !closed.events.is_empty() && closed.model_version == "2").unwrap();
    assert_eq!(closed[resolved].window, 3);
    assert_eq!(monitor.state.versions.len(), 1);
}

#[test]
fn an_incident_stays_open_while_the_next_version_moves_too() {
    let mut stream = Stream::new();
    stream.add("1", 3 * ROWS, [1.0, 0.0, 0.0, 0.0]).add("2", 5 * ROWS, [1.0, 0.0, 0.0, 0.0]);
    let closed = observe_all(&mut monitor(), &stream.rows, 0, &known());
    assert_eq!(states(&closed), [(1, IncidentState::Opened), (1, IncidentState::Opened)]);
}

#[test]
fn versions_without_a_profile_are_counted_and_told_once() {
    let mut stream = Stream::new();
    stream.add("ghost", 30, STILL).add("1", 10, STILL).add("ghost", 5, STILL);
    let mut monitor = monitor();
    let observed = monitor.observe(&stream.rows, 0..stream.rows.len(), &known());
    assert_eq!(observed.unmonitored, [("ghost".to_owned(), "no such version".to_owned())]);
    assert_eq!((observed.next, monitor.unjudged().unmonitored), (45, 35));
}

#[test]
fn a_registry_that_is_away_holds_the_rows_back() {
    let mut stream = Stream::new();
    stream.add("1", 10, STILL).add("0", 10, STILL);
    let observed = monitor().observe(&stream.rows, 0..20, &known());
    assert_eq!((observed.next, observed.held.as_deref()), (10, Some("away")));
}

#[test]
fn profiles_are_asked_for_once_a_version() {
    struct Counting(Known, Cell<u32>);
    impl Profiles for Counting {
        fn profile(&self, model_version: &str) -> Result<Arc<Profile>, NoProfile> {
            self.1.set(self.1.get() + 1);
            self.0.profile(model_version)
        }
    }
    let mut stream = Stream::new();
    stream.add("1", 10, STILL).add("ghost", 10, STILL).add("1", 10, STILL).add("ghost", 10, STILL);
    let profiles = Counting(known(), Cell::new(0));
    observe_all(&mut monitor(), &stream.rows, 0, &profiles);
    assert_eq!(profiles.1.get(), 2);
}

#[test]
fn rows_of_the_warm_up_are_counted_and_not_judged() {
    let mut plan = plan(MonitorWindow::Rows(50), "score_drifted");
    plan.monitor.as_mut().unwrap().warm_up = Duration::from_secs(100 * 3600);
    let mut monitor = Monitor::new(&plan).unwrap();
    let mut stream = Stream::new();
    stream.add("1", 100, [9.0; 4]).add("1", 60, STILL);
    let closed = observe_all(&mut monitor, &stream.rows, 0, &known());
    assert_eq!((closed.len(), monitor.unjudged().warm_up), (1, 100));
    assert!(closed[0].events.is_empty());
}

#[test]
fn another_profile_under_the_same_version_starts_the_evidence_anew() {
    let mut stream = Stream::new();
    stream.add("1", 2 * ROWS + 100, [2.0, 0.0, 0.0, 0.0]).add("1", ROWS, STILL);
    let mut first = monitor();
    let opened = first.observe(&stream.rows, 0..stream.rows.len(), &known());
    assert_eq!(opened.closed.unwrap().events[0].state, IncidentState::Opened);
    first.observe(&stream.rows, opened.next..2 * ROWS as usize, &known());

    let mut again = monitor();
    again.restore(first.snapshot().as_bytes()).unwrap();
    let mut other = (*reference()).clone();
    other.merge(&reference()).unwrap();
    let closed = observe_all(&mut again, &stream.rows, 2 * ROWS as usize + 100, &Known(Arc::new(other)));
    assert_eq!(states(&closed), [(3, IncidentState::Resolved)]);
}

#[test]
fn versions_are_bounded_and_a_forgotten_incident_is_resolved() {
    let mut plan = plan(MonitorWindow::Rows(100), "score_drifted");
    plan.monitor.as_mut().unwrap().resolve_after = 1000;
    let mut monitor = Monitor::new(&plan).unwrap();
    let mut stream = Stream::new();
    stream.add("1", 100, [3.0, 0.0, 0.0, 0.0]);
    for version in 2..=30 {
        stream.add(&version.to_string(), 100, STILL);
    }
    let closed = observe_all(&mut monitor, &stream.rows, 0, &known());
    let events: Vec<&DriftEvent> = closed.iter().flat_map(|closed| &closed.events).collect();
    assert_eq!(
        events.iter().map(|event| event.state).collect::<Vec<_>>(),
        [IncidentState::Opened, IncidentState::Resolved]
    );
    assert_eq!(events[1].reason, "version 1 has not been in use for long");
    assert!(monitor.state.versions.len() <= 9 && monitor.watched.len() <= 9);
}

#[test]
fn snapshots_of_other_formats_are_refused() {
    let mut monitor = monitor();
    for text in ["", "{}", &monitor.snapshot().replace("\"format\":1", "\"format\":2")] {
        assert!(matches!(monitor.restore(text.as_bytes()), Err(MonitorError::Snapshot { .. })), "{text}");
    }
}

#[test]
fn a_plan_that_cannot_be_monitored_is_refused() {
    let with = |change: fn(&mut Plan)| {
        let mut plan = plan(MonitorWindow::Rows(1), "score_drifted");
        change(&mut plan);
        Monitor::new(&plan).unwrap_err().to_string()
    };
    assert!(with(|plan| plan.monitor = None).contains("no [monitor] section"));
    assert!(with(|plan| plan.score = None).contains("no [score] section"));
    assert!(
        with(|plan| plan.retraining.as_mut().unwrap().when = "score_drifted fer 2".into()).contains("at column 15")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn a_restart_at_any_rows_changes_nothing(mut stops in proptest::collection::vec(0..3000_usize, 1..5)) {
        let mut stream = Stream::new();
        stream.add("1", 1200, STILL).add("1", 700, [1.0, 0.0, 0.5, 0.0]).add("2", 300, STILL);
        stream.add("1", 50, STILL).add("2", 1200, [0.0, 0.0, 0.0, 0.6]);
        let profiles = known();
        let mut steady = monitor();
        let expected = observe_all(&mut steady, &stream.rows, 0, &profiles);

        stops.push(stream.rows.len());
        stops.sort_unstable();
        let mut monitor = monitor();
        let (mut next, mut closed) = (0, Vec::new());
        for stop in stops {
            while next < stop {
                let observed = monitor.observe(&stream.rows, next..stop, &profiles);
                next = observed.next;
                closed.extend(observed.closed);
            }
            let mut again = super::tests::monitor();
            again.restore(monitor.snapshot().as_bytes()).unwrap();
            monitor = again;
        }
        prop_assert_eq!(closed, expected);
        prop_assert_eq!(monitor.snapshot(), steady.snapshot());
    }
}
