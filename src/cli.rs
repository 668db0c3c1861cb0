//! The command line: arguments as the user writes them. What they do is in [`crate::command`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::units;
use crate::generate::Shift;
use crate::telemetry::log::LogFormat;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default())
    .placeholder(AnsiColor::Cyan.on_default());

const AFTER: &str = "\
Start here:
  driftline demo                              the whole loop in two minutes, no servers
  driftline check pipelines/churn             is the definition right, and what will it do
  driftline run pipelines/churn               events in, predictions out

Without [broker] and [online] (or with their environment variables unset) a pipeline runs on an embedded log and store.

Exit codes: 0 done or stopped cleanly, 1 failed, 2 wrong usage or definition, 130 stopped by a second Ctrl-C.";

/// Kafka topics in; fresh features, predictions and retraining out: one definition, one engine, one answer.
#[derive(Debug, Parser)]
#[command(name = "driftline", version, styles = STYLES, after_help = AFTER, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// How log lines on standard error look.
    #[arg(
        long,
        global = true,
        value_enum,
        default_value = "human",
        env = "DRIFTLINE_LOG_FORMAT",
        help_heading = "Logging"
    )]
    pub log_format: LogFormat,

    /// Which log lines to write: a level (error, warn, info, debug, trace) or a filter such as `info,driftline::drift=debug`.
    #[arg(long, global = true, default_value = "info", env = "DRIFTLINE_LOG", help_heading = "Logging")]
    pub log: String,
}

/// All commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run all stages in one process: features, scoring, drift monitor and retraining.
    Run(RunArgs),
    /// Run the feature stage alone: events to the online store, the offline files and the features topic.
    Features(RunArgs),
    /// Run the scoring stage alone: the features topic to the predictions topic.
    Score(RunArgs),
    /// Run the drift monitor alone: the predictions topic to the drift and retraining topics.
    Drift(RunArgs),
    /// Run the retrain worker alone: the retraining topic to new model versions.
    Retrain(RetrainArgs),
    /// Check a pipeline's definition: all faults at once, then the plan.
    Check(CheckArgs),
    /// Make a realistic stream of events for the churn pipeline.
    Generate(GenerateArgs),
    /// Write the rows of a file (JSON lines, CSV, Parquet, Avro) into a source's topic.
    Replay(ReplayArgs),
    /// List, create, fill and read topics, on Kafka or the embedded log.
    Topic(TopicArgs),
    /// List, show and replay the records that a pipeline could not use.
    DeadLetters(DeadLettersArgs),
    /// Change a pipeline's definition while it runs: compute the new one beside it from history, compare, switch, go back.
    Versions(VersionsArgs),
    /// Look up an entity's newest features in the online store.
    Get(GetArgs),
    /// Show where a pipeline stands: positions, lag, checkpoints, model versions, incidents.
    Status(StatusArgs),
    /// Show the whole loop on generated data: features, predictions, a shift, the alarm, retraining, recovery. No servers.
    Demo(DemoArgs),
    /// Print a completion script for a shell.
    Completions {
        /// Shell.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

/// Which pipeline, and what to change in it.
#[derive(Debug, Clone, Args)]
pub struct PipelineArgs {
    /// The pipeline: its folder, or its pipeline.toml.
    #[arg(value_name = "PIPELINE")]
    pub pipeline: PathBuf,

    /// Override a setting of pipeline.toml, for example `--set monitor.window.rows=1000`. Can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    pub set: Vec<(String, String)>,
}

/// How to run.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Which pipeline.
    #[command(flatten)]
    pub pipeline: PipelineArgs,

    /// Worker threads for features and scoring, each with its own consumer, producer and model sessions.
    /// Default: one on the embedded log, else as many as cores, at most one a partition.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: Option<u16>,

    /// Stop by itself once everything that is in the topics now has been processed.
    #[arg(long)]
    pub until_end: bool,

    /// Address of /metrics, /health, /ready and /status; `none` for no server.
    #[arg(long, default_value = "127.0.0.1:9464", value_parser = listen, env = "DRIFTLINE_LISTEN")]
    pub listen: Listen,

    /// Name of this process within the pipeline, when several share a host or a name: transactional ids are made of it.
    /// Default: host name and a free slot number.
    #[arg(long, env = "DRIFTLINE_INSTANCE")]
    pub instance: Option<String>,

    /// How long to wait at the start for a broker or an online store that is away, such as `5s` or `10m`. Once running,
    /// both are waited for without limit.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration, env = "DRIFTLINE_PATIENCE")]
    pub patience: Duration,

    /// Recompute state and offline files from the beginning of the topics, instead of refusing a changed definition.
    #[arg(long)]
    pub rebuild: bool,

    /// What to show while running.
    #[arg(long, value_enum, default_value = "auto")]
    pub view: View,
}

