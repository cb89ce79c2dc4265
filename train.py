"""
Trains a model of model.py on text: data, tokenizer, phases, one visible loop, checkpoints, logs.

    python train.py                                        # pre-trains `tiny` on real text, on whatever device is there
    python train.py pretrain --preset small --data DIR_OR_FILES --out runs/a --steps 2000 --set aux_loss_alpha=0.001
    python train.py pretrain --resume runs/a               # continues exactly
    torchrun --nproc-per-node 4 train.py --ep 4 --node-size 2 --dispatch hierarchical   # --resume may take another plan
    python train.py pretrain --init runs/a                 # a new run from its weights, or from a Hugging Face folder's
    python train.py sample --init runs/a --prompt "def " --draft 2    # or --file, a pipe, or line by line at a terminal
    python train.py export --init runs/a --out HF_DIR      # a Hugging Face folder

In this order: settings, tokenizer, files of text, corpus, phases, data order, one step, held-out text, a run and how it
is opened, weights to begin with, the run's folder, the loop, log and screen, commands. Everything that a step needs is
a function of (settings, tokens seen so far): which phase, how many sequences, which learning rate, which windows of
text. So a resumed run is the same run.

A run's folder holds config.json, metrics.jsonl (a line a step), tokenizer.tiktoken, ckpt/step_N, sample.txt and, with
--record-loads 1, loads.npy, which tests/bench_balance.py replays. The tokens of a corpus lie beside the runs, in
data-HASH: HASH is of the files' names, sizes and times and of the tokenizer.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)                          # Ctrl-C while the rest is imported

import argparse
import base64
import bisect
import codecs
import collections
import contextlib
import dataclasses
import fcntl
import gc
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
import subprocess
import sys
import sysconfig
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch

import parallel
import sim
from model import (IN_TRANSFORMERS, PRESETS, Config, Model, check_setting, check_settings, compile_model,
                   compile_operators, config_to_hf, count_params, divisors, flops_per_token, generate, require, setting)
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


class Option:
    """A setting. The type of its default is its kind; a list takes several words, a tuple is one of Plan's lists. text
    is for --help; allowed: least, most, choices, see model.check_setting. A number that declares none is above 0."""

    def __init__(self, default, text, **allowed):
        self.default, self.text, self.allowed = default, text, allowed


OPTIONS = dict(
    # model
    preset=Option("tiny", "size of the model", choices=tuple(PRESETS)),
    set=Option([], "KEY=VALUE of Config, e.g. aux_loss_alpha=0.001 rope_theta=1e5; with --init what owns no tensor"),
    init=Option("", "begin with the weights, shape and tokenizer of a run's folder, one of its ckpt/step_N, or a "
                    "Hugging Face folder"),
    average=Option(1, "with --init RUN: the mean of its newest N checkpoints, in place of the newest"),
    mtp_depth=Option(0, "with --init: MTP layers; those that it lacks begin as copies of its last one; 0: as many as "
                        "it has", least=0, most=64),
    train=Option("all", "what learns: MTP layers alone (mtp), or all but them (trunk), with the rest frozen",
                 choices=("all", "mtp", "trunk")),
    # data
    data=Option([], "files or folders, each may be NAME=PATH for the mix of a phase; default: Python's own standard "
                    "library"),
    text_field=Option("text", "key of the text in a .jsonl line"),
    tokenizer=Option("learn", "learn (from the training text) | gpt2 | cl100k_base | o200k_base | FILE.tiktoken"),
    heldout=Option(0.02, "share of the text held out, at most 8 MiB: every n-th piece of up to 64 KiB, files in the "
                         "order of a hash of their names; 0: nothing", least=0, most=0.5),
    document_mask=Option(0, "1: attention, and MTP, do not cross document boundaries", choices=(0, 1)),
    # run
    record_loads=Option(0, "1: write loads.npy, the copies that each expert got: steps x layers x experts",
                        choices=(0, 1)),
    out=Option("", "the run's folder; default: runs/PRESET, or the first free runs/PRESET-N"),
    resume=Option("", "a run's folder or one of its ckpt/step_N: continue exactly"),
    seed=Option(0, "of weights and data order", least=0, most=2**63 - 1),
    device=Option("auto", "auto | cpu | cuda | npu"),
    threads=Option(0, "CPU threads; 0: torch's choice, stored with the run", least=0, most=1024),
    save_every=Option(500, "steps between checkpoints; one is always written at the end, 0: only that", least=0),
    keep=Option(3, "newest checkpoints kept"),
    keep_growing=Option(0, "1: beside them the first one of steps 1, 2-3, 4-7, 8-15, ..., so that a run's past can be "
                           "studied (tests/report.py)", choices=(0, 1)),
    eval_every=Option(0, "steps between evaluations on the whole held-out text; 0: at the end only. With "
                         "capacity_factor, padding of the last batch takes experts' room too", least=0),
    timeout=Option(45, "seconds in a collective until a rank that does not answer counts as lost and the run ends",
                   least=1, most=10**6),
    max_skips=Option(5, "steps in a row with a loss or gradient that is not finite, before the run stops"),
    fit=Option("", "e.g. 40GiB: recompute and swap what makes the run fit at the least simulated cost; stored with the "
                   "run"),
    hardware=Option("", "for --fit: preset of sim.py, or file of tests/calibrate.py; on a CPU: generic numbers"),
    peak_tflops=Option(0.0, "peak of the device in TFLOP/s, for MFU; 0: MFU is not reported", least=0),
    # optimisation
    steps=Option(1000, "optimizer steps at the full batch; sets the tokens of the run"),
    tokens=Option(0.0, "tokens of the run, in place of --steps; those of --phases are scaled", least=0,
                  most=1e15),
    phases=Option("", "FILE, a JSON list of objects with the keys of Phase in train.py, or an object with such a list "
                      "as `phases`; --tokens, --seq-len, --global-batch and --lr scale it"),
    lr=Option(3e-4, "highest learning rate"),
    min_lr=Option(0.1, "final learning rate as a share of --lr", least=0, most=1),
    decay=Option("cosine", "the learning rate after its warm-up", choices=("cosine", "constant")),
    warmup_steps=Option(0, "steps over which the learning rate rises, at the full batch", least=0),
    weight_decay=Option(0.1, "of every tensor, gains of norms included (as PU's figures of falling gains show)",
                        least=0, most=100),
    beta1=Option(0.9, "of AdamW", least=0, most=0.99999),
    beta2=Option(0.95, "of AdamW", least=0, most=0.99999),
    clip=Option(1.0, "the global gradient norm is cut to this; 0: it is not", least=0),
    compile=Option("auto", "by torch.compile: operators (norms, SwiGLU: what a device gains by) | layers (whole ones, "
                           "for one process without recompute and swap, not in rl); auto: operators, on a GPU layers "
                           "where they can be, if it works here, which takes a C++ compiler or a GPU's Triton",
                   choices=("auto", "none", "operators", "layers")),
    precision=Option("auto", "auto: bf16 with fp32 master weights, fp32 on a CPU without AMX",
                     choices=("auto", "fp32", "bf16")),
)
PRETRAIN_ONLY = "preset text_field tokenizer document_mask phases train mtp_depth".split()
PLAN_DEFAULTS = dict(micro_batch=8, global_batch=32, seq_len=256)
PLAN_OPTIONS = {field.name: Option(PLAN_DEFAULTS.get(field.name, field.default), field.metadata["text"],
                                   **field.metadata["allowed"])
                for field in dataclasses.fields(Plan) if field.name != "precision"}
RECIPES = dict(   # what a preset trains with, where the command line does not say; ours, not published
    tiny=dict(steps=800, lr=6e-3, min_lr=0.02, warmup_steps=30, seq_len=256, global_batch=8, micro_batch=8),
    small=dict(steps=10000, lr=6e-4, warmup_steps=500, seq_len=2048, global_batch=64, micro_batch=8),
)
# what --resume lets one change; with --data the text must be the same
CHANGEABLE = set("out data steps tokens save_every keep keep_growing eval_every device threads peak_tflops max_skips "
                 "timeout record_loads fit hardware resume compile".split())
CHANGEABLE |= set(PLAN_OPTIONS) - {"global_batch", "seq_len"}
# what describes many processes, and means nothing for one
CUTS = ("pp", "dp", "cp", "tp", "sp", "ep", "vpp", "schedule", "overlap", "layer_split", "balance_live")
RULES = 3                                  # raised when the same settings come to mean another run


def flag(name):
    return "--" + name.replace("_", "-")


def typed_as(settings):
    return " ".join(f"{flag(name)} {' '.join(value) if isinstance(value, list) else value}"
                    for name, value in settings.items())


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


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
    # `--init "$RUN"` with RUN not set; an empty prompt is one, an empty list of the plan too
    require("" not in (words if kind is list else [words]) or name == "prompt" or kind is tuple,
            f"{flag(name)} is empty: give a value, or leave it away")
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


def defaults_of(options):
    return {name: option.default for name, option in options.items()}


def settings_of(given, options={}, recipe=None):
    """All settings, options among them: what was given, else the recipe of the stage or preset, else the default."""
    if recipe is None:
        recipe = {} if given.get("init") else RECIPES.get(given.get("preset", "tiny"), {})
    settings = defaults_of(OPTIONS | PLAN_OPTIONS | options) | recipe | given
    settings["set"] = recipe.get("set", []) + given.get("set", [])
    return fit_to_world(settings, given)


def fit_to_world(settings, given, group=1):
    """What is not given follows from the number of processes.

    dp takes those there are, and a micro-batch is no more than a rank's share, e.g. with 4 processes and --tp 2: dp=2;
    of a global batch of 12 each takes 6, so that a micro-batch of 8 becomes 6. What several processes began, fewer go
    on with: axes of one if it is one, and micro-batches of all ranks that hold a balance group.
    """
    if parallel.world_size() == 1:
        settings |= {name: PLAN_OPTIONS[name].default for name in CUTS if name not in given}
    if "dp" not in given:
        settings["dp"] = max(1, parallel.world_size() // (settings["pp"] * settings["cp"] * settings["tp"]))
    if "micro_batch" not in given:
        most = max(settings["micro_batch"], group // settings["dp"])
        share = max(1, settings["global_batch"] // settings["dp"])
        settings["micro_batch"] = max(n for n in divisors(share) if n <= most)
    return settings


def make_config(settings, config=None):
    """The config of --init, or of the preset, with what --set changes."""
    config = config or PRESETS[settings["preset"]]
    by_name = {field.name: field for field in dataclasses.fields(Config)}
    changes = {}
    for pair in settings["set"]:
        key, equals, word = pair.partition("=")
        if key not in by_name or not equals:
            raise UserError(f"--set {pair}: write KEY=VALUE with a key of Config, such as {sim.nearest(key, by_name)}")
        changes[key] = read_word(word, by_name[key].type)
    with refusals("--set: "):
        return replace(config, **changes)


def make_plan(settings):
    return Plan(**{name: settings[name] for name in PLAN_OPTIONS}, precision=settings["precision"])


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE, always run by tiktoken

# Words for BPE, in cl100k_base's manner: letters with one sign before them, a digit, signs, line ends, spaces. Digits
# stand alone, so that sums can be learnt: 0.9 % more tokens of Python's library.
PATTERN = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END = "<|endoftext|>"
ROLES = dict(system="<|system|>", user="<|user|>", assistant="<|assistant|>")
TURN_END, THINK, THINK_END = "<|end_of_turn|>", "<|think|>", "<|/think|>"
# for conversations, in vocabularies without special tokens of their own; no text is encoded as one of them
RESERVED = (*ROLES.values(), TURN_END, THINK, THINK_END, *(f"<|reserved_{number}|>" for number in range(10)))
LEARN_FROM = 16 << 20                      # characters of training text that a vocabulary is learnt from
MOST_RANK = 1 << 24                        # in a vocabulary
LONGEST = 32                               # characters of a word there: text without breaks is cut
MOST_LETTERS = 1 << 20                     # of all different words together, which bounds the time: Python has 640,000


def learn_bpe(texts, vocab_size):
    """Byte-level BPE -> {bytes: rank}, vocab_size - 1 of them (one id is END's).

    Repeatedly merges the most frequent pair of neighbours inside words. Words are counted once; a merge visits only the
    words that hold its pair, and a heap with stale entries finds the next one.
    """
    occurrences = collections.Counter()
    for text in texts:
        occurrences.update(regex.findall(PATTERN, text))
    # each different word once, as ids of its bytes, and how often it occurs; the most frequent ones first
    pieces = collections.Counter()
    for word, n in occurrences.items():
        for start in range(0, len(word), LONGEST):
            pieces[word[start:start + LONGEST]] += n
    by_number = sorted(pieces.items(), key=lambda item: (-item[1], item[0]))
    room = itertools.accumulate((len(word) for word, _ in by_number), initial=0)
    words = [(list(word.encode()), n) for (word, n), before in zip(by_number, room) if before < MOST_LETTERS]
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
    for new in sim.with_progress("learning a vocabulary", range(256, vocab_size - 1)):
        pair = next_pair(heap, pair_counts, vocabulary, known)
        if pair is None:
            break
        vocabulary.append(vocabulary[pair[0]] + vocabulary[pair[1]])
        known.add(vocabulary[new])
        for other in merge_pair(words, pair, new, pair_counts, words_with):
            heapq.heappush(heap, (-pair_counts[other], other))
    return {token: rank for rank, token in enumerate(vocabulary)}


def next_pair(heap, pair_counts, vocabulary, known):
    """Takes the most frequent pair off the heap, or None; what is stale there, or makes known bytes, goes too."""
    while heap:
        n, pair = heapq.heappop(heap)
        is_stale = n == 0 or -n != pair_counts[pair]
        if not is_stale and vocabulary[pair[0]] + vocabulary[pair[1]] not in known:
            return pair
    return None


def merge_pair(words, pair, new, pair_counts, words_with):
    """Replaces the pair by the id `new` in all words -> pairs whose counts changed."""
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
    return changed


def replaced(word, pair, new):
    """The word with each occurrence of the pair, from the left, replaced by one id."""
    out = []
    for i in word:
        if out and (out[-1], i) == pair:
            out[-1] = new                                                 # never part of a pair itself: it is too new
        else:
            out.append(i)
    return out


def make_encoding(ranks, pattern=PATTERN, special=None):
    """{bytes: rank} -> tiktoken.Encoding. special: {word: id}; by default END and RESERVED follow the highest rank."""
    if special is None:
        special = {word: id for id, word in enumerate((END, *RESERVED), start=max(ranks.values()) + 1)}
    return tiktoken.Encoding("learnt", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def save_encoding(encoding, path):
    """tiktoken's own file format: a line of base64 and rank a token."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks_of(encoding)]
    write_whole(path, "".join(lines))


def ranks_of(encoding):
    """[(bytes, rank), ...] by rank."""
    return sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])


def load_encoding(path, pattern=PATTERN, special=None):
    """The encoding of a file that save_encoding, or tiktoken, wrote."""
    ranks = {}
    try:
        lines = Path(path).read_bytes().splitlines()
        for line in lines:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    except (OSError, ValueError):
        raise UserError(f"--tokenizer {path}: no tiktoken file here; use learn, gpt2, cl100k_base, o200k_base or a "
                        f"file of base64 and rank a line") from None
    numbers = sorted(set(ranks.values()))
    is_whole = len(numbers) == len(lines) and all(bytes([i]) in ranks for i in range(256))
    if not is_whole or numbers[0] < 0 or numbers[-1] > MOST_RANK:
        raise UserError(f"--tokenizer {path}: use a file where each single byte has a rank, nothing stands twice, and "
                        f"ranks go from 0 to at most {MOST_RANK}")
    return make_encoding(ranks, pattern, special)


