"""Cases of docs/cases.md about runs: held-out loss, paths, results that are not finite, configs of checkpoints, schedules."""
import ast
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mmx
from mmx import cli, config
from mmx.checkpoints import convert, manager, run_config
from mmx.cli import generate
from mmx.config import ConfigError, NonFiniteError
from mmx.data import paths, sources
from mmx.files import json_text, standard_input
from mmx.launch import experiments
from mmx.training import metrics, run
from mmx.training.metrics import Log

ROOT = Path(__file__).parent.parent
PROMPT, COMPLETION = 20, 8      # bytes
EXPERIMENT = """\
from mmx.config import default

def get_config():
    config = default()
    config.model.dim, config.model.layers, config.model.pattern = 16, 2, "LS"
    config.model.heads, config.model.kv_heads, config.model.head_dim, config.model.rotary_dim = 2, 1, 8, 4
    config.model.experts, config.model.expert_dim = 4, 16
    config.train.steps, config.train.batch, config.train.length, config.train.warmup = 4, 2, 64, 1
    config.train.decay, config.train.eval_every, config.train.eval_bytes = 0.5, 2, 0
    config.train.sample_every, config.train.tensorboard, config.checkpoint.every, config.mesh.edp = 0, False, 2, 1
    config.data.sources = ("d",)
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a source of prompts and completions, a run that was trained with its relative path, and an export."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "small.py").write_text(EXPERIMENT)
    (folder / "d").mkdir()
    lines = [{"prompt": f"what is {n:03} times 2?".ljust(PROMPT), "completion": f" {2 * n:07}"} for n in range(60)]
    (folder / "d" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", "--config", "small.py", "--workdir", "run"]) == 0
    convert.to_hf(folder / "run", folder / "hf", progress=False)
    return folder


@pytest.fixture
def fails(capsys):
    """A function that runs a command, checks that it ends with exit code 2 and one line on stderr, and returns the line."""
    def call(*arguments):
        capsys.readouterr()
        assert cli.main([str(a) for a in arguments]) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("mmx: ")]
        assert out == "" and len(lines) == 1 and "Traceback" not in err, err
        return lines[0]
    return call


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def direct_loss(checkpoint, source):
    """Nats and number of the targets of the validation documents' completions, from the logits of whole documents."""
    documents = [content for _, content in sources.documents(str(source), "validation")]
    ids_BT = np.array([[256, *content.prompt, *content.completion, 257] for content in documents])
    logits_BTW = np.asarray(mmx.forward(mmx.load(checkpoint), ids_BT[:, :-1]), np.float64)
    nats_BT = np.log(np.exp(logits_BTW).sum(2)) - np.take_along_axis(logits_BTW, ids_BT[:, 1:, None], 2)[..., 0]
    return nats_BT[:, PROMPT:].sum(), nats_BT[:, PROMPT:].size


