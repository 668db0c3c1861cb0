//! Two versions' feature rows, event by event.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Float64Type, Int32Type, Int64Type, TimestampMillisecondType};
use arrow::util::display::array_value_to_string;
use serde_json::{Value, json};

use super::{Failure, Outcome, Place, printed};
use crate::store::{OfflineStore, Version};
use crate::window::row_columns;

/// Columns that say where a row comes from.
const ORIGINS: [&str; 6] = [
    row_columns::EVENT_TIME,
    row_columns::SOURCE,
    row_columns::TOPIC,
    row_columns::PARTITION,
    row_columns::OFFSET,
    row_columns::WATERMARK,
];

/// An event: topic, partition, offset.
type At = (Arc<str>, i32, i64);

pub(super) fn run(
    place: &Place,
    base: &Version,
    with: &Version,
    tolerance: f64,
    strict: bool,
    as_json: bool,
) -> Outcome {
    if !(0.0..1.0).contains(&tolerance) {
        return Err(Failure::Usage("--tolerance is a part of the value: at least 0 and below 1".into()));
    }
    let (left, right) = (place.files(base)?, place.files(with)?);
    let keys: Vec<&str> = place.plan.entity.keys.iter().map(|key| &*key.name).collect();
    let compared = compare(&left, &right, &keys, tolerance)?;
    let report = compared.report(base.number, with.number, tolerance);
    let mut out = std::io::stdout().lock();
    let shown = if as_json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report).map_err(Failure::failed)?)
    } else {
        write!(out, "{}", render(&report))
    };
    printed(shown)?;
    if strict && compared.differs() {
        return Err(Failure::Failed(format!("versions {} and {} differ", base.number, with.number)));
    }
    Ok(())
}

/// What became of one feature.
#[derive(Debug, Default)]
struct Feature {
    equal: u64,
    differing: u64,
    /// Of those: null on one side.
    null_on_one_side: u64,
    /// Largest difference of two numbers.
    largest: f64,
    /// Event time, coordinates and the two values of the earliest event that differs.
    first: Option<(i64, At, String, String)>,
}

#[derive(Debug, Default)]
struct Compared {
    features: BTreeMap<String, Feature>,
    only_left: Vec<String>,
    only_right: Vec<String>,
    rows: u64,
    rows_equal: u64,
    rows_only_left: u64,
    rows_only_right: u64,
    first_only: Option<At>,
    /// Rows of one version at or after the offset that the other one's checkpoints have come to.
    beyond: u64,
    /// Rows of one version before the first row of the other.
    before: u64,
}

impl Compared {
    fn differs(&self) -> bool {
        self.rows_only_left + self.rows_only_right > 0 || self.features.values().any(|f| f.differing > 0)
    }

    fn report(&self, base: u32, with: u32, tolerance: f64) -> Value {
        let at = |(topic, partition, offset): &At| json!({ "topic": topic, "partition": partition, "offset": offset });
        let features: Vec<Value> = self
            .features
            .iter()
            .map(|(name, f)| {
                let first = f.first.as_ref().map(|(time, event, left, right)| {
                    json!({ "event_time": time, "event": at(event), "base": left, "with": right })
                });
                json!({ "feature": name, "equal": f.equal, "differing": f.differing,
                    "null_on_one_side": f.null_on_one_side, "largest_difference": f.largest, "first": first })
            })
            .collect();
        json!({
            "base": base, "with": with, "tolerance": tolerance,
            "rows": self.rows, "rows_equal": self.rows_equal,
            "rows_only_in_base": self.rows_only_left, "rows_only_in_with": self.rows_only_right,
            "first_row_in_one_only": self.first_only.as_ref().map(at),
            "rows_not_compared": { "before_the_other_begins": self.before, "after_the_other_ends": self.beyond },
            "features": features,
            "features_only_in_base": self.only_left, "features_only_in_with": self.only_right,
        })
    }
}

/// A row that has no partner yet.
struct Waiting {
    batch: Arc<RecordBatch>,
    row: usize,
}

