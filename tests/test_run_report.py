"""The report of a run tells the truth about the run, whoever made it, and can be read on any screen."""

import ast
import dataclasses
import html
import json
import re
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from students import student

import hast_jax
from hast_jax import from_config, networks
from hast_jax.deliver import console, measure, report
from hast_jax.deliver.measure import Cost, Sensitivity
from hast_jax.errors import Notice
from hast_jax.fields import GIVEN
from hast_jax.networks import rules
from hast_jax.runs import run_folder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# --- What is measured ---


def test_multiplications_and_bit_operations_are_those_counted_by_hand() -> None:
    module = networks.module("resnet20", 100)
    network = networks.create(module, (32, 32, 3), rules=((".*", (3, 3)),))
    variables = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    found = {each.name: each for each in measure.costs(network, variables, (32, 32, 3))}
    first, second = 32 * 32 * 3 * 3 * 3 * 16, 32 * 32 * 9 * 16 * 16
    assert found["init_block/conv"] == Cost("init_block/conv", 3 * 3 * 3 * 16, first, 3, 32, first * 3 * 32)
    assert found["stage1_unit1/conv1/conv"] == Cost("stage1_unit1/conv1/conv", 9 * 16 * 16, second, 3, 3, second * 3 * 3)
    assert found["stage2_unit1/identity_conv/conv"].products == 16 * 16 * 16 * 32
    assert found["output"] == Cost("output", 6400, 6400, 3, 32, 6400 * 3 * 32)  # its input, an average, is not quantized
    assert sum(each.products for each in found.values()) == 40_818_944


