"""Paths that a person gives, in flags, in a config or in Python."""

import os
import re
from pathlib import Path

from hast_jax.errors import UserError


def local(path: str | Path) -> Path:
    """`path` on a file system of this machine, with `~` replaced by the home folder.

    Raises UserError for anything but a text or a path, for the address of a bucket, such as gs://bucket/run, which would become
    a folder called "gs:", and for the home folder of a user who does not exist.
    """
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise UserError(f"{path!r} is no path: give a text or a pathlib.Path.")
    address = re.match(r"([A-Za-z][\w+.-]+):/", str(path))
    if address:
        raise UserError(f"{path} is no path of this machine: give a folder, or mount the {address[1]} storage as a folder.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path} begins with a home folder that does not exist: give another path.") from error
