"""Mixtures of experts: the same arithmetic, the checkpoint's names, and experts with few tokens."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus
from command_line import call
from prunus.model.experts import Experts, find_routers
from prunus.model.open_folder import OpenFolder
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.model.stream import Stream
from prunus.pruning.manifest import Manifest
from reference import prune_rows
from stopping import assert_resumes
from structure_cases import loaded
from tiny import EXPERT_FAMILIES, ids_file, stored, tiny_checkpoint, tiny_model, token_ids, weights

CPU = torch.device("cpu")


def logits_by_blocks(folder: Path, ids: Tensor) -> Tensor:
    source = CheckpointSource(OpenFolder(folder))
    skeleton = Skeleton(source.config, torch.float32)
    source.bind(skeleton)
    stream = Stream(skeleton, source, CPU)
    with torch.no_grad():
        stream.embed([ids], None)
        for index in range(len(skeleton)):
            stream.propagate(index, source.block(index))
        with skeleton.outside_blocks(source.read_outside, CPU, with_head=True):
            return skeleton.logits(ids, stream.states.get(0))


@pytest.mark.parametrize("family", sorted(EXPERT_FAMILIES))
def test_taken_apart_experts_compute_what_the_fused_ones_do(family, tmp_path):
    tiny_checkpoint(tmp_path, family)
    ids, model = token_ids(), loaded(tmp_path)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        fused = next(m for m in model.modules() if hasattr(m, "_apply_gate"))
        fused.down_proj[1].mul_(2)
        other = model(ids, use_cache=False).logits
    close = 1e-6 * float(expected.abs().max())
    assert float((logits_by_blocks(tmp_path, ids) - expected).abs().max()) <= close
    assert float((other - expected).abs().max()) > 1000 * close, "one expert decides nothing here"


@pytest.mark.parametrize("family", sorted(EXPERT_FAMILIES))
def test_pruned_experts_keep_their_names_and_load_fused(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    ids = token_ids()
    report = prunus.prune(
        tmp_path / "dense", tmp_path / "pruned", calibration=ids, batch=2, min_expert_tokens=20
    )
    before, after = stored(tmp_path / "dense"), stored(tmp_path / "pruned")
    assert {k: (x.shape, x.dtype) for k, x in before.items()} == {
        k: (x.shape, x.dtype) for k, x in after.items()
    }
    routers = [
        key
        for key in before
        if re.search(r"(router|\.gate|\.wg|shared_expert_gate)\.(layer\.)?(weight|bias)$", key)
    ]
    assert routers
    assert all(torch.equal(before[key], after[key]) for key in routers)

    for name, tensor in weights(tmp_path / "pruned").items():
        if name.endswith((".gate_up_proj", ".down_proj", ".up_proj")) and tensor.dim() == 3:
            per_expert = (tensor == 0).flatten(1).float().mean(dim=1)
            assert per_expert.tolist() == pytest.approx([0.5] * len(per_expert)), name
    shared = [
        f"{block.name}.{name}"
        for block in report.blocks
        for name in block.linears
        if "shared" in name
    ]
    assert bool(shared) == any("shared" in key and "gate.weight" not in key for key in before)
    assert report.totals["sparsity"] == pytest.approx(0.5)
    records = [
        x for block in report.blocks for name, x in block.linears.items() if ".experts." in name
    ]
    assert report.totals["expert_linears"] == len(records) > 0
    for record in records:
        assert ("measured_on" in record.notes) == (record.notes["routed_tokens"] < 20)
        assert record.tokens == (
            96 if "measured_on" in record.notes else record.notes["routed_tokens"]
        )

    prunus.prune(model, calibration=ids, batch=2, min_expert_tokens=20)
    in_place = model.state_dict()
    assert all(torch.equal(x, in_place[name]) for name, x in weights(tmp_path / "pruned").items())


def naive_experts(
    model: nn.Module, ids: Tensor, minimum: int, views: Callable[[Any, int], tuple[Tensor, ...]]
) -> None:
    """Prune a fused model in place.

    The whole model runs once for every group of linears with a common input.
    """

    def inputs(module: nn.Module) -> list[Any]:
        seen: list[Any] = []
        hook = module.register_forward_pre_hook(
            lambda _m, args: seen.append(tuple(x.clone() for x in args))
        )
        for part in ids.split(2):
            model(input_ids=part, use_cache=False)
        hook.remove()
        return seen

    def tokens(module: nn.Module) -> Tensor:
        return torch.cat([args[0].reshape(-1, args[0].shape[-1]) for args in inputs(module)])

    def prune_mlp(mlp: Any) -> None:
        X_TI = tokens(mlp.gate_proj)
        prune_rows(mlp.gate_proj.weight, X_TI)
        prune_rows(mlp.up_proj.weight, X_TI)
        prune_rows(mlp.down_proj.weight, tokens(mlp.down_proj))

    for layer in model.model.layers:
        attention = [
            x
            for name, x in layer.self_attn.named_children()
            if isinstance(x, nn.Linear) and name != "o_proj"
        ]
        for linear in attention:
            prune_rows(linear.weight, tokens(linear))
        prune_rows(layer.self_attn.o_proj.weight, tokens(layer.self_attn.o_proj))
        if not hasattr(layer.mlp, "experts"):
            prune_mlp(layer.mlp)
            continue
        for name in ("shared_expert", "shared_experts"):
            if hasattr(layer.mlp, name):
                prune_mlp(getattr(layer.mlp, name))
        calls = inputs(layer.mlp.experts)
        for expert in range(layer.mlp.experts.num_experts):
            routed = torch.cat([x[(chosen == expert).any(dim=-1)] for x, chosen, _ in calls])
            X_TI = routed if len(routed) >= minimum else torch.cat([x for x, _, _ in calls])
            if not len(X_TI):  # All inputs count the same.
                for weight in views(layer.mlp.experts, expert)[:3]:
                    prune_rows(weight, torch.ones(1, weight.shape[1]))
                continue
            gate, up, down, gate_bias, up_bias = views(layer.mlp.experts, expert)
            prune_rows(gate, X_TI)
            prune_rows(up, X_TI)
            g, u = X_TI @ gate.T + gate_bias, X_TI @ up.T + up_bias
            if hasattr(layer.mlp.experts, "limit"):
                limit, alpha = layer.mlp.experts.limit, layer.mlp.experts.alpha
                g, u = g.clamp(max=limit), u.clamp(-limit, limit)
                inner = (u + 1) * g * torch.sigmoid(alpha * g)
            else:
                inner = nn.functional.silu(g) * u
            prune_rows(down, inner)


def halves(experts: Any, e: int) -> tuple[Tensor, ...]:
    width = experts.gate_up_proj.shape[1] // 2
    nothing = torch.zeros(width)
    both = experts.gate_up_proj[e]
    return both[:width], both[width:], experts.down_proj[e], nothing, nothing


def alternating(experts: Any, e: int) -> tuple[Tensor, ...]:
    both, bias = experts.gate_up_proj[e].T, experts.gate_up_proj_bias[e]
    return both[::2], both[1::2], experts.down_proj[e].T, bias[::2], bias[1::2]


@pytest.mark.parametrize("rule", [False, True])
@pytest.mark.parametrize(
    ("family", "views", "few"),
    [
        ("mixtral", halves, 48),
        ("qwen2_moe", halves, 24),
        ("deepseek_v3", halves, 24),
        ("gpt_oss", alternating, 48),
    ],
)
def test_experts_are_pruned_as_by_a_naive_reference(family, views, few, rule, tmp_path):
    minimum = few if rule else 0
    tiny_checkpoint(tmp_path / "dense", family)
    ids = token_ids()
    report = prunus.prune(
        tmp_path / "dense", tmp_path / "pruned", calibration=ids, batch=2, min_expert_tokens=minimum
    )
    model = loaded(tmp_path / "dense")
    with torch.no_grad():
        naive_experts(model, ids, minimum, views)
    decided = report.totals.get("expert_linears_measured_on_all", 0)
    assert (0 < decided < report.totals["expert_linears"]) if rule else not decided
    expected = model.state_dict()
    differ = sum(int((x != expected[n]).sum()) for n, x in weights(tmp_path / "pruned").items())
    # Two orders of products round differently: a mask may change where two scores are almost equal.
    assert differ <= 1e-3 * sum(x.numel() for x in expected.values())


def test_two_passes_count_the_unpruned_block_and_see_no_token_twice(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "mixtral")
    ids = token_ids()
    report = prunus.prune(
        dense,
        tmp_path / "pruned",
        calibration=ids,
        propagate="block",
        dtype="float32",
        min_expert_tokens=48,
    )
    model, chosen = loaded(dense), []
    experts = model.model.layers[0].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _m, args: chosen.append(args[1]))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    counts = torch.bincount(chosen[0].flatten(), minlength=4).tolist()
    for name, record in report.blocks[0].linears.items():
        if ".experts." in name:
            routed = counts[int(name.split(".")[2])]
            assert record.notes["routed_tokens"] == routed
            assert record.tokens == (routed if routed >= 48 else 96)
    assert any(count < 48 for count in counts)


def never_chosen(folder: Path, expert: int) -> Path:
    """A DeepSeek-V3 in which the router's correction keeps every token away from one expert."""
    model = tiny_model("deepseek_v3")
    model.model.layers[1].mlp.gate.e_score_correction_bias[expert] = -1e4
    model.save_pretrained(folder)
    return folder


