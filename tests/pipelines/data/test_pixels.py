import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from maskformer import image_files
from maskformer.image_files import TooLargeError, open_image, rgb_pixels
from maskformer.images import read_image
from maskformer.taxonomy import Taxonomy
from pipelines.data import pixels
from pipelines.data.coco import Segment
from pipelines.data.pixels import (
    _decode_jpeg,
    compress_index_map,
    decode_image,
    decode_panoptic,
    decompress_index_map,
    index_map,
    pixel_runs,
)
from tests.pipelines.data.coco_folder import CATEGORIES, OTHER_STUFF, OTHER_THING, STUFF, THING, ids_to_rgb
from tests.security.hostile_files import BOMBS, OTHER_BOMBS, chunk, jpeg_of_scans, png

TAXONOMY = Taxonomy.from_coco(CATEGORIES)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def test_gray_becomes_rgb():
    gray = np.full((9, 7), 77, np.uint8)
    image = decode_image(encoded(Image.fromarray(gray), "JPEG"))
    assert image.dtype == np.uint8
    assert image.shape == (9, 7, 3)
    assert (image == 77).all()


def test_cmyk_becomes_rgb():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    red, green, blue = decode_image(encoded(cmyk, "JPEG", quality=95))[8, 8]
    assert red > 200
    assert max(green, blue) < 60


def test_exif_orientation_is_not_applied():
    turned = Image.Exif()
    turned[0x0112] = 6
    assert decode_image(encoded(Image.new("RGB", (30, 20)), "JPEG", exif=turned)).shape == (20, 30, 3)


def test_decoded_image_can_be_written_to():
    decode_image(encoded(Image.new("RGB", (4, 4)), "PNG"))[0, 0, 0] = 1


