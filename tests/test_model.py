"""
Tests of model.py: Config, counts, operators, the whole against reference.py, properties, weights, behaviour.

Exact comparisons run in float64; operators and the fast path also in float32 and bfloat16.
"""
import copy
import random
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

import model as M
import reference as R
from model import Config, Model, PRESETS

SMALL = Config(
    vocab_size=61, hidden_size=24, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=40,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, max_position_embeddings=64, rope_theta=100.0,
    balance="ep_group", balance_group=2, aux_loss_alpha=0.3)
EXACT = 1e-9                                              # float64, relative to an array's largest value


def build(config, dtype=torch.float64, seed=0):
    """A model with values that show mistakes (no tensor all ones, all zeros or tiny)."""
    model = Model(config).to(dtype)
    R.fill_random(model.state_dict(), seed)
    return model


def batch(config, B=4, T=6, seed=0, ignored=5):
    """ids (B,T), targets (B,1+MTP,T) some of them ignored, next_ids (B,MTP,T), cut from longer sequences."""
    generator = torch.Generator().manual_seed(seed)
    depths = 1 + config.num_nextn_predict_layers
    tokens = torch.randint(config.vocab_size, (B, T + depths), generator=generator)
    shifted = torch.stack([tokens[:, 1 + d:1 + d + T] for d in range(depths)], 1)
    targets = shifted.clone()
    targets[seed % B, :, :min(ignored, T - 1)] = -100
    return tokens[:, :T], targets, shifted[:, :-1]


