"""What a report says about a student: its cost, how its values lie on their grids, and which layers cost accuracy.

Nothing here needs real images.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hast_jax import networks
from hast_jax.method import learned, losses, quantizer
from hast_jax.networks import Network
from hast_jax.networks.linear import LINEAR
from hast_jax.networks.marks import activation_grid
from hast_jax.networks.network import ENDS
from hast_jax.networks.rules import FULL_PRECISION
from hast_jax.networks.sites import Site
from hast_jax.networks.structure import Call, mutable

Array = jax.Array
Variables = Mapping[str, Any]

BINS_OF_A_STEP, MOST_BINS = 5, 120  # of a histogram, but a step has at least one bin


class Cost(NamedTuple):
    """The cost of one layer.

    parameters: of its kernel. products: multiplications for one image. weights, activations: bits of its weights and its input;
    the most, if the inputs of several calls differ. bit_operations: multiplications times the bits of both factors, as qonnx
    counts them.
    """

    name: str
    parameters: int
    products: int
    weights: int
    activations: int
    bit_operations: int


class Histogram(NamedTuple):
    """Values counted along their grid. edges: in steps, [bins + 1]. counts: [bins]. lowest, highest: integers of the grid.

    used: share of the grid's integers that occur; for a kernel, the average over its channels. cut: share of the values that
    lie beyond the ends of the grid.
    """

    edges: np.ndarray
    counts: np.ndarray
    lowest: float
    highest: float
    used: float
    cut: float


class Sensitivity(NamedTuple):
    """How much one part of a student costs, as two KL divergences from the teacher, in nats.

    name: of a layer, or of a range of activations. kind: "weights" or "activations". alone: divergence of the teacher with only
    this part quantized. without: divergence of the student with only this part in full precision; None for weights whose values
    in full precision are gone, because learning moved them onto their grid (`networks.settled`).
    """

    name: str
    kind: str
    bits: int
    alone: float
    without: float | None


def costs(network: Network, variables: Variables, image: tuple[int, ...]) -> list[Cost]:
    """The cost of each layer, in the order of execution. variables: of the module. image: height, width, channels."""
    layers = {layer.path: layer for layer in network.structure.layers}
    inputs = {each.call: each for each in network.structure.inputs}
    counts: Counter[Any] = Counter()
    found: dict[str, Cost] = {}

    def count(function: Any, arguments: Any, named: Any, context: Any) -> Any:
        module, y = context.module, function(*arguments, **named)
        if context.method_name != "__call__" or not (module.path in layers and isinstance(module, LINEAR)):
            return y
        call = Call(module.path, counts[module.path])
        counts[module.path] += 1
        mark = inputs[call].mark
        site = network.sites.get(call) or (network.sites.get(mark) if mark else None)
        bits = site.bits if site else FULL_PRECISION
        layer, name = layers[module.path], "/".join(module.path)
        shape = flat[layer.kernel].shape
        products = y.size * math.prod(shape[axis] for axis in layer.axes)
        weights = network.kernels.get(layer, FULL_PRECISION)
        before = found.get(name, Cost(name, math.prod(shape), 0, weights, bits, 0))  # a layer may be called several times
        found[name] = before._replace(
            products=before.products + products,
            activations=max(before.activations, bits),
            bit_operations=before.bit_operations + products * weights * bits,
        )
        return y

    given = {name: tree for name, tree in variables.items() if name != "ranges"}
    flat = flatten_dict(given["params"])
    images = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    with nn.intercept_methods(count):
        jax.eval_shape(lambda v, x: network.module.apply(v, x, mutable=mutable(), **network.call), given, images)
    return list(found.values())


def histograms(network: Network, variables: Variables, images: np.ndarray) -> dict[tuple[str, str], Histogram]:
    """A histogram of each quantized kernel and activation, by (name, "weights" or "activations").

    variables: the student's. images: normalised.
    """
    found = {}
    flat = flatten_dict(variables["params"], sep="/")
    for path, codes in networks.kernel_codes(network, variables["params"], variables["ranges"]).items():
        integers, channel = codes.integers, next(a for a in range(codes["codes"].ndim) if a not in codes["axes"])
        lowest = codes.spread("zero_point") - 2 ** (codes["bits"] - 1)
        # Each channel has a grid of its own: integers are counted from its lowest.
        values = np.asarray(flat[path], np.float64) / codes.spread("step") - lowest
        channels = np.moveaxis(integers - lowest, channel, 0).reshape(integers.shape[channel], -1)
        used = np.mean([len(np.unique(each)) for each in channels]) / 2 ** codes["bits"]
        found[path.removesuffix("/kernel"), "weights"] = _histogram(values, 0, 2 ** codes["bits"] - 1, float(used))
    for name, (values, step, lowest, bits) in _activations(network, variables, images).items():
        steps = np.asarray(values, np.float64) / step
        integers = np.clip(np.rint(steps), lowest, lowest + 2**bits - 1)
        found[name, "activations"] = _histogram(steps, lowest, lowest + 2**bits - 1, len(np.unique(integers)) / 2**bits)
    return found


def sensitivities(
    teacher: Network, teacher_variables: Variables, student: Network, student_variables: Variables, images: np.ndarray
) -> list[Sensitivity]:
    """The cost of each part, the largest `alone` first. images: normalised [n, height, width, channels], one batch."""
    plain, batch = dataclasses.replace(student, kernels={}), jnp.asarray(images)

    @jax.jit
    def divergence(variables: Variables, ranges: Variables, switched: Mapping[str, Array], target: Array) -> Array:
        def quantize(x: Array, low: Array, high: Array, site: Site) -> Array:
            return jnp.where(switched["/".join(site.name)], fake_quantized(student, x, low, high, site.bits), x)

        network = dataclasses.replace(plain, quantize_activation=quantize)
        return losses.distillation(target, networks.logits(network, {**variables, "ranges": ranges}, batch), 1.0, 1.0)

    target = jax.jit(partial(networks.logits, teacher))(teacher_variables, batch)
    ranges, params = student_variables["ranges"], teacher_variables["params"]
    names = {"/".join(site.name): site.bits for site in student.sites.values()}

    def switches(on, *other):
        return {name: jnp.asarray(on != (name in other)) for name in names}

    rest = {name: tree for name, tree in teacher_variables.items() if name not in ("params", "ranges")}
    start = flatten_dict(params)
    rounded = flatten_dict(networks.quantized_params(student, params, networks.kernel_ranges(student, params)))
    trained = flatten_dict(student_variables["params"])
    codes = flatten_dict(networks.quantized_params(student, student_variables["params"], ranges))

    def measure(params, on):
        return float(divergence({**rest, "params": unflatten_dict(params)}, ranges, on, target))

    found = []
    for layer, bits in student.kernels.items():
        alone = measure({**start, layer.kernel: rounded[layer.kernel]}, switches(False))
        settled = jnp.allclose(codes[layer.kernel], trained[layer.kernel], rtol=1e-5, atol=0)
        without = None if settled else measure({**codes, layer.kernel: trained[layer.kernel]}, switches(True))
        found.append(Sensitivity("/".join(layer.path), "weights", bits, alone, without))
    for name, bits in names.items():
        alone, without = measure(start, switches(False, name)), measure(codes, switches(True, name))
        found.append(Sensitivity(name, "activations", bits, alone, without))
    return sorted(found, key=lambda each: -each.alone)


def suggested_bits(found: Sequence[Sensitivity], costs: Sequence[Cost], average: float) -> dict[str, int]:
    """Layer -> bits of its weights: those that should lose least, with at most `average` bits per weight over all.

    This is an estimate. One more bit is assumed to divide the divergence of a layer by four, because it divides the squared
    error of rounding by four. Each bit goes to the layer where it lowers the sum of the divergences most per bit of memory.
    """
    sizes = {each.name: each.parameters for each in costs}
    loss = {each.name: each.alone * 4.0**each.bits for each in found if each.kind == "weights" and each.name in sizes}
    bits = dict.fromkeys(loss, quantizer.MIN_BITS)
    left = average * sum(sizes[name] for name in loss) - sum(sizes[name] * bits[name] for name in loss)

    def gain(name):
        return loss[name] * (4.0 ** -bits[name] - 4.0 ** -(bits[name] + 1)) / sizes[name]

    while fitting := [name for name in loss if sizes[name] <= left and bits[name] < quantizer.MAX_BITS]:
        best = max(fitting, key=gain)
        bits[best] += 1
        left -= sizes[best]
    return bits


def fake_quantized(network: Network, x: Array, low: Array, high: Array, bits: int) -> Array:
    """Activations `x` after the student's fake quantization to the range from `low` to `high`."""
    if network.learned_ranges:
        return learned.fake_quantize_activation(x, low, high, bits)
    return quantizer.fake_quantize(x, low, high, bits)


