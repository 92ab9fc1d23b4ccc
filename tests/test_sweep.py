"""Sweeps: what a grid means, errors before any run starts, and rows that no kill loses or duplicates."""
import collections
import errno
import io
import json
import os
import pkgutil
import random
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from mmx import cli
from mmx.analysis import counts
from mmx.config import ConfigError, build
from mmx.launch import experiments, sweep
from mmx.launch.sweep import executors, plan, scheduler, worker
from mmx.launch.sweep import rows as sweep_rows
from mmx.training import metrics

ROOT = Path(__file__).parent.parent
TRAIN, MEASURE = "mmx.training.run.train", "mmx.evals.compression.measure"      # replaced by cheap functions
FILE = """\
from mmx.config import default

def get_config(arch="S", steps=8):
    config = default()
    config.model.dim, config.model.layers, config.model.pattern = 8, 1, arch
    config.model.heads, config.model.kv_heads, config.model.head_dim, config.model.rotary_dim = 1, 1, 8, 4
    config.model.experts, config.model.top_k, config.model.expert_dim = 1, 1, 8
    config.train.steps, config.train.batch, config.train.length, config.train.eval_bytes = steps, 1, 16, 100
    config.train.tensorboard = False
    config.data.sources = ({text!r},)
    config.checkpoint.every = 2
    config.mesh.edp = 1
    return config

def sweep():
    return {grid}
"""
UNUSED_PID = 2**22 + 1      # above the largest process id of Linux
GRID = '{"arch": ["S"], "train.seed": [0, 1, 2]}'


@pytest.fixture
def place(tmp_path):
    """A function that writes an experiment file with a grid, and returns the arguments of its sweep."""
    text = tmp_path / "text.txt"
    text.write_text("The state of the Union is strong. " * 400)

    def write(grid=GRID):
        (tmp_path / "small.py").write_text(FILE.format(text=str(text), grid=grid))
        return ["sweep", "--config", str(tmp_path / "small.py"), "--out", str(tmp_path / "out"), "--executor", "inline"]
    return write


