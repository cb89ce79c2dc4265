"""
One GPU's report in at most five minutes: does it compute the same, and how fast is a step beside transformers?

    python tests/gpu_check.py                        # all of it; results also go to runs/gpu_check.jsonl as they come
    python tests/gpu_check.py --tiny                 # on any machine, a CPU too: shows that it runs, not how fast

In this order, with what is left of --seconds, so that a run that is cut tells something:

    1  does it work          side by side: tests/smoke.py, operators, ten steps and what saves memory against their
                             plain twins; tests/test_speed.py, compiled layers against eager, a step that never makes
                             the host wait; and sixty steps of train.py --preset small on text that lies on every
                             machine, Python's own library
    2  how fast              steps of one-gpu and one-gpu-256, weights, gradients and AdamW states in bf16: 1 x 4,096
                             tokens, then as many of 8, 4 or 2 x 4,096 as fit; each contender in a process of its own,
                             the most telling first, as many as there is time for

A step is forward, backward and fused AdamW, without multi-token prediction, balance loss and clipping on all sides.
ours is eager, ours-operators and ours-compiled are --compile operators and layers of train.py. Columns: milliseconds
(median) of a step, and of its forward and backward alone; tokens/s; shares of what an 8192 x 8192 matmul reaches in
that process, of both; GiB of the most memory that forward adds; times that the host waited for the GPU in a step;
seconds of the first step. The shares count model FLOPs: six for each parameter that a token uses, and causal attention.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench_step import environment, matmul_rate, transformers_config  # noqa: E402
from model import PRESETS, Model, compile_model, compile_operators, flops_per_token, initial_scale  # noqa: E402

STEPS = [*((preset, name) for preset in ("one-gpu", "one-gpu-256")
           for name in ("ours", "transformers", "ours-compiled")),
         ("one-gpu", "transformers-compiled"), ("one-gpu", "ours-operators"),
         ("one-gpu-256", "transformers-compiled"), ("one-gpu-256", "ours-operators")]
TINY_STEPS = [("tiny", name) for name in ("ours", "transformers", "ours-operators")]

# ---------------------------------------------------------------------------------------------------------------------
# One contender, in this process


def build_ours(config, device):
    """Filled on the device, as a CPU would take minutes; so the numbers are not those of a seed."""
    with torch.device("meta"):
        model = Model(config)
    model = model.to(torch.bfloat16).to_empty(device=device)              # routers stay in float32
    for name, tensor in model.state_dict().items():
        kind, scale = initial_scale(config, name)
        tensor.fill_(scale) if kind == "constant" else tensor.normal_(0, scale)
    return model, lambda ids: model(ids, labels=ids).loss


def build_transformers(config, device, compiled):
    from transformers import DeepseekV3ForCausalLM
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = DeepseekV3ForCausalLM(transformers_config(config))
    torch.set_default_dtype(torch.float32)
    call = torch.compile(model) if compiled else model
    return model, lambda ids: call(input_ids=ids, labels=ids).loss


def build(name, config, device):
    """(module, loss function of ids)."""
    if name.startswith("transformers"):
        return build_transformers(config, device, name.endswith("compiled"))
    why_not = compile_operators(name != "ours")             # layers have them too, as in train.py
    if why_not:
        sys.exit(why_not)
    model, loss = build_ours(config, device)
    if name == "ours-compiled":
        compile_model(model)
    return model, loss


class Contender:
    def __init__(self, name, config, device):
        self.device = device
        self.model, self.loss = build(name, config, device)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.bytes_before = self.forward_bytes = 0                        # when a step begins; most that forward adds
        self.sequence_bytes = 0                                           # of those for a sequence

    def forward_backward(self, ids):
        self.optimizer.zero_grad()
        self.bytes_before = self.allocated(reset=True)
        loss = self.loss(ids)
        self.forward_bytes = self.allocated() - self.bytes_before
        self.sequence_bytes = self.forward_bytes / len(ids)
        loss.backward()
        return loss

    def step(self, ids):
        loss = self.forward_backward(ids)
        self.optimizer.step()
        return loss

    def allocated(self, reset=False):
        """Bytes on the device: now, or the largest since the last reset."""
        if self.device.type != "cuda":
            return 0
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()

    def fits(self, batch):
        """Whether so many sequences would, by the last step; gradients come as what forward kept goes."""
        if self.device.type != "cuda":
            return True
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return self.bytes_before + batch * self.sequence_bytes < memory

    def seconds(self, call, ids, times):
        """Median of some calls, each until the device is done with all of it."""
        measured = []
        for _ in range(times):
            start = time.perf_counter()
            call(ids)
            self.wait()
            measured.append(time.perf_counter() - start)
        return statistics.median(measured)

    def wait(self):
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def waits(self, ids):
        """How often the host waits for the device in one step, or None where torch cannot tell."""
        if self.device.type != "cuda":
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.step(ids)
            torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in caught)

    def profile(self, ids, rows=14):
        """[(kernel, calls, milliseconds)] of one step, longest first, and their sum."""
        activity = torch.profiler.ProfilerActivity
        on_device = self.device.type == "cuda"
        with torch.profiler.profile(activities=[activity.CUDA if on_device else activity.CPU]) as profiler:
            self.step(ids)
            self.wait()
        spent = "self_device_time_total" if on_device else "self_cpu_time_total"      # microseconds
        times = [(event.key, event.count, getattr(event, spent) / 1e3) for event in profiler.key_averages()
                 if not on_device or "CUDA" in str(event.device_type) and not event.key.startswith("Optimizer.")]
        times.sort(key=lambda row: -row[2])
        return [("all", sum(row[1] for row in times), sum(row[2] for row in times)), *times[:rows]]


def measure(preset, name, batches, seq_len, steps):
    """Print one line of JSON for each thing that is known. batches: numbers of sequences; of those after the first, the
    first that fits."""
    torch._dynamo.config.automatic_dynamic_shapes = False                 # each size by itself, as if it were the only
    device = torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    config = replace(PRESETS[preset], num_nextn_predict_layers=0, balance="none", norm="pre", latent_norm_eps=1e-6)
    peak = matmul_rate(torch.bfloat16, device)
    contender = Contender(name, config, device)
    generator = torch.Generator().manual_seed(0)
    measured = None                                                       # ids of the last batch that fitted
    for number, batch in enumerate(batches):
        ids = torch.randint(0, config.vocab_size, (batch, seq_len), generator=generator).to(device)
        done = contender.fits(batch)
        if done:
            try:
                measure_batch(preset, name, contender, ids, steps, config, peak)
                measured = ids
            except torch.OutOfMemoryError:
                done = False
        if not done:                                                      # here the failed step's tensors are gone
            say(what="note", text=f"{preset} {name}: {batch} x {seq_len} tokens do not fit")
            contender.optimizer.zero_grad()
            torch.cuda.empty_cache()
        elif number > 0:
            break
    if measured is not None:
        say(what="profile", preset=preset, contender=name, rows=contender.profile(measured))


def measure_batch(preset, name, contender, ids, steps, config, peak):
    first_step = contender.seconds(contender.step, ids, 1)
    loss = contender.forward_backward(ids).item()
    both = contender.seconds(contender.forward_backward, ids, steps)
    seconds = contender.seconds(contender.step, ids, steps)
    flops = ids.numel() * flops_per_token(config, ids.size(1))
    say(what="step", preset=preset, contender=name, batch=len(ids), ms=seconds * 1e3, forward_backward_ms=both * 1e3,
        tokens_per_s=ids.numel() / seconds, share=flops / seconds / peak, forward_backward_share=flops / both / peak,
        matmul_tflops=peak / 1e12, forward_gib=contender.forward_bytes / 2 ** 30, waits=contender.waits(ids),
        first_step_s=first_step, second_loss=loss, parameters=sum(p.numel() for p in contender.model.parameters()))


def say(**what):
    print(json.dumps(what), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# All, one process after the other


class Report:
    """Runs commands until the time is over; keeps what they say."""

    def __init__(self, path, seconds):
        self.end = time.monotonic() + seconds
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "w")

    def keep(self, **what):
        print(json.dumps(what), file=self.file, flush=True)

    def run(self, title, command):
        """The command's output, of which the end is printed if it failed; empty if there was no time."""
        left = self.end - time.monotonic()
        if left < 5:
            print(f"{title}: no time left", flush=True)
            self.keep(what="left out", title=title)
            return ""
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            out, _ = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            out, _ = process.communicate()
            out += "\ncut: the time is over"
        seconds = time.monotonic() - start
        self.keep(what="run", title=title, status=process.returncode, seconds=seconds, out=out[-4000:])
        if process.returncode != 0:
            print(f"{title}: status {process.returncode} after {seconds:.0f} s\n{out[-1500:]}", flush=True)
        return out

    def results(self, title, command):
        """What the command said, as dicts."""
        out = self.run(title, command)
        found = [json.loads(line) for line in out.splitlines() if line.startswith('{"what"')]
        for result in found:
            self.keep(**result)
        return found


