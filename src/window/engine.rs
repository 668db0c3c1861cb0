//! A plan's windows, compiled: what each source keeps, and how features are read from it.

use std::ops::Range;
use std::sync::Arc;

use arrow::datatypes::{DataType as ArrowType, Field, Schema, SchemaRef};

use super::aggregate::{self, Lanes, Member, Parts, Span, ValueKind};
use super::emitted::{Emitted, Membership};
use super::entities::Entity;
use super::rows::RowMut;
use super::state::{Layout, State};
use super::tile::{Window, Windows};
use super::{WindowError, row_columns};
use crate::config::plan::{Column, DataType, Function, GroupPlan, OnlinePlan, Plan, SourcePlan, TablePlan, WindowPlan};
use crate::source::expression::{Expression, ExpressionError};

/// The windows of a pipeline, shared by all its tasks.
#[derive(Debug)]
pub struct Engine {
    pub(super) definition: String,
    pub(super) keys: Vec<Column>,
    /// The source whose events ask for rows.
    pub(super) on: Option<usize>,
    /// Rows are held until the watermark has passed them.
    pub(super) event_time: bool,
    /// The newest row of each entity is wanted.
    pub(super) online: bool,
    pub(super) sources: Vec<Source>,
    schema: SchemaRef,
    /// The groups' features, in order.
    pub(super) features: Vec<Column>,
    /// For each feature that is a list: where its values are among the words of a row in the making, behind the one word of
    /// each feature.
    pub(super) lists: Vec<Option<Range<usize>>>,
    /// So many words has a row in the making.
    pub(super) row_words: usize,
    /// Derived features, each over all before it.
    pub(super) derived: Vec<(Column, Expression)>,
    /// Types of features that are looked up later, and null in the rows of a task.
    pub(super) lookups: Vec<DataType>,
    /// Windows that are emitted when they close.
    pub(super) emitted: Vec<Emitted>,
}

/// One source, compiled.
#[derive(Debug)]
pub(super) struct Source {
    pub name: Arc<str>,
    pub topic: Arc<str>,
    pub out_of_order_ms: i64,
    /// It is keyed anew: its event time is that of several partitions.
    pub rekeyed: bool,
    /// Columns that its batches have.
    pub columns: Vec<Column>,
    /// Which of them are the entity's keys, in the entity's order.
    pub key_columns: Vec<usize>,
    /// What is aggregated: the values of a row.
    pub values: Vec<Value>,
    /// Conditions of feature groups.
    pub filters: Vec<Expression>,
    /// For each series: its filter and its value.
    pub series: Vec<(Option<usize>, Option<usize>)>,
    /// Words of a row's mask: the bits of the series that have lanes in states.
    pub kept: Vec<u64>,
    /// Some of its events are in windows that are emitted.
    pub emits: bool,
    pub layout: Layout,
    /// Its features.
    pub readings: Vec<Reading>,
    /// Of a table: the features of its newest row, one for each series. It has no readings then.
    pub table: Option<Vec<Fact>>,
    /// Words of a row, and lanes, that hold the number of a text.
    pub text_words: Vec<usize>,
    pub text_lanes: Vec<usize>,
}

/// A value of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Value {
    /// Column of the source.
    pub column: usize,
    /// The hash of a text stands for it.
    pub hashed: bool,
}

/// A column of a table that is a feature.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fact {
    /// Its bit in the mask of a row says whether the row has a value.
    pub series: usize,
    /// Word of a row that holds the value.
    pub word: usize,
    /// Index among the features.
    pub feature: usize,
}

impl Fact {
    /// The value in a row.
    #[inline]
    pub fn of(self, row: &[u64]) -> Option<u64> {
        (row[1 + self.series / 64] >> (self.series % 64) & 1 == 1).then(|| row[self.word])
    }
}

/// How the features of one series over one window are read.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    pub series: usize,
    /// First lane of the window in the words of all windows.
    pub lanes: usize,
    /// Length of the window; not a number for a lifetime.
    pub seconds: f64,
    /// Those that give one value.
    pub functions: Vec<Function>,
    /// For each function: its index among the features.
    pub columns: Vec<usize>,
    /// Those that give a list: its longest, and its index among the features.
    pub lists: Vec<(u16, usize)>,
}

