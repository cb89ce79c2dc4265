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


def test_smoke():
    assert "all within their limits" in run("tests/smoke.py", "--device", "cpu", "--tiny")


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_bench_step(dtype):
    """A row for each contender; with transformers installed, the first losses were compared too."""
    out = run("tests/bench_step.py", "--tiny", "--dtype", dtype)
    assert "ours-sandwich" in out
    assert "commit" in out.splitlines()[-1]


def test_bench_memory():
    """A row for each item, and sets; none of them changes the loss."""
    out = run("tests/bench_memory.py", "--tiny")
    assert "paper's set + norm" in out and "layer" in out


def test_bench_search():
    assert "100 plans played" in run("tests/bench_search.py", "--plans", "100", "--only-plans")
