"""The zoo: models that people have, each tiny and with random weights."""

from support.zoo_decoders import DECODERS
from support.zoo_encoders import ENCODERS, SEQUENCES, SOUNDS
from support.zoo_modules import MODULES, TIMM
from support.zoo_rows import ZooModel
from support.zoo_vision import VISION

ZOO: tuple[ZooModel, ...] = (
    *DECODERS,
    *ENCODERS,
    *SEQUENCES,
    *SOUNDS,
    *VISION,
    *TIMM,
    *MODULES,
)


def find_row(name: str) -> ZooModel:
    """The row of that name."""
    return next(row for row in ZOO if row.name == name)
