//! Real servers for tests, on free loopback ports, in folders that disappear.
//!
//! [`Kafka::shared`] and [`Redis::shared`] serve the whole test binary, so each test takes topics and keys of its own.
//! [`Kafka::start`] and [`Redis::start`] give a private server that a test may stop, kill and restart on the same port
//! and data. Every server dies with the test process, however that ends.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{LazyLock, Mutex};
use std::thread;
use std::time::Duration;

use driftline::runtime::clock;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Headers, Message};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;

/// How long a server may take to answer, on a busy machine.
pub const START: Duration = Duration::from_secs(120);

/// Waits until `ready` holds and fails the test, naming `what`, if it does not within `limit`.
pub fn until(what: &str, limit: Duration, mut ready: impl FnMut() -> bool) {
    let deadline = clock::monotonic() + limit;
    while !ready() {
        assert!(clock::monotonic() < deadline, "gave up after {limit:?} waiting until {what}");
        thread::park_timeout(Duration::from_millis(10));
    }
}

/// A name that no other test of this run uses.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{prefix}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port is free");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// A folder for one server's data. Shared servers live until the process exits and cannot remove theirs, so each run
/// first removes the folders of runs that have ended.
fn data_folder() -> tempfile::TempDir {
    static SWEPT: LazyLock<()> = LazyLock::new(|| {
        for entry in fs::read_dir(env!("CARGO_TARGET_TMPDIR")).expect("cargo made the folder").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let pid = name.strip_prefix("server-").and_then(|rest| rest.split('-').next());
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                // Another run may be sweeping the same folder.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    });
    LazyLock::force(&SWEPT);
    let prefix = format!("server-{}-", std::process::id());
    tempfile::Builder::new().prefix(&prefix).tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("the folder is writable")
}

fn folder_from(variable: &str, default: &str) -> PathBuf {
    let folder =
        std::env::var_os(variable).map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(default), PathBuf::from);
    assert!(folder.is_dir(), "{} is not there: run `make setup`, or set {variable}", folder.display());
    folder
}

/// One running process, a server or driftline itself. Killed when dropped.
pub struct Process {
    child: Child,
    name: &'static str,
    log: PathBuf,
    /// End of what [`Process::until_printed`] has found in the log.
    found: usize,
}

type Spawn = (Command, Sender<std::io::Result<Child>>);

/// Linux binds a child's death signal to the thread that spawned it, and test threads end with their test: so one thread
/// that lives as long as the process spawns them all.
static SPAWNER: LazyLock<Mutex<Sender<Spawn>>> = LazyLock::new(|| {
    let (jobs, inbox) = channel::<Spawn>();
    thread::Builder::new()
        .name("server-spawner".into())
        .spawn(move || {
            for (mut command, reply) in inbox {
                reply.send(command.spawn()).expect("the caller waits for the reply");
            }
        })
        .expect("a thread can be started");
    Mutex::new(jobs)
});

impl Process {
    /// Starts it with its output going to the end of `log`.
    pub fn spawn(name: &'static str, mut command: Command, log: PathBuf) -> Self {
        let out = File::options().create(true).append(true).open(&log).expect("the test folder is writable");
        command.stdin(Stdio::null()).stderr(out.try_clone().expect("a file can be shared")).stdout(out);
        // SAFETY: prctl is async-signal-safe and touches no memory of this process.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            })
        };
        let (reply, answer) = channel();
        SPAWNER.lock().unwrap().send((command, reply)).expect("the spawner lives as long as the process");
        let child = answer.recv().expect("the spawner answers").unwrap_or_else(|e| panic!("cannot start {name}: {e}"));
        Self { child, name, log, found: 0 }
    }

    /// Waits until `ready` holds. The process must not end before.
    pub fn until(&mut self, what: &str, mut ready: impl FnMut() -> bool) {
        let (child, log, name) = (&mut self.child, &self.log, self.name);
        let deadline = clock::monotonic() + START;
        while !ready() {
            let printed = || fs::read_to_string(log).unwrap_or_default();
            if let Some(exit) = child.try_wait().expect("a child can be waited for") {
                panic!("{name} ended ({exit}) before {what}; its output:\n{}", printed());
            }
            assert!(clock::monotonic() < deadline, "gave up waiting until {what}; {name} printed:\n{}", printed());
            thread::park_timeout(Duration::from_millis(10));
        }
    }

    /// Waits until it has printed `text` after what the last such wait has found. The process must not end before.
    pub fn until_printed(&mut self, text: &str) {
        let (log, from) = (self.log.clone(), self.found);
        let mut found = None;
        self.until(&format!("it prints '{text}'"), || {
            found = fs::read_to_string(&log).ok().and_then(|all| all[from..].find(text));
            found.is_some()
        });
        self.found = from + found.expect("it is there") + text.len();
    }

    /// All that it has printed.
    pub fn printed(&self) -> String {
        fs::read_to_string(&self.log).expect("the log is there")
    }

    /// Its process id.
    pub fn id(&self) -> libc::pid_t {
        libc::pid_t::try_from(self.child.id()).expect("a process id fits")
    }

    /// Sends a signal.
    pub fn signal(&mut self, signal: libc::c_int) {
        // SAFETY: the child has not been waited for, so the id is still its own.
        unsafe { libc::kill(self.id(), signal) };
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// Waits until it has ended.
    pub fn end(&mut self) -> ExitStatus {
        let child = &mut self.child;
        let mut exit = None;
        until(&format!("{} ends", self.name), START, || {
            exit = child.try_wait().expect("a child can be waited for");
            exit.is_some()
        });
        exit.expect("it has ended")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal(libc::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// A Kafka broker, single node, KRaft.
pub struct Kafka {
    port: u16,
    folder: tempfile::TempDir,
    process: Mutex<Option<Process>>,
}

impl Kafka {
    /// The broker of the whole test binary.
    pub fn shared() -> &'static Self {
        static SHARED: LazyLock<Kafka> = LazyLock::new(Kafka::start);
        &SHARED
    }

    /// A broker of one's own.
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// A broker of one's own, with more lines of settings.
    pub fn start_with(more: &str) -> Self {
        let (port, controller) = (free_port(), free_port());
        let folder = data_folder();
        let properties = format!(
            "process.roles=broker,controller\n\
             node.id=1\n\
             controller.quorum.voters=1@127.0.0.1:{controller}\n\
             listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n\
             advertised.listeners=PLAINTEXT://127.0.0.1:{port}\n\
             controller.listener.names=CONTROLLER\n\
             log.dirs={}\n\
             offsets.topic.num.partitions=1\n\
             offsets.topic.replication.factor=1\n\
             transaction.state.log.num.partitions=1\n\
             transaction.state.log.replication.factor=1\n\
             transaction.state.log.min.isr=1\n\
             group.initial.rebalance.delay.ms=0\n\
             group.min.session.timeout.ms=1000\n\
             group.consumer.min.heartbeat.interval.ms=100\n\
             group.consumer.heartbeat.interval.ms=200\n\
             group.consumer.min.session.timeout.ms=1000\n\
             group.consumer.session.timeout.ms=6000\n\
             log.cleaner.dedupe.buffer.size=2097152\n\
             log.cleaner.backoff.ms=200\n\
             log.initial.task.delay.ms=100\n\
             auto.create.topics.enable=false\n{more}",
            folder.path().join("log").display()
        );
        fs::write(folder.path().join("server.properties"), properties).expect("the test folder is writable");
        let kafka = Self { port, folder, process: Mutex::new(None) };
        let formatted = kafka
            .java()
            .args(["kafka.tools.StorageTool", "format", "--cluster-id", "ZHJpZnRsaW5lLXRlc3RzMA", "--config"])
            .arg(kafka.folder.path().join("server.properties"))
            .output()
            .expect("java is on the PATH");
        assert!(formatted.status.success(), "cannot format Kafka's log folder: {formatted:?}");
        kafka.restart();
        kafka
    }

    fn java(&self) -> Command {
        let libs = folder_from("DRIFTLINE_KAFKA_LIBS", ".servers/kafka/libs");
        let mut command = Command::new("java");
        command.current_dir(self.folder.path());
        command.args(["-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp"]).arg(libs.join("*"));
        command
    }

    /// Starts the server again after [`Kafka::kill`], on the same port and data, and waits until it answers.
    pub fn restart(&self) {
        let mut command = self.java();
        command.args(["kafka.Kafka", "server.properties"]);
        let mut process = Process::spawn("Kafka", command, self.folder.path().join("server.log"));
        let probe: BaseConsumer = self.client().create().expect("the client's settings are valid");
        process.until("it answers", || {
            probe.fetch_metadata(None, Duration::from_millis(500)).is_ok_and(|cluster| !cluster.brokers().is_empty())
        });
        *self.process.lock().unwrap() = Some(process);
    }

    /// Kills the server as a power cut would.
    pub fn kill(&self) {
        // Dropping a process kills it and waits for its end.
        drop(self.process.lock().unwrap().take().expect("the server runs"));
    }

    /// Stops the server in order.
    pub fn stop(&self) {
        stop(&self.process);
    }

    /// Bootstrap address.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.address()).set("log_level", "0");
        config
    }

    /// Creates a topic with a name of its own.
    pub fn topic(&self, prefix: &str, partitions: i32) -> String {
        let name = unique(prefix);
        self.create(&name, partitions);
        name
    }

    /// Creates a topic with this name.
    pub fn create(&self, name: &str, partitions: i32) {
        self.create_with(name, partitions, &[]);
    }

    /// Creates a topic with this name and these settings.
    pub fn create_with(&self, name: &str, partitions: i32, settings: &[(&str, &str)]) {
        let admin: AdminClient<DefaultClientContext> = self.client().create().expect("the client's settings are valid");
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        let topic = settings.iter().fold(topic, |topic, (key, value)| topic.set(key, value));
        let made = admin.create_topics([&topic], &AdminOptions::new().operation_timeout(Some(START)));
        tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime can be made")
            .block_on(made)
            .expect("the broker answers")
            .pop()
            .expect("one topic was asked for")
            .expect("the topic is new");
        // The controller has it; the broker learns of it a moment later.
        let probe: BaseConsumer = self.client().create().expect("the client's settings are valid");
        until("the broker knows the new topic", START, || {
            let found = probe.fetch_metadata(Some(name), START);
            found.is_ok_and(|cluster| cluster.topics().iter().any(|topic| !topic.partitions().is_empty()))
        });
    }

    /// Writes records outside of any transaction and waits until they are acknowledged.
    pub fn produce<'a>(&self, topic: &str, records: impl IntoIterator<Item = (i32, &'a [u8], &'a [u8])>) {
        self.produce_any(topic, records.into_iter().map(|(partition, key, value)| (partition, Some(key), Some(value))));
    }

    /// The same, for records that may lack a key or a value.
    pub fn produce_any<'a>(
        &self,
        topic: &str,
        records: impl IntoIterator<Item = (i32, Option<&'a [u8]>, Option<&'a [u8]>)>,
    ) {
        self.produce_at(topic, records.into_iter().map(|(partition, key, value)| (partition, None, key, value)));
    }

    /// The same, for records that may have a timestamp of their own.
    pub fn produce_at<'a>(
        &self,
        topic: &str,
        records: impl IntoIterator<Item = (i32, Option<i64>, Option<&'a [u8]>, Option<&'a [u8]>)>,
    ) {
        let producer: BaseProducer = self.client().create().expect("the client's settings are valid");
        for (partition, timestamp, key, value) in records {
            let mut record = BaseRecord::<[u8], [u8]>::to(topic).partition(partition);
            (record.key, record.payload, record.timestamp) = (key, value, timestamp);
            while let Err((error, back)) = producer.send(record) {
                assert_eq!(error.rdkafka_error_code(), Some(RDKafkaErrorCode::QueueFull), "{error}");
                producer.poll(Duration::from_millis(10));
                record = back;
            }
        }
        producer.flush(START).expect("the broker acknowledges");
    }

    /// Records in partition 0 of a topic, of open transactions too.
    pub fn written(&self, topic: &str) -> i64 {
        let consumer: BaseConsumer =
            self.client().set("isolation.level", "read_uncommitted").create().expect("the client's settings are valid");
        consumer.fetch_watermarks(topic, 0, START).expect("the broker answers").1
    }

    /// All committed records of a topic, by partition and offset.
    pub fn consume(&self, topic: &str) -> Vec<Consumed> {
        let mut follower = self.follow(topic);
        let deadline = clock::monotonic() + START;
        while !follower.at_end() {
            assert!(clock::monotonic() < deadline, "topic {topic} did not end");
            follower.poll(Duration::from_millis(100));
        }
        follower.records.sort_by_key(|r| (r.partition, r.offset));
        follower.records
    }

    /// Reads the committed records of a topic as they come.
    pub fn follow(&self, topic: &str) -> Follower {
        let consumer: BaseConsumer = self
            .client()
            .set("group.id", unique("reader"))
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .set("isolation.level", "read_committed")
            .set("fetch.wait.max.ms", "20")
            .set("reconnect.backoff.max.ms", "500")
            .create()
            .expect("the client's settings are valid");
        let cluster = consumer.fetch_metadata(Some(topic), START).expect("the broker answers");
        let partitions = cluster.topics()[0].partitions().len();
        assert!(partitions > 0, "topic {topic} does not exist");
        let mut list = TopicPartitionList::new();
        for partition in 0..partitions {
            let partition = i32::try_from(partition).expect("few partitions");
            list.add_partition_offset(topic, partition, Offset::Beginning).expect("the offset is valid");
        }
        consumer.assign(&list).expect("the partitions exist");
        Follower { consumer, topic: topic.to_owned(), ended: vec![false; partitions], records: Vec::new() }
    }
}

