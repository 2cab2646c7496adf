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
from hast_jax.deliver.exports import Exported
from hast_jax.export import run as export_run
from hast_jax.networks import rules
from hast_jax.student import Student

HEADER = "| network | file | size | float32 | one image | float32 | judged otherwise | top-1 of file and student |"
OTHERS = {
    "onnx, int4": ("onnx", {"weights": "int4"}),
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
    """A network with random weights and learned ranges, quantized to W4A4."""
    image, bits = (size, size, 3), rules.normalise("w4a4")
    network = networks.create(module, image, rules=bits, learned_ranges=True)
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, *image), np.float32))
    ranges = networks.observe(network, variables, {}, jax.random.normal(jax.random.key(1), (4, *image)))
    record = {"network": type(module).__name__}
    return Student(network, {**variables, "ranges": ranges}, bits, image, (0.5,) * 3, (0.25,) * 3, record)


def row(name: str, file: str, found: Exported) -> str:
    """A line of the table."""
    times = ("", "") if found.milliseconds is None else (f"{found.milliseconds:.2f} ms", f"{found.float_milliseconds:.2f} ms")
    others = "; ".join(f"{each.different} of {each.images:,} {each.name}" for each in found.comparisons)
    top1 = "; ".join(f"{each.top1:.2f} and {each.student_top1:.2f}" for each in found.comparisons if each.top1 is not None)
    size = lambda count: f"{count / 1000:,.0f} kB"
    return f"| {name} | {file} | {size(found.bytes)} | {size(found.float_bytes)} | {' | '.join(times)} | {others} | {top1} |"


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
            images = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)
            print(row(name, "onnx", hast_jax.export(student, path, images=images)), flush=True)
            print_others(name, student, images, path)


if __name__ == "__main__":
    main()
