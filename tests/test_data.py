"""Real images: the built-in digits, and CIFAR through TFDS where it is prepared."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_config import get_config

from hast_jax import from_config, networks
from hast_jax.data import datasets
from hast_jax.errors import UserError
from hast_jax.runs import parallel
from hast_jax.runs.progress import silent
from hast_jax.stages.evaluate import evaluator


def test_the_digits_are_split_without_overlap_and_by_class() -> None:
    config = tiny.config()
    train, test = datasets.load(config, "train"), datasets.load(config, "test")
    assert len(train.labels) == 1078 and len(test.labels) == 719
    assert train.images.dtype == np.uint8 and train.images.shape[1:] == (8, 8, 1) and train.images.max() == 255
    assert np.abs(np.bincount(train.labels) / 1078 - np.bincount(test.labels) / 719).max() < 0.01
    together = {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    assert not together


def test_a_split_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="use train or test"):
        datasets.load(tiny.config(), "validation")


def test_images_are_normalised_with_the_teachers_mean_and_std() -> None:
    images = jnp.asarray([[[[0, 255]]]], jnp.uint8)
    np.testing.assert_allclose(datasets.normalise(images, (0.5, 0.25), (0.5, 0.5)), [[[[-1.0, 1.5]]]])


@pytest.mark.parametrize(("name", "top1"), [("cifar10", 90.09), ("cifar100", 67.62)])
def test_the_built_in_teachers_reach_their_accuracy(name: str, top1: float, request: pytest.FixtureRequest) -> None:
    config = get_config(tiny.ROOT / "configs" / f"{name}.py")
    config.eval.data_dir = request.config.getoption("--tfds")
    if not config.eval.data_dir:
        pytest.skip("needs CIFAR's test images: give --tfds=DIR")
    dataset = datasets.load(config, "test")
    model, variables = from_config.teacher(config)
    devices = parallel.setup(2)
    assert len(dataset.labels) == 10_000
    found = evaluator(partial(networks.logits, model), dataset, config, devices, silent)(variables)
    assert found.top1 == pytest.approx(top1, abs=0.03) and found.top5 > found.top1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'six'"), r"a package is missing \(No module named 'six'\): install that package"),
        (AssertionError("could not find data"), "prepare it once with"),
        (KeyError("Trying to access `splits['test']` but `splits` is empty."), "prepare it once with"),
        (ValueError("Unknown split 'tset'"), "TFDS cannot read the test split .*: ValueError: Unknown split 'tset'"),
    ],
)
def test_each_cause_for_which_tfds_fails_has_its_own_sentence(monkeypatch: pytest.MonkeyPatch, error, words: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("tensorflow_datasets.data_source", fail)
    with pytest.raises(UserError, match=words):
        datasets.load(tiny.config(eval__dataset="cifar10", teacher__image=(32, 32, 3)), "test")
