"""Learned ranges: the paper's grid, the written gradients, whole numbers that an int8 holds."""

import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import hast_jax
from hast_jax import networks
from hast_jax.method import learned, quantizer
from hast_jax.networks import rules

numbers = st.floats(-100, 100, width=32)
positive = st.floats(0.0078125, 100, width=32)
bits = st.integers(quantizer.MIN_BITS, quantizer.MAX_BITS)
values = arrays(np.float32, (17,), elements=numbers)


def fake(x, low, high, k, largest=None):
    return learned.fake_quantize(jnp.asarray(x), jnp.asarray(low), jnp.asarray(high), k, largest)


@settings(max_examples=60, deadline=None)
@given(values, positive, positive, bits)
def test_the_grid_is_that_of_the_paper(x, below, above, k) -> None:
    low, high = jnp.float32(-below), jnp.float32(above)
    step = (below + above) / (2**k - 1)
    ours, theirs = np.asarray(fake(x, low, high, k)), np.asarray(quantizer.fake_quantize(jnp.asarray(x), low, high, k))
    off = np.abs(ours - theirs)
    tolerance = 1e-5 * (below + above)
    assert np.all((off <= tolerance) | (np.abs(off - step) <= tolerance))  # where a tie is rounded the other way

    def tie(position):
        return np.abs(position % 1 - 0.5) < 1e-3

    assert tie(low / step) or np.all(tie(x[off > tolerance] / step))


@settings(max_examples=60, deadline=None)
@given(values, positive, positive, bits)
def test_the_gradients_are_the_written_formulas(x, below, above, k) -> None:
    with jax.enable_x64(True):
        x, low, high = np.asarray(x, np.float64), np.float64(-below), np.float64(above)
        y = np.asarray(fake(x, low, high, k))

        def each(v, a, b):
            return fake(v, a, b, k)

        dx, dlow, dhigh = (np.asarray(jax.vmap(jax.grad(each, argnum), (0, None, None))(x, low, high)) for argnum in range(3))
        step, z = (np.asarray(leaf) for leaf in learned.grid(jnp.asarray(low), jnp.asarray(high), k))
        width, position = high - low, x / step
        inside = (position > z) & (position < z + 2**k - 1)
        clear = np.abs(position - z) > 1e-9  # at the very end both sides are right
        clear &= np.abs(position - z - 2**k + 1) > 1e-9
        for found, within, beyond in (
            (dx, 1.0, 0.0),
            (dlow, (x - y) / width, 1 - (y - low) / width),
            (dhigh, (y - x) / width, (y - low) / width),
        ):
            np.testing.assert_allclose(found[clear], np.where(inside, within, beyond)[clear], atol=1e-7)


def test_the_gradients_are_the_slopes_of_the_smooth_part() -> None:
    """Between two roundings, what is left is smooth: with the rounded integers held fixed, slopes are finite differences."""
    with jax.enable_x64(True):
        x, low, high, k, h = np.linspace(-2.9, 3.1, 13), -1.03, 1.52, 3, 1e-6

        def smooth(low, high):
            """x_hat, with what the two roundings added held fixed."""
            scale = (2**k - 1) / (high - low)
            return (np.clip(x * scale, low * scale + z_off, low * scale + z_off + 2**k - 1) + n_off) / scale

        step, z = (np.asarray(leaf) for leaf in learned.grid(jnp.asarray(low), jnp.asarray(high), k))
        z_off = z - low / step
        clipped = np.clip(x / step, z, z + 2**k - 1)
        n_off = np.round(clipped) - clipped
        by_low = (smooth(low + h, high) - smooth(low - h, high)) / (2 * h)
        by_high = (smooth(low, high + h) - smooth(low, high - h)) / (2 * h)
        found = jax.jacobian(lambda r: fake(x, r[0], r[1], k))((low, high))
        np.testing.assert_allclose(found[0], by_low, atol=1e-6)
        np.testing.assert_allclose(found[1], by_high, atol=1e-6)


def test_where_127_cuts_the_grid_of_eight_bits_the_slopes_are_right_too() -> None:
    """The integer stands still there, and only the step moves."""
    with jax.enable_x64(True):
        x, low, high, h = np.asarray([-1.4, -0.3, 0.9, 2.5]), -1.2, 1.31, 1e-6

        def last(low, high):
            return 127 * (high - low) / 255  # of the largest integer

        found = jax.jacobian(lambda r: fake(x, r[0], r[1], 8, 127))((low, high))
        assert fake(x, low, high, 8, 127)[-1] == pytest.approx(last(low, high))
        assert found[0][-1] == pytest.approx((last(low + h, high) - last(low - h, high)) / (2 * h))
        assert found[1][-1] == pytest.approx((last(low, high + h) - last(low, high - h)) / (2 * h))
        assert found[0][0] + found[1][0] == pytest.approx(1)  # at the other end, which nothing cuts, the range moves as a whole