def test_a_layer_that_is_called_again_counts_again_and_a_depthwise_one_counts_its_groups() -> None:
    shared = student("shared")
    once, twice = (measure.costs(shared.network, shared.variables, shared.image)[i] for i in (0, 1))
    height, width, channels = shared.image
    assert once.products == height * width * 9 * channels * 6 and twice.products == 2 * height * width * 9 * 6 * 6

    class Thrice(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv, norm = nn.Conv(3, (3, 3)), nn.BatchNorm(use_running_average=True)
            return nn.Dense(10)(conv(conv(conv(x) + norm(x))).mean((1, 2)))

    network = networks.create(Thrice(), (8, 8, 3), rules=rules.normalise("w4a4"))
    variables = jax.eval_shape(Thrice().init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    thrice = measure.costs(network, variables, (8, 8, 3))[0]
    each = 8 * 8 * 9 * 3 * 3  # the first of three calls reads the image, which is not quantized
    assert (thrice.products, thrice.activations, thrice.bit_operations) == (3 * each, 32, each * 4 * (32 + 4 + 4))
    mobile = student("mobilenetv2")
    depthwise = next(each for each in measure.costs(mobile.network, mobile.variables, mobile.image) if "depthwise" in each.name)
    assert depthwise.parameters == 9 * 8 and depthwise.products % depthwise.parameters == 0


def test_a_part_of_eight_bits_costs_nothing_and_one_of_two_bits_costs_most() -> None:
    its = student("vgg", {"default": (8, 8), "Conv_1": (2, 8)})
    teacher = networks.create(its.network.module, its.image)
    images = np.asarray(jax.random.normal(jax.random.key(1), (32, *its.image)))
    variables = {name: tree for name, tree in its.variables.items() if name != "ranges"}
    found = measure.sensitivities(teacher, variables, its.network, its.variables, images)
    (worst, *others) = found
    assert (worst.name, worst.kind, worst.bits) == ("Conv_1", "weights", 2)
    assert all(0 <= each.alone < worst.alone / 10 for each in others)
    assert worst.without < min(each.without for each in others) / 2  # without it, all is well
    assert len(found) == len(its.network.kernels) + len({site.name for site in its.network.sites.values()})


def test_weights_that_learning_moved_onto_their_grid_have_no_values_in_full_precision(learned_run: Path) -> None:
    its = hast_jax.load(learned_run / "student")
    teacher, variables = from_config.teacher(tiny.config())
    images = np.load(learned_run / "synthetic" / "images.npy")[:16]
    found = measure.sensitivities(teacher, variables, its.network, its.variables, images)
    assert {each.kind for each in found if each.without is None} == {"weights"}
    assert all(each.without is not None for each in found if each.kind == "activations")


def test_suggested_bits_are_those_of_the_layer_and_not_of_one_whose_path_ends_alike() -> None:
    its = student("remat", "w4a4")
    suggested = {"block1/Conv_0": 3, "Conv_0": 5}
    line = report._suggestion(its, suggested, {"bits": {"weights": 4, "activations": 4}, "network": "own.py:Net"})
    patterns = {"default": "w4a4"} | dict(each.split("=") for each in re.search('"(.*)"', line)[1].split("; "))
    for layer in its.network.kernels:
        wanted = suggested.get("/".join(layer.path), 4)
        assert rules.bits_of(rules.normalise(patterns), layer.path)[0] == wanted


def test_histograms_count_every_value_and_say_how_much_of_a_grid_is_used() -> None:
    its = student("vgg", "w3a3")
    images = np.asarray(jax.random.normal(jax.random.key(1), (8, *its.image)))
    found = measure.histograms(its.network, its.variables, images)
    kernel = its.variables["params"]["Conv_0"]["kernel"]
    weights = found["Conv_0", "weights"]
    assert weights.counts.sum() == kernel.size and (weights.lowest, weights.highest) == (0, 7)
    for bits in range(2, 9):
        edges = measure._histogram(np.zeros(1), 0, 2**bits - 1, 1.0).edges
        middles = (edges[1:] + edges[:-1]) / 2
        assert all(np.abs(middles - integer).min() < 1e-9 for integer in range(2**bits)) and len(middles) < 300
    codes = its.codes()["Conv_0/kernel"].integers.reshape(-1, kernel.shape[-1])
    assert weights.used == pytest.approx(np.mean([len(np.unique(each)) for each in codes.T]) / 8)
    _, taps = networks.apply(its.network, its.variables, images)
    values = np.asarray(taps.activations["Conv_1", "input"])
    activations = found["Conv_1/input", "activations"]
    assert activations.counts.sum() == values.size and activations.used == len(np.unique(values)) / 8


layers = st.lists(st.tuples(st.integers(1, 10_000), st.floats(1e-6, 10)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(layers, st.floats(2, 8))
def test_suggested_bits_fit_the_average_and_no_layer_could_have_one_more(sizes, average: float) -> None:
    costs = [Cost(str(i), size, 1, 3, 3, 9) for i, (size, _) in enumerate(sizes)]
    found = [Sensitivity(str(i), "weights", 3, loss, 0.0) for i, (_, loss) in enumerate(sizes)]
    bits = measure.suggested_bits(found, costs, average)
    total = sum(size for size, _ in sizes)
    spent = sum(costs[int(name)].parameters * each for name, each in bits.items())
    assert spent <= average * total + 1e-6 and all(2 <= each <= 8 for each in bits.values())
    assert all(each == 8 or spent + costs[int(name)].parameters > average * total for name, each in bits.items())


def test_of_two_layers_of_one_size_the_sensitive_one_gets_more_bits() -> None:
    costs = [Cost(name, 100, 1, 4, 4, 16) for name in "ab"]
    found = [Sensitivity("a", "weights", 4, 0.16, 0), Sensitivity("b", "weights", 4, 0.01, 0)]
    assert measure.suggested_bits(found, costs, 4) == {"a": 5, "b": 3}


def test_the_interval_of_an_accuracy_is_wilsons() -> None:
    low, high = report.interval(60.0, 100)
    assert (low, high) == (pytest.approx(50.20, abs=0.01), pytest.approx(69.06, abs=0.01))
    assert report.interval(100.0, 719) == (pytest.approx(99.47, abs=0.01), pytest.approx(100.0))


# --- The pages ---


class Page(HTMLParser):
    """What a page would load from elsewhere, and whether each element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        loads = [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data", "srcset")]
        self.loads += [value for value in loads if not value.startswith("data:image/png;base64,")]
        assert tag != "script" and not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_run_ends_with_a_report_and_a_card_that_need_nothing_else(learned_run: Path) -> None:
    text, card = (learned_run / "report.html").read_text(), (learned_run / "README.md").read_text()
    page = Page(text)
    assert not page.loads and not page.open and "url(" not in text and "@import" not in text
    words = " ".join(" ".join(page.words).split())
    result = json.loads((learned_run / "result.json").read_text())
    for each in (
        f"{result['last']:.2f} %",
        f"{result['teacher']:.2f}",
        "719 real images",
        "resnet8 for digits, quantized to W3A3",
    ):
        assert each in words, each
    for each in (f"{result['last']:.2f}", f"{result['teacher']:.2f}", "| seed | 0 |", "W3A3"):
        assert each in card, each
    assert (
        words.count("weights:") == 10 and "init_block/conv" in words and "of the images that the network learned from" in words
    )
    assert text.count("<svg") >= 13 and "base64," in text


@pytest.mark.parametrize(
    ("words", "told"),
    [(report._large(4608), "4,608"), (report._large(4.1e7), "41.00 million"), (report._large(2.5e9), "2.50 billion")]
    + [(report._bytes(40), "40 bytes"), (report._bytes(1_121_000), "1.12 MB"), (report._bytes(26_500), "26.5 kB")],
)
def test_small_and_large_numbers_can_be_read(words: str, told: str) -> None:
    assert words == told


def test_images_of_noise_are_called_noise(learned_run: Path) -> None:
    noise = hast_jax.load(learned_run / "student").record | {"iterations": 0}
    assert "noise" in report._images_words(noise) and "batch norms" not in report._images_words(noise)
    assert "noise" in report._summary(noise, "W3A3") and "synthesized" not in report._summary(noise, "W3A3")


def test_the_tiles_show_a_gain_as_a_gain_and_prefer_images_that_the_student_has_not_seen(learned_run: Path) -> None:
    folder, its = run_folder.open_for_reading(learned_run)[0], hast_jax.load(learned_run / "student")
    costs = measure.costs(its.network, its.variables, its.image)
    better = its.record | {"last": its.record["teacher"] + 0.14}
    assert ("0.14", "points gained") in [tile[:2] for tile in report._tiles(folder, better, costs, report._sizes(its), 100.0)]
    unseen = its.record | {"teacher": None, "held_out": {"agreement": 88.3, "images": 1024, "kl": 0.1}}
    value, label, note = report._tiles(folder, unseen, costs, report._sizes(its), 100.0)[0]
    assert (value, label) == ("88.3 %", "agree with the teacher") and "1,024 synthetic images that it was not trained" in note


@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_the_sizes_in_the_report_are_those_of_files(learned_run: Path, weights: str, tmp_path: Path) -> None:
    its = hast_jax.load(learned_run / "student")
    sizes = report._sizes(its)
    found = hast_jax.export(its, tmp_path / "student.safetensors", "safetensors", weights=weights)
    after = sizes.packed if weights == "packed" else sizes.bytewise
    assert (sizes.full, after) == (found.float_bytes, found.path.stat().st_size)


def test_a_long_list_of_rules_stands_in_one_place_and_is_whole(learned_run: Path) -> None:
    rules = "; ".join(f"^stage{i}_unit1/conv1=w{2 + i % 6}a4" for i in range(20))
    record = hast_jax.load(learned_run / "student").record
    record = record | {"bits": record["bits"] | {"rules": rules}}
    record["config"] = record["config"] | {"bits": record["bits"]}
    assert console.short_bits(record["bits"]) == "W3A3, some layers otherwise"
    rows = {name: value for name, value, _ in report._made(record)}
    assert rows["bits of some layers"] == rules and f"bits.rules={rules!r}" in "".join(rows.values())


def test_what_the_report_suggests_can_be_run(learned_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(learned_run, tmp_path / "run"))
    assert report_command(run, "--average_bits=5").returncode == 0
    rules = html.unescape(re.search(r"--config.bits.rules=(.*)</pre>", (run / "report.html").read_text())[1]).strip('"')
    folder, config = run_folder.open_for_reading(run)
    config.bits.rules = rules
    network = from_config.student(config)
    costs = measure.costs(network, hast_jax.load(run / "student").variables, tuple(config.teacher.image))
    sizes = [each.parameters for each in costs]
    assert 4.5 < np.average([each.weights for each in costs], weights=sizes) <= 5
    assert str(folder) == str(run)


def test_what_the_report_suggests_keeps_the_rules_of_the_run() -> None:
    """Layers in full precision, and the bits of activations."""
    bits = {"default": "w3a3", "Conv_0": "w8a8", "Conv_2": "full", "Conv_3": "w3"}
    its = student("vgg", bits)
    record = {"network": "own.py:Net", "bits": {"weights": 3, "activations": 3, "rules": "given"}}
    suggested = {layer.path[0]: 3 for layer in its.network.kernels} | {"Conv_1": 5}
    line = report._suggestion(its, suggested, record)
    found = {"default": "w3a3"} | rules.parse_rules(re.search('"(.*)"', line)[1])
    wanted = networks.create(its.network.module, its.image, rules=rules.normalise(bits | {"Conv_0": "w3a8", "Conv_1": "w5a3"}))
    again = networks.create(its.network.module, its.image, rules=rules.normalise(found))
    assert again.kernels == wanted.kernels and again.sites == wanted.sites
    plain = student("vgg", "w3a3")
    assert report._suggestion(plain, {"Conv_1": 3}, record) == '--config.bits.rules=""'


def test_of_a_call_in_python_the_report_suggests_an_argument_for_python() -> None:
    its = student("vgg", "w4a4")
    record = {"network": f"VGG {GIVEN}", "bits": {"weights": 4, "activations": 4}}
    words = report._suggestion(its, {"Conv_0": 8, "Conv_1": 3, "Conv_2": 4}, record)
    bits = rules.normalise(ast.literal_eval(words.removeprefix("bits=")))
    assert [rules.bits_of(bits, (name,)) for name in ("Conv_0", "Conv_1", "Conv_2")] == [(8, None), (3, 4), (4, 4)]
    assert report._suggestion(its, {"Conv_2": 4}, record) == ""


def report_command(workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
    return tiny.call([*tiny.module("report"), f"--workdir={workdir}", *arguments])


def test_without_real_images_the_report_tells_of_agreement_instead_of_accuracy(tmp_path: Path) -> None:
    tiny.run(tmp_path / "run", report=True, eval__dataset="none", **tiny.LEARNED)
    words = (tmp_path / "run" / "report.html").read_text()
    assert "agree with the teacher" in words and "top-1" not in words


def test_names_of_a_stranger_are_text_in_the_report(learned_run: Path, tmp_path: Path) -> None:
    _, config = run_folder.open_for_reading(learned_run)
    its = hast_jax.load(learned_run / "student")
    evil = "<script>alert(1)</script>|x"
    record = json.loads(json.dumps(its.record).replace('"resnet8"', json.dumps(evil)))
    record["hardware"] = evil
    record["config"]["teacher"]["weights"] = evil
    its = dataclasses.replace(its, record=record)
    copy = run_folder.RunFolder(Path(shutil.copytree(learned_run, tmp_path / "run")))
    images = np.load(learned_run / "synthetic" / "images.npy")
    report.write(copy, its, from_config.teacher(config), images)
    Page(copy.report.read_text())  # no script
    assert "&lt;script&gt;" in copy.report.read_text()


@pytest.mark.slow
def test_a_report_that_fails_leaves_the_run_finished(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(report, "write", lambda *_: 1 / 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tiny.run(tmp_path / "run", report=True)
    assert (tmp_path / "run" / "result.json").exists() and not (tmp_path / "run" / "report.html").exists()
    words = [str(each.message) for each in told if issubclass(each.category, Notice)]
    assert any("the report was not written (ZeroDivisionError" in each and "hast_jax.report" in each for each in words)


def test_the_command_names_what_a_run_lacks(learned_run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((learned_run / "config.json").read_text())
    ended = report_command(tmp_path)
    assert ended.returncode == 1 and "has not finished" in ended.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_nothing_is_cut_off_and_the_colours_can_be_read(
    learned_run: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    text = (learned_run / "report.html").read_text().replace("<details>", "<details open>")
    script = """<script>addEventListener('load', () => {
        const page = document.querySelector('iframe').contentDocument, view = page.documentElement;
        const shown = (query, wrong) => [...page.querySelectorAll(query)].filter(wrong).map(e => e.outerHTML.slice(0, 80));
        const wide = shown('body *', e => e.getBoundingClientRect().right > view.clientWidth + 1);
        const cut = shown('td, th, p, pre, figcaption, .tile', e => e.scrollWidth > e.clientWidth + 1);
        const style = page.defaultView.getComputedStyle(page.body), scroll = view.scrollWidth - view.clientWidth;
        document.title = JSON.stringify({wide, cut, scroll, ink: style.color, page: style.backgroundColor});
    })</script>"""
    wrapper = tmp_path / "page.html"
    frame = f'<iframe srcdoc="{html.escape(text)}" style="width: {width}px; height: 900px; border: 0"></iframe>'
    wrapper.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}{script}")
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--dump-dom"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/user", "--window-size=1400,1000"]
    command = [CHROMIUM, *flags, *dark, "--enable-logging=stderr", f"file://{wrapper}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in ended.stderr, ended.stderr
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", ended.stdout)[1]))
    assert not found["wide"] and not found["cut"] and found["scroll"] <= 0, found

    def brightness(colour):
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert abs(brightness(found["ink"]) - brightness(found["page"])) > 450
    assert (brightness(found["page"]) > 600) == (scheme == "light")
