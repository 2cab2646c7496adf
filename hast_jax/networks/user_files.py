"""Classes and functions in a user's files, named FILE.py:NAME."""

import functools
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from hast_jax import paths
from hast_jax.errors import InputError

CLASSES = ("classes", "num_classes", "n_classes")  # what a constructor may call the number of logits


def is_own(name: str) -> bool:
    """Whether a name is of the form FILE.py:NAME."""
    return name.rpartition(":")[0].endswith(".py")


@functools.cache
def load(name: str) -> Any:
    """The object that "FILE.py:NAME" names. Runs the file's code. Raises UserError if there is no such object."""
    file, _, attribute = name.rpartition(":")
    path = paths.local(file)
    # Python would load .pyc and .so files too, whose names `is_own` refuses.
    if not (is_own(name) and path.is_file()):
        raise InputError(f"{name!r} is not known and there is no file {file!r}: give FILE.py:NAME.")
    spec: Any = importlib.util.spec_from_file_location(f"{path.stem} of hast_jax", path)  # no import can have this name
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look annotations up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does wrong
        raise InputError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise InputError(f"{path} has no {attribute!r}.")
    return found


def make(name: str, classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """An instance of the class that "FILE.py:CLASS" names.

    arguments: of its constructor. If the class has a field for the number of classes (one of `CLASSES`) that `arguments` do not
    give, that field is set to `classes`. Raises UserError if there is no such class, or if its constructor fails.
    """
    found = load(name)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(f"{name}: {name.rpartition(':')[2]!r} is not a subclass of flax.linen.Module.")
    fields = found.__dataclass_fields__
    known = {each: classes for each in CLASSES if each in fields and each not in arguments}
    try:
        return found(**known, **arguments)
    except Exception as error:  # whatever its constructor does wrong
        words = str(error).split("\n")[0]
        raise InputError(
            f"{name} cannot be constructed: {type(error).__name__}: {words}; give its arguments in config.teacher.arguments."
        ) from error
