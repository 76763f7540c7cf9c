"""Muon with all matrices of one shape orthogonalised together, in a precision that the device multiplies fast.

Imports torch. Used by arc_system. torch.optim.Muon takes one matrix after the other, in bfloat16 on every device; on a
CPU without bfloat16 arithmetic that is a third of a training step of the smallest planner.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch.optim.Muon with the same settings and state, and the same update but for rounding.

    Source: Jordan 2024 (Muon); Liu 2025, arXiv 2502.16982, for adjust_lr_fn "match_rms_adamw", the only one here.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step on the gradients that are there."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            averages: list[Tensor] = []
            self._init_group(group, parameters, gradients, averages)
            if not parameters:
                continue
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            momentum = group["momentum"]
            updates = torch._foreach_lerp(gradients, averages, momentum) if group["nesterov"] else averages
            directions = orthogonalized(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            rates = [-0.2 * max(p.shape) ** 0.5 * group["lr"] for p in parameters]
            torch._foreach_add_(parameters, torch._foreach_mul(directions, rates))


def orthogonalized(
    matrices: list[Tensor], coefficients: tuple[float, float, float], steps: int, eps: float
) -> list[Tensor]:
    """Return each matrix [m, n] with its singular values near 1, in the dtype of the first.

    Newton-Schulz iterations X <- a X + (b X X' + c (X X')^2) X of the matrix over its norm, all of one shape as one
    batch. In bfloat16 on a GPU that has it, else in float32.
    """
    shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        shapes[min(matrix.shape), max(matrix.shape)].append(index)
    found: list[Tensor] = list(matrices)
    for indices in shapes.values():
        wide = [matrices[i] if matrices[i].shape[0] <= matrices[i].shape[1] else matrices[i].T for i in indices]
        x = torch.stack(wide).to(_dtype(matrices[0].device))
        x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
        a, b, c = coefficients
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        for i, direction in zip(indices, x.to(matrices[0].dtype), strict=True):
            found[i] = direction if matrices[i].shape[0] <= matrices[i].shape[1] else direction.T
    return found


def _dtype(device: torch.device) -> torch.dtype:
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32
