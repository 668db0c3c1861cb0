//! Loading: from a folder or file to a plan, or to every fault in it.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::document::{self, Collector, Node, Site};
use super::faults::{Fault, Faults};
use super::interpolate::{Environment, interpolate};
use super::plan::Plan;
use super::spec::Spec;
use super::validate::Folders;
use super::{schema, validate};

/// Name of a pipeline's definition in its folder.
pub const FILE_NAME: &str = "pipeline.toml";

/// Loads a pipeline: the folder of `pipeline.toml`, or a file.
///
/// # Errors
/// All faults that can be told, with file, line and column.
pub fn load(path: &Path, environment: Environment<'_>) -> Result<Plan, Faults> {
    load_with(path, environment, &[])
}

/// Loads a pipeline with settings laid over its file: `("monitor.window.rows", "1000")`. They are checked like the file's,
/// and faults in them are reported in the file `command line`.
///
/// # Errors
/// All faults that can be told, with file, line and column.
pub fn load_with(path: &Path, environment: Environment<'_>, overrides: &[(String, String)]) -> Result<Plan, Faults> {
    let file = if path.is_dir() { path.join(FILE_NAME) } else { path.to_owned() };
    let shown = file.display().to_string();
    let one = |fault: Fault| Faults::new(vec![fault]).expect("one fault is not none");
    let unreadable = |error: std::io::Error| {
        let help = "name a pipeline's folder, such as pipelines/churn, or its pipeline.toml";
        one(Fault::of_file(shown.as_str(), format!("the pipeline cannot be read: {error}"), Some(help.to_owned())))
    };
    let bytes = std::fs::read(&file).map_err(unreadable)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let good = error.utf8_error().valid_up_to();
        let text = String::from_utf8_lossy(error.as_bytes());
        one(Fault::at(&shown, &text, good..good + 1, "the file is not UTF-8 here".into(), None))
    })?;
    let absolute = std::path::absolute(&file).map_err(unreadable)?;
    let folder: PathBuf = absolute.parent().map(Path::to_owned).unwrap_or_default().components().collect();
    let folders =
        Folders { root: &project_root(&folder), pipeline: &folder, shown: file.parent().unwrap_or(Path::new("")) };
    let (plan, faults) = read(&shown, &text, environment, overrides, &folders);
    match (plan, Faults::new(faults)) {
        (_, Some(faults)) => Err(faults),
        (Some(plan), None) => Ok(plan),
        (None, None) => Err(one(Fault::of_file(
            shown,
            "the pipeline is incomplete, and no fault says why: please report this",
            None,
        ))),
    }
}

/// The nearest folder above that holds both `pipelines/` and `schemas/`; else the one above a folder `pipelines/` that the
/// pipeline is in; else the pipeline's own.
fn project_root(folder: &Path) -> PathBuf {
    let above = || folder.ancestors().skip(1);
    above()
        .find(|root| root.join("pipelines").is_dir() && root.join("schemas").is_dir())
        .or_else(|| above().find(|f| f.file_name().is_some_and(|name| name == "pipelines"))?.parent())
        .unwrap_or(folder)
        .to_owned()
}

fn read(
    shown: &str,
    text: &str,
    environment: Environment<'_>,
    overrides: &[(String, String)],
    folders: &Folders<'_>,
) -> (Option<Plan>, Vec<Fault>) {
    let mut faults = Collector::default();
    let number = faults.add_text(shown, text);
    let mut root = document::parse(number, text, &mut faults);
    if faults.count() > 0 {
        return (None, faults.into_faults());
    }
    document::set(&mut root, overrides, &mut faults);
    interpolate(&mut root, environment, &mut faults);
    schema::conform(&mut root, &mut faults);
    let plan = spec(&root, &mut faults).and_then(|spec| {
        let site = Site::root(&root);
        validate::plan(&spec, &site, folders, &mut faults)
    });
    (plan, faults.into_faults())
}

fn spec(root: &Node, faults: &mut Collector) -> Option<Spec> {
    Spec::deserialize(root)
        .map_err(|error| {
            faults.report(&Site::root(root).value(), format!("the pipeline cannot be read: {error}"), None)
        })
        .ok()
}

#[cfg(test)]
mod tests;
