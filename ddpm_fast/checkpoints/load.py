"""From a path to a net that can sample: a run, one of its checkpoints, a file of weights."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ddpm_fast.checkpoints import original
from ddpm_fast.checkpoints import own as checkpoint
from ddpm_fast.checkpoints.own import CheckpointError
from ddpm_fast.diffusion.nets import attribute, unwrapped
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.errors import UsageError
from ddpm_fast.nn import config as nn_config
from ddpm_fast.nn.config import UNetConfig
from ddpm_fast.nn.unet import UNet

PICKLED = (".pth", ".pt", ".ckpt", ".bin")
LOADABLE = "a run folder, a checkpoint folder or a file of weights (.pth, .pt, .safetensors)"


class NoCheckpoint(CheckpointError, UsageError):
    """Nothing at the path that could be loaded: a bad argument."""


@dataclass(frozen=True)
class Trained:
    """A net in eval mode, its process, the step it comes from (each None: unknown), its file, and
    the names of its classes by number, where they were kept."""

    net: UNet
    proc: Diffusion | None
    step: int | None
    path: Path
    class_names: tuple[str, ...] = ()


def load(
    path: str | Path,
    *,
    preset: str | None = None,
    config: UNetConfig | None = None,
    ema: bool | float = True,
    device: torch.device | str = "cpu",
) -> UNet:
    """A trained net, in eval mode; its `process` is the one it was trained with.

    path     a run folder (its newest healthy checkpoint), a checkpoint folder, or in it a file of
             weights, which are loaded then; or a .pth of the original repository; or a state dict
             of one's own (.pth, .pt, .safetensors): also behind `module.` or `_orig_mod.`, or
             nested under "state_dict", "model", "ema" or "net"
    preset, config  one of them for a file of weights, which does not say what net it is for
    ema      the averaged weights, those of one of extra_ema_decays, or else the trained ones
    raises   CheckpointError  missing, damaged, or of another architecture
             ValueError       a .pth without preset or config, or another path with one; a decay
                              that was not kept

    `net.process` is None for a file without betas: give sample_images a process then.
    """
    return load_trained(path, preset=preset, config=config, ema=ema, device=device).net


def save(net: UNet, folder: str | Path, proc: Diffusion | None = None) -> Path:
    """Write a net's weights, its configuration and its process, for :func:`load` to read.

    net      as it is: ema.net saves the averages; also inside DDP's or torch.compile's wrapper
    folder   must not hold checkpoints
    proc     None: net.process
    returns  the checkpoint's folder
    raises   ValueError       no UNet, no process, one made from betas, or a folder with checkpoints
             CheckpointError  disk full or not writable
    """
    folder, proc, net = Path(folder), proc or attribute(net, "process"), unwrapped(net)
    if not isinstance(net, UNet):
        raise ValueError(f"net is a {type(net).__name__}, must be a UNet, or DDP's or compile's")
    if proc is None:
        raise ValueError("proc=None, but the net has no process of its own: give a Diffusion")
    if (folder / "checkpoints").exists() or (folder / checkpoint.MANIFEST).exists():
        raise ValueError(f"{folder} holds checkpoints: give another folder")
    facts = {"net": net.config.to_json(), "diffusion": proc.to_json()}
    weights = net.state_dict()
    parts = {"model": weights, checkpoint.average_part(None): weights}  # whatever load's ema asks
    return checkpoint.save(folder / "checkpoints", 0, parts, facts, keep=1)


def load_trained(
    path: str | Path,
    *,
    preset: str | None = None,
    config: UNetConfig | None = None,
    ema: bool | float = True,
    device: torch.device | str = "cpu",
) -> Trained:
    """As :func:`load`, with the diffusion process and the step."""
    if not isinstance(path, str | os.PathLike):
        raise NoCheckpoint(f"path={path!r} must be a path: {LOADABLE}")
    path = Path(path)
    manifest = path.parent / checkpoint.MANIFEST
    if path.suffix in PICKLED or (path.suffix == ".safetensors" and not manifest.is_file()):
        return _load_weights(path, preset, config, ema, device)
    saved = _read(path)
    if preset is not None or config is not None:
        raise ValueError(f"{path} says itself what net it is for: preset and config are for a .pth")
    part = _part(saved, ema) if path.suffix != ".safetensors" else _part_named(path, ema)
    try:
        config = UNetConfig.from_json(saved.manifest["net"])
        proc = Diffusion(**saved.manifest["diffusion"])
        weights = saved.parts[part]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved.path} has an unusable manifest: {error}") from None
    net = _net(config, weights, proc, saved.path, device)
    return Trained(net, proc, saved.step, saved.path, _class_names(saved, config.num_classes))


def _load_weights(
    path: Path,
    preset: str | None,
    config: UNetConfig | None,
    ema: bool | float,
    device: torch.device | str,
) -> Trained:
    """From a file of weights alone."""
    if not path.is_file():
        raise NoCheckpoint(f"{path}: {'Is a directory' if path.exists() else 'No such file'}")
    if config is None and preset is None:
        presets = ", ".join(nn_config.PRESETS)
        raise ValueError(f"{path} does not say what net it is for: give preset, of {presets}")
    if not isinstance(ema, bool):
        raise ValueError(f"ema={ema}, but {path} holds one average: True or False")
    state = original.read_weights(path, ema=ema)
    config = config or nn_config.preset(preset, num_classes=original.num_classes(state))
    weights, proc = original.net_weights(state, path, ema=ema), original.diffusion(state, path)
    return Trained(_net(config, weights, proc, path, device), proc, None, path)


def _class_names(saved: checkpoint.Checkpoint, num_classes: int | None) -> tuple[str, ...]:
    """As the checkpoint's manifest has them, itself or of its data or configuration."""
    manifest = saved.manifest
    for place in (manifest, manifest.get("data"), manifest.get("config")):
        names = place.get("class_names") if isinstance(place, dict) else None
        if (
            isinstance(names, list)
            and len(names) == num_classes
            and all(isinstance(name, str) for name in names)
        ):
            return tuple(names)
    return ()


