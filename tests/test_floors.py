"""Rules on the package's source: who may import whom, who may print, and how long files and functions may be."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "flexmoe_jax"
FLOORS: tuple[set[str], ...] = (  # a folder or module imports from lower floors; on the lowest, also from its siblings
    {
        "errors",
        "config",
        "model_config",
        "source_config",
        "optimizer_config",
        "mapping",
        "ranges",
        "tree",
        "progress",
        "params",
        "experiment",
    }
    | {"files", "json_files", "foreign", "tokenizer_files"},
    {"parallel"},  # shardings by path: the model asks for them
    {"model"},
    {"data", "artifacts"},
    {"evaluate"},
    {"training"},  # scores held-out text while it trains
    {"compose"},
    {"api", "__init__"},  # the library's front door
    {"hf", "flexmix", "plan", "doctor", "attack"},  # wings of the command line
    {"study"},  # a wing that compares whole models of the mix
    {"cli"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
ONLY_IN = {"orbax": {"artifacts"}, "transformers": {"hf"}, "safetensors": {"hf"}}
HEAVY = {"torch", "transformers", "sentence_transformers", "matplotlib", "jax_privacy"}
SHIPPED = {"hf/modeling_flexmoe.py"}  # exports hold a copy, which transformers runs; the package never imports it
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
    """The rules that the file at `path` (inside the package) breaks, in words."""
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
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if here not in MAY_PRINT and any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls):
        found.append(f"{here} prints")
    for call in calls:  # ruff's PLW1514 sees only what it can infer to be a path
        of_text = isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text")
        if of_text and not any(keyword.arg == "encoding" for keyword in call.keywords):
            found.append(f"{here} reads or writes text in the encoding of the locale")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_from_lower_floors(path):
    assert room(path) in FLOOR_OF, f"{room(path)!r} is not in FLOORS: add it"
    assert faults(path, (PACKAGE / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("model/x.py", "from flexmoe_jax.data import store", "model (floor 2) imports data (floor 3)"),
        ("model/x.py", "import flexmoe_jax.training.step", "model (floor 2) imports training (floor 5)"),
        ("tree.py", "def f():\n    from flexmoe_jax.model import norm", "tree (floor 0) imports model (floor 2)"),
        ("data/x.py", "from flexmoe_jax import artifacts", "data imports its sibling artifacts"),
        ("api.py", "from flexmoe_jax.cli import main", "api (floor 7) imports cli (floor 10)"),
        ("compose/x.py", "import flexmoe_jax", "compose (floor 6) imports __init__ (floor 7)"),
        ("training/x.py", "import orbax.checkpoint as ocp", "training imports orbax: only artifacts may"),
        ("data/x.py", "def f():\n    import safetensors", "data imports safetensors: only hf may"),
        ("hf/x.py", "import transformers", "hf imports transformers at module level"),
        ("data/x.py", "if True:\n    import torch", "data imports torch at module level"),
        ("data/x.py", "def f():\n    print(1)", "data prints"),
        ("data/x.py", "path.write_text('a')", "data reads or writes text in the encoding of the locale"),
    ],
)
def test_a_broken_rule_is_found(path, source, fault):
    assert faults(pathlib.Path(path), source) == [fault]


def test_allowed_imports_are_not_reported():
    allowed = "from flexmoe_jax.tree import split\nfrom flexmoe_jax.data import store\ndef f():\n    import torch\n"
    assert faults(pathlib.Path("training/x.py"), allowed) == []
    assert faults(pathlib.Path("data/x.py"), "path.read_text(encoding='utf-8')") == []
    assert faults(pathlib.Path("cli/x.py"), "import flexmoe_jax\nprint(1)") == []
    assert faults(pathlib.Path("hf/x.py"), "def f():\n    import transformers") == []


MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 8


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """All parameters except `self` and `cls`."""
    args = function.args
    every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    return [arg for arg in every if arg is not None and arg.arg not in ("self", "cls")]


def too_large(source: str) -> list[str]:
    """What exceeds its limit in a file, in words."""
    found = []
    if (lines := source.count("\n")) > MAX_FILE_LINES:
        found.append(f"{lines} lines")
    for function in functions(ast.parse(source)):
        assert function.end_lineno is not None
        if (lines := function.end_lineno - function.lineno + 1) > MAX_FUNCTION_LINES:
            found.append(f"{function.name} has {lines} lines")
        if (count := len(parameters(function))) > MAX_PARAMETERS:
            found.append(f"{function.name} has {count} parameters")
    return found


def not_annotated(source: str) -> list[str]:
    """Public functions, and public methods of public classes, that leave a parameter or the result unannotated."""
    tree, found = ast.parse(source), []
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for holder in (tree, *classes):
        for function in (node for node in holder.body if isinstance(node, ast.FunctionDef)):
            if function.name.startswith("_"):
                continue
            names = [arg.arg for arg in parameters(function) if arg.annotation is None and arg.arg != "kwargs"]
            names += [] if function.returns is not None else ["result"]
            found += [f"{function.name}: {', '.join(names)}"] if names else []
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_functions_and_parameter_lists_stay_short(path):
    assert too_large((PACKAGE / path).read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_public_functions_are_annotated(path):
    assert not_annotated((PACKAGE / path).read_text()) == []


def test_excessive_length_and_missing_annotations_are_found():
    long = "def f():\n" + "    x = 1\n" * 60
    assert too_large(long) == ["f has 61 lines"]
    assert too_large("def f(a, b, c, d, e, f, g, h, i): ...\n") == ["f has 9 parameters"]
    assert too_large("class A:\n    def f(self, a, b, c, d, e, f, g, h): ...\n") == []
    assert too_large("x = 1\n" * 401) == ["401 lines"]
    assert not_annotated("def f(a, *, b: int): ...\n") == ["f: a, result"]
    assert not_annotated("class A:\n    def f(self, a: int): ...\n") == ["f: result"]
    assert not_annotated("class _A:\n    def f(self, a): ...\ndef _f(a): ...\n") == []
