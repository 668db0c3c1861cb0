use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use driftline::config::plan::{DataType, Function, LookupPlan, OnlinePlan, Plan, ScorePlan, Secret, Unavailable};
use driftline::runtime::clock;
use driftline::store::feast::{Layout, python_repository, timestamp_field};
use driftline::store::{GroupRead, OnlineStore, Status, Value, key_from_text, lookup, open_online, open_online_at};
use driftline::window::FeatureRows;
use proptest::prelude::*;

use super::{Row, child_folder, column, feature_rows, in_child, plan, runtime};
use crate::process::run_python;
use crate::servers::{Redis, unique, until};

const START: i64 = 1_767_323_045_123;

fn redis_plan(url: String, project: &str) -> Plan {
    plan("shop", OnlinePlan::Redis { url: Secret(url), project: project.into(), ttl: None }, "")
}

fn open(plan: &Plan) -> Arc<dyn OnlineStore> {
    open_online(plan, runtime()).unwrap()
}

fn never() -> bool {
    false
}

/// A store of each kind, empty.
fn both() -> Vec<(Arc<dyn OnlineStore>, Option<tempfile::TempDir>)> {
    let redis = redis_plan(Redis::shared().url(), &unique("both"));
    let folder = tempfile::tempdir().unwrap();
    let embedded = OnlinePlan::Embedded { path: folder.path().to_owned(), project: "both".into() };
    vec![(open(&redis), None), (open(&plan("shop", embedded, "")), Some(folder))]
}

#[test]
fn what_is_written_is_read() {
    let rows: Vec<Row> = (0..1000).map(|i| Row::new(i, &format!("c{i}"), START + i * 7, i)).collect();
    for (store, _folder) in both() {
        store.ping().unwrap();
        store.write(&feature_rows(&rows), &never).unwrap();
        for row in &rows {
            assert_eq!(store.read(&row.key()).unwrap(), row.read(), "{}", store.describe());
        }
        let unknown = store.read(&[Value::Int64(-1), Value::String("c0".into())]).unwrap();
        assert_eq!(unknown.iter().map(|(_, read)| read).collect::<Vec<_>>(), [&GroupRead::NotFound; 3]);
        store.write(&feature_rows(&[]), &never).unwrap();
        assert!(store.read(&[Value::Int64(1)]).is_err(), "half a key is refused");
    }
}

#[test]
fn views_of_other_entities_are_looked_up() {
    let rows: Vec<Row> = (0..300).map(|i| Row::new(i, &format!("c{i}"), START + i * 7, i)).collect();
    let (project, folder) = (unique("lookup"), tempfile::tempdir().unwrap());
    let embedded = OnlinePlan::Embedded { path: folder.path().to_owned(), project: project.clone() };
    for store in [open(&redis_plan(Redis::shared().url(), &project)), open(&plan("shop", embedded, ""))] {
        store.write(&feature_rows(&rows), &never).unwrap();
        let own = &plan("shop", OnlinePlan::Embedded { path: PathBuf::new(), project: String::new() }, "");
        let lookup = LookupPlan {
            name: "other".into(),
            project: project.clone(),
            view: "visit".into(),
            keys: own.entity.keys.iter().map(|key| (key.clone(), "feature".into())).collect(),
            columns: own.groups[1]
                .features
                .iter()
                .rev()
                .map(|(_, _, column)| (column.clone(), column.clone()))
                .collect(),
            max_age_ms: None,
            timeout: Duration::from_secs(30),
            unavailable: Unavailable::Wait,
            stale_for: Duration::from_secs(1),
            stale_entities: 1,
        };
        let layout = Layout::of_lookup(&lookup);
        let keys: Vec<Vec<u8>> =
            (0..301).map(|i| layout.key(&[Value::Int64(i), Value::String(format!("c{i}"))]).unwrap()).collect();
        let found = store.look_up(&layout, &keys, lookup.timeout).unwrap();
        assert_eq!((found.len(), &found[300]), (301, &GroupRead::NotFound));
        for (row, found) in rows.iter().zip(&found) {
            let (_, expected) = &row.read()[1];
            let (GroupRead::Found { event_time: at, values }, GroupRead::Found { event_time, values: found }) =
                (expected, found)
            else {
                panic!("{expected:?} {found:?}")
            };
            assert_eq!((at, values.iter().rev().collect::<Vec<_>>()), (event_time, found.iter().collect()));
        }
        let elsewhere = Layout::of_lookup(&LookupPlan { project: "elsewhere".into(), ..lookup.clone() });
        let keys = [elsewhere.key(&rows[0].key()).unwrap()];
        assert_eq!(store.look_up(&elsewhere, &keys, lookup.timeout).unwrap(), [GroupRead::NotFound]);
        assert_eq!(store.look_up(&elsewhere, &[], lookup.timeout).unwrap(), []);
    }
}

