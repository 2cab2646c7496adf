"""MobileNetV1 and MobileNetV2, of depthwise convolutions. Architecture and names of parts are those of pytorchcv."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax

from hast_jax.networks import names
from hast_jax.networks.layers import Activation, ConvNorm

Array = jax.Array

EXPANSION = 6


class SeparableUnit(nn.Module):
    """Depthwise and pointwise convolution."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """[batch, height, width, in] -> [batch, height / stride, width / stride, features]."""
        channels = x.shape[-1]
        x = ConvNorm(channels, 3, self.stride, groups=channels, name="dw_conv")(x, train)
        x = Activation(name="dw_activ")(x)
        x = ConvNorm(self.features, 1, 1, name="pw_conv")(x, train)
        return Activation(name="pw_activ")(x)


class MobileNetV1(nn.Module):
    """pytorchcv's `mobilenet_w1`.

    classes: number of logits. widths: channels of each unit of each stage; each stage but the first halves the image.
    """

    classes: int
    widths: Sequence[Sequence[int]] = ((64,), (128,) * 2, (256,) * 2, (512,) * 6, (1024,) * 2)
    stem: int = 32

    branches = "pw_conv/bn"  # the batch norms whose outputs are aligned

    def state_dict_names(self) -> dict[str, names.NameOf]:
        """The name map of pytorchcv."""
        return {"pytorchcv": names.mobilenet_pytorchcv}

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits [batch, classes] of normalised images [batch, height, width, channels]; `train` as for `ResNet`."""
        x = ConvNorm(self.stem, 3, 2, name="init_block")(x, train)
        x = Activation(name="init_activ")(x)
        for i, stage in enumerate(self.widths):
            for j, features in enumerate(stage):
                stride = 2 if i > 0 and j == 0 else 1
                x = SeparableUnit(features, stride, name=f"stage{i + 1}_unit{j + 1}")(x, train)
        return nn.Dense(self.classes, name="output")(x.mean((1, 2)))


class LinearBottleneck(nn.Module):
    """Expansion, depthwise convolution and linear projection, with a skip connection if the shapes allow it."""

    features: int
    stride: int
    expansion: int
    expand: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """[batch, height, width, in] -> [batch, height / stride, width / stride, features]."""
        shortcut, width = x, x.shape[-1] * self.expansion
        if self.expand:
            x = ConvNorm(width, 1, 1, name="conv1")(x, train)
            x = Activation("relu6", name="activ1")(x)
        x = ConvNorm(width, 3, self.stride, groups=width, name="conv2")(x, train)
        x = Activation("relu6", name="activ2")(x)
        branch = ConvNorm(self.features, 1, 1, name="conv3")(x, train)
        skip = self.stride == 1 and shortcut.shape[-1] == self.features
        return branch + shortcut if skip else branch


class MobileNetV2(nn.Module):
    """pytorchcv's `mobilenetv2_w1`, or torchvision's `mobilenet_v2`.

    torchvision's first unit has no expanding convolution. Its last layer is linear with a bias; pytorchcv's is a 1x1
    convolution without bias.

    classes: number of logits. widths: channels of each unit of each stage; each stage but the first halves the image.
    """

    classes: int
    widths: Sequence[Sequence[int]] = ((16,), (24,) * 2, (32,) * 3, (64,) * 4 + (96,) * 3, (160,) * 3 + (320,))
    stem: int = 32
    head: int = 1280
    torchvision: bool = False

    branches = "conv3/bn"  # the batch norms whose outputs are aligned

    def state_dict_names(self) -> dict[str, names.NameOf]:
        """The name map of pytorchcv or torchvision."""
        if self.torchvision:
            return {"torchvision": partial(names.mobilenetv2_torchvision, units=tuple(map(len, self.widths)))}
        return {"pytorchcv": names.mobilenet_pytorchcv}

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits [batch, classes] of normalised images [batch, height, width, channels]; `train` as for `ResNet`."""
        x = ConvNorm(self.stem, 3, 2, name="init_block")(x, train)
        x = Activation("relu6", name="init_activ")(x)
        for i, stage in enumerate(self.widths):
            for j, features in enumerate(stage):
                first, name = i == j == 0, f"stage{i + 1}_unit{j + 1}"
                stride, expansion = 2 if i > 0 and j == 0 else 1, 1 if first else EXPANSION
                expand = not (first and self.torchvision)
                x = LinearBottleneck(features, stride, expansion, expand, name=name)(x, train)
        x = ConvNorm(self.head, 1, 1, name="final_block")(x, train)
        x = Activation("relu6", name="final_activ")(x)
        return nn.Dense(self.classes, use_bias=self.torchvision, name="output")(x.mean((1, 2)))
