//! The request to stop, as every thread sees it.
//!
//! A stage checks [`Stop::requested`] between two steps and waits with [`Stop::wait`] instead of sleeping, so that no
//! wait outlives a Ctrl-C.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

use super::clock;

/// A request to stop, shared by all who must heed it. Once made it cannot be withdrawn.
#[derive(Clone, Default)]
pub struct Stop(Arc<Shared>);

#[derive(Default)]
struct Shared {
    requested: Mutex<bool>,
    threads: Condvar,
    tasks: Notify,
    /// Those that stop with this one.
    children: Mutex<Vec<Weak<Shared>>>,
}

impl Stop {
    /// A token that nobody has asked to stop yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A token that stops with this one, and can be stopped without it.
    pub fn child(&self) -> Self {
        let child = Self::new();
        let mut children = self.0.children.lock();
        children.retain(|child| child.strong_count() > 0);
        children.push(Arc::downgrade(&child.0));
        // A request that came before the child was known has not reached it.
        if self.requested() {
            child.request();
        }
        drop(children);
        child
    }

    /// Asks all holders of this token to stop, and wakes those that wait. May be called more than once.
    pub fn request(&self) {
        *self.0.requested.lock() = true;
        self.0.threads.notify_all();
        self.0.tasks.notify_waiters();
        let children: Vec<_> = self.0.children.lock().iter().filter_map(Weak::upgrade).collect();
        for child in children {
            Self(child).request();
        }
    }

    /// True once a stop has been asked for.
    pub fn requested(&self) -> bool {
        *self.0.requested.lock()
    }

    /// Blocks this thread for `duration`, or until a stop is asked for. Returns true where it was.
    pub fn wait(&self, duration: Duration) -> bool {
        let mut requested = self.0.requested.lock();
        match clock::monotonic().checked_add(duration) {
            Some(deadline) => {
                self.0.threads.wait_while_until(&mut requested, |requested| !*requested, deadline);
            }
            None => self.0.threads.wait_while(&mut requested, |requested| !*requested),
        }
        *requested
    }

    /// Completes once a stop has been asked for.
    pub async fn stopped(&self) {
        let notified = self.0.tasks.notified();
        tokio::pin!(notified);
        // Registered before the flag is read: a request between the two would otherwise be missed.
        notified.as_mut().enable();
        if !self.requested() {
            notified.await;
        }
    }
}

impl fmt::Debug for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stop").field(&self.requested()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_by_time_when_nobody_asks() {
        assert!(!Stop::new().wait(Duration::from_millis(1)));
    }

    #[test]
    fn a_request_wakes_a_waiting_thread() {
        let stop = Stop::new();
        let waiter = std::thread::spawn({
            let stop = stop.clone();
            move || stop.wait(Duration::MAX)
        });
        stop.request();
        assert!(waiter.join().unwrap());
        assert!(stop.requested());
        assert!(stop.wait(Duration::MAX));
    }

    #[test]
    fn a_child_stops_with_its_parent_and_not_the_other_way() {
        let parent = Stop::new();
        let (first, second) = (parent.child(), parent.child());
        first.request();
        assert!(first.requested() && !second.requested() && !parent.requested());
        parent.request();
        assert!(second.requested() && parent.child().requested());
    }

    #[tokio::test]
    async fn a_request_completes_the_future_before_and_after_it_is_polled() {
        let stop = Stop::new();
        let waiting = tokio::spawn({
            let stop = stop.clone();
            async move { stop.stopped().await }
        });
        stop.request();
        waiting.await.unwrap();
        stop.stopped().await;
    }
}
