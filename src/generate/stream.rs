//! All customers together: one stream in order of arrival, with labels once they are known.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Exp1};

use super::DAY_MS;
use super::customer::{Customer, World};
use super::event::{CustomerId, GeneratedEvent, Label, Payload};
use super::season::Season;
use super::shift::Shift;

/// What to generate. The same options give the same stream.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Customers on the first day, active and gone ones.
    pub customers: u32,
    /// Customers who join in a year, as a share of those on the first day.
    pub growth: f64,
    /// First instant, milliseconds since 1970 UTC (inclusive).
    pub start: i64,
    /// Length of the stream. Neither events nor labels of later instants come.
    pub days: u32,
    /// Factor on everyone's purchases, logins and contacts a day.
    pub scale: f64,
    /// Seed.
    pub seed: u64,
    /// What changes on the way.
    pub shifts: Vec<Shift>,
    /// A label says whether a customer bought within this after a purchase; it comes `disorder` after that time is over.
    pub label_horizon: Duration,
    /// How long after its event time an event may reach the log. One in twenty takes some of it, the others are instant.
    pub disorder: Duration,
}

impl Default for GenerateOptions {
    /// 20,000 customers for 180 days from 2025-01-01 on, no shift, labels after 30 days.
    fn default() -> Self {
        Self {
            customers: 20_000,
            growth: 0.2,
            start: 1_735_689_600_000,
            days: 180,
            scale: 1.0,
            seed: 42,
            shifts: Vec::new(),
            label_horizon: Duration::from_secs(30 * 86_400),
            disorder: Duration::from_secs(8),
        }
    }
}

/// Share of events that take a while to reach the log.
const DISORDERED: f64 = 0.05;

/// A purchase whose outcome is not known yet.
#[derive(Debug)]
struct OpenLabel {
    customer: CustomerId,
    as_of: i64,
    due: i64,
    churned: bool,
}

/// A customer's place in the merge.
#[derive(Debug)]
struct Seat {
    customer: Customer,
    /// The next record, until it reaches the log.
    pending: Option<Payload>,
    /// Number of the label of the newest purchase, counted from the stream's start.
    label: Option<u64>,
}

/// The events of all customers and the labels, in order of arrival. What the shop knows about its customers on the first
/// day comes before everything else, at its first instant. Needs memory for the customers and for the purchases of
/// one label horizon, however long the stream.
#[derive(Debug)]
pub struct ChurnStream {
    world: World,
    rng: ChaCha8Rng,
    seats: Vec<Seat>,
    /// Arrival of each customer's pending record.
    queue: BinaryHeap<Reverse<(i64, u32)>>,
    next_join: i64,
    joins_a_day: f64,
    /// Where in stream 0 of the generator the joins go on.
    joins_position: u64,
    horizon: i64,
    disorder: i64,
    labels: VecDeque<OpenLabel>,
    /// Number of the first label in `labels`.
    first_label: u64,
}

impl ChurnStream {
    /// Draws the customers of the first day.
    pub fn new(options: GenerateOptions) -> Self {
        let end = options.start + i64::from(options.days) * DAY_MS;
        let mut stream = Self {
            world: World {
                season: Season::new(),
                shifts: options.shifts,
                start: options.start,
                end,
                scale: options.scale,
            },
            rng: ChaCha8Rng::seed_from_u64(options.seed),
            seats: Vec::with_capacity(options.customers as usize),
            queue: BinaryHeap::with_capacity(options.customers as usize),
            next_join: options.start,
            joins_a_day: f64::from(options.customers) * options.growth / 365.0,
            joins_position: 0,
            horizon: options.label_horizon.as_millis() as i64,
            disorder: options.disorder.as_millis() as i64,
            labels: VecDeque::new(),
            first_label: 0,
        };
        for _ in 0..options.customers {
            stream.seat(options.start, Customer::existing);
        }
        stream.draw_join();
        stream
    }

