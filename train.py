"""
Trains a model of model.py on text: data, tokenizer, phases, one visible loop, checkpoints, logs.

    python train.py                                        # pre-trains `tiny` on real text, on whatever device is there
    python train.py pretrain --preset small --data DIR_OR_FILES --out runs/a --steps 2000 --set aux_loss_alpha=0.001
    python train.py pretrain --resume runs/a               # continues exactly
    torchrun --nproc-per-node 4 train.py --ep 4 --node-size 2 --dispatch hierarchical   # --resume may take another plan
    python train.py sample --init runs/a --prompt "def "

In this order: settings, tokenizer, files of text, corpus, phases, data order, one step,
held-out text, a run and how it is opened, the run's folder, the loop, log and screen, commands. Everything that a step
needs is a function of (settings, tokens seen so far): which phase, how many sequences, which learning rate, which
windows of text. So a resumed run is the same run.

A run's folder holds config.json, metrics.jsonl (a line a step), tokenizer.tiktoken, ckpt/step_N, sample.txt and, with
--record-loads 1, loads.npy, which `sim.py predict --load` reads. The tokens of a corpus lie beside the runs, in
data-HASH: HASH is of the files' names, sizes and times and of the tokenizer.
"""
import argparse
import base64
import collections
import contextlib
import dataclasses
import fcntl
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
import typing
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
from model import (PRESETS, Config, Model, check_setting, check_settings, compile_model, compile_operators,
                   count_params, flops_per_token, generate, require, setting)
from sim import Plan, balance_group, check_plan

# ---------------------------------------------------------------------------------------------------------------------
# Settings: kind and range of each stand where it is declared; model.check_setting checks them, wherever they come from


class UserError(ValueError):
    """What a user typed or gave, in one line that says what to do."""


@contextlib.contextmanager
def refusals(where=""):
    """What a setting, a model, a plan or a device refuses is what the user gave. where: the file it stands in."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{where}{error}") from error


# a setting that is not given keeps its default; a number that declares no range is above 0
class Option(typing.NamedTuple):
    """A setting. The type of its default is its kind; a list takes several words, a tuple is one of Plan's lists."""
    default: object
    text: str                              # for --help
    allowed: dict                          # least, most, choices: see model.check_setting


def option(default, text, **allowed):
    return Option(default, text, allowed)


OPTIONS = dict(
    # model
    preset=option("tiny", "size of the model", choices=tuple(PRESETS)),
    set=option([], "KEY=VALUE of Config, e.g. aux_loss_alpha=0.001 rope_theta=1e5"),
    # data
    data=option([], "files or folders, each may be NAME=PATH for the mix of a phase; default: Python's own standard "
                    "library"),
    text_field=option("text", "key of the text in a .jsonl line"),
    tokenizer=option("learn", "learn (from the training text) | gpt2 | cl100k_base | o200k_base | FILE.tiktoken"),
    heldout=option(0.02, "share of the text held out, at most 8 MiB: every n-th piece of up to 64 KiB, files in the "
                         "order of a hash of their names; 0: nothing", least=0, most=0.5),
    document_mask=option(0, "1: attention, and MTP, do not cross document boundaries", choices=(0, 1)),
    # run
    record_loads=option(0, "1: write loads.npy, the copies that each expert got: steps x layers x experts",
                        choices=(0, 1)),
    out=option("", "the run's folder; default: runs/PRESET, or the first free runs/PRESET-N"),
    resume=option("", "a run's folder or one of its ckpt/step_N: continue exactly"),
    seed=option(0, "of weights and data order", least=0, most=2**63 - 1),
    device=option("auto", "auto | cpu | cuda | npu"),
    threads=option(0, "CPU threads; 0: torch's choice, stored with the run", least=0, most=1024),
    save_every=option(500, "steps between checkpoints; one is always written at the end, 0: only that", least=0),
    keep=option(3, "newest checkpoints kept"),
    eval_every=option(0, "steps between evaluations on the whole held-out text; 0: at the end only. With "
                         "capacity_factor, padding of the last batch takes experts' room too", least=0),
    timeout=option(45, "seconds in a collective until a rank that does not answer counts as lost and the run ends",
                   least=1, most=10**6),
    max_skips=option(5, "steps in a row with a loss or gradient that is not finite, before the run stops"),
    fit=option("", "e.g. 40GiB: recompute and swap what makes the run fit at the least simulated cost; stored with the "
                   "run"),
    hardware=option("", "for --fit: preset of sim.py, or file of tests/calibrate.py; on a CPU: generic numbers"),
    peak_tflops=option(0.0, "peak of the device in TFLOP/s, for MFU; 0: MFU is not reported", least=0),
    # optimisation
    steps=option(1000, "optimizer steps at the full batch; sets the tokens of the run"),
    tokens=option(0.0, "tokens of the run, in place of --steps; those of --phases are scaled", least=0),
    phases=option("", "FILE, a JSON list of objects with the keys of Phase in train.py, or an object with such a list "
                      "as `phases`; --tokens, --seq-len, --global-batch and --lr scale it"),
    lr=option(3e-4, "highest learning rate"),
    min_lr=option(0.1, "final learning rate as a share of --lr", least=0, most=1),
    decay=option("cosine", "the learning rate after its warm-up", choices=("cosine", "constant")),
    warmup_steps=option(0, "steps over which the learning rate rises, at the full batch", least=0),
    batch_warmup=option([], "SEQUENCES TOKENS: the batch grows linearly from SEQUENCES to --global-batch over TOKENS"),
    weight_decay=option(0.1, "of every tensor, gains of norms included (as PU's figures of falling gains show)",
                        least=0, most=100),
    beta1=option(0.9, "of AdamW", least=0, most=0.99999),
    beta2=option(0.95, "of AdamW", least=0, most=0.99999),
    clip=option(1.0, "the global gradient norm is cut to this; 0: it is not", least=0),
    compile=option("auto", "by torch.compile: operators (norms and SwiGLU, one kernel each way) | layers (whole ones, "
                           "for one process without recompute and swap); auto: operators where that works, which takes "
                           "a C++ compiler or a GPU's Triton", choices=("auto", "none", "operators", "layers")),
    precision=option("auto", "auto: bf16 with fp32 master weights, fp32 on a CPU without bf16 matmuls",
                     choices=("auto", "fp32", "bf16")),
)
PLAN_DEFAULTS = dict(micro_batch=8, global_batch=32, seq_len=256)
PLAN_OPTIONS = {field.name: option(PLAN_DEFAULTS.get(field.name, field.default), field.metadata["text"],
                                   **field.metadata["allowed"])
                for field in dataclasses.fields(Plan) if field.name != "precision"}
RECIPES = dict(   # what a preset trains with, where the command line does not say; ours, not published
    tiny=dict(steps=1100, lr=6e-3, min_lr=0.02, warmup_steps=30, seq_len=256, global_batch=8, micro_batch=8),
    small=dict(steps=10000, lr=6e-4, warmup_steps=500, seq_len=2048, global_batch=64, micro_batch=8),
)
# what --resume lets one change; with --data the text must be the same
CHANGEABLE = {"out", "data", "steps", "tokens", "save_every", "keep", "eval_every", "device", "threads", "peak_tflops",
              "max_skips", "timeout", "record_loads", "fit", "hardware", "resume", "compile"}
CHANGEABLE |= set(PLAN_OPTIONS) - {"global_batch", "seq_len"}
# what describes many processes, and means nothing for one
CUTS = ("pp", "dp", "cp", "tp", "sp", "ep", "vpp", "schedule", "overlap", "layer_split", "balance_live")
RULES = 2                                  # raised when the same settings come to mean another run


def flag(name):
    return "--" + name.replace("_", "-")


def read_word(text, kind):
    """A word of the command line as a value of this kind; what it cannot be stays text, which the check refuses."""
    try:
        if kind is bool:
            return dict(true=True, false=False).get(text.lower(), text)
        if kind in (int, float):
            return kind(text)
        return text if kind is str else json.loads(text)                  # an object, or null
    except ValueError:
        return text


def read_setting(name, words, option):
    """What was typed after a flag, as a value of the setting."""
    kind = type(option.default)
    if kind is list:
        return words
    value = sim.plan_value(name, words) if kind is tuple else read_word(words, kind)
    check_option(flag(name), value, option)
    return value


def check_option(name, value, option):
    """ValueError for a value that a setting cannot have; its default is always right."""
    if value == option.default:
        return
    if isinstance(option.default, list):
        is_words = isinstance(value, list) and all(isinstance(word, str) for word in value)
        require(is_words, f"{name}={value!r}: use a list of words")
    else:
        check_setting(name, value, type(option.default), **option.allowed)


def settings_of(given):
    """All settings: what was given, else the preset's recipe, else the default."""
    defaults = {name: option.default for name, option in (OPTIONS | PLAN_OPTIONS).items()}
    recipe = RECIPES.get(given.get("preset", "tiny"), {})
    return fit_to_world(defaults | recipe | given, given)


