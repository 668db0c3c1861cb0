//! The online and offline stores against real servers and real readers: Redis, Feast's SDK, pyarrow, DuckDB.

mod offline;
mod online;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{
    ArrayRef, BooleanArray, Float64Array, Int32Array, Int64Array, ListArray, RecordBatch, StringArray,
    TimestampMillisecondArray,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::Field;
use driftline::config::plan::{
    BrokerPlan, Column, DataType, DerivedPlan, Element, EntityPlan, Function, GroupPlan, OfflinePlan, OnlinePlan, Plan,
    RegistryPlan, StatePlan, WindowPlan,
};
use driftline::store::{GroupRead, Value};
use driftline::window::{FeatureRows, row_columns};

/// One runtime for all stores of the test binary.
fn runtime() -> tokio::runtime::Handle {
    static RUNTIME: std::sync::LazyLock<tokio::runtime::Runtime> = std::sync::LazyLock::new(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
    });
    RUNTIME.handle().clone()
}

/// Runs one of these tests in a process of its own, with variables of its own, and says whether it came to its end.
fn in_child(test: &str, folder: &Path, variables: &[(&str, &str)]) -> bool {
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("stores::{test}"), "--nocapture", "--test-threads=1"])
        .env("DRIFTLINE_TEST_CHILD", folder)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout) + String::from_utf8_lossy(&child.stderr);
    assert!(!text.contains("panicked"), "{text}");
    assert!(!child.status.success() || text.contains("1 passed"), "{text}");
    child.status.success()
}

/// The folder to work in, where this process is such a child.
fn child_folder() -> Option<PathBuf> {
    std::env::var_os("DRIFTLINE_TEST_CHILD").map(PathBuf::from)
}

fn column(name: &str, data_type: DataType) -> Column {
    Column { name: name.into(), data_type }
}

/// A plan with a composite key, features of every type, and derived ones.
fn plan(name: &str, online: OnlinePlan, offline: &str) -> Plan {
    let hour = WindowPlan { label: "1h".into(), length_ms: Some(3_600_000), tile_ms: 60_000 };
    let day = WindowPlan { label: "1d".into(), length_ms: Some(86_400_000), tile_ms: 60_000 };
    let lifetime = WindowPlan { label: "lifetime".into(), length_ms: None, tile_ms: 0 };
    let group = |name: &str, windows: Vec<WindowPlan>, features: Vec<(Function, usize, Column)>| GroupPlan {
        name: name.into(),
        source: 0,
        of: None,
        filter: None,
        half_life_ms: None,
        by: None,
        windows,
        features,
    };
    Plan {
        others: Vec::new(),
        pipeline: None,
        name: name.into(),
        folder: PathBuf::new(),
        root: PathBuf::new(),
        definition: "0123456789abcdef".into(),
        broker: BrokerPlan::Embedded { path: PathBuf::new(), partitions: 1 },
        online,
        offline: OfflinePlan {
            url: offline.into(),
            rows: true,
            checkpoint_interval: Duration::from_secs(30),
            checkpoint_rows: 1000,
        },
        state: StatePlan::default(),
        registry: RegistryPlan { url: String::new(), initial: None },
        entity: EntityPlan {
            name: "customer".into(),
            // Not in the order of their names, which is Feast's.
            keys: vec![column("shop", DataType::Int64), column("customer_id", DataType::String)],
        },
        sources: Vec::new(),
        groups: vec![
            group(
                "spend",
                vec![hour, day],
                vec![
                    (Function::Count, 0, column("spend_count_1h", DataType::Int64)),
                    (Function::Mean, 1, column("spend_mean_1d", DataType::Float64)),
                ],
            ),
            group(
                "visit",
                vec![lifetime],
                vec![
                    (Function::Last, 0, column("city_last_lifetime", DataType::String)),
                    (Function::Last, 0, column("seen_last_lifetime", DataType::Timestamp)),
                    (Function::Last, 0, column("vip_last_lifetime", DataType::Boolean)),
                    (Function::LastN(3), 0, column("counts_last_3_lifetime", DataType::List(Element::Int64))),
                    (Function::LastN(3), 0, column("means_last_3_lifetime", DataType::List(Element::Float64))),
                    (Function::LastN(3), 0, column("cities_last_3_lifetime", DataType::List(Element::String))),
                    (Function::LastN(3), 0, column("seens_last_3_lifetime", DataType::List(Element::Timestamp))),
                    (Function::LastN(3), 0, column("vips_last_3_lifetime", DataType::List(Element::Boolean))),
                ],
            ),
        ],
        windows: Vec::new(),
        lookups: Vec::new(),
        derived: vec![DerivedPlan {
            column: column("ratio", DataType::Float64),
            sql: "spend_mean_1d / 2".into(),
            looked_up: false,
        }],
        score: None,
        labels: None,
        monitor: None,
        retraining: None,
    }
}

/// A feature row of the plan above.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    shop: i64,
    customer: String,
    at: i64,
    sequence: i64,
    count: Option<i64>,
    mean: Option<f64>,
    city: Option<String>,
    seen: Option<i64>,
    vip: Option<bool>,
}

impl Row {
    /// A row whose values follow from who, when and which, so that the same event always gives the same row.
    fn new(shop: i64, customer: &str, at: i64, sequence: i64) -> Self {
        let n = at.rem_euclid(97) * 31 + sequence;
        Self {
            shop,
            customer: customer.into(),
            at,
            sequence,
            count: (n % 5 != 0).then_some(n - 40),
            mean: (n % 7 != 0).then_some(n as f64 / 8.0 - 3.0),
            city: (n % 3 != 0).then(|| format!("Zürich {n}")),
            seen: (n % 4 != 0).then_some((at / 1000 - n) * 1000),
            vip: (n % 2 != 0).then_some(n % 3 == 0),
        }
    }

