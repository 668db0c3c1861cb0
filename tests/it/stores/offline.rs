use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use arrow::array::{AsArray, RecordBatch};
use arrow::compute::concat_batches;
use arrow::datatypes::Int64Type;
use driftline::broker::{NextOffset, Offsets, TopicPartition};
use driftline::config::plan::{OnlinePlan, Plan};
use driftline::store::{Checkpoint, Definition, Manifest, OfflineStore, Role, Versions};

use super::{Row, child_folder, feature_rows, in_child, plan, runtime};
use crate::process::run_python;

const START: i64 = 1_767_323_045_123;

fn plan_in(folder: &Path) -> Plan {
    let online = OnlinePlan::Embedded { path: folder.to_owned(), project: "p".into() };
    plan("shop", online, &format!("file://{}", folder.display()))
}

fn open(folder: &Path) -> OfflineStore {
    OfflineStore::open(&plan_in(folder), runtime()).unwrap()
}

/// Rows of the events `from..to`, ten milliseconds apart, in small batches as a worker gathers them.
fn rows(from: i64, to: i64) -> Vec<RecordBatch> {
    let rows: Vec<Row> = (from..to).map(|i| Row::new(i % 7, &format!("c{}", i % 11), START + i * 10, i)).collect();
    rows.chunks(3).map(|rows| feature_rows(rows).batch).collect()
}

fn next(offset: i64) -> Offsets {
    [(TopicPartition::new("purchases", 0), NextOffset(offset))].into()
}

/// The checkpoint after the events `from..to`. The state stands for any batches: here the rows of the newest events.
fn checkpoint(previous: Option<&Manifest>, from: i64, to: i64) -> Checkpoint<'_> {
    Checkpoint {
        partition: 0,
        next: next(to),
        parts: Vec::new(),
        state: rows(to - 5, to),
        follows: false,
        rows: rows(from, to),
        windows: Vec::new(),
        previous,
    }
}

fn files(folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.insert(path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found
}

/// The files that a manifest answers for, itself among them.
fn named(manifest: &Manifest) -> BTreeSet<String> {
    let of = manifest.files.iter().map(|f| &f.path).chain(manifest.state_files().map(|s| &s.path));
    let mut names: BTreeSet<String> = of.map(|path| format!("shop/{path}")).collect();
    names.insert(format!("shop/manifest/partition=0/{:020}.json", manifest.sequence));
    names
}

fn all(batches: impl IntoIterator<Item = RecordBatch>) -> RecordBatch {
    let batches: Vec<_> = batches.into_iter().collect();
    concat_batches(&batches[0].schema(), &batches).unwrap()
}

#[test]
fn a_checkpoint_is_found_again_whole() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    assert_eq!(store.latest(0).unwrap(), None);
    assert!(store.summary().unwrap().is_empty());
    let first = store.commit(&checkpoint(None, 0, 100)).unwrap();
    let second = store.commit(&checkpoint(Some(&first), 100, 250)).unwrap();
    // Nothing new to say about features: no file for it.
    let third = store.commit(&Checkpoint { rows: Vec::new(), ..checkpoint(Some(&second), 250, 251) }).unwrap();
    let empty =
        Checkpoint { partition: 3, next: Offsets::new(), state: vec![], rows: vec![], ..checkpoint(None, 0, 5) };
    store.commit(&empty).unwrap();

    let store = open(folder.path());
    let latest = store.latest(0).unwrap().unwrap();
    assert_eq!(latest, third);
    assert_eq!((latest.sequence, &latest.next, latest.files.len(), latest.rows()), (3, &next(251), 2, 250));
    assert_eq!((latest.files[1].from, latest.files[1].to), (START + 1000, START + 2490));
    assert_eq!(all(store.load_state(&latest).unwrap()), all(rows(246, 251)));
    assert!(store.load_state(&store.latest(3).unwrap().unwrap()).unwrap().is_empty());
    let summary = store.summary().unwrap();
    assert_eq!(
        summary.iter().map(|s| (s.partition, s.sequence, s.files, s.rows)).collect::<Vec<_>>(),
        [(0, 3, 2, 250), (3, 1, 0, 0)]
    );
}

