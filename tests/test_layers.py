"""The architecture as a test: imports point down, importing is light, files stay short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pvi"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up. A part imports itself and the layers below; parts of one layer stay apart.
LAYERS = (
    {"errors", "progress", "text"},
    {"datasets", "figures", "page"},
    {"engine"},
    {"optim", "compiled"},
    {"guides", "nn"},
    {"posterior"},
    {"diagnostics"},
    {"plots"},
    {"fit"},
    {"workflow"},
    {"models"},
    {"cli"},
)
PARTS = {f"pvi.{part}" for layer in LAYERS for part in layer}
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
ROOT = "__init__"  # `pvi` itself: may import everything, and only what lies above `fit` imports it
LEVEL[ROOT] = LEVEL["fit"]

HEAVY = ("arviz", "zuko", "sklearn", "matplotlib", "typer", "rich")
MAX_LINES = 400


def part_of(module: str) -> str:
    """`pvi.engine.terms` -> `engine`; `pvi` -> `__init__`."""
    return [*module.split("."), ROOT][1]


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name in PARTS or path.is_dir() or path.with_suffix(".py").is_file()


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of each pvi module that `source` imports, wherever in the file it does."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            members = [f"{base}.{alias.name}" for alias in node.names]
            names = [member if is_module(member) else base for member in members]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = node.func.id if isinstance(node.func, ast.Name) else called
            names = [str(node.args[0].value)] if called in {"import_module", "__import__"} else []
        else:
            continue
        yield from ((node.lineno, n) for n in names if n == "pvi" or n.startswith("pvi."))


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """The imports of a file of pvi that the layers forbid, each as a sentence."""
    part = part_of(module)
    if part == ROOT:
        return []
    if part not in LEVEL:
        return [f"{module}: '{part}' has no layer; give it one in LAYERS"]
    found = []
    for line, target in imported(source, module, is_package=is_package):
        other = part_of(target)
        if other == part:
            continue
        if other not in LEVEL:
            found.append(f"{module}:{line}: imports {target}, which has no layer")
        elif LEVEL[other] >= LEVEL[part]:
            found.append(f"{module}:{line}: '{part}' may not import {target}: it is not below")
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert violations(source, module_name(path), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pvi.engine.terms", "from pvi.errors import ModelError"),
        ("pvi.engine.terms", "from . import traces"),
        ("pvi.guides.normal", "from ..engine.traces import Site"),
        ("pvi.fit.trainer", "def f():\n    from pvi.diagnostics import diagnose"),
        ("pvi.models.vae", "import pvi"),
        ("pvi.cli", "import pvi.plots, pvi.models"),
        ("pvi", "from pvi.models import vae"),
        ("pvi.engine.terms", "import torch, pvinet"),
    ],
)
def test_allowed_imports(module: str, source: str) -> None:
    assert violations(source, module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pvi.engine.terms", "from pvi.fit import trainer"),
        ("pvi.engine.terms", "from ..fit import trainer"),
        ("pvi.engine.terms", "from .. import fit"),
        ("pvi.engine.terms", "from pvi import errors, posterior"),
        ("pvi.engine.terms", "def f():\n    import pvi.guides.normal as n"),
        ("pvi.engine.terms", "if TYPE_CHECKING:\n    from pvi.fit import Fit"),
        ("pvi.engine.terms", "import importlib\nimportlib.import_module('pvi.fit')"),
        ("pvi.engine.terms", "import pvi"),
        ("pvi.engine.terms", "from pvi import ELBO"),
        ("pvi.guides.normal", "from pvi.nn import mlp"),
        ("pvi.plots.trace", "from pvi.fit import Fit"),
        ("pvi.fit.report", "from pvi.workflow import sbc"),
        ("pvi.plots.trace", "from pvi import cli"),
        ("pvi.unheard_of", "import torch"),
    ],
)
def test_forbidden_imports(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


def test_importing_pvi_is_light() -> None:
    code = f"import sys, pvi; print(*[m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [], "import these inside the functions that need them"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: split it by concept"
