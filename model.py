"""
A big mixture-of-experts language model in one file: the recipe of Pangu Ultra MoE (arXiv:2505.04519).

Multi-head latent attention, fine-grained routed experts beside a shared one, depth-scaled sandwich norm, TinyInit,
multi-token prediction and a balance loss over groups of sequences.

In this order: settings and presets; counts of parameters and FLOPs; operators, each plain and fused; rotary position;
layers; experts; blocks; the model; initialisation; published names; generation.

Written for one device: nothing here knows of process groups. parallel.py takes a built model and spreads it; what the
model carries only for that sake is this. Replaced there:

    MoE.dispatcher          who brings rows to experts and back; here the local one, there an exchange between ranks
    Router.average_counts   the identity here, an average over the ranks of a balance group there
    Attention.gather_tokens, gather_context   the identity here; there latents of all tokens of a tensor group, or of
                            the whole sequence, where ranks hold parts of one
    Part.memory             keeps all that backward needs; there some is computed again, or waits in the host's memory
    Linear.store, Experts.store   a WeightGradStore that delays weight gradients, so that they can hide an exchange
    Experts.first_expert    the number of the first expert held here, so that seeding does not depend on the cut
    Model.embed, cross_entropy, gather_logits   there of a part of the vocabulary (class Vocabulary)
    embed_tokens, norm, lm_head, layers   may be None or a subset: a pipeline stage is the model minus the rest
    weights                 may be slices: Attention.up counts its heads by -1

Written in another way than one device needs:

    aux_scale, loss_tokens  losses are shares of a global batch, of which one forward sees a part
    AddGradient             the balance loss sends its gradient by itself: only the last stage has the final loss
    Block's four calls, MoE.compute_routed, the dispatcher's wait   two micro-batches can be interleaved between them
    LocalDispatcher.resend  repeats in backward the rows that were not kept
    Model.join, head_norm, output   the ends of a pipeline stage
    Router.load, MoE.dropped   put back when a layer has run again in backward
    fill_inputs, document_mask   made of whole sequences before ranks take their parts: forward takes a mask too
    fill_initial            one whole tensor at a time, of which a rank keeps its part

Legend of dimensions: B batch, T sequence, C model width, H heads, D head width, N tokens (B*T), K experts per token,
E experts, M rows sent to experts, I expert width, V vocabulary, G balance groups.

References. PU: Pangu Ultra, arXiv:2504.07866 (the dense sister model: norms and initialisation). PP: Pangu Pro MoE,
arXiv:2505.21411 (balance loss, experts chosen equally from groups). DS: DeepSeek-V3, arXiv:2412.19437 (latent
attention, router bias, group-limited choice, multi-token prediction).
"""
import hashlib
import math
import re
from collections import Counter
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Settings


def require(ok, message):
    if not ok:
        raise ValueError(message)


def divisors(n):
    """All divisors of n, ascending: for messages that say what would fit."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


class Weights(NamedTuple):
    """A matmul's weight matrices: `n_in` inputs, `n_out` outputs; `copies` of them, of which a token uses `used`."""
    n_in: int
    n_out: int
    copies: int = 1
    used: int = 1


def setting(default=MISSING, *others, text="", **allowed):
    """A field of a dataclass, with what check_setting allows in it: least, most, choices (or default and others).

    A number that declares none is above 0. text: for --help.
    """
    if others:
        allowed["choices"] = default, *others
    return field(default=default, metadata=dict(text=text, allowed=allowed))


def check_settings(values):
    """ValueError for a field that holds what it may not. None, and what a dict holds, are the class's own matter."""
    for each in fields(values):
        if each.type in (bool, int, float, str, tuple):
            check_setting(each.name, getattr(values, each.name), each.type, **each.metadata.get("allowed", {}))


def check_setting(name, value, kind, **allowed):
    """kind tuple: several words of the choices, or if there are none whole numbers."""
    if kind is tuple:
        for item in value:
            check_setting(name, item, str if "choices" in allowed else int, **allowed)
        return
    kinds = (int, float) if kind is float else kind
    is_kind = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
    if "choices" in allowed:
        right = value in allowed["choices"]
        words = f"one of {', '.join(map(str, allowed['choices']))}"
    elif kind in (int, float):
        # NaN is refused too, for no comparison holds of it
        least, most = allowed.get("least", 0), allowed.get("most", 2**31 if kind is int else 1e300)
        right = is_kind and least <= value <= most and ("least" in allowed or value > 0)
        words = "a whole number" if kind is int else "a number"
        words += f" of at least {least:g}" if "least" in allowed else " above 0"
        if "most" in allowed or is_kind and value > most:
            words += f" and at most {most:g}"
    else:
        right = True
        words = "true or false" if kind is bool else "text"
    require(is_kind and right, f"{name}={value!r}: use {words}")


@dataclass(frozen=True)
class Config:
    """A model's shape, in the spelling of DeepSeek-style configs. Checked when made."""
    vocab_size: int = 2048
    hidden_size: int = 192
    num_hidden_layers: int = setting(3, most=4096)
    first_k_dense_replace: int = setting(1, least=0)  # leading layers with a dense MLP in place of experts
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
    n_shared_experts: int = setting(1, least=0)
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    scoring_func: str = setting("sigmoid", "softmax")
    norm_topk_prob: bool = True               # chosen scores are divided by their sum ...
    routed_scaling_factor: float = 2.5        # ... and multiplied by this
    n_group: int = 1                          # groups of experts
    topk_group: int = 1                       # groups a token may choose from (group_choice=limited)
    group_choice: str = setting("limited", "equal")  # of topk_group groups (DS) | K/n_group of each (PP)
    router_bias: bool = False                 # added to scores for the choice alone; moved by load, not by a loss (DS)
    bias_update_speed: float = setting(0.001, least=0)
    capacity_factor: float = setting(0.0, least=0)  # 0: dropless; else an expert takes capacity_factor * N * K / E rows
    expert_weight: str = setting("before_down", "after_down")  # where it multiplies: expert-wide | model-wide
    # balance loss
    balance: str = setting("ep_group", "dp_group", "micro_batch", "sequence", "none")  # the group it looks at
    balance_group: int = setting(0, least=0)  # sequences in a group; 0: made definite when a run starts, from its Plan
    aux_loss_alpha: float = setting(0.01, least=0)  # the paper's best of those it tried, for ep_group
    aux_scores: str = setting("normalized", "softmax", "raw")  # s / sum s | of the logits (PP) | s; not published
    # multi-token prediction
    num_nextn_predict_layers: int = setting(1, least=0, most=4096)
    mtp_loss_weight: float = setting(0.3, least=0)  # not published for this model; DS starts with 0.3
    mtp_hidden: str = setting("pre_norm", "post_norm")  # h entering hnorm; pre_norm: the raw residual stream
    mtp_concat: str = setting("embed_first", "hidden_first")  # halves of eh_proj's input
    # norms and initialisation
    norm: str = setting("dssn", "sandwich", "pre")  # dssn: depth-scaled sandwich
    dssn_c_attn: float = 0.283                # PU's, for its 135B model; those of the 718B model are not published
    dssn_c_mlp: float = 0.432
    init: str = setting("tiny", "small")      # tiny: TinyInit
    rms_norm_eps: float = 1e-5
    latent_norm_eps: float = 1e-6             # q_a and kv_a norms: released codes disagree, 1e-6 or 1e-5
    tie_word_embeddings: bool = False

    def __post_init__(self):
        """ValueError, in one line with the numbers and what would fit, for a shape that cannot be built."""
        check_settings(self)
        check_experts(self)
        check_rope_scaling(self.rope_scaling)
        dense, layers, rope = self.first_k_dense_replace, self.num_hidden_layers, self.qk_rope_head_dim
        require(dense <= layers, f"first_k_dense_replace={dense}: use 0 to num_hidden_layers={layers}")
        require(rope % 2 == 0, f"qk_rope_head_dim={rope} is odd, rotary position turns pairs: use {rope + 1}")
        require(self.v_head_dim <= self.qk_head_dim, f"v_head_dim={self.v_head_dim} above the query's width, fused "
                                                     f"attention refuses that: up to {self.qk_head_dim}")

    @property
    def qk_head_dim(self):
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    # what layers compute with: all counts are made from this table, those below and those of sim.py

    def matmuls(self, kind):
        """{name: Weights} of a layer of one of layer_kinds, or of kind "head"."""
        width, inner = self.hidden_size, self.moe_intermediate_size
        if kind == "head":
            return dict(lm_head=Weights(width, self.vocab_size))
        if kind == "dense":
            return self.attention_matmuls() | self.mlp_matmuls("mlp", self.intermediate_size)
        table = self.attention_matmuls()
        table["router"] = Weights(width, self.n_routed_experts)
        if self.n_shared_experts:
            table |= self.mlp_matmuls("shared", self.n_shared_experts * inner)
        table |= self.mlp_matmuls("expert", inner, self.n_routed_experts, self.num_experts_per_tok)
        if kind == "mtp":
            table["eh_proj"] = Weights(2 * width, width)
        return table

    def attention_matmuls(self):
        width, heads = self.hidden_size, self.num_attention_heads
        queries, values = self.attention_widths()
        return dict(
            q_a_proj=Weights(width, self.q_lora_rank),
            q_b_proj=Weights(self.q_lora_rank, queries),
            kv_a_proj_with_mqa=Weights(width, self.kv_lora_rank + self.qk_rope_head_dim),
            kv_b_proj=Weights(self.kv_lora_rank, heads * self.qk_nope_head_dim + values),
            o_proj=Weights(values, width))

    def mlp_matmuls(self, name, inner, copies=1, used=1):
        """Gate and up count as one."""
        gate_up = Weights(self.hidden_size, 2 * inner, copies, used)
        down = Weights(inner, self.hidden_size, copies, used)
        return {f"{name}.gate_up": gate_up, f"{name}.down": down}

    def attention_widths(self):
        """Elements of all heads' queries, and of their values."""
        return self.num_attention_heads * self.qk_head_dim, self.num_attention_heads * self.v_head_dim

    def gains(self, kind):
        """Parameters of a layer's norms."""
        norms = 2 if self.norm == "pre" else 4
        if kind == "mtp":
            norms += 3                                                    # enorm, hnorm, shared_head.norm
        return norms * self.hidden_size + self.q_lora_rank + self.kv_lora_rank


def check_experts(c):
    """Which experts a token may choose."""
    experts, k, groups = c.n_routed_experts, c.num_experts_per_tok, c.n_group
    require(k <= experts, f"num_experts_per_tok={k} above n_routed_experts={experts}: use 1 to {experts}")
    require(experts % groups == 0,
            f"n_group={groups} does not divide n_routed_experts={experts}: use one of {divisors(experts)}")
    require(c.topk_group <= groups, f"topk_group={c.topk_group} above n_group={groups}: use 1 to {groups}")
    if c.group_choice == "equal":
        fitting = [d for d in divisors(k) if experts % d == 0]
        require(k % groups == 0, f"n_group={groups} does not divide num_experts_per_tok={k}, which group_choice=equal "
                                 f"needs: use one of {fitting}")
    else:
        reach = c.topk_group * experts // groups
        require(k <= reach, f"num_experts_per_tok={k} above the {reach} experts of topk_group={c.topk_group} groups: "
                            f"use topk_group={math.ceil(k * groups / experts)} or num_experts_per_tok up to {reach}")


YARN_NEEDS = ("factor", "original_max_position_embeddings")
YARN_DEFAULTS = dict(beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.0)


def check_rope_scaling(scaling):
    if scaling is None:
        return
    known = {"type", *YARN_NEEDS, *YARN_DEFAULTS}
    right = isinstance(scaling, dict) and scaling.get("type") == "yarn" and {*YARN_NEEDS} <= set(scaling) <= known
    require(right, f"rope_scaling={scaling!r}: use null, or an object with type=yarn, {' and '.join(YARN_NEEDS)}, and "
                   f"no other keys but {', '.join(YARN_DEFAULTS)}")
    for name in scaling.keys() - {"type"}:
        check_setting(f"rope_scaling {name}", scaling[name], float, least=1 if name in YARN_NEEDS else 0)


_LARGE_HEADS = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)      # those of the published models

