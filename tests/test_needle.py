"""The needle experiment: twins of one size, which learn from what its command writes; its table and figure."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from mmx import cli, experiments, metrics

ROOT = Path(__file__).parents[1]
FILE = str(ROOT / "experiments" / "needle.py")
KINDS = ("hybrid", "softmax", "lightning")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("needle_bench", ROOT / "benchmarks" / "needle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_twins_differ_in_their_layers_alone():
    found = [experiments.read(f"{FILE}:{kind}", []) for kind in KINDS]
    sizes = [e.model.params_total for e in found]
    assert max(sizes) < 1.002 * min(sizes)
    assert [e.model.layer_kinds for e in found] == ["LLLS", "SSSS", "LLLL"]
    assert len({(e.train, e.data, e.mesh) for e in found}) == 1
    assert experiments.read(FILE, []) == found[0]


def test_what_is_neither_is_one_line(capsys):
    assert cli.main(["config", f"{FILE}:mamba"]) == 2
    assert capsys.readouterr().err == f"mmx: {FILE}: 'mamba' is none of hybrid, softmax, lightning\n"


def test_a_step_on_what_is_written_and_a_reading(bench, tmp_path, monkeypatch):
    """At toy size; every prompt of 1,024 tokens stands in one row with its answer."""
    monkeypatch.setattr(bench, "LENGTHS", (256,))
    monkeypatch.setattr(bench, "DEPTHS", (0, 100))
    whole = bench.mmx
    toy = [f"--config.{key}" for key in ("train.steps=1", "train.length=256", "model.layers=1", "model.dim=16",
                                         "model.head_dim=8", "model.rotary_dim=4")]
    monkeypatch.setattr(bench, "mmx", lambda *a: whole(*a, *(toy if a[0] == "train" else ())))
    bench.data(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "needle.jsonl").read_text().splitlines()]
    longest = max(len(line["prompt"] + line["completion"]) + 2 for line in lines)
    assert 1024 < longest <= experiments.read(FILE, []).train.length
    rows = list(bench.one(tmp_path, "lightning", 0))
    assert len(metrics.read(tmp_path / "lightning0")) == 1
    places = [(row["kind"], row["seed"], row["length"], row["depth"]) for row in rows]
    assert set(places) == {("lightning", 0, 256, 0), ("lightning", 0, 256, 100)}


def test_table_and_figure_say_what_the_rows_say(bench, tmp_path, monkeypatch, capsys):
    right = lambda kind, seed, depth: float(kind == "hybrid" or (seed == 0 and depth > 0))
    rows = [{"kind": kind, "seed": seed, "length": length, "depth": depth, "score": right(kind, seed, depth),
             "answer": "1234567", "output": " 1734567" if kind == "hybrid" else ""}
            for kind in KINDS for seed in range(3) for length in bench.LENGTHS for depth in bench.DEPTHS]
    found, digits = bench.scores(rows), bench.scores(rows, bench.digits)
    assert found.shape == (3, 3, len(bench.DEPTHS), len(bench.LENGTHS)) and np.all(found[0] == 1)
    assert np.all(digits[0] == 6 / 7) and np.all(digits[1:] == 0)
    bench.show("right answers", found)
    table = capsys.readouterr().out.splitlines()
    assert table[2].startswith("| hybrid | 100 (100 to 100) |") and table[3].startswith("| softmax | 27 (0 to 80) |")
    bench.plot(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
