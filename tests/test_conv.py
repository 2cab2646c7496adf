"""The packed and the depthwise convolution are the plain one, in value and in both gradients."""

import jax
import numpy as np
import pytest
from jax import lax

from hast_jax.networks.conv import conv

pytestmark = pytest.mark.usefixtures("little_optimization")


def plain(x, kernel, stride, groups):
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def around(size):
    return ((size // 2, size // 2),) * 2


@pytest.mark.parametrize("channels", [(3, 16), (16, 16), (16, 32), (32, 32), (1, 16)])
@pytest.mark.parametrize(
    ("width", "size", "stride"), [(8, 3, 1), (7, 3, 1), (2, 3, 1), (8, 3, 2), (8, 1, 1), (8, 7, 2), (8, 7, 1)]
)
def test_packed_convolutions_are_the_plain_ones(channels: tuple[int, int], width: int, size: int, stride: int) -> None:
    check(channels, width, size, stride, groups=1)


@pytest.mark.parametrize(
    ("width", "size", "stride"), [(8, 3, 1), (7, 3, 1), (8, 3, 2), (7, 3, 2), (8, 5, 2), (8, 1, 1), (2, 3, 2)]
)
@pytest.mark.parametrize(("channels", "groups"), [((6, 6), 6), ((1, 1), 1), ((6, 12), 6), ((6, 6), 2)])
def test_convolutions_in_groups_are_the_plain_ones(
    channels: tuple[int, int], groups: int, width: int, size: int, stride: int
) -> None:
    check(channels, width, size, stride, groups)


# Image, kernel, strides and padding, where the kernel covers more pixels than the image or its output has.
@pytest.mark.parametrize(
    ("image", "window", "strides", "padding"),
    [
        ((2, 2), (3, 3), (1, 1), ((1, 1), (1, 1))),
        ((1, 1), (3, 3), (1, 1), ((1, 1), (1, 1))),
        ((1, 3), (3, 3), (2, 1), ((1, 1), (1, 1))),
        ((4, 4), (3, 3), (2, 2), ((1, 1), (1, 1))),
        ((4, 4), (3, 3), (2, 2), ((0, 1), (0, 1))),  # "SAME"
        ((5, 3), (3, 3), (2, 2), ((1, 1), (1, 1))),
        ((4, 5), (3, 3), (2, 2), ((1, 0), (0, 1))),
        ((3, 4), (2, 4), (3, 2), ((1, 0), (2, 3))),
        ((5, 5), (2, 2), (4, 4), ((0, 0), (0, 0))),  # steps longer than the kernel: some pixels are never read
        ((6, 6), (5, 5), (3, 3), ((2, 2), (2, 2))),
    ],
)
def test_convolutions_of_images_smaller_than_the_kernel_are_the_plain_ones(image, window, strides, padding) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, *image, 4)), jax.random.normal(keys[1], (*window, 4, 8))

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    @jax.jit
    def both(x, kernel, key):
        ours, pull_back = jax.vjp(lambda x, k: conv(x, k, strides, padding), x, kernel)
        expected, expected_pull_back = jax.vjp(plain, x, kernel)
        upstream = jax.random.normal(key, expected.shape)
        return (ours, *pull_back(upstream)), (expected, *expected_pull_back(upstream))

    for actual, wanted in zip(*both(x, kernel, keys[2]), strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5 * np.abs(wanted).max())


def check(channels: tuple[int, int], width: int, size: int, stride: int, groups: int) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, width, width, channels[0]))
    kernel = jax.random.normal(keys[1], (size, size, channels[0] // groups, channels[1]))
    upstream = jax.random.normal(keys[2], plain(x, kernel, stride, groups).shape)

    @jax.jit
    def value_and_gradients(x, kernel, upstream):
        ours, pull_back = jax.vjp(lambda x, k: conv(x, k, (stride, stride), around(size), groups=groups), x, kernel)
        expected, expected_pull_back = jax.vjp(lambda x, k: plain(x, k, stride, groups), x, kernel)
        return (ours, *pull_back(upstream)), (expected, *expected_pull_back(upstream))

    for actual, wanted in zip(*value_and_gradients(x, kernel, upstream), strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(("arithmetic", "bits"), [("bfloat16", 7), ("tensorfloat32", 10), ("float32", 23)])
def test_on_a_cpu_operands_are_rounded_as_an_accelerator_would(arithmetic: str, bits: int) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, 8, 8, 16)), jax.random.normal(keys[1], (3, 3, 16, 16))
    upstream = jax.random.normal(keys[2], (2, 8, 8, 16))

    def products(convolve, x, kernel, upstream):
        y, pull_back = jax.vjp(convolve, x, kernel)
        return y, *pull_back(upstream)

    def rounded(x):
        return lax.reduce_precision(x, 8, bits)

    with jax.default_matmul_precision(arithmetic):
        found = products(lambda x, k: conv(x, k, (1, 1), around(3)), x, kernel, upstream)
    exact = products(lambda x, k: plain(x, k, 1, 1), x, kernel, upstream)
    expected = products(lambda x, k: plain(x, k, 1, 1), rounded(x), rounded(kernel), rounded(upstream))
    for ours, wanted, unrounded in zip(found, expected, exact, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-5 * np.abs(wanted).max())
        assert (np.abs(ours - unrounded).max() > 1e-3) == (bits < 23)
