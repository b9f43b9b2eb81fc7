"""The client of the Hugging Face hub, imported when it is needed, with errors in one line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from interpreter.hub.names import PREFIX, HubName
from interpreter.versions import require_package

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOG_IN = "log in with: hf auth login (or set HF_TOKEN)"


class UnreachableError(OSError):
    """The hub does not answer, or requests are forbidden (HF_HUB_OFFLINE)."""


def open_client() -> "HfApi":
    """The client of the hub at ``HF_ENDPOINT``, by default huggingface.co.

    Raises:
        ValueError: if its package is missing or too old. The message names the extra.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ValueError(
            f"a run named {PREFIX}OWNER/NAME needs the package huggingface_hub: pip install 'huggingface_hub>=2.4'"
        ) from error
    require_package("huggingface_hub")
    return HfApi()


def cache_folder() -> Path:
    """The cache of the client, from ``HF_HOME`` or ``HF_HUB_CACHE``."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@contextmanager
def explained(name: HubName) -> Iterator[None]:
    """A block of requests about a repository. Its errors become one line that says what to do.

    Raises:
        UnreachableError: if the hub does not answer.
        OSError, ValueError: if it refuses, or its answer is invalid.
    """
    import httpx2
    from huggingface_hub import constants, errors

    where, address = f"{PREFIX}{name.repository}", f"{constants.ENDPOINT}/{name.repository}"
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise UnreachableError(f"{where}: HF_HUB_OFFLINE forbids requests to {constants.ENDPOINT}") from error
    except errors.GatedRepoError as error:
        raise OSError(f"{where}: its owner has to give you access; ask for it at {address}, then {LOG_IN}") from error
    except errors.RepositoryNotFoundError as error:
        raise OSError(
            f"{where}: no such repository at {constants.ENDPOINT}, or it is private; check the name, or {LOG_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise OSError(
            f"{where} has no branch, tag or commit {name.revision}; {address}/tree/main lists those that it has"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(error, where) from error
    except httpx2.TransportError as error:
        reason = str(error) or type(error).__name__
        raise UnreachableError(
            f"{where}: {constants.ENDPOINT} cannot be reached, or the connection broke ({reason})"
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: {constants.ENDPOINT} gave an invalid answer ({_one_line(error)}); check "
            "HF_ENDPOINT and the proxy, or try again later"
        ) from error
    except ValueError as error:  # for example a model card that the hub does not accept
        raise ValueError(f"{where}: {_one_line(error)}") from error
    except RuntimeError as error:  # a failed upload: the client gives the reason in the cause
        reason = f" ({_one_line(error.__cause__)})" if error.__cause__ else ""
        raise OSError(f"{where}: {_one_line(error)}{reason} Rerun the same command to try again") from error


def _refused(error: Exception, where: str) -> OSError:
    """The refusal of a server, as an error in one line."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if status in (401, 403):
        return OSError(f"{where}: the hub refuses access (status {status}); {LOG_IN} with a token that allows it")
    if status == 429:
        return UnreachableError(f"{where}: the hub accepts no more requests at the moment (status 429)")
    if status >= 500:
        return UnreachableError(f"{where}: the server of the hub fails (status {status})")
    said = getattr(error, "server_message", None)
    return OSError(f"{where}: the hub refuses the request (status {status}{f', {_one_line(said)}' if said else ''})")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300]
