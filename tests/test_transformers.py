"""
Our model beside transformers' DeepseekV3, in fp32: the plain layout, and the sandwich layout with MTP by a subclass.

An expert that no token chose has a gradient of zeros on both sides (experts are stacked in one tensor here and there),
so AdamW decays it alike. Skipped where transformers is not installed; it is no dependency of the project.
"""
import copy
from dataclasses import asdict

import pytest
import torch

from model import Config, Model, load_hf, to_hf
from reference import fill_random

pytest.importorskip("transformers", reason="compares with transformers>=5: pip install transformers")

SIZES = dict(
    vocab_size=97, hidden_size=48, num_hidden_layers=3, intermediate_size=80, num_attention_heads=3, q_lora_rank=24,
    kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=12, num_experts_per_tok=3,
    moe_intermediate_size=24, max_position_embeddings=128, rope_theta=500.0, balance="none")
YARN = dict(type="yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=1.0, mscale=1.0,
            mscale_all_dim=0.7)
DEEPSEEK = Config(**SIZES, norm="pre", n_group=3, topk_group=2, router_bias=True, rope_scaling=YARN, rms_norm_eps=1e-6,
                  num_nextn_predict_layers=0)
PANGU = Config(**SIZES, num_nextn_predict_layers=1, mtp_hidden="post_norm")
TOLERANCE = 1e-5                                          # of the largest value of the array


def sandwich_layer():
    """DeepSeek's decoder layer with the two post norms of the sandwich, under the names of the released weights."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    class SandwichLayer(deepseek.DeepseekV3DecoderLayer):
        def __init__(self, config, layer_idx):
            super().__init__(config, layer_idx)
            self.pre_mlp_layernorm = deepseek.DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.post_mlp_layernorm = deepseek.DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        def forward(self, hidden_states, **kwargs):
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + self.post_attention_layernorm(attended)
            return hidden_states + self.post_mlp_layernorm(self.mlp(self.pre_mlp_layernorm(hidden_states)))

    return SandwichLayer


def transformers_config(config):
    from transformers import DeepseekV3Config
    same = {key: value for key, value in asdict(config).items() if key in DeepseekV3Config.__dataclass_fields__}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope = {**rope, **config.rope_scaling, "rope_type": "yarn"}
        rope.pop("type")
    theirs = DeepseekV3Config(**same, num_key_value_heads=config.num_attention_heads, rope_parameters=rope,
                              use_cache=False)
    theirs._attn_implementation = "eager"
    theirs._experts_implementation = "eager"
    return theirs


def build_theirs(config, monkeypatch):
    """transformers' model and its MTP part (None without one)."""
    from transformers.modeling_layers import MtpModel
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
    if config.norm != "pre":
        monkeypatch.setattr(deepseek, "DeepseekV3DecoderLayer", sandwich_layer())
    model = deepseek.DeepseekV3ForCausalLM(transformers_config(config))
    depths = config.num_nextn_predict_layers
    return model, MtpModel(model, depths) if depths else None


def their_name(config, name):
    """Where our parameter `name` lies in transformers: ("main" | "mtp", its name there)."""
    if config.norm == "pre":
        name = name.replace("pre_mlp_layernorm", "post_attention_layernorm")
    parts = name.split(".")
    if parts[0] == "lm_head":
        return "main", name
    if parts[0] != "layers" or int(parts[1]) < config.num_hidden_layers:
        return "main", "model." + name
    depth, rest = int(parts[1]) - config.num_hidden_layers, ".".join(parts[2:])
    if rest.startswith(("enorm", "hnorm", "eh_proj")):
        return "mtp", f"layers.{depth}.{rest}"
    if rest == "shared_head.norm.weight":
        return "mtp", f"layers.{depth}.post_norm.weight"
    return "mtp", f"layers.{depth}.mtp_block.{rest}"


def build_twins(config, monkeypatch):
    """Ours with random weights, theirs with the same, and all parameters of both as (name, ours, theirs)."""
    ours = Model(config)
    fill_random(ours.state_dict(), seed=0)
    model, mtp = build_theirs(config, monkeypatch)
    theirs = {("main", name): t for name, t in model.state_dict(keep_vars=True).items()}
    if mtp is not None:
        shared = ("embed_tokens", "shared_head")
        own = {name: t for name, t in mtp.state_dict(keep_vars=True).items() if not name.startswith(shared)}
        theirs |= {("mtp", name): t for name, t in own.items()}
    pairs = []
    for name, tensor in ours.state_dict(keep_vars=True).items():
        twin = theirs.pop(their_name(config, name))
        assert twin.shape == tensor.shape, (name, twin.shape, tensor.shape)
        twin.data.copy_(tensor.data)
        pairs.append((name, tensor, twin))
    biases = [name for _, name in theirs if name.endswith("e_score_correction_bias")]
    assert len(biases) == len(theirs), f"tensors of transformers that ours lacks: {theirs.keys()}"
    return ours, (model, mtp), [pair for pair in pairs if pair[1].requires_grad]


