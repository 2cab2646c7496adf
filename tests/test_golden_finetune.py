"""Fine-tuning agrees with the authors' code: student, losses, perturbation, gradients, the first SGD steps, the schedule."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_data import Golden, assert_close_per_image, nchw, nhwc, per_image, recipe_weights
from ml_collections import ConfigDict

from hast_jax import config as config_lib
from hast_jax import finetune, losses, models, promote, quant
from hast_jax.models import weights

pytestmark = pytest.mark.golden
KIND = "finetune"
HEADS = ("", "literal_head/")  # the scaled and the unscaled last layer


class Case:
    """One config of a file, such as w3a3_lam2000_eps0.02, with one head: networks, variables, distances."""

    def __init__(self, golden: Golden, name: str, head: str = "", dtype=np.float32):
        self.bits = int(re.match(r"w(\d)a(\d)", name)[1])
        activation_bits = int(re.match(r"w(\d)a(\d)", name)[2])
        self.group = name.split("_lam")[0]
        self.prefix = f"{name}/{head}".rstrip("/")
        self.config = fields(golden, name, self.group)
        classes = golden[f"{name}/logits"].shape[1]
        scale = 1.0 if head else float(golden[f"{self.group}/head_scale"])
        self.teacher = models.create("resnet20", classes)
        self.student = models.create("resnet20", classes, models.Precision(self.bits, activation_bits))
        self.variables = recipe_weights(self.teacher, int(golden["weight_seed"]), scale, dtype)
        self.images = nhwc(golden["x"].astype(dtype))
        self.frozen = finetune.Frozen(self.variables, golden_ranges(golden, self.group, dtype), self.images)
        self.between = finetune.distances(self.teacher, self.student, self.frozen, self.config)


def fields(golden: Golden, name: str, group: str) -> ConfigDict:
    config = config_lib.default().finetune
    config.lam, config.eps = float(re.search(r"lam([\d.]+)", name)[1]), float(re.search(r"eps([\d.]+)", name)[1])
    config.temperature, config.alpha = float(golden["temperature"]), float(golden["alpha"])
    config.momentum, config.weight_decay = float(golden["momentum"]), float(golden["weight_decay"])
    config.lr = float(golden[f"{group}/lr"])
    return config


def golden_ranges(golden: Golden, group: str, dtype) -> dict:
    """The stored frozen ranges as our `ranges` collection, by the authors' names of the activations."""
    flat = {}
    for name, low, high in zip(golden["act_names"], golden[f"{group}/x_min"], golden[f"{group}/x_max"]):
        parts = name.removeprefix("features.").split(".")
        path = ("init_activ",) if parts[0] == "init_block" else ("_".join(parts[:2]), "activ1" if "body" in parts else "activ")
        flat[(*path, "low")], flat[(*path, "high")] = jnp.asarray(low, dtype), jnp.asarray(high, dtype)
    return unflatten_dict(flat)


def cases(golden: Golden, head: str = "", dtype=np.float32) -> list[Case]:
    found = [Case(golden, name, head, dtype) for name in golden["configs"] if f"{name}/{head}logits" in golden]
    assert found or head
    return found


def tensors(golden: Golden, case: Case, group: str) -> dict[str, np.ndarray]:
    return golden.under(f"{case.prefix}/{group}")


def as_state_dict(case: Case, params) -> dict[str, np.ndarray]:
    return weights.to_state_dict(case.teacher, {"params": params, "batch_stats": case.variables["batch_stats"]})


