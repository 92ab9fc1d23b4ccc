"""The command line: each command on a small run, and mistakes, which give one line and exit code 2."""
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import mmx
from mmx import cli
from mmx.checkpoints import convert
from mmx.config import ConfigError
from mmx.data import tokens
from mmx.launch import experiments
from mmx.training import metrics

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "experiments" / "tiny.py")
ORACLE = str(ROOT / "tests" / "oracles" / "c_partial_orig" / "ckpt")
EXPERIMENT = """\
from mmx.config import default

def get_config(steps="4"):
    config = default()
    config.model.dim, config.model.layers, config.model.pattern = 16, 2, "LS"
    config.model.heads, config.model.kv_heads, config.model.head_dim, config.model.rotary_dim = 2, 1, 8, 4
    config.model.experts, config.model.expert_dim = 4, 16
    config.train.steps, config.train.batch, config.train.length = int(steps), 2, 32
    config.mesh.edp = 1
    return config
"""


@pytest.fixture
def mmx_fails(capsys):
    """A function that runs a command, checks that it fails as a user's mistake does, and returns the one line of stderr."""
    def run(*arguments):
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        assert code == 2 and out == ""
        assert err.startswith("mmx: ") and err.count("\n") == 1, err
        return err
    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with an experiment, text and a run of four steps."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.py").write_text(EXPERIMENT)
    (folder / "text").mkdir()
    for name in "abc":
        (folder / "text" / f"{name}.txt").write_text(f"The state of the Union is {name}. " * 100)
    assert cli.main(train(folder)) == 0
    return folder


def train(folder, *more, workdir="run", sources=()):
    return ["train", "--config", str(folder / "small.py"), "--config.data.sources", repr(sources or (str(folder / "text"),)),
            "--workdir", str(folder / workdir), *more]


def test_help_is_printed_without_arguments(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("train", "generate", "eval", "convert", "config", "examples:", "experiments/tiny.py"))


