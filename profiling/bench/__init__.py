"""One benchmark per op and per training step; ``python -m profiling.bench --help``."""

import importlib

from profiling.bench.case import Benchmark

# Name of each benchmark, and the file of this folder that holds it under that name in capitals. A file is imported
# only when its benchmark runs, because an older revision may not have what it needs.
BENCHMARKS = {
    "slot_attention": "slot_attention",
    "inverted_attention": "slot_attention",
    "recurrent_slot_attention": "recurrent_slot_attention",
    "slot_contrast_attention": "slot_contrast",
    "two_stage_slot_attention": "two_stage_slot_attention",
    "invariant_slot_attention": "invariant_slot_attention",
    "slot_update": "slot_update",
    "sinkhorn_divergence": "sinkhorn",
    "sinkhorn_streaming": "sinkhorn",
    "sinkhorn_plan": "plan",
    "propagate_labels": "propagation",
    "propagate_attention": "propagation",
    "guided_labels": "guided_labels",
    "transport_targets": "transport_targets",
    "mix_slots": "decoder",
    "broadcast_decoder": "decoder",
    "transformer_decoder": "transformer_decoder",
    "correlation": "correlation",
    "solv_binding": "solv",
    "solv_step": "solv",
    "smtc_step": "smtc",
    "cluster_slots": "merging",
    "merge_slots": "merging",
    "match_slots": "match_slots",
    "train_image": "training",
    "train_video": "training",
}


def load(name: str) -> Benchmark:
    """The benchmark of that name."""
    return getattr(importlib.import_module(f"profiling.bench.{BENCHMARKS[name]}"), name.upper())
