"""The broadcast decoder, compared with its definition: every slot is decoded at every patch."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from interpreter.engine.memory import LivingStorages
from interpreter.models import decoders
from interpreter.models.decoders import BroadcastDecoder, SlotFrames
from interpreter.models.positions import resized_positions

GRID, SLOTS, DIM, WIDTH = (3, 4), 5, 6, 7


def build(layers=3, seed=0, **options):
    torch.manual_seed(seed)
    decoder = BroadcastDecoder(DIM, WIDTH, GRID, hidden_dim=16, hidden_layers=layers, **options).double()
    with torch.no_grad():  # biases start at 0, and positions near it, which would hide wrong assignments
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return decoder


def frames_of(batch, slots=SLOTS, patches=12):
    """Random frames of slots, whose scales have both signs."""
    sizes = (patches, 2), (batch, slots, 2), (batch, slots, 2)
    coordinates, positions, scales = (torch.randn(size, dtype=torch.float64) for size in sizes)
    return SlotFrames(*(t.requires_grad_() for t in (coordinates, positions, scales + scales.sign())))


def textbook(decoder, slots, valid=None, frames=None):
    """Broadcast slots to all patches, add positions, MLP to C + 1 numbers, softmax of the last one over the slots."""
    x = slots[:, :, None] + decoder.positions
    if frames is not None:
        coordinates, positions, scales = frames
        x = x + decoder.to_relative((coordinates - positions[:, :, None]) / scales[:, :, None])
    for layer in (decoder.first, *decoder.hidden):
        x = F.relu(layer(x))
    features, alpha = decoder.to_features(x), decoder.to_alpha(x)
    if valid is not None:
        alpha = alpha.masked_fill(~valid[:, :, None, None], -torch.inf)
    masks = alpha.softmax(1)
    return (masks * features).sum(1), masks.squeeze(-1).mT


def gradients(decoder, slots, outputs, frames=()):
    weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape).sin() for o in outputs]
    loss = sum((weight * output).sum() for weight, output in zip(weights, outputs, strict=True))
    return torch.autograd.grad(loss, [slots, *decoder.parameters(), *(frames or ())])


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_values_and_gradients_are_the_textbooks(layers, merged, recompute, relative, monkeypatch):
    monkeypatch.setattr(decoders, "RECOMPUTED_ROWS", 1)  # one sample a piece
    decoder = build(layers, recompute=recompute, relative=relative)
    frames = frames_of(2) if relative else None
    slots = torch.randn(2, SLOTS, DIM, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[True] * 5, [True, False, True, True, False]]) if merged else None
    actual, expected = decoder(slots, valid=valid, frames=frames), textbook(decoder, slots, valid, frames)
    torch.testing.assert_close(tuple(actual), expected)
    torch.testing.assert_close(*(gradients(decoder, slots, outputs, frames) for outputs in (actual, expected)))


def case_of(relative, slots=SLOTS):
    """A decoder, slots [2, N, D], and the frames of a relative one."""
    decoder = build(relative=relative)
    return decoder, torch.randn(2, slots, DIM, dtype=torch.float64), frames_of(2, slots) if relative else None


@pytest.mark.parametrize("relative", [False, True])
def test_masks_sum_to_one_and_merged_slots_get_none(relative):
    decoder, slots, frames = case_of(relative)
    valid = torch.tensor([[True, True, False, True, False]]).expand(2, -1)
    features, masks = decoder(slots.requires_grad_(), valid=valid, frames=frames)
    torch.testing.assert_close(masks.sum(-1), torch.ones(2, 12, dtype=torch.float64))
    assert not masks[..., ~valid[0]].any()
    for gradient in torch.autograd.grad(features.square().sum(), [slots, *(frames[1:] if relative else ())]):
        assert not gradient[:, ~valid[0]].any()
        assert gradient[:, valid[0]].abs().amin() > 0


def test_frames_of_merged_slots_may_hold_anything():
    decoder, slots, frames = case_of(relative=True)
    valid = torch.tensor([[True, False, True, False, True]]).expand(2, -1)
    fills = [frames]
    for position, scale in ((torch.nan, torch.nan), (0.0, 0.0)):
        fill = [torch.where(valid[..., None], t, v) for t, v in ((frames.positions, position), (frames.scales, scale))]
        fills.append(SlotFrames(frames.coordinates, *fill))
    expected, *others = (
        gradients(decoder, slots.requires_grad_(), decoder(slots, valid=valid, frames=fill), frames) for fill in fills
    )
    for other in others:
        torch.testing.assert_close(other, expected, rtol=0, atol=0)


@pytest.mark.parametrize("relative", [False, True])
def test_one_slot_alone_has_every_patch(relative):
    decoder, slots, frames = case_of(relative, slots=1)
    features, masks = decoder(slots, frames=frames)
    assert (masks == 1).all()
    x = slots + decoder.positions
    if relative:
        x = x + decoder.to_relative((frames.coordinates - frames.positions) / frames.scales)
    for layer in (decoder.first, *decoder.hidden):
        x = F.relu(layer(x))
    torch.testing.assert_close(features, decoder.to_features(x))  # the decoding of that slot


@pytest.mark.parametrize("relative", [False, True])
def test_permuting_slots_permutes_masks_alone(relative):
    order = [3, 0, 4, 1, 2]
    decoder, slots, frames = case_of(relative)
    features, masks = decoder(slots, frames=frames)
    if relative:
        frames = frames._replace(positions=frames.positions[:, order], scales=frames.scales[:, order])
    permuted = decoder(slots[:, order], frames=frames)
    torch.testing.assert_close(permuted.features, features)
    torch.testing.assert_close(permuted.masks, masks[..., order])


@pytest.mark.parametrize("name", SlotFrames._fields)
def test_frames_of_another_shape_are_refused(name):
    decoder, slots, frames = case_of(relative=True)
    with pytest.raises(ValueError, match=f"frames: {name} is "):
        decoder(slots, frames=frames._replace(**{name: getattr(frames, name)[:1]}))


@pytest.mark.parametrize("relative", [False, True])
def test_frames_are_for_relative_decoders_alone(relative):
    decoder, slots, _ = case_of(relative)
    with pytest.raises(ValueError, match="relative=True needs those of its slots, others take none"):
        decoder(slots, frames=None if relative else frames_of(2))


@pytest.mark.parametrize("relative", [False, True])
def test_without_gradients_a_batch_is_decoded_in_pieces(relative, monkeypatch):
    decoder, slots = build(relative=relative), torch.randn(5, SLOTS, DIM, dtype=torch.float64)
    frames = frames_of(5) if relative else None
    valid = torch.rand(5, SLOTS) < 0.7
    valid[:, 0] = True
    whole, merged = decoder(slots, frames=frames), decoder(slots, valid=valid, frames=frames)
    monkeypatch.setattr(decoders, "DECODED_ROWS", 2 * SLOTS * 12)
    rows = []
    decoder.to_features.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with torch.no_grad():
        torch.testing.assert_close(decoder(slots, frames=frames), whole)
        assert rows == [2, 2, 1]
        torch.testing.assert_close(decoder(slots, valid=valid, frames=frames), merged)


def test_another_grid_sees_the_same_places():
    """Positions that are linear in row and column stay linear on every grid (away from the edges)."""
    decoder = build().float()
    rows, columns = torch.arange(9.0), torch.arange(9.0)
    decoder.grid = (9, 9)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    decoder.positions.data = F.pad(places, (0, DIM - 2))
    fine = resized_positions(decoder.positions, (9, 9), (18, 18)).unflatten(0, (18, 18))[4:-4, 4:-4, :2]
    centres = (torch.arange(18.0)[4:-4] + 0.5) / 2 - 0.5
    expected = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1)
    torch.testing.assert_close(fine, expected, atol=0.05, rtol=0)  # the cubic's own error
    assert decoder(torch.randn(1, 2, DIM), grid=(2, 5)).masks.shape == (1, 10, 2)


def test_frames_are_those_of_the_grid_that_is_decoded():
    decoder, slots, _ = case_of(relative=True)
    frames = frames_of(2, patches=10)
    actual = decoder(slots.requires_grad_(), grid=(2, 5), frames=frames)
    trained, resized = decoder.positions, resized_positions(decoder.positions, GRID, (2, 5))
    del decoder.positions
    decoder.positions = resized
    expected = textbook(decoder, slots, frames=frames)
    torch.testing.assert_close(tuple(actual), expected)
    leaves = [slots, trained, *frames]
    torch.testing.assert_close(*(torch.autograd.grad(out[0].sin().sum(), leaves) for out in (actual, expected)))


@pytest.mark.parametrize("relative", [False, True])
def test_half_precision_keeps_masks_in_fp32(relative):
    decoder, slots, frames = case_of(relative)
    decoder, slots = decoder.float(), slots.float()
    frames = SlotFrames(*(t.float() for t in frames)) if relative else None
    exact = decoder(slots, frames=frames)
    with torch.autocast("cpu", torch.bfloat16):
        features, masks = decoder(slots, frames=frames)
    assert masks.dtype == torch.float32
    torch.testing.assert_close(masks.sum(-1), torch.ones(2, 12))
    torch.testing.assert_close(features.float(), exact.features, atol=0.05, rtol=0.05)  # bf16 keeps 8 bits


def test_positions_start_with_the_deviation_asked_for():
    torch.manual_seed(0)
    for options, expected in (({}, 0.02), ({"position_std": 64**-0.5}, 0.125)):
        positions = BroadcastDecoder(64, WIDTH, (16, 16), **options).positions
        assert positions.std().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_compiles_fullgraph_with_equal_values_and_gradients(recompute, relative, monkeypatch):
    monkeypatch.setattr(decoders, "RECOMPUTED_ROWS", 2 * SLOTS * 12)
    decoder = build(recompute=recompute, relative=relative)
    frames = frames_of(5) if relative else None
    slots = torch.randn(5, SLOTS, DIM, dtype=torch.float64, requires_grad=True)
    expected = decoder(slots, frames=frames)
    actual = torch.compile(decoder, fullgraph=True, backend="aot_eager")(slots, frames=frames)
    torch.testing.assert_close(tuple(actual), tuple(expected))
    torch.testing.assert_close(*(gradients(decoder, slots, outputs, frames) for outputs in (actual, expected)))


class Operations(TorchDispatchMode):
    """Names of all operators, and sizes of their results."""

    def __init__(self):
        super().__init__()
        self.names, self.sizes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        self.sizes += [t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if t is not None]
        return out


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_nothing_has_the_size_of_slots_times_patches_times_features(recompute, relative):
    width = 40  # a tensor of slots times patches that is larger than a hidden layer would exceed this
    decoder = BroadcastDecoder(DIM, width, GRID, hidden_dim=16, recompute=recompute, relative=relative).double()
    slots = torch.randn(2, SLOTS, DIM, dtype=torch.float64, requires_grad=True)
    with Operations() as operations:
        decoder(slots, frames=frames_of(2) if relative else None).features.square().sum().backward()
    rows = 2 * SLOTS * 12
    assert max(operations.sizes) == rows * 16 < rows * width
    assert rows * DIM not in operations.sizes


def test_the_first_hidden_layer_is_computed_again_without_a_product():
    slots = torch.randn(2, SLOTS, DIM, dtype=torch.float64, requires_grad=True)
    counts = {}
    for recompute in (False, True):
        decoder = build(recompute=recompute)
        with Operations() as operations:
            decoder(slots).features.square().sum().backward()
        counts[recompute] = operations.names.count("aten.addmm.default")
    assert counts == {False: 4, True: 6}  # slots, two hidden layers, features; both hidden layers a second time


def peak(batch, **options):
    """Peak bytes in a training step of a decoder so wide that nearly all of them are hidden layers."""
    with FakeTensorMode(), LivingStorages() as living:
        decoder = BroadcastDecoder(8, 32, (16, 16), hidden_dim=128, **options)
        features, _ = decoder(torch.empty(batch, 8, 8, requires_grad=True))
        before = living.bytes
        features.square().mean().backward()
    return living.peak, before


def test_memory_is_that_of_two_hidden_layers_or_of_one_piece(monkeypatch):
    monkeypatch.setattr(decoders, "RECOMPUTED_ROWS", 1)
    layer = 8 * 256 * 128 * 4  # bytes of a hidden layer of one sample
    highest, kept = peak(16)
    assert kept < 2.3 * 16 * layer  # the last two; the mixture is an eighth
    assert highest < 4.5 * 16 * layer  # and the gradients of the last one before and after its activation
    highest, kept = peak(16, recompute=True)
    assert kept < 0.5 * 16 * layer
    assert highest < kept + 8 * layer
    many, of_many = peak(64, recompute=True)  # 16 pieces at most
    assert many < of_many + 8 * 4 * layer


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_parameters_put_in_the_place_of_its_own(recompute):
    decoder, other = build(recompute=recompute, relative=True), build(seed=1, relative=True)
    slots, frames = torch.randn(2, SLOTS, DIM, dtype=torch.float64), frames_of(2)
    parameters = dict(other.named_parameters())
    call = torch.func.functional_call(decoder, parameters, (slots,), {"frames": frames})
    actual, expected = (out.square().sum() for out in (call.features, textbook(other, slots, frames=frames)[0]))
    torch.testing.assert_close(*(torch.autograd.grad(loss, list(parameters.values())) for loss in (actual, expected)))
