"""`mmx bench kernels`: static costs of the kernels from the real compilers, and times on this machine."""
import functools
import json
import math

import pytest

from mmx import cli
from mmx.chips import CHIPS
from mmx.compilers import bench, hlo, schedule

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
SLICES = """
%rows (x: f32[7,1024], y: f32[7,1024], n: s32[]) -> f32[7,1024] {
  %x = f32[7,1024]{1,0} parameter(0)
  %n = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,1024]{1,0} dynamic-slice(%x, %n, %zero), dynamic_slice_sizes={1,1024}
  %y = f32[7,1024]{1,0} parameter(1)
  ROOT %put = f32[7,1024]{1,0} dynamic-update-slice(%y, %row, %n, %zero)
}
%body (all: (s32[], f32[7,1024], f32[7,1024])) -> (s32[], f32[7,1024], f32[7,1024]) {
  %all = (s32[], f32[7,1024], f32[7,1024]) parameter(0)
  %n = s32[] get-tuple-element(%all), index=0
  %x = f32[7,1024]{1,0} get-tuple-element(%all), index=1
  %y = f32[7,1024]{1,0} get-tuple-element(%all), index=2
  %new = f32[7,1024]{1,0} fusion(%x, %y, %n), kind=kLoop, calls=%rows
  ROOT %next = (s32[], f32[7,1024], f32[7,1024]) tuple(%n, %x, %new)
}
%condition (all: (s32[], f32[7,1024], f32[7,1024])) -> pred[] {
  %bound = s32[] constant(7)
}
ENTRY %main (x: (s32[], f32[7,1024], f32[7,1024])) -> f32[1024] {
  %x = (s32[], f32[7,1024], f32[7,1024]) parameter(0)
  %loop = (s32[], f32[7,1024], f32[7,1024]) while(%x), condition=%condition, body=%body
  %y = f32[7,1024]{1,0} get-tuple-element(%loop), index=2
  ROOT %sum = f32[1024]{0} reduce(%y), dimensions={0}
}
"""
MODULE = """
import jax, jax.numpy as jnp
def products(times):
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    return lambda x, y: jax.lax.fori_loop(0, int(times), lambda _, x: x @ y, x), (x, x)
"""


@functools.cache
def row(chip, name, impl):
    row, = bench._compile_for_tpu(chip, name, impl)
    return row


def test_operations_count_once_for_each_trip_of_a_loop():
    assert hlo.operations(HLO) == [("inner", 7), ("last", 1)]


def test_bytes_moved_count_slices_and_trips():
    """7 trips each read an index and a row of 4,096 bytes and write a row; the sum reads 7 rows and writes 1."""
    assert hlo.bytes_moved(SLICES) == (7 * (4 + 4096 + 4096) + 8 * 4096, 8)


def test_unknown_chip(capsys):
    assert cli.main(["bench", "kernels", "--chip", "v5q"]) == 2
    assert "--chip v5q is unknown; known chips: v4, v5e" in capsys.readouterr().err


def test_times_and_plot_on_this_machine(tmp_path, capsys, monkeypatch):
    for name, value in (("HEADS", 2), ("HEAD_DIM", 16), ("SEQUENCES", 2), ("RUNS", 2)):
        monkeypatch.setattr(bench, name, value)
    out = tmp_path / "new"
    assert cli.main(["bench", "kernels", "--live", "--lengths", "64,128", "--out", str(out), "--json"]) == 0
    timed = json.loads(capsys.readouterr().out)
    ops = [f"{op} {case}" for op in ("lightning", "softmax") for case in ("forward", "forward and backward")]
    assert [(row["case"], row["length"]) for row in timed] == [(op, T) for op in ops for T in (64, 128)] + [("decode", 1)]
    assert all(row["impl"] == "xla" and row["ms"] > 0 for row in timed)
    assert (out / "kernels.png").stat().st_size > 10_000


@pytest.mark.parametrize("lengths", ["64,x", "0", ""])
def test_malformed_lengths(lengths, tmp_path, capsys):
    assert cli.main(["bench", "kernels", "--live", "--lengths", lengths, "--out", str(tmp_path / "new")]) == 2
    assert f"--lengths {lengths!r} must be numbers of tokens" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags, message", [
    (["--lengths", "64"], "--lengths 64 applies to timing only"), (["--out", "x"], "--out x applies to timing only"),
    (["--live", "--chip", "v5p"], "--live times this machine's device: give only one of them")])
