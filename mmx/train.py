"""The training loop: mesh, data, state, restore, steps (paper section 4.2).

A step takes the ramp's number of micro-batches, adds their gradients, and applies one AdamW update at the rate that
`optim` gives for the step. Metrics are fetched a step late, so that the device never waits for the host.
"""
import dataclasses
import functools
import math
import os
import signal
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from mmx import convert, optim
from mmx.checkpoint import Checkpoints, check_config, find_step
from mmx.config import ConfigError, Experiment, to_json
from mmx.data import pipeline, tokens
from mmx.evals.compression import bytes_per_token, head, make_evaluator
from mmx.loss import loss
from mmx.metrics import Log
from mmx.model import Model
from mmx.parallel import mesh as meshes
from mmx.parallel import sharding


class DivergedError(ConfigError):
    """A loss or a gradient is no number any more; `done` says where."""

    def __init__(self, message: str, done: dict):
        super().__init__(message)
        self.done = done


def train_step(params, opt, batch, lr, *, model: Model, optimizer, loss_chunk: int):
    """One update by the gradient of the mean over all the micro-batches' targets. `batch` is [micro-batches, B, T] by name."""
    grad = jax.value_and_grad(lambda p, b: loss(model, p, b, loss_chunk), has_aux=True)

    def micro(total, micro_batch):
        (_, metrics), grads = grad(params, micro_batch)
        total = jax.tree.map(lambda t, g: t + metrics["targets"] * g, total, grads)
        return total, metrics | {"micro_square": optax.tree.norm(grads, squared=True)}

    if len(batch["tokens"]) == 1:
        (_, metrics), grads = grad(params, jax.tree.map(lambda x: x[0], batch))
    else:
        grads, metrics = jax.lax.scan(micro, jax.tree.map(jnp.zeros_like, params), batch)
        targets_N = metrics["targets"]      # micro-batches with more of them weigh more, as in one large batch
        count = targets_N.sum()             # none where all rows are parts of prompts
        grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1), grads)
        metrics = jax.tree.map(lambda m_N: jnp.average(m_N, 0, jnp.where(count, targets_N, 1)), metrics)
    updates, opt = optimizer.update(grads, opt, params)
    params = optax.apply_updates(params, jax.tree.map(lambda u: lr * u, updates))
    return params, opt, metrics | {"grad_norm": optax.tree.norm(grads), "layer_norms": _layer_norms(grads["groups"])}


def _layer_norms(grads):
    """Norms of the layers' gradients, of which the groups' are stacked."""
    def square_L(x):
        return jnp.sum(x ** 2, axis=tuple(range(1, x.ndim)))
    squares_PL = [sum(map(square_L, jax.tree.leaves(grads[f"layer_{place}"]))) for place in range(len(grads))]
    return jnp.sqrt(jnp.stack(squares_PL, axis=1).reshape(-1))


def init(model: Model, optimizer, seed: int):
    """Parameters and optimizer state of step 0."""
    params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    return params, optimizer.init(params)


def run(experiment: Experiment, workdir: str | Path, sample=None, processes: int = 1) -> dict:
    """Trains to the end, from where WORKDIR stands; returns {"step", "new" (of this run), "seconds", "stopped", "process"}.

    `sample(model, params, tokenizer, prompt) -> text` writes the samples for TensorBoard. SIGTERM or Ctrl-C saves and ends
    the run: "stopped" is the signal's number, else 0. Several processes, joined by jax.distributed, all call it, with
    one WORKDIR; "process" is which one this is.
    """
    t, workdir = experiment.train, Path(workdir)
    if experiment.model.vision.layers:
        raise ConfigError(f"model.vision.layers={experiment.model.vision.layers}: no training on images is built yet; set it "
                          "to 0 to train the text model")
    tokenizer = tokens.tokenizer(experiment.data.tokenizer)
    tokens.check_vocab(tokenizer, experiment.model.vocab)
    mesh = meshes.make(experiment, processes)
    _check_same(experiment)
    host, hosts = meshes.reader(mesh)
    stream = pipeline.stream(experiment.data, t, host=host, hosts=hosts)
    held_out = pipeline.validation(experiment.data)
    if t.eval_every and not held_out:
        raise ConfigError(f"train.eval_every={t.eval_every} needs held-out text, data.sources holds ids alone: set it to 0")
    ratio = bytes_per_token(tokenizer, head(held_out, t.eval_bytes and max(t.eval_bytes, 65_536)))
    if experiment.model.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ConfigError("model.dtype='float64' needs JAX_ENABLE_X64=1 in the environment: without it JAX has float32 alone")
    origin = convert.open_start(t.init_from, experiment.model) if t.init_from and not find_step(workdir) else None
    check_config(workdir, experiment)

    model, optimizer = Model(experiment.model), optim.adamw(t)
    undropped = Model(dataclasses.replace(experiment.model, capacity=0.0, transport=0.0))       # inference drops no token
    whole, rows = sharding.whole(mesh), sharding.batch(mesh, leading=1)
    checkpoints = Checkpoints(workdir, experiment.checkpoint.every, experiment.checkpoint.keep)
    with jax.set_mesh(mesh), jax.transfer_guard_host_to_device("disallow"), _Stop() as stop:
        make = functools.partial(init, model, optimizer, t.seed)
        abstract = jax.eval_shape(make)
        kept = sharding.tree(abstract, mesh)
        make, placed = jax.jit(make, out_shardings=kept), jax.tree.map(_placed, abstract, kept)
        step, before, state = 0, 0.0, checkpoints.restore(*placed)
        if origin:
            state = 0, convert.start(origin, placed[0]), None, None
        if state is None:
            params, opt = make()
        else:
            step, params, opt, data = state
            if opt is None:         # train.init_from or a converted checkpoint: its parameters, a new run
                opt = jax.jit(optimizer.init, out_shardings=kept[1])(params)
            else:
                stream.restore(data["stream"])
                before = data["seconds"]
        update = jax.jit(functools.partial(train_step, model=model, optimizer=optimizer, loss_chunk=t.loss_chunk),
                         donate_argnums=(0, 1), out_shardings=(*kept, whole))
        evaluate = make_evaluator(undropped, tokenizer, length=t.length, batch=t.batch, context=t.length // 2,
                                  loss_chunk=t.loss_chunk, sharding=sharding.batch(mesh))
        first, log = step, Log(workdir, t, step, optim.tokens_seen(t, step), write=jax.process_index() == 0)
        report = functools.partial(_report, log, experiment, ratio)
        total, pending, begin = optim.tokens_seen(t, t.steps), None, time.monotonic()
        try:
            while True:
                seen, seconds = optim.tokens_seen(t, step), before + time.monotonic() - begin
                progress = _first_process(seconds) / t.seconds if t.seconds else seen / total
                if checkpoints.preempted(step):
                    stop.asked = signal.SIGTERM
                done = progress >= 1 or stop.asked
                if pending and (done or step % experiment.checkpoint.every == 0):
                    pending = report(*pending)
                    log.flush()
                    position = {"stream": stream.state(), "seconds": seconds}
                    checkpoints.save(step, params, opt, position, force=done)
                if done:
                    break
                lr = optim.learning_rate(t, step, progress)
                batch = [stream.next() for _ in range(optim.micro_batches(t, seen))]
                batch = {k: _global(rows, np.stack([b[k] for b in batch]), hosts) for k in batch[0]}
                params, opt, metrics = update(params, opt, batch, _global(whole, np.float32(lr)))
                step += 1
                if pending:
                    report(*pending)
                pending = step, optim.tokens_seen(t, step), lr, metrics, before + time.monotonic() - begin
                log.bar.update()
                with jax.transfer_guard_host_to_device("allow"):
                    if t.eval_every and step % t.eval_every == 0:
                        log.scalar("validation/bits_per_byte", evaluate(params, held_out, t.eval_bytes)["all"], step)
                    if sample and t.sample_every and step % t.sample_every == 0:
                        log.text("sample", sample(undropped, params, tokenizer, t.sample_prompt), step)
        finally:
            log.close()
            checkpoints.close()
    return {"step": step, "new": step - first, "seconds": before + time.monotonic() - begin, "stopped": stop.asked,
            "process": jax.process_index()}


