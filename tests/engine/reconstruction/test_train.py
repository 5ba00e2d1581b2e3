"""Block reconstruction on small modules whose best weights are known, and the cached suffix."""

import greenlet
import pytest
import torch
from torch import nn

from prunus.engine.reconstruction.cached_suffix import find_suffix
from prunus.engine.reconstruction.output_loss import (
    CHUNK_TOKENS,
    LOGIT_STRIDE,
    divergence_loss,
    relative_error,
)
from prunus.engine.reconstruction.reconstruct_block import default_schedule
from prunus.engine.reconstruction.train import (
    BlockBatches,
    TrainOptions,
    train_block,
)
from refusals import assert_refused


class TwoLinears(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.tanh(self.first(x)))


def squared_error(output, target):
    """A loss whose minimum torch.linalg.lstsq knows: all tokens count by their squares."""
    return (output.float() - target).square().sum(), target.square().sum()


@pytest.fixture
def task():
    """A pruned copy of a dense block, eight batches of inputs, the dense outputs, and masks."""
    dense, block = TwoLinears(), TwoLinears()
    block.load_state_dict(dense.state_dict())
    masks = {}
    for name in ("first.weight", "second.weight"):
        weight = block.get_parameter(name).requires_grad_(False)
        masks[name] = torch.rand_like(weight) > 0.5
        weight.mul_(masks[name])
    block.requires_grad_(False)
    inputs = [torch.randn(2, 5, 6) for _ in range(8)]
    with torch.no_grad():
        targets = [dense(x) for x in inputs]
    return block, inputs, targets, masks


def train(block, inputs, targets, masks, training, validation, loss=squared_error, **options):
    """Train a block that runs all tokens and picks some of its output."""
    forward = lambda batch, tokens: block(inputs[batch])[:, tokens]  # noqa: E731
    batches = BlockBatches(forward, targets.__getitem__, training, validation)
    return train_block(block, batches, masks, TrainOptions(**options), loss)


def trained(task, **options):
    """Train the block of `task` on its last six batches and validate on the first two."""
    return train(*task, range(2, 8), range(2), **({"learning_rate": 3e-2, "epochs": 30} | options))


def test_the_error_falls_and_only_survivors_move(task):
    block, _, _, masks = task
    start = {name: parameter.clone() for name, parameter in block.named_parameters()}
    result = trained(task)
    assert result.error_after < 0.5 * result.error_before
    assert set(result.weights) == set(masks)
    for name, weight in result.weights.items():
        assert bool((weight[~masks[name]] == 0).all())
        assert bool((weight[masks[name]] != start[name][masks[name]]).any())
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, start[name]), "the block itself ends as it began"
        assert not parameter.requires_grad and parameter.grad is None


def test_the_errors_are_those_of_the_returned_weights(task):
    block, inputs, targets, _ = task
    result = trained(task)

    def error():
        lost = sum(float((block(inputs[i]) - targets[i]).square().sum()) for i in range(2))
        return lost / sum(float(targets[i].square().sum()) for i in range(2))

    assert result.error_before == pytest.approx(error(), rel=1e-5)
    for name, weight in result.weights.items():
        block.get_parameter(name).copy_(weight)
    assert result.error_after == pytest.approx(error(), rel=1e-5)


def test_one_linear_reaches_the_least_squares_solution():
    """Per row, the best weights under a mask are those of a regression on the kept inputs."""
    block = nn.Linear(5, 3, bias=False).requires_grad_(False)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 0], [1, 0, 0, 1, 1]], dtype=torch.bool)
    block.weight.mul_(mask)
    x = torch.randn(1, 200, 5) @ torch.randn(5, 5)
    y = torch.randn(1, 200, 3)
    result = train(block, [x], [y], {"weight": mask}, [0], [0], learning_rate=0.05, epochs=1500)
    for row, kept in enumerate(mask):
        best = torch.linalg.lstsq(x[0][:, kept], y[0][:, row, None]).solution.flatten()
        torch.testing.assert_close(result.weights["weight"][row, kept], best, atol=2e-3, rtol=2e-3)


