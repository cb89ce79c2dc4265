"""
The study of the experts: metrics on routings made by hand, whose values are known; pages of runs that lack something.
"""
import importlib.util
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import ablate  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402
import train  # noqa: E402
from model import Config, Model, count_params  # noqa: E402

TINY = ("--set hidden_size=16 num_hidden_layers=3 intermediate_size=32 vocab_size=300 n_routed_experts=8 "
        "moe_intermediate_size=8 q_lora_rank=8 kv_lora_rank=8 num_attention_heads=2 qk_nope_head_dim=8 "
        "qk_rope_head_dim=4 v_head_dim=8 --seq-len 32 --global-batch 2 --micro-batch 2 --threads 1").split()


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Runs neither compile, nor write a sample at their end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "conclude", lambda run, checkpoint: None)
        patch.setattr(train, "compile_operators", lambda wanted, device=None: "this is a test")
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def even_routing(tokens=64, experts=8, k=2):
    """Token n has experts n, n+1, ..., n+k-1, round and round: (N,K)."""
    return (np.arange(tokens)[:, None] + np.arange(k)) % experts


def coupled_routing(tokens=64, experts=8):
    """Experts 0 and 1 always together, 2 and 3, ...: (N,2)."""
    first = 2 * (np.arange(tokens) % (experts // 2))
    return np.stack([first, first + 1], 1)


def copies(ids, experts=8):
    return np.bincount(ids.ravel(), minlength=experts)


def test_load_of_an_even_and_of_a_collapsed_router():
    """Even: every expert has K/E of the tokens, MaxVio 0. All tokens to experts 0 and 1 of 8: MaxVio 8/2 - 1."""
    even, collapsed = even_routing(), np.tile([0, 1], (64, 1))
    assert np.allclose(study.expert_shares(even, 8), 2 / 8)
    assert study.max_vio(copies(even)) == 0
    assert study.max_vio(np.stack([copies(even), copies(collapsed)])).tolist() == [0, 3]
    assert study.best_experts(collapsed, 8).tolist() == [True, True] + [False] * 6
    assert study.best_experts(np.arange(64)[:, None] % 8, 8, 0.5).sum() == 4


def test_specialisation_is_1_without_a_shared_expert_and_0_without_a_difference():
    alike = np.stack([copies(even_routing()), 3 * copies(even_routing())])
    apart = np.array([[5, 5, 0, 0, 0, 0], [0, 0, 1, 9, 0, 0], [0, 0, 0, 0, 4, 1]])
    half = np.array([[1, 1, 0], [0, 1, 1]])                               # one of two experts is shared
    assert study.specialisation(alike) == 0
    assert study.specialisation(apart) == pytest.approx(1)
    assert study.specialisation(half) == pytest.approx(0.5)


def test_spread_and_chance_of_specialisation():
    """Sequences that are all the same within a domain have no spread; random routing has the index of chance."""
    one, other = np.tile([4, 4, 0, 0], (10, 1)), np.tile([0, 0, 4, 4], (10, 1))
    index, spread, chance = study.specialisation_spread([one, other])
    assert (index, spread) == (1, 0) and 0 < chance < 0.6
    noise = np.random.default_rng(0).multinomial(64, [1 / 8] * 8, size=(2, 20))
    index, spread, chance = study.specialisation_spread(list(noise))
    assert abs(index - chance) < 3 * spread and spread > 0


def test_coactivation_of_coupled_and_even_routers():
    """Coupled: 1 for the partner, else 0. Neighbours round a ring: 1/2 for each of the two, whatever their rank."""
    coupled = study.coactivation(coupled_routing(), 8)
    ring = study.coactivation(even_routing(), 8)
    for i in range(8):
        assert np.isnan(coupled[i, i]) and np.nansum(coupled[i]) == 1 and coupled[i, i ^ 1] == 1
        assert ring[i, (i + 1) % 8] == ring[i, (i - 1) % 8] == 0.5
    # all pairs of three count, not neighbours in rank alone
    assert study.coactivation(np.array([[2, 0, 1]]), 3)[2].tolist()[:2] == [1, 1]


def test_saturation():
    """Order within K does not matter: the same set 1, half of it 0.5, none 0."""
    final = np.array([[0, 1], [2, 3]])
    assert study.saturation(final[:, ::-1], final) == 1
    assert study.saturation(np.array([[0, 5], [6, 3]]), final) == 0.5
    assert study.saturation(final[::-1], final) == 0


def test_vocabulary_specialisation():
    """A router by token alone: 1. One by position alone: each token id meets all 8 experts alike, so K/E."""
    tokens = np.arange(64) % 4
    assert study.favourite_share(np.stack([tokens, tokens + 4], 1), tokens, 8) == 1
    assert study.favourite_share(even_routing(64), np.zeros(64, int), 8) == 2 / 8
    assert np.isnan(study.favourite_share(even_routing(4), np.arange(4), 8))     # no id occurs 8 times


def test_entropy_of_scores():
    assert study.entropy(np.full((3, 8), 0.7)) == pytest.approx(1)
    assert study.entropy(np.eye(8)) == 0
    assert study.entropy(np.array([[1.0, 1, 0, 0]])) == pytest.approx(0.5)      # log 2 of log 4


def test_spikes():
    """Three times the median before; a level that stays high is a spike until the window's median has risen."""
    assert study.spikes([1] * 10 + [4] + [1] * 10) == [10]
    assert study.spikes([1] * 10 + [2.9] + [100]) == [11]
    assert study.spikes([1, 1, 9]) == []                                 # too little before it
    assert study.spikes([1] * 4 + [9] * 60, window=8) == [5, 6, 7]


# ---------------------------------------------------------------------------------------------------------------------
# Models


@pytest.fixture(scope="module")
def model():
    model = Model(Config(hidden_size=16, num_hidden_layers=3, intermediate_size=32, vocab_size=300, q_lora_rank=8,
                         kv_lora_rank=8, num_attention_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
                         moe_intermediate_size=8))
    model.init_weights(1)
    return model


def test_a_part_of_the_experts(model):
    """With half of them kept no other is chosen; with all of them, and afterwards, nothing differs."""
    windows = np.random.default_rng(0).integers(300, size=(3, 20))
    loss, ids = study.route(model, windows, at_once=2)
    assert ids.shape == (3, 3, 20, 2) and ids.max() == 7                  # two layers and MTP
    keep = np.arange(8) % 2 == 0
    with study.only(model, [keep] * 3):
        other, even = study.route(model, windows)
    assert set(even.ravel()) == {0, 2, 4, 6} and other != loss
    with study.only(model, [keep | True] * 3):
        assert study.route(model, windows)[0] == pytest.approx(loss, abs=1e-6)
    assert (study.route(model, windows)[1] == ids).all()


def test_scores_are_noted(model):
    """Of 8 experts that score alike, each has an eighth, and the entropy is the most."""
    found = study.Study(1, 8, {})
    weights = [router.weight.detach().clone() for router in model.routers()]
    for router in model.routers():
        router.weight.data.zero_()
    with study.noting_scores(model, found):
        study.route(model, np.ones((2, 8), int))
    for router, weight in zip(model.routers(), weights):
        router.weight.data.copy_(weight)
    assert np.allclose(found.scores, 1 / 8) and np.allclose(found.entropy, 1) and np.shape(found.scores) == (3, 8)
    assert not any(router._forward_hooks for router in model.routers())


# ---------------------------------------------------------------------------------------------------------------------
# Pages


@pytest.fixture(scope="module")
def runs(quick, tmp_path_factory):
    """Runs of made-up text: 5 steps with everything, and one step without experts."""
    folder = tmp_path_factory.mktemp("runs")
    for name, lines in dict(a=300, b=20).items():                         # the second file is held out
        (folder / f"{name}.txt").write_text(f"the model {name} reads a word and guesses which one follows\n" * lines)
    text = ["--data", str(folder / "a.txt"), str(folder / "b.txt")]
    train.main([*text, "--steps", "5", "--save-every", "1", "--keep", "1", "--keep-growing", "1",
                "--record-loads", "1", "--out", str(folder / "full"), *TINY])
    train.main([*text, "--steps", "1", "--out", str(folder / "dense"), *TINY, "--set", "first_k_dense_replace=3",
                "num_nextn_predict_layers=0"])
    return folder


def make(runs, *argv):
    report.main([str(word) for word in (*argv, "--out", runs / "out", "--tokens", 256)])
    numbers = json.loads((runs / "out/numbers.json").read_text())
    return numbers, (runs / "out/page.html").read_text()


def test_checkpoints_at_growing_distances(runs):
    """With every step saved and the newest kept: that, and the first of 1, 2-3, 4-7."""
    assert train.parallel.steps_in(runs / "full/ckpt") == [1, 2, 4, 5]
    assert train.first_of_doublings([6, 12, 18, 24, 30, 36]) == [6, 12, 18, 36]


def test_a_whole_page(runs):
    """All but the picture of a later stage, of two runs of which one lacks experts; each has caption and unit."""
    pytest.importorskip("matplotlib")
    numbers, page = make(runs, runs / "full", runs / "dense", "--domain", f"own={runs / 'a.txt'}")
    assert {picture.name for picture in report.PICTURES} - set(numbers["pictures"]) == {"rl"}
    assert page.count("data:image/png;base64,") == len(numbers["pictures"]) == page.count("Theirs: ")
    assert (runs / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(numbers["pictures"]["domains"]) == ["full"] and set(numbers["pictures"]["loss"]) == {"full", "dense"}
    assert [panel["title"] for panel in numbers["pictures"]["domains"]["full"]] == ["code", "prose", "tables", "own"]
    assert "dense: no pictures of experts: the model has none" in numbers["notes"]
    assert numbers["pictures"]["saturation"]["full"]["x"] == [20, 40, 80, 100]           # % at which checkpoints are
    assert len(numbers["pictures"]["balance"]["full"]["text_vio"]["value"]) == 5
    words = re.sub("base64,[^']*", "", page)                              # letters of a picture may say anything
    assert "http" not in words and len(words) > 1000                      # self-contained


def test_half_written_run(runs, tmp_path, monkeypatch):
    """A run that is being written: a cut line, loads.npy shorter than its header says, no checkpoint, no matplotlib."""
    run = tmp_path / "half"
    run.mkdir()
    for name in ("config.json", "metrics.jsonl", "loads.npy"):
        data = (runs / "full" / name).read_bytes()
        (run / name).write_bytes(data if name == "config.json" else data[:-20])
    monkeypatch.setitem(sys.modules, "matplotlib", None)                  # importing it fails
    numbers, page = make(runs, run)
    notes = "\n".join(numbers["notes"])
    assert "1 of 5 lines are not whole" in notes and "loads.npy is not whole" in notes
    assert "no complete checkpoint" in notes and "pip install matplotlib" in notes
    assert "base64" not in page and len(numbers["pictures"]["loss"]["half"]["loss"]["value"]) == 4


def test_damaged_and_deleted_checkpoints(runs, tmp_path):
    """An earlier one that is damaged is named and left out; one that the run has deleted goes without saying."""
    run = study.read_run(shutil.copytree(runs / "full", tmp_path / "run"))
    for file in (run.folder / "ckpt/step_2").iterdir():
        os.truncate(file, file.stat().st_size // 2)
    text = dict(long="a word and a guess " * 40, short="a word")
    found = study.study_checkpoints(run, text, 64, "cpu")
    assert [step for step, _ in found.past] == [1, 4] and list(found.loss) == ["long"]
    assert len(run.notes) == 2 and "domain short is left out" in run.notes[0] and "step_2" in run.notes[1]
    assert study.open_earlier(run, str(run.folder / "ckpt/step_3"), "cpu") is None and len(run.notes) == 2


def test_curves_of_a_later_stage(runs, tmp_path):
    """Keys of rl are drawn where they are there, its loss is not; experts that moved are marked."""
    lines = [dict(stage="rl", step=i, tokens=10 * i, loss=1.0, grad_norm=1.0, max_vio=0.5, reward=i / 9, solved=0.0,
                  balance_moved=int(i == 3)) for i in range(5)]
    stored = json.loads((runs / "full/config.json").read_text())
    stored |= dict(stage="rl", source="/runs/sft/ckpt/step_9")
    run = study.Run("r", tmp_path, stored, Config(), lines, None, [])
    found, facts = report.gather([run]), report.facts_of(run)
    reward = dict(step=list(range(5)), tokens=[0, 10, 20, 30, 40], value=[round(i / 9, 6) for i in range(5)])
    assert found["rl"]["r"] == {"reward": reward} and "loss" not in found
    assert found["balance"]["r"]["max_vio"]["moves"] == [30]
    assert (facts["stage"], facts["begun from"], facts["last reward"]) == ("rl", "sft/ckpt/step_9", "0.4444")
    assert "share of answers solved" in facts["no curve, as never measured or always 0"]
    if importlib.util.find_spec("matplotlib"):
        assert set(report.draw_all(dict(rl=found["rl"]))) == {"rl"}


def test_panels_fill_their_rows():
    """7 panels in 3 columns: rows of 3, 2 and 2, each as wide as the figure."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    widths = [round(60 * axis.get_subplotspec().get_position(figure).width) for axis in report.new_axes(figure, 7, 3)]
    assert len(widths) == 7 and len(set(widths[:3])) == len(set(widths[3:])) == 1 and widths[3] > 1.3 * widths[0]


@pytest.mark.parametrize("argv, words", [(["nowhere"], "it is no run's folder"),
                                         (["full", "--domain", "x"], "write NAME=PATH"),
                                         (["full", "--domain", "x=nowhere"], "x=nowhere: write NAME=PATH, of a file"),
                                         (["full", "--tokens", "0"], "--tokens 0: use 1 or more")])
def test_refusals(runs, monkeypatch, argv, words):
    monkeypatch.chdir(runs)
    with pytest.raises(ValueError, match=words):
        report.main(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Ablations


def by_seed(*values):
    return {seed: dict(bpb=value) if value else {} for seed, value in enumerate(values)}


def test_verdicts_are_paired_by_seed():
    """Seeds differ by 1, arms by 0.1 within each: what the pairs show, the means with their spread would not."""
    claim = ablate.Claim("less", "bpb", "ours", "theirs")
    results = dict(ours=by_seed(1.0, 2.0, 3.0), theirs=by_seed(1.1, 2.11, 3.1))
    assert "**shows at this size**" in ablate.verdict(claim, results) and "pairs: 3" in ablate.verdict(claim, results)
    assert "**shows the opposite**" in ablate.verdict(claim._replace(lower="theirs", higher="ours"), results)
    results["theirs"] = by_seed(1.1, 1.8, 3.1)
    assert "**is within the spread**" in ablate.verdict(claim, results)
    results["theirs"] = by_seed(None, 2.1, None)
    assert "**no verdict**" in ablate.verdict(claim, results) and "2 runs diverged" in ablate.verdict(claim, results)


def test_interval_of_pairs():
    """Differences 1, 2, 3: mean 2, standard deviation 1, so 4.30 / sqrt(3) on each side."""
    mean, half, pairs = ablate.paired(by_seed(1, 1, 1), by_seed(2, 3, 4), "bpb")
    assert (mean, pairs) == (2, 3) and half == pytest.approx(4.30 / 3**0.5)


def test_questions_are_consistent():
    """Claims name arms; every arm can be built; what is said to be equal is equal."""
    counts = {}
    for name, question in ablate.QUESTIONS.items():
        for label, arm in question.arms.items():
            counts[name, label] = count_params(replace(ablate.SHAPES[arm.shape], **arm.changes))
        assert {arm for claim in question.claims for arm in claim[2:]} <= set(question.arms), name
        assert all(claim.metric in ablate.METRICS for claim in question.claims)
    for name in ("experts", "shared"):
        active = [found["active"] for (asked, _), found in counts.items() if asked == name]
        assert max(active) < 1.02 * min(active), (name, active)           # the router's weights differ


def test_budget_chooses_the_steps(runs, tmp_path):
    """Twice the runs get half of the time each; what was chosen stays; too little is refused with what would do."""
    shapes = dict(narrow=replace(ablate.SHAPES["narrow"], **ablate.TINY))
    lab = ablate.Lab(tmp_path, shapes, [str(runs / "a.txt"), str(runs / "b.txt")])
    with pytest.raises(ValueError, match="--budget 0.1: 9 runs of 20 steps take [0-9]+ minutes"):
        lab.fix_steps([ablate.Arm()] * 9, 0.1)
    steps = []
    for n in (4, 8):
        lab.plan.pop("steps", None)
        lab.fix_steps([ablate.Arm()] * n, 1000)
        steps.append(lab.plan["steps"])
    assert steps[0] / steps[1] == pytest.approx(2, rel=0.01)
    lab.fix_steps([ablate.Arm()], 0.1)
    assert json.loads((tmp_path / "plan.json").read_text())["steps"] == steps[1]


def test_ablation_goes_on_where_it_stopped(runs, tmp_path, monkeypatch, capsys):
    """Table, picture and numbers; a second call makes no run, a third one those of a new seed. A run that diverged is
    counted, not averaged."""
    monkeypatch.setattr(ablate, "RATES", (1e-3, 3e-3))
    words = ["--tiny", "--only", "bias", "--out", str(tmp_path), "--data", str(runs / "a.txt"), str(runs / "b.txt")]
    ablate.main([*words, "--seeds", "1"])
    assert capsys.readouterr().out.count(" ...\n") == 3                   # two rates, and the other arm
    ablate.main([*words, "--seeds", "1"])
    assert " ...\n" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", lambda argv: sys.exit("train.py: interrupted"))
        with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
            ablate.main([*words, "--seeds", "2"])
        capsys.readouterr()
        biased = next(tmp_path.glob("*router_bias*seed0"))
        (biased / "metrics.jsonl").write_text("")
        patch.setattr(train, "main", lambda argv: sys.exit("train.py: step 1: loss or gradient not finite 5 times"))
        ablate.main([*words, "--seeds", "1"])
        assert (biased / "diverged").exists() and " ...\n" in capsys.readouterr().out
    ablate.main([*words, "--seeds", "2"])
    out = capsys.readouterr().out
    assert out.count(" ...\n") == 2 and "| router bias | " in out and "| 1 of 2 |" in out and "**no verdict**" in out
    results = json.loads((tmp_path / "numbers.json").read_text())["results"]["bias"]
    assert set(results["loss"]["1"]) == set(ablate.METRICS) and results["router bias"]["0"] == {}
    assert (tmp_path / "table.png").exists() == bool(importlib.util.find_spec("matplotlib"))
    with pytest.raises(ValueError, match="another text"):
        ablate.main([*words[:-1], "--seeds", "3"])
