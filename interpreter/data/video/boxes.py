"""Reads the nested boxes of MP4 and Matroska, as far as the reader of a stream needs them."""

import struct

_BOXES = frozenset({b"ftyp", b"styp", b"free", b"skip", b"wide", b"pnot", b"uuid", b"moov", b"moof", b"mdat", b"sidx"})
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067


def index_comes_last(head: bytes) -> bool | None:
    """Whether bytes begin an MP4 or MOV whose pictures come before their index; None if there are too few bytes.

    >>> index_comes_last(b"\\x00\\x00\\x00\\x08ftyp\\x00\\x00\\x00\\x40mdat")
    True
    >>> index_comes_last(b"no video"), index_comes_last(b"\\x00\\x00\\x00\\x08ftyp")
    (False, None)
    """
    position = 0
    while position + 8 <= len(head):
        size, kind = struct.unpack_from(">I4s", head, position)
        if kind not in _BOXES or kind in (b"moov", b"moof") or size < 8:
            return kind == b"mdat"  # size 0 means to the end, size 1 that a size of 64 bits follows
        if kind == b"mdat":
            return True
        position += size
    return None


class Elements:
    """Follows the elements of a Matroska or WebM stream, to find whether it ends inside one; FFmpeg does not report it.

    Bytes of any other format are ignored.

    Attributes:
        inside: whether the bytes so far end inside an element, or before the end that the segment states.
    """

    def __init__(self) -> None:
        self._rest = b""  # of a header that is not complete
        self._skip = 0  # bytes of an element that have not arrived
        self._position, self._end = 0, 0
        self._known: bool | None = None  # whether it is Matroska

    @property
    def inside(self) -> bool:
        """See the class."""
        return bool(self._known) and (self._skip > 0 or bool(self._rest) or self._position < self._end)

    def feed(self, data: bytes) -> None:
        """Read the next bytes."""
        if self._known is False:
            return
        data = self._rest + data
        place = 0
        while True:
            step = min(self._skip, len(data) - place)
            place, self._skip = place + step, self._skip - step
            header = None if self._skip else _header(data, place)
            if header is None:
                break
            identity, size, length = header
            if self._known is None:
                self._known = identity == _EBML
                if not self._known:
                    return
            place += length
            if identity == _SEGMENT:
                self._end = 0 if size is None else self._position + place + size
            else:
                self._skip = size or 0  # a live cluster may state no size; its elements follow
        self._position += place
        self._rest = data[place:]


def _header(data: bytes, place: int) -> tuple[int, int | None, int] | None:
    """Identity, size (None: not stated) and length of the header of an element; None if the header is not complete."""
    if place >= len(data):
        return None
    first = 9 - data[place].bit_length()  # bytes of the identity
    if place + first >= len(data):
        return None
    second = 9 - data[place + first].bit_length()
    if place + first + second > len(data):
        return None
    identity = int.from_bytes(data[place : place + first], "big")
    bits = 7 * second
    size = int.from_bytes(data[place + first : place + first + second], "big") & ((1 << bits) - 1)
    return identity, None if size == (1 << bits) - 1 else size, first + second
