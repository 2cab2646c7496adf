"""The quantizer keeps its invariants for any range, any bits, any values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hast_jax.method import quantizer

numbers = st.floats(-100, 100, width=32)
bits = st.integers(quantizer.MIN_BITS, quantizer.MAX_BITS)
values = arrays(np.float32, (17,), elements=numbers)


def reference(x: np.ndarray, low: float, high: float, k: int) -> np.ndarray:
    """The module's equations in NumPy, one value at a time; Python's `round` is half to even."""
    scale = np.float32(2**k - 1) / np.float32(max(np.float32(high) - np.float32(low), np.float32(1e-8)))
    zero = np.float32(round(float(scale * np.float32(low))) + 2 ** (k - 1))
    codes = [min(max(round(float(scale * v - zero)), -(2 ** (k - 1))), 2 ** (k - 1) - 1) for v in x]
    return (np.asarray(codes, np.float32) + zero) / scale


@settings(max_examples=60, deadline=None)
@given(values, numbers, numbers, bits)
@example(np.ones(17, np.float32), 0.0, 0.0, 7)  # a range without width
def test_it_agrees_with_a_reference_written_from_the_equations(x, a, b, k) -> None:
    low, high = min(a, b), max(a, b)
    y = np.asarray(quantizer.fake_quantize(jnp.asarray(x), jnp.float32(low), jnp.float32(high), k))
    expected = reference(x, low, high, k)
    width = max(high - low, 1e-8)
    step, tolerance = width / (2**k - 1), 1e-5 * (abs(low) + abs(high) + width)
    on_edge = np.abs(y - expected) > tolerance  # where fused arithmetic rounds a tie the other way
    assert np.all(np.abs(y - expected)[on_edge] <= step + tolerance) and len(np.unique(x[on_edge])) <= 2


@settings(max_examples=60, deadline=None)
@given(values, numbers, numbers, bits)
def test_codes_are_whole_and_in_range_and_values_are_few(x, a, b, k) -> None:
    scale, zero = quantizer.scale_and_zero_point(jnp.float32(min(a, b)), jnp.float32(max(a, b)), k)
    codes = np.asarray(quantizer.quantize(jnp.asarray(x), scale, zero, k))
    assert np.array_equal(codes, np.round(codes))
    assert codes.min() >= -(2 ** (k - 1)) and codes.max() <= 2 ** (k - 1) - 1
    assert len(np.unique(quantizer.dequantize(jnp.asarray(codes), scale, zero))) <= 2**k


def test_three_bits_on_minus_one_to_one_give_the_shifted_grid() -> None:
    x = jnp.linspace(-1, 1, 1001)
    levels = np.unique(quantizer.fake_quantize(x, jnp.float32(-1), jnp.float32(1), 3))
    np.testing.assert_allclose(levels, np.arange(-4, 4) / 3.5, rtol=1e-6)


def test_no_gradient_reaches_the_range() -> None:
    x = jnp.linspace(-2, 2, 9)
    low, high = jax.grad(lambda r: quantizer.fake_quantize(x, r[0], r[1], 3).sum())((jnp.float32(-1), jnp.float32(1)))
    assert low == 0 and high == 0


def test_the_second_derivative_is_that_of_the_identity_too() -> None:
    x, v = jnp.linspace(-2, 2, 9), jnp.arange(9.0)

    def cube_sum(x):
        return jnp.sum(quantizer.fake_quantize(x, jnp.float32(-1), jnp.float32(1), 3) ** 3)

    _, hessian_vector = jax.jvp(jax.grad(cube_sum), (x,), (v,))
    levels = quantizer.fake_quantize(x, jnp.float32(-1), jnp.float32(1), 3)
    np.testing.assert_allclose(hessian_vector, 6 * levels * v, rtol=1e-6)


def test_each_output_channel_of_a_weight_has_its_own_range() -> None:
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 5)) * jnp.asarray([1, 10, 100, 1e3, 1e4])[None, None, None]
    together = quantizer.fake_quantize_weight(kernel, 4)
    for channel in range(5):
        alone = quantizer.fake_quantize_weight(kernel[..., channel : channel + 1], 4)
        np.testing.assert_array_equal(together[..., channel : channel + 1], alone)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_mse_range_loses_less_than_the_minmax_range_where_there_are_outliers(k: int) -> None:
    x = jax.nn.relu(jax.random.normal(jax.random.key(0), (10_000,))).at[0].set(50.0)

    def loss(rule):
        return jnp.mean(jnp.square(quantizer.fake_quantize(x, *rule(x, k), k) - x))

    assert loss(quantizer.mse_range) < 0.9 * loss(quantizer.minmax_range)


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_the_clipped_gradient_changes_no_value_and_is_zero_outside_the_range_alone(k: int) -> None:
    x = jnp.linspace(-1, 3, 401)

    def output(straight_through: str, x: jax.Array) -> jax.Array:
        return quantizer.fake_quantize_activation(jax.nn.relu(x), jnp.float32(0), jnp.float32(1.234), k, straight_through)

    def gradient(rule):
        return jax.grad(lambda x: output(rule, x).sum())(x)

    np.testing.assert_array_equal(output("clipped", x), output("identity", x))
    np.testing.assert_array_equal(gradient("identity"), x > 0)
    np.testing.assert_array_equal(gradient("clipped"), (x > 0) & (x < 1.234))
