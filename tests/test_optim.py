"""Learning rates and batch sizes against closed forms, AdamW against its definition, and the schedule of the paper."""
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.config import ConfigError, Data, Train
from mmx.data import pipeline
from mmx.launch import experiments
from mmx.training import optim

TEXT_01 = Path(__file__).parents[1] / "experiments" / "text_01.py"
RAMPS = [(), ((0, 3),), ((0, 1), (70, 2), (200, 5)), ((0, 2), (1, 4), (2, 8), (500, 1)), ((0, 4), (96, 2))]


def rate(t, progress, step=10**6):
    return optim.learning_rate(t, step, progress)


@pytest.mark.parametrize("form,share", [("linear", lambda x: 1 - x), ("sqrt", lambda x: 1 - math.sqrt(x))])
def test_wsd(form, share):
    t = Train(lr=0.5, lr_end=0.1, decay=0.25, decay_form=form, warmup=0)
    for progress in np.linspace(0, 1, 41):
        decayed = max(0, (progress - 0.75) / 0.25)
        assert rate(t, progress) == pytest.approx(0.1 + 0.4 * share(decayed))


def test_wsd_exponential():
    t = Train(lr=0.5, lr_end=0.02, decay=0.4, decay_form="exponential", warmup=0)
    assert [rate(t, p) for p in (0, 0.6, 0.8, 1)] == pytest.approx([0.5, 0.5, 0.1, 0.02])
    assert rate(dataclasses.replace(t, lr_end=0.0), 1) == pytest.approx(0.5e-3)
    assert rate(dataclasses.replace(t, lr=0.0, lr_end=0.0), 0.8) == 0


def test_cosine():
    t = Train(lr=0.5, lr_end=0.1, schedule="cosine", warmup=0)
    for progress in np.linspace(0, 1, 9):
        assert rate(t, progress) == pytest.approx(0.3 + 0.2 * math.cos(math.pi * progress))
    assert rate(t, 1.3) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "stepwise"])
def test_warmup_is_linear_and_ends_at_the_peak(schedule):
    t = Train(lr=0.5, schedule=schedule, warmup=10, rates=((0, 0.5),))
    assert [rate(t, 0.0, step) for step in (0, 4, 9, 10)] == pytest.approx([0.05, 0.25, 0.5, 0.5])


def test_stepwise_rates_follow_the_tokens():
    t = Train(batch=2, length=5, ramp=((0, 1), (20, 3)), schedule="stepwise", warmup=0, decay=0.5, lr_end=0.1,
              rates=((0, 0.8), (50, 0.4)))
    assert [t.tokens_seen(step) for step in range(5)] == [0, 10, 20, 50, 80]
    assert [optim.learning_rate(t, step, 0.2) for step in range(5)] == pytest.approx([0.8, 0.8, 0.8, 0.4, 0.4])
    assert [optim.learning_rate(t, 4, p) for p in (0.5, 0.75, 1)] == pytest.approx([0.4, 0.25, 0.1])


@pytest.mark.parametrize("ramp", RAMPS)
def test_tokens_seen_adds_up_the_ramp(ramp):
    t, tokens = Train(batch=2, length=8, ramp=ramp), 0
    t.validate()
    for step in range(60):
        assert t.tokens_seen(step) == tokens
        tokens += t.micro_batches(tokens) * 16


@pytest.mark.parametrize("ramp", RAMPS)
def test_the_stream_counts_the_same_steps(ramp, tmp_path):
    (tmp_path / "a.txt").write_text("Fellow citizens of the Senate. " * 50)
    t = Train(batch=2, length=8, ramp=ramp)
    stream = pipeline.stream(Data(sources=(str(tmp_path / "a.txt"),), shards=2), t)
    for step in range(25):
        for remaining in reversed(range(t.micro_batches(t.tokens_seen(step)))):
            stream.next()
            assert (stream.state()["step"], stream.state()["left"]) == (step, remaining)


