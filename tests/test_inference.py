"""Generation against recomputation, ragged batches against single prompts, sampling against its definition."""
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmx
from mmx import config
from mmx.checkpoints.convert import Loaded
from mmx.inference import engine, prefix
from mmx.kernels import int8
from mmx.model import Model
from mmx.parallel.cache import empty_cache

pytestmark = pytest.mark.usefixtures("compiled_once")
C = config.Model(dim=16, layers=4, pattern="LS", heads=2, kv_heads=1, head_dim=8, rotary_dim=4, experts=4, expert_dim=16,
                 init="fan_in", embed_std=1.0)


@pytest.fixture(scope="module")
def loaded():
    params = jax.jit(lambda: Model(C).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])()
    return Loaded(Model(C), params, C, "bytes")


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    for name, value in (("LEVELS", (32, 16, 8)), ("BLOCK", 8)):
        monkeypatch.setattr(engine, name, value)
    monkeypatch.setattr(engine.caches, "PLACES", 16)


def ids(B, T):
    return np.random.default_rng(T).integers(0, C.vocab, (B, T))


@pytest.mark.parametrize("T", [1, 16, 17, 40])
def test_greedy_equals_recomputation(loaded, T):
    prompt_BT = ids(2, T)
    new_BT = mmx.generate(loaded, prompt_BT, steps=6)
    assert new_BT.shape == (2, 6)
    whole = np.concatenate([prompt_BT, new_BT], axis=1)
    logits_BTW = mmx.forward(loaded, whole)
    assert (np.argmax(logits_BTW[:, T - 1:-1], axis=-1) == new_BT).all()


def test_ragged_prompts_equal_single_ones(loaded):
    prompts = ["a", "The state of the Union is strong, and", "", "Fellow citizens of the Senate"]
    together = mmx.generate(loaded, prompts, steps=12)
    assert together == [mmx.generate(loaded, [p], steps=12)[0] for p in prompts]
    assert len(set(together)) > 1


def test_one_string_is_a_list_of_one(loaded):
    assert mmx.generate(loaded, "abc", steps=5) == mmx.generate(loaded, ["abc"], steps=5)


def test_mask_hides_padding(loaded):
    row = ids(1, 9)
    plain = mmx.forward(loaded, row)
    right = mmx.forward(loaded, np.pad(row, ((0, 0), (0, 3))), np.pad(np.ones((1, 9)), ((0, 0), (0, 3))))
    left = mmx.forward(loaded, np.pad(row, ((0, 0), (3, 0))), np.pad(np.ones((1, 9)), ((0, 0), (3, 0))))
    np.testing.assert_allclose(right[:, :9], plain, atol=1e-5)
    np.testing.assert_allclose(left[:, 3:], plain, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_forward_under_jit_equals_eager(loaded, masked):
    tokens_BT = ids(2, 9)
    mask_BT = np.arange(9) < np.array([[9], [6]]) if masked else None
    want_BTW = mmx.forward(loaded, tokens_BT, mask_BT)
    traced = jax.jit(lambda tokens_BT, mask_BT, params: mmx.forward(loaded, tokens_BT, mask_BT, params=params))
    np.testing.assert_allclose(traced(tokens_BT, mask_BT, loaded.params), want_BTW, atol=1e-6)
    captured = jax.jit(lambda tokens_BT: mmx.forward(loaded, tokens_BT, mask_BT))
    np.testing.assert_allclose(captured(jnp.asarray(tokens_BT)), want_BTW, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_forward_equal_those_of_the_module(loaded, masked):
    """With respect to the parameters, against a computation that uses neither `forward` nor `model.logits`."""
    tokens_BT = ids(2, 9)
    mask_BT = np.arange(9) < np.array([[9], [6]]) if masked else np.ones((2, 9), bool)

    def nats(logits_BTW):
        logp_BTW = jax.nn.log_softmax(logits_BTW[:, :-1])
        next_BT1 = jnp.asarray(tokens_BT)[:, 1:, None]
        return -jnp.sum(jnp.take_along_axis(logp_BTW, next_BT1, axis=2)[..., 0] * mask_BT[:, 1:])

    def independent(params):
        x_BTD, _, _ = loaded.model.apply({"params": params}, tokens_BT, jnp.asarray(mask_BT, jnp.int32))
        return nats(x_BTD @ params["head_WD"].T)

    want = jax.grad(independent)(loaded.params)
    given = (mask_BT,) if masked else ()
    loss = lambda params, tokens_BT: nats(mmx.forward(loaded, tokens_BT, *given, params=params))
    for grads in (jax.grad(loss)(loaded.params, tokens_BT), jax.jit(jax.grad(loss))(loaded.params, tokens_BT)):
        for (path, got), expected in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want), strict=True):
            error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
            assert error < 1e-5, (jax.tree_util.keystr(path), error)


