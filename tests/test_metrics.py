"""metrics.jsonl, TensorBoard and the progress bar have each step once, also after a restart."""
import errno
import json
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmx.config import ConfigError, Train
from mmx.training import metrics


def record(step, **changes):
    others = dict.fromkeys(metrics.SCALARS[1:], 0.5)
    return {"step": step, "loss": 2.0 + step, **others, "tokens": 64 * step, "seconds": 1.0} | changes


def write(workdir, steps, start=0, board=True, **options):
    log = metrics.Log(workdir, Train(steps=100, **options), start, 0)
    for step in steps:
        log.step(record(step), np.array([[0.25, 0.75], [0.5, 0.5]]), np.array([0.0, 0.125]), board)
    return log


def board(workdir):
    events = EventAccumulator(str(workdir / "tensorboard"), {"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return events


def test_each_step_is_a_line(tmp_path):
    write(tmp_path, (1, 2, 3)).close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record(n) for n in (1, 2, 3)] == metrics.read(tmp_path)


def test_a_restart_removes_the_steps_that_it_repeats(tmp_path):
    write(tmp_path, (1, 2, 3, 4)).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4]
    write(tmp_path, (3, 4, 5), start=2).close()
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_lines_without_a_step_end_reading(tmp_path):
    assert metrics.read(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n{"loss": 1.0}\n')
    assert metrics.read(tmp_path) == [{"step": 7}]


def test_the_latest_record_is_read_after_long_lines(tmp_path):
    lines = [json.dumps(record(step, layer_norms=[0.1] * 5000)) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n{\"step\": 3")
    assert metrics.latest(tmp_path)["step"] == 2


def test_flush_writes_the_file(tmp_path):
    log = write(tmp_path, (1,), tensorboard=False)
    log.flush()
    assert [r["step"] for r in metrics.read(tmp_path)] == [1]
    log.close()


def test_tensorboard_has_all_scalars(tmp_path):
    log = write(tmp_path, (1, 2))
    log.evaluation({"step": 2, "tokens": 8, "held_out_loss": 1.0, "held_out_bits_per_byte": 1.5})
    log.text("sample", "Fellow citizens", 2)
    log.close()
    events = board(tmp_path)
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in metrics.SCALARS} | {
        "validation/bits_per_byte", "validation/loss", "load_max_over_mean/layer_00", "load_max_over_mean/layer_01",
        "drop_rate/layer_00", "drop_rate/layer_01"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 3.0), (2, 4.0)]
    assert [e.value for e in events.Scalars("load_max_over_mean/layer_00")] == [1.5, 1.5]
    assert [e.value for e in events.Scalars("drop_rate/layer_01")] == [0.125, 0.125]
    assert events.Tensors("sample/text_summary")[0].tensor_proto.string_val == [b"Fellow citizens"]
    assert len(events.Images("expert_load/layers_by_experts")) == 2


def test_tensorboard_drops_the_steps_that_a_restart_repeats(tmp_path):
    write(tmp_path, (1, 2, 3, 4)).close()
    first, = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.0000000001.here"))     # file names contain the time in seconds
    write(tmp_path, (3, 4), start=2).close()
    assert [e.step for e in board(tmp_path).Scalars("train/loss")] == [1, 2, 3, 4]


def test_a_full_disk_does_not_block_tensorboard(tmp_path, monkeypatch):
    """Its thread would end and a later event would wait forever. The error names the file."""
    log = write(tmp_path, ())
    inner = log.board.file_writer.event_writer._ev_writer._py_recordio_writer

    def full(data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(inner, "write", full)
    for step in range(1, 40):
        log.step(record(step), np.array([[0.25, 0.75]]), np.array([0.0]), True)
    with pytest.raises(OSError, match=r"No space left on device: '.*tfevents.*'"):
        for _ in range(100):
            log.flush()
            time.sleep(0.1)
    with pytest.raises(OSError, match="tfevents"):      # close raises it again, after it closed all files
        log.close()
    assert len(metrics.read(tmp_path)) == 39


def test_an_error_of_a_write_names_the_file(tmp_path, monkeypatch):
    log = write(tmp_path, (1,), tensorboard=False)
    log.file.close()
    log.file = open("/dev/full", "w")
    with pytest.raises(OSError, match="No space left on device: '.*metrics.jsonl'"):
        for _ in range(1000):
            log.step(record(2), None, None, False)
    with pytest.raises(OSError, match="metrics.jsonl"):
        log.close()


def test_tensorboard_is_optional_and_skips_steps(tmp_path):
    write(tmp_path, (1, 2), tensorboard=False).close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    write(tmp_path, (3,), start=2, board=False).close()
    assert board(tmp_path).Tags()["scalars"] == []


@pytest.mark.parametrize("seconds,progress", [(0.0, "1/100"), (31.0, "30 s left")])
def test_the_bar_shows_the_progress(tmp_path, capsys, seconds, progress):
    log = write(tmp_path, (1,), seconds=seconds)
    log.bar.update()
    log.bar.refresh()
    log.close()
    error = capsys.readouterr().err
    assert progress in error and "loss 3.000, 0.500 bits/byte, 0 tokens/s" in error


def test_throughput_covers_the_tokens_between_two_dispatches(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.time, "monotonic", lambda: 10.0)
    log = metrics.Log(tmp_path, Train(tensorboard=False), 0, 100)
    results = [metrics.StepResult(1, tokens, 0, 0.0, 0.0, moment, waited, {}) for tokens, moment, waited in
               ((120, 12.0, 0.5), (160, 16.0, 1.0))]
    assert [log.speed(result) for result in results] == [{"tokens_per_s": 10.0, "data_wait": 0.25}] * 2
    monkeypatch.undo()
    log.close()


def test_a_restart_keeps_a_file_of_any_size(tmp_path, monkeypatch):
    """Only lines of later steps and lines after a damaged one are removed; a line that `read` refuses stays."""
    monkeypatch.setattr(metrics, "MOST_BYTES", 10)
    lines = [*map(json.dumps, (record(1), {"step": 2, "note": "by hand"}, record(4), record(3))), '{"st', "{}"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    metrics.Log(tmp_path, Train(steps=100, tensorboard=False), 3, 0).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [lines[0], lines[1], lines[3]]
    with pytest.raises(ConfigError, match="at most 10 are allowed"):
        metrics.read(tmp_path)
