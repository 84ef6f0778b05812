"""evaluate_predictions(): the PQ of COCO panoptic results on disk, of any program."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data

from maskformer.analysis.image import analyze_image
from maskformer.taxonomy import Taxonomy
from maskformer.untrusted import escaped, shown
from pipelines.cluster.session import session
from pipelines.data.coco_entries import MAX_CATEGORIES, category_entry
from pipelines.data.execution import mapped, outputs
from pipelines.data.files import read_file, resolved
from pipelines.data.json_stream import JsonLists
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.data.pixels import decode_panoptic, image_size
from pipelines.data.reading import PACK_AGAIN, UnusableRowError, read_files, unusable
from pipelines.errors import UserError
from pipelines.evaluation.evaluate import finish, score_the_truth
from pipelines.evaluation.folder import EvaluationFolder
from pipelines.evaluation.result import EvaluationResult
from pipelines.evaluation.score import ScoredImage
from pipelines.progress import progress
from pipelines.storage import Location, locate

_IMAGES_PER_TASK = 16
_EXAMPLES = 3
_TRIED = 20
"""PNGs to look for, to find the folder they are in."""


def evaluate_predictions(
    predictions: str, data: str | PackedSet, *, output: str, cpus: float = 1.0
) -> EvaluationResult:
    """Compare COCO panoptic results with the ground truth of a pack and compute PQ.

    Args:
        predictions: path or URI of the JSON of the results, or of a folder with it. The PNGs are in a folder with the
            name of the JSON without `.json`, as panopticapi wants it, in `predictions` or `panoptic`, or beside it.
        data: path or URI of the pack, or the opened pack.
        output: folder for the numbers; another evaluation in it is replaced.
        cpus: CPUs of each task.

    Raises:
        UserError: the predictions cannot be read, or are not one valid result for each image of the pack. The message
            counts the faults by kind.
    """
    samples = data if isinstance(data, PackedSet) else open_pack(data)
    faults: dict[str, list[str]] = defaultdict(list)
    found = _read(locate(predictions), samples, faults)
    folder = EvaluationFolder(locate(output))
    if f"{found.json}/".startswith(f"{folder.location}/"):
        raise UserError(f"The --output {folder.location} has the predictions in it. Choose another --output.")
    score_the_truth(samples)
    identity = {"predictions": str(found.json), "hash": found.hash, "data_hash": samples.data_hash}
    with session():
        done = folder.start(identity, resume=False)
        results = progress(_scored(found, samples, cpus), len(found.annotations), "images compared")
        for result in results:
            if isinstance(result, ScoredImage):
                done[result.image_id] = result
            else:
                faults[result[0]].append(result[1])
    if faults:
        raise UserError(
            f"The predictions of {found.json} cannot be scored: {_counted(faults)}. Correct them; nothing was scored."
        )
    return finish(folder, list(done.values()), samples, png_folder=str(found.png_folder))


@dataclass(frozen=True)
class _Predictions:
    json: Location
    hash: str
    png_folder: Location
    annotations: dict[int, str]
    """The annotation of each image of the pack that has one, by its id, as JSON, which takes the least memory."""


def _read(location: Location, samples: PackedSet, faults: dict[str, list[str]]) -> _Predictions:
    """Read the JSON and check everything but the PNGs."""
    file = _json_file(location)
    lists = JsonLists(file)
    known, seen = set(samples.image_ids.tolist()), set[int]()
    annotations: dict[int, str] = {}
    names: list[str] = []
    categories: list[Any] = []
    for key, number, entry in lists:
        if key == "categories" and number < MAX_CATEGORIES:
            categories.append(category_entry(entry))
        if key != "annotations":
            continue
        try:
            image_id, name, segments = entry["image_id"], entry["file_name"], entry["segments_info"]
        except (KeyError, TypeError) as error:
            raise UserError(f"{_no_results(file)} Entry {number} of them lacks one.") from error
        if not isinstance(name, str) or not isinstance(segments, list):
            raise UserError(
                f"{file} has an annotation whose file_name is not text, or whose segments_info is not a list."
            )
        if isinstance(image_id, int):
            seen.add(image_id)
        if type(image_id) is not int or image_id not in known:
            faults["results for images that the data does not have"].append(f"image {shown(image_id, 60)}")
        elif image_id in annotations:
            faults["images with more than one result"].append(f"image {image_id}")
        elif any(part in ("", ".", "..") or not _is_name(part) for part in name.split("/")):
            faults["file names that are no path below the folder"].append(f"image {image_id}: {escaped(name, 200)}")
        else:
            annotations[image_id] = json.dumps({"file_name": name, "segments_info": segments})
            names += [name] if len(names) < _TRIED else []
    if "annotations" not in lists.lists:
        raise UserError(_no_results(file))
    if "categories" in lists.lists or "categories" in lists.others:
        _require_categories(categories, samples.taxonomy, file)
    faults_of_missing = [f"image {image_id}" for image_id in sorted(known - seen)]
    if faults_of_missing:
        faults["images without a result"] += faults_of_missing
    return _Predictions(file, lists.sha256, _png_folder(file, names), annotations)


def _no_results(file: Location) -> str:
    return (
        f"{file} is not a JSON of COCO panoptic results: it needs `annotations` with image_id, file_name and "
        f"segments_info."
    )


def _is_name(part: str) -> bool:
    """Return whether this part of a path can be the name of a file."""
    try:
        return len(part.encode()) <= 255 and "\0" not in part
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can express
        return False


def _json_file(location: Location) -> Location:
    if not location.exists():
        raise UserError(f"There are no predictions at {location}. Give a COCO panoptic JSON, or a folder with one.")
    if not location.is_dir():
        return location
    names = [name for name in location.names() if name.endswith(".json")]
    if "predictions.json" in names:
        return location / "predictions.json"
    if len(names) != 1:
        raise UserError(
            f"{location} has {len(names)} JSON files{': ' if names else ''}{escaped(', '.join(names[:5]))}. Give the "
            f"file of the panoptic results."
        )
    return location / names[0]


def _png_folder(file: Location, names: Sequence[str]) -> Location:
    parent = locate(str(file).rpartition("/")[0])
    folders = [parent / name for name in (file.name.removesuffix(".json"), "predictions", "panoptic")] + [parent]
    for folder in folders:
        if any((folder / name).exists() for name in names):
            return folder
    return folders[0]


def _require_categories(categories: list[Any], taxonomy: Taxonomy, file: Location) -> None:
    """Refuse results whose own list of categories differs from that of the data; most programs write none."""
    try:
        other = Taxonomy.from_coco(categories)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file} has categories that cannot be read: {escaped(str(error))}") from error
    ours, theirs = ({(c.id, c.name, c.isthing) for c in each.categories} for each in (taxonomy, other))
    if ours != theirs:
        (identifier, name, _) = min(ours ^ theirs)
        raise UserError(
            f"{file} has other categories than the data: {other.num_classes} instead of {taxonomy.num_classes}, and "
            f"category {identifier} ({escaped(name)}) is not the same in both. Score results of the same categories."
        )


def _scored(found: _Predictions, samples: PackedSet, cpus: float) -> Iterator[ScoredImage | tuple[str, str]]:
    """Yield the result of each image, or the kind of its fault and an example."""
    places = [index for index, image_id in enumerate(samples.image_ids.tolist()) if image_id in found.annotations]
    tasks = [
        {"indices": some, "annotations": [found.annotations[int(samples.image_ids[index])] for index in some]}
        for some in (places[start : start + _IMAGES_PER_TASK] for start in range(0, len(places), _IMAGES_PER_TASK))
    ]
    if not tasks:
        return
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    compare = _Compare(samples, str(found.png_folder))
    for table in outputs(mapped(dataset, compare, "compare predictions", in_order=False, task_cpus=min(1.0, cpus))):
        for row in table.to_pylist():
            yield ScoredImage.from_json(row["result"]) if row["result"] else (row["kind"], row["example"])


@dataclass(frozen=True)
class _Compare:
    """The task: maps annotations to results, or to what is wrong with them."""

    samples: PackedSet
    png_folder: str

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = []
        for task in table.to_pylist():
            for index, annotation in zip(task["indices"], task["annotations"], strict=True):
                result, kind, example = self._compare(index, json.loads(annotation))
                rows.append({"result": result, "kind": kind, "example": example})
        return pa.Table.from_pylist(rows, schema=_COMPARED)

    def _compare(self, index: int, annotation: dict[str, Any]) -> tuple[str, str, str]:
        (entry,) = self.samples.index.take([index]).to_pylist()
        image_id, name = entry["image_id"], annotation["file_name"]
        try:
            panoptic, _ = read_files(self.samples.shards[entry["shard"]], entry, "panoptic", "panoptic")
        except UnusableRowError as error:
            raise UserError(f"{error}. {PACK_AGAIN}.") from error
        folder, size = locate(self.png_folder), (entry["height"], entry["width"])
        try:
            content = read_file(folder, name, (resolved(folder),))
            if (found := image_size(content, ("PNG",))) != size:
                example = f"image {image_id}: {found[1]} x {found[0]} instead of {size[1]} x {size[0]}"
                return "", "PNGs of another size than their image", example
            ids = decode_panoptic(content, size)
        except FileNotFoundError:
            return "", f"PNGs that do not exist in {self.png_folder}", f"image {image_id}: {escaped(name)}"
        except ValueError as error:
            return "", "PNGs that cannot be read", f"image {image_id}: {escaped(name)} ({escaped(str(error))})"
        try:
            truth = decode_panoptic(panoptic, size)
        except ValueError as error:
            reason = unusable(self.samples.shards[entry["shard"]], entry, error)
            raise UserError(f"{reason}. {PACK_AGAIN}.") from error
        segments = annotation["segments_info"]
        try:
            analysis = analyze_image((ids, segments), (truth, entry["segments"]), self.samples.taxonomy, image_id)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            return "", "results whose segments do not fit", f"image {image_id}: {escaped(str(error))}"
        return ScoredImage(name, segments, analysis).to_json(), "", ""


_COMPARED = pa.schema([("result", pa.string()), ("kind", pa.string()), ("example", pa.string())])


def _counted(faults: Mapping[str, list[str]]) -> str:
    parts = []
    for kind, examples in faults.items():
        shown = "; ".join(sorted(examples)[:_EXAMPLES])
        parts.append(f"{len(examples)} {kind} ({shown}{'; ...' if len(examples) > _EXAMPLES else ''})")
    return ", ".join(parts)
