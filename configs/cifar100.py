"""ResNet-20 on CIFAR-100, with a built-in teacher (67.62 %); evaluation needs CIFAR-100's test split in TFDS form.

    python -m hast_jax.main --config=configs/cifar100.py:w3a3 --workdir=runs/c100-w3a3

Settings: HAST, supplement and config file for CIFAR-100. Paper, from a teacher of 70.33 %: W4A4 66.68, W3A3 55.67.
A full run (5,120 images x 1,000 iterations, 29,400 steps of 256) is meant for an accelerator. `small` is meant for a CPU:

    python -m hast_jax.main --config=configs/cifar100.py:w3a3,small --workdir=runs/c100-w3a3-small

It makes 1,536 images x 500 iterations and takes 4,000 steps of 64. From the teacher of 67.62 %, seed 0: W4A4 gave 59.60, W3A3
42.34; with `w4a4,small,tuned` 64.63, with `w3a3,small,tuned` 55.42.
"""

from ml_collections import ConfigDict

from hast_jax import config as config_lib


def get_config(argument: str = "") -> ConfigDict:
    """argument: bits such as w4a4, `small` and `tuned`, joined by a comma."""
    return config_lib.variant(config_lib.default(), argument)