def fit_to_world(settings, given):
    """Where they are not given, dp takes what processes there are, and a micro-batch is no more than a rank's share.

    E.g. 4 processes with --tp 2: dp=2; of a global batch of 12 each takes 6, so that a micro-batch of 8 becomes 6.
    """
    if "dp" not in given:
        settings["dp"] = max(1, parallel.world_size() // (settings["pp"] * settings["cp"] * settings["tp"]))
    if "micro_batch" not in given:
        share = max(1, settings["global_batch"] // settings["dp"])
        settings["micro_batch"] = max(n for n in range(1, settings["micro_batch"] + 1) if share % n == 0)
    return settings


def make_config(settings):
    """The preset with what --set changes."""
    by_name = {field.name: field for field in dataclasses.fields(Config)}
    changes = {}
    for pair in settings["set"]:
        key, equals, word = pair.partition("=")
        if key not in by_name or not equals:
            raise UserError(f"--set {pair}: write KEY=VALUE with a key of {', '.join(by_name)}")
        changes[key] = read_word(word, by_name[key].type)
    with refusals("--set: "):
        return replace(PRESETS[settings["preset"]], **changes)


def make_plan(settings):
    return Plan(**{name: settings[name] for name in PLAN_OPTIONS}, precision=settings["precision"])


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
    occurrences = collections.Counter()
    for text in texts:
        occurrences.update(regex.findall(PATTERN, text))
    # each different word once, as ids of its bytes, and how often it occurs
    words = [(list(word.encode()), n) for word, n in sorted(occurrences.items())]
    pair_counts, words_with = collections.Counter(), collections.defaultdict(set)
    for index, (word, n) in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += n
            words_with[pair].add(index)
    # the most frequent pair first; among equals the smaller ids, so that the same text gives the same vocabulary
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
        for other in merge_pair(words, pair, len(vocabulary), pair_counts, words_with):
            heapq.heappush(heap, (-pair_counts[other], other))
        vocabulary.append(merged)
    return {token: rank for rank, token in enumerate(vocabulary)}


def merge_pair(words, pair, new, pair_counts, words_with):
    """Replaces the pair by the id `new` in all words -> pairs whose counts changed, in order."""
    changed = set()
    for index in words_with.pop(pair):
        word, n = words[index]
        for old in zip(word, word[1:]):
            pair_counts[old] -= n
            changed.add(old)
        word = replaced(word, pair, new)
        words[index] = word, n
        for made in zip(word, word[1:]):
            pair_counts[made] += n
            words_with[made].add(index)
            changed.add(made)
    return sorted(changed)


def replaced(word, pair, new):
    """The word with each occurrence of the pair, from the left, replaced by one id."""
    out = []
    for i in word:
        if out and (out[-1], i) == pair:
            out[-1] = new                                                 # never part of a pair itself: it is too new
        else:
            out.append(i)
    return out


def make_encoding(ranks, pattern=PATTERN, end=None):
    """{bytes: rank} -> tiktoken.Encoding; the id after the last rank is END's."""
    special = {END: len(ranks) if end is None else end}
    return tiktoken.Encoding("learnt", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def save_encoding(encoding, path):
    """tiktoken's own file format: a line of base64 and rank a token."""
    lines = []
    for token, rank in ranks_of(encoding):
        lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
    write_whole(path, "".join(lines))


def ranks_of(encoding):
    """[(bytes, rank), ...] by rank."""
    return sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])


def load_encoding(path, pattern=PATTERN, end=None):
    ranks = {}
    try:
        for line in Path(path).read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
        return make_encoding(ranks, pattern, end)
    except (OSError, ValueError):
        raise UserError(f"--tokenizer {path}: no tiktoken file here; use learn, gpt2, cl100k_base, o200k_base or a "
                        f"file of base64 and rank a line") from None


def find_encoding(name):
    """Of --tokenizer: None if it is to be learnt from the text."""
    if name == "learn":
        return None
    if name not in tiktoken.list_encoding_names():
        return load_encoding(name)
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:                                            # requests', or the socket's own
        raise UserError(f"--tokenizer {name}: its vocabulary is not on this machine and could not be downloaded "
                        f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has it, or use learn"
                        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Files of text: --data -> files -> pieces, some of them held out

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go",
                 ".rs", ".rb", ".sh", ".sql", ".tex", ".html", ".css", ".jsonl")
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", ".git"}     # folders
PIECE = 1 << 16                            # characters, or tokens, that are read and encoded at a time
HELDOUT_BYTES = 8 << 20                    # at most, so that an evaluation takes a bounded time


class TextFile(typing.NamedTuple):
    source: str                            # its name in the mix of a phase
    name: str                              # path below the folder that --data names
    path: Path


class Piece(typing.NamedTuple):
    file: TextFile
    content: str | list                    # text, or ids of tokens
    ends: bool                             # a document ends with it
    is_heldout: bool


def list_files(data):
    """--data -> TextFiles in the order of a hash of their names, so that any stretch of them is a mixture of all."""
    files = []
    for word in data or [sysconfig.get_path("stdlib")]:
        source, equals, path = word.partition("=")
        if not equals or Path(word).exists():
            source, path = "text", word
        if not re.fullmatch("[A-Za-z0-9_-]+", source) or source == "heldout":
            raise UserError(f"--data {word}: {source!r} names the source; use letters, digits, - and _, not heldout")
        path = Path(path)
        if not path.exists():
            raise UserError(f"--data {path}: no such file or folder")
        root = path if path.is_dir() else path.parent
        found = sorted(walk(path)) if path.is_dir() else [path]
        if not found:
            raise UserError(f"--data {path}: this folder has no text; what is read there: {' '.join(TEXT_SUFFIXES)}")
        files += [TextFile(source, str(file.relative_to(root)), file) for file in found]
    return sorted(files, key=lambda file: (hashlib.sha256(file.name.encode()).digest(), file.name))


def walk(folder):
    """Files of text below a folder, without folders of tests, packages and the like."""
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for name in names:
            if name.endswith(TEXT_SUFFIXES):
                yield Path(here, name)


def total_bytes(files):
    return sum(file.path.stat().st_size for file in files)


def pieces_of(files, settings, encoding=None):
    """All text in Pieces. Held out is the second of every n, where n = 1 / --heldout, or more for a large text."""
    share = min(settings["heldout"], HELDOUT_BYTES / max(1, total_bytes(files)))
    every = round(1 / share) if share else 0
    number = 0
    for file in files:
        try:
            for content, ends in contents_of(file.path, settings["text_field"], encoding):
                yield Piece(file, content, ends, is_heldout=every > 0 and number % every == 1)
                number += 1
        except UnicodeDecodeError as error:
            raise UserError(f"{file.path} is not UTF-8 text ({error.reason}): leave it out of --data") from None


def contents_of(path, text_field, encoding):
    """(text or ids of tokens, whether a document ends there), piece by piece."""
    if path.suffix == ".jsonl":
        return read_jsonl(path, text_field)
    if path.suffix == ".bin":
        return read_bin(path, encoding)
    return read_text(path)


def read_text(path):
    """A file is a document; pieces are cut at ends of lines where there are any."""
    with open(path, encoding="utf-8", newline="") as lines:
        piece = lines.read(PIECE) + lines.readline(PIECE)
        while piece:
            following = lines.read(PIECE) + lines.readline(PIECE)
            if "\0" in piece:
                raise UserError(f"{path} is not text, it holds zero bytes: leave it out of --data")
            yield piece, not following
            piece = following


def read_jsonl(path, field):
    """A line is a document, and a piece."""
    with open(path, encoding="utf-8", newline="\n") as lines:
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
    if encoding is None:
        raise UserError(f"{path} holds tokens: name the tokenizer that made them with --tokenizer")
    ids = np.memmap(path, dtype=dtype_for(encoding), mode="r")
    for start in range(0, len(ids), PIECE):
        piece = ids[start:start + PIECE].tolist()
        if max(piece) >= encoding.n_vocab:
            raise UserError(f"{path} holds id {max(piece)}, the tokenizer has {encoding.n_vocab}: name the one that "
                            f"made the file with --tokenizer")
        yield piece, False


def dtype_for(encoding):
    return np.dtype(np.uint16 if encoding.n_vocab <= 1 << 16 else np.uint32)


def count_pieces(files):
    """About how many pieces the files have, for the progress that is shown: lines, or parts of PIECE bytes."""
    count = 0
    for file in files:
        if file.path.suffix == ".jsonl":
            with open(file.path, "rb") as lines:
                count += sum(block.count(b"\n") for block in iter(lambda: lines.read(1 << 20), b""))
        else:
            item = 2 if file.path.suffix == ".bin" else 1                 # bytes of a token, or of a character
            count += math.ceil(file.path.stat().st_size / item / PIECE)
    return max(1, count)


# ---------------------------------------------------------------------------------------------------------------------
# Corpus: tokens in one memory-mapped file for each source and one for the held-out text, made once


@dataclass
class Corpus:
    encoding: tiktoken.Encoding            # of all its tokens
    end: int                               # END's id
    train: dict                            # source -> tokens, memory-mapped
    heldout: np.ndarray                    # tokens, of all sources
    facts: dict                            # hash, bytes and token counts, what gzip and xz need for the held-out bytes


def make_cache(settings, encoding, vocab_size, parent):
    """Tokenises --data into parent/data-HASH, once -> that folder. encoding: None if it is to be learnt."""
    files = list_files(settings["data"])
    cache = Path(parent) / f"data-{identity_of(files, settings, encoding or vocab_size)}"
    if is_whole(cache):
        return cache
    # made under a name of this process, which it loses when it is complete: a killed run leaves no half of a cache
    remove_leftovers(parent)
    unfinished = Path(f"{cache}.{platform.node()}.{os.getpid()}.tmp")
    try:
        tokenise(files, settings, encoding or learn_encoding(files, settings, vocab_size), unfinished)
        if not is_whole(cache):                                           # else another run was faster: its is as good
            shutil.rmtree(cache, ignore_errors=True)
            unfinished.rename(cache)
            parallel.sync_folder(cache.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return cache


def is_whole(cache):
    """Whether a cache is there, for the text that its name says, and its files are as they were written."""
    try:
        parallel.check_files(cache)
        return json.loads((cache / "facts.json").read_text())["name"] == cache.name
    except parallel.CheckpointError:
        return False


def remove_leftovers(parent):
    """Unfinished caches of processes of this machine that are gone."""
    for leftover in Path(parent).glob(f"data-*.{platform.node()}.*.tmp"):
        process = leftover.name.split(".")[-2]
        if not Path("/proc", process).exists():
            shutil.rmtree(leftover, ignore_errors=True)


def identity_of(files, settings, tokenizer):
    """A hash of all that the tokens depend on. tokenizer: an encoding, or the size of the one to be learnt."""
    stats = [(file.source, file.name, file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in files]
    if isinstance(tokenizer, tiktoken.Encoding):
        tokenizer = ranks_of(tokenizer), tokenizer._pat_str
    identity = repr((stats, tokenizer, settings["heldout"], settings["text_field"], PIECE))
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def open_corpus(cache):
    """The Corpus that make_cache left."""
    facts = json.loads((cache / "facts.json").read_text())
    train = {split: np.memmap(cache / f"{split}.bin", facts["dtype"], mode="r") for split in facts["tokens"]}
    heldout = train.pop("heldout")
    encoding = load_encoding(cache / "tokenizer.tiktoken", facts["pattern"], facts["end"])
    return Corpus(encoding, facts["end"], train, heldout, facts)


def learn_encoding(files, settings, vocab_size):
    """From the first part of the training text."""
    def texts():
        left = LEARN_FROM
        for piece in pieces_of(files, settings):
            if left <= 0:
                return
            if not piece.is_heldout:
                left -= len(piece.content)
                yield piece.content
    print(f"learning a vocabulary of {vocab_size} tokens", flush=True)
    return make_encoding(learn_bpe(texts(), vocab_size))


def tokenise(files, settings, encoding, folder):
    """Reads everything once, few pieces at a time, and writes tokens and facts into folder."""
    # 1. a file for each source and one for held-out text; each begins with END, so that its first token is predicted
    folder.mkdir(parents=True)
    end, dtype = encoding.encode_single_token(END), dtype_for(encoding)
    writers = {split: open(folder / f"{split}.bin", "wb") for split in {"heldout", *(file.source for file in files)}}
    for writer in writers.values():
        writer.write(np.array([end], dtype).tobytes())
    # 2. the text, hashed, and what others need to pack the held-out part of it
    hasher = hashlib.sha256()
    sizes = dict(train_bytes=0, heldout_bytes=0, gzip=0, xz=0)
    packers = dict(gzip=zlib.compressobj(9, wbits=31), xz=lzma.LZMACompressor(preset=9))
    pieces = encoded(pieces_of(files, settings, encoding), encoding, end)
    for piece, raw, tokens in sim.with_progress("tokenising", pieces, count_pieces(files)):
        hasher.update(f"\0{piece.file.source}\0{piece.file.name}\0".encode() + raw)
        if piece.is_heldout:
            sizes["heldout_bytes"] += len(raw)
            for name, packer in packers.items():
                sizes[name] += len(packer.compress(raw))
        else:
            sizes["train_bytes"] += len(raw)
        split = "heldout" if piece.is_heldout else piece.file.source
        writers[split].write(tokens.astype(dtype).tobytes())
    for name, packer in packers.items():
        sizes[name] += len(packer.flush())
    # 3. facts
    counts = {split: writer.tell() // dtype.itemsize for split, writer in writers.items()}
    for writer in writers.values():
        writer.close()
    save_encoding(encoding, folder / "tokenizer.tiktoken")
    facts = dict(name=folder.name.split(".")[0], sha256=hasher.hexdigest(), files=len(files), tokens=counts,
                 dtype=dtype.name, end=end, pattern=encoding._pat_str)
    write_whole(folder / "facts.json", json.dumps(facts | sizes, indent=1))
    # 4. on the disk before the folder gets its name, with sizes and checksums
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    parallel.write_manifest(folder)


def encoded(pieces, encoding, end):
    """(piece, its bytes, its tokens) in order. Threads encode: tiktoken lets go of the interpreter."""
    def encode(piece):
        if isinstance(piece.content, str):
            raw, tokens = piece.content.encode(), encoding.encode_ordinary(piece.content)
        else:
            raw, tokens = encoding.decode_bytes(piece.content), piece.content
        return piece, raw, np.array(tokens + [end] if piece.ends else tokens, np.uint32)

    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        while some := list(itertools.islice(pieces, 8 * workers)):        # few, so that little is held at once
            yield from pool.map(encode, some)


def write_whole(path, text):
    """All of a file or nothing of it."""
    unfinished = Path(f"{path}.tmp")
    unfinished.write_text(text)
    unfinished.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Phases: what is trained on, how long, how fast. Everything is a function of the tokens seen so far.


@dataclass(frozen=True)
class Phase:
    """A stretch of a run. All tokens here count from the phase's beginning."""
    tokens: float = setting()              # how long it lasts
    seq_len: int = setting()               # tokens of a sequence
    global_batch: int | list = setting()   # sequences a step, or [[from this token of the phase, sequences], ...]
    lr: float = setting()                  # reached when the warm-up ends
    min_lr: float = setting(least=0)       # reached at the phase's end
    decay: str = setting("cosine", "constant")
    warmup_tokens: float = setting(0, least=0)    # over which the rate rises from 0
    rope_theta: float | None = None        # None: the config's
    mix: dict | None = None                # source -> share of the sequences; None: by size

    def __post_init__(self):
        # numbers and words by their declarations above; then what these cannot say of lists and objects
        check_settings(self)
        require(isinstance(self.batches, list) and all(isinstance(row, list) and len(row) == 2 for row in self.batches),
                f"global_batch={self.global_batch}: use sequences, or [[0, sequences], [token, sequences], ...]")
        for start, sequences in self.batches:
            check_setting("global_batch", sequences, int)
            check_setting("global_batch from token", start, float, least=0)
        starts = [start for start, _ in self.batches]
        require(starts[:1] == [0] and starts == sorted(starts), f"global_batch={self.global_batch}: use rising tokens, "
                                                                f"from 0 on")
        if self.rope_theta is not None:
            check_setting("rope_theta", self.rope_theta, float)
        if self.mix is not None:
            require(isinstance(self.mix, dict), f"mix={self.mix!r}: use an object of sources and shares")
            for source, share in self.mix.items():
                check_setting(f"mix of {source}", share, float, most=1)
            require(abs(sum(self.mix.values()) - 1) < 0.01, f"mix={self.mix}: use shares that sum to 1")

    @property
    def batches(self):
        return self.global_batch if isinstance(self.global_batch, list) else [[0, self.global_batch]]

    @property
    def largest_step(self):
        """Tokens."""
        return self.seq_len * max(sequences for _, sequences in self.batches)

    def batch(self, tokens):
        """Sequences of the step that starts at this token of the phase."""
        return [sequences for start, sequences in self.batches if start <= tokens][-1]

    def learning_rate(self, tokens):
        """Of the step that ends at this token of the phase."""
        if tokens < self.warmup_tokens:
            return self.lr * tokens / self.warmup_tokens
        if self.decay == "constant":
            return self.lr
        done = min(1, (tokens - self.warmup_tokens) / max(1, self.tokens - self.warmup_tokens))
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * done)) / 2


PHASE_KEYS = [field.name for field in dataclasses.fields(Phase)]


def make_phases(settings, given):
    """One phase from --steps or --tokens, or those of --phases, where a key that is left out is as in the first one, or
    else as in that single phase."""
    step = settings["global_batch"] * settings["seq_len"]
    single = dict(tokens=settings["tokens"] or settings["steps"] * step, seq_len=settings["seq_len"],
                  global_batch=batch_ramp(settings), lr=settings["lr"], min_lr=settings["lr"] * settings["min_lr"],
                  decay=settings["decay"], warmup_tokens=settings["warmup_steps"] * step)
    if not settings["phases"]:
        return [Phase(**single)]
    where = f"--phases {settings['phases']}"
    phases, rows = [], read_rows(settings["phases"])
    # sizes that a later phase leaves out are those of the first, so that all are scaled alike
    single |= {key: rows[0][key] for key in ("seq_len", "global_batch", "lr") if key in rows[0]}
    for number, row in enumerate(rows, 1):
        with refusals(f"{where}, phase {number}: "):
            unknown = set(row) - set(PHASE_KEYS)
            require(not unknown, f"{', '.join(unknown)}: use keys of {', '.join(PHASE_KEYS)}")
            lr = row.get("lr", single["lr"])
            check_setting("lr", lr, float)
            phases.append(Phase(**single | dict(min_lr=lr * settings["min_lr"]) | row))
    phases = scaled(phases, given, once=settings["micro_batch"] * settings["dp"])
    refuse_too_short(phases, where)
    return phases


def read_rows(path):
    """The phases of a JSON file: a list of objects, or an object that has it as `phases` beside its sources."""
    try:
        rows = json.loads(Path(path).read_text())
    except OSError:
        raise UserError(f"--phases {path}: no such file") from None
    except ValueError as error:
        raise UserError(f"--phases {path}: not JSON ({error})") from None
    if isinstance(rows, dict):
        rows = rows.get("phases")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"--phases {path}: write a JSON list of objects with {', '.join(PHASE_KEYS)}")
    return rows


def batch_ramp(settings):
    """--batch-warmup as [[from token, sequences], ...], rising by a micro-batch at a time."""
    if not settings["batch_warmup"]:
        return settings["global_batch"]
    once = settings["micro_batch"] * settings["dp"]
    words = settings["batch_warmup"]
    with refusals("--batch-warmup takes two numbers, sequences and tokens: "):
        require(len(words) == 2, f"not {len(words)}")
        start, over = read_word(words[0], int), read_word(words[1], float)
        check_setting("sequences", start, int, least=1, most=settings["global_batch"])
        check_setting("tokens", over, float, least=0)
    sizes = [*range(start, settings["global_batch"], once), settings["global_batch"]]
    return [[over * i / max(1, len(sizes) - 1), size] for i, size in enumerate(sizes)]


def scaled(phases, given, once):
    """The phases with the tokens in all, and the first one's length, largest batch and rate, that were given.

    The others keep their proportions. once: sequences that all ranks run at once; a batch is a multiple of it.
    """
    # factors, 1 where nothing was given
    first = phases[0]
    tokens = given["tokens"] / sum(phase.tokens for phase in phases) if given.get("tokens") else 1
    length = given["seq_len"] / first.seq_len if "seq_len" in given else 1
    batch = given["global_batch"] / first.batches[-1][1] if "global_batch" in given else 1
    rate = given["lr"] / first.lr if "lr" in given else 1
    result = []
    for phase in phases:
        batches = []
        for start, sequences in phase.batches:
            if batch != 1:
                sequences = max(1, round(sequences * batch / once)) * once
            batches.append([start * tokens, sequences])
        result.append(replace(phase, tokens=phase.tokens * tokens, warmup_tokens=phase.warmup_tokens * tokens,
                              seq_len=max(1, int(phase.seq_len * length)), global_batch=batches,
                              lr=phase.lr * rate, min_lr=phase.min_lr * rate))
    return result


def end_of(phases, number):
    """The token of the run at which a phase ends: at the first step there. What that is too far, the next one lacks, so
    that a run has all its tokens to within a batch."""
    return sum(phase.tokens for phase in phases[:number + 1])


def refuse_too_short(phases, where):
    """Each phase must have a step of its own, also where the one before it went a step too far."""
    steps = [phase.largest_step for phase in phases]
    needed = [max(step, before) for step, before in zip(steps, [0, *steps])]
    total = end_of(phases, len(phases) - 1)
    least = round(max(need / phase.tokens for need, phase in zip(needed, phases)) * total)
    if least > total:
        raise UserError(f"{where}: too short for a step of each phase; use --tokens {least} or more, or a smaller "
                        f"--global-batch or --seq-len")


# ---------------------------------------------------------------------------------------------------------------------
# Data order: a function of (seed, number of the sequence since the run's first)


def shuffled(index, n, seed):
    """Where a seeded shuffle of range(n) puts index, without a table: a Feistel network, walked until it is below n."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)                        # bits of each half of an index
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
    """Which windows of text make the sequences of a phase. No token is read twice in an epoch of its source.

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

    def window(self, number):
        """(seq_len + lookahead,) tokens of a sequence."""
        block, place = divmod(number, len(self.pattern))
        source = self.pattern[place]
        # its number among the source's own: those of earlier blocks, then those before it in this one
        own = block * self.pattern.count(source) + self.pattern[:place].count(source)
        n_windows = (len(self.train[source]) - self.span) // self.seq_len + 1
        epoch, index = divmod(own, n_windows)
        start = shuffled(index, n_windows, f"{self.seed},{source},{epoch}") * self.seq_len
        return self.train[source][start:start + self.span]

    def batch(self, tokens, count):
        """The sequences that follow this many tokens: (count, seq_len + lookahead)."""
        first = tokens // self.seq_len
        return np.stack([self.window(first + i) for i in range(count)])


def mix_pattern(corpus, phase, seed):
    """Sources of a block of sequences, in the shares of the phase's mix and in a fixed random order."""
    sizes = {source: len(tokens) for source, tokens in corpus.train.items()}
    if len(sizes) == 1:
        return list(sizes)                                                # one source: there is nothing to mix
    shares = phase.mix
    if shares is None:
        shares = {source: size / sum(sizes.values()) for source, size in sizes.items()}
    unknown = set(shares) - set(sizes)
    if unknown:
        raise UserError(f"a phase mixes {', '.join(sorted(unknown))}, but --data names {', '.join(sizes)}: write "
                        f"--data NAME=PATH for each")
    pattern = []
    for source, share in sorted(shares.items()):
        pattern += [source] * max(1, round(1000 * share))
    return [pattern[i] for i in np.random.default_rng([seed, 1]).permutation(len(pattern))]


# ---------------------------------------------------------------------------------------------------------------------
# One step


def examples(windows, depths, device, document_end=None):
    """Windows (B, T + depths) -> ids (B,T), targets (B, depths, T), doc_ids (B,T) or None: what Model.forward takes.

    With documents kept apart, the tokens ahead that MTP predicts count as long as they are of the same document; the
    next token always does, since END is followed by one, too.
    """
    tokens = torch.from_numpy(windows.astype(np.int64)).to(device, non_blocking=True)
    T = tokens.size(1) - depths
    targets = torch.stack([tokens[:, 1 + d:1 + d + T] for d in range(depths)], 1)
    if document_end is None:
        return tokens[:, :T], targets, None
    is_end = tokens == document_end
    documents = is_end.cumsum(1) - is_end.long()                          # END belongs to the document that it ends
    for d in range(1, depths):
        targets[:, d].masked_fill_(documents[:, 1 + d:1 + d + T] != documents[:, :T], -100)
    return tokens[:, :T], targets, documents[:, :T]


# what a step returns; stop: ranks that were asked to
MEASURES = ("loss", "mtp_loss", "aux_loss", "grad_norm", "skipped", "max_vio", "drop_rate", "stop")


def own_sequences(plan, size):
    """This rank's places in a global batch of that size.

    One micro-batch of all ranks is a run of neighbours: a balance group over ranks holds the same sequences as on one.
    """
    places = np.arange(size).reshape(-1, plan.dp, plan.micro_batch)       # micro-batches, ranks, sequences
    return places[:, parallel.data_rank(plan)].flatten()


def micro_batches(ids, targets, doc_ids, size):
    """A rank's share of a batch as inputs of the model, `size` sequences at a time."""
    inputs = []
    for start in range(0, len(ids), size):
        own = slice(start, start + size)
        inputs.append(dict(ids=ids[own], targets=targets[own], doc_ids=None if doc_ids is None else doc_ids[own]))
    return inputs


def train_step(pipeline, optimizer, batch, clip, stop=False):
    """One optimizer step on this rank's share of a global batch, which `examples` made.

    -> float32 tensor of MEASURES, those of all ranks, and the copies that went to each expert, (MoE layers, E), of all
    ranks. Both are still on the device: nothing waits for them. clip: 0 for none. stop: whether this rank was asked to.

    A loss or gradient that is not finite leaves weights and moments as they are: the optimizer is told by found_inf.
    """
    model, plan = pipeline.model, pipeline.plan
    ids, targets, doc_ids = batch
    # 1. forward and backward; losses are means over the target tokens of the whole global batch
    ranks_alike = plan.world_size // plan.dp                              # that share the same sequences
    loss_tokens = parallel.all_sum((targets != -100).sum((0, 2)).float()) / ranks_alike
    model.aux_scale = plan.micro_batch / (len(ids) * plan.dp * plan.cp * plan.tp)
    out = pipeline.step(micro_batches(ids, targets, doc_ids, plan.micro_batch), loss_tokens)

    # 2. what all ranks must know before they step
    stats = model.pop_stats()
    loads, own_layers = parallel.sum_loads(model, stats["loads"])         # (MoE layers, E)
    losses = torch.stack([out.loss, out.mtp_loss, out.aux_loss]).float()
    sums = parallel.all_sum(torch.stack([*losses, stats["dropped"].float(), losses.new_tensor(stop)]))
    norm = parallel.grad_norm(model, pipeline.grid).float()
    finite = torch.isfinite(norm) & torch.isfinite(sums).all()
    cut = (norm / clip).clamp(min=1) if clip else torch.ones_like(norm)   # what clipping divides gradients by

    # 3. the step, or none
    if parallel.fused_skips(ids.device):
        optimizer.found_inf, optimizer.grad_scale = (~finite).float(), cut
        optimizer.step()
    elif finite:                                                          # here the host waits
        torch._foreach_div_([parallel.local(p.grad) for p in model.parameters() if p.grad is not None], cut)
        optimizer.step()
    optimizer.zero_grad()
    model.update_router_bias(loads[own_layers] * finite)

    # 4. measures
    *losses, dropped, stop = sums
    copies = loads.float()
    max_vio = norm * 0                                                    # of a dense model
    if len(copies):
        max_vio = (copies.amax(1) / copies.mean(1).clamp(min=1) - 1).mean()
    drop_rate = dropped / copies.sum().clamp(min=1)
    return torch.stack([*losses, norm, (~finite).float(), max_vio, drop_rate, stop]), loads


# ---------------------------------------------------------------------------------------------------------------------
# Held-out text


@torch.no_grad()
def evaluate(pipeline, corpus, document_end=None):
    """Held-out loss (nats a token) and bits per UTF-8 byte; {} where no text is held out.

    Every token is predicted once, END included. Windows overlap by half and only their second half counts, so that each
    token sees at least half a window before it.
    """
    model, plan = pipeline.model, pipeline.plan
    device, depths = next(model.parameters()).device, 1 + model.config.num_nextn_predict_layers
    n = len(corpus.heldout) - 1                                           # tokens to predict
    if n < 1:
        return {}
    # 1. windows, and behind the text room (-1) that keeps the last ones and the last batch whole
    seq_len, at_once = plan.seq_len, plan.dp * plan.micro_batch
    stride = max(1, seq_len // 2)
    starts = range(0, max(1, n - (seq_len - stride)), stride)
    text = np.full(starts[-1] + at_once * stride + seq_len + depths, -1, np.int64)
    text[:n + 1] = corpus.heldout
    batches = range(0, len(starts), at_once)
    if parallel.rank() == 0:
        batches = sim.with_progress("held-out text", batches)

    # 2. a micro-batch of windows on each rank at a time
    nats = 0.0
    model.eval()
    for first in batches:
        first += parallel.data_rank(plan) * plan.micro_batch              # this rank's first window
        places = [number * stride for number in range(first, first + plan.micro_batch)]
        windows = np.stack([text[start:start + seq_len + depths] for start in places])
        ids, targets, doc_ids = examples(windows, depths, device, document_end)

        # 3. what counts: depth 0 alone, the second half, all of the first window, nothing past the end
        counted = torch.full_like(targets, -100)
        counted[:, 0, seq_len - stride:] = targets[:, 0, seq_len - stride:]
        if first == 0:
            counted[0, 0] = targets[0, 0]
        counted[max(0, len(starts) - first):] = -100
        counted.masked_fill_(counted < 0, -100)
        inputs = dict(ids=ids.clamp(min=0), targets=counted, doc_ids=doc_ids)
        divisor = torch.ones(depths, device=device)                       # so that the loss is a sum, not a mean
        nats += pipeline.step([inputs], divisor, train=False).loss.item()
    model.train()
    nats = parallel.all_sum(torch.tensor(nats, dtype=torch.float64)).item()
    return dict(val_loss=nats / n, val_bpb=nats / math.log(2) / corpus.facts["heldout_bytes"])


# ---------------------------------------------------------------------------------------------------------------------
# A run, and how it is opened


@dataclass
class Run:
    """A training run. open_run fills the fields in this order; afterwards only `progress` changes."""
    given: dict                            # what was typed
    settings: dict = None                  # all settings by name, with what `auto` became
    checkpoint: Path = None                # where it goes on from; None: it begins
    stored: dict = None                    # config.json of the run that goes on
    device: torch.device = None
    encoding: tiktoken.Encoding = None     # of a named tokenizer; None: learnt from the text
    config: Config = None                  # of the model
    plan: Plan = None                      # how it is cut and run, apart from what phases change
    phases: list = None                    # of Phase
    folder: Path = None                    # where it writes
    lock: typing.IO = None                 # of the folder: ours as long as this file is open
    corpus: Corpus = None
    progress: dict = None                  # where it stands, stored with checkpoints


def beginning():
    """The progress of a run without a step; all of it is stored with checkpoints."""
    progress = dict(step=0, tokens=0, phase=0, phase_tokens=0)            # phase: its number; tokens: of all phases
    progress |= dict(skipped=0, skipped_in_a_row=0)                       # steps that were not finite
    return progress | dict(placement=[], expert_load=[])                  # of live balance


def open_run(given):
    """A Run, ready for its first step. All that can be refused is refused here; a plan, before any rank waits."""
    run = Run(given)
    # 1. settings: of the run that goes on, or new ones
    if parallel.is_restarted():
        given = restarted(given)
    if given.get("resume"):
        run.settings, run.stored, run.checkpoint = resume_settings(given)
    else:
        run.settings = settings_of(given)
    # 2. the device, and what `auto` becomes on it
    run.device = parallel.pick_device(run.settings["device"])
    fix_automatic(run.settings, run.device)
    # 3. the shape, with room for the vocabulary
    run.encoding = find_encoding(run.settings["tokenizer"])
    config = run.stored["config"] if run.stored else make_config(run.settings)
    run.config = with_vocabulary(config, run.encoding)
    # 4. the plan, and what the balance loss means under it
    run.plan = make_plan(run.settings)
    refuse_lone_process(run.plan)
    if run.settings["fit"]:
        run.plan = fit_plan(run)
    run.config = replace(run.config, balance_group=balance_group(run.config, run.plan))
    # 5. the phases, each of which must fit the plan
    if run.stored and not {"steps", "tokens"} & set(given):
        run.phases = run.stored["phases"]
    else:
        run.phases = make_phases(run.settings, run.stored["given"] | given if run.stored else given)
    for phase in run.phases:
        for _, sequences in phase.batches:
            plan = replace(run.plan, seq_len=phase.seq_len, global_batch=sequences)
            check_plan(run.config, plan, devices=parallel.world_size())
    # 6. what is compiled, and the other processes
    fix_compiled(run.settings, run.plan, run.device)
    parallel.join_world(run.device, timedelta(seconds=run.settings["timeout"]))
    refuse_unequal_ranks(run)
    # 7. the folder
    run.folder = parallel.first_does(lambda: open_folder(run))
    try:
        fill_run(run)
    except BaseException:
        if run.lock:
            run.lock.close()
        raise
    return run


def fill_run(run):
    """The steps of open_run that need the folder."""
    # 8. the text
    cache = parallel.first_does(lambda: make_cache(run.settings, run.encoding, run.config.vocab_size,
                                                   run.folder.parent))
    run.corpus = open_corpus(cache)
    for phase in run.phases:
        order_of(run, phase)                                              # refuses text that is too short
    # 9. progress
    run.progress = beginning()
    if run.checkpoint:
        run.progress = parallel.first_does(lambda: read_progress(run.checkpoint))
    parallel.first_does(lambda: continue_folder(run) if run.stored else begin_folder(run))


def restarted(given):
    """torchrun starts a run again: with --out or --resume it goes on from its newest checkpoint, also if it began from
    an older one."""
    if given.get("resume"):
        return given | dict(resume=str(folder_of(given["resume"])))
    if given.get("out") and parallel.steps_in(Path(given["out"]) / "ckpt"):
        return given | dict(resume=given["out"])
    return given


def resume_settings(given):
    """The stored settings of a run with what may be changed -> (settings, stored config.json, checkpoint)."""
    folder, checkpoint = find_checkpoint(given["resume"])
    stored = read_config(folder)
    settings = stored["settings"]
    if stored.get("rules") != RULES:
        raise UserError(f"{folder} was begun under other rules of train.py, at commit {stored.get('commit')}: resume "
                        f"it with that version, or start a new run")
    if Path(given.get("out", folder)).resolve() != folder.resolve():
        raise UserError(f"--out {given['out']}: --resume {given['resume']} writes into {folder}; leave --out away")
    given = {name: value for name, value in given.items() if name not in ("precision", "compile") or value != "auto"}
    for name, value in given.items():
        if name not in CHANGEABLE and value != settings[name]:
            raise UserError(f"{flag(name)} {value}: the run in {folder} has {settings[name]!r}, and resuming cannot "
                            f"change it; leave it away, or start a new run")
    settings |= given | dict(out=str(folder))
    if parallel.world_size() == 1:
        be_alone(settings, given, stored["config"].balance_group)
    return fit_to_world(settings, given), stored, checkpoint


def be_alone(settings, given, group):
    """What several processes began, one goes on with: axes of one, and micro-batches that hold a balance group."""
    alone = {name: PLAN_OPTIONS[name].default for name in CUTS if name not in given and settings[name]}
    if "micro_batch" not in given:
        alone["micro_batch"] = max(settings["micro_batch"], group)
    changed = {name: value for name, value in alone.items() if settings[name] != value}
    if changed:
        print("one process goes on with", " ".join(f"{flag(name)} {value}" for name, value in changed.items()))
    settings.update(changed)


def fix_automatic(settings, device):
    """What `auto` becomes is stored, and kept on resume."""
    if settings["precision"] == "auto":
        settings["precision"] = parallel.auto_precision(device)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    settings["threads"] = torch.get_num_threads()


def fix_compiled(settings, plan, device):
    """--compile, from here on in this process; what `auto` becomes is stored, and kept on resume."""
    wanted = settings["compile"]
    why_not = compile_operators(wanted != "none", device)
    if wanted == "auto":
        settings["compile"] = "none" if why_not else "operators"
    elif why_not:
        raise UserError(f"--compile {wanted}: {why_not}; --compile none does without, also with --resume: the losses "
                        f"are then the same within rounding, no longer bit for bit")
    if wanted == "layers" and (plan.world_size > 1 or not plan.is_plain or plan.recompute or plan.swap):
        raise UserError("--compile layers is for one process without recompute and swap: use --compile operators")


def fit_plan(run):
    """--fit: the plan with what is to be recomputed and swapped, which goes into the settings too."""
    settings = run.settings
    match = re.fullmatch(r"(\d+\.?\d*) ?(GiB|MiB)", settings["fit"])
    if not match:
        raise UserError(f"--fit {settings['fit']}: write a number and GiB or MiB, e.g. 40GiB")
    budget = float(match[1]) * dict(GiB=2**30, MiB=2**20)[match[2]]
    if not settings["hardware"] and run.device.type != "cpu":
        raise UserError(f"--fit needs --hardware on {run.device}: one of {', '.join(sim.HARDWARE)}, or a JSON file")
    hardware = sim.CPU
    if settings["hardware"]:
        hardware = sim.read_preset("hardware", sim.Hardware, sim.HARDWARE, settings["hardware"])
    check_plan(run.config, run.plan, devices=parallel.world_size())
    found = sim.fit_memory(run.config, run.plan, hardware, budget)
    plan = Plan(**found["plan"])
    settings.update(recompute=plan.recompute, swap=plan.swap, fit="")     # a resumed run does not choose again
    chosen = "+".join(plan.recompute + plan.swap) or "nothing"
    print(f"--fit {match[0]}: {chosen} is recomputed or swapped, so it needs {found['mem_gib']:.2f} GiB (simulated, "
          f"with the costs of {hardware.name})")
    return plan


def with_vocabulary(config, encoding):
    """The config with room for an encoding; one that is learnt has at least all bytes and END."""
    needed = encoding.n_vocab if encoding else 257
    if needed <= config.vocab_size:
        return config
    return replace(config, vocab_size=math.ceil(needed / 64) * 64)


def refuse_lone_process(plan):
    needed = plan.pp * math.lcm(plan.dp * plan.cp * plan.tp, plan.ep)
    if parallel.world_size() == 1 and needed > 1:
        raise UserError(f"this plan needs {needed} processes, and this is the only one: start with torchrun "
                        f"--nproc-per-node {needed} train.py ...")


def refuse_unequal_ranks(run):
    """All ranks must have been given the same: each compares its settings with those of the first."""
    mine = run.settings | dict(set=repr(run.config), phases=repr(run.phases))
    mine.pop("threads")                                                   # machines may differ in these
    first = parallel.first_does(lambda: mine)
    differs = torch.tensor([float(mine[name] != value) for name, value in first.items()])
    names = [flag(name) for name, ranks in zip(first, parallel.all_sum(differs)) if ranks]
    if names:
        raise UserError(f"ranks were started with different {', '.join(sorted(names))}: start all with one command")


def order_of(run, phase):
    return Order(run.corpus, phase, 1 + run.config.num_nextn_predict_layers, run.settings["seed"])


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder


def open_folder(run):
    """The run's folder, ours until the process ends."""
    settings = run.settings
    folder = Path(settings["out"]) if settings["out"] else free_folder(settings["preset"])
    if not run.stored:
        refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run.lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{folder} is in use by another run: wait for it, or choose another --out") from None
    return folder


def contents(folder):
    """What a run left in its folder, but for its lock, files half written, and what was put aside."""
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if path.suffix != ".tmp" and not path.name.startswith((".lock", "aside_"))]


def refuse_foreign(folder):
    """A new run writes into a new folder, an empty one, or that of a run which never got to a checkpoint."""
    if newest(folder):
        raise UserError(f"{folder} already holds a run: --resume {folder} continues it, another --out starts one")
    begun = contents(folder)
    if folder.is_file() or (begun and folder / "config.json" not in begun):
        raise UserError(f"--out {folder}: there is something that is no run; choose a new folder")
    if begun:
        read_config(folder)                                               # refuses what train.py did not write


def put_aside(folder):
    """What a run left that was killed before its first checkpoint, its log above all."""
    begun = contents(folder)
    if begun:
        aside = folder / f"aside_{time.time():.0f}"
        aside.mkdir()
        for path in begun:
            path.rename(aside / path.name)
        print(f"{folder} held a run without a checkpoint: its log is now in {aside}")


def free_folder(preset):
    """runs/PRESET, or the first of runs/PRESET-2, -3, ... that is not there."""
    folder = Path("runs", preset)
    for number in itertools.count(2):
        if not folder.exists():
            return folder
        folder = Path("runs", f"{preset}-{number}")


def find_checkpoint(resume, typed="--resume"):
    """A run's folder, or one of its checkpoints -> (run's folder, its newest complete checkpoint, or the named one)."""
    # a folder is not a run's because it exists: what counts is a checkpoint, which has its name only when it is whole
    path, folder = Path(resume), folder_of(resume)
    steps = parallel.steps_in(folder / "ckpt")
    if path != folder and not path.is_dir():
        raise UserError(f"{typed} {resume}: no such checkpoint; complete ones: {steps}")
    if not steps:
        raise UserError(f"{typed} {resume}: no complete checkpoint in {folder / 'ckpt'}; start the run anew with --out")
    return folder, path if path != folder else newest(folder)


def folder_of(resume):
    """The run's folder that --resume means."""
    path = Path(resume)
    return path.parent.parent if path.name.startswith("step_") else path


def newest(folder):
    """The newest complete checkpoint of a run, or None."""
    steps = parallel.steps_in(folder / "ckpt")
    return folder / "ckpt" / f"step_{steps[-1]}" if steps else None


def read_config(folder):
    """config.json of a run, checked: `config` is a Config, `phases` are Phases, an older run's missing settings are the
    defaults."""
    path, options = folder / "config.json", OPTIONS | PLAN_OPTIONS
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} has no readable config.json: it is no run's folder") from None
    try:
        settings = {name: option.default for name, option in options.items()} | stored["settings"]
        settings = {name: settings[name] for name in options}             # none that went since
        given = {name: value for name, value in stored["given"].items() if name in options}
        with refusals(f"{path}: "):
            for name, value in [*settings.items(), *given.items()]:
                check_option(name, value, options[name])
            for name, kind in dict(sha256=str, end=int, pattern=str).items():
                check_setting(f"{name} of the corpus", stored["corpus"][name], kind)
            config = Config(**stored["config"])
            phases = [Phase(**row) for row in stored["phases"]]
            require(phases, "no phases: use at least one")
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not as train.py wrote it ({type(error).__name__}: {error}): give back the one "
                        f"that the run began with") from None
    return stored | dict(settings=settings, given=given, config=config, phases=phases)


