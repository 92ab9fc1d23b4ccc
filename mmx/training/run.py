"""A training run, phase by phase: checks, mesh, compiled functions, data, restored state, loop (paper section 4.2)."""
import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmx import mesh as meshes
from mmx.checkpoints import convert, side_files
from mmx.checkpoints import initial as initials
from mmx.checkpoints.manager import Checkpoints, agree_on_problem, find_step
from mmx.checkpoints.run_config import check_config, read_config
from mmx.config import ConfigError, Experiment, to_json
from mmx.data import encoding, held_out, images, paths, tokens
from mmx.files import lock
from mmx.model import Model
from mmx.parallel import sharding
from mmx.training import optim
from mmx.training.batches import Batches
from mmx.training.evaluate import NO_TARGETS, bytes_per_token, first_bytes, has_targets, make_evaluator
from mmx.training.guards import Guard
from mmx.training.loop import Clock, Evaluation, Run, State, fraction_done, train_loop
from mmx.training.metrics import Log
from mmx.training.signals import StopSignals
from mmx.training.step import abstract_state, init, jit_train_step

MIN_BYTES_FOR_MEAN = 65_536     # the bytes per token are averaged over at least this much text


def train(experiment: Experiment, workdir: str | Path, sample=None, processes: int = 1) -> dict:
    """Starts or resumes the run in WORKDIR, and trains to its end or until SIGTERM or Ctrl-C.

    If several processes train together (jax.distributed), each of them calls it with the same experiment and WORKDIR.

    Args:
      sample: a function (model, params, tokenizer, prompt) -> text for the samples in TensorBoard.
      processes: how many processes train together.
    Returns:
      A dict: "step", the number of steps done; "new", how many of them this call did; "seconds" of training; "stopped", the
      signal that stopped the run or 0; "skipped", the skipped steps of the whole run; "process", the index of this process.
    """
    t, c, workdir = experiment.train, experiment.checkpoint, Path(workdir)
    # The phases before the lock write no file, so an experiment that cannot run leaves the workdir unchanged.
    tokenizer = check_experiment(experiment, sample)
    mesh = meshes.make(experiment, processes)
    check_same_experiment(experiment)
    experiment = paths.absolute_experiment(experiment)
    paths.check_workdir(workdir, experiment.data)
    program = build_program(experiment, mesh)
    batches = Batches(experiment, mesh)
    evaluation = build_evaluation(experiment, mesh, tokenizer, sample)
    initial = open_initial_checkpoints(experiment, workdir)
    checkpoints, guard = Checkpoints(workdir, c.every, c.keep, c.verify), Guard(experiment)
    with lock_workdir(workdir), jax.set_mesh(mesh), jax.transfer_guard_host_to_device("disallow"), StopSignals() as stop:
        saved = read_config(workdir).get("train") if (workdir / "config.json").exists() else None
        check_config(workdir, experiment, write=False)
        start = {"stream": batches.stream.state(), "seconds": 0.0, "guard": None}
        restore = functools.partial(restore_state, checkpoints, program, initial, start)
        state = restore()
        write_description(workdir, experiment, initial)
        batches.stream.restore(state.host_state["stream"])
        guard.restore(state.host_state.get("guard"))
        log = Log(workdir, t, state.step, t.tokens_seen(state.step), write=jax.process_index() == 0)
        warn_of_differences(experiment, initial, log, state.step)
        warn_of_new_schedule(saved, experiment, workdir, state, log)
        run = Run(experiment, batches, program.update, evaluation, checkpoints, restore, guard, log, stop)
        clock = Clock(state.host_state["seconds"])
        try:
            step = train_loop(run, state, clock)
        finally:
            with contextlib.closing(checkpoints):
                log.close()
    return {"step": step, "new": step - state.step, "seconds": clock.seconds(), "stopped": stop.number,
            "skipped": guard.skipped, "process": jax.process_index()}


