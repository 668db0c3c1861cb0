//! What the shop knows about a customer: facts that change now and then, and what follows from them.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Exp1, StandardNormal};

use super::DAY_MS;
use super::customer::Engagement;
use super::event::{CustomerId, Profile};

/// What a customer pays the shop for better service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    Free,
    Plus,
    Premium,
}

impl Plan {
    fn as_str(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Plus => "plus",
            Self::Premium => "premium",
        }
    }

    /// The next better one.
    fn up(self) -> Option<Self> {
        match self {
            Self::Free => Some(Self::Plus),
            Self::Plus => Some(Self::Premium),
            Self::Premium => None,
        }
    }

    /// The next cheaper one.
    fn down(self) -> Option<Self> {
        match self {
            Self::Free => None,
            Self::Plus => Some(Self::Free),
            Self::Premium => Some(Self::Plus),
        }
    }
}

/// Regions and the shares of the customers who live there; the rest lives on the islands, where parcels give trouble.
const REGIONS: [(&str, f64); 4] = [("north", 0.28), ("south", 0.24), ("east", 0.20), ("west", 0.20)];
const ISLANDS: &str = "islands";
const PAYMENTS: [(&str, f64); 2] = [("card", 0.50), ("wallet", 0.30)];
const INVOICE: &str = "invoice";

/// Who has been a customer for less than this leaves sooner.
const NEW_FOR_MS: i64 = 90 * DAY_MS;
/// Mean age of an account on the shop's first day.
const MEAN_ACCOUNT_MS: f64 = 700.0 * DAY_MS as f64;
/// Years of birth: mean, standard deviation, and the latest.
const BORN: (f64, f64, f64) = (1983.0, 14.0, 2006.0);

/// Changes a day.
const MOVING: f64 = 1.0 / 900.0;
const NEW_PAYMENT: f64 = 1.0 / 1200.0;

/// The facts of one customer as they are now.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    born: i64,
    /// Whether the shop was told when.
    tells_born: bool,
    signed_up_at: i64,
    region: &'static str,
    plan: Plan,
    plan_since: i64,
    newsletter: bool,
    payment: &'static str,
}

/// A fact that can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Move,
    Payment,
    Upgrade,
    Downgrade,
    Subscribe,
    Unsubscribe,
}

impl Facts {
    /// Facts of someone who joins, or who on the shop's first day has long been in a state of engagement.
    pub(super) fn draw(rng: &mut ChaCha8Rng, now: i64, since_long: Option<Engagement>) -> Self {
        let normal: f64 = StandardNormal.sample(rng);
        let born = (BORN.0 + BORN.1 * normal).clamp(1935.0, BORN.2) as i64;
        let (account, on_plan): (f64, f64) = (Exp1.sample(rng), rng.random());
        let signed_up_at = if since_long.is_some() { now - (account * MEAN_ACCOUNT_MS) as i64 } else { now };
        // Where the rates of change balance, so that the shares stay as they are.
        let (plans, newsletter): ([(Plan, f64); 2], f64) = match since_long {
            Some(Engagement::Active) => ([(Plan::Premium, 0.23), (Plan::Plus, 0.24)], 0.56),
            Some(Engagement::Cooling) => ([(Plan::Premium, 0.055), (Plan::Plus, 0.125)], 0.20),
            Some(Engagement::Gone | Engagement::Closed) => ([(Plan::Premium, 0.03), (Plan::Plus, 0.075)], 0.10),
            None => ([(Plan::Premium, 0.0), (Plan::Plus, 0.0)], 0.50),
        };
        Self {
            born,
            tells_born: rng.random::<f64>() < 0.92,
            signed_up_at,
            region: one_of(rng, &REGIONS, ISLANDS),
            plan: one_of(rng, &plans, Plan::Free),
            plan_since: signed_up_at + ((now - signed_up_at) as f64 * on_plan) as i64,
            newsletter: rng.random::<f64>() < newsletter,
            payment: one_of(rng, &PAYMENTS, INVOICE),
        }
    }

