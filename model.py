"""
A big mixture-of-experts language model in one file: the recipe of Pangu Ultra MoE (arXiv:2505.04519).

Multi-head latent attention, fine-grained routed experts beside a shared one, depth-scaled sandwich norm, TinyInit,
multi-token prediction and a balance loss over groups of sequences. Written for one device: nothing here knows of
process groups. parallel.py takes a built model and spreads it; what the model carries only for that sake is this:

    MoE.dispatcher          who brings rows to experts and back; here the local one, there an exchange between ranks
    Router.average_counts   the identity here, an average over the ranks of a balance group there
    Attention.gather_context   the identity here, latents of the whole sequence there, where ranks hold parts of one
    Part.memory             keeps all that backward needs; there some is computed again, or waits in the host's memory
    Linear.store            a WeightGradStore that delays weight gradients, so that they can hide an exchange
    Block's four calls      attend, dispatch, compute, combine: two micro-batches can be interleaved between them
    embed_tokens, norm, lm_head, layers   may be None or a subset: a pipeline stage is the model minus the rest
    Experts.with_copies     the identity here; there it adds copies of experts that live on other ranks
    Experts.first_expert    the number of the first expert held here, so that seeding does not depend on the cut

Legend of dimensions: B batch, T sequence, C model width, H heads, D head width, N tokens (B*T), K experts per token,
E experts, M rows sent to experts, I expert width, V vocabulary, G balance groups.

References. PU: Pangu Ultra, arXiv:2504.07866 (the dense sister model: norms and initialisation). PP: Pangu Pro MoE,
arXiv:2505.21411 (balance loss, experts chosen equally from groups). DS: DeepSeek-V3, arXiv:2412.19437 (latent
attention, router bias, group-limited choice, multi-token prediction).
"""
import hashlib
import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Config and presets


def require(ok, message):
    if not ok:
        raise ValueError(message)


def divisors(n):
    """All divisors of n, ascending: for messages that say what would fit."""
    return [d for d in range(1, n + 1) if n % d == 0]


class Weights(NamedTuple):
    """A matmul's weight matrices: `n_in` inputs, `n_out` outputs; `copies` of them, of which a token uses `used`."""
    n_in: int
    n_out: int
    copies: int = 1
    used: int = 1


@dataclass(frozen=True)
class Config:
    """A model's shape, in the spelling of DeepSeek-style configs. Checked when made."""
    vocab_size: int = 2048
    hidden_size: int = 192
    num_hidden_layers: int = 3
    first_k_dense_replace: int = 1            # leading layers with a dense MLP in place of experts
    intermediate_size: int = 512              # width of the dense MLP
    # multi-head latent attention
    num_attention_heads: int = 4
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32                # part of a head's query and key without position
    qk_rope_head_dim: int = 16                # part with rotary position; its key is shared by all heads
    v_head_dim: int = 32
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None          # YaRN: type, factor, original_max_position_embeddings, beta_*, mscale*
    max_position_embeddings: int = 1024
    # experts
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    scoring_func: str = "sigmoid"             # sigmoid | softmax
    norm_topk_prob: bool = True               # chosen scores are divided by their sum ...
    routed_scaling_factor: float = 2.5        # ... and multiplied by this
    n_group: int = 1                          # groups of experts
    topk_group: int = 1                       # groups a token may choose from (group_choice=limited)
    group_choice: str = "limited"             # limited: topk_group of n_group (DS) | equal: K/n_group from each (PP)
    router_bias: bool = False                 # added to scores for the choice alone; moved by load, not by a loss (DS)
    bias_update_speed: float = 0.001
    capacity_factor: float = 0.0              # 0: dropless; else an expert takes capacity_factor * N * K / E rows
    expert_weight: str = "before_down"        # the routing weight multiplies before_down (expert-wide) | after_down
    # balance loss
    balance: str = "ep_group"                 # none | sequence | micro_batch | ep_group | dp_group
    balance_group: int = 0                    # sequences in a group; 0: made definite when a run starts, from its Plan
    aux_loss_alpha: float = 0.01              # the paper's best of those it tried, for ep_group
    aux_scores: str = "normalized"            # normalized: s / sum s | softmax of the logits (PP) | raw; not published
    # multi-token prediction
    num_nextn_predict_layers: int = 1
    mtp_loss_weight: float = 0.3              # not published for this model; DS starts with 0.3
    mtp_hidden: str = "pre_norm"              # h entering hnorm: pre_norm (raw residual stream) | post_norm
    mtp_concat: str = "embed_first"           # halves of eh_proj's input: embed_first | hidden_first
    # norms and initialisation
    norm: str = "dssn"                        # dssn (depth-scaled sandwich) | sandwich | pre
    dssn_c_attn: float = 0.283                # PU's, for its 135B model; those of the 718B model are not published
    dssn_c_mlp: float = 0.432
    init: str = "tiny"                        # tiny (TinyInit) | small
    rms_norm_eps: float = 1e-5
    latent_norm_eps: float = 1e-6             # q_a and kv_a norms: released codes disagree, 1e-6 or 1e-5
    tie_word_embeddings: bool = False

    def __post_init__(self):
        check_config(self)

    @property
    def qk_head_dim(self):
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    # what layers compute with: the one table that all counts are made from, of parameters and FLOPs below, and by
    # stage, operator and rank in sim.py, whose Shape describes other models by other methods

    def matmuls(self, kind):
        """{name: Weights} of a layer of one of layer_kinds, or of kind "head"."""
        width, inner = self.hidden_size, self.moe_intermediate_size
        if kind == "head":
            return dict(lm_head=Weights(width, self.vocab_size))
        if kind == "dense":
            return self.attention_matmuls() | self.mlp_matmuls("mlp", self.intermediate_size)
        table = self.attention_matmuls() | dict(router=Weights(width, self.n_routed_experts))
        if self.n_shared_experts:
            table |= self.mlp_matmuls("shared", self.n_shared_experts * inner)
        table |= self.mlp_matmuls("expert", inner, self.n_routed_experts, self.num_experts_per_tok)
        return table | dict(eh_proj=Weights(2 * width, width)) if kind == "mtp" else table

    def attention_matmuls(self):
        heads, width = self.num_attention_heads, self.hidden_size
        return dict(q_a_proj=Weights(width, self.q_lora_rank),
                    q_b_proj=Weights(self.q_lora_rank, heads * self.qk_head_dim),
                    kv_a_proj_with_mqa=Weights(width, self.kv_lora_rank + self.qk_rope_head_dim),
                    kv_b_proj=Weights(self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim)),
                    o_proj=Weights(heads * self.v_head_dim, width))

    def mlp_matmuls(self, name, inner, copies=1, used=1):
        """Gate and up count as one."""
        return {f"{name}.gate_up": Weights(self.hidden_size, 2 * inner, copies, used),
                f"{name}.down": Weights(inner, self.hidden_size, copies, used)}

    def attention_widths(self):
        """Elements of all heads' queries, and of their values."""
        return self.num_attention_heads * self.qk_head_dim, self.num_attention_heads * self.v_head_dim

    def gains(self, kind):
        """Parameters of a layer's norms."""
        joining = 3 if kind == "mtp" else 0                               # enorm, hnorm, shared_head.norm
        return ((2 if self.norm == "pre" else 4) + joining) * self.hidden_size + self.q_lora_rank + self.kv_lora_rank


CHOICES = dict(
    scoring_func=("sigmoid", "softmax"), group_choice=("limited", "equal"), expert_weight=("before_down", "after_down"),
    balance=("none", "sequence", "micro_batch", "ep_group", "dp_group"), aux_scores=("normalized", "softmax", "raw"),
    mtp_hidden=("pre_norm", "post_norm"), mtp_concat=("embed_first", "hidden_first"), norm=("dssn", "sandwich", "pre"),
    init=("tiny", "small"))
