//! Retraining policies: the condition `[retraining] when`, parsed and evaluated on a history of windows.
//!
//! ```text
//! policy     = condition { "or" condition }
//! condition  = comparison { "and" comparison } [ "for" number ( "window" | "windows" ) ]
//! comparison = "score_drifted" | ( "drifted_features" | "max_psi" ) ( ">=" | ">" | "<=" | "<" | "=" ) number
//! ```
//!
//! `for n windows` belongs to the comparisons joined by `and` before it: they hold in each of the n newest windows.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Most windows that a condition may look back: what the monitor keeps of each model version.
pub const MOST_WINDOWS: usize = 1000;

/// What a policy may ask of one window.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct WindowFacts {
    /// Features that count as drifted; the score is not among them.
    pub drifted_features: u32,
    /// True if the score counts as drifted.
    pub score_drifted: bool,
    /// Largest PSI of any watched column.
    pub max_psi: f64,
}

/// A parsed policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    text: String,
    conditions: Vec<Condition>,
}

#[derive(Debug, Clone, PartialEq)]
struct Condition {
    comparisons: Vec<Comparison>,
    windows: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Comparison {
    ScoreDrifted,
    DriftedFeatures(Operator, f64),
    MaxPsi(Operator, f64),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Operator {
    AtLeast,
    Above,
    AtMost,
    Below,
    Equal,
}

/// A policy that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem} at column {column} of \"{text}\"")]
pub struct PolicyError {
    /// The whole policy.
    pub text: String,
    /// Where, in characters from 1.
    pub column: usize,
    /// What is wrong and what could stand there.
    pub problem: String,
}

impl Policy {
    /// Parses `[retraining] when`.
    ///
    /// # Errors
    /// The first fault, with its column.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let fault = |(at, problem): Fault| PolicyError {
            text: text.to_owned(),
            column: text[..at].chars().count() + 1,
            problem,
        };
        let mut parser = Parser { text, tokens: tokens(text).map_err(fault)?, next: 0 };
        let conditions = parser.policy().map_err(fault)?;
        Ok(Self { text: text.to_owned(), conditions })
    }

    /// The policy as written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Windows of history that it needs, at least 1.
    pub fn windows(&self) -> usize {
        self.conditions.iter().map(|condition| condition.windows).max().unwrap_or(1)
    }

    /// True if it holds now. `history` is of one model version, the newest window last.
    pub fn holds(&self, history: &VecDeque<WindowFacts>) -> bool {
        self.conditions.iter().any(|condition| {
            history.len() >= condition.windows
                && history.iter().rev().take(condition.windows).all(|window| condition.holds(window))
        })
    }
}

impl Condition {
    fn holds(&self, window: &WindowFacts) -> bool {
        self.comparisons.iter().all(|comparison| match comparison {
            Comparison::ScoreDrifted => window.score_drifted,
            Comparison::DriftedFeatures(operator, value) => operator.holds(f64::from(window.drifted_features), *value),
            Comparison::MaxPsi(operator, value) => operator.holds(window.max_psi, *value),
        })
    }
}

impl Operator {
    fn holds(self, left: f64, right: f64) -> bool {
        match self {
            Self::AtLeast => left >= right,
            Self::Above => left > right,
            Self::AtMost => left <= right,
            Self::Below => left < right,
            Self::Equal => left == right,
        }
    }
}

/// Byte offset and problem.
type Fault = (usize, String);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Token<'a> {
    Word(&'a str),
    Number(f64),
    Operator(Operator),
}

fn tokens(text: &str) -> Result<Vec<(usize, Token<'_>)>, Fault> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let at = text.len() - rest.len();
        let length = |belongs: fn(char) -> bool| rest.find(|c| !belongs(c)).unwrap_or(rest.len());
        let (token, length) = if first.is_ascii_alphabetic() {
            let length = length(|c| c.is_ascii_alphanumeric() || c == '_');
            (Token::Word(&rest[..length]), length)
        } else if first.is_ascii_digit() || first == '.' {
            let length = length(|c| c.is_ascii_digit() || c == '.' || c == '_');
            let number = rest[..length].replace('_', "").parse();
            (Token::Number(number.map_err(|_| (at, format!("'{}' is not a number", &rest[..length])))?), length)
        } else {
            let length = length(|c| "<>=!".contains(c));
            let operator = match &rest[..length] {
                ">=" => Operator::AtLeast,
                ">" => Operator::Above,
                "<=" => Operator::AtMost,
                "<" => Operator::Below,
                "=" | "==" => Operator::Equal,
                "" => return Err((at, format!("'{first}' has no meaning here"))),
                other => return Err((at, format!("'{other}' is not one of >= > <= < ="))),
            };
            (Token::Operator(operator), length)
        };
        tokens.push((at, token));
        rest = rest[length..].trim_start();
    }
    Ok(tokens)
}

struct Parser<'a> {
    text: &'a str,
    tokens: Vec<(usize, Token<'a>)>,
    next: usize,
}

impl<'a> Parser<'a> {
    fn policy(&mut self) -> Result<Vec<Condition>, Fault> {
        let mut conditions = vec![self.condition()?];
        while self.word("or") {
            conditions.push(self.condition()?);
        }
        match self.tokens.get(self.next) {
            None => Ok(conditions),
            Some(&(at, _)) => Err((at, "expected 'and', 'or', 'for' or the end".to_owned())),
        }
    }

