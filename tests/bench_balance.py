"""
Live load balance in numbers: the planner against the paper's greedy, and placements by prediction on recorded loads.

    python tests/bench_balance.py                     # the recording of tests/data, some ten seconds
    python tests/bench_balance.py runs/a/loads.npy --devices 4 --cases 3

Imbalance is the busiest device's load over the mean, minus one. In the first table planner and greedy know the loads;
the floor is what no placement can beat without copies. In the second, each placement is made from earlier steps alone,
but hindsight's, which is one placement for the mean of all the steps it is measured on.
"""
import argparse
import itertools
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sim  # noqa: E402
from sim import Plan  # noqa: E402

SHAPES = [(64, 8, 0), (64, 8, 1), (256, 32, 0), (256, 32, 1), (256, 64, 2)]          # experts, devices, copies a device
KINDS = ("exponential", "lognormal")


def floor(load, devices):
    """The mean, or the hottest expert with the lightest beside it, over the mean, minus one."""
    lightest = np.sort(load)[:len(load) // devices - 1].sum()
    return max(0.0, (load.max() + lightest) / (load.sum() / devices) - 1)


def planners_table(cases):
    print(f"mean imbalance of {cases} random loads     in order   greedy  planner    floor   moved   ms a plan")
    random = np.random.default_rng(0)
    for (experts, devices, replicas), kind in itertools.product(SHAPES, KINDS):
        first, rows = sim.first_placement(experts, Plan(ep=devices, balance_replicas=replicas)), []
        for _ in range(cases):
            load = getattr(random, kind)(size=experts)
            began = time.perf_counter()
            planned = sim.plan_placement(load, first)
            seconds = time.perf_counter() - began
            greedy = sim.place_greedily(load, devices, replicas)
            found = [sim.imbalance(load, placement) for placement in (first, greedy, planned)]
            rows.append([*found, floor(load, devices), sim.moved_experts(first, planned, experts), seconds * 1e3])
        in_order, greedy, planned, least, moved, ms = np.mean(rows, 0)
        least = f"{least:8.4f}" if replicas == 0 else "       -"
        print(f"{experts:4} on {devices:2}, {replicas} copies, {kind:12} {in_order:8.4f} {greedy:8.4f} {planned:8.4f} "
              f"{least} {moved:7.0f} {ms:11.1f}")


def hindsight(loads, plan):
    after = loads[plan.balance_live:]
    first = sim.first_placement(loads.shape[2], plan)
    best = [sim.plan_placement(load, first) for load in after.mean(0)]
    return np.mean([sim.imbalance(*layer) for step in after for layer in zip(step, best)])


def recorded_table(loads, devices, intervals):
    steps, layers, experts = loads.shape
    print(f"\n{steps} steps x {layers} layers x {experts} experts on {devices} devices: imbalance of single steps")
    print("decision every   copies    fixed     live   factor   hindsight   moves a decision and layer")
    for interval in intervals:
        for replicas in (0, 1, 2):
            plan = Plan(dp=devices, ep=devices, balance_live=interval, balance_replicas=replicas)
            found = sim.replay_loads(loads, plan)
            decisions = layers * ((steps - 1) // interval)
            fixed, live, moved = found["fixed"], found["live"], found["moved"] / decisions
            print(f"{interval:8} steps {replicas:8} {fixed:8.3f} {live:8.3f} {fixed / live:8.2f} "
                  f"{hindsight(loads, plan):11.3f} {moved:15.1f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loads", nargs="?", default=str(ROOT / "tests/data/loads.npz"), help="(steps, layers, experts)")
    parser.add_argument("--devices", type=int, default=8, help="that share the recorded experts")
    parser.add_argument("--cases", type=int, default=20, help="random loads of each kind")
    parser.add_argument("--intervals", type=int, nargs="+", default=[10, 25, 50], help="steps between decisions")
    args = parser.parse_args(argv)
    loads = np.load(args.loads)
    loads = (loads["loads"] if args.loads.endswith(".npz") else loads).astype(float)
    planners_table(args.cases)
    recorded_table(loads, args.devices, args.intervals)


if __name__ == "__main__":
    main()
