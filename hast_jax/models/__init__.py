"""The name of `hast_jax.networks` in version 0.1, kept for networks that were written for that version."""

from hast_jax.networks import weights

__all__ = ["weights"]
