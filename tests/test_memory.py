"""
What is recomputed, swapped and sliced gives the plain run's gradients bit for bit, and saves what sim.py counts.
"""
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import parallel
import sim
import smoke
import train
from bench_memory import Watch, report_parts, watched_step
from model import Config, Model, rope_table
from sim import Plan
from test_train import TINY as SMALL_RUN
from test_train import at, losses, refusal, run, text  # noqa: F401
from test_parallel import on_ranks
from test_grid import DEEP, PLAN, batches_of, build, equals_one_process, folder, name_of  # noqa: F401

FINE = ("norm", "mla_up", "act", "permute", "expert")
PARTS, CHOOSE = (*FINE, "attention"), random.Random(0)
SETS = [(item,) for item in (*PARTS, "layer")] + [tuple(CHOOSE.sample(PARTS, CHOOSE.randint(2, 5))) for _ in range(10)]


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def step(plan, config):
    """Loss, gradients and loads of one step on one process."""
    model, grid = build(config, plan)
    batches, loss_tokens = batches_of(config, plan, PLAN)
    model.aux_scale = 1 / plan.n_micro
    out = parallel.Pipeline(model, plan, grid).step(batches, loss_tokens)
    return out.total_loss, {name: p.grad for name, p in model.named_parameters()}, model.pop_stats()["loads"]


SHALLOW = replace(DEEP, num_hidden_layers=2, balance_group=1)
AFTER = dict(expert_weight="after_down", capacity_factor=1.0)
PAIRED = dict(schedule="paired", overlap="adaptive")
CASES = [(dict(), AFTER), (PAIRED, AFTER),
         *(pytest.param(axes, {}, marks=pytest.mark.slow) for axes in (dict(), PAIRED))]


@pytest.mark.parametrize("axes, changes", CASES, ids=str)
def test_gradients_are_those_of_the_plain_run(axes, changes):
    """Bit for bit, with loads counted once, for every item and for sets of them, beside swapped tensors."""
    plan, config = replace(PLAN, global_batch=3, seq_len=8, **axes), replace(SHALLOW, **changes)
    want = step(plan, config)
    for index, items in enumerate(SETS[:11]):
        swap = ("attn_out", "expert_out")[:index % 3]
        loss, grads, loads = step(replace(plan, recompute=items, swap=swap), config)
        assert torch.equal(loss, want[0]) and torch.equal(loads, want[2]), (items, swap)
        different = [name for name, grad in want[1].items() if not torch.equal(grad, grads[name])]
        assert not different, (items, swap, different)


def test_bf16_on_a_cpu():
    """The same losses, bit for bit, where operators on short inputs take another kernel without autograd."""
    recompute = ("norm", "mla_up", "act", "permute", "expert")
    plain, saving = (smoke.ten_steps(SHALLOW, torch.device("cpu"), torch.bfloat16, recompute=items)
                     for items in ((), recompute))
    assert plain == saving


def plans_over_ranks():
    one, two = replace(PLAN, sp=1), replace(PLAN, dp=4, ep=4, node_size=2, global_batch=16)
    yield replace(two, zero=3, recompute=FINE, swap=("attn_out",))
    yield replace(two, zero=3, recompute=("layer",))
    yield replace(two, dispatch="hierarchical", overlap="adaptive", schedule="paired", recompute=FINE)
    yield replace(two, dispatch="dedup", overlap="adaptive", schedule="paired", recompute=("layer",))
    yield replace(one, tp=2, dp=2, ep=4, zero=1, dispatch="hierarchical", node_size=2, recompute=FINE)
    yield replace(two, dispatch="dedup", zero=1, recompute=("permute", "attention"))
    yield replace(one, tp=2, dp=2, zero=3, recompute=("attention", "act"), swap=("attn_out",))
    yield replace(one, cp=2, dp=2, zero=3, recompute=("layer",))
    yield replace(two, dp=2, ep=2, pp=2, vpp=2, schedule="paired", zero=3, recompute=FINE, swap=("attn_out",))
    yield replace(two, dp=2, ep=2, pp=2, vpp=2, schedule="paired", overlap="adaptive", recompute=("layer",))


