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
from prunus import pack
from prunus.runtime import describe
from prunus.runtime.kernels import library


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
    assert library.load() is not None, library.why_not()
    print(command("doctor"))
    assert describe()["needs_import"] is None

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
    pack(folder / "pruned", folder / "packed")
    packed = AutoModelForCausalLM.from_pretrained(folder / "packed")
    assert packed.generate(ids[:1], max_new_tokens=4, do_sample=False).shape == (1, 36)
    # A program that does not import prunus: torch calls its entry point.
    program = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, folder / "packed"], check=True)
    # A package that was removed in part ends no import of torch, also where warnings are errors.
    hidden = installed.parent.rename(installed.parent.with_name("prunus-hidden"))
    subprocess.run([sys.executable, "-W", "error", "-c", "import torch"], check=True)
    hidden.rename(installed.parent)
    command("report", folder / "pruned", "--output", folder / "page.html")
    assert "</html>" in (folder / "page.html").read_text(encoding="utf-8")
    print(f"{command('--version').strip()} works as it is installed in {installed.parent}")


if __name__ == "__main__":
    main()
