"""Fine-tuning agrees with the authors' code: student, losses, perturbation, gradients, the first SGD steps, the schedule."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_data import Golden, assert_close_per_image, nchw, nhwc, per_image, recipe_weights
from ml_collections import ConfigDict

from hast_jax import config as config_lib
from hast_jax import networks
from hast_jax.method import losses, promotion, quantizer
from hast_jax.networks import weights
from hast_jax.stages import finetune

pytestmark = pytest.mark.golden
KIND = "finetune"
HEADS = ("", "literal_head/")  # the scaled and the unscaled last layer
LOSSES = {"kl": "KL", "fa": "FA", "kl_promoted": "KL_perturbed", "fa_promoted": "FA_perturbed", "loss": "total"}


class Case(NamedTuple):
    """One config of a file, such as w3a3_lam2000_eps0.02, with one head."""

    prefix: str  # of its keys
    group: str  # of the keys that it shares with other lam and eps, such as w3a3
    bits: tuple[int, int]
    classes: int
    config: ConfigDict
    variables: Any
    ranges: Any
    images: jax.Array

    @property
    def teacher(self) -> networks.ResNet:
        return networks.create("resnet20", self.classes)

    def look(self, params: Any = None) -> dict[str, Any]:
        """All that one step computes, at the given parameters of the student."""
        params = self.variables["params"] if params is None else params
        look = compiled(self.bits, self.classes)
        config = config_lib.default()
        config.finetune.lam, config.finetune.eps = self.config.lam, self.config.eps
        labels = jnp.zeros(len(self.images), jnp.int32)  # in no loss of the method
        return look(params, finetune.freeze(self.variables, self.ranges, self.images, labels, config))


@functools.cache
def compiled(bits: tuple[int, int], classes: int):
    teacher, student = networks.create("resnet20", classes), networks.create("resnet20", classes, networks.Precision(*bits))

    @jax.jit
    def look(params, frozen):
        config = config_lib.default().finetune
        between = finetune.distances(teacher, student, frozen, frozen.labels, config)
        images, student_variables = frozen.images, {**frozen.teacher, "params": params, "ranges": frozen.ranges}
        teacher_logits, teacher_taps = teacher.apply(frozen.teacher, images)
        logits, taps = student.apply(student_variables, images)
        found = {
            "teacher_logits": teacher_logits,
            "logits": logits,
            "attention_teacher": [losses.attention(f) for f in teacher_taps.branches],
            "attention_student": [losses.attention(f) for f in taps.branches],
        }
        for name, parts in (("KL", ["kl"]), ("FA", ["fa"]), ("KLFA", ["kl", "fa"])):
            scalar = lambda x: sum(between(params, x)[part] for part in parts)
            found[f"grad_{name}_img"] = jax.grad(scalar)(images)
        _, _, found["hard_images"] = promotion.promote(between, params, images, frozen.strengths.eps, "kl+fa")
        found["logits_perturbed"], _ = student.apply(student_variables, found["hard_images"])
        found["teacher_logits_perturbed"], _ = teacher.apply(frozen.teacher, found["hard_images"])
        found["metrics"], found["gradient"] = finetune.loss_and_gradient(between, params, images, frozen.strengths, config)
        return found

    return look


@functools.lru_cache(maxsize=16)
def case_of(golden: Golden, name: str, head: str, dtype: type) -> Case:
    weight_bits, activation_bits = map(int, re.match(r"w(\d)a(\d)", name).groups())
    group, classes = name.split("_lam")[0], golden[f"{name}/logits"].shape[1]
    config = config_lib.default().finetune
    config.lam, config.eps = float(re.search(r"lam([\d.]+)", name)[1]), float(re.search(r"eps([\d.]+)", name)[1])
    config.momentum, config.weight_decay = float(golden["momentum"]), float(golden["weight_decay"])
    config.lr = float(golden[f"{group}/lr"])
    assert (golden["temperature"], golden["alpha"]) == (config.temperature, config.alpha)
    scale = 1.0 if head else float(golden[f"{group}/head_scale"])
    variables = recipe_weights(networks.create("resnet20", classes), int(golden["weight_seed"]), scale, dtype)
    return Case(
        prefix=f"{name}/{head}".rstrip("/"),
        group=group,
        bits=(weight_bits, activation_bits),
        classes=classes,
        config=config,
        variables=variables,
        ranges=golden_ranges(golden, group, dtype),
        images=nhwc(golden["x"].astype(dtype)),
    )


def golden_ranges(golden: Golden, group: str, dtype: type) -> dict:
    """The stored frozen ranges as our `ranges` collection, by the authors' names of the activations."""
    flat = {}
    for name, low, high in zip(golden["act_names"], golden[f"{group}/x_min"], golden[f"{group}/x_max"]):
        parts = name.removeprefix("features.").split(".")
        path = ("init_activ",) if parts[0] == "init_block" else ("_".join(parts[:2]), "activ1" if "body" in parts else "activ")
        flat[(*path, "low")], flat[(*path, "high")] = jnp.asarray(low, dtype), jnp.asarray(high, dtype)
    return unflatten_dict(flat)


