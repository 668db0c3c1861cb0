//! The states of one entity, and single events of one, apart from their task: with the texts that their words refer to.

use std::collections::HashMap;
use std::sync::Arc;

use super::encode::SourceColumns;
use crate::window::cold::Block;
use crate::window::engine::{Engine, Source};
use crate::window::ordered::{Chunk, visit};
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
    /// Chunks whose events are not in memory, in their order.
    pub chunks: Vec<PackedChunk>,
}

/// A chunk without its events.
#[derive(Debug)]
pub(in crate::window) struct PackedChunk {
    block: u64,
    first: i64,
    last: i64,
    lanes: Vec<u64>,
}

impl Packed {
    /// Of an entity with these states, without the events that are not in memory.
    pub fn of(engine: &Engine, states: &[State], texts: &Texts) -> Self {
        let (mut local, mut named) = (HashMap::new(), Vec::new());
        let sources = states.iter().zip(&engine.sources).map(|(state, source)| {
            let mut columns = SourceColumns::default();
            let mut renumber = |word: &mut u64| {
                if *word != 0 {
                    *word = *local.entry(*word).or_insert_with(|| {
                        named.push(texts.get(*word).to_owned());
                        named.len() as u64
                    });
                }
            };
            columns.add(source, state, &mut renumber);
            let chunks = state.parts().chunks.out().map(|chunk| {
                let block = chunk.block().expect("what is not in memory is in a block").number();
                let mut lanes = chunk.lanes.to_vec();
                visit(&mut lanes, source.layout.lanes.width().max(1), 0, &source.text_lanes, &mut renumber);
                PackedChunk { block, first: chunk.first(), last: chunk.last(), lanes }
            });
            SourceParts { chunks: chunks.collect(), ..columns.into_parts() }
        });
        let sources = sources.collect();
        Self { sources, texts: named }
    }

    /// With the events of its chunks, which `events` reads by their block.
    pub fn with_events(
        mut self,
        engine: &Engine,
        events: impl Fn(&Source, u64) -> Result<PackedRows, String>,
    ) -> Result<Self, String> {
        for (parts, source) in self.sources.iter_mut().zip(&engine.sources) {
            let chunks = std::mem::take(&mut parts.chunks);
            if chunks.is_empty() {
                continue;
            }
            for chunk in chunks {
                let PackedRows { mut words, texts } = events(source, chunk.block)?;
                let before = self.texts.len() as u64;
                visit(&mut words, source.layout.row, 0, &source.text_words, &mut |word| {
                    if *word != 0 {
                        *word += before;
                    }
                });
                self.texts.extend(texts);
                parts.rows.extend(words);
            }
            // Sorting is stable, and no time is in two of the pieces.
            let mut rows: Vec<&[u64]> = parts.rows.chunks_exact(source.layout.row).collect();
            rows.sort_by_key(|row| row[0] as i64);
            parts.rows = rows.concat();
        }
        Ok(self)
    }

    /// Of an entity without any.
    pub fn empty(engine: &Engine) -> Self {
        Self { sources: engine.sources.iter().map(|_| SourceParts::default()).collect(), texts: Vec::new() }
    }

    /// The states, their words in the numbers of `texts`. `blocks` are those of all chunks, in their order.
    pub fn into_states(self, engine: &Engine, texts: &mut Texts, blocks: Vec<Arc<Block>>) -> Vec<State> {
        let mut blocks = blocks.into_iter();
        let numbers: Vec<u64> = self.texts.iter().map(|text| texts.number(text)).collect();
        let mut renumber = |word: &mut u64| {
            if *word != 0 {
                *word = numbers.get(*word as usize - 1).copied().unwrap_or(0);
            }
        };
        let sources = self.sources.into_iter().zip(&engine.sources).map(|(parts, source)| {
            let SourceParts { mut rows, mut tiles, mut beyond, merged, chunks } = parts;
            let layout = &source.layout;
            visit(&mut rows, layout.row, 0, &source.text_words, &mut renumber);
            visit(&mut tiles, layout.tile, 1, &source.text_lanes, &mut renumber);
            visit(&mut beyond, layout.lanes.width().max(1), 0, &source.text_lanes, &mut renumber);
            let chunks = chunks.into_iter().zip(blocks.by_ref()).map(|(chunk, block)| {
                let PackedChunk { first, last, mut lanes, .. } = chunk;
                visit(&mut lanes, layout.lanes.width().max(1), 0, &source.text_lanes, &mut renumber);
                Chunk::on_disk(first, last, lanes.into_boxed_slice(), block)
            });
            let chunks = chunks.collect();
            let merged = merged.unwrap_or(i64::MIN);
            let state = State::from_parts(layout, rows, tiles, beyond, merged);
            let mut state = state.with_chunks(layout, merged, chunks);
            state.account();
            state
        });
        sources.collect()
    }

