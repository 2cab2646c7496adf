"""ResNet-18 for ImageNet agrees with the authors' network: logits, BN moments, W4A4 logits with calibrated ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_data import Golden, nhwc, per_image, recipe_weights

from hast_jax import networks
from hast_jax.networks import weights
from hast_jax.stages import calibrate

pytestmark = pytest.mark.golden
KIND = "resnet18_imagenet"


def setting(golden: Golden):
    classes, bits = golden["teacher_logits"].shape[1], int(golden["bits"])
    rng = np.random.Generator(np.random.PCG64([int(s) for s in golden["x_seed"]]))
    images = rng.standard_normal(tuple(golden["x_shape"])).astype(np.float32)
    np.testing.assert_array_equal(images.ravel()[:8], golden["x_first8"])
    model = networks.create("resnet18", classes)
    student = networks.create("resnet18", classes, networks.Precision(bits, bits))
    return model, student, recipe_weights(model, int(golden["weight_seed"])), nhwc(images)


def test_the_recipe_fills_the_weights_that_were_used(golden: Golden) -> None:
    model, _, variables, _ = setting(golden)
    state = weights.to_state_dict(model, variables)
    for name, first in zip(golden["weight_check_keys"], golden["weight_check_first4"]):
        np.testing.assert_array_equal(state[name].ravel()[:4], first)


def test_logits_and_moments_of_every_batch_norm_agree(golden: Golden) -> None:
    model, _, variables, images = setting(golden)
    logits, taps = model.apply(variables, images)
    np.testing.assert_allclose(logits, golden["teacher_logits"], atol=1e-5 * np.abs(golden["teacher_logits"]).max())
    for i, position in enumerate(golden["bn_exec_order"]):
        tap = taps.batch_norms[i]
        for name, moment in (("mean", tap.inputs.mean((0, 1, 2))), ("var", tap.inputs.var((0, 1, 2)))):
            first, norm = golden[f"bn_{name}_first8"][position], golden[f"bn_{name}_norm"][position]
            np.testing.assert_allclose(moment[:8], first, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(np.linalg.norm(moment), norm, rtol=1e-4)


def test_w4a4_logits_agree_with_the_stored_ranges(golden: Golden) -> None:
    _, student, variables, images = setting(golden)
    ranges = jax.eval_shape(lambda: calibrate.step(student, variables, {}, images))
    order = [path for path in ordered_activations(student) if (*path, "low") in flatten_dict(ranges)]
    flat = {}
    for path, low, high in zip(order, golden["x_min"], golden["x_max"], strict=True):
        flat[(*path, "low")], flat[(*path, "high")] = jnp.float32(low), jnp.float32(high)
    logits, _ = student.apply({**variables, "ranges": unflatten_dict(flat)}, images)
    assert per_image(logits, golden["quant_logits"]).max() < 3e-2


def test_calibration_on_the_same_images_gives_the_stored_ranges(golden: Golden) -> None:
    _, student, variables, images = setting(golden)
    ranges = flatten_dict(calibrate.step(student, variables, {}, images))
    high = [ranges[(*path, "high")] for path in ordered_activations(student)]
    np.testing.assert_allclose(high, golden["x_max"], rtol=5e-2)


def ordered_activations(student: networks.ResNet) -> list[tuple[str, ...]]:
    """Paths of the activations in the order of execution."""
    paths = [("init_activ",)]
    for i, units in enumerate(student.units):
        for j in range(units):
            paths += [(f"stage{i + 1}_unit{j + 1}", name) for name in ("activ1", "activ")]
    return paths