/// One version's rows of one partition, a batch at a time.
struct Side<'a> {
    rows: Box<dyn Iterator<Item = Result<RecordBatch, crate::store::OfflineError>> + 'a>,
    waiting: HashMap<(Arc<str>, i64), Waiting>,
    /// Highest offset taken.
    offset: i64,
    ended: bool,
}

impl<'a> Side<'a> {
    fn new(store: &'a OfflineStore, partition: i32) -> Result<Self, Failure> {
        let rows = store.read_partition(partition).map_err(Failure::failed)?;
        Ok(Self { rows: Box::new(rows), waiting: HashMap::new(), offset: i64::MIN, ended: false })
    }
}

/// Joins both versions' rows, partition by partition. Those without a partner wait; the side that is behind is read on, so
/// that few do where both have their rows in about the same order.
fn compare(left: &OfflineStore, right: &OfflineStore, keys: &[&str], tolerance: f64) -> Result<Compared, Failure> {
    let mut compared = Compared::default();
    let ends = |store: &OfflineStore| -> Result<BTreeMap<i32, crate::broker::Offsets>, Failure> {
        Ok(store.summary().map_err(Failure::failed)?.into_iter().map(|p| (p.partition, p.next)).collect())
    };
    let (left_ends, right_ends) = (ends(left)?, ends(right)?);
    let mut partitions: Vec<i32> = left_ends.keys().chain(right_ends.keys()).copied().collect();
    partitions.sort_unstable();
    partitions.dedup();
    for partition in partitions {
        let mut sides = [Side::new(left, partition)?, Side::new(right, partition)?];
        let mut begins: [HashMap<Arc<str>, i64>; 2] = Default::default();
        while let Some(side) = behind(&sides) {
            let Some(batch) = sides[side].rows.next() else {
                sides[side].ended = true;
                continue;
            };
            let batch = Arc::new(batch.map_err(Failure::failed)?);
            let topics = batch.column_by_name(row_columns::TOPIC).expect("rows of all kinds have it");
            let offsets = column(&batch, row_columns::OFFSET).as_primitive::<Int64Type>();
            let mut known: Option<(String, Arc<str>)> = None;
            for row in 0..batch.num_rows() {
                let text = text(topics, row);
                let topic = match &known {
                    Some((name, topic)) if *name == text => Arc::clone(topic),
                    _ => {
                        let topic: Arc<str> = text.as_str().into();
                        known = Some((text, Arc::clone(&topic)));
                        topic
                    }
                };
                let offset = offsets.value(row);
                sides[side].offset = sides[side].offset.max(offset);
                let begin = begins[side].entry(Arc::clone(&topic)).or_insert(offset);
                *begin = (*begin).min(offset);
                let key = (topic, offset);
                match sides[1 - side].waiting.remove(&key) {
                    None => {
                        sides[side].waiting.insert(key, Waiting { batch: Arc::clone(&batch), row });
                    }
                    Some(partner) => {
                        let mine = Waiting { batch: Arc::clone(&batch), row };
                        let (l, r) = if side == 0 { (&mine, &partner) } else { (&partner, &mine) };
                        compared.pair(l, r, (key.0, partition, offset), keys, tolerance);
                    }
                }
            }
        }
        let end = |ends: &BTreeMap<i32, crate::broker::Offsets>, topic: &Arc<str>| {
            let at = crate::broker::TopicPartition::new(Arc::clone(topic), partition);
            ends.get(&partition).and_then(|next| next.get(&at)).map_or(0, |next| next.0)
        };
        for side in 0..2 {
            let others = if side == 0 { &right_ends } else { &left_ends };
            for (topic, offset) in sides[side].waiting.keys() {
                if *offset >= end(others, topic) {
                    compared.beyond += 1;
                } else if begins[1 - side].get(topic).is_none_or(|begin| offset < begin) {
                    compared.before += 1;
                } else {
                    let at = (Arc::clone(topic), partition, *offset);
                    let first = compared.first_only.get_or_insert_with(|| at.clone());
                    if (first.1, first.2) > (at.1, at.2) {
                        *first = at;
                    }
                    *(if side == 0 { &mut compared.rows_only_left } else { &mut compared.rows_only_right }) += 1;
                }
            }
        }
    }
    Ok(compared)
}

