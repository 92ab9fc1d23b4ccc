"""Generation against recomputation, ragged batches against single prompts, sampling against its definition."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmx
from mmx import config, inference
from mmx.convert import Loaded
from mmx.model import Model

C = config.Model(dim=16, layers=4, pattern="LS", heads=2, kv_heads=1, head_dim=8, rotary_dim=4, experts=4, expert_dim=16,
                 init="fan_in", embed_std=1.0)


@pytest.fixture(scope="module")
def loaded():
    params = jax.jit(lambda: Model(C).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])()
    return Loaded(Model(C), params, C, "bytes")


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    for name, value in (("LEVELS", (32, 16, 8)), ("BLOCK", 8), ("PLACES", 16)):
        monkeypatch.setattr(inference, name, value)


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


def test_same_seed_same_draws(loaded):
    draw = lambda seed: mmx.generate(loaded, ids(2, 5), steps=20, temperature=1.0, seed=seed)
    assert (draw(1) == draw(1)).all()
    assert (draw(1) != draw(2)).any()
    assert (draw(1)[0] != draw(1)[1]).any()


def test_draws_do_not_depend_on_the_block(loaded, monkeypatch):
    draw = lambda: mmx.generate(loaded, ["one", "three"], steps=20, temperature=1.0, seed=3)
    first = draw()
    monkeypatch.setattr(inference, "BLOCK", 24)
    assert draw() == first


def draws(logits_W, count=4000, **how):
    draw = {f"{name}_B": np.full(count, how.get(name, default)) for name, default in (
        ("temperature", 1.0), ("top_k", len(logits_W)), ("top_p", 1.0))}
    logits_BW = jnp.broadcast_to(jnp.asarray(logits_W), (count, len(logits_W)))
    taken = np.asarray(inference._draw(logits_BW, jax.random.split(jax.random.key(0), count), draw))
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
    tokenizer = inference.tokenizers.tokenizer("bytes")
    text = lambda raw, stop=(): inference._text(tokenizer, np.array(list(raw)), stop)
    assert text(b"one two three") == ("one two three", False)
    assert text(b"one two three", ["three", "two"]) == ("one ", True)
    assert text([*b"one", tokenizer.eos, *b"two"]) == ("one", True)
    free = mmx.generate(loaded, ["abc"], steps=30)[0]
    assert mmx.generate(loaded, ["abc"], steps=30, stop=[free[4:6]])[0] == free[:free.find(free[4:6])]


@pytest.mark.parametrize("prompts, how, message", [
    (np.zeros((1, 0), int), {}, "T at least 1"), (np.full((1, 3), 264), {}, "from 0 to 263"), ([], {}, "no prompt"),
    (np.zeros((1, 3)), {}, "integer array"), (["a"], {"steps": 0}, "steps=0"), (["a"], {"top_p": 0.0}, "top_p=0.0"),
    (["a"], {"temperature": -1.0}, "temperature=-1.0")])
def test_bad_input_says_what_would_work(loaded, prompts, how, message):
    with pytest.raises(config.ConfigError, match=message):
        mmx.generate(loaded, prompts, **{"steps": 2} | how)


def test_without_a_tokenizer_text_is_refused(loaded):
    with pytest.raises(config.ConfigError, match="no tokenizer"):
        mmx.generate(loaded._replace(tokenizer=""), ["a"], steps=2)