    fn condition(&mut self) -> Result<Condition, Fault> {
        let mut comparisons = vec![self.comparison()?];
        while self.word("and") {
            comparisons.push(self.comparison()?);
        }
        let mut windows = 1;
        if self.word("for") {
            let (at, value) = self.number("a number of windows")?;
            if value.fract() != 0.0 || !(1.0..=MOST_WINDOWS as f64).contains(&value) {
                return Err((at, format!("a number of windows is whole and from 1 to {MOST_WINDOWS}")));
            }
            windows = value as usize;
            if !self.word("windows") && !self.word("window") {
                return Err((self.here(), "expected 'windows'".to_owned()));
            }
        }
        Ok(Condition { comparisons, windows })
    }

    fn comparison(&mut self) -> Result<Comparison, Fault> {
        let at = self.here();
        let Some(&(_, Token::Word(word))) = self.tokens.get(self.next) else {
            return Err((at, "expected drifted_features, score_drifted or max_psi".to_owned()));
        };
        self.next += 1;
        let make = match word {
            "score_drifted" => return Ok(Comparison::ScoreDrifted),
            "drifted_features" => Comparison::DriftedFeatures,
            "max_psi" => Comparison::MaxPsi,
            other => {
                let problem = format!("'{other}' is not one of drifted_features, score_drifted, max_psi");
                return Err((at, problem));
            }
        };
        let Some(&(_, Token::Operator(operator))) = self.tokens.get(self.next) else {
            return Err((self.here(), format!("expected >= > <= < or = after {word}")));
        };
        self.next += 1;
        let (_, value) = self.number("a number")?;
        Ok(make(operator, value))
    }

    fn number(&mut self, what: &str) -> Result<(usize, f64), Fault> {
        match self.tokens.get(self.next) {
            Some(&(at, Token::Number(value))) => {
                self.next += 1;
                Ok((at, value))
            }
            _ => Err((self.here(), format!("expected {what}"))),
        }
    }

    fn word(&mut self, wanted: &str) -> bool {
        let found = matches!(self.tokens.get(self.next), Some((_, Token::Word(word))) if *word == wanted);
        self.next += usize::from(found);
        found
    }

    fn here(&self) -> usize {
        self.tokens.get(self.next).map_or(self.text.len(), |(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn facts(drifted_features: u32, score_drifted: bool, max_psi: f64) -> WindowFacts {
        WindowFacts { drifted_features, score_drifted, max_psi }
    }

    #[rstest]
    #[case::enough("drifted_features >= 1", &[1], true)]
    #[case::too_few("drifted_features >= 2", &[1], false)]
    #[case::newest_decides("drifted_features >= 1", &[3, 0], false)]
    #[case::two_in_a_row("drifted_features >= 1 for 2 windows", &[0, 1, 1], true)]
    #[case::interrupted("drifted_features >= 1 for 2 windows", &[1, 0, 1], false)]
    #[case::history_too_short("drifted_features >= 0 for 3 windows", &[1, 1], false)]
    #[case::one_window("drifted_features > 0 for 1 window", &[1], true)]
    #[case::equal("drifted_features = 2", &[2], true)]
    #[case::range("drifted_features > 1 and drifted_features < 4 for 2 windows", &[2, 3], true)]
    #[case::either("drifted_features >= 9 or drifted_features <= 1 for 2 windows", &[1, 1], true)]
    #[case::for_binds_to_its_and("drifted_features >= 1 or drifted_features >= 9 for 2 windows", &[1], true)]
    fn conditions_hold_over_windows(#[case] policy: &str, #[case] windows: &[u32], #[case] holds: bool) {
        let history = windows.iter().map(|count| facts(*count, false, 0.0)).collect();
        assert_eq!(Policy::parse(policy).unwrap().holds(&history), holds);
    }

    #[test]
    fn the_score_and_psi_can_be_asked_for() {
        let policy = Policy::parse("score_drifted and max_psi >= .25").unwrap();
        assert!(policy.holds(&[facts(0, true, 0.25)].into()));
        assert!(!policy.holds(&[facts(0, true, 0.2)].into()));
        assert!(!policy.holds(&[facts(0, false, 0.3)].into()));
        assert!(!policy.holds(&VecDeque::new()));
    }

    #[test]
    fn it_tells_how_many_windows_it_needs() {
        assert_eq!(Policy::parse("score_drifted").unwrap().windows(), 1);
        assert_eq!(Policy::parse("score_drifted for 2 windows or max_psi > 1 for 7 windows").unwrap().windows(), 7);
    }

    #[rstest]
    #[case("", 1, "expected drifted_features, score_drifted or max_psi")]
    #[case("drifted_feature >= 1", 1, "'drifted_feature' is not one of")]
    #[case("drifted_features 1", 18, "expected >= > <= < or =")]
    #[case("drifted_features >=", 20, "expected a number")]
    #[case("drifted_features => 1", 18, "'=>' is not one of")]
    #[case("max_psi > 1.2.3", 11, "'1.2.3' is not a number")]
    #[case("score_drifted for two windows", 19, "expected a number of windows")]
    #[case("score_drifted for 0 windows", 19, "from 1 to 1000")]
    #[case("score_drifted for 1.5 windows", 19, "from 1 to 1000")]
    #[case("score_drifted for 2", 20, "expected 'windows'")]
    #[case("score_drifted, max_psi > 1", 14, "',' has no meaning here")]
    #[case("score_drifted score_drifted", 15, "expected 'and', 'or', 'for' or the end")]
    #[case("score_drifted or", 17, "expected drifted_features")]
    #[case("max_psi > 1 or ☃", 16, "'☃' has no meaning here")]
    fn faults_are_told_with_their_column(#[case] policy: &str, #[case] column: usize, #[case] problem: &str) {
        let error = Policy::parse(policy).unwrap_err();
        assert_eq!(error.column, column, "{error}");
        assert!(error.problem.contains(problem), "{error}");
    }
}
