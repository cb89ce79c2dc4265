"""
A big mixture-of-experts language model in one file: the recipe of Pangu Ultra MoE (arXiv:2505.04519).

Multi-head latent attention, fine-grained routed experts beside a shared one, depth-scaled sandwich norm, TinyInit,
multi-token prediction and a balance loss over groups of sequences. Written for one device: nothing here knows of
process groups. parallel.py takes a built model and spreads it; what the model carries only for that sake is this:

    MoE.dispatcher          who brings rows to experts and back; here the local one, there an exchange between ranks
    Router.average_counts   the identity here, an average over the ranks of a balance group there
    Linear.store            a WeightGradStore that delays weight gradients, so that they can hide an exchange
    Block's four calls      attend, dispatch, compute, combine: two micro-batches can be interleaved between them
    embed_tokens, norm, lm_head, layers   may be None or a subset: a pipeline stage is the model minus the rest
    Experts.first_expert    the number of the first expert held here, so that seeding does not depend on the cut

Legend of dimensions: B batch, T sequence, C model width, H heads, D head width, N tokens (B*T), K experts per token,
E experts, M rows sent to experts, I expert width, V vocabulary, G balance groups.

References. PU: Pangu Ultra, arXiv:2504.07866 (the dense sister model: norms and initialisation). PP: Pangu Pro MoE,
arXiv:2505.21411 (balance loss, experts chosen equally from groups). DS: DeepSeek-V3, arXiv:2412.19437 (latent attention,
router bias, group-limited choice, multi-token prediction).
"""
import math
import zlib
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Config and presets


@dataclass(frozen=True)
class Config:
    """A model's shape, in the spelling of DeepSeek-style configs. Checked when made; every refusal says what would fit."""
    vocab_size: int = 2048
    hidden_size: int = 192
    num_hidden_layers: int = 4
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
    router_bias: bool = False                 # added to scores for the choice alone, moved by load and not by a loss (DS)
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


CHOICES = dict(
    scoring_func=("sigmoid", "softmax"), group_choice=("limited", "equal"), expert_weight=("before_down", "after_down"),
    balance=("none", "sequence", "micro_batch", "ep_group", "dp_group"), aux_scores=("normalized", "softmax", "raw"),
    mtp_hidden=("pre_norm", "post_norm"), mtp_concat=("embed_first", "hidden_first"), norm=("dssn", "sandwich", "pre"),
    init=("tiny", "small"))


def divisors(n, limit=8):
    """Divisors of n, for messages that say what would fit; the largest `limit` of them."""
    return [d for d in range(1, n + 1) if n % d == 0][-limit:]


def check_config(c):
    """ValueError, in one line with the numbers and what would fit, for a shape that cannot be built."""
    def require(ok, message):
        if not ok:
            raise ValueError(message)

    for name, allowed in CHOICES.items():
        require(getattr(c, name) in allowed, f"{name}={getattr(c, name)!r}: use one of {', '.join(allowed)}")
    may_be_zero = {"first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers", "balance_group"}
    for field in fields(c):
        if field.type in (int, "int"):
            least = 0 if field.name in may_be_zero else 1
            value = getattr(c, field.name)
            require(isinstance(value, int) and value >= least, f"{field.name}={value!r}: a whole number of at least {least}")
    for name in ("rope_theta", "routed_scaling_factor", "rms_norm_eps", "latent_norm_eps"):
        require(getattr(c, name) > 0, f"{name}={getattr(c, name)}: must be above 0")
    for name in ("capacity_factor", "aux_loss_alpha", "mtp_loss_weight", "bias_update_speed"):
        require(getattr(c, name) >= 0, f"{name}={getattr(c, name)}: must not be negative")

    experts, k, groups = c.n_routed_experts, c.num_experts_per_tok, c.n_group
    require(c.first_k_dense_replace <= c.num_hidden_layers,
            f"first_k_dense_replace={c.first_k_dense_replace} above num_hidden_layers={c.num_hidden_layers}: "
            f"use 0 to {c.num_hidden_layers}")
    require(k <= experts, f"num_experts_per_tok={k} above n_routed_experts={experts}: use 1 to {experts}")
    require(experts % groups == 0,
            f"n_group={groups} does not divide n_routed_experts={experts}: use one of {divisors(experts)}")
    if c.group_choice == "equal":
        require(k % groups == 0, f"n_group={groups} does not divide num_experts_per_tok={k}, which group_choice=equal "
                                 f"needs: use one of {[d for d in divisors(k) if experts % d == 0]}")
    else:
        require(c.topk_group <= groups, f"topk_group={c.topk_group} above n_group={groups}: use 1 to {groups}")
        require(k <= c.topk_group * experts // groups,
                f"num_experts_per_tok={k} above the {c.topk_group * experts // groups} experts of topk_group="
                f"{c.topk_group} groups: raise topk_group to {math.ceil(k * groups / experts)} or lower num_experts_per_tok")
    require(c.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim={c.qk_rope_head_dim} is odd, rotary position turns pairs: use {c.qk_rope_head_dim + 1}")
    require(c.v_head_dim <= c.qk_head_dim,
            f"v_head_dim={c.v_head_dim} above qk_nope_head_dim + qk_rope_head_dim={c.qk_head_dim}, which fused attention "
            f"does not take: use at most {c.qk_head_dim}")
    if c.rope_scaling is not None:
        check_rope_scaling(c.rope_scaling, require)


def check_rope_scaling(scaling, require):
    known = {"type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    require(isinstance(scaling, dict) and scaling.get("type") == "yarn",
            f"rope_scaling={scaling!r}: use null, or an object with type=yarn")
    unknown = set(scaling) - known
    require(not unknown, f"rope_scaling has unknown keys {sorted(unknown)}: use {sorted(known)}")
    for name in ("factor", "original_max_position_embeddings"):
        require(scaling.get(name, 0) >= 1, f"rope_scaling needs {name} of at least 1")


def _fixed(vocab, sequence, hidden, layers, dense, heads, ranks, dims, experts, width, top_k, **rest):
    """A preset written as one row: hidden, layers, dense FFN, heads, (q, kv) rank, (nope, rope, v) dims, experts."""
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
        _PANGU, vocab_size=129280, max_position_embeddings=163840, hidden_size=7168, rope_theta=10000.0, rms_norm_eps=1e-6,
        rope_scaling=dict(type="yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0,
                          mscale=1.0, mscale_all_dim=1.0),
        n_group=8, topk_group=4, router_bias=True, norm="pre", init="small", balance="sequence", aux_loss_alpha=0.0001),
    # fixed sizes, for comparisons with other implementations
    "cpu-small": _fixed(4096, 256, 256, 8, 640, 4, (96, 64), (32, 16, 32), 16, 128, 4),
    "cpu-fine": _fixed(4096, 256, 256, 8, 576, 4, (96, 64), (32, 16, 32), 64, 64, 8),
    "one-gpu": _fixed(32768, 4096, 2048, 12, 9216, 16, (768, 512), (128, 64, 128), 64, 1024, 8),
    "one-gpu-256": _fixed(32768, 4096, 2048, 8, 4608, 16, (768, 512), (128, 64, 128), 256, 512, 8),
}


