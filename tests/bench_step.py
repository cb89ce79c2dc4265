"""
A training step of ours beside other implementations of the same model: forward, backward, fused AdamW.

    python tests/bench_step.py                                   # cpu-small and cpu-fine, fp32, all that are installed
    python tests/bench_step.py --presets cpu-small --dtype bf16 --threads 1 2
    python tests/bench_step.py --contenders ours ours-operators transformers    # a few; compiling takes longest
    python tests/bench_step.py --tiny                            # seconds; shows that it runs, not how fast

All contenders live in one process, hold the same weights and take turns: a round is one step of each. The ratio is the
median over rounds of (their time / our time in that round), so that what disturbs the machine disturbs both sides.

    ours                    norm=pre: the very model that the others run (its first loss must agree to 1e-4)
    ours-operators          the same, norms and SwiGLU through torch.compile, as train.py runs it where it can
    ours-compiled           the same, whole layers through torch.compile, as train.py --compile layers does
    ours-sandwich           norm=dssn: our own layout, with two more norms in every layer
    transformers            DeepseekV3ForCausalLM, experts by grouped_mm, attention by sdpa; -compiled: torch.compile
    torchtitan              its deepseek_v3, attention by sdpa (its own, flex, has no backward on a CPU); experts and
                            head as it makes them: experts in bf16 always; -compiled: each layer, as it does

torchtitan 0.3.0: pip install torchtitan==0.3.0 --no-deps, then spmd_types==0.2.3 tyro triton.

Left out on all sides: multi-token prediction, balance loss, clipping. --dtype bf16: weights, activations and optimizer
states in bfloat16, routers of ours in float32. tokens/s of two runs differ by more than their ratios do; a ratio too is
worth little when the printed load says that others were at work. The share is model FLOPs (six a parameter that a token
uses, and causal attention) over what a large square matmul of the same type reaches here, measured before each table.
"""
import argparse
import dataclasses
import importlib.metadata
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
import model as ours_file  # noqa: E402
import parallel  # noqa: E402
from model import PRESETS, Model, compile_model, compile_operators, flops_per_token, to_hf  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# ---------------------------------------------------------------------------------------------------------------------
# Contenders: build(config, weights) -> (module, loss function of ids). weights: state dict of ours with norm=pre


def ours(config, weights):
    model = Model(config)
    model.load_state_dict(weights)
    return model, lambda ids: model(ids, labels=ids).loss


def ours_operators(config, weights):
    """The same; Runner switches its operators."""
    why_not = compile_operators()
    if why_not:
        sys.exit(f"ours-operators: {why_not}")
    return ours(config, weights)


def ours_compiled(config, weights):
    model, loss = ours(config, weights)
    compile_model(model)
    return model, loss


def ours_sandwich(config, weights):
    model = Model(replace(config, norm="dssn"))
    model.init_weights(0)
    return model, lambda ids: model(ids, labels=ids).loss


def transformers(config, weights):
    from transformers import DeepseekV3ForCausalLM
    model = DeepseekV3ForCausalLM(transformers_config(config))
    model.load_state_dict({transformers_name(name): tensor for name, tensor in weights.items()}, strict=False)
    return model, lambda ids: model(input_ids=ids, labels=ids).loss


def transformers_compiled(config, weights):
    model, _ = transformers(config, weights)
    compiled = torch.compile(model)
    return model, lambda ids: compiled(input_ids=ids, labels=ids).loss


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


def torchtitan(config, weights):
    import torchtitan.models.deepseek_v3 as titan
    model = titan_config(config).build()
    own = Model(config)
    own.load_state_dict(weights)
    adapter = titan.DeepSeekV3StateDictAdapter(titan_config(config), None)
    model.init_states()
    missing, unexpected = model.load_state_dict(adapter.from_hf(to_hf(own)), strict=False)
    assert not unexpected and all("bias" in name or "tokens_per" in name for name in missing), (missing, unexpected)

    def loss(ids):
        logits = model(ids)[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    return model, loss


def torchtitan_compiled(config, weights):
    """As torchtitan.distributed.compile does it, each layer, but without fullgraph."""
    model, loss = torchtitan(config, weights)
    torch._dynamo.config.capture_scalar_outputs = True
    for layer in model.layers.values():
        layer.compile()
    return model, loss


def titan_config(c):
    """Its own function for layers, and what it puts around them."""
    import torchtitan.models.deepseek_v3 as titan
    from torchtitan.models.common.attention import ScaledDotProductAttention
    rope = titan.ComplexRoPE.Config(dim=c.qk_rope_head_dim, max_seq_len=c.max_position_embeddings, theta=c.rope_theta)
    layers = titan._build_dsv3_layers(
        n_layers=c.num_hidden_layers, n_dense_layers=c.first_k_dense_replace, dim=c.hidden_size,
        n_heads=c.num_attention_heads, q_lora_rank=c.q_lora_rank, kv_lora_rank=c.kv_lora_rank,
        qk_nope_head_dim=c.qk_nope_head_dim, qk_rope_head_dim=c.qk_rope_head_dim, v_head_dim=c.v_head_dim, mscale=1.0,
        dense_hidden_dim=c.intermediate_size, moe_hidden_dim=c.moe_intermediate_size, num_experts=c.n_routed_experts,
        num_shared_experts=c.n_shared_experts, router_top_k=c.num_experts_per_tok, router_score_func=c.scoring_func,
        router_route_norm=c.norm_topk_prob, router_route_scale=c.routed_scaling_factor, attn_backend="flex",
        moe_comm_backend="standard", non_blocking_capacity_factor=None, rope=rope)
    eps = dict(eps=c.rms_norm_eps)
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        layer.attention_norm = dataclasses.replace(layer.attention_norm, **eps)
        layer.ffn_norm = dataclasses.replace(layer.ffn_norm, **eps)
        layer.attention.q_norm = dataclasses.replace(layer.attention.q_norm, eps=c.latent_norm_eps)
        layer.attention.kv_norm = dataclasses.replace(layer.attention.kv_norm, eps=c.latent_norm_eps)
    return titan.DeepSeekV3Model.Config(
        vocab_size=c.vocab_size, dim=c.hidden_size, layers=layers, mtp_layers=[],
        tok_embeddings=titan.Embedding.Config(num_embeddings=c.vocab_size, embedding_dim=c.hidden_size,
                                              param_init=titan._EMBEDDING_INIT),
        norm=titan.RMSNorm.Config(normalized_shape=c.hidden_size, param_init=titan._NORM_INIT, **eps),
        lm_head=titan.Linear.Config(in_features=c.hidden_size, out_features=c.vocab_size,
                                    param_init=titan._output_linear_init(c.hidden_size)))


CONTENDERS = {"ours": ours, "ours-operators": ours_operators, "ours-compiled": ours_compiled,
              "ours-sandwich": ours_sandwich, "transformers": transformers,
              "transformers-compiled": transformers_compiled, "torchtitan": torchtitan,
              "torchtitan-compiled": torchtitan_compiled}


def available(names):
    """Those that can be imported here; the others are named with the reason."""
    found = []
    for name in names:
        try:
            if name.startswith("transformers"):
                from transformers import DeepseekV3ForCausalLM  # noqa: F401
            if name.startswith("torchtitan"):
                import torchtitan.models.deepseek_v3  # noqa: F401
            found.append(name)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The clock


class Runner:
    """One contender: its model, its optimizer, and the seconds of its steps."""

    def __init__(self, name, config, weights, dtype, device):
        self.model, self.loss = CONTENDERS[name](config, weights)
        self.model.to(device).train()
        cast(self.model, dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.compiled_operators = name == "ours-operators"
        self.seconds = []
        self.losses = []

    def step(self, ids):
        ours_file.COMPILED = self.compiled_operators
        start = time.perf_counter()
        loss = self.loss(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())                                   # waits for the device
        self.seconds.append(time.perf_counter() - start)


def cast(model, dtype):
    """Parameters alone, as torchtitan's rotary tables are complex buffers; routers of ours stay in float32."""
    for name, parameter in model.named_parameters():
        if not (isinstance(model, Model) and name.endswith(".gate.weight")):
            parameter.data = parameter.data.to(dtype)


def race(names, config, args):
    """Runners after args.rounds measured rounds; the order turns with each round."""
    device = parallel.pick_device()                                       # as train.py: on a CPU, freed memory is kept
    weights = Model(config)
    weights.init_weights(0)
    weights, dtype = weights.state_dict(), DTYPES[args.dtype]
    runners = {name: Runner(name, config, weights, dtype, device) for name in names}
    generator = torch.Generator().manual_seed(0)
    for number in range(args.warmup + args.rounds):
        ids = torch.randint(0, config.vocab_size, (args.batch, args.seq), generator=generator).to(device)
        for turn in range(len(names)):
            runners[names[(number + turn) % len(names)]].step(ids)
    for runner in runners.values():
        runner.first_step = runner.seconds[0]
        runner.seconds = runner.seconds[args.warmup:]
    return runners


def matmul_rate(dtype, device=None):
    """FLOP/s of a large square matmul, the best of nine."""
    device = device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()                                              # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(seconds[1:])


def check_same_function(runners, dtype):
    """The first loss of every contender with our weights equals ours; ours-sandwich is another function."""
    for name, runner in runners.items():
        tolerance = 1e-4 if dtype == "fp32" and not name.startswith("torchtitan") else 2e-2    # experts in bf16
        difference = abs(runner.losses[0] - runners["ours"].losses[0])
        same = name == "ours-sandwich" or difference < tolerance
        assert same, f"{name}: first loss {runner.losses[0]}, ours {runners['ours'].losses[0]}"


def report(preset, runners, config, args, peak):
    tokens = args.batch * args.seq
    base = runners["ours"].seconds
    print(f"\n{preset}, {args.dtype}, {torch.get_num_threads()} threads, {args.batch} x {args.seq} tokens, "
          f"{args.rounds} rounds after {args.warmup}; matmul {peak / 1e9:,.0f} GFLOP/s")
    print(f"{'':22} {'ms, median':>10} {'ms, least':>10} {'tokens/s':>9} {'GFLOP/s':>8} {'share':>6} "
          f"{'parameters':>11} {'first loss':>10} {'first step':>10} {'time / ours':>11}")
    for name, runner in runners.items():
        median = statistics.median(runner.seconds)
        ratio = statistics.median(theirs / own for theirs, own in zip(runner.seconds, base))
        rate = tokens / median
        flops = rate * flops_per_token(config, args.seq)
        parameters = sum(p.numel() for p in runner.model.parameters())
        print(f"{name:22} {median * 1e3:10.1f} {min(runner.seconds) * 1e3:10.1f} {rate:9.0f} {flops / 1e9:8.1f} "
              f"{flops / peak:6.1%} {parameters:11,} {runner.losses[0]:10.5f} {runner.first_step:8.1f} s {ratio:11.2f}",
              flush=True)


def environment():
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    device = torch.accelerator.current_accelerator(check_available=True)
    name = platform.processor() or platform.machine()
    if device is not None:
        name = torch.get_device_module(device).get_device_name()
    versions = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("transformers", "torchtitan"):
        if package in sys.modules:
            versions.append(f"{package} {importlib.metadata.version(package)}")
    load = f"load {os.getloadavg()[0]:.1f} (about {torch.get_num_threads()} is this benchmark's own)"
    return "; ".join([f"{name}, {torch.get_num_threads()} threads, {load}", ", ".join(versions),
                      f"commit {commit.strip() or 'unknown'}", time.strftime("%Y-%m-%d")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", metavar="NAME", default=["cpu-small", "cpu-fine"],
                        choices=sorted(PRESETS), help="shapes of model.py, by default cpu-small cpu-fine")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", choices=list(CONTENDERS),
                        help=f"some of {', '.join(CONTENDERS)}, by default all; ours is always there")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of weights, activations and moments")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, default 8")
    parser.add_argument("--seq", type=int, default=256, help="tokens a sequence, default 256")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each contender, default 15")
    parser.add_argument("--warmup", type=int, default=3, help="steps before, default 3")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()], metavar="N",
                        help="one table for each number of threads, default what torch takes")
    parser.add_argument("--tiny", action="store_true", help="preset tiny, 2 x 16 tokens, 2 rounds, nothing compiled")
    args = parser.parse_args()
    wanted = args.contenders or list(CONTENDERS)
    if args.tiny:
        args.presets, args.batch, args.seq, args.rounds, args.warmup = ["tiny"], 2, 16, 2, 1
        wanted = args.contenders or [name for name in CONTENDERS if not name.endswith(("compiled", "operators"))]
    names = available(dict.fromkeys(["ours", *wanted]))
    for threads in args.threads:
        torch.set_num_threads(threads)
        for preset in args.presets:
            config = replace(PRESETS[preset], num_nextn_predict_layers=0, balance="none", norm="pre",
                             latent_norm_eps=1e-6)
            peak = matmul_rate(DTYPES[args.dtype])
            runners = race(names, config, args)
            report(preset, runners, config, args, peak)
            check_same_function(runners, args.dtype)
    print("\n" + environment())


if __name__ == "__main__":
    main()
