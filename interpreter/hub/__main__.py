"""Share runs on the Hugging Face hub, and download the runs of others: ``python -m interpreter.hub --help``."""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from interpreter.commands import cli, described, run_command
from interpreter.console import gigabytes
from interpreter.hub.card import write_card
from interpreter.hub.client import open_client
from interpreter.hub.fetching import fetch
from interpreter.hub.names import parse_name, pinned_name
from interpreter.hub.packing import Packed, pack
from interpreter.hub.pushing import checked_license, push_run, repository_name

PROG = "python -m interpreter.hub"
PUSH_EXAMPLES = """Examples:
  python -m interpreter.hub push runs/demo owner/name --license apache-2.0 --dry-run
  python -m interpreter.hub push runs/demo owner/name --license apache-2.0"""
PULL_EXAMPLES = """Examples:
  python -m interpreter.hub pull owner/name
  python -m interpreter.hub pull owner/name@v1.0"""


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a trained run to a repository of the Hugging Face hub. A new repository is created if necessary.

    Sends the weights of each finished stage, a configuration without the paths of this computer, a model card, and a
    backbone from a local folder or file. Log in first: hf auth login. A second push sends only what changed.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Directory of a trained run."""
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")]
    """Repository, OWNER/NAME."""
    license: str | None = None
    """Licence of the weights as an identifier of the hub, such as apache-2.0 or cc-by-nc-4.0. Required for a new
    repository and for --dry-run. Default for an existing repository: the licence on its model card."""
    private: bool = False
    """Create a new repository as private."""
    revision: str = "main"
    """Branch to push to. A new branch is created if necessary."""
    message: str | None = None
    """Message of the commit. Default: the method and the steps of each stage."""
    allow_unfinished: bool = False
    """Also send stages that have not reached their last step."""
    dry_run: bool = False
    """Send nothing. Write the files to a folder instead, which can be used as a run, and print their names."""


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Download a run of the Hugging Face hub into the cache of its client, to use it offline later.

    Prints the folder, and the name with the commit, which always means the same files. Commands with
    --run hub:OWNER/NAME download the run themselves.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")]
    """OWNER/NAME, or OWNER/NAME@REVISION for a branch, tag or commit."""


def push(options: Push) -> int:
    """Pack and send a run; returns the exit status."""
    if options.dry_run:
        name = repository_name(options.run, options.name, options.revision)
        license = checked_license(options.license)
        open_client()  # needed for the header of the card
        folder = Path(tempfile.mkdtemp(prefix="interpreter-hub-"))
        try:
            packed = pack(options.run, folder, options.allow_unfinished)
            write_card(packed, name, license)
        except BaseException:
            shutil.rmtree(folder)
            raise
        _print_packed(packed)
        print(f"nothing was sent; the files that would be sent are in {packed.folder}")
        return 0
    pushed = push_run(
        options.run,
        options.name,
        license=options.license,
        private=options.private,
        revision=options.revision,
        message=options.message,
        allow_unfinished=options.allow_unfinished,
        packed=_print_packed,
    )
    print(f"{pushed.url}\n{'pushed' if pushed.is_new else 'nothing changed'}: {pushed.name}")
    return 0


def _print_packed(packed: Packed) -> None:
    for note in packed.notes:
        print(note)
    for path in packed.files:
        print(f"  {path}  {gigabytes((packed.folder / path).stat().st_size)}")


def pull(options: Pull) -> int:
    """Download a run; returns the exit status."""
    folder = fetch(parse_name(options.name))
    print(f"{pinned_name(folder)}\n{folder}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    command = (
        Annotated[Push, tyro.conf.subcommand("push", description=described(Push, PUSH_EXAMPLES))]
        | Annotated[Pull, tyro.conf.subcommand("pull", description=described(Pull, PULL_EXAMPLES))]
    )
    options: Push | Pull = cli(
        command,  # type: ignore[arg-type]
        sys.argv[1:] if arguments is None else arguments,
        prog=PROG,
        description="Share runs on the Hugging Face hub, and download the runs of others.",
    )
    return push(options) if isinstance(options, Push) else pull(options)


if __name__ == "__main__":
    run_command(main)
