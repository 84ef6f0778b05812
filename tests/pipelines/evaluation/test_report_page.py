"""The page of an evaluation: numbers and names, and in a real browser sorting, filters, pages and the viewer."""

import base64
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.evaluation.report_page import page
from pipelines.evaluation.report_page.charts import line_chart, loss_bar, reliability_diagram, ticks
from pipelines.evaluation.report_page.content import (
    CAUSE_COLORS,
    CAUSES,
    Calibration,
    CalibrationBin,
    ClassOfImage,
    ClassRow,
    Compared,
    Content,
    Curve,
    Group,
    ImageEntry,
    Interval,
    Loss,
    Measure,
    Qualities,
    Summary,
)
from pipelines.evaluation.report_page.formats import p_value, percent, signed
from pipelines.evaluation.report_page.images import PAGE_SIZE
from tests.browser import Browser, Page
from tests.pipelines.evaluation.report_example import example, many_classes
from tests.pipelines.test_page import contrast, palette

HOSTILE = [
    "</script><script>document.title='broken'</script>",
    "\"'><img src=x onerror=\"document.title='broken'\">",
    "a\nb\x00\u202ec\u2066\ud800 &lt;b&gt;",
    "</dialog></table></main><style>*{display:none}</style>" + "x" * 500,
]


@cache
def plain() -> Content:
    return many_classes(example(23, enlarge=1), 40)


@cache
def comparison() -> Content:
    return example(12, compared=True, enlarge=1)


def hostile(content: Content) -> Content:
    """Return the content with a hostile text wherever one comes from outside."""
    names = itertools.cycle(HOSTILE)
    return replace(
        content,
        title=HOSTILE[0],
        facts=tuple((next(names), next(names)) for _ in content.facts),
        classes=tuple(replace(row, name=f"{next(names)} {number}") for number, row in enumerate(content.classes)),
        images=tuple(replace(image, file_name=next(names), image_id=next(names)) for image in content.images),
        training=tuple(replace(curve, name=next(names)) for curve in content.training),
        other=HOSTILE[3] if content.other else "",
    )


def empty() -> Content:
    none = Qualities(pq=Measure(), sq=Measure(), rq=Measure())
    return Content(
        title="Nothing",
        facts=(),
        summary=Summary(all=none, things=none, stuff=none),
        lost={},
        classes=(ClassRow(name="only", is_thing=True, segments=0, pq=math.nan, sq=math.nan, rq=math.nan),),
        images=(),
        num_images=0,
        training=(Curve(name="one", points=((0, math.nan),)),),
        calibration=Calibration(
            expected_error=math.nan,
            maximum_error=math.nan,
            bins=(CalibrationBin(lower=0, upper=1, count=0, score=math.nan, correct=math.nan),),
        ),
    )


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its text outside of scripts and style."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


# ---- numbers and drawings


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (percent(0.56789), "56.8"),
        (percent(math.nan), "–"),
        (percent(1.0), "100.0"),
        (signed(0.0123), "+1.2"),
        (signed(-0.0123), "−1.2"),
        (signed(-0.0001), "0.0"),
        (signed(math.nan), "–"),
        (p_value(0.0004), "< 0.001"),
        (p_value(0.0421), "0.042"),
        (p_value(math.nan), "–"),
    ],
)
def test_how_numbers_are_written(written: str, expected: str) -> None:
    assert written == expected


@pytest.mark.parametrize("largest", [1e-6, 0.7, 1, 3, 4, 17, 56.8, 99.9, 100, 1700, 554_400, 1e9])
def test_ticks_are_few_round_and_reach_the_largest(largest: float) -> None:
    found = ticks(largest)
    assert found[0] == 0
    assert found[-2] < largest <= found[-1] * (1 + 1e-9)
    assert 4 <= len(found) <= 8
    step = found[1] / 10 ** math.floor(math.log10(found[1]) + 1e-9)
    assert any(math.isclose(step, round_number) for round_number in (1, 2, 2.5, 5))
    assert np.allclose(np.diff(found), found[1])


@pytest.mark.parametrize("largest", [0, -1])
def test_ticks_of_nothing(largest: float) -> None:
    assert ticks(largest)[-1] == 1


