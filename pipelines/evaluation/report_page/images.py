"""The images of the page, with their pictures.

The first images have their pictures in place. Those of the others come after the script, in elements that a browser
neither draws nor decodes; the script makes pictures of them when they are to be seen.
"""

import base64
import json
import math
from collections.abc import Iterator, Sequence

from pipelines.evaluation.report_page.charts import loss_bar, swatch
from pipelines.evaluation.report_page.content import CAUSES, ClassRow, Content, ImageEntry, Loss, Picture
from pipelines.evaluation.report_page.formats import CAUSE_NAMES, percent, signed
from pipelines.page import jpeg_address, text

PAGE_SIZE = 10
"""Images at a time."""

_NAMES: dict[Picture, str] = {
    "input": "Input",
    "truth": "Ground truth",
    "prediction": "Prediction",
    "errors": "Errors",
    "other": "The other's prediction",
}


def image_section(content: Content) -> Iterator[str]:
    """Yield the images: with a second run the largest loss of PQ against it first, else the lowest PQ."""
    images = ranked(content)
    yield from _form(content)
    yield f'<p class="legend">{"".join(f"<span>{swatch(cause)} {CAUSE_NAMES[cause]}</span>" for cause in CAUSES)}</p>'
    yield f'<div id="figures" data-size="{PAGE_SIZE}">'
    for rank, (place, image) in enumerate(images):
        yield from _figure(image, content.classes, place, rank)
    yield "</div>"
    if len(images) > PAGE_SIZE:
        yield f"<noscript><p>The other {len(images) - PAGE_SIZE} images need JavaScript.</p></noscript>"
    yield '<nav id="pages" aria-label="Pages of images" hidden><button type="button" name="previous">Previous</button>'
    yield '<output name="page"></output><button type="button" name="next">Next</button></nav>'
    yield from _dialog(content.images)


def stored_pictures(content: Content) -> Iterator[str]:
    """Yield the pictures of the images after the first page."""
    for place, image in ranked(content)[PAGE_SIZE:]:
        for picture, jpeg in image.pictures.items():
            encoded = base64.b64encode(jpeg).decode()
            yield f'<script type="text/plain" id="{picture}-{place}">{encoded}</script>'


def ranked(content: Content) -> list[tuple[int, ImageEntry]]:
    """Return places in `content.images` and images, in the order in which the page shows them first."""

    def key(each: tuple[int, ImageEntry]) -> tuple[bool, float]:
        value = each[1].pq - each[1].other_pq if content.other else each[1].pq
        return math.isnan(value), value

    return sorted(enumerate(content.images), key=key)


def _form(content: Content) -> Iterator[str]:
    orders = {"worst": "worst first", "best": "best first", "all": "as in the data"}
    if content.other:
        orders = {"lost": "lost most against the other", "gained": "gained most against the other", **orders}
    indices = sorted({each.class_index for image in content.images for each in image.classes})
    names = sorted((content.classes[index].name, index) for index in indices)
    choices = "".join(f'<option value="{index}">{text(name)}</option>' for name, index in names)
    kinds = "".join(f'<option value="{cause}">{CAUSE_NAMES[cause]}</option>' for cause in CAUSES)
    yield '<form id="image-filter" hidden>'
    yield f'<label>Order <select name="order">{_options(orders)}</select></label>'
    yield f'<label>Class <select name="class"><option value="">all</option>{choices}</select></label>'
    yield f'<label>Error <select name="cause"><option value="">all</option>{kinds}</select></label>'
    yield '<output name="count"></output></form>'


def _options(names: dict[str, str]) -> str:
    return "".join(f'<option value="{value}">{name}</option>' for value, name in names.items())


def _figure(image: ImageEntry, classes: Sequence[ClassRow], place: int, rank: int) -> Iterator[str]:
    facts = {
        "place": place,
        "pq": _number(image.pq),
        "difference": _number(image.pq - image.other_pq),
        "loss": {cause: _number(part) for cause, part in image.loss.by_cause.items() if part > 0},
        "classes": {str(each.class_index): [_number(each.pq), list(each.causes)] for each in image.classes},
    }
    encoded = text(json.dumps(facts, separators=(",", ":")))
    yield f'<figure data-facts="{encoded}"{" hidden" if rank >= PAGE_SIZE else ""}><div class="pictures">'
    for picture, jpeg in image.pictures.items():
        source = f' src="{jpeg_address(jpeg)}"' if rank < PAGE_SIZE else ""
        yield (
            f'<button type="button" class="picture" data-picture="{picture}"><img{source} width="{image.width}" '
            f'height="{image.height}" alt="{_NAMES[picture]} of image {text(image.image_id)}">'
            f"<span>{_NAMES[picture]}</span></button>"
        )
    numbers = [f"PQ {percent(image.pq)}"]
    if image.other is not None:
        numbers += [f"the other {percent(image.other_pq)}", f"difference {signed(image.pq - image.other_pq)}"]
    numbers += [f"image {text(image.image_id)}", f"{image.width} × {image.height}"]
    yield f"</div><figcaption><strong><bdi>{text(image.file_name)}</bdi></strong> <span>{' · '.join(numbers)}</span>"
    lost = _causes(image.loss)
    bar = loss_bar(image.loss, kept=0.0 if math.isnan(image.pq) else image.pq)
    yield f'<div class="loss">{bar}<span>{"lost: " + lost if lost else "nothing lost"}</span></div>'
    present = sorted(image.classes, key=lambda each: (math.isnan(each.pq), each.pq))
    named = (f"<bdi>{text(classes[each.class_index].name)}</bdi>&nbsp;{percent(each.pq)}" for each in present)
    yield f"<p>{', '.join(named)}</p></figcaption></figure>"


def _causes(loss: Loss) -> str:
    """Return causes with their points, the largest first; those below 0.05 points are left out."""
    parts = loss.by_cause
    ranked = sorted(CAUSES, key=lambda cause: -parts[cause])
    return ", ".join(
        f"{swatch(cause)}&nbsp;{CAUSE_NAMES[cause]} {percent(parts[cause])}"
        for cause in ranked
        if parts[cause] >= 0.0005
    )


def _dialog(images: Sequence[ImageEntry]) -> Iterator[str]:
    pictures = list(max((image.pictures for image in images), key=len, default={}))
    yield '<dialog id="viewer" aria-label="Image" tabindex="-1"><div class="bar-of-buttons">'
    for number, picture in enumerate(pictures, 1):
        name = f"<kbd>{number}</kbd> {_NAMES[picture]}"
        yield f'<button type="button" name="{picture}" aria-pressed="false">{name}</button>'
    yield '<span class="moves"><button type="button" name="previous" aria-label="Previous image">←</button>'
    yield '<button type="button" name="next" aria-label="Next image">→</button>'
    yield '<button type="button" name="close" aria-label="Close">Close</button></span></div>'
    yield '<img alt=""><p class="place" aria-live="polite"></p><div class="about"></div></dialog>'


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
