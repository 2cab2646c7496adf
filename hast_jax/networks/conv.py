"""A two-dimensional convolution, in the form that is fastest on a CPU.

On a CPU, XLA's convolutions with 32 output channels or more come near the rate of its matrix products. With fewer channels
they reach less than half of that rate. A narrow convolution of stride 1 therefore computes `pack` neighbouring pixels of a row
at once, as `pack * out` channels of one convolution with stride (1, pack). The result is reshaped without moving a byte. The
gradient of the image is computed in the same way. The entries that the kernel gains are zeros, so the result is the same up to
rounding.

A depthwise convolution is a sum of shifted products instead, because XLA's own is slow. docs/performance.md gives both gains.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Pair = tuple[int, int]
Padding = tuple[Pair, Pair]  # before and after, of height and width

FULL_SPEED_CHANNELS = 32

# JAX's names of the types to which products may round their operands -> bits of the mantissa; None: no rounding.
ARITHMETIC: dict[str, int | None] = {"float32": None, "tensorfloat32": 10, "bfloat16": 7}


def conv(x: Array, kernel: Array, strides: Pair, padding: Padding, dilation: Pair = (1, 1), groups: int = 1) -> Array:
    """Convolve `x` [batch, height, width, in] with `kernel` [height, width, in / groups, out] on a CPU.

    padding: zeros on each side, as for `lax.conv_general_dilated`. dilation: of the kernel.
    """
    x, kernel = _rounded(x), _rounded(kernel)
    if groups == x.shape[-1] == kernel.shape[-1] > 1 and min(min(sides) for sides in padding) >= 0:
        return _depthwise(x, kernel, strides, padding, dilation)
    reach = [size - 1 for size in kernel.shape[:2]]
    inside = all(0 <= side <= most for sides, most in zip(padding, reach) for side in sides)
    if groups == 1 and strides == dilation == (1, 1) and max(reach) > 0 and inside:
        return _packed_conv(x, kernel, padding)
    return _direct(x, kernel, strides, padding, dilation, groups)


def _rounded(x: Array) -> Array:
    """`x` rounded as an accelerator rounds the operands of a product. A CPU computes products in float32."""
    mantissa_bits = ARITHMETIC.get(jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
    return x if mantissa_bits is None else lax.reduce_precision(x, 8, mantissa_bits)


def _direct(x: Array, kernel: Array, strides: Pair, padding: Padding, dilation: Pair = (1, 1), groups: int = 1) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=lax.Precision.DEFAULT,  # all are the same on a CPU, but only this one gets the fast convolutions
    )


def _depthwise(x: Array, kernel: Array, strides: Pair, padding: Padding, dilation: Pair) -> Array:
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    sizes = kernel.shape[:2]
    counts = [(x.shape[1 + a] - (sizes[a] - 1) * dilation[a] - 1) // strides[a] + 1 for a in (0, 1)]

    def window(a, i):
        return slice(i * dilation[a], i * dilation[a] + strides[a] * (counts[a] - 1) + 1, strides[a])

    terms = (x[:, window(0, i), window(1, j)] * kernel[i, j][None, None] for i in range(sizes[0]) for j in range(sizes[1]))
    return functools.reduce(jnp.add, terms)


def _packed(x: Array, kernel: Array, padding: Padding) -> Array:
    """The convolution of stride 1 with several pixels of a row as channels."""
    channels_in, channels_out = kernel.shape[2:]
    height, width = (x.shape[1 + a] + sum(padding[a]) - kernel.shape[a] + 1 for a in (0, 1))
    pack = 4 if min(channels_in, channels_out) < 16 else 2 if channels_out < FULL_SPEED_CHANNELS else 1
    if width % pack:
        pack = 1
    shifted = [jnp.pad(kernel, ((0, 0), (i, pack - 1 - i), (0, 0), (0, 0))) for i in range(pack)]
    y = _direct(x, jnp.concatenate(shifted, -1), (1, pack), padding)
    return y.reshape(x.shape[0], height, width, channels_out)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _packed_conv(x: Array, kernel: Array, padding: Padding) -> Array:
    return _packed(x, kernel, padding)


def _forward(x: Array, kernel: Array, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    # The barriers keep XLA from recomputing whole residual chains inside the weight gradient's transposes.
    x = lax.optimization_barrier(x)
    return _packed(x, kernel, padding), (x, kernel)


def _backward(padding: Padding, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    gradient = lax.optimization_barrier(gradient)
    (kernel_gradient,) = jax.linear_transpose(partial(_direct, x, strides=(1, 1), padding=padding), kernel)(gradient)
    (top, bottom), (left, right) = padding
    rows, columns = kernel.shape[0] - 1, kernel.shape[1] - 1
    mirrored = (rows - top, rows - bottom), (columns - left, columns - right)
    return _packed(gradient, kernel[::-1, ::-1].swapaxes(2, 3), mirrored), kernel_gradient


_packed_conv.defvjp(_forward, _backward)
