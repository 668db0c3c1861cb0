//! Runs a target over changed inputs, finds those that panic or ask for far more memory than they have bytes, and makes them
//! small.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::Duration;

use driftline::runtime::clock;
use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;

use super::mutate::{Mutator, Shape};

/// Bytes that a decoder may ask for at once: inputs have at most a thousandth of it.
const MOST_AT_ONCE: usize = 256 << 20;
/// Bytes that it does not get: the process then ends, and the note of the case under way stays.
const NEVER: usize = 2 << 30;

/// Attempts at making a panicking input smaller.
const ATTEMPTS: usize = 3000;

/// One decoder under test.
pub struct Target<'a> {
    /// Name, for messages.
    pub name: &'a str,
    /// What each part of an input is.
    pub shapes: &'a [Shape],
    /// Valid inputs, each with as many parts.
    pub corpus: Vec<Vec<Vec<u8>>>,
    /// Words that inputs are made of, where random ones would rarely hit.
    pub words: &'a [&'a str],
    /// Cases of a default run.
    pub cases: u64,
}

thread_local! {
    /// Panics of this thread are expected, so they are not printed.
    static QUIET: Cell<bool> = const { Cell::new(false) };
    /// The most bytes that this thread has asked for at once, while it decodes.
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, which notes what decoders ask for.
pub struct Watched;

impl Watched {
    /// False where a decoder asks for what it must not get.
    fn allows(bytes: usize) -> bool {
        // A thread that ends has no such values any more.
        if QUIET.try_with(Cell::get).unwrap_or(false) {
            let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(bytes)));
            return bytes <= NEVER;
        }
        true
    }
}

// SAFETY: all is done by the system's allocator, which keeps the contract; a refusal is a null, as it is there.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract.
        if Self::allows(layout.size()) { unsafe { System.alloc(layout) } } else { std::ptr::null_mut() }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract.
        if Self::allows(layout.size()) { unsafe { System.alloc_zeroed(layout) } } else { std::ptr::null_mut() }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller keeps the contract.
        if Self::allows(size) { unsafe { System.realloc(at, layout, size) } } else { std::ptr::null_mut() }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(at, layout) }
    }
}

/// What a run is asked for by the environment.
struct Asked {
    /// Go on for so long, instead of the default number of cases.
    time: Option<Duration>,
    /// Begin with this case.
    first: u64,
    /// This many cases, instead of the default number.
    cases: Option<u64>,
}

impl Asked {
    fn read() -> Self {
        let number = |name: &str| -> Option<u64> {
            let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
            Some(text.parse().unwrap_or_else(|_| panic!("{name} is no whole number: {text:?}")))
        };
        Self {
            time: number("DRIFTLINE_FUZZ_SECONDS").map(Duration::from_secs),
            first: number("DRIFTLINE_FUZZ_FIRST").unwrap_or(0),
            cases: number("DRIFTLINE_FUZZ_CASES"),
        }
    }
}

impl Target<'_> {
    /// Runs it: `decode` gets the parts of one input after the other and must not panic.
    pub fn run(&self, decode: impl Fn(&[Vec<u8>])) {
        self.run_with(decode, &Asked::read());
    }

    fn run_with(&self, decode: impl Fn(&[Vec<u8>]), asked: &Asked) {
        assert!(self.corpus.iter().all(|input| input.len() == self.shapes.len()), "an input lacks a part");
        hide_expected_panics();
        // The corpus itself first: that it decodes at all, each target asserts by itself.
        for input in &self.corpus {
            decode(input);
        }
        let note = Note::open(self.name);
        let started = clock::monotonic();
        let wanted = asked.cases.unwrap_or(self.cases);
        let mut case = asked.first;
        loop {
            let done = match asked.time {
                Some(time) => clock::monotonic() - started >= time,
                None => case - asked.first >= wanted,
            };
            if done {
                return;
            }
            note.put(case);
            let input = self.input(case);
            if panics(&decode, &input).is_some() {
                let small = self.shrink(&decode, input);
                let message = panics(&decode, &small).expect("what shrinking keeps panics");
                panic!("{}", self.report(case, &small, &message));
            }
            case += 1;
        }
    }

    /// The input of a case: a function of the target and the number alone.
    fn input(&self, case: u64) -> Vec<Vec<u8>> {
        let mut rng = ChaCha8Rng::seed_from_u64(case);
        Mutator { rng: &mut rng, corpus: &self.corpus, words: self.words }.input(self.shapes)
    }

    /// Cuts pieces out of a panicking input, the larger ones first, for as long as it still panics.
    fn shrink(&self, decode: &impl Fn(&[Vec<u8>]), mut input: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let mut attempts = 0;
        let mut piece = input.iter().map(Vec::len).max().unwrap_or(0).next_power_of_two();
        while piece > 0 {
            let mut smaller = false;
            for part in 0..input.len() {
                let mut at = 0;
                while at < input[part].len() && attempts < ATTEMPTS {
                    attempts += 1;
                    let mut shorter = input.clone();
                    let end = (at + piece).min(shorter[part].len());
                    shorter[part].drain(at..end);
                    if panics(decode, &shorter).is_some() {
                        input = shorter;
                        smaller = true;
                    } else {
                        at += piece;
                    }
                }
            }
            if !smaller || attempts >= ATTEMPTS {
                piece /= 2;
            }
        }
        input
    }

    fn report(&self, case: u64, input: &[Vec<u8>], message: &str) -> String {
        let mut text = format!("fuzzing {}: case {case} panics: {message}\n", self.name);
        for (number, part) in input.iter().enumerate() {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "part {number}, made smaller ({} bytes): b\"{}\"", part.len(), part.escape_ascii());
        }
        let _ = write!(text, "again: DRIFTLINE_FUZZ_FIRST={case} DRIFTLINE_FUZZ_CASES=1");
        text
    }
}