    /// As bytes: for each source, whether and when something was merged, the lists and the chunks, each list after its length;
    /// then the texts, each after its length. All numbers are little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for SourceParts { rows, tiles, beyond, merged, chunks } in &self.sources {
            put_number(&mut bytes, u64::from(merged.is_some()));
            put_number(&mut bytes, merged.unwrap_or(0).cast_unsigned());
            for words in [rows, tiles, beyond] {
                put_words(&mut bytes, words);
            }
            put_number(&mut bytes, chunks.len() as u64);
            for PackedChunk { block, first, last, lanes } in chunks {
                put_number(&mut bytes, *block);
                put_number(&mut bytes, first.cast_unsigned());
                put_number(&mut bytes, last.cast_unsigned());
                put_words(&mut bytes, lanes);
            }
        }
        put_texts(&mut bytes, &self.texts);
        bytes
    }

    /// From bytes. `None` where they are not what was written.
    pub fn from_bytes(engine: &Engine, mut bytes: &[u8]) -> Option<Self> {
        let bytes = &mut bytes;
        let mut sources = Vec::with_capacity(engine.sources.len());
        for source in &engine.sources {
            let layout = &source.layout;
            let (is_merged, merged) = (number(bytes)?, number(bytes)?.cast_signed());
            let mut parts = SourceParts {
                merged: (is_merged != 0).then_some(merged),
                rows: words(bytes, layout.row)?,
                tiles: words(bytes, layout.tile)?,
                beyond: words(bytes, layout.lanes.width().max(1))?,
                chunks: Vec::new(),
            };
            for _ in 0..number(bytes)? {
                let (block, first, last) = (number(bytes)?, number(bytes)?, number(bytes)?);
                let (first, last) = (first.cast_signed(), last.cast_signed());
                let lanes = words(bytes, layout.lanes.width().max(1))?;
                parts.chunks.push(PackedChunk { block, first, last, lanes });
            }
            sources.push(parts);
        }
        Some(Self { sources, texts: texts(bytes)? })
    }
}

/// Single events of one source.
#[derive(Debug)]
pub(in crate::window) struct PackedRows {
    words: Vec<u64>,
    /// Texts that the words refer to, counted from 1.
    texts: Vec<String>,
}

impl PackedRows {
    pub fn of(source: &Source, rows: &[u64], texts: &Texts) -> Self {
        let (mut local, mut named, mut words) = (HashMap::new(), Vec::new(), rows.to_vec());
        visit(&mut words, source.layout.row, 0, &source.text_words, &mut |word| {
            if *word != 0 {
                *word = *local.entry(*word).or_insert_with(|| {
                    named.push(texts.get(*word).to_owned());
                    named.len() as u64
                });
            }
        });
        Self { words, texts: named }
    }

    /// The rows, their words in the numbers of `texts`.
    pub fn into_rows(self, source: &Source, texts: &mut Texts) -> Vec<u64> {
        let numbers: Vec<u64> = self.texts.iter().map(|text| texts.number(text)).collect();
        let mut words = self.words;
        visit(&mut words, source.layout.row, 0, &source.text_words, &mut |word| {
            if *word != 0 {
                *word = numbers.get(*word as usize - 1).copied().unwrap_or(0);
            }
        });
        words
    }

    /// As bytes: the words after their number, then the texts, each after its length. All numbers are little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_words(&mut bytes, &self.words);
        put_texts(&mut bytes, &self.texts);
        bytes
    }

    /// From bytes. `None` where they are not what was written.
    pub fn from_bytes(source: &Source, mut bytes: &[u8]) -> Option<Self> {
        let words = words(&mut bytes, source.layout.row).filter(|words| !words.is_empty())?;
        Some(Self { words, texts: texts(&mut bytes)? })
    }
}

fn put_number(bytes: &mut Vec<u8>, number: u64) {
    bytes.extend_from_slice(&number.to_le_bytes());
}

fn put_words(bytes: &mut Vec<u8>, words: &[u64]) {
    put_number(bytes, words.len() as u64);
    words.iter().for_each(|&word| put_number(bytes, word));
}

fn put_texts(bytes: &mut Vec<u8>, texts: &[String]) {
    for text in texts {
        put_number(bytes, text.len() as u64);
        bytes.extend_from_slice(text.as_bytes());
    }
}

fn number(bytes: &mut &[u8]) -> Option<u64> {
    let (number, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u64::from_le_bytes(*number))
}

fn words(bytes: &mut &[u8], item: usize) -> Option<Vec<u64>> {
    let count = usize::try_from(number(bytes)?).ok()?;
    let (words, rest) = bytes.split_at_checked(count.checked_mul(8)?)?;
    *bytes = rest;
    let words = words.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("it has eight bytes")));
    count.is_multiple_of(item).then(|| words.collect())
}

fn texts(bytes: &mut &[u8]) -> Option<Vec<String>> {
    let mut texts = Vec::new();
    while !bytes.is_empty() {
        let length = usize::try_from(number(bytes)?).ok()?;
        let (text, rest) = bytes.split_at_checked(length)?;
        texts.push(String::from_utf8(text.to_vec()).ok()?);
        *bytes = rest;
    }
    Some(texts)
}
