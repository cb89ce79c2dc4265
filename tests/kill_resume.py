"""
Kill -9 at random moments, then resume: the run must end as if nothing had happened, bit for bit.

    python tests/kill_resume.py --kills 20        # some minutes on two cores; exit status 0 if all is equal
    python tests/kill_resume.py --stage sft --kills 8 --steps 60           # or rl

A checkpoint is written every second step, so that many kills hit one being written. The killed run's losses and final
weights are compared with those of a run that was left alone.
"""
import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tasks
from test_stages import RL, SFT, SMALL
from test_train import ROOT, TINY, losses, parallel, weights


def launch(folder, argv):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *argv], cwd=folder, stdout=subprocess.PIPE, text=True,
                            stderr=open(folder / "errors.log", "a"), env=os.environ | dict(OMP_NUM_THREADS="1"))


def kill_at(process, seconds, from_start):
    """Kill this long after the start, or after the first step. True if it was still running."""
    if not from_start:
        next((line for line in process.stdout if line.startswith("step ")), None)
    time.sleep(seconds)
    was_running = process.poll() is None
    process.kill()
    process.communicate()
    return was_running


def run_of(stage, folder, rng):
    """train.py's words for a run of a stage. A later one starts from a short pre-training, which is made first."""
    words = (ROOT / "train.py").read_text().split()
    for number in range(8):
        (folder / f"text{number}.txt").write_text(" ".join(rng.choices(words, k=2000)))
    text = ["--data", *[f"text{number}.txt" for number in range(8)]]
    if stage == "pretrain":
        return [*text, *TINY]
    base = launch(folder, [*text, "--out", "runs/base", "--steps", "2", *SMALL])
    base.communicate()
    assert base.returncode == 0, (folder / "errors.log").read_text()[-2000:]
    tasks.make(folder / "tasks", (200, 100, 4), seed=0)
    given = ["--data", "tasks/sft.jsonl", *SFT] if stage == "sft" else ["--tasks", "tasks/rl.jsonl", *RL]
    return [stage, "--init", "runs/base", *map(str, given)]


def main(kills, steps, seed, stage):
    rng, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="kill_resume_"))
    options = [*run_of(stage, folder, rng), "--steps", str(steps), "--save-every", "2"]
    whole = launch(folder, [*options, "--out", "runs/whole"])
    times = [float(line.split(" ms")[0].split()[-1]) / 1e3 for line in whole.stdout if line.startswith("step ")]
    assert whole.wait() == 0, (folder / "errors.log").read_text()[-2000:]
    print(f"undisturbed: {sum(times):.1f} s in {steps} steps", flush=True)

    killed, unfinished = 0, 0
    while True:
        begun = parallel.steps_in(folder / "runs/killed/ckpt")
        process = launch(folder, [stage, "--resume", "runs/killed"] if begun else [*options, "--out", "runs/killed"])
        if killed == kills:
            process.communicate()
            break
        if not kill_at(process, rng.uniform(0, 1.5 * sum(times) / (kills + 1)), rng.random() < 0.25):
            break
        killed += 1
        unfinished += any(folder.glob("runs/killed/ckpt/*.tmp"))
        print(f"kill {killed}: checkpoints {parallel.steps_in(folder / 'runs/killed/ckpt')}", flush=True)
    assert process.returncode == 0, (folder / "errors.log").read_text()[-2000:]

    last = f"ckpt/step_{steps}"
    same_losses = losses(folder / "runs/whole") == losses(folder / "runs/killed")
    same_weights = weights(folder / f"runs/whole/{last}", folder) == weights(folder / f"runs/killed/{last}", folder)
    print(f"{killed} kills, {unfinished} of them while a checkpoint was written; losses equal: {same_losses}, "
          f"weights and moments equal: {same_weights}")
    return 0 if same_losses and same_weights else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--stage", choices=("pretrain", "sft", "rl"), default="pretrain")
    arguments = parser.parse_args()
    sys.exit(main(arguments.kills, arguments.steps, arguments.seed, arguments.stage))
