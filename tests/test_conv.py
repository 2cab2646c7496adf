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
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (2, 8, 8, 16)), jax.random.normal(keys[1], (3, 3, 16, 16))
    with jax.default_matmul_precision(arithmetic):
        found = conv(x, kernel, (1, 1), around(3))
    expected = plain(lax.reduce_precision(x, 8, bits), lax.reduce_precision(kernel, 8, bits), 1, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert (np.abs(found - plain(x, kernel, 1, 1)).max() > 1e-3) == (bits < 23)
