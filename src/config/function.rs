//! Aggregate functions: their names, and the types of their values.

use std::fmt;
use std::str::FromStr;

use super::plan::DataType;

/// Aggregate functions. See docs/functions.md for each one's exact meaning on empty windows and nulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Function {
    /// Number of events; of values that are not null, where there is a column.
    Count,
    /// Sum.
    Sum,
    /// Arithmetic mean.
    Mean,
    /// Least value.
    Min,
    /// Greatest value.
    Max,
    /// Sample variance (n − 1).
    Var,
    /// Sample standard deviation (n − 1).
    Std,
    /// Value of the oldest event.
    First,
    /// Value of the newest event.
    Last,
    /// Values of so many of the newest events, the oldest of them first: 1 to [`LONGEST_LIST`].
    LastN(u16),
    /// Seconds from the newest event to the instant asked for.
    SecondsSinceLast,
    /// Events, or the sum of a column, per second of the window's length.
    Rate,
    /// Slope of the least-squares line of the value over event time, per second.
    Slope,
    /// Share of the events for which a boolean column is true.
    Ratio,
    /// Number of distinct values.
    Distinct,
    /// The most frequent value (1), the next one (2), and so on to the fifth.
    Top(u8),
    /// The quantile of this many per mille, 1 to 999: `p50` is 500, `p99_9` is 999.
    Quantile(u16),
}

/// So many values has a list at most.
pub const LONGEST_LIST: u16 = 256;

/// All functions with a name of their own, in the order of the documentation.
const NAMED: [(&str, Function); 19] = [
    ("count", Function::Count),
    ("sum", Function::Sum),
    ("mean", Function::Mean),
    ("min", Function::Min),
    ("max", Function::Max),
    ("var", Function::Var),
    ("std", Function::Std),
    ("first", Function::First),
    ("last", Function::Last),
    ("seconds_since_last", Function::SecondsSinceLast),
    ("rate", Function::Rate),
    ("slope", Function::Slope),
    ("ratio", Function::Ratio),
    ("distinct", Function::Distinct),
    ("mode", Function::Top(1)),
    ("top_2", Function::Top(2)),
    ("top_3", Function::Top(3)),
    ("top_4", Function::Top(4)),
    ("top_5", Function::Top(5)),
];

impl Function {
    /// All functions; of the quantiles and lists some.
    #[cfg(test)]
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let quantiles = [1, 500, 950].map(Self::Quantile);
        let lists = [1, 5, 30].map(Self::LastN);
        NAMED.into_iter().map(|(_, function)| function).chain(quantiles).chain(lists)
    }

    /// Type of the values over a column of type `of`, or over events; `None` where there is no such aggregate.
    pub fn output_type(self, of: Option<DataType>) -> Option<DataType> {
        use DataType::{Boolean, Float64, Int64, Timestamp};
        match (self, of) {
            (Self::Count, _) | (Self::Distinct, Some(_)) => Some(Int64),
            (Self::SecondsSinceLast, _) => Some(Float64),
            (Self::Rate, None | Some(Int64 | Float64)) => Some(Float64),
            (Self::Sum, Some(of @ (Int64 | Float64))) => Some(of),
            (Self::Mean | Self::Var | Self::Std | Self::Slope | Self::Quantile(_), Some(Int64 | Float64)) => {
                Some(Float64)
            }
            (Self::Min | Self::Max, Some(of @ (Int64 | Float64 | Timestamp))) => Some(of),
            (Self::First | Self::Last | Self::Top(1..=5), Some(of)) => Some(of),
            (Self::LastN(1..=LONGEST_LIST), Some(of)) => of.element().map(DataType::List),
            (Self::Ratio, Some(Boolean)) => Some(Float64),
            _ => None,
        }
    }

    /// The same where events decay.
    pub fn decayed_type(self, of: Option<DataType>) -> Option<DataType> {
        match self {
            Self::Count | Self::Sum | Self::Mean => self.output_type(of).map(|_| DataType::Float64),
            _ => None,
        }
    }

    /// True where the value depends on how long the window is, so that a lifetime has none.
    pub fn needs_length(self) -> bool {
        self == Self::Rate
    }
}

