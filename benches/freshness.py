"""How long an event takes until its feature is in Redis, and how old what Redis holds is, under load; then how long a restart takes.

    benches/freshness.py [--driftline target/release/driftline] [--rate 20000] [--seconds 40] [--customers 50000] [--restart 1000000]

Run it with the Python of `make test` (.venv/bin/python); it needs Redis, Java and Kafka's jars (`scripts/setup test`). Prints a table.

Events arrive at a fixed rate, a tenth of them of one customer. Each event's time is the instant of its sending, so that the event time
beside the customer's features in Redis (`_ts:<view>`) tells which event has become visible; one reader asks for it without pause. Latency:
from the sending of an event (its record's timestamp) until it is the newest one there. Freshness: how old the newest one is, at instants
1 ms apart. The first quarter is not counted. Checkpoint: the pause of a worker while it takes a snapshot (`driftline_run_step_seconds`).

Restart: a pipeline with so many customers is stopped; further events come; from the start of the process until it has caught up.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import numpy
import pyarrow
import pyarrow.parquet
import redis

sys.path.insert(0, str(pathlib.Path(__file__).parent / "peers"))
from compare import ROOT, Kafka, free_port  # noqa: E402

PIPELINE = ROOT / "benches/freshness"
PARTITIONS = 4


def events(count, customers, start_ms, step_ms, path, hot=True):
    """Events of all customers in turn; every tenth is of customer 0 where `hot`."""
    number = numpy.arange(count, dtype=numpy.int64)
    customer = numpy.where((number % 10 == 0) & hot, 0, number * 7919 % customers)
    at = start_ms + (number * step_ms).astype(numpy.int64)
    names = pyarrow.array([f"c{c}" for c in customer.tolist()])
    table = pyarrow.table({"customer_id": names, "amount": (number % 1000) / 10.0, "happened_at": at})
    pyarrow.parquet.write_table(table, path)


def key_of(customer, project):
    """Feast's key of a customer (entity key serialisation 3)."""
    number = lambda n: n.to_bytes(4, "little")  # noqa: E731
    text = lambda t: number(len(t)) + t.encode()  # noqa: E731
    return number(1) + number(2) + text("customer_id") + number(2) + text(customer) + project.encode()


