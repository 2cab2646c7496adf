"""The picture of the house is that of the code, and imports go down."""

import importlib.util
from types import ModuleType

import pytest
import tiny


@pytest.fixture(scope="module")
def house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", tiny.ROOT / "docs" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_its_script_draws(house: ModuleType) -> None:
    assert house.PICTURE.read_text() == house.draw(), "run python docs/house.py and commit docs/house.svg"


def test_no_room_imports_one_above_it(house: ModuleType) -> None:
    _, up = house.shown(house.imports())
    assert not up


def test_the_method_knows_no_other_room(house: ModuleType) -> None:
    assert not [edge for edge in house.imports() if edge[0] == "method"]
