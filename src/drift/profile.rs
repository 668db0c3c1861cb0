//! The reference profile of a model version: how each feature and the score were distributed where it was trained.
//!
//! A profile is frozen histograms. Column by column:
//!
//! - **Edges**: at most 200. A column with fewer than 200 distinct values has an edge at each of them, and one just below the
//!   smallest; any other has the lower quantiles at k/200, tied ones merged. Bin 0 is (−∞, `edges[0]`], bin i is
//!   (`edges[i − 1]`, `edges[i]`], the last is above all edges. Missing values (absent, NaN, ±∞) are counted apart.
//! - **Cells**: the bins merged to at most 20 of about equal mass, for PSI and the verdict: cell k ends at the first edge below
//!   or at which k/20 of the values lie. Where there is room, a bin below all reference values stays a cell of its own.
//! - **Design effect**: how many times wider the χ² of a window against the rest of the reference spreads than independent
//!   rows would make it, at least 1, told from consecutive windows of `window_rows` rows. It absorbs autocorrelation and
//!   seasonality.
//!
//! `pipelines/churn/reference_profile.py` is the same rule in Python, for trainers.

use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::source::skip::nests_too_deeply;

/// Least windows that a design effect is estimated from; they are shorter than asked for where there would be fewer.
const LEAST_WINDOWS: u64 = 10;
/// Standard deviations from which on a column's own excess of spread is more than chance.
const SURE: f64 = 3.0;
/// The excess is enlarged by this over the number of windows that tell it.
const CAUTION: f64 = 10.0;
/// Least expected count of a cell whose windows are compared.
const LEAST_EXPECTED: f64 = 5.0;
/// Most edges that the builder makes.
const EDGES: usize = 200;
/// Most cells that the builder makes, the missing one not counted.
const CELLS: usize = 20;
/// Most edges that a file may have: what a trainer asks for beyond this costs memory and shows nothing.
const MOST_EDGES: usize = 4096;
/// Most ends of cells that a file may have.
const MOST_CELL_ENDS: usize = 64;
/// The only format so far.
const FORMAT: u32 = 1;

/// Reference distributions of a model version: `profile.json` of its bundle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    format: u32,
    rows: u64,
    from: i64,
    to: i64,
    window_rows: u64,
    columns: Vec<ColumnProfile>,
}

/// Reference distribution of one column.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "ColumnFile", into = "ColumnFile")]
pub struct ColumnProfile {
    name: String,
    edges: Vec<f64>,
    counts: Vec<u64>,
    missing: u64,
    cell_ends: Vec<usize>,
    design_effect: f64,
    /// Counts of the cells, then of the missing ones.
    cells: Vec<u64>,
}

/// A column as the file has it.
#[derive(Serialize, Deserialize)]
struct ColumnFile {
    name: String,
    edges: Vec<f64>,
    counts: Vec<u64>,
    missing: u64,
    psi_edges: Vec<usize>,
    design_effect: f64,
}

impl From<ColumnFile> for ColumnProfile {
    fn from(file: ColumnFile) -> Self {
        let ColumnFile { name, edges, counts, missing, psi_edges, design_effect } = file;
        let cells = merge_bins(&psi_edges, &counts, missing);
        Self { name, edges, counts, missing, cell_ends: psi_edges, design_effect, cells }
    }
}

impl From<ColumnProfile> for ColumnFile {
    fn from(column: ColumnProfile) -> Self {
        let ColumnProfile { name, edges, counts, missing, cell_ends, design_effect, cells: _ } = column;
        Self { name, edges, counts, missing, psi_edges: cell_ends, design_effect }
    }
}

/// What can be wrong with a profile.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// The file cannot be read.
    #[error("reference profile {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// It is not JSON, or not of a profile's shape.
    #[error("reference profile {origin} is not a profile: {reason}; train.py writes it, see docs/configuration.md")]
    Malformed {
        /// Where it came from.
        origin: String,
        /// The parser's words, with line and column.
        reason: String,
    },
    /// It has the shape, but cannot be true.
    #[error("reference profile {origin}, {at}: {reason}")]
    Invalid {
        /// Where it came from.
        origin: String,
        /// Which part of it: `columns[3] 'spend_sum_30d'.edges[17]`.
        at: String,
        /// What is wrong.
        reason: String,
    },
    /// Two profiles that do not have the same bins.
    #[error("profiles cannot be merged: {reason}; only profiles with the same frozen edges can")]
    Unlike {
        /// The first difference.
        reason: String,
    },
}

