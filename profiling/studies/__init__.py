"""Questions that were settled once by measuring; the answers are in profiling/results and on the pages of docs."""
