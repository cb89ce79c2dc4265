"""
Retrieval over a long context: shuffled lines `key: value`, one of them asked for at the end.

    python tests/needle.py --make needles --documents 2000 --lines 60      # needles/needles.jsonl, to mix into training
    python tests/needle.py runs/long --lengths 256 512 1024 --out needle.png
    python tests/needle.py runs/tiny --sweep --seq-len 1024 --steps 100 --data TEXT needles   # which rope_theta?

The score of a place is how the right value ranks among ten values of the same document, by their log-probability: 1 if
always first, 0 if always last, so that chance is 0.5. It is drawn by length of the document and depth of the line in
it, also beyond the length that a run was trained on. Without such documents in the training text the score is chance at
this size: a share of 5 to 10 % of the sequences, which --phases or the amount of text gives.

--sweep tries bases from 1e4 to 1e7 in steps of 4, each by a short run from the given one, and names the smallest that
passes, as the paper's authors chose theirs by an offline score. If none or all pass, it falls back to
1e5 * (length / 8192)^2, which fits the two bases that are published (1.6e6 at 32K, 2.56e7 at 128K), and at least 1e4.
"""
import argparse
import importlib.util
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from model import check_setting, require  # noqa: E402

CANDIDATES = 10
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PASSES = 0.9                               # a mean score


def word(rng):
    """Four letters that can be spoken."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))


def pairs(rng, n):
    """{key: value}, n of them, no word twice."""
    words = set()
    while len(words) < 2 * n:
        words.add(word(rng))
    words = sorted(words)
    rng.shuffle(words)
    return dict(zip(words[:n], words[n:]))


def text_of(table):
    return "".join(f"{key}: {value}\n" for key, value in table.items())


def make(out, documents, lines, seed):
    """Documents of up to `lines` lines, with half of them asked for, and answered, at the end."""
    rng = random.Random(seed)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "needles.jsonl", "w") as file:
        for _ in range(documents):
            table = pairs(rng, rng.randint(max(4, lines // 8), lines))
            asked = rng.sample(list(table), len(table) // 2)
            text = text_of(table) + "?\n" + text_of({key: table[key] for key in asked})
            file.write(json.dumps(dict(text=text)) + "\n")
    print(f"{out / 'needles.jsonl'}: {documents} documents")


@torch.no_grad()
def score(model, encoding, end, length, depth, rng):
    """How the right value ranks: 1 first, 0 last. length: tokens of the whole; depth: 0 the first line, 1 the last."""
    # 1. as many lines as fit, with the one asked for in its place
    table = pairs(rng, 4)
    room = length - 16
    while len(encoding.encode_ordinary(text_of(table))) < room:
        table |= {key: value for key, value in pairs(rng, 4).items() if key not in table}
    lines = list(table.items())[:-4]
    require(len(lines) > 1, f"--lengths {length}: no room for two lines and a question, use 64 or more")
    key, right = lines[round(depth * (len(lines) - 1))]
    others = [value for _, value in lines if value != right]
    values = [right, *rng.sample(others, min(CANDIDATES - 1, len(others)))]

    # 2. the log-probability of each value after the question
    prompt = [end, *encoding.encode_ordinary(text_of(dict(lines)) + "?\n" + key + ":")]
    answers = [encoding.encode_ordinary(f" {value}\n") for value in values]
    longest = max(map(len, answers))
    ids = torch.full((len(values), len(prompt) + longest), end)
    for row, answer in enumerate(answers):
        whole = torch.tensor(prompt + answer)
        ids[row, :len(whole)] = whole
    logits = model(ids).logits[:, len(prompt) - 1:-1].float().log_softmax(-1)
    totals = [sum(logits[row, place, token].item() for place, token in enumerate(answer))
              for row, answer in enumerate(answers)]
    better = sum(total > totals[0] for total in totals[1:])
    return 1 - better / (len(values) - 1)


def scores(run, lengths, trials, seed=0):
    """{(length, depth): mean score} of a run's newest checkpoint."""
    model, encoding, end = train.open_model(run, torch.device("cpu"))
    model.eval()
    model.config = replace(model.config, max_position_embeddings=max(lengths) + 64)
    found = {}
    for length in lengths:
        for depth in DEPTHS:
            rng = random.Random(f"{seed} {length} {depth}")
            tried = [score(model, encoding, end, length, depth, rng) for _ in range(trials)]
            found[length, depth] = sum(tried) / trials
    return found


