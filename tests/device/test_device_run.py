"""The script of `make device`: what its steps accept and refuse. The runs that they start are replaced by recorded results."""
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("device_run", Path(__file__).parent / "run.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


class Recorded(script.Device):
    """Returns recorded output instead of running commands."""

    def __init__(self, folder, platform="gpu", **outputs):
        super().__init__(folder, time.monotonic() + 60)
        self.platform, self.outputs = platform, outputs

    def run(self, command, platform=None):
        return self.outputs[platform or "any"]

    def finish(self, process):
        return ""

    def write(self, name, losses):
        (self.folder / name).mkdir()
        lines = (json.dumps({"step": n + 1, "loss": loss}) for n, loss in enumerate(losses))
        (self.folder / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def result(check):
    row = script.run_step("step", check)
    return row.passed, row.result


def test_the_device_is_named_and_a_cpu_must_be_asked_for(tmp_path, monkeypatch):
    device = Recorded(tmp_path, None, any="log\ngpu|8|NVIDIA H100\n")
    assert result(lambda: script.check_device(device)) == (True, "8 x NVIDIA H100") and device.platform == "gpu"
    device = Recorded(tmp_path, None, any="cpu|1|cpu\n")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert result(lambda: script.check_device(device)) == (
        False, "JAX finds no GPU or TPU: install mmx with the extra cuda12, cuda13 or tpu, or set JAX_PLATFORMS=cpu")


@pytest.mark.parametrize("own, passed, text", [
    ([4.0, 2.0], True, "0.0e+00 at step 1, 0.0e+00 in 2 steps"), ([4.0, 2.02], True, "1.0e-02 in 2 steps"),
    ([4.0, 2.1], False, "5.0e-02 in 2 steps; limits 1e-05 and 2e-02"), ([4.004, 2.0], False, "1.0e-03 at step 1"),
    ([4.0], False, "limits"), ([4.0, float("nan")], False, "limits")])
def test_losses(own, passed, text, tmp_path):
    device = Recorded(tmp_path)
    device.write("whole", own)
    device.write("cpu", [4.0, 2.0])
    found = result(lambda: script.check_losses(device, None))
    assert found[0] == passed and text in found[1]


@pytest.mark.parametrize("own, passed, text", [
    (range(64), True, "64 tokens, the first 64 equal the CPU's"),
    ([*range(9), *[0] * 55], True, "64 tokens, the first 9"), ([0, 0, *range(62)], False, "64 tokens, the first 1"),
    ([], False, "0")])
def test_generation(own, passed, text, tmp_path):
    device = Recorded(tmp_path, gpu=json.dumps({"ids": list(own)}), cpu=json.dumps({"ids": list(range(64))}))
    found = result(lambda: script.check_generation(device))
    assert found[0] == passed and text in found[1]


def test_a_step_ends_at_the_deadline_and_reports_its_exit_code(tmp_path):
    device = script.Device(tmp_path, time.monotonic() - 1)
    assert result(lambda: device.run(["sleep", "60"])) == (False, "not finished in time")

    def run(command):
        raise script.StepError("not finished in time\na::b PASSED [ 1%]\nc::d FAILED [ 2%]")
    device.run = run
    assert result(lambda: script.check_tests(device)) == (False, "1 passed, 1 failed ['c::d']; not finished in time")
    device = script.Device(tmp_path, time.monotonic() + 60)
    wrong = [sys.executable, "-c", "import sys; sys.exit('mmx: wrong')"]
    assert result(lambda: device.run(wrong)) == (False, "exit code 1: mmx: wrong")