    /// The record that says so.
    pub(super) fn record(&self, id: CustomerId, now: i64) -> Profile {
        Profile {
            customer_id: id,
            changed_at: now,
            signed_up_at: self.signed_up_at,
            born: self.tells_born.then_some(self.born),
            region: self.region,
            plan: self.plan.as_str(),
            plan_since: self.plan_since,
            newsletter: self.newsletter,
            payment: self.payment,
        }
    }

    /// Someone whose account was closed opens a new one.
    pub(super) fn sign_up(&mut self, now: i64) {
        (self.signed_up_at, self.plan, self.plan_since) = (now, Plan::Free, now);
    }

    /// Rates of changes a day. Who cools cancels what costs money and what bothers, before leaving.
    pub(super) fn rates(&self, engagement: Engagement) -> [(Change, f64); 6] {
        let (up, down, on, off) = match engagement {
            Engagement::Active => (1.0 / 300.0, 1.0 / 1500.0, 1.0 / 150.0, 1.0 / 1200.0),
            Engagement::Cooling => (0.0, 1.0 / 25.0, 0.0, 1.0 / 22.0),
            Engagement::Gone => (0.0, 1.0 / 60.0, 0.0, 1.0 / 60.0),
            Engagement::Closed => return [(Change::Move, 0.0); 6],
        };
        let when = |possible: bool, rate: f64| if possible { rate } else { 0.0 };
        [
            (Change::Move, MOVING),
            (Change::Payment, NEW_PAYMENT),
            (Change::Upgrade, when(self.plan.up().is_some(), up)),
            (Change::Downgrade, when(self.plan.down().is_some(), down)),
            (Change::Subscribe, when(!self.newsletter, on)),
            (Change::Unsubscribe, when(self.newsletter, off)),
        ]
    }

    pub(super) fn change(&mut self, change: Change, rng: &mut ChaCha8Rng, now: i64) {
        let plan = match change {
            Change::Move => {
                self.region = one_of(rng, &REGIONS, ISLANDS);
                None
            }
            Change::Payment => {
                self.payment = one_of(rng, &PAYMENTS, INVOICE);
                None
            }
            Change::Subscribe | Change::Unsubscribe => {
                self.newsletter = change == Change::Subscribe;
                None
            }
            Change::Upgrade => self.plan.up(),
            Change::Downgrade => self.plan.down(),
        };
        if let Some(plan) = plan {
            (self.plan, self.plan_since) = (plan, now);
        }
    }

    /// Factor on the rate at which an active customer begins to leave. Never rises while the facts stay.
    pub(super) fn cooling(&self, now: i64) -> f64 {
        let plan = match self.plan {
            Plan::Free => 1.25,
            Plan::Plus => 0.85,
            Plan::Premium => 0.55,
        };
        let newsletter = if self.newsletter { 0.85 } else { 1.15 };
        let age = match self.born {
            1995.. => 1.5,
            1965.. => 1.0,
            _ => 0.6,
        };
        let new = if now < self.signed_up_at + NEW_FOR_MS { 1.6 } else { 1.0 };
        plan * newsletter * age * new
    }

    /// Factor on the rate of purchases: who pays for delivery uses it.
    pub(super) fn purchases(&self) -> f64 {
        match self.plan {
            Plan::Free => 0.94,
            Plan::Plus => 1.04,
            Plan::Premium => 1.14,
        }
    }

    /// Factor on the rate of contacts with support.
    pub(super) fn contacts(&self) -> f64 {
        let region = if self.region == ISLANDS { 1.8 } else { 0.93 };
        let payment = if self.payment == INVOICE { 1.3 } else { 0.93 };
        region * payment
    }

    /// Share of people of this age who use the app more than the web.
    pub(super) fn prefers_app(&self) -> f64 {
        if self.born >= 1985 { 0.72 } else { 0.46 }
    }
}

/// Draws by the shares; what is left of them is `rest`'s.
fn one_of<T: Copy>(rng: &mut ChaCha8Rng, shares: &[(T, f64)], rest: T) -> T {
    let mut left = rng.random::<f64>();
    let found = shares.iter().find(|(_, share)| {
        left -= share;
        left < 0.0
    });
    found.map_or(rest, |(what, _)| *what)
}
