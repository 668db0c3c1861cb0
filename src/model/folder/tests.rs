use std::collections::BTreeSet;

use rstest::rstest;

use super::*;
use crate::model::bundle::{MODEL, PREPROCESSOR, PROFILE};

/// A sealed bundle of model `churn`, whose `model.onnx` holds `text`.
fn bundle(text: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let manifest = "format = 1\nname = \"churn\"\ncreated_at = 2026-01-31T12:00:00Z\n[signature]\n\
        inputs = [{ name = \"a\", type = \"float64\" }]\noutput = { name = \"p\", task = \"regression\" }\n";
    std::fs::write(dir.path().join(MANIFEST), manifest).unwrap();
    std::fs::write(dir.path().join(PREPROCESSOR), b"pre").unwrap();
    std::fs::write(dir.path().join(MODEL), text).unwrap();
    std::fs::write(dir.path().join(PROFILE), b"{}").unwrap();
    Bundle::seal(dir.path()).unwrap();
    dir
}

fn registry() -> (tempfile::TempDir, FolderRegistry) {
    let root = tempfile::tempdir().unwrap();
    let registry = FolderRegistry::open(&format!("file://{}/models", root.path().display())).unwrap();
    (root, registry)
}

fn versions(registry: &FolderRegistry) -> Vec<String> {
    registry.versions("churn").unwrap().into_iter().map(|version| version.to_string()).collect()
}

#[test]
fn versions_count_up_and_hold_what_was_registered() {
    let (_root, registry) = registry();
    assert!(versions(&registry).is_empty());
    for text in ["one", "two", "three"] {
        registry.register("churn", bundle(text).path()).unwrap();
    }
    assert_eq!(versions(&registry), ["1", "2", "3"]);
    assert_eq!(registry.load("churn", &"2".into()).unwrap().model(), b"two");
    let unknown = registry.load("churn", &"9".into()).unwrap_err().to_string();
    assert!(unknown.ends_with("has no version 9 of model 'churn'; it has 1, 2, 3"), "{unknown}");
}

#[test]
fn more_than_nine_versions_keep_their_order() {
    let (_root, registry) = registry();
    let bundle = bundle("same");
    for _ in 0..11 {
        registry.register("churn", bundle.path()).unwrap();
    }
    assert_eq!(versions(&registry).last().unwrap(), "11");
    assert_eq!(registry.resolve("churn", LATEST).unwrap(), Some("11".into()));
}

#[test]
fn aliases_move_and_latest_follows_by_itself() {
    let (_root, registry) = registry();
    assert_eq!(registry.resolve("churn", "production").unwrap(), None);
    assert_eq!(registry.resolve("churn", LATEST).unwrap(), None);
    registry.register("churn", bundle("one").path()).unwrap();
    registry.register("churn", bundle("two").path()).unwrap();
    registry.set_alias("churn", "production", &"2".into()).unwrap();
    registry.set_alias("churn", "staging", &"2".into()).unwrap();
    registry.set_alias("churn", "production", &"1".into()).unwrap();
    assert_eq!(registry.resolve("churn", "production").unwrap(), Some("1".into()));
    let all: Vec<_> = registry.aliases("churn").unwrap().into_iter().map(|(a, v)| format!("{a}={v}")).collect();
    assert_eq!(all, ["production=1", "staging=2"]);
    assert!(registry.set_alias("churn", LATEST, &"1".into()).is_err());
    assert!(registry.set_alias("churn", "production", &"3".into()).is_err());
    assert_eq!(registry.resolve("churn", "production").unwrap(), Some("1".into()));
}

#[test]
fn an_alias_never_names_a_broken_version() {
    let (root, registry) = registry();
    registry.register("churn", bundle("one").path()).unwrap();
    std::fs::write(root.path().join("models/churn/versions/1").join(MODEL), "cut").unwrap();
    let error = registry.set_alias("churn", "production", &"1".into()).unwrap_err();
    assert!(matches!(error, ModelError::Bundle(_)), "{error}");
}

