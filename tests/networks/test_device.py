"""What a GPU would be asked for, found out without one.

Fake tensors have a device and a shape but no values. On a pretended GPU they refuse whatever would wait for one (a
value read in Python, a shape that hangs on values) and two devices in one operation. Autograd needs a real device, so
these are forward passes; that of the loss computes its gradient too.
"""

import re
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from networks import DMWLA, DSGIM, NETWORKS, PrototypeMemoryBank, SimMPNet, dmwla
from tests.networks.conftest import NARROW
from tests.networks.test_registry import make
from utils import losses
from utils.cli import set_precision
from utils.losses import subset_losses

GPU = torch.device("cuda", 0)


class NothingWaits(TorchDispatchMode):
    """Refuses copies between the host and the device that make both wait."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        output = function(*arguments, **options)
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {t.device.type for t in (*arguments, output) if isinstance(t, torch.Tensor)}
            assert len(devices) == 1 or options.get("non_blocking"), f"a copy waits, to {output.device}"
        return output


@pytest.fixture(autouse=True)
def autocast_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(losses, "_compiled", lambda: losses._sums)


def move(module: nn.Module) -> None:
    """Move a module to the pretended GPU, its memory past the warm-up."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        module._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    leave_of_the_warm_up(module, 0)


def leave_of_the_warm_up(module: nn.Module, steps: int) -> None:
    for bank in (m for m in module.modules() if isinstance(m, PrototypeMemoryBank)):
        bank._steps_done, bank._in_warmup = bank.sampling_steps - steps, steps > 0
        bank._version = bank.warmup_counter._version


@pytest.mark.parametrize(("variant", "amp_dtype"), [("paper", None), ("release", torch.float16)])
def test_a_training_step_asks_the_device_nothing(variant, amp_dtype, narrow):
    model = SimMPNet(4, variant=variant, **NARROW).to(memory_format=torch.channels_last).train()
    of_head = []
    model.heads[0].register_forward_hook(lambda *logits: of_head.append(logits[-1].dtype))
    with FakeTensorMode(), NothingWaits():
        move(model)
        images = torch.rand(2, 1, 64, 64, device=GPU)
        label = torch.randint(4, (2, 64, 64), device=GPU)
        for steps_left in (100, 0):  # in the warm-up and after it
            leave_of_the_warm_up(model, steps_left)
            with torch.autocast("cuda", amp_dtype, enabled=amp_dtype is not None):
                logits = model(images)
            losses = subset_losses(logits, label)
            assert of_head.pop() == (amp_dtype or torch.float32)
            assert all(loss.device == GPU and loss.dtype == torch.float32 for loss in losses)
            for bank in model.memory_banks():
                assert bank.pool.device == GPU and bank.pool.dtype == torch.float32
                assert bank._steps_done == bank.sampling_steps - max(steps_left - 1, 0)
        with pytest.raises(AssertionError, match="a copy waits"):
            label.cpu()


class Operations(TorchDispatchMode):
    """Lists what a GPU would have to start: operations that compute or copy.

    Each has its name, the shape of its output, and whether TensorFloat-32 may round it if it is a product.
    """

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output, name = function(*arguments, **(options or {})), function._opname
        if function.namespace == "aten" and not (function.is_view or name in ("detach", "_unsafe_view")):
            rounds = torch.backends.cudnn if name == "convolution" else torch.backends.cuda.matmul
            self.seen.append((name, tuple(getattr(output, "shape", ())), rounds.allow_tf32))
        return output

    def count(self) -> int:
        """Return how many there were since the last call."""
        seen, self.seen = self.seen, []
        return len(seen)


