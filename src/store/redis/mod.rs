//! The online store in Redis.
//!
//! The server compares the version of each row with the stored one and writes or does not, so that no writer reads first.
//! A call of its function takes some rows, in a cluster one: their keys lie on different nodes. Calls go out in pipelines of
//! bounded size, several in flight. Memory: Redis keeps a hash compact
//! (listpack) while it has at most `hash-max-listpack-entries` fields of at most `hash-max-listpack-value` bytes (512 and
//! 64 by default); every feature is one field, every view and the version one more. TLS trusts the system's certificates,
//! or those in `SSL_CERT_FILE`.

mod script;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use fred::clients::{Client, Pipeline, WithOptions};
use fred::error::{Error, ErrorKind};
use fred::interfaces::{ClientLike, EventInterface, FunctionInterface, HashesInterface, LuaInterface};
use fred::types::config::{Config, Options, ReconnectPolicy, Server, ServerConfig, UnresponsiveConfig};
use fred::types::{Builder, ClusterHash, CustomCommand, Key, RespVersion, Value as Reply};
use futures::stream::{self, StreamExt as _};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use self::script::{Installed, PROGRAM};
use super::feast::{EncodedRows, Layout};
use super::online::Backoff;
use super::{GroupRead, OnlineError, OnlineStore, Value};
use crate::config::plan::Secret;
use crate::runtime::{clock, failpoint};
use crate::telemetry::metrics::{HOLDS, ONLINE_ROWS};
use crate::window::FeatureRows;

/// A pipeline closes at this many rows …
const CHUNK_ROWS: usize = 256;
/// … or this many bytes.
const CHUNK_BYTES: usize = 1 << 20;
/// A call of the function takes this many rows, so that nobody else waits longer for the server than they take …
const CALL_ROWS: usize = 32;
/// … or this many bytes.
const CALL_BYTES: usize = 64 << 10;
/// Fields that the function unpacks at a time: Lua's stack holds some 8,000 values, and each field is two.
const PART_FIELDS: usize = 2000;
/// Pipelines without an answer yet, for each writing thread.
const IN_FLIGHT: usize = 4;
/// Pipelines and commands that wait for the connection, over all threads, before the client refuses more.
const QUEUE: usize = 1024;
/// A pipeline without an answer for this long counts as lost.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a ping or a read waits for the first connection.
const CONNECT: Duration = Duration::from_secs(3);
/// A store that stays away is logged this often.
const REMIND: Duration = Duration::from_secs(30);

/// Redis, through one multiplexed connection (one a node in a cluster).
pub(super) struct RedisOnline {
    client: WithOptions<Client>,
    runtime: Handle,
    layout: Layout,
    name: String,
    pipeline: String,
    /// Arguments that all writes share: time to live, number of fields of each view, and the fields that decide.
    shared: Vec<Bytes>,
    /// Field names of all views, in order.
    fields: Vec<Bytes>,
    /// The private field and those of all views, as a row's values are packed with them.
    packed_fields: Vec<Bytes>,
    installed: tokio::sync::Mutex<Option<Installed>>,
    /// Why the connection is down, as the client last heard.
    last_error: Arc<Mutex<Option<Error>>>,
}

/// What became of a pipeline.
enum Failure {
    /// The server does not have the program (any more).
    NotInstalled,
    /// Anything else.
    Online(OnlineError),
}

