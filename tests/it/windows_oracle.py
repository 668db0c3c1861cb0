"""Computes emitted windows with DuckDB and compares them with what driftline wrote.

    windows_oracle.py EVENTS.jsonl OUT_OF_ORDER_MS WINDOWS.json

EVENTS has one event a line: partition, offset, customer_id, at, amount. WINDOWS maps a name to
{"kind": "hopping", "length": ms, "step": ms} or {"kind": "session", "gap": ms}, with "rows": the committed records as JSON lines, and
"files": the Arrow files. Windows are those that end at or before their partition's watermark. Counts, minima and maxima must be equal,
sums and means to 1e-9 relative; the files must hold the records, each once.
Prints the number of rows of each; exits with 1 at a difference, naming it.
"""

import json
import sys

import duckdb
import pyarrow as pa
import pyarrow.ipc

events, out_of_order, specs = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[3]))
db = duckdb.connect()
db.execute("create table event as select * exclude (\"at\"), \"at\" as ts from read_json(?, format = 'newline_delimited', columns = {partition: 'int', \"offset\": 'bigint', customer_id: 'varchar', \"at\": 'bigint', amount: 'double'})", [events])
db.execute(f"create table clock as select partition, max(ts) - {out_of_order} as watermark from event group by 1")
late = db.execute(f"select count(*) from (select ts, max(ts) over (partition by partition order by \"offset\") - {out_of_order} w from event) where ts < w").fetchone()[0]
assert late == 0, f"{late} late events: this oracle knows none"

SELECT = "customer_id, {start} as window_start, {end} as window_end, count(*) as count, sum(amount) as sum, avg(amount) as mean, min(amount) as min, max(amount) as max, true as final"


def expected(spec):
    if spec["kind"] == "hopping":
        length, step = spec["length"], spec["step"]
        hops = f"select *, unnest(range((ts // {step}) * {step} - {length} + {step}, (ts // {step}) * {step} + 1, {step})) as s from event"
        select = SELECT.format(start="s", end=f"s + {length}")
        return f"select any_value(partition) as partition, {select} from ({hops}) group by customer_id, s"
    gap = spec["gap"]
    runs = f"select *, sum(case when before is null or ts - before >= {gap} then 1 else 0 end) over (partition by customer_id order by ts, \"offset\") as run from (select *, lag(ts) over (partition by customer_id order by ts, \"offset\") as before from event)"
    select = SELECT.format(start="min(ts)", end=f"max(ts) + {gap}")
    return f"select any_value(partition) as partition, {select} from ({runs}) group by customer_id, run"


def fail(message):
    print(message, file=sys.stderr)
    sys.exit(1)


sizes = {}
for name, spec in specs.items():
    db.execute(f"create or replace table wanted as select e.* from ({expected(spec)}) e join clock using (partition) where window_end <= watermark")
    db.execute("create or replace table got as select * from read_json(?, format = 'newline_delimited', columns = {customer_id: 'varchar', window_start: 'bigint', window_end: 'bigint', count: 'bigint', sum: 'double', mean: 'double', min: 'double', max: 'double', final: 'boolean'})", [spec["rows"]])
    keys = "customer_id, window_start, window_end"
    close = " and ".join(f"abs(g.{c} - w.{c}) <= 1e-9 * greatest(1, abs(w.{c}))" for c in ("sum", "mean"))
    bad = db.execute(f"""select w.*, g.* from wanted w full join got g using ({keys})
        where g.count is null or w.count is null or not (g.count = w.count and g.min = w.min and g.max = w.max and g.final and {close}) limit 3""").fetchall()
    if bad:
        fail(f"{name}: {bad}")
    (count, twice), = db.execute(f"select count(*), count(*) - count(distinct ({keys})) from got").fetchall()
    if twice:
        fail(f"{name}: {twice} rows are there twice")
    tables = [pa.ipc.open_file(path).read_all() for path in spec["files"]]
    if not tables:
        fail(f"{name}: there are no files")
    files = pa.concat_tables(tables)
    db.register("files", files)
    (rows, same), = db.execute(f"""select (select count(*) from files), count(*) from files f join got g on f.customer_id = g.customer_id and epoch_ms(f.window_start) = g.window_start
        and epoch_ms(f.window_end) = g.window_end and f.count = g.count and f.sum = g.sum and f.mean = g.mean and f.min = g.min and f.max = g.max and f.final""").fetchall()
    db.unregister("files")
    if not rows == same == count:
        fail(f"{name}: {count} records, {rows} rows in files, of which {same} are the same")
    sizes[name] = count
print(json.dumps(sizes))
