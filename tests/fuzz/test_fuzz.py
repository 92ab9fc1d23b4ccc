"""Hostile files: random ones for every reader, each limit separately, and the defects that `make fuzz` has found."""
import contextlib
import io
import json
import os
import re
import resource
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import fuzz
import parsers

from mmx import config
from mmx.checkpoints import hf_config, safetensors
from mmx.config import ConfigError
from mmx.data import captions, images, sources, tokens
from mmx.files import checksums, lock, texts, untrusted
from mmx.launch import experiments
from mmx.training import metrics


@pytest.mark.parametrize("name", parsers.PARSERS)
def test_random_files_of_every_reader(name, tmp_path):
    """In child processes with limits, as in `make fuzz`. Each reader first reads its valid files."""
    done, outcomes, found = fuzz.fuzz(name, 40, 7, tmp_path / "found")
    assert done >= 40 and len(outcomes) > 2 and not found, [p.read_text() for p in tmp_path.rglob("FOUND")]


# ---- JSON ----

@pytest.mark.parametrize("text, message", [
    ("[" * 65 + "]" * 65, "nested deeper than 64"), ("[" * 100_000, "nested deeper than 64"),
    ('{"a":1,"a":2}', "has a key twice"),
    ("[" + "9" * 5000 + "]", "4300 digits"), ("[" + "0," * 8_000_001 + "0]", "more than 8,000,000 values"), ("{", "Expecting"),
    (b"\xff", "utf-8"), ("", "Expecting")])
def test_json_within_limits(text, message):
    with pytest.raises(ValueError, match=message):
        untrusted.loads(text)


def test_valid_json():
    assert untrusted.loads("[" * 64 + "]" * 64)
    assert untrusted.loads(json.dumps("[{," * 3_000_000)) == "[{," * 3_000_000      # brackets within a string do not count
    assert untrusted.loads(b'\xef\xbb\xbf{"a": [1e999]}') == {"a": [float("inf")]}


def test_a_file_that_never_ends_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "pipe", "is not a regular file"), ("/dev/zero", "is not a regular file"),
                          (tmp_path, "Is a directory"), (tmp_path / "none", "is missing"), ("a\0b", "null byte")):
        with pytest.raises(ConfigError, match=message):
            untrusted.read_bytes(path)
    (tmp_path / "large").write_bytes(b"ab")
    with pytest.raises(ConfigError, match="has 2 bytes; at most 1 are allowed"):
        untrusted.read_bytes(tmp_path / "large", 1)


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("é\r\nb\rc\n".encode())
    assert texts.read(tmp_path / "a.txt") == "é\nb\nc\n"
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match="a.txt: not UTF-8 at byte 2$"):
        texts.read(tmp_path / "a.txt")


def test_control_characters_of_messages_are_escaped():
    assert untrusted.one_line("a\n\x1b[2Jb\ud800") == r"a \x1b[2Jb\ud800"
    assert len(untrusted.one_line("a" * 10**6)) < 2100


# ---- checkpoints ----

def write(folder, files):
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    return folder


