"""Sim-MPNet, the similarity memory prior network for medical image segmentation.

Tang et al., "Similarity Memory Prior is All You Need for Medical Image Segmentation", ICCV 2025,
arXiv 2507.00585. The variant ``paper`` is what the paper describes. The variant ``release`` computes what the authors'
program of December 2025 computes, so that their checkpoints give their numbers; ``docs/architecture.md`` lists the
differences. In the variant ``stable``, which is ``paper`` otherwise, gates and attention read normalised features, and
DS-GIM has no running statistics (``networks/gates.py``, ``dmwla.py``, ``dsgim.py``).
Symbols: B batch, S image side, s side of the DMW-LA encoder's image, C_i width of stage i.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from networks.decoder import Decoder
from networks.dmwla import ATTENTIONS, DMWLA, write_memories
from networks.dmwla_encoder import DMWLAEncoder
from networks.dsgim import DSGIM, SIMILARITIES, select_windows
from networks.gates import EncoderGate, Gate
from networks.layers import VARIANTS, NetworkError, check_choice, check_images, check_input, in_full_precision, resize
from networks.maxvit import SCALES, MaxViTEncoder, scale_widths
from networks.memory_bank import PrototypeMemoryBank

SIZE_STEP = 32  # the deepest stage has stride 32
CHOICES = {
    "variant": VARIANTS,
    "model_scale": tuple(SCALES),
    "attention": ATTENTIONS,
    "dsgim": (*SIMILARITIES, "none"),
    "encoders": ("both", "maxvit", "dmwla"),
    "gate": ("learned", "none"),
    "loss": ("subset", "last"),
    "prediction": ("sum", "last"),
}
"""The allowed values of each argument of ``SimMPNet`` that is a choice."""


class Observation(NamedTuple):
    """The decisions of a network's blocks about images (B, in_channels, S, S).

    Attributes:
        clusters: the cluster of each token, int64 (B, H, W), under the names of ``SimMPNet.memory_blocks``. During the
            warm-up it has no meaning.
        windows: the windows that DS-GIM selects, bool (B, positions, 4), row by row of the 2 x 2 grid; ``None`` if an
            ablation leaves the selection out.
        gates: the share that each gate lets through, in [0, 1], under the names of ``SimMPNet.gates``. For ``gate`` and
            the spatial gates it is a map (B, 1, h, w), for the others the mean of each image's map, (B, 1, 1, 1).
    """

    clusters: dict[str, Tensor]
    windows: Tensor | None
    gates: dict[str, Tensor]


class SimMPNet(nn.Module):
    """Segment images with two encoders, a decoder and four logit maps. MaxViT gates the image of the other encoder.

    Images:
        num_classes: number of classes, background included.
        in_channels: 3 are used unchanged; 1 (grey), 2, 4, ... are mapped to three by a learned 1x1 convolution.
        img_size: side S of the input in pixels, a multiple of 32.
        img_size_dmwla: side of the DMW-LA encoder's image, a multiple of 32.

    Network:
        model_scale: ``pico``, ``nano``, ``tiny``, ``small`` (the paper's) or ``base``.
        variant: ``"paper"``, ``"release"`` or ``"stable"``.
        feature_dim: memory width d of the encoder's blocks (the paper uses 256, and 128 on ACDC).
        num_clusters: clusters of the encoder's blocks; ``None`` means ``num_classes``.
        pretrained: a MaxViT weight file, ``"hub"`` (timm's download), or ``None`` for random weights.

    Memory:
        decoder_feature_dim: memory width d of the decoder's blocks.
        decoder_num_clusters: clusters of the decoder's blocks.
        columns_per_cluster: M.
        pool_momentum: weight of a key when it is blended into a column.
        phi_k_momentum: share of phi_k that an update keeps.
        replaced_columns: K, how many columns of each cluster a step renews, before W-LD changes it.
        warmup_iterations: training steps before the memory is used.

    Ablations, each of which leaves out one part:
        attention: ``"dmwla"``; ``"plain"``: without DMW-LA, that is, without the memory and the intra-cluster
            interaction; ``"intra_cluster"``: without the global interaction after the warm-up.
        dsgim: ``"both"`` similarities of DS-GIM, only ``"cosine"``, only ``"euclidean"``, or ``"none"``: no DS-GIM.
        encoders: ``"both"``, only ``"maxvit"``, or only ``"dmwla"``; the decoder's maps keep their sizes.
        gate: ``"learned"``, or ``"none"``: the DMW-LA encoder sees the image as it is.
        loss: ``"subset"``: the sum over all combinations of the four logit maps; or ``"last"``: only the last level of
            the decoder has a head, so training and prediction use only its map.

    Evaluation:
        prediction: ``"sum"`` of the four logit maps (as in the paper), or ``"last"``: only the finest map. Training is
            the same for both.

    Raises NetworkError: unknown scale, variant or ablation, unsupported size or channels, or weights that do not fit.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        img_size: int = 256,
        img_size_dmwla: int = 224,
        model_scale: str = "small",
        variant: str = "paper",
        feature_dim: int = 256,
        num_clusters: int | None = None,
        pretrained: str | Path | None = None,
        decoder_feature_dim: int = 128,
        decoder_num_clusters: int = 10,
        columns_per_cluster: int = 100,
        pool_momentum: float = 0.3,
        phi_k_momentum: float = 0.95,
        replaced_columns: int = 50,
        warmup_iterations: int = 2000,
        attention: str = "dmwla",
        dsgim: str = "both",
        encoders: str = "both",
        gate: str = "learned",
        loss: str = "subset",
        prediction: str = "sum",
    ):
        super().__init__()
        num_clusters = num_classes if num_clusters is None else num_clusters
        # All arguments that rebuild this network, without the weights that it started from.
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__", "pretrained")}
        check_images(num_classes, in_channels, SIZE_STEP, img_size=img_size, img_size_dmwla=img_size_dmwla)
        for name, choices in CHOICES.items():
            check_choice(name, self.config[name], choices)

        self.leaves_parameters_out = attention == "intra_cluster"  # some parameters get no gradient: DDP must know
        memory = ("columns_per_cluster", "pool_momentum", "phi_k_momentum", "replaced_columns", "warmup_iterations")
        blocks = {name: self.config[name] for name in ("attention", *memory)}
        self.stem = nn.Identity()
        if in_channels != 3:
            self.stem = nn.Sequential(nn.Conv2d(in_channels, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
        self.maxvit = self.gate = self.dmwla_encoder = None
        if encoders != "dmwla":
            self.maxvit = MaxViTEncoder(model_scale, img_size, pretrained)
        elif pretrained is not None:
            raise NetworkError(f"pretrained is {pretrained}, but encoders='dmwla' has no MaxViT: omit one of them")
        widths = self.maxvit.widths if self.maxvit is not None else scale_widths(model_scale)
        if encoders == "both" and gate == "learned":
            self.gate = EncoderGate(widths[-1], variant)
        if encoders != "maxvit":
            sizes = {"feature_dim": feature_dim, "num_clusters": num_clusters}
            self.dmwla_encoder = DMWLAEncoder(widths, img_size_dmwla, variant, dsgim=dsgim, **sizes, **blocks)
        sizes = {"feature_dim": decoder_feature_dim, "num_clusters": decoder_num_clusters}
        self.decoder = Decoder(widths, variant, **sizes, **blocks)
        with_head = widths if loss == "subset" else widths[:1]
        self.heads = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in reversed(with_head))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return four logit maps, deepest first, (B, num_classes, S, S); the arg max of their sum is the prediction.

        With ``loss="last"``, and in evaluation with ``prediction="last"``, the list has only the last of them.

        Args:
            x: images (B, in_channels, S, S), S = ``img_size``.
        """
        check_input(x, self.config["in_channels"], self.config["img_size"])
        size, to_write = x.shape[-1], []
        with in_full_precision(x):  # bf16 would round the image's contrast away
            x = self.stem(x)  # (B, 3, S, S)
        skips = []  # s_i (B, C_i, s / 2^(i+1), s / 2^(i+1)), s = img_size_dmwla
        if self.maxvit is not None:
            f = self.maxvit(x)  # f_i (B, C_i, S / 2^(i+1), S / 2^(i+1))
            if self.gate is not None:
                x = x * resize(self.gate(f[-1]), size)
            skips = [resize(f_i, self.config["img_size_dmwla"] // 2**i) for i, f_i in enumerate(f, 2)]
        if self.dmwla_encoder is not None:
            e = self.dmwla_encoder(x, to_write)  # e_i, of the shape of s_i
            skips = [e_i + f_i for e_i, f_i in zip(e, skips, strict=True)] if skips else e
        d = self.decoder(skips, to_write)  # d_4 ... d_1
        if to_write:
            write_memories(to_write)
        all_maps = self.training or self.config["prediction"] == "sum"
        heads = self.heads if all_maps else self.heads[-1:]
        return [resize(head(d_i), size) for head, d_i in zip(heads, d[-len(heads) :], strict=True)]

    def memory_banks(self, decoder: bool = True) -> Iterator[PrototypeMemoryBank]:
        """Yield every memory bank, those of the encoder first; ``decoder=False`` omits the decoder's."""
        yield from (block.bank for name, block in self.memory_blocks() if decoder or name.startswith("encoder"))

    def memory_blocks(self) -> Iterator[tuple[str, DMWLA]]:
        """Yield the name and the module of every DMW-LA block, in the order of the forward pass.

        ``encoder 3.1`` is the first block of the third stage, ``decoder 4`` the block of the deepest level.
        """
        stages = self.dmwla_encoder.stages if self.dmwla_encoder is not None else ()
        blocks = {f"encoder {i}.{j}": block for i, stage in enumerate(stages, 1) for j, block in enumerate(stage, 1)}
        blocks |= {f"decoder {len(self.decoder.dmwla) - i}": block for i, block in enumerate(self.decoder.dmwla)}
        yield from ((name, block) for name, block in blocks.items() if isinstance(block, DMWLA))

    @torch.no_grad()
    def observe(self, x: Tensor) -> Observation:
        """Do a forward pass on images (B, in_channels, S, S) and return the decisions of its blocks."""
        clusters: dict[str, Tensor] = {}
        windows: list[Tensor] = []
        names = {block: name for name, block in self.memory_blocks()}

        def look(module: DMWLA | DSGIM, arguments: tuple) -> None:
            if module in names:
                clusters[names[module]] = module.clusters(arguments[0])
            elif module.decays_windows:
                windows.append(select_windows(arguments[0]))

        with ExitStack() as hooks, self.gates_observed() as gates:
            for module in self.modules():
                if isinstance(module, DMWLA | DSGIM):
                    hooks.enter_context(module.register_forward_pre_hook(look))
            self(x)
        selected = torch.stack(windows, dim=1) if windows else None
        return Observation(clusters, selected, {name: maps[0] for name, maps in gates.items()})

    def gates(self) -> Iterator[tuple[str, Gate]]:
        """Yield the name and the module of every gate of ``networks/gates.py``.

        ``gate`` is the gate between the encoders. ``gate_maxvit_i`` and ``gate_dmwla_i`` inject the image after stage
        i. ``gate_channel_i`` and ``gate_spatial_i`` belong to level i of the decoder; level 1 is the shallowest.
        """
        if self.gate is not None:
            yield "gate", self.gate.gate
        for name, encoder in (("maxvit", self.maxvit), ("dmwla", self.dmwla_encoder)):
            for i, injection in enumerate(encoder.injection if encoder is not None else (), 1):
                yield f"gate_{name}_{i}", injection.gate
        spatial = self.decoder.spatial_attention.gates
        for i, channel in enumerate(self.decoder.channel_attentions):
            level = len(spatial) - i
            yield f"gate_channel_{level}", channel.gate
            yield f"gate_spatial_{level}", spatial[i]

    @contextmanager
    def gates_observed(self) -> Iterator[dict[str, list[Tensor]]]:
        """Collect the gates of each forward pass in the context, as in ``Observation``, by the names of ``gates``."""
        names = {gate: name for name, gate in self.gates()}
        seen: dict[str, list[Tensor]] = {name: [] for name in names.values()}

        def look(gate: Gate, _: tuple[Tensor], share: Tensor) -> None:
            share = share.detach().float()
            seen[names[gate]].append(share if share.shape[1] == 1 else share.mean((1, 2, 3), keepdim=True))

        with ExitStack() as hooks:
            for gate in names:
                hooks.enter_context(gate.register_forward_hook(look))
            yield seen

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters for an optimizer; ``lr_scale`` of a group multiplies its learning rate.

        The second group, if there is one, is the gate between the encoders (``networks/gates.py`` explains why).
        """
        if self.gate is None or self.gate.lr_scale == 1:
            return [{"params": list(self.parameters()), "lr_scale": 1.0}]
        others = [parameter for name, parameter in self.named_parameters() if not name.startswith("gate.")]
        gate = list(self.gate.parameters())
        return [{"params": others, "lr_scale": 1.0}, {"params": gate, "lr_scale": self.gate.lr_scale}]
