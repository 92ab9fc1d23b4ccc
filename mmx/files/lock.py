"""One run a workdir: WORKDIR/run.lock says who trains there.

The kernel's lock on the file decides on one machine, and where a shared file system carries locks; it ends with its process,
however that ends. For file systems that do not carry them, the holder renews the file's time: one on another machine that
has not for SILENT seconds is dead.
"""
import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from mmx.config import ConfigError
from mmx.files import atomic, untrusted

BEAT, SILENT = 10, 60       # seconds


@contextlib.contextmanager
def acquire(workdir: str | Path):
    """WORKDIR is this process's meanwhile; ConfigError says who has it otherwise."""
    path = Path(workdir) / "run.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file, over = _take(path), threading.Event()
    with file:
        try:
            with atomic.add_filename(path):
                file.seek(0)
                file.truncate()
                json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T %z")}, file)
                file.flush()
            threading.Thread(target=_beat, args=(path, over), daemon=True).start()
            yield
        finally:
            over.set()
            path.unlink(missing_ok=True)


def _take(path: Path):
    """The open file, locked; what a dead process left there is taken over."""
    while True:
        file = path.open("a+")
        free, local = _lock(file)
        holder = _holder(file)
        if not free:
            raise ConfigError(f"{path.parent} is in use: {_told(holder)}, trains there; wait for its end, or give another "
                              "--workdir")
        if holder and not (local and holder.get("host") == socket.gethostname()):
            _wait(path, holder)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()        # its holder removed it at its end


def _lock(file) -> tuple[bool, bool]:
    """Whether nobody here holds the file, and whether the kernel could say so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False, True
    except OSError:         # no locks on this file system
        return True, False
    return True, True


def _wait(path: Path, holder: dict) -> None:
    """Until the holder, whom no lock shows, has been silent for long enough."""
    print(f"mmx: {path.parent} was last held by {_told(holder)}: waiting {SILENT} s for a sign of life", file=sys.stderr)
    with contextlib.suppress(FileNotFoundError):        # it has ended
        before, until = path.stat().st_mtime_ns, time.monotonic() + SILENT
        while time.monotonic() < until:
            time.sleep(min(1, SILENT))
            if path.stat().st_mtime_ns != before:
                raise ConfigError(f"{path.parent} is in use: {_told(holder)}, trains there; wait for its end, or give another "
                                  "--workdir")


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with contextlib.suppress(OSError):      # a full or an absent disk is told by who writes there
            os.utime(path)


def _holder(file) -> dict:
    file.seek(0)
    try:
        holder = untrusted.loads(file.read(4096))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _told(holder: dict) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"
