"""The config: its fields with the paper's values, and the checks that refuse an impossible one before any work.

A config file in `configs/` calls `default()` and changes what its experiment needs. Fields not named there are the
settings of HAST for CIFAR-100.
"""

import difflib
import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from hast_jax.data.datasets import DATASETS
from hast_jax.errors import UserError
from hast_jax.method import losses, promotion, quantizer
from hast_jax.networks import ARCHITECTURES, user_files
from hast_jax.networks.conv import ARITHMETIC
from hast_jax.runs.files import crc32

FULL_PRECISION = 32  # bits that are not quantized
SCHEDULES = ("step", "cosine")

# Variants of the CIFAR configs. `small`: a budget for a CPU. `tuned`: settings that lose less at that budget than the paper's.
VARIANTS: dict[str, dict[str, Any]] = {
    "small": {
        "synthesis.images": 1536,
        "synthesis.iterations": 500,
        "finetune.batch": 64,
        "finetune.epochs": 20,
        "eval.every": 4,
    },
    "tuned": {
        "synthesis.return_to_best": True,
        "calibration.range": "mse",
        "calibration.batches": 100,
        "calibration.batch": 64,
        "finetune.straight_through": "clipped",
        "finetune.lr": 4e-6,
        "finetune.schedule": "cosine",
    },
}

# Fields that say where and how fast, not what: a run may go on with others.
FREE_FIELDS = (
    "devices",
    "steps_per_call",
    "log_every",
    "eval.data_dir",
    "eval.batch",
    "synthesis.save_every",
    "synthesis.micro_batch",
    "synthesis.stack",
    "synthesis.remat",
    "finetune.stream",
    "finetune.keep_every",
    "synthesis.source",  # a run knows its images by their content: RunFolder.check_images
)

# Fields in which the processes of one run may differ: where each finds things.
OWN_FIELDS = ("eval.data_dir", "synthesis.source", "devices")

MAX_BATCH_VALUES = 2**29  # of a batch of images: 2 GiB in float32


def default() -> ConfigDict:
    """Every field of a config, with the paper's values for CIFAR-100 (supplement, and the authors' config files)."""
    return ConfigDict(
        {
            "seed": 0,
            "devices": 0,  # local devices used; 0: all accelerators, or a CPU device a core, as many as divide finetune.batch
            "fast_convolution": True,
            "steps_per_call": 0,  # steps in one XLA call; 0: 1 on a CPU, 50 on an accelerator
            "log_every": 50,  # steps between two looks at the metrics
            "bits": {"weights": 3, "activations": 3, "rules": ""},
            "teacher": {
                "network": "resnet20",  # one of models.ARCHITECTURES, or FILE.py:CLASS for one of your own
                "weights": "cifar100",  # a built-in teacher, or the path of a .safetensors, .npz or .pth file
                "classes": 100,
                "image": (32, 32, 3),  # height, width, channels
                "mean": (0.4914, 0.4822, 0.4465),  # of images in [0, 1], for each channel
                "std": (0.2023, 0.1994, 0.2010),
                "arguments": "",
                "call": "",
                "arithmetic": "float32",  # of its products: tensorfloat32 or bfloat16 are faster on accelerators
            },
            "pretrain": {  # only for python -m hast_jax.pretrain
                "epochs": 60,
                "batch": 64,
                "lr": 0.1,
                "weight_decay": 5e-4,
                "shift": 1,  # pixels by which training images are moved at random
            },
            "synthesis": {
                "source": "",  # folder of a synthetic set whose first `images` are used instead of making some
                "real_split": "",  # split of eval.dataset to train on instead: the upper bound; not data-free
                "images": 5120,
                "batch": 256,  # images optimised together: BN statistics are of one batch
                "micro_batch": 0,  # images of a batch that pass the network together; 0: all, or 32 on a CPU
                "stack": 0,  # batches at once on one device; 0: as many as fill half of its memory, or one on a CPU
                "remat": False,  # compute a part's intermediate arrays again for the gradient: the memory of one part
                "iterations": 1000,  # 0: the images stay the noise that they start from
                "beta": 10.0,  # weight of the hard-sample loss
                "gamma": 2.0,  # exponent of the difficulty, Eq. 8
                "lr": 0.5,  # Adam
                "patience": 50,  # iterations without improvement before the rate drops ...
                "threshold": 1e-4,  # ... by less than this fraction
                "factor": 0.1,
                "min_lr": 1e-4,
                "return_to_best": False,  # to the images of the lowest loss, where the rate drops and at the end
                "crop_probability": 0.0,  # of seeing the batch through a random resized crop and flip
                "crop_scale": 0.4,  # smallest area of that crop
                "save_every": 250,  # iterations between two checkpoints within a batch
            },
            "calibration": {"batches": 800, "batch": 16, "range": "minmax"},
            "finetune": {
                "epochs": 147,
                "steps_per_epoch": 200,
                "batch": 256,  # over all devices
                "lr": 1e-5,
                "schedule": "step",  # or cosine, to zero at the last step
                "lr_drops": (16, 36, 56),  # epochs after which the rate is divided by ten
                "straight_through": "identity",  # or clipped: no gradient to activations outside their range
                "momentum": 0.9,
                "weight_decay": 1e-4,
                "temperature": 20.0,
                "alpha": 20.0,
                "lam": 2000.0,  # weight of the feature alignment, Eq. 12
                "alignment": "rfa",  # relaxed; dfa: direct
                "ce": 0.0,  # weight of the cross-entropy on synthetic labels; not in HAST, for comparison with IntraQ
                "eps": 0.02,  # size of the promotion, Eq. 10
                "direction": "kl+fa",  # loss whose gradient promotes: kl, fa or kl+fa
                "a": 1.0,  # weight of the loss on clean images
                "b": 1.0,  # weight of the loss on promoted images; 0: no promotion
                "stream": False,  # read images from disk as they are drawn, instead of keeping all on every device
                "keep_every": 0,  # epochs between checkpoints that are kept for good; 0: none
                "branches": "",
                "augment": True,
                "crop_scale": 0.5,  # smallest area of the random resized crop
            },
            "eval": {
                "dataset": "cifar100",  # none: run without real images
                "split": "test",
                "data_dir": "",  # folder of TFDS (empty: ~/tensorflow_datasets), or the one that holds the split, for `folder`
                "crop": 224 / 256,  # of a file's image, resized: the share of its shorter side that is kept
                "batch": 500,
                "every": 10,  # epochs between two evaluations
            },
        }
    )


