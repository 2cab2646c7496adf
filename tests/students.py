"""Students of networks with random weights, and how a stranger runs their ONNX files."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_any_network import given

from hast_jax import networks
from hast_jax.networks import rules as rules_lib
from hast_jax.student import Student


def student(name: str, bits="w4a4", learned: bool = True) -> Student:
    """A network with random weights, quantized, with ranges of random images. Each one is made once."""
    its = given(name)
    which = repr(bits), learned
    if which not in its.students:
        its.students[which] = _student(its, bits, learned)
    return its.students[which]


def _student(its: Any, bits: Any, learned: bool) -> Student:
    rules = rules_lib.normalise(bits)
    network = networks.create(its.module, its.image, rules=rules, learned_ranges=learned)
    images = jax.random.uniform(jax.random.key(0), (32, *its.image), minval=-2, maxval=2)
    ranges = jax.jit(functools.partial(networks.observe, network))(its.variables, {}, images)
    channels = its.image[-1]
    return Student(network, {**its.variables, "ranges": ranges}, rules, its.image, (0.5,) * channels, (0.25,) * channels, {})


def random_images(its: Student, count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *its.image), np.uint8)


def onnx_logits(path: Path, images: np.ndarray) -> np.ndarray:
    """As a stranger would run the file."""
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images})[0]
