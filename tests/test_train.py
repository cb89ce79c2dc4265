"""
The trainer: tokenizer, data and its order, phases, one step, exact resume, and what is said to a user who errs.

Runs are made by train.main in this process on a few kilobytes of made-up text; what kills a run starts another.
"""
import hashlib
import json
import lzma
import math
import os
import platform
import random
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import parallel  # noqa: E402
import train  # noqa: E402
from model import PRESETS, Model  # noqa: E402
from sim import Plan  # noqa: E402

PANGU_ULTRA = str(ROOT / "tests" / "data" / "phases_pangu_ultra.json")
SHAPE = ("hidden_size=16 num_hidden_layers=2 intermediate_size=32 vocab_size=300 n_routed_experts=4 "
         "moe_intermediate_size=8 q_lora_rank=8 kv_lora_rank=8 num_attention_heads=2 qk_nope_head_dim=8 "
         "qk_rope_head_dim=4 v_head_dim=8")
TINY = (f"--set {SHAPE} --seq-len 16 --global-batch 4 --micro-batch 2 --warmup-steps 2 --threads 1 "
        "--compile none").split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of 8 files of words in a random order; that which is held out, for each run to go through, is short."""
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    words = "the model reads a word and guesses which one follows é 12 (x_y)\n".split(" ")
    for number in range(8):
        (folder / f"{number}.txt").write_text(" ".join(rng.choices(words, k=100 if number == 2 else 1000)))
    return folder


@pytest.fixture
def at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv):
    train.main([str(word) for word in argv])


def refusal(capsys, *argv):
    """What a refused command says: one line, exit status 2."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    return error[-1]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(checkpoint, tmp_path):
    """All tensors of a checkpoint's model and optimizer as one hash."""
    dcp_to_torch_save(checkpoint, tmp_path / "all.pt")
    state = torch.load(tmp_path / "all.pt", weights_only=False)
    digest = hashlib.sha256()

    def add(name, value):
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{name}.{key}", value[key])
        elif isinstance(value, torch.Tensor):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
    add("model", state["model"])
    add("optimizer", state["optimizer"])
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def test_first_merges():
    """aaabdaaabac: 'aa' (4 times) is the first pair, then 'aaa' or 'ab'."""
    ranks = train.learn_bpe(["aaabdaaabac"], 256 + 4)
    tokens = sorted(ranks, key=ranks.get)
    assert tokens[:256] == [bytes([i]) for i in range(256)]
    assert tokens[256] == b"aa"
    assert len(ranks) == 259


def test_bpe_equals_the_plain_algorithm():
    """The fast bookkeeping finds the same merges as counting all pairs anew each time."""
    text = (ROOT / "tests" / "test_train.py").read_text()[:6000]
    fast = train.learn_bpe([text], 256 + 60)
    counts = {}
    for word in train.regex.findall(train.PATTERN, text):
        counts[word] = counts.get(word, 0) + 1
    words = []
    for word, n in counts.items():
        parts = [word[i:i + train.LONGEST] for i in range(0, len(word), train.LONGEST)]
        words += [[[bytes([b]) for b in part.encode()], n] for part in parts]
    vocabulary = [bytes([i]) for i in range(256)]
    while len(vocabulary) < 256 + 59:
        pairs = {}
        for word, n in words:
            for pair in zip(word, word[1:]):
                if pair[0] + pair[1] not in vocabulary:
                    pairs[pair] = pairs.get(pair, 0) + n
        best = min(pairs, key=lambda pair: (-pairs[pair], [vocabulary.index(part) for part in pair]))
        vocabulary.append(best[0] + best[1])
        for entry in words:
            entry[0] = joined(entry[0], best)
    assert sorted(fast, key=fast.get) == vocabulary


def joined(word, pair):
    out, i = [], 0
    while i < len(word):
        both = tuple(word[i:i + 2]) == pair
        out.append(pair[0] + pair[1] if both else word[i])
        i += 2 if both else 1
    return out


def test_round_trip_of_any_text():
    encoding = train.make_encoding(train.learn_bpe(["a few words, é and 字 <|endoftext|>"] * 3, 280))
    for text in ("", "\0", "é字\r\n  <|endoftext|>", "".join(map(chr, range(1, 2000)))):
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_saved_encoding_is_the_same(at):
    encoding = train.make_encoding(train.learn_bpe(["some words, some more words"], 270))
    train.save_encoding(encoding, at / "t.tiktoken")
    again = train.load_encoding(at / "t.tiktoken")
    assert again.encode_ordinary("some other words") == encoding.encode_ordinary("some other words")
    assert again.n_vocab == encoding.n_vocab


def test_ids_reserved_for_conversations(text, at):
    """END and 16 ids follow the learnt ones and count as part of the vocabulary; no text is encoded as one of them."""
    corpus = corpus_of([text], at)
    encoding = corpus.encoding
    assert encoding.n_vocab == 300 and len(train.RESERVED) == 16
    ids = [encoding.encode_single_token(word) for word in (train.END, *train.RESERVED)]
    assert ids == list(range(283, 300)) and corpus.encoding.eot_token == 283
    assert max(encoding.encode_ordinary("".join((train.END, *train.RESERVED)))) < 283
    # a file of ranks has room for the same, so another run can take this one's vocabulary
    train.save_encoding(encoding, at / "t.tiktoken")
    assert train.load_encoding(at / "t.tiktoken")._special_tokens == encoding._special_tokens


def test_end_behind_a_gap(at):
    """p50k_base leaves out id 50256, END's, and goes on; a file of such ranks has END after the highest."""
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 300}
    train.save_encoding(train.make_encoding(ranks), at / "t.tiktoken")
    encoding = train.load_encoding(at / "t.tiktoken")
    assert encoding.encode_ordinary("ab") == [300] and encoding.encode_single_token(train.END) == 301
    named = train.make_encoding(ranks, special={train.END: 256})
    assert named.decode([256, 300]) == train.END + "ab"


# ---------------------------------------------------------------------------------------------------------------------
# Data


def corpus_of(data, at, **changes):
    settings = train.settings_of(dict(data=[str(path) for path in data], **changes))
    return train.open_corpus(train.make_cache(settings, train.find_encoding(settings["tokenizer"]), 300, at))


def test_tokens_give_back_the_text(text, at):
    """Decoded, the two files of tokens hold every byte once, documents ended by END."""
    corpus = corpus_of([text], at)
    parts = [corpus.encoding.decode_bytes(tokens[1:].tolist()) for tokens in (corpus.train["text"], corpus.heldout)]
    files = {file.read_bytes() for file in text.iterdir()}
    found = {document for part in parts for document in part.split(train.END.encode()) if document}
    assert found == files and corpus.facts["files"] == 8
    assert corpus.facts["train_bytes"] + corpus.facts["heldout_bytes"] == sum(map(len, files))
    held = parts[1].replace(train.END.encode(), b"")
    assert len(held) == corpus.facts["heldout_bytes"] and corpus.facts["xz"] == len(lzma.compress(held, preset=9))


