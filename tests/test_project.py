"""What the README and the house promise about the project itself."""

import re
import subprocess
import sys

from conftest import ROOT

CORE = ["attention.py", "model.py", "data.py", "eval.py", "dream.py"]


def lines(name):
    return (ROOT / name).read_text().splitlines()


def test_the_size_promise():
    """The numbers on the README's first screen hold."""
    promise = re.search(
        r"under ([\d,]+) lines together, `attention.py` under (\d+)", (ROOT / "README.md").read_text()
    )
    together, attention = (int(number.replace(",", "")) for number in promise.groups())
    assert sum(len(lines(name)) for name in CORE) < together
    assert len(lines("attention.py")) < attention
    assert max(len(line) for name in CORE for line in lines(name)) <= 110


def test_floors():
    """attention and data import nothing of ours; no import goes upward; nothing imports tools or demo."""
    allowed = {
        "attention.py": set(),
        "data.py": set(),
        "model.py": {"attention", "data"},
        "eval.py": {"model", "data"},
        "dream.py": {"attention", "data", "model", "eval"},
    }
    for name, floor in allowed.items():
        imported = {m[1] for line in lines(name) if (m := re.match(r"\s*(?:from|import) (\w+)", line))}
        ours = imported & ({n.removesuffix(".py") for n in CORE} | {"tools", "demo"})
        assert ours <= floor, f"{name} imports {ours - floor}"


def test_only_six_packages():
    named = {re.split(r"[=><]", line)[0] for line in lines("requirements.txt") if line}
    assert named == {"torch", "safetensors", "tokenizers", "numpy", "pytest", "tqdm"}


def test_the_readme_names_flags_that_exist():
    """Every command of the README and of the module docstrings is one that our parsers accept."""
    import dream
    import eval as yardstick

    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "dream.py", "eval.py"))
    text = re.sub(r"\\\n\s*", "", text)
    start = r"(?:python|torchrun --nproc-per-node 8)"
    commands = re.findall(rf"^[ $]*{start} (dream|eval)\.py (.*?)(?:  .*)?$", text, re.MULTILINE)
    assert len(commands) >= 12
    for script, arguments in commands:
        if "--resume" not in arguments and "|" not in arguments:
            parser = dream.parse_arguments if script == "dream" else yardstick.parse_arguments
            parser(arguments.split())


def test_demo_checkpoint_is_small():
    size = sum(file.stat().st_size for file in (ROOT / "demo" / "checkpoint").iterdir())
    assert size < 2_000_000


def test_importing_reads_no_hub_and_no_dataset():
    """`import dream` stays light: no network package, no optional package."""
    code = (
        "import sys, dream; print(sorted({'huggingface_hub', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
