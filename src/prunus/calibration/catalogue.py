"""The names of the sources of calibration windows, for help texts and docs. Imports no torch."""

from __future__ import annotations

#: Source -> what it gives, for people. FILE and FOLDER stand for a path: a source that is none of
#: the other names is one.
SOURCES = {
    "c4": "C4, English, first train shard: random windows of random documents, as in the papers",
    "wikitext2": "WikiText-2, train: random windows of the whole text",
    "ptb": "Penn Treebank, train: random windows of the whole text",
    "python-docs": "the documentation that ships with Python: first half; needs no download",
    "python-code": "the modules of Python's standard library: random windows; needs no download",
    "mix": "prose, code and chats in turn: C4, or python-docs where it cannot be loaded; "
    "python-code; and that prose in the model's chat template, if it has one",
    "FILE": ".txt, .jsonl or .jsonl.gz (text in the field `text`), "
    "or .safetensors with `input_ids` (windows, tokens)",
    "FOLDER": "for image classifiers: images, or a subfolder of images per class",
}
#: Sources that are texts with a part for calibration and a part for scoring; see `corpora.py`.
CORPORA = ("c4", "wikitext2", "ptb", "python-docs", "python-code")
#: What the source `mix` holds -> its share of the windows, in sum 1. Without a chat template, prose
#: gets the share of the chats as well.
MIX = {"prose": 0.625, "chats": 0.125, "code": 0.25}
#: The sources of text in one phrase, for help texts.
CHOICES = f"{', '.join(CORPORA)}, mix or FILE"
