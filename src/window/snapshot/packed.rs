//! The states of one entity, apart from its task: with the texts that their words refer to.

use std::collections::HashMap;

use super::encode::SourceColumns;
use crate::window::engine::Engine;
use crate::window::ordered::visit;
use crate::window::state::State;
use crate::window::texts::Texts;

/// What a checkpoint has of the states of one entity.
#[derive(Debug)]
pub(in crate::window) struct Packed {
    pub sources: Vec<SourceParts>,
    /// Texts that the words refer to, counted from 1.
    pub texts: Vec<String>,
}

/// The parts of one source's state. See `State::parts`.
#[derive(Debug, Default)]
pub(in crate::window) struct SourceParts {
    pub rows: Vec<u64>,
    pub tiles: Vec<u64>,
    pub beyond: Vec<u64>,
    pub merged: Option<i64>,
}

impl Packed {
    /// Of an entity with these states.
    pub fn of(engine: &Engine, states: &[State], texts: &Texts) -> Self {
        let (mut local, mut named) = (HashMap::new(), Vec::new());
        let sources = states.iter().zip(&engine.sources).map(|(state, source)| {
            let mut columns = SourceColumns::default();
            columns.add(source, state, |word| {
                if *word != 0 {
                    *word = *local.entry(*word).or_insert_with(|| {
                        named.push(texts.get(*word).to_owned());
                        named.len() as u64
                    });
                }
            });
            columns.into_parts()
        });
        let sources = sources.collect();
        Self { sources, texts: named }
    }

    /// Of an entity without any.
    pub fn empty(engine: &Engine) -> Self {
        Self { sources: engine.sources.iter().map(|_| SourceParts::default()).collect(), texts: Vec::new() }
    }

    /// The states, their words in the numbers of `texts`.
    pub fn into_states(self, engine: &Engine, texts: &mut Texts) -> Vec<State> {
        let numbers: Vec<u64> = self.texts.iter().map(|text| texts.number(text)).collect();
        let mut renumber = |word: &mut u64| {
            if *word != 0 {
                *word = numbers.get(*word as usize - 1).copied().unwrap_or(0);
            }
        };
        let sources = self.sources.into_iter().zip(&engine.sources).map(|(parts, source)| {
            let SourceParts { mut rows, mut tiles, mut beyond, merged } = parts;
            let layout = &source.layout;
            visit(&mut rows, layout.row, 0, &source.text_words, &mut renumber);
            visit(&mut tiles, layout.tile, 1, &source.text_lanes, &mut renumber);
            visit(&mut beyond, layout.lanes.width().max(1), 0, &source.text_lanes, &mut renumber);
            let mut state = State::from_parts(layout, rows, tiles, beyond, merged.unwrap_or(i64::MIN));
            state.account();
            state
        });
        sources.collect()
    }

    /// As bytes: for each source, whether and when something was merged and the lengths of the lists, then their words; then
    /// the texts, each after its length. All numbers are little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut number = |number: u64| bytes.extend_from_slice(&number.to_le_bytes());
        for SourceParts { rows, tiles, beyond, merged } in &self.sources {
            number(u64::from(merged.is_some()));
            number(merged.unwrap_or(0).cast_unsigned());
            for words in [rows, tiles, beyond] {
                number(words.len() as u64);
                words.iter().for_each(|&word| number(word));
            }
        }
        for text in &self.texts {
            bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
        bytes
    }

    /// From bytes. `None` where they are not what was written.
    pub fn from_bytes(engine: &Engine, mut bytes: &[u8]) -> Option<Self> {
        fn number(bytes: &mut &[u8]) -> Option<u64> {
            let (number, rest) = bytes.split_first_chunk()?;
            *bytes = rest;
            Some(u64::from_le_bytes(*number))
        }
        fn words(bytes: &mut &[u8], item: usize) -> Option<Vec<u64>> {
            let count = usize::try_from(number(bytes)?).ok()?;
            let (words, rest) = bytes.split_at_checked(count.checked_mul(8)?)?;
            *bytes = rest;
            let words =
                words.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("it has eight bytes")));
            count.is_multiple_of(item).then(|| words.collect())
        }
        let mut sources = Vec::with_capacity(engine.sources.len());
        for source in &engine.sources {
            let layout = &source.layout;
            let (is_merged, merged) = (number(&mut bytes)?, number(&mut bytes)?.cast_signed());
            sources.push(SourceParts {
                merged: (is_merged != 0).then_some(merged),
                rows: words(&mut bytes, layout.row)?,
                tiles: words(&mut bytes, layout.tile)?,
                beyond: words(&mut bytes, layout.lanes.width().max(1))?,
            });
        }
        let mut texts = Vec::new();
        while !bytes.is_empty() {
            let length = usize::try_from(number(&mut bytes)?).ok()?;
            let (text, rest) = bytes.split_at_checked(length)?;
            texts.push(String::from_utf8(text.to_vec()).ok()?);
            bytes = rest;
        }
        Some(Self { sources, texts })
    }
}