/// What to show while running.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum View {
    /// The log, and a line every ten seconds.
    Auto,
    /// A live view of the terminal (q leaves).
    Live,
    /// A line a second.
    Plain,
    /// The log only.
    None,
}

/// An address, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listen {
    /// Serve here.
    On(SocketAddr),
    /// Do not serve.
    None,
}

/// Retrain worker.
#[derive(Debug, Clone, Args)]
pub struct RetrainArgs {
    /// How to run.
    #[command(flatten)]
    pub run: RunArgs,

    /// Ask for a retraining now, whatever the monitor says, and end when it is done.
    #[arg(long)]
    pub now: bool,
}

/// Check.
#[derive(Debug, Clone, Args)]
#[command(arg_required_else_help = true)]
pub struct CheckArgs {
    /// The pipeline: its folder, or its pipeline.toml.
    #[arg(value_name = "PIPELINE", required_unless_present = "schema")]
    pub pipeline: Option<PathBuf>,

    /// Override a setting of pipeline.toml. Can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    pub set: Vec<(String, String)>,

    /// Also ask the servers: topics, partitions, registered schemas, the model's signature, the online store.
    #[arg(long)]
    pub servers: bool,

    /// Faults as JSON, one object a line.
    #[arg(long)]
    pub json: bool,

    /// Print the JSON Schema of pipeline.toml and end.
    #[arg(long)]
    pub schema: bool,
}

/// Generate.
#[derive(Debug, Clone, Args)]
pub struct GenerateArgs {
    /// Which pipeline.
    #[command(flatten)]
    pub pipeline: PipelineArgs,

    /// Number of customers.
    #[arg(long, default_value_t = 20_000)]
    pub customers: u32,

    /// Days of events.
    #[arg(long, default_value_t = 180)]
    pub days: u32,

    /// First day (UTC).
    #[arg(long, default_value = "2025-01-01")]
    pub start: String,

    /// The same seed gives the same events.
    #[arg(long, default_value_t = 7)]
    pub seed: u64,

    /// A shift from a day on (or between two): `amount*1.33@120`, `support*4@90..97`. What can shift: amount, logins, support,
    /// churn. Can be repeated.
    #[arg(long, value_name = "WHAT*FACTOR@DAY")]
    pub shift: Vec<Shift>,

    /// How fast: events a second (`5000/s`), a multiple of event time (`1000x`), or `max`.
    #[arg(long, default_value = "max")]
    pub speed: String,

    /// Stop after so many events, not counting what the shop knows about its customers on the first day.
    #[arg(long, value_name = "EVENTS")]
    pub limit: Option<u64>,

    /// Write JSON lines to standard output instead of the topics.
    #[arg(long)]
    pub stdout: bool,
}

/// Replay.
#[derive(Debug, Clone, Args)]
pub struct ReplayArgs {
    /// File to read: .jsonl, .csv, .parquet or .avro.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// The pipeline: its folder, or its pipeline.toml.
    #[arg(long, short)]
    pub pipeline: PathBuf,

    /// Override a setting of pipeline.toml. Can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    pub set: Vec<(String, String)>,

    /// Source to write into. Not needed where the pipeline has one source.
    #[arg(long, short)]
    pub source: Option<String>,

    /// A field's column in the file, where the names differ. Can be repeated.
    #[arg(long, value_name = "FIELD=COLUMN", value_parser = key_value)]
    pub map: Vec<(String, String)>,

    /// Format, where the file's name does not tell.
    #[arg(long, value_name = "jsonl|csv|parquet|avro")]
    pub format: Option<String>,

    /// How fast: events a second (`5000/s`), a multiple of event time (`1000x`), or `max`.
    #[arg(long, default_value = "max")]
    pub speed: String,

    /// Timestamp of the records: the present, or the event's time (mind the topic's retention).
    #[arg(long, value_enum, default_value = "now")]
    pub record_time: RecordTime,

    /// Stop at the first bad row instead of counting and reporting it.
    #[arg(long)]
    pub strict: bool,
}

/// Timestamp of replayed records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RecordTime {
    /// When it is written.
    Now,
    /// The event's time.
    Event,
}

/// Topics.
#[derive(Debug, Clone, Args)]
pub struct TopicArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: TopicCommand,
}

/// Where a topic is: a pipeline's broker, a Kafka, or an embedded log.
#[derive(Debug, Clone, Args)]
pub struct WhereArgs {
    /// The broker of this pipeline.
    #[arg(long, short, value_name = "PIPELINE")]
    pub pipeline: Option<PathBuf>,

    /// Override a setting of the pipeline. Can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value, requires = "pipeline")]
    pub set: Vec<(String, String)>,

    /// These Kafka bootstrap servers, where no pipeline is named.
    #[arg(long, short, env = "KAFKA_BROKERS")]
    pub brokers: Option<String>,

    /// The embedded log in this folder, whatever else is named.
    #[arg(long, value_name = "FOLDER")]
    pub embedded: Option<PathBuf>,
}

/// Versions of a definition.
#[derive(Debug, Clone, Args)]
pub struct VersionsArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: VersionsCommand,
}

