"""Windows beside Apache Flink and Kafka Streams: the same events, the same broker, one after the other, each checked against DuckDB.

    benches/peers/compare.py [--events 5000000] [--folder target/peers] [--driftline target/release/driftline]
                             [--floor target/release/deps/floor-…] [--workloads tumbling,hopping,sliding] [--peers flink,kstreams] [--chart peers.svg]

Run it with the Python of `make test` (.venv/bin/python); it needs Java, Maven and Kafka's jars (`scripts/setup test`). Prints a table
in Markdown: CPU microseconds an event (user and system, the process's whole life), seconds of wall clock, peak memory. With `--floor`
(`benches/floor.rs`) also what reading, parsing and writing the events costs with driftline's Kafka client alone.

Workloads: `tumbling` (1 minute) and `hopping` (1 hour by 5 minutes): count, sum, mean, min and max of each customer's window, one record a
window. `sliding`: for each event one record with what the customer's last 10 minutes and last hour hold, driftline both as events arrive
and in event-time order, Flink in event-time order (by hand: see flink/Sliding.java). Kafka Streams takes part in the first two.

Events are JSON of about 100 bytes in 4 partitions: two hours of event time, 50,000 customers of whom the first has an eighth of all
events (Zipf), 2 % of the events up to 5 s late. driftline runs exactly once, and with emitted windows writes Arrow files besides; Flink runs at
least once with heap state, a checkpoint every 10 s, and parallelism 2; Kafka Streams at least once with RocksDB and changelogs (its
defaults) and two threads.
"""

import argparse
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import duckdb
import numpy
import pyarrow
import pyarrow.parquet

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = ROOT / "benches/peers"
START, SPAN, LATE = 1_735_689_600_000, 7_200_000, 5_000
WORKLOADS = {"tumbling": (60_000, 60_000), "hopping": (3_600_000, 300_000)}
PARTITIONS = 4
SLIDING = {"10m": 600_000, "1h": 3_600_000}
COLOURS = {"driftline": "#1f77b4", "Flink": "#e6522c", "Kafka Streams": "#7f7f7f"}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Kafka:
    def __init__(self, folder):
        self.port, controller = free_port(), free_port()
        folder.mkdir(parents=True)
        settings = {
            "process.roles": "broker,controller", "node.id": 1, "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self.port}", "controller.listener.names": "CONTROLLER",
            "log.dirs": folder / "log", "log.retention.ms": -1, "num.partitions": PARTITIONS, "group.initial.rebalance.delay.ms": 0,
            "offsets.topic.replication.factor": 1, "transaction.state.log.replication.factor": 1, "transaction.state.log.min.isr": 1,
        }
        (folder / "server.properties").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        java = ["java", "-Xmx1g", "-cp", str(ROOT / ".servers/kafka/libs/*")]
        format_log = ["kafka.tools.StorageTool", "format", "--cluster-id", "ZHJpZnRsaW5lLWJlbmNoLTA", "--config", "server.properties"]
        subprocess.run(java + format_log, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with open(folder / "server.log", "w") as log:
            self.process = subprocess.Popen(java + ["kafka.Kafka", "server.properties"], cwd=folder, stdout=log, stderr=log)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                if self.process.poll() is not None:
                    sys.exit(f"Kafka did not start: see {folder}/server.log")
                time.sleep(0.1)
        self.address = f"127.0.0.1:{self.port}"

    def stop(self):
        self.process.kill()
        self.process.wait()


def events(count, path):
    draw = numpy.random.default_rng(20_250_101)
    weights = numpy.arange(1, 50_001) ** -1.1
    customers = draw.permutation(50_000)[numpy.searchsorted(numpy.cumsum(weights) / weights.sum(), draw.random(count)).clip(0, 49_999)]
    at = START + numpy.arange(count, dtype=numpy.int64) * SPAN // count
    late = draw.random(count) < 0.02
    at[late] -= draw.integers(1, LATE, late.sum())
    amount = (draw.lognormal(3, 1, count) * 100).round().clip(1, 10_000_000) / 100
    kind = numpy.array(["purchase", "login", "view", "support"])[draw.choice(4, count, p=[0.25, 0.2, 0.5, 0.05])]
    customers = pyarrow.array([f"c{number}" for number in customers.tolist()])
    ids = pyarrow.array([f"e{number}" for number in range(count)])
    table = pyarrow.table({"event_id": ids, "customer_id": customers, "event_type": kind, "amount": amount, "happened_at": at})
    pyarrow.parquet.write_table(table, path)


def measured(command, environment, log):
    """Runs a command to its end: wall seconds, CPU seconds, peak MiB of its process."""
    start, peak = time.monotonic(), 0
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=out, stderr=out)
        # Not `ru_maxrss`: a process that was started from here keeps the peak of this one in it.
        memory = pathlib.Path(f"/proc/{process.pid}/status")
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            found = [line.split()[1] for line in memory.read_text().splitlines() if line.startswith("VmHWM")]
            peak = max([peak, *map(int, found)])
            time.sleep(0.02)
    _, status, usage = ended
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"{command[0]} failed: see {log}")
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, peak / 1024


