"""
What recomputing and swapping save and cost: a training step under each item of Plan.recompute and Plan.swap.

    nice -n -20 python tests/bench_memory.py             # the paper's shape, widths / 15; minutes on 2 cores
    python tests/bench_memory.py --preset cpu-small --dtype bf16
    python tests/bench_memory.py --report                        # what each part of the model keeps, beside sim.py
    python tests/bench_memory.py --tiny                          # seconds; shows that it runs, not how fast

kept      MiB that autograd keeps on the device after a forward, seen through hooks; swapped tensors are not there
sim.py    the same as sim.py counts it; static: weights, gradients and moments
saving    share of what full recomputation (`layer`) saves; price: share of the seconds that it adds to a step

All plans live in one process and take turns, the order turning with each round; times are the least of the rounds. The
paper's set recomputes MLA's up-projections, the permutation and the activation, and swaps attention's output; with
after_down, where the routing weight multiplies the expert's output, it swaps expert outputs too. Without an optimizer's
swap, which frees 8 bytes a parameter and was not timed. Last, what transformers' DeepseekV3ForCausalLM keeps for the
same model, batch and dtype, without multi-token prediction on either side.
"""
import argparse
import re
import sys
import time
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import parallel  # noqa: E402
import sim  # noqa: E402
from bench_step import CONTENDERS, DTYPES, available, environment  # noqa: E402
from model import PRESETS, Block, Config, Model, MoE  # noqa: E402

ITEMS = "norm", "mla_up", "act", "permute", "expert", "attention"
PAPER = dict(recompute=("mla_up", "permute", "act"), swap=("attn_out", "expert_out"))
PLANS = {"none": {}, **{item: dict(recompute=(item,)) for item in ITEMS},
         "swap attn_out": dict(swap=("attn_out",)), "paper's set": PAPER,
         "paper's set + norm": PAPER | dict(recompute=("norm", *PAPER["recompute"])),
         "layer": dict(recompute=("layer",))}
# pangu-ultra-moe-718b with 4 of 61 layers, widths and heads / 15 (rounded), fewer experts, its 8 a token
SCALED = Config(vocab_size=2048, hidden_size=512, num_hidden_layers=4, intermediate_size=1216, num_attention_heads=8,
                q_lora_rank=96, kv_lora_rank=32, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                n_routed_experts=16, num_experts_per_tok=8, moe_intermediate_size=128)


# parts as sim.saved_by_part names them, and the modules that begin them
PARTS = {"embedding": r"^embed_tokens$", "head": r"^norm$|shared_head\.norm$", "MTP": r"[eh]norm$|eh_proj$",
         "norms": r"(input|attention|mlp)_layernorm$", "MLP": r"(mlp|shared_experts)$", "routing": r"gate$",
         "experts": r"mlp\.experts$", "attention": r"self_attn$"}


class Watch:
    """What is kept for backward, and where: by the part of the model that was entered last, or `host`."""

    def __init__(self, memory, model):
        self.memory, self.note_of = memory, memory.note_of
        self.part_of = weakref.WeakKeyDictionary()                        # parallel.Stored -> part
        self.part = ""
        memory.note_of, memory.hooks = self.see, self.hooks
        for name, module in model.named_modules():
            if isinstance(module, Block):
                self.enter_before(module, "norms")                        # which keep a layer's input
            for part, pattern in PARTS.items():
                if re.search(pattern, name) and not isinstance(module, MoE):
                    self.enter_before(module, part)

    def enter_before(self, module, part):
        module.register_forward_pre_hook(lambda *_: setattr(self, "part", part))

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.memory.pack, parallel.unpack)

    def see(self, x):
        note = self.note_of(x)
        if isinstance(note, parallel.Stored):
            self.part_of.setdefault(note, self.part)
        return note

    def alive(self):
        """(parallel.Stored, part) of what is held now."""
        return list(self.part_of.items())

    def held(self):
        """Bytes by part, once what the last layer swaps has left the device."""
        self.memory.begin_layer()
        held = Counter()
        for note, part in self.alive():
            held[part] += 0 if note.whole is None else note.whole.nbytes
            held["host"] += 0 if note.host is None else note.host.nbytes
        return held


