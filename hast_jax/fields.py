"""Every field of the config, described once: its default, its possible values and its purpose.

The defaults are the paper's for CIFAR-100 (supplement, and the authors' config files). `python -m hast_jax.fields` prints the
table in docs/configuration.md.
"""

from hast_jax.data import image_files
from hast_jax.data.datasets import DATASETS
from hast_jax.kinds import (
    Field,
    between,
    count,
    count_or_zero,
    holds,
    json_object,
    not_negative,
    one_of,
    parsed_by,
    positive,
    share,
)
from hast_jax.method import losses, promotion, quantizer
from hast_jax.networks import ARCHITECTURES, rules, user_files
from hast_jax.networks.conv import ARITHMETIC

SCHEDULES = ("step", "cosine")
IMAGE_SCHEDULES = ("plateau", "cosine")
CROPS = ("batch", "image")
OPTIMIZERS = ("sgd", "adam")
RANGES = ("fixed", "learned")
NETWORKS = (*ARCHITECTURES, "FILE.py:NAME")
GIVEN = "(given in Python)"  # stands for a Python object that was given, or ends its name
JSON = parsed_by(json_object, "a JSON object")
LOW, HIGH = quantizer.MIN_BITS, quantizer.MAX_BITS
FULL = rules.FULL_PRECISION
BITS = holds(lambda bits: LOW <= bits <= HIGH or bits == FULL, f"between {LOW} and {HIGH}, or {FULL}")
shape = holds(lambda image: len(image) == 3 and min(image) > 0, "(height, width, channels), all positive")

