"""
A built model on many devices: takes it and a Plan, and executes the plan on torch.distributed.

sim.py plans, parallel.py executes: the bytes counted there are the bytes sent here. One device is a group of size one.

    dense weights    one set for all data ranks       FSDP2: zero 0 (copies), 1 (optimizer cut), 3 (weights too)
    experts          one set for `ep` ranks           each holds E / ep of them; FSDP2 over the ranks that hold the same
    tokens           travel to their experts          flat, hierarchical or dedup exchange behind model.py's dispatcher

        rank     0    1  |  2    3      ep=4, node_size=2: inner groups are (0,1) (2,3), outer (0,2) (1,3)
        experts 0-1  2-3 | 4-5  6-7     of 8

In this order: device; what torch does not publish; world; joining and leaving it; groups and their collectives;
collectives with autograd; dispatchers; grid; cuts; parallelize; a sequence over ranks (tensor, context); data
parallelism; memory; segments; pipeline; live load balance; checkpoints; weights of others.
"""
import ctypes
import json
import math
import os
import pickle
import re
import resource
import shutil
import threading
import time
import warnings
import weakref
import zlib
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.autograd.graph import get_gradient_edge
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from model import (MLP, Attention, Block, GatherRows, HeadCrossEntropy, KeepAll, LocalDispatcher, MTPLayer, Output,
                   Model, Part, Vocabulary, WeightGradStore, alike, check_published, config_from_hf, count_ids,
                   count_params, document_mask, fill_initial, fill_inputs, permute, published_names, require,
                   rope_table, sorted_slots, to_hf, unpermute)
from sim import (STEP_BYTES, balance_ranks, check_plan, decide, first_placement, imbalance, items_in_force,
                 moved_experts, plan_placement, predict_load, schedule_table, stage_layers)

warnings.filterwarnings("ignore", message="torch.distributed is disabled")       # DCP tells that there is one process
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")         # of outputs that are views: none is written

# ---------------------------------------------------------------------------------------------------------------------
# Device


def pick_device(name="auto"):
    """torch.device by name (cpu | cuda | npu), or for auto the accelerator that is there, else the CPU.
    Of several in a node, the one that torchrun's LOCAL_RANK numbers becomes this process's current one."""
    if name == "auto":
        there = [kind for kind in ("npu", "cuda") if hasattr(torch, kind) and getattr(torch, kind).is_available()]
        name = there[0] if there else "cpu"
    require(name in ("cpu", "cuda", "npu"), f"--device {name}: use auto, cpu, cuda or npu")
    if name == "cpu":
        keep_freed_memory()
        return torch.device(name)
    accelerators = getattr(torch, name, None)                             # torch itself imports an installed torch_npu
    require(accelerators, f"--device {name}: torch_npu is not installed (see the Ascend lines of requirements.txt), or "
                          f"not loaded (TORCH_DEVICE_BACKEND_AUTOLOAD=0)")
    require(accelerators.is_available(), f"--device {name}: none found here; use --device cpu")
    accelerators.set_device(int(os.environ.get("LOCAL_RANK", 0)) % accelerators.device_count())
    return torch.device(name)


def keep_freed_memory():
    """glibc gives large tensors back to the system when they are freed, and the next step pays for each of their pages
    anew: 1 to 12 % of a step on a CPU. From here on this process keeps what it had at its peak."""
    trim_threshold, mmap_max = -1, -4                                     # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda what, value: None)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)                                           # the most there is


def fused_skips(device):
    """Whether the fused AdamW of a device takes grad_scale and found_inf; torch_npu's does not."""
    return device.type != "npu"


def auto_precision(device):
    """A static rule, alike on all ranks: bf16 (float32 master weights), but float32 on a CPU without AMX, where bf16
    matmuls can take twice as long as float32's."""
    return "bf16" if device.type != "cpu" or has_amx() else "fp32"


def peak_memory(device):
    """Most bytes held so far: of the device, or of the process on the CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return getattr(torch, device.type).max_memory_allocated()


# ---------------------------------------------------------------------------------------------------------------------
# What torch does not publish
#
# All that this file takes of it (torch 2.11 to 2.13), in small functions; tests fail where torch changes it:
# torch.distributed.pipelining.schedules: _PipelineScheduleRuntime, its _prepare_schedule_with_comms, fwd_recv_ops and
# bwd_recv_ops; _Action.from_str. PipelineStage: args_recv_info, grad_recv_info, fwd_cache, bwd_cache. FSDP2's state:
# _lazy_init, _root_post_backward_final_callback. torch._foreach_norm, torch.cpu._is_amx_tile_supported.


def has_amx():
    return torch.cpu._is_amx_tile_supported()


def norms_of(tensors):
    """(n,) 2-norms, in few kernels for all."""
    return torch.stack(torch._foreach_norm(tensors))


class TorchRuntime:
    """torch's pipelining runtime, running a table of ours: it sends and receives, every action is done by perform.

    A stage of torch's is no more than its buffers here: this rank's `stages` send and receive a tensor like `x`.
    """

    def __init__(self, stages, n_stages, table, n_micro, x, device, group, perform):
        """table: list by rank of lists of sim.Action. perform: given an action's parts, as sim.Action.parts."""
        self.buffers = {stage: PipelineStage(torch.nn.Identity(), stage, n_stages, device, x, x, group=group)
                        for stage in stages}
        # a loss tells that there is a backward; it is not called
        self.runtime = schedules._PipelineScheduleRuntime(list(self.buffers.values()), n_micro, loss_fn=len,
                                                          scale_grads=False)

        def perform_action(action, context):
            parts = action.sub_actions or (action,)                       # a pair has two
            perform([(part.computation_type.value, part.stage_index, part.microbatch_index) for part in parts])

        for kind in (schedules.FORWARD, schedules.FULL_BACKWARD, schedules.OVERLAP_F_B):
            self.runtime.register_custom_function(kind, perform_action)
        in_torchs_words = {rank: [schedules._Action.from_str(str(action)) for action in actions]
                           for rank, actions in enumerate(table)}
        self.runtime._prepare_schedule_with_comms(in_torchs_words)

    def step(self, train):
        """Run the table once; without training, its backwards come to perform too, but bring no gradients."""
        if train:
            self.runtime.step(return_outputs=False)
        else:
            self.runtime.eval(return_outputs=False)
            self.runtime.bwd_recv_ops.clear()                             # receives that had nothing to wait for

    def received_input(self, stage, microbatch):
        """What the stage before sent, in the buffer where it arrived."""
        for work in self.runtime.fwd_recv_ops.pop((stage, microbatch)):
            work.wait()
        return self.buffers[stage].args_recv_info[microbatch][0].buffer

    def received_gradient(self, stage, microbatch):
        """What the stage behind sent."""
        for work in self.runtime.bwd_recv_ops.pop((stage, microbatch)):
            work.wait()
        return self.buffers[stage].grad_recv_info[microbatch][0].buffer

    def send_output(self, stage, microbatch, x):
        """Lay x where the runtime takes it from to send it to the stage behind."""
        self.buffers[stage].fwd_cache[microbatch] = (x,), []

    def send_gradient(self, stage, microbatch, grad):
        """The same for the stage before."""
        self.buffers[stage].bwd_cache[microbatch] = (grad,)


def prepare_sharding(model):
    """FSDP2 makes itself ready in a hook of the root's first forward; segments call parts of layers, so none runs."""
    if isinstance(model, FSDPModule):
        fully_shard.state(model)._lazy_init()


def end_sharded_backward(model):
    """What FSDP2 does at the end of a backward: gradients are added up in float32, or after the last one reduced."""
    if isinstance(model, FSDPModule):
        fully_shard.state(model)._root_post_backward_final_callback()


# ---------------------------------------------------------------------------------------------------------------------
# World: the processes that torchrun started, or this one alone


def world_size():
    """Processes of this run. torchrun says it before they meet, so a wrong plan is refused before anybody waits."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def data_rank(plan):
    """Which share of the data this rank takes: 0 ... dp - 1."""
    return rank() // (plan.cp * plan.tp) % plan.dp


def is_restarted():
    """torchrun has started this run again after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def first_does(work):
    """What work() returns on rank 0, or its refusal, on all ranks; the others wait for it as long as it takes."""
    if not dist.is_initialized():
        return work()
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    answer, signs, sign = [None, None], [], torch.zeros(1)
    if rank() == 0:
        try:
            answer[0] = work()
        except (ValueError, OSError) as error:
            answer[1] = error
        # to each by itself: a broadcast goes from rank to rank, and behind one that stands still others would wait
        signs = [dist.isend(sign, other, group=patient) for other in range(1, world_size())]
    else:
        dist.recv(sign, 0, group=patient)
    all_sum(torch.zeros(1))                                               # who stands still is missed here in --timeout
    for each in signs:
        each.wait()
    dist.broadcast_object_list(answer, src=0, group=patient)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def all_sum(x):
    """x summed over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Joining the world and leaving it; which rank died or stands still
#
# Who loses contact calls the roll in torchrun's store, and a thread of its own answers for each process, whatever the
# process itself waits for. torchrun names no rank when it starts a run again, and dist.monitored_barrier none that
# died: it ends at the first closed connection (measured, torch 2.13).


def open_store(timeout):
    """torchrun's key-value store; keys of a run that was started again are not those of the run before."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    except dist.DistError as error:
        raise ConnectionError(f"no answer from torchrun's first machine at {host}:{port} in "
                              f"{timeout.total_seconds():g} s: is it up, and does --master-addr name it?") from error
    return dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def answer_roll_call():
    store = open_store(timedelta(minutes=5))
    while not LEAVING.wait(1):
        if store.check(["roll call"]):
            store.set(f"here: {rank()}", "")
            return


ANSWERING = threading.Thread(target=answer_roll_call, daemon=True)
LEAVING = threading.Event()


def join_world(device, timeout):
    """Meet the other processes; a process alone meets nobody. timeout: how long a collective may wait for a rank."""
    if world_size() == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if device.type != "cpu":
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    store = open_store(timeout)
    try:
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank(), world_size=world_size())
    except dist.DistError as error:
        raise ConnectionError(f"rank {rank()}: not all {world_size()} processes came in {timeout.total_seconds():g} s: "
                              f"look what others say, or give --timeout more") from error
    ANSWERING.start()


def leave_world():
    if dist.is_initialized():
        LEAVING.set()
        ANSWERING.join()
        dist.destroy_process_group()


def is_lost_contact(error):
    """Whether an error says that another rank is gone or does not answer. Gloo's are bare RuntimeErrors, and one of
    them, "Application timeout caused pair closure", does not even name it."""
    gloo = any(words in str(error) for words in ("gloo", "pair closure"))
    return dist.is_initialized() and (isinstance(error, dist.DistError) or gloo)


def missing_ranks(patience=4.0):
    """Ranks that do not answer for so many seconds, as text. Who asks first decides for all: then these leave, too."""
    try:
        store = open_store(timedelta(seconds=10))
    except ConnectionError:
        return "0, nor of torchrun on its machine"
    if not store.check(["missing"]):
        store.set("roll call", "")
        time.sleep(patience)
        silent = [str(other) for other in range(world_size()) if not store.check([f"here: {other}"])]
        store.compare_set("missing", "", ", ".join(silent))               # kept if somebody was faster
    return store.get("missing").decode()


# ---------------------------------------------------------------------------------------------------------------------
# Groups and their collectives

gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)         # torch 2.13 renamed them
scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Group:
    """Ranks that exchange with each other. Every collective is started, not awaited: it returns (out, work)."""

    def __init__(self, group):
        """group: a torch.distributed.ProcessGroup."""
        self.group = group
        self.size, self.rank = group.size(), group.rank()
        self.whole = False                 # of a tensor group: members hold all tokens, not parts; see generating

    def all_to_all(self, x, send=None, recv=None):
        """x (sum(send), ...) -> (sum(recv), ...); send[i] rows go to member i. Without sizes: equal parts."""
        out = torch.empty_like(x) if recv is None else x.new_empty(sum(recv), *x.shape[1:])
        return out, dist.all_to_all_single(out, x.contiguous(), recv, send, group=self.group, async_op=True)

    def all_gather(self, x):
        """x (N, ...) -> (size * N, ...), in order of members."""
        out = x.new_empty(self.size * len(x), *x.shape[1:])
        return out, gather_single(out, x.contiguous(), group=self.group, async_op=True)

    def reduce_scatter(self, x):
        """x (size * N, ...) -> (N, ...): sums over members, each gets its part."""
        out = x.new_empty(len(x) // self.size, *x.shape[1:])
        if dist.get_backend(self.group) == "gloo":
            return out, SummedParts(out, x.contiguous(), self.group)
        return out, scatter_single(out, x.contiguous(), group=self.group, async_op=True)

    def all_reduce(self, x, op=dist.ReduceOp.SUM):
        """In place, and awaited."""
        dist.all_reduce(x, op, group=self.group)
        return x


class SummedParts:
    """A reduce-scatter as an all-to-all and a sum: gloo's own is an all-reduce and sends twice as much (measured)."""

    def __init__(self, out, x, group):
        self.out, self.received = out, torch.empty_like(x)
        self.work = dist.all_to_all_single(self.received, x, group=group, async_op=True)

    def wait(self):
        self.work.wait()
        torch.sum(self.received.view(-1, *self.out.shape), 0, out=self.out)


# ---------------------------------------------------------------------------------------------------------------------
# Collectives in flight, with autograd


class Flight:
    """One collective on its way, and its mirror image in backward. Between start and finish other work can run.

    In forward that is what is called in between, in backward what autograd reaches in between: the same in reverse.

        rows = flight.start(x); shared = shared_experts(h); rows = flight.finish(rows)
    """

    def __init__(self, forward, backward):
        self.forward, self.backward = forward, backward                   # tensor -> (out, work), not awaited

    def start(self, x):
        """The result's tensor, not yet to be read."""
        return Start.apply(x, self)

    def finish(self, out):
        return Finish.apply(out, self)

    def whole(self, x):
        return self.finish(self.start(x))


class Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, flight):
        ctx.flight = flight
        out, flight.work = flight.forward(x)
        return out

    @staticmethod
    def backward(ctx, _):
        ctx.flight.work.wait()                                            # begun by Finish.backward
        return ctx.flight.grad, None


class Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, flight):
        ctx.flight = flight
        flight.work.wait()
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        flight = ctx.flight
        flight.grad, flight.work = flight.backward(grad)
        return grad, None                                                 # of out's shape; x's own comes from Start


# ---------------------------------------------------------------------------------------------------------------------
# Dispatchers: tokens to the ranks that hold their experts, and back
#
# flat           one all-to-all of copies over all ranks of the expert group
# hierarchical   the paper's: every node gets every token, by an all-gather between ranks of equal place in their nodes;
#                an all-to-all of copies inside the node; back by an all-to-all and a reduce-scatter of partial sums
# dedup          as hierarchical, but a token goes to a node once if an expert there wants it, and not at all otherwise
#
# Order of calls, each with what the one before returned. A pair of micro-batches (see Segments) calls those in brackets
# by itself, to have other work run between two hops; where nobody did, wait and combine do them first.
#
#     dispatch     choices become sizes, and the first hop starts
#     [relay]      the hop between nodes has ended, the one to the experts' ranks starts   (flat: nothing to do)
#     wait         the last hop has ended: rows sorted by expert
#     experts      model.py's
#     [send_back]  the hop from the experts' ranks starts
#     [relay_back] it has ended, partial sums start between nodes                          (flat: nothing to do)
#     combine      the last hop has ended: sums by token
#
# Weights travel with the tokens and are applied by the experts, so on the way back the slow hop carries sums alone.
# Each dispatch makes the host wait once, in host_sizes. The shared expert runs while the first hop, the slow one, is
# under way; MindSpeed runs it during the fast one.


def host_sizes(*sizes):
    """The one host synchronisation of a dispatch: split sizes (1-d tensors) -> lists. Fake-tensor runs replace it."""
    on_host = torch.cat(sizes).cpu().split([len(size) for size in sizes])
    return [size.tolist() for size in on_host]


class Hop:
    """One hop of a dispatch: rows and their weights go there, rows alone come back."""

    def __init__(self, there, back):
        """Two collectives: tensor -> (out, work)."""
        self.rows, self.weights = Flight(there, back), Flight(there, back)
        self.rows_back = Flight(back, there)

    def start(self, rows, weights):
        return self.rows.start(rows), self.weights.start(weights)

    def finish(self, rows, weights):
        return self.rows.finish(rows), self.weights.finish(weights)


def hop_of_rows(group, send, recv):
    """send[i] rows go to member i of a group, recv[i] come from it."""
    return Hop(partial(group.all_to_all, send=send, recv=recv), partial(group.all_to_all, send=recv, recv=send))


@dataclass
class Route:
    """How the copies of one dispatch travel: made by dispatch, handed from call to call, which note what they did."""

    # by dispatch; the last hop is the one that ends at the experts' ranks. ids: of the tokens where it starts, numbers
    # among the experts that it reaches; their count for a copy that does not take it
    ids: torch.Tensor                      # (N,K)
    send: list                             # copies to each member over the last hop
    recv: list                             # copies from each member
    expert: torch.Tensor                   # (M,) of each arriving copy, by sender: number among this rank's experts
    # by dispatch of dedup alone
    node_send: list = None                 # tokens to each node
    node_recv: list = None                 # tokens from each node
    node_slot: torch.Tensor = None         # (N,nodes) a token's row among those to a node; past the end: not sent there
    # by the calls that start a hop
    between_nodes: Hop = None
    to_experts: Hop = None
    slot: torch.Tensor = None              # (N,K) row of each copy that starts the last hop
    order: torch.Tensor = None             # (M,1) row, sorted by expert, of each copy that arrived; by wait
    sent_back: bool = False                # by send_back, which a pair calls by itself, as it does relay_back


def experts_of_copies(arriving, n_copies):
    """arriving (members, local experts): copies from each -> (n_copies,) local expert of each, in order of arrival."""
    members, n_local = arriving.shape
    experts = torch.arange(n_local, device=arriving.device).repeat(members)
    return experts.repeat_interleave(arriving.flatten(), output_size=n_copies)


class FlatDispatcher(LocalDispatcher):
    """Copies go straight to the rank of their expert: one all-to-all there, one back."""

    def __init__(self, config, group):
        super().__init__(config)
        self.group = group                                                # of the last hop
        self.n_reached = config.n_routed_experts                          # experts on its ranks
        self.slot_of = None                # (E,) of each expert, where LiveBalance moves them: its number on the ranks

    def dispatch(self, x, ids, weights):
        ids = self.choices_here(self.places(ids, weights))
        leaving, arriving = self.exchange_counts(count_ids(ids, self.n_reached + 1)[:-1])
        send, recv = host_sizes(leaving.sum(1), arriving.sum(1))
        route = Route(ids, send, recv, experts_of_copies(arriving, sum(recv)))
        rows, row_weights = self.start_first_hop(x, weights.to(x.dtype), route)
        return rows, row_weights, arriving.sum(0), route

    def choices_here(self, ids):
        """Experts (N,K) of this rank's tokens -> Route.ids."""
        return ids

    def places(self, ids, weights):
        """Experts (N,K) -> where they are; a copy above capacity is at a place that does not exist, and stays here."""
        if self.slot_of is not None:
            ids = self.slot_of[ids]
        if self.capacity_factor == 0:
            return ids
        capacity = self.capacity(ids)
        slot = self.slots_with_capacity(ids, weights, capacity)
        return torch.where(slot < self.n_experts * capacity, ids, self.n_experts)

    def exchange_counts(self, counts):
        """counts (experts reached,) of copies here -> leaving, arriving (members, local experts of the receiver)."""
        leaving = counts.view(self.group.size, -1)
        arriving, work = self.group.all_to_all(leaving)
        work.wait()
        return leaving, arriving

    def start_first_hop(self, x, weights, route):
        return self.start_last_hop(x, weights, route)

    def start_last_hop(self, x, weights, route):
        """x (N,C) and weights (N,K) of route.ids -> rows and their weights, under way."""
        n_rows = sum(route.send)
        some_stay = n_rows < route.ids.numel()
        route.slot = sorted_slots(route.ids).clamp(max=n_rows)
        rows = GatherRows.apply(x, route.slot, n_rows, some_stay)
        row_weights = weights.new_zeros(n_rows + 1).scatter(0, route.slot.flatten(), weights.flatten())[:n_rows]
        route.to_experts = hop_of_rows(self.group, route.send, route.recv)
        return route.to_experts.start(rows, row_weights)

    def relay(self, rows, row_weights, route):
        return rows, row_weights

    def wait(self, rows, row_weights, route):
        """Rows arrive sorted by (sender, expert) and leave here sorted by expert."""
        if route.to_experts is None:
            rows, row_weights = self.relay(rows, row_weights, route)
        rows, row_weights = route.to_experts.finish(rows, row_weights)
        rows, route.order = permute(rows, route.expert.unsqueeze(1))
        return rows, torch.zeros_like(row_weights).scatter(0, route.order.flatten().long(), row_weights)

    def resend(self, x, route):
        again = replace(route, to_experts=None)                           # its hops are on their way back by now
        no_weights = x.new_zeros(len(x), route.ids.size(1))
        rows, _ = self.wait(*self.start_first_hop(x, no_weights, again), again)
        return rows

    def send_back(self, rows, route):
        route.sent_back = True
        return route.to_experts.rows_back.start(unpermute(rows, route.order))

    def relay_back(self, rows, route):
        return rows

    def combine(self, rows, route):
        if not route.sent_back:
            rows = self.relay_back(self.send_back(rows, route), route)
        return self.finish_way_back(rows, route)

    def finish_way_back(self, rows, route):
        return self.sum_copies(rows, route)

    def sum_copies(self, rows, route):
        """The end of the way back from the experts: a sum for each token of route.ids."""
        rows = route.to_experts.rows_back.finish(rows)
        return unpermute(rows, route.slot, padded=len(rows) < route.slot.numel())


class HierarchicalDispatcher(FlatDispatcher):
    """Slow hop first and whole: an all-gather between nodes; then copies for this node's experts go to their ranks."""

    def __init__(self, config, inner, outer):
        super().__init__(config, inner)
        self.outer = outer
        self.n_reached = config.n_routed_experts // outer.size
        self.first_reached = outer.rank * self.n_reached

    def choices_here(self, ids):
        ids, work = self.outer.all_gather(ids)                            # (nodes * N, K)
        work.wait()
        return self.experts_here(ids)

    def experts_here(self, ids):
        """Numbers from the node's first expert; n_reached for an expert elsewhere."""
        here = ids - self.first_reached
        return torch.where((here >= 0) & (here < self.n_reached), here, self.n_reached)

    def start_first_hop(self, x, weights, route):
        route.between_nodes = Hop(self.outer.all_gather, self.outer.reduce_scatter)
        return route.between_nodes.start(x, weights)

    def relay(self, tokens, weights, route):
        tokens, weights = route.between_nodes.finish(tokens, weights)
        return self.start_last_hop(tokens, weights, route)

    def relay_back(self, rows, route):
        partial_sums = self.sum_copies(rows, route)                       # (tokens of all nodes, C)
        return route.between_nodes.rows_back.start(partial_sums)

    def finish_way_back(self, rows, route):
        return route.between_nodes.rows_back.finish(rows)


def slots_by_node(wanted, n_sent):
    """wanted (N,nodes), 1 where a token goes -> its row among the tokens that leave, by node; n_sent: it does not."""
    nodes = wanted.size(1)
    numbers = torch.arange(nodes, device=wanted.device).expand_as(wanted)
    return sorted_slots(torch.where(wanted > 0, numbers, nodes)).clamp(max=n_sent)