@pytest.mark.parametrize("count, share, held", [(300, 0.02, range(1, 300, 50)), (7, 0.5, (1, 3, 5)), (9, 0, ())])
def test_held_out_is_every_nth_piece(at, count, share, held):
    """The second of every n = 1 / share pieces, files in the order of a hash of their names."""
    for number in range(count):
        (at / f"{number}.txt").write_text("word")
    files = train.list_files([str(at)])
    assert sorted(file.name for file in files) != [file.name for file in files]
    pieces = list(train.pieces_of(files, train.settings_of(dict(heldout=share))))
    assert [number for number, piece in enumerate(pieces) if piece.is_heldout] == list(held)


def test_held_out_of_one_large_file_and_bounded(at, monkeypatch):
    """A file of 20 pieces is held out in parts, too; of a large text no more than the bound."""
    (at / "large.txt").write_text("word\n" * (20 * train.PIECE // 5))
    files = train.list_files([str(at)])
    held = [piece.is_heldout for piece in train.pieces_of(files, train.settings_of(dict(heldout=0.1)))]
    assert sum(held) == 2 and len(held) == 20
    monkeypatch.setattr(train, "HELDOUT_BYTES", train.PIECE)
    assert sum(piece.is_heldout for piece in train.pieces_of(files, train.settings_of(dict(heldout=0.1)))) == 1


def test_tokenised_once_and_change_noticed(text, at, capsys):
    corpus_of([text], at)
    capsys.readouterr()
    corpus_of([text], at)
    assert "learning" not in capsys.readouterr().out
    os.utime(text / "0.txt", (1, 1))
    corpus_of([text], at)
    assert "learning" in capsys.readouterr().out
    assert len(list(at.glob("data-*"))) == 2


def test_two_runs_tokenise_at_once(text, at, monkeypatch):
    """The second to end finds the first one's corpus and takes it."""
    tokenise = train.tokenise

    def slowly(*args):
        monkeypatch.setattr(train, "tokenise", tokenise)
        corpus_of([text], at)
        tokenise(*args)

    monkeypatch.setattr(train, "tokenise", slowly)
    assert corpus_of([text], at).facts["files"] == 8
    assert len(list(at.glob("data-*"))) == 1


def test_sources_agree(text, at):
    """The same documents as .jsonl and as a .bin of their tokens give the same training tokens."""
    documents = [file.read_text() for file in sorted(text.iterdir())]
    lines = "".join(json.dumps(dict(text=document)) + "\n" for document in documents)
    (at / "a.jsonl").write_text(lines)
    plain = corpus_of([at / "a.jsonl"], at)
    train.save_encoding(plain.encoding, at / "t.tiktoken")
    np.array([*plain.train["text"]], np.uint16).tofile(at / "a.bin")
    tokens = corpus_of([at / "a.bin"], at, tokenizer=str(at / "t.tiktoken"))
    assert np.array_equal(tokens.train["text"][1:], plain.train["text"])


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 1000])
def test_shuffle_is_a_permutation(n):
    order = [train.shuffled(i, n, "seed") for i in range(n)]
    assert sorted(order) == list(range(n))
    assert n < 17 or order != list(range(n))


def test_no_token_twice_in_an_epoch(text, at):
    corpus = corpus_of([text], at)
    corpus.train["text"] = np.arange(1000)                                # a token is its own place
    phase = train.Phase(tokens=1000, seq_len=16, global_batch=4, lr=1, min_lr=1)
    order = train.Order(corpus, phase, 2, 0)
    n_windows = (1000 - 18) // 16 + 1
    epoch = np.concatenate([order.window(i)[:16] for i in range(n_windows)])
    assert len(set(epoch.tolist())) == n_windows * 16
    again = np.concatenate([order.window(n_windows + i)[:16] for i in range(n_windows)])
    assert set(epoch.tolist()) == set(again.tolist()) and not np.array_equal(epoch, again)
    assert train.own_sequences(Plan(dp=2, micro_batch=2, global_batch=8), 8, 8) == [8, 9, 12, 13]         # of rank 0


def test_mix_has_the_shares_asked_for(text, at):
    corpus = corpus_of([f"a={text}", f"b={ROOT / 'tests'}"], at)
    phase = train.Phase(tokens=1000, seq_len=16, global_batch=4, lr=1, min_lr=1, mix=dict(a=0.25, b=0.75))
    pattern = train.Order(corpus, phase, 2, 0).pattern
    assert pattern.count("a") == 250 and len(pattern) == 1000
    assert set(train.Order(corpus, train.replace(phase, mix=dict(b=1.0)), 2, 0).pattern) == {"b"}    # some are enough
    with pytest.raises(ValueError, match="NAME=PATH"):
        train.mix_pattern(corpus, train.replace(phase, mix=dict(c=1)), 0)


def test_examples_shift_and_documents():
    """Window 1 2 E 4 5 6 with one MTP depth: inputs 1 2 E 4; E belongs to what it ends.

    Targets 2 E 4 5 and E 4 5 6, of which 4 and 5 lie in the document after that of 2 and E.
    """
    windows = np.array([[1, 2, 9, 4, 5, 6]])
    batch = train.examples(windows, 2, torch.device("cpu"), train.document_numbers(windows, end=9))
    assert batch["ids"].tolist() == [[1, 2, 9, 4]]
    assert batch["targets"].tolist() == [[[2, 9, 4, 5], [9, -100, -100, 6]]]
    assert batch["doc_ids"].tolist() == [[0, 0, 0, 1]]


# ---------------------------------------------------------------------------------------------------------------------
# Phases


def test_learning_rate():
    phase = train.Phase(tokens=1000, seq_len=1, global_batch=1, lr=1.0, min_lr=0.1, warmup_tokens=100)
    assert phase.learning_rate(50) == 0.5 and phase.learning_rate(1000) == pytest.approx(0.1)
    assert phase.learning_rate(550) == pytest.approx(0.55)               # half way from the end of the warm-up
    assert phase.learning_rate(101) == pytest.approx(1, abs=1e-5)        # nothing is lost there


def test_a_batch_that_grows():
    phase = train.Phase(tokens=1000, seq_len=1, global_batch=[[0, 4], [100, 8], [250, 12]], lr=1.0, min_lr=0.1)
    assert [phase.batch(t) for t in (0, 99, 100, 249, 250, 1e6)] == [4, 4, 8, 8, 12, 12]


def test_published_phases_scale():
    given = dict(phases=PANGU_ULTRA, tokens=1.32e6, seq_len=64, global_batch=32, micro_batch=4, lr=1e-3)
    phases = train.make_phases(train.settings_of(given), given)
    assert sum(phase.tokens for phase in phases) == pytest.approx(1.32e6)
    assert [phase.seq_len for phase in phases] == [64, 64, 128, 512, 2048]
    assert phases[0].batches == [[0, 16], [pytest.approx(1.2e5), 24], [pytest.approx(1.9e5), 32]]
    assert phases[-1].lr == pytest.approx(7.5e-5) and phases[-1].rope_theta == 2.56e7


