"""
Tests of live load balance: the planner (sim.py) on random and recorded loads, the moves (parallel.py) on forked ranks.

The recorded loads, data/loads.npz, are of train.py's default text: preset cpu-fine (64 experts, 8 a token) with
num_hidden_layers=4 and balance=none, steps 201 to 400 of 2,048 tokens each, lr 2e-3; (steps, layers, experts), the last
layer MTP's.
"""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

import bench_balance
import dist
import parallel
import sim
from model import PRESETS
from sim import Plan
from test_grid import batches_of
from test_parallel import PLAN, TINY, batch, build
from train import record_loads

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "loads.npz"


def recorded():
    return np.load(DATA)["loads"]


def random_load(random, n_experts):
    kind = random.integers(3)
    if kind == 0:
        return random.exponential(size=n_experts)
    return random.lognormal(0, 1, n_experts) if kind == 1 else random.dirichlet(np.full(n_experts, 0.5))


def random_case(random):
    """load (E,), a current placement (devices, slots)."""
    devices, slots = random.integers(2, 7), random.integers(1, 7)
    load = random_load(random, devices * slots)
    return load, sim.place_greedily(random.permutation(load), devices)


def check_placement(placement, n_experts):
    """Each expert in one slot."""
    assert sorted(placement.flatten()) == list(range(n_experts))


# ---------------------------------------------------------------------------------------------------------------------
# Planner


def test_thousand_random_loads():
    random = np.random.default_rng(0)
    moved, moved_unmatched = 0, 0
    for _ in range(1000):
        load, current = random_case(random)
        planned = sim.plan_placement(load, current)
        for placement in (current, planned):
            check_placement(placement, len(load))
        assert sim.device_loads(load, planned).sum() == pytest.approx(load.sum())
        before, after = (sim.device_loads(load, placement).max() for placement in (current, planned))
        assert after <= before + 1e-9, "worse than before"
        greedy = sim.place_greedily(load, len(current))
        assert after <= sim.device_loads(load, greedy).max() + 1e-9, "worse than the greedy"
        moved += sim.moved_experts(current, planned)
        moved_unmatched += sim.moved_experts(current, greedy)
        for old, new in zip(current, planned):
            stays = np.isin(old, new)
            assert (old[stays] == new[stays]).all(), "left its slot without leaving its device"
    assert moved < 0.8 * moved_unmatched


def test_greedy_is_the_published_one():
    """Loads 9 7 6 5 4 3 on two devices: 9 | 7, then 6 and, at 13 against 14, 4 join the 7; 5 and 3 the 9."""
    placement = sim.place_greedily(np.array([3.0, 9, 4, 7, 5, 6]), 2)
    assert placement.tolist() == [[1, 4, 0], [3, 5, 2]]


def test_devices_are_matched_by_what_they_hold():
    """Loads 8 to 1 on two devices: the greedy's groups are 8 5 4 1 and 7 6 3 2. The second device has three of the
    first group and keeps them, so two experts move instead of six, and the rest stay in their slots."""
    load = np.array([8.0, 7, 6, 5, 4, 3, 2, 1])
    groups, current = sim.place_greedily(load, 2), np.array([[1, 2, 5, 7], [0, 3, 6, 4]])
    assert groups.tolist() == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert sim.moved_experts(current, groups) == 6
    assert sim.plan_placement(load, current).tolist() == [[1, 2, 5, 6], [0, 3, 7, 4]]


def test_no_move_below_the_threshold():
    """std / mean of (1.1, 0.9) is 0.14: a better placement is taken at a threshold of 0.08, not at 0.2."""
    load, current = np.array([0.6, 0.5, 0.5, 0.4]), np.array([[0, 1], [2, 3]])
    for threshold, moves in ((0.08, True), (0.2, False)):
        assert (sim.decide(load, current, threshold) is not current) == moves


def test_plans_are_refused():
    config, plan = PRESETS["cpu-fine"], Plan(dp=4, ep=4, global_batch=4, seq_len=64, balance_live=5)
    with pytest.raises(ValueError, match="use ep above 1"):
        sim.check_plan(config, replace(plan, ep=1))


