"""The parts of a PNG or JPEG that its pixels need: damage in the others is harmless."""

from __future__ import annotations

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
APP0, APP1, APP14, APP15, COMMENT, SCAN = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE, 0xDA
ADOBE_BYTES = 14  # length of a whole APP14, which names the colour transform


def without_metadata(data: bytes) -> bytes | None:
    """A file's bytes less what its pixels do not need; None for other files and where that is none.

    Parts are taken by their lengths and not checked: who reads the result does. APP1 stays: it
    holds the orientation, and Pillow reads past damage in it.
    source  PNG specification, third edition, section 5.3; ITU-T T.81, annex B
    """
    if data.startswith(PNG):
        plain = _png(data)
    elif data.startswith(JPEG):
        plain = _jpeg(data)
    else:
        return None
    return plain if len(plain) < len(data) else None


def _png(data: bytes) -> bytes:
    kept, at = [PNG], len(PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in PNG_CHUNKS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _jpeg(data: bytes) -> bytes:
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at + 1] != SCAN:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 2 + length
        app = APP0 <= marker <= APP15 and marker != APP1
        whole_adobe = marker == APP14 and length >= ADOBE_BYTES
        if whole_adobe or not (app or marker == COMMENT):
            kept.append(data[at:end])
        at = end
    return b"".join(kept) + data[at:]
