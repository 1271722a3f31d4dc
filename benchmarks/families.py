"""Every causal family of transformers, tiny: does the lab compute what its own forward does?

`python -m benchmarks.families` makes a tiny random model of every family that transformers maps to a causal
language model, compares sampler, log-probabilities and caches of the lab with the model's own forward, and
writes benchmarks/results/families.json. `--only NAME ...` does some, and writes nothing; `--page` makes
docs/families.md of that and of what `python -m benchmarks.family_stages` and `--lora` of it wrote.
"""

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.errors import LabError, first_line

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "families.json"
STAGES = {
    "all stages": RESULT.with_name("family_stages.json"),
    "with LoRA": RESULT.with_name("family_stages_lora.json"),
}
"""Columns of the page that another command measured."""
PAGE = ROOT / "docs" / "families.md"
MOST_PARAMETERS = 50_000_000

VOCABULARY = 96
"""Tokens of a tiny model."""
SIZES: dict[str, int | float] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "attention_hidden_size"), 32
    ),
    **dict.fromkeys(
        ("embedding_size", "input_embedding_size", "output_embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "d_inner",
            "dff",
            "dim_ff",
            "ffn_hidden_size",
            "decoder_ffn_dim",
        ),
        48,
    ),
    **dict.fromkeys(
        ("encoder_ffn_dim", "feed_forward_size", "moe_intermediate_size", "intermediate_size_mlp"), 48
    ),
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "dense_intermediate_size", "expert_ffn_hidden_size"), 48
    ),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 48),
    **dict.fromkeys(("shared_intermediate_size",), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2
    ),
    **dict.fromkeys(("head_dim", "swa_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("d_head", "dim_head", "attention_head_size", "linear_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_channels", "mamba_head_dim", "mamba_d_head", "mamba_headdim", "d_rel"), 8),
    "attention_head_dim": 16,
    "qk_head_dim": 16,
    **dict.fromkeys(
        ("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "index_n_heads"), 4
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_layers", "num_encoder_layers", "num_decoder_layers", "num_blocks"), 2),
    "num_layers_per_stack": 1,
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"),
        VOCABULARY,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 128
    ),
    **dict.fromkeys(("model_max_length", "context_length", "original_max_position_embeddings"), 128),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(
        ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "zero_expert_num"), 1
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hc_lowrank", "laurel_rank", "adapter_rank"), 8
    ),
    **dict.fromkeys(
        ("gated_norm_rank", "time_step_rank", "mamba_dt_rank", "state_size", "ssm_state_size"), 8
    ),
    **dict.fromkeys(("mamba_d_state", "hidden_size_per_layer_input", "router_hidden_size"), 8),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 6),
    **dict.fromkeys(("local_attention", "attention_chunk_size", "keep_window_size"), 6),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("n_mamba_heads",), 2),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups", "o_groups"), 1),
    "index_topk": 64,  # more than the tokens of a row, as in use
    "lru_width": 32,
    "mamba_d_ssm": 64,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "prompt_length": 4,
    "query_pre_attn_scalar": 8,
    "ple_embed_dim": 8,
    "ngram_vocab_size_base": 64,
    "heads_per_ngram": 2,
    "split_ngram_parts": 1,
    "max_window_layers": 1,
}
"""What the sizes in a family's config become."""
PARTICULAR: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "doge": {"keep_window_size": 2048},
    "reformer": {"axial_pos_embds": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs besides."""


PER_LAYER = "layer_types", "layers_block_type", "mlp_layer_types", "block_types", "indexer_types"
LAYERS = "num_hidden_layers", "n_layer", "n_layers", "num_layers"
VARIANTS = (True, True), (False, True), (True, False), (False, False)
"""With dropout, and with every kind of layer: the first that can be made is taken."""
DROPPED = 0.3
"""Probability of every dropout in a tiny model's config."""


@dataclass(frozen=True)
class Row:
    """What was found of a family; numbers are nats, the largest difference at any token."""

    family: str
    model: str = ""
    outcome: str = ""
    """quick path, own forward, refused or not tried."""
    why: str = ""
    logprobs: str = ""
    """How log-probabilities are computed."""
    logprobs_apart: float | None = None
    sampler: str = ""
    """How it is sampled."""
    sampler_apart: float | None = None
    rows_selected: bool | None = None
    """Whether rows of its cache are copied and dropped, which was compared too."""
    dropout_off: bool | None = None
    """Whether a pass in training mode, as gradient checkpointing needs it, equals one in eval mode."""
    bf16_apart: float | None = None
    """In bf16, the largest difference over what is allowed; below 1 is right."""
    seconds: float = 0.0


def tiny_config(family: str, dropped: bool = True, kinds: bool = True) -> Any:
    """A family's config with everything small.

    Args:
        dropped: with dropout wherever it has any.
        kinds: with every kind of layer that it has by default.
    """
    from transformers import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[family], dropped, kinds)