def ids_of(encoding):
    """The set of all its ids: there may be gaps between them, and a model may have more rows than its tokenizer ids."""
    return {*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()}


def facts_of(encoding):
    """What a tokenizer.tiktoken does not hold, stored with a corpus; encoding_in reads both."""
    return dict(end=encoding.eot_token, special=encoding._special_tokens, pattern=encoding._pat_str)


def encoding_in(folder, facts):
    return load_encoding(folder / "tokenizer.tiktoken", facts["pattern"], facts["special"])


def find_encoding(name):
    """Of --tokenizer: None if it is to be learnt from the text."""
    if name == "learn":
        return None
    if name not in tiktoken.list_encoding_names():
        return load_encoding(name)
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:                                            # requests', or the socket's own
        raise UserError(f"--tokenizer {name} is not here and could not be downloaded ({type(error).__name__}): set "
                        f"TIKTOKEN_CACHE_DIR to a folder that has it, or use learn") from None


def byte_letters():
    """The letter of each byte in a tokenizer.json: printable ones are themselves, others follow from 256 on."""
    letters, others = [], 0
    for byte in range(256):
        is_itself = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte
        letters.append(chr(byte if is_itself else 256 + others))
        others += not is_itself
    return letters


def encoding_of_folder(folder):
    """A byte-level BPE tokenizer.json as tiktoken.Encoding; UserError for what tiktoken would cut in another way."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        config = folder / "tokenizer_config.json"
        end = json.loads(config.read_text(encoding="utf-8")).get("eos_token") if config.exists() else END
        return encoding_from_json(content, end.get("content") if isinstance(end, dict) else end)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        why = str(error).partition("\n")[0] if isinstance(error, (OSError, ValueError)) else type(error).__name__
        raise UserError(f"{folder / 'tokenizer.json'} is no byte-level BPE that tiktoken can run ({why}): give its "
                        f"FILE.tiktoken, or gpt2, cl100k_base or o200k_base, to --tokenizer") from None


def encoding_from_json(content, end):
    """content: of tokenizer.json. end: the token between documents, which is called END here."""
    model, byte_of = content["model"], {letter: byte for byte, letter in enumerate(byte_letters())}
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    require(end in special, f"{end!r}, its eos_token, is none of its added_tokens")
    require(not content["normalizer"], "it has a normalizer")
    # 1. ids: tiktoken merges the pair whose token has the lowest id, so ids must rise in the order of merges
    ranks = {bytes(byte_of[letter] for letter in token): id for token, id in model["vocab"].items()
             if token not in special}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merged = [model["vocab"][left + right] for left, right in pairs]
    require(merged == sorted(merged), "its ids do not follow its merges")
    made = {*merged, *(id for token, id in ranks.items() if len(token) == 1)}
    require(set(ranks.values()) == made, "some of its tokens are made by no merge")
    require(all(bytes([byte]) in ranks for byte in range(256)), "it lacks some bytes")
    # 2. the words that it merges inside of
    special[END] = special.pop(end)
    ids = [*ranks.values(), *special.values()]
    are_numbers = all(type(id) is int and 0 <= id < 2**31 for id in ids)
    require(are_numbers and len(set(ids)) == len(ids), "its ids are no numbers, or twice")
    encoding = make_encoding(ranks, words_of(content["pre_tokenizer"]), special)
    # tiktoken leaves out what its pattern does not match
    letters = "".join(map(chr, range(0x3000)))
    require(encoding.decode(encoding.encode_ordinary(letters)) == letters, "its pattern does not match all text")
    return encoding


def words_of(pre_tokenizer):
    """The pattern of a tokenizer.json; ByteLevel alone has GPT-2's."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    require(steps[-1]["type"] == "ByteLevel" and not steps[-1]["add_prefix_space"], "it is not byte-level")
    if len(steps) == 1 and steps[0]["use_regex"]:
        return GPT2_PATTERN
    require(len(steps) == 2 and steps[0]["type"] == "Split" and not steps[1]["use_regex"] and not steps[0]["invert"]
            and steps[0]["behavior"] == "Isolated", "it finds words by more than one pattern")
    return steps[0]["pattern"]["Regex"]


def tokenizer_files(encoding):
    """What transformers needs for the same ids: the contents of two JSON files."""
    letters, ranks = byte_letters(), ranks_of(encoding)
    written = {token: "".join(letters[byte] for byte in token) for token, _ in ranks}
    merges = []
    for token, _ in ranks:                                                # all ways to make it, for tiktoken takes any
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [[written[a], written[b]] for a, b in halves if a in written and b in written]
    special = [dict(id=id, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
               for name, id in sorted(encoding._special_tokens.items(), key=lambda item: item[1])]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type="Split", pattern=dict(Regex=encoding._pat_str), behavior="Isolated", invert=False)
    model = dict(type="BPE", vocab={written[token]: rank for token, rank in ranks}, merges=merges, ignore_merges=True,
                 dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                 fuse_unk=False, byte_fallback=False)
    tokenizer = dict(version="1.0", truncation=None, padding=None, added_tokens=special, normalizer=None,
                     pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]), post_processor=None,
                     decoder=byte_level, model=model)
    return {"tokenizer.json": tokenizer,
            "tokenizer_config.json": dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=END, eos_token=END)}


# ---------------------------------------------------------------------------------------------------------------------
# Conversations: a template of roles and turns, by ids that a learnt vocabulary reserves
#
#   END <|system|> ... <|end_of_turn|>
#       <|user|> ... <|end_of_turn|>
#       <|assistant|> <|think|> ... <|/think|> ... <|end_of_turn|>
#
# The structure is the openPangu family's: a system turn is always there, if need be an empty one, and thinking is slow
# unless the user's words end with NO_THINK; then, and where no thinking was written, its part is empty.

NO_THINK = " /no_think"


def special_id(encoding, name):
    try:
        return encoding.encode_single_token(name)
    except KeyError:
        raise UserError(f"the tokenizer has no {name}, which conversations need: start from a model with a vocabulary "
                        f"that train.py learnt") from None


def check_messages(messages):
    """ValueError for what is no conversation that teaches: words of known roles, the assistant's not empty."""
    require(isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages),
            "no messages: write a list of objects with role and content, or in its place prompt and response")
    for message in messages:
        require(message.get("role") in [*ROLES], f"role {message.get('role')!r}: use {', '.join(ROLES)}")
        for part, words in dict(content=message.get("content"), thinking=message.get("thinking", "")).items():
            require(isinstance(words, str), f"{part} of {message['role']} is no text: put it in quotes")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    require(answers, "no turn of the assistant, so nothing to learn")
    require(all(answer.strip() for answer in answers), "an answer of the assistant is empty")


def conversation(encoding, messages):
    """messages -> (ids, whether each is trained on): the assistant's words and the end of its turns."""
    ids, counted = [encoding.eot_token], [False]
    if messages[0]["role"] != "system":
        messages = [dict(role="system", content=""), *messages]
    for before, message, after in zip([{}, *messages], messages, [*messages[1:], {}]):
        words, is_answer = message["content"], message["role"] == "assistant"
        if is_answer:
            fast = before.get("content", "").endswith(NO_THINK)
            thinking = "" if fast else message.get("thinking", "")
            said = [special_id(encoding, THINK), *encoding.encode_ordinary(thinking), special_id(encoding, THINK_END)]
        else:
            said = []
            answered_fast = after.get("role") == "assistant" and not after.get("thinking", "").strip()
            if message["role"] == "user" and answered_fast and not words.endswith(NO_THINK):
                words += NO_THINK
        said += [*encoding.encode_ordinary(words), special_id(encoding, TURN_END)]
        ids += [special_id(encoding, ROLES[message["role"]]), *said]
        counted += [False] + [is_answer] * len(said)
    return ids, counted


def question(encoding, words):
    """The ids after which the assistant speaks."""
    ids, _ = conversation(encoding, [dict(role="user", content=words)])
    return [*ids, special_id(encoding, ROLES["assistant"])]


def answer_of(encoding, ids):
    """What the assistant said, without its thinking and the end of the turn; None if it is not in the format."""
    think, think_end, turn_end = (special_id(encoding, name) for name in (THINK, THINK_END, TURN_END))
    if ids[:1] != [think] or ids[-1:] != [turn_end] or ids.count(think) != 1 or ids.count(think_end) != 1:
        return None
    try:
        return encoding.decode(ids[ids.index(think_end) + 1:-1])
    except KeyError:                                                      # a row of the model that is no token
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Files of text: --data -> files -> pieces, some of them held out

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go",
                 ".rs", ".rb", ".sh", ".sql", ".tex", ".html", ".css", ".jsonl")
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", ".git"}     # folders
RUN_FILES = {"config.json", "metrics.jsonl"}          # in a folder, they say that it is a run's
PIECE = 1 << 16                            # characters, or tokens, that are read and encoded at a time
HELDOUT_BYTES = 8 << 20                    # at most, so that an evaluation takes a bounded time
LEAST_FOR_XZ = 8 << 10                     # held-out bytes below which xz's own frame would make its share meaningless


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
    files, skipped = [], collections.Counter()
    for word in data or [sysconfig.get_path("stdlib")]:
        source, equals, path = word.partition("=")
        if not equals or Path(word).exists():
            source, path = "text", word
        if not re.fullmatch("[A-Za-z0-9_-]+", source) or source == "heldout":
            raise UserError(f"--data {word}: {source!r} names the source; use letters, digits, - and _, not heldout")
        path = Path(path)
        if path.is_dir():
            root, found = path, sorted(walk(path, skipped))
        elif path.is_file():
            root, found = path.parent, [path]
        else:
            raise UserError(f"--data {path}: no such file or folder")
        if not found:
            raise UserError(f"--data {path}: this folder has no text; what is read there: {' '.join(TEXT_SUFFIXES)}")
        files += [TextFile(source, str(file.relative_to(root)), file) for file in found]
    if skipped and data:
        kinds = ", ".join(f"{n} {ending or 'without ending'}" for ending, n in skipped.most_common(8))
        print(f"--data: {skipped.total()} files are no text by their endings and are left out: {kinds}")
    return sorted(files, key=lambda file: (hashlib.sha256(os.fsencode(file.name)).digest(), file.name))


def walk(folder, skipped):
    """Files of text below a folder, linked folders too, but not those of tests, packages, runs and the like. skipped:
    Counter of the endings of what is there and is no text."""
    seen = set()                                                          # a link may lead back to where it lies
    for here, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(here)
        if place in seen or RUN_FILES <= set(names):
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(set(folders) - LEFT_OUT)
        for name in names:
            path = Path(here, name)
            if not name.lower().endswith(TEXT_SUFFIXES):
                skipped[path.suffix] += 1
            elif path.is_file():                                          # a pipe would be waited for
                yield path


def pieces_of(files, settings, encoding=None):
    """All text in Pieces. Held out is the second of every n, where n = 1 / --heldout, or more for a large text."""
    total = sum(file.path.stat().st_size for file in files)               # bytes
    share = min(settings["heldout"], HELDOUT_BYTES / max(1, total))
    every = round(1 / share) if share else 0
    number = 0
    for file in files:
        with utf8(file.path):
            for content, ends in contents_of(file.path, settings["text_field"], encoding):
                yield Piece(file, content, ends, is_heldout=every > 0 and number % every == 1)
                number += 1


@contextlib.contextmanager
def utf8(path):
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): leave it out") from None
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path}: {error.strerror}; name a file of text") from None


def contents_of(path, text_field, encoding):
    """(text or ids of tokens, whether a document ends there), piece by piece."""
    if path.suffix.lower() == ".jsonl":
        return read_jsonl(path, text_field)
    if path.suffix.lower() == ".bin":
        return read_bin(path, encoding)
    return read_text(path)


def read_text(path):
    """A file is a document; pieces are cut at ends of lines where there are any."""
    with open(path, encoding="utf-8", newline="") as lines:
        pieces = iter(lambda: lines.read(PIECE) + lines.readline(PIECE), "")
        for piece, following in itertools.pairwise(itertools.chain(pieces, [""])):
            if "\0" in piece:
                raise UserError(f"{path} is not text, it holds zero bytes: leave it out of --data")
            yield piece, not following


def read_jsonl(path, field):
    """A line is a document, and a piece or several. Half a surrogate pair becomes U+FFFD, as tiktoken has it."""
    for number, line in read_lines(path):
        text = line.get(field) if isinstance(line, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{path}, line {number}: no text under {field!r}; name the right key with --text-field")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for start in range(0, len(text) or 1, PIECE):
            yield text[start:start + PIECE], start + PIECE >= len(text)


def read_lines(path):
    """(line number, what it holds) of a .jsonl file; UserError for a line that is not JSON."""
    with utf8(path), open(path, encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}); mend or remove the line") from None
            yield number, content


def read_bin(path, encoding):
    """Token ids, 16 bit or, for a vocabulary above 65536, 32 bit. Documents end where END stands."""
    if encoding is None:
        raise UserError(f"{path} holds tokens: name the tokenizer that made them with --tokenizer")
    size, dtype = path.stat().st_size, dtype_for(encoding)
    if size == 0 or size % dtype.itemsize:
        raise UserError(f"{path} has {size} bytes, which are no tokens of {8 * dtype.itemsize} bits: leave it out of "
                        f"--data, or name the tokenizer that made it")
    known = [*ids_of(encoding)]
    ids = np.memmap(path, dtype, mode="r")
    for start in range(0, len(ids), PIECE):
        piece = ids[start:start + PIECE]
        strange = np.setdiff1d(piece, known)
        if len(strange):
            raise UserError(f"{path} holds id {strange[-1]}, unknown to the tokenizer: name its own with --tokenizer")
        yield piece.tolist(), False


def dtype_for(encoding):
    return np.dtype(np.uint16 if encoding.n_vocab <= 1 << 16 else np.uint32)


def count_pieces(files):
    """About how many pieces the files have, for the progress that is shown: lines, or parts of PIECE bytes."""
    count = 0
    for file in files:
        if file.path.suffix == ".jsonl":
            with open(file.path, "rb") as lines:
                count += sum(1 for _ in lines)
        else:
            item = 2 if file.path.suffix == ".bin" else 1                 # bytes of a token, or of a character
            count += math.ceil(file.path.stat().st_size / item / PIECE)
    return max(1, count)


# ---------------------------------------------------------------------------------------------------------------------
# Corpus: tokens in one memory-mapped file for each source and one for the held-out text, made once


@dataclass
class Corpus:
    encoding: tiktoken.Encoding            # of all its tokens
    train: dict                            # source -> tokens, memory-mapped
    heldout: np.ndarray                    # tokens, of all sources
    facts: dict                            # hash, bytes and token counts, what xz needs for the held-out bytes


