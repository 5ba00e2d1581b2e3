"""How the loss depends on the outputs of linears, by autograd through a whole model in memory.

Shape suffixes: O outputs, I inputs, T tokens, V words of the vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tiny import token_ids

IDS = token_ids(4, 16)


def whole_model(folder, seed: int = 0) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Name of a linear or embedding -> weight, mean squared gradient of outputs, and inputs (T, …).

    The whole model runs in memory, one window at a time, with plain hooks.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}

    def hook(name: str):
        def observe(_module, args, output):
            output.retain_grad()
            shown = args[0].detach()
            inputs.setdefault(name, []).append(shown.flatten(0, -2 if shown.dim() > 2 else -1))
            outputs.setdefault(name, []).append(output)

        return observe

    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    for name, module in linears.items():
        module.register_forward_hook(hook(name))
    for window in IDS.split(1):
        log_p_TV = model(window).logits[0].log_softmax(dim=-1)
        drawn = torch.multinomial(log_p_TV.detach().exp(), 1, generator=generator)
        log_p_TV.gather(1, drawn).sum().backward()
    found = {}
    for name, module in linears.items():
        gradient_TO = torch.cat([output.grad.flatten(0, -2) for output in outputs[name]])
        squares_O = gradient_TO.square().mean(dim=0)
        found[name] = (module.weight.detach(), squares_O, torch.cat(inputs[name]))
    return found
