"""Reward of a refinement: how much a bounded potential of the predicted grid rises, Phi(after) - Phi(before).

Pure functions on tensors; imports torch, config and arc_data only. Used by arc_system to score what the policy
proposes and by reports: `cells_union` is the metric "cells (predicted size)", `skill` compares with trivial answers.

Shapes: B batch (any leading dimensions flattened by the caller, for example G*B), H rows, W columns, C colours (10).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from arc_data import NUM_COLORS, PAD
from config import RewardConfig


@dataclass(frozen=True)
class Potentials:
    """Components of the potential, each [B] in [0, 1] and 1 when the prediction is the target.

    accuracy: equal cells / cells of the union of both areas; size: ratio of heights times ratio of widths; color:
    1 - total variation of the colour histograms; iou: right cells that both grids change / cells that either changes,
    where a change is one against the input if the target has its size, else against the target's background; exact:
    1 or 0; reverse: agreement of the backward prediction with the input times accuracy, or None; total: weighted mean.
    """

    accuracy: Tensor
    size: Tensor
    color: Tensor
    iou: Tensor
    exact: Tensor
    reverse: Tensor | None
    total: Tensor


def cell_mask(size: Tensor, height: int, width: int) -> Tensor:
    """Return True on the cells of grids of the given sizes [B, 2] laid top-left on a canvas, [B, height, width]."""
    rows_BH1 = torch.arange(height, device=size.device)[None, :, None] < size[:, 0, None, None]
    cols_B1W = torch.arange(width, device=size.device)[None, None, :] < size[:, 1, None, None]
    return rows_BH1 & cols_B1W


def cells_union(prediction: Tensor, pred_size: Tensor, target: Tensor, target_size: Tensor) -> Tensor:
    """Return equal cells divided by the cells of the union of both areas, [B] in [0, 1].

    Shapes:  prediction [B, H, W], target [B, H', W'] colours, sizes [B, 2]; grids are aligned top-left
    Cell accuracy when the sizes agree; 1 only when the prediction is the target, size included.
    """
    prediction_BHW, target_BHW = _common_canvas((prediction, pred_size), (target, target_size))
    matches_B, union_B = _match_counts(prediction_BHW, target_BHW)
    return matches_B / union_B.clamp(min=1)


def potentials(
    prediction: Tensor,
    pred_size: Tensor,
    target: Tensor,
    target_size: Tensor,
    input: Tensor,
    input_size: Tensor,
    config: RewardConfig,
    reverse_agreement: Tensor | None = None,
    reverse_reliability: Tensor | None = None,
) -> Potentials:
    """Return the components of the potential and their weighted mean.

    Shapes:  prediction [B, H, W], target [B, H', W'], input [B, Hi, Wi] colours on canvases of any size; sizes [B, 2];
             reverse_agreement, reverse_reliability [B] in [0, 1] -> each field [B]
    Without a backward planner (no agreement) its component is left out and the weights renormalised. With one, it is
    gated by accuracy, since a copy of the input agrees with the input under any backward planner close to the identity,
    and weighted by the reliability: how well the backward planner does from the true outputs of this task.
    """
    grids = ((prediction, pred_size), (target, target_size), (input, input_size))
    prediction_BHW, target_BHW, input_BHW = _common_canvas(*grids)
    matches_B, union_B = _match_counts(prediction_BHW, target_BHW)
    accuracy_B = matches_B / union_B.clamp(min=1)
    exact_B = (matches_B == union_B).float()
    smaller_B2, larger_B2 = torch.minimum(pred_size, target_size), torch.maximum(pred_size, target_size)
    size_B = (smaller_B2 / larger_B2.clamp(min=1)).prod(-1)
    counts_BC, pred_counts_BC = color_counts(target_BHW), color_counts(prediction_BHW)
    color_B = 1 - 0.5 * (_normalized(pred_counts_BC) - _normalized(counts_BC)).abs().sum(-1)
    same_size_B = (target_size == input_size).all(-1)
    reference_BHW = torch.where(same_size_B[:, None, None], input_BHW, most_frequent(counts_BC)[:, None, None])
    iou_B = _changed_iou(prediction_BHW, target_BHW, reference_BHW)

    parts = [
        (config.reward_accuracy, accuracy_B),
        (config.reward_size, size_B),
        (config.reward_color, color_B.clamp(min=0)),
        (config.reward_iou, iou_B),
        (config.reward_exact, exact_B),
    ]
    reverse_B = None
    if reverse_agreement is not None:
        reverse_B = reverse_agreement.float() * accuracy_B
        reliability_B = torch.ones_like(accuracy_B) if reverse_reliability is None else reverse_reliability.float()
        parts.append((config.reward_reverse * reliability_B, reverse_B))
    weighted_B = sum(weight * part_B for weight, part_B in parts)
    weight_B = sum(weight * torch.ones_like(part_B) for weight, part_B in parts)
    total_B = torch.where(weight_B > 0, weighted_B / weight_B.clamp(min=1e-12), 0.0)
    return Potentials(accuracy_B, size_B, parts[2][1], iou_B, exact_B, reverse_B, total_B)


def shaping_reward(before: Potentials, after: Potentials) -> Tensor:
    """Return Phi(after) - Phi(before), [B] in [-1, 1]; 0 when nothing changed, telescoping over rounds."""
    return after.total - before.total


def dense_reward(before: Tensor, after: Tensor, config: RewardConfig) -> Tensor:
    """Return the weighted, clipped fall of cross-entropy (nats per cell), [B] in [-weight, weight].

    It is added to the policy's reward because a small change of the prompt often leaves every argmax as it was.
    A proper score: it cannot be raised by betting on the background.
    """
    return config.reward_dense * (before.float() - after.float()).clamp(-1.0, 1.0)


def trivial_potential(
    target: Tensor, target_size: Tensor, input: Tensor, input_size: Tensor, config: RewardConfig
) -> Tensor:
    """Return the better potential of two trivial answers: all background at the true size, and the input, [B].

    The background is the target's most frequent colour. The reverse component is left out.
    """
    (target_BHW,) = _common_canvas((target, target_size))
    background_BHW = most_frequent(color_counts(target_BHW))[:, None, None].expand_as(target_BHW)
    background = potentials(background_BHW, target_size, target, target_size, input, input_size, config)
    copy = potentials(input, input_size, target, target_size, input, input_size, config)
    return torch.maximum(background.total, copy.total)


def skill(potential: Tensor, trivial: Tensor) -> Tensor:
    """Return (Phi - trivial) / (1 - trivial), [B]: at most 1, above 0 when better than a trivial answer.

    0 where the trivial answer is already exact, since nothing can be gained there.
    """
    room_B = 1 - trivial
    return torch.where(room_B > 1e-6, (potential - trivial) / room_B.clamp(min=1e-6), 0.0)


def color_counts(grid: Tensor) -> Tensor:
    """Return how often each colour occurs, [B, H, W] colours (anything else is skipped) -> int64 [B, C]."""
    colors_C = torch.arange(NUM_COLORS, device=grid.device)
    return (grid.flatten(1)[:, :, None] == colors_C).sum(1)


def most_frequent(counts: Tensor) -> Tensor:
    """Return the most frequent colour, [B, C] counts -> [B]; the lowest colour among equals."""
    return (counts * NUM_COLORS - torch.arange(NUM_COLORS, device=counts.device)).argmax(-1)


def _common_canvas(*grids: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Return the grids top-left on one canvas that holds them all, PAD outside their sizes."""
    height, width = max(g.shape[1] for g, _ in grids), max(g.shape[2] for g, _ in grids)
    laid = []
    for grid_BHW, size_B2 in grids:
        padded_BHW = F.pad(grid_BHW, (0, width - grid_BHW.shape[2], 0, height - grid_BHW.shape[1]), value=PAD)
        laid.append(torch.where(cell_mask(size_B2, height, width), padded_BHW, PAD))
    return laid


