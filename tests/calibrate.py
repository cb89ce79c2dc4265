"""
Measures this device and writes the Hardware that explains it best, for `python sim.py predict --hardware HW.json`.

    python tests/calibrate.py --out HW.json                            # about three minutes
    torchrun --nproc-per-node 8 tests/calibrate.py --out HW.json       # and the links between these processes

Timed are training steps of small models and single operators of model.py. Each is explained by the operators that
sim.py counts for it, whose times depend on a few constants of the hardware: those are fitted. Memory is what two models
hold, each in a process of its own. Nothing else should run on the device meanwhile.

In this order: what is measured, training steps, memory, operators, the clock, the fit, links, the command.
"""
import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import asdict, replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model  # noqa: E402
import parallel  # noqa: E402
from model import PRESETS, require  # noqa: E402
from sim import BYTES_OF, CPU, Attention, Hardware, Matmul, Plan, Simulation, Vector, with_progress  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# What is measured


class SmallModel(NamedTuple):
    """Changes to the smallest preset, and the batch of its steps."""
    changes: dict
    sequences: int
    seq_len: int                    # tokens


# models whose steps are timed: from steps that cost little but calls to such that cost little but matmuls
TIMED = (
    SmallModel(dict(hidden_size=64, num_hidden_layers=6, vocab_size=512, moe_intermediate_size=64), 2, 64),
    SmallModel(dict(hidden_size=128, num_hidden_layers=2, vocab_size=1024, moe_intermediate_size=64), 4, 128),
    SmallModel(dict(n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=64), 8, 128),
    SmallModel(dict(hidden_size=256, num_hidden_layers=3, n_routed_experts=16, num_experts_per_tok=4), 4, 256),
    SmallModel(dict(hidden_size=384, num_hidden_layers=2, vocab_size=4096, n_routed_experts=4,
                    moe_intermediate_size=512), 8, 256),
    SmallModel(dict(hidden_size=512, num_hidden_layers=2, vocab_size=8192, moe_intermediate_size=256), 4, 512))

# the two whose memory is measured: many tokens both, few values of each and many
FEW_VALUES = SmallModel(dict(hidden_size=256, num_hidden_layers=2), 12, 256)
MANY_VALUES = SmallModel(dict(hidden_size=256, num_hidden_layers=6, n_routed_experts=16, num_experts_per_tok=4), 8, 512)

# matmuls: rows, inputs, outputs, experts that share the rows
MATMULS = [(rows, *sides, 1) for rows in (64, 512, 3072) for sides in ((64, 256), (512, 192), (256, 1280))]
GROUPED_MATMULS = [(768, 192, 256, 8), (6144, 192, 256, 8), (2048, 256, 256, 16), (8192, 256, 256, 16),
                   (2048, 256, 128, 64), (8192, 64, 256, 64)]
ATTENTIONS = [(12, 256, 4, 48), (4, 256, 4, 64), (8, 128, 4, 48), (2, 512, 8, 64)]   # sequences, tokens, heads, width
NORMS = [(512, 192), (3072, 192), (4096, 512)]                                       # tokens, width
LOSSES = [(4096, 128, 2048), (1024, 256, 2048), (2048, 320, 4096)]                   # tokens, width, vocabulary

POOR = 0.3                         # median error above which other work is likely to have run beside
ROUNDS = 3                         # of all measurements: a shared machine is slower in one minute than in the next


class Measurement(NamedTuple):
    """Something to time, and what sim.py says that it does."""
    name: str
    call: Callable | None           # runs it once
    ops: tuple                      # of sim's operators, forward and backward of each
    optimizer_bytes: float = 0.0    # that an optimizer moves
    weight: float = 1.0             # in the fit

    def simulated(self, plan, hardware):
        """Seconds."""
        total = self.optimizer_bytes / hardware.memory_rate
        for op in self.ops:
            total += sum(op.seconds(plan, hardware))
        return total


# ---------------------------------------------------------------------------------------------------------------------
# Training steps


def config_and_plan(small, precision):
    config = replace(PRESETS["tiny"], num_nextn_predict_layers=0, **small.changes)
    plan = Plan(micro_batch=small.sequences, global_batch=small.sequences, seq_len=small.seq_len, precision=precision)
    return config, plan