/// A reader of committed records.
pub struct Follower {
    consumer: BaseConsumer,
    topic: String,
    /// By partition: its end has been seen.
    ended: Vec<bool>,
    /// What has been read so far.
    records: Vec<Consumed>,
}

impl Follower {
    /// Reads what is there now, and returns all that has been read so far. A broker that is away is waited for.
    pub fn read(&mut self) -> &[Consumed] {
        while self.poll(Duration::from_millis(20)) {}
        &self.records
    }

    fn at_end(&self) -> bool {
        self.ended.iter().all(|ended| *ended)
    }

    fn poll(&mut self, timeout: Duration) -> bool {
        match self.consumer.poll(timeout) {
            Some(Ok(message)) => self.records.push(Consumed {
                partition: message.partition(),
                offset: message.offset(),
                key: message.key().map(<[u8]>::to_vec),
                value: message.payload().map(<[u8]>::to_vec),
                headers: message.headers().map_or_else(Vec::new, |headers| {
                    headers.iter().map(|h| (h.key.to_owned(), h.value.unwrap_or_default().to_vec())).collect()
                }),
            }),
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                self.ended[usize::try_from(partition).expect("partitions count from 0")] = true;
            }
            Some(Err(KafkaError::MessageConsumption(
                RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::AllBrokersDown,
            ))) => return false,
            Some(Err(error)) => panic!("reading {}: {error}", self.topic),
            None => return false,
        }
        true
    }
}

