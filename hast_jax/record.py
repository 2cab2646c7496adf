"""What a run records about itself: each of its starts, and the summary in `result.json`."""

import datetime
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import jax

from hast_jax import __version__
from hast_jax import config as config_lib
from hast_jax.fields import GIVEN
from hast_jax.runs import processes
from hast_jax.stages import finetune
from hast_jax.stages.job import Job

SCRIPT = "hast-jax"  # the installed command
STAGES = ("synthesis", "calibrate", "finetune")


def begin_segment(job: Job, call: str | None = None) -> dict[str, Any] | None:
    """Record a start of this run as a new segment; None if the run is finished already.

    call: the call in Python that started the run, if it was no command.
    """
    if job.storage.read_result() is not None:
        return None
    segment = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": _hardware(job),
        "command": call or _command(),
        "hast_jax": __version__,
        "jax": jax.__version__,
        "spent_before": {name: round(job.recorder.seconds(name), 1) for name in STAGES},
    }
    segments = [*(_ended(job, each) for each in job.storage.read_segments()), segment]
    processes.on_main(lambda: job.storage.write_segments(segments))
    return segment


def _command() -> str | None:
    """The command that started this process; None if it is no command of hast_jax."""
    words = sys.orig_argv[1:]
    if words and Path(words[0]).name == SCRIPT:
        return shlex.join([SCRIPT, *words[1:]])
    words = words[words.index("-m") :] if "-m" in words else []
    return shlex.join(["python", *words]) if len(words) > 1 and words[1].startswith("hast_jax.") else None


def end_segment(job: Job, segment: dict[str, Any] | None) -> None:
    """Record the seconds that each stage took since this start."""
    if segment is not None:
        segment["seconds"] = {name: round(job.recorder.own_seconds.get(name, 0.0), 1) for name in STAGES}
        segments = [*job.storage.read_segments()[:-1], segment]
        processes.on_main(lambda: job.storage.write_segments(segments))


def _ended(job: Job, segment: dict[str, Any]) -> dict[str, Any]:
    """The segment with the seconds of each stage. If it was interrupted, they are taken from the log."""
    before = segment["spent_before"]
    return {"seconds": {name: round(job.recorder.seconds(name) - before.get(name, 0.0), 1) for name in STAGES}, **segment}


def summary(job: Job, images: int, evaluations: dict[int, float]) -> dict[str, Any]:
    """The content of `result.json`: accuracies in per cent, the budget, the seconds of each stage, the hardware."""
    config, best, teacher = job.config, finetune.best_epoch(evaluations), job.storage.teacher_accuracy()
    segments = job.storage.read_segments()
    return {
        "network": config.teacher.network,
        "weights": config.teacher.weights,
        "dataset": GIVEN if config.eval.dataset == "none" and teacher else config.eval.dataset,
        "bits": config.bits.to_dict(),
        "seed": config.seed,
        "teacher": teacher["top1"] if teacher else None,
        "no_finetuning": evaluations.get(0),
        "last": evaluations[max(evaluations)] if best else None,
        "best": evaluations[best] if best else None,
        "best_epoch": best,
        "images": images,
        "iterations": None if config.synthesis.source or config.synthesis.real_split else config.synthesis.iterations,
        "real_split": config.synthesis.real_split,
        "steps": config.finetune.epochs * config.finetune.steps_per_epoch,
        "batch": config.finetune.batch,
        "seconds": {name: round(job.recorder.seconds(name), 1) for name in STAGES},
        "hardware": ", then ".join(dict.fromkeys(segment["hardware"] for segment in segments)),
        "segments": segments,
        "config": config_lib.to_dict(config),
    }


def _hardware(job: Job) -> str:
    return f"{job.devices * processes.count()} x {jax.devices()[0].device_kind} ({platform.machine()})"
