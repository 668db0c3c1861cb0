//! Features of another entity, computed by another pipeline, read from Redis: on Kafka, by the whole binary.

use std::collections::BTreeMap;

use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use crate::process::World;
use crate::servers::{Kafka, Redis, unique};

const START: i64 = 1_735_689_600_000;
const DAY: i64 = 86_400_000;

const CATALOG: &str = r#"
name = "NAME-catalog"
broker = { brokers = "${KAFKA_BROKERS}" }
online = { redis = "${REDIS_URL}" }
offline = { url = "${OFFLINE_URL}" }
[entities.product]
key = { product_id = "int64" }
[sources.prices]
topic = "NAME.prices"
format = "json"
fields = { product_id = "int64", at = "int64", amount = "float64", brand = "string" }
event_time = { field = "at", unit = "ms" }
ahead = "36500d"
[features.price]
source = "prices"
of = "amount"
functions = ["last"]
windows = ["lifetime"]
[features.brand]
source = "prices"
of = "brand"
functions = ["last"]
windows = ["lifetime"]
"#;

const SHOP: &str = r#"
name = "NAME-shop"
broker = { brokers = "${KAFKA_BROKERS}" }
online = { redis = "${REDIS_URL}" }
offline = { url = "${OFFLINE_URL}" }
[entities.customer]
key = { customer_id = "string" }
[sources.orders]
topic = "NAME.orders"
format = "json"
fields = { customer_id = "string", at = "int64", product = "int64" }
event_time = { field = "at", unit = "ms" }
ahead = "36500d"
[features.bought]
source = "orders"
of = "product"
functions = ["last", "count"]
windows = ["lifetime"]
[lookups.product]
project = "NAME-catalog"
view = "price"
key = { product_id = "bought_last_lifetime" }
features = { price_last_lifetime = "float64", nothing = "int64" }
max_age = "30d"
[lookups.its]
project = "NAME-catalog"
view = "brand"
key = { product_id = "bought_last_lifetime" }
features = { brand_last_lifetime = "string" }
unavailable = "null"
[derived]
paid = "product_price_last_lifetime * bought_count_lifetime"
much = "coalesce(paid, 0) > 100"
often = "bought_count_lifetime > 3"
[score]
on = "orders"
model = "none"
"#;

#[test]
fn rows_have_the_features_of_what_was_bought() {
    let (kafka, redis) = (Kafka::shared(), Redis::shared());
    let name = unique("lookups");
    let mut world = World::new();
    world.set("KAFKA_BROKERS", &kafka.address());
    world.set("REDIS_URL", &redis.url());
    let [catalog, shop] = [("catalog", CATALOG), ("shop", SHOP)]
        .map(|(pipeline, text)| world.define(pipeline, &text.replace("NAME", &name)));
    let topic = |of: &str| format!("{name}.{of}");
    kafka.create(&topic("prices"), 2);
    kafka.create(&topic("orders"), 3);
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
    // What each product costs, since when, and its brand, which not every price comes with.
    let mut prices: BTreeMap<i64, (i64, f64)> = BTreeMap::new();
    let mut brands: BTreeMap<i64, String> = BTreeMap::new();
    let mut records = Vec::new();
    for number in 0..500_i64 {
        let (product, at, amount) = (rng.random_range(0..100), START + number * 1_000, number as f64 / 4.0);
        let brand = (number % 4 == 0).then(|| format!("brand {}", number % 9));
        let value = json!({ "product_id": product, "at": at, "amount": amount, "brand": brand });
        prices.insert(product, (at, amount));
        brands.extend(brand.map(|brand| (product, brand)));
        records.push(((product % 2) as i32, product.to_string(), value.to_string()));
    }
    kafka.produce(
        &topic("prices"),
        records.iter().map(|(partition, key, value)| (*partition, key.as_bytes(), value.as_bytes())),
    );
    let mut orders = Vec::new();
    for number in 0..2_000_i64 {
        let customer = format!("c{}", rng.random_range(0..50));
        // Some buy what is in no catalog.
        let product = rng.random_range(0..120_i64);
        let at = START + number * DAY / 50;
        orders.push((customer.as_bytes().iter().map(|byte| i32::from(*byte)).sum::<i32>() % 3, customer, at, product));
    }
    let values: Vec<String> = orders
        .iter()
        .map(|(_, customer, at, product)| json!({ "customer_id": customer, "at": at, "product": product }).to_string())
        .collect();
    kafka.produce(
        &topic("orders"),
        orders
            .iter()
            .zip(&values)
            .map(|((partition, customer, ..), value)| (*partition, customer.as_bytes(), value.as_bytes())),
    );

    for pipeline in [&catalog, &shop] {
        world.run(&["features", pipeline, "--until-end", "--listen", "none", "--view", "none"]);
    }
    let rows = kafka.consume(&format!("{name}-shop.features"));
    assert_eq!(rows.len(), orders.len());
    let mut found: BTreeMap<&str, usize> = BTreeMap::new();
    for record in rows {
        let row: Value = serde_json::from_slice(&record.value.unwrap()).unwrap();
        let (features, at) = (&row["features"], row["event_time"].as_i64().unwrap());
        let product = features["bought_last_lifetime"].as_i64().unwrap();
        let (kind, price) = match prices.get(&product) {
            Some((since, amount)) if at - since <= 30 * DAY => ("present", json!(amount)),
            Some(_) => ("too old", Value::Null),
            None => ("unknown", Value::Null),
        };
        *found.entry(kind).or_default() += 1;
        assert_eq!(features["product_price_last_lifetime"], price, "{row}");
        assert_eq!(features["its_brand_last_lifetime"], json!(brands.get(&product)), "{row}");
        assert_eq!(features["product_nothing"], Value::Null, "the catalog has no such feature");
        let count = features["bought_count_lifetime"].as_f64().unwrap();
        let paid = price.as_f64().map(|price| price * count);
        assert_eq!(
            (features["paid"].as_f64(), &features["much"]),
            (paid, &json!(paid.is_some_and(|paid| paid > 100.0)))
        );
        assert_eq!(features["often"], json!(count > 3.0));
    }
    assert!(found.len() == 3 && found.values().all(|count| *count > 100), "{found:?}");
    // What was looked up is none of the customer's own features.
    let own = world.run(&["get", &shop, "c1", "--json"]);
    assert!(own.contains("bought_last_lifetime") && own.contains("often"), "{own}");
    assert!(!own.contains("product_price") && !own.contains("much"), "{own}");
}

