//! A pipeline for tests and benches of scoring.

use std::path::Path;
use std::time::Duration;

use driftline::config::plan::{
    BrokerPlan, Column, DataType, Delivery, DerivedPlan, Emit, EntityPlan, OfflinePlan, OnlinePlan, Plan, RegistryPlan,
    ScorePlan, StatePlan,
};

/// A pipeline that scores these features with model `m`, alias `production`, of a folder registry under `root`.
pub fn scoring_plan(root: &Path, features: &[(&str, DataType)]) -> Plan {
    let column = |(name, data_type): (&str, DataType)| Column { name: name.into(), data_type };
    Plan {
        others: Vec::new(),
        pipeline: None,
        name: "test".into(),
        folder: root.to_owned(),
        root: root.to_owned(),
        definition: "0".into(),
        broker: BrokerPlan::Embedded { path: root.to_owned(), partitions: 1 },
        online: OnlinePlan::Embedded { path: root.to_owned(), project: "test".into() },
        offline: OfflinePlan {
            url: format!("file://{}", root.display()),
            rows: true,
            checkpoint_interval: Duration::from_secs(30),
            checkpoint_rows: 1000,
        },
        state: StatePlan::default(),
        registry: RegistryPlan { url: format!("file://{}/models", root.display()), initial: None },
        entity: EntityPlan { name: "customer".into(), keys: vec![column(("customer_id", DataType::String))] },
        sources: Vec::new(),
        groups: Vec::new(),
        windows: Vec::new(),
        lookups: Vec::new(),
        derived: features
            .iter()
            .map(|f| DerivedPlan { column: column(*f), sql: String::new(), looked_up: false })
            .collect(),
        score: Some(ScorePlan {
            on: 0,
            model: "m".into(),
            alias: "production".into(),
            features: features.iter().map(|(name, _)| (*name).to_owned()).collect(),
            batch_rows: 64,
            batch_bytes: 1 << 20,
            batch_wait: Duration::from_millis(5),
            // Tests ask for themselves.
            poll_alias: Duration::from_secs(3600),
            delivery: Delivery::ExactlyOnce,
            emit: Emit::Arrival,
            topic: "test.predictions".into(),
            providers: vec!["cpu".into()],
            threads: 1,
        }),
        labels: None,
        monitor: None,
        retraining: None,
    }
}
