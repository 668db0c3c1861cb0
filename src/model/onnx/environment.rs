//! Loading ONNX Runtime's library.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use ort::environment::Environment;
use ort::logging::LogLevel;

use crate::model::ModelError;
use crate::model::library::{self, Candidate, VARIABLE};

/// ONNX Runtime, loaded once for the whole process.
pub(super) fn environment() -> Result<&'static Environment, ModelError> {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    static LOADING: Mutex<()> = Mutex::new(());
    if let Some(environment) = ENVIRONMENT.get() {
        return Ok(environment);
    }
    // A second thread waits for the first one's answer instead of loading beside it.
    let _loading = LOADING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    match ENVIRONMENT.get() {
        Some(environment) => Ok(environment),
        None => load_environment().map(|environment| ENVIRONMENT.get_or_init(|| environment)),
    }
}

fn load_environment() -> Result<Environment, ModelError> {
    let variable = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
    let program = std::env::current_exe().ok().and_then(|exe| exe.parent().map(PathBuf::from));
    let starts: Vec<PathBuf> = std::env::current_dir().ok().into_iter().chain(program).collect();
    let mut looked = Vec::new();
    for candidate in library::candidates(variable.as_deref(), &starts) {
        match candidate {
            Candidate::Absent(path) => looked.push((path, "the Python package onnxruntime is not there".to_owned())),
            Candidate::Library(path) => match open(&path) {
                Ok(environment) => {
                    tracing::info!(library = %path.display(), build = ort::info(), "loaded ONNX Runtime");
                    return Ok(environment);
                }
                Err(reason) => looked.push((path, reason)),
            },
        }
    }
    Err(ModelError::Library { needed: ort::MINOR_VERSION, looked })
}

fn open(path: &Path) -> Result<Environment, String> {
    let builder = ort::init_from(path).map_err(|e| e.to_string())?;
    // What matters comes back as errors from calls. The rest, as graphs that promise one row and give many, would be said
    // once a batch.
    let builder = builder.with_name("driftline").with_telemetry(false).with_logger(Arc::new(
        |level: LogLevel, _category: &str, _id: &str, location: &str, message: &str| match level {
            LogLevel::Verbose | LogLevel::Info => tracing::trace!(target: "onnxruntime", location, "{message}"),
            _ => tracing::debug!(target: "onnxruntime", location, "{message}"),
        },
    ));
    let environment = builder.build().map_err(|e| e.to_string())?;
    environment.set_log_level(LogLevel::Warning);
    Ok(environment)
}
