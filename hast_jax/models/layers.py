"""Layers shared by every network. A layer with `bits=None` works in full precision: that is the teacher."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hast_jax import quant
from hast_jax.models.conv import conv

Array = jax.Array
RangeRule = Callable[[Array, int], tuple[Array, Array]]

RANGE_DECAY = 0.9


class BatchNormTap(NamedTuple):
    """What the BN statistics loss needs of one layer: its input [batch, height, width, c], its running moments [c]."""

    inputs: Array
    mean: Array
    var: Array


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
    straight_through: of an activation outside its range, one of `quant.STRAIGHT_THROUGH`.
    """

    weights: int | None = None
    activations: int | None = None
    range_rule: RangeRule = quant.minmax_range
    straight_through: str = "identity"


FULL_PRECISION = Precision()


class Conv(nn.Module):
    """Convolution without bias, its kernel [height, width, in / groups, out] fake-quantized for each output channel."""

    features: int
    size: int
    stride: int = 1
    bits: int | None = None
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[batch, height, width, in] -> [batch, height / stride, width / stride, features]."""
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.variance_scaling(2.0, "fan_out", "normal"), shape)
        if self.bits is not None:
            kernel = quant.fake_quantize_weight(kernel, self.bits)
        return conv(x, kernel, self.stride, self.groups)


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
            kernel = quant.fake_quantize_weight(kernel, self.bits)
        if not self.use_bias:
            return x @ kernel
        return x @ kernel + self.param("bias", nn.initializers.zeros_init(), (self.features,))[None]


class ConvNorm(nn.Module):
    """Convolution and batch norm; returns the output and the batch norm's tap."""

    features: int
    size: int
    stride: int = 1
    bits: int | None = None
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> tuple[Array, BatchNormTap]:
        """As `Conv`; `train` normalises with the moments of the batch."""
        x = Conv(self.features, self.size, self.stride, self.bits, self.groups, name="conv")(x)
        # PyTorch's conventions: momentum 0.1 there is 0.9 here, and the variance is not computed as E[x^2] - E[x]^2.
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, name="bn")
        y = norm(x)
        moments: Any = norm.variables["batch_stats"]
        return y, BatchNormTap(x, moments["mean"], moments["var"])


class Activation(nn.Module):
    """ReLU, or with a `limit` ReLU6 and the like, whose output is fake-quantized with one range for the layer.

    The range lives in the collection `ranges` (scalars `low` and `high`). Where that collection is mutable the layer is
    calibrating: the range of the batch enters a running average with decay 0.9, the first batch setting it. Elsewhere
    the range is frozen. An uncalibrated range is NaN, so that it cannot go unnoticed.
    """

    precision: Precision
    limit: float | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Any shape, kept."""
        x, bits = nn.relu(x), self.precision.activations
        if self.limit is not None:
            x = jnp.minimum(x, self.limit)
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
            x = jnp.clip(x, low.value, high.value)  # low is 0, so this changes no code; it stops the gradient of what it cuts
        return quant.fake_quantize(x, low.value, high.value, bits)