def test_recorded_loads():
    """64 experts on 8 devices, a decision every 50 steps from those before: a third of the imbalance or less."""
    loads = recorded().astype(float)
    found = bench_balance.replay_loads(loads, devices=8, interval=50, threshold=0.08)
    assert found.fixed >= 3 * found.live, found
    for load in loads.reshape(-1, 64)[::40]:
        check_placement(sim.plan_placement(load, sim.first_placement(64, 8)), 64)


def test_predicted_gain(capsys):
    """A recording is played, and what it prints is given to sim.py: less imbalance makes a shorter step."""
    bench_balance.main([str(DATA), "--interval", "50"])
    loads = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("--load")]
    results = []
    for load in loads:
        sim.main(["predict", *load, "--model", "cpu-fine", "--json", "--plan",
                  "dp=8,ep=8,micro_batch=64,global_batch=512,seq_len=256"])
        results.append(json.loads(capsys.readouterr().out))
    fixed, live = (float(load[-1].removeprefix("max_vio=")) for load in loads)
    assert live < fixed / 3
    assert results[0]["step_time_s"] / results[1]["step_time_s"] - 1 > 0.1


@pytest.mark.parametrize("arguments, words", [
    (["nowhere.npy"], "give the loads.npy"), (["--interval", "200"], "200 steps recorded"),
    (["--devices", "5"], "64 experts are recorded")])