# Before updates and subsets were batched: 976 of 2482 (3219), and 193. The loss has 160 in PyTorch 2.15, 185 in 2.11.
@pytest.mark.parametrize(("amp_dtype", "most"), [(None, 1760), (torch.bfloat16, 2520)])
def test_a_step_starts_few_operations(amp_dtype, most, monkeypatch):
    torch.set_deterministic_debug_mode("default")  # a test before may have left it on; it splits resizing into many
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda query, *_, **__: query.clone())
    model = SimMPNet(9).to(memory_format=torch.channels_last).train()  # the paper's, at 256 / 224

    def forward(images: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast("cuda", amp_dtype, enabled=amp_dtype is not None):
            return model(images)

    with FakeTensorMode(), Operations() as started:
        move(model)
        images, label = torch.rand(2, 1, 256, 256, device=GPU), torch.randint(9, (2, 256, 256), device=GPU)
        started.count()
        logits = forward(images)
        whole = started.count()
        subset_losses(logits, label)
        of_the_loss = started.count()
        for bank in model.memory_banks():
            bank.writable = False
        forward(images)
        of_the_update = whole - started.count()
    assert whole <= most and of_the_update <= 300 and of_the_loss <= 190, (whole, of_the_update, of_the_loss)


# Of the operations that PyTorch's documentation of use_deterministic_algorithms lists, those that raise on a GPU.
RAISES = "^(scatter_(reduce|add)|put_|histc|bincount|kthvalue|median|nll_loss2d)|(adaptive|3d|flection|grid).*_back"


@pytest.mark.parametrize("name", NETWORKS)
def test_no_operation_of_a_step_raises_under_strict_determinism(narrow, monkeypatch, name):
    """A step on the CPU, with its backward pass, in the form that a GPU computes."""
    monkeypatch.setattr("networks.dmwla._attend_by_cluster", dmwla._attend_to_own)
    model = make(name).to(memory_format=torch.channels_last).train()
    leave_of_the_warm_up(model, 1)
    for _ in range(2 if name == "sim_mpnet" else 1):
        with Operations() as started:
            subset_losses(model(torch.rand(2, 1, 64, 64)), torch.randint(3, (2, 64, 64)))[0].backward()
        raising = {operation for operation, *_ in started.seen if re.search(RAISES, operation)}
        assert len(raising) == (name == "swin_upernet"), raising  # docs/baselines.md says it


@pytest.mark.usefixtures("full_precision")
def test_tf32_rounds_no_score_no_assignment_and_no_key():
    set_precision("tf32", torch.device("cpu"))
    for part, exact, rounded in (
        (DSGIM(8), [("convolution", (2, 8, 6, 6)), ("bmm", (2, 36, 36))], ("convolution", (2, 2, 6, 6))),
        (DMWLA(8, 16, num_clusters=3), [("mm", (72, 3)), ("mm", (72, 16))], ("mm", (72, 8))),
    ):
        with FakeTensorMode(), Operations() as started:
            move(part)
            part.train()(torch.rand(2, 8, 6, 6, device=GPU))
        assert all((*product, False) in started.seen for product in exact) and (*rounded, True) in started.seen
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("num_clusters", [4, 9, 10])
@pytest.mark.parametrize("feature_dim", [128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_has_widths_and_strides_that_fused_kernels_take(num_clusters, feature_dim, dtype, monkeypatch):
    """A multiple of 8, the same for all three, side by side, or PyTorch writes the whole matrix down."""
    attention = mock.Mock(wraps=nn.functional.scaled_dot_product_attention)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    for channels in (96, 192, 384, 768):
        block = DMWLA(channels, feature_dim, num_clusters).eval()
        with FakeTensorMode(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            move(block)
            block(torch.rand(2, channels, 7, 7, device=GPU))
    calls = [call.args[:3] for call in attention.call_args_list]
    assert all(t.stride(-1) == 1 for call in calls for t in call)
    assert all(t.dtype == dtype or t.stride(0) for call in calls for t in call)  # cast before it is repeated
    widths = {tuple(t.shape[-1] for t in call) for call in calls}
    assert len(widths) > 1
    assert all(query % 8 == 0 and query == key == value for query, key, value in widths)