/// The side to read on.
fn behind(sides: &[Side<'_>; 2]) -> Option<usize> {
    match (sides[0].ended, sides[1].ended) {
        (true, true) => None,
        (false, true) => Some(0),
        (true, false) => Some(1),
        (false, false) => Some(usize::from(sides[1].offset < sides[0].offset)),
    }
}

impl Compared {
    fn pair(&mut self, left: &Waiting, right: &Waiting, at: At, keys: &[&str], tolerance: f64) {
        self.rows += 1;
        if self.features.is_empty() && self.only_left.is_empty() && self.only_right.is_empty() {
            let names = |batch: &RecordBatch| -> Vec<String> {
                let names = batch.schema().fields().iter().map(|f| f.name().clone()).collect::<Vec<_>>();
                let of_row = |name: &String| ORIGINS.contains(&name.as_str()) || keys.contains(&name.as_str());
                names.into_iter().filter(|name| !of_row(name)).collect()
            };
            let (l, r) = (names(&left.batch), names(&right.batch));
            self.only_left = l.iter().filter(|name| !r.contains(name)).cloned().collect();
            self.only_right = r.iter().filter(|name| !l.contains(name)).cloned().collect();
            self.features = l.into_iter().filter(|n| r.contains(n)).map(|n| (n, Feature::default())).collect();
        }
        let time =
            column(&left.batch, row_columns::EVENT_TIME).as_primitive::<TimestampMillisecondType>().value(left.row);
        let mut same = true;
        for (name, feature) in &mut self.features {
            let (a, b) = (column(&left.batch, name), column(&right.batch, name));
            match difference(a, left.row, b, right.row, tolerance) {
                Difference::None => feature.equal += 1,
                found => {
                    same = false;
                    feature.differing += 1;
                    match found {
                        Difference::Null => feature.null_on_one_side += 1,
                        Difference::By(by) => feature.largest = feature.largest.max(by),
                        _ => {}
                    }
                    let earlier = |(t, (_, p, o), ..): &(i64, At, String, String)| (time, at.1, at.2) < (*t, *p, *o);
                    if feature.first.as_ref().is_none_or(earlier) {
                        feature.first = Some((time, at.clone(), text(a, left.row), text(b, right.row)));
                    }
                }
            }
        }
        self.rows_equal += u64::from(same);
    }
}

#[derive(Debug, PartialEq)]
enum Difference {
    None,
    /// One is null.
    Null,
    /// Two numbers.
    By(f64),
    /// Two texts or booleans, or values of two types.
    Other,
}

fn difference(a: &ArrayRef, at_a: usize, b: &ArrayRef, at_b: usize, tolerance: f64) -> Difference {
    match (a.is_null(at_a), b.is_null(at_b)) {
        (true, true) => return Difference::None,
        (false, false) => {}
        _ => return Difference::Null,
    }
    let integer = |array: &ArrayRef, at: usize| match array.data_type() {
        DataType::Int64 => Some(array.as_primitive::<Int64Type>().value(at)),
        DataType::Int32 => Some(i64::from(array.as_primitive::<Int32Type>().value(at))),
        DataType::Timestamp(..) => {
            array.as_primitive_opt::<TimestampMillisecondType>().map(|instants| instants.value(at))
        }
        _ => None,
    };
    let number = |array: &ArrayRef, at: usize| match array.data_type() {
        DataType::Float64 => Some(array.as_primitive::<Float64Type>().value(at)),
        _ => integer(array, at).map(|value| value as f64),
    };
    if let (Some(x), Some(y)) = (integer(a, at_a), integer(b, at_b))
        && x == y
    {
        return Difference::None;
    }
    match (number(a, at_a), number(b, at_b)) {
        (Some(x), Some(y)) => {
            let both_whole = integer(a, at_a).is_some() && integer(b, at_b).is_some();
            let by = (x - y).abs();
            // Two whole numbers that are not the same differ, even where they are the same as doubles.
            let equal = if tolerance > 0.0 { by <= tolerance * x.abs().max(y.abs()) } else { !both_whole && x == y };
            if equal { Difference::None } else { Difference::By(by) }
        }
        _ if a.data_type() == b.data_type() && text(a, at_a) == text(b, at_b) => Difference::None,
        _ => Difference::Other,
    }
}

fn column<'a>(batch: &'a RecordBatch, name: &str) -> &'a ArrayRef {
    batch.column_by_name(name).expect("the columns were taken from these files")
}

