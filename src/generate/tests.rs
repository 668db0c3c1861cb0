use std::collections::HashMap;
use std::time::Duration;

use super::*;

/// A small, busy shop.
fn options() -> GenerateOptions {
    GenerateOptions { customers: 2_000, days: 100, growth: 0.3, ..GenerateOptions::default() }
}

fn purchases(events: &[GeneratedEvent]) -> impl Iterator<Item = &Purchase> {
    events.iter().filter_map(|e| match &e.payload {
        Payload::Purchase(p) => Some(p),
        _ => None,
    })
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0u32), |(sum, n), v| (sum + v, n + 1));
    sum / f64::from(n)
}

#[test]
fn same_options_same_stream() {
    let small = || GenerateOptions { customers: 300, ..options() };
    let first: Vec<_> = ChurnStream::new(small()).collect();
    assert_eq!(first, ChurnStream::new(small()).collect::<Vec<_>>());
    let other = ChurnStream::new(GenerateOptions { seed: 43, ..small() }).collect::<Vec<_>>();
    assert_ne!(first[..50], other[..50]);
    // A longer stream goes on where a shorter one ends.
    let longer = ChurnStream::new(GenerateOptions { days: 130, ..small() }).take(first.len()).collect::<Vec<_>>();
    let end = small().start + 100 * DAY_MS - 60_000;
    let before = |events: &[GeneratedEvent]| events.iter().filter(|e| e.timestamp < end).cloned().collect::<Vec<_>>();
    assert_eq!(before(&first), before(&longer));
}

#[test]
fn arrives_in_order_and_no_later_than_allowed() {
    let options = options();
    let (start, end) = (options.start, options.start + i64::from(options.days) * DAY_MS);
    let mut arrived = i64::MIN;
    let mut newest = start;
    let mut behind = 0;
    let mut last_of: HashMap<_, i64> = HashMap::new();
    for event in ChurnStream::new(options.clone()) {
        assert!(event.timestamp >= arrived, "timestamps never fall");
        arrived = event.timestamp;
        assert!((start..end).contains(&event.event_time()));
        assert!((0..=options.disorder.as_millis() as i64).contains(&(event.timestamp - event.event_time())));
        if event.source() != "labels" {
            assert!(newest - event.event_time() <= options.disorder.as_millis() as i64);
            behind += u32::from(event.event_time() < newest);
            newest = newest.max(event.event_time());
            if let Some(before) = last_of.insert(event.customer(), event.event_time()) {
                assert!(before < event.event_time(), "a customer's own events are in order");
            }
        }
    }
    assert!(behind > 0, "some events are out of order");
    let tidy = GenerateOptions { disorder: Duration::ZERO, customers: 300, ..options };
    assert!(ChurnStream::new(tidy).is_sorted_by_key(|e| e.timestamp.max(e.event_time())));
}

#[test]
fn customers_join_and_all_kinds_of_events_occur() {
    let events: Vec<_> = ChurnStream::new(options()).collect();
    let count = |source| events.iter().filter(|e| e.source() == source).count();
    let [bought, logins, support] = ["purchases", "logins", "support"].map(count);
    assert!(logins > bought && bought > 4 * support && support > 500, "{bought} {logins} {support}");
    let joined = events.iter().map(|e| e.customer().0).max().unwrap() - 1_999;
    // 2,000 · 0.3 · 100 / 365 = 164 expected.
    assert!((120..210).contains(&joined), "{joined} joined");
}

#[test]
fn days_and_hours_have_their_seasons() {
    let events: Vec<_> = ChurnStream::new(options()).collect();
    let hour = |h: i64| purchases(&events).filter(|p| p.purchased_at.rem_euclid(DAY_MS) / (DAY_MS / 24) == h).count();
    assert!(hour(20) > 8 * hour(4), "evenings {} nights {}", hour(20), hour(4));
    let weekday = |d: i64| purchases(&events).filter(|p| (p.purchased_at / DAY_MS + 3) % 7 == d).count() as f64;
    let ratio = weekday(5) / weekday(1);
    assert!((1.3..1.65).contains(&ratio), "Saturday by Tuesday: {ratio}");
}