impl Reading {
    fn new(series: usize, lanes: usize, seconds: f64) -> Self {
        Self { series, lanes, seconds, functions: Vec::new(), columns: Vec::new(), lists: Vec::new() }
    }

    fn add(&mut self, function: Function, column: usize) {
        match function {
            Function::LastN(most) => self.lists.push((most, column)),
            _ => {
                self.functions.push(function);
                self.columns.push(column);
            }
        }
    }

    /// Reads the features off all windows of the source.
    #[inline]
    pub fn read(&self, lanes: &Lanes, windows: &[u64], as_of: i64, row: &mut RowMut<'_>) {
        let own = &windows[self.lanes..];
        let span = Span { as_of, seconds: self.seconds };
        lanes.read(self.series, &self.functions, own, span, |at, value| row.set(self.columns[at], value));
        for &(most, column) in &self.lists {
            row.set_list(column, lanes.read_list(self.series, most, own));
        }
    }
}

impl Engine {
    /// Compiles a plan.
    ///
    /// # Errors
    /// An aggregate of a column that cannot have it, an expression that does not compile, windows that cannot share tiles.
    pub fn new(plan: &Plan) -> Result<Arc<Self>, WindowError> {
        let mut sources = Vec::with_capacity(plan.sources.len());
        let mut emitted: Vec<(usize, Emitted)> = Vec::with_capacity(plan.windows.len());
        for index in 0..plan.sources.len() {
            let mut outline = Outline::new(plan, index)?;
            emitted.append(&mut outline.emitted);
            sources.push(Source::new(plan, &plan.sources[index], outline)?);
        }
        emitted.sort_by_key(|(index, _)| *index);
        let features: Vec<Column> =
            plan.groups.iter().flat_map(|group| group.features.iter().map(|(_, _, column)| column.clone())).collect();
        let mut row_words = features.len();
        let lists = plan.groups.iter().flat_map(|group| &group.features).map(|(function, ..)| match function {
            Function::LastN(most) => {
                let start = row_words;
                row_words += usize::from(*most);
                Some(start..row_words)
            }
            _ => None,
        });
        let lists = lists.collect();
        let mut row = features.clone();
        let mut derived = Vec::with_capacity(plan.derived.len());
        for feature in plan.own_derived() {
            let expression = Expression::compile_all(&feature.sql, &row).map_err(|faults| WindowError::Group {
                group: feature.column.name.to_string(),
                reason: in_words(&faults),
            })?;
            check_type(&feature.column.name, &feature.column, expression.data_type())?;
            row.push(feature.column.clone());
            derived.push((feature.column.clone(), expression));
        }
        Ok(Arc::new(Self {
            definition: plan.definition.clone(),
            keys: plan.entity.keys.clone(),
            on: plan.score.as_ref().map(|score| score.on),
            online: !matches!(plan.online, OnlinePlan::Off),
            event_time: plan.is_in_event_time(),
            sources,
            schema: row_schema(plan),
            features,
            lists,
            row_words,
            derived,
            lookups: plan
                .lookups
                .iter()
                .flat_map(|lookup| lookup.columns.iter().map(|(_, of)| of.data_type))
                .chain(plan.looked_up_derived().map(|derived| derived.column.data_type))
                .collect(),
            emitted: emitted.into_iter().map(|(_, emitted)| emitted).collect(),
        }))
    }

    /// Schema of [`FeatureRows::batch`](super::FeatureRows::batch).
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Number of sources.
    pub fn sources(&self) -> usize {
        self.sources.len()
    }
}

/// The series, windows and features of one source, before anything is compiled.
struct Outline {
    values: Vec<Value>,
    filters: Vec<(String, String)>,
    series: Vec<(Option<usize>, Option<usize>)>,
    kept: Vec<u64>,
    layout: Layout,
    readings: Vec<Reading>,
    table: Option<Vec<Fact>>,
    /// Windows that are emitted, each with its number among the plan's.
    emitted: Vec<(usize, Emitted)>,
}

