"""One device and four give the same synthetic images and the same fine-tuning trajectory."""

import functools
import itertools
import subprocess
import sys
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hast_jax import from_config, networks, pipeline
from hast_jax.errors import Notice, UserError
from hast_jax.given import Setting
from hast_jax.runs import parallel
from hast_jax.runs.progress import silent
from hast_jax.stages import finetune, synthesize


def test_the_synthetic_images_are_the_same_on_one_and_on_four_devices(tmp_path) -> None:
    images = {}
    for devices in (1, 4):
        workdir = tmp_path / str(devices)
        config = tiny.config(devices=devices, synthesis__iterations=10, synthesis__scales=4)
        folder = pipeline.run_synthesis(config, workdir)
        images[devices] = np.load(folder / "images.npy")
    # Adam at a rate of 0.5 enlarges the last digit of a gradient near zero: single pixels may part.
    assert np.mean(np.abs(images[1] - images[4]) > 1e-3) <= 1e-3


@pytest.mark.parametrize(("devices", "stack"), [(1, 3), (2, 2)])
def test_stacked_batches_are_those_made_one_after_the_other(tmp_path, devices: int, stack: int) -> None:
    """Five batches, which no stack divides."""
    images = {}
    for name, changes in {"alone": {"devices": 1, "stack": 1}, "stacked": {"devices": devices, "stack": stack}}.items():
        config = tiny.config(devices=changes["devices"], synthesis__stack=changes["stack"], synthesis__images=160)
        config.synthesis.iterations = 10
        folder = pipeline.run_synthesis(config, tmp_path / name)
        images[name] = np.load(folder / "images.npy")
    assert np.mean(np.abs(images["alone"] - images["stacked"]) > 1e-3) <= 1e-3


def test_a_platform_that_is_not_there_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail():
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "local_device_count", fail)
    with pytest.raises(UserError, match=r"JAX finds no device of JAX_PLATFORMS=cuda: unset this variable, or install the JAX"):
        parallel.choose(0)


def test_a_device_is_dealt_as_many_batches_as_the_others() -> None:
    assert parallel.distribute([3, 4, 5, 6, 7], 2) == (2, [3, 4, 5, 6, 7, 3])
    assert parallel.distribute([3], 4) == (1, [3]) and parallel.distribute([3, 4], 4) == (2, [3, 4])
    assert parallel.stack(0, 10**9) == 1 and parallel.stack(7, 10**9) == 7


