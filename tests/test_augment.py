"""Augmentation against independent references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from hast_jax.method import augmentation
from hast_jax.runs import parallel
from hast_jax.stages import batches, synthesize

SIZE = 16


@pytest.mark.parametrize("box", [(0, 0, 16, 16), (3, 2, 11, 9), (15, 0, 1, 16), (5, 7, 8, 8)])
def test_a_crop_resized_back_is_pillows(box: tuple[int, ...]) -> None:
    top, left, height, width = box
    image = np.random.default_rng(0).random((SIZE, SIZE), np.float32)
    crop = Image.fromarray(image[top : top + height, left : left + width])
    expected = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    rows = augmentation.resize_matrix(jnp.float32(top), jnp.float32(height), SIZE)
    columns = augmentation.resize_matrix(jnp.float32(left), jnp.float32(width), SIZE)
    np.testing.assert_allclose(rows @ image @ columns.T, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (32, 96), (64, 32)])
def test_boxes_lie_in_the_image_and_have_the_wanted_areas_and_aspects(size: tuple[int, int]) -> None:
    box = jax.vmap(lambda k: jnp.stack(augmentation.crop_box(k, size, (0.5, 1.0), (3 / 4, 4 / 3))))
    top, left, height, width = np.asarray(box(jax.random.split(jax.random.key(0), 2000))).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()
    area, aspect = height * width / (size[0] * size[1]), width / height / (size[1] / size[0])
    assert 0.47 < area.min() < 0.53 and area.max() > 0.9 and 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4
    assert len(np.unique(top)) > 5 and len(np.unique(left)) > 5


@pytest.mark.parametrize("width", [SIZE, 2 * SIZE])
def test_the_whole_image_without_a_crop_is_itself_or_its_mirror(width: int) -> None:
    images = jax.random.normal(jax.random.key(0), (64, SIZE, width, 3))
    keys = jax.random.split(jax.random.key(1), 64)
    out = augmentation.random_resized_crop(keys, images, (1.0, 1.0), (1.0, 1.0))
    same = jnp.abs(out - images).max((1, 2, 3)) < 1e-5
    mirrored = jnp.abs(out - images[:, :, ::-1]).max((1, 2, 3)) < 1e-5
    assert (same ^ mirrored).all() and 16 < int(same.sum()) < 48
    np.testing.assert_allclose(
        augmentation.random_resized_crop(keys, images, (1.0, 1.0), (1.0, 1.0), flip=False), images, atol=1e-5
    )


def test_without_flips_the_crops_are_the_same() -> None:
    images = jnp.broadcast_to(jnp.arange(SIZE, dtype=jnp.float32)[:, None], (8, 1, SIZE, SIZE)).swapaxes(2, 3)[:, 0, ..., None]
    keys = jax.random.split(jax.random.key(2), 8)
    flipped, plain = (augmentation.random_resized_crop(keys, images, (0.3, 0.9), flip=flip) for flip in (True, False))
    assert (plain[:, :, -1] >= plain[:, :, 0]).all()  # brightness rises from left to right
    mirrored = jnp.where((flipped[:, :, -1:] < flipped[:, :, :1]), flipped[:, :, ::-1], flipped)
    np.testing.assert_allclose(mirrored, plain, atol=1e-5)


def test_one_key_gives_the_batch_one_crop_and_many_keys_give_many() -> None:
    images = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, SIZE, SIZE, 3)), (4, SIZE, SIZE, 3))
    one = augmentation.random_resized_crop(jax.random.key(1), images, (0.4, 0.6))
    many = augmentation.random_resized_crop(jax.random.split(jax.random.key(1), 4), images, (0.4, 0.6))
    assert jnp.abs(one - one[:1]).max() == 0
    assert jnp.abs(many - many[:1]).max() > 0.1


def test_it_is_linear_in_the_images_so_that_gradients_flow_through_it() -> None:
    images = jax.random.normal(jax.random.key(0), (2, SIZE, SIZE, 3))

    def see(x):
        return augmentation.random_resized_crop(jax.random.key(3), x, (0.4, 1.0))

    _, tangent = jax.jvp(see, (images,), (2 * images,))
    np.testing.assert_allclose(tangent, 2 * see(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flip", [True, False])
def test_each_stage_flips_images_only_if_its_field_says_so(flip: bool, monkeypatch) -> None:
    monkeypatch.setattr(parallel, "device_share", lambda everything: everything)
    whole = {"finetune__crop_scale": 1.0, "synthesis__crop_scale": 1.0, "synthesis__crop_probability": 1.0}
    config = tiny.config(finetune__flip=flip, synthesis__flip=flip, synthesis__crop="image", **whole)
    rising = np.tile(np.arange(8, dtype=np.float32)[None, None, :, None], (16, 8, 1, 1))
    fixed = batches.fixed_inputs({}, {}, jnp.asarray(rising), jnp.zeros(16, jnp.int32), config)
    drawn, _ = batches.draw(fixed, jnp.asarray(0), config.finetune)
    seen = synthesize._see_through_crop(jnp.asarray(rising), jax.random.key(0), config.synthesis)
    for found in (drawn, seen):
        assert any(image[0, 0, 0] > image[0, -1, 0] for image in found) == flip
