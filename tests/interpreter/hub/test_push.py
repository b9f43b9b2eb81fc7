"""What is sent to the hub: weights, a configuration without paths, a model card, and nothing else."""

import dataclasses
import json
import re
import shutil
import typing
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from interpreter import evaluate
from interpreter.configs import BackboneConfig
from interpreter.engine.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from interpreter.engine.run import read_config, to_dict, weights_hash
from interpreter.hub.__main__ import main
from interpreter.hub.card import write_card
from interpreter.hub.contents import without_paths
from interpreter.hub.fetching import fetch
from interpreter.hub.names import parse_name
from interpreter.hub.packing import pack
from interpreter.methods import METHODS

from .conftest import NAME
from .small_hub import Repository

STAGES = [(method, stage) for method in METHODS.values() for stage in method.stages]


def push(run, *options):
    main(["push", str(run), NAME, *options])


def with_every_path(kind):
    """Options of a dataclass in which every option of a path has a value; the fields are recognised by their types."""
    hints, values = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            values[field.name] = with_every_path(hint)
        elif "Path" in str(hint):
            values[field.name] = Path("/home/me/secret")
    return kind(**values)


@pytest.mark.parametrize(("method", "stage"), STAGES, ids=lambda part: part.name)
def test_no_option_of_any_method_keeps_a_path(method, stage):
    options = with_every_path(stage.config)
    assert str(to_dict(options)).count("/home/me/secret") >= 3  # run, init, cache
    published = to_dict(without_paths(options, lambda backbone: BackboneConfig("run:backbone")))
    assert "secret" not in str(published)
    assert published["run"] == "."
    assert stage.config(run=Path()).optim == options.optim


def test_pushed_run_holds_weights_alone_and_no_path(hub, tiny_run, capsys):
    push(tiny_run, "--license", "mit")
    files = hub.repositories[NAME].files
    step = "checkpoint-00000003.safetensors"
    assert files.keys() == {".gitattributes", "README.md", "config.json", f"image/{step}", f"video/{step}"}
    for name, content in files.items():
        assert str(tiny_run.parent).encode() not in content, name
    config = json.loads(files["config.json"])
    assert config["stages"]["image"]["data"]["root"] is None
    assert config["stages"]["image"]["run"] == "."
    assert config["trained_on"] == read_config(tiny_run).trained_on
    out = capsys.readouterr().out
    assert re.search(rf"^{hub.address}/{NAME}/commit/([0-9a-f]{{40}})\npushed: hub:{NAME}@\1$", out, re.MULTILINE)


def test_packed_weights_are_those_of_the_run(tiny_run, tmp_path):
    packed = pack(tiny_run, tmp_path)
    for stage in ("image", "video"):
        before, after = load_checkpoint(tiny_run / stage), load_checkpoint(tmp_path / stage)
        assert after.step == before.step
        assert after.optimizer == {}
        assert before.optimizer
        assert after.weights.keys() == before.weights.keys()
        assert all(torch.equal(after.weights[name], before.weights[name]) for name in before.weights)
    with safe_open(tmp_path / "image" / "checkpoint-00000003.safetensors", "pt") as file:
        assert file.metadata() == {"step": "3"}  # several entries would be written in random order
    assert packed.steps == {"image": 3, "video": 3}


def test_second_push_of_the_same_run_makes_no_commit(pushed, tiny_run, capsys):
    before = dict(pushed.repositories[NAME].branches)
    push(tiny_run)
    assert pushed.repositories[NAME].branches == before
    assert f"nothing changed: hub:{NAME}@{before['main']}" in capsys.readouterr().out
    assert all(method == "GET" for method, _ in pushed.requests)


def test_later_push_replaces_the_runs_files_and_keeps_others(pushed, image_run):
    others = {"notes.md": b"mine", "image/notes.safetensors": b"mine too"}
    pushed.repositories[NAME].change(others)
    run = image_run()
    state = load_checkpoint(run / "image")
    state.step = 4
    save_checkpoint(run / "image", state)
    push(run)
    files = pushed.repositories[NAME].files
    sent = {path for path in files if "checkpoint" in path}
    assert sent == {"image/checkpoint-00000004.safetensors"}
    assert {path: files[path] for path in others} == others
    assert b"license: mit" in files["README.md"]  # of the existing card


