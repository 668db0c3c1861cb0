//! Aggregates: what is kept of a set of events, how sets are united, and how functions read them.
//!
//! The events of one source that one feature group sees are a *series*: those with a true filter and a value. A set of
//! events is kept as *lanes*, 64-bit words, for all series of the source side by side. Each series has only the lanes its
//! functions need, in this order:
//!
//! | lane | words | content |
//! |---|---|---|
//! | count | 1 | number of events |
//! | sum | 2 | of integers an `i128`, low word first; of floats a double-double, high part first |
//! | squares | 2 | sum of squares: of integers a saturating `u128`, low word first; of floats a double-double |
//! | min, max | 1 each | of integers the value; of floats the bits, remapped so that they order as integers |
//! | newest | 1 | event time of the newest event, `i64::MIN` for none |
//! | last | 1 | its value |
//! | oldest | 1 | event time of the oldest event, `i64::MAX` for none |
//! | first | 1 | its value |
//! | trues | 1 | number of true values |
//! | trend | 6 or 8 | see `trend` |
//! | decayed | 3 or 5 | see `decay` |
//! | distinct | 257 | see `distinct` |
//! | quantiles | 257 | see `quantile` |
//! | frequent | 513 | see `frequent` |
//! | recent | 1 + 2 · N | see `recent` |
//!
//! Lanes of the same events are the same whatever the order in which they were added, except for the last bits of
//! double-doubles (see `double_double`). Of events of the same time the one added last is the newest and the one added first
//! the oldest, so that whoever unites sets has to know which of two is the later one: [`Lanes::add_earlier`],
//! [`Lanes::add_later`], [`Lanes::unite`].

mod decay;
pub(super) mod distinct;
mod frequent;
mod parts;
mod quantile;
mod recent;
mod trend;

pub(super) use parts::Parts;

use super::double_double::DoubleDouble;
use crate::config::plan::Function;

/// 2⁻⁹⁶: what is less, relative to the terms, is taken for rounding.
const ROUNDING: f64 = 1.0 / (1u128 << 96) as f64;

/// What the value of a series is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ValueKind {
    /// There is none: events are counted.
    Event,
    /// `i64`.
    Integer,
    /// `f64`, finite.
    Float,
    /// Something without order or arithmetic.
    Opaque,
}

/// One series of a source.
#[derive(Debug, Clone)]
pub(super) struct Series {
    pub kind: ValueKind,
    pub parts: Parts,
    /// Word of a row that holds its value; 0 (the time) for [`ValueKind::Event`].
    pub value: usize,
    /// Word of a row that holds the hash of its value, where the value itself is none (a text's number).
    hash: Option<usize>,
    /// Half-life of its events in milliseconds, where they decay. It then has no other lanes than those of that.
    half_life: i64,
    /// Its first lane.
    start: usize,
    /// Number of its lanes.
    width: usize,
    /// How many of them are for the parts up to `last`.
    common: usize,
}

/// A series before its lanes are laid out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outline {
    pub kind: ValueKind,
    pub parts: Parts,
    /// Which of the row's values it takes.
    pub value: Option<usize>,
    /// Which of them is the hash of that value, where it is a text and the text has to be told from others.
    pub hash: Option<usize>,
    /// Half-life of its events in milliseconds, where they decay.
    pub half_life: Option<i64>,
}

/// All series of a source. A row of the source is its event time, then [`Lanes::mask_words`] words with one bit a series
/// that the event belongs to (series 0 is the lowest bit of the first), then the values.
#[derive(Debug, Clone, Default)]
pub(super) struct Lanes {
    series: Vec<Series>,
    /// Of windows by category: which rows are in each series.
    members: Vec<Member>,
    width: usize,
}

/// The bit of a row's mask that says that the event is in a series of its source.
#[derive(Debug, Clone, Copy)]
pub(super) struct Member {
    word: usize,
    bit: u64,
}

impl Member {
    /// Of the series of this number.
    pub fn of(series: usize) -> Self {
        Self { word: 1 + series / 64, bit: 1 << (series % 64) }
    }