def event_time(stamp):
    """Milliseconds of a protobuf Timestamp."""
    at, found = 0, {}
    while stamp and at < len(stamp):
        field, at = stamp[at] >> 3, at + 1
        value = shift = 0
        while True:
            byte, at = stamp[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        found[field] = value
    return found.get(1, 0) * 1000 + found.get(2, 0) // 1_000_000


def shares(values):
    return " | ".join(f"{numpy.percentile(values, share):.1f}" for share in (50, 95, 99, 99.9)) + f" | {max(values):.1f}"


def snapshot_pause(port):
    """Upper bounds of the median and the 99th percentile of a snapshot's seconds, and how many there were."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    lines = re.findall(r'driftline_run_step_seconds(_bucket)?\{([^}]*step="snapshot"[^}]*)\} ([0-9.e+-]+)', text)
    found = [(label.group(1), float(n)) for _, labels, n in lines if (label := re.search(r'(?:le|quantile)="([^"]+)"', labels))]
    return ", ".join(f"{at}: {n:g}" for at, n in found)


def create(driftline, kafka, topic):
    """Creates a topic, and waits until it can be read."""
    subprocess.run([driftline, "topic", "create", topic, "--partitions", str(PARTITIONS), "-b", kafka.address], check=True, stdout=subprocess.DEVNULL)
    while subprocess.run([driftline, "topic", "tail", topic, "-b", kafka.address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        time.sleep(0.1)


def freshness(driftline, options, folder, kafka):
    port = free_port()
    server = subprocess.Popen(["redis-server", "--port", str(port), "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
    environment = os.environ | {"KAFKA_BROKERS": kafka.address, "REDIS_URL": f"redis://127.0.0.1:{port}", "BENCH_FOLDER": str(folder)}
    metrics = free_port()
    over = threading.Event()
    try:
        create(driftline, kafka, "bench.events")
        with open(folder / "freshness.log", "w") as log:
            command = [driftline, "run", PIPELINE, "--view", "none", "--listen", f"127.0.0.1:{metrics}", "--set", 'offline.checkpoint.interval="5s"']
            running = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while "owns partitions" not in (folder / "freshness.log").read_text():
            if running.poll() is not None:
                sys.exit(f"driftline ended: see {folder}/freshness.log")
            time.sleep(0.05)
        count = options.rate * options.seconds
        # The replay is paced by event time, so that its first record's timestamp tells what event time zero is.
        begin = int(time.time() * 1000)
        events(count, options.customers, begin, 1000 / options.rate, folder / "stream.parquet")
        seen, ages = [], []
        store = redis.Redis(port=port)
        key, stamp = key_of("c0", "bench-freshness"), b"_ts:spend"

        def look():
            newest, next_age = 0, 0.0
            while not over.is_set():
                found = store.hget(key, stamp)
                now = time.time() * 1000
                at = event_time(found) if found else 0
                if at > newest:
                    newest = at
                    seen.append((at, now))
                if newest and now >= next_age:
                    ages.append((newest, now))
                    next_age = now + 1

        reader = threading.Thread(target=look)
        reader.start()
        fill = [driftline, "replay", folder / "stream.parquet", "-p", PIPELINE, "--speed", "1x"]
        subprocess.run(fill, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        over.set()
        reader.join()
        pause = snapshot_pause(metrics)
        running.send_signal(signal.SIGINT)
        running.wait()
        told = subprocess.run([driftline, "topic", "tail", "bench.events", "-b", kafka.address], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
        # Sending is never early, so the smallest difference is that of the clocks.
        pairs = [(record["timestamp"], json.loads(record["value"])["happened_at"]) for record in map(json.loads, told.splitlines())]
        ahead = min(sent - at for sent, at in pairs)
        first = begin + options.seconds * 250
        latency = [now - (at + ahead) for at, now in seen if at >= first]
        age = [now - (at + ahead) for at, now in ages if at >= first]
        print(f"| event to feature in Redis, {options.rate:,}/s | {len(latency):,} | {shares(latency)} |")
        print(f"| age of the newest in Redis, {options.rate:,}/s | {len(age):,} | {shares(age)} |")
        print(f"\nsnapshots (pause of a worker, seconds): {pause}")
    finally:
        over.set()
        if "running" in locals() and running.poll() is None:
            running.kill()
        server.kill()
        server.wait()


def restart(driftline, options, folder, kafka):
    environment = os.environ | {"KAFKA_BROKERS": kafka.address, "REDIS_URL": "", "BENCH_FOLDER": str(folder / "restart")}
    run = [driftline, "run", PIPELINE, "--view", "none", "--listen", "none", "--until-end", "--set", 'name="bench-restart"', "--set", 'sources.events.topic="bench.restart"',
           "--set", "online.enabled=false", "--set", "offline.rows=false"]
    create(driftline, kafka, "bench.restart")
    start = int(time.time() * 1000) - 3_600_000
    for count, first in ((3 * options.restart, start), (100_000, start + 1_800_000)):
        events(count, options.restart, first, 1_700_000 / count, folder / "restart.parquet", hot=False)
        fill = [driftline, "replay", folder / "restart.parquet", "-p", PIPELINE, "--set", 'sources.events.topic="bench.restart"']
        subprocess.run(fill, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begin = time.monotonic()
        with open(folder / "restart.log", "w") as log:
            process = subprocess.Popen(run, env=environment, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"driftline failed: see {folder}/restart.log")
        took = time.monotonic() - begin
    print(f"\nrestart with {options.restart:,} customers: {took:.1f} s until {count:,} further events are done, {usage.ru_utime + usage.ru_stime:.1f} CPU s, its start and end among them")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--driftline", type=pathlib.Path, default=ROOT / "target/release/driftline")
    arguments.add_argument("--folder", type=pathlib.Path, default=ROOT / "target/freshness")
    arguments.add_argument("--rate", type=int, default=20_000)
    arguments.add_argument("--seconds", type=int, default=40)
    arguments.add_argument("--customers", type=int, default=50_000)
    arguments.add_argument("--restart", type=int, default=1_000_000)
    options = arguments.parse_args()
    folder, driftline = options.folder.resolve(), str(options.driftline.resolve())
    shutil.rmtree(folder, ignore_errors=True)
    kafka = Kafka(folder / "kafka")
    try:
        if options.seconds:
            print("| | values | p50 ms | p95 ms | p99 ms | p99.9 ms | max ms |\n|---|---|---|---|---|---|---|")
            freshness(driftline, options, folder, kafka)
        if options.restart:
            restart(driftline, options, folder, kafka)
    finally:
        kafka.stop()
        shutil.rmtree(folder / "kafka", ignore_errors=True)


main()