def read_progress(checkpoint):
    """Where a checkpoint stands, once its files are found to be as they were written."""
    try:
        parallel.check_files(checkpoint)
    except parallel.CheckpointError as error:
        number = int(checkpoint.name.removeprefix("step_"))
        earlier = [step for step in parallel.steps_in(checkpoint.parent) if step < number]
        advice = "there is none before it: start a new run"
        if earlier:
            advice = f"go on from the one before it: --resume {checkpoint.parent / f'step_{earlier[-1]}'}"
        raise UserError(f"{error}; {advice}") from None
    progress = beginning()
    parallel.load_progress(checkpoint, progress)                          # in place
    return progress


def write_config(run, given, **facts):
    """config.json: all that a resumed run needs to know, and facts about where it ran."""
    facts |= dict(rules=RULES, config=dataclasses.asdict(run.config), plan=dataclasses.asdict(run.plan), given=given,
                  settings=run.settings | dict(resume=""), phases=[dataclasses.asdict(phase) for phase in run.phases],
                  corpus=run.corpus.facts, device=str(run.device), python=platform.python_version(),
                  torch=torch.__version__)
    write_whole(run.folder / "config.json", json.dumps(facts, indent=1))


def begin_folder(run):
    """config.json and the tokenizer, before the first step."""
    put_aside(run.folder)
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    write_config(run, run.given, commit=git.stdout.strip())
    save_encoding(run.corpus.encoding, run.folder / "tokenizer.tiktoken")
    write_whole(run.folder / "metrics.jsonl", "")


