"""The quantizer agrees with the authors' code: scale, zero point, codes, values, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import Golden, nchw, nhwc
from jax import lax

from hast_jax import networks
from hast_jax.method import quantizer
from hast_jax.networks.layers import Activation

pytestmark = pytest.mark.golden
KIND = "quantizer"


def assert_codes_agree(actual: np.ndarray, expected: np.ndarray) -> None:
    """Codes may differ by one where a value lies on a rounding edge: in fewer than 1e-4 of them."""
    distance = np.abs(np.asarray(actual) - expected)
    assert distance.max() <= 1 and np.mean(distance > 0) <= 1e-4


def bits_of(golden: Golden) -> list[int]:
    return [int(b) for b in golden["bits"]]


@pytest.mark.parametrize("group", ["act", "tie"])
def test_activations_are_quantized_like_the_authors(golden: Golden, group: str) -> None:
    golden.need(group)
    for bits in bits_of(golden):
        expected = golden.under(f"{group}/b{bits}")
        x = jnp.asarray(expected["x"] if "x" in expected else golden[f"{group}/x"])
        ranges = expected["ranges"] if "ranges" in expected else golden[f"{group}/ranges"]
        for i, (low, high) in enumerate(ranges):
            scale, zero_point = quantizer.scale_and_zero_point(jnp.float32(low), jnp.float32(high), bits)
            np.testing.assert_allclose(scale, expected["scale"][i], rtol=2e-7)
            np.testing.assert_array_equal(zero_point, expected["zero_point"][i])
            codes = quantizer.quantize(x, scale, zero_point, bits)
            assert_codes_agree(codes, expected["codes"][i])
            if "y" in expected:
                y = quantizer.fake_quantize(x, jnp.float32(low), jnp.float32(high), bits)
                np.testing.assert_array_equal(y, quantizer.dequantize(codes, scale, zero_point))
                same = np.asarray(codes) == expected["codes"][i]
                np.testing.assert_allclose(np.asarray(y)[same], expected["y"][i][same], rtol=1e-6)


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
    kernel = jnp.asarray(np.moveaxis(w, 0, -1))
    for bits in bits_of(golden):
        expected = golden.under(f"{layer}/b{bits}")
        low, high = (f(kernel, range(kernel.ndim - 1), keepdims=True) for f in (jnp.min, jnp.max))
        scale, zero_point = quantizer.scale_and_zero_point(low, high, bits)
        np.testing.assert_allclose(scale.ravel(), expected["scale"], rtol=2e-7)
        np.testing.assert_array_equal(zero_point.ravel(), expected["zero_point"])
        assert_codes_agree(np.moveaxis(quantizer.quantize(kernel, scale, zero_point, bits), -1, 0), expected["codes"])
        wq = np.moveaxis(quantizer.fake_quantize_weight(kernel, bits), -1, 0)
        step = 1 / expected["scale"].reshape(-1, *[1] * (w.ndim - 1))
        assert np.mean(np.abs(wq - expected["wq"]) > 1e-5 * step + 1e-6 * np.abs(expected["wq"])) <= 1e-4


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
        # One channel holds weights of 1e3: its sums lose that much more.
        np.testing.assert_allclose(nchw(y), expected["y"], rtol=1e-4, atol=1e-4 * np.abs(expected["y"]).max())
        np.testing.assert_allclose(nchw(gx), expected["gx"], rtol=1e-4, atol=1e-5 * np.abs(expected["gx"]).max())
        np.testing.assert_allclose(jnp.transpose(gw, (3, 2, 0, 1)), expected["gw"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gb, expected["gb"], rtol=1e-5, atol=1e-6)


def test_a_quantized_linear_layer_and_its_gradients_agree(golden: Golden) -> None:
    golden.need("lin/gy")
    x, kernel = jnp.asarray(golden["lin/x"]), jnp.asarray(golden["lin/w"].T)
    for bits in bits_of(golden):
        expected = golden.under(f"lin/b{bits}")
        layer = lambda x, kernel, bias: x @ quantizer.fake_quantize_weight(kernel, bits) + bias[None]
        y, pull_back = jax.vjp(layer, x, kernel, jnp.asarray(golden["lin/b"]))
        gx, gw, gb = pull_back(jnp.asarray(golden["lin/gy"]))
        np.testing.assert_allclose(y, expected["y"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(gx, expected["gx"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(gw.T, expected["gw"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gb, expected["gb"], rtol=1e-5, atol=1e-6)


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
            expected = golden[f"qact/{sign}/y_{name}_b{bits}"]
            if sign == "relu" and name == "lastrange":
                low, high = max(low, 0), max(high, 0)
            step = max(high - low, 1e-8) / (2**bits - 1)
            y = quantizer.fake_quantize(activation(x_eval), jnp.float32(low), jnp.float32(high), bits)
            assert np.mean(np.abs(np.asarray(y) - expected) > 1e-5 * step + 1e-6 * np.abs(expected)) <= 1e-4, (
                bits,
                name,
            )


def test_the_settled_range_is_a_running_average_with_decay_09(golden: Golden) -> None:
    """The authors' tracker, once its bias correction has died out, is the running average used here."""
    golden.need("qact/long")
    # A layer that observes the stored extremes instead of those of its ReLU.
    layer = Activation(networks.Precision(4, 4, lambda x, bits: (x[0], x[1])))
    stored = np.stack([golden["qact/long/x_min"], golden["qact/long/x_max"]], 1)
    shift = 10.0  # so that ReLU lets them through
    ranges = {"low": jnp.float32(stored[200, 0] + shift), "high": jnp.float32(stored[200, 1] + shift)}
    for extremes in golden["qact/long/batch_minmax"][201:]:
        _, updated = layer.apply({"ranges": ranges}, jnp.asarray(extremes + shift), mutable=["ranges"])
        ranges = updated["ranges"]
    np.testing.assert_allclose([ranges["low"] - shift, ranges["high"] - shift], stored[-1], rtol=1e-4)
