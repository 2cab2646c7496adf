"""Networks of a stranger and random weights for them, which the tests of weight files read."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from hast_jax.networks import weights

IMAGE = (6, 6, 2)
CALL = {"train": False}
H5PY = "Keras' files need h5py: pip install 'hast_jax[keras]'"


class Block(nn.Module):
    """Depthwise, as Keras' `DepthwiseConv2D(3, depth_multiplier=2)`, and a batch norm with some of its parts."""

    scale: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        x = nn.Conv(2 * channels, (3, 3), feature_group_count=channels, use_bias=False, name="dw")(x)
        return nn.BatchNorm(not train, use_scale=self.scale, epsilon=1e-3, name="bn")(x)


class Net(nn.Module):
    """A network of a stranger: `train` has no default, and it returns logits alone."""

    scale: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(4, (3, 3), 2, name="stem")(x)
        x = nn.relu(Block(self.scale, name="block")(x, train))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Plain(nn.Module):
    """Without batch norm."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dense(3, name="head")(nn.Conv(4, (3, 3), name="stem")(x).mean((1, 2)))


class Renamed(nn.Module):
    """`Plain` with other names."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dense(3, name="last")(nn.Conv(4, (3, 3), name="first")(x).mean((1, 2)))


NET = Net()


def values(model: nn.Module = NET, seed: int = 0) -> dict[str, Any]:
    """Random variables of a network, as NumPy's arrays; each one is another."""
    random = np.random.default_rng(seed)
    shapes = weights.abstract_variables(model, IMAGE, CALL)
    return jax.tree.map(lambda leaf: random.uniform(0.1, 1, leaf.shape).astype(np.float32), shapes)


def by_name(variables: Any) -> dict[str, np.ndarray]:
    return flatten_dict(variables, sep="/")


def take(state: Any, model: nn.Module = NET, **arguments: Any) -> Any:
    return weights.from_state_dict(model, state, IMAGE, call=CALL, **arguments)


def load(path: Path, model: nn.Module = NET, **arguments: Any) -> Any:
    return take(weights.read(weights.locate(str(path)))[0], model, **arguments)


def same(ours: Any, theirs: Any) -> bool:
    ours, theirs = by_name(ours), by_name(theirs)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
