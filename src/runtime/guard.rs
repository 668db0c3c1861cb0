//! Reading files with other crates' readers, which may panic where a file is damaged.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs a reader of another crate over bytes that may be damaged. Where it panics, the reader must not be used again: what it
/// holds may be in any state.
///
/// # Errors
/// The panic's message.
pub fn guarded<T>(read: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
        format!("the file is damaged (its reader failed: {text})")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_with_its_message() {
        assert_eq!(guarded(|| 7), Ok(7));
        let indexes: &[usize] = &[];
        assert_eq!(
            guarded(|| indexes[1]),
            Err("the file is damaged (its reader failed: index out of bounds: the len is 0 but the index is 1)"
                .to_owned())
        );
    }
}
