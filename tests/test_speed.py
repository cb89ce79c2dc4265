"""
What makes model.py fast changes no result: compiled operators, compiled layers, a CPU's attention in bfloat16. And what
would make it slow does not happen: compiling anew for new numbers of rows, a host that waits for its GPU.
"""
import json
import multiprocessing
import warnings
from types import SimpleNamespace

import pytest
import torch

import model as M
import train
from model import Model
from sim import Plan
from test_model import EXACT, OPERATORS, TOLERANCE, assert_close, batch, random_tensor, run_operator
from test_train import TINY, at, losses, refusal, run, text  # noqa: F401

ELEMENTWISE = [name for name in OPERATORS if name.startswith(("rms_norm", "swiglu"))]


@pytest.fixture
def compiled(monkeypatch):
    """Operators through torch.compile, for one test."""
    monkeypatch.setattr(M, "COMPILED", False)                             # remembered, and put back at the end
    why_not = M.compile_operators()
    if why_not:
        pytest.skip(why_not)


def graphs():
    """Pieces of code that torch.compile has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ---------------------------------------------------------------------------------------------------------------------
# Operators through torch.compile


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_compiled_operators_equal_their_formulas(dtype, compiled):
    before = graphs()
    for name in ELEMENTWISE:
        ours, formula, inputs = OPERATORS[name]
        inputs = [x.to(dtype) for x in inputs]
        expected = run_operator(formula, inputs, torch.float64)
        for i, (mine, right) in enumerate(zip(run_operator(ours, inputs, dtype), expected)):
            assert_close(mine, right, f"{name}, result {i}", TOLERANCE[dtype])
    assert (graphs() == before) == (dtype == torch.float64)               # which is never compiled


def test_new_numbers_of_rows_compile_nothing_anew(compiled):
    """Experts get other numbers of rows at every step, also none at all."""
    def train_on(rows):
        gate_up, weights = random_tensor(rows, 48).float(), random_tensor(rows).float()
        run_operator(M.swiglu, [gate_up, weights], torch.float32)

    for rows in (0, 1, 50):                                               # torch.compile fixes 0 and 1, not the others
        train_on(rows)
    before = graphs()
    for rows in (0, 1, 2, 7, 64, 1000):
        train_on(rows)
    assert graphs() == before


def test_a_forked_process_goes_on(compiled):
    """A process that has compiled, and computed with threads, may fork ranks."""
    def child(queue):
        torch.set_num_threads(1)
        run_operator(M.swiglu, [random_tensor(70, 48).float()], torch.float32)
        queue.put("done")

    run_operator(M.swiglu, [random_tensor(60, 48).float()], torch.float32)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    try:
        assert queue.get(timeout=120) == "done"
    finally:
        process.kill()


# ---------------------------------------------------------------------------------------------------------------------
# train.py --compile


@pytest.mark.slow
def test_a_compiled_run(at, text, compiled, capsys):  # noqa: F811
    """auto becomes operators, is stored and kept; the losses are the same within rounding; after the first steps
    nothing is compiled any more, and nothing was cut in pieces."""
    torch._dynamo.utils.counters["graph_break"].clear()
    common = *TINY, "--data", text, "--precision", "fp32", "--steps", 4, "--save-every", 2
    run(*common, "--out", "plain")
    run(*common, "--out", "r", "--compile", "auto")
    assert "the first step, which compiled operators, took" in capsys.readouterr().out
    assert json.loads((at / "r/config.json").read_text())["settings"]["compile"] == "operators"
    before = graphs()
    run("--resume", "r/ckpt/step_2")
    assert M.COMPILED and graphs() == before and not torch._dynamo.utils.counters["graph_break"]
    assert losses(at / "r") == pytest.approx(losses(at / "plain"), rel=1e-4)


def test_no_compiler_here(at, text, monkeypatch, capsys):  # noqa: F811
    """auto becomes none; what was compiled elsewhere goes on with --compile none alone."""
    monkeypatch.setattr(train, "compile_operators", lambda wanted, device: "no g++" if wanted else None)
    common = *TINY, "--data", text, "--steps", 2
    run(*common, "--out", "r", "--compile", "auto")
    config = json.loads((at / "r/config.json").read_text())
    assert config["settings"]["compile"] == "none"
    for wanted in ("operators", "layers"):
        assert "no g++; --compile none does without" in refusal(capsys, *common, "--out", "new", "--compile", wanted)
    config["settings"]["compile"] = "operators"
    (at / "r/config.json").write_text(json.dumps(config))
    assert "no g++; --compile none does without" in refusal(capsys, "--resume", "r", "--steps", 3)
    run("--resume", "r", "--steps", 3, "--compile", "none")
    assert len(losses(at / "r")) == 3


@pytest.mark.parametrize("found, device, stage, changes", [
    ("operators", "cpu", train.Pretrain, {}), ("layers", "cuda", train.Pretrain, {}), ("layers", "cuda", train.SFT, {}),
    ("operators", "cuda", train.RL, {}), ("operators", "cuda", train.Pretrain, dict(recompute=("act",))),
    ("operators", "cuda", train.Pretrain, dict(dp=2))], ids=str)
def test_what_auto_becomes(found, device, stage, changes, monkeypatch):
    monkeypatch.setattr(train, "compile_operators", lambda wanted, device: None)
    run = SimpleNamespace(settings=dict(compile="auto"), plan=Plan(**changes), device=torch.device(device), kind=stage)
    train.fix_compiled(run)
    assert run.settings["compile"] == found


@pytest.mark.parametrize("stage, changes", [(train.Pretrain, dict(swap=("optimizer",))), (train.RL, {})], ids=str)
def test_layers_where_they_are_not_for(stage, changes, monkeypatch):
    """Those of a run that goes on with another plan become operators; asked for, they are refused."""
    monkeypatch.setattr(train, "compile_operators", lambda wanted, device: None)
    run = SimpleNamespace(settings=dict(compile="layers"), plan=Plan(**changes), device=torch.device("cpu"),
                          kind=stage, given=dict(compile="layers"))
    with pytest.raises(train.UserError, match="use --compile operators"):
        train.fix_compiled(run)
    run.given = {}
    train.fix_compiled(run)
    assert run.settings["compile"] == "operators"


# ---------------------------------------------------------------------------------------------------------------------
# Whole layers through torch.compile


DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def two_models(config, dtype):
    """The same twice, of the second the layers compiled."""
    models = []
    for _ in range(2):
        model = Model(config)
        model.init_weights(0)
        models.append(model.to(DEVICE, dtype))
    M.compile_model(models[1])
    return models


def train_both(plain, compiled_layers, **inputs):
    """Four steps each, with the same losses -> the pieces compiled after each."""
    expected, _ = train_steps(plain, **inputs)
    values, pieces = train_steps(compiled_layers, **inputs)
    assert values == pytest.approx(expected, rel=1e-4 if plain.embed_tokens.weight.dtype == torch.float32 else 1e-2)
    return pieces


def train_steps(model, T=32, doc_ids=None):
    """Losses of four AdamW steps on other tokens each, and the pieces compiled after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    values, compiled_pieces = [], []
    for seed in range(4):
        ids, targets, _ = batch(model.config, B=2, T=T, seed=seed)
        model.aux_scale = 1 / (1 + seed)                                  # as when the global batch grows
        for _ in range(2):                                                # micro-batches
            out = model(ids.to(DEVICE), targets=targets.to(DEVICE), doc_ids=doc_ids)
            out.total_loss.backward()
        model.pop_stats()
        optimizer.step()
        optimizer.zero_grad()
        values.append(out.loss.item())
        compiled_pieces.append(graphs())
    return values, compiled_pieces


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_layers_train_like_others(dtype):
    """The same losses within rounding; after the first step nothing is compiled any more; layers share their code; and
    what is generated, with lengths that grow, compiles nothing."""
    plain, compiled_layers = two_models(M.Config(), dtype)
    before = graphs()
    pieces = train_both(plain, compiled_layers)
    assert pieces[0] == pieces[3] and pieces[3] - before < 30
    M.generate(compiled_layers.eval(), [torch.arange(5, device=DEVICE)], 3)
    assert graphs() == pieces[3]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(capacity_factor=1.0), dict(router_bias=True, balance="none")], ids=str)