def test_recording_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        bench_balance.main(arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Moves, on forked ranks in float64


def train_step(model, grid, optimizer, plan, step=0):
    """Forward and backward of this rank's share of a step's batch, AdamW, the predictor: loss, gradients, loads."""
    tokens, targets = batch(model.config, plan)
    tokens = (tokens + step) % model.config.vocab_size
    targets = torch.where(targets == -100, -100, (targets + step) % model.config.vocab_size)
    model.aux_scale = 1 / plan.dp
    mine = slice(parallel.rank() * plan.micro_batch, (parallel.rank() + 1) * plan.micro_batch)
    loss_tokens = (targets != -100).sum((0, 2)).double()
    out = model(tokens[mine], targets=targets[mine], loss_tokens=loss_tokens)
    out.total_loss.backward()
    gradients = whole(model, {name: p.grad.clone() for name, p in model.named_parameters()}, grid)
    optimizer.step()
    optimizer.zero_grad()
    loads = parallel.all_sum(model.pop_stats()["loads"])
    model.update_router_bias(loads)
    if grid.live:
        grid.live.observe(loads)
    return parallel.all_sum(out.total_loss.detach()), gradients, loads


@torch.no_grad()
def whole(model, tensors, grid):
    """Tensors by name as on one process, experts in order of their numbers."""
    tensors = parallel.whole_tensors(dict(model=tensors), grid)["model"]
    tensors = {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}
    for layer, block in enumerate(b for b in model.layers.values() if b.is_moe):
        if grid.live:
            numbers = grid.live.placements[layer].flatten()
            for weight in ("gate_up_proj", "down_proj"):
                name = f"layers.{block.index}.mlp.experts.{weight}"
                tensors[name] = tensors[name][np.argsort(numbers)]
    return tensors


def start(config, plan):
    model, grid = build(config, plan)
    return model, grid, torch.optim.AdamW(parallel.param_groups(model), lr=0.01)


def check_move(config, plan):
    """Two steps, with a move to random places in between, and two without. (worst relative difference, of what)"""
    results = []
    for live in (0, 1):
        model, grid, optimizer = start(config, replace(plan, balance_live=live))
        train_step(model, grid, optimizer, plan)
        if live:
            random = np.random.default_rng(3)
            places = [sim.place_greedily(random.random(config.n_routed_experts), plan.ep)
                      for _ in grid.live.placements]
            grid.live.move_to(places, optimizer)
            assert all(sim.moved_experts(grid.live.first, place) for place in places)
        loss, gradients, loads = train_step(model, grid, optimizer, plan)
        weights = whole(model, dict(model.named_parameters()), grid)
        results.append((dict(loss=loss, loads=loads), gradients, {f"new {name}": weights[name] for name in weights}))
    return max((relative(got[name], value), name) for want, got in zip(*results) for name, value in want.items())


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


MOVES = dict(dp=4, global_batch=8, micro_batch=2, node_size=2)
BIASED = replace(TINY, router_bias=True, bias_update_speed=0.05, n_group=2, topk_group=1, num_experts_per_tok=2)


def moves():
    """(plan's changes, zero): each with zero=1, each zero with one; all pairs in the slow tests."""
    for changes in (dict(ep=4), dict(ep=2), dict(ep=4, dispatch="hierarchical"), dict(ep=4, dispatch="dedup")):
        for zero in (0, 1, 3):
            fast = zero == 1 or changes == dict(ep=2)
            yield pytest.param(changes, zero, marks=[] if fast else [pytest.mark.slow], id=f"{changes}-{zero}")


@pytest.mark.parametrize("changes, zero", list(moves()))
def test_move_changes_nothing(changes, zero):
    """Loss, gradients and the next AdamW step, of experts with a history in the optimizer."""
    plan = replace(PLAN, **MOVES, **changes, zero=zero)
    error, name = max(dist.run(4, check_move, TINY, plan))
    assert error <= 1e-12, name


def test_move_with_router_bias_and_groups():
    """The rule of groups and the bias go by an expert's own number, wherever it is."""
    error, name = max(dist.run(4, check_move, BIASED, replace(PLAN, **MOVES, ep=4)))
    assert error <= 1e-12, name


# ---------------------------------------------------------------------------------------------------------------------
# Training with moves, killed and resumed


STEPS, SAVE_EVERY = 10, 4


def train(folder, plan, killed_at=0):
    """Steps up to STEPS, from the newest checkpoint in folder; {step: loss}, experts moved, expected loads at the end.

    killed_at: the step after whose decision the process dies, before an expert has moved.
    """
    model, grid, optimizer = start(TINY, plan)
    progress = dict(step=0, placement=[], expert_load=[])
    saver = parallel.Saver(folder, 3)
    if parallel.steps_in(folder):
        parallel.restore(folder / f"step_{parallel.steps_in(folder)[-1]}", model, optimizer, progress, grid)
    losses, moved = {}, 0
    for step in range(progress["step"] + 1, STEPS + 1):
        losses[step] = train_step(model, grid, optimizer, plan, step)[0].item()
        progress["step"] = step
        if plan.balance_live and step % plan.balance_live == 0:
            if step == killed_at:
                grid.live.move_to = lambda placements, optimizer: os._exit(1)
            moved += grid.live.rebalance(optimizer)["balance_moved"]
        if plan.balance_live and step % SAVE_EVERY == 0:
            before = grid.live.state()
            parallel.save(saver, model, optimizer, progress, grid)
            assert grid.live.state() == before
    saver.wait()
    return losses, moved, grid.live and (grid.live.expected, grid.live.placements)


LIVE = replace(PLAN, **MOVES, ep=4, zero=1, balance_live=3, balance_threshold=0.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses without live balance, and a run with moves."""
    without = dist.run(4, train, tmp_path_factory.mktemp("without"), replace(LIVE, balance_live=0))[0][0]
    return without, dist.run(4, train, tmp_path_factory.mktemp("with"), LIVE)[0]


def test_training_with_moves(undisturbed):
    """Ten steps with three decisions follow those without, to rounding; saving at home and coming back included."""
    without, (losses, moved, _) = undisturbed
    assert moved > 10
    for step, loss in without.items():
        assert losses[step] == pytest.approx(loss, abs=1e-9)


def train_through_pipeline(config, plan):
    """Losses of four steps and how many experts moved."""
    model, grid, optimizer = start(config, plan)
    pipeline = parallel.Pipeline(model, plan, grid)
    model.aux_scale = 1 / (plan.n_micro * plan.dp * plan.cp * plan.tp)
    batches, loss_tokens = batches_of(config, plan, plan)
    losses, moved = [], 0
    for step in range(1, 5):
        losses.append(parallel.all_sum(pipeline.step(batches, loss_tokens).total_loss).item())
        optimizer.step()
        optimizer.zero_grad()
        loads, _ = parallel.sum_loads(model, model.pop_stats()["loads"])
        if grid.live:
            moved += grid.live.after_step(step, loads, optimizer).get("balance_moved", 0)
    return losses, moved


@pytest.mark.parametrize("axes", [
    dict(pp=2, dp=2, ep=2, overlap="adaptive"), dict(dp=4, ep=4, node_size=2, overlap="adaptive", dispatch="dedup"),
    pytest.param(dict(tp=2, sp=1, cp=2, ep=4), marks=pytest.mark.slow)], ids=str)
def test_training_with_moves_on_a_grid(axes):
    """Two decisions; on two stages each for its own layers, in pairs, and with sequences over the expert group."""
    config = replace(TINY, num_hidden_layers=4, balance_group=1)
    plan = replace(PLAN, **{"schedule": "", "seq_len": 16, **axes}, balance_threshold=0.0)
    without = dist.run(4, train_through_pipeline, config, plan)[0][0]
    for losses, moved in dist.run(4, train_through_pipeline, config, replace(plan, balance_live=2)):
        assert moved > 10
        assert losses == pytest.approx(without, abs=1e-9)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that died in step 9, between a decision and its moves; its last checkpoint is of step 8."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises((EOFError, RuntimeError)):
        dist.run(4, train, folder, LIVE, 9)
    return folder


def test_killed_between_decision_and_move(undisturbed, killed, tmp_path):
    """Resumed with placements and expected loads of then, the run decides and goes on as if nothing had been."""
    _, (losses, _, (expected, placements)) = undisturbed
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    resumed, moved, (expected_again, placements_again) = dist.run(4, train, tmp_path, LIVE)[0]
    assert list(resumed) == [9, 10]
    assert all(resumed[step] == losses[step] for step in resumed), "bit for bit"
    assert torch.equal(expected, expected_again) and np.array_equal(placements, placements_again)


@pytest.mark.parametrize("changes", [
    dict(ep=2, zero=3), dict(ep=4, zero=0, balance_live=0)], ids=str)
def test_resumed_under_another_plan(undisturbed, killed, tmp_path, changes):
    """Placements for other ranks are planned anew from expected loads; without live balance, at home."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    losses = undisturbed[0]
    for step, loss in dist.run(4, train, tmp_path, replace(LIVE, **changes))[0][0].items():
        assert step > 8 and loss == pytest.approx(losses[step], abs=1e-9)


def test_recording_grows_and_is_cut_back(tmp_path):
    """Steps 1, 3 and 4 are recorded, then 2 again, as after resuming from step 1: two steps are left."""
    path, loads = tmp_path / "loads.npy", np.arange(6, dtype=np.int32).reshape(2, 3)
    for step in (1, 3, 4):
        record_loads(path, step, step * loads)
    assert np.array_equal(np.load(path), np.stack([loads, 0 * loads, 3 * loads, 4 * loads]))
    record_loads(path, 2, 7 * loads)
    assert np.array_equal(np.load(path), np.stack([loads, 7 * loads]))


RUN = """--dp 4 --ep 4 --steps 6 --micro-batch 1 --global-batch 8 --seq-len 32 --save-every 3 --set n_routed_experts=16
         num_experts_per_tok=2 balance=none --compile none""".split()


@pytest.mark.slow
def test_command_line(tmp_path):
    """torchrun train.py with moves has the losses of one without; its log and its recording tell of them."""
    def losses(name, *more):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", str(ROOT / "train.py"), *RUN,
                   "--precision", "fp32", "--data", str(ROOT / "model.py"), "--out", str(tmp_path / name), *more]
        subprocess.run(command, check=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
        return [json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]

    moved = losses("moved", "--balance-live", "2", "--balance-threshold", "0", "--record-loads", "1")
    assert [line["loss"] for line in moved] == pytest.approx([line["loss"] for line in losses("fixed")], abs=1e-6)
    assert [line.get("balance_moved", 0) > 0 for line in moved] == [False, True] * 3
    assert np.load(tmp_path / "moved" / "loads.npy").sum(2).tolist() == [[8 * 32 * 2] * 3] * 6


def test_benchmark(capsys):
    """tests/bench_balance.py prints both tables, and between them what to give to sim.py."""
    bench_balance.main(["--cases", "1", "--interval", "50"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 4 + 2 + 6