#[test]
fn labels_are_true() {
    let options = GenerateOptions { label_horizon: Duration::from_secs(20 * 86_400), ..options() };
    let horizon = options.label_horizon.as_millis() as i64;
    let delay = horizon + options.disorder.as_millis() as i64;
    let end = options.start + i64::from(options.days) * DAY_MS;
    let events: Vec<_> = ChurnStream::new(options).collect();
    let mut times: HashMap<_, Vec<i64>> = HashMap::new();
    for p in purchases(&events) {
        times.entry(p.customer_id).or_default().push(p.purchased_at);
    }
    let mut labels = HashMap::new();
    for event in &events {
        if let Payload::Label(l) = &event.payload {
            assert!(l.labelled_at >= l.as_of + horizon && event.timestamp == l.labelled_at);
            let bought = times[&l.customer_id].iter().any(|t| (l.as_of + 1..=l.as_of + horizon).contains(t));
            assert_eq!(l.churned, !bought, "{l:?}");
            assert!(labels.insert((l.customer_id, l.as_of), l.churned).is_none(), "one label a purchase");
        }
    }
    let due: usize = times.values().flatten().filter(|t| **t + delay < end - 60_000).count();
    assert!(labels.len() >= due, "every purchase gets its label");
    let churned = labels.values().filter(|c| **c).count() as f64 / labels.len() as f64;
    assert!((0.15..0.40).contains(&churned), "base rate {churned}");
}

#[test]
fn a_shift_changes_what_it_says_from_its_day_on() {
    let day = |t: i64| (t - options().start) / DAY_MS;
    let calm: Vec<_> = ChurnStream::new(options()).collect();
    let shifted = |text: &str| -> Vec<GeneratedEvent> {
        ChurnStream::new(GenerateOptions { shifts: vec![text.parse().unwrap()], ..options() }).collect()
    };

    let dearer = shifted("amount*1.33@60");
    let before =
        |events: &[GeneratedEvent]| events.iter().take_while(|e| day(e.timestamp) < 60).cloned().collect::<Vec<_>>();
    // Labels that are known before the shift, too.
    assert_eq!(before(&calm), before(&dearer));
    let amounts = |events: &[GeneratedEvent]| {
        mean(purchases(events).filter(|p| (60..70).contains(&day(p.purchased_at))).map(|p| p.amount))
    };
    let ratio = amounts(&dearer) / amounts(&calm);
    assert!((1.28..1.42).contains(&ratio), "amounts rose by {ratio}");

    let rate = |events: &[GeneratedEvent], source: &str, days: std::ops::Range<i64>| {
        events.iter().filter(|e| e.source() == source && days.contains(&day(e.timestamp))).count() as f64
    };
    let burst = shifted("support*5@60..64");
    let ratio = rate(&burst, "support", 60..64) / rate(&calm, "support", 60..64);
    assert!((4.0..6.0).contains(&ratio), "contacts rose by {ratio}");
    let ratio = rate(&burst, "support", 66..80) / rate(&calm, "support", 66..80);
    assert!((0.8..1.2).contains(&ratio), "and fell back to {ratio}");

    let fewer = shifted("logins*0.5@60");
    let ratio = rate(&fewer, "logins", 60..100) / rate(&calm, "logins", 60..100);
    assert!((0.46..0.54).contains(&ratio), "logins fell to {ratio}");
    let ratio = rate(&fewer, "purchases", 60..100) / rate(&calm, "purchases", 60..100);
    assert!((0.95..1.05).contains(&ratio), "purchases went on: {ratio}");

    let leaving = shifted("churn*6@60");
    let ratio = rate(&leaving, "purchases", 85..100) / rate(&calm, "purchases", 85..100);
    assert!(ratio < 0.8, "purchases with churn {ratio}");
}

#[test]
fn records_are_written_as_their_schemas_say() {
    let purchase =
        Purchase { customer_id: CustomerId(42), purchased_at: 1_735_689_600_000, quantity: 2, amount: 29.33 };
    let event = GeneratedEvent { timestamp: purchase.purchased_at + 5, payload: Payload::Purchase(purchase) };
    let mut text = Vec::new();
    event.write_json(&mut text);
    let expected = r#"{"customer_id":"C000042","purchased_at":1735689600000,"quantity":2,"amount":29.33}"#;
    assert_eq!(std::str::from_utf8(&text).unwrap(), expected);
    assert_eq!(event.to_json(), serde_json::from_str::<serde_json::Value>(expected).unwrap());
    assert_eq!((event.source(), event.customer().to_string()), ("purchases", "C000042".to_owned()));
    assert_eq!(CustomerId(u32::MAX).to_string(), "C4294967295");
}

