"""`mmx convert`: converts checkpoints between mmx and Hugging Face form, and compares two checkpoints."""
from mmx.cli import common
from mmx.config import ConfigError

SLICES = "The command copies the weights in slices, so it needs little memory."


def add_parser(commands) -> None:
    group = common.add_command(commands, "convert", None, "Convert checkpoints to and from the released Hugging Face form.")
    kinds = group.add_subparsers(dest="kind", metavar="from-hf|to-hf|verify", required=True)
    parser = common.add_command(kinds, "from-hf", run_from_hf,
                                "Convert a Hugging Face checkpoint into a working directory of mmx.", SLICES)
    _add_output(parser)
    parser = common.add_command(kinds, "to-hf", run_to_hf,
                                "Convert a checkpoint of mmx into a Hugging Face checkpoint.", SLICES)
    _add_output(parser)
    parser.add_argument("--dialect", choices=["transformers", "released"], default="transformers",
                        help="form of config.json; transformers includes the released keys (default %(default)s)")
    parser.add_argument("--shard-bytes", type=int, default=4_000_000_000, metavar="BYTES",
                        help="largest size of a safetensors file, in bytes (default %(default)s)")
    parser = common.add_command(kinds, "verify", run_verify, "Print the largest difference between the logits of two "
                                "checkpoints on random tokens.")
    common.add_checkpoint(parser, metavar="A")
    common.add_checkpoint(parser, "--against", "B")
    parser.add_argument("--torch", action="store_true", help="run B, a Hugging Face checkpoint, in transformers: once as "
                        "corrected by mmx.torch, once unchanged (needs the extra: pip install 'mmx[torch]')")
    common.add_weights_dtype(parser, "run B with its weight matrices as int8")
    parser.add_argument("--tolerance", type=float, help="largest accepted difference; exit with code 1 above it")


def _add_output(parser) -> None:
    common.add_checkpoint(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="output directory; it must be new or empty")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="type of the written weights (default: as stored)")


def run_from_hf(args):
    from mmx.checkpoints import convert

    print(f"written: {convert.from_hf(args.checkpoint, args.out, args.dtype)}, a working directory of mmx")


def run_to_hf(args):
    from mmx.checkpoints import convert

    convert.to_hf(args.checkpoint, args.out, args.dialect, args.dtype, args.shard_bytes)
    print(f"written: {args.out}, a Hugging Face checkpoint")


def run_verify(args):
    if args.torch and args.weights_dtype:
        raise ConfigError("--weights-dtype cannot be combined with --torch: only mmx runs int8 weights")
    from mmx.inference import verify

    differences = verify.verify(args.checkpoint, args.against, args.torch, args.weights_dtype)
    for name, difference in differences.items():
        print(f"largest logit difference: {difference:.2e} ({args.against} run by {name})")
    return int(args.tolerance is not None and not next(iter(differences.values())) <= args.tolerance)
