"""Weights that multiply activations outside of all layers, such as a matrix that a network creates with `self.param`."""

import math
from collections.abc import Collection, Mapping

import numpy as np

from hast_jax.networks.graph import PRODUCTS, Graph, Operation

LOOPS = ("scan", "while", "cond")  # operations whose inner functions are not part of the graph


def outside_layers(traced: Graph, variables: Mapping[int, tuple[int, ...]], kernels: Collection[int]) -> list[int]:
    """The numbers of variables that products of activations read, apart from the kernels of layers.

    A product multiplies and adds. Added or multiplied elementwise, as a bias or a scale of each position, a variable is no
    matrix. The images are the last input of `traced`.

    variables: number of a variable in `traced` -> its shape.
    """
    activations = traced.descendants(traced.inputs[-1:])
    above = traced.upstream(variables)
    found: set[int] = set()
    for operation in traced.operations:
        if not any(value in activations for value in operation.reads):
            continue
        if operation.name in PRODUCTS:
            read = operation.reads[:2]
        elif operation.name in LOOPS or _is_product(traced, operation, activations):
            read = operation.reads
        else:
            continue
        weights = frozenset().union(
            *(above.get(value, frozenset()) for value in read if value is not None and value not in activations)
        )
        found |= {each for each in weights if operation.name in PRODUCTS or _is_matrix(variables[each])}
    return [number for number in variables if number in found and number not in kernels]


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and math.prod(shape[:-1]) > 1


def _is_product(traced: Graph, operation: Operation, activations: set[int]) -> bool:
    """Whether a multiplication repeats its activations, and a sum follows: (x[:, :, None] * w).sum(1) is x @ w."""
    if operation.name != "mul" or not any(
        each.name == "reduce_sum" and each.reads[0] == operation.makes[0] for each in traced.operations
    ):
        return False
    made = math.prod(np.broadcast_shapes(*operation.shapes))
    for value, shape in zip(operation.reads, operation.shapes):
        if value is not None and value in activations:
            maker = traced.maker.get(value)
            single = maker.shapes[0] if maker is not None and maker.name == "broadcast_in_dim" else shape
            return made > math.prod(single)
    return False
