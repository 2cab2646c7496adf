"""The collection `ranges` of a student: a low and a high end for each range, and what they make of the parameters."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from hast_jax.method import learned, quantizer
from hast_jax.networks.network import ENDS, Array, Network, Variables
from hast_jax.networks.structure import Path


def kernel_ranges(network: Network, params: Variables) -> Variables:
    """The `ranges` of the kernels from which learning starts; {} if ranges are not learned."""
    if not network.learned_ranges:
        return {}
    flat, limits = flatten_dict(params), {}
    for layer, bits in network.kernels.items():
        limits[layer.kernel] = learned.weight_range(widened(flat[layer.kernel]), bits, layer.axes, network.kernel_range_rule)
    return collection(limits)


def proper_ranges(ranges: Variables) -> Variables:
    """`ranges`, each widened to hold zero (`learned.proper`)."""
    flat = flatten_dict(ranges)
    names = dict.fromkeys(path[:-1] for path in flat)
    return collection({name: learned.proper(flat[*name, "low"], flat[*name, "high"]) for name in names})


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
            integers = learned.integers(widened(flat[name]), low, high, bits, learned.LARGEST_INTEGER)
            flat[name] = (integers * step).astype(flat[name].dtype)
    return unflatten_dict(flat), collection(limits)


def quantized_params(network: Network, params: Variables, ranges: Variables) -> Variables:
    """`params`, in which each kernel that has bits is fake-quantized."""
    flat, limits = flatten_dict(params), flatten_dict(ranges)
    for layer, bits in network.kernels.items():
        kernel = flat[layer.kernel]
        if network.learned_ranges:
            low, high = (limits[*layer.kernel, end] for end in ENDS)
            flat[layer.kernel] = learned.fake_quantize_weight(widened(kernel), low, high, bits).astype(kernel.dtype)
        else:
            flat[layer.kernel] = quantizer.fake_quantize_weight(kernel, bits, layer.axes)
    return unflatten_dict(flat)


def collection(limits: Mapping[Path, tuple[Array, Array]]) -> Variables:
    """The collection `ranges`. limits: path of each range -> (low, high)."""
    return unflatten_dict({(*name, end): limits[name][i] for name in limits for i, end in enumerate(ENDS)})


def widened(x: Array) -> Array:
    """`x` in float32 or a wider type."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
