"""Logits, generation and prefixes: each against an independent computation of the same thing."""
import dataclasses
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import mmx
from mmx import config
from mmx.checkpoints.convert import Loaded
from mmx.inference import engine, forward, prefix, sampling
from mmx.kernels import int8
from mmx.model import Model, empty_cache

pytestmark = pytest.mark.usefixtures("compiled_once")
C = config.Model(dim=16, layers=4, pattern="LS", heads=2, kv_heads=1, head_dim=8, rotary_dim=4, experts=4, expert_dim=16,
                 init="fan_in", embed_std=1.0)


@pytest.fixture(scope="module")
def loaded():
    params = jax.jit(lambda: Model(C).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])()
    return Loaded(Model(C), params, C, "bytes")


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    for name, value in (("PREFILL_CHUNKS", (32, 16, 8)), ("DECODE_STEPS", 8)):
        monkeypatch.setattr(engine, name, value)
    monkeypatch.setattr(engine.caches, "PAGE", 16)


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


def test_prompts_of_different_lengths_equal_single_prompts(loaded):
    prompts = ["a", "The state of the Union is strong, and", "", "Fellow citizens of the Senate"]
    together = mmx.generate(loaded, prompts, steps=12)
    assert together == [mmx.generate(loaded, [p], steps=12)[0] for p in prompts]
    assert len(set(together)) > 1


def test_a_single_string_is_treated_as_a_list(loaded):
    assert mmx.generate(loaded, "abc", steps=5) == mmx.generate(loaded, ["abc"], steps=5)


def test_mask_hides_padding(loaded):
    tokens_BT = ids(1, 9)
    without = mmx.forward(loaded, tokens_BT)
    right = mmx.forward(loaded, np.pad(tokens_BT, ((0, 0), (0, 3))), np.pad(np.ones((1, 9)), ((0, 0), (0, 3))))
    left = mmx.forward(loaded, np.pad(tokens_BT, ((0, 0), (3, 0))), np.pad(np.ones((1, 9)), ((0, 0), (3, 0))))
    np.testing.assert_allclose(right[:, :9], without, atol=1e-5)
    np.testing.assert_allclose(left[:, 3:], without, atol=1e-5)


@pytest.mark.case(29)
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


def test_draws_do_not_depend_on_the_number_of_decode_steps_in_a_block(loaded, monkeypatch):
    draw = lambda: mmx.generate(loaded, ["one", "three"], steps=20, temperature=1.0, seed=3)
    first = draw()
    monkeypatch.setattr(engine, "DECODE_STEPS", 24)
    assert draw() == first


def frequencies(logits_W, count=4000, temperature=1.0, top_k=None, top_p=1.0):
    """How often each token is drawn. With 4,000 draws the standard error is at most 0.008; the tests allow 0.03, under four."""
    parameters = sampling.SlotSampling(*(np.full(count, x) for x in (temperature, top_k or len(logits_W), top_p)))
    logits_BW = jnp.broadcast_to(jnp.asarray(logits_W), (count, len(logits_W)))
    drawn_B = np.asarray(sampling.sample_tokens(logits_BW, jax.random.split(jax.random.key(0), count), parameters))
    return np.bincount(drawn_B, minlength=len(logits_W)) / count


