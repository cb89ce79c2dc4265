"""
Weights in and out: folders in the layout of transformers, written, read under any plan, hostile; --init and export.
"""
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dist
import parallel
import train
from model import OTHER_KEYS, PRESETS, Config, Model, config_from_hf, config_to_hf, load_hf, to_hf
from reference import fill_random
from sim import Plan
from test_torchrun import finish, lines, start
from test_train import SHAPE, run

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
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5 and not (tmp_path / "out.unfinished-export").exists()
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


def read_on_ranks(folder, checkpoint, config, plan, trained):
    """On each rank: parts of a model, read from a folder and from a checkpoint, that are not those of the whole one,
    filled in memory; and how many numbers it holds."""
    model, twin = Model(config), Model(config)
    fill_random(model.state_dict(), 1)
    whole = Model(replace(config, num_nextn_predict_layers=trained))
    fill_random(whole.state_dict(), 0)
    whole = whole.state_dict()
    twin.load_state_dict({name: whole[parallel.trained_name(config, trained, name)] for name in twin.state_dict()})
    for each in (model, twin):
        grid = parallel.parallelize(each, plan)
    expected, differing = twin.state_dict(), []
    for source in (folder, checkpoint):
        if source == folder:
            parallel.load_published(model, parallel.published_pieces(folder, config, trained))
        else:
            fill_random({name: parallel.local(tensor) for name, tensor in model.state_dict().items()}, 1)
            parallel.load_trained(checkpoint, model, trained, grid)
        differing += [(source, name) for name, tensor in model.state_dict().items()
                      if not torch.equal(parallel.local(tensor), parallel.local(expected[name]))]
    return differing, sum(parallel.local(tensor).numel() for tensor in expected.values())


PLANS = [dict(tp=2, sp=1), dict(dp=2, ep=2), dict(pp=2), dict(dp=2, zero=3), dict(tp=2, sp=1, ep=2, zero=3)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_each_rank_reads_its_part(plan, tmp_path):
    config = replace(PANGU, num_nextn_predict_layers=3)
    source = write(tmp_path / "out", replace(config, num_nextn_predict_layers=2))
    saver = parallel.Saver(tmp_path, 1)
    saver.save(dict(model=source.state_dict()), dict(step=1))
    saver.wait()
    plan = Plan(**dict(micro_batch=2, global_batch=4, seq_len=16, precision="fp32") | plan)
    results = dist.run(2, read_on_ranks, tmp_path / "out", tmp_path / "step_1", config, plan, 2)
    assert [differing for differing, _ in results] == [[], []]
    assert sum(count for _, count in results) >= sum(t.numel() for t in Model(config).state_dict().values())


# ---------------------------------------------------------------------------------------------------------------------
# The largest model


def test_every_tensor_of_the_largest_model_has_a_place():
    """45,459 of the model, 787 of its MTP layer: each is a part of one tensor of ours, by its published name."""
    config = PRESETS["pangu-ultra-moe-718b"]
    with torch.device("meta"):
        published = to_hf(Model(config))
    mtp = [name for name in published if name.startswith("model.layers.61.")]
    assert (len(published) - len(mtp), len(mtp)) == (45_459, 787)
    assert sum(tensor.numel() for tensor in published.values()) == 719_093_767_680 + 12_443_343_360


LARGE = replace(PRESETS["pangu-ultra-moe-718b"], num_hidden_layers=2, first_k_dense_replace=1,
                num_nextn_predict_layers=0)


def write_sparse(folder):
    """One dense and one MoE layer of true shapes in bf16, 29 GB of zeros that take no room, a file a layer."""
    folder.mkdir()
    weight_map, files = {}, {}
    with torch.device("meta"):
        for name, tensor in to_hf(Model(LARGE)).items():
            layer = "-".join(name.split(".")[1:3]) if "layers" in name else "ends"
            files.setdefault(f"{layer}.safetensors", {})[name] = tensor
    for file, tensors in files.items():
        weight_map |= dict.fromkeys(tensors, file)
        header, place = {}, 0
        for name, tensor in tensors.items():
            end = place + 2 * tensor.numel()
            header[name] = dict(dtype="BF16", shape=list(tensor.shape), data_offsets=[place, end])
            place = end
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + place)
            for name, (start, end) in ((name, entry["data_offsets"]) for name, entry in header.items()):
                out.seek(8 + len(text) + end - 2)         # the last number of each tensor is 1
                out.write(torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy())
    (folder / parallel.INDEX).write_text(json.dumps(dict(weight_map=weight_map)))
    (folder / "config.json").write_text(json.dumps(config_to_hf(LARGE)))


