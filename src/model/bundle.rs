//! Bundles: the folder that holds a model, its preprocessor, its signature and its reference profile, as one unit.
//!
//! ```text
//! bundle.toml         format, name, signature, threshold, metrics, lineage, and the SHA-256 of every other file
//! preprocessor.onnx   features [n, k] float32, missing = NaN  →  inputs [n, m] float32
//! model.onnx          inputs [n, m] float32                   →  probabilities [n, 1 or 2] or score [n, 1] float32
//! profile.json        distributions of the features and of the prediction at training time
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::files;
use crate::config::plan::{Column, DataType, Plan};

/// The bundle's own description, the file that makes a folder a bundle.
pub const MANIFEST: &str = "bundle.toml";
/// Graph from feature values to the model's inputs.
pub const PREPROCESSOR: &str = "preprocessor.onnx";
/// Graph from inputs to scores.
pub const MODEL: &str = "model.onnx";
/// Reference profile.
pub const PROFILE: &str = "profile.json";

/// Files that every bundle has beside its `bundle.toml`.
const PARTS: [&str; 3] = [PREPROCESSOR, MODEL, PROFILE];

/// Version of the bundle format that this build reads.
const FORMAT: i64 = 1;

/// What a model answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// The probability of class 1.
    BinaryClassification,
    /// A value.
    Regression,
}

/// One input of a signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// Feature name.
    pub name: String,
    /// Type of the feature; the model sees it as float32.
    #[serde(rename = "type")]
    pub data_type: DataType,
}

/// What a signature promises about the model's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// What the answer is: `churn_probability`.
    pub name: String,
    /// Its kind.
    pub task: Task,
}

/// What a bundle is fed with, in order, and what it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signature {
    /// Inputs in the order of the preprocessor's columns.
    pub inputs: Vec<Input>,
    /// The answer.
    pub output: Output,
}

/// `bundle.toml`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format: 1.
    pub format: i64,
    /// Model name in the registry.
    pub name: String,
    /// When it was made, RFC 3339.
    #[serde(deserialize_with = "instant_text")]
    pub created_at: String,
    /// Probability from which the label is 1; for classifiers. Default 0.5.
    #[serde(default)]
    pub threshold: Option<f64>,
    /// File name → SHA-256, lower-case hexadecimal.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// Inputs and answer.
    pub signature: Signature,
    /// Metrics on held-out rows.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
    /// Where it comes from: definition hash, training rows, versions of libraries, …
    #[serde(default)]
    pub lineage: toml::Table,
}

/// TOML knows instants; trainers often write them as text. Both are taken.
fn instant_text<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    match toml::Value::deserialize(deserializer)? {
        toml::Value::String(text) => Ok(text),
        toml::Value::Datetime(instant) => Ok(instant.to_string()),
        other => Err(serde::de::Error::custom(format!("expected an RFC 3339 instant, found {}", other.type_str()))),
    }
}

/// A bundle in memory: all of its files, read once, their hashes checked. What is loaded is what was checked.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Folder it was read from.
    pub dir: PathBuf,
    /// `bundle.toml`, read.
    pub manifest: Manifest,
    /// `bundle.toml`, as written.
    manifest_text: String,
    files: BTreeMap<String, Vec<u8>>,
}

