"""Load a checkpoint of the authors' release into our network, name by name."""

import re
from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from networks.layers import NetworkError
from networks.sim_mpnet import SimMPNet

# Our prefix and the release's; the first match applies.
PREFIXES = [
    (r"stem\.", "conv."),
    (r"maxvit\.stem\.", "stem_1."),
    (r"maxvit\.stages\.(\d)\.", lambda m: f"encoder1_{int(m[1]) + 1}."),
    (r"maxvit\.injection\.(\d)\.", lambda m: f"out_head1_{int(m[1]) + 1}_in."),
    (r"gate\.", "out_head4_in."),
    (r"dmwla_encoder\.patch_embeddings\.(\d)\.", lambda m: f"patch_embed{int(m[1]) + 1}."),
    (r"dmwla_encoder\.stages\.(\d)\.", lambda m: f"DMWLA_{int(m[1]) + 1}."),
    (r"dmwla_encoder\.injection\.(\d)\.", lambda m: f"out_head2_{int(m[1]) + 1}_in."),
    (r"dmwla_encoder\.dsgim\.norm1\.(statistics\.\d\.)?", "DSGIM.ConvBlock.conv.1."),
    (r"dmwla_encoder\.dsgim\.norm2\.(statistics\.\d\.)?", "DSGIM.ConvBlock.conv.4."),
    (r"dmwla_encoder\.dsgim\.conv1\.", "DSGIM.ConvBlock.conv.0."),
    (r"dmwla_encoder\.dsgim\.conv2\.", "DSGIM.ConvBlock.conv.3."),
    (r"dmwla_encoder\.dsgim\.", "DSGIM."),
    (r"decoder\.conv1x1\.", "decoder.Conv_1x1."),
    (r"decoder\.dmwla\.(\d)\.", lambda m: f"decoder.DMWLA_{4 - int(m[1])}."),
    (r"decoder\.conv_blocks\.(\d)\.", lambda m: f"decoder.ConvBlock{4 - int(m[1])}.conv."),
    (r"decoder\.ups\.(\d)\.", lambda m: f"decoder.Up{3 - int(m[1])}.up."),
    (r"decoder\.channel_attentions\.(\d)\.mlp\.0\.", lambda m: f"decoder.CA{3 - int(m[1])}.fc1."),
    (r"decoder\.channel_attentions\.(\d)\.mlp\.2\.", lambda m: f"decoder.CA{3 - int(m[1])}.fc2."),
    (r"decoder\.spatial_attention\.conv\.", "decoder.SA.conv1."),
    (r"heads\.(\d)\.", lambda m: f"out_head{int(m[1]) + 1}."),
]
BANK = {
    "bank.pool": "concept_pool",
    "bank.prototypes": "concept_proto",
    "bank.warmup_counter": "warmup_iter_counter",
    "phi_k": "phi.weight",  # the release does not store it: start as a copy of phi
}
# A release checkpoint lacks these: W-LD sets K, and the counts are only a record.
OURS = (".bank.replaced_columns", ".bank.key_counts")
# Second names of the backbone's tensors, unused layers, and constants.
IGNORED = re.compile(r"backbone1\.(stem|stages|norm)\.|decoder\.CA4\.|(.*\.)?k$|.*\.pool_structured$")


def release_arguments(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of the network that a state dict of the release belongs to; its scale is always small.

    Raises NetworkError: the state dict is not one of the release.
    """
    weights = {name.removeprefix("module."): value for name, value in state_dict.items()}
    try:
        feature_dim, num_clusters = weights["DMWLA_1.0.concept_proto"].shape
        decoder_feature_dim, decoder_num_clusters = weights["decoder.DMWLA_1.concept_proto"].shape
        return dict(
            num_classes=len(weights["out_head1.bias"]),
            variant="release",
            feature_dim=feature_dim,
            num_clusters=num_clusters,
            decoder_feature_dim=decoder_feature_dim,
            decoder_num_clusters=decoder_num_clusters,
            columns_per_cluster=weights["DMWLA_1.0.concept_pool"].shape[1] // num_clusters,
        )
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise NetworkError("not a checkpoint of this project or of the release: give a checkpoint of either") from error


def load_release_state_dict(model: SimMPNet, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state dict that has the release's names, with or without the prefix ``module.``, into ``model``.

    Args:
        model: a network of scale ``small`` at 256 px, with the classes and clusters of the state dict.
        state_dict: the release's tensors.

    Raises NetworkError: tensors are missing, left over or of another shape. It lists them; the model is unchanged.
    """
    own = model.state_dict()
    sources = {name: release_name(name) for name in own if not name.endswith(OURS)}
    theirs = {name.removeprefix("module."): value for name, value in state_dict.items()}
    theirs = {name: value for name, value in theirs.items() if not IGNORED.match(name)}
    if model.config["in_channels"] == 3:  # a colour model has the layer for grey images too, but does not use it
        theirs = {name: value for name, value in theirs.items() if not name.startswith("conv.")}
    fitting = {name: _in_our_layout(name, theirs[x], own[name]) for name, x in sources.items() if x in theirs}
    unfit = {sources[name] for name, value in fitting.items() if value.shape != own[name].shape}
    problems = {
        "missing": set(sources.values()) - theirs.keys(),
        "left over": theirs.keys() - set(sources.values()),
        "of another shape": {f"{name} {tuple(theirs[name].shape)}" for name in unfit},
    }
    if any(problems.values()):
        lists = (f"{what}: {', '.join(sorted(names)) or 'none'}" for what, names in problems.items())
        raise NetworkError(f"the checkpoint does not fit this network of the release: {'; '.join(lists)}")
    model.load_state_dict(own | fitting)


def release_name(name: str) -> str:
    """Return the release's name of our tensor ``name``. Several of our tensors may come from one of theirs."""
    for pattern, replacement in PREFIXES:
        name, found = re.subn(f"^{pattern}", replacement, name, count=1)
        if found:
            break
    for ours, theirs in BANK.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name


def _in_our_layout(name: str, value: Tensor, own: Tensor) -> Tensor:
    """Return the release's tensor in our layout, or as it is if that is impossible."""
    if name.endswith("bank.pool") and value.ndim == 2 and value.shape[1] == own.shape[0] * own.shape[1]:
        return rearrange(value, "d (k m) -> k m d", m=own.shape[1])
    if name.endswith("bank.prototypes") and value.ndim == 2:
        return value.T
    if name.endswith("bank.warmup_counter") and value.numel() == 1:
        return value.reshape(()).to(own.dtype)
    if value.shape == (*own.shape, 1, 1):  # theta, phi, g and o are 1x1 convolutions in the release
        return value.flatten(1)
    return value