#[test]
fn rows_are_read_by_event_time_and_column() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let first = store.commit(&checkpoint(None, 0, 100)).unwrap();
    store.commit(&checkpoint(Some(&first), 100, 250)).unwrap();
    let other = Checkpoint { partition: 1, rows: rows(90, 95), ..checkpoint(None, 0, 100) };
    store.commit(&other).unwrap();

    let read = |from, to, columns: Option<&[&str]>| -> Vec<RecordBatch> {
        store.read_rows(from..to, columns).unwrap().collect::<Result<_, _>>().unwrap()
    };
    assert_eq!(all(read(i64::MIN, i64::MAX, None)), all(rows(0, 250).into_iter().chain(rows(90, 95))));
    // From inclusive, to exclusive, over the files' border.
    let some = all(read(START + 950, START + 1050, Some(&["ratio", "source_offset"])));
    assert_eq!(some.num_columns(), 2, "the event time was read for the filter alone");
    let offsets: Vec<i64> = some.column(1).as_primitive::<Int64Type>().values().to_vec();
    assert_eq!(offsets, (95..105).collect::<Vec<_>>());
    assert!(read(START + 2500, i64::MAX, None).is_empty());
    let error = store.read_rows(0..i64::MAX, Some(&["no_such"])).unwrap().next().unwrap().unwrap_err();
    assert!(error.to_string().contains("'no_such'"), "{error}");

    // Rows of another definition are none of this plan's.
    let mut changed = plan_in(folder.path());
    changed.definition = "fedcba9876543210".into();
    let changed = OfflineStore::open(&changed, runtime()).unwrap();
    assert_eq!(changed.read_rows(i64::MIN..i64::MAX, None).unwrap().count(), 0);
    assert_eq!(changed.latest(0).unwrap().unwrap().definition, "0123456789abcdef");
}

#[test]
fn versions_have_files_of_their_own_and_one_of_two_who_change_something_at_once_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path());
    let definition = Definition::of(&plan_in(folder.path()));
    let pipeline = plan_in(folder.path()).name;
    assert_eq!(first.role().unwrap(), Role::Serving { version: 1, epoch: 0 }, "before there are records");
    let record = Versions::first(&pipeline, &definition, Vec::new(), 1);
    assert!(first.record_versions(&record).unwrap());
    first.commit(&checkpoint(None, 0, 10)).unwrap();

    let mut changed = plan_in(folder.path());
    changed.definition = "fedcba9876543210".into();
    let unknown = OfflineStore::open(&changed, runtime()).unwrap();
    assert_eq!(unknown.role().unwrap(), Role::Unknown { serving: 1, epoch: 0 });
    let (both, _) = record.bootstrapped(&Definition::of(&changed), Vec::new(), 2).unwrap();
    assert!(first.record_versions(&both).unwrap());
    assert!(!unknown.record_versions(&both).unwrap(), "that record is there already");
    assert_eq!(unknown.versions().unwrap(), Some(both.clone()));

    let second = OfflineStore::open(&changed, runtime()).unwrap();
    assert_eq!(second.role().unwrap(), Role::Following { version: 2, serving: 1 });
    assert_eq!(second.latest(0).unwrap(), None, "the first one's checkpoints are not its own");
    second.commit(&checkpoint(None, 0, 20)).unwrap();
    assert!(folder.path().join(&pipeline).join("v2/manifest/partition=0").is_dir());
    let rows = |store: &OfflineStore| -> usize {
        store.read_partition(0).unwrap().map(|batch| batch.unwrap().num_rows()).sum()
    };
    assert_eq!((rows(&first), rows(&second)), (10, 20));

    assert!(!second.is_handed_over(1, 0).unwrap() && second.is_handed_over(0, 0).unwrap());
    second.hand_over(1, 0).unwrap();
    second.hand_over(1, 0).unwrap();
    assert!(first.is_handed_over(1, 0).unwrap() && !first.is_handed_over(1, 1).unwrap());
    assert!(!first.is_handed_over(2, 0).unwrap());

    assert!(second.remove_version(2).unwrap() >= 3);
    assert_eq!((rows(&first), rows(&second)), (10, 0));
    // A record cut off by a power failure does not count.
    fs::write(folder.path().join(&pipeline).join("versions/00000000000000000003.json"), b"{\"format\":1,").unwrap();
    assert_eq!(first.versions().unwrap(), Some(both));
}

