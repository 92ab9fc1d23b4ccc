"""Atomic writes: a file is written under a temporary name and renamed once it is complete."""
import contextlib
import glob
import os
import shutil
from pathlib import Path

from mmx.startup import interrupts


def temporary_path(path: Path) -> Path:
    """The path under which this process writes what will become `path`.

    Removes the temporary files that killed processes left for the same path.
    """
    own = path.with_name(f"{path.name}.partial-{os.getpid()}")
    for old in path.parent.glob(f"{glob.escape(path.name)}.partial-*"):
        if old == own or not _may_be_running(old.name.rpartition("-")[2]):
            remove(old)
    return own


@contextlib.contextmanager
def temporary(path: Path):
    """Yields `temporary_path(path)`. Removes it when the block ends, or when Ctrl-C ends the program."""
    own = temporary_path(path)
    with interrupts.removing(own):
        try:
            yield own
        finally:
            remove(own)


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "w"):
    """Opens a file for writing ("w": text, "wb": bytes) that replaces `path` once it is complete and on disk.

    If the block raises, `path` stays as it was.
    """
    path = Path(path)
    with temporary(path) as partial:
        with add_filename(path), partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


@contextlib.contextmanager
def add_filename(path: str | Path):
    """Adds `path` to an OSError that names no file, such as one of a write to an open file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def remove(path: Path) -> None:
    """Removes a file, or a folder with its contents."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _may_be_running(process: str) -> bool:
    """False if no process has this id. True if one has, or if the text is not a process id."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):        # a process of another user, or a file that mmx did not write
        pass
    return True
