"""
Plans, counts, schedules and the clock: what a training step will do, computed without a device.

sim.py plans, parallel.py executes. The schedule that is timed here is the table that parallel.py runs, the bytes counted
here are the bytes it sends, the tensors listed here are those a layer saves; tests compare. Nothing here builds a tensor.

    python sim.py                                     # Pangu Ultra MoE on 6,144 Ascend 910B, the published run beside it
    python sim.py predict --model M --hardware H --devices N --plan tp=8,pp=16,... [--json]
    python sim.py plans   --model M --hardware H --devices N --global-batch B
    python sim.py trace   --out trace.json            # a timeline for Perfetto or chrome://tracing; --png draws the pipeline

In this order: plan and its check, split of layers, bytes of the expert exchange, hardware, counts by operator, cost of
operators and collectives, schedules, the clock, memory, predict, search, the command.

Units: bytes, seconds, FLOPs (a multiply-add is two) and FLOP/s, unless a name says otherwise.
"""
import argparse
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import product, zip_longest
from typing import NamedTuple

from model import PRESETS, Config

# ---------------------------------------------------------------------------------------------------------------------
# Plan: how a model is cut, what is saved, how it is run

RECOMPUTE = ("norm", "mla_up", "act", "permute", "expert", "attention", "layer")
SWAP = ("expert_out", "attn_out", "optimizer")
BYTES_OF = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2, "mxfp8": 2}   # activations; fp8 is for matmuls alone
PLAN_CHOICES = dict(
    sp=(0, 1), zero=(0, 1, 3), schedule=("1f1b", "interleaved", "paired", "zbv", "dualpipev"),
    overlap=("none", "adaptive"), dispatch=("flat", "hierarchical", "dedup"), precision=tuple(BYTES_OF))