def test_weights_of_bfloat16_are_trained_in_float32_and_keep_their_dtype(task):
    block, _, _, _ = task
    block.to(torch.bfloat16)
    inputs = [x.to(torch.bfloat16) for x in task[1]]
    result = trained((block, inputs, task[2], task[3]), dtype=torch.bfloat16, learning_rate=1e-3)
    assert result.error_after < result.error_before
    assert all(weight.dtype == torch.float32 for weight in result.weights.values())
    assert any(not torch.equal(w, w.to(torch.bfloat16).float()) for w in result.weights.values())
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}


def test_weights_that_validate_worse_are_not_taken(task):
    block, inputs, targets, masks = task
    spoiled = [*targets[:2], *(torch.randn_like(y) * 50 for y in targets[2:])]
    result = trained((block, inputs, spoiled, masks), learning_rate=0.1)
    assert result.error_after <= result.error_before
    assert result.steps == 30 * 6


def test_a_training_that_overfits_is_interpolated():
    """With many inputs and few tokens, the end validates worse than the start, the middle not."""
    block = nn.Linear(20, 4, bias=False).requires_grad_(False)
    x, held = torch.randn(1, 24, 20), torch.randn(1, 2000, 20)
    better = block.weight + 0.1 * torch.randn(4, 20)
    targets = [x @ better.T + 1.5 * torch.randn(1, 24, 4), held @ better.T]
    masks = {"weight": torch.ones(4, 20, dtype=torch.bool)}
    result = train(block, [x, held], targets, masks, [0], [1], learning_rate=0.02, epochs=400)
    noisy = torch.linalg.lstsq(x[0], targets[0][0]).solution.T
    error = lambda weight: float(  # noqa: E731
        (held @ (weight - better).T).square().sum() / targets[1].square().sum()
    )
    assert (
        error(noisy)
        > result.error_before
        > result.error_after
        == pytest.approx(error(result.weights["weight"]), rel=1e-4)
    )
    way = noisy - block.weight
    fractions = torch.linspace(0, 1, 101)
    least = min(error(block.weight + fraction * way) for fraction in fractions)
    assert result.error_after < 1.1 * least


def test_a_step_sees_some_tokens_and_the_epochs_all_of_them(task):
    block, inputs, targets, masks = task
    seen = []

    def forward(batch, tokens):
        if torch.is_grad_enabled():
            seen.append((batch, tuple(range(5)[tokens])))
        return block(inputs[batch])[:, tokens]

    batches = BlockBatches(forward, targets.__getitem__, range(2, 8), range(2))
    options = TrainOptions(learning_rate=1e-2, epochs=4, token_stride=2)
    result = train_block(block, batches, masks, options, squared_error)
    assert result.steps == len(seen) == 4 * 6
    for batch in range(2, 8):
        turns = [tokens for each, tokens in seen if each == batch]
        assert turns[:2] == turns[2:] and sorted(turns[0] + turns[1]) == list(range(5))
    assert result.error_after < result.error_before


def test_by_default_every_token_counts_relative_to_its_target(task):
    block, inputs, targets, _ = task
    targets[0][0, 0] *= 1000
    result = trained(task, loss=relative_error)
    errors = [
        (block(x) - y).square().sum(-1) / y.square().sum(-1)
        for x, y in zip(inputs, targets, strict=True)
    ]
    assert result.error_before == pytest.approx(float(torch.stack(errors[:2]).mean()), rel=1e-5)
    assert result.error_after < result.error_before


def test_a_rate_that_is_too_high_changes_nothing(task):
    result = trained(task, learning_rate=1e30)
    assert result.error_after == result.error_before
    assert result.stopped is not None and "not finite" in result.stopped


