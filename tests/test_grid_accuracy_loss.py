"""Tests of grid_accuracy_loss: grids in, views against brute force, invariances of the planner, heads, and metrics."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from arc_data import NUM_COLORS, PAD, Context, collate
from config import AgentConfig, LossConfig, TrainConfig, resolve, with_values
from grid_accuracy_loss import (
    BACKWARD,
    NUM_GEOMETRY,
    NUM_VIEWS,
    OUTSIDE,
    ARCPromptGuidedAgent,
    Block,
    Cells,
    GridAccuracyLoss,
    SizeHead,
    Trajectory,
    cell_accuracy,
    cell_geometry,
    colors_of,
    compiled_pieces,
    decode_states,
    exact_match,
    grid_colors,
    grid_sizes,
    initial_likelihood,
    input_views,
    parameter_count,
    query_from_grids,
    size_mask,
    with_backward,
)
from loss_function import EFELoss
from prior_cache import PriorCache

PROMPT_DIM = 12
CLOSE = {"atol": 1e-4, "rtol": 1e-3}


def make_config(**values) -> AgentConfig:
    small = {"preset": "tiny", "width": 16, "read_blocks": 2, "plan_blocks": 1, "attention": "off", "read_heads": 2,
             "num_steps": 3, "read_cells": 100_000}  # fmt: skip
    return AgentConfig(**{**small, **values})


def make_agent(seed=0, noise=0.3, **values) -> ARCPromptGuidedAgent:
    """Return an agent whose parameters are all moved off their initial values by `noise` (0: as initialised)."""
    torch.manual_seed(seed)
    agent = ARCPromptGuidedAgent(make_config(**values), prompt_dim=PROMPT_DIM)
    if noise:
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter.add_(noise * torch.randn_like(parameter) / max(parameter.shape[-1:] + (1,)) ** 0.5)
    return agent.eval()


def random_grid(rng, shape, colors=4):
    return rng.integers(0, colors, shape).astype(np.uint8)


def make_contexts(shapes, seed=0, demos=2, colors=4):
    """Return contexts and answers; `shapes` lists ((h, w) of inputs, (h, w) of outputs), one task each."""
    rng = np.random.default_rng(seed)
    contexts, answers = [], []
    for t, (inside, out) in enumerate(shapes):
        pairs = tuple((random_grid(rng, inside, colors), random_grid(rng, out, colors)) for _ in range(demos))
        contexts.append(Context(f"task{t}", "test:0", pairs, random_grid(rng, inside, colors), task_index=t))
        answers.append(random_grid(rng, out, colors))
    return contexts, answers


def prompts(batch, seed=5):
    return torch.randn(batch, PROMPT_DIM, generator=torch.Generator().manual_seed(seed))


def padded(grid, rows, cols):
    return F.pad(grid, (0, cols, 0, rows), value=PAD)


def square(grid, side):
    return padded(grid, side - grid.shape[-2], side - grid.shape[-1])


def padded_query(query, more, demos_more):
    """Return the same query on canvases with `more` (rows, columns)."""
    return dataclasses.replace(
        query,
        input=padded(query.input, *more),
        demo_input=padded(query.demo_input, *demos_more),
        demo_output=padded(query.demo_output, *demos_more[::-1]),
    )


def chosen_queries(query, index):
    """Return the query with its rows (not its demonstrations) chosen by `index`."""
    index = torch.as_tensor(index)
    rows = ("input", "input_size", "demo_index", "task_slot", "dihedral", "color_permutation")
    values = {name: getattr(query, name)[index] for name in rows}
    return dataclasses.replace(query, contexts=tuple(query.contexts[i] for i in index.tolist()), **values)


def on_larger(preference, rows, cols):
    """Return preference [B, h, w, C] on a larger canvas, uniform outside."""
    return F.pad(preference, (0, 0, 0, cols, 0, rows), value=-np.log(NUM_COLORS))


@torch.no_grad()
def plan(agent, query, size, side, prompt=None, preference=None):
    prompt = prompts(len(query.input)) if prompt is None else prompt
    return agent.plan(agent.read(query, size, side, preference=preference), prompt)


def on_cells(values, mask):
    """Return [..., H, W, C] values [B, T, H, W, C] with 0 outside mask [B, H, W]."""
    return torch.where(mask[:, None, :, :, None], values, 0)


def assert_same_plan(a, b, rows=slice(None)):
    """Compare two trajectories on their valid cells; the second may have a larger canvas."""
    height, width = a.mask.shape[1:]
    mask = a.mask[rows]
    assert torch.equal(mask, b.mask[:, :height, :width])
    for name in ("forward", "state_logits"):
        one, two = getattr(a, name)[rows], getattr(b, name)[:, :, :height, :width]
        torch.testing.assert_close(on_cells(two, mask), on_cells(one, mask), **CLOSE)
    one, two = a.preference_logits[rows], b.preference_logits[:, :height, :width]
    torch.testing.assert_close(torch.where(mask[..., None], two, 0), torch.where(mask[..., None], one, 0), **CLOSE)
    torch.testing.assert_close(b.halt_logits, a.halt_logits[rows], **CLOSE)
    torch.testing.assert_close(b.features, a.features[rows], **CLOSE)


# Grids in ------------------------------------------------------------------------------------------------------------


def one_hot(grid):
    return F.one_hot(grid.long(), NUM_COLORS).movedim(-1, grid.dim() - 2)


def every_form(numbers):
    """Yield (name, tensor) of the same grids [B, H, W] in all accepted forms."""
    for dtype in (torch.int64, torch.uint8, torch.float32, torch.float64):
        yield f"batch {dtype}", numbers.to(dtype)
        yield f"one-hot batch {dtype}", one_hot(numbers).to(dtype)
        if len(numbers) == 1:
            yield f"grid {dtype}", numbers[0].to(dtype)
            yield f"one-hot {dtype}", one_hot(numbers[0]).to(dtype)


@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 5, 5), (1, 1, 1), (10, 3, 4), (1, 10, 10), (2, 30, 30)])
def test_grid_colors_reads_every_form(shape):
    numbers = torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(1))
    if shape[0] == NUM_COLORS:
        numbers[0, 0, 0], numbers[1, 0, 0] = 7, 3  # ten grids of numbers, not one one-hot grid
    for name, grid in every_form(numbers):
        colors = grid_colors(grid)
        assert colors.dtype == torch.int64, name
        assert torch.equal(colors, numbers), name


def test_grid_colors_keeps_padding():
    grid = torch.tensor([[[1, 2, PAD], [3, 4, PAD], [PAD, PAD, PAD]]])
    assert torch.equal(grid_colors(grid), grid)


@pytest.mark.parametrize(
    "grid",
    [
        torch.tensor([[1, 11]]),
        torch.tensor([[1, 10]]),
        torch.tensor([[1, -1]]),
        torch.tensor([[0.5, 1.0]]),
        torch.tensor([[float("nan"), 1.0]]),
        torch.tensor([[float("inf"), 1.0]]),
        torch.tensor(3),
        torch.tensor([1, 2, 3]),
        torch.zeros(2, 9, 4, 4),
        torch.zeros(2, 11, 4, 4),
        torch.zeros(2, 10, 4, 4),  # one-hot without a one
        torch.full((2, 10, 4, 4), 0.1),
        torch.zeros(1, 2, 10, 4, 4),
        torch.zeros(31, 3),
    ],
)
def test_bad_grids_are_refused(grid):
    with pytest.raises(ValueError):
        grid_colors(grid)
    with pytest.raises(ValueError):
        make_agent(noise=0)(grid, prompts(1))


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 3, 5), (2, 5, 5)])
def test_agent_gives_the_same_belief_for_every_form_of_a_grid(shape):
    agent = make_agent()
    numbers = torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(2))
    prompt = prompts(shape[0])
    with torch.no_grad():
        expected = agent(numbers, prompt)
        assert torch.equal(expected.mask.sum((1, 2)), torch.full((shape[0],), shape[1] * shape[2]))
        assert expected.forward[:, :, : shape[1], : shape[2]].isfinite().all()
        for name, grid in every_form(numbers):
            found = agent(grid, prompt)
            assert torch.equal(found.forward, expected.forward), name
            assert torch.equal(found.halt_logits, expected.halt_logits), name


def test_grid_sizes_count_the_cells_that_are_not_padding():
    sizes = torch.tensor([[1, 1], [2, 5], [6, 3], [0, 0]])
    grid = torch.where(size_mask(sizes, 6), 0, PAD)
    assert torch.equal(grid_sizes(grid), sizes)
    assert torch.equal(grid_sizes(grid[:, :, :5].transpose(1, 2)), sizes.flip(1))


def test_agent_reads_a_bare_grid_and_its_query_alike():
    agent, grid = make_agent(), torch.randint(0, 10, (2, 6, 6), generator=torch.Generator().manual_seed(3))
    query = query_from_grids(grid)
    assert query.input_size.tolist() == [[6, 6], [6, 6]]
    with torch.no_grad():
        assert torch.equal(agent(grid, prompts(2)).forward, agent(query, prompts(2)).forward)
        changed = grid.clone()
        changed[0, 2, 2] = (changed[0, 2, 2] + 1) % 10
        assert not torch.allclose(agent(changed, prompts(2)).forward[0], agent(grid, prompts(2)).forward[0])


# Views ---------------------------------------------------------------------------------------------------------------


def ranked(grid):
    """Return the present colours, most common first, lower colour first on ties."""
    counts = Counter(int(c) for c in grid.ravel())
    return sorted(counts, key=lambda c: (-counts[c], c))


def first_cell(grid, chosen):
    rows, cols = [r for r, row in enumerate(grid) if any(map(chosen, row))], []
    cols = [c for c in range(grid.shape[1]) if any(map(chosen, grid[:, c]))]
    return (rows[0], cols[0]) if rows else (0, 0)


def reference_sources(h, w, ho, wo, box, rare):
    """Return {name: function (r, c) -> the input cell that output cell (r, c) looks at}, in plain integers."""

    def mirror(i, n):
        return i % n if (i // n) % 2 == 0 else n - 1 - i % n

    return {
        "identity": lambda r, c: (r, c),
        "flip columns": lambda r, c: (r, w - 1 - c),
        "flip rows": lambda r, c: (h - 1 - r, c),
        "half turn": lambda r, c: (h - 1 - r, w - 1 - c),
        "transpose": lambda r, c: (c, r),
        "anti-transpose": lambda r, c: (h - 1 - c, w - 1 - r),
        "quarter turn": lambda r, c: (h - 1 - c, r),
        "three quarter turn": lambda r, c: (c, w - 1 - r),
        "tile": lambda r, c: (r % h, c % w),
        "mirror tile": lambda r, c: (mirror(r, h), mirror(c, w)),
        "tile, columns mirrored": lambda r, c: (r % h, mirror(c, w)),
        "tile, rows mirrored": lambda r, c: (mirror(r, h), c % w),
        "proportional": lambda r, c: (r * h // ho, c * w // wo),
        "right aligned": lambda r, c: (r, c - wo + w),
        "bottom aligned": lambda r, c: (r - ho + h, c),
        "corner aligned": lambda r, c: (r - ho + h, c - wo + w),
        "centred": lambda r, c: (r + (h - ho) // 2, c + (w - wo) // 2),
        "right panel": lambda r, c: (r, c + wo),
        "lower panel": lambda r, c: (r + ho, c),
        "right panel, separated": lambda r, c: (r, c + wo + 1),
        "lower panel, separated": lambda r, c: (r + ho + 1, c),
        "foreground box": lambda r, c: (r + box[0], c + box[1]),
        "rarest colour's box": lambda r, c: (r + rare[0], c + rare[1]),
    }


def reference_rays(grid, background, r, c):
    """Return the first foreground colours strictly left, right, above and below of cell (r, c) of the grid."""
    h, w = grid.shape
    lines = (
        [grid[r, j] for j in range(c - 1, -1, -1)],
        [grid[r, j] for j in range(c + 1, w)],
        [grid[i, c] for i in range(r - 1, -1, -1)],
        [grid[i, c] for i in range(r + 1, h)],
    )
    return [next((int(x) for x in line if x != background), OUTSIDE) for line in lines]


def distinct_counts_grid(rng, shape):
    """Return a random grid in which no two colours are equally common, so that no tie has to be broken."""
    while True:
        colors = rng.choice(10, size=min(int(rng.integers(1, 4)), shape[0] * shape[1]), replace=False)
        grid = rng.choice(colors, size=shape, p=np.arange(1, len(colors) + 1) ** 2 / np.sum(np.arange(1, 4) ** 2)
                          if len(colors) == 3 else None).astype(np.uint8)  # fmt: skip
        counts = list(Counter(grid.ravel().tolist()).values())
        if len(set(counts)) == len(counts):
            return grid


SIZES = [((1, 1), (1, 1)), ((3, 3), (3, 3)), ((4, 6), (4, 6)), ((3, 5), (6, 10)), ((7, 3), (3, 1)), ((9, 4), (4, 4)),
         ((5, 5), (2, 7)), ((2, 2), (9, 9)), ((1, 8), (8, 1)), ((11, 5), (5, 5))]  # fmt: skip


def test_views_equal_brute_force():
    rng = np.random.default_rng(0)
    grids = [distinct_counts_grid(rng, inside) for inside, _ in SIZES]
    side = 12
    canvas = torch.full((len(grids), side, side), PAD)
    for row, grid in zip(canvas, grids, strict=True):
        row[: grid.shape[0], : grid.shape[1]] = torch.from_numpy(grid.astype(np.int64))
    size, out_size = torch.tensor([a for a, _ in SIZES]), torch.tensor([b for _, b in SIZES])
    views, background = input_views(canvas, size, out_size, side)
    assert views.shape == (len(grids), NUM_VIEWS, side, side)
    for b, (grid, (ho, wo)) in enumerate(zip(grids, out_size.tolist(), strict=True)):
        h, w = grid.shape
        order = ranked(grid)
        most, second, rarest = order[0], order[min(1, len(order) - 1)], order[-1]
        assert background[b] == most
        box = first_cell(grid, lambda x, most=most: x != most)
        rare = first_cell(grid, lambda x, rarest=rarest: x == rarest)
        sources = reference_sources(h, w, ho, wo, box, rare)
        assert len(sources) + 4 + 3 == NUM_VIEWS
        for r in range(ho):
            for c in range(wo):
                for v, (name, source) in enumerate(sources.items()):
                    i, j = source(r, c)
                    expected = int(grid[i, j]) if 0 <= i < h and 0 <= j < w else OUTSIDE
                    assert views[b, v, r, c] == expected, (name, SIZES[b], r, c)
                rest = views[b, len(sources) :, r, c].tolist()
                assert rest[4:] == [most, second, rarest], (SIZES[b], r, c)
                if r < h and c < w:
                    assert rest[:4] == reference_rays(grid, most, r, c), (SIZES[b], r, c)


def test_color_statistics_break_ties_towards_the_lower_color():
    grid = torch.tensor([[[7, 7, 7, 7], [5, 5, 2, 2], [9, 9, 7, 7], [3, 4, 8, 8]]])  # 7: 6, 2 5 8 9: 2 each, 3 4: 1
    size = torch.tensor([[4, 4]])
    views, background = input_views(grid, size, size, 4)
    assert background.item() == 7
    assert views[0, -3:, 0, 0].tolist() == [7, 2, 4]  # of 3 and 4, the lower counts as more, so 4 is the rarest


def test_views_do_not_depend_on_the_input_canvas():
    rng = np.random.default_rng(4)
    for inside, out in SIZES:
        grid = torch.from_numpy(random_grid(rng, inside).astype(np.int64))[None]
        size, out_size, side = torch.tensor([inside]), torch.tensor([out]), 12
        inner = size_mask(out_size, side)[:, None]
        tight, _ = input_views(square(grid, max(inside)), size, out_size, side)
        for larger in (max(inside) + 1, 15, 30):
            loose, _ = input_views(square(grid, larger), size, out_size, side)
            different = ((tight != loose) & inner).nonzero()[:, 1].unique().tolist()
            assert not different, f"views {different} of a {inside} input seen from a {out} output, canvas {larger}"


def test_cell_geometry_does_not_depend_on_the_output_canvas():
    rng = np.random.default_rng(5)
    for inside, out in SIZES:
        grid = torch.from_numpy(random_grid(rng, inside).astype(np.int64))[None]
        size, out_size = torch.tensor([inside]), torch.tensor([out])
        found = []
        for side in (max(out), max(out) + 3):
            views, background = input_views(square(grid, 15), size, out_size, side)
            found.append(cell_geometry(views, background, size, out_size)[0, : out[0], : out[1]])
        assert found[0].shape[-1] == NUM_GEOMETRY
        different = (found[0] != found[1]).nonzero()[:, -1].unique().tolist()
        assert not different, f"geometry {different} of a {inside} input seen from a {out} output"


def test_views_follow_the_colors():
    """Renaming the colours renames the copies and rays; only ties depend on names, and here are none."""
    rng = np.random.default_rng(6)
    grid = torch.from_numpy(distinct_counts_grid(rng, (6, 7)).astype(np.int64))[None]
    size, out_size = torch.tensor([[6, 7]]), torch.tensor([[4, 9]])
    names = torch.cat((torch.from_numpy(rng.permutation(10)), torch.tensor([OUTSIDE])))
    views, _ = input_views(square(grid, 9), size, out_size, 9)
    renamed, _ = input_views(square(names[grid], 9), size, out_size, 9)
    assert torch.equal(renamed, names[views])


# Invariances of the planner ------------------------------------------------------------------------------------------

SAME = [((4, 5), (4, 5)), ((6, 3), (6, 3))]
GROWING = [((2, 3), (4, 6)), ((3, 3), (6, 6))]
SHRINKING = [((6, 5), (2, 2)), ((5, 6), (3, 1))]


@pytest.mark.parametrize("attention", ["off", "on"])
@pytest.mark.parametrize("shapes", [SAME, GROWING, SHRINKING], ids=["same", "growing", "shrinking"])
def test_padding_does_not_change_trajectory(shapes, attention):
    agent = make_agent(attention=attention)
    contexts, answers = make_contexts(shapes)
    query, answer = collate(contexts, answers)
    height, width = answer.canvas
    preference = PriorCache().preferences(query, answer.target_size, answer.canvas)
    expected = plan(agent, query, answer.target_size, answer.canvas, preference=preference)
    none = (0, 0)
    for input_more, demos_more, (rows, cols) in (
        ((3, 3), none, none),
        ((0, 2), none, none),
        (none, (4, 1), none),
        (none, none, (5, 5)),
        (none, none, (3, 0)),
        ((7, 8), (6, 5), (5, 9)),
    ):
        grown, larger = padded_query(query, input_more, demos_more), (height + rows, width + cols)
        found = plan(agent, grown, answer.target_size, larger, preference=on_larger(preference, rows, cols))
        assert_same_plan(expected, found)
        target = padded(answer.target, rows, cols)
        for t in range(expected.forward.shape[1]):
            loss = GridAccuracyLoss()(found.forward[:, t], target)
            torch.testing.assert_close(loss, GridAccuracyLoss()(expected.forward[:, t], answer.target), **CLOSE)


@pytest.mark.parametrize("shapes", [SAME, GROWING, SHRINKING], ids=["same", "growing", "shrinking"])
def test_padding_does_not_change_backward_plan_and_loss(shapes):
    agent = make_agent()
    contexts, answers = make_contexts(shapes, seed=1)
    query, answer = collate(contexts, answers)
    torch.manual_seed(0)
    loss = EFELoss(LossConfig(), feature_dim=agent.config.width, prompt_dim=PROMPT_DIM).eval()
    prompt, totals, backwards = prompts(2), [], []
    for more in ((0, 0), (4, 3)):
        grown = padded_query(query, more, more)
        wide = dataclasses.replace(answer, target=padded(answer.target, *more))
        preference = PriorCache().preferences(grown, answer.target_size, wide.canvas)
        features, size_log_prob = PriorCache().features(query), PriorCache().size_log_prob(query)
        with torch.no_grad():
            trajectory = agent.plan(
                agent.read(grown, answer.target_size, wide.canvas, preference=preference),
                prompt,
                agent.predict_size(grown, features, size_log_prob),
            )
            backward = agent.plan_backward(grown, wide.target, answer.target_size, prompt)
            terms = loss(
                with_backward(trajectory, backward), grown, wide, preference=preference,
                desirability=torch.zeros_like(preference), prompt=prompt, reward=torch.zeros(2), progress=5.0,
            )  # fmt: skip
        totals.append(terms)
        backwards.append(backward)
    rows, cols = backwards[0].shape[2:4]
    covered = size_mask(answer.target_size, (rows, cols)) | size_mask(query.input_size, (rows, cols))
    torch.testing.assert_close(
        on_cells(backwards[1][:, :, :rows, :cols], covered), on_cells(backwards[0], covered), **CLOSE
    )
    for name, value in totals[0].terms.items():
        torch.testing.assert_close(totals[1].terms[name], value, msg=name, **CLOSE)
    torch.testing.assert_close(totals[1].total, totals[0].total, **CLOSE)


@pytest.mark.parametrize("attention", ["off", "on"])
def test_trajectory_follows_the_order_of_the_batch(attention):
    agent = make_agent(attention=attention)
    contexts, answers = make_contexts([((4, 5), (4, 5)), ((2, 2), (4, 4)), ((6, 6), (3, 3)), ((1, 1), (1, 1))], demos=3)
    query, answer = collate(contexts, answers)
    order, canvas, prompt = torch.tensor([2, 0, 3, 1]), answer.canvas, prompts(4)
    expected = plan(agent, query, answer.target_size, canvas, prompt)
    found = plan(agent, chosen_queries(query, order), answer.target_size[order], canvas, prompt[order])
    assert_same_plan(expected, found, order)


def mixed_batch(demos=(2, 5, 3)):
    """Return contexts and answers of tasks with different numbers of demonstrations and different sizes."""
    contexts, answers = [], []
    for t, count in enumerate(demos):
        more, outs = make_contexts([[((7, 6), (7, 6)), ((9, 9), (9, 9)), ((4, 5), (8, 10))][t]], seed=t, demos=count)
        contexts.append(dataclasses.replace(more[0], task_id=f"task{t}"))
        answers.append(outs[0])
    return contexts, answers


@pytest.mark.parametrize("read_cells", [100_000, 120], ids=["all cells", "thinned cells"])
@pytest.mark.parametrize("attention", ["off", "on"])
def test_query_alone_has_the_same_trajectory_as_in_a_batch(attention, read_cells):
    agent = make_agent(attention=attention, read_cells=read_cells)
    contexts, answers = mixed_batch()
    prompt = prompts(len(contexts))
    query, answer = collate(contexts, answers)
    together = plan(agent, query, answer.target_size, answer.canvas, prompt)
    for b in range(len(contexts)):
        single, own = collate(contexts[b : b + 1], answers[b : b + 1])
        alone = plan(agent, single, own.target_size, answer.canvas, prompt[b : b + 1])
        assert_same_plan(together, alone, slice(b, b + 1))


def recolored(query, rows):
    """Return the query with all valid cells of the demonstrations `rows` renamed to the next colour."""
    changed = []
    for grid in (query.demo_input, query.demo_output):
        grid = grid.clone()
        grid[rows] = torch.where(grid[rows] == PAD, PAD, (grid[rows] + 1) % NUM_COLORS)
        changed.append(grid)
    return dataclasses.replace(query, demo_input=changed[0], demo_output=changed[1])


@pytest.mark.parametrize("read_cells", [100_000, 40])
def test_only_the_listed_demonstrations_matter(read_cells):
    agent = make_agent(read_cells=read_cells)
    contexts, answers = make_contexts(SAME, demos=3)
    query, answer = collate(contexts, answers)
    query.demo_index[0, 1] = -1  # a hole in the middle: this row belongs to nobody now
    orphan = 1
    canvas = answer.canvas
    expected = plan(agent, query, answer.target_size, canvas).forward
    for row in range(len(query.demo_input)):
        found = plan(agent, recolored(query, [row]), answer.target_size, canvas).forward
        for b in range(2):
            if row in query.demo_index[b].tolist():
                assert not torch.allclose(found[b], expected[b], atol=1e-4), (row, b)
            else:
                assert torch.equal(found[b], expected[b]), (row, b)
    assert orphan not in query.demo_index


def test_all_demonstrations_matter_whatever_slot_they_sit_in():
    agent = make_agent()
    contexts, answers = make_contexts(SAME, demos=3)
    query, answer = collate(contexts, answers)
    canvas = answer.canvas
    expected = plan(agent, query, answer.target_size, canvas)
    turned = dataclasses.replace(query, demo_index=query.demo_index.roll(1, 1))
    assert_same_plan(expected, plan(agent, turned, answer.target_size, canvas))
    fewer = dataclasses.replace(query, demo_index=torch.where(torch.arange(3) == 2, -1, query.demo_index))
    assert not torch.allclose(plan(agent, fewer, answer.target_size, canvas).forward, expected.forward, atol=1e-4)
    empty_slot = dataclasses.replace(query, demo_index=F.pad(query.demo_index, (0, 2), value=-1))
    assert_same_plan(expected, plan(agent, empty_slot, answer.target_size, canvas))


@pytest.mark.parametrize("attention", ["off", "on"])
def test_without_demonstrations_everything_is_finite(attention):
    agent = make_agent(attention=attention)
    contexts, answers = make_contexts(SAME)
    query, answer = collate(contexts, answers)
    query = dataclasses.replace(query, demo_index=torch.full_like(query.demo_index, -1))
    trajectory = agent.plan(agent.read(query, answer.target_size, answer.canvas), prompts(2))
    assert trajectory.forward.isfinite().all()
    torch.where(trajectory.mask[:, None, :, :, None], trajectory.forward, 0).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in agent.parameters())


@pytest.mark.parametrize("attention", ["off", "on"])
@pytest.mark.parametrize(
    "inside, out", [((1, 1), (1, 1)), ((30, 30), (30, 30)), ((1, 1), (30, 30)), ((30, 1), (1, 30))]
)
def test_extreme_sizes_are_finite(inside, out, attention):
    agent = make_agent(attention=attention, read_blocks=1, num_steps=2, read_cells=512)
    contexts, answers = make_contexts([(inside, out)], colors=10)
    query, answer = collate(contexts, answers)
    preference = PriorCache().preferences(query, answer.target_size, answer.canvas)
    trajectory = plan(agent, query, answer.target_size, answer.canvas, preference=preference)
    assert trajectory.mask.sum() == out[0] * out[1]
    for field in ("forward", "state_logits", "preference_logits", "halt_logits", "features"):
        assert getattr(trajectory, field).isfinite().all(), field
    with torch.no_grad():
        assert agent.plan_backward(query, answer.target, answer.target_size, prompts(1)).isfinite().all()


@pytest.mark.parametrize("size", [(3, 5), (9, 2), (30, 30)])
def test_bare_grid_is_planned_on_a_canvas_that_holds_input_and_output(size):
    found = make_agent()(torch.zeros(3, 4), prompts(1), torch.tensor([size]))
    assert found.mask.sum() == size[0] * size[1] and found.mask.shape == (1, max(3, size[0]), max(4, size[1]))


def test_output_size_may_differ_from_the_input_size():
    agent = make_agent()
    contexts, answers = make_contexts(GROWING + SHRINKING)
    query, answer = collate(contexts, answers)
    canvas = answer.canvas
    trajectory = plan(agent, query, answer.target_size, canvas)
    assert torch.equal(trajectory.mask, answer.mask)
    assert trajectory.forward.shape == (4, agent.config.num_steps, *canvas, NUM_COLORS)
    other = plan(agent, query, answer.target_size.flip(1), canvas)
    assert torch.equal(other.mask, size_mask(answer.target_size.flip(1), canvas))


# The steps, and the way back -----------------------------------------------------------------------------------------


def altered_step(planner, chosen, run):
    """Return run() while the state head's answer in its call number `chosen` is replaced by its negative."""
    calls = iter(range(1000))
    head = planner.state_head
    hook = head.register_forward_hook(lambda _, __, out: -out if next(calls) == chosen else None)
    try:
        with torch.no_grad():
            return run()
    finally:
        hook.remove()


