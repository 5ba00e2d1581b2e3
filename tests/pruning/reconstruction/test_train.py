"""Block matching on small modules whose best weights are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus.pruning.reconstruction.kl_loss import LOGIT_STRIDE, TOKENS, kl_divergence
from prunus.pruning.reconstruction.schedule import ReconstructionSchedule, default_schedule
from prunus.pruning.reconstruction.train import TrainOptions, _on_the_way, _sizes, train_block


class TwoLinears(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.tanh(self.first(x)))


@pytest.fixture
def task():
    """A dense block's outputs, a pruned copy of it, and its supports; eight batches of inputs."""
    dense, block = TwoLinears(), TwoLinears()
    block.load_state_dict(dense.state_dict())
    supports = {}
    for name in ("first.weight", "second.weight"):
        weight = block.get_parameter(name).requires_grad_(False)
        supports[name] = torch.rand_like(weight) > 0.5
        weight.mul_(supports[name])
    block.requires_grad_(False)
    inputs = [torch.randn(2, 5, 6) for _ in range(8)]
    with torch.no_grad():
        targets = [dense(x) for x in inputs]
    return block, inputs, targets, supports


def matched(task, **options):
    block, inputs, targets, supports = task
    chosen = TrainOptions(**({"learning_rate": 1e-2, "passes": 30} | options))
    forward = lambda batch, tokens: block(inputs[batch])[:, tokens]  # noqa: E731
    return train_block(block, forward, targets.__getitem__, range(2, 8), range(2), supports, chosen)


def test_the_error_falls_and_only_survivors_move(task):
    block, _, _, supports = task
    begin = {name: parameter.clone() for name, parameter in block.named_parameters()}
    match = matched(task)
    assert match.error_after < 0.5 * match.error_before
    assert set(match.weights) == set(supports)
    for name, weight in match.weights.items():
        assert bool((weight[~supports[name]] == 0).all())
        assert bool((weight[supports[name]] != begin[name][supports[name]]).any())
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, begin[name]), "the block itself ends as it began"
        assert not parameter.requires_grad and parameter.grad is None


def test_the_errors_are_those_of_the_returned_weights(task):
    block, inputs, targets, _ = task
    match = matched(task)

    def error():
        lost = sum(float((block(inputs[i]) - targets[i]).square().sum()) for i in range(2))
        return lost / sum(float(targets[i].square().sum()) for i in range(2))

    assert match.error_before == pytest.approx(error(), rel=1e-5)
    for name, weight in match.weights.items():
        block.get_parameter(name).copy_(weight)
    assert match.error_after == pytest.approx(error(), rel=1e-5)


def test_one_linear_reaches_the_least_squares_solution():
    """Per row, the best weights on a support are those of a regression on the inputs that are left."""
    block = nn.Linear(5, 3, bias=False).requires_grad_(False)
    support = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 0], [1, 0, 0, 1, 1]], dtype=torch.bool)
    block.weight.mul_(support)
    x = torch.randn(1, 200, 5) @ torch.randn(5, 5)
    y = torch.randn(1, 200, 3)
    match = train_block(
        block,
        lambda batch, tokens: block(x),
        lambda batch: y,
        [0],
        [0],
        {"weight": support},
        TrainOptions(learning_rate=0.05, passes=1500),
    )
    for row, kept in enumerate(support):
        best = torch.linalg.lstsq(x[0][:, kept], y[0][:, row, None]).solution.flatten()
        torch.testing.assert_close(match.weights["weight"][row, kept], best, atol=2e-3, rtol=2e-3)


def test_weights_of_bfloat16_are_trained_in_float32_and_keep_their_dtype(task):
    block, _, _, _ = task
    block.to(torch.bfloat16)
    inputs = [x.to(torch.bfloat16) for x in task[1]]
    match = matched((block, inputs, task[2], task[3]), dtype=torch.bfloat16, learning_rate=1e-3)
    assert match.error_after < match.error_before
    assert all(weight.dtype == torch.float32 for weight in match.weights.values())
    assert any(not torch.equal(w, w.to(torch.bfloat16).float()) for w in match.weights.values())
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}


def test_what_does_worse_on_held_out_batches_is_not_taken(task):
    block, inputs, targets, supports = task
    spoiled = [*targets[:2], *(torch.randn_like(y) * 50 for y in targets[2:])]
    match = matched((block, inputs, spoiled, supports), learning_rate=0.1)
    assert match.error_after <= match.error_before
    assert match.steps == 30 * 6


