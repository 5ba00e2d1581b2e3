"""The walks through a block: equal bits, shared statistics, and no batch that waits for ever."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

import prunus
from prunus.engine.block import linear as linear_step
from prunus.engine.block.walks import BlockWalk, lockstep, replay, two_pass
from prunus.engine.block_memory import Memory
from prunus.engine.linear_plan import LinearPlan
from prunus.engine.run_options import RunOptions
from prunus.hardware.machine import available_memory
from prunus.methods.statistics import InputStatistics
from prunus.model.linears import Linear, find_linears
from prunus.pruning.prune import Pruning
from prunus.pruning.recipe import Recipe
from tiny import shards, tiny_checkpoint, token_ids, weights


class Experts(nn.Module):
    """Each batch chooses at most one expert, so some batches never reach some linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        for index, expert in enumerate(self.experts[:2]):
            if int(x[0, 0, 0]) == index:
                h = h + expert(h)
        return self.last(h)


def choosing_batches() -> list[torch.Tensor]:
    """Batches of which two choose expert 1, one expert 0, and one none."""
    inputs = [torch.randn(1, 5, 4) for _ in range(4)]
    for x, choice in zip(inputs, (1, 0, 1, 7), strict=True):
        x[0, 0, 0] = choice
    return inputs


def walk_through(walk, block: nn.Module, inputs: list[torch.Tensor]):
    """Run a walk; pruning removes the columns of inputs with small norms."""
    tokens: dict[str, int] = {}
    created: list[str] = []
    outputs: list[torch.Tensor | None] = [None] * len(inputs)

    def new_statistics(linear: Linear) -> InputStatistics:
        created.append(linear.name)
        return InputStatistics(linear.shape[1], "norms")

    def prune(linear: Linear, statistics: InputStatistics) -> None:
        tokens[linear.name] = statistics.tokens
        linear.assign(linear.weight_OI * (statistics.norms_I > statistics.norms_I.median()))

    with torch.no_grad():
        unreached = walk(
            BlockWalk(
                linears=find_linears(block),
                count=len(inputs),
                forward=lambda index: block(inputs[index]),
                finish=outputs.__setitem__,
                new_statistics=new_statistics,
                prune=prune,
            )
        )
    return outputs, tokens, created, [linear.name for linear in unreached]


@pytest.mark.parametrize("walk", [lockstep, replay, two_pass])
def test_linears_that_some_batches_never_reach_do_not_block_the_others(walk):
    outputs, tokens, _, unreached = walk_through(walk, Experts(), choosing_batches())
    assert all(output is not None for output in outputs)
    assert unreached == ["experts.2"]
    assert tokens == {"first": 20, "experts.0": 5, "experts.1": 10, "last": 20}


