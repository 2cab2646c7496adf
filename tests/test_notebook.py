"""docs/quantize_your_network.ipynb runs from top to bottom."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

NOTEBOOK = tiny.ROOT / "docs" / "quantize_your_network.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
FOUND = """
import json
accuracies = [teacher.top1, student.record["teacher"], student.record["last"], mixed.record["last"]]
found = {"accuracies": accuracies, "right": int(right.sum()), "tests": right.size, "same": same, "error": float(error)}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_notebooks_cells_run_and_give_what_its_text_says(tmp_path: Path) -> None:
    code = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")
    environment = tiny.environment() | {"MPLBACKEND": "agg", "PYTHONPATH": str(tiny.ROOT)}
    (tmp_path / "cells.py").write_text(code + FOUND)
    done = subprocess.run(
        [sys.executable, "cells.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    teacher, same_teacher, student, mixed = found["accuracies"]
    assert teacher > 97 and same_teacher == pytest.approx(teacher)
    assert student > 90 and mixed > teacher - 3
    assert 100 * found["right"] / found["tests"] == pytest.approx(student, abs=0.2)
    assert found["same"] and found["error"] < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["cells.py"]


def test_the_notebook_holds_no_outputs() -> None:
    assert not any(cell.get("outputs") for cell in CELLS)