@pytest.mark.parametrize("tied", [True, False])
def test_each_step_feeds_the_next_and_none_before(tied):
    agent = make_agent(num_steps=4, tie_stages=tied)
    contexts, answers = make_contexts(SAME)
    query, answer = collate(contexts, answers)

    def run():
        return plan(agent, query, answer.target_size, answer.canvas).forward

    expected = run()
    for t in range(4):
        found = altered_step(agent.forward_planner, t, run)
        changed = [not torch.allclose(found[:, s], expected[:, s], atol=1e-5) for s in range(4)]
        assert changed == [s >= t for s in range(4)]
        assert torch.equal(found[:, :t], expected[:, :t])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_in_the_settings_are_steps_of_the_plan(steps):
    agent = make_agent(num_steps=steps)
    contexts, answers = make_contexts(SAME)
    query, answer = collate(contexts, answers)
    trajectory = plan(agent, query, answer.target_size, answer.canvas)
    for name in ("forward", "state_logits", "halt_logits"):
        assert getattr(trajectory, name).shape[1] == steps, name
    for s in range(1, steps):
        assert not torch.allclose(trajectory.forward[:, s], trajectory.forward[:, s - 1], atol=1e-4)


def test_untied_stages_have_parameters_of_their_own():
    def stage_parameters(**values):
        return parameter_count(make_agent(noise=0, **values).forward_planner.stages)

    one = stage_parameters(num_steps=1)
    assert stage_parameters(num_steps=5, tie_stages=True) == one > 0
    assert stage_parameters(num_steps=5, tie_stages=False) == 5 * one
    assert stage_parameters(num_steps=5, tie_stages=False, plan_blocks=2) == 10 * one


