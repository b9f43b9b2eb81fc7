"""Code that Triton kernels have to avoid, because the compiler computes something else than the interpreter.

Triton finds the variables that a loop changes by comparing tensors before and after one pass. If two variables name
one tensor before the loop, as after ``g, following = first, first``, then ``g = following`` in the loop seems to change
nothing, and after the loop g is what it was before.
"""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels" / "slotkernels"


def is_kernel(node):
    return isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list)


def assigned(node):
    """Names that a statement, or a statement in it, assigns."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def pairs(statement):
    """Targets and values of an assignment, element by element."""
    (target,), value = statement.targets, statement.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]


def renamed(loop):
    """Pairs (a, b) of all assignments ``a = b`` in a loop."""
    statements = [node for node in ast.walk(loop) if isinstance(node, ast.Assign)]
    each = [pair for statement in statements for pair in pairs(statement)]
    return [(a.id, b.id) for a, b in each if isinstance(a, ast.Name) and isinstance(b, ast.Name)]


def unseen_changes(body, tensors):
    """Assignments ``a = b`` in loops where a and b name the same tensor before the loop.

    Args:
        body: statements of a kernel.
        tensors: for each variable so far, a value that two variables share if they name the same tensor.
    """
    for statement in body:
        if isinstance(statement, ast.For | ast.While):
            yield from ((a, b) for a, b in renamed(statement) if a in tensors and tensors[a] == tensors.get(b, b))
        for part in ("body", "orelse"):
            yield from unseen_changes(getattr(statement, part, []), tensors)
        if isinstance(statement, ast.Assign):
            known = dict(tensors)
            for target, value in pairs(statement):
                for name in assigned(target):
                    same = isinstance(value, ast.Name) and known.get(value.id, value.id)
                    tensors[name] = same or (name, statement.lineno)
        elif not isinstance(statement, ast.For | ast.While | ast.If):
            tensors.update({name: (name, statement.lineno) for name in assigned(statement)})


def faults(source):
    kernels = [node for node in ast.walk(ast.parse(source)) if is_kernel(node)]
    return [(kernel.name, *pair) for kernel in kernels for pair in unseen_changes(kernel.body, {})]


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: str(path.relative_to(KERNELS)))
def test_no_loop_changes_a_variable_unseen(path):
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("g, f = first, first", [("kernel", "g", "f")]),
        ("f = first\n    g = f", [("kernel", "g", "f")]),
        ("f = tl.zeros_like(first)\n    g = tl.zeros_like(first)", []),
        ("f, g = first, other", []),
    ],
)
def test_unseen_changes_are_found(before, expected):
    loop = f"    {before}\n    for k in range(steps):\n        g = f\n        f = f + 1\n"
    assert faults(f"@triton.jit\ndef kernel(first, other, steps):\n{loop}") == expected
