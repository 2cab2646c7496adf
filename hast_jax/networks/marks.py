"""A network whose quantized activations are marked by a primitive. An export writes each mark in its own form.

The grid of a mark is constant: the integers from `lowest` to `lowest` + 2^bits - 1, times `step`. `name` is the path of the
range.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive

from hast_jax.method import learned, quantizer
from hast_jax.networks.network import Network
from hast_jax.networks.sites import Site

MARK = "quantize_activation"

_mark = Primitive(MARK)
_mark.def_abstract_eval(lambda x, **_: x)


def marked(network: Network) -> Network:
    """`network`, but it marks its activations instead of quantizing them and uses its kernels as they are given."""

    def mark(x: jax.Array, low: jax.Array, high: jax.Array, site: Site) -> Any:
        step, lowest = activation_grid(network, low, high, site.bits)
        return _mark.bind(x, step=step, lowest=lowest, bits=site.bits, name="/".join(site.name))

    return dataclasses.replace(network, kernels={}, fast_convolution=False, quantize_activation=mark)


def activation_grid(network: Network, low: jax.Array, high: jax.Array, bits: int) -> tuple[float, int]:
    """The step (exact in float32) and the smallest integer of a range's grid. The range must be a constant of the trace."""
    with jax.ensure_compile_time_eval():
        if network.learned_ranges:
            step, lowest = learned.grid(low, high, bits)
            return float(step), int(lowest)
        scale, zero_point = quantizer.scale_and_zero_point(low, high, bits)
        return float(np.float32(1) / np.float32(scale)), int(zero_point) - 2 ** (bits - 1)
