"""
Trains a model of model.py on text: data, tokenizer, phases, one visible loop, checkpoints, logs.

    python train.py                                        # pre-trains `tiny` on real text, on whatever device is there
    python train.py pretrain --preset small --data DIR_OR_FILES --out runs/a --steps 2000 --set aux_loss_alpha=0.001
    python train.py pretrain --resume runs/a               # continues exactly
    torchrun --nproc-per-node 4 train.py --ep 4 --node-size 2 --dispatch hierarchical   # --resume may take another plan
    python train.py sample --init runs/a --prompt "def "

In this order: settings, tokenizer, data, phases, data order, one step, held-out text, the run's folder, the loop, the
commands. Everything that a step needs is a function of (settings, tokens seen so far): which phase, how many sequences,
which learning rate, which windows of text. So a resumed run is the same run.

A run's folder holds config.json, metrics.jsonl (a line a step), tokenizer.tiktoken, ckpt/step_N, sample.txt and, with
--record-loads 1, loads.npy, which `sim.py predict --load` reads. The tokens of a corpus lie beside the runs, in
data-HASH: HASH is of the files' names, sizes and times and of the tokenizer.
"""
import argparse
import base64
import collections
import dataclasses
import fcntl
import gzip
import hashlib
import heapq
import itertools
import json
import lzma
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch

import parallel
import sim
from model import PRESETS, Config, Model, count_params, flops_per_token, generate
from sim import Plan, balance_group, check_plan

# ---------------------------------------------------------------------------------------------------------------------
# Settings

OPTIONS = dict(
    # name: (default, help). A default that is a list takes several values; None means "not given".
    # model
    preset=("tiny", f"one of {', '.join(PRESETS)}"),
    set=([], "KEY=VALUE of Config, e.g. aux_loss_alpha=0.001 rope_theta=1e5"),
    # data
    data=([], "files or folders, each may be NAME=PATH for the mix of a phase; default: Python's own standard library"),
    text_field=("text", "key of the text in a .jsonl line"),
    tokenizer=("learn", "learn (from the training text) | gpt2 | cl100k_base | o200k_base | FILE.tiktoken"),
    heldout=(0.02, "share of the documents held out, at most 8 MiB of them"),
    document_mask=(0, "1: attention does not cross document boundaries"),
    # run
    record_loads=(0, "1: write loads.npy, the copies that each expert got: steps x layers x experts"),
    out=("", "the run's folder; default: runs/PRESET, or the first free runs/PRESET-N"),
    resume=("", "a run's folder or one of its ckpt/step_N: continue exactly"),
    seed=(0, "of weights and data order"),
    device=("auto", "auto | cpu | cuda | npu"),
    threads=(0, "CPU threads; 0: torch's choice, stored with the run"),
    save_every=(500, "steps between checkpoints; one is always written at the end"),
    keep=(3, "newest checkpoints kept"),
    eval_every=(0, "steps between evaluations on the whole held-out text; 0: at the end only"),
    timeout=(45, "seconds in a collective until a rank that does not answer counts as lost and the run ends"),
    max_skips=(5, "steps in a row with a loss or gradient that is not finite, before the run stops"),
    fit=("", "e.g. 40GiB: recompute and swap what makes the run fit at the least simulated cost; stored with the run"),
    hardware=("", "preset of sim.py or file of its calibrate, for --fit; default on a CPU: generic numbers"),
    memory_report=(0, "1: what the first micro-batch keeps for backward, by part: measured, and as sim.py counts"),
    peak_tflops=(0.0, "peak of the device in TFLOP/s, for MFU; 0: MFU is not reported"),
    # optimisation
    steps=(1000, "optimizer steps at the full batch; sets the tokens of the run"),
    tokens=(0.0, "tokens of the run, in place of --steps; published phases are scaled to it"),
    phases=("", "pangu-ultra | pangu-pro | FILE, a JSON list of objects with the keys of Phase in train.py"),
    lr=(3e-4, "highest learning rate"),
    min_lr=(0.1, "final learning rate as a share of --lr"),
    decay=("cosine", "cosine | constant: the learning rate after its warm-up"),
    warmup_steps=(0, "steps over which the learning rate rises, at the full batch"),
    batch_warmup=([], "SEQUENCES TOKENS: the batch grows linearly from SEQUENCES to --global-batch over TOKENS"),
    weight_decay=(0.1, "of every tensor, gains of norms included (as PU's figures of falling gains show)"),
    beta1=(0.9, "of AdamW"),
    beta2=(0.95, "of AdamW"),
    clip=(1.0, "the global gradient norm is cut to this"),
    precision=("auto", "auto (bf16 with fp32 master weights; fp32 on a CPU without bf16 matmuls) | fp32 | bf16"),
)
PLAN_DEFAULTS = dict(micro_batch=8, global_batch=32, seq_len=256)
PLAN_FIELDS = [field for field in dataclasses.fields(Plan) if field.name != "precision"]
RECIPES = dict(   # what a preset trains with, where the command line does not say; ours, not published
    tiny=dict(steps=680, lr=6e-3, min_lr=0.02, warmup_steps=30, seq_len=256, global_batch=12, micro_batch=12),
    small=dict(steps=10000, lr=6e-4, warmup_steps=500, seq_len=2048, global_batch=64, micro_batch=8),
)
# what --resume lets one change; with --data the text must be the same
CHANGEABLE = {"out", "data", "steps", "tokens", "save_every", "keep", "eval_every", "device", "threads", "peak_tflops",
              "max_skips", "timeout", "record_loads", "fit", "hardware", "memory_report"}
CHANGEABLE |= {field.name for field in PLAN_FIELDS} - {"global_batch", "seq_len"}


class UserError(ValueError):
    """What a user typed or gave, in one line that says what to do."""


def add_options(parser, options):
    for name, (default, text) in options.items():
        kind = str if isinstance(default, list) else type(default)
        shown = "" if default in ([], "") else f" (default {default})"
        several = dict(nargs="+", action="extend") if isinstance(default, list) else {}    # --set a=1 --set b=2 is both
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=argparse.SUPPRESS, help=text + shown,
                            **several)


def add_plan(parser):
    plan = parser.add_argument_group("plan", "how the model is cut and run: see Plan in sim.py")
    for field in PLAN_FIELDS:
        kind = str if field.type is tuple else field.type
        plan.add_argument("--" + field.name.replace("_", "-"), type=kind, default=argparse.SUPPRESS)


def settings_of(given):
    """All settings: what was given, else the preset's recipe, else the default."""
    recipe = RECIPES.get(given.get("preset", "tiny"), {})
    plan = {field.name: field.default for field in PLAN_FIELDS}
    defaults = {name: default for name, (default, _) in OPTIONS.items()} | plan | PLAN_DEFAULTS | recipe
    return fit_to_world(defaults | given, given)


