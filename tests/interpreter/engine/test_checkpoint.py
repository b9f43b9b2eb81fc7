"""Checkpoints contain everything, are complete or absent, and their errors say what to do about damage."""

import errno

import pytest
import torch
from torch import nn

from interpreter.engine import checkpoint
from interpreter.engine.checkpoint import (
    TrainingState,
    checkpoints,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    restore_weights,
    save_checkpoint,
    save_diverged,
)


def state(step, size=4):
    return TrainingState(
        step, {"w": torch.full((size,), float(step))}, {"w/step": torch.tensor(float(step))}, {"loss": 0.1}
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def train(model, optimizer, steps):
    device = next(model.parameters()).device
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        loss = model(torch.randn(4, 3, generator=generator).to(device)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def build(device, seed=0):
    """A model and an optimiser as training uses it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(device)
    options = {"fused": True, "capturable": device == "cuda"}
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.005, **options)


def test_state_survives_exactly(tmp_path):
    progress = {"loss": 0.1 + 0.2, "count": 3.0, "tiny": 5e-324}
    weights = {"a.b": torch.randn(3, 4).T, "c": torch.randn(2).bfloat16(), "empty": torch.empty(0, 3)}
    save_checkpoint(tmp_path, TrainingState(7, weights, {"a.b/step": torch.tensor(7.0)}, progress))
    loaded = load_checkpoint(tmp_path)
    assert loaded.step == 7
    assert loaded.progress == progress
    assert list(loaded.progress) == list(progress)
    assert loaded.weights.keys() == weights.keys()
    assert all(torch.equal(loaded.weights[k], v) and loaded.weights[k].dtype == v.dtype for k, v in weights.items())
    assert loaded.optimizer == {"a.b/step": torch.tensor(7.0)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_optimizer_resumes_bit_for_bit(device, tmp_path):
    straight, optimizer = build(device)
    train(straight, optimizer, 5)
    path = save_checkpoint(tmp_path, TrainingState(5, straight.state_dict(), optimizer_tensors(optimizer, straight)))
    before = path.read_bytes()

    resumed, again = build(device, seed=1)
    loaded = load_checkpoint(tmp_path)
    restore_weights(resumed, loaded.weights, tmp_path)
    restore_optimizer(again, resumed, loaded.optimizer)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        old, new = optimizer.state[one], again.state[other]
        assert old.keys() == new.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(old[k], new[k]) and old[k].dtype == new[k].dtype for k in old)
        assert all(old[k].device == new[k].device for k in old)
    train(straight, optimizer, 5)
    train(resumed, again, 5)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert path.read_bytes() == before  # nothing trains inside the mapped file


def test_all_state_is_restored_where_the_parameter_is(tmp_path):
    """A fused optimiser needs this. A device without memory replaces the GPU here."""
    model, optimizer = build("cpu")
    train(model, optimizer, 1)
    tensors = optimizer_tensors(optimizer, model)
    restore_optimizer(optimizer, model.to("meta"), tensors)
    assert all(value.device.type == "meta" for p in model.parameters() for value in optimizer.state[p].values())


def test_the_two_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 100):
        save_checkpoint(tmp_path, state(step))
    assert names(tmp_path) == ["checkpoint-00000010.safetensors", "checkpoint-00000100.safetensors"]
    assert load_checkpoint(tmp_path).step == 100


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "absent") is None


def test_training_never_resumes_from_a_diverged_state(tmp_path):
    save_checkpoint(tmp_path, state(1))
    assert save_diverged(tmp_path, state(2)).name == "diverged-00000002.safetensors"
    assert load_checkpoint(tmp_path).step == 1


def test_exception_while_writing_leaves_the_old_one_only(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1))

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise RuntimeError("unplugged")

    monkeypatch.setattr(checkpoint, "save_file", half)
    for step in (1, 2):  # a new file, and one that exists already
        with pytest.raises(RuntimeError, match="unplugged"):
            save_checkpoint(tmp_path, state(step))
    assert names(tmp_path) == ["checkpoint-00000001.safetensors"]
    assert load_checkpoint(tmp_path).weights["w"].tolist() == [1] * 4


def test_what_a_killed_writer_left_is_ignored(tmp_path):
    save_checkpoint(tmp_path, state(1))
    (tmp_path / ".checkpoint-00000002.safetensors.12345.tmp").write_bytes(b"half")
    assert load_checkpoint(tmp_path).step == 1
    save_checkpoint(tmp_path, state(2))
    assert load_checkpoint(tmp_path).step == 2


def test_checkpoint_replaced_meanwhile_is_not_called_damaged(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step))
    opened = checkpoint.safe_open

    def late(path, **options):
        monkeypatch.setattr(checkpoint, "safe_open", opened)
        for step in (3, 4):
            save_checkpoint(tmp_path, state(step))
        return opened(path, **options)

    monkeypatch.setattr(checkpoint, "safe_open", late)
    assert load_checkpoint(tmp_path).step == 4


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_cut_checkpoint_names_the_previous_one(share, tmp_path):
    save_checkpoint(tmp_path, state(1, 5000))
    newest = save_checkpoint(tmp_path, state(2, 5000))
    content = newest.read_bytes()
    newest.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ValueError, match=r"checkpoint-00000002.* is damaged .*; delete it to resume from checkpoint-00000001"
    ):
        load_checkpoint(tmp_path)
    newest.unlink()
    assert load_checkpoint(tmp_path).step == 1


def test_only_checkpoint_damaged_says_to_train_anew(tmp_path):
    save_checkpoint(tmp_path, state(1)).write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="delete it to train this stage from the start") as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_foreign_file_is_a_value_error(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "checkpoint-00000003.safetensors")
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(tmp_path)


def test_full_disk_is_one_line_and_keeps_the_earlier_checkpoint(small_disk):
    disk = small_disk(300_000)
    save_checkpoint(disk, state(1, 30_000))
    with pytest.raises(OSError, match=r"disk is full: .*checkpoint-00000002.* unchanged") as caught:
        save_checkpoint(disk, state(2, 60_000))
    assert caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    assert names(disk) == ["checkpoint-00000001.safetensors"]
    assert load_checkpoint(disk).weights["w"].shape == (30_000,)
    save_checkpoint(disk, state(3, 10_000))
    assert [path.name for path in checkpoints(disk)][-1] == "checkpoint-00000003.safetensors"


def test_other_weights_are_a_value_error_that_says_what_differs(tmp_path):
    model, _ = build("cpu")
    with pytest.raises(ValueError, match=r"belongs to another configuration: .*0\.weight"):
        restore_weights(model, {**model.state_dict(), "0.weight": torch.zeros(7, 3)}, tmp_path)