def test_phases_train_the_tokens_asked_for(text, at):
    """4 phases with sequences of 16 to 64: 1,501 tokens to within a batch of the last; the shortest run is said."""
    rows = [dict(tokens=tokens, seq_len=seq_len, global_batch=2) for tokens, seq_len in
            ((5e6, 16), (3e6, 16), (1e6, 32), (1e6, 64))]
    (at / "p.json").write_text(json.dumps(dict(source="made up", phases=rows)))
    options = ("--data", text, "--phases", "p.json", *TINY, "--global-batch", 2)
    run(*options, "--tokens", 1501, "--out", "r")
    tokens = [json.loads(line)["tokens"] for line in (at / "r/metrics.jsonl").read_text().splitlines()]
    assert 1501 <= tokens[-1] < 1501 + 128
    assert len(json.loads((at / "r/config.json").read_text())["phases"]) == 4


def test_phases_too_short(text, at, capsys):
    """The last phase, a tenth, needs a step of 2 x 64 tokens: 1,280 in all."""
    rows = [dict(tokens=9e6, seq_len=16, global_batch=2), dict(tokens=1e6, seq_len=64, global_batch=2)]
    (at / "p.json").write_text(json.dumps(rows))
    options = ("--data", text, "--phases", "p.json", *TINY, "--global-batch", 2)
    assert "use --tokens 1280 or more" in refusal(capsys, *options, "--tokens", 1279, "--out", "r")
    run(*options, "--tokens", 1280, "--out", "r")


@pytest.mark.parametrize("name, tokens", [("ultra", 13.2e12), ("pro", 13e12)])
def test_published_phases_as_published(name, tokens):
    """Unscaled, the files hold what was published; each names its source and what is assumed."""
    path = PANGU_ULTRA.replace("ultra", name)
    assert {"source", "assumed"} < set(json.loads(Path(path).read_text()))
    given = dict(phases=path)
    phases = train.make_phases(train.settings_of(given), given)
    assert sum(phase.tokens for phase in phases) == pytest.approx(tokens)
    assert all(phase.mix is None or sum(phase.mix.values()) == pytest.approx(1) for phase in phases)


def test_phases_file_changes_length_and_rope(text, at):
    """Two phases; the second, in a model rebuilt, has longer sequences and another RoPE base."""
    rows = [dict(tokens=256), dict(tokens=256, seq_len=32, rope_theta=1e5, global_batch=2, lr=1e-3)]
    (at / "p.json").write_text(json.dumps(rows))
    run("--data", text, "--phases", "p.json", "--out", "r", *TINY)
    assert len(losses(at / "r")) == 8 and len(json.loads((at / "r/config.json").read_text())["phases"]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# One step


def small_model(seed=0, **changes):
    config = train.replace(train.make_config(train.settings_of(dict(set=TINY[1:13]))), **changes)
    model = train.Model(config)
    model.init_weights(seed)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def random_batch(sequences=4, seed=0):
    windows = np.random.default_rng(seed).integers(0, 300, (sequences, 18))
    return train.examples(windows, 2, torch.device("cpu"))


def test_step_that_is_not_finite_changes_nothing():
    model, optimizer = small_model()
    train.train_step(parallel.Pipeline(model, Plan(micro_batch=2)), optimizer, random_batch(), 1.0)
    before = [t.clone() for t in (*model.parameters(), *(v for s in optimizer.state.values() for v in s.values()))]
    hook = model.norm.register_forward_hook(lambda module, inputs, out: out * math.nan)
    measures, _ = train.train_step(parallel.Pipeline(model, Plan(micro_batch=2)), optimizer, random_batch(), 1.0)
    measures = dict(zip(train.MEASURES, measures.tolist()))
    hook.remove()
    after = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    assert measures["skipped"] == 1 and all(torch.equal(a, b) for a, b in zip(before, after))
    measures, _ = train.train_step(parallel.Pipeline(model, Plan(micro_batch=2)), optimizer, random_batch(), 1.0)
    assert measures[train.MEASURES.index("skipped")] == 0


def test_accumulation_and_clipping():
    """Four micro-batches of one sequence step like one of four, and like torch's own clipping."""
    results = []
    for micro in (1, 4):
        model, optimizer = small_model(balance="sequence")
        model.double()
        pipeline = parallel.Pipeline(model, Plan(micro_batch=micro))
        measures, _ = train.train_step(pipeline, optimizer, random_batch(), 0.1)
        results.append((measures[:4], torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    assert (results[0][1] - results[1][1]).abs().max() < 1e-9

    model, optimizer = small_model(balance="sequence")
    model.double()
    model(**random_batch()).total_loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, error_if_nonfinite=True)
    optimizer.step()
    assert (torch.cat([p.detach().flatten() for p in model.parameters()]) - results[1][1]).abs().max() < 1e-6


def test_evaluation_counts_every_token_once():
    """A model that knows nothing (all logits 0) has the bits per byte of a uniform guess, for any length."""
    model, _ = small_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    for n in (2, 17, 18, 40, 41, 100):
        corpus = train.Corpus(None, {}, np.arange(n) % 300, dict(heldout_bytes=2 * n))
        opened = SimpleNamespace(config=model.config, corpus=corpus, device=torch.device("cpu"),
                                 settings=dict(document_mask=0))
        found = train.Pretrain(opened).evaluate(parallel.Pipeline(model, Plan(seq_len=16, micro_batch=3)))
        assert found["val_loss"] == pytest.approx(math.log(300), rel=1e-5), n
        assert found["val_bpb"] == pytest.approx(math.log2(300) * (n - 1) / (2 * n), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Runs: the same, resumed, stopped, killed


def test_a_run_leaves_what_it_promises(text, at, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    run("--data", text, "--steps", 6, "--save-every", 2, "--keep", 2, "--out", "r", *TINY)
    assert signal.getsignal(signal.SIGTERM) == handler    # a child of this process would not heed train.py's
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in (at / "r/metrics.jsonl").read_text().splitlines()]
    keys = "step tokens loss mtp_loss aux_loss grad_norm lr step_ms tokens_per_s mfu mem_gib max_vio drop_rate skipped"
    assert all(next(iter(line.items())) == ("stage", "pretrain") for line in lines)
    assert all(set(keys.split()) <= set(line) for line in lines) and {"val_loss", "val_bpb"} <= set(lines[-1])
    assert parallel.steps_in(at / "r/ckpt") == [4, 6] and (at / "r/sample.txt").read_text().startswith("def ")
    assert "held-out: " in out and "left 0:00:0" in out
    assert json.loads((at / "r/config.json").read_text())["config"]["balance_group"] == 2
    run("sample", "--init", "r", "--prompt", "the é", "--new-tokens", 3)
    assert capsys.readouterr().out.startswith("the é")


def test_resumed_run_is_the_same_run(text, at):
    """8 steps at once; and 8 steps resumed twice, from the newest and from an older checkpoint: the same bits."""
    options = ("--data", text, "--steps", 8, "--save-every", 3, *TINY)
    run(*options, "--out", "a")
    run(*options, "--out", "b")
    assert losses(at / "a") == losses(at / "b")
    run("--resume", "b/ckpt/step_3")
    assert losses(at / "a") == losses(at / "b")
    assert weights(at / "a/ckpt/step_8", at) == weights(at / "b/ckpt/step_8", at)
    run("--resume", "b", "--steps", 10)
    assert len(losses(at / "b")) == 10 and losses(at / "b")[:8] == losses(at / "a")


NO_UTF8 = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")


def start(*argv, **options):
    """Another process, whose locale and terminal know ASCII alone."""
    return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, argv)], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS="1") | NO_UTF8, **options)


