"""Size, quality and speed of llama.cpp's types and of prunus, side by side, for one dense model.

    python benchmarks/pareto.py DENSE WORK --llama-cpp BIN [--gguf DENSE.gguf] \\
        --types Q2_K,Q3_K_M,Q4_K_M --bits 2.5,3,4 --checkpoint NAME=FOLDER --data DIR \\
        --json docs/results/pareto-NAME.json

DENSE is a checkpoint folder; see benchmarks/dither.py if its weights come from a quantised file.
BIN is the folder of llama.cpp's programs llama-imatrix, llama-quantize and llama-bench, built for
the processor at use. DENSE.gguf holds the same weights; without it, the script
convert_hf_to_gguf.py of llama.cpp (option --converter) makes it.

- Both programs see the same calibration tokens. The text of prunus's windows is tokenised again as
  one string, and cut into windows anew: llama-imatrix takes the text, prunus the token ids.
- Embeddings and the output head take about 8 bits everywhere: type q8_0 in all files of llama.cpp,
  --head-bits 8 in prunus.
- Every result is scored with `prunus.perplexity`, in bfloat16. A GGUF file is imported first, so
  the score is that of its weights alone. llama.cpp also rounds activations to 8 bits as it runs.
- Bits per weight are those of the linears in blocks, with scales and all else that belongs to them.
- Both programs store the same number of weights: a GGUF file that holds a tied embedding twice is
  refused.
- Speed comes last. The models take turns, each measurement is a process of its own, and the load
  of the machine is kept with it.

OMP_NUM_THREADS is the number of threads of all but the measurements of speed. A row that is in the
JSON file is not measured again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import prunus
from prunus.calibration.draw import encode
from prunus.calibration.sources import find_source
from prunus.calibration.windows import WindowRequest, hash_ids
from prunus.evaluation.speed import bench
from prunus.formats.gguf.import_checkpoint import import_gguf
from prunus.hardware.memory import describe_hardware, versions

TYPES = "Q2_K,IQ2_XS,IQ2_M,IQ3_XXS,Q3_K_S,Q3_K_M,IQ4_XS,Q4_K_M"


class RecordedModel(nn.Module):
    """A model that answers with logits that it gave before, so that it need not run again.

    Args:
        config: of the model.
        ids_WS: token ids of all windows, (windows, tokens).
        logits_WSV: their logits, (windows, tokens, vocabulary).
        name: of the model, for results.
    """

    def __init__(
        self, config: Any, ids_WS: torch.Tensor, logits_WSV: torch.Tensor, name: str
    ) -> None:
        super().__init__()
        self.config, self.name_or_path = config, name
        self._ids_WS, self._logits_WSV = ids_WS, logits_WSV
        # It says on which device and in which dtype the model is, and how many tokens it has.
        self._embedding = nn.Embedding(logits_WSV.shape[-1], 1, dtype=logits_WSV.dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self._embedding

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        positions = [int((self._ids_WS == ids_S).all(dim=1).nonzero()[0, 0]) for ids_S in input_ids]
        return SimpleNamespace(logits=self._logits_WSV[positions])


def record(model: Path, path: Path, windows: int, seqlen: int, score: Callable[..., Any]) -> Any:
    """Score a model, and keep its logits in the file `path`; returns the score."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    partial = path.with_name(f".{path.name}.partial")
    logits_WSV = mapped_logits(partial, (windows, seqlen), loaded.config, shared=True)
    ids: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, given: dict[str, Any], output: Any) -> None:
        for ids_S, logits_SV in zip(given["input_ids"], output.logits, strict=True):
            logits_WSV[len(ids)] = logits_SV
            ids.append(ids_S)

    loaded.register_forward_hook(keep, with_kwargs=True)
    result = score(loaded, tokenizer=AutoTokenizer.from_pretrained(model))
    save_file({"input_ids": torch.stack(ids)}, path.with_suffix(".ids.safetensors"))
    partial.replace(path)
    return result


def recorded(model: Path, path: Path) -> RecordedModel:
    """The model whose logits `record` kept. The logits stay on disk until they are read."""
    from transformers import AutoConfig

    with safe_open(path.with_suffix(".ids.safetensors"), framework="pt") as file:
        ids_WS = file.get_tensor("input_ids")
    config = AutoConfig.from_pretrained(model)
    logits_WSV = mapped_logits(path, tuple(ids_WS.shape), config, shared=False)
    return RecordedModel(config, ids_WS, logits_WSV, model.name)


