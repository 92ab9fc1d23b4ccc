"""`mmx generate`: continues prompts with a checkpoint."""
from pathlib import Path

import mmx
from mmx.cli import common
from mmx.config import ConfigError
from mmx.files import json_text, standard_input, texts


def add_parser(commands) -> None:
    parser = common.add_command(commands, "generate", run, "Continue prompts.")
    common.add_checkpoint(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                        help="text to continue; may be given several times")
    parser.add_argument("--prompt-file", action="append", default=[], metavar="FILE",
                        help="UTF-8 file that contains one prompt, or - for the standard input; may be given several times")
    parser.add_argument("--image", action="append", default=[], metavar="FILE",
                        help="image file for the next <image> mark of the prompts; may be given several times")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="stop before this text; may be given several times")
    parser.add_argument("--json", action="store_true",
                        help="print one JSON object for each prompt: text, token ids and log-probabilities")
    _add_sampling(parser.add_argument_group("sampling"))
    _add_computation(parser.add_argument_group("computation"))


def _add_sampling(group) -> None:
    group.add_argument("--steps", type=int, default=200, metavar="N",
                       help="maximum number of tokens to generate (default %(default)s)")
    group.add_argument("--temperature", type=float, default=0.8,
                       help="sampling temperature; 0 always takes the most likely token (default %(default)s)")
    group.add_argument("--top-k", type=int, default=0, metavar="K",
                       help="sample from the K most likely tokens; 0: from all (default %(default)s)")
    group.add_argument("--top-p", type=float, default=0.95, metavar="P",
                       help="sample from the most likely tokens whose probabilities add up to P (default %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="random seed (default %(default)s)")


def _add_computation(group) -> None:
    group.add_argument("--dtype", choices=["float32", "bfloat16"],
                       help="type of the parameters and the computation (default: as stored)")
    common.add_weights_dtype(group)
    group.add_argument("--kv-dtype", choices=["float32", "bfloat16", "int8"],
                       help="type of the keys and values that softmax layers cache (default: the type of the computation)")
    common.add_mesh(group)
    group.add_argument("--rows", type=int, default=32, metavar="N",
                       help="sequences to generate at the same time; further prompts wait (default %(default)s)")
    group.add_argument("--save-cache", metavar="FILE",
                       help="save the prefilled cache of the prompt for later calls; needs exactly one prompt")
    group.add_argument("--load-cache", metavar="FILE",
                       help="continue from a cache that --save-cache saved; prompts are appended to its text")


@common.on_mesh
def run(args):
    prompts = _read_prompts(args)
    from mmx.data import images

    image_files = images.split_by_prompt(prompts, args.image)     # one tuple for each prompt
    if args.save_cache:         # checked before the prefill, which can take long
        _check_output(Path(args.save_cache))
    from tqdm import tqdm

    from mmx.inference import engine, prefix

    loaded = mmx.load(args.checkpoint, dtype=args.dtype, weights_dtype=args.weights_dtype)
    cached = prefix.load(args.load_cache, loaded) if args.load_cache else None
    bar = tqdm(desc="prefill", unit=" tokens", unit_scale=True, leave=False, disable=None)
    options = {"kv_dtype": args.kv_dtype or "", "progress": bar.update}
    uncached = prompts
    if args.save_cache:
        cached = engine.make_prefix(loaded, prompts[0], images=image_files[0], prefix=cached, **options)
        prefix.save(args.save_cache, loaded, cached)
        uncached, image_files = [""], [()]
    sampling = engine.Sampling(args.temperature, args.top_k, args.top_p, args.seed, tuple(args.stop))
    requests = [engine.Request(text, args.steps, sampling, image_files[number], number) for number, text in enumerate(uncached)]
    outputs = _close_at_first(bar, engine.stream(loaded, requests, prefix=cached, rows=args.rows, **options))
    if len(prompts) == 1 and not args.json:
        _print_stream(prompts[0], outputs)
    else:
        _print_all(prompts, outputs, args.json)


def _read_prompts(args) -> list[str]:
    """The prompts of the command line and of files; one empty prompt if --load-cache is given without a prompt."""
    if sum(map(standard_input.is_named, args.prompt_file)) > 1:
        raise ConfigError("--prompt-file names the standard input twice, and it can be read only once")
    prompts = [*args.prompt, *map(_read_prompt, args.prompt_file)]
    if not prompts and not args.load_cache:
        raise ConfigError("no prompt was given: add --prompt TEXT, --prompt-file FILE or --load-cache FILE")
    if args.save_cache and len(prompts) != 1:
        raise ConfigError(f"--save-cache needs exactly one prompt, but {len(prompts)} were given")
    return prompts or [""]


def _read_prompt(file: str) -> str:
    return standard_input.read_text(file) if standard_input.is_named(file) else texts.read(file)


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"--save-cache {path} is a directory: give the name of a file")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)


def _close_at_first(bar, pieces):
    """Yields `pieces`, and closes the progress bar before anything can be printed."""
    for piece in pieces:
        bar.close()
        yield piece


def _print_stream(prompt: str, pieces) -> None:
    """Prints the only prompt and its continuation while it is generated."""
    before = prompt
    for piece in pieces:
        print(before + piece.text, end="\n" if piece.ended else "", flush=True)
        before = ""


def _print_all(prompts: list[str], pieces, as_json: bool) -> None:
    """Prints all prompts with their continuations, in the order of the prompts."""
    pieces_of = [[] for _ in prompts]
    for piece in pieces:
        pieces_of[piece.request].append(piece)
    for prompt, own in zip(prompts, pieces_of):
        text = "".join(piece.text for piece in own)
        if as_json:
            print(json_text.dumps({"prompt": prompt, "text": text, "ids": [x for piece in own for x in piece.ids_T.tolist()],
                              "logprobs": [x for piece in own for x in piece.logprobs_T.tolist()]}))
        else:
            print(prompt + text)
