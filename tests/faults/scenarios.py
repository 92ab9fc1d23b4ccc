"""The fault scenarios: each injects faults, raises where a guarantee of docs/reliability.md fails, and returns a summary.

Those with an argument `seconds` stop after that time with a TimeoutError; called again on the same folder, they continue.
"""
import collections
import contextlib
import io
import itertools
import json
import math
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
from harness import ROWS, Workspace, assert_one_line, assert_same, checkpoint_state, fill, free_port, records, small_disk

from mmx import mesh as meshes
from mmx.checkpoints import manager
from mmx.checkpoints.manager import Checkpoints
from mmx.files import checksums
from mmx.launch import processes
from mmx.training import metrics

ENDLESS = 10 ** 9       # steps of a run that must not end early, however fast the machine is
GONE = re.compile(r"mmx: .*; this process ends too, and the same command resumes from the last checkpoint$")


def uninterrupted(workspace: Workspace, name: str = "whole", **options) -> Path:
    """The workdir of an uninterrupted run, which trains at the first call."""
    workdir = workspace.folder / name
    if not workdir.exists():
        assert (run := workspace.run(workspace.train(name, **options), 600)).code == 0, run.output
    return workdir


def step_of(workdir: Path) -> int:
    """The last step in metrics.jsonl, or 0."""
    last = metrics.latest(workdir)
    return last["step"] if last else 0


def finish(workspace: Workspace, workdir: Path) -> None:
    """Resumes a run that had no last step, for 20 steps. Checks that it ends with the bits of an uninterrupted run."""
    steps = step_of(workdir) + 20
    assert (run := workspace.run(workspace.train(workdir, train__steps=steps), 1200)).code == 0, run.output
    assert_same(workdir, uninterrupted(workspace, f"whole_{steps}", train__steps=steps))


def kills(workspace: Workspace, signals: list, rng: random.Random, seconds: float = math.inf) -> str:
    """One run is ended by each of the signals: before its first step, during a step or a save. It ends with the same bits.

    The clock of some of its processes jumps. The learning rate of the run does not depend on its number of steps.
    """
    workdir, notes = workspace.folder / "kills", workspace.folder / "kills.json"
    found = collections.Counter(json.loads(notes.read_text()) if notes.exists() else {})
    if not found:
        shutil.rmtree(workdir, ignore_errors=True)
    deadline = time.monotonic() + seconds
    for number in signals[sum(found.values()):]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{sum(found.values())} of {len(signals)} in {seconds:.0f} s; the same command continues")
        first, moment = step_of(workdir), rng.choice(("start", "step", "step", "save", "save"))
        run = workspace.start(workspace.train("kills", train__steps=ENDLESS), clock=rng.choice((0, 0, 86_400)))
        if moment == "start":
            time.sleep(rng.uniform(0, 4))
        else:
            _wait_for(run, lambda: step_of(workdir) > first)
            time.sleep(rng.uniform(0, 0.4))
        if moment == "save":
            _wait_for(run, lambda: _is_saving(workdir))
            time.sleep(rng.uniform(0, 0.05))
        assert run.alive(), f"the run ended early, after {sum(found.values())} signals: {run.output}"
        if number == signal.SIGSTOP:    # a stopped process still holds the workdir
            run.signal(number)
            if (workdir / "run.lock").exists():
                assert_one_line(workspace.run(workspace.train("kills")), 2, rf"is in use: process {run.pid} on ")
            run.signal(signal.SIGCONT)
            run.signal(signal.SIGKILL)
        run.signal(number)
        run.wait()
        assert run.code in ((0, -signal.SIGTERM) if number == signal.SIGTERM else (-signal.SIGKILL,)), run.output
        found[f"{number.name} during a save" if _is_saving(workdir) else f"{number.name} " + (
            "before a step" if step_of(workdir) <= first else "during a step")] += 1
        notes.write_text(json.dumps(found))
    finish(workspace, workdir)
    notes.unlink()
    return f"{', '.join(f'{many} {what}' for what, many in sorted(found.items()))}; same bits after {step_of(workdir):,} steps"


def _wait_for(run, condition) -> None:
    while run.alive() and not condition():
        time.sleep(0.005)


def _is_saving(workdir: Path) -> bool:
    return any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp"))