def mapped_logits(
    path: Path, windows: tuple[int, ...], config: Any, *, shared: bool
) -> torch.Tensor:
    """A tensor (windows, tokens, vocabulary) in the model's dtype that lies in a file."""
    shape = (*windows, config.vocab_size)
    return torch.from_file(
        str(path), shared=shared, size=math.prod(shape), dtype=config.dtype
    ).view(shape)


class Results:
    """The JSON file with all that is measured, written after every change.

    Args:
        path: the file. If it is there, its rows are kept.
        head: everything but rows. `protocol` must be the same as in the file.

    Raises:
        ValueError: the file was measured with another protocol.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name, value in found.get("protocol", {}).items():
            if head["protocol"].get(name) != value:
                raise ValueError(
                    f"{path}: was measured with {name} = {value!r}, now it is "
                    f"{head['protocol'].get(name)!r}; give another --json, or delete the file"
                )
        self.data: dict[str, Any] = {**head, "dense": found.get("dense"), "rows": {}}
        self.rows: dict[str, dict[str, Any]] = self.data["rows"]
        self.rows.update(found.get("rows", {}))

    def write(self) -> None:
        text = json.dumps(self.data, indent=1, ensure_ascii=False) + "\n"
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path)


def run(command: list[Any], log: Path) -> None:
    """Run a program whose output goes to a file."""
    with log.open("w") as output:
        done = subprocess.run(
            [str(part) for part in command], check=False, stdout=output, stderr=output
        )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed, exit status {done.returncode}; see {log}")


# What both programs start from.


def write_calibration(options: argparse.Namespace) -> str:
    """Write calibration.txt and calibration.safetensors; returns the SHA-256 of the ids.

    The text of all windows is one string. Its tokens, cut into windows, are the windows that count:
    llama-imatrix finds the same, and adds none.
    """
    from transformers import AutoTokenizer

    target = options.work / "calibration.safetensors"
    if not target.exists():
        tokenizer = AutoTokenizer.from_pretrained(options.dense)
        shape = (options.samples, options.seqlen)
        # One window more than needed, since tokens at the borders may become fewer.
        asked = WindowRequest(
            samples=options.samples + 1,
            seqlen=options.seqlen,
            data=options.data,
            tokenizer=lambda: tokenizer,
        )
        windows = find_source(options.calibration).draw(asked)
        wanted = options.samples * options.seqlen
        text = "".join(tokenizer.decode(ids) for ids in windows.ids)
        text = tokenizer.decode(encode(tokenizer, text)[:wanted])
        ids = encode(tokenizer, text)
        if len(ids) != wanted:
            raise ValueError(
                f"the calibration text has {len(ids)} tokens instead of {wanted}, because its end "
                "is tokenised in another way; use another --samples"
            )
        (options.work / "calibration.txt").write_text(text, encoding="utf-8")
        save_file({"input_ids": ids.reshape(shape)}, target)
    with safe_open(target, framework="pt") as file:
        return hash_ids(file.get_tensor("input_ids"))


def dense_gguf(options: argparse.Namespace) -> Path:
    """The dense model for llama.cpp: the file that was given, or one that is made now."""
    if options.gguf is not None:
        return Path(options.gguf)
    target: Path = options.work / "dense.gguf"
    if not target.exists():
        if options.converter is None:
            raise ValueError("give --gguf DENSE.gguf, or --converter .../convert_hf_to_gguf.py")
        partial = target.with_name("partial.gguf")
        command = [sys.executable, options.converter, options.dense]
        run([*command, "--outtype", "bf16", "--outfile", partial], options.work / "convert.log")
        partial.replace(target)
    return target


def check_weights(options: argparse.Namespace) -> None:
    """Check that the dense GGUF file holds the weights of the checkpoint, and none twice.

    Raises:
        ValueError: It does not, such as a file that stores a tied embedding a second time.
    """
    from gguf import GGUFReader

    tensors = GGUFReader(dense_gguf(options)).tensors
    in_file = sum(int(tensor.n_elements) for tensor in tensors if len(tensor.shape) > 1)
    shapes = [shape for _, shape, _ in stored_tensors(options.dense) if len(shape) > 1]
    in_checkpoint = sum(math.prod(shape) for shape in shapes)
    if in_file != in_checkpoint:
        raise ValueError(
            f"{dense_gguf(options)} holds {in_file:,} weights in matrices, and {options.dense} "
            f"{in_checkpoint:,}: a comparison of sizes would not be fair. Give the file that "
            "llama.cpp's converter makes of the checkpoint"
        )


def importance_matrix(options: argparse.Namespace) -> Path:
    target: Path = options.work / "imatrix.gguf"
    if not target.exists():
        partial = target.with_name("partial-imatrix.gguf")
        command = [options.llama_cpp / "llama-imatrix", "-m", dense_gguf(options)]
        command += ["-f", options.work / "calibration.txt", "-o", partial, "--no-ppl"]
        command += ["-c", options.seqlen, "-b", options.seqlen, "-t", torch.get_num_threads()]
        run(command, options.work / "imatrix.log")
        partial.replace(target)
    return target


# Rows.


def quantised_gguf(kind: str, options: argparse.Namespace) -> Path:
    """The model as a type of llama.cpp, made by llama-quantize."""
    target: Path = options.work / f"{kind}.gguf"
    if not target.exists():
        partial = target.with_name(f"partial-{kind}.gguf")
        command = [options.llama_cpp / "llama-quantize", "--imatrix", importance_matrix(options)]
        command += ["--token-embedding-type", options.head, "--output-tensor-type", options.head]
        command += [dense_gguf(options), partial, kind, torch.get_num_threads()]
        run(command, options.work / f"{kind}.log")
        partial.replace(target)
    return target


def gguf_size(path: Path) -> dict[str, Any]:
    """Bits per weight of the linears in blocks, bytes, and how many tensors are of which type."""
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    linears = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    outside = [t for t in tensors if not t.name.startswith("blk.") and len(t.shape) > 1]
    weights = sum(int(t.n_elements) for t in linears)
    return {
        "bits_per_weight": 8 * sum(int(t.n_bytes) for t in linears) / weights,
        "file_bytes": path.stat().st_size,
        "tensor_bytes": sum(int(t.n_bytes) for t in tensors),
        "types": dict(Counter(t.tensor_type.name for t in linears).most_common()),
        "types_outside": {t.name: t.tensor_type.name for t in outside},
    }


def checkpoint_size(folder: Path, dense: Path) -> dict[str, Any]:
    """The same for a checkpoint folder. All that is stored below the name of a linear counts.

    Biases do not count, as in a GGUF file, where they are tensors of their own.
    """
    blocks = [
        (name.removesuffix("weight"), shape)
        for name, shape, _ in stored_tensors(dense)
        if name.endswith(".weight") and len(shape) == 2 and ".layers." in name
    ]
    stored = list(stored_tensors(folder))
    in_blocks = sum(
        size
        for name, _, size in stored
        if not name.endswith(".bias") and any(name.startswith(prefix) for prefix, _ in blocks)
    )
    weights = sum(shape[0] * shape[1] for _, shape in blocks)
    return {
        "bits_per_weight": 8 * in_blocks / weights,
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "tensor_bytes": sum(size for _, _, size in stored),
    }


def stored_tensors(folder: Path) -> list[tuple[str, list[int], int]]:
    """Name, shape and bytes of every tensor in a folder's safetensors, from their headers."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                first, stop = entry["data_offsets"]
                found.append((name, entry["shape"], stop - first))
    return found


