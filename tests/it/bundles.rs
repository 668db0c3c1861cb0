//! Model bundles for tests and benches of scoring.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use driftline::model::Bundle;

/// Bundles made by make_onnx.py, kept between runs for as long as the script stays the same.
pub fn bundles() -> &'static Path {
    static BUNDLES: LazyLock<PathBuf> = LazyLock::new(make);
    &BUNDLES
}

fn make() -> PathBuf {
    let mut hash = DefaultHasher::new();
    include_str!("make_onnx.py").hash(&mut hash);
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("bundles-{:016x}", hash.finish()));
    if root.is_dir() {
        return root;
    }
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("DRIFTLINE_PYTHON").map_or(repository.join(".venv/bin/python"), PathBuf::from);
    let made = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("cargo has made the folder");
    let output = Command::new(&python).arg(repository.join("tests/it/make_onnx.py")).arg(made.path()).output();
    let output = output.unwrap_or_else(|e| panic!("{} cannot be run ({e}); run make setup", python.display()));
    assert!(output.status.success(), "make_onnx.py: {}", String::from_utf8_lossy(&output.stderr));
    for folder in std::fs::read_dir(made.path()).expect("the folder was just written").flatten() {
        if folder.path().is_dir() {
            Bundle::seal(&folder.path()).expect("the script writes whole bundles");
        }
    }
    // Another process may have been faster; then its bundles are as good.
    if std::fs::rename(made.path(), &root).is_ok() {
        std::mem::forget(made);
    }
    root
}
