"""
Tests of parallel.py: many processes equal one. Ranks are forked once per world size (dist.py) and talk through gloo.

Exact comparisons run in float64: loss, every gradient, the global norm and every weight after one AdamW step.
"""
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

import dist
import paper
import parallel
import sim
from model import PRESETS, Config, Model, shifted
from sim import EXCHANGES, Plan, exchange_bytes
from traffic import Traffic

TINY = Config(
    vocab_size=64, hidden_size=24, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2, q_lora_rank=8,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=64,
    n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, rope_theta=100.0, balance_group=4,
    aux_loss_alpha=0.3)
PLAN = Plan(micro_batch=1, global_batch=8, seq_len=12, precision="fp64", zero=0)      # of one process
DTYPES = dict(fp64=torch.float64, fp32=torch.float32, bf16=torch.float32)
EXACT = 1e-9                               # float64, relative to a tensor's largest value


@pytest.mark.parametrize("local_rank, current", [(None, 0), ("3", 3), ("9", 1)])
def test_each_rank_of_a_node_has_its_own_accelerator(monkeypatch, local_rank, current):
    """torchrun's LOCAL_RANK counts the node's; beyond them (each rank sees one of its own) it goes round."""
    chosen = []
    for name, value in dict(is_available=lambda: True, device_count=lambda: 8, set_device=chosen.append).items():
        monkeypatch.setattr(torch.cuda, name, value)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert parallel.pick_device("auto").type == "cuda" and chosen == [current]


@pytest.mark.parametrize("amx, precision", [(True, "bf16"), (False, "fp32")])
def test_precision_is_bf16_where_that_is_fast(monkeypatch, amx, precision):
    monkeypatch.setattr(parallel, "has_amx", lambda: amx)
    assert parallel.auto_precision(torch.device("cpu")) == precision
    assert parallel.auto_precision(torch.device("cuda")) == "bf16"


def test_what_torch_does_not_publish_is_there():
    assert isinstance(parallel.has_amx(), bool)
    tensors = [torch.randn(3, 4), torch.randn(5)]
    assert torch.equal(parallel.norms_of(tensors), torch.stack([tensor.norm() for tensor in tensors]))


# ---------------------------------------------------------------------------------------------------------------------
# One step, on one process or on many


def build(config, plan, seed=5):
    model = Model(config).to(DTYPES[plan.precision])
    model.compute_dtype = torch.bfloat16 if plan.precision == "bf16" else None
    grid = parallel.parallelize(model, plan)
    parallel.init_weights(model, seed)
    return model, grid


def batch(config, plan):
    """ids (B,T) and targets (B,1+MTP,T) of a whole global batch, some targets ignored."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (plan.global_batch, plan.seq_len), generator=generator)
    targets = shifted(tokens, range(1, 2 + config.num_nextn_predict_layers), -100)
    targets[0, :, :5] = -100
    return tokens, targets


def forced_routing(config, plan, experts):
    """Layer -> ids (B,T,K): every token of the global batch goes to the same few experts."""
    first, last = config.first_k_dense_replace, config.num_hidden_layers + config.num_nextn_predict_layers
    ids = torch.tensor(experts).repeat(plan.global_batch, plan.seq_len, 1)
    return {layer: ids for layer in range(first, last)}


def step(model, grid, plan, batch_plan, experts=None, optimizer=None):
    """Forward, backward, AdamW on this rank's share: total loss of all ranks, global norm, gradients, optimizer."""
    tokens, targets = batch(model.config, batch_plan)
    forced = forced_routing(model.config, batch_plan, experts) if experts else {}
    loss_tokens = (targets != -100).sum((0, 2)).to(DTYPES[plan.precision])
    model.aux_scale = 1 / (plan.n_micro * plan.dp)
    total = torch.zeros(())
    for micro in range(plan.n_micro):
        # one after the other over ranks, so that the sequences of a balance group are neighbours
        start = (micro * plan.dp + parallel.rank() % plan.dp) * plan.micro_batch
        mine = slice(start, start + plan.micro_batch)
        routing = {layer: ids[mine] for layer, ids in forced.items()} or None
        parallel.reduce_gradients(model, plan, last=micro == plan.n_micro - 1)
        out = model(tokens[mine], targets=targets[mine], loss_tokens=loss_tokens, routing=routing)
        out.total_loss.backward()
        total = total + out.total_loss.detach()
    norm = parallel.grad_norm(model, grid)
    optimizer = optimizer or torch.optim.AdamW(parallel.param_groups(model), lr=0.01)
    grads = {name: p.grad for name, p in model.named_parameters()}
    optimizer.step()
    return parallel.all_sum(total), norm, grads, optimizer