/// Commands over versions.
#[derive(Debug, Clone, Subcommand)]
pub enum VersionsCommand {
    /// List the versions: which one serves, how far each one is, what was changed when.
    List {
        /// Which pipeline.
        #[command(flatten)]
        pipeline: PipelineArgs,
        /// JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Compute the changed definition beside the one that serves, from the beginning of the topics: state and offline files
    /// of its own, nothing on the pipeline's topics or in the online store. Goes on until it is switched to, then publishes.
    Bootstrap {
        /// How to run. `--until-end` is the same as `--until-caught-up`.
        #[command(flatten)]
        run: RunArgs,
        /// Stop once it has computed all that the serving version has published.
        #[arg(long)]
        until_caught_up: bool,
        /// Write what it would publish to topics of its own, `<topic>.shadow-v<number>`.
        #[arg(long)]
        shadow_topics: bool,
    },
    /// Compare two versions: their feature rows, event by event, and those of emitted windows, window by window.
    Compare {
        /// Which pipeline.
        #[command(flatten)]
        pipeline: PipelineArgs,
        /// This version. Default: the one that serves.
        #[arg(long, value_name = "NUMBER")]
        base: Option<u32>,
        /// With this one. Default: that of pipeline.toml, else the newest.
        #[arg(long, value_name = "NUMBER")]
        with: Option<u32>,
        /// Numbers count as equal where they differ by at most this part of the larger one.
        #[arg(long, default_value_t = 0.0)]
        tolerance: f64,
        /// End with exit code 1 if a value of a feature that both have differs, or a row is in one of them only.
        #[arg(long)]
        strict: bool,
        /// JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Let another version serve: it publishes from where the one before ended, at one offset of each partition.
    Switch {
        /// Which pipeline.
        #[command(flatten)]
        pipeline: PipelineArgs,
        /// The version. Default: that of pipeline.toml.
        #[arg(long, value_name = "NUMBER")]
        to: Option<u32>,
        /// Also where it has no checkpoint for a partition yet, and would compute it from the beginning first.
        #[arg(long)]
        anyway: bool,
    },
    /// Let the version that served before serve again.
    Rollback {
        /// Which pipeline.
        #[command(flatten)]
        pipeline: PipelineArgs,
    },
    /// Remove the files of a version that does not serve.
    Drop {
        /// Which pipeline.
        #[command(flatten)]
        pipeline: PipelineArgs,
        /// The version.
        #[arg(value_name = "NUMBER")]
        number: u32,
    },
}

/// Topic commands.
#[derive(Debug, Clone, Subcommand)]
pub enum TopicCommand {
    /// List topics with their partitions and offsets.
    List {
        /// Where.
        #[command(flatten)]
        at: WhereArgs,
    },
    /// Create a topic, or all source and label topics of a pipeline.
    Create {
        /// Topic.
        #[arg(required_unless_present = "sources")]
        topic: Option<String>,
        /// Where.
        #[command(flatten)]
        at: WhereArgs,
        /// All source and label topics of --pipeline.
        #[arg(long, requires = "pipeline")]
        sources: bool,
        /// Partitions. Default: the pipeline's setting, else 4.
        #[arg(long)]
        partitions: Option<u32>,
        /// Keep the newest record of each key for ever.
        #[arg(long)]
        compacted: bool,
    },
    /// Send lines of standard input (or a file) as records.
    Send {
        /// Topic.
        topic: String,
        /// Where.
        #[command(flatten)]
        at: WhereArgs,
        /// Read this file instead of standard input.
        #[arg(long)]
        file: Option<PathBuf>,
        /// Each line is a key, this separator (default: a tab), and a value.
        #[arg(long, value_name = "SEPARATOR", num_args = 0..=1, default_missing_value = "\t")]
        key: Option<String>,
        /// A header for every record. Can be repeated.
        #[arg(long, value_name = "NAME=VALUE", value_parser = key_value)]
        header: Vec<(String, String)>,
    },
    /// Print records as JSON lines. Avro is shown as JSON; what cannot be read in base64, with the error.
    Tail {
        /// Topic.
        topic: String,
        /// Where.
        #[command(flatten)]
        at: WhereArgs,
        /// Where to begin: `beginning`, `end`, an offset, or −N for the last N records of each partition.
        #[arg(long, default_value = "beginning", allow_hyphen_values = true)]
        from: String,
        /// Only this partition.
        #[arg(long)]
        partition: Option<i32>,
        /// URL of the schema registry with the schemas of framed Avro records. Default: the pipeline's.
        #[arg(long, value_name = "URL", env = "SCHEMA_REGISTRY_URL")]
        schema_registry: Option<String>,
        /// Stop after this many records.
        #[arg(long, short = 'n')]
        limit: Option<u64>,
        /// Wait for more at the end, until Ctrl-C.
        #[arg(long, short)]
        follow: bool,
    },
}

/// Dead letters.
#[derive(Debug, Clone, Args)]
pub struct DeadLettersArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: DeadLettersCommand,
}

/// Dead-letter commands.
#[derive(Debug, Clone, Subcommand)]
pub enum DeadLettersCommand {
    /// Count dead letters by stage, reason and source, each with its newest error.
    List {
        /// Which pipeline.
        #[command(flatten)]
        pipeline: PipelineArgs,
        /// Which letters.
        #[command(flatten)]
        filter: LetterArgs,
        /// List letters instead of counting them, one a line, oldest first.
        #[arg(long)]
        each: bool,
        /// At most this many lines: the largest groups, or the newest letters.
        #[arg(long, short = 'n', value_name = "LINES")]
        limit: Option<usize>,
        /// JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Print one letter whole: where it came from, what is wrong, its headers, key and value.
    Show {
        /// Which pipeline.
        #[command(flatten)]
        pipeline: PipelineArgs,
        /// The letter as `list` names it: PARTITION:OFFSET on the dead-letter topic, or OFFSET on partition 0.
        #[arg(value_name = "LETTER")]
        letter: String,
        /// JSON instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Put records back where they came from: the same bytes, on the same partition, each once, however often this is repeated.
    Replay {
        /// Which pipeline.
        #[command(flatten)]
        pipeline: PipelineArgs,
        /// Which letters.
        #[command(flatten)]
        filter: LetterArgs,
        /// At most this many letters.
        #[arg(long, short = 'n', value_name = "LETTERS")]
        limit: Option<u64>,
        /// Leave records alone that were replayed this often and died again each time.
        #[arg(long, value_name = "TIMES", default_value_t = 3)]
        max_replays: u32,
        /// Say what would be replayed, and write nothing.
        #[arg(long)]
        dry_run: bool,
        /// JSON instead of text.
        #[arg(long)]
        json: bool,
    },
}

/// Which dead letters: those that meet all conditions.
#[derive(Debug, Clone, Args)]
pub struct LetterArgs {
    /// Stage that gave up: decode, window, score or monitor.
    #[arg(long)]
    pub stage: Option<String>,

    /// Reason, such as malformed or late.
    #[arg(long)]
    pub reason: Option<String>,

    /// Source that the record came from, or its topic.
    #[arg(long)]
    pub source: Option<String>,

    /// Written since: a duration back from now (`2h`, `7d`) or an instant (`2026-01-31`, `2026-01-31T12:00:00Z`).
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
}

/// Online lookup.
#[derive(Debug, Clone, Args)]
pub struct GetArgs {
    /// Which pipeline.
    #[command(flatten)]
    pub pipeline: PipelineArgs,

    /// The entity's key values, in the definition's order.
    #[arg(required = true, value_name = "KEY")]
    pub key: Vec<String>,

    /// Which entity, where the pipeline computes features of several.
    #[arg(long)]
    pub entity: Option<String>,

    /// JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Status.
#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    /// Which pipeline.
    #[command(flatten)]
    pub pipeline: PipelineArgs,

    /// JSON instead of tables.
    #[arg(long)]
    pub json: bool,

    /// Where a running process answers.
    #[arg(long, default_value = "127.0.0.1:9464", env = "DRIFTLINE_LISTEN")]
    pub address: String,
}

/// Demo.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// The pipeline.
    #[arg(default_value = "pipelines/churn", value_name = "PIPELINE")]
    pub pipeline: PathBuf,

    /// Folder for everything that the demo writes. Emptied first if it holds an earlier demo.
    #[arg(long, default_value = "data/demo")]
    pub folder: PathBuf,

    /// Plain lines even on a terminal.
    #[arg(long)]
    pub plain: bool,

    /// The same seed gives the same events.
    #[arg(long, default_value_t = 7)]
    pub seed: u64,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    if key.trim().is_empty() {
        return Err("the key before '=' is empty".into());
    }
    Ok((key.trim().to_owned(), value.to_owned()))
}

fn duration(text: &str) -> Result<Duration, String> {
    units::duration(text).map_err(|error| format!("{}; {}", error.message, error.help))
}

fn listen(text: &str) -> Result<Listen, String> {
    if text == "none" {
        return Ok(Listen::None);
    }
    text.parse().map(Listen::On).map_err(|_| "expected ADDRESS:PORT, such as 0.0.0.0:9464, or none".into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn settings_are_pairs() {
        assert_eq!(key_value("a.b=c=d").unwrap(), ("a.b".into(), "c=d".into()));
        assert!(key_value("a").is_err());
        assert!(key_value("=b").is_err());
    }
}
