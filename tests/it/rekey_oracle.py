"""Computes windows by customer and by product with DuckDB and compares them with what driftline wrote.

    rekey_oracle.py EVENTS.jsonl OUT_OF_ORDER_MS ROWS.json

EVENTS has one event a line: partition and offset at the source, customer_id, product_id, at, amount. ROWS maps a table to its key and the
committed records as JSON lines. An event without its key is none; one that lies further behind the newest of its partition than
OUT_OF_ORDER_MS is late. Windows are those of a minute that end at or before the watermark: by customer that of the partition, by product
the least of all partitions. Events of one instant are in the order of partition and offset. Prints rows, late events, and by product the
number of events and the last amount; exits with 1 at a difference, naming it.
"""

import json
import sys

import duckdb

events, out_of_order, tables = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[3]))
db = duckdb.connect()
db.execute("create table read as select * exclude (\"at\"), \"at\" as ts from read_json(?, format = 'newline_delimited', columns = {partition: 'int', \"offset\": 'bigint', customer_id: 'varchar', product_id: 'bigint', \"at\": 'bigint', amount: 'double'})", [events])
found = {}
for name, table in tables.items():
    key = table["key"]
    kind = "varchar" if key == "customer_id" else "bigint"
    db.execute(f"""create or replace table event as select *, coalesce(ts < before - {out_of_order}, false) as late from
        (select *, max(ts) over (partition by partition order by "offset" rows between unbounded preceding and 1 preceding) as before
         from read where {key} is not null)""")
    clock = f"select partition, max(ts) - {out_of_order} as watermark from event group by 1"
    if key == "product_id":
        clock = f"select min(watermark) as watermark from ({clock})"
    joined = "cross join" if key == "product_id" else "natural join"
    place = "(ts, partition, \"offset\")"
    db.execute(f"""create or replace table wanted as select {key} as key, window_start, count(*) as count, sum(amount) as sum,
        arg_min(amount, {place}) as first, arg_max(amount, {place}) as last
        from (select *, ts // 60000 * 60000 as window_start from event where not late) {joined} ({clock})
        where window_start + 60000 <= watermark group by 1, 2""")
    db.execute(f"create or replace table got as select {key} as key, * from read_json(?, format = 'newline_delimited', columns = {{{key}: '{kind}', window_start: 'bigint', window_end: 'bigint', count: 'bigint', sum: 'double', first: 'double', last: 'double', final: 'boolean'}})", [table["rows"]])
    bad = db.execute("""select w.*, g.* from wanted w full join got g using (key, window_start)
        where g.count is null or w.count is null or not (g.count = w.count and g.first = w.first and g.last = w.last and g.final
        and g.window_end = window_start + 60000 and abs(g.sum - w.sum) <= 1e-9 * abs(w.sum)) limit 3""").fetchall()
    if bad:
        print(f"{name}: {bad}", file=sys.stderr)
        sys.exit(1)
    (count, twice), = db.execute("select count(*), count(*) - count(distinct (key, window_start)) from got").fetchall()
    if twice:
        print(f"{name}: {twice} rows are there twice", file=sys.stderr)
        sys.exit(1)
    late, = db.execute("select count(*) from event where late").fetchone()
    newest = db.execute(f"select {key}, count(*), arg_max(amount, {place}) from event where not late group by 1 order by 2 desc").fetchall()
    found[name] = {"rows": count, "late": late, "newest": {str(k): [n, last] for k, n, last in newest}}
print(json.dumps(found))
