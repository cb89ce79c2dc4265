"""The README's commands exist with the flags it shows, its map names every file, and its numbers are the code's."""
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from model import PRESETS, count_params  # noqa: E402

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```\n(.*?)```", README, re.S)
            for line in block.splitlines() if re.match(r"(pip|python) ", line)]


def test_order_of_commands():
    """First install and train, second the tests."""
    assert COMMANDS[0] == "pip install -r requirements.txt && python train.py"
    assert COMMANDS[1] == "python -m pytest"


def test_training_commands_are_understood(capsys):
    """Each train.py line parses; settings, plan and phases of a pretrain line can be made."""
    lines = [command for command in COMMANDS if command.startswith("python train.py")]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line)[2:]
        if "--help" in words:
            continue
        command, given = train.parse(words)
        if command is train.COMMANDS["pretrain"].function and not {"resume", "init"} & set(given):
            settings = train.settings_of(given)
            config = train.make_config(settings)
            settings["precision"] = "fp32"
            for phase in train.make_phases(settings, given):
                for _, batch in phase.batches:
                    plan = train.replace(train.make_plan(settings), seq_len=phase.seq_len, global_batch=batch)
                    train.check_plan(config, plan, devices=1)


def test_scripts_exist():
    for command in COMMANDS:
        for script in re.findall(r"python (\S+\.py)", command):
            assert (ROOT / script).exists(), script


def test_map_names_the_files():
    """A fork's others are its own matter."""
    for name in ("model.py", "sim.py", "parallel.py", "train.py"):
        assert f"| `{name}` |" in README and (ROOT / name).exists(), name


def test_size_of_tiny():
    counts = count_params(PRESETS["tiny"])
    assert f"{counts['total'] / 1e6:.1f}M parameters, {counts['active'] / 1e6:.1f}M active" in README


def test_torch_npu_is_not_installed():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert "torch>=2.11,<2.14" in wanted and not any("npu" in line for line in wanted)
