"""
Measures this device and writes the Hardware that explains it best. `python sim.py calibrate --out HW.json` runs it.

Timed in rounds: operators of model.py and training steps of small models, explained by the operators that sim.py
counts. Memory is what two more models hold, each in a process of its own. Under torchrun collectives are timed too.
"""
import json
import math
import multiprocessing
import os
import time
from collections import defaultdict
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import model
import parallel
from model import PRESETS
from sim import BYTES_OF, CPU, Hardware, Op, Plan, Simulation, op_seconds

# Models whose steps calibrate measures: changes to the smallest preset's config, sequences, tokens in each
CALIBRATED = (
    (dict(hidden_size=64, num_hidden_layers=6, vocab_size=512, moe_intermediate_size=64), 2, 64),
    (dict(hidden_size=128, num_hidden_layers=2, vocab_size=1024, moe_intermediate_size=64), 4, 128),
    (dict(n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=64), 8, 128),
    (dict(hidden_size=256, num_hidden_layers=3, n_routed_experts=16, num_experts_per_tok=4), 4, 256),
    (dict(hidden_size=384, num_hidden_layers=2, vocab_size=4096, n_routed_experts=4, moe_intermediate_size=512), 8,
     256),
    (dict(hidden_size=512, num_hidden_layers=2, vocab_size=8192, moe_intermediate_size=256), 4, 512))
# ... and the two whose memory it measures: many tokens both, few values of each and many
SMALL = dict(hidden_size=256, num_hidden_layers=2), 12, 256
LARGE = dict(hidden_size=256, num_hidden_layers=6, n_routed_experts=16, num_experts_per_tok=4), 8, 512
# What calibrate fits: where it starts, and between which bounds
FITTED = dict(peak=(2e11, 1e9, 1e16), matmul_half=(8.0, 1.0, 256.0), tokens_half=(16.0, 1.0, 1024.0),
              grouped_efficiency=(0.8, 0.1, 1.0), static_expert=(3e-5, 1e-7, 1e-3),
              attention_efficiency=(0.3, 0.01, 1.0), attention_half=(64.0, 1.0, 1024.0), bandwidth=(1e10, 1e8, 1e13),
              loss_cached=(2.0, 1.0, 16.0),
              static_matmul=(3e-5, 1e-6, 1e-3), static_vector=(3e-5, 1e-6, 1e-3))
ROUNDS = 3                         # of all measurements: a shared machine is slower in one minute than in the next


class Sample(NamedTuple):
    """Something to measure: its name, what runs it once, its operators as they are simulated, an optimizer's bytes."""
    name: str
    call: Callable
    ops: tuple
    moved: float = 0.0
    weight: float = 1.0

    def simulated(self, plan, hardware):
        busy = self.moved / hardware.memory_rate
        return busy + sum(sum(op_seconds(op, plan, hardware)) for op in self.ops)


def calibrate(out, precision, seconds):
    """Writes a Hardware as JSON and prints how well it explains what was measured; on rank 0, for all alike.

    precision: fp32, bf16 or auto, train.py's rule; seconds: of each measurement in each round. Other work on the device
    spoils the numbers.
    """
    device = parallel.pick_device()
    if precision == "auto":
        precision = parallel.auto_precision(device)
    framework, fragmentation = measure_memory(precision, device)
    steps = [partial(training_step, *small_run(*one, precision), device) for one in CALIBRATED]
    samples, measured = clock(steps + build_operators(precision, device), seconds, device)
    links = measure_links(device)
    if parallel.rank() > 0:
        return
    memory = (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu"
              else torch.accelerator.get_memory_info()[1])
    reached = dict.fromkeys((f"{what}_efficiency" for what in ("matmul", "memory", "inner", "outer")), 1.0)
    hardware = Hardware(f"calibrated {device.type}", {precision: 1e12}, memory, bandwidth=1e10, framework=framework,
                        fragmentation=fragmentation, value_padded=device.type == "cpu", **reached, **links)
    plan = Plan(precision=precision)
    hardware = fit(samples, measured, plan, hardware)
    with open(out, "w") as file:
        json.dump(asdict(hardware), file, indent=1)
    print(f"{out}: {device.type}, {precision}, {torch.get_num_threads()} threads")
    print(f"{'milliseconds, forward and backward':36}{'measured':>10}{'fitted':>10}{'error':>8}")
    for sample, taken in zip(samples, measured):
        fitted = sample.simulated(plan, hardware)
        print(f"{sample.name:36}{taken * 1e3:10.3f}{fitted * 1e3:10.3f}{fitted / taken - 1:+8.0%}")
    for name, value in asdict(hardware).items():
        print(f"{name:22} {value}")