    #[inline]
    pub fn has(self, row: &[u64]) -> bool {
        row[self.word] & self.bit != 0
    }
}

impl Lanes {
    /// Lays out the lanes of `series`.
    pub fn new(series: &[Outline]) -> Self {
        Self::laid_out(series, series.len().div_ceil(64))
    }

    /// Lanes of the events of windows, of a source whose rows have `mask_words` words of masks: one series of all of them,
    /// or as many as `members`, each of the events that are members of it. See [`Lanes::add_event`].
    pub fn of_windows(series: Outline, members: Vec<Member>, mask_words: usize) -> Self {
        let series = vec![series; members.len().max(1)];
        Self { members, ..Self::laid_out(&series, mask_words) }
    }

    fn laid_out(series: &[Outline], mask_words: usize) -> Self {
        let mut width = 0;
        let series = series
            .iter()
            .map(|&Outline { kind, parts, value, hash, half_life }| {
                let parts = if half_life.is_some() { Parts { decayed: true, ..Parts::default() } } else { parts };
                let (start, own) = (width, parts.width(kind));
                width += own;
                let word = |value: usize| 1 + mask_words + value;
                let (value, hash) = (value.map_or(0, word), hash.map(word));
                let (half_life, common) = (half_life.unwrap_or(1), parts.common().width(kind));
                Series { kind, parts, value, hash, half_life, start, width: own, common }
            })
            .collect();
        Self { series, members: Vec::new(), width }
    }

    /// Words of a set of events.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of series.
    pub fn series(&self) -> usize {
        self.series.len()
    }

    /// Words of a row before its values, without the time.
    pub fn mask_words(&self) -> usize {
        self.series.len().div_ceil(64)
    }

    /// What the lanes hold, one name a lane; those of more than one word with their number: `0.distinct*257`.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let series = self.series.iter().enumerate();
        series.flat_map(|(index, series)| {
            series.parts.lanes(series.kind).map(move |(name, words)| match words {
                1 => format!("{index}.{name}"),
                _ => format!("{index}.{name}*{words}"),
            })
        })
    }

    /// The lanes that hold values of a series as they are in a row.
    pub fn value_lanes(&self, series: usize) -> impl Iterator<Item = usize> {
        let series = &self.series[series];
        let last = series.parts.last.then(|| series.start + series.common - 1);
        let first = series.parts.first.then(|| series.start + series.common + 1);
        let frequent = series.start + series.frequent();
        let values = frequent::value_words().map(move |word| frequent + word);
        let recent = series.start + series.recent();
        let listed = recent::value_words(series.parts.recent).map(move |word| recent + word);
        last.into_iter().chain(first).chain(values.filter(|_| series.parts.frequent)).chain(listed)
    }

    /// Makes `lanes` the empty set.
    pub fn clear(&self, lanes: &mut [u64]) {
        lanes.fill(0);
        for series in &self.series {
            let mut at = series.start + usize::from(series.parts.count);
            at += 2 * usize::from(series.parts.sum) + 2 * usize::from(series.parts.squares);
            if series.parts.min {
                lanes[at] = i64::MAX as u64;
                at += 1;
            }
            if series.parts.max {
                lanes[at] = i64::MIN as u64;
                at += 1;
            }
            if series.parts.newest {
                lanes[at] = i64::MIN as u64;
            }
            if series.parts.oldest {
                lanes[series.start + series.common] = i64::MAX as u64;
            }
            if series.parts.decayed {
                lanes[series.start] = decay::NONE as u64;
            }
        }
    }

    /// Adds a row that comes after all rows of the same time in `lanes`.
    #[inline]
    pub fn add_later(&self, lanes: &mut [u64], row: &[u64]) {
        self.add::<true>(lanes, row);
    }

    /// Adds the row of an event of windows: to all series that it is a member of; where there are no members, to the only
    /// one, whatever its mask says. It comes after all rows of the same time.
    #[inline]
    pub fn add_event(&self, lanes: &mut [u64], row: &[u64]) {
        if self.members.is_empty() {
            return self.series[0].add::<true>(lanes, row);
        }
        for (series, _) in self.series.iter().zip(&self.members).filter(|(_, member)| member.has(row)) {
            series.add::<true>(&mut lanes[series.start..], row);
        }
    }

    /// Adds a row that comes before all rows of the same time in `lanes`.
    #[inline]
    pub fn add_earlier(&self, lanes: &mut [u64], row: &[u64]) {
        self.add::<false>(lanes, row);
    }

    #[inline]
    fn add<const LATER: bool>(&self, lanes: &mut [u64], row: &[u64]) {
        for (index, series) in self.series.iter().enumerate() {
            if row[1 + index / 64] >> (index % 64) & 1 == 1 {
                series.add::<LATER>(&mut lanes[series.start..], row);
            }
        }
    }

    /// Adds all of `other` to `lanes`. Where both have events of the same newest time, those of `lanes` are the later ones.
    #[inline]
    pub fn unite(&self, lanes: &mut [u64], other: &[u64]) {
        for series in &self.series {
            series.unite(&mut lanes[series.start..], &other[series.start..]);
        }
    }

    /// Reads functions of one series off its lanes: `put` gets each one's place in `functions` and its value, as the word of
    /// its type: `i64`, or the bits of an `f64`; for `first` and `last` the event's own word.
    #[inline]
    pub fn read(
        &self,
        series: usize,
        functions: &[Function],
        lanes: &[u64],
        span: Span,
        put: impl FnMut(usize, Option<u64>),
    ) {
        let series = &self.series[series];
        series.read(functions, &lanes[series.start..], span, put);
    }

    /// Reads the values of `last_n` of one series off its lanes, the oldest first: `most` of them at most.
    #[inline]
    pub fn read_list<'a>(&self, series: usize, most: u16, lanes: &'a [u64]) -> impl Iterator<Item = u64> + use<'a> {
        let series = &self.series[series];
        recent::newest(&lanes[series.start..][..series.width][series.recent()..], most)
    }
}

