"""Sample difficulty promotion: images are moved one step in the direction in which teacher and student differ more (Eq. 10)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Losses = dict[str, Array]
Distances = Callable[[Any, Array], Losses]

# The losses whose gradient gives the direction (supplement, Table 1).
DIRECTIONS = {"kl": {"kl"}, "fa": {"fa"}, "kl+fa": {"kl", "fa"}}


def perturb(images: Array, gradient: Array, eps: Array | float) -> Array:
    """x' = stop_gradient(x + eps * sign(gradient)): one sign step, no clamp."""
    return jax.lax.stop_gradient(images + eps * jnp.sign(gradient))


def promote(distances: Distances, params: Any, images: Array, eps: Array | float, direction: str) -> tuple[Losses, Any, Array]:
    """Losses and parameter gradient on the clean images, and the promoted images, from one forward and one backward pass.

    distances: (params, images [batch, height, width, channels]) -> scalars {"kl": L_KL, "fa": L_FA, ...}. The gradient
    with respect to the images flows through both teacher and student, so `distances` must not stop it. direction: one of
    `DIRECTIONS`.

    Returns (losses, gradient of their sum with respect to `params`, promoted images). A direction that leaves out a loss
    costs a second backward pass.
    """
    losses, pull_back = jax.vjp(distances, params, images)

    def cotangents(chosen):
        return {name: jnp.asarray(name in chosen, loss.dtype) for name, loss in losses.items()}

    params_gradient, images_gradient = pull_back(cotangents(losses.keys()))
    if DIRECTIONS[direction] != losses.keys():
        _, images_gradient = pull_back(cotangents(DIRECTIONS[direction]))
    return losses, params_gradient, perturb(images, images_gradient, eps)