impl Outline {
    fn new(plan: &Plan, source_index: usize) -> Result<Self, WindowError> {
        let source = &plan.sources[source_index];
        let columns = source_columns(source);
        if let Some(table) = &source.table {
            return Self::of_table(plan, source_index, table, &columns);
        }
        let groups = || plan.groups.iter().filter(|group| group.source == source_index);
        let mut values: Vec<Value> = Vec::new();
        let mut filters: Vec<(String, String)> = Vec::new();
        let mut series: Vec<(Option<usize>, Option<usize>)> = Vec::new();
        let mut lanes: Vec<aggregate::Outline> = Vec::new();
        let mut group_series = Vec::new();
        for group in groups() {
            let (value, hash) = find_values(group, &columns, &mut values)?;
            let mut of_category = Vec::new();
            for condition in conditions(group) {
                let filter = condition.map(|sql| find_filter(group, sql, &mut filters));
                let half_life = group.half_life_ms;
                let mut known = series.iter().zip(&lanes).map(|(series, lanes)| (*series, lanes.half_life));
                let index = known.position(|known| known == ((filter, value), half_life)).unwrap_or_else(|| {
                    let kind = group.of.as_ref().map_or(ValueKind::Event, |of| kind(of.data_type));
                    series.push((filter, value));
                    lanes.push(aggregate::Outline { kind, parts: Parts::default(), value, hash: None, half_life });
                    series.len() - 1
                });
                lanes[index].hash = lanes[index].hash.or(hash);
                of_category.push(index);
            }
            for (at, (function, window, column)) in group.features.iter().enumerate() {
                check_function(group, *function, column)?;
                if function.needs_length() && group.windows[*window].length_ms.is_none() {
                    let reason = format!("a lifetime has no length, and so no {function}");
                    return Err(WindowError::Group { group: group.name.clone(), reason });
                }
                let lanes = &mut lanes[of_category[category(group, at)]];
                lanes.parts.include(*function, lanes.kind);
            }
            group_series.push(of_category);
        }
        let kept = series.len();
        let mut emitted = Vec::new();
        for (number, window) in plan.windows.iter().enumerate().filter(|(_, window)| window.source == source_index) {
            let group = window.as_group();
            let (value, hash) = find_values(&group, &columns, &mut values)?;
            for (function, _, column) in &group.features {
                check_function(&group, *function, column)?;
            }
            let kind = group.of.as_ref().map_or(ValueKind::Event, |of| kind(of.data_type));
            let half_life = group.half_life_ms;
            let outline = aggregate::Outline { kind, parts: Parts::default(), value, hash, half_life };
            let mut member = |condition: Option<String>| {
                let filter = condition.map(|sql| find_filter(&group, sql, &mut filters));
                Member::of(series.iter().position(|known| *known == (filter, value)).unwrap_or_else(|| {
                    series.push((filter, value));
                    // Without lanes: only its mask is of use.
                    let (kind, parts) = (ValueKind::Event, Parts::default());
                    lanes.push(aggregate::Outline { kind, parts, value: None, hash: None, half_life: None });
                    series.len() - 1
                }))
            };
            let all = member(group.filter.clone());
            let categories = match group.by {
                Some(_) => conditions(&group).into_iter().map(member).collect(),
                None => Vec::new(),
            };
            emitted.push((number, Membership { all, categories }, outline));
        }
        let all = || groups().flat_map(|group| &group.windows);
        let finite = all().filter_map(|window| {
            window.length_ms.map(|length| Window { label: window.label.clone(), length, tile: window.tile_ms })
        });
        let windows = Windows::new(&source.name, finite.collect(), all().any(|window| window.length_ms.is_none()))?;
        let layout = Layout::new(Lanes::new(&lanes), windows, values.len());
        let mask_words = layout.lanes.mask_words();
        let compile = |(number, members, outline): (usize, Membership, aggregate::Outline)| {
            let is_text = outline.value.is_some_and(|value| is_text(&columns, &values[value]));
            let windows = &plan.windows[number];
            (number, Emitted::new(windows, &plan.entity.keys, members, outline, mask_words, is_text))
        };
        let emitted = emitted.into_iter().map(compile).collect();
        let mut kept_bits = vec![0; mask_words];
        (0..kept).for_each(|series| kept_bits[series / 64] |= 1 << (series % 64));
        let mut readings: Vec<Reading> = Vec::new();
        let mut first = 0;
        let mut group_series = group_series.into_iter();
        for group in &plan.groups {
            if group.source == source_index {
                let of_category = group_series.next().expect("one a group of this source");
                for (at, (function, window, _)) in group.features.iter().enumerate() {
                    let series = of_category[category(group, at)];
                    let WindowPlan { length_ms: length, tile_ms, .. } = group.windows[*window];
                    let window = layout.windows.index(length, tile_ms).expect("collected above");
                    let lanes = layout.window_lanes(window);
                    let seconds = length.map_or(f64::NAN, |length| length as f64 / 1000.0);
                    let known = readings.iter().position(|reading| (reading.series, reading.lanes) == (series, lanes));
                    let reading = known.unwrap_or_else(|| {
                        readings.push(Reading::new(series, lanes, seconds));
                        readings.len() - 1
                    });
                    readings[reading].add(*function, first + at);
                }
            }
            first += group.features.len();
        }
        Ok(Self { values, filters, series, kept: kept_bits, layout, readings, table: None, emitted })
    }

