"""Results agree with those that transformers 5.23.0 computed (oracles/*/oracle.npz).

c_partial_orig is the released function. a_7to1_hf is the function of transformers, which differs only in the last digits of the
decay if RoPE rotates whole heads and the number of heads is a power of two.
"""
import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx import forward, generate, mesh
from mmx.checkpoints import convert, hf_layout
from mmx.inference import engine
from mmx.model import Model, empty_cache, logits
from mmx.parallel import sharding
from mmx.training.loss import loss, router_losses

pytestmark = pytest.mark.usefixtures("compiled_once")
ORACLES = Path(__file__).parent / "oracles"
STATE_ATOL = {"c_partial_orig": 5e-5, "a_7to1_hf": 2e-4}       # a_7to1_hf divides by layers - 1 + 1e-5 in the decay


@dataclasses.dataclass
class Case:
    name: str
    loaded: convert.Loaded
    want: dict

    def __call__(self, tokens_BT, segments_BT=None, cache=None, trace=False):
        """Returns the hidden states, the logits, the cache and the statistics."""
        tokens_BT, model, params = jnp.asarray(tokens_BT, jnp.int32), self.loaded.model, self.loaded.params
        x_BTD, cache, stats = jitted(model, params, tokens_BT, segments_BT, cache, trace)
        return x_BTD, logits(params, x_BTD), cache, stats


@functools.partial(jax.jit, static_argnums=(0, 5))
def jitted(model, params, tokens_BT, segments_BT, cache, trace):
    return model.apply({"params": params}, tokens_BT, segments_BT=segments_BT, cache=cache, trace=trace)


@pytest.fixture(scope="module", params=STATE_ATOL)
def case(request):
    folder = ORACLES / request.param
    loaded = convert.load(folder / "ckpt")
    model = dataclasses.replace(loaded.config, aux="hf", aux_weight=0.01)
    with np.load(folder / "oracle.npz") as want:
        return Case(request.param, convert.Loaded(Model(model), loaded.params, model, ""), dict(want))


def close(got, want, atol, name=""):
    np.testing.assert_allclose(got, want, atol=atol, rtol=0, err_msg=name)


def test_logits_hidden_states_and_router_logits(case):
    x_BTD, logits_BTW, _, stats = case(case.want["input_ids"], trace=True)
    close(logits_BTW, case.want["logits"], 2e-5)
    layers = case.loaded.config.layers
    for i, h_BTD in enumerate([*stats["hidden_BTD"], x_BTD]):
        close(h_BTD, case.want[f"hidden_{i}"], 5e-5, f"hidden_{i}")
    for i in range(layers):
        want = case.want[f"router_logits_{i}"]
        close(stats["router_logits_BTE"][i].reshape(want.shape), want, 5e-5, f"router_logits_{i}")


def batch_of(want):
    """The oracle's tokens and labels as a batch. transformers shifts labels inside the model; -100 means no loss."""
    tokens_BT = jnp.asarray(want["input_ids"], jnp.int32)
    targets_BT = np.concatenate([want["labels"][:, 1:], np.full((len(tokens_BT), 1), -100)], axis=1)
    return {"tokens": tokens_BT, "targets": jnp.asarray(np.maximum(targets_BT, 0), jnp.int32),
            "weights": jnp.asarray(targets_BT >= 0, jnp.float32), "segments": jnp.ones_like(tokens_BT),
            "positions": jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)}


def as_released(params, model) -> dict:
    """The parameters as tensors with the released names and shapes."""
    tensors = {}
    for leaf in hf_layout.leaves(model):
        array = params
        for key in leaf.path:
            array = array[key]
        for index, name in leaf.tensors():
            block = leaf.to_released(np.asarray(array[index]))
            tensor = tensors.setdefault(name, np.zeros((len(block), leaf.layout.parts, *block.shape[1:]), block.dtype))
            tensor[:, leaf.layout.part] = block
    shapes = {name: leaf.tensor_shape for leaf in hf_layout.leaves(model) for _, name in leaf.tensors()}
    return {name: tensor.reshape(shapes[name]) for name, tensor in tensors.items()}


def test_losses_and_gradients(case):
    model, want = case.loaded.config, case.want

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_and_gradients(params):
        return loss(case.loaded.model, params, batch_of(want), 64)

    (value, metrics), grads = loss_and_gradients(case.loaded.params)
    close(metrics["loss"], want["loss_ce"], 1e-5, "cross-entropy")
    close(metrics["aux_loss"], want["aux_loss"], 1e-5, "auxiliary loss")
    close(value, want["loss_total"], 1e-5, "total")
    ours = as_released(grads, model)
    checked = [key for key in want if key.startswith("grad:")]
    assert len(checked) >= 15
    for key in checked:
        head, kind, tail = key.removeprefix("grad:").partition(".mlp.")
        matrices = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}.get(tail)
        if matrices:
            got = np.stack([np.concatenate([ours[f"{head}.block_sparse_moe.experts.{e}.{w}.weight"] for w in matrices])
                            for e in range(model.experts)])
        else:
            got = ours[head + (".block_sparse_moe." + tail if kind else "")]
        error = np.linalg.norm(got - want[key]) / np.linalg.norm(want[key])
        assert error < 1e-4, f"{key}: relative error {error:.2g}"
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in ours.values()))
    assert abs(norm / want["grad_global_norm"] - 1) < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_ignored(case, side):
    mask_BT = case.want[f"pad_{side}_mask"]
    _, logits_BTW, _, stats = case(case.want["input_ids"], segments_BT=jnp.asarray(mask_BT, jnp.int32))
    real = mask_BT == 1
    assert not real.all()
    close(logits_BTW[real], case.want[f"pad_{side}_logits"][real], 2e-5)
    close(router_losses(stats, case.loaded.config)[0], case.want[f"pad_{side}_aux_loss"], 1e-5)


