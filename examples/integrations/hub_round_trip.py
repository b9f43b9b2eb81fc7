"""Push a run to a hub, pull it as another user, and compare the two segmentations byte by byte.

    python examples/integrations/hub_round_trip.py clip.mp4 RUN OUT

RUN is a trained run (make integrations trains a small one), and OUT a folder for the results. The client is the real
one. The hub is the small server of this project's tests, on this computer. If you have an account on huggingface.co,
use examples/share_a_run.py.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import interpreter

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES.parent))  # for the hub of the tests
from tests.interpreter.hub.small_hub import TOKEN, SmallHub, serving  # noqa: E402

clip, run, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
shutil.rmtree(out, ignore_errors=True)

local, shared = out / "local", out / "shared"
interpreter.segment_video(clip, run, local)
with serving(SmallHub()) as address:
    home = {"HF_ENDPOINT": address, "HF_HOME": str(out / "home"), "HF_TOKEN": TOKEN}
    home |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, EXAMPLES / "share_a_run.py", run, "owner/small", clip, shared]
    subprocess.run(list(map(str, command)), env=os.environ | home, check=True)

files = sorted(path.relative_to(local) for path in local.rglob("*") if path.is_file() and path.name != ".lock")
assert files
for file in files:
    assert (local / file).read_bytes() == (shared / file).read_bytes(), file
print(f"hub: {len(files)} files, written with the run and with its copy from the hub, are equal byte by byte")