def test_a_bar_is_as_long_as_what_it_shows() -> None:
    loss = Loss(missed=0.1, merged=0.2, boundary=0.05)
    bars = Elements(loss_bar(loss, kept=0.65)).all("rect")
    assert [bar["class"] for bar in bars] == ["kept", "missed", "merged", "boundary"]
    ends = [(float(bar["x"] or 0), float(bar["width"] or 0)) for bar in bars]
    assert ends == [(0, 65), (65, 10), (75, 20), (95, 5)]
    half = [float(bar["width"] or 0) for bar in Elements(loss_bar(loss, whole=0.7)).all("rect")]
    assert sum(half) == pytest.approx(50, abs=0.02)


def test_a_line_goes_through_its_points() -> None:
    curve = Curve(name="run", points=((0, 0.0), (500, 0.25), (750, math.nan), (1000, 0.5)))
    elements = Elements(line_chart([curve], 'a "title"'))
    [line] = elements.all("polyline")
    places = np.array([[float(part) for part in point.split(",")] for point in (line["points"] or "").split()])
    assert len(places) == 3
    # From the axes: 0 to 1000 and 0 to 50 are the first and the last ticks.
    texts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([\d,]+)</text>', line_chart([curve], ""))
    x_axis = {label: float(x) for x, _, anchor, label in texts if anchor == "middle" or label == "1,000"}
    y_axis = {label: float(y) - 4 for _, y, anchor, label in texts if anchor == "end" and label != "1,000"}
    assert places[:, 0] == pytest.approx(np.interp([0, 500, 1000], [0, 1000], [x_axis["0"], x_axis["1,000"]]), abs=0.1)
    assert places[:, 1] == pytest.approx(np.interp([0, 25, 50], [0, 50], [y_axis["0"], y_axis["50"]]), abs=0.1)
    assert elements.all("svg")[0]["aria-label"] == 'a "title"'


def test_a_reliability_diagram_has_a_bar_for_each_filled_bin() -> None:
    bins = tuple(
        CalibrationBin(lower=part / 4, upper=(part + 1) / 4, count=count, score=part / 4 + 0.1, correct=correct)
        for part, (count, correct) in enumerate([(10, 0.25), (0, math.nan), (5, 0.5), (20, 1.0)])
    )
    bars = Elements(reliability_diagram(Calibration(expected_error=0.1, maximum_error=0.2, bins=bins), "title")).all(
        "rect"
    )
    shares = [float(bar["height"] or 0) for bar in bars if bar["class"] == "share"]
    counts = [float(bar["height"] or 0) for bar in bars if bar["class"] == "count"]
    assert np.divide(shares, shares[-1]) == pytest.approx([0.25, 0.5, 1], abs=0.002)
    assert np.divide(counts, counts[-1]) == pytest.approx([0.5, 0.25, 1], abs=0.002)


# Machado et al., "A physiologically-based model for simulation of color vision deficiency", 2009, severity 1.
DEFICIENCIES = {
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colors_of_causes_are_distinct_to_everybody(deficiency: str) -> None:
    colors = np.array([CAUSE_COLORS[cause] for cause in CAUSES]) / 255
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.array(DEFICIENCIES[deficiency]).T).clip(0, 1)
    xyz = seen @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    ratio = xyz / [0.9505, 1, 1.089]
    root = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    lab = np.stack([116 * root[:, 1] - 16, *(500 * (root[:, :1] - root[:, 1:2])).T, 200 * (root[:, 1] - root[:, 2])], 1)
    # A difference of 2.3 is just noticeable, of 10 is seen at a glance.
    assert min(np.linalg.norm(one - two) for one, two in itertools.combinations(lab, 2)) > 18


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_of_causes_are_seen_on_the_page(scheme: str) -> None:
    assert all(contrast(color, palette(scheme)["page"]) >= 3 for color in CAUSE_COLORS.values())


# ---- the document


def test_the_page_loads_nothing_and_has_one_script() -> None:
    document = page(hostile(comparison())).decode()
    elements = Elements(document)
    addresses = [attributes[name] for _, attributes in elements.found for name in ("src", "href") if name in attributes]
    assert all(address and address.startswith(("data:", "#")) for address in addresses)
    assert "url(" not in document
    assert "@import" not in document
    assert [script for script in elements.all("script") if "type" not in script] == [{}]
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert not [attributes for _, attributes in elements.found if "style" in attributes]  # the policy forbids them


def test_names_from_outside_change_no_element() -> None:
    for content in (plain(), comparison()):
        harmless = [tag for tag, _ in Elements(page(content).decode()).found]
        # Options are sorted by name, but there are as many of them.
        assert [tag for tag, _ in Elements(page(hostile(content)).decode()).found] == harmless
    words = Elements(page(hostile(comparison())).decode()).text
    assert HOSTILE[0] in words
    assert HOSTILE[1] in words
    assert r"a\nb\x00\u202ec\u2066\ud800 &lt;b&gt;" in words


