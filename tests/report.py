"""
What a run learnt and how its experts behave: one HTML page of one run, or of several beside each other.

    python tests/report.py runs/tiny                                  # runs/tiny/report/page.html, PNGs, numbers.json
    python tests/report.py runs/a runs/b --out compared --domain chinese=zh.txt poems=DIR
    python train.py --save-every 10 --keep-growing 1 --record-loads 1 --eval-every 100     # a run that shows everything

It may be called while a run goes on. What a run does not hold is left out, and a line on the page says why. The page
needs no other file; numbers.json holds the numbers behind each picture, and a picture is drawn from these alone.

Routing is studied (tests/study.py) on text of domains: Python code, English prose and tables of names from Python's
own library, and whatever --domain names. A run on the default text has been trained on most of that.
"""
import argparse
import base64
import html
import io
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from study import (Missing, coactivation, expert_shares, favourite_share, find_domains, flat, max_vio, read_run,
                   specialisation_spread, spikes, study_checkpoints)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import parallel  # noqa: E402
import train  # noqa: E402
from model import count_params, require  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Numbers of a picture, from a run; what they look like, the function that draws them says

UNITS = dict(
    loss="loss, nats a token", mtp_loss="MTP loss, nats a token", aux_loss="balance loss × alpha, nats",
    val_loss="held-out loss, nats a token", val_bpb="held-out bits per byte", grad_norm="gradient norm before clipping",
    lr="learning rate", tokens_per_s="tokens/s, all ranks", mem_gib="memory, GiB", mfu="MFU",
    max_vio="MaxVio of a batch", text_vio="MaxVio of the text of 50 steps", device_vio="MaxVio of devices",
    drop_rate="share of copies dropped", reward="reward of an answer", reward_std="its spread within a group",
    solved="share of answers solved", zero_spread="share of groups alike", in_format="share in the format",
    kl="KL to the reference, nats a token", entropy="entropy, nats a token", length="length of an answer, tokens",
    clip_share="share of tokens clipped",
    router_diff="share of tokens routed otherwise", far="share of tokens off by ln 2")
SMOOTH = ("lr", "mem_gib", "text_vio")     # drawn as they are
OF_RL = ("reward", "reward_std", "solved", "zero_spread", "in_format", "kl", "entropy", "length", "clip_share",
         "router_diff", "far")


def series(run, keys):
    """Curves of keys of metrics.jsonl: {key: steps, tokens and values}, without those that are always 0."""
    found = {}
    for key in keys:
        points = [(line["step"], line["tokens"], line[key]) for line in run.lines
                  if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])]
        if any(value for _, _, value in points):
            found[key] = dict(zip(("step", "tokens", "value"), zip(*points)))
    absent = [UNITS[key] for key in keys if key not in found]
    if not found:
        raise Missing("" if not run.lines or keys is OF_RL else f"metrics.jsonl has no {', '.join(keys)}")
    run.absent += absent
    return found


def of_loss(run):
    if run.stored["stage"] == "rl":
        raise Missing("the loss of rl says nothing of how good the answers are; their reward does")
    return series(run, ["loss", "mtp_loss", "aux_loss"])


def of_gradient(run):
    found = series(run, ["grad_norm"])
    found["grad_norm"]["spikes"] = spikes(found["grad_norm"]["value"])
    return found


def of_balance(run, window=50):
    """Curves, with the tokens at which experts moved, and from the recorded loads that of longer text."""
    run.need_experts()
    found = series(run, ["max_vio", "drop_rate", "device_vio"])
    if run.loads is not None:
        sums = np.cumsum(run.loads, 0, dtype=np.float64)                  # of all steps up to each
        sums[window:] -= sums[:-window].copy()                            # of the last `window`
        tokens = [line["tokens"] for line in run.lines][-len(sums):]
        found["text_vio"] = dict(tokens=tokens, value=max_vio(sums).mean(1)[-len(tokens):])        # mean over layers
    for curve in found.values():
        curve["moves"] = [line["tokens"] for line in run.lines if line.get("balance_moved")]
    return found


