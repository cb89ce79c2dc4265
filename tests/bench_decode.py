"""
A token of generation of ours beside transformers', by length of context: ms a token, and memory of the cache.

    python tests/bench_decode.py                                 # cpu-small, and the attention of one-gpu in 4 layers
    python tests/bench_decode.py --shapes one-gpu --contexts 100 2000 --batch 1 --dtype bf16 --threads 1
    python tests/bench_decode.py --tiny                          # seconds; shows that it runs, not how fast

All contenders live in one process, hold the same weights and take turns: a turn is some greedy tokens for every
sequence of the batch behind a context that was read before, from which the clock starts. The ratio is the median over
turns of (its time / absorbed's time in that turn), so that what disturbs the machine disturbs both sides.

    no cache        one forward over the whole context for every token
    expanded        the cache, of which keys and values of all heads are made at every step
    absorbed        the cache as it is, up-projections passed to query and output
    draft 1, 2, 4   absorbed, with so many tokens drafted by the one MTP layer and checked. Weights are random, so
                    hardly a draft holds: the ratio is of a round, the tokens a round from which on drafts pay
    transformers    DeepseekV3ForCausalLM.generate with its cache (latents too, expanded at every step), attention by
                    sdpa, experts by grouped_mm. Its own drafts (use_mtp) are left out: it reads the MTP layer from
                    files at every call of generate, takes one sequence alone, and the clock would be of the files

The same tokens come out of all, which is checked. The layout is DeepSeek-V3's (norm=pre), which transformers knows.
"""
import argparse
import statistics
import time
import warnings
from dataclasses import replace
from functools import partial

import torch

import bench_step
from bench_step import DTYPES, transformers_config, transformers_name

from model import PRESETS, Cache, Model, Writer, distribution

SHAPES = {
    "tiny": replace(PRESETS["tiny"], hidden_size=64),
    "cpu-small": PRESETS["cpu-small"],
    # attention of one-gpu beside few and small experts
    "one-gpu": replace(PRESETS["one-gpu"], num_hidden_layers=4, intermediate_size=4096, n_routed_experts=8,
                       num_experts_per_tok=2, vocab_size=4096),
}
GREEDY = partial(distribution, temperature=0, top_k=0, top_p=1.0)

# ---------------------------------------------------------------------------------------------------------------------
# Contenders: read(ids (B,L)), once; then run(n), n tokens behind them, as often as wanted -> (new ids (B,n), rounds)


class NoCache:
    def __init__(self, model, weights):
        self.model = model

    def read(self, ids):
        self.ids = ids

    def run(self, n):
        ids = self.ids
        for _ in range(n):
            ids = torch.cat((ids, self.model(ids).logits[:, -1:].argmax(-1)), 1)
        return ids[:, self.ids.size(1):], n

    def cache_bytes(self):
        return 0


class Ours:
    def __init__(self, model, weights, absorbs, drafts=0):
        self.model, self.absorbs, self.drafts = model, absorbs, drafts

    def read(self, ids):
        generator = torch.Generator(ids.device).manual_seed(0)
        room = self.model.config.max_position_embeddings - ids.size(1)
        self.writer = Writer(self.model, list(ids), room, self.drafts, GREEDY, generator, False, bool)
        self.lengths = self.writer.main.lengths
        self.drafted = [cache.lengths for cache in self.writer.mtp]

    def run(self, n):
        """Back to the context, and on until every sequence has n tokens more."""
        Cache.absorbing_is_cheaper = lambda cache, T, S: self.absorbs
        writer, rounds = self.writer, 0
        writer.main.lengths = self.lengths
        for cache, lengths in zip(writer.mtp, self.drafted):
            cache.lengths = lengths
        while (writer.main.lengths - self.lengths).min() < n:
            writer.round()
            rounds += 1
        first = int(self.lengths[0]) + 1
        return writer.tokens[:, first:first + n].clone(), rounds

    def cache_bytes(self):
        caches = (self.writer.main, *self.writer.mtp)
        return sum(kept[:, :int(self.lengths[0])].nbytes for cache in caches for kept in cache.kept.values())


