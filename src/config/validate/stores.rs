//! The log, the stores and the registry: where things are.

use std::path::Path;

use super::{Folders, some_duration, unit};
use crate::broker::kafka::{OF_CLASSIC_GROUPS, PROTECTED};
use crate::config::defaults;
use crate::config::document::{Collector, Site};
use crate::config::plan::{BrokerPlan, GroupProtocol, OfflinePlan, OnlinePlan, RegistryPlan, StatePlan};
use crate::config::spec::{OnlineSpec, Spec};
use crate::config::units;

pub(super) struct Stores {
    pub(super) broker: BrokerPlan,
    pub(super) online: OnlinePlan,
    pub(super) offline: OfflinePlan,
    pub(super) state: StatePlan,
    pub(super) registry: RegistryPlan,
}

pub(super) fn stores(spec: &Spec, root: &Site<'_>, folders: &Folders<'_>, faults: &mut Collector) -> Stores {
    if !spec.offline.rows && spec.retraining.is_some() {
        let help = "retraining learns from them: leave `rows` out, or [retraining]";
        faults.report(&root.get("offline").get("rows").value(), "the offline files lack rows", Some(help.into()));
    }
    if !spec.online.enabled && !spec.lookups.is_empty() {
        let help = "[lookups] read it: leave `enabled` out, or [lookups]";
        faults.report(&root.get("online").get("enabled").value(), "there is no online store", Some(help.into()));
    }
    let offline = root.get("offline");
    let checkpoint = offline.get("checkpoint");
    let registry = root.get("registry");
    Stores {
        broker: broker(spec, &root.get("broker"), folders.root, faults),
        online: online(spec, &spec.online, &root.get("online"), folders.root, faults),
        offline: OfflinePlan {
            url: url(&spec.offline.url, &offline.get("url"), folders.root, false, faults),
            rows: spec.offline.rows,
            checkpoint_interval: some_duration(&spec.offline.checkpoint.interval, &checkpoint.get("interval"), faults),
            checkpoint_rows: usize::try_from(spec.offline.checkpoint.rows).unwrap_or(usize::MAX),
        },
        state: StatePlan {
            memory: given(spec.state.memory.as_deref())
                .and_then(|memory| unit(units::size(memory), &root.get("state").get("memory"), faults)),
            path: folders.root.join(&spec.state.path),
        },
        registry: RegistryPlan {
            url: url(&spec.registry.url, &registry.get("url"), folders.root, true, faults),
            initial: spec.registry.initial.as_deref().filter(|p| !p.is_empty()).map(|p| folders.pipeline.join(p)),
        },
    }
}

/// A text that counts as absent where it is empty, as it is where an environment variable is not set.
fn given(text: Option<&str>) -> Option<&str> {
    text.map(str::trim).filter(|text| !text.is_empty())
}

/// Folder of the embedded log.
fn log_path(spec: &Spec) -> String {
    given(spec.broker.path.as_deref()).map_or_else(|| defaults::embedded_path(&spec.name), str::to_owned)
}

