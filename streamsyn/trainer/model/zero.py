"""The shares that DeepSpeed's ZeRO-3 deals out of each weight: its float32 values and its moments.

What DeepSpeed would write by itself is a file of each rank, to be read by as many ranks; so it is asked for
each weight and moment one after the other, and given them back, share by share.
"""

from collections.abc import Iterator

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
Shares = dict[str, torch.Tensor]
"""This rank's part of each of some tensors, flat, by name of the weight."""


def whole_weights(plain: torch.nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """The state of the model on CPU; nothing without `keep`.

    What is trained is in float32, whatever passes are computed in; what is not is as it is computed with.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
        else:
            with zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
        if keep:
            found[name] = whole.detach().cpu().clone()
    if keep:
        weights = {name for name, _ in plain.named_parameters(remove_duplicate=False)}
        found |= {name: value.cpu() for name, value in plain.state_dict().items() if name not in weights}
    return found


def whole_moments(plain: torch.nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Kind, name of the weight, and all of it; once there are moments, which is behind the first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    for name, parameter in trained(plain):
        for kind in MOMENTS:
            yield kind, name, safe_get_full_optimizer_state(parameter, kind)


def trained(plain: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The weights that have moments."""
    return ((name, one) for name, one in plain.named_parameters() if one.requires_grad)


def share_of(whole: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """Its flat part number `rank` of `world` equal ones, the last filled up with zeros."""
    size = -(-whole.numel() // world)
    part = whole.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))


def give_weights(plain: torch.nn.Module, shares: Shares) -> None:
    """Have DeepSpeed go on from these, in float32; it begins with what bf16 leaves of them."""
    from deepspeed.utils import safe_set_local_fp32_param

    for name, parameter in trained(plain):
        safe_set_local_fp32_param(parameter, shares[name])


def give_moment(parameter: torch.nn.Parameter, kind: str, share: torch.Tensor) -> None:
    """Have DeepSpeed go on from this; there has to be one already."""
    from deepspeed.utils import safe_set_local_optimizer_state

    safe_set_local_optimizer_state(parameter, share, kind)
