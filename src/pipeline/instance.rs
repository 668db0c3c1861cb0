//! A name for this process that is stable across restarts and unique on the host: transactional ids are made of it, and a
//! stable id lets the broker abort at once what a killed predecessor left open.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// A held name. The slot is free again when this is dropped, or when the process dies in whatever way.
#[derive(Debug)]
pub struct Instance {
    name: String,
    _lock: Option<File>,
}

impl Instance {
    /// Uses a name that the user vouches for.
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned(), _lock: None }
    }

    /// Takes the lowest free slot of this host for a pipeline's stages: `<host>-<slot>`.
    ///
    /// # Errors
    /// Where lock files cannot be made in the temporary folder.
    pub fn acquire(pipeline: &str, stage: &str) -> io::Result<Self> {
        let host = hostname();
        for slot in 0..1024 {
            let path = lock_path(pipeline, stage, slot);
            let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
            // SAFETY: the descriptor is open for as long as `file` lives, and flock touches no memory.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
                return Ok(Self { name: format!("{host}-{slot}"), _lock: Some(file) });
            }
        }
        Err(io::Error::other("1024 instances of this stage run on this host already"))
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

fn lock_path(pipeline: &str, stage: &str, slot: u32) -> PathBuf {
    // SAFETY: getuid has no preconditions.
    let user = unsafe { libc::getuid() };
    std::env::temp_dir().join(format!("driftline-{user}-{pipeline}-{stage}-{slot}.lock"))
}

fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|s| s.trim().to_owned())
        .ok()
        .filter(|s| !s.is_empty())
        .unwrap_or_else(|| "host".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_unique_while_held_and_free_afterwards() {
        let pipeline = format!("test-{}", std::process::id());
        let first = Instance::acquire(&pipeline, "run").unwrap();
        let second = Instance::acquire(&pipeline, "run").unwrap();
        assert_ne!(first.name(), second.name());
        let freed = first.name().to_owned();
        drop(first);
        assert_eq!(Instance::acquire(&pipeline, "run").unwrap().name(), freed);
        assert_eq!(Instance::acquire(&pipeline, "score").unwrap().name(), freed, "stages have slots of their own");
    }
}
