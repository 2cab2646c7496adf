"""Time one synthesis step and one fine-tuning step on this machine, or only compile them.

    python -m hast_jax.benchmark --config=configs/cifar100.py
    python -m hast_jax.benchmark --config=configs/imagenet.py --compile_only
    python -m hast_jax.benchmark --config=configs/cifar100.py --device=gpu --steps=5 --operations
    python -m hast_jax.benchmark --config=configs/cifar100.py --processes=HOST:PORT,NUMBER,INDEX    # in each process

Prints one JSON line for each part. Weights and images are random. A line gives:

- the batches that a device makes at once, as in a run with this config;
- images per second, without compile time, and the seconds that all steps of the config would take at this rate;
- FLOPs of the step, by XLA's cost analysis. They include the zero taps of networks/conv.py. A loop body, as with
  `synthesis.remat`, counts once;
- memory in GiB of one device, by XLA's memory analysis: arguments, and the largest sum of intermediate arrays;
- the step's FLOP/s as a fraction of that of matrix products, which is measured on the same devices in the same arithmetic.

With --device it prints a Markdown table of both steps instead, with the products of teacher and student in each arithmetic. On
a GPU it also tries the compiler options in `COMPILER_OPTIONS`. With --operations it also prints the operations that take the
most time. Several processes take each step together, and process 0 prints.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from hast_jax import cli, from_config, operations
from hast_jax import config as config_lib
from hast_jax.deliver.console import markdown_row
from hast_jax.errors import UserError
from hast_jax.networks.conv import ARITHMETIC
from hast_jax.runs import parallel, processes
from hast_jax.stages import calibrate, finetune, synthesize

CPU_MATMUL_SIZE, ACCELERATOR_MATMUL_SIZE = 1024, 8192  # on an accelerator, dispatch would dominate the smaller product

# By kind of device: compiler options to try, by their names in the table. By default, XLA launches each convolution on a GPU on
# its own, outside of CUDA graphs ("command buffers").
COMPILER_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "gpu": {
        "convolutions in command buffers": {
            "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONVOLUTION"
        },
        "fused convolutions": {"xla_gpu_experimental_enable_conv_fusion": True},
    }
}
OPTIONS_ARITHMETIC = "tensorfloat32"  # in which the compiler options are tried: kernels are short, so gaps between them show


def define_flags() -> None:
    """Define the flags of this command."""
    cli.define_config()
    flags.DEFINE_enum("part", "all", ["all", "synthesize", "finetune"], "The step to time.")
    flags.DEFINE_integer("steps", 10, "Timed calls of each part. A call takes config.steps_per_call steps.", lower_bound=1)
    flags.DEFINE_enum("device", None, ["cpu", "gpu", "tpu"], "Print a table for this kind of device.")
    flags.DEFINE_bool("operations", False, "Also print the operations of each step that take the most time.")
    flags.DEFINE_bool("compile_only", False, "Print the compiler's analysis of a step, without running the step.")
    cli.define_processes()


def time_calls(call: Callable[[], Any], calls: int) -> float:
    """Median seconds of a call, after one call that does not count."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def matmul_rate(devices: int, arithmetic: str) -> float:
    """FLOP/s of products of square matrices in this arithmetic, summed over `devices` local devices that compute at once."""
    size = CPU_MATMUL_SIZE if jax.default_backend() == "cpu" else ACCELERATOR_MATMUL_SIZE
    a = parallel.replicate(jnp.ones((size, size)), devices)
    with jax.default_matmul_precision(arithmetic):
        product = parallel.pmap(jnp.matmul, devices)
        return devices * 2 * size**3 / time_calls(lambda: product(a, a), 20)


class Part(NamedTuple):
    """A step to time. build() -> (state, constants) of one device.

    batch: images of one batch. stack: batches of a device in one step. images: those in one step of all devices of all
    processes. total: those in all steps of a run, batches that are repeated to fill the devices included.
    """

    step: Callable[..., Any]
    build: Callable[[], tuple[Any, Any]]
    batch: int
    stack: int
    images: int
    total: int


