"""Every public name of slotkernels has an example in its docstring, and all examples run."""

import doctest

import pytest
import slotkernels
import torch
from slotkernels import slot_attention, slot_update

PACKAGES = (slotkernels, slot_attention, slot_update)
PUBLIC = {
    name: value
    for package in PACKAGES
    for name in package.__all__
    if callable(value := getattr(package, name)) and not name.endswith(("bytes_moved", "flops"))
}
MISSING: set[str] = set()  # names without an example; may only shrink


def examples_of(name):
    """Examples of a function or class, and of a class's methods."""
    doctests = doctest.DocTestFinder(exclude_empty=True).find(PUBLIC[name], name, globs={})
    return [test for test in doctests if test.examples]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_examples_that_run(name):
    examples = examples_of(name)
    assert bool(examples) != (name in MISSING), "no example" if not examples else "has an example: shrink MISSING"
    torch.use_deterministic_algorithms(False)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    reports = []
    for test in examples:
        runner.run(test, out=reports.append)
    assert runner.failures == 0, "".join(reports)


def test_every_public_name_is_collected():
    assert set(slotkernels.__all__) <= set(PUBLIC)
