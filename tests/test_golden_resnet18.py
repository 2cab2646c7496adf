"""ResNet-18 agrees with the authors' network: logits, BN moments, W4A4 logits with calibrated ranges."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from golden_data import (
    FEW,
    Golden,
    assert_agrees,
    forward,
    limits_of,
    nhwc,
    observed_ranges,
    per_image,
    ranges_of,
    recipe_weights,
    state_dict,
    student_of,
    teacher_of,
)

pytestmark = pytest.mark.golden
KIND = "resnet18_imagenet"


class Setting(NamedTuple):
    teacher: Any
    student: Any
    variables: Any
    images: jax.Array


def setting(golden: Golden, dtype: type = np.float32) -> Setting:
    classes, bits = golden["teacher_logits"].shape[1], int(golden["bits"])
    rng = np.random.Generator(np.random.PCG64([int(s) for s in golden["x_seed"]]))
    images = rng.standard_normal(tuple(golden["x_shape"])).astype(np.float32)
    np.testing.assert_array_equal(images.ravel()[:8], golden["x_first8"])
    teacher, student = teacher_of("resnet18", classes), student_of("resnet18", classes, (bits, bits))
    variables = recipe_weights(teacher, int(golden["weight_seed"]), dtype=dtype)
    return Setting(teacher, student, variables, nhwc(images.astype(dtype)))


def test_the_recipe_fills_the_weights_that_were_used(golden: Golden) -> None:
    case = setting(golden)
    state = state_dict(case.teacher, case.variables)
    for name, first in zip(golden["weight_check_keys"], golden["weight_check_first4"]):
        np.testing.assert_array_equal(state[name].ravel()[:4], first)


def test_logits_and_moments_of_every_batch_norm_agree(golden: Golden) -> None:
    case = setting(golden)
    logits, taps = forward(case.teacher, case.variables, case.images)
    assert_agrees(golden, "teacher_logits", logits)
    for i, position in enumerate(golden["bn_exec_order"]):
        tap = taps.batch_norms[i]
        for name, moment in (("mean", tap.inputs.mean((0, 1, 2))), ("var", tap.inputs.var((0, 1, 2)))):
            first, norm = golden[f"bn_{name}_first8"][position], golden[f"bn_{name}_norm"][position]
            np.testing.assert_allclose(moment[:8], first, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(np.linalg.norm(moment), norm, rtol=1e-4)


def test_calibration_and_the_logits_with_its_ranges_agree_in_double_precision(golden: Golden, x64: None) -> None:
    case = setting(golden, np.float64)
    logits, _ = forward(case.teacher, case.variables, case.images)
    np.testing.assert_allclose(logits, golden["teacher_logits_f64"], rtol=1e-8, atol=1e-8)
    ranges = observed_ranges(case.student, case.variables, case.images)
    lows, highs = np.transpose([limits_of(ranges, str(name)) for name in golden["act_names"]])
    np.testing.assert_allclose(lows, golden["x_min"], atol=1e-9)
    np.testing.assert_allclose(highs, golden["x_max_f64"], rtol=1e-9)
    logits, _ = forward(case.student, {**case.variables, "ranges": ranges}, case.images)
    np.testing.assert_allclose(logits, golden["quant_logits_f64"], rtol=1e-8, atol=1e-8)


def test_w4a4_logits_agree_with_the_stored_ranges(golden: Golden) -> None:
    """To about a hundredth: values lie on rounding edges, and each flip makes others."""
    case = setting(golden)
    ranges = ranges_of(golden["act_names"], golden["x_min"], golden["x_max"], np.float32)
    logits, _ = forward(case.student, {**case.variables, "ranges": ranges}, case.images)
    assert per_image(logits, golden["quant_logits"]).max() < FEW * 1e-2


def test_calibration_on_the_same_images_gives_the_stored_ranges(golden: Golden) -> None:
    case = setting(golden)
    ranges = observed_ranges(case.student, case.variables, case.images)
    lows, highs = np.transpose([limits_of(ranges, str(name)) for name in golden["act_names"]])
    assert_agrees(golden, "x_min", lows)
    assert_agrees(golden, "x_max", highs)
