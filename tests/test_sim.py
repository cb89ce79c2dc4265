"""sim.py against textbooks, against torch's pipelining runtime, and against model.py: what it plans is what happens."""
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.pipelining as pipelining
import torch.multiprocessing
from torch.distributed.pipelining import schedules
from torch.utils.checkpoint import checkpoint

import bench_search
import paper
import published
import sim
from model import PRESETS, Config, Model, count_params, flops_per_token, rope_table
from sim import HARDWARE, Plan, check_plan, exchange_bytes, predict, schedule_table
from test_model import WORDS

ROOT = Path(__file__).parent.parent
TINY = Config(num_hidden_layers=4)
ASCEND = HARDWARE["ascend_910b_376"]
PANGU = PRESETS["pangu-ultra-moe-718b"]
SCHEDULES = ("1f1b", "interleaved", "paired")


def pipeline(schedule, pp, n_micro, vpp=2):
    return Plan(pp=pp, vpp=1 if schedule == "1f1b" else vpp, schedule=schedule, global_batch=n_micro)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and the clock


def play(plan):
    """(steps, their ends, seconds of each kind): a forward takes 1 s, a backward 2, a pair 3."""
    steps = sim.in_order(plan, schedule_table(plan))
    seconds = {step.stages: sum(taken for stage, taken in zip(step.stages, (1.0, 2.0)) if stage is not None)
               for step in steps}
    return steps, sim.play(steps, seconds, plan.pp)[0], seconds


def bubble(plan):
    """Seconds that the step is longer than one rank's work, stages being equal and links free."""
    return max(play(plan)[1]) - plan.n_micro * plan.vpp * 3


@pytest.mark.parametrize("pp", [1, 2, 4, 8])
def test_bubbles_are_the_textbooks(pp):
    """F=1, B=2 per chunk: (p-1)(F+B) for 1F1B, the same per chunk, so 1/v of it, for interleaved and paired."""
    assert bubble(pipeline("1f1b", pp, 3 * pp)) == (pp - 1) * 3
    for vpp in (1, 2, 3):
        for n_micro in (pp, 2 * pp, 4 * pp):
            assert bubble(pipeline("interleaved", pp, n_micro, vpp)) == (pp - 1) * 3
            assert bubble(pipeline("paired", pp, n_micro, vpp)) == (pp - 1) * 3


def test_in_flight_is_what_a_walk_of_the_whole_table_finds():
    """Most bytes that a rank's micro-batches keep, chunks of unlike sizes: of four turns as of all."""
    generator = random.Random(0)
    for pp, schedule, turns in product((1, 2, 3, 4), SCHEDULES, (1, 2, 3, 5, 9)):
        plan = pipeline(schedule, pp, pp * turns, generator.choice((1, 2, 3)))
        sizes = [generator.random() for _ in range(plan.n_stages)]
        simulation = sim.Simulation(replace(TINY, num_hidden_layers=64), plan, ASCEND)
        simulation.stages = [(stage,) for stage in range(plan.n_stages)]
        simulation.__dict__["kept"] = sizes
        for rank, actions in enumerate(schedule_table(plan)):
            kept, most = 0.0, 0.0
            for kind, stage, _ in (part for action in actions for part in action.parts()):
                kept += sizes[stage] if kind == "F" else -sizes[stage]
                most = max(most, kept)
            assert simulation.activations(rank) == pytest.approx(most)


def check_table(plan, table):
    """AssertionError if a table is no right schedule. Returns each rank's most micro-batches (per chunk) in flight."""
    home, in_flight, sent, received = {stage: stage % plan.pp for stage in range(plan.n_stages)}, [], {}, {}
    for rank, actions in enumerate(table):
        seen, live, most = set(), 0, 0
        for what in (part for action in actions for part in action.parts()):
            kind, stage, microbatch = what
            assert home[stage] == rank, f"{what} on rank {rank}, its stage lives on rank {home[stage]}"
            assert what not in seen, f"{what} twice"
            assert kind == "F" or ("F", stage, microbatch) in seen, f"{what} before its F"
            seen.add(what)
            live += 1 if kind == "F" else -1
            most = max(most, live)
            step = 1 if kind == "F" else -1                # towards the stage that waits for this one's output
            if home.get(stage + step, rank) != rank:
                sent.setdefault((step, stage), []).append(microbatch)
            if home.get(stage - step, rank) != rank:
                received.setdefault((step, stage - step), []).append(microbatch)
        wanted = 2 * plan.n_micro * len(plan.stages_of(rank))
        assert len(seen) == wanted, f"rank {rank}: {len(seen)} forwards and backwards, not {wanted}"
        in_flight.append(most)
    assert sent == received, "a link's order of receives is not its order of sends"
    sim.in_order(plan, table)                               # asserts that no ranks wait for each other
    return in_flight


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
def test_every_schedule_passes_the_checker(pp):
    for schedule in SCHEDULES:
        for n_micro in (2 * pp, 3 * pp, 4 * pp):
            for vpp in (2, 3) if schedule in ("interleaved", "paired") else (2,):
                plan = pipeline(schedule, pp, n_micro, vpp)
                check_plan(replace(TINY, num_hidden_layers=64), plan)
                in_flight = check_table(plan, schedule_table(plan))
                if schedule == "1f1b":
                    assert in_flight == [pp - rank for rank in range(pp)]


def test_a_pipeline_drawn_as_text():
    """1F1B, 2 ranks, 3 micro-batches, a column a second: forwards 1 s, backwards 2 s; the step is (3 + 1) * 3 s."""
    steps, ends, seconds = play(pipeline("1f1b", 2, 3))
    rows = [[sim.Span(end - seconds[step.stages], end, step.action) for step, end in zip(steps, ends)
             if step.rank == rank] for rank in range(2)]
    assert sim.draw_text(rows, columns=12) == "01  aa2bb cc\n 0aa1bb2cc  "
    row = [sim.Span(0, 10, "optimizer"), sim.Span(10, 10.1, "stragglers"), sim.Span(10.1, 10.1, "gradients")]
    assert sim.draw_text([row], columns=10) == "OOOOOOOOOS"        # what is short shows, what takes no time does not


def test_paired_runs_one_more_warm_up_than_interleaved():
    """Warm-ups (p - rank - 1) * 2 + (v - 1) * p + 1, then pairs alone, then backwards alone."""
    plan = pipeline("paired", 4, 8)
    for rank, actions in enumerate(schedule_table(plan)):
        kinds = ["".join(kind for kind, _, _ in action.parts()) for action in actions]
        warm_up = (4 - rank - 1) * 2 + (2 - 1) * 4 + 1
        assert kinds == ["F"] * warm_up + ["FB"] * (16 - warm_up) + ["B"] * warm_up


def exchanged(row, *pairs):
    row = list(row)
    for i, j in pairs:
        row[i], row[j] = row[j], row[i]
    return row


