"""A short training that records its steps, alone or as one of several ranks; a script for torchrun.

``python tests/two_ranks.py FOLDER BATCH_SIZE [cuda]`` trains Sim-MPNet (pico, 64 px) on drawings past the memory's
warm-up, in float64 on a CPU: one process and two add up in different orders, and in float32 that rounding would change
which columns the memory chooses. PyTorch synchronises BatchNorm only on GPUs, so this file does it for every device.
"""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import DMWLA, SimMPNet
from networks.ranks import rank, world_size
from tests.mini import trainer
from utils.distribution import gather_over_ranks, process_group, rank_device, share_buffers, sum_over_ranks

BANK = ("pool", "prototypes", "warmup_counter", "replaced_columns", "key_counts", "phi_k")


def synchronised_batch_norm(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    """Do what ``F.batch_norm`` does, in training over the batches (B, C, H, W) of all ranks."""
    if not training:
        return batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    moments = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
    mean, square = sum_over_ranks(moments) / world_size()
    variance = square - mean.square()
    count = x.numel() // x.shape[1] * world_size()
    running_mean.lerp_(mean.detach(), momentum)
    running_var.lerp_(variance.detach() * count / (count - 1), momentum)
    x = (x - mean[:, None, None]) * (variance + eps).rsqrt()[:, None, None]
    return x if weight is None else x * weight[:, None, None] + bias[:, None, None]


batch_norm, F.batch_norm = F.batch_norm, synchronised_batch_norm


class Network(SimMPNet):
    """Sim-MPNet in the default precision, without what draws a random number for each image."""

    def __init__(self, **config):
        super().__init__(**config)
        for module in self.modules():
            if type(module).__name__ == "DropPath":
                module.drop_prob = 0.0
            if isinstance(module, nn.Dropout):
                module.p = 0.0

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