def _report(log, experiment, ratio, step, seen, lr, metrics, seconds):
    """Fetches a step's metrics and writes them (`ratio`: bytes a token); a loss or gradient that is no number ends the run."""
    m = jax.device_get(metrics)
    if not (math.isfinite(m["loss"]) and math.isfinite(m["grad_norm"])):
        raise DivergedError(f"step {step} has loss {m['loss']}, gradient norm {m['grad_norm']}: lower train.lr="
                            f"{experiment.train.lr} or train.clip={experiment.train.clip}, in another --workdir; the "
                            "checkpoints here are from before", {"step": step, "seconds": seconds})
    rate = log.tokens_per_s(seen)
    record = {"step": step, "loss": float(m["loss"]), "bits_per_byte": float(m["loss"]) / math.log(2) / ratio,
              "tokens": seen, "lr": lr, "grad_norm": float(m["grad_norm"]), "seconds": seconds,
              "aux_loss": float(m["aux_loss"]), "z_loss": float(m["z_loss"]), "drop_rate": float(m["dropped"].mean()),
              "overflow_rate": float(m["overflow"].mean()),
              "tokens_per_s": rate,
              "flops_per_s": rate * experiment.model.flops_training(experiment.train.length),
              "layer_norms": [float(f"{norm:.4g}") for norm in m["layer_norms"]]}
    if "micro_square" in m:     # of the micro-batches' gradients: how far it is above grad_norm tells their noise
        record["micro_norm"] = math.sqrt(m["micro_square"])
    log.step(record, m["load_E"], m["dropped"], step % experiment.train.log_every == 0)


def _check_same(experiment: Experiment) -> None:
    """Processes of different experiments would wait for each other for ever."""
    if jax.process_count() == 1:
        return
    sums_N = multihost_utils.process_allgather(np.uint32(zlib.crc32(to_json(experiment).encode())))
    if differ := np.flatnonzero(sums_N != sums_N[0]).tolist():
        raise ConfigError(f"process {differ[0]} was given another experiment than process 0: all need the same command, but "
                          "for --process")


def _first_process(seconds: float) -> float:
    """Process 0's clock, by which all agree when time is up and what the rate is."""
    if jax.process_count() == 1:
        return seconds
    with jax.transfer_guard_host_to_device("allow"):
        return float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))


def _global(sharding, x, hosts: int = 1):
    """The array of which this process has its rows [N, B / hosts, T], or all."""
    shape = (x.shape[0], x.shape[1] * hosts, *x.shape[2:]) if x.ndim else x.shape
    with jax.transfer_guard_host_to_device("allow"):        # asked for here
        return jax.make_array_from_process_local_data(sharding, x, shape)


def _placed(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


class _Stop:
    """SIGTERM and a first Ctrl-C ask, and the loop answers between two steps; a second Ctrl-C ends it where it is.

    Of several processes each would ask at a step of its own: there JAX's preemption service, which has SIGTERM, asks all.
    """
    asked = 0

    def __enter__(self):
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self.old = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def _ask(self, number, _):
        self.asked = number
        if number == signal.SIGINT:
            signal.signal(number, self.old[number])
            os.write(2, b"\nstopping: this step ends and is saved; Ctrl-C once more quits at once\n")

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)