    fn key(&self) -> [Value; 2] {
        [Value::Int64(self.shop), Value::String(self.customer.clone())]
    }

    /// Of the row's lists: how long they are, and of each value a number that it follows from.
    fn listed(&self) -> Vec<i64> {
        (0..(self.at + self.sequence).rem_euclid(4)).map(|n| n * 7 - self.sequence).collect()
    }

    /// The lists, in the plan's order: numbers, fractions, texts, instants in whole seconds, booleans.
    fn lists(&self) -> [Vec<Value>; 5] {
        let list = |value: fn(i64) -> Value| self.listed().into_iter().map(value).collect();
        [
            list(Value::Int64),
            list(|n| Value::Float64(n as f64 / 8.0)),
            list(|n| Value::String(format!("ü{n}"))),
            list(|n| Value::Timestamp(n * 1000)),
            list(|n| Value::Boolean(n % 2 == 0)),
        ]
    }

    fn ratio(&self) -> Option<f64> {
        self.mean.map(|m| m / 2.0)
    }

    /// What a read of this row must answer.
    fn read(&self) -> Vec<(String, GroupRead)> {
        let found =
            |group: &str, values: Vec<Value>| (group.to_owned(), GroupRead::Found { event_time: self.at, values });
        let or_null = |value: Option<Value>| value.unwrap_or(Value::Null);
        vec![
            found("spend", vec![or_null(self.count.map(Value::Int64)), or_null(self.mean.map(Value::Float64))]),
            found(
                "visit",
                [
                    or_null(self.city.clone().map(Value::String)),
                    or_null(self.seen.map(Value::Timestamp)),
                    or_null(self.vip.map(Value::Boolean)),
                ]
                .into_iter()
                .chain(self.lists().map(Value::List))
                .collect(),
            ),
            found("derived", vec![or_null(self.ratio().map(Value::Float64))]),
        ]
    }
}

/// One of the five lists of these rows.
fn list_column(rows: &[Row], which: usize) -> ArrayRef {
    let items: Vec<Value> = rows.iter().flat_map(|row| row.lists()[which].clone()).collect();
    macro_rules! array {
        ($array:ty, $variant:ident) => {
            items
                .iter()
                .map(|item| if let Value::$variant(item) = item { Some(item.clone()) } else { None })
                .collect::<$array>()
        };
    }
    let items: ArrayRef = match which {
        0 => Arc::new(array!(Int64Array, Int64)),
        1 => Arc::new(array!(Float64Array, Float64)),
        2 => Arc::new(array!(StringArray, String)),
        3 => Arc::new(array!(TimestampMillisecondArray, Timestamp).with_timezone("UTC")),
        _ => Arc::new(array!(BooleanArray, Boolean)),
    };
    let field = Arc::new(Field::new_list_field(items.data_type().clone(), false));
    Arc::new(ListArray::new(field, OffsetBuffer::from_lengths(rows.iter().map(|row| row.listed().len())), items, None))
}

/// What a window would hand over for these rows.
fn feature_rows(rows: &[Row]) -> FeatureRows {
    let times = |values: Vec<Option<i64>>| -> ArrayRef {
        Arc::new(TimestampMillisecondArray::from(values).with_timezone("UTC"))
    };
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("shop", Arc::new(Int64Array::from_iter_values(rows.iter().map(|r| r.shop)))),
        ("customer_id", Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.customer)))),
        (row_columns::EVENT_TIME, times(rows.iter().map(|r| Some(r.at)).collect())),
        (row_columns::SOURCE, Arc::new(StringArray::from_iter_values(rows.iter().map(|_| "purchases")))),
        (row_columns::TOPIC, Arc::new(StringArray::from_iter_values(rows.iter().map(|_| "shop.purchases")))),
        (row_columns::PARTITION, Arc::new(Int32Array::from_iter_values(rows.iter().map(|_| 0)))),
        (row_columns::OFFSET, Arc::new(Int64Array::from_iter_values(rows.iter().map(|r| r.sequence)))),
        (row_columns::WATERMARK, times(rows.iter().map(|r| (r.sequence > 0).then_some(r.at - 10)).collect())),
        ("spend_count_1h", Arc::new(Int64Array::from_iter(rows.iter().map(|r| r.count)))),
        ("spend_mean_1d", Arc::new(Float64Array::from_iter(rows.iter().map(|r| r.mean)))),
        ("city_last_lifetime", Arc::new(StringArray::from_iter(rows.iter().map(|r| r.city.as_deref())))),
        ("seen_last_lifetime", times(rows.iter().map(|r| r.seen).collect())),
        ("vip_last_lifetime", Arc::new(BooleanArray::from_iter(rows.iter().map(|r| r.vip)))),
    ];
    let lists = ["counts", "means", "cities", "seens", "vips"].map(|name| format!("{name}_last_3_lifetime"));
    let lists: Vec<(&str, ArrayRef)> =
        lists.iter().enumerate().map(|(at, name)| (name.as_str(), list_column(rows, at))).collect();
    let ratio: ArrayRef = Arc::new(Float64Array::from_iter(rows.iter().map(Row::ratio)));
    let columns: Vec<_> = columns.into_iter().chain(lists).chain([("ratio", ratio)]).collect();
    // Nullable throughout, whatever this batch holds, so that all batches have one schema.
    let batch = RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true))).unwrap();
    FeatureRows { batch, sequence: rows.iter().map(|r| r.sequence).collect() }
}