OVER_RANKS = [pytest.param(plan, id=f"{name_of(plan)}-{'+'.join(plan.recompute)}",
                           marks=[] if number < 5 else [pytest.mark.slow])
              for number, plan in enumerate(plans_over_ranks())]


@pytest.mark.parametrize("plan", OVER_RANKS)
def test_recomputing_over_ranks(folder, plan):  # noqa: F811
    config = replace(DEEP, balance_group=2 if plan.dp > 1 else 1, num_attention_heads=4)
    equals_one_process(folder, plan, config=config,
                       reference=replace(PLAN, micro_batch=plan.dp, global_batch=plan.global_batch))


# ---------------------------------------------------------------------------------------------------------------------
# Bytes

TINY = Config()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def kept_by_layer(config, plan, kind):
    """Bytes that a layer's forward leaves on the device and in the host's memory, seen through hooks."""
    model = Model(config).to(DTYPES[plan.precision])
    model.init_weights(0)
    memory, routing = parallel.Pipeline(model, plan).memory, {}
    watch = Watch(memory, model)
    angles = rope_table(config, torch.arange(plan.seq_len).unsqueeze(0), DTYPES[plan.precision])
    x = torch.randn(plan.micro_batch, plan.seq_len, config.hidden_size).to(DTYPES[plan.precision])
    with memory.hooks():
        out = model.layers["0" if kind == "dense" else "1"](x.requires_grad_(), angles, None, routing)
    of_model = {table.data_ptr() for table in angles}
    held = watch.held()
    away = held.pop("host", 0)
    here = sum(held.values()) - sum(note.whole.nbytes for note, _ in watch.alive()
                                    if note.whole is not None and note.whole.data_ptr() in of_model)
    if "layer" in plan.recompute:
        here += sum(ids.nbytes for ids in routing.values())                # noted, seen by no hook
    assert out.requires_grad
    return here, away


NORMS = [dict(norm=word) for word in Config.__dataclass_fields__["norm"].metadata["allowed"]["choices"]]


@pytest.mark.parametrize("precision", list(DTYPES))
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("changes", [dict(expert_weight="after_down", norm="pre"), *NORMS], ids=str)
def test_saved_bytes_are_those_that_sim_counts(precision, kind, changes):
    config = replace(TINY, **changes)
    shape = replace(sim.as_shape(config), value_padded=True)               # torch's CPU kernel pads
    for index, items in enumerate([(), *SETS]):                            # every item, and ten sets
        swap = ("attn_out", "expert_out")[:index % 3]
        plan = Plan(micro_batch=2, global_batch=2, seq_len=24, precision=precision, recompute=items, swap=swap)
        assert kept_by_layer(config, plan, kind) == sim.saved_bytes(sim.Work(shape, plan, kind)), \
            f"Work in sim.py counts other bytes with recompute={items}, swap={swap}: see Work.layer and what it calls"


def kept_and_counted(plan):
    """Bytes of one micro-batch on this rank's first stage: here and in the host's memory, seen and as sim.py counts."""
    model, grid = build(replace(TINY, balance="micro_batch"), plan)
    pipeline = parallel.Pipeline(model, plan, grid)
    batches, loss_tokens = batches_of(model.config, plan, plan)
    measured = watched_step(pipeline, batches[:1], loss_tokens)
    shape = replace(sim.as_shape(model.config), value_padded=True)
    kinds = sim.stage_kinds(shape, plan)[pipeline.stages[0]]
    counted = zip(*(sim.saved_bytes(sim.Work(shape, plan, kind)) for kind in kinds))
    host = measured.pop("host", 0)
    return (sum(measured.values()), host), tuple(map(sum, counted))


PAPER = dict(recompute=("mla_up", "act", "permute"), swap=("attn_out",))
WHOLE = [dict(axes, **items) for axes in (dict(), PAIRED, dict(tp=2, sp=1), dict(pp=2), dict(dp=2, ep=2))
         for items in (dict(), PAPER | dict(recompute=("norm", *PAPER["recompute"])), dict(recompute=("layer",)))]


