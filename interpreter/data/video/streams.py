"""Chooses the video among the streams of a container."""

from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

# Cover art, thumbnails of chapters, stills, and parts of another stream's picture (the tiles of an HEIC image).
_NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image | Disposition.dependent


def choose_stream(container: InputContainer) -> VideoStream:
    """The stream that is the video.

    Cover art, thumbnails, tiles and streams of an unknown codec are never chosen. If several streams remain, the
    packets of all are read, and streams that are shorter than half of the longest, such as a single picture, are
    dropped. Of the others, the stream that the container marks as default is chosen, then the largest, then the first.

    Args:
        container: just opened. Its read position afterwards depends on its streams.

    Raises:
        ValueError: if no stream is a video.
    """
    candidates = _candidates(container)
    if len(candidates) > 1:
        lengths = _lengths(container, candidates)
        candidates = [stream for stream in candidates if 2 * lengths[stream.index] >= max(lengths.values())]
    return _preferred(candidates)


def choose_unread_stream(container: InputContainer) -> VideoStream:
    """Like :func:`choose_stream`, but nothing is read, because a pipe can be read only once. So lengths are ignored.

    Raises:
        ValueError: if no stream is a video.
    """
    return _preferred(_candidates(container))


def _candidates(container: InputContainer) -> list[VideoStream]:
    streams = [stream for stream in container.streams.video if stream.codec_context]  # None: FFmpeg lacks the codec
    if container.format.name == "tty" or not streams:
        raise ValueError("holds no video stream that FFmpeg decodes")
    candidates = [stream for stream in streams if not stream.disposition & _NO_VIDEO]
    if not candidates:
        raise ValueError("holds only cover art, thumbnails or the tiles of an image, no video")
    return candidates


def _preferred(candidates: list[VideoStream]) -> VideoStream:
    return max(
        candidates,
        key=lambda stream: (bool(stream.disposition & Disposition.default), stream.width * stream.height),
    )


def _lengths(container: InputContainer, streams: list[VideoStream]) -> dict[int, float]:
    """Seconds from the first to the last picture, by index of the stream; 0 for a single picture."""
    times: dict[int, list[float]] = {stream.index: [] for stream in streams}
    for packet in container.demux(streams):
        if packet.size:
            time = packet.dts if packet.pts is None else packet.pts
            known = times[packet.stream_index]
            known.append(float(time * packet.time_base) if time is not None else float(len(known)))
    return {index: max(shown) - min(shown) if shown else 0.0 for index, shown in times.items()}
