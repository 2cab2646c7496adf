"""A Linen module, unchanged, with what makes it a teacher or a student: where it is quantized, to how many bits, and how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from hast_jax.errors import InputError
from hast_jax.method import quantizer
from hast_jax.networks import from_nnx, inference
from hast_jax.networks import structure as structure_lib
from hast_jax.networks.rules import Rules, bits_of, compiled
from hast_jax.networks.sites import Site, check_rules, sites
from hast_jax.networks.structure import Call, Path, Structure, name_of

Array = jax.Array
Variables = Mapping[str, Any]

ENDS = ("low", "high")  # names of the two ends of a range, in the collection `ranges`


@dataclass(frozen=True, eq=False)
class Network:
    """A module with all that the stages need to know of it. A network without bits is in full precision: a teacher.

    call: keyword arguments of the module's calls. branches: calls of batch norms whose outputs are aligned. kernels: bits of
    each quantized kernel, by layer. sites: a `Site` for each call whose input (of a layer) or output (of an `Activation`) is
    quantized. range_rule: gives the range of a batch of activations.
    learned_ranges: whether ranges are learned. If they are, each kernel has a range in the collection `ranges`, and the
    gradient reaches all ranges. If not, the range of a kernel is its minimum and maximum. kernel_range_rule: gives the range of
    a kernel from which learning starts. straight_through: one of `quantizer.STRAIGHT_THROUGH`, used if ranges are not learned.
    quantize_activation: a function of (x, low, high, site) that replaces the fake quantization of activations. An export marks
    activations with it.
    arithmetic: precision of convolutions and matrix products, one of `conv.ARITHMETIC`. fast_convolution: use `networks.conv`
    on a CPU.
    """

    module: nn.Module
    structure: Structure
    call: Mapping[str, Any] = field(default_factory=dict)
    branches: tuple[Call, ...] = ()
    kernels: Mapping[structure_lib.Layer, int] = field(default_factory=dict)
    sites: Mapping[Call, Site] = field(default_factory=dict)
    range_rule: quantizer.RangeRule = quantizer.minmax_range
    learned_ranges: bool = False
    kernel_range_rule: quantizer.RangeRule = quantizer.minmax_range
    straight_through: str = "identity"
    quantize_activation: Callable[[Array, Array, Array, Site], Array] | None = None
    arithmetic: str = "float32"
    fast_convolution: bool = True

    @property
    def classes(self) -> int:
        """The number of logits."""
        return self.structure.classes

    @property
    def range_names(self) -> dict[str, Path]:
        """The paths of all leaves of the collection `ranges`, by their names: "block/conv/input/low", "block/conv/kernel/high".

        Do not split a name to get its path, because the name of a module may hold a "/".
        """
        names = {site.name for site in self.sites.values()}
        if self.learned_ranges:
            names |= {layer.kernel for layer in self.kernels}
        return {"/".join((*name, end)): (*name, end) for name in names for end in ENDS}


def create(
    module: nn.Module | nnx.Module,
    image: tuple[int, ...],
    *,
    call: Mapping[str, Any] | None = None,
    branches: str = "",
    rules: Rules | None = None,
    **settings: Any,
) -> Network:
    """`module` as a `Network`, for normalised images [batch, *image]: a student if `rules` are given, else a teacher.

    call: keyword arguments of the module's call, besides those for inference (`inference.arguments`).
    branches: a regular expression over whole names in the paths of batch norms. If it is empty, the module's own attribute
    `branches` is used. Without that attribute, branches are found in the structure. settings: other fields of `Network`.

    Raises UserError, with the reason, if the module cannot be quantized.
    """
    linen, _ = from_nnx.linen(module)
    call = inference.arguments(linen, call or {})
    structure = structure_lib.inspect(linen, image, call)
    aligned = _branches(linen, structure, branches)
    if rules is None:
        return Network(linen, structure, call, aligned, **settings)
    check_rules(linen, structure, rules)
    bits = {layer: bits_of(rules, layer.path)[0] for layer in structure.layers}
    kernels = {layer: weights for layer, weights in bits.items() if weights is not None}
    return Network(linen, structure, call, aligned, kernels, sites(structure, rules), **settings)


def _branches(module: nn.Module, structure: Structure, pattern: str) -> tuple[Call, ...]:
    declared = getattr(module, "branches", "")  # in a user's network the attribute may be anything
    own = not pattern and isinstance(declared, str)
    pattern = declared if own else pattern
    if not pattern:
        return structure.branches
    found = tuple(call for call in structure.norms if compiled(pattern).search("/".join(call.path)))
    if not found and own:
        return structure.branches
    if not found:
        names = ", ".join("/".join(call.path) for call in structure.norms[:8])
        raise InputError(f"no batch norm of {name_of(module)} has a path that matches {pattern!r}; there are: {names}.")
    return found