def test_an_empty_training_is_refused(task):
    block, inputs, targets, masks = task
    assert_refused(
        ValueError, "got 0 weights, 1 training batches", train, block, None, [], {}, [0], [1]
    )
    targets[0] = targets[0] / 0
    assert_refused(ValueError, "not finite", trained, (block, inputs, targets, masks))


@pytest.mark.parametrize("tokens", [5, 300])
def test_kl_divergence_in_chunks_is_that_of_all_logits_at_once(tokens):
    head = nn.Linear(6, 40)
    output, target = torch.randn(2, tokens, 6), torch.randn(2, tokens, 6)
    with torch.enable_grad():
        whole = output.clone().requires_grad_(True)
        logp, logq = (head(x).log_softmax(dim=-1) for x in (target, whole))
        expected = nn.functional.kl_div(logq, logp.detach(), log_target=True, reduction="sum")
        expected.backward()
        parts = output.clone().requires_grad_(True)
        loss = divergence_loss(head)
        in_turn = [loss(parts, target) for _ in range(LOGIT_STRIDE if tokens > CHUNK_TOKENS else 1)]
        sum(lost for lost, _ in in_turn).backward()
    assert float(sum(lost.detach() for lost, _ in in_turn)) == pytest.approx(
        float(expected.detach()), rel=1e-4
    )
    assert sum(float(size) for _, size in in_turn) == 2 * tokens
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-5, rtol=1e-4)
    compared = slice(None) if tokens <= CHUNK_TOKENS else slice(None, None, LOGIT_STRIDE)
    logp, logq = (head(x[:, compared]).log_softmax(dim=-1) for x in (target, output))
    expected = nn.functional.kl_div(logq, logp, log_target=True, reduction="sum")
    for _ in range(2):
        lost, size = loss(output, target)
        assert float(lost) == pytest.approx(float(expected.detach()), rel=1e-4)
        assert float(size) == output[:, compared, 0].numel()


def test_the_training_does_not_depend_on_the_size_of_the_weights():
    """Weights 32 times smaller on inputs 32 times larger are the same task.

    A power of two rounds nothing.
    """
    dense, begun = torch.randn(6, 6), torch.randn(6, 6)
    mask = torch.rand(6, 6) > 0.3
    inputs = [torch.randn(1, 5, 6) for _ in range(6)]
    targets = [x @ dense.T for x in inputs]
    found = []
    for scale in (1.0, 32.0):
        block = nn.Linear(6, 6, bias=False).requires_grad_(False)
        block.weight.copy_(begun * mask / scale)
        options = {"learning_rate": 0.02, "epochs": 20}
        scaled = [x * scale for x in inputs]
        result = train(block, scaled, targets, {"weight": mask}, range(1, 6), range(1), **options)
        found.append(result.weights["weight"] * scale)
        assert result.error_after < result.error_before
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_schedules():
    """Long batches make many small steps; by logits their number does not grow with the batches."""

    def schedule(tokens=1024, width=576, by_token=True, batches=32, **options):
        return default_schedule(tokens, width, by_token, batches, **options)

    def by_logits(batches, by_token=True):
        return schedule(by_token=by_token, batches=batches, by_logits=True)

    assert schedule() == TrainOptions(5, 4, 7e-3)
    assert schedule(by_token=False) == TrainOptions(3, 1, 7e-3)
    assert schedule(256).token_stride == 1
    for tokens in (32, 512, 2048, 2**20):
        wide = schedule(tokens, 4 * 576)
        assert wide.epochs >= wide.token_stride, "the epochs see all tokens"
        assert wide.learning_rate == schedule(tokens).learning_rate / 2
    assert by_logits(8) == by_logits(32) == TrainOptions(8, 16, 2e-3)
    assert by_logits(64) == TrainOptions(4, 16, 2e-3)
    assert by_logits(200) == by_logits(1000) == TrainOptions(1, 16, 2e-3)
    assert by_logits(32, by_token=False) == TrainOptions(3, 1, 2e-3, logit_stride=4)


# --- cached ---


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
