"""Methods that are composed of a mask and a weight update."""

import pytest
import torch

import reference
from method_cases import example, gather
from prunus.methods import METHODS, MethodOptions, compose
from prunus.methods.patterns import Pattern


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(2, 4)], ids=repr)
def test_the_update_fits_the_weights_to_the_mask_of_the_method(pattern):
    weight_OI, X_TI = example(8, 24)
    options = MethodOptions(weight_update="least-squares", damping=0.02)
    method = compose(METHODS["wanda"], options)
    pruned = method.prune(weight_OI, gather(X_TI), pattern, 0.5, options)
    keep_OI = METHODS["wanda"].prune(weight_OI, gather(X_TI), pattern, 0.5).keep_OI
    assert torch.equal(pruned.keep_OI, keep_OI)
    expected = reference.least_squares(weight_OI, keep_OI, gather(X_TI).gram_II, 0.02)
    torch.testing.assert_close(pruned.weight_OI.double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(4, 4)], ids=repr)
def test_nothing_to_remove_changes_nothing(name, pattern):
    weight_OI, X_TI = example(5, 12)
    options = MethodOptions(weight_update="least-squares")
    pruned = compose(METHODS[name], options).prune(weight_OI, gather(X_TI), pattern, 0.0, options)
    assert torch.equal(pruned.weight_OI.view(torch.int32), weight_OI.view(torch.int32))
