"""The agent: reads the demonstrations, then plans an output grid over T steps, forwards or backwards; and grid metrics.

May import config and arc_data. Used by loss_function (Trajectory), arc_system and evaluate.

Legend: B queries, N demonstration pairs of the batch, P demonstration slots of a query, V views, K attended cells,
T planning steps, H x W canvas, C colours (10), S latent codes, D width, R read heads.

The design is a demonstration read with a copy path: a query cell attends over the cells of the task's other
demonstrations; what it collects are their output colours and, for each of V ways to look at the input (flips, tiles,
crops, rays, ...), whether that view was right there. All tasks train the same metric between cells, so unseen tasks
work at once. The planner then refines the belief in T steps that feed one another, modulated by the prompt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc_data import MAX_SIDE, NUM_COLORS, PAD, Query, canvas_shape, to_device
from config import AgentConfig

OUTSIDE = NUM_COLORS  # the code of a view that points outside the input
NUM_CODES = NUM_COLORS + 1
FORWARD, BACKWARD = 0, 1
READ_FLOOR = 1e-3  # uniform share of the read mixture
NORM_EPS = 1e-5
HEAD_DIM = 32  # least width of a head of attention among cells


@dataclass
class Trajectory:
    """What one run of the planner believes, step by step.

    forward [B, T, H, W, C] logits f_1..f_T; backward [B, T, Hb, Wb, C] logits, backward[:, t] = b_t for t = 0..T-1
    (b_0 is matched with the input grid; the frame Hb x Wb covers both the input and the output canvas), or None;
    state_logits [B, T, H, W, S] and likelihood_logits [S, C]: latent codes, P(o|s) = softmax over C;
    preference_logits [B, H, W, C]; halt_logits [B, T]; row_logits, col_logits [B, 30] for sizes 1..30;
    features [B, D] pooled over valid cells and steps; mask [B, H, W] True on the cells planned on.
    """

    forward: Tensor
    backward: Tensor | None
    state_logits: Tensor
    likelihood_logits: Tensor
    preference_logits: Tensor
    halt_logits: Tensor
    row_logits: Tensor
    col_logits: Tensor
    features: Tensor
    mask: Tensor

    def final(self) -> Tensor:
        """Return the belief [B, H, W, C] of the last step. The halting head says how many were needed; it stops none,
        as TRM evaluates with its maximum number of steps (docs/LAB_NOTEBOOK.md)."""
        return self.forward[:, -1]

    def decode(self) -> Tensor:
        """Return the most probable colours [B, H, W] of the final belief, PAD outside the mask."""
        return torch.where(self.mask, self.final().argmax(-1), PAD)


@dataclass
class Reading:
    """What a query's cells know before planning: hidden [B, H, W, D], start logits [B, H, W, C] split by source."""

    hidden: Tensor
    prior_logits: Tensor | None
    read_logits: Tensor
    mask: Tensor

    def repeat(self, groups: int) -> Reading:
        """Return the reading of G copies of the batch, [G*B, ...], group-major and detached."""

        def tile(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().repeat(groups, *([1] * (x.dim() - 1)))

        tiled = (tile(x) for x in (self.hidden, self.prior_logits, self.read_logits, self.mask))
        return Reading(*tiled)


# Grids in ------------------------------------------------------------------------------------------------------------


def grid_colors(grid: Tensor) -> Tensor:
    """Return colours [B, H, W] int64 of [H, W] or [B, H, W] numbers, or of [10, H, W] or [B, 10, H, W] one-hot.

    Raises: ValueError when a number is not a whole colour 0..9 (or PAD), a side is above 30, or the shape is none of
    these.
    Note: a [10, H, W] tensor is read as one-hot when each cell holds a single 1, otherwise as a batch of ten grids.
    """
    if grid.dim() == 2:
        grid = grid[None]
    one_hot_axis = grid.dim() - 3
    if grid.dim() in (3, 4) and grid.shape[one_hot_axis] == NUM_COLORS:
        binary = ((grid == 0) | (grid == 1)).all() and (grid.sum(one_hot_axis) == 1).all()
        if binary:
            colors = grid.argmax(one_hot_axis)
            return colors if colors.dim() == 3 else colors[None]
    if grid.dim() != 3:
        raise ValueError(f"expected [H, W], one-hot [10, H, W] or a batch of either, got shape {tuple(grid.shape)}")
    if max(grid.shape[1:]) > MAX_SIDE:
        raise ValueError(f"a grid has at most {MAX_SIDE} rows and columns, got shape {tuple(grid.shape)}")
    colors = grid.long()
    if not ((colors == grid).all() and (((colors >= 0) & (colors < NUM_COLORS)) | (colors == PAD)).all()):
        raise ValueError("grid cells must be whole numbers 0-9")
    return colors


def query_from_grids(grid: Tensor) -> Query:
    """Return a Query without demonstrations for grids in any form that `grid_colors` accepts."""
    colors = grid_colors(grid)
    batch = colors.shape[0]
    size = grid_sizes(colors)
    empty = colors.new_full((1, 3, 3), PAD)
    none = colors.new_zeros((1, 2))
    zero = colors.new_zeros(batch)
    return Query(
        contexts=(),
        input=colors,
        input_size=size,
        demo_input=empty,
        demo_output=empty.clone(),
        demo_input_size=none,
        demo_output_size=none.clone(),
        demo_index=colors.new_full((batch, 1), -1),
        task_slot=zero,
        dihedral=zero.clone(),
        color_permutation=torch.arange(NUM_COLORS, device=colors.device).expand(batch, -1),
    )


def grid_sizes(grid: Tensor) -> Tensor:
    """Return the sizes [B, 2] of grids [B, H, W] that are PAD outside; (0, 0) where there is no cell."""
    inside = grid != PAD
    return torch.stack((inside.any(2).sum(1), inside.any(1).sum(1)), 1)


Canvas = int | tuple[int, int]  # (height, width), or the side of a square


def size_mask(size: Tensor, canvas: Canvas) -> Tensor:
    """Return [B, H, W] True inside the top-left rectangle of each size [B, 2]."""
    rows, cols = _steps(canvas, size.device)
    return (rows < size[:, 0].view(-1, 1, 1)) & (cols < size[:, 1].view(-1, 1, 1))


def _steps(canvas: Canvas, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row numbers [1, H, 1] and the column numbers [1, 1, W] of a canvas."""
    height, width = canvas_shape(canvas)
    return torch.arange(height, device=device).view(1, -1, 1), torch.arange(width, device=device).view(1, 1, -1)


# Views: V ways to look at the input from an output cell ---------------------------------------------------------------


def _color_statistics(grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most, second most and least common colour present, each [B]; of equals the lower counts as more."""
    counts = F.one_hot(torch.where(grid == PAD, OUTSIDE, grid), NUM_CODES).sum((1, 2))[:, :NUM_COLORS]
    order = counts.sort(dim=1, descending=True, stable=True).indices
    present = (counts > 0).sum(1, keepdim=True)
    most = order[:, 0]
    second = order.gather(1, (present - 1).clamp(0, 1))[:, 0]
    rarest = order.gather(1, (present - 1).clamp(min=0))[:, 0]
    return most, second, rarest


def _box_corner(member: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first row and column [B] of the cells marked in member [B, H, W]; 0 where none is."""
    return member.any(2).int().argmax(1), member.any(1).int().argmax(1)


def _rays(grid: Tensor, background: Tensor) -> Tensor:
    """Return [B, 4, H, W]: the first foreground colour to the left, right, above and below; OUTSIDE if none."""

    def look_left(colors: Tensor) -> Tensor:
        foreground = (colors != background.view(-1, 1, 1)) & (colors != PAD)
        steps = torch.arange(colors.shape[2], device=colors.device)
        last = torch.where(foreground, steps, -1).cummax(2).values
        before = F.pad(last, (1, -1), value=-1)
        seen = colors.gather(2, before.clamp(min=0))
        return torch.where(before >= 0, seen, OUTSIDE)

    left, right = look_left(grid), look_left(grid.flip(2)).flip(2)
    turned = grid.transpose(1, 2)
    above, below = look_left(turned).transpose(1, 2), look_left(turned.flip(2)).flip(2).transpose(1, 2)
    rays = torch.stack((left, right, above, below), 1)
    return torch.where((grid == PAD)[:, None], OUTSIDE, rays)


def _sources(size: Tensor, out_size: Tensor, corners: Tensor, canvas: Canvas) -> tuple[Tensor, Tensor]:
    """Return source rows and columns [B, V', H, W] of the views that copy one input cell."""
    r, c = _steps(canvas, size.device)
    h, w = (x.clamp(min=1).view(-1, 1, 1) for x in size.unbind(1))
    ho, wo = (x.clamp(min=1).view(-1, 1, 1) for x in out_size.unbind(1))
    box_r, box_c, rare_r, rare_c = (x.view(-1, 1, 1) for x in corners.unbind(1))
    tile_r, tile_c = r % h, c % w
    mirror_r = torch.where((r // h) % 2 == 0, tile_r, h - 1 - tile_r)
    mirror_c = torch.where((c // w) % 2 == 0, tile_c, w - 1 - tile_c)
    pairs = [
        (r, c), (r, w - 1 - c), (h - 1 - r, c), (h - 1 - r, w - 1 - c),  # identity, flips, half turn
        (c, r), (h - 1 - c, w - 1 - r), (h - 1 - c, r), (c, w - 1 - r),  # transposes, quarter turns
        (tile_r, tile_c), (mirror_r, mirror_c), (tile_r, mirror_c), (mirror_r, tile_c),
        (r * h // ho, c * w // wo),  # proportional copy
        (r, c - wo + w), (r - ho + h, c), (r - ho + h, c - wo + w), (r + (h - ho) // 2, c + (w - wo) // 2),
        (r, c + wo), (r + ho, c), (r, c + wo + 1), (r + ho + 1, c),  # second panel, with or without a separator
        (r + box_r, c + box_c), (r + rare_r, c + rare_c),  # crops of the foreground box and of the rarest colour's box
    ]  # fmt: skip
    shape = (size.shape[0], *canvas_shape(canvas))
    return torch.stack([p[0].expand(shape) for p in pairs], 1), torch.stack([p[1].expand(shape) for p in pairs], 1)


NUM_VIEWS = 23 + 4 + 3


def input_views(grid: Tensor, size: Tensor, out_size: Tensor, canvas: Canvas) -> tuple[Tensor, Tensor]:
    """Return views [B, V, *canvas] (colour codes 0..9, OUTSIDE) of inputs [B, H, W], and the background colour [B].

    Every output cell (r, c) of a grid of size out_size looks at the input in V fixed ways.
    """
    height, width = grid.shape[1:]
    rows_out, cols_out = canvas_shape(canvas)
    most, second, rarest = _color_statistics(grid)
    box = _box_corner((grid != most.view(-1, 1, 1)) & (grid != PAD))
    rare = _box_corner(grid == rarest.view(-1, 1, 1))
    rows, cols = _sources(size, out_size, torch.stack((*box, *rare), 1), canvas)
    inside = (rows >= 0) & (cols >= 0) & (rows < size[:, 0].view(-1, 1, 1, 1)) & (cols < size[:, 1].view(-1, 1, 1, 1))
    flat = torch.where(inside, rows * width + cols, 0).flatten(1)
    copies = torch.where(inside, grid.flatten(1).gather(1, flat).view_as(rows), OUTSIDE)
    rays = F.pad(_rays(grid, most), (0, max(cols_out - width, 0), 0, max(rows_out - height, 0)), value=OUTSIDE)
    constants = torch.stack((most, second, rarest), 1).view(-1, 3, 1, 1).expand(-1, -1, rows_out, cols_out)
    return torch.cat((copies, rays[:, :, :rows_out, :cols_out], constants), 1), most


def view_codes(views: Tensor) -> Tensor:
    """Return the views [B, V, H, W] as joined one-hot codes [B, H, W, V * NUM_CODES], float."""
    offsets = torch.arange(NUM_VIEWS, device=views.device) * NUM_CODES
    codes = torch.zeros(*views.shape[:1], *views.shape[2:], NUM_VIEWS * NUM_CODES, device=views.device)
    return codes.scatter_(-1, views.movedim(1, -1) + offsets, 1.0)


def cell_geometry(views: Tensor, background: Tensor, size: Tensor, out_size: Tensor) -> Tensor:
    """Return per-cell invariants [B, H, W, G]: equalities between views, neighbours, borders, parity, sizes."""
    height, width = views.shape[2:]
    copy = views[:, 0]
    neighbours = F.pad(torch.where(size_mask(out_size, (height, width)), copy, -1), (1, 1, 1, 1), value=-1)
    shifts = [(0, 1), (2, 1), (1, 0), (1, 2), (0, 0), (0, 2), (2, 0), (2, 2)]
    same = [neighbours[:, dr : dr + height, dc : dc + width] == copy for dr, dc in shifts]
    shape = (views.shape[0], height, width)
    h, w = (x.view(-1, 1, 1) for x in out_size.unbind(1))
    r, c = _steps((height, width), views.device)
    distances = [d.clamp(max=4).expand(shape) / 4 for d in (r, c, h - 1 - r, w - 1 - c)]
    position = [(r / h.clamp(min=1)).expand(shape), (c / w.clamp(min=1)).expand(shape)]
    parity = [(x % k).expand(shape) / (k - 1) for x in (r, c) for k in (2, 3)]
    ratio = (out_size.clamp(min=1) / size.clamp(min=1)).log().clamp(-3, 3)
    area = torch.cat((ratio, size / MAX_SIDE, out_size / MAX_SIDE), 1).view(-1, 6, 1, 1).expand(-1, -1, height, width)
    plain = torch.stack([x.float() for x in (*same, *distances, *position, *parity)], 1)
    relative = torch.cat((views == background.view(-1, 1, 1, 1), views[:, 1:] == copy[:, None]), 1).float()
    return torch.cat((relative, plain, area), 1).movedim(1, -1)


NUM_GEOMETRY = NUM_VIEWS + (NUM_VIEWS - 1) + 8 + 4 + 2 + 4 + 6


# Layers --------------------------------------------------------------------------------------------------------------


class Norm(nn.LayerNorm):
    """Layer normalisation over the last axis in fp32, without a bias (fused on CPUs, where RMSNorm is not)."""

    def __init__(self, width: int):
        super().__init__(width, eps=NORM_EPS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(x, self.weight)


# What a block computes beside convolution, sums and attention, in pieces that torch.compile can fuse. The shape of a
# canvas differs from batch to batch; compiled, the pieces see rows of channels, so that one graph serves all shapes.


def _normalised(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x.float(), weight.shape, weight, None, NORM_EPS).to(x.dtype)


def _enter(x: Tensor, weight: Tensor, inside: Tensor) -> Tensor:
    """Return the normalised cells x [..., D], 0 where inside [..., 1] is False."""
    return torch.where(inside, _normalised(x, weight), 0)


def _enter_modulated(x: Tensor, weight: Tensor, inside: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return the same, scaled and shifted by what the prompt says, [B, 1, ..., D] each."""
    return torch.where(inside, _normalised(x, weight) * (1 + scale) + shift, 0)


def _join(x: Tensor, found: Tensor, means: Tensor, weight: Tensor) -> Tensor:
    """Return x plus what convolution and means found, all [..., D]."""
    return x + F.linear(F.silu(found + means), weight)


def _feed(x: Tensor, norm: Tensor, into: Tensor, out: Tensor) -> Tensor:
    """Return x [..., D] plus its SwiGLU."""
    gate, value = F.linear(_normalised(x, norm), into).chunk(2, -1)
    return x + F.linear(F.silu(gate) * value, out)


def _heads(x: Tensor, norm: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [B, heads, n, d] of cells x [B, n, D], rotated by their positions [n, d / 2]."""
    batch, cells, _ = x.shape
    qkv = F.linear(_normalised(x, norm), weight).view(batch, cells, 3, -1, 2 * cos.shape[-1]).permute(2, 0, 3, 1, 4)
    even, odd = qkv[:2].float().chunk(2, -1)
    q, k = torch.cat((even * cos - odd * sin, even * sin + odd * cos), -1).to(qkv.dtype)
    return q, k, qkv[2]


class Pieces(NamedTuple):
    """The functions that a block is made of, plain or compiled; one that the prompt modulates enters in its own way."""

    enter: Callable[..., Tensor] = _enter
    enter_modulated: Callable[..., Tensor] = _enter_modulated
    join: Callable[..., Tensor] = _join
    feed: Callable[..., Tensor] = _feed
    heads: Callable[..., tuple[Tensor, Tensor, Tensor]] = _heads


def compiled_pieces(**options: Any) -> Pieces:
    """Return the pieces fused by torch.compile, which compiles each when it is first called."""
    plain = Pieces()
    heads, modulated = (torch.compile(piece, dynamic=True, **options) for piece in (_heads, _enter_modulated))

    def by_rows(piece: Callable[..., Tensor]) -> Callable[..., Tensor]:
        fused = torch.compile(piece, dynamic=True, **options)

        def call(x: Tensor, *others: Tensor) -> Tensor:
            flat = (y.flatten(0, -2) if y.dim() == x.dim() else y for y in (x, *others))
            return fused(*flat).view(x.shape)

        return call

    def enter_modulated(x: Tensor, weight: Tensor, inside: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        flat = (y.flatten(1, -2) for y in (inside, scale, shift))
        return modulated(x.flatten(1, -2), weight, *flat).view(x.shape)

    return Pieces(by_rows(plain.enter), enter_modulated, by_rows(plain.join), by_rows(plain.feed), heads)


class CellConv(nn.Module):
    """3 x 3 convolution over cells [B, H, W, D]; its weight is stored as a matrix, so that Muon can train it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width * 9) / math.sqrt(width * 9))

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        return F.conv2d(x.movedim(-1, 1), self.weight.view(width, width, 3, 3), padding=1).movedim(1, -1)


class Cells:
    """The cells of a canvas that are planned on, and what all blocks on it share.

    inside [B, H, W, 1]: True on the cells; how many there are, at least 1: in_row [B, H, 1], in_column [B, W, 1],
    in_grid [B, 1]. For attention with heads of width d: looks [B, 1, 1, H*W], where it may look; rotation, cosines and
    sines [H*W, d / 2] of the positions, those of the row first.
    """

    def __init__(self, mask: Tensor, head_dim: int = 0):
        self.inside = mask[..., None]
        self.in_row = mask.sum(2).clamp(min=1)[..., None]
        self.in_column = mask.sum(1).clamp(min=1)[..., None]
        self.in_grid = mask.sum((1, 2)).clamp(min=1)[:, None]
        if head_dim:
            flat = mask.flatten(1)
            self.looks = flat[:, None, None] | ~flat.any(1).view(-1, 1, 1, 1)  # no all-masked row
            self.rotation = rotation((mask.shape[1], mask.shape[2]), head_dim, mask.device)


def rotation(canvas: tuple[int, int], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [H*W, head_dim / 2] of rotary positions. Source: Su 2021, arXiv 2104.09864."""
    quarter = head_dim // 4
    frequency = 1.0 / (50.0 ** (torch.arange(quarter, device=device) / quarter))
    rows, columns = (steps.float()[0, ..., None] * frequency for steps in _steps(canvas, device))
    angle = torch.cat([x.expand(*canvas, quarter) for x in (rows, columns)], -1).flatten(0, 1)
    return angle.cos(), angle.sin()


class CellAttention(nn.Module):
    """Attention among all valid cells of a canvas, with rotary row and column positions."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, norm: Tensor, cells: Cells, heads: Callable = _heads) -> Tensor:
        """Return what cells x [B, H, W, D], normalised with the weight `norm`, get from one another."""
        q, k, v = heads(x.flatten(1, 2), norm, self.qkv.weight, *cells.rotation)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=cells.looks)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Residual block on cells [B, H, W, D]: 3 x 3 convolution plus line and grid means, optional attention, SwiGLU."""

    pieces = Pieces()

    def __init__(self, width: int, attention: bool, prompt_dim: int = 0):
        super().__init__()
        self.norm = Norm(width)
        self.conv = CellConv(width)
        self.context = nn.Linear(3 * width, width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.attention = CellAttention(width) if attention else None
        self.attention_norm = Norm(width) if attention else None
        hidden = 2 * width if attention else width
        self.mlp_norm = Norm(width)
        self.mlp_in = nn.Linear(width, 2 * hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)
        self.modulation = nn.Linear(prompt_dim, 2 * width) if prompt_dim else None
        for layer in (self.mix, self.mlp_out):
            nn.init.normal_(layer.weight, std=0.5 / math.sqrt(layer.in_features))

    def forward(self, x: Tensor, cells: Cells, prompt: Tensor | None = None) -> Tensor:
        pieces = self.pieces
        if self.modulation is None:
            y = pieces.enter(x, self.norm.weight, cells.inside)
        else:
            scale_and_shift = self.modulation(prompt)[:, None, None].chunk(2, -1)
            y = pieces.enter_modulated(x, self.norm.weight, cells.inside, *scale_and_shift)
        x = pieces.join(x, self.conv(y), self.means(y, cells), self.mix.weight)
        if self.attention is not None:
            x = x + self.attention(x, self.attention_norm.weight, cells, pieces.heads)
        return pieces.feed(x, self.mlp_norm.weight, self.mlp_in.weight, self.mlp_out.weight)

    def means(self, y: Tensor, cells: Cells) -> Tensor:
        """Return the projected means over each cell's row, column and grid, [B, H, W, D]."""
        by_row, by_col = y.sum(2), y.sum(1)
        grid = by_row.sum(1) / cells.in_grid
        row_weight, col_weight, grid_weight = self.context.weight.chunk(3, 1)
        by_row, by_col = F.linear(by_row / cells.in_row, row_weight), F.linear(by_col / cells.in_column, col_weight)
        return by_row[:, :, None] + by_col[:, None] + F.linear(grid, grid_weight)[:, None, None]


def colors_of(weight: Tensor, views: Tensor) -> Tensor:
    """Return weights [B, R, n, V] of views [B, n, V] summed by the colour they show, [B, R, n, C]; outside left out."""
    if weight.device.type == "cpu":  # a product of thousands of small matrices is slow there
        total = weight.new_zeros(*weight.shape[:3], NUM_CODES)
        return total.scatter_add(-1, views[:, None].expand_as(weight), weight)[..., :NUM_COLORS]
    palette = F.one_hot(views, NUM_CODES)[..., :NUM_COLORS].to(weight.dtype)
    return torch.einsum("brnv,bnvc->brnc", weight, palette)


class DemonstrationRead(nn.Module):
    """Cosine attention of query cells over demonstration cells, R heads, with a vote path and a copy path.

    The values are evidence, not features: the demonstration's output colour and, for each view, whether it was right.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.head_dim = max(width // heads, 16)
        self.query = nn.Linear(width, heads * self.head_dim, bias=False)
        self.key = nn.Linear(width, heads * self.head_dim, bias=False)
        self.null_key = nn.Parameter(torch.randn(heads, self.head_dim))
        self.log_sharpness = nn.Parameter(math.log(8.0) + math.log(3.0) * torch.arange(heads) / max(heads - 1, 1))
        self.copy_power = nn.Parameter(torch.full((heads, 3), 2.0))
        self.gate = nn.Linear(width + 4, 2 * heads)
        nn.init.normal_(self.gate.weight, std=0.02)
        nn.init.zeros_(self.gate.bias)

    def attend(self, q: Tensor, k: Tensor, values: Tensor, valid: Tensor) -> Tensor:
        """Return evidence [B, R, n, E] that q [B, n, D] read from k [B, K, D] with values [B, K, E], valid [B, K]."""
        batch = q.shape[0]
        q = F.normalize(self.query(q).view(batch, -1, self.heads, self.head_dim), dim=-1).transpose(1, 2)
        k = F.normalize(self.key(k).view(batch, -1, self.heads, self.head_dim), dim=-1).transpose(1, 2)
        q = q * self.log_sharpness.exp().view(1, -1, 1, 1)
        null = F.normalize(self.null_key, dim=-1).view(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        k = torch.cat((k, null), 2)
        v = F.pad(values, (0, 0, 0, 1))[:, None].expand(-1, self.heads, -1, -1)
        allowed = F.pad(valid, (0, 1), value=True)[:, None, None]
        if q.device.type == "cpu":  # its fused kernel, which keeps no [n, K] matrix, asks for one width of all three
            width = max(self.head_dim, values.shape[-1])
            q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=1.0)[..., : values.shape[-1]]

    def forward(
        self, q: Tensor, k: Tensor, values: Tensor, valid: Tensor, views: Tensor, match: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the log mixture [B, n, C] and the raw evidence [B, n, R*(C+V) + R*C] of the query cells.

        views [B, n, V] codes at the query cells; match [B, V, 2] mean and least share of right cells per view.
        """
        with torch.autocast(q.device.type, enabled=False):
            return self._read(q.float(), k.float(), values.float(), valid, views, match.float())

    def _read(
        self, q: Tensor, k: Tensor, values: Tensor, valid: Tensor, views: Tensor, match: Tensor
    ) -> tuple[Tensor, Tensor]:
        evidence = self.attend(q, k, values, valid)
        votes, hits = evidence.split((NUM_COLORS, NUM_VIEWS), -1)
        votes = votes + (1 - votes.sum(-1, keepdim=True)).clamp(min=0) / NUM_COLORS  # the null key votes for nothing
        power = F.softplus(self.copy_power).view(1, self.heads, 1, 3)
        trust = (match.clamp(min=0) + 0.01).log()[:, None, None]  # [B, 1, 1, V, 2]
        score = power[..., 0:1] * (hits + 0.01).log() + (power[..., 1:, None].transpose(-2, -1) * trust).sum(-1)
        usable = (views < NUM_COLORS)[:, None]
        weight = torch.where(usable, score, -30.0).softmax(-1)
        copies = colors_of(weight, views)
        copies = copies + (1 - copies.sum(-1, keepdim=True)).clamp(min=0) / NUM_COLORS
        best = torch.stack((votes.amax(-1).mean(1), copies.amax(-1).mean(1), hits.amax(-1).mean(1),
                            match[:, :, 1].amax(1)[:, None].expand(-1, views.shape[1])), -1)  # fmt: skip
        gates = self.gate(torch.cat((q, best), -1)).unflatten(-1, (2, self.heads))
        mix = gates[..., 0, :].sigmoid().transpose(1, 2)[..., None]
        share = gates[..., 1, :].softmax(-1).transpose(1, 2)[..., None]
        mixture = (share * (mix * copies + (1 - mix) * votes)).sum(1)
        log_mixture = ((1 - READ_FLOOR) * mixture + READ_FLOOR / NUM_COLORS).log()
        raw = torch.cat((votes, copies, hits), -1).transpose(1, 2).flatten(2)
        return log_mixture, raw


class SizeHead(nn.Module):
    """Row and column logits for sizes 1..30 from the demonstrations' features, with the size rule as a bias."""

    def __init__(self, num_features: int, hidden: int = 64):
        super().__init__()
        self.input = nn.Linear(num_features + 4 * MAX_SIDE, hidden)
        self.output = nn.Linear(hidden, 2 * MAX_SIDE)
        self.rule_trust = nn.Parameter(torch.ones(()))
        nn.init.normal_(self.input.weight, std=0.3)  # its inputs are mostly one-hot
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, input_size: Tensor, features: Tensor, size_log_prob: Tensor) -> tuple[Tensor, Tensor]:
        """Return (row, col) logits [B, 30] from input_size [B, 2], features [B, F], size_log_prob [B, 2, 30]."""
        size = F.one_hot(input_size.clamp(1, MAX_SIDE) - 1, MAX_SIDE).flatten(1).float()
        rule = size_log_prob.exp().flatten(1)
        hidden = F.silu(self.input(torch.cat((features, size, rule), 1)))
        learnt = 2 * self.output(hidden).view(-1, 2, MAX_SIDE).float()  # twice the step of a plain head
        logits = learnt + self.rule_trust * size_log_prob
        return logits[:, 0], logits[:, 1]


# The agent -----------------------------------------------------------------------------------------------------------


class Planner(nn.Module):
    """T planning steps in one direction; each step's belief feeds the next, and the prompt modulates every block."""

    def __init__(self, config: AgentConfig, prompt_dim: int, kappa: float = 0.0):
        super().__init__()
        width, self.steps = config.width, config.num_steps
        self.head_dim = width // max(width // HEAD_DIM, 1) if config.attention == "on" else 0
        stages = 1 if config.tie_stages else config.num_steps
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(width, config.attention == "on", prompt_dim) for _ in range(config.plan_blocks))
            for _ in range(stages)
        )
        self.belief_embed = nn.Linear(NUM_COLORS, width, bias=False)
        self.step_embed = nn.Embedding(config.num_steps, width)
        self.trust = nn.Linear(prompt_dim, 2)
        self.kappa = nn.Parameter(torch.tensor(float(kappa))) if kappa > 0 else None
        self.read_trust = nn.Parameter(torch.tensor(0.1))
        self.state_norm = Norm(width)
        self.state_head = nn.Linear(width, config.num_codes)
        self.likelihood_logits = nn.Parameter(initial_likelihood(config.num_codes))
        nn.init.zeros_(self.state_head.weight)
        nn.init.zeros_(self.state_head.bias)
        nn.init.normal_(self.trust.weight, std=0.01)  # the prompt matters, and learns, from the first step
        nn.init.zeros_(self.trust.bias)
        nn.init.normal_(self.step_embed.weight, std=0.1)

    def forward(self, reading: Reading, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return beliefs [B, T, H, W, C] and codes [B, T, H, W, S], both logits, and pooled features [B, T, D]."""
        trust = 2 * self.trust(prompt).float().sigmoid()[:, None, None]  # [B, 1, 1, 2], 1 at initialisation
        start = self.read_trust * trust[..., 1:] * reading.read_logits
        if reading.prior_logits is not None:
            start = start + self.kappa * trust[..., :1] * reading.prior_logits
        cells = Cells(reading.mask, self.head_dim)
        hidden, logits = reading.hidden, start
        beliefs, states, pools = [], [], []
        for t in range(self.steps):
            hidden = hidden + self.belief_embed(logits.softmax(-1)) + self.step_embed.weight[t]
            for block in self.stages[t % len(self.stages)]:
                hidden = block(hidden, cells, prompt)
            features = self.state_norm(hidden)
            state = self.state_head(features).float()
            logits = start + decode_states(state, self.likelihood_logits)
            beliefs.append(logits)
            states.append(state)
            pools.append(torch.where(cells.inside, features, 0).sum((1, 2)) / cells.in_grid)
        return torch.stack(beliefs, 1), torch.stack(states, 1), torch.stack(pools, 1)


class ARCPromptGuidedAgent(nn.Module):
    """Plan an output grid in T steps from a Query, a prompt, and the demonstrations' preference C."""

    def __init__(self, config: AgentConfig, *, prompt_dim: int, num_features: int = 32):
        super().__init__()
        self.config = config
        width, attention = config.width, config.attention == "on"
        self.view_embed = nn.Linear(NUM_VIEWS * NUM_CODES, width, bias=False)
        self.geometry_embed = nn.Linear(NUM_GEOMETRY, width)
        nn.init.normal_(self.view_embed.weight, std=1 / math.sqrt(NUM_VIEWS))
        self.read_blocks = nn.ModuleList(Block(width, attention) for _ in range(config.read_blocks))
        self.read_norm = Norm(width)
        self.demonstration_read = DemonstrationRead(width, config.read_heads)
        evidence = config.read_heads * (2 * NUM_COLORS + NUM_VIEWS) + 2 * NUM_VIEWS + 2 * NUM_COLORS
        self.evidence_embed = nn.Linear(evidence, width)
        self.forward_planner = Planner(config, prompt_dim, config.kappa)
        self.backward_planner = Planner(dataclasses.replace(config, plan_blocks=1), prompt_dim)
        self.preference_norm = Norm(width)
        self.preference_prompt = nn.Linear(prompt_dim, width)
        self.preference_head = nn.Linear(width, NUM_COLORS)
        self.halt_head = nn.Linear(width, 1)
        self.size_head = SizeHead(num_features)
        for layer in (self.preference_head, self.halt_head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.halt_head.bias, -5.0)  # plan all steps until a right answer is recognised

    def predict_size(self, query: Query, features: Tensor, size_log_prob: Tensor) -> tuple[Tensor, Tensor]:
        """Return (row, col) logits [B, 30] for output sizes 1..30."""
        return self.size_head(query.input_size, features, size_log_prob)

    def embed(self, grid: Tensor, size: Tensor, out_size: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return cell features [B, S, S, D] and views [B, V, S, S] of inputs seen from output cells."""
        views, background = input_views(grid, size, out_size, (mask.shape[1], mask.shape[2]))
        x = self.view_embed(view_codes(views)) + self.geometry_embed(cell_geometry(views, background, size, out_size))
        cells = Cells(mask, self.forward_planner.head_dim)
        x = torch.where(cells.inside, x, 0).float()  # the residual stream stays in fp32 under autocast
        for block in self.read_blocks:
            x = block(x, cells)
        return torch.where(cells.inside, self.read_norm(x), 0), views

    def query_cells(
        self, query: Query, size: Tensor, mask: Tensor, own_rows: Sequence[int], demos: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return cell features [B, H, W, D] and views [B, V, H, W] of the queries' inputs.

        own_rows: the row of `demos`, features and views of the demonstrations, that is the same, -1 where none is.
        """
        rows = [row for row in own_rows if row >= 0]
        if not rows:
            return self.embed(query.input, query.input_size, size, mask)
        more = [side - other for side, other in zip(mask.shape[1:], demos[1].shape[2:], strict=True)]
        chosen = to_device(torch.tensor(rows), mask.device)
        x = F.pad(demos[0].index_select(0, chosen), (0, 0, 0, more[1], 0, more[0]))  # a negative width cuts
        views = F.pad(demos[1][chosen], (0, more[1], 0, more[0]), value=OUTSIDE)
        if len(rows) < len(own_rows):
            known = [b for b, row in enumerate(own_rows) if row >= 0]
            others = [b for b, row in enumerate(own_rows) if row < 0]
            pick = to_device(torch.tensor(others), mask.device)
            rest = self.embed(query.input[pick], query.input_size[pick], size[pick], mask[pick])
            place = to_device(torch.tensor(known + others), mask.device).argsort()
            x, views = torch.cat((x, rest[0])).index_select(0, place), torch.cat((views, rest[1]))[place]
        return x, views

    def demonstration_cells(
        self, query: Query, mask: Tensor, x: Tensor, views: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return keys [N, K, D], values [N, K, C+V], valid [N, K] and match [N, V] of the batch's demonstrations.

        x [N, H, W, D] and views [N, V, H, W] are those of `embed` for their inputs, mask [N, H, W] of their outputs.
        """
        truth = torch.where(mask, query.demo_output, 0)
        hits = (views == truth[:, None]) & mask[:, None]
        match = hits.sum((2, 3)) / mask.sum((1, 2)).clamp(min=1)[:, None]
        values = torch.cat((F.one_hot(truth, NUM_COLORS), hits.movedim(1, -1)), -1).float()
        keys, values, valid = x.flatten(1, 2), values.flatten(1, 2), mask.flatten(1)
        counts = [len(context.demonstrations) for context in query.contexts] or [1]  # known on the host
        if max(self.config.read_cells // max(counts), 1) < keys.shape[1]:
            most = min(max(self.config.read_cells // min(counts), 1), keys.shape[1])
            keys, values, valid = _thin(keys, values, valid, self.cell_limit(query), most)
        return keys, values, valid, match

    def cell_limit(self, query: Query) -> Tensor:
        """Return [N, 1]: how many cells of each demonstration are read, read_cells shared among those of its task."""
        rows = query.demo_input.shape[0]
        known = query.demo_index >= 0
        share = (self.config.read_cells // known.sum(1).clamp(min=1)).clamp(min=1)[:, None].expand_as(known)
        limit = torch.full((rows + 1,), MAX_SIDE**2, device=known.device)
        slots = torch.where(known, query.demo_index, rows)
        return limit.scatter_reduce(0, slots.flatten(), share.flatten(), "amin")[:-1, None]

    def read(
        self, query: Query, size: Tensor, canvas: Canvas, *, preference: Tensor | None = None,
        direction: int = FORWARD, own_rows: Sequence[int] = (),
    ) -> Reading:  # fmt: skip
        """Return what the cells of outputs of size [B, 2] on a canvas (H, W) learn from the demonstrations.

        preference [B, H, W, C] are the log-probabilities C (forward only). In the backward direction the canvas is the
        common frame and also covers the cells of the grid that is looked at. own_rows: as `query_cells`.
        """
        height, width = canvas_shape(canvas)
        mask = size_mask(size, canvas)
        if direction == BACKWARD:
            mask = mask | size_mask(query.input_size, canvas)
        shown = query.demo_output != PAD
        demos = self.embed(query.demo_input, query.demo_input_size, query.demo_output_size, shown)
        x, views = self.query_cells(query, size, mask, own_rows, demos)
        keys, values, valid, match = self.demonstration_cells(query, shown, *demos)
        slots = query.demo_index.clamp(min=0)
        known = query.demo_index >= 0
        batch = slots.shape[0]
        # index_select: its gradient is added up in a fixed order on several threads
        k = keys.index_select(0, slots.flatten()).reshape(batch, -1, keys.shape[-1])
        v = values[slots].reshape(batch, -1, values.shape[-1])
        allowed = (valid[slots] & known[..., None]).reshape(batch, -1)
        rate = match[slots]
        mean = (rate * known[..., None]).sum(1) / known.sum(1).clamp(min=1)[:, None]
        least = torch.where(known[..., None], rate, 1.0).amin(1) * known.any(1)[:, None]
        match = torch.stack((mean, least), -1)
        cells = views.flatten(2).transpose(1, 2)
        log_read, raw = self.demonstration_read(x.flatten(1, 2), k, v, allowed, cells, match)
        log_read = log_read.view(batch, height, width, NUM_COLORS)
        prior = None if self.forward_planner.kappa is None or direction == BACKWARD else preference
        prior_probability = torch.zeros_like(log_read) if prior is None else prior.exp()
        spread = match.flatten(1)[:, None, None].expand(-1, height, width, -1)
        evidence = torch.cat((raw.view(batch, height, width, -1), spread, log_read.exp(), prior_probability), -1)
        hidden = x + self.evidence_embed(evidence)
        return Reading(hidden, prior, log_read, mask)

    def plan(self, reading: Reading, prompt: Tensor, size_logits: tuple[Tensor, Tensor] | None = None) -> Trajectory:
        """Return the trajectory of T planning steps under prompt [B, Dp]; each step's belief feeds the next step."""
        beliefs, states, pooled = self.forward_planner(reading, prompt)
        preference = self.preference_norm(reading.hidden) * (1 + self.preference_prompt(prompt)[:, None, None])
        rows, cols = size_logits if size_logits is not None else (None, None)
        return Trajectory(
            forward=beliefs,
            backward=None,
            state_logits=states,
            likelihood_logits=self.forward_planner.likelihood_logits,
            preference_logits=self.preference_head(preference).float(),
            halt_logits=self.halt_head(pooled)[..., 0].float(),
            row_logits=rows,
            col_logits=cols,
            features=pooled.mean(1),
            mask=reading.mask,
        )

    def plan_backward(
        self, query: Query, grid: Tensor, size: Tensor, prompt: Tensor, own_rows: Sequence[int] = ()
    ) -> Tensor:
        """Return backward beliefs [B, T, F, G, C] from an output grid [B, H, W] towards the input; entry t is b_t.

        The frame F x G covers the input and the output canvas. In training the grid is the target (privileged: nothing
        that predicts may consume the result); at test time it is the model's own prediction. The backward planner
        reads with what the forward one has learned and sends it no gradient: trained by both, the cells' features
        predicted worse (docs/LAB_NOTEBOOK.md). own_rows: of grids that are targets within their input's size, the rows
        that hold the same pairs (see `query_cells`).
        """
        frame = (max(grid.shape[1], query.input.shape[1]), max(grid.shape[2], query.input.shape[2]))
        with torch.no_grad():
            back = query.reversed(grid, size)
            reading = self.read(back, query.input_size, frame, direction=BACKWARD, own_rows=own_rows)
        return self.backward_planner(reading, prompt)[0].flip(1)

    def forward(self, query: Query | Tensor, prompt: Tensor, size: Tensor | None = None, **kwargs) -> Trajectory:
        """Return the forward trajectory for a Query, or for bare grids in any form `grid_colors` accepts.

        size [B, 2] is the output size to plan on; default: the input's. `canvas` (H, W): by default the smallest that
        holds the inputs' canvas and every size.
        """
        if isinstance(query, Tensor):
            query = query_from_grids(query)
        size = query.input_size if size is None else size
        canvas = kwargs.pop("canvas", None) or tuple(map(max, query.input.shape[1:], size.amax(0).tolist()))
        reading = self.read(query, size, canvas, preference=kwargs.pop("preference", None))
        return self.plan(reading, prompt, **kwargs)


def _thin(
    keys: Tensor, values: Tensor, valid: Tensor, limit: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [N, most, ...]: at most `limit` [N, 1] valid cells of each demonstration, evenly spaced."""
    order = (~valid).int().sort(dim=1, stable=True).indices
    count = valid.sum(1, keepdim=True)
    steps = torch.arange(most, device=keys.device)
    pick = torch.where(count > limit, steps * count // limit, steps)
    index = order.gather(1, pick.clamp(max=keys.shape[1] - 1))

    def take(x: Tensor) -> Tensor:
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

    return take(keys), take(values), valid.gather(1, index) & (steps < limit)


def initial_likelihood(num_codes: int) -> Tensor:
    """Return logits [S, C] of P(o|s): code s stands for colour s mod 10, the later codes are softer.

    Every colour has as many codes of each sharpness, so uniform Q(s) gives uniform Q(o) when S is a multiple of 10.
    """
    codes = torch.arange(num_codes)
    sharpness = 6.0 / (1 + codes // NUM_COLORS).float()
    return F.one_hot(codes % NUM_COLORS, NUM_COLORS).float() * sharpness[:, None]


def decode_states(state_logits: Tensor, likelihood_logits: Tensor) -> Tensor:
    """Return log Q(o) = log sum_s Q(s) P(o|s), [..., C], from state logits [..., S] and likelihood logits [S, C]."""
    probability = state_logits.float().softmax(-1) @ likelihood_logits.float().softmax(-1)
    return probability.clamp(min=1e-12).log()


# Metrics: sums and counts --------------------------------------------------------------------------------------------


def cell_accuracy(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return (right, cells) per sample [B]: colours [B, H, W] compared where the target is not PAD."""
    mask = target != PAD
    return ((prediction == target) & mask).sum((1, 2)), mask.sum((1, 2))


def cell_nats(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy [B], nats per cell, of beliefs [B, H, W, C] with the target [B, H, W] (PAD outside)."""
    mask = target != PAD
    log_prob = F.log_softmax(logits.float(), -1).gather(-1, torch.where(mask, target, 0)[..., None])[..., 0]
    return -torch.where(mask, log_prob, 0).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


def exact_match(prediction: Tensor, size: Tensor, target: Tensor, target_size: Tensor) -> Tensor:
    """Return [B] True where the predicted size and every cell are right; the canvases may differ."""
    height, width = (max(prediction.shape[i], target.shape[i]) for i in (1, 2))

    def grown(grid: Tensor) -> Tensor:
        return F.pad(grid, (0, width - grid.shape[2], 0, height - grid.shape[1]), value=PAD)

    prediction, target = grown(prediction), grown(target)
    right = (prediction == target) | (target == PAD)
    return right.flatten(1).all(1) & (size == target_size).all(1)


class GridAccuracyLoss(nn.Module):
    """One minus the expected cell accuracy: differentiable, 0 when every target colour has probability 1."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the batch mean of 1 - mean p(target) over cells, from logits [B, H, W, C] and target [B, H, W]."""
        mask = target != PAD
        safe = torch.where(mask[..., None], logits.float(), 0)
        right = safe.softmax(-1).gather(-1, torch.where(mask, target, 0)[..., None]).squeeze(-1)
        cells = mask.sum((1, 2))
        per_sample = 1 - torch.where(mask, right, 0).sum((1, 2)) / cells.clamp(min=1)
        counted = cells > 0
        return torch.where(counted, per_sample, 0).sum() / counted.sum().clamp(min=1)


def parameter_count(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def with_backward(trajectory: Trajectory, backward: Tensor | None) -> Trajectory:
    """Return the trajectory with its backward beliefs set."""
    return dataclasses.replace(trajectory, backward=backward)
