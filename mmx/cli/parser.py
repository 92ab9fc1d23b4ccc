"""Parses the command line and runs the command that it names.

To add a command, write a module in mmx/cli with `add_parser(commands)` and `run(args)`, and add its name to COMMANDS.
Command modules import heavy packages such as JAX inside `run`, so that `mmx --help` is quick.
"""
import argparse
import importlib
import re
import sys

import mmx
from mmx.cli import errors
from mmx.config import nearest
from mmx.files import hub, urls
from mmx.launch import experiments

COMMANDS = [importlib.import_module(f"mmx.cli.{name}") for name in (      # in the order of `mmx --help`
    "train",
    "generate",
    "eval",
    "data",
    "examples",
    "convert",
    "config",
    "memory",
    "fit",
    "sweep",
    "aot",
    "bench",
)]
EPILOG = """\
examples:
  mmx train --config experiments/tiny.py --workdir run --config.train.steps=200 --config.mesh.edp=2
  mmx eval --checkpoint run                                   # held-out bits per byte
  mmx eval --checkpoint run --suite needle --lengths 1k,4k,16k        # retrieval by depth and length
  mmx data prepare --source books --tokenizer tokenizer.json --out store      # tokenize once
  mmx examples --suite needle --lengths 256,1k --out needle.jsonl     # training documents for a suite
  mmx generate --checkpoint run --prompt "The state of the Union" --temperature 0.8
  mmx generate --checkpoint vl --image a.png --prompt "<image> What is this?"
  mmx convert to-hf --checkpoint run --out run-hf             # for transformers, vLLM and others
  mmx convert verify --checkpoint run --against run-hf
  mmx config experiments/text_01.py                           # parameters, FLOPs and shapes
  mmx memory --config experiments/text_01.py --lengths 8k,1M,4M --chips h20:8
  mmx sweep --config experiments/scaling.py --out scaling     # a grid of runs, which can be resumed
  mmx fit runs.jsonl --law chinchilla                         # scaling laws with confidence intervals
  mmx aot --config experiments/text_01.py:v5p-512 --topology v5p:8x8x8
  mmx aot --config experiments/text_01.py:v5p-512 --topology v5p:8x8x8 --search     # ranks all meshes
  mmx bench kernels --chip v5p,h100                           # compiles the kernels for TPU and GPU
"""


def run(argv: list[str]) -> int:
    """Runs the command of the arguments `argv` and returns its exit code. Exits with code 2 if the arguments are wrong."""
    parser = build_parser()
    if not argv:
        parser.print_help()
        return 0
    args, args.overrides = parser.parse_known_args(join_overrides(argv))
    if args.overrides and not args.accepts_overrides:
        args.parser.error(args.parser.describe_unknown(args.overrides[0]))
    return errors.run(_run, args)


def _run(args):
    for name in ("checkpoint", "against"):
        if path := getattr(args, name, None):
            setattr(args, name, hub.resolve(path))
    for name in ("workdir", "out", "checkpoint", "against", "save_cache", "cache", "store"):
        urls.refuse(getattr(args, name, None) or "", f"--{name.replace('_', '-')}")
    return args.run(args)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `mmx`, with a subparser for each command."""
    parser = Parser("mmx", description=mmx.__doc__.splitlines()[0], epilog=EPILOG, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"mmx {mmx.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_parser(commands)
    return parser


def join_overrides(argv: list[str]) -> list[str]:
    """Joins `--config.key value` into `--config.key=value`, so that the value is not parsed as a positional argument.

    A boolean key needs no value.
    """
    joined = []
    for argument in argv:
        key = re.fullmatch(r"--config\.([\w.]+)", joined[-1]) if joined else None
        is_value = not argument.startswith("--")
        if key and experiments.key_types().get(key[1]) == "bool":
            is_value = argument.lower() in ("true", "false", "0", "1")
        if key and is_value:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports wrong arguments in one line and suggests the nearest flag."""

    def parse_known_args(self, args=None, namespace=None):
        self._argv = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message):
        if " are required: " in message:        # the user may have misspelt one of the required flags
            flags = [argument for argument in self._argv if re.match(r"--(?!config[.])\w", argument)]
            unknown = [flag for flag in flags if flag.partition("=")[0] not in self._option_string_actions]
            message = self.describe_unknown(unknown[0]) if unknown else message
        if wanted := re.fullmatch(r"argument (--\S+): expected one argument", message):
            message += f"; write {wanted[1]}=VALUE if the value begins with -"
        sys.exit(errors.report(f"{message}; see `{self.prog} --help`"))

    def describe_unknown(self, argument: str) -> str:
        """The error message for an argument that this parser does not know."""
        flag = argument.partition("=")[0]
        hint = nearest(flag, self._option_string_actions) if flag.startswith("--") else ""
        return f"unknown argument {flag!r:.200}{hint}"