impl Bundle {
    /// Reads a bundle and checks it: format, names, types, the presence and the hash of every file.
    ///
    /// # Errors
    /// All faults at once, each with its file and what to do.
    pub fn load(dir: &Path) -> Result<Self, BundleError> {
        let mut faults = Faults { dir, found: Vec::new() };
        let manifest_text = match read_text(&dir.join(MANIFEST)) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(faults.only(
                    MANIFEST,
                    "there is no such file, so this folder is no model bundle",
                    "check the path, or write the bundle again with the pipeline's training script",
                ));
            }
            Err(e) => return Err(faults.only(MANIFEST, e.to_string(), "check the file's permissions and the disk")),
        };
        let manifest: Manifest = match toml::from_str(&manifest_text) {
            Ok(manifest) => manifest,
            Err(e) => {
                let problem = e.to_string().trim_end().to_owned();
                return Err(faults.only(MANIFEST, problem, "see docs/bundles.md for the format"));
            }
        };
        check_manifest(&manifest, &mut faults);
        let files = read_files(&manifest, &mut faults);
        if let Some(profile) = files.get(PROFILE)
            && !serde_json::from_slice::<serde_json::Value>(profile).is_ok_and(|json| json.is_object())
        {
            faults.add(PROFILE, "it is not a JSON object", "write the bundle again with the training script");
        }
        if faults.found.is_empty() {
            Ok(Self { dir: dir.to_owned(), manifest, manifest_text, files })
        } else {
            Err(faults.into_error())
        }
    }

    /// Writes the hashes of a bundle's files into its `bundle.toml`, replacing what `[files]` said, and loads it.
    ///
    /// # Errors
    /// As [`Bundle::load`], and where `bundle.toml` cannot be written.
    pub fn seal(dir: &Path) -> Result<Self, BundleError> {
        let mut faults = Faults { dir, found: Vec::new() };
        let text = read_text(&dir.join(MANIFEST))
            .map_err(|e| faults.only(MANIFEST, e.to_string(), "write it before the bundle is sealed"))?;
        let mut document: toml_edit::DocumentMut =
            text.parse().map_err(|e| faults.only(MANIFEST, format!("{e}"), "see docs/bundles.md for the format"))?;

        let listed = document.get("files").and_then(|files| files.as_table_like());
        let mut names: BTreeSet<String> = PARTS.iter().map(|&name| name.to_owned()).collect();
        names.extend(listed.into_iter().flat_map(|files| files.iter().map(|(name, _)| name.to_owned())));
        let mut hashes = toml_edit::Table::new();
        for name in names {
            if !is_file_name(&name) {
                faults.add(MANIFEST, format!("[files] names '{name}'"), "name files of this folder only");
                continue;
            }
            match std::fs::read(dir.join(&name)) {
                Ok(bytes) => {
                    hashes.insert(&name, toml_edit::value(sha256(&bytes)));
                }
                Err(e) => faults.add(&name, e.to_string(), "write it before the bundle is sealed"),
            }
        }
        if !faults.found.is_empty() {
            return Err(faults.into_error());
        }
        document.insert("files", toml_edit::Item::Table(hashes));
        files::replace(&dir.join(MANIFEST), document.to_string().as_bytes())
            .map_err(|e| faults.only(MANIFEST, e.to_string(), "check that the folder can be written to"))?;
        Self::load(dir)
    }

    /// Compares the signature with the features that the pipeline scores on: names, order and types must be equal.
    ///
    /// # Errors
    /// Every difference.
    pub fn check_against(&self, plan: &Plan) -> Result<(), Box<SignatureMismatch>> {
        let wanted = plan.score.as_ref().map(|score| score.features.as_slice()).unwrap_or_default();
        let columns = plan.feature_columns();
        let wanted: Vec<Column> =
            wanted.iter().filter_map(|name| columns.iter().find(|c| *c.name == **name)).cloned().collect();
        match self.manifest.signature.differences(&wanted) {
            Some(mismatch) => Err(Box::new(SignatureMismatch { model: self.manifest.name.clone(), ..mismatch })),
            None => Ok(()),
        }
    }

    /// The bytes of one of the bundle's files.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.get(name).map(Vec::as_slice)
    }

    /// Names and bytes of all files, `bundle.toml` first.
    pub fn contents(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let manifest = std::iter::once((MANIFEST, self.manifest_text.as_bytes()));
        manifest.chain(self.files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())))
    }

    /// `preprocessor.onnx`.
    pub fn preprocessor(&self) -> &[u8] {
        self.file(PREPROCESSOR).expect("load refuses a bundle without it")
    }

    /// `model.onnx`.
    pub fn model(&self) -> &[u8] {
        self.file(MODEL).expect("load refuses a bundle without it")
    }

    /// `profile.json`, one JSON object.
    pub fn profile(&self) -> &[u8] {
        self.file(PROFILE).expect("load refuses a bundle without it")
    }

    /// SHA-256 over `bundle.toml`, which names the hashes of all other files: equal for equal bundles only.
    pub fn digest(&self) -> String {
        sha256(self.manifest_text.as_bytes())
    }
}