def test_the_summary_and_the_comparison() -> None:
    interval = Interval(low=0.49, high=0.53, confidence=0.9)

    def against(value: float, other: float, low: float, high: float) -> Measure:
        difference = Interval(low=low, high=high, confidence=0.9)
        return Measure(value=value, compared=Compared(other=other, difference=difference, p_value=0.012))

    group = Qualities(pq=Measure(value=0.51, interval=interval), sq=Measure(value=0.7), rq=Measure())
    content = replace(
        empty(),
        other="before",
        summary=Summary(
            all=group,
            things=replace(group, pq=against(0.5, 0.4, 0.02, 0.18)),
            stuff=replace(group, pq=against(0.5, 0.4, -0.02, 0.18)),
            lrp=against(0.6, 0.7, -0.15, -0.05),
            lrp_localization=against(0.3, 0.2, 0.05, 0.15),
        ),
    )
    words = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page(content).decode()))
    assert "90 % interval: 49.0 to 53.0" in words
    assert "All 51.0 49.0 to 53.0 70.0 –" in words
    assert "PQ, things 50.0 40.0 +10.0 +2.0 to +18.0 0.012 better" in words
    assert "PQ, stuff 50.0 40.0 +10.0 −2.0 to +18.0 0.012 LRP" in words  # neither better nor worse
    assert "LRP 60.0 70.0 −10.0 −15.0 to −5.0 0.012 better" in words
    assert "LRP: localization 30.0 20.0 +10.0 +5.0 to +15.0 0.012 worse" in words
    assert "PQ, all classes" not in words  # not compared


def test_losses_are_listed_by_size() -> None:
    content = plain()
    words = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page(content).decode()))
    names: dict[Group, str] = {"all": "All classes", "things": "Things", "stuff": "Stuff"}
    for group, name in names.items():
        sizes = content.lost[group]
        total = sizes.small.total + sizes.medium.total + sizes.large.total
        assert f"{name}: PQ {100 - 100 * total:.1f}, lost {100 * total:.1f}" in words
        parts = (sizes.small, sizes.medium, sizes.large, sizes.total)
        assert f" missed {' '.join(f'{100 * part.missed:.1f}' for part in parts)} wrong class " in words


# ---- in a browser

pytestmark = pytest.mark.timeout(200)

Open = Callable[..., Page]

VISIBLE_IMAGES = "[...document.querySelectorAll('figure')].filter(f => f.offsetParent).map(f => facts.get(f).place)"
VISIBLE_CLASSES = "rows.filter(r => r.offsetParent).map(r => r.cells[0].textContent)"
TABLE_ROWS = "[...table.tBodies[0].rows].map(r => r.cells[0].textContent)"


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Any:
    """Return a function that opens the page of a content, and check at the end that it did not complain."""
    pages: list[Page] = []

    def open_page(content: Content, **options: Any) -> Page:
        file = tmp_path / f"{len(pages)}.html"
        file.write_bytes(page(content))
        pages.append(browser.open(file, **options))
        return pages[-1]

    yield open_page
    complaints = [complaint for each in pages for complaint in each.complaints()]
    for each in pages:
        each.close()
    assert complaints == []


def choose(shown: Page, form: str, **choices: str) -> None:
    for name, value in choices.items():
        shown.evaluate(f"{form}.elements.{name}.value = {value!r}")
    for event in ("input", "change"):
        shown.evaluate(f"{form}.dispatchEvent(new Event('{event}', {{bubbles: true}}))")


def ordered(images: list[int], key: Callable[[ImageEntry], float], content: Content) -> list[int]:
    return sorted(images, key=lambda place: key(content.images[place]))


