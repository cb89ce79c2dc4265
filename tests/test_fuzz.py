"""
Inputs made by chance: whatever a setting, a file of JSON, a text, a checkpoint or a cache holds, train.py does what
is asked or refuses in one line with exit status 2. It is never silent about it, never hangs, shows no traceback.

    python tests/test_fuzz.py --cases 2000 --seed 1      # of each kind; prints how many were refused and how many right

A run is opened and makes one step. All cases of a kind are played in one process on one small run.
"""
import argparse
import base64
import collections
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import parallel  # noqa: E402
import train  # noqa: E402
from model import Answer, Answers  # noqa: E402

TINY = ("--set hidden_size=8 num_hidden_layers=2 intermediate_size=8 vocab_size=280 n_routed_experts=4 "
        "moe_intermediate_size=8 q_lora_rank=8 kv_lora_rank=8 num_attention_heads=2 qk_nope_head_dim=4 "
        "qk_rope_head_dim=4 v_head_dim=4 --seq-len 8 --global-batch 4 --micro-batch 2 --warmup-steps 0 "
        "--threads 1 --compile none --data text").split()
SECONDS = 30                               # until a case counts as hung
JUNK = [None, True, -1, 0, 1, 2, 3.5, 64, 10**9, 10**30, -10**30, 1e-40, 1e300, float("nan"), float("inf"), "", "x",
        "é", "nan", "\ud800", "../x", [], [[]], [1, 2], [[0, 2], [5, 4]], ["x"], {}, {"a": 1}, "[" * 50]
WORDS = ["-1", "0", "1", "2", "3", "0.5", "64", "1e9", str(10**30), "nan", "inf", "1e-40", "1e400", "", "x", "é",
         "true", "[]", "{}", "null", "1,2", "expert,act", "4 4", "none", "..", "/dev/null", "\udcff", "1GiB", "a=b",
         "=", "text", "norm_topk_prob=false", "n_routed_experts=0", "hidden_size=1e9", "rope_theta=0",
         "rope_scaling={}", "bf16"]


class Stepped(BaseException):
    """A step was made."""


class Hung(BaseException):
    """A case took too long."""


def make_base(folder):
    """A folder with a text, and a run of two steps on it."""
    os.chdir(folder)
    Path("text").mkdir()
    rng = random.Random(0)
    for number in range(4):
        Path("text", f"{number}.txt").write_text(" ".join(rng.choices("a few words é 12\n".split(" "), k=300)))
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*TINY, "--steps", "2", "--save-every", "1", "--out", "run"])


def nothing_written(model, prompts, new_tokens, drafts=0, **how):
    """In place of model.generate, which takes long."""
    return Answers([Answer() for _ in prompts], rounds=1, held=[0] * drafts)


def play(argv):
    """What came of a command, up to its second step: right, refused, or the fault as text."""
    made, step = [], train.train_step

    def counted(*args, **options):
        if made:
            raise Stepped
        made.append(True)
        return step(*args, **options)

    def hang(number, frame):
        raise Hung

    out, error = io.StringIO(), io.StringIO()
    generate = train.generate
    train.train_step, train.generate = counted, nothing_written
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            train.main([str(word) for word in argv])
        return "right"
    except Stepped:
        return "right"
    except Hung:
        return f"hung for {SECONDS} s"
    except SystemExit as stop:
        said = [line for line in error.getvalue().splitlines() if line.startswith("train.py") or ": error: " in line]
        is_refusal = stop.code == 2 and len(said) == 1 and len(said[0]) > 20
        return "refused" if is_refusal else f"status {stop.code!r}, said {error.getvalue()!r}"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        train.train_step, train.generate = step, generate


def spoil_json(rng, value):
    """The value with something in it replaced, taken away or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.1:
            del changed[key]
        elif rng.random() < 0.05:
            changed[rng.choice(["x", "", "step"])] = rng.choice(JUNK)
        else:
            changed[key] = spoil_json(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [spoil_json(rng, item) if i == place else item for i, item in enumerate(value)]
    return rng.choice(JUNK)


def spoil_bytes(rng, content):
    """Some bytes changed, or the end cut off, or nothing left."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 3, 30])):
        if content:
            content[rng.randrange(len(content))] = rng.choice([0, 10, 34, 91, 123, 255, rng.randrange(256)])
    return bytes(content[:rng.randrange(len(content) + 1)] if rng.random() < 0.3 else content)


def spoil_file(rng, path):
    """As JSON, if it is such, or by bytes."""
    if path.suffix == ".json" and rng.random() < 0.8:
        content = json.loads(path.read_text())
        path.write_text(json.dumps(spoil_json(rng, content)), errors="replace")
    else:
        path.write_bytes(spoil_bytes(rng, path.read_bytes()))


# ---------------------------------------------------------------------------------------------------------------------
# Kinds: each makes a case in the folder it is called in -> words of the command line


