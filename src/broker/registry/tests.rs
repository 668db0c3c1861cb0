use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode as Status};
use axum::response::IntoResponse;
use axum::routing::get;
use rstest::rstest;
use tokio::runtime::Runtime;

use super::*;

/// A registry in this process that knows the schemas it is told.
pub(crate) struct StubRegistry {
    runtime: Runtime,
    state: Arc<Stub>,
    url: String,
}

#[derive(Default)]
struct Stub {
    schemas: Mutex<BTreeMap<u32, Value>>,
    /// From which question for an id on a schema is there.
    later: Mutex<BTreeMap<u32, u64>>,
    asked: AtomicU64,
    away: Mutex<bool>,
}

impl StubRegistry {
    pub(crate) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let state = Arc::new(Stub::default());
        let app = Router::new()
            .route("/api/schemas/ids/{id}", get(by_id))
            .route("/api/subjects/{subject}/versions/{version}", get(version))
            .route("/secret/schemas/ids/{id}", get(secret))
            .with_state(state.clone());
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}/api", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, app).await });
        Self { runtime, state, url }
    }

    pub(crate) fn client(&self) -> Arc<SchemaRegistry> {
        Arc::new(SchemaRegistry::new(&self.url, self.runtime.handle().clone()).unwrap())
    }

    pub(crate) fn put(&self, id: u32, schema: &str) {
        self.put_answer(id, json!({ "schema": schema }));
    }

    /// A schema that is there from the `question`th question for an id on, whatever the id.
    pub(crate) fn put_later(&self, id: u32, schema: &str, question: u64) {
        self.state.later.lock().insert(id, question);
        self.put(id, schema);
    }

    pub(crate) fn put_answer(&self, id: u32, answer: Value) {
        self.state.schemas.lock().insert(id, answer);
    }

    pub(crate) fn set_away(&self, away: bool) {
        *self.state.away.lock() = away;
    }

    pub(crate) fn asked(&self) -> u64 {
        self.state.asked.load(Ordering::Relaxed)
    }
}

async fn by_id(State(stub): State<Arc<Stub>>, Path(id): Path<u32>) -> axum::response::Response {
    let question = stub.asked.fetch_add(1, Ordering::Relaxed) + 1;
    if *stub.away.lock() {
        return (Status::SERVICE_UNAVAILABLE, "restarting").into_response();
    }
    let there = stub.later.lock().get(&id).is_none_or(|from| question >= *from);
    match stub.schemas.lock().get(&id).filter(|_| there) {
        Some(answer) => answer.to_string().into_response(),
        None => {
            (Status::NOT_FOUND, json!({"error_code": 40403, "message": "no such schema"}).to_string()).into_response()
        }
    }
}

async fn version(
    State(stub): State<Arc<Stub>>,
    Path((subject, version)): Path<(String, String)>,
) -> axum::response::Response {
    let found = stub.schemas.lock().values().find(|answer| answer["subject"] == *subject).cloned();
    match found {
        Some(answer) if version == "latest" || answer["version"].as_u64() == version.parse().ok() => {
            answer.to_string().into_response()
        }
        _ => {
            (Status::NOT_FOUND, json!({"error_code": 40401, "message": "no such subject"}).to_string()).into_response()
        }
    }
}

async fn secret(headers: HeaderMap) -> axum::response::Response {
    // user:p@ss
    match headers.get("authorization").is_some_and(|value| value == "Basic dXNlcjpwQHNz") {
        true => json!({"schema": "\"string\""}).to_string().into_response(),
        false => Status::UNAUTHORIZED.into_response(),
    }
}