YARN_KEYS = {"type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}


def check_config(c):
    """ValueError, in one line with the numbers and what would fit, for a shape that cannot be built."""
    for name, allowed in CHOICES.items():
        require(getattr(c, name) in allowed, f"{name}={getattr(c, name)!r}: use one of {', '.join(allowed)}")
    may_be_zero = {"first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers", "balance_group",
                   "capacity_factor", "aux_loss_alpha", "mtp_loss_weight", "bias_update_speed"}
    for field in fields(c):
        value, zero = getattr(c, field.name), field.name in may_be_zero
        if field.type in (int, float):
            kind, known = ("whole number", int) if field.type is int else ("number", (int, float))
            require(isinstance(value, known) and (value > 0 or zero and value == 0),
                    f"{field.name}={value!r}: use a {kind} {'of at least' if zero else 'above'} 0")

    experts, k, groups = c.n_routed_experts, c.num_experts_per_tok, c.n_group
    reach = c.topk_group * experts // groups if c.group_choice == "limited" else experts
    require(c.first_k_dense_replace <= c.num_hidden_layers,
            f"first_k_dense_replace={c.first_k_dense_replace}: use 0 to num_hidden_layers={c.num_hidden_layers}")
    require(k <= experts, f"num_experts_per_tok={k} above n_routed_experts={experts}: use 1 to {experts}")
    require(experts % groups == 0, f"n_group={groups} does not divide n_routed_experts={experts}: use one of "
                                   f"{divisors(experts)}")
    require(c.group_choice == "limited" or k % groups == 0,
            f"n_group={groups} does not divide num_experts_per_tok={k}, which group_choice=equal needs: use one of "
            f"{[d for d in divisors(k) if experts % d == 0]}")
    require(c.topk_group <= groups, f"topk_group={c.topk_group} above n_group={groups}: use 1 to {groups}")
    require(k <= reach, f"num_experts_per_tok={k} above the {reach} experts of topk_group={c.topk_group} groups: use "
                        f"topk_group={math.ceil(k * groups / experts)} or num_experts_per_tok up to {reach}")
    require(c.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim={c.qk_rope_head_dim} is odd, rotary position turns pairs: use {c.qk_rope_head_dim + 1}")
    require(c.v_head_dim <= c.qk_head_dim,
            f"v_head_dim={c.v_head_dim} above the query's width, fused attention refuses that: up to {c.qk_head_dim}")
    if c.rope_scaling is not None:
        scaling, needed = c.rope_scaling, ("factor", "original_max_position_embeddings")
        right = isinstance(scaling, dict) and scaling.get("type") == "yarn" and set(scaling) <= YARN_KEYS
        right = right and all(isinstance(scaling.get(name), (int, float)) and scaling[name] >= 1 for name in needed)
        require(right, f"rope_scaling={scaling!r}: use null, or an object with type=yarn, {' and '.join(needed)} of at "
                       f"least 1, and no keys but {sorted(YARN_KEYS)}")


def _fixed(vocab, sequence, hidden, layers, dense, heads, ranks, dims, experts, width, top_k, **rest):
    """A preset written as one row; ranks are (q, kv), dims (nope, rope, v)."""
    return Config(vocab_size=vocab, max_position_embeddings=sequence, hidden_size=hidden, num_hidden_layers=layers,
                  intermediate_size=dense, num_attention_heads=heads, q_lora_rank=ranks[0], kv_lora_rank=ranks[1],
                  qk_nope_head_dim=dims[0], qk_rope_head_dim=dims[1], v_head_dim=dims[2], n_routed_experts=experts,
                  moe_intermediate_size=width, num_experts_per_tok=top_k, **rest)


_PANGU = _fixed(153600, 131072, 7680, 61, 18432, 128, (1536, 512), (128, 64, 128), 256, 2048, 8,
                first_k_dense_replace=3, rope_theta=25_600_000.0)

PRESETS = {
    # the first run, on two CPU cores
    "tiny": Config(),
    # one modest GPU or NPU
    "small": _fixed(32768, 4096, 1024, 12, 4096, 8, (384, 256), (128, 64, 128), 32, 512, 4),
    # exactly the published tensors
    "pangu-ultra-moe-718b": _PANGU,
    "deepseek-v3-671b": replace(
        _PANGU, vocab_size=129280, max_position_embeddings=163840, hidden_size=7168, rope_theta=1e4, rms_norm_eps=1e-6,
        rope_scaling=dict(type="yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0,
                          beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
        n_group=8, topk_group=4, router_bias=True, norm="pre", init="small", balance="sequence", aux_loss_alpha=0.0001),
    # fixed sizes, for comparisons
    "cpu-small": _fixed(4096, 256, 256, 8, 640, 4, (96, 64), (32, 16, 32), 16, 128, 4),
    "cpu-fine": _fixed(4096, 256, 256, 8, 576, 4, (96, 64), (32, 16, 32), 64, 64, 8),
    "one-gpu": _fixed(32768, 4096, 2048, 12, 9216, 16, (768, 512), (128, 64, 128), 64, 1024, 8),
    "one-gpu-256": _fixed(32768, 4096, 2048, 8, 4608, 16, (768, 512), (128, 64, 128), 256, 512, 8),
}


# ---------------------------------------------------------------------------------------------------------------------
# Counts, from Config alone


def layer_kinds(config):
    """Kind of each layer, in order: dense, moe (with experts), or mtp (moe, with what joins it to the embedding)."""
    n_dense, n_mtp = config.first_k_dense_replace, config.num_nextn_predict_layers
    return ["dense"] * n_dense + ["moe"] * (config.num_hidden_layers - n_dense) + ["mtp"] * n_mtp


def count_params(config):
    """Parameters as a dict: total and active (per token) without MTP, embedding, head, mtp (without the shared two).

    Router biases are not counted: they are moved by a rule, not learnt.
    """
    c, kinds = config, layer_kinds(config)
    total, active = {}, {}
    for kind in set(kinds):
        weights, gains = c.matmuls(kind).values(), c.gains(kind)
        total[kind] = gains + sum(w.copies * w.n_in * w.n_out for w in weights)
        active[kind] = gains + sum(w.used * w.n_in * w.n_out for w in weights)
    hidden = kinds[:c.num_hidden_layers]
    embedding = c.vocab_size * c.hidden_size
    head = 0 if c.tie_word_embeddings else embedding
    outside = embedding + head + c.hidden_size                             # with the last norm
    return dict(total=sum(total[kind] for kind in hidden) + outside,
                active=sum(active[kind] for kind in hidden) + outside, embedding=embedding, head=head, mtp=c.num_nextn_predict_layers * total.get("mtp", 0))


def layer_flops(config, kind, seq_len):
    """FLOPs of a token's forward in a layer, or the head: two a weight it uses, and causal attention, half the scores."""
    matmuls = sum(2 * w.used * w.n_in * w.n_out for w in config.matmuls(kind).values())
    return matmuls + (0 if kind == "head" else seq_len * sum(config.attention_widths()))


def flops_per_token(config, seq_len):
    """Model FLOPs of training on one token: 6 x active matmul parameters, head and MTP included, + causal attention.

    Backward is two forwards. The head counts once per depth of prediction, recomputation never.
    """
    kinds = layer_kinds(config) + ["head"] * (1 + config.num_nextn_predict_layers)
    return 3 * sum(layer_flops(config, kind, seq_len) for kind in kinds)


# ---------------------------------------------------------------------------------------------------------------------
# Operators: a plain body that explains, and a fused branch for CPU and CUDA (torch's own) and for NPU (torch_npu's)

FUSED = True              # False: every operator takes its plain body; tests compare the two
LOGIT_ELEMENTS = 2**20    # float32 logits that cross_entropy holds at a time (4 MiB), but at least 512 rows of them


def backend(x):
    """The body an operator takes for x: 'plain', or the fused branch of its device: 'cpu', 'cuda' or 'npu'."""
    kind = x.device.type
    return kind if FUSED and kind in ("cpu", "cuda", "npu") else "plain"


def at_least_float32(dtype):
    """Norms, softmax, rotary position, router and loss compute in float32 or better; float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x, weight, eps):
    """weight * (x / rms(x) in float32, cast back): x (..., C), weight (C,)."""
    if backend(x) == "npu":
        return torch.ops.npu.npu_rms_norm(x, weight.to(x.dtype), eps)[0]
    if backend(x) == "cuda":
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    if backend(x) == "plain":
        x32 = x.to(at_least_float32(x.dtype))
        return weight.to(x.dtype) * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return RMSNorm.apply(x, weight, eps)


class RMSNorm(torch.autograd.Function):
    """The plain body with its backward written out: half the passes over memory of autograd's, which a CPU feels."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x32 = x.to(at_least_float32(x.dtype))
        scale = (torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_() / x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)                          # scale (..., 1)
        return (x32 * scale).to(x.dtype).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        gain, grad32 = weight.to(scale.dtype), grad.to(scale.dtype)  # float32 or better: mixed dtypes are slow on CPU
        normed = x.to(scale.dtype) * scale
        product = grad32 * normed
        mean = (product @ gain / x.size(-1)).unsqueeze(-1)
        grad_x = (grad32 * gain).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), product.flatten(0, -2).sum(0).to(weight.dtype), None


def swiglu(gate_up, row_weights=None):
    """silu(gate) * up, times a weight per row: gate_up (..., 2I) with gate first, row_weights (M,) -> (..., I)."""
    if backend(gate_up) == "npu":
        hidden = torch.ops.npu.npu_swiglu(gate_up, -1)
    elif backend(gate_up) == "plain":
        gate, up = gate_up.chunk(2, -1)
        hidden = F.silu(gate) * up
    else:
        return SwiGLU.apply(gate_up, row_weights)
    return hidden if row_weights is None else hidden * row_weights.unsqueeze(-1)


class SwiGLU(torch.autograd.Function):
    """Keeps its inputs alone; autograd would keep silu(gate) and the unweighted product too."""

    @staticmethod
    def forward(ctx, gate_up, row_weights):
        ctx.save_for_backward(gate_up, row_weights)
        gate, up = gate_up.chunk(2, -1)
        hidden = F.silu(gate).mul_(up)
        return hidden if row_weights is None else hidden.mul_(row_weights.unsqueeze(-1))

    @staticmethod
    def backward(ctx, grad):
        gate_up, row_weights = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, -1)
        scale = 1.0 if row_weights is None else row_weights.unsqueeze(-1)
        part = F.silu(gate).mul_(grad)                                    # one buffer: memory passes are the cost
        torch.mul(part, scale, out=grad_up)
        grad_weights = None
        if row_weights is not None:
            grad_weights = part.mul_(up).sum(-1, dtype=at_least_float32(grad.dtype)).to(row_weights.dtype)
        torch.mul(grad, up, out=part).mul_(scale)
        torch.ops.aten.silu_backward.grad_input(part, gate, grad_input=grad_gate)
        return grad_gate_up, grad_weights


def rope(x, cos, sin):
    """Turn interleaved pairs (x0, x1), (x2, x3), ... by their angles: x (B,T,H,D), cos and sin (B or 1, T, 1, D/2)."""
    if backend(x) == "npu" and cos.size(0) == 1:                          # the fused operator takes no batch of angles
        cos, sin = (t.repeat_interleave(2, -1).to(x.dtype) for t in (cos, sin))
        return torch.ops.npu.npu_rotary_mul(x.contiguous(), cos, sin, "interleave")
    even, odd = x[..., 0::2], x[..., 1::2]                                # float32 angles: the products are float32
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def attention(q, k, v, scale, mask=None):
    """Softmax attention: q, k (B,T,H,Dqk), v (B,T,H,Dv) -> (B,T,H,Dv); causal unless mask (B,1,T,T), True = attend."""
    kind = backend(q)
    if kind == "npu":                                                     # its masks say True for what is left out
        left_out, mode = (causal_triangle(q.device), 2) if mask is None else (~mask, 1)
        return torch.ops.npu.npu_fusion_attention(q, k, v, q.size(2), "BSND", atten_mask=left_out, scale=scale,
                                                  sparse_mode=mode)[0]
    width = v.size(-1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, as_wide_as_keys(v, k)))  # (B,H,T,D)
    if kind == "plain":
        causal = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
        scores = (q @ k.transpose(-1, -2)).to(at_least_float32(q.dtype)) * scale
        scores = scores.masked_fill(~(causal if mask is None else mask), -math.inf)
        return (scores.softmax(-1).to(q.dtype) @ v).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :width].transpose(1, 2)