def test_an_expert_that_no_token_chooses(tmp_path):
    dense = never_chosen(tmp_path / "dense", 3)
    by_rule = prunus.prune(dense, tmp_path / "rule", calibration=token_ids(), min_expert_tokens=20)
    without = prunus.prune(
        dense, tmp_path / "without", calibration=token_ids(), min_expert_tokens=0
    )
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        record = by_rule.blocks[1].linears[f"mlp.experts.3.{leaf}"]
        assert (record.tokens, record.notes["routed_tokens"]) == (96, 0)
        record = without.blocks[1].linears[f"mlp.experts.3.{leaf}"]
        assert record.tokens == 0
        assert "unreached" in record.notes
    assert without.totals["sparsity"] == by_rule.totals["sparsity"] == pytest.approx(0.5)


def test_measuring_experts_on_all_tokens_does_not_change_later_blocks(tmp_path):
    """A resumed run ends in the same bytes, though it measures nothing in finished blocks."""
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3_moe")
    options: dict[str, Any] = {"calibration": token_ids(), "batch": 2, "min_expert_tokens": 30}
    assert_resumes(lambda out, **more: prunus.prune(dense, out, **options, **more), tmp_path)
    totals = Manifest.load(tmp_path / "whole").totals
    assert totals["expert_linears_measured_on_all"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"method": "alps", "dense_weight": 0.25},
        {"method": "sparsegpt", "pattern": "2:4"},
        {"method": "wanda", "weight_update": "least-squares"},
        {
            "method": "wanda",
            "reconstruct": "all",
            "reconstruct_epochs": 1,
            "samples": 3,
            "batch": 1,
        },
        {"method": "magnitude"},
        {"allocation": "fisher"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_every_kind_of_run_takes_experts_as_linears(options, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "gpt_oss" if "pattern" in options else "qwen2_moe")
    report = prunus.prune(
        dense,
        tmp_path / "pruned",
        calibration=token_ids(options.get("samples", 6)),
        min_expert_tokens=20,
        **options,
    )
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=0.02)
    with torch.no_grad():
        assert bool(loaded(tmp_path / "pruned")(token_ids()).logits.isfinite().all())


