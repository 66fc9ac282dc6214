"""The base class of sections, and the types of their fields."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _refuse_bool(value: Any) -> Any:
    """Refuse true and false where a number belongs: Python would take them as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")  # noqa: TRY004 - pydantic expects ValueError
    return value


operational = Field(json_schema_extra={"operational": True})
"""Marks a key that does not shape outputs, and so is not part of the fingerprint."""


def is_operational(field: Any) -> bool:
    """Whether a field of a section is marked as operational."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("operational"))


Seconds = Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0)]
Positive = Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0, allow_inf_nan=False)]
MAX_COUNT = 2**63 - 1
"""Largest signed 64-bit integer; larger ones cannot be written to the log."""
Count = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1, le=MAX_COUNT)]
CountOrZero = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0, le=MAX_COUNT)]
Unit = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, le=1)]
"""A fraction from 0 to 1."""
NotNegative = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, allow_inf_nan=False)]
Threshold = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)] | None


class Section(BaseModel):
    """A table of the configuration: frozen, without unknown keys, each key described by its docstring."""

    # Docstrings are read when they are printed: `use_attribute_docstrings` would read all at each start.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