@lru_cache(None)
def one_process(folder, config, plan, experts=None):
    """File with what a step gives on one process: loss, norm, gradients, new weights."""
    model, grid = build(config, plan)
    loss, norm, grads, _ = step(model, grid, plan, plan, experts)
    path = folder / f"{len(list(folder.iterdir()))}.pt"
    torch.save((loss, norm, grads, dict(model.named_parameters())), path)
    return path


def part_of(whole, name, like, model):
    """What this rank holds of a tensor of the whole model."""
    if ".experts." in name:
        first = model.get_submodule(name.rpartition(".")[0]).first_expert
        whole = whole[first:first + len(like)]
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def relative_error(whole, name, got, model):
    """Largest difference, over the largest value of the whole tensor."""
    difference = (parallel.local(got) - part_of(whole, name, got, model)).abs()
    return (difference.max() / whole.abs().max().clamp(min=1e-6)).item() if difference.numel() else 0.0


def errors(path, model, loss, norm, grads):
    """Errors of a rank against one_process's file: by name, for all that differs most."""
    want_loss, want_norm, want_grads, want_weights = torch.load(path)
    assert set(grads) == set(want_grads), "other parameters than on one process"
    found = dict(loss=abs(loss / want_loss - 1).item(), norm=abs(norm / want_norm - 1).item())
    for name, weight in model.named_parameters():
        found["gradient of " + name] = relative_error(want_grads[name].detach(), name, grads[name], model)
        found["step of " + name] = relative_error(want_weights[name].detach(), name, weight.detach(), model)
    return found


def check_step(path, config, plan, batch_plan, experts=None):
    """On each rank: one step under the plan against one process; the worst error."""
    model, grid = build(config, plan)
    loss, norm, grads, _ = step(model, grid, plan, batch_plan, experts)
    found = errors(path, model, loss, norm, grads)
    return max(found.values()), max(found, key=found.get)


