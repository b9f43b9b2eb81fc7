"""A call of inverted attention: invalid arguments, layouts, kept tensors, compilation, capture."""

import pytest
import slotkernels  # registers the ops
import torch
from slotkernels import inverted_attention
from slotkernels.slot_attention.op import reads_attention

from .attention_cases import BACKENDS, make
from .label_cases import needs_cpp
from .oracles import assert_compiles


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def test_non_contiguous_inputs(backend):
    q, k = torch.randn(4, 2, 3).permute(1, 2, 0), torch.randn(2, 4, 14)[:, :, ::2].transpose(1, 2)
    mask = torch.rand(7, 2).t() > 0.3
    assert not q.is_contiguous()
    assert not k.is_contiguous()
    expected, _ = inverted_attention(q.contiguous(), k.contiguous(), mask=mask.contiguous(), backend=backend)
    torch.testing.assert_close(inverted_attention(q, k, mask=mask, backend=backend)[0], expected)
    every_other = torch.randn(2, 14, 4)[:, ::2]  # contiguous rows with other strides: no copy is needed
    expected, _ = inverted_attention(q.contiguous(), every_other.contiguous(), backend=backend)
    torch.testing.assert_close(inverted_attention(q, every_other, backend=backend)[0], expected)


def test_attention_is_returned_only_on_request(backend):
    q = torch.randn(1, 2, 3)
    assert inverted_attention(q, q, backend=backend)[1] is None


@pytest.mark.parametrize("with_v", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype, with_v):
    tensors, mask = make((2, 7, 3, 5), dtype, with_v, True, True)
    q, k, v, bias = (tensors.get(name) for name in ("q", "k", "v", "bias"))
    options = (0.5, 1e-8, 0.0, 1, "ieee")
    arguments = (q, k, v, bias, mask.unsqueeze(1), *options, True, backend)
    torch.library.opcheck(torch.ops.slotkernels.inverted_attention, arguments, atol=1e-2, rtol=1e-2)
    updates, total, attention = torch.ops.slotkernels.inverted_attention(*arguments)
    grads = (torch.randn_like(updates), torch.randn_like(total), torch.randn_like(attention))
    inputs = [None if t is None else t.detach() for t in (q, k, v, bias)]
    saved = (updates.detach(), total.detach())
    needs = [True, True, with_v, True, False]
    for kept in (attention.detach(), None):
        backward = (*grads, *inputs, mask.unsqueeze(1), *options, True, *saved, needs, kept, backend)
        torch.library.opcheck(torch.ops.slotkernels.inverted_attention_backward, backward)