def _part(saved: checkpoint.Checkpoint, ema: bool | float) -> str:
    if isinstance(ema, bool):
        return checkpoint.average_part(None) if ema else "model"
    part = checkpoint.average_part(float(ema))
    config = saved.manifest.get("config")
    if isinstance(config, dict) and config.get("ema_decay") == ema:
        return checkpoint.average_part(None)
    if part not in saved.parts:
        kept = [name.removeprefix("ema_") for name in saved.parts if name.startswith("ema_")]
        raise ValueError(
            f"ema={ema}: {saved.path} holds {'no further averages' if not kept else 'those of '}"
            f"{', '.join(kept)}; True is the run's first"
        )
    return part


def _part_named(path: Path, ema: bool | float) -> str:
    """The part that a file of a checkpoint holds."""
    name = path.stem
    if name == "optimizer":
        raise UsageError(f"{path} holds no weights; allowed: model.safetensors, ema.safetensors")
    if (ema is False and name != "model") or not isinstance(ema, bool):
        raise UsageError(f"{path} and ema={ema}: give the checkpoint's folder to choose by ema")
    return name


def _read(path: Path) -> checkpoint.Checkpoint:
    """The checkpoint that a run folder, a checkpoint folder or a file inside it stands for."""
    if path.is_file() and path.suffix in (".safetensors", ".json"):
        path = path.parent
    if (path / checkpoint.MANIFEST).is_file():
        return checkpoint.load(path)
    if (path / "checkpoints").is_dir():
        return checkpoint.load_newest(path / "checkpoints", _warn)
    state = "is none of" if path.exists() else "does not exist; give"
    raise NoCheckpoint(f"{path} {state} {LOADABLE}")


def _net(
    config: UNetConfig,
    weights: checkpoint.Tensors,
    proc: Diffusion | None,
    source: Path,
    device: torch.device | str,
) -> UNet:
    # The same net whatever torch's defaults are: fp32, on the CPU, to train with.
    with torch.inference_mode(False), torch.device("cpu"):
        net = UNet.from_config(config).float()
        _take_weights(net, weights, source)
        net.process = proc  # a plain attribute: in no state dict, copied and pickled with the net
        return net.eval().to(device, memory_format=torch.channels_last)


def _take_weights(net: UNet, weights: checkpoint.Tensors, source: Path) -> None:
    expected = net.state_dict()
    if not expected.keys() & weights.keys():
        raise CheckpointError(
            f"{source} holds no weights of this net: its first is {next(iter(weights), None)!r}, "
            f"the net's {next(iter(expected))!r}"
        )
    checkpoint.check_state(expected, weights, source)
    net.load_state_dict(weights)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