@dataclass(frozen=True)
class Plan:
    """How a model is cut over pp*dp*cp*tp devices and run. Checked against a shape by check_plan.

    Dense mesh (pp, dp, cp, tp), tp innermost; expert mesh (pp, edp, ep) over the same ranks, ep contiguous: the experts
    of a layer are spread over the tensor group too, never split by it.
    """
    pp: int = 1                    # pipeline ranks
    dp: int = 1                    # data parallel
    cp: int = 1                    # context (a sequence cut over ranks)
    tp: int = 1                    # tensor
    sp: int = 0                    # 1: norms and residual stream are cut along the sequence over the tensor group
    ep: int = 1                    # ranks that share one set of experts
    etp: int = 1                   # cut of one expert's matrices over ranks; 1, as nothing here executes another
    vpp: int = 1                   # model chunks per pipeline rank
    node_size: int = 8             # devices of a node: the reach of the fast links
    micro_batch: int = 1           # sequences
    global_batch: int = 1          # sequences of one optimizer step
    seq_len: int = 1024            # tokens
    zero: int = 1                  # 0 replicated | 1 gradients and optimizer states cut over data ranks | 3 weights too
    schedule: str = ""             # 1f1b | interleaved | paired | zbv | dualpipev; "": paired if overlap, else by vpp
    overlap: str = "none"          # how a pair of forward and backward runs: none (one by one) | adaptive (interleaved)
    dispatch: str = "flat"         # the experts' exchange: flat | hierarchical | dedup
    recompute: tuple = ()          # any of RECOMPUTE: what the backward pass computes again
    swap: tuple = ()               # any of SWAP: what waits in the host's memory
    layer_split: tuple = ()        # hidden layers of each of the pp*vpp stages; (): evenly by cost
    precision: str = "bf16"
    balance_live: int = 0          # steps between decisions on expert placement; 0: fixed experts
    balance_threshold: float = 0.08   # migrate if the deviation of device loads falls by this share of their mean
    balance_replicas: int = 0      # extra copies of hot experts per rank

    def __post_init__(self):
        for name in ("recompute", "swap", "layer_split"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.schedule:
            plain = "1f1b" if self.vpp == 1 else "interleaved"
            object.__setattr__(self, "schedule", "paired" if self.overlap == "adaptive" else plain)

    @property
    def world_size(self):
        return self.pp * self.dp * self.cp * self.tp

    @property
    def n_stages(self):
        return self.pp * self.vpp

    @property
    def n_micro(self):
        """Micro-batches of one step on each replica."""
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def inner(self):
        """Ranks of an expert group inside one node; ep // inner is the size of the outer group."""
        return min(self.ep, self.node_size)

    @property
    def edp(self):
        """Ranks that hold the same experts."""
        return self.dp * self.cp * self.tp // self.ep

    @property
    def tokens(self):
        """Tokens of one micro-batch that a rank dispatches to experts."""
        return self.micro_batch * self.seq_len // (self.cp * (self.tp if self.sp else 1))

    def stages_of(self, rank):
        """Stages that a pipeline rank holds: V-shaped for zbv and dualpipev, else round robin."""
        if self.schedule in ("zbv", "dualpipev"):
            return [rank, 2 * self.pp - 1 - rank]
        return [chunk * self.pp + rank for chunk in range(self.vpp)]


def parse_plan(text, **defaults):
    """Plan from `tp=8,pp=16,recompute=act+permute,layer_split=2+2+1`: tuples are joined by +. ValueError for what it cannot read."""
    known = {field.name: field.type for field in fields(Plan)}
    values = dict(defaults)
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in known:
            raise ValueError(f"unknown plan key {name!r}: use one of {', '.join(known)}")
        parts = [int(part) if part.isdigit() else part for part in value.split("+") if part]
        try:
            values[name] = tuple(parts) if known[name] is tuple else known[name](value)
        except ValueError:
            raise ValueError(f"{name}={value!r}: write a {known[name].__name__}") from None
    return Plan(**values)


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def check_plan(config, plan, hardware=None, devices=None):
    """ValueError, in one line with the numbers and what would fit, for a plan that cannot run this shape here."""
    def require(ok, message):
        if not ok:
            raise ValueError(message)

    def divides(name, total, what, limit=8):
        value = getattr(plan, name)
        require(total % value == 0, f"{name}={value} does not divide {what}={total}: use one of {divisors(total)[:limit]}")

    # 1. each field alone
    for name, allowed in PLAN_CHOICES.items():
        require(getattr(plan, name) in allowed, f"{name}={getattr(plan, name)!r}: use one of {', '.join(map(str, allowed))}")
    for name, allowed in (("recompute", RECOMPUTE), ("swap", SWAP)):
        unknown = set(getattr(plan, name)) - set(allowed)
        require(not unknown, f"{name}={'+'.join(sorted(unknown))}: use any of {', '.join(allowed)}")
    for name in ("pp", "dp", "cp", "tp", "ep", "vpp", "node_size", "micro_batch", "global_batch", "seq_len"):
        require(getattr(plan, name) >= 1, f"{name}={getattr(plan, name)}: must be at least 1")
    require(plan.etp == 1, f"etp={plan.etp}: experts are not cut, use etp=1 and a larger ep")

    # 2. against the model
    c, moe = config, has_experts(config)
    divides("tp", c.num_attention_heads, "num_attention_heads")
    divides("tp", c.intermediate_size, "intermediate_size")
    divides("tp", c.vocab_size, "vocab_size")
    if moe:
        divides("tp", c.n_shared_experts * c.moe_intermediate_size, "width of the shared experts")
        divides("ep", c.n_routed_experts, "n_routed_experts", limit=32)
    require(moe or plan.ep == 1, f"ep={plan.ep} for a model without experts: use ep=1")
    require(not moe or plan.tp == 1 or plan.sp, f"tp={plan.tp} with sp=0 would send each token to the experts {plan.tp} "
                                                f"times: use sp=1")
    require(plan.seq_len <= c.max_position_embeddings,
            f"seq_len={plan.seq_len} above max_position_embeddings={c.max_position_embeddings}: use at most that")
    cut = plan.cp * 2 if plan.cp > 1 else 1               # two slices a rank, so that causal work is even
    cut = math.lcm(cut, plan.cp * plan.tp) if plan.sp else cut
    require(plan.seq_len % cut == 0, f"seq_len={plan.seq_len} is not a multiple of {cut}, which cp={plan.cp} tp={plan.tp} "
                                     f"sp={plan.sp} need: use {plan.seq_len // cut * cut or cut}")
    check_split(config, plan, require)
    check_balance_group(config, plan, require)

    # 3. against the grid
    group = plan.dp * plan.cp * plan.tp
    require(group % plan.ep == 0, f"ep={plan.ep} does not divide dp*cp*tp={group}: use one of {divisors(group)}")
    require(plan.ep % plan.node_size == 0 or plan.node_size % plan.ep == 0,
            f"node_size={plan.node_size} and ep={plan.ep}: one must divide the other, use ep of {divisors(plan.node_size)} "
            f"or a multiple of {plan.node_size}")
    if devices is not None:
        rest = plan.pp * plan.cp * plan.tp
        fit = f"use dp={devices // rest}" if devices % rest == 0 else f"use pp*cp*tp among {divisors(devices)}"
        require(plan.world_size == devices, f"pp*dp*cp*tp={plan.pp}*{plan.dp}*{plan.cp}*{plan.tp}={plan.world_size} for "
                                            f"{devices} devices: {fit}")
    if hardware is not None:
        require(plan.node_size <= hardware.node_size, f"node_size={plan.node_size}: {hardware.name} has nodes of "
                                                      f"{hardware.node_size}, use at most that")

    # 4. batch and schedule
    once = plan.dp * plan.micro_batch
    require(plan.global_batch % once == 0, f"global_batch={plan.global_batch} is not a multiple of dp*micro_batch={once}: "
                                           f"use {max(1, plan.global_batch // once) * once}")
    check_schedule_fits(plan, require)


def check_split(config, plan, require):
    split, layers, stages = plan.layer_split, config.num_hidden_layers, plan.n_stages
    most = layers + 2                                      # a stage may hold the embedding alone, or MTP and head alone
    require(stages <= most, f"pp*vpp={stages} stages for {layers} layers with embedding and head: use at most {most}")
    if split:
        require(len(split) == stages and sum(split) == layers,
                f"layer_split has {len(split)} stages with {sum(split)} layers: needs pp*vpp={stages} with {layers}")
        require(all(n >= 0 for n in split) and 0 not in split[1:-1],
                f"layer_split={'+'.join(map(str, split))}: a stage between the first and the last needs at least one layer")


def check_schedule_fits(plan, require):
    n, pp, name = plan.n_micro, plan.pp, plan.schedule
    need = {"1f1b": 1, "zbv": 2, "dualpipev": 2}.get(name, plan.vpp)
    require(plan.vpp == need, f"schedule={name} needs vpp={need}, not vpp={plan.vpp}: use vpp={need} or interleaved")
    require(plan.overlap == "none" or name in ("paired", "dualpipev"),
            f"overlap=adaptive interleaves pairs of forward and backward, schedule={name} has none: use paired or dualpipev")
    least = {"1f1b": pp, "dualpipev": 2 * pp}.get(name, 1)
    require(n >= least, f"schedule={name} with pp={pp} needs {least} micro-batches, the plan has {n}: use global_batch="
                        f"{least * plan.dp * plan.micro_batch}")
    if name in ("interleaved", "paired"):
        rounds = max(1, n // pp)
        require(n % rounds == 0, f"schedule={name} runs {n} micro-batches in {rounds} equal rounds of about pp={pp}: use "
                                 f"global_batch={n // pp * pp * plan.dp * plan.micro_batch}")


def balance_group(config, plan):
    """Sequences in one group of the balance loss: Config.balance_group, or what `balance` means under this plan."""
    if config.balance_group:
        return config.balance_group
    replicas = max(1, plan.ep // (plan.cp * plan.tp))      # data ranks inside one expert group
    per_level = dict(none=1, sequence=1, micro_batch=plan.micro_batch, ep_group=plan.micro_batch * replicas,
                     dp_group=plan.micro_batch * plan.dp)
    return per_level[config.balance]


def check_balance_group(config, plan, require):
    size, own, shared = balance_group(config, plan), plan.micro_batch, plan.micro_batch * plan.dp
    require(shared % size == 0 and (own % size == 0 or size % own == 0),
            f"balance_group={size} sequences does not divide micro_batch*dp={own}*{plan.dp} into whole micro-batches: "
            f"use one of {sorted(set(divisors(own)) | {own * d for d in divisors(plan.dp)})[:12]}")


def has_experts(config):
    return config.num_hidden_layers > config.first_k_dense_replace or config.num_nextn_predict_layers > 0


# ---------------------------------------------------------------------------------------------------------------------
# Bytes of the expert exchange

INDEX_BYTES = 8                    # expert numbers and split sizes travel as int64


def exchange_bytes(config, plan, ids=None):
    """Bytes sent by each rank of one expert group for one MoE layer and one micro-batch, own rank excluded.

    Returns {"forward" | "backward": {"inner" | "outer": [one per rank]}}: inner within a node, outer between nodes,
    dispatch and combine together. ids (ep, N, K): the experts chosen on each rank; None: what uniform routing expects.

    What travels. row: C values; weight: one value in the rows' dtype; expert numbers and counts: int64.

    | dispatch     | forward                                                   | backward                               |
    |--------------|-----------------------------------------------------------|----------------------------------------|
    | flat         | counts of the receiver's experts; row and weight of each  | rows out; rows and weight gradients    |
    |              | copy out; rows back                                       | back                                   |
    | hierarchical | outer: all-gather of rows, K weights, K expert numbers;   | outer: all-gather of rows; reduce-     |
    |              | reduce-scatter of rows back                               | scatter of rows and of K weights       |
    |              | inner: as flat, with the copies for experts of this node  | inner: as flat                         |
    | dedup        | outer: one count for each peer; row, K weights, K expert  | outer: rows out; rows and K weight     |
    |              | numbers of each token that needs the peer's node; rows    | gradients back                         |
    |              | back. inner: as flat                                      | inner: as flat                         |
    """
    ranks = range(plan.ep)
    rows = _copies(config, plan, ids)                      # rows[source][destination]: copies on the last hop
    tokens = _crossings(config, plan, ids)                 # tokens[source][node]: tokens that cross to another node
    e, k = BYTES_OF[plan.precision], config.num_experts_per_tok
    row, count = e * config.hidden_size, INDEX_BYTES * config.n_routed_experts // plan.ep
    out = {way: {tier: [0] * plan.ep for tier in ("inner", "outer")} for way in ("forward", "backward")}

    def add(rank, tier, forward, backward):
        out["forward"][tier][rank] += forward
        out["backward"][tier][rank] += backward

    for source in ranks:
        for other in ranks:
            if source == other:
                continue
            tier = "inner" if source // plan.inner == other // plan.inner else "outer"
            if tier == "outer" and plan.dispatch != "flat":
                continue
            # `source` sends its copies to `other` and returns the results of those that `other` sent
            there, back = rows[source][other], rows[other][source]
            add(source, tier, count + there * (row + e) + back * row, there * row + back * (row + e))
        if plan.dispatch != "flat":
            _add_outer_hop(plan, source, tokens, row, k * e, k * INDEX_BYTES, add)
    return out


def _add_outer_hop(plan, source, tokens, row, weights, numbers, add):
    """The hop between ranks of equal local index: `source` sends tokens to each other node, and partial sums back."""
    own = source // plan.inner
    for node in range(plan.ep // plan.inner):
        if node == own:
            continue
        peer = node * plan.inner + source % plan.inner
        there, back = tokens[source][node], tokens[peer][own]
        count = INDEX_BYTES if plan.dispatch == "dedup" else 0
        add(source, "outer", count + there * (row + weights + numbers) + back * row, there * row + back * (row + weights))


def _copies(config, plan, ids):
    """copies[source][destination] on the hop that sorts by expert; after an outer hop the source is the forwarding rank."""
    n_ranks, inner, k = plan.ep, plan.inner, config.num_experts_per_tok
    if ids is None:
        # Flat: K copies of N tokens over all ranks. Two hops: the copies for this node, of the tokens of all nodes.
        share = plan.tokens * k / (n_ranks if plan.dispatch == "flat" else inner)
        return [[share] * n_ranks for _ in range(n_ranks)]
    per_rank = config.n_routed_experts // n_ranks
    copies = [[0] * n_ranks for _ in range(n_ranks)]
    for source in range(n_ranks):
        for token in ids[source]:
            for expert in token:
                destination = int(expert) // per_rank
                via = source if plan.dispatch == "flat" else destination // inner * inner + source % inner
                copies[via][destination] += 1
    return copies


def _crossings(config, plan, ids):
    """crossings[source][node]: tokens of `source` that travel to `node` on the outer hop; all of them, or those needed."""
    nodes, experts = plan.ep // plan.inner, config.n_routed_experts
    if plan.dispatch != "dedup":
        n = plan.tokens if ids is None else len(ids[0])
        return [[n] * nodes for _ in range(plan.ep)]
    if ids is None:
        elsewhere = math.comb(experts - experts // nodes, config.num_experts_per_tok)
        share = 1 - elsewhere / math.comb(experts, config.num_experts_per_tok)
        return [[plan.tokens * share] * nodes for _ in range(plan.ep)]
    needed = [[{int(expert) * nodes // experts for expert in token} for token in ids[source]] for source in range(plan.ep)]
    return [[sum(node in wanted for wanted in needed[source]) for node in range(nodes)] for source in range(plan.ep)]


# ---------------------------------------------------------------------------------------------------------------------
# Shape: what is counted


@dataclass(frozen=True)
class Shape(Config):
    """A Config, or a model that no Config describes: plain multi-head or grouped-query attention, ungated MLP, no experts."""
    attn_type: str = "mla"                 # mla | gqa | mha
    num_key_value_heads: int = 0           # gqa: heads of keys and values
    head_dim: int = 0                      # gqa, mha
    gated_mlp: bool = True                 # three matrices (SwiGLU), or two
    attn_kernel: str = "flash"             # flash | unfused: the whole square of scores, kept for backward
    value_padded: bool = False             # the attention kernel wants values as wide as keys

    def __post_init__(self):               # not Config's checks, which are of models that model.py builds
        pass


def as_shape(config):
    """Shape of a Config; a Shape as it is."""
    if isinstance(config, Shape):
        return config
    values = {field.name: getattr(config, field.name) for field in fields(Config)}
    return Shape(**{**values, "rope_scaling": None})       # of no account here, and a dict cannot be hashed


# ---------------------------------------------------------------------------------------------------------------------
# Layers to stages


def stage_layers(config, plan):
    """list (pp*vpp) of lists of layer numbers. The embedding is on the first stage, head and MTP layers on the last."""
    split, layers, first = plan.layer_split, [], 0
    for n in split or _even_split(as_shape(config), plan.n_stages, plan.seq_len):
        layers.append(list(range(first, first + n)))
        first += n
    layers[-1] += range(first, first + config.num_nextn_predict_layers)
    return layers


@lru_cache(maxsize=None)
def _even_split(shape, n_stages, seq_len):
    """Hidden layers per stage. Each stage in turn takes an even share of the FLOPs that are left, the head counted last.

    A rule of shape and sequence alone, so that every device and rank cuts alike. Only the last stage may get no layer.
    """
    plan = Plan(seq_len=seq_len)
    cost = [sum(op.flops for op in layer_work(shape, plan, layer_kind(shape, i)).ops) for i in range(shape.num_hidden_layers)]
    tail = sum(op.flops for op in head_work(shape, plan).ops)
    if shape.num_nextn_predict_layers:
        tail += shape.num_nextn_predict_layers * sum(op.flops for op in layer_work(shape, plan, "mtp").ops)
    split, first = [], 0
    for stages_left in range(n_stages, 1, -1):
        share = (sum(cost[first:]) + tail) / stages_left
        last = len(cost) - (stages_left - 2)               # a layer is left for each stage but the last
        end = first + 1
        while end < last and sum(cost[first:end]) + cost[end] / 2 <= share:
            end += 1
        split.append(end - first)
        first = end
    return tuple(split) + (len(cost) - first,)


def layer_kind(shape, index):
    """dense, moe or mtp: layers of one kind are all alike."""
    if index >= shape.num_hidden_layers:
        return "mtp"
    return "dense" if index < shape.first_k_dense_replace else "moe"


# ---------------------------------------------------------------------------------------------------------------------
# Counts: operators, parameters, saved tensors of one layer and one micro-batch on one rank


class Op(NamedTuple):
    """One operator. part: which of the block's calls it belongs to (attend, shared, experts, combine)."""
    part: str
    name: str
    kind: str                      # matmul | grouped | attention | vector
    flops: float                   # forward; a matmul's two backward halves have as many each, attention's two together double
    moved: float                   # bytes read and written, forward


class Work:
    """What a layer, the embedding or the head is for one rank: operators, saved tensors, parameters, collectives."""

    def __init__(self, shape, plan):
        self.shape, self.plan = shape, plan
        self.ops = []
        self.saved = {}            # bytes that one micro-batch keeps for its backward, by tensor
        self.params = {"dense": 0, "expert": 0}            # held by this rank; copies of the first are on dp*cp ranks
        self.group_bytes = {}      # (axis, part) -> bytes sent in the tensor or context group, forward

    def matmul(self, part, name, m, k, n, experts=0):
        """(m, k) by (k, n); experts: m rows in all over so many matrices."""
        e, matrices = BYTES_OF[self.plan.precision], max(1, experts)
        moved = e * (m * k + matrices * k * n + m * n)
        self.ops.append(Op(part, name, "grouped" if experts else "matmul", 2 * m * k * n, moved))
        self.params["expert" if experts else "dense"] += matrices * k * n

    def vector(self, part, name, moved):
        self.ops.append(Op(part, name, "vector", 0, moved))

    def norm(self, part, name, tokens, width, residual=False):
        """residual: with the addition to the residual stream, which reads it and writes it again."""
        e = BYTES_OF[self.plan.precision]
        self.vector(part, name, (5 if residual else 2) * tokens * width * e)
        self.params["dense"] += width
        self.saved[name] = tokens * width * e              # its input ...
        self.saved[name + ".scale"] = tokens * max(e, 4)   # ... and 1 / rms of each token

    def gather(self, axis, part, tokens, width):
        """All-gather, or reduce-scatter, of `tokens` local tokens over a group; an all-reduce is one of each."""
        n = getattr(self.plan, axis)
        if n > 1:
            sent = (n - 1) * tokens * width * BYTES_OF[self.plan.precision]
            self.group_bytes[axis, part] = self.group_bytes.get((axis, part), 0) + sent


def local_tokens(plan):
    """Tokens of a micro-batch on one rank: (on the residual stream, in the tensor group's matmuls)."""
    gathered = plan.micro_batch * plan.seq_len // plan.cp
    return plan.tokens, gathered


@lru_cache(maxsize=4096)
def layer_work(shape, plan, kind):
    """Work of a layer: dense, moe, or mtp, a moe layer with what joins it to the embedding."""
    work = Work(shape, plan)
    own, _ = local_tokens(plan)
    _mla(work) if shape.attn_type == "mla" else _plain_attention(work)
    if shape.norm != "pre":
        work.norm("attend", "post_attention_layernorm", own, shape.hidden_size, residual=True)
    work.norm("attend", "pre_mlp_layernorm", own, shape.hidden_size)
    _dense(work) if kind == "dense" else _moe(work)
    if shape.norm != "pre":
        work.norm("combine", "post_mlp_layernorm", own, shape.hidden_size, residual=True)
    if kind == "mtp":
        _mtp_join(work)
    return work


def _mla(work):
    """Latents are made from a rank's own tokens by whole matrices, then gathered; heads are cut over the tensor group."""
    c, plan, e = work.shape, work.plan, BYTES_OF[work.plan.precision]
    own, tokens = local_tokens(plan)
    width, heads, qk = c.hidden_size, c.num_attention_heads // plan.tp, c.qk_nope_head_dim + c.qk_rope_head_dim
    latent = c.kv_lora_rank + c.qk_rope_head_dim
    work.norm("attend", "input_layernorm", own, width)
    work.saved["attn_in"] = own * width * e
    work.matmul("attend", "q_a_proj", own, width, c.q_lora_rank)
    work.norm("attend", "q_a_layernorm", own, c.q_lora_rank)
    work.matmul("attend", "q_b_proj", tokens, c.q_lora_rank, heads * qk)
    work.matmul("attend", "kv_a_proj_with_mqa", own, width, latent)
    work.norm("attend", "kv_a_layernorm", own, c.kv_lora_rank)
    work.saved["kv_a_layernorm"] = own * latent * e        # a slice of a wider tensor keeps all of it
    work.matmul("attend", "kv_b_proj", tokens, c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
    work.saved["q_latent"], work.saved["kv_latent"] = tokens * c.q_lora_rank * e, tokens * c.kv_lora_rank * e
    if plan.sp:
        work.gather("tp", "attend", own, c.q_lora_rank + latent)
    work.gather("cp", "attend", tokens, latent)
    work.vector("attend", "rope", 2 * 2 * tokens * heads * qk * e)         # q and k, each read and written
    _core_attention(work, heads, heads, qk, c.v_head_dim)


def _plain_attention(work):
    c, plan, e = work.shape, work.plan, BYTES_OF[work.plan.precision]
    own, tokens = local_tokens(plan)
    heads, kv_heads = c.num_attention_heads // plan.tp, max(1, (c.num_key_value_heads or c.num_attention_heads) // plan.tp)
    work.norm("attend", "input_layernorm", own, c.hidden_size)
    work.saved["attn_in"] = tokens * c.hidden_size * e
    work.gather("tp", "attend", own if plan.sp else tokens / plan.tp, c.hidden_size)
    work.matmul("attend", "qkv_proj", tokens, c.hidden_size, (heads + 2 * kv_heads) * c.head_dim)
    work.gather("cp", "attend", tokens, 2 * kv_heads * c.head_dim)
    work.vector("attend", "rope", 2 * tokens * (heads + kv_heads) * c.head_dim * e)
    _core_attention(work, heads, kv_heads, c.head_dim, c.head_dim)


def _core_attention(work, heads, kv_heads, qk, v):
    """Scores, softmax, values and the output projection."""
    c, plan, e = work.shape, work.plan, BYTES_OF[work.plan.precision]
    own, tokens = local_tokens(plan)
    keys = tokens * plan.cp                                # of all ranks of the context group
    scores = tokens * plan.seq_len * heads
    padded = qk if c.value_padded else v                   # some kernels want values as wide as keys
    square = 1 if c.attn_kernel == "unfused" else 2        # a flash kernel leaves out the upper half
    moved = e * (tokens * heads * (qk + v) + keys * kv_heads * (qk + v))
    work.saved.update(q=tokens * heads * qk * e, k=keys * kv_heads * qk * e, v=keys * kv_heads * padded * e)
    if c.attn_kernel == "unfused":
        moved += 4 * scores * e
        work.saved["probabilities"] = 2 * scores * e       # before and after the cast
    else:
        work.saved["log_sum"] = tokens * heads * max(e, 4)
    if padded != v:
        work.saved["attn_padded"] = tokens * heads * padded * e
    work.ops.append(Op("attend", "attention", "attention", 2 * scores * (qk + v) / square, moved))
    work.saved["attn_out"] = tokens * heads * v * e
    work.matmul("attend", "o_proj", tokens, heads * v, c.hidden_size)
    work.gather("tp", "attend", own if plan.sp else 2 * tokens / plan.tp, c.hidden_size)


def _mlp(work, part, name, inner):
    """SwiGLU, cut over the tensor group by its inner width. The two input matrices count as one matmul."""
    c, plan, e = work.shape, work.plan, BYTES_OF[work.plan.precision]
    own, tokens = local_tokens(plan)
    inner, into = inner // plan.tp, 2 if c.gated_mlp else 1
    work.gather("tp", part, own if plan.sp else tokens / plan.tp, c.hidden_size)
    work.matmul(part, name + ".gate_up", tokens, c.hidden_size, into * inner)
    work.vector(part, name + ".act", (into + 1) * tokens * inner * e)
    work.matmul(part, name + ".down", tokens, inner, c.hidden_size)
    work.gather("tp", part, own if plan.sp else tokens / plan.tp, c.hidden_size)
    work.saved["mlp_in"] = tokens * c.hidden_size * e
    work.saved[name + "_gate_up"], work.saved[name + "_hidden"] = into * tokens * inner * e, tokens * inner * e


def _dense(work):
    _mlp(work, "experts", "mlp", work.shape.intermediate_size)


def _moe(work):
    """Router, permutation, shared and routed experts; rows that a rank computes: on average those that it sends."""
    c, plan, e = work.shape, work.plan, BYTES_OF[work.plan.precision]
    wide = max(e, 4)                                       # router and losses compute in float32 or better
    own, k, width, inner = plan.tokens, c.num_experts_per_tok, c.hidden_size, c.moe_intermediate_size
    rows = math.ceil(own * k * (c.capacity_factor or 1))
    work.saved["mlp_in"] = own * width * e
    if e < wide:
        work.saved["router_in"] = own * width * wide
    work.matmul("attend", "router", own, width, c.n_routed_experts)
    work.vector("attend", "choose", 6 * own * c.n_routed_experts * wide)
    work.saved["scores"] = own * c.n_routed_experts * wide
    work.saved["ids"] = own * k * 8
    if c.norm_topk_prob:
        work.saved["weights"], work.saved["weights.sum"] = own * k * wide, own * wide
    if c.balance != "none" and c.aux_loss_alpha:
        groups = _groups_in_micro_batch(c, plan)
        work.saved["balance"] = groups * c.n_routed_experts * wide         # f of each group
        work.saved["balance.sum"] = own * wide if c.aux_scores == "normalized" else 0
    work.vector("attend", "permute", (own + rows) * width * e)
    work.saved["slot"], work.saved["rows"] = own * k * 8, rows * width * e
    if c.n_shared_experts:
        _mlp(work, "shared", "shared", c.n_shared_experts * inner)
    experts = c.n_routed_experts // plan.ep
    into = 2 if c.gated_mlp else 1
    work.matmul("experts", "expert.gate_up", rows, width, into * inner, experts)
    work.vector("experts", "expert.act", (into + 1) * rows * inner * e)
    work.matmul("experts", "expert.down", rows, inner, width, experts)
    work.saved.update(counts=experts * 8, expert_gate_up=into * rows * inner * e, expert_hidden=rows * inner * e,
                      row_weights=(rows + (e == wide)) * e)                # a cast drops the spare last element
    if c.expert_weight == "after_down":
        work.saved["expert_out"] = rows * width * e
        work.vector("experts", "expert.weight", 2 * rows * width * e)
    work.vector("combine", "unpermute", (rows + 2 * own) * width * e)


def _groups_in_micro_batch(c, plan):
    if c.balance == "sequence":
        return plan.micro_batch
    held = plan.micro_batch if c.balance == "micro_batch" else min(c.balance_group or plan.micro_batch, plan.micro_batch)
    return plan.micro_batch // held


def _mtp_join(work):
    c, own = work.shape, work.plan.tokens
    for name in ("enorm", "hnorm", "shared_head.norm"):
        work.norm("attend", name, own, c.hidden_size)
    work.matmul("attend", "eh_proj", own, 2 * c.hidden_size, c.hidden_size)
    work.saved["eh_in"] = 2 * own * c.hidden_size * BYTES_OF[work.plan.precision]


@lru_cache(maxsize=4096)
def head_work(shape, plan):
    """Last norm, head and loss of all depths, the vocabulary cut over the tensor group."""
    work, c, e = Work(shape, plan), shape, BYTES_OF[plan.precision]
    own, tokens = local_tokens(plan)
    vocab, depths = c.vocab_size // plan.tp, 1 + c.num_nextn_predict_layers
    work.norm("attend", "norm", own, c.hidden_size)
    for depth in range(depths):
        work.gather("tp", "attend", 2 * own if plan.sp else 2 * tokens / plan.tp, c.hidden_size)
        work.matmul("attend", f"lm_head.{depth}", tokens, c.hidden_size, vocab)
        work.vector("attend", f"loss.{depth}", 4 * tokens * vocab * 4)
        # the loss makes its gradients in forward: of its input, and of the head's weight, in float32 or better
        work.saved[f"grad_h.{depth}"] = tokens * c.hidden_size * e
        work.saved[f"grad_w.{depth}"] = vocab * c.hidden_size * max(e, 4)
    held = 0 if c.tie_word_embeddings and plan.pp == 1 else 1
    work.params["dense"] = vocab * c.hidden_size * held + c.hidden_size
    return work


@lru_cache(maxsize=4096)
def embedding_work(shape, plan):
    work = Work(shape, plan)
    work.vector("attend", "embed_tokens", 2 * plan.tokens * shape.hidden_size * BYTES_OF[plan.precision])
    work.params["dense"] = shape.vocab_size // plan.tp * shape.hidden_size
    work.saved["token_ids"] = plan.micro_batch * plan.seq_len // plan.cp * 8
    return work


# ---------------------------------------------------------------------------------------------------------------------
# Hardware


@dataclass(frozen=True)
class Hardware:
    """One device, its node and its network. Bandwidths are of one direction and one device.

    Sources. Ascend 910B: Ascend/msmodeling, tensor_cast/device.py (device profiles; its efficiencies and static costs are
    marked there as not calibrated); node and RoCE: arXiv:2504.07866, section 5. H200: NVIDIA data sheet, 400 Gb/s of network
    a GPU as usual for the generation; its efficiencies and static costs are assumed like the 910B's, not measured.
    Assumed everywhere: bytes of the framework's own, and the host link (PCIe 4.0 x16: 32 GB/s, 5.0 x16: 64 GB/s nominal).
    """
    name: str
    peak: dict                             # precision -> FLOP/s of the matrix units
    memory: float                          # bytes
    bandwidth: float                       # bytes/s of device memory
    node_size: int = 8                     # devices joined by the fast links
    topology: str = "switch"               # of a node: switch | mesh (each pair its own link, n ranks use n-1 of a device's)
    inner_bandwidth: float = 0.0           # bytes/s, all links of a device inside the node together
    inner_latency: float = 0.5e-6
    outer_bandwidth: float = 0.0           # bytes/s between nodes
    outer_latency: float = 1.5e-6
    host_bandwidth: float = 32e9           # bytes/s to the host's memory
    framework: float = 3 * 2**30           # bytes that runtime, allocator and libraries keep
    matmul_efficiency: float = 0.7
    memory_efficiency: float = 0.6
    link_efficiency: float = 0.7
    static_matmul: float = 5e-6            # seconds of every matmul kernel, whatever its size
    static_vector: float = 2e-6
    static_collective: float = 10e-6
    value_padded: bool = False             # its attention kernel wants values as wide as keys


def _ascend_910b(name, peak_bf16):
    """Cube cores x 8192 FLOP/cycle x clock: the bins differ in these alone. Full mesh of 8: 7 links of 28 GB/s."""
    return Hardware(name, {"bf16": peak_bf16, "fp16": peak_bf16, "fp32": peak_bf16 * 0.281}, 64 * 2**30, 1638.4 * 2**30,
                    topology="mesh", inner_bandwidth=196e9, outer_bandwidth=25e9)


HARDWARE = {hardware.name: hardware for hardware in (
    _ascend_910b("ascend_910b_376", 353.8944e12),
    _ascend_910b("ascend_910b_313", 294.912e12),
    _ascend_910b("ascend_910b_280", 245.76e12),
    Hardware("h200_sxm", {"bf16": 989.5e12, "fp16": 989.5e12, "fp8": 1979e12}, 141e9, 4800e9, inner_bandwidth=450e9,
             outer_bandwidth=50e9, host_bandwidth=64e9),
)}


def load_hardware(name):
    """A preset, or a JSON file of the same fields, which may name a preset as `base`."""
    if name in HARDWARE:
        return HARDWARE[name]
    try:
        with open(name) as file:
            values = json.load(file)
    except OSError:
        raise ValueError(f"hardware {name!r}: use a JSON file or one of {', '.join(HARDWARE)}") from None
    unknown = set(values) - {field.name for field in fields(Hardware)} - {"base"}
    if unknown:
        raise ValueError(f"{name} has unknown fields {sorted(unknown)}: see sim.Hardware")
    base = HARDWARE.get(values.pop("base", None))
    return replace(base, **values) if base else Hardware(**values)


def tier_of(plan, axis):
    """inner if a whole group of the axis lies inside one node, else outer; for pp: if the next stage's rank does."""
    tp, cp, dp = plan.tp, plan.cp, plan.dp
    reach = dict(tp=tp, cp=cp * tp, dp=dp * cp * tp, edp=dp * cp * tp, pp=2 * dp * cp * tp)[axis]
    return "inner" if reach <= plan.node_size else "outer"


def collective_seconds(hardware, tier, ranks, sent):
    """Seconds of a collective in which each rank sends `sent` bytes, ring or direct (formulas of msmodeling).

    On a mesh, n ranks of a node use n-1 of a device's links.
    """
    if ranks == 1 or sent == 0:
        return 0.0
    inner = tier == "inner"
    bandwidth = (hardware.inner_bandwidth if inner else hardware.outer_bandwidth) * hardware.link_efficiency
    if inner and hardware.topology == "mesh":
        bandwidth *= (min(ranks, hardware.node_size) - 1) / (hardware.node_size - 1)
    latency = hardware.inner_latency if inner else hardware.outer_latency
    return hardware.static_collective + min(ranks - 1, math.log2(ranks)) * latency + sent / bandwidth


def op_seconds(op, plan, hardware):
    """Seconds of (forward, backward for inputs, backward for weights): the slower of arithmetic and memory, and a start.

    Attention's backward computes the scores again: five matmuls against two. A vector operator's reads the gradient too.
    """
    busy = op.flops / (hardware.peak[plan.precision] * hardware.matmul_efficiency)
    moving = op.moved / (hardware.bandwidth * hardware.memory_efficiency)
    start = hardware.static_vector if op.kind == "vector" else hardware.static_matmul
    forward = max(busy, moving) + start
    if op.kind in ("matmul", "grouped"):
        return forward, forward, forward
    return forward, (2.5 if op.kind == "attention" else 1.5) * max(busy, moving) + start, 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Recompute and swap

# item -> (saved tensors that go, operators that run again). `layer` keeps the layer's input alone and runs all again.
_ATTENTION = ("input_layernorm", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj",
              "rope", "attention", "qkv_proj")
_CORE = ("q", "k", "v", "log_sum", "attn_padded", "probabilities")
RECOMPUTES = {
    "norm": (("attn_in", "mlp_in", "q_latent", "kv_latent"),
             ("input_layernorm", "pre_mlp_layernorm", "q_a_layernorm", "kv_a_layernorm")),
    "mla_up": (("q", "k", "v"), ("q_b_proj", "kv_b_proj", "rope")),
    "act": (("mlp_hidden", "shared_hidden", "expert_hidden"), ("mlp.act", "shared.act", "expert.act")),
    "permute": (("rows",), ("permute",)),
    "expert": (("expert_gate_up", "expert_hidden"), ("expert.gate_up", "expert.act")),
    "attention": (_CORE + ("attn_in", "q_latent", "kv_latent", "attn_out", "q_a_layernorm", "kv_a_layernorm"), _ATTENTION),
    "layer": (None, None),
}
SWAPPED = {"expert_out": ("expert_out",), "attn_out": ("attn_out", "attn_padded"), "optimizer": ()}


def saved_bytes(work):
    """(bytes that a layer keeps on the device for its backward, bytes that it swaps to the host) for one micro-batch."""
    plan = work.plan
    gone = {name for item in plan.recompute if item != "layer" for name in RECOMPUTES[item][0]}
    if "layer" in plan.recompute and "input_layernorm" in work.saved:
        gone = set(work.saved) - {"input_layernorm"}       # which is the layer's input
    away = {name for item in plan.swap for name in SWAPPED[item]} - gone
    kept = sum(size for name, size in work.saved.items() if name not in gone | away)
    return kept, sum(work.saved.get(name, 0) for name in away)


def replayed(work):
    """Operators of a layer that its backward runs again."""
    if "layer" in work.plan.recompute:
        return [op for op in work.ops if "input_layernorm" in work.saved]
    names = {name for item in work.plan.recompute for name in RECOMPUTES[item][1]}
    return [op for op in work.ops if op.name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Seconds of a layer


class LayerTime:
    """Seconds of one layer, embedding or head on one rank: compute by part and pass, exchanges, collectives."""

    def __init__(self, label, work, hardware, max_vio):
        plan, self.label = work.plan, label
        self.compute = {}                                  # (part, pass) -> seconds; pass: F, I or W
        self.group = {}                                    # (part, axis) -> (tier, seconds) of one pass
        busiest = 1 + max_vio
        for op in work.ops:
            share = busiest if op.part == "experts" and op.name.startswith("expert.") else 1.0
            for which, seconds in zip("FIW", op_seconds(op, plan, hardware)):
                self.compute[op.part, which] = self.compute.get((op.part, which), 0.0) + share * seconds
        again = replayed(work)
        self.recompute = sum(op_seconds(op, plan, hardware)[0] for op in again)
        for (axis, part), sent in work.group_bytes.items():
            tier = tier_of(plan, axis)
            self.group[part, axis] = tier, collective_seconds(hardware, tier, getattr(plan, axis), sent)
        self.exchange = {"F": (0.0, 0.0), "B": (0.0, 0.0)}  # one way: (inner, outer) seconds
        if any(op.name == "router" for op in work.ops) and plan.ep > 1:
            self._time_exchange(work, hardware, busiest)
        self.exchange_again = any(op.name == "permute" for op in again)    # rows must travel again
        self.swap = saved_bytes(work)[1] / hardware.host_bandwidth
        self.gather = self._gather(work, hardware) if plan.zero == 3 else ("inner", 0.0)

    def _time_exchange(self, work, hardware, busiest):
        plan, sent = work.plan, exchange_bytes(work.shape, work.plan)
        ranks = dict(inner=plan.inner, outer=plan.ep // plan.inner if plan.dispatch != "flat" else plan.ep)
        for way, key in (("forward", "F"), ("backward", "B")):
            half = {tier: sent[way][tier][0] / 2 * busiest for tier in ranks}        # dispatch is as long as combine
            self.exchange[key] = tuple(collective_seconds(hardware, tier, ranks[tier], half[tier]) for tier in ranks)

    def _gather(self, work, hardware):
        """zero=3: the layer's weights from all ranks that hold a part; their gradients take as long to go back."""
        plan, e = work.plan, BYTES_OF[work.plan.precision]
        seconds = 0.0
        for kind, axis, ranks in (("dense", "dp", plan.dp * plan.cp), ("expert", "edp", plan.edp)):
            sent = (ranks - 1) / ranks * work.params[kind] * e
            seconds += collective_seconds(hardware, tier_of(plan, axis), ranks, sent)
        return tier_of(plan, "dp"), seconds


# ---------------------------------------------------------------------------------------------------------------------
# Inside an action: tasks on the streams of one device


class Streams:
    """A device's queues: compute, links inside the node, links between nodes, the host's link. Each runs its tasks in order."""

    def __init__(self, plan):
        self.plan = plan
        self.free = {"compute": 0.0, "inner": 0.0, "outer": 0.0, "host": 0.0}
        self.tasks = []                                    # (name, stream, start, end), seconds from the action's start

    def run(self, name, stream, seconds, *after):
        """Queue a task that starts when its stream and all of `after` (times) are ready; its end."""
        if seconds == 0:
            return max(after, default=0.0)
        start = max(self.free[stream], *after) if after else self.free[stream]
        self.free[stream] = start + seconds
        self.tasks.append((name, stream, start, start + seconds))
        return start + seconds

    def block(self, layer, part, which, after):
        """Compute of one part of a layer behind its tensor and context collectives. which: F, I, W or B (= I and W)."""
        if which != "W":
            for (owner, axis), (tier, seconds) in layer.group.items():
                after = self.run(f"{axis} {part}", tier, seconds, after) if owner == part else after
        seconds = sum(layer.compute.get((part, one), 0.0) for one in ("IW" if which == "B" else which))
        return self.run(f"{layer.label or part} {which}", "compute", seconds, after)

    def exchange(self, layer, which, outer_first, after):
        """One way of the expert exchange. Two hops one after the other; flat sends over both kinds of link at once."""
        (inner, outer), name = layer.exchange[which], "exchange " + which
        if self.plan.dispatch == "flat":
            return max(self.run(name, "inner", inner, after), self.run(name, "outer", outer, after))
        hops = [("outer", outer), ("inner", inner)]
        for tier, seconds in hops if outer_first else reversed(hops):
            after = self.run(name, tier, seconds, after)
        return after

    def weights(self, layer, after):
        """zero=3: gathered ahead of use, so the link alone decides when."""
        return max(after, self.run("weights", *layer.gather))

    def replay(self, layer, after):
        after = self.exchange(layer, "F", True, after) if layer.exchange_again else after
        return self.run("recompute", "compute", layer.recompute, after)


def forward_layer(streams, layer, ready):
    """A layer's forward: the shared expert hides a part of the dispatch; the end of the combine."""
    attended = streams.block(layer, "attend", "F", streams.weights(layer, ready))
    arrived = streams.exchange(layer, "F", True, attended)
    streams.block(layer, "shared", "F", attended)
    returned = streams.exchange(layer, "F", False, streams.block(layer, "experts", "F", arrived))
    streams.run("swap", "host", layer.swap, returned)
    return streams.block(layer, "combine", "F", returned)


def backward_layer(streams, layer, ready, which, defer):
    """A layer's backward. which: B or I. defer: weight gradients of experts wait until they hide the dispatch's backward."""
    ready = max(streams.weights(layer, ready), streams.run("swap", "host", layer.swap))
    arrived = streams.exchange(layer, "B", True, streams.block(layer, "combine", "I", ready))
    again = streams.replay(layer, ready)
    streams.block(layer, "shared", which, again)
    computed = streams.block(layer, "experts", "I" if defer else which, max(arrived, again))
    returned = streams.exchange(layer, "B", False, computed)
    if defer and which == "B":
        streams.block(layer, "experts", "W", computed)
    return streams.block(layer, "attend", which, returned)


def pair_layer(streams, forward, backward, ready_f, ready_b):
    """A forward of one micro-batch among a backward of another: compute of each hides the exchanges of the other.

    attend F hides combine B, experts B dispatch F, their weight gradients dispatch B, attend B combine F. Both ends.
    """
    ready_b = max(streams.weights(backward, ready_b), streams.run("swap", "host", backward.swap))
    arrived_b = streams.exchange(backward, "B", True, streams.block(backward, "combine", "I", ready_b))
    attended = streams.block(forward, "attend", "F", streams.weights(forward, ready_f))
    again = streams.replay(backward, ready_b)
    streams.block(backward, "shared", "B", again)
    arrived_f = streams.exchange(forward, "F", True, attended)
    computed_b = streams.block(backward, "experts", "I", max(arrived_b, again))
    returned_b = streams.exchange(backward, "B", False, computed_b)
    streams.block(backward, "experts", "W", computed_b)
    streams.block(forward, "shared", "F", attended)
    computed_f = streams.block(forward, "experts", "F", arrived_f)
    returned_f = streams.exchange(forward, "F", False, computed_f)
    done_b = streams.block(backward, "attend", "I", returned_b)
    streams.block(backward, "attend", "W", done_b)
    streams.run("swap", "host", forward.swap, computed_f)
    return streams.block(forward, "combine", "F", returned_f), done_b


def action_streams(plan, stages, action):
    """Streams of one action of the table, played from time 0. stages: list (pp*vpp) of lists of LayerTime."""
    streams, defer, kind = Streams(plan), plan.overlap == "adaptive", action.kind
    layers, ready = stages[action.stage], 0.0
    if kind == "FB":
        _pair(streams, layers, stages[action.backward[0]], defer)
    elif kind == "F":
        for layer in layers:
            ready = forward_layer(streams, layer, ready)
    elif kind == "W":
        for layer in layers:
            for part in ("attend", "shared", "experts"):
                streams.block(layer, part, "W", 0.0)
    else:
        for layer in reversed(layers):
            ready = backward_layer(streams, layer, ready, kind, defer)
    return streams


def _pair(streams, forward, backward, adaptive):
    ready_f = ready_b = 0.0
    for f, b in zip_longest(forward, reversed(backward)):
        if adaptive and f and b:
            ready_f, ready_b = pair_layer(streams, f, b, ready_f, ready_b)
            continue
        ready_f = forward_layer(streams, f, ready_f if adaptive else max(ready_f, ready_b)) if f else ready_f
        ready_b = backward_layer(streams, b, ready_b if adaptive else max(ready_f, ready_b), "B", adaptive) if b else ready_b


def account(streams):
    """Seconds of an action: (all, {part: seconds} that add up to all, seconds of communication, exposed seconds of it)."""
    end = max(streams.free.values())
    parts, compute = {}, sorted((start, stop) for _, stream, start, stop in streams.tasks if stream == "compute")
    for name, stream, start, stop in streams.tasks:
        if stream == "compute":
            key = name.split()[0]
            parts[key] = parts.get(key, 0.0) + stop - start
    gaps = list(zip([0.0] + [stop for _, stop in compute], [start for start, _ in compute] + [end]))
    exchange = [task[2:] for task in streams.tasks if task[0].startswith("exchange")]
    exposed = sum(_covered(gap, exchange) for gap in gaps)
    idle = end - sum(parts.values())
    parts["exchange"], parts["collectives"] = exposed, idle - exposed
    return end, parts, sum(stop - start for start, stop in exchange), exposed


def _covered(gap, intervals):
    """Seconds of a gap in which at least one interval runs."""
    start, end = gap
    total = 0.0
    for first, last in sorted(intervals):
        first, last = max(first, start), min(last, end)
        if last > first:
            total, start = total + last - first, last
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: for each pipeline rank a list of actions


class Action(NamedTuple):
    """One entry of a table. kind: F forward, B backward, I and W its halves (for inputs, for weights), FB a pair.

    str() is the notation of torch.distributed.pipelining, whose runtime runs the table: 3F0, 3B0, (3F1;2B0)OVERLAP_F_B.
    """
    kind: str
    stage: int                     # of a pair: the forward's
    microbatch: int
    backward: tuple = ()           # of a pair: (stage, microbatch) of the backward

    def parts(self):
        """The action as plain (kind, stage, microbatch): two for a pair, forward first."""
        if self.kind != "FB":
            return (self[:3],)
        return ("F", self.stage, self.microbatch), ("B", *self.backward)

    def __str__(self):
        names = [f"{stage}{kind}{microbatch}" for kind, stage, microbatch in self.parts()]
        return f"({';'.join(names)})OVERLAP_F_B" if self.kind == "FB" else names[0]


def schedule_table(plan):
    """list (pp) of lists of Action, in the order in which each rank runs them."""
    n, ranks = plan.n_micro, range(plan.pp)
    if plan.schedule == "zbv":
        words = [_zbv(plan.pp, rank, max(n, 2 * plan.pp - 1)) for rank in ranks]
    elif plan.schedule == "dualpipev":
        words = [_dualpipev(plan.pp, rank, n) for rank in ranks]
    elif plan.schedule == "1f1b":
        words = [_one_forward_one_backward(plan.pp, rank, n) for rank in ranks]
    else:
        words = [_interleaved(plan.pp, plan.vpp, rank, n, plan.schedule == "paired") for rank in ranks]
    return [_number(words[rank], plan.stages_of(rank), n) for rank in ranks]


# A rank's order is a list of words: F0 is "the next forward of my chunk 0", F0+B1 a pair, W0 the oldest weight gradient
# that chunk 0 still owes, W the oldest of all. Which micro-batch is meant follows from counting.

def _phases(*phases):
    return [word for times, pattern in phases for word in pattern.split() * times]


def _one_forward_one_backward(pp, rank, n):
    warm_up = min(n, pp - 1 - rank)
    return _phases((warm_up, "F0"), (n - warm_up, "F0 B0"), (warm_up, "B0"))


def _interleaved(pp, vpp, rank, n, paired):
    """Chunks take turns for rounds of about pp micro-batches (arXiv:2104.04473, section 2.2).

    paired: one more warm-up, so that each steady step holds a forward and a backward that do not wait for each other.
    """
    per_round = n // max(1, n // pp)
    forward = [f"F{i // per_round % vpp}" for i in range(n * vpp)]
    backward = [f"B{vpp - 1 - i // per_round % vpp}" for i in range(n * vpp)]
    warm_up = min(n * vpp, 2 * (pp - 1 - rank) + (vpp - 1) * per_round + (1 if paired else 0))
    steady = zip(forward[warm_up:], backward)
    steady = [f"{f}+{b}" for f, b in steady] if paired else [word for step in steady for word in step]
    return forward[:warm_up] + steady + backward[n * vpp - warm_up:]


def _zbv(pp, rank, n):
    """Zero bubble on a V of two chunks (arXiv:2401.10241, section 6), for n >= 2*pp - 1."""
    left = pp - rank                                       # ranks from here to the turn of the V, this one included
    return _phases(
        (2 * left - 1, "F0"), (rank, "F1 F0"), (left, "F1 I1 W1"),
        (n - 2 * pp + rank + 1, "F0 I0 W0 F1 I1 W1"), (left - 1, "I0 W0 F1 I1 W1"),
        (rank, "I0 I1"), (left, "I0 W0"), (rank, "W1"), (rank, "W0"))


def _dualpipev(pp, rank, n):
    """DualPipe cut in half (github.com/deepseek-ai/DualPipe): pairs in the steady state, split backwards at both ends."""
    left, main = pp - rank - 1, n - 2 * pp + rank + 1
    half, odd = (rank + 1) // 2, rank % 2
    # the last rank runs the first pair one after the other: its backward is of the forward just before
    first, main = (1, main - 1) if left == 0 else (0, main)
    return _phases(
        (2 * left, "F0"), (rank + 1, "F0 F1"), (left, "I1 W F1"), (first, "F0 B1 F1+B0"), (main, "F0+B1 F1+B0"),
        (left, "B1 F1+B0"), (half, "B1 B0"), (0 if odd else 1, "B1 I0"), (half if odd else rank - half, "I1 I0"),
        (left, "W I0"), (rank + 1, "W"))


def _number(words, stages, n):
    """Words to actions: micro-batches counted per chunk and kind; those past n, which a short run leaves out, are dropped."""
    count, owed, actions = {}, [], []

    def take(kind, chunk):
        key = ("F" if kind == "F" else "B", chunk)         # B and I are two forms of one backward
        count[key] = count.get(key, -1) + 1
        return stages[chunk], count[key]

    for word in words:
        if word[0] == "W":
            stage, microbatch = next(pair for pair in owed if word == "W" or pair[0] == stages[int(word[1])])
            owed.remove((stage, microbatch))
            actions.append(Action("W", stage, microbatch))
        elif "+" in word:
            forward, backward = take("F", int(word[1])), take("B", int(word[4]))
            actions.append(Action("FB", *forward, backward))
        else:
            stage, microbatch = take(word[0], int(word[1]))
            owed += [(stage, microbatch)] if word[0] == "I" else []
            actions.append(Action(word[0], stage, microbatch))
    return [action for action in actions if action.microbatch < n]


def check_table(plan, table):
    """AssertionError, with the action, if a table is not a right schedule. Returns the most micro-batches in flight per rank."""
    home = {stage: rank for rank in range(plan.pp) for stage in plan.stages_of(rank)}
    flight, sent, received = [], {}, {}
    for rank, actions in enumerate(table):
        seen, live, most = set(), 0, 0
        for kind, stage, microbatch in (part for action in actions for part in action.parts()):
            what = (kind, stage, microbatch)
            assert home[stage] == rank, f"{what} on rank {rank}, stage {stage} lives on rank {home[stage]}"
            assert what not in seen, f"{what} twice"
            before = {"F": None, "B": "F", "I": "F", "W": "I"}[kind]
            assert before is None or (before, stage, microbatch) in seen, f"{what} before its {before}"
            seen.add(what)
            live += {"F": 1, "B": -1, "I": 0, "W": -1}[kind]
            most = max(most, live)
            _note_messages(plan, home, what, sent, received)
        ends = sum(kind != "I" for kind, _, _ in seen)
        assert ends == 2 * plan.n_micro * len(plan.stages_of(rank)), f"rank {rank}: {ends} forwards and finished backwards"
        assert live == 0, f"rank {rank}: {live} micro-batches owe weight gradients when gradients are reduced"
        flight.append(most)
    assert sent == received, "the order of receives is not the order of sends"
    play(plan, table, lambda action: 1.0)                  # stops if ranks wait for each other in a circle
    return flight


def _note_messages(plan, home, what, sent, received):
    """Adds what an action sends and receives to lists by (kind, sending stage)."""
    kind, stage, microbatch = what
    step = 1 if kind == "F" else -1
    if kind != "W" and 0 <= stage + step < plan.n_stages and home[stage + step] != home[stage]:
        sent.setdefault((step, stage), []).append(microbatch)
    if kind != "W" and 0 <= stage - step < plan.n_stages and home[stage - step] != home[stage]:
        received.setdefault((step, stage - step), []).append(microbatch)


# ---------------------------------------------------------------------------------------------------------------------
# The clock


def play(plan, table, duration, link=0.0):
    """Plays a table: list (pp) of lists of (start, end, action), seconds.

    duration(action): seconds that it holds its rank; link: seconds from the end of an action until a neighbour has its
    output. Sends are asynchronous: only the receiver waits. A pair starts when both of its inputs are there.
    """
    home = {stage: rank for rank in range(plan.pp) for stage in plan.stages_of(rank)}
    last, done = plan.n_stages - 1, {}                     # done: (is forward, stage, microbatch) -> end
    spans, todo = [[] for _ in table], [iter(actions) for actions in table]
    waiting = [next(actions, None) for actions in todo]
    moved = True
    while moved:
        moved = False
        for rank in range(plan.pp):
            while waiting[rank] is not None:
                start = _inputs_ready(waiting[rank], rank, home, last, done, link)
                if start is None:
                    break
                action, moved = waiting[rank], True
                start = max(start, spans[rank][-1][1] if spans[rank] else 0.0)
                end = start + duration(action)
                spans[rank].append((start, end, action))
                done.update({(kind == "F", stage, m): end for kind, stage, m in action.parts() if kind != "W"})
                waiting[rank] = next(todo[rank], None)
    assert not any(waiting), f"ranks wait for each other: {[str(action) for action in waiting]}"
    return spans


def _inputs_ready(action, rank, home, last, done, link):
    """Time at which the inputs of an action are on its rank; None if one of them is not made yet."""
    ready = 0.0
    for kind, stage, microbatch in action.parts():
        source = stage - 1 if kind == "F" else stage + 1
        if kind == "W" or not 0 <= source <= last:
            continue
        made = done.get((kind == "F", source, microbatch))
        if made is None:
            return None
        ready = max(ready, made + (link if home[source] != rank else 0.0))
    return ready


def draw_text(plan, table, duration, columns=160):
    """The pipeline as text: a row per rank, time to the right, digits are micro-batches (mod 10), backwards in letters."""
    spans = play(plan, table, duration)
    step = max(end for row in spans for _, end, _ in row) / columns
    rows = []
    for row in spans:
        cells = [" "] * columns
        for start, end, action in row:
            mark = str(action.microbatch % 10) if action.kind[0] == "F" else chr(ord("a") + action.microbatch % 26)
            for i in range(round(start / step), max(round(start / step) + 1, round(end / step))):
                cells[min(i, columns - 1)] = {"W": "w", "FB": "="}.get(action.kind, mark)
        rows.append("".join(cells))
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def stage_works(shape, plan):
    """list (pp*vpp) of lists of (label, Work) in the order of forward; a label only where the parts need one name."""
    stages = []
    for layers in stage_layers(shape, plan):
        stages.append([("", layer_work(shape, plan, layer_kind(shape, i))) for i in layers])
    stages[0].insert(0, ("embedding", embedding_work(shape, plan)))
    if shape.num_nextn_predict_layers and plan.pp > 1:     # a copy of the embedding feeds the MTP layers
        stages[-1].insert(-shape.num_nextn_predict_layers, ("embedding", embedding_work(shape, plan)))
    stages[-1].append(("head", head_work(shape, plan)))
    return stages


def memory_by_rank(shape, plan, hardware, table):
    """Bytes of each pipeline rank at its peak: list (pp) of dict of weights, gradients, optimizer, activations, buffers, framework."""
    works, e = stage_works(shape, plan), BYTES_OF[plan.precision]
    kept = [sum(saved_bytes(work)[0] for _, work in stage) for stage in works]
    rows = plan.tokens * shape.num_experts_per_tok * shape.hidden_size * e if plan.ep > 1 else 0
    ranks = []
    for rank in range(plan.pp):
        mine = [work for stage in plan.stages_of(rank) for _, work in works[stage]]
        held = {kind: sum(work.params[kind] for work in mine) for kind in ("dense", "expert")}
        shards = dict(dense=plan.dp * plan.cp, expert=plan.edp) if plan.zero else dict(dense=1, expert=1)
        sharded = sum(held[kind] / shards[kind] for kind in held)
        whole = sharded if plan.zero == 3 else sum(held.values())
        # float32 masters apart from the weights, unless these are float32 and whole
        master = 4 if e < 4 or max(shards.values()) > 1 else 0
        largest = max(sum(work.params.values()) for work in mine)
        ranks.append(dict(
            weights=whole * e, gradients=whole * max(e, 4),
            optimizer=0 if "optimizer" in plan.swap else sharded * (master + 2 * max(e, 4)),
            activations=_peak_activations(table[rank], kept),
            # an exchange's rows to send and received, there and back; zero=3: weights of the layer at work and of the next
            buffers=4 * rows + (2 * largest * e if plan.zero == 3 else 0), framework=hardware.framework))
    return ranks


def _peak_activations(actions, kept):
    """Most bytes that a rank's micro-batches in flight keep; a backward for inputs alone frees nothing yet."""
    live = peak = 0
    for kind, stage, _ in (part for action in actions for part in action.parts()):
        live += {"F": kept[stage], "I": 0, "B": -kept[stage], "W": -kept[stage]}[kind]
        peak = max(peak, live)
    return peak


# ---------------------------------------------------------------------------------------------------------------------
# Predict


def model_flops(shape, seq_len):
    """FLOPs of training on one token: three times the forward's matmuls and causal attention; equals model.flops_per_token."""
    plan = Plan(seq_len=seq_len)
    works = [layer_work(shape, plan, layer_kind(shape, i)) for i in range(shape.num_hidden_layers + shape.num_nextn_predict_layers)]
    return 3 * sum(op.flops for work in works + [head_work(shape, plan)] for op in work.ops) / seq_len


class Simulation:
    """One step of a plan, played: what predict reports and trace draws."""

    def __init__(self, config, plan, hardware, max_vio=0.0):
        shape = replace(as_shape(config), value_padded=hardware.value_padded)
        self.shape, self.plan, self.hardware = shape, plan, hardware
        works = stage_works(shape, plan)
        once = {id(work): LayerTime(label, work, hardware, max_vio) for label, work in {id(w): (n, w) for s in works for n, w in s}.values()}
        self.stages = [[once[id(work)] for _, work in stage] for stage in works]
        self.table = schedule_table(plan)
        self.played = {}                                   # (kind, stage, backward stage) -> Streams, account of them
        sent = plan.tokens * shape.hidden_size * BYTES_OF[plan.precision]
        self.link = collective_seconds(hardware, tier_of(plan, "pp"), 2, sent)
        self.spans = play(plan, self.table, lambda action: self.play_action(action)[1][0], self.link)
        self.works = works

    def play_action(self, action):
        key = action.kind, action.stage, action.backward[:1]
        if key not in self.played:
            streams = action_streams(self.plan, self.stages, action)
            self.played[key] = streams, account(streams)
        return self.played[key]

    def end_of_step(self, rank):
        """(seconds of reducing gradients and gathering weights, of the optimizer) on a pipeline rank, after its last action."""
        plan, hardware, e = self.plan, self.hardware, BYTES_OF[self.plan.precision]
        sync = params = 0.0
        for kind, axis, ranks in (("dense", "dp", plan.dp * plan.cp), ("expert", "edp", plan.edp)):
            held = sum(work.params[kind] for stage in plan.stages_of(rank) for _, work in self.works[stage])
            back = 4 if plan.zero == 0 else e              # zero=0: the second half of an all-reduce; zero=1: new weights
            for size in () if plan.zero == 3 else (4, back):
                sync += collective_seconds(hardware, tier_of(plan, axis), ranks, (ranks - 1) / ranks * held * size)
            params += held / (ranks if plan.zero else 1)
        moved = params * (7 * 4 + e)                       # gradient, master and two moments read, three written, new weight
        host = 2 * 12 * params / hardware.host_bandwidth if "optimizer" in plan.swap else 0.0
        return sync, max(host, moved / (hardware.bandwidth * hardware.memory_efficiency))

    def breakdown(self):
        """Seconds by part, a mean over pipeline ranks, which add up to the step; seconds of exchange, and those of it exposed."""
        parts, exchange, exposed, step = {}, 0.0, 0.0, 0.0
        for rank, row in enumerate(self.spans):
            sync, optimizer = self.end_of_step(rank)
            step = max(step, row[-1][1] + sync + optimizer)
            mine = dict(gradients=sync, optimizer=optimizer)
            for _, _, action in row:
                _, by_part, total, uncovered = self.play_action(action)[1]
                exchange, exposed = exchange + total, exposed + uncovered
                for name, seconds in by_part.items():
                    mine[name] = mine.get(name, 0.0) + seconds
            for name, seconds in mine.items():
                parts[name] = parts.get(name, 0.0) + seconds / self.plan.pp
        parts["bubble"] = step - sum(parts.values())
        return parts, exchange / self.plan.pp, exposed / self.plan.pp

    def bytes_by_tier(self):
        """Bytes that a device sends in one step, a mean over pipeline ranks; weights and gradients apart from zero=3's."""
        plan, total = self.plan, {"inner": 0.0, "outer": 0.0}
        for stage in self.works:
            for _, work in stage:
                for (axis, _), sent in work.group_bytes.items():
                    total[tier_of(plan, axis)] += 2 * sent * plan.n_micro
                if any(op.name == "router" for op in work.ops):
                    for tiers in exchange_bytes(self.shape, plan).values():
                        for tier, sent in tiers.items():
                            total[tier] += sent[0] * plan.n_micro
        crossings = 0 if plan.pp == 1 else 2 * (plan.n_stages - 1) - (2 if plan.schedule in ("zbv", "dualpipev") else 0)
        total[tier_of(plan, "pp")] += crossings * plan.n_micro * plan.tokens * self.shape.hidden_size * BYTES_OF[plan.precision]
        return {tier: sent / plan.pp for tier, sent in total.items()}


def predict(config, plan, hardware, max_vio=0.0):
    """One step of a plan, simulated: a dict of seconds, bytes, GiB and fractions. ValueError for a plan that cannot run.

    max_vio: load of the busiest expert over the mean, minus one. mfu divides model FLOPs (causal attention, head and MTP
    included, no recomputation) by the peak of the plan's precision.
    """
    check_plan(config, plan, hardware)
    run = Simulation(config, plan, hardware, max_vio)
    parts, exchange, exposed = run.breakdown()
    step = sum(parts.values())
    memory = memory_by_rank(run.shape, plan, hardware, run.table)
    peak = max(range(plan.pp), key=lambda rank: sum(memory[rank].values()))
    needed = sum(memory[peak].values())
    rate = plan.global_batch * plan.seq_len / step / plan.world_size
    flops = rate * model_flops(run.shape, plan.seq_len)
    fits = needed <= hardware.memory
    why_not = "" if fits else (f"pipeline rank {peak} needs {needed / 2**30:.1f} GiB of {hardware.memory / 2**30:.1f}, most of it "
                               f"{max(memory[peak], key=memory[peak].get)}: more recompute, pp, tp or zero, or fewer in flight")
    return dict(
        step_time_s=step, tokens_per_s=rate * plan.world_size, tokens_per_s_per_device=rate,
        mfu=flops / hardware.peak[plan.precision], tflops_per_device=flops / 1e12, mem_gib=needed / 2**30, fits=fits,
        why_not=why_not, bubble=parts["bubble"] / step, exposed_comm_s=parts["exchange"] + parts["collectives"] + parts["gradients"],
        hidden_comm_fraction=1 - exposed / exchange if exchange else 1.0, breakdown=parts, peak_rank=peak,
        memory_by_stage=[{name: size / 2**30 for name, size in part.items()} for part in memory],
        bytes_by_tier=run.bytes_by_tier(), plan=asdict(plan))


def write_trace(run, path):
    """The step as Chrome trace events, which Perfetto opens: a process per pipeline rank, a thread per stream; microseconds."""
    threads, events = ["schedule", "compute", "inner", "outer", "host"], []
    for rank, row in enumerate(run.spans):
        events.append(dict(ph="M", name="process_name", pid=rank, tid=0, args={"name": f"pipeline rank {rank}"}))
        events += [dict(ph="M", name="thread_name", pid=rank, tid=i, args={"name": name}) for i, name in enumerate(threads)]
        for start, end, action in row:
            tasks = [(str(action), "schedule", 0.0, end - start), *run.play_action(action)[0].tasks]
            events += [dict(ph="X", name=name, cat=stream, pid=rank, tid=threads.index(stream), ts=1e6 * (start + first),
                            dur=1e6 * (last - first)) for name, stream, first, last in tasks]
    with open(path, "w") as file:
        json.dump(dict(traceEvents=events, displayTimeUnit="ms"), file)


def draw_png(run, path):
    """The pipeline as a picture: a row per rank; forward blue, backward orange, a pair both, weight gradients green."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    colours = {"F": "tab:blue", "B": "tab:orange", "I": "tab:orange", "W": "tab:green"}
    figure, axes = pyplot.subplots(figsize=(16, 1 + 0.4 * run.plan.pp))
    for rank, row in enumerate(run.spans):
        for start, end, action in row:
            halves = action.parts()
            for i, (kind, stage, microbatch) in enumerate(halves):
                height = 0.9 / len(halves)
                shade = 0.5 + 0.5 * (stage // run.plan.pp + 1) / run.plan.vpp
                axes.broken_barh([(start, end - start)], (rank - 0.45 + i * height, height), facecolor=colours[kind],
                                 alpha=shade, edgecolor="white", linewidth=0.3)
    axes.set(xlabel="seconds", ylabel="pipeline rank", ylim=(run.plan.pp - 0.5, -0.5))
    axes.set_title(f"{run.plan.schedule}, {run.plan.n_micro} micro-batches: forward blue, backward orange, weights green")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Search


def candidate_plans(config, hardware, devices, global_batch, seq_len):
    """Plans to try: powers of two on every axis, the three exchanges, three sets of recomputation."""
    two = [2**i for i in range(7)]
    for tp, pp, ep, vpp, micro_batch in product(two[:4], two, two, (1, 2), (1, 2, 4)):
        if devices % (tp * pp) or (ep == 1 and has_experts(config) and devices > 64):
            continue
        for dispatch, overlap, recompute in product(("flat", "hierarchical"), ("none", "adaptive"), _RECOMPUTE_SETS):
            yield Plan(pp=pp, dp=devices // (tp * pp), tp=tp, sp=int(tp > 1), ep=ep, vpp=vpp, micro_batch=micro_batch,
                       global_batch=global_batch, seq_len=seq_len, dispatch=dispatch, overlap=overlap, recompute=recompute,
                       node_size=hardware.node_size)


_RECOMPUTE_SETS = ((), ("norm", "mla_up", "act", "permute"), ("layer",))


def search_plans(config, hardware, devices, global_batch, seq_len):
    """(predictions that fit, fastest first; {reason: (how often, an example)} of those that were refused)."""
    found, refused = [], {}
    for plan in candidate_plans(config, hardware, devices, global_batch, seq_len):
        try:
            check_plan(config, plan, hardware, devices)
            result = predict(config, plan, hardware)
            message = result["why_not"]
        except ValueError as error:
            message = str(error)
        if not message:
            found.append(result)
            continue
        kind = re.sub(r"[0-9.]+", "#", message)
        refused[kind] = refused.get(kind, (0, message))[0] + 1, message
    return sorted(found, key=lambda result: result["step_time_s"]), refused


# ---------------------------------------------------------------------------------------------------------------------
# The command

# The published runs (arXiv:2505.04519; devices "6K" and "4K" read as 6,144 and 4,096). What is not published is assumed
# here: sequence length, batch, bin of the 910B, recomputation, and all of the baseline's plan.
PAPER = {
    "optimised": dict(devices=6144, tokens_per_s=1.46e6, mfu=0.300, plan=dict(
        pp=16, dp=48, tp=8, sp=1, ep=32, vpp=2, micro_batch=2, dispatch="hierarchical", overlap="adaptive",
        recompute=("norm", "mla_up", "act", "permute"), global_batch=48 * 2 * 48)),
    "baseline": dict(devices=4096, tokens_per_s=0.61e6, mfu=0.189, plan=dict(
        pp=16, dp=32, tp=8, sp=1, ep=32, vpp=2, micro_batch=2, dispatch="flat", overlap="none", schedule="interleaved",
        recompute=("layer",), global_batch=32 * 2 * 48)),
}


def print_paper():
    """The published runs beside their simulation, then where the time and the memory of the optimised one go."""
    config = PRESETS["pangu-ultra-moe-718b"]
    print("pangu-ultra-moe-718b on Ascend 910B. Published: arXiv:2505.04519. Simulated: nothing here was run on an NPU.\n"
          "Assumed, as not published: sequence length, bin, global batch (48 micro-batches a replica), recomputation,\n"
          "the baseline's plan, balanced experts; MFU counts causal attention over the bin's bf16 peak.\n")
    print(f"{'run':10} {'NPUs':>5} {'bin':>16} {'sequence':>8} | {'published':>19} | {'simulated':>42}")
    print(f"{'':42} | {'tokens/s':>10} {'MFU':>8} | {'tokens/s':>10} {'MFU':>8} {'step s':>8} {'memory GiB':>12}")
    shown = None
    for name, run in PAPER.items():
        for hardware in list(HARDWARE.values())[:3]:
            for seq_len in (4096, 8192):
                result = predict(config, Plan(seq_len=seq_len, **run["plan"]), hardware)
                shown = shown or result
                print(f"{name:10} {run['devices']:5} {hardware.name:>16} {seq_len:8} | {run['tokens_per_s']:10.3g} "
                      f"{run['mfu']:8.1%} | {result['tokens_per_s']:10.3g} {result['mfu']:8.1%} {result['step_time_s']:8.2f} "
                      f"{result['mem_gib']:9.1f}{'' if result['fits'] else ' no'}")
    print(f"\nWhere the step goes: optimised, {next(iter(HARDWARE))}, sequence 4096 (simulated)")
    print_prediction(shown)


def print_prediction(result):
    for name in ("step_time_s", "tokens_per_s", "tokens_per_s_per_device", "mfu", "tflops_per_device", "mem_gib", "bubble",
                 "exposed_comm_s", "hidden_comm_fraction"):
        print(f"{name:24} {result[name]:12.4g}")
    print("\npart of the step            seconds   share   (mean over pipeline ranks)")
    for name, seconds in sorted(result["breakdown"].items(), key=lambda item: -item[1]):
        print(f"{name:24} {seconds:10.3f} {seconds / result['step_time_s']:7.1%}")
    sent = result["bytes_by_tier"]
    print(f"\nsent by a device: {sent['inner'] / 1e9:.2f} GB inside its node, {sent['outer'] / 1e9:.2f} GB between nodes")
    names = list(result["memory_by_stage"][0])
    print("\nGiB at the peak, by pipeline rank\nrank " + " ".join(f"{name:>12}" for name in names) + f" {'sum':>8}")
    for rank, parts in enumerate(result["memory_by_stage"]):
        mark = "  <- peak" if rank == result["peak_rank"] else ""
        print(f"{rank:4} " + " ".join(f"{parts[name]:12.2f}" for name in names) + f" {sum(parts.values()):8.2f}{mark}")
    print(f"\nfits: {result['fits']} {result['why_not']}")


def load_model(name):
    """A preset, or a JSON file with Config's fields (a run's config.json holds them under `config`)."""
    if name in PRESETS:
        return PRESETS[name]
    try:
        with open(name) as file:
            values = json.load(file)
    except OSError:
        raise ValueError(f"model {name!r}: use a JSON file or one of {', '.join(PRESETS)}") from None
    values = values.get("config", values)
    unknown = set(values) - {field.name for field in fields(Config)}
    if unknown:
        raise ValueError(f"{name} has unknown fields {sorted(unknown)}: see model.Config")
    return Config(**values)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="Simulates training steps. Without a command: Pangu Ultra MoE beside its paper.")
    commands = parser.add_subparsers(dest="command")
    for name, about in (("predict", "one plan: seconds, tokens/s, memory"), ("plans", "search for the fastest plans that fit"),
                        ("trace", "the step as a timeline")):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--model", default="pangu-ultra-moe-718b", help="preset, or JSON file of Config's fields")
        command.add_argument("--hardware", default="ascend_910b_376", help="preset, or JSON file of Hardware's fields")
        command.add_argument("--devices", type=int, default=None, help="number of devices; default: what the plan needs")
        if name == "plans":
            command.add_argument("--global-batch", type=int, required=True, help="sequences in one optimizer step")
            command.add_argument("--seq-len", type=int, default=4096, help="tokens in a sequence")
            command.add_argument("--top", type=int, default=10, help="plans to print")
            continue
        command.add_argument("--plan", default="", help="key=value,...; lists joined by +; default: the paper's")
        command.add_argument("--load", default="max_vio=0", help="max_vio=X: busiest expert's load over the mean, minus one")
        if name == "predict":
            command.add_argument("--json", action="store_true", help="one JSON object on stdout (s, GiB, bytes)")
        else:
            command.add_argument("--out", default="trace.json", help="file for Perfetto or chrome://tracing")
            command.add_argument("--png", help="also draw the pipeline to this file")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.command is None:
        return print_paper()
    config, hardware = load_model(args.model), load_hardware(args.hardware)
    if args.command == "plans":
        return print_plans(args, config, hardware)
    plan = parse_plan(args.plan, node_size=hardware.node_size) if args.plan else Plan(seq_len=4096, **PAPER["optimised"]["plan"])
    name, _, value = args.load.partition("=")
    if name != "max_vio":
        raise ValueError(f"load={args.load!r}: write max_vio=X with X at least 0")
    check_plan(config, plan, hardware, args.devices)
    if args.command == "predict":
        result = predict(config, plan, hardware, float(value))
        return print(json.dumps(result)) if args.json else print_prediction(result)
    run = Simulation(config, plan, hardware, float(value))
    write_trace(run, args.out)
    if args.png:
        draw_png(run, args.png)


def print_plans(args, config, hardware):
    found, refused = search_plans(config, hardware, args.devices or hardware.node_size, args.global_batch, args.seq_len)
    print("step s   MFU  memory GiB  plan (all simulated)")
    for result in found[:args.top]:
        plan = " ".join(f"{f.name}={result['plan'][f.name]}" for f in fields(Plan) if result["plan"][f.name] != f.default)
        print(f"{result['step_time_s']:6.2f} {result['mfu']:6.1%} {result['mem_gib']:10.1f}  {plan}")
    print(f"\n{len(found)} plans fit. Refused:")
    for times, message in sorted(refused.values(), reverse=True):
        print(f"{times:6}  {message}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(print(f"sim.py: {error}", file=sys.stderr) or 2)
