"""Links between GPUs that one may not have here, each number with its source.

All are published figures, or say that they are assumed; none was measured by this package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ddpm_fast.errors import UsageError, nearest
from ddpm_fast.scaling.alpha_beta import Link

# NCCL's own latency table, Ring with the Simple protocol (src/graph/tuning.cc): seconds a
# collective, and a hop over NVLink, PCIe and the network.
NCCL_BASE_S, NVLINK_HOP_S, PCIE_HOP_S, NETWORK_HOP_S = 8.4e-6, 3.4e-6, 5.7e-6, 9.6e-6


@dataclass(frozen=True, kw_only=True)
class Interconnect:
    """A kind of machine.

    bus_gbytes_per_s      all-reduce bus bandwidth inside one, GB/s (1e9 bytes)
    hop_s                 latency a hop inside one
    gpus                  in one
    network_gbytes_per_s  bus bandwidth between several: of all network cards of one together
    names                 what the names of GPUs in such machines match, as torch gives them
    """

    bus_gbytes_per_s: float
    hop_s: float
    gpus: int
    network_gbytes_per_s: float
    names: str
    source: str

    def link(self, n: int) -> Link:
        """What n ranks see: a ring over several machines is as fast as its slowest part."""
        machines = -(-n // self.gpus)
        bus, hop_s = self.bus_gbytes_per_s, self.hop_s
        if machines > 1:
            bus = min(bus, self.network_gbytes_per_s)
            between = (machines - 1) / (n - 1)  # NCCL: 2 (machines - 1) of 2 (n - 1) hops
            hop_s = (1 - between) * hop_s + between * NETWORK_HOP_S
        return Link(alpha_s=hop_s, beta_bytes_per_s=bus * 1e9, base_s=NCCL_BASE_S)


INTERCONNECTS = {
    "h200-nvlink": Interconnect(
        bus_gbytes_per_s=475, hop_s=NVLINK_HOP_S, gpus=8, network_gbytes_per_s=400,
        names=r"\bH200\b",  # GH200 and the like are other machines
        source="475 GB/s on 8 H200 with NVLink SHARP: NVIDIA/nccl-tests issue 272; network: "
        "8 x 400 Gb/s, the DGX H200 data sheet",
    ),
    "h100-nvlink": Interconnect(
        bus_gbytes_per_s=370, hop_s=NVLINK_HOP_S, gpus=8, network_gbytes_per_s=370,
        names=r"\bH100\b.*(HBM3|SXM)",  # PCIe and NVL name neither
        source="370 GB/s on 8 H100 as a ring, without SHARP: NVIDIA/nccl-tests issue 212; network: "
        "8 x 400 Gb/s, the DGX H100 data sheet, at most the ring's",
    ),
    "a100-nvlink": Interconnect(
        bus_gbytes_per_s=230, hop_s=NVLINK_HOP_S, gpus=8, network_gbytes_per_s=200,
        names=r"\bA100-SXM",
        source="230 GB/s on 8 A100: NCCL caps its estimate at 235 (src/graph/tuning.cc); network: "
        "8 x 200 Gb/s, the DGX A100 data sheet",
    ),
    "rtx3090-pcie": Interconnect(
        bus_gbytes_per_s=4, hop_s=PCIE_HOP_S, gpus=8, network_gbytes_per_s=1.25,
        names=r"\b3090\b",
        source="4 GB/s ASSUMED for 8 RTX 3090 without P2P, through host memory (PCIe 4.0 x16 "
        "itself: 32 GB/s a direction); network: 10 Gb/s, assumed",
    ),
}  # fmt: skip

# Cards joined by PCIe or in pairs by a bridge (H200 NVL), and parts of a GPU, which have no links.
NOT_OF_A_ROW = re.compile(r"\b(PCIe|NVL\d*|MIG)\b", re.IGNORECASE)


def interconnect(name: str) -> Interconnect:
    """The named row; UsageError with the nearest name for an unknown one."""
    if name not in INTERCONNECTS:
        raise UsageError(
            f"--interconnect {name}{nearest(name, INTERCONNECTS)}: must be one of "
            f"{', '.join(INTERCONNECTS)}"
        )
    return INTERCONNECTS[name]


def interconnect_of(device: str) -> str | None:
    """The row that machines with this GPU are taken for, by the GPU's name; None when unsure."""
    if NOT_OF_A_ROW.search(device):
        return None
    return next((name for name, row in INTERCONNECTS.items() if re.search(row.names, device)), None)
