"""
A training step of ours beside other implementations of the same model: forward, backward, fused AdamW.

    python tests/bench_step.py                                   # cpu-small and cpu-fine, fp32, about 5 minutes
    python tests/bench_step.py --presets cpu-small --dtype bf16
    python tests/bench_step.py --tiny                            # seconds; shows that it runs, not how fast

All contenders live in one process, hold the same weights and take turns: a round is one step of each. The ratio is the
median over rounds of (their time / our time in that round), so that what disturbs the machine disturbs both sides.

    ours               norm=pre: the very model that the others run (its first loss must agree to 1e-4)
    ours-sandwich      norm=dssn: our own layout, with two more norms in every layer
    transformers       DeepseekV3ForCausalLM, experts by grouped_mm, attention by sdpa

Left out on all sides: multi-token prediction, balance loss, clipping. --dtype bf16: weights, activations and optimizer
states in bfloat16, routers of ours in float32. tokens/s of two runs differ by more than their ratios do; a ratio too is
worth little when the printed load says that others were at work.
"""
import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import PRESETS, Model, flops_per_token  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# ---------------------------------------------------------------------------------------------------------------------
# Contenders: build(config, weights) -> (module, loss function of ids). weights: state dict of ours with norm=pre


def ours(config, weights):
    model = Model(config)
    model.load_state_dict(weights)
    return model, lambda ids: model(ids, labels=ids).loss


def ours_sandwich(config, weights):
    model = Model(replace(config, norm="dssn"))
    model.init_weights(0)
    return model, lambda ids: model(ids, labels=ids).loss


def transformers(config, weights):
    from transformers import DeepseekV3ForCausalLM
    model = DeepseekV3ForCausalLM(transformers_config(config))
    model.load_state_dict({transformers_name(name): tensor for name, tensor in weights.items()}, strict=False)
    return model, lambda ids: model(input_ids=ids, labels=ids).loss


def transformers_config(config):
    from transformers import DeepseekV3Config
    same = ("vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
            "n_shared_experts n_routed_experts routed_scaling_factor kv_lora_rank q_lora_rank qk_rope_head_dim "
            "v_head_dim qk_nope_head_dim n_group topk_group num_experts_per_tok first_k_dense_replace norm_topk_prob "
            "max_position_embeddings rms_norm_eps tie_word_embeddings").split()
    theirs = DeepseekV3Config(**{name: getattr(config, name) for name in same}, use_cache=False,
                              num_key_value_heads=config.num_attention_heads,
                              rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta})
    theirs._attn_implementation, theirs._experts_implementation = "sdpa", "grouped_mm"
    return theirs


def transformers_name(name):
    name = name.replace("pre_mlp_layernorm", "post_attention_layernorm")
    return name if name.startswith("lm_head") else f"model.{name}"


CONTENDERS = {"ours": ours, "ours-sandwich": ours_sandwich, "transformers": transformers}


def available(names):
    """Those that can be imported here; the others are named with the reason."""
    found = []
    for name in names:
        try:
            if not name.startswith("ours"):
                __import__(name)
            found.append(name)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The clock


class Runner:
    """One contender: its model, its optimizer, and the seconds of its steps."""

    def __init__(self, build, config, weights, dtype, device):
        self.model, self.loss = build(config, weights)
        self.model.to(device=device, dtype=dtype).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.seconds = []
        self.losses = []

    def step(self, ids):
        start = time.perf_counter()
        loss = self.loss(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())                                   # waits for the device
        self.seconds.append(time.perf_counter() - start)


def race(names, config, args):
    """Runners after args.rounds measured rounds; the order turns with each round."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    weights = Model(config)
    weights.init_weights(0)
    weights, dtype = weights.state_dict(), DTYPES[args.dtype]
    runners = {name: Runner(CONTENDERS[name], config, weights, dtype, device) for name in names}
    generator = torch.Generator().manual_seed(0)
    for number in range(args.warmup + args.rounds):
        ids = torch.randint(0, config.vocab_size, (args.batch, args.seq), generator=generator).to(device)
        for turn in range(len(names)):
            runners[names[(number + turn) % len(names)]].step(ids)
    for runner in runners.values():
        runner.seconds = runner.seconds[args.warmup:]
    return runners


def check_same_function(runners, dtype):
    """The first loss of every contender with our weights equals ours; ours-sandwich is another function."""
    tolerance = 1e-4 if dtype == "fp32" else 2e-2
    for name, runner in runners.items():
        difference = abs(runner.losses[0] - runners["ours"].losses[0])
        same = name == "ours-sandwich" or difference < tolerance
        assert same, f"{name}: first loss {runner.losses[0]}, ours {runners['ours'].losses[0]}"


def report(preset, runners, config, args):
    tokens = args.batch * args.seq
    base = runners["ours"].seconds
    print(f"\n{preset}, {args.dtype}, {args.batch} x {args.seq} tokens, {args.rounds} rounds after {args.warmup}")
    print(f"{'':16} {'ms, median':>10} {'ms, least':>10} {'tokens/s':>9} {'GFLOP/s':>8} {'parameters':>11} "
          f"{'first loss':>10} {'time / ours':>11}")
    for name, runner in runners.items():
        median = statistics.median(runner.seconds)
        ratio = statistics.median(theirs / own for theirs, own in zip(runner.seconds, base))
        rate = tokens / median
        parameters = sum(p.numel() for p in runner.model.parameters())
        print(f"{name:16} {median * 1e3:10.1f} {min(runner.seconds) * 1e3:10.1f} {rate:9.0f} "
              f"{rate * flops_per_token(config, args.seq) / 1e9:8.1f} {parameters:11,} {runner.losses[0]:10.5f} "
              f"{ratio:11.2f}")


def environment():
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    device = torch.accelerator.current_accelerator()
    name = platform.processor() or platform.machine()
    if device is not None:
        name = torch.get_device_module(device).get_device_name()
    versions = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    if "transformers" in sys.modules:
        versions.append(f"transformers {sys.modules['transformers'].__version__}")
    load = f"load {os.getloadavg()[0]:.1f} (about {torch.get_num_threads()} is this benchmark's own)"
    return "; ".join([f"{name}, {torch.get_num_threads()} threads, {load}", ", ".join(versions),
                      f"commit {commit.strip() or 'unknown'}", time.strftime("%Y-%m-%d")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", metavar="NAME", default=["cpu-small", "cpu-fine"],
                        choices=sorted(PRESETS), help="shapes of model.py, by default cpu-small cpu-fine")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", default=list(CONTENDERS), choices=list(CONTENDERS),
                        help=f"some of {', '.join(CONTENDERS)}; ours is always there")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of weights, activations and moments")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, default 8")
    parser.add_argument("--seq", type=int, default=256, help="tokens a sequence, default 256")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each contender, default 15")
    parser.add_argument("--warmup", type=int, default=3, help="steps before, default 3")
    parser.add_argument("--tiny", action="store_true", help="preset tiny, 2 x 16 tokens, 2 rounds")
    args = parser.parse_args()
    if args.tiny:
        args.presets, args.batch, args.seq, args.rounds, args.warmup = ["tiny"], 2, 16, 2, 1
    names = available(dict.fromkeys(["ours", *args.contenders]))
    for preset in args.presets:
        config = replace(PRESETS[preset], num_nextn_predict_layers=0, balance="none", norm="pre", latent_norm_eps=1e-6)
        runners = race(names, config, args)
        report(preset, runners, config, args)
        check_same_function(runners, args.dtype)
    print("\n" + environment())


if __name__ == "__main__":
    main()
