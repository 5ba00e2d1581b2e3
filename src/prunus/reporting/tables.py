"""The tables and facts that commands print. Every figure is from a record that `--json` writes.

Records of pruning and inspections have a method `table` of their own, which notebooks show too.
"""

from __future__ import annotations

import math
from typing import Any

from prunus.document import Facts, Table, items_of, table_of
from prunus.engine.run_record import bos_words
from prunus.recovery.recovery_record import RecoveryRecord
from prunus.rounding.compression_record import FileSize, unmatched_sentences
from prunus.words import about, counted, in_bytes

# Bytes that a process takes in a run beside what is planned: libraries that are loaded later, the
# text, and memory that is free and not returned. A run of a tiny model takes 50 MB of them.
_LOADED = 2**26
# Value of the option `bos` -> what a plan says of it, before a tokenizer is loaded.
_BOS_OF_PLAN = {
    "auto": "if the tokenizer puts it before a text",
    "yes": "yes",
    "no": "no, as in the papers",
}


def _shown(name: str, value: Any) -> str:
    """A value of a plan for people.

    >>> _shown("disk_bytes", 2 * 10**9), _shown("types", {"Q4_K": 0.9}), _shown("tokens", None)
    ('2.00 GB', '90% Q4_K', 'none')
    """
    if name.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    if isinstance(value, dict):
        return ", ".join(f"{share:.0%} {key}" for key, share in value.items()) or "none"
    return "none" if value is None else str(value)


def plan_facts(plan: dict[str, Any]) -> Facts:
    """What a run on this machine would do, as facts to print.

    Args:
        plan: What `prunus.plan` returned.
    """
    if "hidden_states" not in plan:
        # No hidden states: the command takes no windows through the blocks.
        return Facts(
            _title(plan), items_of({key.replace("_", " "): _shown(key, plan[key]) for key in plan})
        )
    peak = math.ceil((plan["peak_memory_bytes"] + _LOADED) / 1e7) / 100
    rows = {
        "blocks": plan["blocks"],
        **(_of_linears(plan) if "linears" in plan else _of_parts(plan)),
        "computation": f"{plan['dtype']} on {plan['device']}: {plan['dtype_reason']}",
        "windows per forward pass": plan["batch"],
        "BOS first in windows": _BOS_OF_PLAN[plan["bos"]],
        "hidden states": (
            f"in {plan['hidden_states']}; "
            f"{counted(plan['blocks_in_lockstep'], 'block')} in lockstep"
        ),
        "memory it needs": f"{plan['least_memory_bytes'] / 1e9:.2f} GB",
        "memory it takes": (f"at most {peak:.2f} GB, to be faster; --memory SIZE sets less"),
        "result": f"{plan['file_bytes'] / 1e9:.3f} GB",
        "disk": f"{plan['disk_bytes'] / 1e9:.2f} GB",
        **({"time": about(plan["seconds"])} if plan.get("seconds") is not None else {}),
        **(
            {"time by preset": ", ".join(f"{x} {about(y)}" for x, y in presets.items() if y)}
            if (presets := plan.get("preset_seconds"))
            else {}
        ),
        **({"weights before": plan["rounded_before"]} if plan.get("rounded_before") else {}),
        **({"of the linears": plan["lossless"]} if plan.get("lossless") else {}),
        **({"written": ", ".join(plan["written"])} if plan.get("written") else {}),
    }
    if (file := plan.get("file")) is not None:
        rows["result"], rows["parts of it"] = FileSize(**file).sentences(plan.get("bits"))
        if plan.get("unmatched"):
            rows["unmatched"] = " ".join(unmatched_sentences(plan["unmatched"]))
    if plan.get("presets"):
        sizes = (f"{name} {in_bytes(nbytes)}" for name, nbytes in plan["presets"].items())
        rows["presets of llama.cpp"] = ", ".join(sizes)
    if plan.get("decoding"):
        rows["decoding"] = f"{plan['decoding']:.2f} times as fast as Q4_K_M on processors, or more"
    if needs := plan.get("needs"):
        rows |= {
            "weights in llama.cpp": in_bytes(needs["weights"]),
            "KV cache": f"{in_bytes(needs['cache'])}, {needs['context']:,} tokens in float16",
            "compute buffers": in_bytes(needs["buffers"]),
            "ask for": f"--size {needs['weights'] // 10**5 / 10:.1f}MB",
        }
        if needs["weights"] < needs["dense"] <= needs["room"]:
            rows["ask for"] = (
                f"nothing: the model as it is takes {in_bytes(needs['dense'])} and fits too. "
                "convert_hf_to_gguf.py of llama.cpp writes it"
            )
    return Facts(_title(plan), items_of(rows))


