"""
Weights in and out: folders in the layout of transformers, written, read under any plan, hostile; --init and export.
"""
import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import dist
import parallel
import train
from model import OTHER_KEYS, PRESETS, Config, Model, config_from_hf, config_to_hf, load_hf, to_hf
from reference import fill_random
from sim import Plan

SIZES = dict(
    vocab_size=320, hidden_size=32, num_hidden_layers=3, intermediate_size=48, num_attention_heads=4, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, max_position_embeddings=64)
YARN = dict(type="yarn", factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7)
PANGU = Config(**SIZES)
DEEPSEEK = Config(**SIZES, norm="pre", n_group=2, topk_group=1, router_bias=True, rope_scaling=YARN)
LAYOUTS = dict(pangu=PANGU, deepseek=DEEPSEEK, tied=replace(PANGU, tie_word_embeddings=True, n_shared_experts=0),
               no_mtp=replace(DEEPSEEK, num_nextn_predict_layers=0))


def filled(config, seed=0):
    model = Model(config)
    fill_random(model.state_dict(), seed)
    return model


def write(folder, config, tensors=None, shard_bytes=20_000, dtype=torch.float32, published=None):
    """A folder with these tensors by published names, by default of a random model; cut into several files."""
    model = filled(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "SHARD_BYTES", shard_bytes)
        if tensors is not None:
            patch.setattr(parallel, "to_hf", lambda model: tensors)
        texts = {"config.json": json.dumps(published or config_to_hf(config))}
        parallel.write_published(folder, model, dtype, texts)
    return model


def read(folder, config=None, trained=None):
    """A model of the folder's config, or of this one, filled from it."""
    there = parallel.read_published_config(folder)
    config = config or there
    trained = there.num_nextn_predict_layers if trained is None else trained
    pieces = parallel.published_pieces(folder, config, trained)
    model = filled(config, seed=1)
    parallel.load_published(model, pieces)
    return model


def assert_same(model, other):
    state = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_and_read_bit_for_bit(layout, tmp_path):
    config = LAYOUTS[layout]
    model = write(tmp_path / "out", config)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5 and not (tmp_path / "out.tmp").exists()
    other = read(tmp_path / "out")
    assert other.config == config
    assert_same(model, other)


def in_openpangu_keys(config):
    """config.json in the spelling of the model's first releases."""
    ours = config_to_hf(config)
    names = {value: key for key, value in sorted(OTHER_KEYS.items())}
    return {names.get(key, key): value for key, value in ours.items() if key not in ("training", "n_group")}


def quantised(name, tensor):
    """A matrix in fp8 with a float32 scale for each block of 128 x 128, as DeepSeek's: {name: tensor}, and what it is
    worth."""
    rows, columns = tensor.shape
    scales = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
    spread = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    small = (tensor / spread).to(torch.float8_e4m3fn)
    return {name: small, f"{name}_scale_inv": scales}, small.float() * spread


def fused(tensors, config):
    """Experts as transformers holds them: one tensor for all gates and ups, one for all downs."""
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        experts = [[tensors[f"{prefix}.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")]
                   for e in range(config.n_routed_experts)]
        rest[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in experts])
        rest[f"{prefix}.down_proj"] = torch.stack([down for _, _, down in experts])
    return rest


@pytest.mark.parametrize("spelling", ["openpangu", "deepseek"])
def test_a_config_of_openpangu_in_both_spellings(spelling, tmp_path):
    """sandwich_norm says which layout it is; a head and an embedding of the MTP layer's own are left out."""
    published = config_to_hf(PANGU) | dict(model_type="pangu_ultra_moe")
    published.pop("training")
    if spelling == "openpangu":
        published = in_openpangu_keys(PANGU)
        assert "num_dense_layers" in published and "attention_kv_lora_dim" in published
    source = filled(PANGU)
    tensors = to_hf(source)
    extra = {"model.layers.3.embed_tokens.weight": torch.ones(320, 32),
             "model.layers.3.shared_head.head.weight": torch.ones(320, 32)}
    write(tmp_path / "out", PANGU, tensors | extra, published=published)
    other = read(tmp_path / "out")
    assert other.config == replace(PANGU, norm="sandwich")
    assert_same(source, other)


