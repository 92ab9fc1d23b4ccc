"""The lock of a workdir: a second run is refused, and the lock of a dead process is taken over."""
import errno
import json
import multiprocessing
import os
import socket
import threading

import pytest

from mmx.config import ConfigError
from mmx.files import lock


def _hold(workdir, ready, die):
    with lock.acquire(workdir):
        ready.set()
        die.wait()
        os._exit(1)         # like SIGKILL: nothing is cleaned up


@pytest.fixture
def owner(tmp_path):
    """Another process that has locked the workdir; `stop()` ends it."""
    context = multiprocessing.get_context("forkserver")
    ready, die = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, die))
    process.start()
    assert ready.wait(60)
    process.stop = lambda: (die.set(), process.join())
    yield process
    process.stop()


def test_a_live_owner_is_named_and_a_dead_one_is_replaced(tmp_path, owner):
    message = rf"^{tmp_path} is in use: process {owner.pid} on {socket.gethostname()}, since \d{{4}}-.*, trains there; wait"
    with pytest.raises(ConfigError, match=message), lock.acquire(tmp_path):
        pass
    owner.stop()
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == owner.pid
    with lock.acquire(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_an_invalid_lock_file_is_taken_over(tmp_path):
    for text in ("", "{", "[1]", "\0" * 100):
        (tmp_path / "run.lock").write_text(text)
        with lock.acquire(tmp_path / "."):
            pass


@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_on_another_machine_must_send_heartbeats(alive, tmp_path, monkeypatch, capsys):
    """If the file system supports no locks between machines."""
    monkeypatch.setattr(lock, "SILENT", 0.5)
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "then"}))
    if alive:
        threading.Timer(0.2, lambda: os.utime(path)).start()
        with pytest.raises(ConfigError, match="is in use: process 7 on elsewhere, since then, trains"), lock.acquire(tmp_path):
            pass
    else:
        with lock.acquire(tmp_path):
            pass
    assert "was last used by process 7 on elsewhere, since then: waiting 0.5 s" in capsys.readouterr().err


def test_an_owner_that_has_removed_its_file_is_dead(tmp_path, capsys):
    lock._wait_for_heartbeat(tmp_path / "run.lock", {})
    assert "was last used by" in capsys.readouterr().err


def test_a_full_disk_is_reported_and_no_lock_remains(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(lock.json, "dump", full)
    with pytest.raises(OSError, match="run.lock"), lock.acquire(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_owner_sends_heartbeats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    renewed = threading.Event()
    monkeypatch.setattr(lock.os, "utime", lambda path: renewed.set())
    with lock.acquire(tmp_path):
        assert renewed.wait(10)