def distance(ours, expected):
    """Largest difference, relative to the largest expected value; to 1e-3 if that is less: some gradients are 0."""
    ours, expected = ours.double(), expected.double()
    return ((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


def assert_close(ours, expected, what, tolerance=EXACT):
    assert ours.shape == expected.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    error = distance(ours, expected)
    assert error <= tolerance, f"{what}: differs by {error:.2e} of the largest value, allowed {tolerance:.0e}"


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# Config


WRONG = [
    (dict(num_experts_per_tok=9), "num_experts_per_tok=9 n_routed_experts=8 1 to 8"),
    (dict(n_group=3), "n_group=3 n_routed_experts=8 [1, 2, 4, 8]"),
    (dict(n_group=4, topk_group=5), "topk_group=5 n_group=4 1 to 4"),
    (dict(n_group=4, topk_group=1, num_experts_per_tok=4), "num_experts_per_tok=4 topk_group=2 up to 2"),
    (dict(n_group=4, group_choice="equal", num_experts_per_tok=2), "n_group=4 num_experts_per_tok=2 [1, 2]"),
    (dict(first_k_dense_replace=5), "first_k_dense_replace=5 0 to num_hidden_layers=3"),
    (dict(qk_rope_head_dim=5), "qk_rope_head_dim=5 6"),
    (dict(v_head_dim=20), "v_head_dim=20 up to 12"),
    (dict(hidden_size=0), "hidden_size=0 above 0"),
    (dict(num_attention_heads=2.5), "num_attention_heads=2.5 whole number"),
    (dict(num_nextn_predict_layers=-1), "num_nextn_predict_layers=-1 at least 0"),
    (dict(norm="nosuch"), "norm='nosuch' dssn, sandwich, pre"),
    (dict(balance="global"), "balance='global' sequence, micro_batch, ep_group, dp_group"),
    (dict(scoring_func="relu"), "scoring_func='relu' sigmoid, softmax"),
    (dict(capacity_factor=-1.0), "capacity_factor=-1.0 at least 0"),
    (dict(rope_theta=0.0), "rope_theta=0.0 above 0"),
    (dict(num_hidden_layers=True), "num_hidden_layers=True whole number"),
    (dict(rope_theta=True), "rope_theta=True number"),
    (dict(aux_loss_alpha=float("nan")), "aux_loss_alpha=nan at least 0"),
    (dict(rms_norm_eps=float("inf")), "rms_norm_eps=inf above 0"),
    (dict(mtp_loss_weight="0.3"), "mtp_loss_weight='0.3' number"),
    (dict(router_bias=1), "router_bias=1 true or false"),
    (dict(init=None), "init=None tiny, small"),
    (dict(rope_scaling="yarn"), "rope_scaling='yarn' null type=yarn"),
    (dict(rope_scaling=dict(type="yarn", factor=2.0, original_max_position_embeddings=8, mscale=float("nan"))),
     "rope_scaling mscale=nan number"),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_scaling type=yarn"),
    (dict(rope_scaling=dict(type="yarn", factor="4", original_max_position_embeddings=8)), "factor at least 1"),
    (dict(rope_scaling=dict(type="yarn", factor=2.0)), "rope_scaling original_max_position_embeddings"),
    (dict(rope_scaling=dict(type="yarn", factor=2.0, original_max_position_embeddings=8, beta=1)),
     "'beta': beta_fast beta_slow"),
]


def assert_one_line(error, words):
    message = str(error.value)
    assert "\n" not in message
    for word in words.split(" "):
        assert word.strip("[],") in message, f"{word!r} is missing in: {message}"


@pytest.mark.parametrize("wrong, words", WRONG, ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_a_wrong_config_says_in_one_line_what_would_fit(wrong, words):
    with pytest.raises(ValueError) as error:
        replace(SMALL, **wrong)
    assert_one_line(error, words)


def test_a_sequence_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError) as error:
        Model(SMALL)(torch.zeros(1, 65, dtype=torch.long))
    assert_one_line(error, "65 max_position_embeddings=64")


def test_a_balance_group_that_does_not_divide_the_batch_is_refused():
    config = replace(SMALL, balance_group=3)
    ids, targets, next_ids = batch(config, B=4)
    with pytest.raises(ValueError) as error:
        Model(config)(ids, targets=targets, next_ids=next_ids)
    assert_one_line(error, "balance_group=3 4")


# ---------------------------------------------------------------------------------------------------------------------
# Counts


def counted_on_meta(config):
    """Parameters of the built model: {part: count}, experts apart, MTP layers apart."""
    with torch.device("meta"):
        model = Model(config)
    counts = dict(total=0, mtp=0, experts=0)
    for name, p in model.named_parameters():
        in_mtp = name.startswith("layers.") and int(name.split(".")[1]) >= config.num_hidden_layers
        counts["mtp" if in_mtp else "total"] += p.numel()
        counts["experts"] += p.numel() if ".experts." in name and not in_mtp else 0
    return counts


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_the_model_on_the_meta_device(name):
    config = PRESETS[name]
    built, said = counted_on_meta(config), M.count_params(config)
    assert said["total"] == built["total"]
    assert said["mtp"] == built["mtp"]
    idle = 1 - config.num_experts_per_tok / config.n_routed_experts
    assert said["active"] == built["total"] - built["experts"] * idle


def test_counts_equal_the_published_ones():
    """Shape arithmetic of the released checkpoints, parameter by parameter; 718B and 39B leave the embedding out."""
    pangu = M.count_params(PRESETS["pangu-ultra-moe-718b"])
    assert pangu["total"] == 719_093_767_680
    assert pangu["active"] == 40_371_494_400
    assert pangu["total"] - pangu["embedding"] == 717_914_119_680
    assert pangu["mtp"] == 12_443_343_360
    deepseek = M.count_params(PRESETS["deepseek-v3-671b"])
    assert deepseek["total"] == 671_026_404_352
    assert round(deepseek["active"] / 1e9, 3) == 37.552


WORDS = [{each.name: word} for each in fields(Config)                     # each that a setting may take, a fork's too
         for word in each.metadata.get("allowed", {}).get("choices", ())[1:]]


@pytest.mark.parametrize("change", [dict(tie_word_embeddings=True), dict(n_shared_experts=0), dict(n_shared_experts=2),
                                    dict(first_k_dense_replace=3), dict(num_nextn_predict_layers=2), *WORDS], ids=str)
def test_counts_follow_every_setting_that_changes_a_shape(change):
    config = replace(SMALL, **change)
    built, said = counted_on_meta(config), M.count_params(config)
    assert (said["total"], said["mtp"]) == (built["total"], built["mtp"]), \
        "count_params and the model differ: see Config.matmuls and Config.gains"


def test_flops_of_a_token():
    """6 per active matmul parameter, MTP and head included, and half of the attention scores.

    309.1 and 296.5 GFLOP for the 718B model at 8,192 tokens, with and without its MTP layer.
    """
    config = PRESETS["pangu-ultra-moe-718b"]
    assert round(M.flops_per_token(config, 8192) / 1e9, 1) == 309.1
    assert round(M.flops_per_token(replace(config, num_nextn_predict_layers=0), 8192) / 1e9, 1) == 296.5


# ---------------------------------------------------------------------------------------------------------------------
# Operators: plain and fused bodies against a formula


def random_tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


ROPE_ANGLES = random_tensor(1, 5, 1, 4)
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
DOCUMENT_MASK = ((DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None]) & torch.ones(5, 5).tril().bool())
COUNTS = torch.tensor([3, 0, 7, 1])                       # rows of four experts; one gets none
MANY = torch.tensor([512, 31, 0, 757])
ONE = torch.tensor([0, 0, 70, 0])
CHOSEN = torch.tensor([[0, 2], [2, 1], [2, 0], [3, 2], [1, 3]])
TARGETS = torch.tensor([3, 0, -100, 16, 7])


def products_of_rotated(rope):
    """q·k after rotation: what attention sees, whatever order the rotated values come in."""
    return lambda q, k: torch.einsum("bthd,bshd->bhts", rope(q), rope(k))


def reference_rope(x):
    turn = torch.polar(torch.ones_like(ROPE_ANGLES), ROPE_ANGLES)[..., 0, :]
    return torch.stack([R.rotate(head, turn) for head in x.unbind(2)], 2)


def reference_attention(mask):
    def attend(q, k, v):
        scores = torch.einsum("bthd,bshd->bhts", q, k) * 0.3
        return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
    return attend


def reference_grouped_matmul(counts):
    return lambda x, weight: torch.cat([rows @ w.T for rows, w in zip(x.split(counts.tolist()), weight)])


def reference_swiglu(gate_up, row_weights=None):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up * (1 if row_weights is None else row_weights[:, None])


def there_and_back(x):
    rows, slot = M.permute(x, CHOSEN)
    return rows, M.unpermute(rows * torch.arange(1.0, 11.0)[:, None].to(rows.dtype), slot)


def reference_there_and_back(x):
    order = sorted((expert, n) for n, chosen in enumerate(CHOSEN.tolist()) for expert in chosen)
    rows = torch.stack([x[n] for _, n in order])
    back = [sum((1 + i) * x[n] for i, (_, owner) in enumerate(order) if owner == n) for n in range(len(x))]
    return rows, torch.stack(back)


CAUSAL = torch.ones(5, 5).tril().bool()
QUERY_KEY_VALUE = [random_tensor(2, 5, 3, 16), random_tensor(2, 5, 3, 16, seed=1), random_tensor(2, 5, 3, 8)]
OPERATORS = {
    # name: (ours, formula, inputs that get a gradient)
    "rms_norm": (lambda x, w: M.rms_norm(x, w, 1e-5), lambda x, w: R.rms_norm(x, w, 1e-5),
                 [random_tensor(5, 16), random_tensor(16)]),
    "rms_norm of small values": (lambda x, w: M.rms_norm(x, w, 1e-5), lambda x, w: R.rms_norm(x, w, 1e-5),
                                 [1e-3 * random_tensor(5, 16), random_tensor(16)]),
    "swiglu": (lambda x: M.swiglu(x, None), reference_swiglu, [random_tensor(6, 32)]),
    "swiglu with row weights": (M.swiglu, reference_swiglu, [random_tensor(6, 32), random_tensor(6)]),
    "rope": (products_of_rotated(lambda x: M.rope(x, ROPE_ANGLES.cos().to(x.dtype), ROPE_ANGLES.sin().to(x.dtype))),
             products_of_rotated(reference_rope), [random_tensor(2, 5, 3, 8), random_tensor(2, 5, 3, 8, seed=1)]),
    "attention": (lambda q, k, v: M.attention(q, k, v, 0.3), reference_attention(CAUSAL),
                  QUERY_KEY_VALUE),
    "attention in documents": (lambda q, k, v: M.attention(q, k, v, 0.3, mask=DOCUMENT_MASK),
                               reference_attention(DOCUMENT_MASK),
                               QUERY_KEY_VALUE),
    "grouped_matmul": (lambda x, w: M.grouped_matmul(x, w, COUNTS), reference_grouped_matmul(COUNTS),
                       [random_tensor(11, 16), random_tensor(4, 24, 16)]),
    # a CPU fills bfloat16 rows up, in groups of experts that have about as many
    "grouped_matmul of many rows": (lambda x, w: M.grouped_matmul(x, w, MANY), reference_grouped_matmul(MANY),
                                    [random_tensor(1300, 16), random_tensor(4, 24, 16)]),
    "grouped_matmul of one expert": (lambda x, w: M.grouped_matmul(x, w, ONE), reference_grouped_matmul(ONE),
                                     [random_tensor(70, 16), random_tensor(4, 24, 16)]),
    "permute and unpermute": (there_and_back, reference_there_and_back, [random_tensor(5, 16)]),
    "cross_entropy": (lambda h, w: M.cross_entropy(h, w, TARGETS), lambda h, w: R.cross_entropy(h @ w.T, TARGETS),
                      [random_tensor(5, 16), random_tensor(17, 16)]),
}


def run_operator(operator, inputs, dtype):
    """Outputs, then gradients of the inputs under fixed random output gradients."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    out = operator(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    weights = [random_tensor(*o.shape, seed=7).to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, inputs, weights)
    return [*outputs, *grads]


# float64 exactly; float32 and bfloat16 within a few roundings of the largest value
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_equals_its_formula_forward_and_backward(name, fused, dtype, monkeypatch):
    monkeypatch.setattr(M, "FUSED", fused)
    ours, formula, inputs = OPERATORS[name]
    inputs = [x.to(dtype) for x in inputs]
    expected = run_operator(formula, inputs, torch.float64)
    for i, (mine, right) in enumerate(zip(run_operator(ours, inputs, dtype), expected)):
        assert_close(mine, right, f"{name}, result {i}", TOLERANCE[dtype])


def test_cross_entropy_never_holds_all_logits(monkeypatch):
    """With 2**16 values at a time no tensor near tokens x vocabulary (2**20) is made, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    monkeypatch.setattr(M, "LOGIT_ELEMENTS", 2**16)
    tokens, vocabulary = 8192, 128
    h = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    with Watch():
        M.cross_entropy(h, weight, torch.arange(tokens) % vocabulary).backward()
    assert max(sizes) <= 2**16, f"a tensor of {max(sizes)} values; all logits are {tokens * vocabulary}"


# ---------------------------------------------------------------------------------------------------------------------
# The whole model against the reference, in float64


# with 8 rotary dimensions pairs 0 and 1 keep their frequency, pair 2 is blended, pair 3 is slowed down
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=1.8, beta_slow=0.5, mscale=1.0,
            mscale_all_dim=0.5)