    /// A table: one series a column, of which nothing is aggregated. Its rows are kept as they are.
    fn of_table(plan: &Plan, source: usize, table: &TablePlan, columns: &[Column]) -> Result<Self, WindowError> {
        let name = &plan.sources[source].name;
        let mut values = Vec::new();
        for of in &table.columns {
            let column = columns.iter().position(|column| column == of).ok_or_else(|| WindowError::Group {
                group: name.to_string(),
                reason: format!("the table has no column `{}` of type {}", of.name, of.data_type.to_arrow()),
            })?;
            values.push(Value { column, hashed: false });
        }
        let series: Vec<_> = (0..values.len()).map(|value| (None, Some(value))).collect();
        let outline = |value: usize| aggregate::Outline {
            kind: ValueKind::Opaque,
            parts: Parts::default(),
            value: Some(value),
            hash: None,
            half_life: None,
        };
        let lanes = Lanes::new(&(0..values.len()).map(outline).collect::<Vec<_>>());
        let layout = Layout::of_table(lanes, Windows::new(name, Vec::new(), true)?, values.len());
        let before = plan.groups.iter().take_while(|group| group.source != source);
        let first: usize = before.map(|group| group.features.len()).sum();
        let fact = |series: usize| Fact { series, word: layout.value_word(series), feature: first + series };
        let facts = (0..values.len()).map(fact).collect();
        let kept = vec![u64::MAX; layout.lanes.mask_words()];
        Ok(Self {
            values,
            filters: Vec::new(),
            series,
            kept,
            layout,
            readings: Vec::new(),
            table: Some(facts),
            emitted: Vec::new(),
        })
    }
}