def header(folder, change, data=b""):
    """Writes a safetensors file with a header: JSON of a value, or bytes."""
    text = json.dumps(change).encode() if not isinstance(change, bytes) else change
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder / "model.safetensors"


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("change, message", [
    (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', "has a key twice"), (b"[]", "it is not a JSON object"),
    ({"a": ENTRY, "b": ENTRY}, "overlap"), ({"a": ENTRY | {"shape": [2**62] * 8}}, "has 8 bytes"),
    ({"a": ENTRY | {"shape": [1] * 9}}, "needs dtype, shape"), ({"a" * 300: ENTRY}, "is not a valid tensor name"),
    ({"a\x1b[2J": ENTRY}, "is not a valid tensor name"),
    ({"a": ENTRY | {"dtype": "I" * 10**5}}, "has dtype IIIIIIIIIIIIIIIIIIII;"),
    ({"a": ENTRY | {"data_offsets": [0, 2**63]}}, "is truncated"), ({"a": ENTRY | {"data_offsets": [-8, 0]}}, "needs dtype")])
def test_damaged_headers(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        safetensors.read_header(header(tmp_path, change, bytes(8)))


def test_a_header_that_is_too_long_is_not_read(tmp_path):
    path = header(tmp_path, {})
    with path.open("r+b") as file:
        file.write((17 << 20).to_bytes(8, "little"))
        file.truncate(18 << 20)
    with pytest.raises(ConfigError, match="at most 16,777,216 are allowed"):
        safetensors.read_header(path)


def test_a_stack_of_too_many_experts(tmp_path):
    """A sparse file of 8 TB: the names of its experts would fill the memory."""
    count, name = 1 << 40, "model.layers.0.mlp.experts.down_proj"
    path = header(tmp_path, {name: {"dtype": "F32", "shape": [count, 1, 2], "data_offsets": [0, count * 8]}})
    os.truncate(path, (8 << 40) + 1000)
    with pytest.raises(ConfigError, match="stacks 1,099,511,627,776 experts"):
        safetensors.read_header(path)


def test_links_out_of_a_checkpoint_are_refused(tmp_path):
    from mmx.checkpoints import convert

    elsewhere = write(tmp_path / "elsewhere", parsers.released_files())
    for victim in ("config.json", "model-00001-of-00002.safetensors", "generation_config.json"):
        names = parsers.released_files()
        here = write(tmp_path / f"hf-{victim}", names)
        victim = next(name for name in names if name.startswith(victim[:11]))
        (here / victim).unlink()
        (here / victim).symlink_to(elsewhere / victim)
        with pytest.raises(ConfigError, match="is a link that leads out of its directory"):
            convert.open_source(here)
    converted = convert.from_hf(elsewhere, tmp_path / "run", progress=False)
    (converted / "generation_config.json").rename(tmp_path / "elsewhere.json")
    (converted / "generation_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ConfigError, match="is a link that leads out of its directory"):
        convert.open_source(converted)


def test_the_hugging_face_cache_is_read(tmp_path):
    """snapshots/COMMIT contains links into blobs."""
    files, blobs = parsers.safetensors_files(), tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for number, (name, raw) in enumerate(files.items()):
        write(blobs, {str(number): raw})
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    assert safetensors.find_tensors(snapshot)


def test_orbax_paths_stay_inside(tmp_path):
    from mmx.checkpoints import manager

    write(tmp_path, parsers.orbax_files())
    params = tmp_path / "converted" / "checkpoints" / "0" / "params"
    text = json.loads((params / "_METADATA").read_text())
    for key in ("..", "../../etc", "a/b", "", ".", "a\0"):
        entry = next(iter(text["tree_metadata"].values())) | {"key_metadata": [{"key": key, "key_type": 2}]}
        (params / "_METADATA").write_text(json.dumps(text | {"tree_metadata": {"x": entry}}))
        with pytest.raises(ConfigError, match="does not list arrays"):
            manager.open_arrays(params.parent)
    (params / "_METADATA").write_text(json.dumps(text))
    (params / "link").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="links are not allowed in a checkpoint"):
        manager.open_arrays(params.parent)


def refused(name, files, folder, change):
    """The error message of a reader after `change` has damaged its valid files."""
    change(write(folder, files))
    message = fuzz.check(parsers.PARSERS[name][1], folder)
    assert message != "read"
    return message


@pytest.mark.parametrize("text, message", [
    (lambda about: about | {"chunks": [270, 2**31 - 1]}, r"chunks of \(270, 2147483647\) are larger than its shape \(270, 4\)"),
    (lambda about: "[" * 100_000, "nested deeper than 64 levels"), (lambda about: about | {"dtype": "<i4"}, "has dtype int32")])
def test_an_array_that_would_crash_the_process(text, message, tmp_path):
    """TensorStore allocates a whole chunk, and its JSON parser has no limit of levels: both would crash the process."""
    def change(folder):
        path = folder / "converted" / "checkpoints" / "0" / "params" / "embed_WD" / ".zarray"
        changed = text(json.loads(path.read_text()))
        path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    assert re.search(message, refused("orbax", parsers.orbax_files(), tmp_path, change))


@pytest.mark.parametrize("name", ["metrics.jsonl", "runs.jsonl", "runs/a/row.json", "needle.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_endless_files_in_a_workdir(name, kind, tmp_path):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero") if kind == "device" else os.mkfifo(folder / name)
    with within(10):
        assert f"{name} is not a regular file" in refused("workdir", parsers.workdir_files(), tmp_path, change)


@contextlib.contextmanager
def within(seconds):
    """Fails if the block takes longer, such as a read that waits forever. Limits its memory too."""
    def timeout(*_):
        raise AssertionError(f"{seconds} s")
    before, limits = signal.signal(signal.SIGALRM, timeout), resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("line", [
    {"step": None}, {"loss": "x"}, {"tokens": 10**400}, {"seconds": [1]}, {"skipped": True}, {"step": 1.5}, {"layers": [[1]]}])
def test_metrics_end_before_the_first_invalid_line(line, tmp_path):
    whole = {"step": 1, "seconds": 1.0, "tokens": 2, "loss": 3.0, "bits_per_byte": 4.0}
    lines = [whole, whole | line, whole]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert metrics.read(tmp_path) == [whole]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines[:2]))
    assert metrics.latest(tmp_path) is None


def test_a_curve_without_points_is_not_plotted(tmp_path):
    from mmx.evals import compression

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "bits_per_byte": 3.0}\n')
    assert compression.plot_curve(tmp_path, {"steps": 2, "bits_per_byte": 3.0}, tmp_path / "curve.png") is None


