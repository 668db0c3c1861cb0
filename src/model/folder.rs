//! A registry in a folder: `<root>/<model>/versions/<n>/<bundle files>` and `<root>/<model>/aliases/<alias>`.
//!
//! A version's folder is renamed into place, an alias's file is replaced by a rename, so that readers in other processes see
//! whole versions and whole aliases only. Two writers that want the same number race on the rename: the file system lets one
//! win, and the other takes the next number.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::bundle::{Bundle, BundleError, BundleFault, MANIFEST};
use super::registry::{LATEST, Registry, Version};
use super::{ModelError, files};
use crate::runtime::failpoint;

/// A registry in a folder.
#[derive(Debug, Clone)]
pub struct FolderRegistry {
    root: PathBuf,
    url: String,
}

impl FolderRegistry {
    /// Opens `file://<path>`; a path that does not start with `/` is relative to the working directory. The folder need not
    /// exist yet.
    ///
    /// # Errors
    /// Another scheme.
    pub fn open(url: &str) -> Result<Self, ModelError> {
        let refuse = |problem: &str| ModelError::RegistryUrl { url: url.to_owned(), problem: problem.to_owned() };
        let path = url
            .strip_prefix("file://")
            .ok_or_else(|| refuse("only folders can be registries; write file:///path/to/folder"))?;
        if path.is_empty() {
            return Err(refuse("names no folder; write file:///path/to/folder"));
        }
        // Absolute ones are real URLs, with percent-encoding; `file://./x` is a habit that URLs do not know.
        let root = match path.starts_with('/') {
            true => url::Url::parse(url).ok().and_then(|url| url.to_file_path().ok()).unwrap_or_else(|| path.into()),
            false => path.into(),
        };
        Ok(Self { root, url: url.to_owned() })
    }

    fn versions_dir(&self, model: &str) -> PathBuf {
        self.root.join(model).join("versions")
    }

    fn aliases_dir(&self, model: &str) -> PathBuf {
        self.root.join(model).join("aliases")
    }