/// The name as written: the middle of the features' names.
impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Self::Quantile(per_mille) = self {
            return match per_mille % 10 {
                0 => write!(f, "p{}", per_mille / 10),
                tenths => write!(f, "p{}_{tenths}", per_mille / 10),
            };
        }
        if let Self::LastN(most) = self {
            return write!(f, "last_{most}");
        }
        let named = NAMED.iter().find(|(_, function)| function == self);
        f.write_str(named.map_or("", |(name, _)| name))
    }
}

/// Not the name of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there is no function of this name")]
pub struct UnknownFunction;

impl FromStr for Function {
    type Err = UnknownFunction;

    fn from_str(text: &str) -> Result<Self, UnknownFunction> {
        let named = NAMED.iter().find(|(name, _)| *name == text).map(|(_, function)| *function);
        named.or_else(|| quantile(text)).or_else(|| last_n(text)).ok_or(UnknownFunction)
    }
}

/// What [`QUANTILES`] describes.
fn quantile(text: &str) -> Option<Function> {
    let text = text.strip_prefix('p')?;
    let (percent, tenths) = match text.split_once('_') {
        Some((percent, tenths)) => (percent, Some(tenths.parse::<u16>().ok().filter(|tenths| *tenths > 0)?)),
        None => (text, None),
    };
    let per_mille = 10 * percent.parse::<u16>().ok().filter(|percent| *percent < 100)? + tenths.unwrap_or(0);
    let function = Function::Quantile(per_mille);
    // Written back, it has to be the same: no leading zeros, no signs, one digit after the underscore.
    (per_mille > 0 && function.to_string().strip_prefix('p') == Some(text)).then_some(function)
}

/// What [`LISTS`] describes.
fn last_n(text: &str) -> Option<Function> {
    let most = text.strip_prefix("last_")?.parse().ok().filter(|most| (1..=LONGEST_LIST).contains(most))?;
    let function = Function::LastN(most);
    (function.to_string() == text).then_some(function)
}

/// Names of lists of the newest values, as a regular expression.
const LISTS: &str = "^last_([1-9][0-9]?|1[0-9]{2}|2[0-4][0-9]|25[0-6])$";

/// Names of quantiles, as a regular expression.
const QUANTILES: &str = "^p([1-9][0-9]?|[1-9]?[0-9]_[1-9])$";

impl serde::Serialize for Function {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Function {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl schemars::JsonSchema for Function {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Function".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let names: Vec<&str> = NAMED.iter().map(|(name, _)| *name).collect();
        schemars::json_schema!({
            "type": "string",
            "oneOf": [
                { "enum": names },
                { "pattern": QUANTILES, "description": "a quantile in percent: p50, p99_9" },
                { "pattern": LISTS, "description": "the values of so many of the newest events, at most 256: last_20" },
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_functions_and_back() {
        for (name, function) in NAMED {
            assert_eq!((function.to_string().as_str(), name.parse()), (name, Ok(function)));
            assert_eq!(serde_json::to_string(&function).unwrap(), format!("\"{name}\""));
        }
    }

    #[test]
    fn quantiles_are_named_in_percent() {
        for per_mille in 1..1000 {
            let function = Function::Quantile(per_mille);
            assert_eq!(function.to_string().parse(), Ok(function));
        }
        assert_eq!(Function::Quantile(5).to_string(), "p0_5");
        for wrong in ["", "p", "p0", "p100", "p05", "p5_0", "p+5", "p99_99", "p_5", "p00_5", "p99.9", "P50", "p5_+5"] {
            assert_eq!(wrong.parse::<Function>(), Err(UnknownFunction), "{wrong}");
        }
    }

    #[test]
    fn lists_are_named_by_their_longest() {
        for most in 1..=LONGEST_LIST {
            assert_eq!(format!("last_{most}").parse(), Ok(Function::LastN(most)));
            assert_eq!(Function::LastN(most).to_string(), format!("last_{most}"));
        }
        for wrong in ["last_", "last_0", "last_05", "last_+5", "last_257", "last_1000", "last_70000", "last_n", "last5"]
        {
            assert_eq!(wrong.parse::<Function>(), Err(UnknownFunction), "{wrong}");
        }
    }
}
