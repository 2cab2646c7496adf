"""The experiments of the paper's supplement, and that of the recipe: what each cell changes, and what the paper reports for it.

Baselines are cells too. Published numbers: HAST, supplement, Tables 1 to 4 and Figure 1; top-1 in per cent.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hast_jax import config as config_lib

# (network, data set) -> the teacher's published accuracy. For other pairs the paper has no numbers to compare with.
PAPER_TEACHERS = {("resnet20", "cifar10"): 94.03, ("resnet20", "cifar100"): 70.33, ("resnet18", "imagenet2012"): 71.47}
RECIPE_LAM = 100.0  # takes the place of `finetune.lam` in experiments about alignment if the config, as `best`, has none
PAPER_BUDGET = "5,120 images x 1,000 iterations, 29,400 steps of 256 (ImageNet: 16)"

Paper = dict[tuple[str, str], dict[str, float]]


def data_set(config: ConfigDict) -> str:
    """The data set under its published name. A folder of image files with 1,000 classes is assumed to be ImageNet."""
    return "imagenet2012" if config.eval.dataset == "folder" and config.teacher.classes == 1000 else config.eval.dataset


def effective(changes: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    """The changes that differ from the config. Cells with the same effective changes share one run."""
    return {path: value for path, value in changes.items() if config_lib.field(config, path) != value}


class Cell(NamedTuple):
    """One row of an experiment: its name, the config fields that it changes, and which accuracy of the run is used.

    accuracy: "last", or "no_finetuning" for the quantized network before fine-tuning.
    """

    label: str
    changes: dict[str, Any]
    accuracy: str = "last"


class Experiment(NamedTuple):
    """Cells to compare. paper: (data set, bits) -> label -> published top-1. note: what else is published."""

    title: str
    cells: list[Cell]
    paper: Paper
    note: str = ""


def _all_real_images(label: str, config: ConfigDict) -> list[Cell]:
    """The whole train split. There is no such cell of ImageNet, because a run holds its images in memory."""
    changes = {"synthesis.real_split": "train", "synthesis.images": 10**7}
    return [] if data_set(config) == "imagenet2012" else [Cell(label, changes)]


def table1(config: ConfigDict) -> Experiment:
    """Loss whose gradient directs the promotion. The student is aligned, because "fa" has no gradient without lambda."""
    cells = [Cell(name, {"finetune.direction": name, "finetune.lam": _lam(config)}) for name in ("kl", "fa", "kl+fa")]
    paper = {
        ("cifar10", "W4A4"): (92.43, 92.29, 92.36),
        ("cifar10", "W3A3"): (88.29, 87.68, 88.34),
        ("cifar100", "W4A4"): (66.69, 66.50, 66.68),
        ("cifar100", "W3A3"): (55.61, 55.13, 55.67),
        ("imagenet2012", "W4A4"): (66.90, 66.69, 66.91),
        ("imagenet2012", "W3A3"): (51.06, 50.87, 51.15),
    }
    title = "Table 1: the loss that directs the promotion" + _at_lam(config)
    return Experiment(title, cells, _by_label(cells, paper))


def table2(config: ConfigDict) -> Experiment:
    """Weights a and b of the losses on clean and on promoted images."""
    del config
    weights = ((1, 0), (3, 1), (2, 1), (1, 1), (0, 1), (1, 4), (1, 3), (1, 2))
    cells = [Cell(f"a={a}, b={b}", {"finetune.a": float(a), "finetune.b": float(b)}) for a, b in weights]
    paper = {
        ("cifar10", "W3A3"): (86.17, 85.92, 87.53, 88.34, 88.19, 86.69, 86.94, 87.73),
        ("imagenet2012", "W3A3"): (47.94, 50.52, 50.97, 51.15, 48.55, 52.14, 53.12, 52.69),
    }
    return Experiment("Table 2: weights of the clean and the promoted loss", cells, _by_label(cells, paper))


def table3(config: ConfigDict) -> Experiment:
    """Direct and relaxed feature alignment.

    The paper gives one lambda for both. Distances of features are far larger than distances of attentions, so DFA is also run
    with a smaller lambda.
    """
    lam = _lam(config)
    cells = [Cell(name, {"finetune.alignment": name.lower(), "finetune.lam": lam}) for name in ("DFA", "RFA")]
    cells.append(Cell("DFA, lambda / 1000", {"finetune.alignment": "dfa", "finetune.lam": lam / 1000}))
    paper = {
        ("cifar10", "W4A4"): (91.99, 92.36),
        ("cifar10", "W3A3"): (83.92, 88.34),
        ("cifar100", "W4A4"): (66.53, 66.68),
        ("cifar100", "W3A3"): (51.50, 55.67),
        ("imagenet2012", "W4A4"): (66.49, 66.91),
        ("imagenet2012", "W3A3"): (45.52, 51.15),
    }
    title = "Table 3: direct and relaxed feature alignment" + _at_lam(config)
    return Experiment(title, cells, _by_label(cells, paper))


def _whole_batches(images: float, config: ConfigDict) -> int:
    """This number of images, rounded up to whole batches of synthesis, and to a batch of each later stage."""
    least = max(images, config.calibration.batch, config.finetune.batch)
    return math.ceil(least / config.synthesis.batch) * config.synthesis.batch


def table4(config: ConfigDict) -> Experiment:
    """Number of images: a twentieth, a quarter, half and all of the config's images, rounded up to whole batches."""
    counts = sorted({_whole_batches(config.synthesis.images / share, config) for share in (20, 4, 2, 1)})
    cells = [Cell(f"{count} images", {"synthesis.images": count}) for count in counts]
    paper = {("imagenet2012", "W3A3"): {"256 images": 49.17, "1280 images": 49.95, "2560 images": 50.23, "5120 images": 51.15}}
    note = "The paper, ResNet-18 on ImageNet, W3A3: IntraQ with 5,120 images 45.51."
    return Experiment("Table 4: number of synthetic images", cells, paper, note)