def watched_step(pipeline, batches, loss_tokens):
    """A step of one micro-batch -> bytes by part that its forward left on this rank, when the first backward begins."""
    watch, found = Watch(pipeline.memory, pipeline.model), []
    with before(torch.autograd, "backward", watch, found), before(parallel.Chunk, "backward", watch, found):
        pipeline.step(batches, loss_tokens)
    del pipeline.memory.note_of, pipeline.memory.hooks
    return found[0]


@contextmanager
def before(owner, name, watch, found):
    """Meanwhile each call of a function of owner puts what is held then at the end of a list."""
    function = getattr(owner, name)

    def watched(*args, **kwargs):
        found.append(watch.held())
        return function(*args, **kwargs)

    setattr(owner, name, watched)
    try:
        yield
    finally:
        setattr(owner, name, function)


class Runner:
    """A model under one plan, and the seconds of its steps."""

    def __init__(self, config, plan, dtype):
        self.model = Model(config)
        self.model.init_weights(0)
        self.model.to(DTYPES[dtype])
        self.pipeline = parallel.Pipeline(self.model, plan)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.seconds = []

    def step(self, batch, loss_tokens):
        start = time.perf_counter()
        self.loss = self.pipeline.step([batch], loss_tokens).total_loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)

    def measure(self, batch, loss_tokens):
        """Bytes by part, of one more forward."""
        parts = watched_step(self.pipeline, [batch], loss_tokens)
        self.optimizer.zero_grad()
        return parts


def report_parts(config, plan):
    """Prints what one micro-batch keeps under the plan, MiB by part, measured and as sim.py counts it."""
    shape = replace(sim.as_shape(config), value_padded=True)
    counted = sim.saved_by_part([sim.Work(shape, plan, kind) for kind in sim.stage_kinds(shape, plan)[0]])
    measured = Runner(config, plan, plan.precision).measure(*tokens_for(config, plan))
    print(f"{'kept for backward, MiB':24} {'measured':>9} {'sim.py':>9}")
    for part in sorted(counted | measured):
        print(f"{part:24} {measured[part] / 2**20:9.3f} {counted[part] / 2**20:9.3f}")


