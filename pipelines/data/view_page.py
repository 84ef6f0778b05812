"""The page of pictures: one HTML file. Its script reads no text from outside."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from pipelines.page import document, fact_list, jpeg_address, text

_STYLE = """
h2 { font-size: 1.15rem; margin: 1.5rem 0 -.3rem; }
h3 { font-size: 1rem; margin: 1rem 0 -.3rem; color: var(--faint); font-weight: 600; }
form { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center;
  margin: .8rem -1rem 0; padding: .6rem 1rem; background: var(--page); border-bottom: 1px solid var(--line); }
select { padding: .3rem; }
label { padding: .3rem 0; }
.grid { display: grid; gap: 1rem; margin-top: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
figure img { display: block; width: 100%; height: auto; }
figcaption { padding: .6rem .8rem; }
figcaption ul { list-style: none; margin: .4rem 0 0; padding: 0; font-size: .85rem; }
figcaption li { display: flex; justify-content: space-between; gap: 1rem; }
figcaption li span:last-child { color: var(--faint); white-space: nowrap; }
.note { color: var(--warning); }
.plain, .as-it-is .overlay { display: none !important; }
.as-it-is .plain { display: block !important; }
"""

_SCRIPT = """
const figures = [...document.querySelectorAll("figure")];
const form = document.querySelector("form");
function update() {
  const chosen = form.elements.class.value;
  document.body.classList.toggle("as-it-is", !form.elements.overlay.checked);
  let shown = 0;
  for (const figure of figures) {
    figure.hidden = chosen !== "" && !figure.dataset.classes.split(" ").includes(chosen);
    shown += figure.hidden ? 0 : 1;
  }
  for (const section of document.querySelectorAll("section"))
    section.hidden = !section.querySelector("figure:not([hidden])");
  form.elements.count.value = shown + " of " + figures.length + " pictures";
}
form.addEventListener("change", update);
form.addEventListener("submit", event => event.preventDefault());
form.hidden = false;
update();
"""


@dataclass(frozen=True, kw_only=True)
class ClassPixels:
    """How much of a picture is of one class."""

    class_index: int
    crowd: bool
    segments: int
    pixels: int


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with what its caption says."""

    part: tuple[str, str]
    """Headings of the part of the page that it is in; figures of one part follow one another."""
    plain: bytes
    """JPEG without the segments."""
    overlay: bytes
    """JPEG with the segments."""
    png: str
    """Name of the file beside the page."""
    position: int | None
    epoch: int | None
    image_id: int
    file_name: str
    original: tuple[int, int]
    """Height and width of the image in the data set."""
    shown: tuple[int, int]
    """Height and width as drawn, before the picture was made smaller or larger."""
    classes: tuple[ClassPixels, ...]
    void: int
    """Pixels of no segment."""
    note: str


def page(title: str, facts: Sequence[tuple[str, str]], names: Sequence[str], figures: Sequence[Figure]) -> bytes:
    """Return the HTML of a page with these figures.

    Args:
        facts: name and value of each line on top.
        names: class names by class index.
    """
    found = sorted({each.class_index for figure in figures for each in figure.classes}, key=lambda index: names[index])
    options = "".join(f'<option value="{index}">{text(names[index])}</option>' for index in found)
    body = [
        f"<h1>{text(title)}</h1>",
        *fact_list(facts),
        "<form hidden>",
        f'<label>Class <select name="class"><option value="">all</option>{options}</select></label>',
        '<label><input type="checkbox" name="overlay" checked> Segments</label>',
        '<output name="count"></output>',
        "</form>",
        *_sections(figures, names),
    ]
    return document(title, body, style=_STYLE, script=_SCRIPT)


def _sections(figures: Sequence[Figure], names: Sequence[str]) -> Iterator[str]:
    for part, under_part in groupby(figures, key=lambda figure: figure.part[0]):
        yield "<section>"
        if part:
            yield f"<h2>{text(part)}</h2>"
        for subpart, under_subpart in groupby(under_part, key=lambda figure: figure.part[1]):
            yield "<section>"
            if subpart:
                yield f"<h3>{text(subpart)}</h3>"
            yield '<div class="grid">'
            for figure in under_subpart:
                yield from _lines(figure, names)
            yield "</div></section>"
        yield "</section>"


def _lines(figure: Figure, names: Sequence[str]) -> Iterator[str]:
    total = figure.shown[0] * figure.shown[1]
    shown = " ".join(sorted({str(each.class_index) for each in figure.classes}))
    facts = [f"image {figure.image_id}"]
    if figure.position is not None:
        facts = [f"position {figure.position}", f"epoch {figure.epoch}", *facts]
    sizes = f"{figure.original[1]} × {figure.original[0]}"
    if figure.position is not None:
        sizes += f" → {figure.shown[1]} × {figure.shown[0]}"
    yield f'<figure data-classes="{shown}">'
    for kind, content in (("overlay", figure.overlay), ("plain", figure.plain)):
        what = "with segments" if kind == "overlay" else "without segments"
        yield f'<img class="{kind}" alt="image {figure.image_id} {what}" src="{jpeg_address(content)}">'
    yield f"<figcaption><strong>{text(', '.join(facts))}</strong><br>{text(figure.file_name)}<br>"
    yield f'{text(sizes)} pixels<br><a href="{text(figure.png)}">{text(figure.png)}</a>'
    if figure.note:
        yield f'<br><span class="note">{text(figure.note)}</span>'
    yield "<ul>"
    for each in sorted(figure.classes, key=lambda each: -each.pixels):
        name = text(names[each.class_index]) + (" (crowd)" if each.crowd else "")
        times = f" × {each.segments}" if each.segments > 1 else ""
        yield f"<li><span>{name}{times}</span><span>{_share(each.pixels, total)}</span></li>"
    if figure.void:
        yield f"<li><span>void</span><span>{_share(figure.void, total)}</span></li>"
    yield "</ul></figcaption></figure>"


def _share(pixels: int, total: int) -> str:
    return f"{pixels:,} px, {pixels / total:.1%}"