def show(result):
    if result["what"] == "note":
        print(result["text"], flush=True)
    else:
        (show_step if result["what"] == "step" else show_profile)(result)


def show_step(r):
    waits = "-" if r["waits"] is None else r["waits"]
    print(f"{r['preset']:12} {r['contender']:22} x {r['batch']} {r['ms']:7.1f} ms ({r['forward_backward_ms']:.1f})  "
          f"{r['tokens_per_s']:,.0f} tokens/s  {r['share']:.1%} ({r['forward_backward_share']:.1%}) of "
          f"{r['matmul_tflops']:.1f} TFLOP/s  forward {r['forward_gib']:.2f} GiB  waits {waits}  first step "
          f"{r['first_step_s']:.1f} s  loss {r['second_loss']:.4f}", flush=True)


def show_profile(r):
    total = r["rows"][0][2] or 1.0
    for kernel, calls, milliseconds in r["rows"]:
        print(f"    {milliseconds:8.2f} ms {milliseconds / total:6.1%} {calls:5} x {kernel[:90]}", flush=True)


def check(report, tiny):
    """Side by side: the last line of each check, and the last steps of a training."""
    with tempfile.TemporaryDirectory() as work:
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20 if tiny else None]
        text = Path(work) / "library.txt"
        text.write_text("\n".join(path.read_text(errors="ignore") for path in sources))
        size = "--preset tiny --steps 2" if tiny else "--preset small --steps 60 --global-batch 16 --heldout 0"
        chosen = "short_attention" if tiny else "never_waits or compiled_layers and (bfloat16 or capacity)"
        commands = {
            "smoke": ["tests/smoke.py", *(["--tiny"] if tiny else [])],
            "test_speed": ["-m", "pytest", "-x", "-o", "addopts=", "tests/test_speed.py", "-k", chosen],
            "train": ["train.py", "pretrain", *size.split(), "--data", str(text), "--out", str(Path(work) / "run")]}
        with ThreadPoolExecutor() as pool:
            outputs = dict(zip(commands, pool.map(report.run, commands, commands.values())))
    trained = [line for line in outputs.pop("train").splitlines() if "tokens/s" in line]
    for title, out in outputs.items():
        print(f"{title}:", (out.strip() or "nothing").splitlines()[-1], flush=True)
    print("train:", *dict.fromkeys(trained[:1] + trained[-3:]), sep="\n    ", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/gpu_check.jsonl", help="where results go, a line of JSON each")
    parser.add_argument("--seconds", type=float, default=290, help="all of it takes at most this long, default 290")
    parser.add_argument("--tiny", action="store_true", help="preset tiny, 64 tokens, two steps")
    parser.add_argument("--measure", nargs=2, metavar=("PRESET", "CONTENDER"), help="one contender, in this process")
    args = parser.parse_args()
    if args.measure:
        batches, seq_len, steps = ((1, 2), 64, 2) if args.tiny else ((1, 8, 4, 2), 4096, 5)
        return measure(*args.measure, batches, seq_len, steps)
    report = Report(args.out, args.seconds)
    print(environment(), flush=True)
    report.keep(what="environment", text=environment())
    check(report, args.tiny)
    for preset, name in TINY_STEPS if args.tiny else STEPS:
        command = ["tests/gpu_check.py", "--measure", preset, name, *(["--tiny"] if args.tiny else [])]
        for result in report.results(f"{preset} {name}", command):
            show(result)


if __name__ == "__main__":
    main()
