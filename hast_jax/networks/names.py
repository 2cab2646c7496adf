"""The names of our variables in the state dicts of other libraries: one explicit map for each family and library.

A path is (collection, names of modules ..., leaf), as in ("params", "stage2_unit1", "conv1", "bn", "scale").
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

Path = tuple[str, ...]
NameOf = Callable[[Path], str]

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def flax(path: Path) -> str:
    """("params", "stage2_unit1", "conv1", "bn", "scale") -> "params/stage2_unit1/conv1/bn/scale": for any network of Flax."""
    return "/".join(path)


def flax_dotted(path: Path) -> str:
    """The same with dots: "params.stage2_unit1.conv1.bn.scale"."""
    return ".".join(path)


def torch(path: Path) -> str:
    """("params", "block", "conv", "kernel") -> "block.conv.weight": for a network whose modules are called as in PyTorch."""
    _, *modules, leaf = path
    return ".".join([*modules, LEAVES.get(leaf, leaf)])


def resnet_pytorchcv(path: Path, imagenet_stem: bool) -> str:
    """("params", "stage2_unit1", "conv1", "bn", "scale") -> "features.stage2.unit1.body.conv1.bn.weight"."""
    _, block, *inner, leaf = path
    if block == "output":
        modules = [block]
    elif block == "init_block":
        modules = ["features", block, *(["conv"] if imagenet_stem else []), *inner]
    else:
        body = [] if inner[0] == "identity_conv" else ["body"]
        modules = ["features", *block.split("_"), *body, *inner]
    return ".".join([*modules, LEAVES[leaf]])


def resnet_torchvision(path: Path) -> str:
    """("params", "stage2_unit1", "conv1", "bn", "scale") -> "layer2.0.bn1.weight"."""
    _, block, *inner, leaf = path
    if block == "output":
        modules = ["fc"]
    elif block == "init_block":
        modules = [f"{inner[0]}1"]
    else:
        stage, unit = _numbers(block)
        layer, part = inner
        last = f"downsample.{['conv', 'bn'].index(part)}" if layer == "identity_conv" else f"{part}{layer[-1]}"
        modules = [f"layer{stage}", str(unit - 1), last]
    return ".".join([*modules, LEAVES[leaf]])


def mobilenet_pytorchcv(path: Path) -> str:
    """Both MobileNets: ("params", "stage2_unit1", "pw_conv", "bn", "scale") -> "features.stage2.unit1.pw_conv.bn.weight"."""
    _, block, *inner, leaf = path
    modules = [block] if block == "output" else ["features", *block.replace("_unit", ".unit").split("."), *inner]
    return ".".join([*modules, LEAVES[leaf]])


def mobilenetv2_torchvision(path: Path, units: Sequence[int]) -> str:
    """("params", "stage2_unit1", "conv3", "bn", "scale") -> "features.2.conv.3.weight". units: number in each stage."""
    _, block, *inner, leaf = path
    if block == "output":
        modules = ["classifier", "1"]
    elif block in ("init_block", "final_block"):
        index = 0 if block == "init_block" else sum(units) + 1
        modules = ["features", str(index), str(_PARTS.index(inner[0]))]
    else:
        stage, unit = _numbers(block)
        index = [0, *accumulate(units)][stage - 1] + unit
        layer, part = int(inner[0][-1]) - (2 if index == 1 else 1), _PARTS.index(inner[1])
        projects = inner[0] == "conv3"
        modules = ["features", str(index), "conv", str(layer + part) if projects else f"{layer}.{part}"]
    return ".".join([*modules, LEAVES[leaf]])


_PARTS = ("conv", "bn")


def _numbers(block: str) -> tuple[int, int]:
    """ "stage2_unit1" -> (2, 1)."""
    stage, unit = block.removeprefix("stage").split("_unit")
    return int(stage), int(unit)
