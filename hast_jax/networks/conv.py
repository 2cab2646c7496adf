"""A two-dimensional convolution, in the form that is fastest on a CPU.

On a CPU, XLA's convolutions with 32 output channels or more come near the rate of its matrix products. With fewer channels
they reach less than half of that rate. A narrow convolution of stride 1 therefore computes `pack` neighbouring pixels of a row
at once, as `pack * out` channels of one convolution with stride (1, pack). The result is reshaped without moving a byte. The
gradient of the image is computed in the same way. The entries that the kernel gains are zeros, so the result is the same up to
rounding.

A depthwise convolution is a sum of shifted products instead, because XLA's own is slow. An image smaller than the kernel is
padded beforehand, because XLA would otherwise exchange the two. docs/performance.md gives the gains.
"""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Pair = tuple[int, int]
Padding = tuple[Pair, Pair]  # before and after, of height and width

FULL_SPEED_CHANNELS = 32
MOST_TAPS = 49  # of a depthwise kernel that is written out: its gradient keeps a shifted image for each tap

# JAX's names of the types to which products may round their operands -> bits of the mantissa; None: no rounding.
ARITHMETIC: dict[str, int | None] = {"float32": None, "tensorfloat32": 10, "bfloat16": 7}


def conv(x: Array, kernel: Array, strides: Pair, padding: Padding, dilation: Pair = (1, 1), groups: int = 1) -> Array:
    """Convolve `x` [batch, height, width, in] with `kernel` [height, width, in / groups, out] on a CPU.

    padding: zeros on each side, as for `lax.conv_general_dilated`. dilation: of the kernel.
    """
    mantissa_bits = ARITHMETIC.get(jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
    if mantissa_bits is None:
        return _conv(x, kernel, strides, padding, dilation, groups)
    y = _conv(_rounded(x, mantissa_bits), _rounded(kernel, mantissa_bits), strides, padding, dilation, groups)
    return _with_rounded_gradient(y, mantissa_bits)


def _conv(x: Array, kernel: Array, strides: Pair, padding: Padding, dilation: Pair, groups: int) -> Array:
    few = math.prod(kernel.shape[:2]) <= MOST_TAPS
    if few and groups == x.shape[-1] == kernel.shape[-1] > 1 and min(min(sides) for sides in padding) >= 0:
        return _depthwise(x, kernel, strides, padding, dilation)
    reach = [size - 1 for size in kernel.shape[:2]]
    inside = all(0 <= side <= most for sides, most in zip(padding, reach) for side in sides)
    if groups == 1 and dilation == (1, 1) and max(reach) > 0 and inside:
        pixels = math.prod(size // step for size, step in zip(x.shape[1:3], strides))  # about those of the output's gradient
        if strides == (1, 1) or pixels < math.prod(kernel.shape[:2]):
            return _conv_with_gradient(x, kernel, strides, padding)
    return _direct(x, kernel, strides, padding, dilation, groups)


# An accelerator rounds both operands of each product. In the forward pass these are the image and the kernel. In the backward
# pass they are the gradient of the output and one of these two. Results are not rounded. A CPU computes products in float32, so
# the operands are rounded before.


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rounded(x: Array, mantissa_bits: int) -> Array:
    return lax.reduce_precision(x, 8, mantissa_bits)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _with_rounded_gradient(y: Array, mantissa_bits: int) -> Array:
    del mantissa_bits
    return y


_rounded.defvjp(lambda x, bits: (lax.reduce_precision(x, 8, bits), None), lambda bits, _, gradient: (gradient,))
_with_rounded_gradient.defvjp(lambda y, bits: (y, None), lambda bits, _, gradient: (lax.reduce_precision(gradient, 8, bits),))


def _direct(x: Array, kernel: Array, strides: Pair, padding: Padding, dilation: Pair = (1, 1), groups: int = 1) -> Array:
    if math.prod(x.shape[1:3]) < math.prod(kernel.shape[:2]):
        # XLA would exchange image and kernel, and then convolve at a fraction of its usual rate. The barrier keeps the zeros.
        x, padding = lax.optimization_barrier(jnp.pad(x, ((0, 0), *padding, (0, 0)))), ((0, 0), (0, 0))
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


def _value(x: Array, kernel: Array, strides: Pair, padding: Padding) -> Array:
    return _packed(x, kernel, padding) if strides == (1, 1) else _direct(x, kernel, strides, padding)


_conv_with_gradient = jax.custom_vjp(_value, nondiff_argnums=(2, 3))


def _forward(x: Array, kernel: Array, strides: Pair, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    # The barriers keep XLA from recomputing whole residual chains inside the weight gradient's transposes.
    x = lax.optimization_barrier(x)
    return _value(x, kernel, strides, padding), (x, kernel)


def _backward(strides: Pair, padding: Padding, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    gradient = lax.optimization_barrier(gradient)
    (kernel_gradient,) = jax.linear_transpose(partial(_direct, x, strides=strides, padding=padding), kernel)(gradient)
    reach = [size - 1 for size in kernel.shape[:2]]
    if strides != (1, 1):  # zeros between the pixels, and behind the last one for rows and columns that no step reached
        unused = [(x.shape[1 + a] + sum(padding[a]) - kernel.shape[a]) % strides[a] for a in (0, 1)]
        zeros = [(0, unused[a], strides[a] - 1) for a in (0, 1)]
        gradient = lax.optimization_barrier(lax.pad(gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *zeros, (0, 0, 0)]))
    (top, bottom), (left, right) = padding
    mirrored = (reach[0] - top, reach[0] - bottom), (reach[1] - left, reach[1] - right)
    return _packed(gradient, kernel[::-1, ::-1].swapaxes(2, 3), mirrored), kernel_gradient


_conv_with_gradient.defvjp(_forward, _backward)
