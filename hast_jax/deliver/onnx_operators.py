"""Each operation of a network as ONNX nodes, written by one `Operator`.

Besides `split`, the operations in `OPERATORS` can be written. An error message names any other one.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto

from hast_jax.deliver.onnx_graph import BATCH, Graph, Value, cannot_write, constant
from hast_jax.deliver.onnx_layers import Operator, both_ends, convolution, pool, product, quantized
from hast_jax.networks.marks import MARK


def _affine(graph: Graph, name: str, a: Value, b: Value, shape: tuple[Any, ...]) -> Value | None:
    """The operation `name` of a tensor and a float32 constant, merged into the tensor's `scale` and `shift` without a node.

    None if the operands are not one such tensor and one such constant. name: add, sub, mul or div.
    """
    if name == "sub" and a.array is not None:
        a, b = replace(b, scale=-_scale(b), shift=None if b.shift is None else -b.shift), a
        name = "add"
    elif a.array is not None and name in ("add", "mul"):
        a, b = b, a
    if a.array is not None or b.array is None or a.shape != shape or b.array.dtype != np.float32:
        return None
    if a.grid is not None:
        a = graph.plain(a)
    # In double precision: several factors become one multiplication, which should be rounded only once.
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
    """One operator after the other, each applied to the result of the one before."""

    def write(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
        x = graph.plain(operands[0])
        name = graph.tensor(x)
        for operator in operators:
            name = graph.node(operator, name)
        return Value(shape, name, x.order)

    return write


def _not_equal(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    return _unary("Not")(graph, {}, [_binary("Equal")(graph, {}, operands, shape)], shape)


def _erfc(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x = _unary("Erf")(graph, {}, operands, shape)
    return replace(x, scale=np.float64(-1.0), shift=np.float64(1.0))


def _expm1(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x = _unary("Exp")(graph, {}, operands, shape)
    return replace(x, shift=np.float64(-1.0))


def _exp2(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x = _affine(graph, "mul", operands[0], constant(np.float32(np.log(2))), shape)
    assert x is not None
    return _unary("Exp")(graph, {}, [x], shape)


def _is_finite(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x = graph.plain(operands[0])
    name = graph.tensor(x)
    found = graph.node("Or", graph.node("IsNaN", name), graph.node("IsInf", name))
    return Value(shape, graph.node("Not", found), x.order)


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
        raise cannot_write("it clips to limits that are not scalars")
    x = graph.plain(x)
    return Value(shape, graph.node("Clip", graph.tensor(x), graph.tensor(low), graph.tensor(high)), x.order)


def _select(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    if len(operands) != 3:
        raise cannot_write("it selects among more than two values")
    which, no, yes = operands
    order = next((each.order for each in operands if each.array is None), tuple(range(len(shape))))
    names = [graph.tensor(each, order if each.shape else None) for each in (which, yes, no)]
    return Value(shape, graph.node("Where", *names), order)


def _convert(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    """A Cast. It is left out between floats if `x` still has a scale or a shift."""
    (x,) = operands
    kind = np.dtype(given["new_dtype"]) if given["new_dtype"] != "bfloat16" else np.dtype(np.float32)
    if kind.kind in "fV" and (x.scale is not None or x.shift is not None):
        return x
    targets = {"f": TensorProto.FLOAT, "V": TensorProto.FLOAT, "b": TensorProto.BOOL, "i": TensorProto.INT32}
    if kind.kind not in targets:
        raise cannot_write(f"it converts to {kind}")
    return Value(shape, graph.node("Cast", graph.tensor(x), to=targets[kind.kind]), x.order)


def _same(graph: Graph, _: Any, operands: list[Value], shape: tuple[Any, ...]) -> Value:
    return operands[0]


def _transpose(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    """A change of `order` alone: the stored tensor stays as it is."""
    x = graph.plain(operands[0])
    return Value(shape, x.name, tuple(given["permutation"].index(axis) for axis in x.order))


def _reshape(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    del given
    x = operands[0]
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1:
        raise cannot_write("it mixes the batch with other axes in two places of a reshape")
    plain = tuple(range(len(x.shape)))
    name = graph.node("Reshape", graph.tensor(x, plain), graph.constant(np.asarray(sizes, np.int64)))
    return Value(shape, name, tuple(range(len(shape))))


def _broadcast(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    """Insert axes of size one. The operation that reads the value expands them."""
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
        if operator == "ReduceSum" or graph.int4:  # opsets from 13, and from 18, read the axes as an input
            name = graph.node(operator, x.name, graph.constant(np.asarray(sorted(axes), np.int64)), keepdims=0)
        else:
            name = graph.node(operator, x.name, axes=sorted(axes), keepdims=0)
        return Value(shape, name, tuple(sorted(kept).index(axis) for axis in kept))

    return write


def _pad(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x, value = operands
    if any(inner for _, _, inner in given["padding_config"]):
        raise cannot_write("it pads between values")
    x = graph.plain(x)
    pads = both_ends([given["padding_config"][axis][:2] for axis in x.order])
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


def _reverse(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x = graph.plain(operands[0])
    if any(not isinstance(x.shape[axis], int) for axis in given["dimensions"]):
        raise cannot_write("it reverses the order of a batch")
    axes = [x.order.index(axis) for axis in given["dimensions"]]
    columns = ([-1] * len(axes), [np.iinfo(np.int64).min] * len(axes), axes, [-1] * len(axes))  # from the last to the first
    return Value(shape, graph.node("Slice", x.name, *(graph.constant(np.asarray(c, np.int64)) for c in columns)), x.order)


def _concatenate(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    tensor = next(each for each in operands if each.array is None)
    order = tensor.order
    names = [graph.tensor(each, order) if each.array is None else _spread(graph, each, tensor) for each in operands]
    return Value(shape, graph.node("Concat", *names, axis=order.index(given["dimension"])), order)


def _spread(graph: Graph, value: Value, tensor: Value) -> str:
    """A tensor with the whole shape of the constant `value`. tensor: has the number of images and the order of axes."""
    sizes = [1 if size == BATCH else size for size in value.shape]
    name = graph.constant(np.broadcast_to(np.asarray(value.array), sizes).transpose(tensor.order))
    if BATCH not in value.shape:
        return name
    batch = tensor.order.index(value.shape.index(BATCH))
    images = graph.node("Gather", graph.node("Shape", tensor.name), graph.constant(np.asarray([batch], np.int64)))
    once = graph.constant(np.ones(batch, np.int64)), graph.constant(np.ones(len(sizes) - batch - 1, np.int64))
    return graph.node("Expand", name, graph.node("Concat", once[0], images, once[1], axis=0))


def _gather(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    """Elements at constant positions of one axis, as of `x[..., [2, 0, 1]]`."""
    x, places = graph.plain(operands[0]), operands[1].array
    numbers = given["dimension_numbers"]
    (axis, *others) = numbers.start_index_map
    rest = [other for other in range(len(x.shape)) if other != axis]
    whole = all(given["slice_sizes"][other] == x.shape[other] for other in rest if isinstance(x.shape[other], int))
    if (
        places is None
        or others
        or not whole
        or places.ndim != 2
        or numbers.collapsed_slice_dims != (axis,)
        or list(numbers.offset_dims) != rest
        or not isinstance(x.shape[axis], int)
        or np.any((places < 0) | (places >= x.shape[axis]))
    ):
        raise cannot_write("it takes elements at other positions than constant ones of one axis")
    indices = graph.constant(places[:, 0].astype(np.int64))
    return Value(shape, graph.node("Gather", x.name, indices, axis=x.order.index(axis)), x.order)


def _stack(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    axis = given["axis"]
    wider = (*shape[:axis], 1, *shape[axis + 1 :])
    parts = [
        _reshape(graph, {}, [each], wider) if each.array is None else Value(wider, array=np.expand_dims(each.array, axis))
        for each in operands
    ]
    return _concatenate(graph, {"dimension": axis}, parts, shape)


def _tile(graph: Graph, given: dict[str, Any], operands: list[Value], shape: tuple[Any, ...]) -> Value:
    x = graph.plain(operands[0])
    repeats = np.asarray([given["reps"][axis] for axis in x.order], np.int64)
    return Value(shape, graph.node("Tile", x.name, graph.constant(repeats)), x.order)


OPERATORS: dict[str, Operator] = {
    MARK: quantized,
    "conv_general_dilated": convolution,
    "dot_general": product,
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
    "exp2": _exp2,
    "is_finite": _is_finite,
    "log": _unary("Log"),
    "expm1": _expm1,
    "log1p": _log1p,
    "sin": _unary("Sin"),
    "cos": _unary("Cos"),
    "tanh": _unary("Tanh"),
    "logistic": _unary("Sigmoid"),
    "erf": _unary("Erf"),
    "erfc": _erfc,
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
    "reduce_window_max": pool("MaxPool"),
    "reduce_window_sum": pool("AveragePool"),
    "pad": _pad,
    "slice": _slice,
    "rev": _reverse,
    "concatenate": _concatenate,
    "gather": _gather,
    "stack": _stack,
    "tile": _tile,
}

# Operations that broadcast their operands: a stretched operand needs no Expand.
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
    "rev",
    "concatenate",
    "gather",
    "stack",
    "tile",
    MARK,
}
