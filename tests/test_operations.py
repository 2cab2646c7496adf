"""What the profiler says of a program's operations."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny

from hast_jax import benchmark, operations
from hast_jax.runs import parallel

# Two kernels that overlap on two streams, one after a gap, and lines that hold no kernels.
GPU_TRACE = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "gemm_fusion.3" } }
  event_metadata { key: 2 value { id: 2 name: "conv_kernel" } }
  event_metadata { key: 3 value { id: 3 name: "a whole step" } }
  lines { name: "Stream #13(Compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 2000000000 }
    events { metadata_id: 1 offset_ps: 6000000000 duration_ps: 2000000000 } }
  lines { name: "Stream #14(MemcpyD2D)" events { metadata_id: 2 offset_ps: 1000000000 duration_ps: 3000000000 } }
  lines { name: "XLA Modules" events { metadata_id: 3 offset_ps: 0 duration_ps: 9000000000 } }
}
planes {
  name: "/host:CPU"
  event_metadata { key: 1 value { id: 1 name: "dispatch" } }
  lines { name: "python" events { metadata_id: 1 offset_ps: 0 duration_ps: 20000000000 } }
}
"""


def test_the_operations_of_a_program_are_timed_on_this_machine() -> None:
    program = jax.jit(lambda x: jnp.sort(x @ x, axis=-1))
    x = jnp.ones((256, 256))
    jax.block_until_ready(program(x))
    found = operations.of(lambda: program(x), steps=1)
    assert 0 < found["busy_ms"] <= found["span_ms"]
    assert any("sort" in each["name"] and each["calls"] >= 1 for each in found["longest"])


def test_only_kernels_of_a_gpu_count_and_those_that_overlap_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoTrace:
        def __init__(self, folder: str, **options: object):
            Path(folder, "t.xplane.pb").write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(GPU_TRACE))

        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(jax.profiler, "trace", NoTrace)
    found = operations.of(lambda: jnp.zeros(()), steps=2)
    assert (found["span_ms"], found["busy_ms"]) == (4.0, 3.0)
    assert found["longest"] == [
        {"name": "gemm_fusion", "ms": 2.0, "calls": 1.0},
        {"name": "conv_kernel", "ms": 1.5, "calls": 0.5},
    ]


@pytest.mark.parametrize("options", benchmark.COMPILER_OPTIONS["gpu"].values(), ids=benchmark.COMPILER_OPTIONS["gpu"])
def test_the_compiler_knows_the_options_that_the_benchmark_tries(options: dict) -> None:
    step = parallel.pmap_steps(lambda x: (x + 1, x), 1)
    assert step.lower(jnp.ones(1)).compile(options)(jnp.ones(1))[0] == 2


def test_on_a_gpu_each_arithmetic_and_each_option_of_the_compiler_is_measured() -> None:
    arithmetic = [("float32", ""), ("tensorfloat32", ""), ("bfloat16", "")]
    options = [("tensorfloat32", name) for name in benchmark.COMPILER_OPTIONS["gpu"]]
    assert benchmark.variants("gpu", tiny.config()) == arithmetic + options
    assert benchmark.variants("tpu", tiny.config()) == arithmetic
    assert benchmark.variants(None, tiny.config(teacher__arithmetic="bfloat16")) == [("bfloat16", "")]


@pytest.mark.parametrize(
    ("devices", "images", "asked", "stack", "made"),
    [(1, 64, 3, 2, 2), (1, 160, 3, 3, 5), (4, 192, 3, 2, 8), (4, 192, 1, 1, 8), (4, 416, 2, 2, 16)],
)
def test_the_benchmark_makes_as_many_batches_at_once_as_a_run_with_its_config(
    devices: int, images: int, asked: int, stack: int, made: int
) -> None:
    config = tiny.config(synthesis__images=images, synthesis__batch=32, synthesis__iterations=20, synthesis__stack=asked)
    part = benchmark.synthesis(config, devices)
    assert (part.stack, part.images, part.total) == (stack, 32 * stack * devices, 20 * 32 * made)
