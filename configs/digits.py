"""A small ResNet on scikit-learn's 1,797 handwritten digits: everything is built in, nothing is downloaded.

    python -m hast_jax.main --config=configs/digits.py --workdir=runs/digits

Under two minutes on two cores; some 98 % of 719 held-out digits at W3A3 (the README's table), where the paper has no row.
The teacher (99.58 %) ships with the package; it was trained by

    python -m hast_jax.pretrain --config=configs/digits.py
"""

from ml_collections import ConfigDict

from hast_jax import config as config_lib

VARIANTS = {
    "best": {**config_lib.BEST, "finetune.epochs": 8},
    "small": {"synthesis.images": 256, "synthesis.iterations": 100, "finetune.epochs": 2},
}


def get_config(argument: str = "") -> ConfigDict:
    """argument: bits such as w4a4, `best`, `small` (half a minute, for trying things out), joined by commas."""
    config = config_lib.default()
    config.teacher.network = "resnet8"
    config.teacher.weights = "digits"
    config.teacher.classes = 10
    config.teacher.image = (8, 8, 1)
    config.teacher.mean = (0.3053,)
    config.teacher.std = (0.3762,)
    config.synthesis.images = 1024
    config.synthesis.iterations = 300
    config.calibration.batches = 100
    config.finetune.batch = 64
    config.finetune.epochs = 8
    config.finetune.steps_per_epoch = 100
    config.eval.dataset = "digits"
    config.eval.batch = 240
    config.eval.every = 2
    return config_lib.variant(config, argument, VARIANTS)
