"""Programs compiled for pods without their hardware: what the analysis counts, and what a layer of experts exchanges."""
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmx import cli
from mmx.compilers import aot, hlo, ptx, schedule

EXPERIMENT = """\
from mmx.config import default

def get_config():
    config = default()
    model, train = config.model, config.train
    model.vocab, model.dim, model.layers, model.pattern = 256, 256, 2, "L"
    model.heads, model.kv_heads, model.head_dim, model.rotary_dim = 2, 2, 128, 64
    model.experts, model.expert_dim, model.capacity, model.transport, model.token_groups = 8, 256, 1.25, 1.25, 4
    model.dtype, model.remat, model.keep_arrived = "bfloat16", True, True
    train.batch, train.length = 4, 512
    return config
"""
D, OUTER, INNER = 64, 3, 5
AXES = {"data": 2, "tensor": 4}
TPU_LOOP = """
%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%p), index=1
  %go = ((bf16[8,16]{1,0}), bf16[8,16]{1,0}, u32[]{:S(2)}) all-to-all-start(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}
  %work = bf16[8,16] fusion(%x), kind=kOutput, calls=%product, backend_config={"window_config":{"estimated_cycles":"100"}}
  %come = bf16[8,16] all-to-all-done(%go)
  %again = ((bf16[8,16]), bf16[8,16]{1,0}, u32[]{:S(2)}) all-to-all-start(%come), replica_groups=[4,2]<=[2,4]T(1,0)
  %light = bf16[8,16]{1,0} add(%x, %x), backend_config={"window_config":{"estimated_cycles":"10"}}
  %offloaded = bf16[8,16] fusion(%x), backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  %back = bf16[8,16]{1,0} all-to-all-done(%again)
  %all = bf16[8,16] all-gather(%back), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={1}
  %far = (bf16[4,4], u32[], token[]) recv(%token), is_host_transfer=true
  %pallas = bf16[8,16] custom-call(%all), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"900"}}
  %near = (bf16[4,4], token[]) recv-done(%far), is_host_transfer=true
  %part = bf16[2,16] fusion(%pallas), kind=kCustom, calls=%all-reduce-scatter.3
  %strange.1 = bf16[8,16] custom-call(%pallas), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], bf16[8,16]) tuple(%p, %strange.1)
}
%all-reduce-scatter.3 (c: bf16[8,16]) -> bf16[2,16] {
  %c = bf16[8,16]{1,0} parameter(0)
  %sum = bf16[8,16]{1,0} all-reduce(%c), replica_groups=[2,4]<=[8]
  ROOT %kept = bf16[2,16]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={2,16}
}
%product (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,16]{1,0} constant({...})
  ROOT %ab = bf16[8,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}
%condition (p: (s32[], bf16[8,16])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  %p.1 = (s32[], bf16[8,16]) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (x: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %start = (s32[], bf16[8,16]) parameter(0)
  ROOT %loop = (s32[], bf16[8,16]) while(%start), condition=%condition, body=%body
}
"""
needs_compiler = pytest.mark.skipif(bool(schedule.missing()), reason=schedule.missing())


