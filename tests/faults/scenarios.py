"""What is done to training, and what must hold: each function raises where it does not, and returns what it counted."""
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
from harness import ROWS, Place, assert_same, fill, free_port, small_disk, state, told

from mmx.checkpoints import manager
from mmx.checkpoints.manager import Checkpoints
from mmx.files import checksums
from mmx.launch import processes
from mmx.parallel import mesh as meshes
from mmx.training import metrics

GONE = re.compile(r"mmx: .*; this process ends too, and the same command resumes from the last checkpoint$")


def whole(place: Place, name: str = "whole", **options) -> Path:
    """The uninterrupted run, made once."""
    workdir = place.folder / name
    if not workdir.exists():
        run = place.done(place.train(name, **options), 600)
        assert run.code == 0, run.text
    return workdir


def step_of(workdir: Path) -> int:
    last = metrics.latest(workdir)
    return last["step"] if last else 0


def one_line(run, code: int, words: str) -> None:
    """A process that ended with a code and one line, besides what said where it was."""
    lines = [line for line in run.lines if not re.match(r"step \d+|trained |written: | +\d+%\|", line)]
    assert run.code == code and len(lines) == 1 and re.search(words, lines[0]), (run.code, lines)


def kills(place: Place, signals: list, rng: random.Random, seconds: float = math.inf) -> str:
    """One run, ended by each signal: on its way to the first step, at a step, amid a save. Same bits at the end.

    The clock of some of its processes leaps. After `seconds` it stops where it is; called again, it goes on.
    """
    end, workdir, notes = whole(place), place.folder / "kills", place.folder / "kills.json"
    found = collections.Counter(json.loads(notes.read_text()) if notes.exists() else {})
    if not found:
        shutil.rmtree(workdir, ignore_errors=True)
    until = time.monotonic() + seconds
    for hurt in signals[sum(found.values()):]:
        if time.monotonic() > until:
            raise TimeoutError(f"{sum(found.values())} of {len(signals)} in {seconds:.0f} s; the same command goes on")
        since, moment = step_of(workdir), rng.choice(("start", "step", "step", "save", "save"))
        run = place.start(place.train("kills"), clock=rng.choice((0, 0, 86_400)))
        if moment == "start":
            time.sleep(rng.uniform(0, 4))
        else:
            _until(run, lambda: step_of(workdir) > since)
            time.sleep(rng.uniform(0, 0.4))
        if moment == "save":
            _until(run, lambda: _half(workdir))
            time.sleep(rng.uniform(0, 0.05))
        assert run.alive(), f"the run ended after {sum(found.values())} ends, give it more steps: {run.text}"
        if hurt == signal.SIGSTOP:      # it is silent, and still holds the workdir
            run.signal(hurt)
            if (workdir / "run.lock").exists():
                one_line(place.done(place.train("kills")), 2, rf"is in use: process {run.pid} on ")
            run.signal(signal.SIGCONT)
            run.signal(signal.SIGKILL)
        run.signal(hurt)
        run.end()
        assert run.code in ((0, -signal.SIGTERM) if hurt == signal.SIGTERM else (-signal.SIGKILL,)), run.text
        found[f"{hurt.name} amid a save" if _half(workdir) else f"{hurt.name} " + (
            "before new steps were told" if step_of(workdir) <= since else "at a step")] += 1
        notes.write_text(json.dumps(found))
    run = place.done(place.train("kills"), 1200)
    assert run.code == 0, run.text
    assert_same(workdir, end)
    notes.unlink()
    return f"{', '.join(f'{many} {what}' for what, many in sorted(found.items()))}; same bits after {step_of(workdir):,} steps"


def _until(run, there) -> None:
    while run.alive() and not there():
        time.sleep(0.005)


def _half(workdir: Path) -> bool:
    return any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp"))


