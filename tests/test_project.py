"""What the README and the house promise about the project itself."""

import ast
import re
import subprocess
import sys

from conftest import ROOT

CORE = ["attention.py", "model.py", "data.py", "eval.py", "dream.py"]
# From the ground: a file imports from its own floor or from below.
FLOORS = ["support", "attention", "data", "model", "formats", "related", "eval", "dream", "tools"]
FLOORS += ["demo", "studies"]
LIMITS = {"related": 280, "formats": 320, "support": 320}
PYTHON = sorted(
    file.relative_to(ROOT)
    for file in ROOT.rglob("*.py")
    if file.relative_to(ROOT).parts[0] in {*CORE, *FLOORS} and "__pycache__" not in file.parts
)


def lines(name):
    return (ROOT / name).read_text().splitlines()


def imports(name):
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_size_promise():
    """The numbers on the README's first screen hold, and nothing is squeezed into them."""
    promised = r"under ([\d,]+) lines together, `attention.py` under (\d+), `dream.py` at most (\d+)"
    promise = re.search(promised, (ROOT / "README.md").read_text())
    together, attention, dream = (int(number.replace(",", "")) for number in promise.groups())
    assert sum(len(lines(name)) for name in CORE) < together
    assert len(lines("attention.py")) < attention and len(lines("dream.py")) <= dream
    for name in PYTHON:
        assert max(map(len, lines(name)), default=0) <= 110, name
        assert len(lines(name)) <= LIMITS.get(name.parts[0], 1000), name


def test_all_code_beside_the_tests_stays_small():
    """8,000 were planned. The downloader stays; conversion, SQuAD, windows, a study, several models in one
    table, an index of texts and the rows set aside came on top."""
    assert len(PYTHON) > 30
    assert sum(len(lines(name)) for name in PYTHON) <= 9_700


def test_floors():
    """No import goes upward, none in a circle, and attention.py imports nothing of ours."""
    edges = {}
    for name in PYTHON:
        floor = FLOORS.index(name.parts[0].removesuffix(".py"))
        module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
        ours = {i for i in imports(name) if i.split(".")[0] in FLOORS and "demo" != i.split(".")[0]}
        for other in ours:
            assert FLOORS.index(other.split(".")[0]) <= floor, f"{name} imports {other}, which is above it"
        edges[module] = {other for other in ours if other != module}
    assert not edges["attention"]
    assert not {other for other in edges["related.bm25"] if not other.startswith("support")}
    done = set()
    while ready := {module for module, others in edges.items() if not (others & edges.keys()) - done} - done:
        done |= ready
    assert done == edges.keys(), f"these import one another: {sorted(edges.keys() - done)}"


def test_names_are_resolved_once():
    """The core asks for a folder by name in one place of each program, through support.runs.locate."""
    for name in ("attention.py", "model.py", "data.py"):
        assert not re.search(r"find_folder|resolve_run|locate\(", (ROOT / name).read_text())


def test_the_core_never_asks_which_objective_it_is():
    """`settings.objective` is looked up by name, and compared only where the objective is built."""
    asked = {}
    for function in ast.parse((ROOT / "dream.py").read_text()).body:
        if isinstance(function, ast.FunctionDef):
            compared = [n for n in ast.walk(function) if isinstance(n, ast.Compare)]
            asked[function.name] = any("objective" in ast.dump(n.left) for n in compared)
    assert [name for name, found in asked.items() if found] == ["build_objective"]


def test_only_six_packages():
    named = {re.split(r"[=><]", line)[0] for line in lines("requirements.txt") if line}
    assert named == {"torch", "safetensors", "tokenizers", "numpy", "pytest", "tqdm"}


def test_the_pages_name_flags_that_exist():
    """Every command of the pages and of the module docstrings is one that our parsers accept."""
    import dream
    import eval as yardstick

    pages = ["README.md", "dream.py", "eval.py", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
    text = re.sub(r"\\\n\s*", "", "\n".join((ROOT / name).read_text() for name in pages))
    start = r"(?:python|torchrun --nproc-per-node 8)"
    commands = re.findall(rf"^[ $]*{start} (dream|eval)\.py (.*?)(?:  .*)?$", text, re.MULTILINE)
    assert len(commands) >= 20
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