impl Source {
    fn new(plan: &Plan, source: &SourcePlan, outline: Outline) -> Result<Self, WindowError> {
        let columns = source_columns(source);
        let mut filters = Vec::with_capacity(outline.filters.len());
        for (group, sql) in outline.filters {
            filters.push(
                Expression::compile_condition(&sql, &columns)
                    .map_err(|faults| WindowError::Group { group, reason: in_words(&faults) })?,
            );
        }
        let mut key_columns = Vec::with_capacity(source.key_fields.len());
        for (field, key) in source.key_fields.iter().zip(&plan.entity.keys) {
            let column = columns.iter().position(|column| column.name == *field && column.data_type == key.data_type);
            key_columns.push(column.ok_or_else(|| WindowError::Group {
                group: source.name.to_string(),
                reason: format!("the source has no field `{field}` of the type of key `{}`", key.name),
            })?);
        }
        let text = |value: &usize| is_text(&columns, &outline.values[*value]);
        let layout = outline.layout;
        let text_words = (0..outline.values.len()).filter(text).map(|value| layout.value_word(value)).collect();
        let text_lanes = outline
            .series
            .iter()
            .enumerate()
            .filter(|(_, (_, value))| value.as_ref().is_some_and(text))
            .flat_map(|(series, _)| layout.lanes.value_lanes(series))
            .collect();
        Ok(Self {
            name: source.name.clone(),
            topic: source.topic.clone(),
            out_of_order_ms: i64::try_from(source.out_of_order.as_millis()).unwrap_or(i64::MAX),
            rekeyed: source.rekeyed.is_some(),
            columns,
            key_columns,
            values: outline.values,
            filters,
            series: outline.series,
            kept: outline.kept,
            emits: plan.windows.iter().any(|window| *plan.sources[window.source].name == *source.name),
            layout,
            readings: outline.readings,
            table: outline.table,
            text_words,
            text_lanes,
        })
    }
}

/// True where a value is the number of a text.
fn is_text(columns: &[Column], value: &Value) -> bool {
    columns[value.column].data_type == DataType::String && !value.hashed
}

/// Columns of a source's batches.
fn source_columns(source: &SourcePlan) -> Vec<Column> {
    source.fields.iter().chain(source.derive.iter().map(|(column, _)| column)).cloned().collect()
}

/// What is true of the events of each category of a group; of all its events, where it has none.
fn conditions(group: &GroupPlan) -> Vec<Option<String>> {
    let Some(by) = &group.by else { return vec![group.filter.clone()] };
    let of_category = (0..by.categories.len()).map(|category| by.condition(category));
    // The filter may end in a comment.
    let both = |condition| match &group.filter {
        Some(filter) => format!("({filter}\n) and {condition}"),
        None => condition,
    };
    of_category.map(both).map(Some).collect()
}

/// Index of a condition among a source's, each of which is computed once.
fn find_filter(group: &GroupPlan, sql: String, filters: &mut Vec<(String, String)>) -> usize {
    filters.iter().position(|(_, known)| *known == sql).unwrap_or_else(|| {
        filters.push((group.name.clone(), sql));
        filters.len() - 1
    })
}

/// Index of the category of a group's feature.
fn category(group: &GroupPlan, feature: usize) -> usize {
    group.by.as_ref().map_or(0, |by| by.of_feature[feature])
}

/// The value that a group aggregates, and that of its hash, where the group needs one.
fn find_values(
    group: &GroupPlan,
    columns: &[Column],
    values: &mut Vec<Value>,
) -> Result<(Option<usize>, Option<usize>), WindowError> {
    let Some(of) = &group.of else { return Ok((None, None)) };
    let column = columns.iter().position(|column| column == of).ok_or_else(|| WindowError::Group {
        group: group.name.clone(),
        reason: format!("its source has no column `{}` of type {}", of.name, of.data_type.to_arrow()),
    })?;
    let mut place = |value: Value| {
        values.iter().position(|known| *known == value).unwrap_or_else(|| {
            values.push(value);
            values.len() - 1
        })
    };
    let asks = |asked: fn(Function) -> bool| group.features.iter().any(|(function, ..)| asked(*function));
    let compares = |function| matches!(function, Function::Distinct | Function::Top(_));
    if of.data_type != DataType::String || !asks(compares) {
        return Ok((Some(place(Value { column, hashed: false })), None));
    }
    let hash = place(Value { column, hashed: true });
    // Texts are not kept where nothing gives them back: of what is worth counting there may be many.
    let given_back =
        |function| matches!(function, Function::First | Function::Last | Function::LastN(_) | Function::Top(_));
    let given_back = asks(given_back);
    let value = if given_back { place(Value { column, hashed: false }) } else { hash };
    Ok((Some(value), Some(hash)))
}

fn kind(data_type: DataType) -> ValueKind {
    match data_type {
        DataType::Int64 | DataType::Timestamp => ValueKind::Integer,
        DataType::Float64 => ValueKind::Float,
        DataType::Boolean | DataType::String | DataType::List(_) => ValueKind::Opaque,
    }
}

