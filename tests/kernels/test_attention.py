"""Compares blockwise softmax attention with the full score matrix: values, every gradient, skipped blocks, memory."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.kernels.attention import reference, softmax_attention, xla

TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-3}
NAMES = ("o", "lse", "dq", "dk", "dv")
FLOOR = -30         # replaces the lse of -inf of a query without visible keys; lower than every other lse in these tests


def segments(kind, B, T):
    """Returns segments that contain documents or padding, by kind; every row is different."""
    rows = np.ones((B, T), np.int32)
    for b in range(B):
        if kind == "edges":             # documents begin on block edges
            rows[b] = 1 + np.arange(T) // 16
        elif kind == "many":            # documents of 1, 2, 3, ... tokens
            rows[b] = 1 + np.searchsorted(np.cumsum(np.arange(1, T + 1)), np.arange(T) + b, side="right")
        elif kind == "left":
            rows[b, :T * (b + 1) // 5] = 0
        elif kind == "right":           # the last row is only padding
            rows[b, 0 if b == B - 1 else T - T * (b + 1) // 5:] = 0
        elif kind == "holes":           # padding inside documents and between them
            rows[b] = (1 + np.arange(T) // 23) * (np.arange(T) % (5 + b) != 2)
    return None if kind is None else rows


def inputs(H, G, T, S=None, dtype="float32", B=3, K=8, V=12):
    rng = np.random.default_rng(T)
    shapes = (B, H, T, K), (B, G, S or T, K), (B, G, S or T, V), (B, H, T, V)
    *args, do = (rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)) for shape in shapes)
    return args, do


@functools.partial(jax.jit, static_argnums=(0, 1))
def values_and_gradients(attention, blocks, args, do, *visibility):
    def floored(*args):
        o, lse = attention(*args, *visibility, *blocks)
        return o, jnp.maximum(lse, FLOOR)
    out, pull = jax.vjp(floored, *args)
    return *out, *pull((do, do[..., 0].astype(out[1].dtype)))


def blockwise(args, do, segments_BT=None, segments_BS=None, start_B=None, blocks=(16, 8)):
    blocks = min(blocks[0], args[0].shape[2]), blocks[1]
    got = values_and_gradients(xla.attention, blocks, args, do, segments_BT, segments_BS, start_B)
    return [np.array(x, np.float64) for x in got]


def oracle(args, do, segments_BT=None, segments_BS=None, start_B=None):
    args, do = jax.tree.map(lambda x: x.astype(np.float32), (args, do))
    return values_and_gradients(reference.attention_lse, (), args, do, segments_BT, segments_BS, start_B)


def assert_close(got, want, dtype="float32"):
    for name, x, y in zip(NAMES, got, want):
        y = np.asarray(y, np.float64)
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("H, G, T, kind, dtype", [
    (1, 1, 37, None, "float32"), (4, 4, 10, "many", "float32"), (3, 1, 64, "edges", "float32"),
    (4, 2, 50, "many", "float32"), (4, 2, 50, "left", "float32"), (4, 2, 50, "right", "float32"),
    (4, 2, 50, "holes", "float32"), (4, 2, 50, "holes", "bfloat16")])
def test_equals_the_full_matrix(H, G, T, kind, dtype):
    args, do = inputs(H, G, T, dtype=dtype)
    seg = segments(kind, 3, T)
    assert_close(blockwise(args, do, seg, seg), oracle(args, do, seg, seg), dtype)


def test_block_sizes_change_nothing():
    args, do = inputs(4, 2, 50)
    seg = segments("holes", 3, 50)
    assert_close(blockwise(args, do, seg, seg, blocks=(8, 32)), blockwise(args, do, seg, seg))


@pytest.mark.parametrize("T", [1, 20])
def test_cache(T):
    """One token or a chunk, at a different position of the cache in each row; one row has padding on the left."""
    args, do = inputs(4, 2, T, 45)
    start = np.array([0, 25, 9])
    keys_seg = (np.arange(45) >= np.array([0, 13, 0])[:, None]).astype(np.int32)
    for visibility in ((None, None, start), (np.ones((3, T), np.int32), keys_seg, start)):
        assert_close(blockwise(args, do, *visibility), oracle(args, do, *visibility))


@pytest.mark.parametrize("window", [1, 13, 40])
@pytest.mark.parametrize("kind, T, S, start", [(None, 61, 61, None), ("many", 61, 61, None), (None, 5, 70, [3, 0, 60]),
                                               (None, 1, 70, [3, 0, 60])])
def test_window(kind, T, S, start, window):
    """Windows of one token, of less than a block and of several blocks; with documents, and with a cache."""
    args, do = inputs(4, 2, T, S)
    visibility = [segments(kind, 3, T)] * 2 if kind else [None, None]
    visibility.append(None if start is None else np.array(start, np.int32))
    attention = functools.partial(xla.attention, window=window)
    got = values_and_gradients(attention, (min(16, T), 8), args, do, *visibility)
    want = values_and_gradients(functools.partial(reference.attention_lse, window=window), (), args, do, *visibility)
    assert_close(got, want)


def test_public_function():
    """Tests the defaults of segments, starts and blocks. 300 tokens are more than one block."""
    (q, k, v), _ = inputs(4, 2, 300, B=2)
    attention, full = jax.jit(softmax_attention, static_argnames="impl"), jax.jit(reference.attention)
    seg = segments("many", 2, 300)
    np.testing.assert_allclose(attention(q, k, v, segments_BT=seg, impl="xla"), full(q, k, v, seg, seg), atol=1e-5)

    chunk, start, live = q[:, :, :9], np.array([7, 250]), np.arange(9) < np.array([[9], [5]])
    got = attention(chunk.astype(jnp.bfloat16), k, v, segments_BT=3 * live, start_B=start)
    want = np.where(live[:, None, :, None], full(chunk, k, v, None, None, start), 0)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), want, atol=3e-2)


def test_packed_documents_equal_separate_ones():
    args, do = inputs(4, 2, 50)
    both = np.repeat([[1, 2]], 25, axis=1).repeat(3, 0)
    packed = blockwise(args, do, both, both)
    for document in (1, 2):
        alone = blockwise(args, do, both * (both == document), both * (both == document))
        inside = both[0] == document
        assert_close([x[:, :, inside] for x in packed], [x[:, :, inside] for x in alone])
        assert all(not x[:, :, ~inside].any() for name, x in zip(NAMES, alone) if name != "lse")


def test_lse_combines_results_over_parts_of_the_keys():
    """Combines results as sequence parallelism does: each half of the queries attends to each half of the keys.

    For one of these pairs all keys are in the future.
    """
    (q, k, v), do = inputs(4, 2, 64)
    seg = segments("holes", 3, 64)

    @jax.jit
    def combined(q, k, v):
        def half(n):
            rows = slice(32 * n, 32 * n + 32)
            o, lse = zip(*(softmax_attention(
                q[:, :, rows], k[:, :, keys], v[:, :, keys], segments_BT=seg[:, rows], segments_BS=seg[:, keys],
                start_B=jnp.full(3, rows.start - keys.start), return_lse=True) for keys in (slice(0, 32), slice(32, 64))))
            share = jax.nn.softmax(jnp.maximum(jnp.stack(lse), FLOOR), axis=0)      # a padding query sees no keys in any part
            return sum(w[..., None] * x for w, x in zip(share, o)), jax.nn.logsumexp(jnp.stack(lse), 0)
        return [jnp.concatenate(x, 2) for x in zip(half(0), half(1))]
    got = [np.array(x, np.float64) for x in values_and_gradients(combined, (), (q, k, v), do)]
    assert_close(got, oracle((q, k, v), do, seg, seg))


def test_causality_by_gradient():
    args, do = inputs(4, 2, 50)
    one = segments("one", 3, 50)
    for t in (0, 15, 16, 49):
        _, _, dq, dk, dv = blockwise(args, do * (np.arange(50) == t)[:, None], one, one)
        assert not dk[:, :, t + 1:].any() and not dv[:, :, t + 1:].any() and dv[:, :, :t + 1].any((0, 1, 3)).all()
        assert not np.delete(dq, t, 2).any()


def test_large_scores():
    """Scores of thousands, the largest of them masked for most queries: no overflow, and no sum of zero."""
    (q, k, v), do = inputs(4, 2, 50)
    k = k * np.where(np.arange(50) < 25, 100, 10000)[:, None].astype(np.float32)
    one = segments("one", 3, 50)
    assert_close(blockwise((q, k, v), do, one, one)[:1], oracle((q, k, v), do, one, one)[:1])


def test_skipped_blocks_are_not_read():
    """NaN in keys of other documents or above the diagonal does not reach outputs or gradients."""
    (q, k, v), do = inputs(3, 1, 64)
    documents = np.repeat([[1, 2, 3, 3]], 16, axis=1).repeat(3, 0)
    for seg, bad, good in ((documents, slice(32, 64), slice(0, 32)), (documents, slice(0, 32), slice(32, 64)),
                            (documents * 0 + 1, slice(32, 64), slice(0, 32))):
        bad_k, bad_v, good_do = k.copy(), v.copy(), do * 0
        bad_k[:, :, bad] = bad_v[:, :, bad] = np.nan
        good_do[:, :, good] = do[:, :, good]
        o, _, dq, dk, dv = blockwise((q, bad_k, bad_v), good_do, seg, seg)
        finite = (o, dq, dk, dv) if seg is documents else (o, dq)   # in one document, later queries see all keys
        assert all(np.isfinite(x[:, :, good]).all() for x in finite), bad
        assert np.isnan(o[:, :, bad]).any()


def visited_pairs(T, document, start=None, S=None, axis=1, padding=0):
    """Returns how many pairs of blocks of 64 the loops visit. Documents have `document` tokens, `padding` of them padding."""
    t = np.arange(T, dtype=np.int32)
    seg = None if document is None else ((1 + t // document) * (t % document < document - padding))[None]
    visibility = xla.Visibility(T, S or T, min(T, 64), 64, seg, seg, None if start is None else np.array(start))
    first, end = jax.jit(lambda: visibility.block_ranges(axis))()
    return np.maximum(np.subtract(end, first), 0).sum()


@pytest.mark.parametrize("axis", [0, 1])
def test_number_of_visited_pairs(axis):
    assert visited_pairs(1024, None, axis=axis) == 16 * 17 // 2           # the causal half
    assert visited_pairs(1024, 128, axis=axis) == 8 * 3                   # documents of two blocks
    assert visited_pairs(4096, 96, axis=axis) < 2 * 64                    # at most one earlier block
    assert visited_pairs(4096, 96, axis=axis, padding=9) < 2 * 64         # padding is not a document
    assert visited_pairs(1, None, [70, 130], 4096, axis=axis) == 3        # one token visits the filled part of the cache


def test_memory_is_linear_in_length():
    def temporary_bytes(T):
        shape = jax.ShapeDtypeStruct((1, 4, T, 16), jnp.float32)
        grad = jax.grad(lambda q, k, v: softmax_attention(q, k, v).sum(), (0, 1, 2))
        return jax.jit(grad).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes
    assert temporary_bytes(4096) <= 4 * temporary_bytes(1024)


def test_remat_and_scan_change_nothing():
    (q, k, v), do = inputs(4, 4, 10, V=8)
    seg = segments("many", 3, 10)

    def layer(q, _):
        return softmax_attention(q, k, v, segments_BT=seg), None

    unrolled = jax.jit(jax.grad(lambda q: (layer(layer(q, None)[0], None)[0] * do).sum()))
    scanned = jax.jit(jax.grad(lambda q: (jax.lax.scan(jax.checkpoint(layer), q, None, 2)[0] * do).sum()))
    np.testing.assert_allclose(scanned(q), unrolled(q), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("change, error, message", [
    (dict(q_BHTK=(2, 4, 9)), ValueError, "q_BHTK needs 4 axes"),
    (dict(k_BGSK=(2, 2, 9, 6)), ValueError, "k_BGSK has K=6"),
    (dict(k_BGSK=(2, 3, 9, 8), v_BGSV=(2, 3, 9, 8)), ValueError, "H=4 heads, which must be a multiple of the G=3"),
    (dict(v_BGSV=(2, 2, 8, 8)), ValueError, "v_BGSV has S=8"),
    (dict(segments_BT=(2, 8)), ValueError, "segments_BT has T=8"),
    (dict(segments_BT=(2, 9), segments_BS=(1, 9)), ValueError, "segments_BS has B=1"),
    (dict(segments_BS=(2, 9)), ValueError, "segments_BS was given without segments_BT"),
    (dict(start_B=(3,)), ValueError, "start_B has B=3"),
    (dict(impl="cuda"), NotImplementedError, "impl='cuda' does not exist; softmax attention has xla, tpu, gpu")])
def test_errors_name_the_argument(change, error, message):
    args = dict(q_BHTK=(2, 4, 9, 8), k_BGSK=(2, 2, 9, 8), v_BGSV=(2, 2, 9, 8)) | change
    args = {name: x if name == "impl" else np.zeros(x, np.float32 if name[0] in "qkv" else np.int32)
            for name, x in args.items()}
    with pytest.raises(error, match=message) as caught:
        softmax_attention(args.pop("q_BHTK"), args.pop("k_BGSK"), args.pop("v_BGSV"), **args)
    assert "\n" not in str(caught.value)