def test_loop_bodies_count_once_per_iteration():
    """The inner of two nested loops has a matrix product and two exchanges, the outer one an exchange."""
    mesh = jax.make_mesh(tuple(AXES.values()), tuple(AXES), (jax.sharding.AxisType.Auto,) * 2)

    def local(x_BD, w_DD):
        def inner(x_BD, _):
            y_BD = jax.lax.all_to_all(x_BD @ w_DD, "tensor", 0, 0, tiled=True)
            return jax.lax.ppermute(y_BD, "data", [(0, 1), (1, 0)]), None

        def outer(x_BD, _):
            x_BD = jax.lax.scan(inner, x_BD, length=INNER)[0]
            return x_BD + jax.lax.psum(x_BD, ("data", "tensor")), None
        return jax.lax.scan(outer, x_BD, length=OUTER)[0]

    split = P(("data", "tensor"))
    function = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(split, P()), out_specs=split, check_vma=False))
    array = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    text = function.lower(array((8 * D, D), split), array((D, D), P())).compile().as_text()
    program = hlo.analyse(text, AXES)
    assert program.flops == OUTER * INNER * 2 * D ** 3
    assert not program.unknown and not program.flops_kernels
    assert sorted((c.kind, c.axes, c.bytes, c.times) for c in program.collectives) == [
        ("all-reduce", "data+tensor", 4 * D * D * 7 // 4, OUTER), ("all-to-all", "tensor", 4 * D * D * 3 // 4, OUTER * INNER),
        ("collective-permute", "data", 4 * D * D, OUTER * INNER)]


def test_tpu_programs():
    """Covers loop bounds in conditions, three ways to write replica groups, and work that overlaps an exchange."""
    program = hlo.analyse(TPU_LOOP, AXES)
    assert [c[:5] for c in program.collectives] == [
        ("all-to-all", "data", 128, 7, True), ("all-to-all", "data", 128, 7, False), ("all-gather", "tensor", 192, 7, False),
        ("recv", "slices", 32, 7, True), ("reduce-scatter", "tensor", 192, 7, False)]
    assert (program.flops, program.flops_kernels) == (7 * (2 * 8 * 16 * 16 + 900), 6300)
    assert (program.cycles_matrix, program.cycles_other) == (700, 70)
    assert program.unknown == {"strange": 7}


PRODUCT = """  %x.1 = f32[8,16] parameter(0)
  %w.1 = f32[16,16] constant({...})
  ROOT %y.1 = f32[8,16] dot(%x.1, %w.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}"""
RUN_TIME_LOOP = f"""
%much (x.1: f32[8,16]) -> f32[8,16] {{
{PRODUCT}
}}
%none (x.2: f32[8,16]) -> f32[8,16] {{
  ROOT %x.2 = f32[8,16] parameter(0)
}}
%body (p: (s32[], s32[], f32[40,16])) -> (s32[], s32[], f32[40,16]) {{
  %p = (s32[], s32[], f32[40,16]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %all = f32[40,16] get-tuple-element(%p), index=2
  %part = f32[8,16] dynamic-slice(%all, %i, %i), dynamic_slice_sizes={{8,16}}
  %branch = f32[8,16] conditional(%i, %part, %part), branch_computations={{%none, %much}}
  ROOT %t = (s32[], s32[], f32[40,16]) tuple(%i, %i, %all)
}}
%condition (p: (s32[], s32[], f32[40,16])) -> pred[] {{
  %p.1 = (s32[], s32[], f32[40,16]) parameter(0)
  %a = s32[] get-tuple-element(%p.1), index=0
  %b = s32[] get-tuple-element(%p.1), index=1
  ROOT %less = pred[] compare(%a, %b), direction=LT
}}
ENTRY %main (x: (s32[], s32[], f32[40,16])) -> (s32[], s32[], f32[40,16]) {{
  %start = (s32[], s32[], f32[40,16]) parameter(0)
  ROOT %loop = (s32[], s32[], f32[40,16]) while(%start), condition=%condition, body=%body
}}
"""


def test_a_loop_with_a_dynamic_bound_runs_once_per_slice_of_its_array():
    """40 rows in slices of 8 give five iterations. Of a conditional, the branch with the most matrix FLOPs counts."""
    assert hlo.analyse(RUN_TIME_LOOP, {}).flops == 5 * 2 * 8 * 16 * 16


def test_a_peeled_loop_starts_at_the_initial_value_of_its_counter():
    peeled = TPU_LOOP.replace("%start = (s32[], bf16[8,16]) parameter(0)", """%x0 = bf16[8,16] parameter(0)
  %one = s32[] constant(2)
  %start = (s32[], bf16[8,16]) tuple(%one, %x0)""")
    assert {c.times for c in hlo.analyse(peeled, AXES).collectives} == {5}


@pytest.mark.parametrize("window, shapes, labels, flops", [
    ("", ((8, 16), (16, 4), (8, 4)), "bf_io->bf", 2 * 8 * 16 * 4),
    # a batch of 4 products: 4 of the 4 x 4 pairs of an output position and a window position touch an element
    ("window={size=4 stride=3 lhs_dilate=4}, ", ((4, 8, 16), (4, 16, 2), (4, 8, 2)), "0bf_0io->0bf", 4 * 2 * 8 * 16 * 2),
    # heads as a spatial axis of the result: the window reaches beyond both ends
    ("window={size=1x8 pad=0_0x7_7}, ", ((2, 16, 1, 5), (1, 8, 16, 3), (2, 5, 8, 3)), "0f1b_01io->0b1f",
     2 * 2 * 5 * 16 * 8 * 3),
])
def test_products_written_as_convolutions(window, shapes, labels, flops):
    lhs, rhs, out = (f"f32[{','.join(map(str, shape))}]" for shape in shapes)
    text = (f"ENTRY %main () -> {out} {{\n  %a = {lhs} parameter(0)\n  %b = {rhs} parameter(1)\n"
            f"  ROOT %c = {out} convolution(%a, %b), {window}dim_labels={labels}\n}}\n")
    assert hlo.analyse(text, AXES).flops == flops


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "small.py").write_text(EXPERIMENT)
    return str(tmp_path / "small.py")


