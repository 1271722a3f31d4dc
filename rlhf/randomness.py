"""Nothing is dropped where nothing is learned from it: in PPO for every model, in scores, in references.

Eval mode is enough, except where gradient checkpointing makes training mode necessary: transformers computes
activations again in that mode alone. There every probability is set to 0, also those that a family keeps as a
number of a module and passes to a function (OPT's `F.dropout(p=self.dropout)`), and so are layer drop and the
noise of routers.
"""

import re

from torch import nn

_NAMES = re.compile("drop|jitter")


def switch_off_randomness(model: nn.Module) -> None:
    """Sets every probability of dropout and every scale of noise in a model's modules to 0."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and _NAMES.search(name):
                setattr(module, name, 0.0)
