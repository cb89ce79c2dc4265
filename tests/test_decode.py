"""
Tests of generation: the latent cache beside no cache, absorbed beside expanded attention, drafts by MTP beside none,
sampling beside the distribution it should have; on one process and on two.
"""
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import tiktoken
import torch

import dist
import model as M
import parallel
import train
from model import Config, Model, generate, shifted
from reference import fill_random
from sim import Plan

SMALL = Config(
    vocab_size=61, hidden_size=32, num_hidden_layers=3, intermediate_size=48, num_attention_heads=2, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, moe_intermediate_size=16,
    max_position_embeddings=256, rope_theta=100.0)
YARN = dict(type="yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=4.0, mscale_all_dim=0.7)
DEEPSEEK = replace(SMALL, norm="pre", n_group=2, topk_group=1, router_bias=True, rope_scaling=YARN)
LENGTHS = (1, 200, 37, 120)
CLOSE = 1e-5                               # float32, of the largest logit


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Prompts pass in several."""
    monkeypatch.setattr(M, "CHUNK", 48)


def build(config, dtype=torch.float32, seed=0):
    model = Model(config)
    fill_random(model.state_dict(), seed)
    return model.to(dtype).eval()


def some_ids(config, lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(config.vocab_size, (length,), generator=generator) for length in lengths]


def trunk(model):
    return [layer for layer in model.layers.values() if not isinstance(layer, M.MTPLayer)]


def without_cache(model, sequences):
    """Logits (T,V) of each whole sequence, and its experts by layer (T,K)."""
    with torch.no_grad():
        notes = [{} for _ in sequences]
        logits = [model(ids[None], routing=note).logits[0] for ids, note in zip(sequences, notes)]
    return logits, [{layer: ids[0] for layer, ids in note.items()} for note in notes]


@torch.no_grad()
def with_cache(model, sequences, steps):
    """The same logits, fed `steps` tokens at a time to all sequences together: short ones wait, padded, for the end."""
    cache = M.Cache(model, trunk(model), len(sequences), max(map(len, sequences)) + max(steps))
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    ids = torch.nn.functional.pad(ids, (0, max(steps)))
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    found = [[] for _ in sequences]
    for step in [*steps, *[steps[-1]] * ids.size(1)]:
        at = cache.lengths
        if (at == lengths).all():
            break
        fed = ids[torch.arange(len(ids)).unsqueeze(1), at.unsqueeze(1) + torch.arange(step)]
        logits = model(fed, cache=cache).logits
        cache.crop(lengths)
        for b, kept in enumerate((cache.lengths - at).tolist()):
            found[b].append(logits[b, :kept])
    return [torch.cat(parts) for parts in found]


def assert_close(found, expected, what=""):
    for b, (ours, true) in enumerate(zip(found, expected, strict=True)):
        assert ours.shape == true.shape, (what, b)
        error = (ours - true).abs().max() / true.abs().max()
        assert error < CLOSE, f"{what}, sequence {b}: {error:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("config", [SMALL, DEEPSEEK], ids=["sandwich", "deepseek"])
@pytest.mark.parametrize("steps, absorbs", [((120, 1), None), ((64, 30, 5), True), ((64, 30, 5), False)], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_cached_equals_uncached(config, steps, absorbs, fused, monkeypatch):
    """200 tokens and shorter ones beside them, token by token and in larger steps; absorbed, expanded, and as the rule
    has it; with plain and with fused operators."""
    if absorbs is not None:
        monkeypatch.setattr(M.Cache, "absorbing_is_cheaper", lambda cache, T, S: absorbs)
    monkeypatch.setattr(M, "FUSED", fused)
    model = build(config)
    sequences = some_ids(config, LENGTHS)
    assert_close(with_cache(model, sequences, steps), without_cache(model, sequences)[0])


def test_cache_in_bf16(monkeypatch):
    """float32 weights that compute in bf16: within its rounding of a forward without a cache. No experts, whose choice
    a rounding turns."""
    monkeypatch.setattr(M.Cache, "absorbing_is_cheaper", lambda cache, T, S: True)
    monkeypatch.setitem(globals(), "CLOSE", 0.03)
    config = replace(SMALL, first_k_dense_replace=3)
    model = build(config)
    model.compute_dtype = torch.bfloat16
    sequences = some_ids(config, (9, 70))
    assert_close(with_cache(model, sequences, (20, 1)), without_cache(model, sequences)[0])
    assert M.Cache(model, trunk(model), 1, 8).options["dtype"] == torch.bfloat16


def test_rule_of_absorbing():
    """One new token: absorbed, but for the first few. A chunk as long as what it sees, and a long one: expanded."""
    cache = M.Cache(build(SMALL), [], 1, 256)
    assert cache.absorbing_is_cheaper(1, 64) and not cache.absorbing_is_cheaper(64, 64)
    large = M.Cache(Model(replace(M.PRESETS["one-gpu"], num_hidden_layers=1, vocab_size=8)), [], 1, 4096)
    assert large.absorbing_is_cheaper(100, 4096) and not large.absorbing_is_cheaper(200, 4096)


def test_cache_holds_latents_alone():
    """kv_lora_rank + qk_rope_head_dim numbers a token and layer."""
    cache = M.Cache(build(SMALL, torch.float64), trunk(build(SMALL)), sequences=2, size=10)
    assert [tuple(kept.shape) for kept in cache.kept.values()] == 3 * [(2, 10, 20)]
    assert {kept.dtype for kept in cache.kept.values()} == {torch.float64}


def test_errors_past_the_window():
    model = build(SMALL)
    with pytest.raises(ValueError, match=r"257 tokens.*max_position_embeddings=256"):
        generate(model, some_ids(SMALL, (250, 3)), 7)
    cache = M.Cache(model, trunk(model), sequences=1, size=8)
    model(torch.zeros(1, 8, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="8 tokens in a cache for 8, and 1 more"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, some_ids(SMALL, (5, 0)), 7)
    with pytest.raises(ValueError, match="no such layer"):
        generate(build(replace(SMALL, num_nextn_predict_layers=0)), some_ids(SMALL, (5,)), 7, drafts=1)
    assert len(generate(model, some_ids(SMALL, (250, 3)), 6, drafts=3, temperature=0).answers[0].ids) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Drafts


def greedy_without_cache(model, prompts, new_tokens):
    """(prompts, new_tokens), for prompts of equal length."""
    ids = torch.stack(prompts)
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat((ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)), 1)
    return ids[:, len(prompts[0]):]


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_greedy_drafts_change_nothing(depths, drafts):
    """50 prompts of a model of few tokens, of whose drafts some hold by chance, beside no cache and no drafts."""
    config = replace(SMALL, vocab_size=5, num_hidden_layers=2, num_nextn_predict_layers=depths,
                     mtp_hidden=("pre_norm", "post_norm")[depths - 1])
    model = build(config, torch.float64)
    prompts = some_ids(config, (6,) * 50)
    expected = greedy_without_cache(model, prompts, 24).tolist()
    result = generate(model, prompts, 24, temperature=0, drafts=drafts)
    assert [answer.ids for answer in result.answers] == expected
    assert all(50 < held < result.rounds for held in result.held[:1])
    assert sorted(result.held, reverse=True) == result.held


@pytest.mark.parametrize("concat", ["embed_first", "hidden_first"])
@pytest.mark.parametrize("hidden", ["pre_norm", "post_norm"])
def test_drafts_are_those_of_mtp(hidden, concat):
    """In every round, after drafts that held and that did not, distributions of draft 1 and 2 equal those of a forward
    without a cache over the tokens so far: no key of a refused draft is seen. Draft 3 is of the last layer again."""
    config = replace(SMALL, vocab_size=5, num_nextn_predict_layers=2, mtp_hidden=hidden, mtp_concat=concat)
    model, prompts = build(config), some_ids(config, (2, 60, 1, 9))
    choice = partial(M.distribution, temperature=1.0, top_k=0, top_p=1.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        writer = M.Writer(model, prompts, 32, 3, choice, generator, note_routing=False, anybody=bool)
    draft = writer.draft

    def checked_draft(size, n):
        drawn_by = draft(size, n)
        for b, known in enumerate(n.tolist()):
            if known > 0:                                                 # else MTP has nothing to start from
                whole = model(writer.tokens[b:b + 1, :known + 3])
                expected = [logits[0, known - 1].softmax(-1) for logits in whole.mtp_logits]
                assert_close([q[b] for q in drawn_by[:2]], expected, f"{known} tokens")
        return drawn_by

    writer.draft = checked_draft
    with torch.no_grad():
        for _ in range(8):
            writer.round()
    assert len(set((writer.main.lengths - torch.tensor([1, 59, 0, 8])).tolist())) > 1


def test_answers_of_ragged_batches_with_stops():
    """Beside each prompt alone: ids up to a stop id, log-probabilities and experts as of one forward over the whole;
    what on_tokens was told is what came out."""
    model, prompts = build(SMALL), some_ids(SMALL, (3, 70, 1, 20))
    for drafts in (0, 2):
        told = {row: [] for row in range(4)}
        result = generate(model, prompts, 30, temperature=0, stop=(7, 8, 9), drafts=drafts, note_routing=True,
                          on_tokens=lambda row, ids: told[row].extend(ids))
        for row, (prompt, answer) in enumerate(zip(prompts, result.answers)):
            assert told[row] == answer.ids and 1 <= len(answer.ids) <= 30
            stops = [i for i, token in enumerate(answer.ids) if token in (7, 8, 9)]
            assert stops == [] and len(answer.ids) == 30 or stops == [len(answer.ids) - 1]
            fed = torch.cat((prompt, torch.tensor(answer.ids)))[:-1]
            (logits,), (chosen,) = without_cache(model, [fed])
            logits = logits[len(prompt) - 1:]
            assert logits.argmax(-1).tolist() == answer.ids
            expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(answer.log_probs), expected, rtol=0, atol=1e-4)
            assert set(answer.routing) == {1, 2}
            for layer, ids in answer.routing.items():
                assert torch.equal(ids.sort(-1).values, chosen[layer].sort(-1).values), (row, layer)
    assert any(len(answer.ids) < 30 for answer in result.answers)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_generate_is_a_function_of_its_seed():
    model, prompts = build(SMALL).train(), some_ids(SMALL, (3, 9))
    for drafts in (0, 2):
        runs = [generate(model, prompts, 12, seed=seed, drafts=drafts).answers for seed in (0, 0, 1)]
        assert runs[0] == runs[1] and runs[0] != runs[2]
    assert model.training


@pytest.mark.parametrize("drafts, how", [(0, dict(top_k=3, top_p=0.8)), (1, dict(temperature=2.0)),
                                         (3, dict(top_k=3)), (3, dict(top_p=0.7))], ids=str)
def test_frequencies_of_sampling(drafts, how):
    """The first three tokens of 20,000 answers over 4 tokens, beside their probabilities by forwards without a cache.

    Pearson's chi-square over the 64 outcomes (those of probability 0 do not occur) has up to 63 degrees of freedom and
    exceeds 113 with probability 1e-4. A bias of 2 % of the mass in one token moves it by some hundreds.
    """
    config = replace(SMALL, vocab_size=4, num_hidden_layers=2, num_nextn_predict_layers=1 + (drafts == 3))
    model, prompt = build(config, seed=3), torch.tensor([3, 1])
    result = generate(model, [prompt] * 20_000, 3, drafts=drafts, seed=1, **how)
    drawn = torch.tensor([answer.ids for answer in result.answers])
    counts = (drawn @ torch.tensor([16, 4, 1])).bincount(minlength=64)

    outcomes = torch.cartesian_prod(*[torch.arange(4)] * 3)               # (64, 3)
    with torch.no_grad():
        logits = model(torch.cat((prompt.expand(64, 2), outcomes), 1)).logits[:, 1:4]
    probabilities = by_definition(logits.double(), **how).gather(2, outcomes.unsqueeze(2)).squeeze(2).prod(1)
    assert probabilities.sum() == pytest.approx(1)
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = 20_000 * probabilities[possible]
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum()
    assert chi_square < 113, chi_square
    assert drafts == 0 or 0.05 < result.held[0] / result.rounds < 0.95


def by_definition(logits, temperature=1.0, top_k=4, top_p=1.0):
    """Token by token: kept if fewer than top_k are likelier; then, if those kept that are likelier hold less than
    top_p."""
    p = (logits / temperature).softmax(-1)
    likelier = p.unsqueeze(-2) > p.unsqueeze(-1)                          # (...,i,j): j is likelier than i
    p = p * (likelier.sum(-1) < top_k)
    p = p / p.sum(-1, keepdim=True)
    p = p * ((p.unsqueeze(-2) * likelier).sum(-1) < top_p)
    return p / p.sum(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks


def write_on_ranks(plan, config, prompts, drafts):
    """Answers of this rank to its own prompts, those of its tensor group, between two steps of training; gradient norms
    of these steps."""
    model = Model(config).double()
    grid = parallel.parallelize(model, plan)
    parallel.init_weights(model, 5)
    ids = torch.arange(16).view(2, 8) % 12
    batch = dict(ids=ids, targets=shifted(ids, (1, 2, 3), -100))
    answers, norms = [], []
    for step in range(2):
        for number in drafts:
            with parallel.generating(grid) as anybody:
                result = generate(model, prompts[parallel.rank() // plan.tp], 20, temperature=0, stop=(3,),
                                  drafts=number, note_routing=True, anybody=anybody)
            answers.append(result.answers)
        parallel.Pipeline(model, plan, grid).step([batch], torch.full((3,), 16.0 * plan.dp, dtype=torch.float64))
        norms.append(parallel.grad_norm(model, grid).item())
        torch.optim.SGD(parallel.param_groups(model), lr=0.1).step()
        model.zero_grad()
    return answers[:2], norms


@pytest.mark.parametrize("axes", [dict(tp=2, sp=1, ep=2, zero=0), dict(dp=2, ep=2, zero=3, recompute=("layer",)),
                                  pytest.param(dict(tp=2, dp=2, sp=1, ep=4, zero=1), marks=pytest.mark.slow)], ids=str)
def test_on_ranks(axes):
    """As on one process: prompts of other numbers and lengths on each data rank, of which some end early. Training goes
    on as if nothing had been written."""
    config = replace(SMALL, vocab_size=12, num_hidden_layers=2, init="small", num_nextn_predict_layers=2,
                     mtp_hidden="post_norm")
    plan = Plan(**axes, micro_batch=2, global_batch=2 * axes.get("dp", 1), seq_len=8, precision="fp64")
    prompts = [some_ids(config, (1, 60, 7)), some_ids(config, (4,), seed=2)]
    alone = Model(config).double()
    alone.init_weights(5)
    (_, undisturbed), *_ = dist.run(plan.world_size, write_on_ranks, plan, config, prompts, ())
    for rank, (answers, norms) in enumerate(dist.run(plan.world_size, write_on_ranks, plan, config, prompts, (0, 2))):
        assert norms == pytest.approx(undisturbed, rel=1e-9)
        for drafts, found in zip((0, 2), answers):
            expected = generate(alone, prompts[rank // plan.tp], 20, temperature=0, stop=(3,), drafts=drafts,
                                note_routing=True).answers
            assert [answer.ids for answer in found] == [answer.ids for answer in expected], (rank, drafts)
            for ours, true in zip(found, expected):
                assert ours.log_probs == pytest.approx(true.log_probs, rel=1e-9)
                for layer, ids in true.routing.items():
                    assert torch.equal(ours.routing[layer].sort(-1).values, ids.sort(-1).values)


# ---------------------------------------------------------------------------------------------------------------------
# The command `sample`


@pytest.fixture
def sample(monkeypatch, capsys):
    """sample(*flags) -> (what it printed, its errors), with a tiny model over bytes. stdin: a pipe's bytes, or the
    lines typed at a terminal."""
    bytes_alone = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)},
                                    special_tokens={train.END: 256})
    model = build(replace(SMALL, vocab_size=260))
    monkeypatch.setattr(train, "open_model", lambda init, device, average: (model, bytes_alone, 256))

    def run(*flags, stdin=b""):
        is_terminal = isinstance(stdin, list)
        pipe = SimpleNamespace(isatty=lambda: is_terminal, buffer=SimpleNamespace(read=lambda: stdin))
        monkeypatch.setattr("sys.stdin", pipe)
        monkeypatch.setattr("builtins.input", mock.Mock(side_effect=[*stdin, EOFError]))
        train.main(["sample", "--init", "somewhere", *map(str, flags)])
        return tuple(capsys.readouterr())

    return run


def test_sample_takes_prompts_from_everywhere(sample, tmp_path):
    """The same text by flag, file, pipe and terminal; several at once as one by one; drafts change nothing."""
    greedy = ("--temperature", 0, "--new-tokens", 20)
    (tmp_path / "prompt").write_text("das ö", "utf-8")
    expected, errors = sample("--prompt", "das ö", *greedy)
    assert expected.startswith("das ö") and len(expected) > 10 and errors.endswith("tokens/s\n")
    assert sample("--file", tmp_path / "prompt", *greedy)[0] == expected
    assert sample(*greedy, stdin="das ö".encode())[0] == expected
    out, errors = sample(*greedy, "--draft", 2, "--prompt", "das ö")
    assert out == expected and "2 tokens a step" not in errors and "drafts that held: " in errors
    other, _ = sample("--prompt", "", *greedy)
    assert sample("--prompt", "das ö", "--prompt", "", *greedy)[0] == f"--- 1\n{expected}--- 2\n{other}"
    assert sample(*greedy, stdin=["das ö", ""])[0] == expected + other


def test_sample_streams_whole_characters():
    """Tokens of one byte: each piece that comes is text, and together they are the text."""
    text = "für 你好 🙂"
    model = SimpleNamespace(config=SMALL, parameters=lambda: iter([torch.zeros(1)]))
    encoding = train.make_encoding({bytes([i]): i for i in range(256)})
    end = encoding.encode_single_token(train.END)

    def generate(model, ids, new_tokens, on_tokens, **how):
        for byte in text.encode():
            on_tokens(0, [byte])
        on_tokens(0, [0xf0, 0x9f, end])                                   # the last character stays incomplete

    pieces = []
    with mock.patch.object(train, "generate", generate):
        settings = train.defaults_of(train.SAMPLE_OPTIONS)
        texts, _ = train.continue_texts((model, encoding, end), ["x"], settings, False, pieces.append)
    assert texts == ["x" + text + "\ufffd"]
    assert [piece for piece in pieces if piece] == ["xf", *text[1:], "\ufffd"]


def test_sample_says_what_does_not_fit(sample, capsys):
    for flags in (["--prompt", "x" * 300], ["--prompt", "x", "--new-tokens", 300], ["--prompt", "x", "--draft", -1]):
        with pytest.raises(SystemExit, match="2"):
            sample(*flags)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and ("max_position_embeddings=256" in error or "--draft" in error)
    assert len(sample("--prompt", "x" * 240, "--temperature", 0)[0]) <= 257          # what the window holds
