"""The training loop: mesh, data, state, restore, steps (paper section 4.2).

A step takes the ramp's number of micro-batches, adds their gradients, and applies one AdamW update at the rate that
`optim` gives for the step. Metrics are fetched a step late, so that the device never waits for the host. `guards` sees
them: a step that is no number has changed nothing, after a spike the run goes back to its last checkpoint.
"""
import contextlib
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

from mmx.checkpoints import convert
from mmx.checkpoints.manager import Checkpoints, agreed, check_config, find_step
from mmx.config import ConfigError, Experiment, to_json
from mmx.data import images, pipeline, tokens
from mmx.files import lock
from mmx.model import Model
from mmx.parallel import mesh as meshes
from mmx.parallel import sharding
from mmx.training import optim
from mmx.training.evaluate import bytes_per_token, head, make_evaluator
from mmx.training.guards import Guard
from mmx.training.loss import loss
from mmx.training.metrics import Log


def train_step(params, opt, batch, lr, *, model: Model, optimizer, loss_chunk: int, freeze: tuple = (),
               contrastive: float = 0.0):
    """One update by the gradient of the mean over all the micro-batches' targets; none where loss or gradient is no number.

    `batch` is [micro-batches, B, T] by name, of images' tiles [micro-batches, blocks of rows, ...]. What `freeze` names is no
    part of gradients, updates and `opt`.
    """
    learned, frozen = optim.split(params, freeze)
    grad = jax.value_and_grad(lambda p, b: loss(model, optim.join(p, frozen), b, loss_chunk, contrastive), has_aux=True)

    def micro(total, micro_batch):
        (_, metrics), grads = grad(learned, micro_batch)
        total = jax.tree.map(lambda t, g: t + metrics["targets"] * g, total, grads)
        return total, metrics | {"micro_square": optax.tree.norm(grads, squared=True)}

    if len(batch["tokens"]) == 1:
        (_, metrics), grads = grad(learned, jax.tree.map(lambda x: x[0], batch))
    else:
        grads, metrics = jax.lax.scan(micro, jax.tree.map(jnp.zeros_like, learned), batch)
        targets_N = metrics["targets"]      # micro-batches with more of them weigh more, as in one large batch
        count = targets_N.sum()             # none where all rows are parts of prompts
        grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1), grads)
        metrics = jax.tree.map(lambda m_N: jnp.average(m_N, 0, jnp.where(count, targets_N, 1)), metrics)
    norm = optax.tree.norm(grads)
    sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    updates, moved = optimizer.update(grads, opt, learned)
    moved = optax.apply_updates(learned, jax.tree.map(lambda u: lr * u, updates)), moved
    learned, opt = jax.tree.map(lambda new, old: jnp.where(sound, new, old), moved, (learned, opt))
    return optim.join(learned, frozen), opt, metrics | {"grad_norm": norm} | _layer_norms(grads.get("groups", {}))


def _layer_norms(grads) -> dict:
    """Norms of the gradients of the layers that learn, of which the groups' are stacked."""
    def square_L(x):
        return jnp.sum(x ** 2, axis=tuple(range(1, x.ndim)))
    names = sorted(grads, key=lambda name: int(name.removeprefix("layer_")))
    squares_PL = [sum(map(square_L, jax.tree.leaves(grads[name]))) for name in names]
    return {"layer_norms": jnp.sqrt(jnp.stack(squares_PL, axis=1).reshape(-1))} if names else {}


def init(model: Model, optimizer, seed: int, freeze: tuple = ()):
    """Parameters and optimizer state of step 0."""
    params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    return params, optimizer.init(optim.split(params, freeze)[0])


