//! Logs: one line a happening on standard error, for people or as JSON.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// ONNX Runtime's binding tells at `info` what driftline tells itself.
const QUIET: &str = "ort=warn";

/// Sets up logging for the process. `filter` is a `tracing` filter such as `info` (which leaves out what
/// ONNX Runtime's binding tells) or `driftline=debug`.
///
/// # Errors
/// Names the part of `filter` that is not understood.
pub fn init(format: LogFormat, filter: &str) -> Result<(), String> {
    let quiet = if filter == "info" { format!("{filter},{QUIET}") } else { filter.to_owned() };
    let filter = EnvFilter::try_new(quiet).map_err(|e| format!("log filter '{filter}' is not understood: {e}"))?;
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Output).with_span_events(FmtSpan::NONE);
    let done = match format {
        LogFormat::Human => builder.with_target(false).with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init(),
    };
    done.map_err(|e| format!("logging could not be set up: {e}"))
}

/// True while a live view owns the terminal that log lines would spoil.
static COVERED: AtomicBool = AtomicBool::new(false);

/// Says that a live view covers the terminal, or no longer does. Lines are dropped meanwhile, unless standard error goes
/// elsewhere; what matters is also on the view.
pub fn cover_terminal(covered: bool) {
    COVERED.store(covered && io::stderr().is_terminal(), Ordering::Relaxed);
}

struct Output;

impl Write for Output {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if COVERED.load(Ordering::Relaxed) { Ok(line.len()) } else { io::stderr().write(line) }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