fn check_function(group: &GroupPlan, function: Function, column: &Column) -> Result<(), WindowError> {
    let found = group.output_type(function).ok_or_else(|| WindowError::Group {
        group: group.name.clone(),
        reason: match &group.of {
            _ if group.half_life_ms.is_some() => format!("{function} cannot decay: only count, sum and mean can"),
            Some(of) => {
                format!("{function} cannot be taken of `{}`, which is {}", of.name, of.data_type.to_arrow())
            }
            None => format!("{function} needs a column: set `of`"),
        },
    })?;
    check_type(&group.name, column, found)
}

fn check_type(group: &str, column: &Column, found: DataType) -> Result<(), WindowError> {
    if column.data_type == found {
        return Ok(());
    }
    let (planned, found) = (column.data_type.to_arrow(), found.to_arrow());
    Err(WindowError::Group {
        group: group.to_owned(),
        reason: format!("feature `{}` is {found}, but the plan has it as {planned}", column.name),
    })
}

fn in_words(faults: &[ExpressionError]) -> String {
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn row_schema(plan: &Plan) -> SchemaRef {
    let time = DataType::Timestamp.to_arrow();
    let keys = plan.entity.keys.iter().map(|key| Field::new(key.name.as_ref(), key.data_type.to_arrow(), false));
    let meta = [
        Field::new(row_columns::EVENT_TIME, time.clone(), false),
        Field::new(row_columns::SOURCE, ArrowType::Utf8, false),
        Field::new(row_columns::TOPIC, ArrowType::Utf8, false),
        Field::new(row_columns::PARTITION, ArrowType::Int32, false),
        Field::new(row_columns::OFFSET, ArrowType::Int64, false),
        Field::new(row_columns::WATERMARK, time, true),
    ];
    let features = plan.feature_columns();
    let features = features.iter().map(|column| Field::new(column.name.as_ref(), column.data_type.to_arrow(), true));
    Arc::new(Schema::new(keys.chain(meta).chain(features).collect::<Vec<_>>()))
}

/// Prediction of an entity's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateBytes {
    /// With one event in every source.
    pub least: usize,
    /// With events in every tile of every window. Events within a source's out-of-order bound and those of exact windows
    /// come on top.
    pub most: usize,
    /// What exact windows keep besides, by source that has any.
    pub single: Vec<SingleEvents>,
    /// For each of the plan's emitted windows: of a pane or a session.
    pub windows: Vec<usize>,
}

/// The single events that a source's exact windows keep of one entity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SingleEvents {
    /// Index of the source in the plan.
    pub source: usize,
    /// All events of so many milliseconds are kept: the longest exact window.
    pub length_ms: i64,
    /// Bytes each.
    pub bytes: usize,
    /// Bytes each in memory where the events are on disk.
    pub spilled: usize,
}

/// Predicts the bytes of state of one entity, its key taken to have 16 bytes.
///
/// # Errors
/// As [`Engine::new`], but for expressions.
pub fn state_bytes(plan: &Plan) -> Result<StateBytes, WindowError> {
    let entity = size_of::<Entity>() + 2 * size_of::<u32>() + 20;
    let mut bytes =
        StateBytes { least: entity, most: entity, single: Vec::new(), windows: vec![0; plan.windows.len()] };
    for source in 0..plan.sources.len() {
        let Outline { layout, emitted, .. } = Outline::new(plan, source)?;
        emitted.iter().for_each(|(number, emitted)| bytes.windows[*number] = emitted.piece_bytes());
        let (least, most) = layout.state_bytes();
        bytes.least += size_of::<State>() + least;
        bytes.most += size_of::<State>() + most;
        if !layout.windows.exact().is_empty() {
            let length_ms = layout.windows.longest_exact();
            let (each, spilled) = (layout.single_event_bytes(), layout.spilled_event_bytes());
            bytes.single.push(SingleEvents { source, length_ms, bytes: each, spilled });
        }
    }
    Ok(bytes)
}
