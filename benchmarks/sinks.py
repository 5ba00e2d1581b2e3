"""Which tokens carry the loss of rounding: those of the first positions, or all others?

    python benchmarks/sinks.py DENSE ROUNDED … --data DIR

The first tokens of a window are what attention heads with nothing to do look at ("sinks"), and have
by far the largest hidden states. So the two models are mixed: one computes keys and values of the
first tokens, and the other one everything after them. KL divergence from the dense model in nats,
over the tokens after the first ones: all rounded; the first tokens exact and all else rounded; and
the first tokens rounded and all else exact. ROUNDED is a checkpoint or a GGUF file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunus.calibration.corpora import load_corpus
from prunus.formats.gguf.import_checkpoint import import_gguf


def load(path: Path, scratch: Path) -> Any:
    """A model in float32."""
    if path.suffix == ".gguf":
        import_gguf(path, scratch / path.stem)
        path = scratch / path.stem
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(first: Any, rest: Any, ids: torch.Tensor, sinks: int) -> torch.Tensor:
    """Logits of `rest` after the first tokens, whose keys and values `first` computes."""
    cache = first(ids[:, :sinks], use_cache=True).past_key_values
    return rest(ids[:, sinks:], past_key_values=cache).logits.log_softmax(-1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense", type=Path)
    parser.add_argument("rounded", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    with tempfile.TemporaryDirectory() as folder:
        dense = load(options.dense, Path(folder))
        models = {path: load(path, Path(folder)) for path in options.rounded}
        for text in ("wikitext2", "python-code"):
            documents = load_corpus(text, "scoring", options.data).documents
            ids = tokenizer("\n\n".join(documents), return_tensors="pt", verbose=False).input_ids
            windows = ids[0, : options.windows * 512].view(-1, 1, 512)
            for path, rounded in models.items():
                mixes = {"rounded": (rounded, rounded), "sinks exact": (dense, rounded)}
                mixes["sinks rounded"] = (rounded, dense)
                sums = dict.fromkeys(mixes, 0.0)
                for window in windows:
                    exact = logits(dense, dense, window, options.sinks)
                    for name, (first, rest) in mixes.items():
                        mixed = logits(first, rest, window, options.sinks)
                        kl = torch.nn.functional.kl_div(
                            mixed, exact, log_target=True, reduction="sum"
                        )
                        sums[name] += float(kl) / exact.shape[1] / len(windows)
                print(path.name, text, {k: round(v, 5) for k, v in sums.items()}, flush=True)


if __name__ == "__main__":
    main()
