"""A small untrained net and its process, to sample from."""

import torch

import ddpm_fast as df

PROC = df.Diffusion("cosine", 20)
SHAPE = {"image_size": 4, "channels": 1}


def make_net(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return df.UNet(
            1,
            8,
            (1, 2),
            1,
            time_emb_dim=8,
            activation="silu",
            dropout=0.0,
            num_groups=4,
            image_size=8,
            **changes,
        ).eval()


def draw(net, num_images=3, proc=PROC, **changes):
    return df.sample_images(net, proc, num_images, **{"steps": 3, "batch_size": 2, **changes})


# --- dtypes
