"""What must hold for the files themselves: who imports whom, and where device names may stand."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["model", "sim", "parallel", "train"]              # each imports only those before it
FILES = [ROOT / f"{name}.py" for name in ORDER if (ROOT / f"{name}.py").exists()]
DEVICE_WORDS = {"cuda", "npu", "nccl", "hccl"}


def imported_modules(tree):
    """Dotted names of all that a file imports, inside functions too: `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(path):
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_import_direction(path):
    """model <- sim <- parallel <- train: parallel.py may import model and sim, never train."""
    later = set(ORDER[ORDER.index(path.stem):])
    wrong = {name for name in imported_modules(parse(path)) if name.split(".")[0] in later}
    assert not wrong, f"{path.name} imports {wrong}"


def test_model_knows_no_process_groups():
    path = ROOT / "model.py"
    wrong = {name for name in imported_modules(parse(path)) if name.startswith("torch.distributed")}
    assert not wrong, f"model.py imports {wrong}"
    assert "torch.distributed" not in ast.unparse(without_docstrings(parse(path)))


def test_sim_takes_only_shapes_and_totals_from_model_and_no_torch():
    allowed = {"model", *(f"model.{name}" for name in (
        "Config", "PRESETS", "Weights", "count_params", "divisors", "flops_per_token", "layer_flops", "layer_kinds",
        "require", "sequences_of_group", "setting", "check_setting", "check_settings"))}
    wrong = {name for name in imported_modules(parse(ROOT / "sim.py"))
             if name.split(".")[0] in ("model", "torch")} - allowed
    assert not wrong, f"sim.py imports {wrong}"


def test_nothing_is_imported_from_tests():
    """Neither of the four files needs tests/: what measures, reproduces or draws is run by its own command."""
    tests = {path.stem for path in ROOT.glob("tests/*.py")}
    for path in FILES:
        wrong = {name for name in imported_modules(parse(path)) if name.split(".")[0] in tests | {"tests", "importlib"}}
        assert not wrong, f"{path.name} imports {wrong}"


def test_model_can_be_imported_alone(tmp_path):
    """A copy of model.py in an empty folder, and nothing else, is enough to build a model."""
    (tmp_path / "model.py").write_text((ROOT / "model.py").read_text())
    code = "import sys, model; model.Model(model.PRESETS['tiny']); print('torch.distributed.fsdp' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False"), "importing model.py loads parts of torch.distributed"


def without_docstrings(tree):
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [child for child in body if not is_text(child)] or [ast.Pass()]
    return tree


def is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def device_words(path):
    """(line, text) of names and strings with a device or backend in them, such as "npu:0" or npu_swiglu."""
    for node in ast.walk(without_docstrings(parse(path))):
        text = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "value", None)
        if isinstance(text, str) and DEVICE_WORDS & set(text.replace(":", "_").split("_")):
            yield node.lineno, text


def function_lines(path, names):
    tree = parse(path)
    functions = [node for node in tree.body if getattr(node, "name", None) in names]
    return {line for node in functions for line in range(node.lineno, node.end_lineno + 1)}


def section_lines(path, title):
    """Numbers of the lines of one section of a file; a section begins with a rule `# ----` and its title below."""
    lines = path.read_text().splitlines()
    titles = [i for i in range(1, len(lines)) if lines[i - 1].startswith("# -----")] + [len(lines)]
    inside = {n + 1 for start, end in zip(titles, titles[1:]) if title in lines[start] for n in range(start, end)}
    assert inside, f"{path.name} has no section {title!r}"
    return inside


def test_device_words_only_where_a_device_is_picked():
    """model.py: only among its operators. parallel.py: only where device, backend and optimizer are picked."""
    found = {path.name: list(device_words(path)) for path in FILES}
    if found["model.py"]:
        allowed = section_lines(ROOT / "model.py", "Operators")
        found["model.py"] = [hit for hit in found["model.py"] if hit[0] not in allowed]
    if "train.py" in found:                                               # the words that --device takes
        lines = (ROOT / "train.py").read_text().splitlines()
        allowed = {n for n, line in enumerate(lines, 1) if "device=Option(" in line}
        found["train.py"] = [hit for hit in found["train.py"] if hit[0] not in allowed]
    if "parallel.py" in found:
        allowed = function_lines(ROOT / "parallel.py", {"pick_device", "pick_backend", "fused_skips"})
        found["parallel.py"] = [hit for hit in found["parallel.py"] if hit[0] not in allowed]
    assert not any(found.values()), found