def continue_folder(run):
    """The same text as before; the log is cut back, checkpoints later than the one resumed from are put aside, and what
    --resume changed is stored, so that the next one need not be told."""
    now, before = run.corpus.facts["sha256"], run.stored["corpus"]["sha256"]
    if now != before:
        raise UserError(f"the text is not what {run.folder} began with (sha256 {now[:12]}, was {before[:12]}): give "
                        f"the old text with --data, or start a new run")
    cut_metrics(run.folder / "metrics.jsonl", run.progress["step"])
    given = {name: value for name, value in run.given.items() if name != "resume"}
    write_config(run, run.stored["given"] | given, commit=run.stored.get("commit", ""))
    for later in parallel.steps_in(run.folder / "ckpt"):
        if later > run.progress["step"]:
            aside = f"aside_{later}_{time.time():.0f}"
            (run.folder / "ckpt" / f"step_{later}").rename(run.folder / "ckpt" / aside)


def cut_metrics(path, step):
    """Leaves the lines up to this step; a line half written by a killed run goes too."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            continue
    write_whole(path, "".join(kept))


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
        # no more than a note: the step goes on, and ranks that were not asked learn of it from its sums
        self.asked = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        print(f"{self.asked}: finishing this step, then writing a checkpoint", flush=True)


def build(run, phase, checkpoint):
    """This rank's part of the model and its optimizer for a phase, as the checkpoint left them or as initialised.

    A parallel.Pipeline, which holds the model, its plan and its grid, and the optimizer.
    """
    settings = run.settings
    torch.manual_seed(settings["seed"])
    # 1. the model, of which this rank keeps its part before any memory is taken
    config = run.config if phase.rope_theta is None else replace(run.config, rope_theta=phase.rope_theta)
    with torch.device("meta"):
        model = Model(config)
    plan = replace(run.plan, seq_len=phase.seq_len)
    grid = parallel.parallelize(model, plan, run.device.type, timedelta(seconds=settings["timeout"]))
    model.to_empty(device=run.device)
    parallel.init_weights(model, settings["seed"])
    model.compute_dtype = torch.bfloat16 if settings["precision"] == "bf16" else None
    if settings["compile"] == "layers":
        compile_model(model)
    # 2. the optimizer; its rate is set at each step
    kind = parallel.HostAdamW if "optimizer" in plan.swap else torch.optim.AdamW
    optimizer = kind(parallel.param_groups(model), lr=0.0, eps=1e-8, fused=True,
                     betas=(settings["beta1"], settings["beta2"]), weight_decay=settings["weight_decay"])
    # 3. the past
    if checkpoint:
        parallel.restore(checkpoint, model, optimizer, run.progress, grid)
    if not plan.balance_live:
        run.progress.update(placement=[], expert_load=[])                 # would be out of date when it is turned on
    return parallel.Pipeline(model, plan, grid), optimizer


def pretrain(given):
    """Opens a run and trains it to its end, or until it is asked to stop."""
    with refusals():
        run = open_run(given)
    settings, progress, phases, checkpoint = run.settings, run.progress, run.phases, run.checkpoint
    depths = 1 + run.config.num_nextn_predict_layers
    document_end = run.corpus.end if settings["document_mask"] else None
    introduce(run)
    if is_done(run):
        print(f"{run.folder} is finished: {progress['step']} steps; --steps with a larger number trains on")
        return
    stop, stopped = Stopper(), False
    saver = parallel.Saver(run.folder / "ckpt", settings["keep"])
    # a line is written when it ends; rank 0 writes
    log = open(run.folder / "metrics.jsonl" if parallel.rank() == 0 else os.devnull, "a", buffering=1)
    total, first_token, busy = end_of(phases, len(phases) - 1), progress["tokens"], 0.0    # busy: seconds in steps

    while not is_done(run) and not stopped:
        phase = phases[progress["phase"]]
        phase_end = end_of(phases, progress["phase"])
        pipeline, optimizer = build(run, phase, checkpoint)
        model, plan, grid = pipeline.model, pipeline.plan, pipeline.grid
        order, flops = order_of(run, phase), flops_per_token(run.config, phase.seq_len)

        while progress["tokens"] < phase_end and not stopped:
            # 1. the batch: how many sequences, which, at what rate
            began = time.perf_counter()
            size = phase.batch(progress["phase_tokens"])
            windows = order.batch(progress["tokens"], size)[own_sequences(plan, size)]
            batch = examples(windows, depths, run.device, document_end)
            new_tokens = size * phase.seq_len
            progress["step"] += 1
            progress["tokens"] += new_tokens
            progress["phase_tokens"] += new_tokens
            lr = phase.learning_rate(progress["phase_tokens"])
            for group in optimizer.param_groups:
                group["lr"] = lr

            # 2. the step; tolist waits for the device, the only time
            measures, loads = train_step(pipeline, optimizer, batch, settings["clip"], stop.asked is not None)
            line = dict(step=progress["step"], tokens=progress["tokens"], lr=lr)
            line |= dict(zip(MEASURES, measures.tolist()))
            stopped = line.pop("stop") > 0                                # all ranks at the same step
            count_skips(run, line)
            line |= watch_loads(run, grid, optimizer, loads)

            # 3. the log; once in a while held-out text and checkpoint
            seconds = time.perf_counter() - began
            line |= speed(run, seconds, new_tokens, flops)
            if is_done(run) or is_due(settings["eval_every"], progress["step"]):
                line |= evaluate(pipeline, run.corpus, document_end)
            log.write(json.dumps(line) + "\n")
            if busy == 0 and settings["compile"] != "none":
                print(f"the first step, which compiled {settings['compile']}, took {seconds:.1f} s", flush=True)
            busy += seconds
            print_step(run, line, total, busy * (total - progress["tokens"]) / (progress["tokens"] - first_token))
            saver.poll()
            if is_due(settings["save_every"], progress["step"]) and progress["skipped_in_a_row"] == 0:
                save_finite(run, saver, model, optimizer, grid)

        # 4. the end of a phase or an early one: the next phase goes on from this checkpoint, in a model built for it
        if progress["tokens"] >= phase_end and not is_done(run):
            progress.update(phase=progress["phase"] + 1, phase_tokens=0)
        save_finite(run, saver, model, optimizer, grid)
        saver.wait()
        checkpoint = run.folder / "ckpt" / f"step_{progress['step']}"

    if parallel.rank() == 0:
        conclude(run, checkpoint)


def is_done(run):
    last = len(run.phases) - 1
    return run.progress["phase"] == last and run.progress["tokens"] >= end_of(run.phases, last)


def is_due(every, step):
    """Whether something falls on this step that is done every so many; 0: never."""
    return every > 0 and step % every == 0


def watch_loads(run, grid, optimizer, loads):
    """Record a step's loads (MoE layers, E), and let live balance see them and act: what the log tells of it."""
    if run.settings["record_loads"] and parallel.rank() == 0:
        record_loads(run.folder / "loads.npy", run.progress["step"], loads.cpu().numpy().astype(np.int32))
    if grid is None or not grid.live:
        return {}
    return grid.live.after_step(run.progress["step"], loads, optimizer)


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
    """Steps that were not finite: how many, and an end after too many in a row."""
    # line["skipped"] is 1 or 0 as the step gave it, and then the count that the log shows
    progress, most = run.progress, run.settings["max_skips"]
    progress["skipped_in_a_row"] = progress["skipped_in_a_row"] + 1 if line["skipped"] else 0
    progress["skipped"] += int(line["skipped"])
    line["skipped"] = progress["skipped"]
    if progress["skipped_in_a_row"] >= most:
        give_up(run, f"loss or gradient not finite {most} times in a row")


