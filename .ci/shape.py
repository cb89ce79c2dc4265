"""The shape of this repository, which a fork need not keep: its top level, and lines that read at the first pass."""
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOP = {"README.md", "requirements.txt", "tests", "model.py", "sim.py", "parallel.py", "train.py"}


def statement_lists(tree):
    """Lists of statements that stand one after the other; `if x: y` counts as two."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                yield [node] + body if name == "body" and hasattr(node, "lineno") else body


def faults():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in sorted({name.split("/")[0] for name in tracked if name and not name.startswith(".")} - TOP):
        yield f"{name} stands at the top level"
    for path in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("tests/*.py")):
        text = path.read_text()
        yield from (f"{path.name}:{n} has over 120 characters" for n, line in enumerate(text.splitlines(), 1)
                    if len(line) > 120)
        for body in statement_lists(ast.parse(text)):
            lines = [node.lineno for node in body]
            yield from (f"{path.name}:{n} holds several statements" for n in set(lines) if lines.count(n) > 1)


found = list(faults())
print("\n".join([*found, "a fork need not keep this shape: it may leave .ci/shape.py out of .ci/run"] if found else
                ["shape: as agreed"]))
sys.exit(bool(found))
