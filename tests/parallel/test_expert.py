"""The mixture of experts: values, gradients and drops against a token-by-token oracle; every mesh against one device."""
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mmx.parallel import expert
from mmx.parallel.routing import Routing, Stats, balance_loss, expert_capacity

M, D, E, F = 40, 6, 4, 6
QUICK = {"xla_backend_optimization_level": 0}      # most of these tests' time is compilation
NAMES = ("x_MD", "router_DE", "w1_EDF", "w3_EDF", "w2_EFD")


def inputs(M=M):
    """Returns tokens (off centre, so that the load is uneven) and weights; and the cotangents for `step`."""
    keys = jax.random.split(jax.random.key(M), 8)
    shapes = (M, D), (D, E), (E, D, F), (E, D, F), (E, F, D), (M, D), (M, E), (E,)
    arrays = [jax.random.normal(key, s) for key, s in zip(keys, shapes)]
    return [arrays[0] + 0.5, *arrays[1:5]], arrays[5:]


def live(M=M):
    return np.arange(M) % 7 != 3


@functools.partial(jax.jit, static_argnums=0, static_argnames=("top_k", "capacity", "transport", "token_groups", "ragged"),
                   compiler_options=QUICK)
def step(function, args, cotangents, given, **settings):
    """Returns a dict of the outputs, and of the gradients of all arguments."""
    def objective(*args):
        y_MD, logits_ME, stats = function(*args, given, **settings)
        dy_MD, dlogits_ME, dprob_E = cotangents
        total = jnp.sum(y_MD * dy_MD) + jnp.sum(logits_ME * dlogits_ME) + jnp.sum(stats.prob_E * dprob_E) + stats.z
        return total, (y_MD, logits_ME, stats)
    (_, out), grads = jax.value_and_grad(objective, range(5), has_aux=True)(*args)
    return {**dict(zip(("y_MD", "logits_ME"), out)), **out[2]._asdict(), **{f"d{n}": g for n, g in zip(NAMES, grads)}}


def moe(x_MD, router_DE, w1_EDF, w3_EDF, w2_EFD, live_M, *, top_k, capacity, **settings):
    """`expert.moe` of M tokens, as up to eight rows. Its queues then follow the order of M."""
    B = math.gcd(len(x_MD), 8)
    y_BTD, logits_BTE, stats = expert.moe(x_MD.reshape(B, -1, D), live_M.reshape(B, -1), router_DE, (w1_EDF, w3_EDF, w2_EFD),
                                          Routing(top_k, capacity, **settings))
    return y_BTD.reshape(-1, D), logits_BTE.reshape(-1, E), stats


def token_by_token(x_MD, router_DE, w1_EDF, w3_EDF, w2_EFD, given, *, top_k):
    """The oracle: each token's top experts with renormalised probabilities. `given`: live_M and keep_Mj."""
    live_M, keep_Mj = given

    def token(x_D, keep_j):
        logits_E = x_D @ router_DE
        top_j, expert_j = jax.lax.top_k(jax.nn.softmax(logits_E), top_k)
        y_jD = jnp.stack([(jax.nn.silu(x_D @ w1_EDF[e]) * (x_D @ w3_EDF[e])) @ w2_EFD[e] for e in expert_j])
        return keep_j * top_j / top_j.sum() @ y_jD, logits_E, expert_j

    y_MD, logits_ME, expert_Mj = jax.vmap(token)(x_MD, keep_Mj)
    real = jnp.maximum(live_M.sum(), 1)
    chosen_MjE = jax.nn.one_hot(expert_Mj, E) * live_M[:, None, None]
    z_M = jax.nn.logsumexp(logits_ME, axis=1) ** 2
    prob_E = jnp.sum(jax.nn.softmax(logits_ME) * live_M[:, None], 0) / real
    return y_MD, logits_ME, Stats(chosen_MjE.sum((0, 1)) / (real * top_k), prob_E, jnp.sum(z_M * live_M) / real,
                                         1 - keep_Mj.sum() / (real * top_k), 0.0)


