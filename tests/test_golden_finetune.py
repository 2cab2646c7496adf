"""Fine-tuning agrees with the authors' code: student, losses, perturbation, gradients, the first SGD steps, the schedule."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_data import (
    FEW,
    Golden,
    activations,
    assert_agrees,
    assert_codes_agree,
    assert_each_image_agrees,
    assert_most_images_agree,
    forward,
    limits_of,
    nchw,
    nhwc,
    on_edge,
    ranges_of,
    recipe_weights,
    relative_noise,
    state_dict,
    student_of,
    teacher_of,
)
from ml_collections import ConfigDict

from hast_jax import config as config_lib
from hast_jax.method import losses, promotion, quantizer, schedules
from hast_jax.stages import finetune

pytestmark = pytest.mark.golden
KIND = "finetune"
HEADS = ("", "literal_head/")  # the scaled and the unscaled last layer
LOSSES = {"kl": "KL", "fa": "FA", "kl_promoted": "KL_perturbed", "fa_promoted": "FA_perturbed", "loss": "total"}
FEW_PIXELS = 1e-4  # whose gradient is so near to zero that its sign is chance


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
    def student(self) -> Any:
        return student_of("resnet20", self.classes, self.bits)

    @property
    def student_variables(self) -> Any:
        return {**self.variables, "ranges": self.ranges}

    def state_dict(self, params: Any) -> dict[str, np.ndarray]:
        """Parameters, or their gradient, by the authors' names."""
        teacher = teacher_of("resnet20", self.classes)
        return state_dict(teacher, {"params": params, "batch_stats": self.variables["batch_stats"]})

    def look(self, params: Any = None) -> dict[str, Any]:
        """All that one step computes, at the given parameters of the student."""
        params = self.variables["params"] if params is None else params
        look = compiled(self.bits, self.classes)
        config = config_lib.default()
        config.finetune.lam, config.finetune.eps = self.config.lam, self.config.eps
        labels = jnp.zeros(len(self.images), jnp.int32)  # in no loss of the method
        return look(params, finetune.fixed_inputs(self.variables, self.ranges, self.images, labels, config))


@functools.cache
def compiled(bits: tuple[int, int], classes: int):
    teacher, student = teacher_of("resnet20", classes), student_of("resnet20", classes, bits)

    @jax.jit
    def look(params, fixed):
        config = config_lib.default().finetune
        measure = finetune.distances(teacher, student, fixed, fixed.labels, config)
        trained = {"params": params}
        images, student_variables = fixed.images, {**fixed.teacher, "ranges": fixed.ranges, **trained}
        teacher_logits, teacher_taps = forward(teacher, fixed.teacher, images)
        logits, taps = forward(student, student_variables, images)
        found = {
            "teacher_logits": teacher_logits,
            "logits": logits,
            "ca_teacher": [losses.attention(f) for f in teacher_taps.branches],
            "ca_student": [losses.attention(f) for f in taps.branches],
        }

        def kl_and_fa(x):
            parts = measure(trained, x)
            return jnp.stack([parts["kl"], parts["fa"]])

        _, pull_back = jax.vjp(kl_and_fa, images)
        for name, weights in (("KL", (1, 0)), ("FA", (0, 1)), ("KLFA", (1, 1))):
            (found[f"grad_{name}_img"],) = pull_back(jnp.asarray(weights, images.dtype))
        _, _, found["hard_images"] = promotion.promote(measure, trained, images, fixed.strengths.eps, "kl+fa")
        found["logits_perturbed"], _ = forward(student, student_variables, found["hard_images"])
        found["metrics"], gradient = finetune.loss_and_gradient(measure, trained, images, fixed.strengths, config)
        found["gradient"] = gradient["params"]
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
    return Case(
        prefix=f"{name}/{head}".rstrip("/"),
        group=group,
        bits=(weight_bits, activation_bits),
        classes=classes,
        config=config,
        variables=recipe_weights(teacher_of("resnet20", classes), int(golden["weight_seed"]), scale, dtype),
        ranges=ranges_of(golden["act_names"], golden[f"{group}/x_min"], golden[f"{group}/x_max"], dtype),
        images=nhwc(golden["x"].astype(dtype)),
    )


def cases(golden: Golden, head: str = "", dtype: type = np.float32) -> list[Case]:
    names = [str(name) for name in golden["configs"] if f"{name}/{head}logits" in golden]
    if not names:
        pytest.skip(f"the file holds no arrays under {head}")
    return [case_of(golden, name, head, dtype) for name in names]


def steps_before_divergence(golden: Golden, prefix: str) -> int:
    """Steps that can be compared: at two bits a run may diverge, until a loss or the gradient of the images is not a number.

    PyTorch's sign of that is zero, so the perturbed losses are then exactly the clean ones.
    """
    clean, perturbed = (golden[f"{prefix}/trace_loss_{name}_f64"] for name in ("KL", "KL_perturbed"))
    usual = np.isfinite(golden[f"{prefix}/trace_loss_total_f64"]) & (clean != perturbed)
    assert usual[0], "nothing of this run can be compared"
    return len(usual) if usual.all() else int(np.argmin(usual))