def small_run(changes, sequences, seq_len, precision):
    """(config, plan) of one of CALIBRATED."""
    config = replace(PRESETS["tiny"], num_nextn_predict_layers=0, **changes)
    return config, Plan(micro_batch=sequences, global_batch=sequences, seq_len=seq_len, precision=precision)


def training_step(config, plan, device):
    """A training step on random tokens."""
    torch.manual_seed(0)
    net = model.Model(config).to(device)
    net.init_weights(0)
    net.compute_dtype = torch.bfloat16 if plan.precision == "bf16" else None
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step():
        ids = torch.randint(config.vocab_size, (plan.micro_batch, plan.seq_len), device=device)
        net(ids, labels=ids).total_loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    run = Simulation(config, plan, CPU)
    name = f"step: {config.hidden_size} x {config.num_hidden_layers}, {config.n_routed_experts} experts"
    ops = tuple(op for work in run.works_of(0) for op in work.ops)
    return Sample(name, step, ops, run.optimizer_bytes(0), weight=4.0)


def measure_memory(precision, device):
    """(framework, fragmentation): of what two models hold, each in a process of its own, what their tensors do not
    explain; in bytes, and for a byte of activations."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as apart:
        tasks = [(*one, precision, device) for one in (SMALL, LARGE)]
        small, large = np.array(apart.starmap(bytes_held, tasks, chunksize=1))
    held, states, activations = large - small
    factor = max(1.0, (held - states) / activations)
    return max(0.0, small[0] - small[1] - factor * small[2]), factor - 1


def bytes_held(changes, sequences, seq_len, precision, device):
    """(bytes held at most in 25 steps, bytes of weights and optimizer, of activations) of a small model."""
    config, plan = small_run(changes, sequences, seq_len, precision)
    sample = training_step(config, plan, device)
    for _ in range(25):
        sample.call()
    parts = Simulation(config, plan, replace(CPU, framework=0.0)).memory(0)
    activations = parts["activations"] + parts["buffers"]
    return parallel.peak_memory(device), sum(parts.values()) - activations, activations


def build_operators(precision, device):
    """What builds samples of model.py's operators, forward and backward, in several sizes."""
    dtype, size = dict(fp32=torch.float32, bf16=torch.bfloat16)[precision], BYTES_OF[precision]

    def random(*shape, dtype=dtype):
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    def sample(name, ops, operator, *inputs, weight=1.0):
        grad = torch.randn_like(operator(*inputs))
        return Sample(name, lambda: torch.autograd.grad(operator(*inputs), inputs, grad), ops, weight=weight)

    def matmul_op(m, k, n, matrices):
        return Op("", "", "matmul", 2 * m * k * n, size * (m * k + matrices * k * n + m * n), (m, k, n, matrices))

    def matmul(m, k, n, matrices):
        counts = torch.full((matrices,), m // matrices, device=device) if matrices > 1 else None
        weights = random(*(matrices,)[:matrices > 1], n, k, dtype=torch.float32)
        return sample(f"matmul {m} x {k} x {n}, {matrices} experts", (matmul_op(m, k, n, matrices),),
                      lambda x, w: model.Matmul.apply(x, w, counts, None), random(m, k), weights)

    def attention(sequences, seq_len, heads, width):
        tokens = sequences * seq_len
        op = Op("", "", "flash", 2 * tokens * seq_len * heads * width, 4 * tokens * heads * width * size,
                (tokens, width, seq_len, heads * sequences))
        return sample(f"attention {sequences} x {seq_len}, {heads} heads of {width}", (op,),
                      lambda q, k, v: model.attention(q, k, v, width**-0.5),
                      *(random(sequences, seq_len, heads, width) for _ in range(3)))

    def norm(tokens, width):
        return sample(f"norm {tokens} x {width}", (Op("", "", "vector", 0, 2 * tokens * width * size),),
                      lambda x, w: model.rms_norm(x, w, 1e-5), random(tokens, width), random(width), weight=0.3)

    def loss(tokens, width, vocab):
        ops = matmul_op(tokens, width, vocab, 1), Op("", "loss", "vector", 0, 4 * tokens * vocab * 4)
        targets = torch.randint(vocab, (tokens,), device=device)
        return sample(f"head and loss {tokens} x {width} x {vocab}", ops,
                      lambda x, w: model.cross_entropy(x, w, targets), random(tokens, width),
                      random(vocab, width, dtype=torch.float32))

    plain = product((64, 512, 3072), ((64, 256), (512, 192), (256, 1280)))
    grouped = ((768, 192, 256, 8), (6144, 192, 256, 8), (2048, 256, 256, 16), (8192, 256, 256, 16),
               (2048, 256, 128, 64), (8192, 64, 256, 64))
    attentions = (12, 256, 4, 48), (4, 256, 4, 64), (8, 128, 4, 48), (2, 512, 8, 64)
    norms = (512, 192), (3072, 192), (4096, 512)
    losses = (4096, 128, 2048), (1024, 256, 2048), (2048, 320, 4096)
    return [*(partial(matmul, m, k, n, 1) for m, (k, n) in plain), *(partial(matmul, *one) for one in grouped),
            *(partial(attention, *one) for one in attentions), *(partial(norm, *one) for one in norms),
            *(partial(loss, *one) for one in losses)]


def clock(builders, seconds, device):
    """(samples, the median seconds of each), in ROUNDS of `seconds` and six calls at least, the first third to warm up.

    One sample after the other: if they took turns each would find its memory cold, and take 20 to 40 % longer.
    """
    samples, times, begin, rounds = {}, defaultdict(list), time.perf_counter(), builders * ROUNDS
    for done, build in enumerate(rounds, 1):
        sample, mine, start = build(), [], time.perf_counter()
        while len(mine) < 6 or time.perf_counter() - start < seconds:
            before = time.perf_counter()
            sample.call()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            mine.append(time.perf_counter() - before)
        times[sample.name] += mine[len(mine) // 3:]
        samples[sample.name] = sample._replace(call=None)                   # its model goes with the call
        if done % len(builders) == 0 and parallel.rank() == 0:
            left = (time.perf_counter() - begin) * (len(rounds) / done - 1)
            print(f"round {done // len(builders)} of {ROUNDS} is measured, {left:.0f} s left", flush=True)
    return list(samples.values()), [sorted(taken)[len(taken) // 2] for taken in times.values()]


def fit(samples, measured, plan, hardware):
    """Least weighted squares of log(simulated / measured): damped Gauss-Newton steps on FITTED's logarithms."""
    start, low, high = np.log(list(FITTED.values())).T
    weights = np.sqrt([sample.weight for sample in samples])

    def put(logs):
        constants = dict(zip(FITTED, np.exp(logs).tolist()))
        return replace(hardware, peak={plan.precision: constants.pop("peak")}, **constants)

    def errors_of(logs):
        tried = put(logs)
        return weights * np.log([sample.simulated(plan, tried) / taken for sample, taken in zip(samples, measured)])

    logs, errors, damping = start, errors_of(start), 0.1
    for _ in range(60):
        slopes = np.stack([(errors_of(logs + nudge) - errors) / 0.01 for nudge in 0.01 * np.eye(len(logs))], axis=1)
        step = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(logs)), slopes.T @ errors)
        tried = np.clip(logs - step, low, high)
        if np.sum((found := errors_of(tried)) ** 2) < np.sum(errors ** 2):
            logs, errors, damping = tried, found, damping / 3
        else:
            damping *= 5
    return put(logs)


def measure_links(device):
    """Bandwidth and start of collectives among a node's ranks and between nodes; nothing for a single process.

    An all-reduce, an all-gather and an all-to-all together: bytes that a rank sends over the time they take.
    """
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    fields = dict(inner_bandwidth=1e9, outer_bandwidth=1e9, node_size=local if local < world else 2**16)
    if world == 1:                                         # not measured, and no plan of one device uses a link
        return fields
    parallel.join_world(device, None)
    ranks = torch.arange(world).view(-1, local)
    for tier, groups in ("inner", ranks), ("outer", ranks.T):
        group, _ = dist.new_subgroups_by_enumeration(groups.tolist())
        n = dist.get_world_size(group)
        if n == 1:
            continue

        def collectives(elements):
            x, y = (torch.ones(elements * n, device=device) for _ in range(2))

            def call():
                dist.all_reduce(x, group=group)
                dist.all_to_all_single(y, x, group=group)
                dist.all_gather(list(y.chunk(n)), x[:elements], group=group)
            return Sample(f"{tier} {elements}", call, ())

        _, (short, long) = clock([partial(collectives, 1), partial(collectives, 2**20)], 0.0, device)
        fields[f"{tier}_bandwidth"] = 4 * (n - 1) * 4 * 2**20 / (long - short)
        fields |= {f"{tier}_latency": 0.0, "static_collective": short / 4}  # of four: an all-reduce is two
    parallel.leave_world()
    return fields