def wait_for_step(process, step):
    for line in process.stdout:
        if line.startswith(f"step {step} "):
            return
    raise AssertionError(process.stderr.read())


def test_a_signal_while_a_line_is_printed(monkeypatch, capfd):
    """Python refuses a print within a print; what is said of the signal does not pass through it."""
    before = {number: signal.getsignal(number) for number in train.Stopper.signals}
    try:
        stopper = train.Stopper()
        monkeypatch.setattr(sys, "stdout", None)
        stopper.ask(signal.SIGTERM, None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stopper.asked == "SIGTERM" and "SIGTERM: ends with a checkpoint" in capfd.readouterr().out


@pytest.mark.slow
def test_sigterm_then_kill_then_resume(text, at):
    """SIGTERM leaves a checkpoint and status 0, kill -9 what was complete; resumed, it is the same run."""
    options = ("--data", text, "--steps", 40, "--save-every", 4, *TINY)
    run(*options, "--out", "a")
    process = start(*options, "--out", "é")
    wait_for_step(process, 3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "SIGTERM: ends with a checkpoint" in out and "go on with" in out, err
    process = start("--resume", "é")
    wait_for_step(process, 20)
    process.kill()
    process.communicate()
    run("--resume", "é")
    assert losses(at / "a") == losses(at / "é")
    assert weights(at / "a/ckpt/step_40", at) == weights(at / "é/ckpt/step_40", at)


@pytest.mark.parametrize("bytes_of_a_file, name", [(2_000, "data-"), (40_000, "r/ckpt/step_1 could not be written")])
def test_full_disk_before_the_first_checkpoint(text, at, bytes_of_a_file, name):
    """What could not be written is named, and nothing is to be resumed."""
    limit = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, bytes_of_a_file)))
    _, err = start("--data", text, "--steps", 1, "--out", "r", *TINY, **limit).communicate(timeout=100)
    assert "File too large" in err and name in err and "--resume r" not in err and "Traceback" not in err, err


