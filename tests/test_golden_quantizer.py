"""The quantizer agrees with the authors' code: scale, zero point, codes, values, gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import Golden, assert_codes_agree, nchw, next_range, nhwc, on_edge
from jax import lax

from hast_jax.method import quantizer

pytestmark = pytest.mark.golden
KIND = "quantizer"


def bits_of(golden: Golden) -> list[int]:
    return [int(b) for b in golden["bits"]]


def assert_scale_and_zero_point_agree(low: Any, high: Any, bits: int, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    """Equal but for the last bits of the scale (division against reciprocal).

    Where these decide how S * low is rounded, Z may be one apart. Returns where it is not.
    """
    ours = quantizer.scale_and_zero_point(jnp.float32(low), jnp.float32(high), bits)
    our_scale, our_zero_point = (np.ravel(array) for array in ours)
    np.testing.assert_allclose(our_scale, np.ravel(scale), rtol=3e-7)
    assert_codes_agree(our_zero_point, np.ravel(zero_point), on_edge(np.ravel(low), np.ravel(scale), 0.0))
    return our_zero_point == np.ravel(zero_point)


def assert_values_agree(y: Any, expected: np.ndarray, x: Any, scale: Any, zero_point: Any) -> None:
    """Quantized values are equal to rounding, but for values on a rounding edge, which may be one step apart."""
    scale = np.asarray(scale, np.float64)
    distance = np.abs(np.asarray(y, np.float64) - expected)
    allowed = 1e-6 * (np.abs(expected) + np.abs(zero_point) / scale) + on_edge(x, scale, zero_point) / scale
    assert (distance <= allowed).all(), (distance / allowed).max()


@pytest.mark.parametrize("group", ["act", "tie"])
def test_activations_are_quantized_like_the_authors(golden: Golden, group: str) -> None:
    golden.need(group)
    for bits in bits_of(golden):
        expected = golden.under(f"{group}/b{bits}")
        x = jnp.asarray(expected["x"] if "x" in expected else golden[f"{group}/x"])
        ranges = expected["ranges"] if "ranges" in expected else golden[f"{group}/ranges"]
        for i, (low, high) in enumerate(ranges):
            scale, zero_point = expected["scale"][i], expected["zero_point"][i]
            same = assert_scale_and_zero_point_agree(low, high, bits, scale, zero_point)
            codes = quantizer.quantize(x, jnp.asarray(scale), jnp.asarray(zero_point), bits)
            np.testing.assert_array_equal(codes, expected["codes"][i])
            y = quantizer.fake_quantize(x, jnp.float32(low), jnp.float32(high), bits)
            ours = quantizer.scale_and_zero_point(jnp.float32(low), jnp.float32(high), bits)
            np.testing.assert_array_equal(y, quantizer.dequantize(quantizer.quantize(x, *ours, bits), *ours))
            if "y" in expected and same.all():
                assert_values_agree(y, expected["y"][i], x, scale, zero_point)


def test_ties_round_half_to_even_exactly(golden: Golden) -> None:
    golden.need("tie")
    for bits in bits_of(golden):
        tie = golden.under(f"tie/b{bits}")
        for i, (low, high) in enumerate(tie["ranges"]):
            scale, zero_point = quantizer.scale_and_zero_point(jnp.float32(low), jnp.float32(high), bits)
            np.testing.assert_array_equal(quantizer.quantize(jnp.asarray(tie["x"]), scale, zero_point, bits), tie["codes"][i])


def test_the_gradient_is_the_identity_outside_the_range_too(golden: Golden) -> None:
    golden.need("act/g_up")
    x, upstream = jnp.asarray(golden["act/x"]), jnp.asarray(golden["act/g_up"])
    for bits in bits_of(golden):
        for low, high in golden["act/ranges"]:
            _, pull_back = jax.vjp(lambda x: quantizer.fake_quantize(x, jnp.float32(low), jnp.float32(high), bits), x)
            np.testing.assert_array_equal(pull_back(upstream)[0], golden[f"act/b{bits}/gx"])


@pytest.mark.parametrize("layer", ["conv", "lin"])
def test_weights_are_quantized_per_output_channel(golden: Golden, layer: str) -> None:
    golden.need(layer)
    w = golden[f"{layer}/w"]
    low, high = (f(w.reshape(len(w), -1), axis=1) for f in (np.min, np.max))
    for bits in bits_of(golden):
        expected = golden.under(f"{layer}/b{bits}")
        same = assert_scale_and_zero_point_agree(low, high, bits, expected["scale"], expected["zero_point"])
        # The output channel comes last in our layout.
        kernel, codes, stored = (jnp.asarray(np.moveaxis(array, 0, -1)) for array in (w, expected["codes"], expected["wq"]))
        scale, zero_point = (jnp.expand_dims(expected[name], range(kernel.ndim - 1)) for name in ("scale", "zero_point"))
        np.testing.assert_array_equal(quantizer.quantize(kernel, scale, zero_point, bits), codes)
        wq, channels = quantizer.fake_quantize_weight(kernel, bits), np.flatnonzero(same)
        chosen = (np.asarray(array)[..., channels] for array in (wq, stored, kernel, scale, zero_point))
        assert_values_agree(*chosen)


def weights_agree(w: np.ndarray, wq: np.ndarray, bits: int) -> np.ndarray:
    """For each output channel: no weight fell on the other side of a rounding edge."""
    ours = np.moveaxis(np.asarray(quantizer.fake_quantize_weight(jnp.asarray(np.moveaxis(w, 0, -1)), bits)), -1, 0)
    distance, size = (np.abs(array).reshape(len(wq), -1).max(1) for array in (ours - wq, wq))
    return distance <= 1e-5 * size


def assert_sums_agree(actual: Any, expected: np.ndarray) -> None:
    """Equal as far as sums in float32 are, whose error is that of their largest terms."""
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_quantized_convolution_and_its_gradients_agree(golden: Golden) -> None:
    golden.need("conv/gy")
    stride = int(golden["conv/stride"])
    x, kernel = nhwc(golden["conv/x"]), jnp.transpose(golden["conv/w"], (2, 3, 1, 0))
    bias, upstream = jnp.asarray(golden["conv/b"]), nhwc(golden["conv/gy"])
    for bits in bits_of(golden):
        expected = golden.under(f"conv/b{bits}")

        def layer(x, kernel, bias):
            padding, names = ((1, 1), (1, 1)), ("NHWC", "HWIO", "NHWC")
            w = quantizer.fake_quantize_weight(kernel, bits)
            return lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=names) + bias[None, None, None]

        y, pull_back = jax.vjp(layer, x, kernel, bias)
        gx, gw, gb = pull_back(upstream)
        same = weights_agree(golden["conv/w"], expected["wq"], bits)
        for channel in np.flatnonzero(same):
            assert_sums_agree(nchw(y)[:, channel], expected["y"][:, channel])
        if same.all():
            assert_sums_agree(nchw(gx), expected["gx"])
        assert_sums_agree(jnp.transpose(gw, (3, 2, 0, 1)), expected["gw"])
        assert_sums_agree(gb, expected["gb"])


def test_a_quantized_linear_layer_and_its_gradients_agree(golden: Golden) -> None:
    golden.need("lin/gy")
    x, kernel = jnp.asarray(golden["lin/x"]), jnp.asarray(golden["lin/w"].T)
    for bits in bits_of(golden):
        expected = golden.under(f"lin/b{bits}")

        def layer(x, kernel, bias):
            return x @ quantizer.fake_quantize_weight(kernel, bits) + bias[None]

        y, pull_back = jax.vjp(layer, x, kernel, jnp.asarray(golden["lin/b"]))
        gx, gw, gb = pull_back(jnp.asarray(golden["lin/gy"]))
        same = weights_agree(golden["lin/w"], expected["wq"], bits)
        for channel in np.flatnonzero(same):
            assert_sums_agree(y[:, channel], expected["y"][:, channel])
        if same.all():
            assert_sums_agree(gx, expected["gx"])
        assert_sums_agree(gw.T, expected["gw"])
        assert_sums_agree(gb, expected["gb"])


@pytest.mark.parametrize("sign", ["signed", "relu"])
def test_frozen_activation_quantization_agrees(golden: Golden, sign: str) -> None:
    golden.need(f"qact/{sign}")
    x_eval = jnp.asarray(golden["qact/x_eval"])
    last = golden[f"qact/{sign}/x"][-1]
    activation = jax.nn.relu if sign == "relu" else lambda x: x
    cases = {
        "frozen": (golden[f"qact/{sign}/x_min"][-1], golden[f"qact/{sign}/x_max"][-1]),
        "lastrange": (last.min(), last.max()),
    }
    for bits in bits_of(golden):
        for name, (low, high) in cases.items():
            if sign == "relu" and name == "lastrange":
                low, high = max(low, 0), max(high, 0)
            x, low, high = activation(x_eval), jnp.float32(low), jnp.float32(high)
            scale, zero_point = quantizer.scale_and_zero_point(low, high, bits)
            if on_edge(low, scale, 0.0):
                continue  # the last bit of the scale decides which grid it is
            y = quantizer.fake_quantize(x, low, high, bits)
            assert_values_agree(y, golden[f"qact/{sign}/y_{name}_b{bits}"], x, scale, zero_point)


def test_the_settled_range_is_a_running_average_with_decay_09(golden: Golden) -> None:
    """The authors' tracker, once its bias correction has died out, is the running average used here."""
    golden.need("qact/long")
    stored = np.stack([golden["qact/long/x_min"], golden["qact/long/x_max"]], 1)
    shift = 10.0  # so that ReLU lets them through
    low, high = jnp.float32(stored[200] + shift)
    for extremes in golden["qact/long/batch_minmax"][201:]:
        low, high = next_range(low, high, tuple(jnp.asarray(extremes + shift)))
    np.testing.assert_allclose([low - shift, high - shift], stored[-1], rtol=1e-4)
