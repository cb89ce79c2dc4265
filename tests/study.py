"""
What can be measured of a run: metrics of routing, its folder, and what its checkpoints do with text of several domains.

tests/report.py draws it, tests/ablate.py compares by it. Metrics of routing are as in OLMoE (2409.02060, section 5)
where it has them, but co-activation counts all pairs of a token's experts. E experts, K of them a token, N tokens,
S sequences of T tokens, D domains.
"""
import contextlib
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import parallel  # noqa: E402
import train  # noqa: E402
from model import Config, require  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Metrics: plain arrays in, numbers out


def chosen(ids, experts):
    """ids (N,K) -> (N,E): whether the token has the expert among its K."""
    table = np.zeros((len(ids), experts), bool)
    np.put_along_axis(table, ids, True, 1)
    return table


def expert_shares(ids, experts):
    """Share of the tokens that have each expert among their K, (E,); of even routing K/E."""
    return chosen(ids, experts).mean(0)


def saturation(ids, final):
    """Mean share of a token's experts, ids (N,K), that the final model gives it, too; of chance K/E."""
    return (ids[:, :, None] == final[:, None, :]).any(2).mean()


def coactivation(ids, experts):
    """(E,E): of the tokens with expert i the share that have j, NaN for i = j; of even routing (K-1)/(E-1)."""
    table = chosen(ids, experts).astype(np.float64)
    together = table.T @ table
    rates = together / np.maximum(1, np.diag(together))[:, None]
    np.fill_diagonal(rates, np.nan)
    return rates


def specialisation(copies):
    """copies (D,E) -> 0 if all domains use all experts alike, 1 if no two share an expert.

    The distance (total variation) of a domain's distribution over experts from the domains' mean, averaged over domains
    and divided by the most it can be, 1 - 1/D.
    """
    parts = copies / copies.sum(1, keepdims=True)
    distance = np.abs(parts - parts.mean(0)).sum(1).mean() / 2
    return distance / (1 - 1 / len(parts))


def specialisation_spread(copies, times=100, seed=0):
    """copies: an array (S,E) for each domain -> (index, its standard deviation, the index of chance).

    Whole sequences are drawn anew, since the tokens of one are not independent. Chance: the sequences shuffled among
    the domains, which shows what so little text looks like without any domain.
    """
    rng = np.random.default_rng(seed)
    pool, ends = np.concatenate(copies), np.cumsum([len(own) for own in copies])[:-1]
    drawn, shuffled = [], []
    for _ in range(times):
        drawn.append(index_of([own[rng.integers(len(own), size=len(own))] for own in copies]))
        shuffled.append(index_of(np.split(rng.permutation(pool), ends)))
    return index_of(copies), np.std(drawn), np.mean(shuffled)


def index_of(copies):
    return specialisation(np.stack([own.sum(0) for own in copies]))


def favourite_share(ids, tokens, experts, least=8):
    """Vocabulary specialisation: ids (N,K) of tokens (N,) -> how much of a token id's routing has its favourite expert.

    Of each id that occurs `least` times or more, the share of its occurrences that have the favourite among their K; a
    mean over such ids, NaN without any.
    """
    _, kind, occurrences = np.unique(tokens, return_inverse=True, return_counts=True)
    copies = np.zeros((len(occurrences), experts))
    np.add.at(copies, (kind[:, None], ids), 1)
    often = occurrences >= least
    return (copies.max(1)[often] / occurrences[often]).mean() if often.any() else math.nan


def max_vio(copies):
    """(...,E) -> load of the busiest expert over the mean, minus 1 (2408.15664)."""
    return copies.max(-1) / np.maximum(copies.mean(-1), 1e-9) - 1


def entropy(scores):
    """scores (N,E) -> mean entropy of a token's scores, divided by their sum, as a share of log E, its most."""
    p = scores / scores.sum(1, keepdims=True)
    nats = -(p * np.log(np.maximum(p, 1e-30))).sum(1).mean()
    return nats / max(math.log(scores.shape[1]), 1e-9)


def best_experts(ids, experts, share=0.25):
    """ids (N,K) -> (E,) bool: the share of all experts that these tokens use most, K at least."""
    keep = max(ids.shape[1], math.ceil(share * experts))
    best = np.argsort(-expert_shares(ids, experts), kind="stable")[:keep]
    return np.isin(np.arange(experts), best)


def spikes(values, window=50, factor=3.0, least=5):
    """Indices of values above `factor` times the median of the `window` before them, of which there must be `least`."""
    found = []
    for i, value in enumerate(values):
        before = values[max(0, i - window):i]
        if len(before) >= least and value > factor * np.median(before):
            found.append(i)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder


class Missing(Exception):
    """Why a run has no numbers for a picture, in one line; empty where it is said elsewhere, or goes without saying."""