def peak_bytes():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def read_one_rank_of_32(folder):
    """In a process of its own: prints what rank 5 of ep=32 holds, in bytes, and what its memory rose by."""
    parallel.rank = lambda: 5
    with torch.device("meta"):
        stage = Model(LARGE)
    stage.embed_tokens = stage.norm = stage.lm_head = None
    parallel.keep_own_experts(stage.layers["1"].mlp.experts, Plan(dp=32, ep=32))
    stage.to(torch.bfloat16)
    before = peak_bytes()
    pieces = parallel.published_pieces(Path(folder), LARGE, 0)
    stage.to_empty(device="cpu")
    parallel.load_published(stage, pieces)
    risen = peak_bytes() - before
    experts = stage.layers["1"].mlp.experts
    assert experts.first_expert == 40 and experts.gate_up_proj.shape == (8, 4096, 7680)
    for name, tensor in stage.state_dict().items():
        halves = 2 if "gate_up_proj" in name else 1       # each a tensor of the files
        assert tensor.count_nonzero() == (8 if ".experts." in name else 1) * halves, name
        assert tensor.flatten()[-1] == 1, name
    print(sum(tensor.nbytes for tensor in stage.state_dict().values()), risen)


@pytest.mark.slow
def test_a_rank_of_the_largest_model_takes_little_more_than_its_own(tmp_path):
    write_sparse(tmp_path / "large")
    code = f"import test_weights; test_weights.read_one_rank_of_32({str(tmp_path / 'large')!r})"
    paths = f"{Path(__file__).parent}:{Path(__file__).parent.parent}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=paths, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    own, risen = map(int, done.stdout.split())
    print(f"{own / 2**30:.2f} GiB of parameters, memory rose by {risen / 2**30:.2f} GiB")
    assert own > 2**31 and risen < own + 2**29


# ---------------------------------------------------------------------------------------------------------------------
# train.py: --init, export, tokenizers of folders