@pytest.mark.parametrize("revision", ["main", "try"])
@pytest.mark.parametrize("content", [b'{"model_type": "bert"}', b"[]", b"[" * 100_000, b"\xff", b" " * 1_000_001])
def test_repository_of_something_else_is_left_alone(content, revision, hub, tiny_run):
    repository = hub.repositories[NAME] = Repository()
    repository.change({"config.json": content, "README.md": b"of a model", "model.safetensors": b"weights"})
    before = dict(repository.branches)
    with pytest.raises(ValueError, match=f"^hub:{NAME} is not a run: its config.json is not one of"):
        push(tiny_run, "--license", "mit", "--revision", revision)
    assert repository.branches == before
    repository.change({"config.json": None})
    push(tiny_run, "--license", "mit", "--revision", revision)
    assert repository.commits[repository.branches[revision]]["model.safetensors"] == b"weights"


def test_push_over_a_commit_of_another_person_is_refused(pushed, image_run, monkeypatch):
    repository = pushed.repositories[NAME]
    run = image_run()

    def pack_slowly(*arguments):
        repository.change({"other.txt": b"in between"})
        return pack(*arguments)

    monkeypatch.setattr("interpreter.hub.pushing.pack", pack_slowly)
    with pytest.raises(OSError, match=r"^hub:owner/tiny: the hub refuses the request \(status 412, A commit has"):
        push(run)
    assert repository.files["other.txt"] == b"in between"


def test_branch_is_made_and_named_in_the_card(pushed, tiny_run):
    push(tiny_run, "--revision", "try-2", "--message", "A second try")
    repository = pushed.repositories[NAME]
    assert repository.branches.keys() == {"main", "try-2"}
    card = repository.commits[repository.branches["try-2"]]["README.md"].decode()
    assert f"--run hub:{NAME}@try-2 " in card


def test_new_branch_holds_the_pushed_run_alone_and_other_files(pushed, image_run):
    repository = pushed.repositories[NAME]
    repository.change({"image/checkpoint-00002000.safetensors": b"of main", "notes.md": b"mine"})
    main_before, run = dict(repository.files), image_run()
    push(run, "--revision", "try")
    branch = repository.commits[repository.branches["try"]]
    step = checkpoints(run / "image")[-1].name
    assert branch.keys() == {".gitattributes", "README.md", "config.json", "notes.md", f"image/{step}"}
    assert repository.files == main_before
    fetched = fetch(parse_name(f"{NAME}@try"))
    assert weights_hash(load_checkpoint(fetched / "image")) == weights_hash(load_checkpoint(run / "image"))


def test_unfinished_stage_is_left_out_unless_allowed(hub, tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["stages"]["video"]["optim"]["steps"] = 10
    (run / "config.json").write_text(json.dumps(config))
    push(run, "--license", "mit")
    assert f"left out: the video stage of {run} is unfinished: step 3 of 10; add --allow-unf" in capsys.readouterr().out
    files = hub.repositories[NAME].files
    assert "image/checkpoint-00000003.safetensors" in files
    assert "video/checkpoint-00000003.safetensors" not in files
    assert json.loads(files["config.json"])["stages"].keys() == {"image"}
    push(run, "--allow-unfinished")
    files = hub.repositories[NAME].files
    assert "video/checkpoint-00000003.safetensors" in files
    assert "| video | 3 of 10 (unfinished) |" in files["README.md"].decode()


def test_stage_on_an_unfinished_one_is_refused(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["stages"]["image"]["optim"]["steps"] = 10
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the video stage of .* needs its image stage, which is not trained to"):
        pack(run, tmp_path / "packed")


def test_dry_run_writes_a_usable_run_and_asks_nothing(hub, tiny_run, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    push(tiny_run, "--license", "mit", "--dry-run")
    folder = Path(re.search(r"nothing was sent; the files that would be sent are in (.*)", capsys.readouterr().out)[1])
    assert hub.requests == []
    assert read_config(folder).stages.keys() == {"image", "video"}
    assert (folder / "README.md").read_text().startswith("---\n")
    shutil.rmtree(folder)


def test_dry_run_that_fails_leaves_nothing(hub, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "image")
    with pytest.raises(ValueError, match="needs its image stage"):
        push(run, "--license", "mit", "--dry-run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a licence for the weights, for example --license apache-2.0"),
        (["--license", "Apache 2"], "--license Apache 2 is no identifier of the hub, such as apache-2.0"),
        (["--license", "nonsense"], r'hub:owner/tiny: Invalid metadata in README.md. - "license" must be one of'),
        (["--license", "mit", "--revision", "a" * 40], "is a commit, which never changes; give a branch"),
        (["--license", "mit", "--revision", "a/../b"], "does not name a run on the hub; write hub:OWNER/NAME"),
    ],
)
def test_wrong_options_of_push_are_one_line(options, message, hub, tiny_run):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        push(tiny_run, *options)
    assert "\n" not in str(raised.value)
    assert "/commit/" not in str(hub.requests)


def test_public_repository_is_not_taken_for_a_private_one(hub, tiny_run):
    push(tiny_run, "--license", "mit", "--private")
    assert hub.repositories[NAME].private
    hub.repositories[NAME].private = False
    with pytest.raises(ValueError, match="hub:owner/tiny exists and is public; leave --private out"):
        push(tiny_run, "--private")


def test_push_without_the_right_to_write_says_so(hub, tiny_run, monkeypatch):
    hub.repositories[NAME] = Repository()
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(OSError, match=r"^hub:owner/tiny: the hub refuses access \(status 403\); log in with: hf auth"):
        push(tiny_run, "--license", "mit")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="you must be logged in to the hub; log in with: hf auth login"):
        push(tiny_run, "--license", "mit")