def test_the_published_config_of_deepseek_v3():
    """As it stands at the model's page; what cannot be computed here is named."""
    published = config_to_hf(PRESETS["deepseek-v3-671b"]) | dict(quantization_config=dict(weight_block_size=[128, 128]))
    published.pop("training")
    read_back = config_from_hf(published)
    expected = PRESETS["deepseek-v3-671b"]
    assert replace(expected, init="tiny", balance="ep_group", aux_loss_alpha=0.01) == read_back
    for change, words in [(dict(model_type="llama"), "'llama'"), (dict(hidden_act="gelu"), "hidden_act='gelu'"),
                          (dict(attention_bias=True), "attention_bias"), (dict(q_lora_rank=None), "q_lora_rank"),
                          (dict(num_key_value_heads=8), "num_key_value_heads"),
                          (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_scaling")]:
        with pytest.raises(ValueError, match=words):
            config_from_hf(published | change)
    del published["vocab_size"], published["n_group"]
    with pytest.raises(ValueError, match="does not say vocab_size, n_group"):
        config_from_hf(published)


def test_experts_one_by_one_or_fused(tmp_path):
    source = filled(PANGU)
    write(tmp_path / "out", PANGU, fused(to_hf(source), PANGU))
    assert_same(source, read(tmp_path / "out"))


def test_bf16_and_blocks_of_fp8(tmp_path):
    """Matrices of 160 x 144: two blocks each way, of which the last is not full."""
    config = replace(DEEPSEEK, hidden_size=144, moe_intermediate_size=160)
    source = filled(config)
    files, expected = {}, {}
    for name, tensor in to_hf(source).items():
        if ".experts." in name or "o_proj" in name:
            small, expected[name] = quantised(name, tensor)
            files |= small
        else:
            files[name] = tensor if "bias" in name else tensor.bfloat16()
            expected[name] = files[name].float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "in_shards", lambda tensors, dtype: [{n: (t, t.dtype) for n, t in tensors.items()}])
        patch.setattr(parallel, "BAND", 1000)             # several bands a matrix
        write(tmp_path / "out", config, files)
        other = read(tmp_path / "out")
    load_hf(source, expected)
    assert_same(source, other)


def refused(folder, *words, config=None, trained=None):
    with pytest.raises(parallel.CheckpointError) as caught:
        read(folder, config, trained)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_all_that_is_amiss_in_one_message(tmp_path):
    tensors = to_hf(filled(DEEPSEEK))
    missing = [name for name in tensors if "layers.2.mlp.experts" in name or name == "lm_head.weight"]
    for name in missing:
        del tensors[name]
    tensors["model.layers.0.mlp.gate.weight"] = torch.ones(4, 32)
    tensors["model.norm.weight"] = torch.ones(33)
    write(tmp_path / "out", DEEPSEEK, tensors)
    refused(tmp_path / "out", "13 tensors missing", "'lm_head.weight'", "experts.0.down_proj.weight' and 3 alike",
            "1 tensors without a place: 'model.layers.0.mlp.gate.weight'",
            "1 tensors of another shape: 'model.norm.weight' (33,), in the model (32,)")
    model = filled(DEEPSEEK)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="13 tensors missing"):
        load_hf(model, tensors)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "filled by half"


def test_a_tied_model_takes_a_head_and_one_without_mtp_says_what_to_set(tmp_path):
    tied = LAYOUTS["tied"]
    source = filled(tied)
    load_hf(filled(tied, seed=1), to_hf(source) | {"lm_head.weight": torch.ones(320, 32)})
    tensors = {name: tensor for name, tensor in to_hf(filled(DEEPSEEK)).items() if "layers.3." not in name}
    write(tmp_path / "out", DEEPSEEK, tensors)
    refused(tmp_path / "out", "num_nextn_predict_layers=0")
    read(tmp_path / "out", replace(DEEPSEEK, num_nextn_predict_layers=0))


def read_on_ranks(folder, config, plan, trained):
    """On each rank: whether its part of a model, read from the folder, is that of the whole one, filled in memory."""
    model, twin = Model(config), Model(config)
    fill_random(model.state_dict(), 1)
    whole = Model(replace(config, num_nextn_predict_layers=trained))
    fill_random(whole.state_dict(), 0)
    whole = whole.state_dict()
    twin.load_state_dict({name: whole[parallel.trained_name(config, trained, name)] for name in twin.state_dict()})
    for each in (model, twin):
        parallel.parallelize(each, plan)
    parallel.load_published(model, parallel.published_pieces(folder, config, trained))
    expected = twin.state_dict()
    differing = [name for name, tensor in model.state_dict().items()
                 if not torch.equal(parallel.local(tensor), parallel.local(expected[name]))]
    return differing, sum(parallel.local(tensor).numel() for tensor in expected.values())


PLANS = [dict(tp=2, sp=1), dict(dp=2, ep=2), dict(pp=2), dict(dp=2, zero=3), dict(tp=2, sp=1, ep=2, zero=3)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_each_rank_reads_its_part(plan, tmp_path):
    config = replace(PANGU, num_nextn_predict_layers=3)
    write(tmp_path / "out", replace(config, num_nextn_predict_layers=2))
    plan = Plan(**dict(micro_batch=2, global_batch=4, seq_len=16, precision="fp32") | plan)
    results = dist.run(2, read_on_ranks, tmp_path / "out", config, plan, 2)
    assert [differing for differing, _ in results] == [[], []]
    assert sum(count for _, count in results) >= sum(t.numel() for t in Model(config).state_dict().values())