#[test]
fn what_was_read_last_is_used_while_redis_is_away() {
    let (kafka, redis) = (Kafka::shared(), Redis::start());
    let name = unique("stale");
    let mut world = World::new();
    world.set("KAFKA_BROKERS", &kafka.address());
    world.set("REDIS_URL", &redis.url());
    let shop = SHOP.replace("max_age = \"30d\"", "unavailable = \"stale\"\ntimeout = \"200ms\"");
    let [catalog, shop] = [("catalog", CATALOG), ("shop", &shop)]
        .map(|(pipeline, text)| world.define(pipeline, &text.replace("NAME", &name)));
    kafka.create(&format!("{name}.prices"), 1);
    kafka.create(&format!("{name}.orders"), 1);
    kafka.create(&format!("{name}-shop.features"), 1);
    let price = json!({ "product_id": 7, "at": START, "amount": 2.5, "brand": "x" }).to_string();
    kafka.produce(&format!("{name}.prices"), [(0, &b"7"[..], price.as_bytes())]);
    let order = |number: i64| {
        let order = json!({ "customer_id": "c1", "at": START + number, "product": 7 }).to_string();
        kafka.produce(&format!("{name}.orders"), [(0, &b"c1"[..], order.as_bytes())]);
    };
    world.run(&["features", &catalog, "--until-end", "--listen", "none", "--view", "none"]);

    let mut running = world.start(world.command(&["features", &shop, "--listen", "none", "--view", "none"]));
    let mut rows = kafka.follow(&format!("{name}-shop.features"));
    order(1);
    running.until("the first row is there", || rows.read().len() == 1);
    // Whatever is read from here on is not in Redis any more.
    redis.command(&[b"FLUSHALL"]);
    redis.stop();
    order(2);
    running.until_printed("features are those read last");
    redis.restart();
    running.until("the second row is there", || rows.read().len() == 2);
    order(3);
    running.until("the third row is there", || rows.read().len() == 3);
    let told: Vec<Value> = rows
        .read()
        .iter()
        .map(|record| {
            let row: Value = serde_json::from_slice(record.value.as_ref().unwrap()).unwrap();
            json!([row["features"]["product_price_last_lifetime"], row["features"]["its_brand_last_lifetime"]])
        })
        .collect();
    assert_eq!(told, [json!([2.5, "x"]), json!([2.5, null]), json!([null, null])], "price is used again, brand is not");
    running.signal(libc::SIGINT);
    assert_eq!(running.end().code(), Some(0), "{}", running.printed());
}