SETTINGS = {
    "as it stands": {},
    "sandwich": dict(norm="sandwich"),
    "pre-norm": dict(norm="pre"),
    "yarn": dict(rope_scaling=YARN, qk_rope_head_dim=8),
    "yarn without mscales": dict(rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=8)),
    "tied embeddings": dict(tie_word_embeddings=True),
    "eps of the latent norms": dict(latent_norm_eps=0.1),
    "eps of the norms": dict(rms_norm_eps=0.1),
    "no shared expert": dict(n_shared_experts=0),
    "two shared experts": dict(n_shared_experts=2),
    "no dense layer": dict(first_k_dense_replace=0),
    "dense layers only": dict(first_k_dense_replace=3, num_nextn_predict_layers=0),
    "softmax scores": dict(scoring_func="softmax"),
    "softmax scores, not renormalised": dict(scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=1.0),
    "not renormalised": dict(norm_topk_prob=False),
    "router bias": dict(router_bias=True),
    "groups": dict(n_group=2, topk_group=1),
    "groups and router bias": dict(n_group=2, topk_group=1, router_bias=True, num_experts_per_tok=3),
    "groups of one": dict(n_group=8, topk_group=4, num_experts_per_tok=3),
    "equal choice from groups": dict(n_group=2, group_choice="equal", num_experts_per_tok=4),
    "equal choice and router bias": dict(n_group=4, group_choice="equal", num_experts_per_tok=4, router_bias=True),
    "weight after down": dict(expert_weight="after_down"),
    "one expert": dict(n_routed_experts=1, num_experts_per_tok=1),
    "top-k of all experts": dict(n_routed_experts=4, num_experts_per_tok=4),
    "top-1": dict(num_experts_per_tok=1),
    "no balance loss": dict(balance="none"),
    "balance by sequence": dict(balance="sequence"),
    "balance by micro-batch": dict(balance="micro_batch"),
    "balance by EP group": dict(balance="ep_group", balance_group=2),
    "balance by EP group of all": dict(balance="ep_group", balance_group=4),
    "balance by EP group of one": dict(balance="ep_group", balance_group=1),
    "balance by DP group": dict(balance="dp_group", balance_group=4),
    "balance of softmax scores": dict(aux_scores="softmax"),
    "balance of raw scores": dict(aux_scores="raw"),
    "balance of softmax routing": dict(scoring_func="softmax", aux_scores="raw"),
    "balance beside a router bias": dict(router_bias=True, balance="sequence"),
    "no MTP": dict(num_nextn_predict_layers=0),
    "MTP depth 2": dict(num_nextn_predict_layers=2),
    "MTP depth 2 after the norm": dict(num_nextn_predict_layers=2, mtp_hidden="post_norm"),
    "MTP with the hidden half first": dict(mtp_concat="hidden_first"),
    "MTP weight": dict(mtp_loss_weight=0.7),
    "drop": dict(capacity_factor=1.0),
    "drop most": dict(capacity_factor=0.3),
    "drop after down": dict(capacity_factor=0.8, expert_weight="after_down"),
    "drop with groups": dict(capacity_factor=0.8, n_group=2, group_choice="equal", num_experts_per_tok=4),
    "drop, not renormalised": dict(capacity_factor=0.8, norm_topk_prob=False, scoring_func="softmax"),
    "a capacity nobody reaches": dict(capacity_factor=8.0),
}