@dataclass
class Run:
    name: str
    folder: Path
    stored: dict                           # of train.read_config
    config: Config
    lines: list                            # of metrics.jsonl
    loads: np.ndarray | None               # (steps, layers, E) of loads.npy
    notes: list                            # what is left out, and why
    absent: list = field(default_factory=list)     # curves without a number in metrics.jsonl but 0
    study: "Study | None" = None           # of its checkpoints

    @property
    def layers(self):
        """Names of the layers with experts."""
        c = self.config
        names = [f"{i} MTP" if i >= c.num_hidden_layers else f"{i}"
                 for i in range(c.num_hidden_layers + c.num_nextn_predict_layers)]
        return names[c.first_k_dense_replace:]

    def need_experts(self):
        if not self.layers:
            raise Missing

    def studied(self):
        if self.study is None or not self.study.ids:
            raise Missing
        return self.study


def read_run(folder):
    folder, notes = Path(folder), []
    stored = train.read_config(folder)
    lines, loads = read_lines(folder / "metrics.jsonl", notes), read_loads(folder / "loads.npy", notes)
    run = Run(folder.resolve().name, folder, stored, stored["config"], lines, loads, notes)
    if not run.layers:
        notes.append("no pictures of experts: the model has none")
    return run


def read_lines(path, notes):
    """The lines that are whole: of a run that goes on, or was killed, the last one may be cut."""
    lines, broken = [], 0
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            lines.append(dict(line, step=int(line["step"]), tokens=int(line["tokens"])))
        except (ValueError, TypeError, LookupError, OverflowError):
            broken += 1
    if broken:
        notes.append(f"metrics.jsonl: {broken} of {broken + len(lines)} lines are not whole and were left out")
    if not lines:
        notes.append("no curves: metrics.jsonl has no whole line yet")
    return lines


def read_loads(path, notes):
    """Without steps that were not recorded, which are zeros; None if there are no others."""
    if not path.exists():
        return None
    try:
        loads = np.load(path)
        loads = loads[loads.sum((1, 2)) > 0]
    except (OSError, ValueError, EOFError):
        notes.append("loads.npy is not whole, perhaps it is being written: loads are those of the domains' text")
        return None
    return loads if loads.size else None


# ---------------------------------------------------------------------------------------------------------------------
# Text of domains


def find_domains(given, characters):
    """{name: text of at most so many characters}: of Python's own library, and of words NAME=PATH."""
    files = [file.path for file in train.list_files([])]                  # of Python's library, in a fixed random order
    tables = [path for path in files if path.parent.name == "encodings" or path.match("html/entities.py")]
    code = [path for path in files if path.suffix == ".py" and path.parent.name not in ("encodings", "pydoc_data")]
    domains = dict(code=join(code, characters), prose=library_prose()[:characters], tables=join(tables, characters))
    for word in given:
        name, equals, path = word.partition("=")
        require(equals and name and Path(path).exists(), f"--domain {word}: write NAME=PATH, of a file or folder")
        domains[name] = join([file.path for file in train.list_files([f"text={path}"])], characters)
    return {name: text for name, text in domains.items() if text}


def library_prose():
    """The language reference, as pydoc prints it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:                                                   # left out of some small installations
        return ""
    return "\n\n".join(topics.values())


def join(files, characters):
    """Beginnings of files, each at most an eighth of the whole where there are eight, so that no file is the domain."""
    each, text = characters // min(8, max(1, len(files))), ""
    for path in files:
        if len(text) >= characters:
            break
        with open(path, errors="replace") as file:
            text += file.read(each) + "\n"
    return text[:characters]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints on text

NORMS = ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")


@dataclass
class Study:
    """What the newest checkpoint of a run, and those before it, do with the domains' text."""
    step: int
    experts: int
    gains: dict                            # norm -> lists over layers: mean and std now, mean at the first checkpoint
    tokens: dict = field(default_factory=dict)     # domain -> (S,T)
    ids: dict = field(default_factory=dict)        # domain -> (layers with experts, S, T, K)
    loss: dict = field(default_factory=dict)       # domain -> nats a token
    kept: dict = field(default_factory=dict)       # (domain, whose best quarter of experts is kept) -> nats a token
    past: list = field(default_factory=list)       # (step, saturation of each layer) of each checkpoint but the newest
    scores: list = field(default_factory=list)     # of each layer: a token's scores over their sum, falling; a mean
    entropy: list = field(default_factory=list)    # of each layer


def study_checkpoints(run, domains, tokens, device):
    """A Study of a run's checkpoints, with about so many tokens of each of domains {name: text}.

    Of a model without experts gains alone. ValueError or OSError if a checkpoint is damaged, or went meanwhile.
    """
    steps = parallel.steps_in(run.folder / "ckpt")
    require(steps, "there is no complete checkpoint yet")
    *earlier, newest = [str(run.folder / "ckpt" / f"step_{step}") for step in steps]
    model, encoding, _ = train.open_model(newest, device)
    oldest = open_earlier(run, earlier[0], device) if earlier else None
    study = Study(steps[-1], model.config.n_routed_experts, gains_by_depth(oldest or model, model))
    if not model.routers():
        return study
    length = min(256, model.config.max_position_embeddings)
    windows = {name: windows_of(encoding, text, length, tokens) for name, text in domains.items()}
    study.tokens = {name: own for name, own in windows.items() if len(own)}
    run.notes += [f"domain {name} is left out: it takes text of {length} tokens" for name in windows
                  if name not in study.tokens]
    if not study.tokens:
        return study
    tell = progress(run.name, 1 + len(study.tokens) + len(earlier))
    # 1. the newest checkpoint
    tell(f"checkpoint of step {steps[-1]} on text of {len(study.tokens)} domains")
    with noting_scores(model, study):
        study.loss, study.ids = route_all(model, study.tokens)
    # 2. the same with a quarter of its experts
    for owner, ids in study.ids.items():
        tell(f"the same with the quarter of its experts that {owner} uses most")
        with only(model, [best_experts(layer, study.experts) for layer in flat([ids])]):
            for name, loss in route_all(model, study.tokens)[0].items():
                study.kept[name, owner] = loss
    # 3. the past
    final = flat(study.ids.values())
    for step, checkpoint in zip(steps, earlier):
        tell(f"checkpoint of step {step}")
        before = open_earlier(run, checkpoint, device)
        if before:
            _, ids = route_all(before, study.tokens)
            study.past.append((step, [saturation(*layer) for layer in zip(flat(ids.values()), final)]))
    return study


