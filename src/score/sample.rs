//! A pipeline and feature rows for the tests of this stage.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{
    ArrayRef, BooleanArray, Float64Array, Int32Array, Int64Array, ListArray, RecordBatch, StringArray,
    TimestampMillisecondArray,
};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{DataType as ArrowType, Field, Schema, SchemaRef};

use crate::config::plan::{
    BrokerPlan, Column, DataType, Delivery, DerivedPlan, Element, Emit, EntityPlan, Format, OfflinePlan, OnlinePlan,
    Plan, RegistryPlan, ScorePlan, SourcePlan, StatePlan, TimeUnit,
};
use crate::window::row_columns;

fn column(name: &str, data_type: DataType) -> Column {
    Column { name: name.into(), data_type }
}

/// Two sources, these keys, one feature of each type; the numeric ones are scored, in another order.
pub(super) fn plan(keys: &[(&str, DataType)]) -> Plan {
    let source = |name: &str, topic: &str| SourcePlan {
        name: name.into(),
        topic: topic.into(),
        format: Format::Json,
        fields: Vec::new(),
        key_fields: keys.iter().map(|(name, _)| Arc::from(*name)).collect(),
        event_time: "at".into(),
        event_time_unit: TimeUnit::Ms,
        out_of_order: Duration::ZERO,
        ahead: Duration::from_secs(3600),
        idle_after: Duration::from_secs(30),
        filter: None,
        derive: Vec::new(),
        table: None,
        rekeyed: None,
    };
    let derived = [
        ("spend", DataType::Float64),
        ("visits", DataType::Int64),
        ("member", DataType::Boolean),
        ("last_\"shop\"", DataType::String),
        ("last_seen", DataType::Timestamp),
        ("amounts", DataType::List(Element::Float64)),
        ("shops", DataType::List(Element::String)),
    ];
    Plan {
        others: Vec::new(),
        pipeline: None,
        name: "ch\"urn".into(),
        folder: PathBuf::new(),
        root: PathBuf::new(),
        definition: "0123456789abcdef".into(),
        broker: BrokerPlan::Embedded { path: PathBuf::new(), partitions: 1 },
        online: OnlinePlan::Embedded { path: PathBuf::new(), project: "churn".into() },
        offline: OfflinePlan {
            url: "file:///nowhere".into(),
            rows: true,
            checkpoint_interval: Duration::from_secs(30),
            checkpoint_rows: 1000,
        },
        state: StatePlan::default(),
        registry: RegistryPlan { url: "file:///nowhere".into(), initial: None },
        entity: EntityPlan {
            name: "customer".into(),
            keys: keys.iter().map(|(name, data_type)| column(name, *data_type)).collect(),
        },
        sources: vec![source("purchases", "churn.purchases"), source("logins", "churn.logins")],
        groups: Vec::new(),
        windows: Vec::new(),
        lookups: Vec::new(),
        derived: derived
            .iter()
            .map(|(name, data_type)| DerivedPlan {
                column: column(name, *data_type),
                sql: String::new(),
                looked_up: false,
            })
            .collect(),
        score: Some(ScorePlan {
            on: 0,
            model: "churn".into(),
            alias: "production".into(),
            features: vec!["member".into(), "spend".into(), "visits".into()],
            batch_rows: 1024,
            batch_bytes: 1 << 20,
            batch_wait: Duration::from_millis(5),
            poll_alias: Duration::from_secs(1),
            delivery: Delivery::ExactlyOnce,
            emit: Emit::Arrival,
            topic: "churn.predictions".into(),
            providers: vec!["cpu".into()],
            threads: 1,
        }),
        labels: None,
        monitor: None,
        retraining: None,
    }
}

/// The schema of a plan's feature rows.
pub(super) fn schema(plan: &Plan) -> SchemaRef {
    let time = DataType::Timestamp.to_arrow();
    let mut fields: Vec<Field> =
        plan.entity.keys.iter().map(|key| Field::new(&*key.name, key.data_type.to_arrow(), false)).collect();
    fields.extend([
        Field::new(row_columns::EVENT_TIME, time.clone(), false),
        Field::new(row_columns::SOURCE, ArrowType::Utf8, false),
        Field::new(row_columns::TOPIC, ArrowType::Utf8, false),
        Field::new(row_columns::PARTITION, ArrowType::Int32, false),
        Field::new(row_columns::OFFSET, ArrowType::Int64, false),
        Field::new(row_columns::WATERMARK, time, true),
    ]);
    fields.extend(plan.feature_columns().iter().map(|c| Field::new(&*c.name, c.data_type.to_arrow(), true)));
    Arc::new(Schema::new(fields))
}

/// Values that are hard to write: extremes, signs, escapes, nulls, what JSON has no number for.
pub(super) fn rows(plan: &Plan) -> RecordBatch {
    let texts = ["plain", "q\"uote\\", "line\nbreak\u{1}", "ünï çødé 🦀"];
    let utc =
        |times: Vec<Option<i64>>| -> ArrayRef { Arc::new(TimestampMillisecondArray::from(times).with_timezone("UTC")) };
    let mut columns: Vec<ArrayRef> = Vec::new();
    for key in &plan.entity.keys {
        columns.push(match key.data_type {
            DataType::Int64 => Arc::new(Int64Array::from(vec![i64::MIN, -1, 0, i64::MAX])),
            _ => Arc::new(StringArray::from(texts.to_vec())),
        });
    }
    columns.extend([
        utc(vec![Some(0), Some(-1), Some(1_700_000_000_123), Some(i64::MAX)]),
        Arc::new(StringArray::from(vec!["purchases", "logins", "purchases", "purchases"])) as ArrayRef,
        Arc::new(StringArray::from(vec!["churn.purchases", "churn.logins", "churn.purchases", "churn.purchases"])),
        Arc::new(Int32Array::from(vec![0, 1, 2, i32::MAX])),
        Arc::new(Int64Array::from(vec![0, 7, 8, i64::MAX])),
        utc(vec![None, Some(5), Some(1_700_000_000_000), Some(0)]),
        Arc::new(Float64Array::from(vec![Some(0.1 + 0.2), Some(f64::NAN), None, Some(-1.797_693_134_862_315_7e308)])),
        Arc::new(Int64Array::from(vec![Some(9_007_199_254_740_993), None, Some(-3), Some(0)])),
        Arc::new(BooleanArray::from(vec![Some(true), Some(false), None, Some(true)])),
        Arc::new(StringArray::from(vec![Some(texts[0]), None, Some(texts[2]), Some(texts[3])])),
        utc(vec![Some(1), None, Some(-62_135_596_800_000), Some(0)]),
    ]);
    let lengths = [2, 0, 0, 3];
    let list = |items: ArrayRef| -> ArrayRef {
        let field = Arc::new(Field::new_list_field(items.data_type().clone(), false));
        let nulls = NullBuffer::from(vec![true, true, false, true]);
        Arc::new(ListArray::new(field, OffsetBuffer::from_lengths(lengths), items, Some(nulls)))
    };
    columns.push(list(Arc::new(Float64Array::from(vec![0.1 + 0.2, -0.5, 1e300, 7.0, 0.0]))));
    columns.push(list(Arc::new(StringArray::from(vec![texts[1], "", texts[3], texts[2], "plain"]))));
    RecordBatch::try_new(schema(plan), columns).unwrap()
}