def make_cache(settings, encoding, vocab_size, parent):
    """Tokenises --data into parent/data-HASH, once -> that folder. encoding: None if it is to be learnt."""
    files = list_files(settings["data"])
    cache = Path(parent) / f"data-{identity_of(files, settings, encoding, vocab_size)}"
    if is_whole(cache):
        return cache
    # made under a name of this process, which it loses when it is complete: a killed run leaves no half of a cache
    remove_leftovers(parent)
    unfinished = Path(f"{cache}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with naming(unfinished):
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
        return parallel.read_json(cache, "facts.json")["name"] == cache.name
    except (ValueError, LookupError, TypeError, OSError):
        return False


def remove_leftovers(parent):
    """Unfinished caches of processes of this machine that are gone."""
    for leftover in Path(parent).glob(f"data-*.{platform.node()}.*.tmp"):
        process = leftover.name.split(".")[-2]
        if not Path("/proc", process).exists():
            shutil.rmtree(leftover, ignore_errors=True)


def identity_of(files, settings, encoding, vocab_size):
    """A hash of all that the tokens depend on. encoding: None if it is to be learnt."""
    stats = [(file.source, file.name, file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in files]
    tokenizer = (ranks_of(encoding), encoding._pat_str) if encoding else vocab_size
    identity = repr((stats, tokenizer, RESERVED, settings["heldout"], settings["text_field"], PIECE))
    return sha256(identity)[:12]


def open_corpus(cache):
    """The Corpus that make_cache left."""
    facts = parallel.read_json(cache, "facts.json")
    train = {split: np.memmap(cache / f"{split}.bin", facts["dtype"], mode="r") for split in facts["tokens"]}
    heldout = train.pop("heldout")
    return Corpus(encoding_in(cache, facts), train, heldout, facts)


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
    return make_encoding(learn_bpe(texts(), vocab_size - len(RESERVED)))


def tokenise(files, settings, encoding, folder):
    """Reads everything once, few pieces at a time, and writes tokens and facts into folder."""
    # 1. a file for each source and one for held-out text; each begins with END, so that its first token is predicted
    folder.mkdir(parents=True)
    dtype = dtype_for(encoding)
    writers = {split: open(folder / f"{split}.bin", "wb") for split in {"heldout", *(file.source for file in files)}}
    for writer in writers.values():
        writer.write(np.array([encoding.eot_token], dtype).tobytes())
    # 2. the text, hashed, and what xz needs to pack the held-out part of it
    hasher = hashlib.sha256()
    sizes, packer = dict(train_bytes=0, heldout_bytes=0, xz=0), lzma.LZMACompressor(preset=9)
    pieces = encoded(pieces_of(files, settings, encoding), encoding)
    for piece, raw, tokens in sim.with_progress("tokenising", pieces, count_pieces(files)):
        hasher.update(os.fsencode(f"\0{piece.file.source}\0{piece.file.name}\0") + raw)
        split = "heldout" if piece.is_heldout else piece.file.source
        if piece.is_heldout:
            sizes["xz"] += len(packer.compress(raw))
        sizes["heldout_bytes" if piece.is_heldout else "train_bytes"] += len(raw)
        writers[split].write(tokens.astype(dtype).tobytes())
    sizes["xz"] += len(packer.flush())
    # 3. facts
    counts = {split: writer.tell() // dtype.itemsize for split, writer in writers.items()}
    for writer in writers.values():
        writer.close()
    save_encoding(encoding, folder / "tokenizer.tiktoken")
    facts = dict(name=folder.name.split(".")[0], sha256=hasher.hexdigest(), files=len(files), tokens=counts,
                 dtype=dtype.name, **facts_of(encoding))
    write_whole(folder / "facts.json", json.dumps(facts | sizes, indent=1))
    # 4. on the disk before the folder gets its name, with sizes and checksums
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    parallel.write_manifest(folder)


def encoded(pieces, encoding):
    """(piece, its bytes, its tokens) in order. Threads encode: tiktoken lets go of the interpreter."""
    special = set(encoding._special_tokens.values())                      # END is no byte of text

    def encode(piece):
        if isinstance(piece.content, str):
            raw, tokens = piece.content.encode(), encoding.encode_ordinary(piece.content)
        else:
            tokens = piece.content
            raw = encoding.decode_bytes([id for id in tokens if id not in special])
        return piece, raw, np.array(tokens + [encoding.eot_token] if piece.ends else tokens, np.uint32)

    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        while some := list(itertools.islice(pieces, 8 * workers)):        # few, so that little is held at once
            yield from pool.map(encode, some)


def write_whole(path, text):
    """All of a file or nothing of it."""
    unfinished = Path(f"{path}.tmp")
    with naming(path):
        unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


@contextlib.contextmanager
def naming(path):
    """The operating system names a file that cannot be opened, but not one for which a disk has no room."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Conversations: read, and packed into sequences


def read_conversations(data, encoding):
    """[(ids, counted)] of all lines: with `messages`, or `prompt` and `response`."""
    found = []
    for file in list_files(data):
        for number, line in read_lines(file.path):
            with refusals(f"{file.path}, line {number}: "):
                require(isinstance(line, dict), "no object: write one with messages, or with prompt and response")
                if "messages" not in line and {"prompt", "response"} <= set(line):
                    line = dict(messages=[dict(role="user", content=line["prompt"]),
                                          dict(role="assistant", content=line["response"])])
                check_messages(line.get("messages"))
                found.append(conversation(encoding, line["messages"]))
    return found


def best_fit(lengths, room):
    """Which conversations share a sequence, as lists of numbers: longest first, each where it leaves least room."""
    bins, spaces = [], []                                                 # spaces: (room left, bin), ascending
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(spaces, (lengths[number], 0))
        if place < len(spaces):
            left, chosen = spaces.pop(place)
        else:
            left, chosen = room, len(bins)
            bins.append([])
        bins[chosen].append(number)
        bisect.insort(spaces, (left - lengths[number], chosen))
    return bins


class Packed:
    """Conversations in sequences of seq_len, padded, none cut: arrays (sequences, seq_len + depths). Attention does not
    cross from one to the next, and as rotary position is relative, each is as if it were alone."""

    def __init__(self, conversations, seq_len, depths, end):
        bins = best_fit([len(ids) for ids, _ in conversations], seq_len)
        shape = len(bins), seq_len + depths
        self.tokens, self.counted = np.full(shape, end, np.int64), np.zeros(shape, bool)
        self.documents = np.full(shape, -1)
        for row, members in enumerate(bins):
            at = 0
            for number in members:
                ids, counted = conversations[number]
                own = slice(at, at + len(ids))
                self.tokens[row, own] = ids
                self.counted[row, own] = counted
                self.documents[row, own] = number
                at += len(ids)

    def __len__(self):
        return len(self.tokens)

    def examples(self, rows, depths, device):
        return examples(self.tokens[rows], depths, device, self.documents[rows], self.counted[rows])


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
            check_setting("global_batch", sequences, int, most=10**6)
            check_setting("global_batch from token", start, float, least=0)
        starts = [start for start, _ in self.batches]
        is_rising = starts[:1] == [0] and starts == sorted(starts)
        require(is_rising, f"global_batch={self.global_batch}: use rising tokens, from 0 on")
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
    usual = dict(tokens=settings["tokens"] or settings["steps"] * step, seq_len=settings["seq_len"],
                 global_batch=settings["global_batch"], lr=settings["lr"], decay=settings["decay"],
                 warmup_tokens=settings["warmup_steps"] * step)
    if not settings["phases"]:
        return [make_phase(settings, usual)]
    where = f"--phases {settings['phases']}"
    phases, rows = [], read_rows(settings["phases"])
    # sizes that a later phase leaves out are those of the first, so that all are scaled alike
    usual |= {key: rows[0][key] for key in ("seq_len", "global_batch", "lr") if key in rows[0]}
    for number, row in enumerate(rows, 1):
        with refusals(f"{where}, phase {number}: "):
            phases.append(make_phase(settings, usual | row))
    phases = scaled(phases, given, once=settings["micro_batch"] * settings["dp"])
    refuse_too_short(phases, where)
    return phases


def make_phase(settings, row):
    """A Phase, whose last rate is --min-lr of its own where it names none."""
    unknown = set(row) - set(PHASE_KEYS)
    require(not unknown, f"{', '.join(unknown)}: use keys of {', '.join(PHASE_KEYS)}")
    check_setting("lr", row["lr"], float)
    return Phase(**dict(min_lr=row["lr"] * settings["min_lr"]) | row)


def read_rows(path):
    """The phases of a JSON file: a list of objects, or an object that has it as `phases` beside its sources."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"--phases {path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--phases {path}: not JSON ({error})") from None
    if isinstance(rows, dict):
        rows = rows.get("phases")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"--phases {path}: write a JSON list of objects with {', '.join(PHASE_KEYS)}")
    return rows


def tokens_of(phases):
    """Where the last of them ends: at the first step there. What that is too far, the next one lacks, so that a run has
    all its tokens to within a batch."""
    return sum(phase.tokens for phase in phases)


def scaled(phases, given, once):
    """The phases with the tokens in all, and the first one's length, largest batch and rate, that were given; the
    others keep their proportions. once: sequences that all ranks run at once; a batch is a multiple of it."""
    # by how much: what was given over what the phases say, 1 where nothing was given
    said = dict(tokens=tokens_of(phases), seq_len=phases[0].seq_len,
                global_batch=phases[0].batches[-1][1], lr=phases[0].lr)
    by = {name: (given.get(name) or value) / value for name, value in said.items()}

    def batch(sequences):
        if by["global_batch"] == 1:
            return sequences
        return max(1, round(sequences * by["global_batch"] / once)) * once

    return [replace(phase, tokens=phase.tokens * by["tokens"], warmup_tokens=phase.warmup_tokens * by["tokens"],
                    seq_len=max(1, int(phase.seq_len * by["seq_len"])),
                    lr=phase.lr * by["lr"], min_lr=phase.min_lr * by["lr"],
                    global_batch=[[start * by["tokens"], batch(sequences)] for start, sequences in phase.batches])
            for phase in phases]


def refuse_too_short(phases, where):
    """Each phase must have a step of its own, also where the one before it went a step too far."""
    steps = [phase.seq_len * max(sequences for _, sequences in phase.batches) for phase in phases]         # tokens
    needed = [max(step, before) for step, before in zip(steps, [0, *steps])]
    total = tokens_of(phases)
    least = round(max(need / phase.tokens for need, phase in zip(needed, phases)) * total)
    require(least <= total, f"{where}: too short for a step of each phase; use --tokens {least} or more, or a smaller "
                            f"--global-batch or --seq-len")


# ---------------------------------------------------------------------------------------------------------------------
# Data order: a function of (seed, number of the sequence since the run's first)


def shuffled(number, n, seed):
    """The number-th draw from range(n), which each epoch shuffles anew, without a table: a Feistel network, walked
    until it is below n."""
    epoch, index = divmod(number, n)
    half = max(1, ((n - 1).bit_length() + 1) // 2)                        # bits of each half of an index
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for step in range(4):
            key = hashlib.blake2b(f"{right},{step},{seed},{epoch}".encode(), digest_size=8).digest()
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
        tokens = self.train[source]
        n_windows = (len(tokens) - self.span) // self.seq_len + 1
        start = shuffled(own, n_windows, f"{self.seed},{source}") * self.seq_len
        return tokens[start:start + self.span]


def mix_pattern(corpus, phase, seed):
    """Sources of a block of sequences, in the shares of the phase's mix and in a fixed random order."""
    sizes = {source: len(tokens) for source, tokens in corpus.train.items()}
    if len(sizes) == 1:
        return list(sizes)                                                # one source: there is nothing to mix
    shares = phase.mix or {source: size / sum(sizes.values()) for source, size in sizes.items()}
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


def examples(windows, depths, device, documents=None, counted=None):
    """Windows (B, T + depths) of tokens -> what Model.forward takes: ids (B,T), targets (B, depths, T), and doc_ids
    (B,T) where documents are kept apart.

    documents, counted (B, T + depths): the number of each token's document; whether a token is a target. With documents
    kept apart, the tokens ahead that MTP predicts count as long as they are of the same one; the next token always
    does, since END is followed by one, too.
    """
    tokens = torch.as_tensor(windows.astype(np.int64), device=device)
    T = tokens.size(1) - depths

    def ahead(x):
        """x (B, T + depths), 1, 2, ... tokens ahead: (B, depths, T)."""
        return torch.stack([x[:, 1 + d:1 + d + T] for d in range(depths)], 1)

    batch = dict(ids=tokens[:, :T], targets=ahead(tokens))
    if counted is not None:
        batch["targets"].masked_fill_(~ahead(torch.as_tensor(counted, device=device)), -100)
    if documents is not None:
        documents = torch.as_tensor(documents, device=device)
        batch["doc_ids"] = documents[:, :T]
        is_other = ahead(documents) != documents[:, None, :T]
        batch["targets"][:, 1:].masked_fill_(is_other[:, 1:], -100)
    return batch


def document_numbers(windows, end):
    """Windows of tokens -> the number of each one's document; END belongs to the document that it ends."""
    is_end = windows == end
    return is_end.cumsum(1) - is_end


# what a step returns; stop: ranks that were asked to
MEASURES = ("loss", "mtp_loss", "aux_loss", "grad_norm", "skipped", "max_vio", "drop_rate", "stop")


def own_sequences(plan, first, size):
    """The numbers of this rank's sequences in a global batch of that size, which begins with number `first`. One
    micro-batch of all ranks is a run of neighbours: a balance group over ranks holds the same sequences as on one."""
    numbers = first + np.arange(size).reshape(-1, plan.dp, plan.micro_batch)      # micro-batches, ranks, sequences
    return numbers[:, parallel.data_rank(plan)].flatten().tolist()


def each_of(batch, change):
    """A batch with all of its tensors changed; routing is a dict of some."""
    return {name: each_of(x, change) if isinstance(x, dict) else change(x) for name, x in batch.items()}


def part_of(batch, own):
    """A batch's sequences by a slice, or by their numbers."""
    return each_of(batch, lambda x: x[own])


def micro_batches(batch, size):
    """A rank's share of a batch as inputs of the model, `size` sequences at a time, each part as long as its longest
    where the batch tells their `lengths`."""
    parts = []
    for start in range(0, len(batch["ids"]), size):
        part = part_of(batch, slice(start, start + size))
        if "lengths" in part:
            length = int(part.pop("lengths").max())
            targets = part["targets"][..., :length]                       # (B,1+MTP,T), all other tensors (B,T,...)
            part = each_of(part, lambda x: x[:, :length]) | dict(targets=targets)
        parts.append(part)
    return parts


def train_step(pipeline, optimizer, batch, clip, stop=False):
    """One optimizer step on this rank's share of a global batch: a dict of what Model.forward takes.

    -> float32 tensor of MEASURES, those of all ranks, and the copies that went to each expert, (MoE layers, E), of all
    ranks. Both are still on the device: nothing waits for them. clip: 0 for none. stop: whether this rank was asked to.

    A loss or gradient that is not finite leaves weights and moments as they are: the optimizer is told by found_inf.
    """
    model, plan = pipeline.model, pipeline.plan
    # 1. forward and backward; losses are means over the target tokens of the whole global batch
    ranks_alike = plan.world_size // plan.dp                              # that share the same sequences
    loss_tokens = parallel.all_sum((batch["targets"] != -100).sum((0, 2)).float()) / ranks_alike
    loss_tokens = loss_tokens.clamp(min=1)                                # MTP may have no targets
    model.aux_scale = plan.micro_batch / (len(batch["ids"]) * plan.dp * plan.cp * plan.tp)
    out = pipeline.step(micro_batches(batch, plan.micro_batch), loss_tokens)

    # 2. what all ranks must know before they step
    stats = model.pop_stats()
    loads, own_layers = parallel.sum_loads(model, stats["loads"])         # (MoE layers, E)
    losses = torch.stack([out.loss, out.mtp_loss, out.aux_loss]).float()
    dropped, asked = stats["dropped"].float(), losses.new_tensor(stop)
    sums = parallel.all_sum(torch.stack([*losses, dropped, asked]))
    norm = parallel.grad_norm(model, pipeline.grid).float()
    finite = torch.isfinite(norm) & torch.isfinite(sums).all()
    cut = (norm / clip).clamp(min=1) if clip else torch.ones_like(norm)   # what clipping divides gradients by

    # 3. the step, or none
    if parallel.fused_skips(norm.device):
        optimizer.found_inf, optimizer.grad_scale = (~finite).float(), cut
        optimizer.step()
    elif finite:                                                          # here the host waits
        grads = [parallel.local(p.grad) for p in model.parameters() if p.grad is not None]
        torch._foreach_div_(grads, cut)
        optimizer.step()
    optimizer.zero_grad()
    model.update_router_bias(loads[own_layers] * finite)

    return measured(sums, norm, finite, loads), loads


def measured(sums, norm, finite, loads):
    """A step's MEASURES as one tensor. sums: of all ranks, losses, dropped copies and ranks that were asked to stop."""
    *losses, dropped, stop = sums
    copies = loads.float()
    max_vio = norm * 0                                                    # of a dense model
    if len(copies):
        used = (copies.sum(1) > 0).float()                                # in rl, MTP layers rest
        over_mean = copies.amax(1) * copies.size(1) / copies.sum(1).clamp(min=1)              # of each layer
        max_vio = ((over_mean - 1) * used).sum() / used.sum().clamp(min=1)
    drop_rate = dropped / copies.sum().clamp(min=1)
    return torch.stack([*losses, norm, (~finite).float(), max_vio, drop_rate, stop])


# ---------------------------------------------------------------------------------------------------------------------
# Held-out text


@torch.no_grad()
def heldout_nats(pipeline, n, batch_of):
    """Summed loss of the next tokens of n held-out sequences, in nats, over all ranks. batch_of(numbers) makes the
    batch of these; numbers from n on keep the last batches whole, and do not count."""
    model, plan = pipeline.model, pipeline.plan
    # so that the loss is a sum, not a mean
    divisor = torch.ones(1 + model.config.num_nextn_predict_layers, device=next(model.parameters()).device)
    nats = torch.zeros((), dtype=torch.float64)
    firsts = range(0, n, plan.dp * plan.micro_batch)
    model.eval()
    for first in sim.with_progress("held-out text", firsts) if parallel.rank() == 0 else firsts:
        numbers = first + parallel.data_rank(plan) * plan.micro_batch + np.arange(plan.micro_batch)
        batch = batch_of(numbers)
        batch["targets"][numbers >= n] = -100
        batch["targets"][:, 1:] = -100
        nats += pipeline.step([batch], divisor, train=False).loss.item()
    model.train()
    return parallel.all_sum(nats).item()


# ---------------------------------------------------------------------------------------------------------------------
# Stages: what differs between pre-training, fine-tuning and reinforcement learning, which are one loop


class Stage:
    """A kind of training, opened for a run: where batches come from, and what held-out data says of the model."""
    name = ""                              # of the command, and first on each line of metrics.jsonl
    options = {}                           # its settings: name -> Option
    example = ""                           # a prompt, for the sample at the end
    recipe = None                          # values of settings where the command line says nothing; None: the preset's

    def __init__(self, run):
        self.run, self.settings, self.depths = run, run.settings, 1 + run.config.num_nextn_predict_layers

    def open_data(self):
        """-> Corpus. UserError for data that cannot be trained on."""

    def describe(self, facts):
        """Lines about the data."""

    def begin(self, phase, pipeline):
        """A phase begins, with a model of its own."""

    def batches(self, progress, size):
        """This rank's share of a step's global batch, `size` sequences: dicts of what Model.forward takes, one for each
        update of the weights."""

    def measures(self):
        """What the log tells of a step, beside MEASURES."""
        return {}

    def evaluate(self, pipeline):
        """What the log tells of held-out data."""
        return {}


class Pretrain(Stage):
    """Text, of which every token is predicted."""
    name, options, example = "pretrain", OPTIONS | PLAN_OPTIONS, "def "

    def open_data(self):
        run = self.run
        cache = parallel.first_does(lambda: make_cache(run.settings, run.encoding, run.config.vocab_size,
                                                       run.folder.parent))
        corpus = open_corpus(cache)
        for phase in run.phases:
            Order(corpus, phase, self.depths, self.settings["seed"])      # refuses text that is too short
        return corpus

    def describe(self, facts):
        asked, held, kept = self.settings["heldout"], facts["heldout_bytes"], facts["train_bytes"]
        xz = f" (xz -9 {facts['xz']:,})" if held >= LEAST_FOR_XZ else ""
        yield (f"text: {facts['files']} files, sha256 {facts['sha256'][:12]}, {kept:,} bytes to train on, {held:,} "
               f"held out{xz}, tokens {facts['tokens']}")
        # of few pieces of text, the share that is held out can be far from the one asked for
        share = held / max(1, kept + held)
        if held < HELDOUT_BYTES / 2 and not asked / 2 <= share <= 2 * asked:
            yield f"held out is {share:.2%} of this text, not {asked:.2%}: it has few pieces, or uneven ones"
        if len(self.run.corpus.train) == 1 and any(phase.mix for phase in self.run.phases):
            yield "the phases mix sources, and this text is one: their mix is left out; --data NAME=PATH names each"

    def begin(self, phase, pipeline):
        self.order = Order(self.run.corpus, phase, self.depths, self.settings["seed"])

    def batches(self, progress, size):
        numbers = own_sequences(self.run.plan, progress["tokens"] // self.order.seq_len, size)
        return [self.examples(np.stack([self.order.window(number) for number in numbers]))]

    def examples(self, windows, counted=None):
        kept_apart = self.settings["document_mask"]
        documents = document_numbers(windows, self.run.corpus.encoding.eot_token) if kept_apart else None
        return examples(windows, self.depths, self.run.device, documents, counted)

    def evaluate(self, pipeline):
        """Held-out loss (nats a token) and bits per UTF-8 byte; {} where no text is held out.

        Every token is predicted once, END included: windows overlap by half and only their second half counts, so that
        each token sees at least half a window before it.
        """
        corpus, seq_len = self.run.corpus, pipeline.plan.seq_len
        n, stride = len(corpus.heldout) - 1, max(1, seq_len // 2)         # tokens to predict; from window to window
        if n < 1:
            return {}

        def batch_of(numbers):
            begins = stride * numbers[:, None]
            places = begins + np.arange(seq_len + self.depths)            # (micro_batch, seq_len + depths)
            # what counts: the second half, all of the first window, nothing past the end
            counted = places <= n
            counted[:, :seq_len - stride + 1] &= begins == 0
            return self.examples(corpus.heldout[places.clip(max=n)], counted)

        n_windows = 1 + max(0, math.ceil((n - seq_len) / stride))
        nats = heldout_nats(pipeline, n_windows, batch_of)
        return dict(val_loss=nats / n, val_bpb=nats / math.log(2) / corpus.facts["heldout_bytes"])


class SFT(Stage):
    """Conversations, several in a sequence: the assistant's words and the ends of its turns are predicted."""
    name = "sft"
    options = {name: option for name, option in Pretrain.options.items() if name not in PRETRAIN_ONLY}
    recipe = dict(steps=200, lr=2e-3, warmup_steps=10, min_lr=0.0, set=["aux_loss_alpha=0"])

    def open_data(self):
        run = self.run
        seq_len = min(phase.seq_len for phase in run.phases)
        if not self.settings["init"] or not self.settings["data"]:
            raise UserError("sft needs --init, a model to begin with, and --data, .jsonl files of conversations")
        found = read_conversations(self.settings["data"], run.encoding)
        fitting = [each for each in found if len(each[0]) <= seq_len]
        if len(fitting) < len(found):
            print(f"{len(found) - len(fitting)} of {len(found)} conversations are longer than --seq-len {seq_len}, the "
                  f"longest has {max(len(ids) for ids, _ in found)} tokens: left out")
        every = round(1 / self.settings["heldout"]) if self.settings["heldout"] else 0
        held = fitting[1::every] if every else []
        kept = [each for number, each in enumerate(fitting) if not every or number % every != 1]
        require(kept, f"--data {' '.join(self.settings['data'])}: of {len(found)} conversations {len(fitting)} fit "
                      f"--seq-len, {len(held)} are held out, and none is left to train on")
        self.example = run.encoding.decode(kept[0][0]).partition(ROLES["user"])[2].partition(TURN_END)[0]
        facts = dict(sha256=sha256(repr(fitting)), conversations=len(kept), heldout=len(held), **facts_of(run.encoding))
        return Corpus(run.encoding, kept, held, facts)

    def describe(self, facts):
        sequences = len(best_fit([len(ids) for ids, _ in self.run.corpus.train], self.run.phases[0].seq_len))
        yield (f"conversations: {facts['conversations']} to train on in {sequences} sequences, {facts['heldout']} held "
               f"out, sha256 {facts['sha256'][:12]}")

    def begin(self, phase, pipeline):
        self.seq_len = phase.seq_len
        self.packed = Packed(self.run.corpus.train, phase.seq_len, self.depths, self.run.encoding.eot_token)

    def batches(self, progress, size):
        numbers = own_sequences(self.run.plan, progress["tokens"] // self.seq_len, size)
        rows = [shuffled(number, len(self.packed), self.settings["seed"]) for number in numbers]
        return [self.packed.examples(rows, self.depths, self.run.device)]

    def evaluate(self, pipeline):
        """Held-out loss, nats a token that counts."""
        corpus = self.run.corpus
        if not corpus.heldout:
            return {}
        packed = Packed(corpus.heldout, pipeline.plan.seq_len, self.depths, self.run.encoding.eot_token)
        nats = heldout_nats(pipeline, len(packed),
                            lambda rows: packed.examples(rows % len(packed), self.depths, self.run.device))
        return dict(val_loss=nats / packed.counted[:, 1:].sum())


# ---------------------------------------------------------------------------------------------------------------------
# Stage rl: GRPO (arXiv:2402.03300), as mixtures of experts are trained by it
#
# 1. answers    several to each prompt, by the model as it is, sampled from its whole softmax
# 2. rewards    by code; what is better than the mean of its group becomes likelier, what is worse less likely
# 3. scores     the trainer's own log-probabilities and experts for what the sampler wrote: engines differ in rounding,
#               and then in experts, so rows are weighted by how much, and experts may be replayed
# 4. updates    of the weights, one or several from the same answers, kept close to the old policy by clipping

RL_OPTIONS = dict(
    tasks=Option("", "FILE.jsonl, a line each: prompt, answer and, if not exact, checker (exact | partial | a "
                    "function of --checkers)"),
    checkers=Option("", "FILE.py; its functions take (text of the answer, the task's line) and return a reward of 0 to "
                        "1"),
    answers=Option(16, "to each prompt: a group", least=2),
    new_tokens=Option(64, "of an answer, at most"),
    updates=Option(1, "of the weights, from the answers of a step"),
    clip_low=Option(0.2, "how far a token's ratio to the old policy may fall below 1 (DAPO)", least=0, most=1),
    clip_high=Option(0.28, "and rise above it", least=0),
    ratio=Option("token", "of the new to the old policy: each token's, or of whole answers (GSPO)",
                 choices=("token", "sequence")),
    divide_by_std=Option(0, "1: advantages are divided by the group's deviation (GRPO; not with experts)",
                         choices=(0, 1)),
    importance_cap=Option(5.0, "most that a token counts for the trainer finding it likelier than the sampler did"),
    kl=Option(0.0, "weight of the divergence from the model of --init, which is then held too", least=0),
    replay=Option("none", "experts forced in training: none | sampler: those chosen in sampling | old: those of the "
                          "trainer before the first update", choices=("none", "sampler", "old")),
    shuffle_rewards=Option(0, "1: shuffled inside each group, a control that should learn nothing", choices=(0, 1)),
)
CHECK_SECONDS = 5                          # that a checker may take
TOO_FAR = 10.0                             # log-ratios are clamped to this before exp


def check_exact(text, task):
    return float(text.strip() == task["answer"].strip())


def check_partial(text, task):
    """1 for the answer; less than half of it for each sign in its place."""
    text, answer = text.strip(), task["answer"].strip()
    right = sum(a == b for a, b in zip(text, answer))
    return 1.0 if text == answer else 0.5 * right / max(len(text), len(answer))


def read_checkers(path):
    """-> ({name: function}, code): the two above, and those of a file that the user names; what stands there."""
    names = {}
    try:
        code = Path(path).read_text(encoding="utf-8") if path else ""
        exec(compile(code, path, "exec"), names)
    except OSError as error:
        raise UserError(f"--checkers {path}: {error.strerror}; name a file of Python") from None
    except Exception as error:
        raise UserError(f"--checkers {path}: {type(error).__name__}: {error}") from None
    own = {name: value for name, value in names.items() if callable(value) and not name.startswith("_")}
    return dict(exact=check_exact, partial=check_partial) | own, code


def read_tasks(path, checkers):
    """The lines of --tasks, checked."""
    tasks = []
    for number, task in read_lines(path):
        with refusals(f"{path}, line {number}: "):
            require(isinstance(task, dict), "no object: write one with prompt and answer")
            for key in ("prompt", "answer"):
                require(isinstance(task.get(key, ""), str), f"{key}={task.get(key)!r} is no text: put it in quotes")
                require(task.get(key, "").strip(), f"no {key}: write prompt and answer, and a checker if not exact")
            task = dict(checker="exact") | task | dict(line=number)
            require(task["checker"] in [*checkers],
                    f"checker {task['checker']!r}: use {', '.join(checkers)}, or give its file to --checkers")
            tasks.append(task)
    require(tasks, f"{path}: no tasks")
    return tasks


class CheckerError(UserError):
    """What a checker did wrong, on the ranks where it did; empty on the others."""


class TooSlow(BaseException):
    """Which a checker's own `except Exception` does not catch."""


@contextlib.contextmanager
def time_limit(seconds):
    def stop(number, frame):
        raise TooSlow
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reward(text, task, checkers):
    """What a checker says of an answer, which is None if it is not in the format. CheckerError if it says nothing."""
    if text is None:
        return 0.0
    where = f"--tasks, line {task['line']}: checker {task['checker']}"
    try:
        with time_limit(CHECK_SECONDS):
            value = checkers[task["checker"]](text, task)
    except TooSlow:
        raise CheckerError(f"{where} took more than {CHECK_SECONDS} s for {text!r}") from None
    except (Exception, SystemExit) as error:
        raise CheckerError(f"{where} raised {type(error).__name__}: {error}, for {text!r}") from None
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:        # NaN neither
        raise CheckerError(f"{where} returned {value!r}, no reward from 0 to 1, for {text!r}")
    return float(value)


def advantages_of(rewards, divide_by_std):
    """rewards (groups, answers) -> the same shape: less the group's mean. A group of equal ones has exactly zeros."""
    spread = rewards - rewards.mean(1, keepdims=True)
    spread[np.ptp(rewards, axis=1) == 0] = 0                              # a mean may be rounded
    if divide_by_std:
        spread /= rewards.std(1, keepdims=True) + 1e-6
    return spread


# columns of `policy`, what the loss knows of each token beside its log-probability
COUNTED, ADVANTAGE, SAMPLER, OLD, REFERENCE = range(5)


def policy_losses(log_probs, policy, settings):
    """GRPO's loss of each token: log_probs (B,T) of the tokens that came, with gradient, one answer a row; policy
    (B,T,5) -> losses (B,T), 0 where nothing counts, and how many ratios were clipped."""
    counted, advantage, sampler, old, reference = policy.unbind(-1)
    low, high = 1 - settings["clip_low"], 1 + settings["clip_high"]

    def ratio_of(log_ratio):
        return log_ratio.clamp(-TOO_FAR, TOO_FAR).exp()

    # 1. how far the policy moved since the answers were scored
    log_ratio = (log_probs - old) * counted
    if settings["ratio"] == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)      # (B,1)
    ratio = ratio_of(log_ratio)
    gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    clipped = (ratio * advantage > gain) & (counted > 0)
    # 2. how much more often the trainer would have written the token than the sampler did
    weight = ratio_of(old - sampler).clamp(max=settings["importance_cap"])
    losses = -weight * gain
    # 3. how far it is from the reference: k3, unbiased and never below 0 (arXiv:2402.03300, eq. 4)
    if settings["kl"]:
        losses = losses + settings["kl"] * k3(log_probs, reference)
    return losses * counted, clipped.sum()


def k3(log_probs, reference):
    difference = (reference - log_probs).clamp(-TOO_FAR, TOO_FAR)
    return difference.exp() - difference - 1


class RL(Stage):
    """Tasks whose answers are checked by code."""
    name = "rl"
    options = SFT.options | RL_OPTIONS
    recipe = dict(steps=100, lr=3e-4, warmup_steps=5, min_lr=1.0, global_batch=256, micro_batch=64, seq_len=128,
                  set=["aux_loss_alpha=0"], weight_decay=0.0, train="trunk")

    def open_data(self):
        run, settings = self.run, self.settings
        if not settings["init"] or not settings["tasks"]:
            raise UserError("rl needs --init, a model to begin with, and --tasks, a .jsonl file")
        self.refuse_plan(run.plan)
        self.checkers, code = read_checkers(settings["checkers"])
        self.tasks = read_tasks(settings["tasks"], self.checkers)
        # each checker is tried before it is needed, on the answer of the first task that names it
        for task in {task["checker"]: task for task in reversed(self.tasks)}.values():
            with refusals():
                given = reward(task["answer"].strip(), task, self.checkers)
            if given == 0:
                print(f"--tasks, line {task['line']}: checker {task['checker']} gives 0 for the task's own answer")
        self.turn_end = special_id(run.encoding, TURN_END)
        self.prompts = [question(run.encoding, task["prompt"]) for task in self.tasks]
        self.example = self.tasks[0]["prompt"]
        # none may be too long for an answer behind it
        for task, prompt in zip(self.tasks, self.prompts):
            if len(prompt) + settings["new_tokens"] > settings["seq_len"]:
                raise UserError(f"{settings['tasks']}, line {task['line']}: a prompt of {len(prompt)} tokens and "
                                f"--new-tokens {settings['new_tokens']} do not fit --seq-len: raise it, or leave the "
                                f"line out")
        facts = dict(sha256=sha256(repr(self.tasks)), tasks=len(self.tasks), checkers=sha256(code),
                     **facts_of(run.encoding))
        return Corpus(run.encoding, None, None, facts)

    def refuse_plan(self, plan):
        if plan.pp * plan.cp * plan.tp > 1 or not plan.is_plain:
            raise UserError("rl runs with dp and ep, without pp, tp, cp and overlap")
        size, settings = plan.global_batch, self.settings
        least = math.lcm(settings["answers"], plan.micro_batch) * settings["updates"] * plan.dp
        if size % least:
            raise UserError(f"--global-batch {size}, the answers of a step: use a multiple of {least}, as --answers, "
                            f"--updates, --micro-batch and dp want it")

    def describe(self, facts):
        yield f"tasks: {facts['tasks']}, sha256 {facts['sha256'][:12]}"
        if self.run.stored and self.run.stored["corpus"].get("checkers", facts["checkers"]) != facts["checkers"]:
            yield "the checkers are not those that the run began with"

    def begin(self, phase, pipeline):
        run, self.pipeline, self.reference = self.run, pipeline, None
        pipeline.model.token_loss = self.token_loss
        if self.settings["kl"]:
            if run.source is None:                                        # it goes on, and has stored where it began
                run.source = open_source(run.stored["source"], self.settings["average"])
                run.source.check(run.config)
            self.reference, _ = build(run, phase, None)

    # a step

    def batches(self, progress, size):
        settings, plan = self.settings, self.run.plan
        # 1. tasks, and this rank's answers: whole groups of each update, which is the same under any plan
        n_groups = size // settings["answers"]
        chosen = self.choose_tasks(progress, n_groups)
        own = np.arange(size).reshape(settings["updates"], plan.dp, -1)[:, parallel.data_rank(plan)].flatten()
        tasks = chosen[own // settings["answers"]]
        prompts = [self.prompts[task] for task in tasks]
        answers = self.sample(prompts, progress["step"])
        # 2. rewards and who kept to the format, known to all ranks, and what is better than its group
        judged = np.zeros((2, size))
        judged[:, own] = self.rewards_of(tasks, answers)
        rewards, formatted = parallel.all_sum(torch.from_numpy(judged)).numpy().reshape(2, n_groups, -1)
        self.note_rewards(progress, chosen, rewards, formatted)
        if settings["shuffle_rewards"]:
            rng = np.random.default_rng([settings["seed"], progress["step"]])
            rewards = rng.permuted(rewards, axis=1)
        advantages = advantages_of(rewards, settings["divide_by_std"]).flatten()[own]
        # 3. what the trainer thinks of them; in the share of each update, rows of like length stand together
        share = len(own) // settings["updates"]
        batch = self.examples(prompts, answers, advantages)
        order = np.lexsort((batch["lengths"], np.arange(len(own)) // share))
        batch = self.scored(part_of(batch, order.tolist()))
        # 4. updates, each from some of the groups
        self.counted = batch["policy"][..., COUNTED].sum()
        self.clipped = torch.zeros((), device=self.run.device)
        return [part_of(batch, slice(i * share, (i + 1) * share)) for i in range(settings["updates"])]

    def rewards_of(self, tasks, answers):
        """[rewards, whether each is in the format] on all ranks, or CheckerError on all: where a checker fails on one,
        the others must not wait for it."""
        texts = [answer_of(self.run.encoding, answer.ids) for answer in answers]
        failure = None
        try:
            rewards = [reward(text, self.tasks[task], self.checkers) for task, text in zip(tasks, texts)]
        except CheckerError as error:
            failure = error
        if parallel.all_sum(torch.tensor(float(failure is not None))).item():
            raise failure or CheckerError("")
        return rewards, [text is not None for text in texts]

    def choose_tasks(self, progress, n):
        """Numbers of tasks, drawn by what is known of them: those always or never solved are drawn less."""
        rates = progress["pass_rates"] = progress["pass_rates"] or [-1.0] * len(self.tasks)       # -1: not drawn yet
        weights = np.where(np.isin(rates, (0, 1)), 0.2, 1.0)
        rng = np.random.default_rng([self.settings["seed"], progress["step"]])
        return rng.choice(len(self.tasks), n, replace=n > len(self.tasks), p=weights / weights.sum())

    def note_rewards(self, progress, chosen, rewards, formatted):
        for task, rewarded in zip(chosen, rewards):
            progress["pass_rates"][task] = float((rewarded == 1).mean())
        self.log = dict(reward=rewards.mean(), reward_std=rewards.std(1).mean(), solved=(rewards == 1).mean(),
                        zero_spread=(np.ptp(rewards, axis=1) == 0).mean(), in_format=formatted.mean())

    def sample(self, prompts, step):
        run = self.run
        prompts = [torch.tensor(prompt, device=run.device) for prompt in prompts]
        # chance is another for each step, and each rank that has sequences of its own
        words = f"{self.settings['seed']} {step} {parallel.data_rank(run.plan)}"
        seed = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest(), "big")
        with parallel.generating(self.pipeline.grid) as anybody:
            return generate(self.pipeline.model, prompts, self.settings["new_tokens"], seed=seed, stop=(self.turn_end,),
                            note_routing=True, anybody=anybody).answers

    def examples(self, prompts, answers, advantages):
        """Prompt and answer, one each row, padded behind: what Model.forward takes, the answer's tokens its targets."""
        run = self.run
        whole = [prompt + answer.ids for prompt, answer in zip(prompts, answers)]
        B, T = len(whole), max(map(len, whole)) - 1
        ids = torch.full((B, T), run.encoding.eot_token)
        targets = torch.full((B, 1, T), -100)                             # MTP layers rest
        policy = torch.zeros(B, T, 5)
        # the sampler's experts; what stands behind an answer goes to the first ones
        routing = {layer: torch.arange(chosen.size(1)).expand(B, T, -1).clone()
                   for layer, chosen in answers[0].routing.items()}
        for row, (prompt, answer) in enumerate(zip(prompts, answers)):
            tokens = torch.tensor(whole[row])
            ids[row, :len(tokens) - 1] = tokens[:-1]
            answered = slice(len(prompt) - 1, len(tokens) - 1)            # where the next token is the answer's
            targets[row, 0, answered] = tokens[len(prompt):]
            policy[row, answered, COUNTED] = 1
            policy[row, answered, ADVANTAGE] = advantages[row]
            policy[row, answered, SAMPLER] = torch.tensor(answer.log_probs)
            for layer, chosen in answer.routing.items():
                routing[layer][row, :len(chosen)] = chosen.cpu()
        batch = each_of(dict(ids=ids, targets=targets, policy=policy, routing=routing), lambda x: x.to(run.device))
        return batch | dict(lengths=torch.tensor([len(tokens) - 1 for tokens in whole]))          # stays on the host

    def scored(self, batch):
        """The batch with the trainer's log-probabilities, and experts if those are replayed; tokens whose
        log-probability is not finite count no more."""
        policy, replay, sampled = batch["policy"], self.settings["replay"], batch.pop("routing")
        policy[..., OLD], chosen = self.log_probs(self.pipeline, batch)
        if replay == "sampler":
            # a ratio compares policies with the same experts: else some are clipped before the policy has moved
            policy[..., OLD], _ = self.log_probs(self.pipeline, batch | dict(routing=sampled))
        if self.reference:
            policy[..., REFERENCE], _ = self.log_probs(self.reference, batch)
        broken = ~torch.isfinite(policy).all(-1)
        policy[broken] = 0
        batch["targets"][:, 0].masked_fill_(broken, -100)
        # how far sampler and trainer are from each other
        counted, _, sampler, old, reference = policy.unbind(-1)
        counted = counted > 0
        differs = torch.zeros_like(counted)
        for layer, experts in sampled.items():
            differs |= (experts.sort(-1).values != chosen[layer].sort(-1).values).any(-1)
        distance = (old - sampler).abs()
        kl = (k3(old, reference) * counted).sum()
        sums = [counted.sum(), broken.sum(), counted.any(1).sum(), differs[counted].sum(),
                (distance > math.log(2))[counted].sum(), -sampler.sum(), kl]
        total, not_finite, answers, *sums = parallel.all_sum(torch.stack(sums).float()).tolist()
        router_diff, far, entropy, kl = (each / max(1, total) for each in sums)
        self.log |= dict(router_diff=router_diff, far=far, entropy=entropy, kl=kl if self.reference else None,
                         length=total / max(1, answers), not_finite=int(not_finite))
        if replay == "none":
            return batch
        return batch | dict(routing=sampled if replay == "sampler" else chosen)

    @torch.no_grad()
    def log_probs(self, pipeline, batch):
        """(B,T) of the targets of depth 0, by a pipeline's model as it is, and the experts, as the batch forces them or
        else as the model chose them."""
        model, noted, found = pipeline.model, [], []

        def note(nats, policy):
            found.append(-nats)
            return nats

        model.eval()
        model.token_loss = note
        one = torch.ones(1, device=self.run.device)
        for inputs in micro_batches(batch, self.run.plan.micro_batch):
            noted.append(inputs.setdefault("routing", {}))
            pipeline.step([inputs], one, train=False)
        model.train()
        model.token_loss = self.token_loss

        def together(parts):
            return torch.nn.utils.rnn.pad_sequence([row for part in parts for row in part], batch_first=True)

        return together(found), {layer: together(each[layer] for each in noted) for layer in noted[0]}

    def token_loss(self, nats, policy):
        """What Model.output makes of each token's loss: (B,T), policy (B,T,5)."""
        losses, clipped = policy_losses(-nats, policy, self.settings)
        self.clipped = self.clipped + clipped
        return losses

    def measures(self):
        clipped, counted = parallel.all_sum(torch.stack([self.clipped, self.counted]).float()).tolist()
        return self.log | dict(clip_share=clipped / max(1, counted))


# ---------------------------------------------------------------------------------------------------------------------
# A run, and how it is opened

STAGES = {kind.name: kind for kind in (Pretrain, SFT, RL)}


@dataclass
class Run:
    """A training run. open_run fills the fields in this order; afterwards only `progress` changes."""
    kind: type                             # of stage: Pretrain, SFT or RL
    given: dict                            # what was typed
    settings: dict = None                  # all settings by name, with what `auto` became
    checkpoint: Path = None                # where it goes on from; None: it begins
    stored: dict = None                    # config.json of the run that goes on
    source: object = None                  # where a new run has its weights from; None: initialised
    device: torch.device = None
    encoding: tiktoken.Encoding = None     # of a named tokenizer; None: learnt from the text
    config: Config = None                  # of the model
    plan: Plan = None                      # how it is cut and run, apart from what phases change
    phases: list = None                    # of Phase
    folder: Path = None                    # where it writes
    lock: typing.IO = None                 # of the folder: ours as long as this file is open
    stage: Stage = None
    corpus: Corpus = None
    progress: dict = None                  # where it stands, stored with checkpoints


def beginning():
    """The progress of a run without a step; all of it is stored with checkpoints."""
    return dict(step=0, tokens=0, phase=0, phase_tokens=0,                # phase: its number; tokens: of all phases
                skipped=0, skipped_in_a_row=0,                            # steps that were not finite
                pass_rates=[],                                            # of rl: by task, -1 where it is not known
                placement=[], expert_load=[])                             # of live balance


def open_run(run):
    """Makes it ready for its first step. All that can be refused is refused here; a plan, before any rank waits."""
    given, kind = run.given, run.kind
    # 1. settings: of the run that goes on, or new ones
    if parallel.is_restarted():
        given = restarted(given)
    if given.get("resume"):
        run.settings, run.stored, run.checkpoint = resume_settings(kind, given)
    else:
        run.settings = settings_of(given, kind.options, kind.recipe)
    # 2. the device, and what `auto` becomes on it
    run.device = parallel.pick_device(run.settings["device"])
    fix_automatic(run.settings, run.device)
    # 3. the shape, with room for the vocabulary
    if run.settings["init"]:
        open_init(run)
    else:
        run.encoding = find_encoding(run.settings["tokenizer"])
        config = run.stored["config"] if run.stored else make_config(run.settings)
        run.config = with_vocabulary(config, run.encoding)
    # 4. the plan, and what the balance loss means under it
    run.plan = make_plan(run.settings)
    refuse_lone_process(run.plan)
    check_mtp(run)
    if run.settings["fit"]:
        run.plan = fit_plan(run)
    run.config = replace(run.config, balance_group=balance_group(run.config, run.plan))
    # 5. the phases, each of which must fit the plan
    run.phases = phases_of(run, given)
    refuse_too_large(run)
    # 6. the other processes
    parallel.join_world(run.device, timedelta(seconds=run.settings["timeout"]))
    refuse_unequal_ranks(run)
    # 7. the folder
    run.folder = parallel.first_does(lambda: open_folder(run))
    # 8. the data, and what is compiled: it takes longest
    run.stage = kind(run)
    run.corpus = run.stage.open_data()
    fix_compiled(run)
    # 9. progress
    run.progress = beginning()
    if run.checkpoint:
        parallel.first_does(lambda: refuse_damaged(run.checkpoint))
        run.progress = progress_of(run.checkpoint, run.phases)
    parallel.first_does(lambda: continue_folder(run) if run.stored else begin_folder(run))


def phases_of(run, given):
    """The stored phases of a run that goes on, unless its length is given; else those of the settings."""
    stored = run.stored or dict(phases=[], given={})
    phases = stored["phases"]
    if not phases or {"steps", "tokens"} & set(given):
        phases = make_phases(run.settings, stored["given"] | given)
    if run.source:
        run.config = replace(run.config, max_position_embeddings=max(phase.seq_len for phase in phases))
    for phase in phases:
        for _, sequences in phase.batches:
            plan = replace(run.plan, seq_len=phase.seq_len, global_batch=sequences)
            check_plan(run.config, plan, devices=parallel.world_size())
            parallel.refuse_what_is_not_run(plan)
    return phases


def restarted(given):
    """torchrun starts a run again: with --out or --resume it goes on from its newest checkpoint, whatever it named."""
    if given.get("resume"):
        return given | dict(resume=str(folder_of(given["resume"])))
    if given.get("out") and newest(Path(given["out"])):
        return given | dict(resume=given["out"])
    return given


def resume_settings(kind, given):
    """The stored settings of a run with what may be changed -> (settings, stored config.json, checkpoint)."""
    folder, checkpoint = find_checkpoint(given["resume"])
    stored = read_config(folder)
    settings = stored["settings"]
    if stored["stage"] != kind.name:
        raise UserError(f"{folder} is a run of {stored['stage']}: python train.py {stored['stage']} --resume {folder}")
    require(stored.get("rules") == RULES, f"{folder} was begun under other rules of train.py, at commit "
                                          f"{stored.get('commit')}: resume it with that version, or start a new run")
    if Path(given.get("out", folder)).resolve() != folder.resolve():
        raise UserError(f"--out {given['out']}: --resume {given['resume']} writes into {folder}; leave --out away, or "
                        f"resume a copy of that folder")
    given = {name: value for name, value in given.items() if name not in ("precision", "compile") or value != "auto"}
    for name, value in given.items():
        if name not in CHANGEABLE and value != settings[name]:
            raise UserError(f"{flag(name)} {value}: the run in {folder} has {settings[name]!r}, and resuming cannot "
                            f"change it; leave it away, or start a new run")
    if "steps" in given and "tokens" not in given and not settings["phases"]:    # else older --tokens win
        settings["tokens"] = 0.0
        stored["given"].pop("tokens", None)
    before = settings | given | dict(out=str(folder))
    settings = fit_to_world(dict(before), given, stored["config"].balance_group)
    changed = {name: value for name, value in settings.items()
               if before[name] != value and (before[name] or value)}      # an empty list and an empty tuple are alike
    if changed:
        print("goes on with", typed_as(changed))
    return settings, stored, checkpoint


def fix_automatic(settings, device):
    """What `auto` becomes is stored, and kept on resume."""
    if settings["precision"] == "auto":
        settings["precision"] = parallel.auto_precision(device)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    settings["threads"] = torch.get_num_threads()


def fix_compiled(run):
    """--compile, from here on in this process; what `auto` becomes is stored, and kept on resume."""
    settings, plan, wanted = run.settings, run.plan, run.settings["compile"]
    # answers of rl have other lengths at each step, and each would be compiled
    whole = plan.world_size == 1 and plan.is_plain and not plan.recompute and not plan.swap and run.kind is not RL
    why_not = compile_operators(wanted != "none", run.device)
    if wanted == "auto":
        # on a CPU layers gain little more, and take longer to compile
        faster = "layers" if whole and run.device.type != "cpu" else "operators"
        settings["compile"] = "none" if why_not else faster
    elif why_not:
        raise UserError(f"--compile {wanted}: {why_not}; --compile none does without, also with --resume: the losses "
                        f"are then the same within rounding, no longer bit for bit")
    if wanted == "layers" and not whole:
        limits = "whole layers are for one process without recompute and swap, and not for rl"
        if "compile" in run.given:
            raise UserError(f"--compile layers: {limits}: use --compile operators")
        print(f"compile layers becomes operators: {limits}")
        settings["compile"] = "operators"                                 # of a run that goes on with another plan


def fit_plan(run):
    """--fit: the plan with what is to be recomputed and swapped, which goes into the settings too."""
    settings = run.settings
    match = re.fullmatch(r"(\d+\.?\d*) ?(GiB|MiB)", settings["fit"])
    require(match, f"--fit {settings['fit']}: write a number and GiB or MiB, e.g. 40GiB")
    budget = float(match[1]) * dict(GiB=2**30, MiB=2**20)[match[2]]
    if not settings["hardware"] and run.device.type != "cpu":
        raise UserError(f"--fit needs --hardware on {run.device}: one of {', '.join(sim.HARDWARE)}, or a JSON file")
    hardware = sim.CPU
    if settings["hardware"]:
        hardware = sim.read_preset("hardware", sim.Hardware, sim.HARDWARE, settings["hardware"])
    node = run.plan.node_size if "node_size" in run.given else min(run.plan.node_size, hardware.node_size)
    check_plan(run.config, run.plan, devices=parallel.world_size())
    found = sim.fit_memory(run.config, replace(run.plan, node_size=node), hardware, budget)
    plan = Plan(**found["plan"])
    settings.update(recompute=plan.recompute, swap=plan.swap, node_size=node, fit="")     # not chosen again on resume
    chosen = "+".join(plan.recompute + plan.swap) or "nothing"
    print(f"--fit {match[0]}: {chosen} is recomputed or swapped, so it needs {found['mem_gib']:.2f} GiB (simulated, "
          f"with the costs of {hardware.name})")
    return plan


def with_vocabulary(config, encoding):
    """The config with room for an encoding; one that is learnt has at least all bytes, END and RESERVED."""
    needed = encoding.n_vocab if encoding else 257 + len(RESERVED)
    if needed <= config.vocab_size:
        return config
    enlarged = math.ceil(needed / 64) * 64
    print(f"vocab_size {config.vocab_size} becomes {enlarged}: the tokenizer has {needed} tokens or more")
    return replace(config, vocab_size=enlarged)


def refuse_lone_process(plan):
    needed = plan.pp * math.lcm(plan.dp * plan.cp * plan.tp, plan.ep)
    require(needed == 1 or parallel.world_size() > 1,
            f"this plan needs {needed} processes: start with torchrun --nproc-per-node {needed} train.py ...")


def refuse_too_large(run):
    """Weights, gradients and two moments, of 4 bytes each, need room in all devices together under any plan; moments
    that are swapped lie with the host."""
    if run.device.type == "cpu":                                          # whose ranks share a machine's memory
        machines = parallel.world_size() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * machines
    else:
        have = getattr(torch, run.device.type).mem_get_info()[1] * parallel.world_size()
    need = parameters(run.config) * (8 if "optimizer" in run.plan.swap else 16)
    require(need <= have, f"weights, gradients and moments of this model take {need / 2**30:,.1f} GiB, here are "
                          f"{have / 2**30:,.1f} GiB in all: choose a smaller --preset, or more devices")


def parameters(config):
    """Of the whole model, MTP layers included."""
    counts = count_params(config)
    return counts["total"] + counts["mtp"]


def refuse_unequal_ranks(run):
    """All ranks must have been given the same: each compares its settings with those of the first."""
    mine = run.settings | dict(set=repr(run.config), phases=repr(run.phases))      # with what --set and FILE say
    mine.pop("threads")                                                   # machines may differ in these
    first = parallel.first_does(lambda: mine)
    differs = torch.tensor([float(mine[name] != value) for name, value in first.items()])
    names = [flag(name) for name, ranks in zip(first, parallel.all_sum(differs)) if ranks]
    require(not names, f"ranks were started with different {', '.join(sorted(names))}: start all with one command")


# ---------------------------------------------------------------------------------------------------------------------
# Weights to begin with: of a run, or of a Hugging Face folder


class RunSource:
    """--init names a run or one of its checkpoints."""

    def __init__(self, init, average):
        self.folder, checkpoint = find_checkpoint(init)
        self.path, self.checkpoints = checkpoint.resolve(), newest_to(checkpoint, average)
        self.stored = read_config(self.folder)
        progress = progress_of(checkpoint, self.stored["phases"])
        # as its last phase left it; it sees no more text than it was trained on
        has_begun = progress["phase_tokens"] > 0                          # else the phase before it was the last
        phase = self.stored["phases"][max(0, progress["phase"] - (not has_begun))]
        config = self.stored["config"]
        self.config = replace(config, rope_theta=phase.rope_theta or config.rope_theta,
                              max_position_embeddings=phase.seq_len)

    def encoding(self):
        return encoding_in(self.folder, self.stored["corpus"])

    def check(self, config):
        """A run's own config.json and tensors are one; config may have other MTP layers."""

    @torch.no_grad()
    def fill(self, model, grid=None):
        weights = list(model.state_dict().values())
        for number, checkpoint in enumerate(self.checkpoints):
            if grid is None:                                              # a rank reads alone
                refuse_damaged(checkpoint)
            else:
                parallel.first_does(lambda: refuse_damaged(checkpoint))
            means = [weight.clone() for weight in weights] if number else []          # of those before
            parallel.load_trained(checkpoint, model, self.config.num_nextn_predict_layers, grid)
            for weight, mean in zip(weights, means):
                weight.lerp_(mean, number / (number + 1))


class FolderSource:
    """--init names a folder as transformers writes it."""

    def __init__(self, init):
        self.path = Path(init).resolve()
        self.config = parallel.read_published_config(self.path)

    def encoding(self):
        return encoding_of_folder(self.path)

    def check(self, config):
        """ValueError unless the files hold all tensors of this config and, but for MTP layers, no others."""
        self.pieces = parallel.published_pieces(self.path, config, self.config.num_nextn_predict_layers)

    def fill(self, model, grid=None):
        parallel.load_published(model, self.pieces)


def newest_to(checkpoint, count):
    """A checkpoint and those before it, `count` in all."""
    last = int(checkpoint.name.removeprefix("step_"))
    steps = [step for step in parallel.steps_in(checkpoint.parent) if step <= last]
    if len(steps) < count:
        raise UserError(f"--average {count}: {checkpoint.parent} has {len(steps)} checkpoints up to {checkpoint.name}; "
                        f"--save-every and --keep of that run say how many stay")
    return [checkpoint.parent / f"step_{step}" for step in steps[-count:]]


def open_source(init, average=1):
    if (folder_of(init) / "ckpt").exists():
        return RunSource(init, average)
    if not Path(init, "config.json").exists():
        raise UserError(f"{init}: neither a run's folder, with ckpt, nor a Hugging Face folder, with config.json")
    if average > 1:
        raise UserError(f"--average {average} is of a run's checkpoints, and --init {init} is a Hugging Face folder")
    return FolderSource(init)


def open_init(run):
    """The config and tokenizer of a run that began with others' weights, and of a new one the source of these."""
    settings = run.settings
    if run.stored:                                                        # the source may be gone
        run.config = run.stored["config"]
        run.encoding = encoding_in(folder_of(settings["resume"]), run.stored["corpus"])
        return
    require("preset" not in run.given, "--init brings a model's shape: leave --preset away")
    run.source = open_source(settings["init"], settings["average"])
    run.config = config_of(run.source, settings)
    run.encoding = find_encoding(settings["tokenizer"]) or run.source.encoding()
    refuse_larger(run.encoding, run.config)


def check_mtp(run):
    """What --mtp-depth, --average and --train need."""
    settings, plan = run.settings, run.plan
    require(settings["init"] or not settings["mtp_depth"], "--mtp-depth adds to what --init has: give both")
    require(settings["init"] or settings["average"] == 1, "--average is of the checkpoints of --init: give both")
    require(run.config.num_nextn_predict_layers or settings["train"] != "mtp", "--train mtp needs MTP layers")
    require((plan.is_plain and not plan.balance_live) or settings["train"] == "all",
            f"--train {settings['train']} needs one stage, --schedule 1f1b and no --balance-live (rl trains the trunk)")


def refuse_larger(encoding, config):
    require(encoding.n_vocab <= config.vocab_size,
            f"the tokenizer has {encoding.n_vocab} tokens, the model of --init {config.vocab_size}: it needs its own")


def config_of(source, settings):
    """The source's, with what --set and --mtp-depth change of it, once its tensors are found to fit."""
    trained, wanted = source.config.num_nextn_predict_layers, settings["mtp_depth"]
    config = make_config(settings, replace(source.config, balance_group=0))    # its own plan will say
    depth = config.num_nextn_predict_layers
    require(depth <= trained, f"--set num_nextn_predict_layers={depth}: --init has {trained}; --mtp-depth {depth} adds "
                              f"to them")
    if wanted:
        require(wanted >= depth, f"--mtp-depth {wanted}: --init has {depth} MTP layers, and --set "
                                 f"num_nextn_predict_layers is what leaves some out")
        require(trained, f"--mtp-depth {wanted}: --init has no MTP layer to copy")
        config = replace(config, num_nextn_predict_layers=wanted)
    as_there = replace(source.config, num_nextn_predict_layers=config.num_nextn_predict_layers)
    source.check(as_there)
    require(shapes_of(config) == shapes_of(as_there),
            f"--set {' '.join(settings['set'])}: with --init it may change only what owns no tensor")
    return config


def shapes_of(config):
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Model(config).state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder


def open_folder(run):
    """The run's folder, ours until the process ends."""
    settings = run.settings
    name = folder_of(settings["init"]).name or settings["preset"]
    folder = Path(settings["out"]) if settings["out"] else free_folder(name)
    if not run.stored:
        refuse_foreign(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run.lock = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; choose a folder that can be written") from None
    try:
        fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another run: wait for it, or choose another --out") from None
    except OSError as error:                                              # of a network file system, for instance
        print(f"{folder} cannot be locked ({error.strerror}): see that no other run writes into it")
    return folder


def refuse_foreign(folder):
    """A new run writes into a new folder, an empty one, or that of a run which never got to a checkpoint."""
    if newest(folder):
        raise UserError(f"{folder} already holds a run: --resume {folder} continues it, another --out starts one")
    names = {path.name for path in folder.glob("*") if path.suffix != ".tmp"} - {".lock"}
    if folder.is_file() or (names and "config.json" not in names):
        raise UserError(f"--out {folder}: there is something that is no run; choose a new folder")
    if names:
        read_config(folder)                                               # refuses what train.py did not write


def free_folder(name):
    """runs/NAME, or the first of runs/NAME-2, -3, ... that is not there."""
    folder = Path("runs", name)
    for number in itertools.count(2):
        if not folder.exists():
            return folder
        folder = Path("runs", f"{name}-{number}")


def find_checkpoint(resume):
    """A run's folder, or one of its checkpoints -> (run's folder, its newest complete checkpoint, or the named one)."""
    # a folder is not a run's because it exists: what counts is a checkpoint, which has its name only when it is whole
    path, folder = Path(resume), folder_of(resume)
    last = newest(folder)
    if not folder.is_dir():
        raise UserError(f"{resume}: no such folder; runs lie in runs/, or where --out said")
    if not last:
        raise UserError(f"{resume}: no complete checkpoint in {folder / 'ckpt'}; start the run anew with --out")
    if path == folder:
        return folder, last
    if not path.is_dir():
        raise UserError(f"{resume}: no such checkpoint; complete ones: {parallel.steps_in(folder / 'ckpt')}")
    return folder, path


def folder_of(resume):
    """The run's folder that --resume means."""
    path = Path(resume)
    is_checkpoint = re.fullmatch(r"step_\d+", path.name) and path.resolve().parent.name == "ckpt"
    return path.parent.parent if is_checkpoint else path


def newest(folder):
    """The newest complete checkpoint of a run, or None."""
    steps = parallel.steps_in(folder / "ckpt")
    return folder / "ckpt" / f"step_{steps[-1]}" if steps else None


def read_config(folder):
    """config.json of a run, checked, with a Config and Phases; what settings an older run lacks are the defaults."""
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{folder} has no readable config.json: it is no run's folder") from None
    try:
        stored = dict(stage=Pretrain.name) | stored
        options = OPTIONS | PLAN_OPTIONS | STAGES[stored["stage"]].options
        settings = defaults_of(options) | stored["settings"]
        settings = {name: settings[name] for name in options}             # none that went since
        given = {name: value for name, value in stored["given"].items() if name in options}
        with refusals(f"{path}: "):
            for name, value in [*settings.items(), *given.items()]:
                check_option(name, value, options[name])
            for name, kind in dict(sha256=str, end=int, pattern=str).items():
                check_setting(f"{name} of the corpus", stored["corpus"][name], kind)
            for word, id in stored["corpus"].setdefault("special", {END: stored["corpus"]["end"]}).items():
                check_setting(f"{word} of the corpus", id, int, least=0)
            config = Config(**stored["config"])
            phases = [Phase(**row) for row in stored["phases"]]
            require(phases, "no phases: use at least one")
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not as train.py wrote it ({type(error).__name__}: {error}): give back the one "
                        f"that the run began with") from None
    return stored | dict(settings=settings, given=given, config=config, phases=phases)


def refuse_damaged(checkpoint):
    try:
        parallel.check_files(checkpoint)
    except parallel.CheckpointError as error:
        number = int(checkpoint.name.removeprefix("step_"))
        earlier = [step for step in parallel.steps_in(checkpoint.parent) if step < number]
        advice = "there is none before it: start a new run"
        if earlier:
            advice = f"go on from the one before it: --resume {checkpoint.parent / f'step_{earlier[-1]}'}"
        raise UserError(f"{error}; {advice}") from None


def progress_of(checkpoint, phases):
    progress = beginning()
    parallel.load_progress(checkpoint, progress)                          # in place
    if progress["phase"] >= len(phases) or any(isinstance(n, int) and n < 0 for n in progress.values()):
        raise UserError(f"{checkpoint} is damaged: progress.json has numbers that no run of {len(phases)} phases has")
    return progress


def write_config(run, given, **facts):
    """config.json: all that a resumed run needs to know, and facts about where it ran. Beside it the tokenizer."""
    facts |= dict(rules=RULES, stage=run.kind.name, given=given,
                  config=dataclasses.asdict(run.config), plan=dataclasses.asdict(run.plan),
                  settings=run.settings | dict(resume=""), phases=[dataclasses.asdict(phase) for phase in run.phases],
                  corpus=run.corpus.facts, device=str(run.device), python=platform.python_version(),
                  torch=torch.__version__)
    write_whole(run.folder / "config.json", json.dumps(facts, indent=1))
    save_encoding(run.corpus.encoding, run.folder / "tokenizer.tiktoken")


def begin_folder(run):
    """config.json, the tokenizer and an empty log, before the first step."""
    log = run.folder / "metrics.jsonl"
    if log.exists():                                                      # of a run without a checkpoint
        aside = log.rename(run.folder / f"aside_{time.time():.0f}.jsonl")
        print(f"{run.folder} held a run without a checkpoint: its log is now {aside}")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    write_config(run, run.given, commit=git.stdout.strip(), source=str(run.source.path) if run.source else "")
    write_whole(log, "")


def continue_folder(run):
    """The same text as before; the log is cut back, checkpoints later than the one resumed from are put aside, and what
    --resume changed is stored, so that the next one need not be told."""
    now, before = run.corpus.facts["sha256"], run.stored["corpus"]["sha256"]
    if now != before:
        raise UserError(f"the text of --data or --tasks is not what {run.folder} began with (sha256 {now[:12]}, was "
                        f"{before[:12]}): give it as it was, or start a new run")
    step, checkpoints = run.progress["step"], run.folder / "ckpt"
    if tokens_of(run.phases) < tokens_of(run.stored["phases"]) and is_done(run):
        raise UserError(f"{step} steps are done already: give more with --steps or --tokens, or leave them away")
    log = run.folder / "metrics.jsonl"
    put_aside = [later for later in parallel.steps_in(checkpoints) if later > step]
    if put_aside:
        kept_log = shutil.copy(log, run.folder / f"aside_{time.time():.0f}.jsonl")
    cut_metrics(log, step)
    given = {name: value for name, value in run.given.items() if name != "resume"}
    kept = {name: run.stored.get(name, "") for name in ("commit", "source")}
    write_config(run, run.stored["given"] | given, **kept)
    for later in put_aside:
        aside = checkpoints / f"aside_{later}_{time.time():.0f}"
        (checkpoints / f"step_{later}").rename(aside)
        print(f"the run goes on from step {step}: step_{later} is now {aside}, until you give it its name back; the "
              f"whole log is copied to {kept_log}")


def cut_metrics(path, step):
    """Leaves the lines up to this step; a line half written by a killed run goes too."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    write_whole(path, "".join(kept))


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Stopper:
    """Ctrl-C and SIGTERM ask for an end after the step; asked twice, the process ends at once."""
    signals = signal.SIGINT, signal.SIGTERM

    def __init__(self):
        self.asked, self.agreed = None, False    # what this rank was told; whether all ranks know that one was
        for number in self.signals:
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        # no more than a note: the step goes on, and ranks that were not asked learn of it from its sums
        self.asked = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):                                # not by print, which this may interrupt
            os.write(1, f"{self.asked}: ends with a checkpoint after this step or the next; asked again, at once, and "
                        f"--resume goes on from the newest one there is\n".encode())


def build(run, phase, checkpoint):
    """For a phase: a parallel.Pipeline, which holds this rank's part of the model, its plan and its grid, and the
    optimizer, as the checkpoint left them or as initialised."""
    settings = run.settings
    torch.manual_seed(settings["seed"])
    # 1. the model, of which this rank keeps its part before any memory is taken
    config = replace(run.config, rope_theta=phase.rope_theta or run.config.rope_theta)
    with torch.device("meta"):
        model = Model(config)
    plan = replace(run.plan, seq_len=phase.seq_len)
    grid = parallel.parallelize(model, plan, run.device.type, timedelta(seconds=settings["timeout"]))
    model.to_empty(device=run.device)
    if run.source and not checkpoint:
        run.source.fill(model, grid)
    else:
        parallel.init_weights(model, settings["seed"])
    if settings["train"] != "all":                                        # the rest gets no gradients, so no moments
        model.requires_grad_(settings["train"] == "trunk")
        for layer in model.mtp_layers():
            layer.requires_grad_(settings["train"] == "mtp")
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


def train(kind, given):
    """Opens a run and trains it to its end, or until it is asked to stop."""
    run = Run(kind, given)
    try:
        with refusals():
            open_run(run)
        introduce(run)
        if not is_done(run):
            train_to_end(run)
    finally:
        if run.folder and run.lock:
            if [*run.folder.iterdir()] == [run.folder / ".lock"]:         # of a run that never began nothing stays
                shutil.rmtree(run.folder)
            run.lock.close()


def train_to_end(run):
    settings, progress, checkpoint = run.settings, run.progress, run.checkpoint
    stop, log = Stopper(), Log(run)
    saver = parallel.Saver(run.folder / "ckpt", settings["keep"],
                           keep_too=first_of_doublings if settings["keep_growing"] else lambda steps: ())

    while not is_done(run) and not stop.agreed:
        # a phase has batches of its own, and a model that is built for it, as the checkpoint left it
        phase = run.phases[progress["phase"]]
        pipeline, optimizer = build(run, phase, checkpoint)
        run.stage.begin(phase, pipeline)

        while not phase_is_done(run) and not stop.agreed:
            # 1. the batch: how many sequences, which, at what rate
            began = time.perf_counter()
            size = phase.batch(progress["phase_tokens"])
            try:
                batches = run.stage.batches(progress, size)
            except CheckerError as error:                                 # which all ranks raise, at the same step
                end_phase(run, saver, pipeline, optimizer)
                raise CheckerError(str(error) and f"{error}; mend it, then --resume {run.folder}") from error
            line = advance(run, phase, size, optimizer)

            # 2. the step, of one update of the weights, or of several in rl; tolist waits for the device
            updates = [train_step(pipeline, optimizer, batch, settings["clip"], stop.asked is not None)
                       for batch in batches]
            measures, loads = (torch.stack(each).sum(0) for each in zip(*updates))
            line |= dict(zip(MEASURES, (measures / len(updates)).tolist())) | run.stage.measures()
            stop.agreed = line.pop("stop") > 0                            # at the same step on all ranks
            count_skips(run, line, saver)
            line |= watch_loads(run, pipeline.grid, optimizer, loads)
            line |= speed(run, phase, size, time.perf_counter() - began)

            # 3. the log; a checkpoint once in a while, the last one before held-out text, which may take long
            log.write(line)
            saver.poll()                                                  # raises if a checkpoint could not be written
            if is_done(run) or stop.agreed:
                checkpoint = end_phase(run, saver, pipeline, optimizer)
            elif is_due(settings["save_every"], progress["step"]) and not (progress["skipped_in_a_row"]
                                                                           or phase_is_done(run)):
                save_finite(run, saver, pipeline, optimizer)
            if is_done(run) or is_due(settings["eval_every"], progress["step"]):
                log.add(run.stage.evaluate(pipeline))
        if not (is_done(run) or stop.agreed):
            checkpoint = end_phase(run, saver, pipeline, optimizer)
            del pipeline, optimizer                                       # the next one may not fit beside it
            gc.collect()                                                  # which a model with compiled layers waits for
    conclude(run, checkpoint)


def advance(run, phase, size, optimizer):
    """Counts the step that begins, of so many sequences, and sets its rate -> the beginning of its line of the log."""
    progress, new_tokens = run.progress, size * phase.seq_len
    progress["step"] += 1
    progress["tokens"] += new_tokens
    progress["phase_tokens"] += new_tokens
    lr = phase.learning_rate(progress["phase_tokens"])
    for group in optimizer.param_groups:
        group["lr"] = lr
    return dict(stage=run.kind.name, step=progress["step"], tokens=progress["tokens"], lr=lr)


def end_phase(run, saver, pipeline, optimizer):
    """The checkpoint at the end of a phase, or at an early one: the next phase goes on from it."""
    if phase_is_done(run) and not is_done(run):
        run.progress.update(phase=run.progress["phase"] + 1, phase_tokens=0)
    save_finite(run, saver, pipeline, optimizer)
    saver.wait()
    return run.folder / "ckpt" / f"step_{run.progress['step']}"


def phase_is_done(run):
    return run.progress["tokens"] >= tokens_of(run.phases[:run.progress["phase"] + 1])


def is_done(run):
    return run.progress["phase"] == len(run.phases) - 1 and phase_is_done(run)


def is_due(every, step):
    """Whether something falls on this step that is done every so many; 0: never."""
    return every > 0 and step % every == 0


def first_of_doublings(steps):
    """Of ascending steps the first in each of 1, 2-3, 4-7, 8-15, ...: what is once among them stays among them."""
    return sorted({step.bit_length(): step for step in reversed(steps)}.values())


def watch_loads(run, grid, optimizer, loads):
    """Record a step's loads (MoE layers, E), and let live balance see them and act: what the log tells of it."""
    if run.settings["record_loads"] and parallel.rank() == 0:
        record_loads(run.folder / "loads.npy", run.progress["step"], loads.cpu().numpy().astype(np.int32))
    live = grid and grid.live
    return live.after_step(run.progress["step"], loads, optimizer) if live else {}


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


def count_skips(run, line, saver):
    """Steps that were not finite: how many, and an end after too many in a row."""
    # line["skipped"] is 1 or 0 as the step gave it, or the share of its updates, and then the count that the log shows
    progress, most = run.progress, run.settings["max_skips"]
    progress["skipped_in_a_row"] = progress["skipped_in_a_row"] + 1 if line["skipped"] else 0
    progress["skipped"] += math.ceil(line["skipped"])
    line["skipped"] = progress["skipped"]
    if progress["skipped_in_a_row"] >= most:
        give_up(run, saver, f"loss or gradient not finite {most} times in a row")


def save_finite(run, saver, pipeline, optimizer):
    """A checkpoint, but never one of weights that are not finite: the older ones that it would displace are better."""
    weights = pipeline.model.parameters()
    broken = sum((~torch.isfinite(parallel.local(weight))).any().float() for weight in weights)
    if parallel.all_sum(broken).item():
        give_up(run, saver, "weights are not finite")
    parallel.save(saver, pipeline.model, optimizer, run.progress, pipeline.grid)


def give_up(run, saver, what):
    """Ends a run that cannot go on, and names the checkpoint from which it could: all that are kept are finite."""
    saver.wait()
    last = newest(run.folder)
    where = f"start anew, or from {last}," if last else "start anew"
    sys.exit(f"train.py: step {run.progress['step']}: {what}; {where} with a lower --lr")


# ---------------------------------------------------------------------------------------------------------------------
# Log and screen


def speed(run, phase, size, seconds):
    """What the log tells of the time and memory of a step of so many sequences."""
    rate = size * phase.seq_len / seconds
    peak = run.settings["peak_tflops"] * 1e12 * parallel.world_size()
    mfu = rate * flops_per_token(run.config, phase.seq_len) / peak if peak else None
    return dict(step_ms=seconds * 1e3, tokens_per_s=rate, mfu=mfu, mem_gib=parallel.peak_memory(run.device) / 2**30)


class Log:
    """metrics.jsonl, a line a step, and the screen. Rank 0 writes."""

    def __init__(self, run):
        self.run = run
        self.total = tokens_of(run.phases)
        self.first_token, self.busy = run.progress["tokens"], 0.0         # busy: seconds in steps
        path = run.folder / "metrics.jsonl" if parallel.rank() == 0 else os.devnull
        self.file = open(path, "a", buffering=1, encoding="utf-8")       # a line is written when it ends

    def put(self, line):
        self.line, self.place = line, self.file.tell()
        with naming(self.file.name):
            self.file.write(json.dumps(line) + "\n")

    def add(self, found):
        """What held-out data say goes into the line of its step, which is written before they are gone through."""
        if parallel.rank() == 0:
            self.file.truncate(self.place)
        self.put(self.line | found)
        print_heldout(self.run, found)

    def write(self, line):
        """A step's line."""
        self.put(line)
        compiled, seconds = self.run.settings["compile"], line["step_ms"] / 1e3
        if self.busy == 0 and compiled != "none":
            print(f"the first step, which compiled {compiled}, took {seconds:.1f} s", flush=True)
        self.busy += seconds
        seconds_a_token = self.busy / (line["tokens"] - self.first_token)
        left = timedelta(seconds=int(max(0, self.total - line["tokens"]) * seconds_a_token))
        print_step(self.run, line, share=min(1, line["tokens"] / self.total), left=left)


def print_step(run, line, share, left):
    text = ("step {step} ({share:.1%})  loss {loss:.4f}  mtp {mtp_loss:.4f}  aux {aux_loss:.4f}  norm {grad_norm:.2f}  "
            "lr {lr:.1e}  {step_ms:.0f} ms  {tokens_per_s:,.0f} tokens/s  {mem_gib:.2f} GiB  max_vio {max_vio:.2f}  "
            "left {left}")
    if "reward" in line:
        text += "  reward {reward:.3f}  solved {solved:.1%}  in format {in_format:.1%}  length {length:.1f}"
        if line["zero_spread"] == 1:
            text += "  no group differs in reward: nothing to learn"
    if line["mfu"]:
        text += f"  MFU {line['mfu']:.1%} of {run.settings['peak_tflops']:g} TFLOP/s"
    if line["skipped"]:
        text += "  skipped {skipped}"
    if line.get("balance_moved"):
        text += "  experts moved {balance_moved}"
    print(text.format(**line, share=share, left=left), flush=True)


def print_heldout(run, found):
    if "val_bpb" in found:
        facts = run.corpus.facts
        ours = found["val_bpb"] * facts["heldout_bytes"] / 8              # bytes that an arithmetic coder would need
        beside = f", {ours / facts['xz']:.3f} of xz -9" if facts["heldout_bytes"] >= LEAST_FOR_XZ else ""
        print(f"held-out: {found['val_bpb']:.4f} bits per byte{beside}", flush=True)
    elif "val_loss" in found:                                             # conversations: only answers count, not bytes
        print(f"held-out: {found['val_loss']:.4f} nats a token", flush=True)


def introduce(run):
    """What will be trained, on what."""
    millions = {part: f"{count / 1e6:.2f}M" for part, count in count_params(run.config).items()}
    plan, settings = run.plan, run.settings
    begins = settings["init"] or settings["preset"]
    print(f"{run.folder}: {begins} on {run.device}, {settings['precision']}, {settings['threads']} threads; "
          f"{millions['total']} parameters, {millions['active']} active; MTP {millions['mtp']} more")
    cuts = " ".join(f"{axis} {getattr(plan, axis)}" for axis in ("pp", "dp", "cp", "tp", "ep"))
    print(f"processes: {parallel.world_size()} ({cuts}), {plan.node_size} in a node, {plan.exchange} exchange; a "
          f"checkpoint takes {12 * parameters(run.config) / 2**30:.2g} GiB")
    for line in (*run.stage.describe(run.corpus.facts), *levels_alike(run), *run.phases):
        print(line, flush=True)
    for number, phase in enumerate(run.phases, 1):
        if phase.warmup_tokens > phase.tokens and not run.stored:
            print(f"the warm-up of phase {number} is longer than the phase: it ends at "
                  f"{phase.tokens / phase.warmup_tokens:.0%} of its lr; use fewer --warmup-steps or more --steps")
    if run.checkpoint:
        print(f"resumed from {run.checkpoint}", flush=True)
        if run.phases != run.stored["phases"]:
            number, done = run.progress["phase"], run.progress["phase_tokens"]
            before, phase = run.stored["phases"][number].learning_rate(done), run.phases[number]
            now = phase.learning_rate(done + phase.batch(done) * phase.seq_len)
            print(f"another length is another schedule: the learning rate, {before:.1e} so far, goes on from "
                  f"{now:.1e}; --init {run.folder} with an --lr of its own begins a new run instead")
    if is_done(run):
        print(f"{run.folder} is finished: {run.progress['step']} steps; --steps with a larger number trains on")


def levels_alike(run):
    """A line where levels of the balance loss mean the same under this plan."""
    def group(level):
        return balance_group(replace(run.config, balance=level, balance_group=0), run.plan)

    chosen, levels = run.config.balance, {"sequence", "micro_batch", "ep_group", "dp_group"}
    alike = sorted(level for level in levels - {chosen} if group(level) == group(chosen))
    if chosen != "none" and run.config.aux_loss_alpha and alike:
        yield f"balance={chosen} is {' and '.join(alike)} too in this plan: --micro-batch, --ep and --dp set them apart"


def conclude(run, checkpoint):
    """How to go on with a run that was stopped; a sample of text from one that is done."""
    if parallel.rank() > 0:
        return
    if not is_done(run):
        print(f"stopped after step {run.progress['step']}; go on with: python train.py {run.kind.name} --resume "
              f"{run.folder}")
        return
    try:
        opened = open_model(str(checkpoint), parallel.pick_device(run.settings["device"]))
        (text,), _ = continue_texts(opened, [run.stage.example], defaults_of(SAMPLE_OPTIONS),
                                    chat=run.kind is not Pretrain)
    except (RuntimeError, ValueError) as error:                           # too large for one device, or for its window
        print(f"no sample: {str(error).splitlines()[0]}")
        return
    write_whole(run.folder / "sample.txt", text)
    print(f"a sample ({run.folder / 'sample.txt'}; more: python train.py sample --init {run.folder}):\n{text}")


# ---------------------------------------------------------------------------------------------------------------------
# Commands

SAMPLE_OPTIONS = dict(
    init=Option("", "a run's folder, one of its ckpt/step_N, or a Hugging Face folder"),
    prompt=Option([], "text to continue, or, by a model after sft, to answer; several at once; \"\": the beginning of "
                      "a document. Default: what a pipe brings, and at a terminal line after line"),
    average=OPTIONS["average"],
    file=Option("", "FILE with the text to continue"),
    new_tokens=Option(0, "tokens to write, or up to the end of the document; 0: 200, or what the model's window holds",
                      least=0, most=10**9),
    draft=Option(0, "tokens that multi-token prediction drafts in each step and the model checks: faster where drafts "
                    "hold, and as likely as without", least=0, most=64),
    temperature=Option(0.8, "below 0.01: always the likeliest token", least=0, most=100),
    top_k=Option(0, "choose among the k likeliest; 0: all", least=0, most=2**31),
    top_p=Option(0.95, "choose among the likeliest that hold this probability together", least=0.001, most=1),
    seed=Option(0, "of the choice", least=0, most=2**63 - 1),
    device=OPTIONS["device"],
)


def sample(given):
    settings = defaults_of(SAMPLE_OPTIONS) | given
    if not settings["init"]:
        raise UserError("sample needs --init, a run's folder or a Hugging Face folder")
    with refusals():
        opened = open_model(settings["init"], parallel.pick_device(settings["device"]), settings["average"])
        folder = folder_of(settings["init"])                              # a run of sft or rl answers, others continue
        chat = newest(folder) is not None and read_config(folder)["stage"] != Pretrain.name
        for prompts in prompts_of(settings):
            write_texts(opened, prompts, settings, chat)


def prompts_of(settings):
    """Lists of prompts to continue at once: what was typed and a file's text; else a pipe's, or a terminal's lines."""
    prompts = [os.fsencode(prompt) for prompt in settings["prompt"]]      # as the terminal gave them
    if settings["file"]:
        with utf8(settings["file"]):
            prompts.append(Path(settings["file"]).read_bytes())
    if prompts:
        yield [prompt.decode(errors="replace") for prompt in prompts]
    elif not sys.stdin.isatty():
        yield [sys.stdin.buffer.read().decode(errors="replace")]
    else:
        print("a line is a prompt; Ctrl-D ends", file=sys.stderr)
        while True:
            try:
                yield [input("> ")]
            except EOFError:
                return


def write_texts(opened, prompts, settings, chat):
    """On the screen: one text as it comes, several when they are whole; how drafts did."""
    start = time.perf_counter()
    if len(prompts) == 1:
        _, result = continue_texts(opened, prompts, settings, chat, partial(print, end="", flush=True))
        print()
    else:
        texts, result = continue_texts(opened, prompts, settings, chat)
        for number, text in enumerate(texts, 1):
            print(f"--- {number}\n{text}")
    rate = sum(len(answer.ids) for answer in result.answers) / (time.perf_counter() - start)
    drafts = ""
    if settings["draft"]:
        shares = ", ".join(f"{held / result.rounds:.0%}" for held in result.held)
        drafts = f"; drafts that held: {shares}; {1 + sum(result.held) / result.rounds:.2f} tokens a step"
    print(f"{rate:.0f} tokens/s{drafts}", file=sys.stderr)


def open_model(init, device, average=1):
    """A run or a folder -> (its model, its tokenizer, END's id)."""
    source = open_source(init, average)
    source.check(source.config)
    model = Model(source.config).to(device)
    source.fill(model)
    encoding = source.encoding()
    refuse_larger(encoding, source.config)
    return model, encoding, encoding.eot_token


def continue_texts(opened, prompts, settings, chat, on_text=None):
    """-> ([each prompt with what the model writes after it], model.Answers). opened: of open_model; settings: those of
    SAMPLE_OPTIONS; chat: prompts are a user's words, which the assistant answers; on_text takes a single text piece by
    piece, the prompt with the first."""
    model, encoding, end = opened
    device = next(model.parameters()).device
    if chat:
        ids, stop = [question(encoding, prompt) for prompt in prompts], special_id(encoding, TURN_END)
    else:
        ids, stop = [[end, *encoding.encode_ordinary(prompt)] for prompt in prompts], end
    ids = [torch.tensor(prompt, device=device) for prompt in ids]
    how = {name: settings[name] for name in ("temperature", "top_k", "top_p", "seed")}
    if how["temperature"] < 0.01:
        how["temperature"] = 0                                            # so near to it that a division overflows
    room = model.config.max_position_embeddings - max(map(len, ids))
    new_tokens = settings["new_tokens"] or max(1, min(200, room))
    # a character may end in a later token: what it lacks waits in its decoder
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]
    texts, shown = [""] * len(prompts), ids_of(encoding) - {stop}

    def on_tokens(number, ids, final=False):
        piece = decoders[number].decode(encoding.decode_bytes([id for id in ids if id in shown]), final)
        piece = piece if texts[number] else prompts[number] + "\n" * chat + piece
        texts[number] += piece
        if on_text is not None:
            on_text(piece)

    result = generate(model, ids, new_tokens, **how, drafts=settings["draft"], stop=(stop,), on_tokens=on_tokens)
    for number in range(len(prompts)):
        on_tokens(number, [], final=True)
    return texts, result


EXPORT_OPTIONS = dict(
    init=SAMPLE_OPTIONS["init"],
    average=OPTIONS["average"],
    out=Option("", "the Hugging Face folder that is made"),
    dtype=Option("bf16", "of what is written", choices=("bf16", "fp32")),
)


def export(given):
    """Writes the model and the tokenizer of --init as a folder that others' programs load."""
    settings = defaults_of(EXPORT_OPTIONS) | given
    for name, what in dict(init="a run's folder", out="the Hugging Face folder to make").items():
        if not settings[name]:
            raise UserError(f"export needs {flag(name)}, {what}")
    with refusals():
        model, encoding, end = open_model(settings["init"], torch.device("cpu"), settings["average"])
        dtype = dict(bf16=torch.bfloat16, fp32=torch.float32)[settings["dtype"]]
        config = config_to_hf(model.config) | dict(torch_dtype=str(dtype).removeprefix("torch."), bos_token_id=end,
                                                   eos_token_id=end)
        files = {"config.json": config} | tokenizer_files(encoding)
        texts = {name: json.dumps(content, indent=1) for name, content in files.items()}
        parallel.write_published(settings["out"], model, dtype, texts)
    others = [f"{key}={getattr(model.config, key)}" for key, theirs in IN_TRANSFORMERS.items()
              if getattr(model.config, key) != theirs]
    verdict = "transformers loads it"
    if others:
        verdict = f"--init takes it; transformers has no {', '.join(others)}: does not load it, or computes otherwise"
    print(f"wrote {settings['out']}: {verdict}")


class Command(typing.NamedTuple):
    function: typing.Callable              # takes what was typed, by name
    options: dict
    text: str
    recipes: dict = {}                     # what has defaults of its own -> these


COMMANDS = dict(
    pretrain=Command(partial(train, Pretrain), Pretrain.options, "train on text (meant where no command is given)",
                     {f"--preset {name}, without --init": recipe for name, recipe in RECIPES.items()}),
    sft=Command(partial(train, SFT), SFT.options, "fine-tune the model of --init on conversations",
                dict(sft=SFT.recipe)),
    rl=Command(partial(train, RL), RL.options, "reinforce what checkers reward, from the model of --init",
               dict(rl=RL.recipe)),
    sample=Command(sample, SAMPLE_OPTIONS, "write text"),
    export=Command(export, EXPORT_OPTIONS, "write a Hugging Face folder"),
)


def parse(argv):
    """-> (the command's function, dict of what was typed)."""
    parser = sim.Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        recipes = [f"{what} has defaults of its own: {typed_as(recipe)}" for what, recipe in command.recipes.items()]
        words = commands.add_parser(name, help=command.text, allow_abbrev=False, epilog=". ".join(recipes))
        plan = words.add_argument_group("plan: how the model is cut and run, see Plan in sim.py")     # may stay empty
        for option_name, option in command.options.items():
            add_option(plan if option_name in PLAN_OPTIONS else words, option_name, option)
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise UserError(f"{argv[0]!r} is no command: use one of {', '.join(COMMANDS)}")
    if not argv or argv[0] not in (*COMMANDS, "-h", "--help"):
        argv = ["pretrain", *argv]
    with refusals():
        typed = vars(parser.parse_args(argv))
        command = COMMANDS[typed.pop("command")]
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


def refuse_stray_variable():
    """Without torchrun, its variables let a process wait for ranks that are not there, or train as one of several."""
    for name, alone in dict(RANK="0", WORLD_SIZE="1").items():
        value = os.environ.get(name, alone)
        if value != alone and "TORCHELASTIC_RESTART_COUNT" not in os.environ:
            print(f"train.py: {name}={value} is set, but no torchrun: start with torchrun --nproc-per-node N train.py "
                  f"..., or unset it", file=sys.stderr)
            sys.exit(2)


def main(argv=None):
    refuse_stray_variable()
    sim.speak_any_letter()
    handlers = [(number, signal.getsignal(number)) for number in Stopper.signals]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    silence = open(os.devnull, "w") if parallel.rank() > 0 else sys.stdout        # rank 0 speaks for all
    try:
        with contextlib.redirect_stdout(silence):
            command, given = parse(sys.argv[1:] if argv is None else argv)
            command(given)
            parallel.leave_world()
    except KeyboardInterrupt:                                             # before the first step; then Stopper heeds it
        sys.exit("\ntrain.py: interrupted")                               # on a line of its own, behind half a text
    except BrokenPipeError:                                               # nobody reads on, as behind `| head`: leave
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # without a word, as others by SIGPIPE do
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, parallel.CheckpointError, OSError) as error:
        shared = isinstance(error, UserError)                             # what was typed, all ranks refuse
        if str(error) and (parallel.rank() == 0 or not shared or isinstance(error, CheckerError)):
            advice = ""
            if isinstance(error, parallel.SaveFailed):
                advice = "; make room, then --resume the run, or start it again if this was its first checkpoint"
            print(f"train.py: {sim.words_of(error)}{advice}", file=sys.stderr)
        if shared:
            parallel.leave_world()
        sys.exit(2)
    except RuntimeError as error:
        if not parallel.is_lost_contact(error):
            raise
        sys.exit(f"train.py: rank {parallel.rank()} has lost contact; no sign of rank {parallel.missing_ranks()} "
                 f"({str(error).splitlines()[0].partition('. ')[0]}); --resume goes on from the newest checkpoint")
    finally:
        for number, handler in handlers:                                  # a caller goes on with its own
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