def cases(golden: Golden, head: str = "", dtype: type = np.float32) -> list[Case]:
    names = [str(name) for name in golden["configs"] if f"{name}/{head}logits" in golden]
    if not names:
        pytest.skip(f"the file holds no arrays under {head}")
    return [case_of(golden, name, head, dtype) for name in names]


def as_state_dict(case: Case, params: Any) -> dict[str, np.ndarray]:
    return weights.to_state_dict(case.teacher, {"params": params, "batch_stats": case.variables["batch_stats"]})


def relative(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("head", HEADS)
def test_logits_of_teacher_and_student_agree(golden: Golden, head: str) -> None:
    for case in cases(golden, head):
        found = case.look()
        assert_close_per_image(found["teacher_logits"], golden[f"{case.prefix}/teacher_logits"], 1e-4, 1e-4)
        assert_close_per_image(found["logits"], golden[f"{case.prefix}/logits"])


def test_integer_weights_agree(golden: Golden) -> None:
    for case in cases(golden):
        names, flat, bits = weights.name_map(case.teacher), flatten_dict(case.variables), case.bits[0]
        for layer, expected in golden.under(f"{case.group}/w_codes").items():
            kernel = flat[names[f"{layer}.weight"]]
            low, high = (f(kernel, range(kernel.ndim - 1), keepdims=True) for f in (jnp.min, jnp.max))
            codes = quantizer.quantize(kernel, *quantizer.scale_and_zero_point(low, high, bits), bits)
            codes = weights.to_torch_layout(np.asarray(codes)) + 2 ** (bits - 1)
            assert np.abs(codes - expected).max() <= 1 and np.mean(codes != expected) <= 1e-3, layer


def test_integer_activations_agree(golden: Golden) -> None:
    checked = False
    for case in cases(golden):
        stored = golden.under(f"{case.prefix}/act_codes")
        if not stored:
            continue
        student = networks.create("resnet20", case.classes, networks.Precision(*case.bits))
        variables = {**case.variables, "ranges": case.ranges}
        _, captured = student.apply(variables, case.images[:2], capture_intermediates=True, mutable=["intermediates"])
        outputs = captured["intermediates"]
        wrong = total = 0
        for name, expected in stored.items():
            parts = name.removeprefix("features.").split(".")
            block = outputs if parts[0] == "init_block" else outputs["_".join(parts[:2])]
            leaf = "init_activ" if parts[0] == "init_block" else "activ1" if "body" in parts else "activ"
            ranges = case.ranges if parts[0] == "init_block" else case.ranges["_".join(parts[:2])]
            limits = ranges[leaf]["low"], ranges[leaf]["high"]
            y = block[leaf]["__call__"][0]
            codes = quantizer.quantize(y, *quantizer.scale_and_zero_point(*limits, case.bits[1]), case.bits[1])
            wrong += np.sum(nchw(codes) + 2 ** (case.bits[1] - 1) != expected)
            total += expected.size
        assert wrong / total < 1e-3
        checked = True
    if not checked:
        pytest.skip("the file holds no act_codes")


def test_attention_of_the_first_step_agrees(golden: Golden) -> None:
    for case in cases(golden):
        found = case.look()
        for who in ("teacher", "student"):
            stored = golden.under(f"{case.prefix}/ca_{who}")  # not every config of a file has them
            for expected, actual in zip(stored.values(), found[f"attention_{who}"], strict=bool(stored)):
                assert_close_per_image(actual, expected)


@pytest.mark.parametrize("head", HEADS)
def test_image_gradients_of_kl_fa_and_both_agree_and_so_does_the_sign(golden: Golden, head: str) -> None:
    for case in cases(golden, head):
        found = case.look()
        for name in ("grad_KL_img", "grad_FA_img", "grad_KLFA_img"):
            if f"{case.prefix}/{name}" in golden:
                assert_close_per_image(nchw(found[name]), golden[f"{case.prefix}/{name}"])
        sign = np.sign(nchw(found["hard_images"] - case.images))
        if f"{case.prefix}/sign" in golden:
            assert np.mean(sign != golden[f"{case.prefix}/sign"]) <= 5e-3
        if f"{case.prefix}/sign_teacher_detached" in golden:
            assert np.mean(sign != golden[f"{case.prefix}/sign_teacher_detached"]) > 0.1


def test_promoted_images_are_one_sign_step_away_and_give_the_authors_logits(golden: Golden) -> None:
    for case in cases(golden):
        found = case.look()
        distance = np.abs(np.asarray(found["hard_images"] - case.images))
        np.testing.assert_allclose(distance[distance > 0], case.config.eps, atol=1e-6)
        for name, most in (("logits_perturbed", 2e-2), ("teacher_logits_perturbed", 2e-3)):
            distances = per_image(found[name], golden[f"{case.prefix}/{name}"])
            assert np.median(distances) < most and distances.max() < 10 * most, (name, distances)


@pytest.mark.parametrize("head", HEADS)
def test_the_losses_of_every_stored_step_agree_in_double_precision(golden: Golden, head: str, x64: None) -> None:
    for case in cases(golden, head, np.float64):
        transform = finetune.optimizer(case.config.lr, case.config.momentum, case.config.weight_decay)
        params = case.variables["params"]
        state = transform.init(params)
        for step in range(len(golden[f"{case.prefix}/trace_loss_total_f64"])):
            found = case.look(params)
            values = {theirs: found["metrics"][ours] for ours, theirs in LOSSES.items()}
            for logits, theirs in {"logits": "CE", "logits_perturbed": "CE_perturbed"}.items():
                values[theirs] = losses.cross_entropy(found[logits], jnp.asarray(golden["labels"]))
            for name, value in values.items():
                expected = golden[f"{case.prefix}/trace_loss_{name}_f64"][step]
                np.testing.assert_allclose(value, expected, rtol=1e-8, err_msg=f"{case.prefix} {name}, step {step}")
            updates, state = transform.update(found["gradient"], state, params)
            params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("head", HEADS)
def test_the_losses_of_the_first_step_agree(golden: Golden, head: str) -> None:
    for case in cases(golden, head):
        metrics = case.look()["metrics"]
        for ours, theirs in LOSSES.items():
            key = f"{case.prefix}/trace_loss_{theirs}"
            np.testing.assert_allclose(metrics[ours], golden[key][0], rtol=5e-3, err_msg=key)


def test_gradients_and_parameters_of_the_first_sgd_steps_agree(golden: Golden) -> None:
    for case in cases(golden):
        transform = finetune.optimizer(case.config.lr, case.config.momentum, case.config.weight_decay)
        params = case.variables["params"]
        state, start = transform.init(params), as_state_dict(case, params)
        for step in range(1, 6):
            found = case.look(params)
            tolerance = 5e-3 if step == 1 else 5e-2
            expected_loss = golden[f"{case.prefix}/trace_loss_total"][step - 1]
            np.testing.assert_allclose(found["metrics"]["loss"], expected_loss, rtol=tolerance)
            if step == 1:
                ours = as_state_dict(case, found["gradient"])
                for name, expected in golden.under(f"{case.prefix}/grad").items():
                    assert relative(ours[name], expected) < 2e-2, name
            updates, state = transform.update(found["gradient"], state, params)
            params = optax.apply_updates(params, updates)
            ours = as_state_dict(case, params)
            for name, expected in golden.under(f"{case.prefix}/p{step}").items():
                moved, wanted = ours[name] - start[name], expected - start[name]
                assert relative(moved, wanted) < (3e-2 if step == 1 else 0.3), (step, name)


def test_the_optimizer_is_pytorchs_sgd(golden: Golden, x64: None) -> None:
    golden.need("sgd")
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
    golden.need("lr_policy")
    expected = golden["lr_policy/lr"]
    config = config_lib.default().finetune
    config.lr = float(expected[0])
    schedule = finetune.learning_rate(config)
    for epoch in range(config.epochs):
        for step in (0, config.steps_per_epoch - 1):
            rate = schedule(epoch * config.steps_per_epoch + step)
            np.testing.assert_allclose(rate, expected[min(epoch + 4, len(expected) - 1)], rtol=1e-5)
