"""Classes and functions in a user's files, named FILE.py:NAME."""

import contextlib
import functools
import importlib.util
import inspect as python_inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
from flax import nnx

from hast_jax import paths
from hast_jax.errors import InputError
from hast_jax.networks import from_nnx

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
    if not is_own(name):
        raise InputError(f"{name!r} is not known: give FILE.py:NAME.")
    if not path.is_file():
        raise InputError(f"there is no file {file!r}, which {name!r} names: give another path.")
    spec: Any = importlib.util.spec_from_file_location(f"{path.stem} of hast_jax", path)  # no import can have this name
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look annotations up there
    neighbours, here = str(path.resolve().parent), str(Path.cwd())
    sys.path.insert(0, neighbours)  # the file may import them, as if it was run
    if here not in sys.path:
        sys.path.append(here)  # a package may lie there, also for a command that is a script
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:
        words = f'{path} ends the program when it is imported: put its commands under if __name__ == "__main__".'
        raise InputError(words) from error
    except Exception as error:  # whatever the file does wrong
        relative = "relative import" in str(error)
        advice = "; write a small file that imports the network from its package, and name that file" if relative else ""
        raise InputError(f"{path} cannot be imported: {_words(error)}{advice}.") from error
    finally:
        with contextlib.suppress(ValueError):  # the file may have removed the folder itself, or put others before it
            sys.path.remove(neighbours)
        if neighbours not in sys.path:
            sys.path.append(neighbours)  # its functions may import more when they are called
    found = getattr(module, attribute, None)
    if found is None:
        raise InputError(f"{path} has no {attribute!r}: give the name of a class or function in it, as FILE.py:NAME.")
    return found


def _words(error: Exception) -> str:
    """The type and the message of an exception on one line, without a full stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200].rstrip('.')}"


def make(name: str, classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """The network that "FILE.py:NAME" names: a class or a function that makes it, or the network itself.

    arguments: of the class or function. If it takes the number of classes (under one of the names `CLASSES`) and `arguments` do
    not give it, `classes` is given. If it takes `rngs`, as networks of flax.nnx do, `nnx.Rngs(0)` is given. Raises UserError if
    there is no such network, or if it cannot be made.
    """
    found = load(name)
    wanted = "name a flax.linen.Module or flax.nnx.Module, its class, or a function that makes one"
    if isinstance(found, nn.Module | nnx.Module):
        if arguments:
            raise InputError(f"{name} is a finished network, which takes no config.teacher.arguments: leave them out.")
        return from_nnx.linen(found)[0]
    if not callable(found):
        raise InputError(f"{name} is a {type(found).__name__}: {wanted}.")
    try:
        maker: Any = found
        taken = python_inspect.signature(maker.__init__ if isinstance(found, type) else maker).parameters
        known: dict[str, Any] = {each: classes for each in CLASSES if each in taken and each not in arguments}
        if "rngs" in taken:  # of flax.nnx, whose first weights those of the file replace
            known["rngs"] = nnx.Rngs(0)
        made = found(**known, **arguments)
    except Exception as error:  # whatever its constructor does wrong
        advice = "" if isinstance(error, ImportError) else f"; {wanted}, and give its arguments in config.teacher.arguments"
        raise InputError(f"{name} cannot be constructed: {_words(error)}{advice}.") from error
    if not isinstance(made, nn.Module | nnx.Module):
        raise InputError(f"{name} makes a {type(made).__name__}: {wanted}.")
    return from_nnx.linen(made)[0]
