//! The thread that writes a worker's checkpoints, one after the other.

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
use crate::store::{Checkpoint, Manifest};
use crate::telemetry::metrics::{Step, Steps};

/// Attempts at a checkpoint after a stop was asked for. What is not written then is computed again at the next start.
const LAST_ATTEMPTS: u32 = 5;

/// A checkpoint to be written.
pub(super) struct Job {
    /// Task.
    pub partition: i32,
    /// Next offset to read, by source partition.
    pub next: Offsets,
    /// State.
    pub state: Vec<RecordBatch>,
    /// Feature rows since the last checkpoint.
    pub rows: Vec<RecordBatch>,
    /// Rows of emitted windows since the last checkpoint, by name.
    pub windows: Vec<(String, Vec<RecordBatch>)>,
}

enum Message {
    /// A task was restored from this manifest: its next checkpoint follows it.
    Begin(i32, Option<Box<Manifest>>),
    Write(Job),
}

/// What a partition's next checkpoint follows.
enum Chain {
    /// This checkpoint, or none.
    At(Option<Box<Manifest>>),
    /// One that was not written: its rows are in no file, so no later checkpoint may take their offsets as done.
    Broken,
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
        // A channel of one: the worker may prepare one checkpoint while another is written, never more.
        let (messages, inbox) = mpsc::sync_channel(1);
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
                            chains.insert(partition, Chain::At(manifest));
                        }
                        Message::Write(job) => {
                            let result = write(&context, &steps, &mut chains, job);
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

    /// Hands over a checkpoint; waits while two are outstanding.
    pub fn write(&self, job: Job) -> Result<(), RunError> {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
        self.send(Message::Write(job))
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

fn write(context: &Context, steps: &Steps, chains: &mut BTreeMap<i32, Chain>, job: Job) -> Result<(), RunError> {
    let mut clock = steps.start();
    let mut backoff = Backoff::for_server();
    let partition = job.partition;
    let previous = match chains.remove(&partition) {
        Some(Chain::At(manifest)) => manifest,
        Some(Chain::Broken) => {
            chains.insert(partition, Chain::Broken);
            return Ok(());
        }
        None => None,
    };
    let Job { next, state, rows, windows, .. } = job;
    let checkpoint = Checkpoint { partition, next, state, rows, windows, previous: previous.as_deref() };
    loop {
        match context.wiring.offline.commit(&checkpoint) {
            Ok(manifest) => {
                if backoff.attempts() > 0 {
                    tracing::info!(partition, "the offline store is back, the checkpoint is written");
                }
                sweep(context, partition);
                chains.insert(partition, Chain::At(Some(Box::new(manifest))));
                clock.end(Step::Checkpoint);
                return Ok(());
            }
            Err(error) if error.is_retriable() => {
                context.holding("offline", &error, &backoff);
                if backoff.wait(&context.stop) && backoff.attempts() >= LAST_ATTEMPTS {
                    tracing::warn!(
                        partition,
                        "stopping without this checkpoint; the next start computes its rows again: {error}"
                    );
                    chains.insert(partition, Chain::Broken);
                    return Ok(());
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