# --- In double precision: ours is the float64 run of the authors' code, to which the files give the distance. ---


@pytest.mark.parametrize("head", HEADS)
def test_logits_of_teacher_and_student_agree_in_double_precision(golden: Golden, head: str, x64: None) -> None:
    for case in cases(golden, head, np.float64):
        found = case.look()
        assert_agrees(golden, f"{case.prefix}/teacher_logits", found["teacher_logits"])
        assert_each_image_agrees(golden, f"{case.prefix}/logits", found["logits"])


def test_attention_agrees_in_double_precision(golden: Golden, x64: None) -> None:
    checked = False
    for case in cases(golden, dtype=np.float64):
        found = case.look()
        for key in ("ca_teacher", "ca_student"):
            stored = golden.under(f"{case.prefix}/{key}")  # not every config of a file has them
            if stored:
                assert_agrees(golden, f"{case.prefix}/{key}", dict(zip(stored, found[key], strict=True)))
                checked = True
    if not checked:
        pytest.skip("the file holds no attention maps")


def test_integer_activations_agree_in_double_precision(golden: Golden, x64: None) -> None:
    """But for one in ten thousand, and for what has flipped in the authors' own float32 run."""
    checked = False
    for case in cases(golden, dtype=np.float64):
        stored = golden.under(f"{case.prefix}/act_codes")
        if not stored:
            continue
        outputs, bits = activations(case.student, case.student_variables, case.images[:2], list(stored)), case.bits[1]
        wrong = total = 0
        for name, expected in stored.items():
            scale_and_zero_point = quantizer.scale_and_zero_point(*limits_of(case.ranges, name), bits)
            codes = nchw(quantizer.quantize(outputs[name], *scale_and_zero_point, bits)) + 2 ** (bits - 1)
            wrong += np.sum(codes != expected)
            total += expected.size
        noise = golden.noise(f"{case.prefix}/act_code_mismatch")
        assert wrong / total <= 1e-4 + (0.0 if noise is None else FEW * noise.max()), (case.prefix, wrong, total)
        checked = True
    if not checked:
        pytest.skip("the file holds no act_codes")


@pytest.mark.parametrize("head", HEADS)
def test_image_gradients_and_their_sign_agree_in_double_precision(golden: Golden, head: str, x64: None) -> None:
    for case in cases(golden, head, np.float64):
        found = case.look()
        for name in ("grad_KL_img", "grad_FA_img", "grad_KLFA_img"):
            if f"{case.prefix}/{name}" in golden:
                assert_each_image_agrees(golden, f"{case.prefix}/{name}", nchw(found[name]))
        if f"{case.prefix}/sign" in golden:
            sign, noise = np.sign(nchw(found["hard_images"] - case.images)), golden.noise(f"{case.prefix}/sign_mismatch")
            allowed = FEW_PIXELS + (0.0 if noise is None else FEW * noise.max())
            expected = golden[f"{case.prefix}/sign"]
            assert np.mean(sign != expected) <= allowed, (case.prefix, np.mean(sign != expected), noise)
            if f"{case.prefix}/sign_teacher_detached" in golden:  # a gradient that stops at the teacher could be told from it
                assert np.mean(expected != golden[f"{case.prefix}/sign_teacher_detached"]) > 2 * allowed


@pytest.mark.parametrize("head", HEADS)
def test_promoted_images_are_one_sign_step_away_and_give_the_authors_logits(golden: Golden, head: str, x64: None) -> None:
    for case in cases(golden, head, np.float64):
        found = case.look()
        distance = np.abs(np.asarray(found["hard_images"] - case.images))
        np.testing.assert_allclose(distance[distance > 0], case.config.eps, atol=1e-6)
        assert_each_image_agrees(golden, f"{case.prefix}/logits_perturbed", found["logits_perturbed"])
        if f"{case.prefix}/sign" in golden:
            # Of the authors' own promoted images, as a pixel whose sign is chance moves the teacher's logits too.
            images = case.images + case.config.eps * nhwc(golden[f"{case.prefix}/sign"].astype(np.float64))
            logits, _ = forward(teacher_of("resnet20", case.classes), case.variables, images)
            assert_agrees(golden, f"{case.prefix}/teacher_logits_perturbed", logits)


