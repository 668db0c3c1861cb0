//! What people write: pipelines, schemas, expressions, and a model's manifest.

use driftline::config;
use driftline::config::plan::{Column, DataType};
use driftline::drift::profile::Profile;
use driftline::model::Bundle;
use driftline::retrain::policy::Policy;
use driftline::source::avro::AvroSchema;
use driftline::source::expression::Expression;
use driftline::source::json_schema::JsonSchema;
use driftline::source::protobuf::Message;

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMillisecondArray,
};
use arrow::datatypes::{Field, Schema};

use crate::protobuf::{self, Oracle};

use super::harness::Target;
use super::mutate::Shape;
use super::records::AVRO_WORDS;
use super::{file, schema};

#[test]
fn pipelines() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("visit.avsc"), schema()).unwrap();
    let churn = std::fs::read(crate::process::root().join("pipelines/churn/pipeline.toml")).unwrap();
    let target = Target {
        name: "pipelines",
        shapes: &[Shape::Text],
        corpus: vec![vec![file("pipeline.toml").into_bytes()], vec![churn]],
        words: &[
            "[broker]",
            "brokers = \"b\"",
            "[features.a]",
            "last",
            "lifetime",
            "0s",
            "1000000w",
            "${A:-x}",
            "\"\"\"",
            "'''",
            "inf",
            "1979-05-27",
            "sum",
            "count",
            "customer",
            "orders",
            "visits",
            "score",
            "monitor",
            "schema = \"visit.avsc\"",
        ],
        cases: 500,
    };
    let path = folder.path().join("pipeline.toml");
    target.run(|parts| {
        std::fs::write(&path, &parts[0]).unwrap();
        match config::load(folder.path(), &|name| (name == "A").then(|| "a".to_owned())) {
            Ok(plan) => assert!(!plan.sources.is_empty()),
            Err(faults) => {
                assert!(!faults.render(false).is_empty());
                faults.to_json_lines();
            }
        }
    });
}

#[test]
fn avro_schemas() {
    let target = Target {
        name: "avro-schemas",
        shapes: &[Shape::Json],
        corpus: vec![
            vec![schema().into_bytes()],
            vec![
                br#"["null", {"type": "record", "name": "a.b", "fields": []}, {"type": "map", "values": "a.b"}]"#
                    .to_vec(),
            ],
        ],
        words: AVRO_WORDS,
        cases: 4_000,
    };
    target.run(|parts| {
        if let Ok(schema) = AvroSchema::parse(&String::from_utf8_lossy(&parts[0])) {
            let _ = schema.fields();
        }
    });
}

#[test]
fn json_schemas() {
    let order = r##"{"$schema": "https://json-schema.org/draft/2020-12/schema", "$ref": "#/$defs/order", "$defs": {
        "money": {"type": ["number", "null"], "minimum": 0},
        "order": {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"},
          "at": {"type": "string", "format": "date-time"}, "amount": {"$ref": "#/$defs/money"},
          "count": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "kind": {"enum": ["a", "b"]},
          "parent": {"$ref": "#/$defs/order"}, "basket": {"allOf": [{"properties": {"size": {"const": 3}}}]}}}}}"##;
    let target = Target {
        name: "json-schemas",
        shapes: &[Shape::Json],
        corpus: vec![vec![order.as_bytes().to_vec()]],
        words: &[
            "type",
            "properties",
            "$ref",
            "$defs",
            "#/$defs/order",
            "#/$defs/money",
            "#",
            "#/properties",
            "allOf",
            "anyOf",
            "oneOf",
            "enum",
            "const",
            "format",
            "date",
            "object",
            "array",
            "integer",
            "%25",
            "~1",
        ],
        cases: 4_000,
    };
    assert_eq!(JsonSchema::parse(order).unwrap().fields().len(), 6);
    target.run(|parts| {
        let text = String::from_utf8_lossy(&parts[0]);
        if let Ok(schema) = JsonSchema::parse(&text) {
            assert!(schema.fields().iter().all(|(name, _)| !name.is_empty()));
        }
    });
}

#[test]
fn descriptor_sets() {
    let oracle = Oracle::run();
    let target = Target {
        name: "descriptor-sets",
        shapes: &[Shape::Bytes],
        corpus: ["new", "old"].map(|schema| vec![oracle.set(schema)]).into(),
        words: &["shop.new.Outer.Event", ".shop.new.Basket", "google.protobuf.Timestamp", "proto3", "editions"],
        cases: 4_000,
    };
    target.run(|parts| {
        for schema in ["new", "old"] {
            if let Ok(message) = Message::find(&parts[0], &format!("shop.{schema}.Outer.Event"))
                && message.fields().len() >= 2
            {
                drop(protobuf::decoder(&message));
            }
        }
    });
}

