"""ResNet-20 on CIFAR-100, with a built-in teacher (67.62 %); evaluation needs CIFAR-100's test split in TFDS form.

    python -m hast_jax.main --config=configs/cifar100.py:w3a3,best,small --workdir=runs/c100-w3a3

`best` is the recipe that loses the least accuracy (docs/recipe.md). `small` is a budget for two cores. `best,small` makes 1,024
images with 200 iterations each and trains for 2,400 steps of 64, in about half an hour. W3A3 gave 61.74 on average.

Without `best` the settings are HAST's, from its supplement and its config file for CIFAR-100. The paper reports 66.68 for W4A4
and 55.67 for W3A3, from a teacher of 70.33 %. Without `small` the budget is the paper's, which is meant for an accelerator:
5,120 images x 1,000 iterations, and 29,400 steps of 256 (4,000 with `best`).

    python -m hast_jax.main --config=configs/cifar100.py:w3a3 --workdir=runs/c100-w3a3-paper

HAST's settings with `small` (1,536 images x 500 iterations, 4,000 steps of 64) gave 59.60 for W4A4 and 42.34 for W3A3, seed 0.
"""

from ml_collections import ConfigDict

from hast_jax import config as config_lib


def get_config(argument: str = "") -> ConfigDict:
    """The config. argument: bits such as w4a4, `best` and `small`, in any order, joined by commas."""
    return config_lib.variant(config_lib.default(), argument)
