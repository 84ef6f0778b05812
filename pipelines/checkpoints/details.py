"""What is known of a model besides its weights, for others who use it."""

import logging
from collections.abc import Iterator
from dataclasses import replace

from maskformer import weights
from maskformer.untrusted import escaped, parse_json
from pipelines.checkpoints.pretrained import results_folder
from pipelines.checkpoints.saved_model import find, is_native
from pipelines.checkpoints.state import step_of
from pipelines.config.serialize import from_dict
from pipelines.config.train import TrainConfig
from pipelines.storage import Location, locate

logger = logging.getLogger(__name__)


def model_details(uri: str, file: weights.Weights) -> weights.ModelDetails:
    """Return sizes, thresholds, recipe and known evaluations of weights, for others who use them.

    Args:
        uri: path or URI from which `read` read the weights.
    """
    location, saved = find(uri), weights.ModelDetails()
    folder, step = "/".join(results_folder(location)), 0
    if is_native(location):
        config = from_dict(TrainConfig, file.about["config"])
        folder, _, _ = file.source.rpartition("/checkpoints/")
        step = step_of(locate(file.source)) or 0
        folder = folder or file.source
        saved = weights.ModelDetails(
            short_side=config.evaluation.short_side,
            long_side=config.evaluation.long_side,
            panoptic=config.panoptic,
            recipe=config.recipe,
        )
    return replace(saved, evaluations=tuple(_evaluations(locate(folder) / "evaluation", step)))


def _evaluations(folder: Location, step: int) -> Iterator[weights.Evaluation]:
    """Yield the evaluations of a step that are in the results of its run."""
    prefix = f"{step:08d}-"
    for name in sorted(folder.names() if folder.exists() else ()):
        file = folder / name / "metrics.json"
        if name.startswith(prefix) and file.exists():
            try:
                content = parse_json(file.read_bytes())
                metrics = {key: float(value) for key, value in content["metrics"].items()}
                yield weights.Evaluation(
                    data=name.removeprefix(prefix), num_images=int(content["num_images"]), metrics=metrics
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("%s is not used: %s: %s", file, type(error).__name__, escaped(error, 300))
