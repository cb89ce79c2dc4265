"""
The expert exchanges on two nodes that are made on one machine: times and bytes, beside what sim.py predicts.

    python tests/bench_exchange.py                             # as root, about a minute
    python tests/bench_exchange.py --rate 200 --top-k 2 4 8
    python tests/bench_exchange.py --tiny                      # seconds; shows that it runs, not how fast

A node is a network namespace with two ranks (gloo, one thread each). A veth pair joins the two, and tc's token bucket
lets each send --rate megabits a second to the other; inside a node ranks talk through loopback. All exchanges are
measured in the same processes and take turns; a time is the least of --repeats. One dispatch, wait and combine forward,
and its backward, of --tokens tokens a rank; experts do nothing but weigh their rows.

The prediction takes --rate, shared by a node's ranks, for the slow tier; for the fast tier what an all-to-all between
the two ranks of a node reaches here, measured first. Everything the script makes has its process id in its name and is
taken down at the end, however that comes.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import parallel  # noqa: E402
from model import Config  # noqa: E402
from sim import EXCHANGES, Hardware, Plan, collective_seconds, exchange_bytes  # noqa: E402
from traffic import Traffic  # noqa: E402

NODES, RANKS_A_NODE = 2, 2

# ---------------------------------------------------------------------------------------------------------------------
# Two nodes on one machine


def tool(*words, check=True):
    subprocess.run(words, check=check, capture_output=not check)


@contextmanager
def two_nodes(megabits):
    """Two namespaces joined at that rate each way -> (names, addresses, links). Gone afterwards in any case."""
    names = [f"node{node}-{os.getpid()}" for node in range(NODES)]
    links = [f"v{node}-{os.getpid()}" for node in range(NODES)]           # a link's name has at most 15 letters
    addresses = [f"10.213.0.{node + 1}" for node in range(NODES)]
    try:
        for name in names:
            tool("ip", "netns", "add", name)
            tool("ip", "-n", name, "link", "set", "lo", "up")
        ends = [["name", link, "netns", name] for link, name in zip(links, names)]
        tool("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, link, address in zip(names, links, addresses):
            tool("ip", "-n", name, "address", "add", f"{address}/24", "dev", link)
            tool("ip", "-n", name, "link", "set", link, "up")
            # a bucket of 10 ms; a queue so long that nothing is dropped
            burst = max(65536, int(megabits * 1e6 / 8 * 0.01))
            tool("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", link, "root", "tbf",
                 "rate", f"{megabits}mbit", "burst", str(burst), "limit", str(64 << 20))
        yield names, addresses, links
    finally:
        for name in names:
            tool("ip", "netns", "del", name, check=False)                 # its end of the pair goes with it


def start_ranks(names, addresses, links, arguments, script):
    """One process a rank, rank 0 and 1 in the first node: this script again, told its rank."""
    ranks = []
    for rank in range(NODES * RANKS_A_NODE):
        node = rank // RANKS_A_NODE
        environment = dict(os.environ, GLOO_SOCKET_IFNAME=links[node], OMP_NUM_THREADS="1")
        command = ["ip", "netns", "exec", names[node], sys.executable, script]
        command += ["--rank", str(rank), "--address", addresses[0], *arguments]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE if rank == 0 else None))
    return ranks


def run_ranks(args, arguments, script):
    """What rank 0 printed."""
    with two_nodes(args.rate) as (names, addresses, links):
        ranks = start_ranks(names, addresses, links, arguments, script)
        try:
            output, _ = ranks[0].communicate(timeout=args.limit)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    if ranks[0].returncode:
        sys.exit(f"{Path(script).name}: rank 0 ended with status {ranks[0].returncode}")
    return json.loads(output)


# ---------------------------------------------------------------------------------------------------------------------
# One rank


def measure(args):
    """On each rank; rank 0 prints all that the table needs as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{args.address}:29400", rank=args.rank,
                            world_size=NODES * RANKS_A_NODE, timeout=timedelta(seconds=60))
    found = dict(inner=inner_bandwidth(args), rows=[])
    for top_k in args.top_k:
        config, plans = setting(args, top_k)
        ids, x, weights = inputs(args, top_k)
        grids = {name: parallel.Grid(plan) for name, plan in plans.items()}
        times = {name: [] for name in plans}
        sent = {}
        for name, grid in grids.items():                                  # makes connections, and is not timed
            with Traffic(RANKS_A_NODE) as traffic:
                exchange_once(grid.dispatcher(config), x, ids[args.rank], weights)
            sent[name] = {f"{way} {tier}": n for (way, tier), n in traffic.bytes.items()}
        for _ in range(args.repeats):
            for name, grid in grids.items():
                times[name].append(exchange_once(grid.dispatcher(config), x, ids[args.rank], weights))
        for name in plans:
            forward, backward, link = [min(column) for column in zip(*times[name])]
            row = dict(top_k=top_k, dispatch=name, forward=forward, backward=backward, link=link, sent=sent[name])
            found["rows"].append(row)
    if args.rank == 0:
        print(json.dumps(found))
    dist.barrier()


def setting(args, top_k):
    config = Config(hidden_size=args.hidden, n_routed_experts=args.experts, num_experts_per_tok=top_k,
                    max_position_embeddings=args.tokens)
    ranks = NODES * RANKS_A_NODE
    return config, {name: Plan(dp=ranks, ep=ranks, node_size=RANKS_A_NODE, dispatch=name, seq_len=args.tokens,
                               global_batch=ranks, precision="fp32") for name in EXCHANGES}