#[test]
fn the_second_owner_of_a_checkpoint_is_fenced() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (open(folder.path()), open(folder.path()));
    let first = old.commit(&checkpoint(None, 0, 10)).unwrap();
    let taken_over = new.latest(0).unwrap().unwrap();
    let second = new.commit(&checkpoint(Some(&taken_over), 10, 20)).unwrap();
    // The old owner wakes up with the same work, and with the work before it.
    for previous in [Some(&first), None] {
        let error = old.commit(&checkpoint(previous, 10, 25)).unwrap_err();
        assert!(error.is_fenced() && !error.is_retriable(), "{error}");
    }
    assert_eq!(new.latest(0).unwrap().unwrap(), second);
    let read: Vec<_> = new.read_rows(i64::MIN..i64::MAX, None).unwrap().map(Result::unwrap).collect();
    assert_eq!(all(read), all(rows(0, 20)));
}

#[test]
fn two_owners_at_once_leave_one_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let stores: Vec<_> = (0..4).map(|_| open(folder.path())).collect();
    let start = std::sync::Barrier::new(stores.len());
    let winners: usize = std::thread::scope(|scope| {
        let attempt = |store| {
            let start = &start;
            scope.spawn(move || {
                start.wait();
                OfflineStore::commit(store, &checkpoint(None, 0, 200)).is_ok()
            })
        };
        let attempts: Vec<_> = stores.iter().map(attempt).collect();
        attempts.into_iter().map(|a| usize::from(a.join().unwrap())).sum()
    });
    assert_eq!(winners, 1);
    let store = open(folder.path());
    let latest = store.latest(0).unwrap().unwrap();
    let read: Vec<_> = store.read_rows(i64::MIN..i64::MAX, None).unwrap().map(Result::unwrap).collect();
    assert_eq!(all(read), all(rows(0, 200)));
    store.sweep(0).unwrap();
    assert_eq!(files(folder.path()), named(&latest));
}

#[test]
fn the_sweep_keeps_three_checkpoints_and_every_row() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut manifests: Vec<Manifest> = Vec::new();
    for i in 0..6 {
        let manifest = store.commit(&checkpoint(manifests.last(), i * 10, (i + 1) * 10)).unwrap();
        manifests.push(manifest);
    }
    // Left by attempts that came to nothing: of a past checkpoint, and of the one that somebody may be writing now.
    let rows_folder = folder.path().join("shop/features/partition=0");
    for name in ["00000000000000000004-0000000a.arrow", "00000000000000000005-0000000b.arrow#1"] {
        std::fs::write(rows_folder.join(name), "partial").unwrap();
    }
    let underway = "00000000000000000007-0000000c.arrow";
    std::fs::write(rows_folder.join(underway), "partial").unwrap();

    // Manifests 1 to 3, their states, and the file of a past attempt; the half-written one is not counted.
    assert_eq!(store.sweep(0).unwrap(), 7);
    assert_eq!(store.sweep(0).unwrap(), 0);
    let mut expected: BTreeSet<String> = manifests[3..].iter().flat_map(named).collect();
    expected.insert(format!("shop/features/partition=0/{underway}"));
    assert_eq!(files(folder.path()), expected);
    let latest = store.latest(0).unwrap().unwrap();
    assert_eq!(latest.files.len(), 6);
    assert_eq!(store.sweep(9).unwrap(), 0);
}

#[test]
fn a_checkpoint_of_changes_names_the_files_of_those_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let part = |previous: Option<&Manifest>, part, from, to| {
        store.write_state(0, previous, part, &rows(from, to)).unwrap().expect("it has rows")
    };
    let state = |manifest: &Manifest| all(open(folder.path()).load_state(manifest).unwrap());
    let whole = Checkpoint { parts: vec![part(None, 0, 0, 10), part(None, 1, 10, 20)], ..checkpoint(None, 0, 25) };
    let mut manifests = vec![store.commit(&whole).unwrap()];
    assert_eq!(state(&manifests[0]), all(rows(0, 25)), "parts, then the rest");
    for at in [30, 40, 50] {
        let previous = manifests.last();
        let parts = vec![part(previous, 0, at - 5, at - 2)];
        let changes = Checkpoint { parts, state: rows(at - 2, at), follows: true, ..checkpoint(previous, at - 5, at) };
        manifests.push(store.commit(&changes).unwrap());
        part(manifests.last(), 0, 0, 3);
    }
    // Nothing changed but the positions, which the schema tells.
    let previous = manifests.last();
    let nothing = vec![rows(0, 1).remove(0).slice(0, 0)];
    let changes = Checkpoint { state: nothing, follows: true, ..checkpoint(previous, 50, 51) };
    manifests.push(store.commit(&changes).unwrap());
    let newest = &manifests[4];
    assert_eq!((newest.updates.len(), newest.updates.last().unwrap().rows), (9, 0));
    let expected = [(0, 25), (25, 30), (35, 40), (45, 50)].map(|(from, to)| rows(from, to));
    assert_eq!(state(newest), all(expected.into_iter().flatten()));

    // The parts of attempts that came to nothing are of no manifest.
    store.sweep(0).unwrap();
    assert_eq!(files(folder.path()), manifests[2..].iter().flat_map(named).collect());
    for at in [60, 70, 80] {
        let whole = store.commit(&checkpoint(manifests.last(), at - 10, at)).unwrap();
        assert_eq!(state(&whole), all(rows(at - 5, at)));
        manifests.push(whole);
    }
    store.sweep(0).unwrap();
    let mut expected: BTreeSet<String> = manifests[5..].iter().flat_map(named).collect();
    let listed = files(folder.path());
    expected.retain(|path| listed.contains(path));
    assert_eq!(listed, expected, "no file of changes outlives the last manifest that names it");
    assert_eq!(listed.iter().filter(|path| path.contains("/state/")).count(), 3);
}