@pytest.mark.parametrize("command", ["", "train", "generate", "eval", "convert", "convert from-hf", "convert to-hf",
                                     "convert verify", "config", "memory", "fit", "sweep", "aot", "examples", "bench", "data",
                                     "data prepare", "data show", "data tokenizer", "bench kernels"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and out.startswith("usage: mmx") and len(out.splitlines()) > 5
    assert max(map(len, out.splitlines())) <= 110


def test_config_as_table_and_as_json(capsys):
    assert cli.main(["config", str(ROOT / "experiments" / "text_01.py")]) == 0
    table = capsys.readouterr().out
    assert all(text in table for text in ("456.0897 B", "45.9449 B", "48.4033 B", "8,243", "10 x LLLLLLLS", "134,217,728"))
    assert cli.main(["config", str(ROOT / "experiments" / "text_01.py"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["params_total"], found["params_active"]) == (456_089_655_296, 45_944_920_064)
    assert (found["params_active_all"], found["checkpoint_tensors"]) == (48_403_306_496, 8_243)
    assert found["flops_per_token"] == 3 * found["flops_per_token_forward"] > 6 * found["params_active"]
    assert found["tokens_per_step"][-1] == [4_700_000_000_000, 2**27]


def test_overrides_in_both_forms(place):
    file = str(place / "small.py")
    for overrides in (["--config.model.layers=6", "--config.train.lr=1", "--config.model.pattern=LLS"],
                      ["--config.model.layers", "6", "--config.train.lr", "1", "--config.model.pattern", "LLS"]):
        found = experiments.read(file, overrides)
        assert (found.model.layers, found.model.pattern, found.train.lr) == (6, "LLS", 1.0)
        assert found.model.alpha_moe == 12**0.25
    assert experiments.read(file, ["--config.data.sources=('a','b')"]).data.sources == ("a", "b")
    assert experiments.read(file + ":9", []).train.steps == 9
    assert experiments.read(file + ":9", ["--config.train.steps=7"]).train.steps == 7
    assert experiments.read(file, ["--config.model.remat"]).model.remat is True
    for form in ("--", "-"):
        with pytest.raises(ConfigError, match="data.seed=-1 must be"):
            experiments.read(file, [f"{form}config.data.seed", "-1", "--config.model.remat"])


def test_overrides_can_be_anywhere_on_the_command_line(place, capsys):
    file = str(place / "small.py")
    assert cli.main(["config", "--config.train.batch", "3", "--config.model.remat", file, "--config.train.lr", "--json"]) == 2
    assert "config.train.lr" in capsys.readouterr().err
    assert cli.main(["config", "--config.train.batch", "3", "--config.model.remat", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_step"] == [[0, 96]]


def test_a_finished_run_is_not_trained_again(place, capsys):
    assert cli.main(train(place)) == 0
    assert "trained 4 steps" in capsys.readouterr().out
    assert [r["step"] for r in metrics.read(place / "run")] == [1, 2, 3, 4]


def test_generate(place, capsys):
    def run(*more):
        assert cli.main(["generate", "--checkpoint", str(place / "run"), "--prompt", "The state", "--prompt", "Of",
                         "--steps", "8", *more]) == 0
        return capsys.readouterr().out
    text = run()
    assert text.startswith("The state") and "\nOf" in text
    assert run() == text and run("--seed", "1") != text
    loaded = mmx.load(place / "run")
    want = mmx.generate(loaded, ["The state", "Of"], steps=8)
    assert run("--temperature", "0") == run("--temperature", "0", "--mesh", "ep=2") == f"The state{want[0]}\nOf{want[1]}\n"


def test_eval(place, tmp_path, capsys):
    assert cli.main(["eval", "--checkpoint", str(place / "run"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert 4 < found["bits_per_byte"] < 9 and 0 < found["xz"] < found["bits_per_byte"] and 0 < found["gzip"]
    assert found["steps"] == 4 and found["train_seconds"] > 0
    assert (tmp_path / "out" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert all(f"{found[name]:.4f}" in out for name in ("bits_per_byte", "gzip", "xz"))
    figures = {"float32": found["bits_per_byte"]}
    for flags in (["--mesh", "edp=2,ep=2"], ["--weights-dtype", "int8"]):
        assert cli.main(["eval", "--checkpoint", str(place / "run"), "--out", str(tmp_path / flags[0]), *flags]) == 0
        figures[flags[0]] = json.loads((tmp_path / flags[0] / "eval.json").read_text())["bits_per_byte"]
    assert figures["--mesh"] == pytest.approx(figures["float32"], abs=1e-5)
    assert 0 < abs(figures["--weights-dtype"] - figures["float32"]) < 0.01


def test_eval_runs_a_suite_and_resumes_it(place, tmp_path, capsys, monkeypatch):
    command = ["eval", "--checkpoint", str(place / "run"), "--out", str(tmp_path / "out"), "--suite", "needle",
               "--lengths", "256,250", "--rows", "0,100", "--examples", "1"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert found["examples"] == 4 and found["score"] == 0 and list(found["scores"]) == ["0", "100"] and found["step"] == 4
    assert "Needle in a haystack, accuracy (%), 4 examples" in out and "needle.png" in out
    assert (tmp_path / "out" / "needle.png").read_bytes()[:4] == b"\x89PNG"
    lines = (tmp_path / "out" / "needle.jsonl").read_text()
    assert len(lines.splitlines()) == 5 and all(0 < json.loads(line)["tokens"] <= 256 for line in lines.splitlines()[1:])
    monkeypatch.setattr("mmx.inference.engine.generate", None)         # finished examples are not generated again
    assert cli.main(command) == 0
    assert (tmp_path / "out" / "needle.jsonl").read_text() == lines


def test_written_examples_can_be_trained_on(place, tmp_path, mmx_fails, capsys):
    """Training reads examples of both forms, text and token ids, together with plain text."""
    for suite, rows in (("needle", "0,again"), ("mqar", "4")):
        assert cli.main(["examples", "--suite", suite, "--rows", rows, "--lengths", "256", "--examples", "30",
                         "--out", str(tmp_path / "new" / f"{suite}.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {tmp_path / 'new' / 'mqar.jsonl'}, 30 examples"
    sources = (str(tmp_path / "new"), str(place / "text"))
    assert cli.main(train(place, workdir=str(tmp_path / "run"), sources=sources)) == 0
    assert [r["step"] for r in metrics.read(tmp_path / "run")] == [1, 2, 3, 4] and "trained" in capsys.readouterr().out
    for more, message in ((["--suite", "needel"], "no suite 'needel'; did you mean needle?"),
                          (["--out", "a.txt"], "must end in .jsonl"), (["--examples", "0"], "--examples 0 is out of range"),
                          (["--rows", "1x"], "there is no row '1x'")):
        assert message in mmx_fails("examples", "--suite", "needle", "--out", tmp_path / "a.jsonl", *more)


def test_training_on_token_ids_only(place, tmp_path):
    """Held-out token ids are scored too. Without text, no bytes can be counted."""
    (tmp_path / "ids.jsonl").write_text('{"tokens": [256, 7, 9, 7], "targets": [-1, -1, -1, 9]}\n' * 40)
    command = train(place, "--config.train.steps=1", workdir=str(tmp_path / "run"), sources=(str(tmp_path / "ids.jsonl"),))
    assert cli.main([*command, "--config.train.eval_every=1"]) == 0
    [evaluation] = metrics.read_evaluations(tmp_path / "run")
    assert np.isfinite(evaluation["held_out_loss"])
    [record] = metrics.read(tmp_path / "run")
    assert record["bits_per_byte"] == pytest.approx(record["loss"] / np.log(2))


def test_perplexity_by_position_equals_that_of_the_logits(place, tmp_path):
    from mmx.evals import examples, position

    assert cli.main(["eval", "--checkpoint", str(place / "run"), "--out", str(tmp_path), "--suite", "position",
                     "--lengths", "96", "--examples", "1"]) == 0
    asked = position.example(96, "all", (0, 0), examples.SuiteOptions(tokens.tokenizer("bytes")))
    logits_TW = np.array(mmx.forward(mmx.load(place / "run"), asked.prompt[None])[0], np.float64)
    nats_T = np.log(np.exp(logits_TW).sum(1)) - logits_TW[np.arange(len(logits_TW)), asked.answers]
    found = json.loads((tmp_path / "position.json").read_text())
    assert found["scores"]["0-63"]["96"] == pytest.approx(np.exp(nats_T[:64].mean()), rel=1e-5)
    assert found["score"] == pytest.approx(np.exp(nats_T.mean()), rel=1e-5)


@pytest.mark.parametrize("more, message", [
    (["--suite", "needel"], "there is no suite 'needel'; did you mean needle?"),
    (["--suite", "needle", "--lengths", "4x"], "--lengths '4x' must be numbers of tokens"),
    (["--suite", "needle", "--lengths", "1k", "--context", "1000"], "prompts of 1,024 tokens are longer than --context 1,000"),
    (["--suite", "needle", "--lengths", "1k,100"], "length 100 is too short for needle, whose shortest prompt has"),
    (["--suite", "needle", "--examples", "0"], "--examples 0 is out of range"),
    (["--suite", "needle", "--split", "test"], "--split cannot be combined with --suite"),
    (["--lengths", "1k"], "--lengths needs --suite"),
    (["--suite", "ruler", "--rows", "qa_1"], "qa_1 needs your file squad.json: give its folder as --data DIR"),
    (["--suite", "ruler", "--data", "nowhere"], "qa_1: there is no file nowhere/squad.json"),
    (["--suite", "needle", "--data", "nowhere"], "needle generates its own text: leave --data out"),
    (["--suite", "longbench2", "--lengths", "1k"], "longbench2 has texts of fixed lengths"),
    (["--suite", "mtob", "--data", "nowhere"], "mtob: there is no file nowhere/grammar_book.txt"),
])
def test_mistakes_with_suites(more, message, place, tmp_path, monkeypatch, mmx_fails):
    monkeypatch.chdir(tmp_path)
    assert message in mmx_fails("eval", "--checkpoint", place / "run", "--out", "out", *more)
    assert not list(tmp_path.iterdir())


def test_a_suite_needs_the_vocabulary_of_the_model(place, tmp_path, mmx_fails):
    run = shutil.copytree(place / "run", tmp_path / "run")
    vocabulary = {"</s>": 0} | {f"w{n}": n for n in range(1, 300)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w1")).save(str(run / "tokenizer.json"))
    table = json.loads((run / "tokenizer.json").read_text())
    table["added_tokens"] = [{"id": 0, "content": "</s>", "special": True, "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": False}]
    (run / "tokenizer.json").write_text(json.dumps(table))
    error = mmx_fails("eval", "--checkpoint", run, "--suite", "needle", "--out", tmp_path / "out", "--lengths", "300",
                      "--rows", "0", "--examples", "1")
    assert "ids reach 299, out of range of model.vocab=264" in error
    assert "no tokenizer" in mmx_fails("eval", "--checkpoint", ORACLE, "--suite", "needle", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_there_and_back(place, capsys, mmx_fails):
    run, theirs, back = (str(place / name) for name in ("run", "theirs", "back"))
    assert cli.main(["convert", "to-hf", "--checkpoint", run, "--out", theirs]) == 0
    assert cli.main(["convert", "from-hf", "--checkpoint", theirs, "--out", back]) == 0
    capsys.readouterr()
    for against, tolerance, code in ((back, "0", 0), (theirs, "0", 0), (theirs, "nan", 1)):
        assert cli.main(["convert", "verify", "--checkpoint", run, "--against", against, "--tolerance", tolerance]) == code
        assert capsys.readouterr().out.startswith("largest logit difference: 0.00e+00 (")
    assert cli.main(["convert", "verify", "--checkpoint", run, "--against", run, "--weights-dtype", "int8"]) == 0
    assert 0 < float(capsys.readouterr().out.split()[3]) < 0.1
    assert "not empty" in mmx_fails("convert", "to-hf", "--checkpoint", run, "--out", theirs)
    assert "vocabulary" in mmx_fails("convert", "verify", "--checkpoint", run, "--against", ORACLE)


def test_public_names(place):
    from mmx.kernels.lightning import lightning_attention

    loaded = mmx.load(str(place / "run"), dtype="float32")
    assert mmx.kernels.lightning.lightning_attention is lightning_attention
    assert loaded.model.config == loaded.config and "embed_WD" in loaded.params
    tokens_BT = np.array([[1, 2, 3]])
    assert mmx.forward(loaded, tokens_BT).shape == (1, 3, loaded.config.vocab)
    assert mmx.generate(loaded, tokens_BT, steps=5).shape == (1, 5)
    if importlib.util.find_spec("torch"):
        assert callable(mmx.torch.load)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        assert mmx.lod


@pytest.mark.parametrize("arguments, message", [
    (["trian"], "invalid choice: 'trian'"),
    (["train", "--config", TINY], "the following arguments are required: --workdir"),
    (["train", "--confg", TINY, "--workdir=x"], "mmx: unknown argument '--confg'; did you mean --config?; see `mmx train --h"),
    (["train", "--config", TINY, "--workdri=x"], "mmx: unknown argument '--workdri'; did you mean --workdir?"),
    (["convert"], "from-hf|to-hf|verify"),
    (["eval", "--checkpoint", "run", "--sute", "needle"], "unknown argument '--sute'; did you mean --suite?; see `mmx eval"),
    (["config", TINY, "extra"], "unknown argument 'extra'"),
    (["config", TINY, "--config.train.stepz=3"], "unknown config key train.stepz; did you mean train.steps?"),
    (["config", TINY, "--config.trian.steps", "3"], "did you mean train.steps?"),
    (["config", TINY, "--conf.train.steps=3"], "conf.train.steps"),
    (["config", TINY, "--config.train.steps=many"], "config key train.steps needs int, got 'many'"),
    (["config", TINY, "--config.train.steps=1.5"], "config key train.steps needs int, got '1.5'"),
    (["config", TINY, "--config.train.lr", "fast"], "config key train.lr needs float, got 'fast'"),
    (["generate", "--checkpoint", ORACLE, "--prompt", "--help"], "--prompt: expected one argument; write --prompt=VALUE"),
    (["config", TINY, "--config.model.remat", "false", "--config.model.remat=maybe"], "needs bool, got 'maybe'"),
    (["config", TINY, "--config.model.remat=maybe"], "config key model.remat needs bool, got 'maybe'"),
    (["config", TINY, "--config.data.sources=('a',"], "config key data.sources needs tuple"),
    (["config", TINY, "--config.train.lr"], "config.train.lr"),
    (["config", TINY, "--config.model.pattern=LLS"], "model.layers=4 must be divisible by the 3 letters of model.pattern"),
    (["config", "tinny.py"], "no experiment file tinny.py"),
    (["config", TINY.replace("tiny", "tinny")], "did you mean " + TINY),
    (["config", TINY + ":argument"], "get_config() takes 0 positional arguments but 1 was given"),
    (["generate", "--checkpoint", "nowhere", "--prompt", "a"], "nowhere is not a directory"),
    (["generate", "--checkpoint", str(ROOT / "tests"), "--prompt", "a"], "neither a workdir"),
    (["generate", "--checkpoint", ORACLE, "--prompt", "a", "--steps", "0"], "steps=0 is out of range"),
    (["generate", "--checkpoint", ORACLE, "--prompt", "a", "--steps", "x"], "invalid int value: 'x'"),
    (["generate", "--checkpoint", ORACLE, "--prompt", "a", "--config.train.steps=1"], "unknown argument"),
    (["generate", "--checkpoint", ORACLE, "--prompt", "a", "--seed", str(2**64)], "must be from 0 to 2^32 - 1"),
    (["generate", "--checkpoint", ORACLE, "--prompt", "a", "--top-k", "3000000000"], "must be from 0 (all tokens) to 2^31 - 1"),
    (["generate", "--checkpoint", ORACLE, "--prompt", "a\udcff"], r"prompt 'a\udcff' is not text"),
    (["config", TINY, "--config.train.sample_prompt=a\udcff"], r"train.sample_prompt='a\udcff' must be UTF-8 text"),
    (["eval", "--checkpoint", ORACLE, "--split", "train"], "invalid choice: 'train'"),
    (["convert", "to-hf", "--checkpoint", "nowhere", "--out", "there"], "nowhere is not a directory"),
    (["convert", "verify", "--checkpoint", ORACLE, "--against", "nowhere"], "nowhere is not a directory"),
    (["convert", "verify", "--checkpoint", ORACLE, "--against", ORACLE, "--torch", "--weights-dtype", "int8"], "with --torch:"),
    (["generate", "--checkpoint", ORACLE, "--prompt", "a", "--mesh", "etp=2"], "model.heads=5 must be divisible by mesh.etp=2"),
    (["generate", "--checkpoint", ORACLE, "--prompt", "a", "--mesh", "tp=2"], "'tp=2' is not of the form AXIS=SIZE; axes are"),
    (["generate", "--checkpoint", ORACLE, "--prompt", "a", "--mesh", "ep=16"], "experts=8 must be divisible by mesh.ep=16"),
    (["eval", "--checkpoint", ORACLE, "--mesh", "edp=16"], "mesh.edp=16 needs 16 devices, but there are 8"),
])
def test_mistakes(arguments, message, tmp_path, monkeypatch, mmx_fails):
    monkeypatch.chdir(tmp_path)
    assert message in mmx_fails(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("body, message", [
    ("x = (", "bad.py:1: SyntaxError"),
    ("x = 3", "get_config"),
    ("def get_config():\n    return 3", "must return a ConfigDict, got int"),
    ("from mmx.config import default\ndef get_config():\n    c = default()\n    c.train.steps = 'x'", "bad.py:4: TypeError"),
    ("from mmx.config import default\ndef get_config():\n    c = default()\n    c.train.stepz = 1\n    return c",
     "unknown config key train.stepz; did you mean steps?"),
])
def test_mistakes_in_an_experiment_are_reported_with_their_line(body, message, tmp_path, mmx_fails):
    (tmp_path / "bad.py").write_text(body)
    assert message in mmx_fails("config", tmp_path / "bad.py")


@pytest.mark.parametrize("more, message", [
    (["--config.data.sources=('nowhere.txt',)"], "nowhere.txt'; a source is"),
    (["--config.data.tokenizer=nowhere.json"], "nowhere.json"),
    (["--config.model.vocab=100"], "set model.vocab=264 or more"),
    (["--config.mesh.edp=3"], "must be divisible"),
    (["--config.model.dtype=float64"], "needs JAX_ENABLE_X64=1"),
    (["--config.mesh.seq=3"], "must be divisible by mesh.seq=3"),
    (["--config.model.impl=gpu"],
     "model.impl='gpu': this computation is for cpu; use impl='xla' or None (in the config, impl=None is model.impl='')"),
])
def test_train_writes_nothing_after_a_mistake(more, message, place, mmx_fails):
    assert message in mmx_fails(*train(place, *more, workdir="never"))
    assert not (place / "never").exists()


@pytest.fixture
def words(tmp_path):
    """A tokenizer.json with one word and an end-of-text token."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "state": 1, "</s>": 2}, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


def test_train_writes_nothing_if_the_tokenizer_cannot_read_the_text(place, words, mmx_fails):
    (place / "latin").mkdir()
    (place / "latin" / "a.txt").write_bytes(b"The state of the Union. " * 20 + b"caf\xe9 " * 9)     # the end is held out
    assert "a.txt: not UTF-8 at byte" in mmx_fails(*train(
        place, f"--config.data.sources=('{place / 'latin'}',)", f"--config.data.tokenizer={words}", workdir="never"))
    assert not (place / "never").exists()


def test_a_moved_run_uses_the_tokenizer_in_its_directory(place, words, tmp_path, capsys, mmx_fails):
    run = shutil.copytree(place / "run", tmp_path / "run")
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"tokenizer": "bytes"', '"tokenizer": "elsewhere.json"'))
    words.rename(run / "tokenizer.json")
    assert convert.open_source(run).tokenizer == str(run / "tokenizer.json")
    assert cli.main(["convert", "from-hf", "--checkpoint", str(run), "--out", str(tmp_path / "tuned")]) == 0
    capsys.readouterr()
    error = mmx_fails(*train(place, workdir=tmp_path / "tuned"))
    assert f"data.tokenizer='bytes' is not the {tmp_path / 'tuned' / 'tokenizer.json'} that the run has" in error


def test_train_refuses_an_unsuitable_workdir(place, mmx_fails):
    assert "File exists" in mmx_fails(*train(place, workdir="small.py"))
    error = mmx_fails(*train(place, "--config.train.lr=0.5"))
    assert "run of another config: train.lr (there 0.003, now 0.5)" in error


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def broken(args):
        raise RuntimeError("a defect")
    monkeypatch.setattr("mmx.cli.config.run", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["config", TINY])


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt
    monkeypatch.setattr("mmx.cli.config.run", interrupted)
    assert cli.main(["config", TINY]) == 130
    assert capsys.readouterr().err == "mmx: interrupted\n"


def test_sigterm_saves_a_checkpoint_and_prints_one_line(place):
    command = [sys.executable, "-m", "mmx.cli",
               *train(place, "--config.train.steps=1000000", "--config.checkpoint.every=20", workdir="stopped")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    steps, until = place / "stopped" / "checkpoints", time.monotonic() + 100
    while not list(steps.glob("[0-9]*")) and run.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    # the CUDA plugin, a test dependency, logs that it finds no GPU before its logging can be turned off
    lines = [line for line in err.replace("\r", "\n").splitlines() if not re.search("absl::Init|cudart_stub", line)]
    assert all(line.startswith("train:") for line in lines if line.strip()), err
    step = metrics.read(place / "stopped")[-1]["step"]
    assert out == f"stopped at step {step:,} and saved a checkpoint; run the same command to resume\n"
    assert (steps / str(step)).is_dir()


def test_config_counts_compiled_flops(monkeypatch, capsys):
    found = {"flops": 6e6, "devices": 4, "tokens": 2048, "unknown": {}}
    monkeypatch.setattr("mmx.compilers.aot.run", lambda e, topology: found)
    assert cli.main(["config", "experiments/tiny.py", "--compiled", "v5p:2x2x1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["flops_per_token_compiled"] == 6e6 * 4 / 2048
    found["unknown"] = {"pallas_call": 2}
    assert cli.main(["config", "experiments/tiny.py", "--compiled", "h100:1x1"]) == 2
    assert "the FLOPs of pallas_call are not known on h100:1x1" in capsys.readouterr().err
    del found["flops"]
    found["peak"] = 3e11
    assert cli.main(["config", "experiments/text_01.py", "--compiled", "v5p:2x2x1"]) == 2
    assert "needs 300 GB a chip" in capsys.readouterr().err
