"""Short import path of the recipes, for notebooks: `from pipelines.recipes import DEMO`."""

from pipelines.config.recipes import *  # noqa: F403
