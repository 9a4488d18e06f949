"""The floors of the package, read from the source: who imports whom, and who prints."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "flexmoe_jax"
FLOORS: tuple[set[str], ...] = (  # from the ground up; a room imports its own floor and those below
    {"errors", "config", "tree", "progress", "files", "params", "experiment"},
    {"parallel"},  # what lies where: the model asks it, it knows paths only
    {"model"},
    {"data", "artifacts"},
    {"train"},
    {"compose", "evaluate"},
    {"api", "__init__"},  # the library's front door
    {"hf", "flexmix", "plan", "doctor"},  # wings: the command line's
    {"study"},  # a wing that puts whole models of the mix side by side
    {"cli"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
ONLY_IN = {"orbax": {"artifacts"}, "transformers": {"hf"}, "safetensors": {"hf"}}
HEAVY = {"torch", "transformers", "sentence_transformers", "matplotlib", "jax_privacy"}
SHIPPED = {"hf/modeling_flexmoe.py"}  # copied into exports and run by transformers, never imported by the package
MAY_PRINT = {"cli", "progress"}
FILES = sorted(p for p in (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")) if str(p) not in SHIPPED)


def room(path: pathlib.Path) -> str:
    """The folder or module directly under the package that a file belongs to."""
    return path.parts[0].removesuffix(".py")


def imported(tree: ast.AST):
    """(dotted name, at module level?) of every import; `from a import b` counts as a and as a.b."""
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, node not in inside) for name in names)


def faults(path: pathlib.Path, source: str) -> list[str]:
    """What is wrong with the file at `path` (inside the package), in words."""
    here, tree, found = room(path), ast.parse(source), []
    for name, at_module_level in imported(tree):
        top, *rest = name.split(".")
        if top == "flexmoe_jax":
            there = rest[0] if rest and rest[0] in FLOOR_OF else "__init__"
            if FLOOR_OF[there] > FLOOR_OF[here]:
                found.append(f"{here} (floor {FLOOR_OF[here]}) imports {there} (floor {FLOOR_OF[there]})")
            elif FLOOR_OF[there] == FLOOR_OF[here] >= 1 and there != here and {there, here} != {"api", "__init__"}:
                found.append(f"{here} imports its sibling {there}")
        elif here not in ONLY_IN.get(top, {here}):
            found.append(f"{here} imports {top}: only {', '.join(ONLY_IN[top])} may")
        if top in HEAVY and at_module_level:
            found.append(f"{here} imports {top} at module level")
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    if here not in MAY_PRINT and any(isinstance(call, ast.Name) and call.id == "print" for call in calls):
        found.append(f"{here} prints")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_keeps_the_floors(path):
    assert room(path) in FLOOR_OF, f"{room(path)!r} stands on no floor: add it to FLOORS"
    assert faults(path, (PACKAGE / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("model/x.py", "from flexmoe_jax.data import store", "model (floor 2) imports data (floor 3)"),
        ("model/x.py", "import flexmoe_jax.train.step", "model (floor 2) imports train (floor 4)"),
        ("tree.py", "def f():\n    from flexmoe_jax.model import norm", "tree (floor 0) imports model (floor 2)"),
        ("data/x.py", "from flexmoe_jax import artifacts", "data imports its sibling artifacts"),
        ("api.py", "from flexmoe_jax.cli import main", "api (floor 6) imports cli (floor 9)"),
        ("compose/x.py", "import flexmoe_jax", "compose (floor 5) imports __init__ (floor 6)"),
        ("train/x.py", "import orbax.checkpoint as ocp", "train imports orbax: only artifacts may"),
        ("data/x.py", "def f():\n    import safetensors", "data imports safetensors: only hf may"),
        ("hf/x.py", "import transformers", "hf imports transformers at module level"),
        ("data/x.py", "if True:\n    import torch", "data imports torch at module level"),
        ("data/x.py", "def f():\n    print(1)", "data prints"),
    ],
)
def test_each_rule_can_fail(path, source, fault):
    assert faults(pathlib.Path(path), source) == [fault]


def test_what_is_allowed():
    allowed = "from flexmoe_jax.tree import split\nfrom flexmoe_jax.data import store\ndef f():\n    import torch\n"
    assert faults(pathlib.Path("train/x.py"), allowed) == []
    assert faults(pathlib.Path("cli/x.py"), "import flexmoe_jax\nprint(1)") == []
    assert faults(pathlib.Path("hf/x.py"), "def f():\n    import transformers") == []
