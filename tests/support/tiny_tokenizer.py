"""A tokenizer for tests that needs no download: every UTF-8 byte of a text is one token."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tiny import tiny_checkpoint

BOS, EOS = 0, 1
VOCABULARY = 258  # BOS, EOS and 256 bytes


def byte_tokenizer(*, bos: bool = False, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": BOS, "</s>": EOS, **{byte: 2 + index for index, byte in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    extra = {} if max_length is None else {"model_max_length": max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **extra
    )


def dense_checkpoint(folder: Path, *arguments: Any, **options: Any) -> Path:
    """Make a `tiny_checkpoint` with a tokenizer of bytes."""
    tiny_checkpoint(folder, *arguments, vocab_size=VOCABULARY, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder
