"""An impossible config is refused in one sentence, before any work."""

import copy
import importlib.util
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from hast_jax import config as config_lib
from hast_jax import fields
from hast_jax.errors import UserError
from hast_jax.runs.files import write_json
from hast_jax.runs.run_folder import open_for_reading

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def get_config(path: Path, argument: str = ""):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("argument", ["", "w4a4", "w3a3,small", "w2a8", "w3a3,best", "w4a4,small,best"])
def test_every_config_and_variant_is_valid(path: Path, argument: str) -> None:
    config = get_config(path, argument)
    config_lib.validate(config)
    if argument:
        assert config.bits.weights == int(argument[1]) and config.bits.activations == int(argument[3])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("bits.weights", 0, "between 2 and 8"),
        ("bits.activations", 9, "between 2 and 8"),
        ("finetune.eps", -0.01, "zero or positive"),
        ("finetune.lr", 0.0, "positive"),
        ("finetune.straight_through", "clip", "did you mean clipped"),
        ("finetune.direction", "kl+fb", "did you mean kl"),
        ("finetune.alignment", "sfa", "one of rfa, dfa"),
        ("finetune.batch", 10_000, "at most synthesis.images"),
        ("finetune.crop_scale", 0.0, "above 0"),
        ("finetune.momentum", 1.0, "below 1"),
        ("synthesis.images", 100, "at most synthesis.images"),
        ("synthesis.images", 5000, "multiple of the batch"),
        ("synthesis.micro_batch", 48, "a divisor of the batch"),
        ("synthesis.gamma", -1.0, "zero or positive"),
        ("synthesis.crop_probability", 1.5, "between 0 and 1"),
        ("eval.dataset", "cifar11", "did you mean cifar1"),
        ("teacher.network", "resnet21", "did you mean resnet20"),
        ("teacher.image", (32, 16, 0), "(height, width, channels), all positive"),
        ("teacher.mean", (0.5,), "one number for each of the 3 channels"),
        ("teacher.std", (0.5, 0.0, 0.5), "positive for each channel"),
        ("calibration.range", "max", "one of minmax, mse"),
        ("teacher.image", (0, 0, 3), "(height, width, channels), all positive"),
        ("eval.crop", 1e-5, "between 0.1 and 1"),
        ("finetune.temperature", 1e-40, "0 or at least 1.2e-38"),
        ("devices", 2000, "between 0 and 1024"),
        ("finetune.lr_drops", (16, -1), "positive epochs"),
        ("finetune.lam", float("inf"), "finite"),
        ("pretrain.shift", -1, "zero or positive"),
        ("devices", -1, "between 0 and 1024"),
        ("seed", -1, "between 0 and"),
        ("synthesis.real_split", "test[:50%]", "of another split than eval.split"),
        ("synthesis.real_split", "train+test", "of another split than eval.split"),
        ("synthesis.real_split", "all", "of another split than eval.split"),
        ("seed", 2**32, "between 0 and 4294967295"),
        ("synthesis.images", 10**30, "at most 2147483647"),
        ("finetune.lr_drops", (16, 10**30), "positive epochs"),
        ("finetune.lr_drops", (2**31 - 1,), "epochs of at most"),
        ("finetune.epochs", 2**31 - 1, "the counter of steps has 32 bits"),
        ("finetune.lr", float("nan"), "finite"),
        ("finetune.lr", 1e300, "finite"),
        ("finetune.lr", 10**400, "finite"),
        ("teacher.mean", (0.5, float("nan"), 0.5), "finite"),
        ("teacher.std", (0.5, 0.5, float("inf")), "finite"),
        ("teacher.std", (), "one number for each of the 3 channels"),
        ("teacher.image", (10**30, 10**30, 3), "smaller"),
        ("teacher.image", (32, 32), "(height, width, channels), all positive"),
        ("pretrain.shift", 33, "at most the shorter side of an image"),
        ("pretrain.weight_decay", -1.0, "zero or positive"),
        ("eval.data_dir", "a\0b", "zero character"),
        ("bits.rules", "output", "PATTERN=BITS"),
        ("bits.rules", "output=w9a9", "between 2 and 8"),
        ("teacher.arguments", "num_classes=10", "a JSON object"),
        ("teacher.arguments", "[1]", "a JSON object"),
        ("teacher.arguments", '{"eps": 1e999}', "a JSON object"),
        ("teacher.call", '{"train": NaN}', "a JSON object"),
        ("teacher.call", "[" * 10**5, "a JSON object"),
        ("teacher.names", "names.py", "FILE.py:FUNCTION"),
        ("finetune.branches", "(", "a regular expression"),
    ],
)
def test_an_impossible_value_is_refused(field: str, value, words: str) -> None:
    config = config_lib.default()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as error:
        config_lib.validate(config)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_neither_loss_weighing_anything_is_refused() -> None:
    config = config_lib.default()
    config.finetune.a = config.finetune.b = 0.0
    with pytest.raises(UserError, match=r"nothing is learned"):
        config_lib.validate(config)


