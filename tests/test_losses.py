"""Losses: their values on cases that can be worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from hast_jax.method import losses
from hast_jax.networks import BatchNormTap


def test_bn_statistics_are_zero_where_the_batch_has_the_running_moments() -> None:
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 3)) * 2 + 5
    tap = BatchNormTap(x, x.mean((0, 1, 2)), x.var((0, 1, 2)))
    mean, var = losses.bn_statistics(losses.bn_moments([tap, tap]))
    assert mean < 1e-10 and var < 1e-8


def test_bn_statistics_average_over_channels_and_layers() -> None:
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 2))
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    off = BatchNormTap(x, mean + jnp.asarray([1.0, 3.0]), var + jnp.asarray([2.0, 4.0]))
    exact = BatchNormTap(x, mean, var)
    mean_loss, var_loss = losses.bn_statistics(losses.bn_moments([off, exact]))
    np.testing.assert_allclose(mean_loss, (1 + 9) / 2 / 2, rtol=1e-4)
    np.testing.assert_allclose(var_loss, (4 + 16) / 2 / 2, rtol=1e-4)


def test_an_easier_sample_weighs_less_the_larger_gamma_is() -> None:
    logits, labels = jnp.asarray([[3.0, 0.0], [0.0, 1.0]]), jnp.asarray([0, 0])
    p = jax.nn.softmax(logits)[:, 0]
    for gamma in (0.0, 0.5, 1.0, 2.0):
        expected = jnp.mean((1 - p) ** gamma * -jnp.log(p))
        np.testing.assert_allclose(losses.hard_sample(logits, labels, gamma), expected, rtol=1e-5)


def test_a_perfectly_easy_sample_gives_a_finite_gradient_for_any_gamma() -> None:
    logits, labels = jnp.asarray([[200.0, 0.0], [0.0, 1.0]]), jnp.asarray([0, 0])
    for gamma in (0.0, 0.1, 0.5, 1.0, 2.0):
        assert jnp.isfinite(jax.grad(losses.hard_sample)(logits, labels, gamma)).all()


def test_distillation_is_zero_for_equal_logits_and_scales_with_the_squared_temperature() -> None:
    z = jax.random.normal(jax.random.key(0), (5, 7))
    other = jax.random.normal(jax.random.key(1), (5, 7))
    np.testing.assert_allclose(losses.distillation(z, z, 20.0, 20.0), 0, atol=1e-2)
    p, q = jax.nn.softmax(z / 2), jax.nn.softmax(other / 2)
    expected = 3 * 4 * jnp.mean(jnp.sum(p * jnp.log(p / q), 1))
    np.testing.assert_allclose(losses.distillation(z, other, 2.0, 3.0), expected, rtol=1e-5)


def test_attention_has_unit_length_and_survives_zeros() -> None:
    features = jax.random.normal(jax.random.key(0), (4, 3, 3, 6)).at[0].set(0)
    attention = losses.attention(features)
    np.testing.assert_allclose(jnp.linalg.norm(attention, axis=1), [0, 1, 1, 1], rtol=1e-6)
    assert jnp.isfinite(jax.grad(lambda f: losses.attention(f).sum())(features)).all()


def test_relaxed_alignment_ignores_scale_and_position_and_direct_alignment_does_not() -> None:
    f = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    moved = 3 * jnp.roll(f, 1, 1)
    np.testing.assert_allclose(losses.relaxed_alignment([f], [moved]), 0, atol=1e-12)
    np.testing.assert_allclose(losses.direct_alignment([f], [moved]), jnp.mean((f - moved) ** 2), rtol=1e-6)