def test_classes_sort_by_every_column(opened: Open) -> None:
    content = comparison()
    shown = opened(many_classes(content, 9))
    classes = many_classes(content, 9).classes
    keys: dict[str, Callable[[ClassRow], float]] = {
        "PQ": lambda row: row.pq,
        "difference": lambda row: row.pq - row.other_pq,
        "SQ": lambda row: row.sq,
        "RQ": lambda row: row.rq,
        "LRP": lambda row: row.lrp,
        "IoU": lambda row: row.iou,
        "AP": lambda row: row.ap,
        "segments": lambda row: row.segments,
        "largest loss": lambda row: max(row.loss.by_cause.values()),
    }
    heads = shown.evaluate("[...table.tHead.rows[0].cells].map(c => c.textContent)")
    assert heads == ["class", "kind", *keys]
    # As the page comes, the lowest PQ first.
    assert shown.evaluate(TABLE_ROWS) == [row.name for row in sorted(classes, key=lambda row: row.pq)]
    for column, head in enumerate(heads[2:], 2):
        key = keys[head]
        for sign, direction in ((-1, "descending"), (1, "ascending")):
            shown.evaluate(f"table.tHead.rows[0].cells[{column}].firstChild.click()")
            assert shown.evaluate(f"table.tHead.rows[0].cells[{column}].ariaSort") == direction
            found = {row.name: key(row) for row in classes}
            values = [found[name] for name in shown.evaluate(TABLE_ROWS)]
            assert values == sorted(values, key=lambda value: (math.isnan(value), sign * value))  # nan last
        assert shown.evaluate("table.querySelectorAll('[aria-sort]').length") == 1
    shown.evaluate("table.tHead.rows[0].cells[0].firstChild.focus()")
    shown.press("Enter")
    assert shown.evaluate(TABLE_ROWS) == sorted(row.name for row in classes)
    shown.press("Enter")
    assert shown.evaluate(TABLE_ROWS) == sorted((row.name for row in classes), reverse=True)


def test_classes_are_filtered_by_name_and_kind(opened: Open) -> None:
    shown = opened(plain())
    names = {row.name: row.is_thing for row in plain().classes}
    shown.evaluate("classFilter.elements.name.focus()")
    shown.type("S 1")
    assert sorted(shown.evaluate(VISIBLE_CLASSES)) == sorted(name for name in names if "s 1" in name)
    choose(shown, "classFilter", kind="stuff")
    expected = [name for name, is_thing in names.items() if "s 1" in name and not is_thing]
    assert sorted(shown.evaluate(VISIBLE_CLASSES)) == sorted(expected)
    assert shown.evaluate("classFilter.elements.count.value") == f"{len(expected)} of {len(names)} classes"
    choose(shown, "classFilter", name="no such class")
    assert shown.evaluate(VISIBLE_CLASSES) == []


def test_a_class_leads_to_its_images(opened: Open) -> None:
    content = plain()
    shown = opened(content)
    with_link = set(shown.evaluate("[...table.querySelectorAll('[data-class]')].map(a => a.textContent)"))
    shown_classes = {each.class_index for image in content.images for each in image.classes}
    assert with_link == {content.classes[index].name for index in shown_classes}
    shown.evaluate("[...table.querySelectorAll('[data-class]')].find(a => a.textContent === 'disk').click()")
    index = next(index for index, row in enumerate(content.classes) if row.name == "disk")
    having = {place for place, image in enumerate(content.images) if index in {c.class_index for c in image.classes}}
    assert 0 < len(having) < len(content.images)
    assert set(shown.evaluate("listed.map(f => facts.get(f).place)")) == having
    assert shown.evaluate("imageFilter.elements.class.value") == str(index)


def test_orders_and_filters_of_images(opened: Open) -> None:
    content = comparison()
    shown = opened(content)
    everything = list(range(len(content.images)))
    listed = "listed.map(f => facts.get(f).place)"

    def difference(image: ImageEntry) -> float:
        return image.pq - image.other_pq

    orders: dict[str, Callable[[ImageEntry], float]] = {
        "lost": difference,
        "gained": lambda image: -difference(image),
        "worst": lambda image: image.pq,
        "best": lambda image: -image.pq,
    }
    assert shown.evaluate("imageFilter.elements.order.value") == "lost"
    for order, key in orders.items():
        choose(shown, "imageFilter", order=order)
        places = shown.evaluate(listed)
        assert sorted(places) == everything
        values = [key(content.images[place]) for place in places]
        assert values == sorted(values)
        assert shown.evaluate(VISIBLE_IMAGES) == places[:PAGE_SIZE]
    choose(shown, "imageFilter", order="all")
    assert shown.evaluate(listed) == everything
    choose(shown, "imageFilter", order="worst", cause="wrong_class")
    places = shown.evaluate(listed)
    assert set(places) == {place for place in everything if content.images[place].loss.wrong_class > 0}
    assert 0 < len(places) < len(everything)
    lost = [content.images[place].loss.wrong_class for place in places]
    assert lost == sorted(lost, reverse=True)
    for index in range(len(content.classes)):
        choose(shown, "imageFilter", order="worst", **{"cause": "", "class": str(index)})
        found = {
            place: each for place in everything for each in classes_of(content, place) if each.class_index == index
        }
        places = shown.evaluate(listed)
        assert set(places) == set(found)
        assert [found[place].pq for place in places] == sorted(each.pq for each in found.values())
        choose(shown, "imageFilter", cause="missed")
        assert set(shown.evaluate(listed)) == {place for place, each in found.items() if "missed" in each.causes}
    count = shown.evaluate("imageFilter.elements.count.value")
    assert count == f"{len(shown.evaluate(listed))} of {len(everything)} images, by points lost to this error"