def as_wide_as_keys(v, k):
    """Values (..., Dv), padded where the kernel wants it: flash kernels do, cuDNN's on Hopper and later does not."""
    kind, more = backend(v), k.size(-1) - v.size(-1)
    padded = kind == "cpu" or kind == "cuda" and torch.cuda.get_device_capability(v.device) < (9, 0)
    return F.pad(v, (0, more)) if padded and more else v


@lru_cache(None)
def causal_triangle(device):
    """What the NPU's causal mode 2 asks for, whatever the length."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)


class WeightGradStore:
    """Weight gradients put off until popped, so that their matmuls can hide an exchange."""

    def __init__(self):
        self.pending = []

    def __len__(self):
        return len(self.pending)

    def put(self, weight, compute):
        self.pending.append((weight, compute))

    @torch.no_grad()
    def pop(self, count=None):
        """Compute the oldest `count` gradients, by default all."""
        count = len(self.pending) if count is None else count
        now, self.pending = self.pending[:count], self.pending[count:]
        for weight, compute in now:
            grad = compute()
            weight.grad = grad if weight.grad is None else weight.grad.add_(grad)


def grouped_matmul(x, weight, counts, store=None):
    """Each expert's rows by its own matrix: x (M, in) sorted by expert, weight (E, out, in), counts (E,) -> (M, out).

    counts sum to M and stay on the device. A store takes the weight gradient.
    """
    return Matmul.apply(x, weight, counts, store)


class Matmul(torch.autograd.Function):
    """x @ weight^T, expert by expert where there are counts. torch_npu's grouped matmul has no backward, and a weight
    gradient can only be deferred where it is made apart from the input's."""

    @staticmethod
    def forward(ctx, x, weight, counts, store):
        ctx.save_for_backward(x, weight, counts)
        ctx.store, ctx.parameter = store, weight                         # saved tensors may come back as other objects
        w = weight.to(x.dtype)
        return F.linear(x, w) if counts is None else matmul_by_expert(x, w.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx, grad):
        x, weight, counts = ctx.saved_tensors
        grad, w = grad.contiguous(), weight.to(grad.dtype)                # grouped_mm refuses strides of 0

        def weight_grad():
            rows = grad.flatten(0, -2).t()
            return (rows @ x.flatten(0, -2) if counts is None else matmul_by_expert(rows, x, counts)).to(weight.dtype)

        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ w if counts is None else matmul_by_expert(grad, w, counts)
        if ctx.store is not None:
            ctx.store.put(ctx.parameter, weight_grad)
            return grad_x, None, None, None
        return grad_x, weight_grad() if ctx.needs_input_grad[1] else None, None, None


def matmul_by_expert(a, b, counts):
    """Rows a (M,n) by matrices b (E,n,m) -> (M,m); or columns a (n,M) by rows b (M,m), expert by expert -> (E,n,m)."""
    by_rows = b.dim() == 3
    if backend(a) == "npu":                                               # refuses one count alone, so: ends of groups
        ends = counts.cumsum(0, dtype=torch.int64)
        return torch.ops.npu.npu_grouped_matmul([a], [b], group_list=ends, group_list_type=0, split_item=3,
                                                group_type=0 if by_rows else 2)[0]
    # torch's own has no float64, wants rows of whole 16-byte words, and at least one of them
    aligned = all(n * a.element_size() % 16 == 0 for n in (a.size(1) if by_rows else a.size(0), b.size(-1)))
    in_blocks = backend(a) == "cpu" and a.dtype == torch.bfloat16
    if backend(a) != "plain" and not in_blocks and a.dtype != torch.float64 and aligned and a.numel() > 0:
        return F.grouped_mm(a, b, offs=counts.cumsum(0, dtype=torch.int32))
    sizes = counts.tolist()
    if by_rows:
        of_experts = zip(a.split(sizes), b)
        products = [part for x, w in of_experts for part in (matmul_rows_in_blocks(x, w) if in_blocks else [x @ w])]
        return torch.cat(products)
    product = matmul_columns_in_blocks if in_blocks else torch.matmul
    return torch.stack([product(x, y) for x, y in zip(a.split(sizes, 1), b.split(sizes))])


