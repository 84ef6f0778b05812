"""Names of the numbers of an evaluation, which MLflow must accept."""

import numpy as np
from mlflow.utils.validation import _validate_metric_name

from maskformer.analysis.image import analyze_image
from maskformer.analysis.summary import summarize
from maskformer.taxonomy import Taxonomy
from pipelines.evaluation.result import metrics

NAMES = ["a+b", "a_b", "..", "x/", "n//a", "ok", "absent", "é|猫"]
TAXONOMY = Taxonomy.from_coco([{"id": k + 1, "name": name, "isthing": k % 2} for k, name in enumerate(NAMES)])


def test_every_class_that_occurs_has_a_metric_that_mlflow_accepts() -> None:
    present = [category for category in TAXONOMY.categories if category.name != "absent"]
    ids = np.arange(1, len(present) + 1)[None]
    segments = [{"id": number, "category_id": category.id} for number, category in enumerate(present, 1)]
    found = metrics(summarize([analyze_image((ids, segments), (ids, segments), TAXONOMY, 1)], TAXONOMY, draws=10))
    classes = {name: value for name, value in found.items() if name.startswith("pq_class/")}
    assert list(classes.values()) == [1.0] * len(present)
    for name in found:
        _validate_metric_name(name)
