"""What driftline is to answer for a golden folder, computed the slow way from the definitions in docs/.

    oracle.py FOLDER                    writes FOLDER/expected from FOLDER/input.jsonl
    oracle.py FOLDER INPUT OUT          the same for another input, into another folder

Every value is computed anew from all events of its entity: exact fractions for sums, DuckDB for SQL. Nothing is kept between rows.
A line of the input is a record in the order of arrival: source, partition, timestamp (of the log), key, and its value as JSON
(`value`), as it stands where it is to be unreadable (`text`), or neither (a tombstone).
"""

import json
import math
import pathlib
import re
import sys
import tomllib
from fractions import Fraction

import duckdb

UNIT = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
TILES = [1000 * s for s in (1, 5, 15, 60, 300, 900, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86400, 7 * 86400)]
SQL_TYPE = {"int64": "bigint", "float64": "double", "string": "varchar", "boolean": "boolean", "long": "bigint", "int": "bigint", "double": "double"}
PYTHON_TYPE = {"bigint": int, "double": (int, float), "varchar": str, "boolean": bool}


def ms(text):
    return sum(int(n) * UNIT[u] for n, u in re.findall(r"(\d+)(ms|[smhdw])", text))


def sql(columns, rows, expressions):
    """Values of SQL expressions over rows, and their types; each may use the ones before it."""
    if not expressions:
        return [{} for _ in rows], {}
    db = duckdb.connect()
    db.execute("create table t ({})".format(", ".join(f'"{c}" {t}' for c, t in [("#", "bigint"), *columns.items()])))
    if rows:
        marks = ", ".join("?" * (len(columns) + 1))
        db.executemany(f"insert into t values ({marks})", [[n, *(row[c] for c in columns)] for n, row in enumerate(rows)])
    for name, expression in expressions.items():
        db.execute(f'create or replace table t as select *, ({expression}) as "{name}" from t')
    names = list(expressions)
    found = db.execute("select {} from t order by \"#\"".format(", ".join(f'"{n}"' for n in names))).fetchall()
    types = {r[0]: r[1].lower() for r in db.execute("describe t").fetchall()}
    return [dict(zip(names, row)) for row in found], {n: types[n] for n in names}


class Event:
    """A record that was read: its columns, and its place in (event time, source, offset)."""

    def __init__(self, source, partition, offset, time, row):
        self.source, self.partition, self.offset, self.time, self.row = source, partition, offset, time, row
        self.place = (time, source, offset)


def fields(spec, folder):
    if "fields" in spec:
        return {name: SQL_TYPE[kind] for name, kind in spec["fields"].items()}
    schema = json.loads((folder / spec["schema"]).read_text())
    plain = lambda t: next(x for x in t if x != "null") if isinstance(t, list) else t
    named = lambda t: t["type"] if isinstance(t, dict) else t
    return {f["name"]: SQL_TYPE[named(plain(f["type"]))] for f in schema["fields"]}


def reason_to_refuse(record, spec, columns, keys):
    if "text" in record:
        return "malformed"
    if "value" not in record:
        return "null_value"
    value, time = record["value"], spec["event_time"]["field"]
    for column, kind in columns.items():
        got = value.get(column)
        if got is not None and (not isinstance(got, PYTHON_TYPE[kind]) or (isinstance(got, bool) and kind != "boolean")):
            return "wrong_type"
    if any(value.get(key) is None for key in keys):
        return "null_key"
    if value.get(time) is None:
        return "null_event_time"
    if value[time] > record["timestamp"] + ms(spec.get("ahead", "1h")):
        return "ahead_of_clock"
    return None


class Number:
    """Numbers of a window, exactly."""

    def __init__(self, values):
        self.values = [Fraction(v) for v in values]
        self.n = len(self.values)
        self.sum = sum(self.values, Fraction(0))
        self.mean = self.sum / self.n if self.n else None

    def var(self):
        return sum((v - self.mean) ** 2 for v in self.values) / (self.n - 1) if self.n > 1 else None


