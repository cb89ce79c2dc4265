"""
The model a second time, from its formulas alone: float64, plain loops, plain autograd, no speed.

It shares Config with model.py and nothing else, so that a mistake must be made twice to go unseen. Tensors come as a
dict under the model's own names (experts stacked). Every token is routed by a Python sort, every expert is called
token by token, every auxiliary loss is an ordinary term of the sum: what model.py does by sorting rows, by autograd
functions of its own and in blocks stands here in the shortest form.

Dimensions as in model.py: B batch, T sequence, C model width, H heads, D head width, N tokens (B*T), K experts per
token, E experts, V vocabulary.
"""
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F


def double_copy(tensors):
    """float64 leaves of a state dict; those of floating point ask for a gradient, the router bias does not."""
    return {name: t.detach().double().clone().requires_grad_("bias" not in name) for name, t in tensors.items()}


def fill_random(tensors, seed):
    """Values that show mistakes: matrices that keep the size of their input, gains around 1, a small router bias."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            tensor.copy_(1 + 0.3 * noise)
        elif "bias" in name:
            tensor.copy_(0.1 * noise)
        elif "embed_tokens" in name:
            tensor.copy_(noise)
        else:
            tensor.copy_(noise / tensor.shape[-1] ** 0.5)


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def silu_mlp(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def yarn_mscale(factor, mscale):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(config):
    """Radians per position of each pair (D/2,), the factor on the rotated values, the factor on the softmax scale.

    YaRN (arXiv:2309.00071): a pair that turns more than beta_fast times within the original length keeps its frequency,
    one that turns less than beta_slow times is slowed down by `factor`, those between are blended linearly.
    """
    dim, base = config.qk_rope_head_dim, config.rope_theta
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    yarn = config.rope_scaling
    if yarn is None:
        return frequencies, 1.0, 1.0

    def pair_that_turns(times):
        return dim * math.log(yarn["original_max_position_embeddings"] / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair_that_turns(yarn.get("beta_slow", 1))), dim - 1)
    pair = torch.arange(dim // 2, dtype=torch.float64)
    slowed = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = frequencies * (1 - slowed) + frequencies / yarn["factor"] * slowed
    all_dim = yarn_mscale(yarn["factor"], yarn.get("mscale_all_dim", 0))
    return frequencies, yarn_mscale(yarn["factor"], yarn.get("mscale", 1)) / all_dim, all_dim**2


def rotate(x, turn):
    """Neighbouring values of x (B,T,D) as complex numbers, each multiplied by turn (B,T,D/2)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def attention(config, w, x, positions, doc_ids):
    """x, result (B,T,C); positions, doc_ids (B,T). A token sees itself and what stands before it in its document."""
    c, (B, T, C) = config, x.shape
    frequencies, rope_factor, scale_factor = rope_frequencies(c)
    angles = positions[..., None] * frequencies
    turn = torch.polar(torch.full_like(angles, rope_factor), angles)
    q = rms_norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], c.latent_norm_eps) @ w["q_b_proj.weight"].T
    latent, k_rope = (x @ w["kv_a_proj_with_mqa.weight"].T).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    kv = rms_norm(latent, w["kv_a_layernorm.weight"], c.latent_norm_eps) @ w["kv_b_proj.weight"].T
    k_rope = rotate(k_rope, turn)

    visible = torch.ones(T, T).tril().bool()
    visible = visible & (doc_ids[:, :, None] == doc_ids[:, None, :])
    heads = []
    for q_head, kv_head in zip(q.chunk(c.num_attention_heads, -1), kv.chunk(c.num_attention_heads, -1)):
        q_nope, q_rope = q_head.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        k_nope, v = kv_head.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        scores = q_nope @ k_nope.mT + rotate(q_rope, turn) @ k_rope.mT
        scores = scores * scale_factor / math.sqrt(c.qk_head_dim)
        heads.append(scores.masked_fill(~visible, -math.inf).softmax(-1) @ v)
    return torch.cat(heads, -1) @ w["o_proj.weight"].T


# ---------------------------------------------------------------------------------------------------------------------
# Experts


def best(values, count, among):
    """The `count` members of `among` with the largest values, the lower index first where two are equal."""
    return sorted(among, key=lambda i: (-values[i], i))[:count]


