"""ResNets with basic blocks: ResNet-20 for CIFAR, ResNet-18 for ImageNet, and a small one for 8 x 8 digits.

The architecture and the names of its parts are those of pytorchcv: the shortcut of a unit that changes the shape is a
1x1 convolution with batch norm.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax

from hast_jax.networks import names
from hast_jax.networks.layers import Activation, ConvNorm

Array = jax.Array


class ResUnit(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """[batch, height, width, in] -> [batch, height / stride, width / stride, features]."""
        shortcut = x
        if self.stride > 1 or x.shape[-1] != self.features:
            shortcut = ConvNorm(self.features, 1, self.stride, name="identity_conv")(x, train)
        x = ConvNorm(self.features, 3, self.stride, name="conv1")(x, train)
        branch = ConvNorm(self.features, 3, 1, name="conv2")(Activation(name="activ1")(x), train)
        return Activation(name="activ")(branch + shortcut)


class ResNet(nn.Module):
    """A ResNet of basic blocks.

    classes: number of logits. widths, units: channels and number of units of each stage; each stage but the first
    halves the image. imagenet_stem: 7x7 stride-2 convolution and max pooling instead of one 3x3 convolution.
    """

    classes: int
    widths: Sequence[int]
    units: Sequence[int]
    imagenet_stem: bool = False

    branches = "conv2/bn"  # the batch norms whose outputs are aligned: the end of each residual branch

    def state_dict_names(self) -> dict[str, names.NameOf]:
        """Name maps of pytorchcv and, for the ImageNet network, torchvision."""
        ours = {"pytorchcv": partial(names.resnet_pytorchcv, imagenet_stem=self.imagenet_stem)}
        return ours | ({"torchvision": names.resnet_torchvision} if self.imagenet_stem else {})

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits [batch, classes] of normalised images [batch, height, width, channels].

        `train=True` normalises with the moments of the batch and updates `batch_stats` (only for pretraining).
        """
        size, stride = (7, 2) if self.imagenet_stem else (3, 1)
        x = ConvNorm(self.widths[0], size, stride, name="init_block")(x, train)
        x = Activation(name="init_activ")(x)
        if self.imagenet_stem:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, (width, units) in enumerate(zip(self.widths, self.units)):
            for j in range(units):
                unit = ResUnit(width, 2 if i > 0 and j == 0 else 1, name=f"stage{i + 1}_unit{j + 1}")
                x = unit(x, train)
        return nn.Dense(self.classes, name="output")(x.mean((1, 2)))
