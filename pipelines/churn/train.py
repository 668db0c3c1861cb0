#!/usr/bin/env python3
"""Trains the churn model and writes a bundle: preprocessor, model, signature, reference profile, metrics, lineage.

`driftline retrain` runs it with the paths in the environment (DRIFTLINE_TRAINING_SET, DRIFTLINE_OUTPUT, DRIFTLINE_REQUEST);
by hand:

    .venv/bin/python pipelines/churn/train.py --training-set set.arrow --output bundle

The training set is an Arrow IPC (or Parquet) file: entity keys, `event_time`, features, and a label column that is 0 or 1.
The same training set, request and seed give the same model.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import lightgbm
import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
from onnx import TensorProto, helper, numpy_helper

from reference_profile import build_profile

OPSET = 15
# Columns of a training set that are no features. Entity keys are told by the request, or are text.
NOT_FEATURES = {"event_time", "source", "source_topic", "source_partition", "source_offset", "watermark", "computed_at"}
# Rows from before a shift still teach what did not change, but less.
WEIGHT_BEFORE_SHIFT = 0.05
PARAMETERS = {
    "objective": "binary",
    "learning_rate": 0.1,
    "num_leaves": 12,
    "min_data_in_leaf": 100,
    "lambda_l2": 10.0,
    "feature_fraction": 0.7,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}
MOST_TREES = 120
PATIENCE = 15


def main():
    started = time.monotonic()
    options = parse_options()
    request = options.request
    data = read_training_set(options)
    n, rows_before = len(data.y), int(np.searchsorted(data.times, options.holdout_from(data.times)))
    say(f"read {n:,} rows, {len(data.features)} features, {day(data.times[0])} to {day(data.times[-1])}, {data.y.mean():.1%} positive")
    if rows_before < 500 or n - rows_before < 100:
        sys.exit(f"train.py: {rows_before} rows to train on and {n - rows_before} to validate on are too few (500 and 100)")
    if not 0 < data.y[:rows_before].sum() < rows_before:
        sys.exit("train.py: all labels before the hold-out are equal, so there is nothing to learn")

    preprocessor = build_preprocessor(data.features, data.x[:rows_before])
    inputs = run_onnx(preprocessor, data.x.astype(np.float32))
    weights = row_weights(data.times, options.since)
    booster = fit(inputs[:rows_before], data.y[:rows_before], weights[:rows_before], options.seed)
    model = export(booster, inputs.shape[1])

    scores = run_onnx(model, inputs)[:, -1].astype(np.float64)
    difference = np.abs(scores - booster.predict(inputs)).max()
    if not difference < 1e-5:
        sys.exit(f"train.py: the exported model differs from the trained one by {difference:.1e}")
    metrics = measure(data.y[rows_before:], scores[rows_before:])
    say(f"held out {n - rows_before:,} rows from {day(data.times[rows_before])} on: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))

    reference = reference_rows(data.times, options.reference_from)
    columns = {name: data.x[reference, i] for i, name in enumerate(data.features)} | {"score": scores[reference]}
    profile = build_profile(columns, data.times[reference], options.window_rows)
    lineage = {
        "definition": request.get("definition"),
        "retraining_event_id": options.event.get("id"),
        "parent_version": request.get("parent_version"),
        "training_set": str(options.training_set),
        "training_set_sha256": sha256(Path(options.training_set).read_bytes()),
        "command": "train.py",
        "seed": options.seed,
        "training_rows": rows_before,
        "holdout_rows": n - rows_before,
        "from": int(data.times[0]),
        "to": int(data.times[-1]),
        "holdout_from": int(data.times[rows_before]),
        "trees": booster.num_trees(),
        "python": sys.version.split()[0],
        **{package: version(package) for package in ("numpy", "pyarrow", "lightgbm", "onnx", "onnxmltools", "onnxruntime")},
    }
    write_bundle(options, data, preprocessor, model, profile, metrics, choose_threshold(data.y, scores, rows_before), lineage)
    say(f"wrote {options.output} in {time.monotonic() - started:.1f} s")


# --- what is asked for -------------------------------------------------------------------------------------------------


class Options:
    """The command line, completed by the environment and the request."""

    def __init__(self, arguments, request):
        self.request = request
        self.event = request.get("event") or {}
        self.training_set = Path(arguments.training_set)
        self.output = Path(arguments.output)
        self.features = arguments.features.split(",") if arguments.features else request.get("features")
        self.label = arguments.label or request.get("label") or "label"
        self.model = arguments.model or request.get("model") or "churn"
        self.keys = set(request.get("keys") or [])
        self.seed = first(arguments.seed, request.get("seed"), 1)
        self.window_rows = first(arguments.window_rows, request.get("window_rows"), 5000)
        self.since = first(arguments.since, self.event.get("since"))
        self.reference_from = first(arguments.since, request.get("reference_from"))
        self.given_holdout_from = first(arguments.holdout_from, request.get("holdout_from"))

    def holdout_from(self, times):
        """First event time that is held out; without a wish, the last fifth of the rows is."""
        return self.given_holdout_from if self.given_holdout_from is not None else times[int(0.8 * len(times))]


def parse_options():
    parser = argparse.ArgumentParser(description="Trains the churn model and writes a bundle.")
    parser.add_argument("--training-set", default=os.environ.get("DRIFTLINE_TRAINING_SET"), help="Arrow IPC or Parquet file")
    parser.add_argument("--output", default=os.environ.get("DRIFTLINE_OUTPUT"), help="folder for the bundle")
    parser.add_argument("--request", default=os.environ.get("DRIFTLINE_REQUEST"), help="JSON, or a file with it, from driftline retrain")
    parser.add_argument("--features", help="comma-separated, in the order of [score] features; default: all numeric columns")
    parser.add_argument("--label", help="column with the outcome, 0 or 1 (default: label)")
    parser.add_argument("--model", help="name in the registry (default: churn)")
    parser.add_argument("--holdout-from", type=int, help="event time in ms from which rows validate; default: the last fifth")
    parser.add_argument("--since", type=int, help="event time in ms from which the data differ, after a drift")
    parser.add_argument("--window-rows", type=int, help="rows of a monitoring window (default: 5000)")
    parser.add_argument("--seed", type=int, help="default: 1")
    arguments = parser.parse_args()
    for needed in ("training_set", "output"):
        if not getattr(arguments, needed):
            parser.error(f"--{needed.replace('_', '-')} or DRIFTLINE_{needed.upper()} is needed")
    request = {}
    if arguments.request:
        text = arguments.request if arguments.request.lstrip().startswith("{") else Path(arguments.request).read_text()
        request = json.loads(text)
    return Options(arguments, request)


def first(*values):
    """The first that is given: 0 counts."""
    return next((value for value in values if value is not None), None)


# --- rows --------------------------------------------------------------------------------------------------------------


class Data:
    """Labelled rows in time order: `x` float64 [n, k] with NaN for missing, `y` 0 or 1, `times` in ms."""

    def __init__(self, features, types, x, y, times):
        self.features, self.types, self.x, self.y, self.times = features, types, x, y, times


def read_training_set(options):
    path = options.training_set
    if path.suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.read_table(path)
    else:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
    for needed in ("event_time", options.label):
        if needed not in table.column_names:
            sys.exit(f"train.py: {path} has no column {needed!r}; it has {', '.join(table.column_names)}")
    table = table.filter(table[options.label].is_valid())
    if table.num_rows == 0:
        sys.exit(f"train.py: {path} has no labelled rows")
    times = table["event_time"].cast(pa.timestamp("ms", "UTC") if pa.types.is_timestamp(table["event_time"].type) else pa.int64())
    times = times.cast(pa.int64()).to_numpy()
    # Rows of equal time keep the file's order.
    order = np.argsort(times, kind="stable")
    features = options.features or [
        field.name
        for field in table.schema
        if field.name not in NOT_FEATURES | options.keys | {options.label} and data_type(field.type)
    ]
    missing = [name for name in features if name not in table.column_names]
    if missing:
        sys.exit(f"train.py: {path} lacks the features {', '.join(missing)}")
    types = [data_type(table.schema.field(name).type) for name in features]
    unfit = [name for name, kind in zip(features, types) if kind is None]
    if unfit:
        sys.exit(f"train.py: {', '.join(unfit)}: only numbers and booleans can be learnt from")
    x = np.column_stack([to_float(table[name])[order] for name in features])
    return Data(features, types, x, to_float(table[options.label])[order], times[order])


def data_type(arrow):
    """driftline's name of an Arrow type that a model can read."""
    if pa.types.is_boolean(arrow):
        return "boolean"
    if pa.types.is_integer(arrow):
        return "int64"
    return "float64" if pa.types.is_floating(arrow) else None


