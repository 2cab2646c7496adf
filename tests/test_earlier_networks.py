"""Networks that were written for version 0.1, of its own layers and with its taps, still work."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from hast_jax import networks
from hast_jax.errors import UserError
from hast_jax.models import weights
from hast_jax.models.layers import FULL_PRECISION, Activation, BatchNorm, Conv, ConvNorm, Dense, Precision, Taps
from hast_jax.networks import rules


class Net(nn.Module):
    classes: int
    precision: Precision = FULL_PRECISION
    function: str = "silu"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, Taps]:
        bits = self.precision.weights
        x, first = ConvNorm(8, 3, bits=bits, name="stem")(x, train)
        x = Activation(self.precision, self.function, name="activ")(x)
        y, second = BatchNorm(epsilon=1e-3, name="bn")(Conv(8, 4, 2, bits=bits, groups=4, use_bias=True, name="conv")(x), train)
        y = Activation(self.precision, name="activ2")(y)
        return Dense(self.classes, bits, name="output")(y.mean((1, 2))), Taps((first, second), (y,))


IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


@pytest.mark.slow
def test_a_network_of_version_0_1_is_quantized_at_its_activations() -> None:
    variables = Net(10).init(jax.random.key(0), IMAGES)
    assert variables["params"]["stem"].keys() == {"conv", "bn"} and variables["params"]["conv"]["kernel"].shape == (4, 4, 2, 8)
    student = networks.create(Net(10), (8, 8, 3), rules=rules.normalise("w3a3"))
    ranges = networks.observe(student, variables, {}, IMAGES)
    assert ranges.keys() == {"activ", "activ2"}
    _, taps = networks.apply(student, {**variables, "ranges": ranges}, IMAGES)
    assert len(taps.batch_norms) == 2 and all(len(np.unique(a)) <= 8 for a in taps.activations.values())
    full, _ = networks.apply(networks.create(Net(10), (8, 8, 3)), variables, IMAGES)
    np.testing.assert_allclose(full, Net(10).apply(variables, IMAGES)[0], rtol=1e-5, atol=1e-6)


def test_the_weights_of_a_network_of_version_0_1_keep_their_names() -> None:
    variables = Net(10).init(jax.random.key(0), IMAGES)
    state = weights.to_state_dict(Net(10), variables, (8, 8, 3))
    assert "params/stem/conv/kernel" in state and "batch_stats/bn/mean" in state
    again = weights.from_state_dict(Net(10), state, (8, 8, 3))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, dict(variables)))


def test_an_unknown_activation_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match="the activation 'tanhh' is unknown: choose from relu, relu6"):
        networks.create(Net(10, function="tanhh"), (8, 8, 3))
    with pytest.raises(UserError, match="gives one logit"):
        networks.create(Net(1), (8, 8, 3))