def training_step(small, precision, device):
    """Measurement of a training step on random tokens."""
    config, plan = config_and_plan(small, precision)
    torch.manual_seed(0)
    net = model.Model(config).to(device)
    net.init_weights(0)
    net.compute_dtype = torch.bfloat16 if precision == "bf16" else None
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step():
        ids = torch.randint(config.vocab_size, (plan.micro_batch, plan.seq_len), device=device)
        net(ids, labels=ids).total_loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    name = f"step: {config.hidden_size} x {config.num_hidden_layers}, {config.n_routed_experts} experts"
    simulation = Simulation(config, plan, CPU)
    ops = [op for kind in simulation.kinds_of[0] for op in simulation.works[kind].ops]
    return Measurement(name, step, tuple(ops), simulation.optimizer_bytes(0), weight=4.0)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class Held(NamedTuple):
    """Bytes of a training process."""
    at_most: int                    # measured
    states: float                   # weights, gradients, optimizer, as sim.py counts them
    activations: float              # and buffers, as sim.py counts them


def bytes_held(small, precision, device):
    """Held in 25 steps of a small model. To be called in a process of its own."""
    measurement = training_step(small, precision, device)
    for _ in range(25):
        measurement.call()
    config, plan = config_and_plan(small, precision)
    parts = Simulation(config, plan, replace(CPU, framework=0.0)).memory(0)
    activations = parts["activations"] + parts["buffers"]
    return Held(parallel.peak_memory(device), sum(parts.values()) - activations, activations)


