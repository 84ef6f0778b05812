"""The page as a whole."""

from collections.abc import Iterator
from importlib.resources import files

from pipelines.evaluation.report_page.charts import line_chart, reliability_diagram
from pipelines.evaluation.report_page.content import CAUSE_COLORS, Content
from pipelines.evaluation.report_page.formats import p_value, percent, signed, span
from pipelines.evaluation.report_page.images import image_section, stored_pictures
from pipelines.evaluation.report_page.tables import (
    calibration_table,
    class_table,
    comparison_table,
    curve_tables,
    loss_tables,
    summary_tables,
)
from pipelines.page import document, fact_list, text


def page(content: Content) -> bytes:
    """Return the HTML of the page of an evaluation, in UTF-8."""
    folder = files("pipelines.evaluation.report_page")
    colors = "".join(
        f".{cause} {{ fill: rgb({red} {green} {blue}); }}\n" for cause, (red, green, blue) in CAUSE_COLORS.items()
    )
    return document(
        content.title,
        _body(content),
        style=(folder / "report.css").read_text() + colors,
        script=(folder / "report.js").read_text(),
        after=stored_pictures(content),
    )


def _body(content: Content) -> Iterator[str]:
    pq = content.summary.all.pq
    yield f"<header><h1>{text(content.title)}</h1>"
    yield f'<div class="headline"><p><b>{percent(pq.value)}</b> PQ</p>{"".join(_certainty(content))}</div>'
    yield from fact_list(content.facts)
    yield "</header>"
    yield "<main>"
    yield "<section><h2>Summary</h2><p>All numbers in percent. PQ: panoptic quality; SQ: segmentation quality; "
    yield "RQ: recognition quality."
    if pq.interval is not None:
        yield f" In small print: the {100 * pq.interval.confidence:g} % interval over images."
    yield "</p>"
    yield from summary_tables(content.summary)
    yield "</section>"
    if content.other:
        yield f"<section><h2>Compared with <bdi>{text(content.other)}</bdi></h2>"
        yield "<p>Difference: this run minus the other, on the same images.</p>"
        yield from comparison_table(content.summary, content.other)
        yield "</section>"
    if content.lost:
        yield "<section><h2>Where PQ is lost</h2>"
        yield f"<p>Points of PQ by cause and size of the segment; with PQ they add up to 100. {text(content.sizes)}</p>"
        yield from loss_tables(content.lost)
        yield "</section>"
    yield from _charts(content)
    yield "<section><h2>Classes</h2>"
    shown = {each.class_index for image in content.images for each in image.classes}
    yield from class_table(content.classes, shown, bool(content.other))
    yield "</section>"
    if content.images:
        yield '<section id="images"><h2>Images</h2>'
        if len(content.images) < content.num_images:
            yield f"<p>The page has {len(content.images):,} of the {content.num_images:,} images evaluated.</p>"
        yield from image_section(content)
        yield "</section>"
    yield "</main>"


def _certainty(content: Content) -> Iterator[str]:
    pq = content.summary.all.pq
    if pq.interval is not None:
        yield f"<p>{100 * pq.interval.confidence:g} % interval: {span(pq.interval)}</p>"
    if pq.compared is not None:
        against = f"against <bdi>{text(content.other)}</bdi>"
        chance = p_value(pq.compared.p_value)
        sign = "" if chance.startswith("<") else "=&nbsp;"
        yield f"<p>{signed(pq.value - pq.compared.other)} {against}, p&nbsp;{sign}{text(chance)}</p>"


def _charts(content: Content) -> Iterator[str]:
    if not content.training and content.calibration is None:
        return
    yield '<div class="columns">'
    if content.training:
        yield "<section><h2>PQ over training</h2>"
        yield line_chart(content.training, "PQ over steps of training; the values are in the table below")
        if len(content.training) > 1:
            keys = (
                f'<span><svg class="key" viewBox="0 0 30 6" aria-hidden="true"><path class="curve curve-{number}" '
                f'd="M0 3H30"/></svg> <bdi>{text(curve.name)}</bdi></span>'
                for number, curve in enumerate(content.training)
            )
            yield f'<p class="legend">{"".join(keys)}</p>'
        yield "<details><summary>Values</summary>"
        yield from curve_tables(content.training)
        yield "</details></section>"
    if content.calibration is not None:
        calibration = content.calibration
        yield "<section><h2>Calibration</h2>"
        yield f"<p>Expected calibration error {percent(calibration.expected_error)}, largest "
        yield f"{percent(calibration.maximum_error)}. On the dashed line, scores are the share of correct segments.</p>"
        yield reliability_diagram(calibration, "Correct segments by score; the values are in the table below")
        yield "<details><summary>Values</summary>"
        yield from calibration_table(calibration)
        yield "</details></section>"
    yield "</div>"