# A CPU's bf16 matmul is compiled anew, and kept, for each number of rows it meets. These two meet few: blocks of 512,
# and a rest of fewer that zeros fill up to a multiple of 128, or to 32.
def rest_of(n):
    """(rows in whole blocks, rows of zeros that fill the rest)."""
    rest = n % 512
    return n - rest, -rest % (32 if rest <= 32 else 128)


def matmul_rows_in_blocks(a, b):
    """a (n,k) @ b (k,m) as two parts: (blocks,m), (rest,m)."""
    blocks, fill = rest_of(len(a))
    rest = F.pad(a[blocks:], (0, 0, 0, fill)) @ b
    return a[:blocks] @ b, rest[:len(a) - blocks]


def matmul_columns_in_blocks(a, b):
    """a (k,n) @ b (n,m) -> (k,m)."""
    blocks, fill = rest_of(len(b))
    rest = F.pad(a[:, blocks:], (0, fill)), F.pad(b[blocks:], (0, 0, 0, fill))
    return torch.addmm(a[:, :blocks] @ b[:blocks], *rest)


def permute(x, ids):
    """Copy every token to its experts, sorted by expert: x (N,C), ids (N,K) -> rows (N*K,C), slot (N,K), a copy's row.

        ids = [[1, 0], [1, 2]]  ->  rows = [x0, x0, x1, x1]  slot = [[1, 0], [2, 3]]
    """
    if backend(x) == "npu":
        rows, slot = torch.ops.npu.npu_moe_token_permute(x, ids.to(torch.int32))
        return rows, slot.view_as(ids)
    slot = sorted_slots(ids)
    return GatherRows.apply(x, slot, slot.numel(), False), slot


def unpermute(rows, slot, padded=False):
    """Sum of each token's rows: rows (M,C), slot (N,K) -> (N,C). Padded: a slot of M is a copy that was dropped."""
    if backend(rows) == "npu" and not padded:                             # the fused operator knows no dropped copies
        ones = torch.ones_like(slot, dtype=rows.dtype)
        return torch.ops.npu.npu_moe_token_unpermute(rows, slot.flatten(), probs=ones)
    return SumRows.apply(rows, slot, padded)


def sorted_slots(ids):
    """Row of every copy once copies are sorted by expert, tokens in order within one: ids (N,K) -> (N,K)."""
    order = torch.argsort(ids.flatten(), stable=True)                     # (N*K,) copy that goes to each row
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device)).view_as(ids)


def count_ids(ids, n_experts):
    """Copies for each expert, without bincount, which would make the host wait: ids (N,K) -> (E,) int64."""
    counts = torch.zeros(n_experts, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))


def copy_to_slots(x, slot, n_rows, padded):
    token = slot.new_full((n_rows + padded,), len(x))                     # of each row; padding rows: one past the end
    copies = torch.arange(len(slot), dtype=slot.dtype, device=x.device).unsqueeze(1).expand_as(slot)
    token.scatter_(0, slot.flatten(), copies.flatten())
    if padded:
        x = torch.cat((x, x.new_zeros(1, x.size(1))))
    return x.index_select(0, token[:n_rows])


def sum_of_slots(rows, slot, padded):
    if padded:                                                            # dropped copies read a zero row past the end
        rows = torch.cat((rows, rows.new_zeros(1, rows.size(1))))
    if backend(rows) in ("plain", "npu"):
        return rows[slot].sum(1)
    return F.embedding_bag(slot, rows, mode="sum")                        # the same without (N,K,C) in memory


class GatherRows(torch.autograd.Function):
    """Copy tokens to the rows that slot (N,K) names, zeros to the others: x (N,C) -> (n_rows,C).

    Its backward is SumRows' forward; autograd's own, an accumulating index_put, is many times slower.
    """

    @staticmethod
    def forward(ctx, x, slot, n_rows, padded):
        ctx.save_for_backward(slot)
        ctx.padded = padded
        return copy_to_slots(x, slot, n_rows, padded)

    @staticmethod
    def backward(ctx, grad):
        return sum_of_slots(grad, *ctx.saved_tensors, ctx.padded), None, None, None


class SumRows(torch.autograd.Function):
    """Its backward is GatherRows' forward."""

    @staticmethod
    def forward(ctx, rows, slot, padded):
        ctx.save_for_backward(slot)
        ctx.shape = len(rows), padded
        return sum_of_slots(rows, slot, padded)

    @staticmethod
    def backward(ctx, grad):
        return copy_to_slots(grad, *ctx.saved_tensors, *ctx.shape), None, None


def cross_entropy(h, weight, targets):
    """Summed loss of the head's logits: h (N,C), weight (V,C), targets (N,), -100 ignored -> float32 or better."""
    if backend(h) == "plain":
        logits = (h @ weight.to(h.dtype).t()).to(at_least_float32(h.dtype))
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return HeadCrossEntropy.apply(h, weight, targets, Vocabulary())


class Vocabulary(NamedTuple):
    """The part of a vocabulary that is here; parallel.py: one of several, on as many ranks."""
    first: int = 0                                                        # number of its first token
    parts: int = 1
    maximum: Callable = lambda x: x                                       # of a number from each part
    sum: Callable = lambda x: x


class HeadCrossEntropy(torch.autograd.Function):
    """Head and loss together, a chunk of rows at a time, so that all (N,V) logits never stand in memory.

    The gradient of a chunk is made while its logits are at hand, for a summed loss; backward only scales it.
    The losses of all parts of a vocabulary sum to that of the whole, as do their gradients of h.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, vocabulary):
        dtype = at_least_float32(h.dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        w = weight.to(h.dtype)
        loss = torch.zeros((), dtype=dtype, device=h.device)
        grad_h = torch.empty_like(h) if needs_grad else None
        grad_w = torch.zeros(weight.shape, dtype=dtype, device=h.device) if needs_grad else None
        step = max(512, LOGIT_ELEMENTS // len(weight))
        for start in range(0, len(h), step):
            rows, label = h[start:start + step], targets[start:start + step].unsqueeze(1)
            kept = (label != -100).to(dtype)                              # (step, 1), 0 for what is ignored
            label = label - vocabulary.first
            here = ((label >= 0) & (label < len(w))).to(dtype)            # (step, 1), 0 also for a label of other parts
            label = label.clamp(0, len(w) - 1)
            logits = (rows @ w.t()).to(dtype)                             # (step, V)
            logits -= vocabulary.maximum(logits.amax(-1, keepdim=True))
            chosen = logits.gather(1, label)
            total = vocabulary.sum(logits.exp_().sum(-1, keepdim=True))
            loss += (total.log() * kept / vocabulary.parts - chosen * here).sum()
            if needs_grad:                                                # softmax, less 1 at the label, in place
                grad = logits.mul_(kept / total).scatter_add_(1, label, -here).to(h.dtype)
                grad_h[start:start + step] = grad @ w
                grad_w += grad.t() @ rows
        ctx.save_for_backward(grad_h, grad_w)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad.to(grad_h.dtype), grad_w * grad, None, None  # autograd casts to the weight's own dtype


class AddGradient(torch.autograd.Function):
    """The identity on x that also sends `scale` back into `loss`: so a balance loss needs no way to the final loss."""

    @staticmethod
    def forward(ctx, x, loss, scale):
        ctx.like, ctx.scale = loss, scale
        return x.clone()                                                  # FSDP warns of views

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.full_like(ctx.like, ctx.scale), None


# ---------------------------------------------------------------------------------------------------------------------
# Rotary position


def rope_table(config, positions, dtype):
    """cos and sin of every position's angles: positions (B or 1, T) -> two of (B or 1, T, 1, D/2), float32 or better.

    With YaRN (arXiv:2309.00071), slow pairs, which turn less than beta_slow times over the original length, are
    stretched by `factor`; fast ones, above beta_fast turns, are kept; those between are mixed.
    """
    c, dtype = config, at_least_float32(dtype)
    pairs = torch.arange(0, c.qk_rope_head_dim, 2, dtype=dtype, device=positions.device)
    frequency = 1.0 / c.rope_theta ** (pairs / c.qk_rope_head_dim)        # (D/2,) radians a token
    scale = 1.0
    if c.rope_scaling is not None:
        s = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0, **c.rope_scaling}
        # the pair, a real number, that turns so often over the original length
        low, high = (c.qk_rope_head_dim * math.log(s["original_max_position_embeddings"] / (turns * 2 * math.pi))
                     / (2 * math.log(c.rope_theta)) for turns in (s["beta_fast"], s["beta_slow"]))
        low, high = max(math.floor(low), 0), min(math.ceil(high), c.qk_rope_head_dim - 1)
        stretched = ((pairs / 2 - low) / max(high - low, 0.001)).clamp(0, 1)   # 0: kept, 1: stretched
        frequency = frequency * (1 - stretched) + frequency / s["factor"] * stretched
        scale = yarn_mscale(s, "mscale") / yarn_mscale(s, "mscale_all_dim")
    angle = positions.to(dtype)[..., None, None] * frequency              # (B, T, 1, D/2)
    return angle.cos() * scale, angle.sin() * scale


def yarn_mscale(scaling, name):
    return 0.1 * scaling.get(name, 0.0) * math.log(scaling["factor"]) + 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class KeepAll:
    """What becomes of tensors that backward needs: here autograd keeps them. parallel.Memory saves some of that memory,
    by the names in Plan.recompute and Plan.swap."""

    def again(self, names, make, *inputs):
        """make(*inputs), a tensor or several. There, under one of the names, made again in backward instead of kept."""
        return make(*inputs)

    def remake(self, names, made, make, *inputs):
        """The same for what was made already, where make is another way to it."""
        return made

    def region(self, name, run, x):
        """run(x). There, under this name, nothing inside is kept: backward runs it again."""
        return run(x)

    def swap(self, name, x):
        """x. There, under this name, it waits for backward in the host's memory."""
        return x


