"""What all sections have in common: frozen, strict about names and numbers; and the ranges that they share."""

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""Products of two of them still fit the 64 bits in which sequences and tokens are counted."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A group of settings: frozen, and strict about names and numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_not_said_by_yes(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1: `optimizer.lr=yes` would train."""
        kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"found {value}; expected a number")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types in an annotation, however deep."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)