def fit_to_world(settings, given):
    """Where they are not given, dp takes what processes there are, and a micro-batch is no more than a rank's share."""
    if "dp" not in given:
        settings["dp"] = max(1, parallel.world_size() // (settings["pp"] * settings["cp"] * settings["tp"]))
    if "micro_batch" not in given:
        share = max(1, settings["global_batch"] // settings["dp"])
        settings["micro_batch"] = max(n for n in range(1, settings["micro_batch"] + 1) if share % n == 0)
    return settings


def read_value(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def make_config(settings):
    if settings["preset"] not in PRESETS:
        raise UserError(f"unknown preset {settings['preset']!r}: use one of {', '.join(PRESETS)}")
    names = [field.name for field in dataclasses.fields(Config)]
    changes = {}
    for pair in settings["set"]:
        key, equals, value = pair.partition("=")
        if key not in names or not equals:
            raise UserError(f"--set {pair}: write KEY=VALUE with a key of {', '.join(names)}")
        changes[key] = read_value(value)
    return replace(PRESETS[settings["preset"]], **changes)


def make_plan(settings):
    values = {field.name: settings[field.name] for field in PLAN_FIELDS}
    for field in PLAN_FIELDS:
        if field.type is tuple and isinstance(values[field.name], str):
            values[field.name] = sim.plan_value(field.name, values[field.name])
    return Plan(**values, precision=settings["precision"])


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE, always run by tiktoken

# Words for BPE, in cl100k_base's manner: letters with one sign before them, up to 3 digits, signs, line ends, spaces.
PATTERN = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
END = "<|endoftext|>"
LEARN_FROM = 16 << 20                      # characters of training text that a vocabulary is learnt from


def learn_bpe(texts, vocab_size):
    """Byte-level BPE -> {bytes: rank}, vocab_size - 1 of them (the last id is END's).

    Repeatedly merges the most frequent pair of neighbours inside words. Words are counted once; a merge visits only the
    words that hold its pair, and a heap with stale entries finds the next one.
    """
    counts = collections.Counter()
    for text in texts:
        counts.update(regex.findall(PATTERN, text))
    words = [([*word.encode()], n) for word, n in sorted(counts.items())]
    pair_counts, words_with = collections.Counter(), collections.defaultdict(set)
    for index, (word, n) in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += n
            words_with[pair].add(index)
    heap = [(-n, pair) for pair, n in pair_counts.items()]
    heapq.heapify(heap)
    vocabulary = [bytes([i]) for i in range(256)]
    known = set(vocabulary)
    while heap and len(vocabulary) < vocab_size - 1:
        n, pair = heapq.heappop(heap)
        if -n != pair_counts[pair] or n == 0:
            continue                                                      # stale: the count has changed since
        merged = vocabulary[pair[0]] + vocabulary[pair[1]]
        if merged in known:
            continue                                                      # the same bytes by another way
        known.add(merged)
        changed = merge_pair(words, words_with.pop(pair), pair, len(vocabulary), pair_counts, words_with)
        vocabulary.append(merged)
        for other in changed:
            heapq.heappush(heap, (-pair_counts[other], other))
    return {token: rank for rank, token in enumerate(vocabulary)}


def merge_pair(words, indices, pair, new, pair_counts, words_with):
    """Replaces pair by the id new in the words of these indices -> pairs whose counts changed."""
    changed = set()
    for index in indices:
        word, n = words[index]
        for old in zip(word, word[1:]):
            pair_counts[old] -= n
            changed.add(old)
        merged, i = [], 0
        while i < len(word):
            is_pair = word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]
            merged.append(new if is_pair else word[i])
            i += 2 if is_pair else 1
        words[index] = (merged, n)
        for made in zip(merged, merged[1:]):
            pair_counts[made] += n
            words_with[made].add(index)
            changed.add(made)
    return sorted(changed)


def make_encoding(ranks, pattern=PATTERN, end=None):
    """{bytes: rank} -> tiktoken.Encoding; the id after the last rank is END's."""
    special = {END: len(ranks) if end is None else end}
    return tiktoken.Encoding("learnt", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def save_encoding(encoding, path):
    """tiktoken's own file format: a line of base64 and rank a token."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    write_whole(path, "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks))


def load_encoding(path, pattern=PATTERN, end=None):
    try:
        pairs = (line.split() for line in Path(path).read_bytes().splitlines())
        return make_encoding({base64.b64decode(token): int(rank) for token, rank in pairs}, pattern, end=end)
    except (OSError, ValueError):
        raise UserError(f"--tokenizer {path}: no tiktoken file here; use learn, gpt2, cl100k_base, o200k_base or a "
                        f"file of base64 and rank a line") from None


def named_encoding(name):
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:                                            # requests', or the socket's own
        raise UserError(f"--tokenizer {name}: its vocabulary is not on this machine and could not be downloaded "
                        f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has it, or use learn"
                        ) from None


def encode_bytes(encoding, data):
    """Tokens of any bytes; decode_bytes gives back exactly these. What is not UTF-8 becomes tokens of single bytes."""
    try:
        return encoding.encode_ordinary(data.decode())
    except UnicodeDecodeError as error:
        single = [encoding.encode_single_token(data[i:i + 1]) for i in range(error.start, error.end)]
        return encoding.encode_ordinary(data[:error.start].decode()) + single + encode_bytes(encoding, data[error.end:])


# ---------------------------------------------------------------------------------------------------------------------
# Data: files -> pieces -> tokens, in one memory-mapped file for each source and one for the held-out text

TEXT_SUFFIXES = tuple(".txt .md .rst .py .pyi .c .h .cc .cpp .hpp .java .js .ts .go .rs .rb .sh .sql .tex .html .css "
                      ".jsonl .jsonl.gz".split())
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", ".git"}
PIECE = 1 << 16                            # characters, or tokens, that are read and encoded at a time
HELDOUT_BYTES = 8 << 20

TextFile = collections.namedtuple("TextFile", "source name path")         # source: for a mix; name: the relative path


def list_files(data):
    """--data -> TextFiles in the order of a hash of their names, so that any part of the corpus is a fair sample."""
    files = []
    for spec in data or [sysconfig.get_path("stdlib")]:
        source, equals, path = spec.partition("=")
        source, path = (source, Path(path)) if equals and not Path(spec).exists() else ("text", Path(spec))
        if not path.exists():
            raise UserError(f"--data {path}: no such file or folder")
        found = sorted(walk(path)) if path.is_dir() else [path]
        if not found:
            raise UserError(f"--data {path}: this folder has no text; what is read there: {' '.join(TEXT_SUFFIXES)}")
        root = path if path.is_dir() else path.parent
        files += [TextFile(source, str(file.relative_to(root)), file) for file in found]
    return sorted(files, key=lambda file: (share_of(file.name), file.name))


def walk(folder):
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        yield from (Path(here, name) for name in names if name.endswith(TEXT_SUFFIXES))


def share_of(name):
    """A number in [0, 1) that only the name decides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def read_text(path):
    """(piece, whether it ends the document), cut at ends of lines where there are any."""
    with open(path, encoding="utf-8", newline="") as lines:
        piece = lines.read(PIECE) + lines.readline(PIECE)
        while piece:
            following = lines.read(PIECE) + lines.readline(PIECE)
            if "\0" in piece:
                raise UserError(f"{path} is not text, it holds zero bytes: leave it out of --data")
            yield piece, not following
            piece = following


def read_jsonl(path, field):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}); mend or remove the line") from None
            except (KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise UserError(f"{path}, line {number}: no text under {field!r}; name the right key with --text-field")
            yield text, True


def read_bin(path, encoding):
    """Token ids, 16 bit or, for a vocabulary above 65536, 32 bit. Documents end where END stands."""
    ids = np.memmap(path, dtype=dtype_for(encoding), mode="r")
    for start in range(0, len(ids), PIECE):
        piece = ids[start:start + PIECE].tolist()
        if max(piece) >= encoding.n_vocab:
            raise UserError(f"{path} holds id {max(piece)}, the tokenizer has {encoding.n_vocab}: name the one that "
                            f"made the file with --tokenizer")
        yield piece, False


def dtype_for(encoding):
    return np.uint16 if encoding.n_vocab <= 1 << 16 else np.uint32


def pieces_of(files, settings, encoding=None):
    """All text as (file, held out, piece, ends document).

    Held out is a file by the hash of its path, or, where there are few files, every n-th piece.
    """
    size = sum(file.path.stat().st_size for file in files)
    share = min(settings["heldout"], HELDOUT_BYTES / max(1, size))
    by_path, number = len(files) * share >= 5, itertools.count()
    for file in files:
        if file.path.suffix == ".bin" and encoding is None:
            raise UserError(f"{file.path} holds tokens: name the tokenizer that made them with --tokenizer")
        is_jsonl = file.name.endswith((".jsonl", ".jsonl.gz"))
        pieces = (read_jsonl(file.path, settings["text_field"]) if is_jsonl else
                  read_bin(file.path, encoding) if file.path.suffix == ".bin" else read_text(file.path))
        try:
            for piece, ends in pieces:
                heldout = share_of(file.name) < share if by_path else next(number) % round(1 / share) == 1
                yield file, heldout, piece, ends
        except UnicodeDecodeError as error:
            raise UserError(f"{file.path} is not UTF-8 text ({error.reason}): leave it out of --data") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{file.path} is not a whole gzip file ({error}): copy it again") from None


@dataclass
class Corpus:
    encoding: tiktoken.Encoding
    end: int                               # END's id
    train: dict                            # source -> tokens, memory-mapped
    heldout: np.ndarray
    facts: dict                            # hash, bytes and token counts, what gzip and xz need for the held-out bytes


def prepare(settings, vocab_size, parent):
    """Corpus of --data under --tokenizer, tokenised once into parent/data-HASH."""
    files = list_files(settings["data"])
    stats = [(file.source, file.name, file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in files]
    name = settings["tokenizer"]
    find = named_encoding if name in tiktoken.list_encoding_names() else load_encoding
    encoding = None if name == "learn" else find(name)
    tokenizer = vocab_size if encoding is None else (sorted(encoding._mergeable_ranks.items()), encoding._pat_str)
    identity = repr((stats, tokenizer, settings["heldout"], settings["text_field"]))
    cache = Path(parent) / f"data-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if not cache.exists():
        unfinished = Path(f"{cache}.{os.getpid()}.tmp")
        try:
            tokenise(files, settings, encoding or learn_encoding(files, settings, vocab_size), unfinished)
            unfinished.rename(cache)
        except OSError:
            if not cache.exists():                                        # else another run was faster: its is as good
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    facts = json.loads((cache / "facts.json").read_text())
    arrays = {split: np.memmap(cache / f"{split}.bin", dtype=facts["dtype"], mode="r") for split in facts["tokens"]}
    heldout = arrays.pop("heldout")
    encoding = load_encoding(cache / "tokenizer.tiktoken", facts["pattern"], facts["end"])
    return Corpus(encoding, facts["end"], arrays, heldout, facts)


def learn_encoding(files, settings, vocab_size):
    """From the first part of the training text."""
    def texts():
        left = LEARN_FROM
        for _, heldout, piece, _ in pieces_of(files, settings):
            if not heldout and left > 0:
                left -= len(piece)
                yield piece
            elif left <= 0:
                return
    print(f"learning a vocabulary of {vocab_size} tokens", flush=True)
    return make_encoding(learn_bpe(texts(), vocab_size))


def tokenise(files, settings, encoding, folder):
    """Reads everything once, few pieces at a time, and writes tokens and facts into folder."""
    folder.mkdir(parents=True)
    end, dtype = encoding.encode_single_token(END), np.dtype(dtype_for(encoding))
    writers = {split: open(folder / f"{split}.bin", "wb") for split in {"heldout", *(file.source for file in files)}}
    for writer in writers.values():
        writer.write(np.array([end], dtype).tobytes())                    # so that the first token is predicted too
    hasher, sizes = hashlib.sha256(), collections.Counter(train_bytes=0, heldout_bytes=0)
    packers = dict(gzip=zlib.compressobj(9, wbits=31), xz=lzma.LZMACompressor(preset=9))
    for file, heldout, raw, tokens in encoded(files, settings, encoding, end):
        hasher.update(f"\0{file.source}\0{file.name}\0".encode() + raw)
        sizes["heldout_bytes" if heldout else "train_bytes"] += len(raw)
        for name, packer in packers.items() if heldout else ():
            sizes[name] += len(packer.compress(raw))
        writers["heldout" if heldout else file.source].write(tokens.astype(dtype).tobytes())
    for name, packer in packers.items():
        sizes[name] += len(packer.flush())
    counts = {split: writer.tell() // dtype.itemsize for split, writer in writers.items()}
    for writer in writers.values():
        writer.close()
    save_encoding(encoding, folder / "tokenizer.tiktoken")
    facts = dict(sha256=hasher.hexdigest(), files=len(files), tokens=counts, dtype=dtype.name, end=end,
                 pattern=encoding._pat_str)
    write_whole(folder / "facts.json", json.dumps(facts | sizes, indent=1))


def encoded(files, settings, encoding, end):
    """(file, held out, bytes, tokens) in order. Threads encode: tiktoken lets go of the interpreter. Shows progress."""
    def encode(item):
        _, _, piece, ends = item
        tokens = encoding.encode_ordinary(piece) if isinstance(piece, str) else piece
        raw = piece.encode() if isinstance(piece, str) else encoding.decode_bytes(piece)
        return raw, np.array([*tokens, end] if ends else tokens, np.uint32)

    workers, pieces = len(os.sched_getaffinity(0)), pieces_of(files, settings, encoding)
    total, done = sum(file.path.stat().st_size for file in files), 0
    began = shown = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        while some := list(itertools.islice(pieces, 8 * workers)):
            for (file, heldout, *_), (raw, tokens) in zip(some, pool.map(encode, some)):
                done += len(raw)
                yield file, heldout, raw, tokens
            if time.monotonic() - shown > 2:
                shown, rate = time.monotonic(), done / (time.monotonic() - began)
                print(f"tokenising: {done / 1e6:.0f} of {total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, "
                      f"{clock(max(0, total - done) / rate)} left", flush=True)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def write_whole(path, text):
    """All of a file or nothing of it."""
    unfinished = Path(f"{path}.tmp")
    unfinished.write_text(text)
    unfinished.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Phases: what is trained on, how long, how fast. Everything is a function of the tokens seen so far.


@dataclass(frozen=True)
class Phase:
    tokens: float
    seq_len: int
    global_batch: int | list               # sequences a step, or [[from this token of the phase, sequences], ...]
    lr: float
    min_lr: float                          # reached at the phase's end
    decay: str = "cosine"                  # cosine | constant
    warmup_tokens: float = 0
    rope_theta: float | None = None        # None: the config's
    mix: dict | None = None                # source -> share of the sequences; None: by size

    @property
    def batches(self):
        return self.global_batch if isinstance(self.global_batch, list) else [[0, self.global_batch]]

    def batch(self, tokens):
        """Sequences of the step that starts at this token of the phase."""
        return [sequences for start, sequences in self.batches if start <= tokens][-1]

    def learning_rate(self, tokens):
        """Of the step that ends at this token of the phase."""
        if tokens < self.warmup_tokens:
            return self.lr * tokens / self.warmup_tokens
        if self.decay == "constant":
            return self.lr
        done = min(1, tokens / self.tokens)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * done)) / 2


def mix(english, chinese, multilingual, instruction, math, code):
    return {name: share / 100 for name, share in locals().items()}


GENERAL, REASONING, ANNEALING = mix(54, 13, 8, 2, 6, 17), mix(14, 6, 4, 11, 28, 37), mix(21, 20, 3, 20, 18, 18)
PUBLISHED_PHASES = {   # sister models' schedules, stand-ins for what the paper does not publish
    # Pangu Ultra 135B, arXiv:2504.07866. Assumed by us: batches count sequences, phase 3 falls along a cosine, and the
    # two long-context phases halve the 0.4T of annealing.
    "pangu-ultra": [
        Phase(7.4e12, 4096, [[0, 1024], [1.2e12, 1536], [1.9e12, 2048]], 1e-4, 1e-5, "cosine", 4000 * 1024 * 4096, 1e4,
              GENERAL),
        Phase(4.6e12, 4096, 2048, 1e-5, 1e-5, "constant", 0, 1e4, GENERAL),
        Phase(0.8e12, 8192, 1536, 1e-5, 7.5e-6, "cosine", 0, 1e5, REASONING),
        Phase(0.2e12, 32768, 384, 7.5e-6, 7.5e-6, "constant", 0, 1.6e6, ANNEALING),
        Phase(0.2e12, 131072, 96, 7.5e-6, 7.5e-6, "constant", 0, 2.56e7, ANNEALING)],
    # Pangu Pro MoE 72B, arXiv:2505.21411: batches of 4M and 16M tokens; warm-up not published
    "pangu-pro": [
        Phase(9.6e12, 4096, 1024, 3e-4, 3e-5),
        Phase(3e12, 32768, 512, 3e-5, 1e-5),
        Phase(0.4e12, 32768, 512, 1e-5, 1e-7)],
}


def make_phases(settings, given):
    """The phases; a published schedule's tokens, largest batch, first length and first rate become those given."""
    batch, seq_len = settings["global_batch"], settings["seq_len"]
    step = batch * seq_len
    single = dict(tokens=settings["tokens"] or settings["steps"] * step, seq_len=seq_len,
                  global_batch=batch_ramp(settings), lr=settings["lr"], min_lr=settings["lr"] * settings["min_lr"],
                  decay=settings["decay"], warmup_tokens=settings["warmup_steps"] * step)
    if not settings["phases"]:
        return [Phase(**single)]
    if settings["phases"] in PUBLISHED_PHASES:
        return scaled(PUBLISHED_PHASES[settings["phases"]], given, settings["micro_batch"] * settings["dp"])
    try:
        return [Phase(**(single | row)) for row in json.loads(Path(settings["phases"]).read_text())]
    except OSError:
        raise UserError(f"--phases {settings['phases']}: no such file; use {', '.join(PUBLISHED_PHASES)} or a file"
                        ) from None
    except (ValueError, TypeError) as error:
        names = ", ".join(field.name for field in dataclasses.fields(Phase))
        raise UserError(f"--phases {settings['phases']}: {error}; write a JSON list of objects with {names}") from None


def batch_ramp(settings):
    """--batch-warmup as [[from token, sequences], ...], rising by a micro-batch at a time."""
    if not settings["batch_warmup"]:
        return settings["global_batch"]
    try:
        start, over = (int(float(value)) for value in settings["batch_warmup"])
    except ValueError:
        raise UserError("--batch-warmup takes two numbers: the first batch in sequences, and tokens") from None
    once = settings["micro_batch"] * settings["dp"]
    sizes = [*range(start, settings["global_batch"], once), settings["global_batch"]]
    return [[over * i / max(1, len(sizes) - 1), size] for i, size in enumerate(sizes)]


def scaled(phases, given, micro_batch):
    first = phases[0]
    tokens = given["tokens"] / sum(phase.tokens for phase in phases) if given.get("tokens") else 1
    length = given.get("seq_len", first.seq_len) / first.seq_len
    batch = given.get("global_batch", first.batches[-1][1]) / first.batches[-1][1]
    rate = given.get("lr", first.lr) / first.lr
    return [replace(phase, tokens=phase.tokens * tokens, warmup_tokens=phase.warmup_tokens * tokens,
                    seq_len=int(phase.seq_len * length), lr=phase.lr * rate, min_lr=phase.min_lr * rate,
                    global_batch=[[start * tokens, max(1, round(n * batch / micro_batch)) * micro_batch]
                                  for start, n in phase.batches])
            for phase in phases]


# ---------------------------------------------------------------------------------------------------------------------
# Data order: a function of (seed, sample number)


def shuffled(index, n, seed):
    """Where a seeded shuffle of range(n) puts index, without a table: a Feistel network, walked until it is below n."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for step in range(4):
            key = hashlib.blake2b(f"{right},{step},{seed}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(key, "big") & mask)
        index = left << half | right
        if index < n:
            return index


class Order:
    """Which windows of text make the samples of a phase. No token is read twice in an epoch of its source.

    Each source's tokens are cut into windows of seq_len, shuffled anew each epoch. A phase goes on where the one before
    it stood; one of another length or mix cuts and shuffles anew, so there the epoch is a fresh one.
    """

    def __init__(self, corpus, phase, lookahead, seed):
        self.train, self.seq_len, self.span = corpus.train, phase.seq_len, phase.seq_len + lookahead
        self.seed = f"{seed},{phase.seq_len}"
        self.pattern = mix_pattern(corpus, phase, seed)
        for source in set(self.pattern):
            if len(self.train[source]) < self.span:
                raise UserError(f"the training text of {source!r} has {len(self.train[source])} tokens, one sequence "
                                f"needs {self.span}: give more text or a shorter --seq-len")

    def window(self, sample):
        """(seq_len + lookahead,) tokens."""
        block, place = divmod(sample, len(self.pattern))
        source = self.pattern[place]
        number = block * self.pattern.count(source) + self.pattern[:place].count(source)   # among the source's own
        n_windows = (len(self.train[source]) - self.span) // self.seq_len + 1
        epoch, index = divmod(number, n_windows)
        start = shuffled(index, n_windows, f"{self.seed},{source},{epoch}") * self.seq_len
        return self.train[source][start:start + self.span]

    def batch(self, tokens, count):
        """The samples that follow this many tokens: (count, seq_len + lookahead)."""
        first = tokens // self.seq_len
        return np.stack([self.window(first + i) for i in range(count)])


def mix_pattern(corpus, phase, seed):
    """Sources of a block of samples, in the shares of the phase's mix and in a fixed random order."""
    sizes = {source: len(tokens) for source, tokens in corpus.train.items()}
    if len(sizes) == 1:
        return list(sizes)                                                # one source: there is nothing to mix
    if phase.mix is not None and set(phase.mix) != set(sizes):
        raise UserError(f"a phase mixes {', '.join(phase.mix)}, but --data names {', '.join(sizes)}: write --data "
                        f"NAME=PATH for each")
    shares = phase.mix or {source: size / sum(sizes.values()) for source, size in sizes.items()}
    pattern = [source for source, share in sorted(shares.items()) for _ in range(max(1, round(1000 * share)))]
    return [pattern[i] for i in np.random.default_rng([seed, 1]).permutation(len(pattern))]


# ---------------------------------------------------------------------------------------------------------------------
# One step, and the held-out text


def examples(windows, depths, device, document_end=None):
    """Windows (B, T + depths) -> ids (B,T), targets (B, depths, T), doc_ids (B,T) or None: what Model.forward takes."""
    tokens = torch.from_numpy(windows.astype(np.int64)).to(device, non_blocking=True)
    T = tokens.size(1) - depths
    ids = tokens[:, :T]
    targets = torch.stack([tokens[:, 1 + d:1 + d + T] for d in range(depths)], 1)
    if document_end is None:
        return ids, targets, None
    ends = (ids == document_end).cumsum(1)
    return ids, targets, ends - (ids == document_end).long()              # END belongs to the document that it ends


# what a step returns; stop: ranks that were asked to
MEASURES = ("loss", "mtp_loss", "aux_loss", "grad_norm", "skipped", "max_vio", "drop_rate", "stop")


def own_samples(plan, size):
    """This rank's places in a global batch of that size.

    One micro-batch of all ranks is a run of neighbours: a balance group over ranks holds the same sequences as on one.
    """
    return np.arange(size).reshape(-1, plan.dp, plan.micro_batch)[:, parallel.data_rank(plan)].flatten()


def train_step(pipeline, optimizer, batch, clip, stop=False, watch=None):
    """One optimizer step on this rank's share of a global batch -> float32 tensor of MEASURES, those of all ranks.

    It is still on the device: nothing waits for it. stop: whether this rank was asked to. watch, if given, is called
    with the copies that went to each expert, (MoE layers, E), of all ranks.

    A loss or gradient that is not finite leaves weights and moments as they are: the optimizer is told by found_inf.
    """
    model, plan = pipeline.model, pipeline.plan
    ids, targets, doc_ids = batch
    ranks = plan.world_size // plan.dp                                    # that share the same samples
    loss_tokens = parallel.all_sum((targets != -100).sum((0, 2)).float()) / ranks
    model.aux_scale = plan.micro_batch / (len(ids) * plan.dp * plan.cp * plan.tp)
    parts = [slice(start, start + plan.micro_batch) for start in range(0, len(ids), plan.micro_batch)]
    out = pipeline.step([dict(ids=ids[part], targets=targets[part], doc_ids=None if doc_ids is None else doc_ids[part])
                         for part in parts], loss_tokens)
    stats = model.pop_stats()
    loads, own_layers = parallel.sum_loads(model, stats["loads"])         # (MoE layers, E)
    losses = torch.stack([out.loss, out.mtp_loss, out.aux_loss]).float()
    sums = parallel.all_sum(torch.stack([*losses, stats["dropped"].float(), losses.new_tensor(stop)]))
    norm = parallel.grad_norm(model, pipeline.grid).float()
    finite = torch.isfinite(norm) & torch.isfinite(sums).all()
    cut = (norm / clip).clamp(min=1)                                      # what clipping divides gradients by
    if parallel.fused_skips(ids.device):
        optimizer.found_inf, optimizer.grad_scale = (~finite).float(), cut
        optimizer.step()
    elif finite:                                                          # here the host waits
        torch._foreach_div_([parallel.local(p.grad) for p in model.parameters() if p.grad is not None], cut)
        optimizer.step()
    optimizer.zero_grad()
    model.update_router_bias(loads[own_layers] * finite)
    if watch:
        watch(loads)
    *losses, dropped, stop = sums
    loads = loads.float()
    max_vio = (loads.amax(1) / loads.mean(1).clamp(min=1) - 1).mean() if len(loads) else norm * 0
    return torch.stack([*losses, norm, (~finite).float(), max_vio, dropped / loads.sum().clamp(min=1), stop])


@torch.no_grad()
def evaluate(pipeline, corpus, document_end=None):
    """Held-out loss (nats a token) and bits per UTF-8 byte. Every token is predicted once, END included.

    Windows overlap by half and only their second half counts, so that each token sees at least half a window before it.
    """
    model, plan = pipeline.model, pipeline.plan
    device, depths = next(model.parameters()).device, 1 + model.config.num_nextn_predict_layers
    seq_len, batch, n = plan.seq_len, plan.micro_batch, len(corpus.heldout) - 1
    stride = max(1, seq_len // 2)
    if not n:
        return {}                                                         # one piece of text: nothing is held out
    starts = range(0, max(1, n - (seq_len - stride)), stride)
    padded = np.full(starts[-1] + plan.dp * batch * stride + seq_len + depths, -1, np.int64)
    padded[:n + 1] = corpus.heldout
    nats, began = 0.0, time.monotonic()
    shown = began
    model.eval()
    for i in range(0, len(starts), plan.dp * batch):
        i += parallel.data_rank(plan) * batch
        first = range(i * stride, (i + batch) * stride, stride)
        windows = np.stack([padded[start:start + seq_len + depths] for start in first])
        ids, targets, doc_ids = examples(windows, depths, device, document_end)
        counted = torch.full_like(targets, -100)                          # MTP's targets do not count
        counted[:, 0, seq_len - stride:] = targets[:, 0, seq_len - stride:]
        if i == 0:
            counted[0, 0] = targets[0, 0]
        counted[max(0, len(starts) - i):] = -100                          # past the end: there to keep the batch whole
        counted.masked_fill_(counted < 0, -100)
        one = torch.ones(depths, device=device)                           # a sum, not a mean
        windows = dict(ids=ids.clamp(min=0), targets=counted, doc_ids=doc_ids)
        nats += pipeline.step([windows], one, train=False).loss.item()
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            done = min(1, (i + batch) / len(starts))
            print(f"held-out: {done:.0%} read, {clock((shown - began) * (1 / done - 1))} left", flush=True)
    model.train()
    nats = parallel.all_sum(torch.tensor(nats, dtype=torch.float64)).item()
    return dict(val_loss=nats / n, val_bpb=nats / math.log(2) / corpus.facts["heldout_bytes"])


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder


def open_folder(run):
    """The run's folder, ours until the process ends."""
    settings = run.settings
    out = Path(settings["out"]) if settings["out"] else free_folder(settings["preset"])
    if parallel.steps_in(out / "ckpt") and not settings["resume"]:
        raise UserError(f"{out} already holds a run: --resume {out} continues it, another --out starts one")
    out.mkdir(parents=True, exist_ok=True)
    run.lock = open(out / ".lock", "w")
    try:
        fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{out} is in use by another run: wait for it, or choose another --out") from None
    return out


def free_folder(preset):
    number = 1
    while (out := Path("runs", preset if number == 1 else f"{preset}-{number}")).exists():
        number += 1
    return out


def find_checkpoint(resume, flag="--resume"):
    """A run's folder, or one of its checkpoints -> (run's folder, its newest complete checkpoint, or the named one)."""
    path = Path(resume)
    if path.name.startswith("step_"):
        if not path.is_dir():
            raise UserError(f"{flag} {resume}: no such checkpoint; complete ones: {parallel.steps_in(path.parent)}")
        return path.parent.parent, path
    steps = parallel.steps_in(path / "ckpt")
    if not steps:
        raise UserError(f"{flag} {resume}: no complete checkpoint in {path / 'ckpt'}; start the run anew with --out")
    return path, path / "ckpt" / f"step_{steps[-1]}"


def saved_config(run):
    try:
        return json.loads((Path(run) / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{run} has no readable config.json: it is no run's folder") from None


def resume_settings(given):
    """The stored settings of a run with what may be changed -> (settings, stored config.json, checkpoint)."""
    run, checkpoint = find_checkpoint(given["resume"])
    stored = saved_config(run)
    settings = stored["settings"]
    for name, value in given.items():
        if name not in CHANGEABLE | {"resume"} and value != settings.get(name):
            raise UserError(f"--{name.replace('_', '-')} {value}: the run in {run} has {settings.get(name)!r}, and "
                            f"resuming cannot change it; leave it away, or start a new run")
    return fit_to_world(settings | given | dict(out=str(run)), given), stored, checkpoint


def read_progress(checkpoint, progress):
    """Fills progress in place, once the files are found to be as they were written."""
    try:
        parallel.check_files(checkpoint)
    except parallel.CheckpointError as error:
        earlier = [step for step in parallel.steps_in(checkpoint.parent) if step < int(checkpoint.name[5:])]
        advice = f"go on from the one before it: --resume {checkpoint.parent / f'step_{earlier[-1]}'}" if earlier else \
                 "there is none before it: start a new run"
        raise UserError(f"{error}; {advice}") from None
    parallel.load_progress(checkpoint, progress)


def cut_metrics(path, step):
    """Leaves the lines up to this step; a line half written by a killed run goes too."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_whole(path, "".join(line + "\n" for line in kept))


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Stopper:
    """Ctrl-C and SIGTERM ask for an end after the step; asked twice, the process ends at once."""
    signals = signal.SIGINT, signal.SIGTERM

    def __init__(self):
        self.asked = None
        for number in self.signals:
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        print(f"{self.asked}: finishing this step, then writing a checkpoint", flush=True)


def open_run(given):
    """Everything that can be refused is refused here, before the first step; a plan, before any rank waits."""
    if parallel.is_restarted() and parallel.steps_in(Path(given.get("out", "")) / "ckpt"):
        given = given | dict(resume=given["out"])
    settings, stored, checkpoint = resume_settings(given) if given.get("resume") else (settings_of(given), None, None)
    device = parallel.pick_device(settings["device"])
    fix_automatic(settings, device)
    run = argparse.Namespace(settings=settings, device=device, checkpoint=checkpoint)
    run.config = Config(**stored["config"]) if stored else make_config(settings)
    run.plan = fit_plan(run, make_plan(settings)) if settings["fit"] else make_plan(settings)
    run.phases = make_phases(settings, stored["given"] | given if stored else given)
    for phase in run.phases:
        for _, batch in phase.batches:
            plan = replace(run.plan, seq_len=phase.seq_len, global_batch=batch)
            check_plan(run.config, plan, devices=parallel.world_size())
    parallel.join_world(device, timedelta(seconds=settings["timeout"]))
    run.out = parallel.first_does(lambda: open_folder(run))
    try:
        fill_run(run, given, stored)
    except BaseException:
        if parallel.rank() == 0:
            run.lock.close()
        raise
    return run


def fill_run(run, given, stored):
    """The part of open_run that needs the folder."""
    run.progress = dict(step=0, tokens=0, phase=0, phase_tokens=0, skipped=0, skipped_in_a_row=0,
                        placement=[], expert_load=[])                     # of live balance
    if run.checkpoint:
        read_progress(run.checkpoint, run.progress)
    parallel.first_does(lambda: prepare(run.settings, run.config.vocab_size, run.out.parent) and None)
    run.corpus = prepare(run.settings, run.config.vocab_size, run.out.parent)
    run.config = settle(run)
    for phase in run.phases:
        order_of(run, phase)
    parallel.first_does(lambda: continue_folder(run, stored) if stored else begin_folder(run, given))


def fit_plan(run, plan):
    """--fit: the plan with what is to be recomputed and swapped, also in the settings."""
    settings, match = run.settings, re.fullmatch(r"(\d+\.?\d*) ?(GiB|MiB)", run.settings["fit"])
    if not match:
        raise UserError(f"--fit {settings['fit']}: write a number and GiB or MiB, e.g. 40GiB")
    if not settings["hardware"] and run.device.type != "cpu":
        raise UserError(f"--fit needs --hardware on {run.device}: one of {', '.join(sim.HARDWARE)}, or a JSON file")
    hardware = sim.CPU
    if settings["hardware"]:
        hardware = sim.read_preset("hardware", sim.Hardware, sim.HARDWARE, settings["hardware"])
    sim.check_plan(run.config, plan, devices=parallel.world_size())
    found = sim.fit_memory(run.config, plan, hardware, float(match[1]) * 2**dict(GiB=30, MiB=20)[match[2]])
    plan = Plan(**found["plan"])
    settings.update(recompute=plan.recompute, swap=plan.swap, fit="")     # a resumed run does not choose again
    chosen = "+".join(plan.recompute + plan.swap) or "nothing"
    print(f"--fit {match[0]}: {chosen} is recomputed or swapped, so it needs {found['mem_gib']:.2f} GiB (simulated, "
          f"with the costs of {hardware.name})")
    return plan


def fix_automatic(settings, device):
    """What `auto` becomes is stored, and kept on resume."""
    if settings["precision"] == "auto":
        settings["precision"] = parallel.auto_precision(device)
    if settings["precision"] not in ("fp32", "bf16"):
        raise UserError(f"--precision {settings['precision']}: use auto, fp32 or bf16")
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    settings["threads"] = torch.get_num_threads()


def settle(run):
    """The config with what is known only now: a foreign vocabulary's size, and the sequences of a balance group."""
    config, needed = run.config, run.corpus.encoding.n_vocab
    if needed > config.vocab_size:
        config = replace(config, vocab_size=-(-needed // 64) * 64)
    return replace(config, balance_group=balance_group(config, run.plan))


def order_of(run, phase):
    return Order(run.corpus, phase, 1 + run.config.num_nextn_predict_layers, run.settings["seed"])


def begin_folder(run, given):
    """config.json and the tokenizer, before the first step."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    facts = dict(config=dataclasses.asdict(run.config), plan=dataclasses.asdict(run.plan), settings=run.settings,
                 given=given, phases=[dataclasses.asdict(phase) for phase in run.phases], corpus=run.corpus.facts,
                 device=str(run.device), python=platform.python_version(), torch=torch.__version__,
                 commit=git.stdout.strip())
    write_whole(run.out / "config.json", json.dumps(facts, indent=1))
    save_encoding(run.corpus.encoding, run.out / "tokenizer.tiktoken")
    write_whole(run.out / "metrics.jsonl", "")


def continue_folder(run, stored):
    """The same text as before; the log is cut back, and checkpoints later than the one resumed from are put aside."""
    now, before = run.corpus.facts["sha256"], stored["corpus"]["sha256"]
    if now != before:
        raise UserError(f"the text is not what {run.out} began with (sha256 {now[:12]}, was {before[:12]}): give the "
                        f"old text with --data, or start a new run")
    cut_metrics(run.out / "metrics.jsonl", run.progress["step"])
    for later in parallel.steps_in(run.out / "ckpt"):
        if later > run.progress["step"]:
            (run.out / "ckpt" / f"step_{later}").rename(run.out / "ckpt" / f"aside_{later}_{time.time():.0f}")


def build(run, phase, checkpoint):
    """This rank's part of the model and its optimizer for a phase, as the checkpoint left them or as initialised.

    A parallel.Pipeline, which holds the model, its plan and its grid, and the optimizer.
    """
    torch.manual_seed(run.settings["seed"])
    config = run.config if phase.rope_theta is None else replace(run.config, rope_theta=phase.rope_theta)
    with torch.device("meta"):
        model = Model(config)
    plan = replace(run.plan, seq_len=phase.seq_len)
    grid = parallel.parallelize(model, plan, run.device.type, timedelta(seconds=run.settings["timeout"]))
    model.to_empty(device=run.device)
    parallel.init_weights(model, run.settings["seed"])
    model.compute_dtype = torch.bfloat16 if run.settings["precision"] == "bf16" else None
    kind = parallel.HostAdamW if "optimizer" in plan.swap else torch.optim.AdamW
    optimizer = kind(parallel.param_groups(model), lr=0.0, eps=1e-8, fused=True,
                     betas=(run.settings["beta1"], run.settings["beta2"]), weight_decay=run.settings["weight_decay"])
    if checkpoint:
        parallel.restore(checkpoint, model, optimizer, run.progress, grid)
    if not plan.balance_live:
        run.progress.update(placement=[], expert_load=[])                 # would be out of date when it is turned on
    return parallel.Pipeline(model, plan, grid), optimizer


def pretrain(given):
    try:
        run = open_run(given)
    except ValueError as error:                                           # the model's or the plan's refusal
        raise UserError(error) from error
    settings, progress, phases, checkpoint = run.settings, run.progress, run.phases, run.checkpoint
    total, depths = sum(phase.tokens for phase in phases), 1 + run.config.num_nextn_predict_layers
    document_end = run.corpus.end if settings["document_mask"] else None
    introduce(run)
    stop, stopped = Stopper(), False
    saver = parallel.Saver(run.out / "ckpt", settings["keep"])
    # a line is written when it ends; rank 0 writes
    log = open(run.out / "metrics.jsonl" if parallel.rank() == 0 else os.devnull, "a", buffering=1)
    first_token, busy = progress["tokens"], 0.0                           # of this session; seconds in steps

    while not is_done(run) and not stopped:
        phase = phases[progress["phase"]]
        pipeline, optimizer = build(run, phase, checkpoint)
        model, plan, grid = pipeline.model, pipeline.plan, pipeline.grid
        order, flops = order_of(run, phase), flops_per_token(run.config, phase.seq_len)

        while progress["phase_tokens"] < phase.tokens and not stopped:
            # 1. the batch: how many sequences, which, at what rate
            began = time.perf_counter()
            size = phase.batch(progress["phase_tokens"])
            windows = order.batch(progress["tokens"], size)[own_samples(plan, size)]
            batch = examples(windows, depths, run.device, document_end)
            new_tokens = size * phase.seq_len
            progress["step"] += 1
            progress["tokens"] += new_tokens
            progress["phase_tokens"] += new_tokens
            lr = phase.learning_rate(progress["phase_tokens"])
            for group in optimizer.param_groups:
                group["lr"] = lr

            # 2. the step; tolist waits for the device, the only time
            loads, report = [], settings["memory_report"] and not pipeline.measured
            if report:
                pipeline.memory.watch(model)
            measures = train_step(pipeline, optimizer, batch, settings["clip"], stop.asked is not None, loads.append)
            line = dict(zip(MEASURES, measures.tolist()))
            line = dict(step=progress["step"], tokens=progress["tokens"], lr=lr) | line
            stopped = line.pop("stop") > 0                                # all ranks at the same step
            if report:
                print_memory(pipeline)
            count_skips(run, line)
            line |= watch_loads(run, grid, optimizer, *loads)

            # 3. the log; once in a while held-out text and checkpoint
            seconds = time.perf_counter() - began
            busy += seconds
            rate, peak = new_tokens / seconds, settings["peak_tflops"] * 1e12 * parallel.world_size()
            line |= dict(step_ms=seconds * 1e3, tokens_per_s=rate, mfu=rate * flops / peak if peak else None,
                         mem_gib=parallel.peak_memory(run.device) / 2**30)
            if is_done(run) or (settings["eval_every"] and progress["step"] % settings["eval_every"] == 0):
                line |= evaluate(pipeline, run.corpus, document_end)
            log.write(json.dumps(line) + "\n")
            print_step(run, line, total, busy * (total - progress["tokens"]) / (progress["tokens"] - first_token))
            saver.poll()
            if progress["step"] % settings["save_every"] == 0:
                parallel.save(saver, model, optimizer, progress, grid)

        # 4. the end of a phase or an early one: the next phase goes on from this checkpoint, in a model built for it
        if progress["phase_tokens"] >= phase.tokens and not is_done(run):
            progress.update(phase=progress["phase"] + 1, phase_tokens=0)
        parallel.save(saver, model, optimizer, progress, grid)
        saver.wait()
        checkpoint = run.out / "ckpt" / f"step_{progress['step']}"

    if parallel.rank() > 0:
        return
    if not is_done(run):
        print(f"stopped after step {progress['step']}; go on with: python train.py pretrain --resume {run.out}")
    else:
        text = continue_text(dict(init=str(checkpoint), prompt="def ", device=settings["device"]))
        write_whole(run.out / "sample.txt", text)
        print(f"a sample ({run.out / 'sample.txt'}; more: python train.py sample --init {run.out}):\n{text}")


def is_done(run):
    last = len(run.phases) - 1
    return run.progress["phase"] == last and run.progress["phase_tokens"] >= run.phases[last].tokens


def watch_loads(run, grid, optimizer, loads):
    """Record a step's loads (MoE layers, E), and let live balance see them and act: what the log tells of it."""
    if run.settings["record_loads"] and parallel.rank() == 0:
        record_loads(run.out / "loads.npy", run.progress["step"], loads.cpu().numpy().astype(np.int32))
    return grid.live.after_step(run.progress["step"], loads, optimizer) if grid and grid.live else {}


def record_loads(path, step, loads):
    """Put a step's loads into an array file (steps, layers, experts) and end it there; steps not recorded are zeros.

    The header says how many steps there are; numpy gives it the same length for any number.
    """
    path.touch()
    with open(path, "r+b") as file:
        header = dict(descr=loads.dtype.str, fortran_order=False, shape=(step, *loads.shape))
        np.lib.format.write_array_header_1_0(file, header)
        file.seek((step - 1) * loads.nbytes, os.SEEK_CUR)
        file.write(loads.tobytes())
        file.truncate()


def count_skips(run, line):
    progress, most = run.progress, run.settings["max_skips"]
    progress["skipped_in_a_row"] = progress["skipped_in_a_row"] + 1 if line["skipped"] else 0
    progress["skipped"] += int(line["skipped"])
    line["skipped"] = progress["skipped"]
    if progress["skipped_in_a_row"] >= most:
        steps = parallel.steps_in(run.out / "ckpt")
        where = f"start anew, or from {run.out / 'ckpt' / f'step_{steps[-1]}'}," if steps else "start anew"
        sys.exit(f"train.py: step {progress['step']}: loss or gradient not finite {most} times in a row; {where} with "
                 f"a lower --lr")


def print_memory(pipeline):
    """What the first forward of this rank's first stage left for backward."""
    pipeline.memory.kept, plan = None, pipeline.plan
    shape = replace(sim.as_shape(pipeline.model.config), value_padded=True)
    works = [sim.Work(shape, plan, kind) for kind in sim.stage_kinds(shape, plan)[pipeline.stages[0]]]
    counted, measured = sim.saved_by_part(works), pipeline.measured
    print("kept for backward, MiB of one micro-batch   measured   sim.py")
    for part in sorted(counted | measured):
        print(f"{part:40} {measured[part] / 2**20:11.3f} {counted[part] / 2**20:8.3f}")


def print_step(run, line, total, seconds_left):
    text = "step {step} ({share:.1%})  loss {loss:.4f}  mtp {mtp_loss:.4f}  aux {aux_loss:.4f}  norm {grad_norm:.2f}  "
    text += "lr {lr:.1e}  {step_ms:.0f} ms  {tokens_per_s:,.0f} tokens/s  {mem_gib:.2f} GiB  max_vio {max_vio:.2f}  "
    text += "left {left}"
    text += f"  MFU {line['mfu']:.1%} of {run.settings['peak_tflops']:g} TFLOP/s" if line["mfu"] else ""
    text += "  skipped {skipped}" if line["skipped"] else ""
    print(text.format(**line, share=min(1, line["tokens"] / total), left=clock(max(0, seconds_left))), flush=True)
    if "val_bpb" in line:
        facts = run.corpus.facts
        ours = line["val_bpb"] * facts["heldout_bytes"] / 8               # bytes that an arithmetic coder would need
        print(f"held-out: {line['val_bpb']:.4f} bits per byte, {ours / facts['xz']:.3f} of xz -9, "
              f"{ours / facts['gzip']:.3f} of gzip -9", flush=True)


def introduce(run):
    counts, facts, settings = count_params(run.config), run.corpus.facts, run.settings
    total, active, mtp = (f"{counts[part] / 1e6:.2f}M" for part in ("total", "active", "mtp"))
    print(f"{run.out}: {settings['preset']} on {run.device}, {settings['precision']}, {settings['threads']} threads; "
          f"{total} parameters, {active} active; MTP {mtp} more")
    print(f"text: {facts['files']} files, sha256 {facts['sha256'][:12]}, {facts['train_bytes']:,} bytes to train on, "
          f"{facts['heldout_bytes']:,} held out (gzip -9 {facts['gzip']:,}, xz -9 {facts['xz']:,}), tokens "
          f"{facts['tokens']}")
    for phase in run.phases:
        print(phase, flush=True)
    if run.checkpoint:
        print(f"resumed from {run.checkpoint}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Commands

SAMPLE_OPTIONS = dict(
    init=("", "the run's folder or one of its ckpt/step_N"),
    prompt=("", "text to continue; default: the beginning of a document"),
    new_tokens=(200, "tokens to write"),
    temperature=(0.8, "0: always the likeliest token"),
    top_k=(0, "choose among the k likeliest; 0: all"),
    top_p=(0.95, "choose among the likeliest that hold this probability together"),
    seed=(0, "of the choice"),
    device=("auto", "auto | cpu | cuda | npu"),
)


def sample(given):
    print(continue_text(given))


def continue_text(given):
    """The prompt, and what the model of a checkpoint writes after it. given: some of SAMPLE_OPTIONS."""
    settings = {name: default for name, (default, _) in SAMPLE_OPTIONS.items()} | given
    if not settings["init"]:
        raise UserError("sample needs --init RUN, a run's folder")
    run, checkpoint = find_checkpoint(settings["init"], "--init")
    device = parallel.pick_device(settings["device"])
    stored, progress = saved_config(run), dict(phase=0, phase_tokens=0)
    read_progress(checkpoint, progress)
    phase = stored["phases"][max(0, progress["phase"] - (progress["phase_tokens"] == 0))]
    config = Config(**stored["config"])
    config = replace(config, rope_theta=phase["rope_theta"] or config.rope_theta,
                     max_position_embeddings=phase["seq_len"])            # sees no more text than it was trained on
    model = Model(config).to(device)
    parallel.load_state(checkpoint, dict(model=model.state_dict()))
    end = stored["corpus"]["end"]
    encoding = load_encoding(run / "tokenizer.tiktoken", stored["corpus"]["pattern"], end)
    ids = torch.tensor([[end, *encode_bytes(encoding, os.fsencode(settings["prompt"]))]], device=device)
    how = {name: settings[name] for name in ("new_tokens", "temperature", "top_k", "top_p", "seed")}
    ids = generate(model, ids, **how)
    known = [i for i in ids[0, 1:].tolist() if i <= end]                  # the model may have more rows than tokens
    return encoding.decode_bytes(known).decode(errors="replace")


COMMANDS = dict(pretrain=(pretrain, OPTIONS, "train on text (the command that is meant if none is given)"),
                sample=(sample, SAMPLE_OPTIONS, "write text"))


def parse(argv):
    """-> (the command's function, dict of what was given)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, options, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        add_options(command, options)
        if name == "pretrain":
            add_plan(command)
    if not argv or argv[0] not in (*COMMANDS, "-h", "--help"):
        argv = ["pretrain", *argv]
    given = vars(parser.parse_args(argv))
    return COMMANDS[given.pop("command")][0], given


def main(argv=None):
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")   # DCP tells that there is one process
    if parallel.rank() > 0:
        sys.stdout = open(os.devnull, "w")                                # rank 0 speaks for all
    command, given = parse(sys.argv[1:] if argv is None else argv)
    handlers = [(number, signal.getsignal(number)) for number in Stopper.signals]
    try:
        command(given)
        parallel.leave_world()
    except (UserError, parallel.CheckpointError, OSError) as error:
        advice = "; make room, then --resume the run" if isinstance(error, parallel.SaveFailed) else ""
        if parallel.rank() == 0 or not isinstance(error, UserError):      # what was typed, all ranks refuse
            print(f"train.py: {error}{advice}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not parallel.is_lost_contact(error):
            raise
        sys.exit(f"train.py: rank {parallel.rank()} has lost contact; no sign of rank {parallel.missing_ranks()} "
                 f"({str(error).splitlines()[0]})")
    finally:
        for number, handler in handlers:                                  # a caller goes on with its own
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