def of_load(run, parts=20):
    """Maps of load over the mean: each layer at the end of the recording, and the least even one from its start."""
    run.need_experts()
    if run.loads is None:
        return [map_of_text(run, "text of the domains", run.studied().ids.values())]
    last = run.loads[-max(1, len(run.loads) // 10):].sum(0)
    worst = int(max_vio(last).argmax())
    stretches = np.array_split(run.loads[:, worst], min(parts, len(run.loads)))
    ends = np.cumsum([len(stretch) for stretch in stretches])
    return [dict(title="last tenth of the recorded steps", rows=run.layers, row="layer", ratio=relative(last)),
            dict(title=f"layer {run.layers[worst]}, the least even", rows=ends, row="up to recorded step",
                 ratio=[relative(stretch.sum(0)) for stretch in stretches])]


def relative(copies):
    return copies / copies.mean(-1, keepdims=True)


def even_share(run):
    """K/E."""
    return run.config.num_experts_per_tok / run.config.n_routed_experts


def map_of_text(run, title, ids):
    """Share of the tokens that have an expert, over K/E, which is also its load over the mean."""
    shares = np.stack([expert_shares(layer, run.study.experts) for layer in flat(ids)])
    return dict(title=title, rows=run.layers, row="layer", ratio=shares / even_share(run))


def of_domains(run):
    return [map_of_text(run, name, [ids]) for name, ids in run.studied().ids.items()]


def of_coactivation(run):
    study, k = run.studied(), run.config.num_experts_per_tok
    if k < 2:
        raise Missing("a token has one expert")
    maps, ids = [], flat(study.ids.values())
    for layer in sorted({0, len(ids) // 2, len(ids) - 1}):
        rates = coactivation(ids[layer], study.experts) / ((k - 1) / (study.experts - 1))
        title = f"layer {run.layers[layer]}"
        maps.append(dict(title=title, rows=range(study.experts), row="tokens with expert", ratio=rates))
    return maps


def of_specialisation(run):
    study = run.studied()
    if len(study.ids) < 2 or min(map(len, study.tokens.values())) < 8:
        raise Missing("it takes two domains of eight sequences: give --domain NAME=PATH, or more --tokens")
    found = []
    for layer in range(len(run.layers)):
        copies = [[np.bincount(sequence.ravel(), minlength=study.experts) for sequence in ids[layer]]
                  for ids in study.ids.values()]
        found.append(specialisation_spread([np.stack(own) for own in copies]))
    value, spread, chance = zip(*found)
    return {"specialisation index": dict(rows=run.layers, value=value, spread=spread, dotted=chance)}


def of_vocabulary(run):
    study, rng = run.studied(), np.random.default_rng(0)
    tokens = np.concatenate([windows.ravel() for windows in study.tokens.values()])
    value, chance = [], []
    for ids in flat(study.ids.values()):
        value.append(favourite_share(ids, tokens, study.experts))
        chance.append(favourite_share(rng.permutation(ids), tokens, study.experts))
    return {"share with the favourite": dict(rows=run.layers, value=value, dotted=chance)}


def of_entropy(run):
    return {"entropy / log E": dict(rows=run.layers, value=run.studied().entropy)}


def of_gains(run):
    if run.study is None:
        raise Missing
    names = dict(input_layernorm="before attention", post_attention_layernorm="after attention",
                 pre_mlp_layernorm="before MLP", post_mlp_layernorm="after MLP")
    found = {}
    for name, gains in run.study.gains.items():
        rows = [str(layer) for layer in range(len(gains["mean"]))]
        found[f"gain {names[name]}"] = dict(rows=rows, value=gains["mean"], spread=gains["std"], dotted=gains["first"])
    return found


def of_saturation(run):
    study = run.studied()
    if not study.past:
        raise Missing("it takes several checkpoints: train.py --save-every 10 --keep-growing 1")
    steps, shares = zip(*study.past, (study.step, [1.0] * len(run.layers)))
    return dict(x=[100 * step / study.step for step in steps], lines=np.transpose(shares), layers=run.layers,
                level=even_share(run))


def of_scores(run):
    scores = run.studied().scores
    return dict(x=range(1, 1 + len(scores[0])), lines=scores, layers=run.layers, level=1 / len(scores[0]))


def of_retention(run):
    study = run.studied()
    own = {name: study.kept[name, name] - loss for name, loss in study.loss.items()}
    others = {name: [study.kept[name, other] - loss for other in study.loss if other != name]
              for name, loss in study.loss.items()}
    return dict(loss=study.loss, own=own, others=others)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing: a matplotlib Figure and {run: numbers}, of all runs, so that each has its colour, {} where it has no numbers


def new_axes(figure, panels, columns, height=2.8):
    """An axis for each panel. Rows are as alike as can be and share the width: 7 panels in 3 columns are 3, 2, 2."""
    rows = [len(row) for row in np.array_split(range(panels), math.ceil(panels / columns))]
    figure.set_size_inches(10.5, height * len(rows))
    grid, axes = figure.add_gridspec(len(rows), math.lcm(*rows)), []
    for row, n in enumerate(rows):
        width = grid.ncols // n
        axes += [figure.add_subplot(grid[row, i * width:(i + 1) * width]) for i in range(n)]
    return axes


def add_legend(figure):
    """One above all panels, where it hides no curve."""
    named = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    columns = max(1, 150 // (6 + max(map(len, named), default=0)))
    figure.legend(named.values(), named, loc="outside upper left", ncols=columns, frameon=False)


def panels_of(runs):
    return list(dict.fromkeys(key for numbers in runs.values() for key in numbers))


def with_numbers(runs):
    return {name: numbers for name, numbers in runs.items() if numbers}


def draw_series(figure, runs, over="tokens"):
    """{key: step, tokens, value, perhaps indices of spikes, tokens of moves}: a panel for each, a line for each run."""
    from matplotlib.ticker import EngFormatter
    keys = panels_of(runs)
    for axis, key in zip(new_axes(figure, len(keys), 3), keys):
        for color, (name, numbers) in enumerate(runs.items()):
            if key in numbers:
                draw_curve(axis, numbers[key], over, name, f"C{color}", is_noisy=key not in SMOOTH)
        axis.set(xlabel=over, ylabel=UNITS[key], xlim=(0, None))
        axis.locator_params(axis="x", nbins=6)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))              # 500k, 1.5M
        if key == "grad_norm":
            axis.set_yscale("log")
            ticks = [f"{tick:.2g}" for tick in np.geomspace(*axis.get_ylim(), 7)[1:-1]]
            axis.set_yticks([float(tick) for tick in ticks], ticks)
            axis.minorticks_off()
    add_legend(figure)


def draw_curve(axis, curve, over, name, color, is_noisy):
    """Faint as it is, and above that the mean over a fiftieth of the points, five at least; of few points dots."""
    x, values = np.array(curve[over]), np.array(curve["value"])
    width = max(len(x) // 50, min(5, len(x) // 10)) if is_noisy else 1
    if "spikes" in curve:
        name = f"{name}, spikes: {len(curve['spikes'])}"
        axis.plot(x[curve["spikes"]], values[curve["spikes"]], "x", color=color, ms=9, mew=2)
    if width < 2:
        axis.plot(x, values, color=color, marker="o" if len(x) < 8 else None, label=name)
    else:
        axis.plot(x, values, color=color, alpha=0.3, lw=1)
        axis.plot(x[width - 1:], np.convolve(values, np.ones(width) / width, "valid"), color=color, label=name)
    for move in curve.get("moves", ()):
        axis.axvline(move, color=color, ls=":", lw=1)


def draw_maps(figure, runs, label, height=2.8):
    """[title, names of rows and what they are, ratio (rows, experts)]: red above 1, blue below, by powers of two."""
    panels = [(name, numbers) for name, maps in runs.items() for numbers in maps]
    columns = min(5, max(3, *map(len, runs.values())))                    # where it can be, a row for each run
    axes = new_axes(figure, len(panels), columns, height)
    for axis, (name, numbers) in zip(axes, panels):
        ratio, rows = np.array(numbers["ratio"], float), numbers["rows"]
        image = axis.imshow(np.log2(np.clip(ratio, 1 / 4, 4)), aspect="auto", cmap="RdBu_r", vmin=-2, vmax=2,
                            interpolation="nearest")
        every = math.ceil(len(rows) / 10)
        axis.set_yticks(range(0, len(rows), every), rows[::every])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(title=f"{name}: {numbers['title']}", xlabel="expert", ylabel=numbers["row"], facecolor="lightgrey")
    bar = figure.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1, 2], label=label, aspect=40)
    bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])