def on_ranks(plan, function, *args):
    """Results of all ranks; a plan for one process runs here."""
    return dist.run(plan.world_size, function, *args) if plan.world_size > 1 else [function(*args)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("one_process")


def equals_one_process(folder, plan, config=TINY, experts=None, reference=PLAN, tolerance=EXACT):
    path = one_process(folder, config, reference, experts)
    for error, name in dist.run(plan.world_size, check_step, path, config, plan, reference, experts):
        assert error <= tolerance, f"{name}: {error:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# Every exchange and every zero equals one process

WHOLE = replace(PLAN, micro_batch=8)                                      # one process, one micro-batch


def plans():
    """ep 1, 2, 4 on 4 ranks and 8 on 8; nodes such that ep=2 spans two of one rank, ep=4 two of two, ep=8 two of four.
    Each ep meets each exchange and each zero in the fast tests; all three together in the slow ones."""
    for ep in (1, 2, 4, 8):
        for dispatch in EXCHANGES[:1] if ep == 1 else EXCHANGES:
            for zero in (0, 1, 3):
                dp = max(4, ep)
                plan = replace(PLAN, dp=dp, ep=ep, dispatch=dispatch, zero=zero, node_size=max(1, ep // 2),
                               micro_batch=8 // dp)
                fast = ep == 1 or (dispatch, zero) in (("flat", 0), ("hierarchical", 3), ("dedup", 1))
                yield pytest.param(plan, id=f"ep{ep}-{dispatch}-zero{zero}", marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize("plan", list(plans()))
def test_exchange_and_zero(folder, plan):
    """MTP and balance loss over groups of 4 sequences included; 3 of 8 experts a token, so nodes repeat."""
    equals_one_process(folder, plan, reference=WHOLE)


TWO_NODES = replace(PLAN, dp=4, ep=4, node_size=2, zero=1, micro_batch=2)      # 2 nodes of 2 ranks, 2 experts a rank


@pytest.mark.parametrize("dispatch", EXCHANGES)
@pytest.mark.parametrize("experts", [(0, 1, 0), (2, 5, 7), (6, 2, 3)], ids=str)
def test_uneven_routing(folder, dispatch, experts):
    """All tokens to the same few experts: ranks without a token, empty experts, an expert twice, a node not needed."""
    plan = replace(TWO_NODES, dispatch=dispatch)
    equals_one_process(folder, plan, experts=experts, reference=WHOLE)


def note_routing(plan):
    """The choice that a forward notes, and whether a second one that is forced to it gives the same loss."""
    model, grid = build(TINY, plan)
    tokens, targets = batch(TINY, WHOLE)
    mine = slice(parallel.rank() * 2, parallel.rank() * 2 + 2)
    noted = {}
    first = model(tokens[mine], targets=targets[mine], routing=noted).loss
    again = model(tokens[mine], targets=targets[mine], routing=dict(noted)).loss
    return noted, first.item() == again.item()


def test_routing_is_noted_under_fsdp():
    """FSDP's hooks copy plain dicts on their way into a block."""
    whole, _ = build(TINY, WHOLE)
    tokens, targets = batch(TINY, WHOLE)
    want = {}
    whole(tokens, targets=targets, routing=want)
    for rank, (noted, same) in enumerate(dist.run(4, note_routing, replace(TWO_NODES, zero=3))):
        assert same and set(noted) == set(want)
        assert all(torch.equal(noted[layer], ids[2 * rank:2 * rank + 2]) for layer, ids in want.items())


@pytest.mark.parametrize("dispatch", EXCHANGES)
def test_fast_path(folder, dispatch):
    """float32, where experts run on torch's grouped matmul and the other fused bodies."""
    plan = replace(TWO_NODES, dispatch=dispatch, precision="fp32")
    equals_one_process(folder, plan, reference=replace(WHOLE, precision="fp32"), tolerance=2e-4)


def check_bf16(path, plan, batch_plan):
    model, grid = build(TINY, plan)
    routers = [block.mlp.gate for block in model.layers.values() if block.is_moe]
    seen = []
    for router in routers:
        router.register_forward_pre_hook(lambda part, _: seen.append(part.weight.dtype))
    loss, norm, grads, _ = step(model, grid, plan, batch_plan)
    want_loss, want_norm, _, _ = torch.load(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32} == {parallel.local(g).dtype for g in grads.values()}
    assert seen == [torch.float32] * len(routers), seen
    return abs(loss / want_loss - 1).item(), abs(norm / want_norm - 1).item()


@pytest.mark.parametrize("zero", (0, 3))
def test_bf16(folder, zero):
    """bfloat16 activations and gathered weights; masters, gradients and the router stay float32."""
    plan = replace(TWO_NODES, dispatch="hierarchical", precision="bf16", zero=zero, ep=2, node_size=1)
    path = one_process(folder, TINY, replace(WHOLE, precision="bf16"))
    for loss, norm in dist.run(4, check_bf16, path, plan, WHOLE):
        assert loss < 3e-3 and norm < 3e-2, (loss, norm)


CASES = dict(
    accumulation=(dict(balance_group=2), dict(micro_batch=1), replace(PLAN, micro_batch=2)),
    accumulation_zero3=(dict(balance_group=2), dict(micro_batch=1, zero=3), replace(PLAN, micro_batch=2)),
    accumulation_zero0=(dict(balance_group=2), dict(micro_batch=1, zero=0, ep=2), replace(PLAN, micro_batch=2)),
    capacity=(dict(balance_group=1, capacity_factor=0.7), dict(micro_batch=1, dispatch="flat"), PLAN),
    capacity_two_hops=(dict(balance_group=1, capacity_factor=1.0), dict(micro_batch=1, dispatch="dedup"), PLAN),
    own_sequences=(dict(balance="sequence", balance_group=1), dict(), WHOLE),
    all_sequences=(dict(balance="dp_group", balance_group=8), dict(ep=2), WHOLE),
    router_bias_and_groups=(dict(router_bias=True, n_group=4, topk_group=2), dict(), WHOLE),
    after_down=(dict(expert_weight="after_down", num_nextn_predict_layers=2), dict(), WHOLE),
    tied_no_shared=(dict(tie_word_embeddings=True, n_shared_experts=0), dict(zero=3), WHOLE),
    expert_dimension_cut=(dict(moe_intermediate_size=15, hidden_size=21), dict(ep=1, zero=3), WHOLE),
    no_experts=(dict(first_k_dense_replace=2, num_nextn_predict_layers=0), dict(ep=1, zero=3), WHOLE),
)


@pytest.mark.parametrize("case", CASES)
def test_settings(folder, case):
    """Config, plan and the one process it must equal; where micro-batches matter, the process runs the same ones."""
    config, plan, reference = CASES[case]
    plan = replace(TWO_NODES, **{"dispatch": "hierarchical", **plan})
    equals_one_process(folder, plan, config=replace(TINY, **config), reference=reference)


def test_size_one(folder):
    """The same code with groups of size one: a plan for one process needs no process group and changes nothing."""
    model, grid = build(TINY, WHOLE)
    assert grid is None
    path = one_process(folder, TINY, WHOLE)
    loss, norm, grads, _ = step(model, grid, WHOLE, WHOLE)
    assert max(errors(path, model, loss, norm, grads).values()) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def send_tokens(config, plan, ids):
    """Bytes that this rank sends for one layer, forward and backward, with the ids (ranks, N, K) given."""
    grid = parallel.Grid(plan)
    dispatcher = grid.dispatcher(config)
    x = torch.randn(ids.size(1), config.hidden_size, dtype=DTYPES[plan.precision], requires_grad=True)
    weights = torch.rand(ids.shape[1:], requires_grad=True)
    with Traffic(plan.node_size) as traffic:
        rows, row_weights, counts, ctx = dispatcher.dispatch(x, ids[parallel.rank()], weights)
        rows, row_weights = dispatcher.wait(rows, row_weights, ctx)
        assert len(rows) == counts.sum()
        dispatcher.combine(rows * row_weights.unsqueeze(1), ctx).sum().backward()
    return traffic.bytes


@pytest.mark.parametrize("dispatch", EXCHANGES)
@pytest.mark.parametrize("ep,node_size", [(2, 2), (4, 1), (4, 2), (8, 2), (8, 4)])
def test_bytes_are_those_that_sim_predicts(dispatch, ep, node_size):
    generator = torch.Generator().manual_seed(ep)
    config = replace(TINY, n_routed_experts=16, num_experts_per_tok=2)
    plan = replace(PLAN, dp=ep, ep=ep, node_size=node_size, dispatch=dispatch, precision="fp32")
    ids = torch.rand(ep, plan.seq_len, 16, generator=generator).topk(2).indices
    want = exchange_bytes(config, plan, ids.tolist())
    for rank, sent in enumerate(dist.run(ep, send_tokens, config, plan, ids)):
        for (way, tier), n_bytes in sent.items():
            counted = want[way][tier][rank]
            assert n_bytes == counted, (f"rank {rank} sends {n_bytes} bytes {way}, {tier}; exchange_bytes in sim.py "
                                        f"counts {counted}: see routed_rows, bytes_to_peer and Plan.goes_directly")


def count_step(config, plan):
    """Bytes of one step, and of all weights."""
    model, grid = build(config, plan)
    with Traffic(plan.node_size) as traffic:
        step(model, grid, plan, WHOLE)
    return traffic.bytes, sum(p.numel() * p.itemsize for p in model.parameters())


@pytest.mark.parametrize("zero", (0, 1, 3))
def test_all_traffic_under_a_flag(zero):
    """Data parallelism alone over two ranks of a node. zero=0: gradients are summed and come back, in an all-reduce.
    zero=1: a reduce-scatter of gradients and a gathering of weights. zero=3 gathers the blocks' weights twice."""
    plan = replace(PLAN, dp=2, ep=1, micro_batch=4, zero=zero)
    config = replace(TINY, hidden_size=32, num_attention_heads=4)          # every tensor's first dimension is even
    for total, weights in dist.run(2, count_step, config, plan):
        assert total["forward", "outer"] == total["backward", "outer"] == 0
        if zero == 0:
            assert abs(total["backward", "inner"] / weights - 1) < 0.02    # some small sums besides
        else:
            assert abs(total["forward", "inner"] / (weights / 2) - 1) < 0.02
            again = total["backward", "inner"] / (weights / 2) - 1
            assert abs(again) < 0.02 if zero == 1 else 0.5 < again < 1


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("tc"), reason="namespaces need root, iproute2")
def test_bench_exchange_runs():
    script = Path(__file__).parent / "bench_exchange.py"
    result = subprocess.run([sys.executable, script, "--tiny"], capture_output=True, text=True)
    assert result.returncode == 0 and "dedup" in result.stdout, result.stderr
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert "node0-" not in left and "node1-" not in left


# ---------------------------------------------------------------------------------------------------------------------
# Start, refusals


def check_start(plans):
    """Every tensor's numbers under each plan are this rank's part of model.init_weights'; a NaN would be left."""
    whole = Model(TINY)
    whole.init_weights(3)
    want = whole.state_dict()
    for plan in plans:
        with torch.device("meta"):
            model = Model(TINY)
        parallel.parallelize(model, plan)
        model.to_empty(device="cpu")
        for tensor in model.state_dict().values():
            parallel.local(tensor).fill_(float("nan"))
        parallel.init_weights(model, 3)
        for name, tensor in model.state_dict().items():
            assert torch.equal(parallel.local(tensor), part_of(want[name], name, tensor, model)), name


def test_same_start_under_every_plan():
    """Built on the meta device, as large models are."""
    plan = replace(PLAN, dp=4, node_size=2, precision="fp32")
    dist.run(4, check_start, [replace(plan, ep=ep, zero=zero) for ep, zero in ((1, 0), (2, 3), (4, 1))])


def refusal(plan):
    with pytest.raises(ValueError) as caught:
        parallel.parallelize(Model(TINY), plan)
    return str(caught.value)


@pytest.mark.parametrize("plan,words", [
    (replace(PLAN, dp=4), "for 2 devices: use dp=2"),
    (replace(PLAN, dp=2, ep=4, micro_batch=2), "ep=4 does not divide"),
    (replace(PLAN, dp=2, recompute=("all",)), "use one of norm"),
    (replace(PLAN, dp=2, precision="fp8"), "fp32 or bf16"),
    (replace(PLAN, dp=2, vpp=2, schedule="interleaved"), "use vpp=1")])
def test_refused_before_anybody_waits(plan, words):
    """Every rank refuses by itself, in one line."""
    for message in dist.run(2, refusal, plan):
        assert words in message and "\n" not in message


def test_ranks_that_do_not_answer_are_named(monkeypatch):
    """Rank 1 died before it said anything, rank 2 answers, rank 0 asks and answers; who asks later hears the same."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    for name, value in dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port, TORCHELASTIC_RESTART_COUNT=0, RANK=0,
                            WORLD_SIZE=3).items():
        monkeypatch.setenv(name, str(value))
    parallel.open_store(timedelta(seconds=60)).set("here: 2", "")
    threading.Thread(target=parallel.answer_roll_call, daemon=True).start()
    assert parallel.missing_ranks(patience=1.5) == parallel.missing_ranks() == "1"


def test_what_gloo_says_of_a_lost_rank_is_known(monkeypatch):
    """Its words, as torch 2.13 raises them when a rank is stopped, beside an error of another kind."""
    said = ["[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv "
            "operation to complete", "Application timeout caused pair closure"]
    assert not parallel.is_lost_contact(RuntimeError(said[0]))            # with no other rank there is none to lose
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert all(parallel.is_lost_contact(RuntimeError(words)) for words in said)
    assert not parallel.is_lost_contact(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_processes_that_never_meet(monkeypatch):
    """Rank 0 is up, rank 2 never comes; then nobody is: a line each, in --timeout seconds."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    for name, value in dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port, TORCHELASTIC_RESTART_COUNT=0, RANK=1,
                            WORLD_SIZE=3).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConnectionError, match="rank 1: not all 3 processes came in 1 s"):
        parallel.join_world(torch.device("cpu"), timedelta(seconds=1))
    del store
    with pytest.raises(ConnectionError, match="no answer from torchrun's first machine at 127.0.0.1"):
        parallel.join_world(torch.device("cpu"), timedelta(seconds=1))
    assert not torch.distributed.is_initialized()


def check_first_does():
    """[when this rank began, when it had heard of rank 0's work, its answer]; rank 1 comes late."""
    parallel.first_does(lambda: None)                                     # connects the ranks
    heard, all_sum = [], parallel.all_sum

    def noting(x):
        heard.append(time.monotonic())
        return all_sum(x)

    if parallel.rank() == 1:
        time.sleep(3)
    began = time.monotonic()
    with mock.patch.object(parallel, "all_sum", noting):
        answer = parallel.first_does(lambda: 7)
    return began, heard[0], answer


def test_a_rank_that_stands_still_keeps_none_from_hearing_of_the_first():
    """They go on to a collective that has a timeout."""
    began, heard, answers = zip(*dist.run(4, check_first_does))
    assert answers == (7,) * 4 and all(heard[rank] < began[1] for rank in (0, 2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints under other plans


def save_after_step(folder, plan):
    model, grid = build(TINY, plan)
    *_, optimizer = step(model, grid, plan, WHOLE)
    saver = parallel.Saver(folder, 2)
    saver.save(parallel.train_state(model, optimizer), dict(step=1), grid)
    optimizer.zero_grad()
    step(model, grid, plan, WHOLE)                                        # goes on while the file is written
    saver.wait()


def check_resumed_step(folder, path, plan):
    """The second step after loading, against the second step of one process; worst error, progress."""
    model, grid = build(TINY, plan, seed=6)
    optimizer = torch.optim.AdamW(parallel.param_groups(model), lr=0.01)
    progress = dict(step=0)
    parallel.restore(folder / "step_1", model, optimizer, progress, grid)
    loss, norm, grads, _ = step(model, grid, plan, WHOLE, optimizer=optimizer)
    return max(errors(path, model, loss, norm, grads).values()), progress["step"]


def two_steps(folder):
    """File with the second step of one process."""
    model, _ = build(TINY, WHOLE)
    *_, optimizer = step(model, None, WHOLE, WHOLE)
    optimizer.zero_grad()
    loss, norm, grads, _ = step(model, None, WHOLE, WHOLE, optimizer=optimizer)
    torch.save((loss, norm, grads, dict(model.named_parameters())), folder / "two_steps.pt")
    return folder / "two_steps.pt"


WRITERS = dict(one=WHOLE, ep4=replace(TWO_NODES, dispatch="dedup"), zero3=replace(TWO_NODES, ep=1, zero=3),
               ep2_zero0=replace(TWO_NODES, ep=2, zero=0))
READERS = (WHOLE, TWO_NODES, replace(PLAN, dp=2, ep=2, micro_batch=4, zero=3), replace(TWO_NODES, ep=2, zero=3))


def moves():
    """Each writer with two readers, and each reader with two writers; the other pairs in the slow tests."""
    for number, writer in enumerate(WRITERS):
        readers = READERS[number:] + READERS[:number]
        yield pytest.param(writer, readers[1:3], id=f"{writer}")
        yield pytest.param(writer, readers[:1] + readers[3:], id=f"{writer}-others", marks=pytest.mark.slow)


@pytest.mark.parametrize("writer, readers", list(moves()))
def test_checkpoints_move_between_plans(tmp_path, writer, readers):
    """Written by 1 or 4 ranks, read by 1, 2 and 4 under other plans: the next step is one process's."""
    path, plan = two_steps(tmp_path), WRITERS[writer]
    on_ranks(plan, save_after_step, tmp_path / "ckpt", plan)
    for reader in readers:
        for error, step_number in on_ranks(reader, check_resumed_step, tmp_path / "ckpt", path, reader):
            assert error <= EXACT and step_number == 1, (reader, error)


def test_every_rung_of_the_papers_ladder_is_a_plan_that_runs():
    """What `python sim.py` times from the baseline up is neither refused by the model nor left to the simulator."""
    changes = dict(seq_len=4096)
    for change in paper.LADDER.values():
        changes |= change
        settings = sim.PAPER["baseline"]["plan"] | changes
        settings.pop("max_vio", None)
        plan = sim.Plan(**settings)
        sim.check_plan(PRESETS["pangu-ultra-moe-718b"], plan, devices=plan.world_size)
        parallel.refuse_what_is_not_run(plan)
        schedules = plan.schedule, plan.overlap
    assert schedules == ("paired", "adaptive")