@pytest.mark.parametrize("shapes", [SAME, GROWING, SHRINKING], ids=["same", "growing", "shrinking"])
def test_backward_plan_covers_both_canvases_and_ends_at_the_input(shapes):
    agent = make_agent(num_steps=4)
    contexts, answers = make_contexts(shapes)
    query, answer = collate(contexts, answers)
    prompt = prompts(2)

    def run():
        return agent.plan_backward(query, answer.target, answer.target_size, prompt)

    frame = tuple(map(max, query.input.shape[1:], answer.canvas))
    with torch.no_grad():
        expected = run()
    assert expected.shape == (2, 4, *frame, NUM_COLORS)
    assert expected.isfinite().all()
    for k in range(4):  # the k-th step taken from the output is b_{T-1-k}
        found = altered_step(agent.backward_planner, k, run)
        changed = [not torch.allclose(found[:, t], expected[:, t], atol=1e-5) for t in range(4)]
        assert changed == [t <= 3 - k for t in range(4)]


def test_backward_plan_reads_the_grid_it_starts_from_and_plans_on_both_areas():
    agent = make_agent()
    contexts, answers = make_contexts(GROWING + SHRINKING)
    query, answer = collate(contexts, answers)
    frame = tuple(map(max, query.input.shape[1:], answer.canvas))
    reversed_query = query.reversed(answer.target, answer.target_size)
    reading = agent.read(reversed_query, query.input_size, frame, direction=BACKWARD)
    assert torch.equal(reading.mask, size_mask(query.input_size, frame) | size_mask(answer.target_size, frame))
    wrong = torch.where(answer.mask, (answer.target + 3) % NUM_COLORS, PAD)
    with torch.no_grad():
        one = agent.plan_backward(query, answer.target, answer.target_size, prompts(4))
        two = agent.plan_backward(query, wrong, answer.target_size, prompts(4))
        assert not torch.allclose(one, two, atol=1e-3)
        hidden = dataclasses.replace(query, input=torch.where(query.input == PAD, PAD, 0))
        three = agent.plan_backward(hidden, answer.target, answer.target_size, prompts(4))
    assert torch.equal(one, three)  # the input is what it should find, so it must not look at it


