"""Starts real training processes for the fault tests, and compares what their runs wrote.

Processes are forked from one that has imported mmx, but has not initialized JAX. This halves the cost of a restart.
"""
import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mmx.data import corpus
from mmx.launch import hugepages
from mmx.startup import devices

devices.prepare()       # before the processes import JAX, so that CUDA logs nothing between the lines of mmx
ROOT = Path(__file__).parents[2]
ROWS = 64       # rows in an epoch
TIMES = {"seconds", "tokens_per_s", "flops_per_s", "data_wait"}
EXPERIMENT = """\
from mmx.config import default

def get_config():
    config = default()
    config.model.dim, config.model.layers, config.model.pattern = 16, 1, "L"
    config.model.heads, config.model.kv_heads, config.model.head_dim, config.model.rotary_dim = 2, 1, 8, 4
    config.model.experts, config.model.expert_dim, config.model.capacity = 4, 16, 1.0
    config.model.init, config.model.embed_std, config.model.dtype = "fan_in", 1.0, "{dtype}"
    config.train.steps, config.train.batch, config.train.length, config.train.decay = {steps}, 4, 32, 0.0
    config.train.ramp, config.train.warmup, config.train.lr = ((0, 1), (2048, 2)), 2, 1e-2
    config.train.tensorboard, config.train.log_every = False, 1
    config.checkpoint.every, config.checkpoint.keep = 5, 2
    config.data.sources, config.mesh.edp = ("{text}",), 1
    return config

def sweep():
    return {{"train.lr": [1e-2, 2e-2]}}
"""


class Workspace:
    """A folder with the config of a small experiment and its text: documents that fill exactly ROWS rows of 32 tokens."""

    def __init__(self, folder: Path, steps: int = 60, dtype: str = "float32"):
        self.folder, self.steps, self.x64 = folder, steps, dtype == "float64"
        rng, free, number = np.random.default_rng(0), ROWS * 32, 0
        (folder / "text").mkdir(parents=True, exist_ok=True)
        self.documents = 0      # in the training split
        while free or number < 64:          # some of the 64 are held out
            name, size = f"{number:03}.txt", int(rng.integers(5, 120))
            number += 1
            if corpus.split_of(name) == "train":
                if not free:
                    continue
                size = free if free < 130 else size         # with bos and eos
                self.documents, free = self.documents + 1, free - size
            (folder / "text" / name).write_text("".join(rng.choice(list("states of the union"), size - 2)))
        self.config = folder / f"small_{dtype}.py"
        self.config.write_text(EXPERIMENT.format(steps=steps, text=folder / "text", dtype=dtype))

    def train(self, workdir, **options) -> list[str]:
        """The arguments of `mmx train`; options are config keys with __ for a dot."""
        return ["train", "--config", str(self.config), "--workdir", str(self.folder / workdir),
                *(f"--config.{key.replace('__', '.')}={value}" for key, value in options.items())]

    def start(self, arguments, **settings) -> "Run":
        """Starts an mmx command; `_child` explains `settings`."""
        return Run(arguments, settings | {"x64": self.x64}, self.folder)

    def run(self, arguments, timeout: float = 300, **settings) -> "Run":
        """Runs an mmx command to its end."""
        return self.start(arguments, **settings).wait(timeout)


class Run:
    """A process. After `wait`, `code` is its exit code, or minus the signal that ended it."""

    def __init__(self, arguments, settings, folder: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["harness", "mmx.training.run", "mmx.inference.engine"])
        self.file = Path(tempfile.mkstemp(prefix="output-", dir=folder)[1])
        self.process = context.Process(target=_child, args=(arguments, str(self.file), settings))
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.is_alive()

    def signal(self, number) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> "Run":
        self.process.join(timeout)
        if self.alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the process still runs after {timeout} s: {self.output[-2000:]}")
        self.code = self.process.exitcode
        return self

    @property
    def output(self) -> str:
        """stdout and stderr together."""
        return self.file.read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        """The lines of the output without the progress bar and what libraries print."""
        lines = self.output.replace("\r", "\n").split("\n")
        return [line for line in lines if line.strip() and not line.startswith("train: ")]


def _child(arguments, output: str, settings: dict) -> None:
    """Runs an mmx command in this process, with stdout and stderr in the file `output`.

    Settings:
      x64: float64 is enabled.
      file_bytes: the largest size of a file.
      clock: time.time jumps forward and back by this many seconds.
      record: a file to which the checksums of all rows of the data stream are written.
    """
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    os.chdir(ROOT)
    import jax

    from mmx import cli
    if settings.get("x64"):
        jax.config.update("jax_enable_x64", True)
    if settings.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings["file_bytes"], resource.RLIM_INFINITY))
    if settings.get("clock"):
        clock = time.time
        time.time = lambda: clock() + settings["clock"] * (int(clock() * 3) % 3 - 1)
    if settings.get("record"):
        _record(Path(settings["record"]))
    sys.exit(cli.main(arguments))


def _record(path: Path) -> None:
    """Writes a line to `path` for each micro-batch that the stream returns."""
    import zlib

    from mmx.data import pipeline
    original = pipeline.Stream.next

    def next_(self):
        micro, rows = self._micro, original(self)
        bos = int((rows["tokens"] == BOS).sum())
        sums = [zlib.crc32(b"".join(rows[name][row].tobytes() for name in sorted(rows))) for row in range(len(rows["tokens"]))]
        with path.open("a") as file:
            file.write(json.dumps({"micro": micro, "first": self._own_rows.start, "rows": sums, "bos": bos}) + "\n")
        return rows
    pipeline.Stream.next = next_


BOS = 256


def settings(folder: Path) -> dict[str, str]:
    """The environment of all processes. They share compiled programs."""
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent))),
            "GLIBC_TUNABLES": hugepages.HUGE}      # as the mmx command sets it


def records(workdir: Path) -> list[dict]:
    """metrics.jsonl without times and rates."""
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES}
            for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def checkpoint_state(workdir: Path) -> dict[str, bytes]:
    """Parameters, optimizer and data state of the last checkpoint, without the training time."""
    from mmx.checkpoints import manager
    step = manager.find_step(workdir)[1]
    found = {f"{item}/{'.'.join(path)}": manager.read_slice(array).tobytes()
             for item in ("params", "opt") for path, array in manager.open_arrays(step, item).items()}
    data = json.loads((step / "data" / "metadata").read_text())
    return found | {"step": step.name, "data": json.dumps({k: v for k, v in data.items() if k != "seconds"}, sort_keys=True)}


def assert_one_line(run, code: int, words: str) -> None:
    """Checks that a process ended with this exit code and that, besides progress, it printed one line that matches `words`."""
    lines = [line for line in run.lines if not re.match(r"step \d+|trained |written: | +\d+%\|", line)]
    assert run.code == code and len(lines) == 1 and re.search(words, lines[0]), (run.code, lines)


def assert_same(workdir: Path, reference: Path) -> None:
    """Two runs ended with the same bits and the same metrics."""
    found, expected = checkpoint_state(workdir), checkpoint_state(reference)
    different = [name for name in expected if found.get(name) != expected[name]]
    assert not different and found.keys() == expected.keys(), f"{workdir} differs from {reference} in {different}"
    assert records(workdir) == records(reference)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float):
    """Mounts a file system of that size at `folder`; yields None where that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 2 ** 20)}", "tmpfs", folder],
                      capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, free: int = 0) -> Path:
    """Fills the disk with a file, except for `free` bytes; returns the file."""
    path = folder / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while (excess := shutil.disk_usage(folder).free - free) > 0:
            file.write(bytes(min(excess, 1 << 20)))
    return path


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