def check(config, ids, targets, next_ids, fused=False, seed=0, aux_scale=1.0, **inputs):
    """Losses, logits, chosen experts, statistics and every gradient of ours against the reference."""
    model = build(config, seed=seed)
    model.aux_scale = aux_scale
    model.pop_stats()
    routing = {}
    tensors = R.double_copy(model.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(M, "FUSED", fused)
        out = model(ids, targets=targets, next_ids=next_ids, return_logits=True, routing=routing, **inputs)
        out.total_loss.backward()
    right = R.forward(config, tensors, ids, targets, next_ids, aux_scale=aux_scale, **inputs)
    right.total_loss.backward()

    for name in ("loss", "mtp_loss", "aux_loss", "total_loss"):
        ours, expected = getattr(out, name).item(), getattr(right, name).item()
        assert ours == pytest.approx(expected, rel=EXACT, abs=1e-12), (
            f"{name}: model.py (MLP, Experts, Router, Block: was one forgotten?) computes something else than "
            f"tests/reference.py, in which a new formula stands too")
    for depth, (ours, expected) in enumerate(zip([out.logits, *(out.mtp_logits or [])], right.logits, strict=True)):
        assert_close(ours, expected, f"logits of depth {depth}")
    check_routing(config, model, routing, right)
    for name, ours in gradients(model).items():
        assert_close(ours, tensors[name].grad, f"gradient of {name}")


def check_routing(config, model, routing, right):
    stats = model.pop_stats()
    assert len(routing) == len(right.ids) == len(stats["loads"])
    dropped = 0
    for (layer, ids), expected, kept, loads in zip(sorted(routing.items()), right.ids, right.kept, stats["loads"]):
        assert torch.equal(ids.flatten(0, -2).sort(-1).values, expected.sort(-1).values), f"experts of layer {layer}"
        counts = expected.flatten().bincount(minlength=config.n_routed_experts)
        assert torch.equal(loads, counts), f"loads of layer {layer}"
        dropped += expected.numel() - len(kept)
    assert int(stats["dropped"]) == dropped


@pytest.mark.parametrize("name", SETTINGS)
def test_setting_equals_the_reference(name):
    config = replace(SMALL, **SETTINGS[name])
    check(config, *batch(config))


def test_float64_with_fused_operators_allowed():
    check(SMALL, *batch(SMALL), fused=True)


@pytest.mark.parametrize("B, T", [(1, 1), (2, 1), (1, 7)])
def test_one_token_and_odd_shapes(B, T):
    config = replace(SMALL, balance_group=1)
    check(config, *batch(config, B, T, ignored=0))
    config = replace(SMALL, balance_group=1, capacity_factor=1.0)
    check(config, *batch(config, B, T, ignored=0))


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_documents_positions_and_token_count(depths):
    """doc_ids cut attention in the MTP layers too; positions may differ by sequence; loss_tokens replaces the count."""
    config = replace(SMALL, num_nextn_predict_layers=depths)
    ids, targets, next_ids = batch(config)
    doc_ids = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 4, 5], [7, 7, 7, 7, 7, 7], [0, 0, 1, 1, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0] * 6, [10, 11, 12, 13, 14, 15], [0, 2, 4, 6, 8, 10]])
    check(config, ids, targets, next_ids, doc_ids=doc_ids)
    check(config, ids, targets, next_ids, positions=positions)
    check(config, ids, targets, next_ids, doc_ids=doc_ids, positions=positions,
          loss_tokens=torch.arange(40.0, 41.0 + depths, dtype=torch.float64))


def test_aux_scale_scales_value_and_gradient_of_the_balance_loss():
    check(SMALL, *batch(SMALL), aux_scale=0.25)


def counts_of(model, router, ids, targets, next_ids):
    """What `router` asks to be averaged in one forward."""
    counts = []
    router.average_counts = lambda mine: counts.append(mine) or mine
    model(ids, targets=targets, next_ids=next_ids)
    return counts[0]


@pytest.mark.parametrize("balance", ["sequence", "dp_group"])
def test_two_halves_of_a_batch_add_up_to_the_whole(balance):
    """With the token count of both and a share of 1/2 each, losses and gradients are sums. A group of all 4 sequences
    needs the counts of the other half: average_counts gives their mean."""
    config = replace(SMALL, balance=balance, balance_group=4)
    whole, halved = build(config), build(config)
    ids, targets, next_ids = batch(config)
    expected = whole(ids, targets=targets, next_ids=next_ids)
    expected.total_loss.backward()
    halves = [(ids[rows], targets[rows], next_ids[rows]) for rows in (slice(0, 2), slice(2, 4))]
    if balance == "dp_group":
        for router in halved.routers():
            mean = sum(counts_of(halved, router, *half) for half in halves) / 2
            router.average_counts = lambda mine, mean=mean: mean
    halved.aux_scale = 0.5
    tokens = (targets != -100).sum((0, 2))
    outs = [halved(i, targets=t, next_ids=n, loss_tokens=tokens) for i, t, n in halves]
    for out in outs:
        out.total_loss.backward()
    for name in ("loss", "mtp_loss", "aux_loss", "total_loss"):
        assert_close(sum(getattr(out, name) for out in outs), getattr(expected, name), name)
    for name, grad in gradients(halved).items():
        assert_close(grad, gradients(whole)[name], f"gradient of {name}")


def test_an_expert_without_tokens():
    """Its weights get a gradient of zeros, in the plain and in the fused body."""
    config = replace(SMALL, router_bias=True)
    ids, targets, next_ids = batch(config)
    for fused, dtype in ((False, torch.float64), (True, torch.float64), (True, torch.float32), (True, torch.bfloat16)):
        model = build(config, dtype)
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor[3] = -100.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(M, "FUSED", fused)
            model(ids, targets=targets, next_ids=next_ids).total_loss.backward()
        assert not model.pop_stats()["loads"][:, 3].any()
        for name, grad in gradients(model).items():
            assert grad is not None and grad.isfinite().all(), name
            assert ".experts." not in name or (not grad[3].any() and grad.any()), name


def test_masked_groups_lose_even_to_negative_scores():
    """With every score for the choice below zero, a masked group set to 0 instead of -inf would win."""
    config = replace(SMALL, n_group=4, topk_group=1, router_bias=True)
    model = build(config)
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor -= 5
    tensors = R.double_copy(model.state_dict())
    ids, targets, next_ids = batch(config)
    routing = {}
    model(ids, targets=targets, next_ids=next_ids, routing=routing)
    right = R.forward(config, tensors, ids, targets, next_ids)
    for (layer, chosen), expected in zip(sorted(routing.items()), right.ids, strict=True):
        chosen = chosen.flatten(0, -2).sort(-1).values
        assert torch.equal(chosen // 2, (chosen // 2)[:, :1].expand_as(chosen)), "experts of two groups"
        assert torch.equal(chosen, expected.sort(-1).values), layer


def test_the_balance_loss_of_scores_near_zero_has_a_finite_gradient():
    """In float32, all scores of a token far below any that training meets."""
    router = build(SMALL).routers()[0]
    logits = torch.full((4, SMALL.n_routed_experts), -60.0, requires_grad=True)
    router.balance_loss(torch.ones(1, SMALL.n_routed_experts), logits, logits.sigmoid()).backward()
    assert torch.isfinite(logits.grad).all()


def test_the_balance_loss_of_perfect_balance_is_alpha_in_every_layer():
    """With all experts chosen every f is 1 and normalised scores sum to 1: sum f_i p_i = 1."""
    config = replace(SMALL, n_routed_experts=4, num_experts_per_tok=4)
    ids, targets, next_ids = batch(config)
    out = build(config)(ids, targets=targets, next_ids=next_ids)
    assert out.aux_loss.item() == pytest.approx(3 * config.aux_loss_alpha, rel=1e-12)


def test_labels_are_targets_shifted_inside():
    config = replace(SMALL, num_nextn_predict_layers=2, balance="none")
    model = build(config)
    ids, _, _ = batch(config)
    targets = torch.full((4, 3, 6), -100)
    for d in range(3):
        targets[:, d, :5 - d] = ids[:, 1 + d:]
    expected = R.forward(config, R.double_copy(model.state_dict()), ids, targets, targets[:, :-1].clamp(min=0))
    out = model(ids, labels=ids)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=EXACT)
    assert out.mtp_loss.item() == pytest.approx(expected.mtp_loss.item(), rel=EXACT)
    assert out.logits is None and out.mtp_logits is None


