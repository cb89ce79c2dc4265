"""
Published training runs beside their prediction: from a row of a table to a shape and a plan, how far the simulated step
time and memory are off, and the constants that fit the rows best.

    python tests/published.py                    # all of tests/data/train_rows.csv, with the constants frozen in sim.py
    python tests/published.py ROWS.csv --out F.csv   # other rows with the same columns; each prediction as a line of F
    python tests/published.py --fit              # refits the constants: on all rows, then each family left out

What only runs of other systems need stands here, as subclasses of sim.py's classes.
"""
import argparse
import csv
import math
import re
import sys
from dataclasses import asdict, dataclass, replace
from itertools import chain, combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import sim  # noqa: E402
from model import Weights  # noqa: E402
from sim import (BYTES_OF, GENERATIONS, GIB, NARROW, Attention, Hardware, Passes, Plan, Shape, Simulation,  # noqa: E402
                 Work, divisors, matmul_share, peak_of, require, setting, slower_of)

ROWS = Path(__file__).parent / "data/train_rows.csv"

# ---------------------------------------------------------------------------------------------------------------------
# What runs of other systems need beside sim.py's own


@dataclass(frozen=True)
class RowHardware(Hardware):
    # fitted: rate of a flash attention of no vendor, beside the vendor's; of collectives that a plan hides, the share
    # of their time that runs beside computation
    portable_attention: float = 0.492
    hidden_share: float = setting(0.567, least=0)


HARDWARE = {name: RowHardware(**asdict(preset)) for name, preset in sim.HARDWARE.items()}
HARDWARE |= {
    # read as the largest bin
    "ascend_910b_unspecified": HARDWARE["ascend_910b_376"],
    # NVIDIA's data sheet
    "a100_40_sxm": replace(HARDWARE["a100_80_sxm"], memory=39.4 * GIB, bandwidth=1555e9),
    # 4 OmniPath links of 100 Gb/s for 8 GPUs (bigscience, tr11-176B-ml)
    "a100_80_jeanzay": replace(HARDWARE["a100_80_sxm"], outer_bandwidth=6.25e9),
    # no NVLink, PCIe 4.0 x16
    "a100_pcie": replace(HARDWARE["a100_80_sxm"], bandwidth=1935e9, inner_bandwidth=24e9),
    # torchtitan, benchmarks; 500 of 700 W: the clock follows the root of the power, which is assumed
    "h100_96_hbm2e_500w": replace(HARDWARE["h100_sxm"], memory=96e9, bandwidth=2400e9, power=math.sqrt(500 / 700)),
}