def test_checksums_of_other_things_than_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "is not a regular file"), ("a\0b", "null byte")):
        files = {name: [0, "0" * 64]}
        (tmp_path / "checksums.json").write_text(json.dumps({"sha256": checksums._table_digest(files), "files": files}))
        with within(10):
            assert message in checksums.find_damage(tmp_path)
    (tmp_path / "checksums.json").unlink()
    os.mkfifo(tmp_path / "checksums.json")
    with within(10):
        assert checksums.find_damage(tmp_path) == "checksums.json is damaged"


def test_a_deeply_nested_lock(tmp_path):
    (tmp_path / "run.lock").write_text("[" * 4000)
    with (tmp_path / "run.lock").open() as file:
        assert lock._read_owner(file) == {}


@pytest.mark.parametrize("changes, message", [
    ({"num_hidden_layers": 10**6, "attn_type_list": [0] * 10**6},
     "model.layers=1000000 must be at most 10,000"),
    ({"num_attention_heads": 2**20}, "model.heads=1048576 must be at most 65,536"), ({"hidden_size": 10**400}, "below 2\\^40"),
    ({"hidden_size": 2**70}, "below 2\\^40"), ({"num_local_experts": []}, "num_local_experts=\\[\\]"),
    ({"rope_theta": float("nan")}, "finite")])
def test_configs_beyond_the_limits(changes, message):
    text = json.loads(parsers.config_files()["text-released.json"])
    with pytest.raises(ConfigError, match=message):
        hf_config.read_model(text | changes, "config.json")


# ---- suites ----

@pytest.mark.parametrize("length", [True, None, "2048"])
def test_a_length_must_be_a_number(length, tmp_path):
    row = {"messages": [{"content": "m"}], "label": "1. a", "length_class": length}

    def change(folder):
        (folder / "niah" / "2048_tokens.jsonl").write_text(json.dumps(row))
    assert "lacks the column 'length_class' (int)" in refused("suites", parsers.suite_files(), tmp_path, change)


# ---- tokenizer.json ----

def tokenizer(tmp_path, **changes):
    text = json.loads(parsers.tokenizer_files()["bpe.json"])
    for key, value in changes.items():
        text[key] = text[key] | value if key == "model" else value
    (tmp_path / "t.json").write_text(json.dumps(text))
    return tokens.tokenizer(str(tmp_path / "t.json"))


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize("changes, message", [
    ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}}, "can make a text 256 times as long"),
    ({"normalizer": {"type": "Prepend", "prepend": "a" * 1000}}, "can make a text 256 times as long"),
    ({"decoder": {"type": "Sequence", "decoders": [DOUBLE] * 40}}, "can make a text 256 times as long"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 40}}, "can make a text 256 times"),
    ({"model": {"continuing_subword_prefix": "#" * 10**6}}, "continuing_subword_prefix has 1000000 characters"),
    ({"model": {"vocab": {"a": 2**32 - 1}, "merges": []}}, "has ids up to 4,294,967,295"),
    ({"model": {"vocab": {}, "merges": []}, "added_tokens": []}, "has no end-of-text token"),
    ({"model": {"continuing_subword_prefix": "######"}}, "is not 'bytes', 'numbers:COUNT' or a tokenizer.json")])
