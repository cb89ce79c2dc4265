"""
The paper's ablations on small models: matched runs of train.py, several seeds, and a verdict on each claim.

    python tests/ablate.py                                 # all questions, planned for six hours on two cores
    python tests/ablate.py --only norm init --seeds 5 --budget 90 --out runs/norms       # some of them, in minutes

Runs of a seed read the same text in the same order, so arms are compared seed by seed. Two shapes: `narrow`, and `deep`
where instability is asked, since spikes need depth and a high rate. The learning rate is swept once on the baseline of
each shape, with seed 0; steps and rates are then fixed in OUT/plan.json, for all that is ever run into OUT. A finished
run is not made again, a stopped one is resumed, a baseline serves all questions. Groups of the balance loss are played
on one device by 1, 2, 4 or 12 sequences (Config.balance_group): sequence, micro-batch, EP group, DP group.

On several devices start it several times with other --only and one --out: a run that another process makes is left out
of this one's table; the last call makes the whole one.

Verdict: the mean difference of the pairs and its 95 % interval (Student's t). "shows" or "shows the opposite": 0 lies
outside; "within the spread": it does not. Of twenty such verdicts on nothing one is wrong by chance.
"""
import argparse
import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from study import max_vio, read_lines, read_loads, spikes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from model import Config, count_params, flops_per_token, require  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Questions

_SMALL = dict(vocab_size=1024, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, num_nextn_predict_layers=0,
              balance_group=4)
SHAPES = dict(
    narrow=Config(**_SMALL, hidden_size=128, num_hidden_layers=4, intermediate_size=384, q_lora_rank=64,
                  kv_lora_rank=48, n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=64),
    deep=Config(**_SMALL, hidden_size=64, num_hidden_layers=24, intermediate_size=192, num_attention_heads=2,
                q_lora_rank=32, kv_lora_rank=32, n_routed_experts=8, moe_intermediate_size=48),
    large=Config(**_SMALL, hidden_size=256, num_hidden_layers=8, intermediate_size=768, q_lora_rank=96, kv_lora_rank=64,
                 n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=128))
TINY = dict(vocab_size=300, hidden_size=16, num_hidden_layers=2, intermediate_size=32)      # for --tiny
BATCH, SEQ_LEN = 12, 128
HELDOUT = 0.005                            # of the text, the same for all runs: little of it tells pairs apart
RATES = 3e-3, 9e-3, 2.7e-2                 # that the sweep tries; `large` takes narrow's
HIGH = 3.0                                 # times the swept rate: where spikes are looked for


class Arm(NamedTuple):
    changes: dict = {}                     # of Config
    shape: str = "narrow"
    rate: float = 1.0                      # times the swept one


class Claim(NamedTuple):
    text: str
    metric: str                            # of METRICS
    lower: str                             # the arm that the claim says has less of it ...
    higher: str                            # ... than this one


class Question(NamedTuple):
    arms: dict                             # label -> Arm, the baseline first
    claims: list


def of_depth(setting, words):
    """Arms of the deep shape at two rates: the first word is the baseline's."""
    return {f"{word}{label}": Arm({setting: word}, "deep", rate)
            for label, rate in (("", 1.0), (", 3 × rate", HIGH)) for word in words}


def fewer(text, ours, others):
    """That ours has fewer spikes and a lower loss than others, at both rates."""
    return [Claim(f"{text} {what} than {other}{rate}", metric, f"{ours}{rate}", f"{other}{rate}")
            for other in others for rate in ("", ", 3 × rate")
            for what, metric in (("spikes less", "spikes"), ("has a lower loss", "bpb"))]


def of_experts(experts, k, **changes):
    """So many experts without a shared one, whose width would follow theirs."""
    return Arm(dict(n_routed_experts=experts, num_experts_per_tok=k, moe_intermediate_size=1024 // experts,
                    n_shared_experts=0, **changes))