def test_lockstep_and_replay_agree_to_the_bit_where_batches_take_different_ways():
    inputs, results = choosing_batches(), []
    for walk in (lockstep, replay):
        torch.manual_seed(3)
        block = Experts()
        outputs, *_ = walk_through(walk, block, inputs)
        results.append((outputs, block.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


class CalledTwice(nn.Module):
    """A block that uses one linear in two places, as weights shared within a block do."""

    def __init__(self, *, same_input: bool = False, at_the_end: bool = False) -> None:
        super().__init__()
        self.shared, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.same_input, self.at_the_end = same_input, at_the_end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.same_input:
            return self.other(self.shared(x) * self.shared(x))
        if self.at_the_end:
            return self.shared(self.other(self.shared(x)))
        return self.other(self.shared(self.shared(x)))


@pytest.mark.parametrize("walk", [lockstep, replay])
@pytest.mark.parametrize("how", [{}, {"same_input": True}, {"at_the_end": True}])
def test_a_linear_that_is_called_twice_is_refused_by_name(walk, how):
    inputs = [torch.randn(1, 3, 4) for _ in range(2)]
    with pytest.raises(
        NotImplementedError, match=r"calls shared more than once.*`propagate` block"
    ):
        walk_through(walk, CalledTwice(**how), inputs)


def test_two_passes_measure_every_call():
    _, tokens, *_ = walk_through(two_pass, CalledTwice(), [torch.randn(1, 3, 4) for _ in range(2)])
    assert tokens == {"shared": 12, "other": 6}


class SharesForSome(nn.Module):
    """Two linears, with the same input for some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.two(x if x[0, 0, 0] > 0 else -x)


def test_two_passes_measure_linears_that_share_an_input_for_some_batches_only():
    inputs = [torch.ones(1, 3, 4), -torch.ones(1, 3, 4)]
    _, tokens, _, unreached = walk_through(two_pass, SharesForSome(), inputs)
    assert tokens == {"one": 6, "two": 6} and not unreached


def test_an_error_in_one_batch_ends_all_coroutines_and_removes_the_hooks():
    block = Experts()
    linears = find_linears(block)

    def forward(index: int) -> torch.Tensor:
        if index == 2:
            raise ZeroDivisionError("batch 2")
        return block(torch.zeros(1, 2, 4))

    with pytest.raises(ZeroDivisionError, match="batch 2"):
        lockstep(
            BlockWalk(
                linears=linears,
                count=3,
                forward=forward,
                finish=lambda i, t: None,
                new_statistics=lambda linear: InputStatistics(4, "norms"),
                prune=lambda linear, s: None,
            )
        )
    assert not any(linear.module._forward_pre_hooks for linear in linears)
    gc.collect()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_streamed_in_memory_spilled_and_replayed_runs_are_equal_to_the_byte(
    method, family, tmp_path, monkeypatch
):
    dense = tiny_checkpoint(tmp_path / "dense", family, torch.bfloat16)
    options = {"method": method, "calibration": token_ids(8, 16), "batch": 3}
    options["min_expert_tokens"] = 64
    plain = prunus.prune(dense, tmp_path / "plain", **options)
    assert {block.walk for block in plain.blocks} == {"lockstep"}

    monkeypatch.setattr(Memory, "fits_lockstep", lambda self, index: False)
    replayed = prunus.prune(dense, tmp_path / "replayed", **options)
    assert {block.walk for block in replayed.blocks} == {"replay"}
    records = [
        [{**x.model_dump(), "seconds": 0} for b in run.blocks for x in b.linears.values()]
        for run in (plain, replayed)
    ]
    assert records[0] == records[1]
    measured = plain.totals.get("expert_linears_measured_on_all", 0)
    assert (measured > 0) == (family == "mixtral")
    monkeypatch.setattr(Memory, "spills", property(lambda self: True))
    monkeypatch.setattr(Memory, "hidden_states_stay", property(lambda self: False))
    prunus.prune(dense, tmp_path / "spilled_replayed", **options)
    monkeypatch.setattr(Memory, "fits_lockstep", lambda self, index: True)
    prunus.prune(dense, tmp_path / "spilled", **options)

    expected = shards(tmp_path / "plain")
    assert [*expected] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for other in ("replayed", "spilled_replayed", "spilled"):
        assert shards(tmp_path / other) == expected


def test_the_memory_budget_decides_between_lockstep_replay_and_a_file(dense, tmp_path, monkeypatch):
    ids = token_ids(64, 64)
    recipe = Recipe(calibration="token ids", samples=64, seqlen=64, batch=1)

    def plan(memory: int | None) -> LinearPlan:
        return Pruning(dense, None, recipe, RunOptions(memory=memory, calibration_data=ids)).plan()

    free = available_memory()
    # Free and resident memory change during the test, so they are fixed here.
    monkeypatch.setattr("prunus.engine.run_facts.available_memory", lambda: free)
    monkeypatch.setattr("prunus.engine.run_facts.process_memory", lambda: 2**28)
    roomy = plan(None)
    assert roomy.memory.budget == free - max(free // 10, 10**9)  # the rest is for others
    assert (roomy.walks[0], roomy.memory.spills) == ("lockstep", False)
    memory, resident = roomy.memory.blocks[0], 0
    replayed = memory.total(hidden=True, paused=False)
    in_lockstep = memory.total(hidden=True, paused=True)
    assert memory.minimum < replayed < in_lockstep
    for budget, walk, spills in (
        (in_lockstep, "lockstep", False),
        (replayed, "replay", False),
        (memory.minimum, "replay", True),
    ):
        roomy = replace(roomy, memory=replace(roomy.memory, budget=budget + resident))
        assert (roomy.walks[0], roomy.memory.spills) == (walk, spills)
    with pytest.raises(ValueError, match=r"memory budget is .* Raise `memory`, or lower `batch`"):
        plan(1000)


def test_the_memory_budget_limits_a_device_as_it_limits_the_host(dense, tmp_path, monkeypatch):
    ids = token_ids(8, 16)
    recipe = Recipe(calibration="token ids", samples=8, seqlen=16, dtype="float32")
    monkeypatch.setattr("prunus.engine.run_facts.choose_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**40, 2**40))
    free = int(0.9 * 2**40)
    for memory, budget in ((None, free), (2**31, 2**31), (2**41, free)):
        options = RunOptions(device="cuda", memory=memory, calibration_data=ids)
        assert Pruning(dense, None, recipe, options).plan().memory.budget == budget


# --- the output error of methods that need no Gram matrix ---


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_the_output_error_of_any_method_can_be_measured_and_changes_no_weight(
    method, family, tmp_path
):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    ids = token_ids(16, 32)
    options = {"method": method, "calibration": ids}
    plain = prunus.prune(dense, tmp_path / "plain", **options)
    measured = prunus.prune(dense, tmp_path / "out", measure_error=True, **options)
    assert shards(tmp_path / "out") == shards(tmp_path / "plain")
    assert plain.summary()["mean_relative_output_error"] is None
    assert measured.summary()["mean_removed_energy"] is None
    linears = [linear for block in measured.blocks for linear in block.linears.values()]
    assert all(0 < linear.relative_output_error < 1 for linear in linears)
    # The first linear sees what the dense model gives it.
    before, after = weights(dense), weights(tmp_path / "out")
    norm = "model.layers.0.input_layernorm.weight"
    X = torch.nn.functional.rms_norm(
        before["model.embed_tokens.weight"][ids.flatten()], (32,), before[norm], 1e-6
    ).double()
    name = "model.layers.0.self_attn.q_proj.weight"
    outputs, changed = (X @ of[name].double().T for of in (before, after))
    expected = float((outputs - changed).square().sum() / outputs.square().sum())
    error = measured.blocks[0].linears["self_attn.q_proj"].relative_output_error
    assert error == pytest.approx(expected, rel=1e-3)


def test_the_output_error_of_a_wide_linear_comes_from_half_of_its_gram_matrix(monkeypatch):
    X_TI, weight_OI = torch.randn(40, 20), torch.randn(6, 20)
    rounded_OI, inputs = weight_OI.round(), InputStatistics(20, "gram")
    inputs.add(X_TI)
    monkeypatch.setattr(linear_step, "_SYMMETRIC_FROM", 20)
    error, energy = linear_step._output_error(weight_OI, rounded_OI, inputs, low_precision=False)
    lost, total = (X_TI @ x.T for x in (weight_OI - rounded_OI, weight_OI))
    assert error == pytest.approx(float(lost.square().sum() / total.square().sum()), rel=1e-4)
    assert energy is None


def test_a_run_with_the_output_error_is_planned_with_its_memory_and_not_mixed_with_others(
    dense, tmp_path
):
    options = {"method": "wanda", "calibration": token_ids(8, 16)}

    def least_memory(method: str, measure_error: bool) -> int:
        recipe = Recipe(method=method, calibration="token ids", samples=8, seqlen=16)
        how = RunOptions(measure_error=measure_error, calibration_data=token_ids(8, 16))
        return Pruning(dense, None, recipe, how).plan().memory.least_bytes

    with_norms, with_gram = (least_memory("wanda", measured) for measured in (False, True))
    sparsegpt = least_memory("sparsegpt", False)
    assert with_norms < with_gram == sparsegpt
    prunus.prune(dense, tmp_path / "out", **options)
    with pytest.raises(FileExistsError, match=r"another measure_error \(False, now True\)"):
        prunus.prune(dense, tmp_path / "out", measure_error=True, **options)
    with pytest.raises(ValueError, match="shrink has no option `measure_error`"):
        prunus.shrink(dense, tmp_path / "small", measure_error=True, blocks=1)
