"""Uniform asymmetric quantization with k bits, as pure functions (HAST, section 3.1, and the authors' code).

    S = (2^k - 1) / max(high - low, 1e-8)          Z = round(S * low) + 2^(k-1)
    q = clip(round(S * x - Z), -2^(k-1), 2^(k-1) - 1)          x_hat = (q + Z) / S

Rounding is half to even. Because Z is itself rounded, the grid may be shifted by up to half a step:
three bits on [-1, 1] give the levels -4/3.5 ... 3/3.5.

Invariants: `codes` are whole numbers in [-2^(k-1), 2^(k-1) - 1]. `dequantize(codes)` has at most 2^k values. The derivative of
`fake_quantize` with respect to `x` is one for each `x`, even outside the range (straight-through estimator). Its derivatives
with respect to `low` and `high` are zero.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array
RangeRule = Callable[[Array, int], tuple[Array, Array]]

RANGE_DECAY = 0.9
MIN_BITS, MAX_BITS = 2, 8


def scale_and_zero_point(low: Array, high: Array, bits: int) -> tuple[Array, Array]:
    """Scale S and zero point Z of the range [low, high]; both have the broadcast shape of `low` and `high`."""
    scale = (2**bits - 1) / jnp.maximum(high - low, 1e-8)
    return scale, jnp.round(scale * low) + 2 ** (bits - 1)


def quantize(x: Array, scale: Array, zero_point: Array, bits: int) -> Array:
    """Codes q of `x`: whole numbers in [-2^(bits-1), 2^(bits-1) - 1], in the floating dtype of `x`."""
    return jnp.clip(jnp.round(scale * x - zero_point), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def dequantize(codes: Array, scale: Array, zero_point: Array) -> Array:
    """Real values of codes: (q + Z) / S."""
    return (codes + zero_point) / scale


def limits(low: Array, high: Array, bits: int) -> tuple[Array, Array]:
    """The real values of the smallest and the largest code: near `low` and `high`, which need not be on the grid."""
    scale, zero_point = scale_and_zero_point(low, high, bits)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return dequantize(jnp.asarray(lowest), scale, zero_point), dequantize(jnp.asarray(highest), scale, zero_point)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def fake_quantize(x: Array, low: Array, high: Array, bits: int) -> Array:
    """`x` moved onto the grid of [low, high]. It is differentiated as if it were `x`, in forward and reverse mode.

    `low` and `high` broadcast against `x` (scalars, or size one on every axis but the channel axis).
    """
    scale, zero_point = scale_and_zero_point(low, high, bits)
    return dequantize(quantize(x, scale, zero_point, bits), scale, zero_point)


@fake_quantize.defjvp
def _straight_through(bits: int, values: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return fake_quantize(*values, bits), tangents[0]


def fake_quantize_weight(kernel: Array, bits: int, axes: tuple[int, ...] | None = None) -> Array:
    """Fake-quantize a kernel with one [min, max] range for each output channel.

    axes: those that one output channel sums over; by default all but the last.
    """
    axes = tuple(range(kernel.ndim - 1)) if axes is None else axes
    return fake_quantize(kernel, *kernel_range(kernel, axes), bits)


def kernel_range(kernel: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The minimum and the maximum of each output channel. axes: as in `fake_quantize_weight`; they are kept, with size 1."""
    return jnp.min(kernel, axes, keepdims=True), jnp.max(kernel, axes, keepdims=True)


def fake_quantize_activation(x: Array, low: Array, high: Array, bits: int, straight_through: str) -> Array:
    """Fake-quantize activations with one range [low, high], scalars. straight_through: one of `STRAIGHT_THROUGH`."""
    if straight_through == "clipped":
        # The clip changes no code, but it stops the gradient of the values that it cuts.
        x = jnp.clip(x, *limits(low, high, bits))
    return fake_quantize(x, low, high, bits)


def running_range(average: tuple[Array | None, Array | None], observed: tuple[Array, Array]) -> tuple[Array, Array]:
    """The running average (low, high), with decay 0.9, after one more range. Before the first, `average` is (None, None)."""
    low, high = (new if old is None else RANGE_DECAY * old + (1 - RANGE_DECAY) * new for old, new in zip(average, observed))
    return low, high


def minmax_range(x: Array, bits: int) -> tuple[Array, Array]:
    """Range of a batch of activations: its minimum and maximum (the paper's choice), as scalars."""
    del bits
    return jnp.min(x), jnp.max(x)


def mse_range(x: Array, bits: int) -> tuple[Array, Array]:
    """Range [r * min, r * max] of a batch of activations whose quantization has the smallest mean squared error; scalars.

    r runs over 0.05, 0.10 ... 1. With r below 1, a few outliers no longer stretch the grid of all other values.
    """

    def error(ratio: Array) -> Array:
        return jnp.mean(jnp.square(fake_quantize(x, ratio * low, ratio * high, bits) - x))

    low, high = minmax_range(x, bits)
    ratios = jnp.linspace(0.05, 1.0, 20, dtype=x.dtype)
    best = ratios[jnp.argmin(jax.lax.map(error, ratios))]
    return best * low, best * high


# The derivative of a quantized activation outside its range: one, as in the authors' code, or zero, as for any clipped value.
STRAIGHT_THROUGH = ("identity", "clipped")

RANGE_RULES = {"minmax": minmax_range, "mse": mse_range}
