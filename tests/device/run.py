"""Checks mmx on the accelerator of this machine and prints one table: `make device`. JAX_PLATFORMS=cpu checks this script.

Trains 50 steps, stops a run with SIGTERM and resumes it, generates text, and compares losses and text with the CPU's.
Then times the kernels, and runs the tests that are marked `gpu` or `tpu` for as long as the time lasts. Each step is a
separate process, because only one process can use a TPU.
"""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from mmx.training import metrics

ROOT = Path(__file__).parents[2]
MMX = [sys.executable, "-m", "mmx.cli"]
STEPS, PROMPT, TOKENS = 50, "The state of the Union", 64
# In float32 with full precision, the devices differ by rounding. It grows with the steps: the router can choose other experts.
FIRST_STEP, ALL_STEPS, SAME_TOKENS = 1e-5, 2e-2, 8
SECONDS = 460           # of all steps together
DEVICE = "import jax; d = jax.devices(); print(d[0].platform, len(d), d[0].device_kind, sep='|')"
PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}     # values of JAX_PLATFORMS


class StepError(Exception):
    """A step gave a wrong result, which the message explains."""


class Row(NamedTuple):
    """The result of one step."""
    name: str
    passed: bool
    seconds: float
    result: str


class Device:
    """Runs commands on the accelerator or on the CPU until the deadline."""

    def __init__(self, folder: Path, deadline: float):
        self.folder, self.deadline, self.platform = folder, deadline, None

    def environment(self, platform: str | None) -> dict[str, str]:
        """The variables of a process on this platform; None: as JAX chooses. Products of float32 have full precision."""
        chosen = {"JAX_PLATFORMS": PLATFORMS[platform]} if platform else {}
        return os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest",
                             "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
                             "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"} | chosen

    def start(self, command: list[str], platform: str | None = None) -> subprocess.Popen:
        return subprocess.Popen(command, cwd=ROOT, env=self.environment(platform or self.platform), stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)

    def finish(self, process: subprocess.Popen) -> str:
        """Waits for a process and returns its stdout. Raises StepError on an error or at the deadline."""
        try:
            out, err = process.communicate(timeout=max(1, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise StepError(f"not finished in time\n{out}") from None
        if process.returncode:
            last = (err.strip() or out.strip() or "no message").splitlines()[-1]
            raise StepError(f"exit code {process.returncode}: {last}\n{out}")
        return out

    def run(self, command: list[str], platform: str | None = None) -> str:
        return self.finish(self.start(command, platform))

    def train(self, name: str, steps: int = STEPS) -> list[str]:
        """The command that trains the run of this name."""
        keys = {"train.steps": steps, "train.length": 256, "train.sample_every": 0, "train.tensorboard": False,
                "train.log_every": 1, "checkpoint.every": 10, "mesh.edp": 1}
        return [*MMX, "train", "--config", "experiments/tiny.py", "--workdir", str(self.folder / name),
                *(f"--config.{key}={value}" for key, value in keys.items())]

    def losses(self, name: str) -> list[float]:
        return [record["loss"] for record in metrics.read(self.folder / name)]


def check_device(device: Device) -> str:
    platform, count, kind = device.run([sys.executable, "-c", DEVICE]).strip().splitlines()[-1].split("|")
    if platform == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise StepError("JAX finds no GPU or TPU: install mmx with the extra cuda12, cuda13 or tpu, or set JAX_PLATFORMS=cpu")
    device.platform = platform
    return f"{count} x {kind}"


def check_training(device: Device) -> str:
    device.run(device.train("whole"))
    records = metrics.read(device.folder / "whole")
    rate = sorted(record["tokens_per_s"] for record in records)[len(records) // 2]
    return f"{STEPS} steps, loss {records[0]['loss']:.3f} to {records[-1]['loss']:.3f}, {rate:,.0f} tokens/s"


def check_resume(device: Device) -> str:
    """Stops a run with SIGTERM and resumes it. A run that ends before the signal is repeated with more steps."""
    for steps in (STEPS, 40 * STEPS):
        name = f"stopped-{steps}"
        process, log = device.start(device.train(name, steps)), device.folder / name / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            if time.monotonic() > device.deadline:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        stopped = re.search(r"stopped at step ([\d,]+)", device.finish(process))
        if stopped:
            break
    else:
        raise StepError(f"a run of {steps} steps ended before SIGTERM")
    at = int(stopped[1].replace(",", ""))
    whole = "whole" if steps == STEPS else f"whole-{steps}"
    if steps != STEPS:
        device.run(device.train(whole, steps))
    device.run(device.train(name, steps))
    own, want = device.losses(name), device.losses(whole)
    difference = max_difference(own, want)
    if len(own) != len(want) or not difference <= ALL_STEPS:
        raise StepError(f"stopped at step {at}: {len(own)} steps of {len(want)}, losses differ by up to {difference:.1e}")
    return f"stopped at step {at} of {steps}, resumed: " + (
        "the same bits" if own == want else f"losses differ by up to {difference:.1e}; some kernels of this device are not "
        "deterministic")


def check_losses(device: Device, on_cpu: subprocess.Popen) -> str:
    device.finish(on_cpu)
    own, want = device.losses("whole"), device.losses("cpu")
    first, difference = max_difference(own[:1], want[:1]), max_difference(own, want)
    result = f"relative difference of the loss: {first:.1e} at step 1, {difference:.1e} in {len(want)} steps"
    if len(own) != len(want) or not (first <= FIRST_STEP and difference <= ALL_STEPS):
        raise StepError(f"{result}; limits {FIRST_STEP:.0e} and {ALL_STEPS:.0e}")
    return result


def check_generation(device: Device) -> str:
    command = [*MMX, "generate", "--checkpoint", str(device.folder / "whole"), "--prompt", PROMPT, "--steps", str(TOKENS),
               "--temperature", "0", "--json"]
    own, want = (json.loads(device.run(command, platform))["ids"] for platform in (device.platform, "cpu"))
    same = next((n for n, (a, b) in enumerate(zip(own, want)) if a != b), min(len(own), len(want)))
    result = f"{len(own)} tokens, the first {same} equal the CPU's"
    if same < min(SAME_TOKENS, len(want)) or not own:
        raise StepError(result)
    return result


def check_kernels(device: Device) -> str:
    lengths = "256,512" if device.platform == "cpu" else "1024,8192"
    command = [*MMX, "bench", "kernels", "--live", "--lengths", lengths, "--out", str(device.folder), "--json"]
    rows = json.loads(device.run(command))
    longest = max(row["length"] for row in rows)
    return f"ms at {longest:,} tokens: " + ", ".join(
        f"{row['case']} {row['impl']} {row['ms']:.3g}" for row in rows if row["length"] in (longest, 1))


def check_tests(device: Device) -> str:
    """Runs the tests that are marked for the device. At the deadline, reports how many had passed."""
    marker = "gpu or tpu" if device.platform == "cpu" else device.platform
    try:
        out = device.run([sys.executable, "-m", "pytest", "-v", "-p", "no:xdist", "-o", "addopts=", "-m", marker,
                          "tests/kernels"])
    except StepError as error:
        passed, failed = (re.findall(rf"^(\S+) {word}", str(error), re.MULTILINE) for word in ("PASSED", "FAILED"))
        raise StepError(f"{len(passed)} passed, {len(failed)} failed {failed[:3]}; {str(error).splitlines()[0]}") from None
    return out.strip().splitlines()[-1].strip("= ")


def max_difference(own: list[float], want: list[float]) -> float:
    """The largest relative difference of two lists of losses; nan if a loss is, infinite if a list is empty."""
    return float(np.max([abs(a - b) / abs(b) for a, b in zip(own, want)], initial=0)) if own and want else float("inf")


def run_step(name: str, check: Callable[[], str]) -> Row:
    begin = time.monotonic()
    try:
        passed, result = True, check()
    except StepError as error:
        passed, result = False, str(error).splitlines()[0]
    return Row(name, passed, time.monotonic() - begin, result)


def show(rows: list[Row]) -> None:
    table = Table("step", "passed", "seconds", "result", title=f"mmx on {rows[0].result}")
    for row in rows:
        table.add_row(row.name, "yes" if row.passed else "no", f"{row.seconds:.0f}", row.result)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of all steps together (default %(default)s)")
    parser.add_argument("--folder", help="keep the runs in this folder, which must be new (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="device-") as folder:
        device = Device(Path(args.folder or folder).absolute(), time.monotonic() + args.seconds)
        rows = [run_step("device", lambda: check_device(device))]
        if rows[0].passed:
            on_cpu = device.start(device.train("cpu"), "cpu")
            try:
                rows += [run_step(name, check) for name, check in (
                    ("training", lambda: check_training(device)), ("SIGTERM and resume", lambda: check_resume(device)),
                    ("losses, beside the CPU", lambda: check_losses(device, on_cpu)),
                    ("generation, beside the CPU", lambda: check_generation(device)),
                    ("mmx bench kernels --live", lambda: check_kernels(device)),
                    ("tests marked for the device", lambda: check_tests(device)))]
            finally:
                on_cpu.kill()
        show(rows)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