def inputs(args, top_k):
    """ids (ranks, N, K), the same on all ranks: uniform; x (N,C) and weights (N,K) of this rank."""
    generator = torch.Generator().manual_seed(top_k)
    ids = torch.rand(NODES * RANKS_A_NODE, args.tokens, args.experts, generator=generator).topk(top_k).indices
    x = torch.randn(args.tokens, args.hidden, requires_grad=True)
    return ids, x, torch.rand(args.tokens, top_k, requires_grad=True)


def link_bytes():
    """What the kernel has sent for this node to the other, headers included."""
    return int(Path(f"/sys/class/net/{os.environ['GLOO_SOCKET_IFNAME']}/statistics/tx_bytes").read_text())


def exchange_once(dispatcher, x, ids, weights):
    """Seconds forward and backward, until the last rank has finished; bytes that left this node, per rank of it."""
    dist.barrier()
    before = link_bytes()
    start = time.perf_counter()
    rows, row_weights, counts, ctx = dispatcher.dispatch(x, ids, weights)
    rows, row_weights = dispatcher.wait(rows, row_weights, ctx)
    out = dispatcher.combine(rows * row_weights.unsqueeze(1), ctx)
    dist.barrier()
    middle = time.perf_counter()
    out.backward(torch.ones_like(out))
    dist.barrier()
    end = time.perf_counter()
    return middle - start, end - middle, (link_bytes() - before) / RANKS_A_NODE


def inner_bandwidth(args):
    """Bytes/s that a rank sends inside its node, best of 5: both ranks at once."""
    pairs = [dist.new_group(list(range(node * RANKS_A_NODE, (node + 1) * RANKS_A_NODE))) for node in range(NODES)]
    x = torch.zeros(1 << 20)                                              # 4 MiB, half of it for the other rank
    out, best = torch.empty_like(x), 0.0
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        dist.all_to_all_single(out, x, group=pairs[args.rank // RANKS_A_NODE])
        best = max(best, x.nbytes / 2 / (time.perf_counter() - start))
    return best


# ---------------------------------------------------------------------------------------------------------------------
# The table


def predicted(args, top_k, dispatch, inner):
    """sim.py's seconds (forward, backward) of the exchange alone, for the ids that were measured."""
    hardware = Hardware("two namespaces", {"fp32": 1.0}, 1, 1, node_size=RANKS_A_NODE, inner_bandwidth=inner,
                        outer_bandwidth=args.rate * 1e6 / 8 / RANKS_A_NODE, inner_latency=0, outer_latency=0,
                        inner_efficiency=1.0, outer_efficiency=1.0, static_collective=0)
    config, plans = setting(args, top_k)
    plan = plans[dispatch]
    sent = exchange_bytes(config, plan, inputs(args, top_k)[0].tolist())
    seconds = []
    for tiers in sent.values():
        per_tier = [collective_seconds(hardware, tier, plan.ep, max(tiers[tier])) for tier in ("inner", "outer")]
        seconds.append(max(per_tier) if dispatch == "flat" else sum(per_tier))     # flat sends over both links at once
    return seconds


def show(args, found):
    print(f"2 nodes x 2 ranks, {args.rate} Mbit/s between them, {found['inner'] / 1e6:.0f} MB/s a rank inside "
          f"(measured); {args.tokens} tokens a rank of {args.hidden} float32, {args.experts} experts; "
          f"torch {torch.__version__}")
    print(f"measured: least of {args.repeats} in turns, ms; MB: sent by rank 0, counted; link: by its node's kernel, "
          f"a rank; simulated: sim.py, ms")
    print(f"{'top-k':>5} {'exchange':<13}{'forward':>9}{'backward':>9}{'simulated':>16}{'inner MB':>10}{'outer MB':>10}"
          f"{'link MB':>9}{'flat / it':>11}")
    for row in found["rows"]:
        flat = next(r for r in found["rows"] if r["top_k"] == row["top_k"] and r["dispatch"] == "flat")
        row["speedup"] = (flat["forward"] + flat["backward"]) / (row["forward"] + row["backward"])
        simulated = predicted(args, row["top_k"], row["dispatch"], found["inner"])
        inner, outer = (sum(n for name, n in row["sent"].items() if name.endswith(tier)) / 1e6
                        for tier in ("inner", "outer"))
        print(f"{row['top_k']:>5} {row['dispatch']:<13}{row['forward'] * 1e3:>9.1f}{row['backward'] * 1e3:>9.1f}"
              f"{simulated[0] * 1e3:>9.1f}{simulated[1] * 1e3:>7.1f}{inner:>10.2f}{outer:>10.2f}"
              f"{row['link'] / 1e6:>9.2f}{row['speedup']:>11.2f}")


def run_bench(parser, measure, show, tiny, script=__file__, **defaults):
    """A benchmark on two nodes, with the options that all have: on a rank measure(args), else show(args, its JSON)."""
    parser.add_argument("--rate", type=int, default=400, help="Mbit/s from node to node, each way (%(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of each rank's micro-batch (%(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="width of a token, float32 (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (%(default)s)")
    parser.add_argument("--limit", type=int, default=400, help="seconds until all is given up (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a few seconds")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(tiny)
    if args.rank is not None:
        return measure(args)
    if os.geteuid():
        sys.exit(f"{Path(script).name}: network namespaces need root: run it with sudo or in a container of your own")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))                 # so that `finally` is reached
    show(args, run_ranks(args, sys.argv[1:], script))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32, help="of all ranks (%(default)s)")
    parser.add_argument("--top-k", type=int, nargs="+", default=[8, 2, 1], help="experts a token (8 2 1)")
    run_bench(parser, measure, show, dict(tokens=32, hidden=64, top_k=[2], repeats=1))


if __name__ == "__main__":
    main()
