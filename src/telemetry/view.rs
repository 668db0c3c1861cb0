//! What a person watches: a live terminal view, or plain lines where there is no terminal.
//!
//! [`Gauge`] turns two readings of the [`Board`] into rates; [`draw`] and [`line`] only render what it says.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use chrono::DateTime;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Gauge as Bar, Paragraph, Row, Sparkline, Table};

use super::board::{Board, Happening, Kind};
use super::latency::Percentiles;

/// Readings kept for the sparkline.
const HISTORY: usize = 120;

/// A step of a story with a known order, such as the demo's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chapter {
    /// Short name.
    pub name: &'static str,
    /// Where it stands.
    pub state: ChapterState,
}

/// Where a chapter stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChapterState {
    /// Not begun.
    Ahead,
    /// Under way.
    Now,
    /// Over.
    Done,
}

/// What the view says beside the board.
#[derive(Debug, Clone, Default)]
pub struct Story {
    /// Title line.
    pub title: String,
    /// What is happening now, in a sentence.
    pub now: String,
    /// Chapters in order; none for a plain run.
    pub chapters: Vec<Chapter>,
    /// Share done, 0 to 1, where it is known.
    pub progress: Option<f64>,
}

/// Numbers of the last interval.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    /// Since the start.
    pub elapsed: Duration,
    /// Records read a second.
    pub events: f64,
    /// Feature rows a second.
    pub rows: f64,
    /// Predictions a second.
    pub predictions: f64,
    /// Totals of the same.
    pub totals: (u64, u64, u64),
    /// Records not yet read.
    pub lag: u64,
    /// p50 and p99 from a record's arrival to its committed prediction, over the last seconds.
    pub latency: (Option<Duration>, Option<Duration>),
    /// Entities, and bytes of window state in memory and on disk.
    pub state: (u64, u64, u64),
    /// Newest event time applied, milliseconds since 1970 UTC.
    pub event_time: Option<i64>,
    /// Late and dead records so far.
    pub lost: (u64, u64),
    /// Model version in use.
    pub model: Option<String>,
    /// Open incident.
    pub incident: Option<String>,
    /// Watched columns: name, PSI, evidence, drifted; strongest first.
    pub drift: Vec<(String, f64, f64, bool)>,
    /// Windows judged.
    pub windows: u64,
}

/// Reads the board at intervals.
pub struct Gauge {
    started: Instant,
    last: Instant,
    totals: (u64, u64, u64),
    latencies: VecDeque<Percentiles>,
    /// Events a second, newest last.
    pub history: VecDeque<u64>,
}

impl Gauge {
    /// Starts now.
    pub fn new(now: Instant) -> Self {
        Self { started: now, last: now, totals: (0, 0, 0), latencies: VecDeque::new(), history: VecDeque::new() }
    }

    /// Reads the board; rates are over the time since the last reading, percentiles over the last ten readings.
    pub fn read(&mut self, board: &Board, now: Instant) -> Reading {
        let seconds = (now - self.last).as_secs_f64().max(1e-3);
        let totals = (board.read(), board.rows.load(Ordering::Relaxed), board.predictions.load(Ordering::Relaxed));
        let rate = |new: u64, old: u64| (new.saturating_sub(old)) as f64 / seconds;
        let events = rate(totals.0, self.totals.0);
        self.latencies.push_back(board.latency.take());
        if self.latencies.len() > 10 {
            self.latencies.pop_front();
        }
        let mut merged = Percentiles::default();
        self.latencies.iter().for_each(|p| merged.merge(p));
        self.history.push_back(events as u64);
        if self.history.len() > HISTORY {
            self.history.pop_front();
        }
        let reading = Reading {
            elapsed: now - self.started,
            events,
            rows: rate(totals.1, self.totals.1),
            predictions: rate(totals.2, self.totals.2),
            totals,
            lag: board.lag.load(Ordering::Relaxed),
            latency: (merged.quantile(0.5), merged.quantile(0.99)),
            state: (
                board.entities.load(Ordering::Relaxed),
                board.state_bytes.load(Ordering::Relaxed),
                board.state_disk_bytes.load(Ordering::Relaxed),
            ),
            event_time: Some(board.event_time.load(Ordering::Relaxed) as i64).filter(|t| *t != 0),
            lost: (
                board.sources.iter().map(|(_, c)| c.late.load(Ordering::Relaxed)).sum(),
                board.sources.iter().map(|(_, c)| c.dead.load(Ordering::Relaxed)).sum(),
            ),
            model: board.model(),
            incident: board.incident(),
            drift: board.drift(),
            windows: board.windows.load(Ordering::Relaxed),
        };
        self.last = now;
        self.totals = totals;
        reading
    }
}

