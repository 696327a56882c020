"""Every option of every command, as frozen dataclasses; the command line is made from them.

Nothing heavy is imported here, so that ``--help`` is quick. A field's docstring is its help text.
"""

from dpojax.configs.tools import (
    CheckDataConfig,
    EvalConfig,
    ExportConfig,
    InspectOptions,
    LogpsConfig,
    LossesConfig,
    MakeTfdsConfig,
    PlanConfig,
    ReportConfig,
    SampleConfig,
    ScoreConfig,
    ScoringOptions,
    ShowDataConfig,
)
from dpojax.configs.training import (
    ChatOptions,
    ComputeOptions,
    DataOptions,
    DPOConfig,
    ForwardOptions,
    MeshConfig,
    ModelOptions,
    ObjectiveOptions,
    PassOptions,
    ReadingOptions,
    SFTConfig,
    StepOptions,
    TrainOptions,
)

__all__ = [
    "ChatOptions",
    "CheckDataConfig",
    "ComputeOptions",
    "DPOConfig",
    "DataOptions",
    "EvalConfig",
    "ExportConfig",
    "ForwardOptions",
    "InspectOptions",
    "LogpsConfig",
    "LossesConfig",
    "MakeTfdsConfig",
    "MeshConfig",
    "ModelOptions",
    "ObjectiveOptions",
    "PassOptions",
    "PlanConfig",
    "ReadingOptions",
    "ReportConfig",
    "SFTConfig",
    "SampleConfig",
    "ScoreConfig",
    "ScoringOptions",
    "ShowDataConfig",
    "StepOptions",
    "TrainOptions",
]
