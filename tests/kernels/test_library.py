"""How the compiled kernels are found and called, and what a run says where there are none.

Their results are compared with slow references in tests/methods: `test_statistics.py` for the Gram
matrix, `test_group_quantizer.py` for codewords. `sanitize.sh` looks for memory errors.
"""

import itertools

import pytest
import torch

from command_line import call
from processors import processor_threads
from prunus.kernels import library
from recovery_cases import training_text
from refusals import assert_refused
from tiny_tokenizer import dense_checkpoint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in place of the room, with no kernels in it."""
    monkeypatch.delenv("PRUNUS_ISA", raising=False)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    library._load_library.cache_clear()
    yield tmp_path
    library._load_library.cache_clear()


@pytest.fixture
def best():
    if (opened := library.load_kernels("best")) is None:
        pytest.skip(f"no kernels: {library.why_not()}")
    return opened


def test_unknown_instruction_set():
    assert_refused(ValueError, ", ".join(library.ISAS), library.load_kernels, "sse9")


def test_an_instruction_set_that_the_machine_lacks_is_refused(best, monkeypatch):
    monkeypatch.setattr(library, "ISAS", (*library.ISAS, "next"))
    assert_refused(ValueError, "this machine has no next", library.load_kernels, "next")


def test_the_reason_is_said_where_the_library_is_missing_broken_or_old(best, folder, monkeypatch):
    assert "install a C++17 compiler and reinstall" in str(library.why_not())
    library._load_library.cache_clear()
    (folder / "_kernels.so").write_text("not a library")
    assert "_kernels.so cannot be opened" in str(library.why_not())
    library._load_library.cache_clear()
    (folder / "_kernels.so").unlink()
    (folder / "_kernels.so").symlink_to(best.library._name)
    assert library.why_not() is None
    library._load_library.cache_clear()
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    assert "was built from another version of prunus: reinstall" in str(library.why_not())


def test_threads_are_those_of_torch_and_do_not_change_the_result(best):
    assert library._use_threads_of_torch(best.library), "torch brings an OpenMP library on Linux"
    target_WCO, importance_WC = torch.rand(3, 4, 500), torch.rand(3, 4)
    grid_KC = torch.tensor([*itertools.product((1.0, 3.0, 5.0), repeat=4)])
    results = []
    for threads in (1, 3):
        found = torch.empty(3, 500), torch.empty(3, 500, dtype=torch.int32)
        gram_II = torch.zeros(70, 70)
        with processor_threads(threads):
            arrays = (target_WCO, importance_WC, grid_KC)
            best.call("prunus_find_codewords", *target_WCO.shape, len(grid_KC), *arrays, *found)
            if best.has_bfloat16:
                best.add_gram(gram_II, target_WCO.view(-1)[:5950].view(85, 70).bfloat16())
        results.append((*found, gram_II))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_wrong_arguments_are_refused(best):
    arrays = (torch.ones(1, 5, 1), torch.ones(1, 5), torch.ones(1, 5), torch.ones(1), torch.ones(1))
    with pytest.raises(RuntimeError, match="an argument is out of range"):
        best.call("prunus_find_codewords", 1, 5, 1, 1, *arrays)
    if not best.has_bfloat16:
        with pytest.raises(RuntimeError, match="lacks the instruction set"):
            best.add_gram(torch.zeros(1, 1), torch.ones(1, 1).bfloat16())


def test_a_run_that_would_use_the_kernels_says_once_that_there_are_none(folder, monkeypatch):
    text, dense = training_text(folder), dense_checkpoint(folder / "dense")

    def words(out: str, method: str) -> int:
        options = ["--method", method, "--calibration", text, "--samples", 4, "--seqlen", 16]
        said = call("prune", dense, folder / out, *options).stderr
        return said.count(
            "prunus runs without its compiled kernels, and may take longer: they were"
        )

    assert words("a", "sparsegpt") == 1
    assert words("b", "wanda") == 0, "it needs no Gram matrix"
    monkeypatch.setenv("PRUNUS_ISA", "off")
    assert words("c", "sparsegpt") == 0, "whoever switched them off knows"
