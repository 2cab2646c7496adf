"""Layers shared by every network. A layer with `bits=None` works in full precision: that is the teacher."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hast_jax.errors import UserError
from hast_jax.method import quantizer
from hast_jax.method.losses import BatchNormTap
from hast_jax.networks.conv import conv

Array = jax.Array
RangeRule = Callable[[Array, int], tuple[Array, Array]]

RANGE_DECAY = 0.9

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "relu6": lambda x: jnp.minimum(nn.relu(x), 6.0),
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "silu": nn.silu,
    "hard_swish": nn.hard_swish,
    "gelu": nn.gelu,
}


class Taps(NamedTuple):
    """What a network shows beside its logits.

    batch_norms: one tap for each batch-norm layer, in the order of execution.
    branches: output of each residual branch, before the addition and its activation [batch, height, width, c].
    """

    batch_norms: tuple[BatchNormTap, ...]
    branches: tuple[Array, ...]


class Precision(NamedTuple):
    """How a network is quantized.

    weights, activations: bits; `None` is full precision.
    range_rule: observes the range of activations when calibrating.
    straight_through: of an activation outside its range, one of `quantizer.STRAIGHT_THROUGH`.
    arithmetic: of convolutions and matrix products, one of `conv.ARITHMETIC`; everything else is float32.
    """

    weights: int | None = None
    activations: int | None = None
    range_rule: RangeRule = quantizer.minmax_range
    straight_through: str = "identity"
    arithmetic: str = "float32"


FULL_PRECISION = Precision()


class Conv(nn.Module):
    """Square convolution, padded by size // 2; its kernel [size, size, in / groups, out] fake-quantized for each output.

    bits: of the kernel, as for every layer here; None is full precision. groups: the input channels for a depthwise one.
    """

    features: int
    size: int
    stride: int = 1
    bits: int | None = None
    groups: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[batch, height, width, in] -> [batch, height / stride, width / stride, features]."""
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.variance_scaling(2.0, "fan_out", "normal"), shape)
        if self.bits is not None:
            kernel = quantizer.fake_quantize_weight(kernel, self.bits)
        x = conv(x, kernel, self.stride, self.groups)
        if not self.use_bias:
            return x
        return x + self.param("bias", nn.initializers.zeros_init(), (self.features,))[None, None, None]


class Dense(nn.Module):
    """Linear layer, its kernel [in, out] fake-quantized for each output."""

    features: int
    bits: int | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[batch, in] -> [batch, features]."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        if self.bits is not None:
            kernel = quantizer.fake_quantize_weight(kernel, self.bits)
        if not self.use_bias:
            return x @ kernel
        return x @ kernel + self.param("bias", nn.initializers.zeros_init(), (self.features,))[None]


class BatchNorm(nn.BatchNorm):
    """Flax's batch norm with PyTorch's conventions; returns the output and its tap."""

    # PyTorch's momentum 0.1 is 0.9 here, and the variance is not computed as E[x^2] - E[x]^2.
    momentum: float = 0.9
    epsilon: float = 1e-5
    use_fast_variance: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, BatchNormTap]:  # type: ignore[override]
        """Any shape whose last axis are channels, kept; `train` normalises with the moments of the batch."""
        y = super().__call__(x, use_running_average=not train)
        moments: Any = self.variables["batch_stats"]
        return y, BatchNormTap(x, moments["mean"], moments["var"])


class ConvNorm(nn.Module):
    """Convolution and batch norm; returns the output and the batch norm's tap. Fields as those of `Conv`."""

    features: int
    size: int
    stride: int = 1
    bits: int | None = None
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, BatchNormTap]:
        """[batch, height, width, in] -> [batch, height / stride, width / stride, features]; `train` as `BatchNorm`."""
        x = Conv(self.features, self.size, self.stride, self.bits, self.groups, name="conv")(x)
        return BatchNorm(name="bn")(x, train)


class Activation(nn.Module):
    """One of `ACTIVATIONS`, whose output is fake-quantized with one range for the layer.

    The range lives in the collection `ranges` (scalars `low` and `high`). Where that collection is mutable the layer is
    calibrating: the range of the batch enters a running average with decay 0.9, the first batch setting it. Elsewhere
    the range is frozen. An uncalibrated range is NaN, so that it cannot go unnoticed. Raises UserError for an unknown function.
    """

    precision: Precision
    function: str = "relu"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Any shape, kept."""
        if self.function not in ACTIVATIONS:
            raise UserError(f"the activation {self.function!r} is unknown: choose from {', '.join(ACTIVATIONS)}.")
        x, bits = ACTIVATIONS[self.function](x), self.precision.activations
        if bits is None:
            return x
        low = self.variable("ranges", "low", jnp.full, (), jnp.nan, x.dtype)
        high = self.variable("ranges", "high", jnp.full, (), jnp.nan, x.dtype)
        if self.is_mutable_collection("ranges") and not self.is_initializing():
            observed = self.precision.range_rule(x, bits)
            for limit, new in zip((low, high), observed):
                average = RANGE_DECAY * limit.value + (1 - RANGE_DECAY) * new
                limit.value = jnp.where(jnp.isnan(limit.value), new, average)
        if self.precision.straight_through == "clipped":
            # This changes no code; it stops the gradient of what it cuts.
            x = jnp.clip(x, *quantizer.limits(low.value, high.value, bits))
        return quantizer.fake_quantize(x, low.value, high.value, bits)
