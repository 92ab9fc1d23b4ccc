"""Bytes of a sequence and roofline times of a step agree with calculations by hand and with the real cache."""
import dataclasses
import json
import math
from pathlib import Path

import jax
import pytest

from mmx import cli, config
from mmx.analysis import memory
from mmx.analysis.counts import flops_forward
from mmx.analysis.deepseek import DeepSeekV3
from mmx.analysis.memory import CHIPS, all_softmax, decode, footprint, prefill
from mmx.launch import experiments
from mmx.model import empty_cache

ROOT = Path(__file__).parent.parent
FILE = str(ROOT / "experiments" / "text_01.py")
TEXT_01 = experiments.read(FILE, []).model
M, WIDTH = 2 ** 20, 64 * 128


def test_the_footprint_of_the_released_geometry():
    found = footprint(TEXT_01)
    assert found == (456_089_655_296, 70 * 64 * 128 * 128 * 4, 2 * 8 * 128 * 10 * 2) == (456_089_655_296, 293_601_280, 40_960)
    softmax = footprint(all_softmax(TEXT_01))
    assert (softmax.state, softmax.per_token) == (0, 8 * 40_960)
    assert found.params - softmax.params == 70 * (3 * 6144 * WIDTH + WIDTH - 2 * 6144 * 8 * 128)
    assert memory.DEEPSEEK.per_token == 70_272


def test_deepseek_v3_has_the_published_size():
    """It has 671 B parameters, 37 B of them active (abstract of the DeepSeek-V3 report)."""
    d = DeepSeekV3()
    assert (d.params_total, d.params_active_all) == (671_026_419_200, 37_552_297_472)
    assert d.cache == 70_272
    one = dataclasses.replace(d, layers=1, dense_layers=1, vocab=0)     # a single dense layer, matrix by matrix
    matrices = 7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168 + 3 * 7168 * 18432
    assert one.flops_forward(1) == 2 * matrices + 2 * 128 * (192 + 128)
    assert one.flops_forward(101) - one.flops_forward(1) == 2 * 128 * (192 + 128) * 50


@pytest.mark.parametrize("model", [TEXT_01, config.Model(pattern="LLS", layers=6), config.Model(pattern="S", layers=2)],
                         ids=["text_01", "mixed", "softmax"])
def test_footprint_equals_the_bytes_of_the_cache(model):
    cache = jax.tree.leaves(jax.eval_shape(lambda: empty_cache(model, 3, 500)["layers"]))
    assert sum(math.prod(x.shape) * x.dtype.itemsize for x in cache) == 3 * footprint(model).sequence(500)


@pytest.mark.parametrize("tokens, used", [(1, 2), (2, 32 * (1 - (15 / 16) ** 2)), (10 ** 6, 32)])
def test_a_step_reads_only_the_experts_that_receive_tokens(tokens, used):
    expert = 3 * 6144 * 9216
    dense = 456_089_655_296 - 80 * 32 * expert - 200_064 * 6144
    assert memory.params_read(TEXT_01, tokens) == pytest.approx(dense + 80 * used * expert, rel=1e-12)
    assert memory.params_read(dataclasses.replace(TEXT_01, top_k=32), tokens) == 456_089_655_296 - 200_064 * 6144
    assert memory.params_read(dataclasses.replace(TEXT_01, vision=config.Vision(layers=24)), tokens) == memory.params_read(
        TEXT_01, tokens)


def test_rooflines_by_hand():
    """A decoded token uses 45.94 B active parameters, the head, scores of 10 layers and 70 states; weights are int8."""
    flops = 2 * (45_944_920_064 - 161 * 6144 - 70 * WIDTH + 200_064 * 6144) + 10 * 4 * WIDTH * (M + 1) + 70 * 4 * WIDTH * 128
    moved = 45_944_920_064 + 200_064 * 6144 + 40_960 * (M + 1) + 2 * 293_601_280
    step = decode(TEXT_01, CHIPS["h20"], 8, M, 1)
    assert step == pytest.approx((flops / (8 * 148e12), moved / (8 * 4e12)), rel=1e-9)
    assert (step.bound, step.seconds) == ("memory", step.move) and step.mfu == pytest.approx(0.131, abs=5e-4)

    step = prefill(TEXT_01, CHIPS["h800"], 8, 8192, weight=2)
    moved = 2 * (456_089_655_296 - 200_064 * 6144) + 40_960 * 8192 + 293_601_280
    assert step == pytest.approx((8192 * flops_forward(TEXT_01, 8192) / (8 * 989e12), moved / (8 * 3.35e12)), rel=1e-6)
    assert (step.bound, step.mfu) == ("compute", 1.0)


def test_decoding_a_token_costs_the_difference_of_two_sequences():
    flops = decode(TEXT_01, CHIPS["h20"], 1, 999, 1).compute * 148e12
    assert flops == pytest.approx(1000 * flops_forward(TEXT_01, 1000) - 999 * flops_forward(TEXT_01, 999), rel=1e-6)


def test_costs_never_decrease_with_the_length():
    lengths, found = [2 ** n for n in range(8, 23)], {}
    for T in lengths:
        steps = (prefill(TEXT_01, CHIPS["v6e"], 32, T), decode(TEXT_01, CHIPS["v6e"], 32, T, 8))
        found[T] = (footprint(TEXT_01).sequence(T), *(step.seconds for step in steps), steps[0].mfu,
                    -len(memory.fitting_weights(TEXT_01, CHIPS["v6e"], 32, T)))
    for columns in zip(*found.values()):
        assert list(columns) == sorted(columns)
    assert found[256][3] < 0.2 and found[4 * M][3] == 1
    assert memory.fitting_weights(TEXT_01, CHIPS["v6e"], 32, 8192) == ["bf16", "int8"]
    for length in (M, 4 * M):
        assert memory.fitting_weights(TEXT_01, CHIPS["h800"], 8, length) == ["int8"]
    assert memory.fitting_weights(TEXT_01, CHIPS["h800"], 8, M, batch=8) == []


def test_the_command(tmp_path, capsys):
    command = ["memory", "--config", FILE, "--lengths", "8k,1M", "--chips", "h20:8", "--out", str(tmp_path / "new")]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sequence"] == [{"length": T, "model": 293_601_280 + 40_960 * T, "softmax": 327_680 * T,
                                  "deepseek_v3": 70_272 * T} for T in (8192, M)]
    assert [(row["length"], row["batch"]) for row in found["decode"]] == [(T, B) for T in (8192, M) for B in (1, 8, 64)]
    assert (tmp_path / "new" / "memory.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main([*command, "--config.model.pattern=S"]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("327,680 B", "8 h20", "1,048,576", "over 75 % on H20", "memory.png"))


@pytest.mark.parametrize("flags, message", [
    (["--lengths", "8k,many"], "--lengths '8k,many' must be numbers of tokens with commas, such as 512,1k,4M (1k = 1,024)"),
    (["--chips", "h20"], "--chips h20 must be CHIP:COUNT with commas, such as h20:8,v6e:32; chips: v4, v5e, v5p"),
    (["--chips", "h99:8"], "--chips h99:8 must be CHIP:COUNT"), (["--chips", "h20:0"], "--chips h20:0 must be CHIP:COUNT")])
def test_mistakes_are_one_line(flags, message, tmp_path, capsys):
    assert cli.main(["memory", "--config", FILE, "--out", str(tmp_path / "new"), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"mmx: {message}") and err.count("\n") == 1 and not (tmp_path / "new").exists()
