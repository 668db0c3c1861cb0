//! Where ONNX Runtime's library may be. Loading it is [`super::onnx`]'s business.

use std::path::{Path, PathBuf};

/// Names the library's file, above all other places.
pub(super) const VARIABLE: &str = "ORT_DYLIB_PATH";

/// Name that the system's loader looks for.
const SYSTEM: &str = "libonnxruntime.so";

/// A place to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Candidate {
    /// A file, or a bare name that the system's loader resolves.
    Library(PathBuf),
    /// A virtual environment without the package: nothing to load, but worth naming in an error.
    Absent(PathBuf),
}

/// Places to try, in order. What [`VARIABLE`] names is the only one where it is set: whoever sets it means it.
pub(super) fn candidates(variable: Option<&Path>, starts: &[PathBuf]) -> Vec<Candidate> {
    if let Some(path) = variable {
        return vec![Candidate::Library(path.to_owned())];
    }
    let mut places: Vec<PathBuf> = Vec::new();
    for start in starts {
        for folder in start.ancestors() {
            let place = folder.join(".venv");
            if place.is_dir() && !places.contains(&place) {
                places.push(place);
            }
        }
    }
    let mut found = Vec::new();
    for place in &places {
        let libraries = in_environment(place);
        match libraries.is_empty() {
            true => found.push(Candidate::Absent(place.join("lib/python3*/site-packages/onnxruntime/capi"))),
            false => found.extend(libraries.into_iter().map(Candidate::Library)),
        }
    }
    if places.is_empty() {
        found.extend(starts.first().map(|start| Candidate::Absent(start.join(".venv"))));
    }
    found.push(Candidate::Library(SYSTEM.into()));
    found
}

/// Libraries of the onnxruntime packages in a virtual environment, newest Python first.
fn in_environment(environment: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pythons = list(&environment.join("lib"), "python3");
    pythons.reverse();
    for python in pythons {
        found.extend(list(&python.join("site-packages/onnxruntime/capi"), "libonnxruntime.so"));
    }
    found
}

/// Entries of a folder whose name starts so, sorted.
fn list(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> =
        entries.filter(|e| e.file_name().to_string_lossy().starts_with(prefix)).map(|e| e.path()).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_wins_alone() {
        let places = candidates(Some(Path::new("/x/lib.so")), &["/tmp".into()]);
        assert_eq!(places, [Candidate::Library("/x/lib.so".into())]);
    }

    #[test]
    fn an_environment_of_a_parent_folder_is_found_before_the_system() {
        let root = tempfile::tempdir().unwrap();
        let capi = root.path().join(".venv/lib/python3.12/site-packages/onnxruntime/capi");
        std::fs::create_dir_all(&capi).unwrap();
        let library = capi.join("libonnxruntime.so.1.31.1");
        std::fs::write(&library, "").unwrap();
        std::fs::write(capi.join("libonnxruntime_providers_shared.so"), "").unwrap();
        let inner = root.path().join("a/b");
        std::fs::create_dir_all(&inner).unwrap();

        let places = candidates(None, &[inner.clone(), inner]);
        assert_eq!(places.first(), Some(&Candidate::Library(library)));
        assert_eq!(places.last(), Some(&Candidate::Library(SYSTEM.into())));
    }

    #[test]
    fn an_environment_without_the_package_is_named() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join(".venv/lib/python3.12/site-packages")).unwrap();
        let places = candidates(None, &[root.path().to_owned()]);
        assert!(matches!(&places[0], Candidate::Absent(path) if path.starts_with(root.path().join(".venv"))));
    }
}