def relative(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("head", HEADS)
def test_logits_of_teacher_and_student_agree(golden: Golden, head: str) -> None:
    for case in cases(golden, head):
        logits, _ = case.teacher.apply(case.variables, case.images)
        assert_close_per_image(logits, golden[f"{case.prefix}/teacher_logits"], 1e-4, 1e-4)
        logits, _ = case.student.apply({**case.variables, "ranges": case.frozen.ranges}, case.images)
        assert_close_per_image(logits, golden[f"{case.prefix}/logits"])


def test_integer_weights_agree(golden: Golden) -> None:
    for case in cases(golden):
        names = weights.name_map(case.teacher)
        flat = flatten_dict(case.variables)
        for layer, expected in golden.under(f"{case.group}/w_codes").items():
            kernel = flat[names[f"{layer}.weight"]]
            low, high = (f(kernel, range(kernel.ndim - 1), keepdims=True) for f in (jnp.min, jnp.max))
            codes = quant.quantize(kernel, *quant.scale_and_zero_point(low, high, case.bits), case.bits)
            codes = weights.to_torch_layout(np.asarray(codes)) + 2 ** (case.bits - 1)
            assert np.abs(codes - expected).max() <= 1 and np.mean(codes != expected) <= 1e-3, layer


def test_attention_of_the_first_step_agrees(golden: Golden) -> None:
    for case in cases(golden):
        _, teacher_taps = case.teacher.apply(case.variables, case.images)
        _, taps = case.student.apply({**case.variables, "ranges": case.frozen.ranges}, case.images)
        for who, branches in (("teacher", teacher_taps.branches), ("student", taps.branches)):
            stored = tensors(golden, case, f"ca_{who}")
            for expected, branch in zip(stored.values(), branches):
                assert_close_per_image(losses.attention(branch), expected)


@pytest.mark.parametrize("head", HEADS)
def test_image_gradients_of_kl_fa_and_both_agree_and_so_does_the_sign(golden: Golden, head: str) -> None:
    for case in cases(golden, head):
        _, pull_back = jax.vjp(case.between, case.variables["params"], case.images)
        for name, weight in (("KL", (1.0, 0.0)), ("FA", (0.0, 1.0)), ("KLFA", (1.0, 1.0))):
            if f"{case.prefix}/grad_{name}_img" in golden:
                gradient = nchw(pull_back(tuple(map(jnp.float32, weight)))[1])
                assert_close_per_image(gradient, golden[f"{case.prefix}/grad_{name}_img"])
        assert np.mean(np.sign(gradient) != golden[f"{case.prefix}/sign"]) <= 5e-3
        if f"{case.prefix}/sign_teacher_detached" in golden:
            assert np.mean(np.sign(gradient) != golden[f"{case.prefix}/sign_teacher_detached"]) > 0.1


def test_promoted_images_give_the_authors_logits(golden: Golden) -> None:
    for case in cases(golden):
        _, _, hard = promote.promote(case.between, case.variables["params"], case.images, case.config.eps, "kl+fa")
        np.testing.assert_allclose(np.abs(hard - case.images), case.config.eps, rtol=1e-3)
        logits, _ = case.student.apply({**case.variables, "ranges": case.frozen.ranges}, hard)
        expected = golden[f"{case.prefix}/logits_perturbed"]
        assert np.median(per_image(logits, expected)) < 2e-2 and per_image(logits, expected).max() < 0.2


@pytest.mark.parametrize("head", HEADS)
def test_the_losses_of_the_first_step_agree_in_double_precision(golden: Golden, head: str, x64: None) -> None:
    for case in cases(golden, head, np.float64):
        between = jax.jit(case.between)
        kl, fa = between(case.variables["params"], case.images)
        np.testing.assert_allclose(kl, golden[f"{case.prefix}/trace_loss_KL_f64"][0], rtol=1e-6)
        np.testing.assert_allclose(fa, golden[f"{case.prefix}/trace_loss_FA_f64"][0], rtol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_the_losses_of_the_first_step_agree(golden: Golden, head: str) -> None:
    for case in cases(golden, head):
        metrics, _ = jax.jit(lambda p, x: finetune.loss_and_gradient(case.between, p, x, case.config))(
            case.variables["params"], case.images
        )
        names = {"kl": "KL", "fa": "FA", "kl_promoted": "KL_perturbed", "fa_promoted": "FA_perturbed", "loss": "total"}
        for ours, theirs in names.items():
            key = f"{case.prefix}/trace_loss_{theirs}"
            np.testing.assert_allclose(metrics[ours], golden[key][0], rtol=5e-3, err_msg=key)


def test_gradients_and_parameters_of_the_first_sgd_steps_agree(golden: Golden) -> None:
    for case in cases(golden):
        gradient_of = jax.jit(lambda p: finetune.loss_and_gradient(case.between, p, case.images, case.config))
        transform = finetune.optimizer(case.config.lr, case.config.momentum, case.config.weight_decay)
        params = case.variables["params"]
        state = transform.init(params)
        for step in range(1, 6):
            metrics, gradient = gradient_of(params)
            tolerance = 5e-3 if step == 1 else 5e-2
            np.testing.assert_allclose(metrics["loss"], golden[f"{case.prefix}/trace_loss_total"][step - 1], rtol=tolerance)
            if step == 1:
                ours = as_state_dict(case, gradient)
                for name, expected in tensors(golden, case, "grad").items():
                    assert relative(ours[name], expected) < 2e-2, name
            updates, state = transform.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            start, ours = as_state_dict(case, case.variables["params"]), as_state_dict(case, params)
            for name, expected in tensors(golden, case, f"p{step}").items():
                moved, wanted = ours[name] - start[name], expected - start[name]
                assert relative(moved, wanted) < (2e-2 if step == 1 else 0.2), (step, name)


def test_the_optimizer_is_pytorchs_sgd(golden: Golden, x64: None) -> None:
    momentum, decay = float(golden["momentum"]), float(golden["weight_decay"])
    transform = finetune.optimizer(float(golden["sgd/lr"]), momentum, decay)
    params = jnp.asarray(golden["sgd/p0"], jnp.float64)
    state = transform.init(params)
    for gradient, expected in zip(golden["sgd/g"], golden["sgd/p_f64"]):
        updates, state = transform.update(jnp.asarray(gradient, jnp.float64), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, expected, rtol=1e-10)


def test_the_learning_rate_drops_with_the_authors_epochs(golden: Golden) -> None:
    """The authors count 4 epochs of calibration, so that fine-tuning begins with their epoch 4."""
    expected = golden["lr_policy/lr"]
    config = config_lib.default().finetune
    config.lr = float(expected[0])
    schedule = finetune.learning_rate(config)
    for epoch in range(config.epochs):
        for step in (0, config.steps_per_epoch - 1):
            rate = schedule(epoch * config.steps_per_epoch + step)
            np.testing.assert_allclose(rate, expected[min(epoch + 4, len(expected) - 1)], rtol=1e-5)