def synthesis(config: ConfigDict, devices: int) -> Part:
    """One Adam step, on as many batches on each device as a run stacks there (`synthesis.stack`)."""
    teacher = from_config.bare_teacher(config)
    key, settings = jax.random.key(config.seed), config.synthesis
    image, shape = jnp.zeros((1, *config.teacher.image)), (settings.batch, *config.teacher.image)
    size = synthesize.memory(teacher, jax.eval_shape(partial(teacher.module.init, **teacher.call), key, image), shape, settings)
    # A run stacks no more batches than it has, and repeats a batch where they do not fill all devices.
    used, batches = parallel.device_total(devices), math.ceil(settings.images / settings.batch)
    stack = min(parallel.stack(settings.stack, size), math.ceil(batches / used))
    made = used * math.ceil(batches / used)

    def build() -> tuple[synthesize.State, Any]:
        def start(batch):
            return synthesize.init(batch, key, shape, config.teacher.classes, settings)

        return jax.vmap(start)(jnp.arange(stack)), teacher.module.init(key, image, **teacher.call)

    step = synthesize.on_each(lambda state, variables: synthesize.step(state, variables, teacher, key, settings))
    images = used * stack * settings.batch
    return Part(step, build, settings.batch, stack, images, settings.iterations * made * settings.batch)


