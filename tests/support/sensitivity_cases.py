"""How the loss depends on the outputs of linears, by autograd through a whole model in memory.

Shape suffixes: O outputs, I inputs, T tokens, V words of the vocabulary.
"""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tiny import token_ids

IDS = token_ids(4, 16)


def whole_model(
    folder, seed: int = 0, by_inputs: bool = False
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Name of a linear or embedding -> weight, mean squared gradient of outputs, and inputs (T, …).

    The whole model runs in memory, one window at a time, with plain hooks. With `by_inputs` the
    gradient of each token is multiplied by the length of its input, in units of their root mean
    square.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def observe(name: str, _module, args, output) -> None:
        output.retain_grad()
        shown = args[0].detach().flatten(0, -2 if args[0].dim() > 2 else -1)
        seen.setdefault(name, []).append((shown, output))

    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    for name, module in linears.items():
        module.register_forward_hook(partial(observe, name))
    for window in IDS.split(1):
        log_p_TV = model(window).logits[0].log_softmax(dim=-1)
        drawn = torch.multinomial(log_p_TV.detach().exp(), 1, generator=generator)
        log_p_TV.gather(1, drawn).sum().backward()
    found = {}
    for name, module in linears.items():
        X_TI = torch.cat([shown for shown, _ in seen[name]])
        gradient_TO = torch.cat([output.grad.flatten(0, -2) for _, output in seen[name]])
        if by_inputs and X_TI.is_floating_point():
            lengths_T = X_TI.norm(dim=1)
            gradient_TO *= lengths_T[:, None] / lengths_T.square().mean().sqrt()
        found[name] = (module.weight.detach(), gradient_TO.square().mean(dim=0), X_TI)
    return found
