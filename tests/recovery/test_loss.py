"""Loss, schedule and training text, against slow and obvious versions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional

from prunus.calibration.training_text import training_text
from prunus.calibration.windows import WindowRequest
from prunus.engine.reconstruction.train import learning_rate
from prunus.training import loss as training
from prunus.training.loss import next_token_loss
from tiny_tokenizer import EOS, byte_tokenizer


def obvious_loss(logits, ids, teacher, weight):
    """Both terms by torch's own functions, in float64, without any slicing."""
    q = logits.double()[:, :-1].flatten(0, 1).log_softmax(-1)
    text = functional.nll_loss(q, ids[:, 1:].flatten())
    if teacher is None:
        return text
    p = teacher.double()[:, :-1].flatten(0, 1).log_softmax(-1)
    return (
        weight * functional.kl_div(q, p, log_target=True, reduction="batchmean")
        + (1 - weight) * text
    )


@settings(max_examples=30, deadline=None)
@given(
    windows=st.integers(1, 3),
    tokens=st.integers(2, 40),
    vocabulary=st.integers(1, 50),
    weight=st.floats(0.01, 1.0),
    taught=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradient_are_those_of_formula(windows, tokens, vocabulary, weight, taught, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(windows, tokens, vocabulary, generator=generator).mul_(3).requires_grad_()
    ids = torch.randint(0, vocabulary, (windows, tokens), generator=generator)
    teacher = (
        torch.randn(windows, tokens, vocabulary, generator=generator).mul_(3) if taught else None
    )
    loss = next_token_loss(logits, ids, teacher, weight)
    expected = obvious_loss(logits, ids, teacher, weight)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss * 2, logits)
    (wanted,) = torch.autograd.grad(expected * 2, logits)
    torch.testing.assert_close(gradient, wanted.float(), rtol=1e-4, atol=1e-6)


def test_the_number_of_rows_at_a_time_changes_nothing_but_the_last_bits(monkeypatch):
    logits, ids = torch.randn(2, 60, 11, requires_grad=True), torch.randint(0, 11, (2, 60))
    whole = next_token_loss(logits, ids)
    monkeypatch.setattr(training, "_ROWS", 7)
    parts = next_token_loss(logits, ids)
    torch.testing.assert_close(whole, parts)


def test_the_loss_of_bfloat16_logits_has_a_bfloat16_gradient():
    logits = torch.randn(1, 9, 5, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, 5, (1, 9))
    next_token_loss(logits, ids).backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
    exact = logits.detach().float().requires_grad_()
    next_token_loss(exact, ids).backward()
    torch.testing.assert_close(logits.grad.float(), exact.grad, atol=2e-3, rtol=1e-2)


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine():
    rates = [learning_rate(2.0, share / 100, warmup=0.1) for share in range(101)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0), "half way down"
    assert rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(2.0, 1.3) == pytest.approx(0), "a step that overshoots a budget in minutes"
    assert learning_rate(2.0, 0.0) == 2.0


# --- training text ---


def documents_file(tmp_path, count=12):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(f'{{"text": "{chr(97 + i) * (9 + i)}"}}\n' for i in range(count)))
    return path


def text_of(path, seqlen=8, held_out=2, **options):
    request = WindowRequest(**{"seqlen": seqlen, "tokenizer": byte_tokenizer} | options)
    return training_text(str(path), request, held_out)


def test_every_token_of_the_documents_is_used_once_before_any_is_used_twice(tmp_path):
    path = documents_file(tmp_path)
    total = sum(9 + i + 1 for i in range(12)) // 8  # an end-of-text token after each
    text = text_of(path)
    rows = torch.cat([text.held_out, text.windows(0, total - 2)])
    seen = rows.flatten().tolist()
    letters = [token for token in seen if token != EOS]
    # Runs of one letter, each as long as its document, in some order.
    runs = [(letter, letters.count(letter)) for letter in dict.fromkeys(letters)]
    spelled = "".join(byte_tokenizer().decode([letter]) * count for letter, count in runs[:-1])
    for letter in set(spelled):
        assert spelled.count(letter) == 9 + ord(letter) - 97
    again = text.windows(total - 2, total - 2)
    assert not torch.equal(again, text.windows(0, total - 2)), "another order the second time"
    assert sorted(map(tuple, again.tolist())) == sorted(
        map(tuple, text.windows(0, total - 2).tolist())
    )


def test_held_out_windows_are_never_trained_on(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(str(number) for number in range(400)))
    text = text_of(path, held_out=5)
    held_out = set(map(tuple, text.held_out.tolist()))
    trained = set(map(tuple, text.windows(0, 900).tolist()))
    assert len(held_out) == 5
    assert not held_out & trained


def test_windows_depend_on_the_seed_and_on_nothing_that_was_asked_before(tmp_path):
    path = documents_file(tmp_path)
    one, other = text_of(path), text_of(path)
    late = one.windows(9, 3)
    other.windows(0, 2)
    torch.testing.assert_close(other.windows(9, 3), late)
    assert one.sha256 == other.sha256
    assert text_of(path, seed=1).sha256 != one.sha256


def test_ids_from_a_file_need_no_tokenizer_and_rows_are_not_run_together(tmp_path):
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.arange(60).view(3, 20)}, path)
    text = text_of(path, tokenizer=None, held_out=1)
    rows = torch.cat([text.held_out, text.windows(0, 5)])
    assert sorted(row[0] for row in rows.tolist()) == [0, 8, 20, 28, 40, 48]
    assert all(row[-1] - row[0] == 7 for row in rows.tolist())
