"""Print the table of docs/export.md: sizes, speeds and differences of exported files.

    python docs/export_table.py runs/c100-w3a3 runs/digits

The first rows are of run folders. The other rows are of networks with random weights and the ranges of random images.
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from densenet import DenseNet

import hast_jax
from hast_jax import networks
from hast_jax.data.datasets import normalise
from hast_jax.deliver.comparison import Comparison
from hast_jax.deliver.exports import FORMATS, Exported
from hast_jax.export import run as export_run
from hast_jax.networks import rules
from hast_jax.student import Student

HEADER = (
    "| network | file | size | size in float32 | one image | one image in float32 | other class than the student "
    "| top-1 of file and student |"
)
OTHERS = {
    "onnx, int4": ("onnx", {"weights": "int4"}),
    "onnx, exact operators": ("onnx", {"operators": "exact"}),
    "onnx, integer operators": ("onnx", {"operators": "integer"}),
    "litert": ("litert", {}),
    "safetensors, packed": ("safetensors", {"weights": "packed"}),
}
MADE_UP = {
    "DenseNet of docs/densenet.py, 32 x 32": (DenseNet(classes=10), 32),
    "MobileNetV2, 224 x 224": (networks.module("mobilenetv2", 1000), 224),
    "ResNet-18, 224 x 224": (networks.module("resnet18", 1000), 224),
}


def made_up(module, size: int) -> Student:
    """A student with random weights and learned ranges, quantized to W4A4. Batch-norm moments and ranges are of `patches`."""
    image, bits, mean, std = (size, size, 3), rules.normalise("w4a4"), (0.5,) * 3, (0.25,) * 3
    network = networks.create(module, image, rules=bits, learned_ranges=True)
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, *image), np.float32))
    images = normalise(patches(8, size), mean, std)
    moved = jax.jit(lambda variables: module.apply(variables, images, train=True, mutable=["batch_stats"])[1])
    for _ in range(100):  # until the running averages no longer depend on their initial values
        variables = {**variables, **moved(variables)}
    ranges = networks.observe(network, variables, {}, images)
    return Student(network, {**variables, "ranges": ranges}, bits, image, mean, std, {"network": type(module).__name__})


def patches(count: int, size: int) -> np.ndarray:
    """Random images uint8 [count, size, size, 3] of square patches of colour, with sides from 1 to 32 pixels."""
    rng, found = np.random.default_rng(count), []
    for i in range(count):
        side = 2 ** (i % 6)
        colours = rng.integers(0, 256, (size // side + 1, size // side + 1, 3), np.uint8)
        found.append(colours.repeat(side, 0).repeat(side, 1)[:size, :size])
    return np.stack(found)


def row(name: str, file: str, found: Exported) -> str:
    """One line of the table. name: of the network. file: format and options."""
    times = ("", "") if found.milliseconds is None else (f"{found.milliseconds:.2f} ms", f"{found.float_milliseconds:.2f} ms")
    others = "; ".join(f"{each.different} of {each.images:,} {each.name}{rounding(each)}" for each in found.comparisons)
    top1 = "; ".join(f"{each.top1:.2f} and {each.student_top1:.2f}" for each in found.comparisons if each.top1 is not None)

    def size(count):
        return f"{count / 1000:,.0f} kB"

    return f"| {name} | {file} | {size(found.bytes)} | {size(found.float_bytes)} | {' | '.join(times)} | {others} | {top1} |"


def rounding(compared: Comparison) -> str:
    """A remark on rounding, if it was measured."""
    return "" if compared.rounded is None else f" (rounding alone: {compared.rounded})"


def print_others(name: str, student: Student, images, folder: Path) -> None:
    """Print the lines of the other formats and options, compared without real images."""
    for file, (format, options) in OTHERS.items():
        path = folder / f"file{FORMATS[format].suffix}"
        print(row(name, file, hast_jax.export(student, path, format, images=images, **options)), flush=True)


def main() -> None:
    """Print each row as soon as it is made."""
    print("\n".join([HEADER, "|" + "---|" * (HEADER.count("|") - 1)]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "file.onnx"
        for workdir in map(Path, sys.argv[1:]):
            print(row(workdir.name, "onnx", export_run(workdir, "onnx", path)), flush=True)
            synthetic = workdir / "synthetic" / "images.npy"
            images = np.load(synthetic)[:512] if synthetic.exists() else None
            print_others(workdir.name, hast_jax.load(workdir), images, folder)
        for name, (module, size) in MADE_UP.items():
            student = made_up(module, size)
            images = patches(64, size)
            print(row(name, "onnx", hast_jax.export(student, path, images=images)), flush=True)
            print_others(name, student, images, folder)


if __name__ == "__main__":
    main()
