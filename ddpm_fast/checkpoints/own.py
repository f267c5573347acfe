"""Checkpoints: a folder of safetensors and a manifest that is written last. Never pickle.

checkpoints/step_00000500/{model,ema,optimizer}.safetensors + manifest.json. The folder is built
under a temporary name, each file flushed to disk, and renamed: it is complete or it is not there.
The manifest holds each file's size and SHA-256 and its own, because a flipped bit loads silently
otherwise.
What is new, kept or removed goes by step numbers alone, never by a file's time.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from ddpm_fast.errors import Failure

MANIFEST = "manifest.json"
OWN_DIGEST = "manifest_sha256"  # of all the rest; the first version's manifests have none
FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")
_ASIDE = re.compile(r"\.step_(\d{8,})\.\d+\.old")
_PART = re.compile(r"[\w.+-]+", re.ASCII)  # a file name that any system takes
_BLOCK_BYTES = 2**20

Tensors = Mapping[str, Tensor]


class CheckpointError(Failure):
    """A checkpoint that cannot be written or trusted: one line naming the file and the fault."""


class Damaged(CheckpointError):
    """A checkpoint that is not what was written: missing, cut or altered."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, step, manifest, and tensors on the CPU."""

    path: Path
    step: int
    manifest: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]


def save(
    folder: Path,
    step: int,
    parts: Mapping[str, Tensors],
    facts: Mapping[str, Any],
    *,
    keep: int,
    keep_every: int = 0,
    warn: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write `folder`/step_XXXXXXXX, then remove what need not be kept.

    parts       name -> state dict; becomes <name>.safetensors
    facts       JSON values for the manifest, such as seed and net
    keep        the newest so many stay
    keep_every  so does the first of every so many steps, from that many on; 0: none
    warn        told of an old one that cannot be removed
    returns     the checkpoint's folder
    raises      CheckpointError  disk full or not writable; earlier checkpoints are untouched
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        _check_space(folder, parts)
        temporary.mkdir()
        _write_parts(temporary, step, parts, facts)
        _put_in_place(temporary, final)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {final} not written: {_reason(error)}; earlier checkpoints are untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for left in _prune(folder, step, keep, keep_every):
        warn(f"{left} is not needed any more and cannot be removed")
    return final


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, rising; healthy or not."""
    return sorted(_folders(folder))


def _folders(folder: Path) -> dict[int, Path]:
    """step -> its checkpoint, which a save killed between two renames leaves set aside."""
    found = {}
    for pattern, name in (".step_*.old", _ASIDE), ("step_*", _NAME):
        for path in folder.glob(pattern):
            if match := name.fullmatch(path.name):
                found[int(match[1])] = path
    return found


def load(path: Path) -> Checkpoint:
    """Read a checkpoint folder; CheckpointError if a file is missing, cut or altered."""
    manifest = _read_manifest(path)
    parts = {}
    for name, recorded in manifest["files"].items():
        data = _read(path / name)
        if len(data) != recorded["bytes"]:
            raise Damaged(
                f"{path / name} has {len(data)} bytes, its manifest says {recorded['bytes']}"
            )
        if hashlib.sha256(data).hexdigest() != recorded["sha256"]:
            raise Damaged(f"{path / name} was altered: its SHA-256 is not the manifest's")
        try:
            parts[name.removesuffix(".safetensors")] = load_safetensors(data)
        except SafetensorError as error:
            raise Damaged(f"{path / name} is not a safetensors file: {error}") from None
    return Checkpoint(path, manifest["step"], manifest, parts)


def load_newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The newest healthy checkpoint in `folder`; `warn` is told of each that had to be skipped.

    raises  CheckpointError  none is healthy
    """
    folders = _folders(folder)
    for step in sorted(folders, reverse=True):
        try:
            return load(folders[step])
        except CheckpointError as error:
            warn(f"skipped a damaged checkpoint: {error}")
    found = f"all {len(folders)} are damaged" if folders else "there is none"
    raise CheckpointError(f"{folder} holds no checkpoint that can be loaded: {found}")


def set_damaged_aside(newest: Path) -> list[Path]:
    """Rename damaged checkpoints past `newest`, the newest healthy one, to damaged_step_*.

    Else they would count among the newest when old ones are removed. One that cannot be read, or
    is of another format, may be healthy and stays.
    returns  where they are now
    """
    folder = newest.parent
    folders, places = _folders(folder), []
    after = next(step for step, path in folders.items() if path == newest)
    for step in sorted(step for step in folders if step > after and _is_damaged(folders[step])):
        name = f"damaged_step_{step:08d}"
        free = (folder / f"{name}{f'.{n}' if n else ''}" for n in itertools.count())
        places.append(next(place for place in free if not place.exists()))
        os.replace(folders[step], places[-1])
    return places


def _is_damaged(path: Path) -> bool:
    try:
        load(path)
    except CheckpointError as error:
        return isinstance(error, Damaged)
    return False


def average_part(decay: float | None) -> str:
    """The part that holds averaged weights: "ema", or "ema_0.999" of a further decay."""
    return "ema" if decay is None else f"ema_{decay!r}"


def versions() -> dict[str, str]:
    """What wrote this: package, torch, Python."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("ddpm-fast")
    except PackageNotFoundError:
        own = "not installed"
    return {"ddpm_fast": own, "torch": torch.__version__, "python": platform.python_version()}


def check_state(expected: Tensors, found: Tensors, source: Path) -> None:
    """CheckpointError naming the first tensor that is missing, unknown or of another shape."""
    for name, tensor in expected.items():
        if name not in found:
            raise CheckpointError(f"{source} is of another architecture: it lacks {name!r}")
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source} is of another architecture: {name!r} is {tuple(found[name].shape)}, "
                f"this net's is {tuple(tensor.shape)}"
            )
    for name in found:
        if name not in expected:
            raise CheckpointError(
                f"{source} is of another architecture: {name!r} is not in this net"
            )


def _write_parts(
    folder: Path, step: int, parts: Mapping[str, Tensors], facts: Mapping[str, Any]
) -> None:
    files, shapes = {}, {}
    for part, tensors in parts.items():
        name = f"{part}.safetensors"
        files[name] = _write_tensors(folder / name, tensors)
        shapes[part] = {key: list(t.shape) for key, t in tensors.items()}
    manifest = {"format": FORMAT, "step": step, "versions": versions(), **facts}
    manifest |= {"files": files, "shapes": shapes}
    manifest[OWN_DIGEST] = _digest(json.loads(json.dumps(manifest)))
    _write(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    _flush_folder(folder)
    for name, recorded in files.items():  # pruning trusts that this one is healthy
        if (found := (folder / name).stat().st_size) != recorded["bytes"]:
            raise OSError(errno.EIO, f"{name} has {found} of its {recorded['bytes']} bytes")


def _write_tensors(path: Path, tensors: Tensors) -> dict[str, Any]:
    """Write a part; its size and SHA-256.

    save_file streams from the tensors' memory with the GIL released. save() would make the bytes
    twice over with the GIL held: 286 MB took 547 MiB more and stopped all other threads for 1.1 s.
    """
    save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path)
    os.chmod(path, path.parent.stat().st_mode & 0o666)  # it made the file for its owner only
    size, digest = 0, hashlib.sha256()
    with open(path, "r+b") as file:
        while block := file.read(_BLOCK_BYTES):
            size += len(block)
            digest.update(block)
        os.fsync(file.fileno())
    if size <= (least := _num_bytes(tensors)):
        raise OSError(errno.EIO, f"{path.name} has {size} bytes, its tensors {least}")
    return {"bytes": size, "sha256": digest.hexdigest()}


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename; a checkpoint of the same step steps aside until the new one stands."""
    aside = final.with_name(f".{final.name}.{os.getpid()}.old")
    if final.exists():
        os.replace(final, aside)
    os.replace(temporary, final)
    _flush_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """What a killed process left: half-written folders go, a checkpoint set aside comes back."""
    for aside in folder.glob(".step_*.old"):
        final = folder / aside.name[1:].split(".")[0]
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, final)
    for temporary in folder.glob(".step_*.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)


def _check_space(folder: Path, parts: Mapping[str, Tensors]) -> None:
    needed = sum(_num_bytes(part) for part in parts.values())
    if shutil.disk_usage(folder).free < needed + 2**20:
        raise OSError(errno.ENOSPC, "disk full")


def _num_bytes(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _reason(error: OSError | SafetensorError) -> str:
    """Why it failed; safetensors gives the system's error number in its text only."""
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    if number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return "disk full"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return os.strerror(number) if number is not None else str(error)


def _prune(folder: Path, step: int, keep: int, keep_every: int) -> list[Path]:
    """Remove what neither rule keeps, once `step`, whose bytes were just verified, stands.

    A later step is damaged, or `step` would have followed it: it does not count. So `step` is
    among the newest, and one that is healthy always stays.
    returns  what could not be removed
    """
    steps = [s for s in steps_in(folder) if s <= step]
    unneeded = set(steps[:-keep]) - set(_kept_for_good(steps, keep_every))
    paths = [folder / f"step_{old:08d}" for old in sorted(unneeded)]
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
    return [path for path in paths if path.exists()]


def _kept_for_good(steps: list[int], every: int) -> list[int]:
    """Of rising `steps` the first at or after each multiple of `every`: some are saved late."""
    if not every:
        return []
    first = {step // every: step for step in reversed(steps)}
    return [step for multiple, step in first.items() if multiple]


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make names durable; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest as JSON with its keys sorted, its own digest left out."""
    rest = {name: value for name, value in manifest.items() if name != OWN_DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{path}: {error.strerror}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_read(path / MANIFEST))
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{path} is of format {manifest['format']}, this version reads {FORMAT}"
            )
        typed = [isinstance(manifest["step"], int)] + [
            isinstance(f["bytes"], int) and isinstance(f["sha256"], str)
            for f in manifest["files"].values()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        typed = [False]
    if not all(typed):
        raise Damaged(f"{path / MANIFEST} is damaged: not a checkpoint's manifest")
    if manifest.get(OWN_DIGEST, _digest(manifest)) != _digest(manifest):
        raise Damaged(f"{path / MANIFEST} was altered: its SHA-256 is not its own")
    for name in manifest["files"]:
        if Path(name).name != name or not _PART.fullmatch(name):
            raise CheckpointError(f"{path / MANIFEST} names a file outside its folder: {name!r}")
    return manifest
