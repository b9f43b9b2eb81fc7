"""Two choices inside slot attention: the absorbed or the projected form, and the input norm once or folded in.

    python -m profiling.studies.slot_attention --out slot-attention-forms.json

How fast the op and the module are against other code is measured by ``python -m profiling.bench``.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from slotkernels import SlotAttention
from slotkernels.slot_attention import module as module_file
from torch import Tensor

from profiling.bench.case import name_of
from profiling.bench.slot_attention import module_step
from profiling.timing import Run, interleaved, machine, save

SHAPE = (8, 864, 32, 768)  # B, M, N, D of the input norm's study


def norm_times(dtype: torch.dtype, device: str, seconds: float) -> dict[str, Any]:
    """Three attentions over tokens that are normalised first, or by their statistics inside each product."""
    batch, tokens, count, dim = SHAPE
    x, q = (torch.randn(batch, n, dim, device=device) for n in (tokens, count))
    q = q.to(dtype)

    def attend(values: Tensor, mean: Tensor | None, rstd: Tensor | None) -> Tensor:
        logits = torch.bmm(q, values.transpose(1, 2)).float()
        if mean is not None:
            logits = (logits - q.float().sum(-1, keepdim=True) * mean) * rstd
        weights = (logits * dim**-0.5).softmax(1) + 1e-8
        weights = weights / weights.sum(-1, keepdim=True)
        if mean is None:
            return torch.bmm(weights.to(dtype), values)
        weights = weights * rstd
        return torch.bmm(weights.to(dtype), values) - (weights * mean).sum(-1, keepdim=True)

    def once() -> Tensor:
        values = F.layer_norm(x, (dim,)).to(dtype)
        return [attend(values, None, None) for _ in range(3)][-1]

    def folded() -> Tensor:
        variance, mean = torch.var_mean(x, -1, correction=0)
        values, rstd = x.to(dtype), (variance + 1e-5).rsqrt()
        return [attend(values, mean.unsqueeze(1), rstd.unsqueeze(1)) for _ in range(3)][-1]

    with torch.no_grad():
        return interleaved({"input norm once": once, "input norm folded in": folded}, device, seconds)


FORMS = [  # B, M, N, D, Din, implicit: where the two forms of the module are far apart, and the demo's image stage
    (8, 864, 32, 768, 768, "bilevel"),
    (32, 96, 11, 128, 192, "bilevel"),
    (32, 16, 64, 256, 256, "bilevel"),
    (16, 300, 32, 64, 768, "none"),
]


def form_times(device: str, seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of the module in both forms, and the form that its formula takes."""
    formula, entries = module_file.absorbs, []
    for batch, tokens, count, dim, width, implicit in FORMS:
        module = SlotAttention(count, dim, width, implicit=implicit).to(device)
        inputs, slots = (torch.randn(batch, *s, device=device) for s in ((tokens, width), (count, dim)))
        once = partial(module_step(module, module, torch.float32), inputs, slots)

        def forced(form: str, once: Run = once) -> None:
            module_file.absorbs = lambda *sizes: form == "absorbed"
            once()

        runs = {form: partial(forced, form) for form in ("absorbed", "projected")}
        times = interleaved(runs, device, seconds)
        module_file.absorbs = formula
        backward = 1 if implicit == "bilevel" else module.iterations
        chosen = "absorbed" if formula(tokens, count, dim, width, module.iterations, backward) else "projected"
        entries.append({"shape": (batch, tokens, count, dim, width, implicit), "chosen": chosen, **times})
        print(f"{entries[-1]['shape']}: " + ", ".join(f"{n} {t['median']:.2f} ms" for n, t in times.items()), chosen)
    return entries


def main() -> None:
    """The command."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"default {device}")
    parser.add_argument("--seconds", type=float, default=5, help="for each question and size (default 5)")
    parser.add_argument("--out", type=Path, required=True, help="the results, as JSON")
    options = parser.parse_args()
    arguments = (options.device, options.seconds)
    norms = {name_of(dtype): norm_times(dtype, *arguments) for dtype in (torch.float32, torch.bfloat16)}
    save(options.out, {**machine(options.device), "norm": norms, "forms": form_times(*arguments)})


if __name__ == "__main__":
    main()