#[test]
fn an_alias_that_holds_no_number_is_reported_with_its_file() {
    let (root, registry) = registry();
    registry.register("churn", bundle("one").path()).unwrap();
    registry.set_alias("churn", "production", &"1".into()).unwrap();
    std::fs::write(root.path().join("models/churn/aliases/production"), "newest").unwrap();
    let error = registry.resolve("churn", "production").unwrap_err().to_string();
    assert!(error.contains("aliases/production: 'newest' is no version number"), "{error}");
}

#[test]
fn a_broken_bundle_is_not_registered_and_leaves_nothing() {
    let (root, registry) = registry();
    let broken = bundle("one");
    std::fs::write(broken.path().join(MODEL), "other").unwrap();
    assert!(registry.register("churn", broken.path()).is_err());
    assert!(registry.register("other", bundle("one").path()).unwrap_err().to_string().contains("name is 'churn'"));
    assert!(versions(&registry).is_empty());
    let left: Vec<_> = walk(root.path()).into_iter().filter(|path| path.is_file()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_partial_version_of_a_killed_process_is_not_seen() {
    let (root, registry) = registry();
    registry.register("churn", bundle("one").path()).unwrap();
    let versions_dir = root.path().join("models/churn/versions");
    std::fs::create_dir(versions_dir.join(".next.17.0.partial")).unwrap();
    std::fs::create_dir(versions_dir.join("03")).unwrap();
    std::fs::write(versions_dir.join("README"), "by hand").unwrap();
    assert_eq!(versions(&registry), ["1"]);
    registry.register("churn", bundle("two").path()).unwrap();
    assert_eq!(versions(&registry), ["1", "2"]);
}

#[test]
fn registering_at_once_gives_every_caller_a_version_of_its_own() {
    let (_root, registry) = registry();
    let got: Vec<Version> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|thread| {
                let registry = &registry;
                scope.spawn(move || {
                    let bundle = bundle(&thread.to_string());
                    let versions: Vec<Version> =
                        (0..5).map(|_| registry.register("churn", bundle.path()).unwrap()).collect();
                    for version in &versions {
                        let text = registry.load("churn", version).unwrap().model().to_vec();
                        assert_eq!(text, thread.to_string().into_bytes());
                    }
                    versions
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(got.iter().collect::<BTreeSet<_>>().len(), 40);
    assert_eq!(versions(&registry).len(), 40);
}

#[test]
fn only_one_caller_registers_the_first_version() {
    let (_root, registry) = registry();
    let bundle = bundle("initial");
    let won = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..8).map(|_| scope.spawn(|| registry.register_first("churn", bundle.path()).unwrap())).collect();
        threads.into_iter().filter_map(|thread| thread.join().unwrap()).count()
    });
    assert_eq!(won, 1);
    assert_eq!(versions(&registry), ["1"]);
}

#[rstest]
#[case::scheme("mlflow://host/x", "only folders can be registries")]
#[case::nothing("file://", "names no folder")]
fn other_addresses_are_refused(#[case] url: &str, #[case] expected: &str) {
    let error = FolderRegistry::open(url).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
}

#[rstest]
#[case::absolute("file:///var/models", "/var/models")]
#[case::encoded("file:///var/my%20models", "/var/my models")]
#[case::relative("file://./data/models", "./data/models")]
fn addresses_are_folders(#[case] url: &str, #[case] expected: &str) {
    assert_eq!(FolderRegistry::open(url).unwrap().root, Path::new(expected));
}

#[rstest]
#[case("../churn")]
#[case("")]
#[case("a/b")]
#[case(".hidden")]
fn names_cannot_leave_the_folder(#[case] name: &str) {
    let (_root, registry) = registry();
    assert!(matches!(registry.versions(name), Err(ModelError::Name { what: "model", .. })));
    assert!(matches!(registry.resolve("churn", name), Err(ModelError::Name { what: "alias", .. })));
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(walk(&path));
        }
        found.push(path);
    }
    found
}
