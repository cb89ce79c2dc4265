"""
Small tasks with answers that a program can check: to teach a model by sft, and to reward it in rl.

    python tests/tasks.py --out tasks                       # tasks/sft.jsonl, tasks/rl.jsonl, tasks/test.jsonl
    python tests/tasks.py --score runs/rl --test tasks/test.jsonl

Six tasks, each of rising difficulty. In sft.jsonl half of the answers are slow, with thinking written out, half are
fast: there the user's words end with /no_think. rl.jsonl has prompts with the answer that the checker compares with.
With --mistakes 0.5 half of the answers in sft.jsonl are a typical mistake of each task, as if a careless teacher had
written them: then a model learns both ways, and rewards alone can tell it which is right.
Held out, and in test.jsonl alone: a tenth of all problems, by a hash of their operands, and everything of the highest
difficulty, which is longer than what was trained on. Letters stand apart and addition begins with the last digit, so
that a token is a letter or a digit, and each digit of a sum can be said when it is known.
"""
import argparse
import hashlib
import json
import random
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FAST = " /no_think"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def digits(random, n):
    """A number of n digits, the first not 0."""
    return random.randrange(10 ** (n - 1), 10 ** n)


# Each task: (random, difficulty) -> (prompt, thinking, answer, mistake)


def add(random, difficulty):
    """Sums of numbers of `difficulty` digits, the last digit first: 27+45 is 2 7, since 72 is read from its end."""
    a, b = digits(random, difficulty), digits(random, difficulty)
    steps, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return f"Add, last digit first: {a}+{b}", " ".join(steps), str(a + b)[::-1], str(a + b)


def reverse(random, difficulty):
    letters = random.choices(LETTERS, k=difficulty + 1)
    steps = [f"{place} {letter}" for place, letter in enumerate(letters)]
    return f"Reverse: {' '.join(letters)}", " ".join(steps), " ".join(reversed(letters)), " ".join(letters)


def sort(random, difficulty):
    letters = random.sample(LETTERS, k=difficulty + 1)
    left, steps = list(letters), []
    for letter in sorted(letters):
        left.remove(letter)
        steps.append(f"{letter}: {' '.join(left)};")
    downwards = sorted(letters, reverse=True)
    return f"Sort: {' '.join(letters)}", " ".join(steps), " ".join(sorted(letters)), " ".join(downwards)


def count(random, difficulty):
    wanted = random.choice(LETTERS[:8])
    letters = random.choices(wanted * 3 + LETTERS[:8], k=2 * difficulty + 1)
    seen, steps = 0, []
    for letter in letters:
        seen += letter == wanted
        steps.append(f"{letter} {seen}")
    return f"Count {wanted}: {' '.join(letters)}", " ".join(steps), str(seen), str(seen + 1)


def largest(random, difficulty):
    numbers = [random.randrange(100) for _ in range(difficulty + 1)]
    most, steps = 0, []
    for number in numbers:
        most = max(most, number)
        steps.append(f"{number} {most}")
    return f"Largest: {' '.join(map(str, numbers))}", " ".join(steps), str(most), str(min(numbers))


def chain(random, difficulty):
    """Small sums one after the other, of which none falls below 0."""
    total = random.randrange(10)
    text, steps = str(total), []
    for _ in range(difficulty):
        number = random.randrange(10)
        sign = "+" if number > total or random.random() < 0.5 else "-"
        before, total = total, total + number if sign == "+" else total - number
        text += f"{sign}{number}"
        steps.append(f"{before}{sign}{number}={total}")
    return f"Work out: {text}", " ".join(steps), str(total), str(before)          # the last sum is forgotten


TASKS = dict(add=add, reverse=reverse, sort=sort, count=count, largest=largest, chain=chain)
CHECKERS = defaultdict(lambda: "exact", add="partial", reverse="partial", sort="partial")
HARDEST = 4                                # difficulties 1 to 3 are trained on, this one only tested


