"""Check that a change of the code changes neither a byte of the results nor a figure of them.

    python benchmarks/equal_outputs.py record FILE.json [CASE ...]     # before the change
    python benchmarks/equal_outputs.py compare FILE.json [CASE ...]    # after it
    python benchmarks/equal_outputs.py compare FILE.json 'shrink*'     # some cases only

The script runs `prunus` on small models, as the source next to it defines it: each case in a
process of its own, on one thread. It keeps the SHA-256 of every tensor file, index and
configuration, and the figures of records and evaluations. Prose, times and the layout of records
are left out. `record` replaces the cases that it runs in FILE.json and keeps the others. `compare`
lists what differs and ends with exit status 1 if anything does.

The two real blocks are read from `PRUNUS_SHARED` (default `../shared`). The hashes depend on the
processor and on the version of torch: record and compare on the same machine.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("PRUNUS_SHARED", ROOT.parent / "shared"))
GOLDEN = SHARED / "golden" / "smollm2_two_blocks"

_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
CASES = {name: line.format(**_TABLE["words"]) for name, line in _TABLE["cases"].items()}
CASES |= {f"{name}-resumed": CASES[name] for name in _TABLE["die_at"]}
CASES |= {f"{name}-two-ranks": CASES[name] for name in _TABLE["ranked"]}

#: Parts of a record that hold results, and parts that hold remarks or repeat config.json.
_PARTS = {"blocks", "head", "search", "evaluations", "linears"}
_SKIPPED = {"packed", "notes"}
_RECORD, _SCORES = set(_TABLE["figures"]["record"]), set(_TABLE["figures"]["scores"])

Results = dict[str, Any]  # File name -> SHA-256; "figures" -> sorted numbers.


def figures(value: Any, names: set[str], inside: bool) -> Iterator[float]:
    """The numbers under the keys `names`, wherever the layout has them; None is not a number."""
    if isinstance(value, list):
        for each in value:
            yield from figures(each, names, inside)
    if isinstance(value, dict):
        for key, each in value.items():
            if (inside and key in names) or key == "allocation":
                flat = each.get("value", [*each.values()]) if isinstance(each, dict) else each
                for number in flat if isinstance(flat, list) else [flat]:
                    if isinstance(number, int | float) and not isinstance(number, bool):
                        yield number
            if key not in _SKIPPED:
                yield from figures(each, names, inside or key in _PARTS)


def results(path: Path, root: Path) -> Results:
    """What a case made, as far as no wording, time or layout decides it."""
    if path.is_file():
        return {"figures": sorted(set(figures(json.loads(path.read_text()), _SCORES, True)))}
    found: Results = {}
    records: list[float] = []
    for file in sorted(path.iterdir()):
        name = file.name
        if file.suffix == ".safetensors":
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif name.endswith("index.json") or name in ("config.json", "adapter_config.json"):
            text = file.read_text().replace(str(root), "")
            found[name] = hashlib.sha256(text.encode()).hexdigest()
        elif name == "results.json":  # Of a sweep, whose cells lie in folders of their own.
            records += set(figures(json.loads(file.read_text()), _SCORES, True))
        elif name.startswith("prunus") and file.suffix == ".json":
            records += figures(json.loads(file.read_text()), _RECORD, False)
    return found | {"figures": sorted(records)}


def make_inputs(folder: Path) -> None:
    """Write the two real blocks, tiny models of fixed seeds, windows, pictures and recipes."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        ViTImageProcessorPil,
    )

    def save(name: str, make: Any, family: str, **options: Any) -> None:
        torch.manual_seed(1)
        model = make.from_config(AutoConfig.for_model(family, **options), dtype=torch.float32)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                # Experts must differ, and tokens must choose different ones.
                scale = 0.3 if ".experts." in key or ".gate." in key else 0.1
                parameter.add_(torch.randn_like(parameter) * scale)
        model.save_pretrained(folder / name)

    (folder / "dense").mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, folder / "dense" / name)
    shutil.copy(GOLDEN / "calibration.safetensors", folder / "ids.safetensors")
    noise = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 128, (6, 16), generator=noise, dtype=torch.int32)
    save_file({"input_ids": ids}, folder / "tiny-ids.safetensors")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4}
    text = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    mixture = {"num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64}
    save("mixture", AutoModelForCausalLM, "mixtral", **small, **text, **mixture)
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    save("gpt2", AutoModelForCausalLM, "gpt2", **text, **gpt2)
    labels = {"id2label": {0: "eel", 1: "cat"}, "label2id": {"eel": 0, "cat": 1}}
    image = {"image_size": 16, "patch_size": 4}
    save("classifier", AutoModelForImageClassification, "vit", **small, **labels, **image)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "classifier")
    for kind in ("cat", "eel"):
        (folder / "pictures" / kind).mkdir(parents=True)
        for number in range(4):
            shape = (20 + number, 17, 3)
            pixels = torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "pictures" / kind / f"{number}.png")
    (folder / "recipes").mkdir()
    for name, content in _TABLE["recipes"].items():
        (folder / "recipes" / f"{name}.toml").write_text(content.format(folder=folder))


