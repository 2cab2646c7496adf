"""ResNet-18, MobileNetV1 or MobileNetV2 on ImageNet, with your weights; evaluation needs ImageNet's validation images.

    python -m hast_jax.main --config=configs/imagenet.py:w4a4 --workdir=runs/r18-w4a4 \\
        --config.teacher.weights=resnet18.pth --config.eval.data_dir=/data/imagenet

`/data/imagenet/val` holds one folder of images for each of the 1,000 classes, as torchvision reads it. For ImageNet from TFDS,
add `--config.eval.dataset=imagenet2012 --config.eval.split=validation`. The weights are a state dict of torchvision or
pytorchcv, as `.pth` or `.safetensors`. Each network is an argument of the config:

    resnet18 (the default)            weights of pytorchcv or of torchvision
    mobilenetv1, mobilenetv2          pytorchcv's mobilenet_w1, mobilenetv2_w1
    mobilenetv2_torchvision           torchvision's mobilenet_v2

For all networks the settings are HAST's, from its supplement and its config file for ImageNet. The paper reports these top-1
accuracies, from teachers of 71.47 (ResNet-18), 73.39 (MobileNetV1) and 73.03 (MobileNetV2):

    configs/imagenet.py:w4a4              66.91        configs/imagenet.py:mobilenetv1,w4a4  57.70
    configs/imagenet.py:w3a3              51.15        configs/imagenet.py:mobilenetv1,w5a5  68.52
                                                       configs/imagenet.py:mobilenetv2,w4a4  65.60

None of these has been measured here yet, and neither has the recipe `best` (docs/recipe.md). A full run is for accelerators:
5,120 images x 1,000 iterations, and 29,400 steps of 16 (4,000 with `best`). docs/performance.md says how much memory it takes,
and estimates its time. `--config.synthesis.remat=True --config.synthesis.micro_batch=32` needs less memory.

`small` (64 images x 20 iterations, 20 steps of 8) takes minutes, even on a CPU. It shows that weights and images are read and
that every stage runs. Its accuracies mean nothing.
"""

from ml_collections import ConfigDict

from hast_jax import config as config_lib

VARIANTS = {
    "best": config_lib.BEST,
    "small": {
        "synthesis.images": 64,
        "synthesis.batch": 32,
        "synthesis.iterations": 20,
        "calibration.batches": 5,
        "finetune.batch": 8,
        "finetune.epochs": 2,
        "finetune.steps_per_epoch": 10,
        "log_every": 10,
    },
    **{name: {"teacher.network": name} for name in ("resnet18", "mobilenetv1", "mobilenetv2", "mobilenetv2_torchvision")},
}


def get_config(argument: str = "") -> ConfigDict:
    """The config. argument: a network, bits such as w4a4, `best` and `small`, in any order, joined by commas."""
    config = config_lib.default()
    config.teacher.network = "resnet18"
    config.teacher.weights = ""
    config.teacher.classes = 1000
    config.teacher.image = (224, 224, 3)
    config.teacher.mean = (0.485, 0.456, 0.406)
    config.teacher.std = (0.229, 0.224, 0.225)
    config.synthesis.beta = 0.1
    config.synthesis.gamma = 0.5
    config.synthesis.crop_probability = 0.5
    config.finetune.batch = 16
    config.finetune.lr = 1e-6
    config.finetune.lr_drops = (96,)  # the authors drop it after epoch 100, which counts 4 epochs of calibration
    config.finetune.lam = 4000.0
    config.finetune.eps = 0.01
    config.finetune.stream = True  # 5,120 images take 3 GB
    config.eval.dataset = "folder"
    config.eval.split = "val"
    config.eval.batch = 256
    return config_lib.variant(config, argument, VARIANTS)