def number(value):
    """The float nearest to a fraction, or nothing."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def ranked(events, of):
    """Distinct values, the most frequent first, of equally frequent ones the one that was seen last."""
    counts = {}
    for event in events:
        n, _ = counts.get(event.row[of], (0, None))
        counts[event.row[of]] = (n + 1, event.place)
    return sorted(counts, key=lambda value: counts[value], reverse=True) if len(counts) <= 128 else []


def value(function, spec, events, as_of, seconds, kind):
    """One aggregate of events in the order of their places."""
    of = spec.get("of")
    if of is not None:
        events = [e for e in events if e.row[of] is not None]
    if "decay" in spec:
        weights = [2.0 ** (-(as_of - e.time) / ms(spec["decay"])) for e in events]
        total = math.fsum(weights)
        weighted = lambda: math.fsum(w * e.row[of] for w, e in zip(weights, events))
        return {"count": lambda: total, "sum": weighted, "mean": lambda: weighted() / total if events else None}[function]()
    if function == "count":
        return len(events)
    if function == "rate" and of is None:
        return len(events) / seconds
    if function == "seconds_since_last":
        return (as_of - events[-1].time) / 1000 if events else None
    values = [e.row[of] for e in events]
    if most := re.fullmatch(r"last_(\d+)", function):
        return values[-int(most[1]) :]
    if function == "distinct":
        return len(set(values))
    if function == "mode" or function.startswith("top_"):
        order, at = ranked(events, of), 0 if function == "mode" else int(function[4:]) - 1
        return order[at] if at < len(order) else None
    if function in ("first", "last"):
        return (values[0] if function == "first" else values[-1]) if values else None
    if function in ("min", "max"):
        return (min if function == "min" else max)(values) if values else None
    if function == "ratio":
        return number(Fraction(sum(values), len(values))) if values else None
    numbers = Number(values)
    if function == "sum":
        return int(numbers.sum) if kind == "bigint" else number(numbers.sum)
    if function == "mean":
        return number(numbers.mean)
    if function == "var":
        return number(numbers.var())
    if function == "std":
        return None if numbers.var() is None else math.sqrt(numbers.var())
    if function == "rate":
        return number(numbers.sum / Fraction(seconds))
    if function == "slope":
        times = [Fraction(e.time, 1000) for e in events]
        if len(set(times)) < 2:
            return None
        middle = sum(times) / len(times)
        across = sum((t - middle) ** 2 for t in times)
        return number(sum((t - middle) * (v - numbers.mean) for t, v in zip(times, numbers.values)) / across)
    assert function[0] == "p", function
    rank = math.ceil(Fraction(function[1:].replace("_", ".")) / 100 * len(values))
    return sorted(values)[rank - 1] * 1.0 if values else None


class Pipeline:
    def __init__(self, folder):
        self.folder = folder
        # Settings with ${VARIABLES} say where things are kept, and nothing of what is asked here.
        self.spec = spec = tomllib.loads((folder / "pipeline.toml").read_text())
        (entity,) = spec["entities"].values()
        self.keys = list(entity["key"])
        self.sources = list(spec["sources"])
        self.types = {}
        self.groups, self.windows = spec.get("features", {}), spec.get("windows", {})
        self.event_time = spec.get("score", {}).get("emit") == "event_time"

    def read(self, records):
        """Events that are taken, what is refused, and what is filtered."""
        events, self.refused = [], []
        self.ledger = {name: {"read": 0, "applied": 0, "filtered": 0, "late": 0, "dead": 0} for name in self.sources}
        for number_, name in enumerate(self.sources):
            spec = self.spec["sources"][name]
            columns = fields(spec, self.folder)
            keys = [spec.get("key", {}).get(key, key) for key in self.keys]
            good, offsets = [], {}
            for record in (r for r in records if r["source"] == name):
                partition = record["partition"]
                offset = offsets[partition] = offsets.get(partition, -1) + 1
                self.ledger[name]["read"] += 1
                if reason := reason_to_refuse(record, spec, columns, keys):
                    self.refuse(name, partition, offset, reason)
                    continue
                row = {column: record["value"].get(column) for column in columns}
                row.update({key: row[field] for key, field in zip(self.keys, keys)})
                good.append(Event(number_, partition, offset, row[spec["event_time"]["field"]], row))
            types = {**columns, **{key: columns[field] for key, field in zip(self.keys, keys)}}
            derived, more = sql(types, [e.row for e in good], {**spec.get("derive", {}), "#keep": spec.get("where", "true")})
            self.types[name] = {**types, **more}
            groups = {f"where {g}": s["where"] for g, s in [*self.groups.items(), *self.windows.items()] if s["source"] == name and "where" in s}
            for event, extra in zip(good, derived):
                event.row.update(extra)
            wheres, _ = sql(self.types[name], [e.row for e in good], groups)
            for event, where in zip(good, wheres):
                event.where = where
                if event.row["#keep"]:
                    events.append(event)
                else:
                    self.ledger[name]["filtered"] += 1
        return events

    def refuse(self, source, partition, offset, reason):
        self.refused.append({"source": source, "partition": partition, "offset": offset, "reason": reason})
        self.ledger[source]["late" if reason == "late" else "dead"] += 1

    def bound(self, source):
        return ms(self.spec["sources"][self.sources[source]].get("out_of_order", "10s"))

    def accepted(self, events):
        """The order in which a partition's events are taken, each with the watermarks that then hold. Late ones are refused."""
        queues = [sorted((e for e in events if e.source == s), key=lambda e: e.offset) for s in range(len(self.sources))]
        newest, order = [None] * len(queues), []
        while any(queues):
            source = min((q[0].time, s) for s, q in enumerate(queues) if q)[1]
            event = queues[source].pop(0)
            if newest[source] is not None and event.time < newest[source] - self.bound(source):
                self.refuse(self.sources[source], event.partition, event.offset, "late")
                continue
            event.before = newest[source]
            newest[source] = event.time if newest[source] is None else max(newest[source], event.time)
            event.newest = newest[source]
            event.watermark = None if None in newest else min(n - self.bound(s) for s, n in enumerate(newest))
            self.ledger[self.sources[source]]["applied"] += 1
            order.append(event)
        return order

    def key(self, event):
        return tuple(event.row[key] for key in self.keys)

    def row(self, events, as_of):
        """All features of an entity, of its events in the order of their places."""
        features, types = {}, {}
        for name, spec in self.groups.items():
            source = self.sources.index(spec["source"])
            kinds = self.types[spec["source"]]
            (by, categories), = spec["by"].items() if "by" in spec else [(None, [None])]
            kept = [e for e in events if e.source == source and e.where.get(f"where {name}", True)]
            for window in spec["windows"]:
                start, seconds = -math.inf, None
                if window != "lifetime":
                    length = ms(window)
                    seconds = length // 1000
                    tile = ms(spec["tile"][window]) if window in spec.get("tile", {}) else max([t for t in TILES if t <= length / 48], default=1000)
                    start = as_of - length if spec.get("exact") else (as_of - length) // tile * tile
                inside = [e for e in kept if start < e.time <= as_of]
                for function in spec["functions"]:
                    for category in categories:
                        some = inside if by is None else [e for e in inside if e.row[by] == category]
                        part = "" if by is None else re.sub(r"\W", "_", category) + "_"
                        feature = f"{name}_{function}_{part}{window}"
                        kind = kinds.get(spec.get("of"))
                        features[feature] = value(function, spec, some, as_of, seconds, kind)
                        types[feature] = feature_type(function, spec, kind)
        return features, types

    def derive(self, rows, types):
        expressions = self.spec.get("derived", {})
        if rows and expressions:
            found, _ = sql(types, rows, expressions)
            for row, more in zip(rows, found):
                row.update({k: number(v) if isinstance(v, float) else v for k, v in more.items()})

    def features(self, order):
        """A row for each event that asks, in the order in which they are published; and what the online store holds in the end."""
        if self.event_time:
            order = sorted(order, key=lambda e: e.place)
        on = self.sources.index(self.spec["score"]["on"]) if "score" in self.spec else None
        rows, seen, types = [], {}, {}
        for event in order:
            mine = seen.setdefault(self.key(event), [])
            mine.append(event)
            if event.source == on:
                before = sorted((e for e in mine if e.place <= event.place), key=lambda e: e.place)
                features, types = self.row(before, event.time)
                rows.append({"partition": event.partition, "offset": event.offset, "entity": dict(zip(self.keys, self.key(event))), "event_time": event.time,
                             "watermark": event.time if self.event_time else event.watermark, "features": features})
        online = []
        for key, mine in seen.items():
            mine.sort(key=lambda e: e.place)
            features, types = self.row(mine, mine[-1].time)
            online.append({"key": [str(part) for part in key], "event_time": mine[-1].time, "features": features})
        for some in (rows, online):
            self.derive([row["features"] for row in some], types)
        return rows, online

    def emitted(self, name, spec, order):
        """Rows of one table's windows, in the order in which they are published."""
        source = self.sources.index(spec["source"])
        kind = self.types[spec["source"]].get(spec.get("of"))
        rows, taken, emitted, given = [], [], set(), {}
        early = ms(spec["early"]) if "early" in spec else None
        (by, categories), = spec["by"].items() if "by" in spec else [(None, [None])]
        part = lambda category: "" if category is None else "_" + re.sub(r"\W", "_", category)

        def spans(events):
            if "session" in spec:
                gap, runs = ms(spec["session"]), []
                for event in events:
                    if runs and event.time - runs[-1][-1].time < gap:
                        runs[-1].append(event)
                    else:
                        runs.append([event])
                return [(run[0].time, run[-1].time + gap, run) for run in runs]
            length = ms(spec.get("tumbling") or spec["hopping"])
            step = ms(spec.get("step", "0ms")) or length
            starts = {s for e in events for s in range(e.time // step * step - length + step, e.time + 1, step)}
            return [(s, s + length, [e for e in events if s <= e.time < s + length]) for s in sorted(starts)]

        def windows():
            entities = {}
            for event in sorted(taken, key=lambda e: e.place):
                entities.setdefault(self.key(event), []).append(event)
            return [(end, key, start, run) for key, events in entities.items() for start, end, run in spans(events)]

        def give(found, final, offset):
            # Early results of sessions come by key, all others by end.
            for end, key, start, run in sorted(found, key=lambda w: w[:3] if final or "session" not in spec else (w[1], w[0])):
                functions = {f"{f}{part(c)}": value(f, spec, [e for e in run if c is None or e.row[by] == c], end, Fraction(end - start, 1000), kind) for f in spec["functions"] for c in categories}
                rows.append({"partition": run[0].partition, "offset": offset, **dict(zip(self.keys, key)), "window_start": start, "window_end": end, **functions, "final": final})

        for event in (e for e in order if e.source == source):
            closed = [w for w in windows() if w[0] <= event.newest - self.bound(source) and (w[1], w[2]) not in emitted]
            give(closed, True, event.offset)
            emitted.update((w[1], w[2]) for w in closed)
            if early and event.before is not None and event.before // early < event.newest // early:
                places = lambda w: [e.place for e in w[3]]
                fresh = [w for w in windows() if (w[1], w[2]) not in emitted and given.get((w[1], w[2])) != places(w)]
                give(fresh, False, event.offset)
                given.update({(w[1], w[2]): places(w) for w in fresh})
            if event.where.get(f"where {name}", True) and ("of" not in spec or event.row[spec["of"]] is not None):
                taken.append(event)
        return rows

    def run(self, records):
        events = self.read(records)
        out = {"features": [], "online": [], **{f"windows.{name}": [] for name in self.windows}}
        for partition in sorted({e.partition for e in events}):
            order = self.accepted([e for e in events if e.partition == partition])
            if self.groups:
                rows, online = self.features(order)
                out["features"] += rows
                out["online"] += sorted(online, key=lambda r: r["key"])
            for name, spec in self.windows.items():
                out[f"windows.{name}"] += self.emitted(name, spec, order)
        out["dead-letters"] = sorted(self.refused, key=lambda r: (r["source"], r["partition"], r["offset"]))
        out["ledger"] = [{"source": name, **counts} for name, counts in self.ledger.items()]
        return out


def feature_type(function, spec, kind):
    if function in ("count", "distinct") and "decay" not in spec:
        return "bigint"
    if function.startswith("last_"):
        return kind + "[]"
    if function in ("sum", "min", "max", "first", "last", "mode") or function.startswith("top_"):
        return "double" if "decay" in spec else kind
    return "double"


def main():
    folder = pathlib.Path(sys.argv[1])
    given, out = (map(pathlib.Path, sys.argv[2:4])) if len(sys.argv) > 2 else (folder / "input.jsonl", folder / "expected")
    answers = Pipeline(folder).run([json.loads(line) for line in given.read_text().splitlines()])
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in answers.items():
        if rows or name in ("dead-letters", "ledger"):
            (out / f"{name}.jsonl").write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


if __name__ == "__main__":
    main()
