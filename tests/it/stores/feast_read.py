"""Reads entities through Feast's own SDK from a Redis that driftline wrote, then writes to it as Feast does.

Usage: feast_read.py FOLDER REDIS PROJECT QUESTION. FOLDER holds definitions.py, which driftline generated.
"""

import json
import sys
from datetime import datetime, timezone
from pathlib import Path

folder, redis, project, question = sys.argv[1:]
question = json.loads(question)
sys.path.insert(0, folder)

import pandas as pd  # noqa: E402
from feast import Entity, FeatureService, FeatureStore, FeatureView, RepoConfig  # noqa: E402

import definitions  # noqa: E402

store = FeatureStore(
    config=RepoConfig(
        project=project,
        registry=str(Path(folder) / "registry.db"),
        provider="local",
        online_store={"type": "redis", "connection_string": redis},
        entity_key_serialization_version=3,
    )
)
objects = [o for o in vars(definitions).values() if isinstance(o, (Entity, FeatureView, FeatureService))]
store.apply(objects)
views = [o for o in objects if isinstance(o, FeatureView)]
services = [o for o in objects if isinstance(o, FeatureService)]


def plain(value):
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        value = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
        return round(value.timestamp() * 1000)
    return value


features = [f"{view.name}:{field.name}" for view in views for field in view.features]
response = store.get_online_features(features=features, entity_rows=question["entities"])
answer = {name: [plain(v) for v in values] for name, values in response.to_dict().items()}
# Every view of an entity was written together, so any feature's event times will do.
index = list(response.proto.metadata.feature_names.val).index("ratio")
times = response.proto.results[index].event_timestamps
answer["event_time"] = [t.seconds * 1000 + t.nanos // 1_000_000 for t in times]
answer["service"] = sorted(
    field.name for service in services for view in service.feature_view_projections for field in view.features
)
store.get_online_features(features=services[0], entity_rows=question["entities"][:1]).to_dict()

push = question["push"]
rows = pd.DataFrame(push["rows"])
rows["event_time"] = pd.to_datetime(rows["event_time"], unit="ms", utc=True)
store.write_to_online_store(push["view"], df=rows)
print(json.dumps(answer))
