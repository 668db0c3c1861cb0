//! librdkafka's event queues, read directly.
//!
//! The safe consumer names only the partition number of an end-of-partition event, not its topic, and allocates for every
//! record. Several sources are consumed together here, and 'is this partition at its end' must have an answer that knows
//! transaction markers, so this file takes the events as librdkafka hands them out. All unsafe code of the adapter that
//! touches events is in this file.

use std::ffi::CStr;
use std::os::raw::{c_char, c_int};
use std::ptr::{self, NonNull};
use std::time::Duration;

use rdkafka::bindings as native;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::types::RDKafka;

use crate::broker::Header;

/// A queue of events. Must be dropped before the client that it belongs to.
pub(super) struct EventQueue(NonNull<native::rd_kafka_queue_t>);

// SAFETY: librdkafka's queues are thread safe.
unsafe impl Send for EventQueue {}

impl EventQueue {
    /// The queue with a consumer's records, ends of partitions, rebalances, errors and log lines.
    ///
    /// # Safety
    /// `client` is a live consumer client and outlives the queue.
    pub(super) unsafe fn of_consumer(client: *mut RDKafka) -> Self {
        // SAFETY: the caller vouches for the client.
        let queue = unsafe { native::rd_kafka_queue_get_consumer(client) };
        Self(NonNull::new(queue).expect("a client with a group has a consumer queue"))
    }

    /// A new queue for answers to one request.
    ///
    /// # Safety
    /// `client` is a live client and outlives the queue.
    pub(super) unsafe fn for_answers(client: *mut RDKafka) -> Self {
        // SAFETY: the caller vouches for the client.
        let queue = unsafe { native::rd_kafka_queue_new(client) };
        Self(NonNull::new(queue).expect("librdkafka aborts rather than fail to allocate"))
    }

    /// The native queue.
    pub(super) fn as_ptr(&self) -> *mut native::rd_kafka_queue_t {
        self.0.as_ptr()
    }

    /// Waits at most `wait`, rounded up to milliseconds, for the next event.
    pub(super) fn next(&self, wait: Duration) -> Option<Event> {
        let wait = wait.as_nanos().div_ceil(1_000_000).min(60_000);
        let wait = c_int::try_from(wait).expect("a minute fits");
        // SAFETY: the queue is live, and the event is owned by whoever polled it.
        NonNull::new(unsafe { native::rd_kafka_queue_poll(self.0.as_ptr(), wait) }).map(Event)
    }
}

impl Drop for EventQueue {
    fn drop(&mut self) {
        // SAFETY: this handle is a reference of its own.
        unsafe { native::rd_kafka_queue_destroy(self.0.as_ptr()) };
    }
}

/// What an event says.
pub(super) enum Said<'e> {
    /// A record.
    Record(Message<'e>),
    /// The fetcher has reached the end of a partition: topic, partition, end (exclusive).
    End(String, i32, i64),
    /// The group gives these partitions: topic, partition.
    Assign(Vec<(String, i32)>),
    /// The group takes these partitions back: in a classic group all there are.
    Revoke(Vec<(String, i32)>),
    /// Something failed.
    Error(Fault),
    /// A commit is answered, with success or the reason.
    Committed(RDKafkaErrorCode),
    /// A line for the log: level as in syslog, facility, text.
    Log(i32, String, String),
    /// Nothing that matters here.
    Other,
}

/// A failure that the client reports on its own.
pub(super) struct Fault {
    /// Code.
    pub(super) code: RDKafkaErrorCode,
    /// True where the client is of no use any more.
    pub(super) fatal: bool,
    /// The client's words.
    pub(super) reason: String,
    /// Topic, partition and offset, where it is about one.
    pub(super) partition: Option<(String, i32, i64)>,
}

/// An event, released when dropped.
pub(super) struct Event(NonNull<native::rd_kafka_event_t>);

impl Event {
    /// Reads the event. Records can be taken from it once.
    pub(super) fn said(&self) -> Said<'_> {
        let event = self.0.as_ptr();
        // SAFETY: the event is live until `self` is dropped; each accessor is called for the type it is defined for.
        unsafe {
            match native::rd_kafka_event_type(event) {
                native::RD_KAFKA_EVENT_FETCH => match native::rd_kafka_event_message_next(event).as_ref() {
                    Some(message) => Said::Record(Message(message)),
                    None => Said::Other,
                },
                native::RD_KAFKA_EVENT_ERROR => {
                    let code = RDKafkaErrorCode::from(native::rd_kafka_event_error(event));
                    let partition = partition_of(event);
                    if let (RDKafkaErrorCode::PartitionEOF, Some((topic, partition, end))) = (code, &partition) {
                        return Said::End(topic.clone(), *partition, *end);
                    }
                    Said::Error(Fault {
                        code,
                        fatal: native::rd_kafka_event_error_is_fatal(event) != 0,
                        reason: text(native::rd_kafka_event_error_string(event)),
                        partition,
                    })
                }
                native::RD_KAFKA_EVENT_REBALANCE => match RDKafkaErrorCode::from(native::rd_kafka_event_error(event)) {
                    RDKafkaErrorCode::AssignPartitions => Said::Assign(partitions_of(event)),
                    _ => Said::Revoke(partitions_of(event)),
                },
                native::RD_KAFKA_EVENT_OFFSET_COMMIT => {
                    Said::Committed(RDKafkaErrorCode::from(native::rd_kafka_event_error(event)))
                }
                native::RD_KAFKA_EVENT_LOG => {
                    let (mut facility, mut line, mut level) = (ptr::null(), ptr::null(), 0);
                    match native::rd_kafka_event_log(event, &raw mut facility, &raw mut line, &raw mut level) {
                        0 => Said::Log(level, text(facility), text(line)),
                        _ => Said::Other,
                    }
                }
                _ => Said::Other,
            }
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event was polled, is owned by `self`, and nothing borrowed from it outlives `self`.
        unsafe { native::rd_kafka_event_destroy(self.0.as_ptr()) };
    }
}

