"""Devices: how many there are, what is replicated, and what runs on each of them.

Steps are `pmap`ped over the axis `AXIS`. Each argument, the replicated state included, has a leading axis with one row for each
device that this process uses. A step runs on the devices of this process, or on those of all processes together. `mean`
averages the gradients of the devices that take a step.
"""

import contextlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree

from hast_jax.errors import Notice, UserError

AXIS = "devices"
MAX_DEFAULT_CPU_DEVICES = 8
THREADS = "PJRT_NPROC"  # the environment variable with the size of the CPU's pool of threads
KEEP_BARRIERS = "--xla_disable_hlo_passes=cse_barrier_expander"
COMPILATION_CACHE = "~/.cache/hast_jax"
CPU_STEPS_PER_CALL, ACCELERATOR_STEPS_PER_CALL = 1, 50
CPU_MICRO_BATCH = 32
MAPPINGS, MOST_MAPPINGS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")  # of this process; allowed by Linux


def setup(devices: int, batch: int | None = None) -> int:
    """Prepare this process for JAX and return how many devices it uses. A command calls this before any JAX computation.

    It changes environment variables and JAX's settings, so the library never calls it. Arguments and errors: see `choose`.
    """
    # A CPU device that waits for the others in a collective blocks a thread of the pool that all devices share. With one
    # thread for each core, XLA's default, the convolutions of the others can then wait for a thread for ever.
    on_cpu = devices or _cpu_devices(batch)
    os.environ.setdefault(THREADS, str(_cores() + on_cpu))
    # This pass would remove the optimization barriers of networks/conv.py; only the CPU's compiler has it.
    flags = os.environ.get("XLA_FLAGS", "")
    if KEEP_BARRIERS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {KEEP_BARRIERS}"
    asked_for = int(os.environ.get("JAX_NUM_CPU_DEVICES", 0))  # JAX's own variable: more devices than the run uses may exist
    with contextlib.suppress(RuntimeError):  # in a test the backend already runs: its devices are used
        jax.config.update("jax_num_cpu_devices", max(on_cpu, asked_for))
    cache = Path(os.environ.get("HAST_JAX_CACHE") or COMPILATION_CACHE).expanduser().absolute()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    used = choose(devices, batch)
    if jax.process_count() > 1:
        # The first time that processes wait for each other, they may be 30 seconds apart on a CPU, later for longer.
        multihost_utils.sync_global_devices("setup")
    return used


def choose(devices: int, batch: int | None = None) -> int:
    """How many local devices this process uses.

    devices: the number for each process; 0: the default. The default is all local accelerators. On a CPU it is one device for
    each core, at most 8; without `setup` it is one device. The default is reduced until it divides `batch`, if that is given.

    Raises UserError if JAX finds no device, if a process has fewer devices, or if the devices of all processes together do not
    divide `batch`. Every process raises it if the processes have different numbers of local devices.
    """
    found = _local_devices()
    counts = [len(jax.local_devices(process)) for process in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise UserError(f"the processes of this run have {counts} devices: give all the same command and number of devices.")
    used = devices or found
    if not devices and jax.default_backend() == "cpu":
        # Without more threads than cores, several CPU devices could wait for each other for ever: see `setup`.
        used = _cpu_devices(batch, found, jax.process_count()) if THREADS in os.environ else 1
    elif not devices and batch is not None:
        used = _most_that_share(batch, found, jax.process_count())
        if used < found:
            words = f"{used} of {found} devices are used, because more would not share config.finetune.batch {batch} evenly."
            warnings.warn(words, Notice, stacklevel=2)
    if used > found:
        raise UserError(f"{devices} devices were asked for, but there are {found} local devices: ask for fewer.")
    if batch is not None and batch % device_total(used):
        raise UserError(
            f"config.finetune.batch {batch} is not divisible by the {device_total(used)} devices: change this batch or "
            "config.devices."
        )
    return used


def _local_devices() -> int:
    try:
        return jax.local_device_count()
    except jax.errors.JaxRuntimeError:  # of processes that do not find each other
        raise
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        which = f"of JAX_PLATFORMS={asked}: unset this variable, or install" if asked else "that it can use: install"
        words = str(error).split("\n")[0] or "no device answers"
        raise UserError(f"JAX finds no device {which} the JAX of this device, such as jax[cuda] ({words}).") from error


def make_room_for_programs() -> None:
    """Let JAX forget its compiled programs if they take half of the memory mappings that Linux allows a process.

    JAX keeps each pmapped program for ever. On a CPU, XLA needs thousands of mappings for the programs of one run. Without
    this, a process that quantizes about twenty times would end in a segmentation fault. Other functions of the process that
    JAX had compiled are compiled again when they are called.
    """
    if not MAPPINGS.exists() or not MOST_MAPPINGS.exists():
        return  # not Linux
    with MAPPINGS.open("rb") as lines:
        used = sum(1 for _ in lines)
    if used > int(MOST_MAPPINGS.read_text()) // 2:
        jax.clear_caches()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_devices(batch: int | None, found: int = MAX_DEFAULT_CPU_DEVICES, processes: int = 1) -> int:
    """As many CPU devices for each process as share `batch` evenly; one if no number does."""
    return _most_that_share(batch, min(_cores(), MAX_DEFAULT_CPU_DEVICES, found), processes)


def _most_that_share(batch: int | None, most: int, processes: int) -> int:
    return max((d for d in range(1, most + 1) if batch is None or batch % (d * processes) == 0), default=1)


def devices(count: int, all_processes: bool = False) -> list[jax.Device]:
    """The first `count` local devices; or with `all_processes` those of every process, in the order of the processes."""
    if not all_processes:
        return jax.local_devices()[:count]
    return [d for process in range(jax.process_count()) for d in jax.local_devices(process)[:count]]


def shard(tree: Any, count: int) -> Any:
    """Put a tree whose leaves have a leading axis of length `count` on the first `count` local devices, one row on each."""
    mesh = jax.sharding.Mesh(devices(count), (AXIS,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS)))


