"""
The stages after pre-training: template and packing of conversations, GRPO's loss, runs of sft and rl, bad data.
"""
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import dist  # noqa: E402
import needle  # noqa: E402
import parallel  # noqa: E402
import tasks  # noqa: E402
import train  # noqa: E402
from model import Config, Model, generate, token_cross_entropy  # noqa: E402
from sim import Plan  # noqa: E402
from test_train import SHAPE, run  # noqa: E402

SMALL = (f"--set {SHAPE} vocab_size=320 --seq-len 64 --global-batch 4 --micro-batch 2 --threads 1 --compile none "
         "--precision fp32").split()


def refusal(capsys, *argv):
    """What a refused command says: one line, exit status 2."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1
    return error[0]


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def same(out, other, keys=("loss", "mtp_loss", "grad_norm")):
    return [[line[key] for key in keys] for line in metrics(out)] == [[line[key] for key in keys]
                                                                      for line in metrics(other)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a pre-trained run, conversations and tasks."""
    folder, rng = tmp_path_factory.mktemp("stages"), random.Random(0)
    words = "Add 1+2 Sort: a b c Reverse Count 34 567 Largest last digit first\n".split(" ")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text(" ".join(rng.choices(words, k=3000)))
    tasks.make(folder / "tasks", (60, 40, 4), seed=0)
    run("--data", folder / "text", "--out", folder / "base", "--steps", 2, "--heldout", 0, *SMALL)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


@pytest.fixture(scope="module")
def encoding():
    return train.make_encoding(train.learn_bpe(["ab ab 12 34"], 280))


def spoken(encoding, messages):
    """The template as text, with what is trained on in brackets."""
    ids, counted = train.conversation(encoding, messages)
    text, before = "", False
    for token, now in zip(ids, counted):
        text += "[" * (now and not before) + "]" * (before and not now) + encoding.decode([token])
        before = now
    return text + "]" * before


def test_template(encoding):
    user, slow = dict(role="user", content="2+2"), dict(role="assistant", thinking="1+3", content="4")
    begin = "<|endoftext|><|system|><|end_of_turn|><|user|>2+2"
    assert spoken(encoding, [user, slow]) == (
        f"{begin}<|end_of_turn|><|assistant|>[<|think|>1+3<|/think|>4<|end_of_turn|>]")
    fast = f"{begin} /no_think<|end_of_turn|><|assistant|>[<|think|><|/think|>4<|end_of_turn|>]"
    assert spoken(encoding, [user, slow | dict(thinking="")]) == fast
    assert spoken(encoding, [user | dict(content="2+2 /no_think"), slow]) == fast
    system = dict(role="system", content="ab")
    assert spoken(encoding, [system, user, slow, user, slow]).startswith(
        "<|endoftext|><|system|>ab<|end_of_turn|><|user|>2+2<|end_of_turn|><|assistant|>[")


def test_what_the_assistant_said(encoding):
    prompt = train.question(encoding, "2+2")
    ids, _ = train.conversation(encoding, [dict(role="user", content="2+2"), dict(
        role="assistant", thinking="1+3", content="4")])
    assert ids[:len(prompt)] == prompt
    answer = ids[len(prompt):]
    assert train.answer_of(encoding, answer) == "4"
    no_token = [*answer[:-1], encoding.n_vocab, answer[-1]]               # the model may have more rows
    for broken in (answer[1:], answer[:-1], [answer[0], *answer], [], [i for i in answer if i != answer[-3]], no_token):
        assert train.answer_of(encoding, broken) is None


def test_best_fit():
    lengths = [random.Random(i).randint(1, 50) for i in range(200)]
    bins = train.best_fit(lengths, 50)
    assert sorted(sum(bins, [])) == list(range(200))
    assert max(sum(lengths[i] for i in members) for members in bins) <= 50
    assert len(bins) <= 1.1 * sum(lengths) / 50
    assert train.best_fit([5, 3, 7, 2, 3], 10) == [[2, 1], [0, 4, 3]]