_PANGU = Config(
    vocab_size=153600, max_position_embeddings=131072, rope_theta=25_600_000.0, hidden_size=7680,
    num_hidden_layers=61, first_k_dense_replace=3, intermediate_size=18432,
    num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, **_LARGE_HEADS,
    n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048)

_ONE_GPU = Config(
    vocab_size=32768, max_position_embeddings=4096, hidden_size=2048, num_hidden_layers=12, intermediate_size=9216,
    num_attention_heads=16, q_lora_rank=768, kv_lora_rank=512, **_LARGE_HEADS,
    n_routed_experts=64, num_experts_per_tok=8, moe_intermediate_size=1024)

_CPU_SMALL = Config(
    vocab_size=4096, max_position_embeddings=256, hidden_size=256, num_hidden_layers=8, intermediate_size=640,
    n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=128)

PRESETS = {
    # the first run, on two CPU cores
    "tiny": Config(vocab_size=4096),
    # one modest GPU or NPU
    "small": Config(
        vocab_size=32768, max_position_embeddings=4096, hidden_size=1024, num_hidden_layers=12, intermediate_size=4096,
        num_attention_heads=8, q_lora_rank=384, kv_lora_rank=256, **_LARGE_HEADS,
        n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=512),
    # exactly the published tensors
    "pangu-ultra-moe-718b": _PANGU,
    "deepseek-v3-671b": replace(
        _PANGU, vocab_size=129280, max_position_embeddings=163840, hidden_size=7168, rope_theta=1e4, rms_norm_eps=1e-6,
        rope_scaling=dict(type="yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0,
                          beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
        n_group=8, topk_group=4, router_bias=True, norm="pre", init="small", balance="sequence", aux_loss_alpha=0.0001),
    # fixed sizes, for comparisons
    "cpu-small": _CPU_SMALL,
    "cpu-fine": replace(_CPU_SMALL, intermediate_size=576, n_routed_experts=64, num_experts_per_tok=8,
                        moe_intermediate_size=64),
    "one-gpu": _ONE_GPU,
    "one-gpu-256": replace(_ONE_GPU, num_hidden_layers=8, intermediate_size=4608, n_routed_experts=256,
                           moe_intermediate_size=512),
}


# ---------------------------------------------------------------------------------------------------------------------
# Counts, from a Config alone


def layer_kinds(config):
    """Kind of each layer, in order: dense, moe (with experts), or mtp (moe, with what joins it to the stream)."""
    n_dense = config.first_k_dense_replace
    n_moe = config.num_hidden_layers - n_dense
    return ["dense"] * n_dense + ["moe"] * n_moe + ["mtp"] * config.num_nextn_predict_layers


def count_params(config):
    """Parameters as a dict: total and active (per token) without MTP, embedding, head, mtp (without the shared two).

    Router biases are not counted: they are moved by a rule, not learnt.
    """
    embedding = config.vocab_size * config.hidden_size
    head = 0 if config.tie_word_embeddings else embedding
    total = active = embedding + head + config.hidden_size                # with the last norm
    mtp = 0
    for kind, layers in Counter(layer_kinds(config)).items():
        matmuls, gains = config.matmuls(kind).values(), config.gains(kind)
        held = gains + sum(w.copies * w.n_in * w.n_out for w in matmuls)
        used = gains + sum(w.used * w.n_in * w.n_out for w in matmuls)
        if kind == "mtp":
            mtp = layers * held
        else:
            total += layers * held
            active += layers * used
    return dict(total=total, active=active, embedding=embedding, head=head, mtp=mtp)


def layer_flops(config, kind, seq_len):
    """FLOPs of a token's forward in a layer, or the head: two a weight used, and causal attention, half the scores."""
    flops = sum(2 * w.used * w.n_in * w.n_out for w in config.matmuls(kind).values())
    if kind != "head":
        flops += seq_len * sum(config.attention_widths())
    return flops


def flops_per_token(config, seq_len):
    """Model FLOPs of training on one token: 6 x active matmul parameters, head and MTP included, + causal attention.

    Backward is two forwards. The head counts once per depth of prediction, recomputation never.
    """
    heads = ["head"] * (1 + config.num_nextn_predict_layers)
    kinds = Counter(layer_kinds(config) + heads)
    return 3 * sum(count * layer_flops(config, kind, seq_len) for kind, count in kinds.items())


# ---------------------------------------------------------------------------------------------------------------------
# Operators, plain with a fused branch for CPU and CUDA (torch's own) and for NPU (torch_npu's); first elementwise ones

FUSED = True              # False: every operator takes its plain body, which explains it; tests compare the two
COMPILED = False          # True: SwiGLU, and on a CPU norms, are kernels of torch.compile; see compile_operators
LOGIT_ELEMENTS = 2**20    # float32 logits that the loss holds at a time on a CPU (4 MiB), but at least 512 rows of them
SHORT = 2**14             # elements of a norm or SwiGLU below which generation takes one call for them
SHORT_SEQUENCE = 512      # tokens up to which ShortAttention is no slower than torch's own
SCORE_ELEMENTS = 2**19    # float32 scores that ShortAttention holds twice (2 MiB each), but at least one head's


def backend(x):
    """The body an operator takes for x: 'plain', or the fused branch of its device: 'cpu', 'cuda' or 'npu'."""
    kind = x.device.type
    return kind if FUSED and kind in ("cpu", "cuda", "npu") else "plain"


def at_least_float32(dtype):
    """Norms, softmax, rotary position, router and loss compute in float32 or better; float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


def one_kernel(body, x, *others):
    """body(x, *others), elementwise but for sums over the last dimension: x (..., n) -> (..., m)."""
    if backend(x) == "plain" or is_short(x) or torch.compiler.is_compiling():         # whole layers are traced
        return body(x, *others)
    return OneKernel.apply(body, x.flatten(0, -2), *others).unflatten(0, x.shape[:-1])


def is_short(x):
    """Whether this is a step of generation, in which calls are the cost, not passes over memory."""
    return x.numel() < SHORT and not torch.is_grad_enabled()


class OneKernel(torch.autograd.Function):
    """Keeps its inputs alone, where autograd would keep a tensor for most steps; backward computes the body again.
    Compiled, each way is one pass over memory."""

    @staticmethod
    def forward(ctx, body, *inputs):
        ctx.body = body
        ctx.save_for_backward(*inputs)
        return maybe_compiled(value, inputs[0])(body, *inputs)

    @staticmethod
    def backward(ctx, grad):
        return None, *maybe_compiled(gradients, grad)(ctx.body, grad, *ctx.saved_tensors)


def value(body, *inputs):
    return body(*inputs)


def gradients(body, grad, *inputs):
    """Of the inputs, from that of body's output."""
    if torch.compiler.is_compiling():
        return torch.func.vjp(body, *inputs)[1](grad)
    with torch.enable_grad():                                             # the same, faster where nothing is compiled
        inputs = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(body(*inputs), inputs, grad)


def maybe_compiled(function, x):
    """For operators on x; float64 is never compiled."""
    return compiled(function) if COMPILED and x.dtype != torch.float64 else function


@lru_cache(None)
def compiled(function):
    """Sizes stay open: other numbers of rows, which experts have at every step, compile nothing anew."""
    return torch.compile(function, dynamic=True)


def compile_operators(wanted=True, device=None):
    """SwiGLU, the loss on a GPU and norms on a CPU become kernels that torch.compile makes when they are first used, in
    some 10 s in all, from here on in this process. Not wanted: no longer. Returns None, or why it does not work here:
    then nothing changes."""
    global COMPILED
    COMPILED = False
    if not wanted:
        return None
    probe = torch.ones(2, 4, device=device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if backend(probe) == "npu":
        return "an NPU has kernels of its own for them"
    try:
        compiled(value)(plain_swiglu, probe)
    except torch._dynamo.exc.TorchDynamoException as error:
        return str(error).strip().splitlines()[0]
    except UnicodeDecodeError:                                            # torch reads its templates by the locale
        return "torch.compile needs a locale of UTF-8 here: PYTHONUTF8=1"
    torch._dynamo.config.recompile_limit = 64                             # by operator, dtype, and what else is fixed
    COMPILED = True
    return None


def compile_model(model):
    """Each layer by torch.compile, in place; layers of one kind share what is compiled. Embedding, head and loss stay
    out of the trace, as do the experts' matmuls where they are no kernel of torch's own that it can trace.

    Each size of a batch is compiled by itself, as in a phase with longer sequences: kernels for any size take two to
    three times as long to compile.
    """
    c, probe = model.config, model.embed_tokens.weight[:1]
    probe = probe if model.compute_dtype is None else probe.to(model.compute_dtype)
    kind = grouped_kind(probe, c.hidden_size, c.moe_intermediate_size)
    torch._dynamo.config.recompile_limit = 64                             # by kind of layer, mode, and sizes of a batch
    for block in model.layers.values():
        if block.is_moe and (kind, probe.dtype) != ("grouped", torch.bfloat16):
            block.mlp.experts.grouped = torch.compiler.disable(block.mlp.experts.grouped)
        block.forward = partial(run_compiled, torch.compile(block.forward, dynamic=False), block.forward)
    model.pop_stats()                                                     # from the first step on, counts are tensors


def run_compiled(compiled, eager, x, angles, mask=None, routing=None, cache=None):
    """Block.forward; eager with a cache, whose growing lengths would compile anew at every step."""
    run = compiled if cache is None else eager
    return run(x, angles, mask, routing, cache)


# ---------------------------------------------------------------------------------------------------------------------
# Operators: norm, SwiGLU, rotary position, attention


def rms_norm(x, weight, eps):
    """weight * (x / rms(x) in float32, cast back): x (..., C), weight (C,)."""
    kind = backend(x)
    if kind == "npu":
        return torch.ops.npu.npu_rms_norm(x, weight.to(x.dtype), eps)[0]
    if kind == "cuda" and not torch.compiler.is_compiling() or kind == "cpu" and is_short(x):
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return one_kernel(partial(plain_rms_norm, eps=eps), x, weight)


def plain_rms_norm(x, weight, eps):
    x32 = x.to(at_least_float32(x.dtype))
    mean_square = x32.square().mean(-1, keepdim=True)
    return weight.to(x.dtype) * (x32 * torch.rsqrt(mean_square + eps)).to(x.dtype)


def swiglu(gate_up, row_weights=None):
    """silu(gate) * up, times a weight per row: gate_up (..., 2I) with gate first, row_weights (M,) -> (..., I)."""
    if backend(gate_up) == "npu":
        hidden = torch.ops.npu.npu_swiglu(gate_up, -1)
        return hidden if row_weights is None else hidden * row_weights.unsqueeze(-1)
    weights = () if row_weights is None else (row_weights,)
    return one_kernel(plain_swiglu, gate_up, *weights)


def plain_swiglu(gate_up, row_weights=None):
    gate, up = gate_up.chunk(2, -1)
    hidden = F.silu(gate) * up
    return hidden if row_weights is None else hidden * row_weights.unsqueeze(-1)


def rope(x, cos, sin):
    """Turn interleaved pairs (x0, x1), (x2, x3), ... by their angles: x (B,T,H,D), cos and sin (B or 1, T, 1, D/2)."""
    if backend(x) == "npu" and cos.size(0) == 1:                          # the fused operator takes no batch of angles
        cos = cos.repeat_interleave(2, -1).to(x.dtype)
        sin = sin.repeat_interleave(2, -1).to(x.dtype)
        return torch.ops.npu.npu_rotary_mul(x.contiguous(), cos, sin, "interleave")
    even, odd = x[..., 0::2], x[..., 1::2]
    turned_even = even * cos - odd * sin                                  # float32, as angles are
    turned_odd = odd * cos + even * sin
    return torch.stack((turned_even, turned_odd), -1).flatten(-2).to(x.dtype)


def attention(q, k, v, scale, mask=None):
    """Softmax attention: q (B,T,H,Dqk), k (B,Tk,H,Dqk), v (B,Tk,H,Dv) -> (B,T,H,Dv); causal unless mask (B,1,T,Tk)."""
    kind = backend(q)
    if kind == "npu":                                                     # its masks say True for what is left out
        left_out, mode = (causal_triangle(q.device), 2) if mask is None else (~mask, 1)
        return torch.ops.npu.npu_fusion_attention(q, k, v, q.size(2), "BSND", atten_mask=left_out, scale=scale,
                                                  sparse_mode=mode)[0]
    width = v.size(-1)
    v = as_wide_as_keys(v, k)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)     # (B,H,T,D)
    if kind == "plain":
        if mask is None:
            mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
        scores = (q @ k.transpose(-1, -2)).to(at_least_float32(q.dtype)) * scale
        out = scores.masked_fill(~mask, -math.inf).softmax(-1).to(q.dtype) @ v
    elif kind == "cpu" and q.dtype == torch.bfloat16 and mask is None and q.size(2) <= SHORT_SEQUENCE:
        out = ShortAttention.apply(q, k, v, scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :width].transpose(1, 2)


class ShortAttention(torch.autograd.Function):
    """Causal attention in bf16 on a CPU: torch's forward, and a backward that makes all probabilities of some heads
    again and is five batched matmuls. With heads of 48 it is 1.5 to 1.9 times as fast as torch's at 256 tokens, about
    the same at 512; with heads of 192, 0.9 to 1.1 times at 256."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        ctx.save_for_backward(q, k, v, out, log_sum)                      # (B,H,T,D), log_sum (B,H,T)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, log_sum = ctx.saved_tensors
        shape, T = q.shape, q.size(2)
        mean = (grad.float() * out).sum(-1, keepdim=True).flatten(0, 1)   # (BH,T,1) what softmax's backward takes off
        low = -log_sum.flatten(0, 1).unsqueeze(-1)
        q, k, v, grad = (x.flatten(0, 1) for x in (q, k, v, grad))        # (BH,T,D)
        q32, k32 = q.float(), k.float()
        grad_q = torch.empty_like(q)
        grad_k = torch.empty_like(k)
        grad_v = torch.empty_like(v)
        some = max(1, SCORE_ELEMENTS // T ** 2)                           # heads at a time
        for first in range(0, len(q), some):
            own = slice(first, first + some)
            # in float32: exp makes of a score's rounding error one of the same size in its probability
            scores = q32[own] @ k32[own].transpose(1, 2)                  # (some,T,T)
            probs = scores.mul_(ctx.scale).add_(low[own]).exp_().tril_()
            probs16 = probs.to(q.dtype)
            grad_probs = grad[own] @ v[own].transpose(1, 2) - mean[own]
            grad16 = grad_probs.mul_(probs).mul_(ctx.scale).to(q.dtype)
            torch.bmm(probs16.transpose(1, 2), grad[own], out=grad_v[own])
            torch.bmm(grad16, k[own], out=grad_q[own])
            torch.bmm(grad16.transpose(1, 2), q[own], out=grad_k[own])
        return grad_q.view(shape), grad_k.view(shape), grad_v.view(shape), None


@lru_cache(None)
def causal_triangle(device):
    """What the NPU's causal mode 2 asks for, whatever the length."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)


def as_wide_as_keys(v, k):
    """Values (..., Dv), padded where the kernel wants it: flash kernels do, cuDNN's on Hopper and later does not."""
    kind = backend(v)
    padded = kind == "cpu" or kind == "cuda" and torch.cuda.get_device_capability(v.device) < (9, 0)
    more = k.size(-1) - v.size(-1)
    return F.pad(v, (0, more)) if padded and more else v


# ---------------------------------------------------------------------------------------------------------------------
# Operators: matmuls expert by expert, and weight gradients that can wait


class WeightGradStore:
    """Weight gradients put off until popped, so that their matmuls can hide an exchange."""

    def __init__(self):
        self.pending = []                                                 # (weight, function that makes its gradient)

    @torch.no_grad()
    def pop(self, count=None):
        """Make the oldest `count` gradients, by default all, and add them to their weights'."""
        now = self.pending[:count]
        del self.pending[:count]
        for weight, make_grad in now:
            grad = make_grad()
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
        ctx.store = store
        ctx.parameter = weight                                            # a saved tensor may come back as another
        w = weight.to(x.dtype)
        if counts is None:
            return F.linear(x, w)
        return rows_by_expert(x, w.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx, grad):
        x, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()                                          # grouped_mm refuses strides of 0
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            w = weight.to(grad.dtype)
            grad_x = grad @ w if counts is None else rows_by_expert(grad, w, counts)
        make_grad = partial(weight_grad, grad, x, counts, weight.dtype)
        if ctx.store is not None:
            ctx.store.pending.append((ctx.parameter, make_grad))
        elif ctx.needs_input_grad[1]:
            grad_weight = make_grad()
        return grad_x, grad_weight, None, None


def weight_grad(grad, x, counts, dtype):
    """grad (..., out), x (..., in) -> (out, in); with counts, expert by expert: (E, out, in)."""
    columns = grad.flatten(0, -2).t()
    rows = x.flatten(0, -2)
    product = columns @ rows if counts is None else columns_by_expert(columns, rows, counts)
    return product.to(dtype)


def rows_by_expert(rows, matrices, counts):
    """Each expert's rows by its matrix: rows (M,n) sorted by expert, matrices (E,n,m), counts (E,) -> (M,m)."""
    kind = grouped_kind(rows, rows.size(1), matrices.size(2))
    if rows.device.type == "cpu" and len(rows) < len(matrices):
        kind = "plain"                                                    # most experts have no rows, as in generation
    if kind in ("npu", "grouped"):
        return fused_by_expert(kind, rows, matrices, counts, 0)
    sizes = counts.tolist()
    if kind == "padded":
        return rows_padded(rows, matrices, sizes)
    products = rows.new_empty(len(rows), matrices.size(2))
    for own_rows, matrix, product in zip(rows.split(sizes), matrices, products.split(sizes)):
        if len(own_rows) > 0:
            torch.mm(own_rows, matrix, out=product)
    return products


def columns_by_expert(columns, rows, counts):
    """Each expert's columns by its rows: columns (n,M) and rows (M,m) sorted by expert, counts (E,) -> (E,n,m)."""
    kind = grouped_kind(columns, columns.size(0), rows.size(1))
    if kind in ("npu", "grouped"):
        return fused_by_expert(kind, columns, rows, counts, 2)
    sizes = counts.tolist()
    if kind == "padded":
        return columns_padded(columns, rows, sizes)
    products = rows.new_empty(len(sizes), columns.size(0), rows.size(1))
    for own_columns, own_rows, product in zip(columns.split(sizes, 1), rows.split(sizes), products):
        torch.mm(own_columns, own_rows, out=product)
    return products


def grouped_kind(x, *widths):
    """How to multiply expert by expert: npu, grouped (by torch's own kernel), padded or plain (in a loop)."""
    kind = backend(x)
    if kind in ("npu", "plain"):
        return kind
    if kind == "cpu" and x.dtype == torch.bfloat16:
        return "padded"
    # torch's own has no float64, wants rows of whole 16-byte words, and at least one of them
    aligned = all(width * x.element_size() % 16 == 0 for width in widths)
    return "grouped" if aligned and x.numel() > 0 and x.dtype != torch.float64 else "plain"


def fused_by_expert(kind, a, b, counts, group_type):
    """group_type: the dimension that experts share, 0: rows of a, 2: what is summed over."""
    if kind == "grouped":
        return F.grouped_mm(a, b, offs=counts.cumsum(0, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int64)                            # it refuses one count alone, but not one end
    return torch.ops.npu.npu_grouped_matmul([a], [b], group_list=ends, group_list_type=0, split_item=3,
                                            group_type=group_type)[0]


# A CPU's bf16 matmul is compiled anew, and kept, for each number of rows it meets, and small ones gain little from a
# second thread. So neighbouring experts are filled up to one of few numbers of rows, and are one batched matmul: a step
# of cpu-small is 1.05 times as fast as with blocks in a loop, of cpu-fine 1.2 times; 0.94 and 1.0 with one thread.
def rows_padded(rows, matrices, sizes):
    """Each expert's rows (M,n) by its matrix (E,n,m) -> (M,m)."""
    groups, products = even_groups(sizes), []
    own_rows = rows.split([sum(group) for group in groups])
    own_matrices = matrices.split([len(group) for group in groups])
    for group, a, b in zip(groups, own_rows, own_matrices):
        products += [product[:n] for product, n in zip(filled_up(a, group) @ b, group)]
    return torch.cat(products)


def columns_padded(columns, rows, sizes):
    """Each expert's columns (n,M) by its rows (M,m) -> (E,n,m)."""
    groups, products = even_groups(sizes), []
    tokens = [sum(group) for group in groups]
    for group, a, b in zip(groups, columns.t().split(tokens), rows.split(tokens)):
        products.append(filled_up(a, group).transpose(1, 2) @ filled_up(b, group))
    return torch.cat(products)


def even_groups(sizes):
    """Sizes in groups of neighbours, each of which at most doubles when all of it are filled up to its longest."""
    if len(sizes) == 1 or len(sizes) * max(sizes) <= 2 * sum(sizes):
        return [sizes]
    half = len(sizes) // 2
    return even_groups(sizes[:half]) + even_groups(sizes[half:])


def filled_up(rows, sizes):
    """Rows (M,n) -> (E,most,n), filled up with zeros; most: the largest size, rounded up by a quarter at most, or
    to a multiple of 64."""
    longest = max(sizes)
    step = max(64, 2 ** (longest.bit_length() - 3))
    filled = rows.new_empty(len(sizes), -(-longest // step) * step, rows.size(1))
    torch._foreach_copy_([own[:n] for own, n in zip(filled, sizes)], rows.split(sizes))
    torch._foreach_zero_([own[n:] for own, n in zip(filled, sizes)])
    return filled


# ---------------------------------------------------------------------------------------------------------------------
# Operators: rows to experts and back


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
    order = torch.argsort(ids.flatten().int(), stable=True)               # (N*K,) copy that goes to each row
    rows = torch.arange(len(order), device=ids.device)
    return torch.empty_like(order).scatter_(0, order, rows).view_as(ids)


def count_ids(ids, n_experts):
    """Copies for each expert, without bincount, which would make the host wait: ids (N,K) -> (E,) int64."""
    counts = torch.zeros(n_experts, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))


def copy_to_slots(x, slot, n_rows, padded):
    """Row slot[n,k] becomes token n, the others zeros: x (N,C), slot (N,K) -> (n_rows,C). Padded: see unpermute."""
    tokens = torch.arange(len(slot), dtype=slot.dtype, device=x.device)
    token_of_row = slot.new_full((n_rows + padded,), len(x))              # rows without a token: one past the end
    token_of_row.scatter_(0, slot.flatten(), tokens.unsqueeze(1).expand_as(slot).flatten())
    if padded:
        x = with_zero_row(x)
    return x.index_select(0, token_of_row[:n_rows])


def sum_of_slots(rows, slot, padded):
    """The sum of rows slot[n,k] over k: rows (M,C), slot (N,K) -> (N,C)."""
    if padded:                                                            # dropped copies read a zero row past the end
        rows = with_zero_row(rows)
    if backend(rows) in ("plain", "npu"):
        return rows[slot].sum(1)
    if torch.compiler.is_compiling():                                     # one kernel, also with what is around it
        return sum(rows[own] for own in slot.unbind(1))
    return F.embedding_bag(slot, rows, mode="sum")                        # the same without (N,K,C) in memory


def with_zero_row(x):
    return torch.cat((x, x.new_zeros(1, x.size(1))))


class GatherRows(torch.autograd.Function):
    """copy_to_slots. Its backward is SumRows' forward; autograd's own, an accumulating index_put, is many times slower.
    """

    @staticmethod
    def forward(ctx, x, slot, n_rows, padded):
        ctx.save_for_backward(slot)
        ctx.padded = padded
        return copy_to_slots(x, slot, n_rows, padded)

    @staticmethod
    def backward(ctx, grad):
        slot, = ctx.saved_tensors
        return sum_of_slots(grad, slot, ctx.padded), None, None, None


class SumRows(torch.autograd.Function):
    """sum_of_slots. Its backward is GatherRows' forward."""

    @staticmethod
    def forward(ctx, rows, slot, padded):
        ctx.save_for_backward(slot)
        ctx.n_rows, ctx.padded = len(rows), padded
        return sum_of_slots(rows, slot, padded)

    @staticmethod
    def backward(ctx, grad):
        slot, = ctx.saved_tensors
        return copy_to_slots(grad, slot, ctx.n_rows, ctx.padded), None, None


# ---------------------------------------------------------------------------------------------------------------------
# Operators: losses


def cross_entropy(h, weight, targets):
    """Summed loss of the head's logits: h (N,C), weight (V,C), targets (N,), -100 ignored -> float32 or better."""
    if backend(h) == "plain":
        logits = (h @ weight.to(h.dtype).t()).to(at_least_float32(h.dtype))
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return HeadCrossEntropy.apply(h, weight, targets, Vocabulary())


def token_cross_entropy(h, weight, targets):
    """The loss of each token: h (N,C), weight (V,C), targets (N,) -> (N,) float32 or better, 0 where ignored.

    Backward makes a chunk's logits again: only then is known what each token counts. Ignored rows, in rl most, have no
    logits, for which the host waits to know them.
    """
    counted = (targets != -100).nonzero().squeeze(1)
    h, found = h[counted], h.new_zeros(len(h), dtype=at_least_float32(h.dtype))

    def losses(rows, weight, labels):
        logits = F.linear(rows, weight.to(rows.dtype)).to(at_least_float32(rows.dtype))
        return F.cross_entropy(logits, labels, reduction="none")

    step = rows_of_logits(h, weight)
    chunks = zip(h.split(step), targets[counted].split(step))
    nats = [checkpoint(losses, rows, weight, labels, use_reentrant=False) for rows, labels in chunks]
    return found.index_copy(0, counted, torch.cat(nats))


class Vocabulary(NamedTuple):
    """The part of a vocabulary that is here; parallel.py: one of several, on as many ranks."""
    first: int = 0                                                        # number of its first token
    parts: int = 1
    maximum: Callable = lambda x: x                                       # of a number from each part
    sum: Callable = lambda x: x


class HeadCrossEntropy(torch.autograd.Function):
    """Head and loss together, a chunk of rows at a time, so that all (N,V) logits never stand in memory. A chunk's
    gradient is made while its logits are at hand; backward only scales it.

    The losses of all parts of a vocabulary sum to that of the whole, as do their gradients of h.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, vocabulary):
        w = weight.to(h.dtype)
        wide = at_least_float32(h.dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_h = torch.empty_like(h) if needs_grad else None
        grad_w = torch.zeros(weight.shape, dtype=wide, device=h.device) if needs_grad else None
        loss = torch.zeros((), dtype=wide, device=h.device)
        step = rows_of_logits(h, weight)
        compilable = vocabulary.parts == 1 and h.device.type != "cpu"     # there it gains nothing
        chunk = maybe_compiled(loss_of_chunk, h) if compilable else loss_of_chunk
        for start in range(0, len(h), step):
            rows = h[start:start + step]
            nats, grad = chunk(rows @ w.t(), targets[start:start + step], vocabulary, needs_grad)
            loss += nats
            if needs_grad:
                grad_h[start:start + step] = grad @ w
                grad_w += grad.t() @ rows
        ctx.save_for_backward(grad_h, grad_w)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad.to(grad_h.dtype), grad_w * grad, None, None  # autograd casts to the weight's own dtype


def rows_of_logits(h, weight):
    """How many rows of h (N,C) have their logits in memory at a time, with the head's weight (V,C)."""
    elements = LOGIT_ELEMENTS
    if h.device.type != "cpu":                                            # a GPU wants few and large kernels
        elements = min(2**26, -(-len(h) // 4) * len(weight))
    return max(512, elements // len(weight))


def loss_of_chunk(logits, targets, vocabulary, needs_grad):
    """Summed loss of logits (N,V) at targets (N,), -100 ignored, and its gradient of them, in their dtype."""
    label = targets.unsqueeze(1)                                          # (N,1)
    exact = logits.to(at_least_float32(logits.dtype))
    kept = (label != -100).to(exact.dtype)                                # 0 for what is ignored
    label = label - vocabulary.first
    here = ((label >= 0) & (label < logits.size(1))).to(exact.dtype)      # 0 also for a label of other parts
    label = label.clamp(0, logits.size(1) - 1)
    exact -= vocabulary.maximum(exact.amax(-1, keepdim=True))
    chosen = exact.gather(1, label)
    total = vocabulary.sum(exact.exp_().sum(-1, keepdim=True))
    loss = (total.log() * kept / vocabulary.parts - chosen * here).sum()
    if not needs_grad:
        return loss, None
    softmax = exact.mul_(kept / total)
    at_label = softmax.gather(1, label) - here
    grad = softmax.to(logits.dtype)
    grad[torch.arange(len(grad), device=grad.device), label.squeeze(1)] = at_label.squeeze(1).to(grad.dtype)
    return loss, grad


class AddGradient(torch.autograd.Function):
    """The identity on x that also sends `scale` back into `loss`: so a balance loss needs no way to the final loss."""

    @staticmethod
    def forward(ctx, x, loss, scale):
        ctx.like, ctx.scale = loss, scale
        return x.clone()                                                  # FSDP warns of views

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones_like(ctx.like) * ctx.scale, None


# ---------------------------------------------------------------------------------------------------------------------
# Rotary position


def rope_table(config, positions, dtype):
    """cos and sin of all positions' angles: positions (B or 1, T) -> two of (B or 1, T, 1, D/2), float32 or better."""
    c = config
    dtype = at_least_float32(dtype)
    dims = torch.arange(0, c.qk_rope_head_dim, 2, dtype=dtype, device=positions.device)
    frequency = 1.0 / c.rope_theta ** (dims / c.qk_rope_head_dim)         # (D/2,) radians a token
    scale = 1.0
    if c.rope_scaling is not None:
        frequency = yarn_stretched(c, frequency, dims / 2)
        scale = yarn_mscale(c, "mscale") / yarn_mscale(c, "mscale_all_dim")
    angle = positions.to(dtype)[..., None, None] * frequency              # (B or 1, T, 1, D/2)
    return angle.cos() * scale, angle.sin() * scale


def yarn_stretched(config, frequency, pairs):
    """YaRN (arXiv:2309.00071): frequency (D/2,) of pairs 0, 1, ... -> those for `factor` times the original length.

    Slow pairs, which turn less than beta_slow times over the original length, are stretched by `factor`; fast ones,
    above beta_fast turns, are kept; those between are mixed.
    """
    c = config
    yarn = YARN_DEFAULTS | c.rope_scaling

    def pair_that_turns(times):
        """Over the original length; a real number."""
        length = yarn["original_max_position_embeddings"] / (times * 2 * math.pi)
        return c.qk_rope_head_dim * math.log(length) / (2 * math.log(c.rope_theta))

    low = max(math.floor(pair_that_turns(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_that_turns(yarn["beta_slow"])), c.qk_rope_head_dim - 1)
    stretched = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)      # 0: kept, 1: stretched
    return frequency * (1 - stretched) + frequency / yarn["factor"] * stretched


def yarn_mscale(config, name):
    """Factor on cos, sin or attention's scale that keeps the softmax as sharp over more tokens."""
    yarn = YARN_DEFAULTS | config.rope_scaling
    return 0.1 * yarn[name] * math.log(yarn["factor"]) + 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class KeepAll:
    """What becomes of tensors that backward needs: here autograd keeps them. There (parallel.Memory) those under a name
    of Plan.recompute or Plan.swap are not."""

    def again(self, names, make, *inputs):
        """make(*inputs), a tensor or several. There made again in backward."""
        return make(*inputs)

    def remake(self, names, made, make, *inputs):
        """The same for what was made already, where make is another way to it."""
        return made

    def region(self, name, run, x):
        """run(x). There nothing inside is kept: backward runs it again."""
        return run(x)

    def swap(self, name, x):
        """x. There it waits for backward in the host's memory."""
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
        C, heads = c.hidden_size, c.num_attention_heads
        self.latent = c.kv_lora_rank                                      # widths
        self.nope, self.rope = c.qk_nope_head_dim, c.qk_rope_head_dim
        self.v = c.v_head_dim
        self.q_a_proj = Linear(C, c.q_lora_rank)
        self.q_a_layernorm = Norm(c.q_lora_rank, c.latent_norm_eps)
        self.q_b_proj = Linear(c.q_lora_rank, heads * c.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(C, self.latent + self.rope)
        self.kv_a_layernorm = Norm(self.latent, c.latent_norm_eps)
        self.kv_b_proj = Linear(self.latent, heads * (self.nope + self.v))
        self.o_proj = Linear(heads * self.v, C)
        self.gather_tokens = lambda *latents: latents                     # parallel.py: those of a tensor group
        self.gather_context = lambda latent, k_rope: (latent, k_rope)     # parallel.py: those of a whole sequence
        self.scale = c.qk_head_dim ** -0.5
        if c.rope_scaling is not None:                                    # as in DeepSeek-V3's code
            self.scale *= yarn_mscale(c, "mscale_all_dim") ** 2

    def forward(self, x, angles, mask, cache=None):
        """x (B,T,C), angles of rope_table, mask of document_mask, or with a cache those it gave -> (B,T,C)."""
        # latents of queries, and of keys with values, both normed; the key's part with position: (B,T,*)
        q_latent = self.memory.again("norm", self.q_a_layernorm, self.q_a_proj(x))
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent, self.rope), -1)
        latent = self.memory.again("norm", self.kv_a_layernorm, latent)
        q_latent, latent, k_rope = self.gather_tokens(q_latent, latent, k_rope)
        k_rope = rope(k_rope.unsqueeze(2), *angles)                       # (B,T,1,D)
        latent, k_rope = self.gather_context(latent, k_rope)
        if cache is not None:
            seen = cache.put(self, torch.cat((latent, k_rope.squeeze(2)), -1))            # (B,S,latent+D)
            if cache.absorbs:
                return self.o_proj(self.absorbed(q_latent, seen, angles, mask))
            latent, k_rope = seen.split((self.latent, self.rope), -1)
            k_rope = k_rope.unsqueeze(2)
        q, k, v = self.memory.again("mla_up", self.up, q_latent, latent, k_rope, *angles)
        # the kernel keeps its output, o_proj what is cut out of it: one tensor where values were not padded
        out = self.memory.swap("attn_out", attention(q, k, v, self.scale, mask))
        out = self.memory.swap("attn_out", out[..., :self.v].flatten(2))  # (B,T,H*D)
        return self.o_proj(out)

    def up(self, q_latent, latent, k_rope, cos, sin):
        """Latents (B,T,*), one rope key (B,T,1,D) for all heads -> q, k, v (B,T,H,*)."""
        q = torch.cat(self.queries(q_latent, cos, sin), -1)
        kv = self.kv_b_proj(latent).unflatten(-1, (-1, self.nope + self.v))
        k_nope, v = kv.split((self.nope, self.v), -1)
        heads = k_nope.size(2)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, heads, -1)), -1)
        return q, k, as_wide_as_keys(v, k).contiguous()                   # a view would keep k_nope beside it

    def queries(self, q_latent, cos, sin):
        """q_latent (B,T,*) -> queries (B,T,H,*), in two parts: without position, and turned."""
        # heads are counted from the weight by -1: tensor parallelism gives a rank a part of them
        q = self.q_b_proj(q_latent).unflatten(-1, (-1, self.nope + self.rope))
        q_nope, q_rope = q.split((self.nope, self.rope), -1)
        return q_nope, rope(q_rope, cos, sin)

    def absorbed(self, q_latent, seen, angles, mask):
        """Attention among latents, which are never expanded (DS section 2.1.1): q_latent (B,T,*), seen (B,S,latent+D)
        of a Cache -> (B,T,H*D). The up-projections of keys and values, W and U, pass to queries and outputs:

            q . (W latent_j) = (W^T q) . latent_j        sum_j p_j (U latent_j) = U (sum_j p_j latent_j)
        """
        q_nope, q_rope = self.queries(q_latent, *angles)
        T, heads = q_nope.shape[1:3]
        self.kv_b_proj(seen[:, :0, :self.latent])                         # on nothing: FSDP's hooks bring its weight
        kv_b = self.kv_b_proj.weight.to(q_nope.dtype).unflatten(0, (heads, -1))           # (H, nope+v, latent)
        w, u = kv_b.split((self.nope, self.v), 1)
        q = torch.cat((torch.einsum("bthd,hdl->bthl", q_nope, w), q_rope), -1)            # (B,T,H,latent+D)
        # all heads share the keys, so they are queries of one head: (B,T*H,1,latent+D)
        q, keys = q.flatten(1, 2).unsqueeze(2), seen.unsqueeze(2)
        out = attention(q, keys, keys, self.scale, mask.repeat_interleave(heads, 2))
        out = out[:, :, 0, :self.latent].unflatten(1, (T, heads))         # values: keys without their position
        return torch.einsum("bthl,hdl->bthd", out, u).flatten(2)


class MLP(Part):
    """SwiGLU: the MLP of a dense layer, and the shared expert."""

    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj = Linear(width, inner)
        self.up_proj = Linear(width, inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x):
        gate_up = torch.cat((self.gate_proj(x), self.up_proj(x)), -1)
        return self.down_proj(self.memory.again("act", swiglu, gate_up))


# ---------------------------------------------------------------------------------------------------------------------
# Experts


class WideLinear(torch.autograd.Function):
    """x (N,C) times weight (E,C), in float32 or better -> (N,E). Keeps x as it is, not its cast."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        wide = at_least_float32(x.dtype)
        return F.linear(x.to(wide), weight.to(wide))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
        return grad_x, grad.t() @ x.to(grad.dtype)                        # autograd casts to the weight's own dtype


class Router(nn.Module):
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
        logits = WideLinear.apply(x.flatten(0, 1), self.weight)           # (N,E)
        scores = self.score(logits)
        ids = self.choose(scores.detach()) if forced_ids is None else forced_ids.reshape(len(logits), -1)
        weights = self.weigh(scores, ids)
        self.aux_loss = scores.new_zeros(())
        if not self.training:
            return ids, weights
        counts = self.count(ids, n_sequences=len(x))
        if self.c.balance == "none" or self.c.aux_loss_alpha == 0:
            return ids, weights
        aux_loss = self.balance_loss(counts, logits, scores)
        self.aux_loss = aux_loss.detach() * self.aux_scale
        return ids, AddGradient.apply(weights, aux_loss, self.aux_scale)

    def score(self, logits):
        """(N,E) -> (N,E): what experts are chosen by, what weights and the balance loss are made of."""
        return logits.sigmoid() if self.c.scoring_func == "sigmoid" else logits.softmax(-1)

    def weigh(self, scores, ids):
        """Routing weights (N,K) of the chosen experts ids (N,K), from all scores (N,E)."""
        weights = scores.gather(1, ids)
        if self.c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.c.routed_scaling_factor

    def choose(self, scores):
        """The best K experts of each token under the rule of groups: scores (N,E) -> ids (N,K)."""
        c = self.c
        if c.router_bias:
            scores = scores + self.e_score_correction_bias.to(scores.dtype)
        if c.n_group > 1 and c.group_choice == "equal":
            return self.choose_equally(scores)
        if c.n_group > 1:
            scores = self.in_best_groups(scores)
        return scores.topk(c.num_experts_per_tok, sorted=False).indices

    def choose_equally(self, scores):
        """K/n_group experts of each group: scores (N,E) -> ids (N,K)."""
        groups = scores.unflatten(1, (self.c.n_group, -1))                # (N, groups, E/groups)
        ids = groups.topk(self.c.num_experts_per_tok // self.c.n_group, sorted=False).indices
        first = torch.arange(0, scores.size(1), groups.size(2), device=ids.device)
        return (ids + first.unsqueeze(1)).flatten(1)

    def in_best_groups(self, scores):
        """scores (N,E), -inf outside the topk_group best groups; a group is worth the sum of its best two (DS)."""
        groups = scores.unflatten(1, (self.c.n_group, -1))                # (N, groups, E/groups)
        worth = groups.topk(min(2, groups.size(2))).values.sum(-1)        # (N, groups)
        best = worth.topk(self.c.topk_group, sorted=False).indices
        left_out = torch.ones_like(worth, dtype=torch.bool).scatter_(1, best, False)
        return groups.masked_fill(left_out.unsqueeze(2), -math.inf).flatten(1)    # not 0: biased scores can be negative

    def count(self, ids, n_sequences):
        """Copies for each expert by balance group of these sequences, or the part of one: ids (N,K) -> (G,E)."""
        E = self.c.n_routed_experts
        G = n_sequences // sequences_of_group(self.c, n_sequences)
        first = torch.arange(G, device=ids.device).unsqueeze(1) * E       # group by group in one count
        counts = count_ids(ids.reshape(G, -1) + first, G * E).view(G, E)
        self.load = self.load + counts.sum(0)
        return counts

    def balance_loss(self, counts, logits, scores):
        """alpha * sum_i f_i p_i, a mean over groups of sequences (PP eq. 4-6): counts (G,E), logits and scores (N,E).

        f_i: share of the group's copies that expert i got, times E; from counts, without gradient. p_i: mean score.
        """
        c, (G, E) = self.c, counts.shape
        tokens = len(scores) // G                                         # of a group, held here
        copies = tokens * c.num_experts_per_tok
        f = self.average_counts(counts.to(scores.dtype)) * (E / copies)   # (G,E)
        if c.aux_scores == "softmax":
            scores = logits.softmax(-1)
        scores = scores.view(G, tokens, E)
        if c.aux_scores == "normalized":                                  # what a token's scores count, (G,tokens)
            factor = (scores.sum(-1) + 1e-18).reciprocal()                # squared in backward, and still finite
        else:
            factor = torch.ones_like(scores[..., 0])
        sums = torch.bmm(factor.unsqueeze(1), scores)                     # (G,1,E); makes no second (N,E)
        p = sums.squeeze(1) / tokens                                      # (G,E)
        return c.aux_loss_alpha * (f * p).sum(-1).mean()


def sequences_of_group(config, n_sequences):
    """Of the n_sequences of a micro-batch, how many form a balance group, or the part of a larger one that is here."""
    if config.balance == "sequence":
        return 1
    if config.balance in ("none", "micro_batch") or config.balance_group == 0:
        return n_sequences
    size = config.balance_group
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

    def forward(self, rows, counts, row_weights):
        """rows (M,C) sorted by expert, counts (E,), row_weights (M,) -> (M,C), weighted.

        Weighting the expert-wide activation costs less than the model-wide output, and what the weight's gradient needs
        comes from gate_up. After the down-projection (MindSpeed's default) dweight = sum over C of out * dout: out is
        kept, or waits in the host's memory (swap=expert_out).
        """
        gate_up = self.memory.again("expert", self.grouped, rows, self.gate_up_proj, counts)       # (M,2I)
        hidden = self.memory.again("act expert", swiglu, gate_up, row_weights if self.weight_before_down else None)
        out = self.grouped(hidden, self.down_proj, counts)                                         # (M,C)
        if self.weight_before_down:
            return out
        return self.memory.swap("expert_out", out) * row_weights.unsqueeze(-1)

    def grouped(self, rows, weight, counts):
        return grouped_matmul(rows, weight, counts, self.store)


class LocalDispatcher:
    """Brings tokens to experts and sums what comes back, on one device. No Module: parallel.py derives its exchanges.

    With capacity_factor > 0 an expert takes ceil(capacity_factor * N * K / E) copies, those of the highest routing
    weight, padded with zeros; the rest are dropped and counted.
    """

    def __init__(self, c):
        self.n_experts, self.capacity_factor = c.n_routed_experts, c.capacity_factor
        self.dropped = 0                                                  # copies dropped by the last dispatch

    def dispatch(self, x, ids, weights):
        """x (N,C), ids (N,K), weights (N,K) -> rows (M,C) sorted by expert, row_weights (M,), counts (E,), ctx.

        ctx: what combine needs; here slot (N,K), the row of each copy, or M for a dropped one.
        """
        if self.capacity_factor > 0:
            capacity = self.capacity(ids)
            slot = self.slots_with_capacity(ids, weights, capacity)
            rows = GatherRows.apply(x, slot, self.n_experts * capacity, True)
            # not torch.full: of its cumsum torch.compile makes one of another dtype than was asked for
            ends = torch.arange(self.n_experts + 1, device=x.device) * capacity
            counts = ends.diff()
        else:
            rows, slot = permute(x, ids)
            counts = count_ids(ids, self.n_experts)
        row_weights = weights.new_zeros(len(rows) + 1)                    # the last for dropped copies
        row_weights = row_weights.scatter(0, slot.flatten().long(), weights.flatten())[:-1]
        return rows, row_weights.to(x.dtype), counts, slot

    def capacity(self, ids):
        """Copies that an expert takes of choices ids (N,K)."""
        return math.ceil(self.capacity_factor * ids.numel() / self.n_experts)

    def slots_with_capacity(self, ids, weights, capacity):
        """Row of each copy where every expert has `capacity` rows, or E * capacity for a dropped one: (N,K).

            capacity 2: ids = [[0], [0], [0], [1]], weights = [[.1], [.3], [.2], [.1]]  ->  [[4], [0], [1], [2]]
        """
        # 1. copies sorted by expert, the heaviest first within one
        by_weight = torch.argsort(weights.detach().flatten(), descending=True, stable=True)
        expert = ids.flatten()[by_weight]
        by_expert = torch.argsort(expert, stable=True)
        order, expert = by_weight[by_expert], expert[by_expert]           # (N*K,)
        # 2. each one's place among those of its expert
        counts = count_ids(ids, self.n_experts)
        first = counts.cumsum(0) - counts                                 # (E,) where an expert's copies begin
        place = torch.arange(len(order), device=ids.device) - first[expert]
        # 3. its row, written where the copy stands in ids
        taken = place < capacity
        row = torch.where(taken, expert * capacity + place, self.n_experts * capacity)
        self.dropped = (~taken).sum()
        return torch.empty_like(row).scatter_(0, order, row).view_as(ids)

    def wait(self, rows, row_weights, ctx):
        """Where an exchange in flight ends; nothing is in flight on one device."""
        return rows, row_weights

    def resend(self, x, ctx):
        """The rows of a dispatch once more: x (N,C) -> (M,C)."""
        if self.capacity_factor > 0:
            return copy_to_slots(x, ctx, self.n_experts * self.capacity(ctx), True)
        return copy_to_slots(x, ctx.long(), ctx.numel(), False)           # the NPU's own are int32

    def combine(self, rows, ctx):
        """Unweighted sum of each token's rows: (M,C) -> (N,C)."""
        return unpermute(rows, ctx, padded=self.capacity_factor > 0)


class Sent(NamedTuple):
    """Tokens on their way to experts."""
    x: torch.Tensor                           # (B,T,C) for the shared expert
    ids: torch.Tensor                         # (N,K)
    rows: torch.Tensor                        # these and the next two: see LocalDispatcher.dispatch
    row_weights: torch.Tensor
    counts: torch.Tensor
    ctx: object


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
        sent = Sent(x, ids, *self.dispatcher.dispatch(x.flatten(0, 1), ids, weights))
        if self.training:
            self.dropped = self.dropped + self.dispatcher.dropped
        return sent

    def compute(self, sent):
        """The shared expert while rows travel, then the routed ones: what combine takes."""
        shared = None if self.shared_experts is None else self.shared_experts(sent.x)
        rows = self.compute_routed(sent.x, sent.rows, sent.row_weights, sent.counts, sent.ctx)
        return rows, shared, sent.x.shape, sent.ctx

    def compute_routed(self, x, rows, row_weights, counts, ctx):
        rows, row_weights = self.dispatcher.wait(rows, row_weights, ctx)
        rows = self.memory.remake("permute", rows, lambda x: self.dispatcher.resend(x.flatten(0, 1), ctx), x)
        return self.experts(rows, counts, row_weights)

    def combine(self, done):
        rows, shared, shape, ctx = done
        routed = self.dispatcher.combine(rows, ctx).view(shape)
        return routed if shared is None else routed + shared


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class Block(Part):
    """One layer, as four calls that another micro-batch's can be put between.

        x = x + post_attention_layernorm(attention(input_layernorm(x)))
        x = x + post_mlp_layernorm(mlp(pre_mlp_layernorm(x)))           # norm=pre: without the two post norms
    """

    def __init__(self, c, index):
        super().__init__()
        self.index = index                                                # global number of the layer
        self.is_moe = index >= c.first_k_dense_replace
        norm = partial(Norm, c.hidden_size, c.rms_norm_eps)
        post_norm = nn.Identity if c.norm == "pre" else norm
        self.input_layernorm = norm()
        self.self_attn = Attention(c)
        self.post_attention_layernorm = post_norm()
        self.pre_mlp_layernorm = norm()
        self.mlp = MoE(c) if self.is_moe else MLP(c.hidden_size, c.intermediate_size)
        self.post_mlp_layernorm = post_norm()

    def forward(self, x, angles, mask=None, routing=None, cache=None):
        x = self.attend(x, angles, mask, cache)
        sent = self.dispatch(x, routing)
        done = self.compute(sent)
        return self.combine(x, done)

    def attend(self, x, angles, mask=None, cache=None):
        def attention(x):
            h = self.memory.again("norm", self.input_layernorm, x)
            return self.self_attn(h, angles, mask, cache)

        return x + self.post_attention_layernorm(self.memory.region("attention", attention, x))

    def dispatch(self, x, routing=None):
        """x (B,T,C) -> Sent, or of a dense layer the MLP's input, which goes nowhere.

        routing: None, or a dict of layer -> ids (B,T,K): a layer that is there is forced, any other is noted.
        """
        h = self.memory.again("norm", self.pre_mlp_layernorm, x)
        if not self.is_moe:
            return h
        if routing is None:
            return self.mlp.dispatch(h)
        sent = self.mlp.dispatch(h, routing.get(self.index))
        routing[self.index] = sent.ids.unflatten(0, x.shape[:2])
        return sent

    def compute(self, sent):
        return self.mlp.compute(sent) if self.is_moe else self.mlp(sent)

    def combine(self, x, done):
        y = self.mlp.combine(done) if self.is_moe else done
        return x + self.post_mlp_layernorm(y)


class MTPLayer(Block):
    """One more depth of prediction: the hidden state joined with the embedding of the next token (DS section 2.2)."""

    def __init__(self, c, index):
        super().__init__(c, index)
        self.hidden_first = c.mtp_concat == "hidden_first"
        norm = partial(Norm, c.hidden_size, c.rms_norm_eps)
        self.enorm = norm()
        self.hnorm = norm()
        self.eh_proj = Linear(2 * c.hidden_size, c.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": norm()})

    def join(self, embedded, h):
        """Both, and the result, (B,T,C)."""
        embedded, h = self.enorm(embedded), self.hnorm(h)
        halves = (h, embedded) if self.hidden_first else (embedded, h)
        return self.eh_proj(torch.cat(halves, -1))


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
    x: torch.Tensor | None = None             # with a cache: (B,T,C) that MTP goes on from, see mtp_hidden


class Model(nn.Module):
    """The whole model, or, with parts set to None, a pipeline stage of it. Memory is not filled before init_weights."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, _weight=torch.empty(c.vocab_size, c.hidden_size))
        self.layers = nn.ModuleDict()                                     # by global number
        for i, kind in enumerate(layer_kinds(c)):
            self.layers[str(i)] = MTPLayer(c, i) if kind == "mtp" else Block(c, i)
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size)
        self.compute_dtype = None                                         # None: the embedding's own
        self.cross_entropy = cross_entropy                                # parallel.py: with a part of the head
        self.token_loss = None                                            # see output; of reinforcement learning
        self.gather_logits = lambda logits: logits                        # parallel.py: of all parts of the head

    def forward(self, ids, *, targets=None, labels=None, positions=None, doc_ids=None, next_ids=None, routing=None,
                policy=None, return_logits=False, loss_tokens=None, cache=None, place=None):
        """ids (B,T), or without embedding a hidden state (B,T,C) -> Output, or without last norm the hidden state.

        targets (B, 1+MTP, T): token i+1+d for depth d at i, -100 ignored; MTP layers without targets do not run.
        labels (B,T): unshifted ids, shifted here. positions (B,T), default 0..T-1. doc_ids (B,T): attention stays
        inside equal numbers. next_ids (B, MTP, T): token i+d for depth d, default from targets, or from ids. routing:
        see Block.dispatch. loss_tokens (1+MTP,): target tokens of the global batch per depth, by default of this call.
        policy (B,T,n): what token_loss makes losses of at depth 0, beside each token's own. Logits without targets or
        on request. cache: ids go on behind the tokens in it; no MTP. place (B,): logits there alone, (B,1,V).
        """
        c, mtp_layers, T = self.config, self.mtp_layers(), ids.size(1)
        require(T <= c.max_position_embeddings, f"sequence of {T} tokens above max_position_embeddings="
                                                f"{c.max_position_embeddings}: shorten the one or raise the other")
        if labels is not None:
            targets = shifted(labels, range(1, 2 + c.num_nextn_predict_layers), -100)
        if targets is not None:
            mtp_layers = mtp_layers[:targets.size(1) - 1]                 # no more than have targets
        if cache is not None:
            positions, mask = cache.extend(T)
        else:
            positions, next_ids = fill_inputs(ids, targets, len(mtp_layers), positions, next_ids)
            mask = document_mask(doc_ids)
        x = ids if self.embed_tokens is None else self.embed(ids)         # (B,T,C)
        angles = rope_table(c, positions, x.dtype)
        for block in self.layers.values():
            if not isinstance(block, MTPLayer):
                x = block(x, angles, mask, routing, cache)
        if self.norm is None:
            return x
        if cache is not None:
            return self.read_out(x, self.norm, place)
        hiddens = []                                                      # what the head reads, one (B,T,C) a depth
        for depth, layer in enumerate(mtp_layers):
            hidden, x = self.join(depth, x, next_ids)
            hiddens.append(hidden)
            x = layer(x, angles, mask, routing)
        hiddens.append(self.head_norm(len(mtp_layers))(x))
        return self.output(hiddens, targets, loss_tokens, return_logits or targets is None, policy)

    def draft(self, depth, x, next_ids, cache, place=None):
        """Depth `depth` of MTP on what is new to its cache: x (B,T,C) which `depth` layers made, next_ids (B,T) token
        i+1+depth at i -> Output as of forward with a cache. Past the last layer, the last one goes on with its own x.
        """
        positions, mask = cache.extend(x.size(1))
        layers = self.mtp_layers()
        layer = layers[min(depth, len(layers) - 1)]
        x = layer.join(self.embed(next_ids), x)
        x = layer(x, rope_table(self.config, positions, x.dtype), mask, cache=cache)
        return self.read_out(x, layer.shared_head["norm"], place)

    def read_out(self, x, norm, place):
        """Logits of the stream x (B,T,C), of all of it or in one place (B,) of each sequence."""
        is_normed = self.config.mtp_hidden == "post_norm"                 # what MTP goes on from
        x = norm(x) if is_normed else x
        at = x if place is None else x[torch.arange(len(x)), place].unsqueeze(1)
        out = self.output([at if is_normed else norm(at)], None, None, True)
        out.x = x
        return out

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
        """The norm between the head and the stream x that `depth` MTP layers made."""
        if depth == 0:
            return self.norm
        return self.mtp_layers()[depth - 1].shared_head["norm"]

    def join(self, depth, x, next_ids):
        """x (B,T,C), which `depth` MTP layers made -> what the head reads of it, and the next MTP layer's input."""
        hidden = self.head_norm(depth)(x)
        entering = x if self.config.mtp_hidden == "pre_norm" else hidden
        embedded = self.embed(next_ids[:, depth])
        return hidden, self.mtp_layers()[depth].join(embedded, entering)

    def output(self, hiddens, targets, loss_tokens, want_logits, policy=None):
        """hiddens: one (B,T,C) a depth."""
        out = Output()
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        if want_logits:
            out.logits, *out.mtp_logits = [self.gather_logits(F.linear(h, head.to(h.dtype))) for h in hiddens]
        if targets is None:
            return out
        if loss_tokens is None:
            loss_tokens = (targets != -100).sum((0, 2)).clamp(min=1)      # (1+MTP,)
        losses = []
        for depth, h in enumerate(hiddens):
            flat, labels = h.flatten(0, 1), targets[:, depth]
            if policy is not None and depth == 0:
                nats = token_cross_entropy(flat, head, labels.flatten()).view_as(labels)
                summed = self.token_loss(nats, policy).sum()
            else:
                summed = self.cross_entropy(flat, head, labels.flatten())
            losses.append(summed / loss_tokens[depth])
        zero = torch.zeros_like(losses[0])
        out.loss, *mtp_losses = losses
        out.mtp_loss = sum(mtp_losses, zero) / max(1, len(mtp_losses))
        resting = max(0, len(self.mtp_layers()) - len(mtp_losses))        # layers at the end that did not run
        out.aux_loss = sum((router.aux_loss for router in self.routers()[:-resting or None]), zero)
        out.total_loss = out.loss + self.config.mtp_loss_weight * out.mtp_loss + out.aux_loss
        return out

    # what a trainer asks of the routers

    @property
    def aux_scale(self):
        """Share of the global batch that one forward sees; the balance loss and its gradient are multiplied by it."""
        return self.routers()[0].aux_scale if self.routers() else 1.0

    @aux_scale.setter
    def aux_scale(self, share):
        weight = next(self.parameters())                                  # a tensor: a new share compiles nothing anew
        share = torch.full((), share, dtype=at_least_float32(weight.dtype), device=weight.device)
        for router in self.routers():
            router.aux_scale = share

    def pop_stats(self):
        """Counted in training since last asked, on the device: loads (MoE layers, E), and copies dropped."""
        moes = [block.mlp for block in self.moe_blocks()]
        device = next(self.parameters()).device
        loads = torch.zeros(len(moes), self.config.n_routed_experts, dtype=torch.int64, device=device)
        dropped = torch.zeros((), dtype=torch.int64, device=device)
        no_load, none_dropped = loads.new_zeros(loads.size(1)), torch.zeros_like(dropped)
        for own, moe in zip(loads, moes):
            own += moe.gate.load
            dropped += moe.dropped
            moe.gate.load = no_load                                       # shared: counting replaces it
            moe.dropped = none_dropped
        return dict(loads=loads, dropped=dropped)

    @torch.no_grad()
    def update_router_bias(self, loads):
        """Raise the bias of experts below the mean load, lower the others': loads (MoE layers, E) of one step."""
        for router, load in zip(self.routers(), loads.float()):
            if self.config.router_bias and router.weight.requires_grad:   # else there is none, or it is frozen
                below = (load.mean() - load).sign()
                router.e_score_correction_bias += self.config.bias_update_speed * below

    @torch.no_grad()
    def init_weights(self, seed=0):
        """Fill every tensor, also after to_empty; see initial_scale for the table."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            module = self.get_submodule(name.rpartition(".")[0])
            fill_initial(tensor, self.config, name, seed, getattr(module, "first_expert", 0))


def shifted(ids, distances, fill):
    """ids (B,T) moved left by each distance, ends filled: (B, len(distances), T)."""
    T = ids.size(1)
    return torch.stack([F.pad(ids, (0, n), value=fill)[:, n:n + T] for n in distances], 1)


def fill_inputs(ids, targets, depths, positions=None, next_ids=None):
    """(positions (1 or B, T), next_ids (B, depths, T): tokens i+1, i+2, ... that MTP reads at i), made if not given.

    ids (B,T), or hidden states (B,T,C) where no MTP layer is (depths=0); targets (B,1+MTP,T) or None.
    """
    if positions is None:
        positions = torch.arange(ids.size(1), device=ids.device).unsqueeze(0)
    if next_ids is None and depths:
        next_ids = shifted(ids, range(1, 1 + depths), 0)
        if targets is not None:                                           # they know what is past the end, too
            known = targets[:, :depths]
            next_ids = torch.where(known >= 0, known, next_ids)
    return positions, next_ids


def document_mask(doc_ids):
    """doc_ids (B,T) -> (B,1,T,T), True where i may see j: same document, not later. None stays None, a mask a mask."""
    if doc_ids is None or doc_ids.dim() == 4:
        return doc_ids
    same = doc_ids.unsqueeze(2) == doc_ids.unsqueeze(1)                   # (B,T,T)
    return same.tril().unsqueeze(1)


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
    c, L, d = config, config.num_hidden_layers, config.hidden_size
    if "e_score_correction_bias" in name:
        return "constant", 0.0
    if "norm" in name:
        if c.norm == "dssn" and "post_attention_layernorm" in name:
            return "constant", c.dssn_c_attn / math.sqrt(L)
        if c.norm == "dssn" and "post_mlp_layernorm" in name:
            return "constant", c.dssn_c_mlp / math.sqrt(L)
        return "constant", 1.0
    if c.init == "tiny":
        return "normal", 0.5 if "embed_tokens" in name else math.sqrt(1 / (2 * d * L))
    if "o_proj" in name or "down_proj" in name:
        return "normal", math.sqrt(2 / (5 * d * L))
    return "normal", math.sqrt(2 / (5 * d))


def fill_initial(tensor, config, name, seed, first_expert=0):
    """Fill one tensor in place. Each has a seed of its own, each expert in a stacked one by its global number: so the
    same numbers come out however the model is cut."""
    kind, scale = initial_scale(config, name)
    if kind == "constant":
        tensor.fill_(scale)
        return
    matrices = enumerate(tensor, first_expert) if ".experts." in name else [(-1, tensor)]
    for expert, matrix in matrices:
        digest = hashlib.blake2b(f"{seed} {name} {expert}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        matrix.copy_(torch.randn(matrix.shape, generator=generator) * scale)


# ---------------------------------------------------------------------------------------------------------------------
# Published names: of configs and of tensors. Files are parallel.py's matter

# keys of openPangu's first releases, each beside DeepSeek's, which is ours; transformers writes num_mtp_layers, too
OTHER_KEYS = dict(
    num_dense_layers="first_k_dense_replace", num_routed_experts="n_routed_experts",
    num_shared_experts="n_shared_experts", attention_q_lora_dim="q_lora_rank", attention_kv_lora_dim="kv_lora_rank",
    attention_qk_dim="qk_nope_head_dim", attention_qk_rope_dim="qk_rope_head_dim", attention_v_dim="v_head_dim",
    num_mtp_layers="num_nextn_predict_layers")
# what a published config must say of itself: nothing here is a matter of defaults
SHAPE_KEYS = """vocab_size hidden_size num_hidden_layers first_k_dense_replace intermediate_size num_attention_heads
    q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim max_position_embeddings n_routed_experts
    n_shared_experts num_experts_per_tok moe_intermediate_size norm_topk_prob routed_scaling_factor rms_norm_eps
    """.split()
OPTIONAL_KEYS = "num_nextn_predict_layers scoring_func n_group topk_group tie_word_embeddings".split()
# settings that this model has no choice in
FIXED_KEYS = dict(hidden_act="silu", attention_bias=False, attention_dropout=0.0, moe_layer_freq=1,
                  rope_interleave=True)
# what transformers' DeepSeek-V3 has no choice in
IN_TRANSFORMERS = dict(norm="pre", scoring_func="sigmoid", group_choice="limited", capacity_factor=0,
                       latent_norm_eps=1e-6)


def config_from_hf(hf):
    """A config.json of DeepSeek-V3, openPangu-Ultra-MoE or config_to_hf -> Config. ValueError for what the model here
    does not compute."""
    kinds = "deepseek_v3", "pangu_ultra_moe"
    kind = hf.get("model_type")
    require(kind in kinds, f"model_type={kind!r} is not known here: use a model of {' or '.join(kinds)}")
    hf = {OTHER_KEYS.get(key, key): value for key, value in hf.items()}
    fixed = FIXED_KEYS | dict(num_key_value_heads=hf.get("num_attention_heads"))
    for key, value in fixed.items():
        require(hf.get(key, value) == value, f"{key}={hf.get(key)!r}: the model here has {value!r} only")
    groups = ["n_group", "topk_group"] if kind == "deepseek_v3" else []
    absent = [key for key in SHAPE_KEYS + groups if key not in hf]
    require(not absent, f"it does not say {', '.join(absent)}")
    shape = dict(num_nextn_predict_layers=0) | {key: hf[key] for key in SHAPE_KEYS + OPTIONAL_KEYS if key in hf}
    if kind == "deepseek_v3":
        shape |= dict(norm="pre", router_bias=hf.get("topk_method", "noaux_tc") == "noaux_tc")
    else:
        shape |= dict(norm="sandwich" if hf.get("sandwich_norm") else "pre",
                      router_bias=bool(hf.get("router_enable_expert_bias")))
    ours = hf.get("training", {})                                         # of config_to_hf
    unknown = set(ours) - {each.name for each in fields(Config)}
    require(not unknown, f"its training has {', '.join(map(repr, unknown))}, which is no setting here")
    return Config(**shape | rope_from_hf(hf) | ours)


def rope_from_hf(hf):
    """rope_theta and rope_scaling, which transformers 5 writes as one object, rope_parameters."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", hf.get("rope_theta"))
    require(theta is not None, "it does not say rope_theta")
    kinds = {rope.pop("type", None), rope.pop("rope_type", None)} - {None, "default"}
    scaling = {key: value for key, value in rope.items() if value is not None}
    return dict(rope_theta=theta, rope_scaling=dict(type=kinds.pop(), **scaling) if kinds else None)


def config_to_hf(config):
    """The inverse, in keys that transformers and vLLM read; what is only ours is the object `training`."""
    pre = config.norm == "pre"
    name, kind = ("DeepseekV3", "deepseek_v3") if pre else ("PanguUltraMoE", "pangu_ultra_moe")
    values = asdict(config)
    hf = dict(architectures=[f"{name}ForCausalLM"], model_type=kind, **FIXED_KEYS)
    hf |= {key: values.pop(key) for key in SHAPE_KEYS + OPTIONAL_KEYS}
    scaling = values.pop("rope_scaling")
    hf |= dict(num_key_value_heads=config.num_attention_heads, rope_theta=values.pop("rope_theta"),
               rope_scaling=scaling and scaling | dict(rope_type="yarn"))
    if pre:
        hf["topk_method"] = "noaux_tc" if config.router_bias else "greedy"
    else:
        hf |= dict(sandwich_norm=config.norm in ("dssn", "sandwich"), router_enable_expert_bias=config.router_bias)
    return hf | dict(training=values)


def published_names(config, name, expert=0):
    """Published names of the matrices that lie one below the other in a tensor of ours, or in an expert's part of it:
    layers.3.mlp.experts.gate_up_proj, 5 -> model.layers.3.mlp.experts.5.gate_proj.weight, ...up_proj..."""
    if ".experts." in name:
        prefix, _, stacked = name.rpartition(".")
        halves = ("gate_proj", "up_proj") if stacked == "gate_up_proj" else (stacked,)
        return [f"model.{prefix}.{expert}.{half}.weight" for half in halves]
    if config.norm == "pre":                                              # there this is the norm before the MLP
        name = name.replace("pre_mlp_layernorm", "post_attention_layernorm")
    return [name if name.startswith("lm_head") else f"model.{name}"]


def to_hf(model):
    """Tensors under their published names, experts one by one; views of the model's own memory."""
    published = {}
    for name, tensor in model.state_dict().items():
        first, matrices = 0, [tensor]
        if ".experts." in name:
            first, matrices = model.get_submodule(name.rpartition(".")[0]).first_expert, tensor
        for expert, matrix in enumerate(matrices, first):
            names = published_names(model.config, name, expert)
            published |= zip(names, matrix.chunk(len(names)))
    return published


@torch.no_grad()
def load_hf(model, tensors):
    """Fill the model from a dict of published names, or, if they do not fit, nothing of it: see check_published."""
    wanted = to_hf(model)
    check_published(model.config, wanted, tensors)
    for name, own in wanted.items():
        own.copy_(tensors[name])


def check_published(config, wanted, given, others={}):
    """{name: what has a shape}, twice: ValueError that names all that is missing, has no place, or has another shape.
    others: more of such faults, {in words: {name: in words}}.

    Left out without a word are MTP layers beyond the config's, what theirs repeat (embedding, head), and a tied head.
    """
    faults = dict(missing={name: repr(name) for name in wanted if name not in given})
    without_place = [name for name in given if name not in wanted and not is_mtp(config, name)]
    faults["without a place"] = {name: repr(name) for name in without_place
                                 if not (config.tie_word_embeddings and name == "lm_head.weight")}
    faults["of another shape"] = {
        name: f"{name!r} {tuple(given[name].shape)}, in the model {tuple(own.shape)}"
        for name, own in wanted.items() if name in given and given[name].shape != own.shape}
    found = []
    for fault, names in (faults | others).items():
        if names:
            found.append(f"{len(names)} tensors {fault}: {alike(names)}")
    if faults["missing"] and all(is_mtp(config, name) for name in faults["missing"]):
        found.append("for a model without MTP layers set num_nextn_predict_layers=0")
    require(not found, "; ".join(found))


def alike(texts):
    """{name: text} in short: the first of those that differ in numbers only, and how many follow."""
    groups = {}
    for name, text in texts.items():
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(text)
    words = [text if not more else f"{text} and {len(more)} alike" for text, *more in groups.values()]
    if len(words) > 20:
        words = [*words[:20], f"and {len(words) - 20} kinds more"]
    return ", ".join(words)


def is_mtp(config, name):
    """Whether a published name is of a layer past the last of num_hidden_layers."""
    layer = re.match(r"model\.layers\.(\d+)\b", name)
    return layer is not None and int(layer[1]) >= config.num_hidden_layers


# ---------------------------------------------------------------------------------------------------------------------
# Generation: the cache

CHUNK = 512               # tokens of a prompt that pass the model at a time


class Cache:
    """What attention keeps of the tokens seen: a latent and a turned rope key, kv_lora_rank + qk_rope_head_dim numbers
    a token and layer (DS section 2.1.1), of which keys and values of all heads can be made.

    Token i of a sequence lies in slot i. What lies past a sequence's length is never seen, and is written over: so
    padding behind a short one, or a draft that was refused, is cropped away.
    """

    def __init__(self, model, layers, sequences, size):
        """Room for `size` tokens of each of `sequences` in these layers of a model."""
        c = self.config = model.config
        self.size = size
        weight = model.embed_tokens.weight
        self.options = dict(dtype=model.compute_dtype or weight.dtype, device=weight.device)
        self.lengths = torch.zeros(sequences, dtype=torch.int64)          # (B,) on the host
        self.kept = {}                                                    # (B,size,n) by attention
        for layer in layers:
            self.add(layer.self_attn, c.kv_lora_rank + c.qk_rope_head_dim)

    def add(self, key, width):
        # zeros: slots never written meet probabilities of 0, and 0 * NaN would be NaN
        self.kept[key] = torch.zeros(len(self.lengths), self.size, width, **self.options)

    def extend(self, n_tokens):
        """T = n_tokens more for each sequence -> their positions (B,T), and which slots they see: (B,1,T,S), or None in
        an empty cache: causally each other."""
        longest = max(self.lengths.tolist(), default=0)
        require(longest + n_tokens <= self.size,
                f"{longest} tokens in a cache for {self.size}, and {n_tokens} more: make it larger")
        device = self.options["device"]
        self.positions = (self.lengths.unsqueeze(1) + torch.arange(n_tokens)).to(device)
        self.lengths = self.lengths + n_tokens
        self.seen = min(self.size, 64 * math.ceil((longest + n_tokens) / 64))             # S; kernels like few sizes
        self.is_fresh = longest == 0
        self.absorbs = not self.is_fresh and self.absorbing_is_cheaper(n_tokens, self.seen)
        if self.is_fresh:
            return self.positions, None
        mask = torch.arange(self.seen, device=device) <= self.positions.unsqueeze(2)
        return self.positions, mask.unsqueeze(1)

    def absorbing_is_cheaper(self, T, S):
        """By products for each head: T queries against S latents and rope keys, or against keys made of S latents."""
        c = self.config
        projection = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)             # of one token, down or up
        absorbed = T * projection + T * S * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
        expanded = S * projection + T * S * (c.qk_head_dim + c.v_head_dim)
        return absorbed < expanded

    def put(self, key, new):
        """Write what `key`, an attention, has of the new tokens (B,T,n) -> the same of all slots they see (B,S,n)."""
        rows = torch.arange(len(new), device=new.device).unsqueeze(1)
        self.kept[key][rows, self.positions] = new.detach()
        return new if self.is_fresh else self.kept[key][:, :self.seen]

    def crop(self, lengths):
        """Forget what lies past lengths (B,)."""
        self.lengths = torch.minimum(self.lengths, lengths)

    def keep(self, rows):
        """These sequences only, by number."""
        self.lengths = self.lengths[rows]
        rows = rows.to(self.options["device"])
        self.kept = {key: tensor[rows] for key, tensor in self.kept.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Generation: drawing tokens


def distribution(logits, temperature, top_k, top_p):
    """logits (...,V) -> probabilities (...,V) to draw by; the other arguments as in generate."""
    logits = logits.to(at_least_float32(logits.dtype))
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    logits = logits / temperature
    if top_k == 0 and top_p >= 1:
        return logits.softmax(-1)
    logits, order = logits.sort(descending=True)                          # likeliest first
    if top_k:
        logits[..., top_k:] = -math.inf
    probabilities = logits.softmax(-1)
    likelier = probabilities.cumsum(-1) - probabilities                   # probability of all likelier tokens
    probabilities = logits.masked_fill(likelier >= top_p, -math.inf).softmax(-1)
    return torch.zeros_like(logits).scatter_(-1, order, probabilities)


def draw(probabilities, generator):
    """(B,V), which need not sum to 1 -> (B,). As torch.multinomial, which is several times slower on a CPU: by a race
    of exponential times, each divided by a probability."""
    p = probabilities
    times = -torch.rand(p.shape, generator=generator, device=p.device, dtype=p.dtype).log()       # above 0
    return (p / times).argmax(-1)


def check_drafts(p, q, drafts, generator):
    """Speculative sampling (arXiv:2211.17192): p (B,1+k,V) the model's distributions of the next tokens, q (B,k,V)
    those that drafts (B,k) were drawn from -> how many drafts of each sequence hold (B,), the token behind them (B,).

    A draft x holds with probability min(1, p(x)/q(x)); in place of the first that does not, a token is drawn from what
    p has more than q. What comes out is distributed by p. With temperature 0 both have one token each: equal ones hold.
    """
    k = drafts.size(1)
    at = drafts.unsqueeze(2)                                              # (B,k,1)
    ratio = p[:, :k].gather(2, at) / q.gather(2, at)
    coins = torch.rand(ratio.shape, generator=generator, device=p.device, dtype=p.dtype)
    held = (coins < ratio).squeeze(2).long().cumprod(1).sum(1)            # up to the first that does not
    q = F.pad(q, (0, 0, 0, 1))                                            # behind the last draft nothing was drawn
    rows = torch.arange(len(p), device=p.device)
    p, q = p[rows, held], q[rows, held]                                   # (B,V)
    rest = (p - q).clamp(min=0)
    some = rest.sum(1, keepdim=True) > 0                                  # none is left of equal ones but by rounding
    return held, draw(torch.where(some, rest, p), generator)


# ---------------------------------------------------------------------------------------------------------------------
# Generation: sequences that are continued together


@dataclass
class Answer:
    """What was written to one prompt."""
    ids: list = field(default_factory=list)   # a stop id that ended it included
    log_probs: list = field(default_factory=list)   # of each, by the whole softmax of logits / temperature
    routing: dict | None = None               # layer -> experts (T,K) of all tokens fed: prompt and ids but the last


@dataclass
class Answers:
    answers: list                             # one Answer a prompt
    rounds: int = 0                           # forwards that checked drafts, counted for each sequence
    held: list | None = None                  # of these, the ones in which draft 1, 2, ... held


@torch.no_grad()
def generate(model, prompts, new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=0, stop=(), drafts=0,
             note_routing=False, on_tokens=None, anybody=bool):
    """Continue prompts, a list of ids (T,) of any lengths, by up to new_tokens each, or to an id of stop -> Answers.

    temperature 0: the likeliest token. top_k: the k likeliest tokens only (0: all). top_p: the fewest tokens that hold
    this much probability. drafts: tokens that MTP drafts in each round; they change the speed, not what is drawn from.
    on_tokens(number of a prompt, new ids) is called as they come. anybody(whether this rank has something to do) ->
    whether any rank has: see parallel.generating. With capacity_factor, what is dropped depends on the batch.
    """
    was_training = model.training
    model.eval()
    try:
        choice = partial(distribution, temperature=temperature, top_k=top_k, top_p=top_p)
        generator = torch.Generator(prompts[0].device).manual_seed(seed)
        writer = Writer(model, prompts, new_tokens, drafts, choice, generator, note_routing, anybody)
        result = Answers([Answer() for _ in prompts], held=[0] * drafts)
        going = range(len(prompts) if new_tokens else 0)
        while anybody(len(going) > 0):
            writer.keep(going)
            logits, tokens, new = writer.round()
            wide = logits.to(at_least_float32(logits.dtype)) / (temperature or 1)
            log_probs = wide.log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
            going = add_to(result, writer.rows, tokens, log_probs, new, new_tokens, stop, on_tokens)
        for row, answer in enumerate(result.answers):
            fed = len(prompts[row]) + len(answer.ids) - 1
            answer.routing = {layer: ids[row, :fed] for layer, ids in writer.routing.items()} if note_routing else None
    finally:
        model.train(was_training)
    return result


def add_to(result, rows, tokens, log_probs, new, new_tokens, stop, on_tokens):
    """A round's tokens and log_probs (B,1+k), of which `new` (B,) hold, to the answers of prompts `rows` (B,) -> places
    in the batch of those that go on."""
    going = []
    for place, (row, count, ids, values) in enumerate(zip(*(x.tolist() for x in (rows, new, tokens, log_probs)))):
        result.rounds += 1
        result.held = [held + (i < count - 1) for i, held in enumerate(result.held)]
        answer = result.answers[row]
        ids = ids[:min(count, new_tokens - len(answer.ids))]
        end = next((i for i, token in enumerate(ids) if token in stop), None)
        ids = ids if end is None else ids[:end + 1]
        answer.ids += ids
        answer.log_probs += values[:len(ids)]
        if on_tokens is not None:
            on_tokens(row, ids)
        if end is None and len(answer.ids) < new_tokens:
            going.append(place)
    return going


class Writer:
    """Sequences that are continued together, by rounds: MTP drafts tokens, one forward of the model checks them and
    adds one. Without drafts a round is one token.

    A sequence has known tokens 0..n, of which the last has not been fed: n is main's length. MTP's layer of depth d has
    at i the stream of the layer before it at i, and token i+1+d. So with D layers all before i = n-D+1 is final; what
    follows came of drafts, and is cropped and computed again in the next round, from tokens that are certain.
    """

    def __init__(self, model, prompts, new_tokens, drafts, choice, generator, note_routing, anybody):
        """choice: logits (...,V) -> probabilities. The rest as in generate."""
        self.model, self.drafts, self.choice, self.generator = model, drafts, choice, generator
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        require(min(lengths.tolist()) > 0, "a prompt has no tokens: give one at least")
        layers = model.mtp_layers()[:drafts]                              # D of them
        require(drafts == 0 or layers, "drafts are made by MTP, and the model has no such layer: use 0 drafts")

        trunk = [layer for layer in model.layers.values() if not isinstance(layer, MTPLayer)]
        size, window = int(lengths.max()) + new_tokens, model.config.max_position_embeddings
        require(size <= window, f"{size} tokens, prompt and answer, above max_position_embeddings={window}, and "
                                "the window does not slide: shorten one of them")
        room = dict(sequences=len(prompts), size=size + drafts)
        self.main = Cache(model, trunk, **room)
        self.mtp = [Cache(model, [layer], **room) for layer in layers]
        if drafts:
            self.main.add("x", model.config.hidden_size)                  # what MTP starts from
        tokens = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        self.tokens = F.pad(tokens, (0, new_tokens + drafts + len(layers)))
        self.rows = torch.arange(len(prompts))                            # numbers of the prompts that are still here
        self.routing = {} if note_routing else None                       # layer -> (prompts,size,K)
        self.read(lengths - 1, anybody)

    def at(self, start, count):
        """start (B,) on the host -> rows (B,1) and places (B,count) of the next `count` slots: to index with."""
        places = start.unsqueeze(1) + torch.arange(count)
        return torch.arange(len(start), device=self.tokens.device).unsqueeze(1), places.to(self.tokens.device)

    def read(self, last, anybody):
        """All tokens of the prompts but their last, number `last` (B,), in chunks."""
        done, end = 0, int(last.max())
        while anybody(done < end):
            size = min(CHUNK, end - done) or 1                            # others still read: a token to be cropped
            done = min(done + size, end)
            self.feed(size, place=torch.zeros_like(last))
            self.main.crop(last.clamp(max=done))
            if self.drafts:
                self.draft(size, last, is_reading=True)

    def feed(self, size, place=None):
        """The next `size` tokens through the model -> logits (B,size,V), or in one place (B,1,V)."""
        noted = None if self.routing is None else {}
        ids = self.tokens[self.at(self.main.lengths, size)]
        out = self.model(ids, cache=self.main, routing=noted, place=place)
        if self.drafts:
            self.main.put("x", out.x)
        for layer, chosen in (noted or {}).items():
            if layer not in self.routing:
                self.routing[layer] = chosen.new_zeros(len(self.rows), self.main.size, chosen.size(2))
            self.routing[layer][self.rows.to(chosen.device).unsqueeze(1), self.main.positions] = chosen
        return out.logits

    def draft(self, size, n, is_reading=False):
        """MTP's layers over the next `size` places, the last of them again and again: drafts of tokens n+1, n+2, ...
        (n (B,)) in self.tokens -> the distributions (B,V) that they were drawn from. Reading: over a prompt, no drafts.
        """
        depths, start, drawn_by = len(self.mtp), self.mtp[0].lengths, []
        rows, places = self.at(start, size)
        every, behind = rows[:, 0], n.to(rows.device) + 1
        x = self.main.kept["x"][rows, places]
        place = (n - start - 1).clamp(0, size - 1).to(rows.device)        # n-1, of which the drafts are made
        for depth in range(depths if is_reading else self.drafts):
            cache = self.mtp[min(depth, depths - 1)]
            if depth < depths:
                ids = self.tokens[rows, places + 1 + depth]
            else:                                                         # on from the last draft and its own stream
                x = x[every, place].unsqueeze(1)
                ids = token.unsqueeze(1)
                place = torch.zeros_like(place)
                cache.crop(n + depth - depths)
            out = self.model.draft(depth, x, ids, cache, place)
            x = out.x
            if not is_reading:
                drawn_by.append(self.choice(out.logits.squeeze(1)))
                token = draw(drawn_by[-1], self.generator)
                self.tokens[every, behind + depth] = token
        final = torch.minimum(start + size, n - depths + 1).clamp(min=0)
        for cache in self.mtp:
            cache.crop(final)
        return drawn_by

    def round(self):
        """-> logits (B,1+k,V) of the next tokens, these tokens (B,1+k), and how many of them hold (B,), at least 1."""
        n, drawn_by = self.main.lengths, []
        if self.drafts:                                                   # D+k places at most; one where there is none
            size = max((n - self.mtp[0].lengths).tolist(), default=0)
            drawn_by = self.draft(max(size, 1), n)
        logits = self.feed(1 + self.drafts)                               # the last known token, and drafts
        p = self.choice(logits)
        q = torch.stack(drawn_by, 1) if drawn_by else p[:, :0]
        rows, places = self.at(n + 1, 1 + self.drafts)
        held, token = check_drafts(p, q, self.tokens[rows, places[:, :-1]], self.generator)
        self.tokens[rows[:, 0], places[:, 0] + held] = token
        new = held.cpu() + 1
        self.main.crop(n + new)
        return logits, self.tokens[rows, places], new

    def keep(self, places):
        """Go on with these sequences only, by their places in the batch."""
        if len(places) < len(self.rows):
            places = torch.tensor(list(places), dtype=torch.int64)
            for cache in (self.main, *self.mtp):
                cache.keep(places)
            self.rows = self.rows[places]
            self.tokens = self.tokens[places.to(self.tokens.device)]
