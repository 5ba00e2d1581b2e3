"""The end of a block on cached inputs: the same to the bit as the whole block, or not used."""

import greenlet
import pytest
import torch
from torch import nn

from prunus.engine.reconstruction.cached_suffix import find_suffix


class Block(nn.Module):
    """A linear in place of attention, and an MLP that `combine` puts behind it."""

    def __init__(self, combine):
        super().__init__()
        self.attention, self.mlp = (
            nn.Linear(8, 8),
            nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)),
        )
        self.combine = combine

    def forward(self, x):
        return self.combine(self, x + self.attention(x))


COMBINED = {
    "added": (lambda block, x: x + block.mlp(x), True),
    "alone": (lambda block, x: block.mlp(x), True),
    "scaled": (lambda block, x: x + 0.5 * block.mlp(x), False),
    "normed": (lambda block, x: torch.nn.functional.layer_norm(x + block.mlp(x), (8,)), False),
    "twice": (lambda block, x: block.mlp(block.mlp(x)), False),
    "never": (lambda block, x: x, False),
    "given more": (lambda block, x: x + block.mlp(input=x), False),
}


@pytest.mark.parametrize("name", COMBINED)
@torch.no_grad()
def test_only_a_module_that_is_added_last_is_a_suffix(name):
    combine, works = COMBINED[name]
    torch.manual_seed(0)
    block, inputs = Block(combine).eval(), torch.randn(3, 2, 5, 8)
    calls = []
    suffix = find_suffix(
        block, ["mlp.0", "mlp.2"], lambda batch: calls.append(batch) or block(inputs[batch]), 0
    )
    assert (suffix is not None) is works
    assert "forward" not in vars(block.mlp)
    if suffix is None:
        return
    calls.clear()
    for _ in range(3):
        for weight in (block.mlp[0].weight, block.mlp[2].bias):
            weight += 0.1
        for batch in range(3):
            expected = block(inputs[batch])
            assert torch.equal(suffix(batch), expected)
    assert calls == [1, 2], "the part before the suffix runs once per batch"


@torch.no_grad()
def test_a_pass_in_lockstep_fills_the_cache():
    block, inputs, calls = Block(COMBINED["added"][0]), torch.randn(3, 2, 5, 8), []
    suffix = find_suffix(
        block, ["mlp.0"], lambda batch: calls.append(batch) or block(inputs[batch]), 0
    )
    calls.clear()
    linear = block.mlp[2]

    def pause(*_):
        greenlet.getcurrent().parent.switch()

    hook = linear.register_forward_pre_hook(pause)
    with suffix.recording() as forward:
        walks = [greenlet.greenlet(forward) for _ in range(3)]
        for batch, walk in enumerate(walks):
            walk.switch(batch)
        linear.weight *= 0.5  # while all batches are paused in front of it
        for walk in walks:
            walk.switch()
        assert all(walk.dead for walk in walks)
    hook.remove()
    assert calls == [0, 1, 2]
    for batch in range(3):
        assert torch.equal(suffix(batch), block(inputs[batch]))
    assert calls == [0, 1, 2]


class Shifting(nn.Module):
    """Also reads the previous token, as the MLPs of some models do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x + nn.functional.pad(x, (0, 0, 1, -1)))


@torch.no_grad()
def test_a_module_that_treats_tokens_independently_runs_on_some_of_them():
    block, inputs = Block(COMBINED["added"][0]).eval(), torch.randn(3, 2, 12, 8)
    calls = []
    for keep in (True, False):
        suffix = find_suffix(
            block, ["mlp.0"], lambda batch: calls.append(batch) or block(inputs[batch]), 0, keep
        )
        assert suffix.by_token
        calls.clear()
        for batch in (1, 1, 2):
            whole = block(inputs[batch])
            torch.testing.assert_close(suffix(batch, slice(2, None, 5)), whole[:, 2::5])
            assert torch.equal(suffix(batch), whole)
        assert calls == ([1, 2] if keep else [1, 1, 1, 1, 2, 2])
    block.mlp = Shifting()
    assert not find_suffix(block, ["mlp.linear"], lambda batch: block(inputs[batch]), 0).by_token