def replicate(tree: Any, count: int) -> Any:
    """A copy of `tree` on each of the first `count` local devices: each leaf gains a leading axis of that length."""
    return shard(jax.tree.map(lambda x: np.broadcast_to(np.asarray(x)[None], (count, *np.shape(x))), tree), count)


def unreplicate(tree: Any) -> Any:
    """The first device's copy of a replicated tree, without the leading axis."""
    return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)


def steps_per_call(requested: int) -> int:
    """How many steps run in one call: `requested`, or by default 1 on a CPU and 50 on an accelerator.

    On an accelerator, a loop inside XLA hides the host's latency. On a CPU, XLA runs the convolutions of a loop body on one
    thread (jax issue 12868).
    """
    on_cpu = jax.default_backend() == "cpu"
    return requested or (CPU_STEPS_PER_CALL if on_cpu else ACCELERATOR_STEPS_PER_CALL)


def micro_batch(requested: int, batch: int) -> int:
    """How many images of a batch pass through the network together: `requested`, or by default all; on a CPU about 32.

    A CPU's cache can hold a layer's output for about 32 images (docs/performance.md). The default is the divisor of `batch`
    whose ratio to 32 is nearest to one. Each part adds a network to the program, so a batch of 67, a prime, stays one part.
    """
    if requested or jax.default_backend() != "cpu":
        return requested or batch
    divisors = (d for d in range(1, batch + 1) if batch % d == 0)
    return min(divisors, key=lambda d: max(d / CPU_MICRO_BATCH, CPU_MICRO_BATCH / d))


def pmap_steps(step: Callable[..., tuple[Any, Any]], count: int, steps: int = 1, all_processes: bool = False) -> Any:
    """A function that runs `step(state, *constants) -> (state, metrics)` `steps` times on each of `count` local devices.

    Its arguments have the leading axis of devices; the state is donated. It returns the new state and the last step's metrics.
    all_processes: each step runs on the devices of all processes together, and every process must call the function.
    """

    def run(state: Any, *constants: Any) -> tuple[Any, Any]:
        if steps == 1:
            return step(state, *constants)
        state, metrics = lax.scan(lambda s, _: step(s, *constants), state, length=steps)
        return state, jax.tree.map(lambda m: m[-1], metrics)

    return jax.pmap(_promoting(run), axis_name=AXIS, devices=devices(count, all_processes), donate_argnums=0)


def pmap(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`function` on each of `count` local devices. All arguments and results have the leading axis of devices."""
    return jax.pmap(_promoting(function), axis_name=AXIS, devices=devices(count))


def _promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with JAX's usual promotion of types, which Optax needs, even if the user has chosen the strict one."""

    def promoting(*arguments: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments)

    return promoting


def mean(tree: Any) -> Any:
    """The mean over all devices of a tree of floating point arrays, inside a pmapped step.

    The whole tree takes one collective. Several independent collectives can deadlock on a small CPU: they block all threads,
    while their partners on another device wait for a thread.
    """
    flat, unravel = ravel_pytree(tree)
    return unravel(lax.pmean(flat, AXIS))


def device_share(batch: jax.Array) -> jax.Array:
    """This device's rows of a batch that every device has, inside a pmapped step."""
    rows = batch.shape[0] // lax.axis_size(AXIS)
    return lax.dynamic_slice_in_dim(batch, lax.axis_index(AXIS) * rows, rows)


def device_total(count: int) -> int:
    """How many devices all processes use together. count: of each process."""
    return count * jax.process_count()


def distribute(items: list[Any], count: int) -> tuple[int, list[Any]]:
    """How many of `count` devices each process needs for its part of `items`, and the part of this process.

    Each device gets the same number of items. If they cannot be divided evenly, the first item is repeated.
    """
    each = -(-len(items) // jax.process_count())
    used = min(count, each)
    part = used * -(-each // used)
    full = items + items[:1] * (part * jax.process_count() - len(items))
    return used, full[jax.process_index() * part :][:part]


def stack(requested: int, size: int) -> int:
    """How many independent computations of `size` bytes a device does at once: `requested`, or a default if it is zero.

    The default fills half of the smallest device memory among the processes; on a CPU it is one. Every process must call this.
    """
    memory = _device_memory()
    default = np.asarray(max(1, memory // 2 // size), np.int32)
    if jax.process_count() > 1:
        default = multihost_utils.process_allgather(default).min()
    return requested or int(default)


def warn_of_memory(size: int) -> None:
    """Give a notice if a step of synthesis, which may need `size` bytes, may need more than a device has."""
    limit = _device_memory() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    if size > limit:
        words = (
            f"a step of synthesis may need {size / 2**30:.1f} GiB of memory, and {limit / 2**30:.1f} GiB exist for a device: "
            "if the memory is too small, set synthesis.remat=True with a small synthesis.micro_batch, or lower "
            "synthesis.batch."
        )
        warnings.warn(words, Notice, stacklevel=2)


def _device_memory() -> int:
    """The bytes of a device's own memory; 0 if it has none, as a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def process_rows(batch: np.ndarray, count: int) -> np.ndarray:
    """The shares of this process's `count` devices in a host batch [..., batch], as [count, ..., batch / all devices]."""
    shares = np.split(batch, jax.process_count() * count, -1)
    return np.stack(shares[jax.process_index() * count :][:count])


def split(batch: Any, count: int) -> Any:
    """Reshape [batch, ...] into [count, batch / count, ...] for a pmapped function."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
