"""`compress --check`: the figures are those of `eval`, and a run ends with them or continues."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import prunus
from command_line import call
from gguf_cases import gguf_checkpoint
from prunus.engine.progress import LineInterval
from prunus.evaluation import check
from prunus.formats.gguf.result import read_record
from prunus.rounding.compression_record import CompressionRecord

pytestmark = pytest.mark.usefixtures("short_python_texts")

TEXTS = ["wikitext2", "python-code"]
BITS = {
    "gguf": ["--type", "Q4_0"],
    "compressed-tensors": ["--bits", "4"],
    "mlx": ["--bits", "4.5"],
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("check") / "dense"
    return gguf_checkpoint(folder, hidden_size=64, intermediate_size=64, num_hidden_layers=1)


@pytest.fixture(autouse=True)
def texts(tmp_path, monkeypatch) -> Path:
    """A folder with the text of WikiText-2, and short windows."""
    folder = tmp_path / "data" / "wikitext2"
    folder.mkdir(parents=True)
    (folder / "wiki.test.raw").write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    monkeypatch.setenv("PRUNUS_DATA", str(folder.parent))
    # transformers adds tokens to this small tokenizer when it reads it from a GGUF file.
    monkeypatch.setattr("prunus.evaluation.perplexity.check_reference", lambda *_: None)
    monkeypatch.setattr(check, "_TOKENS", 48)
    return folder.parent


def compress(dense: Path, out: Path, kind: str, *options: str, status: int = 0) -> str:
    kind_of_folder = [] if kind == "gguf" else ["--format", kind]
    windows = ["--calibration", "python-code", "--samples", "2", "--seqlen", "16"]
    arguments = [*BITS[kind], *kind_of_folder, *windows, "--data", out.parent / "data", *options]
    return call("compress", dense, out, *arguments, status=status).output


def record_of(out: Path) -> CompressionRecord:
    return CompressionRecord.load(out) if out.is_dir() else read_record(out)


@pytest.mark.parametrize("kind", BITS)
def test_the_record_the_card_and_the_file_have_what_eval_measures(
    kind, dense, monkeypatch, tmp_path
):
    out = tmp_path / ("x.gguf" if kind == "gguf" else "x")
    plain = tmp_path / ("plain.gguf" if kind == "gguf" else "plain")
    assert "loses was not measured: add --check" in compress(dense, plain, kind)
    compress(dense, plain, kind)
    monkeypatch.setattr("prunus.reporting.console.LineInterval", lambda: LineInterval(0.0))
    output = compress(dense, out, kind, "--check")
    scores = prunus.perplexities([plain], TEXTS, reference=dense, seqlen=16, samples=3)[0]
    card = (tmp_path / "x.README.md" if kind == "gguf" else out / "README.md").read_text()
    for text, score in zip(TEXTS, scores, strict=False):
        found = record_of(out).check[text]
        assert found["kl"] == pytest.approx(score.divergence.kl, rel=1e-6)
        assert found["kl_stderr"] == pytest.approx(score.divergence.kl_stderr, rel=1e-6)
        assert (found["windows"], found["seqlen"]) == (3, 16)
        words = f"{score.divergence.kl:.5f} ± {score.divergence.kl_stderr:.5f} nats per token"
        assert words in " ".join(card.split()) and words in " ".join(output.split())
        assert "formats of SmolLM2-135M, that is less than Q8_0" in " ".join(card.split())
        assert card.index(words) < card.index("```toml"), "where the command was that measures it"
    assert "measures how far" not in card and "/200] scoring the result beside" in output
    assert record_of(plain).check == {}
    # All but the record is as without the check, and nothing is scored twice.
    if kind == "gguf":
        assert out.stat().st_size == plain.stat().st_size
        assert out.read_bytes()[-50_000:] == plain.read_bytes()[-50_000:]
    monkeypatch.setattr(check, "perplexities", None)
    assert words in " ".join(compress(dense, out, kind, "--check").split())


@pytest.mark.parametrize("kind", ["gguf", "mlx"])
def test_a_run_that_is_stopped_while_it_scores_keeps_its_result_and_scores_again(
    kind, dense, monkeypatch, tmp_path
):
    out = tmp_path / ("x.gguf" if kind == "gguf" else "x")
    score = check.perplexities

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "perplexities", stop)
    compress(dense, out, kind, "--check", status=130)
    assert record_of(out).check == {}
    monkeypatch.setattr(check, "perplexities", score)
    compress(dense, out, kind, "--check")
    assert [*record_of(out).check] == TEXTS
    assert not (tmp_path / "x.gguf.part").exists()


def test_a_text_that_is_not_at_hand_is_named_before_any_work(dense, texts, tmp_path):
    shutil.rmtree(texts / "wikitext2")
    message = compress(dense, tmp_path / "x.gguf", "gguf", "--check", status=2)
    assert "wikitext2 for scoring needs wikitext2/wiki.test.raw" in " ".join(message.split())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
