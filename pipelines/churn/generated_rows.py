#!/usr/bin/env python3
"""Joins the feature rows of a generated stream with its labels: the training set of the bundle that is shipped.

    generated_rows.py ROWS_FOLDER GENERATED.jsonl DEFINITION FOLDER

ROWS_FOLDER is where `driftline features` wrote, GENERATED.jsonl is what `driftline generate --stdout` printed for the same
options, DEFINITION the hash that `driftline check` prints. FOLDER gets generated.arrow and request.json, for train.py.
`driftline retrain` does the same by itself, for the rows and labels of a pipeline that runs.
"""

import json
import sys
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from train import NOT_FEATURES, data_type

KEY = "customer_id"
# April and May: the longest window is full, and their outcomes are known by the end of June.
FROM, TO = 1_743_465_600_000, 1_748_736_000_000


def main():
    rows_folder, generated, definition, folder = sys.argv[1:]
    score = tomllib.loads((Path(__file__).parent / "pipeline.toml").read_text())["score"]
    labels = {}
    for line in Path(generated).open():
        event = json.loads(line)
        if event["source"] == "labels":
            label = event["record"]
            labels[label[KEY], label["as_of"]] = float(label["churned"])
    rows = pa.concat_tables([pa.ipc.open_file(file).read_all() for file in sorted(Path(rows_folder).rglob("*.arrow"))])
    times = rows["event_time"].cast(pa.int64())
    outcomes = map(labels.get, zip(rows[KEY].to_pylist(), times.to_pylist()))
    rows = rows.append_column("label", pa.array(outcomes, pa.float64()))
    rows = rows.filter(pc.and_(pc.and_(pc.greater_equal(times, FROM), pc.less(times, TO)), pc.is_valid(rows["label"])))
    rows = rows.sort_by([("event_time", "ascending"), (KEY, "ascending")])
    taken = NOT_FEATURES | {KEY, "label"} | set(score.get("exclude", []))
    features = [field.name for field in rows.schema if field.name not in taken and data_type(field.type)]
    rows = rows.select([KEY, "event_time", *features, "label"]).combine_chunks()
    with pa.OSFile(f"{folder}/generated.arrow", "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows)
    request = {"definition": definition, "model": score["model"], "keys": [KEY], "features": features, "seed": 7, "window_rows": 1000}
    Path(f"{folder}/request.json").write_text(json.dumps(request, indent=1))


if __name__ == "__main__":
    main()