def test_broken_files_are_refused():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind, decode in (("JPEG", decode_image), ("PNG", decode_panoptic)):
        content = encoded(noise, kind)
        for broken in (b"", b"hello", content[: len(content) // 2]):
            with pytest.raises(ValueError, match="cannot be decoded"):
                decode(broken)
    content = bytearray(encoded(noise, "PNG"))
    content[len(content) // 2] ^= 1
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_panoptic(bytes(content))


def slow_decode(content: bytes) -> np.ndarray | None:
    """Pillow's pixels; None if it refuses the file."""
    try:
        return np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None


def random_jpeg(rng: np.random.Generator) -> bytes:
    """Encode noise, smooth or not, of a random size, gray or in color, with random options."""
    size = tuple(rng.integers(1, 70, 2).tolist())
    gray = rng.random() < 0.2
    image = Image.fromarray(rng.integers(0, 256, size if gray else (*size, 3), dtype=np.uint8))
    if rng.random() < 0.5:
        image = image.resize((2 * size[1], 2 * size[0]))
    options = {} if gray else {"subsampling": int(rng.integers(3))}
    if rng.random() < 0.3:
        options["restart_marker_blocks"] = int(rng.integers(1, 9))
    quality, progressive = int(rng.integers(1, 101)), bool(rng.random() < 0.3)
    return encoded(image, "JPEG", quality=quality, progressive=progressive, **options)


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut the content, or change, remove or insert bytes, half of the time near the header."""
    place = int(rng.integers(min(len(content), 700 if rng.random() < 0.5 else len(content))))
    some = rng.bytes(int(rng.integers(1, 9)))
    kinds = [
        content[:place],
        content[: -int(rng.integers(1, 12))],
        content[:place] + some + content[place:],
        content[:place] + some + content[place + len(some) :],
        content[:place] + content[place + len(some) :],
        content + some,
    ]
    return kinds[rng.integers(len(kinds))]


@pytest.mark.parametrize("seed", range(4))
def test_images_are_decoded_and_refused_as_by_pillow(seed):
    rng = np.random.default_rng(seed)
    refused = 0
    for _ in range(60):
        whole = random_jpeg(rng)
        fast, slow = _decode_jpeg(whole), slow_decode(whole)
        assert fast is not None
        assert slow is not None
        assert np.array_equal(fast, slow)
        for _ in range(5):
            content = damaged(whole, rng)
            expected = slow_decode(content)
            if expected is None:
                refused += 1
                with pytest.raises(ValueError, match="cannot be decoded"):
                    decode_image(content)
            else:
                assert np.array_equal(decode_image(content), expected)
    assert 60 < refused < 240


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.new("CMYK", (16, 16)), "JPEG"),
        encoded(Image.new("RGB", (16, 16)), "JPEG", keep_rgb=True),
        encoded(Image.new("RGB", (16, 16)), "PNG"),
        encoded(Image.new("RGB", (16, 16)), "JPEG")[:-2],
        b"\xff\xd8\xff",
    ],
    ids=["CMYK", "RGB", "PNG", "truncated", "start"],
)
def test_other_content_is_left_to_pillow(content):
    assert _decode_jpeg(content) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch, kind):
    """By the header alone. WebP takes twice the memory, so half of the pixels."""
    start = encoded(Image.new("RGB", (8000, 7000)), kind)
    start = start if kind == "WEBP" else start[:700]
    with pytest.raises(ValueError, match=r"cannot be decoded \(it has 8000 x 7000 pixels, more than [25]"):
        decode_image(start)
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    with pytest.raises(ValueError, match="8000 x 7000"):
        decode_image(start)


def test_a_large_image_is_converted_in_parts(monkeypatch):
    """The parts together are what Pillow gives for the whole."""
    rng = np.random.default_rng(0)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        noise = Image.fromarray(rng.integers(0, 256, (37, 23, 4), dtype=np.uint8), "RGBA").convert("RGB").convert(mode)
        for band in (1, 50, 10**6):
            monkeypatch.setattr(image_files, "_BAND", band)
            assert np.array_equal(rgb_pixels(noise), np.asarray(noise.convert("RGB"))), (mode, band)
    ids = rng.integers(0, 2**24, (37, 23)).astype(np.int32)
    for band in (1, 50, 10**6):
        monkeypatch.setattr(pixels, "_BAND", band)
        assert np.array_equal(decode_panoptic(encoded(Image.fromarray(ids_to_rgb(ids)), "PNG")), ids)


def test_gray_of_16_bits_is_refused_not_saturated():
    with pytest.raises(ValueError, match="more than 8 bits per channel"):
        decode_image(encoded(Image.new("I;16", (8, 8), 700), "PNG"))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "DDS", "AVIF", "EPS", "PPM"])
def test_other_formats_are_named_and_their_decoders_not_started(kind):
    content = encoded(Image.new("RGB", (16, 16)), kind)
    with pytest.raises(ValueError, match="no image format" if kind == "PPM" else f"it is {kind}, not JPEG, PNG, WEBP"):
        decode_image(content)
    with pytest.raises(ValueError, match="no image format" if kind == "PPM" else f"it is {kind}, not PNG"):
        decode_panoptic(content)


def test_a_panoptic_map_of_another_size_is_refused_before_it_is_decoded():
    content = encoded(Image.new("RGB", (9, 5)), "PNG")
    assert decode_panoptic(content, (5, 9)).shape == (5, 9)
    with pytest.raises(ValueError, match="the PNG is 9 x 5, but its image 5 x 9"):
        decode_panoptic(content[:60], (9, 5))


def test_a_map_without_runs_is_refused(monkeypatch):
    ids = np.arange(60, dtype=np.int32).reshape(6, 10)
    assert len(pixel_runs(ids)[2].x) == 60
    monkeypatch.setattr(pixels, "MAX_RUNS", 59)
    with pytest.raises(ValueError, match="it has 60 runs of equal ids, more than 59"):
        pixel_runs(ids)


def test_a_jpeg_of_many_scans_is_refused():
    """A progressive JPEG of ten scans is repeated scan by scan; a motion photo has such bytes behind its picture."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    scan = content[last:-2]
    few, many = content[:last] + scan * 80 + content[-2:], content[:last] + scan * 120 + content[-2:]
    assert decode_image(few).shape == (64, 64, 3)
    for decode in (decode_image, read_image):
        with pytest.raises(ValueError, match="is a JPEG of more than 100 scans"):
            decode(many)
    for whole in (content, encoded(noise, "JPEG"), encoded(noise, "JPEG", comment=b"\xff\xda" * 200)):
        assert np.array_equal(decode_image(whole + b"\xff\xda\0\0" * 500), decode_image(whole))


@pytest.mark.parametrize(
    "name", [name for name in BOMBS if "empty" in name or "without a length" in name] + ["GIF of comments of one byte"]
)
def test_a_file_of_too_many_parts_is_refused(name):
    content = {**BOMBS, **OTHER_BOMBS}[name]()
    with pytest.raises(TooLargeError, match="has more than 200,000 parts"):
        open_image(content)


def test_a_large_jpeg_may_have_fewer_scans():
    open_image(jpeg_of_scans(10, 7200, 7200))
    with pytest.raises(TooLargeError, match="is a JPEG of more than 20 scans"):
        open_image(jpeg_of_scans(12, 7200, 7200))


def test_panoptic_ids_use_all_24_bits():
    ids = np.array([[0, 1, 255], [256, 65535, 65536], [2**24 - 1, 7 + 256 * 8 + 65536 * 9, 3]])
    decoded = decode_panoptic(encoded(Image.fromarray(ids_to_rgb(ids)), "PNG"))
    assert decoded.dtype == np.int32
    assert np.array_equal(decoded, ids)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_panoptic_must_be_an_rgb_png(mode):
    with pytest.raises(ValueError, match=f"PNG of mode {mode} with [0-9]+ bits, not a PNG of mode RGB with 8 bits"):
        decode_panoptic(encoded(Image.new(mode, (8, 8)), "PNG"))


@pytest.mark.parametrize("first", [b"", png(32, 24)[8:33], chunk(b"abCd", bytes([8] * 13))])
def test_panoptic_must_not_have_16_bits_wherever_its_header_is(first):
    content = png(32, 24, depth=16)
    with pytest.raises(ValueError, match="PNG of mode RGB with 16 bits"):
        decode_panoptic(content[:8] + first + content[8:])


def test_panoptic_must_not_be_a_jpeg():
    with pytest.raises(ValueError, match="it is JPEG, not PNG"):
        decode_panoptic(encoded(Image.new("RGB", (8, 8)), "JPEG"))


def slow_index_map(ids, segments):
    """Build one mask after the other, following the definition."""
    result, classes = np.zeros(ids.shape, np.uint16), []
    targets = []
    for segment in segments:
        if not segment["iscrowd"] and segment["category_id"] in (THING, OTHER_THING):
            targets.append((TAXONOMY.class_index(segment["category_id"]), ids == segment["id"]))
    for class_index in range(TAXONOMY.num_classes):
        if TAXONOMY.is_thing(class_index):
            continue
        mask = np.zeros(ids.shape, bool)
        for segment in segments:
            if not segment["iscrowd"] and segment["category_id"] == TAXONOMY.category_id(class_index):
                mask |= ids == segment["id"]
        targets.append((class_index, mask))
    for class_index, mask in targets:
        if mask.any():
            classes.append(class_index)
            result[mask] = len(classes)
    return result, classes


@pytest.mark.parametrize("seed", range(40))
def test_index_map_equals_the_definition(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 14))
    identifiers = (rng.choice(2**24 - 1, count, replace=False) + 1).tolist()
    segments = [
        Segment(
            id=identifier,
            category_id=int(rng.choice([THING, OTHER_THING, STUFF, OTHER_STUFF])),
            iscrowd=bool(rng.random() < 0.2),
        )
        for identifier in identifiers
    ]
    shape = tuple(rng.integers(1, 12, 2))
    ids = rng.choice([0, *identifiers], shape).astype(np.int32)  # some segments get no pixel
    found, classes = index_map(ids, segments, TAXONOMY)
    expected, expected_classes = slow_index_map(ids, segments)
    assert found.dtype == np.uint16
    assert classes.dtype == np.int16
    assert np.array_equal(found, expected)
    assert classes.tolist() == expected_classes


@pytest.mark.parametrize("count", [2**16 - 1, 2**16])
def test_an_index_map_numbers_65535_segments(count):
    ids = np.zeros((256, 257), np.int32)
    ids.ravel()[:count] = np.arange(1, count + 1)
    segments = [Segment(id=identifier, category_id=THING, iscrowd=False) for identifier in range(1, count + 1)]
    if count < 2**16:
        found, classes = index_map(ids, segments, TAXONOMY)
        assert np.array_equal(found, ids)
        assert len(classes) == count
    else:
        with pytest.raises(ValueError, match="it has 65536 segments, but an index map can number 65535"):
            index_map(ids, segments, TAXONOMY)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (6, 5)])
