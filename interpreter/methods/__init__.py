"""All methods, by name. To add one, see docs/develop/add_a_method.md."""

from interpreter.methods.base import Method
from interpreter.methods.cluster import CLUSTER
from interpreter.methods.dinosaur import DINOSAUR
from interpreter.methods.interpreter import INTERPRETER
from interpreter.methods.slot_contrast import SLOT_CONTRAST
from interpreter.methods.smtc import SMTC
from interpreter.methods.solv import SOLV
from interpreter.methods.videosaur import VIDEOSAUR

__all__ = ["METHODS", "find_method"]

METHODS: dict[str, Method] = {
    method.name: method for method in (INTERPRETER, DINOSAUR, SLOT_CONTRAST, VIDEOSAUR, SOLV, SMTC, CLUSTER)
}


def find_method(name: str) -> Method:
    """Return the method with this name.

    Raises:
        ValueError: if there is no such method; the message lists the names.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]