def _match_counts(prediction_BHW: Tensor, target_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of equal cells and of cells in either grid, both [B], of grids with PAD outside."""
    either_BHW = (prediction_BHW != PAD) | (target_BHW != PAD)
    equal_BHW = (prediction_BHW == target_BHW) & either_BHW
    return equal_BHW.flatten(1).sum(1), either_BHW.flatten(1).sum(1)


def _changed_iou(prediction_BHW: Tensor, target_BHW: Tensor, reference_BHW: Tensor) -> Tensor:
    """Return right cells that both grids change / cells that either changes against the reference, [B]; 1 if none."""
    target_changed_BHW = (target_BHW != PAD) & (target_BHW != reference_BHW)
    pred_changed_BHW = (prediction_BHW != PAD) & (prediction_BHW != reference_BHW)
    right_BHW = target_changed_BHW & pred_changed_BHW & (prediction_BHW == target_BHW)
    right_B = right_BHW.flatten(1).sum(1)
    union_B = (target_changed_BHW | pred_changed_BHW).flatten(1).sum(1)
    return torch.where(union_B > 0, right_B / union_B.clamp(min=1), 1.0)


def _normalized(counts_BC: Tensor) -> Tensor:
    """Return counts divided by their sum, [B, C]; zeros stay zeros."""
    return counts_BC / counts_BC.sum(-1, keepdim=True).clamp(min=1)