/// A record as a consumer with `read_committed` sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consumed {
    /// Partition.
    pub partition: i32,
    /// Offset.
    pub offset: i64,
    /// Key.
    pub key: Option<Vec<u8>>,
    /// Value.
    pub value: Option<Vec<u8>>,
    /// Headers.
    pub headers: Vec<(String, Vec<u8>)>,
}

/// A Redis server. Its writes survive [`Redis::kill`].
pub struct Redis {
    port: u16,
    folder: tempfile::TempDir,
    arguments: Vec<String>,
    process: Mutex<Option<Process>>,
}

impl Redis {
    /// The server of the whole test binary.
    pub fn shared() -> &'static Self {
        static SHARED: LazyLock<Redis> = LazyLock::new(Redis::start);
        &SHARED
    }

    /// A server of one's own.
    pub fn start() -> Self {
        Self::start_with([])
    }

    /// A server of one's own, with more command-line arguments.
    pub fn start_with<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Self {
        let folder = data_folder();
        let arguments = arguments.into_iter().map(str::to_owned).collect();
        let redis = Self { port: free_port(), folder, arguments, process: Mutex::new(None) };
        redis.restart();
        redis
    }

    /// Starts the server again after [`Redis::kill`], on the same port and data, and waits until it answers.
    pub fn restart(&self) {
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--port"]).arg(self.port.to_string());
        command.args(["--save", "", "--appendonly", "yes", "--appendfsync", "always", "--dir"]);
        command.arg(self.folder.path()).args(&self.arguments);
        let mut process = Process::spawn("Redis", command, self.folder.path().join("server.log"));
        process.until("it answers", || {
            let answer = ask(self.port, b"PING\r\n");
            answer.starts_with("+PONG") || answer.starts_with("-NOAUTH")
        });
        *self.process.lock().unwrap() = Some(process);
    }

    /// Kills the server as a power cut would.
    pub fn kill(&self) {
        // Dropping a process kills it and waits for its end.
        drop(self.process.lock().unwrap().take().expect("the server runs"));
    }

    /// Stops the server in order.
    pub fn stop(&self) {
        stop(&self.process);
    }

    /// `redis://127.0.0.1:port`.
    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// `127.0.0.1:port`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The server's answer to one command whose answer is a list of strings.
    pub fn list(&self, arguments: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut stream = self.ask(arguments);
        let mut line = String::new();
        stream.read_line(&mut line).expect("Redis answers");
        let count = line.trim_end().strip_prefix('*').and_then(|n| n.parse().ok()).expect("a list is answered");
        let mut all = Vec::with_capacity(count);
        for _ in 0..count {
            let mut line = String::new();
            stream.read_line(&mut line).expect("Redis answers");
            all.push(bytes(&mut stream, line.trim_end().strip_prefix('$').expect("a string is answered")));
        }
        all
    }

    /// The server's answer to one command: a status, an error, a number as text, or a string; nothing for a null.
    pub fn command(&self, arguments: &[&[u8]]) -> Vec<u8> {
        let mut stream = self.ask(arguments);
        let mut line = String::new();
        stream.read_line(&mut line).expect("Redis answers");
        let (kind, rest) = line.trim_end().split_at(1);
        match (kind, rest) {
            ("$", "-1") => Vec::new(),
            ("$", length) => bytes(&mut stream, length),
            ("*" | "%" | "~", _) => panic!("an answer of several parts: {line}"),
            (_, text) => text.as_bytes().to_vec(),
        }
    }

    /// Sends one command.
    fn ask(&self, arguments: &[&[u8]]) -> BufReader<TcpStream> {
        let mut stream = BufReader::new(TcpStream::connect(("127.0.0.1", self.port)).expect("Redis runs"));
        stream.get_ref().set_read_timeout(Some(START)).expect("a time-out can be set");
        let mut question = format!("*{}\r\n", arguments.len()).into_bytes();
        for argument in arguments {
            question.extend(format!("${}\r\n", argument.len()).into_bytes());
            question.extend_from_slice(argument);
            question.extend(b"\r\n");
        }
        stream.get_mut().write_all(&question).expect("Redis reads");
        stream
    }
}

