"""`mmx bench`: compiles the kernels for TPUs and GPUs, or times them."""
from mmx.cli import common


def add_parser(commands) -> None:
    group = common.add_command(commands, "bench", None, "Compile or time the kernels.")
    kinds = group.add_subparsers(dest="kind", metavar="kernels", required=True)
    parser = common.add_command(kinds, "kernels", run,
                                "Compile every kernel for TPUs and GPUs, without the hardware, or time it.",
                                "Prints static schedule estimates, registers and memory. On a machine with a TPU or a GPU, "
                                "measures times instead.")
    parser.add_argument("--chip", metavar="CHIPS", type=lambda text: text.split(","),
                        help="chips to compile for, separated by commas: v4, v5e, v5p, v6e, tpu7x, h100, h20, a100 (default: "
                        "all whose compiler is installed)")
    parser.add_argument("--live", action="store_true", help="measure times on the present device, even if it is a CPU")
    parser.add_argument("--lengths", metavar="TOKENS", help="sequence lengths to time, in tokens, separated by commas "
                        "(default: powers of two from 1024 to 131072)")
    parser.add_argument("--out", metavar="DIR",
                        help="directory for kernels.png, a plot of times over sequence length (default .)")
    common.add_json(parser)


def run(args):
    from mmx.compilers import bench

    return bench.kernels(args.chip, args.json, args.live, args.lengths, args.out)
