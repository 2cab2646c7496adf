"""Image augmentation on the device, differentiable in the images.

A random resized crop and a flip are linear in the image and separable: each is `rows @ image @ columns^T` with two
small matrices of bilinear weights. Randomness comes from explicit keys: one for each image, or one for the whole batch.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

PROPOSALS = 10


def crop_box(key: Array, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[Array, ...]:
    """Top, left, height and width of a random crop of an image: whole numbers, as float32 scalars.

    size: height and width of the image. scale: limits of the crop's share of the area. ratio: limits of its width / height,
    relative to that of the image.

    As in torchvision, ten crops are proposed, with area uniform in `scale` and log aspect uniform in `ratio`. The first one
    that fits is taken. If none fits, the crop is the whole image. (In torchvision `ratio` is absolute, which is the same for
    square images.)
    """
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    area = size[0] * size[1] * jax.random.uniform(area_key, (PROPOSALS,), minval=scale[0], maxval=scale[1])
    log_ratio = jnp.log(jnp.asarray(ratio))
    aspect = jnp.exp(jax.random.uniform(ratio_key, (PROPOSALS,), minval=log_ratio[0], maxval=log_ratio[1]))
    aspect = aspect * (size[1] / size[0])
    width, height = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (width >= 1) & (width <= size[1]) & (height >= 1) & (height <= size[0])
    first = jnp.argmax(fits)
    height = jnp.where(fits.any(), height[first], size[0])
    width = jnp.where(fits.any(), width[first], size[1])
    top = jnp.floor(jax.random.uniform(top_key) * (size[0] - height + 1))
    left = jnp.floor(jax.random.uniform(left_key) * (size[1] - width + 1))
    return top, left, height, width


def resize_matrix(start: Array, length: Array, size: int) -> Array:
    """Matrix [size, size] of a bilinear resize: pixels start ... start + length - 1 of a line become the whole line.

    As in PyTorch with `align_corners=False`, pixel centres are at half coordinates. The crop's edge pixels are repeated beyond
    the crop.
    """
    target = jnp.arange(size)
    source = start + jnp.clip((target + 0.5) * length / size - 0.5, 0, length - 1)
    return jnp.maximum(0, 1 - jnp.abs(source[:, None] - target[None, :]))


def random_resized_crop(
    key: Array, images: Array, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3), flip: bool = True
) -> Array:
    """Crop images [batch, height, width, channels], resize them back and, with `flip`, mirror them with probability 1/2.

    key: [batch] keys, one for each image, or one key, whose crop and flip the whole batch shares. scale, ratio: see `crop_box`.
    """
    _, height, width, _ = images.shape
    if key.ndim == 0:
        rows, columns = (matrix[None] for matrix in _matrices(key, (height, width), scale, ratio, flip))
    else:
        rows, columns = jax.vmap(lambda k: _matrices(k, (height, width), scale, ratio, flip))(key)
    rows, columns = (jnp.broadcast_to(m, (len(images), *m.shape[1:])).astype(images.dtype) for m in (rows, columns))
    # By default an accelerator would round the images to bfloat16 here, which no config field asks for.
    return jnp.einsum("biy,byxc,bjx->bijc", rows, images, columns, precision=jax.lax.Precision.HIGHEST)


def _matrices(
    key: Array, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], flip: bool
) -> tuple[Array, Array]:
    box_key, flip_key = jax.random.split(key)
    top, left, height, width = crop_box(box_key, size, scale, ratio)
    columns = resize_matrix(left, width, size[1])
    rows = resize_matrix(top, height, size[0])
    return rows, jnp.where(jax.random.bernoulli(flip_key), columns[::-1], columns) if flip else columns