@pytest.mark.parametrize("return_attention", [True, False])
def test_compiles_fullgraph_with_equal_values_and_gradients(backend, return_attention):
    tensors, mask = make((2, 7, 3, 5), torch.float32, True, True)

    def loss(q, k, v):
        options = {"mask": mask, "return_attention": return_attention, "backend": backend}
        updates, attention = inverted_attention(q, k, v, **options)
        return updates.square().sum() + (attention.square().sum() if return_attention else 0)

    assert_compiles(loss, *tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_on_a_cpu_the_backward_pass_reads_the_kept_attention(backend, dtype, groups):
    if backend == "triton":
        pytest.skip("computes the attention again")
    tensors, mask = make((2, 70, 6, 12), dtype, False, True, groups=groups)
    q, k = tensors["q"], tensors["k"].detach()
    updates, _ = inverted_attention(q, k, mask=mask, groups=groups, backend=backend)
    (expected,) = torch.autograd.grad(updates.sum(), q, retain_graph=True)
    q.data.fill_(float("nan"))  # recomputed attention would change
    assert torch.equal(torch.autograd.grad(updates.sum(), q)[0], expected)


def test_the_attention_is_kept_on_a_cpu_alone_and_only_for_a_backward_pass():
    tensors, _ = make((2, 7, 3, 5), torch.float32, False, False)

    def kept(q, k):
        return reads_attention(q, k, None, None)

    q, k = tensors["q"], tensors["k"].detach()
    assert kept(q, k)
    assert not kept(q.detach(), k)
    with torch.no_grad():
        assert not kept(q, k)
    assert not kept(q.detach().to("meta").requires_grad_(), k.to("meta"))  # replaces a GPU


@pytest.mark.gpu
def test_a_captured_graph_replays_on_new_inputs():
    tensors, mask = make((2, 863, 8, 64), torch.bfloat16, False, True, device="cuda")

    def step():
        outputs = inverted_attention(**tensors, mask=mask, return_attention=True, backend="triton")
        return [*outputs, *torch.autograd.grad(outputs[0].square().sum(), list(tensors.values()))]

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        tensors["k"].copy_(torch.randn_like(tensors["k"]))
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, step(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.zeros(2, 3)}, r"q is float32 \[2, 3\], expected \[B, N, D\]"),
        ({"k": torch.zeros(2, 7, 4)}, r"k is float32 \[2, 7, 4\], expected \[B, M, D\] with D = 5"),
        ({"k": torch.zeros(3, 7, 5)}, r"k is .* with B = 2"),
        ({"k": torch.zeros(2, 0, 5)}, r"k is float32 \[2, 0, 5\].* with M > 0"),
        ({"q": torch.zeros(2, 3, 5, dtype=torch.int32)}, r"q is int32 .*expected dtype float32"),
        ({"k": torch.zeros(2, 7, 5).double()}, "k is float64 .*expected the dtype and device of q"),
        ({"v": torch.zeros(2, 6, 5)}, r"v is float32 \[2, 6, 5\], expected \[B, M, Dv\] with M = 7"),
        ({"bias": torch.zeros(2, 4)}, r"bias is float32 \[2, 4\], expected \[B, N\] with N = 3"),
        ({"bias": torch.zeros(2, 3).bfloat16()}, r"bias is bfloat16 \[2, 3\], expected dtype float32"),
        ({"mask": torch.ones(2, 7)}, r"mask is float32 .*, expected dtype bool"),
        ({"mask": torch.ones(2, 8, dtype=torch.bool)}, r"mask is bool .* with M = 7"),
        ({"mask": torch.ones(2, 2, 7, dtype=torch.bool), "groups": 3}, r"mask is bool \[2, 2, 7\].* with G = 3"),
        ({"groups": 2}, "groups=2, expected a divisor of the 3 slots"),
        ({"eps": -1.0}, r"eps=-1.0, expected a number >= 0"),
        ({"eps": float("nan")}, r"eps=nan"),
        ({"eps_placement": "outside"}, "eps_placement='outside', expected one of numerator, denominator"),
        ({"precision": "fp32"}, "precision='fp32', expected one of ieee, tf32x3, tf32"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(arguments, message):
    good = {"q": torch.zeros(2, 3, 5), "k": torch.zeros(2, 7, 5)}
    with pytest.raises(ValueError, match=message):
        inverted_attention(**(good | arguments))


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        (torch.zeros(1, 129, 4), torch.zeros(1, 2, 4), "129 slots in 1 groups fill 256 columns, at most 128"),
        (torch.zeros(1, 2, 1025), torch.zeros(1, 2, 1025), "width 1025, at most 1024"),
        (torch.zeros(1, 2, 4).double(), torch.zeros(1, 2, 4).double(), "float64"),
    ],
)
def test_triton_by_name_says_why_it_cannot_serve_a_call(q, k, message):
    with pytest.raises(RuntimeError, match=message):
        inverted_attention(q, k, backend="triton")


@needs_cpp
def test_cpp_by_name_says_why_it_cannot_serve_a_call(monkeypatch):
    with pytest.raises(RuntimeError, match="float64 tensors"):
        inverted_attention(*torch.zeros(2, 1, 2, 4).double(), backend="cpp")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    q = torch.zeros(2, 2, 4)
    with pytest.raises(RuntimeError, match="2 samples on 5 threads: each would be computed by one thread"):
        inverted_attention(q, q, backend="cpp")


@needs_cpp
def test_frames_of_clips_are_read_where_they_are(monkeypatch):
    clips, q = torch.randn(2, 3, 20, 16, requires_grad=True), torch.randn(2, 5, 16)
    frame, expected = clips.unbind(1)[1], clips[:, 1].detach().contiguous()
    copies = []
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: copies.append(t.shape) or t.clone())
    updates, _ = inverted_attention(q, frame, backend="cpp")
    assert frame.shape not in copies
    monkeypatch.undo()
    assert torch.equal(updates, inverted_attention(q, expected, backend="cpp")[0])


def test_public_names():
    assert set(slotkernels.__all__) <= set(dir(slotkernels))
