//! Generated events into a pipeline's topics, in its formats.

use std::sync::Arc;

use super::GeneratedEvent;
use crate::broker::{Broker, BrokerError, Offsets, OutRecord, Producer, SchemaRegistry};
use crate::config::plan::{Format, Plan};
use crate::source::avro::{AvroEncoder, AvroSchema, EncodeError};

/// Why events cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FeedError {
    /// The log.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The pipeline is not the churn pipeline.
    #[error(
        "pipeline '{pipeline}' has no source '{source_name}': generated events are a shop's purchases, logins, support contacts and customers (a table, `profile`), as pipelines/churn declares them"
    )]
    NoSource {
        /// Pipeline.
        pipeline: String,
        /// Source.
        source_name: &'static str,
    },
    /// A source's schema is not what events are made for.
    #[error("source '{source_name}': {reason}")]
    Schema {
        /// Source.
        source_name: &'static str,
        /// What does not fit.
        reason: String,
    },
}

/// Which time a record is stamped with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stamp {
    /// The present; a record without a value has the made-up world's all the same, for it has no other instant.
    Now,
    /// When it reaches the log in the made-up world.
    Stream,
}

struct Route {
    source: &'static str,
    topic: Arc<str>,
    avro: Option<AvroEncoder>,
}

/// Writes events.
pub struct Feed {
    producer: Box<dyn Producer>,
    routes: Vec<Route>,
    stamp: Stamp,
    sent: u64,
    value: Vec<u8>,
}

impl Feed {
    /// Finds each source's topic and encoder. Schemas are registered where the pipeline has a schema registry.
    ///
    /// # Errors
    /// A source that the pipeline lacks, a schema that does not parse, a broker or registry that does not answer.
    pub fn open(
        plan: &Plan,
        broker: &dyn Broker,
        registry: Option<&SchemaRegistry>,
        stamp: Stamp,
    ) -> Result<Self, FeedError> {
        let mut routes = Vec::new();
        for source in ["purchases", "logins", "support", "profile", "labels"] {
            let found = if source == "labels" {
                plan.labels.as_ref().map(|l| (Arc::clone(&l.topic), &l.format))
            } else {
                plan.sources.iter().find(|s| s.name.as_ref() == source).map(|s| (Arc::clone(&s.topic), &s.format))
            };
            let Some((topic, format)) = found else {
                return Err(FeedError::NoSource { pipeline: plan.name.clone(), source_name: source });
            };
            let avro = match format {
                Format::Json => None,
                Format::Protobuf { .. } => {
                    let reason = "made-up events are JSON or Avro, not Protobuf".to_owned();
                    return Err(FeedError::Schema { source_name: source, reason });
                }
                Format::Avro { schema } => {
                    let parsed = AvroSchema::parse(schema)
                        .map_err(|e| FeedError::Schema { source_name: source, reason: e.to_string() })?;
                    Some(match registry {
                        Some(registry) => {
                            AvroEncoder::framed(parsed, registry.register(&format!("{topic}-value"), schema)?)
                        }
                        None => AvroEncoder::plain(parsed),
                    })
                }
            };
            routes.push(Route { source, topic, avro });
        }
        Ok(Self { producer: broker.producer(None)?, routes, stamp, sent: 0, value: Vec::new() })
    }

    /// Hands an event over.
    ///
    /// # Errors
    /// An event that the schema cannot hold, or the log's.
    pub fn send(&mut self, event: &GeneratedEvent) -> Result<(), FeedError> {
        let source = event.source();
        let route = self.routes.iter().find(|r| r.source == source).expect("all are there since `open`");
        self.value.clear();
        match &route.avro {
            _ if event.is_tombstone() => {}
            None => event.write_json(&mut self.value),
            Some(encoder) => {
                encoder
                    .encode(&event.to_json(), &mut self.value)
                    .map_err(|e: EncodeError| FeedError::Schema { source_name: route.source, reason: e.to_string() })?;
            }
        }
        let key = event.customer().to_string();
        self.producer.send(OutRecord {
            topic: &route.topic,
            key: Some(key.as_bytes()),
            value: (!event.is_tombstone()).then_some(&self.value),
            timestamp: (self.stamp == Stamp::Stream || event.is_tombstone()).then_some(event.timestamp),
            ..OutRecord::default()
        })?;
        self.sent += 1;
        Ok(())
    }

    /// Waits until all that was handed over is in the log.
    ///
    /// # Errors
    /// The log's.
    pub fn flush(&mut self) -> Result<(), FeedError> {
        Ok(self.producer.commit(&Offsets::new(), None)?)
    }

    /// Events handed over so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }
}
