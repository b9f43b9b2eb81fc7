"""Fetching a run: only its files, compared with their hashes, continued after a cut, and errors in one line."""

import hashlib
import json
import re
import socket
from pathlib import Path

import pytest

from interpreter.commands import one_line
from interpreter.hub.__main__ import main
from interpreter.hub.fetching import fetch, is_complete, local_run
from interpreter.hub.names import HubName, parse_name, pinned_name

from .conftest import CHUNK, NAME
from .small_hub import Repository

IMAGE, VIDEO = (f"{stage}/checkpoint-00000003.safetensors" for stage in ("image", "video"))
CODE = {"pytorch_model.bin": b"\x80\x04.", "evil.py": b"raise SystemExit", "image/checkpoint-00000009.pt": b"x"}
TRICKS = {
    "../outside.safetensors": b"x",
    "/tmp/absolute.safetensors": b"x",
    "image\\checkpoint-00000009.safetensors": b"x",
    "image/../checkpoint-00000009.safetensors": b"x",
    "image/checkpoint-00000009.safetensors/x": b"x",
    "backbone/model.safetensors": b"x",  # of no stage's backbone
}


def fetch_tiny(revision="main"):
    return fetch(HubName(NAME, revision))


def error_of(kind, name=NAME):
    """The error message, one line."""
    with pytest.raises(kind) as raised:
        fetch(parse_name(name))
    line = one_line(raised.value)
    assert "\n" not in line
    return line


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def asked_for(hub):
    return {path.split("/resolve/")[1].split("/", 1)[1] for _, path in hub.requests if "/resolve/" in path}


def test_only_the_files_of_a_run_are_asked_for(pushed, capsys):
    pushed.repositories[NAME].change(CODE | TRICKS)
    folder = fetch_tiny()
    assert asked_for(pushed) == {"config.json", IMAGE, VIDEO}
    assert files_in(folder) == {"config.json", IMAGE, VIDEO}
    assert f"left out: {len(CODE | TRICKS)} files of" in capsys.readouterr().err
    assert {path.relative_to(pushed.cache).parts[0] for path in pushed.cache.rglob("*")} == {"models--owner--tiny"}
    for path in (IMAGE, VIDEO, "config.json"):
        assert (folder / path).read_bytes() == pushed.repositories[NAME].files[path]


def test_pull_prints_the_commit_and_the_folder(pushed, capsys):
    main(["pull", NAME])
    name, folder = capsys.readouterr().out.split()
    commit = pushed.repositories[NAME].branches["main"]
    assert name == f"hub:{NAME}@{commit}"
    assert Path(folder) == pushed.cache / "models--owner--tiny" / "snapshots" / commit
    assert str(pinned_name(Path(folder))) == name


def test_cache_is_one_of_the_client(pushed):
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    folder = fetch_tiny()
    (repository,) = scan_cache_dir(pushed.cache).repos
    (revision,) = repository.revisions
    assert revision.refs == {"main"}
    assert {file.file_name for file in revision.files} == {"config.json", Path(IMAGE).name}
    assert try_to_load_from_cache(NAME, IMAGE) == str(folder / IMAGE)


def test_complete_commit_is_used_without_a_request(pushed):
    folder = fetch_tiny()
    pushed.requests.clear()
    assert fetch_tiny(folder.name) == folder
    assert pushed.requests == []
    assert fetch_tiny() == folder
    assert pushed.requests == [("GET", f"/api/models/{NAME}/revision/main")]


def test_branch_that_moved_is_fetched_anew(pushed):
    first = fetch_tiny()
    config = json.loads(pushed.repositories[NAME].files["config.json"])
    del config["stages"]["video"]
    pushed.repositories[NAME].change({"config.json": json.dumps(config).encode(), VIDEO: None})
    second = fetch_tiny()
    assert second != first
    assert files_in(second) == {"config.json", IMAGE}
    assert fetch_tiny(first.name) == first


@pytest.mark.parametrize("fault", ["offline", "no network", "server error"])
def test_last_fetched_run_is_used_when_the_hub_is_away(fault, pushed, deaf_address, monkeypatch, capsys):
    folder = fetch_tiny()
    if fault == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    elif fault == "no network":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", deaf_address)
    else:
        pushed.fail["/api/"] = (503, {})
    capsys.readouterr()
    assert local_run(f"hub:{NAME}") == folder
    warning, name = capsys.readouterr().err.splitlines()
    assert warning.endswith("Using main as it was last downloaded")
    assert name == f"run: hub:{NAME}@{folder.name}"


