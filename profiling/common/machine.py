"""Describes the machine for the record: device, versions, commit and command; and saves results."""

import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from profiling.common.revision import revision


def _module(script: Path) -> str:
    """The name by which ``python -m`` finds a file of the folder profiling."""
    parts = script.with_suffix("").parts
    names = parts[max((place for place, name in enumerate(parts) if name == "profiling"), default=len(parts) - 1) :]
    return ".".join(name for name in names if name != "__main__")


def machine(device: str) -> dict[str, Any]:
    """Device, versions, commit, command and date, which every file of results begins with."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return "unknown"

    versions: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    if device == "cuda":
        name = torch.cuda.get_device_name()
        versions["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        model = models[0].split(":")[1].strip() if models else platform.processor()
        name = f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "versions": versions,
        "commit": revision(),
        "command": " ".join(["python -m", _module(Path(sys.argv[0])), *sys.argv[1:]]).replace(f"{Path.cwd()}/", ""),
        "date": date.today().isoformat(),
    }


def save(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)
