"""Real training processes to hurt: a small model, its uninterrupted run, and what a run left, to compare.

A process is forked from one that has imported mmx, which JAX has not started in: a restart costs half of what it would.
"""
import contextlib
import json
import multiprocessing
import os
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

ROOT = Path(__file__).parents[2]
ROWS = 64       # of an epoch
TIMES = {"seconds", "tokens_per_s", "flops_per_s"}
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


class Place:
    """A folder with an experiment and its text: documents that fill ROWS rows of 32 tokens."""

    def __init__(self, folder: Path, steps: int = 60, dtype: str = "float32"):
        self.folder, self.steps, self.x64 = folder, steps, dtype == "float64"
        rng, room, number = np.random.default_rng(0), ROWS * 32, 0
        (folder / "text").mkdir(parents=True, exist_ok=True)
        self.documents = 0      # to train on
        while room or number < 64:          # some are held out
            name, size = f"{number:03}.txt", int(rng.integers(5, 120))
            number += 1
            if corpus.split_of(name) == "train":
                if not room:
                    continue
                size = room if room < 130 else size         # bos and eos included
                self.documents, room = self.documents + 1, room - size
            (folder / "text" / name).write_text("".join(rng.choice(list("states of the union"), size - 2)))
        self.config = folder / f"small_{dtype}.py"
        self.config.write_text(EXPERIMENT.format(steps=steps, text=folder / "text", dtype=dtype))

    def train(self, workdir, **options) -> list[str]:
        return ["train", "--config", str(self.config), "--workdir", str(self.folder / workdir),
                *(f"--config.{key.replace('__', '.')}={value}" for key, value in options.items())]

    def start(self, arguments, **hurt) -> "Run":
        """Runs an mmx command; `hurt` is what `_child` does to it."""
        return Run(arguments, hurt | {"x64": self.x64}, self.folder)

    def done(self, arguments, within: float = 300, **hurt) -> "Run":
        return self.start(arguments, **hurt).end(within)


class Run:
    """A process: `code` of its end (minus the signal that ended it), `lines` that it said on stderr but for the bar's."""

    def __init__(self, arguments, hurt, folder: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mmx.training.train", "mmx.inference.engine"])
        self.said = Path(tempfile.mkstemp(prefix="said-", dir=folder)[1])
        self.process = context.Process(target=_child, args=(arguments, str(self.said), hurt))
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.is_alive()

    def signal(self, number) -> None:
        os.kill(self.pid, number)

    def end(self, within: float = 300) -> "Run":
        self.process.join(within)
        if self.alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"not ended within {within} s: {self.text[-2000:]}")
        self.code = self.process.exitcode
        return self

    @property
    def text(self) -> str:
        return self.said.read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        found = [line for line in self.text.replace("\r", "\n").split("\n") if line.strip() and not line.startswith("train: ")]
        return [line for line in found if "absl::InitializeLog" not in line and "cudart_stub" not in line]


def _child(arguments, said: str, hurt: dict) -> None:
    """`x64`; `file_bytes` that a file may have; `clock`: seconds by which time.time leaps to and fro; `record`: a file for
    the rows that the stream gives, `devices` whom JAX may have."""
    for number in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    os.chdir(ROOT)
    import jax

    from mmx import cli
    if hurt.get("x64"):
        jax.config.update("jax_enable_x64", True)
    if hurt.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (hurt["file_bytes"], resource.RLIM_INFINITY))
    if hurt.get("clock"):
        true = time.time
        time.time = lambda: true() + hurt["clock"] * (int(true() * 3) % 3 - 1)
    if hurt.get("record"):
        _record(Path(hurt["record"]))
    sys.exit(cli.main(arguments))


def _record(path: Path) -> None:
    import zlib

    from mmx.data import pipeline
    given = pipeline.Stream.next

    def next_(self):
        micro, rows = self._micro, given(self)
        bos = int((rows["tokens"] == BOS).sum())
        sums = [zlib.crc32(b"".join(rows[name][row].tobytes() for name in sorted(rows))) for row in range(len(rows["tokens"]))]
        with path.open("a") as file:
            file.write(json.dumps({"micro": micro, "first": self._own_rows.start, "rows": sums, "bos": bos}) + "\n")
        return rows
    pipeline.Stream.next = next_


BOS = 256


def settings(folder: Path) -> dict[str, str]:
    """Environment of all processes: programs are compiled once."""
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
            "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": hugepages.HUGE}      # as the command has


def told(workdir: Path) -> list[dict]:
    """metrics.jsonl but for times and rates."""
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES}
            for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def state(workdir: Path) -> dict[str, bytes]:
    """Parameters, optimizer and data of the last checkpoint, but for the clock."""
    from mmx.checkpoints import manager
    step = manager.find_step(workdir)[1]
    found = {f"{item}/{'.'.join(path)}": manager.read(array).tobytes()
             for item in ("params", "opt") for path, array in manager.open_arrays(step, item).items()}
    data = json.loads((step / "data" / "metadata").read_text())
    return found | {"step": step.name, "data": json.dumps({k: v for k, v in data.items() if k != "seconds"}, sort_keys=True)}


def assert_same(workdir: Path, whole: Path) -> None:
    ours, theirs = state(workdir), state(whole)
    differ = [name for name in theirs if ours.get(name) != theirs[name]]
    assert not differ and ours.keys() == theirs.keys(), f"{workdir} differs from {whole} in {differ}"
    assert told(workdir) == told(whole)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float):
    """A file system of that size at `folder`; None where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 2 ** 20)}", "tmpfs", folder],
                      capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """A file that leaves `leave` bytes of the disk."""
    path = folder / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while (left := shutil.disk_usage(folder).free - leave) > 0:
            file.write(bytes(min(left, 1 << 20)))
    return path


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