/// The window that lanes are read for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    /// The instant that it is as of.
    pub as_of: i64,
    /// Its length; not a number for a lifetime, which no function of the length is asked of.
    pub seconds: f64,
}

impl Series {
    #[inline]
    fn add<const LATER: bool>(&self, lanes: &mut [u64], row: &[u64]) {
        let (time, value) = (row[0] as i64, row[self.value]);
        let Parts { count, sum, squares, min, max, newest, last, .. } = self.parts;
        let lanes = &mut lanes[..self.width];
        let mut at = 0;
        if count {
            lanes[at] += 1;
            at += 1;
        }
        if sum {
            let lane = pair(lanes, at);
            if self.kind == ValueKind::Float {
                put_double(lane, double(lane).plus(f64::from_bits(value)));
            } else {
                put_wide(lane, wide(lane).wrapping_add_signed(i128::from(value as i64)));
            }
            at += 2;
        }
        if squares {
            let lane = pair(lanes, at);
            if self.kind == ValueKind::Float {
                put_double(lane, double(lane).plus_double(DoubleDouble::square_of(f64::from_bits(value))));
            } else {
                let magnitude = u128::from((value as i64).unsigned_abs());
                put_wide(lane, wide(lane).saturating_add(magnitude * magnitude));
            }
            at += 2;
        }
        if min || max {
            let value = if self.kind == ValueKind::Float { ordered(value) } else { value as i64 };
            if min {
                lanes[at] = value.min(lanes[at] as i64) as u64;
                at += 1;
            }
            if max {
                lanes[at] = value.max(lanes[at] as i64) as u64;
                at += 1;
            }
        }
        if newest {
            let known = lanes[at] as i64;
            if if LATER { time >= known } else { time > known } {
                lanes[at] = time as u64;
                if last {
                    lanes[at + 1] = value;
                }
            }
        }
        if self.common < self.width {
            self.add_rest::<LATER>(&mut lanes[self.common..], row);
        }
    }

