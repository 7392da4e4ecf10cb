"""The group norm for channels innermost is PyTorch's function, in value and gradient, and copies nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cinemo.networks.norms import GroupNorm, group_norm


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_value_and_gradient(dtype: torch.dtype, tolerance: float, offset: float) -> None:
    torch.manual_seed(0)
    exact = (torch.randn(2, 24, 12, 5, dtype=torch.float64) * 3 + offset).to(dtype).double()
    weight, bias, gradient = torch.randn(24), torch.randn(24), torch.randn(2, 24, 12, 5)
    weight, bias, gradient = (value.to(dtype).double() for value in (weight, bias, gradient))
    wanted_inputs = [value.clone().requires_grad_() for value in (exact, weight, bias)]
    wanted = F.group_norm(wanted_inputs[0], 4, *wanted_inputs[1:], eps=1e-5)
    inputs = [value.to(dtype).requires_grad_() for value in (exact, weight, bias)]
    found = group_norm(inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:], 4, 1e-5)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    pairs = [(found, wanted)]
    pairs += zip(
        torch.autograd.grad(found, inputs, gradient.to(dtype)),
        torch.autograd.grad(wanted, wanted_inputs, gradient),
        strict=True,
    )
    for ours, theirs in pairs:
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < tolerance


def test_gradients_by_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *given: group_norm(*given, 2, 1e-5), (x, weight, bias))


class Copies(TorchDispatchMode):
    """Counts whole copies of activations, with those that PyTorch's kernel makes of what is not in plain layout."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.count = least, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(function)
        copied = name.startswith(("aten.clone", "aten.copy_")) and args[0].numel() >= self.least
        self.count += copied
        if name.startswith("aten.native_group_norm.") and args[0].device.type != "cpu":
            self.count += not args[0].is_contiguous()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("norm", "copies"), [(GroupNorm, False), (torch.nn.GroupNorm, True)])
def test_no_copies_off_the_cpu(norm: type[torch.nn.GroupNorm], copies: bool) -> None:
    layer = norm(4, 16, device="meta")
    x = torch.empty(2, 16, 8, 8, device="meta").contiguous(memory_format=torch.channels_last).requires_grad_()
    with Copies(x.numel()) as counted:
        layer(x).backward(torch.empty_like(x))
    assert bool(counted.count) == copies


def test_it_is_pytorchs_own_on_a_cpu() -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    ours, theirs = GroupNorm(4, 8), torch.nn.GroupNorm(4, 8)
    assert torch.equal(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())
