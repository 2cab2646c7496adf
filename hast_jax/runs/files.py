"""Small files, written so that a reader never sees a half-written one. Checksums of arrays."""

import json
import os
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hast_jax.errors import UserError
from hast_jax.kinds import parse_json


def write_text(path: Path, text: str) -> None:
    """Replace the file's content in one move. The new content is on disk on return."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for bytes."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk must not stay full because of it
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is on disk too
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Replace the file's content by `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, kind: type[Any] = dict, keys: Collection[str] = ()) -> Any:
    """The value in a file of a run folder: of this kind, and with these keys. Raises UserError if the file is damaged."""
    try:
        value = parse_json(path.read_text())
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__} instead of a {kind.__name__}")
        if missing := [key for key in keys if key not in value]:
            raise ValueError(f"{missing[0]!r} is missing")
        return value
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and repeat the command that made the run.") from error


def crc32(tree: Any) -> int:
    """CRC-32 of all arrays of a tree, in the tree's order. Contiguous arrays are not copied."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, total)
    return total
