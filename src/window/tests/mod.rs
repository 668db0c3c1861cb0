//! Tests of the engine as a whole: small edge cases, and random streams against an oracle.

mod checkpoints;
mod current;
mod edges;
mod emitted;
mod event_time;
mod exact;
mod lists;
mod matrix;
mod oracle;
mod properties;
mod rekeyed;
mod tables;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray,
    TimestampMillisecondArray,
};
use arrow::datatypes::{DataType as ArrowType, Field, Float64Type, Int64Type, Schema, TimestampMillisecondType};

use super::{Engine, FeatureRows, Task, TaskClock};
use crate::config::plan::{
    BrokerPlan, ByPlan, Column, DataType, Delivery, DerivedPlan, Emit, EntityPlan, Format, Function, GroupPlan,
    OfflinePlan, OnlinePlan, Plan, RecordKey, RegistryPlan, ScorePlan, SourcePlan, StatePlan, TablePlan, TimeUnit,
    WindowPlan,
};
use crate::source::SourceBatch;

/// One event of any source. The key is (`name`, `number`), made of `key`.
#[derive(Debug, Clone, PartialEq)]
struct Event {
    key: u8,
    time: i64,
    amount: Option<f64>,
    units: Option<i64>,
    kind: Option<&'static str>,
}

fn event(time: i64, amount: f64) -> Event {
    Event { key: 0, time, amount: Some(amount), units: Some(1), kind: Some("a") }
}

const FIELDS: [(&str, DataType); 7] = [
    ("name", DataType::String),
    ("number", DataType::Int64),
    ("amount", DataType::Float64),
    ("units", DataType::Int64),
    ("kind", DataType::String),
    ("due", DataType::Timestamp),
    ("flag", DataType::Boolean),
];

fn column(name: &str, data_type: DataType) -> Column {
    Column { name: name.into(), data_type }
}

fn field(name: &str) -> Column {
    let (name, data_type) = FIELDS.into_iter().find(|(field, _)| *field == name).expect("a field of the test events");
    column(name, data_type)
}

fn source(name: &str, out_of_order_ms: u64) -> SourcePlan {
    SourcePlan {
        name: name.into(),
        topic: format!("test.{name}").into(),
        format: Format::Json,
        fields: FIELDS.iter().map(|(name, data_type)| column(name, *data_type)).collect(),
        key_fields: vec!["name".into(), "number".into()],
        event_time: "at".into(),
        event_time_unit: TimeUnit::Ms,
        out_of_order: Duration::from_millis(out_of_order_ms),
        ahead: Duration::from_secs(3600),
        idle_after: Duration::from_secs(30),
        filter: None,
        derive: Vec::new(),
        table: None,
        rekeyed: None,
    }
}

/// A table with these columns.
fn table(name: &str, out_of_order_ms: u64, columns: &[(&str, DataType)]) -> SourcePlan {
    let columns = columns.iter().map(|(name, data_type)| column(name, *data_type)).collect();
    let table = TablePlan { columns, record_time: false, record_key: RecordKey::Json };
    SourcePlan { table: Some(table), ..source(name, out_of_order_ms) }
}

/// The features of a table.
fn group_of_table(index: usize, source: &SourcePlan) -> GroupPlan {
    let columns = source.table.iter().flat_map(|table| &table.columns);
    let feature = |of: &Column| (Function::Last, 0, column(&format!("{}_{}", source.name, of.name), of.data_type));
    let features = columns.map(feature).collect();
    GroupPlan { features, ..group(&source.name, index, None, None, &[window(0, 0)]) }
}

/// A window of this length and tile; no length is a lifetime.
fn window(length_ms: i64, tile_ms: i64) -> WindowPlan {
    match length_ms {
        0 => WindowPlan { label: "lifetime".to_owned(), length_ms: None, tile_ms: 0 },
        _ => WindowPlan { label: format!("{length_ms}x{tile_ms}"), length_ms: Some(length_ms), tile_ms },
    }
}

/// The functions of a type, one of each kind.
fn functions_of(of: Option<DataType>) -> Vec<Function> {
    let is_one_of_several = |function: &Function| matches!(function, Function::Top(2 | 4..));
    all_functions_of(of).into_iter().filter(|function| !is_one_of_several(function)).collect()
}