class Part(nn.Module):
    memory = KeepAll()


class Linear(nn.Module):
    """No bias; computes in the input's dtype, so weights may be float32 masters under bfloat16 activations."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.store = None                                                 # a WeightGradStore: gradients are deferred

    def forward(self, x):
        if self.store is None:
            return F.linear(x, self.weight.to(x.dtype))
        return Matmul.apply(x, self.weight, None, self.store)


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(Part):
    """Multi-head latent attention: queries, and keys with values, pass through narrow latents (DS section 2.1.1)."""

    def __init__(self, c):
        super().__init__()
        heads, dim = c.num_attention_heads, c.hidden_size
        self.q_a_proj = Linear(dim, c.q_lora_rank)
        self.q_a_layernorm = Norm(c.q_lora_rank, c.latent_norm_eps)
        self.q_b_proj = Linear(c.q_lora_rank, heads * c.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(dim, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = Norm(c.kv_lora_rank, c.latent_norm_eps)
        self.kv_b_proj = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = Linear(heads * c.v_head_dim, dim)
        self.nope, self.rope, self.v = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        self.gather_tokens = lambda *latents: latents                     # parallel.py: those of a tensor group
        self.gather_context = lambda latent, k_rope: (latent, k_rope)     # parallel.py: those of a whole sequence
        self.scale = c.qk_head_dim ** -0.5
        if c.rope_scaling is not None:                                    # as in DeepSeek-V3's code
            self.scale *= yarn_mscale(c.rope_scaling, "mscale_all_dim") ** 2

    def forward(self, x, angles, mask):
        q_latent = self.memory.again("norm", self.q_a_layernorm, self.q_a_proj(x))
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.kv_a_layernorm.weight.numel(), self.rope), -1)
        latent = self.memory.again("norm", self.kv_a_layernorm, latent)
        q_latent, latent, k_rope = self.gather_tokens(q_latent, latent, k_rope)
        latent, k_rope = self.gather_context(latent, rope(k_rope.unsqueeze(2), *angles))
        q, k, v = self.memory.again("mla_up", self.up, q_latent, latent, k_rope, *angles)
        out = self.memory.swap("attn_out", attention(q, k, v, self.scale, mask))[..., :self.v]
        return self.o_proj(self.memory.swap("attn_out", out.flatten(2)))

    def up(self, q_latent, latent, k_rope, cos, sin):
        """Latents (B,T,*), one rope key (B,T,1,D) for all heads -> q, k, v (B,T,H,*)."""
        # heads are counted from the weight by -1: tensor parallelism gives a rank a part of them
        q = self.q_b_proj(q_latent).unflatten(-1, (-1, self.nope + self.rope))
        q_nope, q_rope = q.split((self.nope, self.rope), -1)
        k_nope, v = self.kv_b_proj(latent).unflatten(-1, (-1, self.nope + self.v)).split((self.nope, self.v), -1)
        q = torch.cat((q_nope, rope(q_rope, cos, sin)), -1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, k_nope.size(2), -1)), -1)
        return q, k, as_wide_as_keys(v, k)


class MLP(Part):
    """SwiGLU. Also the shared expert, and, with MoE's three calls, the MLP of a dense layer."""

    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj = Linear(width, inner)
        self.up_proj = Linear(width, inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x):
        gate_up = torch.cat((self.gate_proj(x), self.up_proj(x)), -1)
        return self.down_proj(self.memory.again("act", swiglu, gate_up))

    def dispatch(self, x, forced_ids=None):
        return x

    def compute(self, x):
        return self(x)

    def combine(self, y):
        return y


