"""What all pages share: text from outside is text, nothing is loaded, and everything can be read."""

import re

import pytest

from pipelines.page import STYLE, document, text


def luminance(color: tuple[float, ...]) -> float:
    """Relative luminance of an sRGB color in 0..255, as WCAG 2.2 defines it."""
    parts = [part / 255 for part in color]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: tuple[float, ...], two: tuple[float, ...]) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def palette(scheme: str) -> dict[str, tuple[int, ...]]:
    """Return the colors of the style in the light or the dark scheme."""
    light, dark = (re.findall(r"--(\w+): #(\w+)", part) for part in STYLE.split("@media")[:2])
    found = dict(light) | (dict(dark) if scheme == "dark" else {})
    whole = {name: value if len(value) == 6 else "".join(2 * digit for digit in value) for name, value in found.items()}
    return {name: tuple(bytes.fromhex(value)) for name, value in whole.items()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_have_the_contrast_that_wcag_asks_for(scheme: str) -> None:
    colors = palette(scheme)
    for name in ("text", "faint", "accent", "warning"):
        assert contrast(colors[name], colors["page"]) >= 4.5, name
        assert contrast(colors[name], colors["card"]) >= 4.5, name
    assert contrast(colors["control"], colors["page"]) >= 3  # outlines of controls


@pytest.mark.parametrize(
    ("outside", "expected"),
    [
        ("<b> & \"quoted\" 'too'", "&lt;b&gt; &amp; &quot;quoted&quot; &#x27;too&#x27;"),
        ("a\nb\x00\u202e\ud800", r"a\nb\x00\u202e\ud800"),
        ("猫 é", "猫 é"),
        (7, "7"),
    ],
)
def test_text_is_neither_markup_nor_control(outside: object, expected: str) -> None:
    assert text(outside) == expected


def test_a_document_has_the_hash_of_its_script_and_style_only() -> None:
    page = document("<title>", ["<p>body"], style="p { color: red }", script="1", after=["<p>after"]).decode()
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)
    assert policy
    # echo -n 1 | openssl dgst -sha256 -binary | base64
    assert "script-src 'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s='" in policy[1]
    assert policy[1].startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy[1]
    assert page.index("<p>body") < page.index("<script>1</script>") < page.index("<p>after")
    assert "<title>&lt;title&gt;</title>" in page