impl Manifest {
    /// Class of a score, for classifiers: 1 from the threshold on, else 0.
    pub fn label(&self, score: f64) -> Option<i64> {
        match self.signature.output.task {
            Task::BinaryClassification => Some(i64::from(score >= self.threshold.unwrap_or(0.5))),
            Task::Regression => None,
        }
    }
}

impl Signature {
    /// Differences from a list of features, or `None` where names, order and types are equal.
    pub fn differences(&self, wanted: &[Column]) -> Option<SignatureMismatch> {
        let has = |name: &str| self.inputs.iter().find(|input| input.name == name);
        let wants = |name: &str| wanted.iter().find(|column| *column.name == *name);
        let mut mismatch = SignatureMismatch::default();
        for column in wanted {
            match has(&column.name) {
                None => mismatch.unknown_to_model.push(column.name.to_string()),
                Some(input) if input.data_type != column.data_type => {
                    mismatch.types.push((input.name.clone(), input.data_type, column.data_type));
                }
                Some(_) => {}
            }
        }
        let missing = self.inputs.iter().filter(|input| wants(&input.name).is_none());
        mismatch.missing.extend(missing.map(|input| input.name.clone()));
        if mismatch.unknown_to_model.is_empty() && mismatch.missing.is_empty() {
            let mut pairs = self.inputs.iter().zip(wanted).enumerate();
            mismatch.order = pairs
                .find(|(_, (input, column))| input.name != *column.name)
                .map(|(position, (input, column))| (position + 1, input.name.clone(), column.name.to_string()));
        }
        (mismatch != SignatureMismatch::default()).then_some(mismatch)
    }
}

/// How a bundle's signature differs from the features that a pipeline scores on.
#[derive(Debug, Clone, Default, PartialEq, Eq, thiserror::Error)]
#[error("model '{model}' does not fit [score] features: {}; mend the list in pipeline.toml or train the model on it", self.differences())]
pub struct SignatureMismatch {
    /// Model name.
    pub model: String,
    /// Inputs of the model that the pipeline does not feed.
    pub missing: Vec<String>,
    /// Features that the pipeline feeds and the model does not know.
    pub unknown_to_model: Vec<String>,
    /// First position (from 1) that differs, the model's input there, the pipeline's feature there. Given where the names
    /// are the same otherwise.
    pub order: Option<(usize, String, String)>,
    /// Name, the model's type, the pipeline's type.
    pub types: Vec<(String, DataType, DataType)>,
}

impl SignatureMismatch {
    fn differences(&self) -> String {
        let mut parts = Vec::new();
        if !self.missing.is_empty() {
            parts.push(format!("it needs {}, which the list lacks", self.missing.join(", ")));
        }
        if !self.unknown_to_model.is_empty() {
            parts.push(format!("it does not know {}", self.unknown_to_model.join(", ")));
        }
        if let Some((position, model, pipeline)) = &self.order {
            parts.push(format!("the order differs from position {position} on: model {model}, pipeline {pipeline}"));
        }
        for (name, model, pipeline) in &self.types {
            parts.push(format!("{name} is {} in the model and {} in the pipeline", model, pipeline));
        }
        parts.join("; ")
    }
}

/// One thing wrong with a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleFault {
    /// File of the bundle.
    pub file: String,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub advice: &'static str,
}

/// A folder that cannot be used as a bundle.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct BundleError {
    /// The folder.
    pub dir: PathBuf,
    /// All that is wrong.
    pub faults: Vec<BundleFault>,
}

impl fmt::Display for BundleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "model bundle {} cannot be used", self.dir.display())?;
        for fault in &self.faults {
            write!(f, "\n  {}: {}; {}", fault.file, fault.problem, fault.advice)?;
        }
        Ok(())
    }
}

