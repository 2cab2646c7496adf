"""The forward pass of a teacher or student: a module's calls are intercepted where values are quantized or recorded.

The kernels of a student are fake-quantized before the call, as a pure function of `params`. Its activations are quantized where
layers consume them: `flax.linen.intercept_methods` sees each call of a layer. In full precision the logits are those of the
module's own `apply`, but for the rounding of fast_layers.py.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from hast_jax.errors import InputError
from hast_jax.method import learned, quantizer
from hast_jax.method.losses import BatchNormTap
from hast_jax.networks import structure as structure_lib
from hast_jax.networks.conv import ARITHMETIC
from hast_jax.networks.fast_layers import fast_convolution, is_plain_convolution
from hast_jax.networks.layers import Activation
from hast_jax.networks.network import ENDS, Array, Network, Variables
from hast_jax.networks.ranges import collection, kernel_ranges, quantized_params, widened
from hast_jax.networks.sites import Site
from hast_jax.networks.structure import COLLECTION, Call, Path, argument


class Taps(NamedTuple):
    """What a network gives besides its logits.

    batch_norms: the input and the running moments of each call of a batch norm, in the order of execution.
    branches: the outputs that feature alignment compares [batch, height, width, c].
    activations: the quantized activations, by the path of their range.
    """

    batch_norms: tuple[BatchNormTap, ...]
    branches: tuple[Array, ...]
    activations: dict[Path, Array]


def apply(network: Network, variables: Variables, images: Array) -> tuple[Array, Taps]:
    """Logits [batch, classes] and taps of normalised images [batch, height, width, channels]; nothing is updated.

    variables: the module's, and for a student also `ranges`. Logits, inputs of batch norms and branches are float32 at least,
    even if the module computes in less. Narrower types would lose the small differences that losses measure.
    """
    output, left = _call(network, variables, images, observing=False)

    def moment(call, name):
        return _below(variables["batch_stats"], call.path)[name]

    norms = tuple(
        BatchNormTap(widened(_left(left, c, "input")), moment(c, "mean"), moment(c, "var")) for c in network.structure.norms
    )
    activations = {site.name: _quantized(left, call, "quantized") for call, site in network.sites.items()}
    branches = tuple(widened(_left(left, call, "output")) for call in network.branches)
    return widened(output), Taps(norms, branches, activations)


def logits(network: Network, variables: Variables, images: Array) -> Array:
    """The logits that `apply` gives, without the taps."""
    return apply(network, variables, images)[0]


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
    return unflatten_dict({**flatten_dict(ranges), **flatten_dict(collection(limits))})


def _call(network: Network, variables: Variables, images: Array, observing: bool) -> tuple[Array, Any]:
    ranges = variables.get("ranges", {})
    interceptor = _Interceptor(network, flatten_dict(ranges), observing)
    given = {name: value for name, value in variables.items() if name != "ranges"}
    if network.kernels:
        given["params"] = quantized_params(network, given["params"], ranges)
    with _arithmetic(network), nn.intercept_methods(interceptor):
        output, state = network.module.apply(given, images, mutable=structure_lib.mutable(), **network.call)
    return structure_lib.logits_of(output), state.get(COLLECTION, {})


def _arithmetic(network: Network) -> contextlib.AbstractContextManager[None]:
    """A context with the precision of products. A CPU always computes in float32, but is slower if told to do so.

    A precision that the user has set for all of JAX has no effect: conv.py would round the operands on a CPU.
    """
    if network.arithmetic == "float32" and jax.default_backend() == "cpu":
        rounds = ARITHMETIC.get(jax.config.jax_default_matmul_precision) is not None  # type: ignore[attr-defined]
        return jax.default_matmul_precision(None) if rounds else contextlib.nullcontext()
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
        # A module that shares the scope of its layer (`nn.share_scope`) has the layer's path.
        watched = isinstance(module, structure_lib.WATCHED) and module.path in self._calls
        if context.method_name != "__call__" or not watched:
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
        wide = widened(x)  # bfloat16 is too coarse for a running average of ranges
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


def _left(left: Any, call: Call, name: str) -> Any:
    return _below(left, call.path)[name][call.number]


def _quantized(left: Any, call: Call, name: str) -> Any:
    return _below(left, call.path)[f"{name}_{call.number}"][0]


def _below(tree: Any, path: Path) -> Any:
    for part in path:
        tree = tree[part]
    return tree
