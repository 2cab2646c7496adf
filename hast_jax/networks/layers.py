"""Layers of the built-in networks that Flax does not have."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from hast_jax.errors import InputError

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "relu6": lambda x: jnp.minimum(nn.relu(x), 6.0),
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "silu": nn.silu,
    "hard_swish": nn.hard_swish,
    "gelu": nn.gelu,
}


class Activation(nn.Module):
    """An activation function whose *output* a student quantizes, with one range for the layer, as the paper does.

    In a network with such layers, only their outputs and the weights are quantized. In a network without them, the inputs of
    convolutions and linear layers are quantized instead. Rules (rules.py) can quantize more inputs.
    """

    function: str = "relu"

    def __call__(self, x: Array) -> Array:
        """`x` of any shape -> the same shape. Raises InputError for an unknown function."""
        if self.function not in ACTIVATIONS:
            raise InputError(f"the activation {self.function!r} is unknown: choose from {', '.join(ACTIVATIONS)}.")
        return ACTIVATIONS[self.function](x)


class ConvNorm(nn.Module):
    """Convolution without bias, padded by size // 2 on each side as in PyTorch, and batch norm with PyTorch's settings.

    groups: for a depthwise convolution, the number of input channels.
    """

    features: int
    size: int
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """[batch, height, width, in] -> [batch, height / stride, width / stride, features].

        `train` normalises with the moments of the batch.
        """
        x = nn.Conv(
            self.features,
            (self.size, self.size),
            self.stride,
            padding=self.size // 2,
            feature_group_count=self.groups,
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            name="conv",
        )(x)
        # PyTorch's momentum 0.1 is Flax's 0.9. Flax's fast variance, E[x^2] - E[x]^2, would lose digits.
        norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, name="bn")
        return norm(x)