/// The panic's message, where there is one; or what was asked for, where that was too much.
fn panics(decode: &impl Fn(&[Vec<u8>]), input: &[Vec<u8>]) -> Option<String> {
    LARGEST.set(0);
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(|| decode(input)));
    QUIET.set(false);
    let largest = LARGEST.get();
    if largest > MOST_AT_ONCE {
        return Some(format!("it asks for {largest} bytes at once"));
    }
    let payload = result.err()?;
    let text = payload.downcast_ref::<String>().cloned();
    Some(text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default())
}

fn hide_expected_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
}

/// The number of the case under way, in a file: an overflowing stack or a lack of memory ends the process without a word.
struct Note(File);

impl Note {
    fn path(name: &str) -> PathBuf {
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}.case"))
    }

    fn open(name: &str) -> Self {
        Self(File::create(Self::path(name)).expect("cargo's folder for tests is writable"))
    }

    fn put(&self, case: u64) {
        let text = format!("{case:020}\n");
        self.0.write_all_at(text.as_bytes(), 0).expect("cargo's folder for tests is writable");
    }
}

#[test]
fn a_panic_is_found_and_its_input_made_small() {
    let target = Target {
        name: "self-test",
        shapes: &[Shape::Text, Shape::Bytes],
        corpus: vec![vec![b"first second third".to_vec(), vec![0; 32]]],
        words: &["boom"],
        cases: 20_000,
    };
    let decode = |parts: &[Vec<u8>]| {
        let has = |what: &[u8]| parts[0].windows(what.len()).any(|window| window == what);
        assert!(!(has(b"boom") && parts[1].contains(&0xff)), "it blew up");
    };
    let asked = Asked { time: None, first: 0, cases: None };
    let failed = catch_unwind(AssertUnwindSafe(|| target.run_with(decode, &asked))).expect_err("the panic is found");
    let text = failed.downcast_ref::<String>().expect("it is told in words");
    assert!(text.contains("it blew up"), "{text}");
    assert!(text.contains("(4 bytes): b\"boom\"") && text.contains("(1 bytes): b\"\\xff\""), "{text}");
    // The case that it names panics by itself.
    let case = text.split("DRIFTLINE_FUZZ_FIRST=").nth(1).and_then(|rest| rest.split(' ').next()).expect("a number");
    assert!(panics(&decode, &target.input(case.parse().expect("a number"))).is_some());
}

#[test]
fn a_decoder_that_believes_a_length_is_found() {
    let target = Target {
        name: "greedy",
        shapes: &[Shape::Bytes],
        corpus: vec![vec![4_u32.to_le_bytes().to_vec()]],
        words: &[],
        cases: 5_000,
    };
    let decode = |parts: &[Vec<u8>]| {
        let length = parts[0].first_chunk().map_or(0, |length| u32::from_le_bytes(*length).min(1 << 29));
        drop(std::hint::black_box(Vec::<u8>::with_capacity(length as usize)));
    };
    let asked = Asked { time: None, first: 0, cases: None };
    let failed = catch_unwind(AssertUnwindSafe(|| target.run_with(decode, &asked))).expect_err("it is found");
    let text = failed.downcast_ref::<String>().expect("it is told in words");
    assert!(text.contains("bytes at once"), "{text}");
}

#[test]
fn a_case_is_the_same_each_time() {
    let target = Target {
        name: "repeat",
        shapes: &[Shape::Json],
        corpus: vec![vec![br#"{"a": [1, 2.5, "x"]}"#.to_vec()], vec![b"[null]".to_vec()]],
        words: &["word"],
        cases: 0,
    };
    let inputs: Vec<_> = (0..500).map(|case| target.input(case)).collect();
    assert!((0..500).map(|case| target.input(case)).eq(inputs.iter().cloned()));
    let different: std::collections::BTreeSet<_> = inputs.into_iter().collect();
    assert!(different.len() > 300, "{} different inputs", different.len());
}
