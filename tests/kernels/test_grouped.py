"""Compares the experts' SwiGLU over sorted tokens with all experts applied to all tokens: values and every gradient."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.kernels import grouped

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
QUICK = {"xla_backend_optimization_level": 0}      # most of the time of these tests is compilation
NAMES = ("y_MD", "dx_MD", "dweight_Mj", "dw1_EDF", "dw3_EDF", "dw2_EFD")
M, J, E, D, F = 37, 2, 5, 6, 7


def routing(kind, M=M):
    """Returns the experts of each token, all different, and which of these assignments are kept."""
    rng = np.random.default_rng(len(kind))
    score_ME = rng.random((M, E))
    if kind == "empty":             # two experts get no tokens: the first and one in the middle
        score_ME[:, [0, 2]] -= 1
    elif kind == "one":             # one expert gets every token, as first or second choice
        score_ME[:, 3] += rng.integers(0, 2, M)
        score_ME[:, 3] = np.maximum(score_ME[:, 3], np.sort(score_ME, axis=1)[:, -2])
    expert_Mj = np.argsort(-score_ME, axis=1)[:, :J]
    keep_Mj = rng.random((M, J)) < {"drops": 0.5, "none": 0}.get(kind, 1)
    return expert_Mj, keep_Mj


def ranks(expert_Mj, keep_Mj):
    """Returns the position of each kept assignment within its expert, and the number of kept assignments of each expert."""
    rank_Mj, count_E = np.zeros_like(expert_Mj), np.zeros(E, int)
    for m, j in np.argwhere(keep_Mj):
        rank_Mj[m, j] = count_E[expert_Mj[m, j]]
        count_E[expert_Mj[m, j]] += 1
    return rank_Mj, count_E


def inputs(dtype, M=M):
    shapes = (M, D), (M, J), (E, D, F), (E, D, F), (E, F, D), (M, D)
    x, weight, *w, dy = (jax.random.normal(key, s) for key, s in zip(jax.random.split(jax.random.key(M), 6), shapes))
    return tuple(a.astype(dtype) if a is not weight else a for a in (x, weight, *w)), dy.astype(dtype)


def all_experts(x_MD, weight_Mj, w1_EDF, w3_EDF, w2_EFD, expert_Mj, keep_Mj):
    h_MEF = jax.nn.silu(jnp.einsum("MD,EDF->MEF", x_MD, w1_EDF)) * jnp.einsum("MD,EDF->MEF", x_MD, w3_EDF)
    weight_ME = jnp.einsum("Mj,MjE->ME", weight_Mj * keep_Mj, jax.nn.one_hot(expert_Mj, E))
    return jnp.einsum("ME,MEF,EFD->MD", weight_ME, h_MEF, w2_EFD)


def sorted_experts(*args, block, impl):
    *args, expert_Mj, keep_Mj, rank_Mj, count_E = args
    return grouped.expert_ffn(*args, grouped.plan(expert_Mj, rank_Mj, keep_Mj, count_E, block), block=block, impl=impl)


def unrolled(x_MD, weight_Mj, w1_EDF, w3_EDF, w2_EFD, expert_Mj, keep_Mj):
    return grouped.expert_ffn_unrolled(x_MD, weight_Mj * keep_Mj, expert_Mj, w1_EDF, w3_EDF, w2_EFD)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def value_and_gradients(function, args, dy_MD, *route):
    y_MD, pull = jax.vjp(lambda *args: function(*args, *route), *args)
    return y_MD, *pull(dy_MD)


def oracle(args, dy_MD, *route):
    to_float32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    return value_and_gradients(all_experts, to_float32(args), to_float32(dy_MD), *route)


def assert_close(got, want, dtype):
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert x.dtype == (jnp.float32 if name == "dweight_Mj" else dtype), name
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e}"


SORTED = {(impl, block): functools.partial(sorted_experts, block=block, impl=impl)
          for impl, block in (("blocks", 1), ("blocks", 3), ("blocks", 8), ("blocks", 64), ("ragged", 1), ("ragged", 8))}


@pytest.mark.parametrize("kind", ["random", "drops", "empty", "one", "none"])
@pytest.mark.parametrize("impl, block", SORTED)
def test_against_all_experts(impl, block, kind):
    args, dy_MD = inputs("float32")
    expert_Mj, keep_Mj = routing(kind)
    got = value_and_gradients(SORTED[impl, block], args, dy_MD, expert_Mj, keep_Mj, *ranks(expert_Mj, keep_Mj))
    assert_close(got, oracle(args, dy_MD, expert_Mj, keep_Mj), "float32")


@pytest.mark.parametrize("impl", ["blocks", "ragged"])
def test_bfloat16(impl):
    args, dy_MD = inputs("bfloat16")
    expert_Mj, keep_Mj = routing("drops")
    got = value_and_gradients(SORTED[impl, 8], args, dy_MD, expert_Mj, keep_Mj, *ranks(expert_Mj, keep_Mj))
    assert_close(got, oracle(args, dy_MD, expert_Mj, keep_Mj), "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unrolled_for_few_tokens(dtype):
    args, dy_MD = inputs(dtype, M=4)
    route = routing("drops", M=4)
    assert_close(value_and_gradients(unrolled, args, dy_MD, *route), oracle(args, dy_MD, *route), dtype)


@pytest.mark.parametrize("kind", ["drops", "empty", "one"])
def test_rows_of_a_block_belong_to_one_expert(kind):
    expert_Mj, keep_Mj = routing(kind)
    rank_Mj, count_E = ranks(expert_Mj, keep_Mj)
    plan = jax.tree.map(np.asarray, grouped.plan(expert_Mj, rank_Mj, keep_Mj, count_E, 4))
    expert_r = np.repeat(np.arange(E), plan.blocks_E * 4)
    assert (plan.blocks_E == -(-count_E // 4)).all()
    assert (expert_r[plan.row_Mj[keep_Mj]] == expert_Mj[keep_Mj]).all()
    assert (plan.token_r[plan.row_Mj[keep_Mj]] == np.nonzero(keep_Mj)[0]).all()
    assert (plan.row_Mj[~keep_Mj] >= len(plan.token_r)).all()
    assert np.sum(plan.token_r < M) == keep_Mj.sum()


def test_error_of_unknown_impl_lists_the_implementations():
    args, _ = inputs("float32")
    with pytest.raises(NotImplementedError, match="impl='cuda' does not exist; expert_ffn has blocks, ragged"):
        grouped.expert_ffn(*args, None, block=8, impl="cuda")
