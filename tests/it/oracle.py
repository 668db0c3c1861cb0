"""Recomputes every feature of every event from a pipeline's definition, naively, and compares with what driftline wrote.

    oracle.py PIPELINE.toml SOURCE EVENTS.parquet ROWS_FOLDER PREDICTIONS.jsonl BUNDLE_FOLDER

EVENTS has the declared columns of SOURCE in log order for each entity; the other sources are taken to be empty. Windows are
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


def value_of(function, values, times, now):
    """One aggregate over the events of a window, oldest first. `values` holds no nulls."""
    if function == "count":
        return len(values)
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
    if function == "last":
        return values[-1]
    if function == "seconds_since_last":
        return (now - times[-1]) / 1000.0
    fail(f"the oracle does not know function {function}")


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
        groups.append((name, mine, of, group["functions"], windows, kept, values))

    times = events[time_field].tolist()
    keys = events[key].tolist()
    history = {}
    expected = {}
    for row, (who, now) in enumerate(zip(keys, times)):
        past = history.setdefault(who, [])
        past.append(row)
        features = {}
        for name, mine, of, functions, windows, kept, values in groups:
            for label, length, tile in windows:
                inside = []
                if mine:
                    start = -math.inf if length is None else (now - length) // tile * tile
                    inside = [r for r in past if start < times[r] <= now and kept[r] and (of is None or values[r] is not None)]
                    inside.sort(key=lambda r: (times[r], r))
                for function in functions:
                    features[f"{name}_{function}_{label}"] = value_of(function, [values[r] for r in inside], [times[r] for r in inside], now)
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
            g = None if g is None or (isinstance(g, float) and math.isnan(g)) else g
            w = None if w is None or (isinstance(w, float) and not math.isfinite(w)) or w is pandas.NA else w
            if column in derived and w is not None and g is not None:
                same = math.isclose(g, w, rel_tol=1e-9, abs_tol=1e-12)
            elif g is None or w is None:
                same = g is None and w is None
            elif column in integers:
                same = g == w
            else:
                same = math.isclose(float(g), float(w), rel_tol=1e-9, abs_tol=1e-9 if "std" in column else 0.0)
            if not same:
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
