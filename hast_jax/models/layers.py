"""The layers of version 0.1, kept for networks that were written for that version. Write a new network in plain Flax.

Each function makes a layer of Flax or of `hast_jax.networks.layers`. Bits and `Precision` are accepted and ignored, because
bits come from the config. Taps are None, because batch norms and branches are now found in the structure of a network.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from hast_jax.networks import layers

Array = jax.Array
Size = int | tuple[int, int]
Norm = Callable[..., tuple[Array, None]]


class Precision(NamedTuple):
    """Bits of weights and activations. They stay None, because a network's own calls are in full precision."""

    weights: int | None = None
    activations: int | None = None


FULL_PRECISION = Precision()


class Taps(NamedTuple):
    """What a network of version 0.1 returned besides its logits."""

    batch_norms: tuple[Any, ...]
    branches: tuple[Any, ...]


def Conv(  # noqa: N802 - these stand for classes
    features: int,
    size: Size,
    stride: int = 1,
    bits: int | None = None,
    groups: int = 1,
    use_bias: bool = False,
    *,
    padding: int | None = None,
    dilation: int = 1,
    name: str | None = None,
) -> nn.Conv:
    """A convolution, padded by size // 2 on each side if `padding` is not given."""
    height, width = (size, size) if isinstance(size, int) else size
    sides = ((height // 2,) * 2, (width // 2,) * 2) if padding is None else padding
    return nn.Conv(
        features,
        (height, width),
        stride,
        padding=sides,
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=use_bias,
        name=name,
    )


def Dense(features: int, bits: int | None = None, use_bias: bool = True, name: str | None = None) -> nn.Dense:  # noqa: N802
    """A linear layer."""
    return nn.Dense(features, use_bias, name=name)


def BatchNorm(epsilon: float = 1e-5, name: str | None = None, **settings: Any) -> Norm:  # noqa: N802
    """A batch norm, whose call returns (output, None)."""
    settings = {"momentum": 0.9, "use_fast_variance": False} | settings
    norm = nn.BatchNorm(epsilon=epsilon, name=name, **settings)
    return lambda x, train=False: (norm(x, use_running_average=not train), None)


def ConvNorm(  # noqa: N802
    features: int, size: int, stride: int = 1, bits: int | None = None, groups: int = 1, name: str | None = None
) -> Norm:
    """A convolution with batch norm, whose call returns (output, None)."""
    block = layers.ConvNorm(features, size, stride, groups, name=name)
    return lambda x, train=False: (block(x, train), None)


def Activation(precision: Precision, function: str = "relu", name: str | None = None) -> layers.Activation:  # noqa: N802
    """An activation function whose output a student quantizes."""
    return layers.Activation(function, name=name)
