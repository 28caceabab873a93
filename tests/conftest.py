"""Shared fixtures and helpers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import make

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MANNEQUIN = Path(__file__).parent / "mannequin"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return make.plain(tmp_path / "plain")


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    return make.fp8(tmp_path / "fp8")
