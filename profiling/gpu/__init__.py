"""What profiling/gpu_check.sh runs on a machine with a GPU, and what prepares it on one without."""
