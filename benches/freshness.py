"""How long an event takes until its feature is in Redis, and how old what Redis holds is, under load; then how long a rebalance and a
restart take.

    benches/freshness.py [--driftline target/release/driftline] [--rate 20000] [--warm-up 40] [--seconds 40] [--customers 50000] [--restart 1000000] [--rebalance 40]

Run it with the Python of `make test` (.venv/bin/python); it needs Redis, Java and Kafka's jars (`scripts/setup test`). Prints a table.

Events arrive at a fixed rate, a tenth of them of one customer. Each event's time is the instant of its sending, so that the event time
beside the customer's features in Redis (`_ts:<view>`) tells which events have become visible; one reader asks for it about every half
millisecond. Latency: from the sending of an event (its record's timestamp) until it or a newer one is there, of every event of that
customer. Freshness: how old the newest one there is, at instants 1 ms apart. The warm-up is not counted: in the first half
minute of a broker its compiler takes half a core. CPU: seconds of each process in the middle of the rest. Checkpoint: how long a worker
stands still for one at a time (`driftline_checkpoint_pause_seconds`).

Rebalance: under the same load a second process joins and leaves again (`--rebalance` seconds, once for each group protocol); 16 customers
have a tenth of all events, and each is looked at every 2 ms. Pause: the longest time between two changes of what is visible of one, within
ten seconds from the start or the end of the second process.

Restart: a pipeline with so many customers is stopped; further events come; from the start of the process until it has caught up.
"""

import argparse
import contextlib
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


