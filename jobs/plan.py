"""Estimate what a training run needs on a cluster: memory, data CPUs, hours, price.

python jobs/plan.py --recipe swin_l_mmdet --cluster.nodes 8 --price 2.5

Nothing is started. An impossible run is refused with status 2, a slow one gets a warning. Every figure is marked
measured, modeled, published or given; no figure was checked on a GPU. With --rehearse a small version of the run is
then tried here on simulated nodes, one of which is killed.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jobs.shared.cli import parse, run
from jobs.shared.console import quiet
from jobs.shared.training import USAGE, TrainFlags, chosen_recipe, training_images, with_recipes
from pipelines.config.hardware import COCO_MASKS, IMAGES_PER_CPU, Hardware
from pipelines.config.recipes import RECIPES
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.cluster.capacity import Capacity

_SHOWN = (
    "recipe", "config", "cluster.nodes", "cluster.gpus_per_node", "cluster.cpus_per_node", "cluster.gpu_memory",
    "cluster.tflops", "live", "price", "images_per_cpu_second", "masks",
    "rehearse", "data.train", "run.epochs", "run.steps", "run.global_batch", "scaling.device", "scaling.workers",
    "scaling.cpus_per_worker", "scaling.data_cpus", "precision", "verbose",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Flags(TrainFlags):
    cluster: Hardware = field(default_factory=Hardware)
    live: bool = False
    """Ask the cluster at $RAY_ADDRESS for its nodes, GPUs and CPUs instead of taking them from --cluster.*."""
    price: float | None = None
    """Price of one GPU hour, including its share of the node."""
    images_per_cpu_second: float = IMAGES_PER_CPU
    """Training images that one CPU decodes and augments per second. jobs/bench/data.py measures it."""
    masks: tuple[int, int, int] = COCO_MASKS
    """Segments per image: mean, 95th percentile and maximum. The default is COCO's."""

    rehearse: bool = False
    """Test the run on simulated nodes: 5 minutes on two cores. All workers are placed on nodes with the resources of
    --cluster.*; then a tiny model trains 20 steps on 2 nodes, one of which is killed. Nothing is left behind."""

    def __post_init__(self) -> None:
        if self.rehearse and self.live:
            raise ValueError("--rehearse simulates the nodes that --cluster.* describe: leave --live out.")
        if not self.images_per_cpu_second > 0:
            raise ValueError(f"--images-per-cpu-second must be above 0, got {self.images_per_cpu_second:g}.")
        if self.price is not None and not self.price >= 0:
            raise ValueError(f"--price must not be below 0, got {self.price:g}.")
        if not 0 <= self.masks[0] <= self.masks[1] <= self.masks[2]:
            raise ValueError(f"--masks must be ascending (mean, 95th percentile, maximum), got {self.masks}.")


def main() -> None:
    flags = parse(
        _Flags,
        _Flags(training=chosen_recipe(RECIPES)),
        with_recipes(__doc__, RECIPES),
        shown=_SHOWN,
        usage=USAGE,
    )

    from pipelines.planning.estimate import make_plan, planned_capacity  # imports torch, which --help should not
    from pipelines.planning.report import Marks, report

    images, source, mark = training_images(flags.training)
    plan = make_plan(
        flags.training,
        flags.cluster,
        _live_capacity(flags.verbose) if flags.live else planned_capacity(flags.cluster, flags.training.scaling),
        images=images,
        masks=flags.masks,
        images_per_cpu=flags.images_per_cpu_second,
    )
    marks = Marks(
        images=mark,
        cluster="measured" if flags.live else "given",
        images_per_cpu="measured" if flags.images_per_cpu_second == IMAGES_PER_CPU else "given",
    )
    print(report(plan, marks, source, flags.price), flush=True)
    if flags.rehearse:
        with quiet(flags.verbose):
            from pipelines.cluster.simulated import Node
            from pipelines.planning import rehearsal

            node = Node(int(flags.cluster.cpus_per_node), flags.cluster.gpus_per_node)
            result = rehearsal.rehearse(flags.training, [node] * plan.capacity.num_nodes)
        print(rehearsal.report(result))


def _live_capacity(verbose: bool) -> "Capacity":
    """Ask the cluster at $RAY_ADDRESS what its nodes have.

    Raises:
        UserError: no cluster is named, or it cannot be joined.
    """
    from pipelines.cluster import checks, session  # imports Ray, which --help should not

    if not session.is_remote():
        raise UserError("--live asks a cluster, and RAY_ADDRESS names none. Set it, or describe one by --cluster.*.")
    with quiet(verbose), session.session():
        return checks.capacity()


if __name__ == "__main__":
    run(main)
