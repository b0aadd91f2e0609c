"""Outputs exist whole or not at all: they are made in a folder beside their place and renamed at the end."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ExportError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    with _stage(out) as folder:
        yield folder
        refuse_existing(out)
        folder.rename(out)


@contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """As `staged`, for one file: a path to write to."""
    with _stage(out) as folder:
        yield folder / out.name
        refuse_existing(out)
        (folder / out.name).rename(out)


@contextmanager
def _stage(out: Path) -> Iterator[Path]:
    refuse_existing(out)
    parent = out.absolute().parent
    made = [p for p in (parent, *parent.parents) if not p.exists()]  # innermost first
    folder = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=parent))
        folder.chmod(0o755)
        yield folder
    except Exception as error:  # safetensors and others report a full disk as their own type; the rest goes on as it is
        if not _is_full(error):
            raise
        written = folder.rglob("*") if folder else ()
        used = sum(p.stat().st_size for p in written if p.is_file())
        free = shutil.disk_usage(next(p for p in (parent, *parent.parents) if p.exists())).free
        raise ExportError(
            f"no space left for `{out}`: {used:,} bytes written, {free:,} free",
            hint="free some space or choose another disk; nothing was left behind",
        ) from error
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder)
        if not out.exists():
            for empty in made:
                with suppress(OSError):  # somebody else has put something there
                    empty.rmdir()


def _is_full(error: Exception) -> bool:
    """Whether a write failed for want of space; libraries written in Rust say so only in their message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    code = re.search(r"\(os error (\d+)\)", str(error))
    return code is not None and int(code[1]) in _FULL
