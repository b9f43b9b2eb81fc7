"""Train with Weights & Biases and MLflow, offline, and compare their records, also after a kill -9 and a resume.

    python examples/integrations/wandb_and_mlflow.py CLIP RUN OUT

Trains a small model on CLIP in OUT/run with --log-to wandb mlflow (RUN is not used). Both trackers must contain exactly
the records of OUT/run/image/metrics.jsonl, and the picture grids.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
from mlflow.tracking import MlflowClient

TINY = (
    "--log-to wandb mlflow --frame-size 64 96 --dim 16 --num-slots 4 --heads 2 --decoder-layers 1 --batch-size 4 "
    "--steps 400 --warmup-steps 2 --log-every 5 --checkpoint-every 50 --sample-every 100 --precision fp32"
)
OPTIONS = TINY.split()


def train(clip: str, run: Path, stop: signal.Signals | None = None) -> None:
    """Run the command. Send the signal as soon as 25 steps are logged that are in no checkpoint."""
    command = [sys.executable, "-m", "interpreter.train", "--run", str(run), "--data", "folder", "--root", clip]
    before = last_step(run)
    process = subprocess.Popen([*command, *OPTIONS], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while stop and process.poll() is None:
        if last_step(run) > max(before, 50) and last_step(run) - newest_checkpoint(run) >= 25:
            process.send_signal(stop)
            break
        time.sleep(0.005)
    errors = process.communicate()[1]
    expected = {None: 0, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGKILL: -signal.SIGKILL}[stop]
    assert process.returncode == expected, f"exit status {process.returncode}, expected {expected}:\n{errors}"


def records(run: Path) -> dict[int, dict[str, float]]:
    """The records of metrics.jsonl by step."""
    path = run / "image" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {r["step"]: {name: v for name, v in r.items() if name not in ("stage", "step")} for r in found}


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl."""
    return max(records(run), default=0)


def newest_checkpoint(run: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.stem.partition("-")[2]) for path in (run / "image").glob("checkpoint-*")), default=0)


def from_mlflow(run: Path) -> tuple[str, dict[int, dict[str, float]], set[int]]:
    """The id of the only MLflow run, its records by step, and the steps of its pictures."""
    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(run.name)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params["optim.peak_lr"] == "0.0004"
    assert found.data.tags["stage"] == "image"
    history: dict[int, dict[str, float]] = {}
    for name in found.data.metrics:
        for metric in client.get_metric_history(found.info.run_id, name):
            assert name not in history.setdefault(metric.step, {}), f"{name} of step {metric.step} is there twice"
            history[metric.step][name] = metric.value
    images = [Path(file.path).name for file in client.list_artifacts(found.info.run_id, "images")]
    return found.info.run_id, history, {int(name.split("+")[2]) for name in images}


def from_wandb(run: Path) -> tuple[dict[int, dict[str, float]], set[int]]:
    """Records by step, and the steps of the pictures, of the only W&B run."""
    (folder,) = (run / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    (header,) = [entry["run"] for entry in found if entry["type"] == "run"]
    assert header["run_group"] == run.name
    assert header["config"]["update"]["optim.peak_lr"] == 4e-4
    history: dict[int, dict[str, float]] = {}
    pictures = set()
    for item in (entry["history"]["item"] for entry in found if entry["type"] == "history"):
        assert item["_step"] not in history, f"step {item['_step']} is there twice"
        values = {name: value for name, value in item.items() if not name.startswith(("_", "masks."))}
        history[item["_step"]] = values
        if "masks.path" in item:
            assert (folder / "files" / item["masks.path"]).is_file()
            pictures.add(item["_step"])
    return {step: values for step, values in history.items() if values}, pictures


def main(clip: str, out: Path) -> None:
    """Train in three processes. Compare after each process that closed its trackers."""
    run = out.resolve() / "run"
    shutil.rmtree(run, ignore_errors=True)
    train(clip, run, signal.SIGKILL)
    killed, history, _ = from_mlflow(run)
    assert max(history) > newest_checkpoint(run), "the killed process logged nothing after its checkpoint"
    train(clip, run, signal.SIGTERM)
    stopped, history, _ = from_mlflow(run)
    assert stopped != killed, "a killed run has steps that are not in its checkpoint, so another run replaces it"
    assert history == records(run) == from_wandb(run)[0]
    train(clip, run)
    finished, history, pictures = from_mlflow(run)
    assert finished == stopped, "a run that was stopped by a signal is continued"
    held, drawn = from_wandb(run)
    assert history == records(run), "MLflow differs from metrics.jsonl"
    assert held == records(run), "W&B differs from metrics.jsonl"
    assert list(history) == list(range(5, 401, 5)), list(history)
    assert pictures == drawn == {0, 100, 200, 300, 400}
    print(
        f"wandb and mlflow hold the {len(history)} records and {len(pictures)} pictures of {run}, after kill and resume"
    )


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/integrations/wandb_and_mlflow.py CLIP RUN OUT")
    main(sys.argv[1], Path(sys.argv[3]))
