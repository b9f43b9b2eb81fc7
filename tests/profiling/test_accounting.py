"""Launches, bytes and waits of a training step are those pinned in profiling/results/accounting.json."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")

from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.models.transformer import TransformerDecoder
from profiling.accounting import smtc, solv
from profiling.accounting.__main__ import PINNED
from profiling.accounting.counts import Counts, HostWaits, count, count_compiled, differences, without_data
from profiling.common.setups import random_backbone, setup

UPDATE = "run `python -m profiling.accounting --update`, look at the difference and commit it"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pinned():
    recording = json.loads(PINNED.read_text())
    if recording["torch"] != torch.__version__:
        pytest.skip(f"{PINNED.name} was made with torch {recording['torch']}")
    return {**recording["stages"], "solv": recording["solv"], "smtc": recording["smtc"]}


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
    counts = json.loads(json.dumps(count(setup(stage, "ytvis19", CPU).task)))
    assert not differences(expected, counts), UPDATE


def test_no_fused_attention_of_a_video_step_has_a_mask(monkeypatch):
    """Flash attention takes none, and with one PyTorch falls back to a slower kernel."""
    masks, fused = [], F.scaled_dot_product_attention

    def noting(q, k, v, attn_mask):
        masks.append(attn_mask)
        return fused(q, k, v, attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    stage_setup = setup("video", "davis", CPU, batch_size=2)
    count(stage_setup.task)
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


def test_indexing_with_numbers_does_not_wait():
    assert counted(lambda x: x[torch.tensor([2, 0])], torch.ones(3))[1] == []


def test_a_wait_in_a_step_is_reported_with_its_line(monkeypatch):
    stage_setup = setup("image", "davis", CPU, batch_size=2)
    error = ImageStage.error

    def waiting(*arguments):
        value = error(*arguments)
        return value * float(value.sum() >= 0)

    monkeypatch.setattr(ImageStage, "error", waiting)
    waits = count(stage_setup.task)["host waits"]
    assert len(waits) == 2  # float(), and what it asks for
    assert waits[0].startswith("Tensor.__float__ at tests/profiling/test_accounting.py:")


def test_own_ops_are_counted_by_what_they_launch():
    counts = count(setup("video", "davis", CPU, batch_size=2).task)
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


def test_where_a_step_of_solv_goes_is_as_pinned_and_it_never_waits(pinned):
    predicted = json.loads(json.dumps(solv.predicted()))
    assert not differences(pinned["solv"], predicted), UPDATE
    assert predicted["host waits"] == []
    for of in ("share", "share on cached features"):
        assert sum(row[of] for row in predicted["parts"].values()) == pytest.approx(1, abs=1e-3)
    assert min(row["launches"] for row in predicted["parts"].values()) > 0


@pytest.fixture(scope="module")
def small_solv():
    preset = solv.PRESETS["ytvis19"]
    return replace(preset, optim=replace(preset.optim, batch_size=2))


@pytest.mark.parametrize("name", [solv.INPUT, solv.BINDING, solv.TEMPORAL, solv.DECODER])
def test_operations_of_solv_are_those_that_pytorch_counts(name, small_solv):
    with FakeTensorMode(allow_non_fake_inputs=True):
        piece = solv.pieces(without_data(solv.model_of(small_solv)), small_solv)[name]
        with FlopCounterMode(display=False) as counter:  # does not see the project's own ops
            piece.both_ways()
    products = [part.flops for part in solv.parts(small_solv, 0) if part.name == name and not part.single]
    assert sum(products) == pytest.approx(counter.get_total_flops(), rel=3e-3)


def test_operations_of_a_vit_with_dropped_patches_are_those_that_pytorch_counts(small_solv):
    config = replace(
        small_solv,
        data=replace(small_solv.data, frame_size=(56, 84)),
        backbone=replace(small_solv.backbone, backbone="facebook/dinov2-small"),
    )
    backbone, kept = random_backbone(config.backbone, CPU), torch.arange(12).expand(10, 12)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.features(torch.zeros(10, 56, 84, 3, dtype=torch.uint8), kept)
    flops = sum(part.flops for part in solv.parts(config, 0) if part.name == solv.KEPT)
    assert flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_where_a_step_of_smtc_goes_is_as_pinned_and_it_never_waits(pinned):
    predicted = json.loads(json.dumps(smtc.predicted()))
    assert not differences(pinned["smtc"], predicted), UPDATE
    assert predicted["host waits"] == []
    for of in ("share", "share from features on"):
        assert sum(row[of] for row in predicted["parts"].values()) == pytest.approx(1, abs=1e-3)
    assert min(row["launches"] for row in predicted["parts"].values()) > 0


@pytest.fixture(scope="module")
def small_smtc():
    preset = smtc.PRESETS[smtc.PRESET]
    config = replace(preset, optim=replace(preset.optim, batch_size=2))
    return smtc.model_of(config), config


@pytest.mark.parametrize("name", [smtc.STUDENT, smtc.TEACHER, smtc.CORRELATION, smtc.SLOTS, smtc.LOSSES])
def test_operations_of_smtc_are_those_that_pytorch_counts(name, small_smtc):
    model, config = small_smtc
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        pieces = smtc.pieces(without_data(model), config)
        counted = {}
        for piece in ("groups", smtc.CORRELATION) if name == smtc.SLOTS else (name,):
            with FlopCounterMode(display=False) as counter:  # does not see the project's own ops
                pieces[piece]()
            counted[piece] = counter.get_total_flops()
    flops = counted[name] if name in counted else counted["groups"] - counted[smtc.CORRELATION]
    attention = sum(part.flops for part in smtc._attention(smtc.Sizes.of(config), config.model.iterations))
    products = sum(part.flops for part in smtc.parts(config, 0) if part.name == name and not part.single)
    assert products - (attention if name == smtc.SLOTS else 0) == pytest.approx(flops, rel=4e-3)
