//! Texts of a task as numbers, so that they fit a word of a row.

use std::hash::Hasher;

use hashbrown::HashTable;
use rustc_hash::FxHasher;

/// Texts by number. 0 is no text.
#[derive(Debug)]
pub(super) struct Texts {
    table: HashTable<u32>,
    bytes: String,
    /// Where each text ends; the first entry belongs to number 0.
    ends: Vec<usize>,
    /// Size at which it pays to look for texts that are no longer used.
    collect_at: usize,
}

/// Fewest texts worth collecting.
const COLLECT_AT_LEAST: usize = 4096;

impl Default for Texts {
    fn default() -> Self {
        Self { table: HashTable::new(), bytes: String::new(), ends: vec![0], collect_at: COLLECT_AT_LEAST }
    }
}

impl Texts {
    /// The number of a text.
    pub fn number(&mut self, text: &str) -> u64 {
        let hash = hash(text);
        let (bytes, ends) = (&self.bytes, &self.ends);
        if let Some(&number) = self.table.find(hash, |&number| text_at(bytes, ends, number) == text) {
            return u64::from(number);
        }
        let number = u32::try_from(self.ends.len()).expect("a task has fewer than 2³² distinct texts");
        self.bytes.push_str(text);
        self.ends.push(self.bytes.len());
        let (bytes, ends) = (&self.bytes, &self.ends);
        self.table.insert_unique(hash, number, |&number| self::hash(text_at(bytes, ends, number)));
        u64::from(number)
    }

    /// The text of a number.
    pub fn get(&self, number: u64) -> &str {
        text_at(&self.bytes, &self.ends, number as u32)
    }

    /// True when the texts have doubled since unused ones were last left out.
    pub fn wants_collection(&self) -> bool {
        self.ends.len() >= self.collect_at
    }

    /// Starts anew. Whoever holds a number has to ask for a new one, in terms of the texts returned; then call
    /// [`Texts::collected`].
    pub fn start_over(&mut self) -> Self {
        std::mem::take(self)
    }

    /// All numbers in use were asked for again.
    pub fn collected(&mut self) {
        self.collect_at = (2 * self.ends.len()).max(COLLECT_AT_LEAST);
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes.capacity() + size_of::<usize>() * self.ends.capacity() + self.table.allocation_size()
    }
}

fn hash(text: &str) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(text.as_bytes());
    hasher.finish()
}

fn text_at<'a>(bytes: &'a str, ends: &[usize], number: u32) -> &'a str {
    match number as usize {
        0 => "",
        number => &bytes[ends[number - 1]..ends[number]],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_texts_and_forgets_unused_ones() {
        let mut texts = Texts::default();
        let (a, b, empty) = (texts.number("a"), texts.number("bé"), texts.number(""));
        assert_eq!((texts.number("a"), texts.get(a), texts.get(b), texts.get(empty)), (a, "a", "bé", ""));
        assert!(a != b && a != 0 && empty != 0);
        for number in 0..COLLECT_AT_LEAST {
            texts.number(&number.to_string());
        }
        assert!(texts.wants_collection());
        let old = texts.start_over();
        let kept = texts.number(old.get(b));
        texts.collected();
        assert_eq!(texts.get(kept), "bé");
        assert!(!texts.wants_collection());
    }
}