def save_finite(run, saver, model, optimizer, grid):
    """A checkpoint, but never one of weights that are not finite: the older ones that it would displace are better."""
    broken = sum((~torch.isfinite(parallel.local(weight))).any().float() for weight in model.parameters())
    if parallel.all_sum(broken).item():
        saver.wait()
        give_up(run, "weights are not finite")
    parallel.save(saver, model, optimizer, run.progress, grid)


def give_up(run, what):
    """Ends a run that cannot go on, and names the checkpoint from which it could: all that are kept are finite."""
    last = newest(run.folder)
    where = f"start anew, or from {last}," if last else "start anew"
    sys.exit(f"train.py: step {run.progress['step']}: {what}; {where} with a lower --lr")


# ---------------------------------------------------------------------------------------------------------------------
# Log and screen


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def speed(run, seconds, new_tokens, flops):
    """What the log tells of a step's time and memory. flops: of a token, forward and backward."""
    rate = new_tokens / seconds
    peak = run.settings["peak_tflops"] * 1e12 * parallel.world_size()
    return dict(step_ms=seconds * 1e3, tokens_per_s=rate, mfu=rate * flops / peak if peak else None,
                mem_gib=parallel.peak_memory(run.device) / 2**30)


def print_step(run, line, total, seconds_left):
    text = "step {step} ({share:.1%})  loss {loss:.4f}  mtp {mtp_loss:.4f}  aux {aux_loss:.4f}  norm {grad_norm:.2f}  "
    text += "lr {lr:.1e}  {step_ms:.0f} ms  {tokens_per_s:,.0f} tokens/s  {mem_gib:.2f} GiB  max_vio {max_vio:.2f}  "
    text += "left {left}"
    if line["mfu"]:
        text += f"  MFU {line['mfu']:.1%} of {run.settings['peak_tflops']:g} TFLOP/s"
    if line["skipped"]:
        text += "  skipped {skipped}"
    share, left = min(1, line["tokens"] / total), clock(max(0, seconds_left))
    print(text.format(**line, share=share, left=left), flush=True)
    if "val_bpb" in line:
        facts = run.corpus.facts
        ours = line["val_bpb"] * facts["heldout_bytes"] / 8               # bytes that an arithmetic coder would need
        print(f"held-out: {line['val_bpb']:.4f} bits per byte, {ours / facts['xz']:.3f} of xz -9, "
              f"{ours / facts['gzip']:.3f} of gzip -9", flush=True)


