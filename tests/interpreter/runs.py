"""Training commands as processes, and what their runs leave behind."""

import json
import os
import re
import subprocess
import sys

STREAMED = ["--features", "streamed", "--loader", "pyav", "--workers", "2"]
# "--" keeps torchrun from reading --run as its own.
TWO_RANKS = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]


def start(arguments, launcher=()):
    """The command as a process of its own, its messages readable as they come; ``launcher`` is a module to start it."""
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "interpreter.train", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE if launcher else None,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"},
    )


def finish(process):
    """Wait for a process that has to end well; returns its messages."""
    out, text = process.communicate(timeout=300)
    assert process.returncode == 0, f"{text}{out}"
    return text


def wait_for_step(process, stage, step):
    """Read messages until the process has logged a step; returns them."""
    text = ""
    for line in process.stderr:
        text += line
        if (match := re.match(rf"{stage} step (\d+) ", line)) and int(match[1]) >= step:
            return text
    raise AssertionError(f"ended before {stage} step {step}: {text}")


def curve(run, stage):
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds_")} for line in lines]