def measure_memory(precision, device):
    """(framework, fragmentation) of Hardware: what is held is framework + states + (1 + fragmentation) * activations.

    Two models give both.
    """
    tasks = [(small, precision, device) for small in (FEW_VALUES, MANY_VALUES)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as one_process_each:
        few, many = one_process_each.starmap(bytes_held, tasks, chunksize=1)
    beside_states = [held.at_most - held.states for held in (few, many)]
    growth = (beside_states[1] - beside_states[0]) / (many.activations - few.activations)
    growth = max(1.0, growth)
    framework = beside_states[0] - growth * few.activations
    return max(0.0, framework), growth - 1


# ---------------------------------------------------------------------------------------------------------------------
# Operators of model.py


class Operators:
    """Makes Measurements of model.py's operators, forward and backward, on random tensors."""

    def __init__(self, precision, device):
        self.dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[precision]
        self.bytes, self.device = BYTES_OF[precision], device

    def builders(self):
        """Functions without arguments, each of which makes one: their tensors need not exist at the same time."""
        made_by = ((self.matmul, MATMULS + GROUPED_MATMULS), (self.attention, ATTENTIONS), (self.norm, NORMS),
                   (self.loss, LOSSES))
        return [partial(make, *sizes) for make, all_sizes in made_by for sizes in all_sizes]

    def matmul(self, rows, n_in, n_out, experts):
        x = self.random(rows, n_in)
        if experts == 1:
            weight, counts = self.random_weight(n_out, n_in), None
        else:
            weight = self.random_weight(experts, n_out, n_in)
            counts = torch.full((experts,), rows // experts, device=self.device)
        return self.measurement(f"matmul {rows} x {n_in} x {n_out}, {experts} experts",
                                lambda x, weight: model.Matmul.apply(x, weight, counts, None), (x, weight),
                                self.matmul_op(rows, n_in, n_out, experts))

    def attention(self, sequences, seq_len, heads, width):
        q, k, v = [self.random(sequences, seq_len, heads, width) for _ in range(3)]
        tokens = sequences * seq_len
        op = Attention("", "", flops=2 * tokens * seq_len * heads * width,
                       moved=4 * tokens * heads * width * self.bytes, keys=seq_len)
        return self.measurement(f"attention {sequences} x {seq_len}, {heads} heads of {width}",
                                lambda q, k, v: model.attention(q, k, v, width**-0.5), (q, k, v), op)

    def norm(self, tokens, width):
        op = Vector("", "", moved=2 * tokens * width * self.bytes)
        return self.measurement(f"norm {tokens} x {width}", lambda x, gain: model.rms_norm(x, gain, 1e-5),
                                (self.random(tokens, width), self.random(width)), op, weight=0.3)

    def loss(self, tokens, width, vocabulary):
        """The head's matmul and the loss of its logits, which are float32."""
        targets = torch.randint(vocabulary, (tokens,), device=self.device)
        of_logits = Vector("", "", moved=4 * tokens * vocabulary * BYTES_OF["fp32"], cached=True)
        return self.measurement(f"head and loss {tokens} x {width} x {vocabulary}",
                                lambda x, weight: model.cross_entropy(x, weight, targets),
                                (self.random(tokens, width), self.random_weight(vocabulary, width)),
                                self.matmul_op(tokens, width, vocabulary, 1), of_logits)

    def random(self, *shape):
        return torch.randn(shape, device=self.device, dtype=self.dtype, requires_grad=True)

    def random_weight(self, *shape):
        """Master weights are float32, whatever is computed in."""
        return torch.randn(shape, device=self.device, requires_grad=True)

    def matmul_op(self, rows, n_in, n_out, experts):
        return Matmul("", "", rows, n_in, n_out, experts, self.bytes)

    def measurement(self, name, operator, inputs, *ops, weight=1.0):
        grad = torch.randn_like(operator(*inputs))

        def call():
            torch.autograd.grad(operator(*inputs), inputs, grad)
        return Measurement(name, call, ops, weight=weight)


# ---------------------------------------------------------------------------------------------------------------------
# The clock


def time_all(builders, seconds, device):
    """(Measurements, the median seconds of each), in ROUNDS of at least `seconds` and six calls each.

    One measurement after the other: if they took turns each would find its memory cold, and take 20 to 40 % longer.
    """
    measurements, taken = [None] * len(builders), [[] for _ in builders]
    numbers = list(range(len(builders))) * ROUNDS
    if parallel.rank() == 0:
        numbers = with_progress("measurements", numbers)
    for number in numbers:
        measurement = builders[number]()
        calls = time_calls(measurement.call, seconds, device)
        taken[number] += calls[len(calls) // 3:]                            # the first third warms up
        measurements[number] = measurement._replace(call=None)              # its tensors go with the call
    return measurements, [statistics.median_high(calls) for calls in taken]


def time_calls(call, seconds, device):
    """Seconds of each call."""
    taken, start = [], time.perf_counter()
    while len(taken) < 6 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - before)
    return taken


# ---------------------------------------------------------------------------------------------------------------------
# The fit


class Range(NamedTuple):
    """Where the search for a constant starts, and between which bounds it stays."""
    start: float
    low: float
    high: float


FITTED = dict(                     # fields of Hardware; peak: of the precision that is measured
    peak=Range(2e11, 1e9, 1e16), matmul_half=Range(8.0, 1.0, 256.0), tokens_half=Range(16.0, 1.0, 1024.0),
    grouped_efficiency=Range(0.8, 0.1, 1.0), static_expert=Range(3e-5, 1e-7, 1e-3),
    attention_efficiency=Range(0.3, 0.01, 1.0), attention_half=Range(64.0, 1.0, 1024.0),
    bandwidth=Range(1e10, 1e8, 1e13), loss_cached=Range(2.0, 1.0, 16.0),
    static_matmul=Range(3e-5, 1e-6, 1e-3), static_vector=Range(3e-5, 1e-6, 1e-3))


def fit(measurements, seconds, plan, hardware):
    """The hardware with the constants that explain the measured seconds best: least squares of log(simulated/measured).

    One constant after the other is multiplied or divided by a factor. If one of both helps, it stays and the factor
    grows; if none does, the factor is nearer to 1 next time. All factors near 1: no constant alone improves any more.
    """
    def misfit(constants):
        tried, total = with_constants(hardware, plan, constants), 0.0
        for measurement, measured in zip(measurements, seconds):
            total += measurement.weight * math.log(measurement.simulated(plan, tried) / measured)**2
        return total

    constants = {name: limits.start for name, limits in FITTED.items()}
    factors = dict.fromkeys(FITTED, 1.6)
    least = misfit(constants)
    for _ in range(400):
        for name, limits in FITTED.items():
            value, factor = constants[name], factors[name]
            factors[name] = factor**0.5
            for new in (value * factor, value / factor):
                tried = constants | {name: min(max(new, limits.low), limits.high)}
                found = misfit(tried)
                if found < least:
                    constants, least, factors[name] = tried, found, factor**1.5
                    break
        if max(factors.values()) < 1.001:
            break
    return with_constants(hardware, plan, constants)


def with_constants(hardware, plan, constants):
    """hardware with other values of FITTED."""
    others = {name: value for name, value in constants.items() if name != "peak"}
    return replace(hardware, peak={plan.precision: constants["peak"]}, **others)


# ---------------------------------------------------------------------------------------------------------------------
# Links


def measure_links(device):
    """Fields of Hardware: bandwidth and start-up of collectives among a node's ranks and between nodes."""
    world, local = [int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    fields = dict(node_size=local)
    if world == 1:
        print("the links were not measured: under torchrun, with several processes, they are")
        return fields                                      # for plans of one device, which alone sim.py takes then
    parallel.join_world(device, timedelta(minutes=5))
    by_node = torch.arange(world).view(-1, local)
    for tier, groups in ("inner", by_node), ("outer", by_node.T):
        if groups.size(1) > 1:
            group, _ = dist.new_subgroups_by_enumeration(groups.tolist())
            fields |= measure_tier(tier, group, device)
    parallel.leave_world()
    return fields


def measure_tier(tier, group, device):
    """From the time of collectives of hardly any bytes, and of many."""
    ranks, long = dist.get_world_size(group), 2**20
    builders = [partial(collectives, group, elements, device) for elements in (1, long)]
    _, (start_up, seconds) = time_all(builders, 0.0, device)
    sent = 4 * (ranks - 1) * long * BYTES_OF["fp32"]       # of four: an all-reduce sends twice what the others do
    return {f"{tier}_bandwidth": sent / (seconds - start_up), f"{tier}_latency": 0.0, "static_collective": start_up / 4}


def collectives(group, elements, device):
    """Measurement of an all-reduce, an all-to-all and an all-gather, with so many elements for each rank."""
    ranks = dist.get_world_size(group)
    x, y = [torch.ones(elements * ranks, device=device) for _ in range(2)]

    def call():
        dist.all_reduce(x, group=group)
        dist.all_to_all_single(y, x, group=group)
        dist.all_gather(list(y.chunk(ranks)), x[:elements], group=group)
    return Measurement(f"collectives of {elements}", call, ())


# ---------------------------------------------------------------------------------------------------------------------
# The command


def calibrate(out, precision, seconds):
    """Writes a Hardware as JSON to `out` and prints how well it explains what was measured; rank 0 does, for all alike.

    precision: fp32, bf16 or auto, train.py's rule; seconds: of each measurement in each round.
    """
    device = parallel.pick_device()
    if precision == "auto":
        precision = parallel.auto_precision(device)
    framework, fragmentation = measure_memory(precision, device)
    steps = [partial(training_step, small, precision, device) for small in TIMED]
    measurements, measured = time_all(steps + Operators(precision, device).builders(), seconds, device)
    links = measure_links(device)
    if parallel.rank() > 0:
        return
    # bandwidths and peaks are what is reached, not what a data sheet says: so no efficiency beside them
    start = Hardware(f"calibrated {device.type}", {precision: 1e12}, memory_size(device), bandwidth=1e10,
                     matmul_efficiency=1.0, memory_efficiency=1.0, inner_efficiency=1.0, outer_efficiency=1.0,
                     framework=framework, fragmentation=fragmentation, value_padded=device.type == "cpu", **links)
    plan = Plan(precision=precision)
    hardware = fit(measurements, measured, plan, start)
    error = statistics.median(abs(measurement.simulated(plan, hardware) / seconds - 1)
                              for measurement, seconds in zip(measurements, measured))
    hardware = replace(hardware, name=f"{start.name}, {torch.get_num_threads()} threads, {date.today()}, fitted to "
                                      f"{error:.0%}")
    Path(out).write_text(json.dumps(asdict(hardware), indent=1))
    print(f"{out}: {device.type}, {precision}, {torch.get_num_threads()} threads")
    print_fit(measurements, measured, plan, hardware)
    if error > POOR:
        print(f"a measurement is off by {error:.0%} in the median: if other work ran here, run it again without")


def memory_size(device):
    """Bytes."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.accelerator.get_memory_info()[1]


def print_fit(measurements, measured, plan, hardware):
    print(f"{'milliseconds, forward and backward':36}{'measured':>10}{'fitted':>10}{'error':>8}")
    for measurement, seconds in zip(measurements, measured):
        fitted = measurement.simulated(plan, hardware)
        print(f"{measurement.name:36}{seconds * 1e3:10.3f}{fitted * 1e3:10.3f}{fitted / seconds - 1:+8.0%}")
    for name, value in asdict(hardware).items():
        print(f"{name:22} {value}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file of Hardware's fields, for sim.py's --hardware")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="as train.py's")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each of 31 measurements in each of 3 rounds, "
                                                                     "beside what the models take; default: 1")
    args = parser.parse_args(argv)
    require(args.seconds > 0, f"--seconds {args.seconds}: use more than 0")
    require(Path(args.out).absolute().parent.is_dir(), f"--out {args.out}: make its folder first")
    calibrate(args.out, args.precision, args.seconds)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"calibrate.py: {error}", file=sys.stderr)
        sys.exit(2)