fn text(column: &ArrayRef, row: usize) -> String {
    if column.is_null(row) { "null".into() } else { array_value_to_string(column, row).unwrap_or_default() }
}

fn render(report: &Value) -> String {
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    let mut out = format!(
        "version {} with version {}: {} rows in both, {} equal; {} only in {}, {} only in {}; not compared: {} before the other begins, {} after the other ends\n",
        report["base"],
        report["with"],
        report["rows"],
        report["rows_equal"],
        report["rows_only_in_base"],
        report["base"],
        report["rows_only_in_with"],
        report["with"],
        report["rows_not_compared"]["before_the_other_begins"],
        report["rows_not_compared"]["after_the_other_ends"],
    );
    for (key, version) in [("features_only_in_base", "base"), ("features_only_in_with", "with")] {
        let names: Vec<&str> = report[key].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if !names.is_empty() {
            out += &format!("only in version {}: {}\n", report[version], names.join(", "));
        }
    }
    let features = report["features"].as_array().into_iter().flatten();
    for feature in features.filter(|feature| number(&feature["differing"]) > 0) {
        let first = &feature["first"];
        out += &format!(
            "{}: {} of {} differ, by at most {} ({} null on one side); first at event time {}, {}-{} offset {}: {} and {}\n",
            feature["feature"].as_str().unwrap_or_default(),
            feature["differing"],
            number(&feature["differing"]) + number(&feature["equal"]),
            feature["largest_difference"],
            feature["null_on_one_side"],
            first["event_time"].as_i64().map(super::instant).unwrap_or_default(),
            first["event"]["topic"].as_str().unwrap_or_default(),
            first["event"]["partition"],
            first["event"]["offset"],
            first["base"].as_str().unwrap_or_default(),
            first["with"].as_str().unwrap_or_default(),
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use arrow::array::{Float64Array, Int64Array, StringArray};
    use rstest::rstest;

    use super::*;

    fn floats(value: Option<f64>) -> ArrayRef {
        Arc::new(Float64Array::from(vec![value]))
    }

    fn whole(value: i64) -> ArrayRef {
        Arc::new(Int64Array::from(vec![value]))
    }

    #[rstest]
    #[case(floats(Some(1.5)), floats(Some(1.5)), 0.0, Difference::None)]
    #[case(floats(Some(1.5)), floats(Some(2.0)), 0.0, Difference::By(0.5))]
    #[case(floats(Some(100.0)), floats(Some(99.0)), 0.01, Difference::None)]
    #[case(floats(Some(100.0)), floats(Some(98.0)), 0.01, Difference::By(2.0))]
    #[case(floats(None), floats(None), 0.0, Difference::None)]
    #[case(floats(None), floats(Some(0.0)), 0.5, Difference::Null)]
    #[case(whole(3), floats(Some(3.0)), 0.0, Difference::None)]
    #[case(whole(9_007_199_254_740_993), whole(9_007_199_254_740_992), 0.0, Difference::By(0.0))]
    #[case(whole(4), whole(7), 0.0, Difference::By(3.0))]
    #[case(Arc::new(StringArray::from(vec!["a"])), Arc::new(StringArray::from(vec!["a"])), 0.0, Difference::None)]
    #[case(Arc::new(StringArray::from(vec!["a"])), Arc::new(StringArray::from(vec!["b"])), 0.0, Difference::Other)]
    #[case(Arc::new(StringArray::from(vec!["1"])), whole(1), 0.0, Difference::Other)]
    fn values_are_compared_as_what_they_are(
        #[case] a: ArrayRef,
        #[case] b: ArrayRef,
        #[case] tolerance: f64,
        #[case] expected: Difference,
    ) {
        assert_eq!(difference(&a, 0, &b, 0, tolerance), expected);
        assert_eq!(difference(&b, 0, &a, 0, tolerance), expected);
    }
}
