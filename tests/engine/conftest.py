"""Makes the helpers beside the tests importable; every test here starts a real engine."""

import sys
from pathlib import Path

import pytest

# The import mode of the suite keeps test folders off sys.path.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)