QUESTIONS = dict(
    norm=Question(of_depth("norm", ["dssn", "sandwich", "pre"]),
                  fewer("depth-scaled sandwich norm", "dssn", ["sandwich", "pre"])),
    init=Question(of_depth("init", ["tiny", "small"]), fewer("TinyInit", "tiny", ["small"])),
    balance=Question(
        {"EP group (4)": Arm(), "none": Arm(dict(balance="none")), "sequence (1)": Arm(dict(balance_group=1)),
         "micro-batch (2)": Arm(dict(balance_group=2)), "DP group (12)": Arm(dict(balance_group=12))},
        [Claim("EP-group balance has a lower loss than micro-batch", "bpb", "EP group (4)", "micro-batch (2)"),
         Claim("EP-group balance has a lower loss than DP-group", "bpb", "EP group (4)", "DP group (12)"),
         Claim("EP-group balance controls load better than none", "text_vio", "EP group (4)", "none")]),
    alpha=Question({"1e-2": Arm(), "1e-3": Arm(dict(aux_loss_alpha=1e-3)), "1e-1": Arm(dict(aux_loss_alpha=1e-1))},
                   [Claim("alpha 1e-2 controls load better than 1e-3", "text_vio", "1e-2", "1e-3")]),
    experts=Question(                      # at equal parameters, active and in all, but for the router's
        {"16, 4 a token": of_experts(16, 4), "8, 2 a token": of_experts(8, 2), "32, 8 a token": of_experts(32, 8),
         "4, 1 a token": of_experts(4, 1, norm_topk_prob=False)},         # a normed score of one would be 1, always
        [Claim("more and finer experts have a lower loss (16 against 8)", "bpb", "16, 4 a token", "8, 2 a token"),
         Claim("more and finer experts have a lower loss (32 against 16)", "bpb", "32, 8 a token", "16, 4 a token")]),
    shared=Question(                       # at equal active parameters
        {"1 shared": Arm(), "none": Arm(dict(n_shared_experts=0, num_experts_per_tok=5))},
        [Claim("a shared expert lowers the loss", "bpb", "1 shared", "none")]),
    capacity=Question(                     # held-out text is dropped, too
        {"dropless": Arm(), **{f"factor {f}": Arm(dict(capacity_factor=f)) for f in (1.0, 1.5, 2.0)},
         "factor 1.0, large": Arm(dict(capacity_factor=1.0), "large")},
        [Claim("dropless has a lower loss than dropping", "bpb", "dropless", "factor 1.0"),
         Claim("a larger model drops more", "dropped", "factor 1.0", "factor 1.0, large")]),
    mtp=Question({"depth 0": Arm(), **{f"depth {n}": Arm(dict(num_nextn_predict_layers=n)) for n in (1, 2)}},
                 [Claim("one MTP depth lowers the loss of the next token", "bpb", "depth 1", "depth 0"),
                  Claim("a second one lowers it further", "bpb", "depth 2", "depth 1")]),
    bias=Question({"loss": Arm(), "router bias": Arm(dict(router_bias=True, balance="none"))},
                  [Claim("a router bias has a lower loss than a balance loss", "bpb", "router bias", "loss"),
                   Claim("a router bias balances all text better", "text_vio", "router bias", "loss")]))
METRICS = dict(bpb="bits per byte", spikes="spikes", batch_vio="MaxVio, batch", text_vio="MaxVio, text",
               dropped="dropped, %")

# ---------------------------------------------------------------------------------------------------------------------
# Runs