#[test]
fn a_store_that_keeps_silent_is_waited_for_no_longer_than_asked() {
    let redis = Redis::start();
    let plan = redis_plan(redis.url(), "silent");
    let store = open(&plan);
    store.ping().unwrap();
    redis.command(&[b"CLIENT", b"PAUSE", b"3600000", b"ALL"]);
    let layout = Layout::of_lookup(&LookupPlan {
        name: "other".into(),
        project: "silent".into(),
        view: "visit".into(),
        keys: plan.entity.keys.iter().map(|key| (key.clone(), "feature".into())).collect(),
        columns: Vec::new(),
        max_age_ms: None,
        timeout: Duration::ZERO,
        unavailable: Unavailable::Null,
        stale_for: Duration::from_secs(1),
        stale_entities: 1,
    });
    let key = layout.key(&[Value::Int64(1), Value::String("a".into())]).unwrap();
    let error = store.look_up(&layout, &[key], Duration::from_millis(50)).unwrap_err();
    assert!(error.is_retriable() && error.to_string().contains("no answer within 50 ms"), "{error}");
}

/// Events of few entities at few instants, and a schedule that applies each at least once, in batches, in any order.
fn schedules() -> impl Strategy<Value = Vec<Vec<Row>>> {
    let event = (0..2_i64, 0..2_usize, 0..4_i64, 1..4_i64)
        .prop_map(|(shop, who, at, sequence)| Row::new(shop, ["ann", "bob"][who], START + at * 250, sequence));
    proptest::collection::vec(event, 1..10).prop_flat_map(|events| {
        let repeats = proptest::collection::vec(0..events.len(), 0..10);
        (repeats, Just(events.clone()).prop_shuffle(), 1..5_usize).prop_map(move |(repeats, all, batch)| {
            let applied: Vec<Row> = repeats.into_iter().map(|i| events[i].clone()).chain(all).collect();
            applied.chunks(batch).map(<[Row]>::to_vec).collect()
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_newest_row_wins_in_any_order_and_repetition(schedule in schedules()) {
        let mut newest: BTreeMap<(i64, String), Row> = BTreeMap::new();
        for row in schedule.iter().flatten() {
            let best = newest.entry((row.shop, row.customer.clone())).or_insert_with(|| row.clone());
            if (row.at, row.sequence) > (best.at, best.sequence) {
                *best = row.clone();
            }
        }
        for (store, _folder) in both() {
            for batch in &schedule {
                store.write(&feature_rows(batch), &never).unwrap();
            }
            for row in newest.values() {
                prop_assert_eq!(store.read(&row.key()).unwrap(), row.read(), "{}", store.describe());
            }
        }
    }
}

#[test]
fn instants_before_1970_are_older() {
    for (store, _folder) in both() {
        let rows = [Row::new(1, "a", -86_400_000_500, 1), Row::new(1, "a", -500, 2), Row::new(1, "a", -1500, 3)];
        for row in &rows {
            store.write(&feature_rows(std::slice::from_ref(row)), &never).unwrap();
        }
        assert_eq!(store.read(&rows[0].key()).unwrap(), rows[1].read(), "{}", store.describe());
    }
}

#[test]
fn an_embedded_store_keeps_its_rows_and_refuses_a_second_process() {
    let folder = tempfile::tempdir().unwrap();
    let plan = plan("shop", OnlinePlan::Embedded { path: folder.path().join("a/b"), project: "p".into() }, "");
    let row = Row::new(1, "ann", START, 1);
    {
        let store = open(&plan);
        store.write(&feature_rows(std::slice::from_ref(&row)), &never).unwrap();
        let error = open_online(&plan, runtime()).err().unwrap();
        assert!(error.to_string().contains("in use by another driftline process"), "{error}");
        assert!(!error.is_retriable());
    }
    assert_eq!(open(&plan).read(&row.key()).unwrap(), row.read());
}

#[test]
fn expiry_is_renewed_by_writes() {
    let redis = Redis::shared();
    let project = unique("ttl");
    let online =
        OnlinePlan::Redis { url: Secret(redis.url()), project: project.clone(), ttl: Some(Duration::from_secs(1000)) };
    let plan = plan("shop", online, "");
    let row = Row::new(1, "ann", START, 5);
    let key = Layout::new(&plan, &project).key(&row.key()).unwrap();
    let store = open(&plan);
    let ttl = || String::from_utf8(redis.command(&[b"PTTL", &key])).unwrap().parse::<i64>().unwrap();
    store.write(&feature_rows(std::slice::from_ref(&row)), &never).unwrap();
    assert!((990_000..=1_000_000).contains(&ttl()), "{}", ttl());
    redis.command(&[b"PEXPIRE", &key, b"5000"]);
    store.write(&feature_rows(&[Row::new(1, "ann", START, 4)]), &never).unwrap();
    assert!(ttl() <= 5000, "an older row renews nothing");
    store.write(&feature_rows(&[row]), &never).unwrap();
    assert!(ttl() > 990_000, "the same row again does");
}

#[test]
fn a_view_that_feast_wrote_later_is_left_alone() {
    let redis = Redis::shared();
    let project = unique("feast-newer");
    let plan = redis_plan(redis.url(), &project);
    let store = open(&plan);
    let key = Layout::new(&plan, &project).key(&Row::new(1, "ann", 0, 0).key()).unwrap();
    let (old, new) = (Row::new(1, "ann", START, 1), Row::new(1, "ann", START + 5000, 2));
    store.write(&feature_rows(std::slice::from_ref(&old)), &never).unwrap();
    // Feast writes the middle view as of one nanosecond after the newer row, and the first one as of long ago.
    let nanos = (START + 5000).rem_euclid(1000) * 1_000_000 + 1;
    let mut later = Vec::new();
    prost::encoding::int64::encode(1, &((START + 5000) / 1000), &mut later);
    prost::encoding::int64::encode(2, &nanos, &mut later);
    redis.command(&[b"HSET", &key, timestamp_field("visit").as_bytes(), &later]);
    redis.command(&[b"HSET", &key, timestamp_field("spend").as_bytes(), b"\x08\x01"]);
    store.write(&feature_rows(std::slice::from_ref(&new)), &never).unwrap();
    let read = store.read(&new.key()).unwrap();
    assert_eq!((&read[0], &read[2]), (&new.read()[0], &new.read()[2]));
    let (GroupRead::Found { values: kept, .. }, GroupRead::Found { values: before, .. }) =
        (&read[1].1, &old.read()[1].1)
    else {
        panic!("{read:?}")
    };
    assert_eq!(kept, before, "the view that Feast wrote later is as it was");
    // Neither a later view nor a damaged timestamp holds back a row that is newer still.
    redis.command(&[b"HSET", &key, timestamp_field("derived").as_bytes(), b"\xff\xff"]);
    let newest = Row::new(1, "ann", START + 60_000, 3);
    store.write(&feature_rows(std::slice::from_ref(&newest)), &never).unwrap();
    assert_eq!(store.read(&newest.key()).unwrap(), newest.read());
}

/// A `google.protobuf.Timestamp` some nanoseconds after an instant in milliseconds.
fn stamp(at: i64, nanos: i64) -> Vec<u8> {
    let nanos = i128::from(at) * 1_000_000 + i128::from(nanos);
    let (seconds, nanos) = (nanos.div_euclid(1_000_000_000), nanos.rem_euclid(1_000_000_000));
    let mut stamp = Vec::new();
    for (tag, number) in [(1, seconds), (2, nanos)].into_iter().filter(|(_, number)| *number != 0) {
        prost::encoding::int64::encode(tag, &i64::try_from(number).unwrap(), &mut stamp);
    }
    stamp
}

#[test]
fn what_feast_wrote_is_newer_from_one_nanosecond_on() {
    let redis = Redis::shared();
    let project = unique("nanosecond");
    let plan = redis_plan(redis.url(), &project);
    let store = open(&plan);
    // Seconds and nanoseconds of every length that a varint has.
    let seconds = [
        -62_135_596_800,
        -1,
        0,
        1,
        100,
        20_000,
        3_000_000,
        268_435_455,
        268_435_456,
        1_767_323_045,
        34_359_738_367,
        34_359_738_368,
    ];
    let instants = seconds.iter().flat_map(|s| [0, 1, 17, 134, 135, 268, 269, 999].map(|ms| s * 1000 + ms));
    let rows = instants.enumerate().map(|(i, at)| Row::new(i as i64, "ann", at, i as i64 + 1));
    let rows: Vec<Row> = rows.map(|row| Row { vip: Some(true), ..row }).collect();
    for (newer, nanos) in [(true, 1), (false, 0), (false, -1), (true, 1_000_000_000), (false, -1_000_000_000)] {
        for row in &rows {
            let key = Layout::new(&plan, &project).key(&row.key()).unwrap();
            redis.command(&[b"DEL", &key]);
            redis.command(&[b"HSET", &key, timestamp_field("visit").as_bytes(), &stamp(row.at, nanos)]);
        }
        store.write(&feature_rows(&rows), &never).unwrap();
        for row in &rows {
            let read = store.read(&row.key()).unwrap();
            let GroupRead::Found { values, .. } = &read[1].1 else { panic!("{read:?}") };
            let expected = row.read();
            let nothing = values.iter().all(|value| *value == Value::Null);
            assert!(if newer { nothing } else { read[1] == expected[1] }, "{} and {nanos} ns: {read:?}", row.at);
            assert_eq!((&read[0], &read[2]), (&expected[0], &expected[2]));
        }
    }
}

#[test]
fn a_row_of_more_values_than_luas_stack_holds_is_written() {
    const FEATURES: usize = 4500;
    let redis = Redis::shared();
    let project = unique("wide");
    let mut plan = redis_plan(redis.url(), &project);
    let names: Vec<String> = (0..FEATURES).map(|f| format!("visit_count_{f}s")).collect();
    plan.groups[1].features = names.iter().map(|name| (Function::Count, 0, column(name, DataType::Int64))).collect();
    plan.derived.clear();
    let store = open(&plan);
    let rows = |at: i64| {
        let narrow = feature_rows(&[Row::new(1, "ann", at, at), Row::new(2, "ann", at, at)]);
        let of = |name: &str| (name.to_owned(), narrow.batch.column_by_name(name).unwrap().clone());
        let kept = narrow.batch.schema().fields().iter().take(10).map(|f| of(f.name())).collect::<Vec<_>>();
        let wide = names.iter().enumerate().map(|(f, name)| -> (String, ArrayRef) {
            (name.clone(), Arc::new(Int64Array::from_iter_values([at + f as i64, at - f as i64])))
        });
        let batch = RecordBatch::try_from_iter(kept.into_iter().chain(wide)).unwrap();
        FeatureRows { batch, sequence: narrow.sequence }
    };
    let found = |shop: i64, at: i64| {
        let read = store.read(&Row::new(shop, "ann", at, at).key()).unwrap();
        let of = |f: usize| Value::Int64(at + if shop == 1 { f as i64 } else { -(f as i64) });
        read[1].1 == GroupRead::Found { event_time: at, values: (0..FEATURES).map(of).collect() }
    };
    for at in [START, START + 1] {
        store.write(&rows(at), &never).unwrap();
        assert!(found(1, at) && found(2, at));
    }
    // Around another view, which is left alone, it is written in parts, too.
    let key = Layout::new(&plan, &project).key(&Row::new(1, "ann", 0, 0).key()).unwrap();
    redis.command(&[b"HSET", &key, timestamp_field("spend").as_bytes(), &stamp(START + 3, 0)]);
    store.write(&rows(START + 2), &never).unwrap();
    assert!(found(1, START + 2) && found(2, START + 2));
}

#[test]
fn a_row_of_a_later_definition_wins_whatever_its_time_and_one_of_an_earlier_never() {
    let plan = redis_plan(Redis::shared().url(), &unique("epochs"));
    let stores: Vec<_> = (0..3).map(|epoch| open_online_at(&plan, epoch, runtime()).unwrap()).collect();
    let mut sequence = 0;
    // Epoch and event time of each write, and which of the writes is then the one that is read.
    for (write, (epoch, time, newest)) in
        [(0, 5, 0), (1, 3, 1), (0, 9, 1), (1, 2, 1), (1, 3, 4), (2, 1, 5), (1, 9, 5), (0, 9, 5), (2, 1, 8)]
            .iter()
            .enumerate()
    {
        sequence += 1;
        let row = |write: usize, time: i64| Row::new(1, "ann", START + time * 1000, i64::try_from(write).unwrap());
        let rows = FeatureRows { sequence: vec![sequence], ..feature_rows(&[row(write, *time)]) };
        stores[*epoch].write(&rows, &never).unwrap();
        let times = [5, 3, 9, 2, 3, 1, 9, 9, 1];
        let expected = row(*newest, times[*newest]);
        assert_eq!(stores[0].read(&expected.key()).unwrap(), expected.read(), "write {write}");
    }
}

#[test]
fn a_row_stays_in_redis_compact_encoding() {
    let redis = Redis::shared();
    let project = unique("compact");
    let plan = redis_plan(redis.url(), &project);
    let row = Row::new(1, "ann", START, 5);
    open(&plan).write(&feature_rows(std::slice::from_ref(&row)), &never).unwrap();
    let key = Layout::new(&plan, &project).key(&row.key()).unwrap();
    assert_eq!(redis.command(&[b"OBJECT", b"ENCODING", &key]), b"listpack");
}

#[test]
fn rows_survive_a_redis_that_is_killed_and_forgets_its_functions() {
    let redis = Redis::start();
    let plan = redis_plan(redis.url(), "chaos");
    let store = open(&plan);
    let written = AtomicUsize::new(0);
    let batch = |i: usize| -> Vec<Row> { (0..100).map(|c| Row::new(c, "ann", START + i as i64, i as i64)).collect() };
    const BATCHES: usize = 400;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for i in 0..BATCHES {
                store.write(&feature_rows(&batch(i)), &never).unwrap();
                written.store(i + 1, Ordering::SeqCst);
            }
        });
        let reached = |n: usize| written.load(Ordering::SeqCst) >= n;
        until("some batches are written", Duration::from_secs(60), || reached(20));
        redis.kill();
        let at_kill = written.load(Ordering::SeqCst);
        assert!(at_kill < BATCHES - 50, "the test is meaningless: {at_kill} batches were written before the kill");
        redis.restart();
        until("writes go on after the restart", Duration::from_secs(60), || reached(at_kill + 10));
        redis.command(&[b"FUNCTION", b"FLUSH"]);
        let at_flush = written.load(Ordering::SeqCst);
        until("writes go on without the function", Duration::from_secs(60), || reached((at_flush + 10).min(BATCHES)));
        writer.join().unwrap();
    });
    for row in batch(BATCHES - 1) {
        assert_eq!(store.read(&row.key()).unwrap(), row.read());
    }
}

