"""lm-eval's command with an mmx model, compared with log-probabilities computed from the logits of one text at a time."""
import json
import re
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

Instance = pytest.importorskip("lm_eval.api.instance").Instance
from lm_eval import utils
from lm_eval._cli import utils as cli_utils

import mmx
from mmx import config
from mmx.checkpoints import convert, manager, run_config
from mmx.config import ConfigError
from mmx.evals import harness
from mmx.inference.sampling import Sampling
from mmx.model import Model, logits

MODEL = Model(config.Model(dim=16, layers=2, pattern="LS", heads=2, kv_heads=1, head_dim=8, rotary_dim=4, experts=4,
                           expert_dim=16, init="fan_in", embed_std=1.0))
TASKS, PAIRS_OF_BLIMP = Path(harness.__file__).parent / "tasks", Path(__file__).parent / "blimp"
TEXTS = [("The state of the Union", " is strong."), ("", " Fellow citizens"), ("We", "!"),
         ("A longer context, of more than thirty-two bytes, ", "and more"), ("The state of the Union", " is weak, I fear.")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with untrained parameters."""
    workdir = tmp_path_factory.mktemp("harness") / "run"
    params = jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    run_config.check_config(workdir, config.Experiment(MODEL.config))
    checkpoints = manager.Checkpoints(workdir, every=1, keep=1)
    checkpoints.save(1, params, {"count": np.zeros(1)}, {})
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def loaded(run):
    return mmx.load(run)


@pytest.fixture(scope="module")
def lm(run):
    return harness.Mmx(path=str(run), batch_size="auto", max_batch_size=4)


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Lowers LOGITS, so that every row is scored in several chunks."""
    monkeypatch.setattr(harness, "LOGITS", 16)


@jax.jit
def logp_TW(params, ids_T):
    return jax.nn.log_softmax(logits(params, MODEL.apply({"params": params}, ids_T[None])[0])[0])


def direct(loaded, ids, first):
    """The summed log-probability of ids[first:], and whether each of them is the likeliest. Causal: padding has no effect."""
    ids = np.asarray(ids)
    logps = np.array(logp_TW(loaded.params, np.pad(ids, (0, 128 - len(ids)))))[first - 1:len(ids) - 1]
    return logps[np.arange(len(logps)), ids[first:]].sum(), bool((logps.argmax(1) == ids[first:]).all())


def instances(kind, arguments):
    return [Instance(kind, {}, args if isinstance(args, tuple) else (args,), i) for i, args in enumerate(arguments)]


def test_the_command_gives_the_direct_accuracy_of_every_example(run, loaded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [
        "lm_eval", "--model", "mmx", "--model_args", f"path={run}", "--tasks", "blimp_local", "--include_path", str(TASKS),
        "--metadata", f"data={PAIRS_OF_BLIMP}", "--batch_size", "4", "--output_path", str(tmp_path), "--log_samples"])
    assert harness.main() == 0
    samples, = tmp_path.rglob("samples_blimp_local*.jsonl")
    samples = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    right = []
    for sample in samples:
        wanted = [direct(loaded, [256, *f" {sample['doc'][name]}".encode()], 1)[0] for name in (
            "sentence_good", "sentence_bad")]
        assert [float(answer[0]) for answer, in sample["resps"]] == pytest.approx(wanted, rel=1e-5)
        right.append(wanted[0] > wanted[1])
        assert sample["acc"] == right[-1]
    assert len(samples) == 12 and 0 < sum(right) < 12
    printed, = re.findall(r"blimp_local\s*\|.*\|acc\s*\|[^|]*\|\s*([\d.]+)\|", capsys.readouterr().out)
    assert float(printed) == pytest.approx(np.mean(right), abs=5e-5)


@pytest.mark.parametrize("batch_size", [1, "auto"])
def test_log_probabilities_equal_those_of_the_logits_in_request_order(run, loaded, batch_size):
    lm = harness.Mmx(path=run, batch_size=batch_size, max_batch_size=4)
    found = lm.loglikelihood(instances("loglikelihood", TEXTS), disable_tqdm=True)
    for (context, continuation), (logp, greedy) in zip(TEXTS, found):
        wanted = direct(loaded, [256, *(context + continuation).encode()], 1 + len(context.rstrip()))   # lm-eval moves spaces
        assert (logp, greedy) == (pytest.approx(wanted[0], rel=1e-5), wanted[1])


def test_greedy_continuations_are_marked_greedy(lm, loaded):
    ids_BT = np.array([[256, *b"The state"]])
    likeliest = mmx.generate(loaded, ids_BT, steps=3)[0].tolist()
    requests = [(("", ""), ids_BT[0].tolist(), likeliest[:2] + [last]) for last in (likeliest[2], (likeliest[2] + 1) % 256)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(requests, disable_tqdm=True)] == [True, False]


def test_shapes_are_few(lm, monkeypatch):
    shapes = []

    def score(model, params, batch):
        shapes.append(batch["tokens"].shape)
        return np.zeros(len(batch["tokens"])), np.ones(len(batch["tokens"]), bool)
    monkeypatch.setattr(harness, "_score", score)
    lm.loglikelihood(instances("loglikelihood", [("", "x" * n) for n in range(1, 130)]), disable_tqdm=True)
    assert set(shapes) == {(1, 256), (4, 128), (4, 64), (4, 32)} and len(shapes) == 1 + 16 + 8 + 8


def test_long_contexts_lose_their_beginning(run, loaded):
    short = harness.Mmx(path=run, max_length=16)
    (logp, _), = short.loglikelihood(instances("loglikelihood", [("The state of the Union", " is strong.")]), disable_tqdm=True)
    assert logp == pytest.approx(direct(loaded, list(b"The state of the Union is strong."[-17:]), 17 - 11)[0], rel=1e-5)
    with pytest.raises(ConfigError, match="a continuation of 22 tokens does not fit max_length=16"):
        short.loglikelihood(instances("loglikelihood", [("", "The state of the Union")]), disable_tqdm=True)


def test_whole_texts_are_scored_in_windows(run, loaded):
    texts = ["The state of the Union is strong.", "", "Fellow"]
    found = harness.Mmx(path=run).loglikelihood_rolling(instances("rolling", texts), disable_tqdm=True)
    wanted = [direct(loaded, [256, *text.encode()], 1)[0] if text else 0 for text in texts]
    assert found == pytest.approx(wanted, rel=1e-5)
    found = harness.Mmx(path=run, max_length=16).loglikelihood_rolling(instances("rolling", texts), disable_tqdm=True)
    ids = [256, *texts[0].encode()]         # 33 bytes: the last window is full and scores one token
    windows = [(ids[:17], 1), (ids[16:33], 1), (ids[17:34], 16)]
    assert found == pytest.approx([sum(direct(loaded, *window)[0] for window in windows), 0, wanted[2]], rel=1e-5)


def test_generation_ends_at_a_stop_string(lm, loaded):
    alone = mmx.generate(loaded, ["We the people", "Fellow"], steps=12)
    stop = alone[0][4:6]
    arguments = [("Fellow", {"until": [stop], "max_gen_toks": 12}), ("We the people", {"until": [], "max_gen_toks": 12}),
                 ("We the people", {"until": [stop], "max_gen_toks": 12, "do_sample": False, "num_beams": 1}),
                 ("Fellow", {"until": [], "max_gen_toks": 5})]
    found = lm.generate_until(instances("generate_until", arguments), disable_tqdm=True)
    assert found == [alone[1].split(stop)[0], alone[0], alone[0].split(stop)[0],
                     mmx.generate(loaded, "Fellow", steps=5)[0]] and len(set(found)) == 4


def test_sampling_uses_the_arguments_of_the_task():
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5, "until": "\n"}
    assert harness._settings(sampling) == {"steps": 5, "sampling": Sampling(temperature=0.7, top_p=0.9, stop=("\n",))}
    assert harness._settings({"temperature": 0.0, "top_p": 0.9}) == {"steps": 256, "sampling": Sampling(temperature=0.0)}
    with pytest.raises(ConfigError, match="{'num_beams': 4} are not supported; supported are do_sample"):
        harness._settings({"num_beams": 4})


