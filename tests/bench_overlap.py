"""
The adaptive overlap on two nodes made on one machine: how much of the experts' exchange hides behind compute.

    python tests/bench_overlap.py                              # as root, about three minutes
    python tests/bench_overlap.py --rate 400 --dispatch flat
    python tests/bench_overlap.py --tiny                       # seconds; shows that it runs, not how fast

The nodes are bench_exchange.py's: two namespaces of two ranks, gloo, one thread each, --rate megabits a second between
them. Each rank runs --micro-batches through --layers MoE layers, on one pipeline rank, in four ways that take turns in
one process; a time is the least of --repeats, of the slowest rank:

    compute     nothing travels: each collective gives memory of the right shape at once
    exchange    what travels in a step, with nothing computed but the sorting of rows
    none        the step, one micro-batch after the other
    adaptive    the step in pairs

hidden = (compute + exchange - adaptive) / exchange. Gradients are not reduced over ranks.
simulated: sim.py on a device whose links are those of the table and whose arithmetic takes as long as `compute`.
"""
import argparse
import json
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from bench_exchange import NODES, RANKS_A_NODE, inner_bandwidth, run_bench

import parallel
from model import Config, Model
from sim import EXCHANGES, Hardware, Plan, predict

RANKS = NODES * RANKS_A_NODE


def setting(args):
    config = Config(
        vocab_size=512, hidden_size=args.hidden, num_hidden_layers=args.layers, first_k_dense_replace=0,
        num_attention_heads=4, q_lora_rank=96, kv_lora_rank=64, n_routed_experts=16, num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.width, max_position_embeddings=args.tokens, num_nextn_predict_layers=0,
        balance="none")
    plan = Plan(dp=RANKS, ep=RANKS, node_size=RANKS_A_NODE, dispatch=args.dispatch, seq_len=args.tokens, zero=0,
                global_batch=RANKS * args.micro_batches, precision="fp32", schedule="paired")
    return config, plan


class Done:
    def wait(self):
        pass


