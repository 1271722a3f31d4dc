"""Which models can be used: a language model's body with a head for tokens and one for scores.

About half of transformers' causal families have no sequence classifier. For those one is made here in the
way transformers makes its own, from the family's body and a linear `score` layer that reads the last token:
its folder holds config.json and safetensors alone, `AutoModel` opens the body, and score.weight lies
beside it. `rlhf.models.open_reward`, or `classifier_class`, opens the whole.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from lab.errors import LabError, first_line

PARTS_OF_ONE_MODEL = {"attn_config", "ffn_config"}
"""Configurations within one that are no other models'."""
ONLY_WITH_IS_DECODER = ("bert-generation", "xlnet")
"""Bidirectional, though transformers knows no masked language model of them."""


@dataclass(frozen=True)
class Facts:
    """What a model's configuration says, before any weight is read."""

    config: PreTrainedConfig
    """Of the language model; of a model for images or sound as well, that of its text model."""
    positions: int | None
    """Tokens it can read; None: as many as fit in memory."""
    parameters: int
    """Of the language model."""
    stock_score_head: bool
    """Whether `AutoModelForSequenceClassification` opens what `open_reward` makes of it."""


def examine(config: PreTrainedConfig, where: str) -> Facts:
    """Builds both heads on the meta device, from the configuration alone.

    Args:
        config: of any model.
        where: it comes from, for the error.

    Raises:
        LabError: it cannot be policy and reward model, and why, in one line.
    """
    text = text_config(config, where)
    with _building(text, where), torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(text, trust_remote_code=False)
        classifier = classifier_class(text)(text)
    if policy.get_input_embeddings() is None or policy.get_output_embeddings() is None:
        raise LabError(f"{where}: a {text.model_type} does not read and write tokens. Use a language model.")
    return Facts(
        text,
        positions(text),
        sum(parameter.numel() for parameter in policy.parameters()),
        not isinstance(classifier, LastTokenScore),
    )


def text_config(config: PreTrainedConfig, where: str) -> PreTrainedConfig:
    """The configuration of the causal language model that a configuration describes, or contains.

    Raises:
        LabError: it describes none, and why.
    """
    what, use = (
        f"{where}: models of type {config.model_type}",
        "Use a causal language model, such as gpt2 or llama.",
    )
    causal_models = AutoModelForCausalLM._model_mapping
    if getattr(config, "quantization_config", None):
        raise LabError(f"{where}: its weights are quantized, and cannot be trained. Use the model as it was.")
    if config.is_encoder_decoder:
        raise LabError(f"{what} are an encoder with a decoder, and do not continue a text. {use}")
    text = config.get_text_config(decoder=True)
    if text is not config and type(text) in causal_models:
        text = copy.deepcopy(text)
        # Of a whole, transformers asks the whole's configuration whether embeddings and head are one weight.
        text.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
        return text_config(text, where)
    if not type(config).__module__.startswith("transformers."):
        raise LabError(f"{what} are not transformers' own, so no score head can be put on them. {use}")
    if type(config) not in causal_models:
        raise LabError(f"{what} do not continue a text. {use}")
    others = sorted(config.sub_configs.keys() - PARTS_OF_ONE_MODEL)
    if text is not config or others:
        raise LabError(
            f"{what} hold more than one model ({', '.join(others) or 'text_config'}), and transformers does "
            f"not take the one of text out of them. {use}"
        )
    masked = type(config) in AutoModelForMaskedLM._model_mapping or config.model_type in ONLY_WITH_IS_DECODER
    if masked and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False)):
        raise LabError(
            f"{what} are bidirectional: a token sees those after it, so it cannot predict them. {use}"
        )
    with _building(config, where):
        body = _body(config)
    if body is None:
        raise LabError(f"{what} are the decoder of a model with an encoder, and nothing without it. {use}")
    return config


@contextlib.contextmanager
def _building(config: PreTrainedConfig, where: str) -> Iterator[None]:
    """One line for whatever a family's own code raises about a configuration."""
    try:
        yield
    except LabError:
        raise
    except Exception as error:
        raise LabError(
            f"{where}: no {config.model_type} can be built as its config.json says: {first_line(error)[:200]}"
        ) from None


def positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a model can read; None where nothing limits it."""
    number = getattr(config.get_text_config(), "max_position_embeddings", None)
    return number if isinstance(number, int) and number > 0 else None


def classifier_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a reward model with this body: transformers' own where it has a linear `score` layer.

    Raises:
        LabError: no such layer can be put on this family.
    """
    kind = type(config)
    if kind not in _classes:
        _classes[kind] = _find_or_make(config)
    return _classes[kind]