@pytest.mark.parametrize("head", HEADS)
def test_losses_gradients_and_parameters_of_every_step_agree_in_double_precision(golden: Golden, head: str, x64: None) -> None:
    for case in cases(golden, head, np.float64):
        transform = schedules.optimizer(case.config, case.config.lr)
        params = case.variables["params"]
        state = transform.init(params)
        for step in range(steps_before_divergence(golden, case.prefix)):
            found = case.look(params)
            values = {theirs: found["metrics"][ours] for ours, theirs in LOSSES.items()}
            for logits, theirs in {"logits": "CE", "logits_perturbed": "CE_perturbed"}.items():
                values[theirs] = losses.cross_entropy(found[logits], jnp.asarray(golden["labels"]))
            for name, value in values.items():
                expected = golden[f"{case.prefix}/trace_loss_{name}_f64"][step]
                np.testing.assert_allclose(value, expected, rtol=1e-8, err_msg=f"{case.prefix} {name}, step {step}")
            if step == 0 and golden.under(f"{case.prefix}/grad"):
                assert_agrees(golden, f"{case.prefix}/grad", case.state_dict(found["gradient"]), otherwise=5e-2)
            updates, state = transform.update(found["gradient"], state, params)
            params = optax.apply_updates(params, updates)
            if golden.under(f"{case.prefix}/p{step + 1}"):
                assert_agrees(golden, f"{case.prefix}/p{step + 1}", case.state_dict(params))


# --- In float32: the same but for single ReLUs and codes that fall on the other side. ---


@pytest.mark.parametrize("head", HEADS)
def test_logits_of_teacher_and_student_agree(golden: Golden, head: str) -> None:
    for case in cases(golden, head):
        found = case.look()
        assert_agrees(golden, f"{case.prefix}/teacher_logits", found["teacher_logits"])
        assert_most_images_agree(golden, f"{case.prefix}/logits", found["logits"])


def test_integer_weights_agree(golden: Golden) -> None:
    for case in cases(golden):
        ours, bits = case.state_dict(case.variables["params"]), case.bits[0]
        for layer, expected in golden.under(f"{case.group}/w_codes").items():
            w = jnp.asarray(ours[f"{layer}.weight"])  # the output channel comes first
            low, high = (f(w, range(1, w.ndim), keepdims=True) for f in (jnp.min, jnp.max))
            scale_and_zero_point = quantizer.scale_and_zero_point(low, high, bits)
            codes = quantizer.quantize(w, *scale_and_zero_point, bits) + 2 ** (bits - 1)
            assert_codes_agree(codes, expected, on_edge(w, *scale_and_zero_point) | on_edge(low, scale_and_zero_point[0], 0.0))


def test_attention_of_most_images_agrees(golden: Golden) -> None:
    for case in cases(golden):
        found = case.look()
        for key in ("ca_teacher", "ca_student"):
            stored = golden.under(f"{case.prefix}/{key}")  # not every config of a file has them
            for name, actual in zip(stored, found[key], strict=bool(stored)):
                assert_most_images_agree(golden, f"{case.prefix}/{key}/{name}", actual)


@pytest.mark.parametrize("head", HEADS)
def test_image_gradients_of_most_images_agree(golden: Golden, head: str) -> None:
    for case in cases(golden, head):
        found = case.look()
        for name in ("grad_KL_img", "grad_FA_img", "grad_KLFA_img"):
            if f"{case.prefix}/{name}" in golden:
                assert_most_images_agree(golden, f"{case.prefix}/{name}", nchw(found[name]))


@pytest.mark.parametrize("head", HEADS)
def test_the_losses_of_the_first_step_agree(golden: Golden, head: str) -> None:
    """Within a few times the noise, and what a flip may change: the share of one image."""
    for case in cases(golden, head):
        metrics, one_image = case.look()["metrics"], 1 / len(case.images)
        for ours, theirs in LOSSES.items():
            expected = golden[f"{case.prefix}/trace_loss_{theirs}"][0]
            tolerance = FEW * relative_noise(golden, f"{case.prefix}/loss_{theirs}")[0] + one_image
            np.testing.assert_allclose(metrics[ours], expected, rtol=tolerance, err_msg=f"{case.prefix} {theirs}")


# --- What needs no network ---


def test_the_optimizer_is_pytorchs_sgd(golden: Golden, x64: None) -> None:
    golden.need("sgd")
    config = config_lib.default().finetune
    config.momentum, config.weight_decay = float(golden["momentum"]), float(golden["weight_decay"])
    transform = schedules.optimizer(config, float(golden["sgd/lr"]))
    params = jnp.asarray(golden["sgd/p0"], jnp.float64)
    state = transform.init(params)
    for gradient, expected in zip(golden["sgd/g"], golden["sgd/p_f64"]):
        updates, state = transform.update(jnp.asarray(gradient, jnp.float64), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, expected, rtol=1e-10)


def test_a_rate_that_drops_twice_at_an_epoch_falls_to_a_hundredth_as_in_pytorch() -> None:
    config = ConfigDict({"schedule": "step", "lr": 1.0, "lr_drops": (1, 1, 3), "steps_per_epoch": 5})
    rates = [float(schedules.learning_rate(config)(step)) for step in (4, 5, 14, 15)]
    np.testing.assert_allclose(rates, [1, 0.01, 0.01, 0.001], rtol=1e-6)


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
