"""`mmx examples`: writes the examples of an evaluation suite as training documents."""
from pathlib import Path

from mmx.cli import common
from mmx.config import ConfigError


def add_parser(commands) -> None:
    parser = common.add_command(commands, "examples", run, "Write examples of an evaluation suite as training documents.",
                                "The examples use training text and differ from the examples of `mmx eval`.")
    parser.add_argument("--suite", required=True, metavar="NAME", help="needle, ruler, mr-niah, mqar or position")
    parser.add_argument("--out", required=True, metavar="FILE", help="FILE.jsonl, which data.sources can name")
    parser.add_argument("--lengths", metavar="TOKENS",
                        help="prompt lengths in tokens, separated by commas: 256,512,1k (1k is 1,024; default: the suite's)")
    parser.add_argument("--rows", metavar="ROWS", help="as for `mmx eval`, separated by commas (default: all)")
    parser.add_argument("--examples", type=int, default=100, metavar="N",
                        help="examples for each length and row (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the examples (default %(default)s)")
    parser.add_argument("--tokenizer", default="bytes", metavar="FILE",
                        help="tokenizer.json that counts tokens, or bytes (default %(default)s)")


def run(args):
    out = Path(args.out)
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {args.out} must end in .jsonl, so that data.sources can read it")
    common.check_minimums(args, examples=1, seed=0)
    from mmx.evals import runner

    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    count = runner.write_examples(args.suite, out, args.tokenizer, **common.suite_options(args))
    print(f"written: {out}, {count:,} examples")