def compress(bits: float, options: argparse.Namespace) -> tuple[Path, float]:
    """The folder of `prunus compress --bits`, and its seconds on the wall."""
    target: Path = options.work / f"prunus-{bits:g}"
    command = [sys.executable, "-m", "prunus", "compress", options.dense, target]
    command += ["--bits", f"{bits:g}", "--calibration", options.work / "calibration.safetensors"]
    command += ["--samples", options.samples, "--seqlen", options.seqlen]
    command += shlex.split(options.compress_options)
    started = time.perf_counter()
    run(command, options.work / f"prunus-{bits:g}.log")
    return target, time.perf_counter() - started


def quality(result: Any) -> dict[str, Any]:
    """What a row keeps of a score."""
    divergence = {
        name: value for name, value in asdict(result.divergence).items() if name != "reference"
    }
    return {"perplexity": result.perplexity, **divergence}


def measure_rows(results: Results, options: argparse.Namespace) -> dict[str, tuple[str, Path]]:
    """Make and score every row that is asked for.

    Returns:
        The name of each row, and program and file to measure its speed with.
    """

    def score(model: Any, **given: Any) -> Any:
        return prunus.perplexity(
            model,
            options.text,
            seqlen=options.eval_seqlen,
            samples=options.windows,
            data=options.data,
            **given,
        )

    if options.types:
        check_weights(options)
    logits = options.work / "dense-logits.bin"
    if not logits.exists() or results.data["dense"] is None:
        say("dense: scoring")
        found = record(options.dense, logits, options.windows, options.eval_seqlen, score)
        results.data["dense"] = {
            "perplexity": found.perplexity,
            "text": found.protocol,
            **checkpoint_size(options.dense, options.dense),
        }
        results.write()
    reference = recorded(options.dense, logits)

    places: dict[str, tuple[str, Path]] = {}
    for kind in filter(None, options.types.split(",")):
        name = f"llama.cpp {kind}"
        say(f"{name}: quantising")
        path = quantised_gguf(kind, options)
        places[name] = ("llama.cpp", path)
        if name not in results.rows:
            imported = options.work / "imported"
            say(f"{name}: importing")
            import_gguf(path, imported, overwrite=True)
            say(f"{name}: scoring")
            found = score(imported, reference=reference)
            results.rows[name] = {"program": "llama.cpp", **gguf_size(path), **quality(found)}
            results.write()
            shutil.rmtree(imported)
            say(summary(name, results.rows[name]))
    checkpoints = dict(given.split("=", 1) for given in options.checkpoint)
    for name, folder in checkpoints.items():
        places[f"prunus {name}"] = ("prunus", Path(folder))
    for bits in map(float, filter(None, options.bits.split(","))):
        places[f"prunus {bits:g} bits"] = ("prunus", options.work / f"prunus-{bits:g}")
        if f"prunus {bits:g} bits" not in results.rows:
            say(f"prunus {bits:g} bits: compressing")
            folder, seconds = compress(bits, options)
            results.rows[f"prunus {bits:g} bits"] = {"program": "prunus", "seconds": seconds}
    for name, (program, folder) in places.items():
        if program == "prunus" and "kl" not in results.rows.get(name, {}):
            say(f"{name}: scoring")
            row = results.rows.setdefault(name, {"program": "prunus"})
            row |= checkpoint_size(folder, options.dense)
            row |= quality(score(folder, reference=reference))
            results.write()
            say(summary(name, row))
    return places


