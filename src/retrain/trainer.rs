//! The training command: started with its contract in the environment, watched, and ended with all its children.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::worker::RetrainError;
use crate::runtime::clock;

/// Bytes of the log's end that an error quotes.
const QUOTED: u64 = 4096;
/// Time between the request to end and the kill.
const GRACE: Duration = Duration::from_secs(3);

/// Variables of the contract: the Arrow file, the folder for the bundle, the JSON request.
pub const TRAINING_SET: &str = "DRIFTLINE_TRAINING_SET";
/// See [`TRAINING_SET`].
pub const OUTPUT: &str = "DRIFTLINE_OUTPUT";
/// See [`TRAINING_SET`].
pub const REQUEST: &str = "DRIFTLINE_REQUEST";

/// How a training stands.
#[derive(Debug)]
pub enum Progress {
    /// It runs.
    Running,
    /// It ended well.
    Done,
}

/// A running training command. Dropping it ends the command and its children.
#[derive(Debug)]
pub struct Trainer {
    child: Child,
    command: String,
    log: PathBuf,
    deadline: Instant,
    timeout: Duration,
    ended: bool,
}

impl Trainer {
    /// Starts `command` in the working directory, its output going to `log`.
    ///
    /// # Errors
    /// Where it cannot be started, or the log cannot be made.
    pub fn start(
        command: &[String],
        variables: &[(&str, &Path)],
        log: &Path,
        timeout: Duration,
    ) -> Result<Self, RetrainError> {
        let text = command.join(" ");
        let io = |source| RetrainError::File { path: log.to_owned(), source };
        let out = OpenOptions::new().create(true).append(true).open(log).map_err(io)?;
        let errors = out.try_clone().map_err(io)?;
        let (program, arguments) = command
            .split_first()
            .ok_or_else(|| RetrainError::Command { command: String::new(), reason: "it is empty".into() })?;
        let mut start = Command::new(program);
        start.args(arguments).stdin(Stdio::null()).stdout(out).stderr(errors).process_group(0);
        for (name, value) in variables {
            start.env(name, value);
        }
        let child = start.spawn().map_err(|e| RetrainError::Command {
            command: text.clone(),
            reason: format!("it could not be started: {e}; mend [retraining] command"),
        })?;
        Ok(Self {
            child,
            command: text,
            log: log.to_owned(),
            deadline: clock::monotonic() + timeout,
            timeout,
            ended: false,
        })
    }

    /// Looks whether it has ended.
    ///
    /// # Errors
    /// It ended badly, or ran out of time; with the end of its log.
    pub fn poll(&mut self) -> Result<Progress, RetrainError> {
        let status = self.child.try_wait().map_err(|e| self.failed(e.to_string()))?;
        match status {
            Some(status) => {
                self.ended = true;
                if status.success() { Ok(Progress::Done) } else { Err(self.failed(format!("it ended with {status}"))) }
            }
            None if clock::monotonic() >= self.deadline => {
                self.end();
                Err(self.failed(format!("it was ended after {:?} ([retraining] timeout)", self.timeout)))
            }
            None => Ok(Progress::Running),
        }
    }

    fn failed(&self, reason: String) -> RetrainError {
        let quoted = tail(&self.log);
        let reason =
            if quoted.is_empty() { reason } else { format!("{reason}; the end of {}:\n{quoted}", self.log.display()) };
        RetrainError::Command { command: self.command.clone(), reason }
    }

    /// Asks the whole process group to end, then makes it.
    fn end(&mut self) {
        if self.ended {
            return;
        }
        let group = i32::try_from(self.child.id()).expect("process ids are positive i32");
        // SAFETY: signals touch no memory of this process; the group is the child's own, made at its start.
        unsafe { libc::killpg(group, libc::SIGTERM) };
        let deadline = clock::monotonic() + GRACE;
        while matches!(self.child.try_wait(), Ok(None)) && clock::monotonic() < deadline {
            std::thread::park_timeout(Duration::from_millis(20));
        }
        // SAFETY: as above.
        unsafe { libc::killpg(group, libc::SIGKILL) };
        let _ = self.child.wait();
        self.ended = true;
    }
}

impl Drop for Trainer {
    fn drop(&mut self) {
        self.end();
    }
}

fn tail(path: &Path) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(QUOTED)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn finish(mut trainer: Trainer) -> Result<(), RetrainError> {
        let deadline = clock::monotonic() + Duration::from_secs(60);
        while let Progress::Running = trainer.poll()? {
            assert!(clock::monotonic() < deadline, "the command does not end");
            std::thread::park_timeout(Duration::from_millis(5));
        }
        Ok(())
    }

    fn start(script: &str, folder: &Path, timeout: Duration) -> Trainer {
        let command = ["sh", "-c", script].map(str::to_owned);
        Trainer::start(&command, &[(OUTPUT, folder)], &folder.join("train.log"), timeout).unwrap()
    }

    #[test]
    fn the_contract_is_in_the_environment() {
        let folder = tempfile::tempdir().unwrap();
        finish(start("echo trained > \"$DRIFTLINE_OUTPUT/done\"", folder.path(), Duration::from_secs(60))).unwrap();
        assert_eq!(std::fs::read_to_string(folder.path().join("done")).unwrap(), "trained\n");
    }

    #[rstest]
    #[case::exit_code("echo some words; exit 3", Duration::from_secs(60), "exit status: 3")]
    #[case::time_out("echo some words; while :; do :; done", Duration::from_millis(300), "[retraining] timeout")]
    fn failures_quote_the_log(#[case] script: &str, #[case] timeout: Duration, #[case] expected: &str) {
        let folder = tempfile::tempdir().unwrap();
        let error = finish(start(script, folder.path(), timeout)).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("some words"), "{error}");
    }

    #[test]
    fn children_end_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let trainer = start(
            "sh -c 'echo $$ > \"$DRIFTLINE_OUTPUT/pid\"; while :; do read x; done < /dev/zero' & wait",
            folder.path(),
            Duration::from_secs(60),
        );
        let pid_file = folder.path().join("pid");
        let deadline = clock::monotonic() + Duration::from_secs(60);
        let pid = loop {
            if let Some(pid) = std::fs::read_to_string(&pid_file).ok().and_then(|s| s.trim().parse::<i32>().ok()) {
                break pid;
            }
            assert!(clock::monotonic() < deadline, "the child does not start");
            std::thread::park_timeout(Duration::from_millis(5));
        };
        drop(trainer);
        // A killed grandchild is reaped by init, or stays a zombie where there is none: either way it no longer runs.
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z "), "{state}");
    }
}