@functools.cache
def trajectory(devices: int, steps: int, **changes) -> list[dict[str, float]]:
    """Metrics of the first steps on random images."""
    config = tiny.config(**changes)
    teacher, variables = from_config.teacher(config)
    student = from_config.student(config)
    images, labels = jax.random.normal(jax.random.key(1), (64, 8, 8, 1)), jnp.arange(64) % 10
    ranges = jax.jit(functools.partial(networks.observe, student))(variables, {}, images)
    fixed = parallel.replicate(finetune.fixed_inputs(variables, ranges, images, labels, config), devices)
    state = parallel.replicate(finetune.init(variables["params"], ranges, config.finetune), devices)
    step = finetune.make_step(teacher, student, config.finetune)
    run = parallel.pmap_steps(step, devices)
    found = []
    for _ in range(steps):
        state, metrics = run(state, fixed)
        found.append({name: float(np.mean(value)) for name, value in metrics.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_the_fine_tuning_trajectory_is_the_same_on_several_devices(devices: int) -> None:
    for one, several in zip(trajectory(1, 4), trajectory(devices, 4)):
        for name, value in one.items():
            np.testing.assert_allclose(several[name], value, rtol=1e-2, err_msg=name)


@pytest.mark.slow
def test_learned_ranges_and_adam_are_the_same_on_several_devices() -> None:
    learned = {"finetune__ranges": "learned", "finetune__optimizer": "adam", "finetune__lr": 1e-4}
    for one, several in zip(trajectory(1, 4, **learned), trajectory(4, 4, **learned)):
        for name, value in one.items():
            np.testing.assert_allclose(several[name], value, rtol=2e-2, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["kl", "fa"])
def test_the_other_directions_promote_other_images(direction: str) -> None:
    both, other = trajectory(1, 1)[0], trajectory(1, 1, finetune__direction=direction)[0]
    np.testing.assert_allclose(other["kl"], both["kl"], rtol=1e-5)
    assert abs(other["kl_promoted"] / both["kl_promoted"] - 1) > 1e-4


def test_without_promotion_there_are_no_promoted_losses() -> None:
    metrics = trajectory(1, 1, finetune__b=0.0)[0]
    assert "kl_promoted" not in metrics
    np.testing.assert_allclose(metrics["loss"], metrics["kl"] + metrics["fa"], rtol=1e-5)


def test_several_steps_in_one_call_are_the_same_steps() -> None:
    def step(state, add):
        return (state + add, {"sum": state + add})

    state, add = parallel.replicate(jnp.zeros(()), 2), parallel.replicate(jnp.ones(()), 2)
    one = parallel.pmap_steps(step, 2)
    many = parallel.pmap_steps(step, 2, steps=3)
    expected = state
    for _ in range(3):
        expected, _ = one(jnp.copy(expected), add)
    final, metrics = many(state, add)
    np.testing.assert_array_equal(final, expected)
    np.testing.assert_array_equal(metrics["sum"], expected)


def test_a_batch_in_parts_has_the_objective_and_gradient_of_the_whole() -> None:
    config = tiny.config()
    teacher, variables = from_config.teacher(config)
    images, labels = jax.random.normal(jax.random.key(1), (24, 8, 8, 1)), jnp.arange(24) % 10

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def look(images: jax.Array, micro_batch: int, remat: bool):
        cfg = tiny.config(synthesis__micro_batch=micro_batch, synthesis__remat=remat).synthesis
        return jax.value_and_grad(synthesize.objective, has_aux=True)(images, labels, teacher, variables, cfg)

    (whole, terms), gradient = look(images, 24, False)
    for micro_batch, remat in ((12, False), (8, False), (24, True), (8, True)):
        (loss, same_terms), same_gradient = look(images, micro_batch, remat)
        np.testing.assert_allclose(loss, whole, rtol=1e-5)
        for name, value in terms.items():
            np.testing.assert_allclose(same_terms[name], value, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(same_gradient, gradient, atol=1e-4 * float(jnp.abs(gradient).max()))


def test_computing_again_needs_the_memory_of_one_part() -> None:
    teacher, variables = from_config.teacher(tiny.config())
    images, labels = jnp.zeros((256, 8, 8, 1)), jnp.zeros(256, jnp.int32)

    def memory(micro_batch: int, remat: bool) -> int:
        cfg = tiny.config(synthesis__micro_batch=micro_batch, synthesis__remat=remat).synthesis
        gradient = jax.jit(jax.grad(lambda x: synthesize.objective(x, labels, teacher, variables, cfg)[0]))
        return gradient.lower(images).compile().memory_analysis().temp_size_in_bytes

    assert memory(16, True) < memory(256, False) / 4


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_streamed_images_are_those_of_the_set_on_the_device(devices: int, steps: int, tmp_path) -> None:
    """The batches of twelve steps, six of them after a resume."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).normal(size=(40, 8, 8, 1)).astype(np.float32))
    images, labels = np.load(tmp_path / "images.npy", mmap_mode="r"), np.arange(40, dtype=np.int32)

    def batches(stream: bool) -> list[jax.Array]:
        cfg = tiny.config(finetune__stream=stream).finetune
        fixed = finetune.FixedInputs({}, {}, images, labels, jnp.uint32(7), ())

        def step(state: jax.Array, fixed: finetune.FixedInputs):
            return state + 1, finetune.draw(fixed, state, cfg)

        found, run = [], parallel.pmap_steps(step, devices, steps)
        for start, stop in ((0, 6), (6, 12)):
            state = parallel.replicate(jnp.int32(start), devices)
            for inputs in itertools.islice(finetune.inputs(fixed, range(start, stop, steps), devices, cfg), 6 // steps):
                state, drawn = run(state, *inputs)
                found += drawn
        return found

    for ours, expected in zip(batches(True), batches(False), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_on_a_cpu_few_images_pass_the_network_together() -> None:
    assert parallel.micro_batch(0, 256) == 32 and parallel.micro_batch(0, 100) == 25 and parallel.micro_batch(64, 256) == 64


def test_an_accelerator_takes_as_many_batches_as_fill_half_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 80 * 2**30})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert parallel.stack(0, 3 * 2**30) == 13 and parallel.stack(0, 60 * 2**30) == 1 and parallel.stack(4, 3 * 2**30) == 4
    with pytest.warns(Notice, match=r"a step of synthesis may need 81\.0 GiB of memory, and 80\.0 GiB exist for a device"):
        parallel.warn_of_memory(81 * 2**30)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        parallel.warn_of_memory(80 * 2**30)


def test_of_accelerators_as_many_are_used_by_default_as_share_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert parallel.choose(0, 64) == 4 and parallel.choose(0) == 4
    with pytest.warns(Notice, match="3 of 4 devices are used, because more would not share config.finetune.batch 6 evenly"):
        assert parallel.choose(0, 6) == 3
    with pytest.raises(UserError, match="6 is not divisible by the 4 devices"):
        parallel.choose(4, 6)


def test_a_command_has_a_thread_for_each_core_and_device_and_may_leave_cpu_devices_unused() -> None:
    code = (
        "import os, jax; from hast_jax.runs import parallel;"
        "print(parallel.setup(2), jax.local_device_count(), int(os.environ['PJRT_NPROC']) - len(os.sched_getaffinity(0)))"
    )
    environment = tiny.environment() | {"JAX_NUM_CPU_DEVICES": "3"}
    del environment["PJRT_NPROC"]
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "3", "2"], done.stderr


def test_devices_that_are_not_there_are_refused() -> None:
    from hast_jax.errors import UserError

    with pytest.raises(UserError, match="there are 4 local devices"):
        parallel.setup(64, 64)
    with pytest.raises(UserError, match="not divisible by the 3 devices"):
        parallel.setup(3, 64)


@pytest.mark.parametrize(("cores", "batch", "devices"), [(1, 64, 1), (3, 6, 3), (3, 64, 2), (8, 64, 4), (16, 7, 1), (16, 6, 3)])
def test_by_default_the_devices_divide_the_batch(cores: int, batch: int, devices: int, monkeypatch) -> None:
    """The tests have four devices, however many cores there are."""
    monkeypatch.setattr(parallel, "_cores", lambda: cores)
    assert parallel.setup(0, batch) == devices


def test_a_call_in_python_uses_one_device_of_a_cpu(monkeypatch) -> None:
    monkeypatch.delenv("PJRT_NPROC")  # which commands set, because several devices need more threads
    assert parallel.choose(0, 64) == 1


@pytest.mark.parametrize(("batch", "parts"), [(256, 8), (64, 2), (32, 1), (67, 1), (97, 1), (48, 2), (254, 2), (1, 1)])
def test_a_cpu_sees_a_batch_in_parts_of_some_32_images_whatever_its_size(batch: int, parts: int) -> None:
    assert batch // parallel.micro_batch(0, batch) == parts
    assert parallel.micro_batch(1, batch) == 1


MANY_PROGRAMS = """
import gc, sys
from pathlib import Path
import jax, jax.numpy as jnp
from hast_jax.given import Setting
from hast_jax.runs import parallel
from hast_jax.runs.progress import silent

def mappings():
    gc.collect()
    return len(parallel.MAPPINGS.read_text().splitlines())

for number in range(10):
    step = parallel.pmap_steps(lambda x: (jnp.sort(jnp.sin(x * number)) @ x[:, None], x), 1)
    step(jnp.ones((1, 8)))
full = mappings()
parallel.make_room_for_programs()
kept = mappings()
parallel.MOST_MAPPINGS = Path(sys.argv[1])
parallel.MOST_MAPPINGS.write_text(str(2 * full - 20))
parallel.make_room_for_programs()
print(full, kept, mappings())
"""


@pytest.mark.skipif(not parallel.MOST_MAPPINGS.exists(), reason="only Linux counts the memory mappings of a process")
def test_compiled_programs_are_forgotten_before_a_process_has_too_many_memory_mappings(tmp_path) -> None:
    command = [sys.executable, "-c", MANY_PROGRAMS, str(tmp_path / "most")]
    full, kept, left = map(int, subprocess.run(command, env=tiny.environment(), capture_output=True, check=True).stdout.split())
    assert abs(kept - full) < 20 and left < full - 50


def test_each_run_makes_room_for_its_programs(copy, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parallel, "MOST_MAPPINGS", tmp_path / "most")
    (tmp_path / "most").write_text("100")
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(True))
    pipeline.run(tiny.config(), copy)
    assert cleared == [True]
    teacher, variables = from_config.teacher(tiny.config())
    Setting(teacher.module, variables, (8, 8, 1), 0.3, 0.4, "w3a3", 0, None, {}, None).job(silent)
    assert cleared == [True, True]
