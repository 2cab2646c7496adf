"""ResNet-20 agrees with the authors' network: logits, moments of every BN input, attention of every residual branch."""

from typing import Any

import numpy as np
import pytest
from golden_data import Golden, assert_agrees, forward, nhwc, recipe_weights, state_dict, teacher_of
from jax import numpy as jnp

from hast_jax.method import losses

pytestmark = pytest.mark.golden
KIND = r"resnet20_\w+_teacher"


def setting(golden: Golden, dtype: type = np.float32) -> tuple[Any, Any, Any]:
    """Network, variables and images."""
    network = teacher_of("resnet20", golden["logits"].shape[1])
    variables = recipe_weights(network, int(golden["weight_seed"]), dtype=dtype)
    return network, variables, nhwc(golden["x"].astype(dtype))


def test_the_recipe_fills_the_weights_that_the_file_holds(golden: Golden) -> None:
    network, variables, _ = setting(golden)
    state = state_dict(network, variables)
    stored = golden.under("w")
    stored = {name: array for name, array in stored.items() if not name.endswith("num_batches_tracked")}
    assert stored.keys() <= state.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)


def test_logits_agree(golden: Golden) -> None:
    logits, _ = forward(*setting(golden))
    assert_agrees(golden, "logits", logits)


def test_logits_agree_in_double_precision(golden: Golden, x64: None) -> None:
    logits, _ = forward(*setting(golden, np.float64))
    assert logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, golden["logits_f64"], rtol=1e-8, atol=1e-8)


def test_the_taps_are_the_inputs_of_the_batch_norms_in_order_of_execution(golden: Golden) -> None:
    network, variables, images = setting(golden)
    state = state_dict(network, variables)
    _, taps = forward(network, variables, images)
    names = golden["bn_names"][golden["bn_exec_order"]]
    assert len(taps.batch_norms) == len(names)
    for name, tap in zip(names, taps.batch_norms):
        np.testing.assert_array_equal(tap.mean, state[f"{name}.running_mean"])
        np.testing.assert_array_equal(tap.var, state[f"{name}.running_var"])
        mean, var = golden[f"bn_mean/{name}"], golden[f"bn_var/{name}"]
        np.testing.assert_allclose(tap.inputs.mean((0, 1, 2)), mean, rtol=1e-4, atol=1e-5 * np.sqrt(var.max()))
        np.testing.assert_allclose(tap.inputs.var((0, 1, 2)), var, rtol=1e-4)


def test_moments_of_every_batch_norm_agree_in_double_precision(golden: Golden, x64: None) -> None:
    _, taps = forward(*setting(golden, np.float64))
    names = golden["bn_names"][golden["bn_exec_order"]]
    assert_agrees(golden, "bn_mean", {name: tap.inputs.mean((0, 1, 2)) for name, tap in zip(names, taps.batch_norms)})
    assert_agrees(golden, "bn_var", {name: tap.inputs.var((0, 1, 2)) for name, tap in zip(names, taps.batch_norms)})


def test_channel_attention_agrees(golden: Golden) -> None:
    _, taps = forward(*setting(golden))
    assert len(taps.branches) == len(golden["unit_names"])
    assert_agrees(golden, "ca", {name: losses.attention(f) for name, f in zip(golden["unit_names"], taps.branches)})


def test_channel_attention_agrees_in_double_precision(golden: Golden, x64: None) -> None:
    _, taps = forward(*setting(golden, np.float64))
    assert_agrees(golden, "ca", {name: losses.attention(f) for name, f in zip(golden["unit_names"], taps.branches)})
