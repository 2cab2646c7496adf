"""The golden checks cannot pass by finding nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
from golden_data import Golden, files

KINDS = ("quantizer", r"resnet20_\w+_teacher", "synthesis", "finetune", "resnet18_imagenet")


@pytest.mark.golden
def test_the_folder_holds_golden_values(request: pytest.FixtureRequest) -> None:
    folder = request.config.getoption("--golden")
    found = [path for kind in KINDS for path in files(folder, kind)]
    assert found, f"no golden file in {folder}"
    assert all(isinstance(Golden(path), Golden) for path in found)


def test_an_empty_folder_is_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "golden", f"--golden={tmp_path}", "tests/test_golden_folder.py"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "no golden file" in done.stdout


def test_a_file_may_begin_with_heldout(tmp_path: Path) -> None:
    (tmp_path / "heldout_resnet20_cifar10_teacher.npz").touch()
    assert len(files(str(tmp_path), KINDS[1])) == 1 and files(str(tmp_path), "quantizer") == []