def test_backward_beliefs_leave_the_forward_trajectory_alone():
    agent = make_agent()
    contexts, answers = make_contexts(GROWING)
    query, answer = collate(contexts, answers)
    results = []
    for shift in (0, 5):
        target = torch.where(answer.mask, (answer.target + shift) % NUM_COLORS, PAD)
        with torch.no_grad():
            trajectory = agent.plan(agent.read(query, answer.target_size, answer.canvas), prompts(2))
            backward = agent.plan_backward(query, target, answer.target_size, prompts(2))
        results.append(with_backward(trajectory, backward))
    for field in dataclasses.fields(Trajectory):
        one, two = (getattr(result, field.name) for result in results)
        if field.name == "backward":
            assert not torch.equal(one, two)
        elif one is not None:
            assert torch.equal(one, two), field.name


def test_backward_planner_sends_gradient_to_itself_and_the_prompt_only():
    agent, prompt = make_agent(), prompts(2).requires_grad_()
    contexts, answers = make_contexts(SAME)
    query, answer = collate(contexts, answers)
    agent.plan_backward(query, answer.target, answer.target_size, prompt).square().sum().backward()
    reached = {name.partition(".")[0] for name, p in agent.named_parameters() if p.grad is not None}
    assert reached == {"backward_planner"} and (prompt.grad != 0).any()
    with torch.no_grad():
        frame = tuple(map(max, answer.canvas, query.input.shape[1:]))
        reading = agent.read(query.reversed(answer.target, answer.target_size), query.input_size, frame,
                             direction=BACKWARD)  # fmt: skip
        there, back = agent.forward_planner(reading, prompt)[0], agent.backward_planner(reading, prompt)[0]
    assert not torch.allclose(there, back, atol=1e-4)


