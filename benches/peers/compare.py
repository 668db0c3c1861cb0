"""Emitted windows beside Apache Flink: the same events, the same broker, one after the other, each checked against DuckDB.

    benches/peers/compare.py [--events 5000000] [--folder target/peers] [--driftline target/release/driftline]

Run it with the Python of `make test` (.venv/bin/python); it needs Java, Maven and Kafka's jars (`scripts/setup test`). Prints a table
in Markdown: CPU microseconds an event (user and system, the process's whole life), seconds of wall clock, peak memory.

Events are JSON of about 100 bytes in 4 partitions: two hours of event time, 50,000 customers of whom the first has an eighth of all
events (Zipf), 2 % of the events up to 5 s late. driftline runs exactly once and writes Arrow files besides; Flink runs at least once with
heap state, a checkpoint every 10 s, and parallelism 2.
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
    start = time.monotonic()
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"{command[0]} failed: see {log}")
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def check(driftline, kafka, topic, parquet, length, step, whole, folder):
    """Compares an output topic with DuckDB. `whole`: windows that the watermark has not closed are there, too."""
    rows = folder / f"{topic}.jsonl"
    with open(rows, "w") as out:
        tail = [driftline, "topic", "tail", topic, "-b", kafka.address]
        subprocess.run(tail, check=True, stdout=out, stderr=subprocess.DEVNULL)
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


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--events", type=int, default=5_000_000)
    arguments.add_argument("--folder", type=pathlib.Path, default=ROOT / "target/peers")
    arguments.add_argument("--driftline", type=pathlib.Path, default=ROOT / "target/release/driftline")
    options = arguments.parse_args()
    folder, driftline = options.folder.resolve(), str(options.driftline.resolve())
    libs, classes = folder / "flink/libs", folder / "flink/classes"
    if not libs.exists():
        fetch = ["mvn", "-q", "-B", "-f", HERE / "flink/pom.xml", "dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={libs}"]
        subprocess.run(fetch, check=True)
    classes.mkdir(parents=True, exist_ok=True)
    subprocess.run(["javac", "-nowarn", "-d", classes, "-cp", f"{libs}/*", HERE / "flink/Windows.java"], check=True)
    work = folder / f"run-{int(time.time())}"
    kafka = Kafka(work / "kafka")
    try:
        parquet = work / "events.parquet"
        events(options.events, parquet)
        environment = {"KAFKA_BROKERS": kafka.address, "PEERS_FOLDER": str(work)}
        create = [driftline, "topic", "create", "peers.events", "--partitions", str(PARTITIONS), "-b", kafka.address]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
        fill = [driftline, "replay", parquet, "-p", HERE / "tumbling", "--record-time", "event"]
        subprocess.run(fill, check=True, env=os.environ | environment, stdout=subprocess.DEVNULL)
        print(f"{options.events:,} events, {os.cpu_count()} cores, Kafka among them\n")
        print("| windows | | CPU µs an event | seconds | peak MiB | rows, all equal to DuckDB's |\n|---|---|---|---|---|---|")
        for name, (length, step) in WORKLOADS.items():
            run = [driftline, "run", HERE / name, "--until-end", "--listen", "none", "--view", "none"]
            ours = measured(run, environment, work / f"driftline-{name}.log")
            java = ["java", "-Xmx6g", "--add-opens=java.base/java.util=ALL-UNNAMED", "--add-opens=java.base/java.lang=ALL-UNNAMED"]
            flink = java + ["--add-opens=java.base/java.time=ALL-UNNAMED", "-cp", f"{classes}:{libs}/*", "Windows"]
            theirs = measured(flink + [kafka.address, "peers.events", f"flink-{name}", str(length), str(step), f"{work}/state"], {}, work / f"flink-{name}.log")
            for what, (wall, cpu, memory), topic in [("driftline", ours, f"driftline-{name}"), ("Flink", theirs, f"flink-{name}")]:
                rows = check(driftline, kafka, topic, parquet, length, step, what == "Flink", work)
                print(f"| {name} | {what} | {1e6 * cpu / options.events:.2f} | {wall:.1f} | {memory:,.0f} | {rows:,} |", flush=True)
            print(f"| | ratio | {theirs[1] / ours[1]:.1f} | {theirs[0] / ours[0]:.1f} | {theirs[2] / ours[2]:.1f} | |", flush=True)
    finally:
        kafka.stop()
        shutil.rmtree(work / "kafka", ignore_errors=True)
        for stores in ("offline", "online"):
            shutil.rmtree(work / stores, ignore_errors=True)


main()
