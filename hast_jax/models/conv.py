"""The convolution of every network."""

import jax
from jax import lax

Array = jax.Array


def conv(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Convolve `x` [batch, height, width, in] with `kernel` [size, size, in, out], padded by size // 2 on each side.

    The padding is explicit, as in PyTorch: XLA's "SAME" pads stride-2 layers on one side only.
    """
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
