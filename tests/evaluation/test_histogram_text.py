"""Histograms read the calibration text from where the run took it."""

from __future__ import annotations

import prunus
from prunus.evaluation.histograms import linear_histograms
from prunus.pruning.manifest import Manifest
from tiny import tiny_checkpoint
from tiny_tokenizer import VOCABULARY, byte_tokenizer


def test_the_manifest_remembers_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("PRUNUS_DATA", raising=False)
    dense = tiny_checkpoint(tmp_path / "dense", vocab_size=VOCABULARY)
    byte_tokenizer().save_pretrained(dense)
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "wikitext2").mkdir(parents=True)
    (data / "wikitext2" / "wiki.train.raw").write_text(" = Title = \n" + " A line .\n" * 40)
    windows = {"samples": 2, "seqlen": 16}
    prunus.prune(dense, out, calibration="wikitext2", data_dir=data, **windows)
    assert Manifest.load(out).data_dir == str(data)
    found = linear_histograms(out, "model.layers.1.mlp.down_proj")
    assert found.score_kept
    assert not any("calibration text" in note for note in found.notes)
    other = prunus.prune(dense, tmp_path / "docs", calibration="python-docs", **windows)
    assert other.data_dir is None
