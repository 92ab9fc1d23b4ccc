"""WORKDIR/run.lock: only one run at a time trains in a workdir. The file names the process that does.

The kernel's lock on the file decides between processes of one machine, and between machines if the shared file system supports
locks. It ends with its process, however that ends. For file systems without locks, the owner updates the file's modification
time every HEARTBEAT seconds. An owner on another machine that has not done so for SILENT seconds is taken to be dead.
"""
import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from mmx.config import ConfigError
from mmx.files import atomic, output, untrusted

HEARTBEAT, SILENT = 10, 60      # seconds


@contextlib.contextmanager
def acquire(workdir: str | Path):
    """Locks WORKDIR for this process while the block runs. Raises ConfigError if another process has it."""
    path = Path(workdir) / "run.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file, ended = _open_locked(path), threading.Event()
    with file:
        try:
            with atomic.add_filename(path):
                file.seek(0)
                file.truncate()
                json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T %z")}, file)
                file.flush()
            threading.Thread(target=_send_heartbeats, args=(path, ended), daemon=True).start()
            yield
        finally:
            ended.set()
            path.unlink(missing_ok=True)


def _open_locked(path: Path):
    """The open and locked file. A lock file that a dead process left is taken over."""
    while True:
        file = path.open("a+")
        free, supported = _lock(file)
        owner = _read_owner(file)
        if not free:
            raise _in_use(path, owner)
        if owner and not (supported and owner.get("host") == socket.gethostname()):
            _wait_for_heartbeat(path, owner)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()        # its owner ended and removed the file


def _lock(file) -> tuple[bool, bool]:
    """(whether no process is known to have the lock, whether the file system supports locks)."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False, True
    except OSError:
        return True, False
    return True, True


def _wait_for_heartbeat(path: Path, owner: dict) -> None:
    """Waits until the owner has been silent for SILENT seconds. Raises ConfigError if it sends a heartbeat."""
    output.message(f"mmx: {path.parent} was last used by {_describe(owner)}: waiting {SILENT} s for a sign of life")
    with contextlib.suppress(FileNotFoundError):        # the owner ended and removed the file
        before, end = path.stat().st_mtime_ns, time.monotonic() + SILENT
        while time.monotonic() < end:
            time.sleep(min(1, SILENT))
            if path.stat().st_mtime_ns != before:
                raise _in_use(path, owner)


def _send_heartbeats(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):      # a full or missing disk is reported by the code that writes the run's files
            os.utime(path)


def _read_owner(file) -> dict:
    """The contents of the lock file; {} if they are not a JSON object."""
    file.seek(0)
    try:
        owner = untrusted.loads(file.read(4096))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _in_use(path: Path, owner: dict) -> ConfigError:
    return ConfigError(f"{path.parent} is in use: {_describe(owner)}, trains there; wait until it ends, or give "
                       "another --workdir")


def _describe(owner: dict) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"