impl Profile {
    /// Reads `profile.json`.
    ///
    /// # Errors
    /// Where the file cannot be read, is no profile, or contradicts itself.
    pub fn read(path: &std::path::Path) -> Result<Self, ProfileError> {
        let bytes = std::fs::read(path).map_err(|source| ProfileError::Io { path: path.to_owned(), source })?;
        Self::parse(&bytes, &path.display().to_string())
    }

    /// Parses the JSON text of a profile. `origin` names it in errors.
    ///
    /// # Errors
    /// Where it is no profile, or contradicts itself.
    pub fn parse(json: &[u8], origin: &str) -> Result<Self, ProfileError> {
        if nests_too_deeply(json) {
            let reason = "it is nested more deeply than any profile".to_owned();
            return Err(ProfileError::Malformed { origin: origin.to_owned(), reason });
        }
        // Not serde_json: without its slower mode it may miss the nearest double by one, and a value must share its edge's bin.
        let profile: Self = sonic_rs::from_slice(json)
            .map_err(|error| ProfileError::Malformed { origin: origin.to_owned(), reason: error.to_string() })?;
        profile
            .check()
            .map_err(|(at, reason)| ProfileError::Invalid { origin: origin.to_owned(), at, reason })
            .map(|()| profile)
    }

    /// The JSON text of this profile.
    pub fn to_json(&self) -> String {
        sonic_rs::to_string(self).expect("numbers, strings and lists always have a JSON form")
    }

    /// Rows that the profile is made of.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Event times of the first and the last row, milliseconds since 1970 UTC, both inclusive.
    pub fn range(&self) -> (i64, i64) {
        (self.from, self.to)
    }

    /// Rows of the windows that the design effects speak of.
    pub fn window_rows(&self) -> u64 {
        self.window_rows
    }

    /// All columns.
    pub fn columns(&self) -> &[ColumnProfile] {
        &self.columns
    }

    /// The column of this name.
    pub fn column(&self, name: &str) -> Option<&ColumnProfile> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// Adds another profile with the same columns and edges. Design effects are averaged by rows.
    ///
    /// # Errors
    /// Where the columns or the edges differ; the profile is then unchanged.
    pub fn merge(&mut self, other: &Self) -> Result<(), ProfileError> {
        let unlike = |reason: String| Err(ProfileError::Unlike { reason });
        if self.window_rows != other.window_rows {
            return unlike(format!("design effects of {} and {} rows", self.window_rows, other.window_rows));
        }
        if self.columns.len() != other.columns.len() {
            return unlike(format!("{} and {} columns", self.columns.len(), other.columns.len()));
        }
        for (mine, theirs) in self.columns.iter().zip(&other.columns) {
            if mine.name != theirs.name {
                return unlike(format!("columns '{}' and '{}'", mine.name, theirs.name));
            }
            if mine.edges != theirs.edges || mine.cell_ends != theirs.cell_ends {
                return unlike(format!("edges of '{}'", mine.name));
            }
        }
        let rows = self.rows + other.rows;
        let share = |of: u64| if rows == 0 { 0.5 } else { of as f64 / rows as f64 };
        for (mine, theirs) in self.columns.iter_mut().zip(&other.columns) {
            add(&mut mine.counts, &theirs.counts);
            add(&mut mine.cells, &theirs.cells);
            mine.missing += theirs.missing;
            mine.design_effect = share(self.rows) * mine.design_effect + share(other.rows) * theirs.design_effect;
        }
        (self.from, self.to) = match (self.rows, other.rows) {
            (_, 0) => (self.from, self.to),
            (0, _) => (other.from, other.to),
            _ => (self.from.min(other.from), self.to.max(other.to)),
        };
        self.rows = rows;
        Ok(())
    }

    fn check(&self) -> Result<(), (String, String)> {
        let wrong = |at: &str, reason: String| Err((at.to_owned(), reason));
        if self.format != FORMAT {
            return wrong("format", format!("{} is unknown; this driftline reads {FORMAT}", self.format));
        }
        if self.rows == 0 {
            return wrong("rows", "an empty reference cannot be compared with anything".to_owned());
        }
        if self.from > self.to {
            return wrong("from", format!("{} is after 'to', {}", self.from, self.to));
        }
        let mut names = std::collections::HashSet::new();
        for (index, column) in self.columns.iter().enumerate() {
            let place = format!("columns[{index}] '{}'", column.name);
            if !names.insert(&column.name) {
                return Err((place, "another column has the same name".to_owned()));
            }
            column.check(self.rows).map_err(|(at, reason)| (format!("{place}.{at}"), reason))?;
        }
        Ok(())
    }
}

impl ColumnProfile {
    /// Name: a feature's, or `score`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Edges between bins, rising.
    pub fn edges(&self) -> &[f64] {
        &self.edges
    }