def variant(config: ConfigDict, argument: str, variants: dict[str, Any] = VARIANTS) -> ConfigDict:
    """Apply a config file's argument such as "w4a4,small": bits, and the names in `variants`.

    variants: name -> fields to change, as a flat {"finetune.lr": value}. Raises UserError for an unknown word.
    """
    chosen = None
    for word in filter(None, argument.split(",")):
        if word in variants:
            config.update_from_flattened_dict(variants[word])
        elif len(word) == 4 and word[0] == "w" and word[2] == "a" and word[1].isdigit() and word[3].isdigit():
            if chosen not in (None, word):
                raise UserError(f"the config has one number of bits, not {chosen} and {word}: choose one.")
            chosen = word
            config.bits.weights, config.bits.activations = int(word[1]), int(word[3])
        else:
            known = ", ".join(["w4a4 (any bits)", *variants])
            raise UserError(f"the config has no variant {word!r}: choose from {known}.")
    return config


def validate(config: ConfigDict) -> None:
    """Raise UserError, in one sentence, for the first impossible value."""
    for path, wrong, wanted in _faults(config):
        if wrong:
            raise UserError(f"config.{path} is {field(config, path)!r}: it must be {wanted}.")


def field(config: ConfigDict, path: str) -> Any:
    """The value of a field such as "finetune.eps"."""
    return functools.reduce(lambda section, name: section[name], path.split("."), config)


