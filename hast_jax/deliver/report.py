"""The report of a run, for a person who did not run it: report.html, a single self-contained file, and a model card."""

import base64
import io
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jinja2
import numpy as np
from flax.traverse_util import flatten_dict

from hast_jax import __version__, networks
from hast_jax import config as config_lib
from hast_jax.deliver import charts, integers, measure
from hast_jax.deliver.console import STAGE_NAMES, format_images, format_seconds, held_out_words, short_bits
from hast_jax.deliver.measure import Cost, Sensitivity
from hast_jax.deliver.pictures import grid
from hast_jax.fields import GIVEN
from hast_jax.networks import Network
from hast_jax.networks.rules import ALL, FULL_PRECISION, form
from hast_jax.networks.sites import sites
from hast_jax.runs.files import write_text
from hast_jax.runs.progress import read_metrics
from hast_jax.runs.run_folder import RunFolder
from hast_jax.student import Student

Teacher = tuple[Network, Mapping[str, Any]]

IMAGES, SMALL = 128, 64 * 64  # images to measure on; fewer if they have more than SMALL pixels, to keep the memory small
UNNAMED = ("none", GIVEN)  # in place of the name of a data set
ESCAPES = re.compile(r"[\x00-\x1f\x7f]")


class Sizes(NamedTuple):
    """Bytes of all parameters and statistics in float32, and of the safetensors files with the integers of the kernels.

    packed: each integer takes its own bits. bytewise: each takes 8.
    """

    full: int
    packed: int
    bytewise: int


def write(folder: RunFolder, student: Student, teacher: Teacher, images: np.ndarray, average: float | None = None) -> None:
    """Write report.html and README.md of a finished run.

    teacher: the network in full precision and its variables. images: normalised images that the student learned from.
    average: bits per quantized weight, for the suggested bits of each layer; by default the student's present average.
    """
    facts = _facts(folder, student, teacher, images, average)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hast_jax.deliver", "."),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    for template, path in (("report.html.j2", folder.report), ("card.md.j2", folder.card)):
        write_text(path, environment.get_template(template).render(facts))


