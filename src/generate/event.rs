//! What the generator emits: the records of `schemas/churn/`.

use std::fmt;
use std::io::Write;

use serde::{Serialize, Serializer};

/// A customer's number, from 0 in the order of joining. Written `C000042`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CustomerId(pub u32);

impl fmt::Display for CustomerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "C{:06}", self.0)
    }
}

impl Serialize for CustomerId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Formatted on the stack: this runs once or twice an event.
        let mut text = [0u8; 16];
        let mut rest = &mut text[..];
        write!(rest, "{self}").expect("a letter and at most ten digits fit into 16 bytes");
        let length = 16 - rest.len();
        serializer.serialize_str(std::str::from_utf8(&text[..length]).expect("digits are UTF-8"))
    }
}

/// A purchase, `schemas/churn/purchase.avsc`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Purchase {
    /// Who bought.
    pub customer_id: CustomerId,
    /// When, milliseconds since 1970 UTC.
    pub purchased_at: i64,
    /// Items, at least 1.
    pub quantity: i64,
    /// Price of all of them together, two decimals.
    pub amount: f64,
}

/// A login, as `[sources.logins]` of the churn pipeline declares it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Login {
    /// Who logged in.
    pub customer_id: CustomerId,
    /// When, milliseconds since 1970 UTC.
    pub logged_in_at: i64,
    /// `app` or `web`.
    pub device: &'static str,
}

/// A support contact, `schemas/churn/contact.avsc`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Contact {
    /// Who asked.
    pub customer_id: CustomerId,
    /// When, milliseconds since 1970 UTC.
    pub contacted_at: i64,
    /// `question`, `delivery`, `billing` or `complaint`.
    pub subject: &'static str,
    /// Time in the queue until somebody answered, minutes.
    pub wait_minutes: f64,
}

/// What the shop knows about a customer, `schemas/churn/customer.avsc`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profile {
    /// Whom it is about.
    pub customer_id: CustomerId,
    /// Since when it is true, milliseconds since 1970 UTC.
    pub changed_at: i64,
    /// When the account was opened, milliseconds since 1970 UTC.
    pub signed_up_at: i64,
    /// Year of birth, where it is known.
    pub born: Option<i64>,
    /// `north`, `south`, `east`, `west` or `islands`.
    pub region: &'static str,
    /// `free`, `plus` or `premium`.
    pub plan: &'static str,
    /// Since when that plan, milliseconds since 1970 UTC.
    pub plan_since: i64,
    /// Whether the customer wants the newsletter.
    pub newsletter: bool,
    /// `card`, `wallet` or `invoice`.
    pub payment: &'static str,
}

/// The end of an account: a record without a value.
#[derive(Debug, Clone, PartialEq)]
pub struct Closure {
    /// Whose.
    pub customer_id: CustomerId,
    /// When, milliseconds since 1970 UTC.
    pub closed_at: i64,
}

impl Serialize for Closure {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_unit()
    }
}

/// What became of a purchase: `[labels]` of the churn pipeline.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Label {
    /// Whom it is about.
    pub customer_id: CustomerId,
    /// The purchase's event time, milliseconds since 1970 UTC: the instant that the label is about.
    pub as_of: i64,
    /// True if the customer bought nothing in `(as_of, as_of + horizon]`.
    pub churned: bool,
    /// When that was known, milliseconds since 1970 UTC.
    pub labelled_at: i64,
}

/// One of the records.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
#[allow(missing_docs, reason = "each is named after its record")]
pub enum Payload {
    Purchase(Purchase),
    Login(Login),
    Contact(Contact),
    Profile(Profile),
    Closed(Closure),
    Label(Label),
}

/// A record on its way to its topic.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedEvent {
    /// When it reaches the log, milliseconds since 1970 UTC: the timestamp for its Kafka record. Never falls from one event to
    /// the next, and is at most [`GenerateOptions::disorder`](super::GenerateOptions::disorder) after the event time.
    pub timestamp: i64,
    /// The record.
    pub payload: Payload,
}

impl GeneratedEvent {
    /// Names the source of the churn pipeline that it belongs to: `purchases`, `logins`, `support`; its table,
    /// `profile`; or `labels`.
    pub fn source(&self) -> &'static str {
        match self.payload {
            Payload::Purchase(_) => "purchases",
            Payload::Login(_) => "logins",
            Payload::Contact(_) => "support",
            Payload::Profile(_) | Payload::Closed(_) => "profile",
            Payload::Label(_) => "labels",
        }
    }

    /// Names the customer: the record's key.
    pub fn customer(&self) -> CustomerId {
        match &self.payload {
            Payload::Purchase(p) => p.customer_id,
            Payload::Login(l) => l.customer_id,
            Payload::Contact(c) => c.customer_id,
            Payload::Profile(p) => p.customer_id,
            Payload::Closed(c) => c.customer_id,
            Payload::Label(l) => l.customer_id,
        }
    }

    /// Tells when it happened, milliseconds since 1970 UTC; of a label, when it was known.
    pub fn event_time(&self) -> i64 {
        match &self.payload {
            Payload::Purchase(p) => p.purchased_at,
            Payload::Login(l) => l.logged_in_at,
            Payload::Contact(c) => c.contacted_at,
            Payload::Profile(p) => p.changed_at,
            Payload::Closed(c) => c.closed_at,
            Payload::Label(l) => l.labelled_at,
        }
    }

    /// True of a record without a value, which ends what its key's records before it said.
    pub fn is_tombstone(&self) -> bool {
        matches!(self.payload, Payload::Closed(_))
    }

    /// Appends the record as one JSON object, or null where it has no value.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        serde_json::to_writer(out, &self.payload).expect("records hold no maps and no non-finite numbers");
    }

    /// Gives the record as a JSON value, for encoders that start from one; null where it has no value.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(&self.payload).expect("records hold no maps and no non-finite numbers")
    }
}
