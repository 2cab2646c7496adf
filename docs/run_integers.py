"""Run a ResNet from its integers, with numpy alone: python docs/run_integers.py student.safetensors images.npy logits.npy

student.safetensors: written by `python -m hast_jax.export --format=safetensors` from a ResNet for small images (resnet8,
resnet20). images.npy: uint8 [n, height, width, channels]. logits.npy: the result, [n, classes]. docs/export.md describes the
layout of student.safetensors.
"""

import json
import sys
from pathlib import Path

import numpy as np


def read(path):
    """The arrays of a safetensors file by name, and the description that hast_jax wrote into its header."""
    content = Path(path).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    said = json.loads(header.pop("__metadata__")["hast_jax"])
    kinds = {"F32": np.float32, "I8": np.int8, "I32": np.int32, "U8": np.uint8}
    arrays = {}
    for name, each in header.items():
        first, last = (start + offset for offset in each["data_offsets"])
        arrays[name] = np.frombuffer(content[first:last], kinds[each["dtype"]]).reshape(each["shape"])
    return arrays, said


if len(sys.argv) != 4:
    sys.exit(__doc__)
ARRAYS, SAID = read(sys.argv[1])


def kernel(name):
    """The weights of a layer: its integers, each times the step of its output channel; or floats, in full precision."""
    integers, said = ARRAYS[name], SAID["kernels"].get(name)
    if said is None:
        return integers
    if said["packed"]:  # `bits` bits each, the lowest bit first
        bits = np.unpackbits(integers, count=said["bits"] * int(np.prod(said["shape"])), bitorder="little")
        integers = (bits.reshape(-1, said["bits"]).astype(int) << np.arange(said["bits"])).sum(1).reshape(said["shape"])
        integers = integers + ARRAYS[f"{name}/lowest"]
    return integers * ARRAYS[f"{name}/step"]


def convolution(x, name, stride):
    """A convolution of 3 x 3 or 1 x 1, padded by half its size, and its batch norm."""
    w = kernel(f"{name}/conv/kernel")
    x = np.pad(rounded(x, f"{name}/conv/input"), ((0, 0), (len(w) // 2,) * 2, (len(w) // 2,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[:2], (1, 2))[:, ::stride, ::stride]
    y = np.einsum("nhwcij,ijcd->nhwd", windows, w, optimize=True)
    mean, var, scale, bias = (ARRAYS[f"{name}/bn/{each}"] for each in ("mean", "var", "scale", "bias"))
    return (y - mean) * (scale / np.sqrt(var + 1e-5)) + bias


def rounded(x, name):
    """Values on the grid of this activation: the nearest integer in its range, times its step. Without a grid, `x` itself."""
    grid = SAID["activations"].get(name)
    if grid is None:
        return x
    highest = grid["lowest"] + 2 ** grid["bits"] - 1
    integers = np.clip(np.rint(x / np.float32(grid["step"])), grid["lowest"], highest)
    return (integers * grid["step"]).astype(np.float32)


def activation(x, name):
    """ReLU, then the grid of the activation."""
    return rounded(np.maximum(x, 0), name)


images = np.load(sys.argv[2])
if images.dtype != np.uint8 or list(images.shape[1:]) != list(SAID["image"]):
    sys.exit(f"{sys.argv[2]} holds {images.dtype} {images.shape}: give uint8 images [n, {', '.join(map(str, SAID['image']))}].")
if "init_block/conv/kernel" not in ARRAYS:
    sys.exit(f"{sys.argv[1]} holds a {SAID['network']}: this program runs resnet8 and resnet20.")
x = ((images / 255 - SAID["mean"]) / SAID["std"]).astype(np.float32)
x = activation(convolution(x, "init_block", 1), "init_activ")
for stage in range(1, 4):
    for unit in range(1, 1 + sum(name.endswith("conv1/conv/kernel") for name in ARRAYS if f"stage{stage}_" in name)):
        name = f"stage{stage}_unit{unit}"
        stride = 2 if stage > 1 and unit == 1 else 1
        y = activation(convolution(x, f"{name}/conv1", stride), f"{name}/activ1")
        y = convolution(y, f"{name}/conv2", 1)
        shortcut = f"{name}/identity_conv"
        x = activation(y + (convolution(x, shortcut, stride) if f"{shortcut}/conv/kernel" in ARRAYS else x), f"{name}/activ")
x = rounded(x.mean((1, 2)), "output/input")
np.save(sys.argv[3], x @ kernel("output/kernel") + ARRAYS["output/bias"])