def classes_of(content: Content, place: int) -> tuple[ClassOfImage, ...]:
    return content.images[place].classes


def test_images_come_in_pages_and_only_those_shown_are_decoded(opened: Open) -> None:
    content = plain()
    shown = opened(content)
    worst = sorted(range(23), key=lambda place: content.images[place].pq)
    decoded = "[...container.querySelectorAll('img')].filter(i => i.hasAttribute('src')).length"
    output = "pages.querySelector('output').value"
    assert shown.evaluate(VISIBLE_IMAGES) == worst[:10]
    assert shown.evaluate(output) == "1 to 10 of 23"
    assert shown.evaluate(decoded) == 40
    assert shown.evaluate("pages.querySelector('[name=previous]').disabled")
    for first, last in ((10, 20), (20, 23)):
        shown.evaluate("pages.querySelector('[name=next]').click()")
        assert shown.evaluate(VISIBLE_IMAGES) == worst[first:last]
        assert shown.evaluate(output) == f"{first + 1} to {last} of 23"
        assert shown.evaluate(decoded) == 4 * last
    assert shown.evaluate("pages.querySelector('[name=next]').disabled")
    shown.evaluate("pages.querySelector('[name=previous]').click()")
    assert shown.evaluate(VISIBLE_IMAGES) == worst[10:20]
    # Each picture is the one given.
    addresses = shown.evaluate(
        "figures.map(f => [facts.get(f).place, [...f.querySelectorAll('img')].map(i => [i.alt, i.src])])"
    )
    for place, pictures in addresses:
        image = content.images[place]
        assert [base64.b64decode(source.split(",")[1]) for _, source in pictures] == list(image.pictures.values())
        assert all(str(image.image_id) in words for words, _ in pictures)
    sizes = "Promise.all([...container.querySelectorAll('img')].map(i => i.decode().then(() => i.naturalWidth > 30)))"
    assert all(shown.evaluate(sizes))
    choose(shown, "imageFilter", **{"class": "0"})
    assert shown.evaluate("start") == 0  # a filter begins at its first page


def test_the_viewer_is_driven_by_keys(opened: Open) -> None:
    content = plain()
    shown = opened(content)
    worst = sorted(range(23), key=lambda place: content.images[place].pq)
    jpegs = [list(content.images[place].pictures.values()) for place in worst]

    def seen() -> bytes:
        return base64.b64decode(shown.evaluate("viewer.querySelector('img').src.split(',')[1]"))

    listed = "listed[8].querySelector('[data-picture=truth]')"
    shown.evaluate(f"{listed}.focus()")
    shown.press("Enter")
    assert shown.evaluate("viewer.open")
    assert seen() == jpegs[8][1]
    shown.press("ArrowRight")
    shown.press("ArrowRight")
    assert seen() == jpegs[10][1]  # on the next page
    for number in (1, 2, 3, 4):
        shown.press(str(number))
        assert seen() == jpegs[10][number - 1]
        pressed = "[...viewer.querySelectorAll('[aria-pressed=true]')].map(b => b.textContent)"
        assert shown.evaluate(pressed) == [f"{number} {('Input', 'Ground truth', 'Prediction', 'Errors')[number - 1]}"]
    shown.press("9")
    assert seen() == jpegs[10][3]
    assert content.images[worst[10]].file_name in shown.evaluate("viewer.textContent")
    shown.press("Escape")
    assert not shown.evaluate("viewer.open")
    # The viewer opens again at the image that it showed last.
    assert shown.evaluate(VISIBLE_IMAGES) == worst[10:20]
    assert shown.evaluate("document.activeElement.alt || document.activeElement.dataset.picture") == "errors"
    shown.press("Enter")
    for _ in range(30):
        shown.press("ArrowRight")
    assert seen() == jpegs[22][3]  # the last
    for _ in range(30):
        shown.press("ArrowLeft")
    assert seen() == jpegs[0][3]
    shown.evaluate("viewer.querySelector('[name=next]').click()")
    assert seen() == jpegs[1][3]
    shown.evaluate("viewer.querySelector('[name=close]').click()")
    assert not shown.evaluate("viewer.open")