def their_loss(config, theirs, ids, targets):
    """Losses and logits of the same call; targets (B,1+MTP,T) are shifted, the MTP layer reads targets of depth 0."""
    model, mtp = theirs
    before_norm = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    hidden = model.model(ids).last_hidden_state
    hook.remove()
    logits = [model.lm_head(hidden)]
    h = hidden if config.mtp_hidden == "post_norm" else before_norm[0]
    positions = torch.arange(ids.shape[1])[None]
    for depth in range(config.num_nextn_predict_layers):
        h = mtp.forward_layer(depth, h, positions, None, input_ids=targets[:, depth])
        logits.append(model.lm_head(h))
    losses = [torch.nn.functional.cross_entropy(l.flatten(0, 1), targets[:, d].flatten()) for d, l in enumerate(logits)]
    return losses[0] + config.mtp_loss_weight * sum(losses[1:]), losses, logits


def close(ours, theirs, what):
    error = (ours - theirs).abs().max().item()
    largest = theirs.abs().max().item()
    assert error <= TOLERANCE * largest, f"{what}: differs by {error:.2e}, largest value {largest:.2e}"


def batch(config, seed, B=2, T=40):
    """ids (B,T), targets (B,1+MTP,T) and next_ids (B,MTP,T) of random tokens, cut from longer sequences."""
    depths = 1 + config.num_nextn_predict_layers
    tokens = torch.randint(config.vocab_size, (B, T + depths), generator=torch.Generator().manual_seed(seed))
    shifted = torch.stack([tokens[:, 1 + d:1 + d + T] for d in range(depths)], 1)
    return tokens[:, :T], shifted, shifted[:, :-1]


LAYOUTS = {
    "deepseek-v3": DEEPSEEK,
    "sandwich-mtp": PANGU,
    "sandwich-mtp-pre-norm": Config(**SIZES, num_nextn_predict_layers=1, mtp_hidden="pre_norm"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_losses_and_every_gradient(layout, monkeypatch):
    config = LAYOUTS[layout]
    ours, theirs, pairs = build_twins(config, monkeypatch)
    ids, targets, next_ids = batch(config, seed=1)
    out = ours(ids, targets=targets, next_ids=next_ids, return_logits=True)
    total, losses, logits = their_loss(config, theirs, ids, targets)
    close(out.logits, logits[0], "logits")
    close(out.loss, losses[0], "loss")
    for depth, expected in enumerate(logits[1:]):
        close(out.mtp_logits[depth], expected, f"logits of MTP depth {depth}")
    close(out.total_loss, total, "total loss")
    out.total_loss.backward()
    total.backward()
    for name, mine, twin in pairs:
        close(mine.grad, twin.grad, name)


@pytest.mark.parametrize("layout", ["deepseek-v3", "sandwich-mtp"])
def test_losses_of_20_adamw_steps(layout, monkeypatch):
    config = LAYOUTS[layout]
    ours, theirs, pairs = build_twins(config, monkeypatch)
    settings = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mine = torch.optim.AdamW([pair[1] for pair in pairs], **settings)
    twin = torch.optim.AdamW([pair[2] for pair in pairs], **settings)
    for step in range(20):
        ids, targets, next_ids = batch(config, seed=step % 4)
        loss = ours(ids, targets=targets, next_ids=next_ids).total_loss
        expected, _, _ = their_loss(config, theirs, ids, targets)
        close(loss, expected, f"loss of step {step}")
        for optimizer, value in ((mine, loss), (twin, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()


def test_a_gradient_of_zeros_for_an_expert_without_tokens(monkeypatch):
    """Both sides stack their experts: no tokens means zeros, not None, so the optimizer treats the expert alike."""
    ours, theirs, pairs = build_twins(DEEPSEEK, monkeypatch)
    for name, tensor in list(ours.state_dict().items()) + list(theirs[0].state_dict().items()):
        if name.endswith("e_score_correction_bias"):
            tensor[5] = -100.0
    ids, targets, next_ids = batch(DEEPSEEK, seed=2)
    ours(ids, targets=targets, next_ids=next_ids).total_loss.backward()
    their_loss(DEEPSEEK, theirs, ids, targets)[0].backward()
    for name, mine, twin in pairs:
        if ".experts." in name:
            assert not mine.grad[5].any() and not twin.grad[5].any(), name
            assert mine.grad[4].any(), name
        close(mine.grad, twin.grad, name)


@pytest.mark.parametrize("layout", ["deepseek-v3", "sandwich-mtp"])
def test_weights_pass_through_files_of_transformers(layout, monkeypatch, tmp_path):
    """Files that transformers writes load into ours by load_hf; what to_hf gives loads into transformers."""
    from safetensors.torch import load_file, save_file
    config = LAYOUTS[layout]
    ours, (model, _), _ = build_twins(config, monkeypatch)
    ids, _, _ = batch(config, seed=3)
    expected = ours(ids).logits

    model.save_pretrained(tmp_path / "theirs")
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    if not config.router_bias:                            # transformers always has one, and writes its zeros
        written = {name: tensor for name, tensor in written.items() if not name.endswith("e_score_correction_bias")}
    mtp_prefix = f"model.layers.{config.num_hidden_layers}."
    published = to_hf(ours)
    assert {name for name in published if not name.startswith(mtp_prefix)} == set(written)
    empty = Model(config)
    load_hf(empty, {**published, **written})
    torch.testing.assert_close(empty(ids).logits, expected, rtol=0, atol=0)

    (tmp_path / "ours").mkdir()
    model.config.save_pretrained(tmp_path / "ours")
    contiguous = {name: tensor.contiguous() for name, tensor in published.items() if not name.startswith(mtp_prefix)}
    save_file(contiguous, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path / "ours", config=copy.deepcopy(model.config), dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