def check(driftline, kafka, topic, parquet, length, step, whole, folder):
    """Compares an output topic with DuckDB. `whole`: windows that the watermark has not closed are there, too."""
    rows = tail(driftline, kafka, topic, folder)
    db = duckdb.connect()
    shape = {"customer_id": "VARCHAR", "window_start": "BIGINT", "count": "BIGINT"} | dict.fromkeys(("sum", "mean", "min", "max"), "DOUBLE")
    records = "read_json(?, format = 'newline_delimited', columns = {value: 'VARCHAR'})"
    db.execute(f"create table got as select unnest(from_json(value, '{json.dumps(shape)}')) from {records}", [str(rows)])
    db.execute(f"""create table wanted as select customer_id, s as window_start, count(*) as count, sum(amount) as sum, min(amount) as min, max(amount) as max
        from (select *, unnest(range((happened_at // {step}) * {step} - {length} + {step}, (happened_at // {step}) * {step} + 1, {step})) as s from read_parquet(?))
        group by all""", [str(parquet)])
    same = "g.count = w.count and g.min = w.min and g.max = w.max and abs(g.sum - w.sum) <= 1e-9 * w.sum and abs(g.mean - w.sum / w.count) <= 1e-9 * w.sum"
    got, twice = db.execute("select count(*), count(*) - count(distinct (customer_id, window_start)) from got").fetchone()
    equal, = db.execute(f"select count(*) from got g join wanted w using (customer_id, window_start) where {same}").fetchone()
    # Of the others, the watermark of some partition may have closed none that ends after this.
    due = "true" if whole else f"window_start + {length} <= {START + SPAN - 60_000}"
    missing, = db.execute(f"select count(*) from wanted anti join got using (customer_id, window_start) where {due}").fetchone()
    if twice or missing or equal != got:
        sys.exit(f"{topic}: of {got} rows {equal} are right, {twice} there twice, {missing} missing")
    return got


def tail(driftline, kafka, topic, folder):
    """All committed records of a topic, in a file."""
    rows = folder / f"{topic}.jsonl"
    with open(rows, "w") as out:
        subprocess.run([driftline, "topic", "tail", topic, "-b", kafka.address], check=True, stdout=out, stderr=subprocess.DEVNULL)
    return rows


def check_sliding(driftline, kafka, topic, parquet, count, arrival, folder):
    """Compares rows of features with DuckDB: for each event its customer, time, counts and sums, as often as they are there."""
    rows = tail(driftline, kafka, topic, folder)
    db = duckdb.connect()
    records = "read_json(?, format = 'newline_delimited', columns = {value: 'VARCHAR'}, maximum_object_size = 10000000)"
    if topic.startswith("flink"):
        shape = {"customer_id": "VARCHAR", "event_time": "BIGINT", "count_10m": "BIGINT", "sum_10m": "DOUBLE", "count_1h": "BIGINT", "sum_1h": "DOUBLE"}
        columns = "r.customer_id, r.event_time, r.count_10m, r.sum_10m, r.count_1h, r.sum_1h"
    else:
        features = {"amount_count_10m": "BIGINT", "amount_sum_10m": "DOUBLE", "amount_count_1h": "BIGINT", "amount_sum_1h": "DOUBLE"}
        shape = {"entity": {"customer_id": "VARCHAR"}, "event_time": "BIGINT", "features": features}
        columns = "r.entity.customer_id, r.event_time, r.features.amount_count_10m, r.features.amount_sum_10m, r.features.amount_count_1h, r.features.amount_sum_1h"
    db.execute(f"create table raw as select from_json(value, '{json.dumps(shape)}') as r from {records}", [str(rows)])
    db.execute(f"create table got as select * replace (round(100 * s10)::bigint as s10, round(100 * s60)::bigint as s60) from (select {columns} from raw) t(customer, ts, c10, s10, c60, s60)")
    db.execute("create table events as select row_number() over () as n, customer_id as customer, happened_at as ts, round(100 * amount)::bigint as cents from read_parquet(?)", [str(parquet)])
    # An event's row covers the events before it, by time and then by their order in the log.
    window = "partition by customer order by ts range between {} preceding and current row"
    db.execute(f"""create table wanted as select n, customer, ts, count(*) over a as c10, sum(cents) over a as s10, count(*) over b as c60, sum(cents) over b as s60
        from events window a as ({window.format(SLIDING["10m"] - 1)}), b as ({window.format(SLIDING["1h"] - 1)})""")
    # What comes after it in that order and is there all the same: of the same instant, or, as events arrive, everything that is late.
    after = "j.ts <= i.ts" if arrival else "j.ts = i.ts"
    db.execute(f"""create table unseen as select i.n, count(*) as c, sum(j.cents) as s
        from (select *, unnest([ts // {LATE}, ts // {LATE} + 1]) as bucket from events) j join events i on i.customer = j.customer and i.ts // {LATE} = j.bucket
        where j.n > i.n and {after} and j.ts > i.ts - {LATE} group by i.n""")
    db.execute("""create table right_rows as select customer, ts, c10 - coalesce(c, 0) as c10, (s10 - coalesce(s, 0))::bigint as s10, c60 - coalesce(c, 0) as c60, (s60 - coalesce(s, 0))::bigint as s60
        from wanted left join unseen using (n)""")
    got, = db.execute("select count(*) from got").fetchone()
    wrong, = db.execute("select count(*) from (select * from got except all select * from right_rows)").fetchone()
    if got != count or wrong:
        sys.exit(f"{topic}: {got} rows for {count} events, {wrong} of them wrong")
    return got