    /// Adds to what comes after the common lanes. Apart, so that the others stay as fast as they are without.
    #[inline(never)]
    fn add_rest<const LATER: bool>(&self, lanes: &mut [u64], row: &[u64]) {
        let (time, value) = (row[0] as i64, row[self.value]);
        let Parts { oldest, first, trues, trend, distinct, quantiles, frequent, recent, decayed, .. } = self.parts;
        if decayed {
            return decay::add(self.half_life, lanes, time, [1.0, self.float(value)]);
        }
        let mut at = 0;
        if oldest {
            let known = lanes[at] as i64;
            if if LATER { time < known } else { time <= known } {
                lanes[at] = time as u64;
                if first {
                    lanes[at + 1] = value;
                }
            }
            at += 1 + usize::from(first);
        }
        if trues {
            lanes[at] += value;
            at += 1;
        }
        if trend {
            trend::add(self.kind, &mut lanes[at..], time, value);
            at += trend::names(self.kind).len();
        }
        if distinct {
            distinct::add(&mut lanes[at..], self.hash(row));
            at += distinct::WORDS;
        }
        if quantiles {
            quantile::add(&mut lanes[at..], self.float(value));
            at += quantile::WORDS;
        }
        if frequent {
            frequent::add(&mut lanes[at..], self.hash(row), self.same(value), time);
            at += frequent::WORDS;
        }
        if recent > 0 {
            recent::add::<LATER>(&mut lanes[at..], time, value);
        }
    }

    #[inline]
    fn unite(&self, lanes: &mut [u64], other: &[u64]) {
        let Parts { count, sum, squares, min, max, newest, last, .. } = self.parts;
        let width = self.width;
        let (lanes, other) = (&mut lanes[..width], &other[..width]);
        let mut at = 0;
        if count {
            lanes[at] += other[at];
            at += 1;
        }
        if sum {
            let (lane, other) = (pair(lanes, at), [other[at], other[at + 1]]);
            if self.kind == ValueKind::Float {
                put_double(lane, double(lane).plus_double(double(&other)));
            } else {
                put_wide(lane, wide(lane).wrapping_add(wide(&other)));
            }
            at += 2;
        }
        if squares {
            let (lane, other) = (pair(lanes, at), [other[at], other[at + 1]]);
            if self.kind == ValueKind::Float {
                put_double(lane, double(lane).plus_double(double(&other)));
            } else {
                put_wide(lane, wide(lane).saturating_add(wide(&other)));
            }
            at += 2;
        }
        if min {
            lanes[at] = (lanes[at] as i64).min(other[at] as i64) as u64;
            at += 1;
        }
        if max {
            lanes[at] = (lanes[at] as i64).max(other[at] as i64) as u64;
            at += 1;
        }
        if newest && other[at] as i64 > lanes[at] as i64 {
            lanes[at] = other[at];
            if last {
                lanes[at + 1] = other[at + 1];
            }
        }
        if self.common < width {
            self.unite_rest(&mut lanes[self.common..], &other[self.common..]);
        }
    }

    #[inline(never)]
    fn unite_rest(&self, lanes: &mut [u64], other: &[u64]) {
        let Parts { oldest, first, trues, trend, distinct, quantiles, frequent, recent, decayed, .. } = self.parts;
        if decayed {
            return decay::unite(lanes, other);
        }
        let mut at = 0;
        if oldest {
            // Of the same time, the events of `other` are the earlier ones.
            if other[at] as i64 <= lanes[at] as i64 {
                lanes[..=usize::from(first)].copy_from_slice(&other[..=usize::from(first)]);
            }
            at += 1 + usize::from(first);
        }
        if trues {
            lanes[at] += other[at];
            at += 1;
        }
        if trend {
            trend::unite(self.kind, &mut lanes[at..], &other[at..]);
            at += trend::names(self.kind).len();
        }
        if distinct {
            distinct::unite(&mut lanes[at..], &other[at..]);
            at += distinct::WORDS;
        }
        if quantiles {
            quantile::unite(&mut lanes[at..], &other[at..]);
            at += quantile::WORDS;
        }
        if frequent {
            frequent::unite(&mut lanes[at..], &other[at..]);
            at += frequent::WORDS;
        }
        if recent > 0 {
            recent::unite(&mut lanes[at..], &other[at..]);
        }
    }

