"""
Tests of the grid and the overlap: every axis, every schedule and combinations of them equal one process.
"""
import pkgutil
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dist
import parallel
import sim
from sim import Plan
from test_parallel import DTYPES, EXACT, TINY, batch, build, on_ranks, one_process, relative_error
from traffic import TIERS, Traffic, way_of_now

DEEP = replace(TINY, num_hidden_layers=5, balance_group=2)
PLAN = Plan(micro_batch=1, global_batch=8, seq_len=16, precision="fp64", zero=0)


def batches_of(config, plan, reference):
    """This rank's micro-batches, as arguments of Model.forward, and the target tokens of the global batch."""
    tokens, targets = batch(config, reference)
    batches = []
    for micro in range(plan.n_micro):
        # one after the other over ranks, so that the sequences of a balance group are neighbours
        start = (micro * plan.dp + parallel.data_rank(plan)) * plan.micro_batch
        mine = slice(start, start + plan.micro_batch)
        batches.append(dict(ids=tokens[mine], targets=targets[mine]))
    return batches, (targets != -100).sum((0, 2)).to(DTYPES[plan.precision])


def step(model, grid, plan, reference, optimizer=None):
    """Forward, backward, AdamW: total loss of all ranks, global norm, and the gradients."""
    batches, loss_tokens = batches_of(model.config, plan, reference)
    model.aux_scale = 1 / (plan.n_micro * plan.dp * plan.cp * plan.tp)
    total = parallel.Pipeline(model, plan, grid).step(batches, loss_tokens).total_loss
    norm = parallel.grad_norm(model, grid)
    optimizer = optimizer or torch.optim.AdamW(parallel.param_groups(model), lr=0.01)
    grads = {name: p.grad for name, p in model.named_parameters()}
    optimizer.step()
    return parallel.all_sum(total), norm, grads, optimizer


def check_step(path, config, plan, reference):
    """On each rank: one step under the plan against one process: the worst error, its name, and the names held here."""
    model, grid = build(config, plan)
    return *worst(path, model, *step(model, grid, plan, reference)[:3]), {name for name, _ in model.named_parameters()}


def worst(path, model, loss, norm, grads):
    """The worst error against one process's file, and its name."""
    want_loss, want_norm, want_grads, want_weights = torch.load(path)
    found = dict(loss=abs(loss / want_loss - 1).item(), norm=abs(norm / want_norm - 1).item())
    for name, weight in model.named_parameters():
        assert grads[name] is not None, f"{name} has no gradient"
        for what, whole, got in (("gradient of ", want_grads, grads[name]), ("step of ", want_weights, weight)):
            part = parallel.own_slice(model.get_submodule(name.rpartition(".")[0]), whole[name].detach())
            found[what + name] = relative_error(part, name, got.detach(), model)
    return max(found.values()), max(found, key=found.get)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("grid")


def equals_one_process(folder, plan, config=DEEP, reference=None):
    reference = reference or replace(PLAN, micro_batch=2)
    path = one_process(folder, config, reference)
    answers = dist.run(plan.world_size, check_step, path, config, plan, reference)
    for error, name, _ in answers:
        assert error <= EXACT, f"{name}: {error:.1e}"
    assert set().union(*(names for _, _, names in answers)) == set(torch.load(path)[2]), "parameters that no rank holds"


# ---------------------------------------------------------------------------------------------------------------------
# Pipeline


def pipelines():
    one = replace(PLAN, micro_batch=1)
    for pp in (1, 2, 4):
        for schedule, vpp in (("1f1b", 1), ("interleaved", 1), ("interleaved", 2), ("paired", 1), ("paired", 2)):
            if pp * vpp > 7 or pp < vpp:
                continue
            yield replace(one, pp=pp, vpp=vpp, schedule=schedule)
            if schedule == "paired":
                yield replace(one, pp=pp, vpp=vpp, schedule=schedule, overlap="adaptive")


def name_of(plan):
    sizes = [(axis, getattr(plan, axis)) for axis in ("pp", "vpp", "dp", "cp", "tp", "ep")]
    axes = "-".join(f"{axis}{size}" for axis, size in sizes if size > 1)
    return f"{axes or 'one'}-{plan.schedule}-{plan.overlap}-{plan.dispatch}-zero{plan.zero}"


