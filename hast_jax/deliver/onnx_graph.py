"""ONNX nodes and constants, and the values of a network while they become nodes.

A value has the shape that the network gave it. Its axes may be stored in another order, because ONNX puts channels first and
Flax puts them last. A value may carry a multiplication and an addition for which there are no nodes yet. A batch norm after a
convolution therefore becomes one Mul and one Add.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hast_jax.errors import InputError

Array = Any  # an array or a scalar of numpy
BATCH = "n"  # in a shape: the number of images


@dataclass(frozen=True, eq=False)
class Grid:
    """Integers behind a value: x = scale * (integers - zero point).

    integers: the name of an activation's uint8 tensor, or an array of a weight's whole numbers. scale: float32, one number for
    an activation, or one for each output channel of a weight, along `axis`. zero_point, largest: of an activation; a weight has
    the zero point 0. No integer of the activation is larger than `largest`.
    """

    integers: Any
    scale: Array
    zero_point: int = 0
    axis: int = 0
    largest: int = 255


@dataclass(frozen=True, eq=False)
class Value:
    """A constant `array`, or the tensor `name`. Axis i of the tensor is the network's axis order[i].

    shape: as in the network, with `BATCH` for the number of images. Axes of `array` may have size 1 where `shape` has more.
    scale, shift: x * scale + shift is still to be done; None if there is nothing to do. grid: of a quantized value. stretched:
    axes of the tensor, too, may have size 1 where `shape` has more.
    """

    shape: tuple[Any, ...]
    name: str = ""
    order: tuple[int, ...] = ()
    array: Array | None = None
    scale: Array | None = None
    shift: Array | None = None
    grid: Grid | None = None
    stretched: bool = False


def constant(array: Any, shape: Sequence[Any] | None = None) -> Value:
    """A constant. Floats become float32, because ONNX runtimes support few other types."""
    array = np.asarray(array)
    if array.dtype.kind not in "iub":
        array = array.astype(np.float32)
    return Value(tuple(array.shape if shape is None else shape), array=array)


@dataclass
class Graph:
    """The nodes of a model and their constants, in the order in which they were written.

    operators, int4: see `onnx_export.build`. activations: see `onnx_export.Onnx`. saturating: the results of convolutions that
    onnxruntime must not compute with integers (`onnx_layers.may_saturate`).
    """

    operators: str = "float"
    int4: bool = False
    activations: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    saturating: set[str] = field(default_factory=set)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    _names: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return the name of its output. A node with the same inputs and attributes is added only once."""
        key = (operator, inputs, repr(sorted(attributes.items())))
        if key not in self._names:
            self._names[key] = name = f"{operator.lower()}_{len(self.nodes)}"
            self.nodes.append(helper.make_node(operator, list(inputs), [name], name, **attributes))
        return self._names[key]

    def constant(self, array: Array, kind: int | None = None) -> str:
        """The name of a constant, which is stored only once. kind: its ONNX type, if numpy has no such type."""
        key = (array.dtype.str, array.shape, array.tobytes(), kind)
        if key not in self._names:
            self._names[key] = name = f"constant_{len(self.constants)}"
            if kind is None:
                self.constants[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
            else:
                self.constants[name] = helper.make_tensor(name, kind, array.shape, array.ravel())
        return self._names[key]

    def tensor(self, value: Value, order: tuple[int, ...] | None = None) -> str:
        """The name of a tensor that holds `value` computed completely. order: of its axes; by default as stored."""
        rank = len(value.shape)
        if value.array is not None:
            order = order or tuple(range(rank))
            return self.constant(as_stored(value.array, order))
        plain = self.plain(value)
        if order is None or order == plain.order:
            return plain.name
        return self.node("Transpose", plain.name, perm=[plain.order.index(axis) for axis in order])

    def plain(self, value: Value) -> Value:
        """`value` dequantized, with nodes for its multiplication and addition."""
        if value.array is not None:
            return value
        name = value.name
        if value.grid is not None:
            zero_point = self.constant(np.uint8(value.grid.zero_point))
            name = self.node("DequantizeLinear", value.grid.integers, self.constant(value.grid.scale), zero_point)
        for operator, operand in (("Mul", value.scale), ("Add", value.shift)):
            if operand is not None:
                stored = as_stored(np.asarray(operand, np.float32), value.order)
                name = self.node(operator, name, self.constant(stored))
        return replace(value, name=name, scale=None, shift=None, grid=None)

    def model(self, inputs: Any, output: Any, opset: int, metadata: dict[str, str]) -> onnx.ModelProto:
        """The model of all nodes that `output` depends on."""
        needed, nodes = {output.name}, []
        for node in reversed(self.nodes):
            if node.output[0] in needed:
                needed.update(node.input)
                nodes.append(node)
        constants = [tensor for name, tensor in self.constants.items() if name in needed]
        graph = helper.make_graph(nodes[::-1], "hast_jax", [inputs], [output], constants)
        versions = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=versions, ir_version=helper.find_min_ir_version_for(versions))
        model.producer_name = "hast_jax"
        helper.set_model_props(model, metadata)
        onnx.checker.check_model(model, full_check=True)
        return model


def as_stored(array: Array, order: tuple[int, ...]) -> Array:
    """A constant with its axes in the order of a stored tensor. array: of full rank, or a scalar."""
    return array.transpose(order) if array.ndim else array


def cannot_write(what: str) -> InputError:
    """The error for a network that cannot be written as ONNX. what: the reason."""
    return InputError(f"the network cannot be written as ONNX: {what}; format=stablehlo holds nearly all networks.")