def _faults(config: ConfigDict) -> Iterator[tuple[str, bool, str]]:
    """(field, is it impossible, what it must be), field by field."""
    synthesis, calibration, finetune, teacher = config.synthesis, config.calibration, config.finetune, config.teacher
    bits = f"between {quantizer.MIN_BITS} and {quantizer.MAX_BITS}"
    for name in ("weights", "activations"):
        yield f"bits.{name}", not quantizer.MIN_BITS <= config.bits[name] <= quantizer.MAX_BITS, bits
    for path, value in flatten_dict(config.to_dict(), sep=".").items():
        yield path, isinstance(value, float) and not math.isfinite(value), "finite"
    yield "seed", not 0 <= config.seed < 2**32, "between 0 and 2**32 - 1"
    choices: dict[str, tuple[str, Any]] = {
        "teacher.arithmetic": (teacher.arithmetic, ARITHMETIC),
        "calibration.range": (calibration.range, quantizer.RANGE_RULES),
        "finetune.schedule": (finetune.schedule, SCHEDULES),
        "finetune.straight_through": (finetune.straight_through, quantizer.STRAIGHT_THROUGH),
        "finetune.alignment": (finetune.alignment, losses.ALIGNMENTS),
        "finetune.direction": (finetune.direction, promotion.DIRECTIONS),
        "eval.dataset": (config.eval.dataset, DATASETS),
    }
    if not user_files.is_own(teacher.network):
        choices["teacher.network"] = teacher.network, [*ARCHITECTURES, "FILE.py:CLASS"]
    for path, (value, known) in choices.items():
        close = difflib.get_close_matches(str(value), known, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        yield path, value not in known, "one of " + ", ".join(known) + hint
    positive = {
        "log_every": config,
        "teacher.classes": teacher,
        **{f"pretrain.{n}": config.pretrain for n in ("epochs", "batch", "lr")},
        **{f"synthesis.{n}": synthesis for n in ("images", "batch", "lr", "save_every", "min_lr")},
        **{f"calibration.{n}": calibration for n in ("batches", "batch")},
        **{f"finetune.{n}": finetune for n in ("epochs", "steps_per_epoch", "batch", "lr", "temperature", "alpha")},
        "eval.batch": config.eval,
        "eval.every": config.eval,
    }
    for path, section in positive.items():
        yield path, not section[path.split(".")[-1]] > 0, "positive"
    not_negative = {
        "devices": config,
        "steps_per_call": config,
        **{
            f"synthesis.{n}": synthesis
            for n in ("micro_batch", "stack", "iterations", "beta", "gamma", "patience", "threshold")
        },
        **{f"finetune.{n}": finetune for n in ("lam", "ce", "eps", "a", "b", "weight_decay", "momentum", "keep_every")},
    }
    for path, section in not_negative.items():
        yield path, not section[path.split(".")[-1]] >= 0, "zero or positive"
    yield "finetune.lr_drops", not all(epoch > 0 for epoch in finetune.lr_drops), "positive epochs"
    yield "pretrain.shift", not config.pretrain.shift >= 0, "zero or positive"
    yield "finetune.a", finetune.a == finetune.b == 0, "positive where finetune.b is 0, or nothing is learned"
    yield "finetune.momentum", not finetune.momentum < 1, "below 1"
    yield "eval.crop", not 0 < config.eval.crop <= 1, "above 0 and at most 1"
    yield "synthesis.crop_probability", not 0 <= synthesis.crop_probability <= 1, "between 0 and 1"
    for path, section in {"synthesis": synthesis, "finetune": finetune}.items():
        yield f"{path}.crop_scale", not 0 < section.crop_scale <= 1, "above 0 and at most 1"
    both = bool(synthesis.source and synthesis.real_split)
    yield "synthesis.real_split", both, "empty where synthesis.source is set"
    bases = lambda split: {part.split("[")[0].strip() for part in split.split("+")}
    shared = bases(synthesis.real_split) & (bases(config.eval.split) | {"all"}) - {""}
    yield "synthesis.real_split", bool(shared), "without images of the evaluation's split, eval.split"
    odd = synthesis.micro_batch > 0 and synthesis.batch % synthesis.micro_batch != 0
    yield "synthesis.micro_batch", odd, f"a divisor of the batch, {synthesis.batch}"
    yield "synthesis.factor", not 0 < synthesis.factor < 1, "between 0 and 1"
    image = teacher.image
    square = len(image) == 3 and image[0] == image[1] > 0 and image[2] in (1, 3)
    yield "teacher.image", not square, "(size, size, 1 or 3 channels)"
    most = MAX_BATCH_VALUES // max(1, math.prod(image))
    yield "teacher.image", most < 1, "smaller: a single image would take more than 2 GiB"
    yield "eval.batch", config.eval.batch > most, f"at most {most}, or a batch of images would take more than 2 GiB"
    for name in ("mean", "std"):
        yield f"teacher.{name}", len(teacher[name]) != image[2], f"one number for each of the {image[2]} channels"
    yield "teacher.std", not min(teacher.std) > 0, "positive for each channel"
    if not synthesis.source and not synthesis.real_split:
        yield "synthesis.batch", synthesis.batch > synthesis.images, f"at most synthesis.images, {synthesis.images}"
        yield "synthesis.images", synthesis.images % synthesis.batch != 0, f"a multiple of the batch, {synthesis.batch}"
        for name, section in {"calibration": calibration, "finetune": finetune}.items():
            most = f"at most synthesis.images, {synthesis.images}"
            yield f"{name}.batch", section.batch > synthesis.images, most


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines "field: old -> new" for each field that differs, but for `FREE_FIELDS`."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        path, a, b = prefix + name, old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference(a, b, path + ".")
        elif a != b and path not in FREE_FIELDS:
            lines.append(f"{path}: {a!r} -> {b!r}")
    return lines


def checksum(config: ConfigDict) -> int:
    """Of all fields but `OWN_FIELDS`, below 2**32: the same in all processes of one run."""
    flat = flatten_dict(to_dict(config), sep=".")
    common = {path: value for path, value in flat.items() if path not in OWN_FIELDS}
    return crc32(np.frombuffer(json.dumps(common, sort_keys=True).encode(), np.uint8))


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """A config from what `to_dict` gave."""
    config = default()
    config.update(_with_tuples(values))
    return config


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_tuples(v) for name, v in value.items()}
    return tuple(value) if isinstance(value, list) else value
