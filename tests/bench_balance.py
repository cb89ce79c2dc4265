"""
Live load balance in numbers: placements by prediction on recorded loads, and the planner on random ones.

    python tests/bench_balance.py runs/a/loads.npy --devices 4 --interval 25 50       # a recording of --record-loads 1
    python tests/bench_balance.py                  # the recording of tests/data and random loads, some ten seconds

Imbalance is the busiest device's load over the mean, minus one; of recorded loads that of single steps, a mean over
steps and layers. Each placement is made from earlier steps alone, but hindsight's, which is one placement for the mean
of all the steps that it is measured on. The last lines say what to give to sim.py, to see what that imbalance costs.
"""
import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sim  # noqa: E402
from model import divisors, require  # noqa: E402

RECORDING = ROOT / "tests/data/loads.npz"
SIZES = (64, 8), (256, 32), (256, 64)              # experts, devices
KINDS = "exponential", "lognormal"


class Replay(NamedTuple):
    """Of a recording: imbalance without and with live balance, and how many experts a decision moved in a layer."""
    fixed: float
    live: float
    moved: float


def replay_loads(loads, devices, interval, threshold):
    """Recorded loads (steps, layers, E), with a decision every `interval` steps; what counts begins with the first."""
    steps, layers, n_experts = loads.shape
    first = sim.first_placement(n_experts, devices)
    placements = [first] * layers
    expected = np.zeros((layers, n_experts))
    fixed, live, moved, decisions = [], [], 0, 0
    for step, load in enumerate(loads):
        if step > 0 and step % interval == 0:
            old = placements
            placements = [sim.decide(expected[layer], old[layer], threshold) for layer in range(layers)]
            moved += sum(map(sim.moved_experts, old, placements))
            decisions += layers
        if step >= interval:
            fixed += [sim.imbalance(load[layer], first) for layer in range(layers)]
            live += [sim.imbalance(load[layer], placements[layer]) for layer in range(layers)]
        expected = sim.predict_load(expected, load)
    return Replay(float(np.mean(fixed)), float(np.mean(live)), moved / decisions)


def hindsight(loads, devices, interval):
    """Imbalance under one placement for each layer, made for the mean load of the steps that replay_loads counts."""
    counted = loads[interval:]
    first = sim.first_placement(loads.shape[2], devices)
    found = []
    for layer in range(loads.shape[1]):
        placement = sim.plan_placement(counted[:, layer].mean(0), first)
        found += [sim.imbalance(load, placement) for load in counted[:, layer]]
    return np.mean(found)


def print_recording(loads, devices, intervals, threshold):
    steps, layers, experts = loads.shape
    print(f"{steps} steps x {layers} layers x {experts} experts on {devices} devices: imbalance of single steps")
    print("decision every    fixed     live   factor   hindsight   moves a decision and layer")
    replays = {interval: replay_loads(loads, devices, interval, threshold) for interval in intervals}
    for interval, found in replays.items():
        print(f"{interval:8} steps {found.fixed:8.3f} {found.live:8.3f} {found.fixed / found.live:8.2f} "
              f"{hindsight(loads, devices, interval):11.3f} {found.moved:15.1f}")
    print(f"\nWhat it costs, simulated: `python sim.py predict` with --model, --hardware, a --plan of ep={devices} and")
    for interval, found in replays.items():
        for max_vio, how in (found.fixed, "experts fixed"), (found.live, f"live balance every {interval} steps"):
            print(f"--load max_vio={max_vio:.3f}      # {how}")


def floor(load, devices):
    """What no placement can beat: the mean, or the hottest expert with the lightest beside it."""
    lightest = np.sort(load)[:len(load) // devices - 1].sum()
    return max(0.0, (load.max() + lightest) / (load.sum() / devices) - 1)


def print_random(cases):
    print(f"\nmean imbalance of {cases} random loads   in order  planned    floor   moved   greedy alone   ms a plan")
    random = np.random.default_rng(0)
    for experts, devices in SIZES:
        first = sim.first_placement(experts, devices)
        for kind in KINDS:
            rows = []
            for _ in range(cases):
                load = getattr(random, kind)(size=experts)
                began = time.perf_counter()
                planned = sim.plan_placement(load, first)
                seconds = time.perf_counter() - began
                greedy = sim.place_greedily(load, devices)
                rows.append([sim.imbalance(load, first), sim.imbalance(load, planned), floor(load, devices),
                             sim.moved_experts(first, planned), sim.moved_experts(first, greedy), seconds * 1e3])
            in_order, planned, least, moved, moved_by_greedy, ms = np.mean(rows, 0)
            print(f"{experts:4} experts on {devices:2}, {kind:14} {in_order:8.4f} {planned:8.4f} {least:8.4f} "
                  f"{moved:7.0f} {moved_by_greedy:14.0f} {ms:11.1f}")


def read_recording(path):
    """(steps, layers, experts) of a run's loads.npy, or of an .npz file that holds it as `loads`."""
    try:
        loads = np.load(path)
    except (OSError, ValueError):
        raise ValueError(f"{path} cannot be read: give the loads.npy of a run (train.py --record-loads 1)") from None
    loads = loads["loads"] if path.endswith(".npz") else loads
    require(loads.ndim == 3, f"{path} holds an array {loads.shape}: give one of (steps, layers, experts)")
    return loads.astype(float)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loads", nargs="?", help="file of (steps, layers, experts); default: a recording of cpu-fine")
    parser.add_argument("--devices", type=int, default=8, help="that share the recorded experts: a plan's ep")
    parser.add_argument("--interval", type=int, nargs="+", help="steps between decisions; default: 10, 25 and 50, "
                                                                         "or half of the recording")
    parser.add_argument("--threshold", type=float, default=sim.Plan.balance_threshold,
                        help="experts move if std/mean of the devices' loads falls by this")
    parser.add_argument("--cases", type=int, default=20, help="random loads of each kind; without a file")
    args = parser.parse_args(argv)
    loads = read_recording(args.loads or str(RECORDING))
    steps, _, experts = loads.shape
    fitting = divisors(experts)[1:]
    require(args.devices in fitting, f"--devices {args.devices}: {experts} experts are recorded, use one of {fitting}")
    intervals = args.interval or [n for n in (10, 25, 50) if n < steps] or [steps // 2]
    for interval in intervals:
        require(0 < interval < steps, f"--interval {interval}: {steps} steps recorded, use 1 to {steps - 1}")
    print_recording(loads, args.devices, intervals, args.threshold)
    if args.loads is None:
        print_random(args.cases)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"bench_balance.py: {error}", file=sys.stderr)
        sys.exit(2)
