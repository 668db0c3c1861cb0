//! Environment variables in string values: `${NAME}`, `${NAME:-default}`, and `$${` for a plain `${`.

use std::ops::Range;

use super::document::{Collector, Node, Site, Text, Value};

/// Looks up an environment variable.
pub type Environment<'e> = &'e dyn Fn(&str) -> Option<String>;

/// Replaces the variables in all string values. One that has no value and no default is a fault.
pub(super) fn interpolate(node: &mut Node, environment: Environment<'_>, faults: &mut Collector) {
    match &mut node.value {
        Value::String(text) if text.value.contains("${") => match expand(text, environment) {
            Ok(expanded) => *text = expanded,
            Err(errors) => {
                for error in errors {
                    let place = Site::root(node).text(error.span);
                    faults.report(&place, error.message, error.help);
                }
                node.mute();
            }
        },
        Value::Array(items) => {
            for item in items {
                interpolate(item, environment, faults);
            }
        }
        Value::Table(entries) => {
            for entry in entries {
                interpolate(&mut entry.node, environment, faults);
            }
        }
        _ => {}
    }
}

#[derive(Debug, PartialEq, Eq)]
struct InterpolationError {
    message: String,
    help: Option<String>,
    span: Range<usize>,
}

fn expand(text: &Text, environment: Environment<'_>) -> Result<Text, Vec<InterpolationError>> {
    let template = text.value.as_str();
    let mut value = String::new();
    let mut origins = Vec::new();
    let mut errors = Vec::new();
    let mut at = 0;
    while at < template.len() {
        let rest = &template[at..];
        if rest.starts_with("$${") {
            value.push_str("${");
            origins.extend([text.origin(at), text.origin(at + 2)]);
            at += 3;
        } else if rest.starts_with("${") {
            let Some(length) = rest.find('}') else {
                errors.push(InterpolationError {
                    message: "`${` without `}`".into(),
                    help: Some("close it, or write $${ for a plain ${".into()),
                    span: at..template.len(),
                });
                break;
            };
            match variable(&rest[2..length], environment) {
                Ok(found) => {
                    origins.extend(std::iter::repeat_n(text.origin(at), found.len()));
                    value.push_str(&found);
                }
                Err((message, help)) => {
                    errors.push(InterpolationError { message, help: Some(help), span: at..at + length + 1 });
                }
            }
            at += length + 1;
        } else {
            let next = rest.char_indices().nth(1).map_or(rest.len(), |(next, _)| next);
            value.push_str(&rest[..next]);
            origins.extend((at..at + next).map(|byte| text.origin(byte)));
            at += next;
        }
    }
    origins.push(text.origin(template.len()));
    if errors.is_empty() { Ok(Text::new(value, origins, true)) } else { Err(errors) }
}

/// The value of what stands between the brackets.
fn variable(inside: &str, environment: Environment<'_>) -> Result<String, (String, String)> {
    let (name, default) = inside.split_once(":-").map_or((inside, None), |(name, default)| (name, Some(default)));
    let valid = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !valid {
        let message = format!("`{name}` is not the name of an environment variable");
        return Err((message, "write ${NAME}, ${NAME:-default}, or $${ for a plain ${".into()));
    }
    match (environment(name), default) {
        // As in the shell, an empty variable counts as unset where there is a default.
        (Some(found), default) if !found.is_empty() || default.is_none() => Ok(found),
        (_, Some(default)) => Ok(default.to_owned()),
        _ => Err((
            format!("environment variable {name} is not set"),
            format!("set it, or give a default: ${{{name}:-…}}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    fn text(value: &str) -> Text {
        Text::new(value.to_owned(), (10..=10 + value.len()).collect(), false)
    }

    fn environment(name: &str) -> Option<String> {
        match name {
            "HOST" => Some("kafka:9092".into()),
            "EMPTY" => Some(String::new()),
            _ => None,
        }
    }

    #[rstest]
    #[case("${HOST}", "kafka:9092")]
    #[case("a ${HOST} b ${HOST}", "a kafka:9092 b kafka:9092")]
    #[case("${NONE:-x}", "x")]
    #[case("${NONE:-}", "")]
    #[case("${EMPTY}", "")]
    #[case("${EMPTY:-x}", "x")]
    #[case("${HOST:-x}", "kafka:9092")]
    #[case("$${HOST} costs $5", "${HOST} costs $5")]
    #[case("ä${NONE:-ö}", "äö")]
    fn replaces(#[case] template: &str, #[case] expected: &str) {
        assert_eq!(expand(&text(template), &environment).unwrap().value, expected);
    }

    #[rstest]
    #[case("x ${NONE}", "environment variable NONE is not set", 2..9)]
    #[case("${1X}", "`1X` is not the name of an environment variable", 0..5)]
    #[case("${}", "`` is not the name of an environment variable", 0..3)]
    #[case("a ${HOST", "`${` without `}`", 2..8)]
    fn refuses(#[case] template: &str, #[case] message: &str, #[case] span: Range<usize>) {
        let errors = expand(&text(template), &environment).unwrap_err();
        assert_eq!((errors[0].message.as_str(), errors[0].span.clone()), (message, span));
    }

    #[test]
    fn what_follows_a_variable_keeps_its_place() {
        let expanded = expand(&text("${HOST} > 1"), &environment).unwrap();
        assert_eq!(expanded.origin(expanded.value.find('>').unwrap()), 10 + 8);
    }

    proptest! {
        #[test]
        fn nothing_panics(template in "[${}:a-cA-C_ä-]{0,24}") {
            let _ = expand(&text(&template), &environment);
        }
    }
}