fn broker(pipeline: &Spec, site: &Site<'_>, root: &Path, faults: &mut Collector) -> BrokerPlan {
    let spec = &pipeline.broker;
    let properties = site.get("properties");
    for name in spec.properties.keys().filter(|name| PROTECTED.contains(&name.as_str())) {
        let help = "driftline sets it, to keep its guarantees";
        let place = properties.get(name).key().secret();
        faults.report(&place, format!("Kafka property `{name}` cannot be set"), Some(help.into()));
    }
    if spec.group_protocol == GroupProtocol::Consumer {
        for name in spec.properties.keys().filter(|name| OF_CLASSIC_GROUPS.contains(&name.as_str())) {
            let help = format!("set group.consumer.{name} on the brokers, or group_protocol = \"classic\"");
            let place = properties.get(name).key().secret();
            faults.report(&place, format!("`{name}` is the brokers' with group_protocol = \"consumer\""), Some(help));
        }
    }
    let schema_registry = given(spec.schema_registry.as_deref());
    if let Some(address) = schema_registry
        && !matches!(url::Url::parse(address), Ok(url) if matches!(url.scheme(), "http" | "https"))
    {
        let help = "write http://host:8081 or https://…";
        faults.report(
            &site.get("schema_registry").value(),
            format!("`{address}` is not a web address"),
            Some(help.into()),
        );
    }
    let Some(brokers) = given(spec.brokers.as_deref()) else {
        return BrokerPlan::Embedded { path: root.join(log_path(pipeline)), partitions: spec.partitions };
    };
    for server in brokers.split(',').map(str::trim) {
        let port = server.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>()));
        if !matches!(port, Some((host, Ok(1..))) if !host.is_empty() && !host.contains("//")) {
            let help = "write host:port, several separated by commas: kafka-1:9092,kafka-2:9092";
            faults.report(
                &site.get("brokers").value(),
                format!("`{server}` is not a Kafka server's address"),
                Some(help.into()),
            );
        }
    }
    if spec.replication == 0 {
        let help = "-1 leaves it to the cluster";
        faults.report(&site.get("replication").value(), "a topic has at least one replica", Some(help.into()));
    }
    BrokerPlan::Kafka {
        brokers: brokers.to_owned(),
        schema_registry: schema_registry.map(str::to_owned),
        properties: spec.properties.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        partitions: spec.partitions,
        replication: spec.replication,
        group_protocol: spec.group_protocol,
    }
}

fn online(spec: &Spec, online: &OnlineSpec, site: &Site<'_>, root: &Path, faults: &mut Collector) -> OnlinePlan {
    if !online.enabled {
        return OnlinePlan::Off;
    }
    let project = given(online.project.as_deref()).unwrap_or(&spec.name).to_owned();
    let ttl = given(online.ttl.as_deref()).map(|ttl| some_duration(ttl, &site.get("ttl"), faults));
    let Some(redis) = given(online.redis.as_ref().map(|url| url.0.as_str())) else {
        let path = root.join(given(online.path.as_deref()).map_or_else(|| log_path(spec), str::to_owned));
        return OnlinePlan::Embedded { path, project };
    };
    let scheme = redis.split_once("://").map(|(scheme, _)| scheme).unwrap_or_default();
    let known = ["redis", "rediss", "valkey", "valkeys"]
        .iter()
        .any(|name| scheme.strip_prefix(name).is_some_and(|kind| matches!(kind, "" | "-cluster" | "-sentinel")));
    if !known || url::Url::parse(redis).is_err() {
        let help = "write redis://host:6379, rediss://… for TLS, or redis-cluster://…";
        faults.report(&site.get("redis").value().secret(), "this is not the URL of a Redis", Some(help.into()));
    }
    OnlinePlan::Redis { url: crate::config::plan::Secret(redis.to_owned()), project, ttl }
}

/// A store's URL. A relative folder, `file://./data`, starts at the project's root; it comes out absolute.
fn url(text: &str, site: &Site<'_>, root: &Path, folders_only: bool, faults: &mut Collector) -> String {
    const HELP: &str = "write file://./data (from the project's root) or file:///var/lib/driftline";
    let text = text.trim();
    if let Some(path) = text.strip_prefix("file://") {
        if path.is_empty() {
            faults.report(&site.value(), "the URL names no folder", Some(HELP.into()));
            return text.to_owned();
        }
        if path.starts_with('/') {
            return text.to_owned();
        }
        let folder = root.join(path.strip_prefix("./").unwrap_or(path));
        let folder: std::path::PathBuf = folder.components().collect();
        return url::Url::from_file_path(folder).map_or_else(|()| text.to_owned(), |url| url.to_string());
    }
    let parsed = url::Url::parse(text);
    match parsed {
        Ok(_) if !folders_only => {}
        Ok(url) => {
            let message = format!("a registry is a folder, and `{}://` names none", url.scheme());
            faults.report(&site.value(), message, Some(HELP.into()));
        }
        Err(_) => faults.report(&site.value(), format!("`{text}` is not a URL"), Some(HELP.into())),
    }
    text.to_owned()
}