def interval(per_cent: float, images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy measured on so many images, both in per cent (Wilson's score interval)."""
    p, z = per_cent / 100, 1.96
    middle = (p + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * np.sqrt(p * (1 - p) / images + z * z / (4 * images * images))
    return 100 * float(max(0, middle - half)), 100 * float(min(1, middle + half))


def _facts(folder: RunFolder, student: Student, teacher: Teacher, images: np.ndarray, average: float | None) -> dict[str, Any]:
    """What the templates show."""
    record = student.record
    pixels = math.prod(student.image[:2])
    few = np.asarray(images[: max(1, min(IMAGES, IMAGES * SMALL // pixels))])
    costs = measure.costs(student.network, student.variables, student.image)
    sizes = _sizes(student)
    parts = measure.sensitivities(*teacher, student.network, student.variables, few)
    network, variables = teacher
    agreed, divergence = networks.agreement(network, student.network, (variables, student.variables), few, len(few))
    bits = short_bits(record["bits"])
    where = "" if record["dataset"] in UNNAMED else f" for {record['dataset']}"
    weights = _average(costs)
    return {
        "title": f"{record['network']}{where}, quantized to {bits}",
        "summary": _summary(record, bits),
        "tiles": _tiles(folder, record, costs, sizes, agreed),
        "cost_rows": _cost_rows(folder, record, costs, sizes),
        "cost_notes": _cost_notes(folder, record, agreed, len(few)),
        "images_words": _images_words(record),
        "picture": _picture(images, student),
        "curves": _curves(folder, record),
        "sensitivity_images": len(few),
        "divergence": _divergence(divergence),
        "sensitivities": [_part(each, parts[0].alone) for each in parts],
        "average": f"{average or weights:.3g}",
        "same_average": average is None,
        "suggestion": _suggestion(student, measure.suggested_bits(parts, costs, average or weights), record),
        "histograms": _histograms(student, few),
        "made": _made(record),
        "config": json.dumps(record["config"], indent=2),
    }


def _summary(record: Mapping[str, Any], bits: str) -> str:
    learned = "images synthesized from the network itself"
    if record["iterations"] is None:
        learned = "real images" if record.get("real_split") else "images that were made elsewhere"
    elif record["iterations"] == 0:
        learned = "images of noise"
    words = f"The network {record['network']} was quantized to {bits}: W and A are the bits of its weights and activations. "
    return words + f"The quantized network was trained on {learned}, with hast_jax."


def _tested(folder: RunFolder, record: Mapping[str, Any]) -> int | None:
    """The number of real images on which the accuracies were measured; None if there were no real images."""
    accuracy = folder.teacher_accuracy()
    return int(accuracy["images"]) if record["teacher"] is not None and accuracy else None


def _tiles(
    folder: RunFolder, record: Mapping[str, Any], costs: Sequence[Cost], sizes: Sizes, agreed: float
) -> list[tuple[str, str, str]]:
    """Value, label and note of the numbers that a reader looks for first."""
    tested, tiles = _tested(folder, record), []
    if tested:
        low, high = interval(record["last"], tested)
        drop = record["teacher"] - record["last"]
        tiles.append((f"{record['last']:.2f} %", "top-1, quantized", f"{low:.1f} to {high:.1f} (95 %), {tested:,} images"))
        label = "points lost" if drop >= 0 else "points gained"
        tiles.append((f"{abs(drop):.2f}", label, f"the teacher has {record['teacher']:.2f} %"))
    elif held_out := record.get("held_out"):
        note = f"of {held_out['images']:,} synthetic images that it was not trained on; there were no test images"
        tiles.append((f"{held_out['agreement']:.1f} %", "agree with the teacher", note))
    else:
        tiles.append((f"{agreed:.1f} %", "agree with the teacher", "of its training images; there were no test images"))
    words = f"{_bytes(sizes.full)} to {_bytes(sizes.packed)}, in the smallest file"
    tiles.append((f"{sizes.full / sizes.packed:.1f} x", "smaller", words))
    everything = sum(each.products * FULL_PRECISION**2 for each in costs)
    operations = everything / sum(each.bit_operations for each in costs)
    tiles.append((f"{operations:.0f} x", "fewer bit operations", "a measure for hardware, not the speed of a file"))
    return tiles


def _cost_rows(folder: RunFolder, record: Mapping[str, Any], costs: Sequence[Cost], sizes: Sizes) -> list[tuple[str, str, str]]:
    tested, rows = _tested(folder, record), []
    if tested:

        def words(top1):
            return "{:.2f} ({:.1f} to {:.1f})".format(top1, *interval(top1, tested))

        rows.append(("top-1 in per cent, last epoch", words(record["teacher"]), words(record["last"])))
        rows.append(("top-1 in per cent, without fine-tuning", "", f"{record['no_finetuning']:.2f}"))
    rows.append(("size as a packed safetensors file", _bytes(sizes.full), _bytes(sizes.packed)))
    rows.append(("size as a safetensors file", _bytes(sizes.full), _bytes(sizes.bytewise)))
    products = sum(each.products for each in costs)
    rows.append(("multiplications for one image", _large(products), "the same"))
    full, quantized = products * FULL_PRECISION * FULL_PRECISION, sum(each.bit_operations for each in costs)
    rows.append(("bit operations for one image", _large(full), _large(quantized)))
    return rows


def _large(number: float) -> str:
    if number < 1e5:
        return f"{number:,.0f}"
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.2f} million"


def _cost_notes(folder: RunFolder, record: Mapping[str, Any], agreed: float, few: int) -> list[str]:
    tested, notes = _tested(folder, record), []
    if tested:
        given = record["dataset"] in UNNAMED
        source = "given in Python" if given else f"{record['dataset']}, {record['config']['eval']['split']}"
        notes.append(
            f"Accuracies are of {tested:,} real images ({source}). No choice here used them. In brackets: 95 % intervals, "
            "from the number of images alone. Both networks were tested on the same images, so the drop is more certain than "
            "the intervals suggest. Other seeds may give other accuracies."
        )
    held_out = record.get("held_out")
    if held_out:
        notes.append(held_out_words(held_out))
    else:
        words = f"The student agrees with the teacher on {agreed:.1f} % of {few} images that it was trained on"
        notes.append(f"{words}. This is a weak sign, because the student has seen these images.")
    notes.append(
        "In a packed file each quantized weight takes its own bits, in other files 8 bits, or 4 in an int4 ONNX file if it "
        "needs no more. Every other parameter takes 32 bits. The folder student/ keeps all parameters in 32 bits. Bit "
        "operations: each multiplication counts as the product of the bits of both factors. A factor that is not quantized has "
        "32 bits. Fewer bit operations need less energy and time on hardware that computes with few bits. On other hardware a "
        "file need not be faster than the network was."
    )
    return notes


def _sizes(student: Student) -> Sizes:
    trees = {name: tree for name, tree in student.variables.items() if name != "ranges"}
    full = 4 * sum(leaf.size for leaf in jax.tree.leaves(trees))
    return Sizes(full, *(len(integers.build(student, packed=packed)) for packed in (True, False)))


def _average(costs: Sequence[Cost]) -> float:
    """The average bits of the quantized weights; `FULL_PRECISION` if there are none."""
    quantized = [each for each in costs if each.weights < FULL_PRECISION]
    total = sum(each.parameters for each in quantized)
    return sum(each.parameters * each.weights for each in quantized) / total if total else FULL_PRECISION


def _images_words(record: Mapping[str, Any]) -> str:
    if record.get("real_split"):
        return f"{format_images(record)}, for comparison: this student is not data-free."
    if record["iterations"] is None:
        return f"{format_images(record)}."
    if record["iterations"] == 0:
        return f"{format_images(record)}: noise, for comparison."
    return f"{format_images(record)}, made from the statistics of the network's batch norms, without any real image."


def _picture(images: np.ndarray, student: Student) -> str:
    """A PNG of the first images, as base64."""
    from matplotlib.image import imsave

    content = io.BytesIO()
    imsave(content, grid(images, student.mean, student.std), format="png")
    return base64.b64encode(content.getvalue()).decode()


def _curves(folder: RunFolder, record: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Words, chart and legend of each stage that logged something."""
    lines = read_metrics(folder.metrics)

    def series(stage, name):
        return [(line["step"], line[name]) for line in lines if line["stage"] == stage and name in line]

    found: list[tuple[str, str, list[str]]] = []
    loss = series("synthesis", "loss")
    if loss:
        words = (
            "Synthesis of the images: the mean loss of the batches that were made at once, one group of batches after another. "
            "The iterations of all batches are counted."
        )
        found.append((words, charts.curves({"loss": loss}, "iterations", "loss"), []))
    kl = {"clean images": series("finetune", "kl"), "images made harder": series("finetune", "kl_promoted")}
    kl = {name: points for name, points in kl.items() if points}
    if kl:
        settings = record["config"]["finetune"]
        words = (
            f"Training of the quantized network: its KL divergence from the teacher at temperature "
            f"{settings['temperature']:g}, times {settings['alpha'] * settings['temperature'] ** 2:g}."
        )
        found.append((words, charts.curves(kl, "steps", "KL"), list(kl)))
    evaluations = folder.read_evaluations() if record["teacher"] is not None else {}
    if len(evaluations) > 2:
        steps = record["config"]["finetune"]["steps_per_epoch"]
        points = [(epoch * steps, top1) for epoch, top1 in sorted(evaluations.items())]
        teacher = [(points[0][0], record["teacher"]), (points[-1][0], record["teacher"])]
        chart = charts.curves({"quantized": points, "teacher": teacher}, "steps", "top-1, %")
        found.append(("Its top-1 on real images. No choice here used them.", chart, ["quantized", "teacher"]))
    return [each for each in found if each[1]]


def _part(each: Sensitivity, most: float) -> dict[str, Any]:
    share = 100 * max(each.alone, 0) / most if most > 0 else 0
    return {
        "name": each.name,
        "kind": each.kind,
        "bits": each.bits,
        "alone": _divergence(each.alone),
        "without": "" if each.without is None else _divergence(each.without),
        "share": f"{share:.1f}",
    }


def _divergence(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


def _suggestion(student: Student, bits: Mapping[str, int], record: Mapping[str, Any]) -> str:
    """Suggested bits of weights, as a user gives them: one rule for each layer or activation that differs from the default.

    Layers in full precision and the bits of all activations stay as they are. "" if the run has no rules and needs none.
    """
    network, given = student.network, record["bits"]
    first, second = (None if each == FULL_PRECISION else each for each in (given["weights"], given["activations"]))
    default = first, second
    usual = {call.path: site.bits for call, site in sites(network.structure, ((ALL, default),)).items()}
    inputs = {call.path: site.bits for call, site in network.sites.items()}
    weights = {layer.path: bits.get("/".join(layer.path), network.kernels.get(layer)) for layer in network.structure.layers}

    def pattern(path):
        return "^" + re.escape("/".join(path)).replace("\\-", "-")

    rules = {}
    for path in dict.fromkeys((*weights, *inputs, *usual)):
        pair = weights.get(path, default[0]), inputs.get(path)
        if pair != (default[0], usual.get(path)):
            kept = pair if path in weights else (None, pair[1])
            rules[pattern(path)] = form(kept)
    if not rules and not given.get("rules"):
        return ""
    for path in network.structure.others:  # matrices that belong to no layer need their rule
        rules[pattern(path)] = form((None, None))
    if record["network"].endswith(GIVEN):
        return f"bits={ {'default': default} | rules }"
    words = "; ".join(f"{pattern}={each}" for pattern, each in rules.items())
    return f'--config.bits.rules="{words}"'


def _histograms(student: Student, images: np.ndarray) -> list[tuple[str, str, str]]:
    found = []
    for (name, kind), each in measure.histograms(student.network, student.variables, images).items():
        words = f"{kind}: {100 * each.used:.0f} % of the integers are used, {100 * each.cut:.2g} % of the values lie outside"
        found.append((name, words, charts.histogram(each, f"{name}, {kind}: values against their grid")))
    return found


def _made(record: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """How the run was made, as rows of a table: name, value, and whether the value is text for a computer."""
    segments = record["segments"]
    # Segments of version 0.2.0 record neither the command nor the version.
    commands = dict.fromkeys(each["command"] or "a call in Python" for each in segments if "command" in each)
    versions = dict.fromkeys(f"hast_jax {each['hast_jax']}, jax {each['jax']}" for each in segments if "hast_jax" in each)
    seconds = record["seconds"]
    times = ", ".join(f"{STAGE_NAMES[name]} {format_seconds(each)}" for name, each in seconds.items())
    changes = "; ".join(_changes(record["config"]))
    rows = [
        ("command", ", then ".join(commands), True),
        ("bits of some layers", record["bits"].get("rules", ""), True),
        ("seed", str(record["seed"]), False),
        ("images", format_images(record), False),
        ("fine-tuning", f"{record['steps']:,} steps of {record['batch']} images", False),
        ("time, without evaluation and report", f"{format_seconds(sum(seconds.values()))} ({times})", False),
        ("hardware", record["hardware"], False),
        ("started", ", then ".join(each["started"] for each in segments), False),
        ("versions", ", then ".join(versions), False),
        ("settings other than the default config's (a recipe sets many)", changes, True),
        ("report made with", f"hast_jax {__version__}, jax {jax.__version__}, Python {platform.python_version()}", False),
    ]
    return [(name, ESCAPES.sub(" ", value), code) for name, value, code in rows if value]


def _changes(values: dict[str, Any]) -> list[str]:
    """The fields that differ from their defaults, such as "finetune.lr=0.0003"."""
    known = flatten_dict(config_lib.to_dict(config_lib.default()), sep=".")
    found = flatten_dict(values, sep=".")
    return [f"{name}={value!r}" for name, value in found.items() if known.get(name) != value]


def _bytes(count: float) -> str:
    if count < 1e4:
        return f"{count:,.0f} bytes"
    return f"{count / 1e6:,.2f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
