"""A small DenseNet in plain Flax, the example of docs/your_network.md."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class DenseNet(nn.Module):
    """Each convolution reads the outputs of all convolutions before it."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images [batch, height, width, channels] -> logits [batch, classes]."""
        for _ in range(2):
            for _ in range(4):
                y = nn.Conv(8, (3, 3), use_bias=False)(x)
                y = nn.silu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(y))
                x = jnp.concatenate([x, y], -1)
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.classes, name="output")(x.mean((1, 2)))


def torch_names(path: tuple[str, ...]) -> str:
    """The name of a variable in a PyTorch file: ("params", "Conv_3", "kernel") -> "layers.conv3.weight", for example."""
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return ".".join(["layers", path[1].lower().replace("_", ""), leaves[path[-1]]])
