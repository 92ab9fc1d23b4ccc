"""The readers of untrusted files: valid files for each, and a function that reads them. It may raise a one-line ConfigError."""
import contextlib
import functools
import io
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from mmx import config
from mmx.analysis.counts import count_params
from mmx.checkpoints import hf_config, hf_layout, safetensors
from mmx.data import captions, images, sources, tokens
from mmx.data.document_types import ImageText, TokenIds
from mmx.files import texts, untrusted

MODEL = config.Model(vocab=270, dim=4, layers=2, pattern="LS", heads=2, kv_heads=1, head_dim=2, rotary_dim=2, experts=2,
                     expert_dim=4, top_k=1)
VISION = config.Vision(layers=1, dim=4, heads=2, hidden=4, tile=28, patch=14, grids=((1, 1), (1, 2)), token=265)
TEXT = "The state of the union, é 𝄞 \n".encode()


def whole_files(write) -> dict[str, bytes]:
    """The files that `write` puts into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
                if path.is_file()}


# ---- released form ----

def write_released(folder: Path, model=MODEL, dialect="released", shard_bytes=700):
    shapes = {name: leaf.tensor_shape for leaf in hf_layout.leaves(model) for _, name in leaf.tensors()}
    tensors = {name: (np.dtype(np.float32), shape) for name, shape in shapes.items()}
    places = safetensors.plan_files(folder, tensors, shard_bytes)
    assert len({place.file for place in places.values()}) > 1 or shard_bytes > 700
    ids = dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), (256, 257, 258)))
    (folder / "config.json").write_text(json.dumps(hf_config.write_model(model, dialect, "float32", ids)))
    (folder / "generation_config.json").write_text(json.dumps(ids))


@functools.cache
def safetensors_files():
    def write(folder):
        write_released(folder, shard_bytes=1 << 30)
        (folder / "config.json").unlink()
        (folder / "generation_config.json").unlink()
    return whole_files(write)


def read_safetensors(folder: Path):
    safetensors.find_tensors(folder)


@functools.cache
def released_files():
    return whole_files(write_released)


def read_released(folder: Path):
    """Opens the checkpoint and reads every tensor."""
    from mmx.checkpoints import convert

    source = convert.open_source(folder)
    source.ids()
    with safetensors.Files(0) as files:
        for leaf in hf_layout.leaves(source.model):
            source.read_leaf(files, leaf)


@functools.cache
def config_files():
    def write(folder):
        with_vision = config.build({"model": config.sections(config.Experiment(model=MODEL))["model"] | {
            "vision": {name: getattr(VISION, name) for name in VISION.__dataclass_fields__}}}).model
        for name, model in (("text", MODEL), ("vision", with_vision)):
            for dialect in ("released", "transformers"):
                text = hf_config.write_model(model, dialect, "float32", {})
                (folder / f"{name}-{dialect}.json").write_text(json.dumps(text))
        (folder / "run.json").write_text(config.to_json(config.Experiment(model=with_vision)))
    return whole_files(write)


def read_config(folder: Path):
    """Reads config.json of both dialects, for text models and for images, and the config.json of a run."""
    for path in sorted(folder.glob("*.json")):
        text = untrusted.read_json(untrusted.check_link(path))
        if path.name == "run.json":
            model = config.build(text).model
        else:
            model = config.build({"model": hf_config.read_model(text, path)}).model
        count_params(model)
        with contextlib.suppress(config.ConfigError):
            safetensors.check_tensors({}, model, path)


# ---- tokenizer ----

@functools.cache
def tokenizer_files():
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    def write(folder):
        bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "Ġ": 3, "t": 4, "h": 5, "e": 6}, [("a", "b")], unk_token=None))
        bpe.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"\p{L}+|\s+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        bpe.decoder, bpe.post_processor = decoders.ByteLevel(), processors.ByteLevel()
        pieces = [("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("e", -2.5)]
        piece = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
        piece.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        piece.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        word = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##s": 2}, unk_token="[UNK]"))
        word.pre_tokenizer, word.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        word.normalizer = normalizers.BertNormalizer()
        for name, made in (("bpe", bpe), ("unigram", piece), ("word", word)):
            made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
            made.save(str(folder / f"{name}.json"))

    from tokenizers import Regex
    return whole_files(write)


def read_tokenizer(folder: Path):
    for path in sorted(folder.glob("*.json")):
        found = tokens.tokenizer(str(path))
        ids = found.encode(TEXT * 20)
        found.decode(ids)
        found.decode(range(min(found.vocab, 100)))


# ---- images ----

@functools.cache
def image_files():
    def write(folder):
        rng = np.random.default_rng(0)
        rgb = Image.fromarray(np.uint8(rng.integers(0, 255, (20, 31, 3))))
        for name, kind, options in (
                ("a.png", "PNG", {}), ("palette.png", "PNG", {}), ("deep.png", "PNG", {}), ("a.jpg", "JPEG", {}),
                ("scans.jpg", "JPEG", {"progressive": True}), ("a.webp", "WEBP", {}), ("a.gif", "GIF", {}),
                ("a.bmp", "BMP", {}), ("a.tiff", "TIFF", {}), ("lzw.tiff", "TIFF", {"compression": "tiff_lzw"})):
            image = {"palette.png": lambda: rgb.convert("P"), "deep.png": lambda: Image.fromarray(
                np.uint16(rng.integers(0, 65535, (20, 31))))}.get(name, lambda: rgb)()
            image.save(folder / name, kind, **options)
    return whole_files(write)


def read_images(folder: Path):
    refused = []
    for path in sorted(folder.iterdir()):
        try:
            images.prepare(VISION, images.read(path))
        except config.ConfigError as error:
            refused.append(error)
    if refused:
        raise refused[0]


# ---- text, suites, runs ----

@functools.cache
def source_files():
    rows = [{"text": "one"},
            {"text": "<image> a", "images": ["a.png"]},
            {"prompt": "two?", "completion": " two"}, {"tokens": [1, 2, 3], "targets": [-1, 2, 3]}]
    return {"a.jsonl": "\n".join(json.dumps(row) for row in rows * 3).encode(), "b.txt": TEXT * 3,
            "a.png": image_files()["a.png"], "deep/c.jsonl": json.dumps({"text": "three"}).encode() + b"\n"}


def read_sources(folder: Path):
    found = sources.documents(str(folder), "train")
    for name, content in found:
        if isinstance(content, ImageText):
            assert all(Path(image).resolve().is_relative_to(folder.resolve()) for image in content.images)
        elif isinstance(content, TokenIds):
            tokens.check_ids(tokens.Bytes(), content.tokens_T.tolist(), name)


@functools.cache
def suite_files():
    squad = {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "a"}]}]}]}]}
    hotpot = [{"context": [["t", ["s", "s"]]], "question": "q", "answer": "a"}]
    long = [{"question": "q", "context": "c", **{f"choice_{x}": x for x in "ABCD"}, "difficulty": "easy", "length": "short",
             "answer": "A"}]
    niah = {"messages": [{"content": "m"}] * 3, "label": "1. a", "length_class": 2048}
    pairs = lambda name: [{"original": "o", name: "t"}]
    texts = {"squad.json": squad, "hotpotqa.json": hotpot, "data.json": long,
             "wordlist.json": {"ek": {"a": ["b"]}, "ke": {"b": "a"}},
             "train_examples.json": pairs("translation"), "test_examples_ek.json": pairs("ground_truth"),
             "test_examples_ke.json": pairs("ground_truth"), "niah/2048_tokens.jsonl": niah}
    return {name: json.dumps(text).encode() for name, text in texts.items()} | {"grammar_book.txt": TEXT}


def read_suites(folder: Path):
    from mmx.evals import longbench, mr_niah, mtob, ruler
    from mmx.evals.examples import SuiteOptions

    errors = []
    for plan, where in ((longbench.plan, folder), (mtob.plan, folder), (mr_niah.plan, folder / "niah"),
                        (ruler.squad.__wrapped__, folder / "squad.json"), (ruler.hotpot.__wrapped__, folder / "hotpotqa.json"),
                        (texts.read, folder / "grammar_book.txt")):
        try:
            if plan in (ruler.squad.__wrapped__, ruler.hotpot.__wrapped__, texts.read):
                plan(where)
            else:
                for task in plan(SuiteOptions(tokenizer=tokens.Bytes(), data=where))[:3]:
                    task.make()
        except config.ConfigError as error:
            errors.append(error)
    if errors:
        raise errors[0]


@functools.cache
def run_files():
    rows = [{"params": 1e6 * i, "tokens": 1e7 * i, "flops": 6e13 * i * i, "loss": 3 / i, "arch": "a"} for i in range(1, 5)]
    csv = "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)])
    return {"runs.jsonl": "\n".join(map(json.dumps, rows)).encode(), "runs.csv": csv.encode()}


def read_runs(folder: Path):
    from mmx.analysis import runs

    errors = []
    for name in ("runs.jsonl", "runs.csv"):
        try:
            runs.read_runs(folder / name, "chinchilla", dict.fromkeys(runs.COLUMNS), [])
        except config.ConfigError as error:
            errors.append(error)
    if errors:
        raise errors[0]


@functools.cache
def workdir_files():
    row = {"name": "a", "hash": "h", "flops": 1.0, "tokens": 1, "seconds": 1.0, "loss": 1.0}
    metrics = {"step": 1, "loss": 1.0, "seconds": 1.0, "tokens": 1, "tokens_per_s": 1.0, "bits_per_byte": 1.0}
    about, example = {"suite": "needle", "seed": 0}, {"row": "a", "column": "b", "index": 0, "score": 1.0}
    return {"runs.jsonl": json.dumps(row).encode(), "runs/a/row.json": json.dumps(row).encode(),
            "metrics.jsonl": b"\n".join([json.dumps(metrics).encode()] * 3) + b"\n",
            "config.json": config.to_json(config.Experiment(model=MODEL)).encode(),
            "needle.jsonl": b"\n".join(json.dumps(x).encode() for x in (about, example)) + b"\n"}


def read_workdir(folder: Path):
    """Reads the config and metrics of a run, the rows of a sweep and the examples of a suite."""
    from mmx.checkpoints import run_config
    from mmx.evals import runner
    from mmx.launch import sweep
    from mmx.training import metrics

    errors = []
    for read in (lambda: config.build(run_config.read_config(folder)), lambda: metrics.read(folder),
                 lambda: metrics.latest(folder), lambda: sweep.collect(folder),
                 lambda: runner._resume(folder / "needle.jsonl", {"suite": "needle", "seed": 0})):
        try:
            read()
        except config.ConfigError as error:
            errors.append(error)
    if errors:
        raise errors[0]


@functools.cache
def archive_files():
    rows = [{"image": "a.png", "title": "one"}, {"image": "a.png", "name": "two"}]
    parts = {"captions.jsonl": "\n".join(map(json.dumps, rows)).encode(), "a.png": image_files()["a.png"]}

    def write(folder):
        for name, mode in (("a.tar", "w"), ("b.tar.gz", "w:gz"), ("c.tar.xz", "w:xz"), ("d.tar.bz2", "w:bz2")):
            with tarfile.open(folder / name, mode) as tar:
                for part, raw in parts.items():
                    about = tarfile.TarInfo(part)
                    about.size = len(raw)
                    tar.addfile(about, io.BytesIO(raw))
    return whole_files(write)


def read_archives(folder: Path):
    """Unpacks each archive and reads it as a text source."""
    errors, before = [], set(folder.iterdir())
    for path in sorted(before):
        into = folder / "into" / path.name
        try:
            captions.unpack(path, into)
            sources.documents(str(into), "train")
        except config.ConfigError as error:
            errors.append(error)
    if wrong := {*folder.iterdir(), *(folder / "into").glob("*")} - before - {folder / "into"} - {
            folder / "into" / path.name for path in before}:
        raise AssertionError(f"written outside: {wrong}")
    if errors:
        raise errors[0]


@functools.cache
def override_files():
    overrides = "train.ramp=((0,1),(100,2))", "model.aux=hf", "train.lr=1e-3", "data.sources=('sotu',)"
    return {"overrides.txt": "\n".join(f"--config.{each}" for each in overrides).encode(), "lengths.txt": b"512,1k,4M"}


def read_overrides(folder: Path):
    """Reads overrides `--config.KEY=VALUE`, one a line: the first two separately, then all together. Then --lengths."""
    from mmx.launch import experiments

    errors = []
    lines = [os.fsdecode(line) for line in untrusted.read_bytes(folder / "overrides.txt").split(b"\n")]
    for given in (*[[line] for line in lines[:2]], lines):
        try:
            experiments._build(config.default(), given)
        except config.ConfigError as error:
            errors.append(error)
    config.parse_lengths(os.fsdecode(untrusted.read_bytes(folder / "lengths.txt")))
    if errors:
        raise errors[0]


# ---- Orbax, prefixes ----

def trained():
    """Parameters and the state of an optimizer."""
    import jax.numpy as jnp

    params = {"embed_WD": jnp.zeros((MODEL.vocab, MODEL.dim)), "groups": {"layer_0": {"norm_D": jnp.ones((1, 4))}}}
    return params, {"mu": params, "count": jnp.zeros((), jnp.int32)}


@functools.cache
def orbax_files():
    from mmx.checkpoints import convert, manager

    def write(folder):
        write_released(folder / "hf", shard_bytes=1 << 30)
        convert.from_hf(folder / "hf", folder / "converted", progress=False)
        shutil.rmtree(folder / "hf")
        kept = manager.Checkpoints(folder / "trained", 1, 1)
        kept.save(3, *trained(), {"documents": [1, 2]}, force=True)
        kept.close()

    def made(folder):
        (folder / "hf").mkdir()
        write(folder)
    return whole_files(made)


def read_orbax(folder: Path):
    """Reads a converted checkpoint as a conversion does, and restores a trained one, without and with its checksums."""
    import jax

    from mmx.checkpoints import convert, manager

    errors = []
    params, opt = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained())
    try:
        source = convert.open_source(folder / "converted")
        for leaf in hf_layout.leaves(source.model):
            source.read_leaf(None, leaf)
    except config.ConfigError as error:
        errors.append(error)
    for verify in (False, True):
        try:
            manager.Checkpoints(folder / "trained", 1, 1, verify).restore(params, opt)
        except config.ConfigError as error:
            errors.append(error)
    if errors:
        raise errors[0]


@functools.cache
def loaded():
    import jax

    from mmx import model
    made = model.Model(MODEL)
    params = jax.jit(made.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    return SimpleNamespace(model=made, params=params, config=MODEL, tokenizer="bytes")


@functools.cache
def prefix_files():
    from mmx.inference import engine, prefix
    from mmx.model import empty_cache

    def write(folder):
        prefix.save(folder / "kept.npz", loaded(), engine.Prefix(empty_cache(MODEL, 1, 4), 7, 5))
    return whole_files(write)


def read_prefix(folder: Path):
    from mmx.inference import prefix
    prefix.load(folder / "kept.npz", loaded())


PARSERS = {     # files, reader
    "safetensors": (safetensors_files, read_safetensors), "released": (released_files, read_released),
    "config": (config_files, read_config), "tokenizer": (tokenizer_files, read_tokenizer), "images": (image_files, read_images),
    "sources": (source_files, read_sources), "suites": (suite_files, read_suites), "runs": (run_files, read_runs),
    "workdir": (workdir_files, read_workdir), "orbax": (orbax_files, read_orbax), "prefix": (prefix_files, read_prefix),
    "archives": (archive_files, read_archives), "overrides": (override_files, read_overrides)}
