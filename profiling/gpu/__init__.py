"""The parts of profiling/gpu_check.sh that run on a GPU, and their preparation on a machine without one."""
