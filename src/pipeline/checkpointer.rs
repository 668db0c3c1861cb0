//! The thread that writes a worker's checkpoints, one after the other.
//!
//! State arrives in slices and is written in parts as they fill, each a file, so that no more than a part waits in memory.
//! A checkpoint counts when its manifest is written, last of all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};

use arrow::array::RecordBatch;

use super::RunError;
use super::context::Context;
use crate::broker::Offsets;
use crate::runtime::backoff::Backoff;
use crate::store::{Checkpoint, Manifest, OfflineError, StateFile};
use crate::telemetry::metrics::{CHECKPOINT_BYTES, Step, Steps};
use crate::window::Extent;

/// Attempts at a checkpoint after a stop was asked for. What is not written then is computed again at the next start.
const LAST_ATTEMPTS: u32 = 5;

/// State is written when so many bytes have come.
const PART_BYTES: usize = 64 << 20;

/// Slices and checkpoints that may be on their way before the worker has to wait.
const ROOM: usize = 2;

/// A checkpoint to be written.
pub(super) struct Job {
    /// Next offset to read, by source partition.
    pub next: Offsets,
    /// The last of its state.
    pub state: Vec<RecordBatch>,
    /// How much of the state it holds.
    pub extent: Extent,
    /// Feature rows since the last checkpoint.
    pub rows: Vec<RecordBatch>,
    /// Rows of emitted windows since the last checkpoint, by name.
    pub windows: Vec<(String, Vec<RecordBatch>)>,
}

enum Message {
    /// A task was restored from this manifest: its next checkpoint follows it.
    Begin(i32, Option<Box<Manifest>>),
    Work(i32, Work),
    /// Answered once all that came before is written.
    Wait(SyncSender<()>),
}

enum Work {
    /// State of a task's checkpoint to come.
    Slice(Vec<RecordBatch>),
    Write(Job),
}

/// What a partition's next checkpoint follows.
enum Chain {
    At(Box<Next>),
    /// One that was not written: its rows are in no file, so no later checkpoint may take their offsets as done.
    Broken,
}

/// The next checkpoint of a partition.
#[derive(Default)]
struct Next {
    /// The one before, if there is one.
    previous: Option<Box<Manifest>>,
    /// Parts of its state that are written.
    parts: Vec<StateFile>,
    /// State that is not.
    state: Vec<RecordBatch>,
    bytes: usize,
}

/// See the module.
pub(super) struct Checkpointer {
    messages: Option<SyncSender<Message>>,
    errors: Receiver<RunError>,
    outstanding: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Checkpointer {
    /// Starts the thread of worker `number`.
    pub fn start(context: &Arc<Context>, number: usize) -> Result<Self, RunError> {
        let (messages, inbox) = mpsc::sync_channel(ROOM);
        let (failed, errors) = mpsc::channel();
        let outstanding = Arc::new(AtomicUsize::new(0));
        let (context, counter) = (Arc::clone(context), Arc::clone(&outstanding));
        let thread = thread::Builder::new()
            .name(format!("checkpoint-{number}"))
            .spawn(move || {
                let mut chains = BTreeMap::new();
                let steps = Steps::of(&context.plan.name);
                for message in inbox {
                    match message {
                        Message::Begin(partition, manifest) => {
                            // What a killed run has left: without new rows no checkpoint would come to sweep it.
                            sweep(&context, partition);
                            chains
                                .insert(partition, Chain::At(Box::new(Next { previous: manifest, ..Next::default() })));
                        }
                        Message::Wait(answer) => {
                            // Who asked may have ended.
                            let _ = answer.send(());
                        }
                        Message::Work(partition, work) => {
                            let result = write(&context, &steps, &mut chains, partition, work);
                            counter.fetch_sub(1, Ordering::Release);
                            if let Err(error) = result {
                                // The worker reads it at its next turn and ends; it may have ended already.
                                let _ = failed.send(error);
                                return;
                            }
                        }
                    }
                }
            })
            .map_err(|e| RunError::Definition(format!("thread checkpoint-{number} could not be started: {e}")))?;
        Ok(Self { messages: Some(messages), errors, outstanding, thread: Some(thread) })
    }

    /// Says which manifest a restored task goes on from.
    pub fn begin(&self, partition: i32, manifest: Option<Manifest>) -> Result<(), RunError> {
        self.send(Message::Begin(partition, manifest.map(Box::new)))
    }

    /// True while a checkpoint is being written or waits.
    pub fn is_busy(&self) -> bool {
        self.outstanding.load(Ordering::Acquire) > 0
    }

    /// True where handing over will not wait.
    pub fn has_room(&self) -> bool {
        self.outstanding.load(Ordering::Acquire) < ROOM
    }

    /// Hands over state of a checkpoint to come; waits where there is no room.
    pub fn slice(&self, partition: i32, state: Vec<RecordBatch>) -> Result<(), RunError> {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
        self.send(Message::Work(partition, Work::Slice(state)))
    }

    /// Hands over a checkpoint, all of whose state is handed over before or is in it; waits where there is no room.
    pub fn write(&self, partition: i32, job: Job) -> Result<(), RunError> {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
        self.send(Message::Work(partition, Work::Write(job)))
    }

    /// Waits until all that was handed over is written.
    ///
    /// # Errors
    /// The failure that ended the thread.
    pub fn wait(&self) -> Result<(), RunError> {
        let (answer, answered) = mpsc::sync_channel(1);
        self.send(Message::Wait(answer))?;
        // The thread drops the question only where it ends, and says why before that.
        let _ = answered.recv();
        self.check()
    }

    /// # Errors
    /// The failure that ended the thread.
    pub fn check(&self) -> Result<(), RunError> {
        self.errors.try_recv().map_or(Ok(()), Err)
    }

    /// Waits until all is written.
    pub fn finish(mut self) -> Result<(), RunError> {
        self.join();
        self.check()
    }

    fn send(&self, message: Message) -> Result<(), RunError> {
        let messages = self.messages.as_ref().expect("only finish and drop take it");
        if messages.send(message).is_err() {
            // The thread has ended, and said why before that.
            self.check()?;
        }
        Ok(())
    }

    fn join(&mut self) {
        self.messages = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed by the panic hook; the manifest it did not write is written next time.
            let _ = thread.join();
        }
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        self.join();
    }
}