    fn failed<'a>(&'a self, during: &'static str, path: &'a Path) -> impl Fn(io::Error) -> ModelError + 'a {
        move |source| ModelError::Storage { registry: self.describe(), during, path: path.to_owned(), source }
    }

    /// Names in a folder that do not start with a dot; none where the folder is missing.
    fn names(&self, dir: &Path) -> Result<Vec<String>, ModelError> {
        let failed = self.failed("list", dir);
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(failed(e)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.map_err(&failed)?.file_name();
            names.extend(name.to_str().filter(|name| !name.starts_with('.')).map(str::to_owned));
        }
        Ok(names)
    }

    /// Numbers of the versions, rising.
    fn numbers(&self, model: &str) -> Result<Vec<u64>, ModelError> {
        let names = self.names(&self.versions_dir(model))?;
        let mut numbers: Vec<u64> = names.iter().filter_map(|name| number(name)).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Writes a checked bundle beside the versions, under a name that listings skip.
    fn stage(&self, model: &str, bundle_dir: &Path) -> Result<Staged, ModelError> {
        check_name("model", model)?;
        let bundle = Bundle::load(bundle_dir)?;
        if bundle.manifest.name != model {
            let fault = BundleFault {
                file: MANIFEST.to_owned(),
                problem: format!("name is '{}', and it is to be registered as '{model}'", bundle.manifest.name),
                advice: "register it under its own name, or mend the name in the training script",
            };
            return Err(BundleError { dir: bundle_dir.to_owned(), faults: vec![fault] }.into());
        }
        let versions = self.versions_dir(model);
        std::fs::create_dir_all(&versions).map_err(self.failed("create", &versions))?;
        let staged = Staged { path: files::temporary(&versions.join("next")) };
        std::fs::create_dir(&staged.path).map_err(self.failed("create", &staged.path))?;
        for (name, bytes) in bundle.contents() {
            let path = staged.path.join(name);
            files::write(&path, bytes).map_err(self.failed("write", &path))?;
        }
        files::sync_parent(&staged.path.join(MANIFEST)).map_err(self.failed("sync", &staged.path))?;
        Ok(staged)
    }

    /// Puts a staged bundle in its place. False where another writer has just taken the number.
    fn publish(&self, model: &str, staged: &Staged, version: u64) -> Result<bool, ModelError> {
        let place = self.versions_dir(model).join(version.to_string());
        if failpoint::hit("model.register") {
            return Err(self.failed("write", &place)(io::Error::other("failpoint")));
        }
        match std::fs::rename(&staged.path, &place) {
            Ok(()) => {
                files::sync_parent(&place).map_err(self.failed("sync", &place))?;
                Ok(true)
            }
            // A folder that holds anything is never replaced by a rename.
            Err(e) if matches!(e.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => Ok(false),
            Err(e) => Err(self.failed("write", &place)(e)),
        }
    }
}

impl Registry for FolderRegistry {
    fn resolve(&self, model: &str, alias: &str) -> Result<Option<Version>, ModelError> {
        check_name("model", model)?;
        check_name("alias", alias)?;
        if alias == LATEST {
            return Ok(self.numbers(model)?.last().map(version));
        }
        let path = self.aliases_dir(model).join(alias);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(self.failed("read", &path)(e)),
        };
        match number(text.trim()) {
            Some(number) => Ok(Some(version(&number))),
            None => Err(ModelError::Corrupt {
                registry: self.describe(),
                path,
                problem: format!(
                    "'{}' is no version number; write the number of a folder under versions/",
                    text.trim()
                ),
            }),
        }
    }

    fn versions(&self, model: &str) -> Result<Vec<Version>, ModelError> {
        check_name("model", model)?;
        Ok(self.numbers(model)?.iter().map(version).collect())
    }

    fn load(&self, model: &str, version: &Version) -> Result<Bundle, ModelError> {
        check_name("model", model)?;
        let dir = self.versions_dir(model).join(&*version.0);
        if number(&version.0).is_none() || !dir.is_dir() {
            let known = self.versions(model)?;
            let known: Vec<&str> = known.iter().map(|version| &*version.0).collect();
            return Err(ModelError::Unknown {
                registry: self.describe(),
                model: model.to_owned(),
                what: format!("version {version}"),
                advice: match known.is_empty() {
                    true => "the model has no version at all: register a bundle first".to_owned(),
                    false => format!("it has {}", known.join(", ")),
                },
            });
        }
        Ok(Bundle::load(&dir)?)
    }

    fn register(&self, model: &str, bundle_dir: &Path) -> Result<Version, ModelError> {
        let staged = self.stage(model, bundle_dir)?;
        loop {
            let next = self.numbers(model)?.last().map_or(1, |newest| newest + 1);
            if self.publish(model, &staged, next)? {
                return Ok(version(&next));
            }
        }
    }

    fn register_first(&self, model: &str, bundle_dir: &Path) -> Result<Option<Version>, ModelError> {
        let staged = self.stage(model, bundle_dir)?;
        let first = self.numbers(model)?.is_empty() && self.publish(model, &staged, 1)?;
        Ok(first.then(|| version(&1)))
    }

    fn set_alias(&self, model: &str, alias: &str, version: &Version) -> Result<(), ModelError> {
        check_name("alias", alias)?;
        if alias == LATEST {
            let problem = "always means the newest version and cannot be set";
            return Err(ModelError::Name { what: "alias", name: alias.to_owned(), problem });
        }
        // Only a version that loads may be named: whoever follows the alias relies on it.
        self.load(model, version)?;
        let dir = self.aliases_dir(model);
        std::fs::create_dir_all(&dir).map_err(self.failed("create", &dir))?;
        let path = dir.join(alias);
        if failpoint::hit("model.alias") {
            return Err(self.failed("write", &path)(io::Error::other("failpoint")));
        }
        files::replace(&path, format!("{version}\n").as_bytes()).map_err(self.failed("write", &path))
    }

    fn aliases(&self, model: &str) -> Result<BTreeMap<String, Version>, ModelError> {
        check_name("model", model)?;
        let mut aliases = BTreeMap::new();
        for alias in self.names(&self.aliases_dir(model))? {
            if let Some(version) = self.resolve(model, &alias)? {
                aliases.insert(alias, version);
            }
        }
        Ok(aliases)
    }

    fn describe(&self) -> String {
        self.url.clone()
    }
}

/// A bundle written but not yet published; the folder goes away with it where it was not renamed.
struct Staged {
    path: PathBuf,
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Nothing is there after a rename, and a leftover harms nobody.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// A version's number: decimal, at least 1, without leading zeros, so that a number has one name.
fn number(name: &str) -> Option<u64> {
    name.parse().ok().filter(|number: &u64| *number > 0 && number.to_string() == name)
}

fn version(number: &u64) -> Version {
    Version(number.to_string().into())
}

fn check_name(what: &'static str, name: &str) -> Result<(), ModelError> {
    files::check_name(name).map_err(|problem| ModelError::Name { what, name: name.to_owned(), problem })
}

#[cfg(test)]
mod tests;
