"""The picture of a synthetic set: eight images in a row, each as it is, with a white margin."""

import numpy as np
import pytest

from hast_jax.deliver import pictures


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_images_of_any_shape_and_any_number_of_channels_are_shown(channels: int, shown: list[int]) -> None:
    pixels = np.random.default_rng(0).random((70, 5, 9, channels))
    mean, std = np.linspace(0.2, 0.6, channels), np.linspace(0.1, 0.3, channels)
    picture = pictures.grid((pixels - mean) / std, tuple(mean), tuple(std))
    assert picture.shape == (8 * 7, 8 * 11, 3)
    for number in (0, 9, 63):
        row, column = divmod(number, 8)
        framed = picture[7 * row : 7 * row + 7, 11 * column : 11 * column + 11]
        np.testing.assert_allclose(framed[1:-1, 1:-1], pixels[number][..., shown])
        assert (framed[[0, -1]] == 1).all() and (framed[:, [0, -1]] == 1).all()


def test_the_places_after_the_last_image_stay_white() -> None:
    picture = pictures.grid(np.zeros((9, 4, 4, 3)), (0.0,) * 3, (1.0,) * 3)
    assert picture.shape == (12, 48, 3) and (picture[7:11, 1:5] == 0).all() and (picture[6:, 6:] == 1).all()