def check_experiment(e: Experiment, sample):
    """Returns the tokenizer. Raises ConfigError if it does not fit the model, or if a setting would make the run fail later."""
    tokenizer = tokens.tokenizer(e.data.tokenizer)
    tokens.check_vocab(tokenizer, e.model.vocab)
    if sample and e.train.sample_every:
        try:
            images.encode(e.model.vision, e.train.sample_prompt.encode(), [], tokenizer.encode)
        except ConfigError as error:
            raise ConfigError(f"train.sample_prompt={e.train.sample_prompt!r:.200}: {error}") from None
    if e.model.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ConfigError("model.dtype='float64' needs JAX_ENABLE_X64=1 in the environment: without it JAX has no float64")
    return tokenizer


def check_same_experiment(e: Experiment) -> None:
    """Raises ConfigError if the processes have different experiments, with which they would wait for each other forever."""
    if jax.process_count() == 1:
        return
    sums = multihost_utils.process_allgather(np.uint32(zlib.crc32(to_json(e).encode())))
    if different := np.flatnonzero(sums != sums[0]).tolist():
        raise ConfigError(f"process {different[0]} has a different experiment than process 0: run the same command for every "
                          "process; only --process may differ")


class Program(NamedTuple):
    """The compiled functions of a run."""
    abstract: tuple         # shapes, dtypes and shardings of (params, opt)
    init: Callable          # () -> params, opt
    init_optimizer: Callable        # params -> opt
    update: Callable        # (params, opt, batch, lr) -> params, opt, metrics


def build_program(e: Experiment, mesh) -> Program:
    """Checks that the model can run and that train.freeze names parts of it. The functions are compiled when first called."""
    t, model, optimizer = e.train, Model(e.model), optim.adamw(e.train)
    with jax.set_mesh(mesh):
        try:
            abstract = abstract_state(model, optimizer, t, mesh)
        except NotImplementedError as error:
            # The kernel that model.impl names cannot run here. The error starts with "impl='gpu': " and may advise impl=None.
            raise ConfigError(f"model.{error} (in the config, impl=None is model.impl='')") from None
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return Program(abstract, jax.jit(functools.partial(init, model, optimizer, t), out_shardings=shardings),
                   jax.jit(lambda params: optimizer.init(optim.split(params, t.freeze)[0]), out_shardings=shardings[1]),
                   jit_train_step(model, optimizer, t, abstract))


def build_evaluation(e: Experiment, mesh, tokenizer, sample) -> Evaluation:
    """Returns the functions that evaluate parameters on held-out documents and sample from them. They drop no token."""
    t, documents = e.train, held_out.validation(e.data, encoding.image_options(e))
    if t.eval_every and not documents:
        raise ConfigError(f"train.eval_every={t.eval_every} needs held-out text or token ids, but data.sources has only "
                          "images: set train.eval_every=0")
    if t.eval_every and not has_targets(tokenizer, first_bytes(documents, t.eval_bytes)):
        raise ConfigError(f"train.eval_every={t.eval_every}: {NO_TARGETS}")
    model = Model(dataclasses.replace(e.model, capacity=0.0, transport=0.0))        # 0: no limit, so no token is dropped
    evaluate = make_evaluator(model, tokenizer, length=t.length, batch=t.batch, overlap=t.length // 2,
                              loss_chunk=t.loss_chunk, sharding=sharding.batch_sharding(mesh))
    mean_bytes = t.eval_bytes and max(t.eval_bytes, MIN_BYTES_FOR_MEAN)     # 0: all
    return Evaluation(lambda params: evaluate(params, documents, t.eval_bytes),
                      sample and (lambda params: sample(model, params, tokenizer, t.sample_prompt)),
                      bytes_per_token(tokenizer, first_bytes(documents, mean_bytes)))


class InitialCheckpoints(NamedTuple):
    """The checkpoints that initialize the parameters of a new run. A resumed run uses neither."""
    params: object | None       # of train.init_from; None: no checkpoint
    vision: object | None       # of train.init_vision; None: no checkpoint


def open_initial_checkpoints(e: Experiment, workdir: Path) -> InitialCheckpoints:
    """Opens the checkpoints that the experiment names. Raises ConfigError if one does not fit the model."""
    t, new = e.train, find_step(workdir) is None
    return InitialCheckpoints(initials.open_initial(t.init_from, e.model, e.data.tokenizer)
                              if t.init_from and new else None,
                              initials.open_initial_vision(t.init_vision, e.model) if t.init_vision and new else None)


