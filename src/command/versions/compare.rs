//! Two versions' feature rows, event by event, and their rows of emitted windows, window by window.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::io::Write as _;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Float64Type, Int32Type, Int64Type, TimestampMillisecondType};
use arrow::util::display::array_value_to_string;
use serde_json::{Value, json};

use super::{Failure, Outcome, Place, printed};
use crate::broker::{Offsets, TopicPartition};
use crate::store::{OfflineError, OfflineStore, Version};
use crate::window::{emitted_columns, row_columns};

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
    let stores = Stores::open([&left, &right])?;
    let compared = stores.features(&keys, tolerance)?;
    let (mut windows, mut differ) = (Vec::new(), compared.differs());
    let [left_only, right_only, both] = stores.windows()?;
    for name in both {
        let source = place.plan.windows.iter().find(|table| table.name == name).map(|table| table.source);
        // A table that pipeline.toml does not have any more tells no topic; nearly all pipelines have one.
        let topic: &str = match source {
            Some(source) => &place.plan.sources[source].topic,
            None => base.topics.first().map_or("", String::as_str),
        };
        let compared = stores.emitted(&name, topic, &keys, tolerance)?;
        differ |= compared.differs();
        let mut table = compared.report();
        table["window"] = name.into();
        windows.push(table);
    }
    let mut report = compared.report();
    for (key, value) in [
        ("base", json!(base.number)),
        ("with", json!(with.number)),
        ("tolerance", json!(tolerance)),
        ("windows", json!(windows)),
        ("windows_only_in_base", json!(left_only)),
        ("windows_only_in_with", json!(right_only)),
    ] {
        report[key] = value;
    }
    let mut out = std::io::stdout().lock();
    let shown = if as_json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report).map_err(Failure::failed)?)
    } else {
        write!(out, "{}", render(&report))
    };
    printed(shown)?;
    if strict && differ {
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

    fn report(&self) -> Value {
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
            "rows": self.rows, "rows_equal": self.rows_equal,
            "rows_only_in_base": self.rows_only_left, "rows_only_in_with": self.rows_only_right,
            "first_row_in_one_only": self.first_only.as_ref().map(at),
            "rows_not_compared": { "before_the_other_begins": self.before, "after_the_other_ends": self.beyond },
            "features": features,
            "features_only_in_base": self.only_left, "features_only_in_with": self.only_right,
        })
    }
}

/// What tells rows apart, and what is compared of them.
struct Rules<'a> {
    /// Columns that are not compared, …
    origins: &'a [&'a str],
    /// … nor are the keys.
    keys: &'a [&'a str],
    /// The column with the instant of a row.
    time: &'a str,
    tolerance: f64,
}

/// A row that has no partner yet.
struct Waiting {
    batch: Arc<RecordBatch>,
    row: usize,
    /// Topic and offset of its event.
    at: (Arc<str>, i64),
}

/// One version's rows of one partition, a batch at a time.
type Rows<'a> = Box<dyn Iterator<Item = Result<RecordBatch, OfflineError>> + 'a>;

struct Side<'a, K> {
    rows: Rows<'a>,
    waiting: HashMap<K, Waiting>,
    /// First offset taken, by topic.
    begins: HashMap<Arc<str>, i64>,
    /// Highest offset taken.
    offset: i64,
    ended: bool,
}

/// Both versions' files, and where their checkpoints have come to.
struct Stores<'a> {
    of: [&'a OfflineStore; 2],
    ends: [BTreeMap<i32, Offsets>; 2],
}