fn all_functions_of(of: Option<DataType>) -> Vec<Function> {
    Function::all().filter(|function| function.output_type(of).is_some()).collect()
}

fn group(name: &str, source: usize, of: Option<&str>, filter: Option<&str>, windows: &[WindowPlan]) -> GroupPlan {
    group_with(functions_of, name, source, of, filter, windows)
}

fn group_with(
    functions_of: impl Fn(Option<DataType>) -> Vec<Function>,
    name: &str,
    source: usize,
    of: Option<&str>,
    filter: Option<&str>,
    windows: &[WindowPlan],
) -> GroupPlan {
    let of = of.map(field);
    let data_type = of.as_ref().map(|of| of.data_type);
    let features = windows.iter().enumerate().flat_map(|(index, window)| {
        let functions = functions_of(data_type).into_iter();
        functions.filter(|function| window.length_ms.is_some() || !function.needs_length()).map(move |function| {
            let data_type = function.output_type(data_type).expect("one of its type's functions");
            (function, index, column(&format!("{name}_{function:?}_{}", window.label), data_type))
        })
    });
    let features = features.collect();
    GroupPlan {
        name: name.to_owned(),
        source,
        of,
        filter: filter.map(str::to_owned),
        half_life_ms: None,
        by: None,
        windows: windows.to_vec(),
        features,
    }
}

/// The features that can decay, with this half-life.
fn decayed(group: GroupPlan, half_life_ms: i64) -> GroupPlan {
    let of = group.of.as_ref().map(|of| of.data_type);
    let decays = group.features.into_iter().filter_map(|(function, window, plain)| {
        function.decayed_type(of).map(|data_type| (function, window, column(&plain.name, data_type)))
    });
    GroupPlan { features: decays.collect(), half_life_ms: Some(half_life_ms), of: group.of, ..group }
}

/// Of the features only lists, none longer than this.
fn only_lists(mut group: GroupPlan, longest: u16) -> GroupPlan {
    group.features.retain(|(function, ..)| matches!(function, Function::LastN(most) if *most <= longest));
    group
}

/// The same features, each for every category.
fn by(group: GroupPlan, name: &str, categories: &[&str]) -> GroupPlan {
    let categories: Vec<String> = categories.iter().map(|&category| category.to_owned()).collect();
    let (mut features, mut of_feature) = (Vec::new(), Vec::new());
    for (index, category) in categories.iter().enumerate() {
        for (function, window, plain) in &group.features {
            features.push((*function, *window, column(&format!("{}_{category}", plain.name), plain.data_type)));
            of_feature.push(index);
        }
    }
    GroupPlan { by: Some(ByPlan { column: field(name), categories, of_feature }), features, ..group }
}

fn plan(sources: Vec<SourcePlan>, groups: Vec<GroupPlan>, on: Option<usize>) -> Plan {
    Plan {
        others: Vec::new(),
        pipeline: None,
        name: "test".to_owned(),
        folder: "test".into(),
        root: "test".into(),
        definition: "0123456789abcdef".to_owned(),
        broker: BrokerPlan::Embedded { path: "data".into(), partitions: 1 },
        online: OnlinePlan::Embedded { path: "data".into(), project: "test".to_owned() },
        offline: OfflinePlan {
            url: "file:///data".to_owned(),
            rows: true,
            checkpoint_interval: Duration::from_secs(30),
            checkpoint_rows: 1000,
        },
        state: StatePlan::default(),
        registry: RegistryPlan { url: "file:///data".to_owned(), initial: None },
        entity: EntityPlan { name: "customer".to_owned(), keys: vec![field("name"), field("number")] },
        sources,
        groups,
        derived: Vec::new(),
        windows: Vec::new(),
        lookups: Vec::new(),
        score: on.map(|on| ScorePlan {
            on,
            model: "m".to_owned(),
            alias: "production".to_owned(),
            features: Vec::new(),
            batch_rows: 1,
            batch_bytes: 1,
            batch_wait: Duration::ZERO,
            poll_alias: Duration::ZERO,
            delivery: Delivery::ExactlyOnce,
            emit: Emit::Arrival,
            topic: "test.predictions".into(),
            providers: Vec::new(),
            threads: 1,
        }),
        labels: None,
        monitor: None,
        retraining: None,
    }
}

