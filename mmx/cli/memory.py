"""`mmx memory`: prints the memory of weights and caches by sequence length, and a roofline of inference."""
from pathlib import Path

from mmx import config
from mmx.cli import common


def add_parser(commands) -> None:
    parser = common.add_command(commands, "memory", run, "Print memory by sequence length, and a roofline of inference.",
                                "For comparison: the same model with softmax layers only, and DeepSeek-V3.",
                                accepts_overrides=True, epilog=common.OVERRIDES)
    common.add_experiment(parser)
    parser.add_argument("--lengths", default="1k,8k,128k,1M,4M", metavar="TOKENS", help="sequence lengths in tokens, separated "
                        "by commas; k is 1,024 and M is 1,048,576 (default %(default)s)")
    parser.add_argument("--chips", default="h800:8,h20:8,v5p:8,v6e:32", metavar="CHIP:COUNT", help="groups of chips, separated "
                        "by commas. Chips: v4, v5e, v5p, v6e, tpu7x, h100, h800, h20. Slices are named by cores, so "
                        "v5p-16 is v5p:8 (default %(default)s)")
    parser.add_argument("--out", default=".", metavar="DIR", help="directory for memory.png (default %(default)s)")
    common.add_json(parser)


def run(args):
    model, lengths = common.read_experiment(args.config, args.overrides).model, config.parse_lengths(args.lengths)
    from mmx.analysis import memory

    chips = memory.pods(args.chips)
    report, plot = memory.report(model, lengths, chips), memory.plot(model, lengths, chips, Path(args.out) / "memory.png")
    if args.json:
        common.print_json(report)
        return
    memory.show(report, args.config)
    print(f"plot: {plot}")