def test_full_disk_while_saving(text, at):
    """A file may grow to 40 kB, less than the checkpoint: one line, exit 2, the earlier checkpoint whole."""
    options = ("--data", text, "--steps", 4, "--out", "r", *TINY)
    run(*options)
    limit = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)))
    process = start("--resume", "r", "--steps", 8, **limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "could not be written (File too large); make room" in err, err
    assert "Traceback" not in err and parallel.steps_in(at / "r/ckpt") == [4] and not list(at.glob("r/ckpt/*.tmp"))
    parallel.check_files(at / "r/ckpt/step_4")


def test_folder_in_use(text, at, capsys):
    process = start("--data", text, "--steps", 100000, "--out", "r", *TINY)
    wait_for_step(process, 1)
    try:
        assert "in use by another run" in refusal(capsys, "--data", text, "--out", "r", *TINY)
    finally:
        process.kill()
        process.communicate()


def test_never_finite_stops(text, at):
    with pytest.raises(SystemExit) as stop:
        run("--data", text, "--steps", 50, "--out", "r", *TINY, "--lr", "1e30", "--warmup-steps", 0, "--max-skips", 3)
    assert "not finite 3 times in a row" in str(stop.value) and "lower --lr" in str(stop.value)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: each with one clear line


def test_bad_settings(text, at, capsys):
    for argv, words in [
            (("--preset", "huge"), "--preset='huge': use one of tiny"),
            (("--set", "hiden_size=3"), "--set hiden_size=3: write KEY=VALUE with a key of Config"),
            (("--step", "3"), "--step is no flag here (nearest: --steps): see train.py pretrain --help"),
            (("--set", "num_experts_per_tok=99"), "num_experts_per_tok=99"),
            (("--colour", "red"), "--colour is no flag here: see train.py pretrain --help"),
            (("--init", ""), "--init is empty: give a value"),
            (("--resume", ""), "--resume is empty: give a value"),
            (("--data", ""), "--data is empty: give a value"),
            (("--device", "tpu"), "use auto, cpu, cuda or npu"),
            (("--precision", "fp4"), "use one of auto, fp32, bf16"),
            (("--seq-len", "5000"), "--set max_position_embeddings=5000"),
            (("--global-batch", "5", "--micro-batch", "2"), "global_batch=5"),
            (("--phases", "none.json"), "no such file"),
            (("--tokenizer", "none.tiktoken"), "no tiktoken file"),
            (("--data", "nowhere"), "--data nowhere: no such file or folder")]:
        assert words in refusal(capsys, "--data", text, "--out", "r", *argv), argv
    assert not (at / "r").exists()
    with pytest.raises(SystemExit):
        train.main(["smaple", "--init", "r"])
    assert "'smaple' is no command: use one of pretrain, sft, rl, sample" in capsys.readouterr().err


def test_a_run_that_is_named_like_a_checkpoint(text, at, capsys):
    run("--data", text, "--steps", 1, "--out", "step_by_step", *TINY, "--warmup-steps", 2)
    assert "the warm-up of phase 1 is longer than the phase: it ends at 50% of its lr" in capsys.readouterr().out
    run("--resume", "step_by_step", "--steps", 2)
    run("--resume", "step_by_step/ckpt/step_1", "--steps", 2)
    assert len((at / "step_by_step/metrics.jsonl").read_text().splitlines()) == 2


def test_bad_text(text, at, capsys):
    (at / "empty").mkdir()
    (at / "latin.txt").write_bytes(b"caf\xe9 " * 10)
    (at / "zero.txt").write_bytes(b"a\0b")
    (at / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (at / "nofield.jsonl").write_text('{"body": "a"}\n')
    (at / "short.txt").write_text("short")
    np.array([1, 2, 65000], np.uint16).tofile(at / "ids.bin")
    train.save_encoding(train.make_encoding(train.learn_bpe(["ab"], 258)), at / "t.tiktoken")
    for argv, words in [
            (("empty",), "this folder has no text"),
            (("latin.txt",), "latin.txt is not UTF-8 text"),
            (("zero.txt",), "zero.txt is not text"),
            (("broken.jsonl",), "broken.jsonl, line 2: not JSON"),
            (("nofield.jsonl",), "nofield.jsonl, line 1: no text under 'text'; name the right key with --text-field"),
            (("short.txt",), "one sequence needs 18"),
            (("ids.bin",), "name the tokenizer"),
            (("ids.bin", "--tokenizer", "t.tiktoken"), "holds id 65000")]:
        assert words in refusal(capsys, "--out", "r", *TINY, "--data", *argv), argv
    assert not list(at.glob("data-*.tmp")) and not (at / "r").exists()


@pytest.mark.parametrize("change, rank", [("twice", None), (b"ab", 255), (b"\xff", -1), (b"ab", 10**12),
                                          (b"\xff", None)])
def test_vocabularies_that_are_none(at, change, rank):
    """A line that stands twice, a rank taken, negative or huge, a byte without one."""
    ranks = {bytes([i]): i for i in range(256)}
    train.save_encoding(train.make_encoding(ranks), at / "t.tiktoken")
    lines = (at / "t.tiktoken").read_text().splitlines()
    if change == "twice":
        lines.append(lines[0])
    else:
        lines = lines if change == b"ab" else lines[:-1]
        lines += [f"{train.base64.b64encode(change).decode()} {rank}"] if rank is not None else []
    (at / "t.tiktoken").write_text("\n".join(lines))
    with pytest.raises(train.UserError, match="t.tiktoken: use a file where each single byte has a rank"):
        train.load_encoding(at / "t.tiktoken")


def test_text_as_people_have_it(text, at, capsys):
    """Linked folders are read, once each; runs and pipes are not; others are counted; names may be any bytes."""
    (at / "data").mkdir()
    (at / "data/link").symlink_to(text)
    (at / "data/up").symlink_to(at / "data")
    os.mkfifo(at / "data/pipe.txt")
    Path(os.fsdecode(os.fsencode(at / "data") + b"/\xff.TXT")).write_text("word " * 400)
    for name in ("config.json", "metrics.jsonl", "sample.txt"):
        (at / "data/run").mkdir(exist_ok=True)
        (at / "data/run" / name).write_text("{}")
    (at / "data/a.png").write_text("")
    files = train.list_files([str(at / "data")])
    assert sorted(os.fsencode(file.name) for file in files) == [b"link/%d.txt" % n for n in range(8)] + [b"\xff.TXT"]
    assert "1 files are no text by their endings and are left out: 1 .png" in capsys.readouterr().out
    assert corpus_of([at / "data"], at).facts["files"] == 9
    with pytest.raises(train.UserError, match="no such file or folder"):
        train.list_files([str(at / "data/pipe.txt")])


def test_odd_lines_of_json(at):
    """Half a surrogate pair is replaced, a long line is several pieces of one document, a deep one is refused."""
    (at / "a.jsonl").write_text('{"text": "a \\ud83d b"}\n' + json.dumps(dict(text="word " * 30000)) + "\n")
    pieces = list(train.read_jsonl(at / "a.jsonl", "text"))
    assert pieces[0] == ("a \ufffd b", True)
    assert [ends for _, ends in pieces] == [True, False, False, True]
    assert "".join(part for part, _ in pieces[1:]) == "word " * 30000
    (at / "deep.jsonl").write_text('{"text": ' + "[" * 100000)
    with pytest.raises(train.UserError, match="deep.jsonl, line 1: not JSON"):
        list(train.read_jsonl(at / "deep.jsonl", "text"))


def test_odd_files_of_tokens(at):
    """Empty, half a token, an id in a gap; END is no byte of text."""
    train.save_encoding(train.make_encoding({bytes([i]): i for i in range(256)} | {b"ab": 300}), at / "t.tiktoken")
    encoding = train.load_encoding(at / "t.tiktoken")
    for ids, words in ((b"", "has 0 bytes"), (b"abc", "has 3 bytes"), (np.array([97, 299], np.uint16), "holds id 299")):
        (at / "ids.bin").write_bytes(bytes(ids))
        with pytest.raises(train.UserError, match=words):
            list(train.read_bin(at / "ids.bin", encoding))
    np.array([97, 301, 300], np.uint16).tofile(at / "ids.bin")
    corpus = corpus_of([at / "ids.bin"], at, tokenizer=str(at / "t.tiktoken"), heldout=0.0)
    assert corpus.facts["train_bytes"] == 3 and corpus.train["text"].tolist() == [301, 97, 301, 300]


def test_words_without_breaks_are_cut(monkeypatch):
    """A vocabulary of one long word holds no token longer than the parts that it is cut into."""
    text = "".join(random.Random(0).choices("AC", k=3000)) + "G" * 3000
    assert max(map(len, train.learn_bpe([text], 400))) == train.LONGEST
    monkeypatch.setattr(train, "MOST_LETTERS", 3)                         # then rare words are not heeded
    assert not any(b"x" in token for token in train.learn_bpe(["aa aa aa xyz"], 300) if len(token) > 1)


def test_lock_that_a_file_system_refuses(text, at, capsys, monkeypatch):
    """Only a lock that is held means that the folder is in use."""
    def refuse(file, how):
        raise OSError(train.fcntl.LOCK_EX, "No locks available")
    monkeypatch.setattr(train.fcntl, "flock", refuse)
    run("--data", text, "--steps", 1, "--out", "r", *TINY)
    assert "r cannot be locked (No locks available)" in capsys.readouterr().out


def test_a_model_too_large_is_refused_before_the_text_is_read(text, at, capsys):
    said = refusal(capsys, "--data", text, "--preset", "pangu-ultra-moe-718b", "--out", "r")
    assert "weights, gradients and moments of this model take 10,9" in said
    assert not list(at.iterdir())


def test_lines_at_the_start(text, at, capsys):
    """How it is cut, what a checkpoint takes, levels of balance that are the same here, too much held out."""
    run("--data", text / "1.txt", text / "2.txt", "--steps", 1, "--out", "r", *TINY)
    out = capsys.readouterr().out
    assert "processes: 1 (pp 1 dp 1 cp 1 tp 1 ep 1)" in out and "a checkpoint takes 0." in out
    assert "balance=ep_group is dp_group and micro_batch too in this plan" in out
    assert "of this text, not 2.00%" in out and "mix sources" not in out
    phase = dict(tokens=1000, seq_len=16, global_batch=2, lr=1e-3, mix=dict(a=0.5, b=0.5))
    (at / "phases.json").write_text(json.dumps([phase]))
    run("--data", text, "--phases", "phases.json", "--out", "mixed", *TINY, "--set", "vocab_size=99")
    out = capsys.readouterr().out
    assert "the phases mix sources, and this text is one" in out
    assert "vocab_size 99 becomes 320: the tokenizer has 273 tokens or more" in out


def test_interrupted_before_the_first_step(text, at, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "tokenise", interrupted)
    with pytest.raises(SystemExit) as stop:
        run("--data", text, "--out", "r", *TINY)
    assert stop.value.code == "\ntrain.py: interrupted" and not list(at.glob("data-*"))


def test_nobody_reads_the_output(text, at, capfd, monkeypatch):
    """As behind `| head`: no word, no traceback, and a run that goes on."""
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    heard = train.print_step

    def leave(*args, **line):
        heard(*args, **line)
        os.close(reader)
    monkeypatch.setattr(train, "print_step", leave)
    with pytest.raises(SystemExit) as stop:
        run("--data", text, "--out", "r", "--steps", 3, "--save-every", 1, *TINY)
    assert stop.value.code == 128 + signal.SIGPIPE and capfd.readouterr().err == ""
    assert losses(at / "r")


def test_other_ranks_are_silent_and_the_screen_is_given_back(text, at, capsys, monkeypatch):
    screen = sys.stdout
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    run("--data", text, "--steps", 1, "--out", "r", *TINY)
    assert sys.stdout is screen and not capsys.readouterr().out


def test_bad_resume(text, at, capsys):
    run("--data", text, "--steps", 4, "--save-every", 2, "--out", "r", *TINY)
    assert "already holds a run: --resume r" in refusal(capsys, "--data", text, "--out", "r", *TINY)
    assert "nowhere: no such folder; runs lie in runs/" in refusal(capsys, "--resume", "nowhere")
    (at / "empty").mkdir()
    assert "no complete checkpoint" in refusal(capsys, "--resume", "empty")
    said = refusal(capsys, "--data", text, "--out", "/proc/r", *TINY)
    assert "--out /proc/r: No such file or directory; choose a folder" in said
    assert "--seed 3: the run in r has 0" in refusal(capsys, "--resume", "r", "--seed", 3)
    assert "is not what r began with (sha256" in refusal(capsys, "--resume", "r", "--data", ROOT / "tests")

    (at / "r/ckpt/step_9.tmp").mkdir()                                    # of a killed run
    data = next((at / "r/ckpt/step_4").glob("*.distcp"))
    whole = data.read_bytes()
    data.write_bytes(whole[:1000])
    message = refusal(capsys, "--resume", "r")
    assert "step_4 is damaged" in message and "1000 of" in message and "--resume r/ckpt/step_2" in message
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is not what was written" in refusal(capsys, "--resume", "r")
    (at / "r/tokenizer.tiktoken").unlink()
    run("--resume", "r/ckpt/step_2")
    assert parallel.steps_in(at / "r/ckpt") == [2, 4] and (at / "r/tokenizer.tiktoken").exists()

    config = json.loads((at / "r/config.json").read_text())
    config["config"]["moe_intermediate_size"] = 12
    (at / "r/config.json").write_text(json.dumps(config))
    assert "another shape" in refusal(capsys, "--resume", "r", "--steps", 6)


def unfit(kind, allowed):
    """Words that a setting must refuse: below, above, not a number, of another kind."""
    if kind is tuple:
        return ["nonsense", "-1"]
    if "choices" in allowed:
        return ["nonsense"]
    if kind in (str, list):
        return []
    words = ["-1", "nan", "inf", "-inf", "many", "1e400"]
    if "least" not in allowed:
        words.append("0")
    if "most" in allowed:
        words.append(str(int(allowed["most"]) + 1))
    return words + ["1.5"] if kind is int else words


SETTINGS = [(command, name) for command in train.COMMANDS for name in train.COMMANDS[command].options]


@pytest.mark.parametrize("command, name", SETTINGS)
def test_every_setting_refuses_what_does_not_fit(at, capsys, command, name):
    """One line that names the setting and says what to use; nothing is written."""
    option = train.COMMANDS[command].options[name]
    for word in unfit(type(option.default), option.allowed):
        if word != option.default:
            error = refusal(capsys, command, f"{train.flag(name)}={word}")
            assert error.startswith(f"train.py: {train.flag(name)}=") and ": use " in error, error
    assert not list(at.iterdir())


@pytest.mark.parametrize("field", train.dataclasses.fields(train.Config), ids=lambda field: field.name)
def test_every_key_of_set_refuses_what_does_not_fit(at, capsys, field):
    words = {int: ["1.5", "nan", "true", "-1", "1e3"], float: ["nan", "Infinity", "-1", "true", "x"],
             bool: ["off", "no", "1", "truth"], str: ["nonsense"]}
    for word in words.get(field.type, ["3", "x", "[]"]):                  # rope_scaling: an object
        error = refusal(capsys, "--set", f"{field.name}={word}", "--out", "r")
        assert error.startswith("train.py: --set: ") and field.name in error and ": use " in error, word
    assert not (at / "r").exists()


def test_true_and_false_in_any_case():
    for word, value in dict(true=True, TRUE=True, False_=False, fAlSe=False).items():
        settings = train.settings_of(dict(set=[f"router_bias={word.rstrip('_')}"]))
        assert train.make_config(settings).router_bias is value


PHASE = dict(tokens=1000, seq_len=16, global_batch=4, lr=1e-3, min_lr=1e-4)
BAD_PHASES = [
    *({name: value} for name in PHASE for value in (-1, math.nan, math.inf, "x", None, True, [], {}, 1e400)),
    *({name: value} for name in ("decay", "warmup_tokens", "rope_theta", "mix") for value in (-1, math.nan, "x", [])),
    *(dict(global_batch=rows) for rows in ([[1, 4]], [[0, 0]], [[0, 1.5]], [[0]], [[0, 4], [-1, 4]], [0, 4])),
    *(dict(mix=mix) for mix in ({}, dict(a=-1), dict(a=1e5), dict(a=0.5), dict(a="x"), dict(a=0, b=1))),
    dict(unknown=1), dict(seq_len=1.5), dict(decay="linear")]


@pytest.mark.parametrize("change", BAD_PHASES, ids=str)
def test_phases_refuse_what_does_not_fit(at, capsys, change):
    (at / "p.json").write_text(json.dumps([PHASE, PHASE | change]))
    error = refusal(capsys, "--phases", "p.json", "--out", "r")
    assert error.startswith("train.py: --phases p.json, phase 2: ") and next(iter(change)) in error
    assert not (at / "r").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", "3", '{"phases": 3}', "[3]", "[{}", "[[]]", "\xff"])
def test_files_of_phases_that_are_none(at, capsys, content):
    (at / "p.json").write_bytes(content.encode("latin-1"))
    assert refusal(capsys, "--phases", "p.json", "--out", "r").startswith("train.py: --phases p.json: ")


def test_config_file_is_checked_by_the_same_tables(text, at, capsys):
    """What a run's config.json holds is refused with its path; what it lacks takes its default."""
    run("--data", text, "--steps", 1, "--out", "r", *TINY)
    path = at / "r/config.json"
    whole = json.loads(path.read_text())

    def refused(stored):
        path.write_text(stored if isinstance(stored, str) else json.dumps(stored))
        error = refusal(capsys, "--resume", "r", "--steps", 2)
        assert error == refusal(capsys, "sample", "--init", "r")
        return error

    for name, option in (train.OPTIONS | train.PLAN_OPTIONS).items():
        for value in ({}, -7, math.nan, "nonsense", ["x", 3]):
            try:
                train.check_option(name, value, option)
            except (ValueError, TypeError):
                path.write_text(json.dumps(whole | dict(settings=whole["settings"] | {name: value})))
                with pytest.raises(train.UserError, match=f"^r/config.json(: {name}=.*: use | is not as)"):
                    train.read_config(Path("r"))
    for stored, words in [
            ("[]", "is not as train.py wrote it"), ("{", "no readable config.json"), ({}, "is not as"),
            (whole | dict(config=dict(hidden_size=math.nan)), "r/config.json: hidden_size=nan: use"),
            (whole | dict(config=dict(hidden_size=0)), "r/config.json: hidden_size=0: use"),
            (whole | dict(phases=[{}]), "is not as train.py wrote it"),
            (whole | dict(phases=[whole["phases"][0] | dict(lr=-1)]), "r/config.json: lr=-1: use"),
            (whole | dict(phases=[]), "r/config.json: no phases: use"),
            (whole | dict(corpus=3), "is not as train.py wrote it"),
            (whole | dict(corpus=whole["corpus"] | dict(end="x")), "end of the corpus='x': use")]:
        assert words in refused(stored), stored
    del whole["settings"]["beta2"]
    path.write_text(json.dumps(whole))
    run("--resume", "r", "--steps", 2)
    assert len(losses(at / "r")) == 2


def test_zero_means_off(text, at):
    """--clip 0 does not clip, --save-every 0 saves at the end, --heldout 0 holds nothing out."""
    options = ("--data", text, "--steps", 3, *TINY)
    run(*options, "--out", "off", "--clip", 0, "--save-every", 0, "--heldout", 0)
    run(*options, "--out", "high", "--clip", 1e9, "--heldout", 0)
    assert losses(at / "off") == losses(at / "high") and parallel.steps_in(at / "off/ckpt") == [3]
    assert "val_loss" not in (at / "off/metrics.jsonl").read_text()


def test_names_of_sources(text, at, capsys):
    """A name becomes the name of a file of tokens: a plain word, and not that of the held-out text."""
    for name in ("../x", "/tmp/x", "heldout", "", "a.b"):
        assert "names the source; use letters" in refusal(capsys, "--data", f"{name}={text}", "--out", "r", *TINY)
    assert not [*at.rglob("*")]                                           # a refused run leaves nothing


def test_folder_of_something_else(text, at, capsys):
    (at / "notes").mkdir()
    (at / "notes/thesis.tex").write_text("dear")
    (at / "model").mkdir()
    (at / "model/config.json").write_text('{"hidden_size": 3}')
    (at / "file").write_text("")
    for out, words in [
            ("notes", "something that is no run"), ("model", "config.json is not as"), ("file", "that is no run")]:
        assert words in refusal(capsys, "--data", text, "--out", out, *TINY)
    assert [path.name for path in (at / "notes").iterdir()] == ["thesis.tex"]


def test_log_of_a_run_without_checkpoint_is_kept(text, at, capsys):
    """Killed before its first checkpoint and started again: the log of the first is put aside, and said to be."""
    options = ("--data", text, "--steps", 2, "--out", "r", *TINY)
    run(*options)
    log = (at / "r/metrics.jsonl").read_text()
    parallel.shutil.rmtree(at / "r/ckpt")
    capsys.readouterr()
    run(*options)
    assert "its log is now r/aside_" in capsys.readouterr().out
    assert next(at.glob("r/aside_*.jsonl")).read_text() == log
    assert len(losses(at / "r")) == 2


def test_resume_elsewhere_finished_and_older(text, at, capsys):
    options = ("--data", text, "--steps", 2, *TINY)
    run(*options, "--out", "r")
    assert "--resume r writes into r" in refusal(capsys, "--resume", "r", "--out", "other")
    assert not (at / "other").exists()
    run("--resume", "r", "--out", "r")
    said = capsys.readouterr().out
    assert "r is finished: 2 steps; --steps" in said and "another schedule" not in said
    stored = json.loads((at / "r/config.json").read_text())
    (at / "r/config.json").write_text(json.dumps(stored | dict(rules=1)))
    assert "r was begun under other rules of train.py" in refusal(capsys, "--resume", "r", "--steps", 4)


def test_resume_with_fewer_steps_than_are_done(text, at, capsys):
    """Refused before anything is stored; --steps then counts, also where an older --tokens was stored."""
    run("--data", text, "--tokens", 4 * 2 * 16, "--out", "r", *TINY, "--warmup-steps", 1)
    done, stored = len(losses(at / "r")), (at / "r/config.json").read_text()
    assert f"{done} steps are done already" in refusal(capsys, "--resume", "r", "--steps", done - 1)
    assert (at / "r/config.json").read_text() == stored
    capsys.readouterr()
    run("--resume", "r", "--steps", done + 2)
    assert len(losses(at / "r")) == done + 2
    assert "another schedule: the learning rate, 1.2e-04 so far, goes on from" in capsys.readouterr().out


def test_checkpoints_put_aside_are_named(text, at, capsys):
    run("--data", text, "--steps", 4, "--save-every", 2, "--out", "r", *TINY)
    run("--resume", "r/ckpt/step_2", "--steps", 3)
    assert "the run goes on from step 2: step_4 is now r/ckpt/aside_4_" in capsys.readouterr().out
    (copy,) = at.glob("r/aside_*.jsonl")
    assert len(copy.read_text().splitlines()) == 4


def test_the_last_checkpoint_is_whole_before_held_out_text(text, at, monkeypatch):
    """Stopped there nothing is lost; gone through, the line of the last step tells of it."""
    options = ("--data", text, "--steps", 4, "--eval-every", 2, *TINY)

    def stopped(self, pipeline):
        assert len(losses(at / "r")) == self.run.progress["step"]
        if self.run.progress["step"] == 4:
            raise KeyboardInterrupt
        return dict(val_loss=1.0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Pretrain, "evaluate", stopped)
        run(*options, "--out", "r")
    assert train.newest(at / "r").name == "step_4"
    lines = [json.loads(line) for line in (at / "r/metrics.jsonl").read_text().splitlines()]
    assert [line.get("val_loss") for line in lines] == [None, 1.0, None, None]
    run(*options, "--out", "whole")
    assert losses(at / "whole") == losses(at / "r")
    lines = [json.loads(line) for line in (at / "whole/metrics.jsonl").read_text().splitlines()]
    assert ["val_bpb" in line for line in lines] == [False, True, False, True]


def test_restart_goes_on_from_the_newest(text, at, capsys, monkeypatch):
    """torchrun starts `--resume r/ckpt/step_2` again: not from step 2 once more."""
    run("--data", text, "--steps", 6, "--save-every", 2, "--out", "r", *TINY)
    monkeypatch.setattr(parallel, "is_restarted", lambda: True)
    run("--resume", "r/ckpt/step_2", "--steps", 8)
    assert "resumed from r/ckpt/step_6" in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["RANK=3", "WORLD_SIZE=2"])
def test_ranks_without_torchrun(text, at, capsys, monkeypatch, variable):
    monkeypatch.setenv(*variable.split("="))
    assert f"{variable} is set, but no torchrun: start with torchrun" in refusal(capsys, "--data", text, *TINY)
    assert not list(at.iterdir())


def test_plan_of_several_processes_alone(text, at, capsys):
    for plan, count in ((("--ep", 2), 2), (("--pp", 2, "--tp", 2, "--sp", 1), 4)):
        assert f"--nproc-per-node {count} train.py" in refusal(capsys, "--data", text, *TINY, *plan)
    assert not list(at.iterdir())


def test_one_process_goes_on_with_a_run_of_four(text, at, capsys):
    """As four ranks would have left it: axes of one, and a micro-batch as large as their balance group."""
    options = ("--data", text, "--save-every", 2, *TINY, "--global-batch", 8, "--set", "balance_group=4")
    run(*options, "--steps", 4, "--out", "whole", "--micro-batch", 4)
    run(*options, "--steps", 4, "--out", "r", "--micro-batch", 4)
    stored = json.loads((at / "r/config.json").read_text())
    stored["settings"].update(dp=4, ep=4, micro_batch=1, dispatch="hierarchical", node_size=2)
    (at / "r/config.json").write_text(json.dumps(stored))
    capsys.readouterr()
    run("--resume", "r/ckpt/step_2")
    assert "goes on with --dp 1 --ep 1 --micro-batch 4" in capsys.readouterr().out
    assert losses(at / "r") == losses(at / "whole")


def test_fewer_processes_have_micro_batches_that_hold_a_balance_group(monkeypatch):
    """A run of ep=4 goes on with pp=2 on two ranks, of which each sees all sequences."""
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    before = train.settings_of(dict(global_batch=32, micro_batch=2, precision="fp32")) | dict(dp=4, ep=1, pp=2)
    after = train.fit_to_world(dict(before), dict(pp=2, ep=1), group=8)
    assert (after["dp"], after["micro_batch"]) == (1, 8)
    train.check_plan(train.replace(train.PRESETS["tiny"], balance_group=8), train.make_plan(after), devices=2)


@pytest.mark.slow
def test_ranks_that_were_told_different_things(text, at):
    """Two ranks with rates of their own: refused in one line that names the setting."""
    command = f"{sys.executable} {ROOT / 'train.py'} --data {text} --out r {' '.join(TINY)} --lr 1e-$((3 + RANK))"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run([*launcher, "bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "ranks were started with different --lr, --phases: start all" in done.stderr
    assert not (at / "r").exists()


@pytest.mark.parametrize("kept", [1, 3])
def test_checkpoints_stay_finite(text, at, monkeypatch, kept):
    """Weights break in step 5: no later checkpoint displaces those before it, and the last of them is named."""
    step = train.train_step

    def breaking(pipeline, optimizer, *rest):
        measures, loads = step(pipeline, optimizer, *rest)
        breaking.steps += 1
        if breaking.steps == 5:
            pipeline.model.norm.weight.data[0] = math.inf
        return measures, loads

    breaking.steps = 0
    monkeypatch.setattr(train, "train_step", breaking)
    with pytest.raises(SystemExit) as stop:
        run("--data", text, "--steps", 50, "--save-every", 2, "--keep", kept, "--out", "r", *TINY)
    assert "not finite" in str(stop.value) and "start anew, or from r/ckpt/step_4," in str(stop.value)
    assert parallel.steps_in(at / "r/ckpt")[-1] == 4


def damage(path, how):
    whole = path.read_bytes()
    path.write_bytes(dict(zeroed=bytes(len(whole)), cut=whole[:len(whole) // 2], swapped=whole[::-1])[how])
    return whole


@pytest.mark.parametrize("how", ["zeroed", "cut", "swapped"])
def test_damaged_cache_is_made_anew(text, at, how, capsys):
    corpus_of([text], at)
    cache = next(at.glob("data-*"))
    whole = damage(cache / "text.bin", how)
    capsys.readouterr()
    corpus_of([text], at)
    assert "learning" in capsys.readouterr().out and (cache / "text.bin").read_bytes() == whole


def test_cache_of_another_text_and_leftovers(text, at, capsys):
    """A cache under another's name is made anew; what dead processes of this machine left is removed."""
    corpus_of([text], at)
    cache = next(at.glob("data-*"))
    other = at / "data-0123456789ab"
    cache.rename(other)
    dead, alive = (at / f"data-1.{platform.node()}.{number}.tmp" for number in (2**22 + 1, os.getpid()))
    dead.mkdir()
    alive.mkdir()
    assert not train.is_whole(other)
    corpus_of([text], at)
    assert cache.exists() and not dead.exists() and alive.exists()


def test_vocabulary_is_known_before_the_memory_is_reckoned(text, at, monkeypatch):
    """--fit sees the rows of the embedding that a named tokenizer needs."""
    ranks = {bytes([i]): i for i in range(256)} | {b"%04d" % i: i for i in range(256, 4999)}
    train.save_encoding(train.make_encoding(ranks), at / "large.tiktoken")
    seen = []

    def fit_memory(config, plan, hardware, budget):
        seen.append(config.vocab_size)
        raise ValueError("enough")
    monkeypatch.setattr(train.sim, "fit_memory", fit_memory)
    with pytest.raises(SystemExit):
        run("--data", text, "--out", "r", *TINY, "--tokenizer", "large.tiktoken", "--fit", "1GiB")
    assert seen == [5056]                                                # 5000 in whole groups of 64


def test_named_tokenizer_without_network(text, at, capsys, monkeypatch):
    def offline(name):
        raise ConnectionError("no route")
    monkeypatch.setattr(train.tiktoken, "get_encoding", offline)
    assert "could not be downloaded" in refusal(capsys, "--data", text, "--tokenizer", "gpt2", "--out", "r", *TINY)


@pytest.mark.slow
def test_large_text_in_bounded_memory(at):
    """200 MB of text tokenise in bounded resident memory (xz -9 alone takes 0.7 GiB), and progress is shown."""
    block = (ROOT / "train.py").read_text()
    with open(at / "big.txt", "w") as file:
        while file.tell() < 200e6:
            file.write(block)
    code = (f"import sys, resource; sys.path.insert(0, {str(ROOT)!r}); import train; "
            "train.make_cache(train.settings_of(dict(data=['big.txt'])), None, 2048, '.'); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    out, err = done.stdout, done.stderr
    assert "tokenising: " in err and " left" in err
    assert int(out.split()[-1]) < 1500, out


@pytest.mark.parametrize("broken", [False, True])
def test_a_step_without_the_fused_skip_equals_one_with_it(monkeypatch, broken):
    """torch_npu's fused AdamW takes neither grad_scale nor found_inf: clipping and skipping are then done before it."""
    weights = []
    for takes in (True, False):
        monkeypatch.setattr(parallel, "fused_skips", lambda device: takes)
        model = Model(replace(PRESETS["tiny"], vocab_size=64, num_hidden_layers=2))
        model.init_weights(0)
        model.norm.weight.data[0] = float("nan") if broken else 1.0
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        ids = torch.arange(36).view(2, 18) % 64
        batch = dict(ids=ids[:, :16], targets=torch.stack((ids[:, 1:17], ids[:, 2:18]), 1))
        pipeline = parallel.Pipeline(model, Plan(micro_batch=2, global_batch=2, seq_len=16))
        train.train_step(pipeline, optimizer, batch, clip=0.01)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7, equal_nan=True)
