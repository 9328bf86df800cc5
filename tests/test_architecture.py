"""Imports run one way: a table of CONTRIBUTING.md says which folder may use which, and the package is held to it."""

import ast
import re
from pathlib import Path

import rfsr_ext

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rfsr_ext"


def table() -> list[list[str]]:
    """Rooms of the package by row of its table."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    cells = re.findall(
        r"^\| (`.+?`) \|", text.partition("\n| folder | holds |\n")[2].partition("\n\n")[0], re.MULTILINE
    )
    rows = [re.findall(r"`(.+?)`", cell) for cell in cells]
    own = [row for row in rows if row[0].startswith("rfsr_ext/")]
    return [[name.removeprefix("rfsr_ext/").removesuffix("/").removesuffix(".py") for name in row] for row in own]


ROWS = table()
ALONE = {"notebook"}  # imports none of the others
ORDER = {room: row for row, rooms in enumerate(ROWS) for room in rooms if room not in ALONE}


def rooms() -> set[str]:
    """Folders and modules that the package has; what starts it is not one of them."""
    found = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {path.stem for path in PACKAGE.glob("*.py")}
    return found - {"__init__", "__main__"}


def imported(path: Path) -> set[str]:
    """Rooms that a module imports anywhere in it, by whatever form of import."""
    package = path.relative_to(ROOT).parent.parts
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            modules |= {f"{base}.{alias.name}" for alias in node.names}  # a name that is no module does no harm
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            modules.add(str(node.args[0].value))  # import_module("rfsr_ext.…")
    return {parts[1] for module in modules if (parts := module.split("."))[0] == "rfsr_ext" and len(parts) > 1}


def wrong(path: Path) -> set[str]:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    used = imported(path) & rooms() - {room}
    return used if room in ALONE else {other for other in used if ORDER.get(other, len(ROWS)) >= ORDER[room]}


def test_the_table_has_every_room():
    assert {room for row in ROWS for room in row} == rooms()


def test_a_folder_uses_those_above_it():
    paths = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in ORDER.keys() | ALONE]
    assert len(paths) > 40
    assert {str(path.relative_to(ROOT)): wrong(path) for path in paths if wrong(path)} == {}


def test_the_order_is_enforced(tmp_path, monkeypatch):
    """Every form of import is seen, up, beside and down."""
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / "rfsr_ext")
    for row in ROWS:
        for room in row:
            (tmp_path / "rfsr_ext" / room).mkdir(parents=True)
            (tmp_path / "rfsr_ext" / room / "__init__.py").touch()
    module = tmp_path / "rfsr_ext/losses/module.py"
    for line, found in {
        "from rfsr_ext.ops import gram_loss": set(),
        "from ..ops.gram import gram_loss": set(),
        "from .haar import HaarLLLoss": set(),
        "import rfsr_ext.models.base": {"models"},
        "from rfsr_ext import data, ops": {"data"},
        "from .. import training": {"training"},
        "from ..cli import app": {"cli"},
        "def f():\n    import_module('rfsr_ext.mini')": {"mini"},
        "from rfsr_ext.notebook import show": {"notebook"},
    }.items():
        module.write_text(line)
        assert wrong(module) == found, line
    (tmp_path / "rfsr_ext/notebook/module.py").write_text("from rfsr_ext.ops import gram_loss")
    assert wrong(tmp_path / "rfsr_ext/notebook/module.py") == {"ops"}


def test_the_package_itself_imports_the_losses_alone():
    assert imported(PACKAGE / "__init__.py") == {"ops"}
    assert imported(PACKAGE / "__main__.py") == {"cli"}


def test_the_package_says_the_same():
    order = rfsr_ext.__doc__.partition("importing only those before it:")[2].partition(".")[0]
    said = [re.findall(r"``(\w+)``", step) for step in order.split("→")]
    assert said == [row for row in ROWS if not ALONE & set(row)]