# ---------------------------------------------------------------------------------------------------------------------
# Counts, from Config alone


def layer_params(c):
    """Parameters of one layer's parts: dict of attention, norms, dense, moe, moe_active (routed ones per token only)."""
    heads, width = c.num_attention_heads, c.hidden_size
    attention = width * c.q_lora_rank + c.q_lora_rank * heads * c.qk_head_dim + c.q_lora_rank
    attention += width * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    attention += c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim) + heads * c.v_head_dim * width
    expert = 3 * width * c.moe_intermediate_size
    always = c.n_shared_experts * expert + c.n_routed_experts * width      # shared experts and router
    return dict(attention=attention, norms=(2 if c.norm == "pre" else 4) * width, dense=3 * width * c.intermediate_size,
                moe=c.n_routed_experts * expert + always, moe_active=c.num_experts_per_tok * expert + always)


def count_params(config):
    """Parameters as a dict: total and active (per token) without MTP, embedding, head, mtp (without the shared two).

    Router biases are not counted: they are moved by a rule, not learnt.
    """
    c, part = config, layer_params(config)
    n_moe = c.num_hidden_layers - c.first_k_dense_replace
    common = c.num_hidden_layers * (part["attention"] + part["norms"]) + c.first_k_dense_replace * part["dense"]
    embedding = c.vocab_size * c.hidden_size
    head = 0 if c.tie_word_embeddings else embedding
    outside = embedding + head + c.hidden_size                             # with the last norm
    mtp_extra = 2 * c.hidden_size**2 + 3 * c.hidden_size                   # eh_proj; enorm, hnorm, shared_head.norm
    mtp = c.num_nextn_predict_layers * (mtp_extra + part["attention"] + part["norms"] + part["moe"])
    return dict(total=common + n_moe * part["moe"] + outside, active=common + n_moe * part["moe_active"] + outside,
                embedding=embedding, head=head, mtp=mtp)


def flops_per_token(config, seq_len):
    """Model FLOPs of training on one token: 6 x active matmul parameters, head and MTP included, + causal attention.

    The head counts once per depth of prediction. Causal attention counts half of the scores; recomputation never counts.
    """
    c, part = config, layer_params(config)
    depths = c.num_nextn_predict_layers
    n_moe = c.num_hidden_layers - c.first_k_dense_replace + depths
    n_layers = c.num_hidden_layers + depths
    latent_norms = c.q_lora_rank + c.kv_lora_rank                          # parameters, but of no matmul
    matmul = n_layers * (part["attention"] - latent_norms) + c.first_k_dense_replace * part["dense"]
    matmul += n_moe * part["moe_active"] + (1 + depths) * c.vocab_size * c.hidden_size + depths * 2 * c.hidden_size**2
    scores = 3 * seq_len * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)   # 2 FLOPs x 1/2 causal x 3 passes
    return 6 * matmul + n_layers * scores