def test_repeated_reading_plans_each_prompt_as_alone():
    agent = make_agent()
    contexts, answers = make_contexts(SAME)
    query, answer = collate(contexts, answers)
    canvas = answer.canvas
    preference = PriorCache().preferences(query, answer.target_size, canvas)
    three = prompts(6).view(3, 2, PROMPT_DIM)
    with torch.no_grad():
        reading = agent.read(query, answer.target_size, canvas, preference=preference)
        together = agent.plan(reading.repeat(3), three.flatten(0, 1))
        for g in range(3):
            alone = agent.plan(reading, three[g])
            torch.testing.assert_close(together.forward[2 * g : 2 * g + 2], alone.forward, **CLOSE)
        assert not torch.allclose(together.forward[:2], together.forward[2:4], atol=1e-4)  # the prompt matters


# What the beliefs start from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [10, 20, 50])
def test_uniform_states_decode_to_uniform_colors(codes):
    log_prob = decode_states(torch.full((3, codes), 2.5), initial_likelihood(codes))
    torch.testing.assert_close(log_prob.exp(), torch.full((3, 10), 0.1), rtol=0, atol=1e-7)


def test_decoded_states_are_the_mixture_of_the_likelihoods():
    state, likelihood = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 10, dtype=torch.float64)
    q, a = F.softmax(state, -1), F.softmax(likelihood, -1)
    expected = [[sum(q[i, s] * a[s, o] for s in range(7)).log() for o in range(10)] for i in range(5)]
    torch.testing.assert_close(decode_states(state, likelihood), torch.tensor(expected).float(), rtol=1e-5, atol=1e-6)
    one_code = decode_states(torch.eye(20) * 50, initial_likelihood(20))
    assert one_code.argmax(-1).tolist() == [*range(10), *range(10)]


