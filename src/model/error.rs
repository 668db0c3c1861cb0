//! What can go wrong with models.

use std::path::PathBuf;

use super::bundle::{BundleError, SignatureMismatch};

/// What can go wrong between a registry and a score.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A bundle is broken.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A bundle does not fit the pipeline.
    #[error(transparent)]
    Signature(#[from] Box<SignatureMismatch>),
    /// ONNX Runtime's library is missing, too old, or cannot be loaded.
    #[error("ONNX Runtime's library (1.{needed} or newer) could not be loaded. Looked at:{}\nInstall it with 'pip install onnxruntime' into .venv in the project's folder, or set ORT_DYLIB_PATH to libonnxruntime.so", list(.looked))]
    Library {
        /// Least minor version.
        needed: u32,
        /// Where it was looked for and what was found there.
        looked: Vec<(PathBuf, String)>,
    },
    /// A graph is not what the bundle format asks for.
    #[error("{file}: {problem}; the format of bundles is in docs/bundles.md")]
    Graph {
        /// File of the bundle.
        file: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// ONNX Runtime refused a graph.
    #[error("{file}: ONNX Runtime refuses it: {reason}")]
    Session {
        /// File of the bundle.
        file: &'static str,
        /// Its words.
        reason: String,
    },
    /// ONNX Runtime failed on a batch.
    #[error("{file} failed on {rows} rows: {reason}")]
    Run {
        /// File of the bundle.
        file: &'static str,
        /// Rows in the batch.
        rows: usize,
        /// Its words.
        reason: String,
    },
    /// A feature row lacks a column, or has it in a type that models do not take.
    #[error("feature '{feature}': {problem}")]
    Feature {
        /// Name.
        feature: String,
        /// What is wrong.
        problem: String,
    },
    /// An execution provider that does not exist.
    #[error("[score] providers: '{name}' is not known; known are tensorrt, cuda and cpu")]
    UnknownProvider {
        /// As written.
        name: String,
    },
    /// The pipeline has no `[score]`.
    #[error("pipeline '{pipeline}' does not score; add [score] to its pipeline.toml")]
    NoScore {
        /// Pipeline.
        pipeline: String,
    },
    /// The registry's address is not one that this build understands.
    #[error("[registry] url '{url}': {problem}")]
    RegistryUrl {
        /// As written.
        url: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The registry has no such model, alias or version.
    #[error("registry {registry} has no {what} of model '{model}'; {advice}")]
    Unknown {
        /// Where.
        registry: String,
        /// Model.
        model: String,
        /// `alias 'production'`, `version 7`, …
        what: String,
        /// What to do.
        advice: String,
    },
    /// A name that a registry cannot hold.
    #[error("{what} '{name}' {problem}")]
    Name {
        /// `model`, `alias`.
        what: &'static str,
        /// As given.
        name: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// The registry's storage failed.
    #[error("registry {registry}: {during} {path}: {source}")]
    Storage {
        /// Where.
        registry: String,
        /// What was being done.
        during: &'static str,
        /// File or folder.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// What the registry holds is not what driftline writes.
    #[error("registry {registry}: {path}: {problem}")]
    Corrupt {
        /// Where.
        registry: String,
        /// File.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A thread could not be started.
    #[error("the thread that watches the model registry cannot be started: {0}")]
    Thread(std::io::Error),
}

impl ModelError {
    /// True where the same call may succeed later without anybody changing anything.
    pub fn is_retriable(&self) -> bool {
        matches!(self, Self::Storage { .. })
    }
}

fn list(looked: &[(PathBuf, String)]) -> String {
    looked.iter().map(|(path, found)| format!("\n  {}: {found}", path.display())).collect()
}