#[test]
fn asks_once_for_an_id() {
    let stub = StubRegistry::start();
    stub.put(7, r#""string""#);
    let client = stub.client();
    for _ in 0..3 {
        let schema = client.schema_by_id(7).unwrap().unwrap();
        assert_eq!((schema.id, &*schema.schema_type, &*schema.schema), (7, "AVRO", "\"string\""));
        assert_eq!(client.schema_by_id(8).unwrap(), None);
    }
    assert_eq!(stub.asked(), 2);
}

/// Longer than any test runs: what waits for it in vain hangs instead of passing.
const FOR_EVER: Duration = Duration::from_secs(3600);

#[test]
fn waits_for_a_schema_that_is_registered_meanwhile() {
    let stub = StubRegistry::start();
    stub.put_later(7, r#""string""#, 4);
    let client = stub.client();
    assert_eq!(client.schema_by_id(7).unwrap(), None);
    assert_eq!(client.schema_by_id_within(7, FOR_EVER).unwrap().unwrap().schema, "\"string\"");
    assert!(client.schema_by_id(7).unwrap().is_some());
    assert_eq!(stub.asked(), 4, "what is known needs no further question");
}

#[test]
fn waits_in_vain_once_whatever_the_ids() {
    let stub = StubRegistry::start();
    let client = stub.client();
    assert_eq!(client.schema_by_id_within(8, Duration::from_millis(100)).unwrap(), None);
    let asked = stub.asked();
    assert!(asked > 1);
    for id in [8, 9, 10] {
        assert_eq!(client.schema_by_id_within(id, FOR_EVER).unwrap(), None);
    }
    assert_eq!(stub.asked(), asked + 2, "a new id is asked for once");
    stub.set_away(true);
    assert!(client.schema_by_id_within(11, FOR_EVER).unwrap_err().is_retriable());
}

#[test]
fn an_absent_registry_is_no_answer_about_the_id() {
    let stub = StubRegistry::start();
    stub.put(7, r#""string""#);
    stub.set_away(true);
    let client = stub.client();
    let error = client.schema_by_id(7).unwrap_err();
    assert!(error.is_retriable());
    assert!(error.to_string().contains("503"), "{error}");
    stub.set_away(false);
    assert!(client.schema_by_id(7).unwrap().is_some());
    stub.set_away(true);
    assert!(client.schema_by_id(7).unwrap().is_some(), "what is known needs no registry");
}

#[test]
fn says_where_nobody_listens() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    // Port 9 (discard) is reserved, and nothing listens there.
    let client = SchemaRegistry::new("http://127.0.0.1:9", runtime.handle().clone()).unwrap();
    let error = client.schema_by_id(1).unwrap_err().to_string();
    assert!(error.contains("http://127.0.0.1:9") && error.contains("check [broker] schema_registry"), "{error}");
}

#[test]
fn a_wrong_path_is_not_an_unknown_id() {
    let stub = StubRegistry::start();
    let wrong = stub.url.replace("/api", "/elsewhere");
    let client = SchemaRegistry::new(&wrong, stub.runtime.handle().clone()).unwrap();
    let error = client.schema_by_id(1).unwrap_err().to_string();
    assert!(error.contains("check the path"), "{error}");
}

#[test]
fn logs_in_and_keeps_the_password_to_itself() {
    let stub = StubRegistry::start();
    let address = |login: &str| stub.url.replace("http://", &format!("http://{login}@")).replace("/api", "/secret");
    let client = SchemaRegistry::new(&address("user:p%40ss"), stub.runtime.handle().clone()).unwrap();
    assert!(client.schema_by_id(1).unwrap().is_some());
    assert!(!client.url().contains("p@ss") && !client.url().contains("p%40ss"));

    let client = SchemaRegistry::new(&address("user:wrong"), stub.runtime.handle().clone()).unwrap();
    let error = client.schema_by_id(1).unwrap_err().to_string();
    assert!(error.contains("refuses the login") && !error.contains("wrong"), "{error}");
}

#[test]
fn fetches_what_a_schema_refers_to() {
    let stub = StubRegistry::start();
    stub.put_answer(1, json!({"subject": "country", "version": 1, "id": 1, "schema": "\"country\""}));
    stub.put_answer(
        2,
        json!({"subject": "address", "version": 3, "id": 2, "schema": "\"address\"",
               "references": [{"name": "x", "subject": "country", "version": 1}]}),
    );
    stub.put_answer(
        3,
        json!({"schema": "\"customer\"", "references": [{"name": "a", "subject": "address", "version": 3},
               {"name": "c", "subject": "country", "version": 1}]}),
    );
    let schema = stub.client().schema_by_id(3).unwrap().unwrap();
    assert_eq!(schema.references, ["\"country\"", "\"address\""]);
    let latest = stub.client().latest("address").unwrap().unwrap();
    assert_eq!((latest.version, latest.schema.id), (3, 2));
    assert_eq!(stub.client().latest("nobody").unwrap(), None);
}

#[rstest]
#[case("localhost:8081")]
#[case("ftp://user:secret@host")]
#[case("user:secret@")]
fn refuses_what_is_no_address(#[case] url: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let error = SchemaRegistry::new(url, runtime.handle().clone()).unwrap_err().to_string();
    assert!(error.contains("http://") && !error.contains("secret"), "{error}");
}