def test_forward_with_a_padding_mask(case):
    mask_BT = case.want["pad_left_mask"]
    logits_BTW = forward(case.loaded, case.want["input_ids"], mask_BT)
    close(logits_BTW[mask_BT == 1], case.want["pad_left_logits"][mask_BT == 1], 2e-5)


def prefill(case):
    """The prompt's logits, and the cache after the prompt with room for the greedy tokens."""
    prompt_BT = case.want["prompt"]
    B, T = prompt_BT.shape
    _, logits_BTW, cache, _ = case(prompt_BT, cache=empty_cache(case.loaded.config, B, T + 32))
    return logits_BTW, cache


def test_lightning_states_after_the_prompt(case):
    model, (_, cache) = case.loaded.config, prefill(case)
    for layer, kind in enumerate(model.layer_kinds):
        if kind == "L":
            group, position = divmod(layer, len(model.pattern))
            state_BHKV = cache["layers"][f"layer_{position}"]["state_BHKV"][group]
            close(state_BHKV, case.want[f"state_{layer}"], STATE_ATOL[case.name], f"state_{layer}")


def test_greedy_tokens(case):
    new_BT = generate(case.loaded, case.want["prompt"], steps=32, temperature=0.0)
    np.testing.assert_array_equal(new_BT, case.want["greedy_nocache"])


# requests: (row of the oracle's prompts, greedy tokens appended to the prompt, tokens to generate); they end at different times
REQUESTS = (0, 0, 32), (1, 0, 3), (0, 5, 20), (1, 17, 15), (0, 31, 1), (1, 1, 9)


def check_requests(loaded, want, rows):
    """Checks that the engine generates the oracle's greedy tokens for REQUESTS, with `rows` requests at a time."""
    greedy_BT = want["greedy_nocache"]
    requests = [engine.Request(np.append(want["prompt"][b], greedy_BT[b, :begin]), steps) for b, begin, steps in REQUESTS]
    found = [[] for _ in requests]
    for piece in engine.stream(loaded, requests, rows=rows):
        found[piece.request].extend(piece.ids_T)
    assert found == [greedy_BT[b, begin:begin + steps].tolist() for b, begin, steps in REQUESTS]


@pytest.mark.parametrize("chunks, steps, rows", [((32, 16, 8), 8, 2), ((64,), 24, 6)])
def test_chunks_blocks_and_batches_do_not_change_tokens(case, chunks, steps, rows, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNKS", chunks)
    monkeypatch.setattr(engine, "DECODE_STEPS", steps)
    check_requests(case.loaded, case.want, rows)


def test_a_mesh_does_not_change_tokens(monkeypatch):
    """Parameters and cache are sharded over eight devices: by rows, time, experts and heads."""
    monkeypatch.setattr(engine, "PREFILL_CHUNKS", (16,))
    folder = ORACLES / "a_7to1_hf"
    with mesh.inference_mesh(convert.open_source(folder / "ckpt").model, "ep=2,etp=2,seq=2"):
        loaded = convert.load(folder / "ckpt")
        parts = [len({str(s.index) for s in w.addressable_shards}) for w in jax.tree.leaves(loaded.params)]
        assert max(parts) == 8 and np.mean(parts) > 4, parts
        with np.load(folder / "oracle.npz") as want:
            check_requests(loaded, want, 4)
            request = engine.Request(want["prompt"][0], 32)
        expected = sharding.cache_shardings(empty_cache(loaded.config, 4, 256), jax.sharding.get_mesh())
        batch = engine.Batch(loaded, 4)
        batch.start(0, engine.Sequence(0, request, None, loaded.config))
        list(batch.decode())
        for x, wanted in zip(jax.tree.leaves(batch.cache), jax.tree.leaves(expected)):
            assert x.sharding.is_equivalent_to(wanted, x.ndim), (x.sharding, wanted)


def test_cached_equals_recomputed(case):
    """The logits of decoding token by token equal those that the oracle recomputes for every step."""
    greedy_BT, (logits_BTW, cache) = case.want["greedy_nocache"], prefill(case)
    steps = [logits_BTW[:, -1]]
    for t in range(31):
        _, logits_BTW, cache, _ = case(greedy_BT[:, t:t + 1], cache=cache)
        steps.append(logits_BTW[:, 0])
    close(np.stack(steps, 1), case.want["greedy_nocache_logits"], 2e-5)


def test_a_sharded_checkpoint_loads_the_same_parameters(case):
    sharded = ORACLES / case.name / "ckpt_sharded"
    if not sharded.exists():
        pytest.skip("the oracle has one file")
    assert json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    jax.tree.map(np.testing.assert_array_equal, convert.load(sharded).params, case.loaded.params)
