"""What the built-in networks are made of, beside Flax's own layers."""

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

    In a network with such marks nothing else is quantized but weights. In a network without any, the inputs of its
    convolutions and linear layers are.
    """

    function: str = "relu"

    def __call__(self, x: Array) -> Array:
        """Any shape, kept. Raises InputError for an unknown function."""
        if self.function not in ACTIVATIONS:
            raise InputError(f"the activation {self.function!r} is unknown: choose from {', '.join(ACTIVATIONS)}.")
        return ACTIVATIONS[self.function](x)


class ConvNorm(nn.Module):
    """Convolution without bias, padded by size // 2 on each side as in PyTorch, and batch norm with PyTorch's settings.

    groups: the input channels for a depthwise one.
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
        # PyTorch's momentum 0.1 is 0.9 here, and the variance is not computed as E[x^2] - E[x]^2.
        norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, name="bn")
        return norm(x)
