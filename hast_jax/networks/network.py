"""A Linen module as teacher or student, unchanged: its calls are intercepted where values are quantized or recorded.

The kernels of a student are fake-quantized before the call, as a pure function of `params`. Its activations are quantized where
layers consume them: `flax.linen.intercept_methods` sees each call of a layer. In full precision nothing is changed, and the
logits are those of the module's own `apply`.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from hast_jax.errors import InputError
from hast_jax.method import learned, quantizer
from hast_jax.method.losses import BatchNormTap
from hast_jax.networks import structure as structure_lib
from hast_jax.networks.fast_layers import fast_convolution, is_plain_convolution
from hast_jax.networks.layers import Activation
from hast_jax.networks.rules import Rules, bits_of, compiled
from hast_jax.networks.sites import Site, check_rules, sites
from hast_jax.networks.structure import COLLECTION, Call, Path, Structure, argument, name_of

Array = jax.Array
Variables = Mapping[str, Any]

ENDS = ("low", "high")  # names of the two ends of a range, in the collection `ranges`


class Taps(NamedTuple):
    """What a network gives besides its logits.

    batch_norms: the input and the running moments of each call of a batch norm, in the order of execution.
    branches: the outputs that feature alignment compares [batch, height, width, c].
    activations: the quantized activations, by the path of their range.
    """

    batch_norms: tuple[BatchNormTap, ...]
    branches: tuple[Array, ...]
    activations: dict[Path, Array]


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
    def range_names(self) -> set[str]:
        """The names of all leaves of the collection `ranges`, such as "block/conv/input/low" or "block/conv/kernel/high"."""
        names = {site.name for site in self.sites.values()}
        if self.learned_ranges:
            names |= {layer.kernel for layer in self.kernels}
        return {"/".join((*name, end)) for name in names for end in ENDS}


def create(
    module: nn.Module,
    image: tuple[int, ...],
    *,
    call: Mapping[str, Any] | None = None,
    branches: str = "",
    rules: Rules | None = None,
    **settings: Any,
) -> Network:
    """`module` as a `Network`, for normalised images [batch, *image]: a student if `rules` are given, else a teacher.

    call: keyword arguments of the module's call; by default those for inference (`structure.inference_arguments`).
    branches: a regular expression over whole names in the paths of batch norms. If it is empty, the module's own attribute
    `branches` is used. Without that attribute, branches are found in the structure. settings: other fields of `Network`.

    Raises UserError, with the reason, if the module cannot be quantized.
    """
    call = structure_lib.inference_arguments(module) if call is None and isinstance(module, nn.Module) else call or {}
    structure = structure_lib.inspect(module, image, call)
    aligned = _branches(module, structure, branches)
    if rules is None:
        return Network(module, structure, call, aligned, **settings)
    check_rules(module, structure, rules)
    bits = {layer: bits_of(rules, layer.path)[0] for layer in structure.layers}
    kernels = {layer: weights for layer, weights in bits.items() if weights is not None}
    return Network(module, structure, call, aligned, kernels, sites(structure, rules), **settings)


def apply(network: Network, variables: Variables, images: Array) -> tuple[Array, Taps]:
    """Logits [batch, classes] and taps of normalised images [batch, height, width, channels]; nothing is updated.

    variables: the module's, and for a student also `ranges`. Logits, inputs of batch norms and branches are float32 at least,
    even if the module computes in less. Narrower types would lose the small differences that losses measure.
    """
    logits, left = _call(network, variables, images, observing=False)

    def moment(call, name):
        return _below(variables["batch_stats"], call.path)[name]

    norms = tuple(
        BatchNormTap(_wide(_left(left, c, "input")), moment(c, "mean"), moment(c, "var")) for c in network.structure.norms
    )
    activations = {site.name: _quantized(left, call, "quantized") for call, site in network.sites.items()}
    branches = tuple(_wide(_left(left, call, "output")) for call in network.branches)
    return _wide(logits), Taps(norms, branches, activations)


def observe(network: Network, variables: Variables, ranges: Variables, images: Array) -> Variables:
    """The `ranges` after one more batch of images [batch, height, width, channels]; `ranges` is empty before the first.

    The range of each batch enters a running average, which the first batch sets. If ranges are learned, the result also has the
    ranges of the kernels.
    """
    ranges = ranges or kernel_ranges(network, variables["params"])
    if not network.sites:
        return ranges
    _, left = _call(network, {**variables, "ranges": ranges}, images, observing=True)
    first = {site.name: call for call, site in reversed(list(network.sites.items()))}
    limits = {name: _quantized(left, call, "range") for name, call in first.items()}
    return unflatten_dict({**flatten_dict(ranges), **flatten_dict(_ranges(limits))})


def kernel_ranges(network: Network, params: Variables) -> Variables:
    """The `ranges` of the kernels from which learning starts; {} if ranges are not learned."""
    if not network.learned_ranges:
        return {}
    flat, limits = flatten_dict(params), {}
    for layer, bits in network.kernels.items():
        limits[layer.kernel] = learned.weight_range(_wide(flat[layer.kernel]), bits, layer.axes, network.kernel_range_rule)
    return _ranges(limits)


def proper_ranges(ranges: Variables) -> Variables:
    """`ranges`, each widened to hold zero (`learned.proper`)."""
    flat = flatten_dict(ranges)
    names = dict.fromkeys(path[:-1] for path in flat)
    return _ranges({name: learned.proper(flat[*name, "low"], flat[*name, "high"]) for name in names})


def settled(network: Network, params: Variables, ranges: Variables) -> tuple[Variables, Variables]:
    """`params` and `ranges` of the same student, with each quantized kernel and the ends of each range moved onto their grids.

    Learning leaves some weights almost halfway between two integers. One program would round such a weight up, another one
    down. Once a student is settled, each program finds the same integers. If ranges are not learned, nothing changes.
    """
    if not network.learned_ranges:
        return params, ranges
    flat, limits = dict(flatten_dict(params)), {}
    ends = flatten_dict(ranges)
    bits_of_range = {layer.kernel: bits for layer, bits in network.kernels.items()}
    bits_of_range |= {site.name: site.bits for site in network.sites.values()}
    for name, bits in bits_of_range.items():
        low, high = (ends[*name, end] for end in ENDS)
        step, z = learned.grid(low, high, bits)
        limits[name] = z * step, (z + 2**bits - 1) * step
        if name in flat:
            integers = learned.integers(_wide(flat[name]), low, high, bits, learned.LARGEST_INTEGER)
            flat[name] = (integers * step).astype(flat[name].dtype)
    return unflatten_dict(flat), _ranges(limits)


def quantized_params(network: Network, params: Variables, ranges: Variables) -> Variables:
    """`params`, in which each kernel that has bits is fake-quantized."""
    flat, limits = flatten_dict(params), flatten_dict(ranges)
    for layer, bits in network.kernels.items():
        kernel = flat[layer.kernel]
        if network.learned_ranges:
            low, high = (limits[*layer.kernel, end] for end in ENDS)
            flat[layer.kernel] = learned.fake_quantize_weight(_wide(kernel), low, high, bits).astype(kernel.dtype)
        else:
            flat[layer.kernel] = quantizer.fake_quantize_weight(kernel, bits, layer.axes)
    return unflatten_dict(flat)


def _ranges(limits: Mapping[Path, tuple[Array, Array]]) -> Variables:
    return unflatten_dict({(*name, end): limits[name][i] for name in limits for i, end in enumerate(ENDS)})


def _call(network: Network, variables: Variables, images: Array, observing: bool) -> tuple[Array, Any]:
    ranges = variables.get("ranges", {})
    interceptor = _Interceptor(network, flatten_dict(ranges), observing)
    given = {name: value for name, value in variables.items() if name != "ranges"}
    if network.kernels:
        given["params"] = quantized_params(network, given["params"], ranges)
    with network_arithmetic(network), nn.intercept_methods(interceptor):
        output, state = network.module.apply(given, images, mutable=structure_lib.mutable(), **network.call)
    return structure_lib.logits_of(output), state.get(COLLECTION, {})


def network_arithmetic(network: Network) -> contextlib.AbstractContextManager[None]:
    """A context with the precision of products. A CPU always computes in float32, but is slower if told to do so."""
    if network.arithmetic == "float32" and jax.default_backend() == "cpu":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(network.arithmetic)


class _Interceptor:
    """Quantizes and records values at the calls of layers, batch norms and marks, in one `apply`."""

    def __init__(self, network: Network, ranges: Mapping[Path, Array], observing: bool):
        self._network, self._ranges, self._observing = network, ranges, observing
        self._fast = network.fast_convolution and jax.default_backend() == "cpu"
        self._calls = Counter(call.path for call in (*network.structure.norms, *network.structure.marks))
        self._calls += Counter(each.call.path for each in network.structure.inputs)
        self._counts: Counter[Path] = Counter()

    def __call__(self, function: Any, arguments: Any, named: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or module.path not in self._calls:
            return function(*arguments, **named)
        # A lifted transformation may trace all calls of a module again, so the numbers start again at 0.
        call = Call(module.path, self._counts[module.path] % self._calls[module.path])
        self._counts[module.path] += 1
        if isinstance(module, nn.BatchNorm):
            module.sow(COLLECTION, "input", argument(arguments, named)[0])
            y = function(*arguments, **named)
            module.sow(COLLECTION, "output", y)
            return y
        site = self._network.sites.get(call)
        if isinstance(module, Activation):
            y = function(*arguments, **named)
            return y if site is None else self._quantized(module, y, site, call.number)
        x, replace = argument(arguments, named)
        if site is not None:
            x = self._quantized(module, x, site, call.number)
            arguments, named = replace(x)
        if self._fast and is_plain_convolution(module, x):
            return fast_convolution(module, x)
        return function(*arguments, **named)

    def _quantized(self, module: nn.Module, x: Array, site: Site, number: int) -> Array:
        low, high = (self._ranges.get((*site.name, end)) for end in ENDS)
        wide = _wide(x)  # bfloat16 is too coarse for a running average of ranges
        if self._observing:
            low, high = quantizer.running_range((low, high), self._network.range_rule(wide, site.bits))
            if self._network.learned_ranges:
                low, high = learned.proper(low, high)
        if low is None or high is None:
            raise InputError(f"the activations {'/'.join(site.name)} have no range yet: calibrate first.")
        if self._network.quantize_activation is not None:
            y = self._network.quantize_activation(wide, low, high, site)
        elif self._network.learned_ranges:
            y = learned.fake_quantize_activation(wide, low, high, site.bits)
        else:
            y = quantizer.fake_quantize_activation(wide, low, high, site.bits, self._network.straight_through)
        y = y.astype(x.dtype)
        # The name has the call's number, because only some calls of a module may be quantized.
        module.sow(COLLECTION, f"range_{number}", (low, high))
        module.sow(COLLECTION, f"quantized_{number}", y)
        return y


def _wide(x: Array) -> Array:
    """`x` in float32 or a wider type."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _left(left: Any, call: Call, name: str) -> Any:
    return _below(left, call.path)[name][call.number]


def _quantized(left: Any, call: Call, name: str) -> Any:
    return _below(left, call.path)[f"{name}_{call.number}"][0]


def _below(tree: Any, path: Path) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _branches(module: nn.Module, structure: Structure, pattern: str) -> tuple[Call, ...]:
    declared = getattr(module, "branches", "")  # in a user's network the attribute may be anything
    pattern = pattern or (declared if isinstance(declared, str) else "")
    if not pattern:
        return structure.branches
    found = tuple(call for call in structure.norms if compiled(pattern).search("/".join(call.path)))
    if not found:
        names = ", ".join("/".join(call.path) for call in structure.norms[:8])
        raise InputError(f"no batch norm of {name_of(module)} has a path that matches {pattern!r}; there are: {names}.")
    return found
