"""Say what a training run will take on a cluster, before anyone pays: memory, data CPUs, hours, price.

python jobs/plan.py --recipe swin_l_mmdet --cluster.nodes 8 --price 2.5

Starts nothing. What cannot work is refused with status 2, what will be slow is warned of. Every figure is marked
measured, modelled, published or given; no figure was checked on a GPU.

With --rehearse the run is then tried here, small, on simulated nodes, one of which is lost on the way.
"""

from dataclasses import dataclass, field

from jobs.cli import parse, run
from jobs.training import TrainFlags, chosen_recipe, training_images
from pipelines import recipes
from pipelines.config import TrainConfig
from pipelines.errors import UserError
from pipelines.plan import Hardware, Machines, make_plan
from pipelines.plan_report import Marks, report
from pipelines.recipes import R50_MMDET

IMAGES_PER_CPU = 70.0
"""Measured by jobs/bench/augment.py on one core of an AMD EPYC, with the two photographs of the COCO sample."""
COCO_MASKS = (11, 25, 67)
"""Segments of an image of COCO's train2017: the mean and the 95th percentile, both about; and the most things,
63 (arXiv:2005.12872, section 4), with four of stuff."""


@dataclass(frozen=True, kw_only=True)
class _Flags(TrainFlags):
    cluster: Hardware = field(default_factory=Hardware)
    live: bool = False
    """Ask the cluster at $RAY_ADDRESS for its nodes, GPUs and CPUs instead of taking them from --cluster.*."""
    price: float | None = None
    """Of one GPU for one hour, with its share of the machine."""
    images_per_cpu_second: float = IMAGES_PER_CPU
    """Training images that one CPU decodes and augments in a second; jobs/bench/augment.py measures it."""
    masks: tuple[int, int, int] = COCO_MASKS
    """Segments of an image: the mean, the 95th percentile and the most. COCO's by default."""

    rehearse: bool = False
    """Try the placement of all workers on nodes that claim what --cluster.* says, then run 20 steps with a tiny model
    on 2 simulated nodes and lose one of them: some 5 minutes on two cores, and nothing is left behind."""

    def __post_init__(self) -> None:
        if self.rehearse and self.live:
            raise ValueError("--rehearse simulates the nodes that --cluster.* describe: leave --live out.")
        if not self.images_per_cpu_second > 0:
            raise ValueError(f"--images-per-cpu-second must be above 0, got {self.images_per_cpu_second:g}.")
        if self.price is not None and not self.price >= 0:
            raise ValueError(f"--price must not be below 0, got {self.price:g}.")
        if not 0 <= self.masks[0] <= self.masks[1] <= self.masks[2]:
            raise ValueError(f"--masks must rise from the mean to the most, got {self.masks}.")


def main() -> None:
    published = [value for value in vars(recipes).values() if isinstance(value, TrainConfig)]
    flags = parse(_Flags, _Flags(training=chosen_recipe((R50_MMDET, *published))), __doc__)
    images, source, counted = training_images(flags.training)
    asked = "measured" if flags.live else "given"
    rate = "measured" if flags.images_per_cpu_second == IMAGES_PER_CPU else "given"
    plan = make_plan(
        flags.training,
        flags.cluster,
        _ask() if flags.live else flags.cluster.machines(flags.training),
        images=images,
        masks=flags.masks,
        images_per_cpu=flags.images_per_cpu_second,
    )
    print(
        report(
            plan,
            Marks(images="measured" if counted else "published", cluster=asked, images_per_cpu=rate),
            source,
            flags.price,
        ),
        flush=True,
    )
    if flags.rehearse:
        from pipelines import rehearsal  # imports Ray, which --help should not
        from pipelines.simulation import Node

        node = Node(int(flags.cluster.cpus_per_node), flags.cluster.gpus_per_node)
        print(rehearsal.report(rehearsal.rehearse(flags.training, [node] * plan.machines.nodes)))


def _ask() -> Machines:
    """Count the machines of the live cluster.

    Raises:
        UserError: no cluster is named, or it cannot be joined.
    """
    import ray  # --help should not

    from pipelines import cluster

    if not cluster.is_remote():
        raise UserError("--live asks a cluster, and RAY_ADDRESS names none. Set it, or describe one by --cluster.*.")
    with cluster.session():
        return Machines.of(node["Resources"] for node in ray.nodes() if node["Alive"])


if __name__ == "__main__":
    run(main)