def test_the_viewer_shows_the_other_prediction_where_there_is_one(opened: Open) -> None:
    content = comparison()
    first = min(range(12), key=lambda place: content.images[place].pq - content.images[place].other_pq)
    images = [replace(image, other=None) if place != first else image for place, image in enumerate(content.images)]
    shown = opened(replace(content, images=tuple(images)))
    shown.evaluate("listed[0].querySelector('[data-picture=other]').click()")
    other = "viewer.querySelector('[name=other]').disabled"
    assert not shown.evaluate(other)
    shown.press("ArrowRight")
    assert shown.evaluate(other)
    assert shown.evaluate("viewer.querySelector('[aria-pressed=true]').name") == "prediction"


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("named", [lambda content: content, hostile], ids=["harmless", "hostile"])
def test_nothing_is_wider_than_the_window(opened: Open, width: int, named: Callable[[Content], Content]) -> None:
    content = named(comparison())
    shown = opened(content, width=width, height=780, phone=width == 360)
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    assert shown.evaluate("innerWidth") == width
    assert shown.evaluate("document.title") == ("Evaluation of demo" if content.title[0] == "E" else HOSTILE[0])
    shown.evaluate("listed[0].querySelector('[data-picture]').click()")
    assert shown.evaluate("viewer.scrollWidth <= viewer.clientWidth")
    shown.press("Escape")
    across = shown.evaluate(
        "new Set([...listed[0].querySelectorAll('img')].map(i => i.getBoundingClientRect().left)).size"
    )
    assert across == (1 if width == 360 else 5)  # stacked, or side by side
    choose(shown, "classFilter", name="" if content.title[0] == "E" else "onerror")
    expected = [row.name for row in content.classes if content.title[0] == "E" or "onerror" in row.name]
    assert sorted(shown.evaluate(VISIBLE_CLASSES)) == sorted(expected)


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_follows_the_scheme_of_the_system(opened: Open, dark: bool) -> None:
    shown = opened(plain(), dark=dark)
    colors = palette("dark" if dark else "light")
    for element, role in (("document.body", "page"), ("document.querySelector('#classes thead th')", "page")):
        found = shown.evaluate(f"getComputedStyle({element}).backgroundColor")
        assert found == "rgb({}, {}, {})".format(*colors[role])
    assert shown.evaluate("getComputedStyle(document.body).color") == "rgb({}, {}, {})".format(*colors["text"])
    cause = shown.evaluate("getComputedStyle(document.querySelector('rect.missed')).fill")
    assert cause == "rgb({}, {}, {})".format(*CAUSE_COLORS["missed"])


def test_tables_and_the_first_images_need_no_script(opened: Open, browser: Browser) -> None:
    shown = opened(plain(), javascript=False)
    shown.call("Emulation.setScriptExecutionDisabled", value=False)  # to look at it
    assert shown.evaluate("typeof listed") == "undefined"
    assert shown.evaluate("[...document.forms].filter(f => f.offsetParent).length") == 0
    assert shown.evaluate("document.querySelectorAll('#classes tbody tr').length") == len(plain().classes)
    visible = "[...document.querySelectorAll('figure')].filter(f => f.offsetParent)"
    assert shown.evaluate(f"{visible}.length") == PAGE_SIZE
    assert shown.evaluate(f"{visible}.every(f => [...f.querySelectorAll('img')].every(i => i.naturalWidth > 30))")


def test_print_has_no_controls(opened: Open) -> None:
    shown = opened(plain(), dark=True)
    shown.call("Emulation.setEmulatedMedia", media="print")
    assert shown.evaluate("[...document.querySelectorAll('form, nav')].filter(f => f.offsetParent).length") == 0
    assert shown.evaluate(
        "document.querySelector('.tall').scrollHeight === document.querySelector('.tall').clientHeight"
    )


def test_an_evaluation_of_nothing_has_a_page(opened: Open) -> None:
    shown = opened(empty())
    assert shown.evaluate(VISIBLE_CLASSES) == ["only"]
    words = shown.evaluate("document.body.innerText")
    assert "nan" not in words
    assert "None" not in words