def events(count, customers, start_ms, step_ms, path, hot=1):
    """Events of all customers in turn; every tenth is of one of the `hot` first ones in turn."""
    number = numpy.arange(count, dtype=numpy.int64)
    customer = numpy.where((number % 10 == 0) & (hot > 0), number // 10 % max(hot, 1), number * 7919 % customers)
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


def checkpoint_pause(port):
    """Upper bounds of the median and of the 99th percentile of a pause in milliseconds, and how many pauses there were."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    buckets = re.findall(r'driftline_checkpoint_pause_seconds_bucket\{[^}]*le="([^"]+)"[^}]*\} ([0-9]+)', text)
    upto = [(float(bound) * 1000, int(count)) for bound, count in buckets]
    total = max((count for _, count in upto), default=0)
    at = {share: next((bound for bound, count in upto if count >= share * total), 0) for share in (0.5, 0.99, 1)}
    return f"p50 ≤ {at[0.5]:g} ms, p99 ≤ {at[0.99]:g} ms, max ≤ {at[1]:g} ms, {total} pauses"


def cpu_seconds(process):
    """User and system time of a process and its threads so far."""
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def create(driftline, kafka, topic):
    """Creates a topic, and waits until it can be read."""
    subprocess.run([driftline, "topic", "create", topic, "--partitions", str(PARTITIONS), "-b", kafka.address], check=True, stdout=subprocess.DEVNULL)
    while subprocess.run([driftline, "topic", "tail", topic, "-b", kafka.address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        time.sleep(0.1)


@contextlib.contextmanager
def redis_server():
    """A Redis without persistence: its process and port."""
    port = free_port()
    server = subprocess.Popen(["redis-server", "--port", str(port), "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
    try:
        yield server, port
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def running(driftline, environment, log, *settings):
    """A process of the pipeline that owns partitions, with checkpoints every 5 s; killed at the end where it still runs."""
    command = [driftline, "run", PIPELINE, "--view", "none", "--set", 'offline.checkpoint.interval="5s"', *settings]
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        while "owns partitions" not in log.read_text():
            if process.poll() is not None:
                sys.exit(f"driftline ended: see {log}")
            time.sleep(0.02)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def freshness(driftline, options, folder, kafka):
    metrics = free_port()
    over = threading.Event()
    create(driftline, kafka, "bench.events")
    with contextlib.ExitStack() as stack:
        stack.callback(over.set)
        server, port = stack.enter_context(redis_server())
        environment = os.environ | {"KAFKA_BROKERS": kafka.address, "REDIS_URL": f"redis://127.0.0.1:{port}", "BENCH_FOLDER": str(folder)}
        process = stack.enter_context(running(driftline, environment, folder / "freshness.log", "--listen", f"127.0.0.1:{metrics}"))
        count = options.rate * (options.warm_up + options.seconds)
        # The replay is paced by event time, so that its first record's timestamp tells what event time zero is.
        begin = int(time.time() * 1000)
        events(count, options.customers, begin, 1000 / options.rate, folder / "stream.parquet")
        seen, ages, used = [], [], {}
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
                time.sleep(0.0003)

        reader = threading.Thread(target=look)
        reader.start()
        fill = [driftline, "replay", folder / "stream.parquet", "-p", PIPELINE, "--speed", "1x"]
        filling = subprocess.Popen(fill, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        processes = {"driftline": process.pid, "Kafka": kafka.process.pid, "Redis": server.pid, "sender": filling.pid, "reader": os.getpid()}
        time.sleep(options.warm_up + options.seconds / 4)
        before = {name: cpu_seconds(process) for name, process in processes.items()}
        time.sleep(options.seconds / 2)
        used = {name: cpu_seconds(process) - before[name] for name, process in processes.items()}
        if filling.wait():
            sys.exit("the replay failed")
        over.set()
        reader.join()
        pause = checkpoint_pause(metrics)
        process.send_signal(signal.SIGINT)
        process.wait()
        told = subprocess.run([driftline, "topic", "tail", "bench.events", "-b", kafka.address], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
        records = [(record["timestamp"], json.loads(record["value"])) for record in map(json.loads, told.splitlines())]
        # Sending is never early, so the smallest difference is that of the clocks.
        ahead = min(sent - event["happened_at"] for sent, event in records)
        first = begin + options.warm_up * 1000
        ours = [(sent, event["happened_at"]) for sent, event in records if event["customer_id"] == "c0" and event["happened_at"] >= first]
        visible = numpy.searchsorted([at for at, _ in seen], [at for _, at in ours])
        unseen = int((visible == len(seen)).sum())
        latency = [seen[place][1] - sent for (sent, _), place in zip(ours, visible.tolist()) if place < len(seen)]
        age = [now - (at + ahead) for at, now in ages if at >= first]
        print(f"| event to feature in Redis, {options.rate:,}/s | {len(latency):,} | {shares(latency)} |")
        print(f"| age of the newest in Redis, {options.rate:,}/s | {len(age):,} | {shares(age)} |")
        if unseen:
            print(f"\n{unseen:,} events were not visible when the last one had been sent")
        print(f"\nCPU seconds in {options.seconds / 2:g} s of {os.cpu_count()} cores: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in used.items()))
        print(f"\ncheckpoints (a worker stands still): {pause}")


def rebalance(driftline, options, folder, kafka, protocol):
    name = f"bench-{protocol}"
    topic = f"bench.{protocol}"
    settings = ["--set", f'name="{name}"', "--set", f'sources.events.topic="{topic}"', "--set", f'broker.group_protocol="{protocol}"']
    create(driftline, kafka, topic)
    with contextlib.ExitStack() as stack:
        _, port = stack.enter_context(redis_server())
        environment = os.environ | {"KAFKA_BROKERS": kafka.address, "REDIS_URL": f"redis://127.0.0.1:{port}", "BENCH_FOLDER": str(folder / name)}
        start = lambda number: running(driftline, environment, folder / f"{name}-{number}.log", "--listen", "none", *settings)  # noqa: E731
        stack.enter_context(start(1))
        begin = int(time.time() * 1000)
        events(options.rate * options.rebalance, options.customers, begin, 1000 / options.rate, folder / "stream.parquet", hot=16)
        keys = [key_of(f"c{customer}", name) for customer in range(16)]
        store, seen, over = redis.Redis(port=port), [[] for _ in keys], threading.Event()

        def look():
            while not over.is_set():
                pipe = store.pipeline(transaction=False)
                for key in keys:
                    pipe.hget(key, b"_ts:spend")
                found, now = pipe.execute(), time.monotonic()
                for changes, stamp in zip(seen, found):
                    if stamp and (not changes or changes[-1][0] != stamp):
                        changes.append((stamp, now))
                time.sleep(0.002)

        reader = threading.Thread(target=look)
        reader.start()
        stack.callback(over.set)
        fill = [driftline, "replay", folder / "stream.parquet", "-p", PIPELINE, "--speed", "1x", *settings]
        filling = subprocess.Popen(fill, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(filling.kill)
        time.sleep(options.rebalance * 0.25)
        at = {"joins": time.monotonic()}
        with start(2) as second:
            time.sleep(options.rebalance * 0.25)
            at["leaves"] = time.monotonic()
            second.send_signal(signal.SIGINT)
            second.wait()
        if filling.wait():
            sys.exit("the replay failed")
        over.set()
        reader.join()
        for what, instant in at.items():
            spans = [[now for _, now in changes if instant - 1 <= now <= instant + 10] for changes in seen]
            pauses = sorted(max(b - a for a, b in zip(span, span[1:])) * 1000 for span in spans)
            print(f"| {protocol} | {what} | {pauses[len(pauses) // 2]:.0f} | {pauses[-1]:.0f} |")


def restart(driftline, options, folder, kafka):
    environment = os.environ | {"KAFKA_BROKERS": kafka.address, "REDIS_URL": "", "BENCH_FOLDER": str(folder / "restart")}
    run = [driftline, "run", PIPELINE, "--view", "none", "--listen", "none", "--until-end", "--set", 'name="bench-restart"', "--set", 'sources.events.topic="bench.restart"',
           "--set", "online.enabled=false", "--set", "offline.rows=false"]
    create(driftline, kafka, "bench.restart")
    start = int(time.time() * 1000) - 3_600_000
    for count, first in ((3 * options.restart, start), (100_000, start + 1_800_000)):
        events(count, options.restart, first, 1_700_000 / count, folder / "restart.parquet", hot=0)
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
    arguments.add_argument("--warm-up", type=int, default=40)
    arguments.add_argument("--seconds", type=int, default=40)
    arguments.add_argument("--customers", type=int, default=50_000)
    arguments.add_argument("--rebalance", type=int, default=40)
    arguments.add_argument("--restart", type=int, default=1_000_000)
    options = arguments.parse_args()
    folder, driftline = options.folder.resolve(), str(options.driftline.resolve())
    shutil.rmtree(folder, ignore_errors=True)
    kafka = Kafka(folder / "kafka")
    try:
        if options.seconds:
            print("| | values | p50 ms | p95 ms | p99 ms | p99.9 ms | max ms |\n|---|---|---|---|---|---|---|")
            freshness(driftline, options, folder, kafka)
        if options.rebalance:
            print("\n| group protocol | a second process | pause ms, median of 16 customers | longest |\n|---|---|---|---|")
            for protocol in ("classic", "consumer"):
                rebalance(driftline, options, folder, kafka, protocol)
        if options.restart:
            restart(driftline, options, folder, kafka)
    finally:
        kafka.stop()
        shutil.rmtree(folder / "kafka", ignore_errors=True)


main()
