"""Check that a change of the code changes neither a weight of the results nor a score of them.

    python benchmarks/equal_outputs.py record FILE.json [CASE ...]     # before the change
    python benchmarks/equal_outputs.py compare FILE.json [CASE ...]    # after it
    python benchmarks/equal_outputs.py compare FILE.json 'shrink*'     # some cases only

The script runs `prunus` on small models: each case in a process of its own, on one thread. It keeps
a SHA-256 of each tensor by name, of its dtype, shape and bytes, and of the configuration, the
fields of a GGUF file, generated texts and the numbers of scores. Prose, times, records, headers and
the layout of shards are left out. `record` replaces the cases that it runs in FILE.json and keeps
the others. `compare` lists what differs and ends with exit status 1 if anything does.

`--source DIR` runs the package `DIR/prunus` in place of the one next to this script. So one script
and one list of cases record with an old tree and compare with a new one. The compiled kernels are
switched off unless `--kernels` is given: they add in another order, so their results are recorded
in a file of their own.

The two real blocks are read from `PRUNUS_SHARED` (default `../shared`). The hashes depend on the
processor and on the version of torch: record and compare on the same machine.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import runpy
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import tomllib
import traceback
from bisect import bisect
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

# The first token of all models; the import of a GGUF file gives it this name.
END = "<|endoftext|>"
# Number of a type of a field of a GGUF file -> its form for struct.
_NUMBERS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}

Results = dict[str, str]  # What it is of -> SHA-256.


def digest(value: Any) -> str:
    """The SHA-256 of bytes, or of anything that JSON can hold."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def scores(value: Any) -> Iterator[float]:
    """The numbers under the keys of `scores`, wherever the layout has them."""
    if isinstance(value, list):
        for each in value:
            yield from scores(each)
    if isinstance(value, dict):
        for key, each in value.items():
            if key in _TABLE["scores"] and isinstance(each, int | float):
                yield each
            yield from scores(each)


def results(path: Path, root: Path) -> Results:
    """What a case made, as far as no wording, time or layout decides it.

    Args:
        path: The folder, the GGUF file, or the JSON file of scores.
        root: The folder of all cases, whose name is left out of configurations.
    """
    if path.suffix == ".gguf":
        return of_gguf(path.read_bytes())
    if path.is_file():
        found = json.loads(path.read_text())
        return {"scores": digest(sorted(set(scores(found)))), "text": digest(found.get("text"))}
    hashes: Results = {}
    for file in sorted(path.iterdir()):
        if file.suffix == ".safetensors":
            hashes |= of_safetensors(file.read_bytes())
        elif file.name in ("config.json", "adapter_config.json"):
            said = json.loads(file.read_text().replace(str(root), ""))
            hashes |= {f"{file.name}: {key}": digest(each) for key, each in said.items()}
        elif file.name == "results.json":  # Of a sweep, whose cells lie in folders of their own.
            hashes["scores"] = digest(sorted(set(scores(json.loads(file.read_text())))))
    return hashes


