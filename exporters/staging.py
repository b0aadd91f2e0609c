"""Outputs exist whole or not at all: they are made in a folder beside their place and renamed at the end."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ExportError


def refuse_existing(out: Path) -> None:
    """Nothing overwrites an existing path.

    Raises:
        ExportError: `out` exists, or its parent is not a folder that can be written.
    """
    if out.exists() or out.is_symlink():
        raise ExportError(f"`{out}` exists", hint="choose another name, or remove it yourself")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ExportError(f"`{parent}` is not a folder that can be written", hint="choose another place")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder that becomes `out` if the block ends well, and vanishes if it does not, Ctrl-C included.

    Raises:
        ExportError: `out` exists, or the disk is full.
    """
    refuse_existing(out)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.absolute().parent))
    try:
        folder.chmod(0o755)
        yield folder
        refuse_existing(out)
        folder.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        used = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        free = shutil.disk_usage(folder).free
        raise ExportError(
            f"no space left for `{out}`: {used:,} bytes written, {free:,} free",
            hint="free some space or choose another disk; nothing was left behind",
        ) from error
    finally:
        if folder.exists():
            shutil.rmtree(folder)