def draw_by_layer(figure, runs):
    """{panel: names of rows, value, and perhaps spread, dotted}: a panel for each, a line over layers for each run."""
    keys = panels_of(runs)
    for axis, key in zip(new_axes(figure, len(keys), 2), keys):
        for color, (name, numbers) in enumerate(runs.items()):
            if key not in numbers:
                continue
            found = numbers[key]
            x = [int(row.split()[0]) + 0.05 * color for row in found["rows"]]         # side by side where they agree
            axis.errorbar(x, np.array(found["value"], float), found.get("spread"), color=f"C{color}", marker="o", ms=4,
                          capsize=3, label=name)
            if "dotted" in found:
                axis.plot(x, np.array(found["dotted"], float), ":.", color=f"C{color}")
        axis.set(xlabel="layer", ylabel=key, ylim=(0, 1.05 * axis.get_ylim()[1]))
        axis.xaxis.get_major_locator().set_params(integer=True)
    add_legend(figure)


def draw_lines(figure, runs, xlabel, ylabel):
    """x, lines (layers, points) and a level: a panel for each run, shallow layers dark."""
    from matplotlib import colormaps
    runs = with_numbers(runs)
    for axis, (name, numbers) in zip(new_axes(figure, len(runs), 3), runs.items()):
        layers = numbers["layers"]
        for i, (layer, values) in enumerate(zip(layers, numbers["lines"])):
            is_named = len(layers) <= 6 or i in (0, len(layers) // 2, len(layers) - 1)
            axis.plot(numbers["x"], values, color=colormaps["viridis"](0.9 * i / max(1, len(layers) - 1)), marker=".",
                      label=f"layer {layer}" if is_named else None)
        axis.axhline(numbers["level"], color="grey", ls=":")
        axis.set(title=name, xlabel=xlabel, ylabel=ylabel, xlim=(0, None), ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()


def draw_retention(figure, runs):
    """{domain: loss}, {domain: rise} and {domain: [rises]}: a panel for each run."""
    runs = with_numbers(runs)
    for axis, (name, numbers) in zip(new_axes(figure, len(runs), 3), runs.items()):
        domains = list(numbers["loss"])
        places = np.arange(len(domains))
        axis.bar(places - 0.2, list(numbers["own"].values()), 0.35, label="kept: the quarter that the domain uses most")
        for place, rises in zip(places, numbers["others"].values()):
            axis.bar(place + 0.2, np.mean(rises) if rises else 0, 0.35, color="C1",
                     label=None if place else "kept: another domain's quarter")
            axis.plot([place + 0.2] * len(rises), rises, "k.")
        axis.set_xticks(places, [f"{domain}\n{numbers['loss'][domain]:.2f}" for domain in domains])
        axis.set(title=name, xlabel="domain, and its loss with all experts", ylabel="rise of the loss, nats a token")
        axis.axhline(0, color="black", lw=1)
    add_legend(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The pictures


class Picture(NamedTuple):
    name: str
    title: str
    caption: str                           # what to see
    theirs: str                            # what the paper or its relatives saw
    numbers: Callable                      # run -> numbers, or Missing
    draw: Callable                         # (figure, {run: numbers})


PICTURES = [
    Picture("loss", "Loss",
            "Training loss of the next token (sft: in answers), mean loss of the further tokens that MTP predicts, and "
            "balance loss. Faint: single steps; full: a moving mean. The first two should fall and stay smooth.",
            "Pangu Ultra (2504.07866, figure 8; 1.6B, 94 layers): depth-scaled gains give a smoother and lower curve.",
            of_loss, draw_series),
    Picture("heldout", "Held-out text",
            "Loss and bits per UTF-8 byte on text (sft: answers) that was not trained on; should fall, too. Bits per "
            "byte compare across tokenizers.",
            "no held-out loss is published for this model.",
            partial(series, keys=("val_loss", "val_bpb")), draw_series),
    Picture("gradient", "Gradient norm",
            "Before clipping, logarithmic. Crosses, the fewer the better: above 3 times the median of 50 steps before.",
            "Pangu Ultra: fewer spikes with depth-scaled norms.", of_gradient, draw_series),
    Picture("pace", "Learning rate, speed, memory",
            "The schedule's learning rate; tokens a second; memory of rank 0's device, or of its process. Speed "
            "should be level: dips are other work on the machine.",
            "the paper: 718B on 6K NPUs 1.46M tokens/s, MFU 30.0 %; on 4K before 0.61M, 18.9 %.",
            partial(series, keys=("lr", "tokens_per_s", "mem_gib", "mfu")), draw_series),
    Picture("rl", "Reinforcement learning",
            "Reward (1: right) and share solved should rise, entropy and length not collapse. A group answers one "
            "question; alike in reward, it teaches nothing. Routed otherwise: an expert of the token differs between "
            "the model that sampled and the one that learns. Off: their log-probabilities differ by more.",
            "reported of MoE with two engines: 10 % of choices differ, and 94 % of tokens in some layer.",
            partial(series, keys=OF_RL), partial(draw_series, over="step")),
    Picture("balance", "Balance over time",
            "MaxVio, load of the busiest expert over the mean minus 1, mean over layers: 0 is even. Longer text is "
            "more even where batches lean different ways. Vertical lines: experts moved between devices.",
            "loss-free balance (2408.15664): MaxVio of all text 0.04 with a router bias, 0.72 with a loss. The paper: "
            "drop-and-pad drops 8 % of tokens at 718B, 6 % at 20B.", of_balance, draw_series),
    Picture("load", "Load of each expert",
            "Copies of tokens that each expert got over the mean of its layer. White is even; a column that keeps its "
            "colour: an expert that stays over- or underused. Without train.py --record-loads 1: in the domains' text.",
            "Pangu Pro (2505.21411): even groups by design; of DeepSeek-V2's groups the busiest takes up to 30 %.",
            of_load, partial(draw_maps, label="load / mean")),
    Picture("domains", "Experts by domain",
            "Share of a domain's tokens that have the expert among their K, over the K/E of even routing. An expert "
            "that is red in one panel and blue in another is specialised.",
            "the paper: expert choice clearly depends on domain and language. Pangu Pro: more so in deeper layers.",
            of_domains, partial(draw_maps, label="share of tokens / (K/E)")),
    Picture("specialisation", "Specialisation by domain",
            "0: all domains use all experts alike; 1: no two share one. Bars: standard deviation over sequences "
            "drawn anew. Dotted: the sequences shuffled among the domains; only what stands above that is "
            "specialisation.",
            "OLMoE, Qwen1.5-MoE and DeepSeekMoE (zenodo 19457411): by topic 1.6 to 2.3 times an even share at most.",
            of_specialisation, draw_by_layer),
    Picture("vocabulary", "Specialisation by token",
            "Of each token id that occurs 8 times or more the share of occurrences that have its favourite expert "
            "among their K; a mean. Dotted: the choices shuffled among the tokens.",
            "OLMoE, Qwen1.5-MoE and DeepSeekMoE: experts specialise by kind of token, less by topic.",
            of_vocabulary, draw_by_layer),
    Picture("coactivation", "Experts chosen together",
            "Of the tokens with one expert (row) the share that have the other (column), too, over the (K-1)/(E-1) of "
            "even routing; all pairs; first, middle and last layer. Red pairs work together, blue ones replace each "
            "other.",
            "OLMoE (2409.02060): few pairs. Pangu Pro: little, somewhat more in shallow and deep layers.",
            of_coactivation, partial(draw_maps, label="share / even share", height=3.4)),
    Picture("saturation", "Router saturation",
            "Share of a token's experts at an earlier checkpoint that the newest, at 100 %, chooses, too. Dotted: "
            "chance, K/E. A layer that is high early settled early.",
            "OLMoE: about 60 % after 1 % of training, about 80 % after 40 %.", of_saturation,
            partial(draw_lines, xlabel="% of the run's steps so far", ylabel="share of a token's experts")),
    Picture("scores", "Router scores",
            "A token's largest score, second, and so on, divided by their sum; means. Dotted: all alike. The steeper, "
            "the surer the router.",
            "the paper has such a figure; it is not public.", of_scores,
            partial(draw_lines, xlabel="rank among a token's scores", ylabel="score / sum")),
    Picture("entropy", "Entropy of router scores",
            "Of a token's scores divided by their sum; a mean. 1: all scores alike; the lower, the surer the router.",
            "no such figure is public.", of_entropy, draw_by_layer),
    Picture("gains", "Gains of the norms by depth",
            "Mean over a norm's gains, bars their standard deviation. Dotted: the mean at the first checkpoint kept. "
            "Depth-scaled gains after attention and MLP begin far below 1.",
            "Pangu Ultra: all four fall over training; mean and spread of the post norms rise with depth.",
            of_gains, draw_by_layer),
    Picture("retention", "A quarter of the experts",
            "How much a domain's loss rises when its tokens may choose among a quarter of each layer's experts only: "
            "those that it uses most, or those that another does (bar: mean, dots: each). Where domains have experts "
            "of their own the first bar is low and the second high.",
            "Ai2's EMO: a quarter of 128 experts costs about 1 % of performance if trained for it; else far more.",
            of_retention, draw_retention),
]


def plain(value):
    """Arrays as lists, numbers as JSON has them; what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def gather(runs):
    """{picture: {run: numbers}}; what is missing goes into the run's notes."""
    numbers = {}
    for picture in PICTURES:
        found = {}
        for run in runs:
            try:
                found[run.name] = plain(picture.numbers(run))
            except Missing as why:
                run.notes += [f"no picture '{picture.title}': {why}"] if str(why) else []
        if found:
            numbers[picture.name] = found
    return numbers


def draw_all(numbers):
    """{picture: its PNG}."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    drawn, names = {}, list(dict.fromkeys(name for runs in numbers.values() for name in runs))
    for picture in PICTURES:
        if picture.name in numbers:
            figure, file = Figure(layout="constrained"), io.BytesIO()
            with rc_context({"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8}):
                picture.draw(figure, {name: numbers[picture.name].get(name, {}) for name in names})
                figure.savefig(file, dpi=100)
            drawn[picture.name] = file.getvalue()
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# The page

STYLE = """body {max-width: 1060px; margin: 2em auto; padding: 0 1em; font: 16px/1.5 sans-serif; color: #222}
img {width: 100%} table {border-collapse: collapse; font-size: 14px} td, th {padding: .2em .8em; text-align: left;
border-bottom: 1px solid #ddd} figure {margin: 0 0 2.5em} .theirs {color: #666}"""


def facts_of(run):
    """What the table says of a run; "-" where there is nothing to say."""
    c, counts, stored = run.config, count_params(run.config), run.stored
    last = {key: value for line in run.lines for key, value in line.items() if isinstance(value, (int, float))}
    value = {key: f"{number:.4f}" for key, number in last.items()}
    axes = [f"{axis} {stored['plan'][axis]}" for axis in ("pp", "dp", "cp", "tp", "ep") if stored["plan"][axis] > 1]
    experts = f"{c.n_routed_experts}, {c.num_experts_per_tok} a token, {c.n_shared_experts} shared"
    return {
        "stage": stored["stage"], "begun from": "/".join(Path(stored.get("source", "")).parts[-3:]) or "-",
        "steps": last.get("step", 0), "tokens, padding included": f"{last.get('tokens', 0):,}",
        "parameters": f"{counts['total'] / 1e6:.2f}M, {counts['active'] / 1e6:.2f}M active",
        "experts": experts if run.layers else "none",
        "balance": f"{c.balance}, alpha {c.aux_loss_alpha:g}, groups of {c.balance_group} sequences",
        "norm, init": f"{c.norm}, {c.init}", "plan": ", ".join(axes) or "one process",
        "last loss, nats a token": value.get("loss", "-") if stored["stage"] != "rl" else "-",
        "last reward": value.get("reward", "-"), "held-out loss, nats a token": value.get("val_loss", "-"),
        "held-out bits per byte": value.get("val_bpb", "-"), "skipped steps": last.get("skipped", 0),
        "checkpoint studied": run.study.step if run.study else "-",
        "no curve, as never measured or always 0": "; ".join(run.absent) or "-",
        "device, torch": f"{stored['device']}, {stored['torch']}", "commit": stored.get("commit", "")[:10] or "-"}


def page(facts, domains, drawn, notes):
    """HTML that needs no other file."""
    names = html.escape(", ".join(facts))
    out = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{names}</title><style>{STYLE}</style>",
           f"<h1>{names}</h1><table><tr><th>{''.join(f'<th>{html.escape(name)}' for name in facts)}"]
    for key in next(iter(facts.values())):
        if {found[key] for found in facts.values()} != {"-"}:
            out.append(f"<tr><th>{key}{''.join(f'<td>{html.escape(str(found[key]))}' for found in facts.values())}")
    studied = f"Routing was studied on text of {html.escape(', '.join(domains))}. " if domains else ""
    out.append(f"</table><p>{studied}Steps and tokens are counted from each run's own start. “Theirs”: what others "
               f"published of other, larger models. All else was measured on the runs above.</p><ul>")
    out += [f"<li>{html.escape(note)}" for note in notes]
    out.append("</ul>")
    for picture in PICTURES:
        if picture.name in drawn:
            data = base64.b64encode(drawn[picture.name]).decode()
            out.append(f"<h2>{picture.title}</h2><figure><img alt='{picture.title}' src='data:image/png;base64,{data}'>"
                       f"<figcaption>{html.escape(picture.caption)}<br><span class=theirs>Theirs: "
                       f"{html.escape(picture.theirs)}</span></figcaption></figure>")
    return "\n".join(out)


def report(folders, out, given_domains, tokens, device):
    """Writes page.html, PNGs and numbers.json into the folder `out`."""
    # 1. the runs
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    out.mkdir(parents=True, exist_ok=True)
    # 2. their checkpoints
    domains = find_domains(given_domains, 8 * tokens)
    for run in runs:
        try:
            run.study = study_checkpoints(run, domains, tokens, device)
        except (ValueError, OSError) as error:
            run.notes.append(f"no pictures of routing and gains: {error}")
    domains = list(dict.fromkeys(name for run in runs if run.study for name in run.study.tokens))
    # 3. numbers and pictures
    numbers, drawn = gather(runs), {}
    facts = {run.name: facts_of(run) for run in runs}
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    try:
        drawn = draw_all(numbers)
    except ImportError:
        notes.append("no pictures, only numbers.json: they need matplotlib (pip install matplotlib)")
    # 4. files
    for name, data in drawn.items():
        (out / f"{name}.png").write_bytes(data)
    train.write_whole(out / "numbers.json", json.dumps(dict(runs=facts, notes=notes, pictures=numbers)))
    train.write_whole(out / "page.html", page(facts, domains, drawn, notes))
    print("\n".join([*notes, f"{len(drawn)} pictures: {out / 'page.html'}"]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, help="folder; default: RUN/report of the first run")
    parser.add_argument("--domain", nargs="+", action="extend", default=[], metavar="NAME=PATH",
                        help="more text to study routing on: a file or folder")
    parser.add_argument("--tokens", type=int, default=8192, help="of each domain, on which each checkpoint is run")
    parser.add_argument("--device", default="cpu", help="auto | cpu | cuda | npu")
    args = parser.parse_args(argv)
    require(args.tokens > 0, f"--tokens {args.tokens}: use 1 or more")
    out = args.out or Path(args.runs[0], "report")
    report(args.runs, out, args.domain, args.tokens, parallel.pick_device(args.device))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)
