"""ResNet-20 on CIFAR-100.

    python -m hast_jax.main --config=configs/cifar100.py:w3a3 --workdir=runs/c100-w3a3
"""

from ml_collections import ConfigDict

from hast_jax import config as config_lib

SMALL = {
    "synthesis.images": 1536,
    "synthesis.iterations": 500,
    "finetune.batch": 64,
    "finetune.epochs": 20,
    "eval.every": 4,
}


def get_config(argument: str = "") -> ConfigDict:
    """argument: bits such as w4a4, and `small` for a CPU, joined by commas."""
    return config_lib.variant(config_lib.default(), argument, {"small": SMALL})