def test_refuses_flags_without_effect(flags, message, capsys):
    assert cli.main(["bench", "kernels", *flags]) == 2
    assert message in capsys.readouterr().err


def test_fault_is_reported_and_fails_the_command(capsys, monkeypatch):
    kernel = bench.ptx.Kernel(registers=255, spills=72, shared=1024, ctas=8, threads=128, tensor=4, tf32=False)
    monkeypatch.setattr(bench.ptx, "missing", str)
    monkeypatch.setattr(bench.ptx, "program", lambda *args, chip: ({"output_kernel": kernel}, SLICES))
    monkeypatch.setattr(bench, "CASES", {"softmax 8,192": bench.CASES["softmax 8,192"]})
    assert cli.main(["bench", "kernels", "--chip", "a100"]) == 1
    assert capsys.readouterr().err.endswith(
        "a100, softmax 8,192: output_kernel spills 72 bytes per thread; try a smaller tile or more warps\n")


@needs_compiler
def test_cycles_of_matrix_products_match_the_peak(tmp_path, monkeypatch):
    (tmp_path / "known_length.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    cost = schedule.cost("known_length:products:5", "v5p")
    assert math.isclose(cost.us, 5 * 2 * 4096 ** 3 / CHIPS["v5p"].peak * 1e6, rel_tol=0.1)


@needs_compiler
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_forward_is_limited_by_memory_only(chip):
    found = row(chip, "forward 8,192", "tpu")
    assert found["static / floor"] <= 0.95 and found["HBM temporaries MiB"] == 0 and found["moved / floor"] <= 1.05


@needs_compiler
def test_time_is_linear_in_length_and_half_of_xla():
    one, four, documents, both = (row("v5p", f"forward {case}", "tpu")["static us"] for case in (
        "8,192", "32,768", "8,192, documents", "and backward 8,192"))
    assert four <= 4.05 * one and documents <= 1.15 * one and both <= 1000, (one, four, documents, both)
    assert row("v5p", "forward 8,192", "xla")["static us"] > 2 * one


@needs_compiler
def test_command_prints_json(capsys, monkeypatch):
    monkeypatch.setattr(bench, "CASES", {"forward 8,192": bench.CASES["forward 8,192"]})
    compiled = [row("v5p", "forward 8,192", impl) for impl in ("tpu", "xla")]
    monkeypatch.setattr(bench, "_compile_for_tpu", lambda chip, name, impl: [row for row in compiled if row["impl"] == impl])
    assert cli.main(["bench", "kernels", "--chip", "v5p", "--json"]) == 0
    assert [row["impl"] for row in json.loads(capsys.readouterr().out)] == ["tpu", "xla"]


@needs_compiler
def test_layer_moves_no_more_than_its_products_and_attention(tmp_path, monkeypatch):
    """Each weight is read once, the input once by each projection; q, k, v and y are written and read, o is read twice."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    T, width = 8192, bench.HEADS * bench.HEAD_DIM
    schedule.compile_case(f"mmx.compilers.bench:layer:fused:{T}:0", "v5p", tmp_path)
    _, moved = json.loads((tmp_path / "memory").read_text())
    assert moved < 1.02 * 2 * (5 * bench.DIM * width + 5 * T * bench.DIM + 11 * T * width)


@pytest.mark.skipif(bool(bench.ptx.missing()), reason=bench.ptx.missing())
def test_gpu_and_triton_kernels():
    for impl in ("gpu", *([] if bench.api.missing("triton") else ["triton"])):
        *kernels, whole = bench._compile_for_gpu("h100", "forward 8,192", impl)
        assert all(row["registers"] and row["CTAs"] >= 132 and not row["faults"] for row in kernels) and len(kernels) == 3
        assert whole["moved / floor"] <= 1.8


@pytest.mark.skipif(bool(bench.ptx.missing()), reason=bench.ptx.missing())
@pytest.mark.parametrize("name, largest, xla", [("forward and backward 8,192", 2.1, 10), ("decode, 64 sequences", 1.1, 1)])
def test_bytes_moved_on_gpu(name, largest, xla):
    assert bench._compile_for_gpu("h100", name, "gpu")[-1]["moved / floor"] <= largest
    assert bench._compile_for_gpu("h100", name, "xla")[-1]["moved / floor"] >= xla
