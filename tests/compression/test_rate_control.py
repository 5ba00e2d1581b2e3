"""The rate control: it spends what was asked for, evenly, and goes on where a run was killed."""

import pytest
import torch

from method_cases import gather
from prunus.compression.rate_control import LinearRate, RateControl
from prunus.engine.loss_sensitivity import LinearSensitivity

KINDS = {"q": (64, 96), "up": (256, 96), "down": (96, 256)}


def linears(blocks: int = 5) -> list[LinearRate]:
    """Linears of several kinds whose sensitivities and inputs differ."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for block in range(blocks):
        for kind, shape in KINDS.items():
            loss_O = torch.rand(shape[0], generator=generator).add(0.1) * 10.0**-block
            deviations_Q = torch.randn(64, generator=generator).exp()
            known = LinearSensitivity(loss_O, float(1 + block), deviations_Q)
            found.append(LinearRate(f"{block}.{kind}", kind, shape, known))
    return found


def actual_bits(control: RateControl, linear: LinearRate, step: float, noise: float) -> float:
    """The bits of a linear where predictions miss some per kind and some at random."""
    missed = {"q": 0.2, "up": -0.05, "down": 0.1}[linear.kind]
    return RateControl(4.0, [linear], {}).predicted_bits(linear.name, step) + missed + noise


def spend(control: RateControl, todo: list[LinearRate]) -> list[tuple[str, float, float]]:
    generator = torch.Generator().manual_seed(1)
    done = []
    for linear in todo:
        step = control.log2_step()
        noise = 0.02 * float(torch.randn((), generator=generator))
        bits = actual_bits(control, linear, step, noise)
        control.finish(linear.name, bits, step)
        done.append((linear.name, bits, step))
    return done


@pytest.mark.parametrize("asked", [1.5, 3.0, 5.5])
def test_the_bits_add_up_although_predictions_miss(asked):
    todo = linears()
    done = spend(RateControl(asked, todo, {}), todo)
    weights = {linear.name: linear.weights for linear in todo}
    spent = sum(bits * weights[name] for name, bits, _ in done) / sum(weights.values())
    assert spent == pytest.approx(asked, rel=0.005)


def test_a_mask_leaves_finer_steps_for_what_it_keeps():
    todo = linears()
    free = RateControl(3.0, todo, {}).log2_step()
    masked = RateControl(3.0, todo, {x.name: 0.75 for x in todo}).log2_step()
    assert masked < free


def test_linears_that_matter_more_get_more_bits():
    flat = torch.ones(64)
    known = {
        name: LinearSensitivity(loss * torch.ones(64), power, flat)
        for name, loss, power in (("a", 1.0, 1.0), ("b", 16.0, 1.0), ("c", 1.0, 16.0))
    }
    control = RateControl(
        4.0, [LinearRate(name, name, (64, 64), each) for name, each in known.items()], {}
    )
    step = control.log2_step()
    bits = {name: control.predicted_bits(name, step) for name in known}
    # Sixteen times the loss or the power of the inputs repays two more bits, a little less at low
    # rates.
    assert bits["b"] - bits["a"] == pytest.approx(2.0, abs=0.1)
    assert bits["c"] == pytest.approx(bits["b"])


def test_the_step_follows_the_inputs_of_the_run():
    """The sensitivity was measured where inputs had another power."""
    known = LinearSensitivity(torch.ones(8), 4.0, torch.ones(8))
    control = RateControl(4.0, [LinearRate("a", "a", (8, 12), known)], {})
    X_TI = torch.full((5, 12), 2.0)
    same, step = control.begin("a", gather(X_TI))
    louder, _ = control.begin("a", gather(3 * X_TI))
    assert same.step == pytest.approx(2.0**step * known.unit)
    assert louder.step == pytest.approx(same.step / 3)
    assert torch.equal(same.scales_O, known.scales_O)
    code = same.code_of(torch.eye(12, dtype=torch.int8)[:8])
    assert code.lengths_KV.shape[1] == 255
    assert code.classes_I.shape == (12,)