    /// Reference counts of the bins, one more than edges.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Missing values in the reference.
    pub fn missing(&self) -> u64 {
        self.missing
    }

    /// How many times more windows differ than independent rows would, at least 1.
    pub fn design_effect(&self) -> f64 {
        self.design_effect
    }

    /// Reference counts of the cells; the last is the missing one.
    pub fn cells(&self) -> &[u64] {
        &self.cells
    }

    /// Merges a window's bins, and its missing values as the last, into cells.
    pub fn to_cells(&self, counts: &[u64], missing: u64) -> Vec<u64> {
        merge_bins(&self.cell_ends, counts, missing)
    }

    /// The bin of a finite value: 0 up to and including the number of edges.
    #[inline]
    pub fn bin(&self, value: f64) -> usize {
        bin(&self.edges, value)
    }

    /// Upper edge of the bin in which the median of these counts lies; the last edge for the bin above all. `None`
    /// without counts.
    pub fn median(&self, counts: &[u64]) -> Option<f64> {
        let half = counts.iter().sum::<u64>().div_ceil(2);
        if half == 0 {
            return None;
        }
        let mut up_to = 0;
        let bin = counts.iter().position(|count| {
            up_to += count;
            up_to >= half
        })?;
        self.edges.get(bin).or(self.edges.last()).copied()
    }

    fn check(&self, rows: u64) -> Result<(), (String, String)> {
        let wrong = |at: String, reason: String| Err((at, reason));
        if self.edges.len() > MOST_EDGES {
            return wrong("edges".into(), format!("{} of them; at most {MOST_EDGES} are allowed", self.edges.len()));
        }
        for (index, edge) in self.edges.iter().enumerate() {
            if !edge.is_finite() {
                return wrong(format!("edges[{index}]"), format!("{edge} is not a finite number"));
            }
            if index > 0 && self.edges[index - 1] >= *edge {
                let before = self.edges[index - 1];
                return wrong(format!("edges[{index}]"), format!("{edge} is not above the edge before it, {before}"));
            }
        }
        if self.counts.len() != self.edges.len() + 1 {
            let (counts, edges) = (self.counts.len(), self.edges.len());
            return wrong("counts".into(), format!("{counts} of them; {edges} edges make {} bins", edges + 1));
        }
        let sum = self.counts.iter().chain([&self.missing]).try_fold(0_u64, |sum, &count| sum.checked_add(count));
        if sum != Some(rows) {
            let sum = sum.map_or("more than 2^64".to_owned(), |sum| sum.to_string());
            return wrong(
                "counts".into(),
                format!("with the missing ones they add up to {sum}, not to 'rows', {rows}"),
            );
        }
        if self.cell_ends.len() > MOST_CELL_ENDS {
            let many = self.cell_ends.len();
            return wrong("psi_edges".into(), format!("{many} of them; at most {MOST_CELL_ENDS} are allowed"));
        }
        for (index, &end) in self.cell_ends.iter().enumerate() {
            if end >= self.edges.len() {
                let edges = self.edges.len();
                return wrong(format!("psi_edges[{index}]"), format!("{end} is not the index of one of {edges} edges"));
            }
            if index > 0 && self.cell_ends[index - 1] >= end {
                return wrong(format!("psi_edges[{index}]"), format!("{end} does not follow the one before it"));
            }
        }
        if !self.design_effect.is_finite() || self.design_effect < 1.0 {
            return wrong("design_effect".into(), format!("{} is not a number from 1 on", self.design_effect));
        }
        Ok(())
    }
}

/// Number of `edges` below `value`, by a binary search whose steps depend on the number of edges only.
#[inline]
fn bin(edges: &[f64], value: f64) -> usize {
    let (mut base, mut size) = (0, edges.len());
    while size > 1 {
        let half = size / 2;
        base += usize::from(edges[base + half - 1] < value) * half;
        size -= half;
    }
    base + usize::from(edges.get(base).is_some_and(|edge| *edge < value))
}

fn merge_bins(cell_ends: &[usize], counts: &[u64], missing: u64) -> Vec<u64> {
    let mut cells = Vec::with_capacity(cell_ends.len() + 2);
    let mut start = 0;
    for end in cell_ends.iter().map(|end| end.saturating_add(1)).chain([counts.len()]) {
        // A file is checked only after this, so its ends may lie anywhere.
        let end = end.clamp(start, counts.len());
        cells.push(counts[start..end].iter().fold(0, |sum: u64, count| sum.saturating_add(*count)));
        start = end;
    }
    cells.push(missing);
    cells
}

