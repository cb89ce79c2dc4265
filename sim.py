"""
Plans, counts, schedules and the clock: what a training step will do, computed without a device.

    python sim.py                                # Pangu Ultra MoE on 6,144 Ascend 910B, the published run beside it
    python sim.py predict --model M --hardware H --devices N --plan tp=8,pp=16,... [--json]
    python sim.py plans --model M --hardware H --devices N --global-batch B
    python sim.py shapes --hardware H --devices N --budget active=39e9,total=718e9
    python sim.py calibrate --out HW.json        # measures this device; --hardware HW.json reads it
    python sim.py validate [ROWS.csv] [--out F.csv] [--fit]    # published runs beside their prediction; the errors
    python sim.py trace --out trace.json         # a timeline for Perfetto or chrome://tracing; --png draws the pipeline

sim.py plans, parallel.py executes: it runs the schedules timed here, sends the bytes and saves the tensors counted
here; tests compare. Nothing here builds a tensor, and nothing here was compared with a run on an NPU.

Units: bytes, seconds, FLOPs (a multiply-add is two) and FLOP/s, unless a name says otherwise.

Modelled: matmuls by local shape and cores, other operators as bytes or arithmetic, a start-up cost of each, collectives
by tier and topology, four streams of a device (compute, links inside the node, between nodes, to the host) with a tax
on what runs side by side, unequal stages, an allocator's loss; replicas are alike. Not modelled: contention between
replicas, the host's own pace, power. The constants are fitted on published runs, by tests/published.py: `validate` says
how far off they are.
"""
import argparse
import contextlib
import importlib.util
import json
import math
import multiprocessing
import re
import signal
import sys
import time
from collections import Counter, defaultdict, namedtuple
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from itertools import chain, combinations, islice, product, zip_longest
from operator import itemgetter
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from model import (PRESETS, Config, Weights, count_params, divisors, flops_per_token, layer_flops, layer_kinds,
                   require, sequences_of_group)

# ---------------------------------------------------------------------------------------------------------------------
# The plan: how a model is cut, what is saved, how it is run

RECOMPUTE = ("norm", "mla_up", "act", "permute", "expert", "core_attention", "attention", "layer")
SWAP = ("expert_out", "attn_out", "optimizer")
BYTES_OF = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2, "mxfp8": 2}    # activations; fp8 is for matmuls alone
NARROW = ("fp8", "mxfp8")          # of matmuls alone
V_SHAPED = ("zbv", "dualpipev")        # schedules in which the first rank holds the last stage too
WITH_PAIRS = ("paired", "dualpipev")   # schedules with pairs: a forward and a backward as one step
GIB = 2**30
PLAN_CHOICES = dict(
    sp=(0, 1), zero=(0, 1, 3), schedule=("1f1b", "interleaved", "paired", "zbv", "dualpipev"),
    overlap=("none", "adaptive"), dispatch=("flat", "hierarchical", "dedup", "pipelined"), precision=tuple(BYTES_OF),
    recompute=RECOMPUTE, swap=SWAP, hide=("tp", "dp", "pp"))