def _find_or_make(config: PreTrainedConfig) -> type[PreTrainedModel]:
    mapping: Any = AutoModelForSequenceClassification._model_mapping
    stock = mapping.get(type(config), None)
    if stock is not None and "score" in _children(stock, config):
        return stock
    found = _body(config)
    if found is None:
        raise LabError(f"{config.model_type}: has no body that a score layer could be put on.")
    family, attribute = found
    made: Any = type(
        f"{family.__name__.removesuffix('PreTrainedModel')}ForSequenceClassification",
        (LastTokenScore, family),
        # The module is that of the family, because transformers reads there what its models can do.
        {"base_model_prefix": attribute, "config_class": type(config), "__module__": family.__module__},
    )
    if stock is None:  # trainers, too, open a folder by this class
        AutoModelForSequenceClassification.register(type(config), made)
    return made


class LastTokenScore(GenericForSequenceClassification):
    """transformers' sequence classifier, told by the mask where a row ends and where it begins.

    transformers takes for the last token the last whose id is not padding's, and counts positions from a
    row's beginning, padding included.
    """

    config: Any
    base_model: Any
    score: nn.Linear

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores of each row's last token, (batch, num_labels), and with labels transformers' usual loss.

        Args:
            input_ids: (batch, time) token ids; or inputs_embeds (batch, time, width).
            attention_mask: (batch, time), 1 for tokens and 0 for padding, on either side; None: without
                `config.pad_token_id` there is no padding, else these ids at the end are.
            labels: (batch,) or (batch, num_labels).
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("give either input_ids or inputs_embeds")
        pad = self.config.pad_token_id
        real = attention_mask
        if real is None and input_ids is not None and pad is not None:
            real = (input_ids != pad).long()
        inputs: dict[str, Any] = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, **kwargs}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
            if position_ids is None and _takes_positions(type(self.base_model)):
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        inputs.pop("return_dict", None)
        outputs = self.base_model(**{name: value for name, value in inputs.items() if value is not None})
        hidden = outputs.last_hidden_state
        if real is None:
            last = hidden[:, -1]
        else:
            time = torch.arange(hidden.shape[1], device=hidden.device)
            last = hidden[torch.arange(len(hidden), device=hidden.device), (real * time).argmax(-1)]
        logits = self.score(last.to(self.score.weight.dtype))
        loss = None
        if labels is not None:
            loss = self.loss_function(  # type: ignore[attr-defined]
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=getattr(outputs, "hidden_states", None)
        )


def read_any_format(score: nn.Module) -> None:
    """Lets a linear layer kept in fp32 read hidden states of a body that is kept in bf16."""
    score.register_forward_pre_hook(_in_format_of_weight)


def _in_format_of_weight(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].to(layer.weight.dtype), *inputs[1:])


def check_causal(model: Any, where: str) -> None:
    """Raises a `LabError` if what a token is predicted from holds the token itself, or one after it.

    That is what a bidirectional model, or one that is told to be, would learn to copy from.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=model.device) % vocabulary
    training = model.training
    model.eval()
    with torch.no_grad():
        one, other = model(input_ids=ids, use_cache=False).logits[:, :3].float()
    model.train(training)
    if (one - other).abs().max() > 1e-3 * one.abs().max().clamp_min(1e-6):
        raise LabError(
            f"{where}: is bidirectional: what it says of a token depends on those after it, so it cannot "
            "predict them. Use a causal language model, such as gpt2 or llama."
        )


@functools.cache
def _takes_positions(body: type[nn.Module]) -> bool:
    import inspect

    return "position_ids" in inspect.signature(body.forward).parameters


_classes: dict[type[PreTrainedConfig], type[PreTrainedModel]] = {}
"""Of reward models, by the class of the configuration: made once."""


def _body(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], str] | None:
    """The base class of a family's models, and the attribute under which the language model has its body."""
    causal_models: Any = AutoModelForCausalLM._model_mapping
    language_model = causal_models[type(config)]
    families = [c for c in language_model.__mro__ if c.__name__.endswith("PreTrainedModel")]
    body = AutoModel._model_mapping.get(type(config), None)
    names = [name for name, kind in _children(language_model, config).items() if kind is body]
    return (families[0], names[0]) if names and families[0] is not PreTrainedModel else None


def _children(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, type]:
    """The modules directly below a model of this class."""
    with torch.device("meta"):
        return {name: type(module) for name, module in model_class._from_config(config).named_children()}