def baselines(config: ConfigDict) -> Experiment:
    """The method without each of its parts, ideas of other methods, and real images in place of synthetic ones."""
    promotion_off = {"finetune.b": 0.0}
    kl_alone = promotion_off | {"finetune.lam": 0.0}
    cells = [
        Cell("quantized without fine-tuning", {}, "no_finetuning"),
        Cell("noise images", {"synthesis.iterations": 0}),
        Cell("BN statistics only (as ZeroQ)", {"synthesis.beta": 0.0}),
        Cell("plain inception loss (gamma = 0)", {"synthesis.gamma": 0.0}),
        Cell("no promotion", promotion_off),
        Cell("no promotion, a = 2", promotion_off | {"finetune.a": 2.0}),  # the loss is as large as with promotion
        Cell("no feature alignment", {"finetune.lam": 0.0}),
        Cell("KL alone", kl_alone),
        Cell("CE + KL (fine-tuning loss of IntraQ)", kl_alone | {"finetune.ce": 1.0}),
        Cell("HAST", {}),
        Cell(f"{config.synthesis.images} real images, HAST's losses", {"synthesis.real_split": "train"}),
        *_all_real_images("all real images, HAST's losses", config),
    ]
    paper = {
        ("cifar10", "W3A3"): {"HAST": 88.34, "no promotion": 86.17, "all real images, HAST's losses": 87.94},
        ("cifar100", "W3A3"): {"HAST": 55.67, "all real images, HAST's losses": 56.26},
        ("cifar10", "W4A4"): {"HAST": 92.36},
        ("cifar100", "W4A4"): {"HAST": 66.68},
        ("imagenet2012", "W4A4"): {"HAST": 66.91},
        ("imagenet2012", "W3A3"): {"HAST": 51.15, "no promotion": 47.94},
    }
    note = (
        "The paper also reports other methods as a whole, each with its own fine-tuning, for ResNet-20 at W4A4 / W3A3: "
        "CIFAR-10 ZeroQ 84.68 / 29.32, GDFQ 90.25 / 71.10, IntraQ 91.49 / 77.07, AdaDFQ 92.31 / 84.89; "
        "CIFAR-100 ZeroQ 58.42 / 15.38, GDFQ 63.58 / 43.87, IntraQ 64.98 / 48.25, AdaDFQ 66.81 / 52.74. "
        "All rows here use HAST's quantizer, teacher, budget and training loop."
    )
    return Experiment("Baselines", cells, paper, note)


def figure1(config: ConfigDict) -> Experiment:
    """Sensitivity to gamma, eps and lam around the config's values. A lam of 0 is replaced by `RECIPE_LAM`."""
    cells = [Cell(f"gamma={gamma:g}", {"synthesis.gamma": gamma}) for gamma in (0.0, 0.5, 1.0, 1.5, 2.0)]
    for name, middle in (("eps", config.finetune.eps), ("lam", _lam(config))):
        for value in dict.fromkeys(factor * middle for factor in (0, 0.5, 1, 2, 4)):
            cells.append(Cell(f"{name}={value:g}", {f"finetune.{name}": value}))
    note = "The paper, ResNet-18 on ImageNet, W3A3: 50.12 to 51.15 over gamma from 0 to 2; real data 51.95."
    return Experiment("Figure 1: sensitivity to gamma, eps and lambda", cells, {}, note)