def run(experiment: Experiment, workdir: str | Path, sample=None, processes: int = 1) -> dict:
    """Trains to the end, from where WORKDIR stands; returns {"step", "new" (of this run), "seconds", "stopped", "process"}.

    `sample(model, params, tokenizer, prompt) -> text` writes the samples for TensorBoard. SIGTERM or Ctrl-C saves and ends
    the run: "stopped" is the signal's number, else 0. Several processes, joined by jax.distributed, all call it, with
    one WORKDIR; "process" is which one this is.
    """
    t, workdir = experiment.train, Path(workdir)
    optim.split(convert.abstract_params(experiment.model), t.freeze)
    tokenizer = tokens.tokenizer(experiment.data.tokenizer)
    tokens.check_vocab(tokenizer, experiment.model.vocab)
    if sample and t.sample_every:       # now, not where the first sample is due
        try:
            images.encode(experiment.model.vision, t.sample_prompt.encode(), [], tokenizer.encode)
        except ConfigError as error:
            raise ConfigError(f"train.sample_prompt={t.sample_prompt!r:.200}: {error}") from None
    mesh = meshes.make(experiment, processes)
    _check_same(experiment)
    host, hosts = meshes.reader(mesh)
    stream = pipeline.stream(experiment.data, t, host=host, hosts=hosts, vision=experiment.model.vision,
                             blocks=sharding.size(mesh, sharding.ROWS), share=sharding.size(mesh, sharding.TIME))
    held_out = pipeline.validation(experiment.data)
    if t.eval_every and not held_out:
        raise ConfigError(f"train.eval_every={t.eval_every} needs held-out text, data.sources holds ids or images alone: set "
                          "it to 0")
    ratio = bytes_per_token(tokenizer, head(held_out, t.eval_bytes and max(t.eval_bytes, 65_536)))
    if experiment.model.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ConfigError("model.dtype='float64' needs JAX_ENABLE_X64=1 in the environment: without it JAX has float32 alone")
    new = not find_step(workdir)
    origin = convert.open_start(t.init_from, experiment.model) if t.init_from and new else None
    eyes = convert.open_vision(t.init_vision, experiment.model) if t.init_vision and new else None
    model, optimizer = Model(experiment.model), optim.adamw(t)
    undropped = Model(dataclasses.replace(experiment.model, capacity=0.0, transport=0.0))       # inference drops no token
    whole, rows, tiles = sharding.whole(mesh), sharding.batch(mesh, leading=1), sharding.tiles(mesh, leading=1)
    make = functools.partial(init, model, optimizer, t.seed, t.freeze)
    with jax.set_mesh(mesh):
        try:
            abstract = jax.eval_shape(make)
        except NotImplementedError as error:        # a kernel that is named and cannot run, before anything is written
            raise ConfigError(f"model.{error} (model.impl empty)") from None
    c = experiment.checkpoint
    checkpoints, guard = Checkpoints(workdir, c.every, c.keep, c.verify), Guard(experiment)
    with _held(workdir), jax.set_mesh(mesh), jax.transfer_guard_host_to_device("disallow"), _Stop() as stop:
        check_config(workdir, experiment)
        kept = sharding.tree(abstract, mesh)
        make, placed = jax.jit(make, out_shardings=kept), jax.tree.map(_placed, abstract, kept)
        begun = {"stream": stream.state(), "seconds": 0.0, "guard": None}

        def stand():
            """(step, params, opt, position) of the last checkpoint, or of the beginning."""
            state = checkpoints.restore(*placed)
            if state is None and (origin or eyes):
                state = 0, _started(make, placed[0], origin, eyes), None, None
            if state is None:
                return 0, *make(), begun
            step, params, opt, position = state
            if opt is None:         # train.init_from or a converted checkpoint: its parameters, a new run
                opt = jax.jit(optimizer.init, out_shardings=kept[1])(optim.split(params, t.freeze)[0])
                position = begun
            return step, params, opt, position

        step, params, opt, position = stand()
        stream.restore(position["stream"])
        guard.restore(position.get("guard"))
        before = position["seconds"]
        update = jax.jit(functools.partial(train_step, model=model, optimizer=optimizer, loss_chunk=t.loss_chunk,
                                           freeze=t.freeze, contrastive=t.contrastive),
                         donate_argnums=(0, 1), out_shardings=(*kept, whole))
        evaluate = make_evaluator(undropped, tokenizer, length=t.length, batch=t.batch, context=t.length // 2,
                                  loss_chunk=t.loss_chunk, sharding=sharding.batch(mesh))
        first, log = step, Log(workdir, t, step, t.tokens_seen(step), write=jax.process_index() == 0)
        if origin and (found := convert.differ(origin.model, experiment.model)):
            log.say(f"train.init_from={t.init_from!r} was trained as another function: {', '.join(found)}", step)
        report = functools.partial(_report, log, experiment, ratio, guard)
        total, begin = t.tokens_seen(t.steps), time.monotonic()
        pending, spike, behind = None, None, {}
        try:
            while True:
                if spike:           # what is older than the checkpoint makes room for it
                    params = opt = metrics = pending = None
                    _leave_out(stream, experiment, behind, spike[0])
                    step, params, opt, position = stand()
                    stream.rewind_step(position["stream"])
                    guard.went_back(position.get("guard"))
                    log.go_back(step, t.tokens_seen(step))
                    log.say(f"{spike[1]}: back to step {step}, the data since then are left out", step)
                    spike = None
                seen, seconds = t.tokens_seen(step), before + time.monotonic() - begin
                progress = _first_process(seconds) / t.seconds if t.seconds else seen / total
                if checkpoints.preempted(step):
                    stop.asked = signal.SIGTERM
                done = progress >= 1 or stop.asked
                if pending and (done or step % experiment.checkpoint.every == 0):
                    spike, pending = report(*pending), None
                    if spike:
                        continue
                    log.flush()
                    position = {"stream": stream.state(), "seconds": seconds, "guard": guard.state()}
                    if checkpoints.save(step, params, opt, position, force=done):
                        guard.saved()
                checkpoints.check_saved()         # an error of the save under way is told now
                if done:
                    break
                if step == first:
                    checkpoints.check_room(params, opt)
                lr = optim.learning_rate(t, step, progress)
                batch = pipeline.stack_micro_batches([stream.next() for _ in range(t.micro_batches(seen))])
                looks = int(batch.pop("tiles", np.int64(0)).sum())
                batch = {k: _global(tiles if k in ("pixels", "ends") else rows, x, hosts) for k, x in batch.items()}
                params, opt, metrics = update(params, opt, batch, _global(whole, np.float32(lr)))
                step += 1
                if pending:
                    spike = report(*pending)
                if experiment.guard.spike:
                    behind = {step - 1: behind.get(step - 1), step: stream.state()}
                pending = step, t.tokens_seen(step), lr, metrics, before + time.monotonic() - begin, looks
                log.bar.update()
                with jax.transfer_guard_host_to_device("allow"):
                    if t.eval_every and step % t.eval_every == 0:
                        log.scalar("validation/bits_per_byte", evaluate(params, held_out, t.eval_bytes)["all"], step)
                    if sample and t.sample_every and step % t.sample_every == 0:
                        log.text("sample", sample(undropped, params, tokenizer, t.sample_prompt), step)
        finally:
            with contextlib.closing(checkpoints):
                log.close()
    return {"step": step, "new": step - first, "seconds": before + time.monotonic() - begin, "stopped": stop.asked,
            "process": jax.process_index()}