class Router(Part):
    """Scores in float32, choice of K experts, and the balance loss. Its weight and bias stay float32 under any cast."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        if c.router_bias:
            self.register_buffer("e_score_correction_bias", torch.empty(c.n_routed_experts))
        self.average_counts = lambda counts: counts                       # parallel.py: the mean over a group's ranks
        self.aux_scale = 1.0                                              # share of the global batch in one forward
        self.aux_loss = None                                              # of the last forward, detached
        self.load = 0                                                     # (E,) copies sent since last asked

    def _apply(self, fn, recurse=True):
        """Moves with the model, but a cast to less than float32 passes it by: rounded scores choose other experts."""
        def keep_wide(t):
            moved = fn(t)
            return moved if moved.dtype.itemsize >= 4 else t.to(moved.device)
        return super()._apply(keep_wide, recurse)

    def forward(self, x, forced_ids=None):
        """x (B,T,C) -> ids (N,K) int64, weights (N,K) float32 or better."""
        flat = self.memory.again("norm", lambda x: x.flatten(0, 1).to(at_least_float32(x.dtype)), x)      # (N,C)
        logits = F.linear(flat, self.weight.to(flat.dtype))               # (N,E)
        scores = logits.sigmoid() if self.c.scoring_func == "sigmoid" else logits.softmax(-1)
        ids = self.choose(scores.detach()) if forced_ids is None else forced_ids.view(len(flat), -1)
        weights = scores.gather(1, ids)
        if self.c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.c.routed_scaling_factor
        return ids, self.balance(x.size(0), ids, weights, logits, scores)

    def choose(self, scores):
        """The K best experts of each token, under the rule of groups: scores (N,E) -> ids (N,K)."""
        c, n = self.c, len(scores)
        if c.router_bias:
            scores = scores + self.e_score_correction_bias.to(scores.dtype)
        if c.n_group == 1:
            return scores.topk(c.num_experts_per_tok, sorted=False).indices
        groups = scores.view(n, c.n_group, -1)                            # (N, groups, E/groups)
        if c.group_choice == "equal":
            ids = groups.topk(c.num_experts_per_tok // c.n_group, sorted=False).indices
            return (ids + torch.arange(0, scores.size(1), groups.size(-1), device=ids.device).unsqueeze(1)).flatten(1)
        best = groups.topk(min(2, groups.size(-1))).values.sum(-1)        # (N, groups), DS: sum of a group's best two
        kept = best.topk(c.topk_group, sorted=False).indices
        left_out = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        masked = groups.masked_fill(left_out.unsqueeze(-1), -math.inf)    # not 0: biased scores can be negative
        return masked.flatten(1).topk(c.num_experts_per_tok, sorted=False).indices

    def balance(self, n_sequences, ids, weights, logits, scores):
        """Balance loss alpha * sum_i f_i p_i, a mean over groups of sequences (PP eq. 4-6); weights carry its gradient.

        f_i: share of the group's copies that expert i got, times E; from counts, without gradient. p_i: mean score.
        """
        c, E = self.c, self.c.n_routed_experts
        G = n_sequences // (sequences_of_group(c, n_sequences) if self.training else n_sequences)
        tokens = len(ids) // G                                            # of a group, held here
        first = torch.arange(G, device=ids.device).unsqueeze(1) * E       # group by group in one count
        counts = count_ids(ids.view(G, -1) + first, G * E).view(G, E)
        if self.training:
            self.load = self.load + counts.sum(0)
        if c.balance == "none" or c.aux_loss_alpha == 0:
            self.aux_loss = scores.new_zeros(())
            return weights
        f = self.average_counts(counts.to(scores.dtype)) * (E / (tokens * ids.size(1)))    # (G,E)
        if c.aux_scores == "normalized":
            scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        elif c.aux_scores == "softmax":
            scores = logits.softmax(-1)
        p = scores.view(G, tokens, E).mean(1)                             # (G,E)
        aux_loss = c.aux_loss_alpha * (f * p).sum(-1).mean()
        self.aux_loss = aux_loss.detach() * self.aux_scale
        return AddGradient.apply(weights, aux_loss, self.aux_scale)


def sequences_of_group(config, n_sequences):
    """Of the n_sequences of a micro-batch, how many form a balance group, or the part of one that is held here: what
    a larger group needs beyond that is the matter of Router.average_counts."""
    sizes = dict(none=n_sequences, sequence=1, micro_batch=n_sequences)
    size = sizes.get(config.balance, config.balance_group or n_sequences)
    require(size >= n_sequences or n_sequences % size == 0,
            f"balance_group={size} does not divide the {n_sequences} sequences of a micro-batch: use one of "
            f"{divisors(n_sequences)}")
    return min(size, n_sequences)


class Experts(Part):
    """Routed experts, stacked: gate and up in one grouped matmul, never a loop."""

    def __init__(self, c):
        super().__init__()
        E, C, I = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, C))        # gate first
        self.down_proj = nn.Parameter(torch.empty(E, C, I))
        self.weight_before_down = c.expert_weight == "before_down"
        self.first_expert = 0                                             # global number of the first one held here
        self.store = None                                                 # a WeightGradStore: gradients are deferred
        self.with_copies = lambda weight: weight                          # parallel.py: and copies from other ranks

    def forward(self, rows, counts, row_weights):
        """rows (M,C) sorted by expert, counts (E,), row_weights (M,) -> (M,C), weighted.

        Weighting the expert-wide activation costs less than the model-wide output, and keeps no output for backward:
        hidden, and with it what the weight's gradient needs, comes from gate_up. After the down-projection (MindSpeed's
        default) dweight = sum over C of out * dout: out is kept, or waits in the host's memory (swap=expert_out).
        """
        weights = [self.with_copies(weight) for weight in (self.gate_up_proj, self.down_proj)]
        gate_up = self.memory.again("expert", self.grouped, rows, weights[0], counts)              # (M,2I)
        hidden = self.memory.again("act expert", swiglu, gate_up, row_weights if self.weight_before_down else None)
        out = self.grouped(hidden, weights[1], counts)                                             # (M,C)
        if self.weight_before_down:
            return out
        return self.memory.swap("expert_out", out) * row_weights.unsqueeze(-1)

    def grouped(self, rows, weight, counts):
        return grouped_matmul(rows, weight, counts, self.store)


class LocalDispatcher:
    """Brings tokens to experts and sums what comes back, on one device. No Module: parallel.py derives its exchanges.

    With capacity_factor > 0 an expert takes ceil(capacity_factor * N * K / E) copies, those of the highest routing
    weight, and always computes that many rows, padded with zeros; the rest are dropped and counted.
    """

    def __init__(self, c):
        self.n_experts, self.capacity_factor = c.n_routed_experts, c.capacity_factor
        self.dropped = 0                                                  # copies dropped by the last dispatch

    def dispatch(self, x, ids, weights):
        """x (N,C), ids (N,K), weights (N,K) -> rows (M,C) sorted by expert, row_weights (M,), counts (E,), ctx."""
        if self.capacity_factor > 0:
            capacity = self.capacity(ids)
            slot = self.slots_with_capacity(ids, weights, capacity)
            rows = GatherRows.apply(x, slot, self.n_experts * capacity, True)
            counts = torch.full((self.n_experts,), capacity, device=x.device)
        else:
            rows, slot = permute(x, ids)
            counts = count_ids(ids, self.n_experts)
        row_weights = weights.new_zeros(len(rows) + 1).scatter(0, slot.flatten().long(), weights.flatten())
        return rows, row_weights[:len(rows)].to(x.dtype), counts, slot

    def capacity(self, ids):
        """Rows of an expert that choices (N,K) fill."""
        return math.ceil(self.capacity_factor * ids.numel() / self.n_experts)

    def slots_with_capacity(self, ids, weights, capacity):
        """Row of each copy, E * capacity for a dropped one: (N,K)."""
        flat = ids.flatten()
        by_weight = torch.argsort(weights.detach().flatten(), descending=True, stable=True)
        order = by_weight[torch.argsort(flat[by_weight], stable=True)]    # by expert, then by falling weight
        counts = count_ids(ids, self.n_experts)
        first = counts.cumsum(0) - counts                                 # (E,) where an expert's copies begin
        expert = flat[order]
        rank = torch.arange(len(order), device=ids.device) - first[expert]
        row = torch.where(rank < capacity, expert * capacity + rank, self.n_experts * capacity)
        slot = torch.empty_like(flat).scatter_(0, order, row)
        self.dropped = (rank >= capacity).sum()
        return slot.view_as(ids)

    def wait(self, rows, row_weights, ctx):
        """Where an exchange in flight ends; nothing is in flight on one device."""
        return rows, row_weights

    def resend(self, x, ctx):
        """The rows of a dispatch once more: x (N,C) -> (M,C)."""
        padded = self.capacity_factor > 0
        return copy_to_slots(x, ctx.long(), self.n_experts * self.capacity(ctx) if padded else ctx.numel(), padded)

    def combine(self, rows, ctx):
        """Unweighted sum of each token's rows: (M,C) -> (N,C)."""
        return unpermute(rows, ctx, padded=self.capacity_factor > 0)


class MoE(Part):
    """Routed experts beside a shared one (none with n_shared_experts=0), ungated."""

    def __init__(self, c):
        super().__init__()
        self.gate = Router(c)
        self.experts = Experts(c)
        shared = c.n_shared_experts * c.moe_intermediate_size
        self.shared_experts = MLP(c.hidden_size, shared) if shared else None
        self.dispatcher = LocalDispatcher(c)
        self.dropped = 0                                                  # copies dropped since last asked

    def dispatch(self, x, forced_ids=None):
        """Choose experts and send rows off: x (B,T,C)."""
        ids, weights = self.gate(x, forced_ids)
        sent = self.dispatcher.dispatch(x.flatten(0, 1), ids, weights)
        if self.training:
            self.dropped = self.dropped + self.dispatcher.dropped
        return x, ids, *sent

    def compute(self, sent):
        """The shared expert while rows travel, then the routed ones."""
        x, ids, rows, row_weights, counts, ctx = sent
        shared = None if self.shared_experts is None else self.shared_experts(x)
        return self.compute_routed(x, rows, row_weights, counts, ctx), shared, x.shape, ctx

    def compute_routed(self, x, rows, row_weights, counts, ctx):
        rows, row_weights = self.dispatcher.wait(rows, row_weights, ctx)
        rows = self.memory.remake("permute", rows, lambda x: self.dispatcher.resend(x.flatten(0, 1), ctx), x)
        return self.experts(rows, counts, row_weights)

    def combine(self, done):
        rows, shared, shape, ctx = done
        routed = self.dispatcher.combine(rows, ctx).view(shape)
        return routed if shared is None else routed + shared