def of_safetensors(data: bytes) -> Results:
    """A hash of each tensor of a safetensors file."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        content = hashlib.sha256(data[start + first : start + last]).hexdigest()
        found[name] = digest([entry["dtype"], entry["shape"], content])
    return found


def of_gguf(data: bytes) -> Results:
    """A hash of each tensor of a GGUF file, and of each field that programs compute with.

    The package gguf does not know all types that prunus writes.
    """
    at = 8  # Behind the magic number and the version.

    def read(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return values[0] if len(values) == 1 else values

    def value(kind: int) -> Any:
        if kind == 8:
            return read(f"{read('Q')}s").decode()
        if kind == 9:
            kind, count = read("I"), read("Q")
            return [value(kind) for _ in range(count)]
        return read(_NUMBERS[kind])

    tensors, count = read("Q"), read("Q")
    fields = {value(8): value(read("I")) for _ in range(count)}
    entries = [
        (value(8), [read("Q") for _ in range(read("I"))], read("I"), read("Q"))
        for _ in range(tensors)
    ]
    data = data[-(-at // 32) * 32 :]
    ends = sorted([*(start for *_, start in entries), len(data)])
    found = {
        f"field {name}": digest(each)
        for name, each in fields.items()
        if not name.startswith(("general.", "prunus."))
    }
    for name, shape, kind, start in entries:
        content = hashlib.sha256(data[start : ends[bisect(ends, start)]]).hexdigest()
        found[name] = digest([kind, shape, content])
    return found


def make_inputs(folder: Path) -> None:
    """Write the two real blocks, tiny models of fixed seeds, windows, pictures and recipes."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        ViTImageProcessorPil,
    )

    def save(name: str, family: str, **options: Any) -> None:
        is_text = family != "vit"
        make = AutoModelForCausalLM if is_text else AutoModelForImageClassification
        given = {**(_TABLE["text"] if is_text else {}), **options}
        torch.manual_seed(1)
        model = make.from_config(AutoConfig.for_model(family, **given), dtype=torch.float32)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                # Experts must differ, and tokens must choose different ones.
                scale = 0.3 if ".experts." in key or ".gate." in key else 0.1
                parameter.add_(torch.randn_like(parameter) * scale)
        model.save_pretrained(folder / name)
        if is_text:
            add_tokenizer(folder / name)

    def add_tokenizer(model: Path) -> None:
        """A token for each byte, one of two letters, and others that no text has."""
        size = json.loads((model / "config.json").read_text())["vocab_size"]
        tokens = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
        tokens += [f"word{index}" for index in range(len(tokens), size)]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(model / "tokenizer.json"))
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END}
        (model / "tokenizer_config.json").write_text(json.dumps(described))

    (folder / "dense").mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, folder / "dense" / name)
    add_tokenizer(folder / "dense")
    shutil.copy(GOLDEN / "calibration.safetensors", folder / "ids.safetensors")
    noise = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 128, (6, 16), generator=noise, dtype=torch.int32)
    save_file({"input_ids": ids}, folder / "tiny-ids.safetensors")
    for name, options in _TABLE["models"].items():
        save(name, **options)
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
        if words[0] in ("eval", "generate"):
            words, out = [*words, "--json", "OUT"], self.folder / f"{name}.json"
        if "OUT.gguf" in words:
            out = self.folder / f"{name}.gguf"
        words = [str(out) if "OUT" in word else self._path(word) for word in words]
        if name.endswith("-resumed"):
            die_at = _TABLE["die_at"][name.removesuffix("-resumed")]
            status = self._prunus(words, log, die_at=die_at)
            if status != -signal.SIGKILL:
                return f"exit status {status} where a kill was planned\n{log.read_text()}", {}
            words.append("--resume")  # It insists that there is something to resume.
        status = self._prunus(words, log, ranks=2 if name.endswith("-two-ranks") else 1)
        if status:
            return f"exit status {status}\n{log.read_text()[-1500:]}", {}
        found = results(out, self.folder)
        same = _TABLE["same"].get(name, name.removesuffix("-resumed"))
        if same != name and self.need(same) != found:
            return f"the results are not those of {same}", {}
        return None, found

    def _path(self, word: str) -> str:
        if not word.startswith("@"):
            return word
        if word[1:] in CASES:
            self.need(word[1:])
        paths = [Path(f"{self.folder / word[1:]}{end}") for end in ("", ".gguf", ".safetensors")]
        return str(next((path for path in paths if path.exists()), paths[0]))

    def _prunus(self, words: list[str], log: Path, die_at: int = 0, ranks: int = 1) -> int:
        """Run a command on some ranks; returns its exit status, or minus a signal's number."""
        sys.stdout.flush()
        children: list[int] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        for rank in map(str, range(ranks)):
            group = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            group |= {"MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            children.append(os.fork())  # This process has one thread, and torch in memory.
            if children[-1] == 0:
                _be_prunus(words, log, group if ranks > 1 else {}, die_at)
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
        if words[0] == "in-place":
            prune_in_place(*words[1:])
        else:
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


def prune_in_place(model: str, out: str, ids: str, options: str) -> None:
    """Prune a loaded model; `options` is JSON without a space."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import prunus

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    prunus.prune(loaded, calibration=load_file(ids)["input_ids"], **json.loads(options))
    loaded.save_pretrained(out)


def differences(known: Results, found: Results) -> Iterator[str]:
    """What differs, is missing, or is new."""
    for name in {**known, **found}:
        before, now = known.get(name), found.get(name)
        if before != now:
            yield name + (" is missing" if now is None else " is new" if before is None else "")


def main() -> None:
    """Record or compare the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("cases", nargs="*", default=["*"], help="names, or globs of names")
    parser.add_argument("--source", type=Path, default=ROOT / "src", help="folder of the package")
    parser.add_argument("--kernels", action="store_true", help="use the compiled kernels")
    options = parser.parse_intermixed_args()
    recording, file, source = options.task == "record", options.file, options.source.resolve()
    if not GOLDEN.is_dir():
        parser.error(f"there are no reference blocks at {GOLDEN}; set PRUNUS_SHARED")
    if not (source / "prunus").is_dir():
        parser.error(f"there is no folder prunus in {source}")
    if options.kernels and not any(source.rglob("_kernels*.so")):
        parser.error(f"{source} has no compiled kernels: run setup.py build_ext --inplace there")
    chosen = [name for name in CASES if any(fnmatch.fnmatch(name, x) for x in options.cases)]
    known = json.loads(file.read_text()) if file.exists() else {}
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ["PRUNUS_ISA"] = "" if options.kernels else "off"
    sys.path.insert(0, str(source))
    print(f"{options.task}: the package in {source}", flush=True)
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
                lines = list(differences(known[name], found)) if name in known else ["not recorded"]
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
