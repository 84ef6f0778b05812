"""One process of a plain DDP training under torchrun, for the comparison in jobs/bench/reliability.py.

It does the steps of `pipelines.training.worker` on batches that were prepared beforehand, without Ray, checkpoints and
metrics, and writes the time after every step.
"""

import json
import pickle
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from maskformer import build_model
from maskformer.optim import build_optimizer
from pipelines.config.serialize import from_dict
from pipelines.config.train import TrainConfig
from pipelines.training.reduction import ExactReduction, FastReduction, broadcast_module
from pipelines.training.worker import train_step


def main() -> None:
    folder = Path(sys.argv[1])
    config = from_dict(TrainConfig, json.loads((folder / "config.json").read_text()))
    torch.set_num_threads(config.scaling.threads)
    dist.init_process_group("gloo")
    rank, split, device = dist.get_rank(), config.batch_split, torch.device("cpu")
    batches = pickle.loads((folder / f"batches_{rank}.pickle").read_bytes())
    torch.manual_seed(config.run.seed)
    network = build_model(config.model).train()
    broadcast_module(network)
    reduction = (ExactReduction if config.scaling.exact else FastReduction)(network, split, device)
    optimizer = build_optimizer(network, config.optimizer)
    times = [time.perf_counter()]
    while batches:
        micro_batches = [batches.pop(0) for _ in range(split.accumulation)]
        masks = torch.tensor([float(sum(batch.num_masks(config.model.num_queries) for batch in micro_batches))])
        dist.all_reduce(masks)
        num_masks = max(1.0, masks.item() / (config.run.global_batch // config.run.micro_batch))
        train_step(reduction, optimizer, micro_batches, num_masks, 1.0, config, device)
        times.append(time.perf_counter())
    if rank == 0:
        (folder / "times.json").write_text(json.dumps(times))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
