"""The only room that knows devices: how many there are, what is replicated, what runs on each.

Steps are `pmap`ped over the axis `AXIS`. An argument that belongs to one device carries a leading axis of that length;
the replicated state does too.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from hast_jax.errors import UserError

AXIS = "devices"
MAX_DEFAULT_CPU_DEVICES = 8
KEEP_BARRIERS = "--xla_disable_hlo_passes=cse_barrier_expander"
COMPILATION_CACHE = "~/.cache/hast_jax"
CPU_STEPS_PER_CALL, ACCELERATOR_STEPS_PER_CALL = 1, 50
CPU_MICRO_BATCH = 32


def setup(devices: int, batch: int | None = None) -> int:
    """Make the local devices ready and return how many are used; call it before any other JAX computation.

    devices: 0 for the default, which is all local accelerators, or on a CPU as many devices as cores (up to 8) that
    divide `batch`, where one is given. Raises UserError where `devices` are not there or do not divide `batch`.
    """
    cores = os.cpu_count() or 1
    most = min(cores, MAX_DEFAULT_CPU_DEVICES)
    on_cpu = devices or max(d for d in range(1, most + 1) if batch is None or batch % d == 0)
    # A CPU device that waits for the others in a collective blocks a thread of the pool that all devices share; with one
    # thread a core, XLA's default, the others' convolutions can then wait for a thread for ever.
    os.environ.setdefault("PJRT_NPROC", str(cores + on_cpu))
    # This pass would remove the optimization barriers of models/conv.py; only the CPU's compiler has it.
    flags = os.environ.get("XLA_FLAGS", "")
    if KEEP_BARRIERS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {KEEP_BARRIERS}"
    with contextlib.suppress(RuntimeError):  # the backend is up already, in a test: its devices are used
        jax.config.update("jax_num_cpu_devices", on_cpu)
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(os.environ.get("HAST_JAX_CACHE", COMPILATION_CACHE)))
    found = jax.local_device_count()
    used = devices or (min(on_cpu, found) if jax.default_backend() == "cpu" else found)
    if used > found:
        raise UserError(f"config.devices is {devices}, but there are {found} local devices: lower it.")
    if batch is not None and batch % used:
        raise UserError(f"config.finetune.batch {batch} is not divisible by the {used} devices: change one of them.")
    return used


def devices(count: int) -> list[jax.Device]:
    """The first `count` local devices."""
    return jax.local_devices()[:count]


def shard(tree: Any, count: int) -> Any:
    """A tree whose leaves have a leading axis of `count`, each of the first `count` devices holding its row."""
    mesh = jax.sharding.Mesh(devices(count), (AXIS,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS)))


def replicate(tree: Any, count: int) -> Any:
    """A copy of `tree` on each of the first `count` devices: each leaf gains a leading axis of that length."""
    return shard(jax.tree.map(lambda x: np.broadcast_to(np.asarray(x)[None], (count, *np.shape(x))), tree), count)


def unreplicate(tree: Any) -> Any:
    """The first device's copy of a replicated tree, without the leading axis."""
    return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)


def steps_per_call(requested: int) -> int:
    """How many steps run in one call: `requested`, or by default 1 on a CPU and 50 on an accelerator.

    A loop inside XLA hides the host's latency on an accelerator; on a CPU, XLA runs convolutions inside a loop body on
    one thread (jax issue 12868).
    """
    on_cpu = jax.default_backend() == "cpu"
    return requested or (CPU_STEPS_PER_CALL if on_cpu else ACCELERATOR_STEPS_PER_CALL)


def micro_batch(requested: int, batch: int) -> int:
    """How many images of a batch pass the network together: `requested`, or by default all, but at most 32 on a CPU.

    A CPU's cache then holds what one layer leaves to the next. See docs/performance.md.
    """
    most = CPU_MICRO_BATCH if jax.default_backend() == "cpu" else batch
    return requested or max(d for d in range(1, min(most, batch) + 1) if batch % d == 0)


def pmap_steps(step: Callable[..., tuple[Any, Any]], count: int, steps: int = 1) -> Any:
    """`step(state, *constants) -> (state, metrics)` run `steps` times on each of `count` devices in one call.

    All arguments carry the devices' axis; the state is donated. Returns the new state and the last step's metrics.
    """

    def run(state: Any, *constants: Any) -> tuple[Any, Any]:
        if steps == 1:
            return step(state, *constants)
        state, metrics = lax.scan(lambda s, _: step(s, *constants), state, length=steps)
        return state, jax.tree.map(lambda m: m[-1], metrics)

    return jax.pmap(run, axis_name=AXIS, devices=devices(count), donate_argnums=0)


def pmap(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`function` on each of `count` devices; all arguments and results carry the devices' axis."""
    return jax.pmap(function, axis_name=AXIS, devices=devices(count))


def mean(tree: Any) -> Any:
    """The mean over all devices of a tree of floating point arrays, inside a pmapped step.

    One collective for the whole tree: several that are independent of each other can block all threads of a small CPU
    while their partners on another device wait for one, a deadlock.
    """
    flat, unravel = ravel_pytree(tree)
    return unravel(lax.pmean(flat, AXIS))


def own_share(batch: jax.Array, count: int) -> jax.Array:
    """This device's rows of a batch that all devices know, inside a step pmapped over `count` devices."""
    rows = batch.shape[0] // count
    return lax.dynamic_slice_in_dim(batch, lax.axis_index(AXIS) * rows, rows)


def split(batch: Any, count: int) -> Any:
    """Reshape [batch, ...] into [count, batch / count, ...] for a pmapped function."""
    return jax.tree.map(lambda x: jnp.reshape(x, (count, -1, *x.shape[1:])), batch)