def recipe(config: ConfigDict) -> Experiment:
    """One change at a time to a config of the recipe `best`, which shows what each part of the recipe gives."""
    finetune, synthesis = config.finetune, config.synthesis
    counts = sorted({_whole_batches(synthesis.images / 2, config), _whole_batches(2 * synthesis.images, config)})
    sgd = {"finetune.optimizer": "sgd", "finetune.lr": 1e-5, "finetune.temperature": 20.0, "finetune.alpha": 20.0}
    cells = [
        Cell("the config as it is", {}),
        Cell("SGD at 1e-5, T = alpha = 20", sgd),
        *(Cell(f"rate {rate:g}", {"finetune.lr": rate}) for rate in (1e-4, 3e-4, 1e-3)),
        Cell("fixed ranges", {"finetune.ranges": "fixed", "finetune.straight_through": "clipped"}),
        *(Cell(f"rate of the ranges {rate:g}", {"finetune.ranges_lr": rate}) for rate in (1e-4, 1e-3, 1e-2)),
        *(Cell(f"temperature {t:g}", {"finetune.temperature": t}) for t in (1.0, 2.0, 4.0, 10.0, 20.0)),
        Cell("no promotion", {"finetune.b": 0.0}),
        Cell("no promotion, twice the steps", {"finetune.b": 0.0, "finetune.epochs": 2 * finetune.epochs}),
        *(Cell(f"eps = {eps:g}", {"finetune.eps": eps}) for eps in (0.01, 0.02, 0.05)),
        *(Cell(f"relaxed alignment, lambda = {lam:g}", {"finetune.lam": lam}) for lam in (100.0, 1000.0)),
        Cell("direct alignment, lambda = 100", {"finetune.lam": 100.0, "finetune.alignment": "dfa"}),
        Cell("twice the steps", {"finetune.epochs": 2 * finetune.epochs}),
        *(Cell(f"augmentation keeps {share:g} of the image", {"finetune.crop_scale": share}) for share in (0.5, 0.8)),
        Cell("no augmentation", {"finetune.augment": False}),
        *(Cell(f"images of {n} resolutions", {"synthesis.scales": n}) for n in (1, 3)),
        *(Cell(f"crops of images being made keep {share:g}", {"synthesis.crop_scale": share}) for share in (0.4, 0.85)),
        Cell("no crops while images are made", {"synthesis.crop_probability": 0.0}),
        Cell("one crop for a whole batch", {"synthesis.crop": "batch"}),
        *(Cell(f"beta = {beta:g}", {"synthesis.beta": beta}) for beta in (0.0, 1.0, 10.0)),
        Cell("gamma = 2", {"synthesis.gamma": 2.0}),
        *(Cell(f"first rate of the images {rate:g}", {"synthesis.lr": rate}) for rate in (0.1, 0.2, 0.5)),
        Cell("plateau instead of cosine", {"synthesis.schedule": "plateau"}),
        *(Cell(f"{n} iterations", {"synthesis.iterations": n}) for n in (synthesis.iterations // 2, 2 * synthesis.iterations)),
        *(Cell(f"{n} images", {"synthesis.images": n}) for n in counts if n != synthesis.images),
        Cell("noise images", {"synthesis.iterations": 0}),
        Cell(f"{synthesis.images} real images", {"synthesis.real_split": "train"}),
        *_all_real_images("all real images", config),
    ]
    return Experiment("The recipe, one change at a time", cells, {})


EXPERIMENTS: dict[str, Callable[[ConfigDict], Experiment]] = {
    "baselines": baselines,
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "figure1": figure1,
    "recipe": recipe,
}


class Finding(NamedTuple):
    """A claim to check: in `experiment`, the cell `better` beats the cell `worse`. Cells are given by label or position."""

    sentence: str
    experiment: str
    better: str | int
    worse: str | int


FINDINGS = [
    Finding("the paper: promotion helps", "baselines", "HAST", "no promotion"),
    Finding("promotion helps, against an equally large loss on clean images alone", "baselines", "HAST", "no promotion, a = 2"),
    Finding("the paper: relaxed alignment (RFA) beats direct (DFA)", "table3", "RFA", "DFA"),
    Finding("RFA beats DFA, with a lambda that suits DFA", "table3", "RFA", "DFA, lambda / 1000"),
    Finding("the paper: more images help", "table4", -1, 0),
    Finding("the paper: directing the promotion by KL + FA beats FA alone", "table1", "kl+fa", "fa"),
    Finding("hard samples help, against BN statistics only", "baselines", "HAST", "BN statistics only (as ZeroQ)"),
    Finding("gamma > 0 helps, against the plain inception loss", "baselines", "HAST", "plain inception loss (gamma = 0)"),
    Finding("feature alignment helps", "baselines", "HAST", "no feature alignment"),
    Finding("synthetic images help, against noise", "baselines", "HAST", "noise images"),
    Finding("cross-entropy on synthetic labels hurts", "baselines", "KL alone", "CE + KL (fine-tuning loss of IntraQ)"),
]


def _lam(config: ConfigDict) -> float:
    return config.finetune.lam or RECIPE_LAM


def _at_lam(config: ConfigDict) -> str:
    """What a title adds if the config itself has no alignment."""
    return "" if config.finetune.lam else f" (lambda = {RECIPE_LAM:g})"


def _by_label(cells: list[Cell], rows: Mapping[tuple[str, str], tuple[float, ...]]) -> Paper:
    return {setting: {cell.label: value for cell, value in zip(cells, row)} for setting, row in rows.items()}