#[test]
fn a_redis_that_is_away_is_named_and_waiting_ends_when_told() {
    let redis = Redis::start();
    let plan = redis_plan(redis.url(), "away");
    let store = open(&plan);
    store.ping().unwrap();
    redis.kill();
    let asked = AtomicUsize::new(0);
    let rows = feature_rows(&[Row::new(1, "ann", START, 1)]);
    let error = store.write(&rows, &|| asked.fetch_add(1, Ordering::SeqCst) >= 5).unwrap_err();
    assert!(error.is_retriable());
    let text = error.to_string();
    assert!(text.contains(&redis.address()) && text.contains("[online] redis"), "{text}");
    assert!(store.ping().is_err());
    assert!(store.read(&[Value::Int64(1), Value::String("ann".into())]).is_err());

    // It comes back while a write waits: nobody has to try again by hand.
    let gone_on = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            store.write(&rows, &never).unwrap();
            gone_on.store(true, Ordering::SeqCst);
        });
        redis.restart();
        until("the waiting write is done", Duration::from_secs(60), || gone_on.load(Ordering::SeqCst));
    });
}

#[test]
fn a_redis_that_was_never_there_is_named_at_the_first_ping() {
    let redis = Redis::start();
    redis.kill();
    let started = clock::monotonic();
    let error = open(&redis_plan(redis.url(), "never")).ping().unwrap_err();
    assert!(error.to_string().contains("refused"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn users_without_functions_get_a_script_and_wrong_passwords_a_plain_answer() {
    let redis = Redis::start();
    redis.command(&[b"ACL", b"SETUSER", b"scripts", b"on", b">secret", b"~*", b"+@all", b"-fcall", b"-function"]);
    redis.command(&[b"ACL", b"SETUSER", b"reader", b"on", b">secret", b"~*", b"+@read", b"+ping", b"+hello", b"+info"]);
    let url = |user: &str, password: &str| format!("redis://{user}:{password}@{}?protocol=3", redis.address());

    let store = open(&redis_plan(url("scripts", "secret"), "acl"));
    let rows: Vec<Row> = (0..600).map(|i| Row::new(i, "ann", START + i, i)).collect();
    store.write(&feature_rows(&rows), &never).unwrap();
    redis.command(&[b"SCRIPT", b"FLUSH"]);
    let newer: Vec<Row> = (0..600).map(|i| Row::new(i, "ann", START + 1000 + i, i)).collect();
    store.write(&feature_rows(&newer), &never).unwrap();
    store.write(&feature_rows(&rows), &never).unwrap();
    for row in &newer {
        assert_eq!(store.read(&row.key()).unwrap(), row.read());
    }

    let error = open(&redis_plan(url("reader", "secret"), "acl")).write(&feature_rows(&rows), &never).unwrap_err();
    assert!(!error.is_retriable() && error.to_string().contains("the user needs"), "{error}");

    let store = open(&redis_plan(url("scripts", "wrong"), "acl"));
    for error in [store.ping().unwrap_err(), store.write(&feature_rows(&rows), &never).unwrap_err()] {
        let text = error.to_string();
        assert!(!error.is_retriable() && text.contains("password in [online] redis"), "{text}");
        assert!(!text.contains("wrong"), "{text}");
    }
}

#[test]
fn child_writes_over_tls() {
    let (Some(_), Ok(url)) = (child_folder(), std::env::var("DRIFTLINE_TEST_REDIS")) else { return };
    let store = open(&redis_plan(url, "tls"));
    let row = Row::new(1, "ann", START, 1);
    if std::env::var_os("DRIFTLINE_TEST_STRANGER").is_none() {
        store.ping().unwrap();
        store.write(&feature_rows(std::slice::from_ref(&row)), &never).unwrap();
        assert_eq!(store.read(&row.key()).unwrap(), row.read());
    } else {
        let error = store.ping().unwrap_err().to_string();
        assert!(error.contains("certificate"), "{error}");
    }
}

#[test]
fn tls_is_spoken_and_certificates_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (certificate, key) = (path("certificate.pem"), path("key.pem"));
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-keyout", &key, "-out", &certificate])
        .output()
        .expect("openssl can be started");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let arguments = ["--tls-port", &port, "--tls-auth-clients", "no", "--tls-cert-file", &certificate]
        .into_iter()
        .chain(["--tls-key-file", &key, "--tls-ca-cert-file", &certificate, "--requirepass", "secret"]);
    let redis = Redis::start_with(arguments);
    let url = format!("rediss://:secret@127.0.0.1:{port}");
    let trusting = [("DRIFTLINE_TEST_REDIS", url.as_str()), ("SSL_CERT_FILE", &certificate)];
    assert!(in_child("online::child_writes_over_tls", folder.path(), &trusting));
    let stranger = [("DRIFTLINE_TEST_REDIS", url.as_str()), ("DRIFTLINE_TEST_STRANGER", "1")];
    assert!(in_child("online::child_writes_over_tls", folder.path(), &stranger));
    drop(redis);
}

#[test]
fn a_cluster_is_written_and_read() {
    let redis = Redis::start_with(["--cluster-enabled", "yes", "--cluster-announce-ip", "127.0.0.1"]);
    assert_eq!(redis.command(&[b"CLUSTER", b"ADDSLOTSRANGE", b"0", b"16383"]), b"OK");
    until("the cluster is up", Duration::from_secs(60), || {
        redis.command(&[b"CLUSTER", b"INFO"]).starts_with(b"cluster_state:ok")
    });
    let store = open(&redis_plan(format!("redis-cluster://{}", redis.address()), "cluster"));
    let rows: Vec<Row> = (0..1000).map(|i| Row::new(i, "ann", START + i, i)).collect();
    store.write(&feature_rows(&rows), &never).unwrap();
    redis.command(&[b"FUNCTION", b"FLUSH"]);
    let newer: Vec<Row> = (0..1000).map(|i| Row::new(i, "ann", START + 1000 + i, i)).collect();
    store.write(&feature_rows(&newer), &never).unwrap();
    for row in newer.iter().step_by(97) {
        assert_eq!(store.read(&row.key()).unwrap(), row.read());
    }
}

#[test]
fn a_lookup_says_what_absence_means() {
    let redis = Redis::shared();
    let plan = redis_plan(redis.url(), &unique("lookup"));
    let store = open(&plan);
    let mut row = Row::new(7, "ann", START, 1);
    row.mean = None;
    row.count = Some(3);
    row.city = Some("Bern".into());
    (row.seen, row.vip) = (Some(1000), Some(true));
    store.write(&feature_rows(std::slice::from_ref(&row)), &never).unwrap();

    let key = key_from_text(&plan.entity, &["7".into(), "ann".into()]).unwrap();
    let fresh = lookup(&plan, &*store, &key, START + 90_000).unwrap();
    let statuses: Vec<_> = fresh.groups.iter().map(|g| (g.group.as_str(), g.status)).collect();
    assert_eq!(statuses, [("spend", Status::Present), ("visit", Status::Present), ("derived", Status::NullValue)]);
    assert_eq!(fresh.groups[0].features[1].status, Status::NullValue);
    assert_eq!(
        fresh.to_string(),
        "\
customer shop=7 customer_id=ann

spend  PRESENT  as of 2026-01-02T03:04:05.123Z (1m 30s ago)
  spend_count_1h                             3
  spend_mean_1d                              –  NULL_VALUE

visit  PRESENT  as of 2026-01-02T03:04:05.123Z (1m 30s ago)
  city_last_lifetime                      Bern
  seen_last_lifetime      1970-01-01T00:00:01Z
  vip_last_lifetime                       true
  counts_last_3_lifetime                    []
  means_last_3_lifetime                     []
  cities_last_3_lifetime                    []
  seens_last_3_lifetime                     []
  vips_last_3_lifetime                      []

derived  NULL_VALUE  as of 2026-01-02T03:04:05.123Z (1m 30s ago)
  ratio                                      –
"
    );
    assert_eq!(
        serde_json::to_string(&fresh).unwrap(),
        r#"{"entity":"customer","key":{"shop":7,"customer_id":"ann"},"groups":{"spend":{"status":"PRESENT","event_time":"2026-01-02T03:04:05.123Z","age_seconds":90.0,"features":{"spend_count_1h":{"value":3,"status":"PRESENT"},"spend_mean_1d":{"value":null,"status":"NULL_VALUE"}}},"visit":{"status":"PRESENT","event_time":"2026-01-02T03:04:05.123Z","age_seconds":90.0,"features":{"city_last_lifetime":{"value":"Bern","status":"PRESENT"},"seen_last_lifetime":{"value":"1970-01-01T00:00:01Z","status":"PRESENT"},"vip_last_lifetime":{"value":true,"status":"PRESENT"},"counts_last_3_lifetime":{"value":[],"status":"PRESENT"},"means_last_3_lifetime":{"value":[],"status":"PRESENT"},"cities_last_3_lifetime":{"value":[],"status":"PRESENT"},"seens_last_3_lifetime":{"value":[],"status":"PRESENT"},"vips_last_3_lifetime":{"value":[],"status":"PRESENT"}}},"derived":{"status":"NULL_VALUE","event_time":"2026-01-02T03:04:05.123Z","age_seconds":90.0,"features":{"ratio":{"value":null,"status":"NULL_VALUE"}}}}}"#
    );

    // The longest window of `spend` is a day; `visit` is for ever, and so is what derives from it.
    let stale = lookup(&plan, &*store, &key, START + 86_400_000).unwrap();
    let statuses: Vec<_> = stale.groups.iter().map(|g| g.status).collect();
    assert_eq!(statuses, [Status::OutsideMaxAge, Status::Present, Status::NullValue]);

    let unknown = lookup(&plan, &*store, &[Value::Int64(8), Value::String("ann".into())], START).unwrap();
    assert!(unknown.groups.iter().all(|g| g.status == Status::NotFound && g.event_time.is_none()));

    assert!(key_from_text(&plan.entity, &["x".into(), "ann".into()]).unwrap_err().to_string().contains("integer"));
    assert!(key_from_text(&plan.entity, &["7".into()]).unwrap_err().to_string().contains("shop, customer_id"));
}

/// What Feast answered, by feature: one value and one event time (milliseconds) an entity.
type Answer = HashMap<String, Vec<serde_json::Value>>;

#[test]
fn feasts_own_sdk_reads_and_writes_the_same_rows() {
    let redis = Redis::shared();
    let project = unique("sdk").replace('-', "_");
    let mut plan = redis_plan(redis.url(), &project);
    plan.score = Some(ScorePlan {
        on: 0,
        model: "churn".into(),
        alias: "production".into(),
        features: vec!["spend_mean_1d".into(), "ratio".into()],
        batch_rows: 1,
        batch_bytes: 1,
        batch_wait: Duration::ZERO,
        poll_alias: Duration::ZERO,
        delivery: driftline::config::plan::Delivery::ExactlyOnce,
        emit: driftline::config::plan::Emit::Arrival,
        topic: "churn.predictions".into(),
        providers: Vec::new(),
        threads: 1,
    });
    let store = open(&plan);
    let rows: Vec<Row> = (0..40).map(|i| Row::new(i % 3, &format!("ç{i}"), START + i * 61_001, i)).collect();
    store.write(&feature_rows(&rows), &never).unwrap();

    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("definitions.py"), python_repository(&plan)).unwrap();
    let entities: Vec<_> =
        rows.iter().map(|r| serde_json::json!({ "shop": r.shop, "customer_id": r.customer })).collect();
    let pushed_at = START + 10_000_000;
    let question = serde_json::json!({
        "entities": entities,
        // Feast itself then writes one view: newer than ours for the first entity, older for the second.
        "push": {
            "view": "spend",
            "rows": [
                { "shop": rows[0].shop, "customer_id": rows[0].customer, "event_time": pushed_at, "spend_count_1h": 77, "spend_mean_1d": 7.5 },
                { "shop": rows[1].shop, "customer_id": rows[1].customer, "event_time": START - 1000, "spend_count_1h": 66, "spend_mean_1d": 6.5 },
            ],
        },
    });
    let script = "tests/it/stores/feast_read.py";
    let output = run_python(&[&script, &folder.path(), &redis.address(), &project, &question.to_string()]);
    let answer: Answer = serde_json::from_str(&output).unwrap();
    let expected = |value: fn(&Row) -> serde_json::Value| rows.iter().map(value).collect::<Vec<_>>();
    assert_eq!(answer["spend_count_1h"], expected(|r| r.count.into()));
    assert_eq!(answer["spend_mean_1d"], expected(|r| r.mean.into()));
    assert_eq!(answer["city_last_lifetime"], expected(|r| r.city.clone().into()));
    assert_eq!(answer["seen_last_lifetime"], expected(|r| r.seen.into()));
    assert_eq!(answer["vip_last_lifetime"], expected(|r| r.vip.into()));
    assert_eq!(answer["ratio"], expected(|r| r.ratio().into()));
    assert_eq!(answer["counts_last_3_lifetime"], expected(|r| r.listed().into()));
    assert_eq!(answer["means_last_3_lifetime"], expected(|r| r.listed().iter().map(|n| *n as f64 / 8.0).collect()));
    assert_eq!(answer["cities_last_3_lifetime"], expected(|r| r.listed().iter().map(|n| format!("ü{n}")).collect()));
    assert_eq!(answer["seens_last_3_lifetime"], expected(|r| r.listed().iter().map(|n| n * 1000).collect()));
    assert_eq!(answer["vips_last_3_lifetime"], expected(|r| r.listed().iter().map(|n| n % 2 == 0).collect()));
    assert_eq!(answer["event_time"], expected(|r| r.at.into()));
    assert_eq!(answer["service"], ["ratio", "spend_mean_1d"].map(serde_json::Value::from));

    let read = store.read(&rows[0].key()).unwrap();
    let pushed = GroupRead::Found { event_time: pushed_at, values: vec![Value::Int64(77), Value::Float64(7.5)] };
    assert_eq!(read[0].1, pushed, "driftline reads what Feast wrote");
    assert_eq!(store.read(&rows[1].key()).unwrap(), rows[1].read(), "Feast wrote nothing over a newer row");
    let between = Row::new(rows[0].shop, &rows[0].customer, pushed_at - 1, 1000);
    store.write(&feature_rows(std::slice::from_ref(&between)), &never).unwrap();
    let read = store.read(&between.key()).unwrap();
    assert_eq!(read[0].1, pushed, "driftline writes nothing over a newer row of Feast's");
    assert_eq!(read[1..], between.read()[1..]);
}