def test_compiled_layers_with_the_experts_matmuls_in_the_trace(changes, monkeypatch):
    """As on a GPU in bfloat16, and then longer sequences, of documents: each size is one piece for each kind of layer,
    dense, with experts, and that of MTP."""
    monkeypatch.setattr(M, "grouped_kind", lambda x, *widths: "grouped")
    torch._dynamo.reset()                                                 # other tests' pieces
    plain, compiled_layers = two_models(M.replace(M.Config(), **changes), torch.bfloat16)
    before = graphs()
    assert train_both(plain, compiled_layers) == [before + 3] * 4
    doc_ids = (torch.arange(48, device=DEVICE) // 20).expand(2, 48)
    assert train_both(plain, compiled_layers, T=48, doc_ids=doc_ids) == [before + 6] * 4


# ---------------------------------------------------------------------------------------------------------------------
# Attention in bfloat16 on a CPU


def test_short_attention_in_parts_equals_all_at_once(monkeypatch):
    """Two of three heads at a time, then one."""
    inputs = [random_tensor(2, 5, 3, 16, seed=seed).bfloat16() for seed in range(3)]

    def attend(q, k, v):
        return M.attention(q, k, v, 0.3)

    whole = run_operator(attend, inputs, torch.bfloat16)
    monkeypatch.setattr(M, "SCORE_ELEMENTS", 50)
    for part, all_at_once in zip(run_operator(attend, inputs, torch.bfloat16), whole):
        assert_close(part, all_at_once, "attention", EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Waiting for a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can watch")
@pytest.mark.parametrize("balance", ["none", "ep_group"])
def test_a_dropless_step_never_waits_for_the_gpu(balance):
    """Forward, backward and a fused AdamW step, counted by torch's own watch."""
    model = Model(M.replace(M.Config(), balance=balance)).cuda()
    model.init_weights(0)
    model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids, targets, _ = (t.cuda() for t in batch(model.config, B=2, T=64))
    for _ in range(2):                                                    # the first step may allocate and look up
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            model(ids, targets=targets).total_loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    assert not waits, waits
