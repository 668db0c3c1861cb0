//! Named points around side effects at which tests crash, fail or pause the process.
//!
//! Only the feature `failpoints` compiles them in. `DRIFTLINE_FAILPOINTS` then holds `name=action` pairs separated by
//! `;`, where an action is `kill` (SIGKILL to this process), `error`, `pause` (until the named file
//! `DRIFTLINE_FAILPOINT_RELEASE` exists) or `say` (`failpoint NAME` on standard error, and nothing else), optionally with
//! `@n`: only at the n-th passing, counted from 1.

/// Passes the named point. Returns true where the caller must behave as if its side effect had failed.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn hit(_name: &str) -> bool {
    false
}

#[cfg(feature = "failpoints")]
pub use enabled::hit;

#[cfg(feature = "failpoints")]
mod enabled {
    use std::collections::HashMap;
    use std::sync::{LazyLock, Mutex};

    struct Point {
        action: String,
        at: Option<u64>,
        passed: u64,
    }

    static POINTS: LazyLock<Mutex<HashMap<String, Point>>> = LazyLock::new(|| {
        let text = std::env::var("DRIFTLINE_FAILPOINTS").unwrap_or_default();
        let points = text.split(';').filter_map(|pair| {
            let (name, action) = pair.split_once('=')?;
            let (action, at) = match action.split_once('@') {
                Some((action, n)) => (action, n.parse().ok()),
                None => (action, None),
            };
            Some((name.trim().to_owned(), Point { action: action.trim().to_owned(), at, passed: 0 }))
        });
        Mutex::new(points.collect())
    });

    /// Passes the named point. Returns true where the caller must behave as if its side effect had failed.
    pub fn hit(name: &str) -> bool {
        let action = {
            let mut points = POINTS.lock().expect("no code panics while it holds this lock");
            let Some(point) = points.get_mut(name) else { return false };
            point.passed += 1;
            if point.at.is_some_and(|at| at != point.passed) {
                return false;
            }
            point.action.clone()
        };
        match action.as_str() {
            "kill" => {
                // SAFETY: raising a signal in one's own process has no memory effects; SIGKILL cannot be handled.
                unsafe { libc::raise(libc::SIGKILL) };
                unreachable!("SIGKILL does not return")
            }
            "pause" => {
                if let Ok(path) = std::env::var("DRIFTLINE_FAILPOINT_RELEASE") {
                    while !std::path::Path::new(&path).exists() {
                        std::thread::park_timeout(std::time::Duration::from_millis(5));
                    }
                }
                false
            }
            "say" => {
                eprintln!("failpoint {name}");
                false
            }
            _ => true,
        }
    }
}
