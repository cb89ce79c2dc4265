"""
Our model beside transformers' DeepseekV3, in fp32: the plain layout, and the sandwich layout with MTP by a subclass.

An expert that no token chose has a gradient of zeros on both sides (experts are stacked in one tensor here and there),
so AdamW decays it alike. Skipped where transformers is not installed; it is no dependency of the project.
"""
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import parallel
import train
from model import Config, Model, config_to_hf, to_hf
from reference import fill_random
from test_weights import quantised

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


# files: what transformers writes is read here, what is written here transformers loads


def randomised(config):
    """transformers' DeepSeek-V3, random, with a router bias; eager, so that float32 is exact."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
    model = deepseek.DeepseekV3ForCausalLM(transformers_config(config)).eval()
    fill_random(model.state_dict(), seed=0)
    return model


def opened(folder, depths=0):
    """Our model of a folder's weights, with so many MTP layers: transformers never writes any."""
    config = replace(parallel.read_published_config(folder), num_nextn_predict_layers=depths)
    model = Model(config).eval()
    parallel.load_published(model, parallel.published_pieces(folder, config, depths))
    return model


def same_text(ours, theirs, ids):
    """Greedy tokens of both."""
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(12):
        ids = torch.cat((ids, ours(ids).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(ids, expected)


@torch.no_grad()
def test_a_folder_of_transformers_gives_its_logits_and_tokens(tmp_path):
    """Groups, router bias, YaRN. Its config.json says that there is an MTP layer."""
    theirs = randomised(DEEPSEEK)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        opened(tmp_path, depths=1)
    ours = opened(tmp_path)
    same = {key: value for key, value in asdict(DEEPSEEK).items() if key not in ("balance", "rope_scaling")}
    assert same.items() <= asdict(ours.config).items()
    ids, _, _ = batch(DEEPSEEK, seed=3)
    close(ours(ids).logits, theirs(ids).logits, "logits")
    same_text(ours, theirs, ids[:1])


@torch.no_grad()
def test_a_folder_in_blocks_of_fp8_gives_its_logits(tmp_path):
    """Written as DeepSeek's own: every matrix of a layer but the router's. theirs gets what the blocks are worth."""
    from safetensors.torch import load_file, save_file
    config = replace(DEEPSEEK, hidden_size=144, moe_intermediate_size=136)
    theirs = randomised(config)
    theirs.save_pretrained(tmp_path)
    worth = load_file(tmp_path / "model.safetensors")
    files = dict(worth)
    for name, tensor in worth.items():
        if "layers" in name and tensor.dim() == 2 and "gate.weight" not in name:
            small, worth[name] = quantised(name, tensor)
            files |= small
    save_file(worth, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    theirs = type(theirs).from_pretrained(tmp_path, config=theirs.config, dtype=torch.float32).eval()
    save_file(files, tmp_path / "model.safetensors")
    ids, _, _ = batch(config, seed=3)
    close(opened(tmp_path)(ids).logits, theirs(ids).logits, "logits")


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_transformers_loads_an_export(bias, tmp_path):
    """The folder as it is, by the Auto classes: config, weights, tokenizer. Without a router bias theirs is zero; MTP
    layers it passes over."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    config = replace(DEEPSEEK, router_bias=bias, vocab_size=400, num_nextn_predict_layers=int(bias))
    ours = Model(config).eval()
    fill_random(ours.state_dict(), seed=0)
    text = (Path(__file__).parent / "test_transformers.py").read_text() + "Schön — 1234567 ½ \U0001f600  \n\n x"
    encoding = train.make_encoding(train.learn_bpe([text], 380))
    files = {"config.json": config_to_hf(config)} | train.tokenizer_files(encoding)
    parallel.write_published(tmp_path / "out", ours, torch.float32, {n: json.dumps(f) for n, f in files.items()})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    theirs.set_experts_implementation("eager")
    ids, _, _ = batch(config, seed=3)
    close(ours(ids).logits, theirs(ids).logits, "logits")
    same_text(ours, theirs, ids[:1])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text)["input_ids"] == encoding.encode_ordinary(text)
    assert tokenizer.eos_token_id == encoding.encode_single_token(train.END)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("pattern", ["gpt2", "ours"])
def test_a_tokenizer_of_others_gives_its_ids(pattern, tmp_path):
    """Byte-level BPE as the tokenizers library learns it, with special tokens before the bytes."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern == "ours":
        byte_level.use_regex = False
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(train.PATTERN), "isolated"), byte_level])
    tokenizer.pre_tokenizer = byte_level
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet,
                                  show_progress=False)
    root = Path(__file__).parent.parent
    tokenizer.train([str(root / "model.py")], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(eos_token="</s>")))
    encoding = train.encoding_of_folder(tmp_path)
    text = (root / "train.py").read_text()
    assert encoding.encode_ordinary(text) == tokenizer.encode(text).ids
    assert encoding.encode_single_token(train.END) == 1 and encoding.n_vocab == 1500