def two_rules(seed=0):
    """Return contexts of tasks with a rule, so that their prior is not flat: renamed colours, and a copied grid."""
    rng = np.random.default_rng(seed)
    names = np.array([0, 5, 7, 2, 1, 3, 8, 9, 4, 6], np.uint8)
    contexts = []
    for t, rule in enumerate((lambda g: names[g], lambda g: g, lambda g: np.where(g == 1, 4, g).astype(np.uint8))):
        grids = [random_grid(rng, (6, 7)) for _ in range(4)]
        contexts.append(Context(f"rule{t}", "test:0", tuple((g, rule(g)) for g in grids[:3]), grids[3]))
    return contexts


def test_first_belief_of_an_untrained_agent_is_the_prior():
    query, _ = collate(two_rules())
    preference = PriorCache().preferences(query, query.input_size, tuple(query.input.shape[1:]))
    agent = make_agent(noise=0, kappa=1.0)
    with torch.no_grad():
        trajectory = agent(query, prompts(3), preference=preference)
    mask = trajectory.mask
    same = trajectory.final().argmax(-1)[mask] == preference.argmax(-1)[mask]
    assert same.float().mean() > 0.97
    assert mask.sum() == 3 * 42


def test_prior_enters_with_kappa_and_not_without():
    query, _ = collate(two_rules())
    preference = PriorCache().preferences(query, query.input_size, tuple(query.input.shape[1:]))
    other = F.log_softmax(3 * torch.randn(preference.shape, generator=torch.Generator().manual_seed(0)), -1)
    for kappa, matters in ((0.0, False), (0.5, True)):
        agent = make_agent(kappa=kappa)
        with torch.no_grad():
            one, two = (agent(query, prompts(3), preference=p) for p in (preference, other))
            none = agent(query, prompts(3))
        for name in ("forward", "preference_logits", "halt_logits"):
            if name != "preference_logits":  # that head must not copy C by name, so this is only asked of kappa 0
                assert torch.equal(getattr(one, name), getattr(two, name)) != matters, (kappa, name)
            if not matters:
                assert torch.equal(getattr(one, name), getattr(two, name)), (kappa, name)
                assert torch.equal(getattr(one, name), getattr(none, name)), (kappa, name)


def test_weights_of_views_are_summed_by_the_colour_that_each_shows():
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(2, 3, 5, NUM_VIEWS, generator=generator, dtype=torch.float64, requires_grad=True)
    views = torch.randint(0, OUTSIDE + 1, (2, 5, NUM_VIEWS), generator=generator)
    onehot = F.one_hot(views, OUTSIDE + 1)[..., :NUM_COLORS].double()
    expected = (weight[..., None] * onehot[:, None]).sum(-2)
    found = colors_of(weight, views)
    torch.testing.assert_close(found, expected)
    upstream = torch.rand(found.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad(x, weight, upstream)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][(views == OUTSIDE)[:, None].expand_as(weight)].any()


