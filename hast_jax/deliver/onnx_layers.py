"""The layers of a network as ONNX nodes: convolutions, products, pooling, and the quantization of activations.

An `Operator` takes the graph, the parameters of a JAX operation, its operands, and the shape of its result.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto

from hast_jax.deliver.onnx_graph import Graph, Grid, Value, as_stored, cannot_write

Operator = Callable[[Graph, dict[str, Any], list[Value], tuple[Any, ...]], Value]

LARGEST_INT16 = 2**15 - 1
JOINED = ("Add", "Clip", "Max", "Min", "Relu")  # onnxruntime joins a convolution with them and with the QuantizeLinear behind


def both_ends(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Padding (before, after) of each axis, as ONNX lists it: all before, then all after. Raises InputError if negative."""
    if any(side < 0 for pair in pairs for side in pair):
        raise cannot_write("it pads by a negative number")
    return [low for low, _ in pairs] + [high for _, high in pairs]


def pool(operator: str) -> Operator:
    """The maximum or the sum over windows of height and width. operator: MaxPool, or AveragePool for the sum."""

    def write(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
        rank = len(shape)
        moving = [i for i in range(rank) if given["window_dimensions"][i] > 1 or given["window_strides"][i] > 1]
        fixed = [i for i in range(rank) if i not in moving]
        if rank != 4 or any(given["base_dilation"][i] != 1 for i in range(rank)) or not {0, 3} <= set(fixed):
            raise cannot_write("it pools over other axes than height and width")
        sizes = [given["window_dimensions"][i] for i in (1, 2)]
        pads = both_ends([given["padding"][i] for i in (1, 2)])
        named = {"kernel_shape": sizes, "strides": [given["window_strides"][i] for i in (1, 2)]}
        dilations = [given["window_dilation"][i] for i in (1, 2)]
        order = (0, 3, 1, 2)
        x = operands[0]
        if operator == "MaxPool" and x.grid is not None and graph.operators != "float":  # the maximum of integers is an integer
            u = graph.node(operator, _turned(graph, x, order), **named, pads=pads, dilations=dilations)
            return Value(shape, order=order, grid=replace(x.grid, integers=u))
        name = graph.tensor(x, order)
        if operator == "MaxPool":
            return Value(shape, graph.node(operator, name, **named, pads=pads, dilations=dilations), order)
        if dilations != [1, 1]:
            raise cannot_write("it sums over dilated windows")
        if any(pads):  # by a node of its own: onnxruntime 1.24 gives wrong averages at a border, for models of newer opsets
            name = graph.node("Pad", name, graph.constant(np.asarray([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64)))
        name = graph.node("AveragePool", name, **named)  # a sum over a window is its mean times its size
        return Value(shape, name, order, scale=np.float64(np.prod(sizes)))

    return write


def convolution(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    """A convolution over any number of axes, with strides, groups and dilated kernels."""
    x, kernel = operands
    numbers = given["dimension_numbers"]
    if set(given["lhs_dilation"]) != {1} or given["batch_group_count"] != 1:
        raise cannot_write("it has a transposed convolution ('conv_general_dilated' with a dilated input)")
    if kernel.array is None:
        raise cannot_write("it computes the kernel of a convolution from its input")
    named = {
        "strides": list(given["window_strides"]),
        "pads": both_ends(given["padding"]),
        "dilations": list(given["rhs_dilation"]),
        "group": given["feature_group_count"],
    }
    order, channel = tuple(numbers.lhs_spec), numbers.out_spec[1]

    def out(name, scale=None):
        return Value(shape, name, tuple(numbers.out_spec), scale=scale)

    axes = tuple(numbers.rhs_spec)
    integers = _integers(graph, x, kernel, order, axes, axes[0])
    if integers is None:
        inputs = _operands(graph, x, kernel, order, axes)
        name = graph.node("Conv", *inputs, **named)
        if may_saturate(x, kernel) and inputs[1] not in graph.constants:
            graph.saturating.add(name)
        return out(name)
    *inputs, scale = integers
    if graph.operators == "integer":
        name = graph.node("Cast", graph.node("ConvInteger", *inputs, **named), to=TensorProto.FLOAT)
    else:
        name = graph.node("Conv", *inputs, **named)
    return out(name, scale.reshape([-1 if axis == channel else 1 for axis in range(len(shape))]))


def product(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    """A product with a matrix of weights. A product of other tensors is written as an Einsum."""
    x, kernel = operands
    (left, right), (batch, _) = given["dimension_numbers"]
    if batch or len(left) != 1 or kernel.array is None or len(kernel.shape) != 2:
        return _einsum(graph, given, operands, shape)
    order = (*(axis for axis in range(len(x.shape)) if axis != left[0]), left[0])
    axes = (right[0], 1 - right[0])
    plain = tuple(range(len(shape)))
    integers = _integers(graph, x, kernel, order, axes, axes[1])
    if integers is None:
        left_name, right_name = _operands(graph, x, kernel, order, axes)
        # Of a product of floats with dequantized integers, onnxruntime makes a MatMulNBits, which rounds the floats to 8 bits.
        # Of two dequantized operands it makes a product of integers.
        if right_name not in graph.constants and (x.grid is None or may_saturate(x, kernel)):
            right_name = _apart(graph, kernel, axes)
        return Value(shape, graph.node("MatMul", left_name, right_name), plain)
    u, n, *zero_points, scale = integers
    if graph.operators == "exact":
        if may_saturate(x, kernel) and n not in graph.constants:
            n = _apart(graph, _unscaled(kernel), axes)
        name = graph.node("MatMul", u, n)
    else:
        if may_saturate(x, kernel):
            assert kernel.grid is not None
            n = graph.constant((kernel.grid.integers.transpose(axes) + 128).astype(np.uint8))
            zero_points.append(graph.constant(np.uint8(128)))
        name = graph.node("Cast", graph.node("MatMulInteger", u, n, *zero_points), to=TensorProto.FLOAT)
    return Value(shape, name, plain, scale=scale.reshape([1] * (len(shape) - 1) + [-1]))


def _einsum(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    """A product over any axes. Its axes are the batch axes, then the remaining axes of the first and of the second operand."""
    contracted, batch = given["dimension_numbers"]
    letters = [[""] * len(each.shape) for each in operands]
    unused = iter("abcdefghijklmnopqrstuvwxyz")
    shared = []
    for axes in (batch, contracted):
        for a, b in zip(*axes):
            letters[0][a] = letters[1][b] = letter = next(unused)
            shared.append(letter)
    for each in letters:
        each[:] = [letter or next(unused) for letter in each]
    left = [letter for each in letters for letter in each if letter not in shared]
    out = "".join([*shared[: len(batch[0])], *left])
    names, terms = [], []
    for operand, its in zip(operands, letters):
        plain = graph.plain(operand)
        order = plain.order if plain.array is None else tuple(range(len(plain.shape)))
        names.append(graph.tensor(plain) if plain.array is None else _kernel(graph, plain, order))
        terms.append("".join(its[axis] for axis in order))
    name = graph.node("Einsum", *names, equation=f"{terms[0]},{terms[1]}->{out}")
    return Value(shape, name, tuple(range(len(shape))))


def _integers(graph: Graph, x: Value, kernel: Value, order: tuple[int, ...], axes: tuple[int, ...], channel: int) -> Any:
    """The names of the inputs of a convolution or product of integers, and last the scale of its results.

    With "exact" operators, the inputs are the integers of `x` and of `kernel` as floats. With "integer" operators, they are the
    integers of both, and the zero point of `x`. order, axes: the order of axes that the operator needs in `x` and in `kernel`.
    channel: the axis of `kernel` with the output channels.

    None with "float" operators, and if an operand has no integers. With "integer" operators also None if the integers of the
    kernel do not fit into int8.
    """
    if graph.operators == "float" or x.grid is None or kernel.grid is None or kernel.grid.axis != channel:
        return None
    scale = kernel.grid.scale.astype(np.float64) * x.grid.scale
    zero_point = graph.constant(np.uint8(x.grid.zero_point))
    u = _turned(graph, x, order)
    if graph.operators == "exact":
        unscaled, one = _kernel(graph, _unscaled(kernel), axes), graph.constant(np.float32(1))
        if unscaled in graph.constants:
            return _shifted(graph, x, order), unscaled, scale
        return graph.node("DequantizeLinear", u, one, zero_point), unscaled, scale
    if np.abs(kernel.grid.integers).max() > 127:
        return None
    return u, graph.constant(kernel.grid.integers.transpose(axes).astype(np.int8)), zero_point, scale


def may_saturate(x: Value, kernel: Value) -> bool:
    """Whether two products of integers of `x` and `kernel` may have a sum that does not fit into 16 bits.

    On x86 CPUs without VNNI, onnxruntime adds pairs of products of uint8 and int8 in 16 bits, and so changes such sums. It
    computes with integers where a file asks for it, and also where a DequantizeLinear node precedes each operand of a product,
    or of a convolution that a QuantizeLinear node follows. A kernel of uint8 is safe.
    """
    if x.grid is None or kernel.grid is None:
        return False
    return 2 * x.grid.largest * int(np.abs(kernel.grid.integers).max()) > LARGEST_INT16


def _apart(graph: Graph, kernel: Value, axes: tuple[int, ...]) -> str:
    """The name of a quantized kernel in floats, for a product that onnxruntime is to compute in float32.

    A multiplication that is not by one, after the DequantizeLinear node, keeps the product apart from this node.
    """
    assert kernel.grid is not None
    half, grid = np.float32(0.5), kernel.grid
    halves = replace(kernel, array=grid.integers * half, grid=replace(grid, scale=half))
    double = 2 * grid.scale
    if double.ndim:  # one for each output channel
        double = double.reshape([-1 if axis == grid.axis else 1 for axis in axes])
    return graph.node("Mul", _kernel(graph, halves, axes), graph.constant(double))


def _operands(graph: Graph, x: Value, kernel: Value, order: tuple[int, ...], axes: tuple[int, ...]) -> tuple[str, str]:
    """The names of `x` and of `kernel` as floats, with their axes in the orders `order` and `axes`."""
    stored = _kernel(graph, kernel, axes)
    if x.grid is None or stored not in graph.constants:
        return graph.tensor(x, order), stored
    return graph.node("Mul", _shifted(graph, x, order), graph.constant(x.grid.scale)), stored


def _shifted(graph: Graph, x: Value, order: tuple[int, ...]) -> str:
    """The name of the integers of `x` without their zero point, as floats, with its axes in the order `order`.

    For operators with a kernel in floats. With a DequantizeLinear node in this place, onnxruntime quantizes the kernel too
    (WeightBiasQuantization), and so computes another network.
    """
    assert x.grid is not None
    u = graph.node("Cast", _turned(graph, x, order), to=TensorProto.FLOAT)
    return graph.node("Sub", u, graph.constant(np.float32(x.grid.zero_point))) if x.grid.zero_point else u


def _unscaled(kernel: Value) -> Value:
    """The integers of a quantized kernel, as floats."""
    assert kernel.grid is not None
    return replace(kernel, array=kernel.grid.integers.astype(np.float32), grid=replace(kernel.grid, scale=np.float32(1)))


def _turned(graph: Graph, x: Value, order: tuple[int, ...]) -> str:
    """The name of the integers of `x` with its axes in the order `order`."""
    assert x.grid is not None
    if order == x.order:
        return x.grid.integers
    return graph.node("Transpose", x.grid.integers, perm=[x.order.index(axis) for axis in order])


def _kernel(graph: Graph, kernel: Value, axes: tuple[int, ...]) -> str:
    """The name of a kernel with its axes in the order `axes`. A quantized one is dequantized from the smallest type that fits.

    The zero point is 0 if possible, because not every runtime supports a zero point for each channel. INT4, and eight bits with
    a range that is not symmetric, may need one.
    """
    assert kernel.array is not None
    if kernel.grid is None:
        return graph.constant(as_stored(kernel.array, axes))
    integers, axis = kernel.grid.integers.transpose(axes), axes.index(kernel.grid.axis)
    others = tuple(other for other in range(integers.ndim) if other != axis)
    for kind, bits in ((TensorProto.INT4, 4),) * graph.int4 + ((None, 8),):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        for zero_point in (np.zeros(1, int), low - np.minimum(integers.min(others, keepdims=True), 0)):
            stored = integers + zero_point
            if min(stored.min(), zero_point.min()) < low or max(stored.max(), zero_point.max()) > high:
                continue
            names = [graph.constant(stored.astype(np.int8), kind), graph.constant(kernel.grid.scale)]
            if zero_point.any():  # one for each channel, and then as many scales
                names[1] = graph.constant(np.broadcast_to(kernel.grid.scale, zero_point.size))
                names.append(graph.constant(zero_point.ravel().astype(np.int8), kind))
            return graph.node("DequantizeLinear", *names, axis=axis)
    return graph.constant(as_stored(kernel.array, axes))  # no type that onnxruntime multiplies holds these integers


def quantized(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    """The mark of a quantized activation: integers from `lowest` to `lowest` + 2^bits - 1, times `step`."""
    x = graph.plain(operands[0])
    lowest, highest = given["lowest"], given["lowest"] + 2 ** given["bits"] - 1
    zero_point, step = max(0, -lowest), graph.constant(np.float32(given["step"]))
    if max(zero_point, highest + zero_point) > 255:  # a range far from zero: its integers do not fit into uint8
        rounded = graph.node("Round", graph.node("Div", x.name, step))
        limits = (graph.constant(np.float32(limit)) for limit in (lowest, highest))
        return Value(shape, graph.node("Mul", graph.node("Clip", rounded, *limits), step), x.order)
    name = x.name
    if _from_saturating(graph, name):
        # A multiplication before QuantizeLinear keeps the convolution in float32. Two is a power of two, so the integers stay.
        name, step = graph.node("Mul", name, graph.constant(np.float32(2))), graph.constant(np.float32(2 * given["step"]))
    u = graph.node("QuantizeLinear", name, step, graph.constant(np.uint8(zero_point)))
    low, high = lowest + zero_point, highest + zero_point
    if (low, high) != (0, 255):
        u = graph.node("Clip", u, graph.constant(np.uint8(low)), graph.constant(np.uint8(high)))
    graph.activations.setdefault(given["name"], (u, x.order))
    return Value(shape, order=x.order, grid=Grid(u, np.float32(given["step"]), zero_point, largest=high))


def _from_saturating(graph: Graph, name: str) -> bool:
    """Whether a tensor is the result of one of `graph.saturating`, but for operations that onnxruntime joins with it."""
    nodes = {node.output[0]: node for node in graph.nodes}
    while name in nodes and nodes[name].op_type in JOINED:
        name = nodes[name].input[0]
    return name in graph.saturating
