"""A file that claims to hold far more than its bytes could is refused before it fills the memory."""

import zipfile
from pathlib import Path

MAX_COMPRESSION = 100  # trained weights hardly compress at all


def check_size(unpacked: int, packed: int) -> None:
    """Raise ValueError where `unpacked` bytes in memory come of far too few `packed` bytes on the disk."""
    if unpacked > MAX_COMPRESSION * packed:
        raise ValueError(f"{unpacked / 2**30:.1f} GiB are packed into {packed} bytes, as no weights are")


def check_archive(path: Path) -> None:
    """Raise ValueError where a zip file would become far larger in memory than it is on disk."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    check_size(unpacked, path.stat().st_size)
