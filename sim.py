"""
Plans, counts, schedules and the clock: what a training step will do, computed without a device.

    python sim.py                                # Pangu Ultra MoE on 6,144 Ascend 910B, the published run beside it
    python sim.py predict --model M --hardware H --devices N --plan tp=8,pp=16,... [--json]
    python sim.py plans --model M --hardware H --devices N --global-batch B
    python sim.py shapes --hardware H --devices N --budget active=39e9,total=718e9
    python sim.py trace --out trace.json         # a timeline for Perfetto or chrome://tracing; --png draws the pipeline

sim.py plans, parallel.py executes: it runs the schedules timed here, sends the bytes and saves the tensors counted
here; tests compare. Nothing here builds a tensor, and nothing here was compared with a run on an NPU.

Units: bytes, seconds, FLOPs (a multiply-add is two) and FLOP/s, unless a name says otherwise.

Modelled: matmuls by local shape and cores, other operators as bytes or arithmetic, a start-up cost of each, collectives
by tier and topology, four streams of a device (compute, links inside the node, between nodes, to the host) with a tax
on what runs side by side, unequal stages, an allocator's loss; replicas are alike. Not modelled: contention between
replicas, the host's own pace, heat. The constants are fitted on published runs by tests/published.py, which also says
how far off they are.
"""
import argparse
import contextlib
import difflib
import io
import json
import math
import multiprocessing
import re
import signal
import sys
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from itertools import chain, combinations, islice, product, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model import (PRESETS, Config, check_setting, check_settings, count_params, divisors, flops_per_token,
                   layer_flops, layer_kinds, require, sequences_of_group, setting)

# ---------------------------------------------------------------------------------------------------------------------
# The plan: how a model is cut, what is saved, how it is run

GIB = 2**30
# bytes of an activation; with fp8 and mxfp8 only matmuls read 8 bits, what they read is kept in 16
BYTES_OF = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2, "mxfp8": 2}
NARROW = ("fp8", "mxfp8")
RECOMPUTE = (
    "norm",            # outputs of norms
    "mla_up",          # queries, keys and values, from their latents, or from what else they are made of
    "act",             # hidden activations of MLPs and experts, from gate and up
    "permute",         # rows of experts, which travel once more
    "expert",          # all between the rows and the output of experts
    "attention",       # all between a layer's input and the output projection
    "layer")           # all but the layer's input
SWAP = ("expert_out", "attn_out", "optimizer")
EXCHANGES = ("flat", "hierarchical", "dedup")          # ways of the experts' rows; see exchange_bytes


