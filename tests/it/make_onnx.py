"""Writes the model bundles that tests/it/models.rs and benches/scoring.rs use, and what Python's onnxruntime makes of some rows.

    python make_onnx.py OUTPUT [--trees N]

Every folder under OUTPUT is a bundle without hashes; expected.json holds rows and scores for those named in it.
"""

import argparse
import json
import pathlib

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
# Two numbers, one flag: the types that features have.
INPUTS = [("amount", "float64"), ("visits", "int64"), ("member", "boolean")]


def graph(nodes, given, wanted, weights=(), opset=13):
    """A model of `nodes` from `given` to `wanted`, each (name, type, shape)."""
    info = lambda values: [helper.make_tensor_value_info(*value) for value in values]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights]
    built = helper.make_graph(nodes, "g", info(given), info(wanted), initializers)
    model = helper.make_model(built, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def impute(width, name="features", shape=None):
    """Missing values become 0."""
    nodes = [
        helper.make_node("IsNaN", [name], ["missing"]),
        helper.make_node("Where", ["missing", "zero", name], ["inputs"]),
    ]
    shape = shape or ["n", width]
    return graph(nodes, [(name, FLOAT, shape)], [("inputs", FLOAT, ["n", width])], [("zero", np.float32(0))])


def passing(width):
    """Missing values stay missing."""
    nodes = [helper.make_node("Identity", ["features"], ["inputs"])]
    return graph(nodes, [("features", FLOAT, ["n", width])], [("inputs", FLOAT, ["n", width])])


def gemm(width, weights, bias, output="probabilities", columns=1):
    nodes = [helper.make_node("Gemm", ["inputs", "w", "b"], [output])]
    values = [("w", np.asarray(weights, np.float32).reshape(width, columns)), ("b", np.asarray(bias, np.float32))]
    return graph(nodes, [("inputs", FLOAT, ["n", width])], [(output, FLOAT, ["n", columns])], values)


def constant(value):
    return gemm(3, np.zeros(3), [value])


def linear():
    """Both classes: 1 − p and p."""
    nodes = [
        helper.make_node("Gemm", ["inputs", "w", "b"], ["z"]),
        helper.make_node("Sigmoid", ["z"], ["p"]),
        helper.make_node("Sub", ["one", "p"], ["q"]),
        helper.make_node("Concat", ["q", "p"], ["probabilities"], axis=1),
    ]
    weights = [
        ("w", np.array([[0.3], [-0.2], [1.1]], np.float32)),
        ("b", np.array([0.05], np.float32)),
        ("one", np.float32(1)),
    ]
    return graph(nodes, [("inputs", FLOAT, ["n", 3])], [("probabilities", FLOAT, ["n", 2])], weights)


def lookup():
    """A table of ten values by `visits`: any other value makes the whole batch fail."""
    nodes = [
        helper.make_node("Gather", ["inputs", "one"], ["column"], axis=1),
        helper.make_node("Cast", ["column"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["probabilities"], axis=0),
    ]
    weights = [("one", np.array([1], np.int64)), ("table", np.linspace(0, 0.9, 10).astype(np.float32))]
    return graph(nodes, [("inputs", FLOAT, ["n", 3])], [("probabilities", FLOAT, ["n", 1])], weights)


def logarithm():
    """ln of `amount`: NaN below 0, −∞ at 0."""
    nodes = [
        helper.make_node("Gather", ["inputs", "zero"], ["column"], axis=1),
        helper.make_node("Log", ["column"], ["score"]),
    ]
    weights = [("zero", np.array([0], np.int64))]
    return graph(nodes, [("inputs", FLOAT, ["n", 3])], [("score", FLOAT, ["n", 1])], weights)


def trees(count, width=30):
    """A LightGBM classifier, converted as pipelines do it."""
    import lightgbm
    import onnxmltools
    from onnxmltools.convert.common.data_types import FloatTensorType

    rng = np.random.default_rng(7)
    rows = rng.lognormal(size=(4000, width)).astype(np.float32)
    rows[rng.random(rows.shape) < 0.1] = np.nan
    outcome = (np.nan_to_num(rows[:, 0]) + np.nan_to_num(rows[:, 1]) * rng.random(4000) > 2).astype(int)
    model = lightgbm.LGBMClassifier(n_estimators=count, num_leaves=31, verbose=-1, n_jobs=1, random_state=7)
    model.fit(rows, outcome)
    converted = onnxmltools.convert_lightgbm(
        model, initial_types=[("inputs", FloatTensorType([None, width]))], zipmap=False, target_opset=13
    )
    # The converter calls the label's shape {1}, of which ONNX Runtime complains once a batch.
    kept = [output for output in converted.graph.output if output.name == "probabilities"]
    del converted.graph.output[:]
    converted.graph.output.extend(kept)
    return converted, rows[:500], model.predict_proba(rows[:500])[:, 1]


def write(root, name, preprocessor, model, inputs=INPUTS, task="binary_classification", model_name="m"):
    folder = root / name
    folder.mkdir(parents=True)
    onnx.save(preprocessor, folder / "preprocessor.onnx")
    onnx.save(model, folder / "model.onnx")
    (folder / "profile.json").write_text(json.dumps({"format": 1, "columns": []}))
    listed = "".join(f'  {{ name = "{column}", type = "{kind}" }},\n' for column, kind in inputs)
    (folder / "bundle.toml").write_text(
        f'format = 1\nname = "{model_name}"\ncreated_at = "2026-01-02T03:04:05Z"\nthreshold = 0.5\n\n'
        f'[signature]\ninputs = [\n{listed}]\noutput = {{ name = "p", task = "{task}" }}\n\n'
        f"[metrics]\nauc = 0.75\n\n[lineage]\nseed = 7\n"
    )
    return folder


def run(folder, rows, output):
    """The two graphs, one after the other, in Python's onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = lambda file: onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
    inputs = session("preprocessor.onnx").run(["inputs"], {"features": rows})[0]
    return session("model.onnx").run([output], {"inputs": inputs})[0][:, -1]


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("output", type=pathlib.Path)
    arguments.add_argument("--trees", type=int, default=100)
    arguments = arguments.parse_args()
    root = arguments.output
    expected = {}

    rng = np.random.default_rng(11)
    rows = np.column_stack([rng.normal(size=300) * 5, rng.integers(-9, 10, 300), rng.integers(0, 2, 300)])
    rows = rows.astype(np.float32)
    rows[rng.random(rows.shape) < 0.2] = np.nan

    def expect(name, folder, rows, output, direct=None):
        known = [[None if np.isnan(value) else float(value) for value in row] for row in rows]
        expected[name] = {"rows": known, "scores": [float(score) for score in run(folder, rows, output)]}
        if direct is not None:
            expected[name]["direct"] = [float(score) for score in direct]

    write(root, "constant_a", impute(3), constant(0.25))
    write(root, "constant_b", impute(3), constant(0.75))
    expect("linear", write(root, "linear", impute(3), linear()), rows, "probabilities")
    weights = gemm(3, [1.5, -0.5, 2.0], [0.25], output="score")
    expect("regression", write(root, "regression", impute(3), weights, task="regression"), rows, "score")
    write(root, "lookup", impute(3), lookup())
    write(root, "logarithm", impute(3), logarithm(), task="regression")
    forest, sample, direct = trees(arguments.trees)
    names = [(f"f{position}", "float64") for position in range(sample.shape[1])]
    expect("trees", write(root, "trees", passing(len(names)), forest, inputs=names), sample, "probabilities", direct)

    # What a bundle must not be.
    write(root, "wrong_input_name", impute(3, name="x"), constant(0.5))
    write(root, "wrong_width", impute(4), constant(0.5))
    write(root, "wrong_between", impute(3), gemm(4, np.zeros(4), [0.5]))
    write(root, "wrong_output_name", impute(3), gemm(3, np.zeros(3), [0.5], output="p"))
    write(root, "wrong_columns", impute(3), gemm(3, np.zeros(9), np.zeros(3), columns=3))
    write(root, "wrong_rows", impute(3, shape=[1, 3]), constant(0.5))
    double = [helper.make_node("Cast", ["inputs"], ["probabilities"], to=TensorProto.DOUBLE)]
    double = graph(double, [("inputs", FLOAT, ["n", 3])], [("probabilities", TensorProto.DOUBLE, ["n", 3])])
    write(root, "wrong_type", impute(3), double)
    # Says that any number of rows is welcome, and reshapes them to one.
    nodes = [
        helper.make_node("Shape", ["inputs"], ["shape"]),
        helper.make_node("Mul", ["shape", "keep"], ["kept"]),
        helper.make_node("Add", ["kept", "one"], ["to"]),
        helper.make_node("Reshape", ["inputs", "to"], ["r"]),
        helper.make_node("Gemm", ["r", "w", "b"], ["probabilities"]),
    ]
    weights = [("keep", np.array([0, 1], np.int64)), ("one", np.array([1, 0], np.int64))]
    weights += [("w", np.zeros((3, 1), np.float32)), ("b", np.float32([0.5]))]
    fixed = graph(nodes, [("inputs", FLOAT, ["n", 3])], [("probabilities", FLOAT, ["n", 1])], weights)
    write(root, "wrong_batches", impute(3), fixed)
    write(root, "not_onnx", impute(3), constant(0.5))
    (root / "not_onnx" / "model.onnx").write_bytes(b"this is no graph")
    write(root, "other_name", impute(3), constant(0.5), model_name="another")

    (root / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main()
