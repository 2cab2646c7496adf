"""An image is a sum of pictures of several resolutions, each enlarged by bilinear interpolation."""

import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from hast_jax import pipeline
from hast_jax.errors import Stopped
from hast_jax.method import pyramid
from hast_jax.runs import preemption

SIZES = ((1, 1), (7, 7), (32, 32), (33, 33), (5, 32), (9, 1))


def enlarged(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture [height, width, channels] at another size, by `numpy.interp` along one axis and then along the other."""
    for axis in (0, 1):
        old = (np.arange(picture.shape[axis]) + 0.5) / picture.shape[axis]
        new = (np.arange(size[axis]) + 0.5) / size[axis]
        picture = np.apply_along_axis(lambda line, new=new, old=old: np.interp(new, old, line), axis, picture)
    return picture


@settings(deadline=None, max_examples=20)
@given(size=st.sampled_from(SIZES), scales=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_an_image_is_the_sum_of_its_resolutions(size: tuple[int, int], scales: int, seed: int) -> None:
    levels = pyramid.start(jax.random.key(seed), (2, *size, 3), scales)
    image = pyramid.images(levels)
    assert image.shape == (2, *size, 3)
    for one in range(2):
        expected = sum(enlarged(np.asarray(level[one], np.float64), size) for level in levels)
        np.testing.assert_allclose(image[one], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("scales", "heights", "widths"),
    [
        (6, [32, 16, 8, 4, 2, 1], [32, 16, 8, 4, 2, 1]),
        (2, [32, 16], [32, 16]),
        (9, [7, 4, 2, 1], [7, 4, 2, 1]),
        (3, [1], [1]),
        (9, [3, 2, 1, 1], [8, 4, 2, 1]),
    ],
)
def test_each_resolution_is_half_of_the_one_before_down_to_a_single_pixel(
    scales: int, heights: list[int], widths: list[int]
) -> None:
    levels = pyramid.start(jax.random.key(0), (3, heights[0], widths[0], 2), scales)
    assert [level.shape for level in levels] == [(3, height, width, 2) for height, width in zip(heights, widths)]


def test_all_resolutions_start_with_noise_of_the_same_variance_and_one_alone_with_that_of_the_paper() -> None:
    levels = pyramid.start(jax.random.key(0), (500, 16, 16, 3), 5)
    np.testing.assert_allclose([jnp.var(level) for level in levels], 1 / 5, rtol=0.1)
    alone = pyramid.start(jax.random.key(0), (500, 16, 16, 3), 1)
    np.testing.assert_array_equal(alone[0], jax.random.normal(jax.random.key(0), (500, 16, 16, 3)))
    assert pyramid.images(alone) is alone[0]


def test_images_of_several_resolutions_do_not_depend_on_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def images(name: str) -> np.ndarray:
        config = tiny.config(devices=1, synthesis__scales=4, synthesis__lr=0.05, synthesis__return_to_best=True)
        return np.load(pipeline.run_synthesis(config, tmp_path / name) / "images.npy")

    expected = images("whole")
    sigterm = threading.Event()
    monkeypatch.setattr(preemption, "_heard", sigterm)
    sigterm.set()
    with pytest.raises(Stopped):
        images("stopped")
    assert list((tmp_path / "stopped" / "checkpoints" / "synthesis").glob("[0-9]*"))
    sigterm.clear()
    np.testing.assert_array_equal(images("stopped"), expected)