def test_an_expert_sees_its_tokens_in_the_order_of_the_text():
    """If all tokens choose an expert, row t is the same token in the dense and the pruned model."""
    model = tiny_model("mixtral", num_local_experts=2)
    skeleton = Skeleton(model.config, torch.float32)
    values = {
        n: torch.randn_like(p, device="cpu") for n, p in skeleton.blocks[0].named_parameters()
    }
    block = skeleton.fill(0, values, CPU)
    experts = next(m for m in block.modules() if isinstance(m, Experts))
    seen: list[Tensor] = []
    hook = experts.get_submodule("1.w1").register_forward_pre_hook(
        lambda _m, args: seen.append(args[0])
    )
    X_TH, chosen = torch.randn(5, 32), torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1], [1, 0]])
    with torch.no_grad():
        experts(X_TH, chosen, torch.rand(5, 2))
    hook.remove()
    assert torch.equal(seen[0], X_TH)


def test_the_commands_count_experts_and_those_with_too_few_tokens(tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", "mixtral")
    ids = ids_file(tmp_path / "ids.safetensors")
    options = ["--calibration", ids, "--samples", 6, "--seqlen", 16]
    (tmp_path / "recipe.toml").write_text("min_expert_tokens = 48\n")
    recipe = ["--recipe", tmp_path / "recipe.toml"]
    text = call("prune", dense, tmp_path / "pruned", *options, *recipe).stdout
    assert "mlp.experts.*.w1" in text
    found = prunus.inspect(tmp_path / "pruned").linears
    assert sum(".experts." in linear.name for linear in found) == 2 * 4 * 3
    said = " ".join(text.split())
    assert re.search(r"experts: [1-9]\d* of 24 linears measured on all tokens", said)


def test_linears_beside_experts_that_pass_hidden_states_on_are_no_routers():
    """The inner widths of attention and shared expert happen to be 1, or the number of experts."""

    def of(**children: nn.Module) -> nn.Module:
        module = nn.Module()
        for name, child in children.items():
            module.add_module(name, child)
        return module

    linear = nn.Linear
    block = of(
        mlp=of(
            attention=of(q=linear(8, 8), k=linear(8, 4), v=linear(8, 1), o=linear(8, 8)),
            shared=of(up=linear(8, 4), down=linear(4, 8)),
            shared_gate=linear(8, 1),
            gate=of(wg=linear(8, 4)),
            deep=nn.Sequential(linear(8, 6), nn.Tanh(), linear(6, 4)),
            latent=linear(8, 6),
            experts=nn.ModuleList(of(up=linear(8, 4), down=linear(4, 8)) for _ in range(4)),
        ),
        head=linear(8, 4),
    )
    assert find_routers(block) == {"mlp.shared_gate", "mlp.gate.wg", "mlp.deep.2"}