/// Rows with every type, and nulls and edges in each column.
fn rows() -> (Vec<Column>, RecordBatch) {
    let columns: [(&str, DataType, ArrayRef); 6] = [
        ("amount", DataType::Float64, Arc::new(Float64Array::from(vec![Some(1.5), None, Some(-0.0), Some(f64::MAX)]))),
        ("n", DataType::Int64, Arc::new(Int64Array::from(vec![Some(0), Some(i64::MIN), None, Some(i64::MAX)]))),
        ("quantity", DataType::Int64, Arc::new(Int64Array::from(vec![Some(2), Some(-1), Some(0), None]))),
        ("name", DataType::String, Arc::new(StringArray::from(vec![Some(""), Some("Zoë\0"), None, Some("1e5")]))),
        ("ok", DataType::Boolean, Arc::new(BooleanArray::from(vec![Some(true), Some(false), None, Some(true)]))),
        (
            "at",
            DataType::Timestamp,
            Arc::new(
                TimestampMillisecondArray::from(vec![
                    Some(0),
                    Some(253_402_300_799_999),
                    None,
                    Some(-62_135_596_800_000),
                ])
                .with_timezone("UTC"),
            ),
        ),
    ];
    let schema: Vec<Field> = columns.iter().map(|(name, t, _)| Field::new(*name, t.to_arrow(), true)).collect();
    let plan = columns.iter().map(|(name, t, _)| Column { name: (*name).into(), data_type: *t }).collect();
    let arrays = columns.into_iter().map(|(.., array)| array).collect();
    (plan, RecordBatch::try_new(Arc::new(Schema::new(schema)), arrays).unwrap())
}

#[test]
fn expressions() {
    let (columns, rows) = rows();
    let corpus = [
        "amount / nullif(quantity, 0) > 1.5 and not ok",
        "case when name like 'Z%' then n + 1 when at is null then -quantity else cast(name as double) end",
        "date_part('hour', at) between 8 and 18 or at > timestamp '2024-01-01T00:00:00Z'",
        "coalesce(round(ln(abs(amount)), 2), power(amount, 0.5), sqrt(n)) * 100 % 7",
        "lower(trim(name)) in ('a', 'b') and length(name) < 3",
        "substr(name, 1, 2) || '-' || cast(n as varchar)",
        "regexp_like(name, '^[a-z]+$') and n & 255 = 1",
        "date_trunc('day', at) - interval '1 day'",
    ];
    let target = Target {
        name: "expressions",
        shapes: &[Shape::Text],
        corpus: corpus.iter().map(|sql| vec![sql.as_bytes().to_vec()]).collect(),
        words: &[
            "amount",
            "quantity",
            "name",
            "ok",
            "at",
            "n",
            "and",
            "or",
            "not",
            "is",
            "null",
            "in",
            "between",
            "like",
            "case",
            "when",
            "then",
            "else",
            "end",
            "cast",
            "as",
            "double",
            "bigint",
            "varchar",
            "timestamp",
            "date",
            "boolean",
            "interval",
            "(",
            ")",
            "+",
            "-",
            "*",
            "/",
            "%",
            "||",
            "=",
            "<>",
            "<",
            ">=",
            "nullif",
            "coalesce",
            "abs",
            "round",
            "substr",
            "repeat",
            "lpad",
            "date_trunc",
            "date_part",
            "to_timestamp",
            "power",
            "factorial",
            "chr",
            "select",
            "from",
            "sum",
            "count",
            "array",
            "'",
            "\"",
            "extract",
            "::",
            "at time zone",
            "regexp_replace",
            "log",
            "gcd",
            "lcm",
        ],
        cases: 2_500,
    };
    for input in &target.corpus {
        let sql = String::from_utf8_lossy(&input[0]);
        Expression::compile_all(&sql, &columns).unwrap_or_else(|errors| panic!("{sql}: {errors:?}"));
    }
    target.run(|parts| {
        let sql = String::from_utf8_lossy(&parts[0]);
        Expression::names_in(&sql);
        let _ = Expression::compile_condition(&sql, &columns);
        if let Ok(expression) = Expression::compile_all(&sql, &columns) {
            if let Ok(values) = expression.evaluate_rows(&rows) {
                assert_eq!(values.values.len(), rows.num_rows(), "one value a row");
            }
            let _ = expression.as_filter(&rows);
        }
    });
}

#[test]
fn policies() {
    let target = Target {
        name: "policies",
        shapes: &[Shape::Text],
        corpus: vec![
            vec![b"drifted_features >= 3 for 3 windows or score_drifted and max_psi > 0.25".to_vec()],
            vec![b"drifted_features >= 1 for 2 windows".to_vec()],
        ],
        words: &["drifted_features", "score_drifted", "max_psi", "for", "windows", "and", "or", ">=", "(", ")"],
        cases: 4_000,
    };
    target.run(|parts| drop(Policy::parse(&String::from_utf8_lossy(&parts[0]))));
}

#[test]
fn bundles() {
    let source = crate::process::root().join("pipelines/churn/bundle");
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(&source).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    Bundle::load(folder.path()).expect("a good one");
    let (manifest, profile) = (folder.path().join("bundle.toml"), std::fs::read(source.join("profile.json")).unwrap());
    let target = Target {
        name: "bundles",
        shapes: &[Shape::Text],
        corpus: vec![vec![std::fs::read(&manifest).unwrap()]],
        words: &["format", "files", "signature", "inputs", "float64", "regression", "threshold", "../../etc/passwd"],
        cases: 200,
    };
    target.run(|parts| {
        std::fs::write(&manifest, &parts[0]).unwrap();
        drop(Bundle::load(folder.path()));
    });
    Profile::parse(&profile, "the corpus").expect("a good one");
    let target = Target {
        name: "profiles",
        shapes: &[Shape::Json],
        corpus: vec![vec![profile]],
        words: &["edges", "counts", "missing", "psi_edges", "design_effect", "columns"],
        cases: 500,
    };
    target.run(|parts| {
        if let Ok(profile) = Profile::parse(&parts[0], "fuzz") {
            for column in profile.columns() {
                for value in [f64::NEG_INFINITY, -1.0, 0.0, 0.5, f64::MAX, f64::NAN] {
                    column.bin(value);
                }
                column.median(column.counts());
                column.to_cells(column.counts(), column.missing());
            }
        }
    });
}