/// One line for logs and pipes.
pub fn line(reading: &Reading) -> String {
    let mut text = format!(
        "{:>5.0}s  {:>7}/s events  {:>7}/s features  {:>7}/s predictions  lag {:>7}  p50 {:>7} p99 {:>7}  model v{}",
        reading.elapsed.as_secs_f64(),
        count(reading.events as u64),
        count(reading.rows as u64),
        count(reading.predictions as u64),
        count(reading.lag),
        duration(reading.latency.0),
        duration(reading.latency.1),
        reading.model.as_deref().unwrap_or("-"),
    );
    if let Some(time) = reading.event_time {
        text += &format!("  event time {}", date(time));
    }
    if let Some((name, psi, _, _)) = reading.drift.iter().find(|(_, _, _, drifted)| *drifted) {
        text += &format!("  DRIFT {name} PSI {psi:.2}");
    }
    text
}

/// One line about a happening.
pub fn happening_line(happening: &Happening) -> String {
    let when = happening.event_time.map(|t| format!("  (event time {})", date(t))).unwrap_or_default();
    format!("{} {}{when}", mark(happening.kind).0, happening.text)
}

fn mark(kind: Kind) -> (&'static str, Color) {
    match kind {
        Kind::Stage | Kind::Rebalance => ("·", Color::DarkGray),
        Kind::Model => ("▲", Color::Green),
        Kind::Drift => ("!", Color::Red),
        Kind::Retraining => ("↻", Color::Cyan),
        Kind::Shift => ("≈", Color::Magenta),
        Kind::Warning => ("✗", Color::Yellow),
    }
}

/// 1,234,567.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// `4.2 ms`, `1.3 s`, `-`.
pub fn duration(d: Option<Duration>) -> String {
    match d {
        None => "-".into(),
        Some(d) if d < Duration::from_millis(1) => format!("{} µs", d.as_micros()),
        Some(d) if d < Duration::from_secs(1) => format!("{:.1} ms", d.as_secs_f64() * 1e3),
        Some(d) => format!("{:.1} s", d.as_secs_f64()),
    }
}

/// `12.3 MiB`.
pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{value:.0} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// `2025-03-09 14:05`.
pub fn date(ms: i64) -> String {
    DateTime::from_timestamp_millis(ms).map_or_else(|| ms.to_string(), |t| t.format("%Y-%m-%d %H:%M").to_string())
}

/// Draws the live view.
pub fn draw(frame: &mut Frame, story: &Story, reading: &Reading, history: &VecDeque<u64>, happenings: &[Happening]) {
    let area = frame.area();
    let chapters = u16::from(!story.chapters.is_empty());
    let [title, steps, progress, body, log] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(chapters),
        Constraint::Length(u16::from(story.progress.is_some())),
        Constraint::Length(10),
        Constraint::Min(4),
    ])
    .areas(area);
    let time = reading.event_time.map(|t| format!("event time {}", date(t))).unwrap_or_default();
    frame.render_widget(
        Paragraph::new(vec![
            Line::from(vec![
                Span::styled(story.title.clone(), Style::new().bold()),
                Span::raw(format!("   {:>4.0} s   {time}", reading.elapsed.as_secs_f64())).fg(Color::DarkGray),
            ]),
            Line::raw(story.now.clone()),
        ]),
        title,
    );
    if chapters > 0 {
        frame.render_widget(Paragraph::new(chapter_line(&story.chapters)), steps);
    }
    if let Some(share) = story.progress {
        frame.render_widget(
            Bar::default()
                .ratio(share.clamp(0.0, 1.0))
                .gauge_style(Style::new().fg(Color::Cyan).bg(Color::Black))
                .label(format!("{:.0} %", share * 100.0)),
            progress,
        );
    }
    let [left, right] = Layout::horizontal([Constraint::Percentage(46), Constraint::Percentage(54)]).areas(body);
    draw_numbers(frame, left, reading, history);
    draw_drift(frame, right, reading);
    let room = log.height.saturating_sub(2) as usize;
    let lines: Vec<Line> = happenings
        .iter()
        .rev()
        .take(room)
        .rev()
        .map(|h| {
            let (sign, color) = mark(h.kind);
            let when = h.event_time.map(|t| format!("{}  ", date(t))).unwrap_or_default();
            Line::from(vec![
                Span::styled(format!("{sign} "), Style::new().fg(color).bold()),
                Span::raw(when).fg(Color::DarkGray),
                Span::raw(h.text.clone()),
            ])
        })
        .collect();
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" what happened ")), log);
}

fn chapter_line(chapters: &[Chapter]) -> Line<'static> {
    let mut spans = Vec::new();
    for (i, chapter) in chapters.iter().enumerate() {
        if i > 0 {
            spans.push(Span::raw(" → ").fg(Color::DarkGray));
        }
        let (text, style) = match chapter.state {
            ChapterState::Done => (format!("✓ {}", chapter.name), Style::new().fg(Color::Green)),
            ChapterState::Now => {
                (format!("● {}", chapter.name), Style::new().fg(Color::Yellow).add_modifier(Modifier::BOLD))
            }
            ChapterState::Ahead => (chapter.name.to_owned(), Style::new().fg(Color::DarkGray)),
        };
        spans.push(Span::styled(text, style));
    }
    Line::from(spans)
}