needs_gpu_compiler = pytest.mark.skipif(bool(ptx.missing()), reason=ptx.missing() or "")
PODS = [pytest.param("v5p:2x2x1", marks=needs_compiler), pytest.param("h100:1x4", marks=needs_gpu_compiler)]


@pytest.mark.parametrize("topology", PODS)
def test_an_expert_layer(topology, experiment, capfd):
    """Each token group is exchanged twice in the forward and twice in the backward pass, and not when the layer is recomputed.

    The routing weights of all groups are exchanged once per pass. Parameters are gathered and their gradients
    reduce-scattered; no all-reduce sums a whole parameter.
    """
    assert cli.main(["aot", "--config", experiment, "--topology", topology, "--mesh", "edp=-1,ep=2", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    layers, groups = 2, 4
    rows = {(row["kind"], row["axes"]): row for row in found["exchanges"]}
    assert found["fits"] and found["mesh"] == {"slice": 1, "edp": 2, "ep": 2, "etp": 1, "seq": 1}
    assert rows["all-to-all", "ep"]["runs"] == layers * (groups * 2 * 2 + 2)
    assert rows["all-to-all", "ep"]["overlapped"] > 0
    # scales and counts; of the step over ep alone the compiler sums some small parts
    assert sum(row["bytes"] for (kind, over), row in rows.items() if kind == "all-reduce" and "edp" in over) < 100_000
    if topology.startswith("h100"):     # this compiler merges gathers, and its kernels do not state FLOPs
        return
    # five mixer matrices and three expert matrices, each for the forward pass and for recomputation; embedding and head
    assert not found["unknown"]
    assert rows["all-gather", "edp"]["runs"] == layers * 2 * (5 + 3) + 2
    assert rows["reduce-scatter", "edp"]["runs"] >= layers * 3
    assert 1.3 < found["flops"] / found["flops_model"] < 3


def test_a_ragged_exchange_counts_at_most_its_result():
    """Covers the forms that TPU and GPU compilers write, with and without a separate start."""
    takes = "(bf16[8,16], bf16[24,16], s32[2], s32[2], s32[2], /*index=5*/s32[2])"
    operands = "(%x, %empty, %at, %sent, %lands, /*index=5*/%came), replica_groups={{0,4},{1,5},{2,6},{3,7}}"
    text = f"""ENTRY %main () -> bf16[24,16] {{
  %go = ({takes}, bf16[24,16], u32[], u32[]) ragged-all-to-all-start{operands}
  %come = bf16[24,16] ragged-all-to-all-done(%go)
  %gpu = ({takes}, bf16[24,16]) ragged-all-to-all-start{operands}
  ROOT %ragged_all_to_all.1 = bf16[24,16]{{1,0}} ragged-all-to-all{operands}
}}
"""
    assert [c[:4] for c in hlo.analyse(text, AXES).collectives] == 3 * [("ragged-all-to-all", "data", 2 * 24 * 16, 1)]


# TPUs pad the weight sent with a token to 512 bytes, which is as large as the token here
@pytest.mark.parametrize("topology, times", [pytest.param("v5p:2x2x1", 3, marks=needs_compiler),
                                             pytest.param("h100:1x4", 2, marks=needs_gpu_compiler)])
def test_ragged_experts(topology, times, experiment, capfd):
    """A group has three exchanges (routing weights, tokens, results) forward, three backward and none when recomputed."""
    assert cli.main(["aot", "--config", experiment, "--topology", topology, "--mesh", "edp=-1,ep=2", "--json",
                     "--config.model.ragged", "--config.model.layers=1", "--config.model.token_groups=2"]) == 0
    rows = {(row["kind"], row["axes"]): row for row in json.loads(capfd.readouterr().out)["exchanges"]}
    assert rows["ragged-all-to-all", "ep"]["runs"] == 2 * 6
    tokens = 4 * 512 // 4
    received, returned = 1.25 * tokens * 2 / 2, tokens * 2 / 2       # rows of a group: buffers for tokens and for results
    assert rows["ragged-all-to-all", "ep"]["bytes"] == pytest.approx(2 * times * (received + returned) * 256 * 2, rel=0.02)


@needs_compiler
def test_slices_exchange_gradients_once(experiment, capfd):
    """Each device exchanges its shard of the gradients, and besides only norm scales, counts and statistics."""
    assert cli.main(["aot", "--config", experiment, "--topology", "v5e:2x2", "--slices", "2", "--mesh", "slice=2,edp=2,ep=2",
                     "--config.train.batch=8", "--config.model.layers=1", "--config.model.token_groups=1", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    between, = (row for row in found["exchanges"] if "slice" in row["axes"])
    matrices, devices, matrix = 5 + 3 * 8 + 2, 4, 2 * 256 * 256
    assert 1 <= between["bytes"] / (matrices * matrix / devices) < 1.03


@pytest.mark.parametrize("message", [
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 39.80G of 31.25G hbm.",
    "Ran out of memory on HBM, the total memory required for HLO temporaries (39.80G) exceeds available HBM (31.25G).",
])
def test_the_sizes_in_an_out_of_memory_error_are_parsed(message):
    assert aot._parse_out_of_memory(message) == (39.8 * 2**30, 31.25 * 2**30)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        aot._parse_out_of_memory("INTERNAL: nothing about memory")


@pytest.mark.parametrize("topology, mesh, message", [
    ("v9:2x2", "edp=4", "'v9:2x2' is not of the form CHIP:SHAPE, for example v5p:8x8x8"),
    ("v5p:2xx", "edp=4", "is not of the form CHIP:SHAPE"),
    pytest.param("v5p:2x2x2x2", "edp=16", "the compiler does not support this topology", marks=needs_compiler),
    pytest.param("v5p:2x2x1", "edp=3", "mesh.edp=3 must multiply to the 4 devices of the pod", marks=needs_compiler),
    ("v5p:2x2x1", "edp=2,tp=2", "'tp=2' is not of the form AXIS=SIZE; axes are slice, edp, ep, etp, seq"),
    ("v5p:2x2x1", "edp=-1,ep=-1", "at most one may be -1"),
])
def test_an_invalid_argument_is_explained_in_one_line(experiment, capfd, topology, mesh, message):
    assert cli.main(["aot", "--config", experiment, "--topology", topology, "--mesh", mesh]) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err.splitlines()[-1]