@pytest.mark.parametrize("plan", list(pipelines()), ids=name_of)
def test_schedule(folder, plan):
    equals_one_process(folder, plan, config=replace(DEEP, balance_group=1), reference=PLAN)


def test_eight_stages_on_four_ranks(folder):
    config = replace(DEEP, balance_group=1, num_hidden_layers=8)
    plan = replace(PLAN, pp=4, vpp=2, schedule="paired", overlap="adaptive")
    equals_one_process(folder, plan, config=config, reference=PLAN)


@pytest.mark.parametrize("axes", [dict(dp=4, overlap="adaptive"), dict(pp=2, dp=4, zero=1), dict(tp=2, sp=1, pp=2)],
                         ids=str)
def test_model_without_experts(folder, axes):
    config = replace(DEEP, balance_group=1, first_k_dense_replace=5, num_nextn_predict_layers=0)
    equals_one_process(folder, replace(PLAN, **{"schedule": "", **axes}), config=config, reference=PLAN)


def check_bf16(path, config, plan, reference):
    model, grid = build(config, plan)
    loss, norm, *_ = step(model, grid, plan, reference)
    want_loss, want_norm, *_ = torch.load(path)
    return abs(loss / want_loss - 1).item(), abs(norm / want_norm - 1).item()


@pytest.mark.parametrize("axes", [
    dict(pp=2, overlap="adaptive"), dict(tp=2, sp=1),
    pytest.param(dict(tp=2, sp=1, pp=2, dp=2, ep=4), marks=pytest.mark.slow)], ids=str)
def test_bf16(folder, axes):
    """bfloat16 activations, sends and weights, float32 masters: within rounding of one process in bfloat16."""
    config, reference = replace(DEEP, balance_group=1), replace(PLAN, precision="bf16")
    path = one_process(folder, config, reference)
    plan = replace(reference, **{"schedule": "", **axes})
    for loss, norm in dist.run(plan.world_size, check_bf16, path, config, plan, reference):
        assert loss < 3e-3 and norm < 3e-2, (loss, norm)


# ---------------------------------------------------------------------------------------------------------------------
# Pipeline and overlap with experts, data ranks and zero


def combinations():
    two = replace(PLAN, dp=4, ep=4, node_size=2, overlap="adaptive", global_batch=16)
    for dispatch in sim.EXCHANGES:
        yield replace(two, dispatch=dispatch, schedule="paired")                     # on one pipeline rank
    two = replace(two, dp=2, ep=2, pp=2, zero=1, dispatch="hierarchical", node_size=1)
    yield replace(two, schedule="paired")
    yield replace(two, schedule="paired", vpp=2, layer_split=(1, 2, 1, 1))
    yield replace(two, schedule="paired", vpp=2, overlap="none", zero=3)
    yield replace(two, schedule="1f1b", overlap="none", zero=3, ep=1)
    # with everything: pp2 ep4 hierarchical paired adaptive zero 1
    yield replace(two, dp=4, ep=4, node_size=2, vpp=2, schedule="paired")


@pytest.mark.parametrize("plan", list(combinations()), ids=name_of)
def test_combination(folder, plan):
    equals_one_process(folder, plan, reference=replace(PLAN, micro_batch=4, global_batch=16))


# ---------------------------------------------------------------------------------------------------------------------
# What a trainer asks of a pipeline


