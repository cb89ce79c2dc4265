"""
Checks for npu_fake.py: a training step on 16 fake NPU ranks; exchange flat, hierarchical and without repeats.

The world is a fake process group: this process is rank 0 and the others never answer, so collectives give shapes alone.
Split sizes have no values either; split_evenly puts even ones in their place.
"""
from dataclasses import replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

import parallel
from parallel import Grid

WORLD, NODE = 16, 8
TOKENS = 1024


def split_evenly(rows_on_last_hop):
    """parallel.host_sizes for fake tensors: the same number for all members, but one more and less for two."""
    def host_sizes(*sizes):
        *outer, send, recv = sizes
        tokens = [[TOKENS] * len(part) for part in outer]                 # dedup: every token to every node
        rows = [[rows_on_last_hop // len(part)] * len(part) for part in (send, recv)]
        for part in rows:
            part[0], part[1] = part[0] + 1, part[1] - 1
        return tokens + rows
    return host_sizes


def grid_of_numbers(*args):
    """A mesh is made from numbers, which fake tensors have not."""
    with unset_fake_temporarily(), torch.device("cpu"):
        return Grid(*args)


def step_of_16(dispatch, zero):
    """Preset small, 3 of its layers: built cut over 16 ranks, forward in bf16, backward, global norm, fused AdamW."""
    from model import PRESETS, Model
    from sim import Plan
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    parallel.Grid = grid_of_numbers
    config = replace(PRESETS["small"], num_hidden_layers=3)
    plan = Plan(dp=WORLD, ep=WORLD, node_size=NODE, dispatch=dispatch, zero=zero, global_batch=WORLD, seq_len=TOKENS)
    model = Model(config)
    model.compute_dtype = torch.bfloat16
    copies = TOKENS * config.num_experts_per_tok
    parallel.host_sizes = split_evenly(copies)
    grid = parallel.parallelize(model, plan, "npu")
    optimizer = torch.optim.AdamW(parallel.param_groups(model), lr=1e-3, fused=True)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    model(ids, labels=ids).total_loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.device.type != "npu"]
    assert not without, f"no gradient on the device: {without}"
    norm = parallel.grad_norm(model, grid)
    optimizer.step()
    return f"{len(list(model.parameters()))} parameters with gradients, norm on {norm.device}"


def exchange_flat():
    return step_of_16("flat", zero=3)


def exchange_hierarchical():
    return step_of_16("hierarchical", zero=1)


def exchange_dedup():
    return step_of_16("dedup", zero=0)
