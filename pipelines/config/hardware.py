"""Hardware: the nodes, GPUs and bandwidths of a planned cluster."""

import math
from dataclasses import dataclass

IMAGES_PER_CPU = 150.0
"""Training images that one CPU decodes and augments per second. Measured by jobs/bench/data.py through Ray Data on two
cores of an AMD EPYC, with the two photographs of the COCO sample."""

IMAGES_PER_CPU_WITHOUT_RAY = 200.0
"""The same without Ray Data, in a single process."""

COCO_MASKS = (11, 25, 67)
"""Segments per image of COCO train2017: approximate mean, approximate 95th percentile, and maximum. The maximum is 63
things (arXiv:2005.12872, section 4) and four stuff segments."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The nodes, GPUs and bandwidths of a planned cluster."""

    nodes: int | None = None
    """Number of nodes. Default: as many as the workers need."""
    gpus_per_node: int = 8
    """GPUs of each node."""
    cpus_per_node: float = 96
    """CPUs of each node, as Ray counts them."""
    gpu_memory: float = 80
    """Memory of one GPU in GB."""
    tflops: tuple[float, float] | None = None
    """TFLOP/s that one worker sustains in training: worst and best case. A multiply-add counts as two operations.
    Default: 5 to 30 for a GPU, a guess for an A100 with one image per forward pass; 0.01 to 0.05 for a CPU thread. To
    measure it, multiply the images per second of a short run by the operations per image in the plan's output."""
    network: float = 12.5
    """Network bandwidth between two nodes in GB/s."""
    storage: float = 1.25
    """Storage bandwidth in GB/s. All nodes together read packs at this rate, and one node writes checkpoints at it."""

    def __post_init__(self) -> None:
        least = {"gpus_per_node": 0, "cpus_per_node": 0, "gpu_memory": 0, "network": 1e-9, "storage": 1e-9}
        for name, limit in least.items():
            if not limit <= getattr(self, name) < math.inf:
                raise ValueError(f"cluster.{name} must be a positive number, got {getattr(self, name)}.")
        if self.nodes is not None and self.nodes < 1:
            raise ValueError(f"cluster.nodes must be at least 1, got {self.nodes}.")
        if self.tflops is not None and not 0 < self.tflops[0] <= self.tflops[1] < math.inf:
            raise ValueError(f"cluster.tflops must be a range (worst, best) above 0, got {self.tflops}.")