fn write(
    context: &Context,
    steps: &Steps,
    chains: &mut BTreeMap<i32, Chain>,
    partition: i32,
    work: Work,
) -> Result<(), RunError> {
    let mut next = match chains.remove(&partition) {
        Some(Chain::At(next)) => next,
        Some(Chain::Broken) => {
            chains.insert(partition, Chain::Broken);
            return Ok(());
        }
        None => Box::default(),
    };
    let done = match work {
        Work::Slice(state) => take(context, partition, &mut next, state)?,
        Work::Write(job) => {
            let mut clock = steps.start();
            let done = commit(context, partition, &mut next, job)?;
            clock.end(Step::Checkpoint);
            done
        }
    };
    chains.insert(partition, if done { Chain::At(next) } else { Chain::Broken });
    Ok(())
}

/// Takes state of the checkpoint to come, and writes a part where there is enough for one. False where that was given up.
fn take(context: &Context, partition: i32, next: &mut Next, state: Vec<RecordBatch>) -> Result<bool, RunError> {
    next.bytes += state.iter().map(RecordBatch::get_array_memory_size).sum::<usize>();
    next.state.extend(state);
    if next.bytes < PART_BYTES {
        return Ok(true);
    }
    let (offline, previous) = (&context.wiring.offline, next.previous.as_deref());
    let part = || offline.write_state(partition, previous, next.parts.len(), &next.state);
    let Some(part) = patiently(context, partition, part)? else { return Ok(false) };
    next.parts.extend(part);
    (next.state, next.bytes) = (Vec::new(), 0);
    Ok(true)
}

/// Writes a checkpoint. False where that was given up.
fn commit(context: &Context, partition: i32, next: &mut Next, job: Job) -> Result<bool, RunError> {
    let Next { previous, parts, mut state, .. } = std::mem::take(next);
    let Job { next: offsets, state: rest, extent, rows, windows } = job;
    state.extend(rest);
    let checkpoint = Checkpoint {
        partition,
        next: offsets,
        parts,
        state,
        follows: extent == Extent::Changes,
        rows,
        windows,
        previous: previous.as_deref(),
    };
    let Some(manifest) = patiently(context, partition, || context.wiring.offline.commit(&checkpoint))? else {
        return Ok(false);
    };
    let before = checkpoint.previous.filter(|_| checkpoint.follows).map_or(0, |m| m.state_files().count());
    let bytes = manifest.state_files().skip(before).map(|file| file.bytes).sum();
    let extent = if checkpoint.follows { "changes" } else { "whole" };
    metrics::counter!(CHECKPOINT_BYTES, "pipeline" => context.plan.name.clone(), "extent" => extent).increment(bytes);
    sweep(context, partition);
    next.previous = Some(Box::new(manifest));
    Ok(true)
}

/// Repeats a write until it succeeds. Gives up, with nothing, some attempts after a stop was asked for.
fn patiently<T>(
    context: &Context,
    partition: i32,
    write: impl Fn() -> Result<T, OfflineError>,
) -> Result<Option<T>, RunError> {
    let mut backoff = Backoff::for_server();
    loop {
        match write() {
            Ok(written) => {
                if backoff.attempts() > 0 {
                    tracing::info!(partition, "the offline store is back, the checkpoint is written");
                }
                return Ok(Some(written));
            }
            Err(error) if error.is_retriable() => {
                context.holding("offline", &error, &backoff);
                if backoff.wait(&context.stop) && backoff.attempts() >= LAST_ATTEMPTS {
                    tracing::warn!(
                        partition,
                        "stopping without this checkpoint; the next start computes its rows again: {error}"
                    );
                    return Ok(None);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn sweep(context: &Context, partition: i32) {
    if let Err(error) = context.wiring.offline.sweep(partition) {
        tracing::warn!(partition, "old checkpoints could not be removed: {error}");
    }
}
