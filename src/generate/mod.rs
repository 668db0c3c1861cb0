//! A made-up shop: the stream of purchases, logins, support contacts and customers' facts that `driftline generate` and the demo use.
//!
//! ```text
//!  season ──┐
//!  shift ───┼──> customer ──> stream ──> event        rates by hour, by date → one customer → all, merged → records
//!  profile ─┘                                         what the shop knows about one
//! ```
//!
//! Every customer has a latent engagement (active, cooling, gone) that the events only hint at: a cooling customer logs in
//! and buys less, puts less into a basket, and often had trouble with support before. So whether a customer buys again can
//! be predicted from windowed features, but not perfectly. Who they are matters, too: the new, the young and those who pay
//! for no plan leave sooner. Labels say what happened, once it is known.
//!
//! The stream is a function of its [`GenerateOptions`]: the same options give the same events, byte for byte. What happens
//! before a [`Shift`] does not depend on it.

mod customer;
mod event;
mod feed;
mod profile;
mod season;
mod shift;
mod stream;

pub use event::{Closure, Contact, CustomerId, GeneratedEvent, Label, Login, Payload, Profile, Purchase};
pub use feed::{Feed, FeedError, Stamp};
pub use shift::{Quantity, Shift, ShiftError};
pub use stream::{ChurnStream, GenerateOptions};

/// One day in milliseconds.
const DAY_MS: i64 = 86_400_000;

#[cfg(test)]
mod tests;