def test_card_has_the_scores_of_these_weights_alone(hub, tiny_run, scenes, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    data = ["--root", str(scenes), "--num-videos", "2"]
    evaluate.main(["--run", str(run), *data, "--seeds", "0", "--baselines", "one-segment"])
    scores = json.loads(next(run.glob("evaluation/*/scores.json")).read_text())
    main_row = next(row for row in scores["results"] if row["kind"] == "main")
    push(run, "--license", "mit")
    card = hub.repositories[NAME].files["README.md"].decode()
    assert f"split val, protocol interpreter version {main_row['version']}, 2 videos" in card
    assert f"| {main_row['mean']['fg_ari_video']:.3f} |" in card
    state = load_checkpoint(run / "image")
    state.weights = {name: tensor + 1 for name, tensor in state.weights.items()}
    save_checkpoint(run / "image", state)
    with pytest.raises(ValueError, match=r"the video stage of .* was trained on a different image stage than"):
        pack(run, tmp_path / "refused")
    shutil.rmtree(run / "video")
    for number, damaged in enumerate(
        ("[]", "{", '{"weights": ["image"]}', '{"weights": {"image": []}}', "[" * 100_000)
    ):
        (run / "evaluation" / f"damaged-{number}").mkdir()
        (run / "evaluation" / f"damaged-{number}" / "scores.json").write_text(damaged)
    packed = pack(run, tmp_path / "packed")
    write_card(packed, parse_name(NAME), "mit")
    assert "There are no scores of these weights" in (tmp_path / "packed" / "README.md").read_text()
    assert packed.notes == [
        f"left out: the video stage of {run} has no checkpoint yet",
        f"left out: scores in {run / 'evaluation'} that are of other weights, or from an earlier version (6); evaluate "
        "again to have scores on the card",
    ]


@pytest.mark.parametrize(("association", "stages"), [("features", ["image"]), ("learned", ["image", "video"])])
def test_scores_name_the_weights_that_were_scored(association, stages, tiny_run, scenes, tmp_path, monkeypatch):
    """Training during the evaluation writes newer checkpoints, and deletes the one that was opened."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = {key: weights_hash(load_checkpoint(run / key)) for key in stages}
    score = evaluate.score_dataset

    def score_while_training(*arguments):
        scores = score(*arguments)
        state = load_checkpoint(run / "image")
        state.step, state.weights = 4, {name: tensor + 1 for name, tensor in state.weights.items()}
        save_checkpoint(run / "image", state)
        shutil.rmtree(run / "video")
        return scores

    monkeypatch.setattr(evaluate, "score_dataset", score_while_training)
    data = ["--root", str(scenes), "--num-videos", "2", "--seeds", "0", "--baselines", "one-segment"]
    evaluate.main(["--run", str(run), *data, "--association", association])
    assert json.loads(next(run.glob("evaluation/*/scores.json")).read_text())["weights"] == before


def test_card_describes_the_run_without_its_places(pushed, tiny_run):
    card = pushed.repositories[NAME].files["README.md"].decode()
    _, header, text = card.split("---\n", 2)
    assert "license: mit\n" in header
    assert "library_name: interpreter-slots\n" in header
    assert "- interpreter\n" in header
    assert "| image | 3 | 4 | 0.0004 | 0 |" in text
    assert "generated scenes (3 videos of 24 frames), split train, frames of 64x96 (height x width)" in text
    assert "- Backbone `efficientnet-lite0`: Apache-2.0" in text
    assert "There are no scores of these weights" in text
    assert f'interpreter.segment_video("clip.mp4", run="hub:{NAME}")' in text