# Speed.


def llama_speed(path: Path, options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of llama-bench, and the largest resident memory of its process."""
    program = [options.llama_cpp / "llama-bench", "-m", path, "-t", options.threads, "-r", "1"]
    program += ["-o", "json"]
    prompt = ["-p", options.prompt_tokens, "-n", 0]
    decode = ["-p", 0, "-n", options.new_tokens, "-d", options.prompt_tokens]
    found = {}
    for name, given in (("prefill", prompt), ("decode", decode)):
        command = [str(part) for part in [*program, *given]]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            text = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed, status {process.returncode}")
        found[name] = float(json.loads(text)[0]["avg_ts"])
        found["resident_bytes"] = usage.ru_maxrss * 1024.0
    return found


def prunus_speed(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """The same for a checkpoint, by `prunus.evaluation.speed`."""
    (speed,) = bench(
        [str(folder)],
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens + 1,  # the first new token belongs to the prompt's time
        rounds=1,
        threads=options.threads,
    )
    return {
        "prefill": speed.prefill_tokens_per_second[1],
        "decode": speed.decode_tokens_per_second[1],
        "resident_bytes": speed.resident_bytes[1],
    }


def measure_speeds(
    results: Results, places: dict[str, tuple[str, Path]], options: argparse.Namespace
) -> None:
    """Let the models take turns until each has `options.rounds` measurements."""
    for turn in range(options.rounds):
        for name, (program, path) in places.items():
            speeds = results.rows[name].setdefault("speeds", [])
            if len(speeds) > turn:
                continue
            load = os.getloadavg()[0]
            measured = (llama_speed if program == "llama.cpp" else prunus_speed)(path, options)
            speeds.append({**measured, "load_before": load})
            results.write()
            say(
                f"{name}, round {turn + 1}: "
                + ", ".join(f"{k} {v:.4g}" for k, v in speeds[-1].items())
            )


# Output.


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def summary(name: str, row: dict[str, Any]) -> str:
    return (
        f"{name}: {row['bits_per_weight']:.3f} bits, {row['tensor_bytes'] / 1e6:.0f} MB, "
        f"perplexity {row['perplexity']:.3f}, KL {row['kl']:.4f} ± {row['kl_stderr'] or 0:.4f}, "
        f"same top token {100 * row['same_top']:.1f} %"
    )


def table(results: Results) -> str:
    """All rows as a Markdown table, by bits per weight."""
    header = "model", "bits a weight", "tensors, MB", "resident, MB", "perplexity", "KL, nats"
    header += "same top token, %", "prefill, tokens/s", "decode, tokens/s"
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, row in sorted(results.rows.items(), key=lambda item: item[1]["bits_per_weight"]):
        speeds = {
            field: statistics.median(speed[field] for speed in row["speeds"])
            for field in ("resident_bytes", "prefill", "decode")
            if row.get("speeds")
        }
        lines.append(
            [
                name,
                f"{row['bits_per_weight']:.2f}",
                f"{row['tensor_bytes'] / 1e6:.0f}",
                f"{speeds['resident_bytes'] / 1e6:.0f}" if speeds else "",
                f"{row['perplexity']:.2f}",
                f"{row['kl']:.4f} ± {row['kl_stderr'] or 0:.4f}",
                f"{100 * row['same_top']:.1f}",
                f"{speeds['prefill']:.0f}" if speeds else "",
                f"{speeds['decode']:.1f}" if speeds else "",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense", type=Path, help="checkpoint folder of the dense model")
    parser.add_argument("work", type=Path, help="folder for files that are made on the way")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--title", help="name of the model in plots")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--llama-version", default="", help="of llama.cpp, for the JSON file")
    parser.add_argument("--gguf", type=Path, help="the dense model for llama.cpp")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--types", default=TYPES, help="types of llama.cpp; may be empty")
    parser.add_argument("--head", default="q8_0", help="type of embeddings and head in GGUF files")
    parser.add_argument("--bits", default="", help="sizes for prunus compress, with commas")
    parser.add_argument(
        "--compress-options",
        default="--head-bits 8",
        help="more options of prunus compress. Default: %(default)s",
    )
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--data", type=Path, help="folder with local copies of the datasets")
    parser.add_argument("--calibration", default="c4", help="a text, as prunus takes it")
    parser.add_argument("--text", default="wikitext2", help="text to score")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens per calibration window")
    parser.add_argument("--windows", type=int, default=16, help="windows of the text to score")
    parser.add_argument("--eval-seqlen", type=int, default=512, help="tokens per scored window")
    parser.add_argument("--threads", type=int, default=2, help="of speed measurements")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of speed; 0 for none")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args(arguments)
    if options.types and options.llama_cpp is None:
        parser.error("--llama-cpp is needed for the types of llama.cpp; or give --types ''")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    protocol = {
        "model": options.dense.name,
        "calibration": f"{options.samples} windows of {options.seqlen} tokens of "
        f"{options.calibration}",
        "calibration_sha256": write_calibration(options),
        "scored": f"{options.text}, {options.windows} windows of {options.eval_seqlen} tokens",
        "embeddings and head in GGUF files": options.head,
        "speed": f"{options.threads} threads, batch 1; prefill of {options.prompt_tokens} tokens, "
        f"then {options.new_tokens} decoded tokens",
    }
    head = {
        "title": options.title or options.dense.name,
        "what": "Size, quality and speed of llama.cpp's types and of prunus, by "
        "benchmarks/pareto.py. KL in nats per token from the dense model; ± is one standard error "
        "over windows; speeds in tokens per second.",
        "command": shlex.join(["python", "benchmarks/pareto.py", *sys.argv[1:]]),
        "hardware": describe_hardware(torch.device("cpu")),
        "versions": versions() | {"llama.cpp": options.llama_version},
        "protocol": protocol,
    }
    results = Results(options.json, head)
    places = measure_rows(results, options)
    measure_speeds(results, places, options)
    print(table(results))


if __name__ == "__main__":
    main()