class DedupDispatcher(HierarchicalDispatcher):
    """The slow hop carries a token to the nodes that need it, and only to those."""

    def dispatch(self, x, ids, weights):
        nodes = self.outer.size
        ids = self.places(ids, weights)
        wanted = ids.new_zeros(len(ids), nodes + 1).scatter(1, ids // self.n_reached, 1)
        wanted = wanted[:, :nodes]                                        # (N,nodes) 1 where a token goes, else 0
        # 1. one message to each node: tokens that will come, and how many copies they hold for each of its experts
        counts = count_ids(ids, self.n_experts + 1)[:-1].view(nodes, -1)
        message, work = self.outer.all_to_all(torch.cat((wanted.sum(0).unsqueeze(1), counts), 1))
        work.wait()
        from_nodes, counts_here = message[:, 0], message[:, 1:].sum(0)
        # 2. the sizes of both hops
        leaving, arriving = self.exchange_counts(counts_here)
        node_send, node_recv, send, recv = host_sizes(wanted.sum(0), from_nodes, leaving.sum(1), arriving.sum(1))
        node_slot = slots_by_node(wanted, sum(node_send))
        # 3. the tokens' choices, then the tokens
        chosen = GatherRows.apply(ids, node_slot, sum(node_send), True)
        token_ids, work = self.outer.all_to_all(chosen, node_send, node_recv)
        work.wait()
        route = Route(self.experts_here(token_ids), send, recv, experts_of_copies(arriving, sum(recv)),
                      node_send, node_recv, node_slot)
        rows, row_weights = self.start_first_hop(x, weights.to(x.dtype), route)
        return rows, row_weights, arriving.sum(0), route

    def start_first_hop(self, x, weights, route):
        tokens, weights = [GatherRows.apply(t, route.node_slot, sum(route.node_send), True) for t in (x, weights)]
        route.between_nodes = hop_of_rows(self.outer, route.node_send, route.node_recv)
        return route.between_nodes.start(tokens, weights)

    def finish_way_back(self, rows, route):
        return unpermute(super().finish_way_back(rows, route), route.node_slot, padded=True)


# ---------------------------------------------------------------------------------------------------------------------
# Grid: who shares what


class Grid:
    """The ranks of a run, their meshes and groups; an object that is passed, never a global.

    meshes: of FSDP2 and of checkpoints
        dense weights     (pp, replicate, shard)         replicate * shard = dp * cp * tp: ranks with own tokens
        cut by tensor     (pp, replicate, tp, shard)     replicate * shard = dp * cp; tp contiguous
        expert weights    (pp, replicate, ep, shard)     the same ranks; ep contiguous: rank = (... shard * ep + place)
    groups: lines through
        sequence parts    (pp, dp, cp, tp)
        balance groups    (world / n, n)                 n consecutive ranks that share the counts of the balance loss
        exchange          (world / ep, outer, inner)     inner: ranks of one node, outer: equal places of all nodes

    Ranks that hold the same weights replicate them (zero=0) or cut them into shards (zero=1, 3).
    """

    def __init__(self, plan, n_balance=1, device_type="cpu", timeout=None):
        self.plan, self.device_type, self.timeout = plan, device_type, timeout
        self.groups = {}                                                  # members -> Group
        ranks, pp = torch.arange(plan.world_size), plan.pp

        dense = ranks.view(pp, *self.replicate_and_shard(plan.dp * plan.cp * plan.tp))
        self.dense = self.mesh("pp replicate shard", dense)
        tensor = ranks.view(pp, *self.replicate_and_shard(plan.dp * plan.cp), plan.tp)
        self.tensor = self.mesh("pp replicate tp shard", tensor.transpose(2, 3))
        expert = ranks.view(pp, *self.replicate_and_shard(plan.edp), plan.ep)
        self.expert = self.mesh("pp replicate ep shard", expert.transpose(2, 3))

        sequence = ranks.view(pp, plan.dp, plan.cp, plan.tp)
        exchange = ranks.view(-1, plan.ep // plan.inner, plan.inner)
        self.context_group = self.group(sequence, 2)
        self.tensor_group = self.group(sequence, 3)
        self.balance_group = self.group(ranks.view(-1, n_balance), 1)
        self.outer_group = self.group(exchange, 1)
        self.inner_group = self.group(exchange, 2)
        self.expert_group = self.group(ranks.view(-1, plan.ep), 1)

        self.pp_rank = rank() * pp // plan.world_size
        self.embedding_twice = False       # on the first pipeline rank and on the last; keep_own_stages says
        self.live = None                   # a LiveBalance; parallelize makes it

    def replicate_and_shard(self, n):
        """Sizes of these two dimensions for n ranks that hold the same weights."""
        return (n, 1) if self.plan.zero == 0 else (1, n)

    def mesh(self, names, ranks):
        ranks = ranks.contiguous()
        groups = [self.group(ranks, dim).group for dim in range(ranks.ndim)]
        return DeviceMesh.from_group(groups, self.device_type, ranks, mesh_dim_names=tuple(names.split()))

    def group(self, ranks, dim):
        """This rank's Group along a dimension of a grid of ranks; one for each set of members, as buffers are large."""
        lines = ranks.movedim(dim, -1).reshape(-1, ranks.size(dim)).tolist()
        members = next(tuple(line) for line in lines if rank() in line)
        if members not in self.groups:
            group = dist.new_group(members, timeout=self.timeout, use_local_synchronization=True)
            self.groups[members] = Group(group)
        return self.groups[members]

    def dispatcher(self, config):
        """What the plan says; the local one with no rank to exchange with; flat where the group lies in one node."""
        plan = self.plan
        if plan.ep == 1:
            return LocalDispatcher(config)
        if plan.exchange == "flat":
            return FlatDispatcher(config, self.expert_group)
        kind = dict(hierarchical=HierarchicalDispatcher, dedup=DedupDispatcher)[plan.exchange]
        return kind(config, self.inner_group, self.outer_group)


# ---------------------------------------------------------------------------------------------------------------------
# Cuts: which dimension of a tensor is cut, and by whom
#
# Experts are cut by ep, matrices by tp; each rank holds one of the parts, and zero may cut what it holds once more.
# All else is whole on every rank of a pipeline stage, but for zero.


class Cut(NamedTuple):
    dim: int | None                        # the tensor's
    axis: str | None                       # ep | tp: the ranks that hold the parts; None: whole


TENSOR_CUTS = dict(q_b_proj=0, kv_b_proj=0, o_proj=1, gate_proj=0, up_proj=0, down_proj=1, embed_tokens=0, lm_head=0)


def cut_of(name):
    """Cut of a weight, or of an optimizer's state of its shape, by its name."""
    if ".experts." in name:
        return Cut(0, "ep")
    for part in name.split("."):
        if part in TENSOR_CUTS:
            return Cut(TENSOR_CUTS[part], "tp")
    return Cut(None, None)


def keep_own_experts(experts, plan):
    """Drop all but this rank's experts: rank i of an expert group holds the i-th of ep equal parts."""
    n_own = len(experts.gate_up_proj) // plan.ep
    experts.first_expert = rank() % plan.ep * n_own
    for name, weight in list(experts.named_parameters()):
        own = weight.detach()[experts.first_expert:experts.first_expert + n_own].clone()
        setattr(experts, name, torch.nn.Parameter(own))


class Slice(NamedTuple):
    """Of a matrix cut by tensor, at its module as `slice`: which of how many parts of a dimension is held."""
    dim: int
    place: int
    parts: int


def own_slice(module, whole):
    """What this rank holds of a tensor of a module; all of it, if it is not cut."""
    if not hasattr(module, "slice"):
        return whole
    dim, place, parts = module.slice
    return whole.chunk(parts, dim)[place]


def local(tensor):
    """This rank's part of a tensor that may be cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def count_holders(name, tensor, grid):
    """How many ranks hold the same part of a tensor."""
    plan = grid.plan
    n_parts = {"ep": plan.ep, "tp": plan.tp, None: 1}[cut_of(name).axis]
    if isinstance(tensor, DTensor):
        n_parts *= tensor.device_mesh["shard"].size()
    ranks = plan.dp * plan.cp * plan.tp
    if grid.embedding_twice and name.startswith("embed_tokens"):
        ranks *= 2
    return ranks // n_parts


# ---------------------------------------------------------------------------------------------------------------------
# parallelize: the one entry


def parallelize(model, plan, device_type="cpu", timeout=None):
    """Turn a built model (filled, or on the meta device) into this rank's part of it, as the plan says.

    Returns its Grid, None for one process. timeout (timedelta): how long a collective may wait; None: torch's default.
    ValueError for a plan that does not fit, or that asks for what is not run here. Then fill it: init_weights.
    """
    refuse_what_is_not_run(plan)
    check_plan(model.config, plan, devices=world_size())
    if world_size() == 1:
        return None
    n_balance = balance_ranks(model.config, plan)
    grid = Grid(plan, n_balance, device_type, timeout)
    if plan.pp > 1:
        keep_own_stages(model, grid)
    for block in model.moe_blocks():
        keep_own_experts(block.mlp.experts, plan)
        if n_balance > 1:
            block.mlp.gate.average_counts = partial(mean_over, grid.balance_group)
    if plan.tp > 1:
        cut_matrices(model, grid.tensor_group)
    if plan.cp > 1:
        for block in model.layers.values():
            block.self_attn.gather_context = partial(gather_together, grid.context_group)
    if plan.dp * plan.cp * plan.tp > 1:
        shard(model, grid)
    dispatcher = grid.dispatcher(model.config)                            # last: a group cannot be copied or saved
    for block in model.moe_blocks():
        block.mlp.dispatcher = dispatcher
    grid.live = LiveBalance(model, grid) if plan.balance_live else None
    return grid


def refuse_what_is_not_run(plan):
    require(plan.tp == 1 or plan.sp, f"tp={plan.tp} with sp=0 is planned and timed by sim.py, but not run: use sp=1")
    require(plan.pp > 1 or plan.vpp == 1, f"vpp={plan.vpp} with pp=1 is timed by sim.py, but not run: use vpp=1")
    require(plan.precision in ("fp32", "bf16", "fp64"), f"precision={plan.precision} is not run: use fp32 or bf16")


def keep_own_stages(model, grid):
    """Drop what is on other pipeline ranks. The last stage keeps the embedding where MTP or a tied head reads it."""
    plan, config = grid.plan, model.config
    stages = stage_layers(config, plan)
    own = plan.stages_of(grid.pp_rank)
    for index in set(model.layers) - {str(index) for stage in own for index in stages[stage]}:
        del model.layers[index]
    first, last = 0 in own, plan.n_stages - 1 in own
    grid.embedding_twice = config.num_nextn_predict_layers > 0 or config.tie_word_embeddings
    if not first and not (last and grid.embedding_twice):
        model.embed_tokens = None
    if not last:
        model.norm = model.lm_head = None


def mean_over(group, counts):
    return group.all_reduce(counts) / group.size


# ---------------------------------------------------------------------------------------------------------------------
# A sequence over ranks: tensor parallelism with sequence parallelism, and context parallelism
#
# Every rank holds and counts tokens of its own: norms, MLA's down-projections, router and experts need nothing else,
# and the gradients of their whole weights are summed over all these ranks, as over data ranks. tensor: attention
# gathers the latents of its group, dense MLPs the tokens; both compute with a part of the heads or columns, and
# reduce-scatter the partial sums. Embedding and head are cut by vocabulary.
# context: queries of own tokens against latents and rope keys of the whole sequence; slices i and 2*cp-1-i to rank i,
# for then each has as much of the causal triangle.


def cut_matrices(model, group):
    for name, module in model.named_modules():
        matrix = name.rpartition(".")[2]
        if matrix in TENSOR_CUTS:
            module.slice = Slice(TENSOR_CUTS[matrix], group.rank, group.size)
            module.weight = torch.nn.Parameter(own_slice(module, module.weight.detach()).clone())
        if isinstance(module, Attention):
            module.gather_tokens = partial(gather_together, group)
        if isinstance(module, MLP):
            module.register_forward_pre_hook(lambda _, tokens: gather_sequence(group, *tokens))
        if isinstance(module, (Attention, MLP)):
            module.register_forward_hook(lambda _, tokens, partial_sums: scatter_sequence(group, partial_sums))
    n_own = model.config.vocab_size // group.size
    model.embed = partial(embed_part, group, model.embed, n_own)
    model.cross_entropy = partial(cross_entropy_part, group, n_own)
    model.gather_logits = partial(gather_logits, group)


def gather_sequence(group, x):
    """Parts of members one after the other: (B, t, ...) -> (B, size * t, ...)."""
    if group.whole:
        return x
    parts = Flight(group.all_gather, group.reduce_scatter).whole(x)       # (size * B, t, ...)
    return parts.unflatten(0, (group.size, -1)).transpose(0, 1).flatten(1, 2)


def gather_together(group, *parts):
    """gather_sequence of several tensors (B, t, ...) by one collective."""
    flat = [part.flatten(2) for part in parts]
    widths = [part.size(2) for part in flat]
    whole = gather_sequence(group, torch.cat(flat, -1)).split(widths, -1)
    return [one.unflatten(-1, part.shape[2:]) for one, part in zip(whole, parts)]


def scatter_sequence(group, x):
    """Each member gets its part of the sum over members: (B, size * t, C) -> (B, t, C)."""
    if group.whole:
        return group.all_reduce(x)
    parts = x.unflatten(1, (group.size, -1)).transpose(0, 1).flatten(0, 1)                # (size * B, t, C)
    return Flight(group.reduce_scatter, group.all_gather).whole(parts)


def embed_part(group, embed, n_own, ids):
    """Model.embed where a rank holds n_own rows of the embedding: it looks up the tokens of its whole group."""
    ids = gather_sequence(group, ids) - group.rank * n_own
    here = (ids >= 0) & (ids < n_own)
    return scatter_sequence(group, embed(ids.clamp(0, n_own - 1)) * here.unsqueeze(-1))


def gather_logits(group, logits):
    """Of all parts of the vocabulary, where members hold the same tokens: (B, T, V / size) -> (B, T, V)."""
    if not group.whole:
        return logits
    parts, work = group.all_gather(logits.movedim(2, 0))
    work.wait()
    return parts.movedim(0, 2)


def cross_entropy_part(group, n_own, h, weight, targets):
    """model.cross_entropy with n_own rows of the head, for the tokens of the group: this rank's share of their loss."""
    h = Flight(group.all_gather, group.reduce_scatter).whole(h)
    targets = Flight(group.all_gather, group.reduce_scatter).whole(targets)
    all_max = partial(group.all_reduce, op=dist.ReduceOp.MAX)
    vocabulary = Vocabulary(group.rank * n_own, group.size, all_max, group.all_reduce)
    return HeadCrossEntropy.apply(h, weight, targets, vocabulary)


def context_parts(n_tokens, cp, device):
    """Numbers of the tokens that each context rank has; gather_context brings keys together in this order."""
    slices = torch.arange(n_tokens, device=device).chunk(2 * cp)
    return [torch.cat((slices[i], slices[-1 - i])) for i in range(cp)]


def own_tokens(plan, n_mtp, ids, targets, positions=None, doc_ids=None, next_ids=None, routing=None):
    """Model.forward's arguments for whole sequences -> for this rank's part of them. n_mtp: layers of MTP."""
    positions, next_ids = fill_inputs(ids, targets, n_mtp, positions, next_ids)
    contexts = context_parts(ids.size(1), plan.cp, ids.device)
    place = rank() % (plan.cp * plan.tp)
    context = contexts[place // plan.tp]                                  # tokens of the tensor group
    own = context.chunk(plan.tp)[place % plan.tp]
    if plan.cp > 1:
        if doc_ids is None:
            doc_ids = torch.zeros_like(ids[:1])
        mask = document_mask(doc_ids)                                     # (B,1,T,T)
        doc_ids = mask[:, :, context][..., torch.cat(contexts)]
    if next_ids is not None:
        next_ids = next_ids[..., own]
    if routing:
        routing = {layer: chosen[:, own] for layer, chosen in routing.items()}
    return dict(ids=ids[:, own], targets=targets[..., own], positions=positions[:, context], doc_ids=doc_ids,
                next_ids=next_ids, routing=routing)


# ---------------------------------------------------------------------------------------------------------------------
# Data parallelism: FSDP2, for zero 0, 1 and 3 alike


def shard(model, grid):
    """Wrap the model's parts, innermost first: weights are gathered before they run, gradients summed after.

    Experts live on a mesh of their own, since fewer ranks hold the same ones, and so do matrices cut by tensor. The
    router keeps float32 whatever the rest computes in. Embedding and head stay with the root, as they are used in more
    places than one. MTP's joining layers are used before and after the block they belong to, so they are a part of
    their own.
    """
    plan = grid.plan
    dense, tensor, expert = [mesh["replicate", "shard"] for mesh in (grid.dense, grid.tensor, grid.expert)]
    as_stored = MixedPrecisionPolicy(cast_forward_inputs=False)
    bf16 = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = bf16 if plan.precision == "bf16" else as_stored
    alone = set()                                                         # what no other rank holds
    if tensor.size() == 1:
        alone.update(module.weight for module in model.modules() if hasattr(module, "slice"))
    if expert.size() == 1:
        alone.update(*(block.mlp.experts.parameters() for block in model.moe_blocks()))

    def wrap(part, mesh=dense, mp_policy=policy, free=plan.zero == 3, **placement):
        fully_shard(part, mesh=mesh, mp_policy=mp_policy, reshard_after_forward=free, ignored_params=alone, **placement)

    # 1. matrices cut by tensor; embedding and head are children of the root, which takes them
    for part in model.modules():
        matrices = [child for child in part.children() if hasattr(child, "slice")]
        if matrices and tensor.size() > 1 and part is not model:
            wrap(matrices, tensor)
    # 2. layers
    for block in model.layers.values():
        if block.is_moe and expert.size() > 1:
            wrap(block.mlp.experts, expert, shard_placement_fn=partial(cut_inside_experts, plan))
        if block.is_moe:
            wrap(block.mlp.gate, mp_policy=as_stored)
        if isinstance(block, MTPLayer):
            wrap([block.enorm, block.hnorm, block.eh_proj, block.shared_head["norm"]])
        wrap(block)
    # 3. the last norm, and the root
    if model.norm is not None:
        wrap(model.norm)
    wrap(model, tensor, free=False)
    register_fsdp_forward_method(model, "draft")
    model.register_forward_pre_hook(hand_on_routing, with_kwargs=True)
    for part in fsdp_parts(model):
        # the loss is a sum over the global batch's tokens, so gradients are summed; gloo has nothing but plain sums
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def fsdp_parts(model):
    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def hand_on_routing(model, args, kwargs):
    """FSDP's hooks copy a dict of chosen experts, but not a UserDict, through which notes go to the caller's dict."""
    if kwargs.get("routing") is None:
        return args, kwargs
    routing = UserDict()
    routing.data = kwargs["routing"]
    return args, kwargs | dict(routing=routing)


def cut_inside_experts(plan, weight):
    """The dimension that zero cuts: inside the matrices, for ranks may outnumber experts; FSDP wants it cut evenly."""
    for dim in (1, 2):
        if weight.size(dim) % plan.edp == 0:
            return Shard(dim)
    return Shard(0)


def reduce_gradients(model, plan, last):
    """Call before each micro-batch: gradients are summed over ranks after the last one.

    With zero=3, which has no room for whole gradients, after each.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or plan.zero == 3)


@contextmanager
def generating(grid):
    """In here model.generate runs, on all ranks: those of a tensor group are given the same prompts, others their own.

    Yields its `anybody`: experts are exchanged in every step, so that ranks which are done go on with empty batches.
    With tp > 1 each rank of a tensor group sends every token to its experts: the same result, tp times their work.
    """
    if grid is None:
        yield bool
        return
    if grid.plan.pp > 1 or grid.plan.cp > 1:
        raise ValueError(f"pp={grid.plan.pp} cp={grid.plan.cp}: text is written with pp=1 and cp=1 alone")
    grid.tensor_group.whole = True
    try:
        yield lambda busy: all_sum(torch.tensor(int(busy), device=grid.device_type)).item() > 0
    finally:
        grid.tensor_group.whole = False


@torch.no_grad()
def init_weights(model, seed=0):
    """model.init_weights for a model that may be cut: the same numbers under every plan, one whole tensor at a time."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        module = model.get_submodule(name.rpartition(".")[0])
        shape = list(tensor.shape)
        if hasattr(module, "slice"):
            shape[module.slice.dim] *= module.slice.parts
        whole = torch.empty(shape, dtype=tensor.dtype)
        fill_initial(whole, model.config, name, seed, getattr(module, "first_expert", 0))
        part = own_slice(module, whole)
        if isinstance(tensor, DTensor):
            part = part.to(tensor.device)
            part = distribute_tensor(part, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(part)


def sum_loads(model, loads):
    """loads (own MoE layers, E), as pop_stats counts -> those of all MoE layers and ranks (MoE layers, E); own rows."""
    c = model.config
    rows = [block.index - c.first_k_dense_replace for block in model.moe_blocks()]
    whole = loads.new_zeros(c.num_hidden_layers + c.num_nextn_predict_layers - c.first_k_dense_replace, loads.size(1))
    whole[rows] = loads
    return all_sum(whole), rows


@torch.no_grad()
def grad_norm(model, grid=None):
    """Global norm of all gradients: each part counts once, however many ranks hold it. One all-reduce of all ranks."""
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    norms = norms_of([local(p.grad) for _, p in named])
    if grid is None:
        return norms.norm()
    shares = norms.new_tensor([1 / count_holders(name, p, grid) for name, p in named])
    return all_sum((norms.square() * shares).sum()).sqrt()


def param_groups(model):
    """Parameters for an optimizer by mesh, since fused and foreach steps refuse tensors of different ones."""
    by_axis = {None: [], "tp": [], "ep": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_axis[cut_of(name).axis].append(parameter)
    return [dict(params=parameters) for parameters in by_axis.values()]


# ---------------------------------------------------------------------------------------------------------------------
# Memory: what a plan recomputes and swaps; model.KeepAll says where
#
# Autograd gives every tensor that backward will need to Memory.pack and stores what pack returns; in backward it gives
# that to unpack and takes back a tensor. pack returns a note, which says where backward finds the tensor's memory:
#
#     Stored     on the device, where it stays, or in the host's memory, where it waits
#     Remade     nowhere: a recipe, that is an operator and what it was given, makes it again
#
# Example: recompute=act in an MLP, whose forward is  hidden = again("act", swiglu, gate_up); y = down_proj(hidden)
#
#     forward    swiglu saves gate_up           pack returns Stored, which holds gate_up
#                again leaves a note at hidden  Remade by the recipe swiglu(gate_up), which has the same Stored
#                down_proj saves hidden         pack finds this note and returns it
#                down_proj returns              nothing holds hidden any more, so its memory is free
#     backward   down_proj asks for hidden      the recipe takes gate_up from its Stored and runs swiglu, nothing else
#                swiglu asks for gate_up        its Stored has it
#
# Who holds what: autograd's graph holds the notes, so they live until backward has passed. A note is found from its
# storage, which is one for a tensor and its views: what is saved twice, or swapped after it was saved, has one note.
# The storage holds a Remade itself, as nobody else does before the first save, but its Stored by a weak reference:
# that one holds the storage, and the two would keep each other alive.


class Memory(KeepAll):
    """KeepAll with the names that a plan recomputes and swaps in force."""

    def __init__(self, plan, device):
        self.names = items_in_force(plan)
        self.streams = torch.get_device_module(device)                    # torch.cpu's streams do nothing
        self.side_stream = self.streams.Stream()                          # where copies to the host and back run
        self.swapped_now = weakref.WeakSet()                              # this layer's Stored that were swapped ...
        self.swapped_before = weakref.WeakSet()                           # ... and those of the layer before

    def attach(self, model):
        for module in model.modules():
            if isinstance(module, Part):
                module.memory = self
            if isinstance(module, Block) and "layer" in self.names:
                module.forward = partial(run_layer_twice, module)

    def hooks(self):
        """A context for forward."""
        if self.names <= {"optimizer"}:
            return nullcontext()                                          # autograd keeps all by itself
        return torch.autograd.graph.saved_tensors_hooks(self.pack, unpack)

    def pack(self, x):
        if not torch.is_tensor(x) or is_weight(x):
            return x
        return Packed(self.note_of(x), x.size(), x.stride(), x.storage_offset())

    def note_of(self, x):
        """The note of x's storage: a new Stored, if it has none."""
        storage = x.untyped_storage()
        note = getattr(storage, "note", None)
        if isinstance(note, weakref.ref):
            note = note()
        if note is None:
            note = Stored(self, x)
            storage.note = weakref.ref(note)
        return note

    # what model.py calls

    def again(self, names, make, *inputs):
        # not by torch's checkpoint: our matmul functions save their inputs after they ran, so it would run them too
        return self.remake(names, make(*inputs), make, *inputs)

    def remake(self, names, made, make, *inputs):
        if self.names.isdisjoint(names.split()) or not torch.is_grad_enabled():
            return made
        recipe = Recipe(make, [self.pack(x) for x in inputs])
        given = {id(x.untyped_storage()) for x in inputs if torch.is_tensor(x)}
        for index, x in enumerate(as_tuple(made)):
            if id(x.untyped_storage()) not in given:                      # else a view of what is kept anyway
                x.untyped_storage().note = Remade(recipe, index)
        return made

    def region(self, name, run, x):
        """By torch's checkpoint, which stops at the last thing that is saved inside. No router is in a region, so what
        runs again chooses no experts."""
        self.begin_layer()                                                # attention, the only region, comes first
        return checkpoint(run, x, **ONCE_MORE) if name in self.names else run(x)

    def swap(self, name, x):
        if name not in self.names or not torch.is_grad_enabled():
            return x
        note = self.note_of(x)
        if note.host is None:                                             # else x is a view of what was swapped
            note.send_to_host()
            self.swapped_now.add(note)
            x.note = note                                                 # nobody else holds it before the first save
        return x

    def begin_layer(self):
        """So tensors of one layer at a time are on their way out, and in backward those of one layer on the way in."""
        for stored in self.swapped_now:
            stored.leave_device()
        self.swapped_before, self.swapped_now = self.swapped_now, weakref.WeakSet()

    def copy_aside(self, to, source):
        """A copy on the side stream, behind all that was queued so far -> event of its end."""
        self.side_stream.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.side_stream):
            to.copy_(source, non_blocking=True)
            return self.side_stream.record_event()


class Packed(NamedTuple):
    """What autograd stores in place of a tensor: the note of its storage, and where in the storage it lies."""
    note: object
    size: tuple
    stride: tuple
    offset: int


def unpack(packed):
    if not isinstance(packed, Packed):
        return packed
    return packed.note.get().as_strided(packed.size, packed.stride, packed.offset)


def whole_storage(x):
    """The storage of x as a vector."""
    return x.new_empty(0).set_(x.untyped_storage())


def as_tuple(x):
    return (x,) if torch.is_tensor(x) else x


def is_weight(x):
    """A parameter, transposed or cast for a matmul or not: it counts as weights, not as saved for backward."""
    node = x.grad_fn
    while type(node).__name__ in ("TBackward0", "ToCopyBackward0"):
        node = node.next_functions[0][0]
    return isinstance(x, torch.nn.Parameter) or hasattr(node, "variable")


class Stored:
    """A storage on the device, or one that waits in the host's memory; get gives backward the whole of it.

    Swapped in four steps, on a CPU too, so that tests run the same code.
    1. send_to_host: a copy sets out. 2. leave_device: when the next layer begins, it has arrived, and the device is rid
    of it. 3. fetch: when backward comes to the layer behind, a copy sets out back. 4. get: backward waits for it.
    """

    def __init__(self, memory, x):
        self.memory, self.device = memory, x.device
        self.whole, self.host = whole_storage(x), None                    # what is where; None: it is not there

    def send_to_host(self):
        self.host = torch.empty_like(self.whole, device="cpu", pin_memory=self.device.type != "cpu")
        self.layer_before = self.memory.swapped_before                    # backward comes to it next
        self.copied = self.memory.copy_aside(self.host, self.whole)

    def leave_device(self):
        self.wait_for_copy()
        self.whole = None

    def fetch(self):
        if self.whole is None:
            self.whole = torch.empty_like(self.host, device=self.device)
            self.copied = self.memory.copy_aside(self.whole, self.host)

    def get(self):
        if self.host is not None:
            self.fetch()
            for stored in self.layer_before:
                stored.fetch()
            self.wait_for_copy()
        return self.whole

    def wait_for_copy(self):
        self.memory.streams.current_stream().wait_event(self.copied)


class Recipe:
    """make of packed inputs, which backward runs once for all that ask for what it makes, other recipes among them."""

    def __init__(self, make, inputs):
        self.make, self.inputs = make, inputs
        self.made = None

    @torch.enable_grad()                                                  # as in forward: some operators choose by it
    def get(self, index):
        if self.made is None:
            made = self.make(*[unpack(x) for x in self.inputs])
            self.made = [x.detach() for x in as_tuple(made)]
        return whole_storage(self.made[index])


class Remade(NamedTuple):
    """One of the tensors that a recipe makes."""
    recipe: Recipe
    index: int

    def get(self):
        return self.recipe.get(self.index)


# a layer that runs again as a whole

ONCE_MORE = dict(use_reentrant=False, preserve_rng_state=False)           # of checkpoint; nothing here is random


def run_layer_twice(block, x, angles, mask=None, routing=None, cache=None):
    """Block.forward that keeps its input and the chosen experts alone."""
    chosen = {} if routing is None else routing                           # noted in the first run, forced in the second

    def contexts():
        return nullcontext(), uncounted(block) if block.is_moe else nullcontext()

    return checkpoint(Block.forward, block, x, angles, mask, chosen, cache, context_fn=contexts, **ONCE_MORE)


@contextmanager
def uncounted(block):
    """A layer with experts that runs again counts no loads."""
    load, dropped = block.mlp.gate.load, block.mlp.dropped
    try:
        yield
    finally:
        block.mlp.gate.load, block.mlp.dropped = load, dropped


class HostAdamW(torch.optim.AdamW):
    """AdamW whose moments wait in the host's memory; a step has STEP_BYTES of them on the device at a time."""

    def step(self, closure=None):
        groups = self.param_groups
        for group in groups:
            for parameters in in_slices(group["params"]):
                self.param_groups = [group | dict(params=parameters)]
                self.move_moments(parameters, parameters[0].device)
                super().step()
                self.move_moments(parameters, "cpu")
        self.param_groups = groups

    def move_moments(self, parameters, device):
        for parameter in parameters:
            state = self.state[parameter]
            for name in state.keys() - {"step"}:
                state[name] = state[name].to(device, copy=True)


def in_slices(parameters):
    """Consecutive parameters whose two moments have at most STEP_BYTES, or one parameter that has more."""
    slices, room = [], 0
    for parameter in parameters:
        both_moments = 2 * local(parameter).nbytes
        if not slices or both_moments > room:
            slices.append([])
            room = STEP_BYTES
        slices[-1].append(parameter)
        room -= both_moments
    return slices


# ---------------------------------------------------------------------------------------------------------------------
# Segments: a stage's work on a micro-batch, cut where an exchange is under way
#
# Each segment is an autograd graph of its own: what enters is cut off from what made it, so backward goes segment by
# segment too, in reverse, and another micro-batch's segments fit in between. An exchange begins in one segment and ends
# in a later one; whatever runs between the two hides it.


class Segment(NamedTuple):
    """Alone it is a piece of a stage beside its layers: embedding, MTP's joining, losses."""
    run: Callable                          # tensors -> tuple of tensors
    takes: tuple                           # their names; each is read once
    gives: tuple
    is_layer: bool = False

    @property
    def segments(self):
        return [self]


class LayerSegments:
    """A layer on one micro-batch, in six segments; pair_layer says what runs beside what.

        attend       x               ->  x, h, rows, weights     h: the MLP's input; rows and weights set out to experts
        relay        rows, weights   ->  rows, weights           between the two hops of an exchange
        experts      rows, weights   ->  out                     sets out back
        relay_back   out             ->  out
        shared       h               ->  shared                  by the shared expert, or a dense layer's MLP
        combine      x, shared, out  ->  x

    Rows, weights and out are None in a dense layer, and nothing is under way where experts are here: then a relay does
    nothing.
    """
    is_layer = True

    def __init__(self, block, angles, mask, routing, add_aux_loss):
        self.block, self.mlp, self.angles, self.mask = block, block.mlp, angles, mask
        self.chosen = {} if routing is None else routing                  # noted; forced if the layer runs again
        self.add_aux_loss = add_aux_loss
        self.has_run = False
        self.travels = block.is_moe and hasattr(self.mlp.dispatcher, "relay")
        self.segments = [Segment(self.attend, ("x",), ("x", "h", "rows", "weights")),
                         Segment(self.relay, ("rows", "weights"), ("rows", "weights")),
                         Segment(self.experts, ("rows", "weights"), ("out",)),
                         Segment(self.relay_back, ("out",), ("out",)),
                         Segment(self.shared, ("h",), ("shared",)),
                         Segment(self.combine, ("x", "shared", "out"), ("x",))]

    def attend(self, x):
        x = self.block.attend(x, self.angles, self.mask)
        if not self.block.is_moe:
            return x, self.block.dispatch(x), None, None
        with uncounted(self.block) if self.has_run else nullcontext():
            h, _, rows, weights, self.counts, self.route = self.block.dispatch(x, self.chosen)
        if not self.has_run:
            self.add_aux_loss(self.mlp.gate.aux_loss)
        self.has_run = True
        self.h = h                                                        # rows may be made from it again
        return x, h, rows, weights

    def relay(self, rows, weights):
        return self.mlp.dispatcher.relay(rows, weights, self.route) if self.travels else (rows, weights)

    def experts(self, rows, weights):
        if not self.block.is_moe:
            return (None,)
        h, self.h = self.h, None
        out = self.mlp.compute_routed(h, rows, weights, self.counts, self.route)
        return (self.mlp.dispatcher.send_back(out, self.route) if self.travels else out,)

    def relay_back(self, out):
        return (self.mlp.dispatcher.relay_back(out, self.route) if self.travels else out,)

    def shared(self, h):
        mlp = self.mlp.shared_experts if self.block.is_moe else self.mlp
        return (None if mlp is None else mlp(h),)

    def combine(self, x, shared, out):
        done = (out, shared, x.shape, self.route) if self.block.is_moe else shared
        return (self.block.combine(x, done),)


class Chunk:
    """One micro-batch on one stage: its segments, the tensors between them, and what backward needs of each.

    Example, two segments: `attend` takes x and gives x and h, `shared` takes h and gives shared.

        forward    values x            attend runs on x, cut off; tape: [edges of x and h]
                   values x, h         shared runs on h, cut off; tape: [edges of x and h, edge of shared]
        backward   grads of x, shared  from the edge of shared to where h was cut off, which leaves its gradient
                   grads of x, h       from the edges of x and h to where x was cut off
    """

    def __init__(self, pieces, x, memory):
        """pieces: LayerSegments and single segments, in the order of forward."""
        self.pieces, self.memory = pieces, memory
        self.segments = [segment for piece in pieces for segment in piece.segments]
        self.piece_of = [piece for piece in pieces for _ in piece.segments]            # of each segment
        self.values, self.grads = {"x": x}, {}
        self.tape = []                     # of each segment that ran, where in its graph what it gave was made: edges
        self.layer_inputs = []             # packed, of layers that will run again

    def forward(self, times=1):
        """Run the next segments."""
        for _ in range(times):
            piece = self.piece_of[len(self.tape)]
            if piece.is_layer and "layer" in self.memory.names and torch.is_grad_enabled():
                self.run_without_graph(piece)
            else:
                self.run_next()

    def run_next(self):
        segment = self.segments[len(self.tape)]
        with self.memory.hooks():
            outputs = segment.run(*[self.enter(name) for name in segment.takes])
        self.tape.append([edge_of(x) for x in outputs])
        self.values.update(zip(segment.gives, outputs))

    def run_without_graph(self, layer):
        """The next segment of a layer that will run again: it keeps the layer's input alone."""
        if self.segments[len(self.tape)] is layer.segments[0]:
            self.layer_inputs.append(self.memory.pack(self.values["x"].detach()))
        with torch.no_grad():
            self.run_next()
        self.tape[-1] = None

    def enter(self, name):
        """A value, cut off from what made it."""
        x = self.values.pop(name)
        if x is None or not x.is_floating_point() or not torch.is_grad_enabled():
            return x
        return Enter.apply(torch.empty(0, requires_grad=True), x.detach(), self.grads, name)

    def backward(self, times=1):
        """Run the last segments backward; the gradient of what the last one gave stands in grads."""
        for _ in range(times):
            if self.tape[-1] is None:
                self.run_layer_again()
            edges = self.tape.pop()
            segment = self.segments[len(self.tape)]
            found = [(edge, self.grads.pop(name, None)) for edge, name in zip(edges, segment.gives)]
            found = [(edge, grad) for edge, grad in found if edge is not None and grad is not None]
            if found:
                torch.autograd.backward(*zip(*found))

    @torch.enable_grad()
    def run_layer_again(self):
        """The segments of the last layer that ran, now with a graph."""
        layer = self.piece_of[len(self.tape) - 1]
        del self.tape[-len(layer.segments):]
        values, self.values = self.values, {"x": unpack(self.layer_inputs.pop())}
        for _ in layer.segments:
            self.run_next()
        self.values = values


def edge_of(x):
    return get_gradient_edge(x) if x is not None and x.requires_grad else None


class Enter(torch.autograd.Function):
    """Where a segment begins: backward leaves the gradient of x in grads. Unlike a leaf, nothing holds x here."""

    @staticmethod
    def forward(ctx, anchor, x, grads, name):
        ctx.grads, ctx.name = grads, name
        return x.new_empty(0).set_(x)                                     # no view: an exchange may still fill x

    @staticmethod
    def backward(ctx, grad):
        ctx.grads[ctx.name] = grad
        return None, None, None, None


def backward_piece(chunk, piece, store):
    """Weight gradients of the experts hide the way back of the gradients, which the last segment left waits for."""
    chunk.backward(len(piece.segments) - 1)
    store.pop()
    chunk.backward()


def run_pair(forward, backward, store):
    """A forward of one micro-batch among a backward of another, layer by layer: each hides the other's exchanges.
    Either may be None: then it is the other alone."""
    to_forward = list(forward.pieces) if forward else []
    to_backward = backward.pieces[::-1] if backward else []
    while to_forward or to_backward:
        if to_backward and not (to_forward and to_backward[0].is_layer):
            backward_piece(backward, to_backward.pop(0), store)
        elif not (to_backward and to_forward[0].is_layer):
            forward.forward(len(to_forward.pop(0).segments))
        else:
            pair_layer(forward, backward, store)
            del to_forward[0], to_backward[0]
    store.pop()


def pair_layer(forward, backward, store):
    """With one hop the fast and the slow one below are the same, and a relay does nothing."""
    backward.backward()                    # combine: gradients set out over the slow hop ...
    forward.forward()                      # ... which attention hides; tokens set out over the slow hop
    backward.backward(2)                   # ... and the shared expert; relay: gradients over the fast hop ...
    store.pop()                            # ... which the shared expert's weight gradients hide
    backward.backward()                    # experts' input gradients hide the tokens' slow hop; then the fast one ...
    forward.forward()                      # ... and the tokens over theirs ...
    store.pop(1)                           # ... which a part of the experts' weight gradients hides
    backward.backward()                    # relay_back: gradients back over the slow hop ...
    forward.forward()                      # ... which the experts hide; rows back over the fast hop ...
    backward.backward()                    # ... which attention hides
    forward.forward(2)                     # relay_back: rows back over the slow hop, which the shared expert hides ...
    store.pop()                            # ... with the other weight gradients of experts and of attention
    forward.forward()                      # combine


# ---------------------------------------------------------------------------------------------------------------------
# Pipeline: the actions of sim.py's table, run by torch's pipelining runtime or, on one pipeline rank, one by one


class Pipeline:
    """Runs the micro-batches of a step: one after the other where there is no pipeline and no overlap, else the actions
    of sim.py's table. Those have the weights whole during the step, also under zero=3, and reduce gradients at its end.
    """

    def __init__(self, model, plan, grid=None):
        self.model, self.plan, self.grid = model, plan, grid
        self.layers = stage_layers(model.config, plan)
        self.stages = plan.stages_of(grid.pp_rank if grid else 0)
        self.last_stage = plan.n_stages - 1
        self.store = None if plan.is_plain else WeightGradStore()
        for module in model.modules():
            if hasattr(module, "store"):
                module.store = self.store
        self.memory = Memory(plan, next(model.parameters()).device)
        self.memory.attach(model)
        self.runtimes = {}                 # number of micro-batches -> TorchRuntime

    def step(self, batches, loss_tokens, train=True):
        """Forward and backward of a global batch, or its forward alone; weights stay as they are.

        batches: for each micro-batch Model.forward's arguments, as a dict, of whole sequences; the same on ranks that
        share them. loss_tokens (1+MTP,): target tokens of the global batch. -> Output, without graph: this rank's
        shares, whose sums over all ranks are the losses.
        """
        # an evaluation may have another number of micro-batches than the plan
        plan = replace(self.plan, global_batch=len(batches) * self.plan.dp * self.plan.micro_batch)
        if plan.cp * plan.tp > 1:
            n_mtp = self.model.config.num_nextn_predict_layers
            batches = [own_tokens(plan, n_mtp, **batch) for batch in batches]
        self.batches, self.loss_tokens, self.train = batches, loss_tokens, train
        self.sums = dict.fromkeys(("loss", "mtp_loss", "aux_loss"), loss_tokens.new_zeros(()))
        with torch.set_grad_enabled(train):
            if plan.is_plain:
                self.run_plain()
            else:
                self.run_table(plan)
        sums, mtp_weight = self.sums, self.model.config.mtp_loss_weight
        return Output(**sums, total_loss=sums["loss"] + mtp_weight * sums["mtp_loss"] + sums["aux_loss"])

    def run_plain(self):
        for number, batch in enumerate(self.batches, 1):
            reduce_gradients(self.model, self.plan, last=number == len(self.batches))
            with self.memory.hooks():
                out = self.model(**batch, loss_tokens=self.loss_tokens)
            if self.train:
                out.total_loss.backward()
            for name in self.sums:
                self.add(name, getattr(out, name))
            del out                                                       # and its graph, before the next one is made

    def run_table(self, plan):
        self.chunks = {}                   # (stage, micro-batch) -> Chunk, from its forward to its backward
        self.gather_weights()
        if plan.pp == 1:
            for action in schedule_table(plan)[0]:
                self.perform(action.parts())
        else:
            if plan.n_micro not in self.runtimes:
                self.runtimes[plan.n_micro] = self.make_runtime(plan)
            self.runtime = self.runtimes[plan.n_micro]
            self.runtime.step(self.train)
        self.release_weights()

    def make_runtime(self, plan):
        shape = plan.micro_batch, plan.tokens // plan.micro_batch, self.model.config.hidden_size
        x = torch.empty(shape, dtype=model_dtype(self.model), device="meta", requires_grad=True)
        device, group = next(self.model.parameters()).device, self.grid.dense.get_group("pp")
        return TorchRuntime(self.stages, plan.n_stages, schedule_table(plan), plan.n_micro, x, device, group,
                            self.perform)

    # one action: a chunk begins with what its neighbour sent, and ends with what its neighbour waits for

    def perform(self, parts):
        """parts: one or two of (kind, stage, microbatch), kind F or B; two are a pair, its forward first."""
        if not self.train:
            parts = [part for part in parts if part[0] == "F"]
        beside = self.plan.overlap == "adaptive"                          # two of a pair, or one after the other
        for together in [parts] if beside else [[part] for part in parts]:
            chunks = {part[0]: self.begin(*part) for part in together}
            run_pair(chunks.get("F"), chunks.get("B"), self.store)
            for part in together:
                self.end(chunks[part[0]], *part)

    def begin(self, kind, stage, microbatch):
        """The Chunk of an action, with what the neighbour sent: an input, or the gradient of the output."""
        if kind == "F":
            batch = self.batches[microbatch]
            x = self.runtime.received_input(stage, microbatch) if stage > 0 else batch["ids"]
            return Chunk(self.pieces(stage, **batch), x, self.memory)
        chunk = self.chunks.pop((stage, microbatch))
        if stage == self.last_stage:                                      # where nothing comes from behind
            chunk.grads["loss"] = torch.ones_like(chunk.values["loss"])
        else:
            chunk.grads["x"] = self.runtime.received_gradient(stage, microbatch)
        return chunk

    def end(self, chunk, kind, stage, microbatch):
        if kind == "F":
            if self.train:
                self.chunks[stage, microbatch] = chunk
            if stage < self.last_stage:
                self.runtime.send_output(stage, microbatch, chunk.values.pop("x").detach().contiguous())
            return
        end_sharded_backward(self.model)
        if stage > 0:
            self.runtime.send_gradient(stage, microbatch, chunk.grads.pop("x").contiguous())

    # a stage's segments

    def pieces(self, stage, ids, targets=None, positions=None, doc_ids=None, next_ids=None, routing=None):
        """What Model.forward does, as pieces of a Chunk: embedding, layers, what joins MTP layers to them, losses."""
        model, n_mtp = self.model, self.model.config.num_nextn_predict_layers
        positions, next_ids = fill_inputs(ids, targets, n_mtp, positions, next_ids)
        angles, mask = rope_table(model.config, positions, model_dtype(model)), document_mask(doc_ids)

        def embed(ids):
            return (model.embed(ids),)

        def losses(x, *hiddens):
            hiddens = [*hiddens, model.head_norm(len(hiddens))(x)]
            out = model.output(hiddens, targets, self.loss_tokens, False)
            self.add("loss", out.loss)
            self.add("mtp_loss", out.mtp_loss)
            return (out.loss + model.config.mtp_loss_weight * out.mtp_loss,)

        pieces, hiddens = [], []                                          # hiddens: names of what the head will read
        if stage == 0:
            pieces.append(Segment(embed, ("x",), ("x",)))
        for index in self.layers[stage]:
            block = model.layers[str(index)]
            if isinstance(block, MTPLayer):
                join = partial(model.join, len(hiddens), next_ids=next_ids)
                hiddens.append(f"hidden {len(hiddens)}")
                pieces.append(Segment(join, ("x",), (hiddens[-1], "x")))
            pieces.append(LayerSegments(block, angles, mask, routing, partial(self.add, "aux_loss")))
        if stage == self.last_stage:
            pieces.append(Segment(losses, ("x", *hiddens), ("loss",)))
        return pieces

    def add(self, name, value):
        self.sums[name] = self.sums[name] + value.detach()

    # FSDP: its hooks on layers do not run, since segments call a layer's parts

    def gather_weights(self):
        prepare_sharding(self.model)
        self.set_last_backward(False)
        for part in fsdp_parts(self.model):
            part.unshard()

    def release_weights(self):
        """With gradients reduced over data ranks, and the embedding's over its two stages."""
        if not self.train:
            for part in fsdp_parts(self.model):
                part.reshard()
            return
        self.set_last_backward(True)
        end_sharded_backward(self.model)
        if self.grid and self.grid.embedding_twice and self.model.embed_tokens is not None:
            self.add_other_embedding(local(self.model.embed_tokens.weight.grad))

    def add_other_embedding(self, grad):
        """First and last pipeline rank hold a copy each, which must stay equal: both take the sum."""
        other, peer = torch.empty_like(grad), self.plan.pp - 1 - self.grid.pp_rank
        both = dict(group=self.grid.dense.get_group("pp"), group_peer=peer)
        operations = [dist.P2POp(dist.isend, grad, **both), dist.P2POp(dist.irecv, other, **both)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        grad += other

    def set_last_backward(self, last):
        """Whether the next end of a backward reduces gradients over ranks and lets go of whole weights."""
        if isinstance(self.model, FSDPModule):
            self.model.set_is_last_backward(last)
            self.model.set_reshard_after_backward(last)
            self.model.set_requires_gradient_sync(last)


def model_dtype(model):
    """Of the residual stream."""
    return model.compute_dtype or next(model.parameters()).dtype


# ---------------------------------------------------------------------------------------------------------------------
# Live load balance: experts move to where the load is
#
# sim.py predicts loads and plans placements, the same on every rank; here they are carried out. A placement is an array
# (ep, slots) of expert numbers: which expert is in which slot of which rank. Slots of all ranks are numbered in a row.
#
# Router, its optimizer state and bias, loads and the balance loss know experts by their own numbers, so nothing of them
# moves: only dispatch looks up in which slot an expert is now. Checkpoints hold experts in order of their numbers, for
# any plan and reader.


def leaving_and_arriving(old, new, me):
    """What rank `me` sends to and gets from each rank, between two placements (ep, slots): two lists of its slots.

    leaving[r] are the slots whose experts go to rank r, arriving[r] those where experts of rank r come, both in the
    order of the receiver's slots. What stays in its slot is left out.
    """
    ep, n_slots = old.shape
    came_from = np.argsort(old.flatten())[new]                            # (ep, slots) slot where each expert was
    sender, sender_slot = came_from // n_slots, came_from % n_slots
    changed = old != new
    leaving = [sender_slot[rank][changed[rank] & (sender[rank] == me)] for rank in range(ep)]
    arriving = [np.flatnonzero(changed[me] & (sender[me] == rank)) for rank in range(ep)]
    return leaving, arriving


def move_experts(tensors, old, new, group):
    """Experts of one layer from an old placement to a new one, by one all-to-all.

    tensors: (slots, ...) on this rank, weights and optimizer states, cut alike on all ranks of the group.
    """
    leaving, arriving = leaving_and_arriving(old, new, group.rank)
    send, recv = [len(slots) for slots in leaving], [len(slots) for slots in arriving]
    device = tensors[0].device
    leaving = torch.tensor(np.concatenate(leaving), device=device)
    arriving = torch.tensor(np.concatenate(arriving), device=device)
    rows = torch.cat([tensor[leaving].flatten(1) for tensor in tensors], 1)       # (experts that go, values of each)
    rows, work = group.all_to_all(rows, send, recv)
    work.wait()
    sizes = [tensor[0].numel() for tensor in tensors]
    for tensor, part in zip(tensors, rows.split(sizes, 1)):
        tensor[arriving] = part.view(-1, *tensor.shape[1:])


class LiveBalance:
    """Where the experts of each MoE layer are, what load they are expected to get, and their moves.

    Every rank plans for all layers, by loads of all ranks, and moves those it holds.

        line |= live.after_step(step, loads, optimizer)      # observes, and every plan.balance_live steps rebalances
        with live.at_home(optimizer):                        # while a checkpoint is taken
    """

    def __init__(self, model, grid):
        config, self.plan = model.config, grid.plan
        n_layers = config.num_hidden_layers + config.num_nextn_predict_layers - config.first_k_dense_replace
        self.group = grid.expert_group
        self.moes = {block.index - config.first_k_dense_replace: block.mlp for block in model.moe_blocks()}
        for moe in self.moes.values():
            moe.dispatcher = copy(moe.dispatcher)                         # each layer's, with a slot_of of its own
        self.expected = torch.zeros(n_layers, config.n_routed_experts, device=grid.device_type)
        self.first = first_placement(config.n_routed_experts, self.plan.ep)
        self.placements = [self.first] * n_layers
        self.expert_in = torch.zeros_like(self.expected, dtype=torch.int64)      # (layers, E) the placements, by slot
        for layer in range(n_layers):
            self.place(layer, self.first)

    def place(self, layer, placement):
        """From now on a layer's experts are there: dispatch and observe know."""
        self.placements[layer] = placement
        self.expert_in[layer] = torch.tensor(placement.flatten())
        if layer in self.moes:                                            # else it is on another pipeline rank
            self.moes[layer].dispatcher.slot_of = self.expert_in[layer].argsort()

    def after_step(self, step, loads, optimizer):
        """What metrics.jsonl tells of the step; see observe and rebalance."""
        line = dict(device_vio=self.observe(loads).item())
        if step % self.plan.balance_live == 0:
            line |= self.rebalance(optimizer)
        return line

    def observe(self, loads):
        """loads (MoE layers, E) of a step, summed over all ranks -> imbalance of the ranks, a mean over layers."""
        loads = loads.to(self.expected)
        self.expected = predict_load(self.expected, loads)
        of_ranks = loads.gather(1, self.expert_in).unflatten(1, self.first.shape).sum(2)      # (layers, ep)
        return (of_ranks.amax(1) / of_ranks.mean(1) - 1).mean()

    def rebalance(self, optimizer):
        """Plan by the expected loads, and move: what metrics.jsonl tells of it."""
        began = time.perf_counter()
        expected, old = self.expected.double().cpu().numpy(), list(self.placements)
        new = [decide(load, placement, self.plan.balance_threshold) for load, placement in zip(expected, old)]
        self.move_to(new, optimizer)
        return dict(balance_before=mean_imbalance(expected, old), balance_after=mean_imbalance(expected, new),
                    balance_moved=sum(map(moved_experts, old, new)), balance_s=time.perf_counter() - began)

    @torch.no_grad()
    def move_to(self, placements, optimizer):
        """Weights and what the optimizer keeps of them: every state of a weight's own shape."""
        old = list(self.placements)
        for layer, placement in enumerate(placements):
            if (placement == old[layer]).all():
                continue
            if layer in self.moes:
                tensors = self.tensors_of_experts(layer, optimizer)
                move_experts(tensors, old[layer], placement, self.group)
            self.place(layer, placement)

    def tensors_of_experts(self, layer, optimizer):
        """(slots, ...) each: weights of a layer's experts on this rank, and the optimizer's states of their shape."""
        tensors = []
        for weight in self.moes[layer].experts.parameters():
            tensors.append(local(weight))
            tensors += [local(state) for state in optimizer.state[weight].values() if state.shape == weight.shape]
        return tensors

    @contextmanager
    def at_home(self, optimizer):
        """Experts stand in order of their numbers, as checkpoints hold them."""
        placements = list(self.placements)
        self.move_to([self.first] * len(placements), optimizer)
        try:
            yield
        finally:
            self.move_to(placements, optimizer)

    def state(self):
        """For a checkpoint: lists of plain numbers, the same on every rank."""
        return dict(placement=[placement.tolist() for placement in self.placements], expert_load=self.expected.tolist())

    def restore(self, state, optimizer):
        """After weights and optimizer, which are at home, were read. Placements of another plan are planned again."""
        if not state["placement"]:
            return
        self.expected.copy_(torch.tensor(state["expert_load"]))
        placements = [np.array(placement) for placement in state["placement"]]
        whole = all(np.array_equal(np.sort(placement, None), np.arange(self.first.size)) for placement in placements)
        if not whole or len(placements) != len(self.placements):
            raise CheckpointError("the checkpoint places other experts than the model has: it is damaged")
        if placements[0].shape != self.first.shape:
            placements = [plan_placement(load, self.first) for load in self.expected.double().cpu().numpy()]
        self.move_to(placements, optimizer)


def mean_imbalance(loads, placements):
    """Of the ranks, a mean over layers: loads (layers, E), a placement for each layer."""
    return float(np.mean([imbalance(load, placement) for load, placement in zip(loads, placements)]))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
#
# A folder step_N, written by torch.distributed.checkpoint (DCP) while training goes on:
#
#     *.distcp        tensors, whole by name, each rank's part of them in a file of its own
#     .metadata       DCP's list of the parts: which tensor, which slice, in which file
#     progress.json   plain numbers: steps, tokens, where experts live
#     files.json      sizes and checksums of the others; written last, so that later damage shows
#
# No plan changes the names and shapes of whole tensors, so any plan reads what any other wrote.
# It may come from anywhere, so nothing in it can name code to run: JSON, tensors, and DCP's list of known types.

MANIFEST, PROGRESS, DCP_LIST = "files.json", "progress.json", ".metadata"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or of another shape."""


class SaveFailed(OSError):
    """A checkpoint that could not be written."""


BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)             # of ranks with other parts of the model too


def train_state(model, optimizer):
    """The tensors of a checkpoint: model, optimizer: {name: tensor}, by names that do not depend on the plan; random.

    Without the optimizer's settings, such as its betas: a run that goes on gives them.
    """
    weights, optimizer_state = get_state_dict(model, optimizer, options=BY_NAME)
    moments = {name: value for name, value in optimizer_state.items() if torch.is_tensor(value)}
    return dict(model=weights, optimizer=moments, random=torch.get_rng_state())


def whole_tensors(state, grid):
    """The state with each tensor that experts or tensor parallelism cut declared as this rank's part of the whole, in
    the same memory: files know whole tensors, and any plan can read them. E.g. local experts (E / ep, ...) as a slice
    of (E, ...)."""
    if grid is None:
        return state
    whole = dict(state)
    for kind in {"model", "optimizer"} & state.keys():
        whole[kind] = {name: part_of_whole(name, tensor, grid) for name, tensor in state[kind].items()}
    return whole


def part_of_whole(name, tensor, grid):
    dim, axis = cut_of(name)
    if axis is None or tensor.dim() < 2:                                  # vectors are not cut, nor counts of steps
        return tensor
    mesh = (grid.expert if axis == "ep" else grid.tensor)["replicate", axis, "shard"]
    if mesh.device_type != tensor.device.type:                            # moments with the host, which stay there
        mesh = DeviceMesh.from_group(mesh.get_all_groups(), tensor.device.type, mesh.mesh,
                                     mesh_dim_names=mesh.mesh_dim_names)
    shape = list(tensor.shape)
    shape[dim] *= mesh.size(1)
    stride = torch.empty(shape, device="meta").stride()
    by_zero = tensor.placements[-1] if isinstance(tensor, DTensor) else Shard(0)        # of a mesh of one rank, any
    return DTensor.from_local(local(tensor), mesh, (Replicate(), Shard(dim), by_zero), run_check=False,
                              shape=torch.Size(shape), stride=stride)


def steps_in(folder):
    """Steps of the complete checkpoints in a run's ckpt folder, ascending."""
    names = [path.name for path in Path(folder).glob("step_*")]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


# writing


class Saver:
    """Writes checkpoints into folder while training goes on, at most one at a time, and keeps the last few.

        1. save copies the state and returns; the rest happens in threads
        2. every rank writes its parts into step_N.tmp; if one fails, DCP tells all
        3. rank 0 adds progress.json, then the list of all files, renames the folder to step_N and deletes the oldest

    Each rank waits for the end of 3; if anything failed, the folder goes, and all have failed. So a folder without .tmp
    was whole, and nobody looks for it before it has its name. SaveFailed tells of the disk's refusal at the next call
    of any method.
    """

    def __init__(self, folder, keep, keep_too=lambda steps: ()):
        """keep: newest checkpoints that stay; keep_too: of all steps, ascending, those whose checkpoints stay, too."""
        self.folder, self.keep, self.keep_too = Path(folder), keep, keep_too
        # the thread that writes talks over a group of its own
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            for unfinished in self.folder.glob("step_*.tmp"):
                shutil.rmtree(unfinished)
        self.pool = ThreadPoolExecutor(1)
        self.pending = None

    def save(self, state, progress, grid=None):
        """state: of train_state. progress: dict of plain numbers, or lists of them, among them the step."""
        self.wait()
        unfinished = self.folder / f"step_{progress['step']}.tmp"
        written = dcp.async_save(whole_tensors(state, grid), checkpoint_id=str(unfinished), process_group=self.group,
                                 no_dist=self.group is None)
        self.pending = self.pool.submit(self.complete, written, unfinished, json.dumps(progress))

    def complete(self, written, unfinished, progress):
        error = None
        try:
            written.result()
            if rank() == 0:
                self.publish(unfinished, progress)
        except (OSError, CheckpointException, RuntimeError) as caught:
            error = caught
        failed = torch.tensor(error is not None, dtype=torch.int32)
        if self.group is not None:
            dist.all_reduce(failed, group=self.group)
        if failed:
            shutil.rmtree(unfinished, ignore_errors=True)                 # gives its space back
            cause = in_one_line(cause_of(error)) if error else "on another rank"
            raise SaveFailed(f"checkpoint {unfinished.with_suffix('')} could not be written ({cause})") from error

    def publish(self, unfinished, progress):
        write_synced(unfinished / PROGRESS, [progress.encode()])
        write_manifest(unfinished)
        final = unfinished.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        sync_folder(self.folder)
        steps = steps_in(self.folder)
        for step in set(steps[:-self.keep]).difference(self.keep_too(steps)):
            shutil.rmtree(self.folder / f"step_{step}")

    def poll(self):
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self):
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def write_manifest(folder):
    files = {path.name: [path.stat().st_size, checksum(path)] for path in sorted(folder.iterdir())}
    write_synced(folder / MANIFEST, [json.dumps(files).encode()])
    sync_folder(folder)


def checksum(path):
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def write_synced(path, parts):
    """A file of bytes, which come one after the other."""
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder):
    """Makes a new name last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def cause_of(error):
    """The error at the bottom of one of DCP's, which wraps those of each rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, CheckpointError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return error


def in_one_line(error):
    """The operating system's words, or else the error's first line."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


# reading


def read_json(folder, name):
    """What a JSON file of a checkpoint holds: an object, or the checkpoint is damaged."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder} is damaged: {name} is missing or cannot be read")
    return content


def check_files(folder):
    """CheckpointError with the file's name, if one is missing or not as written."""
    for name, (size, crc) in listed_files(folder).items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{folder} is damaged: {name} has {path.stat().st_size} of {size} bytes")
        if checksum(path) != crc:
            raise CheckpointError(f"{folder} is damaged: the content of {name} is not what was written")


def listed_files(folder):
    """What write_manifest wrote: {name: [size, checksum]}."""
    files = read_json(folder, MANIFEST)
    for name, written in files.items():
        if Path(name).name != name or not name.isprintable() or not is_numbers(written) or len(written) != 2:
            raise CheckpointError(f"{folder} is damaged: {MANIFEST} is not a list of files with sizes and checksums")
    return files


def is_numbers(x):
    """A list of numbers, or of lists of numbers, and so on."""
    return isinstance(x, list) and all(type(item) in (int, float) or is_numbers(item) for item in x)


def load_progress(folder, progress):
    """Fills a dict in place: its names and the type of each value stay; a list is one of numbers."""
    found = read_json(folder, PROGRESS)
    for name, value in progress.items():
        new = found.get(name)
        right = is_numbers(new) if isinstance(value, list) else type(new) is type(value)
        if not right:
            raise CheckpointError(f"{folder} is damaged: {PROGRESS} has no {name} of the right kind")
        progress[name] = new


class DCPList(pickle.Unpickler):
    """Reads .metadata, a pickle, which could call anything: here no more than what DCP writes into it of tensors."""
    known = {"torch": "Size float64 float32 bfloat16 float16 int64 uint8",
             "torch.serialization": "_get_layout",
             "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex TensorStorageMetadata TensorProperties "
                                                      "ChunkStorageMetadata StorageMeta _MEM_FORMAT_ENCODING",
             "torch.distributed.checkpoint.filesystem": "_StorageInfo",
             "pathlib": "PosixPath"}

    def find_class(self, module, name):
        if name not in self.known.get(module, "").split():
            raise CheckpointError(f"{DCP_LIST} names {module + '.' + name!r}, which no checkpoint needs")
        return super().find_class(module, name)


def read_list(folder):
    """DCP's Metadata of a checkpoint, which names no file but those of the manifest."""
    try:
        with open(folder / DCP_LIST, "rb") as file:
            metadata = DCPList(file).load()
        named = {part.relative_path for part in metadata.storage_data.values()}
        metadata.storage_meta = StorageMeta()
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from None
    except Exception as error:                                            # a pickle that is none fails in any way
        raise CheckpointError(f"{folder} is damaged: {DCP_LIST} cannot be read ({in_one_line(error)})") from error
    unlisted = named - listed_files(folder).keys()
    if unlisted:
        raise CheckpointError(f"{folder} is damaged: {DCP_LIST} names {unlisted.pop()!r}, which is not in {MANIFEST}")
    return metadata


class SafeReader(dcp.FileSystemReader):
    """DCP's, but for the list of parts, which is refused before ranks wait for each other. Tensors it reads by
    torch.load with weights_only."""

    def __init__(self, folder):
        super().__init__(folder)
        self.list = read_list(folder)

    def read_metadata(self, *args, **kwargs):
        return self.list


def load_state(folder, state, grid=None):
    """Fills state (as of train_state, or a part of it) in place, whatever plan wrote it. Without a grid a rank reads
    alone. CheckpointError if it is damaged or of another shape."""
    reader = SafeReader(folder)
    try:
        dcp.load(whole_tensors(state, grid), storage_reader=reader, no_dist=grid is None)
    except CheckpointException as error:
        cause = cause_of(error)
        if isinstance(cause, (CheckpointError, pickle.UnpicklingError)):
            raise CheckpointError(f"{folder} is damaged: {in_one_line(cause)}") from error
        raise CheckpointError(f"{folder} holds a model of another shape than its config.json ({in_one_line(cause)}): "
                              f"give back the config.json it was written with") from error


# both, for a trainer


def save(saver, model, optimizer, progress, grid=None):
    """A checkpoint of step progress["step"], with experts in order of their numbers wherever they live."""
    live = grid and grid.live
    if live:
        progress.update(live.state())
    with live.at_home(optimizer) if live else nullcontext():
        saver.save(train_state(model, optimizer), progress, grid)


def restore(folder, model, optimizer, progress, grid=None):
    """Model, optimizer, random state and progress as saved, all filled in place."""
    state = train_state(model, optimizer)                                 # their own tensors, not copies
    load_state(folder, state, grid)
    torch.set_rng_state(state["random"])
    load_progress(folder, progress)
    if grid is not None and grid.live:
        grid.live.restore(progress, optimizer)


# ---------------------------------------------------------------------------------------------------------------------
# Weights of others: a folder as transformers writes it
#
#     config.json                     the shape: model.config_from_hf
#     *.safetensors                   8 bytes: length of the header; the header, JSON: name -> dtype, shape, where its
#                                     numbers begin and end; the numbers
#     model.safetensors.index.json    "weight_map": name -> file; not needed where all is in model.safetensors
#
# It may come from anywhere: no number is read before every length, offset, dtype, shape and path has been checked.
#
# Read by this file's own few lines: torch.distributed.checkpoint's HuggingFaceStorageReader fills tensors of the same
# names, where half of a stack of ours lies in another file, checks no header, and turns a Python loop for each block of
# fp8. Bands of rows are read, not mapped to memory: a file that is cut short while it is mapped ends the process.

INDEX, ONE_FILE = "model.safetensors.index.json", "model.safetensors"
DTYPES = dict(F32=torch.float32, BF16=torch.bfloat16, F16=torch.float16, F8_E4M3=torch.float8_e4m3fn)
MAX_HEADER = 100_000_000                   # bytes; the format's own limit
BLOCK = 128                                # fp8: rows, and columns, with one scale
BAND = 2**24                               # numbers read at a time
SHARD_BYTES = 5 * 10**9                    # of a file that is written, but for a tensor that is larger


class Piece(NamedTuple):
    """A tensor of a folder: where its numbers lie."""
    path: Path
    dtype: str                             # a key of DTYPES, or what is not known here
    shape: torch.Size
    start: int                             # the first byte in the file
    scale: "Piece | None" = None           # of fp8: a factor for each block, (rows / BLOCK, columns / BLOCK)


@contextmanager
def faults_of(folder):
    """What is found amiss, as CheckpointError with the folder's name; also where JSON has another structure."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {in_one_line(error)}") from None


def read_published_config(folder):
    """The Config of such a folder; CheckpointError for what is none, or of another kind of model."""
    with faults_of(folder / "config.json"):
        return config_from_hf(read_json(folder, "config.json"))


def published_pieces(folder, config, trained):
    """{published name: Piece} of all that a model of this Config needs; CheckpointError names all that does not fit.

    trained: MTP layers in the folder. A config that has more of them gets the last one again and again.
    """
    kept = replace(config, num_nextn_predict_layers=min(trained, config.num_nextn_predict_layers))
    with faults_of(folder):
        pieces = with_scales(apart(config, read_index(folder)))
        refuse_other_size(kept, pieces)
        with torch.device("meta"):
            wanted, needed = to_hf(Model(kept)), to_hf(Model(config))
        check_published(kept, wanted, pieces, unreadable(wanted, pieces))
    return {name: pieces[trained_name(config, trained, name)] for name in needed}


def trained_name(config, trained, name):
    """The name, published or ours, under which a source with so many MTP layers has a tensor."""
    last = config.num_hidden_layers + trained - 1
    return re.sub(r"layers\.(\d+)", lambda found: f"layers.{min(int(found[1]), last)}", name, count=1)


def read_index(folder):
    """{name: Piece} of all files that the index names."""
    if not (folder / INDEX).exists():
        require((folder / ONE_FILE).exists(), f"neither {INDEX} nor {ONE_FILE} is there; other formats are not read")
        return read_header(folder / ONE_FILE)
    named, pieces = read_json(folder, INDEX)["weight_map"], {}
    for file in sorted(set(named.values())):
        require(Path(file).name == file and file.endswith(".safetensors"),
                f"{INDEX} names the file {file!r}, which is no .safetensors of this folder")
        pieces |= read_header(folder / file)
    wrong = {name: repr(name) for name in named.keys() | pieces.keys()
             if name not in pieces or named.get(name) != pieces[name].path.name}
    require(not wrong, f"{INDEX} and the files do not agree about {len(wrong)} tensors: {alike(wrong)}")
    return pieces


def read_header(path):
    """{name: Piece} of a file, whose tensors fill it one after the other, as the format says."""
    require(path.is_file(), f"{path.name} is missing, or no file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        require(length <= min(size - 8, MAX_HEADER), f"{path.name} is damaged: a header of {length} in {size} bytes")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    pieces, place = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        where = f"{path.name} is damaged: {name!r}, {dtype!r} {shape!r} at {start!r} to {end!r}"
        require(all(type(n) is int and 0 < n < 2**40 for n in [*shape, end]) and isinstance(dtype, str), where)
        require(start == place < end, f"{where}, overlaps another, or leaves a hole")
        require(dtype not in DTYPES or math.prod(shape) * DTYPES[dtype].itemsize == end - start, where)
        pieces[name] = Piece(path, dtype, torch.Size(shape), 8 + length + start)
        place = end
    require(8 + length + place == size, f"{path.name} is damaged: its tensors end at byte {place}, it has {size}")
    return pieces


def apart(config, pieces):
    """The same with fused experts, e.g. mlp.experts.gate_up_proj (E, 2I, C), one by one: parts of the same bytes."""
    single = {}
    for name, piece in pieces.items():
        first = published_names(config, name.removeprefix("model."), 0)   # the one or two of the first expert
        n_experts, rows = (*piece.shape, 0)[:2]
        is_fused = name.endswith((".experts.gate_up_proj", ".experts.down_proj")) and len(piece.shape) == 3
        if not is_fused or piece.dtype not in DTYPES or n_experts != config.n_routed_experts or rows % len(first):
            single[name] = piece
            continue
        shape, start = torch.Size((rows // len(first), piece.shape[2])), piece.start
        for expert in range(n_experts):
            for own in published_names(config, name.removeprefix("model."), expert):
                single[own] = piece._replace(shape=shape, start=start)
                start += shape.numel() * DTYPES[piece.dtype].itemsize
    return single


def with_scales(pieces):
    """The same with the `NAME_scale_inv` of an fp8 weight at it."""
    scales = {f"{name}_scale_inv" for name, piece in pieces.items() if piece.dtype == "F8_E4M3"}
    return {name: piece._replace(scale=pieces.get(f"{name}_scale_inv"))
            for name, piece in pieces.items() if name not in scales}


def unreadable(wanted, pieces):
    """{what is amiss: {name: in words}} of numbers that cannot be read, for check_published."""
    unknown, unscaled = {}, {}
    for name in wanted.keys() & pieces.keys():
        piece, scale = pieces[name], pieces[name].scale
        blocks = tuple(-(-n // BLOCK) for n in piece.shape)
        if piece.dtype not in DTYPES:
            unknown[name] = f"{name!r} {piece.dtype!r}"
        elif piece.dtype == "F8_E4M3" and (scale is None or scale.shape != blocks or scale.dtype != "F32"):
            unscaled[name] = f"{name!r} {tuple(piece.shape)}"
    return {f"of another dtype than {', '.join(DTYPES)}": unknown,
            f"in fp8 without a float32 scale for each block of {BLOCK} x {BLOCK}": unscaled}


def refuse_other_size(config, pieces):
    """A config.json that is far from the files: no model is made from it, not even one without memory."""
    numbers = sum(piece.shape.numel() for piece in pieces.values())
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    fits = layers * (1 + config.n_routed_experts) <= 100 * len(pieces)
    require(fits and count_params(config)["total"] <= 100 * numbers,
            f"{layers} layers of {config.n_routed_experts} experts, {config.hidden_size} wide, are no model of the "
            f"{len(pieces)} tensors in the files: is this their config.json?")


@torch.no_grad()
def load_published(model, pieces):
    """Fills a model that may be cut: a rank reads the rows that it holds, a few MiB at a time."""
    for name, tensor in model.state_dict().items():
        begins = begin_of(model.get_submodule(name.rpartition(".")[0]), tensor)
        first, matrices = 0, [local(tensor)]
        if ".experts." in name:
            first, *begins = begins
            matrices = local(tensor)
        for expert, matrix in enumerate(matrices, first):
            names = published_names(model.config, name, expert)
            fill_rows(matrix, [pieces[name] for name in names], begins)


def begin_of(module, tensor):
    """Where in the whole tensor this rank's part begins, by dimension."""
    begin = [0] * tensor.dim()
    if isinstance(tensor, DTensor):                                       # of zero, inside what tp or ep left
        mesh = tensor.device_mesh
        for place, parts, placement in zip(mesh.get_coordinate(), mesh.shape, tensor.placements):
            if placement.is_shard():
                begin[placement.dim] = place * -(-tensor.size(placement.dim) // parts)
    if hasattr(module, "slice"):
        begin[module.slice.dim] += module.slice.place * tensor.size(module.slice.dim)
    begin[0] += getattr(module, "first_expert", 0)
    return begin


def fill_rows(out, pieces, begin):
    """out, a part of matrices that lie one below the other; it begins there in them."""
    top, first = 0, begin[0]
    for piece in pieces:
        start, stop = max(first, top), min(first + len(out), top + piece.shape[0])
        if start < stop:
            fill_part(out[start - first:stop - first], piece, [start - top, *begin[1:]])
        top += piece.shape[0]


def fill_part(out, piece, begin):
    """out, (n,) or (n, m), from the numbers of a piece from there on, in out's dtype; fp8 times its scales."""
    dtype, width = DTYPES[piece.dtype], piece.shape[1:].numel()           # of a whole row
    is_scaled = piece.dtype == "F8_E4M3"
    if is_scaled:
        scales = torch.empty(piece.scale.shape)
        fill_part(scales, piece.scale, [0, 0])
    with open(piece.path, "rb") as file:
        for part in out.split(max(1, BAND // width)):
            file.seek(piece.start + begin[0] * width * dtype.itemsize)
            raw = np.fromfile(file, np.uint8, len(part) * width * dtype.itemsize)
            if len(raw) < len(part) * width * dtype.itemsize:
                raise CheckpointError(f"{piece.path} has become shorter")
            numbers = torch.from_numpy(raw).view(dtype).view(len(part), *piece.shape[1:])
            if part.dim() == 2:
                numbers = numbers[:, begin[1]:begin[1] + part.size(1)]
            if is_scaled:
                rows, columns = [(first + torch.arange(n)) // BLOCK for first, n in zip(begin, part.shape)]
                numbers = numbers.float() * scales[rows][:, columns]
            part.copy_(numbers)
            begin = [begin[0] + len(part), *begin[1:]]


def load_trained(checkpoint, model, trained, grid=None):
    """Fills a model that may be cut from a checkpoint of ours. trained: as in published_pieces."""
    # what is read twice is read by two calls, as many on each rank, for they wait for each other
    rounds = [{} for _ in range(1 + max(0, model.config.num_nextn_predict_layers - trained))]
    for name, tensor in model.state_dict().items():
        source = trained_name(model.config, trained, name)
        free = next(state for state in rounds if source not in state)
        free[source] = tensor
    for state in rounds:
        load_state(checkpoint, dict(model=state), grid)


# writing


def write_published(folder, model, dtype, texts):
    """Such a folder, whole or not at all. texts: {name: what a small file of it holds}, config.json among them."""
    folder = Path(folder)
    require(not folder.is_file() and not (folder.is_dir() and any(folder.iterdir())),
            f"{folder} is there already: choose a new folder")
    unfinished = folder.with_name(f"{folder.name}.unfinished-export")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        shards, weight_map = in_shards(to_hf(model), dtype), {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(shard, file)
            write_synced(unfinished / file, bytes_of(shard))
        total = sum(n_bytes(*entry) for shard in shards for entry in shard.values())
        index = dict(metadata=dict(total_size=total), weight_map=weight_map)
        for name, text in (texts | {INDEX: json.dumps(index, indent=1)}).items():
            write_synced(unfinished / name, [text.encode()])
        sync_folder(unfinished)
        unfinished.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def in_shards(tensors, dtype):
    """[{name: (tensor, the dtype it gets)}], a file each. A router's bias stays float32: its steps are small."""
    shards, held = [{}], 0
    for name, tensor in tensors.items():
        entry = tensor, torch.float32 if "e_score_correction_bias" in name else dtype
        if held and held + n_bytes(*entry) > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = entry
        held += n_bytes(*entry)
    return shards


def n_bytes(tensor, dtype):
    return tensor.numel() * dtype.itemsize


def bytes_of(shard):
    """What its file holds, one tensor in memory at a time."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, place = dict(__metadata__=dict(format="pt")), 0
    for name, (tensor, dtype) in shard.items():
        end = place + n_bytes(tensor, dtype)
        header[name] = dict(dtype=names[dtype], shape=list(tensor.shape), data_offsets=[place, end])
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                       # numbers begin at a multiple of 8
    yield len(text).to_bytes(8, "little") + text
    for tensor, dtype in shard.values():
        yield tensor.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy()
