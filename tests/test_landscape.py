"""Hessian spectra against exact ones, gradient angles against gradients taken one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree

from hast_jax import from_config, networks
from hast_jax.method import quantizer
from hast_jax.paper import figure2, landscape
from hast_jax.paper.landscape import Quadrature
from hast_jax.stages import finetune


def symmetric(size: int) -> np.ndarray:
    matrix = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    return matrix + matrix.T


def test_the_spectrum_of_a_quadratic_is_that_of_its_matrix() -> None:
    matrix = symmetric(30)

    def loss(p):
        return 0.5 * p["x"] @ matrix @ p["x"]

    found = landscape.hessian_spectrum(loss, {"x": jnp.ones(30)}, (), jax.random.key(0), probes=3, depth=30)
    assert len(found) == 3
    for nodes, weights in found:
        np.testing.assert_allclose(np.sort(nodes), np.linalg.eigvalsh(matrix), atol=1e-4)
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


def test_few_lanczos_steps_find_the_largest_eigenvalue_and_the_mean() -> None:
    eigenvalues = jnp.concatenate([jnp.linspace(-1, 1, 399), jnp.asarray([25.0])])

    def loss(p):
        return 0.5 * jnp.sum(eigenvalues * p**2)

    found = landscape.hessian_spectrum(loss, jnp.ones(400), (), jax.random.key(0), probes=32, depth=12)
    nodes, weights = landscape.average(found)
    np.testing.assert_allclose(nodes.max(), 25, rtol=1e-4)
    np.testing.assert_allclose(nodes @ weights, eigenvalues.mean(), atol=0.05)


def test_the_spectrum_of_a_small_quantized_network_is_that_of_its_exact_hessian() -> None:
    x, y = jax.random.normal(jax.random.key(1), (20, 4)), jnp.arange(20) % 3
    params = {"a": jax.random.normal(jax.random.key(2), (4, 5)), "b": jax.random.normal(jax.random.key(3), (5, 3))}

    def loss(p):
        hidden = quantizer.fake_quantize(
            jnp.tanh(x @ quantizer.fake_quantize_weight(p["a"], 4)), jnp.float32(-1), jnp.float32(1), 3
        )
        log_probabilities = jax.nn.log_softmax(hidden @ p["b"])
        return -jnp.mean(jnp.take_along_axis(log_probabilities, y[:, None], 1))

    flat, unravel = ravel_pytree(params)
    exact = np.linalg.eigvalsh(jax.hessian(lambda p: loss(unravel(p)))(flat))
    nodes, _ = landscape.average(landscape.hessian_spectrum(loss, params, (), jax.random.key(0), probes=2, depth=len(flat)))
    assert nodes.min() >= exact.min() - 1e-5 and nodes.max() <= exact.max() + 1e-5
    np.testing.assert_allclose([nodes.min(), nodes.max()], [exact.min(), exact.max()], atol=1e-5)


def test_it_stops_where_the_krylov_space_is_exhausted() -> None:
    eigenvalues = jnp.asarray([1.0, 1.0, 1.0, 4.0, 4.0])

    def loss(p):
        return 0.5 * jnp.sum(eigenvalues * p**2)

    [(nodes, weights)] = landscape.hessian_spectrum(loss, jnp.ones(5), (), jax.random.key(0), probes=1, depth=5)
    np.testing.assert_allclose(nodes, [1, 4], rtol=1e-5)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


def test_the_density_integrates_to_one() -> None:
    nodes, weights = np.asarray([-1.0, 2.0, 0.0, 1.0]), np.asarray([0.1, 0.4, 0.2, 0.3])
    grid = np.linspace(-5, 6, 1101)
    density = landscape.density(Quadrature(nodes, weights), grid, 0.3)
    np.testing.assert_allclose(density.sum() * (grid[1] - grid[0]), 1, rtol=1e-4)


def test_the_error_of_a_tail_is_that_of_its_probes() -> None:
    """Twice as many eigenvalues of 8 as of 0, give or take: the largest is sqrt(3 / 2) of the root mean square."""
    rng = np.random.default_rng(0)

    def probes() -> list[Quadrature]:
        eights = rng.beta(20, 10, size=16)
        return [Quadrature(np.asarray([0.0, 8.0]), np.asarray([1 - each, each])) for each in eights]

    found = [figure2.moments(probes()) for _ in range(200)]
    ratios = [one["largest_by_rms"] for one in found]
    np.testing.assert_allclose(np.mean(ratios), np.sqrt(3 / 2), rtol=0.01)
    np.testing.assert_allclose(np.mean([one["largest_by_rms_error"] for one in found]), np.std(ratios), rtol=0.15)
    np.testing.assert_allclose(
        [found[0]["mean"] * 8, found[0]["largest"], found[0]["smallest"]], [found[0]["root_mean_square"] ** 2, 8, 0]
    )


@pytest.mark.parametrize(
    ("ce", "kl", "fa", "verdict"),
    [(150, 100, 90, "holds"), (100, 150, 90, "does not hold"), (100, 90, 150, "does not hold"), (110, 100, 50, "undecided")],
)
def test_cross_entropy_has_the_longer_tail_where_it_leads_both_by_more_than_the_error(
    ce: float, kl: float, fa: float, verdict: str
) -> None:
    def row(ratio):
        return {"largest_by_rms": ratio, "largest_by_rms_error": 5.0}

    assert f"**{verdict}**" in figure2.tail_finding({"ce": row(ce), "kl": row(kl), "fa": row(fa)})


def test_gradients_agree_where_every_epochs_mean_is_positive() -> None:
    positive, mixed, negative = [[0.5, -0.1], [0.2, 0.1]], [[0.5, 0.4], [-0.2, 0.1]], [[-0.5, 0.4], [-0.2, -0.1]]

    def verdicts(fa, ce):
        return [line.split("**")[1] for line in figure2.angle_findings([0, 1], {"fa": fa, "ce": ce})]

    assert verdicts(positive, negative) == ["holds", "holds"]
    assert verdicts(mixed, mixed) == verdicts(negative, positive) == ["does not hold", "does not hold"]


def test_cosines_are_those_of_the_gradients_of_each_loss_alone() -> None:
    config = tiny.config()
    teacher, variables = from_config.teacher(config)
    student = from_config.student(config)
    images, labels = jax.random.normal(jax.random.key(1), (8, 8, 8, 1)), jnp.arange(8)
    ranges = networks.observe(student, variables, {}, images)
    fixed = finetune.fixed_inputs(variables, ranges, images, labels, config)
    params = variables["params"]
    losses = landscape.losses(teacher, student, config.finetune)
    found = jax.jit(lambda p: landscape.gradient_cosines(losses, {"params": p}, fixed, images, labels))(params)

    def each_loss(p):
        logits, _ = networks.apply(student, {**variables, "params": p, "ranges": ranges}, images)
        found = losses({"params": p}, fixed, images, labels)
        cross_entropy = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), labels])
        return {"ce": cross_entropy, "kl": found["kl"], "fa": found["fa"]}

    gradients = jax.jit(jax.jacrev(each_loss))(params)
    flat = {name: np.asarray(ravel_pytree(gradient)[0], np.float64) for name, gradient in gradients.items()}
    for name in ("ce", "fa"):
        expected = flat[name] @ flat["kl"] / np.linalg.norm(flat[name]) / np.linalg.norm(flat["kl"])
        np.testing.assert_allclose(found[name], expected, atol=1e-4)