/// # Safety
/// `text` is null or a live C string.
unsafe fn text(text: *const c_char) -> String {
    // SAFETY: the caller vouches for it.
    if text.is_null() { String::new() } else { unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned() }
}

/// # Safety
/// `event` is live.
unsafe fn partition_of(event: *mut native::rd_kafka_event_t) -> Option<(String, i32, i64)> {
    // SAFETY: librdkafka returns null or a structure that the caller destroys.
    unsafe {
        let named = native::rd_kafka_event_topic_partition(event);
        let found = named.as_ref().map(|p| (text(p.topic), p.partition, p.offset));
        if !named.is_null() {
            native::rd_kafka_topic_partition_destroy(named);
        }
        found
    }
}

/// # Safety
/// `event` is a live rebalance event.
unsafe fn partitions_of(event: *mut native::rd_kafka_event_t) -> Vec<(String, i32)> {
    // SAFETY: the list belongs to the event and holds `cnt` elements.
    unsafe {
        let Some(list) = native::rd_kafka_event_topic_partition_list(event).as_ref() else { return Vec::new() };
        let count = usize::try_from(list.cnt).expect("a count is not negative");
        (0..count).map(|i| &*list.elems.add(i)).map(|p| (text(p.topic), p.partition)).collect()
    }
}

/// A record inside its event.
#[derive(Clone, Copy)]
pub(super) struct Message<'e>(&'e native::rd_kafka_message_t);

/// Identity of a topic within one client: cheap to compare, never read through.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct TopicId(*mut native::rd_kafka_topic_t);

impl<'e> Message<'e> {
    /// Which topic, cheaply.
    pub(super) fn topic_id(self) -> TopicId {
        TopicId(self.0.rkt)
    }

    /// The topic's name.
    pub(super) fn topic(self) -> &'e str {
        // SAFETY: the message holds a reference to its topic, whose name lives as long.
        let name = unsafe { CStr::from_ptr(native::rd_kafka_topic_name(self.0.rkt)) };
        name.to_str().expect("Kafka allows ASCII topic names only")
    }

    /// Partition number.
    pub(super) fn partition(self) -> i32 {
        self.0.partition
    }

    /// Offset.
    pub(super) fn offset(self) -> i64 {
        self.0.offset
    }

    /// Milliseconds since 1970 UTC, or −1.
    pub(super) fn timestamp(self) -> i64 {
        let mut kind = native::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_NOT_AVAILABLE;
        // SAFETY: the message is live.
        unsafe { native::rd_kafka_message_timestamp(self.0, &raw mut kind) }
    }

    /// Key.
    pub(super) fn key(self) -> Option<&'e [u8]> {
        // SAFETY: the message holds its key as long as the event lives.
        unsafe { bytes(self.0.key.cast(), self.0.key_len) }
    }

    /// Value.
    pub(super) fn value(self) -> Option<&'e [u8]> {
        // SAFETY: the message holds its payload as long as the event lives.
        unsafe { bytes(self.0.payload.cast(), self.0.len) }
    }

    /// Headers; mostly none.
    pub(super) fn headers(self) -> Vec<Header> {
        let mut list = ptr::null_mut();
        let mut headers = Vec::new();
        // SAFETY: the message is live and keeps the list; librdkafka fills the three out-parameters while it answers
        // without error, and name and value live as long as the list.
        unsafe {
            if RDKafkaErrorCode::from(native::rd_kafka_message_headers(self.0, &raw mut list))
                != RDKafkaErrorCode::NoError
            {
                return headers;
            }
            let (mut name, mut value, mut size) = (ptr::null(), ptr::null(), 0);
            loop {
                let (n, v, s) = (&raw mut name, &raw mut value, &raw mut size);
                let found = native::rd_kafka_header_get_all(list, headers.len(), n, v, s);
                if RDKafkaErrorCode::from(found) != RDKafkaErrorCode::NoError {
                    break;
                }
                let value = bytes(value.cast(), size).unwrap_or_default().to_vec();
                headers.push(Header { name: text(name), value });
            }
        }
        headers
    }
}

/// # Safety
/// `data` is null or points at `len` bytes that live as long as `'e`.
unsafe fn bytes<'e>(data: *const u8, len: usize) -> Option<&'e [u8]> {
    // SAFETY: the caller vouches for it.
    (!data.is_null()).then(|| unsafe { std::slice::from_raw_parts(data, len) })
}
