"""Scripts that are run by hand still run: each with its tiny setting, as a user starts it."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command):
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_smoke():
    assert "all within their limits" in run("tests/smoke.py", "--device", "cpu", "--tiny")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bench_step(dtype):
    """A row for each contender; with transformers installed, the first losses were compared too."""
    out = run("tests/bench_step.py", "--tiny", "--dtype", dtype)
    assert "ours-sandwich" in out
    assert "commit" in out.splitlines()[-1]


@pytest.mark.slow
def test_bench_decode():
    """A row for each context; all contenders wrote the same tokens."""
    out = run("tests/bench_decode.py", "--tiny")
    assert "absorbed" in out and "batch 2" in out
    assert "commit" in out.splitlines()[-1]


@pytest.mark.slow
def test_bench_memory():
    """A row for each item, and sets; none of them changes the loss."""
    out = run("tests/bench_memory.py", "--tiny")
    assert "paper's set + norm" in out and "layer" in out


@pytest.mark.slow
def test_bench_search():
    assert "100 plans played" in run("tests/bench_search.py", "--plans", "100", "--only-plans")


@pytest.mark.slow
def test_bench_scale(tmp_path):
    assert "in the number of tokens" in run("tests/bench_scale.py", "--tiny", "--out", str(tmp_path / "scale.svg"))
    assert (tmp_path / "scale.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_gpu_check(tmp_path):
    """On a CPU, where it counts no waits: a line for each contender, and the steps of train.py."""
    out = run("tests/gpu_check.py", "--tiny", "--seconds", "900", "--out", str(tmp_path / "check.jsonl"))
    assert "smoke: all within their limits" in out and "ours-operators" in out and "tokens/s" in out.split("train:")[1]
    assert "left out" not in (tmp_path / "check.jsonl").read_text()
