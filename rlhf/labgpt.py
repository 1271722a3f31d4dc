"""LabGPT as transformers and TRL know models, and the plain folders of theirs that it is kept in.

The models here are thin: `LabGPT` computes, transformers' base classes generate, save and are trained by
TRL. Importing this module registers them with transformers' Auto classes.
"""

import contextlib
import inspect
import math
import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Cache,
    DynamicCache,
    GenerationMixin,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from lab.errors import LabError
from lab.files import explain_write_errors, read_json, sync_folder
from lab.hub import from_pretrained
from supervised.backbones.ragged import Ragged, Tails
from supervised.backbones.transformer import (
    INIT_STD,
    Block,
    LabGPT,
    ScaledLinear,
    default_mlp_width,
    init_weights,
    look_up,
)

MARKER = "lab_gpt"
"""The key that says in a stock folder's config.json that a LabGPT was saved there."""


class LabGPTConfig(PreTrainedConfig):
    """The options of `LabGPT`, by its names and by transformers' (hidden_size, num_hidden_layers ...)."""

    model_type = "lab_gpt"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "width",
        "intermediate_size": "mlp_width",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "max_positions",
    }
    auto_map: ClassVar[dict[str, str]] = {}  # TRL looks into it for classes that transformers does not export

    vocab_size: int = 50257
    width: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int | None = None
    mlp_width: int | None = None
    max_positions: int = 512
    positions: str = "rotary"
    norm_position: str = "pre"
    norm: str = "rms"
    mlp: str = "swiglu"
    bias: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    dropout: float = 0.0
    embedding_norm: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        self.mlp_width = default_mlp_width(self.mlp, self.width) if self.mlp_width is None else self.mlp_width

    def options(self) -> dict[str, Any]:
        """What `LabGPT` and `supervised.backbones.build("gpt", ...)` take."""
        return {name: getattr(self, name) for name in inspect.signature(LabGPT).parameters}


class CheckpointedBlock(GradientCheckpointingLayer, Block):
    """A block whose activations can be computed again in the backward pass instead of kept."""


class CheckpointedGPT(LabGPT):
    """The same LabGPT, of blocks that transformers can switch to gradient checkpointing."""

    block_class = CheckpointedBlock


class LabGPTPreTrainedModel(PreTrainedModel):
    """What the models below share with each other and with transformers."""

    config: LabGPTConfig
    config_class = LabGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["CheckpointedBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": CheckpointedBlock}

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module)


class LabGPTModel(LabGPTPreTrainedModel):
    """`LabGPT` (as `.gpt`) behind transformers' interface for models without a head."""

    takes_documents = True

    def __init__(self, config: LabGPTConfig) -> None:
        super().__init__(config)
        if config._attn_implementation != "sdpa":
            raise ValueError(f"attn_implementation {config._attn_implementation!r}: LabGPT has 'sdpa' alone")
        with no_init_weights():  # `post_init` does it, unless weights are about to be loaded
            self.gpt = CheckpointedGPT(**config.options())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:  # the models with heads ask this one
        return self.gpt.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.gpt.tokens = value  # type: ignore[assignment]

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        documents: Ragged | None = None,
        wanted: Tails | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Features of every token, as transformers' models compute them, with three rules of its own.

        Positions that are not passed follow from the attention mask, so padding on the left shifts nothing.
        A cache is made only when `use_cache` asks for it, as `generate` does: training needs none, and
        transformers tells packed documents apart only without one. A forward pass without a cache reads
        nothing back from the device.

        Args:
            input_ids: (batch, time) token ids; or inputs_embeds.
            attention_mask: (batch, past + time), 1 for tokens and 0 for padding; None: no padding; or
                (batch, 1, time, keys), as `LabGPT.forward` takes it.
            position_ids: (batch or 1, time). Without mask and cache, a document starts wherever they do not
                count on, and does not see those before it.
            past_key_values: keys and values of the past tokens.
            inputs_embeds: (batch, time, width).
            use_cache: make a cache if none is passed.
            documents, wanted: see `LabGPT.forward`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is not None:
            inputs_embeds = look_up(self.gpt.tokens, input_ids, "token ids")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        x, cache = inputs_embeds, past_key_values
        assert x is not None
        mask = attention_mask if documents else self._mask(x, attention_mask, position_ids, cache)
        if position_ids is None and documents is None:
            position_ids = _positions(x, attention_mask, cache)
        hidden = self.gpt(
            inputs_embeds=x,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            documents=documents,
            wanted=wanted,
        )
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    def _mask(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> Tensor | None:
        """The mask of shape (batch, 1, time, keys), or None where plain causal attention is meant.

        To find that out from a mask or from positions, transformers reads them back from the device. It may
        with a cache, because `generate` waits for every token anyway, but not in training.
        """
        documents = None
        if cache is not None:
            may_be_none = not cache.is_compileable  # a static cache has room behind the tokens it holds
        else:
            if attention_mask is None and position_ids is not None:
                documents = _documents(position_ids)
            may_be_none = attention_mask is None and documents is None
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=cache,
            allow_is_causal_skip=may_be_none,
        )
        if mask is None or documents is None:
            return mask
        return mask & (documents[:, None, :, None] == documents[:, None, None, :])


