"""A short training whose steps are written down, alone or as one of several ranks; a script, for torchrun.

``python tests/two_ranks.py FOLDER BATCH_SIZE [cuda]`` trains Sim-MPNet (pico, 64 px) on drawings past the memory's
warm-up. PyTorch has a synchronised BatchNorm only for GPUs; here batch norm itself is synchronised, alone too.
"""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import DMWLA, SimMPNet
from tests.mini import trainer
from utils.distribution import (
    gather_over_ranks,
    process_group,
    rank,
    rank_device,
    share_buffers,
    sum_over_ranks,
    world_size,
)

BANK = ("pool", "prototypes", "warmup_counter", "replaced_columns", "key_counts")


def synchronised_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Do what ``F.batch_norm`` does, in training over the batches of all ranks."""
    if not training:
        return batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    moments = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
    if world_size() > 1:
        moments = AllReduce.apply(moments) / world_size()
    mean, variance = moments[0], moments[1] - moments[0].square()
    count = x.numel() // x.shape[1] * world_size()
    running_mean.lerp_(mean.detach(), momentum)
    running_var.lerp_(variance.detach() * count / (count - 1), momentum)
    x = (x - mean[:, None, None]) * (variance + eps).rsqrt()[:, None, None]
    return x if weight is None else x * weight[:, None, None] + bias[:, None, None]


class AllReduce(torch.autograd.Function):
    """The sum over ranks of what each has; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return sum_over_ranks(x.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.clone())


batch_norm, F.batch_norm = F.batch_norm, synchronised_batch_norm


def network(**config) -> SimMPNet:
    """Build the network without what draws chance for each image."""
    model = SimMPNet(**config)
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def memory_of_a_block() -> list[Tensor]:
    """Return the pool of one DMW-LA block after each of eight steps of given tokens, three of them warm-up."""
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
    with process_group(device):
        pools = memory_of_a_block()
        # AdamW makes whole steps of gradients that are rounding and nothing else: small ones keep runs together.
        flags = ("--batch_size", batch_size, "--wld_start_epoch", "1", "--base_lr", "1e-6")
        made = trainer(folder / "run", *flags, network=network, slices=12, volumes=3, device=device)
        if rank():
            torch.manual_seed(rank())
        steps, gradients = [], {}
        step = made.train_step

        def written_down(batch):
            losses = step(batch)
            if not gradients:
                gradients.update({name: p.grad.clone() for name, p in made.model.named_parameters()})
            digest = hashlib.sha256()
            for module in made.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if name in (*BANK, "phi_k"):
                        digest.update(buffer.cpu().numpy().tobytes())
            steps.append({"losses": losses.tolist(), "banks": gather_over_ranks(digest.hexdigest())})
            return losses

        made.train_step = written_down
        made.fit()
        if not rank():
            torch.save({"steps": steps, "gradients": gradients, "pools": pools}, folder / "steps.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
