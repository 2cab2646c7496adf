"""The golden checks cannot pass by finding nothing."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_data import files

KINDS = ("quantizer", r"resnet20_\w+_teacher", "synthesis", "finetune", "resnet18_imagenet")


@pytest.mark.golden
def test_the_folder_holds_golden_values(request: pytest.FixtureRequest) -> None:
    folder = request.config.getoption("--golden")
    found = [path for kind in KINDS for path in files(folder, kind)]
    assert found, f"no golden file in {folder}"


def checked(folder: Path, *tests: str) -> subprocess.CompletedProcess:
    """The golden checks of these files on a folder."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "golden", f"--golden={folder}", *tests]
    return subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)


def test_an_empty_folder_is_a_failure(tmp_path: Path) -> None:
    done = checked(tmp_path, "tests/test_golden_folder.py")
    assert done.returncode != 0 and "no golden file" in done.stdout


def test_a_file_to_which_no_check_applies_is_a_failure(tmp_path: Path) -> None:
    np.savez(tmp_path / "heldout_quantizer.npz", bits=np.asarray([3]), nothing=np.zeros(3))
    tests = "tests/test_golden_folder.py", "tests/test_golden_quantizer.py::test_ties_round_half_to_even_exactly"
    done = checked(tmp_path, *tests)
    assert done.returncode != 0 and "no check applied to" in done.stdout, done.stdout
    shutil.copy(Path(__file__).parent / "golden" / "quantizer.npz", tmp_path / "heldout_quantizer.npz")
    done = checked(tmp_path, *tests)
    assert done.returncode == 0, done.stdout


def test_a_file_may_begin_with_heldout(tmp_path: Path) -> None:
    (tmp_path / "heldout_resnet20_cifar10_teacher.npz").touch()
    assert len(files(str(tmp_path), KINDS[1])) == 1 and files(str(tmp_path), "quantizer") == []