FIELDS: dict[str, Field] = {
    "seed": Field(0, "Seed of everything random.", between(0, 2**32 - 1)),
    "devices": Field(
        0,
        "Local devices that a process uses. 0: all accelerators; on a CPU one for each core, at most 8 (in Python one). "
        "0 is reduced to a number that divides `finetune.batch`.",
        between(0, 1024),
        free=True,
        own=True,
    ),
    "steps_per_call": Field(
        0,
        "Most steps in one XLA call. A smaller number is taken if this one does not divide an epoch, or "
        "`synthesis.iterations`. 0: one on a CPU, 50 on an accelerator.",
        count_or_zero,
        free=True,
    ),
    "log_every": Field(
        50,
        "Steps between two log lines; if `steps_per_call` is larger, that many. A run in several processes stops for "
        "SIGTERM only at a log line.",
        count,
        free=True,
    ),
    "report": Field(True, "Write `report.html` and `README.md` into the run's folder at the end of the run.", free=True),
    "fast_convolution": Field(
        True,
        "Use faster convolutions on CPUs. Without them a network computes exactly what its own `apply` does.",
    ),
    "bits.weights": Field(3, "Bits of the weights: 2 to 8, or 32 for full precision.", BITS),
    "bits.activations": Field(3, "Bits of the activations: 2 to 8, or 32 for full precision.", BITS),
    "bits.rules": Field(
        "",
        "Other bits for some layers: `PATTERN=BITS; PATTERN=BITS`. A pattern is a regular expression over whole names in a "
        "layer's path. Bits are w8a8, w8 (activations in full precision), a8 or full. Example: `init_block|output=w8a8`.",
        parsed_by(rules.parse_rules, "PATTERN=BITS; PATTERN=BITS"),
    ),
    "teacher.network": Field(
        "resnet20",
        "The full-precision network. FILE.py:NAME names your own network.",
        one_of(NETWORKS, also=lambda name: user_files.is_own(name) or name.endswith(GIVEN)),
        choices=NETWORKS,
    ),
    "teacher.arguments": Field(
        "", 'Arguments of your own network\'s constructor, as a JSON object. Example: `{"num_classes": 10}`.', JSON
    ),
    "teacher.call": Field(
        "",
        "Arguments of your own network's call besides the images, as a JSON object. You need not give `train=False` and its "
        "synonyms.",
        JSON,
    ),
    "teacher.weights": Field(
        "cifar100",
        "A built-in teacher (digits, cifar10, cifar100), or the path of a weight file or of an Orbax folder. "
        "docs/your_network.md lists the formats.",
        free=True,  # a run checks the content of its weights instead: RunFolder.check_teacher
        own=True,
    ),
    "teacher.names": Field(
        "",
        "FILE.py:FUNCTION, a function of yours that says how the weight file names each variable.",
        holds(lambda value: not value or user_files.is_own(value), "FILE.py:FUNCTION"),
        free=True,
        own=True,
    ),
    "teacher.check": Field(
        "",
        "An .npz file with `images` [n, height, width, channels] and the `logits` [n, classes] that your own framework gives "
        "for them. The teacher's logits are compared with these before any work.",
        free=True,
        own=True,
    ),
    "teacher.classes": Field(100, "Number of classes.", count),
    "teacher.image": Field((32, 32, 3), "Height, width and channels of an image.", shape),
    "teacher.mean": Field(
        (0.4914, 0.4822, 0.4465),
        "Mean of each channel, for images in [0, 1].",
        holds(
            lambda mean: all(0 <= value <= 1 for value in mean),
            "between 0 and 1 for each channel, as pixels are here: divide it by your pixels' largest value, such as 255",
        ),
    ),
    "teacher.std": Field(
        (0.2023, 0.1994, 0.2010),
        "Standard deviation of each channel, for images in [0, 1].",
        holds(lambda std: all(value > 0 for value in std), "positive for each channel"),
    ),
    "teacher.arithmetic": Field(
        "float32",
        "Precision of the teacher's convolutions and matrix products. Lower precision is meant for accelerators.",
        choices=tuple(ARITHMETIC),
    ),
    "student.arithmetic": Field(
        "float32",
        "Precision of the student's convolutions and matrix products while it is fine-tuned. Calibration, evaluation and the "
        "finished student use float32.",
        choices=tuple(ARITHMETIC),
    ),
    "pretrain.epochs": Field(60, "Epochs of `hast_jax.pretrain`, which trains a teacher on real images.", count),
    "pretrain.batch": Field(64, "Images in a step of `hast_jax.pretrain`.", count),
    "pretrain.lr": Field(0.1, "Highest learning rate of `hast_jax.pretrain`, reached after a warm-up.", positive),
    "pretrain.weight_decay": Field(5e-4, "Weight decay of `hast_jax.pretrain`.", not_negative),
    "pretrain.shift": Field(1, "Most pixels by which `hast_jax.pretrain` moves an image at random.", count_or_zero),
    "synthesis.source": Field(
        "",
        "Folder of a synthetic set to use instead of making images. The first `synthesis.images` images of the set are used.",
        free=True,  # a run checks the content of its images instead: RunFolder.check_images
        own=True,
    ),
    "synthesis.real_split": Field(
        "",
        "Split of `eval.dataset` from which `synthesis.images` random images take the place of synthetic ones, for "
        "comparison. Such a run is not data-free.",
    ),
    "synthesis.images": Field(5120, "Number of synthetic images: a multiple of `synthesis.batch`.", count),
    "synthesis.batch": Field(256, "Images that are made together. Batch-norm statistics are computed over one batch.", count),
    "synthesis.micro_batch": Field(
        0,
        "Images of a batch that pass through the network together. 0: all of them, but about 32 on a CPU. With "
        "`synthesis.remat`, fewer images need less memory.",
        count_or_zero,
        free=True,
    ),
    "synthesis.stack": Field(
        0,
        "Batches made at once on one device. 0: as many as fill half of the device's memory, but one on a CPU.",
        count_or_zero,
        free=True,
    ),
    "synthesis.remat": Field(
        False, "Recompute intermediate values for the gradient, which takes more time and less memory.", free=True
    ),
    "synthesis.scales": Field(
        1,
        "Number of resolutions that are optimised, and whose sum is an image: the full size, half of it, a quarter and so on. "
        "1: the pixels alone, as in the paper.",
        count,
    ),
    "synthesis.iterations": Field(
        1000, "Steps of Adam for each batch. 0: the images stay the noise that they start from.", count_or_zero
    ),
    "synthesis.beta": Field(10.0, "Weight of the hard-sample loss.", not_negative),
    "synthesis.gamma": Field(2.0, "Exponent of the difficulty, Eq. 8.", not_negative),
    "synthesis.lr": Field(0.5, "First learning rate of the images.", positive),
    "synthesis.schedule": Field(
        "plateau",
        "How the images' learning rate falls. plateau: by `synthesis.factor` when the loss stops improving. cosine: to zero at "
        "the last step.",
        choices=IMAGE_SCHEDULES,
    ),
    "synthesis.patience": Field(
        50, "Schedule plateau: the learning rate falls after more steps without improvement than this.", count_or_zero
    ),
    "synthesis.threshold": Field(
        1e-4, "Schedule plateau: share by which the loss must fall to count as improved.", not_negative
    ),
    "synthesis.factor": Field(
        0.1,
        "Schedule plateau: factor by which the images' learning rate is multiplied when it falls.",
        holds(lambda value: 0 < value < 1, "between 0 and 1, neither included"),
    ),
    "synthesis.min_lr": Field(1e-4, "Schedule plateau: lowest learning rate of the images.", positive),
    "synthesis.return_to_best": Field(
        False, "Go back to the images of the lowest loss whenever the learning rate falls, and at the end."
    ),
    "synthesis.crop_probability": Field(
        0.0,
        "Probability that a step crops and flips its batch at random. The paper has 0.5 for ImageNet.",
        between(0, 1),
    ),
    "synthesis.crop": Field(
        "batch", "Which images share a crop. batch: all of a batch. image: each image has its own.", choices=CROPS
    ),
    "synthesis.crop_scale": Field(0.4, "Smallest share of the image that a crop keeps.", share),
    "synthesis.flip": Field(
        True, "A step that crops its batch also flips it at random. False for letters, digits and signs: a flip changes them."
    ),
    "synthesis.save_every": Field(250, "Steps between two checkpoints of batches that are being made.", count, free=True),
    "calibration.batches": Field(800, "Number of batches on which the ranges of the activations are measured.", count),
    "calibration.batch": Field(16, "Images in a batch of the calibration.", count),
    "calibration.range": Field(
        "minmax",
        "Range of a batch's activations. minmax: from the smallest to the largest value. mse: the range with the smallest "
        "squared error.",
        choices=tuple(quantizer.RANGE_RULES),
    ),
    "calibration.kernel_range": Field(
        "minmax",
        "First range of each output channel of a weight, if ranges are learned, by the rules of `calibration.range`.",
        choices=tuple(quantizer.RANGE_RULES),
    ),
    "finetune.epochs": Field(147, "Epochs of fine-tuning.", count),
    "finetune.steps_per_epoch": Field(200, "Steps in an epoch of fine-tuning.", count),
    "finetune.batch": Field(256, "Images in a step of fine-tuning, over all devices.", count),
    "finetune.optimizer": Field(
        "sgd",
        "Optimizer of the weights. sgd: the paper's, with Nesterov momentum. adam: Adam with decoupled weight decay.",
        choices=OPTIMIZERS,
    ),
    "finetune.ranges": Field(
        "fixed",
        "Ranges of the quantizers. fixed: weights have their minimum and maximum, activations their calibrated range. learned: "
        "Adam trains the ranges together with the weights.",
        choices=RANGES,
    ),
    "finetune.ranges_lr": Field(1e-3, "First learning rate of learned ranges, as a share of their width.", positive),
    "finetune.lr": Field(1e-5, "First learning rate of the student.", positive),
    "finetune.schedule": Field(
        "step",
        "How the student's learning rate falls. step: after the epochs `finetune.lr_drops`. cosine: to zero at the last step.",
        choices=SCHEDULES,
    ),
    "finetune.lr_drops": Field(
        (16, 36, 56),
        "Schedule step: epochs after which the learning rate falls to a tenth. The authors' 20, 40, 60 include 4 epochs of "
        "calibration.",
        holds(lambda epochs: all(not count(epoch) for epoch in epochs), "positive epochs, each at most 2**31 - 1"),
    ),
    "finetune.straight_through": Field(
        "identity",
        "Gradient of activations outside their range, if ranges are fixed. identity: the same as inside. clipped: zero.",
        choices=tuple(quantizer.STRAIGHT_THROUGH),
    ),
    "finetune.momentum": Field(
        0.9, "Nesterov momentum of SGD.", holds(lambda value: 0 <= value < 1, "zero or positive, and below 1")
    ),
    "finetune.weight_decay": Field(1e-4, "Weight decay of the student.", not_negative),
    "finetune.temperature": Field(20.0, "Temperature of the distillation.", positive),
    "finetune.alpha": Field(20.0, "Weight of the distillation.", positive),
    "finetune.lam": Field(2000.0, "Weight of the feature alignment, Eq. 12.", not_negative),
    "finetune.alignment": Field(
        "rfa", "Kind of the feature alignment. rfa: relaxed. dfa: direct.", choices=tuple(losses.ALIGNMENTS)
    ),
    "finetune.branches": Field(
        "",
        "Batch norms whose outputs are aligned, as a regular expression over whole names in their paths. "
        "Empty: they are found automatically.",
        parsed_by(rules.compiled, "a regular expression"),
    ),
    "finetune.ce": Field(
        0.0, "Weight of the cross-entropy on synthetic labels. IntraQ has this loss, HAST does not.", not_negative
    ),
    "finetune.eps": Field(0.02, "Size of the step that promotes an image, Eq. 10.", not_negative),
    "finetune.direction": Field(
        "kl+fa",
        "Loss that directs the promotion. kl: distillation. fa: feature alignment.",
        choices=tuple(promotion.DIRECTIONS),
    ),
    "finetune.a": Field(1.0, "Weight of the loss on clean images.", not_negative),
    "finetune.b": Field(1.0, "Weight of the loss on promoted images. 0: no promotion.", not_negative),
    "finetune.stream": Field(
        False, "Read images from disk when they are drawn. Otherwise each device holds all images in its memory.", free=True
    ),
    "finetune.keep_every": Field(
        0, "Epochs between two checkpoints that are never deleted. 0: none.", count_or_zero, free=True
    ),
    "finetune.augment": Field(True, "Crop the images at random, and flip them with `finetune.flip`."),
    "finetune.flip": Field(
        True, "With `finetune.augment`, flip the images at random. False for letters, digits and signs: a flip changes them."
    ),
    "finetune.crop_scale": Field(0.5, "Smallest share of the image that a crop keeps.", share),
    "eval.dataset": Field(
        "cifar100", "Real images for the evaluation. none: no evaluation. folder: image files.", choices=DATASETS
    ),
    "eval.split": Field("test", "Split of the real images. For image files it is a folder in `eval.data_dir`."),
    "eval.data_dir": Field(
        "",
        "Folder of the TFDS data sets; empty: ~/tensorflow_datasets. For image files, the folder that holds the split.",
        free=True,
        own=True,
    ),
    "eval.held_out": Field(
        "",
        "Folder of a synthetic set that the student is not trained on, such as a set of another seed. The student's agreement "
        "with the teacher is measured on this set.",
        free=True,
        own=True,
    ),
    "eval.class_order": Field(
        "",
        "Order of the class folders. name: as text. number: as whole numbers. Empty: by name; refused if the orders differ.",
        one_of(image_files.ORDERS, also=lambda value: value == ""),
        choices=image_files.ORDERS,
    ),
    "eval.crop": Field(
        224 / 256,
        "Share of an image file's shorter side that is kept. Torchvision's newer weights need 224 / 232. 1 keeps all.",
        between(0.1, 1),
    ),
    "eval.batch": Field(500, "Images in a batch of the evaluation.", positive, free=True),  # its bound: cross_checks.py
    "eval.every": Field(10, "Epochs between two evaluations.", count),
}


def help_text() -> str:
    """The help of the commands' flag --config: every field with its default."""
    lines = [f"{path} ({_default(field)}): {_meaning(field)}" for path, field in FIELDS.items()]
    return "\n".join(["Config file, with variants after a colon. --config.FIELD=VALUE sets one of these fields:", *lines])


def markdown() -> str:
    """The table of the fields in docs/configuration.md."""

    def escape(text):
        return text.replace("|", "\\|")

    def mark(field):
        return " †" if field.free else ""

    rows = [
        f"| `{path}`{mark(field)} | {escape(_default(field))} | {escape(_meaning(field))} |" for path, field in FIELDS.items()
    ]
    return "\n".join(["| field | default | |", "|---|---|---|", *rows])


def _default(field: Field) -> str:
    return str(field.default) or '""'


def _meaning(field: Field) -> str:
    told = all(choice in field.help for choice in field.choices)
    return field.help if told else f"{field.help} One of {', '.join(field.choices)}."


if __name__ == "__main__":
    print(markdown())
