"""Weights that multiply and add activations outside of all layers, such as a matrix that a network creates itself."""

import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from hast_jax.networks.graph import PRODUCTS, Graph, Operation

# Operations that put the same numbers into another shape or type.
SAME_NUMBERS = ("convert_element_type", "reshape", "transpose", "broadcast_in_dim", "squeeze", "copy", "optimization_barrier")
SCALING = ("mul", "div")
ADDING = ("add", "add_any")  # but not "sub": distances to the rows of a matrix could be a product
# Other operations on single elements. With these a weight shifts or bounds activations, but does not multiply them.
ELEMENTWISE = (
    *(*ADDING, "sub", "max", "min", "select_n", "clamp", "pow", "rem", "atan2", "and", "or", "xor"),
    *("eq", "ne", "lt", "le", "gt", "ge", "abs", "neg", "sign", "exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh"),
    *("sqrt", "rsqrt", "square", "integer_pow", "erf", "floor", "ceil", "round"),
)
JOINING = ("concatenate", "dynamic_update_slice")


def outside_layers(traced: Graph, variables: Mapping[int, tuple[int, ...]], kernels: Collection[int]) -> list[int]:
    """The numbers of variables with which the network multiplies and adds activations, apart from the kernels of layers.

    A variable that is added elementwise, such as a bias, or that scales single elements, is not among them. A matrix whose
    slices scale activations is, because a convolution can be written as a sum of shifted images, each times a slice of the
    kernel. The images are the last input of `traced`.

    variables: number of a variable in `traced` -> its shape.
    """
    activations = traced.descendants(traced.inputs[-1:])
    above = traced.upstream(variables)
    whole = set(variables)  # values that hold a variable's numbers, or numbers computed of these one by one
    found: set[int] = set()
    for operation in traced.operations:
        weights = {value for value in operation.reads if value is not None and value in above and value not in activations}
        if not any(value in activations for value in operation.reads):
            if operation.name in (*SAME_NUMBERS, *SCALING, *ELEMENTWISE) and whole >= weights:
                whole.update(operation.makes)
            continue
        read = frozenset().union(*(above[value] for value in weights))
        if operation.name in PRODUCTS:
            found |= read
        elif not whole >= weights:
            if operation.name not in ADDING or not _is_elementwise(traced, operation, activations):
                found |= {each for each in read if _is_matrix(variables[each])}
        elif not _is_elementwise(traced, operation, activations) and any(
            _is_matrix(shape) for value, shape in _operands(traced, operation) if value in weights
        ):
            found |= read
    return [number for number in variables if number in found and number not in kernels]


def has_constant_factors(traced: Graph, variables: Collection[int]) -> bool:
    """Whether a product multiplies activations with constant arrays. variables: the numbers of the network's variables."""
    activations = traced.descendants(traced.inputs[-1:])
    above = traced.upstream([*variables, *traced.constants])
    constants = frozenset(traced.constants)

    def is_constant(value: int | None) -> bool:
        return value in above and above[value] <= constants and value not in activations

    products = (operation.reads for operation in traced.operations if operation.name in PRODUCTS)
    return any(any(value in activations for value in reads) and any(map(is_constant, reads)) for reads in products)


def has_uniform_factors(traced: Graph) -> bool:
    """Whether a matrix product multiplies activations with an array of equal numbers, such as `jnp.ones((12, 2))`."""
    activations = traced.descendants(traced.inputs[-1:])
    uniform: set[int] = set()  # arrays of equal numbers
    for operation in traced.operations:
        pairs = list(zip(operation.reads, operation.shapes))
        if operation.name == "dot_general":
            equal = [value for value, shape in pairs if value in uniform and math.prod(shape) > 1]
            if equal and activations.intersection(operation.reads):
                return True
        elif operation.name in (*SAME_NUMBERS, *SCALING, *ELEMENTWISE) and all(
            value is None or value in uniform or math.prod(shape) == 1 for value, shape in pairs
        ):
            uniform.update(operation.makes)
    return False


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether it has more than the axis of channels, which is the last one."""
    return math.prod(shape[:-1]) > 1


def _is_elementwise(traced: Graph, operation: Operation, activations: set[int]) -> bool:
    """Whether an operation of activations and whole variables is no part of a product.

    A product can be written in parts: `(x[:, :, None] * w).sum(1)` is `x @ w`. Distances to the rows of a matrix repeat the
    activations.
    """
    if operation.name in SCALING:
        return not any(each.name == "reduce_sum" for each in _readers(traced, operation))
    if operation.name in JOINING:
        return True
    if operation.name not in ELEMENTWISE:
        return False
    size = max(math.prod(shape) for value, shape in _operands(traced, operation) if value in activations)
    return math.prod(np.broadcast_shapes(*operation.shapes)) == size


def _operands(traced: Graph, operation: Operation) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The values that an operation reads, each with its shape before its numbers were repeated."""
    for value, shape in zip(operation.reads, operation.shapes):
        if value is not None:
            maker = traced.maker.get(value)
            before = maker.shapes[0] if maker is not None and maker.name == "broadcast_in_dim" else shape
            yield value, before if math.prod(before) < math.prod(shape) else shape


def _readers(traced: Graph, operation: Operation) -> Iterator[Operation]:
    """The operations that read the result of one, also after its numbers were put into another shape."""
    same = set(operation.makes)
    for each in traced.operations:
        if same.intersection(each.reads):
            yield each
            if each.name in SAME_NUMBERS:
                same.update(each.makes)
