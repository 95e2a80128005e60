import ast
import functools
import inspect
import pkgutil
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)  # tiny tensors: threads cost more than they give


class Patches(pytest.MonkeyPatch):
    """pytest's monkeypatch, but a patch of our code that hits nothing fails the test.

    A module must define the name or read it as its own, for another may look it up elsewhere; and a function
    put in a place of ours must have been called by the end, unless it calls pytest.fail, which says that
    nobody may.
    """

    def __init__(self):
        super().__init__()
        self.calls: dict[str, int] = {}

    def setattr(self, target, name, *value, **options):
        if isinstance(target, str):  # "module.name", value
            target, value = target.rpartition(".")[::2], (name, *value)
            target, name = pkgutil.resolve_name(target[0]), target[1]
        if ours(target):
            where = f"{target.__name__}.{name}"
            if inspect.ismodule(target) and name not in names(target):
                pytest.fail(f"{where} is patched, which {target.__name__} neither defines nor reads")
            if isinstance(value[0], types.FunctionType) and "fail" not in value[0].__code__.co_names:
                value = (self.counted(value[0], where), *value[1:])
        super().setattr(target, name, *value, **options)

    def counted(self, function, where):
        self.calls.setdefault(where, 0)

        @functools.wraps(function)
        def called(*arguments, **named):
            self.calls[where] += 1
            return function(*arguments, **named)

        return called

    def undo(self):
        super().undo()
        unused, self.calls = [where for where, count in self.calls.items() if not count], {}
        if unused:
            pytest.fail(f"patched, but never called: {', '.join(unused)}")


def ours(target) -> bool:
    """Whether it is a module or a class of this project, tests apart."""
    module = target if inspect.ismodule(target) else inspect.isclass(target) and inspect.getmodule(target)
    path = Path(getattr(module, "__file__", None) or "/")
    return path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests")


@functools.cache
def names(module) -> set[str]:
    """What a module's code defines at its top level, or reads as a name of its own."""
    tree = ast.parse(inspect.getsource(module))
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return read | {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.fixture
def monkeypatch():
    patches = Patches()
    yield patches
    patches.undo()


# Of a CPU: with a graph, plain products up to attention.SHORT keys; else the fused kernel.
WAYS = {"plain": ["_short_attention"], "fused": ["_causal_attention", "_masked_attention"]}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """The one way in which the test's attention is computed with a graph; the other may not be gone."""
    import attention

    monkeypatch.setattr("attention.SHORT", {"plain": 512, "fused": 0}[request.param])
    for name in (name for other in WAYS.keys() - {request.param} for name in WAYS[other]):
        own = getattr(attention, name)

        def only_without_graph(*args, own=own):
            if torch.is_grad_enabled():
                pytest.fail("attention took the other way")
            return own(*args)

        monkeypatch.setattr(f"attention.{name}", only_without_graph)
    return request.param


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="also run what takes minutes: the demo, real data, real sizes"
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.parent.name == "oracles":
            item.add_marker("oracle")
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="takes minutes; run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")
    config.addinivalue_line("markers", "oracle: compares with other people's libraries")