impl RedisOnline {
    pub(super) fn open(
        url: &Secret,
        ttl: Option<Duration>,
        pipeline: &str,
        layout: Layout,
        runtime: Handle,
    ) -> Result<Self, OnlineError> {
        let (config, name) = config(&url.0)?;
        let mut builder = Builder::from_config(config);
        builder
            .with_connection_config(|c| {
                c.connection_timeout = Duration::from_secs(5);
                c.internal_command_timeout = Duration::from_secs(5);
                // Rows are repeated here, by whoever waits for them, never inside the client.
                c.max_command_attempts = 1;
                c.max_command_buffer_len = QUEUE;
                c.unresponsive = UnresponsiveConfig { max_timeout: Some(ANSWER), interval: Duration::from_secs(2) };
                c.tcp.nodelay = Some(true);
            })
            .with_performance_config(|p| p.default_command_timeout = ANSWER);
        let mut policy = ReconnectPolicy::new_exponential(0, 20, 2000, 2);
        policy.set_jitter(20);
        builder.set_policy(policy);
        let client = builder.build().map_err(|e| OnlineError::Url { reason: e.details().to_owned() })?;

        let last_error = Arc::new(Mutex::new(None));
        let _runtime = runtime.enter();
        let (noted, cleared) = (last_error.clone(), last_error.clone());
        client.on_error(move |(error, _)| {
            *noted.lock() = Some(error);
            std::future::ready(Ok(()))
        });
        client.on_reconnect(move |_| {
            *cleared.lock() = None;
            std::future::ready(Ok(()))
        });
        client.connect();

        let options = Options { fail_fast: true, max_attempts: Some(1), ..Options::default() };
        let views = 0..layout.views().len();
        let pairs = views.clone().map(|v| u16::try_from(layout.fields(v).len()).expect("a view has fewer features"));
        let shape: Bytes = pairs.flat_map(u16::to_le_bytes).collect();
        let ttl = Bytes::from(ttl.map_or(0, |ttl| ttl.as_millis().max(1)).to_string());
        let deciding = views.clone().map(|v| layout.fields(v)[0].clone());
        let fields: Vec<Bytes> = views.clone().flat_map(|v| layout.fields(v).iter().cloned()).collect();
        let packed = |field: &Bytes| {
            let mut packed = BytesMut::new();
            put_packed(field, &mut packed);
            packed.freeze()
        };
        Ok(Self {
            shared: [ttl, shape, layout.private_field().clone()].into_iter().chain(deciding).collect(),
            packed_fields: std::iter::once(layout.private_field()).chain(&fields).map(packed).collect(),
            fields,
            client: client.with_options(&options),
            runtime,
            layout,
            name,
            pipeline: pipeline.to_owned(),
            installed: tokio::sync::Mutex::new(None),
            last_error,
        })
    }

    /// Writes the chunks that are not there yet, repeating what fails.
    async fn write_chunks(&self, rows: &EncodedRows, give_up: &dyn Fn() -> bool) -> Result<(), OnlineError> {
        let mut pending = cut(rows, 0..rows.len(), CHUNK_ROWS, CHUNK_BYTES);
        let mut backoff = Backoff::new();
        let mut away: Option<(std::time::Instant, Option<std::time::Instant>)> = None;
        loop {
            let attempts: Vec<_> = stream::iter(pending)
                .map(|chunk| async { (self.write_chunk(rows, chunk.clone()).await, chunk) })
                .buffer_unordered(IN_FLIGHT)
                .collect()
                .await;
            let mut failure = None;
            pending = Vec::new();
            for (result, chunk) in attempts {
                match result {
                    Ok(()) => {}
                    Err(error) if error.is_retriable() => {
                        pending.push(chunk);
                        failure = Some(error);
                    }
                    Err(error) => return Err(error),
                }
            }
            let Some(error) = failure else {
                if let Some((since, _)) = away {
                    tracing::info!(store = self.name, seconds = since.elapsed().as_secs_f64(), "online store is back");
                }
                return Ok(());
            };
            if give_up() {
                return Err(error);
            }
            let (_, reminded) = away.get_or_insert_with(|| (clock::monotonic(), None));
            if reminded.is_none_or(|at| at.elapsed() >= REMIND) {
                *reminded = Some(clock::monotonic());
                tracing::warn!(%error, "holding back: rows wait for the online store");
                metrics::counter!(HOLDS, "pipeline" => self.pipeline.clone(), "what" => "online").increment(1);
            }
            self.pause(backoff.pause(), give_up).await;
        }
    }

