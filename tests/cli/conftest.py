"""What several tests of commands need."""

from pathlib import Path

import pytest


@pytest.fixture
def workplace(tmp_path, monkeypatch, small_digits):
    """Run in an empty folder in which `data` is the digits."""
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(small_digits)