fn add(to: &mut [u64], counts: &[u64]) {
    for (to, count) in to.iter_mut().zip(counts) {
        *to += count;
    }
}

/// Makes a profile of rows held in memory.
#[derive(Debug, Clone)]
pub struct ProfileBuilder {
    names: Vec<String>,
    window_rows: u64,
    times: Vec<i64>,
    values: Vec<Vec<f64>>,
}

impl ProfileBuilder {
    /// Starts a profile of these columns, with design effects of windows of `window_rows` rows (at least 1).
    pub fn new(names: impl IntoIterator<Item = impl Into<String>>, window_rows: u64) -> Self {
        let names: Vec<String> = names.into_iter().map(Into::into).collect();
        let values = vec![Vec::new(); names.len()];
        Self { names, window_rows: window_rows.max(1), times: Vec::new(), values }
    }

    /// Adds a row: its event time (ms) and a value a column. NaN and ±∞ are missing.
    ///
    /// # Panics
    /// Where there is not exactly one value a column.
    pub fn push(&mut self, event_time: i64, values: &[f64]) {
        assert_eq!(values.len(), self.values.len(), "one value a column");
        self.times.push(event_time);
        for (column, value) in self.values.iter_mut().zip(values) {
            column.push(*value);
        }
    }

    /// The profile of the rows so far, whatever order they came in. Rows of equal time keep theirs.
    pub fn finish(self) -> Profile {
        let rows = self.times.len() as u64;
        // Fewer windows than this tell next to nothing of how they differ.
        let window_rows = self.window_rows.min(rows / LEAST_WINDOWS).max(1);
        let mut order: Vec<usize> = (0..self.times.len()).collect();
        order.sort_by_key(|&row| self.times[row]);
        let size = usize::try_from(window_rows).unwrap_or(usize::MAX);
        let built = self.names.into_iter().zip(&self.values).map(|(name, values)| {
            let values: Vec<f64> = order.iter().map(|&row| values[row]).collect();
            build_column(name, &values, size)
        });
        let (mut columns, spreads): (Vec<ColumnProfile>, Vec<Option<Spread>>) = built.unzip();
        for (column, effect) in columns.iter_mut().zip(design_effects(&spreads)) {
            column.design_effect = effect;
        }
        Profile {
            format: FORMAT,
            rows,
            from: self.times.iter().copied().min().unwrap_or_default(),
            to: self.times.iter().copied().max().unwrap_or_default(),
            window_rows,
            columns,
        }
    }
}

/// The column without its design effect, and what that is made of. `values` in time order.
fn build_column(name: String, values: &[f64], window_rows: usize) -> (ColumnProfile, Option<Spread>) {
    let mut present: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    present.sort_by(f64::total_cmp);
    let edges = choose_edges(&present);
    let histogram = |values: &[f64]| {
        let mut counts = vec![0; edges.len() + 1];
        let mut missing = 0;
        for value in values {
            if value.is_finite() { counts[bin(&edges, *value)] += 1 } else { missing += 1 }
        }
        (counts, missing)
    };
    let (counts, missing) = histogram(values);
    let cell_ends = choose_cell_ends(&counts);
    let cells = merge_bins(&cell_ends, &counts, missing);
    let windows = values.chunks_exact(window_rows).map(|window| {
        let (counts, missing) = histogram(window);
        merge_bins(&cell_ends, &counts, missing)
    });
    let spread = spread(&cells, &windows.collect::<Vec<_>>(), window_rows);
    (ColumnProfile { name, edges, counts, missing, cell_ends, design_effect: 1.0, cells }, spread)
}

/// `present`: finite values, sorted.
fn choose_edges(present: &[f64]) -> Vec<f64> {
    let Some(&smallest) = present.first() else { return Vec::new() };
    let mut edges: Vec<f64> = Vec::with_capacity(EDGES);
    let mut rest = present;
    while let (Some(&value), true) = (rest.first(), edges.len() < EDGES) {
        edges.push(value);
        rest = &rest[rest.partition_point(|other| *other <= value)..];
    }
    if edges.len() < EDGES {
        // What the reference never saw gets a bin on this side too. The distance is a power of two, so that every
        // language computes the same edge.
        edges.insert(0, smallest - f64::powi(2.0, -20) * smallest.abs().max(1.0));
        return edges;
    }
    edges.clear();
    for k in 1..=EDGES {
        let quantile = present[(k * present.len()).div_ceil(EDGES) - 1];
        if edges.last() != Some(&quantile) {
            edges.push(quantile);
        }
    }
    edges
}

