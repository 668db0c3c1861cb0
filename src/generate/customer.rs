//! One customer: habits, a latent engagement, and what comes next.
//!
//! A customer's future is a Markov jump process: purchases, logins, contacts, changes of facts and of engagement compete,
//! each with a rate that depends on the state, the season and the shifts. The next event is drawn by thinning (Lewis and Shedler 1979;
//! Ogata 1981): candidates come at a rate that bounds the true one, and each is kept with the ratio of the two.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Exp1, StandardNormal};

use super::DAY_MS;
use super::event::{Closure, Contact, CustomerId, Login, Payload, Purchase};
use super::profile::Facts;
use super::season::Season;
use super::shift::{Levels, Shift};

/// What all customers share.
#[derive(Debug)]
pub(super) struct World {
    pub(super) season: Season,
    pub(super) shifts: Vec<Shift>,
    /// First instant, milliseconds since 1970 UTC (inclusive).
    pub(super) start: i64,
    /// Last instant (exclusive).
    pub(super) end: i64,
    /// Factor on the rates of all events.
    pub(super) scale: f64,
}

/// How close a customer is to the shop. Never written anywhere: the features have to find it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Engagement {
    Active,
    Cooling,
    Gone,
    /// Gone, and has closed the account.
    Closed,
}

/// Factors on a customer's habits in one state of engagement.
struct Mood {
    purchases: f64,
    logins: f64,
    contacts: f64,
    /// On the items beyond the first in a basket.
    basket: f64,
}

impl Engagement {
    /// Shares at which the flows between the states balance, so that a stream is stationary from its first day.
    const AT_START: [(Self, f64); 4] =
        [(Self::Active, 0.57), (Self::Cooling, 0.13), (Self::Gone, 0.225), (Self::Closed, 0.075)];

    fn mood(self) -> Mood {
        match self {
            Self::Active => Mood { purchases: 1.0, logins: 1.0, contacts: 1.0, basket: 1.0 },
            Self::Cooling => Mood { purchases: 0.50, logins: 0.25, contacts: 1.3, basket: 0.5 },
            Self::Gone => Mood { purchases: 0.0, logins: 0.03, contacts: 0.02, basket: 0.0 },
            Self::Closed => Mood { purchases: 0.0, logins: 0.0, contacts: 0.0, basket: 0.0 },
        }
    }
}

/// Changes of engagement a day. Active customers cool at [`COOLING`] when nothing annoys them.
const COOLING: f64 = 1.0 / 170.0;
const LEAVING: f64 = 1.0 / 38.0;
const WARMING: f64 = 1.0 / 90.0;
const RETURNING: f64 = 1.0 / 80.0;
const CLOSING: f64 = 1.0 / 240.0;

/// Steps from one purchase to the next.
const STEPS: u8 = 3;

/// After this long half of a customer's trouble is forgotten.
const TROUBLE_HALF_LIFE_MS: f64 = 15.0 * DAY_MS as f64;
/// Trouble beyond this annoys no further.
const TROUBLE_LIMIT: f64 = 2.6;

/// What does not change about a customer. Rates are a day, while active.
#[derive(Debug, Clone)]
struct Habits {
    purchases: f64,
    logins: f64,
    contacts: f64,
    /// Logarithm of the usual price of an item.
    price: f64,
    /// Mean number of items beyond the first in a basket.
    items: f64,
    /// Exponent of the price level in the rates of cooling and leaving: the thrifty buy cheap things, and go when prices rise.
    price_sensitivity: f64,
    /// Share of logins from the app.
    app: f64,
}

