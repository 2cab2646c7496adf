"""Print the table of docs/export.md: sizes, speeds and differences of exported files.

    python docs/export_table.py runs/c100-w3a3 runs/digits

Rows of run folders, then of networks with made-up weights, whose ranges are those of random images.
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
from hast_jax.deliver.exports import Exported
from hast_jax.export import run as export_run
from hast_jax.networks import rules
from hast_jax.student import Student

HEADER = "| network | file | size | float32 | one image | float32 | judged otherwise | top-1 of file and student |"
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
    """A network with random weights, the batch-norm moments of `patches`, and learned ranges, quantized to W4A4."""
    image, bits, mean, std = (size, size, 3), rules.normalise("w4a4"), (0.5,) * 3, (0.25,) * 3
    network = networks.create(module, image, rules=bits, learned_ranges=True)
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, *image), np.float32))
    images = normalise(patches(8, size), mean, std)
    moved = jax.jit(lambda variables: module.apply(variables, images, train=True, mutable=["batch_stats"])[1])
    for _ in range(100):  # until the running averages have forgotten where they began
        variables = {**variables, **moved(variables)}
    ranges = networks.observe(network, variables, {}, images)
    return Student(network, {**variables, "ranges": ranges}, bits, image, mean, std, {"network": type(module).__name__})


def patches(count: int, size: int) -> np.ndarray:
    """Random images uint8 [count, size, size, 3] that differ: patches of colour, of 1 to 32 pixels."""
    rng, found = np.random.default_rng(count), []
    for i in range(count):
        side = 2 ** (i % 6)
        colours = rng.integers(0, 256, (size // side + 1, size // side + 1, 3), np.uint8)
        found.append(colours.repeat(side, 0).repeat(side, 1)[:size, :size])
    return np.stack(found)


def row(name: str, file: str, found: Exported) -> str:
    """A line of the table."""
    times = ("", "") if found.milliseconds is None else (f"{found.milliseconds:.2f} ms", f"{found.float_milliseconds:.2f} ms")
    others = "; ".join(f"{each.different} of {each.images:,} {each.name}{rounding(each)}" for each in found.comparisons)
    top1 = "; ".join(f"{each.top1:.2f} and {each.student_top1:.2f}" for each in found.comparisons if each.top1 is not None)

    def size(count):
        return f"{count / 1000:,.0f} kB"

    return f"| {name} | {file} | {size(found.bytes)} | {size(found.float_bytes)} | {' | '.join(times)} | {others} | {top1} |"


def rounding(compared: Comparison) -> str:
    """What is said of rounding, where it was looked at."""
    return "" if compared.rounded is None else f" (rounding alone: {compared.rounded})"


def print_others(name: str, student: Student, images, path: Path) -> None:
    """The lines of the other formats, without real images."""
    for file, (format, options) in OTHERS.items():
        print(row(name, file, hast_jax.export(student, path, format, images=images, **options)), flush=True)


def main() -> None:
    """Print the rows as they are made."""
    print("\n".join([HEADER, "|" + "---|" * (HEADER.count("|") - 1)]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        for workdir in map(Path, sys.argv[1:]):
            print(row(workdir.name, "onnx", export_run(workdir, "onnx", path)), flush=True)
            synthetic = workdir / "synthetic" / "images.npy"
            images = np.load(synthetic)[:512] if synthetic.exists() else None
            print_others(workdir.name, hast_jax.load(workdir / "student"), images, path)
        for name, (module, size) in MADE_UP.items():
            student = made_up(module, size)
            images = patches(64, size)
            print(row(name, "onnx", hast_jax.export(student, path, images=images)), flush=True)
            print_others(name, student, images, path)


if __name__ == "__main__":
    main()