#[test]
fn a_manifest_cut_off_by_a_power_failure_is_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let first = store.commit(&checkpoint(None, 0, 10)).unwrap();
    let second = store.commit(&checkpoint(Some(&first), 10, 20)).unwrap();
    let path = folder.path().join("shop/manifest/partition=0/00000000000000000002.json");
    let text = std::fs::read(&path).unwrap();
    for torn in [Vec::new(), text[..40].to_vec(), vec![0; text.len()]] {
        std::fs::write(&path, torn).unwrap();
        assert_eq!(store.latest(0).unwrap().unwrap(), first);
    }
    let again = store.commit(&checkpoint(Some(&first), 10, 20)).unwrap();
    assert_eq!((again.sequence, &again.next), (second.sequence, &second.next));

    for wrong in [&br#"{"format":1}"#[..], br#"{"form"#.repeat(9).as_slice(), &[text.clone(), text].concat()] {
        std::fs::write(&path, wrong).unwrap();
        let error = store.latest(0).unwrap_err();
        assert!(error.to_string().contains("00000000000000000002.json") && !error.is_retriable(), "{error}");
    }
}

#[test]
fn damaged_and_missing_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let manifest = store.commit(&checkpoint(None, 0, 100)).unwrap();
    let path = folder.path().join("shop").join(&manifest.state.as_ref().unwrap().path);
    let whole = std::fs::read(&path).unwrap();
    for cut in [0, 5, 11, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let error = store.load_state(&manifest).unwrap_err();
        assert!(error.to_string().contains(path.file_name().unwrap().to_str().unwrap()), "{error}");
    }
    std::fs::remove_file(&path).unwrap();
    let error = store.load_state(&manifest).unwrap_err();
    assert!(!error.is_fenced() && error.to_string().contains(path.to_str().unwrap()), "{error}");
}

#[test]
fn urls_that_cannot_be_used_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let mut plan = plan_in(folder.path());
    for url in ["data", "s3://bucket/x", "file://", "gopher://x"] {
        plan.offline.url = url.into();
        let error = OfflineStore::open(&plan, runtime()).err().unwrap();
        assert!(!error.is_retriable() && error.to_string().contains("file://"), "{url}: {error}");
    }
    std::fs::write(folder.path().join("file"), "").unwrap();
    plan.offline.url = format!("file://{}/file", folder.path().display());
    let error = OfflineStore::open(&plan, runtime()).err().unwrap();
    assert!(error.to_string().contains(&format!("{}/file/shop", folder.path().display())), "{error}");
}

#[test]
fn python_reads_the_files_as_they_lie() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let first = store.commit(&checkpoint(None, 0, 1000)).unwrap();
    store.commit(&checkpoint(Some(&first), 1000, 1500)).unwrap();
    let other = Checkpoint { partition: 1, rows: rows(1500, 1600), ..checkpoint(None, 0, 100) };
    store.commit(&other).unwrap();
    store.sweep(0).unwrap();

    // What was written, in the plainest of formats.
    let expected = folder.path().join("expected.arrows");
    let batch = all(rows(0, 1600));
    let file = std::fs::File::create(&expected).unwrap();
    let mut writer = arrow::ipc::writer::StreamWriter::try_new(file, &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    let output = run_python(&[&"tests/it/stores/arrow_read.py", &store.folder().unwrap(), &expected]);
    assert_eq!(output.trim(), "1600 rows in 3 files: pyarrow and DuckDB agree with what was written");
}

