"""From a path to a net that can sample: a run, one of its checkpoints, the original's .pth."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ddpm_fast import checkpoint
from ddpm_fast.checkpoint import CheckpointError
from ddpm_fast.convert import original
from ddpm_fast.diffusion.process import Diffusion
from ddpm_fast.errors import UsageError
from ddpm_fast.nn import config as nn_config
from ddpm_fast.nn.config import UNetConfig
from ddpm_fast.nn.unet import UNet


@dataclass(frozen=True)
class Trained:
    """A net in eval mode, its process, the step it comes from (None: unknown) and its file."""

    net: UNet
    proc: Diffusion
    step: int | None
    path: Path


def load(
    path: str | Path,
    *,
    preset: str | None = None,
    config: UNetConfig | None = None,
    ema: bool | float = True,
    device: torch.device | str = "cpu",
) -> UNet:
    """A trained net, in eval mode.

    path     a run folder (its newest healthy checkpoint), a checkpoint folder, or in it a file of
             weights, which are loaded then; or a .pth of the original repository
    preset, config  one of them for a .pth, which does not say what net it is for
    ema      the averaged weights, those of one of extra_ema_decays, or else the trained ones
    raises   CheckpointError  missing, damaged, or of another architecture
             ValueError       a .pth without preset or config, or another path with one; a decay
                              that was not kept
    """
    return load_trained(path, preset=preset, config=config, ema=ema, device=device).net


def load_trained(
    path: str | Path,
    *,
    preset: str | None = None,
    config: UNetConfig | None = None,
    ema: bool | float = True,
    device: torch.device | str = "cpu",
) -> Trained:
    """As :func:`load`, with the diffusion process and the step."""
    path = Path(path)
    if path.suffix in (".pth", ".pt"):
        if config is None and preset is None:
            presets = ", ".join(nn_config.PRESETS)
            raise ValueError(f"{path} does not say what net it is for: give preset, of {presets}")
        if not isinstance(ema, bool):
            raise ValueError(f"ema={ema}, but {path} holds one average: True or False")
        state = original.read_pth(path)
        config = config or nn_config.preset(preset, num_classes=original.num_classes(state))
        weights = original.net_weights(state, path, ema=ema)
        return Trained(
            _net(config, weights, path, device), original.diffusion(state, path), None, path
        )
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
    return Trained(_net(config, weights, saved.path, device), proc, saved.step, saved.path)


def _part(saved: checkpoint.Checkpoint, ema: bool | float) -> str:
    if isinstance(ema, bool):
        return checkpoint.average_part(None) if ema else "model"
    part = checkpoint.average_part(float(ema))
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
    allowed = "a run folder, a checkpoint folder or the original's .pth"
    state = "is none of" if path.exists() else "does not exist; give"
    raise CheckpointError(f"{path} {state} {allowed}")


def _net(
    config: UNetConfig, weights: checkpoint.Tensors, source: Path, device: torch.device | str
) -> UNet:
    net = UNet.from_config(config)
    checkpoint.check_state(net.state_dict(), weights, source)
    net.load_state_dict(weights)
    return net.eval().to(device, memory_format=torch.channels_last)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