def damage(workspace: Workspace, count: int, rng: random.Random) -> str:
    """Damages every file of a checkpoint: a flipped bit in each byte range; cut, emptied, removed and lengthened files."""
    origin = uninterrupted(workspace)
    abstract = [_abstract(manager.find_step(origin)[1], item) for item in ("params", "opt")]
    workdir = workspace.folder / "damage"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(origin, workdir)
    newest, older = sorted((int(p.name) for p in (workdir / "checkpoints").iterdir()), reverse=True)
    step = workdir / "checkpoints" / str(newest)
    want = {newest: _restore(workdir, abstract)[1:]}
    aside = workdir / "aside"
    step.rename(aside)
    want[older] = _restore(workdir, abstract)[1:]
    aside.rename(step)
    files = sorted(p.relative_to(step) for p in step.rglob("*") if p.is_file())
    ranges = max(1, -(-count // len(files)) - 4)
    cases = unverified = 0
    for name in files:
        raw = (step / name).read_bytes()
        bounds = np.linspace(0, len(raw), min(ranges, len(raw)) + 1).astype(int)
        changes = [_flip_bit(raw, rng.randrange(8 * low, 8 * high)) for low, high in itertools.pairwise(bounds)]
        changes += [raw[:rng.randrange(len(raw))], raw[:-1], b"", None, raw + b"\0"]
        for changed in changes:
            (step / name).unlink()
            if changed is not None:
                (step / name).write_bytes(changed)
            found, *rest = _restore(workdir, abstract)
            cases += 1
            if found == newest:     # without checksums.json a checkpoint is read without verification
                assert name.name == checksums.NAME and changed is None, (name, changed)
                unverified += 1
            else:
                assert found == older and (step.parent / f"{newest}.damaged").is_dir()
                (step.parent / f"{newest}.damaged").rename(step)
            jax.tree.map(np.testing.assert_array_equal, tuple(rest), tuple(want[found]))
            (step / name).write_bytes(raw)
    assert _restore(workdir, abstract)[0] == newest
    return f"{cases} cases in {len(files)} files; {unverified} without checksums.json, read without verification"


def _flip_bit(raw: bytes, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _abstract(step: Path, item: str):
    tree = {}
    for path, array in manager.open_arrays(step, item).items():
        below = tree
        for key in path[:-1]:
            below = below.setdefault(key, {})
        below[path[-1]] = jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
    return tree


def _restore(workdir: Path, abstract):
    """What a resumed run would restore. A damaged checkpoint is reported in one line that names the file."""
    output = io.StringIO()
    with contextlib.redirect_stderr(output):
        step, params, opt, data = Checkpoints(workdir, 5, 2).restore(*abstract)
    lines = output.getvalue().splitlines()
    assert len(lines) <= 1 and all(re.match(r"mmx: .* is damaged, \S+ .*: renamed to \d+\.damaged; the run resumes from",
                                            line) for line in lines), lines
    return step, params, opt, data


def full_disk(workspace: Workspace) -> str:
    """The disk fills up during a save, logging, an export and a sweep: one line, no damage; all resume once there is space."""
    reference, done = uninterrupted(workspace), []
    with small_disk(workspace.folder / "small", 24) as disk:
        if disk is None:
            return "skipped: no file system could be mounted"
        workdir = disk / "run"
        run = workspace.start(workspace.train(workdir, train__steps=ENDLESS))
        _wait_for(run, lambda: step_of(workdir) > 5)
        filler = fill(disk)
        run.wait()
        assert_one_line(run, 2, r"mmx: (a checkpoint needs .* has 0\.0\d\d GB free: make room|step \d+ could not be saved"
                         r"|.*metrics\.jsonl: No space left)")
        _assert_steps_complete(workdir)
        done.append("save")
        assert_one_line(workspace.run(workspace.train(workdir, train__steps=ENDLESS)), 2, r"No space left on device|make room")
        filler.unlink()
        finish(workspace, workdir)
        done.append("resume")

        for board in (False, True):         # without and with TensorBoard, which writes in a thread
            workdir = disk / f"log{board}"
            options = {"checkpoint__every": 10 ** 6, "train__steps": ENDLESS, "train__tensorboard": board}
            run = workspace.start(workspace.train(workdir, **options))
            _wait_for(run, lambda: step_of(workdir))
            filler = fill(disk)
            run.wait(240)
            assert_one_line(run, 2, r"metrics\.jsonl: No space left on device|tfevents.*: No space left on device")
            filler.unlink()
            assert workspace.run(workspace.train(workdir, **options | {"train__steps": 20})).code == 0
            assert [r["step"] for r in records(workdir)] == list(range(1, 21))
            shutil.rmtree(workdir)
        done.append("logging")

        before = checkpoint_state(reference)
        filler = fill(disk, 20_000)
        run = workspace.run(["convert", "to-hf", "--checkpoint", str(reference), "--out", str(disk / "hf")])
        assert_one_line(run, 2, "No space left on device|cannot be written")
        assert sorted(p.name for p in disk.iterdir()) == ["filler", "run"] and checkpoint_state(reference) == before
        filler.unlink()
        assert workspace.run(["convert", "to-hf", "--checkpoint", str(reference), "--out", str(disk / "hf")]).code == 0
        done.append("export")

        sweep = ["sweep", "--config", str(workspace.config), "--out", str(disk / "sweep"), "--rate", "1e9",
                 "--config.train.steps=200"]
        run = workspace.start(sweep)
        _wait_for(run, lambda: list(disk.glob("sweep/runs/*/checkpoints/5")))
        filler = fill(disk)
        run.wait()
        assert run.code in (1, 2) and not any("Traceback" in line for line in run.lines), run.output
        assert re.search("make room|No space left|could not be saved", run.lines[-1]), run.lines
        filler.unlink()
        run = workspace.run(sweep)
        assert run.code == 0 and len((disk / "sweep" / "runs.jsonl").read_text().splitlines()) == 2, run.output
        done.append("sweep")
    return ", ".join(done)


def short_files(workspace: Workspace) -> str:
    """A write fails in the thread in which Orbax saves."""
    reference = uninterrupted(workspace)
    largest = max(p.stat().st_size for p in manager.find_step(reference)[1].rglob("*") if p.is_file())
    workdir = workspace.folder / "short"
    shutil.rmtree(workdir, ignore_errors=True)
    run = workspace.run(workspace.train("short"), file_bytes=largest // 2)
    assert_one_line(run, 2, r"mmx: step 5 could not be saved in .*: .*; earlier checkpoints are complete")
    assert not list((workdir / "checkpoints").glob("[0-9]"))
    assert workspace.run(workspace.train("short")).code == 0
    assert_same(workdir, reference)
    return "1 save failed, the next start resumed the run"


def _assert_steps_complete(workdir: Path) -> None:
    for step in (workdir / "checkpoints").iterdir():
        assert not step.name.isdecimal() or checksums.find_damage(step) == "", step


def read_only(workspace: Workspace) -> str:
    """An existing and a new run on a read-only disk end with one line."""
    with small_disk(workspace.folder / "frozen", 8) as disk:
        if disk is None:
            return "skipped: no file system could be mounted"
        shutil.copytree(uninterrupted(workspace), disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for name in ("run", "new"):
            assert_one_line(workspace.run(workspace.train(disk / name)), 2, f"^mmx: {disk}.*: Read-only file system$")
    return "an existing and a new run: one line each"


def two_runs(workspace: Workspace) -> str:
    """A second run on a workdir is refused, and the first one is not affected."""
    workdir = workspace.folder / "two"
    shutil.rmtree(workdir, ignore_errors=True)
    first = workspace.start(workspace.train("two", train__steps=ENDLESS))
    while first.alive() and not (workdir / "run.lock").exists():
        time.sleep(0.01)
    second = workspace.run(workspace.train("two"))
    assert_one_line(second, 2, rf"^mmx: {workdir} is in use: process {first.pid} on \S+, since [-\d]+ [:\d]+ \S+, trains there;"
                               " wait")
    _wait_for(first, lambda: step_of(workdir) > 5)
    first.signal(signal.SIGTERM)
    assert first.wait().code == 0
    finish(workspace, workdir)
    return "the second run was refused, and the first one named"


def clock(workspace: Workspace) -> str:
    """The system clock jumps by a day, forward and back, three times a second."""
    shutil.rmtree(workspace.folder / "clock", ignore_errors=True)
    run = workspace.run(workspace.train("clock"), clock=86_400)
    assert run.code == 0, run.output
    assert_same(workspace.folder / "clock", uninterrupted(workspace))
    return "same bits"


def ranks(workspace: Workspace) -> str:
    """One of two processes is killed: the other reports it and ends within a minute. Restarted, both end with the same bits."""
    options, slow = {"mesh__edp": 2}, {"checkpoint__every": 20, "train__steps": ENDLESS}
    waits = []
    for victim in (0, 1):
        name = f"rank{victim}"
        shutil.rmtree(workspace.folder / name, ignore_errors=True)
        runs = _start_processes(workspace, workspace.train(name, **options | slow), 2)
        while all(run.alive() for run in runs) and step_of(workspace.folder / name) < 25:
            time.sleep(0.05)
        children = subprocess.run(["pgrep", "-P", str(runs[victim].pid)], capture_output=True, text=True).stdout.split()
        for pid in (str(runs[victim].pid), *children):
            subprocess.run(["kill", "-KILL", pid], check=False)
        start, other = time.monotonic(), runs[1 - victim].wait(90)
        waits.append(time.monotonic() - start)
        assert other.code == processes.DEAD and GONE.search(other.lines[-1]), (other.code, other.lines)
        runs[victim].wait()
        options["train__steps"] = max(workspace.steps, step_of(workspace.folder / name) + 20)
        codes = [run.wait(300).code for run in _start_processes(workspace, workspace.train(name, **options), 2)]
        assert codes == [0, 0]
        assert_same(workspace.folder / name, uninterrupted(workspace, f"two_ranks_{options['train__steps']}", **options))
    assert max(waits) < 60, waits
    return f"the other process ended after {waits[0]:.0f} s and {waits[1]:.0f} s"


def _start_processes(workspace: Workspace, command, count: int, **settings):
    if count == 1:
        return [workspace.start(command, **settings)]
    port = free_port()
    command = [*command, "--coordinator", f"127.0.0.1:{port}", "--processes", str(count)]
    return [workspace.start([*command, "--process", str(process)], **{k: f"{v}.{process}" for k, v in settings.items()})
            for process in range(count)]


def elastic(workspace: Workspace, count: int, rng: random.Random, seconds: float = math.inf, steps: int = 200) -> str:
    """Restarts a run `count` times on random numbers of processes, devices and meshes: its losses and rows stay the same.

    Each loss is compared with the uninterrupted run in float64. In float32 only the first loss after each restart is compared,
    with one device that continues from the same checkpoint.
    """
    rows, reference, workdir = workspace.folder / "rows", workspace.folder / "uninterrupted", workspace.folder / "elastic"
    if not reference.exists():
        run = workspace.run(workspace.train("uninterrupted", train__steps=steps), 900, record=str(rows))
        assert run.code == 0, run.output
    want, notes = {r["step"]: r for r in records(reference)}, workspace.folder / "elastic.json"
    deadline = time.monotonic() + seconds
    if not notes.exists():
        for path in (workdir, *workspace.folder.glob("parts.*")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        bounds, known = sorted(rng.sample(range(2, steps), count)) + [steps], _layouts(workspace, rng)
        notes.write_text(json.dumps({"plan": [(bound, *rng.choice(known)) for bound in bounds], "done": 0, "worst": 0.0}))
    plan, done, worst = json.loads(notes.read_text()).values()
    for number, (bound, processes_, mesh) in enumerate(plan[done:], done):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{number} of {len(plan)} in {seconds:.0f} s, worst {worst:.1e}; the same command continues")
        first = plan[number - 1][0] if number else 0
        options = {f"mesh__{axis}": size for axis, size in mesh.items()} | {"train__steps": bound}
        first_loss = None if workspace.x64 or not first else _first_loss(workspace, workdir)
        for part in workspace.folder.glob(f"parts.{number:03}*"):
            part.unlink()
        for run in _start_processes(workspace, workspace.train("elastic", **options), processes_,
                             record=str(workspace.folder / f"parts.{number:03}")):
            assert run.wait(900).code == 0, run.output
        found = {r["step"]: r for r in records(workdir)}
        for step in range(first + 1, bound + 1):
            assert found[step]["tokens"] == want[step]["tokens"]
            if workspace.x64:
                worst = max(worst, abs(found[step]["loss"] / want[step]["loss"] - 1))
        if first_loss is not None:
            worst = max(worst, abs(found[first + 1]["loss"] / first_loss - 1))
        notes.write_text(json.dumps({"plan": plan, "done": number + 1, "worst": worst}))
    assert worst <= (1e-9 if workspace.x64 else 1e-6), worst
    micros = _rows(workspace.folder.glob("parts.*"))
    assert micros == _rows([rows]), "the rows differ from the rows of the uninterrupted run"
    epochs, layouts = _count_epochs(micros, workspace.documents), {json.dumps(layout) for _, *layout in plan}
    notes.unlink()
    return (f"{count} restarts, {len(layouts)} layouts; largest relative difference of a loss {worst:.1e}; {epochs} epochs, "
            f"each with all {workspace.documents} documents once")


def _layouts(workspace: Workspace, rng: random.Random, count: int = 4) -> list:
    """Random pairs (processes, mesh axes), `count` each for one and two processes, with up to eight devices."""
    from mmx.launch import experiments

    e, found = experiments.read(str(workspace.config), []), {1: [], 2: []}
    for sizes in itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 4)):
        mesh, world = dict(zip(("edp", "ep", "etp", "seq"), sizes)), int(np.prod(sizes))
        if world <= 8 and not meshes.mesh_error(e, {"slice": 1, **mesh}):
            for number in found:
                if world % number == 0 and _splits_evenly(sizes, number):
                    found[number].append((number, mesh))
    return [layout for layouts in found.values() for layout in rng.sample(layouts, count)]


def _splits_evenly(sizes, processes: int) -> bool:
    """Whether each process has all devices of some rows, or a part of the devices of one row."""
    own, inner = int(np.prod(sizes)) // processes, sizes[2] * sizes[3]
    return own % inner == 0 or inner % own == 0


def _first_loss(workspace: Workspace, workdir: Path) -> float:
    """The loss of the next step, computed from the last checkpoint on one device."""
    from mmx.checkpoints.convert import load
    from mmx.data import pipeline
    from mmx.launch import experiments
    from mmx.model import Model
    from mmx.training import loss as losses

    e, loaded = experiments.read(str(workspace.config), []), load(workdir)
    stream = pipeline.stream(e.data, e.train)
    step = manager.find_step(workdir)[1]
    stream.restore(json.loads((step / "data" / "metadata").read_text())["stream"])
    count = e.train.micro_batches(e.train.tokens_seen(int(step.name)))
    if "loss" not in vars(workspace):
        workspace.loss = jax.jit(lambda params, batch: losses.loss(Model(e.model), params, batch, e.train.loss_chunk)[1])
    found = [workspace.loss(loaded.params, stream.next()) for _ in range(count)]
    weights = [float(m["target_count"]) for m in found]
    return float(np.average([float(m["loss"]) for m in found], weights=weights))


def _rows(paths) -> dict[int, list]:
    """By micro-batch: the checksums of the rows of all hosts, and how many documents began in them."""
    micros = collections.defaultdict(dict)
    for path in paths:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            micros[record["micro"]][record["first"] or 0] = record["rows"], record["bos"]
    return {micro: ([row for _, (rows, _) in sorted(parts.items()) for row in rows], sum(bos for _, bos in parts.values()))
            for micro, parts in sorted(micros.items())}


def _count_epochs(micros: dict, documents: int) -> int:
    """The number of complete epochs. Each has every row once, and every document begins once."""
    assert list(micros) == list(range(len(micros)))
    rows = [row for rows, _ in micros.values() for row in rows]
    starts = [bos for _, bos in micros.values()]
    epochs, size = len(rows) // ROWS, ROWS // 4
    for epoch in range(epochs):
        assert len(set(rows[epoch * ROWS:(epoch + 1) * ROWS])) == ROWS
        assert sum(starts[epoch * size:(epoch + 1) * size]) == documents
    assert len(set(rows)) == ROWS
    return epochs


def memory(workspace: Workspace, seconds: float) -> str:
    """The resident memory of a run does not grow: the medians of its first tenth after warm-up and of its last tenth agree."""
    workdir = workspace.folder / "memory"
    shutil.rmtree(workdir, ignore_errors=True)
    options = {"train__steps": ENDLESS, "train__tensorboard": True, "train__eval_every": 500, "checkpoint__every": 200}
    run, found, start = workspace.start(workspace.train(workdir.name, **options)), [], time.monotonic()
    while run.alive() and time.monotonic() - start < seconds:
        time.sleep(min(1, seconds / 100))
        pages = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1])
        found.append(pages * 4096 / 2 ** 20)
    assert run.alive(), run.output
    run.signal(signal.SIGTERM)
    assert run.wait(120).code == 0, run.output
    tenth = max(1, len(found) // 10)
    first, last = (float(np.median(part)) for part in (found[tenth:2 * tenth], found[-tenth:]))
    summary = f"{step_of(workdir):,} steps, {first:.0f} MiB after warm-up, {last:.0f} MiB at the end: {last / first - 1:+.1%}"
    assert abs(last / first - 1) <= 0.02, summary
    return summary
