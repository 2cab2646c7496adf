"""ResNet-20 on CIFAR-100, with a built-in teacher (67.62 %); evaluation needs CIFAR-100's test split in TFDS form.

    python -m hast_jax.main --config=configs/cifar100.py:w3a3,best,small --workdir=runs/c100-w3a3

`best` is the recipe that loses least (docs/recipe.md). `small` is meant for two cores: 1,024 images x 400 iterations and 1,600
steps of 64, in about half an hour. Three seeds at W3A3 gave 60.73, 60.50 and 60.21. W4A4 gave 66.28 with seed 0.

Without `best` the settings are HAST's, from its supplement and its config file for CIFAR-100. Paper, from a teacher of 70.33 %:
W4A4 66.68, W3A3 55.67. Without `small` the budget is the paper's, 5,120 images x 1,000 iterations and 29,400 steps of 256
(4,000 with `best`), and meant for an accelerator:

    python -m hast_jax.main --config=configs/cifar100.py:w3a3 --workdir=runs/c100-w3a3-paper

HAST's settings with `small` (1,536 images x 500 iterations, 4,000 steps of 64), seed 0: W4A4 gave 59.60, W3A3 42.34.
"""

from ml_collections import ConfigDict

from hast_jax import config as config_lib


def get_config(argument: str = "") -> ConfigDict:
    """argument: bits such as w4a4, `best` and `small`, joined by commas."""
    return config_lib.variant(config_lib.default(), argument)
