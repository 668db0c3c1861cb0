//! Faults: what is wrong in a pipeline's files, where, and what to do about it.

use std::fmt;
use std::fmt::Write as _;
use std::ops::Range;

use serde::Serialize;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Fault {
    /// The file as the user named it, or `command line`.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Character in the line, from 1.
    pub column: usize,
    /// Characters concerned, at least 1.
    pub length: usize,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// The line itself; empty where there is none to show.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source: String,
}

impl Fault {
    /// A fault of a whole file that could not be read.
    pub fn of_file(file: impl Into<String>, message: impl Into<String>, help: Option<String>) -> Self {
        Self { file: file.into(), line: 1, column: 1, length: 1, message: message.into(), help, source: String::new() }
    }

    /// A fault at some bytes of a file's text.
    pub fn at(file: &str, text: &str, span: Range<usize>, message: String, help: Option<String>) -> Self {
        let start = floor_boundary(text, span.start.min(text.len()));
        let line_start = text[..start].rfind('\n').map_or(0, |end| end + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |end| start + end);
        let end = floor_boundary(text, span.end.clamp(start, line_end));
        Self {
            file: file.to_owned(),
            line: text[..line_start].matches('\n').count() + 1,
            column: text[line_start..start].chars().count() + 1,
            length: text[start..end].chars().count().max(1),
            message,
            help,
            source: text[line_start..line_end].trim_end_matches('\r').to_owned(),
        }
    }

    fn render(&self, out: &mut String, gutter: usize, paint: Paint) {
        let Paint { error, frame, help, bold, end } = paint;
        let _ = writeln!(out, "{error}error{end}{bold}: {}{end}", self.message);
        let _ = writeln!(out, "{:gutter$}{frame}-->{end} {}:{}:{}", "", self.file, self.line, self.column);
        if !self.source.is_empty() {
            let lead: String =
                self.source.chars().take(self.column - 1).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
            let _ = writeln!(out, "{:gutter$} {frame}|{end}", "");
            let _ = writeln!(out, "{frame}{:>gutter$} |{end} {}", self.line, self.source);
            let _ = writeln!(out, "{:gutter$} {frame}|{end} {lead}{error}{}{end}", "", "^".repeat(self.length));
        }
        if let Some(text) = &self.help {
            let _ = writeln!(out, "{:gutter$} {frame}={end} {help}help{end}: {text}", "");
        }
    }
}

fn floor_boundary(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

#[derive(Clone, Copy)]
struct Paint {
    error: &'static str,
    frame: &'static str,
    help: &'static str,
    bold: &'static str,
    end: &'static str,
}

const PLAIN: Paint = Paint { error: "", frame: "", help: "", bold: "", end: "" };
const COLOUR: Paint =
    Paint { error: "\x1b[1;31m", frame: "\x1b[1;34m", help: "\x1b[1;36m", bold: "\x1b[1m", end: "\x1b[0m" };

/// All faults of a pipeline, by file, line and column. At least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults(Vec<Fault>);

impl Faults {
    /// Sorts the faults and drops repeated ones; `None` where there are none.
    pub fn new(mut faults: Vec<Fault>) -> Option<Self> {
        faults.sort();
        faults.dedup();
        if faults.is_empty() { None } else { Some(Self(faults)) }
    }

    /// The faults, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Fault> {
        self.0.iter()
    }

    /// How many: at least 1.
    #[allow(clippy::len_without_is_empty, reason = "there is always at least one")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Writes each fault with its line and a mark under the place, and a count at the end. `colour` adds ANSI colours.
    pub fn render(&self, colour: bool) -> String {
        let paint = if colour { COLOUR } else { PLAIN };
        let gutter = self.0.iter().map(|f| f.line).max().unwrap_or(1).to_string().len();
        let mut out = String::new();
        for fault in &self.0 {
            fault.render(&mut out, gutter, paint);
            out.push('\n');
        }
        let files: std::collections::BTreeSet<&str> = self.0.iter().map(|f| f.file.as_str()).collect();
        let files: Vec<&str> = files.into_iter().collect();
        let count = if self.0.len() == 1 { "1 fault".to_owned() } else { format!("{} faults", self.0.len()) };
        let _ = writeln!(out, "{count} in {}", files.join(", "));
        out
    }

    /// The faults as JSON, one object with the fields of [`Fault`] a line.
    pub fn to_json_lines(&self) -> String {
        self.0
            .iter()
            .map(|fault| serde_json::to_string(fault).expect("texts and numbers can be written as JSON") + "\n")
            .collect()
    }
}

impl<'a> IntoIterator for &'a Faults {
    type Item = &'a Fault;
    type IntoIter = std::slice::Iter<'a, Fault>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Faults {}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "name = \"churn\"\n\ttopics = \"ä.purchases\" # tab\nlast";

    fn fault(span: Range<usize>) -> Fault {
        Fault::at("pipeline.toml", TEXT, span, "wrong".into(), Some("mend it".into()))
    }

    #[test]
    fn places_count_characters_from_one() {
        let topics = TEXT.find("purchases").unwrap();
        let at = fault(topics..topics + 9);
        assert_eq!((at.line, at.column, at.length), (2, 14, 9));
        let past_the_end = fault(TEXT.len()..TEXT.len() + 5);
        assert_eq!((past_the_end.line, past_the_end.column, past_the_end.length), (3, 5, 1));
        let over_lines = fault(0..TEXT.len());
        assert_eq!((over_lines.line, over_lines.length), (1, 14));
    }

    #[test]
    fn renders_the_line_with_a_mark() {
        let topics = TEXT.find("topics").unwrap();
        let faults = Faults::new(vec![fault(topics..topics + 6), fault(0..4)]).unwrap();
        assert_eq!(
            faults.render(false),
            "error: wrong\n --> pipeline.toml:1:1\n  |\n1 | name = \"churn\"\n  | ^^^^\n  = help: mend it\n\n\
             error: wrong\n --> pipeline.toml:2:2\n  |\n2 | \ttopics = \"ä.purchases\" # tab\n  | \t^^^^^^\n  = help: mend it\n\n\
             2 faults in pipeline.toml\n"
        );
        assert!(faults.render(true).contains("\x1b[1;31m^^^^\x1b[0m"));
    }

    #[test]
    fn writes_json() {
        let faults = Faults::new(vec![Fault::of_file("pipeline.toml", "cannot be read", None)]).unwrap();
        let json: serde_json::Value = serde_json::from_str(faults.to_json_lines().trim_end()).unwrap();
        assert_eq!(json["line"], 1);
        assert_eq!(json["message"], "cannot be read");
        assert!(json.get("help").is_none());
    }
}
