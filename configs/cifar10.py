"""ResNet-20 on CIFAR-10, with a built-in teacher (90.09 %); evaluation needs CIFAR-10's test split in TFDS form.

    python -m hast_jax.main --config=configs/cifar10.py:w3a3 --workdir=runs/c10-w3a3

Settings: HAST, supplement and config file for CIFAR-10. Paper, from a teacher of 94.03 %: W4A4 92.36, W3A3 88.34.
A full run (5,120 images x 1,000 iterations, 29,400 steps of 256) is meant for an accelerator. `small` is meant for a CPU:

    python -m hast_jax.main --config=configs/cifar10.py:w3a3,small --workdir=runs/c10-w3a3-small

It makes 1,536 images x 500 iterations and takes 4,000 steps of 64. From the teacher of 90.09 %, seed 0: W4A4 gave 88.99, W3A3
85.11; with `w4a4,small,tuned` 89.24, with `w3a3,small,tuned` 85.87, both with --config.synthesis.return_to_best=False.
"""

from ml_collections import ConfigDict

from hast_jax import config as config_lib


def get_config(argument: str = "") -> ConfigDict:
    """argument: bits such as w4a4, `small` and `tuned`, joined by a comma."""
    config = config_lib.default()
    config.teacher.weights = "cifar10"
    config.teacher.classes = 10
    config.finetune.lam = 1000.0
    config.finetune.eps = 0.01
    config.eval.dataset = "cifar10"
    return config_lib.variant(config, argument)
