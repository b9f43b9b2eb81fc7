"""Scaled dot-product attention of the transformers, and the choice of the kernel that computes it on a GPU."""

import importlib.util
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention

_flash: Callable[..., Tensor] | None = None  # flash_attn_func of the package flash-attn, if :func:`use` chose it


def attend(
    q: Tensor,  # [B, heads, L, d]
    k: Tensor,  # [B, heads, S, d]
    v: Tensor,  # [B, heads, S, d]
    mask: Tensor | None,  # broadcasts to [B, heads, L, S], True where a query attends to a key
) -> Tensor:
    """``softmax(q kᵀ / sqrt(d)) v`` [B, heads, L, d], computed by the best kernel for device, dtype and mask."""
    if prefers_products(q.device.type, q):
        return attend_by_products(q, k, v, mask)
    if _flash is not None and mask is None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        deterministic = torch.are_deterministic_algorithms_enabled()
        out = _flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), deterministic=deterministic)
        return out.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def prefers_products(device_type: str, q: Tensor) -> bool:
    """Whether two matrix products are faster than a fused kernel on this type of device."""
    # The CPU's fused kernel is several times slower in bfloat16, forward and backward (docs/develop/facts_training.md).
    # Without gradients, videos may be long; only the memory of the fused kernel is linear in their length.
    return device_type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """:func:`attend` as two matrix products; PyTorch's softmax computes in at least float32."""
    logits = q @ (k * k.shape[-1] ** -0.5).transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1).to(q.dtype) @ v


# The choice of the kernel. A kernel is used instead of PyTorch's own only if it is clearly faster. So a resumed run
# makes the same choice as the first one.

REPLACE_AT = 0.9  # of the time of PyTorch's own kernel
# Packages that replace PyTorch's flash kernel below scaled_dot_product_attention, by PyTorch's names for them.
REPLACEMENTS = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute.interface"}
NAMES = {"cudnn": "cuDNN's attention", "FA3": "flash-attn-3", "FA4": "flash-attn-4"}


def choose_attention(device: torch.device, precision: str, shape: tuple[int, int, int, int]) -> str:
    """Let :func:`attend` use the fastest kernel for a shape, and return a line that names it.

    On a GPU in half precision, this times PyTorch's own kernel, those of the installed packages flash-attn,
    flash-attn-3 and flash-attn-4 and, unless training is deterministic, cuDNN's, forward and backward. A kernel whose
    results differ is not used. The choice is valid for the whole process.

    Args:
        device: the device that attention runs on.
        precision: "fp32"; with any other, products are in bfloat16.
        shape: [B, heads, L, d] of the largest self-attention of a step.

    Returns:
        A line such as ``attention: flash-attn-4 (…, 0.41 ms)``. It lists the installed kernels that cannot be used,
            with
        the reason.
    """
    use("sdpa")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if device.type == "cpu":
        return "attention: " + ("two matrix products" if dtype == torch.bfloat16 else "scaled_dot_product_attention")
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    fused = torch_attention.SDPBackend(torch._fused_sdp_choice(q, k, v)).name.lower()
    own = f"scaled_dot_product_attention ({fused})"
    names = ["sdpa", *(installed() if dtype == torch.bfloat16 else ())]
    if len(names) == 1:
        return f"attention: {own}"
    seconds, refused = compare(names, (q, k, v), _gpu_seconds)
    name = fastest(seconds)
    use(name)
    shown = {"sdpa": own} | NAMES
    times = ", ".join(f"{shown.get(n, n)} {t * 1e3:.3g} ms" for n, t in seconds.items())
    reasons = "".join(f"; {shown.get(n, n)} cannot be used: {reason}" for n, reason in refused.items())
    return f"attention: {shown.get(name, name)} ({times}{reasons})"


def use(name: str) -> None:
    """Let :func:`attend` use a kernel: "sdpa" (PyTorch's choice), "cudnn", "flash-attn", "FA3" or "FA4"."""
    global _flash
    _flash = None
    torch.backends.cuda.enable_flash_sdp(name != "cudnn")
    torch.backends.cuda.enable_mem_efficient_sdp(name != "cudnn")
    if torch_attention.current_flash_attention_impl():
        torch_attention.restore_flash_attention_impl()
    if name == "flash-attn":
        from flash_attn import flash_attn_func

        _flash = flash_attn_func
    elif name not in ("sdpa", "cudnn"):
        torch_attention.activate_flash_attention_impl(name)


def installed() -> list[str]:
    """Names of the kernels, besides PyTorch's choice, that are installed and allowed."""
    names = []
    # The backward pass of cuDNN's attention differs from run to run.
    if torch.backends.cudnn.is_available() and not torch.are_deterministic_algorithms_enabled():
        names.append("cudnn")
    if _is_installed("flash_attn.flash_attn_interface"):
        names.append("flash-attn")
    return names + [name for name, module in REPLACEMENTS.items() if _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def compare(
    names: list[str], inputs: tuple[Tensor, Tensor, Tensor], seconds: Callable[[Callable[[], object]], float]
) -> tuple[dict[str, float], dict[str, str]]:
    """Time forward and backward of each kernel. Results have to agree with those of the first.

    Args:
        names: kernels for :func:`use`.
        inputs: q, k, v that require gradients.
        seconds: function that measures the time of a call.

    Returns:
        Seconds of each kernel that works, and the reason for each that does not.
    """
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    cotangent = torch.randn_like(inputs[0])
    expected: list[Tensor] | None = None

    def run() -> list[Tensor]:
        out = attend(*inputs, None)
        return [out, *torch.autograd.grad(out, inputs, cotangent)]

    for name in names:
        try:
            use(name)
            results = run()
            if expected is None:
                expected = results
            # Half types: kernels round the weights and the sums differently.
            torch.testing.assert_close(results, expected, rtol=0.05, atol=0.02 * expected[0].abs().max().item())
            times[name] = seconds(run)
        except (RuntimeError, ImportError, AssertionError, TypeError, ValueError) as error:
            if name == names[0]:
                raise
            refused[name] = " ".join(str(error).split())[:200]
    return times, refused


def fastest(seconds: Mapping[str, float]) -> str:
    """The kernel to use: PyTorch's own, "sdpa", unless another is clearly faster."""
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] < REPLACE_AT * seconds["sdpa"] else "sdpa"


def _gpu_seconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Seconds of a call on the GPU, the median of ``repeats``."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 2)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events[2:])[repeats // 2] / 1e3