def tokens_for(config, plan):
    """A micro-batch of random tokens, as arguments of Model.forward, and its numbers of targets."""
    size = plan.micro_batch, plan.seq_len + 2
    tokens = torch.randint(config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    targets = torch.stack([tokens[:, 1:-1], tokens[:, 2:]], 1)[:, :1 + config.num_nextn_predict_layers]
    return dict(ids=tokens[:, :-2], targets=targets), (targets != -100).sum((0, 2)).float()


def race(config, args):
    one = sim.Plan(micro_batch=args.batch, global_batch=args.batch, seq_len=args.seq, precision=args.dtype)
    plans = {name: replace(one, **items) for name, items in PLANS.items()}
    runners = {name: Runner(config, plan, args.dtype) for name, plan in plans.items()}
    batch, loss_tokens = tokens_for(config, one)
    names = list(runners)
    for number in range(args.rounds + 1):
        for turn in range(len(names)):
            runners[names[(number + turn) % len(names)]].step(batch, loss_tokens)
    assert len({runner.loss for runner in runners.values()}) == 1, "a plan changed the loss"
    kept = {name: runner.measure(batch, loss_tokens) for name, runner in runners.items()}
    return plans, {name: min(runner.seconds[1:]) for name, runner in runners.items()}, kept


def report(config, args):
    plans, seconds, kept = race(config, args)
    device = {name: sum(parts.values()) - parts["host"] for name, parts in kept.items()}
    shape = replace(sim.as_shape(config), value_padded=True)
    weights = sum(p.numel() for p in Model(config).parameters())
    static = 4 * weights * torch.empty(0, dtype=DTYPES[args.dtype]).element_size()
    print(f"\n{args.batch} x {args.seq} tokens, {args.dtype}, weights {config.expert_weight}; MiB, "
          f"{static / 2**20:.0f} of them static")
    print(f"{'':20} {'kept':>8} {'sim.py':>8} {'+ static':>9} {'on host':>8} {'ms':>8} {'time / none':>12} "
          f"{'saving':>7} {'price':>7}")
    for name, plan in plans.items():
        works = [sim.Work(shape, plan, kind) for kind in sim.stage_kinds(shape, plan)[0]]
        counted, saved = sum(sim.saved_bytes(work)[0] for work in works), device["none"] - device[name]
        price = (seconds[name] - seconds["none"]) / (seconds["layer"] - seconds["none"])
        print(f"{name:20} {device[name] / 2**20:8.1f} {counted / 2**20:8.1f} {(device[name] + static) / 2**20:9.1f} "
              f"{kept[name]['host'] / 2**20:8.1f} {seconds[name] * 1e3:8.0f} {seconds[name] / seconds['none']:12.3f} "
              f"{saved / (device['none'] - device['layer']):7.1%} {price:7.1%}")


def compare(config, args):
    """What transformers keeps, beside ours; storages of weights and inputs apart."""
    config = replace(config, num_nextn_predict_layers=0, balance="none", norm="pre", latent_norm_eps=1e-6)
    weights, kept = Model(config), {}
    weights.init_weights(0)
    ids = torch.randint(config.vocab_size, (args.batch, args.seq), generator=torch.Generator().manual_seed(0))
    for name in available(["ours", "transformers"]):
        model, loss = CONTENDERS[name](config, weights.state_dict())
        held = {}

        def pack(x):
            if not parallel.is_weight(x):
                held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        model.to(DTYPES[args.dtype]).train()
        outside = {t.untyped_storage().data_ptr() for t in (ids, *model.parameters())}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = loss(ids)
        kept[name] = sum(size for address, size in held.items() if address not in outside)
        print(f"{name:20} {kept[name] / 2**20:8.1f} MiB kept of a forward, loss {result.item():.4f}")
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).unsqueeze(1)
    plan = sim.Plan(micro_batch=args.batch, global_batch=args.batch, seq_len=args.seq, precision=args.dtype, **PAPER)
    batch = dict(ids=ids, targets=targets)
    parts = Runner(config, plan, args.dtype).measure(batch, torch.tensor([float(ids.numel())]))
    kept["paper's set"] = sum(parts.values()) - parts["host"]
    for name in ("ours", "paper's set") if "transformers" in kept else ():
        print(f"{name + ' / transformers':30} {kept[name] / kept['transformers']:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="a shape of model.py; default: the paper's, scaled")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of weights, activations and moments")
    parser.add_argument("--batch", type=int, default=4, help="sequences, default 4")
    parser.add_argument("--seq", type=int, default=256, help="tokens a sequence, default 256")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each plan, default 5")
    parser.add_argument("--report", action="store_true", help="only the bytes, by part of the model")
    parser.add_argument("--tiny", action="store_true", help="narrow, 2 x 16 tokens, 1 round")
    args = parser.parse_args()
    if args.tiny:
        args.batch, args.seq, args.rounds = 2, 16, 1
    config = PRESETS[args.preset] if args.preset else SCALED
    if args.tiny:
        config = replace(config, vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16)
    if args.report:
        for name in ("none", "paper's set + norm", "layer"):
            print(f"\n{name}, {args.batch} x {args.seq} tokens, {args.dtype}")
            report_parts(config, sim.Plan(micro_batch=args.batch, global_batch=args.batch, seq_len=args.seq,
                                          precision=args.dtype, **PLANS[name]))
        return
    for expert_weight in ("before_down", "after_down"):
        report(replace(config, expert_weight=expert_weight), args)
    compare(config, args)
    print("\n" + environment())


if __name__ == "__main__":
    main()