@pytest.mark.parametrize("changes", WHOLE, ids=str)
def test_saved_bytes_of_a_whole_model(changes):
    """MTP, head and loss with the layers, also over ranks."""
    plan = replace(PLAN, global_batch=4, seq_len=64, precision="fp32", **changes)
    seen, counted = zip(*on_ranks(plan, kept_and_counted, plan))           # over ranks, as routing is uneven
    assert np.sum(seen, 0) == pytest.approx(np.sum(counted, 0), rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer in slices, and what a trainer's user sees


def test_optimizer_in_slices(monkeypatch):
    """Two steps with moments that wait in the host's memory: the same weights, bit for bit."""
    torch.manual_seed(0)
    models = [Model(SHALLOW) for _ in range(2)]
    monkeypatch.setattr(parallel, "STEP_BYTES", 2000)
    sliced = []
    monkeypatch.setattr(parallel.HostAdamW, "move_moments", count_calls(parallel.HostAdamW.move_moments, sliced))
    for model, kind in zip(models, (torch.optim.AdamW, parallel.HostAdamW)):
        model.init_weights(0)
        optimizer = kind(parallel.param_groups(model), lr=0.01, fused=True)
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.tensor(1.5)
            optimizer.step()
    assert len(sliced) > 40 and len(optimizer.param_groups) == 3
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models)))


def count_calls(function, calls):
    def call(*args):
        calls.append(args)
        return function(*args)
    return call


def test_run_that_recomputes_and_swaps(at, text):  # noqa: F811
    """The same losses as without."""
    common = *SMALL_RUN, "--data", text, "--steps", 4, "--precision", "fp32", "--heldout", 0.01
    run(*common, "--out", "plain")
    run(*common, "--out", "saving", *"--recompute norm,mla_up,act,permute --swap attn_out,optimizer".split())
    assert losses(at / "saving") == losses(at / "plain")


def test_bytes_by_part(capsys):
    """The report of tests/bench_memory.py: each part of the model keeps what sim.py counts for it."""
    report_parts(TINY, Plan(micro_batch=2, global_batch=2, seq_len=64, precision="fp32", recompute=FINE[:4],
                            swap=("attn_out",)))
    rows = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]]
    assert {"host", "attention", "experts"} < {part.strip() for part, *_ in rows}
    for part, measured, counted in rows:
        assert float(measured) == pytest.approx(float(counted), rel=0.02, abs=0.01), part


def test_fit(at, text, capsys):  # noqa: F811
    """A budget between what nothing saved and everything saved needs; one that cannot work."""
    plan = train.make_plan(train.settings_of(vars_of(SMALL_RUN)) | dict(precision="fp32"))
    config = train.make_config(train.settings_of(vars_of(SMALL_RUN)))
    needs = [sim.predict(config, replace(plan, recompute=recompute, swap=swap), sim.CPU)["mem_gib"] * 1024
             for recompute, swap in sim.memory_choices(config)]
    budget = (sim.predict(config, plan, sim.CPU)["mem_gib"] * 1024 + min(needs)) / 2
    common = *SMALL_RUN, "--data", text, "--steps", 2, "--precision", "fp32", "--heldout", 0.01
    run(*common, "--out", "fitted", "--fit", f"{budget:.6f}MiB")
    stored = json.loads((at / "fitted" / "config.json").read_text())["plan"]
    chosen = sim.predict(config, replace(plan, recompute=stored["recompute"], swap=stored["swap"]), sim.CPU)
    assert chosen["mem_gib"] * 1024 <= budget and stored["recompute"] + stored["swap"]
    assert "GiB too much: use" in refusal(capsys, *common, "--out", "none", "--fit", f"{min(needs) - 1:.6f}MiB")
    assert "write a number and GiB or MiB" in refusal(capsys, *common, "--out", "none", "--fit", "lots")


def test_plan_that_is_not_run(at, text, capsys):  # noqa: F811
    """Refused by the trainer in one line, as whatever was typed."""
    message = refusal(capsys, *SMALL_RUN, "--data", text, "--vpp", 2, "--schedule", "interleaved", "--out", "none")
    assert "vpp=2 with pp=1" in message and "use vpp=1" in message


def vars_of(words):
    return train.parse(["pretrain", *words])[1]
