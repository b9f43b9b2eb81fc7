"""Share runs on the Hugging Face hub, and fetch those of others: ``python -m interpreter.hub --help``."""

import inspect
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from interpreter.commands import cli, run_command
from interpreter.console import gigabytes
from interpreter.hub.card import write_card
from interpreter.hub.client import explained, open_client
from interpreter.hub.fetching import fetch
from interpreter.hub.names import HubName, is_commit, is_hub_name, parse_name, pinned_name
from interpreter.hub.packing import Packed, pack
from interpreter.hub.pushing import look_up, push_folder, require_token

PROG = "python -m interpreter.hub"
PUSH_EXAMPLES = """Examples:
  python -m interpreter.hub push runs/demo owner/name --license apache-2.0 --dry-run
  python -m interpreter.hub push runs/demo owner/name --license apache-2.0"""
PULL_EXAMPLES = """Examples:
  python -m interpreter.hub pull owner/name
  python -m interpreter.hub pull owner/name@v1.0"""


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a trained run to a repository of the Hugging Face hub, which is made if it does not exist.

    Sends the weights of each finished stage, a configuration without the paths of this computer, a model card, and a
    backbone that came from a local folder or file. Log in first: hf auth login. A second push sends what changed.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Directory of a trained run."""
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")]
    """Repository, OWNER/NAME."""
    license: str | None = None
    """Licence of the weights, by the hub's identifier, such as apache-2.0 or cc-by-nc-4.0. Needed for a new repository;
    for an existing one the default is that of its model card."""
    private: bool = False
    """Make a new repository private."""
    revision: str = "main"
    """Branch to push to; it is made if it does not exist."""
    message: str | None = None
    """Message of the commit. Default: the method and the steps of each stage."""
    allow_unfinished: bool = False
    """Send stages that have not reached their last step, too."""
    dry_run: bool = False
    """Send nothing: write what would be sent into a folder, which can be used as a run, and print its files."""


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Download a run of the Hugging Face hub into the cache of its client, such as before going offline.

    Prints its name with the commit, which always means the same files, and its folder. Commands that take
    --run hub:OWNER/NAME do the same by themselves.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")]
    """OWNER/NAME, or OWNER/NAME@REVISION for a branch, tag or commit."""


def push(options: Push) -> int:
    """Pack and send a run; returns the exit status."""
    if is_hub_name(options.run):
        raise ValueError(f"push takes the directory of a run, not {options.run}, which is on the hub already")
    if "@" in options.name:
        raise ValueError(f"{options.name}: give the branch with --revision")
    name = parse_name(f"{options.name}@{options.revision}")
    if is_commit(name.revision):
        raise ValueError(f"--revision {name.revision} is a commit, which never changes; give a branch")
    client = open_client()
    with tempfile.TemporaryDirectory(prefix="interpreter-hub-") as temporary:
        if options.dry_run:
            _dry_run(options, name)
            return 0
        require_token(name)
        there = look_up(client, name)
        if options.private and there.exists and not there.is_private:
            raise ValueError(
                f"hub:{name.repository} exists and is public; leave --private out, or make it private in its settings"
            )
        license = _license(options, there.license)
        packed = pack(options.run, Path(temporary), options.allow_unfinished)
        write_card(packed, name, license)
        _print_packed(packed)
        message = options.message or _message(packed)
        commit, is_new = push_folder(client, packed.folder, packed.files, there, options.private, message)
    with explained(name):
        print(f"{client.endpoint}/{name.repository}/commit/{commit}")
    print(f"{'pushed' if is_new else 'nothing changed'}: {HubName(name.repository, commit)}")
    return 0


def _dry_run(options: Push, name: HubName) -> None:
    """Write what would be sent into a folder that stays."""
    packed = pack(options.run, Path(tempfile.mkdtemp(prefix="interpreter-hub-")), options.allow_unfinished)
    write_card(packed, name, _license(options, None))
    _print_packed(packed)
    print(f"nothing was sent; what would be sent is in {packed.folder}")


def _license(options: Push, known: str | None) -> str:
    """The licence for the model card.

    Raises:
        ValueError: if it is not known, or no identifier.
    """
    license = options.license or known
    if not license:
        raise ValueError("say under which licence others may use the weights: --license apache-2.0, for example")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(
            f"--license {license} is no identifier of the hub, such as apache-2.0, mit, cc-by-4.0 or cc-by-nc-4.0; all "
            "of them: https://huggingface.co/docs/hub/repositories-licenses"
        )
    return license


def _print_packed(packed: Packed) -> None:
    for note in packed.notes:
        print(note)
    for path in packed.files:
        print(f"  {path}  {gigabytes((packed.folder / path).stat().st_size)}")


def _message(packed: Packed) -> str:
    steps = ", ".join(f"{key} stage, step {step}" for key, step in packed.steps.items())
    return f"Upload a run of the method {packed.method.name}: {steps}"


def pull(options: Pull) -> int:
    """Fetch a run; returns the exit status."""
    folder = fetch(parse_name(options.name))
    print(f"{pinned_name(folder)}\n{folder}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    command = (
        Annotated[Push, tyro.conf.subcommand("push", description=_described(Push, PUSH_EXAMPLES))]
        | Annotated[Pull, tyro.conf.subcommand("pull", description=_described(Pull, PULL_EXAMPLES))]
    )
    options: Push | Pull = cli(
        command,  # type: ignore[arg-type]
        sys.argv[1:] if arguments is None else arguments,
        prog=PROG,
        description="Share runs on the Hugging Face hub, and fetch those of others.",
    )
    return push(options) if isinstance(options, Push) else pull(options)


def _described(options: type, examples: str) -> str:
    return f"{inspect.getdoc(options)}\n\n{examples}"


if __name__ == "__main__":
    run_command(main)