def test_training_that_went_too_far_is_taken_part_of_the_way():
    """Many inputs fit few tokens' noise: held out, the end is worse than the beginning, the middle better."""
    block = nn.Linear(20, 4, bias=False).requires_grad_(False)
    x, held = torch.randn(1, 24, 20), torch.randn(1, 2000, 20)
    better = block.weight + 0.1 * torch.randn(4, 20)
    targets = [x @ better.T + 1.5 * torch.randn(1, 24, 4), held @ better.T]
    supports = {"weight": torch.ones(4, 20, dtype=torch.bool)}
    options = TrainOptions(learning_rate=0.02, passes=400)
    inputs = [x, held]
    match = train_block(
        block,
        lambda batch, _: block(inputs[batch]),
        targets.__getitem__,
        [0],
        [1],
        supports,
        options,
    )
    noisy = torch.linalg.lstsq(x[0], targets[0][0]).solution.T
    error = lambda weight: float(  # noqa: E731
        (held @ (weight - better).T).square().sum() / targets[1].square().sum()
    )
    assert (
        error(noisy)
        > match.error_before
        > match.error_after
        == pytest.approx(error(match.weights["weight"]), rel=1e-4)
    )
    way = noisy - block.weight
    shares = torch.linspace(0, 1, 101)
    least = min(error(block.weight + share * way) for share in shares)
    assert match.error_after < 1.1 * least


@pytest.mark.parametrize("best", [0.125, 0.5, 0.875])
def test_the_way_is_searched_by_a_parabola(best):
    error_at = lambda share: 3.0 + 2.0 * (share - best) ** 2  # noqa: E731
    tried = dict(_on_the_way(error_at(0.0), error_at(1.0), error_at))
    assert min(tried, key=tried.__getitem__) == pytest.approx(best)
    assert all(tried[share] == error_at(share) for share in tried)


@pytest.mark.parametrize("after", [float("nan"), float("inf"), 0.5])
def test_where_no_parabola_fits_the_middle_alone_is_tried(after):
    assert list(_on_the_way(1.0, after, lambda share: 0.9)) == [(0.5, 0.9)]


def test_a_step_looks_at_some_tokens_and_passes_at_all_of_them(task):
    block, inputs, targets, supports = task
    seen = []

    def forward(batch, tokens):
        if torch.is_grad_enabled():
            seen.append((batch, tuple(range(5)[tokens])))
        return block(inputs[batch])[:, tokens]

    options = TrainOptions(learning_rate=1e-2, passes=4, token_stride=2)
    match = train_block(
        block, forward, targets.__getitem__, range(2, 8), range(2), supports, options
    )
    assert match.steps == len(seen) == 4 * 6
    for batch in range(2, 8):
        turns = [tokens for each, tokens in seen if each == batch]
        assert turns[:2] == turns[2:] and sorted(turns[0] + turns[1]) == list(range(5))
    assert match.error_after < match.error_before


def test_time_that_is_up_ends_the_training(task):
    match = matched(task, passes=10**9, seconds=0.2)
    assert match.stopped == "out of time"
    assert match.error_after < match.error_before


def test_a_rate_that_is_too_high_is_noticed(task):
    match = matched(task, learning_rate=1e30)
    assert match.error_after == match.error_before
    assert match.stopped is not None and "not finite" in match.stopped


def test_nothing_to_match_is_refused(task):
    block, inputs, targets, supports = task
    with pytest.raises(ValueError, match="needs pruned linears"):
        train_block(block, None, None, [0], [1], {}, TrainOptions())
    targets[0] = targets[0] / 0
    with pytest.raises(ValueError, match="not finite"):
        matched((block, inputs, targets, supports))


@pytest.mark.parametrize("tokens", [5, 300])
def test_the_divergence_and_its_gradients_in_turn_are_those_of_all_logits_at_once(tokens):
    head = nn.Linear(6, 40)
    output, target = torch.randn(2, tokens, 6), torch.randn(2, tokens, 6)
    with torch.enable_grad():
        whole = output.clone().requires_grad_(True)
        logp, logq = (head(x).log_softmax(dim=-1) for x in (target, whole))
        expected = nn.functional.kl_div(logq, logp.detach(), log_target=True, reduction="sum")
        expected.backward()
        parts = output.clone().requires_grad_(True)
        compare = kl_divergence(head)
        in_turn = [compare(parts, target) for _ in range(LOGIT_STRIDE if tokens > TOKENS else 1)]
        sum(lost for lost, _ in in_turn).backward()
    assert float(sum(lost.detach() for lost, _ in in_turn)) == pytest.approx(
        float(expected.detach()), rel=1e-4
    )
    assert sum(float(size) for _, size in in_turn) == 2 * tokens
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-5, rtol=1e-4)
    judged = slice(None) if tokens <= TOKENS else slice(None, None, LOGIT_STRIDE)
    logp, logq = (head(x[:, judged]).log_softmax(dim=-1) for x in (target, output))
    expected = nn.functional.kl_div(logq, logp, log_target=True, reduction="sum")
    for _ in range(2):
        lost, size = compare(output, target)
        assert float(lost) == pytest.approx(float(expected.detach()), rel=1e-4)
        assert float(size) == output[:, judged, 0].numel()


def test_a_block_can_be_matched_by_what_a_head_makes_of_its_outputs(task):
    block, inputs, targets, supports = task
    head = nn.Linear(6, 40).requires_grad_(False)
    options = TrainOptions(learning_rate=1e-2, passes=30)
    match = train_block(
        block,
        lambda batch, tokens: block(inputs[batch]),
        targets.__getitem__,
        range(2, 8),
        range(2),
        supports,
        options,
        kl_divergence(head),
    )
    assert match.error_after < 0.5 * match.error_before