def test_sampling_follows_its_distribution():
    p = np.array([0.5, 0.25, 0.15, 0.1])
    np.testing.assert_allclose(frequencies(np.log(p)), p, atol=0.03)
    hot = p ** 0.5 / (p ** 0.5).sum()
    np.testing.assert_allclose(frequencies(np.log(p), temperature=2.0), hot, atol=0.03)
    np.testing.assert_allclose(frequencies(np.log(p), top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(np.log(p), top_p=0.7), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(np.log(p), top_p=0.01), [1, 0, 0, 0])
    np.testing.assert_allclose(frequencies(np.log(p), top_k=3, top_p=0.6), [2 / 3, 1 / 3, 0, 0], atol=0.03)


def sequence(*stop):
    """An empty sequence with the byte tokenizer and these stop strings."""
    tokenizer = engine.tokenizers.tokenizer("bytes")
    request = engine.Request("", 99, engine.Sampling(stop=stop))
    return engine.Sequence(0, request, lambda: tokenizer, C, before=())


@pytest.fixture(scope="module")
def spaced(loaded, tmp_path_factory):
    """The model with a tokenizer that puts a space before each text (tests/data/metaspace_tokenizer.json)."""
    folder = tmp_path_factory.mktemp("spaced")
    shutil.copy(Path(__file__).parent / "data" / "metaspace_tokenizer.json", folder / "tokenizer.json")
    return loaded._replace(tokenizer=str(folder / "tokenizer.json"))


@pytest.mark.case(2)
def test_text_is_what_the_new_tokens_add_to_the_prompt(spaced):
    """Generated text keeps its first space: it is decode(prompt + new) without decode(prompt), however it is streamed."""
    stock = tokenizers.Tokenizer.from_file(spaced.tokenizer)
    prompts = ["the state", "", "the ", "the st"]
    outputs = list(engine.stream(spaced, [engine.Request(prompt, 12) for prompt in prompts]))
    for number, prompt in enumerate(prompts):
        own = [output for output in outputs if output.request == number]
        prompt_ids, new = stock.encode(prompt).ids, np.concatenate([output.ids_T for output in own])
        new = [i for i in new.tolist() if i != 0]                                   # 0 is the end
        assert "".join(output.text for output in own) == stock.decode(prompt_ids + new)[len(stock.decode(prompt_ids)):]


@pytest.mark.case(2)
@pytest.mark.parametrize("stop, text, used", [
    ((), " of the union", 3), ((" the",), " of", 2), ((" o",), "", 1), (("f t",), " o", 2)])
def test_stop_strings_see_the_first_space(spaced, stop, text, used):
    """After "the state" the model adds ▁of ▁the ▁union, ids 22, 15 and 27."""
    tokenizer = engine.tokenizers.tokenizer(spaced.tokenizer)
    streamed = engine.Sequence(0, engine.Request("the state", 3, engine.Sampling(stop=stop)), lambda: tokenizer, C)
    outputs = []
    for i in (22, 15, 27):
        outputs.append(streamed.append(np.array([i]), np.zeros(1)))
        if outputs[-1].ended:
            break
    at_once = engine.Sequence(0, engine.Request("the state", 3, engine.Sampling(stop=stop)), lambda: tokenizer, C)
    [whole] = [at_once.append(np.array([22, 15, 27]), np.zeros(3))]
    assert "".join(output.text for output in outputs) == whole.text == text
    assert sum(len(output.ids_T) for output in outputs) == len(whole.ids_T) == used


@pytest.mark.case(1)
def test_a_prompt_continues_a_prefix(spaced, tmp_path):
    """The prefix "the st" and the prompt "ate of" have the ids of "the state of", split at the border; also from a file."""
    made = engine.make_prefix(spaced, "the st")
    prefix.save(tmp_path / "prefix.npz", spaced, made)
    tokenizer = engine.tokenizers.tokenizer(spaced.tokenizer)
    for before in (made.tail, prefix.load(tmp_path / "prefix.npz", spaced).tail):
        assert before == (0, 15, 23)
        sequence = engine.Sequence(0, engine.Request("ate of", 3), lambda: tokenizer, C, before)
        assert sequence.prompt_T.tolist() == [25, 22]
        assert sequence.append(np.array([15]), np.zeros(1)).text == " the"
    empty = engine.make_prefix(spaced, "")          # bos alone: no text, so the prompt begins the text
    sequence = engine.Sequence(0, engine.Request("the state", 3), lambda: tokenizer, C, empty.tail)
    assert sequence.prompt_T.tolist() == [15, 26]
    old = made._replace(tail=())                    # a file of an earlier version
    assert list(engine.stream(spaced, [engine.Request("ate of", 4)], prefix=old))[-1].ended


@pytest.mark.case(3)
def test_every_end_of_the_checkpoint_ends_generation(spaced, loaded, tmp_path, monkeypatch):
    [whole] = engine.stream(loaded, [engine.Request("the union", 8)])
    last = max(n for n in range(8) if whole.ids_T[n] not in whole.ids_T[:n])        # the first time that this id comes
    monkeypatch.setattr(engine.tokenizers.Bytes, "ends", (257, int(whole.ids_T[last])))
    [ended] = engine.stream(loaded, [engine.Request("the union", 8)])
    assert ended.ended and ended.ids_T.tolist() == whole.ids_T[:last + 1].tolist()

    shutil.copy(spaced.tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 27]}')
    tokenizer = engine.tokenizers.tokenizer(str(tmp_path / "tokenizer.json"))
    for end in (1, 27):
        found = engine.Sequence(0, engine.Request("the", 8), lambda: tokenizer, C).append(np.array([22, end, 22]), np.zeros(3))
        assert found.ended and found.ids_T.tolist() == [22, end] and found.text == " of"


