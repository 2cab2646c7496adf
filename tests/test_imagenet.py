"""The ImageNet config at its small budget, at 96 pixels: random weights, a made-up folder of images, every stage."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from hast_jax import networks
from hast_jax.networks import weights

CLASSES, SIZE = 10, 96


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of each class."""
    place = tmp_path_factory.mktemp("imagenet")
    for label in range(CLASSES):
        folder = place / "val" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng([label, i]).integers(0, 256, (90, 100, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.JPEG")
    return place


def command(network: str, data_dir: Path, workdir: Path) -> list[str]:
    """The command line of a run from random weights, which stand beside `workdir`."""
    file = workdir.parent / f"{network}.safetensors"
    model = networks.module(network, CLASSES)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    file.write_bytes(weights.encoded(weights.to_state_dict(model, variables), {"mean": "[0.485, 0.456, 0.406]"}))
    return [
        *tiny.module("main"),
        f"--config={tiny.ROOT}/configs/imagenet.py:small,{network},w4a4",
        f"--workdir={workdir}",
        f"--config.teacher.weights={file}",
        f"--config.teacher.classes={CLASSES}",
        f"--config.teacher.image=({SIZE}, {SIZE}, 3)",
        f"--config.eval.data_dir={data_dir}",
        "--config.synthesis.save_every=10",
        "--config.finetune.steps_per_epoch=5",
        "--config.log_every=5",
        "--config.devices=2",
    ]


def check(workdir: Path) -> None:
    result = json.loads((workdir / "result.json").read_text())
    assert (result["images"], result["iterations"], result["steps"], result["batch"]) == (64, 20, 10, 8)
    assert 0 <= result["last"] <= 100 and result["dataset"] == "folder"
    images = np.load(workdir / "synthetic" / "images.npy", mmap_mode="r")
    assert images.shape == (64, SIZE, SIZE, 3) and np.isfinite(images).all()


@pytest.mark.slow
def test_resnet18_runs_through_all_stages_and_goes_on_where_it_was_killed(data_dir: Path, tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    done = tiny.call_anew(command("resnet18", data_dir, unbroken))
    assert done.returncode == 0, done.stderr
    check(unbroken)
    for stage, step in (("synthesis", 20), ("finetune", 5)):
        tiny.kill_when(command("resnet18", data_dir, killed), tiny.logged(killed, stage, step))
    done = tiny.call(command("resnet18", data_dir, killed))
    assert done.returncode == 0, done.stderr
    assert tiny.outcome(killed) == tiny.outcome(unbroken)
    done = tiny.call(tiny.evaluate(killed))
    assert done.returncode == 0 and "30 images, folder val" in done.stdout and "top-5" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mobilenetv1", "mobilenetv2", "mobilenetv2_torchvision"])
def test_a_mobilenet_runs_through_all_stages(network: str, data_dir: Path, tmp_path: Path) -> None:
    done = tiny.call(command(network, data_dir, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    check(tmp_path / "run")


def test_without_weights_the_run_is_refused(tmp_path: Path) -> None:
    config = f"--config={tiny.ROOT}/configs/imagenet.py:small"
    done = tiny.call([*tiny.module("main"), config, f"--workdir={tmp_path}/run"])
    assert done.returncode == 1 and "config.teacher.weights is empty" in done.stderr and "Traceback" not in done.stderr