/// A string of an answer, whose length was read.
fn bytes(stream: &mut BufReader<TcpStream>, length: &str) -> Vec<u8> {
    let mut bytes = vec![0; length.parse().expect("a length is a number")];
    stream.read_exact(&mut bytes).expect("Redis answers in full");
    stream.read_exact(&mut [0; 2]).expect("Redis ends a string");
    bytes
}

/// An Apicurio registry, which speaks Confluent's schema registry protocol. Keeps its schemas in memory.
pub struct SchemaRegistry {
    port: u16,
    _process: Process,
    _folder: tempfile::TempDir,
}

impl SchemaRegistry {
    /// The registry of the whole test binary.
    pub fn shared() -> &'static Self {
        static SHARED: LazyLock<SchemaRegistry> = LazyLock::new(SchemaRegistry::start);
        &SHARED
    }

    /// A registry of one's own, without schemas.
    pub fn start() -> Self {
        let apicurio = folder_from("DRIFTLINE_APICURIO", ".servers/apicurio");
        let jar = fs::read_dir(&apicurio)
            .expect("the folder can be listed")
            .map(|entry| entry.expect("the folder can be listed").path())
            .find(|path| path.to_string_lossy().ends_with("-runner.jar"))
            .unwrap_or_else(|| panic!("no *-runner.jar in {}: run `make setup`", apicurio.display()));
        let folder = data_folder();
        let port = free_port();
        let mut command = Command::new("java");
        command.args(["-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dquarkus.http.host=127.0.0.1"]);
        command.arg(format!("-Dquarkus.http.port={port}")).arg("-jar").arg(jar).current_dir(folder.path());
        let mut process = Process::spawn("Apicurio", command, folder.path().join("server.log"));
        process.until("it answers", || {
            ask(port, b"GET /apis/ccompat/v7/subjects HTTP/1.0\r\nHost: localhost\r\n\r\n").contains(" 200 ")
        });
        Self { port, _process: process, _folder: folder }
    }

    /// Address for `[broker] schema_registry`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/apis/ccompat/v7", self.port)
    }
}

