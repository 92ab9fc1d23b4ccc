"""The experiments behind the findings: one step is reproducible and depends on the seed; arms have equal FLOPs; sweeps."""
import itertools
import json
import re
from pathlib import Path

import pytest

from mmx.data import token_tasks
from mmx.launch import experiments, sweep
from mmx.training import metrics
from mmx.training.run import train

FOLDER = Path(__file__).parent.parent / "experiments"
SMALL = ["--config.train.steps=1", "--config.train.batch=2", "--config.train.length=64", "--config.train.warmup=0",
         "--config.data.shards=2"]
TWO = ["--config.model.layers=2", "--config.model.pattern=LS"]
ONE = [     # (file, arguments of one arm without the seed, options that make it small)
    ("recall", "LLLLLLLL,16,3e-3", ["--config.model.layers=1"]), ("moe_vs_dense", "facts,8192,moe,3e-3", TWO),
    ("moe_vs_dense", "text,0,moe,3e-3", TWO), ("norm", "pre,8,3e-3", TWO), ("router", "", TWO),
    ("rope_length", "0,S,3e-3", ["--config.model.layers=1"]), ("hybrid_ratio", "W,0,3e-3", ["--config.model.layers=1"]),
    ("critical_batch", "32", TWO)]


@pytest.fixture(autouse=True)
def few_documents(monkeypatch):
    """Limits the generated tasks to a few documents."""
    read, most = token_tasks.parse, {"tokens": 2048, "held": 8}
    monkeypatch.setattr(token_tasks, "parse", lambda source: (read(source)[0], {
        name: min(value, most.get(name, value)) for name, value in read(source)[1].items()}))


@pytest.mark.parametrize("name, arm, small", ONE)
def test_one_step(name, arm, small, tmp_path, compiled_once):
    results = []
    for run, seed in enumerate((0, 0, 1)):
        experiment = experiments.read(f"{FOLDER / name}.py:{','.join(filter(None, (arm, str(seed))))}", SMALL + small)
        train(experiment, tmp_path / str(run))
        [record] = metrics.read(tmp_path / str(run))
        results.append((record["loss"], record["grad_norm"], record["layer_norms"], record.get("micro_norm")))
    assert results[0] == results[1]
    assert results[0][0] != results[2][0] and results[0][1] != results[2][1]
    assert len(results[0][2]) == experiment.model.layers and (results[0][3] is not None) == (name == "critical_batch")
    squares = sum(norm ** 2 for norm in results[0][2])
    assert 0 < squares < results[0][1] ** 2        # the embedding and the head have gradients too
    if name == "critical_batch":
        assert results[0][3] > results[0][1]          # the gradients of micro-batches have more noise


def test_a_row_of_recall_has_accuracies(tmp_path, compiled_once):
    arm = {"arch": "LLLLLLLL", "head_dim": 16, "lr": 3e-3, "seed": 0}
    _, make = experiments.grid(str(FOLDER / "recall.py"), [*SMALL, "--config.model.layers=1"])
    [cell] = sweep.cells([arm], make)
    assert sweep.attempt(cell, tmp_path / "runs" / cell.name) == (sweep.DONE, "")
    [row] = sweep.collect(tmp_path).values()
    assert row["by_source"].keys() == set(cell.experiment.data.sources)
    assert 0 <= row["accuracy"] <= 1 and row["loss"] > 0 and row["bits_per_byte"] is None
    assert row["skipped"] == 0 and len(row["layer_norms"]) == 1 and row["course"]["tokens"] == [128]
    assert sweep.results_table([row], "one").row_count == 1


def test_a_run_that_diverges_has_a_row(tmp_path, compiled_once):
    keys = {"form": "pre", "layers": 8, "lr": 1e30, "seed": 0}
    options = [*SMALL, *TWO, "--config.train.steps=4", "--config.guard.skips=1", "--config.train.tensorboard=True"]
    [cell] = sweep.cells([keys], experiments.grid(str(FOLDER / "norm.py"), options)[1])
    assert sweep.attempt(cell, tmp_path / "runs" / cell.name) == (sweep.DONE, "")
    [row] = sweep.collect(tmp_path).values()
    assert row["loss"] is None and row["diverged"].startswith("step ") and row["skipped"] == 1 and row["train_loss"] > 0
    assert sweep.results_table([row], "one").row_count == 1


@pytest.mark.parametrize("name, count", [("recall", 51), ("moe_vs_dense", 36), ("norm", 54), ("hybrid_ratio", 66),
                                         ("rope_length", 36), ("critical_batch", 9), ("router", 3)])
def test_arms(name, count):
    """Each arm has three seeds, the committed rows come from these runs, and arms to compare at equal FLOPs have them."""
    cells = sweep.cells(*experiments.grid(str(FOLDER / f"{name}.py"), []))
    assert len(cells) == count and {cell.keys["seed"] for cell in cells} == {0, 1, 2}
    rows = [json.loads(line) for line in (FOLDER / "results" / f"{name}.jsonl").read_text().splitlines()]
    known = {cell.hash: cell.keys for cell in cells} if name != "router" else {}
    assert all(known[row["hash"]].items() <= row.items() for row in rows if known)      # the rows come from these runs
    by = {"moe_vs_dense": lambda cell: (cell.keys["task"], cell.keys["count"]), "hybrid_ratio": lambda cell: ""}.get(name)
    for _, group in itertools.groupby(sorted(cells, key=by), by) if by else ():
        flops = [cell.flops for cell in group]
        assert max(flops) <= min(flops) * (1.005 if name == "hybrid_ratio" else 1)


def test_a_sweep_reports_its_hours_before_it_starts(tmp_path, capsys):
    from mmx import cli

    command = ["sweep", "--config", str(FOLDER / "recall.py"), "--out", str(tmp_path), "--rate", "1e9", "--hours", "12"]
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert re.search(r"the 51 runs need [\d.,]+ hours", err) and "exceeds --hours 12" in err and err.count("\n") == 1
