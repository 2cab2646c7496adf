"""Where the residual branches of a network end. Feature alignment compares the outputs at these ends."""

from collections.abc import Mapping
from typing import NamedTuple

from hast_jax.networks.graph import Graph, Operation

Path = tuple[str, ...]


class Call(NamedTuple):
    """One call of the module at `path`. number: 0 for the module's first call."""

    path: Path
    number: int


def branches(
    traced: Graph,
    norms: Mapping[int, Call],
    layer_outputs: set[int],
    layer_inputs: set[int],
    shapes: Mapping[Call, tuple[int, ...]],
) -> tuple[Call, ...]:
    """The last batch norm of each residual branch, and each batch norm whose output a layer reads directly.

    A branch ends at an addition of two feature maps. The operand with more batch norms before it is the branch, the other one
    is the shortcut. In a network without such additions, every batch norm is returned.

    norms: number of a batch norm's output in `traced` -> its call. layer_outputs, layer_inputs: numbers of values in `traced`.
    shapes: of the outputs of batch norms.
    """
    images = traced.descendants(traced.inputs[-1:])
    depth = {value: len(above) for value, above in traced.upstream(norms).items()}
    additions = [o for o in traced.operations if o.name in ("add", "add_any") and _joins(o, images)]
    stops = layer_outputs | {value for addition in additions for value in addition.makes}
    found: set[int] = set()
    for addition in additions:
        ends = [end for value in addition.reads for end in _norms_before(traced, value, norms, stops)]
        if ends:
            found.add(max(ends, key=lambda end: depth[end]))
    if found:
        found |= layer_inputs & norms.keys()
    else:
        found = set(norms)
    return tuple(call for value, call in norms.items() if value in found and len(shapes[call]) > 1)


def _joins(addition: Operation, images: set[int]) -> bool:
    """Whether `addition` adds two feature maps."""
    same = addition.shapes[0] == addition.shapes[1] and len(addition.shapes[0]) > 1
    return same and all(value in images for value in addition.reads)


def _norms_before(traced: Graph, value: int | None, norms: Mapping[int, Call], stops: set[int]) -> list[int]:
    """The batch norms that reach a value without passing a layer or another addition of feature maps."""
    found, waiting, known = [], [value], set()
    while waiting:
        each = waiting.pop()
        if each is None or each in known:
            continue
        known.add(each)
        if each in norms:
            found.append(each)
        elif each not in stops and each in traced.maker:
            waiting += traced.maker[each].reads
    return found
