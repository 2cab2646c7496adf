"""The losses around a student: angles between their gradients, and eigenvalues of their Hessians (supplement, Figure 2).

Derivatives are with respect to the trained variables of the student, on clean images, with the straight-through estimator.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict

from hast_jax.networks import Network
from hast_jax.runs import preemption
from hast_jax.stages import finetune

Array = jax.Array

LossFunctions = Callable[..., dict[str, Array]]


class Quadrature(NamedTuple):
    """The spectrum as one probe sees it: nodes, which estimate eigenvalues, and their weights, whose sum is one."""

    nodes: np.ndarray
    weights: np.ndarray


def losses(teacher: Network, student: Network, settings: ConfigDict) -> LossFunctions:
    """A function (trained, fixed, images, labels) -> {"ce", "kl", "fa"}: each loss times its weight; the weight of CE is 1.

    settings: `config.finetune`, in which L_FA has a weight.
    """
    settings = settings.copy_and_resolve_references()
    settings.ce = 1.0

    def of(trained: Any, fixed: finetune.FixedInputs, images: Array, labels: Array) -> dict[str, Array]:
        fixed = fixed._replace(strengths=fixed.strengths._replace(ce=jnp.ones(())))
        return finetune.distances(teacher, student, fixed, labels, settings)(trained, images)

    return of


def gradient_cosines(
    losses: LossFunctions, trained: Any, fixed: finetune.FixedInputs, images: Array, labels: Array
) -> dict[str, Array]:
    """Cosine similarity (scalar) of the gradient of KL with those of CE ("ce") and FA ("fa"), on one batch (Figure 2a)."""
    values, pull_back = jax.vjp(lambda t: losses(t, fixed, images, labels), trained)

    def gradient(name: str) -> Array:
        one_hot = {n: jnp.asarray(n == name, value.dtype) for n, value in values.items()}
        return ravel_pytree(pull_back(one_hot))[0]

    kl = gradient("kl")
    return {name: _cosine(gradient(name), kl) for name in ("ce", "fa")}


def _cosine(a: Array, b: Array) -> Array:
    return jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))


def hessian_spectrum(
    loss: Callable[..., Array], trained: Any, constants: tuple[Any, ...], key: Array, probes: int, depth: int
) -> list[Quadrature]:
    """Spectrum of the Hessian of `loss(trained, *constants)`, by stochastic Lanczos quadrature (Figure 2b).

    Each of `probes` random unit vectors gives one quadrature with at most `depth` nodes. Their average is the spectrum. depth:
    at most the number of trained values.
    """
    flat, unravel = ravel_pytree(trained)

    @jax.jit
    def hessian_vector(vector: Array, point: Array, *constants: Any) -> Array:
        def gradient(p):
            return jax.grad(lambda q: loss(unravel(q), *constants))(p)

        return jax.jvp(gradient, (point,), (vector,))[1]

    def product(vector):
        preemption.check()
        return np.asarray(hessian_vector(jnp.asarray(vector, flat.dtype), flat, *constants), np.float64)

    starts = np.asarray(jax.random.normal(key, (probes, len(flat))), np.float64)
    return [lanczos(product, start, depth) for start in starts]


def lanczos(product: Callable[[np.ndarray], np.ndarray], start: np.ndarray, depth: int) -> Quadrature:
    """A Gauss quadrature of the spectrum of a symmetric matrix, by Lanczos' algorithm. product: multiplies it by a vector.

    The loop runs in Python. JAX libraries such as matfree loop inside XLA, where convolutions on a CPU are more than ten times
    slower (jax issue 12868). For stability, each new vector is made orthogonal to all earlier vectors twice.
    """
    basis = start[None] / np.linalg.norm(start)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while True:
        vector = product(basis[-1])
        diagonal.append(float(vector @ basis[-1]))
        for _ in range(2):
            vector = vector - (basis @ vector) @ basis
        norm = float(np.linalg.norm(vector))
        exhausted = norm <= 1e-6 * max(map(abs, [*diagonal, *off_diagonal]))
        if len(diagonal) == depth or exhausted:
            break
        off_diagonal.append(norm)
        basis = np.concatenate([basis, vector[None] / norm])
    nodes, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal)
    return Quadrature(nodes, np.square(vectors[0]))


def average(quadratures: list[Quadrature]) -> Quadrature:
    """The average over all probes: all their nodes, with weights whose sum is one."""
    nodes, weights = (np.concatenate(each) for each in zip(*quadratures))
    return Quadrature(nodes, weights / len(quadratures))


def density(quadrature: Quadrature, grid: np.ndarray, width: float) -> np.ndarray:
    """The spectrum's density on `grid` [n]. Each node is widened to a Gaussian with standard deviation `width`."""
    return scipy.stats.norm.pdf(grid[:, None], quadrature.nodes[None], width) @ quadrature.weights