class Runs:
    """The cases that ran so far, in one folder.

    Attributes:
        found: case -> its results; None for one that failed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, Results | None] = {}
        make_inputs(folder)

    def need(self, name: str) -> Results | None:
        """Return the results of a case, which runs if it has not yet."""
        if name not in self.found:
            start = time.monotonic()
            fault, found = self._run(name)
            said = f"{len(found)} results" if fault is None else f"FAILED, {fault}\n"
            print(f"{name}: {said} ({time.monotonic() - start:.1f} s)", flush=True)
            self.found[name] = found if fault is None else None
        return self.found[name]

    def _run(self, name: str) -> tuple[str | None, Results]:
        """Run a case; returns what went wrong, if anything did, and the results."""
        words, log = CASES[name].split(), self.folder / f"{name}.log"
        out = self.folder / name
        if words[0] == "eval":
            words, out = [*words, "--json", "OUT"], self.folder / f"{name}.json"
        words = [str(out) if word == "OUT" else self._path(word) for word in words]
        if name.endswith("-resumed"):
            status = self._prunus(
                words, log, die_at=_TABLE["die_at"][name.removesuffix("-resumed")]
            )
            if status != -signal.SIGKILL:
                return f"exit status {status} where a kill was planned\n{log.read_text()}", {}
            words.append("--resume")  # It insists that there is something to resume.
        status = self._prunus(words, log, ranks=2 if name.endswith("-two-ranks") else 1)
        if status:
            return f"exit status {status}\n{log.read_text()[-1500:]}", {}
        found = results(out, self.folder)
        same = "wanda" if name == "wanda-two-ranks" else name.removesuffix("-resumed")
        if same != name and self.need(same) != found:
            return f"the results are not those of {same}", {}
        return None, found

    def _path(self, word: str) -> str:
        if not word.startswith("@"):
            return word
        if word[1:] in CASES:
            self.need(word[1:])
        path = self.folder / word[1:]
        return str(path if path.exists() else path.with_suffix(".safetensors"))

    def _prunus(self, words: list[str], log: Path, die_at: int = 0, ranks: int = 1) -> int:
        """Run a command on some ranks; returns its exit status, or minus a signal's number."""
        sys.stdout.flush()
        children, environment = [], {}
        if ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        for rank in range(ranks):
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(os.fork())  # This process has one thread, and torch in memory.
            if children[-1] == 0:
                _be_prunus(words, log, environment, die_at)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return next((status for status in statuses if status), 0)


def _be_prunus(words: list[str], log: Path, environment: dict[str, str], die_at: int) -> NoReturn:
    """Be `python -m prunus`, and die before tensor file number `die_at` gets its final name."""
    import torch

    rename, files, status = os.replace, 0, 1

    def replace(source: Any, target: Any) -> None:
        nonlocal files
        files += str(target).endswith(".safetensors")
        if files == die_at > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    try:
        os.environ |= environment
        os.replace = replace  # type: ignore[assignment]
        sys.argv = ["prunus", *words]
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.manual_seed(0)
        runpy.run_module("prunus", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def differences(known: Results, found: Results) -> Iterator[str]:
    """The files that differ, and the numbers that are only in one of the two."""
    for name in {**known, **found}:
        before, now = known.get(name), found.get(name)
        if before == now:
            continue
        if isinstance(before, list) and isinstance(now, list):
            gone, new = Counter(before) - Counter(now), Counter(now) - Counter(before)
            yield f"{name}: {gone.total()} of {len(before)} gone, {new.total()} new"
            yield f"    gone {list(gone)[:4]}, new {list(new)[:4]}"
        else:
            yield f"{name}{' is missing' if now is None else ' is new' if before is None else ''}"


def main() -> None:
    """Record or compare the cases that the command line names."""
    if len(sys.argv) < 3 or sys.argv[1] not in ("record", "compare"):
        raise SystemExit(__doc__)
    if not GOLDEN.is_dir():
        raise SystemExit(f"there are no reference blocks at {GOLDEN}; set PRUNUS_SHARED")
    recording, file, globs = sys.argv[1] == "record", Path(sys.argv[2]), sys.argv[3:] or ["*"]
    chosen = [name for name in CASES if any(fnmatch.fnmatch(name, glob) for glob in globs)]
    known = json.loads(file.read_text()) if file.exists() else {}
    # The kernels for packed models are compiled in some trees only, and round in another order.
    os.environ |= {"OMP_NUM_THREADS": "1", "PRUNUS_ISA": "off", "GLOO_SOCKET_IFNAME": "lo"}
    sys.path.insert(0, str(ROOT / "src"))
    start, wrong, count = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        for name in chosen:
            found = runs.need(name)
            lines = ["failed"] if found is None else []
            if found is not None and recording:
                known[name] = found
                _write(file, known)
            elif found is not None:
                lines = list(differences(known.get(name, {}), found))
            for line in lines:
                print(f"differs: {name}: {line}", flush=True)
            wrong, count = wrong + bool(lines), count + len(found or {})
    for name in known.keys() - CASES.keys():
        print(f"the case {name} is recorded and does not exist any more")
    said = "recorded" if recording else "equal"
    total = f"{len(chosen) - wrong} of {len(chosen)} cases, with {count} results"
    print(f"{said}: {total}, in {time.monotonic() - start:.0f} s")
    raise SystemExit(1 if wrong or not chosen else 0)


def _write(file: Path, known: dict[str, Results]) -> None:
    """Write a line per case."""
    lines = [f"{json.dumps(name)}: {json.dumps(each)}" for name, each in known.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