def _shrunk(kind: Any, dropped: bool, kinds: bool) -> Any:
    whole = kind()
    other_names = getattr(kind, "attribute_map", {})
    small: dict[str, Any] = {}
    for name in {**dict.fromkeys(vars(whole)), **other_names}:
        value = _get(whole, name)
        if name in SIZES and value is not None and not isinstance(value, bool | list):
            small[other_names.get(name, name)] = SIZES[name]
        if dropped and isinstance(value, float) and ("drop" in name or "jitter" in name) and value < 1:
            small[other_names.get(name, name)] = DROPPED
    for name in kind.sub_configs:
        part = _get(whole, name)
        if part is not None:
            small[name] = _shrunk(type(part), dropped, kinds).to_dict()
    if "qk_rope_head_dim" in small:  # latent attention: a head's width follows from its parts
        small.pop("head_dim", None)
        small |= {name: SIZES["num_attention_heads"] for name in ("num_key_value_heads",) if name in small}
    several = {other_names.get(name, name): _get(whole, name) for name in PER_LAYER}
    several = {
        name: list(dict.fromkeys(values))
        for name, values in several.items()
        if isinstance(values, list) and values and not isinstance(getattr(kind, name, None), property)
    }
    if kinds and several:  # every kind of layer there is, once
        layers = max(2, *map(len, several.values()))
        small |= {name: [values[i % len(values)] for i in range(layers)] for name, values in several.items()}
        small |= {name: layers for name in LAYERS if name in small}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    small |= {k: v for k, v in tokens.items() if k in vars(whole)}
    return kind(**small | PARTICULAR.get(kind.model_type, {}))


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a size that differs between layers
        return None


def tiny_model(family: str) -> Any:
    """A tiny random causal language model of a family, in eval mode, with weights that make a difference.

    Where the family is an encoder otherwise, it is a decoder here, as its documentation asks for.

    Raises:
        LabError: there is none by these rules.
    """
    why = ""
    for variant in VARIANTS:
        try:
            config = tiny_config(family, *variant)
            for part in (config, *(_get(config, name) for name in config.sub_configs)):
                if part is not None and hasattr(part, "is_decoder"):
                    part.is_decoder = True
            return random_model(config)
        except Exception as error:  # whatever a config or a model finds wrong with these sizes
            why = why or f"{type(error).__name__}: {first_line(error)}"
    raise LabError(f"{family}: {why}")


def random_model(config: Any) -> Any:
    """A random model whose weights are large enough to make a difference, in eval mode.

    Raises:
        Exception: whatever a model finds wrong with its sizes.
    """
    from transformers import AutoModelForCausalLM

    from rlhf.agreement import plain_logits

    with torch.device("meta"):
        n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if n > MOST_PARAMETERS:
        raise ValueError(f"has {n:,} parameters even so")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # else all tokens are about as likely, and mistakes are not seen
        plain_logits(model, [5, 6, 7, 8])  # sizes that do not fit each other are found here
    return model


def families() -> list[str]:
    """Names of all families that transformers maps to causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})


def examine(family: str) -> Row:
    """What the lab makes of a family's tiny model."""
    began = time.monotonic()
    try:
        model = tiny_model(family)
    except LabError as error:
        return Row(family, outcome="not tried", why=str(error).removeprefix(f"{family}: ")[:200])
    found = _examine(model)
    return Row(family, type(model).__name__, **found, seconds=round(time.monotonic() - began, 2))


def _examine(model: Any) -> dict[str, Any]:
    from rlhf import agreement, decode, logprobs, randomness

    try:
        probe = agreement.make_probe(model.config)
        reading, decoding = logprobs.reading_of(model), decode.decoding_of(model)
    except LabError as error:
        return {"outcome": "refused", "why": str(error)}
    found: dict[str, Any] = {"sampler": decoding.left_out or "quick", "logprobs": reading.left_out or "quick"}
    apart = _apart(model, probe)
    found["logprobs_apart"], found["sampler_apart"], _ = (round(number, 7) for number in apart)
    found["rows_selected"] = decoding.cached and decoding.selects
    short = {found["sampler"], found["logprobs"]} == {"quick"}
    found["outcome"] = "quick path" if short else "own forward" if not reading.body else "in part"
    found["why"] = "; ".join(f"{k}: {found[k]}" for k in ("sampler", "logprobs") if found[k] != "quick")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            *numbers, allowed = _apart(model, probe)
            found["bf16_apart"] = round(max(numbers) / allowed, 3)
    except LabError as error:
        found["why"] = "; ".join(filter(None, (found["why"], str(error))))
    randomness.switch_off_randomness(model)
    try:
        agreement.check_training_mode(model)
        found["dropout_off"] = True
    except Exception:
        found["dropout_off"] = False
    return found


def _apart(model: Any, probe: Any) -> tuple[float, float, float]:
    """How far log-probabilities and sampler are from the model's own forward, and how far they may be."""
    from rlhf import agreement, decode, logprobs

    reading, decoding = logprobs.reading_of(model), decode.decoding_of(model)
    with torch.no_grad(), agreement.enlarged(model, agreement.enlargement(model, probe.rows[0])):
        whole = agreement.plain_logprobs(model, probe)
        drawn = decode.forced(model, probe, decoding)
        read = logprobs.read_probe(model, probe, reading)
    tokens = [w.gather(1, torch.tensor(a)[:, None])[:, 0] for w, a in zip(whole, probe.answers, strict=True)]
    return apart(read, tokens), apart(drawn, whole), agreement.tolerance(model, whole)