@dataclass(frozen=True)
class Plan:
    """How a model is cut over pp*dp*cp*tp devices and run. check_plan says whether it fits a shape.

    Dense mesh (pp, dp, cp, tp), tp innermost; expert mesh (pp, edp, ep) over the same ranks, ep contiguous: the experts
    of a layer are spread over the tensor group too, never split by it.
    """
    pp: int = setting(1, text="pipeline ranks")
    dp: int = setting(1, text="data parallel replicas")
    cp: int = setting(1, text="context parallel: ranks that share a sequence")
    tp: int = setting(1, text="tensor parallel ranks")
    sp: int = setting(0, 1, text="1: tensor ranks cut the residual stream along the sequence")
    ep: int = setting(1, text="ranks that share one set of experts")
    vpp: int = setting(1, text="model chunks of a pipeline rank")
    node_size: int = setting(8, text="devices of a node: the reach of the fast links")
    micro_batch: int = setting(1, text="sequences of a forward on each replica")
    global_batch: int = setting(1, text="sequences of one optimizer step")
    seq_len: int = setting(1024, text="tokens of a sequence")
    zero: int = setting(1, choices=(0, 1, 3), text="0: replicated | 1: optimizer states cut over data ranks | "
                                                   "3: weights and gradients too")
    schedule: str = setting("", choices=("1f1b", "interleaved", "paired"),
                            text="order of micro-batches; default: paired with overlap, else by vpp")
    overlap: str = setting("none", "adaptive", text="how a pair of forward and backward runs: one after the other | "
                                                    "interleaved, which hides the exchange")
    dispatch: str = setting(EXCHANGES[0], choices=EXCHANGES, text="exchange of the experts' rows")
    recompute: tuple = setting((), choices=RECOMPUTE, text="what backward computes again, joined by , or +")
    swap: tuple = setting((), choices=SWAP, text="what waits in the host's memory, joined by , or +")
    layer_split: tuple = setting((), least=0, text="hidden layers of each stage, joined by , or +; default: by FLOPs")
    precision: str = setting("bf16", choices=tuple(BYTES_OF), text="of activations and matmuls")
    balance_live: int = setting(0, least=0, text="steps between decisions where experts live; 0: they stay")
    balance_threshold: float = setting(0.08, least=0, text="experts move if the deviation of the devices' loads falls "
                                                           "by this share of their mean")

    def __post_init__(self):
        for name in ("recompute", "swap", "layer_split"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        usual = "paired" if self.overlap == "adaptive" else "1f1b" if self.vpp == 1 else "interleaved"
        object.__setattr__(self, "schedule", self.schedule or usual)

    # -- sizes of the step

    @property
    def world_size(self):
        return self.pp * self.dp * self.cp * self.tp

    @property
    def at_once(self):
        """Sequences in one micro-batch of all replicas."""
        return self.dp * self.micro_batch

    @property
    def n_micro(self):
        """Micro-batches of one step on each replica."""
        return self.global_batch // self.at_once

    @property
    def element(self):
        """Bytes of a weight or an activation."""
        return BYTES_OF[self.precision]

    @property
    def gathered_tokens(self):
        """Tokens of one micro-batch in the matmuls that the tensor group cuts."""
        return self.micro_batch * self.seq_len // self.cp

    @property
    def tokens(self):
        """Tokens of one micro-batch on a rank's residual stream, which are those that it sends to experts."""
        return self.gathered_tokens // (self.tp if self.sp else 1)

    # -- the pipeline: stage s is on rank s % pp, so the chunks of a rank are pp stages apart

    @property
    def n_stages(self):
        return self.pp * self.vpp

    def stages_of(self, rank):
        return list(range(rank, self.n_stages, self.pp))

    @property
    def turn(self):
        """Micro-batches that a rank runs of one chunk before the next chunk has its turn: pp, or what divides n_micro.

        With pp=4, 8 micro-batches run in two turns of 4, and 10 in two turns of 5.
        """
        turns = max(1, self.n_micro // self.pp)
        return self.n_micro // turns

    @property
    def is_plain(self):
        """Micro-batches run one after the other, without stages, pairs or deferred weight gradients."""
        return self.n_stages == 1 and self.schedule == "1f1b"

    # -- groups of ranks

    @property
    def inner(self):
        """Ranks of an expert group inside one node; ep // inner nodes form the outer group."""
        return min(self.ep, self.node_size)

    @property
    def edp(self):
        """Ranks that hold the same experts."""
        return max(1, self.dp * self.cp * self.tp // self.ep)

    @property
    def holders(self):
        """Axis -> ranks that hold the same weights: dp those of dense parts, edp those of experts."""
        return dict(dp=self.dp * self.cp, edp=self.edp)

    def ranks_along(self, axis):
        """Ranks of a group: for dp and edp those that hold the same weights, for pp a stage and the next."""
        if axis == "pp":
            return 2
        return self.holders[axis] if axis in self.holders else getattr(self, axis)

    def stride(self, axis):
        """From a rank of a group to the group's next, in ranks; those of a node are consecutive."""
        return dict(tp=1, cp=self.tp, dp=self.tp, edp=self.ep, pp=self.dp * self.cp * self.tp)[axis]

    # -- what a clock asks

    @property
    def exchange(self):
        """The one of `dispatch` that runs: inside one node all are alike."""
        return self.dispatch if self.ep > self.inner else EXCHANGES[0]

    @property
    def goes_directly(self):
        """Each row goes straight to its expert's rank, not by way of another rank of its node."""
        return self.dispatch == "flat"

    @property
    def crosses_if_wanted(self):
        """A token goes to the nodes that hold one of its experts, else to all."""
        return self.dispatch == "dedup"

    def hidden_share(self, axis, hardware):
        """Share of the time of a layer's collectives on an axis that runs beside its matmuls: none, as run here."""
        return 0.0

    @property
    def layer_plan(self):
        """This plan without all that makes no difference to a layer: plans that agree in it share counts and times."""
        return replace(
            self, pp=min(2, self.pp), dp=self.dp if self.zero == 3 else 1, vpp=1, global_batch=1, layer_split=(),
            schedule="1f1b" if self.is_plain else "paired", overlap="none", balance_live=0)


def plan_value(name, text):
    """Text of the command line -> a value for this field of Plan; items of a list are joined by , or +."""
    kind = Plan.__annotations__[name]
    if kind is tuple:
        items = [item for item in re.split("[,+]", text) if item]
        return tuple(int(item) if item.isdigit() else item for item in items)
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}={text!r}: write a value of type {kind.__name__}") from None


def parse_plan(text, **defaults):
    """Plan from `tp=8,pp=16,recompute=act,permute,layer_split=2+2+1`; ValueError for what it cannot read."""
    names = [field.name for field in fields(Plan)]
    items = re.split(",(?=[^,]*=)", text) if text else []          # where another key follows: commas join lists too
    require(all("=" in item for item in items), f"plan {text!r}: write key=value,...")
    values = {}
    for key, value in (map(str.strip, item.split("=", 1)) for item in items):
        require(key in names, f"unknown plan key {key!r}: use one of {nearest(key, names)}")
        require(key not in values, f"plan {text!r} has {key} twice: leave one away")
        values[key] = plan_value(key, value)
    plan = Plan(**defaults | values)
    check_settings(plan)
    return plan


def items_in_force(plan):
    """The names in Plan.recompute and Plan.swap that have an effect beside the others: a layer, or an attention, that
    runs again as a whole needs nothing inside it saved or made another way."""
    names = {*plan.recompute, *plan.swap}
    if "layer" in names:
        names &= {"layer", "optimizer"}
    if "attention" in names:
        names -= {"attn_out", "mla_up"}
    return names


def has_experts(config):
    return set(layer_kinds(config)) != {"dense"}


def balance_group(config, plan):
    """Sequences in one group of the balance loss: Config.balance_group, or what `balance` means under this plan."""
    if config.balance_group:
        return config.balance_group
    replicas = max(1, plan.ep // (plan.cp * plan.tp))      # data ranks inside one expert group
    return dict(none=1, sequence=1, micro_batch=plan.micro_batch, ep_group=plan.micro_batch * replicas,
                dp_group=plan.at_once)[config.balance]


def balance_ranks(config, plan):
    """Ranks that share the counts of the balance loss: those that hold parts of one group, one after the other."""
    return max(1, balance_group(config, plan) // plan.micro_batch) * plan.cp * plan.tp


# ---------------------------------------------------------------------------------------------------------------------
# The check of a plan: every refusal is one line with the numbers and what would fit


def check_plan(config, plan, hardware=None, devices=None):
    """ValueError for a plan that cannot run this shape on this hardware, or on so many devices."""
    check_settings(plan)
    check_cuts(config, plan)
    check_layers(config, plan)
    check_batch(config, plan)
    check_schedule(plan)
    check_live(config, plan)
    if devices is not None:
        check_devices(plan, devices)
    if hardware is not None:
        check_hardware(plan, hardware)


def check_cuts(config, plan):
    """What is cut must be whole on every rank: heads, widths, experts, and ranks of the expert mesh."""
    c, moe = config, has_experts(config)
    for name in ("num_attention_heads", "intermediate_size", "vocab_size"):
        check_divides("tp", plan.tp, name, getattr(c, name))
    if moe:
        check_divides("tp", plan.tp, "width of the shared experts", c.n_shared_experts * c.moe_intermediate_size)
        check_divides("ep", plan.ep, "n_routed_experts", c.n_routed_experts)
    else:
        check_divides("ep", plan.ep, "experts of a dense model", 1)
    check_divides("ep", plan.ep, "dp*cp*tp", plan.dp * plan.cp * plan.tp)
    require(not moe or plan.tp == 1 or plan.sp,
            f"tp={plan.tp} with sp=0 would send each token to its experts {plan.tp} times: use sp=1")
    ep, node = plan.ep, plan.node_size
    require(ep % node == 0 or node % ep == 0, f"node_size={node} and ep={ep}: one must divide the other, use ep of "
                                              f"{divisors(node)} or a multiple of {node}")


def check_divides(name, value, what, total):
    if total % value:
        raise ValueError(f"{name}={value} does not divide {what}={total}: use one of {divisors(total)[:16]}")


def check_layers(config, plan):
    layers, stages, split = config.num_hidden_layers, plan.n_stages, plan.layer_split
    require(stages <= layers + 1, f"pp*vpp={stages} stages for {layers} layers and the head: use at most {layers + 1}")
    require(not split or (len(split) == stages and sum(split) == layers),
            f"layer_split has {len(split)} stages with {sum(split)} layers: needs pp*vpp={stages} with {layers}")
    require(min(split[1:-1], default=1) > 0, f"layer_split={'+'.join(map(str, split))}: a stage between the first and "
                                             f"the last needs at least one layer")


def check_batch(config, plan):
    """The sequence, the batch and the groups of the balance loss must be whole on every rank."""
    require(plan.seq_len <= config.max_position_embeddings,
            f"seq_len={plan.seq_len} above max_position_embeddings={config.max_position_embeddings}: use at most that, "
            f"or give the model more (train.py: --set max_position_embeddings={plan.seq_len})")
    # two slices for each rank of a context group, so that causal work is even
    slices = 2 * plan.cp if plan.cp > 1 else 1
    if plan.sp:
        slices = math.lcm(slices, plan.cp * plan.tp)
    check_multiple("seq_len", plan.seq_len, slices, f"{slices}, which cp={plan.cp} tp={plan.tp} sp={plan.sp} need")
    check_multiple("global_batch", plan.global_batch, plan.at_once, f"dp*micro_batch={plan.at_once}")
    size, own = balance_group(config, plan), plan.micro_batch
    fitting = divisors(own) + [own * ranks for ranks in divisors(plan.dp)[1:]]
    require(size in fitting, f"balance_group={size} sequences does not divide micro_batch*dp={own}*{plan.dp} into "
                             f"whole micro-batches: use one of {fitting[:16]}")


def check_multiple(name, value, unit, what):
    require(value % unit == 0, f"{name}={value} is not a multiple of {what}: use {max(1, value // unit) * unit}")


def check_schedule(plan):
    n, pp, name = plan.n_micro, plan.pp, plan.schedule
    require(name != "1f1b" or plan.vpp == 1,
            f"schedule=1f1b needs vpp=1, not vpp={plan.vpp}: use vpp=1 or interleaved")
    require(plan.overlap == "none" or name == "paired",
            f"overlap=adaptive needs pairs of forward and backward, schedule={name} has none: use paired")
    if name == "1f1b":
        require(n >= pp, f"schedule=1f1b with pp={pp} needs {pp} micro-batches, the plan has {n}: use global_batch="
                         f"{pp * plan.at_once}")
        return
    turns = max(1, n // pp)
    require(n % turns == 0, f"schedule={name} cannot run {n} micro-batches in {turns} equal turns of at least pp={pp}: "
                            f"use global_batch={turns * pp * plan.at_once}")


def check_live(config, plan):
    """Live balance moves whole experts between ranks, each rank its part of them: zero must cut inside every expert."""
    if plan.balance_live == 0:
        return
    require(plan.ep > 1,
            f"balance_live={plan.balance_live} moves experts between ranks, ep={plan.ep}: use ep above 1")
    cut_inside_experts = config.hidden_size % plan.edp == 0 or config.moe_intermediate_size % plan.edp == 0
    require(plan.zero == 0 or cut_inside_experts,
            f"zero={plan.zero} over {plan.edp} ranks would cut between experts, which then cannot move: use zero=0")
    require("optimizer" not in plan.swap,
            "swap=optimizer keeps moments where balance_live cannot move them: use one of both")


def check_devices(plan, devices):
    rest = plan.world_size // plan.dp
    fit = f"use dp={devices // rest}" if devices % rest == 0 else f"use pp*cp*tp among {divisors(devices)}"
    require(plan.world_size == devices, f"pp*dp*cp*tp={plan.pp}*{plan.dp}*{plan.cp}*{plan.tp}={plan.world_size} "
                                        f"for {devices} devices: {fit}")


def check_hardware(plan, hardware):
    node = plan.node_size
    require(node <= hardware.node_size,
            f"node_size={node}: {hardware.name} has nodes of {hardware.node_size}, use at most that")
    require(plan.precision in hardware.peak, f"precision={plan.precision}: {hardware.name} has no peak for it, "
                                             f"use one of {', '.join(hardware.peak)}")
    require(hardware.inner_bandwidth or plan.world_size == 1,
            f"{hardware.name} has no inner_bandwidth: write its bytes/s into the file for more than one device; "
            f"tests/calibrate.py measures it under torchrun")
    require(hardware.outer_bandwidth or plan.world_size <= node,
            f"{hardware.name} has no outer_bandwidth: write its bytes/s into the file for more than one node of {node}")


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
    if ids is None:
        one = uniform_exchange(config, plan)
        return {way: {tier: [sent] * plan.ep for tier, sent in tiers.items()} for way, tiers in one.items()}
    sent = {way: dict(inner=[0] * plan.ep, outer=[0] * plan.ep) for way in ("forward", "backward")}
    rows = routed_rows(config, plan, ids)
    for source, peer in product(range(plan.ep), repeat=2):
        inside = source // plan.inner == peer // plan.inner
        same_place = source % plan.inner == peer % plan.inner
        talk = inside or same_place or plan.goes_directly
        if source == peer or not talk:
            continue
        tier = "inner" if inside else "outer"
        for way, size in bytes_to_peer(config, plan, inside, rows[source, peer], rows[peer, source]).items():
            sent[way][tier][source] += size
    return sent


def uniform_exchange(config, plan):
    """{way: {tier: bytes}} of any rank: under uniform routing all ranks, and all peers of a tier, are alike."""
    choices, inner_peers = plan.tokens * config.num_experts_per_tok, plan.inner - 1
    if plan.goes_directly:
        outer_peers = plan.ep - plan.inner
        inner_rows = outer_rows = choices / plan.ep        # a rank's choices are spread over all ranks
    else:
        outer_peers = plan.ep // plan.inner - 1            # the ranks of the same place in other nodes
        inner_rows = choices / plan.inner                  # choices of a node's ranks for this node's experts
        outer_rows = plan.tokens * share_that_crosses(config, plan)
    inner = bytes_to_peer(config, plan, True, inner_rows, inner_rows)
    outer = bytes_to_peer(config, plan, False, outer_rows, outer_rows)
    return {way: dict(inner=inner_peers * inner[way], outer=outer_peers * outer[way]) for way in inner}


def share_that_crosses(config, plan):
    """Share of tokens that go to one given other node, under uniform routing."""
    experts, k, nodes = config.n_routed_experts, config.num_experts_per_tok, plan.ep // plan.inner
    missed = 0.0                                           # share that has no expert there; hierarchical sends it too
    if plan.crosses_if_wanted:
        elsewhere = experts - experts // nodes
        missed = math.comb(elsewhere, k) / math.comb(experts, k)
    if config.n_group == nodes and config.group_choice == "limited":       # a token goes to topk_group nodes at most
        missed = max(missed, 1 - config.topk_group / nodes)
    return 1 - missed


def bytes_to_peer(config, plan, inside, rows, rows_of_peer):
    """{way: bytes of dispatch and combine} by a rank to one peer. inside: of its own node; rows: that it dispatches to
    the peer and gets back; rows_of_peer: that the peer dispatches to it and it sends back."""
    element, k = plan.element, config.num_experts_per_tok
    row = element * config.hidden_size
    counts = INDEX_BYTES * config.n_routed_experts // plan.ep              # rows for each of the peer's experts
    if inside or plan.goes_directly:                       # a row for each choice, with its weight
        header, weights, numbers = counts, element, 0
    else:                                                  # a row for each token, with all of its choices
        header, weights, numbers = 0, k * element, k * INDEX_BYTES
        if plan.crosses_if_wanted:                         # tokens that come, rows for each expert of the peer's node
            header = INDEX_BYTES + counts * plan.inner
    return dict(forward=header + rows * (row + weights + numbers) + rows_of_peer * row,
                backward=rows * row + rows_of_peer * (row + weights))


def routed_rows(config, plan, ids):
    """{(source, peer): rows dispatched}.

    flat: a row for each choice, from the token's rank to the expert's. hierarchical: a row for each token to the rank
    of the same place in every other node, and from there a row for each choice inside that node. dedup: the same, but
    only to nodes that the token needs.
    """
    rows, nodes = Counter(), range(plan.ep // plan.inner)
    for source, tokens in enumerate(ids):
        place = source % plan.inner
        for experts in tokens:
            owners = [int(expert) * plan.ep // config.n_routed_experts for expert in experts]
            if plan.goes_directly:
                rows.update((source, owner) for owner in owners)
                continue
            needed = {owner // plan.inner for owner in owners} if plan.crosses_if_wanted else nodes
            for node in needed:
                rows[source, node * plan.inner + place] += 1
            for owner in owners:
                forwarder = owner // plan.inner * plan.inner + place
                rows[forwarder, owner] += 1
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Live load balance: which device holds which expert
#
# Load of an expert: how many tokens were sent to it. The load of a step is predicted from the steps before; if another
# placement of experts would even out the devices' loads enough, experts move there. parallel.py carries it out.
#
# A placement is an array (devices, slots) of expert numbers, each expert once: slots = E / devices.

PREDICTOR_DECAY = 0.9      # a step, of the moving average of loads (recipe of MindSpeed; the paper's is not published)


def predict_load(past, load):
    """The load expected next, from what was expected and what came: (..., E), arrays or tensors. Starts from zeros."""
    return PREDICTOR_DECAY * past + (1 - PREDICTOR_DECAY) * load


def first_placement(n_experts, devices):
    """(devices, slots): experts in order."""
    return np.arange(n_experts).reshape(devices, -1)


def device_loads(load, placement):
    """load (E,) -> (devices,)."""
    return load[placement].sum(1)


def imbalance(load, placement):
    """The busiest device's load over the mean, minus one."""
    loads = device_loads(load, placement)
    return loads.max() / loads.mean() - 1


def deviation(load, placement):
    """Standard deviation of the devices' loads over their mean."""
    loads = device_loads(load, placement)
    return loads.std(ddof=1) / loads.mean()


def moved_experts(old, new):
    """How many experts change their device between two placements."""
    on_same_device = (new[:, :, None] == old[:, None, :]).any(2)          # (devices, slots of new)
    return int((~on_same_device).sum())


def place_greedily(load, devices):
    """The paper's greedy: experts by falling load, each to the least loaded device with a free slot."""
    n_slots = len(load) // devices
    placement = np.zeros((devices, n_slots), int)
    filled, loads = np.zeros(devices, int), np.zeros(devices)
    for expert in np.argsort(-load, kind="stable"):
        device = np.where(filled < n_slots, loads, np.inf).argmin()
        placement[device, filled[device]] = expert
        filled[device] += 1
        loads[device] += load[expert]
    return placement


def match_devices(groups, current):
    """The greedy's groups of experts (devices, slots), each given to a device that holds many of them already.

    Which device a group is on makes no difference to balance. So the group and the device that have most experts in
    common come together, then those of the rest, and so on.
    """
    devices, n_slots = current.shape
    holder = np.argsort(current.flatten()) // n_slots                     # (E,) device of each expert
    in_common = (holder[groups][:, :, None] == np.arange(devices)).sum(1)      # (groups, devices)
    placement = np.zeros_like(groups)
    for _ in range(devices):
        group, device = np.unravel_index(in_common.argmax(), in_common.shape)
        placement[device] = groups[group]
        in_common[group, :] = in_common[:, device] = -1
    return placement


def keep_slots(placement, current):
    """The same experts on each device, those that stay there in the slot that they have now."""
    result = current.copy()
    for device, experts in enumerate(placement):
        leaving = ~np.isin(current[device], experts)
        arriving = ~np.isin(experts, current[device])
        result[device, leaving] = experts[arriving]
    return result


def plan_placement(load, current):
    """A placement for the predicted load (E,), never worse than the current one by its busiest device."""
    groups = place_greedily(load, len(current))
    planned = keep_slots(match_devices(groups, current), current)
    return planned if imbalance(load, planned) < imbalance(load, current) else current


def decide(load, current, threshold):
    """The planned placement if the devices' deviation falls by at least `threshold` with it, else the current one."""
    planned = plan_placement(load, current)
    gain = deviation(load, current) - deviation(load, planned)
    return planned if gain >= threshold else current


# ---------------------------------------------------------------------------------------------------------------------
# Hardware


@dataclass(frozen=True)
class Hardware:
    """One device, its node and its network. Bandwidths are of one direction and one device; efficiencies of a peak."""
    name: str
    peak: dict = field(hash=False)         # precision -> FLOP/s of the matrix units
    memory: float                          # bytes
    bandwidth: float                       # bytes/s of device memory
    node_size: int = 8                     # devices joined by the fast links
    topology: str = setting("switch", "mesh")      # of a node; mesh: each pair has its own link
    inner_bandwidth: float = setting(0.0, least=0)         # bytes/s, all links of a device inside the node together
    inner_latency: float = setting(0.5e-6, least=0)
    outer_bandwidth: float = setting(0.0, least=0)         # bytes/s between nodes
    outer_latency: float = setting(1.5e-6, least=0)
    host_bandwidth: float = 32e9           # bytes/s to the host's memory
    power: float = 1.0                     # share of a matmul's rate that a power limit leaves
    cores: int = setting(0, least=0)       # output tiles of a matmul computed at a time; 0: any number
    framework: float = setting(1.5 * GIB, least=0)         # bytes that runtime and libraries keep
    communicator: float = setting(0.0, least=0)            # bytes of each kind of process group
    fragmentation: float = setting(0.0, least=0)           # allocator's loss for a byte of activations and buffers
    value_padded: bool = False             # its attention kernel wants values as wide as keys
    generation: str = ""                   # whose CONSTANTS it has
    # what is reached of the peaks, and what every call costs: see CONSTANTS
    matmul_efficiency: float = 0.7
    matmul_half: float = setting(0.0, least=0)             # a side of a matmul with which it reaches half of that ...
    tokens_half: float = setting(0.0, least=0)             # ... and the number of tokens
    grouped_efficiency: float = 1.0        # of the experts' matmuls beside others
    fp8_efficiency: float = 1.0            # of matmuls in 8 bits beside those in 16
    static_expert: float = setting(0.0, least=0)           # seconds of each matrix of a grouped matmul, if run singly
    loss_cached: float = 1.0               # rate of the loss beside memory's: a cache may hold a chunk
    attention_efficiency: float = 0.7
    attention_half: float = setting(0.0, least=0)          # keys with which flash attention reaches half of that
    memory_efficiency: float = 0.6
    inner_efficiency: float = 0.7
    outer_efficiency: float = 0.7
    static_matmul: float = setting(5e-6, least=0)          # seconds of every matmul, whatever its size
    static_vector: float = setting(2e-6, least=0)
    static_collective: float = setting(10e-6, least=0)
    overlap_tax: float = setting(0.0, least=0)             # seconds of computation lost for one of communication beside
    scale_loss: float = setting(0.0, least=0)              # share of the step that each doubling of the devices costs

    def __post_init__(self):
        check_settings(self)
        require(isinstance(self.peak, dict) and {*self.peak} <= {*BYTES_OF} and self.peak,
                f"peak={self.peak!r}: write {{precision: FLOP/s}}, each of {', '.join(BYTES_OF)}")
        for precision, rate in self.peak.items():
            check_setting(f"peak {precision}", rate, float)

    @property
    def memory_rate(self):
        """Bytes/s of device memory that are reached."""
        return self.bandwidth * self.memory_efficiency


# Constants of a generation of devices, or of all: what `python tests/published.py --fit` made of the public rows. Their
# bounds and priors stand there.
GENERATIONS = ("ampere", "hopper", "blackwell", "ascend")
CONSTANTS = {
    "matmul_efficiency": (0.782, 0.751, 0.473, 0.679),     # of the peak
    "matmul_half": (60.0,),                                # elements
    "tokens_half": (226.0,),                               # tokens
    "grouped_efficiency": (0.85, 1.0, 0.714, 0.7),         # of other matmuls
    "fp8_efficiency": (1.0,),                              # of matmuls in 16 bits
    "attention_efficiency": (0.713, 0.425, 0.551, 0.51),   # of the peak
    "attention_half": (400.0,),                            # keys
    "memory_efficiency": (0.95, 0.481, 0.588, 0.525),      # of the peak
    "inner_efficiency": (0.748, 0.614, 0.504, 0.598),      # of the peak
    "outer_efficiency": (0.509, 0.95, 0.8, 0.796),         # of the peak
    "static_matmul": (5e-06,),                             # seconds
    "static_vector": (4e-06,),                             # seconds
    "static_collective": (2e-05,),                         # seconds
    "overlap_tax": (0.15,),                                # of the time of communication
    "scale_loss": (0.0101,),                               # of the step, a doubling of the devices
}


GB = 1e9


def _device(generation, name, tflops, memory, gb_per_s, inner, outer, cores, tflops_8bit=0.0, node_size=8):
    """A preset. tflops: dense, in 16 bits; memory: bytes; gb_per_s: of it; inner, outer: GB/s inside and between nodes;
    cores: those that compute matmuls."""
    ascend = generation == "ascend"
    peak = dict(bf16=tflops * 1e12, fp16=tflops * 1e12)
    if tflops_8bit:
        peak |= dict(fp8=tflops_8bit * 1e12, mxfp8=tflops_8bit * 1e12)
    peak["fp32"] = peak["bf16"] * (0.281 if ascend else 0.5)               # cube in fp32, tensor cores in TF32
    # a group's buffers: HCCL's two of 200 MB by default; NCCL's and what goes with it, as BLOOM's nvidia-smi suggests
    communicator = (0.4 if ascend else 2.0) * GIB
    index = GENERATIONS.index(generation)
    constants = {name: values[index] if len(values) > 1 else values[0] for name, values in CONSTANTS.items()}
    return Hardware(
        name, peak, memory, gb_per_s * GB, node_size, topology="mesh" if ascend and node_size == 8 else "switch",
        inner_bandwidth=inner * GB, outer_bandwidth=outer * GB, cores=cores, communicator=communicator,
        fragmentation=0.15, generation=generation, **constants)


# Ascend 910B: Ascend/msmodeling, tensor_cast/device.py. Bins differ in cube cores (8192 FLOP a cycle) and clock. Full
# mesh of 8 with 28 GB/s a link, RoCE of 200 Gb/s: arXiv:2504.07866, section 5. 910C, a die: the same file, and
# arXiv:2506.12708 (CloudMatrix384: 768 dies of one bus).
_ASCEND = partial(_device, "ascend", memory=64 * GIB, gb_per_s=1638.4 * GIB / GB, inner=196)
# A100, H100, H200, H20, B200, GB200, GB300: NVIDIA's data sheets, dense, NVLink of one direction. Between nodes
# 200 Gb/s a GPU for A100, 400 since, 800 for GB300, as usual for their systems. H800: arXiv:2412.19437, section 3.
_HOPPER = partial(_device, "hopper", outer=50)
_H100 = partial(_HOPPER, tflops=989.5, tflops_8bit=1979, cores=132)
_BLACKWELL = partial(_device, "blackwell", gb_per_s=8000, inner=900, cores=148)
HARDWARE = {device.name: device for device in (
    _ASCEND("ascend_910b_376", tflops=353.8944, outer=25, cores=24),
    _ASCEND("ascend_910b_313", tflops=294.912, outer=25, cores=20),
    _ASCEND("ascend_910b_280", tflops=245.76, outer=25, cores=20),
    _ASCEND("ascend_910c_die", tflops=353.8944, outer=24.5, cores=24, node_size=768),
    _device("ampere", "a100_80_sxm", tflops=312, memory=79.2 * GIB, gb_per_s=2039, inner=300, outer=25, cores=108),
    _H100("h100_sxm", memory=79.2 * GIB, gb_per_s=3350, inner=450),
    _H100("h800_sxm", memory=79.2 * GIB, gb_per_s=3350, inner=200),
    _H100("h200_sxm", memory=141 * GB, gb_per_s=4800, inner=450),
    _HOPPER("h20", tflops=148, tflops_8bit=296, memory=96 * GB, gb_per_s=4000, inner=450, cores=78),
    _BLACKWELL("b200", tflops=2250, tflops_8bit=4500, memory=180 * GB, outer=50),
    _BLACKWELL("gb200", tflops=2500, tflops_8bit=5000, memory=186 * GB, outer=50, node_size=72),
    _BLACKWELL("gb300", tflops=2500, tflops_8bit=5000, memory=288 * GB, outer=100, node_size=72))}
# For --fit on a CPU, to compare choices: assumed numbers of two cores, not of the machine at hand.
CPU = Hardware("a generic CPU", dict.fromkeys(BYTES_OF, 1e11), memory=2**40, bandwidth=2e10, node_size=2**16,
               inner_bandwidth=1e9, outer_bandwidth=1e9, host_bandwidth=5e9, framework=2**29, value_padded=True)
STEP_BYTES = 2**28                         # of moments that a step of a swapped optimizer has on the device at a time


# ---------------------------------------------------------------------------------------------------------------------
# What operators and collectives cost
#
# An operator belongs to one of the block's calls, its part: attend (with routing), shared, experts or combine. flops
# and moved (bytes read and written) are of its forward. again: items of Plan.recompute under which backward runs it.

VECTOR_BACKWARD = 1.5              # bytes of its backward over those of its forward: a gradient is read beside
FLASH_BACKWARD = 2.5               # FLOPs of flash attention's backward over its forward's: scores are computed again
FLASH_BACKWARD_RATE = 0.85         # rate of flash attention's backward over its forward's (arXiv:2307.08691)
TILE = 128                         # side of the output tile that a core computes at a time


class Passes(NamedTuple):
    """Seconds of an operator's forward, and of the two halves of its backward: for its inputs and for its weights."""
    forward: float
    inputs: float
    weights: float = 0.0


class Vector(NamedTuple):
    """An operator that only moves memory."""
    part: str
    name: str
    moved: float
    cached: bool = False           # the loss, whose chunks may stay in a cache
    again: frozenset = frozenset()
    flops = 0

    def seconds(self, plan, hardware):
        rate = hardware.memory_rate * (hardware.loss_cached if self.cached else 1.0)
        forward, start = self.moved / rate, hardware.static_vector
        return Passes(forward + start, VECTOR_BACKWARD * forward + start)


class Attention(NamedTuple):
    """Flash attention: scores, softmax and values in one."""
    part: str
    name: str
    flops: float
    moved: float
    keys: int                      # that a query sees at most
    again: frozenset = frozenset()

    def rate(self, plan, hardware):
        """FLOP/s, less for few keys."""
        reached = hardware.attention_efficiency * self.keys / (self.keys + hardware.attention_half)
        return reached * peak_of(hardware, plan.precision)

    def seconds(self, plan, hardware):
        forward, start = slower_of(self.flops, self.rate(plan, hardware), self.moved, hardware), hardware.static_matmul
        return Passes(forward + start, FLASH_BACKWARD / FLASH_BACKWARD_RATE * forward + start)


class Matmul(NamedTuple):
    """(rows, summed) by (summed, columns); or by several matrices, each with its share of the rows, as experts are."""
    part: str
    name: str
    rows: float
    summed: int
    columns: int
    matrices: int
    element: int                   # bytes
    in_16_bits: bool = False       # where others read 8
    again: frozenset = frozenset()

    @property
    def flops(self):
        return 2 * self.rows * self.summed * self.columns

    @property
    def moved(self):
        elements = self.rows * self.summed + self.matrices * self.summed * self.columns + self.rows * self.columns
        return self.element * elements

    def seconds(self, plan, hardware):
        """Each half of the backward does as much arithmetic as the forward, in another shape."""
        rows, summed, columns, matrices = self.rows, self.summed, self.columns, self.matrices
        start = hardware.static_matmul
        if matrices > 1:
            start += matrices * hardware.static_expert
        forward = self.product_seconds(plan, hardware, rows, summed, columns) + start
        inputs = self.product_seconds(plan, hardware, rows, columns, summed) + start
        weights = self.product_seconds(plan, hardware, summed * matrices, rows / matrices, columns, tokens_inside=True)
        # the sum over micro-batches is read and written
        weights += start + 2 * gradient_bytes(plan) * summed * columns * matrices / hardware.memory_rate
        if plan.precision in NARROW:                       # inputs and gradients are cast, in two layouts
            forward += 2 * rows * summed / hardware.memory_rate
            inputs += 2 * rows * columns / hardware.memory_rate
        return Passes(forward, inputs, weights)

    def product_seconds(self, plan, hardware, rows, summed, columns, tokens_inside=False):
        """One pass, (rows, summed) by (summed, columns). tokens_inside: the sum is over tokens, as the weights' is."""
        half, tokens = hardware.matmul_half, hardware.tokens_half
        halves = (half, tokens, half) if tokens_inside else (tokens, half, half)
        share = matmul_share(rows, summed, columns, self.matrices, halves, hardware.cores)
        return slower_of(self.flops, self.rate(plan, hardware) * share, self.moved, hardware)

    def rate(self, plan, hardware):
        """FLOP/s of a large matmul."""
        narrow = plan.precision in NARROW and not self.in_16_bits
        rate = peak_of(hardware, plan.precision, narrow) * hardware.matmul_efficiency * hardware.power
        if narrow:
            rate *= hardware.fp8_efficiency
        if self.matrices > 1:
            rate *= hardware.grouped_efficiency
        return rate


def slower_of(flops, rate, moved, hardware):
    """Seconds of arithmetic at `rate` FLOP/s or of moving bytes, whichever takes longer."""
    return max(flops / rate, moved / hardware.memory_rate)


@lru_cache(None)
def matmul_share(rows, summed, columns, matrices, halves, cores):
    """Share of its best rate that a matmul reaches: short sides, and a last wave of tiles that leaves cores idle."""
    share = 1.0
    for side, half in zip((rows / matrices, summed, columns), halves):
        share *= side / (side + half)
    if not cores:
        return share
    tiles = matrices * math.ceil(rows / matrices / TILE) * math.ceil(columns / TILE)
    waves = tiles / cores
    return share * waves / math.ceil(waves)


def peak_of(hardware, precision, narrow=False):
    """FLOP/s of matrix units; of what stays in 16 bits beside 8-bit matmuls, unless `narrow`."""
    if precision in NARROW and not (narrow and precision in hardware.peak):
        return hardware.peak["bf16"]
    return hardware.peak[precision]


def gradient_bytes(plan):
    """Of one gradient while micro-batches are summed: float32 beside bf16, fp16 as it is (Megatron-LM's defaults)."""
    return 2 if plan.precision == "fp16" else max(4, plan.element)


def tier_of(plan, axis):
    """inner if a group of the axis lies inside one node, else outer."""
    return "inner" if plan.ranks_along(axis) * plan.stride(axis) <= plan.node_size else "outer"


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
        if local > 1:
            bandwidth = min(inside, local * bandwidth)
    steps = min(ranks - 1, math.log2(ranks))
    return hardware.static_collective + steps * latency + sent / bandwidth


def axis_seconds(plan, hardware, axis, sent):
    """Seconds of a collective in the groups of an axis."""
    ranks = plan.ranks_along(axis)
    local = max(1, min(ranks, plan.node_size // plan.stride(axis)))
    return collective_seconds(hardware, tier_of(plan, axis), ranks, sent, local)


def weights_seconds(plan, hardware, params, size):
    """Seconds to gather weights of `size` bytes each from the ranks that hold a part, or to scatter their gradients."""
    return sum(axis_seconds(plan, hardware, axis, (ranks - 1) / ranks * params[axis] * size)
               for axis, ranks in plan.holders.items())


# ---------------------------------------------------------------------------------------------------------------------
# What a layer does: operators, parameters, saved tensors and collectives of one micro-batch on one rank


@dataclass(frozen=True)
class Shape(Config):
    """What is counted: a Config, or a model that no Config describes, such as those of tests/published.py."""
    rope_scaling: dict = field(default=None, hash=False)
    value_padded: bool = False             # the attention kernel wants values as wide as keys

    def __post_init__(self):               # not Config's checks, which are of models that model.py builds
        pass


def as_shape(config):
    return config if isinstance(config, Shape) else Shape(**vars(config))


def on_hardware(config, hardware):
    shape = as_shape(config)
    return replace(shape, value_padded=True) if hardware.value_padded else shape


class SavedTensor(NamedTuple):
    """A tensor that forward leaves for backward."""
    size: float                    # bytes
    owner: str                     # part of the model that keeps it, in a report
    again: frozenset               # items of Plan.recompute under which it is not kept, but made again
    swap: str                      # the item of Plan.swap under which it waits in the host's memory


class Work:
    """What a layer, the embedding or the head is for one rank and one micro-batch. kind: one of layer_kinds, or these.

    Below the recorders, each part of the model is a method that records what the part is. Sizes of matmuls come from
    Config.matmuls, of which a rank has its own part.
    """

    def __init__(self, shape, plan, kind):
        self.shape, self.plan, self.kind = shape, plan, kind
        self.element = plan.element
        self.precise = max(4, self.element)                # bytes of what is computed in float32 or better
        self.matmuls = {} if kind == "embedding" else shape.matmuls(kind)
        self.ops = []
        self.tensors = {}                                  # name -> SavedTensor
        self.params = Counter(dp=0, edp=0)                 # held by this rank, by the axis of Plan.holders
        # (axis, part before or after which it is, items that run it again) of an all-gather or a reduce-scatter of
        # activations -> bytes sent in that group, forward
        self.collectives = Counter()
        self.regions = frozenset()                         # items of Plan.recompute that run what is recorded now again
        record = dict(embedding=self.embedding, head=self.head).get(kind, self.layer)
        record()

    @property
    def is_layer(self):
        return self.kind not in ("embedding", "head")

    @property
    def saved(self):
        """Tensor -> bytes that backward needs, be they kept, swapped or made again."""
        return {name: tensor.size for name, tensor in self.tensors.items()}

    # -- recorders

    @contextlib.contextmanager
    def runs_again(self, item):
        """What is recorded inside runs, or is made, again if the plan recomputes `item`."""
        outside = self.regions
        self.regions = outside | {item}
        yield
        self.regions = outside

    def own_part(self, name, cut=""):
        """A matmul's weights on this rank. cut: what ranks divide among them: out or in, by tensor ranks; experts."""
        weights, tp = self.matmuls[name], self.plan.tp
        if cut == "out":
            return weights._replace(n_out=weights.n_out // tp)
        if cut == "in":
            return weights._replace(n_in=weights.n_in // tp)
        if cut == "experts":
            return weights._replace(copies=max(1, weights.copies // self.plan.ep))
        return weights

    def matmul(self, part, name, rows, cut="", again=(), in_16_bits=False):
        own = self.own_part(name, cut)
        self.ops.append(Matmul(part, name, rows, own.n_in, own.n_out, own.copies, self.element, in_16_bits,
                               self.regions.union(again)))
        self.params["edp" if cut == "experts" else "dp"] += own.copies * own.n_in * own.n_out

    def vector(self, part, name, elements, again=(), cached=False, size=0):
        """An operator that only moves memory: elements read and written. size: as of keep."""
        self.ops.append(Vector(part, name, elements * (size or self.element), cached, self.regions.union(again)))

    def norm(self, part, name, owner, width=0, again=(), residual=False):
        """width: the model's, unless given. residual: followed by the sum with the residual stream, which is read and
        written too."""
        tokens, width = self.plan.tokens, width or self.shape.hidden_size
        self.vector(part, name, (5 if residual else 2) * tokens * width, again)
        self.params["dp"] += width
        self.keep(name, tokens * width, owner)             # its input; fused kernels keep 4 bytes a token beside it

    def keep(self, name, elements, owner, size=0, again=(), swap=""):
        """A saved tensor; kept twice under one name, it is what was said first. size: bytes of an element that is not
        in the plan's precision."""
        saved = SavedTensor(elements * (size or self.element), owner, self.regions.union(again), swap)
        self.tensors.setdefault(name, saved)

    def keep_input(self, name, elements, owner, again=(), swap=""):
        """A tensor that a matmul keeps."""
        self.keep(name, elements, owner, again=again, swap=swap)

    def gather(self, axis, part, tokens, width):
        """All-gather of each rank's `tokens`, or the reduce-scatter that is as long; an all-reduce is both."""
        sent = (getattr(self.plan, axis) - 1) * tokens * width * self.element
        self.collectives[axis, part, self.regions] += sent

    def gather_stream(self, part, times=1):
        """Residual stream to all tokens, or their sums back (sp=1); an all-reduce of sums (sp=0) is as long as both."""
        self.gather("tp", part, times * self.plan.gathered_tokens / self.plan.tp, self.shape.hidden_size)

    # -- the embedding

    def embedding(self):
        c, plan = self.shape, self.plan
        self.vector("attend", "embed_tokens", 2 * plan.tokens * c.hidden_size)
        self.params["dp"] = c.vocab_size // plan.tp * c.hidden_size
        self.look_up()
        self.keep("token_ids", plan.gathered_tokens, "embedding", size=8)

    def look_up(self):
        """Sums of what tensor ranks found; and token numbers (int64) gathered, in forward alone: half in each pass."""
        plan, width = self.plan, self.shape.hidden_size + 8 / 2 / self.element
        self.gather("tp", "attend", plan.gathered_tokens / plan.tp, width)

    # -- a layer

    def layer(self):
        """Norms and what they stand before or after. MTP's join is no part of a layer that runs again."""
        c, sandwich = self.shape, self.shape.norm != "pre"
        # what a layer that runs again keeps: its input, and the chosen experts, so that it chooses the same
        self.keep("input_layernorm", self.plan.tokens * c.hidden_size, "norms")
        if self.kind != "dense":
            self.keep("ids", self.plan.tokens * c.num_experts_per_tok, "routing", size=8)
        with self.runs_again("layer"):
            with self.runs_again("attention"):
                self.norm("attend", "input_layernorm", "norms", again=("norm",), residual=not sandwich)
                self.attention()
            # a matmul whose weight gradient may be deferred keeps its input last: attention runs again to this point
            again = () if self.plan.is_plain else ("attention",)
            self.matmul("attend", "o_proj", self.plan.gathered_tokens, cut="in", again=again)
            self.gather_stream("attend", times=1 if self.plan.sp else 2)
            if sandwich:
                self.norm("attend", "post_attention_layernorm", "norms", residual=True)
            self.norm("attend", "pre_mlp_layernorm", "norms", again=("norm",), residual=not sandwich)
            if self.kind == "dense":
                self.mlp("experts", "mlp")
            else:
                self.moe()
            if sandwich:
                self.norm("combine", "post_mlp_layernorm", "norms", residual=True)
        if self.kind == "mtp":
            self.join()

    def attention(self):
        """Latents are made from a rank's own tokens by whole matrices, then gathered; heads are cut by tensor ranks."""
        c, plan = self.shape, self.plan
        own, tokens, heads = plan.tokens, plan.gathered_tokens, c.num_attention_heads // plan.tp
        keys = tokens * plan.cp                            # of the whole sequence, on each rank of a context group
        latent = c.kv_lora_rank + c.qk_rope_head_dim       # of keys and values, with the key that has the position
        self.keep_input("attn_in", own * c.hidden_size, "attention", again=("norm",))
        self.matmul("attend", "q_a_proj", own)
        self.norm("attend", "q_a_layernorm", "attention", c.q_lora_rank, again=("norm",))
        self.matmul("attend", "kv_a_proj_with_mqa", own)   # the same input
        self.keep("kv_a_layernorm", own * latent, "attention")             # its input is a slice, which keeps the whole
        self.norm("attend", "kv_a_layernorm", "attention", c.kv_lora_rank, again=("norm",))
        if plan.sp:
            self.gather("tp", "attend", own, c.q_lora_rank + latent)
        self.gather("cp", "attend", tokens, latent)
        self.keep_latent("q_latent", tokens, c.q_lora_rank)
        self.matmul("attend", "q_b_proj", tokens, cut="out", again=("mla_up",))
        self.keep_latent("kv_latent", keys, c.kv_lora_rank)
        self.matmul("attend", "kv_b_proj", keys, cut="out", again=("mla_up",))
        # queries and keys, read and written
        self.vector("attend", "rope", 2 * (tokens + keys) * heads * c.qk_head_dim, again=("mla_up",))
        if "mla_up" in plan.recompute and plan.cp == 1:
            self.keep("k_rope", keys * c.qk_rope_head_dim, "attention")    # what keys are made from again
        self.core_attention(heads, heads, c.qk_head_dim, c.v_head_dim)

    def keep_latent(self, name, tokens, width):
        """A latent that was gathered is kept: running its norm again is no way to it."""
        again = () if tokens > self.plan.tokens else ("norm",)
        self.keep_input(name, tokens * width, "attention", again=again)

    def core_attention(self, heads, kv_heads, qk, v):
        """Scores, softmax, values. A context group's keys are on every one of its ranks."""
        plan = self.plan
        tokens, keys = plan.gathered_tokens, plan.gathered_tokens * plan.cp
        padded = qk if self.shape.value_padded else v      # width of values, as the kernel takes them
        self.keep("q", tokens * heads * qk, "attention", again=("mla_up",))
        self.keep("k", keys * kv_heads * qk, "attention", again=("mla_up",))
        self.keep("v", keys * kv_heads * padded, "attention", again=("mla_up",))
        self.attention_kernel(heads, qk + v, moved=(tokens * heads + keys * kv_heads) * (qk + v))
        if plan.cp > 1:                                    # pieces of a ring are merged one by one, in float32
            merged = (plan.cp - 1) * tokens * heads * v
            self.vector("attend", "ring_merge", 4 * merged, size=self.precise)
        if padded != v:
            self.keep("attn_padded", tokens * heads * padded, "attention", swap="attn_out")
        self.keep_input("attn_out", tokens * heads * v, "attention", swap="attn_out")

    def attention_kernel(self, heads, width, moved):
        """Flash attention. width: of a query and a value together; moved: elements of queries, keys, values, output."""
        tokens, seq_len = self.plan.gathered_tokens, self.plan.seq_len
        causal_flops = 2 * tokens * seq_len * heads * width / 2            # half of the square of scores
        self.ops.append(Attention("attend", "attention", causal_flops, moved * self.element, seq_len, self.regions))
        self.keep("log_sum", tokens * heads, "attention", size=self.precise)

    def mlp(self, part, name):
        """A dense MLP or the shared experts, their inner width cut by tensor ranks."""
        tokens, width = self.plan.gathered_tokens, self.shape.hidden_size
        self.gather_stream(part, times=2)
        if self.plan.tp == 1:
            self.keep_input("mlp_in", tokens * width, "MLP", again=("norm",))
        else:
            self.keep_input(f"{name}_gathered", tokens * width, "MLP")
        self.swiglu(part, name, tokens, "MLP", cuts=("out", "in"))

    def swiglu(self, part, name, rows, owner, cuts, again=()):
        """Two matmuls, gate and up being one, and the activation. again: items that run all but the last again."""
        up, down = self.own_part(f"{name}.gate_up", cuts[0]), self.own_part(f"{name}.down", cuts[1])
        self.matmul(part, f"{name}.gate_up", rows, cuts[0], again)
        self.keep(f"{name}_gate_up", rows * up.n_out, owner, again=again)
        self.vector(part, f"{name}.act", rows * (up.n_out + down.n_in), again=("act", *again))
        self.keep_input(f"{name}_hidden", rows * down.n_in, owner, again=("act", *again))
        self.matmul(part, f"{name}.down", rows, cuts[1])

    def moe(self):
        """Router, permutation, shared and routed experts. A rank computes as many rows as it sends, on average."""
        c, own, rows = self.shape, self.plan.tokens, self.expert_rows()
        self.route()
        self.vector("attend", "permute", (own + rows) * c.hidden_size, again=("permute",))
        if self.plan.ep > 1:
            self.keep("order", rows, "experts", size=8)    # of rows as they arrive
        if c.n_shared_experts:
            self.mlp("shared", "shared")
        self.experts(rows)
        self.vector("combine", "unpermute", (rows + 2 * own) * c.hidden_size)

    def expert_rows(self):
        c = self.shape
        return math.ceil(self.plan.tokens * c.num_experts_per_tok * (c.capacity_factor or 1))

    def route(self):
        """Scores, choice and balance loss, computed in float32 or better."""
        c, plan, own, precise = self.shape, self.plan, self.plan.tokens, self.precise
        k, experts = c.num_experts_per_tok, c.n_routed_experts
        self.keep_input("mlp_in", own * c.hidden_size, "routing", again=("norm",))
        self.matmul("attend", "router", own, in_16_bits=True)
        self.vector("attend", "choose", 6 * own * experts, size=precise)
        self.keep("scores", own * experts, "routing", size=precise)
        self.keep("slot", own * k, "routing", size=8)
        if c.norm_topk_prob:
            self.keep("weights", own * k, "routing", size=precise)
            self.keep("weights.sum", own, "routing", size=precise)
        if c.balance != "none" and c.aux_loss_alpha:
            groups = plan.micro_batch // sequences_of_group(c, plan.micro_batch)
            self.keep("balance", groups * experts, "routing", size=precise)   # load of each group's experts
            self.keep("balance.factor", own, "routing", size=precise)
            if c.aux_scores == "softmax":
                self.keep("balance.softmax", own * experts, "routing", size=precise)

    def experts(self, rows):
        """All of a rank's experts, which share the rows."""
        c = self.shape
        self.keep_input("rows", rows * c.hidden_size, "experts", again=("permute",))
        self.swiglu("experts", "expert", rows, "experts", cuts=("experts", "experts"), again=("expert",))
        spare_row = self.precise == self.element           # a cast drops it
        self.keep("row_weights", rows + spare_row, "experts")
        self.keep("counts", c.n_routed_experts // self.plan.ep, "experts", size=8)
        if c.expert_weight == "after_down":
            self.keep("expert_out", rows * c.hidden_size, "experts", swap="expert_out")
            self.vector("experts", "expert.weight", 2 * rows * c.hidden_size)

    def join(self):
        """The embedding of a later token joins the hidden state, before an MTP layer; and the norm after it."""
        c, own = self.shape, self.plan.tokens
        if c.mtp_hidden == "pre_norm":                     # the same tensor as the input of the last norm before
            self.keep("hnorm", 0, "MTP")
        self.norm("attend", "enorm", "MTP")
        self.norm("attend", "hnorm", "MTP")
        self.norm("attend", "shared_head.norm", "head")
        if self.plan.pp == 1:                              # else the copy counts it
            self.look_up()
        self.keep_input("eh_in", own * 2 * c.hidden_size, "MTP")
        self.matmul("attend", "eh_proj", own)

    # -- the head

    def head(self):
        """Last norm, then head and loss of every depth, the vocabulary cut by tensor ranks."""
        c, plan = self.shape, self.plan
        tokens, vocab = plan.gathered_tokens, c.vocab_size // plan.tp
        # in forward alone: targets (int64), all-reduces of the highest logit and of the sum of the softmax
        forward_alone = 8 + 2 * 2 * self.precise           # bytes of a token
        self.norm("attend", "norm", "head")
        for depth in range(1 + c.num_nextn_predict_layers):
            self.gather("tp", "attend", tokens / plan.tp, c.hidden_size + forward_alone / 2 / self.element)
            self.matmul("attend", "lm_head", tokens, cut="out", in_16_bits=True)
            self.vector("attend", "loss", 4 * tokens * vocab, cached=True, size=self.precise)
            self.keep_loss(depth, tokens, vocab)
        # all depths share one matrix, which may be the embedding's if that is on this rank
        tied = c.tie_word_embeddings and plan.pp == 1
        self.params["dp"] = c.hidden_size + (0 if tied else vocab * c.hidden_size)

    def keep_loss(self, depth, tokens, vocab):
        """The loss makes its gradients in forward: of its input, and of the head's weight in float32 or better."""
        width = self.shape.hidden_size
        self.keep(f"grad_h.{depth}", tokens * width, "head")
        self.keep(f"grad_w.{depth}", vocab * width, "head", size=self.precise)


class SavedBytes(NamedTuple):
    """Of one micro-batch, for its backward: kept on the device, and swapped to the host."""
    kept: float
    swapped: float


def saved_by_part(works):
    """Bytes that backward needs of one micro-batch, by the tensors' owners; `host`: what is swapped."""
    sizes = Counter()
    for work in works:
        items = items_in_force(work.plan)
        for tensor in work.tensors.values():
            if tensor.again.isdisjoint(items):
                sizes["host" if tensor.swap in items else tensor.owner] += tensor.size
    return sizes


def saved_bytes(work):
    """SavedBytes of a layer, the embedding or the head, under its plan's recompute and swap."""
    sizes = saved_by_part([work])
    swapped = sizes.pop("host", 0)
    return SavedBytes(sum(sizes.values()), swapped)


# ---------------------------------------------------------------------------------------------------------------------
# Stages: which layers are together on a pipeline rank


def stage_layers(config, plan):
    """list (pp*vpp) of lists of layer numbers. The embedding is on the first stage, head and MTP layers on the last."""
    split = plan.layer_split or even_split(as_shape(config), plan.pp, plan.vpp, plan.seq_len)
    numbers = iter(range(config.num_hidden_layers + config.num_nextn_predict_layers))
    layers = [list(islice(numbers, n)) for n in split]
    layers[-1] += numbers                                  # those that are left: MTP's
    return layers


@lru_cache(1024)
def even_split(shape, pp, vpp, seq_len):
    """Hidden layers per stage, by FLOPs: each goes to the pipeline rank, there to the stage, that has least to do.

    Head and MTP count for the last stage, which alone may get no hidden layer; hidden layers count as their mean. A
    rule of shape, length and schedule alone, so that every device cuts alike.
    """
    n_layers, last = shape.num_hidden_layers, pp * vpp - 1
    kinds = layer_kinds(shape) + ["head"] * (1 + shape.num_nextn_predict_layers)
    flops = [layer_flops(shape, kind, seq_len) for kind in kinds]
    layer, tail = sum(flops[:n_layers]) / n_layers, sum(flops[n_layers:])
    split, work = [1] * last + [0], [layer] * last + [tail]
    for _ in range(n_layers - last):
        # of equals the last rank: it has least in flight
        rank = min(reversed(range(pp)), key=lambda rank: sum(work[rank::pp]))
        stage = min(range(rank, pp * vpp, pp), key=work.__getitem__)
        split[stage] += 1
        work[stage] += layer
    return split


def stage_kinds(shape, plan):
    """list (pp*vpp) of tuples in the order of forward: embedding, kinds of layers, head."""
    kinds = layer_kinds(shape)
    stages = [[kinds[i] for i in layers] for layers in stage_layers(shape, plan)]
    stages[0].insert(0, "embedding")
    if "mtp" in kinds and plan.pp > 1:                     # a copy of the embedding feeds the MTP layers
        stages[-1].insert(stages[-1].index("mtp"), "embedding")
    stages[-1].append("head")
    return [tuple(stage) for stage in stages]


# ---------------------------------------------------------------------------------------------------------------------
# The time of a layer


class LayerTime:
    """Seconds of one layer, embedding or head on one rank. What a backward runs again is the part `recompute`.

    max_vio: the busiest rank's load over the mean, minus one.
    """

    def __init__(self, work, hardware, max_vio):
        self.work, self.plan, self.hardware = work, work.plan, hardware
        self.items = items_in_force(work.plan)
        self.name = "" if work.is_layer else work.kind
        self.has_experts = work.kind in ("moe", "mtp")
        self.slower = 1 + max_vio                          # the busiest rank's experts and exchange, over the mean
        self.whole_again = work.is_layer and "layer" in self.items
        self.rows_again = self._when_rows_travel_again()
        self.compute = Counter()                           # (part, pass) -> seconds; pass: F, I, W, or B = I + W
        self.collectives = defaultdict(list)               # part -> list of (axis, tier, seconds) of one pass
        self.exchange = {"F": Counter(), "B": Counter()}   # pass -> tier -> seconds of one way
        self.sent = Counter()                              # tier -> bytes of a forward and a backward
        self._time_operators()
        self._time_collectives()
        if self.has_experts:
            self._time_exchange()
        self.swap = saved_bytes(work).swapped / hardware.host_bandwidth
        # (tier, seconds) with zero=3: weights are gathered in forward and in backward, gradients scattered after it
        self.weights = self._of_weights(work.element)
        self.gradients = self._of_weights(4)

    def _when_rows_travel_again(self):
        """Rows that were dropped travel again: first, if anything is recomputed from them, else for the experts' own
        backward; or "" for never."""
        if not self.has_experts or self.items.isdisjoint({"permute", "layer"}):
            return ""
        return "for experts" if self.items.isdisjoint({"expert", "layer"}) else "first"

    def _of_weights(self, size):
        seconds = 0.0
        if self.plan.zero == 3:
            seconds = weights_seconds(self.plan, self.hardware, self.work.params, size)
        return tier_of(self.plan, "dp"), seconds

    def _time_operators(self):
        for op in self.work.ops:
            forward, inputs, weights = op.seconds(self.plan, self.hardware)
            busiest = self.slower if self.has_experts and op.part == "experts" else 1.0
            for which, seconds in dict(F=forward, I=inputs, W=weights, B=inputs + weights).items():
                self.compute[op.part, which] += busiest * seconds
            if not op.again.isdisjoint(self.items):
                self.compute["recompute", "F"] += busiest * forward

    def _time_collectives(self):
        for (axis, part, again), sent in self.work.collectives.items():
            tier = tier_of(self.plan, axis)
            seconds = axis_seconds(self.plan, self.hardware, axis, sent)
            seconds *= 1 - self.plan.hidden_share(axis, self.hardware)
            parts = [part] if again.isdisjoint(self.items) else [part, "recompute"]
            for one in parts:
                self.collectives[one].append((axis, tier, seconds))
            self.sent[tier] += (1 + len(parts)) * sent     # the first in forward and in backward

    def _time_exchange(self):
        plan = self.plan
        outer_ranks = plan.ep if plan.goes_directly else plan.ep // plan.inner
        ranks = dict(inner=plan.inner, outer=outer_ranks)
        forwards = 2 + bool(self.rows_again) + self.whole_again            # how often rows travel one way
        sent = uniform_exchange(self.work.shape, plan)
        for which, both_ways, times in (("F", sent["forward"], forwards), ("B", sent["backward"], 2)):
            for tier in ("inner", "outer"):
                one_way = both_ways[tier] / 2
                seconds = collective_seconds(self.hardware, tier, ranks[tier], self.slower * one_way)
                self.exchange[which][tier] = seconds
                self.sent[tier] += times * one_way


@lru_cache(2**14)
def layer_work(work, shape, layer_plan, kind):
    """work: Work or a class made from it."""
    return work(shape, layer_plan, kind)


layer_time = lru_cache(2**14)(LayerTime)


# ---------------------------------------------------------------------------------------------------------------------
# Inside an action: tasks on the streams of one device


class Task(NamedTuple):
    """What a device does for a while."""
    start: float                   # seconds, in Streams from the action's start
    end: float
    name: str
    stream: str                    # compute | inner | outer | host


class Manner(NamedTuple):
    """How a plan's actions run."""
    flat: bool                     # the exchange uses both kinds of link at once
    deferred: bool                 # weight gradients are put off, to hide an exchange
    paired: bool                   # a forward and a backward take turns


class Streams:
    """A device's queues: compute, links inside the node, links between nodes, the host's link; each runs in order."""

    def __init__(self, manner):
        self.manner = manner
        self.free = {"compute": 0.0, "inner": 0.0, "outer": 0.0, "host": 0.0}      # seconds from which a stream is idle
        self.tasks = []
        self.waiting = []                                  # (layer, part) whose weight gradients are put off

    def queue(self, name, stream, seconds, after=0.0):
        """Queue a task that starts when its stream is free and not before `after`; returns its end."""
        if seconds == 0:
            return after
        start = self.free[stream]
        if after > start:
            start = after
        end = start + seconds
        self.free[stream] = end
        self.tasks.append(Task(start, end, name, stream))
        return end

    def compute(self, layer, part, which, after):
        """One part of a layer behind its collectives, which are called after all computation that was queued before.

        which: F, I, W or B, the two halves of a backward together.
        """
        if which != "W" and part in layer.collectives:     # weight gradients need nothing from other ranks
            after = max(after, self.free["compute"])
            for axis, tier, seconds in layer.collectives[part]:
                after = self.queue(f"{axis} {part}", tier, seconds, after)
        return self.queue(f"{layer.name or part} {which}", "compute", layer.compute[part, which], after)

    def backward(self, layer, part, after):
        """Backward of a part, for its inputs alone if its weight gradients are put off."""
        if not self.manner.deferred:
            return self.compute(layer, part, "B", after)
        self.waiting.append((layer, part))
        return self.compute(layer, part, "I", after)

    def make_weight_gradients(self):
        for layer, part in self.waiting:
            self.compute(layer, part, "W", 0.0)
        self.waiting.clear()

    def exchange(self, layer, which, way, after):
        """Rows to the experts (way=out: outer hop first) or back; flat sends over both kinds of link at once."""
        name, seconds = f"exchange {way} {which}", layer.exchange[which]
        first, second = ("outer", "inner") if way == "out" else ("inner", "outer")
        arrived = self.queue(name, first, seconds[first], after)
        return max(arrived, self.queue(name, second, seconds[second], after if self.manner.flat else arrived))

    def forward_steps(self, layers):
        """Four steps a layer, as backward_steps, so that a pair's layers can take turns.

        In a pair, attention F and shared expert B hide combine B, experts I dispatch F, experts F and W dispatch B, and
        attention I, shared expert F and attention W combine F. Alone, the shared expert hides a part of it.
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
            self.make_weight_gradients()
            ready = self.compute(layer, "combine", "F", returned)
            yield

    def backward_steps(self, layers):
        """Weight gradients that are put off hide the experts' way back: a layer's own, and those of the attention that
        ran before; in a pair the shared expert's hide the way out."""
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
            self.backward(layer, "shared", again)
            if self.manner.paired:
                self.make_weight_gradients()
            yield
            rows = self.exchange(layer, "F", "out", ready) if layer.rows_again == "for experts" else ready
            computed = self.backward(layer, "experts", max(arrived, again, rows))
            returned = self.exchange(layer, "B", "back", computed)
            yield
            self.make_weight_gradients()
            ready = self.backward(layer, "attend", returned)
            self.queue("gradients", *layer.gradients, ready)
            yield

    def recompute(self, layer, ready):
        """What the backward runs again, behind the rows that travel again for it."""
        rows = self.exchange(layer, "F", "out", ready) if layer.rows_again == "first" else ready
        again = self.compute(layer, "recompute", "F", rows)
        return self.exchange(layer, "F", "back", again) if layer.whole_again else again


def play_action(forward, backward, manner):
    """Streams of one action: a forward of a stage, a backward of one, or a pair. Each: its LayerTimes, or ()."""
    streams = Streams(manner)
    forwards, backwards = streams.forward_steps(forward), streams.backward_steps(backward)
    steps = zip_longest(backwards, forwards) if manner.paired else chain(forwards, backwards)
    for _ in steps:                                        # in a pair the two take turns, a step each
        pass
    streams.make_weight_gradients()
    return streams


class Account(NamedTuple):
    """Where the seconds of an action go."""
    seconds: float
    # add up to `seconds`: computation by name; `exchange`, while rows travel and nothing is computed; `overlap tax`;
    # `collectives`, all other waits
    by_name: dict
    travel: float                  # seconds of exchange on either link, hidden or not


@lru_cache(2**15)
def action_account(forward, backward, manner, tax=0.0):
    """Account of play_action. tax: seconds of computation lost for a second in which a link is busy beside it."""
    streams = play_action(forward, backward, manner)
    computing = [task for task in streams.tasks if task.stream == "compute"]
    on_links = [task for task in streams.tasks if task.stream in ("inner", "outer")]
    travelling = [task for task in streams.tasks if task.name.startswith("exchange")]
    travel, by_name = sum(end - start for start, end, _, _ in travelling), Counter()
    for start, end, name, _ in computing:
        by_name[name[:-2]] += end - start                  # without the pass
    computed = sum(by_name.values())
    both = computed + busy_seconds(on_links) - busy_seconds(computing + on_links)
    busy = busy_seconds(computing + travelling)
    played = max(streams.free.values())
    by_name["exchange"] = max(0.0, busy - computed)          # rounding aside
    by_name["collectives"] = max(0.0, played - busy)
    by_name["overlap tax"] = tax * both
    return Account(played + tax * both, by_name, travel)


def busy_seconds(tasks):
    """Seconds in which at least one of the tasks runs."""
    total, last = 0.0, 0.0
    for start, end, _, _ in sorted(tasks):
        if end > last:
            total += end - (start if start > last else last)
            last = end
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Schedules, for each pipeline rank a list of actions, and the clock that plays them


class Action(NamedTuple):
    """What a rank does at a time: a forward, a backward, or a pair of both, each as (stage, micro-batch).

    str() is the notation of torch.distributed.pipelining, whose runtime runs the table: 3F0, 3B0, (3F1;2B0)OVERLAP_F_B.
    """
    forward: tuple = None
    backward: tuple = None

    @property
    def stages(self):
        """(stage of the forward, of the backward), None where there is none: all that the action's seconds depend on"""
        return self.forward and self.forward[0], self.backward and self.backward[0]

    def parts(self):
        """The action as plain (kind, stage, microbatch), kind F or B: two for a pair, forward first."""
        return tuple((kind, *part) for kind, part in zip("FB", self) if part)

    def __str__(self):
        names = [f"{stage}{kind}{microbatch}" for kind, stage, microbatch in self.parts()]
        return f"({';'.join(names)})OVERLAP_F_B" if len(names) == 2 else names[0]


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
    actions = [Action(forward) for forward in forwards[:first]]
    for forward, backward in zip(forwards[first:], backwards):
        if plan.schedule == "paired":
            actions.append(Action(forward, backward))
        else:
            actions += [Action(forward), Action(None, backward)]
    left = backwards[len(forwards) - first:]
    return actions + [Action(None, backward) for backward in left]


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


class Step(NamedTuple):
    """An action of a table, in an order in which each finds its inputs."""
    rank: int
    stages: tuple                  # Action.stages
    needs: tuple                   # numbers of the steps, on other ranks, whose outputs it waits for
    action: Action


def in_order(plan, table):
    """list of Step: each rank runs as far as its inputs allow, until all are done."""
    # (kind, stage, micro-batch) that can run -> numbers of the steps on other ranks that make its input: none for the
    # tokens of the first stage and the losses of the last, which are at hand
    at_hand = ("F", 0), ("B", plan.n_stages - 1)
    ready = {(*first, microbatch): () for first, microbatch in product(at_hand, range(plan.n_micro))}
    steps, done, progress = [], [0] * len(table), True
    while progress:
        progress = False
        for rank, actions in enumerate(table):
            for action in islice(actions, done[rank], None):
                parts = action.parts()
                if not ready.keys() >= {*parts}:
                    break
                needs, own = (), (len(steps),) if plan.pp > 1 else ()
                for kind, stage, microbatch in parts:
                    needs += ready[kind, stage, microbatch]
                    ready[kind, stage + (1 if kind == "F" else -1), microbatch] = own
                steps.append(Step(rank, action.stages, needs, action))
                done[rank] += 1
                progress = True
    waiting = [str(actions[n]) for actions, n in zip(table, done) if n < len(actions)]
    assert not waiting, f"ranks wait for each other at {', '.join(waiting)}"
    return steps


class Timetable(NamedTuple):
    """The steps of a schedule, and how often each Action.stages is among them."""
    steps: list
    times: Counter


@lru_cache(8)
def timetable(schedule, pp, vpp, n_micro):
    """For many plans, one after the other, that differ in other things alone."""
    plan = Plan(pp=pp, vpp=vpp, schedule=schedule, global_batch=n_micro)
    steps = in_order(plan, schedule_table(plan))
    return Timetable(steps, Counter(step.stages for step in steps))


def play(steps, seconds, pp, link=0.0):
    """The clock: (seconds at which each step ends, and each rank). seconds: of each Action.stages.

    link: seconds that an output travels to another rank; sends are asynchronous, only the receiver waits. A pair starts
    when both of its inputs are there.
    """
    ends, free = [], [0.0] * pp
    for rank, stages, needs, _ in steps:
        start = free[rank]
        for step in needs:
            arrival = ends[step] + link
            if arrival > start:
                start = arrival
        free[rank] = start + seconds[stages]
        ends.append(free[rank])
    return ends, free


# ---------------------------------------------------------------------------------------------------------------------
# One step: time and memory


class Simulation:
    """One step of a plan, played: what predict reports and trace draws. work: the class that counts a layer.

    max_vio: load of the busiest rank over the mean, minus one.
    """

    def __init__(self, config, plan, hardware, max_vio=0.0, work=Work):
        self.plan, self.hardware, self.shape = plan, hardware, on_hardware(config, hardware)
        self.max_vio, self.work = max_vio, work
        self.stages = stage_kinds(self.shape, plan)        # of each stage: embedding, kinds of layers, head
        self.kinds = set(chain(*self.stages))

    @cached_property
    def works(self):
        layer_plan = self.plan.layer_plan
        return {kind: layer_work(self.work, self.shape, layer_plan, kind) for kind in self.kinds}

    @cached_property
    def kept(self):
        """kind -> bytes that a micro-batch's forward keeps on the device."""
        return {kind: saved_bytes(work).kept for kind, work in self.works.items()}

    @cached_property
    def times(self):
        return {kind: layer_time(work, self.hardware, self.max_vio) for kind, work in self.works.items()}

    @cached_property
    def kinds_of(self):
        """list (pp) of tuples: kinds of the layers that a pipeline rank holds, stage by stage."""
        return [tuple(chain.from_iterable(self.stages[stage] for stage in self.plan.stages_of(rank)))
                for rank in range(self.plan.pp)]

    @cached_property
    def unlike_ranks(self):
        """list: of the pipeline ranks that hold layers of the same kinds the first, which has the most in flight."""
        return [rank for rank, kinds in enumerate(self.kinds_of) if self.kinds_of.index(kinds) == rank]

    # seconds

    def layers_of(self, stage):
        """LayerTimes of a stage; none for None."""
        return () if stage is None else tuple(self.times[kind] for kind in self.stages[stage])

    @property
    def manner(self):
        return Manner(self.plan.goes_directly, not self.plan.is_plain, self.plan.overlap == "adaptive")

    def play_layers(self, forward, backward):
        """Account of an action. forward, backward: LayerTimes, or ()."""
        return action_account(forward, backward, self.manner, self.hardware.overlap_tax)

    @property
    def timetable(self):
        return timetable(self.plan.schedule, self.plan.pp, self.plan.vpp, self.plan.n_micro)

    @cached_property
    def accounts(self):
        """Action.stages -> Account."""
        return {stages: self.play_layers(*map(self.layers_of, stages)) for stages in self.timetable.times}

    def stream_bytes(self):
        """What a device sends to the next stage."""
        return self.plan.tokens * self.shape.hidden_size * self.plan.element

    @property
    def link(self):
        """Seconds that it travels and that the next stage waits for it."""
        return axis_seconds(self.plan, self.hardware, "pp", self.stream_bytes()) if self.plan.pp > 1 else 0.0

    @cached_property
    def seconds(self):
        """Action.stages -> seconds."""
        return {stages: account.seconds for stages, account in self.accounts.items()}

    @cached_property
    def played(self):
        """The pipeline played: seconds at which each step of the timetable ends, and each rank."""
        return play(self.timetable.steps, self.seconds, self.plan.pp, self.link)

    # what follows the pipeline on a rank

    def gradient_seconds(self, rank):
        """To reduce gradients and to gather the new weights."""
        plan, held = self.plan, self.params[rank]
        if plan.zero == 3:                                 # in LayerTime
            return 0.0
        gradients = weights_seconds(plan, self.hardware, held, gradient_bytes(plan))
        if plan.zero == 0:                                 # the second half of an all-reduce
            return 2 * gradients
        return gradients + weights_seconds(plan, self.hardware, held, plan.element)

    def optimizer_seconds(self, rank):
        seconds = self.optimizer_bytes(rank) / self.hardware.memory_rate
        if "optimizer" in self.plan.swap:                  # two moments come and go
            seconds += 2 * 8 * self.params_cut[rank] / self.hardware.host_bandwidth
        return seconds

    def optimizer_bytes(self, rank):
        """Moved by AdamW: reads gradient, master, two moments; writes three of them and the weight."""
        return self.params_cut[rank] * (7 * 4 + self.plan.element)

    @cached_property
    def ends(self):
        """list (pp): seconds at which each pipeline rank is done, optimizer included; the last ends the step ..."""
        _, ends = self.played
        return [end + self.gradient_seconds(rank) + self.optimizer_seconds(rank) for rank, end in enumerate(ends)]

    @property
    def straggling(self):
        """... but for what is lost with the number of devices: a share of the step."""
        return self.hardware.scale_loss * math.log2(max(1, self.plan.world_size / self.plan.node_size))

    def breakdown(self):
        """({part: seconds} that add up to the step, a mean over pipeline ranks; seconds of exchange on either link)."""
        parts, travel = Counter(), 0.0
        for rank in range(self.plan.pp):
            parts["gradients"] += self.gradient_seconds(rank)
            parts["optimizer"] += self.optimizer_seconds(rank)
        for stages, times in self.timetable.times.items():
            account = self.accounts[stages]
            for name, seconds in account.by_name.items():
                parts[name] += times * seconds
            travel += times * account.travel
        parts = {name: seconds / self.plan.pp for name, seconds in parts.items()}
        parts["stragglers"] = self.straggling * max(self.ends)
        parts["bubble"] = (self.plan.pp > 1) * max(0.0, max(self.ends) + parts["stragglers"] - sum(parts.values()))
        return parts, travel / self.plan.pp

    # bytes

    def bytes_by_tier(self):
        """Bytes that a device sends while the pipeline runs, a mean over pipeline ranks; zero=3's weights apart."""
        plan, total = self.plan, Counter(inner=0, outer=0)
        for kind in chain(*self.stages):
            total.update(self.times[kind].sent)
        if plan.pp > 1:                                    # each stage and the next are on two ranks
            total[tier_of(plan, "pp")] += 2 * (plan.n_stages - 1) * self.stream_bytes()
        return {tier: sent * plan.n_micro / plan.pp for tier, sent in total.items()}

    @cached_property
    def params(self):
        """list (pp) of {axis of Plan.holders: parameters that a pipeline rank holds}."""
        held = {kinds: {axis: sum(times * self.works[kind].params[axis] for kind, times in Counter(kinds).items())
                        for axis in self.plan.holders} for kinds in set(self.kinds_of)}
        return [held[kinds] for kinds in self.kinds_of]

    @cached_property
    def params_cut(self):
        """list (pp): parameters that a rank keeps where they are cut over those that hold the same."""
        holders = self.plan.holders if self.plan.zero else dict(dp=1, edp=1)
        return [sum(held[axis] / ranks for axis, ranks in holders.items()) for held in self.params]

    def activations(self, rank):
        """Most bytes that micro-batches in flight keep."""
        plan = self.plan
        by_chunk = [sum(self.kept[kind] for kind in self.stages[stage]) for stage in plan.stages_of(rank)]
        enough = min(plan.n_micro, 4 * plan.turn)          # later turns repeat what was in flight
        moments = in_flight(plan.schedule, plan.pp, plan.vpp, enough, rank)
        return float(np.max(moments @ by_chunk))

    def memory(self, rank):
        """Bytes of a pipeline rank at its peak, by part."""
        plan, hardware, cut = self.plan, self.hardware, self.params_cut[rank]
        element, whole = plan.element, sum(self.params[rank].values())
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
                layer = max(layer, sum(work.params.values()) * (2 * plan.element + 4))
            again = max(again, sum(work.saved.values()) - self.kept[kind])
        return rows + layer + again

    def refusal(self):
        """Why the step does not fit when the allocator has given unused pieces back; "" if it does."""
        for rank in self.unlike_ranks:
            sizes = self.memory(rank)
            needed = sum(sizes.values())
            if needed - sizes["allocator"] > self.hardware.memory:
                return (f"pipeline rank {rank} needs {needed / GIB:.1f} of {self.hardware.memory / GIB:.1f} GiB, most "
                        f"of it {max(sizes, key=sizes.get)}: use more recompute, pp, tp or zero=3, or a smaller "
                        "micro_batch")
        return ""


def predict(config, plan, hardware, max_vio=0.0, work=Work):
    """One step of a plan, simulated: dict of seconds, bytes, GiB and fractions. ValueError for a plan that cannot run.

    max_vio, work: as of Simulation. mfu: model FLOPs (causal attention, head and MTP included, nothing recomputed) over
    the peak of the plan's precision. hidden_comm_fraction: of the expert exchange.
    memory_by_stage: a list by pipeline rank, of all its stages. bytes_by_tier: see Simulation.
    """
    check_plan(config, plan, hardware)
    simulation = Simulation(config, plan, hardware, max_vio, work)
    parts, travel = simulation.breakdown()
    step, why_not = sum(parts.values()), simulation.refusal()
    memories = [simulation.memory(rank) for rank in range(plan.pp)]
    needs = [sum(sizes.values()) for sizes in memories]
    rate = plan.global_batch * plan.seq_len / step
    flops = flops_per_token(simulation.shape, plan.seq_len) * rate / plan.world_size       # FLOP/s of a device
    return dict(
        step_time_s=step, tokens_per_s=rate, tokens_per_s_per_device=rate / plan.world_size,
        mfu=flops / hardware.peak[plan.precision], tflops_per_device=flops / 1e12,
        mem_gib=max(needs) / GIB, bubble=parts["bubble"] / step,
        exposed_comm_s=parts["exchange"] + parts["collectives"] + parts["gradients"],
        hidden_comm_fraction=max(0.0, 1 - parts["exchange"] / travel) if travel else None,
        fits=not why_not, why_not=why_not, peak_rank=needs.index(max(needs)), breakdown=parts,
        memory_by_stage=[{name: size / GIB for name, size in sizes.items()} for sizes in memories],
        bytes_by_tier=simulation.bytes_by_tier(), max_vio=max_vio, plan=asdict(plan))


# ---------------------------------------------------------------------------------------------------------------------
# What to recompute and swap, so that a plan fits


def memory_choices(config, optimizer=True):
    """Each choice of items to recompute and swap that makes a difference: (recompute, swap), smaller ones first.

    optimizer: whether it may be swapped.
    """
    fine = [item for item in RECOMPUTE if item != "layer"]
    useful = dict(expert_out=config.expert_weight == "after_down", attn_out=True, optimizer=optimizer)
    swaps = [item for item in SWAP if useful[item]]
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
    results = [predict(config, replace(plan, recompute=recompute, swap=swap), hardware)
               for recompute, swap in memory_choices(config, optimizer=not plan.balance_live)]
    fitting = [result for result in results if result["mem_gib"] * GIB <= budget]
    if fitting:
        return min(fitting, key=itemgetter("step_time_s"))                 # of equals the first, which has fewest items
    least = min(results, key=itemgetter("mem_gib"))
    needs, most = least["mem_gib"], budget / GIB
    parts = least["memory_by_stage"][least["peak_rank"]]
    sizes = ", ".join(f"{name} {size:.2f}" for name, size in parts.items() if size >= 0.005)
    items = "+".join(least["plan"]["recompute"] + least["plan"]["swap"])
    raise ValueError(f"fit={most:.2f}GiB: with {items} this plan still needs {needs:.2f} GiB (simulated: {sizes}), "
                     f"{needs - most:.2f} GiB too much: use " + what_would_fit(config, plan, hardware, budget))


def what_would_fit(config, plan, hardware, budget):
    """The first of a few changes that brings a plan below the budget, with everything recomputed and swapped."""
    smallest = replace(plan, recompute=("layer",), swap=() if plan.balance_live else ("optimizer",))
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


def candidate_groups(config, hardware, devices, **alike):
    """Plans to search, but for zero, dispatch and what is saved, in lists of those that cut a layer alike.

    alike: fields that all have the same, global_batch and seq_len among them. At most a node of tp, at least 1024
    tokens a rank of a context group, micro-batches of at most 8.
    """
    powers = [2**i for i in range(devices.bit_length())]
    tensor = [n for n in powers if n <= hardware.node_size]
    contexts = [n for n in powers if n == 1 or n * 1024 <= alike["seq_len"]]
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
                node_size=hardware.node_size, **alike))
        yield group


def zero_choices(plan):
    """Ways to cut weights and optimizer states that can be best: 1 takes less memory and no more time than 0, and 3
    saves memory only where parallel.py runs whole micro-batches one by one."""
    if max(plan.holders.values()) == 1:                    # nobody to share with
        return (0,)
    return (1, 3) if plan.is_plain else (1,)


def exchange_choices(plan):
    """Inside one node all exchanges are the same."""
    return EXCHANGES if plan.ep > plan.node_size else EXCHANGES[:1]


def rank_savings(config, plan, hardware):
    """list of (recompute, swap), cheapest first, each of which keeps less than all before it, as the model's most
    frequent layer tells; a swapped optimizer apart."""
    found, best, least = [], [], math.inf
    kind = Counter(layer_kinds(config)).most_common(1)[0][0]
    for recompute, swap in memory_choices(config, optimizer=False):
        simulation = Simulation(config, replace(plan, recompute=recompute, swap=swap), hardware)
        work = layer_work(Work, config, simulation.plan.layer_plan, kind)
        seconds, _ = layer_seconds(simulation, layer_time(work, hardware, 0.0))
        found.append((seconds, saved_bytes(work).kept, (recompute, swap)))
    for _, kept, saving in sorted(found, key=itemgetter(0, 1)):
        if kept < least:
            best.append(saving)
            least = kept
    return best


def fitted(config, plan, hardware, savings):
    """([this plan with the cheapest saving that fits, for each way to hold the optimizer], [why none fits])."""
    def saving(number):
        recompute, swap = savings[number]
        return replace(plan, zero=zero, recompute=recompute, swap=swap + optimizer)

    def refusal(number):
        return Simulation(config, saving(number), hardware).refusal()

    plans = []
    for zero, optimizer in product(zero_choices(plan), ((), ("optimizer",))):
        first = bisect_left(range(len(savings)), True, key=lambda number: not refusal(number))      # each needs less
        if first < len(savings):
            plans.append(saving(first))
        if first == 0:                                     # nothing is recomputed: less memory gains nothing more
            break
    return plans, [] if plans else ["recomputed and swapped as much as can be, " + refusal(len(savings) - 1)]


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
        after = simulation.gradient_seconds(rank) + simulation.optimizer_seconds(rank)
        slowest = max(slowest, work + bubble + after)
    hops = 2 * (plan.pp - 1) * simulation.link
    return (slowest + hops) * (1 + simulation.straggling)


def layer_seconds(simulation, layer):
    """(seconds of one layer's forward and backward alone, of both as a pair where the schedule has pairs)."""
    alone = simulation.play_layers((layer,), ()).seconds + simulation.play_layers((), (layer,)).seconds
    if simulation.plan.schedule != "paired":
        return alone, alone
    return alone, simulation.play_layers((layer,), (layer,)).seconds


def price_group(config, hardware, plans):
    """([(seconds by price, plan)] of those that can run and fit, [why one was left out]). plans: a candidate group."""
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
        reasons += why_not
        for one, dispatch in product(fitting, dispatches):
            one = replace(one, dispatch=dispatch)
            priced.append((price(Simulation(config, one, hardware)), one))
    return priced, reasons


class Search(NamedTuple):
    found: list                    # predictions of the plans that were played, the fastest first
    refused: dict                  # refusal without its numbers -> (how often, an example)
    priced: int                    # plans that can run and fit
    interrupted: bool


def search_plans(config, hardware, devices, top=10, **alike):
    """The best plans by price are played, PLAYED or `top` of them; interrupted while it prices, the `top` best so far.

    A search, not a proof: a plan is missed whose price is too high by more than that of the others.
    """
    groups = list(candidate_groups(config, hardware, devices, **alike))
    results, interrupted = in_processes("groups of plans priced", partial(price_group, config, hardware), groups)
    priced, refused = [], {}
    for more, reasons in results:
        priced += more
        for reason in reasons:
            kind = re.sub(r"[0-9.]+", "#", reason)
            times, _ = refused.get(kind, (0, ""))
            refused[kind] = times + 1, reason
    priced.sort(key=itemgetter(0))
    best = [plan for _, plan in priced[:top if interrupted else max(top, PLAYED)]]
    found, ended = in_processes("plans played", partial(predict, config, hardware=hardware), best)
    found.sort(key=itemgetter("step_time_s"))
    return Search(found, refused, len(priced), interrupted or ended)


def in_processes(what, function, items):
    """(function of each item, in their order, computed by as many processes as there are cores; whether an interrupt
    ended it, before all were)"""
    results = []
    try:
        with multiprocessing.Pool(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            for result in with_progress(what, pool.imap(function, items), len(items)):
                results.append(result)
    except KeyboardInterrupt:
        return results, True
    return results, False


def with_progress(what, items, total=None):
    """The items, and on stderr from the third second on how many were taken and the time that the rest will need."""
    begin = shown = time.monotonic()
    total = len(items) if total is None else total
    for taken, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now > shown + 1 and now > begin + 3:
            left, shown = (now - begin) / taken * (total - taken), now
            print(f"\r{what}: {taken} of {total}, at most {left:.0f} s left  ", end="", file=sys.stderr, flush=True)
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
        dp, left = divmod(devices, tp * pp)
        if dp and not left:
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
    tp = min(8, hardware.node_size)
    require(plans, f"devices={devices}: use a multiple of tp*pp={tp}*8={8 * tp}")
    for config, active, total in with_progress("shapes tried", shapes):
        result = fastest(config, plans, hardware)
        if result:
            rows.append((config, active, total, result))
    rows.sort(key=lambda row: -row[-1]["tokens_per_s"])
    print(f"{len(shapes)} shapes within 3 % of {budget['active'] / 1e9:.0f} B active and {budget['total'] / 1e9:.0f} B "
          f"in all; {len(rows)} run on {devices} {hardware.name}, {peak_words(hardware)}, sequences of {seq_len}.\n"
          "Only speed is simulated: what a shape learns is beyond this table. Sizes leave out embedding and MTP.\n"
          "\nrank  tokens/s    MFU  active  total  layers hidden experts width top heads q-rank  plan")
    for rank, (c, active, total, result) in enumerate(rows, 1):
        if rank <= top or c == PANGU:
            print(f"{rank:4}", "{tokens_per_s:9.3g} {mfu:6.1%}".format(**result),
                  f"{active / 1e9:6.1f}B {total / 1e9:5.0f}B",
                  "{num_hidden_layers:7} {hidden_size:6} {n_routed_experts:7} {moe_intermediate_size:5} "
                  "{num_experts_per_tok:3} {num_attention_heads:5} {q_lora_rank:6}".format(**vars(c)),
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


def simulate_paper(name, hardware, max_vio=None, **changes):
    """predict of one of PAPER. changes: fields of Plan."""
    run = PAPER[name]
    return predict(PANGU, Plan(**run["plan"] | changes), hardware, run["max_vio"] if max_vio is None else max_vio)


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
              "{tokens_per_s:10.3g} {mfu:7.1%}".format(**run), f"{ours:7.1%}",
              "| {tokens_per_s:10.3g} {mfu:7.1%} {step_time_s:8.2f} {mem_gib:6.1f}".format(**result),
              "yes" if result["fits"] else "no")
    hardware = HARDWARE[PAPER_BINS[0]]
    print(f"\nThe optimised run, {hardware.name} at {PAPER_LENGTH} (all simulated)")
    print_prediction(simulate_paper("optimised", hardware, seq_len=PAPER_LENGTH))
    print_hidden(hardware)


def print_hidden(hardware):
    """Which actions expose the exchange."""
    simulation = Simulation(PANGU, Plan(seq_len=PAPER_LENGTH, **PAPER["optimised"]["plan"]), hardware)
    exposed = Counter()                                    # whether in a pair -> seconds, a mean over pipeline ranks
    for stages, times in simulation.timetable.times.items():
        exposed[None not in stages] += times * simulation.accounts[stages].by_name["exchange"] / simulation.plan.pp
    print("\nHidden is the share of the exchange that runs beside computation. Not hidden: "
          f"{exposed[False]:.2f} s in passes without\na partner, before and after the steady steps, where the shared "
          f"expert and weight gradients hide a part, and\n{exposed[True]:.2f} s in pairs, where an exchange is longer "
          "than what runs beside it. The paper states no share; later press\nsays more than 98 %.")


ALLOCATOR = "what the allocator holds unused is in them, but not in what must fit"


def print_prediction(result):
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:24} {value:12.4g}")
    print("\nwhere the step goes         seconds   share   (mean over pipeline ranks)")
    for name, seconds in sorted(result["breakdown"].items(), key=itemgetter(1), reverse=True):
        note = "   scale_loss of the hardware, for each doubling of the nodes" if name == "stragglers" else ""
        print(f"{name:24} {seconds:10.4g} {seconds / result['step_time_s']:7.1%}{note}")
    sent = result["bytes_by_tier"]
    print("\nsent by a device per step, gradients and zero=3's weights apart: "
          f"{sent['inner'] / 1e9:.2f} GB inside its node, {sent['outer'] / 1e9:.2f} GB "
          "between nodes")
    memories = result["memory_by_stage"]
    print(f"\nGiB at the peak of each pipeline rank, with all its stages; {ALLOCATOR}\nrank ",
          *(f"{name:>11}" for name in memories[0]), "        sum")
    for rank, sizes in enumerate(memories):
        peak = " <- peak" if rank == result["peak_rank"] else ""
        print(f"{rank:5}", *(f"{size:11.2f}" for size in sizes.values()), f"{sum(sizes.values()):11.2f}", peak)
    print(f"\nfits: {'yes' if result['fits'] else 'no, ' + result['why_not']}")


# ---------------------------------------------------------------------------------------------------------------------
# The step as a picture


class Span(NamedTuple):
    """What a rank does for a while."""
    start: float                   # seconds from the step's start
    end: float
    what: object                   # an Action, or the name of what follows the pipeline


def step_spans(simulation):
    """list (pp) of lists of Span: a rank's actions, then what it does when its pipeline is done."""
    rows, last = [[] for _ in range(simulation.plan.pp)], max(simulation.ends)
    ends, _ = simulation.played
    for (rank, stages, _, action), end in zip(simulation.timetable.steps, ends):
        rows[rank].append(Span(end - simulation.seconds[stages], end, action))
    for rank, row in enumerate(rows):
        begin = row[-1].end
        reduced = begin + simulation.gradient_seconds(rank)
        row += [Span(begin, reduced, "gradients"), Span(reduced, simulation.ends[rank], "optimizer"),
                Span(last, last * (1 + simulation.straggling), "stragglers")]
    return rows


def write_trace(simulation, path, about):
    """The step as Chrome trace events: a process per pipeline rank, a thread per stream, microseconds. about: a dict
    of what the file says of itself."""
    threads, events = ["schedule", "compute", "inner", "outer", "host"], []
    stream_of = dict(gradients=tier_of(simulation.plan, "dp"), optimizer="compute")        # else schedule

    def add(rank, name, stream, start, end):
        events.append(dict(ph="X", name=name, cat=stream, pid=rank, tid=threads.index(stream), ts=1e6 * start,
                           dur=1e6 * (end - start)))

    for rank, row in enumerate(step_spans(simulation)):
        events.append(dict(ph="M", name="process_name", pid=rank, tid=0, args={"name": f"pipeline rank {rank}"}))
        for number, stream in enumerate(threads):
            events.append(dict(ph="M", name="thread_name", pid=rank, tid=number, args={"name": stream}))
        for start, end, what in row:
            add(rank, str(what), stream_of.get(what, "schedule"), start, end)
            if isinstance(what, Action):
                for task in play_action(*map(simulation.layers_of, what.stages), simulation.manner).tasks:
                    add(rank, task.name, task.stream, start + task.start, start + task.end)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(dict(traceEvents=events, displayTimeUnit="ms", otherData=about), file)


def mark_of(what):
    if isinstance(what, str):
        return what[0].upper()
    forward, backward = what
    if forward and backward:
        return "="
    _, microbatch = forward or backward
    return str(microbatch % 10) if forward else chr(ord("a") + microbatch % 26)


def draw_text(rows, columns=120):
    """Spans as text, a line per rank. What is short is drawn last and at least a column wide, over what is long."""
    scale, lines = columns / max(row[-1].end for row in rows), []
    for row in rows:
        line = [" "] * columns
        for span in sorted(row, key=lambda span: span.start - span.end):
            first = min(columns - 1, round(span.start * scale))
            width = max(1, round(span.end * scale) - first) if span.end > span.start else 0
            line[first:first + width] = mark_of(span.what) * width
        lines.append("".join(line))
    return "\n".join(lines)


COLOURS = dict(F="tab:blue", B="tab:orange", gradients="tab:green", optimizer="tab:red", stragglers="tab:gray")


def draw_png(simulation, path, title):
    """The step as a picture, a row per rank: of a pair the forward above the backward, later chunks darker."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import colors, patches, pyplot
    plan = simulation.plan

    def colour(kind, chunk):
        return colors.to_rgba(COLOURS[kind], 0.4 + 0.6 * (1 + chunk) / plan.vpp)

    bars = []                                              # (middle in ranks, height, start, end, colour)
    for rank, row in enumerate(step_spans(simulation)):
        for start, end, what in row:
            if isinstance(what, str):
                bars.append((rank, 0.8, start, end, COLOURS[what]))
                continue
            height = 0.8 / len(what.parts())
            for i, (kind, stage, _) in enumerate(what.parts()):
                middle = rank - 0.4 + (i + 0.5) * height
                bars.append((middle, height, start, end, colour(kind, stage // plan.pp)))
    figure, axes = pyplot.subplots(figsize=(16, 2 + 0.4 * plan.pp), layout="constrained")
    middle, height, start, end, colours = zip(*bars)
    axes.barh(middle, np.subtract(end, start), height, start, color=colours)
    axes.set(xlabel="seconds, simulated", ylabel="pipeline rank", ylim=(plan.pp - 0.5, -0.5), yticks=range(plan.pp))
    axes.margins(x=0.01)
    axes.set_title(title, fontsize=9)
    shown = [(f"{name}, chunk {chunk}", colour(kind, chunk))
             for kind, name in (("F", "forward"), ("B", "backward")) for chunk in range(plan.vpp)]
    shown += [(name, COLOURS[name]) for name in ("gradients", "optimizer", "stragglers")]
    figure.legend(handles=[patches.Patch(color=shade, label=label) for label, shade in shown],
                  loc="outside lower center", ncols=len(shown))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def peak_words(hardware, precision="bf16"):
    precision = precision if precision in hardware.peak else next(iter(hardware.peak))
    return f"{hardware.peak[precision] / 1e12:.4g} TFLOP/s in {precision} each"


def describe(plan):
    """What of a plan (a dict) is not the default, as --plan takes it."""
    chosen = []
    for one in fields(Plan):
        value = plan[one.name]
        if value != one.default:
            chosen.append(f"{one.name}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}")
    return ",".join(chosen)


def print_setting(model, hardware, devices, batch, seq_len, precision="bf16"):
    print(f"{model} on {devices} {hardware.name}, {peak_words(hardware, precision)}; a step of {batch} sequences of "
          f"{seq_len} tokens; simulated, nothing was run", flush=True)


def print_header(model, hardware, plan, why):
    print_setting(model, hardware, plan.world_size, plan.global_batch, plan.seq_len, plan.precision)
    print(f"plan: {describe(asdict(plan))}\n      ({why})\n")


def about(model, hardware, plan):
    """What a file of ours says of itself."""
    return dict(model=model, hardware=hardware.name, devices=plan.world_size, seq_len=plan.seq_len,
                source="simulated by sim.py, nothing was run")


def choose_plan(text, model, config, hardware, devices):
    """(Plan, where it comes from): --plan's settings, put on the paper's plan where model and hardware are the paper's,
    else on the defaults. Data ranks that are not given are what the devices leave; without --devices a node is filled.
    """
    given = re.findall(r"(\w+)=", text)
    if model == "pangu-ultra-moe-718b" and hardware.name in PAPER_BINS:
        plan = parse_plan(text, **PAPER["optimised"]["plan"], seq_len=PAPER_LENGTH)
        fill, why = devices or PAPER_DEVICES, "the paper's plan"
    else:
        plan = parse_plan(text, node_size=hardware.node_size, seq_len=min(Plan.seq_len, config.max_position_embeddings))
        node = min(8, hardware.node_size) if hardware.inner_bandwidth else 1
        fill, why = devices or node, "the defaults; `plans` searches for the best"
    if text:
        why += ", but for what --plan says"
    replica = plan.world_size // plan.dp
    if "dp" not in given and fill % replica == 0:
        plan = replace(plan, dp=fill // replica)
        why += f"; dp={plan.dp} fills {fill} devices"
    elif "dp" not in given:                                # which --devices would do, if given, says check_plan
        why += f"; {fill} devices are no multiple of pp*cp*tp={replica}"
    enough = plan.at_once * plan.pp                        # any schedule can run these
    if "global_batch" not in given and plan.global_batch < enough:
        plan = replace(plan, global_batch=enough)
        why += f"; global_batch={enough}, enough for any schedule"
    return plan, why


def parse_load(text, config, plan):
    """--load max_vio=X -> X."""
    most = config.n_routed_experts / config.num_experts_per_tok - 1        # every token goes to the busiest rank
    match = re.fullmatch(r"max_vio=(\d+\.?\d*|\.\d+)", text)
    require(match and float(match[1]) <= most,
            f"load={text!r}: write max_vio=X, the busiest rank's load over the mean, minus one: from 0 to {most:g}")
    require(float(match[1]) == 0 or plan.ep > 1, f"load={text!r} is of the ranks that share the experts, and with ep=1 "
                                                 f"each has all: leave it away, or give the plan an ep")
    return float(match[1])


def read_preset(kind, cls, presets, name):
    """A preset, or a JSON file of cls's fields, which may name a preset as `base` to start from."""
    if name in presets:
        return presets[name]
    try:
        with open(name, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise ValueError(f"{kind} {name!r}: {error.strerror}; use a JSON file or one of {', '.join(presets)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error}): mend it") from None
    require(isinstance(values, dict), f"{name}: write a JSON object of fields of {cls.__name__}")
    base = values.pop("base", None)
    require(base is None or base in [*presets], f"{name}: base={base!r}: use one of {', '.join(presets)}")
    known = {field.name for field in fields(cls)}
    if "name" in known:
        values.setdefault("name", Path(name).stem)         # it is another than its base
    for key in values:
        require(key in known, f"{name}: {cls.__name__} has no field {key!r}: use one of {nearest(key, known)}")
    missing = [one.name for one in fields(cls) if one.default is MISSING and one.name not in values]
    require(base or not missing, f"{name} lacks {', '.join(missing)}: add them, or a preset as base")
    try:
        return replace(presets[base], **values) if base else cls(**values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def speak_any_letter():
    """A terminal or a locale may lack some letters of a text or a name: these are printed as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def words_of(error):
    """What to tell of an error, in one line; of one of the operating system's without its number."""
    named = isinstance(error, OSError) and error.filename and error.strerror
    return f"{error.filename}: {error.strerror}" if named else str(error)


def nearest(word, known):
    """The known words most like a mistyped one, for a message; all of them where none is like it."""
    return ", ".join(difflib.get_close_matches(word, known) or sorted(known))


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage, and each command by itself, whose help page it names."""

    def error(self, message):
        raise ValueError(f"{message}: see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1, cutoff=0.7)
            self.error(" ".join([f"{unknown[0]} is no flag here", *(f"(nearest: {word})" for word in near)]))
        return found, unknown


def positive(text):
    if not re.fullmatch(r"\d+", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def parse_arguments(argv):
    parser = Parser(prog="sim.py", description="Simulates training steps; alone, Pangu Ultra MoE beside its paper.")
    commands = parser.add_subparsers(dest="command")
    own = f"{PAPER_DEVICES} for the paper's model on its hardware, else a node"
    for name, about, default_devices in (
            ("predict", "one plan: seconds, tokens/s, memory", own),
            ("plans", "the fastest plans that fit; two minutes on two cores for thousands of devices", "a node"),
            ("trace", "one step as a timeline", own),
            ("shapes", "the fastest shapes of a budget", str(PAPER_DEVICES))):
        command = commands.add_parser(name, help=about, description=about)
        add = command.add_argument
        if name != "shapes":
            add("--model", default="pangu-ultra-moe-718b", help="preset, or JSON file of Config's fields")
        add("--hardware", default="ascend_910b_376", help="preset, or JSON file of Hardware's fields")
        add("--devices", type=positive, help="number of devices; default: " + default_devices)
        if name in ("plans", "shapes"):
            add("--seq-len", type=positive, help="tokens in a sequence; default: 4096, or what the model takes")
            add("--top", type=positive, default=10, help="rows to print")
        if name == "plans":
            add("--global-batch", type=positive, required=True, help="sequences in an optimizer step")
        if name == "shapes":
            add("--budget", default="active=39e9,total=718e9", help="parameters, no embedding, no MTP")
            add("--experts", type=int, default=256, help="routed experts of a layer; 0: any")
        if name in ("predict", "trace"):
            add("--plan", default="", help="key=value,... with lists joined by +, put on the paper's plan for its "
                "model on its hardware, else on defaults that fill the devices")
            add("--load", default="max_vio=0", help="max_vio=X: the busiest rank's load / mean - 1")
        if name == "predict":
            add("--json", action="store_true", help="one JSON object on stdout: s, GiB, bytes")
        if name == "trace":
            add("--out", default="trace.json", help="file for Perfetto or chrome://tracing")
            add("--png", help="draw the pipeline to this file too; needs matplotlib")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.command is None:
        return print_paper()
    hardware = read_preset("hardware", Hardware, HARDWARE, args.hardware)
    if args.command == "shapes":
        budget = parse_budget(args.budget)
        return print_shapes(hardware, args.devices or PAPER_DEVICES, budget, args.seq_len or PAPER_LENGTH, args.top,
                            args.experts)
    config = read_preset("model", Config, PRESETS, args.model)
    if args.command == "plans":
        return run_plans(args, config, hardware)
    plan, why = choose_plan(args.plan, args.model, config, hardware, args.devices)
    check_plan(config, plan, hardware, args.devices)
    max_vio = parse_load(args.load, config, plan)
    if args.command == "trace":
        return run_trace(args, Simulation(config, plan, hardware, max_vio), why)
    result = predict(config, plan, hardware, max_vio)
    if args.json:
        print(json.dumps(about(args.model, hardware, plan) | result))
    else:
        print_header(args.model, hardware, plan, why)
        print_prediction(result)


def run_plans(args, config, hardware):
    devices = args.devices or hardware.node_size
    seq_len = args.seq_len or min(PAPER_LENGTH, config.max_position_embeddings)
    print_setting(args.model, hardware, devices, args.global_batch, seq_len)
    begin = time.monotonic()
    search = search_plans(config, hardware, devices, args.top, global_batch=args.global_batch, seq_len=seq_len)
    ending = "interrupted after" if search.interrupted else "in"
    print(f"{search.priced} plans that fit were priced by a formula, the best {len(search.found)} of them played: a "
          f"search, not a proof; {ending} {time.monotonic() - begin:.0f} s")
    if search.found:
        print(f"GiB of the fullest rank; {ALLOCATOR}\n\n  step s     MFU     GiB  plan")
    for result in search.found[:args.top]:
        print("{step_time_s:8.4g} {mfu:7.1%} {mem_gib:7.1f} ".format(**result), describe(result["plan"]))
    print("\nLeft out, how often and one example each:")
    for times, message in sorted(search.refused.values(), reverse=True):
        print(f"{times:6}  {message}")
    if search.interrupted:
        return 130                                         # as a shell says of what an interrupt ended
    require(search.found, "no plan fits: give more --devices, another --global-batch, or a smaller model")
    return 0


def run_trace(args, simulation, why):
    for path in filter(None, (args.out, args.png)):        # told before anything is written
        require(Path(path).absolute().parent.is_dir(), f"{path}: there is no such folder, make it first")
    if args.png:
        require(args.png.endswith(".png"), f"--png {args.png}: write a name that ends in .png")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ValueError("--png draws with matplotlib: pip install matplotlib, or drop --png") from None
    plan, hardware = simulation.plan, simulation.hardware
    settings = describe(asdict(plan))
    print_header(args.model, hardware, plan, why)
    write_trace(simulation, args.out, about(args.model, hardware, plan) | dict(plan=settings))
    print(draw_text(step_spans(simulation)))
    print("forwards are the last digit of their micro-batch, backwards a letter (a is 0), = a pair of both; "
          "G gradients,\nO optimizer, S stragglers; blank: the rank waits\n\n"
          f"wrote {args.out}, for https://ui.perfetto.dev or chrome://tracing")
    if args.png:
        title = f"{args.model} on {plan.world_size} {hardware.name}, simulated\n{settings}"
        draw_png(simulation, args.png, title)
        print(f"wrote {args.png}")


if __name__ == "__main__":
    speak_any_letter()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)          # nobody reads on, as behind `| head`: end without a word
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"sim.py: {words_of(error)}", file=sys.stderr)
        sys.exit(2)
