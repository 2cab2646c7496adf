"""Synthetic images on which a student is not trained, and how often it agrees with its teacher on them: `eval.held_out`."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hast_jax import networks, paths
from hast_jax.errors import UserError
from hast_jax.networks.weights import Variables
from hast_jax.runs import synthetic_set
from hast_jax.runs.files import crc32
from hast_jax.stages.job import Job


def images_of(config: ConfigDict) -> np.ndarray | None:
    """The images of `config.eval.held_out`, memory-mapped; None if the field is empty. Raises UserError for a missing set."""
    if not config.eval.held_out:
        return None
    return synthetic_set.load(paths.local(config.eval.held_out), tuple(config.teacher.image), config.teacher.classes)[0]


def measure(job: Job, variables: Variables) -> dict[str, Any] | None:
    """How often student and teacher agree on the held-out images, and their KL divergence; None without such images.

    {"images": number, "agreement": per cent, "kl": nats, "crc32": of the images}
    """
    images = images_of(job.config)
    if images is None:
        return None
    found = networks.agreement(job.teacher, job.student, (job.variables, variables), images, job.config.eval.batch)
    return {"images": len(images), "agreement": found.top1, "kl": found.kl, "crc32": crc32(images)}


def is_measured(config: ConfigDict, result: Mapping[str, Any]) -> bool:
    """Whether the `result` of a run already holds what `measure` would give; True if no held-out images are named."""
    images, known = images_of(config), result.get("held_out")
    if images is None or known is None:
        return images is None
    if "crc32" not in known:  # of an older version
        return result["config"]["eval"].get("held_out") == config.eval.held_out
    return known["crc32"] == crc32(images)


def checksum(config: ConfigDict) -> int:
    """The checksum of the images of `config.eval.held_out`; 0 without such images."""
    images = images_of(config)
    return 0 if images is None else crc32(images)


def refuse_common(config: ConfigDict, images: np.ndarray) -> None:
    """Raise UserError if `images`, from which the student learns, are among those of `config.eval.held_out`."""
    held_out = images_of(config)
    if held_out is not None and not _distinct(images).isdisjoint(_distinct(held_out)):
        raise UserError("config.eval.held_out holds images that the student is trained on: give images of another seed.")


def _distinct(images: np.ndarray) -> set[bytes]:
    return {hashlib.sha256(np.asarray(each).tobytes()).digest() for each in images}