def introduce(run):
    """What will be trained, on what."""
    counts, facts, settings = count_params(run.config), run.corpus.facts, run.settings
    total, active, mtp = (f"{counts[part] / 1e6:.2f}M" for part in ("total", "active", "mtp"))
    print(f"{run.folder}: {settings['preset']} on {run.device}, {settings['precision']}, {settings['threads']} threads"
          f"; {total} parameters, {active} active; MTP {mtp} more")
    print(f"text: {facts['files']} files, sha256 {facts['sha256'][:12]}, {facts['train_bytes']:,} bytes to train on, "
          f"{facts['heldout_bytes']:,} held out (gzip -9 {facts['gzip']:,}, xz -9 {facts['xz']:,}), tokens "
          f"{facts['tokens']}")
    for phase in run.phases:
        print(phase, flush=True)
    if run.checkpoint:
        print(f"resumed from {run.checkpoint}", flush=True)


def conclude(run, checkpoint):
    """How to go on with a run that was stopped; a sample of text from one that is done."""
    if not is_done(run):
        print(f"stopped after step {run.progress['step']}; go on with: python train.py pretrain --resume {run.folder}")
        return
    try:
        text = continue_text(dict(init=str(checkpoint), prompt="def ", device=run.settings["device"]))
    except RuntimeError as error:                                         # a model that fits on several devices only
        print(f"no sample: {str(error).splitlines()[0]}")
        return
    write_whole(run.folder / "sample.txt", text)
    print(f"a sample ({run.folder / 'sample.txt'}; more: python train.py sample --init {run.folder}):\n{text}")


