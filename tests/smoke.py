"""
This device's report: each operator against its plain twin, ten training steps of both, and of what saves memory.

    python tests/smoke.py                    # the accelerator that is there, else the CPU; under a minute
    python tests/smoke.py --device cpu --tiny

The first thing to run on a machine that nobody here ever had, such as one with an NPU. Each line shows the relative
difference |fused - plain| / |plain| of values and of gradients, its limit, and the milliseconds of both (forward and
backward). Status 1 if a limit is passed. Limits are for rounding: 1e-4 in fp32, 2e-2 in bf16.
"""
import argparse
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model  # noqa: E402
import parallel  # noqa: E402
import sim  # noqa: E402

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# what is set beside ten plain steps with fused bodies
OTHERS = {"plain bodies": dict(fused=False),
          "recomputing": dict(recompute=("norm", "mla_up", "act", "permute", "expert")),
          "recomputing layers": dict(recompute=("layer",)),
          "swapping": dict(recompute=("attention",), swap=("expert_out", "optimizer")),
          "the paper's set": dict(recompute=("mla_up", "permute", "act"), swap=("attn_out", "expert_out"))}

# ---------------------------------------------------------------------------------------------------------------------
# Operators: name -> (function, its inputs), for N tokens


class Inputs:
    """Random tensors on the device, the same for every operator at every call with the same seed."""

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape, dtype=None):
        values = torch.randn(shape, generator=self.generator)
        return values.to(self.device, dtype or self.dtype).requires_grad_()

    def integers(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def operators(inputs, tokens):
    """Yields (name, function, tensors). Sequences of 64 tokens; 8 experts, of which the last gets no row."""
    normal, integers = inputs.normal, inputs.integers
    heads = (tokens // 64, 64, 4)                                         # (B, T, H)
    angle = torch.arange(64, device=inputs.device).view(1, 64, 1, 1) * torch.rand(32, device=inputs.device)
    mask = model.document_mask(integers(2, tokens // 64, 64).sort().values)
    ids = integers(7, tokens, 4)
    counts = torch.bincount(ids.flatten().cpu(), minlength=8).to(inputs.device)
    slot = model.permute(normal(tokens, 8), ids)[1]

    yield "rms_norm", lambda x, w: model.rms_norm(x, w, 1e-5), (normal(tokens, 256), normal(256))
    yield "swiglu", model.swiglu, (normal(tokens, 512), normal(tokens))
    yield "rope", lambda x: model.rope(x, angle.cos(), angle.sin()), (normal(*heads, 64),)
    qkv = normal(*heads, 192), normal(*heads, 192), normal(*heads, 128)
    yield "attention", lambda q, k, v: model.attention(q, k, v, 192**-0.5), qkv
    yield "attention in documents", lambda q, k, v: model.attention(q, k, v, 192**-0.5, mask), qkv
    experts = normal(4 * tokens, 256), normal(8, 128, 256)
    yield "grouped_matmul", lambda x, w: model.grouped_matmul(x, w, counts), experts
    yield "permute", lambda x: model.permute(x, ids)[0], (normal(tokens, 256),)
    yield "unpermute", lambda rows: model.unpermute(rows, slot), (normal(4 * tokens, 256),)
    targets = integers(4096, tokens)
    head = normal(tokens, 256), normal(4096, 256)
    yield "cross_entropy", lambda h, w: model.cross_entropy(h, w * 0.02, targets), head


def forward_backward(function, tensors):
    """([output, gradients ...], milliseconds of the second of two calls)."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(function(*tensors).shape, generator=generator).to(tensors[0].device, tensors[0].dtype)
    for _ in range(2):
        start = time.perf_counter()
        out = function(*tensors)
        gradients = torch.autograd.grad(out, tensors, weights.to(out.dtype))
        results = [out.detach().cpu(), *(g.cpu() for g in gradients)]     # waits for the device
        milliseconds = (time.perf_counter() - start) * 1e3
    return results, milliseconds


def difference(fused, plain):
    """|a - b| / |b|, the largest of all pairs."""
    pairs = [(a.double(), b.double()) for a, b in zip(fused, plain, strict=True)]
    return max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs)


def check_operators(device, dtype, tokens):
    """Number of operators beyond the limit."""
    failures = 0
    for name, function, tensors in operators(Inputs(device, dtype), tokens):
        results, milliseconds = {}, {}
        for fused in (True, False):
            model.FUSED = fused
            results[fused], milliseconds[fused] = forward_backward(function, tensors)
        model.FUSED = True
        values = difference(results[True][:1], results[False][:1])
        gradients = difference(results[True][1:], results[False][1:])
        passed = max(values, gradients) < LIMITS[dtype]
        failures += not passed
        print(f"{'ok  ' if passed else 'FAIL'} {name:24} {values:9.1e} {gradients:9.1e}  {LIMITS[dtype]:.0e} "
              f"{milliseconds[True]:9.2f} {milliseconds[False]:9.2f}")
    return failures


# ---------------------------------------------------------------------------------------------------------------------
# Ten steps


def ten_steps(config, device, dtype, fused=True, **saving):
    """Losses of ten AdamW steps on one batch, from the same start; saving: items of a Plan's recompute and swap."""
    model.FUSED = fused
    plan = sim.Plan(**saving)
    built = model.Model(config)
    built.init_weights(0)
    built.to(device)
    built.compute_dtype = dtype
    memory = parallel.Pipeline(built, plan).memory
    kind = parallel.HostAdamW if "optimizer" in plan.swap else torch.optim.AdamW
    optimizer = kind(built.parameters(), lr=1e-3, fused=True)
    ids = Inputs(device, dtype).integers(config.vocab_size, 2, 64)
    losses = []
    for _ in range(10):
        with memory.hooks():
            out = built(ids, labels=ids)
        out.total_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    model.FUSED = True
    return losses


def check_steps(device, dtype):
    """How many others' losses part by more than the limit from those of the fused bodies, or do not fall."""
    config = replace(model.PRESETS["tiny"], num_hidden_layers=2, expert_weight="after_down")
    fused = ten_steps(config, device, dtype)
    failures = 0
    for name, how in OTHERS.items():
        losses = ten_steps(config, device, dtype, **how)
        apart = max(abs(a - b) / b for a, b in zip(fused, losses))
        passed = apart < LIMITS[dtype] and losses[-1] < losses[0] - 0.5
        failures += not passed
        print(f"{'ok  ' if passed else 'FAIL'} ten steps, {name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, fused "
              f"{fused[-1]:.4f}, apart by {apart:.1e} (limit {LIMITS[dtype]:.0e})")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="as in train.py; default auto")
    parser.add_argument("--tiny", action="store_true", help="256 tokens in place of 4096")
    args = parser.parse_args()
    device = parallel.pick_device(args.device)
    print(f"python {platform.python_version()}, torch {torch.__version__}, device {device}, "
          f"{platform.machine()}, {torch.get_num_threads()} threads")
    failures = 0
    for dtype in LIMITS:
        print(f"\n{str(dtype).removeprefix('torch.'):29} {'values':>9} {'gradients':>9}  limit  fused ms  plain ms")
        failures += check_operators(device, dtype, 256 if args.tiny else 4096)
        failures += check_steps(device, dtype)
    print(f"\n{failures} beyond their limits" if failures else "\nall within their limits")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