def test_next_ids_come_from_the_targets_by_default():
    """Targets know the tokens past the end of the sequence; where they are ignored, ids tell the next token."""
    model = build(replace(SMALL, num_nextn_predict_layers=2))
    ids, targets, next_ids = batch(model.config, ignored=0)
    given = model(ids, targets=targets, next_ids=next_ids)
    assert torch.equal(model(ids, targets=targets).total_loss, given.total_loss)
    targets[1, :, 2:4] = -100
    next_ids[1, 0, 2:4] = ids[1, 3:5]
    next_ids[1, 1, 2:4] = ids[1, 4:6]
    given = model(ids, targets=targets, next_ids=next_ids)
    assert torch.equal(model(ids, targets=targets).total_loss, given.total_loss)


def test_a_batch_without_any_target_has_loss_zero_and_finite_gradients():
    model = build(replace(SMALL, balance="none"))
    ids, targets, next_ids = batch(SMALL)
    out = model(ids, targets=targets.fill_(-100), next_ids=next_ids)
    out.total_loss.backward()
    assert out.total_loss.item() == 0
    for name, grad in gradients(model).items():
        assert not grad.any(), name                       # NaN would count as any


def test_forced_routing_repeats_a_forward():
    """What one call chose, forced in another with other routers, gives weights of the forced experts' own scores."""
    ids, targets, next_ids = batch(SMALL)
    model = build(SMALL)
    routing = {}
    free = model(ids, targets=targets, next_ids=next_ids, routing=routing)
    forced = model(ids, targets=targets, next_ids=next_ids, routing={k: v.clone() for k, v in routing.items()})
    assert torch.equal(free.total_loss, forced.total_loss)
    turned = {layer: chosen.roll(1, 0) for layer, chosen in routing.items()}
    assert not torch.equal(free.loss, model(ids, targets=targets, next_ids=next_ids, routing=turned).loss)


def test_packed_documents_equal_documents_alone():
    model = build(replace(SMALL, num_nextn_predict_layers=0))
    ids = torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(0))
    doc_ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    packed = model(ids, doc_ids=doc_ids).logits
    assert_close(packed[:, :4], model(ids[:, :4]).logits, "first document")
    assert_close(packed[:, 4:], model(ids[:, 4:]).logits, "second document")
    assert distance(packed[:, 4:], model(ids).logits[:, 4:]) > 0.01


def test_stages_equal_the_whole():
    """A stage is the model minus the rest: without a head it gives hidden states, without embedding it takes them."""
    whole = build(SMALL)
    ids, _, _ = batch(SMALL)
    first, last = copy.deepcopy(whole), copy.deepcopy(whole)
    first.norm = first.lm_head = None
    del first.layers["2"], first.layers["3"]
    last.embed_tokens = None
    del last.layers["0"], last.layers["1"], last.layers["3"]
    expected = whole(ids).logits
    assert_close(last(first(ids)).logits, expected, "logits of two stages")


# ---------------------------------------------------------------------------------------------------------------------
# Plain and fused, float32 and bfloat16, training and evaluation


def outcome(config, dtype, fused, training, routing, compute_dtype=None):
    """Losses and logits of one call, and the gradients where it trains."""
    model = build(config, dtype).train(training)
    model.compute_dtype = compute_dtype
    ids, targets, next_ids = batch(config, T=20)
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(training):
        patch.setattr(M, "FUSED", fused)
        out = model(ids, targets=targets, next_ids=next_ids, routing=routing, return_logits=True)
        if training:
            out.total_loss.backward()
    losses = {name: getattr(out, name).detach() for name in ("loss", "mtp_loss", "aux_loss", "total_loss")}
    return {**losses, "logits": out.logits.detach(), "mtp logits": out.mtp_logits[0].detach(), **gradients(model)}


