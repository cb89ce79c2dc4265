"""
Checks for npu_fake.py: a step of pipeline stages in pairs, experts exchanged hierarchically, on 16 fake NPU ranks.

The world is npu_fake_exchange.py's: this process is rank 0, and what other ranks send has a shape alone.
"""
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import FakeStore

import parallel
from npu_fake_exchange import NODE, TOKENS, WORLD, grid_of_numbers, split_evenly


def no_vote(stage, *args, **kwargs):
    """The runtime's stages tell each other that all shapes are known; here nobody answers, so this says it for them."""
    return SimpleNamespace(item=lambda: 1)


def step_of_stages(**axes):
    """Preset small, 3 of its layers: forward in bf16 and backward of 4 micro-batches, global norm, fused AdamW."""
    from model import PRESETS, Model
    from sim import Plan
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    parallel.Grid = grid_of_numbers
    PipelineStage._warmup_forward_vote = PipelineStage._warmup_backward_result = no_vote
    dist.batch_isend_irecv = lambda operations: []                        # torch_npu's asks the group for hccl
    config = replace(PRESETS["small"], num_hidden_layers=3)
    plan = Plan(dispatch="hierarchical", node_size=NODE, zero=1, overlap="adaptive", seq_len=TOKENS,
                schedule="paired", **axes)
    plan = replace(plan, global_batch=4 * plan.dp)
    model = Model(config)
    model.compute_dtype = torch.bfloat16
    parallel.host_sizes = split_evenly(TOKENS * config.num_experts_per_tok)
    grid = parallel.parallelize(model, plan, "npu")
    optimizer = torch.optim.AdamW(parallel.param_groups(model), lr=1e-3, fused=True)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    batch = dict(ids=ids, targets=ids.unsqueeze(1).expand(-1, 2, -1))
    parallel.Pipeline(model, plan, grid).step([batch] * 4, torch.full((2,), 4.0 * plan.dp * TOKENS))
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.device.type != "npu"]
    assert not without, f"no gradient on the device: {without}"
    norm = parallel.grad_norm(model, grid)
    optimizer.step()
    return f"{len(list(model.parameters()))} parameters with gradients, norm on {norm.device}"


def pair_on_one_rank():
    return step_of_stages(dp=WORLD, ep=WORLD)


def pair_two_pipeline_ranks():
    return step_of_stages(pp=2, dp=WORLD // 2, ep=WORLD // 2)
