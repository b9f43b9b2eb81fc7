"""Interpreter: image slots of single frames, then video slots that group the image slots of all frames."""

from interpreter.methods.base import Method
from interpreter.methods.interpreter.settings import Settings, segmenting_stage
from interpreter.methods.interpreter.stages import ImageTrainingStage, VideoTrainingStage

__all__ = ["INTERPRETER"]

INTERPRETER = Method(
    name="interpreter",
    summary="two stages: image slots of single frames, then video slots that group the image slots of all frames",
    citation="Interpreter: efficient object-centric learning for videos (docs/methods/interpreter.md)",
    stages=(ImageTrainingStage(), VideoTrainingStage()),
    settings=Settings,
    segments_with=segmenting_stage,
)
