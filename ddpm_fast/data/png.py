"""The chunks of a PNG that its pixels need: damage in the others (text, profiles) is harmless."""

from __future__ import annotations

SIGNATURE = b"\x89PNG\r\n\x1a\n"
NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def without_metadata(data: bytes) -> bytes | None:
    """A PNG file's bytes with NEEDED chunks only; None for other files and where none is left out.

    Chunks are taken by their lengths and not checked: who reads the result does.
    source  PNG specification, third edition, section 5.3
    """
    if not data.startswith(SIGNATURE):
        return None
    kept, at = [SIGNATURE], len(SIGNATURE)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in NEEDED:
            kept.append(data[at:end])
        at = end
    plain = b"".join(kept)
    return plain if len(plain) < len(data) else None
