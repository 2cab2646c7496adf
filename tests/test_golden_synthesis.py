"""Synthesis agrees with the authors' code: objective, gradients, Adam, plateau schedule, the first iterations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_data import Golden, assert_close_per_image, nchw, nhwc, recipe_weights
from ml_collections import ConfigDict

from hast_jax import config as config_lib
from hast_jax import networks
from hast_jax.method import losses
from hast_jax.stages import synthesize

pytestmark = pytest.mark.golden
KIND = "synthesis"


def beta_and_gamma(name: str) -> tuple[float, float]:
    beta, gamma = name.split("_")
    return float(beta.removeprefix("b")), float(gamma.removeprefix("g"))


def setting(golden: Golden, name: str, *, scaled: bool = False, dtype=np.float32):
    """Network, variables, labels and prefix of a config, with the unscaled or the scaled head."""
    # The number of classes is not stored: it is at least that of the edge cases' logits.
    model = networks.create("resnet20", golden["edge/logits"].shape[1])
    scale = float(golden["head_scale"]) if scaled else 1.0
    variables = recipe_weights(model, int(golden["weight_seed"]), scale, dtype)
    labels = golden["labels_scaled_head" if scaled else "labels"]
    return model, variables, jnp.asarray(labels), f"{name}/scaled_head" if scaled else name


def parts_at_start(golden: Golden, name: str, scaled: bool, dtype=np.float32):
    """{golden's name of a loss: (value, image gradient [n, channels, height, width])} at iteration 0."""
    beta, gamma = beta_and_gamma(name)
    model, variables, labels, _ = setting(golden, name, scaled=scaled, dtype=dtype)
    config = ConfigDict({"beta": beta, "gamma": gamma, "micro_batch": 0, "remat": False})

    def values(images):
        loss, parts = synthesize.objective(images, labels, model, variables, config)
        hard = beta * parts["hard"]  # the authors' trace holds it with its weight
        return {"mean_loss": parts["bn_mean"], "var_loss": parts["bn_var"], "loss_target": hard, "total_loss": loss}

    x0 = nhwc(golden["x0"].astype(dtype))
    value, gradient = jax.jit(values)(x0), jax.jit(jax.jacrev(values))(x0)
    return {key: (float(value[key]), nchw(gradient[key])) for key in value}


@pytest.mark.parametrize("scaled", [False, True])
def test_each_part_of_the_objective_and_its_gradient_agree(golden: Golden, scaled: bool) -> None:
    for name in golden["configs"]:
        prefix = f"{name}/scaled_head" if scaled else name
        for key, (value, gradient) in parts_at_start(golden, name, scaled).items():
            traced = golden[f"{prefix}/trace_{key}"][0] if f"{prefix}/trace_{key}" in golden else None
            if traced is not None:
                np.testing.assert_allclose(value, traced, rtol=1e-5)
            if f"{prefix}/grad_{key}" in golden:
                assert_close_per_image(gradient, golden[f"{prefix}/grad_{key}"])


def test_the_hard_sample_loss_is_finite_and_right_where_p_is_0_or_1(golden: Golden) -> None:
    golden.need("edge")
    logits, labels = jnp.asarray(golden["edge/logits"]), jnp.asarray(golden["edge/labels"])
    for prefix in golden.groups(r"edge/b[^/]+"):
        beta, gamma = beta_and_gamma(prefix.removeprefix("edge/"))
        for rows, suffix in ((slice(None), ""), (slice(1, None), "_without_row0")):
            loss, gradient = jax.value_and_grad(losses.hard_sample)(logits[rows], labels[rows], gamma)
            assert np.isfinite(gradient).all()
            np.testing.assert_allclose(beta * loss, golden[f"{prefix}/loss_target{suffix}"], rtol=1e-5)
            expected = golden[f"{prefix}/grad_logits{suffix}"]
            known = np.isfinite(expected)  # the authors' gradient is NaN for gamma < 1 where p = 1
            np.testing.assert_allclose(np.where(known, beta * gradient, 0), np.where(known, expected, 0), rtol=1e-4, atol=1e-6)


def config_of(name: str) -> ConfigDict:
    config = config_lib.default().synthesis
    config.beta, config.gamma = beta_and_gamma(name)
    return config


def first_steps(golden: Golden, name: str, count: int, scaled: bool, dtype=np.float32):
    """States and metrics of the first `count` iterations from the golden images."""
    model, variables, labels, _ = setting(golden, name, scaled=scaled, dtype=dtype)
    config, key = config_of(name), jax.random.key(0)
    images = nhwc(golden["x0"].astype(dtype))
    state = synthesize.init(jnp.int32(0), key, images.shape, int(labels.max()) + 1, config)
    state = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    state = state._replace(images=images, labels=labels)
    step = jax.jit(lambda s, v: synthesize.step(s, v, model, key, config))
    for _ in range(count):
        state, metrics = step(state, variables)
        yield state, {k: float(v) for k, v in metrics.items()}


def factors(beta: float) -> dict[str, tuple[str, float]]:
    """Our name of a metric -> the trace's, and what it is multiplied by there."""
    traces = {"bn_mean": "mean_loss", "bn_var": "var_loss", "loss": "total_loss", "lr": "lr", "accuracy": "d_acc"}
    return {**{ours: (theirs, 1.0) for ours, theirs in traces.items()}, "hard": ("loss_target", beta)}


@pytest.mark.parametrize("scaled", [False, True])
def test_the_first_30_iterations_agree_in_double_precision(golden: Golden, scaled: bool, x64: None) -> None:
    """Where nothing is rounded, Adam's chaos has nothing to start from."""
    for config in golden["configs"]:
        prefix = f"{config}/scaled_head" if scaled else config
        for i, (_, metrics) in enumerate(first_steps(golden, config, 30, scaled, np.float64)):
            for ours, (theirs, factor) in factors(beta_and_gamma(config)[0]).items():
                key = f"{prefix}/trace_{theirs}"
                exact = f"{key}_f64" if f"{key}_f64" in golden else key
                np.testing.assert_allclose(factor * metrics[ours], golden[exact][i], rtol=1e-9, err_msg=f"{exact} {i}")


def test_the_first_adam_step_gives_the_authors_images(golden: Golden) -> None:
    for name in (name for name in golden["configs"] if f"{name}/x1" in golden):
        ((state, _),) = first_steps(golden, name, 1, scaled=False)
        assert np.mean(np.abs(nchw(state.images) - golden[f"{name}/x1"]) > 1e-3) <= 4e-3


@pytest.mark.parametrize("scaled", [False, True])
def test_the_losses_of_the_first_20_iterations_agree(golden: Golden, scaled: bool) -> None:
    """Adam at a rate of 0.5 is chaotic: losses agree closely at first, then within a few per cent."""
    for config in golden["configs"]:
        prefix = f"{config}/scaled_head" if scaled else config
        for i, (_, metrics) in enumerate(first_steps(golden, config, 20, scaled)):
            for ours, (theirs, factor) in factors(beta_and_gamma(config)[0]).items():
                key = f"{prefix}/trace_{theirs}"
                tolerance = 1e-3 if i < 3 else 0.1
                np.testing.assert_allclose(
                    factor * metrics[ours], golden[key][i], rtol=tolerance, atol=1e-3, err_msg=f"{key} {i}"
                )


def test_the_plateau_schedule_is_pytorchs(golden: Golden, x64: None) -> None:
    golden.need("plateau")
    config = config_lib.default().synthesis
    for group in golden.groups(r"plateau/[^/]+"):
        trace = golden.under(group)
        lr = float(trace["lr_used"][0])
        plateau = synthesize.Plateau(jnp.float64(lr), jnp.float64(np.inf), jnp.int32(0))
        update = jax.jit(lambda p, loss: synthesize.plateau_update(p, loss, config))
        for i, loss in enumerate(trace["loss"]):
            np.testing.assert_allclose(plateau.lr, trace["lr_used"][i], rtol=1e-12)
            plateau = update(plateau, jnp.float64(loss))
            np.testing.assert_allclose(plateau.lr, trace["lr_after"][i], rtol=1e-12)
            np.testing.assert_allclose(plateau.best, trace["best"][i], rtol=1e-12)
            assert plateau.bad == trace["num_bad_epochs"][i]


def test_adam_is_pytorchs(golden: Golden, x64: None) -> None:
    golden.need("adam")
    transform = optax.scale_by_adam()
    params = jnp.asarray(golden["adam/p0"], jnp.float64)
    state = transform.init(params)
    for gradient, expected in zip(golden["adam/g"], golden["adam/p_f64"]):
        update, state = transform.update(jnp.asarray(gradient, jnp.float64), state)
        params = params - float(golden["adam/lr"]) * update
        np.testing.assert_allclose(params, expected, rtol=1e-9, atol=1e-12)
