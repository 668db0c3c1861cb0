//! Which lanes a series has, by what its functions read.

use super::{ValueKind, decay, distinct, frequent, quantile, recent, trend};
use crate::config::plan::Function;

/// Which lanes a series has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::window) struct Parts {
    pub count: bool,
    pub sum: bool,
    pub squares: bool,
    pub min: bool,
    pub max: bool,
    pub newest: bool,
    pub last: bool,
    pub oldest: bool,
    pub first: bool,
    pub trues: bool,
    pub trend: bool,
    pub distinct: bool,
    pub quantiles: bool,
    pub frequent: bool,
    /// So many of the newest values.
    pub recent: u16,
    pub decayed: bool,
}

impl Parts {
    /// Adds what `function` reads of values of this kind, where they do not decay.
    pub fn include(&mut self, function: Function, kind: ValueKind) {
        match function {
            Function::Count => self.count = true,
            Function::Sum => self.sum = true,
            Function::Rate if kind == ValueKind::Event => self.count = true,
            Function::Rate => self.sum = true,
            Function::Mean => (self.count, self.sum) = (true, true),
            Function::Var | Function::Std => (self.count, self.sum, self.squares) = (true, true, true),
            Function::Min => (self.count, self.min) = (true, true),
            Function::Max => (self.count, self.max) = (true, true),
            Function::First => (self.oldest, self.first) = (true, true),
            Function::Last => (self.newest, self.last) = (true, true),
            Function::SecondsSinceLast => self.newest = true,
            Function::Slope => (self.count, self.sum, self.trend) = (true, true, true),
            Function::Ratio => (self.count, self.trues) = (true, true),
            Function::Distinct => self.distinct = true,
            Function::Quantile(_) => self.quantiles = true,
            Function::Top(_) => self.frequent = true,
            Function::LastN(most) => self.recent = self.recent.max(most),
        }
    }

    /// The lanes in their order: name and number of words.
    pub(super) fn lanes(self, kind: ValueKind) -> impl Iterator<Item = (&'static str, usize)> {
        let parts = [
            (self.count, &["count"][..]),
            (self.sum, &["sum", "sum+"]),
            (self.squares, &["squares", "squares+"]),
            (self.min, &["min"]),
            (self.max, &["max"]),
            (self.newest, &["newest"]),
            (self.last, &["last"]),
            (self.oldest, &["oldest"]),
            (self.first, &["first"]),
            (self.trues, &["trues"]),
            (self.trend, trend::names(kind)),
            (self.decayed, decay::names(kind)),
        ];
        let large = [
            (self.distinct, ("distinct", distinct::WORDS)),
            (self.quantiles, ("quantiles", quantile::WORDS)),
            (self.frequent, ("frequent", frequent::WORDS)),
            (self.recent > 0, ("recent", recent::words(self.recent))),
        ];
        let single = parts.into_iter().filter(|(kept, _)| *kept).flat_map(|(_, names)| names).map(|name| (*name, 1));
        single.chain(large.into_iter().filter(|(kept, _)| *kept).map(|(_, part)| part))
    }

    /// Number of words.
    pub(super) fn width(self, kind: ValueKind) -> usize {
        self.lanes(kind).map(|(_, words)| words).sum()
    }

    /// The parts up to `last`, which most series have some of.
    pub(super) fn common(self) -> Self {
        let Self { count, sum, squares, min, max, newest, last, .. } = self;
        Self { count, sum, squares, min, max, newest, last, ..Self::default() }
    }
}
