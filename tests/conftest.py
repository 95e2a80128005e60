import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)  # tiny tensors: threads cost more than they give


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="also run what takes minutes: the demo, real data, real sizes"
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.name.startswith("test_oracle"):
            item.add_marker("oracle")
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="takes minutes; run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")
    config.addinivalue_line("markers", "oracle: compares with other people's libraries")
