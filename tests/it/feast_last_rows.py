"""Reads every entity's features through Feast's own SDK and compares them with the entity's last row in the Arrow files.

    feast_last_rows.py FOLDER REDIS PROJECT ROWS_FOLDER

FOLDER holds definitions.py, which driftline generated; ROWS_FOLDER the feature rows that driftline wrote. Values have to be
equal to the last bit. Prints one JSON object with what was compared; exits with 1 at the first difference, naming it.
"""

import json
import math
import sys
from pathlib import Path

folder, redis, project, rows_folder = sys.argv[1:]
sys.path.insert(0, folder)

import pyarrow as pa  # noqa: E402
import pyarrow.compute as pc  # noqa: E402
import pyarrow.ipc  # noqa: E402
from feast import Entity, FeatureService, FeatureStore, FeatureView, RepoConfig  # noqa: E402

import definitions  # noqa: E402

ENTITIES_A_REQUEST = 2000


def last_rows(key):
    files = sorted(Path(rows_folder).rglob("*.arrow"))
    rows = pa.concat_tables([pa.ipc.open_file(file).read_all() for file in files])
    # All events of an entity are in one partition of one topic here, so the offset alone orders them.
    newest = rows.group_by(key).aggregate([("source_offset", "max")])
    newest = newest.rename_columns({"source_offset_max": "source_offset"})
    return rows.join(newest, keys=[key, "source_offset"], join_type="inner")


def main():
    objects = [o for o in vars(definitions).values() if isinstance(o, (Entity, FeatureView, FeatureService))]
    views = [o for o in objects if isinstance(o, FeatureView)]
    (key,) = [o.join_key for o in objects if isinstance(o, Entity)]
    store = FeatureStore(
        config=RepoConfig(
            project=project,
            registry=str(Path(folder) / "registry.db"),
            provider="local",
            online_store={"type": "redis", "connection_string": redis},
            entity_key_serialization_version=3,
        )
    )
    store.apply(objects)
    names = [field.name for view in views for field in view.features]
    features = [f"{view.name}:{field.name}" for view in views for field in view.features]
    rows = last_rows(key)
    if pc.count_distinct(rows[key]).as_py() != rows.num_rows:
        sys.exit("an entity has two last rows")
    compared = 0
    for start in range(0, rows.num_rows, ENTITIES_A_REQUEST):
        part = rows.slice(start, ENTITIES_A_REQUEST)
        keys = part[key].to_pylist()
        answer = store.get_online_features(features=features, entity_rows=[{key: k} for k in keys]).to_dict()
        for name in names:
            for who, served, stored in zip(keys, answer[name], part[name].to_pylist()):
                stored = None if isinstance(stored, float) and math.isnan(stored) else stored
                if served != stored:
                    sys.exit(f"{name} of {who}: Feast reads {served!r}, the last row has {stored!r}")
                compared += 1
    print(json.dumps({"entities": rows.num_rows, "features": len(names), "values": compared}))


main()