@pytest.mark.case(5)
@pytest.mark.case(24)
@pytest.mark.case(31)
def test_held_out_loss_covers_completions_everywhere(place, tmp_path, monkeypatch, capsys):
    """`mmx eval` runs in another folder than the run, whose source was given as a relative path."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "--checkpoint", str(place / "run"), "--out", "out"]) == 0
    found, (nats, targets) = json.loads(Path("out/eval.json").read_text()), direct_loss(place / "run", place / "d")
    count = targets // (COMPLETION + 1)
    assert count > 0 and found["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / (count * COMPLETION), rel=1e-5)
    scored = {"step": 4, "sources": [str(place / "d")], "split": "validation", "documents": count, "tokens": targets,
              "bytes": count * COMPLETION, "checkpoint": str(place / "run" / "checkpoints" / "4"), "length": 64}
    assert {name: found[name] for name in scored} == scored
    assert f"loss {found['loss']:.4f} nats per token over {targets} tokens" in capsys.readouterr().out.replace("\n", " ")
    before, last = metrics.read_evaluations(place / "run")
    assert (before["step"], last["step"], last["tokens"]) == (2, 4, 4 * 2 * 64)
    assert last["held_out_loss"] == pytest.approx(found["loss"], rel=1e-5) != pytest.approx(before["held_out_loss"], rel=1e-5)
    assert last["held_out_bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-5)
    assert (last["held_out_documents"], last["held_out_tokens"]) == (count, targets)


def test_held_out_token_ids_are_scored(place, tmp_path, capsys):
    """The same documents as token ids have the same loss, and no bytes."""
    lines = [json.loads(line) for line in (place / "d" / "a.jsonl").read_text().splitlines()]
    ids = [[256, *f"{line['prompt']}{line['completion']}".encode(), 257] for line in lines]
    records = [{"tokens": each, "targets": [-1] * PROMPT + each[PROMPT + 1:] + [-1]} for each in ids]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert cli.main(["eval", "--checkpoint", str(place / "run"), "--source", str(tmp_path / "a.jsonl"), "--out",
                     str(tmp_path)]) == 0
    found, (nats, targets) = json.loads((tmp_path / "eval.json").read_text()), direct_loss(place / "run", place / "d")
    assert found["loss"] == pytest.approx(nats / targets, rel=1e-5) and found["tokens"] == targets
    assert (found["bits_per_byte"], found["bytes"], found["gzip"]) == (None, 0, None)


@pytest.mark.case(31)
def test_readers_of_metrics_tell_steps_from_evaluations(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "held_out_loss": 1.5, "tokens": 8}, {"step": 2, "loss": 1.0},
             {"step": 3, "loss": 0.5}, {"step": 4, "held_out_loss": None, "tokens": 16}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2, 3] and metrics.latest(tmp_path)["step"] == 3
    assert [record["step"] for record in metrics.read_evaluations(tmp_path)] == [2, 4]
    Log(tmp_path, config.Train(tensorboard=False), 2, 8).close()        # a run that resumes at step 2
    assert path.read_text() == "".join(json.dumps(line) + "\n" for line in lines[:3])


@pytest.mark.case(33)
def test_a_hugging_face_directory_is_not_scored_or_changed_unasked(place, fails, capsys):
    before = files(place / "hf")
    assert "--source" in fails("eval", "--checkpoint", place / "hf")
    assert "give --out DIR" in fails("eval", "--checkpoint", place / "hf", "--suite", "needle")
    assert cli.main(["eval", "--checkpoint", str(place / "hf"), "--source", str(place / "d")]) == 0
    out = capsys.readouterr().out
    assert "nothing was written" in out and str(place / "d") in out and files(place / "hf") == before
    assert "belongs to a Hugging Face checkpoint" in fails("train", "--config", place / "small.py", "--workdir", place / "hf",
                                                           f"--config.data.sources=({str(place / 'd')!r},)")
    assert files(place / "hf") == before


@pytest.mark.case(15)
def test_results_that_are_not_finite_are_refused(place, tmp_path, fails):
    shutil.copytree(place / "hf", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    commands = (["generate", "--prompt", "a", "--steps", "2", "--json"],
                ["eval", "--source", place / "d", "--out", tmp_path / "o"],
                ["eval", "--suite", "position", "--lengths", "64", "--examples", "1", "--out", tmp_path / "suite"],
                ["convert", "verify", "--against", place / "hf"])
    for command in commands:
        kind = 2 if command[0] == "convert" else 1
        line = fails(*command[:kind], "--checkpoint", tmp_path / "hf", *command[kind:])
        assert "not finite" in line and "norm_D" in line, line
    assert not (tmp_path / "o").exists() and not (tmp_path / "suite" / "position.json").exists()
    assert "not finite" in fails("convert", "verify", "--checkpoint", place / "hf", "--against", tmp_path / "hf")


def test_json_has_no_nan():
    assert json_text.dumps({"a": [1, 2.5, None]}) == '{"a": [1, 2.5, null]}'
    with pytest.raises(NonFiniteError, match=r"^a\.1\.b is nan"):
        json_text.dumps({"a": [1, {"b": float("nan")}]})
    with pytest.raises(NonFiniteError, match="^the result is inf"):
        json_text.dumps(float("inf"))
    with pytest.raises(ConfigError, match="must be pairs of tokens"):
        config.build({"train": {"rates": [[0, float("inf")]]}})


def test_results_are_written_by_one_function():
    """Other calls of json.dump write numbers that cannot be nan: sizes, ids, and configs that were checked."""
    allowed = {"config/build.py", "checkpoints/manager.py", "checkpoints/convert.py", "checkpoints/safetensors.py",
               "files/checksums.py", "files/lock.py", "files/json_text.py", "compilers/schedule.py", "inference/prefix.py",
               "launch/sweep/grid.py", "data/tokens.py", "checkpoints/side_files.py",
               "checkpoints/run_config.py", "checkpoints/tokenizer_files.py"}
    for path in (ROOT / "mmx").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
                 and node.attr in ("dump", "dumps") and isinstance(node.value, ast.Name) and node.value.id == "json"]
        assert not calls or path.relative_to(ROOT / "mmx").as_posix() in allowed, path


@pytest.mark.case(16)
def test_the_content_of_a_checkpoint_decides_not_its_name(place, tmp_path):
    workdir, model = tmp_path / "checkpoints" / "7", run_config.read_config(place / "run")["model"]
    shutil.copytree(place / "run", workdir)
    shutil.copytree(place / "hf", tmp_path / "models" / "checkpoints" / "7")
    (tmp_path / "models" / "checkpoints" / "7" / "checkpoints" / "100").mkdir(parents=True)
    assert manager.find_step(workdir) == (workdir, workdir / "checkpoints" / "4")
    assert manager.find_step(workdir / "checkpoints" / "2") == (workdir, workdir / "checkpoints" / "2")
    assert manager.find_step(tmp_path / "models" / "checkpoints" / "7") is None
    for path in (workdir, workdir / "checkpoints" / "2", tmp_path / "models" / "checkpoints" / "7"):
        assert convert.open_source(path).model.dim == model["dim"]
    (tmp_path / "new" / "checkpoints" / "8").mkdir(parents=True)        # a workdir before its first step
    assert manager.find_step(tmp_path / "new" / "checkpoints" / "8") is None


@pytest.mark.case(24)
def test_the_same_folder_is_the_same_config(place, tmp_path, monkeypatch, capsys):
    shutil.copytree(place / "run", tmp_path / "run")
    os.symlink(place / "d", tmp_path / "link")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["sources"] == [str(place / "d")]

    def check(source):
        given = config.build(saved | {"data": saved["data"] | {"sources": [source]}})
        run_config.check_config(tmp_path / "run", paths.absolute_experiment(given))
    monkeypatch.chdir(tmp_path)
    for source in (str(place / "d"), "link", "./link/", os.path.relpath(place / "d"), "run/../link"):
        check(source)
    (tmp_path / "d").mkdir()
    with pytest.raises(ConfigError, match=f"data.sources .there .*now .*{tmp_path}/d"):
        check("d")
    # an earlier version kept relative paths: they are read from the current folder
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved | {"data": saved["data"] | {"sources": ["link"]}}))
    check("link")
    check(str(place / "d"))
    # data that have moved, such as to another machine
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved | {"data": saved["data"] | {"sources": ["/gone/d"]}}))
    capsys.readouterr()
    check("link")
    assert "/gone/d of the saved run does not exist here" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is inside the data source"):
        paths.check_workdir(tmp_path / "link" / "run", config.Data(sources=(str(place / "d"),)))


def test_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    given = config.Experiment(train=config.Train(init_from="a/../b", init_vision=""),
                              data=config.Data(("sotu", "x/", "~/y", "words", "mqar:pairs=16"), tokenizer="t.json"))
    found, here = paths.absolute_experiment(given), str(tmp_path)
    assert (found.train.init_from, found.train.init_vision) == (f"{here}/b", "")
    assert found.data.sources == ("sotu", f"{here}/x", f"{here}/home/y", "words", "mqar:pairs=16")
    assert found.data.tokenizer == f"{here}/t.json" and paths.absolute_experiment(config.Experiment()) == config.Experiment()


@pytest.mark.case(27)
def test_a_schedule_that_jumps_is_reported(place, tmp_path, capsys, monkeypatch):
    """Four steps with decay 0.5 end at half the peak rate, 0.0015; the fifth of eight steps has the peak rate, 0.003."""
    monkeypatch.chdir(place)
    shutil.copytree(place / "run", tmp_path / "run")
    command = ["train", "--config", "small.py", "--workdir", str(tmp_path / "run"), "--config.train.eval_every=0"]
    assert cli.main([*command, "--config.train.steps=8"]) == 0
    line, = (line for line in capsys.readouterr().err.splitlines() if "train.steps was 4 and is now 8" in line)
    assert "learning rate of step 4 was 0.0015, the rate of step 5 is 0.003." in line
    assert f"--config.train.init_from={tmp_path / 'run'}" in line


@pytest.mark.parametrize("old,new,step,jump", [
    ({}, {}, 10, False), ({"steps": 40}, {}, 10, False), ({"steps": 10}, {}, 0, False), ({"steps": 20}, {}, 19, True),
    ({"steps": 30}, {}, 10, False), ({}, {"steps": 20}, 20, False),
    ({"seconds": 10.0, "steps": 40}, {"seconds": 20.0}, 7, True),
    ({"seconds": 10.0, "steps": 40}, {}, 7, True), ({}, {"schedule": "cosine", "steps": 80}, 20, True)])
def test_jumps_of_the_schedule(old, new, step, jump):
    """Runs of 40 steps whose rate decays in the second half. Ten seconds have passed."""
    base = {"steps": 40, "warmup": 0, "decay": 0.5}
    lines, e = [], config.build({"train": base | new})
    run.warn_of_new_schedule(base | new | {"steps": 40} | old, e, Path("run"),
                             SimpleNamespace(step=step, host_state={"seconds": 9.0}),
                             SimpleNamespace(message=lambda text, step: lines.append(text)))
    assert len(lines) == jump


@pytest.mark.case(32)
def test_a_checkpoint_is_an_experiment(place, capsys, fails):
    def parameters(*arguments):
        assert cli.main(["config", *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["params_total"]
    want = parameters(place / "small.py")
    for path in ("run", "run/config.json", "run/checkpoints/2", "hf", "hf/config.json"):
        assert parameters(place / path) == want
    assert parameters(place / "run", "--config.model.layers=4") == parameters(place / "small.py", "--config.model.layers=4")
    found = experiments.read_sections(json.loads((place / "run" / "config.json").read_text()), ["--config.model.layers=4"])
    assert found.model.alpha_moe == 8**0.25 and found.train.eval_every == 2
    assert "has no config.json" in fails("config", place / "d")
    assert "is JSON" in fails("sweep", "--config", place / "run" / "config.json", "--out", place / "sweep")


@pytest.mark.parametrize("text,message", [
    ('{"model": {"dimm": 1}}', "did you mean dim?"), ('{"model": {"dim": NaN}}', "model.dim needs int, got nan"),
    ('{"model": {"norm_eps": Infinity}}', "needs a finite number"), ('{"model": {"dim": 16, "dim": 16}}', "a key twice"),
    ('{"model": {"dim": 1e400}}', "model.dim needs int, got inf"), ('{"model": {"dim": 99999999999999}}', "below 2^40"),
    ("{", "cannot be read as JSON"), ("{}", "is neither the config of a run"),
    ('{"model": {}, "run": {}}', "unknown config key run"),
    ('{"model": 3}', "is neither the config of a run"), ('{"model_type": "minimax"}', "vocab_size")])
def test_configs_that_are_wrong(text, message, tmp_path, fails):
    (tmp_path / "config.json").write_text(text)
    for path in (tmp_path, tmp_path / "config.json"):
        assert message in fails("config", path)


@pytest.mark.case(32)
def test_prompts_from_the_standard_input(monkeypatch):
    def prompts(*names, raw=b"\xc3\xa9\r\nb"):
        reader, writer = os.pipe()
        os.write(writer, raw)
        os.close(writer)
        before = os.dup(0)
        os.dup2(reader, 0)
        try:
            arguments = SimpleNamespace(prompt=[], prompt_file=[name.format(reader) for name in names], load_cache=None,
                                        save_cache=None)
            return generate._read_prompts(arguments)
        finally:
            os.dup2(before, 0)
            os.close(reader)
            os.close(before)
    for name in ("-", "/dev/stdin", "/dev/fd/{}", "/proc/self/fd/0"):
        assert prompts(name) == ["é\nb"]
    assert prompts("-", raw=b"") == [""]
    with pytest.raises(ConfigError, match="standard input twice"):
        prompts("-", "/dev/stdin")
    with pytest.raises(ConfigError, match="-: not UTF-8 at byte 1"):
        prompts("-", raw=b"a\xff")
    with pytest.raises(ConfigError, match="more than 3 bytes"):
        reader, writer = os.pipe()
        os.write(writer, b"abcd")
        os.close(writer)
        standard_input.read_text(f"/dev/fd/{reader}", 3)
    os.close(reader)
    with pytest.raises(ConfigError, match="/dev/fd/999 cannot be read: Bad file descriptor"):
        standard_input.read_text("/dev/fd/999")
