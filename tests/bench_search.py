"""How fast plans are played, how long the search takes, and how near it comes to the best plan there is.

    python tests/bench_search.py [--plans 10000] [--processes 2]

First random legal plans of the 718B model on 6,144 devices, of those that `sim.py plans` searches, with any items to
recompute and swap: each is played in full, whether it fits in memory or not. Then `sim.py plans` on the paper's
setting. Then the search beside an exhaustive play of all it could have chosen, for the small settings of CASES.
"""
import argparse
import multiprocessing
import random
import resource
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
import sim  # noqa: E402
from model import PRESETS, Config  # noqa: E402

CONFIG, ASCEND = PRESETS["pangu-ultra-moe-718b"], sim.HARDWARE["ascend_910b_376"]


class Case(NamedTuple):
    """A setting small enough to play every plan of it. Nodes and memories are made small, so that they matter."""
    config: Config
    hardware: sim.Hardware
    devices: int
    batch: dict


CASES = {
    "tiny, 4 layers, on 4": Case(
        replace(PRESETS["tiny"], num_hidden_layers=4),
        replace(ASCEND, name="910B in nodes of 2", node_size=2, communicator=0, memory=ASCEND.framework + 60 * 2**20),
        4, dict(global_batch=8, seq_len=512)),
    "one-gpu-256 on 2": Case(
        PRESETS["one-gpu-256"],
        replace(sim.HARDWARE["h100_sxm"], name="H100 of 64 GiB", node_size=1, memory=64 * 2**30),
        2, dict(global_batch=4, seq_len=1024)),
    "one-gpu on 2": Case(
        PRESETS["one-gpu"], replace(ASCEND, name="910B of 36 GiB", node_size=2, memory=36 * 2**30),
        2, dict(global_batch=8, seq_len=1024)),
}


def is_legal(config, plan, hardware):
    try:
        sim.check_plan(config, plan, hardware)
        return True
    except ValueError:
        return False


def variants(plan):
    """Every zero that parallel.py runs so, and every exchange."""
    zeros = (0, 1, 3) if plan.is_plain else (0, 1)
    return [replace(plan, zero=zero, dispatch=dispatch)
            for zero, dispatch in product(zeros, sim.exchange_choices(plan))]


def draw_plans(config, hardware, devices, count, **batch):
    """Legal plans drawn from those that the search considers, with any choice of what is saved."""
    generator, plans, choices = random.Random(0), [], sim.memory_choices(config)
    candidates = list(chain(*sim.candidate_groups(config, hardware, devices, **batch)))
    while len(plans) < count:
        recompute, swap = generator.choice(choices)
        plan = replace(generator.choice(variants(generator.choice(candidates))), recompute=recompute, swap=swap)
        if is_legal(config, plan, hardware):
            plans.append(plan)
    return sorted(plans, key=lambda plan: (plan.schedule, plan.pp, plan.vpp, plan.n_micro))    # tables are made once


def evaluate(config, hardware, plan):
    result = sim.predict(config, plan, hardware)
    return result["step_time_s"], result["fits"]


def best_of_all(case, pool):
    """(seconds of the fastest plan that fits, plans played): every cut, zero, exchange, recompute and swap."""
    cuts = list(chain(*sim.candidate_groups(case.config, case.hardware, case.devices, **case.batch)))
    plans = [replace(plan, recompute=recompute, swap=swap)
             for cut in cuts if is_legal(case.config, cut, case.hardware)
             for plan in variants(cut) for recompute, swap in sim.memory_choices(case.config)]
    results = pool.imap_unordered(partial(evaluate, case.config, case.hardware), plans, chunksize=196)
    results = list(sim.with_progress("plans played", results, len(plans)))
    return min(seconds for seconds, fits in results if fits), len(plans)


def search_case(case):
    """Seconds of the search's best plan."""
    search = sim.search_plans(case.config, case.hardware, case.devices, **case.batch)
    return search.found[0]["step_time_s"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=10000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=6144)
    parser.add_argument("--global-batch", type=int, default=4608, help="sequences")
    parser.add_argument("--only-plans", action="store_true", help="leave out the search")
    args = parser.parse_args()
    batch = dict(global_batch=args.global_batch, seq_len=4096)
    plans = draw_plans(CONFIG, ASCEND, args.devices, args.plans, **batch)
    start = time.perf_counter()
    with multiprocessing.Pool(args.processes) as pool:
        chunk = max(1, len(plans) // (20 * args.processes))
        results = pool.map(partial(evaluate, CONFIG, ASCEND), plans, chunksize=chunk)
        pool.close()
        pool.join()
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{len(results)} plans played in {seconds:.1f} s on {args.processes} processes, "
          f"{1e3 * (used.ru_utime + used.ru_stime) / len(results):.2f} ms of a core each; "
          f"{sum(fits for _, fits in results)} fit")
    if args.only_plans:
        return
    start = time.perf_counter()
    search = sim.search_plans(CONFIG, ASCEND, args.devices, **batch)
    print(f"search: {search.priced} plans priced and {len(search.found)} of them played in "
          f"{time.perf_counter() - start:.1f} s; best {search.found[0]['step_time_s']:.3f} s a step")
    print("\ncase                   plans played   best of all   best found by search")
    for name, case in CASES.items():
        with multiprocessing.Pool(args.processes) as pool:
            best, played = best_of_all(case, pool)
        found = search_case(case)
        print(f"{name:22} {played:12} {best:11.5f} s {found:11.5f} s {found / best - 1:+.2%}", flush=True)


if __name__ == "__main__":
    main()