    #[inline]
    fn read(&self, functions: &[Function], lanes: &[u64], span: Span, mut put: impl FnMut(usize, Option<u64>)) {
        let parts = self.parts;
        let lanes = &lanes[..self.width];
        if parts.decayed {
            for (at, function) in functions.iter().enumerate() {
                put(at, self.read_decayed(*function, lanes, span.as_of).and_then(finite));
            }
            return;
        }
        let count = if parts.count { lanes[0] } else { 0 };
        let sum = usize::from(parts.count);
        let squares = sum + 2 * usize::from(parts.sum);
        let min = squares + 2 * usize::from(parts.squares);
        let max = min + usize::from(parts.min);
        let newest = max + usize::from(parts.max);
        let known = parts.newest && lanes[newest] as i64 != i64::MIN;
        let total = if parts.sum { self.total([lanes[sum], lanes[sum + 1]]) } else { DoubleDouble::ZERO };
        let mean = if parts.sum && parts.count { total.divided_by(count as f64) } else { DoubleDouble::ZERO };
        for (at, function) in functions.iter().enumerate() {
            let value = match function {
                Function::Count => Some(count),
                Function::Sum if self.kind == ValueKind::Float => finite(total.high),
                Function::Sum => i64::try_from(wide(&[lanes[sum], lanes[sum + 1]]) as i128).ok().map(|sum| sum as u64),
                Function::Mean if count > 0 => finite(mean.high),
                Function::Var | Function::Std if count > 1 => {
                    let lane = |at: usize| [lanes[at], lanes[at + 1]];
                    let variance = self.variance(count, total, mean, lane(sum), lane(squares));
                    let root = *function == Function::Std;
                    variance.map(|variance| if root { variance.sqrt() } else { variance }).and_then(finite)
                }
                Function::Min if count > 0 => Some(self.unordered(lanes[min])),
                Function::Max if count > 0 => Some(self.unordered(lanes[max])),
                Function::Last if known => Some(lanes[newest + 1]),
                Function::SecondsSinceLast if known => {
                    Some((span.as_of.saturating_sub(lanes[newest] as i64) as f64 / 1000.0).to_bits())
                }
                Function::Rate if self.kind == ValueKind::Event => finite(count as f64 / span.seconds),
                Function::Rate => finite(total.divided_by(span.seconds).high),
                Function::First if lanes[self.common] as i64 != i64::MAX => Some(lanes[self.common + 1]),
                Function::Ratio if count > 0 => finite(lanes[self.trues()] as f64 / count as f64),
                Function::Slope if count > 1 => {
                    let sum = [lanes[sum], lanes[sum + 1]];
                    trend::slope(self.kind, count, sum, &lanes[self.trend()..]).and_then(finite)
                }
                Function::Distinct => Some(distinct::count(&lanes[self.distinct()..])),
                Function::Top(rank) => frequent::ranked(&lanes[self.frequent()..], *rank),
                Function::Quantile(per_mille) => {
                    quantile::quantile(&lanes[self.quantiles()..], *per_mille).map(f64::to_bits)
                }
                _ => None,
            };
            put(at, value);
        }
    }

    #[inline(never)]
    fn read_decayed(&self, function: Function, lanes: &[u64], as_of: i64) -> Option<f64> {
        match function {
            Function::Count => Some(decay::sum(self.half_life, lanes, 0, as_of)),
            Function::Sum => Some(decay::sum(self.half_life, lanes, 1, as_of)),
            Function::Mean => decay::mean(lanes),
            _ => None,
        }
    }

    /// The lane of true values, or where it would be.
    fn trues(&self) -> usize {
        self.common + usize::from(self.parts.oldest) + usize::from(self.parts.first)
    }

    /// The first lane of the trend, or where it would be.
    fn trend(&self) -> usize {
        self.trues() + usize::from(self.parts.trues)
    }

    /// The first lane of distinct values, or where it would be.
    fn distinct(&self) -> usize {
        self.trend() + if self.parts.trend { trend::names(self.kind).len() } else { 0 }
    }

