"""Opening and saving the models of the recipe: LabGPT, any model of the Hub, and what a stage left."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lab.device import Compute
from lab.errors import LabError, brief, did_you_mean, first_line
from lab.files import read_json, sha256_file
from lab.hub import MOST_LAYERS, from_pretrained
from rlhf import heads, labgpt, reviews
from rlhf.config import ModelConfig
from rlhf.tokenization import check_end, separate_padding

# Vocabulary of a tokenizer made of the data.
BPE_SIZE = 2048
_log = logging.getLogger(__name__)


def keeps_frozen_format(config: ModelConfig, compute: Compute) -> bool:
    """Whether weights that are not trained stay in the number format they were saved in: LoRA in bf16."""
    return bool(config.lora_rank) and compute.precision == "bf16"


def examine(config: ModelConfig) -> heads.Facts | None:
    """What can be known of a config's model before its weights are read; None for a fresh LabGPT.

    Raises:
        LabError: it cannot be opened, or cannot be policy and reward model, and why, in one line.
    """
    if config.path == "labgpt":
        return None
    name = base_of(Path(config.path)) if is_adapter(Path(config.path)) else config.path
    return heads.examine(_config(name), name)


def start(config: ModelConfig, tokenizer: Any, seed: int, keep_format: bool = False) -> Any:
    """The language model the recipe starts from.

    Args:
        config: which.
        tokenizer: of `start_tokenizer`, prepared: the model gets an embedding for a padding token it lacks.
        seed: of LabGPT's random weights.
        keep_format: as of `open_policy`.

    Raises:
        LabError: neither a folder nor on the Hub, or the Hub cannot be reached; or no causal language model.
    """
    if config.path != "labgpt":
        examine(config)  # what a later stage would refuse
        # LabGPT computes no padding, and is a tenth faster. Adapters, though, are for the model they name.
        if not config.lora_rank and labgpt.computes(Path(config.path)):
            return _trained_in_fp32(labgpt.load(config.path), tokenizer, config.path)
        model = _open_causal_lm(config.path, tokenizer, keep_format)
        heads.check_causal(model, config.path)
        return model
    known = [*labgpt.LabGPTConfig().options(), *labgpt.LabGPTConfig.attribute_map]
    for key in config.labgpt:
        if key not in known:  # transformers would keep it, and do nothing about it
            raise LabError(f"model.labgpt = {config.labgpt}: no argument {key!r}.{did_you_mean(key, known)}")
    torch.manual_seed(seed)
    tokens: Any = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")
    }
    try:
        settings = labgpt.LabGPTConfig(vocab_size=len(tokenizer), **tokens, **config.labgpt)
        return labgpt.LabGPTForCausalLM(settings)
    except (TypeError, ValueError) as error:
        raise LabError(f"model.labgpt = {config.labgpt}: {error}") from None


def start_tokenizer(config: ModelConfig, demonstrations: Any, source: str) -> Any:
    """The tokenizer the recipe starts from, which `rlhf.tokenization.prepare` has yet to see.

    Args:
        config: which.
        demonstrations: the data set, from whose words LabGPT gets a tokenizer if the config names none.
        source: where they are from.

    Raises:
        LabError: there is none.
    """
    if config.path != "labgpt" or config.tokenizer:
        return _read_tokenizer(config.tokenizer or config.path)
    return reviews.tokenizer() if source == "reviews" else tokenizer_of(_texts(demonstrations))


def open_policy(folder: Path, keep_format: bool = False) -> tuple[Any, Any]:
    """A language model that a stage left (or any transformers folder, or an adapter's) and its tokenizer.

    Args:
        folder: of the model.
        keep_format: leave the weights in bf16 if they were saved so, for what is not trained; else the model
            is in fp32, because small updates are lost in 8 bits. Either way `save` writes it as it was saved.

    Raises:
        LabError: no such folder, or no language model in it.
    """
    tokenizer = open_tokenizer(str(folder))
    return _open_causal_lm(str(folder), tokenizer, keep_format), tokenizer


def open_reward(folder: Path, keep_format: bool = False) -> tuple[Any, Any]:
    """A reward model's folder, or a language model's with a fresh `score` layer on it, and its tokenizer.

    Raises:
        LabError: no such folder, or no model in it.
    """
    name, tokenizer = str(folder), open_tokenizer(str(folder))
    if _is_labgpt(folder):
        model: Any = labgpt.load(folder, head="reward")
    else:
        config: Any = heads.text_config(_config(name), name)
        config.num_labels = 1
        fresh = () if _holds_scores(config) else ("score.weight",)
        model = _read(heads.classifier_class(config), name, config, keep_format, fresh)
        model.config.pad_token_id = tokenizer.pad_token_id
    model = _trained_in_fp32(model, tokenizer, name, keep_format)
    model.score.float()
    heads.read_any_format(model.score)
    return model, tokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a plain transformers folder; adapters are merged into the weights, and kept in adapter/ too.

    The weights are written in the number format the model was opened from; a score layer in fp32.
    """
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / "adapter", selected_adapters=["default"], save_embedding_layers=False)
        _name_base(folder / "adapter", model.get_base_model().config.name_or_path)
        model = model.merge_and_unload(adapter_names=["default"])
    _to_saved_format(model, folder)
    if isinstance(model, labgpt.LabGPTForCausalLM | labgpt.LabGPTForSequenceClassification):
        labgpt.save_stock(model, folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tokenizer_of(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer of `BPE_SIZE` tokens made from texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE(unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_SIZE,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def declare_end(model: Any, tokenizer: Any) -> None:
    """Writes the tokenizer's end token into the model's config, so that stock `generate` stops there too."""
    end, declared = tokenizer.eos_token_id, model.generation_config.eos_token_id
    more = [declared] if isinstance(declared, int) else (declared or [])
    if end not in more:
        model.config.get_text_config().eos_token_id = end
        model.generation_config.eos_token_id = [end, *more]


def check_chat_template(tokenizer: Any, dataset: Any, source: str) -> None:
    """Raises a `LabError` if the data are conversations and the tokenizer cannot render one."""
    first = next(iter(dataset[0].values()))
    if isinstance(first, list) and isinstance(first[0], dict) and not tokenizer.chat_template:
        raise LabError(
            f"{source}: holds conversations, but the model's tokenizer has no chat template. "
            "Use a chat model's tokenizer (model.tokenizer), or data in plain text."
        )


def open_tokenizer(name: str) -> Any:
    """A folder's or the Hub's tokenizer, whose padding is not its end token.

    Raises:
        LabError: there is none, or it has no end token.
    """
    tokenizer = _read_tokenizer(name)
    check_end(tokenizer)
    separate_padding(tokenizer)
    return tokenizer


def _read_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    if is_adapter(Path(name)) and not (Path(name) / "tokenizer_config.json").is_file():
        name = base_of(Path(name))
    try:
        return from_pretrained(AutoTokenizer, name, padding_side="left")
    except LabError:
        raise
    except Exception as error:  # whatever the Hub's client, json or tokenizers raise
        raise LabError(
            f"{name}: no tokenizer found: {first_line(error)} Name a transformers folder, or a model of the "
            "Hub (which must be reachable)."
        ) from None


def _fitted(model: Any, tokenizer: Any, name: str) -> Any:
    """The model, with an embedding for a padding token that was added to the tokenizer."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) == rows + 1 and tokenizer.pad_token_id == rows:
        model.resize_token_embeddings(len(tokenizer))
    elif len(tokenizer) > rows:
        raise LabError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, but the model {rows} embeddings. "
            "Name the tokenizer the model was trained with."
        )
    return model


def _open_causal_lm(name: str, tokenizer: Any, keep_format: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    folder = Path(name)
    if is_adapter(folder):
        return _merged(folder, _open_causal_lm(base_of(folder), tokenizer, keep_format))
    if _is_labgpt(folder):
        return _trained_in_fp32(labgpt.load(name), tokenizer, name)
    config = _config(name)
    if type(config).__module__.startswith("transformers."):  # else its code, which the command line trusts
        config = heads.text_config(config, name)
    if _holds_scores(config):
        raise LabError(f"{name}: holds a reward model, no language model. Name the model it was made of.")
    model = _read(AutoModelForCausalLM, name, config, keep_format, [])
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    _mend_generation_config(model, name)
    return _trained_in_fp32(model, tokenizer, name, keep_format)


def _config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return from_pretrained(AutoConfig, name)
    except LabError:
        raise
    except Exception as error:  # whatever the Hub's client, json or a family's checks raise
        raise LabError(
            f"{name}: no model that can be opened: {first_line(error)[:200]} Name a transformers folder or a "
            "model of the Hub (which must be reachable)."
        ) from None


def _holds_scores(config: Any) -> bool:
    return (config.architectures or [""])[0].endswith("ForSequenceClassification")


def _read(kind: Any, name: str, config: Any, keep_format: bool, fresh: Sequence[str]) -> Any:
    """The model with exactly the weights its configuration asks for, but for those that are to be `fresh`.

    safetensors or pytorch_model.bin, in one file or several; of the latter tensors alone are read.
    """
    own = _saved_format(config, Path(name))
    dtype = own if keep_format and own == torch.bfloat16 else torch.float32
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = from_pretrained(kind, name, config=config, dtype=dtype, **options)
        if len(set(report["missing_keys"]) - set(fresh)) > 1:  # the text model of a larger one?
            options["key_mapping"] = _TEXT_MODEL_WITHIN
            model, report = from_pretrained(kind, name, config=config, dtype=dtype, **options)
    except LabError:
        raise
    except Exception as error:  # whatever transformers, torch or safetensors raise
        raise LabError(f"{name}: no model that can be opened: {first_line(error)[:200]}") from None
    for key, found, expected in sorted(report["mismatched_keys"]):
        raise LabError(
            f"{name}: {key} is {tuple(found)}, by config.json it should be {tuple(expected)}. Restore the "
            "folder from a copy."
        )
    if missing := sorted(set(report["missing_keys"]) - set(fresh)):
        raise LabError(
            f"{name}: its weights lack {missing[0]} ({len(missing)} in all), which would stay random. "
            "Restore the folder from a copy, or name the model it was made of."
        )
    unused = sorted(key for key in report["unexpected_keys"] if not key.startswith(("lm_head.", "score.")))
    if unused:
        _log.warning("%s: %d of its weights are not used: %s ...", name, len(unused), brief(unused[0]))
    model.saved_format = own
    return model


_TEXT_MODEL_WITHIN = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""Where models that read images as well keep their text model, before transformers 5 and since."""


def _saved_format(config: Any, folder: Path) -> torch.dtype:
    """The number format of a folder's weights, by its config.json or, where that is silent, by themselves."""
    from safetensors import safe_open

    declared = config.dtype
    if isinstance(declared, str):
        declared = getattr(torch, declared, None)
    if isinstance(declared, torch.dtype):
        return declared
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                kind = weights.get_slice(name).get_dtype()
                if kind in _FORMATS:
                    return _FORMATS[kind]
    return torch.float32


_FORMATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def _trained_in_fp32(model: Any, tokenizer: Any, name: str, keep_format: bool = False) -> Any:
    """The model in the format it is trained in, which remembers the one it is saved in."""
    model.saved_format = getattr(model, "saved_format", model.dtype)
    if not (keep_format and model.dtype == torch.bfloat16):
        model = model.float()
    if Path(name).is_dir():  # adapters and trainers name it; another folder may be the working folder by then
        model.config.name_or_path = str(Path(name).resolve())
    return _fitted(model, tokenizer, name)


def _to_saved_format(model: Any, folder: Path) -> None:
    """Rounds weights to the format the model was opened from; not a score layer, and what must stay fp32."""
    own = getattr(model, "saved_format", torch.float32)
    if own not in (torch.float16, torch.bfloat16):
        return
    stay = {"score", *(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    rounded = [p for name, p in model.named_parameters() if stay.isdisjoint(name.split("."))]
    limit = torch.finfo(own).max
    if any(bool(p.abs().max() > limit) for p in rounded if p.numel()):
        _log.warning("%s: written in fp32: its weights have grown beyond %s", folder, own)
        return
    with torch.no_grad():
        for parameter in rounded:
            parameter.data = parameter.data.to(own)


def _mend_generation_config(model: Any, name: str) -> None:
    """Leaves of a generation_config.json that contradicts itself the tokens alone: it could not be saved."""
    from transformers import GenerationConfig

    own = model.generation_config
    try:
        own.validate(strict=True)
    except ValueError as error:
        tokens = {f"{kind}_token_id": getattr(own, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        model.generation_config = GenerationConfig(**tokens)
        _log.warning(
            "%s: generation_config.json contradicts itself; its tokens alone are kept: %s",
            *(name, first_line(error)[:200]),
        )


# ---- adapters ----


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter alone, and no model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _name_base(adapter: Path, base: str) -> None:
    """Says in an adapter's folder what it was trained on, so that it is found from everywhere.

    adapter_config.json, which PEFT reads, has the base's absolute path. base.json, which `open_policy` reads,
    has the path from the adapter's own folder as well, and the hash: it holds where a whole run was moved.
    """
    config = adapter / "adapter_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    folder = Path(base)
    local = folder.is_dir()
    values["base_model_name_or_path"] = str(folder.resolve()) if local else base
    config.write_text(json.dumps(values, indent=2))
    relative = os.path.relpath(folder.resolve(), adapter.resolve()) if local else None
    record = {"path": relative, "sha256": _hash(folder) if local else None}
    (adapter / "base.json").write_text(json.dumps(record, indent=2))


def base_of(adapter: Path) -> str:
    """The folder, or the name on the Hub, of the model an adapter was trained on.

    Raises:
        LabError: it is not there, or is another one.
    """
    config = read_json(adapter / "adapter_config.json", "an adapter's configuration")
    stated = config.get("base_model_name_or_path")
    if (adapter / "base.json").is_file():
        record = read_json(adapter / "base.json", "where its base is")
        moved = adapter / str(record.get("path"))
        if moved.is_dir():
            if record.get("sha256") not in (None, _hash(moved)):
                raise LabError(
                    f"{adapter}: {moved.resolve()} is not the model it was trained on. Restore it."
                )
            return str(moved.resolve())
    if not isinstance(stated, str) or (Path(stated).is_absolute() and not Path(stated).is_dir()):
        raise LabError(f"{adapter}: the model it was trained on is not at {stated!r}. Put it there.")
    return stated


def _hash(folder: Path) -> str | None:
    """What tells a model from another: the hash of its manifest, or of its weights."""
    for name in ("manifest.json", "model.safetensors", "model.safetensors.index.json"):
        if (folder / name).is_file():
            return sha256_file(folder / name)
    return None


def with_adapter(adapter: Path, model: Any) -> Any:
    """PEFT's model of a model and an adapter's folder.

    Raises:
        LabError: tensors of the adapter are missing, which PEFT would leave as they are made, so that they do
            nothing, or are of modules that the model has not; or what it is put on takes too long to find.
    """
    from peft import PeftModel

    _check_adapted_modules(adapter, model)
    with warnings.catch_warnings():  # PEFT reads what transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # it is refused below
        adapted = PeftModel.from_pretrained(model, str(adapter))
        fitted = adapted.load_adapter(str(adapter), "default")  # once more, as this tells what did not fit
    for keys, what in (
        (fitted.missing_keys, "of the adapter's tensors are missing"),
        (fitted.unexpected_keys, "of the adapter's tensors are of modules that the model has not"),
    ):
        if keys:
            raise LabError(
                f"{adapter}: {len(keys)} {what}, the first {brief(keys[0])}. Restore the folder from a copy, "
                "or name the model it was trained on."
            )
    return adapted


_MATCH = "import json, re, sys\nfor p, names in json.load(sys.stdin):\n for n in names: re.match(p, n)"
_AS_PEFT_MATCHES = {
    "target_modules": r"(?:{})\Z",
    "exclude_modules": r"(?:{})\Z",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "layers_pattern": r".*\.{}\.(\d+)\.",
}
MATCH_SECONDS = 10.0


def _check_adapted_modules(adapter: Path, model: Any) -> None:
    """An adapter's patterns of module names, tried in a process of their own: some would take forever.

    Raises:
        LabError: they do, or the adapter asks for more layers than any model has.
    """
    path = adapter / "adapter_config.json"
    config = read_json(path, "an adapter's configuration")
    names = [name for name, _ in model.named_modules()]
    tried: list[tuple[str, list[str]]] = []
    for key, form in _AS_PEFT_MATCHES.items():
        value = config.get(key) or []
        is_list_of_names = key.endswith("_modules") and not isinstance(value, str)
        patterns = [] if is_list_of_names else [value] if isinstance(value, str) else [*value]
        tried += [
            (form.replace("{}", p), names) for p in map(str, patterns) if not re.fullmatch(r"[\w.]*", p)
        ]
    if tried:
        try:
            subprocess.run(
                [sys.executable, "-I", "-c", _MATCH],
                input=json.dumps(tried).encode(),
                capture_output=True,  # what is no pattern, PEFT says
                timeout=MATCH_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LabError(
                f"{path}: its patterns of modules take more than {MATCH_SECONDS:g} s to find them. Name the "
                "modules in a list."
            ) from None
    copies = config.get("layer_replication") or []
    if isinstance(copies, list) and len(copies) > MOST_LAYERS:
        raise LabError(f"{path}: layer_replication has {len(copies):,} parts. Restore it from a copy.")


def _merged(adapter: Path, model: Any) -> Any:
    own, path = model.saved_format, model.config.name_or_path
    try:
        merged = with_adapter(adapter, model).merge_and_unload()
    except LabError:
        raise
    except Exception as error:  # whatever PEFT, torch or safetensors raise
        raise LabError(f"{adapter}: the adapter does not fit {path}: {first_line(error)[:200]}") from None
    merged.saved_format, merged.config.name_or_path = own, path
    return merged


def _is_labgpt(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and '"lab_gpt"' in config.read_text(encoding="utf-8")


def _texts(demonstrations: Any) -> Iterable[str]:
    for row in demonstrations:
        for value in row.values():
            if isinstance(value, str):
                yield value
            else:
                yield from (message["content"] for message in value)