def test_the_gradient_of_a_range_is_scaled_by_the_values_that_share_it() -> None:
    kernel, x = jax.random.normal(jax.random.key(0), (3, 3, 4, 5)), jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    low, high = learned.weight_range(kernel, 4, (0, 1, 2), quantizer.minmax_range)
    one = jax.grad(lambda h: learned.fake_quantize_weight(kernel, low, h, 4).sum())(high)
    plain = jax.grad(lambda h: fake(kernel, low, h, 4, 127).sum())(high)
    np.testing.assert_allclose(one, plain / np.sqrt(36 * 8), rtol=1e-5)
    one = jax.grad(lambda h: learned.fake_quantize_activation(x, jnp.float32(-1), h, 4).sum())(jnp.float32(1))
    plain = jax.grad(lambda h: fake(x, jnp.float32(-1), h, 4).sum())(jnp.float32(1))
    np.testing.assert_allclose(one, plain / np.sqrt(108 * 15), rtol=1e-5)


def test_a_range_that_begins_at_zero_keeps_its_zero_and_a_signed_one_learns_both_ends() -> None:
    x = jax.random.normal(jax.random.key(0), (4, 50))
    gradient = jax.grad(lambda r, x: jnp.sum(learned.fake_quantize_activation(x, r[0], r[1], 3) ** 3))
    relu = gradient((jnp.float32(0), jnp.float32(1)), jax.nn.relu(x))
    assert relu[0] == 0 and relu[1] != 0
    signed = gradient((jnp.float32(-0.375), jnp.float32(1)), jax.nn.hard_swish(x))
    assert signed[0] != 0 and signed[1] != 0


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, (3, 4, 5), elements=numbers), bits)
def test_every_integer_of_a_weight_fits_an_int8_with_zero_point_zero(kernel, k) -> None:
    kernel = jnp.asarray(kernel)
    low, high = learned.weight_range(kernel, k, (0, 1), quantizer.minmax_range)
    assert low.shape == high.shape == (1, 1, 5) and np.all(low <= 0) and np.all(high >= 0) and np.all(low < high)
    n = np.asarray(learned.integers(kernel, low, high, k, learned.LARGEST_INTEGER))
    assert np.array_equal(n, np.round(n)) and np.abs(n).max() <= 127
    largest = np.abs(np.asarray(kernel)).max((0, 1))
    error = np.abs(np.asarray(learned.fake_quantize_weight(kernel, low, high, k) - kernel)).max((0, 1))
    assert np.all(error <= 1.01 * np.asarray(high - low).ravel() / (2**k - 1) + 1e-5 * largest)


