"""Checks that refuse a file before it unpacks to far more than its size and fills the memory."""

import zipfile
from pathlib import Path

MAX_COMPRESSION = 100  # trained weights hardly compress at all


def check_size(unpacked: int, packed: int) -> None:
    """Raise ValueError if `unpacked` bytes in memory are over `MAX_COMPRESSION` times the `packed` bytes on the disk."""
    if unpacked > MAX_COMPRESSION * packed:
        raise ValueError(f"{unpacked / 2**30:.1f} GiB are packed into {packed} bytes, but weights hardly compress")


def check_archive(path: Path) -> None:
    """Raise ValueError if a zip file would unpack to far more than its size on the disk."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    check_size(unpacked, path.stat().st_size)