struct Faults<'a> {
    dir: &'a Path,
    found: Vec<BundleFault>,
}

impl Faults<'_> {
    fn add(&mut self, file: &str, problem: impl Into<String>, advice: &'static str) {
        self.found.push(BundleFault { file: file.to_owned(), problem: problem.into(), advice });
    }

    fn only(&self, file: &str, problem: impl Into<String>, advice: &'static str) -> BundleError {
        let fault = BundleFault { file: file.to_owned(), problem: problem.into(), advice };
        BundleError { dir: self.dir.to_owned(), faults: vec![fault] }
    }

    fn into_error(self) -> BundleError {
        BundleError { dir: self.dir.to_owned(), faults: self.found }
    }
}

fn check_manifest(manifest: &Manifest, faults: &mut Faults<'_>) {
    if manifest.format != FORMAT {
        faults.add(
            MANIFEST,
            format!("format is {}, this build reads {FORMAT}", manifest.format),
            "use the driftline version that wrote it, or write it again",
        );
    }
    if let Err(problem) = files::check_name(&manifest.name) {
        faults.add(MANIFEST, format!("name '{}' {problem}", manifest.name), "use the model's name in the registry");
    }
    if chrono::DateTime::parse_from_rfc3339(&manifest.created_at).is_err() {
        let problem = format!("created_at '{}' is no RFC 3339 instant", manifest.created_at);
        faults.add(MANIFEST, problem, "write it like 2026-01-31T12:00:00Z");
    }
    if manifest.threshold.is_some_and(|t| !t.is_finite()) {
        faults.add(MANIFEST, "threshold is not a finite number", "give the probability from which the label is 1");
    }
    if manifest.signature.inputs.is_empty() {
        faults.add(MANIFEST, "signature.inputs is empty", "list the features that the model was trained on, in order");
    }
    let mut seen = BTreeSet::new();
    for input in &manifest.signature.inputs {
        if !seen.insert(input.name.as_str()) {
            faults.add(MANIFEST, format!("signature.inputs names {} twice", input.name), "name every feature once");
        }
        if !matches!(input.data_type, DataType::Int64 | DataType::Float64 | DataType::Boolean) {
            let problem = format!("signature.inputs: {} is a {}", input.name, input.data_type);
            faults.add(MANIFEST, problem, "models take int64, float64 and boolean features");
        }
    }
}

fn read_files(manifest: &Manifest, faults: &mut Faults<'_>) -> BTreeMap<String, Vec<u8>> {
    for part in PARTS {
        if !manifest.files.contains_key(part) {
            let problem = format!("[files] does not name {part}");
            faults.add(MANIFEST, problem, "write the file and seal the bundle");
        }
    }
    let mut files = BTreeMap::new();
    for (name, hash) in &manifest.files {
        if !is_file_name(name) {
            faults.add(MANIFEST, format!("[files] names '{name}'"), "name files of this folder only");
            continue;
        }
        match std::fs::read(faults.dir.join(name)) {
            Ok(bytes) if sha256(&bytes) == hash.to_ascii_lowercase() => {
                files.insert(name.clone(), bytes);
            }
            Ok(bytes) => faults.add(
                name,
                format!("its SHA-256 is {}, bundle.toml says {hash}", sha256(&bytes)),
                "the file was changed or cut short: copy the bundle again, or train again",
            ),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                faults.add(name, "bundle.toml names it and it is not there", "copy the bundle again, or train again");
            }
            Err(e) => faults.add(name, e.to_string(), "check the file's permissions and the disk"),
        }
    }
    files
}

fn read_text(path: &Path) -> io::Result<String> {
    std::fs::read_to_string(path)
}

/// A plain name: no separators, no parent folder, not `bundle.toml` itself.
fn is_file_name(name: &str) -> bool {
    let plain = Path::new(name).components().count() == 1 && Path::new(name).file_name().is_some_and(|f| f == name);
    plain && name != MANIFEST
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[cfg(test)]
mod tests;