def damage(place: Place, count: int, rng: random.Random) -> str:
    """Every file of a step, each of its byte ranges with one bit turned, cut, emptied, removed, and lengthened."""
    origin = whole(place)
    abstract = [_abstract(manager.find_step(origin)[1], item) for item in ("params", "opt")]
    workdir = place.folder / "damage"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(origin, workdir)
    newest, older = sorted((int(p.name) for p in (workdir / "checkpoints").iterdir()), reverse=True)
    step = workdir / "checkpoints" / str(newest)
    want = {number: _restored(workdir, abstract)[1:] for number in (newest,)}
    aside = workdir / "aside"
    step.rename(aside)
    want[older] = _restored(workdir, abstract)[1:]
    aside.rename(step)
    files = sorted(p.relative_to(step) for p in step.rglob("*") if p.is_file())
    ranges = max(1, -(-count // len(files)) - 4)
    cases = kept = 0
    for name in files:
        raw = (step / name).read_bytes()
        bounds = np.linspace(0, len(raw), min(ranges, len(raw)) + 1).astype(int)
        changes = [_turned(raw, rng.randrange(8 * low, 8 * high)) for low, high in itertools.pairwise(bounds)]
        changes += [raw[:rng.randrange(len(raw))], raw[:-1], b"", None, raw + b"\0"]
        for changed in changes:
            (step / name).unlink()
            if changed is not None:
                (step / name).write_bytes(changed)
            found, *rest = _restored(workdir, abstract)
            cases += 1
            if found == newest:     # without its table a step is read as those of old
                assert name.name == checksums.NAME and changed is None, (name, changed)
                kept += 1
            else:
                assert found == older and (step.parent / f"{newest}.damaged").is_dir()
                (step.parent / f"{newest}.damaged").rename(step)
            _equal(rest, want[found])
            (step / name).write_bytes(raw)
    assert _restored(workdir, abstract)[0] == newest
    return f"{cases} cases in {len(files)} files; {kept} without a table, read unverified"


def _turned(raw: bytes, bit: int) -> bytes:
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


def _restored(workdir: Path, abstract):
    """What a run would go on from; one line, which names the file, where a step was passed over."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        step, params, opt, data = Checkpoints(workdir, 5, 2).restore(*abstract)
    lines = said.getvalue().splitlines()
    assert len(lines) <= 1 and all(re.match(r"mmx: .* is damaged, \S+ .*: it is now \d+\.damaged, and the run goes on from",
                                            line) for line in lines), lines
    return step, params, opt, data


def _equal(ours, theirs) -> None:
    for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(x, y)


def full_disk(place: Place) -> str:
    """The disk fills up before a save, amid it, under the logs, an export and a sweep: a line, nothing damaged, and all goes
    on once there is room."""
    end, done = whole(place), []
    with small_disk(place.folder / "small", 24) as disk:
        if disk is None:
            return "no file system could be mounted here: left out"
        workdir = disk / "run"
        run = place.start(place.train(workdir))
        _until(run, lambda: (workdir / "checkpoints" / "5").exists())
        filler = fill(disk)
        run.end()
        one_line(run, 2, r"mmx: (a checkpoint needs .* has 0\.0\d\d GB free: make room|step \d+ could not be saved"
                         r"|.*metrics\.jsonl: No space left)")
        _whole_steps(workdir)
        done.append("save")
        one_line(place.done(place.train(workdir)), 2, r"No space left on device|make room")
        filler.unlink()
        assert place.done(place.train(workdir)).code == 0
        assert_same(workdir, end)
        done.append("goes on")

        for board in (False, True):         # the buffer of metrics.jsonl, TensorBoard's thread
            workdir = disk / f"log{board}"
            options = {"checkpoint__every": 1000, "train__steps": 100_000, "train__tensorboard": board}
            run = place.start(place.train(workdir, **options))
            _until(run, lambda: step_of(workdir))
            filler = fill(disk)
            run.end(240)
            one_line(run, 2, r"metrics\.jsonl: No space left on device|tfevents.*: No space left on device")
            filler.unlink()
            assert place.done(place.train(workdir, **options | {"train__steps": 20})).code == 0
            assert [r["step"] for r in told(workdir)] == list(range(1, 21))
            shutil.rmtree(workdir)
        done.append("logging")

        before = state(end)
        filler = fill(disk, 20_000)
        run = place.done(["convert", "to-hf", "--checkpoint", str(end), "--out", str(disk / "hf")])
        one_line(run, 2, "No space left on device|cannot be written")
        assert sorted(p.name for p in disk.iterdir()) == ["filler", "run"] and state(end) == before
        filler.unlink()
        assert place.done(["convert", "to-hf", "--checkpoint", str(end), "--out", str(disk / "hf")]).code == 0
        done.append("export")

        sweep = ["sweep", "--config", str(place.config), "--out", str(disk / "sweep"), "--rate", "1e9",
                 "--config.train.steps=20"]
        run = place.start(sweep)
        _until(run, lambda: list(disk.glob("sweep/runs/*/checkpoints/5")))
        filler = fill(disk)
        run.end()
        assert run.code in (1, 2) and not any("Traceback" in line for line in run.lines), run.text
        assert re.search("make room|No space left|could not be saved", run.lines[-1]), run.lines
        filler.unlink()
        run = place.done(sweep)
        assert run.code == 0 and len((disk / "sweep" / "runs.jsonl").read_text().splitlines()) == 2, run.text
        done.append("sweep")
    return ", ".join(done)


def short_files(place: Place) -> str:
    """Orbax's writing fails amid a save, in its thread."""
    end = whole(place)
    largest = max(p.stat().st_size for p in manager.find_step(end)[1].rglob("*") if p.is_file())
    workdir = place.folder / "short"
    shutil.rmtree(workdir, ignore_errors=True)
    run = place.done(place.train("short"), file_bytes=largest // 2)
    one_line(run, 2, r"mmx: step 5 could not be saved in .*: .*; the checkpoints there are whole")
    assert not list((workdir / "checkpoints").glob("[0-9]"))
    assert place.done(place.train("short")).code == 0
    assert_same(workdir, end)
    return "1 save failed, the run went on after it"


def _whole_steps(workdir: Path) -> None:
    for step in (workdir / "checkpoints").iterdir():
        assert not step.name.isdecimal() or checksums.fault(step) == "", step


def read_only(place: Place) -> str:
    with small_disk(place.folder / "frozen", 8) as disk:
        if disk is None:
            return "no file system could be mounted here: left out"
        shutil.copytree(whole(place), disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for name in ("run", "new"):
            one_line(place.done(place.train(disk / name)), 2, f"^mmx: {disk}.*: Read-only file system$")
    return "a run there, and a new one: a line each"


def two_runs(place: Place) -> str:
    """Of two on one workdir the second is refused and the first does not notice; one that was killed is no holder."""
    end, workdir = whole(place), place.folder / "two"
    shutil.rmtree(workdir, ignore_errors=True)
    first = place.start(place.train("two"))
    while first.alive() and not (workdir / "run.lock").exists():
        time.sleep(0.01)
    second = place.done(place.train("two"))
    one_line(second, 2, rf"^mmx: {workdir} is in use: process {first.pid} on \S+, since [-\d]+ [:\d]+ \S+, trains there; wait")
    assert first.end().code == 0
    assert_same(workdir, end)
    (workdir / "run.lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "long ago"}))
    return "refused, told who is there"


def clock(place: Place) -> str:
    """The wall clock leaps by a day, to and fro, three times a second."""
    end = whole(place)
    shutil.rmtree(place.folder / "clock", ignore_errors=True)
    run = place.done(place.train("clock"), clock=86_400)
    assert run.code == 0, run.text
    assert_same(place.folder / "clock", end)
    return "same bits"


def ranks(place: Place) -> str:
    """Of two processes one is killed: the other says so and ends within a minute, both go on, and end as the whole run."""
    options, slow = {"mesh__edp": 2}, {"checkpoint__every": 20}
    end, waits = whole(place, "two_ranks", **options), []
    for victim in (0, 1):
        name = f"rank{victim}"
        shutil.rmtree(place.folder / name, ignore_errors=True)
        runs = _together(place, place.train(name, **options, **slow, train__steps=100_000), 2)
        while all(run.alive() for run in runs) and step_of(place.folder / name) < 25:
            time.sleep(0.05)
        children = subprocess.run(["pgrep", "-P", str(runs[victim].pid)], capture_output=True, text=True).stdout.split()
        for pid in (str(runs[victim].pid), *children):
            subprocess.run(["kill", "-KILL", pid], check=False)
        begun, other = time.monotonic(), runs[1 - victim].end(90)
        waits.append(time.monotonic() - begun)
        assert other.code == processes.DEAD and GONE.search(other.lines[-1]), (other.code, other.lines)
        runs[victim].end()
        done = [run.end(300).code for run in _together(place, place.train(name, **options), 2)]
        assert done == [0, 0]
        assert_same(place.folder / name, end)
    assert max(waits) < 60, waits
    return f"the other ended after {waits[0]:.0f} s and {waits[1]:.0f} s"


def _together(place: Place, command, count: int, **hurt):
    if count == 1:
        return [place.start(command, **hurt)]
    port = free_port()
    return [place.start([*command, "--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--process", str(process)],
                        **{k: f"{v}.{process}" for k, v in hurt.items()}) for process in range(count)]


def elastic(place: Place, count: int, rng: random.Random, seconds: float = math.inf, steps: int = 200) -> str:
    """`count` restarts over random numbers of processes, devices and meshes: the losses of the uninterrupted run, its rows.

    In float32 the first loss after each restart is that of one device from the same checkpoint. After `seconds` it stops where
    it is; called again, it goes on.
    """
    rows, end, workdir = place.folder / "rows", place.folder / "uninterrupted", place.folder / "elastic"
    if not end.exists():
        run = place.done(place.train("uninterrupted", train__steps=steps), 900, record=str(rows))
        assert run.code == 0, run.text
    want, notes, until = {r["step"]: r for r in told(end)}, place.folder / "elastic.json", time.monotonic() + seconds
    if not notes.exists():
        for path in (workdir, *place.folder.glob("parts.*")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        bounds, known = sorted(rng.sample(range(2, steps), count)) + [steps], _layouts(place, rng)
        notes.write_text(json.dumps({"plan": [(bound, *rng.choice(known)) for bound in bounds], "done": 0, "worst": 0.0}))
    plan, done, worst = json.loads(notes.read_text()).values()
    for number, (bound, processes_, mesh) in enumerate(plan[done:], done):
        if time.monotonic() > until:
            raise TimeoutError(f"{number} of {len(plan)} in {seconds:.0f} s, worst {worst:.1e}; the same command goes on")
        at = plan[number - 1][0] if number else 0
        options = {f"mesh__{axis}": size for axis, size in mesh.items()} | {"train__steps": bound}
        first = None if place.x64 or not at else _first_loss(place, workdir)
        for part in place.folder.glob(f"parts.{number:03}*"):
            part.unlink()
        for run in _together(place, place.train("elastic", **options), processes_,
                             record=str(place.folder / f"parts.{number:03}")):
            assert run.end(900).code == 0, run.text
        got = {r["step"]: r for r in told(workdir)}
        for step in range(at + 1, bound + 1):
            assert got[step]["tokens"] == want[step]["tokens"]
            if place.x64:
                worst = max(worst, abs(got[step]["loss"] / want[step]["loss"] - 1))
        if first is not None:
            worst = max(worst, abs(got[at + 1]["loss"] / first - 1))
        notes.write_text(json.dumps({"plan": plan, "done": number + 1, "worst": worst}))
    assert worst <= (1e-9 if place.x64 else 1e-6), worst
    micros = _rows(place.folder.glob("parts.*"))
    assert micros == _rows([rows]), "another stream"
    epochs, layouts = _count(micros, place.documents), {json.dumps(layout) for _, *layout in plan}
    notes.unlink()
    return (f"{count} restarts, {len(layouts)} layouts; largest relative difference of a loss {worst:.1e}; {epochs} epochs, "
            f"each of {place.documents} documents once")


def _layouts(place: Place, rng: random.Random, many: int = 4) -> list:
    """As many (processes, sizes) of one and of two processes, of up to eight devices: each is a program to compile."""
    from mmx.launch import experiments

    e, found = experiments.read(str(place.config), []), {1: [], 2: []}
    for sizes in itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 4)):
        mesh, world = dict(zip(("edp", "ep", "etp", "seq"), sizes)), int(np.prod(sizes))
        if world <= 8 and not meshes.misfit(e, {"slice": 1, **mesh}):
            for count in (1, 2):
                if world % count == 0 and _shares(sizes, count):
                    found[count].append((count, mesh))
    return [layout for layouts in found.values() for layout in rng.sample(layouts, many)]


def _shares(sizes, count: int) -> bool:
    """Whether each process's devices are whole rows' or parts of one row's."""
    own, inner = int(np.prod(sizes)) // count, sizes[2] * sizes[3]
    return own % inner == 0 or inner % own == 0


def _first_loss(place: Place, workdir: Path) -> float:
    """Of the next step, by one device, from the checkpoint."""
    from mmx.checkpoints.convert import load
    from mmx.data import pipeline
    from mmx.launch import experiments
    from mmx.model import Model
    from mmx.training import loss as losses

    e, loaded = experiments.read(str(place.config), []), load(workdir)
    stream = pipeline.stream(e.data, e.train)
    step = manager.find_step(workdir)[1]
    stream.restore(json.loads((step / "data" / "metadata").read_text())["stream"])
    count = e.train.micro_batches(e.train.tokens_seen(int(step.name)))
    if "loss" not in vars(place):
        place.loss = jax.jit(lambda params, batch: losses.loss(Model(e.model), params, batch, e.train.loss_chunk)[1])
    found = [place.loss(loaded.params, stream.next()) for _ in range(count)]
    weights = [float(m["targets"]) for m in found]
    return float(np.average([float(m["loss"]) for m in found], weights=weights))


def _rows(paths) -> dict[int, list]:
    """The rows of each micro-batch, those of all hosts together, and how many documents began in it."""
    micros = collections.defaultdict(dict)
    for path in paths:
        for line in path.read_text().splitlines():
            each = json.loads(line)
            micros[each["micro"]][each["first"] or 0] = each["rows"], each["bos"]
    return {micro: ([row for _, (rows, _) in sorted(parts.items()) for row in rows], sum(bos for _, bos in parts.values()))
            for micro, parts in sorted(micros.items())}


def _count(micros: dict, documents: int) -> int:
    """How many whole epochs there were; in each of them each row came once, and each document began once."""
    assert list(micros) == list(range(len(micros)))
    rows = [row for rows, _ in micros.values() for row in rows]
    begun = [bos for _, bos in micros.values()]
    epochs, each = len(rows) // ROWS, ROWS // 4
    for epoch in range(epochs):
        assert len(set(rows[epoch * ROWS:(epoch + 1) * ROWS])) == ROWS
        assert sum(begun[epoch * each:(epoch + 1) * each]) == documents
    assert len(set(rows)) == ROWS
    return epochs


def memory(place: Place, seconds: float) -> str:
    """The resident memory of a run: its median in the last tenth against that of the first tenth after warm-up."""
    workdir = place.folder / "memory"
    shutil.rmtree(workdir, ignore_errors=True)
    options = {"train__steps": 10 ** 9, "train__tensorboard": True, "train__eval_every": 500, "checkpoint__every": 200}
    run, found, begun = place.start(place.train(workdir.name, **options)), [], time.monotonic()
    while run.alive() and time.monotonic() - begun < seconds:
        time.sleep(min(1, seconds / 100))
        pages = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1])
        found.append(pages * 4096 / 2 ** 20)
    assert run.alive(), run.text
    run.signal(signal.SIGTERM)
    assert run.end(120).code == 0, run.text
    tenth = max(1, len(found) // 10)
    first, last = (float(np.median(part)) for part in (found[tenth:2 * tenth], found[-tenth:]))
    told_of = f"{step_of(workdir):,} steps, {first:.0f} MiB after warm-up, {last:.0f} MiB at the end: {last / first - 1:+.1%}"
    assert abs(last / first - 1) <= 0.02, told_of
    return told_of
