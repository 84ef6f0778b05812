"""Frames of videos, upright, through PyAV, which the extra `video` installs."""

import itertools
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from maskformer.image_files import MAX_PIXELS, reason_of
from maskformer.images import UnreadableImageError
from maskformer.untrusted import open_regular
from pipelines.errors import UserError
from pipelines.storage import is_remote

_OPTIONS = {
    "protocol_whitelist": "none",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegvideo,mpegts",
}
"""A playlist under the name of a video could make ffmpeg open other files and addresses. Of ffmpeg's 300 formats, only
those of `inputs.VIDEOS` are read."""


def require_decoder() -> None:
    """Check that videos can be read.

    Raises:
        UserError: PyAV is not installed.
    """
    try:
        import av  # noqa: F401  # an extra
    except ImportError as error:
        raise UserError("Videos need PyAV. Install it: pip install 'maskformer-ray[video]'.") from error


def frames(file: BinaryIO, name: str, every: int) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Yield number and RGB pixels [H, W, 3] of each `every`-th frame of a video, from frame 0 on.

    Args:
        name: for messages.

    Raises:
        UnreadableImageError: it is no video, or damaged.
    """
    import av  # an extra

    with file:
        try:
            with av.open(file, "r", options=_OPTIONS) as container:
                if not container.streams.video:
                    raise UnreadableImageError(f"{name} has no pictures. Give a video.")
                stream = container.streams.video[0]
                # The size may change from frame to frame; libavcodec checks it before it takes memory.
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
                if stream.width * stream.height > MAX_PIXELS:
                    raise UnreadableImageError(f"{name} has {stream.width} x {stream.height} pixels. Make it smaller.")
                for number, frame in zip(itertools.count(), container.decode(stream), strict=False):
                    if number % every == 0:
                        yield number, _upright(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8), frame.rotation)
        except UnreadableImageError:
            raise
        except Exception as error:  # PyAV raises many types for a damaged file
            raise UnreadableImageError(
                f"{name} cannot be decoded ({reason_of(error)}). Replace it by an undamaged copy."
            ) from error


def expected_frames(source: str, every: int) -> int:
    """Return about how many frames of a local video will be segmented; 1 if it does not say or is remote."""
    import av  # an extra
    from av.error import FFmpegError

    if is_remote(source):
        return 1
    try:
        with open_regular(source) as file, av.open(file, "r", options=_OPTIONS) as container:
            return max(1, -(-container.streams.video[0].frames // every))
    except (FFmpegError, OSError, ValueError, IndexError):
        return 1


def _upright(pixels: npt.NDArray[np.uint8], rotation: int) -> npt.NDArray[np.uint8]:
    """Turn a frame by the degrees, counterclockwise, that its display matrix states."""
    return np.ascontiguousarray(np.rot90(pixels, round(rotation / 90) % 4))
