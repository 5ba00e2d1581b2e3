"""Uses an installed prunus as a stranger would. `make wheel-test` runs it in a fresh environment.

    python use_installed.py FOLDER

Every file it needs must have come with the wheel: the kernels, and the assets of the report.
"""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import prunus


def command(*arguments: str | Path) -> str:
    """What a command of prunus prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "prunus", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    folder = Path(sys.argv[1])
    installed = Path(prunus.__file__).resolve()
    assert "site-packages" in installed.parts, f"this is not an installed package: {installed}"
    assert (installed.parent / "py.typed").exists()
    assert list(installed.parent.rglob("_kernels*.so")), "the kernels were not compiled"
    print(command("--version"))

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "dense")
    ids = torch.randint(0, 128, (4, 32))
    manifest = prunus.prune(folder / "dense", folder / "pruned", calibration=ids)
    assert abs(manifest.totals["sparsity"] - 0.5) < 0.01
    pruned = AutoModelForCausalLM.from_pretrained(folder / "pruned")
    assert pruned.generate(ids[:1], max_new_tokens=4, do_sample=False).shape == (1, 36)
    options = {"format": "compressed-tensors", "calibration": ids}
    rounded = prunus.compress(folder / "dense", folder / "small", 4, **options)
    assert rounded.totals["bits"] > 4  # with its scales
    command("report", folder / "pruned", "--output", folder / "page.html")
    assert "</html>" in (folder / "page.html").read_text(encoding="utf-8")
    print(f"prunus works as it is installed in {installed.parent}")


if __name__ == "__main__":
    main()