def _started(make, placed: dict, origin, eyes) -> dict:
    """Parameters of other checkpoints; what those have not, vision of a text model, is a new run's."""
    params = convert.start(origin, placed) if origin else {}
    if missing := placed.keys() - params.keys():
        kept = {name: jax.tree.map(lambda x: x.sharding, placed[name]) for name in missing}
        params |= jax.jit(lambda: {name: make()[0][name] for name in missing}, out_shardings=kept)()
    return params | ({"vision": convert.start_vision(eyes, params["vision"])} if eyes else {})


@contextlib.contextmanager
def _held(workdir: Path):
    """Process 0 holds the workdir for all meanwhile."""
    with contextlib.ExitStack() as stack:
        problem = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(lock.held(workdir))
            except ConfigError as error:
                problem = str(error)
        if problem := agreed(problem):
            raise ConfigError(problem)
        yield


def _leave_out(stream, experiment, behind: dict, at: int) -> None:
    """Takes the stream behind the data of step `at`, and of guard.beyond steps more."""
    stream.restore(behind[at])
    t = experiment.train
    for _ in range(experiment.guard.beyond * t.micro_batches(t.tokens_seen(at))):
        stream.next()


def _report(log, experiment, ratio, guard, step, seen, lr, metrics, seconds, looks=0):
    """Fetches a step's metrics and writes them (`ratio`: bytes a token; `looks`: tiles seen); (step, why) to go back."""
    m, c = jax.device_get(metrics), experiment.model
    skipped = guard.skipped
    if why := guard.see(step, float(m["loss"]), float(m["grad_norm"])):
        return step, why
    if guard.skipped > skipped:
        log.say(f"step {step} has loss {m['loss']}, gradient norm {m['grad_norm']}: it changed nothing", step)
    rate, tiles = log.tokens_per_s(seen), looks / (seen - experiment.train.tokens_seen(step - 1))     # a token
    record = {"step": step, "loss": float(m["loss"]), "bits_per_byte": float(m["loss"]) / math.log(2) / ratio,
              "tokens": seen, "lr": lr, "grad_norm": float(m["grad_norm"]), "seconds": seconds,
              "aux_loss": float(m["aux_loss"]), "z_loss": float(m["z_loss"]), "drop_rate": float(m["dropped"].mean()),
              "overflow_rate": float(m["overflow"].mean()), "skipped": guard.skipped, "rollbacks": guard.rollbacks,
              "tokens_per_s": rate,
              "flops_per_s": rate * (c.flops_training(experiment.train.length) + 3 * tiles * c.vision.flops_tile(c.dim))}
    record |= {"tiles": looks} if c.vision.layers else {}
    record |= {name: float(m[name]) for name in ("contrastive_loss",) if name in m}
    if "layer_norms" in m:
        record["layer_norms"] = [float(f"{norm:.4g}") for norm in m["layer_norms"]]
    if "micro_square" in m:     # of the micro-batches' gradients: how far it is above grad_norm tells their noise
        record["micro_norm"] = math.sqrt(m["micro_square"])
    log.step(record, m["load_E"], m["dropped"], step % experiment.train.log_every == 0 and not guard.row)


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
