"""Which calls of `nn.Conv` the fast convolutions of conv.py replace, and how."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hast_jax.networks import conv

Array = jax.Array


def is_plain_convolution(module: nn.Module, x: Array) -> bool:
    """Whether `conv.conv` can replace `module`: a two-dimensional convolution, padded with zeros, in float32 or float64."""
    if type(module) is not nn.Conv or isinstance(module.kernel_size, int) or len(module.kernel_size) != 2 or x.ndim != 4:
        return False
    own = (module.conv_general_dilated, module.conv_general_dilated_cls, module.precision, module.mask)
    promoted = getattr(module, "promote_dtype", nn.dtypes.promote_dtype) is nn.dtypes.promote_dtype
    zeros = not isinstance(module.padding, str) or module.padding in ("SAME", "VALID")
    floating = module.dtype in (None, x.dtype) and x.dtype in (jnp.float32, jnp.float64) and module.param_dtype == jnp.float32
    return zeros and floating and promoted and all(each is None for each in own) and _pair(module.input_dilation) == (1, 1)


def fast_convolution(module: Any, x: Array) -> Array:
    """The output of the bound `module` for `x` [batch, height, width, in]. `is_plain_convolution` must hold."""
    kernel, bias = (module.get_variable("params", name) for name in ("kernel", "bias"))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
    strides, dilation, padding = _pair(module.strides), _pair(module.kernel_dilation), module.padding
    height: Any
    width: Any
    if isinstance(padding, str):
        window = tuple((size - 1) * step + 1 for size, step in zip(kernel.shape[:2], dilation))
        height, width = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    else:
        height, width = (padding, padding) if isinstance(padding, int) else padding
    y = conv.conv(x, kernel, strides, (_pair(height), _pair(width)), dilation, module.feature_group_count)
    return y + bias[None, None, None] if module.use_bias else y


def _pair(value: Any) -> tuple[int, int]:
    if value is None:
        return 1, 1
    return (value, value) if isinstance(value, int) else tuple(value)