fn draw_numbers(frame: &mut Frame, area: Rect, reading: &Reading, history: &VecDeque<u64>) {
    let block = Block::bordered().title(" flow ");
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let [table, spark] = Layout::vertical([Constraint::Min(6), Constraint::Length(2)]).areas(inner);
    let row = |name: &'static str, rate: String, total: String| {
        Row::new([Cell::from(name), Cell::from(rate).bold(), Cell::from(total).fg(Color::DarkGray)])
    };
    let per = |rate: f64| format!("{}/s", count(rate as u64));
    let rows = [
        row("events", per(reading.events), count(reading.totals.0)),
        row("features", per(reading.rows), count(reading.totals.1)),
        row(
            "predictions",
            per(reading.predictions),
            format!("{}  model v{}", count(reading.totals.2), reading.model.as_deref().unwrap_or("-")),
        ),
        row(
            "latency",
            format!("p50 {}", duration(reading.latency.0)),
            format!("p99 {}   lag {}", duration(reading.latency.1), count(reading.lag)),
        ),
        row(
            "state",
            format!("{} keys", count(reading.state.0)),
            format!("{}, {} on disk", bytes(reading.state.1), bytes(reading.state.2)),
        ),
        row("kept aside", format!("{} late", count(reading.lost.0)), format!("{} dead letters", count(reading.lost.1))),
    ];
    frame.render_widget(Table::new(rows, [Constraint::Length(11), Constraint::Length(15), Constraint::Min(10)]), table);
    let width = spark.width as usize;
    let data: Vec<u64> = history.iter().rev().take(width).rev().copied().collect();
    frame.render_widget(Sparkline::default().data(data).style(Style::new().fg(Color::Cyan)), spark);
}

fn draw_drift(frame: &mut Frame, area: Rect, reading: &Reading) {
    let title = match &reading.incident {
        Some(id) => Span::styled(format!(" drift: incident {id} "), Style::new().fg(Color::Red).bold()),
        None => Span::raw(format!(" drift: none in {} windows ", reading.windows)),
    };
    let rows =
        reading.drift.iter().take(area.height.saturating_sub(3) as usize).map(|(name, psi, evidence, drifted)| {
            let style = if *drifted { Style::new().fg(Color::Red).bold() } else { Style::new() };
            let bar = "█".repeat(((psi * 40.0) as usize).min(16));
            Row::new([
                Cell::from(name.clone()),
                Cell::from(format!("{psi:.3}")),
                Cell::from(format!("{evidence:.1e}")),
                Cell::from(bar),
            ])
            .style(style)
        });
    let table =
        Table::new(rows, [Constraint::Min(24), Constraint::Length(6), Constraint::Length(8), Constraint::Length(16)])
            .header(Row::new(["column", "PSI", "evidence", ""]).fg(Color::DarkGray))
            .block(Block::bordered().title(title));
    frame.render_widget(table, area);
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use rstest::rstest;

    #[rstest]
    #[case(0, "0")]
    #[case(999, "999")]
    #[case(1_000, "1,000")]
    #[case(1_234_567, "1,234,567")]
    fn counts_have_separators(#[case] n: u64, #[case] text: &str) {
        assert_eq!(count(n), text);
    }

    #[rstest]
    #[case(80, 24)]
    #[case(160, 50)]
    #[case(20, 6)]
    fn the_view_fits_any_terminal(#[case] width: u16, #[case] height: u16) {
        let board = Board::new(["purchases"]);
        board.say(Kind::Drift, Some(0), "spend_mean_7d moved");
        board.set_drift(vec![("spend_mean_7d".into(), 0.31, 1e6, true)], Some("i-1".into()));
        let mut gauge = Gauge::new(crate::runtime::clock::monotonic());
        let reading = gauge.read(&board, crate::runtime::clock::monotonic());
        let story = Story {
            title: "driftline".into(),
            now: "reading".into(),
            chapters: vec![
                Chapter { name: "history", state: ChapterState::Done },
                Chapter { name: "shift", state: ChapterState::Now },
            ],
            progress: Some(0.4),
        };
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|f| draw(f, &story, &reading, &gauge.history, &board.happenings(0))).unwrap();
        if width >= 80 {
            let text = terminal.backend().to_string();
            for wanted in ["✓ history", "● shift", "spend_mean_7d", "incident i-1", "events"] {
                assert!(text.contains(wanted), "{wanted} is missing in\n{text}");
            }
        }
    }
}
