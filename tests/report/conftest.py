"""Comparisons that several tests only read."""

from pathlib import Path
from typing import Any

import pytest

from tests.report.made import Page, fake_comparison, fake_variants, read


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("comparison")
    return folder, fake_comparison(folder, ["full", "fedss", "pos-only", "central"], seeds=3)


@pytest.fixture(scope="session")
def comparison_page(comparison: tuple[Path, Any]) -> tuple[str, Page]:
    return read(comparison[0])


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    fake_variants(folder)
    return folder