def test_reading_finds_an_answer_that_the_demonstrations_show():
    """At initialisation a repeated demonstration is copied better than chance by the read alone (kappa = 0)."""
    rng = np.random.default_rng(3)
    grids = [random_grid(rng, (6, 6), 9) for _ in range(3)]
    flipped = tuple((g, g[:, ::-1].copy()) for g in grids[:2])
    query, answer = collate([Context("flip", "test:0", flipped, grids[2])], [grids[2][:, ::-1]])
    agent = make_agent(noise=0, kappa=0.0, width=32)
    with torch.no_grad():
        final = agent(query, prompts(1)).final()
    right, cells = cell_accuracy(final.argmax(-1), answer.target)
    assert (right / cells).item() > 0.5


# Heads and metrics ---------------------------------------------------------------------------------------------------


def make_trajectory(halt_logits, forward):
    batch, _, side = forward.shape[:3]
    empty = torch.zeros(batch, 1)
    return Trajectory(forward, None, forward, empty, empty, halt_logits, empty, empty, empty,
                      torch.ones(batch, side, side, dtype=torch.bool))  # fmt: skip


def test_final_belief_is_that_of_the_last_step():
    forward = torch.randn(5, 4, 3, 3, 10)
    halt = torch.tensor([[-1.0, -1, -1, -1], [2, -1, -1, -1], [-1, 3, 5, -1], [-5, -1, -1, 1], [0, 0, 0, 0]])
    assert torch.equal(make_trajectory(halt, forward).final(), forward[:, 3])


def test_untrained_agent_does_not_halt_early():
    query, _ = collate(two_rules())
    with torch.no_grad():
        trajectory = make_agent(noise=0)(query, prompts(3))
    assert (trajectory.halt_logits < 0).all()
    assert torch.equal(trajectory.final(), trajectory.forward[:, -1])


def test_size_head_starts_at_the_size_rule():
    contexts, answers = make_contexts(SAME + GROWING + SHRINKING)
    query, answer = collate(contexts, answers)
    cache, agent = PriorCache(), make_agent(noise=0)
    log_prob = cache.size_log_prob(query)
    rows, cols = agent.predict_size(query, cache.features(query), log_prob)
    torch.testing.assert_close(torch.stack((rows, cols), 1).softmax(-1), log_prob.softmax(-1), **CLOSE)
    assert torch.equal(torch.stack((rows.argmax(1) + 1, cols.argmax(1) + 1), 1), answer.target_size)


