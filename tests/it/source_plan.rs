//! A source for tests and benches of decoding and replay.

use std::time::Duration;

use driftline::config::plan::{Column, DataType, Format, SourcePlan, TimeUnit};

/// Purchases on a topic, with these fields: the first one is the key, the second one the event time in milliseconds.
pub fn purchases(topic: &str, format: Format, fields: &[(&str, DataType)]) -> SourcePlan {
    let fields: Vec<Column> =
        fields.iter().map(|(name, data_type)| Column { name: (*name).into(), data_type: *data_type }).collect();
    SourcePlan {
        name: "purchases".into(),
        topic: topic.into(),
        format,
        key_fields: vec![fields[0].name.clone()],
        event_time: fields[1].name.clone(),
        event_time_unit: TimeUnit::Ms,
        fields,
        out_of_order: Duration::ZERO,
        ahead: Duration::from_secs(3600),
        idle_after: Duration::from_secs(30),
        filter: None,
        derive: Vec::new(),
        table: None,
        rekeyed: None,
    }
}
