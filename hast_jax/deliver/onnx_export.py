"""A student as an ONNX model, written operation by operation from its JAX trace.

Weights are integers with one scale for each output channel and, with few exceptions, zero point 0. Activations are uint8 with
one scale and one zero point. A batch norm is one multiplication and one addition per channel in float32, because it cannot be
folded into integers exactly. Everything else stays float32.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend.core import Literal
from onnx import TensorProto, helper

from hast_jax import __version__, networks
from hast_jax.data.datasets import normalise
from hast_jax.deliver.onnx_graph import BATCH, Graph, Grid, Value, cannot_write, constant
from hast_jax.deliver.onnx_operators import ELEMENTWISE, OPERATORS
from hast_jax.networks import flax_trees
from hast_jax.networks.marks import MARK, marked
from hast_jax.student import Student

INPUT, OUTPUT = "images", "logits"
OPSET, INT4_OPSET = 13, 21  # the oldest opsets with a scale for each channel, and with INT4
TRACED_BATCH = 10007  # images of the trace: a prime that is the size of no other axis. The model takes any number
LOOPS = ("scan", "while", "cond")
NOT_ON_INTEGERS = ("and", "or", "not", "neg")
LAYOUTS = {"nhwc": (0, 1, 2, 3), "nchw": (0, 3, 1, 2)}


class Onnx(NamedTuple):
    """A model, and where its quantized activations are.

    activations: name of a range -> (name of the uint8 tensor, order of its axes), in the order of execution. Axis i of the
    tensor is the network's axis order[i].
    """

    model: onnx.ModelProto
    activations: dict[str, tuple[str, tuple[int, ...]]]


def build(
    student: Student, *, layout: str = "nhwc", normalised: bool = False, operators: str = "float", int4: bool = False
) -> Onnx:
    """`student` as an ONNX model.

    Its input `images` is uint8 [n, height, width, channels], or [n, channels, height, width] with layout "nchw". With
    `normalised` it is float32, in the network's normalised space. The output `logits` is float32 [n, classes].
    operators: how convolutions and matrix products compute. "float": with dequantized integers, the form that every runtime
    supports. "exact": with the integers themselves as floats; the multiplication of the batch norm then includes the scales.
    Sums below 2^24 are then exact in any order. "integer": with ConvInteger and MatMulInteger. int4: weights are INT4 if they
    fit.

    Raises InputError for a network with an operation that cannot be written here.
    """
    graph = Graph(operators=operators, int4=int4)
    kind = np.float32 if normalised else np.uint8
    network, ranges = marked(student.network), student.variables["ranges"]
    variables = {name: tree for name, tree in student.variables.items() if name != "ranges"}

    def logits(variables: Any, images: Any) -> Any:
        images = images if normalised else normalise(images, student.mean, student.std)
        return networks.logits(network, {**variables, "ranges": ranges}, images)

    traced = jax.make_jaxpr(logits)(variables, jax.ShapeDtypeStruct((TRACED_BATCH, *student.image), kind))
    kernels, order = _kernels(student), LAYOUTS[layout]
    leaves = [kernels.get("/".join(path[1:])) or constant(leaf) for path, leaf in flax_trees.leaves(variables).items()]
    images = Value((BATCH, *student.image), INPUT, order)
    (found,) = _walk(graph, traced.jaxpr, [constant(each) for each in traced.consts], [*leaves, images])
    graph.nodes.append(helper.make_node("Identity", [graph.tensor(found, (0, 1))], [OUTPUT], OUTPUT))
    sizes: list[Any] = [(BATCH, *student.image)[axis] for axis in order]
    taken = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT if normalised else TensorProto.UINT8, sizes)
    made = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [BATCH, student.network.classes])
    return Onnx(graph.model(taken, made, INT4_OPSET if int4 else OPSET, _metadata(student)), graph.activations)


def _kernels(student: Student) -> dict[str, Value]:
    """The quantized kernels by their paths. A kernel carries its integers if its output channels lie on one axis."""
    found = {}
    for path, codes in student.codes().items():
        integers = codes.integers
        array = integers.astype(np.float32) * codes.spread("step")
        channels = [axis for axis in range(integers.ndim) if axis not in codes["axes"]]
        grid = Grid(integers, codes.step, axis=channels[0]) if len(channels) == 1 else None
        found[path] = Value(array.shape, array=array, grid=grid)
    return found


def _metadata(student: Student) -> dict[str, str]:
    record = student.record
    bits = record.get("bits") or {}
    config = record.get("config")
    return {
        "hast_jax": __version__,
        "network": str(record.get("network")),
        "bits": f"W{bits.get('weights')}A{bits.get('activations')}",
        "rules": json.dumps(student.rules),
        "classes": str(student.network.classes),
        "config_crc32": str(zlib.crc32(json.dumps(config, sort_keys=True).encode())) if config else "",
    }


def _walk(graph: Graph, jaxpr: Any, constants: Sequence[Value], arguments: Sequence[Value]) -> list[Value]:
    """The outputs of a traced function. Its operations become nodes; operations on constants alone are computed at once."""
    values: dict[Any, Value] = dict(zip(jaxpr.constvars, constants)) | dict(zip(jaxpr.invars, arguments))

    def read(atom):
        return constant(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation, atoms in _needed(jaxpr):
        operands = [read(atom) for atom in atoms]
        values.update(zip(equation.outvars, _results(graph, equation, operands)))
    return [read(atom) for atom in jaxpr.outvars]


def _needed(jaxpr: Any) -> list[tuple[Any, list[Any]]]:
    """The operations that the outputs depend on, each with its operands. Empty parts of a concatenation are left out.

    Such parts come from `jnp.pad`, which pads every axis, some of them by nothing.
    """
    needed, found = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}, []
    for equation in reversed(jaxpr.eqns):
        if needed.isdisjoint(equation.outvars):
            continue
        joins = equation.primitive.name == "concatenate"
        atoms = [atom for atom in equation.invars if atom.aval.size or not joins]
        needed.update(atom for atom in atoms if not isinstance(atom, Literal))
        found.append((equation, atoms))
    return found[::-1]


def _results(graph: Graph, equation: Any, operands: list[Value]) -> list[Value]:
    name, given = equation.primitive.name, equation.params
    inner = next((given[key] for key in ("jaxpr", "call_jaxpr") if key in given), None)
    if inner is not None and name not in LOOPS:
        closed = (inner.jaxpr, inner.consts) if hasattr(inner, "jaxpr") else (inner, ())
        return _walk(graph, closed[0], [constant(each) for each in closed[1]], operands)
    shape = _shape(equation.outvars[0])
    if name == "convert_element_type" and operands[0].grid is not None and jnp.issubdtype(given["new_dtype"], jnp.floating):
        return operands  # a quantized value keeps its integers, also in a network that computes in bfloat16
    if all(each.array is not None for each in operands) and name not in (MARK, "broadcast_in_dim"):
        return _computed(equation, operands)
    if name == "split":
        return _split(graph, given, _whole(graph, operands[0]), [_shape(each) for each in equation.outvars])
    if name not in OPERATORS or len(equation.outvars) > 1:
        raise cannot_write(f"it has the operation {name!r}")
    if name in NOT_ON_INTEGERS and jnp.issubdtype(equation.invars[0].aval.dtype, jnp.integer):
        raise cannot_write(f"it has the operation {name!r} on integers")
    if name in ELEMENTWISE:
        stretched = all(each.stretched or each.array is not None for each in operands)
        return [replace(OPERATORS[name](graph, given, operands, shape), stretched=stretched)]
    return [OPERATORS[name](graph, given, [_whole(graph, each) for each in operands], shape)]


def _split(graph: Graph, given: dict[str, Any], x: Value, shapes: list[tuple[Any, ...]]) -> list[Value]:
    """The parts of `x` along an axis, each written as a slice."""
    found, start, axis = [], 0, given["axis"]
    for shape, size in zip(shapes, given["sizes"]):
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = start, start + size
        cut = {"start_indices": starts, "limit_indices": limits, "strides": None}
        found.append(OPERATORS["slice"](graph, cut, [x], shape))
        start += size
    return found


def _shape(variable: Any) -> tuple[Any, ...]:
    """The shape of a traced value, with `BATCH` in place of the number of images."""
    sizes = variable.aval.shape
    if any(size % TRACED_BATCH == 0 and size not in (0, TRACED_BATCH) for size in sizes):
        raise cannot_write("it merges the axis of the images with another axis")
    return tuple(BATCH if size == TRACED_BATCH else size for size in sizes)


def _computed(equation: Any, operands: list[Value]) -> list[Value]:
    """The results of an operation on constants."""
    try:
        arrays = [np.broadcast_to(np.asarray(each.array), each.shape) for each in operands]
    except TypeError as error:
        raise cannot_write(f"the operation {equation.primitive.name!r} has a constant for each image of a batch") from error
    if any(BATCH in _shape(each) for each in equation.outvars):
        raise cannot_write(f"the operation {equation.primitive.name!r} makes a constant for each image of a batch")
    found = equation.primitive.bind(*map(jnp.asarray, arrays), **equation.params)
    return [constant(each) for each in (found if equation.primitive.multiple_results else [found])]


def _whole(graph: Graph, value: Value) -> Value:
    """`value` with its stored axes of size one expanded to its shape, but for the axis of the images of a constant."""
    if value.array is not None and value.grid is None:
        sizes = [size if isinstance(size, int) else 1 for size in value.shape]
        return replace(value, array=np.broadcast_to(np.asarray(value.array), sizes))
    if not value.stretched:
        return value
    if not all(isinstance(size, int) for size in value.shape[1:]):
        raise cannot_write("it broadcasts an axis to the size of the batch")
    plain = graph.plain(value)
    sizes = [value.shape[axis] if isinstance(value.shape[axis], int) else 1 for axis in plain.order]
    return replace(plain, name=graph.node("Expand", plain.name, graph.constant(np.asarray(sizes, np.int64))), stretched=False)