def test_an_unknown_variant_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"'tiny': choose from w4a4 .any bits., best, small"):
        config_lib.variant(config_lib.default(), "w4a4,tiny")


def test_the_order_of_variants_does_not_matter_and_best_has_a_small_budget_of_its_own() -> None:
    one, other = (config_lib.variant(config_lib.default(), text) for text in ("w4a4,best,small", "small,best,W4A4"))
    assert config_lib.to_dict(one) == config_lib.to_dict(other)
    paper = config_lib.variant(config_lib.default(), "w4a4,small")
    assert one.synthesis.images < paper.synthesis.images and one.finetune.optimizer == "adam"
    assert paper.finetune.optimizer == "sgd" and paper.finetune.ranges == "fixed"


@pytest.mark.parametrize(
    ("argument", "lr"), [("w2a4,best", 1e-3), ("best,small,w2a2", 1e-3), ("w3a2,best", 3e-4), ("w2a2", 1e-5)]
)
def test_best_trains_weights_of_two_bits_faster(argument: str, lr: float) -> None:
    assert config_lib.variant(config_lib.default(), argument).finetune.lr == lr


def test_two_numbers_of_bits_are_refused() -> None:
    with pytest.raises(UserError, match="not w3a3 and w4a4: choose one"):
        get_config(CONFIGS[0], "w3a3,w4a4")


def test_a_config_survives_json() -> None:
    config = config_lib.default()
    assert config_lib.from_dict(config_lib.to_dict(config)) == config


def test_the_difference_of_two_configs_names_each_field_but_those_that_change_no_result() -> None:
    old, new = config_lib.default(), config_lib.default()
    new.finetune.eps, new.devices, new.eval.data_dir = 0.5, 7, "elsewhere"
    assert config_lib.difference(config_lib.to_dict(old), config_lib.to_dict(new)) == ["finetune.eps: 0.02 -> 0.5"]


def test_json_of_the_same_meaning_is_no_difference() -> None:
    old, new = config_lib.default(), config_lib.default()
    old.teacher.arguments, new.teacher.arguments = '{"widths":[8,16]}', '{"widths": [8, 16]}'
    old.teacher.call, new.teacher.call = "", "{}"
    assert config_lib.difference(config_lib.to_dict(old), config_lib.to_dict(new)) == []
    new.teacher.arguments = '{"widths": [8, 17]}'
    assert len(config_lib.difference(config_lib.to_dict(old), config_lib.to_dict(new))) == 1