def test_forward_uses_other_parameters(loaded):
    other = jax.tree.map(lambda w: w * 1.5, loaded.params)
    want_BTW = mmx.forward(loaded._replace(params=other), ids(1, 5))
    np.testing.assert_array_equal(mmx.forward(loaded, ids(1, 5), params=other), want_BTW)


def test_forward_checks_known_values_and_the_shapes_of_traced_ones(loaded):
    bad = ids(1, 5) + C.vocab
    for call in (mmx.forward, jax.jit(lambda loaded_params, _: mmx.forward(loaded, bad, params=loaded_params))):
        with pytest.raises(config.ConfigError, match=f"vocabulary .* from 0 to {C.vocab - 1}"):
            call(*((loaded, bad) if call is mmx.forward else (loaded.params, 0)))
    for shape, dtype, message in (((5,), int, r"integer array \[B, T\]"), ((1, 5), float, "integer array"),
                                  ((1, 0), int, "T at least 1")):
        with pytest.raises(config.ConfigError, match=message):
            jax.jit(lambda tokens_BT: mmx.forward(loaded, tokens_BT))(np.zeros(shape, dtype))
    with pytest.raises(config.ConfigError, match="mask_BT has shape"):
        jax.jit(lambda tokens_BT, mask_BT: mmx.forward(loaded, tokens_BT, mask_BT))(ids(1, 5), np.ones((1, 4)))
    with pytest.raises(config.ConfigError, match="images need known token ids.*traced") as caught:
        jax.jit(lambda tokens_BT: mmx.forward(loaded, tokens_BT, images=[[]]))(ids(1, 5))
    assert "\n" not in str(caught.value)


def test_same_seed_same_draws(loaded):
    draw = lambda seed: mmx.generate(loaded, ids(2, 5), steps=20, temperature=1.0, seed=seed)
    assert (draw(1) == draw(1)).all()
    assert (draw(1) != draw(2)).any()
    assert (draw(1)[0] != draw(1)[1]).any()


def test_draws_do_not_depend_on_the_block(loaded, monkeypatch):
    draw = lambda: mmx.generate(loaded, ["one", "three"], steps=20, temperature=1.0, seed=3)
    first = draw()
    monkeypatch.setattr(engine, "BLOCK", 24)
    assert draw() == first


def draws(logits_W, count=4000, **how):
    draw = {f"{name}_B": np.full(count, how.get(name, default)) for name, default in (
        ("temperature", 1.0), ("top_k", len(logits_W)), ("top_p", 1.0))}
    logits_BW = jnp.broadcast_to(jnp.asarray(logits_W), (count, len(logits_W)))
    taken = np.asarray(engine._draw(logits_BW, jax.random.split(jax.random.key(0), count), draw))
    return np.bincount(taken, minlength=len(logits_W)) / count


