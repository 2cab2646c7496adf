"""Networks as people write them in Flax: they know nothing of quantization."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

Module = Callable[..., Any]


class ResNetBlock(nn.Module):
    """As in Flax's example for ImageNet."""

    filters: int
    conv: Module
    norm: Module
    act: Callable
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        residual = x
        y = self.conv(self.filters, (3, 3), self.strides)(x)
        y = self.norm()(y)
        y = self.act(y)
        y = self.conv(self.filters, (3, 3))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if residual.shape != y.shape:
            residual = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(residual)
            residual = self.norm(name="norm_proj")(residual)
        return self.act(residual + y)


class ResNet(nn.Module):
    """The same example with the stages and the stem of CIFAR: 20 layers."""

    stage_sizes: Sequence[int] = (3, 3, 3)
    num_classes: int = 10
    num_filters: int = 4
    dtype: Any = jnp.float32
    act: Callable = nn.relu

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, axis_name="batch"
        )
        x = conv(self.num_filters, (3, 3), name="conv_init")(x)
        x = norm(name="bn_init")(x)
        x = nn.relu(x)
        for i, block_size in enumerate(self.stage_sizes):
            for j in range(block_size):
                strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                x = ResNetBlock(self.num_filters * 2**i, strides=strides, conv=conv, norm=norm, act=self.act)(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return jnp.asarray(x, self.dtype)


class MobileNetV2(nn.Module):
    """As Keras builds it, with Keras' names. blocks: (channels, stride, expansion) of each."""

    blocks: Sequence[tuple[int, int, int]] = ((4, 1, 1), (6, 2, 6), (6, 1, 6), (8, 2, 6), (8, 1, 6))
    stem: int = 8
    last: int = 16
    classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.999, epsilon=1e-3)
        conv = partial(nn.Conv, use_bias=False)
        x = conv(self.stem, (3, 3), 2, padding="SAME", name="Conv1")(x)
        x = nn.relu6(norm(name="bn_Conv1")(x))
        for i, (channels, stride, expansion) in enumerate(self.blocks):
            inputs, width, prefix = x, x.shape[-1], f"block_{i}_" if i else "expanded_conv_"
            if i:
                width *= expansion
                x = conv(width, (1, 1), name=f"{prefix}expand")(x)
                x = nn.relu6(norm(name=f"{prefix}expand_BN")(x))
            if stride == 2:  # ZeroPadding2D(correct_pad(x, 3))
                x = jnp.pad(x, ((0, 0), *((size % 2, 1) for size in x.shape[1:3]), (0, 0)))
            padding = "SAME" if stride == 1 else "VALID"
            x = conv(width, (3, 3), stride, padding, feature_group_count=width, name=f"{prefix}depthwise")(x)
            x = nn.relu6(norm(name=f"{prefix}depthwise_BN")(x))
            x = conv(channels, (1, 1), name=f"{prefix}project")(x)
            x = norm(name=f"{prefix}project_BN")(x)
            if stride == 1 and inputs.shape[-1] == channels:
                x = inputs + x
        x = conv(self.last, (1, 1), name="Conv_1")(x)
        x = nn.relu6(norm(name="Conv_1_bn")(x))
        return nn.Dense(self.classes, name="predictions")(x.mean((1, 2)))


class VGG(nn.Module):
    """Convolutions with biases, and a dense head with dropout."""

    widths: Sequence[int] = (8, 12)
    classes: int = 10

    @nn.compact
    def __call__(self, x, deterministic: bool):
        for width in self.widths:
            for _ in range(2):
                x = nn.Conv(width, (3, 3))(x)
                x = nn.relu(nn.BatchNorm(use_running_average=deterministic)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(24)(x))
        x = nn.Dropout(0.5, deterministic=deterministic)(x)
        return nn.Dense(self.classes)(x)