def test_runs_reproduce_the_map_and_stay_within_rows(shape):
    ids = np.random.default_rng(1).integers(0, 3, shape).astype(np.int32)
    values, which, runs = pixel_runs(ids)
    painted = np.full(shape, -1)
    for value, y, x, length in zip(values[which], runs.y, runs.x, runs.length, strict=True):
        assert x + length <= shape[1]
        painted[y, x : x + length] = value
    assert np.array_equal(painted, ids)


@pytest.mark.parametrize(("count", "item"), [(0, 1), (255, 1), (256, 2), (65535, 2)])
def test_an_index_map_is_stored_in_the_smallest_type(count: int, item: int):
    plane = np.random.default_rng(count).integers(0, count, (31, 47), dtype=np.uint16, endpoint=True)
    content = compress_index_map(plane, count)
    found = decompress_index_map(content, (31, 47), count)
    assert found.dtype.itemsize == item
    np.testing.assert_array_equal(found, plane)


@pytest.mark.parametrize("size", [(31, 46), (31, 48), (32, 47), (0, 0)])
def test_an_index_map_of_another_size_is_refused(size: tuple[int, int]):
    content = compress_index_map(np.ones((31, 47), np.uint16), 1)
    with pytest.raises(ValueError, match=f"not one of {size[1]} x {size[0]} pixels"):
        decompress_index_map(content, size, 1)


@pytest.mark.parametrize("content", [b"", b"no zstd", compress_index_map(np.ones((4, 4), np.uint16), 1)[:-2]])
def test_a_broken_index_map_is_refused(content: bytes):
    with pytest.raises(ValueError, match="not one of 4 x 4 pixels"):
        decompress_index_map(content, (4, 4), 1)
