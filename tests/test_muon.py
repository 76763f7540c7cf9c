"""Muon: the update of torch.optim.Muon but for rounding, the same state, and matrices that do not see one another."""

from __future__ import annotations

import pytest
import torch

from muon import Muon, orthogonalized

COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
SHAPES = [(8, 8), (8, 24), (24, 8), (8, 8), (5, 3), (1, 7)]


def matrices(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def reference(matrix):
    """Return the iteration of one matrix in double precision, written out."""
    a, b, c = COEFFICIENTS
    x = matrix.double()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm()
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_batched_matrices_equal_the_iteration_of_each_in_double_precision(scale):
    given = matrices(scale=scale)
    for matrix, found in zip(given, orthogonalized(given, COEFFICIENTS, STEPS, EPS), strict=True):
        assert found.shape == matrix.shape and found.dtype == torch.float32
        torch.testing.assert_close(found, reference(matrix).float(), rtol=1e-4, atol=1e-5)
        singular = torch.linalg.svdvals(found)
        assert float(singular.min()) > 0.3 and float(singular.max()) < 1.3


def test_a_matrix_of_zeros_stays_zero_beside_others():
    given = [torch.zeros(8, 8), *matrices()]
    assert not orthogonalized(given, COEFFICIENTS, STEPS, EPS)[0].any()


def train(kind, seed=0, steps=4, state=None):
    parameters = [torch.nn.Parameter(m) for m in matrices(seed)]
    optimizer = kind(parameters, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(steps):
        for parameter, gradient in zip(parameters, matrices(seed + 1 + step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return parameters, optimizer


def test_steps_equal_those_of_torch_but_for_its_bfloat16():
    (ours, mine), (theirs, other) = train(Muon), train(torch.optim.Muon)
    for start, one, two in zip(matrices(), ours, theirs, strict=True):
        moved = (two - start).detach().norm()
        assert float((one - two).detach().norm() / moved) < 0.02  # bfloat16 has 8 bits
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.state[one]["momentum_buffer"], other.state[two]["momentum_buffer"])


def test_state_is_that_of_torch():
    _, other = train(torch.optim.Muon)
    parameters, mine = train(Muon, steps=0, state=other.state_dict())
    for one, two in zip(mine.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert one.keys() == two.keys() and torch.equal(one["momentum_buffer"], two["momentum_buffer"])
    assert mine.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    assert len(mine.state) == len(parameters)


def test_parameters_without_a_gradient_stay_as_they_are():
    parameters = [torch.nn.Parameter(m) for m in matrices()]
    optimizer = Muon(parameters, lr=0.02, adjust_lr_fn="match_rms_adamw")
    optimizer.step()
    parameters[0].grad = torch.ones(8, 8)
    optimizer.step()
    assert not torch.equal(parameters[0], matrices()[0])
    assert all(torch.equal(p, m) for p, m in zip(parameters[1:], matrices()[1:], strict=True))
