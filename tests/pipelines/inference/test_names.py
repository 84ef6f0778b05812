"""Names of outputs stay below their folder and differ whenever their pictures do."""

import os
import posixpath

from hypothesis import given
from hypothesis import strategies as st

from pipelines.inference.names import common_folder, output_name, parts_of

PART = st.one_of(
    st.sampled_from(
        ["..", ".", "%2E", "a", "a.jpg", "a.png", "A", "%", "a\nb", "\x1b[31m", "~", " ", "\udcff", "x" * 300]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=8),
)
PATH = st.lists(PART, min_size=1, max_size=4).map(tuple)


@given(st.sets(PATH, min_size=2, max_size=30))
def test_names_are_safe_and_differ(paths: set[tuple[str, ...]]) -> None:
    sources = ["s3://bucket/" + "/".join(path) for path in paths]
    base = parts_of("s3://bucket")
    names = {output_name(source, base) for source in sources}
    assert len(names) == len(sources)
    for name in names:
        assert name.isprintable()
        assert posixpath.normpath(name) == name
        assert not name.startswith("/")
        assert ".." not in name.split("/")
        assert all(0 < len(os.fsencode(part)) <= 200 for part in name.split("/"))


def test_ordinary_names_are_kept() -> None:
    base = common_folder([parts_of("/data/photos/2024"), parts_of("/data/photos/2025")])
    assert output_name("/data/photos/2024/Été 1.jpg", base) == "2024/Été 1.jpg"
    assert output_name("s3://bucket/photos/a.jpg", parts_of("s3://bucket/photos")) == "a.jpg"
    everything = common_folder([parts_of("/data"), parts_of("s3://bucket/data")])
    assert {output_name("/data/a.jpg", everything), output_name("s3://bucket/data/a.jpg", everything)} == {
        "%/data/a.jpg",
        "s3%3A/bucket/data/a.jpg",
    }