def check_evaluation(path, config, plan, reference):
    """On each rank: loss without backward, then a step of half the micro-batches, then a whole step."""
    model, grid = build(config, plan)
    pipeline = parallel.Pipeline(model, plan, grid)
    batches, loss_tokens = batches_of(config, plan, reference)
    model.aux_scale = 1 / (plan.n_micro * plan.dp)
    losses = [pipeline.step(batches, loss_tokens, train=False)]
    assert all(p.grad is None for p in model.parameters()), "an evaluation left gradients"
    losses.append(pipeline.step(batches[:len(batches) // 2], loss_tokens))
    losses.append(pipeline.step(batches[len(batches) // 2:], loss_tokens, train=False))
    model.zero_grad()
    losses.append(pipeline.step(batches, loss_tokens))
    return [parallel.all_sum(out.total_loss).item() for out in losses], torch.load(path)[0].item()


@pytest.mark.parametrize("axes", [dict(pp=2), dict(pp=2, vpp=2, schedule="paired"), dict(overlap="adaptive"),
                                  dict(pp=2, dp=2, overlap="adaptive", zero=1)], ids=str)
def test_evaluation_and_other_numbers_of_micro_batches(folder, axes):
    plan, reference = replace(PLAN, **{"schedule": "", **axes}), replace(PLAN, micro_batch=1)
    path = one_process(folder, replace(DEEP, balance_group=1), reference)
    for (evaluated, first, second, whole), want in dist.run(plan.world_size, check_evaluation, path,
                                                            replace(DEEP, balance_group=1), plan, reference):
        assert evaluated == pytest.approx(want, rel=EXACT)
        assert whole == pytest.approx(want, rel=EXACT)
        assert first + second == pytest.approx(want, rel=EXACT)


def record_order(config, plan, reference):
    """Names of the collectives of one step, in the order in which this rank issues them, by group."""
    model, grid = build(config, plan)
    orders, names = {}, ("all_to_all", "all_gather", "reduce_scatter")
    plain = {name: getattr(parallel.Group, name) for name in names}

    def recorded(name):
        def call(group, x, *sizes, **more):
            members = tuple(torch.distributed.get_process_group_ranks(group.group))
            orders.setdefault(members, []).append((name, way_of_now(), x.dtype, x.shape[1:]))
            return plain[name](group, x, *sizes, **more)
        return call

    for name in names:
        setattr(parallel.Group, name, recorded(name))
    try:
        step(model, grid, plan, reference)
    finally:
        for name in names:
            setattr(parallel.Group, name, plain[name])
    return orders


@pytest.mark.parametrize("dispatch", sim.EXCHANGES)
def test_all_ranks_of_a_group_issue_their_collectives_in_one_order(dispatch):
    """A rank without a token too: routing is uneven, the order does not depend on it."""
    plan = replace(PLAN, pp=2, dp=4, ep=4, node_size=2, overlap="adaptive", schedule="", dispatch=dispatch,
                   global_batch=16)
    orders = dist.run(8, record_order, DEEP, plan, plan)
    for members in set().union(*orders):
        first, *others = [orders[rank][members] for rank in members]
        assert first and all(other == first for other in others)
    assert len(set().union(*orders)) == (2 if dispatch == "flat" else 8)


NOT_PUBLISHED = {                          # owner: names that parallel.py uses, listed there in one section
    "torch.distributed.pipelining.schedules": "_PipelineScheduleRuntime _Action FORWARD FULL_BACKWARD OVERLAP_F_B",
    "torch.distributed.pipelining.schedules._PipelineScheduleRuntime":
        "register_custom_function _prepare_schedule_with_comms step eval",
    "torch.distributed.pipelining.schedules._Action": "from_str computation_type stage_index microbatch_index "
                                                      "sub_actions",
    "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState": "_lazy_init _root_post_backward_final_callback",
    "torch.distributed.fsdp.fully_shard": "state"}


@pytest.mark.parametrize("owner", NOT_PUBLISHED)
def test_names_that_torch_does_not_publish_are_still_there(owner):
    found = pkgutil.resolve_name(owner)
    missing = [name for name in NOT_PUBLISHED[owner].split() if not hasattr(found, name)]
    assert not missing, f"{owner} of torch {torch.__version__} has no {missing}: see What torch does not publish"


def check_runtime(n_micro):
    """On each of two ranks: what perform is given, in order, and what came from the other rank, of stages that send
    their number and the micro-batch's."""
    me, given, received = torch.distributed.get_rank(), [], []

    def perform(parts):
        given.append(parts)
        for kind, stage, microbatch in parts:
            x = torch.full((2,), 10.0 * stage + microbatch)
            if kind == "F" and stage == 0:
                runtime.send_output(0, microbatch, x)
            elif kind == "F":
                received.append(runtime.received_input(1, microbatch).tolist())
            elif stage == 1:
                runtime.send_gradient(1, microbatch, x)
            else:
                received.append(runtime.received_gradient(0, microbatch).tolist())

    plan = replace(PLAN, pp=2, schedule="paired", global_batch=n_micro)
    table = sim.schedule_table(plan)
    x = torch.empty(2, device="meta", requires_grad=True)
    runtime = parallel.TorchRuntime([me], 2, table, n_micro, x, torch.device("cpu"), torch.distributed.group.WORLD,
                                    perform)
    runtime.step(train=True)
    return given == [[*map(tuple, action.parts())] for action in table[me]], received


def test_runtime_of_torch_runs_a_table_and_carries_tensors_both_ways():
    """What the section relies on: actions in our order, pairs as two parts, each tensor at the neighbour's request."""
    (first_in_order, gradients), (second_in_order, inputs) = dist.run(2, check_runtime, 3)
    assert first_in_order and second_in_order
    assert inputs == [[float(m)] * 2 for m in range(3)]
    assert gradients == [[10.0 + m] * 2 for m in range(3)]


def check_sharded_backward(plan):
    """FSDP2 without its hooks: a gradient stays here until it is told that the last backward is over."""
    model, _ = build(DEEP, plan)
    parallel.prepare_sharding(model)
    model.set_is_last_backward(True)
    for part in parallel.fsdp_parts(model):
        part.unshard()
    whole = model.layers["0"].self_attn.o_proj.weight
    whole.grad = torch.full_like(whole, 1.0 + torch.distributed.get_rank())
    parallel.end_sharded_backward(model)
    return parallel.local(model.layers["0"].self_attn.o_proj.weight.grad).unique().tolist()


def check_parts_elsewhere(plan):
    """Whether a rank's part of an expert's matrix is still the same memory, and the shape of the whole."""
    grid, own = parallel.Grid(plan, device_type="meta"), torch.empty(4, 2, 3)          # in place of an accelerator
    part = parallel.part_of_whole("layers.1.mlp.experts.down_proj", own, grid)
    return part.to_local().data_ptr() == own.data_ptr(), tuple(part.shape)


def test_parts_of_a_whole_stay_where_they_are():
    """As moments that wait with the host do, where the model is on an accelerator."""
    assert dist.run(2, check_parts_elsewhere, replace(PLAN, dp=2, ep=2)) == [(True, (8, 2, 3))] * 2


def test_end_of_a_sharded_backward_sums_gradients_over_ranks():
    assert dist.run(2, check_sharded_backward, replace(PLAN, dp=2, zero=1)) == [[3.0], [3.0]]


# ---------------------------------------------------------------------------------------------------------------------
# Tensor and context


def sequence_plans():
    """Each axis with experts and with others, and all together; slow: what those hold already."""
    for axes in (dict(cp=4, zero=1), dict(tp=2, ep=2), dict(cp=2, ep=2), dict(tp=2, pp=2), dict(cp=2, pp=2, zero=1),
                 dict(tp=4, ep=4, overlap="adaptive", schedule="paired", dispatch="dedup", node_size=2),
                 dict(tp=2, cp=2, dp=2, ep=4, zero=3)):
        yield replace(PLAN, sp=1, **axes)
    for axes in (dict(tp=2), dict(cp=2), dict(tp=4, zero=1), dict(tp=2, cp=2), dict(tp=2, dp=2, zero=3),
                 dict(cp=2, dp=2, zero=3), dict(tp=2, dp=2, ep=4, zero=1, dispatch="hierarchical", node_size=2)):
        yield pytest.param(replace(PLAN, sp=1, **axes), marks=pytest.mark.slow)


@pytest.mark.parametrize("plan", list(sequence_plans()), ids=name_of)
def test_sequence_over_ranks(folder, plan):
    config = replace(DEEP, balance_group=2 if plan.dp > 1 else 1, num_attention_heads=4)
    equals_one_process(folder, plan, config=config, reference=replace(PLAN, micro_batch=plan.dp))


@pytest.mark.parametrize("axes", [dict(tp=2), dict(tp=2, pp=2), dict(pp=2, dp=2, zero=1)], ids=str)
def test_tied_embedding(folder, axes):
    """Head and embedding are one matrix, cut by vocabulary or on two stages; also read by two MTP layers."""
    config = replace(DEEP, tie_word_embeddings=True, num_nextn_predict_layers=2, balance_group=1)
    equals_one_process(folder, replace(PLAN, sp=1, **axes), config=config, reference=PLAN)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def count_step(config, plan):
    """Bytes by tier that this rank sends in a step while the pipeline runs, and its parameters, router bias apart.
    Left out are the sums of gradients and the balance loss's few counts, which are not predicted there, and the votes
    of the pipeline's stages on shapes, in the first step."""
    with mock.patch.object(parallel, "shard"), mock.patch.object(parallel, "mean_over", lambda group, counts: counts):
        model, grid = build(config, plan)
    batches, loss_tokens = batches_of(config, plan, PLAN)
    own, E, K = batches[0]["ids"].shape, config.n_routed_experts, config.num_experts_per_tok
    ids = torch.arange(own.numel() * K).view(*own, K) % E                 # uniform
    batches = [batch | dict(routing={int(i): ids for i in model.layers}) for batch in batches]
    pipeline = parallel.Pipeline(model, plan, grid)
    pipeline.step(batches, loss_tokens)
    with Traffic(plan.node_size) as traffic, mock.patch.object(pipeline, "add_other_embedding"):
        pipeline.step(batches, loss_tokens)
    sent = {tier: traffic.bytes["forward", tier] + traffic.bytes["backward", tier] for tier in TIERS}
    return sent, sum(parallel.local(p).numel() for p in model.parameters())


@pytest.mark.parametrize("axes", [
    *(pytest.param(axes, marks=pytest.mark.slow) for axes in (
        dict(tp=2, sp=1), dict(tp=4, sp=1), dict(cp=4, node_size=1), dict(tp=2, sp=1, pp=2, node_size=2))),
    dict(tp=2, sp=1, cp=2, dp=2, ep=4, node_size=2, dispatch="hierarchical"),
    dict(tp=2, sp=1, pp=2, vpp=2, dp=2, ep=4, node_size=2, overlap="adaptive", schedule="paired")], ids=str)
def test_bytes_and_parameters_are_those_that_sim_predicts(axes):
    """All that travels while the pipeline runs, by tier, and what a rank holds without zero."""
    config = replace(DEEP, n_routed_experts=8, num_experts_per_tok=2, num_attention_heads=4, balance_group=1)
    plan = replace(PLAN, **{"schedule": "", **axes})
    run = sim.Simulation(config, plan, replace(sim.HARDWARE["ascend_910b_376"], peak=dict(fp64=1e12)))
    answers = dist.run(plan.world_size, count_step, config, plan)
    for tier, predicted in run.bytes_by_tier().items():
        mean = sum(sent[tier] for sent, _ in answers) / plan.world_size
        assert mean == pytest.approx(predicted, rel=1e-12), tier
    per_stage = plan.world_size // plan.pp
    assert [held for _, held in answers] == [sum(run.params[rank // per_stage].values())
                                             for rank in range(plan.world_size)]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints under other plans


def save_after_step(folder, config, plan, reference):
    model, grid = build(config, plan)
    optimizer = step(model, grid, plan, reference)[-1]
    saver = parallel.Saver(folder, 2)
    saver.save(parallel.train_state(model, optimizer), dict(step=1), grid)
    saver.wait()


def check_resumed_step(folder, path, config, plan, reference):
    """The second step after loading against the second step of one process: the worst error and its name."""
    model, grid = build(config, plan, seed=6)
    optimizer = torch.optim.AdamW(parallel.param_groups(model), lr=0.01)
    parallel.restore(folder / "step_1", model, optimizer, dict(step=0), grid)
    return worst(path, model, *step(model, grid, plan, reference, optimizer)[:3])


MOVES = [replace(PLAN, **axes) for axes in (
    dict(), dict(tp=2, sp=1, dp=2, ep=4, zero=3, node_size=2), dict(cp=2, pp=2, zero=1), dict(dp=4, ep=2, zero=1),
    dict(pp=2), dict(pp=2, vpp=2, schedule="paired", overlap="adaptive"), dict(tp=2, sp=1, zero=1))]


@pytest.mark.slow
@pytest.mark.parametrize("writer", MOVES, ids=name_of)
def test_checkpoints_move_between_any_two_plans(tmp_path, writer):
    move(tmp_path, writer, MOVES)


def test_checkpoints_move_between_tensor_pipeline_and_data(tmp_path):
    """The slow test moves on to more ranks."""
    move(tmp_path, MOVES[6], MOVES[2:3])
    move(tmp_path, MOVES[2], MOVES[6:])


def move(tmp_path, writer, readers):
    """Written under one plan, read under others: the next step is one process's."""
    config, whole = replace(DEEP, balance_group=1), PLAN
    model, _ = build(config, whole)
    optimizer = step(model, None, whole, whole)[-1]
    optimizer.zero_grad()
    loss, norm, grads, _ = step(model, None, whole, whole, optimizer)
    folder, steps = tmp_path / name_of(writer), tmp_path / "two_steps.pt"
    torch.save((loss, norm, grads, dict(model.named_parameters())), steps)
    on_ranks(writer, save_after_step, folder, config, writer, whole)
    for reader in readers:
        for error, name in on_ranks(reader, check_resumed_step, folder, steps, config, reader, whole):
            assert error <= EXACT, (reader, name, error)


@pytest.mark.parametrize("axes", [dict(pp=2), dict(pp=2, tp=2, sp=1, zero=1)], ids=str)
def test_embedding_on_two_stages_is_saved_once(tmp_path, axes):
    """The parts of the embedding in the files have as many elements as the whole, though MTP's stage holds it too."""
    plan = replace(PLAN, **axes)
    dist.run(plan.world_size, save_after_step, tmp_path, replace(DEEP, balance_group=1), plan, PLAN)
    saved = dcp.FileSystemReader(tmp_path / "step_1").read_metadata()
    name = "model.embed_tokens.weight"
    parts = [chunk.sizes.numel() for chunk in saved.state_dict_metadata[name].chunks]
    written = [where for where in saved.storage_data if where.fqn == name]
    assert sum(parts) == DEEP.vocab_size * DEEP.hidden_size and len(written) == len(parts)


def check_documents(config, plan):
    """Loss of a batch of packed documents with positions that restart, summed over ranks."""
    model, _ = build(config, plan)
    tokens, targets = batch(config, plan)
    starts = torch.zeros_like(tokens)
    starts[:, [3, 9]] = 1
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6]).expand_as(tokens)
    arguments = dict(ids=tokens, targets=targets, positions=positions, doc_ids=starts.cumsum(1))
    if plan.world_size > 1:
        arguments = parallel.own_tokens(plan, config.num_nextn_predict_layers, **arguments)
    model.aux_scale = 1 / (plan.cp * plan.tp)
    loss_tokens = (targets != -100).sum((0, 2)).double()
    return parallel.all_sum(model(**arguments, loss_tokens=loss_tokens).total_loss.detach()).item()


@pytest.mark.parametrize("axes", [dict(cp=2), dict(tp=2), dict(cp=2, tp=2)], ids=str)
def test_documents_over_ranks(axes):
    whole, plan = replace(PLAN, micro_batch=8), replace(PLAN, micro_batch=8, sp=1, **axes)
    want = check_documents(DEEP, whole)
    assert dist.run(plan.world_size, check_documents, DEEP, plan) == pytest.approx([want] * plan.world_size, rel=EXACT)


def test_each_context_rank_has_as_much_of_the_causal_triangle():
    plan = replace(PLAN, cp=2)
    pairs = []
    for place in range(2):
        parallel_rank, parallel.rank = parallel.rank, lambda: place
        arguments = parallel.own_tokens(plan, 1, *batch(DEEP, PLAN))
        parallel.rank = parallel_rank
        pairs.append(arguments["doc_ids"].sum().item())
    assert pairs[0] == pairs[1] == 16 * 17 // 4
