//! The terminal while a live view is shown: alternate screen, raw mode, and back again whatever happens.

use std::collections::VecDeque;
use std::io::{self, Stdout};
use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode};

use super::board::Happening;
use super::log;
use super::view::{self, Reading, Story};

/// Whether the person asked to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// `q`, Escape or Ctrl-C was pressed.
    Yes,
    /// Not yet.
    No,
}

/// An open live view. Dropping it restores the terminal.
pub struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
}

impl Screen {
    /// Takes the terminal over.
    ///
    /// # Errors
    /// Where standard output is no terminal that can be taken over.
    pub fn open() -> io::Result<Self> {
        enable_raw_mode()?;
        let opened = execute!(io::stdout(), EnterAlternateScreen)
            .and_then(|()| Terminal::new(CrosstermBackend::new(io::stdout())));
        match opened {
            Ok(terminal) => {
                log::cover_terminal(true);
                Ok(Self { terminal })
            }
            Err(error) => {
                let _ = disable_raw_mode();
                Err(error)
            }
        }
    }

    /// Draws the view.
    ///
    /// # Errors
    /// Where the terminal is gone.
    pub fn draw(
        &mut self,
        story: &Story,
        reading: &Reading,
        history: &VecDeque<u64>,
        happenings: &[Happening],
    ) -> io::Result<()> {
        self.terminal.draw(|frame| view::draw(frame, story, reading, history, happenings)).map(drop)
    }

    /// Looks at the keys pressed since the last call; does not wait. In raw mode Ctrl-C is a key, not a signal.
    pub fn asked_to_leave(&self) -> Asked {
        while event::poll(Duration::ZERO).unwrap_or(false) {
            if let Ok(Event::Key(key)) = event::read()
                && (matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
                    || (key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL)))
            {
                return Asked::Yes;
            }
        }
        Asked::No
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = execute!(io::stdout(), LeaveAlternateScreen);
        let _ = disable_raw_mode();
        log::cover_terminal(false);
    }
}