    /// Waits, but no longer than until somebody gives up; where the connection is down, until it is back.
    async fn pause(&self, pause: Duration, give_up: &dyn Fn() -> bool) {
        let down = !self.client.is_connected();
        for step in Backoff::steps(pause) {
            if give_up() || (down && self.client.is_connected()) {
                return;
            }
            // A future that never ends, with a deadline.
            let _ = tokio::time::timeout(step, std::future::pending::<()>()).await;
        }
    }

    async fn write_chunk(&self, rows: &EncodedRows, chunk: Range<usize>) -> Result<(), OnlineError> {
        if failpoint::hit("online.before_write") {
            return Err(self.unreachable("failpoint online.before_write"));
        }
        let mut installed = self.install().await?;
        // Once, and again where the server has lost the program since.
        for _ in 0..2 {
            match self.send(rows, chunk.clone(), &installed).await {
                Ok(()) => {
                    if failpoint::hit("online.written") {
                        return Err(self.unreachable("failpoint online.written"));
                    }
                    return Ok(());
                }
                // Running the source leaves the script with every node that ran it.
                Err(Failure::NotInstalled) if installed != Installed::Function => installed = Installed::Source,
                Err(Failure::NotInstalled) => {
                    let mut known = self.installed.lock().await;
                    if known.as_ref() == Some(&installed) {
                        *known = None;
                    }
                    drop(known);
                    installed = self.install().await?;
                }
                Err(Failure::Online(error)) => return Err(error),
            }
        }
        Err(OnlineError::Unready {
            store: self.name.clone(),
            command: "write",
            reason: "it forgets driftline's function as soon as it is loaded".into(),
        })
    }

    async fn send(&self, rows: &EncodedRows, chunk: Range<usize>, installed: &Installed) -> Result<(), Failure> {
        let pipeline = self.client.pipeline().with_options(self.client.options());
        // One call of the function has to find all of its keys on one node.
        let most = if self.client.is_clustered() { 1 } else { CALL_ROWS };
        for call in cut(rows, chunk, most, CALL_BYTES) {
            let keys: Vec<Key> = call.clone().map(|row| Key::from(rows.key(row))).collect();
            let mut args: Vec<Reply> = self.shared.iter().cloned().map(Reply::Bytes).collect();
            let mut packed = BytesMut::new();
            for row in call {
                args.push(Reply::Bytes(rows.version(row)));
                self.pack(rows, row, &mut packed, &mut args);
            }
            // Into the pipeline's own memory: this cannot wait and its answer says nothing yet.
            let queued: Result<(), _> = match installed {
                Installed::Function => pipeline.fcall(PROGRAM.function.as_str(), keys, args).await,
                Installed::Script(hash) => evaluate(&pipeline, "EVALSHA", hash, keys, args).await,
                Installed::Source => evaluate(&pipeline, "EVAL", &PROGRAM.script, keys, args).await,
            };
            queued.map_err(|e| self.failure(e, "write"))?;
        }
        for answer in pipeline.try_all::<Option<i64>>().await {
            answer.map_err(|e| self.failure(e, "write"))?;
        }
        Ok(())
    }

    /// Appends a row's fields and values as the function takes them.
    fn pack(&self, rows: &EncodedRows, row: usize, packed: &mut BytesMut, args: &mut Vec<Reply>) {
        let values = std::iter::once(rows.version(row)).chain(rows.values(row));
        for (number, (field, value)) in self.packed_fields.iter().zip(values).enumerate() {
            if number > 0 && number % PART_FIELDS == 0 {
                args.push(Reply::Bytes(packed.split().freeze()));
            }
            packed.extend_from_slice(field);
            put_packed(&value, packed);
        }
        args.push(Reply::Bytes(packed.split().freeze()));
    }

