//! Registries: where versions of models are, and which version an alias means.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use super::ModelError;
use super::bundle::Bundle;
use super::folder::FolderRegistry;
use crate::config::plan::{Plan, RegistryPlan};

/// The alias that always means the newest version and that nobody moves.
pub const LATEST: &str = "latest";

/// A version of a model, as its registry writes it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Version(pub Arc<str>);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Version {
    fn from(version: &str) -> Self {
        Self(version.into())
    }
}

/// Versions and aliases of models. Calls block; every one may be made from several processes at once.
pub trait Registry: Send + Sync {
    /// The version that an alias means now, or `None` where the model or the alias is not known.
    fn resolve(&self, model: &str, alias: &str) -> Result<Option<Version>, ModelError>;

    /// All versions, oldest first; none where the model is not known.
    fn versions(&self, model: &str) -> Result<Vec<Version>, ModelError>;

    /// A version's bundle, checked.
    fn load(&self, model: &str, version: &Version) -> Result<Bundle, ModelError>;

    /// Adds a bundle as the next version. The version is there whole or not at all, and no other call gets the same one.
    fn register(&self, model: &str, bundle_dir: &Path) -> Result<Version, ModelError>;

    /// Adds a bundle as the first version, or does nothing (`None`) where the model has versions already.
    fn register_first(&self, model: &str, bundle_dir: &Path) -> Result<Option<Version>, ModelError>;

    /// Makes an alias mean a version.
    fn set_alias(&self, model: &str, alias: &str, version: &Version) -> Result<(), ModelError>;

    /// All aliases and what they mean, without [`LATEST`].
    fn aliases(&self, model: &str) -> Result<BTreeMap<String, Version>, ModelError>;

    /// Where this registry is, for messages, without secrets.
    fn describe(&self) -> String;
}

/// Opens the registry of a plan.
///
/// # Errors
/// Where the address is not one that this build understands.
pub fn open_registry(plan: &RegistryPlan) -> Result<Arc<dyn Registry>, ModelError> {
    Ok(Arc::new(FolderRegistry::open(&plan.url)?))
}

/// Registers the pipeline's initial bundle as version 1 and gives it the pipeline's alias, where the registry does not know
/// the model yet. Finishes the work of a run that was killed in between. Several processes may call it at once.
///
/// # Errors
/// A broken bundle, one that does not fit the pipeline, or the registry's.
pub fn ensure_initial(registry: &dyn Registry, plan: &Plan) -> Result<(), ModelError> {
    let (Some(score), Some(initial)) = (&plan.score, &plan.registry.initial) else { return Ok(()) };
    let version = match registry.versions(&score.model)?.as_slice() {
        [] => {
            Bundle::load(initial)?.check_against(plan)?;
            match registry.register_first(&score.model, initial)? {
                Some(version) => {
                    tracing::info!(model = score.model, %version, bundle = %initial.display(), "registered the initial model");
                    version
                }
                None => return ensure_initial(registry, plan),
            }
        }
        // A run was killed, or another process is, between the version and its alias.
        [only] if registry.resolve(&score.model, &score.alias)?.is_none() => {
            let same = registry.load(&score.model, only)?.digest() == Bundle::load(initial)?.digest();
            if !same {
                return Ok(());
            }
            only.clone()
        }
        _ => return Ok(()),
    };
    registry.set_alias(&score.model, &score.alias, &version)
}
