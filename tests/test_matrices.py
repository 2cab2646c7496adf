"""Weights outside of layers: those that multiply and add activations are found; those used elementwise are no obstacle."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_refused_networks import IMAGE, Base, refused

from hast_jax import networks
from hast_jax.errors import Notice
from hast_jax.networks import rules


def _depthwise(x, w):
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(padded[:, i : i + 8, j : j + 8] * w[i, j][None, None, None] for i in range(3) for j in range(3))


def _by_frequency(x, w):
    return jnp.fft.ifft2(jnp.fft.fft2(x, axes=(1, 2)) * jnp.fft.fft2(w, axes=(1, 2)), axes=(1, 2)).real


PRODUCTS = {  # ways to multiply activations with weights -> the shape of the weights
    "a matrix of a vector": ((16,), lambda x, w: x @ w.reshape(4, 4)),
    "a sum with a matrix of a vector": ((16,), lambda x, w: (x[..., None] * w.reshape(1, 1, 1, 4, 4)).sum(-2)),
    "a vector over positions": ((64,), lambda x, w: (x.reshape(len(x), 64, 4) * w[None, :, None]).sum(1)),
    "a sum": ((1, 1, 1, 4, 4), lambda x, w: (x[..., None] * w).sum(-2)),
    "a sum in bfloat16": ((1, 1, 1, 4, 4), lambda x, w: (x[..., None] * w.astype(jnp.bfloat16)).astype(jnp.float32).sum(-2)),
    "a sum of repeated activations": ((1, 1, 1, 4, 4), lambda x, w: (jnp.repeat(x[..., None], 4, -1) * w).sum(-2)),
    "a sum of windows": ((1, 1, 1, 3, 4), lambda x, w: (jnp.stack([x, x, x], -2) * w).sum(-2)),
    "a depthwise convolution": ((3, 3, 4), _depthwise),
    "a weighted pooling": ((1, 8, 8, 1), lambda x, w: (x * w).sum((1, 2), keepdims=True)),
    "frequencies": ((1, 8, 8, 4), _by_frequency),
    "an equation": ((4, 4), lambda x, w: jnp.linalg.solve(w, x.reshape(-1, 4).T).T.reshape(x.shape)),
    "distances": ((1, 1, 1, 6, 4), lambda x, w: ((x[..., None, :] - w) ** 2).sum(-1)),
    "rows of a table": ((2, 4), lambda x, w: x * w[0][None, None, None] + jnp.roll(x, 1, 1) * w[1][None, None, None]),
    "differences of rows": (
        (6, 4),
        lambda x, w: jnp.stack([jnp.abs(x - w[i][None, None, None]).sum(-1) for i in range(6)], -1),
    ),
    "a loop": ((4, 4), lambda x, w: jax.lax.fori_loop(0, 2, lambda _, y: y @ w, x)),
}
OTHERS = {  # ways to use weights elementwise -> the shape of the weights
    "a position": ((1, 8, 8, 4), lambda x, w: x + w),
    "a scale of each position": ((1, 8, 8, 4), lambda x, w: jnp.tanh(x * w)),
    "a scale of each channel": ((4,), lambda x, w: (x * w[None, None, None]).sum((1, 2), keepdims=True)),
    "a bound": ((1, 8, 8, 4), jnp.maximum),
    "a mask": ((1, 8, 8, 1), lambda x, w: nn.relu(x * nn.sigmoid(w))),
    "a part of the positions": ((1, 9, 9, 4), lambda x, w: x + w[:, 1:, :-1]),
    "resized positions": ((1, 4, 4, 4), lambda x, w: x + jax.image.resize(w, (1, 8, 8, 4), "bilinear")),
    "a row of a table": ((3, 4), lambda x, w: x + w[1][None, None, None]),
    "more channels": ((1, 8, 8, 4), lambda x, w: jnp.concatenate([x, jnp.broadcast_to(w, x.shape)], -1)),
    "another row": ((1, 1, 1, 4), lambda x, w: jnp.concatenate([x, jnp.broadcast_to(w, (len(x), 1, 8, 4))], 1)),
}


class Outside(Base):
    way: str = ""
    collection: str = "params"

    def middle(self, x):
        shape, use = (PRODUCTS | OTHERS)[self.way]
        if self.collection != "params":
            return use(x, self.variable(self.collection, "mixing", lambda: jax.random.normal(jax.random.key(0), shape)).value)
        return use(x, self.param("mixing", nn.initializers.normal(), shape))


class OtherNorms(Base):
    def middle(self, x):
        x = nn.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3))(x)
        return nn.PReLU()(nn.InstanceNorm()(nn.GroupNorm(2)(nn.RMSNorm()(x))))


class Sows(Base):
    def middle(self, x):
        self.sow("losses", "l2", jnp.sum(x**2))
        self.variable("state", "pair", lambda: (jnp.zeros(2), jnp.ones(3)))
        return x


@pytest.mark.parametrize("way", PRODUCTS)
def test_weights_outside_of_layers_that_multiply_and_add_are_found_however_this_is_written(way: str) -> None:
    refused(Outside(way), r"weights that nothing quantizes \(mixing\)")
    with pytest.warns(Notice, match="Outside multiplies activations with constants/mixing, which stays in full precision"):
        networks.create(Outside(way, "constants"), IMAGE, rules=rules.normalise("w4a4"))


@pytest.mark.parametrize(
    "module", [*map(Outside, OTHERS), OtherNorms(), Sows()], ids=[*OTHERS, "other normalisations", "sown values and pairs"]
)
def test_weights_that_are_used_elementwise_are_no_matrices(module: nn.Module) -> None:
    student = networks.create(module, IMAGE, rules=rules.normalise("w4a4"))
    assert [layer.path for layer in student.kernels] == [("stem",), ("head",)]
    assert not student.structure.others


def test_a_rule_may_name_weights_that_need_none() -> None:
    """Saved students have such rules, from versions that asked for them."""
    networks.create(Outside("a position"), IMAGE, rules=rules.normalise({"default": "w4a4", "mixing": None}))
    refused(Outside("a position"), "the rule 'stem/kernel' names no layer", {"default": "w4a4", "stem/kernel": None})


class WithConstant(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(10)((x @ jnp.asarray(np.eye(4, dtype=np.float32))).mean((1, 2)))


class Resized(nn.Module):
    """The weights of the interpolation are computed, and no arrays of the network."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(10)(jax.image.resize(x, (*x.shape[:1], 5, 5, 4), "bilinear").mean((1, 2)))


def test_arrays_that_are_no_variables_stay_in_full_precision_with_a_notice() -> None:
    with pytest.warns(Notice, match="WithConstant multiplies activations with arrays that are not among its variables"):
        networks.create(WithConstant(), IMAGE, rules=rules.normalise("w4a4"))


def test_weights_that_the_network_computes_from_nothing_need_no_notice() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        networks.create(Resized(), IMAGE, rules=rules.normalise("w4a4"))
