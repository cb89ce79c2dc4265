"""tests/calibrate.py: what it writes is a Hardware, what it fits are the constants behind its times."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import calibrate
import sim
from model import PRESETS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_calibration_is_a_hardware(tmp_path, capsys, monkeypatch):
    """What is measured is positive and read back; how right it is no test can say on a busy machine."""
    monkeypatch.setattr(calibrate, "FEW_VALUES", calibrate.TIMED[0])
    monkeypatch.setattr(calibrate, "MANY_VALUES", calibrate.TIMED[2])
    monkeypatch.setattr(calibrate, "TIMED", calibrate.TIMED[:2])
    monkeypatch.setattr(calibrate, "ROUNDS", 1)
    calibrate.main(["--out", str(tmp_path / "hw.json"), "--precision", "fp32", "--seconds", "0.01"])
    assert "step: 128 x 2, 8 experts" in capsys.readouterr().out
    hardware = sim.read_preset("hardware", sim.Hardware, sim.HARDWARE, str(tmp_path / "hw.json"))
    assert min(hardware.peak["fp32"], hardware.bandwidth, hardware.static_matmul, hardware.framework) > 0
    sim.main(["predict", "--model", "tiny", "--hardware", str(tmp_path / "hw.json"), "--json", "--plan",
              "precision=fp32,seq_len=128"])
    assert json.loads(capsys.readouterr().out)["step_time_s"] > 0
    with pytest.raises(ValueError, match="fp32"):          # the only precision that was measured
        sim.main(["predict", "--model", "tiny", "--hardware", str(tmp_path / "hw.json"), "--plan", "precision=bf16"])


@pytest.mark.slow
def test_links_are_measured_under_torchrun(tmp_path):
    script = tmp_path / "links.py"
    script.write_text(f"import sys, torch\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport calibrate\n"
                      f"fields = calibrate.measure_links(torch.device('cpu'))\n"
                      f"if calibrate.parallel.rank() == 0:\n    print(fields)")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    fields = eval(result.stdout)
    assert fields["inner_bandwidth"] > 1e6 and fields["static_collective"] > 0 and fields["node_size"] == 2


def test_calibration_finds_the_constants_behind_its_samples():
    """Times that a known device would take are explained to 5 %, those of steps that were not measured too."""
    known = replace(sim.CPU, name="known", peak=dict(fp32=1.5e11), bandwidth=8e9, static_matmul=2e-5,
                    static_expert=4e-5, static_vector=1e-4, matmul_half=8.0, tokens_half=20.0, grouped_efficiency=0.7,
                    attention_efficiency=0.3, attention_half=100.0, matmul_efficiency=1.0, memory_efficiency=1.0)
    plan, device = sim.Plan(precision="fp32"), torch.device("cpu")
    samples = [calibrate.training_step(small, "fp32", device) for small in calibrate.TIMED]
    samples += [build() for build in calibrate.Operators("fp32", device).builders()]
    times = [sample.simulated(plan, known) for sample in samples]
    found = calibrate.fit(samples, times, plan, replace(known, name="found", peak=dict(fp32=1e12), bandwidth=1e10))
    assert all(abs(sample.simulated(plan, found) / time - 1) < 0.05 for sample, time in zip(samples, times))
    for preset in "tiny", "cpu-fine":
        step = sim.Plan(precision="fp32", micro_batch=8, global_batch=16, seq_len=256)
        one, other = (sim.predict(PRESETS[preset], step, hardware)["step_time_s"] for hardware in (known, found))
        assert other == pytest.approx(one, rel=0.05)


def test_a_sample_of_calibrate_is_a_step_as_predicted():
    """Operators and optimizer of a step, summed, are what predict says of it."""
    config, plan = calibrate.config_and_plan(calibrate.TIMED[3], "fp32")
    sample = calibrate.training_step(calibrate.TIMED[3], "fp32", torch.device("cpu"))
    assert sample.simulated(plan, sim.CPU) == pytest.approx(sim.predict(config, plan, sim.CPU)["step_time_s"])


@pytest.mark.parametrize("arguments, words", [
    (("--out", "nowhere/hw.json"), "make its folder first"), (("--out", "hw.json", "--seconds", "0"), "more than 0")])
def test_what_a_user_mistypes_is_refused(arguments, words):
    with pytest.raises(ValueError) as refusal:
        calibrate.main(arguments)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_refusal_is_one_line_and_exit_2():
    command = [sys.executable, ROOT / "tests/calibrate.py", "--out", "nowhere/hw.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
