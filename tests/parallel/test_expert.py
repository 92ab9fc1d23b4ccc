"""The mixture of experts against a token-by-token oracle, its drops against a greedy simulation, any mesh against one."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from mmx.kernels import grouped
from mmx.parallel import expert

M, D, E, F, J = 48, 8, 4, 12, 2


@pytest.fixture(scope="module")
def weights():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(M, D), (D, E), (E, D, F), (E, D, F), (E, F, D)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes)]


def oracle(x_MD, router_DE, w1_EDF, w3_EDF, w2_EFD, keep_MJ):
    """All experts on all tokens, then the kept ones' weighted sum."""
    prob_ME = jax.nn.softmax(x_MD @ router_DE)
    top_MJ, expert_MJ = jax.lax.top_k(prob_ME, J)
    weight_MJ = top_MJ / top_MJ.sum(1, keepdims=True) * keep_MJ
    h_MEF = jax.nn.silu(jnp.einsum("MD,EDF->MEF", x_MD, w1_EDF)) * jnp.einsum("MD,EDF->MEF", x_MD, w3_EDF)
    y_MED = jnp.einsum("MEF,EFD->MED", h_MEF, w2_EFD)
    return jnp.einsum("MJ,MJD->MD", weight_MJ, jnp.take_along_axis(y_MED, expert_MJ[..., None], 1)), expert_MJ


def greedy(expert_MJ, live_M, limit):
    """Who is kept: first choices of all tokens, in order, then second ones."""
    taken, keep = np.zeros(E, int), np.zeros((M, J), bool)
    for j in range(J):
        for m in range(M):
            e = int(expert_MJ[m, j])
            if live_M[m] and taken[e] < limit:
                taken[e] += 1
                keep[m, j] = True
    return keep


LIVE = np.arange(M) % 7 != 3


@pytest.mark.parametrize("capacity", [0.0, 0.5, 1.0, 1.25])
def test_against_oracle_and_greedy_simulation(weights, capacity):
    live = jnp.asarray(LIVE)
    _, expert_MJ = oracle(*weights, jnp.ones((M, J)))
    limit = int(np.ceil(capacity * M * J / E)) if capacity else M * J
    keep = greedy(expert_MJ, LIVE, limit)
    moe = lambda *w: expert.moe(w[0], live, *w[1:], top_k=J, capacity=capacity)
    y_MD, logits_ME, stats = jax.jit(moe)(*weights)
    np.testing.assert_allclose(y_MD, oracle(*weights, keep)[0], atol=2e-5)
    assert (y_MD[~LIVE] == 0).all()
    np.testing.assert_allclose(stats.dropped, 1 - keep.sum() / (LIVE.sum() * J), atol=1e-6)
    counts = np.bincount(np.asarray(expert_MJ)[LIVE].ravel(), minlength=E)
    np.testing.assert_allclose(stats.load_E, counts / counts.sum(), atol=1e-6)
    np.testing.assert_allclose(stats.prob_E, jax.nn.softmax(logits_ME)[LIVE].mean(0), atol=1e-6)
    np.testing.assert_allclose(stats.z, (jax.nn.logsumexp(logits_ME, 1)[LIVE] ** 2).mean(), rtol=1e-5)
    cotangent = jax.random.normal(jax.random.key(9), (M, D))
    got = jax.jit(jax.grad(lambda *w: jnp.sum(moe(*w)[0] * cotangent), range(5)))(*weights)
    want = jax.grad(lambda *w: jnp.sum(oracle(*w, keep)[0] * cotangent), range(5))(*weights)
    for name, x, y in zip(("x", "router", "w1", "w3", "w2"), got, want):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y), name


@pytest.mark.parametrize("impl, block", [("blocks", 4), ("blocks", 16), ("ragged", 4), ("few", 0)])
def test_implementations_agree(weights, impl, block):
    """All rows to one expert and an empty one among them, some assignments dropped."""
    x_MD, _, *w = weights
    expert_MJ = jnp.stack([jnp.where(jnp.arange(M) % 5 == 0, 3, 0), jnp.full(M, 2)], 1)
    keep_MJ = jnp.asarray(np.random.default_rng(0).random((M, J)) < 0.8)
    weight_MJ = jax.random.uniform(jax.random.key(1), (M, J))
    chosen_MJE = jax.nn.one_hot(expert_MJ, E, dtype=jnp.int32) * keep_MJ[..., None]
    flat = chosen_MJE.reshape(M * J, E)
    rank_MJ = jnp.take_along_axis((jnp.cumsum(flat, 0) - 1).reshape(M, J, E), expert_MJ[..., None], 2)[..., 0]

    def run(x_MD, weight_MJ, *w):
        if impl == "few":
            return grouped.expert_ffn_few(x_MD, weight_MJ * keep_MJ, expert_MJ, *w)
        plan = grouped.plan(expert_MJ, rank_MJ, keep_MJ, flat.sum(0), block)
        return grouped.expert_ffn(x_MD, weight_MJ, *w, plan, block=block, impl=impl)

    def want(x_MD, weight_MJ, w1_EDF, w3_EDF, w2_EFD):
        h_MEF = jax.nn.silu(jnp.einsum("MD,EDF->MEF", x_MD, w1_EDF)) * jnp.einsum("MD,EDF->MEF", x_MD, w3_EDF)
        y_MED = jnp.einsum("MEF,EFD->MED", h_MEF, w2_EFD)
        return jnp.einsum("MJ,MJE,MED->MD", weight_MJ, chosen_MJE.astype(float), y_MED)

    args = (x_MD, weight_MJ, *w)
    np.testing.assert_allclose(jax.jit(run)(*args), want(*args), atol=3e-5)
    grads = [jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), range(5)))(*args) for f in (run, want)]
    for x, y in zip(*grads):
        assert np.linalg.norm(x - y) <= 2e-5 * np.linalg.norm(y)


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_any_mesh_equals_one_device(weights, devices, capacity):
    live = jnp.asarray(LIVE)

    def run(*w):
        y_MD, _, stats = expert.moe(w[0], live, *w[1:], top_k=J, capacity=capacity)
        return jnp.sum(jnp.sin(y_MD)) + stats.z, (y_MD, stats)

    step = lambda: jax.jit(jax.value_and_grad(run, range(5), has_aux=True))
    one = step()(*weights)
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(-1, 1, 1, 1), ("edp", "ep", "etp", "seq"),
                axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        many = step()(*weights)
    for x, y in zip(jax.tree.leaves(many), jax.tree.leaves(one)):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def test_balance_losses():
    even, skewed = jnp.full(E, 1 / E), jnp.array([1.0, 0, 0, 0])
    for form, balanced in (("switch", 1), ("hf", J), ("paper", 1 / E ** 2)):
        np.testing.assert_allclose(expert.balance_loss(even, even, J, form), balanced, rtol=1e-6)
        np.testing.assert_allclose(expert.balance_loss(skewed, skewed, J, form), balanced * E, rtol=1e-6)
