//! Models: bundles, registries, ONNX sessions.
//!
//! A bundle is a folder: `bundle.toml`, `preprocessor.onnx`, `model.onnx`, `profile.json`. Its parts are checked by hash and
//! loaded together or not at all.
