"""What several commands share: arguments, checks of their values, and the reading of experiment files."""
import argparse
import functools
import textwrap
from pathlib import Path

from mmx import config
from mmx.config import ConfigError, Experiment
from mmx.files import json_text
from mmx.launch import experiments

WIDTH = 78          # of descriptions, in characters
OVERRIDES = ("To override any key of the experiment, add --config.KEY=VALUE, for example\n"
             "--config.train.steps=200 --config.model.pattern=LLLS")
CHECKPOINT = ("a run's working directory (its latest step), a directory checkpoints/STEP of a run, a Hugging Face "
              "checkpoint directory, or ORG/NAME on the Hugging Face Hub")


def add_command(commands, name: str, run, summary: str, details: str = "", *, accepts_overrides: bool = False, epilog=None):
    """Adds a subparser to `commands` and returns it.

    Args:
      run: called with the parsed arguments. Returns an exit code; None means 0.
      summary: a sentence for the list of commands.
      details: further sentences for the help of this command.
      accepts_overrides: whether the command takes --config.KEY=VALUE.
      epilog: text below the help of the arguments; its lines are not wrapped.
    """
    description = textwrap.fill(f"{summary} {details}", WIDTH)
    parser = commands.add_parser(name, help=summary, description=description, epilog=epilog, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run, accepts_overrides=accepts_overrides, parser=parser)
    return parser


def add_checkpoint(parser, flag: str = "--checkpoint", metavar: str = "PATH") -> None:
    parser.add_argument(flag, required=True, metavar=metavar, help=CHECKPOINT)


def add_experiment(parser, positional: bool = False) -> None:
    name, options = ("config", {}) if positional else ("--config", {"required": True})
    parser.add_argument(name, metavar="FILE", help="experiment file, or the name of an installed experiment, for example tiny; "
                        "FILE:A,B passes the arguments A and B to its get_config(). Also a run's working directory, a Hugging "
                        "Face checkpoint directory, or the config.json of either", **options)


def add_mesh(parser) -> None:
    parser.add_argument("--mesh", metavar="AXES", help="shard the model over devices, for example ep=4,etp=2; one axis may be "
                        "-1, which takes the remaining devices (default: one device)")


def add_weights_dtype(parser, text: str = "store weight matrices as int8 with one scale for each output channel") -> None:
    parser.add_argument("--weights-dtype", choices=["int8"], help=text)


def add_json(parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def read_experiment(path: str, overrides: list[str]) -> Experiment:
    """Reads an experiment and applies `--config.KEY=VALUE` overrides. Raises ConfigError.

    Args:
      path: FILE.py, FILE.py:A,B, a config.json, or a directory with a config.json: a run or a Hugging Face checkpoint.
    """
    folder = Path(path)
    if folder.is_dir() or (folder.is_file() and experiments.is_json(folder)):
        from mmx.checkpoints import saved_configs

        return check_experiment(experiments.read_sections(saved_configs.read(folder), overrides))
    return check_experiment(experiments.read(path, overrides))


def check_experiment(experiment: Experiment) -> Experiment:
    """Returns the experiment if each letter of its pattern is a known layer kind; raises ConfigError otherwise.

    Every experiment that a command reads passes through this function.
    """
    from mmx.layers.kinds import check_pattern

    check_pattern(experiment.model.pattern)
    return experiment


def on_mesh(run):
    """Wraps a command so that it runs on the devices that --mesh names."""
    @functools.wraps(run)
    def run_on_mesh(args):
        if not args.mesh:
            return run(args)
        from mmx import mesh
        from mmx.checkpoints import convert

        with mesh.inference_mesh(convert.find_model(args.checkpoint), args.mesh):
            return run(args)
    return run_on_mesh


def check_minimums(args, **minimums) -> None:
    """Raises ConfigError if an argument that was given is below its minimum, or is not a number."""
    for name, minimum in minimums.items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:      # this form also refuses nan
            raise ConfigError(f"--{name} {value} is out of range: it must be {minimum} or more")


def suite_options(args) -> dict:
    """The examples that the user asks of an evaluation suite. Empty values and zero mean the suite's defaults."""
    return {"lengths": tuple(config.parse_lengths(args.lengths)) if args.lengths is not None else (),
            "rows": tuple(args.rows.split(",")) if args.rows else (), "examples": args.examples or 0, "seed": args.seed or 0}


def print_json(value) -> None:
    print(json_text.dumps(value, indent=1))