/// Goes on from the newest checkpoint, as a restarted worker does.
#[cfg(feature = "failpoints")]
fn go_on(folder: &Path) -> Result<Manifest, driftline::store::OfflineError> {
    let store = open(folder);
    let previous = store.latest(0)?;
    let from = previous.as_ref().map_or(0, |m| m.next.values().next().unwrap().0);
    let parts = store.write_state(0, previous.as_ref(), 0, &rows(from, from + 3))?.into_iter().collect();
    let manifest = store.commit(&Checkpoint { parts, ..checkpoint(previous.as_ref(), from, from + 50) })?;
    store.sweep(0)?;
    Ok(manifest)
}

#[cfg(feature = "failpoints")]
#[test]
fn child_takes_one_checkpoint() {
    let Some(folder) = child_folder() else { return };
    if let Err(error) = go_on(&folder) {
        assert!(error.is_retriable() && error.to_string().contains("free space"), "{error}");
        // The same worker tries again, with the same rows.
        go_on(&folder).unwrap();
    }
}

#[cfg(feature = "failpoints")]
#[rstest::rstest]
fn a_crash_between_files_leaves_the_checkpoint_before(
    #[values("part_written", "before_rows", "rows_written", "state_written", "manifest_written")] point: &str,
    #[values("kill", "error@1")] action: &str,
) {
    let folder = tempfile::tempdir().unwrap();
    let child = |failpoints: &str| {
        in_child("offline::child_takes_one_checkpoint", folder.path(), &[("DRIFTLINE_FAILPOINTS", failpoints)])
    };
    assert!(child(""));
    let before = open(folder.path()).latest(0).unwrap().unwrap();

    let survived = child(&format!("offline.{point}={action}"));
    assert_eq!(survived, action != "kill");
    let latest = open(folder.path()).latest(0).unwrap().unwrap();
    let committed = match (action, point) {
        ("kill", "manifest_written") => 2,
        ("kill", _) => 1,
        // The manifest stood although its writer saw an error: the next attempt went on from it.
        (_, "manifest_written") => 3,
        _ => 2,
    };
    assert_eq!(latest.sequence, committed);
    if committed == 1 {
        assert_eq!(latest, before);
    }
    assert_eq!(latest.rows(), 50 * committed);

    assert!(child(""));
    let store = open(folder.path());
    let latest = store.latest(0).unwrap().unwrap();
    let read: Vec<_> = store.read_rows(i64::MIN..i64::MAX, None).unwrap().map(Result::unwrap).collect();
    assert_eq!(all(read), all(rows(0, 50 * i64::try_from(committed + 1).unwrap())), "each row once");
    let orphans: Vec<_> = files(folder.path())
        .into_iter()
        .filter(|path| path.contains("/features/") && !named(&latest).contains(path))
        .collect();
    assert_eq!(orphans, Vec::<String>::new(), "the sweep leaves no orphan");
    let states = files(folder.path()).into_iter().filter(|path| path.contains("/state/")).count();
    assert_eq!(states as u64, 2 * latest.sequence.min(3), "two files a checkpoint that is kept");
}

#[test]
fn child_fills_its_disk() {
    let Some(folder) = child_folder() else { return };
    let limit = |bytes: u64| {
        // SAFETY: plain calls on plain data of this process, whose only test this is.
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let mut limits = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            assert_eq!(libc::getrlimit(libc::RLIMIT_FSIZE, &mut limits), 0);
            limits.rlim_cur = bytes.min(limits.rlim_max);
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limits), 0);
        }
    };
    let store = open(&folder);
    let first = store.commit(&checkpoint(None, 0, 10)).unwrap();
    let whole = files(&folder);
    let large = checkpoint(Some(&first), 10, 20_000);
    limit(64 << 10);
    for _ in 0..3 {
        let error = store.commit(&large).unwrap_err();
        assert!(error.is_retriable(), "{error}");
        assert!(error.to_string().contains("/features/partition=0/00000000000000000002-"), "{error}");
    }
    assert_eq!(files(&folder), whole, "failed attempts leave nothing that would fill the disk further");
    assert_eq!(store.latest(0).unwrap().unwrap(), first);
    limit(u64::MAX);
    let second = store.commit(&large).unwrap();
    assert_eq!(second.rows(), 20_000);
}

#[test]
fn a_disk_that_cannot_take_more_holds_back_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    assert!(in_child("offline::child_fills_its_disk", folder.path(), &[]));
    assert_eq!(open(folder.path()).latest(0).unwrap().unwrap().rows(), 20_000);
}
