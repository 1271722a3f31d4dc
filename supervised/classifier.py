"""A backbone with linear layers behind it: one for the answer, and one for each auxiliary classifier."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lab.errors import LabError


class Classifier(nn.Module):
    """Numbers for each class, or other outputs, from the features of a backbone.

    Args:
        backbone: from `supervised.backbones.build`. One with auxiliary classifiers says the widths of their
            features as `aux_num_features`, and gives them by `forward_with_aux`.
        num_classes: outputs.
        dropout: probability, on the features, beside whatever dropout the backbone has.

    Shapes: what the backbone takes -> (batch, num_classes).
    """

    def __init__(self, backbone: Any, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(backbone.num_features, num_classes)
        widths = getattr(backbone, "aux_num_features", ())
        self.aux_heads = nn.ModuleList(nn.Linear(width, num_classes) for width in widths)

    def forward(self, inputs: Tensor, with_aux: bool = False) -> Any:
        """Logits; with `with_aux`, for training, a list of these and of each auxiliary classifier's.

        An argument and no method of its own, because what wraps a model (for autocast, several devices or
        compilation) wraps `forward`.
        """
        if not with_aux:
            return self.head(self.dropout(self.backbone(inputs)))
        if not self.aux_heads:
            return [self(inputs)]
        features, others = self.backbone.forward_with_aux(inputs)
        aux = [head(other) for head, other in zip(self.aux_heads, others, strict=True)]
        return [self.head(self.dropout(features)), *aux]


HEADS = ("head.", "aux_heads.")


def load_published(classifier: Classifier, state: Mapping[str, Tensor], *, heads: bool = True) -> None:
    """Gives a classifier weights that bear another library's names (torchvision's, timm's, transformers').

    Auxiliary classifiers are left out where the backbone has none.

    Args:
        classifier: over a backbone whose class says how others name its weights, `published_names`: patterns
            and what to put in their place, one after the other.
        state: the weights by name.
        heads: also those of the last layers; without, they stay as they are, e.g. for other classes.

    Raises:
        LabError: no such names are known, or a weight is lacking, left over or of another shape.
    """
    kind = type(classifier.backbone)
    if not hasattr(kind, "published_names"):
        raise LabError(f"{kind.__name__}: no other library's names are known. Load a run of this lab.")
    own = classifier.state_dict()
    found = {} if heads else {key: value for key, value in own.items() if key.startswith(HEADS)}
    for key, value in state.items():
        for pattern, replacement in kind.published_names:
            key = re.sub(pattern, replacement, key)
        if key.startswith(("aux.", "aux_heads.")) and not classifier.aux_heads:
            continue
        if key.startswith(HEADS):
            if heads:
                found[key] = value
        elif ".qkv." in key:  # timm's one matrix for three
            parts = zip("qkv", value.chunk(3), strict=True)
            found |= {"backbone." + key.replace(".qkv.", f".{name}."): part for name, part in parts}
        else:
            found["backbone." + key] = value
    for key in own.keys() - found.keys():
        if key.endswith(".num_batches_tracked"):  # old files have none, and nothing reads it
            found[key] = own[key]
    for key in sorted(own.keys() | found.keys()):
        ours, theirs = (tuple(tensors[key].shape) if key in tensors else "none" for tensors in (own, found))
        if ours != theirs:
            raise LabError(
                f"{kind.__name__}: the published weights do not fit: {key} is {theirs}, not {ours}. "
                "Build the backbone with the published options."
            )
    classifier.load_state_dict(found)
