"""Files that are whole or what they were: what is written stands beside its destination until it is whole."""
import contextlib
import glob
import os
import shutil
from pathlib import Path


def temporary_path(path: Path) -> Path:
    """Where what will become `path` stands meanwhile; what processes left that were killed amid theirs is removed."""
    own = path.with_name(f"{path.name}.partial-{os.getpid()}")
    for old in path.parent.glob(f"{glob.escape(path.name)}.partial-*"):
        if old == own or not _runs(old.name.rpartition("-")[2]):
            remove(old)
    return own


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "w"):
    """A file to write ("w": text, "wb": bytes) that takes the place of `path` once it is whole and on disk."""
    path = Path(path)
    own = temporary_path(path)
    try:
        with add_filename(path), own.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


@contextlib.contextmanager
def add_filename(path: str | Path):
    """An OSError of a file that is open does not say which: one in here does."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def remove(path: Path) -> None:
    """A file, or a folder and all in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:      # killed amid its work
        return False
    except (OSError, ValueError, OverflowError):        # another user's, or no partial of ours
        pass
    return True
