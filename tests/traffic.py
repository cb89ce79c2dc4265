"""
Bytes that this rank sends to others, counted where torch.distributed hands a collective to its backend.

    with Traffic(plan.node_size) as traffic:
        ...
    traffic.bytes["forward", "inner"]        # inner: within a node, outer: between nodes; as in sim.exchange_bytes

All of it is counted, FSDP's and those of norms and balance groups too: what each other member gets of the tensor, twice
for an all-reduce, whatever route the backend takes. It slows every operator down, so count apart from what is timed.
"""
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

TIERS = ("inner", "outer")                 # within a node, between nodes


class Traffic(TorchDispatchMode):
    """Counts what runs inside it, by (forward | backward, inner | outer). Backward: inside a backward of autograd."""

    def __init__(self, node_size):
        super().__init__()
        self.node_size = node_size
        self.bytes = {(way, tier): 0 for way in ("forward", "backward") for tier in TIERS}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "c10d" and operator._opname in SENT:
            group = dist.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
            self.add(dist.get_process_group_ranks(group), SENT[operator._opname](group.size(), *args))
        return operator(*args, **(kwargs or {}))

    def add(self, members, sizes):
        """sizes[i]: bytes for members[i]."""
        me, way = dist.get_rank(), way_of_now()
        for member, size in zip(members, sizes):
            same_node = member // self.node_size == me // self.node_size
            if member != me:
                self.bytes[way, "inner" if same_node else "outer"] += size


def way_of_now():
    return "forward" if torch._C._current_graph_task_id() == -1 else "backward"


def sent_to_all(n, out, x, group, recv, send, *_):
    """send: rows for each member; empty for equal parts."""
    return [rows * x[:1].nbytes for rows in send or [len(x) // n] * n]


def sent_to_one(n, tensors, group, to, *_):
    return [sum(x.nbytes for x in tensors) if member == to else 0 for member in range(n)]


SENT = {                                   # operator of torch.distributed: its arguments -> bytes for each of n members
    "_allgather_base_": lambda n, out, x, *_: [x.nbytes] * n,
    "_reduce_scatter_base_": lambda n, out, *_: [out.nbytes] * n,
    "allreduce_": lambda n, tensors, *_: [2 * sum(x.nbytes for x in tensors) // n] * n,
    "alltoall_base_": sent_to_all,
    "send": sent_to_one}