def test_fields_of_text_take_what_they_are_for() -> None:
    config = config_lib.default()
    config.bits.rules, config.finetune.branches = "init_block|output=w8a8; head=full", "bn[12]"
    config.teacher.arguments, config.teacher.call = '{"num_classes": 10}', '{"train": false}'
    config.teacher.names, config.fast_convolution = "mine.py:names", False
    config_lib.validate(config)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("finetune.lr", "fast", "a number"),
        ("finetune.lr", None, "a number"),
        ("finetune.lr", True, "a number"),
        ("synthesis.images", 2.5, "a whole number"),
        ("synthesis.images", 2048.0, "a whole number"),
        ("synthesis.images", True, "a whole number"),
        ("synthesis.images", (1,), "a whole number"),
        ("finetune.stream", 1, "True or False"),
        ("finetune.stream", "yes", "True or False"),
        ("eval.split", 3, "a text"),
        ("teacher.mean", 0.5, "a tuple of numbers"),
        ("teacher.mean", (0.5, "x", 0.5), "a tuple of numbers"),
        ("teacher.mean", "0.5", "a tuple of numbers"),
        ("teacher.image", (32.0, 32, 3), "a tuple of whole numbers"),
        ("finetune.lr_drops", ((1,),), "a tuple of whole numbers"),
        ("finetune", 3, "a section with fields"),
    ],
)
def test_a_wrong_kind_is_refused_wherever_it_comes_from(field: str, value, kind: str) -> None:
    section, _, name = field.rpartition(".")
    ways = [
        lambda: config_lib.default().update_from_flattened_dict({field: value}),
        lambda: setattr(config_lib.field(config_lib.default(), section) if section else config_lib.default(), name, value),
        lambda: config_lib.from_dict({section: {name: value}} if section else {name: value}),
    ]
    for way in ways:
        with pytest.raises(UserError, match=rf"config\.{field} is .*: it must be {kind}\.$"):
            way()


def test_numbers_become_those_of_the_field() -> None:
    config = config_lib.default()
    config.finetune.lam, config.synthesis.images, config.teacher.mean = 2, np.int64(512), [0, 0.5, np.float32(1)]
    assert [type(value) for value in (config.finetune.lam, config.synthesis.images, *config.teacher.mean)] == [
        float,
        int,
        float,
        float,
        float,
    ]
    config_lib.validate(config)


def test_a_reference_to_another_field_is_followed() -> None:
    config = config_lib.default()
    config.calibration.batch = config.finetune.get_ref("batch")
    config.finetune.batch = 128
    config_lib.validate(config)
    assert config.calibration.batch == 128


def unknown_in_a_copy() -> None:
    config_lib.default().copy_and_resolve_references().finetune.epss = 1


def unknown_in_a_pickle() -> None:
    pickle.loads(pickle.dumps(copy.deepcopy(config_lib.default()))).finetune.epss = 1


def unknown_in_an_unlocked_config() -> None:
    config = config_lib.default().unlock()
    config.finetune.epss = 1
    config_lib.validate(config)


def unknown_in_a_config_of_ones_own() -> None:
    config_lib.validate(ConfigDict({"finetune": {"epss": 1}}))


@pytest.mark.parametrize(
    "way",
    [
        lambda: setattr(config_lib.default().finetune, "epss", 1),
        lambda: config_lib.default().update_from_flattened_dict({"finetune.epss": 1}),
        lambda: config_lib.default().update({"finetune": {"epss": 1}}),
        lambda: setattr(config_lib.default(), "finetune", {"epss": 1}),
        lambda: config_lib.variant(config_lib.default(), "mine", {"mine": {"finetune.epss": 1}}),
        lambda: config_lib.from_dict({"finetune": {"epss": 1}}),
        unknown_in_a_copy,
        unknown_in_a_pickle,
        unknown_in_an_unlocked_config,
        unknown_in_a_config_of_ones_own,
    ],
)
def test_an_unknown_field_is_refused_wherever_it_comes_from(way) -> None:
    with pytest.raises(UserError, match=r"^config\.finetune\.epss is unknown \(did you mean finetune\.eps\?\)\.$"):
        way()


@pytest.mark.parametrize("path", ["finetunee.eps", "fine", "finetune.eps.x", "", "finetune.", "teacher.image[0]"])
def test_an_unknown_section_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="is unknown"):
        config_lib.default().update_from_flattened_dict({path: 1})
    with pytest.raises(UserError, match="is unknown"):
        config_lib.from_dict({path: 1})


