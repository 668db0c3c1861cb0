"""Writes FOLDER/input.jsonl for a golden folder: seeded events of its sources.

    make_input.py FOLDER

FOLDER/input.toml says: `events` (how many a source), `seed`, `span` (ms from first to last), `disorder` (ms), `late`, `ahead`, `broken`
(shares of the events), `ties` (share of events at the time of the one before; none where `mode` or `top_k` is asked of numbers: which of two
values that were seen last at the same time comes first is not defined).
"""

import json
import pathlib
import random
import sys
import tomllib

START = 1_735_689_600_000
PARTITIONS = 4
SHOPS = ["north", "south", "web", "market", "pop up"]
BROKEN = [{"text": "not json"}, {}, {"text": '{"customer_id":'}]


def record(rng, source, number, at):
    """One order, visit or payment of a customer; a few customers have most of them."""
    customer = int(12 * rng.random() ** 2)
    row = {"at": at, "amount": rng.choice([None] + [rng.randrange(-400, 40_000) / 4] * 19), "items": rng.randrange(0, 9), "shop": rng.choice(SHOPS[: 2 + number % 4]), "gift": rng.random() < 0.3}
    if source == "visits":
        row = {"at": at, "seconds": rng.randrange(1, 900)}
    if source == "payments":
        row = {"at": at, "paid": rng.randrange(0, 40_000) / 8, "method": rng.choice(["card", "bank"])}
    return customer, row


def main():
    folder = pathlib.Path(sys.argv[1])
    spec = tomllib.loads((folder / "pipeline.toml").read_text())
    asked = tomllib.loads((folder / "input.toml").read_text())
    keys = list(next(iter(spec["entities"].values()))["key"])
    records = []
    for name, source in spec["sources"].items():
        rng = random.Random(f"{asked['seed']} {name}")
        field, at = source["event_time"]["field"], START
        for number in range(asked["events"]):
            if rng.random() >= asked.get("ties", 0.0):
                at = START + number * asked["span"] // asked["events"]
            customer, row = record(rng, name, number, at)
            arrival = at + rng.randrange(0, asked["disorder"] + 1)
            fate = rng.random()
            if fate < asked.get("late", 0.0):
                row["at"] = at - 10 * asked["disorder"] - 1_000
            elif fate < asked.get("late", 0.0) + asked.get("ahead", 0.0):
                row["at"] = at + 7 * 86_400_000
            row[field] = row.pop("at")
            values = dict(zip(keys, [f"c{customer}", customer % 3]))
            row = {**{source.get("key", {}).get(k, k): v for k, v in values.items()}, **row}
            line = {"source": name, "partition": customer % PARTITIONS, "timestamp": arrival, "key": f"c{customer}", "value": row}
            if rng.random() < asked.get("broken", 0.0):
                del line["value"]
                line.update(rng.choice(BROKEN))
            records.append((arrival, len(records), line))
    lines = [json.dumps(line, separators=(",", ":")) for _, _, line in sorted(records)]
    (folder / "input.jsonl").write_text("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main()
