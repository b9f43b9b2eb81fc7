"""Examples on the pages of the ops run as they are, and every public name of slotkernels has a page."""

import re
from pathlib import Path

import pytest
import slotkernels
import torch

FOLDER = Path(__file__).parents[2] / "docs" / "ops"
PAGES = sorted(path.name for path in FOLDER.glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# A comment after print(...) is what it prints, if it looks like a value: torch.Size([2, 7, 64]), True, tensor([1, 0]).
PRINTED = re.compile(r"^ *print\(.*\)  # ((?:torch\.|tensor\(|True|False|\[|\(|-?\d).*)$", re.MULTILINE)


def blocks_of(name):
    """Python blocks of a page, each after as many empty lines as there are above it, so that errors name its line."""
    text = (FOLDER / name).read_text()
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("name", [name for name in PAGES if blocks_of(name)])
def test_examples_of_a_page_run_and_print_what_it_says(name, capsys):
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    namespace = {"__name__": "page"}
    for block in blocks_of(name):
        exec(compile(block, str(FOLDER / name), "exec"), namespace)
        lines = iter(capsys.readouterr().out.splitlines())
        for value in PRINTED.findall(block):
            assert value in lines, f"{value}: not printed, or not in this place"


@pytest.mark.parametrize("name", slotkernels.__all__)
def test_public_name_occurs_in_an_example_of_a_page(name):
    pages = [page for page in PAGES if any(re.search(rf"\b{name}\b", block) for block in blocks_of(page))]
    assert pages != []
