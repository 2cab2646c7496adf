"""Sample difficulty promotion: images are moved one step to where teacher and student differ more (Eq. 10)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Distances = Callable[[Any, Array], tuple[Array, Array]]

# The weights of (KL, FA) in the loss whose gradient gives the direction (supplement, Table 1).
DIRECTIONS = {"kl": (1.0, 0.0), "fa": (0.0, 1.0), "kl+fa": (1.0, 1.0)}


def perturb(images: Array, gradient: Array, eps: float) -> Array:
    """x' = stop_gradient(x + eps * sign(gradient)): one sign step, no clamp."""
    return jax.lax.stop_gradient(images + eps * jnp.sign(gradient))


def promote(
    distances: Distances, params: Any, images: Array, eps: float, direction: str
) -> tuple[tuple[Array, Array], Any, Array]:
    """Losses and parameter gradient on the clean images, and the promoted images, from one forward and one backward pass.

    distances: (params, images [batch, height, width, channels]) -> scalars (L_KL, L_FA). The gradient with respect to the
    images flows through both teacher and student, so `distances` must not stop it.

    Returns ((L_KL, L_FA), gradient of L_KL + L_FA with respect to `params`, promoted images).
    """
    losses, pull_back = jax.vjp(distances, params, images)
    cotangents = lambda weights: tuple(jnp.asarray(w, loss.dtype) for w, loss in zip(weights, losses))
    params_gradient, images_gradient = pull_back(cotangents(DIRECTIONS["kl+fa"]))
    if direction != "kl+fa":
        _, images_gradient = pull_back(cotangents(DIRECTIONS[direction]))
    return losses, params_gradient, perturb(images, images_gradient, eps)