TINY = ("--seq-len 16 --global-batch 4 --micro-batch 2 --threads 1 --precision fp32 --compile none --heldout 0 --set "
        + SHAPE).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 3 steps on words in a random order, and its text beside it."""
    folder, rng = tmp_path_factory.mktemp("weights"), random.Random(0)
    words = "the model reads a word and guesses which one follows é 12 (x_y)\n".split(" ")
    (folder / "text.txt").write_text(" ".join(rng.choices(words, k=2000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "conclude", lambda run, checkpoint: None)    # no sample of text
        run("pretrain", *TINY, "rope_theta=500", "--data", folder / "text.txt", "--out", folder / "run", "--steps", 3)
    return folder / "run"


@pytest.fixture(scope="module")
def exported(trained):
    run("export", "--init", trained, "--out", trained.parent / "hf", "--dtype", "fp32")
    return trained.parent / "hf"


@pytest.fixture
def opened(trained, tmp_path, monkeypatch):
    """A function: flags of pretrain -> the Run that they open and its model, as it is before the first step."""
    monkeypatch.chdir(tmp_path)

    def open_with(*flags):
        words = "pretrain --threads 1 --global-batch 4 --micro-batch 2 --steps 2 --compile none --data".split()
        _, given = train.parse([*words, str(trained.parent / "text.txt"), *map(str, flags)])
        new = train.Run(train.Pretrain, given)
        train.open_run(new)
        new.lock.close()
        pipeline, optimizer = train.build(new, new.phases[0], None)
        return new, pipeline.model, optimizer
    return open_with


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1, error
    return error[0]


def test_a_new_run_begins_with_the_weights_of_a_run(trained, opened):
    source, encoding, end = train.open_model(str(trained), "cpu")
    new, model, _ = opened("--init", trained, "--seq-len", 24, "--set", "rope_theta=900", "balance_group=1")
    assert_same(source, model)
    assert new.folder.name == "run" and new.source.path == trained / "ckpt/step_3"
    assert new.encoding._mergeable_ranks == encoding._mergeable_ranks and new.corpus.encoding.eot_token == end
    assert new.config == replace(source.config, rope_theta=900.0, balance_group=1,
                                 max_position_embeddings=24)
    assert new.progress == train.beginning()


def test_it_trains_and_goes_on_without_its_source(trained, tmp_path, monkeypatch, capsys):
    """The second run is resumed when the first one is gone: tokenizer and config are its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "conclude", lambda run, checkpoint: None)
    shutil.copytree(trained, tmp_path / "a")
    how = "--lr 1e-3 --global-batch 4 --micro-batch 2 --seq-len 16 --threads 1 --heldout 0 --compile none".split()
    data = "--data", trained.parent / "text.txt"
    run("pretrain", "--init", "a", "--mtp-depth", 2, "--train", "mtp", *how, *data, "--steps", 2, "--out", "b")
    shutil.rmtree("a")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")                 # torchrun starts the same command again
    run("pretrain", "--init", "a", "--mtp-depth", 2, "--train", "mtp", *how, *data, "--steps", 3, "--out", "b")
    log = [json.loads(line) for line in Path("b/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]
    config = json.loads(Path("b/config.json").read_text())
    assert config["source"] == str(tmp_path / "a/ckpt/step_3") and config["settings"]["init"] == "a"


@pytest.mark.parametrize("flags, words", [
    ("--set hidden_size=32", "only what owns no tensor"), ("--set router_bias=true", "only what owns no tensor"),
    ("--preset tiny", "leave --preset away"), ("--set num_nextn_predict_layers=2", "--mtp-depth 2"),
    ("--tokenizer gpt2.tiktoken", "no tiktoken file"), ("--train mtp --schedule paired", "--train mtp needs"),
    ("--set num_nextn_predict_layers=0 --mtp-depth 2 --set vocab_size=600", "only what owns no tensor")])
def test_what_init_refuses(flags, words, trained, opened, capsys):
    with pytest.raises(ValueError, match=words):
        opened("--init", trained, *flags.split())
    assert "neither a run's folder" in refusal(capsys, "pretrain", "--init", "nowhere")
    assert "no such checkpoint" in refusal(capsys, "sample", "--init", trained / "ckpt" / "step_9")
    assert "--average is of the checkpoints of --init" in refusal(capsys, "pretrain", "--average", 2, "--heldout", 0)


def test_an_exported_folder_gives_the_same_model_tokenizer_and_text(trained, exported, opened, capsys):
    source, encoding, end = train.open_model(str(trained), "cpu")
    other, again, its_end = train.open_model(str(exported), "cpu")
    assert other.config == source.config and its_end == end
    assert_same(source, other)
    text = (trained.parent / "text.txt").read_text() + "Schön — 1234567 ½ \u200b\U0001f600\n\n  x"
    assert again.encode_ordinary(text) == encoding.encode_ordinary(text)
    capsys.readouterr()
    run("sample", "--init", trained, "--prompt", "the", "--new-tokens", 8, "--device", "cpu")
    first = capsys.readouterr().out
    run("sample", "--init", exported, "--prompt", "the", "--new-tokens", 8, "--device", "cpu")
    assert capsys.readouterr().out == first
    new, model, _ = opened("--init", exported, "--seq-len", 16)
    assert_same(source, model)
    assert new.corpus.encoding.eot_token == end and new.folder.name == "hf"


def test_export_is_whole_or_not_at_all(trained, exported, tmp_path, monkeypatch, capsys):
    """A disk that is full leaves nothing; a folder that is there is not touched; bf16 is what float32 rounds to."""
    assert "choose a new folder" in refusal(capsys, "export", "--init", trained, "--out", exported)
    with monkeypatch.context() as patch:
        patch.setattr(parallel.os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert "No space left" in refusal(capsys, "export", "--init", trained, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    run("export", "--init", trained, "--out", tmp_path / "out")
    assert "transformers has no norm=dssn" in capsys.readouterr().out
    source, _, _ = train.open_model(str(trained), "cpu")
    rounded, _, _ = train.open_model(str(tmp_path / "out"), "cpu")
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name].bfloat16().float()), name


@pytest.mark.parametrize("init", ["run", "hf"])
def test_mtp_layers_are_copied_and_trained_alone(init, trained, exported, opened):
    """Three depths from one; a step with --train mtp moves only them, and only they have moments."""
    new, model, optimizer = opened("--init", trained.parent / init, "--mtp-depth", 3, "--train", "mtp", "--seq-len", 16)
    source, _, _ = train.open_model(str(trained), "cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in before.items():
        assert torch.equal(tensor, source.state_dict()[parallel.trained_name(source.config, 1, name)]), name
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    pipeline = parallel.Pipeline(model, new.plan)
    new.stage.begin(new.phases[0], pipeline)
    batch, = new.stage.batches(new.progress, 4)
    train.train_step(pipeline, optimizer, batch, clip=1.0)
    for name, tensor in model.state_dict().items():
        is_mtp = name.startswith(("layers.2", "layers.3", "layers.4"))
        assert torch.equal(tensor, before[name]) != is_mtp, name
    assert len(optimizer.state) == sum(name.startswith("layers.") and int(name.split(".")[1]) > 1
                                       for name, _ in model.named_parameters())


def test_an_exported_model_without_its_mtp_layers(exported, opened):
    _, model, _ = opened("--init", exported, "--set", "num_nextn_predict_layers=0", "--seq-len", 16)
    assert not model.mtp_layers()


@pytest.mark.slow
def test_ranks_begin_with_the_same_weights(trained, exported, tmp_path):
    """One process from a run, and two from the folder that was exported of it, under several plans: equal losses."""
    how = "--global-batch 4 --seq-len 16 --threads 1 --precision fp32 --heldout 0 --steps 2 --lr 1e-3".split()
    how += ["--compile", "none", "--data", trained.parent / "text.txt", "--set", "balance_group=2", "--micro-batch", 2]
    for train_what, plans in dict(all=["--ep 2 --zero 3", "--pp 2"], mtp=["--tp 2 --sp 1 --zero 1"]).items():
        alone = tmp_path / f"alone_{train_what}"
        run("pretrain", "--init", trained, "--mtp-depth", 2, "--train", train_what, *how, "--out", alone)
        for number, plan in enumerate(plans):
            out = tmp_path / f"{train_what}{number}"
            finish(start("--init", exported, "--mtp-depth", 2, "--train", train_what, *how, *plan.split(), "--out", out,
                         ranks=2))
            for mine, theirs in zip(lines(out), lines(alone), strict=True):
                assert abs(mine["loss"] - theirs["loss"]) < 1e-5, (plan, mine, theirs)
                assert abs(mine["mtp_loss"] - theirs["mtp_loss"]) < 1e-5, (plan, mine, theirs)
                assert abs(mine["grad_norm"] - theirs["grad_norm"]) < 1e-4, (plan, mine, theirs)


TOKENIZERS = {
    "normalizer": lambda c: c.update(normalizer=dict(type="NFC")),
    "more than one pattern": lambda c: c["pre_tokenizer"]["pretokenizers"].insert(0, dict(type="Digits")),
    "not follow its merges": lambda c: c["model"]["merges"].reverse(),
    "made by no merge": lambda c: c["model"]["merges"].pop(),
    "lacks some bytes": lambda c: c["model"]["vocab"].pop("!"),
    "none of its added_tokens": lambda c: c.update(added_tokens=[]),
    "not match all text": lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern=dict(Regex="[a-z]+")),
    "Parsing error": lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern=dict(Regex="(")),
    "twice": lambda c: c["added_tokens"][0].update(id=7),
    "TypeError": lambda c: c.update(model=None)}


@pytest.mark.parametrize("words", TOKENIZERS)
def test_tokenizers_that_tiktoken_cannot_run(words, exported, tmp_path, opened):
    """Each is refused in one line that names --tokenizer, which may then bring another one."""
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    TOKENIZERS[words](content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(train.UserError, match=f"{words}.*--tokenizer"):
        train.encoding_of_folder(folder)
    if words == "normalizer":
        own = exported.parent / "run" / "tokenizer.tiktoken"
        new, _, _ = opened("--init", folder, "--tokenizer", own, "--seq-len", 16)
        assert new.encoding.n_vocab <= new.config.vocab_size


# ---------------------------------------------------------------------------------------------------------------------
# Hostile folders

NASTY = [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "x", "F32", "../x",
         "/etc/passwd", "a\0b.safetensors", "x\ny", [], [0], [-1, 4], [0, 2**70], [[1]], {}, {"a": 1}, ["F32"],
         "\ud800", "9" * 5000]
SECONDS = 20                               # that one folder may take


def nastier(content, rng):
    """A JSON value with one value in it, at any depth, changed, removed, moved or doubled."""
    holders, todo = [], [content]
    while todo:
        item = todo.pop()
        if isinstance(item, (dict, list)) and item:
            holders.append(item)
            todo += item.values() if isinstance(item, dict) else item
    if not holders:
        return rng.choice(NASTY)
    holder = rng.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    key, other = rng.choice(keys), rng.choice(keys)
    kind = rng.choice(["change", "change", "change", "remove", "swap", "copy", "add"])
    if kind == "change":
        holder[key] = rng.choice(NASTY)
    elif kind == "remove":
        del holder[key]
    elif kind == "swap":
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == "copy":
        holder[key] = holder[other]
    elif isinstance(holder, dict):
        holder[str(rng.choice(NASTY))] = holder[key]
    return content


def noisy(data, rng):
    """Bytes with a few of them changed, put in, or left out."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        kind = rng.choice(["change", "insert", "cut"])
        if kind == "insert" or not data:
            data[place:place] = rng.randbytes(rng.randint(1, 20))
        elif kind == "change":
            data[min(place, len(data) - 1)] = rng.choice([0, 255, rng.randrange(256), ord('"'), ord("9"), ord("}")])
        else:
            del data[place:place + rng.choice([1, 8, 10**6])]
    return bytes(data)


def mutate(folder, rng):
    """Change one thing in a folder -> what, in words."""
    shard = rng.choice(sorted(folder.glob("*.safetensors")))
    kind = rng.choice(["config", "config", "config bytes", "index", "index bytes", "header", "header", "header bytes",
                       "length", "cut", "longer", "gone", "folder", "pipe", "link", "pickle", "exchanged"])
    path = folder / ("config.json" if "config" in kind else parallel.INDEX)
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if kind in ("config", "index"):
        path.write_text(json.dumps(nastier(json.loads(path.read_text()), rng)))
    elif kind in ("config bytes", "index bytes"):
        path.write_bytes(noisy(path.read_bytes(), rng))
    elif kind == "header":
        header = json.dumps(nastier(json.loads(data[8:8 + length]), rng)).encode()
        shard.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length:])
    elif kind == "header bytes":
        header = noisy(data[8:8 + length], rng)
        shard.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length:])
    elif kind == "length":
        wrong = rng.choice([0, 1, length - 1, length + 1, len(data), 2**32, 2**63, 2**64 - 1, rng.randrange(2**20)])
        shard.write_bytes(wrong.to_bytes(8, "little") + data[8:])
    elif kind == "cut":
        shard.write_bytes(data[:rng.choice([0, 3, 8, length, len(data) - 1, rng.randrange(len(data))])])
    elif kind == "longer":
        shard.write_bytes(data + bytes(rng.randint(1, 100)))
    elif kind == "exchanged":
        other = rng.choice(sorted(folder.glob("*.safetensors")))
        data, theirs = shard.read_bytes(), other.read_bytes()
        shard.write_bytes(theirs)
        other.write_bytes(data)
    else:
        shard.unlink()
        if kind == "folder":
            shard.mkdir()
        elif kind == "pipe":
            os.mkfifo(shard)
        elif kind == "link":
            shard.symlink_to(rng.choice(["nowhere", shard.name, "/dev/zero", "/etc/hostname"]))
        elif kind == "pickle":
            shard.write_bytes(pickle.dumps(Bomb(folder)))
    return f"{kind} of {shard.name}"


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.made = folder.parent / "bomb"

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def play_mutations(seeds, tmp_path):
    """Each is a load that the format allows, or an error in one line. -> how many loaded."""
    def too_long(*_):
        raise TimeoutError(f"no answer in {SECONDS} s")
    signal.signal(signal.SIGALRM, too_long)
    sources, loaded = [], 0
    for number, config in enumerate((PANGU, DEEPSEEK)):
        source = tmp_path / f"source{number}"
        write(source, config, shard_bytes=40_000, dtype=torch.bfloat16)
        sources.append(source)
    names = to_hf(Model(DEEPSEEK))
    small = dict(item for name, tensor in names.items() if "experts" in name
                 for item in quantised(name, torch.zeros_like(tensor))[0].items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "in_shards", lambda tensors, dtype: [{n: (t, t.dtype) for n, t in tensors.items()}])
        write(tmp_path / "fp8", DEEPSEEK, names | small)
    sources.append(tmp_path / "fp8")
    for seed in seeds:
        rng, folder = random.Random(seed), tmp_path / "mutated"
        shutil.copytree(rng.choice(sources), folder)
        what = mutate(folder, rng)
        signal.alarm(SECONDS)                             # ends the test where a folder makes it hang
        try:
            read(folder)
            loaded += 1
        except ValueError as error:
            assert isinstance(error, (parallel.CheckpointError, train.UserError)), (seed, what, error)
            assert "\n" not in str(error) and len(str(error)) < 20_000, (seed, what, error)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {what}: {type(error).__name__}: {error}") from error
        finally:
            signal.alarm(0)
        assert not (tmp_path / "bomb").exists(), (seed, what)
        shutil.rmtree(folder)
    return loaded


def test_hostile_folders(tmp_path):
    assert 0 < play_mutations(range(150), tmp_path) < 75


@pytest.mark.slow
def test_a_thousand_hostile_folders(tmp_path):
    assert 0 < play_mutations(range(150, 1150), tmp_path) < 500