class Block(Part):
    """One layer, as four calls that another micro-batch's can be put between.

        x = x + post_attention_layernorm(attention(input_layernorm(x)))
        x = x + post_mlp_layernorm(mlp(pre_mlp_layernorm(x)))           # norm=pre: without the two post norms
    """

    def __init__(self, c, index):
        super().__init__()
        self.index = index                                                # global number of the layer
        self.is_moe = index >= c.first_k_dense_replace
        sandwich = c.norm != "pre"
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps) if sandwich else nn.Identity()
        self.pre_mlp_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MoE(c) if self.is_moe else MLP(c.hidden_size, c.intermediate_size)
        self.post_mlp_layernorm = Norm(c.hidden_size, c.rms_norm_eps) if sandwich else nn.Identity()

    def forward(self, x, angles, mask=None, routing=None):
        x = self.attend(x, angles, mask)
        return self.combine(x, self.compute(self.dispatch(x, routing)))

    def attend(self, x, angles, mask=None):
        def attention(x):
            return self.self_attn(self.memory.again("norm", self.input_layernorm, x), angles, mask)

        return x + self.post_attention_layernorm(self.memory.region("attention", attention, x))

    def dispatch(self, x, routing=None):
        """routing: None, or a dict of layer -> ids (B,T,K): a layer that is there is forced, any other is noted."""
        h = self.memory.again("norm", self.pre_mlp_layernorm, x)
        if not self.is_moe or routing is None:
            return self.mlp.dispatch(h)
        sent = self.mlp.dispatch(h, routing.get(self.index))
        routing[self.index] = sent[1].view(*x.shape[:2], -1)
        return sent

    def compute(self, sent):
        return self.mlp.compute(sent)

    def combine(self, x, done):
        return x + self.post_mlp_layernorm(self.mlp.combine(done))