class DenseNet(nn.Module):
    growth: int = 4
    layers: Sequence[int] = (2, 2)
    classes: int = 10

    @nn.compact
    def __call__(self, x, training: bool = False):
        norm = partial(nn.BatchNorm, use_running_average=not training)
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        for stage, count in enumerate(self.layers):
            if stage:
                x = nn.Conv(x.shape[-1] // 2, (1, 1), use_bias=False)(nn.relu(norm()(x)))
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for _ in range(count):
                y = nn.Conv(4 * self.growth, (1, 1), use_bias=False)(nn.relu(norm()(x)))
                y = nn.Conv(self.growth, (3, 3), use_bias=False)(nn.relu(norm()(y)))
                x = jnp.concatenate([x, y], axis=-1)
        return nn.Dense(self.classes)(nn.relu(norm()(x)).mean((1, 2)))


class SqueezeExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = x.mean((1, 2), keepdims=True)
        y = nn.relu(nn.Conv(max(4, x.shape[-1] // 4), (1, 1), name="reduce")(y))
        return x * nn.hard_sigmoid(nn.Conv(x.shape[-1], (1, 1), name="expand")(y))


class MobileNetV3(nn.Module):
    """Inverted residuals with squeeze-and-excitation and hard-swish."""

    classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = partial(nn.BatchNorm, use_running_average=not train, epsilon=1e-3)
        x = nn.hard_swish(norm()(nn.Conv(8, (3, 3), (2, 2), use_bias=False)(x)))
        for name in ("first", "second"):
            y = nn.hard_swish(norm()(nn.Conv(24, (1, 1), use_bias=False)(x)))
            y = nn.Conv(24, (5, 5), feature_group_count=24, use_bias=False)(y)
            y = SqueezeExcite(name=f"{name}_excite")(nn.hard_swish(norm()(y)))
            x = x + norm(name=f"{name}_project")(nn.Conv(8, (1, 1), use_bias=False)(y))
        x = nn.hard_swish(nn.Dense(16)(nn.hard_swish(x).mean((1, 2))))
        return nn.Dense(self.classes)(x)


class Unusual(nn.Module):
    """Every form of a layer that the others lack."""

    classes: int = 10

    @nn.compact
    def __call__(self, x, use_running_average: bool = True):
        norm = partial(nn.BatchNorm, use_running_average=use_running_average)
        x = nn.relu(norm()(nn.Conv(8, (2, 2), name="even")(x)))
        x = nn.relu(norm()(nn.Conv(8, (3, 2), (2, 1), padding="VALID", kernel_dilation=(2, 1), name="dilated")(x)))
        x = nn.Conv(12, (4, 4), (1, 2), ((2, 1), (0, 3)), feature_group_count=4, name="grouped")(x)
        x = nn.gelu(norm(axis=-1)(x))
        x = nn.relu(nn.Conv(8, (1, 5), padding=2, name="wide")(x))
        x = nn.relu(norm()(nn.Conv(16, (3, 3), feature_group_count=8, padding="CIRCULAR", name="two_from_each")(x)))
        x = jnp.tanh(nn.Conv(4, (2, 2), padding=((1, 0), (0, 1)), input_dilation=(2, 2), name="between")(x))
        x = nn.leaky_relu(norm()(nn.Conv(8, 3, name="of_rows")(x)))
        x = nn.elu(nn.Conv(8, (3, 3), (3, 2), padding=5, name="outside")(x))
        x = nn.relu(nn.Einsum((6, 8), "nhwc,dc->nhwd", name="pixels")(x))
        x = nn.DenseGeneral(12, axis=(1, -1), name="columns")(x)
        x = nn.relu(x)
        return nn.Einsum((x.shape[1], 12, self.classes), "nwc,wcd->nd", name="head")(x)


class Shared(nn.Module):
    """One convolution and one batch norm, used twice."""

    classes: int = 10

    def setup(self):
        self.stem = nn.Conv(6, (3, 3))
        self.conv = nn.Conv(6, (3, 3), use_bias=False)
        self.norm = nn.BatchNorm()
        self.head = nn.Dense(self.classes)

    def __call__(self, x, train: bool = False):
        x = nn.relu(self.norm(self.stem(x), use_running_average=not train))
        x = nn.relu(self.norm(self.conv(x), use_running_average=not train))
        return self.head(self.conv(x).mean((1, 2)))


class Again(nn.Module):
    """A convolution that reads the image first and then what came of it; arguments by name; a gate by einsum."""

    classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        conv = nn.Conv(3, (3, 3), use_bias=False)
        for _ in range(3):
            x = nn.relu(nn.BatchNorm()(use_running_average=not train, x=conv(inputs=x)))
        x = jnp.einsum("bhwc,bc->bhwc", x, nn.sigmoid(nn.Dense(3)(x.mean((1, 2)))))
        return nn.Einsum((3, self.classes))(x.mean((1, 2)), "bc,cd->bd")


class Frozen(nn.Module):
    """Only for inference: the batch norms have no other mode, and no parameters."""

    classes: int = 10
    branches: int = 1  # a name that our own networks give a pattern

    @nn.compact
    def __call__(self, x):
        for width in (6, 8):
            x = nn.Conv(width, (3, 3), (2, 2))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))


class Block(nn.Module):
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train: bool):
        y = nn.Conv(self.width, (3, 3), self.stride, use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
        y = nn.BatchNorm(use_running_average=not train)(nn.Conv(self.width, (3, 3), use_bias=False)(y))
        return nn.relu(y + x) if x.shape == y.shape else nn.relu(y)


class Remat(nn.Module):
    classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        block = nn.remat(Block, static_argnums=(2,))
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        for i, stride in enumerate((2, 1)):
            x = block(6, stride, name=f"block{i}")(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)))


def sequential(classes: int = 10) -> nn.Module:
    """Layers in nested lists, the whole network too; layers of bfloat16 beside others."""
    norm = partial(nn.BatchNorm, use_running_average=True)
    block = nn.Sequential([nn.Conv(8, (3, 3), use_bias=False), norm(), nn.relu])
    narrow = nn.Sequential([nn.Conv(8, (3, 3), dtype=jnp.bfloat16), norm(), nn.swish])
    return nn.Sequential([block, narrow, lambda x: x.mean((1, 2)), nn.Dense(classes)])


SMALL, LARGE = (16, 16, 3), (32, 32, 3)
WIDE, TALL = (12, 20, 4), (16, 12, 2)  # neither square nor of one or three channels

# Each with the shape of its images.
NETWORKS: dict[str, tuple[nn.Module, tuple[int, int, int]]] = {
    "resnet": (ResNet(), SMALL),
    "mobilenetv2": (MobileNetV2(), LARGE),
    "vgg": (VGG(), SMALL),
    "densenet": (DenseNet(), SMALL),
    "mobilenetv3": (MobileNetV3(), SMALL),
    "unusual": (Unusual(), SMALL),
    "shared": (Shared(), WIDE),
    "again": (Again(), SMALL),
    "frozen": (Frozen(), TALL),
    "remat": (Remat(), WIDE),
    "sequential": (sequential(), SMALL),
    "bfloat16": (ResNet(stage_sizes=(1, 1), num_filters=6, dtype=jnp.bfloat16), SMALL),
}
