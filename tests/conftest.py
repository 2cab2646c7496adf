"""Strict JAX for every test: 4 CPU devices, no silent promotion of ranks; and the folder of golden values."""

import functools
import gc
import os
import re
import shutil
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"  # whatever else the machine has
os.environ.setdefault("PJRT_NPROC", "8")  # as parallel.setup does: more threads than devices
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # many tests and commands share small programs

from pathlib import Path

import hypothesis
import jax
import pytest
import tiny
from filelock import FileLock
from golden_data import Golden, files

from hast_jax.runs import parallel

# With the same flags, and as many devices, tests and the commands that they start share compiled programs.
os.environ.setdefault("XLA_FLAGS", f"{tiny.QUICK_COMPILATION} {parallel.KEEP_BARRIERS}")
os.environ["JAX_NUM_CPU_DEVICES"] = "4"  # for the commands

jax.config.update("jax_num_cpu_devices", 4)
os.environ.setdefault("HAST_JAX_CACHE", str(Path(__file__).parent.parent / ".pytest_cache" / "compiled"))
jax.config.update("jax_compilation_cache_dir", os.environ["HAST_JAX_CACHE"])
jax.config.update("jax_numpy_rank_promotion", "raise")
for name in list(os.environ):  # of the user's, these would change what commands print, or how many processes a run has
    if name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "HAST_JAX_DEBUG") or name.startswith(("SLURM_", "OMPI_")):
        del os.environ[name]
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
gc.set_threshold(100_000, 20, 20)  # traces make many objects, among which there is little to collect
assert jax.local_device_count() == 4  # up now, so that no test's parallel.setup can change their number

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", default=str(GOLDEN), help="Folder of golden values; file names may begin with heldout_.")
    parser.addoption("--tfds", default="", help="Folder of prepared TFDS data sets; by default TFDS's own.")


def _once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills for all workers: the first one that needs the folder makes it."""
    folder = factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, made by the command."""

    def make(workdir: Path) -> None:
        done = tiny.call_anew(tiny.command(workdir))
        assert done.returncode == 0, done.stderr
        assert "full precision (teacher)" in done.stdout and "quantized, no fine-tuning" in done.stdout
        assert f"python -m hast_jax.export --workdir={workdir} --format=onnx" in done.stdout
        workdir.with_suffix(".stdout").write_text(done.stdout)

    return _once(tmp_path_factory, "finished", make)


@pytest.fixture(scope="session")
def learned_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run with learned ranges and a report, made by the command."""

    def make(workdir: Path) -> None:
        done = tiny.call_anew(tiny.learned_command(workdir))
        assert done.returncode == 0, done.stderr

    return _once(tmp_path_factory, "learned", make)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def unfinished(copy: Path) -> Path:
    """A copy that was killed after all stages, just before its result was written: a finished run reads nothing but that."""
    (copy / "result.json").unlink()
    return copy


@pytest.fixture(scope="module")
def little_optimization():
    """XLA compiles in half the time, into slower programs: for tests that run many programs once each."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64():
    """Double precision within one test."""
    with jax.enable_x64(True):
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a `golden` argument runs once for each file of its module's `KIND` in the folder."""
    if "golden" in metafunc.fixturenames:
        paths = files(metafunc.config.getoption("--golden"), metafunc.module.KIND)
        metafunc.parametrize("golden", paths, indirect=True, ids=lambda path: path.stem)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With --golden given, a file of which no check applied is a failure: all of its tests would have been skipped."""
    folder, reporter = session.config.getoption("--golden"), session.config.pluginmanager.get_plugin("terminalreporter")
    if folder == str(GOLDEN) or reporter is None or session.config.option.collectonly:
        return
    passed = [report.nodeid for report in reporter.stats.get("passed", [])]
    for path in Path(folder).glob("*.npz"):
        if not any(re.search(rf"[\[-]{re.escape(path.stem)}[\]-]", name) for name in passed):
            reporter.write_line(f"no check applied to {path}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """One file of golden values."""
    return _read(request.param)


@functools.cache
def _read(path: Path) -> Golden:
    return Golden(path)
