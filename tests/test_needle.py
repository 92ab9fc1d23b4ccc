"""The needle experiments: models of equal size, training on generated documents, evaluation, and tables."""
import importlib.util
import json
import re
from pathlib import Path

import pytest

from mmx import cli
from mmx.analysis.counts import count_params
from mmx.launch import experiments, sweep
from mmx.launch.sweep import worker
from mmx.training import metrics

ROOT = Path(__file__).parents[1]
FILE = str(ROOT / "experiments" / "needle.py")
ROPE = str(ROOT / "experiments" / "needle_rope.py")
KINDS = ("hybrid", "softmax", "lightning")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("needle_script", ROOT / "experiments" / "measure" / "needle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_differ_only_in_their_layers():
    found = [experiments.read(f"{FILE}:{kind}", []) for kind in KINDS]
    sizes = [count_params(e.model).total for e in found]
    assert max(sizes) < 1.002 * min(sizes)
    assert [e.model.layer_kinds for e in found] == ["LLLS", "SSSS", "LLLL"]
    assert len({(e.train, e.data, e.mesh) for e in found}) == 1
    assert experiments.read(FILE, []) == found[0]


def test_arms_of_needle_rope_differ_only_in_rotary_dims():
    found = {(kind, turned): experiments.read(f"{ROPE}:{kind},{turned},1", []) for kind in KINDS[:2] for turned in (0, 16, 32)}
    sizes = [count_params(e.model).total for e in found.values()]
    assert max(sizes) < 1.002 * min(sizes) and len({e.model for e in found.values()}) == 6
    assert {turned for _, turned in found} == {e.model.rotary_dim for e in found.values()}
    assert {e.train.seed for e in found.values()} == {1} and len({(e.train, e.data) for e in found.values()}) == 1


@pytest.mark.parametrize("arm, message", [
    (f"{FILE}:mamba", "unknown arm 'mamba': give one of hybrid, softmax, lightning"),
    (f"{ROPE}:hybrid,8", "unknown arm hybrid,8: give hybrid or softmax, and one of 0, 16, 32")])
def test_an_unknown_arm_is_refused_in_one_line(arm, message, capsys):
    assert cli.main(["config", arm]) == 2
    assert capsys.readouterr().err == f"mmx: {arm.partition(':')[0]}: {message}\n"


@pytest.mark.parametrize("name, arm", [("needle", {"kind": "lightning"}), ("needle_rope", {"kind": "softmax", "turned": 16})])
def test_training_and_evaluation(name, arm, script, tmp_path, monkeypatch, compiled_once):
    """The longest prompt and its answer fit in one row. Repeating a small run gives the same loss; another seed does not."""
    plan, file = script.PLANS[name], f"{ROOT / 'experiments' / name}.py"
    monkeypatch.setattr(script, "DEPTHS", (0, 100))
    script.write_documents(tmp_path, plan)
    lines = [json.loads(line) for line in (tmp_path / "needle.jsonl").read_text().splitlines()]
    longest = max(len(line["prompt"] + line["completion"]) + 2 for line in lines)
    longest_prompt, experiment = {"needle": 1024, "needle_rope": 256}[name], experiments.read(file, [])
    assert longest_prompt < longest <= experiment.train.length
    sources = tuple(str(tmp_path / Path(source).name) for source in experiment.data.sources)
    toy = [f"--config.{key}" for key in ("train.steps=1", "train.length=256", "train.batch=2", "model.layers=1", "model.dim=16",
                                         f"model.pattern={'L' if name == 'needle' else 'S'}", "model.head_dim=8",
                                         "model.rotary_dim=4", "train.loss_chunk=512", "train.eval_bytes=512",
                                         f"data.sources={sources!r}")]
    grid, make = experiments.grid(file, toy)
    one, other = [cell for cell in sweep.cells([keys for keys in grid if arm.items() <= keys.items()], make)][:2]
    assert (one.keys, other.keys) == (arm | {"seed": 0}, arm | {"seed": 1})
    monkeypatch.setattr(worker, "_evaluate", lambda *_: {"loss": 0.0, "bits_per_byte": 0.0})     # tested elsewhere
    for cell, folder in ((one, one.name), (one, "again"), (other, other.name)):
        assert sweep.attempt(cell, tmp_path / "runs" / folder) == (sweep.DONE, "")
    rows = script.evaluate(tmp_path, plan._replace(lengths=(256,), examples=2), one)
    assert {(row["seed"], row["length"], row["depth"]) for row in rows} == {(0, 256, 0), (0, 256, 100)}
    assert all(arm.items() <= row.items() for row in rows) and len(rows) == 4
    first, again, third = (record["loss"] for folder in (one.name, "again", other.name)
                           for record in metrics.read(tmp_path / "runs" / folder))
    assert first == again != third


def test_a_sweep_over_its_hours_does_not_start(script, tmp_path, monkeypatch, capsys):
    run_command = script.mmx
    monkeypatch.setattr(script, "mmx", lambda *a: run_command(*a, *(("--rate", "1e9") if a[0] == "sweep" else ())))
    with pytest.raises(SystemExit) as ended:
        script.run(tmp_path, "needle_rope", 1, 0.5)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(r"the 18 runs need [\d.,]+ hours", err) and err.count("\n") == 1
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".jsonl", ""} and not (tmp_path / "runs").exists()


def test_tables_match_the_rows(script, capsys):
    plan = script.PLANS["needle"]
    correct = lambda kind, seed, depth: float(kind == "hybrid" or (seed == 0 and depth > 0))
    rows = [{"kind": kind, "seed": seed, "length": length, "depth": depth, "score": correct(kind, seed, depth),
             "answer": "1234567", "output": " 1734567" if kind == "hybrid" else ""}
            for kind in KINDS for seed in range(3) for length in plan.lengths for depth in script.DEPTHS]
    arms = [{"kind": kind} for kind in KINDS]
    script.print_table("correct answers", rows, arms, plan)
    script.print_table("correct digits", rows, arms, plan, script.correct_digits)
    table = capsys.readouterr().out.splitlines()
    assert table[2].startswith("| hybrid | 100 (100 to 100) |") and table[3].startswith("| softmax | 27 (0 to 80) |")
    assert table[7].startswith("| hybrid | 86 (86 to 86) |") and table[8].startswith("| softmax | 0 (0 to 0) |")
