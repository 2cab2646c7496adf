"""The convolution of every network, in the form that is fastest where it runs.

On a CPU, XLA's convolutions come near the rate of its matrix products with 32 output channels or more and reach less than
half of it below. A narrow convolution of stride 1 therefore computes `pack` neighbouring pixels of a row at once, as
`pack * out` channels of one convolution with stride (1, pack); its result reshapes to the wanted one without moving a
byte. The gradient of the image is such a convolution too. The added taps are zeros: the result is the same. A depthwise
convolution is a sum of shifted products instead, as XLA's own is slow there. See docs/performance.md for what both gain.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

FULL_SPEED_CHANNELS = 32

# JAX's names of what an accelerator's products may round their operands to -> bits of the mantissa; None: to nothing less.
ARITHMETIC: dict[str, int | None] = {"float32": None, "tensorfloat32": 10, "bfloat16": 7}


def conv(x: Array, kernel: Array, stride: int = 1, groups: int = 1) -> Array:
    """Convolve `x` [batch, height, width, in] with `kernel` [size, size, in / groups, out], padded by size // 2 on each side.

    The padding is explicit, as in PyTorch: XLA's "SAME" pads stride-2 layers on one side only.
    """
    if jax.default_backend() == "cpu":
        x, kernel = _rounded(x), _rounded(kernel)
        if stride == groups == 1 and kernel.shape[0] > 1:
            return _packed_conv(x, kernel)
        if groups == x.shape[-1] == kernel.shape[-1]:
            return _depthwise(x, kernel, stride)
    return _direct(x, kernel, (stride, stride), groups)


def _rounded(x: Array) -> Array:
    """`x` as an accelerator would take it into a product, which a CPU computes in float32."""
    mantissa_bits = ARITHMETIC.get(jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
    return x if mantissa_bits is None else lax.reduce_precision(x, 8, mantissa_bits)


def _direct(x: Array, kernel: Array, strides: tuple[int, int], groups: int = 1) -> Array:
    pad = kernel.shape[0] // 2  # its height: packing changes its width
    # A CPU has but one precision, and keeps its fast convolutions for those that ask for none.
    precision = lax.Precision.DEFAULT if jax.default_backend() == "cpu" else None
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=precision,
    )


def _depthwise(x: Array, kernel: Array, stride: int) -> Array:
    size = kernel.shape[0]
    pad = size // 2
    height, width = ((length + 2 * pad - size) // stride + 1 for length in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    window = lambda first, count: slice(first, first + stride * (count - 1) + 1, stride)
    terms = (x[:, window(i, height), window(j, width)] * kernel[i, j][None, None] for i in range(size) for j in range(size))
    return functools.reduce(jnp.add, terms)


def _packed(x: Array, kernel: Array) -> Array:
    """The convolution of stride 1 with several pixels of a row as channels."""
    channels_in, channels_out = kernel.shape[2:]
    pack = 4 if min(channels_in, channels_out) < 16 else 2 if channels_out < FULL_SPEED_CHANNELS else 1
    if x.shape[2] % pack:
        pack = 1
    shifted = [jnp.pad(kernel, ((0, 0), (i, pack - 1 - i), (0, 0), (0, 0))) for i in range(pack)]
    y = _direct(x, jnp.concatenate(shifted, -1), (1, pack))
    return y.reshape(*x.shape[:3], channels_out)


@jax.custom_vjp
def _packed_conv(x: Array, kernel: Array) -> Array:
    return _packed(x, kernel)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    # The barriers keep XLA from computing whole residual chains again inside the weight gradient's transposes.
    x = lax.optimization_barrier(x)
    return _packed(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    gradient = lax.optimization_barrier(gradient)
    (kernel_gradient,) = jax.linear_transpose(partial(_direct, x, strides=(1, 1)), kernel)(gradient)
    return _packed(gradient, kernel[::-1, ::-1].swapaxes(2, 3)), kernel_gradient


_packed_conv.defvjp(_forward, _backward)