fn choose_cell_ends(counts: &[u64]) -> Vec<usize> {
    let total: u64 = counts.iter().sum();
    let mut ends: Vec<usize> = Vec::with_capacity(CELLS);
    let (mut up_to, mut k) = (0, 1);
    for (edge, count) in counts.iter().enumerate().take(counts.len() - 1) {
        up_to += count;
        if total > 0 && k < CELLS as u64 && up_to * CELLS as u64 >= k * total {
            ends.push(edge);
            while k < CELLS as u64 && up_to * CELLS as u64 >= k * total {
                k += 1;
            }
        }
    }
    if counts[0] == 0 && total > 0 && ends.len() < CELLS - 1 && ends.first() != Some(&0) {
        ends.insert(0, 0);
    }
    ends
}

/// How windows of one column differ, against independent rows.
#[derive(Debug, Clone, Copy)]
struct Spread {
    /// What exceeds independence; below 0 by chance only.
    excess: f64,
    /// Its standard deviation where the rows are independent.
    noise: f64,
    /// Windows it is told from, less one.
    freedom: f64,
}

/// Compares windows of one column with the rest of its reference. `None` where there is too little to compare.
///
/// The χ² of a window against the rest is, over windows, a weighted sum of squares: its weights are the eigenvalues of C, the
/// covariance of the windows' cells, scaled so that independent rows make them 1. Dependent rows make few of them large (a
/// slow feature moves its cells together), and those rule the tail. So the spread is the weights' own weighted mean,
/// tr C² / tr C (the scale of Satterthwaite's approximation), not their plain mean; tr C² is estimated without bias from the
/// windows' products (Srivastava 2005).
fn spread(cells: &[u64], windows: &[Vec<u64>], window_rows: usize) -> Option<Spread> {
    let rows = cells.iter().sum::<u64>() as f64;
    let size = window_rows as f64;
    let freedom = windows.len() as f64 - 1.0;
    let groups = dense_groups(cells, LEAST_EXPECTED * rows / size);
    if freedom < 2.0 || groups.len() < 2 {
        return None;
    }
    // Deviation of each window from the rest, so that its square sum is the two-sample χ².
    let scale = (size * (rows - size) / rows).sqrt();
    let deviations = windows.iter().map(|window| {
        let deviation = |group: &Range<usize>| {
            let all = cells[group.clone()].iter().sum::<u64>() as f64;
            let here = window[group.clone()].iter().sum::<u64>() as f64;
            scale * (here / size - (all - here) / (rows - size)) / (all / rows).sqrt()
        };
        groups.iter().map(deviation).collect()
    });
    let deviations: Vec<Vec<f64>> = deviations.collect();
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let trace = deviations.iter().map(|window| product(window, window)).sum::<f64>() / freedom;
    if trace <= 0.0 {
        return None;
    }
    let squares: f64 = deviations.iter().flat_map(|a| deviations.iter().map(|b| product(a, b).powi(2))).sum();
    let unbiased = (squares - trace * trace * freedom) / ((freedom - 1.0) * (freedom + 2.0));
    let noise = 2.0 / freedom * (1.0 + freedom / (2.0 * groups.len() as f64)).sqrt();
    Some(Spread { excess: unbiased / trace - 1.0, noise, freedom })
}

/// Design effects of all columns.
///
/// A column's excess counts where it is more than chance, and that of the column in the middle counts for all: the columns of
/// one stream share much of their dependence, and few windows leave it unseen in some of them. What counts is enlarged the more,
/// the fewer the windows are that tell it.
fn design_effects(spreads: &[Option<Spread>]) -> Vec<f64> {
    let mut excesses: Vec<f64> = spreads.iter().flatten().map(|spread| spread.excess).collect();
    excesses.sort_by(f64::total_cmp);
    let common = excesses.get(excesses.len() / 2).copied().unwrap_or(0.0).max(0.0);
    let effect = |spread: &Option<Spread>| {
        let Some(spread) = spread else { return 1.0 };
        let own = if spread.excess > SURE * spread.noise { spread.excess } else { 0.0 };
        1.0 + own.max(common) * (1.0 + CAUTION / spread.freedom)
    };
    spreads.iter().map(effect).collect()
}

/// Neighbouring cells pooled until each group holds at least `least`; what is left at the end joins the last group.
fn dense_groups(cells: &[u64], least: f64) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    let (mut start, mut sum) = (0, 0);
    for (index, count) in cells.iter().enumerate() {
        sum += count;
        if sum as f64 >= least {
            groups.push(start..index + 1);
            (start, sum) = (index + 1, 0);
        }
    }
    if let Some(last) = groups.last_mut() {
        last.end = cells.len();
    }
    groups
}

#[cfg(test)]
mod tests;