# ---------------------------------------------------------------------------------------------------------------------
# Commands

SAMPLE_OPTIONS = dict(
    init=option("", "the run's folder or one of its ckpt/step_N"),
    prompt=option("", "text to continue; default: the beginning of a document"),
    new_tokens=option(200, "tokens to write", least=0, most=10**9),
    temperature=option(0.8, "below 0.01: always the likeliest token", least=0, most=100),
    top_k=option(0, "choose among the k likeliest; 0: all", least=0, most=2**31),
    top_p=option(0.95, "choose among the likeliest that hold this probability together", least=0.001, most=1),
    seed=option(0, "of the choice", least=0, most=2**63 - 1),
    device=OPTIONS["device"],
)


def sample(given):
    with refusals():
        print(continue_text(given))


def open_model(init, device):
    """--init -> (the model of a checkpoint, its tokenizer, END's id)."""
    # as its last phase left it; it sees no more text than it was trained on
    folder, checkpoint = find_checkpoint(init, "--init")
    stored, progress = read_config(folder), read_progress(checkpoint)
    has_begun = progress["phase_tokens"] > 0                              # else the phase before it was the last
    phase = stored["phases"][max(0, progress["phase"] - (not has_begun))]
    config = stored["config"]
    config = replace(config, rope_theta=phase.rope_theta or config.rope_theta, max_position_embeddings=phase.seq_len)
    model = Model(config).to(device)
    parallel.load_state(checkpoint, dict(model=model.state_dict()))
    end = stored["corpus"]["end"]
    return model, load_encoding(folder / "tokenizer.tiktoken", stored["corpus"]["pattern"], end), end


