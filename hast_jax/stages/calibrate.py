"""Stage 2, calibration: one range for each activation layer, the weights untouched; frozen afterwards."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from hast_jax.runs import preemption
from hast_jax.runs.report import Reporter

Array = jax.Array
Variables = Mapping[str, Any]


def step(student: nn.Module, variables: Variables, ranges: Variables, images: Array) -> Variables:
    """The `ranges` after one more batch of images [batch, height, width, channels]; `{}` before the first."""
    with jax.default_matmul_precision(student.precision.arithmetic):  # type: ignore[attr-defined]
        _, updated = student.apply({**variables, "ranges": ranges} if ranges else variables, images, mutable=["ranges"])
    return updated["ranges"]


def run(student: nn.Module, variables: Variables, images: np.ndarray, config: ConfigDict, reporter: Reporter) -> Variables:
    """Ranges of every activation layer from random batches of `images`, which may be memory-mapped.

    The authors calibrate on images of a small generator; hard samples need no second network and are what the student is
    trained on.
    """
    cfg = config.calibration
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    choose = jax.jit(lambda index: jax.random.choice(jax.random.fold_in(key, index), len(images), (cfg.batch,), replace=False))
    batch_step = jax.jit(partial(step, student))
    ranges: Variables = {}
    with reporter.stage("calibrate", cfg.batches) as progress:
        for index in range(cfg.batches):
            if preemption.asked():
                preemption.leave()  # calibration is short: it begins anew
            ranges = batch_step(variables, ranges, images[np.asarray(choose(index))])
            if (index + 1) % config.log_every == 0:
                jax.block_until_ready(ranges)
                progress.update(index + 1)
    return ranges
