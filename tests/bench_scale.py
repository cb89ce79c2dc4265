"""
What a step costs as work grows: forward and backward per token from 16 to 256 experts, and in the number of tokens.

    python tests/bench_scale.py                        # table, and a picture in runs/scale.svg; about 5 minutes
    python tests/bench_scale.py --dtype bf16 --threads 1
    python tests/bench_scale.py --tiny                 # seconds; shows that it runs, not how fast

Every model has the same layers, width, expert width and experts per token; only the number of experts differs, and with
it the parameters. A token's matmuls are the same, but for the router, which has a row for each expert. So the cost of a
token should be flat, as long as an expert has rows enough (at least 512 here) to pay for reading its weights; and the
cost of a step linear in tokens. The optimizer is apart: it visits every parameter at each step, used or not.

Steps of all models alternate; a column is the median over rounds of (this model's time / the first one's in the round).
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import parallel  # noqa: E402
from bench_step import DTYPES, environment  # noqa: E402
from model import Config, Model, flops_per_token  # noqa: E402

ROWS, TOP_K, SEQ = 512, 4, 256


def config_of(n_experts):
    return Config(vocab_size=512, hidden_size=256, num_hidden_layers=2, first_k_dense_replace=0,
                  n_routed_experts=n_experts, num_experts_per_tok=TOP_K, moe_intermediate_size=64,
                  num_nextn_predict_layers=0, balance="micro_batch")


class Case:
    """One model and one number of tokens; seconds of its steps."""

    def __init__(self, n_experts, tokens, dtype, device):
        self.n_experts, self.tokens = n_experts, tokens
        self.model = Model(config_of(n_experts))
        self.model.init_weights(0)
        self.model.to(device, dtype).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(0, 512, (tokens // SEQ, SEQ), generator=torch.Generator().manual_seed(0)).to(device)
        self.passes, self.updates = [], []                                # seconds: forward and backward, optimizer

    def step(self):
        start = time.perf_counter()
        loss = self.model(self.ids, labels=self.ids).total_loss
        loss.backward()
        wait(self.ids)
        middle = time.perf_counter()
        self.optimizer.step()
        wait(self.ids)
        self.passes.append(middle - start)
        self.updates.append(time.perf_counter() - middle)
        self.optimizer.zero_grad()

    def microseconds(self):
        return statistics.median(self.passes) / self.tokens * 1e6

    def to_first(self, first):
        """Cost of a token, as a multiple of the first case's."""
        ratio = statistics.median(own / base for own, base in zip(self.passes, first.passes))
        return ratio * first.tokens / self.tokens


def wait(tensor):
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize()


def race(cases, rounds):
    for number in range(rounds + 1):
        for turn in range(len(cases)):
            cases[(number + turn) % len(cases)].step()
    for case in cases:                                                    # the first round warms up
        case.passes, case.updates = case.passes[1:], case.updates[1:]


def show(title, cases):
    print(f"\n{title}\n{'experts':>8} {'tokens':>8} {'rows an expert':>15} {'parameters':>11} {'MFLOP a token':>14} "
          f"{'us a token':>11} {'to the first':>13} {'optimizer ms':>13}")
    for case in cases:
        flops = flops_per_token(case.model.config, SEQ) / 1e6
        parameters = sum(p.numel() for p in case.model.parameters())
        print(f"{case.n_experts:8} {case.tokens:8,} {case.tokens * TOP_K // case.n_experts:15,} {parameters:11,} "
              f"{flops:14.2f} {case.microseconds():11.2f} {case.to_first(cases[0]):13.2f} "
              f"{statistics.median(case.updates) * 1e3:13.1f}", flush=True)


def draw(path, title, cases):
    """Bars of microseconds a token, as SVG by hand: the project needs no library for five bars."""
    highest = max(case.microseconds() for case in cases)
    bars = []
    for i, case in enumerate(cases):
        height = 200 * case.microseconds() / highest
        x = 30 + 90 * i
        bars.append(f'<rect x="{x}" y="{240 - height:.1f}" width="60" height="{height:.1f}" fill="#4878a8"/>'
                    f'<text x="{x + 30}" y="{232 - height:.1f}">{case.microseconds():.1f}</text>'
                    f'<text x="{x + 30}" y="258">{case.n_experts}</text>')
    width = 30 + 90 * len(cases)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 290" font-family="sans-serif" '
                    f'font-size="13" text-anchor="middle"><rect width="{width}" height="290" fill="white"/>'
                    f'<text x="{width / 2}" y="18">{title}</text>{"".join(bars)}'
                    f'<text x="{width / 2}" y="280">experts, {TOP_K} of them a token</text></svg>\n')
    print(f"\npicture: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of weights and activations")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: what torch takes")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each, default 7")
    parser.add_argument("--out", default="runs/scale.svg", help="the picture, default runs/scale.svg")
    parser.add_argument("--tiny", action="store_true", help="8 and 16 experts, 256 rows, one round")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numbers, rows, rounds = ((8, 16), 256, 1) if args.tiny else ((16, 32, 64, 128, 256), ROWS, args.rounds)
    device = parallel.pick_device()                                       # as train.py: on a CPU, freed memory is kept
    tokens = max(numbers) * rows // TOP_K                                 # the same for all
    cases = [Case(n, tokens, DTYPES[args.dtype], device) for n in numbers]
    race(cases, rounds)
    title = f"forward and backward, us a token ({args.dtype}, {tokens:,} tokens)"
    show(title, cases)
    draw(Path(args.out), title, cases)
    longer = [Case(numbers[0], tokens // part, DTYPES[args.dtype], device) for part in (4, 2, 1)]
    race(longer, rounds)
    show("in the number of tokens", longer)
    print("\n" + environment())


if __name__ == "__main__":
    main()