@pytest.mark.parametrize("config", [None, {}, 3, ConfigDict(), ConfigDict({"finetune": 3}), ConfigDict({1: 2})])
def test_what_is_no_config_is_refused(config) -> None:
    with pytest.raises(UserError):
        config_lib.validate(config)


@pytest.mark.parametrize("values", [None, [1], 3, "x", {1: 2}, {"finetune": None}, {"finetune.eps": 1}, {"": {}}, {"a\nb": 1}])
def test_what_is_no_dict_of_fields_is_refused(values) -> None:
    with pytest.raises(UserError) as error:
        config_lib.from_dict(values)
    assert "\n" not in str(error.value)


def test_a_run_folder_of_an_older_version_has_defaults_and_one_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    values = config_lib.to_dict(config_lib.default())
    del values["finetune"]["eps"], values["eval"], values["seed"]
    write_json(tmp_path / "config.json", values)
    assert open_for_reading(tmp_path)[1] == config_lib.default()
    write_json(tmp_path / "config.json", values | {"sede": 3})
    with pytest.raises(UserError, match=r"config\.json is .*config\.sede is unknown \(did you mean seed\?\)"):
        open_for_reading(tmp_path)


CONFIG_FILE = """
from hast_jax import config as config_lib

def get_config():
    config = config_lib.default()
    {}
    return config
"""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config.finetune.epss = 1", "config.finetune.epss is unknown (did you mean finetune.eps?)"),
        ("config.epochs = 1", "config.epochs is unknown (did you mean pretrain.epochs or finetune.epochs?)"),
        ("config.finetune.eps = 'much'", "config.finetune.eps is 'much': it must be a number."),
        ("config.finetune.eps = float('nan')", "config.finetune.eps is nan: it must be finite"),
        ("config = 3", "the config is 3: get_config must return"),
        ("config = None", "--config is missing, or its get_config returns nothing"),
        ("1 / 0", "the config cannot be built: ZeroDivisionError: division by zero; HAST_JAX_DEBUG=1 shows the traceback."),
        ("open('/missing.json')", "the config file cannot be read: [Errno 2] No such file or directory: '/missing.json'"),
    ],
)
def test_a_mistake_in_a_config_file_ends_in_one_sentence(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(CONFIG_FILE.format(line))
    done = tiny.call([*tiny.module("main"), f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"])
    assert done.returncode == 1, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_is_not_there_is_told_with_the_shipped_ones(tmp_path: Path) -> None:
    done = tiny.call([*tiny.module("main"), "--config=configs/digit.py:w3a3", f"--workdir={tmp_path}/run"])
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "there is no config file 'configs/digit.py': give the path of one, or the name of a shipped config" in done.stderr
    assert "cifar10, cifar100, digits, imagenet" in done.stderr


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.finetune.epochs=three", "config.finetune.epochs is 'three': it must be a whole number."),
        ("--config.finetune.augment=maybe", "config.finetune.augment is 'maybe': it must be True or False."),
        ("--config.bits=w4a4", "config.bits is a group of fields: set one of these, such as --config.bits.weights."),
        ("--config=digits", "--config is given twice: give one config."),
    ],
)
def test_a_value_of_another_kind_is_refused_in_the_words_of_the_field(tmp_path: Path, flag: str, words: str) -> None:
    done = tiny.call([*tiny.command(tmp_path / "run"), flag])
    assert done.returncode == 1 and done.stderr == f"hast_jax: {words}\n"


@pytest.mark.parametrize("flag", ["--config.finetune.epss=1", "--config.finetunee.eps=1", "--noconfig.finetune.epss"])
def test_an_unknown_field_on_the_command_line_is_told_with_a_close_one(tmp_path: Path, flag: str) -> None:
    done = tiny.call([*tiny.command(tmp_path / "run"), flag])
    assert done.returncode == 1 and "is unknown (did you mean finetune.eps?)" in done.stderr, done.stderr


def test_the_help_of_main_lists_all_fields_with_their_defaults() -> None:
    done = tiny.call([*tiny.module("main"), "--helpfull"])
    text = " ".join(done.stdout.split())
    for path, field in fields.FIELDS.items():
        assert f"{path} ({field.default}): ".replace("()", '("")') in text
        assert " ".join(field.help.split()) in text


def test_the_page_of_the_configuration_has_the_table_of_the_fields() -> None:
    page = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()
    table = page.partition("<!-- config: what python -m hast_jax.fields prints -->\n")[2].partition("<!-- end of config -->")[0]
    assert table == fields.markdown() + "\n"


def test_every_help_is_a_sentence_or_several() -> None:
    for path, field in fields.FIELDS.items():
        assert field.help[0].isupper() and field.help.endswith(".") and "\n" not in field.help, path


def test_what_differs_between_processes_may_change_and_both_are_as_described() -> None:
    assert set(config_lib.OWN_FIELDS) == {
        *("devices", "synthesis.source", "eval.data_dir", "eval.held_out"),
        *("teacher.weights", "teacher.names", "teacher.check"),
    }
    assert set(config_lib.OWN_FIELDS) < set(config_lib.FREE_FIELDS) and "fast_convolution" not in config_lib.FREE_FIELDS


ODD = [float("nan"), float("inf"), -float("inf"), None, "", "x", [], {}, -1, 0, 10**30, True, (), (float("nan"),)]


@given(st.dictionaries(st.sampled_from(list(fields.FIELDS)), st.sampled_from(ODD), min_size=1, max_size=3))
def test_a_config_with_odd_values_is_valid_or_refused_in_one_line(changes: dict) -> None:
    plain = ConfigDict(config_lib.default().to_dict(), type_safe=False)
    for config in (config_lib.default(), plain):
        try:
            config.update_from_flattened_dict(changes)
            config_lib.validate(config)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("path", fields.FIELDS)
def test_each_field_with_each_odd_value_is_valid_or_refused_in_one_line(path: str) -> None:
    for value in ODD:
        try:
            config = config_lib.default()
            config.update_from_flattened_dict({path: value})
            config_lib.validate(config)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert "nan" not in repr(value) and "inf" not in repr(value)


@pytest.mark.parametrize("split", ["val", "./val", "val/", "train/../val", "link", "{folder}/val"])
def test_images_of_a_folder_are_not_learned_and_judged_however_its_path_is_written(split: str, tmp_path) -> None:
    for name in ("val", "train"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "val")
    config = config_lib.default()
    changes = {"eval.dataset": "folder", "eval.data_dir": str(tmp_path), "eval.split": "val", "synthesis.real_split": "train"}
    config.update_from_flattened_dict(changes)
    config_lib.validate(config)
    config.synthesis.real_split = split.format(folder=tmp_path)
    with pytest.raises(UserError, match=r"of another split than eval\.split"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher.mean": (103.9, 116.8, 123.7)}, "divide it by your pixels' largest value, such as 255"),
        ({"synthesis.real_split": "all"}, "config.synthesis.real_split is 'all'"),
        ({"synthesis.real_split": "train", "eval.split": "all"}, "config.synthesis.real_split is 'train'"),
        ({"synthesis.real_split": "all[:10]", "eval.split": "validation"}, "config.synthesis.real_split is"),
        ({"finetune.direction": "fa", "finetune.lam": 0.0}, "otherwise no image is promoted"),
        ({"synthesis.return_to_best": True, "synthesis.schedule": "cosine"}, "only a plateau's rate falls in steps"),
        ({"synthesis.return_to_best": True, "synthesis.crop_probability": 0.5}, "losses of different crops cannot be compared"),
    ],
)
def test_fields_that_undo_each_other_are_refused(changes: dict, words: str) -> None:
    config = config_lib.default()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(words)):
        config_lib.validate(config)