def fine_tuning(config: ConfigDict, devices: int) -> Part:
    """One step of fine-tuning, augmentation and promotion included."""
    teacher = from_config.bare_teacher(config)
    student = replace(from_config.student(config), arithmetic=config.student.arithmetic)
    key, settings, image = jax.random.key(config.seed), config.finetune, tuple(config.teacher.image)
    shape = (1, settings.batch // parallel.device_total(devices)) if settings.stream else (max(256, settings.batch),)

    def build() -> tuple[finetune.State, finetune.FixedInputs]:
        variables = teacher.module.init(key, jnp.zeros((1, *image)), **teacher.call)
        some = jax.random.normal(key, (config.calibration.batch, *image))
        ranges = calibrate.step(student, variables, {}, some)
        data = jax.random.normal(key, (*shape, *image)), jnp.zeros(shape, jnp.int32)
        return finetune.init(variables["params"], ranges, settings), finetune.fixed_inputs(variables, ranges, *data, config)

    total = settings.epochs * settings.steps_per_epoch * settings.batch
    return Part(finetune.make_step(teacher, student, settings), build, settings.batch, 1, settings.batch, total)


PARTS: dict[str, Callable[[ConfigDict, int], Part]] = {"synthesize": synthesis, "finetune": fine_tuning}


class Variant(NamedTuple):
    """How a step is compiled. arithmetic: of the products. options: a name in `COMPILER_OPTIONS`, or "" for the default."""

    arithmetic: str
    options: str = ""


def variants(device: str | None, config: ConfigDict) -> list[Variant]:
    """The variants to measure.

    Without a kind of device: the config's arithmetic. With a kind: each arithmetic and, in one process, each compiler option of
    the kind in `OPTIONS_ARITHMETIC`.
    """
    if not device:
        return [Variant(config.teacher.arithmetic)]
    options = COMPILER_OPTIONS.get(device, {}) if processes.count() == 1 else {}
    return [*map(Variant, ARITHMETIC), *(Variant(OPTIONS_ARITHMETIC, name) for name in options)]


def measure(
    part: Part, devices: int, steps_per_call: int, calls: int, arithmetic: str, options: Mapping[str, Any], trace: bool
) -> dict[str, Any]:
    """The JSON line of a part. calls: timed calls; 0: the step is only compiled. trace: include "operations"."""
    step = parallel.pmap_steps(part.step, devices, steps_per_call, all_processes=True)
    if calls:
        box, constants = parallel.replicate(jax.jit(part.build)(), devices)
        lowered = step.lower(box, constants)
    else:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((devices, *x.shape), x.dtype), jax.eval_shape(part.build))
        lowered = step.lower(*shapes)
    start = time.perf_counter()
    compiled = lowered.compile(dict(options))
    line: dict[str, Any] = {"batch": part.batch, "stack": part.stack, "compile_seconds": round(time.perf_counter() - start, 1)}
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    flops = devices * (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    def gib(size):
        return round(size / 2**30, 3)

    line["flops"] = flops * processes.count()
    line["arguments_gib"], line["intermediate_gib"] = gib(memory.argument_size_in_bytes), gib(memory.temp_size_in_bytes)
    if calls:
        # A compiled pmap does not take the arrays of one of several processes, so there the step is compiled once more.
        run = compiled if processes.count() == 1 else step

        def call() -> Any:
            nonlocal box
            box, metrics = run(box, constants)
            return metrics

        seconds = time_calls(call, calls) / steps_per_call
        line |= {
            "per_second": round(part.images / seconds, 1),
            "step_seconds": round(seconds, 4),
            "total_seconds": round(seconds * part.total / part.images, 1),
            "matmul_fraction": round(flops / seconds / matmul_rate(devices, arithmetic), 3),
        }
        if trace:
            line["operations"] = operations.of(call, steps_per_call)
    return line | {"devices": parallel.device_total(devices), "device": jax.devices()[0].device_kind}


COLUMNS = {
    "part": "step",
    "arithmetic": "products",
    "options": "compiler",
    "batch": "batch",
    "stack": "batches at once",
    "per_second": "images/s",
    "step_seconds": "s a step",
    "total_seconds": "all steps of the config, s",
    "flops": "FLOP a step",
    "matmul_fraction": "of the matrix-product rate",
    "intermediate_gib": "intermediate arrays, GiB",
    "compile_seconds": "compilation, s",
}


def head(devices: int) -> str:
    """The head of the table: the devices, the version of JAX, and the names of the columns."""
    of = f"{parallel.device_total(devices)} x {jax.devices()[0].device_kind}, JAX {jax.__version__}"
    return "\n".join([of, "", markdown_row(list(COLUMNS.values())), markdown_row(["---"] * len(COLUMNS))])


def cell(value: Any) -> str:
    """The text of a value in the table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def operations_table(line: dict[str, Any]) -> str:
    """The operations of a line's step as a table below a heading."""
    title = " ".join(filter(None, (line["part"], line["arithmetic"], line["options"])))
    traced = line["operations"]
    busy = f"The devices are busy for {traced['busy_ms']:.4g} of {traced['span_ms']:.4g} ms a step."
    rows = [[each["name"], cell(each["ms"]), cell(each["calls"])] for each in traced["longest"]]
    table = map(markdown_row, (["operation", "ms a step", "calls a step"], ["---"] * 3, *rows))
    return "\n".join(["", f"**{title}.** {busy}", "", *table])


def lines(device: str | None, config: ConfigDict, devices: int) -> Iterator[dict[str, Any]]:
    """Measure the steps that the flags name, one after the other. device: a kind of device, for a table."""
    given = flags.FLAGS
    steps_per_call = parallel.steps_per_call(config.steps_per_call)
    calls = 0 if given.compile_only else given.steps
    for variant in variants(device, config):
        if device:
            config.teacher.arithmetic = config.student.arithmetic = variant.arithmetic
        options = COMPILER_OPTIONS[device][variant.options] if device and variant.options else {}
        for name in PARTS if given.part == "all" else [given.part]:
            line: dict[str, Any] = {"part": name, "arithmetic": variant.arithmetic, "options": variant.options}
            try:
                part = PARTS[name](config, devices)
                line |= measure(part, devices, steps_per_call, calls, variant.arithmetic, options, given.operations)
            except jax.errors.JaxRuntimeError as error:  # if memory is too small for one row, the others are still measured
                if not device:
                    raise
                line["per_second"] = "failed: " + str(error).split("\n")[0]
            yield line


def main(_: list[str]) -> None:
    """Print each line as soon as it is measured."""
    with cli.user_errors():
        given = flags.FLAGS
        config = given.config
        config_lib.validate(config)
        if given.compile_only and given.operations:
            raise UserError("--compile_only runs nothing, so that no operation can be timed: leave out --operations.")
        if given.compile_only and given.processes:
            raise UserError(cli.ONE_PROCESS)
        cli.join()
        if given.device == "cpu":  # JAX takes an accelerator by itself, if there is one
            jax.config.update("jax_platforms", "cpu")
        devices = parallel.setup(config.devices, config.finetune.batch)
        if given.device not in (None, jax.default_backend()):
            raise UserError(f"there is no {given.device} here that JAX can use: it found only the {jax.default_backend()}.")
        jax.config.update("jax_enable_compilation_cache", False)  # because compile times are measured too
        show: Callable[[str], None] = partial(print, flush=True) if processes.is_main() else lambda _: None
        if not given.device:
            for line in lines(None, config, devices):
                show(json.dumps(line))
            return
        show(head(devices))
        measured = []
        for line in lines(given.device, config, devices):
            show(markdown_row([cell(line.get(column, "")) for column in COLUMNS]))
            measured.append(line)
        for line in measured:
            if "operations" in line:
                show(operations_table(line))


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