def greedy(logits_ME, live_M, top_k, capacity):
    """Returns keep_Mj: first choices in the order of tokens, then second choices, as long as their expert has room."""
    M = len(logits_ME)
    limit = math.ceil(Fraction(str(capacity)) * int(live_M.sum()) * top_k / E) if capacity else M * top_k
    expert_Mj, taken_E, keep_Mj = np.argsort(-logits_ME, axis=1)[:, :top_k], [0] * E, np.zeros((M, top_k), bool)
    for j in range(top_k):
        for m in np.flatnonzero(live_M):
            keep_Mj[m, j] = taken_E[expert_Mj[m, j]] < limit
            taken_E[expert_Mj[m, j]] += 1
    return keep_Mj


def assert_same(got, want, tolerance=2e-6):
    assert got.keys() == want.keys()
    for name in want:
        x, y = np.asarray(got[name], np.float64), np.asarray(want[name], np.float64)
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-6)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.case(17)
def test_capacity_follows_real_tokens():
    """A row that is padded to twice its length drops the same assignments as the row alone."""
    args, cotangents = inputs()
    half, (_, half_cotangents) = [args[0][:M // 2], *args[1:]], inputs(M // 2)
    alone = step(moe, half, half_cotangents, np.ones(M // 2, bool), top_k=2, capacity=0.5)
    padded = step(moe, args, cotangents, np.arange(M) < M // 2, top_k=2, capacity=0.5)
    assert 0 < alone["dropped"] < 1 and padded["dropped"] == pytest.approx(float(alone["dropped"]))
    np.testing.assert_allclose(padded["y_MD"][:M // 2], alone["y_MD"], atol=2e-6)


def test_capacities_are_exact():
    """Against fractions, for numbers of assignments that are known and that are traced."""
    counts = np.array([0, 1, 7, 10, 999, 65_536, 16_777_217, 2**31 - 2])
    for E in (1, 3, 8, 32, 256, 65_536):
        for capacity in ("0.001", "0.5", "1", "1.1", "1.25", "1.333", "2.5", "7.999"):
            want = [min(n, math.ceil(Fraction(capacity) * n / E)) for n in counts.tolist()]
            known = [expert_capacity(float(capacity), n, E) for n in counts.tolist()]
            traced = jax.vmap(lambda n: expert_capacity(float(capacity), n, E))(counts.astype(np.int32))
            if float(capacity) * E <= 1000:
                assert known == want, (E, capacity)
            else:       # a rounded fraction
                np.testing.assert_allclose(known, want, rtol=1e-3, atol=1)
            assert traced.tolist() == known, (E, capacity)


# with 3 tokens, the assignments are computed one by one
@pytest.mark.parametrize("M, top_k, capacity", [(M, 2, 0.0), (M, 2, 0.5), (M, 2, 1.1), (M, 1, 0.75), (M, 3, 1.0), (3, 2, 0.5)])
def test_equals_oracle_with_greedy_drops(M, top_k, capacity):
    args, cotangents = inputs(M)
    live_M = live(M)
    keep_Mj = greedy(np.asarray(args[0] @ args[1]), live_M, top_k, capacity)
    assert (capacity > 0) == (keep_Mj.sum() < live_M.sum() * top_k)
    got = step(moe, args, cotangents, live_M, top_k=top_k, capacity=capacity)
    assert_same(got, step(token_by_token, args, cotangents, (live_M, keep_Mj), top_k=top_k))
    assert (got["y_MD"][~live_M] == 0).all()
    np.testing.assert_allclose(got["load_E"].sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("capacity, kept", [(0.0, M), (0.5, -(-int(live().sum()) // 2))])
def test_one_expert_equals_four_identical_experts(capacity, kept):
    """The dense path against the sorted path: top-1 of four experts with the same weights, whose gradients are summed."""
    (x_MD, router_DE, *_), (dy_MD, *_) = inputs()
    one = [w[:1] for w in inputs()[0][2:]]
    live_M = jnp.asarray(live()) & (jnp.cumsum(live()) <= kept)

    @functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
    def run(capacity, E, live_M):
        def objective(x_MD, *weights):
            y_MD, _, stats = moe(x_MD, router_DE[:, :E], *[w.repeat(E, 0) for w in weights], live_M, top_k=1, capacity=capacity)
            return jnp.sum(y_MD * dy_MD), (y_MD, stats.dropped)
        return jax.value_and_grad(objective, range(4), has_aux=True)(x_MD, *one)

    (_, (y_MD, dropped)), grads = run(capacity, 1, live())
    (_, (want_MD, _)), want = run(0.0, 4, live_M)
    assert_same(dict(zip(("y_MD", "dx_MD", "dw1", "dw3", "dw2"), (y_MD, *grads))),
                dict(zip(("y_MD", "dx_MD", "dw1", "dw3", "dw2"), (want_MD, *want))))
    assert dropped == pytest.approx(1 - live_M.sum() / live().sum()) and (dropped > 0) == (capacity > 0)


def test_padding_only():
    args, cotangents = inputs()
    got = step(moe, args, cotangents, np.zeros(M, bool), top_k=2, capacity=0.0)
    for name in ("y_MD", "load_E", "prob_E", "z"):
        assert (got[name] == 0).all(), name
    assert all(np.isfinite(x).all() for x in got.values())


def test_router_computes_in_float32():
    args, _ = inputs()
    rounded = [a.astype(jnp.bfloat16) for a in args]
    options = {"xla_allow_excess_precision": False}        # otherwise XLA may skip a rounding
    y_MD, logits_ME, _ = jax.jit(functools.partial(moe, top_k=2, capacity=0.0), compiler_options=options)(*rounded, live())
    assert y_MD.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits_ME, rounded[0].astype(jnp.float32) @ rounded[1].astype(jnp.float32), atol=1e-5)


def make_mesh(sizes):
    """`sizes`: of edp, ep, etp, seq."""
    return jax.make_mesh((1, *sizes), ("slice", "edp", "ep", "etp", "seq"), (AxisType.Auto,) * 5,
                         devices=jax.devices()[:math.prod(sizes)])


# With 16 tokens on 8 devices, assignments are computed one by one. One row of 3 tokens cannot be sharded, nor can rows of
# 5 tokens over two devices: each device then has all tokens.
@pytest.mark.parametrize("M, sizes, capacity, replicated, settings", [
    (M, (8, 1, 1, 1), 0.75, False, {}), (16, (8, 1, 1, 1), 0.75, False, {}), (3, (2, 2, 2, 1), 0.5, True, {}),
    (M, (2, 2, 2, 1), 0.75, True, {}), (16, (2, 2, 2, 1), 0.75, False, {}),
    (M, (2, 4, 1, 1), 0.75, False, {"token_groups": 3})])
def test_any_mesh_equals_one_device(M, sizes, capacity, replicated, settings):
    args, cotangents = inputs(M)
    one = step(moe, args, cotangents, live(M), top_k=2, capacity=capacity)
    with jax.set_mesh(make_mesh(sizes)):
        many = step(moe, args, cotangents, live(M), top_k=2, capacity=capacity, **settings)
    assert_same(many, one)
    assert many["y_MD"].sharding.is_fully_replicated == replicated


def test_overflow_is_counted_apart_from_drops():
    """Devices with ten tokens and five slots for each peer: first choices are sent first; drops do not change."""
    args, cotangents = inputs()
    keep_Mj = greedy(np.asarray(args[0] @ args[1]), live(), 2, 1.2)
    expert_Mj, sent_Mj, taken = np.argsort(-np.asarray(args[0] @ args[1]), axis=1), keep_Mj.copy(), np.zeros((4, E), int)
    for j in range(2):
        for m in np.flatnonzero(keep_Mj[:, j]):
            sent_Mj[m, j] = taken[m // 10, expert_Mj[m, j]] < 5
            taken[m // 10, expert_Mj[m, j]] += 1
    want = step(token_by_token, args, cotangents, (live(), sent_Mj), top_k=2)
    overflow = (keep_Mj.sum() - sent_Mj.sum()) / (2 * live().sum())
    assert overflow > 0.05
    with jax.set_mesh(make_mesh((1, 4, 1, 1))):
        got = step(moe, args, cotangents, live(), top_k=2, capacity=1.2, transport=1.0)
    assert_same(got, want | {"overflow": overflow, "dropped": want["dropped"] - overflow})


@pytest.mark.parametrize("sizes, capacity, settings", [
    ((2, 4, 1, 1), 0.75, {"token_groups": 3}), ((2, 2, 2, 1), 0.75, {}), ((1, 4, 1, 2), 0.0, {"transport": 9.0})])
def test_ragged_exchange_equals_one_device(sizes, capacity, settings, ragged_on_cpu):
    args, cotangents = inputs()
    one = step(moe, args, cotangents, live(), top_k=2, capacity=capacity)
    with jax.set_mesh(make_mesh(sizes)):
        many = step(moe, args, cotangents, live(), top_k=2, capacity=capacity, ragged=True, **settings)
    assert_same(many, one)


def test_ragged_slots_are_shared_by_all_peers(ragged_on_cpu):
    """Devices with ten tokens that receive up to twenty: earlier devices come first, and within a device first choices."""
    args, cotangents = inputs()
    keep_Mj = greedy(np.asarray(args[0] @ args[1]), live(), 2, 0.0)
    expert_Mj, sent_Mj, taken_E = np.argsort(-np.asarray(args[0] @ args[1]), axis=1), keep_Mj.copy(), np.zeros(E, int)
    for device in np.split(np.arange(M), 4):
        for j in range(2):
            for m in device[keep_Mj[device, j]]:
                sent_Mj[m, j] = taken_E[expert_Mj[m, j]] < 20
                taken_E[expert_Mj[m, j]] += 1
    want = step(token_by_token, args, cotangents, (live(), sent_Mj), top_k=2)
    overflow = (keep_Mj.sum() - sent_Mj.sum()) / (2 * live().sum())
    assert overflow > 0.05
    with jax.set_mesh(make_mesh((1, 4, 1, 1))):
        got = step(moe, args, cotangents, live(), top_k=2, capacity=0.0, transport=1.0, ragged=True)
    assert_same(got, want | {"overflow": overflow, "dropped": 0.0})


def test_number_of_collectives():
    """Outputs: for each of two groups an all-to-all there, one back and a reduce-scatter; and an all-to-all of router weights.

    Gradients do not need the outputs, so their forward part has three all-to-alls only; the backward part has five. Their
    reduce-scatters are the transposes of three gathers over etp and of the gathers of three matrices.
    """
    args, _ = inputs(16)

    def total(*args):
        return moe(*args, live(16), top_k=2, capacity=1.0, token_groups=2)[0].sum()
    with jax.set_mesh(make_mesh((2, 2, 2, 1))):
        forward, both = (jax.jit(f).lower(*args).as_text() for f in (total, jax.grad(total, range(5))))
    count = [{op: text.count(f"stablehlo.{op}") for op in ("all_to_all", "reduce_scatter")} for text in (forward, both)]
    assert count == [{"all_to_all": 5, "reduce_scatter": 2}, {"all_to_all": 3 + 5, "reduce_scatter": 3 + 3}]


@pytest.mark.parametrize("form, balanced", [("switch", 1), ("hf", 2), ("paper", 1 / E ** 2)])
def test_balance_loss(form, balanced):
    even_E, one_E = jnp.full(E, 1 / E), jnp.eye(E)[2]
    f_E, p_E = jnp.array([0.5, 0.25, 0.25, 0]), jnp.array([0.4, 0.3, 0.2, 0.1])
    for load_E, prob_E, over in ((even_E, even_E, 1), (one_E, one_E, E), (f_E, p_E, E * 0.325)):
        np.testing.assert_allclose(balance_loss(load_E, prob_E, 2, form), balanced * over, rtol=1e-6)
    df_E, dp_E = jax.grad(balance_loss, (0, 1))(f_E, p_E, 2, form)
    assert (df_E == 0).all()
    np.testing.assert_allclose(dp_E, balanced * E * f_E, rtol=1e-6)