fn derived(name: &str, data_type: DataType, sql: &str) -> DerivedPlan {
    DerivedPlan { column: column(name, data_type), sql: sql.to_owned(), looked_up: false }
}

/// Rows of one source, with these offsets.
fn batch(source: usize, events: &[Event], first_offset: i64) -> SourceBatch {
    let due = events.iter().map(|event| event.units.map(|units| units * 1000));
    let arrays: [ArrayRef; 7] = [
        Arc::new(events.iter().map(|event| Some(format!("customer {}", event.key / 2))).collect::<StringArray>()),
        Arc::new(events.iter().map(|event| Some(i64::from(event.key % 2))).collect::<Int64Array>()),
        Arc::new(events.iter().map(|event| event.amount).collect::<Float64Array>()),
        Arc::new(events.iter().map(|event| event.units).collect::<Int64Array>()),
        Arc::new(events.iter().map(|event| event.kind).collect::<StringArray>()),
        Arc::new(due.collect::<TimestampMillisecondArray>().with_timezone("UTC")),
        Arc::new(events.iter().map(|event| event.units.map(|units| units > 2)).collect::<BooleanArray>()),
    ];
    let fields = FIELDS.iter().map(|(name, data_type)| Field::new(*name, data_type.to_arrow(), true));
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    SourceBatch {
        rekeyed: None,
        source,
        partition: 3,
        columns: RecordBatch::try_new(schema, arrays.to_vec()).unwrap(),
        event_times: events.iter().map(|event| event.time).collect(),
        offsets: (first_offset..).take(events.len()).collect(),
        next: first_offset + events.len() as i64,
        read: events.len() as u64,
        filtered: 0,
    }
}

/// One value of a row, comparable to the bit.
#[derive(Debug, Clone, PartialEq)]
enum Cell {
    Null,
    Int(i64),
    Float(u64),
    Text(String),
    List(Vec<Cell>),
}

impl Cell {
    fn float(value: f64) -> Self {
        Self::Float(value.to_bits())
    }
}

fn cell(array: &dyn Array, row: usize) -> Cell {
    if array.is_null(row) {
        return Cell::Null;
    }
    match array.data_type() {
        ArrowType::Int64 => Cell::Int(array.as_primitive::<Int64Type>().value(row)),
        ArrowType::Timestamp(..) => Cell::Int(array.as_primitive::<TimestampMillisecondType>().value(row)),
        ArrowType::Float64 => Cell::float(array.as_primitive::<Float64Type>().value(row)),
        ArrowType::Boolean => Cell::Int(i64::from(array.as_boolean().value(row))),
        ArrowType::Utf8 => Cell::Text(array.as_string::<i32>().value(row).to_owned()),
        ArrowType::List(_) => {
            let items = array.as_list::<i32>().value(row);
            Cell::List((0..items.len()).map(|item| cell(&items, item)).collect())
        }
        other => Cell::Text(format!("{other}")),
    }
}

/// A row by column name, `watermark` left out: it may depend on when sources were idle.
type Row = BTreeMap<String, Cell>;

fn rows(rows: &FeatureRows) -> Vec<(i64, Row)> {
    let schema = rows.batch.schema();
    let row = |index: usize| {
        let columns = schema.fields().iter().zip(rows.batch.columns());
        columns
            .filter(|(field, _)| field.name() != "watermark" && field.name() != "source_partition")
            .map(|(field, array)| (field.name().clone(), cell(array, index)))
            .collect()
    };
    rows.sequence.iter().enumerate().map(|(index, &sequence)| (sequence, row(index))).collect()
}

/// Runs the events of one source through a task with one group, and gives the rows and the online rows.
fn run_one(group: GroupPlan, out_of_order_ms: u64, events: &[Event]) -> (Vec<Row>, Vec<Row>) {
    let engine = Engine::new(&plan(vec![source("purchases", out_of_order_ms)], vec![group], Some(0))).unwrap();
    let mut task = Task::new(engine, 3);
    task.offer(batch(0, events, 0)).unwrap();
    let applied = task.advance(&TaskClock { caught_up: &[true], idle: &[false] }, usize::MAX).unwrap();
    let values = |of: &FeatureRows| rows(of).into_iter().map(|(_, row)| row).collect();
    (values(&applied.rows), values(&applied.online))
}
