//! Client of a schema registry that speaks Confluent's REST protocol (Confluent, Apicurio's `/apis/ccompat/v7`, Redpanda,
//! Karapace).

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reqwest::{Method, StatusCode};
use rustc_hash::FxHashMap;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::runtime::Handle;
use url::Url;

use super::BrokerError;
use crate::runtime::clock;

/// An id that the registry did not know is not asked for again for this long.
const MISSING_FOR: Duration = Duration::from_secs(10);
/// After waiting for an id in vain, no id is waited for in this time: foreign records must not hold up the good ones.
const WAIT_EVERY: Duration = Duration::from_secs(30);
/// First and longest pause between two questions for an id that is waited for.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(800));
/// Unknown ids remembered at most.
const MISSING_AT_MOST: usize = 10_000;
/// References may lead to schemas with references, this deep.
const DEEPEST_REFERENCE: usize = 16;
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
const MEDIA_TYPE: &str = "application/vnd.schemaregistry.v1+json";

/// A schema as the registry holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegisteredSchema {
    /// Its id, the same in every subject that has it.
    pub id: u32,
    /// `AVRO`, `JSON` or `PROTOBUF`.
    pub schema_type: String,
    /// Its text.
    pub schema: String,
    /// Texts of the schemas that it refers to, directly or through others, each after those that it needs itself.
    pub references: Vec<String>,
}

/// The newest version of a subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubjectVersion {
    /// Version within the subject, from 1.
    pub version: u32,
    /// The schema.
    pub schema: Arc<RegisteredSchema>,
}

/// Whether a schema may become the next version of a subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compatibility {
    /// True if the subject's rule allows it, or the subject does not exist yet.
    pub compatible: bool,
    /// What stands against it, in the registry's words. Some registries give none.
    pub messages: Vec<String>,
}

/// The client. Caches what cannot change: the schema of an id, and the id of a registered schema.
///
/// Calls block, and so must not come from a task of the runtime that `new` was given; that runtime has threads of its own.
#[derive(Debug)]
pub struct SchemaRegistry {
    base: Url,
    /// The address without user and password, for messages.
    url: String,
    login: Option<(String, String)>,
    client: reqwest::Client,
    runtime: Handle,
    schemas: Mutex<FxHashMap<u32, Arc<RegisteredSchema>>>,
    missing: Mutex<FxHashMap<u32, Instant>>,
    /// Until then no id is waited for.
    no_waiting: Mutex<Option<Instant>>,
    registered: Mutex<FxHashMap<(String, String), u32>>,
}

/// What `GET /schemas/ids/{id}` and `GET /subjects/…` answer.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SchemaAnswer {
    schema: String,
    schema_type: Option<String>,
    id: Option<u32>,
    version: Option<u32>,
    #[serde(default)]
    references: Vec<Reference>,
}

#[derive(Deserialize)]
struct Reference {
    subject: String,
    version: u32,
}

#[derive(Deserialize)]
struct Fault {
    error_code: u32,
    message: Option<String>,
}

