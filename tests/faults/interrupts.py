"""Ctrl-C at random moments of real processes: from the first import on, each ends with exit code 130 and one line.

A process starts with SIGINT blocked, and unblocks it once it handles it, which /proc/PID/status shows. JAX logs what it
compiles, so that the moment of a signal is known.
"""
import collections
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from harness import ROOT, Workspace
from scenarios import ENDLESS, uninterrupted

LINE = re.compile(r"mmx: interrupted|stopping after this step, which is saved; press Ctrl-C again to quit at once")
PROGRESS = re.compile(r"\s*$|(train|bits per byte|prefill): |.*(Finished (tracing|jaxpr|XLA)|Compiling )")
IN_XLA = re.compile(r"Finished jaxpr to MLIR module conversion (\S+)")      # XLA compiles after this line, until the next one
COMPILING = re.compile(r"Compiling \S+|Finished tracing")


class Process:
    """An mmx command as a real process, without compiled programs from earlier runs."""

    def __init__(self, arguments: list[str]):
        environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_LOG_COMPILES": "true"}
        self.output = tempfile.TemporaryFile("w+")
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})       # the process inherits it
        self.process = subprocess.Popen([sys.executable, "-m", "mmx.cli", *arguments], cwd=ROOT, text=True, env=environment,
                                        stdout=self.output, stderr=subprocess.PIPE)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()

    def wait_for(self, condition) -> None:
        while self.process.poll() is None and not condition():
            time.sleep(0.002)

    def handles_interrupts(self) -> bool:
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        blocked = re.search(r"SigBlk:\s*(\w+)", status)
        return bool(blocked) and not int(blocked[1], 16) >> signal.SIGINT - 1 & 1

    def programs(self) -> int:
        """How many programs XLA has begun to compile."""
        return sum(bool(IN_XLA.search(line)) for line in list(self.lines))

    def moment(self) -> str:
        """What the process does, by the last line of JAX's log."""
        log = [line for line in list(self.lines) if PROGRESS.match(line) and re.search("Finished|Compiling", line)]
        if not log:
            return "imports"
        return "XLA" if IN_XLA.search(log[-1]) else "tracing" if COMPILING.search(log[-1]) else "running"

    def end(self) -> None:
        """Sends Ctrl-C and checks how the process ends."""
        self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(600)       # `mmx train` ends its compilation and a step first
        finally:
            self.process.kill()
        self.reader.join(10)
        lines = [line for line in "".join(self.lines).replace("\r", "\n").split("\n") if not PROGRESS.match(line)]
        assert code == 130 and len(lines) == 1 and LINE.fullmatch(lines[0]), (self.process.args, code, lines)


def interrupts(workspace: Workspace, count: int, rng: random.Random) -> str:
    """Interrupts `count` processes: at least half of them during a compilation and a fifth during the imports."""
    run, found, attempts = uninterrupted(workspace), collections.Counter(), 0
    aims = ["compile"] * -(-count // 2) + ["imports"] * -(-count // 5)
    aims += rng.choices(("compile", "imports", "later"), k=max(0, count - len(aims)))
    rng.shuffle(aims)
    while aims:
        attempts += 1
        assert attempts < 3 * count + 10, f"the moments could not be hit: {found}"
        with tempfile.TemporaryDirectory(dir=workspace.folder) as folder:
            process = Process(rng.choice((
                workspace.train(Path(folder, "run"), train__steps=ENDLESS), ["eval", "--checkpoint", str(run), "--out", folder],
                ["generate", "--checkpoint", str(run), "--prompt", "a", "--steps", "50"])))
            process.wait_for(process.handles_interrupts)
            if aims[-1] == "imports":
                time.sleep(rng.uniform(0, 1.5))
            else:
                number = rng.randint(1, 2 if "train" in process.process.args else 4)      # training has two programs
                process.wait_for(lambda: process.programs() >= number)
                time.sleep(rng.uniform(0, 0.1) if aims[-1] == "compile" else rng.uniform(0.5, 3))
            moment = process.moment()
            if process.process.poll() is not None:      # it was done before
                continue
            process.end()
            found[moment] += 1
            if aims[-1] == {"XLA": "compile", "tracing": "compile"}.get(moment, moment) or aims[-1] == "later":
                aims.pop()
    return ", ".join(f"{many} during {what}" for what, many in sorted(found.items())) + ": each exit code 130 and one line"
