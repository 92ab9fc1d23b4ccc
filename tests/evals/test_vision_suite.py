"""The vision suite: a model that reads the pixels is right, a blind one is not; its table, figure and errors."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from looking import answer, look
from PIL import Image

import mmx
from mmx import config
from mmx.checkpoints import convert
from mmx.config import ConfigError
from mmx.data import images, scenes, tokens
from mmx.evals import runner, vision
from mmx.evals.examples import SuiteOptions
from mmx.evals.runner import ModelInterface
from mmx.model import Model

BYTES = tokens.tokenizer("bytes")
V = config.Vision(layers=1, dim=8, heads=2, hidden=16, tile=84, patch=28, grids=(), token=259)
OPTIONS = SuiteOptions(BYTES, examples=12, vision=V)


class Looking:
    """Answers from the pixels, and guesses for an empty image. After `last` answers it raises KeyboardInterrupt."""

    def __init__(self, last=10**9):
        self.calls, self.last = 0, last

    def __call__(self, prompt, steps, stop, image):
        if self.calls == self.last:
            raise KeyboardInterrupt
        self.calls += 1
        question, pixels_YXZ = prompt.removeprefix(images.PLACEHOLDER), np.asarray(images.read(image))
        if question == "What is written?":
            return f" {image.text[:-1]}q" if hasattr(image, "text") else " the"
        return f" {answer(question, look(pixels_YXZ))}" if (pixels_YXZ != scenes.GROUND).any() else " left"


def run(out, model, options=OPTIONS):
    return runner.run("vision", options, ModelInterface(model, None), out, {})


def test_the_table(tmp_path):
    result = run(tmp_path, Looking())
    assert list(result["scores"]) == ["count", "colour", "shape", "side", "word"] and result["examples"] == 120
    for row, cells in result["scores"].items():
        assert list(cells) == ["picture", "blind", "chance"]
        assert cells["picture"] == 1 if row != "word" else 0.6 < cells["picture"] < 0.9      # its last letter is wrong
        assert cells["blind"] <= (0.9 if row == "side" else 0.3)
    assert [cells["chance"] for cells in result["scores"].values()][:4] == [0.25, 0.2, 0.2, 0.5]
    assert result["score"] == result["by_column"]["picture"] > result["by_column"]["blind"]
    lines = [json.loads(line) for line in (tmp_path / "vision.jsonl").read_text().splitlines()[1:]]
    with_image = {(line["row"], line["index"]): line for line in lines if line["column"] == "picture"}
    documents = {source: dict(scenes.documents(source, "test")) for source in ("scenes", "words")}
    for line in lines:
        same = with_image[line["row"], line["index"]]
        document = documents["words" if line["row"] == "word" else "scenes"][line["name"]]
        assert (line["name"], line["answers"], line["tokens"]) == (same["name"], same["answers"], same["tokens"])
        assert line["tokens"] == 1 + 9 + len(document.prompt) - len(images.PLACEHOLDER)
    with Image.open(runner.plot(result, tmp_path / "vision.png")) as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000
    assert runner.make_table(result).row_count == 6


def test_a_killed_run_resumes_and_seeds_differ(tmp_path):
    options = OPTIONS._replace(examples=3, rows=("side", "word"))
    whole = run(tmp_path / "whole", Looking(), options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Looking(5), options)
    rest = Looking()
    found = run(tmp_path / "killed", rest, options)
    assert rest.calls == 12 - 5 and found["scores"] == whole["scores"]
    names = [{task.make().meta["name"] for task in vision.plan(options._replace(seed=seed))} for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2] and all("/test/" in name for name in names[0])


def test_an_answer_must_be_equal_to_the_truth():
    asked = vision.example("colour/test/1", vision.WITH_IMAGE)
    [truth] = asked.answers
    assert truth in scenes.COLOURS
    assert [vision.score(answer, asked) for answer in (truth, f" {truth}\n", f"{truth}s", truth[:1], "")] == [1, 1, 0, 0, 0]


def test_letters_are_compared_by_position():
    answers = ("wake", "wak", "wakes", "ake", "", "wxkx")
    assert [vision.letter_accuracy(answer, "wake") for answer in answers] == [1, 0.75, 0.8, 0, 0, 0.5]
    assert 0.1 < vision.chance()["word"] < 0.25


def test_a_models_answers_are_greedy(tmp_path):
    c = config.Model(vocab=264, dim=16, layers=1, pattern="S", heads=2, kv_heads=1, head_dim=8, rotary_dim=4, experts=1,
                     top_k=1, expert_dim=8, vision=V)
    params = Model(c).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    loaded = convert.Loaded(Model(c), params, c, "bytes")
    runner.run("vision", OPTIONS._replace(examples=1, rows=("shape",)), runner.model_interface(loaded), tmp_path, {})
    for line in (tmp_path / "vision.jsonl").read_text().splitlines()[1:]:
        record = json.loads(line)
        asked = vision.example(record["name"], record["column"])
        assert record["output"] == mmx.generate(loaded, [asked.prompt], steps=vision.STEPS, images=[asked.images])[0]


@pytest.mark.parametrize("change, message", [
    ({"vision": config.Vision()}, "vision: this checkpoint reads only text"),
    ({"lengths": (512,)}, "vision has questions of fixed lengths: leave --lengths out"),
    ({"rows": ("color",)}, "there is no row 'color'; did you mean colour"),
    ({"examples": 501}, "vision has only 500 questions in row count: lower --examples 501"),
    ({"data": "x"}, "vision generates its own text: leave --data out"),
    ({"context": 20}, r"a prompt of \d\d tokens is longer than --context 20"),
])
def test_mistakes(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, Looking(), OPTIONS._replace(**change))
    with pytest.raises(ConfigError, match="vision is for evaluation only"):
        runner.write_examples("vision", tmp_path / "a.jsonl")
