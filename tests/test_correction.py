"""The closed-form correction of what writes a block's output: against brute force, and on blocks of many families."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus
from prunus.engine.correction import adds_to_output, corrected
from prunus.methods.lsq import ridge
from prunus.model.families import find_block_list
from prunus.model.linears import Linear, find_linears
from tiny import tiny_checkpoint, tiny_model, token_ids

WIDTH, INNER, TOKENS = 6, 10, 400


class Residual(nn.Module):
    """x + down(tanh(x up))."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


@torch.no_grad()
def task(seed: int = 0):
    torch.manual_seed(seed)
    block = Residual().requires_grad_(False)
    keep_OI = torch.rand(WIDTH, INNER) > 0.4
    x = torch.randn(4, TOKENS, WIDTH)
    y = block(x + 0.1 * torch.randn_like(x)) * (
        0.1 + torch.rand(4, TOKENS, 1)
    )  # targets of very different sizes
    block.down.weight.mul_(keep_OI)
    return block, keep_OI, x, y


def test_the_correction_is_weighted_least_squares_on_the_support_taken_as_far_as_held_out_tokens_allow():
    block, keep_OI, x, y = task()
    before = block.down.weight.clone()
    found, share = corrected(
        Linear("down", block.down), keep_OI, lambda b: block(x[b]), lambda b: y[b], [0, 1, 2], [3]
    )
    assert torch.equal(block.down.weight, before)
    assert not found[~keep_OI].any()

    X, R, size = (
        torch.tanh(block.up(x)).double(),
        (y - block(x)).double(),
        y.double().norm(dim=-1, keepdim=True),
    )
    X, R = X / size, R / size
    seen_TI, wrong_TO = X[:3].reshape(-1, INNER), R[:3].reshape(-1, WIDTH)
    scale_I = seen_TI.norm(dim=0)
    change_OI = torch.zeros(WIDTH, INNER, dtype=torch.float64)
    below_II = ridge(INNER, 3 * TOKENS) ** 0.5 * torch.diag(scale_I)
    for row in range(WIDTH):
        rows, zeros = torch.cat([seen_TI, below_II])[:, keep_OI[row]], torch.zeros(INNER).double()
        change_OI[row, keep_OI[row]] = torch.linalg.lstsq(rows, torch.cat([wrong_TO[:, row], zeros])).solution
    expected = min(
        (step / 200 for step in range(201)),
        key=lambda s: float((R[3] - s * X[3] @ change_OI.T).square().sum()),
    )
    assert share == pytest.approx(expected, abs=0.01)

    def left(change_OI: torch.Tensor) -> float:
        change_OI = change_OI.double()
        ridged = ridge(INNER, 3 * TOKENS) * (change_OI * scale_I).square().sum()
        return float((wrong_TO - seen_TI @ change_OI.T).square().sum() + ridged)

    # Steps end before the last digit: nearly all of what can be won is.
    won = left(torch.zeros(WIDTH, INNER)) - left((found.double() - before * keep_OI) / share)
    assert won > 0.999 * (left(torch.zeros(WIDTH, INNER)) - left(change_OI))


def test_what_only_harms_held_out_tokens_is_not_taken():
    block, keep_OI, x, y = task()
    y[3] = block(x[3]) - (y[3] - block(x[3]))
    linear = Linear("down", block.down)
    found, share = corrected(linear, keep_OI, lambda b: block(x[b]), lambda b: y[b], [0, 1, 2], [3])
    assert share == 0
    assert torch.equal(found, block.down.weight)
    y[0, 0] = torch.nan
    found, share = corrected(linear, keep_OI, lambda b: block(x[b]), lambda b: y[b], [0, 1, 2], [3])
    assert torch.equal(found, block.down.weight), "nothing that is not finite reaches the weights"


@pytest.mark.parametrize(
    ("family", "adding"),
    [
        ("llama", ["mlp.down_proj"]),
        ("gpt2", ["mlp.c_proj"]),
        ("gpt_neox", ["attention.dense", "mlp.dense_4h_to_h"]),
        ("gemma2", []),
        ("opt", ["fc2"]),
    ],
)
def test_only_what_is_added_to_the_output_is_corrected(family, adding):
    model = tiny_model(family).requires_grad_(False)
    _, blocks = find_block_list(model)
    seen: list[tuple[tuple, dict]] = []
    handle = blocks[0].register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    model(input_ids=token_ids(2, 16), use_cache=False)
    handle.remove()
    args, kwargs = seen[0]

    def run() -> torch.Tensor:
        output = blocks[0](*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    with torch.no_grad():
        assert [linear.name for linear in find_linears(blocks[0]) if adds_to_output(linear, run)] == adding


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_says_how_much_was_corrected_and_ends_nearer_to_the_dense_model(family, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    options = {"method": "wanda", "calibration": token_ids(32, 32), "match_rate": 1e-9, "match_passes": 1}
    report = prunus.prune(dense, tmp_path / "out", match_blocks=True, batch=1, **options)
    for block in report.blocks:
        name, share = list(block.match.corrected.items())[-1]
        assert name in ("mlp.down_proj", "mlp.c_proj")
        assert 0 < share <= 1
        assert block.match.error_after < 0.995 * block.match.error_before
        assert block.linears[name].sparsity == pytest.approx(0.5, abs=0.01)
