"""Where the repository and the recorded figures are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "profiling" / "results"
PREDICTIONS = ROOT / "profiling" / "gpu" / "predictions.json"  # of figures on a GPU, written before the first run
