//! Models: bundles, registries, ONNX sessions.
//!
//! A bundle is a folder: `bundle.toml`, `preprocessor.onnx`, `model.onnx`, `profile.json`. Its parts are checked by hash and
//! loaded together or not at all. A registry keeps a model's versions and says which one an alias means. [`ModelWatch`] asks
//! it now and then, and makes ready what the scoring threads swap to between two batches.

mod bundle;
mod error;
mod files;
mod folder;
mod library;
mod matrix;
mod onnx;
mod registry;
mod watch;

pub use bundle::{
    Bundle, BundleError, BundleFault, Input, MANIFEST, MODEL, Manifest, Output, PREPROCESSOR, PROFILE, Signature,
    SignatureMismatch, Task,
};
pub use error::ModelError;
pub use folder::FolderRegistry;
pub use matrix::{FeatureColumns, FeatureMatrix};
pub use onnx::{Model, Provider, SessionOptions};
pub use registry::{LATEST, Registry, Version, ensure_initial, open_registry};
pub use watch::{ModelEvent, ModelSlot, ModelWatch, ServingModel};