def _title(plan: dict[str, Any]) -> str:
    """What is planned, and how the other command is."""
    command = plan.get("command", "")
    more = "; --bits, --size, --type or --fits plan a compress" if command == "prune" else ""
    return f"Plan of prunus {command}{more}"


def _of_linears(plan: dict[str, Any]) -> dict[str, Any]:
    """What a plan of prune or compress says of the linears."""
    allocation, sparsity = plan["allocation"], "the same everywhere"
    if allocation["measured"]:
        sparsity = f"{allocation['rule']}: measured when the run starts"
    if shares := allocation["shares"]:
        sparsity = f"{allocation['sparsity']:.2%} by hand"
    removed = f", of which {plan['to_remove']:,} are removed" if plan["to_remove"] else ""
    return {
        "linears": plan["linears"],
        "weights": f"{plan['weights']:,}{removed}",
        **({"sparsity": sparsity} if plan["to_remove"] else {}),
        **{
            f"  {share['rule']}": f"{share['sparsity']:.2%} of {share['weights']:,} weights"
            for share in shares
        },
        "left dense in blocks": ", ".join(plan["left_dense"]) or "nothing",
    }


def _of_parts(plan: dict[str, Any]) -> dict[str, Any]:
    """What a plan of shrink says of the parts that stay."""
    experts = plan["kept_experts"]
    of_experts = {} if experts is None else {"experts that stay": f"{experts[0]} of {experts[1]}"}
    return {"blocks that stay": plan["kept_blocks"], **of_experts}


def recovery_table(record: RecoveryRecord) -> Table:
    """The evaluations of a recovery, one row each, and what was spent and preserved below them.

    The note counts the zeros that training preserved.
    """
    rows = [
        {
            "step": entry.step,
            "tokens": entry.tokens,
            "training loss": entry.training_loss,
            "held-out perplexity": entry.perplexity,
            "seconds": entry.seconds,
            "weights": "the result" if number == record.best else "",
        }
        for number, entry in enumerate(record.evaluations)
    ]
    forms = {"step": "d", "tokens": ",d", "training loss": ".4f", "held-out perplexity": ".3f"}
    title = f"{record.recipe.mode}, {record.source}"
    totals = record.totals
    lines = []
    if record.linears:
        lines.append(
            f"zeros kept: {totals['zeros']:,} of {totals['weights']:,} weights "
            f"({totals['sparsity']:.2%}) in {len(record.linears)} pruned linears, "
            "compared weight by weight"
        )
    if totals.get("added_parameters"):
        lines.append(
            f"parameters added: {totals['added_parameters']:,} ({totals['added_share']:.3%})"
        )
    target = record.teacher if record.teacher is not None else "the text alone"
    lines.append(
        f"text: {record.inputs.text}; {bos_words(record.inputs.bos)}; learning from {target}; "
        f"computed in {record.inputs.dtype} on {record.inputs.device}"
    )
    lines.append(
        f"{totals['seconds']:.0f} s; peak memory {totals['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    if record.stopped is not None:
        lines.append(f"stopped early: {record.stopped}")
    if record.best == 0:
        lines.append(
            "no evaluation was better than the start, so the result is the start; try a smaller "
            "learning_rate"
        )
    return table_of(title, rows, forms | {"seconds": ".0f"}, "\n".join(lines))
