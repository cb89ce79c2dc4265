"""
The model on fake NPU tensors, through the real torch_npu 2.13.0: no NPU, no CANN, no numbers.

    python tests/npu_fake.py                 # downloads torch_npu (44 MB) to a temporary folder
    python tests/npu_fake.py --work DIR      # keeps it there for the next time

It shows that the operators exist in that version under the schemas that our reference kernels use, that shapes and
devices agree, that autograd reaches every parameter and that the fused optimizer takes them. A FakeTensor has a shape,
a type and a device but no values: nothing is said about values, speed, memory or the limits that kernels check.

torch_npu goes to a folder of its own, never into the environment: installed there, it makes `import torch` fail
without CANN. It needs the CPU build of torch 2.13; with any other this script prints the reason and ends with status 0.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
PACKAGE = "torch_npu==2.13.0"

# ---------------------------------------------------------------------------------------------------------------------
# Outside: fetch, build the stand-ins, start a process that sees them


def why_not():
    """Why this machine cannot run the check, or None."""
    if not torch.__version__.startswith("2.13."):
        return f"{PACKAGE} needs torch 2.13, not {torch.__version__}"
    if torch.version.cuda or torch.version.hip:
        return f"{PACKAGE} aborts beside a GPU build of torch ({torch.__version__}): it needs the +cpu one"
    missing = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}" if missing else None


def prepare(work):
    """torch_npu with its one missing dependency in work/site, the stand-ins in work/stubs."""
    from npu_stubs import build
    site, stubs = f"{work}/site", f"{work}/stubs"
    if not os.path.isdir(f"{site}/torch_npu"):
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site,
                        PACKAGE, "pyyaml"], check=True)
    functions, libraries = build(site, stubs)
    print(f"{functions} functions of CANN stubbed in {len(libraries)} libraries")
    # the loader reads LD_LIBRARY_PATH when a process starts; the task queue would need a thread of the absent device
    return dict(os.environ, PYTHONPATH=site, LD_LIBRARY_PATH=stubs, TORCH_DEVICE_BACKEND_AUTOLOAD="0",
                TASK_QUEUE_ENABLE="0")


# ---------------------------------------------------------------------------------------------------------------------
# Inside: the checks, each in a FakeTensorMode; what a check returns is printed


def schemas():
    """Our reference kernels stand under the schemas of the real package, and agree with it on what has a derivative."""
    from npu_reference_ops import KERNELS
    for text, (_, has_derivative) in KERNELS.items():
        ours = torch._C.parse_schema("npu::" + text)
        theirs = getattr(torch.ops.npu, ours.name.split("::")[1]).default._schema
        assert str(ours) == str(theirs), f"reference: {ours}\ntorch_npu: {theirs}"
        derivative = torch._C._dispatch_has_kernel_for_dispatch_key(ours.name, "AutogradPrivateUse1")
        assert derivative == has_derivative, f"{ours.name}: derivative in torch_npu {derivative}"
    return f"{len(KERNELS)} operators under equal schemas"


class RecordOperators(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the names of the npu operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "npu":
            self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


EXPECTED = {
    "npu_rms_norm", "npu_rms_norm_backward", "npu_swiglu", "npu_swiglu_backward", "npu_rotary_mul",
    "npu_fusion_attention", "npu_fusion_attention_grad", "npu_moe_token_permute", "npu_grouped_matmul",
}


def training_step():
    """Preset small at its full widths, 4 of its layers: forward in bf16, backward, clipping, fused AdamW."""
    from model import PRESETS, Model
    config = replace(PRESETS["small"], num_hidden_layers=4)
    model = Model(config)
    model.compute_dtype = torch.bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.zeros(2, 1024, dtype=torch.int64)
    with RecordOperators() as record:
        out = model(ids, labels=ids)
        out.total_loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.device.type != "npu"]
    assert not without, f"no gradient on the device: {without}"
    assert EXPECTED <= record.names, f"not called: {EXPECTED - record.names}"
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    count = len(list(model.parameters()))
    return f"all {count} parameters have a gradient on {out.total_loss.device}, by {', '.join(sorted(record.names))}"


def run_checks():
    """Runs all; status 1 if one failed. Ends without the package's exit hooks, which would ask for a device."""
    import torch_npu                               # registers the device and its operators
    from npu_fake_exchange import exchange_dedup, exchange_flat, exchange_hierarchical
    from npu_fake_pipeline import pair_two_pipeline_ranks, pair_on_one_rank
    from torch._subclasses.fake_tensor import FakeTensorMode
    torch._C._set_only_lift_cpu_tensors(True)      # torch.tensor(..., device="npu") must not go through the allocator
    failed = 0
    checks = (schemas, training_step, exchange_flat, exchange_hierarchical, exchange_dedup, pair_on_one_rank,
              pair_two_pipeline_ranks)
    for check in checks:
        start = time.time()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.device("npu:0"):
                result = check()
            print(f"ok    {check.__name__}  {time.time() - start:.1f} s: {result}")
        except Exception as error:
            failed += 1
            print(f"FAIL  {check.__name__}: {type(error).__name__}: {error}")
    sys.stdout.flush()
    os._exit(failed > 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", help="folder that keeps torch_npu and the stand-ins; default: a temporary one")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    if args.inside:
        run_checks()
    if reason := why_not():
        print("skipped:", reason)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        environment = prepare(os.path.abspath(args.work or temporary))
        return subprocess.run([sys.executable, __file__, "--inside"], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
