"""What all sections are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_truth_value(value: Any) -> Any:
    """To Python `true` is 1; to who wrote it, it is not."""
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not true or false")  # noqa: TRY004 - what pydantic takes
    return value


operational = Field(json_schema_extra={"operational": True})
"""Marks a key that does not shape what is written."""


def is_operational(field: Any) -> bool:
    """Whether a field of a section is marked so."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("operational"))


Seconds = Annotated[float, BeforeValidator(_no_truth_value), Field(gt=0)]
Positive = Annotated[float, BeforeValidator(_no_truth_value), Field(gt=0, allow_inf_nan=False)]
MAX_COUNT = 2**63 - 1
"""JSON as it is written here has no larger numbers."""
Count = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1, le=MAX_COUNT)]
CountOrZero = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0, le=MAX_COUNT)]
Unit = Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0, le=1)]
"""From 0 to 1."""
NotNegative = Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0, allow_inf_nan=False)]
Threshold = Annotated[float, BeforeValidator(_no_truth_value), Field(allow_inf_nan=False)] | None


class Section(BaseModel):
    """A part of the configuration: frozen, closed, documented by the text below each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
