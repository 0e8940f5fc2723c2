"""The reference page says what the code has: every option with its default and its meaning."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from detkit.durations import duration
from detkit.params import describe
from detkit_sagemaker.options import DeployOptions, SagemakerOptions, TransformOptions

PAGE = Path(__file__).parents[3] / "docs/reference/sagemaker.md"
SECTIONS = {"Options of training": SagemakerOptions, "Options of batch transform": TransformOptions,
            "Options of endpoints": DeployOptions}  # fmt: skip


def table(options: type[msgspec.Struct]) -> str:
    """Return the options of one kind as the page has them."""
    meaning, defaults = describe(options), options()
    rows = [
        f"| `{name}` | {shown(name, getattr(defaults, name))} | {meaning[name]} |"
        for name in sorted(options.__struct_fields__)
    ]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows]) + "\n"


def shown(name: str, value: object) -> str:
    if name in {"max_runtime", "max_wait", "ttl"} and isinstance(value, int):
        return f"`{duration(value)}`"
    if value is None or (isinstance(value, (tuple, dict)) and not value):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


@pytest.mark.parametrize("section", SECTIONS)
def test_options_are_documented(section: str) -> None:
    _, _, below = PAGE.read_text().partition(f"## {section}\n")
    found, _, _ = below.partition("\n## ")
    assert table(SECTIONS[section]) in found, f"the table should be:\n{table(SECTIONS[section])}"