impl SchemaRegistry {
    /// A client for the registry at `url`, which may hold a user and a password (`https://user:password@host`). Asks
    /// nothing yet.
    ///
    /// # Errors
    /// The address cannot be understood.
    pub fn new(url: &str, runtime: Handle) -> Result<Self, BrokerError> {
        let fault = |reason: String| BrokerError::Registry { url: without_login(url), reason };
        let mut base =
            Url::parse(url).map_err(|error| fault(format!("not an address: {error}; write http://host:8081")))?;
        if !matches!(base.scheme(), "http" | "https") {
            return Err(fault("the address must start with http:// or https://".into()));
        }
        let login = (!base.username().is_empty()).then(|| {
            let decode = |text: &str| percent_decode(text);
            (decode(base.username()), decode(base.password().unwrap_or_default()))
        });
        // Neither fails for http and https addresses, which have a host.
        let _ = base.set_username("");
        let _ = base.set_password(None);
        if !base.path().ends_with('/') {
            base.set_path(&format!("{}/", base.path()));
        }
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT_WITHIN)
            .timeout(ANSWER_WITHIN)
            .build()
            .map_err(|error| fault(format!("the HTTP client cannot start: {error}")))?;
        let url = base.as_str().trim_end_matches('/').to_owned();
        Ok(Self {
            base,
            url,
            login,
            client,
            runtime,
            schemas: Mutex::default(),
            missing: Mutex::default(),
            no_waiting: Mutex::default(),
            registered: Mutex::default(),
        })
    }

    /// The address without user and password.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The schema with this id, or `None` where the registry does not have it. Known ones are asked for once, unknown ones
    /// again after ten seconds.
    ///
    /// # Errors
    /// The registry does not answer, or not as one. Retriable.
    pub fn schema_by_id(&self, id: u32) -> Result<Option<Arc<RegisteredSchema>>, BrokerError> {
        if let Some(known) = self.schemas.lock().get(&id) {
            return Ok(Some(known.clone()));
        }
        let now = clock::monotonic();
        if self.missing.lock().get(&id).is_some_and(|until| now < *until) {
            return Ok(None);
        }
        let found = self.ask(id)?;
        if found.is_none() {
            let mut missing = self.missing.lock();
            if missing.len() >= MISSING_AT_MOST {
                missing.retain(|_, until| now < *until);
            }
            if missing.len() < MISSING_AT_MOST {
                missing.insert(id, now + MISSING_FOR);
            }
        }
        Ok(found)
    }

    /// As [`SchemaRegistry::schema_by_id`], but an id that the registry does not know is asked for again and again for as
    /// long as `patience`: its schema may be on the way (registered a moment after the record was written, or on another
    /// node of the registry). Waits in vain at most once in half a minute, whatever the ids.
    ///
    /// # Errors
    /// The registry does not answer, or not as one. Retriable.
    pub fn schema_by_id_within(
        &self,
        id: u32,
        patience: Duration,
    ) -> Result<Option<Arc<RegisteredSchema>>, BrokerError> {
        if let Some(found) = self.schema_by_id(id)? {
            return Ok(Some(found));
        }
        let started = clock::monotonic();
        if self.no_waiting.lock().is_some_and(|until| started < until) {
            return Ok(None);
        }
        let mut pause = PAUSES.0;
        while clock::monotonic().duration_since(started) < patience {
            if let Some(found) = self.ask(id)? {
                return Ok(Some(found));
            }
            thread::park_timeout(pause);
            pause = (pause * 2).min(PAUSES.1);
        }
        *self.no_waiting.lock() = Some(clock::monotonic() + WAIT_EVERY);
        Ok(None)
    }

    /// Asks the registry, whatever is remembered of an unknown id.
    fn ask(&self, id: u32) -> Result<Option<Arc<RegisteredSchema>>, BrokerError> {
        let Some(answer) = self.get::<SchemaAnswer>(&["schemas", "ids", &id.to_string()])? else { return Ok(None) };
        let schema = self.complete(id, answer)?;
        self.missing.lock().remove(&id);
        self.schemas.lock().insert(id, schema.clone());
        Ok(Some(schema))
    }

    /// The newest version of a subject, or `None` where there is none. By default the subject of a topic's values is
    /// `<topic>-value`.
    ///
    /// # Errors
    /// The registry does not answer, or not as one. Retriable.
    pub fn latest(&self, subject: &str) -> Result<Option<SubjectVersion>, BrokerError> {
        let Some(answer) = self.get::<SchemaAnswer>(&["subjects", subject, "versions", "latest"])? else {
            return Ok(None);
        };
        let (Some(id), Some(version)) = (answer.id, answer.version) else {
            return Err(self.fault(format!("its answer about subject '{subject}' lacks the id or the version")));
        };
        Ok(Some(SubjectVersion { version, schema: self.complete(id, answer)? }))
    }

    /// Makes an Avro schema the newest version of a subject, unless it has it already, and returns its id.
    ///
    /// # Errors
    /// The registry does not answer, or refuses: the schema is invalid, not compatible, or the login may not write.
    pub fn register(&self, subject: &str, schema: &str) -> Result<u32, BrokerError> {
        #[derive(Deserialize)]
        struct Registered {
            id: u32,
        }
        let key = (subject.to_owned(), schema.to_owned());
        if let Some(id) = self.registered.lock().get(&key) {
            return Ok(*id);
        }
        let body = json!({ "schema": schema, "schemaType": "AVRO" });
        let answer = self.send::<Registered>(Method::POST, &["subjects", subject, "versions"], &[], Some(&body))?;
        let Some(Registered { id }) = answer else {
            return Err(self.fault(format!("it does not take schemas for subject '{subject}' (404)")));
        };
        self.registered.lock().insert(key, id);
        Ok(id)
    }

    /// Whether an Avro schema may become the next version of a subject, by the subject's compatibility rule.
    ///
    /// # Errors
    /// The registry does not answer, or not as one.
    pub fn is_compatible(&self, subject: &str, schema: &str) -> Result<Compatibility, BrokerError> {
        #[derive(Deserialize)]
        struct Answer {
            is_compatible: bool,
            #[serde(default)]
            messages: Vec<String>,
        }
        let body = json!({ "schema": schema, "schemaType": "AVRO" });
        let path = ["compatibility", "subjects", subject, "versions", "latest"];
        let answer = self.send::<Answer>(Method::POST, &path, &[("verbose", "true")], Some(&body))?;
        Ok(answer.map_or(Compatibility { compatible: true, messages: Vec::new() }, |answer| Compatibility {
            compatible: answer.is_compatible,
            messages: answer.messages,
        }))
    }

    /// Fetches what a schema refers to.
    fn complete(&self, id: u32, answer: SchemaAnswer) -> Result<Arc<RegisteredSchema>, BrokerError> {
        let mut references = Vec::new();
        self.collect(&answer.references, 0, &mut references)?;
        Ok(Arc::new(RegisteredSchema {
            id,
            schema_type: answer.schema_type.unwrap_or_else(|| "AVRO".into()),
            schema: answer.schema,
            references,
        }))
    }

    fn collect(&self, wanted: &[Reference], depth: usize, found: &mut Vec<String>) -> Result<(), BrokerError> {
        if depth > DEEPEST_REFERENCE {
            return Err(self.fault("its schemas refer to one another without end"));
        }
        for Reference { subject, version } in wanted {
            let version = version.to_string();
            let Some(answer) = self.get::<SchemaAnswer>(&["subjects", subject, "versions", &version])? else {
                return Err(
                    self.fault(format!("version {version} of subject '{subject}', which a schema refers to, is gone"))
                );
            };
            self.collect(&answer.references, depth + 1, found)?;
            if !found.contains(&answer.schema) {
                found.push(answer.schema);
            }
        }
        Ok(())
    }

    fn get<T: for<'de> Deserialize<'de>>(&self, path: &[&str]) -> Result<Option<T>, BrokerError> {
        self.send(Method::GET, path, &[], None)
    }

    /// The answer, or `None` where the registry says that there is no such thing.
    fn send<T: for<'de> Deserialize<'de>>(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<Option<T>, BrokerError> {
        let mut url = self.base.clone();
        url.path_segments_mut()
            .map_err(|()| self.fault("not an address that can have a path"))?
            .pop_if_empty()
            .extend(path);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let mut request = self.client.request(method, url).header("accept", format!("{MEDIA_TYPE}, application/json"));
        if let Some((user, password)) = &self.login {
            request = request.basic_auth(user, Some(password));
        }
        if let Some(body) = body {
            request = request.header("content-type", MEDIA_TYPE).body(body.to_string());
        }
        let answer = self.runtime.block_on(async {
            let response = request.send().await?;
            Ok::<_, reqwest::Error>((response.status(), response.bytes().await?))
        });
        let (status, bytes) = answer.map_err(|error| {
            self.fault(format!(
                "no answer ({}); check [broker] schema_registry, that the server runs, and that this host may reach it",
                innermost(&error)
            ))
        })?;
        if status.is_success() {
            return serde_json::from_slice(&bytes).map(Some).map_err(|error| {
                self.fault(format!(
                    "its answer is not a schema registry's ({error}); check the path of [broker] schema_registry (Apicurio's is /apis/ccompat/v7)"
                ))
            });
        }
        let fault: Option<Fault> = serde_json::from_slice(&bytes).ok();
        match (status, fault) {
            // Codes 404xx say that a subject, version or schema is missing; a bare 404 that the path is wrong.
            (StatusCode::NOT_FOUND, Some(fault)) if fault.error_code >= 40_400 => Ok(None),
            (StatusCode::NOT_FOUND, _) => Err(self.fault(
                "it answers 404 Not Found, but not as a schema registry does; check the path of [broker] schema_registry (Apicurio's is /apis/ccompat/v7)",
            )),
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => Err(self.fault(format!(
                "it refuses the login ({status}); write user and password into the address: https://user:password@host"
            ))),
            (status, fault) => {
                let said = fault.and_then(|fault| fault.message).unwrap_or_default();
                Err(self.fault(format!("it refuses: {status}{}{said}", if said.is_empty() { "" } else { ": " })))
            }
        }
    }

    fn fault(&self, reason: impl Into<String>) -> BrokerError {
        BrokerError::Registry { url: self.url.clone(), reason: reason.into() }
    }
}

fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    match error.is_timeout() {
        true => "it took too long".into(),
        false => cause.to_string(),
    }
}

/// The address as written, less what stands before an `@`: for messages about addresses that cannot be taken apart.
fn without_login(url: &str) -> String {
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://{host}"),
        (None, Some((_, host))) => host.to_owned(),
        _ => url.to_owned(),
    }
}

fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        match code.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(byte) if first == b'%' => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
pub(crate) mod tests;
