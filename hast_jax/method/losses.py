"""Every loss of the method as a pure function that returns a scalar.

Notation: z are logits [batch, classes], f_l the output of residual branch l [batch, height, width, channels],
t the full-precision teacher, s the quantized student.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


class BatchNormTap(NamedTuple):
    """What the batch-norm statistics loss needs from one layer: its input [batch, ..., c] and its running moments [c]."""

    inputs: Array
    mean: Array
    var: Array


class Moments(NamedTuple):
    """Moments of the input x of one batch-norm layer, E[x] and E[(x - running mean)^2], and its running moments; each [c].

    If a batch is split into equal parts, the moments of the batch are the averages of the parts' moments.
    """

    mean: Array
    spread: Array
    running_mean: Array
    running_var: Array


def bn_moments(taps: Sequence[BatchNormTap]) -> tuple[Moments, ...]:
    """The moments of every batch-norm layer, over all axes of its input but the last, in one pass over the input."""

    def over(x):
        return tuple(range(x.ndim - 1))

    def mean(tap):
        return jnp.mean(tap.inputs, over(tap.inputs))

    def spread(tap):
        return jnp.mean(jnp.square(tap.inputs - jnp.expand_dims(tap.mean, over(tap.inputs))), over(tap.inputs))

    return tuple(Moments(mean(tap), spread(tap), tap.mean, tap.var) for tap in taps)


def bn_statistics(layers: Sequence[Moments]) -> tuple[Array, Array]:
    """The two parts of L_BNS, for the means and for the variances; their sum is the loss.

        L_BNS = (1/L) sum_l [ mean_c (m_lc - running_mean_lc)^2 + mean_c (v_lc - running_var_lc)^2 ]

    m, v: mean and biased variance of the input of batch-norm layer l. The variance is computed around the running mean r, as
    v = E[(x - r)^2] - (m - r)^2. This difference loses no digits, because m approaches r.
    """
    means = [jnp.mean(jnp.square(layer.mean - layer.running_mean)) for layer in layers]
    variances = [layer.spread - jnp.square(layer.mean - layer.running_mean) for layer in layers]
    errors = [jnp.mean(jnp.square(variance - layer.running_var)) for variance, layer in zip(variances, layers)]
    return jnp.mean(jnp.stack(means)), jnp.mean(jnp.stack(errors))


def hard_sample(logits: Array, labels: Array, gamma: float) -> Array:
    """L_HIL = mean_i d_i^gamma * CE_i with the difficulty d_i = 1 - p(y_i | x_i; t) (gamma: Eq. 8 of the paper).

    logits: the teacher's [batch, classes]. labels: [batch]. The gradient flows through d^gamma too. For gamma < 1 the
    derivative of d^gamma is infinite at d = 0. A sample with d = 0 therefore has a constant weight: 0, or 1 if gamma is 0.
    Without this, one perfectly easy sample would turn the whole batch into NaN.
    """
    labels = labels[:, None]
    cross_entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels, 1)[:, 0]
    difficulty = 1 - jnp.take_along_axis(jax.nn.softmax(logits), labels, 1)[:, 0]
    possible = difficulty > 0
    weight = jnp.where(possible, jnp.where(possible, difficulty, 1) ** gamma, float(gamma == 0))
    return jnp.mean(weight * cross_entropy)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean cross-entropy of logits [batch, classes] with labels [batch]."""
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def distillation(teacher_logits: Array, student_logits: Array, temperature: float, alpha: float) -> Array:
    """L_KL = alpha * T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), the mean over the batch."""
    divergence = optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(student_logits / temperature), jax.nn.log_softmax(teacher_logits / temperature)
    )
    return alpha * temperature**2 * jnp.mean(divergence)


def attention(features: Array) -> Array:
    """Channel attention A_l = a_l / max(||a_l||_2, 1e-12) with a_lc = mean_hw f_lchw^2; shape [batch, channels].

    features: [batch, height, width, channels], or with any other number of axes in the place of height and width.
    """
    energy = jnp.mean(jnp.square(features), tuple(range(1, features.ndim - 1)))
    return energy / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(energy), 1, keepdims=True), 1e-24))


def relaxed_alignment(teacher: Sequence[Array], student: Sequence[Array]) -> Array:
    """RFA: sum_l mean_{batch, c} (A_l(s) - A_l(t))^2 over the residual branches (Eq. 12 without its weight lambda)."""
    return sum((jnp.mean(jnp.square(attention(s) - attention(t))) for t, s in zip(teacher, student)), jnp.zeros(()))


def direct_alignment(teacher: Sequence[Array], student: Sequence[Array]) -> Array:
    """DFA: sum_l mean (f_l(s) - f_l(t))^2, the plain mean squared error (supplement, Table 3)."""
    return sum((jnp.mean(jnp.square(s - t)) for t, s in zip(teacher, student)), jnp.zeros(()))


ALIGNMENTS = {"rfa": relaxed_alignment, "dfa": direct_alignment}