@dataclass(frozen=True)
class RowPlan(Plan):
    """recompute may name core_attention: scores and softmax, of Megatron-LM's selective recomputation."""
    etp: int = setting(1, least=1)                         # ranks that share one expert's matrices
    hide: tuple = setting((), choices=("tp", "dp", "pp"))  # axes whose collectives run beside computation
    pipelined: bool = setting(False)                       # the exchange's two hops at once, as DeepEP and HybridEP do

    @property
    def inner(self):
        return min(self.ep, max(1, self.node_size // self.etp))

    @property
    def edp(self):
        return max(1, self.dp * self.cp * self.tp // (self.ep * self.etp))

    def stride(self, axis):
        if axis == "etp":
            return 1
        return super().stride(axis) * (self.etp if axis == "edp" else 1)

    @property
    def hops_together(self):
        """The exchange uses the links inside the node and between nodes at once, not one after the other."""
        return self.pipelined or self.goes_directly

    def hidden_share(self, axis, hardware):
        if axis not in self.hide:
            return 0.0
        return 1.0 if axis == "pp" else hardware.hidden_share


@dataclass(frozen=True)
class GroupedShape(Shape):
    """Attention with latents (mla), or with fewer heads of keys and values than of queries (gqa)."""
    attn_type: str = "mla"                 # mla | gqa
    num_key_value_heads: int = 0           # gqa
    head_dim: int = 0                      # gqa

    def attention_matmuls(self):
        if self.attn_type == "mla":
            return super().attention_matmuls()
        queries, values = self.attention_widths()
        keys = self.num_key_value_heads * self.head_dim
        return dict(qkv_proj=Weights(self.hidden_size, queries + 2 * keys), o_proj=Weights(values, self.hidden_size))

    def attention_widths(self):
        if self.attn_type == "mla":
            return super().attention_widths()
        width = self.num_attention_heads * self.head_dim
        return width, width


class GroupedWork(Work):
    """A layer of GroupedShape."""

    def attention(self):
        c, plan = self.shape, self.plan
        if c.attn_type == "mla":
            return super().attention()
        tokens, heads = plan.gathered_tokens, c.num_attention_heads // plan.tp
        kv_heads = max(1, c.num_key_value_heads // plan.tp)
        if plan.sp:
            self.gather_stream("attend")
        self.keep_input("attn_in", tokens * c.hidden_size, "attention", again=("norm",))
        self.matmul("attend", "qkv_proj", tokens, cut="out", again=("mla_up",))
        self.gather("cp", "attend", tokens, 2 * kv_heads * c.head_dim)
        self.vector("attend", "rope", 2 * tokens * (heads + kv_heads) * c.head_dim, again=("mla_up",))
        self.core_attention(heads, kv_heads, c.head_dim, c.head_dim)


@dataclass(frozen=True)
class RowShape(GroupedShape):
    gated_mlp: bool = True                 # three matrices (SwiGLU), or two
    window: int = 0                        # keys that a query sees, 0: all before it
    # flash | portable: of no vendor, as FlashAttention-2 or Triton's | unfused: the whole square of scores is kept
    attn_kernel: str = "flash"

    def mlp_matmuls(self, name, inner, copies=1, used=1):
        table = super().mlp_matmuls(name, inner, copies, used)
        if not self.gated_mlp:
            up = f"{name}.gate_up"
            table[up] = table[up]._replace(n_out=inner)
        return table


class Portable(Attention):
    def rate(self, plan, hardware):
        return super().rate(plan, hardware) * hardware.portable_attention


class Unfused(NamedTuple):
    """Scores, and their product with the values, as batched matmuls."""
    part: str
    name: str
    flops: float
    moved: float
    sides: tuple                   # rows, inner, columns of each head's matmul
    matrices: int                  # heads of all sequences
    again: frozenset

    def seconds(self, plan, hardware):
        rows, inner, columns = self.sides
        halves = hardware.tokens_half, hardware.matmul_half, hardware.matmul_half
        share = matmul_share(rows * self.matrices, inner, columns, self.matrices, halves, hardware.cores)
        rate = peak_of(hardware, plan.precision) * hardware.matmul_efficiency * hardware.power
        forward = slower_of(self.flops, rate * share, self.moved, hardware)
        return Passes(forward + hardware.static_matmul, 2 * forward + hardware.static_matmul)


class RowWork(GroupedWork):
    """A layer as in Megatron-LM and its kin: logits are kept, a rank's own part of gathered inputs, 8 bits of what
    8-bit matmuls read; with other attention kernels; with experts' matrices cut over ranks."""

    def keep_input(self, name, elements, owner, again=(), swap=""):
        plan, size = self.plan, self.element
        if plan.sp and name in ("attn_in", "mlp_in"):
            elements /= plan.tp
        if plan.precision in NARROW:
            size /= 2
        self.keep(name, elements, owner, size, again, swap)

    def keep_loss(self, depth, tokens, vocab):
        """Logits in float32, beside those of the matmul, and its input. torch's own loss does not work in place."""
        copies = 2 if self.shape.attn_kernel == "portable" else 1
        self.keep(f"head_in.{depth}", self.plan.tokens * self.shape.hidden_size, "head")
        self.keep(f"logits.{depth}", tokens * vocab, "head", size=self.element + copies * self.precise)

    def attention_kernel(self, heads, width, moved):
        with self.runs_again("core_attention"):
            if self.shape.attn_kernel == "unfused":
                return self.unfused_attention(heads, width, moved)
            super().attention_kernel(heads, width, moved)
        seq_len, window = self.plan.seq_len, self.shape.window
        flash = self.ops.pop()
        if window and window < seq_len / 2:                # what is seen, beside the causal half
            flash = flash._replace(flops=flash.flops * 2 * window / seq_len)
        self.ops.append(Portable(*flash) if self.shape.attn_kernel == "portable" else flash)

    def unfused_attention(self, heads, width, moved):
        plan, tokens = self.plan, self.plan.gathered_tokens
        scores = tokens * plan.seq_len * heads
        self.vector("attend", "attention", 7 * scores)     # written, scaled and masked, softmax, dropout, read
        self.keep("probabilities", scores, "attention")
        self.ops.append(Unfused("attend", "attention", 2 * scores * width, moved * self.element,
                                (tokens, width // 2, plan.seq_len), heads * plan.micro_batch, frozenset(self.regions)))

    def expert_rows(self):
        """Of all that share an expert."""
        return super().expert_rows() * self.plan.etp

    def own_part(self, name, cut=""):
        own, etp = super().own_part(name, cut), self.plan.etp
        if cut != "experts" or etp == 1:
            return own
        if name == "expert.down":
            return own._replace(n_in=own.n_in // etp)
        gates = 2 if self.shape.gated_mlp else 1
        return own._replace(n_out=gates * (own.n_out // gates // etp))

    def moe(self):
        self.gather("etp", "experts", 2 * super().expert_rows(), self.shape.hidden_size)
        super().moe()


class RowSimulation(Simulation):
    @property
    def manner(self):
        """Elsewhere weight gradients are put off only where passes are paired."""
        paired = self.plan.overlap == "adaptive"
        return sim.Manner(self.plan.hops_together, deferred=paired, paired=paired)

    @property
    def link(self):
        return super().link * (1 - self.plan.hidden_share("pp", self.hardware))

    def gradient_seconds(self, rank):
        """But for what runs beside the last backwards."""
        seconds = super().gradient_seconds(rank)
        hidden = self.plan.hidden_share("dp", self.hardware) * seconds
        if hidden:
            backwards = [self.play_layers((), self.layers_of(stage)).seconds for stage in self.plan.stages_of(rank)]
            hidden = min(hidden, sum(backwards))
        return seconds - hidden

    def stream_bytes(self):
        """Whole tensors are sent in parts by the tensor ranks."""
        whole = super().stream_bytes()
        return whole if self.plan.sp else whole / self.plan.tp


# ---------------------------------------------------------------------------------------------------------------------
# From a row to a shape and a plan

# words of the row -> items that are computed again; the first that is found counts
RECOMPUTE_WORDS = (("full, block", ()), ("full", ("layer",)), ("none", ()), ("mla up", ("norm", "mla_up", "act")),
                   ("mla kv", ("mla_up", "permute", "act")), ("norm, act", ("norm", "act")), ("activation", ("act",)),
                   ("per-op", ("norm", "mla_up", "act")), ("per stage", ("norm", "act")),
                   ("selective", ("core_attention",)))
# recomputation not stated: the first of these with which the row fits in memory
GAPS = ((), ("norm", "act"), ("norm", "act", "permute", "expert"), ("layer",))
# words of the row -> collectives that run beside computation
HIDE_WORDS = (("tp-comm", "tp"), ("async-tp", "tp"), ("mc2", "tp"), ("holistic", "tp"), ("grad-reduce", "dp"),
              ("holistic", "dp"), ("core defaults", "dp"), ("core defaults", "pp"), ("p2p", "pp"), ("holistic", "pp"))
PIPELINED = ("deepep", "hybridep")                         # exchanges: dedup with both hops at once
UNBALANCED = 0.2                                           # max_vio of routing that nothing says to be even


class Row:
    """A line of a table with named columns. Cells that cannot be read count as empty, and are told."""

    def __init__(self, cells, number):
        self.cells, self.name, self.faults = cells, cells.get("row_id") or f"line {number}", []

    def text(self, column):
        return (self.cells.get(column) or "").strip()

    def number(self, column, otherwise=0, kind=int):
        text = self.text(column)
        try:
            value = float(text) if text else otherwise
            if value != value or value < 0 or value == math.inf:
                raise ValueError
            return kind(value)
        except ValueError:
            self.faults.append(f"row {self.name}, column {column}: {text!r} is no number, read as {otherwise}")
            return otherwise

    def measured(self, column):
        return self.number(column, 0, float)

    def step_seconds(self, plan):
        """Published seconds of a step, else what tokens/s mean at the plan's batch and length; 0: none published."""
        tokens = (self.number("global_batch") or plan.global_batch) * plan.seq_len
        rate = self.measured("tokens_per_s")
        return self.measured("step_time_s") or (tokens / rate if rate else 0.0)

    def hardware(self):
        name = self.text("hardware")
        if name in HARDWARE:
            return HARDWARE[name]
        instead = "ascend_910b_unspecified" if self.text("vendor") == "ascend" else "h100_sxm"
        self.faults.append(f"row {self.name}, column hardware: {name!r} is no preset, read as {instead}")
        return HARDWARE[instead]

    def shape(self):
        """Shape, its vocabulary padded as Megatron-LM does so that tensor ranks share it."""
        heads, hidden, layers = self.number("n_heads", 1), self.number("hidden"), self.number("n_layers")
        experts, seq_len, inner = self.number("n_experts"), self.number("seq_len", 4096), self.number("moe_ffn")
        unit, nodes = 128 * max(1, self.number("tp", 1)), self.found("expert_load", r"routing (\d+) nodes")
        attn_type = "mla" if self.text("attn_type") == "mla" else "gqa"
        return RowShape(
            vocab_size=math.ceil(self.number("vocab", 50304) / unit) * unit, hidden_size=hidden,
            num_hidden_layers=layers, first_k_dense_replace=self.number("n_dense_layers") if experts else layers,
            intermediate_size=self.number("ffn_hidden", 0) or 4 * hidden, num_attention_heads=heads,
            num_key_value_heads=self.number("n_kv_heads") or heads, head_dim=self.number("head_dim") or hidden // heads,
            attn_type=attn_type, q_lora_rank=self.number("q_lora_rank"),
            kv_lora_rank=self.number("kv_lora_rank"), qk_nope_head_dim=self.number("qk_nope_dim"),
            qk_rope_head_dim=self.number("qk_rope_dim"), v_head_dim=self.number("v_head_dim"),
            gated_mlp=bool(self.number("gated_mlp", 1)), tie_word_embeddings=bool(self.number("tied_embeddings")),
            n_routed_experts=experts or 1, num_experts_per_tok=self.number("top_k", 1), moe_intermediate_size=inner,
            n_shared_experts=self.number("shared_ffn") / inner if inner else 0,
            num_nextn_predict_layers=self.number("mtp_layers"), capacity_factor=self.capacity(), norm="pre",
            balance="none", max_position_embeddings=seq_len,
            n_group=max(1, self.number("ep") // 8), topk_group=nodes, group_choice="limited" if nodes else "equal",
            window=self.found("notes", r"sliding window (\d+)"), attn_kernel=self.attn_kernel())

    def attn_kernel(self):
        if self.text("attn_kernel").startswith("unfused"):
            return "unfused"
        return "portable" if "fsdp prefetch" in self.text("overlap") else "flash"

    def found(self, column, pattern, kind=int):
        """The number that a text column states, or 0."""
        match = re.search(pattern, self.text(column))
        return kind(match[1]) if match else 0

    def capacity(self):
        return self.found("expert_load", r"capacity factor (\d*\.?\d+)", float)

    def max_vio(self):
        load = self.text("expert_load")
        balanced = any(word in load for word in ("forced", "aux-loss-free", "dynamic placement"))
        return 0.0 if not load or self.capacity() or balanced else UNBALANCED

    def plans(self, hardware):
        """Plans that the row may mean, best guess of the unstated first: more than one where cells are empty."""
        if not self.text("tp") and not self.text("pp"):
            for row in self.guessed_cuts():
                yield from row.plans(hardware)
            return
        base = self.base_plan(hardware)
        for items, micro_batch in product(self.recompute_choices(), self.micro_batches(base)):
            plan = replace(base, recompute=items, micro_batch=micro_batch)
            n_micro = max(1, plan.n_micro)
            for vpp in self.chunk_counts(plan.pp, n_micro):
                yield self.scheduled(plan, vpp, n_micro)

    def guessed_cuts(self):
        """The row with each of some usual cuts, for one that states none."""
        experts = (8, 32) if self.number("n_experts") else (1,)
        for tp, pp, ep in product((1, 8), (1, 4, 8, 16), experts):
            guess = dict(tp=tp, pp=pp, ep=ep, vpp=self.text("vpp") or min(2, pp), cp=self.text("cp") or 1,
                         micro_batch=self.text("micro_batch") or 1)
            yield Row(self.cells | {name: str(value) for name, value in guess.items()}, 0)

    def base_plan(self, hardware):
        """The plan but for micro-batch, recomputation, chunks and schedule. Data ranks are what the devices leave."""
        tp, pp, cp = (self.number(axis, 1) or 1 for axis in ("tp", "pp", "cp"))
        devices = self.number("n_devices") or tp * pp * cp * max(1, self.number("dp", 1))
        ep, etp = (self.number(axis, 1) or 1 for axis in ("ep", "etp"))
        dp = max(1, devices // (tp * pp * cp))
        exchange = self.text("moe_dispatch")
        dispatch = "dedup" if exchange in PIPELINED else "hierarchical" if exchange == "hierarchical" else "flat"
        return RowPlan(
            tp=tp, pp=pp, cp=cp, dp=dp, ep=ep, etp=etp, global_batch=self.number("global_batch") or dp * pp * 8,
            sp=self.number("sp", int(tp > 1)), seq_len=self.number("seq_len", 4096), zero=self.zero(),
            node_size=2**int(math.log2(min(hardware.node_size, max(devices, 8)))), precision=self.precision(),
            dispatch=dispatch, pipelined=exchange in PIPELINED, hide=self.hide())

    def zero(self):
        shard = self.text("dp_shard")
        return 3 if "3" in shard else 0 if "ddp" in shard else 1

    def precision(self):
        return next((name for name in BYTES_OF if self.text("precision").startswith(name)), "bf16")

    def hide(self):
        overlap = self.text("overlap").lower()
        return tuple({axis for word, axis in HIDE_WORDS if word in overlap})

    def recompute_choices(self):
        stated = self.text("recompute").lower()
        items = next((items for word, items in RECOMPUTE_WORDS if word in stated), None)
        return GAPS if items is None else [items]

    def micro_batches(self, plan):
        """Sequences of a micro-batch: as stated, else any of a few with which each data rank gets one."""
        stated = self.number("micro_batch")
        sizes = [stated] if stated else [1, 2, 4, 8]
        return [size for size in sizes if size * plan.dp <= plan.global_batch] or [1]

    def chunk_counts(self, pp, n_micro):
        """Chunks of a pipeline rank: as its schedule has or as stated, else any that cut the layers evenly."""
        stated, layers = self.number("vpp"), self.number("n_layers")
        if self.text("schedule") == "dualpipe":
            return [2]
        if self.text("schedule") in ("1f1b", "none") or pp == 1:
            return [1]
        if stated:
            return [stated]
        return divisors(max(1, layers // pp)) if layers % pp == 0 and n_micro % pp == 0 else [1]

    def scheduled(self, plan, vpp, n_micro):
        """The plan with a schedule of `vpp` chunks, and with as many of n_micro micro-batches as that can run."""
        sequences = plan.dp * plan.micro_batch             # of a micro-batch, on all data ranks
        if vpp > 1 and n_micro >= plan.pp:
            n_micro = n_micro // plan.pp * plan.pp
        if self.text("schedule") == "dualpipe":            # the nearest that is simulated
            return replace(plan, vpp=2, schedule="paired", overlap="adaptive",
                           global_batch=max(n_micro, 2 * plan.pp) * sequences)
        words = self.text("overlap").lower()
        adaptive = "ep-a2a" in words or "adaptive 1f1b" in words
        schedule = "1f1b" if vpp == 1 else "paired" if adaptive else "interleaved"
        return replace(plan, vpp=vpp, schedule=schedule, overlap="adaptive" if adaptive else "none",
                       global_batch=n_micro * sequences, layer_split=self.layer_split(plan.pp * vpp))

    def layer_split(self, stages):
        """Layers of each stage: as stated, else equal, embedding and head may stand for layers, else () for by cost."""
        layers, stated = self.number("n_layers"), re.fullmatch(r"\d+(,\d+)+", self.text("layer_split"))
        if stated:
            split = [int(n) for n in self.text("layer_split").split(",")]
            if len(split) == stages and sum(split) == layers:
                return split
        ends = next((ends for ends in (0, 2, 1) if (layers + ends) % stages == 0), None)
        ends = 2 if self.text("layer_split").startswith("embedding and head") else ends
        if ends is None:
            return ()                                                     # by cost, as any plan that does not say
        each, more = divmod(layers + ends, stages)
        split = [each + (0 < stage <= more) for stage in range(stages)]
        split[0] -= ends == 2
        split[-1] -= ends > 0
        return split


def read_rows(path):
    try:
        with open(path, newline="") as file:
            return [Row(cells, number) for number, cells in enumerate(csv.DictReader(file), 2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"rows={path}: {error}: use a CSV file with the columns of {ROWS.name}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Rows predicted, and how far the predictions are off


def simulate_row(row, plan, hardware):
    """(seconds of a step of the row's global batch, parts of the memory of its fullest rank in bytes)."""
    run = RowSimulation(row.shape(), plan, hardware, row.max_vio(), work=RowWork)
    seconds = sum(run.breakdown()[0].values())
    memory = max((run.memory(rank) for rank in range(plan.pp)), key=lambda parts: sum(parts.values()))
    return seconds * (row.number("global_batch") or plan.global_batch) / plan.global_batch, memory


def choose_plan(row, hardware):
    """Of the plans that a row may mean: the first recomputation that fits, with it the fastest, as short steps tell."""
    plans = list(row.plans(hardware))
    if len(plans) == 1:
        return plans[0]
    order, tried = list(dict.fromkeys(plan.recompute for plan in plans)), []
    for plan in plans:
        short = replace(plan, global_batch=min(plan.n_micro, 3 * plan.pp) * plan.dp * plan.micro_batch)
        seconds, memory = simulate_row(row, short, hardware)
        seconds *= 1 if row.number("global_batch") else plan.n_micro / short.n_micro
        too_much = max(0.0, sum(memory.values()) - memory["allocator"] - hardware.memory)
        tried.append((too_much, order.index(plan.recompute), seconds, plan))
    return min(tried, key=lambda one: one[:3])[3]


def predict_row(row):
    hardware = row.hardware()
    plan = choose_plan(row, hardware)
    seconds, memory = simulate_row(row, plan, hardware)
    needed, kind = sum(memory.values()), row.text("mem_kind")
    # a reading by the program has no libraries in it, and of what is allocated no unused pieces
    shown = needed - memory["framework"] * ("allocated" in kind or "reserved" in kind)
    shown -= memory["allocator"] * ("allocated" in kind)
    return dict(row_id=row.name, step_time_s=seconds, mem_gib=shown / GIB,
                fits=int(needed - memory["allocator"] <= hardware.memory), plan=plan)


class Timed(NamedTuple):
    row: Row
    measured: float                # seconds of a step
    predicted: float

    @property
    def error(self):
        return abs(self.predicted / self.measured - 1)

    @property
    def task(self):
        """What two plans must share to be compared."""
        return [self.row.text(name) for name in ("family", "model", "n_devices", "seq_len")]


def timed_rows(rows, found):
    """list of Timed: of all rows that say how long a step took."""
    timed = [Timed(row, row.step_seconds(one["plan"]), one["step_time_s"]) for row, one in zip(rows, found)]
    return [one for one in timed if one.measured]


def ordered_pairs(timed):
    """For each two plans of one model, on as many devices, with sequences as long, whose measured times of a sequence
    are more than 4 % apart: whether the prediction has them in this order."""
    right = []
    for one, two in combinations(timed, 2):
        if one.task != two.task:
            continue
        batches = [each.row.number("global_batch", 1) for each in (one, two)]
        measured = one.measured / batches[0], two.measured / batches[1]
        predicted = one.predicted / batches[0], two.predicted / batches[1]
        if max(measured) > 1.04 * min(measured):
            right.append((measured[0] < measured[1]) == (predicted[0] < predicted[1]))
    return right


def print_errors(timed):
    print("step time, absolute error         rows    mean  median")
    print_error_line("all", timed)
    for title in (lambda row: f"{row.text('vendor')} {row.text('arch')}", lambda row: f"  {row.text('family')}"):
        groups = {}
        for one in timed:
            groups.setdefault(title(one.row), []).append(one)
        for name, group in groups.items():
            print_error_line(name, group)
    right = ordered_pairs(timed)
    print(f"pairs of plans of one model, more than 4 % apart, in order: {sum(right)} of {len(right)}, "
          f"{np.mean(right or [0]):.1%}")


def print_error_line(name, timed):
    errors = [one.error for one in timed]
    if errors:
        print(f"{name:32} {len(errors):5} {np.mean(errors):7.1%} {np.median(errors):7.1%}")


def print_memory(rows, found):
    errors = [abs(one["mem_gib"] / row.measured("mem_gib") - 1) for row, one in zip(rows, found)
              if row.measured("mem_gib")]
    print(f"memory, absolute error: {len(errors)} rows, mean {np.mean(errors or [0]):.1%}, "
          f"median {np.median(errors or [0]):.1%}")
    for title, oom in (("working runs rejected", "0"), ("out-of-memory runs accepted", "1")):
        fits = {row.name: one["fits"] for row, one in zip(rows, found) if row.text("oom") == oom}
        wrong = [name for name, one in fits.items() if one == int(oom)]
        print(f"{title}: {len(wrong)} of {len(fits)}", *wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Constants fitted to the rows


class Bounds(NamedTuple):
    """Of a constant. priors: one for each of GENERATIONS, or one for all; where low equals high, that is its value."""
    low: float
    high: float
    priors: tuple


# Priors: matmul and memory of A100 and H100 by stas00/ml-engineering and Calculon, of B200 by SimuMax's measurements,
# of 910B by msmodeling and HCCS collectives (19 of 28 GB/s a link); attention by arXiv:2307.08691 and 2407.08608;
# others assumed. Units: see CONSTANTS in sim.py, and RowHardware.
FITTED = {
    "matmul_efficiency": Bounds(0.4, 0.97, (0.80, 0.70, 0.55, 0.70)),
    "matmul_half": Bounds(60, 60, (60,)),
    "tokens_half": Bounds(30, 600, (256,)),
    "grouped_efficiency": Bounds(0.70, 1.0, (0.85, 0.85, 0.85, 0.70)),
    "fp8_efficiency": Bounds(0.5, 1.0, (0.75,)),
    "attention_efficiency": Bounds(0.2, 0.8, (0.60, 0.55, 0.60, 0.55)),
    "portable_attention": Bounds(0.3, 1.0, (0.6,)),
    "attention_half": Bounds(400, 400, (400,)),
    "memory_efficiency": Bounds(0.3, 0.95, (0.70, 0.65, 0.67, 0.60)),
    "inner_efficiency": Bounds(0.4, 0.9, (0.70, 0.70, 0.66, 0.665)),
    "outer_efficiency": Bounds(0.3, 0.95, (0.80, 0.80, 0.80, 0.80)),
    "static_matmul": Bounds(5e-6, 5e-6, (5e-6,)),
    "static_vector": Bounds(4e-6, 4e-6, (4e-6,)),
    "static_collective": Bounds(2e-5, 2e-5, (2e-5,)),
    "hidden_share": Bounds(0.2, 0.95, (0.7,)),
    "overlap_tax": Bounds(0.15, 0.15, (0.15,)),
    "scale_loss": Bounds(1e-3, 0.03, (0.01,)),
}


class Constant(NamedTuple):
    name: str
    generation: str                # one of GENERATIONS, or "all"

    def is_of(self, hardware):
        return self.generation in ("all", hardware.generation)


class Fit:
    """Of FITTED to rows: Gauss-Newton steps on logarithms, from the priors, for least absolute errors.

    hold: a constant this far from its prior, in its logarithm, weighs as much as one row that is 10 % off.
    """
    hold, steps = 0.6, 6

    def __init__(self, rows, found):
        timed = [(row, one["plan"]) for row, one in zip(rows, found) if row.measured("step_time_s")]
        self.rows = [row for row, _ in timed]
        self.plans = [plan for _, plan in timed]
        self.measured = np.log([row.measured("step_time_s") for row in self.rows])
        self.weights = np.array([0.3 if row.text("quality") == "C" else 1.0 for row in self.rows])
        self.constants, prior, low, high = [], [], [], []
        for name, bounds in FITTED.items():
            for generation, one in zip(GENERATIONS if len(bounds.priors) > 1 else ("all",), bounds.priors):
                self.constants.append(Constant(name, generation))
                prior.append(one)
                low.append(bounds.low)
                high.append(bounds.high)
        self.prior, self.low, self.high = np.log(prior), np.log(low), np.log(high)

    def error(self, i, logs):
        """Logarithm of predicted over measured time of a row."""
        hardware = self.rows[i].hardware()
        mine = {constant.name: math.exp(x) for constant, x in zip(self.constants, logs) if constant.is_of(hardware)}
        seconds, _ = simulate_row(self.rows[i], self.plans[i], replace(hardware, **mine))
        return math.log(seconds) - self.measured[i]

    def errors(self, logs):
        return np.array([self.error(i, logs) for i in range(len(self.rows))])

    def slopes(self, logs, errors):
        """(rows, constants): change of a row's error with the logarithm of a constant."""
        slopes, step = np.zeros((len(errors), len(logs))), 0.03
        for j, constant in enumerate(self.constants):
            if self.low[j] == self.high[j]:
                continue
            nudged = logs.copy()
            nudged[j] += step
            for i, row in enumerate(self.rows):
                if constant.is_of(row.hardware()):
                    slopes[i, j] = (self.error(i, nudged) - errors[i]) / step
        return slopes

    def best(self, logs, errors, slopes, weights):
        """The constants that fit best if errors followed their slopes. Reweighted least squares: absolute errors."""
        moved = logs
        for _ in range(50):
            weight = weights / np.maximum(np.abs(errors + slopes @ (moved - logs)), 0.03)
            left = slopes.T @ (weight[:, None] * slopes) + np.eye(len(logs)) / self.hold**2
            right = slopes.T @ (weight * errors) + (logs - self.prior) / self.hold**2
            moved = np.clip(logs - np.linalg.solve(left, right), self.low, self.high)
        return moved

    def fitted(self):
        """The constants that fit all rows best: steps towards the best by the slopes where the last step ended."""
        logs = self.prior
        for _ in range(self.steps):
            errors = self.errors(logs)
            slopes = self.slopes(logs, errors)
            logs = logs + np.clip(self.best(logs, errors, slopes, self.weights) - logs, -0.5, 0.5)
        return logs

    def left_out(self, logs, errors):
        """Errors of each family's rows under the others' best constants, by the slopes where all are best."""
        slopes, families = self.slopes(logs, errors), np.array([row.text("family") for row in self.rows])
        unseen = np.zeros(len(errors))
        for family in dict.fromkeys(families):
            others = self.best(logs, errors, slopes, self.weights * (families != family))
            for i in np.flatnonzero(families == family):
                unseen[i] = self.error(i, others)
        return unseen

    def print_errors(self, errors):
        print_errors([Timed(*one) for one in zip(self.rows, np.exp(self.measured), np.exp(self.measured + errors))])

    def print_constants(self, logs):
        """As lines of CONSTANTS in sim.py; portable_attention and hidden_share are defaults of RowHardware."""
        print("\nfitted constants, of", *GENERATIONS, "or of all")
        for name in FITTED:
            fitted = [float(f"{math.exp(x):.3g}") for constant, x in zip(self.constants, logs) if constant.name == name]
            print(f'    "{name}": {tuple(fitted)},')

    def report(self):
        logs = self.fitted()
        errors = self.errors(logs)
        print("\nfitted on all rows")
        self.print_errors(errors)
        self.print_constants(logs)
        print("\neach family predicted from the others")
        self.print_errors(self.left_out(logs, errors))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def report_rows(path, out, fit):
    rows = read_rows(path)
    found = [predict_row(row) for row in rows]
    for message in dict.fromkeys(chain(*(row.faults for row in rows))):
        print(message, file=sys.stderr)
    if out:
        write_predictions(out, found)
    print(f"{len(found)} rows of {path.name} predicted with the frozen constants")
    print_errors(timed_rows(rows, found))
    print_memory(rows, found)
    if fit:
        Fit(rows, found).report()


def write_predictions(path, found):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ("row_id", "step_time_s", "mem_gib", "fits"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(found)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Published training runs beside their simulation: errors by group.")
    parser.add_argument("rows", nargs="?", help=f"CSV file with the columns of {ROWS.name}, the default")
    parser.add_argument("--out", help="write row_id, step_time_s (s), mem_gib (GiB), fits (0 or 1) to this CSV file")
    parser.add_argument("--fit", action="store_true", help="refit the constants, on all rows and without each family")
    args = parser.parse_args(argv)
    path = Path(args.rows or ROWS)
    require(not (args.fit and args.rows), f"--fit with {args.rows}: a file is predicted, never fitted; drop one")
    require(not args.out or Path(args.out).resolve() != path.resolve(),
            f"--out {args.out}: would overwrite the rows; name another file")
    report_rows(path, args.out, args.fit)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"published.py: {error}", file=sys.stderr)
        sys.exit(2)
