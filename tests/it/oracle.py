"""Recomputes every feature of every event from a pipeline's definition, naively, and compares with what driftline wrote.

    oracle.py PIPELINE.toml SOURCE EVENTS.parquet ROWS_FOLDER PREDICTIONS.jsonl BUNDLE_FOLDER

EVENTS has the declared columns of SOURCE in log order for each entity; the other sources and the tables are taken to be empty. Windows are
evaluated from their definition, event by event (no tiles, no running state); `where`, `derive` and `[derived]` by DuckDB.
Integers must be equal, floats to 1e-9 relative; scores must equal Python's onnxruntime to 1e-5.
Prints one JSON object with what was compared; exits with 1 at the first kind of difference, naming it.
"""

import json
import math
import pathlib
import re
import sys
import tomllib
from fractions import Fraction

import duckdb
import numpy as np
import onnxruntime
import pandas
import pyarrow as pa
import pyarrow.ipc

UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 7 * 86_400_000}
TILES = [UNITS["s"] * n for n in (1, 5, 15, 60, 300, 900, 3600, 10800, 21600, 43200, 86400, 7 * 86400)]


def fail(message):
    print(message, file=sys.stderr)
    sys.exit(1)


def milliseconds(text):
    number, unit = re.fullmatch(r"(\d+)\s*([a-z]+)", text).groups()
    return int(number) * UNITS[unit]


def tile_of(group, label):
    if label in group.get("tile", {}):
        return milliseconds(group["tile"][label])
    return max([t for t in TILES if t <= milliseconds(label) / 48] or [1000])


def value_of(function, values, times, now, half_life):
    """One aggregate over the events of a window, oldest first. `values` holds no nulls."""
    if half_life is not None:
        weights = [2.0 ** (-(now - time) / half_life) for time in times]
        if function == "count":
            return math.fsum(weights)
        weighted = math.fsum(weight * value for weight, value in zip(weights, values))
        return weighted if function == "sum" else weighted / math.fsum(weights) if values else None
    if function == "count":
        return len(values)
    if function == "distinct":
        return len(set(values))
    if function == "sum":
        return sum(values) if values and isinstance(values[0], int) else math.fsum(values)
    if not values:
        return None
    if function == "mean":
        return math.fsum(values) / len(values)
    if function == "min":
        return min(values)
    if function == "max":
        return max(values)
    if function == "std":
        if len(values) < 2:
            return None
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    if function == "first":
        return values[0]
    if function == "last":
        return values[-1]
    if function == "ratio":
        return sum(values) / len(values)
    if function == "slope":
        return slope(values, times)
    if function == "mode":
        return modes(values, times)[0]
    if re.fullmatch(r"p\d+", function):
        return float(sorted(values)[math.ceil(Fraction(int(function[1:]), 100) * len(values)) - 1])
    if function == "seconds_since_last":
        return (now - times[-1]) / 1000.0
    fail(f"the oracle does not know function {function}")


def modes(values, times):
    """The most frequent value, of equally frequent ones the one that was seen last; several that were seen last at one time are as good."""
    newest = dict(zip(values, times))
    ranks = {value: (values.count(value), time) for value, time in newest.items()}
    return [value for value, rank in ranks.items() if rank == max(ranks.values())]


def slope(values, times):
    """Of the least-squares line, a second; exact up to the last step, for much of it cancels out."""
    if len(set(times)) < 2:
        return None
    times, values = [Fraction(time, 1000) for time in times], [Fraction(value) for value in values]
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    across = sum((time - middle) ** 2 for time in times)
    return float(sum((time - middle) * (value - mean) for time, value in zip(times, values)) / across)


def avro_fields(folder, declared):
    """Names of the fields of a schema file, and of those of them that are instants in milliseconds."""
    fields = json.loads((folder / declared["schema"]).read_text())["fields"]
    instants = [f["name"] for f in fields if isinstance(f["type"], dict) and f["type"].get("logicalType") == "timestamp-millis"]
    return [f["name"] for f in fields], instants


