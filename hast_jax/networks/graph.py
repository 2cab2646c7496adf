"""Which values of a traced network depend on which others. This tells what layers read and where branches end."""

import re
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jax_core

PRODUCTS = ("dot_general", "conv_general_dilated")  # operations that multiply and add
# Operations whose results are elements of their first operand, in another order or number.
SELECTIONS = ("reduce_window_max", "reduce_max", "reshape", "transpose", "squeeze", "expand_dims", "slice", "rev", "copy")
INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters that hold the function which a primitive calls


class Operation(NamedTuple):
    """One primitive with the numbers of the values that it reads and makes; None stands for a constant."""

    name: str
    reads: tuple[int | None, ...]
    makes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the values that it reads


class Graph:
    """A traced function as a list of operations, in order. The functions that it calls are inlined.

    inputs, outputs: the numbers of its arguments and results, in the order of their leaves. constants: the numbers of arrays
    that it uses without being given them. checksum: of the traced program. It depends on the version of JAX too, because
    versions may trace the same function to other programs.
    """

    def __init__(self, traced: Any):
        """traced: the closed jaxpr of a function, as from `jax.make_jaxpr`."""
        self.operations: list[Operation] = []
        self.checksum = _checksum(traced)
        self._values = 0
        numbers: dict[Any, int] = {}
        for variable in (*traced.jaxpr.constvars, *traced.jaxpr.invars):
            numbers[variable] = self._new()
        self.constants = [numbers[variable] for variable in traced.jaxpr.constvars]
        self.inputs = [numbers[variable] for variable in traced.jaxpr.invars]
        self._write_out(traced.jaxpr, numbers)
        self.outputs = [self._number(variable, numbers) for variable in traced.jaxpr.outvars]
        self.maker = {value: operation for operation in self.operations for value in operation.makes}

    def descendants(self, values: Iterable[int]) -> set[int]:
        """These values and all that depend on them."""
        found = set(values)
        for operation in self.operations:
            if any(value in found for value in operation.reads):
                found.update(operation.makes)
        return found

    def upstream(self, marked: Iterable[int]) -> dict[int, frozenset[int]]:
        """For each value, the marked values that it depends on, itself included. Values that depend on none are absent."""
        marked = set(marked)
        found: dict[int, frozenset[int]] = {
            value: frozenset([value]) for value in (*self.inputs, *self.constants) if value in marked
        }
        for operation in self.operations:
            above = frozenset().union(*(found.get(value, frozenset()) for value in operation.reads if value is not None))
            for value in operation.makes:
                all_above = above | {value} if value in marked else above
                if all_above:
                    found[value] = all_above
        return found

    def origin(self, value: int) -> int:
        """The value whose elements `value` holds, before all `SELECTIONS`, such as a maximum over windows."""
        while value in self.maker and self.maker[value].name in SELECTIONS:
            read = self.maker[value].reads[0]
            if read is None:
                break
            value = read
        return value

    def _new(self) -> int:
        self._values += 1
        return self._values

    def _number(self, variable: Any, numbers: dict[Any, int]) -> int | None:
        return None if isinstance(variable, jax_core.Literal) else numbers[variable]

    def _write_out(self, jaxpr: Any, numbers: dict[Any, int]) -> None:
        for equation in jaxpr.eqns:
            reads = [self._number(variable, numbers) for variable in equation.invars]
            inner = next((equation.params[name] for name in INNER if name in equation.params), None)
            inner = getattr(inner, "jaxpr", inner)
            if inner is not None and len(inner.invars) == len(reads) and equation.primitive.name != "scan":
                inside = {variable: self._new() for variable in inner.constvars}
                self.constants += inside.values()
                inside |= {v: self._new() if number is None else number for v, number in zip(inner.invars, reads)}
                self._write_out(inner, inside)
                for outer, variable in zip(equation.outvars, inner.outvars):
                    number = self._number(variable, inside)
                    numbers[outer] = self._new() if number is None else number
                continue
            makes = tuple(self._new() for _ in equation.outvars)
            numbers.update(zip(equation.outvars, makes))
            shapes = tuple(tuple(getattr(variable.aval, "shape", ())) for variable in equation.invars)
            self.operations.append(Operation(_name(equation), tuple(reads), makes, shapes))


def trace(function: Any, *arguments: Any) -> tuple[Graph, Any]:
    """The graph of `function(*arguments)`, and the function's result with the number of a value in place of each leaf."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    graph = Graph(traced)
    return graph, jax.tree.unflatten(jax.tree.structure(shapes), graph.outputs)


def _checksum(traced: Any) -> int:
    text = re.sub(r"0x[0-9a-f]+", "", str(traced))  # without addresses in memory
    total = zlib.crc32(text.encode())
    for each in traced.consts:
        is_key = jax.dtypes.issubdtype(each.dtype, jax.dtypes.prng_key)
        total = zlib.crc32(np.asarray(jax.random.key_data(each) if is_key else each).tobytes(), total)
    return total


def _name(equation: Any) -> str:
    """The name of a primitive. A dot_general that sums over no axis counts as "mul", because it multiplies single elements."""
    name = equation.primitive.name
    return "mul" if name == "dot_general" and not equation.params["dimension_numbers"][0][0] else name