class TwoLayers(nn.Module):
    """A convolution of signed activations behind another one."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(True)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(nn.BatchNorm(True)(nn.Conv(4, (1, 1))(x)).mean((1, 2)))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**31))
def test_weights_between_two_integers_are_settled_once_for_every_program(k: int, seed: int) -> None:
    network = networks.create(TwoLayers(), (4, 4, 2), rules=rules.normalise((k, k)), learned_ranges=True)
    x = jax.random.normal(jax.random.key(seed), (2, 4, 4, 2))
    variables = network.module.init(jax.random.key(seed + 1), x)
    ranges = networks.observe(network, variables, {}, x)
    flat = flatten_dict(variables["params"])
    for layer in network.kernels:
        name = layer.kernel
        step, z = _grid(ranges, name, k)
        between = jnp.round(flat[name] / step) + 0.5 - (flat[name] > 0)  # the middle of two integers
        flat[name] = jnp.clip(between, z + 0.5, z + 2**k - 1.5) * step
    params, settled = networks.settled(network, unflatten_dict(flat), ranges)
    again, settled_again = networks.settled(network, params, settled)
    for name, codes in networks.kernel_codes(network, params, settled).items():
        path = tuple(name.split("/"))
        # One program divides by the step, another one multiplies by its reciprocal.
        step, _ = _grid(settled, path, k)
        multiplied = np.round(np.asarray(flatten_dict(params)[path]) * (np.float32(1) / np.asarray(step)))
        assert np.array_equal(codes.integers, multiplied)
        assert np.abs(codes.integers - flat[path] / _grid(ranges, path, k)[0]).max() <= 0.5 + 1e-4  # a neighbour of each
        # Before they are settled, another program may round them to the other side.
        unsettled = networks.kernel_codes(network, unflatten_dict(flat), ranges)[name].integers
        assert np.abs(codes.integers - unsettled).max() <= 1
        assert np.array_equal(codes.integers, networks.kernel_codes(network, again, settled_again)[name].integers)
    constants = jax.jit(lambda: networks.quantized_params(network, params, settled))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), constants, params)
    for name, value in flatten_dict(settled).items():
        assert name[-2:] != ("input", "low") or np.allclose(
            value, flatten_dict(ranges)[name], atol=_grid(ranges, name[:-1], k)[0]
        )


def _grid(ranges, path, k: int):
    ends = flatten_dict(ranges)
    return learned.grid(ends[*path, "low"], ends[*path, "high"], k)


# --- Runs ---


def test_all_ranges_move_and_zeros_stay(learned_run: Path) -> None:
    start = json.loads((learned_run / "ranges.json").read_text())
    ranges = flatten_dict(hast_jax.load(learned_run / "student").variables["ranges"], sep="/")
    assert ranges.keys() == start.keys()
    for name, value in ranges.items():
        moved = not np.array_equal(np.asarray(value), np.asarray(start[name], np.float32))
        assert moved != (name.endswith("low") and np.all(np.asarray(start[name]) == 0)), name


def test_a_loaded_students_kernels_start_as_its_config_says(learned_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(learned_run / "student", tmp_path / "student"))
    assert hast_jax.load(folder).network.kernel_range_rule is quantizer.minmax_range
    said = json.loads((folder / "student.json").read_text())
    said["record"]["config"]["calibration"]["kernel_range"] = "mse"
    (folder / "student.json").write_text(json.dumps(said))
    assert hast_jax.load(folder).network.kernel_range_rule is quantizer.mse_range


def test_the_students_codes_are_integers_in_range_that_give_its_weights(learned_run: Path) -> None:
    student = hast_jax.load(learned_run / "student")
    params = flatten_dict(student.params, sep="/")
    for name, found in student.codes().items():
        k, codes = found["bits"], found["codes"].astype(np.float32)
        assert codes.min() >= -(2 ** (k - 1)) and codes.max() <= 2 ** (k - 1) - 1
        assert np.abs(codes + found["zero_point"]).max() <= 127
        np.testing.assert_allclose((codes + found["zero_point"]) / found["scale"], params[name], rtol=2e-7)


@pytest.mark.slow
def test_a_run_killed_while_fine_tuning_goes_on_and_ends_like_an_unbroken_one(learned_run: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "killed"
    tiny.kill_when(tiny.learned_command(workdir), tiny.logged(workdir, "finetune", 15))
    done = tiny.call_anew(tiny.learned_command(workdir))
    assert done.returncode == 0, done.stderr
    assert tiny.outcome(workdir) == tiny.outcome(learned_run)
    whole, resumed = (flatten_dict(hast_jax.load(place / "student").variables["ranges"]) for place in (learned_run, workdir))
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_a_run_folder_is_evaluated_with_the_ranges_that_were_learned(learned_run: Path) -> None:
    done = tiny.call(tiny.evaluate(learned_run))
    assert done.returncode == 0, done.stderr
    assert f"{json.loads((learned_run / 'result.json').read_text())['last']:.2f}" in done.stdout


SIGNED_BITS = (
    "w2a2",
    pytest.param("w8a8", marks=pytest.mark.slow),
    pytest.param((None, 3), marks=pytest.mark.slow),
    {"default": "w4a4", "Conv_0": "w8a8"},
)


class Swish(nn.Module):
    """Signed activations, a depthwise convolution."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.hard_swish(nn.BatchNorm(not train)(nn.Conv(8, (3, 3))(x)))
        x = nn.hard_swish(nn.BatchNorm(not train)(nn.Conv(8, (3, 3), feature_group_count=8)(x)))
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("rule", SIGNED_BITS, ids=str)
def test_a_foreign_network_with_signed_activations_learns_its_ranges(rule) -> None:
    model, image = Swish(), (8, 8, 3)
    variables = model.init(jax.random.key(0), jnp.zeros((1, *image)))
    images = np.asarray(jax.random.normal(jax.random.key(1), (32, *image)))
    labels = np.arange(32) % 10
    ranges = hast_jax.calibrate(model, variables, images, bits=rule, fields={"calibration.batches": 2})
    fields = {"finetune.steps_per_epoch": 4, "finetune.batch": 16}
    trained = hast_jax.finetune(model, variables, ranges, images, labels, bits=rule, epochs=1, fields=fields)
    before, after = flatten_dict(ranges, sep="/"), flatten_dict(trained["ranges"], sep="/")
    assert any("kernel" in name for name in before) == (rule != (None, 3)) and before.keys() == after.keys()
    inputs = [name for name in before if name.endswith("input/low") and np.all(before[name] < 0)]
    assert inputs and all(not np.array_equal(before[name], after[name]) for name in inputs)
    assert all(np.all(after[f"{n[:-4]}low"] <= 0) and np.all(after[n] >= 0) for n in after if n.endswith("high"))
    found = hast_jax.evaluate(
        model, trained, np.zeros((20, *image), np.uint8), labels[:20], mean=(0,) * 3, std=(1,) * 3, bits=rule
    )
    assert 0 <= found.top1 <= 100