    /// The first lane of quantiles, or where it would be.
    fn quantiles(&self) -> usize {
        self.distinct() + if self.parts.distinct { distinct::WORDS } else { 0 }
    }

    /// The first lane of frequent values, or where it would be.
    fn frequent(&self) -> usize {
        self.quantiles() + if self.parts.quantiles { quantile::WORDS } else { 0 }
    }

    /// The first lane of the newest values, or where it would be.
    fn recent(&self) -> usize {
        self.frequent() + if self.parts.frequent { frequent::WORDS } else { 0 }
    }

    /// The word that stands for all values equal to this one: +0 for −0, which adding 0 does.
    fn same(&self, value: u64) -> u64 {
        if self.kind == ValueKind::Float { (f64::from_bits(value) + 0.0).to_bits() } else { value }
    }

    /// The hash of a row's value.
    fn hash(&self, row: &[u64]) -> u64 {
        self.hash.map_or_else(|| distinct::hash_word(self.same(row[self.value])), |hash| row[hash])
    }

    /// A value as a float.
    fn float(&self, value: u64) -> f64 {
        if self.kind == ValueKind::Float { f64::from_bits(value) } else { value as i64 as f64 }
    }

    #[inline]
    fn total(&self, sum: [u64; 2]) -> DoubleDouble {
        if self.kind == ValueKind::Float { double(&sum) } else { DoubleDouble::from_i128(wide(&sum) as i128) }
    }

    /// (Q − S²/n) / (n − 1), of integers from exact sums. Of floats the difference is taken in double-double, where less
    /// than 2⁻⁹⁶ of Q is rounding: values that are all the same have variance 0.
    #[inline]
    fn variance(
        &self,
        count: u64,
        total: DoubleDouble,
        mean: DoubleDouble,
        sum: [u64; 2],
        squares: [u64; 2],
    ) -> Option<f64> {
        let n = count as f64;
        if self.kind == ValueKind::Integer {
            let (sum, squares) = ((wide(&sum) as i128).unsigned_abs(), wide(&squares));
            if squares == u128::MAX {
                return None;
            }
            if let (Some(squares), Some(square)) = (squares.checked_mul(u128::from(count)), sum.checked_mul(sum)) {
                return Some((squares - square) as f64 / (n * (n - 1.0)));
            }
        }
        let squares =
            if self.kind == ValueKind::Float { double(&squares) } else { DoubleDouble::from_u128(wide(&squares)) };
        let rest = squares.plus_double(total.times(mean).negated()).high;
        let rest = if rest <= squares.high * ROUNDING { 0.0 } else { rest };
        Some(rest / (n - 1.0))
    }

    fn unordered(&self, lane: u64) -> u64 {
        if self.kind == ValueKind::Float { (lane as i64 ^ sign_mask(lane as i64)) as u64 } else { lane }
    }
}

fn finite(value: f64) -> Option<u64> {
    value.is_finite().then(|| value.to_bits())
}

#[inline]
fn pair(lanes: &mut [u64], at: usize) -> &mut [u64; 2] {
    lanes[at..].first_chunk_mut().expect("a sum has two lanes")
}

#[inline]
fn double(lane: &[u64; 2]) -> DoubleDouble {
    DoubleDouble { high: f64::from_bits(lane[0]), low: f64::from_bits(lane[1]) }
}

#[inline]
fn put_double(lane: &mut [u64; 2], value: DoubleDouble) {
    *lane = [value.high.to_bits(), value.low.to_bits()];
}

#[inline]
fn wide(lane: &[u64; 2]) -> u128 {
    u128::from(lane[0]) | u128::from(lane[1]) << 64
}

#[inline]
fn put_wide(lane: &mut [u64; 2], value: u128) {
    *lane = [value as u64, (value >> 64) as u64];
}

/// The bits of a float as an integer that orders as the float does (−0 before 0).
#[inline]
fn ordered(bits: u64) -> i64 {
    let bits = bits as i64;
    bits ^ sign_mask(bits)
}

/// All bits but the sign where `bits` has the sign.
#[inline]
fn sign_mask(bits: i64) -> i64 {
    ((bits >> 63) as u64 >> 1) as i64
}