@pytest.fixture
def deaf_address():
    """An address that refuses connections: its port is taken, and does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_run_that_was_never_fetched_is_named_when_the_hub_is_away(hub, deaf_address, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert error_of(OSError) == (
        f"hub:{NAME}: HF_HUB_OFFLINE forbids requests to {hub.address}, and hub:{NAME}@main is not in the cache "
        f"{hub.cache}. Check the network, or try again later. To use it offline, download it first: "
        f"python -m interpreter.hub pull hub:{NAME}@main"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", deaf_address)
    assert re.search(r"cannot be reached, or the connection broke \(.*\), and hub:.* is not in the", error_of(OSError))


def test_cut_download_goes_on_where_it_was(pushed):
    content = pushed.repositories[NAME].files[IMAGE]
    for _ in range(2):
        pushed.cut[IMAGE] = len(content) // 3
        error = error_of(OSError)
        rerun = "Rerun the same command to continue the download"
        assert error == f"hub:{NAME}: the server of the hub fails (status 503). {rerun}"
        pushed.well_again()
    folder = fetch_tiny()
    assert (folder / IMAGE).read_bytes() == content
    assert pushed.sent[IMAGE] < len(content) + 2 * CHUNK


def test_client_goes_on_by_itself_after_a_cut(pushed):
    content = pushed.repositories[NAME].files[IMAGE]
    pushed.cut[IMAGE], pushed.forgives = len(content) // 3, True
    folder = fetch_tiny()
    assert (folder / IMAGE).read_bytes() == content
    assert pushed.sent[IMAGE] < len(content) + 3 * CHUNK


@pytest.mark.parametrize("path", ["config.json", IMAGE])
def test_file_with_another_hash_never_enters_the_cache(path, pushed):
    content = pushed.repositories[NAME].files[path]
    pushed.forged[path] = content[:-1] + b"?"
    assert f"{path} was damaged on the way, or is not the file that the hub lists" in error_of(ValueError)
    blobs = list(pushed.cache.glob("models--owner--tiny/blobs/*"))
    assert not any(hashlib.sha256(blob.read_bytes()).digest() == hashlib.sha256(content).digest() for blob in blobs)
    assert not any(pushed.forged[path] == blob.read_bytes() for blob in blobs)
    pushed.well_again()
    assert (fetch_tiny() / path).read_bytes() == content


def test_damaged_file_of_the_cache_is_replaced_when_it_is_linked(pushed):
    folder = fetch_tiny()
    (folder / IMAGE).resolve().write_bytes(b"damaged")
    (folder / IMAGE).unlink()
    assert not is_complete(folder)
    assert (fetch_tiny() / IMAGE).read_bytes() == pushed.repositories[NAME].files[IMAGE]


@pytest.mark.parametrize("extra", [-7, 7])
def test_file_of_another_length_is_an_error(extra, pushed):
    content = pushed.repositories[NAME].files[IMAGE]
    pushed.forged[IMAGE] = content[:extra] if extra < 0 else content + bytes(extra)
    assert f"the hub sent {len(pushed.forged[IMAGE])} bytes of {IMAGE}, which has {len(content)}" in error_of(OSError)
    pushed.well_again()
    assert (fetch_tiny() / IMAGE).read_bytes() == content


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (
            404,
            {"X-Error-Code": "RepoNotFound"},
            "no such repository at {address}, or it is private; check the name, or",
        ),
        (
            404,
            {"X-Error-Code": "RevisionNotFound"},
            "has no branch, tag or commit main; {address}/owner/tiny/tree/main",
        ),
        (401, {}, "the hub refuses access (status 401); log in with: hf auth login"),
        (
            403,
            {"X-Error-Code": "GatedRepo"},
            "its owner has to give you access; ask for it at {address}/owner/tiny, then",
        ),
        (403, {}, "the hub refuses access (status 403); log in with: hf auth login"),
        (429, {}, "the hub accepts no more requests at the moment (status 429), and hub:owner/tiny@main is not in"),
        (500, {}, "the server of the hub fails (status 500), and hub:owner/tiny@main is not in"),
        (418, {}, "the hub refuses the request (status 418, as told)"),
    ],
)
def test_refusal_of_the_hub_is_one_line_that_says_what_to_do(status, headers, message, pushed):
    pushed.fail["/api/models"] = (status, headers)
    assert message.format(address=pushed.address) in error_of(OSError)


@pytest.mark.parametrize("status", [403, 404, 500])
def test_refusal_of_a_file_is_one_line(status, pushed):
    pushed.fail[f"/resolve/.*/{IMAGE}"] = (status, {})
    assert f"hub:{NAME}: the" in error_of(OSError)


def test_answer_that_is_not_the_hubs_is_one_line(pushed):
    pushed.broken_json = True
    assert "gave an invalid answer (" in error_of(ValueError)
    pushed.well_again()
    for claim in (
        {"size": None},
        {"lfs": {"sha256": "../x", "size": 3, "pointerSize": 1}},
        {"lfs": "none"},
        {"rfilename": 5},
    ):
        pushed.claims[IMAGE] = claim
        assert "gave an invalid answer (" in error_of(ValueError)


def changed(name, value):
    """A change of config.json at a path of keys."""

    def change(config):
        *parents, last = name.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value

    return change


def moved(name):
    return lambda config: config["stages"].update({name: config["stages"]["image"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moved("../image"), "is not a run: its config.json names a stage '../image'"),
        (moved("image-1/../../x"), "is not a run: its config.json names a stage 'image-1/../../x'"),
        (moved("image-3"), "is not a complete run: it has no checkpoint of its image-3 stage"),
        (changed("stages", {}), "is not a run: its config.json names no trained stage"),
        (changed("stages.image.data.root", "/home/me"), "the options of its image stage name folders of a computer"),
        (changed("stages.image.cache", "/home/me"), "the options of its image stage name folders of a computer"),
        (changed("stages.image.backbone.backbone", "/etc/x.pth"), "its backbone '/etc/x.pth' is not a name on the hub"),
        (changed("stages.image.backbone.backbone", "x.pth"), "its backbone 'x.pth' is not a name on the hub"),
        (changed("stages.image.backbone.backbone", "run:../x"), "its backbone 'run:../x' is not a name on the hub"),
        *(
            (changed("stages.image.backbone.backbone", name), f"backbone {name!r} is not a name on the hub, hub:OWNER")
            for name in (
                "private/vit",
                "private/vit.pth",
                "a/b@x/../../../../y",
                "a/b@v/",
                "hub:private",
                "hub:a/b@x/../../y",
                "hub:a/b@v/",
                "hub:../x",
                "hub:/etc/x.pth",
                "hub:hub:a/b",
                "hub:a/b/c",
            )
        ),
        (changed("stages.image.backbone.backbone", "run:backbone"), "it has no backbone/config.json, a file of its"),
        (changed("stages.image.unknown", 1), "is not the configuration of a run: its image stage"),
        (changed("stages.image.optim.steps", float("inf")), "is not the configuration of a run"),
        (changed("stages.image.backbone.backbone", 5), "its backbone 5 is not a name on the hub"),
        (changed("method", ["interpreter"]), "is not the configuration of a run (its method is ['interpreter'])"),
        (changed("method", "another"), "unknown method 'another'; choose from"),
        (changed("format", 3), "is not the configuration of a run (format 3; this version reads 1 and 2)"),
    ],
)
def test_configuration_that_no_run_has_is_refused(change, message, pushed):
    config = json.loads(pushed.repositories[NAME].files["config.json"])
    change(config)
    pushed.repositories[NAME].change({"config.json": json.dumps(config).encode()})
    assert message in error_of(ValueError)
    assert asked_for(pushed) <= {"config.json", IMAGE, VIDEO}
    assert message in error_of(ValueError)  # also when it comes from the cache


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 100_000, b"\xff\xfe\xff", b'{"format": 2}'])
def test_damaged_configuration_is_one_line(content, pushed):
    pushed.repositories[NAME].change({"config.json": content})
    assert "is not the configuration of a run" in error_of(ValueError) or "not a text file" in error_of(ValueError)


def test_repository_that_is_no_run_is_one_line(hub):
    hub.repositories[NAME] = Repository()
    assert error_of(ValueError).endswith("is not a run: the repository has no config.json")
    hub.repositories[NAME].change({"config.json": b" " * 1_000_001})
    assert error_of(ValueError).endswith("its config.json has 1000001 bytes, more than 1000000")
    assert asked_for(hub) == set()


@pytest.mark.parametrize(
    "name",
    ["tiny", "a/b/c", "../x", "a/..", "/etc/passwd", "a/b@", "a/b@../x", "a/b@x//y", "a--b/c", "a b/c", "a/b@x y"],
)
def test_name_that_is_none_is_refused_before_any_request(name, hub):
    assert error_of(ValueError, name) == (
        f"{name} does not name a run on the hub; write hub:OWNER/NAME or hub:OWNER/NAME@REVISION"
    )
    assert hub.requests == []


def test_private_run_needs_the_token(pushed, monkeypatch):
    pushed.repositories[NAME].private = True
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    assert "or it is private; check the name, or log in with: hf auth login" in error_of(OSError)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert is_complete(fetch_tiny())
