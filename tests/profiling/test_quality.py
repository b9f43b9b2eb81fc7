"""The commands behind the pages of results: plans, resumed steps, joined scores, tables."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interpreter.evaluation.options import Evaluation
from interpreter.method_options import parse_with_settings
from interpreter.train import parse_stage
from profiling.common.paths import RESULTS, ROOT
from profiling.quality import plans, steps, tables
from profiling.quality.__main__ import main, write_pages
from profiling.quality.join import costs, joined, scores
from profiling.quality.page import DAVIS, PAGES, SCENES, SMTC, SOLV, blocks, with_tables
from profiling.quality.smtc import smtc_scenes
from profiling.quality.solv import solv_ablation
from profiling.quality.steps import Command, Step, forget
from profiling.quality.strips import Strips, draw

REMEDY = "run `python -m profiling.quality page`, look at the difference and commit it"


def evaluation(method, protocol, values, *, edges="none", kind="main", version=1, seeds=(0,), videos=()):
    """A row of scores.json with a value for each seed; metrics are the keys of ``values``."""
    per_seed = [dict(zip(values, of_seed, strict=True)) for of_seed in zip(*values.values(), strict=True)]
    part = {"protocol": protocol, "version": version, "method": method, "kind": kind, "edges": edges}
    part |= {"seeds": list(seeds), "per_seed": per_seed, "mean": per_seed[0]}
    entries = [{"protocol": protocol, "method": method, "seed": seeds[0], "videos": dict(videos)}] if videos else []
    return part, entries


def report(*parts):
    """The scores.json of an evaluation."""
    about = {
        "data": "davis-2016",
        "split": "val",
        "commit": "abc",
        "date": "2026-11-26",
        "frames": {"dog": 5, "cat": 6},
    }
    skipped = [{"name": "/data/owl", "reason": "/data/owl: damaged"}]
    entries = [entry for _, more in parts for entry in more]
    return {**about, "skipped": skipped, "results": [part for part, _ in parts], "videos": entries}


def step(folder, kind="evaluate", *, method="Interpreter", seed=0, needs=(), table="davis-2016", command=("module",)):
    size = (336, 504) if kind != "train" else None
    title = "image" if kind == "train" else "evaluation"
    return Step(kind, method, seed, folder, (Command(title, command),), needs, table if size else "", size)


@pytest.fixture
def commands(monkeypatch):
    """Stands for the commands: records which were run, and fails those that contain "fails"."""
    run = []

    class Process:
        def __init__(self, words):
            run.append(words[2:])
            self.returncode = 1 if "fails" in words else 0

        def wait(self, timeout=None):
            return self.returncode

    monkeypatch.setattr(steps, "Popen", Process)
    return run


def plan(name):
    if name == "solv-ablation":
        return list(solv_ablation(Path("out")))
    if name == "smtc":
        return list(smtc_scenes(Path("out")))
    made = plans.scenes(Path("out")) if name == "scenes" else plans.davis(Path("out"), Path("DAVIS"), "vit.safetensors")
    return list(made)


@pytest.mark.parametrize("name", ["scenes", "davis", "solv-ablation", "smtc"])
def test_commands_of_a_plan_have_options_that_exist(name):
    every = plan(name)
    assert len({step.folder for step in every}) == len(every)
    for one in (step for step in every if step.seed == 0):
        for module, *arguments in (command.arguments for command in one.commands):
            if module == "interpreter.train":
                assert parse_stage(arguments)[2].optim.seed == one.seed
            else:
                options = {"interpreter.evaluate": Evaluation, "profiling.quality.strips": Strips}[module]
                # The run does not exist, so that its method has to be named.
                name = {title: method for method, title in plans.TITLES.items()}[one.method.split(",")[0]]
                named = [] if "--method" in arguments else ["--method", name]
                config: Any = parse_with_settings(options, [*arguments, *named], module)[1]
                assert (config.out, config.frame_size) == (one.folder, one.size)


@pytest.mark.parametrize("name", ["scenes", "davis", "solv-ablation", "smtc"])
def test_steps_need_only_earlier_steps(name):
    every = plan(name)
    for index, one in enumerate(every):
        assert all(needed in every[:index] for needed in one.needs)
        assert (one.kind == "train") == (not one.needs) or "cluster" in one.folder.name


def test_stages_on_scenes_are_those_of_the_demo():
    demo = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for stage, options in (("image", plans.DEMO_IMAGE), ("video", plans.DEMO_VIDEO)):
        assert f"interpreter.train --stage {stage} --run demo/scenes {' '.join(options)}\n" in demo


def test_what_is_done_is_not_run_again(tmp_path, commands):
    train = step(tmp_path / "run", "train", command=("train",))
    one = step(tmp_path / "scores", needs=(train,), command=("evaluate", "a"))
    for each in (train, one):
        assert not each.done
        each.run()
        assert each.done
    other = step(tmp_path / "scores", needs=(train,), command=("evaluate", "b"))
    assert not other.done
    forget([train], ["evaluate"])
    assert train.done
    forget([train], ["train"])
    assert not train.done
    train.run()
    assert not one.done  # it was of other weights
    assert commands == [["train"], ["evaluate", "a"], ["train"]]


def test_interrupted_step_resumes_at_its_command_and_time_adds_up(tmp_path, commands):
    both = Step("train", "x", 0, tmp_path / "run", (Command("image", ("a",)), Command("video", ("fails",))))
    with pytest.raises(SystemExit, match="exit status 1: python -m fails"):
        both.run()
    (tmp_path / "run" / "checkpoint").touch()
    record = both.read()
    record["commands"][1]["seconds"] = 100.0
    (tmp_path / "run" / steps.RECORD).write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        both.run()
    assert (tmp_path / "run" / "checkpoint").exists()
    assert commands == [["a"], ["fails"], ["fails"]]
    assert both.read()["commands"][1]["seconds"] >= 100.0
    assert not both.done


def test_other_commands_start_from_nothing_but_only_in_a_folder_of_their_own(tmp_path, commands):
    step(tmp_path / "run", command=("a",)).run()
    (tmp_path / "run" / "checkpoint").touch()
    step(tmp_path / "run", command=("b",)).run()
    assert not (tmp_path / "run" / "checkpoint").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit, match="mine exists, but this command did not write it"):
        step(tmp_path / "mine").run()


def test_a_command_is_recorded_without_its_paths(tmp_path):
    command = Command("x", ("interpreter.train", "--root", str(tmp_path / "DAVIS"), "--run", "runs/a"))
    assert command.portable == "python -m interpreter.train --root DAVIS --run runs/a"


def test_seeds_of_one_version_are_joined():
    first = report(evaluation("video stage", "davis-2016", {"j": [0.25]}, videos={"dog": {"j": [0.5, None]}}.items()))
    second = report(evaluation("video stage", "davis-2016", {"j": [0.5]}, seeds=[1]))
    (row,) = scores([(step(Path("a")), first), (step(Path("b"), seed=1), second)])
    assert (row["method"], row["edges"], row["kind"]) == ("Interpreter", "none", "main")
    assert (row["protocol"], row["version"], row["seeds"]) == ("davis-2016", 1, [0, 1])
    assert (row["values"], row["videos"]) == ({"j": [0.25, 0.5]}, {"dog": [0.5]})


def test_baselines_keep_their_names_and_what_is_not_random_counts_once():
    parts = [
        evaluation("k-means 8, guided edges", "davis-2016", {"j": [0.25]}, kind="baseline", edges="guided"),
        evaluation("one segment", "davis-2016", {"j": [0.125]}, kind="blind", seeds=[None]),
        evaluation("merge 0.1", "davis-2016", {"j": [0.25]}, kind="sweep"),
    ]
    rows = scores([(step(Path("a")), report(*parts)), (step(Path("b")), report(parts[1]))])
    names = [(row["method"], row["edges"], row["values"]["j"]) for row in rows]
    assert names == [("k-means 8", "guided", [0.25]), ("one segment", "none", [0.125])]


def test_scores_of_different_protocol_versions_do_not_join():
    old, new = (report(evaluation("x", "interpreter", {"j": [0.5]}, version=v)) for v in (1, 2))
    with pytest.raises(SystemExit, match=r"versions \[1, 2\] of protocol interpreter"):
        scores([(step(Path("a")), old), (step(Path("b")), new)])


def results_of(folder):
    """Results of two seeds with one baseline and one training."""
    made = []
    for seed in (0, 1):
        train = step(folder / f"run-{seed}", "train", seed=seed)
        one = step(folder / f"scores-{seed}", needs=(train,), seed=seed)
        for each in (train, one):
            each.run()
        parts = []
        for edges in ("guided", "none"):
            suffix = ", guided edges" if edges == "guided" else ""
            for method, kind, j in (("video stage", "main", 0.5), ("k-means 8", "baseline", 0.25)):
                values, j = {"edges": edges, "kind": kind, "seeds": [seed]}, j + seed / 4
                videos = {"dog": {"j": [j]}, "cat": {"j": [j / 2]}}.items()
                foreground = {"fg_ari_frame": [None], "identity_switches": [2.0]}
                parts.append(
                    evaluation(
                        method + suffix, "davis-2016", {"j": [j], "f": [0.5], "jf": [0.25]}, videos=videos, **values
                    )
                )
                parts.append(evaluation(method + suffix, "interpreter", foreground, version=2, **values))
        (one.folder / "scores.json").write_text(json.dumps(report(*parts)))
        made += [train, one]
    return joined("scores", "python -m profiling.quality davis", made)


def test_tables_show_mean_and_deviation_with_edges_of_a_method_together(tmp_path, commands):
    results = results_of(tmp_path)
    lines = tables.scores(results, "davis-2016")
    assert lines[0] == "Frames of 336×504:"
    assert lines[2] == "| method | edges | J | F | J&F | FG-ARI frame | ID switches |"
    rest = "0.500 ± 0.000 | 0.250 ± 0.000 | – | 2.00 ± 0.00 |"
    assert lines[4:8] == [
        f"| {method} | {edges} | {j} ± 0.177 | {rest}"
        for method, j in (("Interpreter", "0.625"), ("k-means 8", "0.375"))
        for edges in ("none", "guided")
    ]
    about = " ".join(lines[-2:])
    assert about == (
        "2 videos, 11 frames of split `val`, without owl, which could not be scored; seeds 0, 1; "
        "protocols `davis-2016` (version 1), `interpreter` (version 2); commit abc, 2026-11-26."
    )
    assert tables.scores(results, "davis-2017") == [tables.NOT_RUN]

    of_videos = tables.sequences(results)
    assert of_videos[0] == "| sequence | Interpreter, 336×504 | k-means 8, 336×504 |"
    assert of_videos[2] == "| cat | 0.31 ± 0.09 | 0.19 ± 0.09 |"


def test_rows_of_fewer_seeds_say_so(tmp_path, commands):
    results = results_of(tmp_path)
    for row in results["scores"]:
        if row["kind"] == "baseline":
            row["seeds"] = row["seeds"][:1]
            row["values"] = {name: values[:1] for name, values in row["values"].items()}
    assert "| k-means 8 (1 of 2 seeds) | none | 0.250 |" in "\n".join(tables.scores(results, "davis-2016"))


def test_costs_are_minutes_of_commands_and_milliseconds_of_frames(tmp_path, commands):
    results = results_of(tmp_path)
    for row, seconds in zip(results["costs"], ([60.0, 90.0], [6.0, 6.0]), strict=True):
        row["seconds"], row["cpu_seconds"] = seconds, [2 * s for s in seconds]
    parts = {"encode": 2.0, "segment": 0.1, "none": 0.2, "guided": 1.0}
    timed = {"method": "Interpreter", "size": [336, 504], "first_video_size": [480, 854], "frames": 10}
    results["segmenting"] = [{**timed, "load_average": 1.5, "seconds": parts}]
    text = "\n".join(tables.costs({"davis.json": results}))
    assert "## DAVIS\n\n" in text
    assert "Data: [davis.json](../../profiling/results/davis.json)." in text.replace("\n", " ")
    assert "| Interpreter | training, image stage | 2.0, 3.0 | 1.0, 1.5 |" in text
    assert "| Interpreter | evaluation on davis-2016 at 336×504 | 0.2, 0.2 | 0.1, 0.1 |" in text
    assert "| Interpreter | 336×504 | 480×854 | 10 | 200 | 10 | 20 | 100 | 1.5 |" in text
    assert costs([]) == []


def test_pages_agree_with_the_results():
    assert write_pages(check=True) == [], REMEDY


def test_a_changed_number_makes_a_page_stale(tmp_path, commands):
    (tmp_path / "docs/results").mkdir(parents=True)
    for page in PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    folder = tmp_path / "results"
    folder.mkdir()
    results = json.dumps(results_of(tmp_path))
    (folder / DAVIS).write_text(results)
    assert write_pages(False, tmp_path, folder) == list(PAGES)
    assert write_pages(True, tmp_path, folder) == []
    assert "| cat | 0.31 ± 0.09 |" in (tmp_path / "docs/results/davis_2016.md").read_text()
    text = (tmp_path / "docs/results/scenes.md").read_text()
    assert re.search(r"<!-- table scenes -->\n\n\*Not run yet\.\*\n\n<!-- end -->", text)
    (folder / DAVIS).write_text(results.replace('"f": [0.5', '"f": [0.6'))
    assert write_pages(True, tmp_path, folder) == ["docs/results/davis_2016.md"]


def test_every_table_has_its_place_on_a_page(tmp_path, commands):
    tables_of_pages = [table for of_page in PAGES.values() for table in of_page]
    assert sorted(tables_of_pages) == sorted(blocks(tmp_path, tmp_path))
    page = "docs/results/scenes_video_methods.md"
    with pytest.raises(ValueError, match=r"has the tables \('scenes',\), expected \('scenes-clips', 'solv-ablation'\)"):
        with_tables(page, "<!-- table scenes -->\n<!-- end -->", tmp_path, tmp_path)


def test_all_methods_on_scenes_share_data_and_write_folders_of_their_own():
    of_plans = [plan(name) for name in ("scenes", "solv-ablation", "smtc")]
    folders = [one.folder for steps_of_plan in of_plans for one in steps_of_plan]
    assert len(set(folders)) == len(folders)
    for one in (one for steps_of_plan in of_plans for one in steps_of_plan if one.kind == "evaluate"):
        arguments = one.commands[0].arguments
        assert arguments[arguments.index("--root") + 1] == "out/data"


def test_dry_run_lists_commands_and_runs_nothing(tmp_path, commands, capsys):
    main(["scenes", "--dry-run", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[to do] python -m interpreter.train --method interpreter --stage image --run")
    assert len(lines) == sum(len(one.commands) for one in plan("scenes"))
    assert commands == []
    assert not (tmp_path / "out").exists()


def test_results_of_the_page_hold_no_absolute_path():
    for name in (SCENES, DAVIS, SOLV, SMTC):
        path = RESULTS / name
        assert not path.exists() or not re.search(r'[" ]/\w+/', path.read_text()), path


def test_strip_shows_frames_segments_and_truth():
    class Black:
        height, width = 60, 80

        def read(self, indices, size):
            return np.zeros((len(indices), *size, 3), np.uint8)

    video: Any = Black()
    labels, truth = np.zeros((9, 60, 80), np.uint8), np.ones((9, 60, 80), np.uint8)
    alone, with_truth = (draw(video, labels, true, np.arange(9)) for true in (None, truth))
    assert alone.shape[1] == with_truth.shape[1] == 1000
    assert with_truth.shape[0] > 1.4 * alone.shape[0]