#[test]
fn facts_come_first_change_and_end_with_the_account() {
    let options = options();
    let mut known: HashMap<CustomerId, Profile> = HashMap::new();
    let (mut changes, mut closed, mut reopened) = (HashMap::<&str, u32>::new(), 0, 0);
    for event in ChurnStream::new(options.clone()) {
        let customer = event.customer();
        match &event.payload {
            Payload::Profile(now) => {
                assert_eq!((event.timestamp, now.customer_id), (now.changed_at, customer), "facts are never delayed");
                assert!(now.signed_up_at <= now.plan_since && now.plan_since <= now.changed_at, "{now:?}");
                let first = event.timestamp == options.start || now.signed_up_at == now.changed_at;
                match known.insert(customer, now.clone()) {
                    None => {
                        assert!(first, "{now:?} comes out of nowhere");
                        reopened += u32::from(customer.0 < options.customers && event.timestamp > options.start);
                    }
                    Some(before) => {
                        // A customer who moves may stay in the region.
                        let [moved, paid, planned, wants] = [
                            before.region != now.region,
                            before.payment != now.payment,
                            before.plan != now.plan,
                            before.newsletter != now.newsletter,
                        ];
                        assert!([moved, paid, planned, wants].iter().filter(|c| **c).count() <= 1, "one at a time");
                        assert_eq!(planned, before.plan_since != now.plan_since);
                        assert_eq!((before.born, before.signed_up_at), (now.born, now.signed_up_at));
                        for (what, changed) in
                            [("region", moved), ("payment", paid), ("plan", planned), ("newsletter", wants)]
                        {
                            *changes.entry(what).or_default() += u32::from(changed);
                        }
                    }
                }
            }
            Payload::Closed(end) => {
                assert_eq!((event.timestamp, event.event_time()), (end.closed_at, end.closed_at));
                assert!(known.remove(&customer).is_some(), "only an account that is open can be closed");
                assert_eq!((event.is_tombstone(), event.to_json()), (true, serde_json::Value::Null));
                closed += 1;
            }
            Payload::Label(_) => {}
            _ => assert!(known.contains_key(&customer), "{customer} does something without an account"),
        }
    }
    assert!(closed > 50 && reopened > 50, "{closed} accounts were closed, {reopened} opened again");
    assert!(["region", "payment", "plan", "newsletter"].iter().all(|what| changes[what] > 50), "{changes:?}");
}

/// Customers whose newest facts fulfil a condition: share of their purchases that were the last for a month.
fn churn(events: &[GeneratedEvent], condition: impl Fn(&Profile, i64) -> bool) -> f64 {
    let mut known: HashMap<CustomerId, &Profile> = HashMap::new();
    let mut asked: HashMap<(CustomerId, i64), bool> = HashMap::new();
    let mut outcomes = Vec::new();
    for event in events {
        match &event.payload {
            Payload::Profile(facts) => drop(known.insert(facts.customer_id, facts)),
            Payload::Purchase(p) => {
                asked.insert((p.customer_id, p.purchased_at), condition(known[&p.customer_id], p.purchased_at));
            }
            Payload::Label(label) if asked[&(label.customer_id, label.as_of)] => {
                outcomes.push(f64::from(label.churned))
            }
            _ => {}
        }
    }
    mean(outcomes.into_iter())
}

#[test]
fn who_they_are_tells_who_leaves() {
    let events: Vec<_> = ChurnStream::new(GenerateOptions { customers: 6_000, ..options() }).collect();
    let free = churn(&events, |facts, _| facts.plan == "free");
    let premium = churn(&events, |facts, _| facts.plan == "premium");
    assert!(free > 1.5 * premium, "free {free}, premium {premium}");
    let new = churn(&events, |facts, at| at - facts.signed_up_at < 90 * DAY_MS);
    let old = churn(&events, |facts, at| at - facts.signed_up_at >= 90 * DAY_MS);
    assert!(new > 1.1 * old, "new {new}, old {old}");
    let young = churn(&events, |facts, _| facts.born.is_some_and(|born| born >= 1995));
    let senior = churn(&events, |facts, _| facts.born.is_some_and(|born| born < 1965));
    assert!(young > 1.1 * senior, "young {young}, senior {senior}");
}

/// The fields of a record and of its schema file have the same names in the same order.
#[rstest::rstest]
#[case("purchases", include_str!("../../schemas/churn/purchase.avsc"))]
#[case("support", include_str!("../../schemas/churn/contact.avsc"))]
#[case("profile", include_str!("../../schemas/churn/customer.avsc"))]
fn records_fit_their_avro_schemas(#[case] source: &str, #[case] schema: &str) {
    let apache_avro::Schema::Record(schema) = apache_avro::Schema::parse_str(schema).unwrap() else {
        panic!("a record's schema")
    };
    let event = ChurnStream::new(options()).find(|e| e.source() == source).unwrap();
    let record = event.to_json();
    let fields: Vec<_> = schema.fields.iter().map(|f| f.name.clone()).collect();
    let mut names: Vec<_> = record.as_object().unwrap().keys().cloned().collect();
    // serde_json sorts the keys of its maps.
    assert_eq!(names.len(), fields.len());
    names.sort_by_key(|name| fields.iter().position(|field| field == name));
    assert_eq!(names, fields);
}
