//! Scoring, monitoring, retraining: what is done with the features.

use super::features::Features;
use super::{reference, some_duration, topic_like, unit};
use crate::config::document::{Collector, Site};
use crate::config::plan::{Column, DataType, GatesPlan, MonitorPlan, MonitorWindow, RetrainingPlan, ScorePlan};
use crate::config::spec::{MonitorSpec, RetrainingSpec, ScoreSpec, Spec};
use crate::config::{defaults, names, units};
use crate::retrain::policy::Policy;

pub(super) struct Model {
    pub(super) score: Option<ScorePlan>,
    pub(super) monitor: Option<MonitorPlan>,
    pub(super) retraining: Option<RetrainingPlan>,
}

pub(super) fn model(spec: &Spec, root: &Site<'_>, features: &Features, faults: &mut Collector) -> Model {
    let score = spec.score.as_ref().and_then(|score| score_plan(spec, score, &root.get("score"), features, faults));
    if spec.score.is_none() && spec.monitor.is_some() {
        let help = "say what predicts: [score] with on and model";
        faults.report(
            &root.get("monitor").key(),
            "[monitor] watches predictions, and there is no [score]",
            Some(help.into()),
        );
    }
    if spec.retraining.is_some() {
        let missing = [
            (spec.score.is_none(), "score", "it retrains the model of [score]"),
            (spec.monitor.is_none(), "monitor", "it follows the verdicts of [monitor]"),
            (spec.labels.is_none(), "labels", "it trains on [labels]"),
        ];
        for (_, table, why) in missing.into_iter().filter(|(missing, _, _)| *missing) {
            let message = format!("[retraining] needs [{table}]");
            faults.report(&root.get("retraining").key(), message, Some(why.into()));
        }
    }
    let monitor = spec
        .monitor
        .as_ref()
        .map(|monitor| monitor_plan(&spec.name, monitor, score.as_ref(), &root.get("monitor"), features, faults));
    let retraining = spec
        .retraining
        .as_ref()
        .map(|retraining| retraining_plan(&spec.name, retraining, &root.get("retraining"), faults));
    Model { score, monitor, retraining }
}

fn score_plan(
    spec: &Spec,
    score: &ScoreSpec,
    site: &Site<'_>,
    features: &Features,
    faults: &mut Collector,
) -> Option<ScorePlan> {
    let place = site.get("on");
    // In the order of the drafts.
    let sources = spec.sources.keys().chain(spec.rekey.keys()).map(String::as_str);
    let on = reference(&score.on, "source", sources, &place, faults);
    topic_like(&score.model, "model", &site.get("model"), faults);
    topic_like(&score.alias, "alias", &site.get("alias"), faults);
    if score.providers.is_empty() {
        let help = "list at least the one that is always there: [\"cpu\"]";
        faults.report(&site.get("providers").key(), "`providers` is empty", Some(help.into()));
    }
    let batch = site.get("batch");
    let features = model_features(score, site, features, faults);
    Some(ScorePlan {
        on: spec.tables.len() + on?,
        model: score.model.clone(),
        alias: score.alias.clone(),
        features,
        batch_rows: score.batch.rows as usize,
        batch_bytes: unit(units::size(&score.batch.bytes), &batch.get("bytes"), faults).unwrap_or(1),
        batch_wait: super::duration(&score.batch.wait, &batch.get("wait"), faults),
        poll_alias: some_duration(&score.poll_alias, &site.get("poll_alias"), faults),
        delivery: score.delivery,
        emit: score.emit,
        topic: format!("{}.predictions", spec.name).into(),
        providers: score.providers.iter().map(|provider| provider.as_str().to_owned()).collect(),
        threads: score.threads as usize,
    })
}

/// The model's inputs: as listed, or all that a model can take but for those that are excluded.
fn model_features(score: &ScoreSpec, site: &Site<'_>, features: &Features, faults: &mut Collector) -> Vec<String> {
    let takes = |column: &Column| matches!(column.data_type, DataType::Int64 | DataType::Float64 | DataType::Boolean);
    let Some(listed) = &score.features else {
        excluded(&score.exclude, &site.get("exclude"), features, faults);
        let inputs = features.columns().iter().filter(|column| takes(column)).map(|column| column.name.to_string());
        let (out, all): (Vec<_>, Vec<_>) = inputs.partition(|name| score.exclude.contains(name));
        if all.is_empty() && !out.is_empty() {
            faults.report(&site.get("exclude").key(), "`exclude` leaves the model no input", None);
        } else if all.is_empty() && !features.columns().is_empty() {
            let message = "none of the features is a number or a boolean, which is what a model takes";
            faults.report(&site.key(), message, None);
        }
        return all;
    };
    if !score.exclude.is_empty() {
        let help = "the list says already which they are: leave one of the two out";
        faults.report(&site.get("exclude").key(), "`exclude` beside a list of `features`", Some(help.into()));
    }
    let site = &site.get("features");
    if listed.is_empty() {
        let help = "list the model's inputs, or leave it out for all features";
        faults.report(&site.key(), "`features` is empty", Some(help.into()));
    }
    for (index, name) in listed.iter().enumerate() {
        let site = site.item(index);
        if listed[..index].contains(name) {
            faults.report(&site.value(), format!("feature `{name}` is listed twice"), None);
            continue;
        }
        if let Some(column) = features.find(name, &site, faults)
            && !takes(column)
        {
            let help = match column.data_type {
                DataType::Timestamp => "derive the seconds since then: extract(epoch from …)",
                DataType::List(_) => "ask for a number of the same events: last, mean, p50, slope, …",
                _ => "derive a number from it: case … when … then 1 else 0 end",
            };
            let message = format!("a model takes numbers and booleans, and `{name}` is of type {}", column.data_type);
            faults.report(&site.value(), message, Some(help.into()));
        }
    }
    listed.clone()
}