    /// Loads the program where this client does not know the server to have it.
    async fn install(&self) -> Result<Installed, OnlineError> {
        let mut installed = self.installed.lock().await;
        if let Some(installed) = &*installed {
            return Ok(installed.clone());
        }
        let library = PROGRAM.library.as_str();
        let loaded: Result<Reply, Error> = if self.client.is_clustered() {
            self.client.function_load_cluster(true, library).await
        } else {
            self.client.function_load(true, library).await
        };
        let found = match loaded {
            Ok(_) => Installed::Function,
            // Redis before 7, or a user that may not load functions.
            Err(e) if e.details().contains("unknown command") || e.details().starts_with("NOPERM") => {
                // In a cluster any node may answer; the others get the script when they miss it.
                let hash: Result<String, Error> = self.client.script_load(PROGRAM.script.as_str()).await;
                Installed::Script(hash.map_err(|e| self.online(e, "load of its script"))?)
            }
            Err(e) => return Err(self.online(e, "load of its function")),
        };
        *installed = Some(found.clone());
        Ok(found)
    }

    fn failure(&self, error: Error, command: &'static str) -> Failure {
        let details = error.details();
        if details.starts_with("NOSCRIPT") || details.contains("Function not found") {
            return Failure::NotInstalled;
        }
        Failure::Online(self.online(error, command))
    }

    fn online(&self, error: Error, command: &'static str) -> OnlineError {
        let store = self.name.clone();
        let details = error.details().to_owned();
        let code = details.split(' ').next().unwrap_or_default();
        match (error.kind(), code) {
            (ErrorKind::Auth, _) => OnlineError::Refused {
                store,
                command,
                reason: format!("{details}; check the user and password in [online] redis"),
            },
            (_, "NOPERM") => OnlineError::Refused {
                store,
                command,
                reason: format!(
                    "{details}; the user needs fcall, function|load (or evalsha, script|load), hmget, hset, pexpire, ping"
                ),
            },
            (
                _,
                "LOADING" | "BUSY" | "MASTERDOWN" | "READONLY" | "CLUSTERDOWN" | "TRYAGAIN" | "OOM" | "MISCONF"
                | "NOREPLICAS" | "MOVED" | "ASK" | "UNBLOCKED",
            ) => OnlineError::Unready { store, command, reason: details },
            // The server's own words begin with a code in capitals; all others are the client's.
            (ErrorKind::Unknown | ErrorKind::InvalidArgument | ErrorKind::InvalidCommand, code)
                if !code.is_empty() && code.bytes().all(|b| b.is_ascii_uppercase()) =>
            {
                OnlineError::Refused { store, command, reason: details }
            }
            (ErrorKind::Config | ErrorKind::Url, _) => OnlineError::Refused { store, command, reason: details },
            _ => match self.last_error.lock().clone() {
                Some(last) if *last.kind() == ErrorKind::Auth => OnlineError::Refused {
                    store,
                    command,
                    reason: format!("{}; check the user and password in [online] redis", last.details()),
                },
                Some(last) => OnlineError::Unreachable { store, reason: last.to_string() },
                None => OnlineError::Unreachable { store, reason: error.to_string() },
            },
        }
    }

    fn unreachable(&self, reason: &str) -> OnlineError {
        OnlineError::Unreachable { store: self.name.clone(), reason: reason.to_owned() }
    }

    /// Waits for the first connection, not for ever: what follows fails fast.
    async fn connected(&self) {
        if !self.client.is_connected() {
            let _ = tokio::time::timeout(CONNECT, self.client.wait_for_connect()).await;
        }
    }
}

impl OnlineStore for RedisOnline {
    fn write(&self, rows: &FeatureRows, give_up: &dyn Fn() -> bool) -> Result<(), OnlineError> {
        let encoded = self.layout.encode(rows);
        self.runtime.block_on(self.write_chunks(&encoded, give_up))?;
        metrics::counter!(ONLINE_ROWS, "pipeline" => self.pipeline.clone()).increment(encoded.len() as u64);
        Ok(())
    }

