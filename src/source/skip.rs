//! Passing over JSON that nobody asked for, however deep it nests.
//!
//! sonic-rs bounds how deep it reads, but not how deep it skips: its own skipping recurses once a level, so that one record of
//! brackets would overflow the stack. `IgnoredAny` leads to it, the unknown fields of derived structures, and an array or object
//! where another type was asked for.

use std::fmt;

use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};

/// Levels that a document may have which is read into a derived structure.
const DEEPEST: usize = 128;

/// True where a JSON document has more levels than anything that driftline writes, so that only [`Skip`] may pass over it.
/// Looks at brackets outside of strings alone.
pub(crate) fn nests_too_deeply(json: &[u8]) -> bool {
    // No deeper than there are brackets: with few, which is nearly always, that is all there is to count.
    if json.iter().filter(|byte| matches!(byte, b'[' | b'{')).count() <= DEEPEST {
        return false;
    }
    let (mut depth, mut in_text, mut escaped) = (0_usize, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'[' | b'{' if !in_text => {
                depth += 1;
                if depth > DEEPEST {
                    return true;
                }
            }
            b']' | b'}' if !in_text => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

/// Passes over a value of any kind, checking that it is JSON.
pub(crate) struct Skip;

impl<'de> DeserializeSeed<'de> for Skip {
    type Value = ();

    #[inline]
    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Skip {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Skip)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key_seed(Skip)?.is_some() {
            map.next_value_seed(Skip)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("{}", false)]
    #[case(&"[".repeat(129), true)]
    #[case(&"[]".repeat(1000), false)]
    #[case(&format!("[{:?}]", "[".repeat(1000)), false)]
    #[case(&format!(r#"["\\",{}"#, "{\"a\":".repeat(128)), true)]
    #[case(&format!(r#"["\"",{}"#, "[".repeat(127)), false)]
    fn levels_are_counted_outside_of_texts(#[case] json: &str, #[case] expected: bool) {
        assert_eq!(nests_too_deeply(json.as_bytes()), expected);
    }

    #[test]
    fn what_is_passed_over_is_bounded_too() {
        let text = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let mut parser = sonic_rs::Deserializer::from_str(&text);
        assert!(Skip.deserialize(&mut parser).unwrap_err().to_string().contains("deep"));
    }
}