def to_float(column):
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False) if not pa.types.is_boolean(column.type) else (
        column.cast(pa.int8()).cast(pa.float64()).to_numpy(zero_copy_only=False)
    )


def row_weights(times, since):
    after = times >= since if since is not None else np.ones(len(times), bool)
    return np.where(after, 1.0, WEIGHT_BEFORE_SHIFT) if after.any() else np.ones(len(times))


def reference_rows(times, reference_from):
    """Rows for the reference profile: after a shift only those since, so that the next windows are compared with what the
    data are now."""
    start = int(np.searchsorted(times, reference_from)) if reference_from is not None else 0
    return slice(start if start < len(times) else 0, len(times))


# --- preprocessor ------------------------------------------------------------------------------------------------------


def build_preprocessor(features, x):
    """features [n, k] → inputs [n, k]: clipped to the range seen in training, long-tailed ones as log(1 + v), missing kept.

    Clipping keeps a value that no row had from meaning anything but 'as large as the largest'.
    """
    with np.errstate(invalid="ignore"):
        finite = np.where(np.isfinite(x), x, np.nan)
        empty = np.isnan(finite).all(axis=0)
        finite[:, empty] = 0.0
        low, high = np.nanmin(finite, axis=0), np.nanmax(finite, axis=0)
        tail = (low >= 0) & (np.nanquantile(finite, 0.99, axis=0) > 20 * np.maximum(np.nanmedian(finite, axis=0), 1e-9))
    constants = {
        "low": low.astype(np.float32)[None, :],
        "high": high.astype(np.float32)[None, :],
        "zero": np.zeros((1, 1), np.float32),
        "one": np.ones((1, 1), np.float32),
        "long_tailed": tail[None, :],
    }
    nodes = [
        helper.make_node("Max", ["features", "low"], ["at_least"]),
        helper.make_node("Min", ["at_least", "high"], ["clipped"]),
        helper.make_node("Max", ["clipped", "zero"], ["positive"]),
        helper.make_node("Add", ["positive", "one"], ["plus_one"]),
        helper.make_node("Log", ["plus_one"], ["logarithm"]),
        helper.make_node("Where", ["long_tailed", "logarithm", "clipped"], ["scaled"]),
        # Max and Min do not promise what they do with NaN: missing values go around them.
        helper.make_node("IsNaN", ["features"], ["missing"]),
        helper.make_node("Where", ["missing", "features", "scaled"], ["inputs"]),
    ]
    k = len(features)
    graph = helper.make_graph(
        nodes,
        "preprocessor",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", k])],
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["n", k])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return finish(graph)