@dataclass(frozen=True)
class Plan:
    """How a model is cut over pp*dp*cp*tp devices and run. check_plan says whether it fits a shape.

    Dense mesh (pp, dp, cp, tp), tp innermost; expert mesh (pp, edp, ep) over the same ranks, ep contiguous: the experts
    of a layer are spread over the tensor group too, never split by it.
    """
    pp: int = 1                    # pipeline ranks
    dp: int = 1                    # data parallel
    cp: int = 1                    # context: a sequence cut over ranks
    tp: int = 1                    # tensor
    sp: int = 0                    # 1: the residual stream is cut along the sequence over the tensor group
    ep: int = 1                    # ranks that share one set of experts
    etp: int = 1                   # ranks that share one expert's matrices; more than 1 is simulated, not run
    vpp: int = 1                   # model chunks per pipeline rank
    node_size: int = 8             # devices of a node: the reach of the fast links
    micro_batch: int = 1           # sequences
    global_batch: int = 1          # sequences of one optimizer step
    seq_len: int = 1024            # tokens
    zero: int = 1                  # 0 replicated | 1 masters and optimizer states cut over data ranks | 3 everything
    schedule: str = ""             # 1f1b | interleaved | paired | zbv | dualpipev; "": paired if overlap, else by vpp
    overlap: str = "none"          # a pair of forward and backward runs: none (one by one) | adaptive (interleaved)
    hide: tuple = ()               # collectives beside computation: any of tp, dp, pp; simulated, not run
    # the experts' exchange: flat | hierarchical | dedup | pipelined, which is dedup with both hops at once (DeepEP;
    # simulated, not run)
    dispatch: str = "flat"
    recompute: tuple = ()          # any of RECOMPUTE: what the backward computes again
    swap: tuple = ()               # any of SWAP: what waits in the host's memory
    layer_split: tuple = ()        # hidden layers of each of the pp*vpp stages; (): evenly by FLOPs
    precision: str = "bf16"
    balance_live: int = 0          # steps between decisions on expert placement; 0: fixed experts
    balance_threshold: float = 0.08   # migrate if the deviation of device loads falls by this share of their mean
    balance_replicas: int = 0      # extra copies of hot experts per rank

    def __post_init__(self):
        for name in ("recompute", "swap", "layer_split", "hide"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.schedule:
            plain = "1f1b" if self.vpp == 1 else "interleaved"
            object.__setattr__(self, "schedule", "paired" if self.overlap == "adaptive" else plain)

    world_size = property(lambda self: self.pp * self.dp * self.cp * self.tp)
    n_stages = property(lambda self: self.pp * self.vpp)
    # micro-batches of one step on each replica
    n_micro = property(lambda self: self.global_batch // (self.dp * self.micro_batch))
    # micro-batches after which interleaved chunks take turns
    turn = property(lambda self: self.n_micro // max(1, self.n_micro // self.pp))
    # ranks of an expert group inside one node; ep // inner nodes form the outer group
    inner = property(lambda self: min(self.ep, max(1, self.node_size // self.etp)))
    # micro-batches one after the other, without stages, pairs or deferred weight gradients
    is_plain = property(lambda self: self.pp == self.vpp == 1 and self.schedule == "1f1b")
    # ranks that hold the same experts
    edp = property(lambda self: max(1, self.dp * self.cp * self.tp // (self.ep * self.etp)))
    # axis -> ranks that hold the same weights: dp those of dense parts, edp those of experts
    holders = property(lambda self: dict(dp=self.dp * self.cp, edp=self.edp))
    # tokens of one micro-batch in the matmuls that the tensor group cuts
    gathered_tokens = property(lambda self: self.micro_batch * self.seq_len // self.cp)
    # those on a rank's residual stream, which it sends to experts
    tokens = property(lambda self: self.gathered_tokens // (self.tp if self.sp else 1))

    # first and last stage are on different ranks, and where both read the embedding, both hold it
    embedding_twice = property(lambda self: self.homes()[self.n_stages - 1] != 0)

    def stages_of(self, rank):
        """Stages that a pipeline rank holds: V-shaped for zbv and dualpipev, else round robin."""
        if self.schedule in V_SHAPED:
            return [rank, 2 * self.pp - 1 - rank]
        return [chunk * self.pp + rank for chunk in range(self.vpp)]

    def hidden_share(self, axis, hardware):
        """Share of the time of an axis' collectives (tp, dp or pp) that runs beside computation."""
        return (1.0 if axis == "pp" else hardware.hidden_share) * (axis in self.hide)

    def homes(self):
        """Stage -> the pipeline rank that holds it."""
        return {stage: rank for rank in range(self.pp) for stage in self.stages_of(rank)}


def plan_value(name, text):
    """Text of the command line -> a value for this field of Plan; items of a list are joined by , or +."""
    kind = {field.name: field.type for field in fields(Plan)}[name]
    if kind is tuple:
        return tuple(int(item) if item.isdigit() else item for item in re.split("[,+]", text) if item)
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}={text!r}: write a value of type {kind.__name__}") from None


def parse_plan(text, **defaults):
    """Plan from `tp=8,pp=16,recompute=act,permute,layer_split=2+2+1`; ValueError for what it cannot read."""
    names, texts, name = [field.name for field in fields(Plan)], {}, ""
    for item in text.split(",") if text else ():
        if "=" in item:
            name, _, texts[name] = item.partition("=")
        else:                                              # a list goes on
            require(name, f"plan {text!r}: write key=value,...")
            texts[name] += "," + item
    for unknown in sorted(set(texts) - set(names)):
        raise ValueError(f"unknown plan key {unknown!r}: use one of {', '.join(names)}")
    return Plan(**dict(defaults) | {name: plan_value(name, value) for name, value in texts.items()})


def has_experts(config):
    return set(layer_kinds(config)) != {"dense"}


def check_plan(config, plan, hardware=None, devices=None):
    """ValueError, in one line with the numbers and what would fit, for a plan that cannot run this shape here."""
    for name, allowed in PLAN_CHOICES.items():
        value, use = getattr(plan, name), "use one of " + ", ".join(map(str, allowed))
        if isinstance(value, tuple):
            unknown = set(value) - set(allowed)
            require(not unknown, f"{name}={'+'.join(map(str, unknown))}: {use.replace('one', 'any', 1)}")
        else:
            require(value in allowed, f"{name}={value!r}: {use}")
    for name in ("pp", "dp", "cp", "tp", "ep", "etp", "vpp", "node_size", "micro_batch", "global_batch", "seq_len"):
        require(getattr(plan, name) >= 1, f"{name}={getattr(plan, name)}: must be at least 1")
    check_cuts(config, plan)
    check_layers(config, plan)
    check_grid(plan, hardware, devices)
    check_schedule(plan)
    check_live(config, plan)


def check_cuts(config, plan):
    """What is cut must be whole on every rank: heads, widths, experts, the sequence, the batch, groups of balance."""
    c, moe, replica = config, has_experts(config), plan.dp * plan.micro_batch
    shared = c.n_shared_experts * c.moe_intermediate_size if moe else plan.tp
    for name, what, total in (
            ("tp", "num_attention_heads", c.num_attention_heads), ("tp", "intermediate_size", c.intermediate_size),
            ("tp", "vocab_size", c.vocab_size), ("tp", "width of the shared experts", shared),
            ("ep", "n_routed_experts" if moe else "experts of a dense model", c.n_routed_experts if moe else 1),
            ("ep", "dp*cp*tp", plan.dp * plan.cp * plan.tp // plan.etp)):
        value = getattr(plan, name)
        if total % value:
            raise ValueError(f"{name}={value} does not divide {what}={total}: use one of {divisors(total)[:16]}")
    require(not moe or plan.tp == 1 or plan.sp,
            f"tp={plan.tp} with sp=0 would send each token to its experts {plan.tp} times: use sp=1")
    require(plan.seq_len <= c.max_position_embeddings,
            f"seq_len={plan.seq_len} above max_position_embeddings={c.max_position_embeddings}: use at most that")
    # two slices for each rank of a context group, so that causal work is even
    slices = math.lcm(2 * plan.cp if plan.cp > 1 else 1, plan.cp * plan.tp if plan.sp else 1)
    for name, unit, what in (("seq_len", slices, f"{slices}, which cp={plan.cp} tp={plan.tp} sp={plan.sp} need"),
                             ("global_batch", replica, f"dp*micro_batch={replica}")):
        value = getattr(plan, name)
        require(value % unit == 0, f"{name}={value} is not a multiple of {what}: use {max(1, value // unit) * unit}")
    size, own = balance_group(c, plan), plan.micro_batch
    fitting = sorted({*divisors(own), *(own * d for d in divisors(plan.dp))})
    require(size in fitting, f"balance_group={size} sequences does not divide micro_batch*dp={own}*{plan.dp} into "
                             f"whole micro-batches: use one of {fitting[:16]}")


def check_layers(config, plan):
    layers, stages, split = config.num_hidden_layers, plan.n_stages, plan.layer_split
    require(stages <= layers + 1, f"pp*vpp={stages} stages for {layers} layers and the head: use at most {layers + 1}")
    require(not split or (len(split) == stages and sum(split) == layers),
            f"layer_split has {len(split)} stages with {sum(split)} layers: needs pp*vpp={stages} with {layers}")
    require(min(split[1:-1], default=1) > 0, f"layer_split={'+'.join(map(str, split))}: a stage between the first and "
                                             f"the last needs at least one layer")


def check_grid(plan, hardware, devices):
    ep, node, rest = plan.ep, plan.node_size, plan.pp * plan.cp * plan.tp
    require(ep % node == 0 or node % ep == 0, f"node_size={node} and ep={ep}: one must divide the other, use ep of "
                                              f"{divisors(node)} or a multiple of {node}")
    if devices is not None:
        fit = f"use dp={devices // rest}" if devices % rest == 0 else f"use pp*cp*tp among {divisors(devices)}"
        require(plan.world_size == devices, f"pp*dp*cp*tp={plan.pp}*{plan.dp}*{plan.cp}*{plan.tp}={plan.world_size} "
                                            f"for {devices} devices: {fit}")
    if hardware is not None:
        require(node <= hardware.node_size,
                f"node_size={node}: {hardware.name} has nodes of {hardware.node_size}, use at most that")
        require(plan.precision in hardware.peak, f"precision={plan.precision}: {hardware.name} has no peak for it, "
                                                 f"use one of {', '.join(hardware.peak)}")


def check_live(config, plan):
    live, replicas, own = plan.balance_live, plan.balance_replicas, config.n_routed_experts // plan.ep
    require(live == 0 or plan.ep > 1, f"balance_live={live} moves experts between ranks, ep={plan.ep}: use ep above 1")
    require(live or not replicas, f"balance_replicas={replicas} are placed by live balance: use balance_live above 0")
    require(0 <= replicas <= own, f"balance_replicas={replicas} beside {own} experts of a rank: use 0 to {own}")
    cuts_inside = plan.zero == 0 or config.hidden_size % plan.edp == 0 or config.moe_intermediate_size % plan.edp == 0
    require(live == 0 or cuts_inside,
            f"zero={plan.zero} over {plan.edp} ranks would cut between experts, which then cannot move: use zero=0")
    require(not replicas or (plan.pp == 1 and plan.schedule == "1f1b"),
            f"balance_replicas={replicas} with pp={plan.pp} schedule={plan.schedule}, which defer weight gradients: "
            "use pp=1 and schedule=1f1b")
    require(not replicas or config.capacity_factor == 0,
            f"capacity_factor={config.capacity_factor} drops by expert, not by copy: use balance_replicas=0")


def balance_group(config, plan):
    """Sequences in one group of the balance loss: Config.balance_group, or what `balance` means under this plan."""
    if config.balance_group:
        return config.balance_group
    replicas = max(1, plan.ep // (plan.cp * plan.tp))      # data ranks inside one expert group
    return dict(none=1, sequence=1, micro_batch=plan.micro_batch, ep_group=plan.micro_batch * replicas,
                dp_group=plan.micro_batch * plan.dp)[config.balance]


def balance_ranks(config, plan):
    """Ranks that share the counts of the balance loss: those that hold parts of one group, one after the other."""
    return max(1, balance_group(config, plan) // plan.micro_batch) * plan.cp * plan.tp


def check_schedule(plan):
    n, pp, name, once = plan.n_micro, plan.pp, plan.schedule, plan.dp * plan.micro_batch
    need = {"1f1b": 1, "zbv": 2, "dualpipev": 2}.get(name, plan.vpp)
    require(plan.vpp == need, f"schedule={name} needs vpp={need}, not vpp={plan.vpp}: use vpp={need} or interleaved")
    require(plan.overlap == "none" or name in WITH_PAIRS,
            f"overlap=adaptive needs pairs of forward and backward, schedule={name} has none: use paired or dualpipev")
    least = {"1f1b": pp, "dualpipev": 2 * pp}.get(name, 1)
    require(n >= least, f"schedule={name} with pp={pp} needs {least} micro-batches, the plan has {n}: use global_batch="
                        f"{least * once}")
    rounds = max(1, n // pp) if name in ("interleaved", "paired") else 1
    require(n % rounds == 0, f"schedule={name} cannot run {n} micro-batches in {rounds} equal rounds of at least "
                             f"pp={pp}: use global_batch={n // pp * pp * once}")


# ---------------------------------------------------------------------------------------------------------------------
# Bytes of the expert exchange

INDEX_BYTES = 8                    # expert numbers and split sizes travel as int64


def exchange_bytes(config, plan, ids=None):
    """Bytes sent by each rank of one expert group for one MoE layer and one micro-batch, own rank excluded.

    Returns {"forward" | "backward": {"inner" | "outer": [one per rank]}}: inner within a node, outer between nodes,
    dispatch and combine together. ids (ep, N, K): the experts chosen on each rank; None: what uniform routing expects.

    What travels: rows of C values, weights (one value in the rows' dtype), expert numbers and counts (int64).

        flat          forward   the counts of the receiver's experts; row and weight of each copy; rows back
                      backward  rows out; rows and weight gradients back
        hierarchical  forward   outer: all-gather of rows, K weights, K numbers; reduce-scatter of rows back
                      backward  outer: all-gather of rows; reduce-scatter of rows and of K weight gradients
                      inner: as flat, with the copies for experts of this node
        dedup         forward   outer: to each peer the count of tokens that come and those of its node's experts; row,
                      K weights, K numbers of each token that needs the peer's node; rows back
                      backward  outer: rows out; rows and K weight gradients back
                      inner: as flat, with the copies for experts of this node
    """
    e, k = BYTES_OF[plan.precision], config.num_experts_per_tok
    row, counts = e * config.hidden_size, INDEX_BYTES * config.n_routed_experts // plan.ep
    node_counts = INDEX_BYTES + counts * plan.inner if plan.dispatch in ("dedup", "pipelined") else 0
    rows = _expected_rows(config, plan) if ids is None else _routed_rows(config, plan, ids)
    sent = {way: {tier: [0] * plan.ep for tier in ("inner", "outer")} for way in ("forward", "backward")}
    pairs = [(*pair, 1) for pair in product(range(plan.ep), repeat=2)] if ids is not None else _pairs_of_first(plan)
    for source, peer, times in pairs:
        inside, same_place = source // plan.inner == peer // plan.inner, source % plan.inner == peer % plan.inner
        by_expert = inside or plan.dispatch == "flat"      # else a token crosses once, with all of its choices
        if source == peer or not (by_expert or same_place):
            continue
        tier, there, back = "inner" if inside else "outer", rows[source, peer], rows[peer, source]
        weights = e if by_expert else k * e
        first = counts if by_expert else node_counts + there * k * INDEX_BYTES
        sent["forward"][tier][source] += times * (first + there * (row + weights) + back * row)
        sent["backward"][tier][source] += times * (there * row + back * (row + weights))
    if ids is None:
        sent = {way: {tier: each[:1] * plan.ep for tier, each in tiers.items()} for way, tiers in sent.items()}
    return sent


def copied_bytes(config, plan):
    """Bytes by tier that a rank sends of hot experts' weights to their copies, in a layer's forward or backward."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size * BYTES_OF[plan.precision]
    whole = plan.ep == plan.inner                          # else all are taken to cross between nodes
    return dict(inner=plan.balance_replicas * expert * whole, outer=plan.balance_replicas * expert * (not whole))


def _expected_rows(config, plan):
    """{(source, peer): rows that go from one to the other}, as _routed_rows, under uniform routing, for the first."""
    experts, k, nodes = config.n_routed_experts, config.num_experts_per_tok, plan.ep // plan.inner
    copies = plan.tokens * k / (plan.ep if plan.dispatch == "flat" else plan.inner)
    missed = 0.0
    if plan.dispatch in ("dedup", "pipelined"):
        missed = math.comb(experts - experts // nodes, k) / math.comb(experts, k)
    if config.n_group == nodes and config.group_choice == "limited":       # a token goes to topk_group nodes at most
        missed = max(missed, 1 - config.topk_group / nodes)
    crossing = copies if plan.dispatch == "flat" else plan.tokens * (1 - missed)
    pairs = [pair for source, peer, _ in _pairs_of_first(plan) for pair in ((source, peer), (peer, source))]
    return {pair: copies if max(pair) < plan.inner else crossing for pair in pairs}


def _pairs_of_first(plan):
    """(0, peer, peers like it): ranks of a uniform group are alike, so the first speaks for all.

    Peers: in its node, at its place of another node, elsewhere in another node.
    """
    beside, nodes = plan.inner - 1, plan.ep // plan.inner - 1
    pairs = (0, 1, beside), (0, plan.inner, nodes), (0, plan.inner + 1, beside * nodes)
    return [pair for pair in pairs if pair[2]]


def _routed_rows(config, plan, ids):
    """Flat: a row for each choice, to its expert. Else a row for each token to its place on the other nodes, with dedup
    on those that it needs, and from there, a rank that then forwards, a row for each choice."""
    rows, nodes = Counter(), range(plan.ep // plan.inner)
    for source, token in ((source, token) for source, tokens in enumerate(ids) for token in tokens):
        owners = [int(expert) * plan.ep // config.n_routed_experts for expert in token]
        forwarders = [node * plan.inner + source % plan.inner for node in nodes]
        if plan.dispatch == "flat":
            rows.update((source, owner) for owner in owners)
            continue
        needed = {owner // plan.inner for owner in owners} if plan.dispatch == "dedup" else nodes
        rows.update((source, forwarders[node]) for node in needed if forwarders[node] != source)
        rows.update((forwarders[owner // plan.inner], owner) for owner in owners)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Live load balance: which device holds which expert
#
# A placement is an array (devices, slots) of expert numbers. The first E / devices slots of a device are homes: an
# expert has one, its weights and optimizer state live there. Further slots hold copies of hot experts, which share
# their load.

PREDICTOR_DECAY = 0.9      # a step, of the moving average of loads (recipe of MindSpeed; the paper's is not published)
NEAR_ENOUGH = 1e-3         # busiest device over the mean, minus one, below which no better placement is looked for
TRIES = 32                 # starts of the planner's search


def predict_load(past, load):
    """The load expected next, from what was expected and what came: (..., E), arrays or tensors. Starts from zeros."""
    return PREDICTOR_DECAY * past + (1 - PREDICTOR_DECAY) * load


def first_placement(n_experts, plan):
    """(ep, slots): experts in order; the copies, until loads are known, are of the next device's first experts."""
    homes = np.arange(n_experts).reshape(plan.ep, -1)
    return np.concatenate((homes, np.roll(homes, -1, 0)[:, :plan.balance_replicas]), 1)


def count_copies(placement, n_experts):
    """(E,) how often each expert stands in a placement, whose free slots are -1."""
    return np.bincount(placement[placement >= 0], minlength=n_experts)


def device_loads(load, placement):
    """load (E,) -> (devices,)."""
    return (load / count_copies(placement, len(load)))[placement].sum(1)


def imbalance(load, placement):
    """The busiest device's load over the mean, minus one."""
    loads = device_loads(load, placement)
    return loads.max() / loads.mean() - 1


def place_greedily(load, devices, replicas=0, homes=None):
    """The paper's greedy: experts by falling load, each to the least loaded device with a free slot.

    With replicas, the hottest experts are first given further copies, and a device never gets the same expert twice.
    homes (devices, E / devices), if given, are kept: only the copies are placed.
    """
    n_homes = len(load) // devices
    copies = np.ones(len(load), int)
    for _ in range(devices * replicas):
        copies[np.where(copies < devices, load / copies, -1).argmax()] += 1
    share = load / copies
    placement = np.full((devices, n_homes + replicas), -1)
    if homes is not None:
        placement[:, :n_homes] = homes
    for expert in np.argsort(-share, kind="stable"):
        if homes is None:
            _put(placement, slice(n_homes), expert, share)
        for _ in range(copies[expert] - 1):
            _put(placement, slice(n_homes, None), expert, share)
    for device, slot in np.argwhere(placement < 0):        # no device without this expert was left for some copy
        wanted = load / count_copies(placement, len(load))
        wanted[placement[device]] = -1
        placement[device, slot] = wanted.argmax()
    return placement


def _put(placement, columns, expert, share):
    """Expert to a free slot of the least loaded device that has one, and that does not hold this expert."""
    slots = placement[:, columns]
    possible = (slots < 0).any(1) & (placement != expert).all(1)
    if possible.any():
        loads = np.where(placement >= 0, share[placement], 0).sum(1)
        device = np.where(possible, loads, np.inf).argmin()
        slots[device, (slots[device] < 0).argmax()] = expert


def _best_swap(share, placement, columns):
    """Swap an expert of the busiest device with one elsewhere, so that the busier has least. False: no swap helps."""
    loads = share[placement].sum(1)                                       # (devices,)
    busiest = loads.argmax()
    mine, theirs = placement[busiest, columns], placement[:, columns]     # (slots,), (devices, slots)
    shift = share[mine][:, None, None] - share[theirs]                    # (slots, devices, slots)
    after = np.maximum(loads[busiest] - shift, loads[:, None] + shift)
    holds = (placement[:, :, None] == np.arange(len(share))).any(1)       # (devices, E)
    after = np.where(holds[:, mine].T[:, :, None] | holds[busiest][theirs], np.inf, after)
    i, device, j = np.unravel_index(after.argmin(), after.shape)
    if after[i, device, j] >= loads[busiest] * (1 - 1e-9):
        return False
    theirs[device, j], placement[busiest, columns][i] = mine[i], theirs[device, j]
    return True


def _refined(load, placement, n_homes, goal):
    """Swaps until the busiest device has at most `goal` or no swap helps: homes with homes, copies with copies."""
    placement, share = placement.copy(), load / count_copies(placement, len(load))
    kinds = [slice(n_homes), slice(n_homes, None)][:1 + (placement.shape[1] > n_homes)]
    while share[placement].sum(1).max() > goal and any(_best_swap(share, placement, columns) for columns in kinds):
        pass
    return placement


def _kicked(homes, random):
    """homes with two random pairs of experts swapped: a new start near a placement that no single swap improves."""
    flat = homes.flatten()
    for _ in range(2):
        pair = random.choice(len(flat), 2, replace=False)
        flat[pair] = flat[pair[::-1]]
    return flat.reshape(homes.shape)


def plan_placement(load, current):
    """A placement for the predicted load (E,), never worse than `current` by its busiest device.

    A search by swaps from where experts are, so that few move; if that is not near the mean, then from the paper's
    greedy and from random changes of the best so far. Experts that stay on their device stay in their slot.
    """
    def busiest(placement):
        return device_loads(load, placement).max()

    devices, n_homes = len(current), len(load) // len(current)
    replicas = current.shape[1] - n_homes
    goal, random = _goal(load, devices, replicas), np.random.default_rng(0)
    best = current
    for attempt in range(TRIES):
        homes = best[:, :n_homes]
        if attempt == 1:
            homes = None                                   # the greedy places them too
        elif attempt > 1:
            homes = _kicked(homes, random)
        start = place_greedily(load, devices, replicas, homes)
        best = min(best, _refined(load, start, n_homes, goal), key=busiest)
        if busiest(best) <= goal:
            break
    return _in_old_slots(best, current, n_homes)


def _goal(load, devices, replicas):
    """A busiest device with this needs no better: hardly above the mean, or the hottest expert with the lightest."""
    beside = np.sort(load)[:len(load) // devices - 1].sum()
    return max(load.mean() * len(load) / devices, 0 if replicas else load.max() + beside) * (1 + NEAR_ENOUGH)


def _in_old_slots(placement, current, n_homes):
    kept = placement.copy()
    for new, old in zip(kept[:, :n_homes], current[:, :n_homes]):
        arriving, stays = new[~np.isin(new, old)], np.isin(old, new)
        new[stays], new[~stays] = old[stays], arriving
    return kept


def decide(load, current, plan):
    """The planned placement; the current one where std / mean of the devices' loads would not fall by the threshold."""
    def deviation(placement):
        loads = device_loads(load, placement)
        return loads.std(ddof=1) / loads.mean()

    planned = plan_placement(load, current)
    return planned if deviation(current) - deviation(planned) >= plan.balance_threshold else current


def moved_experts(old, new, n_experts):
    """How many experts change their home device."""
    n_homes = n_experts // len(old)
    return int((~(new[:, :n_homes, None] == old[:, None, :n_homes]).any(2)).sum())


def replay_loads(loads, plan):
    """Recorded loads (steps, layers, E) under a plan: the devices' imbalance without and with live balance, a mean
    over layers and steps from the first decision on, and homes moved. A placement is made from earlier steps alone.
    """
    steps, layers, n_experts = loads.shape
    first = first_placement(n_experts, replace(plan, balance_replicas=0))
    placements = [first_placement(n_experts, plan)] * layers
    expected, moved, found = np.zeros((layers, n_experts)), 0, []
    for step, load in enumerate(loads):
        if plan.balance_live and step and step % plan.balance_live == 0:
            planned = [decide(*layer, plan) for layer in zip(expected, placements)]
            moved += sum(moved_experts(*pair, n_experts) for pair in zip(placements, planned))
            placements = planned
        if step >= plan.balance_live:
            found.append([(imbalance(each, first), imbalance(each, now)) for each, now in zip(load, placements)])
        expected = predict_load(expected, load)
    fixed, live = np.mean(found, (0, 1))
    return dict(fixed=float(fixed), live=float(live) if plan.balance_live else float(fixed), moved=moved)


# ---------------------------------------------------------------------------------------------------------------------
# Counts: operators, parameters, saved tensors and collectives of one layer and one micro-batch on one rank; stages


@dataclass(frozen=True)
class Shape(Config):
    """What is counted: a Config, or a model that no Config describes (other attention, ungated MLP, no experts)."""
    rope_scaling: dict = field(default=None, hash=False)
    attn_type: str = "mla"                 # mla | gqa | mha
    num_key_value_heads: int = 0           # gqa: heads of keys and values
    head_dim: int = 0                      # gqa, mha
    gated_mlp: bool = True                 # three matrices (SwiGLU), or two
    window: int = 0                        # keys that a query sees, 0: all before it
    # flash | portable: of no vendor, as FlashAttention-2 or Triton's | unfused: the whole square of scores is kept
    attn_kernel: str = "flash"
    value_padded: bool = False             # the attention kernel wants values as wide as keys
    # memory as in Megatron-LM and its kin: logits are kept, a rank's own part of gathered inputs, 8 bits of what 8-bit
    # matmuls read
    megatron: bool = False

    def __post_init__(self):               # not Config's checks, which are of models that model.py builds
        pass

    def attention_matmuls(self):
        if self.attn_type == "mla":
            return super().attention_matmuls()
        queries, values = self.attention_widths()
        keys = (self.num_key_value_heads or self.num_attention_heads) * self.head_dim
        return dict(qkv_proj=Weights(self.hidden_size, queries + 2 * keys), o_proj=Weights(values, self.hidden_size))

    def mlp_matmuls(self, name, inner, copies=1, used=1):
        table = super().mlp_matmuls(name, inner, copies, used)
        up = table[f"{name}.gate_up"]
        return table if self.gated_mlp else table | {f"{name}.gate_up": up._replace(n_out=inner)}

    def attention_widths(self):
        if self.attn_type == "mla":
            return super().attention_widths()
        return (self.num_attention_heads * self.head_dim,) * 2

    def gains(self, kind):
        latents = 0 if self.attn_type == "mla" else self.q_lora_rank + self.kv_lora_rank
        return super().gains(kind) - latents


def as_shape(config):
    return config if isinstance(config, Shape) else Shape(**vars(config))


def on_hardware(config, hardware):
    shape = as_shape(config)
    return replace(shape, value_padded=True) if hardware.value_padded else shape


# part: the block's call it belongs to: attend (with routing), shared, experts or combine. kind: matmul | vector |
# flash | unfused. flops: forward; each half of a matmul's backward has as many. moved: bytes read and written.
# sizes: of a matmul (rows, inner, columns, matrices that share the rows)
Op = namedtuple("Op", "part name kind flops moved sizes", defaults=((),))


class Work:
    """What a layer, the embedding or the head is for one rank and one micro-batch. kind: one of layer_kinds, or these.

    Below the recorders, each part of the model is a method that records what the part is.
    """

    def __init__(self, shape, plan, kind):
        self.shape, self.plan, self.kind = shape, plan, kind
        self.element, self.wide = BYTES_OF[plan.precision], max(4, BYTES_OF[plan.precision])
        self.ops = []
        self.saved = {}                                    # tensor -> bytes kept for backward
        self.params = Counter(dp=0, edp=0)                 # held by this rank, by the axis of Plan.holders
        self.sent = Counter()                              # (axis, part) -> bytes sent in that group, forward
        {"embedding": self.embedding, "head": self.head}.get(kind, self.layer)()

    def matmul(self, part, name, m, k, n, keep=None, experts=0):
        """(m, k) by (k, n), whose input is kept under the name `keep`; experts: so many matrices share the m rows."""
        matrices = max(1, experts)
        moved = self.element * (m * k + matrices * k * n + m * n)
        self.ops.append(Op(part, name, "matmul", 2 * m * k * n, moved, (m, k, n, matrices)))
        self.params["edp" if experts else "dp"] += matrices * k * n
        if keep:
            self.keep(keep, m * k)
        if keep and self.shape.megatron:
            shard = self.plan.tp if self.plan.sp and keep in ("attn_in", "mlp_in") else 1
            self.saved[keep] = self.saved[keep] / shard / (2 if self.plan.precision in NARROW else 1)

    def vector(self, part, name, elements):
        """An operator that only moves memory: elements read and written."""
        self.ops.append(Op(part, name, "vector", 0, elements * self.element))

    def norm(self, part, name, tokens, width, residual=False):
        """residual: followed by the sum with the residual stream, which is read and written too."""
        self.vector(part, name, (5 if residual else 2) * tokens * width)
        self.params["dp"] += width
        self.keep(name, tokens * width)                    # its input ...
        self.saved[name + ".scale"] = tokens * self.wide   # ... and 1 / rms of each token

    def keep(self, name, elements):
        self.saved[name] = elements * self.element

    def gather(self, axis, part, tokens, width):
        """All-gather of each rank's `tokens`, or the reduce-scatter that is as long; an all-reduce is both."""
        self.sent[axis, part] += (getattr(self.plan, axis) - 1) * tokens * width * self.element

    def gather_stream(self, part):
        """Residual stream to all tokens and the result back (sp=1), or the all-reduce of the result (sp=0)."""
        self.gather("tp", part, 2 * self.plan.gathered_tokens / self.plan.tp, self.shape.hidden_size)

    def embedding(self):
        c, plan = self.shape, self.plan
        self.vector("attend", "embed_tokens", 2 * plan.tokens * c.hidden_size)
        self.params["dp"] = c.vocab_size // plan.tp * c.hidden_size
        self.look_up()
        self.saved["token_ids"] = plan.gathered_tokens * 8

    def look_up(self):
        """Sums of what tensor ranks found; and token numbers (int64) gathered, in forward alone: half in each pass."""
        plan, width = self.plan, self.shape.hidden_size + 8 / 2 / self.element
        self.gather("tp", "attend", plan.gathered_tokens / plan.tp, width)

    def layer(self):
        c, own, sandwich = self.shape, self.plan.tokens, self.shape.norm != "pre"
        self.norm("attend", "input_layernorm", own, c.hidden_size, residual=not sandwich)
        (self.latent_attention if c.attn_type == "mla" else self.plain_attention)()
        if sandwich:
            self.norm("attend", "post_attention_layernorm", own, c.hidden_size, residual=True)
        self.norm("attend", "pre_mlp_layernorm", own, c.hidden_size, residual=not sandwich)
        if self.kind == "dense":
            self.mlp("experts", "mlp", c.intermediate_size)
        else:
            self.experts()
        if sandwich:
            self.norm("combine", "post_mlp_layernorm", own, c.hidden_size, residual=True)
        if self.kind == "mtp":
            self.join()

    def latent_attention(self):
        """Latents are made from a rank's own tokens by whole matrices, then gathered; heads are cut by tensor ranks."""
        c, plan = self.shape, self.plan
        own, tokens, heads = plan.tokens, plan.gathered_tokens, c.num_attention_heads // plan.tp
        keys = tokens * plan.cp                            # of the whole sequence, on each rank of a context group
        qk, latent = c.qk_nope_head_dim + c.qk_rope_head_dim, c.kv_lora_rank + c.qk_rope_head_dim
        self.matmul("attend", "q_a_proj", own, c.hidden_size, c.q_lora_rank, keep="attn_in")
        self.norm("attend", "q_a_layernorm", own, c.q_lora_rank)
        self.matmul("attend", "kv_a_proj_with_mqa", own, c.hidden_size, latent)    # the same input
        self.norm("attend", "kv_a_layernorm", own, c.kv_lora_rank)
        self.keep("kv_a_layernorm", own * latent)              # its input is a slice, which keeps the whole tensor
        if plan.sp:
            self.gather("tp", "attend", own, c.q_lora_rank + latent)
        self.gather("cp", "attend", tokens, latent)
        # what was gathered is kept: making norms again is no way to it
        q, kv = "gathered_q" if tokens > own else "q", "gathered_kv" if keys > own else "kv"
        self.matmul("attend", "q_b_proj", tokens, c.q_lora_rank, heads * qk, keep=f"{q}_latent")
        up = heads * (c.qk_nope_head_dim + c.v_head_dim)
        self.matmul("attend", "kv_b_proj", keys, c.kv_lora_rank, up, keep=f"{kv}_latent")
        self.vector("attend", "rope", 2 * (tokens + keys) * heads * qk)        # queries and keys, read and written
        if "mla_up" in plan.recompute and plan.cp == 1:
            self.keep("k_rope", keys * c.qk_rope_head_dim)     # what keys are made from again
        self.core_attention(heads, heads, qk, c.v_head_dim)
        self.gather("tp", "attend", (1 if plan.sp else 2) * tokens / plan.tp, c.hidden_size)

    def plain_attention(self):
        c, plan = self.shape, self.plan
        tokens, heads = plan.gathered_tokens, c.num_attention_heads // plan.tp
        kv_heads = max(1, (c.num_key_value_heads or c.num_attention_heads) // plan.tp)
        self.gather_stream("attend")
        self.matmul("attend", "qkv_proj", tokens, c.hidden_size, (heads + 2 * kv_heads) * c.head_dim, keep="attn_in")
        self.gather("cp", "attend", tokens, 2 * kv_heads * c.head_dim)
        self.vector("attend", "rope", 2 * tokens * (heads + kv_heads) * c.head_dim)
        self.core_attention(heads, kv_heads, c.head_dim, c.head_dim)

    def core_attention(self, heads, kv_heads, qk, v):
        """Scores, softmax, values, output projection. A context group's keys are on every one of its ranks."""
        c, plan = self.shape, self.plan
        tokens, keys = plan.gathered_tokens, plan.gathered_tokens * plan.cp
        scores, padded = tokens * plan.seq_len * heads, qk if c.value_padded else v
        moved = tokens * heads * (qk + v) + keys * kv_heads * (qk + v)
        flops, sizes = 2 * scores * (qk + v), (tokens, (qk + v) // 2, plan.seq_len, heads * plan.micro_batch)
        self.keep("q", tokens * heads * qk)
        self.keep("k", keys * kv_heads * qk)
        self.keep("v", keys * kv_heads * padded)
        if c.attn_kernel == "unfused":
            self.vector("attend", "attention", 7 * scores)     # written, scaled and masked, softmax, dropout, read
            self.keep("probabilities", scores)
        else:
            flops *= min(0.5, (c.window or plan.seq_len) / plan.seq_len)   # the causal half
            self.saved["log_sum"] = tokens * heads * self.wide
        if plan.cp > 1:                                        # pieces of a ring are merged one by one, in float32
            self.vector("attend", "attention", 4 * (plan.cp - 1) * tokens * heads * v * self.wide / self.element)
        if padded != v:
            self.keep("attn_padded", tokens * heads * padded)
        self.ops.append(Op("attend", "attention", c.attn_kernel, flops, moved * self.element, sizes))
        self.matmul("attend", "o_proj", tokens, heads * v, c.hidden_size, keep="attn_out")

    def mlp(self, part, name, inner):
        """SwiGLU, its inner width cut by tensor ranks. Gate and up count as one matmul."""
        c, plan = self.shape, self.plan
        tokens, inner, into = plan.gathered_tokens, inner // plan.tp, 2 if c.gated_mlp else 1
        self.gather_stream(part)
        keep = "mlp_in" if plan.tp == 1 else name + "_gathered"
        self.matmul(part, name + ".gate_up", tokens, c.hidden_size, into * inner, keep=keep)
        self.vector(part, name + ".act", (into + 1) * tokens * inner)
        self.keep(name + "_gate_up", into * tokens * inner)
        self.matmul(part, name + ".down", tokens, inner, c.hidden_size, keep=name + "_hidden")

    def experts(self):
        """Router, permutation, shared and routed experts. A rank computes as many rows as it sends, on average."""
        c, plan, own, inner = self.shape, self.plan, self.plan.tokens, self.shape.moe_intermediate_size
        rows = math.ceil(own * c.num_experts_per_tok * (c.capacity_factor or 1))
        self.route()
        if plan.etp > 1:                                       # rows of all that share an expert, a part of its width
            self.gather("etp", "experts", 2 * rows, c.hidden_size)
            rows, inner = rows * plan.etp, inner // plan.etp
        self.vector("attend", "permute", (own + rows) * c.hidden_size)
        self.saved["order"] = rows * 8 if plan.ep > 1 else 0   # of rows as they arrive
        if c.n_shared_experts:
            self.mlp("shared", "shared", c.n_shared_experts * c.moe_intermediate_size)
        self.routed_experts(rows, inner)
        self.vector("combine", "unpermute", (rows + 2 * own) * c.hidden_size)

    def route(self):
        """Scores, choice and balance loss, computed in float32 or better."""
        c, plan, own, wide = self.shape, self.plan, self.plan.tokens, self.wide
        k, experts = c.num_experts_per_tok, c.n_routed_experts
        uncast = wide == self.element or "permute" in plan.recompute         # else only the shared expert keeps it
        self.matmul("attend", "router", own, c.hidden_size, experts, keep="mlp_in" if uncast else None)
        if wide > self.element:
            self.saved["router_in"] = own * c.hidden_size * wide             # cast
        self.vector("attend", "choose", 6 * own * experts * wide / self.element)
        self.saved.update(scores=own * experts * wide, ids=own * k * 8, slot=own * k * 8)
        if c.norm_topk_prob:
            self.saved.update({"weights": own * k * wide, "weights.sum": own * wide})
        if c.balance != "none" and c.aux_loss_alpha:
            groups = plan.micro_batch // sequences_of_group(c, plan.micro_batch)
            self.saved["balance"] = groups * experts * wide    # load of each group's experts
            self.saved["balance.sum"] = own * wide if c.aux_scores == "normalized" else 0

    def routed_experts(self, rows, inner):
        """SwiGLU of `rows` in all of a rank's experts, of inner width `inner`."""
        c, plan, width, into = self.shape, self.plan, self.shape.hidden_size, 2 if self.shape.gated_mlp else 1
        own_experts = max(1, c.n_routed_experts // plan.ep)
        self.matmul("experts", "expert.gate_up", rows, width, into * inner, keep="rows", experts=own_experts)
        self.vector("experts", "expert.act", (into + 1) * rows * inner)
        self.keep("expert_gate_up", into * rows * inner)
        if plan.balance_replicas:                              # weights of homes and copies, put together for each use
            self.keep("expert_weights", (own_experts + plan.balance_replicas) * (into + 1) * width * inner)
        self.matmul("experts", "expert.down", rows, inner, width, keep="expert_hidden", experts=own_experts)
        self.keep("row_weights", rows + (self.wide == self.element))           # a cast drops the spare last one
        self.saved["counts"] = c.n_routed_experts // plan.ep * 8
        if c.expert_weight == "after_down":
            self.keep("expert_out", rows * width)
            self.vector("experts", "expert.weight", 2 * rows * width)

    def join(self):
        c, own = self.shape, self.plan.tokens
        for name in ("enorm", "hnorm", "shared_head.norm"):
            self.norm("attend", name, own, c.hidden_size)
        if c.mtp_hidden == "pre_norm":
            del self.saved["hnorm"]                            # the same tensor as the input of the last norm before
        if not self.plan.embedding_twice:                      # else the copy counts it
            self.look_up()
        self.matmul("attend", "eh_proj", own, 2 * c.hidden_size, c.hidden_size, keep="eh_in")

    def head(self):
        """Last norm, then head and loss of every depth, the vocabulary cut by tensor ranks."""
        c, plan, tokens, vocab = self.shape, self.plan, self.plan.gathered_tokens, self.shape.vocab_size // self.plan.tp
        self.norm("attend", "norm", plan.tokens, c.hidden_size)
        # and in forward alone: targets (int64), all-reduces of the highest logit and of the sum of the softmax
        width = c.hidden_size + (8 + 2 * 2 * self.wide) / 2 / self.element
        for depth in range(1 + c.num_nextn_predict_layers):
            self.gather("tp", "attend", tokens / plan.tp, width)
            self.matmul("attend", "lm_head", tokens, c.hidden_size, vocab)
            self.vector("attend", "loss", 4 * tokens * vocab * self.wide / self.element)
            if c.megatron:                                     # in float32, beside those of the matmul and its input
                self.keep(f"head_in.{depth}", plan.tokens * c.hidden_size)
                copies = 2 if c.attn_kernel == "portable" else 1   # torch's own loss does not work in place
                self.saved[f"logits.{depth}"] = tokens * vocab * (self.element + copies * self.wide)
                continue
            # the loss makes its gradients in forward: of its input, and of the head's weight in float32 or better
            self.keep(f"grad_h.{depth}", tokens * c.hidden_size)
            self.saved[f"grad_w.{depth}"] = vocab * c.hidden_size * self.wide
        tied = c.tie_word_embeddings and not plan.embedding_twice
        self.params["dp"] = c.hidden_size + (0 if tied else vocab * c.hidden_size)


def stage_layers(config, plan):
    """list (pp*vpp) of lists of layer numbers. The embedding is on the first stage, head and MTP layers on the last."""
    layers, first = [], 0
    for n in plan.layer_split or _even_split(as_shape(config), plan):
        layers.append(list(range(first, first + n)))
        first += n
    layers[-1] += range(first, first + config.num_nextn_predict_layers)
    return layers


def _even_split(shape, plan):
    """Hidden layers per stage, by FLOPs: each goes to the pipeline rank, there to the stage, that has least to do.

    Head and MTP count for the last stage, which alone may get no hidden layer; hidden layers count as their mean. A
    rule of shape, length and schedule alone, so that every device cuts alike.
    """
    n_layers, last = shape.num_hidden_layers, plan.n_stages - 1
    kinds = layer_kinds(shape) + ["head"] * (1 + shape.num_nextn_predict_layers)
    flops = [layer_flops(shape, kind, plan.seq_len) for kind in kinds]
    layer, tail = sum(flops[:n_layers]) / n_layers, sum(flops[n_layers:])
    split, load = [1] * last + [0], [layer] * last + [tail]
    ranks = [plan.stages_of(rank) for rank in reversed(range(plan.pp))]    # of equals the last: it has least in flight
    for _ in range(n_layers - last):
        stages = min(ranks, key=lambda stages: sum(load[stage] for stage in stages))
        stage = min(stages, key=load.__getitem__)
        split[stage] += 1
        load[stage] += layer
    return split


def stage_kinds(shape, plan):
    """list (pp*vpp) of tuples in the order of forward: embedding, kinds of layers, head."""
    v_shaped = plan.schedule if plan.schedule in V_SHAPED else ""
    return _stage_kinds(shape, Plan(pp=plan.pp, vpp=plan.vpp, layer_split=plan.layer_split, seq_len=plan.seq_len,
                                    schedule=v_shaped))


@lru_cache(1024)
def _stage_kinds(shape, plan):
    kinds = layer_kinds(shape)
    stages = [[kinds[i] for i in layers] for layers in stage_layers(shape, plan)]
    stages[0].insert(0, "embedding")
    if "mtp" in kinds and plan.embedding_twice:            # a copy of the embedding feeds the MTP layers
        stages[-1].insert(stages[-1].index("mtp"), "embedding")
    stages[-1].append("head")
    return [tuple(stage) for stage in stages]


# item -> (saved tensors that go, operators that run again); `layer` keeps its input alone and runs all of it again
RECOMPUTES = {
    "norm": (("attn_in", "mlp_in", "router_in", "q_latent", "kv_latent"),
             ("input_layernorm", "pre_mlp_layernorm", "q_a_layernorm", "kv_a_layernorm")),
    "mla_up": (("q", "k", "v"), ("q_b_proj", "kv_b_proj", "rope")),
    "act": (("mlp_hidden", "shared_hidden", "expert_hidden"), ("mlp.act", "shared.act", "expert.act")),
    "permute": (("rows",), ("permute",)),                  # and their exchange
    "expert": (("expert_gate_up", "expert_hidden"), ("expert.gate_up", "expert.act")),
    "core_attention": (("probabilities", "log_sum"), ("attention",)),
    "attention": (("input_layernorm.scale", "attn_in", "q_a_layernorm", "q_a_layernorm.scale", "kv_a_layernorm",
                   "kv_a_layernorm.scale", "q_latent", "kv_latent", "gathered_q_latent", "gathered_kv_latent", "k_rope",
                   "q", "k", "v", "log_sum", "attn_padded", "probabilities", "attn_out"),
                  ("input_layernorm", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm",
                   "kv_b_proj", "qkv_proj", "rope", "attention"))}
SWAPPED = {"expert_out": ("expert_out",), "attn_out": ("attn_out", "attn_padded"), "optimizer": ()}


def items_in_force(plan):
    """The names in Plan.recompute and Plan.swap that have an effect beside the others: a layer, or an attention, that
    runs again as a whole needs nothing inside it saved or made another way."""
    names = {*plan.recompute, *plan.swap}
    if "layer" in names:
        names &= {"layer", "optimizer"}
    if "attention" in names:
        names -= {"attn_out", "mla_up"}
    return names


def recomputed(work, plan=None):
    """(saved tensors that a layer does not keep, operators that its backward runs again): sets of names."""
    plan = plan or work.plan                               # Works are shared by plans that cut alike
    items = plan.recompute
    if "layer" in items and "input_layernorm" in work.saved:               # whose saved input is the layer's
        outside = re.compile("input_layernorm$|ids|enorm|hnorm|eh_|shared_head").match    # MTP's join among it
        return ({name for name in work.saved if not outside(name)},
                {op.name for op in work.ops if not outside(op.name)} | {"input_layernorm"})
    chosen = [RECOMPUTES[item] for item in items if item != "layer"]
    gone = {name for tensors, _ in chosen for name in tensors}
    again = {name for _, operators in chosen for name in operators}
    if "attention" in items and not plan.is_plain:         # a matmul whose weight gradient can be deferred saves last
        again.add("o_proj")
    return gone, again


# part of the model that keeps a tensor: the first whose pattern is found in "kind of layer, name of tensor"
KEPT_IN = {"embedding": "^embedding", "head": "^head|shared_head", "MTP": "enorm|hnorm|eh_in",
           "norms": r"(input|post_\w+|pre_mlp)_layernorm", "MLP": "dense mlp_in|shared|mlp_gate_up|mlp_hidden",
           "routing": r"mlp_in|router_in|scores|ids|slot|\bweights|balance", "experts": "expert|row|counts|order",
           "attention": ""}


def saved_by_part(works):
    """Bytes that backward keeps of one micro-batch, by KEPT_IN; `host`: what is swapped."""
    parts = Counter()
    for work in works:
        gone = recomputed(work)[0].union(*(SWAPPED[item] for item in work.plan.swap))
        kind = "dense" if "router_in" in work.saved else work.kind         # then the router keeps a cast of mlp_in
        for name in work.saved.keys() - gone:
            part = next(part for part, pattern in KEPT_IN.items() if re.search(pattern, f"{kind} {name}"))
            parts[part] += work.saved[name]
        parts["host"] += saved_bytes(work)[1]
    return parts


def saved_bytes(work, plan=None):
    """(bytes kept on the device for one micro-batch's backward, bytes swapped to the host)."""
    plan = plan or work.plan
    gone, _ = recomputed(work, plan)
    away = {name for item in plan.swap for name in SWAPPED[item]} - gone
    kept = sum(size for name, size in work.saved.items() if name not in gone | away)
    return kept, sum(work.saved.get(name, 0) for name in away)


# ---------------------------------------------------------------------------------------------------------------------
# Hardware, and what operators and collectives cost on it


@dataclass(frozen=True)
class Hardware:
    """One device, its node and its network. Bandwidths are of one direction and one device; efficiencies of a peak."""
    name: str
    peak: dict                             # precision -> FLOP/s of the matrix units
    memory: float                          # bytes
    bandwidth: float                       # bytes/s of device memory
    node_size: int = 8                     # devices joined by the fast links
    topology: str = "switch"               # of a node: switch | mesh (each pair its own link)
    inner_bandwidth: float = 0.0           # bytes/s, all links of a device inside the node together
    inner_latency: float = 0.5e-6
    outer_bandwidth: float = 0.0           # bytes/s between nodes
    outer_latency: float = 1.5e-6
    host_bandwidth: float = 32e9           # bytes/s to the host's memory
    power: float = 1.0                     # share of a matmul's rate that a power limit leaves
    cores: int = 0                         # output tiles of a matmul computed at a time; 0: any number
    framework: float = 1.5 * GIB           # bytes that runtime and libraries keep
    communicator: float = 0.0              # bytes of each kind of process group
    fragmentation: float = 0.0             # bytes that the allocator keeps for one of activations and buffers
    value_padded: bool = False             # its attention kernel wants values as wide as keys
    generation: str = ""                   # whose CONSTANTS it has
    # what is reached of the peaks, and what every call costs: see CONSTANTS
    matmul_efficiency: float = 0.7
    matmul_half: float = 0.0               # a side of a matmul with which it reaches half of that ...
    tokens_half: float = 0.0               # ... and the number of tokens
    grouped_efficiency: float = 1.0        # of the experts' matmuls beside others
    fp8_efficiency: float = 1.0            # of matmuls in 8 bits beside those in 16
    static_expert: float = 0.0             # seconds of each matrix of a grouped matmul, where they run one by one
    loss_cached: float = 1.0               # rate of the loss beside memory's: a chunk of its logits may stay in a cache
    attention_efficiency: float = 0.7
    portable_attention: float = 1.0        # of a flash attention that is not the vendor's, beside it
    attention_half: float = 0.0            # keys with which flash attention reaches half of that
    memory_efficiency: float = 0.6
    inner_efficiency: float = 0.7
    outer_efficiency: float = 0.7
    static_matmul: float = 5e-6            # seconds of every matmul, whatever its size
    static_vector: float = 2e-6
    static_collective: float = 10e-6
    hidden_share: float = 0.0              # of collectives that a plan hides, the share that runs beside computation
    overlap_tax: float = 0.0               # seconds of computation lost for a second of communication beside it
    scale_loss: float = 0.0                # share of the step that each doubling of the devices costs

    # bytes/s of device memory that are reached
    memory_rate = property(lambda self: self.bandwidth * self.memory_efficiency)

    def __hash__(self):
        return hash(self.name)


# Constants shared by the devices of a generation, or by all: unit, bounds, priors, and what `python sim.py validate
# --fit` made of them: least absolute errors over the public rows, each held near its prior; with equal bounds, it is.
# Priors: matmul and memory of A100 and H100 by stas00/ml-engineering and Calculon, of B200 by SimuMax's measurements,
# of 910B by msmodeling and HCCS collectives (19 of 28 GB/s a link); attention by arXiv:2307.08691 and 2407.08608;
# others assumed.
GENERATIONS = "ampere", "hopper", "blackwell", "ascend"
CONSTANTS = {
    "matmul_efficiency": ("of peak", 0.4, 0.97, (0.80, 0.70, 0.55, 0.70), (0.782, 0.751, 0.473, 0.679)),
    "matmul_half": ("elements", 60, 60, (60,), (60.0,)),
    "tokens_half": ("tokens", 30, 600, (256,), (226.0,)),
    "grouped_efficiency": ("of matmul", 0.70, 1.0, (0.85, 0.85, 0.85, 0.70), (0.85, 1.0, 0.714, 0.7)),
    "fp8_efficiency": ("of matmul", 0.5, 1.0, (0.75,), (1.0,)),
    "attention_efficiency": ("of peak", 0.2, 0.8, (0.60, 0.55, 0.60, 0.55), (0.713, 0.425, 0.551, 0.51)),
    "portable_attention": ("of attention", 0.3, 1.0, (0.6,), (0.492,)),
    "attention_half": ("keys", 400, 400, (400,), (400.0,)),
    "memory_efficiency": ("of peak", 0.3, 0.95, (0.70, 0.65, 0.67, 0.60), (0.95, 0.481, 0.588, 0.525)),
    "inner_efficiency": ("of peak", 0.4, 0.9, (0.70, 0.70, 0.66, 0.665), (0.748, 0.614, 0.504, 0.598)),
    "outer_efficiency": ("of peak", 0.3, 0.95, (0.80, 0.80, 0.80, 0.80), (0.509, 0.95, 0.8, 0.796)),
    "static_matmul": ("s", 5e-6, 5e-6, (5e-6,), (5e-06,)),
    "static_vector": ("s", 4e-6, 4e-6, (4e-6,), (4e-06,)),
    "static_collective": ("s", 2e-5, 2e-5, (2e-5,), (2e-05,)),
    "hidden_share": ("of time", 0.2, 0.95, (0.7,), (0.567,)),
    "overlap_tax": ("of time", 0.15, 0.15, (0.15,), (0.15,)),
    "scale_loss": ("a doubling", 1e-3, 0.03, (0.01,), (0.0101,)),
}


def constants_of(generation):
    index = GENERATIONS.index(generation)
    return {name: fitted[index if len(fitted) > 1 else 0] for name, (*_, fitted) in CONSTANTS.items()}


# Presets: name, generation, TFLOPS in 16 and 8 bits, memory, GB/s of it, node, GB/s inside and between nodes, cores.
# Sources. A100, H100, H200, H20, B200, GB200, GB300: NVIDIA's data sheets, dense, NVLink of one direction; between
# nodes 200 Gb/s a GPU for A100, 400 since, 800 for GB300, as usual for their systems. a100_80_jeanzay: 4 OmniPath links
# of 100 Gb/s for 8 GPUs (bigscience, tr11-176B-ml). a100_pcie: no NVLink, PCIe 4.0 x16. h100_96_hbm2e_500w: torchtitan,
# benchmarks. H800: arXiv:2412.19437, section 3. Ascend 910B: Ascend/msmodeling, tensor_cast/device.py; bins differ in
# cube cores (8192 FLOP a cycle) and clock; full mesh of 8 with 28 GB/s a link, RoCE of 200 Gb/s: arXiv:2504.07866,
# section 5; unspecified is read as the largest bin. 910C, a die: the same file and arXiv:2506.12708 (CloudMatrix384:
# 768 dies of one bus).
GB = 1e9
PRESETS_OF_HARDWARE = (
    ("ascend_910b_376", "ascend", 353.8944, 0, 64 * GIB, 1638.4 * GIB / GB, 8, 196, 25, 24),
    ("ascend_910b_313", "ascend", 294.912, 0, 64 * GIB, 1638.4 * GIB / GB, 8, 196, 25, 20),
    ("ascend_910b_280", "ascend", 245.76, 0, 64 * GIB, 1638.4 * GIB / GB, 8, 196, 25, 20),
    ("ascend_910b_unspecified", "ascend", 353.8944, 0, 64 * GIB, 1638.4 * GIB / GB, 8, 196, 25, 24),
    ("ascend_910c_die", "ascend", 353.8944, 0, 64 * GIB, 1638.4 * GIB / GB, 768, 196, 24.5, 24),
    ("a100_80_sxm", "ampere", 312, 0, 79.2 * GIB, 2039, 8, 300, 25, 108),
    ("a100_40_sxm", "ampere", 312, 0, 39.4 * GIB, 1555, 8, 300, 25, 108),
    ("a100_80_jeanzay", "ampere", 312, 0, 79.2 * GIB, 2039, 8, 300, 6.25, 108),
    ("a100_pcie", "ampere", 312, 0, 79.2 * GIB, 1935, 8, 24, 25, 108),
    ("h100_sxm", "hopper", 989.5, 1979, 79.2 * GIB, 3350, 8, 450, 50, 132),
    ("h100_96_hbm2e_500w", "hopper", 989.5, 1979, 96 * GB, 2400, 8, 450, 50, 132),
    ("h800_sxm", "hopper", 989.5, 1979, 79.2 * GIB, 3350, 8, 200, 50, 132),
    ("h200_sxm", "hopper", 989.5, 1979, 141 * GB, 4800, 8, 450, 50, 132),
    ("h20", "hopper", 148, 296, 96 * GB, 4000, 8, 450, 50, 78),
    ("b200", "blackwell", 2250, 4500, 180 * GB, 8000, 8, 900, 50, 148),
    ("gb200", "blackwell", 2500, 5000, 186 * GB, 8000, 72, 900, 50, 148),
    ("gb300", "blackwell", 2500, 5000, 288 * GB, 8000, 72, 900, 100, 148))


def _preset(name, generation, wide, narrow, memory, bandwidth, node_size, inner, outer, cores):
    peak = dict.fromkeys(("bf16", "fp16"), wide * 1e12)
    peak |= dict.fromkeys(("fp8", "mxfp8"), narrow * 1e12) if narrow else {}
    peak["fp32"] = peak["bf16"] * (0.281 if generation == "ascend" else 0.5)       # cube in fp32, tensor cores in TF32
    mesh = generation == "ascend" and node_size == 8
    # a group's buffers: HCCL's two of 200 MB by default; NCCL's and what goes with it, as BLOOM's nvidia-smi suggests
    communicator = (0.4 if generation == "ascend" else 2.0) * GIB
    return Hardware(name, peak, memory, bandwidth * GB, node_size, "mesh" if mesh else "switch", inner * GB,
                    outer_bandwidth=outer * GB, cores=cores, communicator=communicator, fragmentation=0.15,
                    generation=generation, **constants_of(generation))


HARDWARE = {row[0]: _preset(*row) for row in PRESETS_OF_HARDWARE}
# 500 of 700 W: the clock follows the root of the power, which is assumed
HARDWARE["h100_96_hbm2e_500w"] = replace(HARDWARE["h100_96_hbm2e_500w"], power=math.sqrt(500 / 700))
# For --fit on a CPU, to compare choices: assumed numbers of two cores, not of the machine at hand.
CPU = Hardware("a generic CPU", dict.fromkeys(BYTES_OF, 1e11), 2**40, 2e10, node_size=2**16, inner_bandwidth=1e9,
               outer_bandwidth=1e9, host_bandwidth=5e9, framework=2**29, value_padded=True)
STEP_BYTES = 2**28                         # of moments that a step of a swapped optimizer has on the device at a time


def group_size(plan, axis):
    """Ranks of a group along an axis; dp and edp: of those that hold the same weights; pp: a stage and the next."""
    return 2 if axis == "pp" else plan.holders.get(axis) or getattr(plan, axis)


def stride_of(plan, axis):
    """From a rank of the group to the next, in ranks; those of a node are consecutive."""
    return dict(tp=1, etp=1, cp=plan.tp, dp=plan.tp, edp=plan.ep * plan.etp, pp=plan.dp * plan.cp * plan.tp)[axis]


def tier_of(plan, axis):
    """inner if a group of the axis lies inside one node, else outer."""
    return "inner" if group_size(plan, axis) * stride_of(plan, axis) <= plan.node_size else "outer"


def collective_seconds(hardware, tier, ranks, sent, local=1):
    """Seconds of a collective in which each rank sends `sent` bytes, ring or direct (msmodeling's formulas).

    local: ranks of the group in one node, whose links to other nodes a ring uses together.
    """
    if ranks == 1 or sent == 0:
        return 0.0
    inside = hardware.inner_bandwidth * hardware.inner_efficiency
    if tier == "inner":
        bandwidth, latency = inside, hardware.inner_latency
        if hardware.topology == "mesh":                    # n ranks use n-1 of a device's links
            bandwidth *= (min(ranks, hardware.node_size) - 1) / (hardware.node_size - 1)
    else:
        bandwidth, latency = hardware.outer_bandwidth * hardware.outer_efficiency, hardware.outer_latency
        bandwidth = bandwidth if local == 1 else min(inside, local * bandwidth)
    steps = min(ranks - 1, math.log2(ranks))
    return hardware.static_collective + steps * latency + sent / bandwidth


def axis_seconds(plan, hardware, axis, sent):
    """Seconds of a collective in the groups of an axis."""
    ranks = group_size(plan, axis)
    local = max(1, min(ranks, plan.node_size // stride_of(plan, axis)))
    return collective_seconds(hardware, tier_of(plan, axis), ranks, sent, local)


# a backward's work over its forward's: flash attention computes the scores again, vectors read a gradient more
BACKWARD = {"flash": 2.5, "unfused": 2.0, "vector": 1.5}
TILE = 128                         # side of the output tile that a core computes at a time
FLASH_BACKWARD = 0.85              # rate of flash attention's backward over its forward's (arXiv:2307.08691)


@lru_cache(None)
def matmul_share(rows, inner, columns, matrices, half, cores):
    """Share of its best rate that a matmul reaches: short sides, and a last wave of tiles that leaves cores idle."""
    share = 1.0
    for side, short in zip((rows / matrices, inner, columns), half):
        share *= side / (side + short)
    tiles = matrices * math.ceil(rows / matrices / TILE) * math.ceil(columns / TILE)
    return share * (tiles / cores / math.ceil(tiles / cores) if cores else 1.0)


def peak_of(hardware, precision, narrow=False):
    """FLOP/s of matrix units; of what stays in 16 bits beside 8-bit matmuls, unless `narrow`."""
    wide = "bf16" if precision in NARROW and not (narrow and precision in hardware.peak) else precision
    return hardware.peak[wide]


def matmul_seconds(op, sizes, plan, hardware, tokens_inside=False):
    """sizes: rows, inner, columns and matrices of one pass; tokens_inside: of the weights', which sums over tokens."""
    half = hardware.tokens_half, hardware.matmul_half, hardware.matmul_half
    if tokens_inside:
        half = hardware.matmul_half, hardware.tokens_half, hardware.matmul_half
    narrow = plan.precision in NARROW and op.kind == "matmul" and op.name not in ("lm_head", "router")
    rate = peak_of(hardware, plan.precision, narrow) * hardware.matmul_efficiency
    rate *= hardware.power * (hardware.fp8_efficiency if narrow else 1.0)
    rate *= hardware.grouped_efficiency if op.sizes[3] > 1 and op.kind == "matmul" else 1.0
    share = matmul_share(*sizes, half, hardware.cores)
    return max(op.flops / (rate * share), op.moved / hardware.memory_rate)


def op_seconds(op, plan, hardware):
    """Seconds of (forward, backward for inputs, for weights): arithmetic or memory, the slower, and a start."""
    if op.kind == "matmul":
        return linear_seconds(op, plan, hardware)
    start = hardware.static_matmul
    if op.kind == "vector":
        rate = hardware.memory_rate * (hardware.loss_cached if op.name == "loss" else 1.0)
        busy, again, start = op.moved / rate, BACKWARD["vector"], hardware.static_vector
    elif op.kind == "unfused":
        m, k, n, matrices = op.sizes
        busy, again = matmul_seconds(op, (m * matrices, k, n, matrices), plan, hardware), BACKWARD["unfused"]
    else:
        keys, rate = op.sizes[2], peak_of(hardware, plan.precision) * hardware.attention_efficiency
        rate = rate * keys / (keys + hardware.attention_half)
        rate *= hardware.portable_attention if op.kind == "portable" else 1.0
        busy, again = max(op.flops / rate, op.moved / hardware.memory_rate), BACKWARD["flash"] / FLASH_BACKWARD
    return busy + start, again * busy + start, 0.0


def linear_seconds(op, plan, hardware):
    """op_seconds of a matmul with weights."""
    m, k, n, matrices = op.sizes
    sizes = (m, k, n, matrices), (m, n, k, matrices), (k * matrices, m / matrices, n, matrices)
    start = hardware.static_matmul + (matrices > 1) * matrices * hardware.static_expert
    forward, inputs, weights = (matmul_seconds(op, each, plan, hardware, i == 2) + start
                                for i, each in enumerate(sizes))
    # the sum over micro-batches is read and written
    weights += 2 * gradient_bytes(plan) * k * n * matrices / hardware.memory_rate
    if plan.precision in NARROW:                           # inputs and gradients are cast, in two layouts
        cast = 2 / hardware.memory_rate
        forward, inputs = forward + cast * m * k, inputs + cast * m * n
    return forward, inputs, weights


def gradient_bytes(plan):
    """Of one gradient while micro-batches are summed: float32 beside bf16, fp16 as it is (Megatron-LM's defaults)."""
    return 2 if plan.precision == "fp16" else max(4, BYTES_OF[plan.precision])


def weights_seconds(plan, hardware, params, size):
    """Seconds to gather weights of `size` bytes each from the ranks that hold a part, or to scatter their gradients."""
    return sum(axis_seconds(plan, hardware, axis, (ranks - 1) / ranks * params[axis] * size)
               for axis, ranks in plan.holders.items())


class LayerTime:
    """Seconds of one layer, embedding or head on one rank. What a backward runs again is the part `recompute`.

    max_vio: the busiest expert's load over the mean, minus one.
    """

    def __init__(self, work, plan, hardware, max_vio):
        again, slower = recomputed(work, plan)[1], 1 + max_vio
        self.name = work.kind if work.kind in ("embedding", "head") else ""
        self.whole_again = "layer" in plan.recompute and "input_layernorm" in again
        # dropped rows travel again: before anything is recomputed from them, or else for the experts' backward
        self.rows_again = "" if "permute" not in again else "first" if "expert.gate_up" in again else "for experts"
        self.compute = Counter()                           # (part, pass) -> seconds; pass: F, I, W, or B = I + W
        self.collectives = defaultdict(list)               # part -> list of (axis, tier, seconds) of one pass
        self.exchange = {"F": Counter(), "B": Counter()}   # pass -> tier -> seconds of one way
        self.sent = Counter()                              # tier -> bytes of a forward and a backward
        self._time_operators(work, plan, hardware, again, slower)
        self._time_collectives(work, plan, hardware)
        self._time_exchange(work, plan, hardware, slower)
        self.swap = saved_bytes(work, plan)[1] / hardware.host_bandwidth
        # zero=3: weights are gathered in forward and in backward, float32 gradients scattered after it; (tier, seconds)
        self.weights, self.gradients = [(tier_of(plan, "dp"), weights_seconds(plan, hardware, work.params, size)
                                         if plan.zero == 3 else 0.0) for size in (work.element, 4)]

    def _time_operators(self, work, plan, hardware, again, slower):
        for op in work.ops:
            seconds = [one * (slower if op.name.startswith("expert.") else 1) for one in op_seconds(op, plan, hardware)]
            self.compute.update(dict(zip(product([op.part], "FIW"), seconds)))
            self.compute["recompute", "F"] += seconds[0] if op.name in again else 0.0
        for part in {op.part for op in work.ops}:
            self.compute[part, "B"] = self.compute[part, "I"] + self.compute[part, "W"]

    def _time_collectives(self, work, plan, hardware):
        for (axis, part), sent in work.sent.items():
            tier, parts = tier_of(plan, axis), [part]
            if self.whole_again or (part == "attend" and "attention" in plan.recompute):
                parts.append("recompute")
            seconds = axis_seconds(plan, hardware, axis, sent)
            seconds *= 1 - hardware.hidden_share * (axis in plan.hide)         # the rest runs beside its matmul
            for one in parts:
                self.collectives[one].append((axis, tier, seconds))
            self.sent[tier] += sent * (1 + len(parts))

    def _time_exchange(self, work, plan, hardware, slower):
        if not work.params["edp"]:                         # no experts
            return
        outer = plan.ep // (1 if plan.dispatch == "flat" else plan.inner)
        times = dict(F=2 + bool(self.rows_again) + self.whole_again, B=2)  # that rows travel one way
        copied = copied_bytes(work.shape, plan)
        for one, tiers in zip("FB", exchange_bytes(work.shape, plan).values()):
            for tier, ranks in (("inner", plan.inner), ("outer", outer)):
                way = tiers[tier][0] / 2
                self.exchange[one][tier] = collective_seconds(hardware, tier, ranks, slower * way + copied[tier] / 2)
                self.sent[tier] += times[one] * way + copied[tier]


def layer_work(shape, plan, kind, work=Work):
    return _layer_work(shape, same_time(plan), kind, work)


@lru_cache(4096)
def _layer_work(shape, plan, kind, work):
    return work(shape, plan, kind)


def layer_time(shape, plan, kind, hardware, max_vio, work=Work):
    return _layer_time(shape, same_time(plan), kind, hardware, max_vio, work)


@lru_cache(2**14)
def _layer_time(shape, plan, kind, hardware, max_vio, work):
    return LayerTime(layer_work(shape, plan, kind, work), plan, hardware, max_vio)


def same_time(plan):
    """The plan that stands for all with the same LayerTimes: without what only the pipeline and the data ranks see."""
    data = dict(dp=plan.dp, zero=3) if plan.zero == 3 else dict(dp=1, zero=0)
    return replace(plan, pp=1 + plan.embedding_twice, vpp=1, global_batch=1, layer_split=(), overlap="none",
                   schedule="1f1b" if plan.is_plain else "paired", **data)


def same_work(plan):
    """The plan that stands for all with the same Works."""
    return replace(same_time(plan), dp=1, zero=0, dispatch="flat", swap=(), schedule="1f1b",
                   recompute=("mla_up",) if "mla_up" in plan.recompute else ())


# ---------------------------------------------------------------------------------------------------------------------
# Inside an action: tasks on the streams of one device


class Task(NamedTuple):
    name: str
    stream: str                    # compute | inner | outer | host
    start: float                   # seconds from the action's start
    end: float


class Streams:
    """A device's queues: compute, links inside the node, links between nodes, the host's link; each runs in order."""

    def __init__(self, flat):
        self.flat = flat                                   # the exchange uses both kinds of link at once
        self.free = {"compute": 0.0, "inner": 0.0, "outer": 0.0, "host": 0.0}      # seconds from which a stream is idle
        self.tasks = []

    def queue(self, name, stream, seconds, after=0.0):
        """Queue a task that starts when its stream is free and not before `after`; returns its end."""
        if seconds == 0:
            return after
        start = max(self.free[stream], after)
        end = start + seconds
        self.free[stream] = end
        self.tasks.append(Task(name, stream, start, end))
        return end

    def compute(self, layer, part, which, after):
        """One part of a layer behind its collectives. which: F, I, W or B, the two halves of a backward together."""
        if which != "W":                                   # weight gradients need nothing from other ranks
            for axis, tier, seconds in layer.collectives.get(part, ()):
                after = self.queue(f"{axis} {part}", tier, seconds, after)
        seconds = layer.compute.get((part, which), 0.0)
        return self.queue(f"{layer.name or part} {which}", "compute", seconds, after)

    def exchange(self, layer, which, way, after):
        """Rows to the experts (way=out: outer hop first) or back; flat sends over both kinds of link at once."""
        name, seconds = f"exchange {way} {which}", layer.exchange[which]
        hops = ("outer", "inner") if way == "out" else ("inner", "outer")
        ends = [self.queue(name, hops[0], seconds[hops[0]], after)]
        ends.append(self.queue(name, hops[1], seconds[hops[1]], after if self.flat else ends[0]))
        return max(ends)

    def forward_steps(self, layers):
        """Four steps a layer, as backward_steps, so that a pair's layers can take turns.

        In a pair, attention F and shared expert B hide combine B, experts B dispatch F, experts F dispatch B, and all
        weight gradients with attention B and shared expert F combine F. Alone, the shared expert hides a part of it.
        """
        ready = 0.0
        for layer in layers:
            gathered = self.queue("weights", *layer.weights)               # ahead, so the link alone decides when
            attended = self.compute(layer, "attend", "F", max(ready, gathered))
            ready = attended
            if layer.name:                                                 # embedding or head
                continue
            yield
            arrived = self.exchange(layer, "F", "out", attended)
            yield
            computed = self.compute(layer, "experts", "F", arrived)
            self.queue("swap", "host", layer.swap, computed)
            returned = self.exchange(layer, "F", "back", computed)
            yield
            self.compute(layer, "shared", "F", attended)
            ready = self.compute(layer, "combine", "F", returned)
            yield

    def backward_steps(self, layers, defer):
        """defer: the experts' weight gradients wait, to hide the way back."""
        backward = layers[::-1]
        ready = self.free["compute"]
        gathered = self.queue("weights", *backward[0].weights) if backward else 0.0
        for index, layer in enumerate(backward):
            swapped_in = self.queue("swap", "host", layer.swap)
            ready = max(ready, gathered, swapped_in)
            if index + 1 < len(backward):                  # the next layer's, before this layer's gradients leave
                gathered = self.queue("weights", *backward[index + 1].weights)
            if layer.name:
                ready = self.compute(layer, "attend", "B", ready)
                self.queue("gradients", *layer.gradients, ready)
                continue
            again = self.recompute(layer, ready)
            arrived = self.exchange(layer, "B", "out", self.compute(layer, "combine", "I", ready))
            yield
            self.compute(layer, "shared", "B", again)
            yield
            rows = self.exchange(layer, "F", "out", ready) if layer.rows_again == "for experts" else ready
            computed = self.compute(layer, "experts", "I" if defer else "B", max(arrived, again, rows))
            returned = self.exchange(layer, "B", "back", computed)
            yield
            if defer:
                self.compute(layer, "experts", "W", computed)
            ready = self.compute(layer, "attend", "B", returned)
            self.queue("gradients", *layer.gradients, ready)
            yield

    def recompute(self, layer, ready):
        """What the backward runs again, behind the rows that travel again for it."""
        rows = self.exchange(layer, "F", "out", ready) if layer.rows_again == "first" else ready
        again = self.compute(layer, "recompute", "F", rows)
        return self.exchange(layer, "F", "back", again) if layer.whole_again else again


def play_action(forward, backward, flat, adaptive):
    """Streams of one action: the forward of a stage, the backward of a stage, or a pair. Each: its LayerTimes, or ()."""
    streams = Streams(flat)
    forwards = streams.forward_steps(forward)
    backwards = streams.backward_steps(backward, defer=adaptive)
    if adaptive:
        for _ in zip_longest(backwards, forwards):         # the two take turns, a step each
            pass
    else:
        for _ in chain(forwards, backwards):
            pass
    return streams


class Account(NamedTuple):
    """Where the seconds of an action go."""
    seconds: float
    # add up to `seconds`: computation by name; `exchange`, while rows travel and nothing is computed; `overlap tax`;
    # `collectives`, all other waits
    parts: dict
    travel: float                  # seconds of exchange on either link, hidden or not


@lru_cache(2**15)
def action_account(forward, backward, flat, adaptive, tax=0.0):
    """Account of play_action. tax: seconds of computation lost for a second in which a link is busy beside it."""
    streams = play_action(forward, backward, flat, adaptive)
    computing = [task for task in streams.tasks if task.stream == "compute"]
    on_links = [task for task in streams.tasks if task.stream in ("inner", "outer")]
    travelling = [task for task in streams.tasks if task.name.startswith("exchange")]
    parts = Counter()
    for task in computing:
        name, _ = task.name.split()
        parts[name] += task.end - task.start
    computed = sum(parts.values())
    both = busy_seconds(computing) + busy_seconds(on_links) - busy_seconds(computing + on_links)
    busy = busy_seconds(computing + travelling)
    played = max(streams.free.values())
    parts["exchange"] = max(0.0, busy - computed)          # rounding aside
    parts["collectives"] = max(0.0, played - busy)
    parts["overlap tax"] = tax * both
    travel = sum(task.end - task.start for task in travelling)
    return Account(played + tax * both, parts, travel)


def busy_seconds(tasks):
    """Seconds in which at least one of the tasks runs."""
    total, last = 0.0, 0.0
    for start, end in sorted(task[2:] for task in tasks):
        if end > last:
            total += end - max(start, last)
            last = end
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Schedules, for each pipeline rank a list of actions, and the clock that plays them


class Action(NamedTuple):
    """One entry of a table. kind: F forward, B backward, FB a pair of both.

    str() is the notation of torch.distributed.pipelining, whose runtime runs the table: 3F0, 3B0, (3F1;2B0)OVERLAP_F_B.
    """
    kind: str
    stage: int                     # of a pair: the forward's
    microbatch: int
    backward: tuple = ()           # of a pair: (stage, microbatch) of the backward

    @property
    def stages(self):
        """(stage of the forward, of the backward), None where there is none: all that the action's seconds depend on"""
        if self.kind == "FB":
            return self.stage, self.backward[0]
        return (self.stage, None) if self.kind == "F" else (None, self.stage)

    def parts(self):
        """The action as plain (kind, stage, microbatch): two for a pair, forward first."""
        if self.kind != "FB":
            return (self[:3],)
        return ("F", self.stage, self.microbatch), ("B", *self.backward)

    def __str__(self):
        names = [f"{stage}{kind}{microbatch}" for kind, stage, microbatch in self.parts()]
        return f"({';'.join(names)})OVERLAP_F_B" if self.kind == "FB" else names[0]


def schedule_table(plan):
    """list (pp) of lists of Action, in the order in which each rank runs them.

    1f1b; interleaved, in which chunks take turns of about pp micro-batches (arXiv:2104.04473, section 2.2); paired:
    one more warm-up, so that each steady step holds a forward and a backward that do not wait for each other.
    """
    return [rank_actions(plan, rank) for rank in range(plan.pp)]


def rank_actions(plan, rank):
    """Forwards to warm up, steady steps of a forward and a backward each, then the backwards that are left."""
    stages = plan.stages_of(rank)
    forwards, backwards = in_turns(plan, stages), in_turns(plan, stages[::-1])
    first = min(len(forwards), warm_up(plan, rank))
    actions = [Action("F", *forward) for forward in forwards[:first]]
    for forward, backward in zip(forwards[first:], backwards):
        if plan.schedule == "paired":
            actions.append(Action("FB", *forward, backward))
        else:
            actions += [Action("F", *forward), Action("B", *backward)]
    left = backwards[len(forwards) - first:]
    return actions + [Action("B", *backward) for backward in left]


def in_turns(plan, stages):
    """list of (stage, micro-batch): a rank's stages take turns of plan.turn micro-batches."""
    order = []
    for begin in range(0, plan.n_micro, plan.turn):
        for stage in stages:
            for microbatch in range(begin, min(begin + plan.turn, plan.n_micro)):
                order.append((stage, microbatch))
    return order


def warm_up(plan, rank):
    """Forwards of a rank before its first step of a forward and a backward, if there are as many."""
    hops = plan.pp - 1 - rank
    first = {"1f1b": hops, "interleaved": 2 * hops, "paired": 2 * hops + 1}[plan.schedule]
    return first + (plan.vpp - 1) * plan.turn


@lru_cache(8)
def cached_table(schedule, pp, vpp, n_micro):
    """schedule_table for many plans, one after the other, that differ in other things alone."""
    return schedule_table(Plan(pp=pp, vpp=vpp, schedule=schedule, global_batch=n_micro))


@lru_cache(2**14)
def in_flight(schedule, pp, vpp, n_micro, rank):
    """array (moments, vpp): a rank's micro-batches in flight, by chunk, at each moment that may be its peak."""
    plan = Plan(pp=pp, vpp=vpp, schedule=schedule, global_batch=n_micro)
    live, grown, peaks = dict.fromkeys(plan.stages_of(rank), 0), False, set()
    for action in rank_actions(plan, rank):
        for kind, stage, _ in action.parts():
            if kind == "B" and grown:                      # one less from here on: a peak lies behind
                peaks.add(tuple(live.values()))
            live[stage] += 1 if kind == "F" else -1
            grown = kind == "F"
    return np.array(list(peaks))


class Span(NamedTuple):
    start: float                   # seconds from the step's start
    end: float
    action: Action


def play(plan, table, duration, link=0.0):
    """The clock: list (pp) of lists of Span. duration(action): seconds.

    link: seconds that an output travels to another rank; sends are asynchronous, only the receiver waits. A pair starts
    when both of its inputs are there.
    """
    home, last = plan.homes(), plan.n_stages - 1
    # (kind, stage, micro-batch) -> when its input is there: tokens of the first stage, losses of the last at once
    inputs = {}
    for microbatch in range(plan.n_micro):
        inputs["F", 0, microbatch] = inputs["B", last, microbatch] = 0.0
    spans = [[] for _ in table]
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(table):             # each as far as its inputs allow
            row = spans[rank]
            for action in islice(actions, len(row), None):
                start = row[-1].end if row else 0.0
                parts = action.parts()
                arrivals = [inputs.get(part) for part in parts]
                if None in arrivals:
                    break
                end = max(start, *arrivals) + duration(action)
                row.append(Span(max(start, *arrivals), end, action))
                for kind, stage, microbatch in parts:
                    to = stage + 1 if kind == "F" else stage - 1
                    inputs[kind, to, microbatch] = end if home.get(to) == rank else end + link
                progress = True
    waiting = [str(actions[len(row)]) for actions, row in zip(table, spans) if len(row) < len(actions)]
    assert not waiting, f"ranks wait for each other at {', '.join(waiting)}"
    return spans


# ---------------------------------------------------------------------------------------------------------------------
# One step: time and memory


class Simulation:
    """One step of a plan, played: what predict reports and trace draws. work: the class that counts a layer.

    max_vio: load of the busiest expert over the mean, minus one.
    """

    def __init__(self, config, plan, hardware, max_vio=0.0, work=Work):
        self.plan, self.hardware, self.shape = plan, hardware, on_hardware(config, hardware)
        self.max_vio, self.work = max_vio, work
        self.stages = stage_kinds(self.shape, plan)        # of each stage: embedding, kinds of layers, head
        self.kinds = set(chain(*self.stages))
        self.accounts = {}                                 # Action.stages -> Account

    @cached_property
    def works(self):
        return {kind: layer_work(self.shape, self.plan, kind, self.work) for kind in self.kinds}

    @cached_property
    def saved(self):
        """kind -> bytes that a micro-batch's forward keeps on the device."""
        return {kind: saved_bytes(work)[0] for kind, work in self.works.items()}

    @cached_property
    def times(self):
        return {kind: layer_time(self.shape, self.plan, kind, self.hardware, self.max_vio, self.work)
                for kind in self.kinds}

    @cached_property
    def kinds_of(self):
        """list (pp) of tuples: kinds of the layers that a pipeline rank holds, stage by stage."""
        return [tuple(chain.from_iterable(self.stages[stage] for stage in self.plan.stages_of(rank)))
                for rank in range(self.plan.pp)]

    def works_of(self, rank):
        return [self.works[kind] for kind in self.kinds_of[rank]]

    @cached_property
    def unlike_ranks(self):
        """list: of the pipeline ranks that hold layers of the same kinds the first, which has the most in flight."""
        first = {}
        for rank, kinds in enumerate(self.kinds_of):
            first.setdefault(kinds, rank)
        return list(first.values())

    # seconds

    def layers_of(self, stage):
        """LayerTimes of a stage; none for None."""
        return () if stage is None else tuple(self.times[kind] for kind in self.stages[stage])

    @property
    def manner(self):
        """play_action's (flat, adaptive)."""
        return self.plan.dispatch in ("flat", "pipelined"), self.plan.overlap == "adaptive"

    def play_layers(self, forward, backward):
        """Account of an action. forward, backward: LayerTimes, or ()."""
        return action_account(forward, backward, *self.manner, self.hardware.overlap_tax)

    def tasks_of(self, action):
        forward, backward = map(self.layers_of, action.stages)
        return play_action(forward, backward, *self.manner).tasks

    def account(self, action):
        """Account of an action, made once for all that differ in the micro-batch alone."""
        stages = action.stages
        if stages not in self.accounts:
            self.accounts[stages] = self.play_layers(*map(self.layers_of, stages))
        return self.accounts[stages]

    def seconds_of(self, action):
        return self.account(action).seconds

    def stream_bytes(self):
        """What a device sends to the next stage."""
        return self.plan.tokens * self.shape.hidden_size * BYTES_OF[self.plan.precision]

    @property
    def link(self):
        """Seconds that it travels and that the next stage waits for it."""
        seconds = collective_seconds(self.hardware, tier_of(self.plan, "pp"), 2, self.stream_bytes())
        return seconds * (1 - self.plan.hidden_share("pp", self.hardware))

    @cached_property
    def spans(self):
        """The pipeline played: list (pp) of lists of Span."""
        plan = self.plan
        table = cached_table(plan.schedule, plan.pp, plan.vpp, plan.n_micro)
        return play(plan, table, self.seconds_of, self.link)

    def after_pipeline(self, rank):
        """(seconds of reducing gradients and gathering weights, seconds of the optimizer) on a pipeline rank."""
        plan, hardware, (held, cut) = self.plan, self.hardware, self.params(rank)
        wide, narrow = gradient_bytes(plan), BYTES_OF[plan.precision]
        # gradients; then new weights, or for zero=0 the second half of an all-reduce. zero=3: in LayerTime
        sizes = {0: (wide, wide), 1: (wide, narrow), 3: ()}[plan.zero]
        gradients = sum(weights_seconds(plan, hardware, held, size) for size in sizes)
        hidden = plan.hidden_share("dp", hardware) * gradients
        if hidden:                                         # beside the last backwards
            gradients -= min(hidden, sum(self.seconds_of(Action("B", stage, 0)) for stage in plan.stages_of(rank)))
        optimizer = self.optimizer_bytes(rank) / hardware.memory_rate
        if "optimizer" in plan.swap:                       # two moments come and go
            optimizer += 2 * 8 * cut / hardware.host_bandwidth
        return gradients, optimizer

    def optimizer_bytes(self, rank):
        """Moved by AdamW: reads gradient, master, two moments; writes three of them and the weight."""
        _, cut = self.params(rank)
        return cut * (7 * 4 + BYTES_OF[self.plan.precision])

    @cached_property
    def ends(self):
        """list (pp): seconds at which each pipeline rank is done, optimizer included; the last one's ends the step ..."""
        return [row[-1].end + sum(self.after_pipeline(rank)) for rank, row in enumerate(self.spans)]

    @property
    def straggling(self):
        """... but for what is lost with the number of devices: a share of the step."""
        return self.hardware.scale_loss * math.log2(max(1, self.plan.world_size / self.plan.node_size))

    def breakdown(self):
        """({part: seconds} that add up to the step, a mean over pipeline ranks; seconds of exchange on either link)."""
        parts, travel = Counter(), 0.0
        for rank, row in enumerate(self.spans):
            gradients, optimizer = self.after_pipeline(rank)
            parts.update(gradients=gradients, optimizer=optimizer)
            times = Counter(span.action.stages for span in row)
            for stages, account in self.accounts.items():
                for name, seconds in account.parts.items():
                    parts[name] += times[stages] * seconds
                travel += times[stages] * account.travel
        parts = {name: seconds / self.plan.pp for name, seconds in parts.items()}
        parts["stragglers"] = self.straggling * max(self.ends)
        parts["bubble"] = max(self.ends) + parts["stragglers"] - sum(parts.values())
        return parts, travel / self.plan.pp

    # bytes

    def bytes_by_tier(self):
        """Bytes that a device sends while the pipeline runs, a mean over pipeline ranks; zero=3's weights apart."""
        plan, home, total = self.plan, self.plan.homes(), Counter(inner=0, outer=0)
        for kind in chain(*self.stages):
            total.update(self.times[kind].sent)
        crossings = sum(home[stage] != home[stage + 1] for stage in range(plan.n_stages - 1))
        total[tier_of(plan, "pp")] += 2 * crossings * self.stream_bytes()
        return {tier: sent * plan.n_micro / plan.pp for tier, sent in total.items()}

    def params(self, rank):
        """({axis of Plan.holders: parameters that a pipeline rank holds}, how many it keeps where they are cut)."""
        counts = Counter(self.kinds_of[rank])
        held = {axis: sum(n * self.works[kind].params[axis] for kind, n in counts.items())
                for axis in self.plan.holders}
        cut = sum(held[axis] / (ranks if self.plan.zero else 1) for axis, ranks in self.plan.holders.items())
        return held, cut

    def activations(self, rank):
        """Most bytes that micro-batches in flight keep."""
        plan = self.plan
        by_chunk = [sum(self.saved[kind] for kind in self.stages[stage]) for stage in plan.stages_of(rank)]
        enough = min(plan.n_micro, 4 * plan.turn)          # later turns repeat what was in flight
        moments = in_flight(plan.schedule, plan.pp, plan.vpp, enough, rank)
        return float(np.max(moments @ by_chunk))

    def memory(self, rank):
        """Bytes of a pipeline rank at its peak, by part."""
        plan, hardware, (held, cut) = self.plan, self.hardware, self.params(rank)
        element, whole = BYTES_OF[plan.precision], sum(held.values())
        kept = cut if plan.zero == 3 else whole
        # float32 masters and two moments; whole float32 weights are their own masters
        optimizer = cut * (8 if element >= 4 and cut == whole else 12)
        if "optimizer" in plan.swap:                       # but for the moments that a step has at hand
            optimizer -= max(0, 8 * cut - STEP_BYTES)
        activations, buffers = self.activations(rank), self.buffers(rank)
        if plan.precision == "fp16":                       # the optimizer's float32 copies, when activations are gone
            buffers = max(buffers, 4 * cut - activations)
        groups = sum(size > 1 for size in (plan.tp, plan.pp, plan.cp, plan.ep, plan.dp))
        return dict(weights=kept * element, gradients=kept * gradient_bytes(plan), optimizer=optimizer,
                    activations=activations, buffers=buffers,
                    allocator=hardware.fragmentation * (activations + buffers),
                    framework=hardware.framework + groups * hardware.communicator)

    def buffers(self, rank):
        """Bytes beside those in flight: rows of an exchange, weights gathered for a layer, one layer made again."""
        plan, rows, layer, again = self.plan, 0, 0, 0
        for kind in set(self.kinds_of[rank]):
            work = self.works[kind]
            if plan.ep > 1:                                # those of two passes, before and after
                rows = max(rows, 4 * work.saved.get("rows", 0))
            if plan.zero == 3:                             # weights of two layers, float32 gradients of one
                layer = max(layer, sum(work.params.values()) * (2 * BYTES_OF[plan.precision] + 4))
            again = max(again, sum(work.saved.values()) - self.saved[kind])
        return rows + layer + again

    @cached_property
    def memories(self):
        return [self.memory(rank) for rank in range(self.plan.pp)]

    def overflows(self, parts):
        """Whether a rank needs more than there is when the allocator has given unused pieces back."""
        return sum(parts.values()) - parts["allocator"] > self.hardware.memory

    def refusal(self):
        """Why the step does not fit; "" if it does."""
        if not any(map(self.overflows, self.memories)):
            return ""
        rank = peak_rank(self.memories)
        parts = self.memories[rank]
        return (f"pipeline rank {rank} needs {sum(parts.values()) / GIB:.1f} of {self.hardware.memory / GIB:.1f} GiB, "
                f"most of it {max(parts, key=parts.get)}: use more recompute, pp, tp or zero=3, or a smaller "
                "micro_batch")


def peak_rank(memories):
    needs = [sum(parts.values()) for parts in memories]
    return needs.index(max(needs))


def predict(config, plan, hardware, max_vio=0.0):
    """One step of a plan, simulated: dict of seconds, bytes, GiB and fractions. ValueError for a plan that cannot run.

    max_vio: load of the busiest expert over the mean, minus one. mfu: model FLOPs (causal attention, head and MTP
    included, nothing recomputed) over the peak of the plan's precision. hidden_comm_fraction: of the expert exchange.
    memory_by_stage: one entry per pipeline rank. bytes_by_tier: sent by a device in a step.
    """
    check_plan(config, plan, hardware)
    simulation = Simulation(config, plan, hardware, max_vio)
    parts, travel = simulation.breakdown()
    step, why_not = sum(parts.values()), simulation.refusal()
    peak = peak_rank(simulation.memories)
    rate = plan.global_batch * plan.seq_len / step
    flops = flops_per_token(simulation.shape, plan.seq_len) * rate / plan.world_size       # FLOP/s of a device
    return dict(
        step_time_s=step, tokens_per_s=rate, tokens_per_s_per_device=rate / plan.world_size,
        mfu=flops / hardware.peak[plan.precision], tflops_per_device=flops / 1e12,
        mem_gib=sum(simulation.memories[peak].values()) / GIB, bubble=parts["bubble"] / step,
        exposed_comm_s=parts["exchange"] + parts["collectives"] + parts["gradients"],
        hidden_comm_fraction=1 - parts["exchange"] / travel if travel else 1.0,
        fits=not why_not, why_not=why_not, peak_rank=peak, breakdown=parts,
        memory_by_stage=[{name: size / GIB for name, size in rank.items()} for rank in simulation.memories],
        bytes_by_tier=simulation.bytes_by_tier(), max_vio=max_vio, plan=asdict(plan))


# ---------------------------------------------------------------------------------------------------------------------
# What to recompute and swap, so that a plan fits


def memory_choices(config):
    """Each choice of items to recompute and swap that makes a difference: (recompute, swap), smaller ones first."""
    fine = [item for item in RECOMPUTE if item not in ("core_attention", "layer")]
    swaps = [item for item in SWAP if item != "expert_out" or config.expert_weight == "after_down"]
    choices = []
    for recompute in [("layer",), *subsets(fine)]:
        if not {"attention", "mla_up"} <= set(recompute):                  # the first runs the second again
            choices += [(recompute, swap) for swap in subsets(swaps)]
    return sorted(choices, key=lambda choice: len(choice[0]) + len(choice[1]))


def subsets(items):
    return [chosen for n in range(len(items) + 1) for chosen in combinations(items, n)]


def fit_memory(config, plan, hardware, budget):
    """predict of the plan with the cheapest items to recompute and swap, by simulated time, that needs at most `budget`
    bytes. ValueError says what is missing and what would help."""
    results = []
    for recompute, swap in memory_choices(config):
        results.append(predict(config, replace(plan, recompute=recompute, swap=swap), hardware))
    fitting = [result for result in results if result["mem_gib"] * GIB <= budget]
    if fitting:
        return min(fitting, key=lambda one: (one["step_time_s"], len(one["plan"]["recompute"] + one["plan"]["swap"])))
    least = min(results, key=itemgetter("mem_gib"))
    parts = least["memory_by_stage"][least["peak_rank"]]
    sizes = ", ".join(f"{name} {size:.2f}" for name, size in parts.items() if size >= 0.005)
    items = "+".join(least["plan"]["recompute"] + least["plan"]["swap"])
    raise ValueError(f"fit={budget / GIB:.2f}GiB: with {items} this plan still needs {least['mem_gib']:.2f} GiB "
                     f"(simulated: {sizes}), {least['mem_gib'] - budget / GIB:.2f} GiB too much: use "
                     + what_would_fit(config, plan, hardware, budget))


def what_would_fit(config, plan, hardware, budget):
    """The first of a few changes that brings a plan below the budget, with everything recomputed and swapped."""
    smallest = replace(plan, recompute=("layer",), swap=("optimizer",))
    sharded = dict(zero=3) if max(plan.holders.values()) > 1 else {}
    for change in (dict(micro_batch=1), sharded, dict(micro_batch=1, **sharded)):
        with contextlib.suppress(ValueError):              # a plan that cannot run
            if predict(config, replace(smallest, **change), hardware)["mem_gib"] * GIB <= budget:
                return " ".join(f"{name}={value}" for name, value in change.items())
    return "more devices with pp, tp or ep, shorter sequences, or a smaller model"


# ---------------------------------------------------------------------------------------------------------------------
# Search: every plan is checked, fitted into memory and priced by a formula; the best are played


# (schedule, vpp) to search; pairs are always interleaved inside: overlap=adaptive
SEARCHED = (("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("interleaved", 4),
            ("paired", 1), ("paired", 2), ("paired", 3), ("paired", 4))
PLAYED = 400                               # plans that are played in full, at least


def candidate_groups(config, hardware, devices, **batch):
    """Plans to search, but for zero, dispatch and what is saved, in lists of those that cut a layer alike.

    At most a node of tp, at least 1024 tokens a rank of a context group, micro-batches of at most 8.
    """
    powers = [2**i for i in range(devices.bit_length())]
    tensor = [n for n in powers if n <= hardware.node_size]
    contexts = [n for n in powers if n == 1 or n * 1024 <= batch["seq_len"]]
    experts = divisors(config.n_routed_experts) if has_experts(config) else [1]
    stages = [n for n in divisors(devices) if n <= config.num_hidden_layers + 1]
    for tp, cp, micro_batch, ep in product(tensor, contexts, (1, 2, 4, 8), experts):
        group = []
        for pp, (schedule, vpp) in product(stages, SEARCHED):
            ranks = devices // pp                          # of one stage
            if ranks % (tp * cp) or ranks % ep or (pp == 1 and vpp > 1):
                continue
            group.append(Plan(
                tp=tp, sp=int(tp > 1), cp=cp, pp=pp, dp=ranks // (tp * cp), ep=ep, micro_batch=micro_batch,
                schedule=schedule, vpp=vpp, overlap="adaptive" if schedule == "paired" else "none",
                node_size=hardware.node_size, **batch))
        yield group


def zero_choices(plan):
    """Ways to cut weights and optimizer states that can be best: 1 takes less memory and no more time than 0."""
    return (1, 3) if max(plan.holders.values()) > 1 else (0,)


def exchange_choices(plan):
    """Inside one node all exchanges are the same."""
    return ("flat", "hierarchical", "dedup") if plan.ep > plan.node_size else ("flat",)


class Saving(NamedTuple):
    """What layers recompute and swap, and what that makes of the model's most frequent layer."""
    recompute: tuple
    swap: tuple
    seconds: float                 # of a forward and a backward
    kept: float                    # bytes of a micro-batch


def rank_savings(config, plan, hardware):
    """list of Saving, cheapest first, each of which keeps less than all before it; a swapped optimizer apart."""
    found, best = [], []
    kind = Counter(layer_kinds(config)).most_common(1)[0][0]
    for recompute, swap in memory_choices(config):
        if "optimizer" not in swap:
            simulation = Simulation(config, replace(plan, recompute=recompute, swap=swap), hardware)
            alone, _ = layer_seconds(simulation, layer_time(config, simulation.plan, kind, hardware, 0.0))
            kept = saved_bytes(layer_work(config, simulation.plan, kind))[0]
            found.append(Saving(recompute, swap, alone, kept))
    for saving in sorted(found, key=lambda saving: (saving.seconds, saving.kept)):
        if not best or saving.kept < best[-1].kept:
            best.append(saving)
    return best


def fitted(config, plan, hardware, savings):
    """([this plan with the cheapest saving that fits, for each way to hold the optimizer], or why none fits)."""
    plans, why_not = [], ""
    for zero, swapped in product(zero_choices(plan), ((), ("optimizer",))):
        tried = [replace(plan, zero=zero, recompute=saving.recompute, swap=saving.swap + swapped) for saving in savings]
        first, why_not = first_that_fits(config, tried, hardware)
        plans += tried[first:first + 1]
        if first == 0:                                     # nothing is recomputed: less memory gains nothing more
            break
    return plans, "" if plans else "recomputed and swapped as much as can be, " + why_not


def first_that_fits(config, plans, hardware):
    """(index of the first that fits, found by halving, since each needs less memory than those before; why not all)."""
    def simulate(index):
        return Simulation(config, plans[index], hardware)

    low, high = 0, len(plans) - 1
    if not fits(simulate(high)):
        return len(plans), simulate(high).refusal()
    while low < high:
        middle = (low + high) // 2
        if fits(simulate(middle)):
            high = middle
        else:
            low = middle + 1
    return low, ""


def fits(simulation):
    return not any(simulation.overflows(simulation.memory(rank)) for rank in simulation.unlike_ranks)


def price(simulation):
    """About the seconds of a step, by a formula: what the slowest rank has to do, and the bubble.

    Layers are timed alone, their exposed exchange among it. The bubble: the other ranks' forward and backward of one
    micro-batch, over vpp. Pairs fill the steady steps alone.
    """
    plan, alone, paired, slowest = simulation.plan, {}, {}, 0.0
    for kind in simulation.kinds:
        alone[kind], paired[kind] = layer_seconds(simulation, simulation.times[kind])
    total = sum(alone[kind] for kind in chain(*simulation.stages))         # of one micro-batch on all ranks
    for rank in simulation.unlike_ranks:
        kinds = simulation.kinds_of[rank]
        once, steady = sum(alone[kind] for kind in kinds), sum(paired[kind] for kind in kinds)
        unpaired = min(1.0, warm_up(plan, rank) / (plan.n_micro * plan.vpp))
        work = plan.n_micro * (unpaired * once + (1 - unpaired) * steady)
        bubble = (total - once) / plan.vpp
        slowest = max(slowest, work + bubble + sum(simulation.after_pipeline(rank)))
    hops = 2 * (plan.pp - 1) * simulation.link
    return (slowest + hops) * (1 + simulation.straggling)


def layer_seconds(simulation, layer):
    """(seconds of one layer's forward and backward alone, of both as a pair where the schedule has pairs)."""
    alone = simulation.play_layers((layer,), ()).seconds + simulation.play_layers((), (layer,)).seconds
    if simulation.plan.schedule != "paired":
        return alone, alone
    return alone, simulation.play_layers((layer,), (layer,)).seconds


def price_group(config, hardware, plans):
    """([(seconds by price, plan)] of those that can run and fit, [why one was left out]). plans: of candidate_groups."""
    config = on_hardware(config, hardware)                 # one Shape for all: it is compared by what it is
    priced, reasons, savings = [], [], []
    for plan in plans:
        try:
            check_plan(config, plan, hardware)
        except ValueError as error:
            reasons.append(str(error))
            continue
        dispatches = exchange_choices(plan)
        savings = savings or rank_savings(config, replace(plan, dispatch=dispatches[-1]), hardware)
        fitting, why_not = fitted(config, plan, hardware, savings)
        reasons += [why_not] if why_not else []
        for one, dispatch in product(fitting, dispatches):
            one = replace(one, dispatch=dispatch)
            priced.append((price(Simulation(config, one, hardware)), one))
    return priced, reasons


class Search(NamedTuple):
    found: list                    # predictions of the plans that were played, the fastest first
    refused: dict                  # refusal without its numbers -> (how often, an example)
    priced: int                    # plans that can run and fit
    interrupted: bool


def search_plans(config, hardware, devices, top=10, **batch):
    """The best plans by price are played, PLAYED or `top` of them; interrupted while it prices, the `top` best so far.

    A search, not a proof: a plan whose price is too high by more than the others' is missed.
    """
    groups = list(candidate_groups(config, hardware, devices, **batch))
    priced, refused, found, interrupted = [], {}, [], False
    with multiprocessing.Pool(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            answers = pool.imap_unordered(partial(price_group, config, hardware), groups)
            for more, reasons in with_progress("groups of plans priced", answers, len(groups)):
                priced += more
                count_refusals(refused, reasons)
        except KeyboardInterrupt:
            interrupted = True
        priced.sort(key=itemgetter(0))
        best = [plan for _, plan in priced[:top if interrupted else max(top, PLAYED)]]
        try:
            answers = pool.imap_unordered(partial(predict, config, hardware=hardware), best)
            for result in with_progress("plans played", answers, len(best)):
                found.append(result)
        except KeyboardInterrupt:
            interrupted = True
    found.sort(key=itemgetter("step_time_s"))
    return Search(found, refused, len(priced), interrupted)


def count_refusals(refused, reasons):
    for reason in reasons:
        kind = re.sub(r"[0-9.]+", "#", reason)
        times, _ = refused.get(kind, (0, ""))
        refused[kind] = times + 1, reason


def with_progress(what, items, total=None):
    """The items, and on stderr from the third second on how many were taken and the time that the rest will need."""
    begin = shown = time.monotonic()
    total = total or len(items)
    for i, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now > shown + 1 and now > begin + 3:
            left, shown = (now - begin) / (i + 1) * (total - i - 1), now
            print(f"\r{what}: {i + 1} of {total}, at most {left:.0f} s left  ", end="", file=sys.stderr)
            sys.stderr.flush()
    if shown > begin:
        print(file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: the architecture search


PANGU = PRESETS["pangu-ultra-moe-718b"]


def candidate_shapes(budget):
    """(shape, active, total parameters) of shapes like Pangu Ultra MoE's, of an active and a total size within 3 % of
    the budget (embedding not counted).

    All sizes are multiples of 256 and counts of experts and heads powers of two, for the cube and any plan.
    """
    tolerance = 0.03
    axes = dict(num_hidden_layers=range(48, 81), hidden_size=range(5120, 9217, 256),
                moe_intermediate_size=range(1024, 4097, 512), n_routed_experts=(128, 256, 512),
                num_experts_per_tok=(4, 8, 16), num_attention_heads=(64, 128), q_lora_rank=(1024, 1536, 2048))
    for values in product(*axes.values()):
        shape = dict(zip(axes, values))
        shape["intermediate_size"] = round(2.4 * shape["hidden_size"] / 256) * 256         # the paper's ratio
        active, total = shape_size(PANGU, **shape)
        if abs(active / budget["active"] - 1) < tolerance and abs(total / budget["total"] - 1) < tolerance:
            yield replace(PANGU, **shape), active, total


def shape_size(config, **shape):
    """(active, total) parameters with the head, without embedding and MTP, of a model with these sizes."""
    counts = count_params(replace(as_shape(config), **shape))              # a Shape does not check itself
    return tuple(counts[part] - counts["embedding"] for part in ("active", "total"))


def shape_plans(hardware, devices, seq_len):
    """Plans that a shape is tried under: the paper's cut and its neighbours, 48 micro-batches of 2 a replica."""
    tp = min(8, hardware.node_size)
    for pp, vpp, ep in product((8, 16), (1, 2), (32, 64)):
        dp = devices // (tp * pp)
        if dp and tp * pp * dp == devices:
            yield Plan(pp=pp, tp=tp, sp=1, dp=dp, ep=ep, vpp=vpp, micro_batch=2, global_batch=dp * 96, seq_len=seq_len,
                       node_size=hardware.node_size, dispatch="hierarchical", overlap="adaptive", recompute=FINE)


def fastest(config, plans, hardware):
    """The prediction with most tokens/s of a shape under the plans that suit it and fit in memory, or None."""
    found = []
    for plan in plans:
        with contextlib.suppress(ValueError):
            found.append(predict(config, plan, hardware))
    return max((one for one in found if one["fits"]), key=itemgetter("tokens_per_s"), default=None)


def parse_budget(text):
    match = re.fullmatch(r"active=([^,]+),total=([^,]+)", text)
    try:
        budget = dict(active=float(match[1]), total=float(match[2]))
        require(all(0 < size < math.inf for size in budget.values()), "")
    except (TypeError, ValueError):
        raise ValueError(f"budget={text!r}: write active=39e9,total=718e9, parameters, both above 0") from None
    return budget


def print_shapes(hardware, devices, budget, seq_len, top, experts):
    shapes = [one for one in candidate_shapes(budget) if experts in (0, one[0].n_routed_experts)]
    plans, rows = list(shape_plans(hardware, devices, seq_len)), []
    require(shapes, f"budget={budget}: no shape within 3 % of both, use another ratio of active to total")
    require(plans, f"devices={devices}: use a multiple of 8 * 16 = 128")
    for config, active, total in with_progress("shapes tried", shapes):
        result = fastest(config, plans, hardware)
        if result:
            rows.append((config, active, total, result))
    rows.sort(key=lambda row: -row[-1]["tokens_per_s"])
    print(f"{len(shapes)} shapes within 3 % of {budget['active'] / 1e9:.0f} B active and {budget['total'] / 1e9:.0f} B "
          f"in all; {len(rows)} run on {devices} {hardware.name}, {peak_words(hardware)}, sequences of {seq_len}.\n"
          "Only speed is simulated: what a shape learns is beyond this table. Sizes leave out embedding and MTP layer.\n"
          "\nrank  tokens/s    MFU  active  total  layers hidden experts width top heads q-rank  plan")
    for rank, (c, active, total, result) in enumerate(rows, 1):
        if rank <= top or c == PANGU:
            print(f"{rank:4} {result['tokens_per_s']:9.3g} {result['mfu']:6.1%} {active / 1e9:6.1f}B {total / 1e9:5.0f}B",
                  f"{c.num_hidden_layers:7} {c.hidden_size:6} {c.n_routed_experts:7} {c.moe_intermediate_size:5}",
                  f"{c.num_experts_per_tok:3} {c.num_attention_heads:5} {c.q_lora_rank:6}",
                  " pp={pp} vpp={vpp} ep={ep}".format(**result["plan"]), "<- Pangu Ultra MoE" if c == PANGU else "")


# ---------------------------------------------------------------------------------------------------------------------
# The published runs


# Pangu Ultra MoE (arXiv:2505.04519; "6K" and "4K" devices read as 6,144 and 4,096). Not published, so assumed here:
# batch and all of the baseline's plan, its load among it.
SHARED = dict(pp=16, tp=8, sp=1, ep=32, vpp=2, micro_batch=2)
FINE = ("mla_up", "act", "permute")
PAPER = {
    "optimised": dict(tokens_per_s=1.46e6, mfu=0.300, max_vio=0.0, plan=dict(
        SHARED, dp=48, dispatch="hierarchical", overlap="adaptive", recompute=FINE, global_batch=48 * 2 * 48)),
    "baseline": dict(tokens_per_s=0.61e6, mfu=0.189, max_vio=0.3, plan=dict(
        SHARED, dp=32, recompute=("layer",), global_batch=32 * 2 * 48))}
PAPER_DEVICES, PAPER_LENGTH = 6144, 4096                   # of the optimised run; the length is assumed
PAPER_BINS = ("ascend_910b_376", "ascend_910b_313", "ascend_910b_280")

# Pangu Ultra, 135B dense, its predecessor (arXiv:2504.07866)
PANGU_ULTRA = Shape(
    vocab_size=153376, hidden_size=12288, num_hidden_layers=94, first_k_dense_replace=94, intermediate_size=28672,
    attn_type="gqa", num_attention_heads=96, num_key_value_heads=8, head_dim=128, n_routed_experts=1,
    num_experts_per_tok=1, n_shared_experts=0, num_nextn_predict_layers=0, balance="none", norm="dssn",
    max_position_embeddings=131072)
ULTRA_PLAN = Plan(tp=8, sp=1, pp=8, vpp=6, dp=128, micro_batch=1, global_batch=2048, seq_len=4096)
ULTRA_BUBBLES = {1: "30.45 %", 6: "6.8 %"}                 # vpp -> as published: (p - 1) / (p - 1 + v * n)


def simulate_paper(name, hardware, **changes):
    """predict of one of PAPER. changes: fields of Plan, max_vio."""
    settings = dict(PAPER[name]["plan"], max_vio=PAPER[name]["max_vio"]) | changes
    max_vio = settings.pop("max_vio")
    return predict(PANGU, Plan(**settings), hardware, max_vio)


def print_paper():
    print("pangu-ultra-moe-718b on Ascend 910B. Published: arXiv:2505.04519; simulated: nothing was run on an NPU.\n"
          "Not published, so assumed: length, bin, batch (48 micro-batches of 2 a replica), the baseline's plan (the\n"
          "same cut, flat exchange, no overlap, layers recomputed), loads (the baseline's busiest rank 30 % above the\n"
          "mean, the optimised run's none). Judge by tokens/s: the paper does not say how it counts MFU. `ours`: its\n"
          "tokens/s by our count, of causal attention, head and MTP, over the bin's bf16 peak, as simulated MFU is.\n\n"
          "                                                | published                  | simulated\n"
          "run         NPUs  bin             TFLOP/s length |   tokens/s     MFU    ours |   tokens/s     MFU   step s"
          "  GiB, fits 64?")
    for (name, run), bin_name, seq_len in product(PAPER.items(), PAPER_BINS, (PAPER_LENGTH, 2 * PAPER_LENGTH)):
        hardware = HARDWARE[bin_name]
        result = simulate_paper(name, hardware, seq_len=seq_len)
        devices, peak = 128 * result["plan"]["dp"], hardware.peak["bf16"]
        ours = run["tokens_per_s"] * flops_per_token(PANGU, seq_len) / devices / peak
        print(f"{name:10} {devices:5}  {bin_name} {peak / 1e12:7.1f} {seq_len:6} |",
              f"{run['tokens_per_s']:10.3g} {run['mfu']:7.1%} {ours:7.1%}",
              "| {tokens_per_s:10.3g} {mfu:7.1%} {step_time_s:8.2f} {mem_gib:6.1f}".format(**result),
              "yes" if result["fits"] else "no")
    hardware = HARDWARE[PAPER_BINS[0]]
    print_predecessor(hardware)
    print(f"\nThe optimised run, {hardware.name} at {PAPER_LENGTH} (all simulated)")
    print_prediction(simulate_paper("optimised", hardware, seq_len=PAPER_LENGTH))
    print_hidden(hardware)


def print_predecessor(hardware):
    print(f"\nPangu Ultra 135B, dense, on 8192 {hardware.name}, 2048 sequences of 4096 (published: arXiv:2504.07866)\n"
          "vpp | published: bubble | simulated: bubble     MFU   step s")
    for vpp, published in ULTRA_BUBBLES.items():
        result = predict(PANGU_ULTRA, replace(ULTRA_PLAN, vpp=vpp, schedule=""), hardware)
        print(f"{vpp:3} | {published:>17} |",
              "          {bubble:7.1%} {mfu:7.1%} {step_time_s:8.2f}".format(**result))


def print_hidden(hardware):
    """Which actions expose the exchange."""
    simulation = Simulation(PANGU, Plan(seq_len=PAPER_LENGTH, **PAPER["optimised"]["plan"]), hardware)
    exposed = Counter()
    for span in chain(*simulation.spans):
        exposed[span.action.kind == "FB"] += simulation.account(span.action).parts["exchange"]
    ranks = simulation.plan.pp
    print(f"\nHidden is the share of the exchange that runs beside computation. Not hidden: {exposed[False] / ranks:.2f}"
          f" s in the passes that have\nno partner, before and after the steady steps, where the shared expert alone "
          f"hides a part, and {exposed[True] / ranks:.2f} s in pairs,\nwhere an exchange is longer than what runs "
          "beside it. The paper states no share; later press says more than 98 %.")


def print_prediction(result):
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:24} {value:12.4g}")
    print("\nwhere the step goes         seconds   share   (mean over pipeline ranks)")
    for name, seconds in sorted(result["breakdown"].items(), key=itemgetter(1), reverse=True):
        print(f"{name:24} {seconds:10.3f} {seconds / result['step_time_s']:7.1%}")
    sent = result["bytes_by_tier"]
    print(f"\nsent by a device per step: {sent['inner'] / 1e9:.2f} GB inside its node, {sent['outer'] / 1e9:.2f} GB "
          "between nodes")
    print("\nGiB at the peak\nrank ", *(f"{name:>11}" for name in result["memory_by_stage"][0]), "        sum")
    for rank, parts in enumerate(result["memory_by_stage"]):
        sizes = [*parts.values(), sum(parts.values())]
        print(f"{rank:5}", *(f"{size:11.2f}" for size in sizes), " <- peak" if rank == result["peak_rank"] else "")
    print(f"\nfits: {'yes' if result['fits'] else 'no, ' + result['why_not']}")


# ---------------------------------------------------------------------------------------------------------------------
# The step as a picture


class Tail(NamedTuple):
    """What a rank does when its pipeline is done."""
    name: str                      # gradients | optimizer | stragglers
    stream: str
    start: float                   # seconds from the step's start
    end: float


def tails_of(simulation):
    """list (pp) of lists of Tail; the last one of each rank ends with the step."""
    tails, last = [], max(simulation.ends)
    for rank, row in enumerate(simulation.spans):
        start = row[-1].end
        gradients, optimizer = simulation.after_pipeline(rank)
        tails.append([
            Tail("gradients", tier_of(simulation.plan, "dp"), start, start + gradients),
            Tail("optimizer", "compute", start + gradients, start + gradients + optimizer),
            Tail("stragglers", "schedule", last, last * (1 + simulation.straggling))])
    return tails


def write_trace(simulation, path, about):
    """The step as Chrome trace events: a process per pipeline rank, a thread per stream, microseconds. about: a dict
    of what the file says of itself."""
    threads, events = ["schedule", "compute", "inner", "outer", "host"], []

    def add(rank, name, stream, start, end):
        events.append(dict(ph="X", name=name, cat=stream, pid=rank, tid=threads.index(stream), ts=1e6 * start,
                           dur=1e6 * (end - start)))

    for rank, (row, tail) in enumerate(zip(simulation.spans, tails_of(simulation))):
        events.append(dict(ph="M", name="process_name", pid=rank, tid=0, args={"name": f"pipeline rank {rank}"}))
        for number, stream in enumerate(threads):
            events.append(dict(ph="M", name="thread_name", pid=rank, tid=number, args={"name": stream}))
        for start, end, action in row:
            add(rank, str(action), "schedule", start, end)
            for task in simulation.tasks_of(action):
                add(rank, task.name, task.stream, start + task.start, start + task.end)
        for name, stream, start, end in tail:
            for each in {"schedule", stream}:
                add(rank, name, each, start, end)
    with open(path, "w") as file:
        json.dump(dict(traceEvents=events, displayTimeUnit="ms", otherData=about), file)


TEXT_LEGEND = ("forwards are the last digit of their micro-batch, backwards a letter (a is 0), = a pair of both; G "
               "gradients,\nO optimizer, S stragglers; blank: the rank waits")


def draw_text(spans, tails=(), columns=120):
    """A played table as text, a line per rank."""
    rows = []
    for row in spans:
        bars = []
        for start, end, (kind, _, microbatch, _) in row:
            letter = chr(ord("a") + microbatch % 26)
            bars.append((start, end, {"F": str(microbatch % 10), "FB": "=", "B": letter}[kind]))
        rows.append(bars)
    for bars, tail in zip(rows, tails):
        bars += [(one.start, one.end, one.name[0].upper()) for one in tail]
    scale, lines = columns / max(bars[-1][1] for bars in rows), []
    for bars in rows:
        line = [" "] * columns
        for start, end, mark in bars:
            first, last = round(start * scale), round(end * scale)
            line[first:last] = mark * (last - first)
        lines.append("".join(line))
    return "\n".join(lines)


COLOURS = dict(F="tab:blue", B="tab:orange", gradients="tab:green", optimizer="tab:red", stragglers="tab:gray")


def draw_png(simulation, path, title):
    """The step as a picture, a row per rank: of pairs the forward above, later chunks darker."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import colors, patches, pyplot
    plan = simulation.plan

    def colour(kind, chunk):
        return colors.to_rgba(COLOURS[kind], 0.4 + 0.6 * (1 + chunk) / plan.vpp)

    bars = []                                              # (y, start, end, colour, height in points)
    for rank, (row, tail) in enumerate(zip(simulation.spans, tails_of(simulation))):
        for start, end, action in row:
            parts = action.parts()
            for i, (kind, stage, _) in enumerate(parts):
                y = rank + (i + 0.5) / len(parts) - 0.5
                bars.append((y, start, end, colour(kind, plan.stages_of(rank).index(stage)), 24 / len(parts)))
        bars += [(rank, start, end, COLOURS[name], 24) for name, _, start, end in tail]
    figure, axes = pyplot.subplots(figsize=(16, 2 + 0.4 * plan.pp), layout="constrained")
    y, start, end, colour_of, width = zip(*bars)
    axes.hlines(y, start, end, colour_of, linewidth=width)
    axes.margins(x=0.01)
    axes.set(xlabel="seconds, simulated", ylabel="pipeline rank", ylim=(plan.pp - 0.5, -0.5))
    axes.set_title(title, fontsize=9)
    shown = [(f"{name}, chunk {chunk}", colour(kind, chunk))
             for kind, name in (("F", "forward"), ("B", "backward")) for chunk in range(plan.vpp)]
    shown += [(name, COLOURS[name]) for name in ("gradients", "optimizer", "stragglers")]
    figure.legend(handles=[patches.Patch(color=colour, label=label) for label, colour in shown],
                  loc="outside lower center", ncols=len(shown))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def peak_words(hardware, precision="bf16"):
    precision = precision if precision in hardware.peak else next(iter(hardware.peak))
    return f"{hardware.peak[precision] / 1e12:.1f} TFLOP/s in {precision} each"


def describe(plan):
    """What of a plan (a dict) is not the default, as --plan takes it."""
    chosen = []
    for setting in fields(Plan):
        value = plan[setting.name]
        if value != setting.default:
            chosen.append(f"{setting.name}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}")
    return ",".join(chosen)


def print_header(model, hardware, plan, why):
    print(f"{model} on {plan.world_size} {hardware.name}, {peak_words(hardware, plan.precision)}; a step of "
          f"{plan.global_batch} sequences of {plan.seq_len} tokens; simulated, nothing was run\n"
          f"plan: {describe(asdict(plan))}\n      ({why})\n")


def choose_plan(text, model, hardware, devices):
    """(Plan, where it comes from): --plan's settings, put on the paper's plan where model and hardware are the paper's,
    else on the defaults. Data ranks that are not given are what the devices leave; without --devices a node is filled.
    """
    given = re.findall(r"(\w+)=", text)
    if model == "pangu-ultra-moe-718b" and hardware.name in PAPER_BINS:
        plan = parse_plan(text, **PAPER["optimised"]["plan"], seq_len=PAPER_LENGTH)
        fill, why = devices or PAPER_DEVICES, "the paper's plan"
    else:
        plan = parse_plan(text, node_size=hardware.node_size)
        fill, why = devices or min(8, hardware.node_size), "the defaults; `plans` searches for the best"
    if text:
        why += ", but for what --plan says"
    replica = plan.pp * plan.cp * plan.tp
    if "dp" not in given and fill % replica == 0:          # else check_plan says which number of devices would do
        plan = replace(plan, dp=fill // replica)
        why += f"; dp={plan.dp} fills {fill} devices"
    if "global_batch" not in given and plan.global_batch < plan.dp * plan.micro_batch * plan.pp:
        plan = replace(plan, global_batch=plan.dp * plan.micro_batch * plan.pp)            # any schedule can run these
        why += f"; global_batch={plan.global_batch}: pp micro-batches"
    return plan, why


def parse_load(text, config):
    """--load max_vio=X -> X."""
    most = config.n_routed_experts / config.num_experts_per_tok - 1        # every token goes to the busiest expert
    match = re.fullmatch(r"max_vio=(\d+\.?\d*|\.\d+)", text)
    require(match and float(match[1]) <= most,
            f"load={text!r}: write max_vio=X, the busiest rank's load over the mean, minus one: from 0 to {most:g}")
    return float(match[1])


def read_preset(kind, cls, presets, name):
    """A preset, or a JSON file of cls's fields, which may name a preset as `base` to start from."""
    if name in presets:
        return presets[name]
    try:
        with open(name) as file:
            values = json.load(file)
    except (OSError, json.JSONDecodeError):
        raise ValueError(f"{kind} {name!r}: use a JSON file or one of {', '.join(presets)}") from None
    base = presets.get(values.pop("base", None))
    unknown = set(values) - {field.name for field in fields(cls)}
    require(not unknown, f"{name} has unknown fields {sorted(unknown)}: use fields of {cls.__name__}")
    return replace(base, **values) if base else cls(**values)


class Parser(argparse.ArgumentParser):
    def error(self, message):                              # one line, without the usage
        raise ValueError(f"{message}: see {self.prog} --help")


def positive(text):
    if not re.fullmatch(r"\d+", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def parse_arguments(argv):
    parser = Parser(description="Simulates training steps; alone, Pangu Ultra MoE beside its paper.")
    commands = parser.add_subparsers(dest="command")
    for name, about in (("predict", "one plan: seconds, tokens/s, memory"),
                        ("plans", "the fastest plans that fit; up to two minutes on two cores for thousands of devices"),
                        ("trace", "one step as a timeline"), ("shapes", "the fastest shapes of a budget")):
        command = commands.add_parser(name, help=about, description=about)
        if name != "shapes":
            command.add_argument("--model", default="pangu-ultra-moe-718b",
                                 help="preset, or JSON file of Config's fields")
        command.add_argument("--hardware", default="ascend_910b_376", help="preset, or JSON file of Hardware's fields")
        command.add_argument("--devices", type=positive, help="number of devices; default: the plan's, for plans one "
                             f"node, for shapes {PAPER_DEVICES}")
        if name in ("plans", "shapes"):
            command.add_argument("--seq-len", type=positive, default=4096, help="tokens in a sequence")
            command.add_argument("--top", type=positive, default=10, help="rows to print")
        if name == "plans":
            command.add_argument("--global-batch", type=positive, required=True, help="sequences in an optimizer step")
        if name == "shapes":
            command.add_argument("--budget", default="active=39e9,total=718e9", help="parameters, no embedding, no MTP")
            command.add_argument("--experts", type=int, default=256, help="routed experts of a layer; 0: any")
        if name in ("predict", "trace"):
            command.add_argument("--plan", default="", help="key=value,... with lists joined by +, put on the paper's "
                                 "plan for its model on its hardware, else on defaults that fill the devices")
            command.add_argument("--load", default="max_vio=0", help="max_vio=X: the busiest rank's load / mean - 1")
        if name == "predict":
            command.add_argument("--json", action="store_true", help="one JSON object on stdout: s, GiB, bytes")
        if name == "trace":
            command.add_argument("--out", default="trace.json", help="file for Perfetto or chrome://tracing")
            command.add_argument("--png", help="draw the pipeline to this file too; needs matplotlib")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.command is None:
        return print_paper()
    hardware = read_preset("hardware", Hardware, HARDWARE, args.hardware)
    if args.command == "shapes":
        budget = parse_budget(args.budget)
        return print_shapes(hardware, args.devices or PAPER_DEVICES, budget, args.seq_len, args.top, args.experts)
    config = read_preset("model", Config, PRESETS, args.model)
    if args.command == "plans":
        return run_plans(args, config, hardware)
    plan, why = choose_plan(args.plan, args.model, hardware, args.devices)
    check_plan(config, plan, hardware, args.devices)
    max_vio = parse_load(args.load, config)
    if args.command == "trace":
        return run_trace(args, Simulation(config, plan, hardware, max_vio), why)
    result = predict(config, plan, hardware, max_vio)
    if args.json:
        print(json.dumps(result))
    else:
        print_header(args.model, hardware, plan, why)
        print_prediction(result)


def run_plans(args, config, hardware):
    devices = args.devices or hardware.node_size
    print(f"{args.model} on {devices} {hardware.name}, {peak_words(hardware)}; a step of {args.global_batch} sequences "
          f"of {args.seq_len} tokens; all simulated", flush=True)
    begin = time.monotonic()
    search = search_plans(config, hardware, devices, args.top, global_batch=args.global_batch, seq_len=args.seq_len)
    ending = "interrupted" if search.interrupted else "ended"
    print(f"{search.priced} plans that fit were priced by a formula, the best {len(search.found)} of them played: a "
          f"search, not a proof; it {ending} after {time.monotonic() - begin:.0f} s\n\nstep s     MFU     GiB  plan")
    for result in search.found[:args.top]:
        print(f"{result['step_time_s']:6.2f} {result['mfu']:7.1%} {result['mem_gib']:7.1f}  {describe(result['plan'])}")
    print("\nLeft out, how often and one example each:")
    for times, message in sorted(search.refused.values(), reverse=True):
        print(f"{times:6}  {message}")


def run_trace(args, simulation, why):
    if args.png and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--png draws with matplotlib, which is not installed: pip install matplotlib, or drop --png")
    plan = simulation.plan
    print_header(args.model, simulation.hardware, plan, why)
    about = dict(model=args.model, hardware=simulation.hardware.name, devices=plan.world_size, seq_len=plan.seq_len,
                 plan=describe(asdict(plan)), source="simulated by sim.py, nothing was run")
    write_trace(simulation, args.out, about)
    print(draw_text(simulation.spans, tails_of(simulation)))
    print(TEXT_LEGEND)
    print(f"\nwrote {args.out}, for https://ui.perfetto.dev or chrome://tracing")
    if args.png:
        draw_png(simulation, args.png, f"{args.model} on {plan.world_size} {simulation.hardware.name}, simulated\n"
                                       f"{describe(asdict(plan))}")
        print(f"wrote {args.png}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"sim.py: {error}", file=sys.stderr)
        sys.exit(2)
