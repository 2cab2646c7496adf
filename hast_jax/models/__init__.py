"""The place of `hast_jax.networks` in version 0.1, kept for networks that were written for it."""

from hast_jax.networks import weights

__all__ = ["weights"]
