"""The kernels' static schedules, from the TPU's compiler, and the command that prints them."""
import functools
import importlib.util
import json
import math

import pytest

from mmx import bench, cli
from mmx.compilers import hlo, schedule

needs_compiler = pytest.mark.skipif(bool(schedule.missing()), reason=schedule.missing())
HLO = """
%body (x: s32[]) -> s32[] {
  %inner = s32[] fusion(%x), kind=kLoop
}
%condition (x: s32[]) -> pred[] {
  %bound = s32[]{:T(128)} constant(7)
}
ENTRY %main (x: s32[]) -> s32[] {
  %loop = s32[] while(%x), condition=%condition, body=%body
  ROOT %last = s32[] fusion(%loop), kind=kLoop
}
"""
MODULE = """
import jax, jax.numpy as jnp
def products(times):
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    return lambda x, y: jax.lax.fori_loop(0, int(times), lambda _, x: x @ y, x), (x, x)
"""


@functools.cache
def rows(chip, name):
    return list(bench._tpu(chip, name))


def test_operations_in_loops_count_as_often_as_they_run():
    assert hlo.operations(HLO) == [("inner", 7), ("last", 1)]


def test_chips_that_are_not_known(capsys):
    assert cli.main(["bench", "kernels", "--chip", "v5q"]) == 2
    assert "v5q: known are v4, v5e" in capsys.readouterr().err


def test_times_and_a_plot_on_the_device_that_is_here(tmp_path, capsys, monkeypatch):
    for name, value in (("H", 2), ("D", 16), ("ROWS", 2), ("RUNS", 2)):
        monkeypatch.setattr(bench, name, value)
    out = tmp_path / "new"
    assert cli.main(["bench", "kernels", "--live", "--lengths", "64,128", "--out", str(out), "--json"]) == 0
    timed = json.loads(capsys.readouterr().out)
    ops = [f"{op} {case}" for op in ("lightning", "softmax") for case in ("forward", "forward and backward")]
    assert [(row["case"], row["length"]) for row in timed] == [(op, T) for op in ops for T in (64, 128)] + [("decode", 1)]
    assert all(row["impl"] == "xla" and row["ms"] > 0 for row in timed)
    assert (out / "kernels.png").stat().st_size > 10_000


@pytest.mark.parametrize("lengths", ["64,x", "0", ""])
def test_lengths_that_are_none(lengths, tmp_path, capsys):
    assert cli.main(["bench", "kernels", "--live", "--lengths", lengths, "--out", str(tmp_path / "new")]) == 2
    assert f"--lengths {lengths}: give tokens" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags, said", [
    (["--lengths", "64"], "--lengths 64: it is for times"), (["--out", "x"], "--out x: it is for times"),
    (["--live", "--chip", "v5p"], "--live times the device that is: give one of them")])
def test_flags_that_would_do_nothing(flags, said, capsys):
    assert cli.main(["bench", "kernels", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_fault_is_told_and_fails_the_command(capsys, monkeypatch):
    kernel = bench.ptx.Kernel(registers=255, spills=72, shared=1024, ctas=8, threads=128, tensor=4, tf32=False)
    monkeypatch.setattr(bench.ptx, "missing", str)
    monkeypatch.setattr(bench.ptx, "resources", lambda *args, chip: {"output_kernel": kernel})
    monkeypatch.setattr(bench, "CASES", {"softmax 8,192": bench.CASES["softmax 8,192"]})
    assert cli.main(["bench", "kernels", "--chip", "a100"]) == 1
    assert capsys.readouterr().err.endswith(
        "a100, softmax 8,192: output_kernel spills 72 bytes a thread; a smaller tile or more warps would not\n")


@needs_compiler
def test_cycles_of_products_are_those_of_the_matrix_units(tmp_path, monkeypatch):
    (tmp_path / "known_length.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    one, five = (schedule.cost(f"known_length:products:{times}", "v5p") for times in (1, 5))
    assert math.isclose(one.us, 2 * 4096 ** 3 / 4.59e14 * 1e6, rel_tol=0.1)
    assert math.isclose(five.us, 5 * one.us, rel_tol=0.05)


@needs_compiler
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_forward_leaves_memory_the_only_limit(chip):
    row, xla = rows(chip, "forward 8,192")
    assert row["static / floor"] <= 0.95 and row["HBM temporaries MiB"] == 0 and xla["static us"] > 2 * row["static us"]
    assert row["moved / floor"] <= 1.05


@needs_compiler
def test_time_is_linear_and_documents_cost_little(monkeypatch):
    others = "forward 32,768", "forward 8,192, documents", "forward and backward 8,192"
    monkeypatch.setattr(bench, "CASES", bench.CASES | {name: bench.CASES[name]._replace(tpu=("tpu",)) for name in others})
    us = {name: rows("v5p", name)[0]["static us"] for name in ("forward 8,192", *others)}
    one, four, documents, both = us.values()
    assert four <= 4.05 * one and documents <= 1.15 * one and both <= 1000, us


@needs_compiler
def test_command_prints_json(capsys, monkeypatch):
    monkeypatch.setattr(bench, "CASES", {"forward 8,192": bench.CASES["forward 8,192"]})
    monkeypatch.setattr(bench, "_tpu", rows)
    assert cli.main(["bench", "kernels", "--chip", "v5p", "--json"]) == 0
    assert [row["impl"] for row in json.loads(capsys.readouterr().out)] == ["tpu", "xla"]


@needs_compiler
def test_the_layer_moves_what_its_products_and_attention_take(tmp_path, monkeypatch):
    """Weights once, the input by each projection; q, k, v and y written and read, o read twice: no pass between them."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    T, W = 8192, bench.H * bench.D
    schedule._compile(f"mmx.bench:layer:fused:{T}:0", "v5p", tmp_path)
    _, moved = json.loads((tmp_path / "memory").read_text())
    assert moved < 1.02 * 2 * (5 * bench.DIM * W + 5 * T * bench.DIM + 11 * T * W)


@pytest.mark.skipif(bool(bench.ptx.missing()), reason=bench.ptx.missing())
def test_gpu_kernels_and_those_of_triton():
    compiled = list(bench._gpu("h100", "forward 8,192"))
    assert {row["impl"] for row in compiled} == {"gpu", *(["triton"] if importlib.util.find_spec("jax_triton") else [])}
    assert all(row["registers"] and row["CTAs"] >= 132 and not row["faults"] for row in compiled)