class LabGPTForCausalLM(LabGPTPreTrainedModel, GenerationMixin):
    """A language model: LabGPT and a linear layer to the vocabulary, which is the embedding's when tied."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.gpt.tokens.weight"}

    def __init__(self, config: LabGPTConfig) -> None:
        super().__init__(config)
        self.model = LabGPTModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    if TYPE_CHECKING:  # transformers annotates `generate` so that none of its models may call it

        def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and with labels the loss; see `LabGPTModel.forward` for the inputs.

        Args:
            labels: (batch, time) token ids, shifted in here; -100 does not count.
            logits_to_keep: only the last so many positions (0: all), or the positions to keep.
            kwargs: what else transformers passes: num_items_in_batch, output_hidden_states, return_dict ...

        Returns:
            logits (batch, kept, vocab_size); loss in nats per token that counts.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


class LabGPTForSequenceClassification(LabGPTPreTrainedModel):
    """A reward model: LabGPT and a linear layer without bias that scores the last token.

    The layer starts with standard deviation 1 / sqrt(width + 1) (arXiv 2403.17031).
    """

    def __init__(self, config: LabGPTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LabGPTModel(config)
        self.score = ScaledLinear(
            config.width, config.num_labels or 1, bias=False, init_std=1 / math.sqrt(config.width + 1)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores of the last token that is not padding, on whichever side the padding is.

        The mask says what is padding, never the ids: where pad and end of sequence are one token, ids lie.

        Args:
            attention_mask: (batch, time), 1 for tokens and 0 for padding; None: no padding.
            labels: (batch,) or (batch, num_labels), for transformers' usual losses.

        Returns:
            logits (batch, num_labels), and with labels the loss.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if attention_mask is None:
            last = hidden[:, -1]
        else:
            time = torch.arange(hidden.shape[1], device=hidden.device)
            last_index = (attention_mask[:, -hidden.shape[1] :] * time).argmax(-1)
            last = hidden[torch.arange(len(hidden), device=hidden.device), last_index]
        logits = self.score(last)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


def _positions(x: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor | None:
    """Positions (batch or 1, time) of the embeddings `x`; None: from 0."""
    time = x.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -time:]
    if cache is None:
        return None
    return torch.arange(time, device=x.device)[None] + cache.get_seq_length()


def _documents(position_ids: Tensor) -> Tensor:
    """The number of each token's document, (batch or 1, time); the next begins where positions jump."""
    return (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)


