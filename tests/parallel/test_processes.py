"""Runs of several real processes: they equal the run of one process, save and resume it, and report errors in one line."""
import contextlib
import io
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mmx import cli
from mmx import mesh as meshes
from mmx.checkpoints import manager
from mmx.config import ConfigError
from mmx.launch import processes
from mmx.training import metrics

ROOT = Path(__file__).parents[2]
SAVED, STEPS, EVAL_EVERY = 5, 15, 7      # a run is resumed from step SAVED
EXPERIMENT = f"""\
from mmx.config import default

def get_config():
    config = default()
    config.model.dim, config.model.layers, config.model.pattern = 16, 1, "L"
    config.model.heads, config.model.kv_heads, config.model.head_dim, config.model.rotary_dim = 2, 1, 8, 4
    config.model.experts, config.model.expert_dim, config.model.capacity = 4, 16, 1.0
    config.model.init, config.model.embed_std, config.model.dtype = "fan_in", 1.0, "float64"
    config.train.steps, config.train.batch, config.train.length, config.train.decay = 2_000, 4, 32, 0.0
    config.train.ramp, config.train.warmup, config.train.lr = ((0, 2),), 2, 1e-2
    config.train.tensorboard, config.train.eval_every, config.train.eval_bytes = False, {EVAL_EVERY}, 500
    config.checkpoint.every, config.checkpoint.keep = {SAVED}, 1_000
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("processes"), np.random.default_rng(0)
    (folder / "small.py").write_text(EXPERIMENT)
    (folder / "text").mkdir()
    for name in "abcdefgh":     # from a few words to a few rows
        words = rng.choice(["state ", "of ", "the ", "union ", "people "], rng.integers(10, 500))
        (folder / "text" / f"{name}.txt").write_text("".join(words))
    return folder


def arguments(place, workdir, mesh, **options):
    options = {"data.sources": f"('{place / 'text'}',)", "mesh.edp": 1, **{f"mesh.{k}": v for k, v in mesh.items()}, **options}
    return ["train", "--config", str(place / "small.py"), "--workdir", str(place / workdir),
            *(f"--config.{key}={value}" for key, value in options.items())]


def start(command, environment=()):
    return subprocess.Popen([sys.executable, "-m", "mmx.cli", *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "JAX_ENABLE_X64": "1", **dict(environment)})


def free_port(first=0):
    """Returns a free port, `first` or above; 0: any."""
    for port in range(first, first + 96):
        with contextlib.suppress(OSError), socket.create_server(("", port)) as server:
            return server.getsockname()[1]


def by_hand(command, count, which=None, port=None, timeout=300):
    """Starts the processes of one run with --coordinator."""
    port = port or free_port()
    return [start([*command, "--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--process", str(process),
                   "--timeout", str(timeout)]) for process in (range(count) if which is None else which)]


def by_slurm(command, count, which=None):
    """Starts the processes of one run with the environment that srun gives them."""
    lowest = 65535 - 4095
    job = free_port(lowest + random.randrange(4000)) - lowest      # JAX derives the port from it
    return [start(command, {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count),
                            "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)})
            for process in (range(count) if which is None else which)]


def wait_until_ended(started, within):
    """Returns (exit code, standard output, lines of standard error without the progress bar) of each; kills the late ones."""
    deadline, results = time.monotonic() + within, []
    try:
        for process in started:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            lines = [line for line in re.split("[\r\n]", err) if line.strip() and not line.startswith("train: ")]
            results.append((process.returncode, out, lines))
    finally:
        for process in started:
            process.kill()
    return results


def wait_for(workdir, step, started, within=600):
    """Waits until the run has logged `step`."""
    deadline = time.monotonic() + within
    while not any(r["step"] >= step for r in metrics.read(workdir)):
        if time.monotonic() > deadline or any(process.poll() is not None for process in started):
            pytest.fail("\n".join(str(end) for end in wait_until_ended(started, 90)))
        time.sleep(0.1)


def train_alone(place, workdir, **mesh):
    """Trains to step STEPS in this process and returns what it prints."""
    command = arguments(place, workdir, mesh, **{"train.steps": STEPS})
    with jax.enable_x64(True), contextlib.redirect_stdout(io.StringIO()) as output:
        assert cli.main(command) == 0
    return output.getvalue()


def assert_same_run(workdir, whole, first=1, last=STEPS):
    """Steps `first` to `last` have the same tokens, losses, gradient norms and dropped tokens."""
    got, want = ({r["step"]: r for r in metrics.read(path)} for path in (workdir, whole))
    for step in range(first, last + 1):
        assert got[step]["tokens"] == want[step]["tokens"]
        for name in ("loss", "grad_norm", "aux_loss", "drop_rate"):
            assert got[step][name] == pytest.approx(want[step][name], rel=1e-9), (step, name)
    assert any(r["drop_rate"] for r in want.values())


@pytest.fixture(scope="module")
def whole(place):
    """A run of one process with eight devices: its workdir, and what it printed."""
    return place / "whole", train_alone(place, "whole", edp=2, ep=2, seq=2)


@pytest.fixture(scope="module")
def two(place):
    """A run of two processes with four devices each, until one gets SIGTERM: its workdir, and how the processes ended."""
    started = by_hand(arguments(place, "two", {"edp": 2, "ep": 2, "seq": 2}), 2)
    wait_for(place / "two", STEPS, started)
    started[1].send_signal(signal.SIGTERM)
    return place / "two", wait_until_ended(started, 240)


@pytest.fixture(scope="module")
def four(two, place):
    """Four processes with two devices each resume the run of `two`; two of them read the same rows. One is killed.

    Returns the workdir, and a future of how the processes ended: within a minute, or two if other work shares the cores.
    """
    copy_run(two, place, "four")
    options = {"checkpoint.every": STEPS, "train.eval_every": 0}
    started = by_slurm(arguments(place, "four", {"edp": 2, "etp": 2, "seq": 2}, **options), 4)
    wait_for(place / "four", STEPS, started)
    started[2].kill()
    return place / "four", ThreadPoolExecutor(1).submit(wait_until_ended, started, 120)


def copy_run(two, place, name):
    """Copies the run of `two` as it was at step SAVED."""
    (place / name / "checkpoints").mkdir(parents=True)
    shutil.copy(two[0] / "config.json", place / name)
    shutil.copytree(two[0] / "checkpoints" / str(SAVED), place / name / "checkpoints" / str(SAVED))


def test_two_processes_equal_one(two, whole):
    """In loss, gradients, dropped tokens and evaluation, with packed documents."""
    assert_same_run(two[0], whole[0])
    (_, out, _), (_, other, _) = two[1]
    want = re.findall(r"^step \d+: validation/bits_per_byte .*", whole[1], re.M)
    assert len(want) == 2 and re.findall(r"^step \d+: validation/bits_per_byte .*", out, re.M)[:2] == want
    assert other == ""


def test_sigterm_to_one_process_saves_one_step(two):
    workdir, (first, second) = two
    assert (first[0], second[0]) == (0, 0) and (first[2], second[2]) == ([], [])
    step = int(manager.find_step(workdir)[1].name)
    assert [r["step"] for r in metrics.read(workdir)] == list(range(1, step + 1))
    assert f"stopped at step {step:,} and saved" in first[1]


def test_four_processes_resume(four, whole):
    assert_same_run(four[0], whole[0], SAVED + 1)


@pytest.mark.parametrize("mesh", [{"edp": 2, "etp": 2, "seq": 2}, {}], ids=["1x8", "1x1"])
def test_one_process_resumes(mesh, two, whole, place):
    name = f"one{len(mesh)}"
    copy_run(two, place, name)
    train_alone(place, name, **mesh)
    assert_same_run(place / name, whole[0], SAVED + 1)


@pytest.mark.parametrize("count, which, within, message", [
    (3, (0, 1), 8, r"process 2 of 3 did not connect to 127.0.0.1:\d+ within 8 s"),
    (2, (1,), 1, r"process 0 did not answer at 127.0.0.1:\d+ within 1 s \(Connection refused\)"),
    (3, (0, 1, 1), 30, r"two processes were started with --process=1")])
def test_missing_and_duplicate_processes_are_reported(count, which, within, message, place):
    started = by_hand(arguments(place, "never", {}), count, which, timeout=within)
    for code, out, lines in wait_until_ended(started, 120):
        assert code == 2 and out == "" and len(lines) == 1 and re.fullmatch(f"mmx: {message}", lines[0]), lines
    assert not (place / "never").exists()


def test_processes_that_slurm_does_not_start_are_reported(place):
    (code, out, lines), = wait_until_ended(by_slurm([*arguments(place, "never", {}), "--timeout", "1"], 2, (0,)), 120)
    assert (code, out) == (2, "")
    assert lines == ["mmx: not all processes connected to the coordinator of SLURM_STEP_NODELIST=localhost within 1 s; "
                     "SLURM_NTASKS=2 in the environment asks for several processes: to train in one, unset it or give "
                     "--processes 1"]


@pytest.mark.parametrize("edp, rates, message", [
    (1, (1, 1), "the mesh uses 1 of the 2 devices of 2 processes, but it must use all of them. "
     "Set one axis to -1 to use all devices"),
    (2, (1, 2), "process 1 has a different experiment than process 0: run the same command for every process; "
     "only --process may differ")])
def test_every_process_reports_an_invalid_experiment(edp, rates, message, place):
    port = free_port()
    started = [by_hand(arguments(place, "never", {"edp": edp}, **{"train.lr": rates[process]}), 2, (process,), port)[0]
               for process in range(2)]
    for code, _, lines in wait_until_ended(started, 200):
        assert code == 2 and lines == [f"mmx: {message}"]
    assert not (place / "never").exists()


@pytest.mark.parametrize("given, message", [
    ((None, 2, 0), "^--coordinator, --processes, --process must be given together: --coordinator is missing$"),
    (("here", 2, 0), "^--coordinator=here must be HOST:PORT of process 0, such as 10.0.0.1:9000$"),
    (("here:65536", 2, 0), "^--coordinator=here:65536 must be HOST:PORT of process 0"),
    (("here:1", 2, 2), "^--process=2 must be at least 0 and below --processes=2$")])
def test_invalid_arguments(given, message):
    with pytest.raises(ConfigError, match=message):
        processes.find_world(*given, 300)


SLURM = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}


@pytest.mark.case(22)
def test_variables_of_a_launcher_can_be_overruled(monkeypatch):
    monkeypatch.setattr(os, "environ", SLURM)
    assert processes.find_world(None, 1, None, 300) is None
    advice = processes.advice(processes.find_world(None, None, None, 300))
    assert advice == ("; SLURM_NTASKS=4 in the environment asks for several processes: to train in one, unset it or give "
                      "--processes 1")
    monkeypatch.setattr(os, "environ", SLURM | {"SLURM_NTASKS": "four"})
    with pytest.raises(ConfigError, match="^SLURM_NTASKS='four' in the environment must be a number .* give --processes 1"):
        processes.find_world(None, None, None, 300)


@pytest.mark.case(22)
def test_the_message_about_absent_processes_says_how_to_train_in_one():
    log = "E0000 00:00:00.0 1 coordination_service_agent.cc:1] RegisterTask timed out"
    code = (f"import os, sys\nfrom mmx.launch import processes\ndef run():\n  os.write(2, b'{log}\\n')\n"
            "  os.kill(os.getpid(), 6)\n"
            "sys.exit(processes.supervise(processes.find_world(None, None, None, 7), run))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | SLURM | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (2, "") and done.stderr == (
        "mmx: not all processes connected to the coordinator of SLURM_STEP_NODELIST=n[1-4] within 7 s; SLURM_NTASKS=4 in the "
        "environment asks for several processes: to train in one, unset it or give --processes 1\n")


@pytest.mark.parametrize("variables, where", [
    ({}, None), ({"SLURM_NTASKS": "4"}, None), ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, None),
    ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}, "SLURM_STEP_NODELIST=n[1-4]"),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "uri"}, "OMPI_MCA_orte_hnp_uri=uri"),
    ({"TPU_WORKER_HOSTNAMES": "a"}, None), ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES=a,b"),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "TPU_WORKER_HOSTNAMES=a")])
def test_processes_are_found_in_the_environment(variables, where, monkeypatch):
    monkeypatch.setattr(os, "environ", {"TPU_SKIP_MDS_QUERY": "1", **variables})
    world = processes.find_world(None, None, None, 300)
    assert (world and world.where) == (where and f"the coordinator of {where}")


@pytest.mark.parametrize("sizes, local, process, want", [
    ((1, 4, 1, 1, 2), 4, 1, (1, 2)), ((1, 2, 2, 2, 1), 8, 0, (0, 1)), ((1, 2, 1, 2, 4), 4, 1, (0, 2)),
    ((1, 2, 1, 2, 4), 4, 2, (1, 2)), ((2, 1, 2, 1, 2), 2, 3, (3, 4)), ((2, 1, 1, 2, 2), 2, 1, (0, 2)),
    ((1, 1, 1, 1, 8), 2, 3, (0, 1)), ((1, 4, 1, 1, 3), 4, 0, None)])
def test_rows_that_a_process_reads(sizes, local, process, want, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(jax, "local_device_count", lambda: local)
    devices = np.array([SimpleNamespace(process_index=n // local) for n in range(np.prod(sizes))]).reshape(sizes)
    mesh = SimpleNamespace(devices=devices, shape=dict(zip(("slice", "edp", "ep", "etp", "seq"), sizes)))
    if want:
        assert meshes.data_host(mesh) == want
    else:
        with pytest.raises(ConfigError, match="^the number of devices of a process, 4, must be a multiple or a .* = 3: "):
            meshes.data_host(mesh)


def test_other_processes_report_which_one_was_killed(four):
    """Saved checkpoints stay valid."""
    workdir, end = four
    results = end.result()
    assert results.pop(2)[0] == -signal.SIGKILL
    for code, _, lines in results:
        assert code == processes.DEAD and len(lines) == 1, lines
        assert re.match(r"mmx: process 2 died: no heartbeat for 30 s; .* resumes from the last checkpoint$", lines[0])
    assert int(manager.find_step(workdir)[1].name) in (SAVED, STEPS)     # step STEPS was being saved


def test_connection_messages_of_gloo_are_not_printed(capfd):
    """Several threads print them at once, so that their parts are mixed."""
    gloo = ("[Gloo] Rank 0 is connected to [Gloo] Rank 1", "Expected number of connected peer ranks is : 1",
            "[Gloo] Rank [Gloo] Rank 1", "7 is connected to 7 peer ranks. Expected number of connected peer ranks is : 7",
            " is connected to 7", "", "7[Gloo] Rank 2", " peer ranks. ", " is : 3", "7")
    ours = "7 of ours", "", "7", "E0101 00:00:00.0 7 gloo.cc:3] an error of peer ranks 3", "[Gloo] a peer is lost"
    reader, writer = os.pipe()
    os.write(writer, "".join(line + "\n" for line in (*gloo, *ours, *gloo, "ours")).encode())
    os.close(writer)
    processes._pass_on(reader, [])
    assert capfd.readouterr().err.splitlines() == [*ours, "ours"]