def choose_experts(config, choice):
    """Experts of one token from its E scores for the choice (a list): K indices."""
    c, size = config, config.n_routed_experts // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(c.n_group)]
    if c.group_choice == "equal":
        return [e for group in groups for e in best(choice, c.num_experts_per_tok // c.n_group, group)]
    # A group is worth the sum of its two best scores (DeepSeek-V3, arXiv:2412.19437, section 2.1.2 and released code).
    worth = [sum(choice[e] for e in best(choice, 2, group)) for group in groups]
    allowed = [e for g in best(worth, c.topk_group, range(c.n_group)) for e in groups[g]]
    return best(choice, c.num_experts_per_tok, allowed)


def route(config, w, x):
    """x (N,C) -> logits (N,E), scores (N,E), ids (N,K), weights (N,K)."""
    logits = x @ w["gate.weight"].T
    scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
    choice = scores + w.get("gate.e_score_correction_bias", 0)
    ids = torch.tensor([choose_experts(config, row) for row in choice.tolist()])
    weights = scores.gather(1, ids)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return logits, scores, ids, weights * config.routed_scaling_factor


def kept_copies(config, ids, weights):
    """(token, k) pairs that an expert takes. With a capacity: the largest weights, at equal weight the first."""
    N, K = ids.shape
    copies = [(n, k) for n in range(N) for k in range(K)]
    if config.capacity_factor == 0:
        return copies
    capacity = math.ceil(config.capacity_factor * N * K / config.n_routed_experts)
    kept = []
    for expert in range(config.n_routed_experts):
        mine = [(n, k) for n, k in copies if ids[n, k] == expert]
        kept += sorted(mine, key=lambda copy: (-weights[copy].item(), copy[0]))[:capacity]
    return kept


def balance_loss(config, logits, scores, ids, B):
    """alpha * sum_i f_i p_i (Pangu Pro MoE, arXiv:2505.21411), averaged over groups of whole sequences."""
    c, E = config, config.n_routed_experts
    if c.balance == "none":
        return logits.new_zeros(())
    p = {"normalized": scores / (scores.sum(-1, keepdim=True) + 1e-20), "softmax": logits.softmax(-1), "raw": scores}
    sequences = {"sequence": 1, "micro_batch": B}.get(c.balance, c.balance_group or B)
    per_group = sequences * (len(ids) // B)                               # tokens
    losses = []
    for start in range(0, len(ids), per_group):
        chosen = ids[start:start + per_group].flatten().tolist()
        f = torch.tensor([chosen.count(e) for e in range(E)]).double() * E / len(chosen)
        losses.append((f * p[c.aux_scores][start:start + per_group].mean(0)).sum())
    return c.aux_loss_alpha * torch.stack(losses).mean()


def moe(config, w, x, B, found):
    """x (N,C) -> (N,C). Adds to `found` what was chosen, sent and dropped, and the balance loss."""
    logits, scores, ids, weights = route(config, w, x)
    kept = kept_copies(config, ids, weights)
    rows = [x.new_zeros(x.shape[1])] * len(x)
    for n, k in kept:
        expert = ids[n, k]
        gate, up = w["experts.gate_up_proj"][expert].chunk(2)
        rows[n] = rows[n] + weights[n, k] * silu_mlp(x[n], gate, up, w["experts.down_proj"][expert])
    found.ids.append(ids)
    found.kept.append(kept)
    found.aux_loss = found.aux_loss + balance_loss(config, logits, scores, ids, B)
    out = torch.stack(rows)
    if config.n_shared_experts:
        out = out + silu_mlp(x, *(w[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def under(tensors, prefix):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def layer(config, w, x, positions, doc_ids, found):
    """One block on x (B,T,C): a dense MLP where its weights have one, experts elsewhere; sandwich or pre-norm."""
    def norm(name, h):
        return rms_norm(h, w[name + ".weight"], config.rms_norm_eps)

    sandwich = config.norm != "pre"
    a = attention(config, under(w, "self_attn."), norm("input_layernorm", x), positions, doc_ids)
    x = x + (norm("post_attention_layernorm", a) if sandwich else a)
    h = norm("pre_mlp_layernorm", x)
    mlp = under(w, "mlp.")
    if "gate.weight" in mlp:
        m = moe(config, mlp, h.flatten(0, 1), len(x), found).view_as(x)
    else:
        m = silu_mlp(h, mlp["gate_proj.weight"], mlp["up_proj.weight"], mlp["down_proj.weight"])
    return x + (norm("post_mlp_layernorm", m) if sandwich else m)


def cross_entropy(logits, targets):
    """Summed over the targets that are not -100."""
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -(picked * (targets != -100)).sum()


def forward(config, tensors, ids, targets=None, next_ids=None, positions=None, doc_ids=None, loss_tokens=None,
            aux_scale=1.0):
    """ids (B,T), targets (B,1+MTP,T), next_ids (B,MTP,T) -> losses, logits (one (B,T,V) per depth), what was routed.

    Depth d of the MTP layers reads the stream of the depth before it beside the embedding of token i+1+d and predicts
    token i+2+d (DeepSeek-V3, section 2.2); the MTP loss is the mean over the depths.
    """
    c, w = config, tensors
    found = SimpleNamespace(ids=[], kept=[], aux_loss=torch.zeros((), dtype=torch.float64))
    positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
    doc_ids = torch.zeros_like(ids) if doc_ids is None else doc_ids
    embedding = w["embed_tokens.weight"]
    head = embedding if c.tie_word_embeddings else w["lm_head.weight"]

    x = embedding[ids]
    for i in range(c.num_hidden_layers):
        x = layer(c, under(w, f"layers.{i}."), x, positions, doc_ids, found)
    normed = rms_norm(x, w["norm.weight"], c.rms_norm_eps)
    found.logits = [normed @ head.T]
    for d in range(c.num_nextn_predict_layers if next_ids is not None else 0):
        part = under(w, f"layers.{c.num_hidden_layers + d}.")
        entering = x if c.mtp_hidden == "pre_norm" else normed
        halves = [rms_norm(embedding[next_ids[:, d]], part["enorm.weight"], c.rms_norm_eps),
                  rms_norm(entering, part["hnorm.weight"], c.rms_norm_eps)]
        halves = halves if c.mtp_concat == "embed_first" else halves[::-1]
        x = layer(c, part, torch.cat(halves, -1) @ part["eh_proj.weight"].T, positions, doc_ids, found)
        normed = rms_norm(x, part["shared_head.norm.weight"], c.rms_norm_eps)
        found.logits.append(normed @ head.T)
    if targets is None:
        return found

    tokens = (targets != -100).sum((0, 2)) if loss_tokens is None else loss_tokens
    losses = [cross_entropy(logits, targets[:, d]) / tokens[d] for d, logits in enumerate(found.logits)]
    found.loss = losses[0]
    found.mtp_loss = sum(losses[1:], torch.zeros_like(losses[0])) / max(len(losses) - 1, 1)
    found.aux_loss = found.aux_loss * aux_scale
    found.total_loss = found.loss + c.mtp_loss_weight * found.mtp_loss + found.aux_loss
    return found