def progress(name, parts):
    """-> a function to call before each part: it says what comes, and how long all that is left takes at this pace."""
    began, done = time.perf_counter(), 0

    def tell(what):
        nonlocal done
        left = f", {(time.perf_counter() - began) / done * (parts - done):.0f} s left" if done else ""
        done += 1
        print(f"{name}, {done} of {parts}: {what}{left}", flush=True)
    return tell


def open_earlier(run, checkpoint, device):
    """Its model; None if it is damaged, which the run's notes say, or if the run that goes on has deleted it meanwhile.
    """
    try:
        return train.open_model(checkpoint, device)[0]
    except (ValueError, OSError) as error:
        if Path(checkpoint).is_dir() and str(error) not in run.notes:
            run.notes.append(str(error))


def windows_of(encoding, text, length, tokens):
    """(S, length) tokens, about as many as wanted, none of a text that is too short."""
    ids = np.array(encoding.encode_ordinary(text)[:max(length, tokens)], np.int64)
    return ids[:len(ids) // length * length].reshape(-1, length)


def route_all(model, windows):
    """windows {domain: (S,T)} -> loss and ids as in Study."""
    routed = {name: route(model, own) for name, own in windows.items()}
    return {name: loss for name, (loss, _) in routed.items()}, {name: ids for name, (_, ids) in routed.items()}


@torch.no_grad()
def route(model, windows, at_once=8):
    """windows (S,T) -> (loss of the next token in nats, ids (layers, S, T, K))."""
    model.eval()
    device, losses, ids = next(model.parameters()).device, [], []
    for start in range(0, len(windows), at_once):
        batch = torch.from_numpy(windows[start:start + at_once]).to(device)
        routing = {}
        losses.append(model(batch, labels=batch, routing=routing).loss.item() * len(batch))
        ids.append(torch.stack([routing[layer] for layer in sorted(routing)]).cpu().numpy())
    return sum(losses) / len(windows), np.concatenate(ids, 1)


def flat(ids):
    """Arrays (layers, S, T, K) -> one (layers, N, K)."""
    return np.concatenate([own.reshape(len(own), -1, own.shape[-1]) for own in ids], 1)


@contextlib.contextmanager
def noting_scores(model, study):
    """What all routers score while inside; their means stand in the study afterwards."""
    noted, hooks = [], []
    for router in model.routers():
        rows = []                                                         # of each call: tokens, sorted scores, entropy

        def note(router, inputs, outputs, rows=rows):
            logits = F.linear(inputs[0].flatten(0, 1).to(router.weight.dtype), router.weight)
            scores = router.score(logits).double().cpu().numpy()
            falling = np.sort(scores / scores.sum(1, keepdims=True))[:, ::-1]
            rows.append((len(scores), falling.mean(0), entropy(scores)))
        hooks.append(router.register_forward_hook(note))
        noted.append(rows)
    yield
    for hook, rows in zip(hooks, noted):
        hook.remove()
        sizes, falling, entropies = zip(*rows)
        study.scores.append(np.average(falling, axis=0, weights=sizes))
        study.entropy.append(np.average(entropies, weights=sizes))


@contextlib.contextmanager
def only(model, keep):
    """While inside, routers choose among some experts alone; keep: (E,) bool for each layer with experts."""
    for router, own in zip(model.routers(), keep):
        out = torch.from_numpy(~own).to(router.weight.device)
        router.choose = lambda scores, choose=router.choose, out=out: choose(scores.masked_fill(out, -math.inf))
    yield
    for router in model.routers():
        del router.choose                                                 # the class's own is back


def gains_by_depth(oldest, model):
    """See Study; norm=pre has no post norms."""
    found = {}
    for name in NORMS:
        norms = [(getattr(was, name), getattr(now, name))
                 for was, now in zip(oldest.layers.values(), model.layers.values())]
        if hasattr(norms[0][0], "weight"):
            found[name] = dict(mean=[now.weight.mean().item() for _, now in norms],
                               std=[now.weight.std(correction=0).item() for _, now in norms],
                               first=[was.weight.mean().item() for was, _ in norms])
    return found