def finish(graph, extra_opsets=()):
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET), *extra_opsets], producer_name="driftline-churn")
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model.SerializeToString()


def run_onnx(model, x):
    """Runs a graph with one input and one output as driftline does: the model learns from what it will be given."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x[i : i + 8192]})[0] for i in range(0, len(x), 8192)])


# --- model -------------------------------------------------------------------------------------------------------------


def fit(x, y, weights, seed):
    """Finds the number of trees on the latest 15 % of the rows, then learns from all of them."""
    # Half of the cores: the pipeline goes on meanwhile, and OpenMP threads that wait for each other get nowhere.
    parameters = PARAMETERS | {"seed": seed, "num_threads": max(1, (os.cpu_count() or 1) // 2)}
    split = int(0.85 * len(y))
    earlier = lightgbm.Dataset(x[:split], y[:split], weight=weights[:split])
    later = earlier.create_valid(x[split:], y[split:], weight=weights[split:])
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    probe = lightgbm.train(parameters, earlier, MOST_TREES, valid_sets=[later], callbacks=[stop])
    trees = max(10, probe.best_iteration)
    loss = probe.best_score["valid_0"]["binary_logloss"]
    say(f"trained {probe.current_iteration()} trees, {trees} are best (log loss {loss:.4f} on the latest 15 %)")
    return lightgbm.train(parameters, lightgbm.Dataset(x, y, weight=weights), trees)


def export(booster, k):
    """inputs [n, k] → probabilities [n, 2], n free."""
    from onnxmltools.convert import convert_lightgbm
    from onnxmltools.convert.common.data_types import FloatTensorType

    converted = convert_lightgbm(
        booster, "churn", [("inputs", FloatTensorType([None, k]))], zipmap=False, target_opset=OPSET
    )
    # The converter declares a label of shape {1}, about which ONNX Runtime warns on every larger batch. driftline makes
    # its own label from the threshold, so only the probabilities stay, and what they need.
    output = next(o.name for o in converted.graph.output if o.name.startswith("prob"))
    needed, nodes = {output}, []
    for node in reversed(converted.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            nodes.append(node)
    for node in nodes:
        round_thresholds_down(node, booster)
    last = nodes[0]
    last.output[list(last.output).index(output)] = "probabilities"
    graph = helper.make_graph(
        nodes[::-1],
        "model",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["n", k])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 2])],
        [i for i in converted.graph.initializer if i.name in needed],
    )
    return finish(graph, [o for o in converted.opset_import if o.domain])


def round_thresholds_down(node, booster):
    """Makes a tree node's float32 thresholds mean what LightGBM's float64 ones do.

    A float32 value is at most a float64 threshold if it is at most the next float32 below it; the converter takes the
    nearest float32 instead, which may lie above, and then sends values between the two the other way.
    """
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if "nodes_values" not in attributes:
        return
    down = {}
    for feature, threshold in thresholds(booster):
        with np.errstate(over="ignore"):  # 1e300 stands for 'all values that are not missing'
            nearest = np.float32(threshold)
        down[feature, float(nearest)] = nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-np.inf))
    values = attributes["nodes_values"].floats
    for i, (feature, value) in enumerate(zip(attributes["nodes_featureids"].ints, values)):
        values[i] = down.get((feature, value), value)


def thresholds(booster):
    """All (feature, threshold) of a model."""
    stack = [tree["tree_structure"] for tree in booster.dump_model()["tree_info"]]
    while stack:
        node = stack.pop()
        if "threshold" in node:
            yield node["split_feature"], node["threshold"]
            stack += [node["left_child"], node["right_child"]]


def choose_threshold(y, scores, rows_before):
    """The score above which as many rows of training lie as had the outcome."""
    return float(np.quantile(scores[:rows_before], 1 - y[:rows_before].mean()))


# --- metrics -----------------------------------------------------------------------------------------------------------


def measure(y, p):
    clipped = np.clip(p, 1e-7, 1 - 1e-7)
    return {
        "auc": auc(y, p),
        "brier": float(np.mean((p - y) ** 2)),
        "log_loss": float(-np.mean(y * np.log(clipped) + (1 - y) * np.log(1 - clipped))),
        "ece": expected_calibration_error(y, p),
        "base_rate": float(y.mean()),
    }


def auc(y, p):
    """Area under the ROC curve; ties count half. NaN where one class is absent."""
    order = np.argsort(p, kind="stable")
    _, first_of, counts = np.unique(p[order], return_index=True, return_counts=True)
    ranks = np.empty(len(p))
    ranks[order] = np.repeat(first_of + (counts + 1) / 2, counts)
    positives = y.sum()
    negatives = len(y) - positives
    return float((ranks[y == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives)) if positives * negatives else float("nan")


def expected_calibration_error(y, p, bins=10):
    """Mean distance of predicted from observed shares over equal-mass bins."""
    parts = np.array_split(np.argsort(p, kind="stable"), bins)
    return float(sum(len(part) * abs(y[part].mean() - p[part].mean()) for part in parts if len(part)) / len(y))


# --- the bundle --------------------------------------------------------------------------------------------------------


def write_bundle(options, data, preprocessor, model, profile, metrics, threshold, lineage):
    options.output.mkdir(parents=True, exist_ok=True)
    files = {
        "model.onnx": model,
        "preprocessor.onnx": preprocessor,
        "profile.json": json.dumps(profile, separators=(",", ":"), allow_nan=False).encode() + b"\n",
    }
    for name, content in files.items():
        (options.output / name).write_bytes(content)
    created = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())), timezone.utc)
    lines = [
        "format = 1",
        f"name = {toml(options.model)}",
        f"created_at = {toml(created.strftime('%Y-%m-%dT%H:%M:%SZ'))}",
        "# Score from which a customer counts as leaving.",
        f"threshold = {toml(threshold)}",
        "",
        "[files]",
        *(f"{toml(name)} = {toml(sha256(content))}" for name, content in files.items()),
        "",
        "[signature]",
        "inputs = [",
        *(f"    {{ name = {toml(name)}, type = {toml(kind)} }}," for name, kind in zip(data.features, data.types)),
        "]",
        'output = { name = "churn_probability", task = "binary_classification" }',
        "",
        "# On held-out rows, later than all that were learnt from.",
        "[metrics]",
        *(f"{name} = {toml(value)}" for name, value in metrics.items() if np.isfinite(value)),
        "",
        "[lineage]",
        *(f"{name} = {toml(value)}" for name, value in lineage.items() if value is not None),
        "",
    ]
    # Last, because it is what makes the folder a bundle.
    (options.output / "bundle.toml").write_text("\n".join(lines))


def toml(value):
    """A TOML value. JSON's strings and numbers are TOML's, too."""
    return json.dumps(value, ensure_ascii=False)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def day(ms):
    return datetime.fromtimestamp(int(ms) / 1000, timezone.utc).strftime("%Y-%m-%d")


def say(text):
    print(f"train: {text}", flush=True)


if __name__ == "__main__":
    main()
