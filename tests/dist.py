"""
Ranks on one machine for tests: processes forked once per world size, one thread each, that run function after function.

    results = dist.run(4, check, config, plan)       # check(config, plan) on each of 4 ranks -> [each one's result]

The function is found by its name in its module, so it must be defined at the top level of one.
"""
import multiprocessing
import os
import socket
import traceback
from datetime import timedelta

import torch
import torch._dynamo  # noqa: F401  FSDP2 imports it when first used: once here instead of once on every rank
import torch.distributed as torch_dist

TIMEOUT = 100                              # seconds that one function may take
POOLS = {}                                 # world size -> (processes, pipes)


def run(world_size, function, *args):
    """function(*args) on every rank -> list of what each returned. RuntimeError with a failed rank's traceback."""
    if world_size not in POOLS:
        POOLS[world_size] = start(world_size)
    processes, pipes = POOLS[world_size]
    for pipe in pipes:
        pipe.send((function, args))
    try:
        return [answer_of(rank, pipe) for rank, pipe in enumerate(pipes)]
    except BaseException:
        stop(world_size)                                                  # the others may wait for the failed one
        raise


def answer_of(rank, pipe):
    if not pipe.poll(TIMEOUT):
        raise RuntimeError(f"rank {rank} gave no answer in {TIMEOUT} s")
    ok, answer = pipe.recv()
    if not ok:
        raise RuntimeError(f"rank {rank} failed:\n{answer}")
    return answer


def start(world_size):
    fork = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, pipes = [], []
    for rank in range(world_size):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=serve, args=(theirs, rank, world_size, port), daemon=True)
        process.start()
        processes.append(process)
        pipes.append(ours)
    return processes, pipes


def stop(world_size):
    processes, _ = POOLS.pop(world_size)
    for process in processes:
        process.kill()
        process.join()


def serve(pipe, rank, world_size, port):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch_dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size,
                                  timeout=timedelta(seconds=TIMEOUT / 2))
    torch_dist.new_group = made_once(torch_dist.new_group)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def made_once(new_group):
    """Grids of many plans share their groups: to connect ranks takes longer than most tests."""
    groups = {}

    def get(ranks=None, **options):
        key = ranks, *options.items()
        if key not in groups:
            groups[key] = new_group(ranks, **options)
        return groups[key]
    return get