def append(sequence, raw):
    return sequence.append(np.array(list(raw)), np.arange(float(len(raw))))


def test_text_ends_at_the_first_stop_string_or_end_token(loaded):
    def text(ids, *stop):
        continued = sequence(*stop)
        continued.ids = list(ids)
        return continued.decode_text(len(ids))

    assert text(b"one two three") == ("one two three", False)
    assert text(b"one two three", "three", "two") == ("one ", True)
    assert text([*b"one", sequence().tokenizer.eos, *b"two"]) == ("one", True)
    output = append(sequence("abcd", "b"), b"xabcd")
    assert (output.text, bytes(output.ids_T.tolist())) == ("xa", b"xab")      # "b" is complete before "abcd"
    free = mmx.generate(loaded, ["abc"], steps=30)[0]
    assert mmx.generate(loaded, ["abc"], steps=30, stop=[free[4:6]])[0] == free[:free.find(free[4:6])]


def test_ids_end_where_the_text_does(loaded):
    """Tokens that a block of decode steps generates after a stop string are dropped."""
    stopped = sequence("stop", "x")
    first, second = append(stopped, b"one s"), append(stopped, b"top and x")
    assert (first.text, first.ended, bytes(first.ids_T.tolist())) == ("one ", False, b"one s")
    assert (second.text, second.ended, bytes(second.ids_T.tolist())) == ("", True, b"top")
    assert second.logprobs_T.tolist() == [0, 1, 2]


@pytest.mark.parametrize("prompts, arguments, message", [
    (np.zeros((1, 0), int), {}, "T at least 1"), (np.full((1, 3), 264), {}, "from 0 to 263"), ([], {}, "no prompt"),
    (np.zeros((1, 3)), {}, "integer array"), (np.full((1, 3), 2), {"stop": "x"}, "token ids cannot use them"),
    (["a"], {"steps": 0}, "steps=0"), (["a"], {"top_p": 0.0}, "top_p=0.0"),
    (["a"], {"temperature": -1.0}, "temperature=-1.0")])
def test_bad_input_says_what_would_work(loaded, prompts, arguments, message):
    with pytest.raises(config.ConfigError, match=message):
        mmx.generate(loaded, prompts, **{"steps": 2} | arguments)


def test_an_unknown_argument_of_generate_is_named(loaded):
    with pytest.raises(TypeError, match=r"generate\(\) got an unexpected keyword argument 'temprature'.*temperature"):
        mmx.generate(loaded, ["a"], steps=2, temprature=1.0)


def test_without_a_tokenizer_text_is_refused(loaded):
    with pytest.raises(config.ConfigError, match="no tokenizer"):
        mmx.generate(loaded._replace(tokenizer=""), ["a"], steps=2)


def mixed_requests():
    """Prompts and continuations of several lengths, greedy and sampled."""
    prompts = [ids(1, T)[0] for T in (1, 9, 50, 33, 17)]
    return [engine.Request(prompt, 3 + 5 * b, engine.Sampling(temperature=b % 2, seed=b)) for b, prompt in enumerate(prompts)]


def generate_all(loaded, requests, **options):
    """Each request's new ids and log-probabilities."""
    outputs = [[] for _ in requests]
    for output in engine.stream(loaded, requests, **options):
        outputs[output.request].append(output)
    assert all(row[-1].ended and not any(output.ended for output in row[:-1]) for row in outputs)
    return [tuple(np.concatenate([getattr(output, name) for output in row]) for name in ("ids_T", "logprobs_T"))
            for row in outputs]


def test_a_request_does_not_depend_on_those_decoded_with_it(loaded):
    """With fewer slots than requests, a slot takes one request after the other."""
    requests, alone = mixed_requests(), [generate_all(loaded, [request])[0] for request in mixed_requests()]
    for rows in (1, 2, 5):
        results = generate_all(loaded, requests, rows=rows)
        for (ids_T, logprobs_T), (want_T, want_logprobs_T), request in zip(results, alone, requests):
            assert len(ids_T) == request.steps
            np.testing.assert_array_equal(ids_T, want_T)
            np.testing.assert_allclose(logprobs_T, want_logprobs_T, atol=1e-5)