impl<'a> Stores<'a> {
    fn open(of: [&'a OfflineStore; 2]) -> Result<Self, Failure> {
        let mut ends = [BTreeMap::new(), BTreeMap::new()];
        for (store, ends) in of.iter().zip(&mut ends) {
            ends.extend(store.summary().map_err(Failure::failed)?.into_iter().map(|p| (p.partition, p.next)));
        }
        Ok(Self { of, ends })
    }

    fn partitions(&self) -> BTreeSet<i32> {
        self.ends.iter().flat_map(|ends| ends.keys().copied()).collect()
    }

    /// Names of the emitted windows of the first version alone, of the second alone, of both.
    fn windows(&self) -> Result<[Vec<String>; 3], Failure> {
        let [left, right] = self.of.map(OfflineStore::windows);
        let (left, right) = (left.map_err(Failure::failed)?, right.map_err(Failure::failed)?);
        let names = |names: &mut dyn Iterator<Item = &String>| names.cloned().collect::<Vec<_>>();
        Ok([
            names(&mut left.difference(&right)),
            names(&mut right.difference(&left)),
            names(&mut left.intersection(&right)),
        ])
    }

    /// Feature rows: of the same event.
    fn features(&self, keys: &[&str], tolerance: f64) -> Result<Compared, Failure> {
        let rules = Rules { origins: &ORIGINS, keys, time: row_columns::EVENT_TIME, tolerance };
        let mut compared = Compared::default();
        for partition in self.partitions() {
            let identify = |batch: &RecordBatch| {
                let topics = batch.column_by_name(row_columns::TOPIC).expect("rows of all kinds have it");
                let offsets = column(batch, row_columns::OFFSET).as_primitive::<Int64Type>();
                let mut known: Option<(String, Arc<str>)> = None;
                let identity = |row| {
                    let text = text(topics, row);
                    if known.as_ref().is_none_or(|(name, _)| *name != text) {
                        known = Some((text.clone(), text.as_str().into()));
                    }
                    let topic = known.as_ref().map(|(_, topic)| Arc::clone(topic)).expect("it was set just now");
                    let at = (topic, offsets.value(row));
                    (at.clone(), at)
                };
                (0..batch.num_rows()).map(identity).collect()
            };
            let [left, right] = self.of.map(|store| store.read_partition(partition).map_err(Failure::failed));
            let sides: [Rows<'_>; 2] = [Box::new(left?), Box::new(right?)];
            compared.join(partition, sides, &self.ends, &identify, &rules)?;
        }
        Ok(compared)
    }

    /// Rows of emitted windows: the last one of the same window, or early results at the same event.
    fn emitted(&self, window: &str, topic: &str, keys: &[&str], tolerance: f64) -> Result<Compared, Failure> {
        let rules = Rules { origins: emitted_columns::ALL, keys, time: emitted_columns::END, tolerance };
        let topic: Arc<str> = topic.into();
        let mut compared = Compared::default();
        for partition in self.partitions() {
            let identify = |batch: &RecordBatch| {
                let keys: Vec<&ArrayRef> = keys.iter().map(|key| column(batch, key)).collect();
                let time = |name| column(batch, name).as_primitive::<TimestampMillisecondType>();
                let (starts, ends) = (time(emitted_columns::START), time(emitted_columns::END));
                let offsets = column(batch, emitted_columns::OFFSET).as_primitive::<Int64Type>();
                let last = column(batch, emitted_columns::FINAL).as_boolean();
                let identity = |row| {
                    let entity: Vec<String> = keys.iter().map(|key| text(key, row)).collect();
                    let early = (!last.value(row)).then(|| offsets.value(row));
                    let key = (entity, starts.value(row), ends.value(row), early);
                    (key, (Arc::clone(&topic), offsets.value(row)))
                };
                (0..batch.num_rows()).map(identity).collect()
            };
            let [left, right] = self.of.map(|store| store.read_windows(window, partition).map_err(Failure::failed));
            let sides: [Rows<'_>; 2] = [Box::new(left?), Box::new(right?)];
            compared.join(partition, sides, &self.ends, &identify, &rules)?;
        }
        Ok(compared)
    }
}

/// Of each row of a batch: what its partner has, too, and topic and offset of its event.
type Identify<'a, K> = &'a dyn Fn(&RecordBatch) -> Vec<(K, (Arc<str>, i64))>;

impl Compared {
    /// Joins both versions' rows of a partition. Those without a partner wait; the side that is behind is read on, so that few
    /// do where both have their rows in about the same order.
    fn join<K: Hash + Eq>(
        &mut self,
        partition: i32,
        sides: [Rows<'_>; 2],
        ends: &[BTreeMap<i32, Offsets>; 2],
        identify: Identify<'_, K>,
        rules: &Rules<'_>,
    ) -> Result<(), Failure> {
        let mut sides = sides.map(|rows| Side {
            rows,
            waiting: HashMap::new(),
            begins: HashMap::new(),
            offset: i64::MIN,
            ended: false,
        });
        while let Some(side) = behind(&sides) {
            let Some(batch) = sides[side].rows.next() else {
                sides[side].ended = true;
                continue;
            };
            let batch = Arc::new(batch.map_err(Failure::failed)?);
            for (row, (key, at)) in identify(&batch).into_iter().enumerate() {
                let own = &mut sides[side];
                own.offset = own.offset.max(at.1);
                let begin = own.begins.entry(Arc::clone(&at.0)).or_insert(at.1);
                *begin = (*begin).min(at.1);
                let mine = Waiting { batch: Arc::clone(&batch), row, at };
                match sides[1 - side].waiting.remove(&key) {
                    None => {
                        sides[side].waiting.insert(key, mine);
                    }
                    Some(partner) => {
                        let (l, r) = if side == 0 { (&mine, &partner) } else { (&partner, &mine) };
                        self.pair(l, r, (Arc::clone(&l.at.0), partition, l.at.1), rules);
                    }
                }
            }
        }
        for side in 0..2 {
            let other = &sides[1 - side];
            for Waiting { at: (topic, offset), .. } in sides[side].waiting.values() {
                let at = TopicPartition::new(Arc::clone(topic), partition);
                let end = ends[1 - side].get(&partition).and_then(|next| next.get(&at)).map_or(0, |next| next.0);
                if *offset >= end {
                    self.beyond += 1;
                } else if other.begins.get(topic).is_none_or(|begin| offset < begin) {
                    self.before += 1;
                } else {
                    let at = (Arc::clone(topic), partition, *offset);
                    let first = self.first_only.get_or_insert_with(|| at.clone());
                    if (first.1, first.2) > (at.1, at.2) {
                        *first = at;
                    }
                    *(if side == 0 { &mut self.rows_only_left } else { &mut self.rows_only_right }) += 1;
                }
            }
        }
        Ok(())
    }
}

/// The side to read on.
fn behind<K>(sides: &[Side<'_, K>; 2]) -> Option<usize> {
    match (sides[0].ended, sides[1].ended) {
        (true, true) => None,
        (false, true) => Some(0),
        (true, false) => Some(1),
        (false, false) => Some(usize::from(sides[1].offset < sides[0].offset)),
    }
}

impl Compared {
    fn pair(&mut self, left: &Waiting, right: &Waiting, at: At, rules: &Rules<'_>) {
        self.rows += 1;
        if self.features.is_empty() && self.only_left.is_empty() && self.only_right.is_empty() {
            let names = |batch: &RecordBatch| -> Vec<String> {
                let names = batch.schema().fields().iter().map(|f| f.name().clone()).collect::<Vec<_>>();
                let of_row =
                    |name: &String| rules.origins.contains(&name.as_str()) || rules.keys.contains(&name.as_str());
                names.into_iter().filter(|name| !of_row(name)).collect()
            };
            let (l, r) = (names(&left.batch), names(&right.batch));
            self.only_left = l.iter().filter(|name| !r.contains(name)).cloned().collect();
            self.only_right = r.iter().filter(|name| !l.contains(name)).cloned().collect();
            self.features = l.into_iter().filter(|n| r.contains(n)).map(|n| (n, Feature::default())).collect();
        }
        let time = column(&left.batch, rules.time).as_primitive::<TimestampMillisecondType>().value(left.row);
        let mut same = true;
        for (name, feature) in &mut self.features {
            let (a, b) = (column(&left.batch, name), column(&right.batch, name));
            match difference(a, left.row, b, right.row, rules.tolerance) {
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
    let mut out = format!("version {} with version {}: ", report["base"], report["with"]);
    out += &render_rows(report, report);
    for (key, version) in [("windows_only_in_base", "base"), ("windows_only_in_with", "with")] {
        out += &only(report, key, "windows ", &report[version]);
    }
    for table in report["windows"].as_array().into_iter().flatten() {
        out += &format!("windows {}: ", table["window"].as_str().unwrap_or_default());
        out += &render_rows(table, report);
    }
    out
}

/// What is in one version only.
fn only(of: &Value, key: &str, what: &str, version: &Value) -> String {
    let names: Vec<&str> = of[key].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if names.is_empty() { String::new() } else { format!("only in version {version}: {what}{}\n", names.join(", ")) }
}

/// Feature rows, or those of one table of windows; `versions` says which versions they are of.
fn render_rows(report: &Value, versions: &Value) -> String {
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    let (base, with) = (&versions["base"], &versions["with"]);
    let mut out = format!(
        "{} rows in both, {} equal; {} only in {base}, {} only in {with}; not compared: {} before the other begins, {} after the other ends\n",
        report["rows"],
        report["rows_equal"],
        report["rows_only_in_base"],
        report["rows_only_in_with"],
        report["rows_not_compared"]["before_the_other_begins"],
        report["rows_not_compared"]["after_the_other_ends"],
    );
    out += &only(report, "features_only_in_base", "", base);
    out += &only(report, "features_only_in_with", "", with);
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