def test_size_head_can_overrule_the_rule():
    torch.manual_seed(0)
    head = SizeHead(4)
    features, rule = torch.eye(4)[:2], torch.full((2, 2, 30), -9.0)
    rule[:, :, 4] = 0.0
    sizes, target = torch.tensor([[5, 5], [5, 5]]), torch.tensor([[2, 6], [9, 29]])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    for _ in range(150):
        rows, cols = head(sizes, features, rule)
        loss = F.cross_entropy(rows, target[:, 0]) + F.cross_entropy(cols, target[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(torch.stack((rows.argmax(1), cols.argmax(1)), 1), target)


def brute_force_exact(prediction, size, target, target_size):
    h, w = target_size.tolist()
    if size.tolist() != [h, w] or h > prediction.shape[0] or w > prediction.shape[1]:
        return False
    return all(prediction[r, c] == target[r, c] for r in range(h) for c in range(w))


@pytest.mark.parametrize("own_side, target_side", [(6, 6), (9, 6), (6, 9), (4, 6)])
def test_metrics_equal_brute_force(own_side, target_side):
    rng = torch.Generator().manual_seed(own_side * 10 + target_side)
    predictions, sizes, targets, target_sizes = [], [], [], []
    for k in range(40):
        h, w = (int(torch.randint(1, 5, (), generator=rng)) for _ in range(2))
        target = torch.full((target_side, target_side), PAD)
        target[:h, :w] = torch.randint(0, 3, (h, w), generator=rng)
        prediction = torch.full((own_side, own_side), PAD)
        prediction[:h, :w] = target[:h, :w]
        size = [h, w]
        if k % 4 == 1:
            prediction[0, 0] = (prediction[0, 0] + 1) % 10
        if k % 4 == 2:  # right on the target's cells, but too large
            size = [h, min(w + 1, own_side)]
            prediction[:h, : size[1]] = torch.where(prediction[:h, : size[1]] == PAD, 1, prediction[:h, : size[1]])
        if k % 4 == 3:
            size = [max(h - 1, 1), w]
        predictions.append(prediction), sizes.append(size), targets.append(target), target_sizes.append([h, w])
    prediction, size = torch.stack(predictions), torch.tensor(sizes)
    target, target_size = torch.stack(targets), torch.tensor(target_sizes)
    found = exact_match(prediction, size, target, target_size)
    expected = [brute_force_exact(*x) for x in zip(prediction, size, target, target_size, strict=True)]
    assert found.tolist() == expected
    assert 5 < sum(expected) < 35
    if own_side == target_side:
        right, cells = cell_accuracy(prediction, target)
        assert cells.tolist() == [h * w for h, w in target_sizes]
        brute = [
            sum(int(p[r, c] == t[r, c]) for r in range(h) for c in range(w))
            for p, t, (h, w) in zip(prediction, target, target_sizes, strict=True)
        ]
        assert right.tolist() == brute


def test_accuracy_loss_is_zero_for_certain_right_answers_and_one_for_wrong():
    target = torch.tensor([[[1, 2, PAD], [3, 0, PAD], [PAD, PAD, PAD]], [[5, PAD, PAD]] + [[PAD] * 3] * 2])
    right = 200.0 * F.one_hot(target.clamp(min=0), 10).float()
    wrong = 200.0 * F.one_hot((target.clamp(min=0) + 1) % 10, 10).float()
    loss = GridAccuracyLoss()
    assert loss(right, target).item() == 0
    assert loss(wrong, target).item() == 1
    half = right.clone()
    half[0, 0] = wrong[0, 0]  # two of four cells of the first grid, none of the second
    assert loss(half, target).item() == pytest.approx(0.25)
    assert loss(torch.zeros_like(right), target).item() == pytest.approx(0.9)


def test_accuracy_loss_ignores_padding_and_empty_samples():
    target = torch.full((3, 4, 4), PAD)
    target[0, :2, :3], target[1, :4, :1] = 3, 4
    logits = torch.randn(3, 4, 4, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    poisoned = torch.where((target == PAD)[..., None], float("nan"), logits)
    loss = GridAccuracyLoss()(poisoned, target)
    torch.testing.assert_close(loss, GridAccuracyLoss()(logits[:2], target[:2]))
    loss.backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[target == PAD] == 0).all()
    assert GridAccuracyLoss()(logits, torch.full_like(target, PAD)).item() == 0


def test_accuracy_loss_gradient_equals_finite_differences():
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 10, (2, 2, 3), generator=generator)
    target[1, 1, :] = PAD
    logits = torch.randn(2, 2, 3, 10, generator=generator).requires_grad_()
    loss = GridAccuracyLoss()
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    eps, numeric = 3e-2, torch.zeros_like(logits)
    with torch.no_grad():
        for i in range(logits.numel()):
            step = torch.zeros(logits.numel()).index_fill(0, torch.tensor(i), eps).view_as(logits)
            numeric.view(-1)[i] = (loss(logits + step, target) - loss(logits - step, target)) / (2 * eps)
    torch.testing.assert_close(gradient, numeric, rtol=2e-2, atol=2e-5)
    assert gradient.abs().max() > 1e-2


# Size, gradients, precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, low, high", [("tiny", 0, 1e6), ("small", 3e6, 8e6), ("base", 25e6, 75e6)])
def test_presets_have_the_size_they_promise(preset, low, high):
    config = resolve(with_values(TrainConfig(), {"agent.preset": preset}), "cuda", 40.0)
    with torch.device("meta"):
        agent = ARCPromptGuidedAgent(config.agent, prompt_dim=config.prompt.prompt_dim)
    assert not [name for name, p in agent.named_parameters() if not p.is_meta]
    assert low < parameter_count(agent) < high


@pytest.mark.parametrize("attention, tied", [("off", True), ("on", False)])
def test_every_parameter_gets_a_gradient(attention, tied):
    agent = make_agent(attention=attention, tie_stages=tied).train()
    contexts, answers = make_contexts(SAME + GROWING)
    query, answer = collate(contexts, answers)
    canvas, cache, prompt = answer.canvas, PriorCache(), prompts(4)
    sizes = agent.predict_size(query, cache.features(query), cache.size_log_prob(query))
    preference = cache.preferences(query, answer.target_size, canvas)
    trajectory = agent.plan(agent.read(query, answer.target_size, canvas, preference=preference), prompt, sizes)
    trajectory = with_backward(trajectory, agent.plan_backward(query, answer.target, answer.target_size, prompt))
    generator, total = torch.Generator().manual_seed(0), 0.0
    for name in ("forward", "backward", "preference_logits", "halt_logits", "row_logits", "col_logits"):
        value = getattr(trajectory, name)
        value = value.log_softmax(-1) if name not in ("halt_logits",) else value
        total = total + (value * torch.rand(value.shape, generator=generator)).sum()
    total.backward()
    untouched = [name for name, p in agent.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not untouched
    assert all(p.grad.isfinite().all() for p in agent.parameters())


@pytest.mark.parametrize("attention", ["off", "on"])
def test_bf16_autocast_gives_finite_fp32_logits_near_the_fp32_ones(attention):
    agent = make_agent(attention=attention, noise=0.1)
    contexts, answers = make_contexts(GROWING + SHRINKING)
    query, answer = collate(contexts, answers)
    canvas, cache = answer.canvas, PriorCache()
    preference = cache.preferences(query, answer.target_size, canvas)
    exact = plan(agent, query, answer.target_size, canvas, preference=preference)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reading = agent.read(query, answer.target_size, canvas, preference=preference)
        sizes = agent.predict_size(query, cache.features(query), cache.size_log_prob(query))
        trajectory = agent.plan(reading, prompts(4), sizes)
        backward = agent.plan_backward(query, answer.target, answer.target_size, prompts(4))
    trajectory = with_backward(trajectory, backward)
    for name in ("forward", "backward", "state_logits", "preference_logits", "halt_logits", "row_logits", "col_logits"):
        assert getattr(trajectory, name).dtype == torch.float32, name
        assert getattr(trajectory, name).isfinite().all(), name
    rough, fine = (on_cells(x.forward.softmax(-1), exact.mask) for x in (trajectory, exact))
    assert (rough - fine).abs().max() < 0.1
    trajectory.forward.log_softmax(-1).mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in agent.parameters())


def test_plan_is_deterministic():
    contexts, answers = make_contexts(SAME)
    query, answer = collate(contexts, answers)
    one, two = (plan(make_agent(), query, answer.target_size, answer.canvas) for _ in range(2))
    assert torch.equal(one.forward, two.forward)


def test_gradients_are_bit_equal_on_several_threads():
    """A gradient that is added up with atomics, in any order, would make a resumed run differ."""
    agent = make_agent()
    contexts, answers = make_contexts([((24, 24), (24, 24))], demos=5)
    query, answer = collate(contexts * 6, answers * 6)  # six queries read the same demonstrations
    assert query.demo_input.shape[0] == 5
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(3):
            agent.zero_grad()
            plan = agent.read(query, answer.target_size, answer.canvas)
            (plan.read_logits.square().sum() + plan.hidden.square().sum()).backward()
            found.append([p.grad.clone() for p in agent.parameters() if p.grad is not None])
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_compiled_blocks_compute_the_same_with_few_graphs():
    """Shapes differ from batch to batch; only sizes of one are shapes of their own to torch.compile."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def found(block, shape):
        generator = torch.Generator().manual_seed(sum(shape))
        x = torch.randn(*shape, 32, generator=generator, requires_grad=True)
        cells = Cells(torch.rand(shape, generator=generator) > 0.2, 32)
        prompt = None if block.modulation is None else torch.randn(shape[0], 8, generator=generator)
        y = block(x, cells, prompt)
        return y, *torch.autograd.grad(y.square().mean(), [x, *block.parameters()])

    torch._dynamo.reset()
    torch.manual_seed(0)
    blocks = [Block(32, True, 8), Block(32, True), Block(32, True, 8)]
    fused, counts = compiled_pieces(backend=count), []
    for shape in [(2, 3, 4), (3, 5, 2), (4, 2, 7), (2, 30, 30)]:
        for block in blocks:
            expected = found(block, shape)
            block.pieces = fused
            actual = found(block, shape)
            del block.pieces
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        counts.append(len(graphs))
    assert counts == [5] * 4  # one of each piece, for all blocks
