//! The driftline binary as a user runs it: its own process, its own folder, the environment set for a Kafka and a Redis.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

use serde_json::Value;
use tempfile::TempDir;

use crate::servers::{Process, unique};

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The public data beside the repository, or `None` (said aloud) where it is not there.
pub fn shared_data(name: &str) -> Option<PathBuf> {
    let path = root().join("../shared/data").join(name);
    if path.exists() {
        return Some(path);
    }
    eprintln!("SKIPPED: {} is not there", path.display());
    None
}

/// Python with the packages of tests/requirements.txt.
pub fn python() -> PathBuf {
    std::env::var_os("DRIFTLINE_PYTHON").map_or_else(|| root().join(".venv/bin/python"), PathBuf::from)
}

/// Runs Python in the repository to its end, which must be a good one; gives standard output.
pub fn run_python(arguments: &[&dyn AsRef<OsStr>]) -> String {
    let mut command = Command::new(python());
    command.args(arguments.iter().map(|argument| argument.as_ref())).current_dir(root()).stdin(Stdio::null());
    let output = command.output().expect("Python is there: run `make setup`");
    assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Lets a script of `tests/it` judge; gives the JSON that it prints.
pub fn oracle(script: &str, arguments: &[&dyn AsRef<OsStr>]) -> Value {
    let script = Path::new("tests/it").join(script);
    let printed = run_python(&[&[&script as &dyn AsRef<OsStr>], arguments].concat());
    serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{}: {error}: {printed}", script.display()))
}

/// Runs a command that must be killed at a failpoint. Without failpoints in the code, it is not run.
pub fn killed_at(mut command: Command, point: &str) {
    if cfg!(feature = "failpoints") {
        let output = command.env("DRIFTLINE_FAILPOINTS", point).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(libc::SIGKILL), "{point}: {}:\n{errors}", output.status);
    }
}

/// The failpoints in the code, so that a test of all of them covers a new one.
pub fn failpoints() -> &'static [&'static str] {
    fn search(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                search(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                for call in ["failpoint::hit(\"", "failpoint(\""] {
                    let names = text.split(call).skip(1).map(|rest| rest.split('"').next().unwrap().to_owned());
                    found.extend(names);
                }
            }
        }
    }
    static ALL: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
        let mut found = BTreeSet::new();
        search(&root().join("src"), &mut found);
        found.into_iter().map(|name| &*name.leak()).collect()
    });
    &ALL
}

/// A place to run driftline in.
pub struct World {
    folder: TempDir,
    env: Vec<(String, String)>,
}

impl World {
    /// An empty folder, and an environment without servers.
    pub fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut world = Self { folder, env: Vec::new() };
        let offline = format!("file://{}", world.path("offline").display());
        let models = format!("file://{}", world.path("models").display());
        world.set("OFFLINE_URL", &offline);
        world.set("MODEL_REGISTRY", &models);
        world.set("DRIFTLINE_PYTHON", &python().display().to_string());
        world
    }

    /// Sets a variable for all commands.
    pub fn set(&mut self, name: &str, value: &str) {
        self.env.retain(|(n, _)| n != name);
        self.env.push((name.to_owned(), value.to_owned()));
    }

    /// A variable that was set.
    pub fn variable(&self, name: &str) -> Option<String> {
        self.env.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone())
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a definition into a folder of this name; gives its path, as an argument.
    pub fn define(&self, folder: &str, definition: &str) -> String {
        let folder = self.path(folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("pipeline.toml"), definition).unwrap();
        folder.to_str().unwrap().to_owned()
    }

    /// The command with these arguments, not started. It runs in the repository, as a user's does.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_driftline"));
        command.args(arguments).current_dir(root()).stdin(Stdio::null());
        for name in ["KAFKA_BROKERS", "REDIS_URL", "SCHEMA_REGISTRY_URL", "DRIFTLINE_LISTEN", "DRIFTLINE_FAILPOINTS"] {
            command.env_remove(name);
        }
        command.envs(self.env.iter().map(|(n, v)| (n, v)));
        command
    }

    /// Starts a command in the background, with what it prints in a file of the folder.
    pub fn start(&self, command: Command) -> Process {
        Process::spawn("driftline", command, self.path(&unique("output")))
    }

    /// Runs to the end.
    pub fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs to the end, which must be a good one; gives standard output.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "driftline {} ended with {}:\n{errors}", arguments.join(" "), output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs once for each of these failpoints, and dies at it: see [`killed_at`].
    pub fn killed_at(&self, arguments: &[&str], points: &[&str]) {
        for point in points {
            killed_at(self.command(arguments), point);
        }
    }
}