impl Habits {
    fn draw(rng: &mut ChaCha8Rng, facts: &Facts) -> Self {
        let mut normal = || -> f64 { StandardNormal.sample(rng) };
        let (pace, visits, taste, basket, thrift) = (normal(), normal(), normal(), normal(), normal());
        // Segments: the loyal, the regular and the occasional buyer.
        let days_between_purchases = match rng.random::<f64>() {
            u if u < 0.16 => 5.0,
            u if u < 0.50 => 13.0,
            _ => 48.0,
        };
        let purchases = (0.30 * pace).exp() / days_between_purchases;
        Self {
            purchases,
            logins: (2.0 * purchases + 0.25) * (0.30 * visits).exp(),
            contacts: 0.005 + 0.06 * purchases,
            price: 2.6 + 0.55 * taste,
            items: 0.8 * (0.40 * basket).exp(),
            price_sensitivity: (1.5 - 4.0 * taste + 0.5 * thrift).clamp(0.0, 8.0),
            app: if rng.random::<f64>() < facts.prefers_app() { 0.85 } else { 0.10 },
        }
    }
}

/// A customer at an instant.
#[derive(Debug)]
pub(super) struct Customer {
    habits: Habits,
    facts: Facts,
    /// The facts have changed, and no record says so yet.
    untold: bool,
    engagement: Engagement,
    /// Steps left to the next purchase, from [`STEPS`] down to 1. Several steps a purchase make the intervals more regular
    /// than a Poisson process: people do not shop again in the minute after they did.
    steps: u8,
    /// What is left of the annoyance by contacts, as of `now`.
    trouble: f64,
    /// Milliseconds since 1970 UTC.
    now: i64,
    /// Where in its random stream the customer goes on.
    pub(super) position: u64,
}

impl Customer {
    /// A customer of the shop's first day, in any state.
    pub(super) fn existing(rng: &mut ChaCha8Rng, now: i64) -> Self {
        let mut left = rng.random::<f64>();
        let engagement = Engagement::AT_START
            .into_iter()
            .find_map(|(engagement, share)| {
                left -= share;
                (left < 0.0).then_some(engagement)
            })
            .unwrap_or(Engagement::Gone);
        let steps = rng.random_range(1..=STEPS);
        let facts = Facts::draw(rng, now, Some(engagement));
        let habits = Habits::draw(rng, &facts);
        let untold = engagement != Engagement::Closed;
        Self { habits, facts, untold, engagement, steps, trouble: 0.0, now, position: 0 }
    }

    /// A customer who joins, about to buy.
    pub(super) fn joining(rng: &mut ChaCha8Rng, now: i64) -> Self {
        let facts = Facts::draw(rng, now, None);
        let habits = Habits::draw(rng, &facts);
        Self { habits, facts, untold: true, engagement: Engagement::Active, steps: 1, trouble: 0.0, now, position: 0 }
    }

    /// Lives on to the next event; gives its time and record, or nothing if there is none before the world's end. Times of
    /// one customer's events rise strictly.
    pub(super) fn next(&mut self, id: CustomerId, rng: &mut ChaCha8Rng, world: &World) -> Option<(i64, Payload)> {
        loop {
            if std::mem::take(&mut self.untold) {
                return Some((self.now, Payload::Profile(self.facts.record(id, self.now))));
            }
            let levels = Levels::at(&world.shifts, world.start, self.now);
            let mood = self.engagement.mood();
            let steps =
                f64::from(STEPS) * self.habits.purchases * mood.purchases * self.facts.purchases() * world.scale;
            let logins = self.habits.logins * mood.logins * world.scale * levels.logins;
            let contacts = self.habits.contacts * mood.contacts * self.facts.contacts() * world.scale * levels.support;
            let changes = self.facts.rates(self.engagement);
            let seasonal = (steps + logins + contacts) * world.season.greatest();
            // Trouble only fades between events, and customers only get less new: the rate of now bounds that of later.
            let bound = seasonal + self.rate_of_change(&levels) + changes.iter().map(|(_, rate)| rate).sum::<f64>();
            let wait: f64 = Exp1.sample(rng);
            let time = self.now.saturating_add((wait / bound * DAY_MS as f64) as i64).saturating_add(1);
            if time >= levels.until.min(world.end) {
                if levels.until >= world.end {
                    return None;
                }
                // Rates change here; the process has no memory, so it is drawn afresh from here on.
                self.advance(levels.until);
                continue;
            }
            self.advance(time);
            let season = world.season.at(time);
            let mut u = rng.random::<f64>() * bound;
            let mut chosen = |rate: f64| {
                u -= rate;
                u < 0.0
            };
            if chosen(steps * season) {
                self.steps -= 1;
                if self.steps > 0 {
                    continue;
                }
                self.steps = STEPS;
                return Some((time, Payload::Purchase(self.purchase(id, rng, mood.basket, levels.amount))));
            } else if chosen(logins * season) {
                let device = if rng.random::<f64>() < self.habits.app { "app" } else { "web" };
                return Some((time, Payload::Login(Login { customer_id: id, logged_in_at: time, device })));
            } else if chosen(contacts * season) {
                return Some((time, Payload::Contact(self.contact(id, rng))));
            } else if let Some((change, _)) = changes.into_iter().find(|(_, rate)| chosen(*rate)) {
                self.facts.change(change, rng, time);
                self.untold = true;
            } else if chosen(self.rate_of_change(&levels)) {
                self.change(rng, &levels);
                if self.engagement == Engagement::Closed {
                    return Some((time, Payload::Closed(Closure { customer_id: id, closed_at: time })));
                }
            }
        }
    }