class Lab:
    """A folder of runs, how they are made, and its plan.json."""

    def __init__(self, out, shapes, data=(), device="auto"):
        self.out, self.shapes = Path(out), shapes
        self.words = ["--device", device, *(["--data", *data] if data else [])]               # for train.py
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "plan.json"
        self.plan = json.loads(path.read_text()) if path.exists() else dict(rates={})

    def store(self, **facts):
        self.plan |= facts
        train.write_whole(self.out / "plan.json", json.dumps(self.plan, indent=1))

    def config(self, arm):
        return replace(self.shapes[arm.shape], **arm.changes)

    def folder(self, arm, rate, seed):
        """Of a run: the same for arms of several questions that are alike."""
        base = self.shapes[arm.shape]
        changes = [f"-{name}={value}" for name, value in sorted(arm.changes.items()) if getattr(base, name) != value]
        return self.out / f"{arm.shape}{''.join(changes)}-lr{rate:.3g}-seed{seed}"

    def make(self, arm, rate, seed):
        """The folder of a run, once it is finished; None if another process makes it."""
        folder, steps = self.folder(arm, rate, seed), self.plan["steps"]
        if is_finished(folder, steps) or (folder / "diverged").exists():
            return folder
        print(f"{folder.name} ...", flush=True)
        words = ["--out", folder, "--seed", seed, "--steps", steps, "--lr", rate, "--warmup-steps", max(1, steps // 20)]
        if train.newest(folder):
            words = ["--resume", folder]
        status = self.train(arm, words)
        if status == 2:                                                   # train.py has said why: above all, in use
            return None
        if status and "not finite" in status:
            train.write_whole(folder / "diverged", status)
            return folder
        if status:
            sys.exit(f"{status}; the same command goes on")
        text = json.loads((folder / "config.json").read_text())["corpus"]["sha256"]
        require(self.plan.get("text", text) == text, f"{folder} read another text than runs before: use another --out")
        self.store(text=text)
        if not is_finished(folder, steps):
            sys.exit("stopped; the same command goes on")
        return folder

    def train(self, arm, words):
        """train.py in this process -> what it exits with, or None."""
        if words[0] != "--resume":
            given = vars(self.config(arm)).items()
            words += ["--set", *[f"{name}={value}" for name, value in given if value is not None], *self.words,
                      "--seq-len", SEQ_LEN, "--global-batch", BATCH, "--micro-batch", BATCH, "--record-loads", 1,
                      "--save-every", 200, "--keep", 1, "--heldout", HELDOUT]
        try:
            with open(self.out / "log.txt", "a") as file, contextlib.redirect_stdout(file):
                train.main([str(word) for word in ("pretrain", *words)])
        except SystemExit as stop:
            return stop.code

    def fix_steps(self, runs, budget):
        """Chooses the steps of a run, so that `runs` [Arm] take about `budget` minutes: each shape is timed once."""
        if "steps" in self.plan:
            return
        costs, evaluation = {}, 0                                         # seconds a step for a FLOP a token; steps
        for shape in {arm.shape for arm in runs}:
            folder = self.out / f"timed-{shape}"
            if not is_finished(folder, 5):
                status = self.train(Arm(shape=shape), ["--out", folder, "--steps", 5])
                require(not status, f"{folder}: train.py refused; see above, and {self.out / 'log.txt'}")
            times = [line["step_ms"] for line in read_lines(folder / "metrics.jsonl", [])]
            costs[shape] = np.median(times[2:]) / 1e3 / flops_per_token(self.shapes[shape], SEQ_LEN)
            # held-out text is read twice, forward alone: as long as so many steps
            heldout = json.loads((folder / "config.json").read_text())["corpus"]["tokens"]["heldout"]
            require(heldout > 1, "no part of this text is held out: give more of it with --data")
            evaluation = 2 / 3 * heldout / (BATCH * SEQ_LEN)
        step = sum(costs[arm.shape] * flops_per_token(self.config(arm), SEQ_LEN) for arm in runs)
        begin_and_end = evaluation * step + 10 * len(runs)                # seconds, of all runs
        steps, least = int((60 * budget - begin_and_end) / step), (20 * step + begin_and_end) / 60
        require(steps >= 20, f"--budget {budget:g}: {len(runs)} runs of 20 steps take {least:.0f} minutes, use more")
        self.store(steps=steps)

    def rate_of(self, shape):
        """The best of RATES on a shape's baseline, seed 0; a rate that diverged is none."""
        shape = "narrow" if shape == "large" else shape
        if shape not in self.plan["rates"]:
            found = {}
            for rate in RATES:
                folder = self.make(Arm(shape=shape), rate, 0)
                require(folder, "the learning rate is not swept, see above: start again when no other process does")
                found[rate] = measure(folder).get("bpb", np.inf)
            self.store(rates=self.plan["rates"] | {shape: min(found, key=found.get)})
        return self.plan["rates"][shape]


def is_finished(folder, steps):
    lines = read_lines(folder / "metrics.jsonl", [])
    return bool(lines) and lines[-1]["step"] >= steps and "val_bpb" in lines[-1]


def measure(folder):
    """{metric: value} of a finished run; {} of one that diverged. Load is that of the second half."""
    if (folder / "diverged").exists():
        return {}
    lines, loads = read_lines(folder / "metrics.jsonl", []), read_loads(folder / "loads.npy", [])
    half = lines[len(lines) // 2:]
    return dict(bpb=lines[-1]["val_bpb"], spikes=len(spikes([line["grad_norm"] for line in lines])),
                batch_vio=np.mean([line["max_vio"] for line in half]),
                text_vio=max_vio(loads[len(loads) // 2:].sum(0)).mean(),
                dropped=100 * np.mean([line["drop_rate"] for line in half]))


# ---------------------------------------------------------------------------------------------------------------------
# Results

STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}   # t of 95 %, by freedom


def paired(lower, higher, metric):
    """{seed: metrics} of two arms -> (mean of higher - lower, half its 95 % interval, pairs)."""
    pairs = [higher[seed][metric] - lower[seed][metric] for seed in lower if lower[seed] and higher.get(seed)]
    if len(pairs) < 2:
        return np.mean(pairs) if pairs else np.nan, np.nan, len(pairs)
    half = STUDENT.get(len(pairs) - 1, 2.0) * np.std(pairs, ddof=1) / np.sqrt(len(pairs))
    return np.mean(pairs), half, len(pairs)


def plus_minus(half):
    return "" if np.isnan(half) else f" ± {half:.2g}"                     # one pair has no spread


def verdict(claim, results):
    """A line on a claim; results: {label: {seed: metrics}}."""
    mean, half, pairs = paired(results[claim.lower], results[claim.higher], claim.metric)
    lost = sum(not metrics for label in (claim.lower, claim.higher) for metrics in results[label].values())
    if pairs < 2:
        word = "no verdict"
    elif mean - half > 0:
        word = "shows at this size"
    else:
        word = "shows the opposite" if mean + half < 0 else "is within the spread"
    left_out = f", {lost} runs diverged and are left out" if lost else ""
    return (f"- {claim.text}: **{word}** ({METRICS[claim.metric]} of “{claim.higher}” minus “{claim.lower}”: "
            f"{mean:+.4g}{plus_minus(half)}, pairs: {pairs}{left_out})")


def table(name, question, results, configs):
    """Markdown of a question: mean and standard deviation over seeds, the difference from the first arm, verdicts."""
    first = next(iter(question.arms))
    head = ["arm", "active parameters", "runs", *METRICS.values(), f"bits per byte − “{first}”"]
    out = [f"\n### {name}\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label, by_seed in results.items():
        found = [metrics for metrics in by_seed.values() if metrics]
        cells = [label, f"{count_params(configs[label])['active'] / 1e6:.2f}M", f"{len(found)} of {len(by_seed)}"]
        for metric in METRICS:
            values = [metrics[metric] for metrics in found]
            spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4g}{spread}" if values else "-")
        mean, half, _ = paired(results[first], by_seed, "bpb")
        out.append(f"| {' | '.join(cells)} | {'' if label == first else f'{mean:+.4f}{plus_minus(half)}'} |")
    return "\n".join([*out, "", *[verdict(claim, results) for claim in question.claims]])


def draw(results, path):
    """A panel a question: bits per byte of each run minus that of the first arm with the same seed."""
    from matplotlib.figure import Figure
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(max(6, 3.7 * columns), 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(results):]:
        axis.set_visible(False)
    for axis, (name, arms) in zip(axes, results.items()):
        first = next(iter(arms))
        for place, (label, by_seed) in enumerate(arms.items()):
            pairs = [by_seed[seed]["bpb"] - arms[first][seed]["bpb"] for seed in by_seed
                     if by_seed[seed] and arms[first].get(seed)]
            mean, half, _ = paired(arms[first], by_seed, "bpb")
            axis.plot(pairs, [place] * len(pairs), "o", color="C0", alpha=0.5)
            axis.errorbar(mean, place, xerr=np.nan_to_num(half), fmt="|", color="black", capsize=4)
        axis.set_yticks(range(len(arms)), arms, fontsize=8)
        axis.axvline(0, color="grey", lw=1)
        axis.locator_params(axis="x", nbins=4)                            # long numbers would run into each other
        axis.set_ylim(len(arms) - 0.5, -0.5)                              # the first on top
        axis.set_title(name)
        axis.set_xlabel(f"bits per byte − “{first}”", fontsize=8)
    figure.savefig(path, dpi=100)


def ablate(lab, names, seeds, budget):
    """Makes all runs of these questions, then table.md, numbers.json and table.png in the lab's folder."""
    # 1. what there is to run: arms that several questions share count once
    questions = {name: QUESTIONS[name] for name in names}
    arms = [arm for question in questions.values() for arm in question.arms.values()]
    runs = {lab.folder(arm, arm.rate, 0): arm for arm in arms}
    sweeps = [Arm(shape=shape) for shape in {arm.shape for arm in arms} - {"large"} for _ in RATES[1:]]
    lab.fix_steps([*runs.values()] * seeds + sweeps, budget)
    # 2. seed by seed, so that a table can be made early
    results = {name: {label: {} for label in question.arms} for name, question in questions.items()}
    for seed in range(seeds):
        for name, question in questions.items():
            for label, arm in question.arms.items():
                folder = lab.make(arm, arm.rate * lab.rate_of(arm.shape), seed)
                if folder:
                    results[name][label][seed] = measure(folder)
        write(lab, questions, results)


def write(lab, questions, results):
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    command, commit = f"python tests/ablate.py {' '.join(sys.argv[1:])}", git.stdout.strip()
    text = [f"`{command}`, commit {commit}, torch {torch.__version__}: "
            f"{lab.plan['steps']} steps of {BATCH} × {SEQ_LEN} tokens a run, learning rates {lab.plan['rates']}. "
            f"Mean ± standard deviation over seeds; differences ± half of their 95 % interval, paired by seed."]
    for name, question in questions.items():
        configs = {label: lab.config(arm) for label, arm in question.arms.items()}
        text.append(table(name, question, results[name], configs))
    train.write_whole(lab.out / "table.md", "\n".join(text) + "\n")
    train.write_whole(lab.out / "numbers.json", json.dumps(dict(plan=lab.plan, results=results), default=float))
    try:
        draw(results, lab.out / "table.png")
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib)")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(QUESTIONS), default=list(QUESTIONS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--budget", type=float, default=360, help="minutes for all, which choose the steps of a run")
    parser.add_argument("--out", help="folder of the runs; default: runs/ablate")
    parser.add_argument("--data", nargs="+", default=[], help="as of train.py")
    parser.add_argument("--device", default="auto", help="as of train.py")
    parser.add_argument("--tiny", action="store_true", help="shapes and runs of a test, which answer nothing")
    args = parser.parse_args(argv)
    require(args.seeds > 0, f"--seeds {args.seeds}: use 1 or more")
    shapes = {name: replace(shape, **TINY) for name, shape in SHAPES.items()} if args.tiny else SHAPES
    lab = Lab(args.out or f"runs/ablate{'-tiny' if args.tiny else ''}", shapes, args.data, args.device)
    if args.tiny:
        lab.store(steps=2)
    ablate(lab, args.only, args.seeds, args.budget)
    print((lab.out / "table.md").read_text())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"ablate.py: {error}", file=sys.stderr)
        sys.exit(2)