@contextmanager
def nothing_travels():
    """Collectives of exchanges whose result is there at once: the first rows again, as often as needed."""
    def instant(size):
        def collective(group, x, send=None, recv=None):
            n = size(group, x, recv)
            source = x if len(x) else x.new_zeros(1, *x.shape[1:])
            return source.repeat(-(-n // len(source)), *[1] * (x.dim() - 1))[:n], Done()
        return collective

    plain = {name: getattr(parallel.Group, name) for name in ("all_to_all", "all_gather", "reduce_scatter")}
    real = plain["all_to_all"]

    def all_to_all(group, x, send=None, recv=None):
        if not x.is_floating_point():                                     # split sizes and ids are true
            return real(group, x, send, recv)
        return instant(lambda group, x, recv: len(x) if recv is None else sum(recv))(group, x, send, recv)

    def all_gather(group, x):
        if not x.is_floating_point():
            return plain["all_gather"](group, x)
        return instant(lambda group, x, recv: group.size * len(x))(group, x)

    parallel.Group.all_to_all, parallel.Group.all_gather = all_to_all, all_gather
    parallel.Group.reduce_scatter = instant(lambda group, x, recv: len(x) // group.size)
    try:
        yield
    finally:
        for name, method in plain.items():
            setattr(parallel.Group, name, method)


def exchange_alone(model, batches, tokens):
    """What a step sends, with rows of zeros."""
    C, K = model.config.hidden_size, model.config.num_experts_per_tok
    for batch in batches:
        for block in model.layers.values():
            dispatcher = block.mlp.dispatcher
            x, weights = torch.zeros(tokens, C, requires_grad=True), torch.zeros(tokens, K, requires_grad=True)
            rows, row_weights, _, ctx = dispatcher.dispatch(x, batch["routing"][block.index].flatten(0, 1), weights)
            rows, row_weights = dispatcher.wait(rows, row_weights, ctx)
            out = dispatcher.combine(rows * row_weights.unsqueeze(1), ctx)
            out.backward(torch.ones_like(out))


def measure(args):
    """On each rank; rank 0 prints seconds as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{args.address}:29400", rank=args.rank, world_size=RANKS,
                            timeout=timedelta(seconds=120))
    found = dict(inner=inner_bandwidth(args))
    config, plan = setting(args)
    model = Model(config)
    grid = parallel.parallelize(model, plan)
    parallel.init_weights(model)
    pipelines = {name: parallel.Pipeline(model, replace(plan, overlap=name), grid) for name in ("none", "adaptive")}
    for pipeline in pipelines.values():
        pipeline.set_last_backward = lambda last: parallel.Pipeline.set_last_backward(pipelines["none"], False)
    for pipeline in pipelines.values():
        pipeline.store = pipelines["none"].store
    for module in model.modules():
        if hasattr(module, "store"):
            module.store = pipelines["none"].store
    generator = torch.Generator().manual_seed(args.rank)
    ids = torch.randint(config.vocab_size, (1, args.tokens), generator=generator)

    def batch():
        scores = torch.rand(config.num_hidden_layers, 1, args.tokens, config.n_routed_experts, generator=generator)
        routing = dict(enumerate(scores.topk(config.num_experts_per_tok).indices))
        return dict(ids=ids, targets=ids.unsqueeze(1), routing=routing)

    batches, loss_tokens = [batch() for _ in range(args.micro_batches)], torch.tensor([float(args.tokens)])

    def compute():
        with nothing_travels():
            pipelines["none"].step(batches, loss_tokens)

    ways = dict(compute=compute, exchange=lambda: exchange_alone(model, batches, args.tokens),
                none=lambda: pipelines["none"].step(batches, loss_tokens),
                adaptive=lambda: pipelines["adaptive"].step(batches, loss_tokens))
    times = {name: [] for name in ways}
    for _ in range(args.repeats + 1):
        for name, run in ways.items():
            model.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            run()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    found.update({name: min(column[1:]) for name, column in times.items()})           # the first makes connections
    if args.rank == 0:
        print(json.dumps(found))
    dist.barrier()


def simulated(args, found):
    """sim.py's seconds of the step with and without overlap, and its hidden share."""
    config, plan = setting(args)
    links = dict(inner_bandwidth=found["inner"], inner_latency=0, outer_bandwidth=args.rate * 1e6 / 8 / RANKS_A_NODE,
                 outer_latency=0, inner_efficiency=1.0, outer_efficiency=1.0, static_collective=0,
                 static_matmul=0, static_vector=0)
    free = Hardware("free links", {"fp32": 1e12}, 1e12, 1e15, RANKS_A_NODE, **{
        **links, "inner_bandwidth": 1e18, "outer_bandwidth": 1e18})
    speed = 1e12 * seconds_of(predict(config, plan, free)) / found["compute"]
    hardware = Hardware("two namespaces", {"fp32": speed}, 1e12, 1e15, RANKS_A_NODE, **links)
    return [predict(config, replace(plan, overlap=overlap), hardware) for overlap in ("none", "adaptive")]


def seconds_of(result):
    """Of a predicted step, without reducing gradients, which is not measured."""
    return result["step_time_s"] - result["breakdown"]["gradients"]


def show(args, found):
    hidden = (found["compute"] + found["exchange"] - found["adaptive"]) / found["exchange"]
    print(f"2 nodes x 2 ranks, {args.rate} Mbit/s between them, {found['inner'] / 1e6:.0f} MB/s a rank inside; "
          f"{args.dispatch}, {args.micro_batches} micro-batches of {args.tokens} tokens, {args.layers} MoE layers of "
          f"{args.hidden}, top-{args.top_k}; torch {torch.__version__}")
    seconds = "   ".join(f"{name} {found[name]:.2f}" for name in ("compute", "exchange", "none", "adaptive"))
    print(f"measured, s:  {seconds}   hidden {hidden:.0%}   none / adaptive {found['none'] / found['adaptive']:.2f}")
    predicted = simulated(args, found)
    none, adaptive = map(seconds_of, predicted)
    print(f"simulated, s: none {none:.2f}   adaptive {adaptive:.2f}   "
          f"hidden {predicted[1]['hidden_comm_fraction']:.0%}   none / adaptive {none / adaptive:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dispatch", default="hierarchical", choices=EXCHANGES)
    parser.add_argument("--width", type=int, default=512, help="of an expert (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="MoE layers (%(default)s)")
    parser.add_argument("--top-k", type=int, default=4, help="experts a token (%(default)s)")
    parser.add_argument("--micro-batches", type=int, default=12, help="of a step (%(default)s)")
    run_bench(parser, measure, show, dict(tokens=32, hidden=64, micro_batches=2, repeats=1), __file__,
              rate=200, tokens=256, hidden=256, repeats=3)


if __name__ == "__main__":
    main()
