"""Where numbers stop being finite: the module whose output or gradient is the first."""

import torch
from torch import nn


class NonFinite(ArithmeticError):
    """The loss or the gradient is infinite or not a number."""


class Anomaly:
    """Watches every module and parameter of a model while it trains; it looks at each tensor, so it is slow.

    `found` says what was not finite first, with the module's dotted name and class; '' for nothing so far.
    """

    def __init__(self, model: nn.Module):
        self.found = ""
        for name, module in model.named_modules():
            where = f"{name or 'the model'} ({type(module).__name__})"
            module.register_forward_hook(lambda m, args, out, where=where: self._forward(m, args, out, where))
            for kind, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    self._watch(parameter, f"gradient of {where}, {kind}")

    def _look(self, tensor: torch.Tensor, what: str) -> None:
        if not self.found and not tensor.detach().isfinite().all():
            self.found = what

    def _watch(self, tensor: torch.Tensor, what: str) -> None:
        """Look at a tensor's gradient; of several names the last counts: the module it went into, not its source."""
        if not hasattr(tensor, "watched"):
            tensor.watched = names = []  # the hook must not hold the tensor that holds it
            tensor.register_hook(lambda grad: self._look(grad, names[-1]))
        tensor.watched.append(what)

    def _forward(self, module: nn.Module, inputs: tuple, outputs, where: str) -> None:
        """Look at a module's outputs now, and later at the gradients that reach it and that it passes on."""
        if not module.training:
            return
        for tensor in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            self._look(tensor, f"output of {where}")
            if tensor.requires_grad:
                self._watch(tensor, f"gradient that reaches {where} from behind")
        for tensor in inputs:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                self._watch(tensor, f"gradient that {where} passes on")