@pytest.fixture
def trained(monkeypatch):
    """Replaces training. Returns how often each seed was trained, and a dict of exceptions that training raises, by seed."""
    calls, errors = collections.Counter(), {}

    def run(experiment, folder):
        seed, steps = experiment.train.seed, experiment.train.steps
        calls[seed] += 1
        if error := errors.pop(seed, None):
            raise error
        lines = [{"step": step, "loss": 3.0 - step / steps, "tokens_per_s": 1.0, "flops_per_s": 1e9,
                  **({"micro_norm": 2.0} if step > steps // 2 else {})} for step in range(1, steps + 1)]
        (Path(folder) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"step": steps, "new": steps, "seconds": 2.0, "stopped": 0, "process": 0}
    monkeypatch.setattr(TRAIN, run)
    monkeypatch.setattr(MEASURE, lambda folder, limit: SimpleNamespace(held_out=SimpleNamespace(loss=2.0, bits_per_byte=3.0)))
    return calls, errors


def rows(folder):
    return [json.loads(line) for line in (folder / "out" / "runs.jsonl").read_text().splitlines()]


def test_each_run_is_trained_once_and_has_one_row(place, trained, tmp_path, capsys):
    command = place()
    assert cli.main([*command, "--rate", "1e9"]) == 0
    out = capsys.readouterr().out
    assert "3 runs, 0 of them done" in out and "rate given by --rate" in out and "done: S-0-" in out
    found = rows(tmp_path)
    assert [row["train.seed"] for row in found] == [0, 1, 2] and len({row["hash"] for row in found}) == 3
    model = experiments.read(str(tmp_path / "small.py"), []).model
    first = found[0]
    assert (first["arch"], first["tokens"], first["loss"], first["bits_per_byte"], first["seconds"]) == ("S", 128, 2, 3, 2)
    assert (first["params"], first["params_total"]) == (counts.count_params(model).active, counts.count_params(model).total)
    assert first["flops"] == 128 * counts.flops_training(model, 16)
    assert first["flops_companion"] == 128 * counts.flops_companion(model, 16)
    assert first["course"]["micro_norm"] == [None] * 4 + [2.0] * 4       # steps of one micro-batch have none
    assert first["train_loss"] == 2.0 and set(first["versions"]) == {"mmx", "jax", "python"}
    assert cli.main(command) == 0 and rows(tmp_path) == found
    grid = '[{"train.seed": 3}, {"train.seed": 1, "arch": "S"}, {"train.seed": 2, "steps": 8}]'     # new keys, two old runs
    assert cli.main([*place(grid), "--rate", "1e9"]) == 0
    assert [row["train.seed"] for row in rows(tmp_path)] == [0, 1, 2, 3] and set(trained[0].values()) == {1}


def test_a_foreign_runs_jsonl_is_not_changed(place, trained, tmp_path, capsys):
    path = tmp_path / "out" / "runs.jsonl"
    path.parent.mkdir()
    path.write_text('{"loss": 3}\n')
    assert cli.main(place()) == 2 and path.read_text() == '{"loss": 3}\n'
    err = capsys.readouterr().err
    assert f"{path}:1 is not a row of a sweep" in err and err.count("\n") == 1


def test_a_terminal_has_a_live_table(place, trained, tmp_path, monkeypatch):
    """The table is refreshed while an inline run prints to its log; a finished sweep has no table."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    log, run = tmp_path / "out" / "jobs" / "inline.log", pkgutil.resolve_name(TRAIN)

    def slow(experiment, folder):
        print("training")
        time.sleep(1.2)     # the table is refreshed once a second
        assert "running" in terminal.getvalue()
        return run(experiment, folder)
    monkeypatch.setattr(TRAIN, slow)
    command = [*place('{"train.seed": [0]}'), "--rate", "1e9"]
    assert cli.main(command) == 0 and log.read_text() == "training\n"
    assert cli.main(command) == 0 and trained[0] == {0: 1}


class Kill(BaseException):
    """Takes the place of SIGKILL."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("write", range(5))
def test_a_kill_at_any_write_loses_and_duplicates_no_row(write, after, place, trained, tmp_path, monkeypatch):
    command, count, write_file = [*place(), "--rate", "1e9"], 0, sweep_rows._write

    def killed(path, text):
        nonlocal count
        count += 1
        if count > write and not after:
            path.with_name(f"{path.name}.partial-{UNUSED_PID}").write_text(text[:20])
            raise Kill
        write_file(path, text)
        if count > write:
            raise Kill
    with monkeypatch.context() as patch:
        patch.setattr(sweep_rows, "_write", killed)
        with pytest.raises(Kill):
            cli.main(command)
    finished = {path.parent.name for path in tmp_path.glob("out/runs/*/row.json")}
    before = dict(trained[0])
    assert cli.main(command) == 0
    assert not list(tmp_path.rglob("runs.jsonl.partial-*"))
    assert sorted(row["train.seed"] for row in rows(tmp_path)) == [0, 1, 2]
    for row in rows(tmp_path):
        again = trained[0][row["train.seed"]] - before.get(row["train.seed"], 0)
        assert again == (row["name"] not in finished)


def test_a_truncated_line_and_a_deleted_row_are_restored(place, trained, tmp_path):
    command = [*place(), "--rate", "1e9"]
    assert cli.main(command) == 0
    found = rows(tmp_path)
    path = tmp_path / "out" / "runs.jsonl"
    path.write_text(path.read_text()[:-30])
    (tmp_path / "out" / "runs" / found[0]["name"] / "row.json").unlink()
    assert cli.main(command) == 0 and rows(tmp_path) == found and set(trained[0].values()) == {1}


def test_failed_runs_are_retried_and_reported(place, trained, tmp_path, capsys):
    command = [*place(), "--rate", "1e9"]
    trained[1].update({0: RuntimeError("lost a device"), 1: ConfigError("step 3 has loss nan")})
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert "retry: S-0-" in captured.out and "lost a device" in captured.out and "failed: S-1-" in captured.out
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("mmx: 1 run failed; run the same command to retry. The first failure is S-1-")
    assert trained[0] == {0: 2, 1: 1, 2: 1} and [row["train.seed"] for row in rows(tmp_path)] == [2, 0]
    trained[1][1] = RuntimeError("lost a device")
    assert cli.main([*command, "--retries", "0"]) == 1
    assert cli.main(command) == 0 and len(rows(tmp_path)) == 3


def test_a_full_disk_is_one_line_and_the_sweep_resumes(place, trained, tmp_path, capsys):
    command = [*place(), "--rate", "1e9"]
    trained[1][1] = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert "No space left on device; free some, then the same command continues" in err and err.count("\n") == 1
    assert [row["train.seed"] for row in rows(tmp_path)] == [0]
    assert cli.main(command) == 0 and trained[0] == {0: 1, 1: 2, 2: 1}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    sweep_rows._write(tmp_path / "runs.jsonl", "before\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError):
            sweep_rows._write(tmp_path / "runs.jsonl", "after" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "runs.jsonl").read_text() == "before\n"


def test_guards_are_part_of_the_hash(place):
    """With guard.spike, so is checkpoint.every, because the run rolls back to a checkpoint."""
    cells = sweep.cells(*experiments.grid(place('{"guard.spike": [0.0, 1.0, 2.0]}')[2], []))
    often = sweep.cells(*experiments.grid(place('{"guard.spike": [0.0, 1.0]}')[2], ["--config.checkpoint.every=3"]))
    assert len({cell.hash for cell in cells + often}) == 4 and cells[0].hash == often[0].hash


@pytest.mark.parametrize("grid, more, message", [
    ('{"train.lr": [1e-3, -1.0]}', [], "cell 2 of 2 (train.lr=-1.0): train.lr=-1.0 must be 0 or more"),
    ('{"arch": ["S", "LS"]}', [], "cell 2 of 2 (arch=LS): model.layers=1 must be divisible by the 2 letters"),
    ('{"train.stepz": [1]}', [], "cell 1 of 1 (train.stepz=1): unknown config key train.stepz; did you mean train.steps?"),
    ('{"train.lr": ["fast"]}', [], "cell 1 of 1 (train.lr=fast): config key train.lr needs float, got 'fast'"),
    ('{"width": [1]}', [], "unexpected keyword argument 'width'"),
    ('{"train.seconds": [9.0]}', [], "train.seconds=9 leaves the number of steps open"),
    ('{"data.sources": [("nowhere.txt",)]}', [], "nowhere.txt'"),
    ('{"model.vocab": [264, 100]}', [], "cell 2 of 2 (model.vocab=100): the tokenizer's ids reach 263"),
    ('{"train.seed": [0, 1]}', ["--config.train.seed=3"], "cell 2 of 2 (train.seed=1) is the same run as cell 1"),
    ('{"train.seed": 3}', [], "sweep(): 'train.seed' needs a list of values, got 3"),
    ("[]", [], "sweep() must return a dict of lists"),
    ('{"train.seed": list(__import__("numpy").arange(2))}', [], "cell 1 of 2 (train.seed=0): train.seed has type int64, which"),
    ('{"model.vision.layers": [-1]}', [], "cell 1 of 1 (model.vision.layers=-1): model.vision.layers=-1 must be positive"),
    (GRID, ["--executor", "slurm"], "does not have; --executor local runs processes"),
    (GRID, ["--slurm", "partition=gpu"], "--slurm partition=gpu needs --executor slurm"),
    (GRID, ["--rate", "1e3", "--hours", "0.5"], "the 3 runs need 1.73 hours (rate given by --rate), which exceeds --hours 0.5"),
    (GRID, ["--jobs", "0"], "--jobs 0 is out of range"),
    (GRID, ["--hours", "nan"], "--hours nan is out of range"),
    (GRID, ["--jobs", "2"], "--jobs 2 needs --executor local or slurm"),
])
def test_mistakes_are_reported_before_any_run(grid, more, message, place, trained, tmp_path, capsys):
    assert cli.main([*place(grid), *more]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("mmx: ") and err.count("\n") == 1, err
    assert not trained[0] and not (tmp_path / "out").exists()


def test_a_refused_sweep_keeps_an_existing_folder(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").touch()
    assert cli.main(place(GRID) + ["--rate", "1e3", "--hours", "0.5"]) == 2
    assert (tmp_path / "out" / "notes").exists()


def test_an_experiment_without_a_sweep(capsys):
    assert cli.main(["sweep", "--config", str(ROOT / "experiments" / "tiny.py"), "--out", "never"]) == 2
    assert "has no sweep()" in capsys.readouterr().err


def test_the_hash_ignores_vision_that_is_off():
    """Hashes of rows that are older than vision stay valid."""
    names = {sweep.Cell({}, build({"model": {"vocab": 300, "vision": {"layers": layers, "token": token}}})).hash
             for layers, token in ((0, 259), (0, 260), (1, 259), (1, 260))}
    assert len(names) == 3


def test_a_second_sweep_in_one_folder_is_refused(place, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "lock").open("w") as lock:
        assert worker.try_lock(lock)
        assert cli.main(place()) == 2
    assert "another mmx sweep is running" in capsys.readouterr().err


def test_the_rate_is_interpolated_between_measured_ones(place, trained, tmp_path):
    command = place('{"model.expert_dim": [8, 800]}')
    cells = sweep.cells([{"model.expert_dim": 8}, {"model.expert_dim": 800}],
                        lambda keys: experiments.read(command[2], [f"--config.{k}={v}" for k, v in keys.items()]))
    known = plan.estimate_rate(cells, [], lambda function, *args: [function(*args)], tmp_path, None)
    assert known.points == tuple((cell.flops_per_token, 1e9) for cell in cells)
    assert known.source.startswith("measured over 12 steps")
    rate = plan.Rate(((cells[0].flops_per_token, 1e6), (cells[1].flops_per_token, 4e6)), 3.0, "")
    assert rate.seconds(cells[1]) == pytest.approx(3 + cells[1].flops / 4e6)


def test_the_rate_of_rows_is_that_of_complete_runs(place):
    """Diverged runs, which stopped early, do not count. Runs of one size count by their mean time."""
    command = place('{"model.expert_dim": [8]}')
    cells = sweep.cells([{"model.expert_dim": 8}], lambda keys: experiments.read(command[2], []))
    flops, tokens = cells[0].flops, cells[0].tokens
    rows = [{"flops": flops, "tokens": tokens, "loss": loss, "seconds": seconds}
            for loss, seconds in ((2.0, 10.0), (2.0, 30.0), (None, 1.0), (None, 0.0))]
    known = plan.estimate_rate(cells, rows, None, None, None)
    assert known.seconds(cells[0]) == pytest.approx(20) and known.source == "rate of 2 finished runs"
    assert plan.estimate_rate(cells, rows[2:], None, None, None) is None


def test_the_rate_is_measured_with_as_many_jobs_as_will_run(place, tmp_path, monkeypatch):
    command, submitted, output = place(), [], io.StringIO()
    cells = sweep.cells({"train.seed": [0, 1, 2, 3]},
                        lambda keys: experiments.read(command[2], [f"--config.{k}={v}" for k, v in keys.items()]))

    class Job:
        def __init__(self):
            submitted.append(self)

        def done(self):
            assert len(submitted) == 3, "waited for a job before all were submitted"
            return True

    monkeypatch.setattr(executors, "outcome", lambda job: (sweep.DONE, 1e9))
    executor = SimpleNamespace(submit=lambda *job, visible: Job())
    options, console = sweep.ExecutorOptions("local", 3), Console(file=output, width=300)
    assert scheduler._plan(cells, tmp_path, executor, options, None, None, console) == cells
    assert "(train.seed=0), 3 at a time" in output.getvalue()


def test_tensorboard_has_hyperparameters(place, trained, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cli.main([*place(), "--rate", "1e9", "--config.train.tensorboard"]) == 0
    folder = next(tmp_path.glob("out/runs/S-0-*/tensorboard/hparams"))
    board = EventAccumulator(str(folder))
    board.Reload()
    assert board.Scalars("final/loss")[0].value == 2.0
    assert "_hparams_/session_start_info" in board.summary_metadata


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Scripts in place of sbatch, srun and sacct, as far as submitit needs them: a job is a process."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {"sbatch": 'export SLURM_JOB_ID=77 SLURM_NTASKS=1; bash "$1" > /dev/null 2>&1 & echo Submitted batch job 77',
               "srun": 'while [ "${1#-}" != "$1" ]; do case "$1" in --output|--error) shift;; esac; shift; done; exec "$@"',
               "sacct": 'echo "JobID|State|NodeList"; echo "77|RUNNING|here"'}
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


class Unreadable:
    """Can be pickled but not unpickled."""
    def __reduce__(self):
        return int, ("no number",)


def test_slurm_runs_jobs(place, slurm, tmp_path):
    command = place()
    cell = sweep.Cell({"x": 1}, experiments.read(command[2], []))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "row.json").write_text("{}")
    def make(slurm):
        return executors.make(sweep.ExecutorOptions("slurm", slurm=slurm), tmp_path / "out")

    executor = make("partition=gpu,gpus_per_node=8")
    assert executors.run_copies(executor, 1, sweep.attempt, cell, tmp_path / "run") == [(sweep.DONE, "")]
    script = next((tmp_path / "out" / "jobs").glob("*/*submission*.sh")).read_text()
    assert "--partition=gpu" in script and "--gpus-per-node=8" in script and "--time=1440" in script
    for given, message in (("color=red", "color"), ("nodes=2", "one process on one node")):
        with pytest.raises(ConfigError, match=message):
            make(given)
    executor = make("")
    [(status, reason)] = executors.run_copies(executor, 1, str, Unreadable())       # fails before the call
    assert status == worker.FAILED and "no number" in reason and "\n" not in reason
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\necho sbatch: error: invalid partition >&2; exit 1")
    with pytest.raises(ConfigError, match="the job could not be submitted: .*invalid partition"):
        executors.run_copies(executor, 1, sweep.attempt, cell, tmp_path / "run")


SLOW = """\
import json, sys, time, types
from pathlib import Path

def train(experiment, folder):
    path, steps = Path(folder) / "metrics.jsonl", experiment.train.steps
    first = len(path.read_text().splitlines()) if path.exists() else 0
    with path.open("a") as file:
        for step in range(first + 1, steps + 1):
            while step > 20 and not Path(CONTINUE).exists():
                time.sleep(0.02)
            time.sleep(0.02)
            print(json.dumps({"step": step, "loss": 3.0, "tokens_per_s": 1.0}), file=file, flush=True)
    return {"step": steps, "seconds": 1.0, "stopped": 0}

def measure(folder, limit):
    return types.SimpleNamespace(held_out=types.SimpleNamespace(loss=2.0, bits_per_byte=3.0))

devices = [types.SimpleNamespace(device_kind="clock")]
sys.modules["jax"] = types.SimpleNamespace(device_count=lambda: 1, devices=lambda: devices, __version__="none")
sys.modules["optax"] = types.SimpleNamespace(GradientTransformation=None)
sys.modules["mmx.analysis.counts"] = types.SimpleNamespace(
    count_params=lambda c: types.SimpleNamespace(total=3, active=1, active_all=2), flops_training=lambda c, length: 1e3,
    flops_companion=lambda c, length: 1e3, flops_tile=lambda c: 0.0)
sys.modules["mmx.layers.kinds"] = types.SimpleNamespace(check_pattern=lambda pattern: None)
for name, function in (TRAIN, train), (MEASURE, measure):
    module, _, attribute = name.rpartition(".")
    sys.modules[module] = types.SimpleNamespace(**{attribute: function})
"""


def test_a_real_sigkill_loses_no_row(place, tmp_path):
    """Local processes train without JAX: each waits after step 20 until the file `go_on` exists."""
    command = place('{"train.seed": [0, 1, 2], "steps": [40]}')
    command[command.index("inline")] = "local"
    out, go_on, rng = tmp_path / "out", tmp_path / "go_on", random.Random(0)
    names = f"CONTINUE, TRAIN, MEASURE = {str(go_on)!r}, {TRAIN!r}, {MEASURE!r}\n"
    (tmp_path / "sitecustomize.py").write_text(names + SLOW)

    def start():
        with (tmp_path / "output").open("w") as output:
            return subprocess.Popen([sys.executable, "-m", "mmx.cli", *command, "--jobs", "2", "--rate", "1e9"],
                                    env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, stdout=output, stderr=output)

    def kill_sweep_after(files, count):
        process, deadline = start(), time.monotonic() + 120
        while len(list(out.glob(files))) < count:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(rng.random())
        process.kill()
        process.wait()

    def finished():
        return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("runs/*/row.json")}

    kill_sweep_after("runs/*/metrics.jsonl", 2)     # its runs continue
    process = start()       # this sweep leaves them to the processes that train them
    time.sleep(3 + rng.random())
    process.kill()
    process.wait()
    assert len(list(out.glob("runs/*"))) == 2
    go_on.touch()
    kill_sweep_after("runs/*/row.json", 1)
    for log in (out / "jobs").glob("*/*_0_log.err"):      # runs that continue: children of the processes that name the logs
        children = Path("/proc", log.name.partition("_")[0], "task", log.name.partition("_")[0], "children")
        for child in children.read_text().split() if children.exists() else ():
            os.kill(int(child), signal.SIGKILL)
    before, process = finished(), start()
    assert process.wait(180) == 0, (tmp_path / "output").read_text()
    assert sorted(row["train.seed"] for row in rows(tmp_path)) == [0, 1, 2]
    assert before and {name: finished()[name] for name in before} == before     # finished rows were not written again
    for name in finished():     # no two processes trained the same run
        assert [record["step"] for record in metrics.read(out / "runs" / name)] == list(range(1, 41))
