"""What the tests of checkpoints share: a small state that holds one value, a gate before the
disk, a malicious pickle."""

import hashlib
import json
import os
import pickle
import threading

import pytest
import torch

from ddpm_fast.checkpoints import own as checkpoint

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork or rlimits")
WAIT_S = 30  # for what comes at once; only a hang takes so long


def parts(value, size=64):
    """Two parts whose every element tells which save they come from."""
    return {
        "model": {"w": torch.full((size, 8), float(value)), "b": torch.full((8,), float(value))},
        "ema": {"w": torch.full((size, 8), float(value))},
    }


def value_of(saved):
    """The value that all of a checkpoint's tensors hold."""
    (value,) = {t.unique().item() for part in saved.parts.values() for t in part.values()}
    return value


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def put_pickle(saved, marker, dump=pickle.dump):
    """In place of the checkpoint's weights a pickle that would make `marker`: returns its bytes.

    The manifest vouches for it: whoever made it wrote that too.
    """
    with open(saved / "model.safetensors", "wb") as file:
        dump(Bomb(marker), file)
    data = (saved / "model.safetensors").read_bytes()
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    manifest["manifest_sha256"] = checkpoint._digest(manifest)
    (saved / "manifest.json").write_text(json.dumps(manifest))
    return data


class Gate:
    """Holds the writing thread before each part until opened."""

    def __init__(self, monkeypatch):
        self.reached, self._open = threading.Event(), threading.Event()
        self.open, self.close = self._open.set, self._open.clear
        save_file = checkpoint.save_file

        def wait_and_save(tensors, path):
            self.reached.set()
            assert self._open.wait(WAIT_S)
            save_file(tensors, path)

        monkeypatch.setattr(checkpoint, "save_file", wait_and_save)
