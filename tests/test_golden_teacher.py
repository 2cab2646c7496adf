"""ResNet-20 agrees with the authors' network: logits, moments of every BN input, attention of every residual branch."""

import numpy as np
import pytest
from golden_data import Golden, nhwc, recipe_weights
from jax import numpy as jnp

from hast_jax import networks
from hast_jax.method import losses
from hast_jax.networks import weights

pytestmark = pytest.mark.golden
KIND = r"resnet20_\w+_teacher"


def network(golden: Golden) -> networks.ResNet:
    return networks.create("resnet20", golden["logits"].shape[1])


def test_the_recipe_fills_the_weights_that_the_file_holds(golden: Golden) -> None:
    model = network(golden)
    state = weights.to_state_dict(model, recipe_weights(model, int(golden["weight_seed"])))
    stored = golden.under("w")
    stored = {name: array for name, array in stored.items() if not name.endswith("num_batches_tracked")}
    assert stored.keys() <= state.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)


def test_logits_agree(golden: Golden) -> None:
    model = network(golden)
    logits, _ = model.apply(recipe_weights(model, int(golden["weight_seed"])), nhwc(golden["x"]))
    scale = np.abs(golden["logits"]).max()
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-4, atol=1e-5 * scale)


def test_logits_agree_in_double_precision(golden: Golden, x64: None) -> None:
    model = network(golden)
    variables = recipe_weights(model, int(golden["weight_seed"]), dtype=np.float64)
    logits, _ = model.apply(variables, nhwc(golden["x"].astype(np.float64)))
    assert logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, golden["logits_f64"], rtol=1e-8, atol=1e-8)


def test_the_taps_are_the_inputs_of_the_batch_norms_in_order_of_execution(golden: Golden) -> None:
    model = network(golden)
    variables = recipe_weights(model, int(golden["weight_seed"]))
    state = weights.to_state_dict(model, variables)
    _, taps = model.apply(variables, nhwc(golden["x"]))
    names = golden["bn_names"][golden["bn_exec_order"]]
    assert len(taps.batch_norms) == len(names)
    for name, tap in zip(names, taps.batch_norms):
        mean, var = golden[f"bn_mean/{name}"], golden[f"bn_var/{name}"]
        np.testing.assert_allclose(tap.inputs.mean((0, 1, 2)), mean, rtol=1e-4, atol=1e-5 * np.sqrt(var.max()))
        np.testing.assert_allclose(tap.inputs.var((0, 1, 2)), var, rtol=1e-4)
        np.testing.assert_array_equal(tap.mean, state[f"{name}.running_mean"])
        np.testing.assert_array_equal(tap.var, state[f"{name}.running_var"])


def test_channel_attention_agrees(golden: Golden) -> None:
    model = network(golden)
    _, taps = model.apply(recipe_weights(model, int(golden["weight_seed"])), nhwc(golden["x"]))
    assert len(taps.branches) == len(golden["unit_names"])
    for name, branch in zip(golden["unit_names"], taps.branches):
        np.testing.assert_allclose(losses.attention(branch), golden[f"ca/{name}"], rtol=1e-4, atol=1e-6)