FAST = replace(SMALL, hidden_size=32, moe_intermediate_size=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("config", [FAST, replace(FAST, capacity_factor=0.7),
                                    replace(FAST, hidden_size=23, moe_intermediate_size=7, v_head_dim=5)],
                         ids=["dropless", "drop", "odd widths"])
def test_fused_and_plain_equal_float64_in_float32(config, training):
    """With the experts that float64 chose: near scores may swap places in lower precision."""
    routing = {}
    right = outcome(config, torch.float64, False, training, routing)
    for fused in (True, False):
        ours = outcome(config, torch.float32, fused, training, routing)
        for name, expected in right.items():
            if expected is not None:
                assert_close(ours[name], expected, f"{name}, fused={fused}", 1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fused_is_as_near_to_float64_as_plain_in_bfloat16(training):
    """The plain body itself is off by up to 10 % of the largest value in some gradients."""
    routing = {}
    right = outcome(FAST, torch.float64, False, training, routing)
    fused = outcome(FAST, torch.bfloat16, True, training, routing)
    plain = outcome(FAST, torch.bfloat16, False, training, routing)
    for name, expected in right.items():
        if expected is not None:
            allowed = min(0.15, 0.02 + 1.5 * distance(plain[name], expected))
            assert_close(fused[name], expected, name, allowed)


def test_evaluation_gives_what_training_gives():
    """No dropout, no noise: the same losses and logits, and evaluation counts no loads."""
    for fused in (True, False):
        trained = outcome(FAST, torch.float32, fused, True, None)
        evaluated = outcome(FAST, torch.float32, fused, False, None)
        for name in ("loss", "mtp_loss", "logits", "mtp logits"):
            assert torch.equal(trained[name], evaluated[name]), name


def test_compute_dtype_leaves_master_weights_and_gradients_in_float32():
    routing = {}
    right = outcome(FAST, torch.float32, True, True, routing)
    ours = outcome(FAST, torch.float32, True, True, routing, compute_dtype=torch.bfloat16)
    assert ours["logits"].dtype == torch.bfloat16
    for name, expected in right.items():
        assert_close(ours[name], expected, name, 0.15)
        assert "logits" in name or ours[name].dtype == torch.float32, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_router_and_its_bias_stay_in_float32(dtype):
    model = Model(replace(SMALL, router_bias=True)).to(dtype)
    for name, tensor in model.state_dict().items():
        expected = torch.float32 if ".gate." in name else dtype
        assert tensor.dtype == expected, f"{name} is {tensor.dtype}"


def test_router_scores_are_computed_in_float32():
    """Two experts whose rows differ by less than bfloat16 can tell are still told apart in a bfloat16 model."""
    config = replace(SMALL, n_routed_experts=2, num_experts_per_tok=1)
    router = build(config, torch.bfloat16).layers["1"].mlp.gate
    router.weight.data.fill_(1.0)
    router.weight.data[1, 0] = 1.0 + 2**-12
    x = torch.ones(1, 3, config.hidden_size, dtype=torch.bfloat16) / 16
    ids, _ = router(x)
    assert ids.flatten().tolist() == [1, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Properties over random routings


def random_routing(rng):
    """(N, C, E, ids (N,K), weights (N,K)); some skewed, so that experts stay empty and others overflow."""
    N, E = rng.randint(1, 40), rng.randint(1, 16)
    K = rng.randint(1, E)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    scores = torch.rand(N, E, generator=generator) + rng.choice([0, 3]) * torch.arange(E)
    weights = torch.rand(N, K, generator=generator, dtype=torch.float64)
    return N, 4, E, scores.topk(K).indices, weights


def test_permute_inverts_and_conserves_rows():
    rng = random.Random(0)
    for _ in range(100):
        N, C, E, ids, _ = random_routing(rng)
        x = torch.arange(N * C, dtype=torch.float64).view(N, C)
        rows, slot = M.permute(x, ids)
        assert torch.equal(slot.flatten().sort().values, torch.arange(ids.numel())), "a row is lost or taken twice"
        assert torch.equal(rows[slot], x.unsqueeze(1).expand(-1, ids.shape[1], -1)), "a copy is not its token"
        expert_of_row = torch.empty(ids.numel(), dtype=torch.long)
        expert_of_row[slot.flatten()] = ids.flatten()
        assert (expert_of_row.diff() >= 0).all(), "rows are not sorted by expert"
        assert torch.equal(M.unpermute(rows, slot), ids.shape[1] * x)


@pytest.mark.parametrize("capacity_factor", [0.0, 0.5, 1.0, 1.5])
def test_dispatch_counts_every_copy_once(capacity_factor):
    """Kept and dropped copies add up, each kept row carries its token and weight, and the sum comes back."""
    rng = random.Random(1)
    for _ in range(100):
        N, C, E, ids, weights = random_routing(rng)
        K = ids.shape[1]
        config = replace(SMALL, n_routed_experts=E, num_experts_per_tok=K, capacity_factor=capacity_factor)
        dispatcher = M.LocalDispatcher(config)
        x = 1 + torch.arange(N, dtype=torch.float64).unsqueeze(1).expand(N, C)
        rows, row_weights, counts, ctx = dispatcher.dispatch(x, ids, weights)
        rows, row_weights = dispatcher.wait(rows, row_weights, ctx)
        assert len(rows) == len(row_weights) == counts.sum() and len(counts) == E

        kept = R.kept_copies(config, ids, weights)
        dropped = int(dispatcher.dropped)
        assert len(kept) + dropped == N * K
        expected = torch.zeros(N, C, dtype=torch.float64)
        for n, k in kept:
            expected[n] += weights[n, k] * x[n]
        torch.testing.assert_close(dispatcher.combine(rows * row_weights.unsqueeze(1), ctx), expected)
        sent = [[] for _ in range(E)]
        for n, k in kept:
            sent[ids[n, k]].append(n + 1.0)
        for expert, part in enumerate(rows.split(counts.tolist())):
            assert sorted(part[:, 0][part[:, 0] > 0].tolist()) == sorted(sent[expert]), f"rows of expert {expert}"


def test_capacity_keeps_the_largest_weights_and_the_first_of_equals():
    """6 tokens choose expert 0 of 2, which takes ceil(0.5 * 6 / 2) = 2: token 3 with most weight, then 1 before 4."""
    dispatcher = M.LocalDispatcher(replace(SMALL, n_routed_experts=2, num_experts_per_tok=1, capacity_factor=0.5))
    weights = torch.tensor([[0.1], [0.5], [0.2], [0.9], [0.5], [0.3]])
    x = torch.arange(6.0).unsqueeze(1)
    rows, row_weights, _, ctx = dispatcher.dispatch(x, torch.zeros(6, 1, dtype=torch.long), weights)
    assert int(dispatcher.dropped) == 4
    came_back = dispatcher.combine(torch.ones_like(rows) * row_weights.unsqueeze(1), ctx).flatten()
    torch.testing.assert_close(came_back, torch.tensor([0.0, 0.5, 0.0, 0.9, 0.0, 0.0]))


def test_permute_and_unpermute_are_each_others_backward():
    rng = random.Random(2)
    for _ in range(20):
        N, C, E, ids, _ = random_routing(rng)
        x = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
        rows, slot = M.permute(x, ids)
        g = torch.randn_like(rows)
        assert_close(torch.autograd.grad(rows, x, g)[0], M.unpermute(g, slot), "backward of permute")
        y = g.clone().requires_grad_()
        back = torch.randn(N, C, dtype=torch.float64)
        grad = torch.autograd.grad(M.unpermute(y, slot), y, back)[0]
        assert_close(grad, M.permute(back, ids)[0], "backward of unpermute")


# ---------------------------------------------------------------------------------------------------------------------
# Statistics, router bias, deferred weight gradients


def test_stats_add_up_over_forwards_until_they_are_popped():
    config = replace(SMALL, capacity_factor=0.5)
    model = build(config)
    ids, targets, next_ids = batch(config)
    once = [model(ids, targets=targets, next_ids=next_ids), model.pop_stats()][1]
    for _ in range(3):
        model(ids, targets=targets, next_ids=next_ids)
    model.eval()(ids)
    thrice = model.pop_stats()
    for name, value in once.items():
        assert torch.equal(torch.as_tensor(thrice[name]), 3 * torch.as_tensor(value)), name
    assert once["loads"].shape == (3, 8) and (once["loads"].sum(1) == ids.numel() * 2).all()
    assert int(once["dropped"]) > 0
    assert not any(torch.as_tensor(value).any() for value in model.pop_stats().values())


def test_router_bias_moves_against_the_load():
    """DeepSeek-V3's rule: bias_update_speed up for less than the mean load, down for more, nothing at the mean."""
    config = replace(SMALL, n_routed_experts=4, router_bias=True, bias_update_speed=0.125)
    model = build(config)
    before = [router.e_score_correction_bias.clone() for router in model.routers()]
    model.update_router_bias(torch.tensor([[5, 1, 3, 3], [0, 0, 0, 8], [2, 2, 2, 2]]))
    moves = torch.tensor([[-1, 1, 0, 0], [1, 1, 1, -1], [0, 0, 0, 0]]) * 0.125
    for router, old, move in zip(model.routers(), before, moves, strict=True):
        torch.testing.assert_close(router.e_score_correction_bias, old + move.to(old.dtype))
    model = build(replace(config, router_bias=False))
    model.update_router_bias(torch.tensor([[5, 1, 3, 3]] * 3))
    assert not any("e_score_correction_bias" in name for name in model.state_dict())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)],
                         ids=str)
