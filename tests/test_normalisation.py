"""Images that are not normalised as the network expects are noticed, wherever images are given."""

import warnings

import numpy as np
import pytest
import tiny

import hast_jax
from hast_jax import from_config
from hast_jax.data import datasets
from hast_jax.deliver import comparison
from hast_jax.errors import Notice
from hast_jax.stages import teacher as teacher_stage
from hast_jax.student import Student

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201))


def looks_like_pixels(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        datasets.warn_of_pixels(images, mean, std)
    return bool(caught)


def test_pixels_in_place_of_normalised_images_are_noticed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    mean, std = CIFAR
    normalised = np.asarray(datasets.normalise(pixels, mean, std))
    assert not looks_like_pixels(normalised, mean, std)
    assert not looks_like_pixels(3 * normalised, mean, std)  # synthetic images leave the range of real ones
    assert looks_like_pixels(pixels / 255, mean, std) and looks_like_pixels(pixels.astype(np.float32), mean, std)


def test_networks_that_take_pixels_are_given_pixels_without_a_notice() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8).astype(np.float32)
    assert not looks_like_pixels(pixels / 255, (0.0,), (1.0,)) and looks_like_pixels(pixels, (0.0,), (1.0,))
    assert not looks_like_pixels(pixels, (0.0,), (1 / 255,)) and looks_like_pixels(pixels / 255, (0.0,), (1 / 255,))
    assert not looks_like_pixels(pixels[:0], (0.0,), (1.0,))


@pytest.fixture(scope="module")
def student(finished) -> Student:
    return hast_jax.load(finished)


def test_a_student_and_an_export_warn_of_pixels_that_are_floats(student: Student) -> None:
    images = datasets.load(tiny.config(), "test").images[:8]
    student(images)
    student(np.asarray(datasets.normalise(images, student.mean, student.std)))
    words = "the images hold values from 0 to 1, but normalised images would hold .*: give uint8 images where they are taken"
    with pytest.warns(Notice, match=words):
        student(images / np.float32(255))
    with pytest.warns(Notice, match=words):
        comparison.judged(student, images / np.float32(255))


@pytest.mark.parametrize(("mean", "std", "doubted"), [(None, None, False), (0.0, 1.0, True), (0.5, 0.1, True)])
def test_a_wrong_mean_or_std_is_noticed_on_real_images(mean: float | None, std: float | None, doubted: bool) -> None:
    config = tiny.config()
    dataset = datasets.load(config, "test")
    teacher, variables = from_config.teacher(config)
    if mean is not None:
        config.teacher.mean, config.teacher.std = (mean,), (std,)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        teacher_stage.check_normalisation(teacher, variables, dataset, config)
    words = [str(each.message) for each in caught]
    assert bool(words) == doubted
    assert all("times the variance of its training images" in each and each.endswith("check mean and std.") for each in words)
