"""Imports follow the layers of the architecture, and there are no import cycles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "slotkernels": ROOT / "kernels/slotkernels",
    "interpreter": ROOT / "interpreter",
    "profiling": ROOT / "profiling",
}
# From the lowest up; a module may import from its own layer and from those below.
LAYERS = [
    ["slotkernels"],
    [
        f"interpreter.{name}"
        for name in ("files", "output_folder", "locks", "interrupts", "versions", "openmp", "heap", "console", "large")
    ],
    ["interpreter.data", "interpreter.metrics"],
    ["interpreter.configs"],
    ["interpreter.render"],
    ["interpreter.output_checks"],
    ["interpreter.segmentation"],
    ["interpreter.models"],
    ["interpreter.store"],
    ["interpreter.engine"],
    ["interpreter.methods"],
    ["interpreter.evaluation"],
    ["interpreter"],  # commands, and the public functions of the package
    ["interpreter.app"],
    ["profiling"],
]
COMMANDS = {"interpreter.data.__main__", "interpreter.data.synthetic"}  # commands inside the package that they serve
METHOD_FACES = {"interpreter.methods", "interpreter.methods.base", "interpreter.methods.runs"}


def modules() -> dict[str, Path]:
    """All modules by dotted name; a package is its __init__."""
    paths = {}
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            paths[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return paths


MODULES = modules()


def imports_of(module: str) -> set[str]:
    """Modules of this project that a module imports anywhere: in functions and under TYPE_CHECKING, too."""
    path, names_imported = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names_imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            names_imported |= {name if name in MODULES else base for name in names}
    return {name for name in names_imported if name in MODULES} - {module}


GRAPH = {module: imports_of(module) for module in MODULES}


def layer_of(module: str) -> int:
    if module in COMMANDS:
        module = "interpreter.commands"
    matching = [
        (len(name), number)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(matching)[1]


def circle_from(start: str) -> list[str] | None:
    """The shortest circle of imports through a module, None if there is none."""
    ways, seen = [[start]], set()
    for way in ways:
        for following in sorted(GRAPH[way[-1]]):
            if following == start:
                return [*way, start]
            if following not in seen:
                seen.add(following)
                ways.append([*way, following])
    return None


def test_no_import_runs_in_a_circle():
    circles = {frozenset(way): way for module in GRAPH if (way := circle_from(module))}
    assert not circles, "\n".join(" -> ".join(way) for way in circles.values())


def test_imports_point_to_lower_layers():
    wrong = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if layer_of(other) > layer_of(module)
    ]
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("folder", ["evaluation", "segment", "evaluate", "app"])
def test_methods_are_used_through_their_contract(folder):
    folder = f"interpreter.{folder}"
    wrong = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        if module == folder or module.startswith(f"{folder}.")
        for other in others
        if other.startswith("interpreter.methods") and other not in METHOD_FACES
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_nothing_imports_the_page():
    wrong = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if other.startswith("interpreter.app") and not module.startswith("interpreter.app")
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_nothing_imports_the_tests():
    wrong = [
        module
        for module, path in MODULES.items()
        if "import tests" in (text := path.read_text()) or "from tests" in text
    ]
    assert not wrong


def test_slotkernels_imports_nothing_of_interpreter():
    kernels = [module for module in MODULES if module.startswith("slotkernels")]
    assert not {other for module in kernels for other in GRAPH[module] if not other.startswith("slotkernels")}


def imports_in_text(path: Path) -> set[str]:
    """What a test file imports, as written, with the dots of relative imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def test_tests_import_no_other_test_file_and_no_profiling():
    """Helpers of several tests are in separate modules. Only tests of profiling import profiling."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for name in imports_in_text(path):
            is_test = any(part.startswith("test_") for part in name.split("."))
            profiling = name.split(".")[0] == "profiling" and "profiling" not in path.parts
            if is_test or profiling:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)