    /// Moves the clock on.
    fn advance(&mut self, time: i64) {
        self.trouble *= (-(time - self.now) as f64 / TROUBLE_HALF_LIFE_MS).exp2();
        self.now = time;
    }

    /// Changes of engagement a day.
    fn rate_of_change(&self, levels: &Levels) -> f64 {
        match self.engagement {
            Engagement::Active => {
                COOLING * self.facts.cooling(self.now) * self.trouble.exp() * self.haste(levels) * levels.churn
            }
            Engagement::Cooling => LEAVING * self.haste(levels) + WARMING,
            Engagement::Gone => RETURNING + CLOSING,
            Engagement::Closed => RETURNING,
        }
    }

    /// How much sooner a customer leaves at the price level in force.
    fn haste(&self, levels: &Levels) -> f64 {
        levels.amount.powf(self.habits.price_sensitivity)
    }

    fn change(&mut self, rng: &mut ChaCha8Rng, levels: &Levels) {
        self.engagement = match self.engagement {
            Engagement::Active => Engagement::Cooling,
            Engagement::Cooling if rng.random::<f64>() * self.rate_of_change(levels) > WARMING => Engagement::Gone,
            Engagement::Gone if rng.random::<f64>() * self.rate_of_change(levels) > RETURNING => Engagement::Closed,
            Engagement::Closed => {
                self.facts.sign_up(self.now);
                self.untold = true;
                Engagement::Active
            }
            Engagement::Cooling | Engagement::Gone => Engagement::Active,
        };
    }

    fn purchase(&self, id: CustomerId, rng: &mut ChaCha8Rng, basket: f64, level: f64) -> Purchase {
        let extra: f64 = Exp1.sample(rng);
        let quantity = 1 + (extra * self.habits.items * basket).round() as i64;
        let surprise: f64 = StandardNormal.sample(rng);
        let price = (self.habits.price + 0.30 * surprise).exp() * level;
        let amount = (quantity as f64 * price * 100.0).round() / 100.0;
        Purchase { customer_id: id, purchased_at: self.now, quantity, amount }
    }

    fn contact(&mut self, id: CustomerId, rng: &mut ChaCha8Rng) -> Contact {
        let subject = match rng.random::<f64>() {
            u if u < 0.40 => "question",
            u if u < 0.65 => "delivery",
            u if u < 0.80 => "billing",
            _ => "complaint",
        };
        let patience: f64 = Exp1.sample(rng);
        let wait_minutes = (patience * 80.0).round() / 10.0;
        let annoyance = if subject == "complaint" { 1.2 } else { 0.3 };
        self.trouble = (self.trouble + annoyance + wait_minutes / 15.0).min(TROUBLE_LIMIT);
        Contact { customer_id: id, contacted_at: self.now, subject, wait_minutes }
    }
}
