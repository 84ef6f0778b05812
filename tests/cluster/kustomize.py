"""What `kubectl kustomize` does with our folders: as much of it as they use, for machines without kubectl."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_LOCAL = "config.kubernetes.io/local-config"


def documents(file: Path) -> list[Any]:
    """Read every document of a YAML file."""
    return list(yaml.safe_load_all(file.read_text()))


def render(folder: Path) -> list[dict[str, Any]]:
    """Return the objects that `kubectl apply -k folder` would send.

    Raises:
        ValueError: a kustomization uses something that is not done here.
    """
    return _build(folder, [])


def _build(folder: Path, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    [kustomization] = documents(folder / "kustomization.yaml")
    known = {"apiVersion", "kind", "namespace", "resources", "components", "images", "patches", "replacements"}
    if kustomization.keys() - known:
        raise ValueError(f"{folder} uses {sorted(kustomization.keys() - known)}; the tests know only {sorted(known)}.")
    objects = list(objects)
    for name in kustomization.get("resources", []):
        place = folder / name
        # A copy: kustomize expands anchors, and a patch of one pod must not reach another.
        objects += render(place) if place.is_dir() else [_unshared(document) for document in documents(place)]
    for name in kustomization.get("components", []):
        objects = _build(folder / name, objects)
    for patch in kustomization.get("patches", []):
        for step in yaml.safe_load(patch["patch"]):
            for found in _of_kind(objects, patch["target"]["kind"]):
                *path, last = step["path"].strip("/").split("/")
                at(found, path)[int(last) if last.isdigit() else last] = step["value"]
    if "namespace" in kustomization:
        for found in objects:
            if found["kind"] == "Namespace":
                found["metadata"]["name"] = kustomization["namespace"]
            else:
                found["metadata"]["namespace"] = kustomization["namespace"]
    for image in kustomization.get("images", []):
        for container in (c for found in objects for c in containers(found)):
            if container["image"].partition(":")[0] == image["name"]:
                digest = f"@{image['digest']}" if "digest" in image else ""
                container["image"] = f"{image['newName']}:{image['newTag']}{digest}"
    for replacement in kustomization.get("replacements", []):
        [source] = _of_kind(objects, replacement["source"]["kind"])
        value = at(source, replacement["source"]["fieldPath"].split("."))
        for target in replacement["targets"]:
            for found in _of_kind(objects, target["select"]["kind"]):
                for field in target["fieldPaths"]:
                    *path, last = field.split(".")
                    at(found, path)[last] = copy.deepcopy(value)
    return [found for found in objects if found["metadata"].get("annotations", {}).get(_LOCAL) != "true"]


def at(node: Any, path: list[str]) -> Any:
    """Return what lies at `path` below `node`."""
    for step in path:
        node = node[int(step) if step.isdigit() else step]
    return node


def containers(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every container below `node`."""
    for pod in pods(node):
        yield from pod["containers"]


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every pod specification below `node`."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from pods(value)


def _of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [found for found in objects if found["kind"] == kind]


def _unshared(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node