def test_the_papers_recipe():
    """Paper section 4.2: 16M, 32M, 64M and 128M tokens in a step; rate 2e-4, 1.3e-4 from 7.2T tokens, 3e-5 at 11.4T."""
    t = experiments.read(str(TEXT_01), []).train
    total = t.tokens_seen(t.steps)
    assert total == pytest.approx(11.4e12, rel=1e-4)

    def at(tokens):
        """The rate and size of the first step after `tokens`."""
        low, high = 0, t.steps
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if t.tokens_seen(middle) < tokens else (low, middle)
        before = t.tokens_seen(low)
        return optim.learning_rate(t, low, before / total), t.micro_batches(before) * t.batch * t.length

    assert [at(tokens)[1] for tokens in (0, 68e9, 70e9, 789e9, 791e9, 4.69e12, 4.71e12)] == [
        2**24 * n for n in (1, 1, 2, 2, 4, 4, 8)]
    assert [optim.learning_rate(t, step, 0) for step in (0, 249, 499)] == pytest.approx([4e-7, 1e-4, 2e-4])
    assert [at(tokens)[0] for tokens in (1e12, 7.19e12, 7.21e12, 10.39e12)] == pytest.approx([2e-4, 2e-4, 1.3e-4, 1.3e-4])
    assert at(10.9e12)[0] == pytest.approx(math.sqrt(1.3e-4 * 3e-5), rel=1e-3)      # halfway along the exponential
    assert optim.learning_rate(t, t.steps - 1, t.tokens_seen(t.steps - 1) / total) == pytest.approx(3e-5, rel=1e-3)


def params():
    rng = np.random.default_rng(0)
    return {"head_WD": jnp.array(rng.normal(size=(3, 2))), "norm_D": jnp.array(rng.normal(size=2)),
            "groups": {"layer_0": {"norm_mixer_D": jnp.array(rng.normal(size=2)),
                                   "mixer": {"norm_HV": jnp.array(rng.normal(size=(1, 2)))}}}}


def test_matrices_decay_and_norm_scales_do_not():
    optimizer, p = optim.adamw(Train(weight_decay=0.1)), params()
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p)
    np.testing.assert_allclose(updates["head_WD"], -0.1 * p["head_WD"])
    assert all((leaf == 0).all() for name, leaf in jax.tree_util.tree_leaves_with_path(updates)
               if name[-1].key != "head_WD")


def test_adamw_equals_its_definition():
    """Two steps with clipping by the global norm, both bias corrections and weight decay."""
    t = Train(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, clip=1.0)
    optimizer, p = optim.adamw(t), {"head_WD": jnp.array([[1.0, -2.0]])}
    state, m, v = optimizer.init(p), 0, 0
    for step, g in enumerate((np.array([[3.0, 4.0]]), np.array([[0.3, 0.1]])), 1):
        updates, state = optimizer.update({"head_WD": jnp.array(g)}, state, p)
        g = g / max(1, np.linalg.norm(g))
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        expected = m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.9**step)) + 1e-3) + 0.1 * np.array([[1.0, -2.0]])
        np.testing.assert_allclose(updates["head_WD"], -expected, rtol=1e-5)
    unclipped = optim.adamw(dataclasses.replace(t, clip=0.0, beta1=0.0))
    _, state = unclipped.update({"head_WD": jnp.array([[3.0, 4.0]])}, unclipped.init(p), p)
    np.testing.assert_allclose(state[1].mu["head_WD"], [[3.0, 4.0]])


def test_split_and_join_are_inverse():
    p = params()
    for freeze in ((), ("groups",), ("groups.layer_0.mixer", "norm_D")):
        learned, frozen = optim.split(p, freeze)
        assert jax.tree.structure(optim.join(learned, frozen)) == jax.tree.structure(p)
        assert len(jax.tree.leaves(learned)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(p))
    assert {*frozen} == {"norm_D", "groups"} and [*frozen["groups"]["layer_0"]] == ["mixer"]
    with pytest.raises(ConfigError, match="names 'groups.layer_1', .*; did you mean groups.layer_0?"):
        optim.split(p, ("groups.layer_1",))
    with pytest.raises(ConfigError, match="leaves nothing to learn"):
        optim.split(p, tuple(p))
