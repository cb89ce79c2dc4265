"""Plans evaluated in a minute: random legal plans of the 718B model on 6,144 devices, over two processes.

    python tests/bench_search.py [--plans 10000] [--processes 2]

Plans are drawn from those that `sim.py plans` searches, recompute and swap among them, and refused ones drawn again:
each is played in full, whether it fits in memory or not. A process takes plans with the same timetables together.
"""
import argparse
import multiprocessing
import random
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import sim
from model import PRESETS

CONFIG, HARDWARE = PRESETS["pangu-ultra-moe-718b"], sim.HARDWARE["ascend_910b_376"]


def draw_plans(count, devices, batch):
    generator, plans, sets = random.Random(0), [], sim.memory_choices(CONFIG)
    candidates = list(sim.candidate_plans(CONFIG, HARDWARE, devices, global_batch=batch, seq_len=4096))
    while len(plans) < count:
        recompute, swap = generator.choice(sets)
        plan = replace(generator.choice(sim.variants(generator.choice(candidates))), recompute=recompute, swap=swap)
        try:
            sim.check_plan(CONFIG, plan, HARDWARE)
            plans.append(plan)
        except ValueError:
            pass
    return sorted(plans, key=lambda plan: (plan.schedule, plan.pp, plan.vpp, plan.n_micro))


def evaluate(plan):
    result = sim.predict(CONFIG, plan, HARDWARE)
    return result["step_time_s"], result["fits"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=10000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=6144)
    parser.add_argument("--global-batch", type=int, default=4608, help="sequences")
    args = parser.parse_args()
    plans = draw_plans(args.plans, args.devices, args.global_batch)
    start = time.perf_counter()
    with multiprocessing.Pool(args.processes) as pool:
        results = pool.map(evaluate, plans, chunksize=max(1, len(plans) // (20 * args.processes)))
        pool.close()
        pool.join()
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{len(results)} plans evaluated in {seconds:.1f} s on {args.processes} processes, "
          f"{1e3 * (used.ru_utime + used.ru_stime) / len(results):.2f} ms of a core each; "
          f"{sum(fits for _, fits in results)} fit")


if __name__ == "__main__":
    main()