def print_scores(found):
    print("mean score by tokens of the document (rows) and depth of the line (columns); chance is 0.50")
    print(f"{'':>8}", *(f"{depth:>6.0%}" for depth in DEPTHS))
    for length in sorted({length for length, _ in found}):
        print(f"{length:>8}", *(f"{found[length, depth]:>6.2f}" for depth in DEPTHS))


def draw(found, trained, path):
    """Depth by length as a picture. trained: tokens that the run saw at once."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lengths = sorted({length for length, _ in found})
    grid = [[found[length, depth] for length in lengths] for depth in DEPTHS]
    figure, axes = plt.subplots(figsize=(1.5 + 1.1 * len(lengths), 3.6), layout="constrained")
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center")
    marks = [f"{length}\n(beyond)" if length > trained else str(length) for length in lengths]
    axes.set_xticks(range(len(lengths)), marks)
    axes.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
    axes.set_xlabel("tokens of the document; beyond: longer than trained on")
    axes.set_ylabel("depth of the line asked for")
    figure.colorbar(image, label="score (0.5: chance)")
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def trained_length(run):
    folder, _ = train.find_checkpoint(run)
    return train.read_config(folder)["phases"][-1].seq_len


# ---------------------------------------------------------------------------------------------------------------------
# Which base


def sweep(run, seq_len, steps, data, trials):
    """A short run from the given one for each base; {base: mean score at seq_len}."""
    results = {}
    for base in [1e4 * 4**i for i in range(6)]:
        out = Path(run).with_name(f"{Path(run).name}-base-{base:.0f}")
        if not out.exists():
            command = [sys.executable, str(ROOT / "train.py"), "pretrain", "--init", run, "--out", str(out)]
            command += ["--seq-len", str(seq_len), "--steps", str(steps), "--set", f"rope_theta={base}"]
            subprocess.run(command + (["--data", *data] if data else []), check=True, stdout=subprocess.DEVNULL)
        found = scores(str(out), [seq_len], trials)
        results[base] = sum(found.values()) / len(found)
        print(f"rope_theta {base:>12,.0f}: score {results[base]:.2f} at {seq_len} tokens", flush=True)
    return results


def advise(results, seq_len):
    """The smallest base that passes, or what to do where the scores do not tell them apart."""
    passing = [base for base, value in results.items() if value >= PASSES]
    if 0 < len(passing) < len(results):
        return f"the smallest that passes ({PASSES}) is rope_theta={min(passing):g}"
    rule = max(1e4, 1e5 * (seq_len / 8192) ** 2)
    which = "all pass" if passing else "none passes"
    return f"{which}, so the score does not choose at this size: 1e5*(length/8192)^2, and at least 1e4, is {rule:g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run's folder")
    parser.add_argument("--make", metavar="DIR", help="write documents to train on")
    parser.add_argument("--documents", type=int, default=2000, help="of --make")
    parser.add_argument("--lines", type=int, default=60, help="of --make: the most in a document; about 6 tokens each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; default: what the run saw, and twice that")
    parser.add_argument("--trials", type=int, default=8, help="documents for each length and depth")
    parser.add_argument("--out", metavar="PNG", help="also draw the scores")
    parser.add_argument("--sweep", action="store_true", help="try bases by short runs from RUN")
    parser.add_argument("--seq-len", type=int, default=1024, help="of --sweep, tokens")
    parser.add_argument("--steps", type=int, default=100, help="of --sweep, for each base")
    parser.add_argument("--data", nargs="+", default=[], help="of --sweep, as of train.py")
    given = parser.parse_args()
    check_setting("--lines", given.lines, int, least=4, most=2000)
    check_setting("--documents", given.documents, int)
    check_setting("--trials", given.trials, int)
    if given.make:
        return make(Path(given.make), given.documents, given.lines, given.seed)
    if not given.run:
        parser.error("name a run's folder, or --make DIR")
    if given.sweep:
        results = sweep(given.run, given.seq_len, given.steps, given.data, given.trials)
        return print(advise(results, given.seq_len))
    if given.out and importlib.util.find_spec("matplotlib") is None:
        parser.error("--out draws with matplotlib: pip install matplotlib, or drop --out")
    trained = trained_length(given.run)
    found = scores(given.run, given.lengths or [trained, 2 * trained], given.trials, given.seed)
    print_scores(found)
    if given.out:
        draw(found, trained, given.out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"needle.py: {error}", file=sys.stderr)
        sys.exit(2)