def settings(rng):
    command = rng.choice(["pretrain", "pretrain", "pretrain", "sample"])
    argv = ["pretrain", *TINY, "--out", "r"] if command == "pretrain" else ["sample", "--init", "run"]
    for name in rng.sample(list(train.COMMANDS[command].options), rng.choice([1, 1, 2, 3])):
        option = train.COMMANDS[command].options[name]
        words = WORDS + [str(choice) for choice in option.allowed.get("choices", ())]
        if name != "out":                                                 # which may well be a folder elsewhere
            argv.append(f"{train.flag(name)}={rng.choice(words)}")
    return argv


def phases(rng):
    whole = [dict(tokens=64, seq_len=8, global_batch=[[0, 2], [32, 4]], lr=1e-3, min_lr=1e-4, decay="cosine",
                  warmup_tokens=8), dict(tokens=64, seq_len=4, rope_theta=1e5, mix=dict(text=1.0))]
    content = dict(phases=whole) if rng.random() < 0.2 else whole
    Path("phases.json").write_text(json.dumps(spoil_json(rng, content)), errors="replace")
    if rng.random() < 0.2:
        spoil_file(rng, Path("phases.json"))
    argv = [*TINY, "--out", "r", "--phases", "phases.json"]
    return argv + ["--tokens", rng.choice(["100", "1e4"])] if rng.random() < 0.5 else argv


def run_folder(rng):
    spoil_file(rng, Path("run/config.json" if rng.random() < 0.7 else "run/tokenizer.tiktoken"))
    return rng.choice([["--resume", "run", "--steps", "3"], ["--resume", "run/ckpt/step_1"],
                       ["sample", "--init", "run"]])


def checkpoint(rng):
    """Also one whose list of files was written anew by who changed them."""
    folder = Path("run/ckpt/step_2")
    spoil_file(rng, rng.choice(sorted(folder.iterdir())))
    if rng.random() < 0.6:
        (folder / parallel.MANIFEST).unlink()
        parallel.write_manifest(folder)
    return ["--resume", "run", "--steps", "3"]


def cache(rng):
    folder = next(Path(".").glob("data-*"))
    spoil_file(rng, rng.choice(sorted(folder.iterdir())))
    return [*TINY, "--out", "r"]


def text(rng):
    kind = rng.choice(["txt", "jsonl", "bin", "tiktoken", "txt", "jsonl"])
    argv = [*TINY[:-2], "--out", "r", "--data", f"new.{kind}"]
    if kind == "txt":
        content = Path("text/0.txt").read_bytes() * rng.choice([0, 1, 3])
    elif kind == "jsonl":
        rows = [dict(text="a few words\ud800 " * 20), dict(text=""), dict(text="more é"), dict(text="\0")]
        rows = spoil_json(rng, rows) if rng.random() < 0.5 else rows
        content = b"\n".join(json.dumps(row).encode() for row in rows) if isinstance(rows, list) else b"[" * 9999
    else:
        Path("new.bin").write_bytes(np.arange(200, dtype=np.uint16).tobytes())
        content = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
        Path("new.tiktoken").write_bytes(content)
        argv[-1:] = ["new.bin", "--tokenizer", "new.tiktoken"]
        content = Path(f"new.{kind}").read_bytes()
    Path(f"new.{kind}").write_bytes(spoil_bytes(rng, content) if rng.random() < 0.7 else content)
    return argv


KINDS = dict(settings=settings, phases=phases, run_folder=run_folder, checkpoint=checkpoint, cache=cache, text=text)


def fuzz(kind, cases, seed, base):
    """-> Counter of right and refused, faults as (number of the case, its command line, what came of it)."""
    counts, faults = collections.Counter(), []
    for number in range(cases):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(base, folder, dirs_exist_ok=True)
            os.chdir(folder)
            argv = KINDS[kind](random.Random(f"{kind},{seed},{number}"))
            found = play(argv)
            os.chdir("/")
        counts[found if found in ("right", "refused") else "fault"] += 1
        if found not in ("right", "refused"):
            faults.append((number, argv, found))
    return counts, faults


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, here = tmp_path_factory.mktemp("base"), os.getcwd()
    make_base(folder)
    os.chdir(here)
    return folder


FAST = dict(settings=40, phases=40, run_folder=15, checkpoint=8, cache=8, text=25)


@pytest.mark.parametrize("kind, cases", FAST.items())
def test_right_or_refused(base, monkeypatch, kind, cases):
    monkeypatch.chdir("/")
    counts, faults = fuzz(kind, cases, 0, base)
    assert not faults, faults[0]
    # a cache that does not fit is made anew
    assert counts["right"] and (counts["refused"] or kind == "cache"), counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as base_folder:
        make_base(base_folder)
        faulty = False
        for one in arguments.kinds:
            totals, found = fuzz(one, arguments.cases, arguments.seed, base_folder)
            print(one, dict(totals), flush=True)
            for case in found:
                print(*case, sep="\n", flush=True)
            faulty = faulty or bool(found)
    sys.exit(faulty)
