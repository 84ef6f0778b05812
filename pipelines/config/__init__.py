"""Configuration: dataclasses whose fields are flags, recipes, and how they are read, overridden and saved."""

from pipelines.config.train import TrainConfig as TrainConfig
