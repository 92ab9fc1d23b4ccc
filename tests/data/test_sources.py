import json

import pytest

from mmx.config import ConfigError
from mmx.data import corpus, sources
from mmx.data.document_types import ImageText, PromptCompletion

PARTS = ("train", "validation", "test")


def test_folder_is_split_by_file_name(tmp_path):
    (tmp_path / "deep").mkdir()
    for i in range(80):
        (tmp_path / "deep" / f"{i}.txt").write_text(f"text number {i}")
    parts = {part: sources.documents(str(tmp_path), part) for part in PARTS}
    assert sorted(name for part in parts.values() for name, _ in part) == sorted(f"deep/{i}.txt" for i in range(80))
    assert all(corpus.split_of(name) == part for part in PARTS for name, _ in parts[part])
    assert all(parts[part] for part in PARTS)


def test_jsonl_lines_are_documents_named_by_line(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"line {i} é"}) if i % 5 else "" for i in range(1, 200)))
    found = dict(document for part in PARTS for document in sources.documents(str(path), part))
    assert found == {f"talks.jsonl:{i}": f"line {i} é".encode() for i in range(1, 200) if i % 5}
    assert all(corpus.split_of(name) == "validation" for name, _ in sources.documents(str(path), "validation"))


def test_jsonl_lines_are_texts_prompts_or_ids(tmp_path):
    lines = [{"text": "é"}, {"prompt": "1 + 1 =", "completion": " 2"}, {"tokens": [256, 7, 9], "targets": [-1, 9, -1]}] * 40
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = [d for part in PARTS for d in sources.documents(str(tmp_path / "a.jsonl"), part)]
    found = [content for _, content in sorted(found, key=lambda d: int(d[0].split(":")[1]))]
    assert found[0::3] == ["é".encode()] * 40 and found[1::3] == [PromptCompletion(b"1 + 1 =", b" 2")] * 40
    assert [[x.tolist() for x in ids] for ids in found[2::3]] == [[[256, 7, 9], [-1, 9, -1]]] * 40


def test_jsonl_lines_have_images(tmp_path):
    """Paths are relative to the folder of the .jsonl file. Images do not count towards the size of the held-out text."""
    (tmp_path / "deep" / "shown").mkdir(parents=True)
    (tmp_path / "deep" / "shown" / "a.png").touch()
    lines = [{"text": "<image> é", "images": ["shown/a.png"]}, {"text": "none", "images": []},
             {"prompt": "<image>?", "completion": " <image>!", "images": ["shown/a.png", str(tmp_path / "deep/shown/a.png")]}]
    (tmp_path / "deep" / "a.jsonl").write_text("\n".join(map(json.dumps, lines * 20)))
    found = [d for part in PARTS for d in sources.documents(str(tmp_path), part)]
    found = [content for _, content in sorted(found, key=lambda d: int(d[0].split(":")[1]))]
    file = str(tmp_path / "deep" / "shown" / "a.png")
    assert found[0::3] == [ImageText(b"", "<image> é".encode(), (file,))] * 20 and found[1::3] == [b"none"] * 20
    assert found[2::3] == [ImageText(b"<image>?", b" <image>!", (file, file))] * 20


def test_hold_out_does_not_divide_completions(tmp_path):
    lines = [{"prompt": "p" * 90, "completion": "c" * 10}] * 5
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert all(corpus.split_of(f"a.jsonl:{n}") == "train" for n in range(1, 6))
    parts = {part: sources.documents(str(tmp_path / "a.jsonl"), part) for part in PARTS}
    assert [len(parts[part]) for part in PARTS] == [4, 1, 0]
    assert all(content == PromptCompletion(b"p" * 90, b"c" * 10) for part in PARTS for _, content in parts[part])


@pytest.mark.parametrize("name", ["a.txt", "b.txt", "c.txt"] + [f"{i}.txt" for i in range(60)])
def test_one_text_holds_out_its_last_twentieth_whatever_its_name(tmp_path, name):
    raw = "é".encode() * 1000                           # the boundary at byte 1900 must not be inside a character
    (tmp_path / name).write_bytes(raw + b"x")
    [(_, train)], [(_, held)] = (sources.documents(str(tmp_path / name), part) for part in PARTS[:2])
    assert train + held == raw + b"x" and len(train) == 1900 and train.decode()
    assert sources.documents(str(tmp_path / name), "test") == []


