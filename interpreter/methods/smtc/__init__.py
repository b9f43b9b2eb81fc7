"""SMTC (Qian et al. 2023): slots for semantics and their instances, which have to agree with those of a teacher."""

import copy
from typing import Any

from torch import Tensor, nn

from interpreter.engine.diagnostics import slot_diagnostics
from interpreter.methods.base import Context, Method
from interpreter.methods.smtc.config import PRESETS, SmtcSettings, SmtcTraining
from interpreter.methods.smtc.model import Smtc
from interpreter.methods.smtc.segmenter import SmtcSegmenter
from interpreter.methods.views import ViewStage
from interpreter.models.backbones import Backbone, trainable

__all__ = ["SMTC"]


class SmtcStage(ViewStage[SmtcTraining]):
    """The only stage of SMTC."""

    name, config, presets = "model", SmtcTraining, PRESETS
    additive = False  # the loss on instances is a mean over all valid ones of the batch

    def build(self, config: SmtcTraining, context: Context) -> Smtc:
        """See :meth:`Stage.build`."""
        encoder: Backbone | None = None
        if config.train_backbone:
            if config.drop_path:
                context.backbone.require_depth()
            encoder = trainable(context.backbone)
        elif config.streams:
            encoder = copy.deepcopy(context.backbone)
        return Smtc(config, context.backbone.dim, context.grid, encoder)

    def noise(self, model: Smtc) -> tuple[int, ...]:
        """See :meth:`Stage.noise`."""
        return (model.noise_size,)

    def loss(self, model: Smtc, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Stage.loss`; without augmentation, student and teacher get the same features."""
        student, *teacher, partners, noise = batch
        loss, numbers, masks = model(student, teacher[0] if teacher else student, partners, noise)
        return loss, {**numbers, **slot_diagnostics(masks)}

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """See :meth:`Stage.parameter_groups`; the backbone has another learning rate and starts later, and vectors have
        no weight decay."""
        assert isinstance(model, Smtc)
        config = model.config
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.student.named_parameters():
            gaussian = name in ("mu", "log_sigma")
            decays = parameter.ndim > 1 and (config.decay_gaussians or not gaussian)
            if parameter.requires_grad:
                groups.setdefault((name.startswith("encoder."), decays), []).append(parameter)
        encoder = {"lr_scale": config.encoder_lr, "starts_at": config.encoder_start}
        return [
            {"params": parameters, **(encoder if of_encoder else {}), **({} if decays else {"weight_decay": 0.0})}
            for (of_encoder, decays), parameters in groups.items()
        ]

    def after_step(self, model: nn.Module) -> None:
        """See :meth:`Stage.after_step`."""
        assert isinstance(model, Smtc)
        model.update_teacher()

    def segmenter(
        self,
        config: SmtcTraining,
        model: Smtc,
        context: Context,
        settings: SmtcSettings | None = None,
        frame_size: tuple[int, int] | None = None,
    ) -> SmtcSegmenter:
        """See :meth:`Stage.segmenter`."""
        return SmtcSegmenter(context, model, settings or SmtcSettings(), frame_size)


SMTC = Method(
    name="smtc",
    summary="slots for semantics and their instances, which agree with those of a teacher; no reconstruction",
    citation=(
        "Qian et al., Semantics Meets Temporal Correspondence: Self-supervised Object-centric Learning in Videos, ICCV "
        "2023 (https://arxiv.org/abs/2308.09951)"
    ),
    stages=(SmtcStage(),),
    settings=SmtcSettings,
)
