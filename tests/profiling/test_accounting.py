"""Launches, bytes and waits of a training step are those pinned in profiling/results/accounting.json."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")

from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.models.transformer import TransformerDecoder
from profiling.accounting.__main__ import PINNED
from profiling.accounting.counts import Counts, HostWaits, count, count_compiled, differences
from profiling.common.setups import setup

UPDATE = "run `python -m profiling.accounting --update`, look at the difference and commit it"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pinned():
    recording = json.loads(PINNED.read_text())
    if recording["torch"] != torch.__version__:
        pytest.skip(f"{PINNED.name} was made with torch {recording['torch']}")
    return recording["stages"]


def counted(function, *tensors):
    waits = HostWaits()
    counts = Counts(waits)
    with waits, counts:
        function(*tensors)
    return counts, waits.waits


@pytest.mark.parametrize("stage", ["image", "video"])
def test_a_step_is_as_pinned_and_never_waits_for_the_device(stage, pinned):
    expected = {name: value for name, value in pinned[stage].items() if name != "compiled on a CPU"}
    assert expected["host waits"] == []
    counts = json.loads(json.dumps(count(setup(stage, "ytvis19", CPU))))
    assert not differences(expected, counts), UPDATE


def test_no_fused_attention_of_a_video_step_has_a_mask(monkeypatch):
    """Flash attention takes none, and with one PyTorch falls back to a slower kernel."""
    masks, fused = [], F.scaled_dot_product_attention

    def noting(q, k, v, attn_mask):
        masks.append(attn_mask)
        return fused(q, k, v, attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    stage_setup = setup("video", "davis", CPU, batch_size=2)
    count(stage_setup)
    model = stage_setup.task.model
    assert isinstance(model, VideoStage)
    assert isinstance(model.decoder, TransformerDecoder)
    layers = len(model.encoder.blocks) + len(model.decoder.blocks)
    assert masks == [None] * 2 * layers  # the self-attention of each layer, in two steps


# Of the list in the documentation of torch.use_deterministic_algorithms, as operators.
NEVER_DETERMINISTIC = re.compile(
    r"aten::(.*pool.*|max_unpool.*|upsample_.*_backward|reflection_pad.*_backward|nll_loss.*|_?ctc_loss.*|"
    r"_embedding_bag.*|put_|histc|bincount|(nan)?median|kthvalue|grid_sampler.*_backward|cumsum|scatter_reduce.*|resize_)"
)


@pytest.mark.parametrize("stage", ["image", "video"])
def test_every_operator_of_a_step_has_a_deterministic_kernel(stage, pinned):
    """Training uses deterministic operators, and PyTorch raises where there is none."""
    assert NEVER_DETERMINISTIC.fullmatch("aten::cumsum")
    assert [name for name in pinned[stage]["calls of"] if NEVER_DETERMINISTIC.fullmatch(name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["image", "video"])
def test_a_compiled_step_is_as_pinned(stage, pinned):
    expected = pinned[stage]["compiled on a CPU"]
    assert (expected["graphs"], expected["graph breaks"], expected["recompilations"]) == (1, 0, 0)
    assert not differences(expected, count_compiled(stage)), UPDATE


def test_operators_count_with_their_bytes_and_views_do_not():
    x, y = torch.ones(10, 4), torch.ones(10, 4)
    counts, waits = counted(lambda: (x.t()[1:].unsqueeze(0), torch.empty(7), x + y, x.add_(y), x.fill_(0)))
    assert counts.operators == {"aten::add": 1, "aten::add_": 1, "aten::fill_": 1}
    assert counts.bytes == {"aten::add": 3 * 160, "aten::add_": 3 * 160, "aten::fill_": 2 * 160}
    assert waits == []


def test_an_expanded_tensor_counts_once():
    row = torch.ones(1, 4)
    assert counted(lambda: row.expand(10, 4) * 2)[0].bytes == {"aten::mul": 16 + 160}


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda x: x.sum().item(), "Tensor.item"),
        (lambda x: float(x.sum()), "Tensor.__float__"),
        (lambda x: bool(x.any()), "Tensor.__bool__"),
        (lambda x: x.tolist(), "Tensor.tolist"),
        (lambda x: x.cpu(), "Tensor.cpu"),
        (lambda x: x.numpy(), "Tensor.numpy"),
        (lambda x: x.to("cpu"), "Tensor.to('cpu')"),
        (lambda x: x.nonzero(), "aten::nonzero"),
        (lambda x: torch.equal(x, x), "aten::equal"),
        (lambda x: x[x > 0], "aten::index"),
        (lambda x: x.masked_select(x > 0), "aten::masked_select"),
        (lambda x: x.unique(), "aten::_unique2"),
    ],
)
def test_waits_of_the_host_are_found(call, what):
    assert [line.split(" at ")[0] for line in counted(call, torch.ones(3))[1]][:1] == [what]


def test_a_wait_in_a_step_is_reported_with_its_line(monkeypatch):
    stage_setup = setup("image", "davis", CPU, batch_size=2)
    error = ImageStage.error

    def waiting(*arguments):
        value = error(*arguments)
        return value * float(value.sum() >= 0)

    monkeypatch.setattr(ImageStage, "error", waiting)
    waits = count(stage_setup)["host waits"]
    assert len(waits) == 2  # float(), and what it asks for
    assert waits[0].startswith("Tensor.__float__ at tests/profiling/test_accounting.py:")


def test_own_ops_are_counted_by_what_they_launch():
    counts = count(setup("video", "davis", CPU, batch_size=2))
    own = counts["own launches"]
    assert own["slotkernels::cluster_slots (csrc)"] == 1
    assert own["sinkhorn_kernel"] == 1
    assert own["forward_kernel"] == 3  # slot-attention iterations
    assert own["backward_kernel"] == 1  # only the last one carries gradients
    assert not any("slotkernels" in name for name in counts["calls of"])


def test_a_difference_names_its_place():
    old = {"image": {"operators": 3, "own": {"a": 1}}}
    assert differences(old, {"image": {"operators": 3, "own": {"a": 1}}}) == []
    new = {"image": {"operators": 4, "own": {"a": 1, "b": 2}}}
    assert differences(old, new) == ["image: operators: was 3, now 4", "image: own: b: was None, now 2"]
