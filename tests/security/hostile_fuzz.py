"""Mutated files of every format of data sets and packs; `fuzz` is called in the processes of `isolated`."""

import json
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.data.classes import ClassMap
from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.manifest import open_pack
from pipelines.errors import UserError
from pipelines.storage import sha256
from tests.pipelines.data.coco_folder import CATEGORIES, SPLIT, json_file
from tests.security.hostile_files import encoded, noise
from tests.security.hostile_use import REFUSALS, use_image, use_pack, use_picture

_SECONDS = 5.0
"""In which each file must be used or refused. A loaded machine takes a multiple of what one takes alone."""


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Change, insert, remove or repeat bytes, half of the time near the header, or cut the file."""
    result = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        end = len(result) if rng.random() < 0.5 else min(200, len(result))
        place = int(rng.integers(max(1, end)))
        match rng.integers(7):
            case 0:
                result[place : place + 1] = bytes([int(rng.integers(256))])
            case 1:
                result[place : place + 4] = int(rng.choice([0, 1, 2**15, 2**31 - 1, 2**32 - 1])).to_bytes(4, "big")
            case 2:
                result[place : place + 4] = int(rng.choice([0, 1, 2**15, 2**31 - 1, 2**32 - 1])).to_bytes(4, "little")
            case 3:
                result[place:place] = rng.bytes(int(rng.integers(1, 9)))
            case 4:
                del result[place : place + int(rng.integers(1, 9))]
            case 5:
                result[place:place] = result[place : place + int(rng.integers(1, 200))]
            case _:
                del result[int(rng.integers(len(result) // 2, len(result) + 1)) :]
        if not result:
            break
    return bytes(result)


def fuzz(kind: str, count: int, seed: int, coco: str, packed: str, scratch: str) -> str:
    """Use many mutated files of a kind; fail if one is neither used nor refused in a printable paragraph.

    Args:
        coco: a data set.
        packed: a pack.
        scratch: a folder for the mutated files.
    """
    warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
    content, use = _of_kind(kind, Path(coco), Path(packed), Path(scratch))
    refused = 0
    for number in range(count):
        some = mutated(content, np.random.default_rng([seed, number]))
        start = time.monotonic()
        try:
            use(some)
        except REFUSALS as error:
            refused += 1
            if not str(error).isprintable() or not 20 < len(str(error)) < 2000:
                raise AssertionError(f"{kind}, seed {seed}, number {number}: {error!r}") from error
        except BaseException as error:
            raise AssertionError(f"{kind}, seed {seed}, number {number}: {type(error).__name__}: {error}") from error
        assert time.monotonic() - start < _SECONDS, (kind, seed, number)
    return f"{count} {kind}: {refused} refused"


def _of_kind(kind: str, coco: Path, packed: Path, scratch: Path) -> tuple[bytes, Callable[[bytes], object]]:
    """Return a good file, and what is done with it."""
    match kind.split():
        case ["picture", name]:
            return encoded(noise(40, 30).convert("P" if name == "GIF" else "RGB"), name), use_picture
        case ["image", name]:
            return encoded(noise(40, 30), name, **({"progressive": True} if name == "JPEG" else {})), use_image
        case ["panoptic"]:
            blocks = np.arange(12, dtype=np.uint8).reshape(3, 4).repeat(8, axis=0).repeat(8, axis=1)
            return encoded(Image.fromarray(np.stack([blocks] * 3, axis=-1)), "PNG"), use_image
        case ["annotations"]:
            shutil.copytree(coco, scratch / "coco")

            def read(content: bytes) -> None:
                json_file(scratch / "coco").write_bytes(content)
                read_coco(CocoLayout.find(str(scratch / "coco"), SPLIT))

            return json_file(coco).read_bytes(), read
        case ["classes"]:

            def parse(content: bytes) -> None:
                try:
                    text = content.decode()
                except UnicodeDecodeError as error:
                    raise UserError(f"It is not UTF-8: {error.reason}.") from error
                ClassMap.parse(text, CATEGORIES)

            return b"things:\n  vehicle: [train, car]\nstuff: {floor: rug}\ndrop: [banner]\n", parse
        case _:
            return _of_pack(kind, packed, scratch / "packed")


def _of_pack(name: str, packed: Path, folder: Path) -> tuple[bytes, Callable[[bytes], object]]:
    shutil.copytree(packed, folder)

    def replaced(content: bytes) -> None:
        (folder / name).write_bytes(content)
        found = json.loads((packed / "manifest.json").read_text())
        if name == "index.parquet":
            found["index"].update(sha256=sha256(content), bytes=len(content))
            (folder / "manifest.json").write_text(json.dumps(found))
        if name == "manifest.json":
            open_pack(str(folder))
        else:
            use_pack(str(folder))

    return (packed / name).read_bytes(), replaced
