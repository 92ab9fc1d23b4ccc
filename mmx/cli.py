"""The command line: `mmx train | generate | eval | convert | config`.

A user's mistake is one line on stderr and exit code 2. Heavy modules are imported by the command that needs them.
"""
import argparse
import contextlib
import json
import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

import mmx
from mmx import config
from mmx.config import ConfigError

EPILOG = """\
examples:
  mmx train --config experiments/tiny.py --workdir run --config.train.steps=200 --config.mesh.edp=2
  mmx eval --checkpoint run                               held-out bits per byte, beside gzip and xz
  mmx generate --checkpoint run --prompt "The state of the Union" --temperature 0.8
  mmx convert to-hf --checkpoint run --out run-hf         for transformers, vLLM and others
  mmx convert verify --checkpoint run --against run-hf
  mmx config experiments/text_01.py                       parameters, FLOPs, shapes
"""
CHECKPOINT = "a workdir (its latest step), one of its checkpoints/STEP, or a Hugging Face directory"
Formatter = argparse.RawDescriptionHelpFormatter


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    if not argv:
        parser.print_help()
        return 0
    args, rest = parser.parse_known_args(argv)
    args.overrides = rest
    try:
        if rest and not args.takes_config:
            raise ConfigError(f"unknown argument {rest[0]!r}; `mmx {args.command} --help` lists them")
        return args.run(args) or 0
    except (ConfigError, ImportError) as error:
        return _fail(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print(f"mmx: {message}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """Wrong arguments in one line."""

    def error(self, message):
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

    overrides = "Any key of the experiment can be set behind it: --config.train.steps=200 --config.model.pattern=LLS"
    sub = command("train", train, "Train an experiment, or go on with it.", True, epilog=overrides)
    sub.add_argument("--config", required=True, metavar="FILE", help="experiment file, such as experiments/tiny.py")
    sub.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, metrics.jsonl and TensorBoard go here")

    sub = command("generate", generate, "Continue prompts.")
    sub.add_argument("--checkpoint", required=True, metavar="PATH", help=CHECKPOINT)
    sub.add_argument("--prompt", required=True, action="append", help="text to continue; may be given several times")
    sub.add_argument("--steps", type=int, default=200, help="tokens at most (default 200)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    sub.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest; 0: all (default)")
    sub.add_argument("--top-p", type=float, default=0.95, help="draw among the likeliest of this probability (default 0.95)")
    sub.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; several times")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], help="of parameters and computation (default: as stored)")

    sub = command("eval", evaluate, "Held-out bits per byte, beside gzip -9 and xz -9e of the same files, each alone.")
    sub.add_argument("--checkpoint", required=True, metavar="PATH", help=CHECKPOINT)
    sub.add_argument("--split", choices=["validation", "test"], default="validation", help="(default validation)")
    sub.add_argument("--source", help="text: sotu (embedded), a file or a folder (default: what the run was trained on)")
    sub.add_argument("--out", metavar="DIR", help="eval.json and curve.png go here (default: the checkpoint's workdir)")

    convert = command("convert", None, "Carry checkpoints to and from PyTorch's released form.")
    kinds = convert.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=Parser)
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
    sub.add_argument("--torch", action="store_true", help="run B, a Hugging Face directory, by transformers (extra: torch)")
    sub.add_argument("--tolerance", type=float, help="exit with 1 where the difference is larger")

    sub = command("config", show_config, "Shapes, parameters and FLOPs of an experiment.", True, epilog=overrides)
    sub.add_argument("config", metavar="FILE", help="experiment file, such as experiments/text_01.py")
    sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


def read_experiment(path: str, overrides: list[str]) -> config.Experiment:
    """The experiment of a file with `--config.key=value` overrides."""
    file = Path(re.sub(r"\.py:.*$", ".py", path))
    if not file.is_file():
        near = config.nearest(file.name, [p.name for p in file.parent.glob("*.py")]) if file.parent.is_dir() else ""
        raise ConfigError(f"no experiment file {path}{near}")
    values = flags.FlagValues()
    arguments = ["mmx", f"--config={path}", *overrides]
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
        left = values(arguments)[1:]
        found = values.config
    except (AttributeError, KeyError) as error:
        raise ConfigError(_unknown_key(str(error), overrides)) from None
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(f"unknown argument --{error.flagname}; overrides are --config.SECTION.KEY=VALUE") from None
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(f"{path} with {' '.join(overrides) or 'no overrides'}: {error}") from None
    if left:
        raise ConfigError(f"unknown argument {left[0]!r}; overrides are --config.SECTION.KEY=VALUE")
    return config.build(found)


def _unknown_key(error: str, overrides) -> str:
    """Which override names no key, and the nearest that exists."""
    known = {f"{section}.{key}" for section, values in config.default().items() for key in values}
    for override in overrides:
        key = re.sub(r"^--config\.|=.*", "", override)
        if override.startswith("--config.") and key not in known:
            return f"unknown config key {key}{config.nearest(key, known)}"
    return error


def train(args):
    experiment = read_experiment(args.config, args.overrides)
    from mmx import inference
    from mmx.train import run

    done = run(experiment, args.workdir, sample=inference.sample)
    if done["stopped"]:
        print(f"stopped at step {done['step']} and saved; the same command goes on from there")
        return
    print(f"trained {done['step']} steps in {done['seconds']:.0f} s; checkpoints, metrics.jsonl and tensorboard are in "
          f"{args.workdir}")


def generate(args):
    loaded = mmx.load(args.checkpoint, dtype=args.dtype)
    texts = mmx.generate(loaded, args.prompt, steps=args.steps, temperature=args.temperature, top_k=args.top_k,
                         top_p=args.top_p, seed=args.seed, stop=args.stop)
    for prompt, text in zip(args.prompt, texts):
        print(prompt + text)


def evaluate(args):
    from mmx.evals import compression

    out = Path(args.out or args.checkpoint)
    result = compression.evaluate_checkpoint(args.checkpoint, args.split, args.source)
    out.mkdir(parents=True, exist_ok=True)
    curve = compression.plot_curve(Path(args.checkpoint), result, out / "curve.png")
    (out / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    table = Table("", "bits per byte", title=f"{result['files']} {args.split} files, {result['bytes']:,} bytes")
    for name, value in (("this model", result["bits_per_byte"]), ("xz -9e, each file alone", result["xz"]),
                        ("gzip -9, each file alone", result["gzip"])):
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    print(f"written: {out / 'eval.json'}" + (f", {curve}" if curve else ""))


def from_hf(args):
    from mmx import convert

    print(f"written: {convert.from_hf(args.checkpoint, args.out, args.dtype)}, an mmx workdir")


def to_hf(args):
    from mmx import convert

    convert.to_hf(args.checkpoint, args.out, args.dialect, args.dtype, args.shard_bytes)
    print(f"written: {args.out}, for mmx.torch.load and other readers of the released form")


def verify(args):
    from mmx import convert

    difference = convert.verify(args.checkpoint, args.against, torch=args.torch)
    print(f"largest logit difference: {difference:.2e}")
    return int(args.tolerance is not None and not difference <= args.tolerance)


def show_config(args):
    e = read_experiment(args.config, args.overrides)
    m, t = e.model, e.train
    figures = {
        "params_total": m.params_total, "params_active": m.params_active, "params_active_all": m.params_active_all,
        "flops_per_token": m.flops_training(t.length), "flops_per_token_forward": m.flops_forward(t.length),
        "checkpoint_tensors": m.checkpoint_tensors, "tokens_per_micro_batch": t.batch * t.length}
    if args.json:
        print(json.dumps(figures, indent=1))
        return
    table = Table("", "", title=args.config, show_header=False)
    for name, value in (
            ("layers", f"{m.layers} = {m.groups} x {m.pattern}  (L lightning, S softmax)"),
            ("hidden, vocabulary", f"{m.dim:,}, {m.vocab:,}"),
            ("heads", f"{m.heads} x {m.head_dim}, softmax with {m.kv_heads} KV heads, RoPE on {m.rotary_dim} dims, base "
                      f"{m.rope_theta:,.0f}"),
            ("experts", f"{m.experts} x {m.expert_dim:,}, top-{m.top_k}, "
                        + (f"capacity {m.capacity}" if m.capacity else "no dropping")),
            ("parameters", f"{m.params_total:,}  ({_short(m.params_total)})"),
            ("active, without embedding and head", f"{m.params_active:,}  ({_short(m.params_active)})"),
            ("active, with both", f"{m.params_active_all:,}  ({_short(m.params_active_all)})"),
            ("FLOPs per token, forward", f"{m.flops_forward(t.length):.4g} at {t.length:,} tokens"),
            ("FLOPs per token, training", f"{m.flops_training(t.length):.4g} at {t.length:,} tokens"),
            ("checkpoint tensors", f"{m.checkpoint_tensors:,}"),
            ("tokens a micro-batch", f"{t.batch:,} x {t.length:,} = {t.batch * t.length:,}"),
            ("residual alpha", f"lightning {m.alpha_lightning:.6g}, softmax {m.alpha_softmax:.6g}, MoE {m.alpha_moe:.6g}"),
            ("mesh", ", ".join(f"{axis} {size}" for axis, size in vars(e.mesh).items()))):
        table.add_row(name, value)
    Console().print(table)


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4f} {unit}"
    return str(count)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
