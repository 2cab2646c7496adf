"""Quantization with ranges that are learned (LSQ, Esser et al. 2020; with an offset as in LSQ+, Bhalgat et al. 2020).

    s = (high - low) / (2^k - 1)      z = round(low / s)      n = round(clip(x / s, z, z + 2^k - 1))      x_hat = n s

This is the grid of `quantizer`, with n = q + Z and s = 1 / S. Here `x` is divided by the step, as in integer runtimes. The
gradients differ from those of `quantizer`. Rounding passes gradients unchanged; clipping does not:

    d x_hat / d x       1 inside the range, 0 outside
    d x_hat / d low     (x - x_hat) / (high - low)                   inside
                        1 - (x_hat - low) / (high - low)             outside
    d x_hat / d high    (x_hat - x) / (high - low)                   inside
                        (x_hat - low) / (high - low)                 outside

Every range holds zero, so zero is on the grid. The integers of a weight stay within -127 ... 127, so that an int8 with
zero point 0 holds them.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from hast_jax.method import quantizer

Array = jax.Array

LARGEST_INTEGER = 127  # of a weight, in magnitude
NARROWEST = 1e-8  # smallest width of a range, as in `quantizer`


def grid(low: Array, high: Array, bits: int) -> tuple[Array, Array]:
    """The step s, and z, the integer of the smallest value."""
    step = jnp.maximum(high - low, NARROWEST) / (2**bits - 1)
    return step, jnp.round(low / step)


def integers(x: Array, low: Array, high: Array, bits: int, largest: int | None = None) -> Array:
    """The integers n of `x`, in its dtype: from z to z + 2^bits - 1, and within -largest ... largest if `largest` is given."""
    step, z = grid(low, high, bits)
    return jnp.round(jnp.clip(x / step, *_ends(z, bits, largest)))


def _ends(z: Array, bits: int, largest: int | None) -> tuple[Array, Array]:
    lowest, highest = z, z + 2**bits - 1
    if largest is None:
        return lowest, highest
    return jnp.maximum(lowest, -largest), jnp.minimum(highest, largest)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def fake_quantize(x: Array, low: Array, high: Array, bits: int, largest: int | None = None) -> Array:
    """`x` moved onto the grid of [low, high], with the derivatives above. low, high: broadcast against `x`."""
    return integers(x, low, high, bits, largest) * grid(low, high, bits)[0]


@fake_quantize.defjvp
def _jvp(bits: int, largest: int | None, values: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    x, low, high = values
    y = fake_quantize(x, low, high, bits, largest)
    step, z = grid(low, high, bits)
    lowest, highest = _ends(z, bits, largest)
    position, width = x / step, jnp.maximum(high - low, NARROWEST)
    inside = (position >= lowest) & (position <= highest)
    # Beyond an end that `largest` cuts off, the integer is constant and only the step depends on the range.
    moves = jnp.where(position < lowest, lowest == z, highest == z + 2**bits - 1).astype(x.dtype)
    by_high = jnp.where(inside, y - x, y - moves * low) / width
    by_low = jnp.where(inside, 0.0, moves) - by_high
    dx, dlow, dhigh = tangents
    return y, jnp.where(inside, dx, 0.0) + by_low * dlow + by_high * dhigh


def scale_gradient(x: Array, factor: float) -> Array:
    """`x`, whose gradient is multiplied by `factor`."""

    @jax.custom_jvp
    def same(x: Array) -> Array:
        return x

    same.defjvp(lambda values, tangents: (same(*values), factor * tangents[0]))
    return same(x)


def fake_quantize_weight(kernel: Array, low: Array, high: Array, bits: int) -> Array:
    """`kernel` moved onto the grids of its output channels. low, high: of size one on the axes that a channel sums over.

    As in LSQ, the gradient of a range is scaled. If N values share the range, the factor is 1 / sqrt(N * 2^(bits-1)).
    """
    factor = 1 / math.sqrt(kernel.size / low.size * 2 ** (bits - 1))
    return fake_quantize(kernel, scale_gradient(low, factor), scale_gradient(high, factor), bits, LARGEST_INTEGER)


def fake_quantize_activation(x: Array, low: Array, high: Array, bits: int) -> Array:
    """Activations [batch, ...] moved onto the grid of one range. low, high: scalars.

    If `low` is zero, it gets no gradient, because there is no offset to learn after a ReLU. The gradient of a range is scaled.
    For N values in each image the factor is 1 / sqrt(N * (2^bits - 1)).
    """
    factor = 1 / math.sqrt(math.prod(x.shape[1:]) * (2**bits - 1))
    low = jnp.where(low == 0, 0.0, scale_gradient(low, factor))
    return fake_quantize(x, low, scale_gradient(high, factor), bits)


def proper(low: Array, high: Array) -> tuple[Array, Array]:
    """The range, widened to hold zero and to be at least `NARROWEST` wide."""
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    return low, jnp.maximum(high, low + NARROWEST)


def weight_range(kernel: Array, bits: int, axes: tuple[int, ...], rule: quantizer.RangeRule) -> tuple[Array, Array]:
    """The range (low, high) of each output channel from which learning starts. Both ends are of size one on `axes`.

    axes: those that one output channel sums over. rule: one of `quantizer.RANGE_RULES`. With eight bits the range is symmetric,
    because an int8 with zero point 0 has no integers left for an offset.
    """
    moved = jnp.moveaxis(kernel, axes, range(len(axes)))
    channels = moved.reshape(math.prod(moved.shape[: len(axes)]), -1)
    low, high = proper(*jax.vmap(lambda channel: rule(channel, bits), 1)(channels))
    if bits == quantizer.MAX_BITS:
        high = jnp.maximum(-low, high)
        low = -high
    shape = [1 if axis in axes else size for axis, size in enumerate(kernel.shape)]
    return low.reshape(shape), high.reshape(shape)