def test_packed_is_each_alone():
    """Losses and gradients of conversations that share a sequence, at all depths of prediction."""
    torch.manual_seed(0)
    config = Config(vocab_size=64, hidden_size=16, num_hidden_layers=2, intermediate_size=32, n_routed_experts=4,
                    moe_intermediate_size=8, q_lora_rank=8, kv_lora_rank=8, num_attention_heads=2, qk_nope_head_dim=8,
                    qk_rope_head_dim=4, v_head_dim=8, num_nextn_predict_layers=2, balance="none", init="small")
    model = Model(config).double()
    model.init_weights()
    rng = np.random.default_rng(0)
    conversations = []
    for length in (9, 5, 12, 6, 3):                                       # END, which begins each, is never a target
        counted = [False, *(rng.random(length - 1) < 0.6).tolist()]
        conversations.append((rng.integers(0, 64, length).tolist(), counted))

    def losses(some):
        packed = train.Packed(some, 20, 3, end=0)
        batch = packed.examples(list(range(len(packed))), 3, torch.device("cpu"))
        out = model(**batch, loss_tokens=torch.ones(3))
        out.total_loss.backward()
        return len(packed), out.loss.item(), out.mtp_loss.item()

    def gradients():
        found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        model.zero_grad()
        return found

    n_together, *together = losses(conversations)
    assert n_together == 2
    wanted = gradients()
    alone = np.sum([losses([each])[1:] for each in conversations], 0)
    assert together == pytest.approx(alone, abs=1e-9)
    torch.testing.assert_close(gradients(), wanted, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# GRPO


def test_loss_of_each_token():
    torch.manual_seed(0)
    h, weight = torch.randn(9, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets = torch.tensor([3, 0, -100, 19, 7, 7, -100, 1, 2])
    share = torch.randn(9)
    found = token_cross_entropy(h, weight, targets)
    grads = torch.autograd.grad((found * share).sum(), (h, weight))
    expected = F.cross_entropy(h @ weight.t(), targets, ignore_index=-100, reduction="none")
    wanted = torch.autograd.grad((expected * share).sum(), (h, weight))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grads, wanted)


SETTINGS = train.defaults_of(train.RL_OPTIONS)


def plain_loss(log_probs, policy, settings):
    """GRPO, token by token."""
    total = 0.0
    for row, columns in zip(log_probs, policy):
        counted = [i for i in range(len(row)) if columns[i, train.COUNTED] == 1]
        mean = sum(row[i] - columns[i, train.OLD] for i in counted) / len(counted)
        for i in counted:
            _, advantage, sampler, old, reference = columns[i].tolist()
            ratio = torch.exp(mean if settings["ratio"] == "sequence" else row[i] - old)
            bounded = min(max(ratio, 1 - settings["clip_low"]), 1 + settings["clip_high"])
            weight = min(math.exp(old - sampler), settings["importance_cap"])
            total = total - weight * min(ratio * advantage, bounded * advantage)
            if settings["kl"]:
                difference = reference - row[i]
                total = total + settings["kl"] * (torch.exp(difference) - difference - 1)
    return total


@pytest.mark.parametrize("changes", [{}, dict(ratio="sequence"), dict(kl=0.1), dict(importance_cap=1.05),
                                     dict(clip_low=0.01, clip_high=0.02), dict(ratio="sequence", clip_low=0.0003,
                                                                               clip_high=0.0004, kl=0.01)])
def test_loss_and_gradient_of_grpo(changes):
    torch.manual_seed(0)
    settings = SETTINGS | changes
    log_probs = -torch.rand(4, 7, dtype=torch.float64, requires_grad=True) * 1.0
    log_probs = log_probs.detach().requires_grad_()
    policy = torch.randn(4, 7, 5, dtype=torch.float64) * 0.2
    policy[..., train.COUNTED] = (torch.rand(4, 7) < 0.7).double()
    policy[:, 0, train.COUNTED] = 1
    policy[..., train.OLD:] += log_probs.detach().unsqueeze(-1)
    policy[..., train.SAMPLER] += log_probs.detach()
    losses, clipped = train.policy_losses(log_probs, policy, settings)
    grad, = torch.autograd.grad(losses.sum(), log_probs)
    expected = plain_loss(log_probs, policy, settings)
    wanted, = torch.autograd.grad(expected, log_probs)
    torch.testing.assert_close(losses.sum(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)
    assert (clipped > 0) == ("clip_low" in changes)


def test_a_group_of_one_reward_has_no_gradient():
    rewards = np.array([[0.1] * 3, [0.0, 1.0, 0.5]])
    for by_std in (0, 1):
        advantages = train.advantages_of(rewards.copy(), by_std)
        assert (advantages[0] == 0).all() and advantages[1].sum() == pytest.approx(0, abs=1e-12)
    log_probs = torch.full((1, 3), -1.0, requires_grad=True)
    policy = torch.tensor([[[1.0, 0.0, -1.0, -1.0, 0.0]] * 3])
    losses, _ = train.policy_losses(log_probs, policy, SETTINGS)
    losses.sum().backward()
    assert log_probs.grad.eq(0).all()


def test_a_bandit_finds_the_best_arm():
    torch.manual_seed(0)
    logits = torch.zeros(4, requires_grad=True)
    pays = np.array([0.1, 0.9, 0.5, 0.3])
    optimizer = torch.optim.SGD([logits], lr=0.2)
    for _ in range(150):
        old = logits.detach().log_softmax(0)
        arms = torch.multinomial(old.exp(), 16, replacement=True)
        advantages = torch.from_numpy(train.advantages_of(pays[arms.numpy()][None], 0)).float().view(16, 1)
        columns = [torch.ones(16, 1), advantages, old[arms][:, None], old[arms][:, None], torch.zeros(16, 1)]
        losses, _ = train.policy_losses(logits.log_softmax(0)[arms][:, None], torch.stack(columns, -1), SETTINGS)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert logits.softmax(0)[1] > 0.9


@pytest.mark.parametrize("replay", train.RL_OPTIONS["replay"].allowed["choices"])
def test_ratios_begin_at_one(replay):
    """Whatever experts the sampler chose, the first update's log-probabilities are those of the old policy."""
    config = replace(RANKS_CONFIG, max_position_embeddings=16)
    model = Model(config)
    model.init_weights()
    plan = Plan(seq_len=16, global_batch=4, micro_batch=2, precision="fp32")
    run = SimpleNamespace(settings=SETTINGS | dict(replay=replay), plan=plan, config=config, device=torch.device("cpu"),
                          encoding=SimpleNamespace(eot_token=0))
    stage = train.RL(run)
    stage.pipeline, stage.reference, stage.log = parallel.Pipeline(model, plan), None, {}
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [1]]
    answers = generate(model, [torch.tensor(prompt) for prompt in prompts], 6, note_routing=True).answers
    for answer in answers:
        answer.routing = {layer: (ids + 1) % 4 for layer, ids in answer.routing.items()}
    batch = stage.scored(stage.examples(prompts, answers, [1.0] * 4))
    assert stage.log["router_diff"] == 1 and stage.log["length"] == 6
    found = []
    model.token_loss = lambda nats, policy: found.append((-nats - policy[..., train.OLD]).abs().max().item()) or nats
    stage.pipeline.step(train.micro_batches(batch, 2), torch.ones(1))
    assert found == pytest.approx([0, 0], abs=1e-6)
    # log-probabilities that are not finite: all are dropped, and counted
    for answer in answers:
        answer.log_probs = [math.nan] * 6
    stage.scored(stage.examples(prompts, answers, [1.0] * 4))
    assert stage.log["not_finite"] == 24 and stage.log["length"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks

SFT = ("--global-batch", 4, "--micro-batch", 2, "--seq-len", 96, "--threads", 1, "--compile", "none", "--precision",
       "fp32")
RL = ("--global-batch", 8, "--answers", 4, "--micro-batch", 4, "--new-tokens", 8, "--seq-len", 96, "--threads", 1,
      "--compile", "none", "--precision", "fp32")

RANKS_CONFIG = Config(vocab_size=64, hidden_size=16, num_hidden_layers=2, intermediate_size=32, n_routed_experts=4,
                      moe_intermediate_size=8, q_lora_rank=8, kv_lora_rank=8, num_attention_heads=2, qk_nope_head_dim=8,
                      qk_rope_head_dim=4, v_head_dim=8, balance="none", init="small")


def measures_of_rl(plan, cut=True):
    """Two updates from the same answers with forced experts: losses and gradient norms. MTP layers rest. cut:
    micro-batches end with their longest answer."""
    rng = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(64, (8, 12), generator=rng), torch.full((8, 1, 12), -100)
    targets[:, 0, 4:] = torch.randint(64, (8, 8), generator=rng)
    lengths = torch.tensor([5, 6, 7, 7, 8, 10, 11, 12])
    targets[:, 0][torch.arange(12) >= lengths[:, None]] = -100
    policy = torch.rand(8, 12, 5, generator=rng) - 4.5
    policy[..., train.COUNTED] = (targets[:, 0] != -100).float()
    policy[..., train.ADVANTAGE] = torch.randn(8, 1, generator=rng)
    batch = dict(ids=ids, targets=targets, policy=policy,
                 routing={1: torch.rand(8, 12, 4, generator=rng).argsort(-1)[..., :2]})
    batch |= dict(lengths=lengths) if cut else {}
    with torch.device("meta"):
        model = Model(RANKS_CONFIG)
    grid = parallel.parallelize(model, plan, "cpu", timedelta(seconds=60))
    model.to_empty(device="cpu")
    parallel.init_weights(model, 0)
    model.token_loss = lambda nats, policy: train.policy_losses(-nats, policy, SETTINGS | dict(kl=0.1))[0]
    optimizer = torch.optim.AdamW(parallel.param_groups(model), lr=1e-3, fused=True)
    share = 8 // plan.dp
    own = train.part_of(batch, slice(parallel.data_rank(plan) * share, (parallel.data_rank(plan) + 1) * share))
    pipeline = parallel.Pipeline(model, plan, grid)
    return [train.train_step(pipeline, optimizer, own, 0.0)[0][:4].tolist() for _ in range(2)]


@pytest.mark.parametrize("changes", [dict(dp=2), dict(dp=2, ep=2, zero=1)])
def test_an_update_of_rl_is_that_of_one_process(changes):
    plan = Plan(seq_len=12, global_batch=8, micro_batch=2, precision="fp32")
    alone = measures_of_rl(plan, cut=False)
    assert alone == [pytest.approx(measures, rel=1e-5) for measures in measures_of_rl(plan)]
    for measures in dist.run(2, measures_of_rl, replace(plan, **changes)):
        np.testing.assert_allclose(measures, alone, rtol=1e-5)


def test_updates_of_rl_are_of_the_same_answers_under_any_plan(monkeypatch):
    def updates(dp):
        """The prompts of each update, of all ranks together."""
        settings = SETTINGS | dict(answers=2, updates=2, seed=0)
        plan = Plan(seq_len=8, global_batch=16, micro_batch=2, dp=dp)
        stage = train.RL(SimpleNamespace(settings=settings, plan=plan, config=RANKS_CONFIG, device="cpu"))
        stage.tasks = stage.prompts = [[number] for number in range(8)]
        stage.sample = lambda prompts, step: [SimpleNamespace(ids=[0]) for _ in prompts]
        stage.rewards_of = lambda tasks, answers: np.zeros((2, len(tasks)))
        stage.examples = lambda prompts, answers, advantages: dict(
            ids=torch.tensor(prompts), policy=torch.zeros(len(prompts), 1, 5), lengths=torch.ones(len(prompts)))
        stage.scored = lambda batch: batch
        found = [[], []]
        for rank in range(dp):
            monkeypatch.setattr(parallel, "data_rank", lambda plan: rank)
            for update, batch in zip(found, stage.batches(dict(step=0, pass_rates=[]), 16)):
                update += batch["ids"].flatten().tolist()
        return [sorted(update) for update in found]

    assert updates(1) == updates(2) == updates(4)


@pytest.mark.slow
def test_stages_under_torchrun(base, tmp_path):
    """sft follows one process; rl samples with an exchange at each token, though answers end at different lengths."""
    def torchrun(*argv):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "train.py", *argv]
        subprocess.run([str(word) for word in command], check=True, cwd=tmp_path, timeout=300,
                       env=os.environ | dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"))

    data = ("--init", base / "base", "--data", base / "tasks" / "sft.jsonl", "--steps", 4)
    run("sft", *data, "--out", tmp_path / "one", *SFT)
    torchrun("sft", *data, "--out", "two", *SFT, "--ep", 2)
    keys = ("loss", "grad_norm", "val_loss")
    for ours, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two")):
        assert [ours.get(key, 0) for key in keys] == pytest.approx([theirs.get(key, 0) for key in keys], rel=1e-5)
    torchrun("rl", "--init", "two", "--tasks", base / "tasks" / "rl.jsonl", "--out", "rl", "--steps", 2, *RL, "--ep", 2,
             "--replay", "sampler")
    assert all(math.isfinite(line["loss"]) and line["length"] > 1 for line in metrics(tmp_path / "rl"))


# ---------------------------------------------------------------------------------------------------------------------
# Runs

def test_sft_and_rl_resume_exactly(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ("--init", base / "base", "--data", base / "tasks" / "sft.jsonl")
    run("sft", *data, "--out", "whole", "--steps", 3, "--eval-every", 2, *SFT)
    run("sft", *data, "--out", "parts", "--steps", 3, "--eval-every", 2, "--save-every", 2, *SFT)
    run("sft", "--resume", "parts/ckpt/step_2")
    assert same("whole", "parts") and metrics("whole")[-1]["stage"] == "sft" and metrics("whole")[-1]["val_loss"] > 0
    # the mean of two checkpoints
    two = [train.open_model(f"parts/ckpt/step_{step}", torch.device("cpu"))[0].state_dict() for step in (2, 3)]
    mean = train.open_model("parts", torch.device("cpu"), average=2)[0].state_dict()
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (two[0][name] + two[1][name]) / 2)
    data = ("--init", "whole", "--tasks", base / "tasks" / "rl.jsonl", "--updates", 2, "--kl", 0.1)
    run("rl", *data, "--out", "rl", "--steps", 3, *RL)
    Path("mine.py").write_text("def more(text, task):\n    return 1\n")
    run("rl", *data, "--out", "rl-parts", "--steps", 3, "--save-every", 2, *RL, "--checkers", "mine.py")
    run("rl", "--resume", "rl-parts/ckpt/step_2")
    Path("mine.py").write_text("def more(text, task):\n    return 0\n")
    capsys.readouterr()
    run("rl", "--resume", "rl-parts")
    assert "the checkers are not those that the run began with" in capsys.readouterr().out
    keys = ("loss", "grad_norm", "reward", "entropy", "length", "kl")
    assert same("rl", "rl-parts", keys)
    last = metrics("rl-parts")[-1]
    assert last["kl"] == 0                                                # without rewards nothing leaves the reference
    assert last["stage"] == "rl" and last["router_diff"] < 0.2 and last["far"] == 0 and last["not_finite"] == 0
    run("sample", "--init", "rl", "--prompt", "Sort: b a", "--new-tokens", 4)
    assert tasks.score("rl", base / "tasks" / "test.jsonl", new_tokens=4)


def test_a_checker_that_fails_late_loses_no_step(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ("--init", base / "base", "--tasks", base / "tasks" / "rl.jsonl", *RL, "--steps", 3, "--out", "r")
    real, calls = train.RL.rewards_of, []

    def late(self, tasks, answers):
        calls.append(len(tasks))
        if len(calls) == 3:
            raise train.CheckerError("--tasks, line 7: checker mine raised ValueError")
        return real(self, tasks, answers)
    monkeypatch.setattr(train.RL, "rewards_of", late)
    assert "raised ValueError; mend it, then --resume r" in refusal(capsys, "rl", *data)
    assert train.newest(Path("r")).name == "step_2" and len(metrics("r")) == 2
    run("rl", "--resume", "r")
    assert len(metrics("r")) == 3


def test_rl_of_a_dense_model_without_mtp(base, tmp_path):
    words = [word for word in SMALL if word != "vocab_size=320"]
    words[words.index("--set") + 1:words.index("--set") + 1] = ["num_nextn_predict_layers=0", "first_k_dense_replace=2",
                                                               "vocab_size=320"]
    run("--data", base / "text", "--out", tmp_path / "dense", "--steps", 1, "--heldout", 0, *words)
    run("rl", "--init", tmp_path / "dense", "--tasks", base / "tasks" / "rl.jsonl", "--out", tmp_path / "rl", "--steps",
        1, *RL)
    assert metrics(tmp_path / "rl")[0]["router_diff"] == 0


def test_bad_conversations(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    user, answer = dict(role="user", content="a"), dict(role="assistant", content="b")
    cases = [
        ("{", "line 2: not JSON"), ("3", "line 2: no object"), ("{}", "line 2: no messages"),
        (dict(messages=[user]), "no turn of the assistant"),
        (dict(messages=[user, dict(role="assistant", content=" ")]), "is empty"),
        (dict(messages=[user, dict(role="tool", content="b")]), "role 'tool': use system, user, assistant"),
        (dict(messages=[dict(role="user", content=3), answer]), "content of user is no text"),
        (dict(messages=[dict(role="user"), answer]), "content of user is no text"),
        (dict(messages=[dict(role=["user"], content="a"), answer]), "role ['user']: use system, user, assistant"),
        (dict(prompt="a", response=""), "is empty"),
    ]
    for line, words in cases:
        line = line if isinstance(line, str) else json.dumps(line)
        Path("bad.jsonl").write_text(json.dumps(dict(messages=[user, answer])) + "\n" + line + "\n")
        error = refusal(capsys, "sft", "--init", base / "base", "--data", "bad.jsonl", "--out", "r", *SFT)
        assert "bad.jsonl, line 2: " in error and words in error
    Path("long.jsonl").write_text(json.dumps(dict(prompt="a " * 200, response="b")) + "\n")
    said = refusal(capsys, "sft", "--init", base / "base", "--data", "long.jsonl", "--out", "r", *SFT)
    assert "of 1 conversations 0 fit --seq-len" in said


def test_bad_tasks_and_checkers(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "CHECK_SECONDS", 0.2)
    good = dict(prompt="a", answer="b")
    Path("mine.py").write_text("def raises(text, task):\n    return 1 / 0\n\ndef hangs(text, task):\n    while True:\n"
                               "        pass\n\ndef nan(text, task):\n    return float('nan')\n\n"
                               "def words(text, task):\n    return 'yes'\n\n"
                               "def leaves(text, task):\n    raise SystemExit\n\n"
                               "def much(text, task):\n    return 2\n\n"
                               "def calms(text, task):\n    try:\n        hangs(text, task)\n"
                               "    except Exception:\n        return 0\n")
    def refused(line):
        Path("bad.jsonl").write_text(json.dumps(good) + "\n" + line + "\n")
        return refusal(capsys, "rl", "--init", base / "base", "--tasks", "bad.jsonl", "--checkers", "mine.py", "--out",
                       "r", "--steps", 1, *RL)

    for line, words in [("[", "line 2: not JSON"), ("[]", "line 2: no object"), ("{}", "line 2: no prompt"),
                        (json.dumps(dict(prompt="a")), "line 2: no answer"),
                        (json.dumps(dict(prompt="2+2", answer=4)), "line 2: answer=4 is no text: put it in quotes"),
                        (json.dumps(dict(prompt="a", answer=" ")), "line 2: no answer"),
                        (json.dumps(good | dict(checker="other")), "line 2: checker 'other': use exact, partial"),
                        (json.dumps(good | dict(checker=["a"])), "line 2: checker ['a']: use exact, partial"),
                        (json.dumps(good | dict(prompt="a " * 90)), "line 2: a prompt of")]:
        assert words in refused(line)
    for name in "nan", "words", "raises":                                 # each is tried before anything is trained
        assert f"--tasks, line 2: checker {name} r" in refused(json.dumps(good | dict(checker=name)))
    assert not Path("r").exists()
    checkers, _ = train.read_checkers("mine.py")
    for name, words in dict(raises="raised ZeroDivisionError", hangs="took more than 0.2 s", nan="returned nan, no",
                            words="returned 'yes'", much="returned 2, no reward from 0 to 1",
                            leaves="raised SystemExit", calms="took more than 0.2 s").items():
        with pytest.raises(train.CheckerError, match=words):
            train.reward("b", good | dict(checker=name, line=2), checkers)
    assert train.reward(None, good | dict(checker="raises", line=2), checkers) == 0
    assert train.check_partial("1 2 4", dict(answer="1 2 3")) == pytest.approx(0.4)
    assert train.check_partial("12", dict(answer="12\n")) == train.check_exact("12", dict(answer=" 12")) == 1
    assert "use a multiple of" in refusal(capsys, "rl", "--init", base / "base", "--tasks", base / "tasks" / "rl.jsonl",
                                          "--out", "r", *RL, "--answers", 3)


@pytest.mark.parametrize("script, words, message", [
    (tasks, ("--out", "t", "--numbers", "-5", "4", "1"), "--numbers -5: use 0 or more"),
    (tasks, ("--out", "t", "--mistakes", "50"), "--mistakes 50: use a share from 0 to 1"),
    (tasks, ("--score", "none", "--test", "own.jsonl"), "own.jsonl, line 1: a score is told by task, difficulty"),
    (tasks, ("--score", "none", "--test", "none.jsonl"), "none.jsonl: No such file or directory"),
    (needle, ("--make", "n", "--lines", "3"), "--lines=3: use a whole number of at least 4 and at most 2000"),
    (needle, ("BASE", "--trials", "0"), "--trials=0: use a whole number above 0"),
    (needle, ("BASE", "--lengths", "8"), "--lengths 8: no room")])
def test_what_a_user_mistypes_to_scripts(base, tmp_path, monkeypatch, script, words, message):
    monkeypatch.chdir(tmp_path)
    Path("own.jsonl").write_text(json.dumps(dict(prompt="2+2", answer="4")))
    monkeypatch.setattr(sys, "argv", [script.__file__, *(str(base / "base") if word == "BASE" else word
                                                         for word in words)])
    with pytest.raises((ValueError, OSError)) as refused:
        script.main()
    assert message in str(refused.value)
    assert not Path("t").exists() and not Path("n").exists()


def test_the_base_that_a_sweep_names():
    assert needle.advise({1e4: 0.5, 4e4: 0.95, 1.6e5: 1.0}, 512) == "the smallest that passes (0.9) is rope_theta=40000"
    assert "none passes" in needle.advise({1e4: 0.5, 4e4: 0.4}, 512)
    assert needle.advise({1e4: 0.9, 4e4: 1.0}, 512).endswith("all pass, so the score does not choose at this size: "
                                                             "1e5*(length/8192)^2, and at least 1e4, is 10000")
    assert needle.advise({1e4: 0.5}, 32768).endswith("is 1.6e+06")         # as published


def test_tasks_are_right():
    """Answers by another way, and nothing trained on is tested."""
    seen = {}
    splits = dict(train=tasks.some(0, range(1, 6), 300, False), test=tasks.some(2, range(1, 7), 300, True))
    for split, lines in splits.items():
        seen[split] = {line["prompt"] for line in lines}
        for line in lines:
            words = line["prompt"].partition(": ")[2]
            answer = dict(add=lambda: str(sum(map(int, words.split("+"))))[::-1], reverse=lambda: words[::-1],
                          sort=lambda: " ".join(sorted(words.split())),
                          largest=lambda: str(max(map(int, words.split()))), chain=lambda: str(eval(words)),
                          count=lambda: str(words.split().count(line["prompt"].split()[1][:-1])))[line["task"]]()
            assert line["answer"] == answer
    assert not seen["train"] & seen["test"]
    # a careless teacher's mistakes are answers to the same problem, and nearly always wrong ones
    mistaken = [line for line in lines if line["mistake"] != line["answer"]]
    assert len(mistaken) > 0.9 * len(lines)
    assert tasks.conversation(lines[0], True, True)["messages"][1]["content"] == lines[0]["mistake"]
    assert {line["task"] for line in tasks.some(0, [1], 20, False, ["sort", "add"])} == {"sort", "add"}