def chart(results, path):
    """CPU microseconds an event as bars, one group a workload. A bar of over one and a half times the next longest one is cut off, with a gap in it."""
    bar, gap, left, width = 22, 26, 210, 760
    second, longest = sorted(micros for bars in results.values() for _, micros in bars)[-2:]
    longest = min(longest, 1.5 * second)
    lines, y = [], 44
    for workload, bars in results.items():
        lines.append(f'<text x="{left - 12}" y="{y + bar * len(bars) / 2 + 5}" text-anchor="end" font-weight="bold">{workload}</text>')
        for who, micros in bars:
            length = max(2, (width - left - 150) * min(micros / longest, 1))
            colour = next((colour for name, colour in COLOURS.items() if who.startswith(name)), "#bbbbbb")
            lines.append(f'<rect x="{left}" y="{y + 2}" width="{length:.0f}" height="{bar - 4}" fill="{colour}"/>')
            if micros > longest:
                lines.append(f'<rect x="{left + length - 24:.0f}" y="{y}" width="5" height="{bar}" fill="white" transform="skewX(-12)" transform-origin="{left + length - 22:.0f} {y + bar / 2}"/>')
            lines.append(f'<text x="{left + length + 6:.0f}" y="{y + bar / 2 + 5}">{who} {micros:.1f}</text>')
            y += bar
        y += gap
    title = '<text x="12" y="24" font-weight="bold">CPU microseconds an event, less is better</text>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" font-family="sans-serif" font-size="14">'
    path.write_text("\n".join([head, '<rect width="100%" height="100%" fill="white"/>', title, *lines, "</svg>"]) + "\n")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--events", type=int, default=5_000_000)
    arguments.add_argument("--folder", type=pathlib.Path, default=ROOT / "target/peers")
    arguments.add_argument("--driftline", type=pathlib.Path, default=ROOT / "target/release/driftline")
    arguments.add_argument("--floor", type=pathlib.Path)
    arguments.add_argument("--workloads", default="tumbling,hopping,sliding")
    arguments.add_argument("--peers", default="flink")
    arguments.add_argument("--chart", type=pathlib.Path)
    options = arguments.parse_args()
    folder, driftline = options.folder.resolve(), str(options.driftline.resolve())
    workloads, peers = options.workloads.split(","), options.peers.split(",")
    for peer in peers:
        libs, classes = folder / peer / "libs", folder / peer / "classes"
        if not libs.exists():
            fetch = ["mvn", "-q", "-B", "-f", HERE / peer / "pom.xml", "dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={libs}"]
            subprocess.run(fetch, check=True)
        classes.mkdir(parents=True, exist_ok=True)
        subprocess.run(["javac", "-nowarn", "-d", classes, "-cp", f"{libs}/*", *sorted((HERE / peer).glob("*.java"))], check=True)
    work = folder / f"run-{int(time.time())}"
    kafka = Kafka(work / "kafka")
    results = {}
    try:
        parquet = work / "events.parquet"
        events(options.events, parquet)
        environment = {"KAFKA_BROKERS": kafka.address, "PEERS_FOLDER": str(work)}

        def create(topic):
            subprocess.run([driftline, "topic", "create", topic, "--partitions", str(PARTITIONS), "-b", kafka.address], check=True, stdout=subprocess.DEVNULL)

        create("peers.events")
        # A new cluster makes its own topics when they are first needed, which is in nobody's time then.
        warm_up = [driftline, "run", HERE / "tumbling", "--until-end", "--listen", "none", "--view", "none"]
        warm_up += ["--set", 'name="warm-up"', "--set", 'windows.amounts.topic="warm-up"']
        measured(warm_up, environment, work / "warm-up.log")
        fill = [driftline, "replay", parquet, "-p", HERE / "tumbling", "--record-time", "event"]
        subprocess.run(fill, check=True, env=os.environ | environment, stdout=subprocess.DEVNULL)
        print(f"{options.events:,} events, {os.cpu_count()} cores, Kafka among them\n")
        print("| windows | | CPU µs an event | seconds | peak MiB | rows, all equal to DuckDB's |\n|---|---|---|---|---|---|")

        def java(peer, main, *more):
            opens = [f"--add-opens=java.base/java.{part}=ALL-UNNAMED" for part in ("util", "lang", "time")]
            return ["java", "-Xmx6g", *opens, "-cp", f"{folder / peer}/classes:{folder / peer}/libs/*", main, kafka.address, "peers.events", *more]

        def tell(workload, what, found, rows):
            wall, cpu, memory = found
            results.setdefault(workload, []).append((what, 1e6 * cpu / options.events))
            print(f"| {workload} | {what} | {1e6 * cpu / options.events:.2f} | {wall:.1f} | {memory:,.0f} | {rows:,} |", flush=True)

        def ratio(what, ours, theirs):
            print(f"| | ratio to {what} | {theirs[1] / ours[1]:.1f} | {theirs[0] / ours[0]:.1f} | {theirs[2] / ours[2]:.1f} | |", flush=True)

        for name in (name for name in workloads if name in WORKLOADS):
            length, step = WORKLOADS[name]
            run = [driftline, "run", HERE / name, "--until-end", "--listen", "none", "--view", "none"]
            ours = measured(run, environment, work / f"driftline-{name}.log")
            tell(name, "driftline", ours, check(driftline, kafka, f"driftline-{name}", parquet, length, step, False, work))
            for peer, what in (("flink", "Flink"), ("kstreams", "Kafka Streams")):
                if peer in peers:
                    topic = f"{peer}-{name}"
                    create(topic)
                    theirs = measured(java(peer, "Windows", topic, str(length), str(step), f"{work}/state-{peer}"), {}, work / f"{topic}.log")
                    tell(name, what, theirs, check(driftline, kafka, topic, parquet, length, step, what == "Flink", work))
                    ratio(what, ours, theirs)
        if "sliding" in workloads:
            readings = {}
            for emit, what in (("arrival", "driftline, as events arrive"), ("event_time", "driftline, in event-time order")):
                name = f"peers-sliding-{emit.replace('_', '-')}"
                run = [driftline, "features", HERE / "sliding", "--until-end", "--listen", "none", "--view", "none", "--set", f'name="{name}"', "--set", f'score.emit="{emit}"']
                readings[what] = measured(run, environment, work / f"{name}.log")
                tell("sliding", what, readings[what], check_sliding(driftline, kafka, f"{name}.features", parquet, options.events, emit == "arrival", work))
            if "flink" in peers:
                create("flink-sliding")
                theirs = measured(java("flink", "Sliding", "flink-sliding", f"{work}/state-sliding"), {}, work / "flink-sliding.log")
                tell("sliding", "Flink, in event-time order", theirs, check_sliding(driftline, kafka, "flink-sliding", parquet, options.events, False, work))
                for what, ours in readings.items():
                    ratio(f"Flink of {what}", ours, theirs)
        if options.floor:
            create("floor")
            floor = subprocess.run([options.floor, kafka.address, "peers.events", "floor", "2"], check=True, stdout=subprocess.PIPE, text=True)
            print("\n| the client alone | CPU µs an event | seconds |\n|---|---|---|")
            for name, _, micros, seconds in map(str.split, floor.stdout.splitlines()):
                print(f"| {name} | {float(micros):.2f} | {float(seconds):.1f} |")
                results.setdefault("the client alone", []).append(({"read": "read", "parse": "and parse", "write": "and write a record"}[name], float(micros)))
        if options.chart:
            chart(results, options.chart)
    finally:
        kafka.stop()
        shutil.rmtree(work / "kafka", ignore_errors=True)
        for stores in ("offline", "online"):
            shutil.rmtree(work / stores, ignore_errors=True)


if __name__ == "__main__":
    main()
