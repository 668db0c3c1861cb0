//! `topic`: list, create, send, tail.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::sync::Arc;

use tokio::runtime::Handle;

use super::{Failure, Outcome, load_with, open_existing, runtime, stop_on_signals};
use crate::broker::tool::{self, SendOptions, Shown, TailOptions};
use crate::broker::{self, Broker, Header, SchemaRegistry, TopicSettings};
use crate::cli::{TopicArgs, TopicCommand, WhereArgs};
use crate::config::plan::{BrokerPlan, Format, GroupProtocol, Plan};
use crate::runtime::shutdown::Stop;
use crate::source::avro::{AvroReader, AvroSchema};

/// Partitions where nobody says.
const PARTITIONS: u32 = 4;
/// How these commands name themselves to a broker.
const CLIENT: &str = "driftline-topic";

pub(super) fn run(args: &TopicArgs) -> Outcome {
    match &args.command {
        TopicCommand::Create { topic, at, sources, partitions, compacted } => {
            let (broker, plan) = open(at, Log::OrNew)?;
            if *sources {
                let plan = plan.ok_or_else(|| Failure::Usage("--sources needs --pipeline".into()))?;
                return create_inputs(&plan, broker.as_ref(), *partitions);
            }
            let default = plan.as_ref().map_or(PARTITIONS, |p| partitions_of(&p.broker));
            let settings =
                TopicSettings { partitions: partitions.unwrap_or(default), compacted: *compacted, retention_ms: None };
            let topic = topic.as_deref().unwrap_or_default();
            broker.create_topic(topic, &settings).map_err(Failure::failed)?;
            println!("topic {topic} is on {}", broker.describe());
            Ok(())
        }
        TopicCommand::List { at } => {
            let (broker, _) = open(at, Log::Existing)?;
            tool::list(broker.as_ref(), &mut std::io::stdout().lock()).map_err(Failure::failed)
        }
        TopicCommand::Send { topic, at, file, key, header } => {
            let (broker, _) = open(at, Log::Existing)?;
            let headers = header
                .iter()
                .map(|(name, value)| Header { name: name.clone(), value: value.clone().into_bytes() })
                .collect();
            let options = SendOptions { key_separator: key.clone(), headers };
            let mut lines: Box<dyn BufRead> = match file {
                Some(path) => Box::new(BufReader::new(
                    File::open(path).map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?,
                )),
                None => Box::new(BufReader::new(std::io::stdin())),
            };
            let (runtime, stop) = (runtime()?, Stop::new());
            stop_on_signals(&runtime, &stop);
            let sent = tool::send(broker.as_ref(), topic, &mut lines, &options, &stop).map_err(Failure::failed)?;
            eprintln!("{sent} records sent to {topic} on {}", broker.describe());
            Ok(())
        }
        TopicCommand::Tail { topic, at, from, partition, schema_registry, limit, follow } => {
            let from = from.parse().map_err(|e| Failure::Usage(format!("--from: {e}")))?;
            let (broker, plan) = open(at, Log::Existing)?;
            let options = TailOptions { from, partition: *partition, limit: *limit, follow: *follow };
            let (runtime, stop) = (runtime()?, Stop::new());
            stop_on_signals(&runtime, &stop);
            let mut avro = avro_reader(topic, schema_registry.as_deref(), plan.as_deref(), runtime.handle())?;
            let read = |value: &[u8]| match avro.read(value) {
                None => Shown::AsItIs,
                Some(Ok(value)) => Shown::Json(value),
                Some(Err(error)) => Shown::Broken(error),
            };
            tool::tail(broker.as_ref(), topic, &options, read, &mut std::io::stdout().lock(), &stop)
                .map(drop)
                .map_err(Failure::failed)
        }
    }
}

/// Reads Avro: framed with the registry's schemas, plain with that of the pipeline's source or labels on this topic.
pub(super) fn avro_reader(
    topic: &str,
    registry: Option<&str>,
    plan: Option<&Plan>,
    io: &Handle,
) -> Result<AvroReader, Failure> {
    let of_plan = plan.and_then(|plan| match &plan.broker {
        BrokerPlan::Kafka { schema_registry, .. } => schema_registry.as_deref(),
        BrokerPlan::Embedded { .. } => None,
    });
    let registry = match registry.filter(|url| !url.is_empty()).or(of_plan) {
        Some(url) => Some(Arc::new(SchemaRegistry::new(url, io.clone()).map_err(Failure::failed)?)),
        None => None,
    };
    let plain = plan.and_then(|plan| {
        let sources = plan.sources.iter().map(|source| (&source.topic, &source.format));
        let labels = plan.labels.iter().map(|labels| (&labels.topic, &labels.format));
        sources.chain(labels).find_map(|(read, format)| match format {
            Format::Avro { schema } if **read == *topic => AvroSchema::parse(schema).ok(),
            _ => None,
        })
    });
    Ok(AvroReader::new(registry, plain))
}

/// A broker, and the pipeline that named it.
type Place = (Arc<dyn Broker>, Option<Arc<Plan>>);

/// Whether an embedded log has to be there.
enum Log {
    Existing,
    OrNew,
}

fn open(at: &WhereArgs, log: Log) -> Result<Place, Failure> {
    let plan = at.pipeline.as_ref().map(|pipeline| load_with(pipeline, &at.set)).transpose()?;
    // A variable that is set to nothing is as good as none.
    let brokers = at.brokers.as_ref().filter(|brokers| !brokers.is_empty());
    let broker = match (&at.embedded, &plan, brokers) {
        (Some(path), _, _) => BrokerPlan::Embedded { path: path.clone(), partitions: PARTITIONS },
        (None, Some(plan), _) => plan.broker.clone(),
        (None, None, Some(brokers)) => BrokerPlan::Kafka {
            brokers: brokers.clone(),
            schema_registry: None,
            properties: Default::default(),
            partitions: PARTITIONS,
            replication: -1,
            group_protocol: GroupProtocol::default(),
        },
        (None, None, None) => {
            return Err(Failure::Usage("say where the topic is: --pipeline, --brokers or --embedded".into()));
        }
    };
    let broker = match log {
        Log::Existing => open_existing(&broker, CLIENT)?,
        Log::OrNew => broker::open(&broker, CLIENT).map_err(Failure::failed)?,
    };
    Ok((broker, plan))
}

fn partitions_of(plan: &BrokerPlan) -> u32 {
    match plan {
        BrokerPlan::Kafka { partitions, .. } | BrokerPlan::Embedded { partitions, .. } => *partitions,
    }
}

/// Creates a pipeline's source and label topics where they are missing.
pub(super) fn create_inputs(plan: &Plan, broker: &dyn Broker, partitions: Option<u32>) -> Outcome {
    let partitions = partitions.unwrap_or_else(|| partitions_of(&plan.broker));
    let sources = plan.sources.iter().map(|source| (&source.topic, source.table.is_some()));
    for (topic, compacted) in sources.chain(plan.labels.iter().map(|labels| (&labels.topic, false))) {
        let settings = TopicSettings { partitions, compacted, retention_ms: None };
        if broker.topic(topic).map_err(Failure::failed)?.is_none() {
            broker.create_topic(topic, &settings).map_err(Failure::failed)?;
            tracing::info!(%topic, partitions = settings.partitions, "created");
        }
    }
    Ok(())
}
