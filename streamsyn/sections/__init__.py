"""The sections of the configuration: one frozen model a stage, every key with its meaning below it.

Keys marked `operational` do not shape what is written; all others make up the fingerprint of a run.
"""

from streamsyn.sections.assembly import AssemblySection, LengthsSection, Source, TaskAssemblySection
from streamsyn.sections.base import (
    Count,
    Positive,
    Seconds,
    Section,
    Threshold,
    Unit,
    is_operational,
    operational,
)
from streamsyn.sections.checks import ChecksSection, ScoringSection
from streamsyn.sections.fleet import FleetSection, ServerSection
from streamsyn.sections.recipe import RecipeSection, TaskRecipeSection
from streamsyn.sections.stream import FieldsSection, RunSection, SeedsSection, SinkSection, SourceSection
from streamsyn.sections.train import (
    LongBenchSection,
    LoraSection,
    MixSection,
    NeedleKind,
    NeedlesSection,
    PublishSection,
    TrainSection,
)

__all__ = [
    "AssemblySection",
    "ChecksSection",
    "Count",
    "FieldsSection",
    "FleetSection",
    "LengthsSection",
    "LongBenchSection",
    "LoraSection",
    "MixSection",
    "NeedleKind",
    "NeedlesSection",
    "Positive",
    "PublishSection",
    "RecipeSection",
    "RunSection",
    "ScoringSection",
    "Seconds",
    "Section",
    "SeedsSection",
    "ServerSection",
    "SinkSection",
    "Source",
    "SourceSection",
    "TaskAssemblySection",
    "TaskRecipeSection",
    "Threshold",
    "TrainSection",
    "Unit",
    "is_operational",
    "operational",
]
