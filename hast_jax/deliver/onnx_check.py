"""Run an ONNX model with onnxruntime, on the CPU."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from hast_jax.deliver.onnx_export import INPUT, Onnx

Run = Callable[[np.ndarray], np.ndarray]
ERRORS_ALONE = 3  # onnxruntime's log level for errors and worse
INTEGERS = {TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32, TensorProto.INT4, TensorProto.INT64}


def session(model: onnx.ModelProto) -> Run:
    """A function that computes the logits of a batch with `model`, on one thread."""
    computing = _session(model)
    return lambda images: computing.run(None, {INPUT: images})[0]


def integers(model: Onnx, images: np.ndarray) -> dict[str, np.ndarray]:
    """Name of a range -> the uint8 integers of its activation for a batch, with axes in the network's order."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model.model)
    computed = {output for node in copy.graph.node for output in node.output}
    tensors = {key: tensor for key, tensor in model.activations.items() if tensor[0] in computed}
    names = dict.fromkeys(name for name, _ in tensors.values())
    copy.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in names)
    found = dict(zip(names, _session(copy).run(list(names), {INPUT: images})))
    return {key: found[name].transpose(np.argsort(order)) for key, (name, order) in tensors.items()}


def operators(model: onnx.ModelProto) -> tuple[tuple[str, str, int], ...]:
    """(type, kind, number) of the nodes. kind: of first input and output, "integer" or "float"; "between" if they differ."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    kinds = {each.name: each.data_type for each in graph.initializer}
    for each in (*graph.input, *graph.value_info, *graph.output):
        kinds[each.name] = each.type.tensor_type.elem_type
    counted: Counter[tuple[str, str]] = Counter()
    for node in graph.node:
        ends = {kinds.get(name) in INTEGERS for name in (node.input[0], node.output[0])}
        counted[node.op_type, "between" if len(ends) == 2 else "integer" if ends == {True} else "float"] += 1
    return tuple((name, kind, number) for (name, kind), number in sorted(counted.items(), key=lambda item: -item[1]))


def _session(model: onnx.ModelProto) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = ERRORS_ALONE
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
