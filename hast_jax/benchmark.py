"""Time one synthesis step and one fine-tuning step on this machine.

    python -m hast_jax.benchmark --config=configs/cifar100.py

Prints one JSON line for each part: images (samples) a second, compile time apart; the step's FLOPs by XLA's own cost
analysis (the zero taps of models/conv.py included); the fraction of the float32 matrix-product rate that is measured on the
same devices.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, config_flags

from hast_jax import calibrate, cli, finetune, networks, parallel, synthesize
from hast_jax import config as config_lib

CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, with a variant after a colon.")
PART = flags.DEFINE_enum("part", "all", ["all", "synthesize", "finetune"], "The step to time.")
STEPS = flags.DEFINE_integer("steps", 10, "Timed calls of each step.", lower_bound=1)

MATMUL_SIZE = 1024


def time_calls(call: Callable[[], Any], calls: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def matmul_rate(devices: int) -> float:
    """FLOP/s of float32 products of 1024 x 1024 matrices on all devices at once."""
    a = parallel.replicate(jnp.ones((MATMUL_SIZE, MATMUL_SIZE)), devices)
    product = parallel.pmap(jnp.matmul, devices)
    return devices * 2 * MATMUL_SIZE**3 / time_calls(lambda: product(a, a), 20)


def measure(
    part: str, step: Any, state: Any, constants: tuple[Any, ...], batch: int, devices: int, calls: int, steps: int
) -> dict:
    """The JSON line of one step: `step(state, *constants)` handles `batch` images on all devices, `calls` times a call."""
    start = time.perf_counter()
    compiled = step.lower(state, *constants).compile()
    compile_seconds = time.perf_counter() - start
    box = [state]

    def call() -> Any:
        box[0], metrics = step(box[0], *constants)
        return metrics

    seconds = time_calls(call, steps) / calls
    analysis = compiled.cost_analysis()
    flops = (
        devices * (analysis[0] if isinstance(analysis, list) else analysis)["flops"]
    )  # of one step: a loop's body counts once
    return {
        "part": part,
        "batch": batch,
        "per_second": round(batch / seconds, 1),
        "step_seconds": round(seconds, 4),
        "compile_seconds": round(compile_seconds, 1),
        "flops": flops,
        "matmul_fraction": round(flops / seconds / matmul_rate(devices), 3),
        "devices": devices,
        "device": jax.devices()[0].device_kind,
    }


def synthesis_line(config: ConfigDict, devices: int, steps: int) -> dict:
    """One Adam step on one batch a device, with the config's teacher."""
    teacher, variables = networks.teacher(config)
    key, cfg = jax.random.key(config.seed), config.synthesis
    shape = (cfg.batch, *config.teacher.image)
    calls = parallel.steps_per_call(config.steps_per_call)
    start = parallel.pmap(lambda b: synthesize.init(b, key, shape, config.teacher.classes, cfg.lr), devices)
    step = parallel.pmap_steps(lambda s, v: synthesize.step(s, v, teacher, key, cfg), devices, calls)
    constants = (parallel.replicate(variables, devices),)
    line = measure("synthesize", step, start(jnp.arange(devices)), constants, devices * cfg.batch, devices, calls, steps)
    return line | {"batch": cfg.batch}


def finetune_line(config: ConfigDict, devices: int, steps: int) -> dict:
    """One step of fine-tuning on random images, augmentation and promotion included."""
    teacher, variables = networks.teacher(config)
    student = networks.student(config)
    images = jax.random.normal(jax.random.key(config.seed), (max(256, config.finetune.batch), *config.teacher.image))
    labels = jnp.zeros(len(images), jnp.int32)
    ranges = jax.jit(lambda v, x: calibrate.step(student, v, {}, x))(variables, images[: config.calibration.batch])
    calls = parallel.steps_per_call(config.steps_per_call)
    step = finetune.make_step(teacher, student, devices, config.finetune)
    state = parallel.replicate(finetune.init(variables["params"], config.finetune), devices)
    frozen = finetune.freeze(variables, ranges, images, labels, config)
    batch = config.finetune.batch
    run, constants = parallel.pmap_steps(step, devices, calls), (parallel.replicate(frozen, devices),)
    return measure("finetune", run, state, constants, batch, devices, calls, steps)


def main(_: list[str]) -> None:
    """Print a line for each part."""
    with cli.user_errors():
        config = CONFIG.value
        config_lib.validate(config)
        devices = parallel.setup(config.devices, config.finetune.batch)
        jax.config.update("jax_enable_compilation_cache", False)  # compile times are part of what is measured
        for part, line in {"synthesize": synthesis_line, "finetune": finetune_line}.items():
            if PART.value in ("all", part):
                print(json.dumps(line(config, devices, STEPS.value)), flush=True)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    cli.run(main)