def test_sampling_follows_its_distribution():
    p = np.array([0.5, 0.25, 0.15, 0.1])
    np.testing.assert_allclose(draws(np.log(p)), p, atol=0.03)
    hot = p ** 0.5 / (p ** 0.5).sum()
    np.testing.assert_allclose(draws(np.log(p), temperature=2.0), hot, atol=0.03)
    np.testing.assert_allclose(draws(np.log(p), top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(draws(np.log(p), top_p=0.7), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(draws(np.log(p), top_p=0.01), [1, 0, 0, 0])
    np.testing.assert_allclose(draws(np.log(p), top_k=3, top_p=0.6), [2 / 3, 1 / 3, 0, 0], atol=0.03)


def test_text_ends_at_the_first_stop_string_or_end_token(loaded):
    tokenizer = engine.tokenizers.tokenizer("bytes")

    def text(raw, stop=()):
        row = engine._Row(0, engine.Request("", 99, stop=tuple(stop)), lambda: tokenizer, C, behind=True)
        row.ids = list(raw)
        return row._text(len(row.ids))

    assert text(b"one two three") == ("one two three", False)
    assert text(b"one two three", ["three", "two"]) == ("one ", True)
    assert text([*b"one", tokenizer.eos, *b"two"]) == ("one", True)
    row = engine._Row(0, engine.Request("", 99, stop=("abcd", "b")), lambda: tokenizer, C, behind=True)
    piece = row.piece(np.array(list(b"xabcd")), np.zeros(5))
    assert (piece.text, bytes(piece.ids_T.tolist())) == ("xa", b"xab")      # the one that is complete first
    free = mmx.generate(loaded, ["abc"], steps=30)[0]
    assert mmx.generate(loaded, ["abc"], steps=30, stop=[free[4:6]])[0] == free[:free.find(free[4:6])]


def test_ids_end_where_the_text_does(loaded):
    """A block goes on behind a stop string; what it drew there is told of nobody."""
    tokenizer = engine.tokenizers.tokenizer("bytes")
    row = engine._Row(0, engine.Request("", 99, stop=("stop", "x")), lambda: tokenizer, C, behind=True)
    first, second = (row.piece(np.array(list(raw)), np.arange(float(len(raw)))) for raw in (b"one s", b"top and x"))
    assert (first.text, first.ended, bytes(first.ids_T.tolist())) == ("one ", False, b"one s")
    assert (second.text, second.ended, bytes(second.ids_T.tolist())) == ("", True, b"top")
    assert second.logprobs_T.tolist() == [0, 1, 2]


@pytest.mark.parametrize("prompts, how, message", [
    (np.zeros((1, 0), int), {}, "T at least 1"), (np.full((1, 3), 264), {}, "from 0 to 263"), ([], {}, "no prompt"),
    (np.zeros((1, 3)), {}, "integer array"), (np.full((1, 3), 2), {"stop": "x"}, "nothing stops ids"),
    (["a"], {"steps": 0}, "steps=0"), (["a"], {"top_p": 0.0}, "top_p=0.0"),
    (["a"], {"temperature": -1.0}, "temperature=-1.0")])
def test_bad_input_says_what_would_work(loaded, prompts, how, message):
    with pytest.raises(config.ConfigError, match=message):
        mmx.generate(loaded, prompts, **{"steps": 2} | how)


def test_without_a_tokenizer_text_is_refused(loaded):
    with pytest.raises(config.ConfigError, match="no tokenizer"):
        mmx.generate(loaded._replace(tokenizer=""), ["a"], steps=2)


def requests(**how):
    """Of several lengths, that end at several steps, and draw or not."""
    prompts = [ids(1, T)[0] for T in (1, 9, 50, 33, 17)]
    return [engine.Request(prompt, 3 + 5 * b, temperature=b % 2, seed=b, **how) for b, prompt in enumerate(prompts)]


def told(loaded, asked, **how):
    """Each request's ids and log-probabilities."""
    rows = [[] for _ in asked]
    for piece in engine.stream(loaded, asked, **how):
        rows[piece.request].append(piece)
    assert all(row[-1].ended and not any(piece.ended for piece in row[:-1]) for row in rows)
    return [tuple(np.concatenate([getattr(piece, name) for piece in row]) for name in ("ids_T", "logprobs_T")) for row in rows]


def test_whoever_is_beside_a_request_changes_nothing(loaded):
    """Rows that are left early are entered late; one row takes all, one after the other."""
    asked, alone = requests(), [told(loaded, [request])[0] for request in requests()]
    for rows in (1, 2, 5):
        for (ids_T, logprobs_T), (want_T, want_logprobs_T), request in zip(told(loaded, asked, rows=rows), alone, asked):
            assert len(ids_T) == request.steps
            np.testing.assert_array_equal(ids_T, want_T)
            np.testing.assert_allclose(logprobs_T, want_logprobs_T, atol=1e-5)


def test_log_probabilities_are_the_models(loaded):
    request = engine.Request(ids(1, 20)[0], 9, temperature=1.5, top_k=5, seed=2)
    (ids_T, logprobs_T), = told(loaded, [request])
    whole_BTW = jax.nn.log_softmax(mmx.forward(loaded, np.concatenate([request.prompt, ids_T])[None]))
    np.testing.assert_allclose(logprobs_T, whole_BTW[0, 19 + np.arange(9), ids_T], atol=1e-5)


def test_what_the_next_ids_cost(loaded):
    """Chunk by chunk, the last one padded, as by the logits of the whole."""
    ids_T = ids(1, 61)[0]
    nats_T, best_T = engine.score(loaded, ids_T[:-1], ids_T[1:])
    logp_TW = jax.nn.log_softmax(mmx.forward(loaded, ids_T[None, :-1]))[0]
    np.testing.assert_allclose(nats_T, -logp_TW[np.arange(60), ids_T[1:]], atol=1e-5)
    np.testing.assert_array_equal(best_T, np.argmax(logp_TW, axis=1))


@pytest.mark.parametrize("count, sizes", [(0, []), (1, [32]), (32, [32]), (70, [64, 32]), (300, [256, 64]),
                                          (4321, [2048, 2048, 256]), (4300, [2048, 2048, 128, 64, 32])])
def test_levels_leave_less_than_the_least_to_padding(count, sizes, monkeypatch):
    monkeypatch.undo()
    assert engine.pieces(count) == sizes
    assert 0 <= sum(sizes) - count < 32


def test_text_comes_in_pieces_that_never_change():
    """Half a character waits for its rest, and what may be a stop string's beginning for what it becomes."""
    tokenizer = engine.tokenizers.tokenizer("bytes")
    row = engine._Row(0, engine.Request("", 99, stop=("stop", "x")), lambda: tokenizer, C, behind=True)
    parts = [b"caf\xc3", b"\xa9 st", b"ay s", b"to", b"p here"]
    told = [row.piece(np.frombuffer(part, np.uint8), np.zeros(len(part))) for part in parts]
    assert [piece.text for piece in told] == ["caf", "\xe9 ", "stay ", "", ""]
    assert [piece.ended for piece in told] == [False] * 4 + [True]


def test_pieces_make_up_the_text(loaded):
    request = engine.Request("abc", 40, temperature=1.0, seed=5)
    pieces = list(engine.stream(loaded, [request]))
    assert len(pieces) == 5
    assert "".join(piece.text for piece in pieces) == mmx.generate(loaded, "abc", steps=40, temperature=1.0, seed=5)[0]


@pytest.mark.parametrize("kv_dtype", ["", "bfloat16", "int8"])
def test_a_prefix_in_a_file_goes_on_bit_for_bit(loaded, tmp_path, kv_dtype):
    kept = engine.read(loaded, "The state of the Union", kv_dtype=kv_dtype)
    prefix.save(tmp_path / "kept.npz", loaded, kept)
    again = prefix.load(tmp_path / "kept.npz", loaded)
    asked = [engine.Request(text, 12) for text in (" is", "", " was strong, and")]
    before, after = (told(loaded, asked, prefix=p, kv_dtype=kv_dtype) for p in (kept, again))
    for (ids_T, logprobs_T), (want_T, want_logprobs_T) in zip(after, before):
        np.testing.assert_array_equal(ids_T, want_T)
        np.testing.assert_array_equal(logprobs_T, want_logprobs_T)
    if not kv_dtype:
        want = mmx.generate(loaded, [f"The state of the Union{request.prompt}" for request in asked], steps=12)
        assert mmx.generate(loaded, [request.prompt for request in asked], steps=12, prefix=again) == want


def test_a_file_that_is_no_prefix_is_one_line(loaded, tmp_path):
    path = tmp_path / "kept.npz"
    prefix.save(path, loaded, engine.read(loaded, "abc"))
    other = loaded._replace(params=jax.tree.map(lambda x: x + 1, loaded.params))
    with pytest.raises(config.ConfigError, match="another model"):
        prefix.load(path, other)
    c = dataclasses.replace(C, rope_theta=500.0)
    with pytest.raises(config.ConfigError, match="another model"):
        prefix.load(path, loaded._replace(model=Model(c), config=c))
    for damage in (path.read_bytes()[:200], b"text", b""):
        path.write_bytes(damage)
        with pytest.raises(config.ConfigError, match="no prefix that --save-cache wrote"):
            prefix.load(path, loaded)


def test_a_prefix_has_its_own_dtype(loaded):
    kept = engine.read(loaded, "abc", kv_dtype="int8")
    assert mmx.generate(loaded, "", steps=2, prefix=kept) == mmx.generate(loaded, [""], steps=2, prefix=kept, kv_dtype="int8")
    with pytest.raises(config.ConfigError, match="the prefix has keys and values in int8: kv_dtype='bfloat16'"):
        mmx.generate(loaded, "", steps=2, prefix=kept, kv_dtype="bfloat16")
    with pytest.raises(config.ConfigError, match="kv_dtype='int4' is none of"):
        mmx.generate(loaded, "a", steps=2, kv_dtype="int4")


def test_int8_keys_and_values_change_little(loaded):
    request = engine.Request(ids(1, 40)[0], 1)
    rows = {kind: np.asarray(last_logits(loaded, request, kind)) for kind in ("", "bfloat16", "int8")}
    for kind in ("bfloat16", "int8"):
        error = np.abs(rows[kind] - rows[""]).max() / np.abs(rows[""]).max()
        assert 0 < error < 0.02, (kind, error)


def last_logits(loaded, request, kv_dtype):
    kept = engine.read(loaded, request.prompt, kv_dtype=kv_dtype)
    return jax.jit(engine.decode_step, static_argnums=0)(loaded.model, loaded.params, jnp.array([kept.last]), kept.cache)[0]


def test_int8_weights_are_channels_of_their_own():
    rng = np.random.default_rng(0)
    for name, shape, scale_shape in (("q_DHK", (3, 16, 2, 4), (3, 1, 2, 4)), ("out_HVD", (3, 2, 4, 16), (3, 1, 1, 16)),
                                     ("w1_EDF", (3, 2, 16, 8), (3, 2, 1, 8)), ("w2_EFD", (3, 2, 8, 16), (3, 2, 1, 16))):
        w = rng.standard_normal(shape).astype(np.float32) * rng.uniform(0.01, 100, scale_shape)
        whole, scale = int8.quantised(w, int8.summed(name))
        assert scale.shape == scale_shape and whole.dtype == np.int8
        np.testing.assert_array_less(np.abs(whole * scale - w), scale * 0.501 + 0 * w)
    assert not any(map(int8.summed, ("embed_WD", "head_WD", "router_DE", "norm_D", "norm_HV")))


def compiled(loaded, function, T, c=C):
    cache = empty_cache(c, 1, 48)
    args = (jnp.zeros((1, T), jnp.int32), jnp.ones((1, T), jnp.int32), cache, 0, {}) if T > 1 else (
        *(np.ones(1, np.int32),) * 3, cache, jax.random.split(jax.random.key(0), 1), None, -1, 8)
    params = jax.tree.map(lambda x: x[:c.groups] if x.shape[0] == C.groups else x, loaded.params)
    return function.lower(Model(c), params, *args).compile().as_text()


def test_a_step_moves_no_cache(loaded):
    """Keys and values [.., 48 places, 8] are read where they are, and written in place: nothing as large is made of them,
    in the body of a scan over groups and where one group needs no scan."""
    for groups in (1, 2):
        text = compiled(loaded, engine._decode, 1, dataclasses.replace(C, layers=2 * groups))
        assert re.findall(r"= f32\[[\d,]*48,8\]\S* (copy|select|concatenate)\(", text) == [], groups


def test_prefill_leaves_out_what_nobody_reads(loaded):
    """Behind the last layer's keys and values only logits stand: of one group's two layers' experts one is computed."""
    expert = lambda layers: len(re.findall(r'op_name="[^"]*/groups/layer_1/moe', compiled(
        loaded, engine._read, 16, dataclasses.replace(C, layers=layers))))
    assert expert(2) == 0 < expert(4)


def test_state_products_of_prefill_are_one_matmul_over_heads(loaded):
    """k^T v of a chunk, [rows x heads, K, V]: one batched product a lightning layer, no loop over heads."""
    text = compiled(loaded, engine._read, 16)
    states = re.findall(r"= f32\[(?:1,)?2,8,8\]\S* (?:dot|custom-call)\(", text)
    assert len(states) == C.pattern.count("L"), states