@pytest.mark.parametrize("relative", [True, False])
def test_a_relative_rate_knows_nothing_of_the_size_of_the_weights(relative):
    """Weights 32 times smaller on inputs 32 times larger are the same task; a power of two rounds nothing."""
    dense, begun = torch.randn(6, 6), torch.randn(6, 6)
    support = torch.rand(6, 6) > 0.3
    inputs = [torch.randn(1, 5, 6) for _ in range(6)]
    targets = [x @ dense.T for x in inputs]
    found = []
    for scale in (1.0, 32.0):
        block = nn.Linear(6, 6, bias=False).requires_grad_(False)
        block.weight.copy_(begun * support / scale)
        match = train_block(
            block,
            lambda batch, _, block=block, scale=scale: block(inputs[batch] * scale),
            targets.__getitem__,
            range(1, 6),
            range(1),
            {"weight": support},
            TrainOptions(learning_rate=0.02, relative=relative, passes=20),
        )
        found.append(match.weights["weight"] * scale)
        assert match.error_after < match.error_before or not relative
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5) == relative


def test_a_bias_is_trained_at_its_linears_rate():
    weights = {
        "a.weight": torch.tensor([[3.0, 100.0], [4.0, 0.0]]),
        "a.bias": torch.zeros(2),
        "norm": torch.full((4,), 2.0),
    }
    supports = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    supports["a.weight"] = torch.tensor([[True, False], [True, False]])
    sizes = _sizes(weights, supports)
    assert sizes["a.weight"] == sizes["a.bias"] == pytest.approx(12.5**0.5)
    assert sizes["norm"] == pytest.approx(2.0)


def test_long_batches_are_taken_in_many_small_steps():
    assert default_schedule(1024, 576, by_token=True, batches=32) == ReconstructionSchedule(
        7, 4, 7e-3
    )
    assert default_schedule(1024, 576, by_token=False, batches=32) == ReconstructionSchedule(
        3, 1, 7e-3
    )
    assert default_schedule(256, 576, by_token=True, batches=32).token_stride == 1
    for tokens in (32, 512, 2048, 2**20):
        own = default_schedule(tokens, 4 * 576, by_token=True, batches=32)
        assert own.passes >= own.token_stride, "passes see all tokens"
        assert (
            own.learning_rate
            == default_schedule(tokens, 576, by_token=True, batches=32).learning_rate / 2
        )


def test_by_logits_so_many_steps_are_enough_however_many_batches_there_are():
    by_logits = lambda batches, by_token=True: default_schedule(  # noqa: E731
        1024, 576, by_token, batches, by_logits=True
    )
    assert by_logits(32) == ReconstructionSchedule(8, 16, 2e-3)
    assert by_logits(64) == ReconstructionSchedule(4, 16, 2e-3)
    assert by_logits(8) == ReconstructionSchedule(8, 16, 2e-3), (
        "a pass is a sixteenth of the tokens, half of them are enough"
    )
    assert by_logits(200) == by_logits(1000) == ReconstructionSchedule(1, 16, 2e-3)
    assert by_logits(32, by_token=False) == ReconstructionSchedule(3, 1, 2e-3, logit_stride=4)


@pytest.mark.parametrize("tokens", [64, 256, 2048, 8192])
def test_by_logits_a_quarter_of_the_tokens_is_looked_at_whoever_chooses_them(tokens):
    as_outputs, by_token, whole = (
        default_schedule(tokens, 576, by_token, 32, by_logits)
        for by_token, by_logits in ((True, False), (True, True), (False, True))
    )
    assert by_token.logit_stride == 1, "what was run for a step is looked at"
    assert by_token.token_stride in (4 * as_outputs.token_stride, max(1, tokens // 64))
    assert by_token.token_stride == min(28, max(1, tokens // 64))
    assert (whole.token_stride, whole.logit_stride) == (1, 4)


def test_tokens_that_were_chosen_already_are_not_chosen_from_again():
    head = nn.Linear(6, 40).requires_grad_(False)
    output, target = torch.randn(2, 2, TOKENS + 5, 6)
    with torch.enable_grad():
        sizes = [
            kl_divergence(head, stride=stride)(output.clone().requires_grad_(True), target)[1]
            for stride in (1, 4)
        ]
    assert sizes == [2 * (TOKENS + 5), 2 * -(-(TOKENS + 5) // 4)]


def test_what_rounding_moves_does_not_move_the_share():
    shares = [
        [
            share
            for share, _ in _on_the_way(
                1.0 + noise, 1.2, lambda share: 1.0 + 0.2 * share - 0.5 * share * (1 - share)
            )
        ]
        for noise in (-1e-3, 0.0, 1e-3)
    ]
    assert shares[0] == shares[1] == shares[2] == [0.5, 0.25]