    fn read(&self, key: &[Value]) -> Result<Vec<(String, GroupRead)>, OnlineError> {
        let key = self.layout.key(key)?;
        let found: Vec<Option<Bytes>> = self.runtime.block_on(async {
            self.connected().await;
            let fields: Vec<Key> = self.fields.iter().cloned().map(Key::from).collect();
            self.client.hmget(Key::from(key.as_slice()), fields).await.map_err(|e| self.online(e, "read"))
        })?;
        let firsts: Vec<usize> = (0..self.layout.views().len())
            .scan(0, |next, view| Some(std::mem::replace(next, *next + self.layout.fields(view).len())))
            .collect();
        self.layout
            .decode(|view, field| found.get(firsts[view] + field).and_then(|v| v.as_deref()))
            .map_err(|reason| OnlineError::Corrupt { store: self.name.clone(), key: hex::encode(&key), reason })
    }

    fn look_up(&self, layout: &Layout, keys: &[Vec<u8>], timeout: Duration) -> Result<Vec<GroupRead>, OnlineError> {
        let read = async {
            self.connected().await;
            let pipeline = self.client.pipeline().with_options(self.client.options());
            for key in keys {
                let fields: Vec<Key> = layout.fields(0).iter().cloned().map(Key::from).collect();
                // Into the pipeline's own memory: this cannot wait and its answer says nothing yet.
                let queued: Result<(), _> = pipeline.hmget(Key::from(key.as_slice()), fields).await;
                queued.map_err(|e| self.online(e, "read"))?;
            }
            let found = pipeline.try_all::<Vec<Option<Bytes>>>().await.into_iter();
            found.map(|one| one.map_err(|e| self.online(e, "read"))).collect::<Result<Vec<_>, _>>()
        };
        let answered = self.runtime.block_on(async { tokio::time::timeout(timeout, read).await });
        let found =
            answered.map_err(|_| self.unreachable(&format!("no answer within {} ms", timeout.as_millis())))??;
        let decode = |(key, found): (&Vec<u8>, Vec<Option<Bytes>>)| {
            layout
                .decode_first(|field| found.get(field).and_then(|value| value.as_deref()))
                .map_err(|reason| OnlineError::Corrupt { store: self.name.clone(), key: hex::encode(key), reason })
        };
        keys.iter().zip(found).map(decode).collect()
    }

    fn describe(&self) -> String {
        self.name.clone()
    }

    fn ping(&self) -> Result<(), OnlineError> {
        self.runtime.block_on(async {
            self.connected().await;
            self.client.ping::<Reply>(None).await.map_err(|e| self.online(e, "ping"))?;
            Ok(())
        })
    }
}

impl Drop for RedisOnline {
    fn drop(&mut self) {
        let client = self.client.clone();
        // Closes the connection in the background; a runtime that is going down closes it anyhow.
        self.runtime.spawn(async move {
            let _ = client.quit().await;
        });
    }
}

/// Queues a script, by its hash or as its source, in a pipeline.
async fn evaluate(
    pipeline: &WithOptions<Pipeline<Client>>,
    command: &'static str,
    script: &str,
    keys: Vec<Key>,
    args: Vec<Reply>,
) -> Result<(), Error> {
    let command = CustomCommand::new_static(command, ClusterHash::Offset(2), false);
    let count = i64::try_from(keys.len()).expect("a call takes few keys");
    let mut all = Vec::with_capacity(2 + keys.len() + args.len());
    all.extend([Reply::from(script), Reply::from(count)]);
    all.extend(keys.into_iter().map(|key| Reply::Bytes(key.into_bytes())));
    all.extend(args);
    pipeline.custom(command, all).await
}

