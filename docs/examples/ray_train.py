"""The LightningModule of `lightning_module.py` on the workers of Ray Train, two of them by default.

    python docs/examples/ray_train.py

Ray starts the workers and sets torchrun's variables in them; the strategy finds them in place. `prepare_trainer` and
Ray's own strategies are not needed.
"""

from __future__ import annotations

import argparse
import os


def train() -> None:
    """What one worker does: one rank."""
    from lightning_module import Module, make_trainer, samples

    ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
    machines = int(os.environ["WORLD_SIZE"]) // ranks_here
    trainer = make_trainer(accelerator="auto", devices=ranks_here, num_nodes=machines)
    trainer.fit(Module(), samples())
    if trainer.is_global_zero:
        print(f"loss {float(trainer.callback_metrics['loss']):.3f} after {trainer.global_step} steps")


def main() -> None:
    """Starts the workers; Ray shows what they print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="ranks of the mesh in Module")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    arguments = parser.parse_args()
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(train, scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=arguments.gpu)).fit()


if __name__ == "__main__":
    main()
