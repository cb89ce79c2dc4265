"""
train.py under torchrun: its processes follow one, stop together, go on under another plan, and end when one is lost.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ("vocab_size=300 balance_group=4 hidden_size=32 num_hidden_layers=2 intermediate_size=64 q_lora_rank=16 "
         "kv_lora_rank=16 moe_intermediate_size=32").split()
OPTIONS = ["--set", *SHAPE, "--seq-len", "32", "--global-batch", "8", "--warmup-steps", "3", "--lr", "1e-3",
           "--steps", "12", "--save-every", "4", "--threads", "1", "--precision", "fp32", "--compile", "none"]
PLAN = ["--ep", "4", "--node-size", "2", "--dispatch", "hierarchical"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file, and beside it `whole`: the run of one process that others are compared with."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "model.py").write_text((ROOT / "model.py").read_text()[:70000])   # of which the last 4,000 are held out
    train.main(["--data", str(folder / "model.py"), "--out", str(folder / "whole"), *OPTIONS])
    return folder / "model.py"


def start(*arguments, ranks=4, launcher=()):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *launcher]
    command = [*torchrun, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1"))


def finish(process, status=0):
    output, _ = process.communicate(timeout=200)
    assert process.returncode == status, output
    return output


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(process, run, step):
    while not (run / "metrics.jsonl").exists() or len(lines(run)) < step:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)


def process_of_rank(launcher, rank):
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(int(pid) for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())


def follows(run, whole):
    """Every step's losses and norm within 1e-5 of those of one process."""
    assert [line["step"] for line in lines(run)] == list(range(1, 13))
    for mine, its in zip(lines(run), lines(whole)):
        for name in ("loss", "mtp_loss", "aux_loss", "grad_norm"):
            assert abs(mine[name] - its[name]) < 1e-5, (mine["step"], name, mine[name], its[name])
    assert abs(lines(run)[-1]["val_bpb"] - lines(whole)[-1]["val_bpb"]) < 1e-5


@pytest.mark.slow
def test_ranks_follow_one_process_and_go_on_under_another_plan(tmp_path, text):
    """SIGTERM to one rank stops all at one step with a checkpoint; half the ep and zero=3 continue it."""
    run = tmp_path / "run"
    process = start("--data", text, "--out", run, *OPTIONS, *PLAN)
    wait_for_step(process, run, 6)
    os.kill(process_of_rank(process, 1), signal.SIGTERM)
    assert "stopped after step" in finish(process)
    assert "resumed from" in finish(start("--resume", run, "--ep", 2, "--zero", 3))
    follows(run, text.with_name("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["--pp 2 --tp 2 --sp 1 --ep 2", "--pp 2 --cp 2 --overlap adaptive --zero 1"])
def test_stages_and_parts_of_sequences_follow_one_process(tmp_path, text, plan):
    run = tmp_path / "run"
    finish(start("--data", text, "--out", run, *OPTIONS, "--micro-batch", "4", *plan.split()))
    follows(run, text.with_name("whole"))


@pytest.mark.slow
def test_killed_rank_is_named_and_torchrun_starts_again(tmp_path, text):
    run = tmp_path / "run"
    process = start("--data", text, "--out", run, *OPTIONS, *PLAN, launcher=["--max-restarts", "1"])
    wait_for_step(process, run, 7)
    os.kill(process_of_rank(process, 2), signal.SIGKILL)
    output = finish(process)
    assert "no sign of rank 2" in output and f"resumed from {run}/ckpt/step_" in output
    follows(run, text.with_name("whole"))


@pytest.mark.slow
def test_rank_that_hangs_is_named(tmp_path, text):
    """torchrun itself then takes half a minute to end a process that does not answer signals."""
    run = tmp_path / "run"
    process = start("--data", text, "--out", run, *OPTIONS, *PLAN, "--steps", 10000, "--timeout", 15)
    wait_for_step(process, run, 3)
    os.kill(process_of_rank(process, 1), signal.SIGSTOP)
    output = finish(process, status=1)
    assert "has lost contact; no sign of rank 1 (" in output, output[-6000:]


@pytest.mark.slow
def test_rank_that_hangs_while_the_first_prepares_is_named(tmp_path):
    """Rank 0 learns a vocabulary and tokenises, which may take hours; the others wait for it, but not it for them."""
    (tmp_path / "big.txt").write_text("".join(f"{number * 7919} words {number ** 3}\n" for number in range(300_000)))
    process = start("--data", tmp_path / "big.txt", "--out", tmp_path / "run", *OPTIONS, *PLAN, "--timeout", 15)
    while "learning" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(process_of_rank(process, 1), signal.SIGSTOP)
    assert "has lost contact; no sign of rank 1 (" in finish(process, status=1)


@pytest.mark.slow
def test_wrong_plan_is_refused_before_any_process_waits(tmp_path, text):
    output = finish(start("--data", text, "--out", tmp_path / "run", *OPTIONS, "--ep", 3, ranks=2), status=1)
    assert "train.py: ep=3 does not divide" in output and not (tmp_path / "run").exists()