class Transformers:
    def __init__(self, model, weights):
        from transformers import DeepseekV3ForCausalLM
        config = transformers_config(model.config)
        config.use_cache = True
        self.model = DeepseekV3ForCausalLM(config)
        theirs = {transformers_name(name): tensor for name, tensor in weights.items()}
        self.model.load_state_dict(theirs, strict=False, assign=True)
        first = next(model.parameters())
        self.model.to(first.device, first.dtype).eval()
        self.model.generation_config.eos_token_id = None

    def read(self, ids):
        from transformers import DynamicCache
        self.ids, self.cache = ids, DynamicCache(config=self.model.config)
        self.model(input_ids=ids[:, :-1], past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def run(self, n):
        surplus = self.cache.get_seq_length() - (self.ids.size(1) - 1)
        if surplus:
            self.cache.crop(-surplus)
        out = self.model.generate(input_ids=self.ids, attention_mask=torch.ones_like(self.ids), max_new_tokens=n,
                                  past_key_values=self.cache, do_sample=False)
        return out[:, self.ids.size(1):], n

    def cache_bytes(self):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


CONTENDERS = {
    "absorbed": partial(Ours, absorbs=True),
    "expanded": partial(Ours, absorbs=False),
    "no cache": NoCache,
    **{f"draft {k}": partial(Ours, absorbs=True, drafts=k) for k in (1, 2, 4)},
    "transformers": Transformers,
}

# ---------------------------------------------------------------------------------------------------------------------
# The clock


@torch.no_grad()
def race(contenders, ids, n, turns):
    """-> {name: [(seconds a round, tokens, rounds) of each turn]}, after one turn that is not measured."""
    for contender in contenders.values():
        contender.read(ids)
    found = {name: [] for name in contenders}
    names = list(contenders)
    tokens = {}
    for number in range(turns + 1):
        for turn in range(len(names)):
            name = names[(number + turn) % len(names)]
            steps = 1 if name == "no cache" else n                        # it takes as long as all others together
            start = time.perf_counter()
            tokens[name], rounds = contenders[name].run(steps)
            if ids.device.type != "cpu":
                torch.accelerator.synchronize()
            found[name].append((time.perf_counter() - start) / rounds)
    for name, theirs in tokens.items():
        same = (theirs == tokens["absorbed"][:, :theirs.size(1)]).float().mean().item()
        assert same > 0.9, f"{name}: {same:.0%} of the tokens are those of ours"        # bf16 may turn a near tie
    return {name: seconds[1:] for name, seconds in found.items()}


def report(shape, batch, contenders, args, config):
    print(f"\n{shape}, batch {batch}, {args.dtype}, {torch.get_num_threads()} threads: ms a round (ratio to absorbed)")
    print(f"{'context':>8} " + " ".join(f"{name:>16}" for name in contenders) + "   cache MiB, absorbed | transformers")
    generator = torch.Generator().manual_seed(0)
    device = next(contenders["absorbed"].model.parameters()).device
    for context in args.contexts:
        ids = torch.randint(config.vocab_size, (batch, context), generator=generator).to(device)
        running = dict(contenders)
        if context * batch > args.no_cache_up_to:
            running.pop("no cache", None)
        seconds = race(running, ids, args.tokens, args.turns)
        cells = []
        for name in contenders:
            if name not in seconds:
                cells.append(f"{'-':>16}")
                continue
            ratio = statistics.median(own / base for own, base in zip(seconds[name], seconds["absorbed"]))
            cells.append(f"{statistics.median(seconds[name]) * 1e3:8.1f} ({ratio:5.2f})")
        memory = [contenders[name].cache_bytes() for name in ("absorbed", "transformers") if name in contenders]
        sizes = " | ".join(f"{size / 2**20:.2f}" for size in memory)
        print(f"{context:8} {' '.join(cells)}   {sizes}", flush=True)


def build(shape, args):
    """(config, the contenders that are installed)."""
    longest = max(args.contexts) + args.tokens + 8
    config = replace(SHAPES[shape], norm="pre", balance="none", latent_norm_eps=1e-6, num_nextn_predict_layers=1,
                     max_position_embeddings=max(256, longest))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = Model(config)
    model.init_weights(0)
    model.to(device, DTYPES[args.dtype]).eval()
    weights = model.state_dict()
    with torch.device("meta"):
        trunk_only = Model(replace(config, num_nextn_predict_layers=0)).eval()
    trunk_only.load_state_dict({name: weights[name] for name in trunk_only.state_dict()}, assign=True)
    contenders = {}
    for name in bench_step.available(args.contenders or CONTENDERS):
        contenders[name] = CONTENDERS[name](model if name.startswith("draft") else trunk_only, weights)
    return config, contenders


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="NAME", default=["cpu-small", "one-gpu"], choices=sorted(SHAPES),
                        help="cpu-small: of model.py; one-gpu: its attention in 4 layers; by default both")
    parser.add_argument("--contexts", nargs="+", type=int, default=[100, 250, 500, 1000, 2000, 4000], metavar="TOKENS",
                        help="tokens read before, by default 100 to 4000")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sequences, by default 1, then 8")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", choices=list(CONTENDERS),
                        help=f"some of {', '.join(CONTENDERS)}; absorbed is always there")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of weights and activations")
    parser.add_argument("--tokens", type=int, default=16, help="tokens a turn, default 16")
    parser.add_argument("--turns", type=int, default=5, help="measured turns, default 5")
    parser.add_argument("--no-cache-up-to", type=int, default=4000, metavar="TOKENS",
                        help="context x batch above which the contender without a cache is left out, default 4000")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: what torch takes")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, contexts of 4 and 20 tokens, one turn")
    args = parser.parse_args()
    if args.tiny:
        args.shapes, args.contexts, args.tokens, args.turns, args.batch = ["tiny"], [4, 20], 3, 1, [2]
    if args.contenders:
        args.contenders = list(dict.fromkeys(["absorbed", *args.contenders]))
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*past_key_values. is deprecated", category=FutureWarning)
    for shape in args.shapes:
        config, contenders = build(shape, args)
        for batch in args.batch:
            report(shape, batch, contenders, args, config)
    print("\n" + bench_step.environment())


if __name__ == "__main__":
    main()