# complaint of the checker -> a change that breaks the table of 2 ranks and 4 micro-batches (rank 1: F0 B0 F1 B1 ...)
BROKEN = {
    "before its F": lambda a, b: [a, exchanged(b, (0, 1))],
    "7 forwards and backwards, not 8": lambda a, b: [a[:-1], b],
    "twice": lambda a, b: [a + a[-1:], b],
    "its stage lives on rank 1": lambda a, b: [b[:1] + a, b],
    "order of receives": lambda a, b: [a, exchanged(b, (0, 2), (1, 3))],
}


@pytest.mark.parametrize("complaint", BROKEN)
def test_checker_refuses_broken_tables(complaint):
    plan = pipeline("1f1b", 2, 4)
    with pytest.raises(AssertionError, match=complaint):
        check_table(plan, BROKEN[complaint](*schedule_table(plan)))


def test_checker_sees_ranks_that_wait_for_each_other():
    plan = pipeline("interleaved", 2, 2)
    late = [sim.Action((stage, m)) for stage in (2, 0) for m in (0, 1)]
    backwards = [sim.Action(None, (stage, m)) for stage in (2, 0) for m in (0, 1)]
    with pytest.raises(AssertionError, match="wait for each other"):
        sim.in_order(plan, [late + backwards, schedule_table(plan)[1]])


# -- torch's runtime, recorded


def torch_schedule(name, stages, n_micro, loss):
    kinds = {"1f1b": pipelining.Schedule1F1B, "interleaved": pipelining.ScheduleInterleaved1F1B}
    if name != "paired":
        return kinds[name](stages[0] if name == "1f1b" else stages, n_micro, loss_fn=loss)
    runtime = schedules._PipelineScheduleRuntime(stages, n_micro, loss_fn=loss)
    table = schedule_table(pipeline(name, dist.get_world_size(), n_micro))
    actions = {rank: [schedules._Action.from_str(str(action)) for action in row] for rank, row in enumerate(table)}
    runtime._prepare_schedule_with_comms(actions)
    return runtime


def record(stage, executed):
    """Notes each call that computes, in the order in which the runtime makes them."""
    forward, backward = stage.forward_one_chunk, stage.backward_one_chunk

    def noted_forward(microbatch, *args, **kwargs):
        executed.append(("F", stage.stage_index, microbatch))
        return forward(microbatch, *args, **kwargs)

    def noted_backward(microbatch, *args, full_backward=True, **kwargs):
        executed.append(("B" if full_backward else "I", stage.stage_index, microbatch))
        return backward(microbatch, *args, full_backward=full_backward, **kwargs)

    stage.forward_one_chunk, stage.backward_one_chunk = noted_forward, noted_backward


