"""An impossible config is refused in one sentence, before any work."""

import importlib.util
from pathlib import Path

import pytest

from hast_jax import config as config_lib
from hast_jax.errors import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def get_config(path: Path, argument: str = ""):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("argument", ["", "w4a4", "w3a3,small", "w2a8"])
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
        ("teacher.image", (32, 16, 3), "size, size, 1 or 3 channels"),
        ("teacher.mean", (0.5,), "one number for each of the 3 channels"),
        ("teacher.std", (0.5, 0.0, 0.5), "positive for each channel"),
        ("calibration.range", "max", "one of minmax, mse"),
        ("teacher.image", (0, 0, 3), "size, size, 1 or 3 channels"),
        ("eval.crop", 0.0, "above 0 and at most 1"),
        ("finetune.lr_drops", (16, -1), "positive epochs"),
        ("finetune.lam", float("inf"), "finite"),
        ("pretrain.shift", -1, "zero or positive"),
        ("devices", -1, "zero or positive"),
        ("seed", -1, "between 0 and"),
        ("synthesis.real_split", "test[:50%]", "without images of the evaluation's split"),
        ("synthesis.real_split", "train+test", "without images of the evaluation's split"),
        ("synthesis.real_split", "all", "without images of the evaluation's split"),
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
    with pytest.raises(UserError, match=r"'tiny': choose from w4a4 .any bits., small, tuned"):
        config_lib.variant(config_lib.default(), "w4a4,tiny")


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
