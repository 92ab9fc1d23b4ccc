"""`mmx eval`: measures the loss on held-out documents, or runs an evaluation suite."""
import os
from pathlib import Path

from rich.table import Table

from mmx.cli import common
from mmx.config import ConfigError
from mmx.files import atomic, json_text, output

SUITES = """\
A suite replaces the measurement of bits per byte. SUITE.jsonl contains one line for each
example; SUITE.json and SUITE.png contain the table of scores. To resume a suite, run the
same command again."""
ONLY_WITH_SUITE = ("lengths", "rows", "examples", "seed", "data", "context")
ONLY_WITHOUT_SUITE = ("split", "source", "bytes")


def add_parser(commands) -> None:
    parser = common.add_command(commands, "eval", run, "Measure held-out bits per byte, or run an evaluation suite.",
                                "The loss covers what training learns: of a prompt and its completion, only the completion. "
                                "Bits per byte are compared with gzip -9 and xz -9e, which compress each document alone.")
    common.add_checkpoint(parser)
    parser.add_argument("--split", choices=["validation", "test"], help="held-out split (default validation)")
    parser.add_argument("--source", help="data source to measure: sotu (the embedded corpus), a file, a directory or a task "
                        "(default: the sources of the run; required for a checkpoint that no run of mmx has trained)")
    parser.add_argument("--bytes", type=int, metavar="N", help="measure only the first N bytes, as train.eval_bytes does in "
                        "training (default 0: all)")
    parser.add_argument("--out", metavar="DIR", help="directory for eval.json and curve.png, or for a suite's files (default: "
                        "the working directory of the checkpoint; for a Hugging Face directory, eval.json is not written, and "
                        "a suite needs --out)")
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
    common.check_minimums(args, bytes=0)
    from mmx.checkpoints import manager

    found = manager.find_step(args.checkpoint)
    out = args.out or (os.path.relpath(found[0]) if found else None)
    if args.suite:
        _run_suite(args, out)
    else:
        _measure_loss(args, found and found[0], out and Path(out))


def _measure_loss(args, workdir: Path | None, out: Path | None) -> None:
    from mmx.evals import compression

    result = compression.evaluate_checkpoint(args.checkpoint, args.split or "validation", args.source, args.weights_dtype,
                                             args.bytes or 0)
    step = "" if result["step"] is None else f", step {result['step']:,}"
    print(f"{args.checkpoint}{step}: {result['split']} documents of {', '.join(result['sources'])}; loss {result['loss']:.4f} "
          f"nats per token over {result['tokens']:,} tokens")
    if result["bits_per_byte"] is not None:
        table = Table("", "bits per byte", title=f"{result['documents']:,} documents, {result['bytes']:,} bytes")
        for name, value in (("this model", result["bits_per_byte"]), ("xz -9e, each document alone", result["xz"]),
                            ("gzip -9, each document alone", result["gzip"])):
            table.add_row(name, f"{value:.4f}")
        output.console().print(table)
    if not out:
        print("nothing was written: --out DIR keeps the result in DIR/eval.json")
        return
    out.mkdir(parents=True, exist_ok=True)
    curve = workdir and compression.plot_curve(workdir, result, out / "curve.png")
    with atomic.replacing(out / "eval.json") as file:
        file.write(json_text.dumps(result, indent=1) + "\n")
    print(f"written: {out / 'eval.json'}" + (f", {curve}" if curve else ""))


def _run_suite(args, out: str | None) -> None:
    common.check_minimums(args, examples=1, context=1, seed=0)
    if not out:
        raise ConfigError(f"--suite {args.suite} writes a line for each example, and {args.checkpoint} is a Hugging Face "
                          "directory, which mmx does not change: give --out DIR")
    from mmx.evals import runner

    out = Path(out)

    result = runner.evaluate_checkpoint(
        args.checkpoint, args.suite, out, data=args.data and Path(args.data), context=args.context or 0,
        weights_dtype=args.weights_dtype, **common.suite_options(args))
    picture = runner.plot(result, out / f"{args.suite}.png")
    output.console().print(runner.make_table(result))
    print(f"written: {out / args.suite}.json, {picture}, {out / args.suite}.jsonl")