/// The client's configuration and what this store is called in messages.
fn config(url: &str) -> Result<(Config, String), OnlineError> {
    let bad = |reason: &str| OnlineError::Url { reason: reason.to_owned() };
    let parsed = url::Url::parse(url).map_err(|e| bad(&e.to_string()))?;
    if !parsed.scheme().starts_with("redis") && !parsed.scheme().starts_with("valkey") {
        return Err(bad(&format!("its scheme is {}://", parsed.scheme())));
    }
    let mut config = Config::from_url(url).map_err(|e| bad(e.details()))?;
    config.version = match parsed.query_pairs().find(|(name, _)| name == "protocol") {
        None => RespVersion::RESP2,
        Some((_, version)) if version == "2" => RespVersion::RESP2,
        Some((_, version)) if version == "3" => RespVersion::RESP3,
        Some((_, version)) => return Err(bad(&format!("protocol={version} is neither 2 nor 3"))),
    };
    // The server may come later: it is waited for, with messages, instead of failing here.
    config.fail_fast = false;
    let server = |s: &Server| format!("{}:{}", s.host, s.port);
    let tls = if config.uses_tls() { " (TLS)" } else { "" };
    let name = match &config.server {
        ServerConfig::Centralized { server: s } => match config.database {
            Some(database) if database != 0 => format!("redis {}/{database}{tls}", server(s)),
            _ => format!("redis {}{tls}", server(s)),
        },
        ServerConfig::Clustered { hosts, .. } => {
            format!("redis cluster {}{tls}", hosts.iter().map(server).collect::<Vec<_>>().join(","))
        }
        ServerConfig::Sentinel { hosts, service_name, .. } => {
            format!(
                "redis {service_name} behind sentinel {}{tls}",
                hosts.iter().map(server).collect::<Vec<_>>().join(",")
            )
        }
    };
    Ok((config, name))
}

/// Appends a string in MessagePack: with a length of five or of sixteen bits, which servers of all ages read, or of 32.
fn put_packed(text: &[u8], out: &mut BytesMut) {
    match u16::try_from(text.len()) {
        Ok(short) if short < 32 => out.put_u8(0xa0 | u8::try_from(short).expect("below 32")),
        Ok(long) => {
            out.put_u8(0xda);
            out.put_u16(long);
        }
        Err(_) => {
            out.put_u8(0xdb);
            out.put_u32(u32::try_from(text.len()).expect("a value comes from a record, which Kafka keeps below 2 GiB"));
        }
    }
    out.extend_from_slice(text);
}

/// Cuts a range of rows where `most` of them or `limit` bytes are together.
fn cut(rows: &EncodedRows, range: Range<usize>, most: usize, limit: usize) -> Vec<Range<usize>> {
    let mut cut = Vec::new();
    let (mut start, mut bytes) = (range.start, 0);
    for row in range.clone() {
        let size = rows.row_bytes(row);
        if row > start && (row - start >= most || bytes + size > limit) {
            cut.push(start..row);
            (start, bytes) = (row, 0);
        }
        bytes += size;
    }
    if start < range.end {
        cut.push(start..range.end);
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("redis://localhost:6379", "redis localhost:6379")]
    #[case("redis://user:secret@host/2", "redis host:6379/2")]
    #[case("rediss://:secret@host:7000?protocol=3", "redis host:7000 (TLS)")]
    #[case("redis-cluster://:secret@a:1?node=b:2", "redis cluster b:2,a:1")]
    fn names_hold_no_secrets(#[case] url: &str, #[case] expected: &str) {
        assert_eq!(config(url).unwrap().1, expected);
    }

    #[rstest]
    #[case("http://:secret@host")]
    #[case("redis://:secret@host/notanumber")]
    #[case("localhost:6379")]
    #[case("redis://:secret@host?protocol=4")]
    fn other_urls_are_refused_without_their_secrets(#[case] url: &str) {
        let error = config(url).unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }
}
