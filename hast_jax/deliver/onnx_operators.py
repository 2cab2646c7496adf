"""Each operation of a network as ONNX nodes: functions of a graph, the operation's parameters and its operands.

`OPERATORS` lists what can be written. Everything else is refused by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto

from hast_jax.deliver.onnx_graph import Graph, Grid, Value, as_stored, cannot_write, constant
from hast_jax.networks.marks import MARK

Operator = Callable[[Graph, dict[str, Any], list[Value], tuple[Any, ...]], Value]


def _affine(graph: Graph, name: str, a: Value, b: Value, shape: tuple[Any, ...]) -> Value | None:
    """`a` name `b` where one of them is a constant of each channel and the other a float tensor: nothing is written yet."""
    if name == "sub" and a.array is not None:
        a, b = replace(b, scale=-_scale(b), shift=None if b.shift is None else -b.shift), a
        name = "add"
    elif a.array is not None and name in ("add", "mul"):
        a, b = b, a
    if a.array is not None or b.array is None or a.shape != shape or b.array.dtype != np.float32:
        return None
    if a.grid is not None:
        a = graph.plain(a)
    # In double precision: what becomes one multiplication should be rounded once.
    operand = b.array.astype(np.float64)
    if name in ("add", "sub"):
        shift = operand if name == "add" else -operand
        return replace(a, shift=shift if a.shift is None else a.shift + shift)
    factor = operand if name == "mul" else 1 / operand
    return replace(a, scale=_scale(a) * factor, shift=None if a.shift is None else a.shift * factor)


def _scale(value: Value) -> Any:
    return np.float64(1.0) if value.scale is None else value.scale


def _binary(operator: str, affine: str = "") -> Operator:
    def write(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
        a, b = operands
        found = _affine(graph, affine, a, b, shape) if affine else None
        if found is not None:
            return found
        tensors = [graph.plain(each) for each in operands]
        order = next((each.order for each in tensors if each.array is None and len(each.order) == len(shape)), None)
        order = order or tuple(range(len(shape)))
        names = [graph.tensor(each, order if len(each.shape) == len(shape) else None) for each in tensors]
        if operator == "Max" and _is_zero(b):
            return Value(shape, graph.node("Relu", names[0]), order)
        return Value(shape, graph.node(operator, *names), order)

    return write


def _is_zero(value: Value) -> bool:
    return value.array is not None and value.array.dtype == np.float32 and not value.array.any()


def _unary(*operators: str) -> Operator:
    """One operator after the other."""

    def write(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
        x = graph.plain(operands[0])
        name = graph.tensor(x)
        for operator in operators:
            name = graph.node(operator, name)
        return Value(shape, name, x.order)

    return write


def _not_equal(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    return _unary("Not")(graph, {}, [_binary("Equal")(graph, {}, operands, shape)], shape)


def _expm1(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x = _unary("Exp")(graph, {}, operands, shape)
    return replace(x, shift=np.float64(-1.0))


def _log1p(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x = graph.plain(operands[0])
    return _unary("Log")(graph, {}, [replace(x, shift=np.float64(1.0))], shape)


def _negative(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    found = _affine(graph, "mul", operands[0], constant(np.float32(-1.0)), shape)
    assert found is not None
    return found


def _power(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x = graph.plain(operands[0])
    name = graph.tensor(x)
    power = given.get("y", 2)
    if power == 2:
        return Value(shape, graph.node("Mul", name, name), x.order)
    return Value(shape, graph.node("Pow", name, graph.constant(np.float32(power))), x.order)


def _clamp(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    low, x, high = operands
    if low.shape or high.shape:
        raise cannot_write("it clips to limits that are no scalars")
    x = graph.plain(x)
    return Value(shape, graph.node("Clip", graph.tensor(x), graph.tensor(low), graph.tensor(high)), x.order)


def _select(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    if len(operands) != 3:
        raise cannot_write("it selects among more than two")
    which, no, yes = operands
    order = next((each.order for each in operands if each.array is None), tuple(range(len(shape))))
    names = [graph.tensor(each, order if each.shape else None) for each in (which, yes, no)]
    return Value(shape, graph.node("Where", *names), order)


def _convert(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    """Between floats nothing is done: all are float32."""
    (x,) = operands
    kind = np.dtype(given["new_dtype"]) if given["new_dtype"] != "bfloat16" else np.dtype(np.float32)
    if kind.kind in "fV" and (x.grid is not None or x.scale is not None or x.shift is not None):
        return x
    targets = {"f": TensorProto.FLOAT, "V": TensorProto.FLOAT, "b": TensorProto.BOOL, "i": TensorProto.INT32}
    if kind.kind not in targets:
        raise cannot_write(f"it converts to {kind}")
    return Value(shape, graph.node("Cast", graph.tensor(x), to=targets[kind.kind]), x.order)


def _same(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    return operands[0]


def _transpose(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    """The network's axes change their places; those that are stored stay."""
    x = graph.plain(operands[0])
    return Value(shape, x.name, tuple(given["permutation"].index(axis) for axis in x.order))