def test_deferred_weight_gradients_equal_immediate_ones(dtype, tolerance):
    """Nothing reaches the stored weights in backward; popping computes what backward would have, and adds it up."""
    ids, targets, next_ids = batch(FAST)
    right, deferred = build(FAST, dtype), build(FAST, dtype)
    store = M.WeightGradStore()
    holders = [module for module in deferred.modules() if hasattr(module, "store")]
    for module in holders:
        module.store = store
    stored = {id(p) for module in holders for p in module.parameters(recurse=False)}
    for _ in range(2):
        right(ids, targets=targets, next_ids=next_ids).total_loss.backward()
        deferred(ids, targets=targets, next_ids=next_ids).total_loss.backward()
    waiting = [name for name, p in deferred.named_parameters() if id(p) in stored and p.grad is None]
    assert len(store.pending) >= len(waiting) > 20
    assert {"layers.1.mlp.experts.gate_up_proj", "layers.3.self_attn.o_proj.weight"} <= set(waiting)
    store.pop(7)
    store.pop()
    for name, expected in gradients(right).items():
        assert_close(gradients(deferred)[name], expected, name, tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation and published names


def started(config, seed=0):
    """A model built on the meta device, its memory filled with NaN, then initialised."""
    with torch.device("meta"):
        model = Model(config)
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    model.init_weights(seed)
    return model


def expected_start(config, name):
    """Mean and standard deviation of a tensor's start, by the tables of Pangu Ultra (arXiv:2504.07866, section 2)."""
    d, L = config.hidden_size, config.num_hidden_layers
    if "bias" in name:
        return 0.0, 0.0
    if "norm" in name:
        gains = {"post_attention_layernorm": 0.283, "post_mlp_layernorm": 0.432}
        gain = next((value for key, value in gains.items() if key in name), None)
        return (gain / L**0.5, 0.0) if gain and config.norm == "dssn" else (1.0, 0.0)
    if config.init == "tiny":
        return 0.0, 0.5 if "embed_tokens" in name else (1 / (2 * d * L)) ** 0.5
    residual = "o_proj" in name or "down_proj" in name
    return 0.0, (2 / (5 * d * (L if residual else 1))) ** 0.5


@pytest.mark.parametrize("init", ["tiny", "small"])
@pytest.mark.parametrize("norm", ["dssn", "sandwich", "pre"])
def test_every_tensor_starts_as_the_table_says(norm, init):
    config = replace(SMALL, norm=norm, init=init, router_bias=True, num_nextn_predict_layers=2)
    seen = set()
    for name, tensor in started(config).state_dict().items():
        mean, std = expected_start(config, name)
        assert tensor.isfinite().all(), f"{name} is not initialised"
        if std == 0:
            torch.testing.assert_close(tensor, torch.full_like(tensor, mean), msg=name)
            continue
        # five standard errors of the estimates
        n = tensor.numel()
        assert abs(tensor.mean().item()) < 5 * std / n**0.5, name
        assert abs(tensor.std().item() / std - 1) < 5 / (2 * n) ** 0.5, name
        assert tensor.flatten()[0].item() not in seen, f"{name} starts like another tensor"
        seen.add(tensor.flatten()[0].item())


def test_tiny_init_of_the_large_model_has_the_published_numbers():
    """718B with 61 layers: linear weights 0.0010331, gains of the post norms 0.0362 and 0.0553."""
    config = PRESETS["pangu-ultra-moe-718b"]
    assert round(M.initial_scale(config, "layers.3.self_attn.o_proj.weight")[1], 7) == 0.0010331
    assert round(M.initial_scale(config, "layers.3.post_attention_layernorm.weight")[1], 4) == 0.0362
    assert round(M.initial_scale(config, "layers.3.post_mlp_layernorm.weight")[1], 4) == 0.0553


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    first, again, other = started(SMALL, 1), started(SMALL, 1), started(SMALL, 2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert "norm" in name or not torch.equal(tensor, other.state_dict()[name]), name


def test_experts_are_seeded_one_by_one():
    """An expert starts the same whatever number of them is held, and no two alike."""
    eight = started(SMALL).state_dict()
    four = started(replace(SMALL, n_routed_experts=4)).state_dict()
    for name in ("layers.1.mlp.experts.gate_up_proj", "layers.2.mlp.experts.down_proj"):
        assert torch.equal(eight[name][:4], four[name]), name
        assert not torch.equal(eight[name][0], eight[name][1]), name


def test_seeding_does_not_depend_on_what_else_the_model_holds():
    whole, stage = started(SMALL), Model(SMALL)
    stage.embed_tokens = None
    del stage.layers["0"], stage.layers["1"]
    stage.init_weights(0)
    for name, tensor in stage.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


@pytest.mark.parametrize("change", [{}, dict(norm="pre", router_bias=True), dict(tie_word_embeddings=True),
                                    dict(n_shared_experts=0), dict(num_nextn_predict_layers=2)])
def test_published_names_there_and_back(change):
    config = replace(SMALL, **change)
    model = build(config, torch.float32)
    published = {name: tensor.clone() for name, tensor in M.to_hf(model).items()}
    other = build(config, torch.float32, seed=1)
    M.load_hf(other, published)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert sum(t.numel() for t in published.values()) == sum(t.numel() for t in model.state_dict().values())
    assert torch.equal(published["model.layers.1.mlp.experts.5.up_proj.weight"],
                       model.layers["1"].mlp.experts.gate_up_proj[5, config.moe_intermediate_size:])


def published_names(config):
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in M.to_hf(Model(config)).items()}


# of transformers, or written in its words
IN_NO_FORWARD = """bias_update_speed router_bias expert_weight balance balance_group aux_loss_alpha aux_scores init
    mtp_loss_weight mtp_hidden mtp_concat dssn_c_attn dssn_c_mlp""".split()


def test_an_export_tells_what_transformers_does_not_compute():
    """A setting that a fork adds too."""
    fixed = {*M.FIXED_KEYS} & {*M.config_to_hf(SMALL)["training"], *vars(SMALL)}
    assert not fixed, f"{', '.join(fixed)}: a setting is no longer fixed, move it from FIXED_KEYS to OPTIONAL_KEYS"
    new = {*M.config_to_hf(SMALL)["training"]} - {*M.IN_TRANSFORMERS, *IN_NO_FORWARD}
    assert not new, (f"{', '.join(new)}: add it to IN_TRANSFORMERS in model.py with what transformers' DeepSeek-V3 "
                     f"computes, or, if it changes no forward there, to IN_NO_FORWARD here")


def test_names_and_shapes_of_the_released_checkpoint():
    """openPangu-Ultra-MoE-718B, layers 0 (dense), 3 (experts) and 61 (MTP, 787 tensors without embedding and head)."""
    names = published_names(PRESETS["pangu-ultra-moe-718b"])
    expected = {
        "model.embed_tokens.weight": (153600, 7680), "model.norm.weight": (7680,), "lm_head.weight": (153600, 7680),
        "model.layers.0.mlp.gate_proj.weight": (18432, 7680), "model.layers.0.mlp.down_proj.weight": (7680, 18432),
        "model.layers.3.self_attn.q_a_proj.weight": (1536, 7680),
        "model.layers.3.self_attn.q_a_layernorm.weight": (1536,),
        "model.layers.3.self_attn.q_b_proj.weight": (24576, 1536),
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": (576, 7680),
        "model.layers.3.self_attn.kv_a_layernorm.weight": (512,),
        "model.layers.3.self_attn.kv_b_proj.weight": (32768, 512),
        "model.layers.3.self_attn.o_proj.weight": (7680, 16384), "model.layers.3.input_layernorm.weight": (7680,),
        "model.layers.3.post_attention_layernorm.weight": (7680,), "model.layers.3.pre_mlp_layernorm.weight": (7680,),
        "model.layers.3.post_mlp_layernorm.weight": (7680,), "model.layers.3.mlp.gate.weight": (256, 7680),
        "model.layers.3.mlp.experts.255.gate_proj.weight": (2048, 7680),
        "model.layers.3.mlp.experts.0.down_proj.weight": (7680, 2048),
        "model.layers.3.mlp.shared_experts.up_proj.weight": (2048, 7680), "model.layers.61.enorm.weight": (7680,),
        "model.layers.61.hnorm.weight": (7680,), "model.layers.61.eh_proj.weight": (7680, 15360),
        "model.layers.61.shared_head.norm.weight": (7680,)}
    assert expected.items() <= names.items()
    assert sum(name.startswith("model.layers.61.") for name in names) == 787
    assert not any(name.endswith("e_score_correction_bias") for name in names)


def test_names_of_deepseek_v3():
    """There post_attention_layernorm is the norm before the MLP, and each router has a bias."""
    names = published_names(PRESETS["deepseek-v3-671b"])
    assert names["model.layers.3.post_attention_layernorm.weight"] == (7168,)
    assert names["model.layers.3.mlp.gate.e_score_correction_bias"] == (256,)
    assert not any("pre_mlp" in name or "post_mlp" in name for name in names)


def test_a_checkpoint_of_another_shape_is_refused():
    published = M.to_hf(build(SMALL, torch.float32))
    for other in (replace(SMALL, vocab_size=60), replace(SMALL, n_routed_experts=4), replace(SMALL, norm="pre")):
        with pytest.raises(ValueError) as error:
            M.load_hf(Model(other), published)
        assert_one_line(error, "")


# ---------------------------------------------------------------------------------------------------------------------
# Behaviour


def train_on_one_batch(steps, lr, config, forward=None):
    """(total loss, loss) of AdamW steps on one batch, from init_weights, in float64.

    forward(tensors, ids, targets, next_ids) may replace the model's own; tensors are its parameters by name.
    """
    model = started(config).double()
    inputs = batch(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        if forward is None:
            out = model(inputs[0], targets=inputs[1], next_ids=inputs[2])
        else:
            out = forward(config, dict(model.named_parameters()), *inputs)
        out.total_loss.backward()
        optimizer.step()
        losses.append((out.total_loss.item(), out.loss.item()))
    return losses


@pytest.mark.parametrize("change", [
    {}, *(pytest.param(change, marks=pytest.mark.slow) for change in (dict(norm="pre", init="small"),
                                                                      dict(capacity_factor=2.0)))], ids=str)
def test_overfits_one_batch(change):
    """From ln 61 = 4.1 nats a token to almost nothing."""
    losses = train_on_one_batch(80, 0.01, replace(SMALL, aux_loss_alpha=0.01, **change))
    assert losses[0][1] == pytest.approx(4.11, abs=0.4)
    assert losses[-1][1] < 0.1


# Total losses of SMALL, seed 0, AdamW with lr 0.01. A change of them is a change of the model or of its start.
FIRST_TEN = [6.354321492494668, 5.444118609801792, 4.852876290170251, 4.38128007081765, 4.019611127608491,
             3.695418601077837, 3.3551532229016914, 3.0561732633633794, 2.8113724762840806, 2.561532719379835]


def test_first_ten_losses_equal_the_stored_list_and_the_reference():
    """Full floats; threads and operators move them by 1e-14."""
    ours = [total for total, _ in train_on_one_batch(10, 0.01, SMALL)]
    assert ours == pytest.approx(FIRST_TEN, rel=1e-11)
    by_reference = [total for total, _ in train_on_one_batch(10, 0.01, SMALL, R.forward)]
    assert by_reference == pytest.approx(FIRST_TEN, rel=1e-11)
