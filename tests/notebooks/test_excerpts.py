"""The C++ that notebooks quote is what is compiled: each excerpt names its file and stands in it, line for line."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^# ```cpp\n# // (csrc/\S+)\n(.+?)^# ```$", re.MULTILINE | re.DOTALL)


def excerpts():
    for source in sorted((ROOT / "notebooks/src").glob("*.py")):
        for number, (file, text) in enumerate(_BLOCK.findall(source.read_text())):
            yield pytest.param(file, text, id=f"{source.stem}-{number}")


@pytest.mark.parametrize(("file", "text"), excerpts())
def test_an_excerpt_stands_in_its_file(file, text):
    quoted = [line.removeprefix("#").strip() for line in text.splitlines()]
    lines = [line.strip() for line in (ROOT / file).read_text().splitlines()]
    assert any(lines[start : start + len(quoted)] == quoted for start in range(len(lines)))


def test_there_are_excerpts():
    assert any("13_fuse" in param.id for param in excerpts())
