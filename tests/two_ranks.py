"""A short training that records its steps, alone or as one of several ranks; a script for torchrun.

``python tests/two_ranks.py FOLDER BATCH_SIZE [cuda]`` trains Sim-MPNet (pico, 64 px) on drawings past the memory's
warm-up, in float64 on a CPU: one process and two add up in different orders, and in float32 that rounding would change
which columns the memory chooses. BatchNorm keeps its first statistics, since PyTorch synchronises it only on GPUs.
"""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from networks import DMWLA, SimMPNet
from networks.ranks import rank, world_size
from tests.mini import trainer
from utils.distribution import gather_over_ranks, process_group, rank_device, share_buffers

BANK = ("pool", "prototypes", "warmup_counter", "replaced_columns", "key_counts", "phi_k")


class Network(SimMPNet):
    """Sim-MPNet in the default precision, without what depends on the other images of a process's batch."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d | nn.Dropout | DropPath):
                module.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(x.to(self.heads[0].weight.dtype))


def memory_of_a_block() -> list[Tensor]:
    """Return the pool of one DMW-LA block after each of eight steps on given tokens, three of them warm-up."""
    torch.manual_seed(0)
    block = DMWLA(6, 8, num_clusters=3, columns_per_cluster=10, replaced_columns=4, warmup_iterations=3)
    tokens = torch.randn(8, 4, 6, 5, 5)
    share_buffers(block)
    torch.manual_seed(rank())
    pools = []
    for x in tokens:
        block(x.chunk(world_size())[rank()])
        pools.append(block.bank.pool.clone())
    return pools


def main(folder: Path, batch_size: str, device_name: str = "cpu") -> None:
    device = rank_device(device_name)
    if device.type == "cpu":
        torch.set_default_dtype(torch.float64)
    with process_group(device):
        pools = memory_of_a_block()
    with process_group(device):  # a second one, as of the folds of --fold all
        flags = ("--batch_size", batch_size, "--wld_start_epoch", "1")
        made = trainer(folder / "run", *flags, network=Network, slices=12, volumes=3, device=device)
        if rank():
            torch.manual_seed(rank())
        steps, gradients = [], {}
        step = made.train_step

        def recorded(batch):
            losses = step(batch)
            if not gradients:
                gradients.update({name: p.grad.clone() for name, p in made.model.named_parameters()})
            digest = hashlib.sha256()
            for name, buffer in made.model.named_buffers():
                if name.endswith(BANK):
                    digest.update(buffer.cpu().numpy().tobytes())
            steps.append({"losses": losses.tolist(), "banks": gather_over_ranks(digest.hexdigest())})
            return losses

        made.train_step = recorded
        made.fit()
        if not rank():
            torch.save({"steps": steps, "gradients": gradients, "pools": pools}, folder / "steps.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
