//! Names: which ones are allowed, and which one was probably meant.

/// The candidate that `word` was probably meant to be: nearest by edits, at most a third of its letters apart, the case
/// and `-` for `_` being free. `None` where nothing is near.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let folded = fold(word);
    let allowed = (folded.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (distance(&folded, &fold(candidate)), candidate))
        .filter(|(distance, _)| *distance <= allowed)
        .min()
        .map(|(_, candidate)| candidate)
}

fn fold(word: &str) -> String {
    word.to_lowercase().replace('-', "_")
}

/// Edits between two words; a word that the other begins with, or that lacks only the plural's s, counts as one.
fn distance(a: &str, b: &str) -> usize {
    let shorter = a.len().min(b.len());
    if shorter >= 4 && (a.starts_with(b) || b.starts_with(a)) {
        return 1.min(a.len().abs_diff(b.len()));
    }
    strsim::osa_distance(a, b)
}

/// 'did you mean' for an unknown word, or the list of what there is where nothing is near and the list is short.
pub fn suggestion<'a>(word: &str, kind: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let mut known: Vec<&str> = candidates.into_iter().collect();
    if let Some(near) = nearest(word, known.iter().copied()) {
        return Some(format!("did you mean `{near}`?"));
    }
    known.sort_unstable();
    known.dedup();
    match known.len() {
        0 => Some(format!("there are no {kind}")),
        1..=12 => Some(format!("{kind}: {}", known.join(", "))),
        _ => None,
    }
}

/// True for a letter or underscore followed by letters, digits and underscores: a name that SQL can use as it stands.
pub fn is_identifier(name: &str) -> bool {
    let mut letters = name.chars();
    letters.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && letters.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// True for a name that Kafka allows for a topic, in which driftline also names pipelines, models and aliases: letters,
/// digits, `.`, `_` and `-`, at most 249 of them, not `.` or `..`.
pub fn is_topic(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 249
        && name != "."
        && name != ".."
        && name.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("topics", &["topic", "format"], Some("topic"))]
    #[case("Out-Of-Order", &["out_of_order"], Some("out_of_order"))]
    #[case("funtions", &["functions", "windows"], Some("functions"))]
    #[case("feature", &["features", "derived"], Some("features"))]
    #[case("spend_sum_3d", &["spend_sum_30d", "spend_mean_30d"], Some("spend_sum_30d"))]
    #[case("zebra", &["topic", "format"], None)]
    #[case("a", &[], None)]
    fn finds_what_was_meant(#[case] word: &str, #[case] known: &[&str], #[case] meant: Option<&str>) {
        assert_eq!(nearest(word, known.iter().copied()), meant);
    }

    #[test]
    fn lists_what_there_is_when_nothing_is_near() {
        assert_eq!(suggestion("zebra", "keys", ["topic", "format"]).unwrap(), "keys: format, topic");
    }
}