def main():
    pipeline, source, events_file, rows_folder, predictions_file, bundle = sys.argv[1:]
    spec = tomllib.loads(pathlib.Path(pipeline).read_text())
    declared = spec["sources"][source]
    entity = spec["entities"][declared.get("entity", next(iter(spec["entities"])))]
    key = next(iter(entity["key"]))
    time_field = declared["event_time"]["field"]

    # Filters and derived columns of the source, by DuckDB, in the order of the file.
    events = pandas.read_parquet(events_file)
    events["__order"] = range(len(events))
    events["__time"] = events[time_field]
    for instant in avro_fields(pathlib.Path(pipeline).parent, declared)[1] if "schema" in declared else []:
        events[instant] = pandas.to_datetime(events[instant], unit="ms")
    connection = duckdb.connect()
    for name, sql in declared.get("derive", {}).items():
        events = connection.execute(f'select *, {sql} as "{name}" from events order by __order').df()
    if "where" in declared:
        events = connection.execute(f"select * from events where {declared['where']} order by __order").df()

    groups = []
    for name, group in spec["features"].items():
        mine = group["source"] == source
        kept = np.ones(len(events), dtype=bool)
        if mine and "where" in group:
            inside = set(connection.execute(f"select __order from events where {group['where']}").df()["__order"])
            kept = events["__order"].isin(inside).to_numpy()
        of = group.get("of")
        values = [None] * len(events)
        if mine and of is not None:
            values = [None if v is None or (isinstance(v, float) and not math.isfinite(v)) else v for v in events[of].tolist()]
        windows = [(label, None if label == "lifetime" else milliseconds(label), None if label == "lifetime" else tile_of(group, label)) for label in group["windows"]]
        (by, categories), = group["by"].items() if "by" in group else [(None, [None])]
        parts = []
        for category in categories:
            part = "" if by is None else re.sub(r"\W", "_", category) + "_"
            belongs = kept & (events[by] == category).to_numpy() if mine and by is not None else kept
            parts.append((part, belongs))
        half_life = milliseconds(group["decay"]) if "decay" in group else None
        groups.append((name, mine, of, group["functions"], windows, parts, values, half_life))
    facts = {}
    for name, table in spec.get("tables", {}).items():
        columns, _ = avro_fields(pathlib.Path(pipeline).parent, table)
        own = [c for c in columns if c not in (key, table["event_time"]["field"])]
        facts |= {f"{name}_{column}": None for column in [*own, *table.get("derive", {})]}

    times = events["__time"].tolist()
    keys = events[key].tolist()
    history = {}
    expected = {}
    tied = {}
    for row, (who, now) in enumerate(zip(keys, times)):
        past = history.setdefault(who, [])
        past.append(row)
        features = dict(facts)
        for name, mine, of, functions, windows, parts, values, half_life in groups:
            for label, length, tile in windows:
                start = -math.inf if length is None else (now - length) // tile * tile
                some = [r for r in past if start < times[r] <= now and (of is None or values[r] is not None)] if mine else []
                for part, belongs in parts:
                    inside = sorted((r for r in some if belongs[r]), key=lambda r: (times[r], r))
                    ofs, at = [values[r] for r in inside], [times[r] for r in inside]
                    for function in functions:
                        feature = f"{name}_{function}_{part}{label}"
                        features[feature] = value_of(function, ofs, at, now, half_life)
                        if function == "mode" and len(ofs) > 1:
                            tied[who, len(past) - 1, feature] = modes(ofs, at)
        expected[(who, len(past) - 1)] = features

    integers = set(next(iter(expected.values())))
    for features in expected.values():
        integers -= {name for name, value in features.items() if isinstance(value, float)}
    base = pandas.DataFrame([{"__who": who, "__rank": rank, **features} for (who, rank), features in expected.items()])
    for name, sql in spec.get("derived", {}).items():
        base = connection.execute(f'select *, {sql} as "{name}" from base').df()
    derived = list(spec.get("derived", {}))

    # What driftline wrote.
    files = sorted(pathlib.Path(rows_folder).rglob("*.arrow"))
    rows = pa.concat_tables([pa.ipc.open_file(f).read_all() for f in files]).to_pandas(integer_object_nulls=True)
    if len(rows) != len(events):
        fail(f"{len(events)} events, but {len(rows)} feature rows in {len(files)} files")
    rows = rows.sort_values(["source_partition", "source_offset"], kind="stable")
    rows["__rank"] = rows.groupby(key).cumcount()
    indexed = base.set_index(["__who", "__rank"]).loc[list(zip(rows[key], rows["__rank"]))]

    compared = 0
    for column in indexed.columns:
        if column not in rows.columns:
            fail(f"feature {column} is not in the offline files")
        got, want = rows[column].tolist(), indexed[column].tolist()
        for g, w, who, rank in zip(got, want, rows[key], rows["__rank"]):
            g = None if pandas.isna(g) else g
            w = None if pandas.isna(w) or (isinstance(w, float) and not math.isfinite(w)) else w
            if column in derived and w is not None and g is not None:
                same = math.isclose(g, w, rel_tol=1e-9, abs_tol=1e-12)
            elif g is None or w is None:
                same = g is None and w is None
            elif column in integers:
                same = g == w
            else:
                same = math.isclose(float(g), float(w), rel_tol=1e-9, abs_tol=1e-9 if "std" in column else 0.0)
            if not same and g not in tied.get((who, rank, column), []):
                fail(f"{column} of {who}, event {rank}: driftline {g!r}, oracle {w!r}")
            compared += 1

    # Predictions: one a row, from the same values, scored like Python's onnxruntime.
    predictions = [json.loads(line) for line in pathlib.Path(predictions_file).read_text().splitlines() if line]
    ids = [p["prediction_id"] for p in predictions]
    if len(set(ids)) != len(ids):
        fail(f"{len(ids) - len(set(ids))} predictions are doubled")
    rows.index = [f"{t}-{p}-{o}" for t, p, o in zip(rows["source_topic"], rows["source_partition"], rows["source_offset"])]
    wanted = set(rows.index)
    if set(ids) != wanted:
        fail(f"{len(wanted - set(ids))} events have no prediction, {len(set(ids) - wanted)} predictions have no event")
    by_id = {p["prediction_id"]: p for p in predictions}
    features = list(predictions[0]["features"])
    matrix = np.array([[np.nan if by_id[i]["features"][f] is None else by_id[i]["features"][f] for f in features] for i in ids], dtype=np.float64)
    served = rows.loc[ids]
    offline = served[features].astype(float).to_numpy()
    if not np.array_equal(matrix, offline, equal_nan=True):
        fail("predictions carry other values than the offline files")
    preprocessor = onnxruntime.InferenceSession(f"{bundle}/preprocessor.onnx", providers=["CPUExecutionProvider"])
    model = onnxruntime.InferenceSession(f"{bundle}/model.onnx", providers=["CPUExecutionProvider"])
    inputs = preprocessor.run(None, {"features": matrix.astype(np.float32)})[0]
    answer = model.run(None, {"inputs": inputs})[0]
    scores = np.array([by_id[i]["score"] for i in ids])
    distance = float(np.abs(answer.reshape(len(ids), -1)[:, -1] - scores).max())
    if not distance <= 1e-5:
        fail(f"scores differ from Python's onnxruntime by {distance}")
    print(json.dumps({"events": len(events), "features": len(indexed.columns), "values": compared, "predictions": len(ids), "files": len(files), "score_distance": distance}))


main()