def continue_text(given):
    """The prompt, and what the model of a checkpoint writes after it. given: some of SAMPLE_OPTIONS."""
    settings = {name: option.default for name, option in SAMPLE_OPTIONS.items()} | given
    if not settings["init"]:
        raise UserError("sample needs --init RUN, a run's folder")
    device = parallel.pick_device(settings["device"])
    model, encoding, end = open_model(settings["init"], device)
    prompt = os.fsencode(settings["prompt"]).decode(errors="replace")     # as the terminal gave it
    ids = torch.tensor([[end, *encoding.encode_ordinary(prompt)]], device=device)
    how = {name: settings[name] for name in ("new_tokens", "temperature", "top_k", "top_p", "seed")}
    if how["temperature"] < 0.01:
        how["temperature"] = 0                                            # so near to it that a division overflows
    ids = generate(model, ids, **how)
    known = [i for i in ids[0, 1:].tolist() if i <= end]                  # the model may have more rows than tokens
    return encoding.decode_bytes(known).decode(errors="replace")


class Command(typing.NamedTuple):
    function: typing.Callable              # takes what was typed, by name
    options: dict
    text: str


COMMANDS = dict(
    pretrain=Command(pretrain, OPTIONS | PLAN_OPTIONS, "train on text (the command that is meant if none is given)"),
    sample=Command(sample, SAMPLE_OPTIONS, "write text"),
)


def parse(argv):
    """-> (the command's function, dict of what was typed)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        words = commands.add_parser(name, help=command.text, allow_abbrev=False)
        plan = words.add_argument_group("plan", "how the model is cut and run: see Plan in sim.py")
        for option_name, option in command.options.items():
            add_option(plan if option_name in PLAN_OPTIONS else words, option_name, option)
    if not argv or argv[0] not in (*COMMANDS, "-h", "--help"):
        argv = ["pretrain", *argv]
    typed = vars(parser.parse_args(argv))
    command = COMMANDS[typed.pop("command")]
    with refusals():
        given = {name: read_setting(name, words, command.options[name]) for name, words in typed.items()}
    return command.function, given


def add_option(parser, name, option):
    """A flag, with range and default in its help."""
    notes = []
    if "choices" in option.allowed:
        notes.append(" | ".join(map(str, option.allowed["choices"])))
    for word in ("least", "most"):
        if word in option.allowed:
            notes.append(f"at {word} {option.allowed[word]:g}")
    if option.default not in ([], "", ()):
        notes.append(f"default {option.default}")
    text = f"{option.text} ({'; '.join(notes)})" if notes else option.text
    # --set a=1 --set b=2 is both
    several = dict(nargs="+", action="extend") if isinstance(option.default, list) else {}
    parser.add_argument(flag(name), default=argparse.SUPPRESS, help=text, **several)


def stray_variable():
    """One of torchrun's variables, where torchrun did not start this process: it would wait for ranks that are not
    there, or train as one of several. Else None."""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        for name, alone in dict(RANK="0", WORLD_SIZE="1").items():
            if os.environ.get(name, alone) != alone:
                return f"{name}={os.environ[name]}"
    return None


def main(argv=None):
    stray = stray_variable()
    if stray:
        print(f"train.py: {stray} is set, but no torchrun: start with torchrun --nproc-per-node N train.py ..., or "
              f"unset it", file=sys.stderr)
        sys.exit(2)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")   # DCP tells that there is one process
    if parallel.rank() > 0:
        sys.stdout = open(os.devnull, "w")                                # rank 0 speaks for all
    handlers = [(number, signal.getsignal(number)) for number in Stopper.signals]
    try:
        command, given = parse(sys.argv[1:] if argv is None else argv)
        command(given)
        parallel.leave_world()
    except (UserError, parallel.CheckpointError, OSError) as error:
        advice = "; make room, then --resume the run" if isinstance(error, parallel.SaveFailed) else ""
        shared = isinstance(error, UserError)                             # what was typed, all ranks refuse
        if parallel.rank() == 0 or not shared:
            print(f"train.py: {error}{advice}", file=sys.stderr)
        if shared:
            parallel.leave_world()
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
