"""Print, as JSON, the device, its versions, and the rates of copies and matrix products that it reaches.

python -m profiling.gpu.device
python -m profiling.gpu.device --device cpu
"""

import argparse
import json

import torch

from profiling.common.machine import machine
from profiling.common.timing import limits


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    description = machine(device)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        description |= {"processors": properties.multi_processor_count, "memory_gib": properties.total_memory / 2**30}
        description["l2_mib"] = properties.L2_cache_size / 2**20
    description["limits"] = {}
    for name in ("bfloat16", "float32"):
        description["limits"][name] = limits(device, getattr(torch, name), seconds=1.5)
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        description["limits"]["float32 in tf32"] = limits(device, torch.float32, seconds=1)
    print(json.dumps(description, indent=1))


if __name__ == "__main__":
    main()
