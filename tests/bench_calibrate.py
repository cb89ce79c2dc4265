"""
Short runs of train.py beside what sim.py predicts of them on a calibrated device.

    python tests/bench_calibrate.py                                # calibrates, then three presets: about 6 minutes
    python tests/bench_calibrate.py --hardware HW.json --presets tiny

Measured: the median step after the first --warm-up ones, and the most memory that the process held. The calibration
measures other models than these. Worth little where anything else runs on the machine.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sim  # noqa: E402
from model import PRESETS  # noqa: E402


def run(*command):
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def measure(out, warm_up):
    """(plan, seconds of a step, GiB) of a finished run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    stored = json.loads((out / "config.json").read_text())
    plan = sim.Plan(**{**stored["plan"], "precision": stored["settings"]["precision"]})
    return plan, statistics.median(line["step_ms"] for line in lines[warm_up:]) / 1e3, lines[-1]["mem_gib"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--hardware", help="JSON file of sim.py calibrate; default: made now")
    parser.add_argument("--presets", nargs="+", default=["tiny", "cpu-small", "cpu-fine"], choices=PRESETS)
    parser.add_argument("--steps", type=int, default=30, help="of each run")
    parser.add_argument("--warm-up", type=int, default=5, help="steps that do not count")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = args.hardware or f"{folder}/hw.json"
        if not args.hardware:
            run("sim.py", "calibrate", "--out", file)
        hardware = sim.load("hardware", sim.Hardware, sim.HARDWARE, file)
        rows = []
        for preset in args.presets:
            out = Path(folder) / preset
            run("train.py", "--preset", preset, "--steps", str(args.steps), "--out", str(out))
            plan, seconds, held = measure(out, args.warm_up)
            rows.append((preset, plan, seconds, held, sim.predict(PRESETS[preset], plan, hardware)))
    print(f"{'':12}{'step, ms':>10}{'predicted':>11}{'error':>8}{'GiB held':>10}{'predicted':>11}{'error':>8}")
    for preset, plan, seconds, held, found in rows:
        step, needed = found["step_time_s"], found["mem_gib"]
        print(f"{preset:12}{seconds * 1e3:10.0f}{step * 1e3:11.0f}{step / seconds - 1:+8.1%}{held:10.2f}{needed:11.2f}"
              f"{needed / held - 1:+8.1%}   {plan.precision}, {plan.n_micro} x {plan.micro_batch} x {plan.seq_len}")


if __name__ == "__main__":
    main()