def test_tokenizers_that_need_too_much_memory(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tokenizer(tmp_path, **changes)


def test_tokenizers_that_panic_on_a_text(tmp_path):
    """A panic in Rust is not an Exception. A regex that backtracks too long and pieces of length 0 cause one."""
    endless = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    for step in (endless, {"type": "FixedLength", "length": 0}):
        made = tokenizer(tmp_path, pre_tokenizer=step)
        with pytest.raises(ConfigError, match="a.txt: data.tokenizer cannot encode it"):
            made.encode(b"a" * 40 + b"c", "a.txt")


# ---- images, sources ----

def test_formats_that_run_programs_are_refused(tmp_path):
    for kind in ("EPS", "PDF", "ICNS"):
        Image.new("RGB", (32, 32)).save(tmp_path / "x.png", kind)
        with pytest.raises(ConfigError, match="is not in a known image format"):
            images.read(tmp_path / "x.png")


def test_a_jpeg_with_too_many_scans(tmp_path):
    raw = io.BytesIO()
    Image.new("RGB", (64, 64)).save(raw, "JPEG", progressive=True)
    raw, at = raw.getvalue(), raw.getvalue().rindex(b"\xff\xda")
    (tmp_path / "x.jpg").write_bytes(raw[:at] + raw[at:-2] * 200 + raw[-2:])
    with pytest.raises(ConfigError, match="scans, more than the limit of 100"):
        images.read(tmp_path / "x.jpg")


def test_images_of_a_line_must_be_in_its_folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    here = tmp_path / "data"
    here.mkdir()
    (here / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        (here / "a.jsonl").write_text(json.dumps({"text": "<image>", "images": [name]}))
        with pytest.raises(ConfigError, match="inside the folder of the .jsonl file"):
            sources.documents(str(here), "train")


def test_an_archive_of_pictures_writes_only_into_its_folder(tmp_path):
    for name in ("../out.txt", "../../above.txt"):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        with pytest.raises(ConfigError, match="is not an archive of captioned images"):
            captions.unpack(tmp_path / "a.tar", tmp_path / "into" / "here")
    assert not (tmp_path / "into" / "out.txt").exists() and not (tmp_path / "above.txt").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_an_archive_of_pictures_makes_no_links(kind, tmp_path):
    """In some versions of Python, tar's own filter lets links lead out of the folder."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, link in (("b", ""), ("a", "b")):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = (kind, link) if link else (tarfile.REGTYPE, "")
            tar.addfile(about)
    with pytest.raises(ConfigError, match="'a' is a link"):
        captions.unpack(tmp_path / "a.tar", tmp_path / "into")
    assert not (tmp_path / "into" / "a").exists()


def test_an_invalid_archive_is_reported_in_one_line(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no archive")
    os.mkfifo(tmp_path / "pipe.tar")
    for name, message in (("a.tar", "file could not be opened successfully"), ("pipe.tar", "is not a regular file")):
        with within(10), pytest.raises(ConfigError, match=message) as caught:
            captions.unpack(tmp_path / name, tmp_path / "into")
        assert "\n" not in str(caught.value)


def test_a_picture_whose_title_is_not_valid_text(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        raw = rb'{"image": "a.png", "title": "\ud800"}'
        about = tarfile.TarInfo("captions.jsonl")
        about.size = len(raw)
        tar.addfile(about, io.BytesIO(raw))
    with pytest.raises(ConfigError, match="is not an archive of captioned images .*surrogates not allowed"):
        captions.unpack(tmp_path / "a.tar", tmp_path / "into")


def test_a_pipe_as_text_source(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with within(10), pytest.raises(ConfigError, match="data.sources: .*a.txt is not a regular file"):
        sources.documents(str(tmp_path / "a.txt"), "train")


# ---- overrides ----

@pytest.mark.parametrize("override, message", [
    ("--config.t|rain.steps=200", "unknown config key t.rain.steps"), ("--confyg.train.steps" * 100, "unknown argument"),
    ("-config.x=1", "unknown config key x"), ("--noconfig.train.x", "unknown config key train.x")])
def test_overrides_of_unknown_keys(override, message):
    with pytest.raises(ConfigError, match=message):
        experiments._build(config.default(), [override])


def test_a_message_quotes_only_the_start_of_long_lengths():
    with pytest.raises(ConfigError, match="must be numbers of tokens with commas") as caught:
        config.parse_lengths("\udcff" * 10**6)
    assert len(str(caught.value)) < 1000


def test_a_very_long_key_is_refused_quickly():
    """difflib would need half a gigabyte to suggest similar keys."""
    before = time.process_time()
    with pytest.raises(ConfigError, match="unknown config key abcdefgh"):
        config.build({"abcdefgh" * (untrusted.JSON_BYTES // 8): 1})
    assert time.process_time() - before < 1