class MTPLayer(Block):
    """One more depth of prediction: the hidden state joined with the embedding of the next token (DS section 2.2)."""

    def __init__(self, c, index):
        super().__init__(c, index)
        self.hidden_first = c.mtp_concat == "hidden_first"
        self.enorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.hnorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = Linear(2 * c.hidden_size, c.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": Norm(c.hidden_size, c.rms_norm_eps)})

    def join(self, embedded, h):
        parts = (self.enorm(embedded), self.hnorm(h))                     # two of (B,T,C)
        return self.eh_proj(torch.cat(parts[::-1] if self.hidden_first else parts, -1))


# ---------------------------------------------------------------------------------------------------------------------
# The model


@dataclass
class Output:
    """Losses are shares of the global batch: summed over micro-batches and ranks they are its means."""
    loss: torch.Tensor | None = None          # next-token cross-entropy, nats a token
    mtp_loss: torch.Tensor | None = None      # mean over depths of theirs, before mtp_loss_weight
    aux_loss: torch.Tensor | None = None      # balance loss, sum over layers, alpha included
    total_loss: torch.Tensor | None = None    # for backward; aux_loss adds its value here, its gradient by itself
    logits: torch.Tensor | None = None        # (B,T,V)
    mtp_logits: list | None = None            # one (B,T,V) a depth


class Model(nn.Module):
    """The whole model, or, with parts set to None, a pipeline stage of it. Memory is not filled before init_weights."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        n_layers, depths = c.num_hidden_layers, c.num_nextn_predict_layers
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, _weight=torch.empty(c.vocab_size, c.hidden_size))
        self.layers = nn.ModuleDict({str(i): Block(c, i) for i in range(n_layers)})
        self.layers.update({str(i): MTPLayer(c, i) for i in range(n_layers, n_layers + depths)})
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size)
        self.compute_dtype = None                                         # None: the embedding's own
        self.cross_entropy = cross_entropy                                # parallel.py: with a part of the head

    def forward(self, ids, *, targets=None, labels=None, positions=None, doc_ids=None, next_ids=None, routing=None,
                return_logits=False, loss_tokens=None):
        """ids (B,T), or without embedding a hidden state (B,T,C) -> Output, or without last norm the hidden state.

        targets (B, 1+MTP, T): token i+1+d for depth d at i, -100 ignored. labels (B,T): unshifted ids, shifted here.
        positions (B,T), default 0..T-1. doc_ids (B,T): attention stays inside equal numbers. next_ids (B, MTP, T):
        token i+d for depth d, default from targets, or from ids. routing: see Block.dispatch. loss_tokens (1+MTP,):
        target tokens of the global batch per depth, by default of this call. Logits without targets or on request.
        """
        if labels is not None:
            targets = shifted(labels, range(1, 2 + self.config.num_nextn_predict_layers), -100)
        if ids.size(1) > self.config.max_position_embeddings:
            raise ValueError(f"sequence of {ids.size(1)} tokens above max_position_embeddings="
                             f"{self.config.max_position_embeddings}: shorten the one or raise the other")
        positions, next_ids = fill_inputs(ids, targets, len(self.mtp_layers()), positions, next_ids)
        x = ids if self.embed_tokens is None else self.embed(ids)         # (B,T,C)
        angles = rope_table(self.config, positions, x.dtype)
        mask = document_mask(doc_ids)
        for block in self.layers.values():
            if not isinstance(block, MTPLayer):
                x = block(x, angles, mask, routing)
        if self.norm is None:
            return x
        hiddens = []
        for depth, layer in enumerate(self.mtp_layers()):
            hidden, x = self.join(depth, x, next_ids)
            hiddens.append(hidden)
            x = layer(x, angles, mask, routing)
        hiddens.append(self.head_norm(len(hiddens))(x))
        return self.output(hiddens, targets, loss_tokens, return_logits or targets is None)

    def embed(self, ids):
        x = self.embed_tokens(ids)
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def moe_blocks(self):
        return [block for block in self.layers.values() if block.is_moe]

    def routers(self):
        return [block.mlp.gate for block in self.moe_blocks()]

    def mtp_layers(self):
        return [layer for layer in self.layers.values() if isinstance(layer, MTPLayer)]

    def head_norm(self, depth):
        """Between the head and what `depth` MTP layers made."""
        return self.mtp_layers()[depth - 1].shared_head["norm"] if depth else self.norm

    def join(self, depth, x, next_ids):
        """x (B,T,C), which `depth` MTP layers made -> what the head reads of it, and the next MTP layer's input."""
        hidden = self.head_norm(depth)(x)
        h = x if self.config.mtp_hidden == "pre_norm" else hidden
        return hidden, self.mtp_layers()[depth].join(self.embed(next_ids[:, depth]), h)

    def output(self, hiddens, targets, loss_tokens, want_logits):
        """hiddens: one (B,T,C) a depth."""
        out = Output()
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        if want_logits:
            out.logits, *out.mtp_logits = [F.linear(h, head.to(h.dtype)) for h in hiddens]
        if targets is None:
            return out
        if loss_tokens is None:
            loss_tokens = (targets != -100).sum((0, 2)).clamp(min=1)      # (1+MTP,)
        losses = [self.cross_entropy(h.flatten(0, 1), head, targets[:, d].flatten()) / loss_tokens[d]
                  for d, h in enumerate(hiddens)]
        out.loss = losses[0]
        out.mtp_loss = sum(losses[1:]) / max(1, len(losses) - 1) + torch.zeros_like(losses[0])
        out.aux_loss = sum((router.aux_loss for router in self.routers()), torch.zeros_like(losses[0]))
        out.total_loss = out.loss + self.config.mtp_loss_weight * out.mtp_loss + out.aux_loss
        return out

    # what a trainer asks of the routers

    @property
    def aux_scale(self):
        """Share of the global batch that one forward sees; the balance loss and its gradient are multiplied by it."""
        return self.routers()[0].aux_scale if self.routers() else 1.0

    @aux_scale.setter
    def aux_scale(self, share):
        for router in self.routers():
            router.aux_scale = share

    def pop_stats(self):
        """Counted in training since last asked, on the device: loads (MoE layers, E), copies dropped, copies in all."""
        moes = [block.mlp for block in self.moe_blocks()]
        none = torch.zeros(self.config.n_routed_experts, dtype=torch.int64, device=next(self.parameters()).device)
        loads = torch.stack([none + moe.gate.load for moe in moes]) if moes else none.view(1, -1)[:0]
        dropped = none[0] + sum(moe.dropped for moe in moes)
        for moe in moes:
            moe.gate.load = moe.dropped = 0
        return dict(loads=loads, dropped=dropped, rows=loads.sum())

    @torch.no_grad()
    def update_router_bias(self, loads):
        """Raise the bias of experts below the mean load, lower the others': loads (MoE layers, E) of one step."""
        for router, load in zip(self.routers(), loads.float()):
            if self.config.router_bias:
                router.e_score_correction_bias += self.config.bias_update_speed * (load.mean() - load).sign()

    @torch.no_grad()
    def init_weights(self, seed=0):
        """Fill every tensor, also after to_empty; see initial_scale for the table."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            first = self.get_submodule(name.rpartition(".")[0]).first_expert if ".experts." in name else 0
            fill_initial(tensor, self.config, name, seed, first)


def shifted(ids, distances, fill):
    """ids (B,T) moved left by each distance, ends filled: (B, len(distances), T)."""
    T = ids.size(1)
    moved = [F.pad(ids, (0, d), value=fill)[:, d:d + T] for d in distances]
    return torch.stack(moved, 1) if moved else ids.new_empty(len(ids), 0, T)


def fill_inputs(ids, targets, depths, positions=None, next_ids=None):
    """(positions (1 or B, T), next_ids (B, depths, T): tokens i+1, i+2, ... that MTP reads at i), made if not given.

    ids (B,T), or hidden states (B,T,C) where no MTP layer is (depths=0); targets (B,1+MTP,T) or None.
    """
    if positions is None:
        positions = torch.arange(ids.size(1), device=ids.device).unsqueeze(0)
    if next_ids is None and depths:
        next_ids = shifted(ids, range(1, 1 + depths), 0)
        if targets is not None:                                           # they know what is past the end, too
            next_ids = torch.where(targets[:, :depths] >= 0, targets[:, :depths], next_ids)
    return positions, next_ids


def document_mask(doc_ids):
    """doc_ids (B,T) -> (B,1,T,T), True where i may see j: same document, not later. None stays None, a mask a mask."""
    if doc_ids is None or doc_ids.dim() == 4:
        return doc_ids
    return (doc_ids.unsqueeze(2) == doc_ids.unsqueeze(1)).tril().unsqueeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation


def initial_scale(config, name):
    """(kind, scale) of a tensor's start, kind 'constant' or 'normal'; L layers, d = hidden_size.

        tensor                                          init=tiny (PU 2.2)       init=small (PU's baseline)
        embed_tokens                                    normal 0.5               normal sqrt(2/5d)
        lm_head, router, eh_proj, q_a, q_b, kv_a, kv_b,
        gate and up projections                         normal sqrt(1/2dL)       normal sqrt(2/5d)
        o_proj, down projections (into the residual)    normal sqrt(1/2dL)       normal sqrt(2/5dL)
        e_score_correction_bias                         constant 0               constant 0
        norms, but with norm=dssn:                      constant 1               constant 1
        post_attention_layernorm                        constant c_attn/sqrt(L)  constant c_attn/sqrt(L)
        post_mlp_layernorm                              constant c_mlp/sqrt(L)   constant c_mlp/sqrt(L)
    """
    c, L = config, config.num_hidden_layers
    if name.endswith("e_score_correction_bias"):
        return "constant", 0.0
    if "norm" in name.split(".")[-2]:
        post = {"post_attention_layernorm": c.dssn_c_attn, "post_mlp_layernorm": c.dssn_c_mlp}.get(name.split(".")[-2])
        return "constant", post / math.sqrt(L) if c.norm == "dssn" and post else 1.0
    if c.init == "tiny":
        return "normal", 0.5 if "embed_tokens" in name else math.sqrt(1 / (2 * c.hidden_size * L))
    into_residual = "o_proj" in name or "down_proj" in name
    return "normal", math.sqrt(2 / (5 * c.hidden_size * (L if into_residual else 1)))


def fill_initial(tensor, config, name, seed, first_expert=0):
    """Fill one tensor in place. A stacked tensor is seeded expert by expert, from the global number of its first one.

    Each tensor has a seed of its own, so the same numbers come out however the model is cut, one tensor at a time.
    """
    kind, scale = initial_scale(config, name)
    if kind == "constant":
        tensor.fill_(scale)
        return
    slices = enumerate(tensor, first_expert) if ".experts." in name else [(-1, tensor)]
    for expert, part in slices:
        digest = hashlib.blake2b(f"{seed} {name} {expert}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        part.copy_(torch.randn(part.shape, generator=generator) * scale)


# ---------------------------------------------------------------------------------------------------------------------
# Other people's names, and text


def hf_views(model):
    """(published name, view of our tensor) for every tensor, experts one by one; both load_hf and to_hf walk over it.

    Name trap: with norm=pre, DeepSeek's post_attention_layernorm is the norm before the MLP.
    """
    for name, tensor in model.state_dict().items():
        if model.config.norm == "pre":
            name = name.replace("pre_mlp_layernorm", "post_attention_layernorm")
        name = name if name.startswith("lm_head") else f"model.{name}"
        if ".experts." not in name:
            yield name, tensor
            continue
        prefix, stacked = name.rsplit(".", 1)
        first = model.get_submodule(prefix.removeprefix("model.")).first_expert
        for expert, matrix in enumerate(tensor, first):
            if stacked == "down_proj":
                yield f"{prefix}.{expert}.down_proj.weight", matrix
            else:
                for part, half in zip(("gate_proj", "up_proj"), matrix.chunk(2)):
                    yield f"{prefix}.{expert}.{part}.weight", half


def to_hf(model):
    """Tensors under their published names, experts one by one; views of the model's own memory."""
    return dict(hf_views(model))


@torch.no_grad()
def load_hf(model, tensors):
    """Fill the model from a dict of published names; ValueError for a missing tensor or a wrong shape.

    What the model has no place for is left out only in MTP layers, whose files may repeat embedding and head.
    """
    wanted = to_hf(model)
    missing = sorted(set(wanted) - set(tensors))
    mtp = tuple(f"model.layers.{model.config.num_hidden_layers + depth}." for depth in range(100))
    unknown = sorted(name for name in set(tensors) - set(wanted) if not name.startswith(mtp))
    if missing or unknown:
        raise ValueError(f"{len(missing)} tensors are missing (first: {missing[:1]}), {len(unknown)} have no place "
                         f"(first: {unknown[:1]}): is this checkpoint of the same shape as the Config?")
    for name, own in wanted.items():
        if own.shape != tensors[name].shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, in the model {tuple(own.shape)}")
        own.copy_(tensors[name])


@torch.no_grad()
def generate(model, ids, new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    """Continue ids (1,T) by new_tokens, without a cache -> (1, T + new_tokens). temperature 0: the likeliest token.

    top_k: the k likeliest tokens only (0: all). top_p: the fewest tokens that hold this much probability.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator(ids.device).manual_seed(seed)
    for _ in range(new_tokens):
        logits = model(ids[:, -model.config.max_position_embeddings:]).logits[:, -1].float()    # (1,V)
        ids = torch.cat((ids, sample(logits, temperature, top_k, top_p, generator)), 1)
    model.train(was_training)
    return ids


def sample(logits, temperature, top_k, top_p, generator):
    """logits (B,V) -> (B,1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, order = logits.div(temperature).sort(descending=True)         # likeliest first
    if top_k:
        logits[:, top_k:] = -math.inf
    before = logits.softmax(-1).cumsum(-1) - logits.softmax(-1)           # probability of all likelier tokens
    probabilities = logits.masked_fill(before >= top_p, -math.inf).softmax(-1)
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))