def _activations(network: Network, variables: Variables, images: np.ndarray) -> dict[str, tuple[Any, float, int, int]]:
    """Name -> the activation before it is quantized, the step and the lowest integer of its grid, and its bits."""

    @jax.jit
    def values(variables: Variables, images: Array) -> dict[str, Array]:
        seen = {}

        def keep(x: Array, low: Array, high: Array, site: Site) -> Array:
            seen["/".join(site.name)] = x
            return fake_quantized(network, x, low, high, site.bits)

        networks.apply(dataclasses.replace(network, quantize_activation=keep), variables, images)
        return seen

    ranges, found = flatten_dict(variables["ranges"]), values(variables, jnp.asarray(images))
    grids = {}
    for site in network.sites.values():
        low, high = (ranges[*site.name, end] for end in ENDS)
        step, lowest = activation_grid(network, low, high, site.bits)
        name = "/".join(site.name)
        grids[name] = (np.asarray(found[name]), step, lowest, site.bits)
    return grids


def _histogram(steps: np.ndarray, lowest: float, highest: float, used: float) -> Histogram:
    """Count values, given in steps of their grid, from 1.5 steps below the grid to 1.5 steps above it.

    Values further away are counted in the first or the last bin.
    """
    first, last = lowest - 1.5, highest + 1.5
    odd = [n for n in range(1, BINS_OF_A_STEP + 1, 2) if n * (last - first) <= MOST_BINS]
    bins = round((last - first) * max(odd, default=1))  # an odd number for each step: integers lie in the middle of a bin
    counts, edges = np.histogram(np.clip(steps, first, last), bins, (first, last))
    cut = float(np.mean((steps < lowest - 0.5) | (steps > highest + 0.5)))
    return Histogram(edges, counts, lowest, highest, used, cut)
