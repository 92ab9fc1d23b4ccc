"""`mmx eval`: measures held-out bits per byte, or runs an evaluation suite."""
import json
import os
from pathlib import Path

from rich.table import Table

from mmx.cli import common
from mmx.config import ConfigError
from mmx.files import output

SUITES = """\
A suite replaces the measurement of bits per byte. SUITE.jsonl contains one line for each
example; SUITE.json and SUITE.png contain the table of scores. To resume a suite, run the
same command again."""
ONLY_WITH_SUITE = ("lengths", "rows", "examples", "seed", "data", "context")
ONLY_WITHOUT_SUITE = ("split", "source")


def add_parser(commands) -> None:
    parser = common.add_command(commands, "eval", run, "Measure held-out bits per byte, or run an evaluation suite.",
                                "Bits per byte are compared with gzip -9 and xz -9e, which compress each file alone.")
    common.add_checkpoint(parser)
    parser.add_argument("--split", choices=["validation", "test"], help="held-out split (default validation)")
    parser.add_argument("--source", help="text to measure: sotu (the embedded corpus), a file or a directory (default: the "
                        "sources of the run)")
    parser.add_argument("--out", metavar="DIR", help="directory for eval.json and curve.png, or for a suite's files (default: "
                        "the working directory of the checkpoint)")
    common.add_weights_dtype(parser)
    common.add_mesh(parser)
    group = parser.add_argument_group("evaluation suites", SUITES)
    group.add_argument("--suite", metavar="NAME",
                       help="needle, ruler, mr-niah, mqar, mtob, longbench2, position or vision")
    group.add_argument("--lengths", metavar="TOKENS",
                       help="prompt lengths in tokens, separated by commas: 512,1k,4m (1k is 1,024)")
    group.add_argument("--rows", metavar="ROWS", help="rows of the table, separated by commas: depths in percent, RULER tasks, "
                       "numbers of MQAR pairs, ek and ke of MTOB, or kinds of vision questions (default: all)")
    group.add_argument("--examples", type=int, metavar="N",
                       help="examples in each cell of the table (default: the suite's)")
    group.add_argument("--seed", type=int, help="seed of the examples (default 0)")
    group.add_argument("--data", metavar="DIR", help="directory with your copy of the data: squad.json and hotpotqa.json "
                       "for qa_1 and qa_2 of ruler, .jsonl files for mr-niah, the directory of MTOB for mtob, data.json for "
                       "longbench2")
    group.add_argument("--context", type=int, metavar="TOKENS",
                       help="longest prompt in tokens; longer ones are refused, or shortened in the middle by longbench2")


@common.on_mesh
def run(args):
    for name in ONLY_WITHOUT_SUITE if args.suite else ONLY_WITH_SUITE:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} {'cannot be combined with' if args.suite else 'needs'} --suite")
    from mmx.checkpoints import manager

    workdir, _ = manager.find_step(args.checkpoint) or (Path(args.checkpoint), None)
    out = Path(args.out or os.path.relpath(workdir))
    if args.suite:
        _run_suite(args, out)
    else:
        _measure_bits_per_byte(args, workdir, out)


def _measure_bits_per_byte(args, workdir: Path, out: Path) -> None:
    from mmx.evals import compression

    split = args.split or "validation"
    result = compression.evaluate_checkpoint(args.checkpoint, split, args.source, args.weights_dtype)
    out.mkdir(parents=True, exist_ok=True)
    curve = compression.plot_curve(workdir, result, out / "curve.png")
    (out / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    table = Table("", "bits per byte", title=f"{result['files']} {split} files, {result['bytes']:,} bytes")
    for name, value in (("this model", result["bits_per_byte"]), ("xz -9e, each file alone", result["xz"]),
                        ("gzip -9, each file alone", result["gzip"])):
        table.add_row(name, f"{value:.4f}")
    output.console().print(table)
    print(f"written: {out / 'eval.json'}" + (f", {curve}" if curve else ""))


def _run_suite(args, out: Path) -> None:
    common.check_minimums(args, examples=1, context=1, seed=0)
    from mmx.evals import runner

    result = runner.evaluate_checkpoint(
        args.checkpoint, args.suite, out, data=args.data and Path(args.data), context=args.context or 0,
        weights_dtype=args.weights_dtype, **common.suite_options(args))
    picture = runner.plot(result, out / f"{args.suite}.png")
    output.console().print(runner.make_table(result))
    print(f"written: {out / args.suite}.json, {picture}, {out / args.suite}.jsonl")
