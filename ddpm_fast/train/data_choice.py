"""The preset, channels and size that fit the images, where the command line leaves them open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ddpm_fast.nn import config as nn_config

if TYPE_CHECKING:
    from ddpm_fast.data.look import Seen

# The values that decide, or that tell which images do.
DECIDING = ("data", "data_root", "image_size", "img_channels", "array_key")
MULTIPLE = 8  # photographs are resized to multiples of so many pixels
LEAST_SIDE, MOST_SIDE = 16, 64  # of what they are resized to unless --image-size says
DIGITS_SIDE = 16  # up to which grey images are like the digits


@dataclass(frozen=True)
class Choice:
    """preset, the values that go with it, and lines that say why."""

    preset: str
    values: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def choose(preset: str | None, given: Mapping[str, Any]) -> Choice:
    """What fits the images of given["data"]; a preset that was asked for stays.

    given  DECIDING values, None where not given. Data that cannot be opened choose
           nothing: opening them says why
    """
    data = given.get("data") or _own_data(preset)
    if data == "digits":
        return Choice(preset or "digits")
    from ddpm_fast.data import DataError
    from ddpm_fast.data.look import look

    try:
        seen = look(data, data_root=given.get("data_root") or "data", array_key=given["array_key"])
    except (DataError, OSError):
        return Choice(preset or "digits")
    size, channels = given["image_size"], given["img_channels"]
    if preset is not None:
        return Choice(preset, notes=_differences(preset, data, seen, size, channels))
    return _fitting(data, seen, size, channels)


def _own_data(preset: str | None) -> str:
    """The set that a preset names; digits without one."""
    from ddpm_fast.train.config import PRESETS

    return PRESETS.get(preset, {}).get("data", "digits")


def _fitting(data: str, seen: Seen, size: int | None, channels: int | None) -> Choice:
    wanted = channels or seen.channels
    side = size or seen.side
    if seen.photographs and size is None:
        side = min(MOST_SIDE, max(LEAST_SIDE, MULTIPLE * round(seen.side / MULTIPLE)))
    preset = "digits" if wanted == 1 and side <= DIGITS_SIDE else "small"
    values: dict[str, Any] = {"img_channels": wanted}
    if seen.photographs:
        values["image_size"] = side
    kind = {1: "grey", 3: "colour"}
    other = 4 - wanted
    note = (
        f"{_source(data)}: {seen.count} images of {seen.sizes()}, {seen.colours} of them in "
        f"colour; so the preset is {preset} (--preset), {kind[wanted]} (--img-channels {other}: "
        f"{kind[other]}), {side}x{side}"
    )
    return Choice(preset, values, (note + (" (--image-size)" if seen.photographs else ""),))


def _differences(
    preset: str, data: str, seen: Seen, size: int | None, channels: int | None
) -> tuple[str, ...]:
    """Lines on how a preset's channels and size change the images."""
    row, notes = nn_config.PRESETS[preset], []
    if seen.photographs and channels is None and row["img_channels"] != seen.channels:
        change = (
            f"{seen.colours} of {seen.count} images become grey"
            if seen.colours
            else "grey images become three equal planes"
        )
        notes.append(f"{change}; --img-channels {seen.channels} keeps them as they are")
    target = (row["image_size"],) * 2
    if seen.photographs and size is None and not seen.smallest == seen.largest == target:
        notes.append(
            f"images of {seen.sizes()} become {target[0]}x{target[0]}; --image-size changes that"
        )
    return tuple(f"{_source(data)}, preset {preset}: {note}" for note in notes)


def _source(data: str) -> str:
    from ddpm_fast.data.image_files import shown

    return shown(data)
