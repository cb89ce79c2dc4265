"""
Short runs of train.py beside what sim.py predicts of them on a calibrated device.

    python tests/bench_calibrate.py                                # calibrates, then three presets: about 16 minutes
    python tests/bench_calibrate.py --hardware HW.json --presets tiny

Measured, in --rounds: the median of all steps after the first --warm-up ones of each run, and the most memory that a
process held which found its text tokenised. The calibration measures other models than these. A shared machine's memory
is slower in some minutes than in others (the same step by 30 %), so a single run says little.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sim  # noqa: E402
from model import PRESETS  # noqa: E402


def run(*command):
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train(preset, steps, out):
    """(plan, milliseconds of each step, GiB held) of a run."""
    run("train.py", "--preset", preset, "--steps", str(steps), "--compile", "none", "--out", str(out))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    stored = json.loads((out / "config.json").read_text())
    plan = sim.Plan(**{**stored["plan"], "precision": stored["settings"]["precision"]})
    return plan, [line["step_ms"] for line in lines], lines[-1]["mem_gib"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--hardware", help="JSON file of calibrate.py; default: made now")
    parser.add_argument("--presets", nargs="+", default=["tiny", "cpu-small", "cpu-fine"], choices=PRESETS)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each preset")
    parser.add_argument("--steps", type=int, default=20, help="of each run")
    parser.add_argument("--warm-up", type=int, default=5, help="steps of a run that do not count")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = args.hardware or f"{folder}/hw.json"
        if not args.hardware:
            run("tests/calibrate.py", "--out", file)
        hardware = sim.read_preset("hardware", sim.Hardware, sim.HARDWARE, file)
        times, held = {preset: [] for preset in args.presets}, dict.fromkeys(args.presets, 0.0)
        plans = {preset: train(preset, 1, Path(folder) / preset)[0] for preset in args.presets}       # tokenises
        for number, preset in product(range(args.rounds), args.presets):
            _, steps, gib = train(preset, args.steps, Path(folder) / f"{preset}_{number}")
            times[preset] += steps[args.warm_up:]
            held[preset] = max(held[preset], gib)
    print(f"{'':12}{'step, ms':>10}{'simulated':>11}{'error':>8}{'GiB held':>10}{'simulated':>11}{'error':>8}")
    for preset, plan in plans.items():
        found, step = sim.predict(PRESETS[preset], plan, hardware), statistics.median(times[preset])
        first, _, third = statistics.quantiles(times[preset], n=4)
        expected, needed = found["step_time_s"] * 1e3, found["mem_gib"]
        print(f"{preset:12}{step:10.0f}{expected:11.0f}{expected / step - 1:+8.1%}{held[preset]:10.2f}{needed:11.2f}"
              f"{needed / held[preset] - 1:+8.1%}   {plan.precision}, {plan.n_micro} x {plan.micro_batch} x "
              f"{plan.seq_len}; half of the steps took {first:.0f} to {third:.0f}")


if __name__ == "__main__":
    main()
