"""Quantize a trained image network to 2-8 bits without its data: HAST (CVPR 2023) in JAX."""
