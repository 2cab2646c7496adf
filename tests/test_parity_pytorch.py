"""Every architecture against the libraries whose weights it takes, layer by layer, on random weights.

Needs torch, torchvision and pytorchcv: pip install -e '.[parity]'.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from hast_jax import networks
from hast_jax.networks import weights

torch = pytest.importorskip("torch", reason="needs pip install -e '.[parity]'")
torchvision = pytest.importorskip("torchvision", reason="needs pip install -e '.[parity]'")
pytorchcv = pytest.importorskip("pytorchcv.model_provider", reason="needs pip install -e '.[parity]'")

CLASSES = 10
NETWORKS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "pytorchcv resnet20": ("resnet20", lambda: pytorchcv.get_model("resnet20_cifar10"), "body.conv2"),
    "pytorchcv resnet18": ("resnet18", lambda: pytorchcv.get_model("resnet18", num_classes=CLASSES), "body.conv2"),
    "torchvision resnet18": ("resnet18", lambda: torchvision.models.resnet18(num_classes=CLASSES), "bn2"),
    "pytorchcv mobilenet": ("mobilenetv1", lambda: pytorchcv.get_model("mobilenet_w1", num_classes=CLASSES), "pw_conv.bn"),
    "pytorchcv mobilenetv2": ("mobilenetv2", lambda: pytorchcv.get_model("mobilenetv2_w1", num_classes=CLASSES), "conv3"),
    "torchvision mobilenetv2": (
        "mobilenetv2_torchvision",
        lambda: torchvision.models.mobilenet_v2(num_classes=CLASSES),
        "",  # its branches are the batch norms that no activation follows
    ),
}


def randomise(network: Any) -> None:
    """Batch norms as of a trained network: without this every channel would be alike."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.uniform_(low, high, generator=generator)
    network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_batch_norm_inputs_and_branches_agree(name: str) -> None:
    ours, make, branch_suffix = NETWORKS[name]
    network = make()
    randomise(network)
    size = 32 if ours == "resnet20" else 224
    images = np.random.default_rng(1).normal(size=(2, 3, size, size)).astype(np.float32)
    inputs, outputs = {}, {}

    def hook(module: Any, arguments: Any, output: Any, path: str) -> None:
        inputs[path], outputs[path] = arguments[0].numpy().copy(), output.numpy().copy()

    for path, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda m, a, o, path=path: hook(m, a, o, path))
    with torch.no_grad():
        logits = network(torch.from_numpy(images)).numpy()

    model = networks.module(ours, CLASSES)
    state = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    variables = weights.from_state_dict(model, state)
    network = networks.create(model, images.shape[2:] + images.shape[1:2])
    found, taps = jax.jit(lambda v, x: networks.apply(network, v, x))(variables, images.transpose(0, 2, 3, 1))

    close(found, logits)
    assert len(taps.batch_norms) == len(inputs)
    for tap, path in zip(taps.batch_norms, shortcuts_first(list(inputs))):
        close(tap.inputs, inputs[path].transpose(0, 2, 3, 1))
    branches = [output for path, output in outputs.items() if is_branch(path, branch_suffix, network)]
    assert len(taps.branches) == len(branches)
    for ours_branch, expected in zip(taps.branches, branches):
        close(ours_branch, expected.transpose(0, 2, 3, 1))


def shortcuts_first(paths: list[str]) -> list[str]:
    """torchvision runs the shortcut of a block last, pytorchcv and we first."""
    for path in [path for path in paths if "downsample" in path]:
        paths.remove(path)
        block = path.split("downsample")[0]
        paths.insert(next(i for i, other in enumerate(paths) if other.startswith(block)), path)
    return paths


def is_branch(path: str, suffix: str, network: Any) -> bool:
    if suffix:
        return path.removesuffix(".bn").endswith(suffix) or path.endswith(suffix)
    names = dict(network.named_modules())
    parent, _, last = path.rpartition(".")
    return last.isdigit() and f"{parent}.{int(last) + 1}" not in names


def close(found: Any, expected: np.ndarray) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found) / scale, expected / scale, atol=1e-4)