fn stop(process: &Mutex<Option<Process>>) {
    let mut process = process.lock().unwrap().take().expect("the server runs");
    process.signal(libc::SIGTERM);
    process.end();
}

/// The first bytes that a server answers, or nothing.
fn ask(port: u16, question: &[u8]) -> String {
    let answer = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(question)?;
        let mut buffer = [0; 256];
        let n = stream.read(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..n]).into_owned())
    };
    answer().unwrap_or_default()
}

#[test]
fn kafka_keeps_what_was_acknowledged_when_it_is_killed() {
    let kafka = Kafka::start();
    let topic = kafka.topic("survives", 2);
    kafka.produce(&topic, [(0, &b"a"[..], &b"1"[..]), (1, b"b", b"2")]);
    kafka.kill();
    kafka.restart();
    assert_ne!(Kafka::shared().address(), kafka.address());
    let values: Vec<_> = kafka.consume(&topic).into_iter().map(|r| (r.partition, r.key, r.value)).collect();
    assert_eq!(values, [(0, Some(b"a".to_vec()), Some(b"1".to_vec())), (1, Some(b"b".to_vec()), Some(b"2".to_vec()))]);
}

#[test]
fn redis_keeps_what_was_acknowledged_when_it_is_killed() {
    let redis = Redis::start();
    assert_eq!(ask(redis.port, b"SET k v\r\n"), "+OK\r\n");
    redis.kill();
    redis.restart();
    assert_eq!(ask(redis.port, b"GET k\r\n"), "$1\r\nv\r\n");
    assert!(redis.url().ends_with(&redis.port.to_string()));
    assert_ne!(Redis::shared().url(), redis.url());
}

#[test]
fn the_schema_registry_lists_its_subjects() {
    assert!(SchemaRegistry::shared().url().starts_with("http://127.0.0.1:"));
}
