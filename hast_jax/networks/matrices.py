"""Weights that multiply and add activations outside of all layers, such as a matrix that a network creates itself."""

import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from hast_jax.networks.graph import PRODUCTS, Graph, Operation

SAME_NUMBERS = ("convert_element_type", "reshape", "transpose", "broadcast_in_dim", "squeeze", "copy", "optimization_barrier")
SCALING = ("mul", "div")
# Other operations on single elements. With these a weight shifts or bounds activations, but does not multiply them.
ELEMENTWISE = (
    *("add", "add_any", "sub", "max", "min", "select_n", "clamp", "pow", "rem", "atan2", "and", "or", "xor"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
)


def outside_layers(traced: Graph, variables: Mapping[int, tuple[int, ...]], kernels: Collection[int]) -> list[int]:
    """The numbers of variables with which the network multiplies and adds activations, apart from the kernels of layers.

    A variable that is added elementwise, such as a bias, or that scales single elements, is not among them. If in doubt, a
    matrix is. The images are the last input of `traced`.

    variables: number of a variable in `traced` -> its shape.
    """
    activations = traced.descendants(traced.inputs[-1:])
    above = traced.upstream(variables)
    whole = set(variables)  # values that hold a variable's numbers, or numbers computed of these one by one
    found: set[int] = set()
    for operation in traced.operations:
        weights = [value for value in operation.reads if value is not None and value in above and value not in activations]
        if not any(value in activations for value in operation.reads):
            if operation.name in (*SAME_NUMBERS, *SCALING, *ELEMENTWISE) and whole.issuperset(weights):
                whole.update(operation.makes)
            continue
        read = frozenset().union(*(above[value] for value in weights))
        if operation.name in PRODUCTS:
            found |= read
        elif not _is_elementwise(traced, operation, activations, whole.issuperset(weights)):
            found |= {each for each in read if _is_matrix(variables[each])}
    return [number for number in variables if number in found and number not in kernels]


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and math.prod(shape[:-1]) > 1


def _is_elementwise(traced: Graph, operation: Operation, activations: set[int], whole: bool) -> bool:
    """Whether an operation of activations and weights is no part of a product. whole: whether the weights are whole variables.

    A product can be written in parts: `(x[:, :, None] * w).sum(1)` is `x @ w`, and a convolution is a sum of shifted images,
    each times a slice of the kernel. Distances to the rows of a matrix repeat the activations.
    """
    if operation.name in SCALING:
        return whole and not any(each.name == "reduce_sum" for each in _readers(traced, operation))
    if operation.name not in ELEMENTWISE:
        return False
    size = max(math.prod(shape) for value, shape in zip(operation.reads, operation.shapes) if value in activations)
    return math.prod(np.broadcast_shapes(*operation.shapes)) == size


def _readers(traced: Graph, operation: Operation) -> Iterator[Operation]:
    """The operations that read the result of one, also after its numbers were put into another shape."""
    same = set(operation.makes)
    for each in traced.operations:
        if same.intersection(each.reads):
            yield each
            if each.name in SAME_NUMBERS:
                same.update(each.makes)
