"""Training commands as processes, and the files of their runs."""

import json
import os
import re
import subprocess
import sys

STREAMED = ["--features", "streamed", "--loader", "pyav", "--workers", "2"]
# "--" because torchrun would read --run as its own option.
TWO_RANKS = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]


def start(arguments, launcher=()):
    """Start the command as a process whose messages can be read; ``launcher`` is a module that starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "interpreter.train", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE if launcher else None,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"},
    )


def finish(process):
    """Wait for a process, which must succeed; returns its messages."""
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