@pytest.fixture(scope="module")
def converted(run, tmp_path_factory):
    """The same parameters in Hugging Face form, with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("hf") / "hf"
    convert.to_hf(run, folder, progress=False)
    words = ["[UNK]", "</s>", "The", "state", "of", "Union", "is", "strong", "."]
    _write(folder, {word: i for i, word in enumerate(words)})
    return folder


def _write(folder, words):
    (folder / "tokenizer_config.json").unlink(missing_ok=True)       # of the byte tokenizer
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["</s>"])
    model.save(str(folder / "tokenizer.json"))


def test_a_tokenizer_of_words_works_like_bytes(converted, loaded):
    (logp, _), = harness.Mmx(path=converted).loglikelihood(
        instances("loglikelihood", [("The state of the Union", " is strong.")]), disable_tqdm=True)
    assert logp == pytest.approx(direct(loaded, [1, 2, 3, 4, 0, 5, 6, 7, 8], 6)[0], rel=1e-5)


def test_checkpoints_without_a_usable_tokenizer(converted):
    _write(converted, {"[UNK]": 0, "</s>": 1, "far": 999})
    with pytest.raises(ConfigError, match="ids reach 999, out of range of model.vocab=264"):
        harness.Mmx(path=converted)
    (converted / "tokenizer.json").unlink()
    (converted / "generation_config.json").write_text("{}")
    text = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps({k: v for k, v in text.items() if not k.endswith("token_id")}))
    with pytest.raises(ConfigError, match="has no tokenizer: put its tokenizer.json next to"):
        harness.Mmx(path=converted)


@pytest.mark.case(25)
@pytest.mark.parametrize("argument, want", [
    ("path=007", {"path": "007"}), ("path=1e3,dtype=float32", {"path": "1e3", "dtype": "float32"}),
    ("max_length=8,path=None", {"path": "None", "max_length": 8}), ("path='a b'", {"path": "a b"}),
    ("path=runs/true", {"path": "runs/true"})])
def test_a_path_that_looks_like_a_number_stays_text(argument, want):
    """As lm-eval itself parses both of its forms: text for simple_evaluate, and arguments of its command."""
    assert utils.simple_parse_args_string(harness.quote_path(argument)) == want
    assert cli_utils.key_val_to_dict(harness.quote_path(argument)) == want


@pytest.mark.case(25)
def test_chat_templates_are_refused(lm):
    with pytest.raises(ConfigError, match="^--apply_chat_template: mmx applies no chat templates, so leave it out"):
        lm.chat_template(True)
    assert isinstance(lm.tokenizer_name, str)


@pytest.mark.parametrize("arguments, message", [
    ({}, "has no path: known are path"), ({"path": "RUN", "pth": 3}, "pth: known are path"),
    ({"path": "/nowhere"}, "/nowhere is not a directory"), ({"path": "RUN", "dtype": "float8"}, "dtype 'float8' is none of"),
    ({"path": "RUN", "max_length": -1.0}, "max_length=-1.0 must be a positive integer"),
    ({"path": 7}, "path is the int 7: give a text, path='7'"), ({"path": "RUN", "dtype": 16}, "dtype '16' is none of"),
    ({"path": "RUN", "batch_size": "many"}, "--batch_size=many must be a positive integer")])
def test_mistakes(run, arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        harness.Mmx(**{name: run if value == "RUN" else value for name, value in arguments.items()})


def test_a_mistake_is_one_line_of_the_command(monkeypatch, capsys):
    def mistaken():
        raise ConfigError("so\nit is")
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", mistaken)
    assert harness.main() == 2 and capsys.readouterr() == ("", "mmx: so it is\n")


def test_local_data(tmp_path):
    local = runpy.run_path(str(TASKS / "local.py"))
    with pytest.raises(ConfigError, match="data=/nowhere paradigm=.*: no such file; data must be the folder of BLiMP's"):
        local["blimp"]("/nowhere", num_fewshot=0)
    assert len(local["blimp"](PAIRS_OF_BLIMP, "wh_island")["test"]) == 6
    with pytest.raises(ConfigError, match="data=None: data must be a file of WikiText"):
        local["wikitext"]()
    (tmp_path / "test.txt").write_text(" \n = A = \n \n a = b \n = = Part = = \n\n = B = \n b \n")
    assert local["wikitext"](tmp_path / "test.txt")["test"]["page"] == [
        " = A = \n \n a = b \n = = Part = = \n\n", " = B = \n b \n"]
    (tmp_path / "test.txt").write_bytes(b" = A = \n caf\xe9 \n")
    with pytest.raises(ConfigError, match="test.txt: not UTF-8 at byte 12"):
        local["wikitext"](tmp_path / "test.txt")


def test_without_lm_eval_the_command_names_the_package(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("mmx.evals.harness", run_name="__main__")
    assert exit.value.code == 2 and "pip install 'mmx[eval]'" in capsys.readouterr().err
