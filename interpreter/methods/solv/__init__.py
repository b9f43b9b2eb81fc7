"""SOLV (Aydemir et al. 2023): slots with a position and a scale for windows of frames, merged if they are alike."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from interpreter.engine.diagnostics import slot_diagnostics
from interpreter.engine.inputs import InputSettings
from interpreter.methods.base import Context, Method
from interpreter.methods.solv.config import PRESETS, SolvSettings, SolvTraining, keeping_probability
from interpreter.methods.solv.model import Solv
from interpreter.methods.solv.segmenter import SolvSegmenter
from interpreter.methods.windows import WindowStage

__all__ = ["SOLV"]


class SolvStage(WindowStage[SolvTraining]):
    """The only stage of SOLV."""

    name, config, presets = "model", SolvTraining, PRESETS

    def build(self, config: SolvTraining, context: Context) -> Solv:
        """See :meth:`Stage.build`."""
        return Solv(config.model, context.backbone.dim, context.grid, 2 * config.half_window + 1)

    def merge_schedule(self, config: SolvTraining, settings: InputSettings) -> Callable[[int], float] | None:
        """See :meth:`WindowStage.merge_schedule`."""
        if not config.model.merge:
            return None
        return partial(keeping_probability, steps=settings.optim.steps, epochs=config.merge_epochs)

    def noise(self, model: Solv) -> tuple[int, ...] | None:
        """See :meth:`Stage.noise`; the noise is for dropout."""
        return (model.noise_size,) if model.noise_size else None

    def loss(self, model: Solv, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Stage.loss`; the numbers describe the masks, and how many slots are left after merging."""
        loss, masks, valid = model(*batch)
        return loss, {"slots_left": valid.sum(1).float().mean(), **slot_diagnostics(masks, valid)}

    def segmenter(
        self,
        config: SolvTraining,
        model: Solv,
        context: Context,
        settings: SolvSettings | None = None,
        frame_size: tuple[int, int] | None = None,
    ) -> SolvSegmenter:
        """See :meth:`Stage.segmenter`."""
        return SolvSegmenter(context, model, settings or SolvSettings(), frame_size)


SOLV = Method(
    name="solv",
    summary="slots of a frame and its neighbours, invariant to place and size; slots that are alike are merged",
    citation=(
        "Aydemir, Xie and Güney, Self-supervised Object-Centric Learning for Videos, NeurIPS 2023 "
        "(https://arxiv.org/abs/2310.06907)"
    ),
    stages=(SolvStage(),),
    settings=SolvSettings,
)