def test_hold_out_starts_at_a_character(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode() * 10)             # 20 bytes: the twentieth begins inside the last é
    [(_, held)] = sources.documents(str(tmp_path / "a.txt"), "validation")
    assert held == "é".encode()


def test_hold_out_crosses_documents(tmp_path):
    for name, count in (("0.txt", 200), ("1.txt", 5)):              # 410 bytes: the last 21 are held out
        assert corpus.split_of(name) == "train"
        (tmp_path / name).write_text("ab" * count)
    parts = {part: sources.documents(str(tmp_path), part) for part in PARTS}
    assert [(name, len(raw)) for name, raw in parts["train"]] == [("0.txt", 389)]
    assert [(name, len(raw)) for name, raw in parts["validation"]] == [("0.txt", 11), ("1.txt", 10)]


@pytest.mark.parametrize("make,message", [
    (lambda d: "soto", "no file or folder 'soto'; did you mean sotu?"),
    (lambda d: (d / "speeches.txt").write_text("x" * 99) and str(d / "speech.txt"), "did you mean speeches.txt"),
    (lambda d: str(d / "qqqqqqqq"), "a source is 'sotu', 'scenes', 'maps', 'words', a task as 'mqar:pairs=16', a .txt"),
    (lambda d: str(d), "contains no .txt, .jsonl or .parquet"),
    (lambda d: (d / "a.txt").touch() or str(d / "a.txt"), "contains no text in its 1 file$"),
    (lambda d: (d / "a.txt").touch() or str(d), "contains no text in its 1 file"),
    (lambda d: (d / "a.txt").write_text("x") and str(d / "a.txt"), "too little text"),
    (lambda d: (d / "a.csv").write_text("x") and str(d / "a.csv"), "must be a .txt, .jsonl or .parquet file, or a folder"),
    (lambda d: (d / "a.jsonl").write_text('{"text": "x"}\n{"txt": 1}') and str(d), 'a.jsonl:2: no "text" string'),
    (lambda d: (d / "a.jsonl").write_text('{"text": 1}') and str(d), 'a.jsonl:1: no "text" string'),
    (lambda d: (d / "a.jsonl").write_text('\n["text"]') and str(d), 'a.jsonl:2: no "text" string'),
    (lambda d: (d / "a.jsonl").write_text('{"prompt": "x"}') and str(d), 'a.jsonl:1: no "completion" string'),
    (lambda d: (d / "a.jsonl").write_text('{"prompt": 1, "completion": ""}') and str(d), 'a.jsonl:1: no "prompt" string'),
    (lambda d: (d / "a.jsonl").write_text('{"tokens": [1, 2], "targets": [1]}') and str(d), '1: "tokens" must be a list of'),
    (lambda d: (d / "a.jsonl").write_text('{"tokens": [1, -1], "targets": [1, 2]}') and str(d), '1: "tokens" must be a list'),
    (lambda d: (d / "a.jsonl").write_text('{"tokens": [1, 2]}') and str(d), '"targets" a list of the same length'),
    (lambda d: (d / "a.jsonl").write_text('{"text": "<image>", "images": ["no.png"]}') and str(d), "1: no image file '"),
    (lambda d: (d / "a.jsonl").write_text('{"text": "x", "images": ["no.png"]}') and str(d), "0 <image> placeholders in"),
    (lambda d: (d / "a.jsonl").write_text('{"text": "x", "images": "no.png"}') and str(d), '"images" must be a list'),
    (lambda d: (d / "a.jsonl").write_text('{"text": "x", "images": [1]}') and str(d), '"images" must be a list'),
    (lambda d: (d / "a.jsonl").write_text('{"text": "x"') and str(d), "a.jsonl:1 is not JSON"),
    (lambda d: (d / "a.jsonl").write_bytes(b'{"text": "\xff"}') and str(d), "a.jsonl:1 is not JSON"),
])
def test_mistakes_are_one_line(tmp_path, make, message):
    with pytest.raises(ConfigError, match=message) as error:
        sources.documents(make(tmp_path), "train")
    assert "\n" not in str(error.value)


def test_other_keys_beside_a_text_are_ignored(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "tokens": 123}\n{"text": "two", "prompt": "who?"}\n' * 9)
    assert {raw for part in PARTS for _, raw in sources.documents(str(tmp_path), part)} <= {b"one", b"two", b"on", b"e"}
