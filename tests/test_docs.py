"""Every link of the pages leads somewhere, every number of the README's table is that of the full results, commands exist."""

import importlib
import importlib.metadata
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny
import yaml

import hast_jax
from hast_jax import cli, results
from hast_jax.paper import tables

PAGES = sorted([*tiny.ROOT.glob("*.md"), *(tiny.ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(tiny.ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for match in LINK.finditer(page.read_text()):
        target = match[1] or match[2]
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name) if name else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


def rows(text: str, width: int) -> list[list[str]]:
    cells = ([cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| ")
    return [row for row in cells if len(row) == width and not row[0].startswith(("data", "network"))]


def test_the_readmes_results_are_those_of_the_full_table() -> None:
    full = (tiny.ROOT / "docs" / "results.md").read_text()
    known = {(row[0], row[1], row[3], row[5], row[6]) for row in rows(full, 12)}
    shown = rows((tiny.ROOT / "README.md").read_text(), 7)
    assert len(shown) >= 8
    for data, bits, _, teacher, student, drop, _ in shown:
        assert (f"resnet20, {data.lower().replace('-', '')}", bits, teacher, student, drop) in known, (data, bits, student)
        assert float(teacher) - float(student) == pytest.approx(float(drop), abs=0.006)


def test_the_results_that_are_kept_as_files_are_rows_of_the_full_table() -> None:
    def numbers(row: list[str]) -> list[str]:  # without the settings and the images' origin, which are written by hand
        return [*row[:2], *row[3:9], *row[10:]]

    shown = [numbers(row) for row in rows((tiny.ROOT / "docs" / "results.md").read_text(), 12)]
    kept = sorted((tiny.ROOT / "docs" / "results").iterdir())
    assert len(kept) >= 13
    for folder in kept:
        (row,) = rows(results.row("", results.result_of(folder)), 12)
        assert numbers(row) in shown, folder.name


def test_the_recipes_table_of_seeds_is_that_of_the_full_table() -> None:
    full = rows((tiny.ROOT / "docs" / "results.md").read_text(), 12)
    best = {(r[0], r[1], r[8]): r[5] for r in full if r[2] == f"`{r[1].lower()},best,small`"}
    shown = rows((tiny.ROOT / "docs" / "recipe.md").read_text(), 8)
    assert len(shown) == 6
    for data, bits, *seeds, mean, drop, _ in shown:
        network = f"resnet20, {data.lower().replace('-', '')}"
        values = [best[network, bits, str(seed)] for seed in range(3) if (network, bits, str(seed)) in best]
        assert [seed for seed in seeds if seed] == values
        assert not mean or float(mean) == pytest.approx(statistics.mean(map(float, values)), abs=0.006)
        teacher = 67.62 if data == "CIFAR-100" else 90.09
        assert float(drop) == pytest.approx(teacher - float(mean or values[0]), abs=0.006)


@pytest.mark.parametrize("page, folder", [("reproduction.md", "digits"), ("recipe/reproduction.md", "recipe")])
def test_the_tables_of_the_experiments_are_those_of_their_files(page: str, folder: str) -> None:
    text = (tiny.ROOT / "docs" / page).read_text()
    known = [path for name in ("table?", "figure1", "baselines") for path in (tiny.ROOT / "docs" / folder).glob(f"{name}.json")]
    assert len(known) >= 5
    for path in known:
        assert tables.markdown(json.loads(path.read_text())["rows"]) in text, path.name


def test_the_recipes_table_of_resolutions_is_that_of_its_file() -> None:
    folder = tiny.ROOT / "docs"
    shown = [row[1:] for row in rows((folder / "trials.md").read_text(), 6) if row[1] in ("200", "400")]
    known = json.loads((folder / "recipe" / "resolutions.json").read_text())["rows"]
    form = [
        [f"{r['iterations']}", f"{r['top1']:.2f}", f"{r['agreement']:.1f}", f"{r['kl']:.3f}", f"{r['held_out_kl']:.3f}"]
        for r in known
    ]
    assert shown == form


def test_the_recipes_table_of_two_bits_is_that_of_its_file() -> None:
    folder = tiny.ROOT / "docs"
    known = json.loads((folder / "recipe" / "two_bits.json").read_text())["rows"]
    shown = rows((folder / "trials.md").read_text(), 4)
    for r in known:
        assert [r["name"], f"{r['top1']:.2f}", f"{r['agreement']:.1f}", f"{r['kl']:.3f}"] in shown


def test_the_recipes_table_of_gamma_and_eps_is_that_of_its_file() -> None:
    folder = tiny.ROOT / "docs"
    shown = rows((folder / "trials.md").read_text(), 6)
    columns = {"train_agree": 1, "train_kl": 3, "held_kl": 3, "test": 2}  # name in the file -> digits behind the point
    for name, seeds in json.loads((folder / "recipe" / "sensitivity.json").read_text())["rows"].items():
        values = {column: [seed[column] for seed in seeds] for column in columns}
        cells = [
            f"{statistics.mean(values[column]):.{digits}f} ± {statistics.stdev(values[column]):.{digits}f}"
            for column, digits in columns.items()
        ]
        label = name if " = " in name else name.replace("=", " = ")
        assert [label, str(len(seeds)), *cells] in shown
    full_length = rows((folder / "trials.md").read_text(), 4)
    for name, row in json.loads((folder / "recipe" / "sensitivity.json").read_text())["full_length"]["rows"].items():
        cifar = [f"{row['cifar100']['agreement']:.1f}", f"{row['cifar100']['kl']:.3f}"] if "cifar100" in row else ["", ""]
        assert [name, *cifar, f"{statistics.mean(row['digits_kl']):.4f}"] in full_length


def test_the_tables_of_single_changes_are_those_of_their_files() -> None:
    text = (tiny.ROOT / "docs" / "trials.md").read_text()
    files = tiny.ROOT / "docs" / "recipe"
    assert tables.markdown(json.loads((files / "parts.json").read_text())["rows"]) in text
    shown = rows(text, 4)
    for name, row in json.loads((files / "full_length.json").read_text())["rows"].items():
        assert [name, f"{row['agreement']:.1f}", f"{row['kl']:.3f}", f"{row['top1']:.2f}"] in shown, name


def test_every_command_that_a_page_names_exists() -> None:
    known = {f"hast_jax.{module}" for module in cli.COMMANDS.values()} | {"hast_jax.fields"}
    named = {name for page in PAGES for name in re.findall(r"python -m (hast_jax\.\w+)", page.read_text())}
    assert named <= known, named - known


def test_the_calls_in_the_table_of_the_library_take_the_arguments_that_it_names() -> None:
    page = (tiny.ROOT / "docs" / "api.md").read_text()
    calls = re.findall(r"`(\w+)\((.*?)\)`", page.partition("|---|---|")[2].partition(":::")[0])
    found = 0
    for name, arguments in calls:
        if name not in hast_jax.__all__:
            continue
        function = getattr(importlib.import_module(hast_jax._PLACES[name]), name)  # hast_jax.evaluate is a command's module too
        known = inspect.signature(function).parameters
        assert set(re.findall(r"(\w+)=", arguments)) <= known.keys(), name
        found += 1
    assert found >= 9


def test_every_message_that_the_page_explains_exists() -> None:
    page = (tiny.ROOT / "docs" / "troubleshooting.md").read_text().partition("## Errors")[2]
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    messages = [message for cell in cells for message in re.findall("`([^`]+)`", cell)]
    code = "".join(path.read_text() for path in (tiny.ROOT / "hast_jax").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"|\{[^{}]*\}', "", code)  # a message may go on in the next line, and hold values
    parts = [part.strip() for message in messages for part in re.split(r"\.\.\.|^synthesis|^finetune", message) if part.strip()]
    assert len(messages) > 15 and not [part for part in parts if part not in code]


def test_the_version_is_the_same_in_the_package_the_citation_and_the_changes() -> None:
    citation = yaml.safe_load((tiny.ROOT / "CITATION.cff").read_text())
    changes = (tiny.ROOT / "CHANGELOG.md").read_text()
    assert citation["version"] == hast_jax.__version__ == re.search(r"^## (\d+\.\d+\.\d+)", changes, re.M)[1]
    assert importlib.metadata.metadata("hast_jax")["Name"] == "hast_jax" and citation["license"] == "MIT"


def test_the_oldest_dependencies_that_are_tested_are_the_oldest_that_are_allowed() -> None:
    pins = dict(line.split("==") for line in (tiny.ROOT / "tests" / "oldest.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["project"]
    allowed = [*project["dependencies"], *project["optional-dependencies"]["onnx"]]
    bounds = dict(each.split(">=") for each in allowed if ">=" in each)
    for name, bound in bounds.items():
        assert pins[name] == bound or pins[name].startswith(f"{bound}."), name


def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("mkdocs_jupyter")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=tiny.ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = [path for path in (tiny.ROOT / "docs").rglob("*") if path.suffix in (".md", ".ipynb")]
    for page in pages:
        assert (tmp_path / "site" / page.relative_to(tiny.ROOT / "docs").with_suffix(".html")).exists(), page
    reference = (tmp_path / "site" / "api.html").read_text()
    assert all(f">{name}<" in reference for name in ("quantize", "synthesize", "Student", "UserError")), (
        "the library's reference"
    )


def test_the_readme_is_short() -> None:
    assert len((tiny.ROOT / "README.md").read_text().split()) < 850