def _reshape(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    del given
    x = operands[0]
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1:
        raise cannot_write("a reshape mixes the batch with other axes in two places")
    plain = tuple(range(len(x.shape)))
    name = graph.node("Reshape", graph.tensor(x, plain), graph.constant(np.asarray(sizes, np.int64)))
    return Value(shape, name, tuple(range(len(shape))))


def _broadcast(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    """Axes of size one are put in; what consumes the value stretches them."""
    x, places = operands[0], given["broadcast_dimensions"]
    ones = [1] * len(shape)
    for place, size in zip(places, x.shape):
        ones[place] = size if isinstance(size, int) else -1
    if x.array is not None:
        sizes = [x.array.shape[places.index(i)] if i in places else 1 for i in range(len(shape))]
        return Value(tuple(shape), array=x.array.reshape(sizes))
    name = graph.node("Reshape", graph.tensor(x, tuple(range(len(x.shape)))), graph.constant(np.asarray(ones, np.int64)))
    return Value(tuple(shape), name, tuple(range(len(shape))), stretched=True)


def _reduce(operator: str) -> Operator:
    def write(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
        x = graph.plain(operands[0])
        if any(not isinstance(x.shape[axis], int) for axis in given["axes"]):
            raise cannot_write("it mixes the images of a batch")
        axes = [x.order.index(axis) for axis in given["axes"]]
        kept = [axis for axis in x.order if axis not in given["axes"]]
        if operator == "ReduceSum":
            name = graph.node(operator, x.name, graph.constant(np.asarray(sorted(axes), np.int64)), keepdims=0)
        else:
            name = graph.node(operator, x.name, axes=sorted(axes), keepdims=0)
        return Value(shape, name, tuple(sorted(kept).index(axis) for axis in kept))

    return write


def _pool(operator: str) -> Operator:
    def write(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
        rank = len(shape)
        moving = [i for i in range(rank) if given["window_dimensions"][i] > 1 or given["window_strides"][i] > 1]
        fixed = [i for i in range(rank) if i not in moving]
        if rank != 4 or any(given["base_dilation"][i] != 1 for i in range(rank)) or not {0, 3} <= set(fixed):
            raise cannot_write("it pools over other axes than height and width")
        sizes = [given["window_dimensions"][i] for i in (1, 2)]
        pads = _pads([given["padding"][i] for i in (1, 2)])
        named = {"kernel_shape": sizes, "strides": [given["window_strides"][i] for i in (1, 2)], "pads": pads}
        dilations = [given["window_dilation"][i] for i in (1, 2)]
        order = (0, 3, 1, 2)
        name = graph.tensor(operands[0], order)
        if operator == "MaxPool":
            return Value(shape, graph.node(operator, name, **named, dilations=dilations), order)
        if dilations != [1, 1]:
            raise cannot_write("it sums over windows with holes")
        # A sum over a window is its mean times its size.
        name = graph.node("AveragePool", name, **named, count_include_pad=1)
        return Value(shape, name, order, scale=np.float64(np.prod(sizes)))

    return write


def _pads(pairs: Sequence[tuple[int, int]]) -> list[int]:
    if any(side < 0 for pair in pairs for side in pair):
        raise cannot_write("it pads by less than nothing")
    return [low for low, _ in pairs] + [high for _, high in pairs]


def _pad(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x, value = operands
    if any(inner for _, _, inner in given["padding_config"]):
        raise cannot_write("it pads between values")
    x = graph.plain(x)
    pads = _pads([given["padding_config"][axis][:2] for axis in x.order])
    return Value(shape, graph.node("Pad", x.name, graph.constant(np.asarray(pads, np.int64)), graph.tensor(value)), x.order)


def _slice(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x = graph.plain(operands[0])
    strides = given["strides"] or (1,) * len(shape)
    if any(not isinstance(size, int) and (size != new or step > 1) for size, new, step in zip(x.shape, shape, strides)):
        raise cannot_write("it takes some images out of a batch")
    cut = [a for a in range(len(shape)) if isinstance(x.shape[a], int) and (x.shape[a] != shape[a] or strides[a] > 1)]
    columns = [[given["start_indices"][a] for a in cut], [given["limit_indices"][a] for a in cut]]
    columns += [[x.order.index(a) for a in cut], [strides[a] for a in cut]]
    if not cut:
        return x
    return Value(shape, graph.node("Slice", x.name, *(graph.constant(np.asarray(c, np.int64)) for c in columns)), x.order)


def _concatenate(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    order = next((each.order for each in operands if each.array is None), tuple(range(len(shape))))
    for each in operands:
        if each.array is not None and each.array.shape != each.shape:
            raise cannot_write("it joins a stretched constant")
    names = [graph.tensor(each, order) for each in operands]
    return Value(shape, graph.node("Concat", *names, axis=order.index(given["dimension"])), order)


def _convolution(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x, kernel = operands
    numbers = given["dimension_numbers"]
    if set(given["lhs_dilation"]) != {1} or given["batch_group_count"] != 1:
        raise cannot_write("it has a transposed convolution ('conv_general_dilated' with a dilated input)")
    if kernel.array is None:
        raise cannot_write("it computes the kernel of a convolution from its input")
    named = {
        "strides": list(given["window_strides"]),
        "pads": _pads(given["padding"]),
        "dilations": list(given["rhs_dilation"]),
        "group": given["feature_group_count"],
    }
    order, channel = tuple(numbers.lhs_spec), numbers.out_spec[1]
    out = lambda name, scale=None: Value(shape, name, tuple(numbers.out_spec), scale=scale)
    axes = tuple(numbers.rhs_spec)
    integers = _integers(graph, x, kernel, order, axes, axes[0])
    if integers is None:
        return out(graph.node("Conv", graph.tensor(x, order), _kernel(graph, kernel, axes), **named))
    u, zero_point, w, scale = integers
    name = graph.node("Cast", graph.node("ConvInteger", u, w, zero_point, **named), to=TensorProto.FLOAT)
    return out(name, scale.reshape([-1 if axis == channel else 1 for axis in range(len(shape))]))


def _product(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x, kernel = operands
    (left, right), (batch, _) = given["dimension_numbers"]
    if batch or len(left) != 1 or kernel.array is None or len(kernel.shape) != 2:
        return _einsum(graph, given, operands, shape)
    order = (*(axis for axis in range(len(x.shape)) if axis != left[0]), left[0])
    axes = (right[0], 1 - right[0])
    plain = tuple(range(len(shape)))
    integers = _integers(graph, x, kernel, order, axes, axes[1])
    if integers is None:
        return Value(shape, graph.node("MatMul", graph.tensor(x, order), _kernel(graph, kernel, axes)), plain)
    u, zero_point, w, scale = integers
    name = graph.node("Cast", graph.node("MatMulInteger", u, w, zero_point), to=TensorProto.FLOAT)
    return Value(shape, name, plain, scale=scale.reshape([1] * (len(shape) - 1) + [-1]))


def _einsum(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    """A product over any axes. Its own axes are those of the batch, then what is left of the first operand and the second."""
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
    """Names of the integers of `x`, of their zero point and of those of `kernel`, and the scale of their products.

    order, axes: in which an operator takes the axes of both. channel: the axis of `kernel` that is the output's. None where
    one of them has none that fit an integer operator, or where the graph is to hold float ones.
    """
    if not graph.integer_operators or x.grid is None or kernel.grid is None or kernel.grid.axis != channel:
        return None
    if np.abs(kernel.grid.integers).max() > 127:
        return None
    u = x.grid.integers
    if order != x.order:
        u = graph.node("Transpose", u, perm=[x.order.index(axis) for axis in order])
    w = graph.constant(kernel.grid.integers.transpose(axes).astype(np.int8))
    return u, graph.constant(np.uint8(x.grid.zero_point)), w, kernel.grid.scale.astype(np.float64) * x.grid.scale


def _kernel(graph: Graph, kernel: Value, axes: tuple[int, ...]) -> str:
    """The name of a kernel with its axes in this order; a quantized one is dequantized from the smallest integers that fit.

    A zero point for each channel is the exception, as not every runtime computes with it: for INT4, and for eight bits with a
    range that is not symmetric.
    """
    assert kernel.array is not None
    if kernel.grid is None:
        return graph.constant(as_stored(kernel.array, axes))
    integers, axis = kernel.grid.integers.transpose(axes), axes.index(kernel.grid.axis)
    others = tuple(other for other in range(integers.ndim) if other != axis)
    step = graph.constant(kernel.grid.scale)
    for kind, bits in ((TensorProto.INT4, 4),) * graph.int4 + ((None, 8),):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        for zero_point in (np.zeros(1, int), low - np.minimum(integers.min(others, keepdims=True), 0)):
            stored = integers + zero_point
            if min(stored.min(), zero_point.min()) < low or max(stored.max(), zero_point.max()) > high:
                continue
            names = [graph.constant(stored.astype(np.int8), kind), step]
            if zero_point.any():
                names.append(graph.constant(zero_point.ravel().astype(np.int8), kind))
            return graph.node("DequantizeLinear", *names, axis=axis)
    return graph.node("DequantizeLinear", graph.constant(integers.astype(np.int32)), step, axis=axis)


def _quantized(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    """A mark where activations are quantized: integers from `lowest` to `lowest` + 2^bits - 1, times `step`."""
    x = graph.plain(operands[0])
    lowest, highest = given["lowest"], given["lowest"] + 2 ** given["bits"] - 1
    zero_point, step = max(0, -lowest), graph.constant(np.float32(given["step"]))
    if max(zero_point, highest + zero_point) > 255:  # far from zero: no uint8 holds it
        rounded = graph.node("Round", graph.node("Div", x.name, step))
        limits = (graph.constant(np.float32(limit)) for limit in (lowest, highest))
        return Value(shape, graph.node("Mul", graph.node("Clip", rounded, *limits), step), x.order)
    u = graph.node("QuantizeLinear", x.name, step, graph.constant(np.uint8(zero_point)))
    low, high = lowest + zero_point, highest + zero_point
    if (low, high) != (0, 255):
        u = graph.node("Clip", u, graph.constant(np.uint8(low)), graph.constant(np.uint8(high)))
    graph.activations.setdefault(given["name"], (u, x.order))
    return Value(shape, order=x.order, grid=Grid(u, np.float32(given["step"]), zero_point))


OPERATORS: dict[str, Operator] = {
    MARK: _quantized,
    "conv_general_dilated": _convolution,
    "dot_general": _product,
    "add": _binary("Add", "add"),
    "add_any": _binary("Add", "add"),
    "sub": _binary("Sub", "sub"),
    "mul": _binary("Mul", "mul"),
    "div": _binary("Div", "div"),
    "max": _binary("Max"),
    "min": _binary("Min"),
    "pow": _binary("Pow"),
    "gt": _binary("Greater"),
    "ge": _binary("GreaterOrEqual"),
    "lt": _binary("Less"),
    "le": _binary("LessOrEqual"),
    "eq": _binary("Equal"),
    "ne": _not_equal,
    "and": _binary("And"),
    "or": _binary("Or"),
    "not": _unary("Not"),
    "neg": _negative,
    "abs": _unary("Abs"),
    "sign": _unary("Sign"),
    "floor": _unary("Floor"),
    "ceil": _unary("Ceil"),
    "exp": _unary("Exp"),
    "log": _unary("Log"),
    "expm1": _expm1,
    "log1p": _log1p,
    "sin": _unary("Sin"),
    "cos": _unary("Cos"),
    "tanh": _unary("Tanh"),
    "logistic": _unary("Sigmoid"),
    "erf": _unary("Erf"),
    "sqrt": _unary("Sqrt"),
    "rsqrt": _unary("Sqrt", "Reciprocal"),
    "integer_pow": _power,
    "square": _power,
    "clamp": _clamp,
    "select_n": _select,
    "convert_element_type": _convert,
    "copy": _same,
    "stop_gradient": _same,
    "optimization_barrier": _same,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_window_max": _pool("MaxPool"),
    "reduce_window_sum": _pool("AveragePool"),
    "pad": _pad,
    "slice": _slice,
    "concatenate": _concatenate,
}

# Those that take any stretched operand as it is.
ELEMENTWISE = frozenset(OPERATORS) - {
    "conv_general_dilated",
    "dot_general",
    "transpose",
    "reshape",
    "squeeze",
    "expand_dims",
    "broadcast_in_dim",
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_window_max",
    "reduce_window_sum",
    "pad",
    "slice",
    "concatenate",
    MARK,
}
