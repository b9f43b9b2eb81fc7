"""Several processes of a job: sums over all of them, and the gradients of a shared backbone."""

import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from interpreter.configs import BackboneConfig
from interpreter.engine.step import _distributed
from interpreter.models.backbones import depth_factors, load_backbone, trainable
from interpreter.models.gather import sum_over_ranks

from .small_vits import frames, save_vit

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes needs Linux or macOS")


def _joined(rank, function, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(function(rank, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()


def together(function, folder):
    """Results of two processes of a job."""
    mp.spawn(_joined, (function, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def sums(rank, folder):
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    scaled = (value * (1 + rank)).T
    total = sum_over_ranks(scaled)
    compiled = torch.compile(lambda x: x / sum_over_ranks(x.sum()), fullgraph=True, backend="aot_eager")
    share = compiled(value * (1 + rank))
    share.sum().backward()
    assert not total.requires_grad
    return {"total": total, "scaled": scaled.detach(), "share": share.detach(), "grad": value.grad}


def test_sums_of_all_processes_are_constants(tmp_path):
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for rank, found in enumerate(together(sums, tmp_path)):
        assert torch.equal(found["total"], 3 * value.T)
        assert torch.equal(found["scaled"], (1 + rank) * value.T)  # is unchanged
        torch.testing.assert_close(found["share"], (1 + rank) * value / 30)
        torch.testing.assert_close(found["grad"], torch.full((2, 2), (1 + rank) / 30))


def test_one_process_has_its_own_sum():
    value = torch.tensor([2.0], requires_grad=True)
    assert sum_over_ranks(value).tolist() == [2.0]
    assert not sum_over_ranks(value).requires_grad


def gradients(rank, folder):
    """Of rows of a batch, averaged over processes as a training step does; without a job, of all rows."""
    model = trainable(load_backbone(BackboneConfig(str(folder / "vit"), output="keys")))
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    pixels = frames(32, 48, count=4)[rows]
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))[rows]

    def loss(pixels, noise):
        return model.encode(pixels, depth_factors(noise, 0.4)).pow(2).mean()

    forward = loss if rank is None else _distributed(model, loss, torch.device("cpu"))
    for _ in range(2):  # a static graph is learned in the first step
        model.zero_grad()
        forward(pixels, noise).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_processes_train_one_backbone(tmp_path):
    save_vit("ViT", tmp_path / "vit")
    alone = gradients(None, tmp_path)
    for found in together(gradients, tmp_path):
        assert found.keys() == alone.keys()
        for name, gradient in alone.items():
            torch.testing.assert_close(found[name], gradient, msg=name, atol=1e-5, rtol=1e-4)