    /// Adds a customer. Each has a random stream of its own, so that none depends on what the others do.
    fn seat(&mut self, now: i64, draw: fn(&mut ChaCha8Rng, i64) -> Customer) {
        let id = self.seats.len() as u32;
        self.rng.set_stream(u64::from(id) + 1);
        self.rng.set_word_pos(0);
        let mut customer = draw(&mut self.rng, now);
        customer.position = self.rng.get_word_pos() as u64;
        self.seats.push(Seat { customer, pending: None, label: None });
        self.queue_next(id, now);
    }

    /// Draws a customer's next record and puts it in line, not before `arrived`, when the one before reached the log.
    fn queue_next(&mut self, id: u32, arrived: i64) {
        let seat = &mut self.seats[id as usize];
        self.rng.set_stream(u64::from(id) + 1);
        self.rng.set_word_pos(u128::from(seat.customer.position));
        let next = seat.customer.next(CustomerId(id), &mut self.rng, &self.world);
        if let Some((time, payload)) = next {
            // Facts come from a database's log of changes, which has no delays.
            let facts = matches!(payload, Payload::Profile(_) | Payload::Closed(_));
            let delayed = !facts && self.rng.random::<f64>() < DISORDERED;
            let delay = if delayed { (self.rng.random::<f64>() * self.disorder as f64) as i64 } else { 0 };
            seat.pending = Some(payload);
            self.queue.push(Reverse(((time + delay).max(arrived), id)));
        }
        seat.customer.position = self.rng.get_word_pos() as u64;
    }

    fn draw_join(&mut self) {
        self.rng.set_stream(0);
        self.rng.set_word_pos(u128::from(self.joins_position));
        let wait: f64 = Exp1.sample(&mut self.rng);
        self.joins_position = self.rng.get_word_pos() as u64;
        // Without growth the wait is infinite, and the cast saturates.
        self.next_join = self.next_join.saturating_add((wait / self.joins_a_day * DAY_MS as f64) as i64);
    }

    fn arrival(&self) -> i64 {
        self.queue.peek().map_or(i64::MAX, |Reverse((arrival, _))| *arrival)
    }

    /// Keeps the books of a purchase that reached the log: settles the customer's label before it, opens its own.
    fn note_purchase(&mut self, customer: CustomerId, time: i64, arrival: i64) {
        let seat = &mut self.seats[customer.0 as usize];
        let open = seat.label.and_then(|number| number.checked_sub(self.first_label));
        if let Some(open) = open.and_then(|index| self.labels.get_mut(index as usize))
            && time - open.as_of <= self.horizon
        {
            open.churned = false;
        }
        seat.label = Some(self.first_label + self.labels.len() as u64);
        // Whatever happened by `as_of + horizon` has reached the log by then.
        let due = arrival + self.horizon + self.disorder;
        self.labels.push_back(OpenLabel { customer, as_of: time, due, churned: true });
    }

    fn pop_label(&mut self) -> Option<GeneratedEvent> {
        let OpenLabel { customer, as_of, due, churned } = self.labels.pop_front()?;
        self.first_label += 1;
        let label = Label { customer_id: customer, as_of, churned, labelled_at: due };
        Some(GeneratedEvent { timestamp: due, payload: Payload::Label(label) })
    }
}

impl Iterator for ChurnStream {
    type Item = GeneratedEvent;

    fn next(&mut self) -> Option<GeneratedEvent> {
        while self.next_join < self.arrival().min(self.world.end) {
            let now = self.next_join;
            self.seat(now, Customer::joining);
            self.draw_join();
        }
        // A label gives way to events of the same instant, which may still settle it.
        if let Some(label) = self.labels.front()
            && label.due < self.arrival().min(self.world.end)
        {
            return self.pop_label();
        }
        let Reverse((timestamp, id)) = self.queue.pop()?;
        let payload = self.seats[id as usize].pending.take().expect("whoever is in line has a record");
        if let Payload::Purchase(purchase) = &payload {
            self.note_purchase(purchase.customer_id, purchase.purchased_at, timestamp);
        }
        self.queue_next(id, timestamp);
        Some(GeneratedEvent { timestamp, payload })
    }
}
