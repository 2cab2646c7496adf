"""Every loss of the method as a pure function that returns a scalar.

Notation: z are logits [batch, classes], f_l the output of residual branch l [batch, height, width, channels],
t the full-precision teacher, s the quantized student.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from hast_jax.models.layers import BatchNormTap

Array = jax.Array


def bn_statistics(*parts: Sequence[BatchNormTap]) -> tuple[Array, Array]:
    """The two parts of L_BNS, for the means and for the variances; their sum is the loss.

    parts: the taps of a batch, or of each of several equal parts of it, whose moments combine to those of the batch.

        L_BNS = (1/L) sum_l [ mean_c (m_lc - running_mean_lc)^2 + mean_c (v_lc - running_var_lc)^2 ]

    m, v: mean and biased variance over batch, height and width of the input of batch-norm layer l. Both come from one
    pass over the input; taken around the running mean, which m approaches, v = E[(x - r)^2] - (m - r)^2 loses no digits.
    """
    means, variances = [], []
    for layer in zip(*parts):
        average = lambda values: sum(values) / len(parts)
        running = layer[0]
        mean = average([jnp.mean(tap.inputs, (0, 1, 2)) for tap in layer])
        spread = average([jnp.mean(jnp.square(tap.inputs - tap.mean[None, None, None]), (0, 1, 2)) for tap in layer])
        variance = spread - jnp.square(mean - running.mean)
        means.append(jnp.mean(jnp.square(mean - running.mean)))
        variances.append(jnp.mean(jnp.square(variance - running.var)))
    return jnp.mean(jnp.stack(means)), jnp.mean(jnp.stack(variances))


def hard_sample(logits: Array, labels: Array, gamma: float) -> Array:
    """L_HIL = mean_i d_i^gamma * CE_i with the difficulty d_i = 1 - p(y_i | x_i; t) (gamma: Eq. 8 of the paper).

    The gradient flows through d^gamma. For gamma < 1 its derivative at d = 0 is infinite; such a sample, which is
    perfectly easy, weighs nothing here instead of turning the whole batch into NaN.
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
    """Channel attention A_l = a_l / max(||a_l||_2, 1e-12) with a_lc = mean_hw f_lchw^2; shape [batch, channels]."""
    energy = jnp.mean(jnp.square(features), (1, 2))
    return energy / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(energy), 1, keepdims=True), 1e-24))


def relaxed_alignment(teacher: Sequence[Array], student: Sequence[Array]) -> Array:
    """RFA: sum_l mean_{batch, c} (A_l(s) - A_l(t))^2 over the residual branches (Eq. 12 without its weight lambda)."""
    return sum((jnp.mean(jnp.square(attention(s) - attention(t))) for t, s in zip(teacher, student)), jnp.zeros(()))


def direct_alignment(teacher: Sequence[Array], student: Sequence[Array]) -> Array:
    """DFA: sum_l mean (f_l(s) - f_l(t))^2, the plain mean squared error (supplement, Table 3)."""
    return sum((jnp.mean(jnp.square(s - t)) for t, s in zip(teacher, student)), jnp.zeros(()))


ALIGNMENTS = {"rfa": relaxed_alignment, "dfa": direct_alignment}