def test_log_probabilities_are_the_models(loaded):
    request = engine.Request(ids(1, 20)[0], 9, engine.Sampling(temperature=1.5, top_k=5, seed=2))
    (ids_T, logprobs_T), = generate_all(loaded, [request])
    whole_BTW = jax.nn.log_softmax(mmx.forward(loaded, np.concatenate([request.prompt, ids_T])[None]))
    np.testing.assert_allclose(logprobs_T, whole_BTW[0, 19 + np.arange(9), ids_T], atol=1e-5)


def test_score_equals_the_logits_of_the_whole_text(loaded):
    """`score` reads the text in chunks, the last of them padded."""
    ids_T = ids(1, 61)[0]
    nats_T, likeliest_T = forward.score(loaded, ids_T[:-1], ids_T[1:])
    logp_TW = jax.nn.log_softmax(mmx.forward(loaded, ids_T[None, :-1]))[0]
    np.testing.assert_allclose(nats_T, -logp_TW[np.arange(60), ids_T[1:]], atol=1e-5)
    np.testing.assert_array_equal(likeliest_T, np.argmax(logp_TW, axis=1))


@pytest.mark.parametrize("count, sizes", [(0, []), (1, [32]), (32, [32]), (70, [64, 32]), (300, [256, 64]),
                                          (4321, [2048, 2048, 256]), (4300, [2048, 2048, 128, 64, 32])])
def test_chunk_sizes_add_less_padding_than_the_smallest_chunk(count, sizes, monkeypatch):
    monkeypatch.undo()
    assert engine.chunk_sizes(count) == sizes
    assert 0 <= sum(sizes) - count < 32


def test_text_that_was_returned_never_changes():
    """An incomplete character is held back, and so is text that may be the beginning of a stop string."""
    continued = sequence("stop", "x")
    outputs = [append(continued, raw) for raw in (b"caf\xc3", b"\xa9 st", b"ay s", b"to", b"p here")]
    assert [output.text for output in outputs] == ["caf", "\xe9 ", "stay ", "", ""]
    assert [output.ended for output in outputs] == [False] * 4 + [True]


def test_outputs_add_up_to_the_text(loaded):
    request = engine.Request("abc", 40, engine.Sampling(temperature=1.0, seed=5))
    outputs = list(engine.stream(loaded, [request]))
    assert len(outputs) == 5
    assert "".join(output.text for output in outputs) == mmx.generate(loaded, "abc", steps=40, temperature=1.0, seed=5)[0]


@pytest.mark.parametrize("kv_dtype", ["", "bfloat16", "int8"])
def test_a_prefix_from_a_file_is_continued_bit_for_bit(loaded, tmp_path, kv_dtype):
    made = engine.make_prefix(loaded, "The state of the Union", kv_dtype=kv_dtype)
    prefix.save(tmp_path / "prefix.npz", loaded, made)
    restored = prefix.load(tmp_path / "prefix.npz", loaded)
    requests = [engine.Request(text, 12) for text in (" is", "", " was strong, and")]
    before, after = (generate_all(loaded, requests, prefix=p, kv_dtype=kv_dtype) for p in (made, restored))
    for (ids_T, logprobs_T), (want_T, want_logprobs_T) in zip(after, before):
        np.testing.assert_array_equal(ids_T, want_T)
        np.testing.assert_array_equal(logprobs_T, want_logprobs_T)
    if not kv_dtype:
        want = mmx.generate(loaded, [f"The state of the Union{request.prompt}" for request in requests], steps=12)
        assert mmx.generate(loaded, [request.prompt for request in requests], steps=12, prefix=restored) == want


def test_a_wrong_prefix_file_is_refused_in_one_line(loaded, tmp_path):
    path = tmp_path / "prefix.npz"
    prefix.save(path, loaded, engine.make_prefix(loaded, "abc"))
    other = loaded._replace(params=jax.tree.map(lambda x: x + 1, loaded.params))
    with pytest.raises(config.ConfigError, match="another model"):
        prefix.load(path, other)
    c = dataclasses.replace(C, rope_theta=500.0)
    with pytest.raises(config.ConfigError, match="another model"):
        prefix.load(path, loaded._replace(model=Model(c), config=c))
    for damage in (path.read_bytes()[:200], b"text", b""):
        path.write_bytes(damage)
        with pytest.raises(config.ConfigError, match="is not a prefix file written by --save-cache"):
            prefix.load(path, loaded)