/// Reports features to leave out that do not exist, or are named twice.
fn excluded(names: &[String], site: &Site<'_>, features: &Features, faults: &mut Collector) {
    for (index, name) in names.iter().enumerate() {
        let site = site.item(index);
        if names[..index].contains(name) {
            faults.report(&site.value(), format!("feature `{name}` is listed twice"), None);
        } else {
            features.find(name, &site, faults);
        }
    }
}

fn monitor_plan(
    pipeline: &str,
    spec: &MonitorSpec,
    score: Option<&ScorePlan>,
    site: &Site<'_>,
    features: &Features,
    faults: &mut Collector,
) -> MonitorPlan {
    let window_site = site.get("window");
    let window = match (spec.window.rows, &spec.window.time) {
        (Some(_), Some(_)) => {
            let help = "keep one of the two";
            faults.report(&window_site.key(), "a window closes for `rows` or for `time`, not both", Some(help.into()));
            MonitorWindow::Rows(defaults::monitor_rows())
        }
        (None, Some(time)) => MonitorWindow::Time(some_duration(time, &window_site.get("time"), faults)),
        (rows, None) => MonitorWindow::Rows(rows.unwrap_or(defaults::monitor_rows())),
    };
    if !(spec.alpha > 0.0 && spec.alpha < 1.0) {
        let help = "0.05 lets one run of windows in twenty raise a false alarm";
        faults.report(&site.get("alpha").value(), "`alpha` is a probability between 0 and 1", Some(help.into()));
    }
    if spec.tolerance <= 0.0 {
        let help = "with no tolerance every difference is drift once there are enough rows; 0.02 is a small shift";
        faults.report(&site.get("tolerance").value(), "`tolerance` has to be above 0", Some(help.into()));
    }
    let inputs = score.map(|score| score.features.as_slice()).unwrap_or_default();
    let watched = match &spec.features {
        None => inputs.to_vec(),
        Some(listed) => {
            for (index, name) in listed.iter().enumerate() {
                let site = site.get("features").item(index);
                if listed[..index].contains(name) {
                    faults.report(&site.value(), format!("feature `{name}` is listed twice"), None);
                } else if score.is_some() && !inputs.contains(name) && features.find(name, &site, faults).is_some() {
                    let help = names::suggestion(name, "inputs", inputs.iter().map(String::as_str));
                    faults.report(&site.value(), format!("feature `{name}` is not one of the model's inputs"), help);
                }
            }
            listed.clone()
        }
    };
    MonitorPlan {
        window,
        features: watched,
        warm_up: super::duration(&spec.warm_up, &site.get("warm_up"), faults),
        alpha: spec.alpha,
        horizon_windows: spec.horizon_windows,
        tolerance: spec.tolerance,
        resolve_after: spec.resolve_after,
        topic: format!("{pipeline}.drift").into(),
        state_topic: format!("{pipeline}.monitor-state").into(),
    }
}

fn retraining_plan(pipeline: &str, spec: &RetrainingSpec, site: &Site<'_>, faults: &mut Collector) -> RetrainingPlan {
    if let Err(error) = Policy::parse(&spec.when) {
        let at = spec.when.char_indices().nth(error.column - 1).map_or(spec.when.len(), |(at, _)| at);
        let end = spec.when[at..].find(char::is_whitespace).map_or(spec.when.len(), |length| at + length);
        faults.report(&site.get("when").text(at..end), error.problem, Some(format!("such as {}", defaults::when())));
    }
    if spec.command.first().is_none_or(|program| program.trim().is_empty()) {
        let help = "the program and its arguments: [\"python3\", \"pipelines/churn/train.py\"]";
        faults.report(&site.get("command").key(), "the training command is empty", Some(help.into()));
    }
    let gates_site = site.get("gates");
    if spec.gates.max_ece.is_some_and(|ece| !(ece > 0.0 && ece <= 1.0)) {
        faults.report(&gates_site.get("max_ece").value(), "a calibration error is between 0 and 1", None);
    }
    let max_latency =
        spec.gates.max_latency.as_deref().map(|text| some_duration(text, &gates_site.get("max_latency"), faults));
    RetrainingPlan {
        when: spec.when.clone(),
        cooldown: super::duration(&spec.cooldown, &site.get("cooldown"), faults),
        command: spec.command.clone(),
        timeout: some_duration(&spec.timeout, &site.get("timeout"), faults),
        lookback: some_duration(&spec.lookback, &site.get("lookback"), faults),
        fresh_labels: usize::try_from(spec.fresh_labels).unwrap_or(usize::MAX),
        gates: GatesPlan {
            metric: spec.gates.metric.as_str().to_owned(),
            min_gain: spec.gates.min_gain,
            threshold: spec.gates.threshold,
            max_ece: spec.gates.max_ece,
            max_latency,
        },
        topic: format!("{pipeline}.retraining").into(),
        audit_topic: format!("{pipeline}.audit").into(),
    }
}