AutoConfig.register(LabGPTConfig.model_type, LabGPTConfig, exist_ok=True)
AutoModel.register(LabGPTConfig, LabGPTModel, exist_ok=True)
AutoModelForCausalLM.register(LabGPTConfig, LabGPTForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(LabGPTConfig, LabGPTForSequenceClassification, exist_ok=True)

Head = Literal["causal_lm", "reward"]
LabModel = LabGPTForCausalLM | LabGPTForSequenceClassification

_AUTO: dict[str, Any] = {"causal_lm": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}

_STOCK_NAMES = {
    "gpt2": {
        "model.gpt.tokens": "transformer.wte",
        "model.gpt.positions": "transformer.wpe",
        "model.gpt.blocks.*.attention_norm": "transformer.h.*.ln_1",
        "model.gpt.blocks.*.attention.q": "transformer.h.*.attn.c_attn",
        "model.gpt.blocks.*.attention.k": "transformer.h.*.attn.c_attn",
        "model.gpt.blocks.*.attention.v": "transformer.h.*.attn.c_attn",
        "model.gpt.blocks.*.attention.out": "transformer.h.*.attn.c_proj",
        "model.gpt.blocks.*.mlp_norm": "transformer.h.*.ln_2",
        "model.gpt.blocks.*.mlp.up": "transformer.h.*.mlp.c_fc",
        "model.gpt.blocks.*.mlp.out": "transformer.h.*.mlp.c_proj",
        "model.gpt.norm": "transformer.ln_f",
        "lm_head": "lm_head",
        "score": "score",
    },
    "llama": {
        "model.gpt.tokens": "model.embed_tokens",
        "model.gpt.blocks.*.attention_norm": "model.layers.*.input_layernorm",
        "model.gpt.blocks.*.attention.q": "model.layers.*.self_attn.q_proj",
        "model.gpt.blocks.*.attention.k": "model.layers.*.self_attn.k_proj",
        "model.gpt.blocks.*.attention.v": "model.layers.*.self_attn.v_proj",
        "model.gpt.blocks.*.attention.out": "model.layers.*.self_attn.o_proj",
        "model.gpt.blocks.*.mlp_norm": "model.layers.*.post_attention_layernorm",
        "model.gpt.blocks.*.mlp.gate": "model.layers.*.mlp.gate_proj",
        "model.gpt.blocks.*.mlp.up": "model.layers.*.mlp.up_proj",
        "model.gpt.blocks.*.mlp.out": "model.layers.*.mlp.down_proj",
        "model.gpt.norm": "model.norm",
        "lm_head": "lm_head",
        "score": "score",
    },
}
"""Where a stock model keeps what a LabGPT has; * is the layer. GPT-2 has q, k and v in one matrix."""


def save_stock(model: LabModel, folder: str | Path) -> None:
    """Saves a LabGPT as a folder that transformers opens without this package, where an architecture allows.

    With learned positions, pre layer norm, gelu_tanh, biases and no grouped queries it becomes a GPT-2; with
    rotary positions, pre RMS norm and swiglu a Llama: stock `AutoModelForCausalLM` (or, of a reward model,
    `AutoModelForSequenceClassification`) computes the same numbers from it. Three things differ there: GPT-2
    must be passed position_ids when a batch is padded on the left, reward models tell padding by its id, and
    Llama has dropout on attention weights alone. All other options, e.g. post-norm, no stock architecture
    has: such a model is saved in a format of its own, which needs `import rlhf.labgpt` to be opened. `load`
    opens both.

    Files of that name in the folder are replaced, config.json last; others, e.g. a tokenizer's, stay.

    Raises:
        LabError: the folder cannot be written, or a reward model has no padding token.
    """
    folder = Path(folder)
    if isinstance(model, LabGPTForSequenceClassification) and model.config.pad_token_id is None:
        raise LabError(
            f"{folder}: not written: stock reward models find the last token by config.pad_token_id, "
            "which is None. Set it to the tokenizer's pad_token_id."
        )
    aside = folder.absolute().with_name(f".writing-{folder.absolute().name}")
    with explain_write_errors(str(folder), "Free some space, or name another folder."):
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            with _quiet():
                _as_stock(model).save_pretrained(aside)
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(aside.iterdir(), key=lambda file: file.name == "config.json"):
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
                file.replace(folder / file.name)
            sync_folder(folder)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(0, str(error)) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@overload
def load(folder: str | Path, head: Literal["causal_lm"] = "causal_lm") -> LabGPTForCausalLM: ...
@overload
def load(folder: str | Path, head: Literal["reward"]) -> LabGPTForSequenceClassification: ...
def load(folder: str | Path, head: Head = "causal_lm") -> LabModel:
    """Opens as a LabGPT what `save_stock` wrote, or any GPT-2 or Llama folder that a LabGPT can compute.

    A reward model can be made of a language model: it gets a fresh scoring layer, drawn from torch's random
    state with standard deviation 1 / sqrt(width + 1) (arXiv 2403.17031). Only safetensors are read, and only
    from this machine. The model comes in evaluation mode and in the number format it was saved in.

    Raises:
        LabError: no such folder, nothing in it that a LabGPT can compute, or weights that do not fit.
        ValueError: no such head.
    """
    if head not in _AUTO:
        raise ValueError(f"head {head!r} is none of {tuple(_AUTO)}")
    folder = Path(folder)
    stock_config = _read_config(folder)
    config = _lab_config(stock_config, folder)
    architecture = (stock_config.architectures or [""])[0]
    held: Head = "reward" if architecture.endswith("ForSequenceClassification") else "causal_lm"
    if (held, head) == ("reward", "causal_lm"):
        raise LabError(f"{folder}: holds a reward model, no language model. Load it with head='reward'.")
    with _quiet():
        stock = _read_weights(folder, held)

    config.name_or_path = folder  # where trainers look for the reference model
    if held != head:
        config.num_labels = 1
    with torch.device("meta"):
        model = LabGPTForCausalLM(config) if head == "causal_lm" else LabGPTForSequenceClassification(config)
    names = [name for name in model.state_dict() if held == head or name != "score.weight"]
    weights = _from_stock(stock.state_dict(), names, stock_config.model_type)
    if isinstance(model, LabGPTForCausalLM):
        model.generation_config = stock.generation_config
    elif held != head:
        fresh = torch.empty(model.score.weight.shape, dtype=stock.dtype)
        weights["score.weight"] = nn.init.normal_(fresh, std=model.score.init_std)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()


def computes(folder: Path) -> bool:
    """Whether the folder holds a model that `load` opens as a LabGPT which is trained as the original is."""
    if not (folder / "config.json").is_file():
        return False
    with contextlib.suppress(LabError):
        stock = _read_config(folder)
        only_in_attention = stock.model_type == "llama"  # where a LabGPT has dropout in other places, too
        return not (_lab_config(stock, folder).dropout and only_in_attention)
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and tables of keys; what matters of these is in our errors."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _read_config(folder: Path) -> PreTrainedConfig:
    remedy = "Name a folder written by save_stock or by transformers' save_pretrained."
    if not folder.is_dir():
        raise LabError(f"{folder}: no such folder. {remedy}")
    if not (folder / "config.json").is_file():
        raise LabError(f"{folder}: holds no model: it has no config.json. {remedy}")
    read_json(folder / "config.json", "a model's configuration")
    try:
        return from_pretrained(AutoConfig, folder, local_files_only=True)
    except LabError:
        raise
    except Exception as error:  # transformers raises whatever the file's mistake leads to
        raise LabError(f"{folder / 'config.json'}: describes no model ({_line(error)}). {remedy}") from error


def _read_weights(folder: Path, head: Head) -> PreTrainedModel:
    """The stock model in the folder, with exactly the weights that its config.json asks for."""
    remedy = "Restore the folder from a copy."
    try:
        model, report = from_pretrained(
            _AUTO[head],
            folder,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported instead
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise LabError(f"{folder}: its weights cannot be loaded ({_line(error)}). {remedy}") from error
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise LabError(
            f"{folder}: {name} is {tuple(found)}, by config.json it should be {tuple(expected)}. {remedy}"
        )
    for problem, what in (("missing_keys", "lack"), ("unexpected_keys", "have, unlike config.json,")):
        if names := sorted(report[problem]):
            raise LabError(f"{folder}: its weights {what} {names[0]} ({len(names)} in all). {remedy}")
    return model


def _line(error: Exception) -> str:
    """An error in one short line."""
    return textwrap.shorten(str(error), 120, placeholder=" ...").rstrip(".")


def _as_stock(model: LabModel) -> PreTrainedModel:
    """The model as an instance of a stock class, with the same tensors; or itself, where there is no such."""
    config = _stock_config(model.config)
    if config is None:
        return model
    causal_lm = isinstance(model, LabGPTForCausalLM)
    with torch.device("meta"):
        stock = _AUTO["causal_lm" if causal_lm else "reward"].from_config(config)
    stock.load_state_dict(_to_stock(model.state_dict(), config.model_type), assign=True)
    stock.tie_weights()
    if causal_lm:
        stock.generation_config = model.generation_config
    return stock


def _stock_config(config: LabGPTConfig) -> GPT2Config | LlamaConfig | None:
    """The configuration of the stock architecture that computes the same, if there is one."""
    shared: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "hidden_size": config.width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "initializer_range": INIT_STD,
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "id2label": config.id2label,
        "label2id": config.label2id,
        "problem_type": config.problem_type,
        MARKER: True,
        **_extras(config),
    }
    assert config.mlp_width is not None  # filled in by the configuration itself
    if config.embedding_norm:
        return None
    kind = (config.positions, config.norm_position, config.norm, config.mlp)
    if kind == ("learned", "pre", "layer", "gelu_tanh") and config.bias and config.n_kv_head == config.n_head:
        return GPT2Config(
            n_inner=config.mlp_width,
            activation_function="gelu_new",
            layer_norm_epsilon=config.norm_eps,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            resid_pdrop=config.dropout,
            **shared,
        )
    if kind == ("rotary", "pre", "rms", "swiglu"):
        return LlamaConfig(
            intermediate_size=config.mlp_width,
            num_key_value_heads=config.n_kv_head,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_eps,
            attention_bias=config.bias,
            mlp_bias=config.bias,
            attention_dropout=config.dropout,
            **shared,
        )
    return None


def _lab_config(config: Any, folder: Path) -> LabGPTConfig:
    """The LabGPT that computes what a stock configuration describes."""
    if isinstance(config, LabGPTConfig):
        return config
    if config.model_type == "gpt2":
        demands = {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "embd_pdrop": (config.resid_pdrop,),
            "attn_pdrop": (config.resid_pdrop,),
        }
        own = {
            "mlp_width": config.n_inner or 4 * config.hidden_size,
            "positions": "learned",
            "norm": "layer",
            "mlp": "gelu_tanh",
            "bias": True,
            "norm_eps": config.layer_norm_epsilon,
            "dropout": config.resid_pdrop,
        }
    elif config.model_type == "llama":
        rope_type = config.rope_parameters["rope_type"]
        demands = {
            "hidden_act": ("silu", "swish"),
            "head_dim": (config.hidden_size // config.num_attention_heads,),
            "mlp_bias": (config.attention_bias,),
            "rope_parameters": (config.rope_parameters,) if rope_type == "default" else (),
        }
        own = {
            "n_kv_head": config.num_key_value_heads,
            "mlp_width": config.intermediate_size,
            "positions": "rotary",
            "norm": "rms",
            "mlp": "swiglu",
            "bias": config.attention_bias,
            "rope_theta": config.rope_parameters["rope_theta"],
            "norm_eps": config.rms_norm_eps,
            "dropout": config.attention_dropout,
        }
    else:
        raise LabError(
            f"{folder}: holds a {config.model_type!r}; a LabGPT can be a gpt2 or llama. "
            "Open it with transformers itself."
        )
    for key, known in demands.items():
        if getattr(config, key) not in known:
            raise LabError(
                f"{folder}: its config.json has {key} {getattr(config, key)!r}, which LabGPT does not "
                "compute. Open it with transformers itself."
            )
    return LabGPTConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        max_positions=config.max_position_embeddings,
        norm_position="pre",
        tie_word_embeddings=config.tie_word_embeddings,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        id2label=config.id2label,
        label2id=config.label2id,
        problem_type=config.problem_type,
        **_extras(config),
        **own,
    )


def _extras(config: PreTrainedConfig) -> dict[str, Any]:
    """What the lab adds to a reward model's configuration (see `rlhf.ranking.center`)."""
    return {key: getattr(config, key) for key in ("reward_shift", "reward_scale") if hasattr(config, key)}


def _to_stock(weights: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A LabGPT's tensors as the stock model of `kind` names and lays them out."""
    stock = {}
    for stock_name, names in _group_by_stock(weights, kind).items():
        tensor = torch.cat([weights[name] for name in names]) if len(names) > 1 else weights[names[0]]
        stock[stock_name] = tensor.t().contiguous() if _is_transposed(stock_name, tensor, kind) else tensor
    return stock


def _from_stock(stock: dict[str, Tensor], names: list[str], kind: str) -> dict[str, Tensor]:
    """The reverse of `_to_stock`, for the tensors `names` of a LabGPT."""
    weights = {}
    for stock_name, group in _group_by_stock(names, kind).items():
        tensor = stock[stock_name]
        if _is_transposed(stock_name, tensor, kind):
            tensor = tensor.t()
        for name, part in zip(group, tensor.chunk(len(group)), strict=True):
            weights[name] = part.contiguous()
    return weights


def _group_by_stock(names: Iterable[str], kind: str) -> dict[str, list[str]]:
    """Stock name -> the names of the LabGPT tensors that lie in it, one below the other."""
    groups: dict[str, list[str]] = {}
    for name in names:
        stock_name = name
        if kind != LabGPTConfig.model_type:
            module, _, leaf = name.rpartition(".")
            layer = re.search(r"\d+", module)
            stock_module = _STOCK_NAMES[kind][re.sub(r"\d+", "*", module)]
            stock_name = f"{stock_module.replace('*', layer.group() if layer else '')}.{leaf}"
        groups.setdefault(stock_name, []).append(name)
    return groups


def _is_transposed(stock_name: str, tensor: Tensor, kind: str) -> bool:
    """GPT-2's blocks keep the matrix of a linear layer as (in, out)."""
    return kind == "gpt2" and ".h." in stock_name and tensor.dim() == 2
