"""Networks of flax.nnx, of 8 x 8 images with three channels and ten classes, for the tests."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

IMAGE = (8, 8, 3)


class Base(nnx.Module):
    """A network that can be quantized; those below change one thing."""

    def __init__(self, num_classes: int = 10, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.add(rngs)
        self.head = nnx.Linear(4, num_classes, rngs=rngs)

    def add(self, rngs: nnx.Rngs) -> None:
        pass

    def middle(self, x):
        return x

    def __call__(self, x):
        return self.head(self.middle(nnx.relu(self.norm(self.stem(x)))).mean((1, 2)))


class ManyKinds(Base):
    def add(self, rngs):
        grouped = nnx.Conv(4, 4, (3, 3), feature_group_count=4, padding="CIRCULAR", rngs=rngs)
        self.named = nnx.Dict(
            grouped=grouped,
            strided=nnx.Conv(4, 8, (3, 3), strides=2, kernel_dilation=2, padding=((1, 2), (0, 1)), use_bias=False, rngs=rngs),
        )
        self.listed = nnx.List([nnx.LinearGeneral(8, 6, rngs=rngs), nnx.relu, nnx.List([nnx.Linear(6, 6, rngs=rngs)])])
        self.product = nnx.Einsum("nhwc,cd->nhwd", (6, 4), (4,), rngs=rngs)
        self.group_norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.slope, self.drop = nnx.PReLU(), nnx.Dropout(0.5, rngs=rngs)
        self.own = nnx.Sequential(
            nnx.BatchNorm(4, use_bias=False, epsilon=0.1, momentum=0.9, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        )
        self.gain, self.factor = nnx.Param(jnp.full((1, 1, 1, 4), 1.5)), nnx.Cache(jnp.float32(2))

    def middle(self, x):
        x = self.listed[0](self.named.strided(self.named["grouped"](x)))
        x = self.drop(self.slope(self.group_norm(self.product(self.listed[2][0](self.listed[1](x))))))
        return self.own(x) * self.gain[...] * self.factor[...]


class Shared(Base):
    def add(self, rngs):
        self.again = self.norm

    def middle(self, x):
        return nnx.relu(self.again(self.norm(x)))


class Switched(Base):
    def __call__(self, x, train):
        return {"logits": self.head(nnx.relu(self.norm(self.stem(x), use_running_average=not train)).mean((1, 2))), "input": x}


class TakenNames(Base):
    """Members called as methods and fields of a Linen module."""

    def add(self, rngs):
        self.name, self.init = nnx.List([nnx.Linear(4, 4, rngs=rngs)]), nnx.Linear(4, 4, rngs=rngs)
        self.part = nnx.Param(jnp.float32(2))

    def middle(self, x):
        return self.init(self.name[0](x)) * self.part[...]


class Bfloat16(Base):
    def add(self, rngs):
        self.conv = nnx.Conv(4, 4, 3, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)

    def middle(self, x):
        return jnp.asarray(self.conv(x), jnp.float32)


class Counting(Base):
    """Changes a variable in each call."""

    def add(self, rngs):
        self.calls = nnx.Variable(jnp.float32(0))

    def middle(self, x):
        self.calls[...] += 1
        return x * self.calls[...]


class OwnClass(nnx.Conv):
    """Differs from its base in the constructor alone."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        super().__init__(channels, channels, (3, 3), rngs=rngs)


class OfOwnClass(Base):
    def add(self, rngs):
        self.conv = OwnClass(4, rngs)

    def middle(self, x):
        return self.conv(x)


def sequential(rngs: nnx.Rngs) -> nnx.Module:
    pool = nnx.Sequential(nnx.relu, lambda x: x.mean((1, 2)))
    return nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs), pool, nnx.Linear(4, 10, rngs=rngs))


WORKING: list[Callable[..., nnx.Module]] = [
    *(Base, ManyKinds, Shared, Switched, TakenNames, Bfloat16, Counting, OfOwnClass),
    sequential,
]


def trained(make: Callable[..., nnx.Module], seed: int = 0) -> nnx.Module:
    """A network whose weights, and moments of batch norms, are far from those of a fresh one. It is left in training mode."""
    model = make(rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)

    def far(variable):
        value = variable.get_value()
        new = rng.uniform(0.5, 1.5, value.shape) * (value + rng.normal(size=value.shape) / 5)
        variable.set_value(jnp.asarray(np.abs(new) if isinstance(variable, nnx.BatchStat) else new, value.dtype))

    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param | nnx.BatchStat):
            far(variable)
    return model
