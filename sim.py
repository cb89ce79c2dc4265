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
import math
from dataclasses import dataclass, fields, replace

from model import PRESETS, Config, count_params, flops_per_token

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