def is_held_out(prompt):
    """A tenth of all problems, always the same."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 26


def problems(seed, difficulties, names):
    """Problems of some tasks without end, each different from all before it: dicts of task, difficulty, prompt,
    thinking, answer and mistake."""
    rng, seen = random.Random(seed), set()
    while True:
        task, difficulty = rng.choice(names), rng.choice(difficulties)
        prompt, thinking, answer, mistake = TASKS[task](rng, difficulty)
        # small problems are few: after many that came already the next ones may come again
        if prompt not in seen or rng.random() < 0.01:
            seen.add(prompt)
            yield dict(task=task, difficulty=difficulty, prompt=prompt, thinking=thinking, answer=answer,
                       mistake=mistake)


def some(seed, difficulties, number, held_out, names=tuple(TASKS)):
    chosen = []
    for problem in problems(seed, difficulties, names):
        if len(chosen) >= number:
            return chosen
        if is_held_out(problem["prompt"]) == held_out:
            chosen.append(problem)


def conversation(problem, fast, mistaken):
    """A line of sft.jsonl."""
    user = dict(role="user", content=problem["prompt"] + FAST * fast)
    thinking = "" if fast else problem["thinking"]
    assistant = dict(role="assistant", thinking=thinking, content=problem["mistake" if mistaken else "answer"])
    return dict(task=problem["task"], difficulty=problem["difficulty"], messages=[user, assistant])


def question(problem, fast):
    """A line of rl.jsonl and of test.jsonl."""
    return dict(task=problem["task"], difficulty=problem["difficulty"], prompt=problem["prompt"] + FAST * fast,
                fast=fast, answer=problem["answer"], checker=CHECKERS[problem["task"]])


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{path}: {len(lines)} lines")


def make(out, numbers, seed, mistakes=0.0, names=tuple(TASKS)):
    """The three files, of some tasks. numbers: of conversations, of rl prompts, of test problems; mistakes: share in
    the first."""
    out.mkdir(parents=True, exist_ok=True)
    trained = list(range(1, HARDEST))
    n_sft, n_rl, n_test = numbers
    sft = some(seed, trained, n_sft, False, names)
    rng = random.Random(seed + 3)
    write(out / "sft.jsonl", [conversation(problem, i % 2 == 1, rng.random() < mistakes)
                              for i, problem in enumerate(sft)])
    rl = some(seed + 1, trained, n_rl, False, names)
    write(out / "rl.jsonl", [question(problem, fast=i % 2 == 1) for i, problem in enumerate(rl)])
    test = some(seed + 2, trained + [HARDEST], n_test, True, names)
    write(out / "test.jsonl", [question(problem, fast) for problem in test for fast in (False, True)])


# ---------------------------------------------------------------------------------------------------------------------
# The score of a run


def score(run, path, temperature=0.0, at_once=64, new_tokens=96):
    """Held-out accuracy of a run's newest checkpoint -> list of dicts, one a problem. temperature 0: its likeliest
    words; 1: words drawn as it gives them, which is what rl rewards."""
    import torch

    import train
    from model import generate
    checkers, _ = train.read_checkers("")
    problems = train.read_tasks(path, checkers)
    for problem in problems:
        if not {"task", "difficulty", "fast"} <= set(problem):
            raise ValueError(f"{path}, line {problem['line']}: a score is told by task, difficulty and fast; use a "
                             f"test.jsonl of --out")
    model, encoding, _ = train.open_model(run, torch.device("cpu"))
    results = []
    for start in range(0, len(problems), at_once):
        some = problems[start:start + at_once]
        prompts = [torch.tensor(train.question(encoding, problem["prompt"])) for problem in some]
        room = model.config.max_position_embeddings - max(map(len, prompts))
        found = generate(model, prompts, min(new_tokens, room), temperature=temperature, seed=start,
                         stop=(train.special_id(encoding, train.TURN_END),))
        for problem, answer in zip(some, found.answers):
            text = train.answer_of(encoding, answer.ids)
            right = text is not None and train.check_exact(text, problem) == 1
            results.append(problem | dict(text=text, right=right, tokens=len(answer.ids)))
        print(f"\r{len(results)} of {len(problems)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results


def print_score(results):
    """Shares of right answers by task and difficulty, slow and fast."""
    def share(chosen):
        return f"{sum(each['right'] for each in chosen) / len(chosen):>6.0%}" if chosen else f"{'':>6}"

    hardest = max(each["difficulty"] for each in results)
    columns = range(1, hardest + 1)
    print("right answers by difficulty (columns; the last one was never trained on)")
    print(f"{'':>14}", *(f"{level:>6}" for level in columns), f"{'all':>6}")
    for task in sorted({each["task"] for each in results}):
        for fast in (False, True):
            own = [each for each in results if each["task"] == task and each["fast"] == fast]
            by_level = [share([each for each in own if each["difficulty"] == level]) for level in columns]
            print(f"{task:>9} {'fast' if fast else 'slow'}", *by_level, share(own))
    for fast in (False, True):
        own = [each for each in results if each["fast"] == fast]
        by_level = [share([each for each in own if each["difficulty"] == level]) for level in columns]
        print(f"{'all':>9} {'fast' if fast else 'slow'}", *by_level, share(own))
    in_format = sum(each["text"] is not None for each in results) / len(results)
    seen = [each for each in results if each["difficulty"] < HARDEST]
    longer = [each for each in results if each["difficulty"] >= HARDEST]
    print(f"right: {share(seen).strip()} of {len(seen)} problems with new operands, {share(longer).strip()} of "
          f"{len(longer)} longer ones; in the format {in_format:.1%}; "
          f"{sum(each['tokens'] for each in results) / len(results):.1f} tokens an answer")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", help="write sft.jsonl, rl.jsonl and test.jsonl here")
    parser.add_argument("--numbers", type=int, nargs=3, default=[4000, 4000, 300], metavar=("SFT", "RL", "TEST"),
                        help="conversations, prompts of rl, problems to test on (each slow and fast)")
    parser.add_argument("--only", nargs="+", choices=tuple(TASKS), default=tuple(TASKS), help="default: all six tasks")
    parser.add_argument("--mistakes", type=float, default=0.0, help="share of wrong answers in sft.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", metavar="RUN", help="a run's folder: accuracy on --test")
    parser.add_argument("--test", metavar="FILE", help="of --score: test.jsonl")
    parser.add_argument("--temperature", type=float, default=0.0, help="of --score; 0: the likeliest words")
    parser.add_argument("--json", action="store_true", help="of --score: each problem and answer, a line each")
    given = parser.parse_args()
    if not 0 <= given.mistakes <= 1:
        raise ValueError(f"--mistakes {given.mistakes:g}: use a share from 0 to 1")
    if min(given.numbers) < 0:
        raise ValueError(f"--numbers {min(given.numbers)}: use 0 or more")
    if given.out:
        return make(Path(given.out), given.numbers, given.seed, given.mistakes, given.only)
    if not (given.score and given.test):
        parser.error("use --out DIR to make tasks, or --score RUN --test FILE")
    results = score(given.score, given.test, given.temperature)
    if given.json:
        for each in results:
            print(json.dumps(each))
    else:
        print_score(results)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"tasks.py: {error}", file=sys.stderr)
        sys.exit(2)