def apart(ours: Iterable[Tensor], own: Iterable[Tensor]) -> float:
    """The largest difference."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, own, strict=True))


def table(rows: Sequence[dict[str, Any]], stages: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/families.md.

    Args:
        rows: of families.json.
        stages: for each column of `STAGES`, rows of its file by family.
    """
    import transformers

    counts = Counter(row["outcome"] for row in rows)
    worst = max((row["logprobs_apart"] or 0 for row in rows), default=0)
    worst_sampler = max((row["sampler_apart"] or 0 for row in rows), default=0)
    through = {
        column: Counter(stage["outcome"] for stage in found.values()) for column, found in stages.items()
    }
    lines = [
        "# Families of causal language models",
        "",
        "A tiny random model of every family that transformers "
        f"{transformers.__version__} maps to a causal language model, {len(rows)} of them. Made by "
        "`python -m benchmarks.families`, `python -m benchmarks.family_stages`, the same with `--lora`, and "
        "`python -m benchmarks.families --page`.",
        "",
        "## Through all stages",
        "",
        "SFT, reward model, PPO and evaluation, a few updates each, and what they leave opened again. "
        "*failed*: after something had been trained; *refused*: before, with the reason.",
        "",
        "| | all stages | refused | failed | not tried |",
        "|---|---|---|---|---|",
        *(
            f"| {'whole model' if column == 'all stages' else 'LoRA of rank 4'} | "
            + " | ".join(str(n[kind]) for kind in ("all stages", "refused", "failed", "not tried"))
            + " |"
            for column, n in through.items()
        ),
        "",
        "## The same numbers as the model's own forward",
        "",
        "What the lab computes is compared with the model's own plain forward, one row at a time, without "
        "padding and cache, with logits as large as a trained model's. Largest difference in nats: "
        f"log-probabilities {worst:.1e}, sampler {worst_sampler:.1e}.",
        "",
        "- **quick path**: sampled with a cache whose rows are copied and dropped, read without the head for "
        f"tokens that do not matter ({counts['quick path']}).",
        f"- **in part**: one of these short cuts is wrong for it, and is not taken ({counts['in part']}).",
        f"- **own forward**: log-probabilities by its forward alone ({counts['own forward']}).",
        f"- **refused**: with the reason ({counts['refused']}).",
        f"- **not tried**: not made tiny by the rules here ({counts['not tried']}).",
        "",
        "bf16: the largest difference over what is allowed, which is a sixteenth of the logits' standard "
        "deviation. Dropout off: a pass in training mode equals one in eval mode once the lab has switched "
        "everything off; where not, gradient checkpointing is refused in PPO. Score head: transformers' own "
        "sequence classifier (stock), or ours where the family has none.",
        "",
        "| family | model | numbers | cache rows selected | bf16 | dropout off | "
        + "".join(f"{column} | " for column in stages)
        + "score head | what is left out, or why |",
        "|" + "---|" * (8 + len(stages)),
    ]
    said = {True: "yes", False: "no", None: ""}
    for row in rows:
        found = [
            of.get(row["family"], {"outcome": "", "why": "", "score_head": ""}) for of in stages.values()
        ]
        reasons = (row["why"], *(f"{each['outcome']}: {each['why']}" for each in found if each["why"]))
        why = "; ".join(filter(None, dict.fromkeys(reasons)))
        cells = (
            *(row["family"], row["model"], row["outcome"], said[row["rows_selected"]]),
            "" if row["bf16_apart"] is None else f"{row['bf16_apart']:.2f}",
            said[row["dropout_off"]],
            *("yes" if each["outcome"] == "all stages" else each["outcome"] for each in found),
            next((each["score_head"] for each in found), ""),
            why.replace("|", "\\|").replace("<", "&lt;").replace("\n", " "),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_page() -> None:
    """docs/families.md, of what was measured last."""
    rows = json.loads(RESULT.read_text())["families"]
    stages = {
        column: {row["family"]: row for row in json.loads(path.read_text())["rows"]}
        for column, path in STAGES.items()
        if path.is_file()
    }
    PAGE.write_text(table(rows, stages))


def main() -> None:
    """Examines families and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    if arguments.page:
        write_page()
        return
    chosen = arguments.only
    import transformers

    transformers.utils.logging.set_verbosity(50)  # critical
    torch.set_num_threads(1)
    rows = []
    for family in chosen or families():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = asdict(examine(family))
        rows.append(row)
        print(f"{family:28}{row['outcome']:12}{row['seconds']:6.1f} s  {row['why'][:110]}", flush=True)
    if not chosen:
        result = {"transformers": transformers.__version__, "torch": torch.__version__, "families": rows}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        write_page()


if __name__ == "__main__":
    main()