def test_a_prefix_fixes_the_dtype_of_keys_and_values(loaded):
    made = engine.make_prefix(loaded, "abc", kv_dtype="int8")
    assert mmx.generate(loaded, "", steps=2, prefix=made) == mmx.generate(loaded, [""], steps=2, prefix=made, kv_dtype="int8")
    with pytest.raises(config.ConfigError, match="in int8, which kv_dtype='bfloat16' cannot change"):
        mmx.generate(loaded, "", steps=2, prefix=made, kv_dtype="bfloat16")
    with pytest.raises(config.ConfigError, match="kv_dtype='int4' must be one of"):
        mmx.generate(loaded, "a", steps=2, kv_dtype="int4")


def test_int8_keys_and_values_change_little(loaded):
    request = engine.Request(ids(1, 40)[0], 1)
    logits = {dtype: np.asarray(last_logits(loaded, request, dtype)) for dtype in ("", "bfloat16", "int8")}
    for dtype in ("bfloat16", "int8"):
        error = np.abs(logits[dtype] - logits[""]).max() / np.abs(logits[""]).max()
        assert 0 < error < 0.02, (dtype, error)


def last_logits(loaded, request, kv_dtype):
    made = engine.make_prefix(loaded, request.prompt, kv_dtype=kv_dtype)
    return jax.jit(engine.decode_step, static_argnums=0)(loaded.model, loaded.params, jnp.array([made.last]), made.cache)[0]


def test_int8_weights_have_a_scale_for_each_output_channel():
    rng = np.random.default_rng(0)
    for name, shape, scale_shape in (("q_DHK", (3, 16, 2, 4), (3, 1, 2, 4)), ("out_HVD", (3, 2, 4, 16), (3, 1, 1, 16)),
                                     ("w1_EDF", (3, 2, 16, 8), (3, 2, 1, 8)), ("w2_EFD", (3, 2, 8, 16), (3, 2, 1, 16))):
        w = rng.standard_normal(shape).astype(np.float32) * rng.uniform(0.01, 100, scale_shape)
        whole, scale = int8.quantize(w, int8.contracted_axes(name))
        assert scale.shape == scale_shape and whole.dtype == np.int8
        np.testing.assert_array_less(np.abs(whole * scale - w), scale * 0.501 + 0 * w)
    assert not any(map(int8.contracted_axes, ("embed_WD", "head_WD", "router_DE", "norm_D", "norm_HV")))


def compiled(loaded, function, T, c=C):
    """The compiled program of the prefill of T tokens, or of a block of decode steps (T = 1)."""
    cache = empty_cache(c, 1, 48)
    args = (jnp.zeros((1, T), jnp.int32), jnp.ones((1, T), jnp.int32), cache, 0, {}) if T > 1 else (
        cache, engine.Slots(*(np.ones(1, np.int32),) * 3, jax.random.split(jax.random.key(0), 1)), None, -1, 8)
    params = jax.tree.map(lambda x: x[:c.groups] if x.shape[0] == C.groups else x, loaded.params)
    return function.lower(Model(c), params, *args).compile().as_text()


def test_a_decode_step_copies_no_cache(loaded):
    """Keys and values [.., 48 tokens, 8] are read and written in place, without a copy of that size.

    This holds in the body of a scan over groups of layers, and for a single group, which needs no scan.
    """
    for groups in (1, 2):
        text = compiled(loaded, engine._decode, 1, dataclasses.replace(C, layers=2 * groups))
        assert re.findall(r"= f32\[[\d,]*48,8\]\S* (copy|select|concatenate)\(", text) == [], groups


def test_prefill_skips_the_last_layers_experts(loaded):
    """Prefill needs the last layer's keys and values only: XLA removes its attention and experts in a model of one group."""
    expert = lambda layers: len(re.findall(r'op_name="[^"]*/groups/layer_1/moe', compiled(
        loaded, engine._prefill, 16, dataclasses.replace(C, layers=layers))))
    assert expert(2) == 0 < expert(4)


def test_state_products_of_prefill_are_one_matmul_over_heads(loaded):
    """k^T v of a chunk, [rows x heads, K, V]: one batched product for each lightning layer, without a loop over heads."""
    text = compiled(loaded, engine._prefill, 16)
    states = re.findall(r"= f32\[(?:1,)?2,8,8\]\S* (?:dot|custom-call)\(", text)
    assert len(states) == C.pattern.count("L"), states