def run_rank(rank, world, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for name in SCHEDULES:
        n_micro, executed = 2 * world, []
        plan = pipeline(name, world, n_micro)
        stages = [pipelining.PipelineStage(torch.nn.Linear(4, 4), stage, plan.n_stages, torch.device("cpu"))
                  for stage in plan.stages_of(rank)]
        schedule = torch_schedule(name, stages, n_micro, lambda y, t: (y - t).square().mean())
        for stage in stages:
            record(stage, executed)
        batch = torch.randn(n_micro, 4)
        last = dict(target=batch, losses=[]) if plan.n_stages - 1 in plan.stages_of(rank) else {}
        schedule.step(*[batch] * (rank == 0), **last)
        results.put((rank, name, executed))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_tables_are_what_torchs_runtime_executes(world, tmp_path):
    """Every forward and backward, in order, on each of 2 and 4 gloo ranks; `paired` runs our table."""
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ranks = [context.Process(target=run_rank, args=(rank, world, tmp_path / "store", results)) for rank in range(world)]
    for process in ranks:
        process.start()
    executed = {}
    for _ in range(world * len(SCHEDULES)):
        rank, name, actions = results.get()
        executed[rank, name] = actions
    for process in ranks:
        process.join()
    for (rank, name), actions in executed.items():
        table = schedule_table(pipeline(name, world, 2 * world))
        assert actions == [part for action in table[rank] for part in action.parts()], f"{name}, rank {rank}"


def test_overlap_hides_an_exchange_as_long_as_the_compute():
    """One MoE layer, forward of one micro-batch with backward of another: 5 parts of compute, 4 exchanges, of 1 s each.

    attend F | experts I | experts W | experts F | attend I on the compute stream, an exchange under each of the first
    four... in pairs the step takes the 5 s of compute; one after the other, nothing is hidden but a way back.
    """
    layer = sim.LayerTime.__new__(sim.LayerTime)
    parts = ("attend", "F"), ("experts", "F"), ("experts", "I"), ("experts", "W"), ("attend", "I")
    both = {"F": dict(inner=0.0, outer=1.0), "B": dict(inner=0.0, outer=1.0)}
    whole = {("experts", "B"): 2.0, ("attend", "B"): 1.0}
    layer.__dict__.update(name="", compute=Counter(dict.fromkeys(parts, 1.0) | whole), collectives={}, exchange=both,
                          rows_again="", swap=0.0, weights=("inner", 0.0), gradients=("inner", 0.0), whole_again=False)

    def account(deferred, paired):
        return sim.action_account((layer,), (layer,), sim.Manner(flat=True, deferred=deferred, paired=paired))

    end, parts, exchange = account(True, True)
    assert (end, exchange) == (5.0, 4.0)
    assert parts == {"attend": 2.0, "experts": 3.0, "exchange": 0.0, "collectives": 0.0, "overlap tax": 0.0}
    end, parts, exchange = account(False, False)
    assert (end, exchange, parts["exchange"]) == (9.0, 4.0, 4.0)
    end, parts, exchange = account(True, False)            # in a pipeline weight gradients hide the backward's way back
    assert (end, exchange, parts["exchange"]) == (8.0, 4.0, 3.0)


# ---------------------------------------------------------------------------------------------------------------------
# Counts against model.py


def stage_works(shape, plan):
    shape = sim.as_shape(shape)
    return [[(kind, sim.Work(shape, plan, kind)) for kind in kinds] for kinds in sim.stage_kinds(shape, plan)]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_parameters_and_flops_add_up_to_the_models(preset):
    """Parameters of every stage against the model on the meta device, FLOPs against model.flops_per_token."""
    config = PRESETS[preset]
    with torch.device("meta"):
        model = Model(config)
    plan = Plan(pp=2, vpp=2, global_batch=4)
    for layers, works in zip(sim.stage_layers(config, plan), stage_works(config, plan)):
        counted = [sum(work.params.values()) for kind, work in works if kind not in ("embedding", "head")]
        assert counted == [sum(p.numel() for p in model.layers[str(i)].parameters()) for i in layers]
    counted = sum(sum(work.params.values()) for _, work in stage_works(config, Plan())[0])
    assert counted == sum(p.numel() for p in model.parameters())
    assert counted == count_params(config)["total"] + count_params(config)["mtp"]
    for seq_len in (256, 4096):
        works = [(kind, work) for kind, work in stage_works(config, Plan(seq_len=seq_len))[0] if kind != "embedding"]
        counted = 3 * sum(op.flops for _, work in works for op in work.ops) / seq_len
        assert math.isclose(counted, flops_per_token(config, seq_len), rel_tol=1e-12)


def test_one_device_takes_the_sum_of_its_operators():
    """No link, no bubble: n_micro times forward and both halves of backward of every operator, then the optimizer."""
    plan = Plan(micro_batch=2, global_batch=6, seq_len=64)
    works = [work for _, work in stage_works(replace(sim.as_shape(TINY), value_padded=False), plan)[0]]
    seconds = sum(sum(op.seconds(plan, ASCEND)) for work in works for op in work.ops)
    result = predict(TINY, plan, ASCEND)
    assert result["step_time_s"] == pytest.approx(3 * seconds + result["breakdown"]["optimizer"])
    again = predict(TINY, replace(plan, recompute=("layer",)), ASCEND)
    join = "enorm", "hnorm", "eh_proj", "shared_head.norm"                 # MTP's, outside the layer
    forward = sum(op.seconds(plan, ASCEND).forward for work in works if work.is_layer
                  for op in work.ops if op.name not in join)
    assert again["step_time_s"] - result["step_time_s"] == pytest.approx(3 * forward)


def test_keys_and_values_of_the_whole_sequence_on_each_rank_of_a_context_group():
    """Latents are gathered, so kv_b_proj has as many rows with cp=2 as with cp=1, and q_b_proj half of them."""
    whole, cut = ({op.name: op.flops for op in sim.Work(sim.as_shape(TINY), Plan(cp=cp, dp=2 // cp), "moe").ops}
                  for cp in (1, 2))
    assert cut["kv_b_proj"] == whole["kv_b_proj"]
    assert cut["q_b_proj"] == whole["q_b_proj"] / 2 and cut["attention"] == whole["attention"] / 2


def test_rows_that_travel_again_are_counted():
    """Dropped rows are sent once more, half of a forward's exchange; a whole layer's forward both ways."""
    plan = Plan(dp=4, ep=4, node_size=2, dispatch="hierarchical", global_batch=4, seq_len=64)
    moe_layers = TINY.num_hidden_layers - TINY.first_k_dense_replace + TINY.num_nextn_predict_layers
    once = {tier: moe_layers * sent[0] for tier, sent in exchange_bytes(TINY, plan)["forward"].items()}
    plain = predict(TINY, plan, ASCEND)["bytes_by_tier"]
    for recompute, share in (("act", 0), ("permute", 0.5), ("layer", 1)):
        sent = predict(TINY, replace(plan, recompute=(recompute,)), ASCEND)["bytes_by_tier"]
        assert {tier: sent[tier] - plain[tier] for tier in sent} == pytest.approx(
            {tier: share * size for tier, size in once.items()})


VARIANTS = {
    "default": {},
    "pre": dict(norm="pre", router_bias=True, n_group=4, topk_group=2, balance="sequence"),
    "raw": dict(aux_scores="raw", n_shared_experts=2, balance_group=1),
    "no balance": dict(balance="none"),
    "capacity": dict(capacity_factor=1.5, balance="micro_batch"),
    **{str(change): change for change in WORDS},
}


def storages(model, call):
    """Bytes of each distinct storage, parameters and `call`'s own inputs apart, that autograd keeps for backward."""
    held, outside = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return sorted(size for address, size in held.items() if address not in outside), result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_tensors_are_those_that_hooks_see(variant, dtype):
    """Layer by layer, every distinct storage: the list of sizes, not the sum alone."""
    config = replace(TINY, **VARIANTS[variant])
    model = Model(config)
    model.init_weights(0)
    model.to(dtype)
    B, T = 2, 24
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}[dtype]
    plan = Plan(micro_batch=B, seq_len=T, precision=precision)
    shape = replace(sim.as_shape(config), value_padded=True)               # torch's CPU kernel pads
    cos, sin = rope_table(config, torch.arange(T).unsqueeze(0), dtype)
    table = {t.untyped_storage().nbytes() for t in (cos, sin)}
    for index, kind in ((0, "dense"), (1, "moe")):
        x = torch.randn(B, T, config.hidden_size, dtype=dtype, requires_grad=True)
        layer, work = model.layers[str(index)], sim.Work(shape, plan, kind)
        held, counted = sum(p.numel() for p in layer.parameters()), sum(work.params.values())
        assert held == counted, f"{kind} layer: Work.layer in sim.py counts {counted} parameters, model.py has {held}"
        seen, _ = storages(model, lambda: layer(x, (cos, sin)))
        for size in table:                                                 # angles belong to the model, not to a layer
            seen.remove(size), seen.remove(size)
        counted = [size for size in work.saved.values() if size]
        wrong = [f"{seen.count(size)} of {size} bytes, and Work in sim.py counts {counted.count(size)} "
                 f"({', '.join(name for name, its_size in work.saved.items() if its_size == size)})"
                 for size in {*seen, *counted} if seen.count(size) != counted.count(size)]
        assert not wrong, (f"{kind} layer: backward keeps {'; '.join(wrong)}: see Work.layer and what it calls, or in "
                           f"model.py whether an operator goes through one_kernel")


def test_saved_tensors_of_a_whole_model():
    """Embedding, layers, multi-token prediction, head and loss together, within 0.1 %: a few scalars are not listed."""
    model = Model(TINY)
    model.init_weights(0)
    B, T = 2, 64
    ids = torch.randint(0, TINY.vocab_size, (B, T + 2))
    targets = torch.stack([ids[:, 1:T + 1], ids[:, 2:]], 1)
    seen, _ = storages(model, lambda: model(ids[:, :T], targets=targets))
    plan = Plan(micro_batch=B, seq_len=T, precision="fp32")
    works = stage_works(replace(sim.as_shape(TINY), value_padded=True), plan)[0]
    counted = sum(sum(work.saved.values()) for _, work in works)
    assert abs(sum(seen) - counted) < 1e-3 * counted, f"seen {sum(seen)}, counted {counted}"


def test_recomputing_a_layer_keeps_its_input_alone():
    model = Model(TINY)
    model.init_weights(0)
    x = torch.randn(2, 24, TINY.hidden_size, requires_grad=True)
    angles = rope_table(TINY, torch.arange(24).unsqueeze(0), x.dtype)
    table = sum(t.untyped_storage().nbytes() for t in angles)
    seen, _ = storages(model, lambda: checkpoint(model.layers["1"], x, angles, use_reentrant=False))
    plan = Plan(micro_batch=2, seq_len=24, precision="fp32", recompute=("layer",))
    kept, _ = sim.saved_bytes(sim.Work(replace(sim.as_shape(TINY), value_padded=True), plan, "moe"))
    ids = 2 * 24 * TINY.num_experts_per_tok * 8                            # noted by parallel.py, for the second run
    assert kept == 2 * 24 * TINY.hidden_size * 4 + ids
    assert kept - ids <= sum(seen) <= kept - ids + table + 64


def test_recompute_and_swap_choices_keep_less_and_less():
    """Each item drops something, sets drop what their items drop, and what is dropped is computed again."""
    shape = sim.as_shape(replace(TINY, expert_weight="after_down"))

    def kept(recompute=(), swap=()):
        plan = Plan(recompute=recompute, swap=swap)
        return sim.saved_bytes(sim.Work(shape, plan, "moe"))

    whole = kept()[0]
    saving = {item: whole - kept((item,))[0] for item in sim.RECOMPUTE}
    assert all(size > 0 for size in saving.values())
    assert all(saving["layer"] >= size for size in saving.values())
    assert whole - kept(("act", "permute"))[0] == saving["act"] + saving["permute"]
    for item in ("expert_out", "attn_out"):
        on_device, away = kept(swap=(item,))
        assert on_device + away == whole and away > 0
    for item in sim.RECOMPUTE:
        assert any(item in op.again for op in sim.Work(shape, Plan(), "moe").ops)


# ---------------------------------------------------------------------------------------------------------------------
# The exchange


def random_routing(config, plan, n_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(plan.ep, n_tokens, config.n_routed_experts, generator=generator)
    return scores.topk(config.num_experts_per_tok).indices.tolist()


@pytest.mark.parametrize("dispatch", ["flat", "hierarchical", "dedup"])
def test_exchange_bytes_of_a_worked_example(dispatch):
    """4 ranks, 2 nodes, 8 experts (2 a rank), one token each; C=192, bf16. Token of rank 0 goes to experts 1, 2, 4, 6.

    Expert 1 is its own rank's, 2 on rank 1 (same node), 4 and 6 on ranks 2 and 3 (other node). All other tokens stay.
    """
    config = replace(TINY, num_experts_per_tok=4)
    plan = Plan(dp=4, ep=4, node_size=2, dispatch=dispatch, global_batch=4)
    stay = [[[2, 2, 3, 3]], [[4, 4, 5, 5]], [[6, 6, 7, 7]]]
    sent = exchange_bytes(config, plan, [[[1, 2, 4, 6]], *stay])
    row, weight, counts = 192 * 2, 2, 2 * 8
    if dispatch == "flat":
        assert sent["forward"]["inner"] == [counts + row + weight, counts + row, counts, counts]
        assert sent["forward"]["outer"] == [2 * (counts + row + weight), 2 * counts, 2 * counts + row, 2 * counts + row]
        assert sent["backward"]["outer"] == [2 * row, 0, row + weight, row + weight]
        return
    crossing = row + 4 * (weight + 8)
    if dispatch == "hierarchical":
        assert sent["forward"]["outer"] == [crossing + row] * 4
        assert sent["backward"]["outer"] == [2 * row + 4 * weight] * 4
    else:
        head = 8 + 4 * 8                                   # tokens that come, copies for each of the node's 4 experts
        assert sent["forward"]["outer"] == [head + crossing, head, head + row, head]
        assert sent["backward"]["outer"] == [row, 0, row + 4 * weight, 0]
    # inside the nodes: rank 0 to 1, and in the other node the copy for expert 6 from rank 2, where the token arrived
    assert sent["forward"]["inner"] == [counts + row + weight, counts + row, counts + row + weight, counts + row]


def test_exchange_bytes_are_those_expected():
    """The uniform expectation is the mean over random routings; a group of one sends nothing."""
    config = replace(TINY, n_routed_experts=16, num_experts_per_tok=3)
    for dispatch in sim.EXCHANGES:
        for ep, node_size in ((1, 1), (4, 2), (8, 4), (4, 4), (4, 1)):
            plan = Plan(dp=ep, ep=ep, node_size=node_size, dispatch=dispatch, global_batch=ep, seq_len=64)
            expected = exchange_bytes(config, plan)
            assert all(len(set(sent)) == 1 for tiers in expected.values() for sent in tiers.values())
            if ep == 1:
                assert sum(sum(sent) for tiers in expected.values() for sent in tiers.values()) == 0
            for way in ("forward", "backward"):
                for tier in ("inner", "outer"):
                    draws = [sum(exchange_bytes(config, plan, random_routing(config, plan, 64, seed))[way][tier]) / ep
                             for seed in range(4)]
                    drawn, said = sum(draws) / 4, expected[way][tier][0]
                    assert math.isclose(drawn, said, rel_tol=0.04, abs_tol=1), (
                        f"{plan.dispatch}, {way}, {tier}: exchange_bytes of ids counts {drawn:.0f} bytes, "
                        f"uniform_exchange {said:.0f}: see share_that_crosses")


def test_hops_at_once_send_the_bytes_of_hops_in_turn():
    """The clock alone asks whether both hops go at once, as a published run's do with dedup."""
    plan = dict(dp=16, ep=16, node_size=8, seq_len=64, global_batch=16, dispatch="dedup")
    at_once = published.RowPlan(**plan, pipelined=True)
    assert at_once.hops_together and not at_once.goes_directly
    assert sim.uniform_exchange(PRESETS["tiny"], at_once) == sim.uniform_exchange(PRESETS["tiny"], Plan(**plan))


def test_exchange_volumes_are_the_published_ones():
    """Pangu's 32 ranks on 4 nodes, in units of T*H: flat 6 between nodes and 1.75 inside, hierarchical 3 and 7."""
    unit = 2048 * 7680 * 2 * 2                             # T*H in bf16, dispatch and combine
    for dispatch, outer, inner in (("flat", 6, 1.75), ("hierarchical", 3, 7), ("dedup", 2.71, 7)):
        plan = Plan(dp=4, tp=8, sp=1, ep=32, micro_batch=2, global_batch=8, seq_len=8192, dispatch=dispatch)
        sent = exchange_bytes(PANGU, plan)["forward"]
        assert sent["outer"][0] / unit == pytest.approx(outer, rel=0.01)
        assert sent["inner"][0] / unit == pytest.approx(inner, rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def random_plan(generator):
    one = generator.choice
    tp, dp, cp, pp = one((1, 2, 4)), one((1, 2, 4)), one((1, 2)), one((1, 2, 3, 4))
    return Plan(pp=pp, dp=dp, cp=cp, tp=tp, sp=int(tp > 1), ep=one((1, 2, 4, 8)), vpp=one((1, 2)),
                node_size=one((1, 2, 4, 8)), micro_batch=one((1, 2)), global_batch=one((4, 8, 16, 24, 32)),
                seq_len=one((64, 256)), zero=one((0, 1, 3)), schedule=one(SCHEDULES), overlap=one(("none", "adaptive")),
                dispatch=one(sim.EXCHANGES),
                recompute=tuple(generator.sample(sim.RECOMPUTE, generator.randrange(3))),
                swap=tuple(generator.sample(sim.SWAP, generator.randrange(2))), precision=one(("bf16", "fp32")))


def legal_plans(count, config=replace(TINY, num_hidden_layers=12)):
    generator, plans = random.Random(0), []
    while len(plans) < count:
        plan = random_plan(generator)
        try:
            check_plan(config, plan, ASCEND)
        except ValueError:
            continue
        plans.append(plan)
    return config, plans


def test_random_plans_keep_their_promises():
    """Valid schedule, each layer on one stage, parts add up to the step, none negative, more bandwidth never slower."""
    config, plans = legal_plans(60)
    for plan in plans:
        check_table(plan, schedule_table(plan))
        layers = [i for stage in sim.stage_layers(config, plan) for i in stage]
        assert layers == list(range(config.num_hidden_layers + config.num_nextn_predict_layers))
        result = predict(config, plan, ASCEND)
        assert sum(result["breakdown"].values()) == pytest.approx(result["step_time_s"])
        assert all(seconds >= -1e-12 for seconds in result["breakdown"].values()), result["breakdown"]
        hidden = result["hidden_comm_fraction"]
        assert (0 <= hidden <= 1 if plan.ep > 1 else hidden is None) and 0 < result["mfu"] < 1
        for faster in ("inner_bandwidth", "outer_bandwidth", "bandwidth", "host_bandwidth"):
            quick = predict(config, plan, replace(ASCEND, **{faster: 1e13}))["step_time_s"]
            assert quick <= result["step_time_s"] * (1 + 1e-12), f"more {faster} is slower under {plan}"
        assert predict(config, plan, ASCEND, max_vio=0.5)["step_time_s"] >= result["step_time_s"]


def test_size_one_of_every_axis_is_legal():
    for name in ("pp", "dp", "cp", "tp", "ep", "vpp", "node_size", "micro_batch", "global_batch"):
        assert getattr(Plan(), name) == 1 or name == "node_size"
    for schedule in SCHEDULES:
        for dispatch in sim.EXCHANGES:
            plan = replace(pipeline(schedule, 1, 2), dispatch=dispatch, node_size=1)
            check_plan(TINY, plan, ASCEND, devices=1)
            assert predict(TINY, plan, ASCEND)["step_time_s"] > 0


@pytest.mark.parametrize("plan, words", [
    (dict(tp=3), "tp=3 does not divide num_attention_heads=4: use one of [1, 2, 4]"),
    (dict(tp=2), "use sp=1"),
    (dict(ep=3, dp=3, global_batch=3), "ep=3 does not divide n_routed_experts=8: use one of [1, 2, 4, 8]"),
    (dict(ep=4, dp=2, global_batch=2), "ep=4 does not divide dp*cp*tp=2: use one of [1, 2]"),
    (dict(ep=4, dp=4, node_size=3, global_batch=4), "node_size=3 and ep=4"),
    (dict(pp=9, global_batch=9), "use at most 5"),
    (dict(pp=2, layer_split=(1, 2), global_batch=2), "needs pp*vpp=2 with 4"),
    (dict(pp=3, layer_split=(2, 0, 2), global_batch=3), "at least one layer"),
    (dict(pp=4), "use global_batch=4"),
    (dict(dp=2, global_batch=3), "global_batch=3 is not a multiple of dp*micro_batch=2: use 2"),
    (dict(vpp=2, schedule="1f1b"), "schedule=1f1b needs vpp=1"),
    (dict(schedule="1f1b", overlap="adaptive"), "has none: use paired"),
    (dict(pp=2, vpp=2, global_batch=5, schedule="interleaved"), "use global_batch=4"),
    (dict(dispatch="ring"), "use one of flat, hierarchical, dedup"),
    (dict(recompute=("mlp",)), "recompute='mlp': use one of"),
    (dict(seq_len=4096), "use at most that"),
    (dict(cp=2, dp=1, seq_len=1022), "seq_len=1022 is not a multiple of 4"),
    (dict(dp=0), "dp=0: use a whole number above 0"),
    (dict(dp=True), "dp=True: use a whole number"),
    (dict(tp=2.0), "tp=2.0: use a whole number"),
    (dict(sp=2), "sp=2: use one of 0, 1"),
    (dict(layer_split=(4, -1)), "layer_split=-1: use a whole number of at least 0"),
    (dict(balance_threshold=math.nan), "balance_threshold=nan: use a number"),
    (dict(node_size=16), "use at most that"),
    (dict(dp=2, global_batch=2), "pp*dp*cp*tp=1*2*1*1=2 for 1 devices: use dp=1"),
])
def test_refusals_name_the_numbers_and_what_would_fit(plan, words):
    with pytest.raises(ValueError) as refusal:
        check_plan(TINY, Plan(**plan), ASCEND, devices=None if "dp*cp*tp=1*2" not in words else 1)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_balance_groups_follow_the_plan():
    """ep_group: sequences on the data ranks that share experts; a tensor group shares one sequence, so counts once."""
    plan = Plan(dp=8, tp=2, sp=1, ep=8, micro_batch=2, global_batch=16)
    assert sim.balance_group(TINY, plan) == 2 * 4
    assert sim.balance_group(replace(TINY, balance="dp_group"), plan) == 2 * 8
    assert sim.balance_group(replace(TINY, balance="micro_batch"), plan) == 2
    assert sim.balance_group(replace(TINY, balance="sequence"), plan) == 1
    with pytest.raises(ValueError, match="balance_group=3"):
        check_plan(replace(TINY, balance_group=3), plan)


def test_layers_are_split_evenly_or_as_told():
    plan = Plan(pp=2, vpp=2, global_batch=4, layer_split=(3, 4, 4, 1))
    assert [len(stage) for stage in sim.stage_layers(replace(TINY, num_hidden_layers=12), plan)] == [3, 4, 4, 2]
    stages = sim.stage_layers(PANGU, Plan(pp=16, vpp=2, global_batch=32, seq_len=8192))
    # head and MTP weigh about as much as five layers: their stage gets no other, its rank's first stage a single one
    assert [len(stage) for stage in stages] == [2] * 15 + [1] + [2] * 15 + [1]
    # two ranks: head and MTP stand for 4.5 layers, so 33 and 28 hidden layers
    stages = sim.stage_layers(PANGU, Plan(pp=2, global_batch=2, seq_len=4096))
    assert [len(stage) for stage in stages] == [33, 28 + 1]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_predict_prints_one_json_object(capsys):
    sim.main(["predict", "--model", "tiny", "--hardware", "h200_sxm", "--devices", "4", "--json",
              "--load", "max_vio=0.2",
              "--plan", "pp=2,dp=2,ep=2,vpp=2,global_batch=8,overlap=adaptive,recompute=act+norm"])
    result = json.loads(capsys.readouterr().out)
    assert {"step_time_s", "tokens_per_s", "tokens_per_s_per_device", "mfu", "tflops_per_device", "mem_gib", "fits",
            "why_not", "bubble", "exposed_comm_s", "hidden_comm_fraction", "breakdown", "memory_by_stage",
            "bytes_by_tier", "plan"} <= set(result)
    assert result["model"] == "tiny" and result["hardware"] == "h200_sxm" and result["devices"] == 4
    assert "simulated" in result["source"]
    assert result["plan"]["schedule"] == "paired" and len(result["memory_by_stage"]) == 2 and result["max_vio"] == 0.2


@pytest.mark.parametrize("args, words", [
    (("predict", "--plan", "tpp=2"), "unknown plan key 'tpp'"),
    (("predict", "--plan", "tp=two"), "write a value of type int"),
    (("predict", "--model", "none"), "model 'none': No such file or directory; use a JSON file or one of"),
    (("predict", "--hardware", "/"), "hardware '/': Is a directory; use a JSON file or one of"),
    (("trace", "--out", "/none/t.json"), "/none/t.json: there is no such folder"),
    (("trace", "--png", "t.foo"), "--png t.foo: write a name that ends in .png"),
    (("predict", "--hardware", __file__), "is not JSON"),
    (("predict", "--plan", "tp=2, tpp=4"), "unknown plan key 'tpp': use one of tp, pp"),
    (("predict", "--plan", "tp=2,tp=4"), "has tp twice"),
    (("trace", "--jsn"), "--jsn is no flag here"),
    (("predict", "--jsn"), "--jsn is no flag here (nearest: --json): see"),
    (("predict", "--devices", "5"), "for 5 devices"),
    (("predict", "--devices", "0"), "must be a whole number of at least 1"),
    (("plans", "--devices", "-8", "--global-batch", "8"), "must be a whole number of at least 1"),
    (("plans", "--top", "0", "--global-batch", "8"), "must be a whole number of at least 1"),
    (("plans",), "--global-batch"),
    (("predict", "--nodes", "5"), "--nodes is no flag here (nearest: --model): see sim.py predict"),
    (("shapes", "--budget", "active=0,total=718e9"), "both above 0"),
    (("shapes", "--budget", "active=nan,total=718e9"), "both above 0"),
    (("shapes", "--budget", "39e9"), "write active=39e9,total=718e9"),
    (("predict", "--load", "max_vio=40"), "from 0 to 31"),
    (("predict", "--load", "max_vio=nan"), "max_vio=X"),
    (("predict", "--load", "5"), "max_vio=X"),
    (("predict", "--plan", "ep=1", "--load", "max_vio=0.3"), "with ep=1 each has all")])
def test_what_a_user_mistypes_is_refused(args, words):
    with pytest.raises(ValueError) as refusal:
        sim.main(list(args))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_refusal_is_one_line_and_exit_2():
    """Also where the terminal lacks the letters of a name."""
    command = [sys.executable, ROOT / "sim.py", "predict", "--hardware", "é.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(PYTHONIOENCODING="ascii"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert "hardware '\\xe9.json': No such file" in done.stderr


def test_a_plan_is_put_on_the_papers_or_fills_the_devices():
    """--plan on the paper's model and hardware changes the paper's plan; else the devices that there are get work."""
    plan, why = sim.choose_plan("recompute=layer,ep=64", "pangu-ultra-moe-718b", PANGU, ASCEND, None)
    assert plan == replace(paper.OPTIMISED, recompute=("layer",), ep=64) and "paper" in why
    assert sim.choose_plan("", "pangu-ultra-moe-718b", PANGU, ASCEND, 4096)[0].dp == 32
    plan, why = sim.choose_plan("tp=2,sp=1,pp=2,micro_batch=2", "tiny", TINY, ASCEND, 16)
    assert plan.world_size == 16 and plan.n_micro == 2 and "dp=4" in why
    check_plan(TINY, plan, ASCEND, 16)


def test_ladder_of_the_paper():
    """Published: 1.596 in all, per NPU, and +10 % of MFU by load balance. Every technique gains."""
    results = paper.climb_ladder()
    assert all(result["fits"] for result in results)
    rates = [result["tokens_per_s_per_device"] for result in results]
    assert rates[-1] == sim.simulate_paper("optimised", ASCEND, seq_len=4096)["tokens_per_s_per_device"]
    assert rates[-1] / rates[0] == pytest.approx(1.596, rel=0.1)
    assert all(after > before for before, after in zip(rates[:4], rates[1:5]))


def test_what_paper_prints(capsys, monkeypatch):
    monkeypatch.setattr(sim, "SEARCHED", (("paired", 2),))
    monkeypatch.setattr(paper, "PLAYED", 2)
    paper.print_ladder()
    paper.print_predecessor()
    paper.print_neighbour()
    paper.print_fewer_layers()
    paper.print_own_cut([replace(PANGU, num_hidden_layers=66), PANGU])
    printed = capsys.readouterr().out
    for words in ("Not used by the paper", "61 layers over 66", "Pangu Ultra 135B", "30.45 %"):
        assert words in printed, words
    rates = {int(line.split()[0]): float(line.split()[2]) for line in printed.splitlines() if " layers " in line[:10]}
    assert "is number 1 of 2" in printed and 1.10 < rates[61] / rates[66] < 1.20         # published: about 1.15


def test_sizes_of_shapes():
    """As model.py counts them, without embedding and MTP; the paper's shape is within its budget."""
    for config in (PANGU, replace(PANGU, num_hidden_layers=50, n_routed_experts=64, q_lora_rank=1024)):
        counted, (active, total) = count_params(config), sim.shape_size(config)
        assert total + counted["embedding"] == pytest.approx(counted["total"], rel=1e-4)       # norms apart
        assert active + counted["embedding"] == pytest.approx(counted["active"], rel=1e-4)
    assert PANGU in (config for config, _, _ in sim.candidate_shapes(dict(active=39e9, total=718e9)))


def test_shapes_as_a_table(capsys, monkeypatch):
    shapes = [(config, *sim.shape_size(config)) for config in (replace(PANGU, num_hidden_layers=66), PANGU)]
    monkeypatch.setattr(sim, "candidate_shapes", lambda budget: shapes)
    sim.main(["shapes", "--devices", "6144", "--top", "2"])
    table = capsys.readouterr().out.split("\n\n")[1]
    first, last = table.splitlines()[-2:]
    assert [first.split()[0], last.split()[0]] == ["1", "2"] and " 61   7680 " in first and " 718B" in first


def test_the_paper_beside_the_simulation(capsys):
    """python sim.py: both published runs in every bin and length, the parts of a step, memory of 16 pipeline ranks."""
    sim.main([])
    printed = capsys.readouterr().out
    for words in ("1.46e+06", "6.1e+05", "30.0%", "18.9%", "published", "simulated", "nothing was run on an NPU",
                  "<- peak", "bubble", "exchange", "353.9", "18.7%", "98 %"):
        assert words in printed, words
    optimised = [line for line in printed.splitlines() if line.startswith("optimised")]
    assert len(optimised) == 6


def test_bubble_of_the_predecessor():
    """Pangu Ultra 135B, 8 ranks and 16 micro-batches: published 30.45 % without and 6.8 % with 6 chunks."""
    for vpp, share in ((1, 0.3045), (6, 0.068)):
        result = paper.simulate_predecessor(vpp)
        pipeline_alone = result["step_time_s"] - result["breakdown"]["gradients"] - result["breakdown"]["stragglers"]
        assert result["breakdown"]["bubble"] / pipeline_alone == pytest.approx(share, abs=0.03)
    assert count_params(paper.PANGU_ULTRA)["total"] == pytest.approx(135e9, rel=0.02)


def test_trace_has_the_format_of_chrome_traces(tmp_path):
    """Events are complete (X) or metadata (M) with their keys; a stream has one task at a time; the last ends it."""
    out = tmp_path / "trace.json"
    plan = "pp=2,dp=2,ep=2,vpp=2,global_batch=8,overlap=adaptive"
    sim.main(["trace", "--model", "tiny", "--plan", plan, "--out", str(out)])
    trace = json.loads(out.read_text())
    assert trace["otherData"]["model"] == "tiny" and "simulated" in trace["otherData"]["source"]
    lanes = {}
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M") and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and isinstance(event["args"]["name"], str)
        else:
            assert event["dur"] >= 0 and event["ts"] >= 0 and isinstance(event["name"], str)
            lanes.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in lanes.values():
        spans.sort()
        assert all(first[1] <= second[0] + 1e-3 for first, second in zip(spans, spans[1:]))
    run = sim.Simulation(PRESETS["tiny"], sim.parse_plan(plan), ASCEND)
    last = max(end for spans in lanes.values() for _, end in spans)
    assert last == pytest.approx(1e6 * sum(run.breakdown()[0].values()))


def test_png_without_matplotlib_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib, or drop --png"):
        sim.main(["trace", "--model", "tiny", "--out", str(tmp_path / "trace.json"), "--png", "x.png"])
    assert not (tmp_path / "trace.json").exists()


def test_trace_draws_the_pipeline(tmp_path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "pipeline.png"
    plan = "pp=2,dp=2,ep=2,vpp=2,global_batch=8,overlap=adaptive"
    sim.main(["trace", "--model", "tiny", "--plan", plan, "--out", str(tmp_path / "trace.json"), "--png", str(png)])
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("name", [next(iter(bench_search.CASES)), *(
    pytest.param(name, marks=pytest.mark.slow) for name in list(bench_search.CASES)[1:])])
def test_search_comes_near_the_best_plan_there_is(name):
    """Within 1 % of the fastest of all plans that fit; of the first case, of some hundred that are drawn."""
    case = bench_search.CASES[name]
    search = sim.search_plans(case.config, case.hardware, case.devices, top=1, **case.batch)
    found = [result["step_time_s"] for result in search.found]
    assert found == sorted(found) and len(found) >= 20 and all(result["fits"] for result in search.found)
    assert any("use global_batch=" in example for _, example in search.refused.values())
    plans = bench_search.draw_plans(case.config, case.hardware, case.devices, 400, **case.batch)
    results = [bench_search.evaluate(case.config, case.hardware, plan) for plan in plans]
    assert found[0] <= 1.01 * min(seconds for seconds, fits in results if fits)


def test_a_search_that_finds_nothing_says_why(capsys):
    with pytest.raises(ValueError, match="no plan fits: give more --devices"):
        sim.main(["plans", "--model", "cpu-small", "--devices", "7", "--global-batch", "5", "--seq-len", "512"])
    shown = capsys.readouterr().out
    assert "0 plans that fit" in shown and "seq_len=512 above max_position_embeddings=256" in shown


def test_no_bubble_without_a_pipeline():
    """Not even a rounded one."""
    for ep in 1, 4:
        even = predict(PRESETS["tiny"], Plan(dp=4, ep=ep, micro_batch=2, global_batch=8, seq_len=64), ASCEND)
        assert even["bubble"] == even["breakdown"]["bubble"] == 0


@pytest.mark.slow
def test_search_beside_an_exhaustive_play():
    """On the smallest of the three cases; tests/bench_search.py does all."""
    case = bench_search.CASES["one-gpu-256 on 2"]
    with torch.multiprocessing.get_context("fork").Pool(2) as pool:
        best, _ = bench_search.best_of_all(case, pool)
    assert bench_search.search_case(case) <= 1.01 * best


# ---------------------------------------------------------------------------------------------------------------------
# Published rows


ROWS = {row.name: row for row in published.read_rows(published.ROWS)}


def test_every_rows_hardware_is_a_preset():
    assert {row.text("hardware") for row in ROWS.values()} <= set(published.HARDWARE)


@pytest.mark.parametrize("name", ["megatron_sp-04", "vtrain_multi-08", "simumax_b200-12", "mindspeed_llm-11"])
def test_a_published_row_is_predicted_within_a_fifth(name):
    found = published.predict_row(ROWS[name])
    assert abs(found["step_time_s"] / ROWS[name].measured("step_time_s") - 1) < 0.2, found


def odd_rows():
    """Cells that no row should have, one at a time."""
    cells = dict(tp="3", pp="7", vpp="11", cp="2", ep="5", etp="2", micro_batch="", global_batch="5",
                 n_devices="24", hardware="abacus", seq_len="1000", n_heads="7", recompute="whatever",
                 layer_split="1,2",
                 precision="int2", schedule="zigzag", head_dim="", vocab="x", n_kv_heads="-1", dp_shard="zero9",
                 attn_type="none")
    for name in ("vtrain_multi-08", "moe_modelzoo-02"):
        yield from (published.Row(ROWS[name].cells | {column: cell}, 0) for column, cell in cells.items())


def test_odd_rows_are_predicted_too():
    for row in odd_rows():
        found = published.predict_row(row)
        assert 0 < found["step_time_s"] < 1e5 and 0 < found["mem_gib"] < 1e5, (row.name, row.cells, found)


def test_a_bad_cell_is_told_with_its_row_and_column(tmp_path, capsys):
    row = dict(ROWS["vtrain_multi-08"].cells, tp="four")
    lines = [",".join(f'"{cell}"' for cell in line) for line in (row, row.values())]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    published.main([str(tmp_path / "rows.csv"), "--out", str(tmp_path / "out.csv")])
    assert "row vtrain_multi-08, column tp: 'four' is no number, read as 1" in capsys.readouterr().err
    header, line = (tmp_path / "out.csv").read_text().splitlines()
    assert header == "row_id,step_time_s,mem_gib,fits" and line.startswith("vtrain_multi-08,")


@pytest.mark.parametrize("args, words", [
    (["nowhere.csv"], "use a CSV file with the columns of train_rows.csv"),
    (["rows.csv", "--fit"], "a file is predicted, never fitted"),
    ([str(published.ROWS), "--out", str(published.ROWS)], "would overwrite the rows")])
def test_what_a_user_of_published_mistypes_is_refused(args, words):
    done = subprocess.run([sys.executable, published.__file__, *args], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and words in done.stderr


@pytest.mark.parametrize("field, value, words", [
    ("bandwidth", 0.0, "use a number above 0"), ("bandwidth", math.nan, "use a number"),
    ("memory", True, "use a number"),
    ("peak", dict(bf16=-1.0), "peak bf16=-1.0: use a number above 0"), ("peak", {}, "write {precision: FLOP/s}"),
    ("peak", 3e14, "write {precision: FLOP/s}"), ("topology", "ring", "use one of switch, mesh"),
    ("value_padded", 1, "use true or false"), ("node_size", 8.0, "use a whole number")])
def test_hardware_that_cannot_be_is_refused(field, value, words):
    with pytest.raises(ValueError) as refusal:
        replace(ASCEND, **{field: value})
    assert words in str(refusal.value)


def test_another_gpu_from_a_file(tmp_path, capsys):
    """Alone it needs no links; its name is the file's; the sequence is no longer than the model takes."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(dict(peak=dict(bf16=3e14), memory=5e10, bandwidth=1e12)))
    sim.main(["predict", "--model", "cpu-small", "--hardware", str(file), "--devices", "1"])
    shown = capsys.readouterr().out
    assert "on 1 mine, 300 TFLOP/s in bf16" in shown and "256 tokens" in shown and "fits: yes" in shown
    sim.main(["predict", "--model", "cpu-small", "--hardware", str(file)])         # nor are more devices taken for it
    assert "on 1 mine" in capsys.readouterr().out
    for more, words in (dict(), "no inner_bandwidth"), (dict(inner_bandwidth=1e10), "more than one node of 8"):
        file.write_text(json.dumps(dict(peak=dict(bf16=3e14), memory=5e10, bandwidth=1e12) | more))
        with pytest.raises(ValueError, match=words):
            sim.main(["predict", "--model", "cpu-small", "--hardware", str(file), "--devices", "16"])
    sim.main(["predict", "--model", "cpu-small", "--hardware", str(file), "--devices", "4"])
    for values, words in ((dict(peek=1), "Hardware has no field 'peek': use one of peak"),
                          (dict(peak=dict(bf16=3e14)), "lacks memory, bandwidth: add them, or a preset as base")):
        file.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=words):
            sim.main(["predict", "--hardware", str(file)])
    for base in ("h1000", ["h100_sxm"]):
        file.write_text(json.dumps(dict(base=base, memory=5e10)))
        with pytest.raises(ValueError, match="base=.*: use one of"):
            sim.main(["predict", "--hardware", str(file)])


def test_a_short_side_and_idle_cores_cost_a_matmul_its_rate():
    """The two factors by hand; and twice as many tokens never take less time."""
    assert sim.matmul_share(512, 1024, 1024, 1, (128, 128, 128), 0) == pytest.approx(512 / 640 * (1024 / 1152)**2)
    # 8 x 13 tiles of 128 x 128 on 100 cores: two waves, the second of 4 tiles
    assert sim.matmul_share(1024, 64, 1664, 1, (0, 0, 0), 100) == pytest.approx(104 / 200)
    seconds = [sum(matmul(rows).seconds(Plan(), ASCEND)) for rows in (2048, 4096, 8192, 16384)]
    assert all(a <= b for a, b in zip(seconds, seconds[1:]))


def matmul(rows):
    return sim.Matmul("attend", "o_proj", rows, summed=1024, columns=1024, matrices=1, element=2)


def test_two_ranks_of_a_mesh_use_one_link_and_eight_use_seven():
    free = replace(ASCEND, inner_latency=0, static_collective=0)
    two, eight = (sim.collective_seconds(free, "inner", ranks, 1e9) for ranks in (2, 8))
    assert two == pytest.approx(7 * eight) and two == pytest.approx(1e9 / (28e9 * free.inner_efficiency))


def test_a_ring_over_nodes_uses_the_links_of_all_its_ranks_in_a_node():
    free = replace(HARDWARE["a100_80_sxm"], outer_latency=0, static_collective=0)
    alone, together = (sim.collective_seconds(free, "outer", 64, 1e9, local) for local in (1, 4))
    assert alone == pytest.approx(4 * together)


def test_a_fit_finds_the_constants_that_made_the_times(monkeypatch):
    """Times simulated with a matmul efficiency 20 % above its prior are fitted better than by the priors."""
    rows = [ROWS[name] for name in ("mindspeed_llm-11", "mindspeed_llm-06", "mindformers-01", "mindspeed_llm-22")]
    found = [published.predict_row(row) for row in rows]
    fit = published.Fit(rows, found)
    true = fit.prior + 0.2 * np.array([constant == ("matmul_efficiency", "ascend") for constant in fit.constants])
    fit.measured = fit.measured + fit.errors(true)
    before = fit.errors(fit.prior)
    after = fit.errors(fit.best(fit.prior, before, fit.slopes(fit.prior, before), fit.weights))
    assert np.abs(after).mean() < np.abs(before).mean() / 2, (before, after)


@pytest.mark.slow
def test_published_rows_are_predicted_within_the_gates():
    """Mean absolute errors of step time and memory, order of pairs, what fits: constants fitted on the same rows."""
    rows = list(ROWS.values())
    found = [published.predict_row(row) for row in rows]
    timed, groups = published.timed_rows(rows, found), {}
    for one in timed:
        groups.setdefault((one.row.text("vendor"), one.row.text("arch")), []).append(one.error)
    assert np.mean(sum(groups.values(), [])) < 0.12 and max(map(np.mean, groups.values())) < 0.22, groups
    assert np.mean(published.ordered_pairs(timed)) > 0.80
    memory = [one["mem_gib"] / row.measured("mem_gib") - 1 for row, one in zip(rows, found) if row.measured("mem_gib")]
    assert np.abs(memory).mean() < 0.12
    assert sum(not one["fits"] for row, one in zip(rows, found) if row.text("oom") == "0") <= 0.05 * len(rows)
    assert sum(one["fits"] for row, one in zip(rows, found) if row.text("oom") == "1") <= 1
