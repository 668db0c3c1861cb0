"""Joins orders with the facts of their customers by DuckDB's ASOF JOIN and compares the rows with driftline's.

    tables_oracle.py ORDERS.jsonl PROFILES.jsonl PLANS.jsonl ROWS.jsonl

ORDERS has partition, "offset", customer_id and at; PROFILES and PLANS, the tables' topics as they are, have "offset", customer_id, since, and their
columns, all null where the record had no value. ROWS are the feature rows: partition and
"offset" of the order, customer_id, event_time, and the features.
Prints how many rows there are, and how many of them have facts; exits with 1 at a difference, naming it.
"""

import json
import sys

import duckdb

orders, profiles, plans, rows = sys.argv[1:]
db = duckdb.connect()


def load(name, path, columns):
    db.execute(f"create table {name} as select * from read_json(?, format = 'newline_delimited', columns = {columns})", [path])


load("orders", orders, "{partition: 'int', \"offset\": 'bigint', customer_id: 'varchar', \"at\": 'bigint'}")
load("profiles", profiles, "{\"offset\": 'bigint', customer_id: 'varchar', since: 'bigint', age: 'bigint', city: 'varchar', vip: 'boolean', score: 'double', born: 'bigint'}")
load("plans", plans, "{\"offset\": 'bigint', customer_id: 'varchar', since: 'bigint', name: 'varchar', price: 'double'}")
features = "profile_age: 'bigint', profile_city: 'varchar', profile_vip: 'boolean', profile_score: 'double', profile_born: 'bigint', plan_name: 'varchar', plan_price: 'double', plan_dear: 'boolean'"
load("rows", rows, f"{{partition: 'int', \"offset\": 'bigint', customer_id: 'varchar', event_time: 'bigint', {features}}}")
# Of rows of the same instant the one of the highest offset is the newest.
for table in ("profiles", "plans"):
    db.execute(f"create table newest_{table} as select * from {table} qualify row_number() over (partition by customer_id, since order by \"offset\" desc) = 1")
# A plan that costs nothing is none.
db.execute("update newest_plans set name = null, price = null where not coalesce(price > 0, false)")
db.execute("""create table wanted as select o.partition, o."offset", o.customer_id, o."at" as event_time, p.age as profile_age, p.city as profile_city, p.vip as profile_vip,
    p.score as profile_score, p.born as profile_born, l.name as plan_name, l.price as plan_price, l.price > 50 as plan_dear
    from orders o asof left join newest_profiles p on o.customer_id = p.customer_id and o."at" >= p.since
    asof left join newest_plans l on o.customer_id = l.customer_id and o."at" >= l.since""")
names = [c.split(":")[0].strip() for c in features.split(",")]
different = " or ".join(f"w.{name} is distinct from r.{name}" for name in names)
(count, wanted), = db.execute("select (select count(*) from rows), (select count(*) from wanted)").fetchall()
bad = db.execute(f"""select w.*, r.* from wanted w left join rows r on w.partition = r.partition and w."offset" = r."offset"
    where r.event_time is distinct from w.event_time or r.customer_id is distinct from w.customer_id or {different} limit 3""").fetchall()
if bad or count != wanted:
    print(f"{count} rows, {wanted} wanted: {bad}", file=sys.stderr)
    sys.exit(1)
(profile, plan), = db.execute("select count(profile_age), count(plan_name) from wanted").fetchall()
print(json.dumps({"rows": count, "profile": profile, "plan": plan}))