def write_description(workdir: Path, e: Experiment, initial: InitialCheckpoints) -> None:
    """Writes what describes the run: config.json, tokenizer.json and, for a new run, the side files of train.init_from."""
    check_config(workdir, e)
    if initial.params and jax.process_index() == 0:
        side_files.write_list(workdir, convert.copy_side_files(initial.params, workdir))


def warn_of_differences(e: Experiment, initial: InitialCheckpoints, log: Log, step: int) -> None:
    """Logs the settings in which this model and the models of train.init_from and train.init_vision differ.

    Only settings are listed that change the results of a model without changing its parameters.
    """
    is_run = isinstance(initial.params, convert.WorkdirSource)
    if initial.params and (different := initials.differing_settings(initial.params.model, e.model, with_capacity=is_run)):
        log.message(f"train.init_from={e.train.init_from!r} was trained with other settings: {', '.join(different)}", step)
    if initial.vision and (different := initials.differing_vision_settings(initial.vision.model, e.model)):
        log.message(f"train.init_vision={e.train.init_vision!r} was trained with other settings: {', '.join(different)}", step)


def warn_of_new_schedule(saved: dict | None, e: Experiment, workdir: Path, state: State, log: Log) -> None:
    """Logs a line if a resumed run has another length than before, and its learning rate therefore jumps.

    Args:
      saved: the section train of WORKDIR/config.json before this call; None for a new run or a converted checkpoint.
    """
    if not saved or not state.step:
        return
    new, seconds = e.train, state.host_state["seconds"]
    old = dataclasses.replace(new, steps=saved.get("steps", new.steps), seconds=saved.get("seconds", new.seconds))
    if old == new or fraction_done(new, state.step, seconds) >= 1:
        return
    last = state.step - 1
    before, after = (optim.learning_rate(t, last, fraction_done(t, last, seconds)) for t in (old, new))
    if abs(after - before) > 0.01 * max(after, before):
        rate = optim.learning_rate(new, state.step, fraction_done(new, state.step, seconds))
        key = "seconds" if old.seconds != new.seconds else "steps"
        log.message(
            f"train.{key} was {getattr(old, key):g} and is now {getattr(new, key):g}, which changes the schedule: the learning "
            f"rate of step {state.step} was {before:.3g}, the rate of step {state.step + 1} is {rate:.3g}. To keep this run "
            f"and train on with a new schedule, give another --workdir and --config.train.init_from={workdir}", state.step)


@contextlib.contextmanager
def lock_workdir(workdir: Path):
    """A context in which process 0 holds the lock of WORKDIR for all processes.

    If process 0 cannot lock WORKDIR, every process raises the same ConfigError.
    """
    with contextlib.ExitStack() as stack:
        problem = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(lock.acquire(workdir))
            except ConfigError as error:
                problem = str(error)
        if problem := agree_on_problem(problem):
            raise ConfigError(problem)
        yield


def restore_state(checkpoints: Checkpoints, program: Program, initial: InitialCheckpoints, start: dict) -> State:
    """The state of the last checkpoint. Without a checkpoint, the state of a new run.

    A new run has the host state `start`. Its parameters are from `initial`, or new if `initial` has no checkpoints.
    """
    if restored := checkpoints.restore(*program.abstract):
        step, params, opt, host_state = restored
        if opt is not None:     # None: a converted checkpoint, which has only parameters
            return State(step, params, opt, host_state)
    elif any(initial):
        step, params = 0, initial_params(program, initial)
    else:
        return State(0, *program.init(), start)
    return State(step, params, program.init_optimizer(params), start)


def initial_params(program: Program, initial: InitialCheckpoints) -> dict:
    """The parameters of the initial checkpoints. Parameters that they do not contain, such as the vision encoder, are new."""
    abstract = program.abstract[0]
    params = initials.load_initial(initial.params, abstract) if initial.params else {}
    if missing := abstract.keys() - params.keys():
        shardings = {name: jax.tree.map(lambda x: x.sharding, abstract[name]) for name in missing}
        params |= jax.jit(lambda: {name: program.init()[0][name] for name in missing}, out_shardings=shardings)()
    return params | ({"vision": initials.load_initial_vision(initial.vision, params["vision"])} if initial.vision else {})
