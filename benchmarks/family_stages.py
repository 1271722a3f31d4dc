"""The whole recipe on every causal family of transformers, tiny: SFT, reward model, PPO and evaluation.

`python -m benchmarks.family_stages` trains a tiny random model of each family that can be made here through
all stages, opens what they leave, and writes benchmarks/results/family_stages.json after each; called again,
it goes on with those that are missing. `--only NAME ...` does some again, `--lora` trains adapters.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.families import VARIANTS, VOCABULARY, families, tiny_config, tiny_model
from lab.errors import LabError, first_line
from lab.files import write_json

RESULT = Path(__file__).parent / "results" / "family_stages.json"
STAGES = ("sft", "reward", "ppo", "eval")
LONGEST = 48


@dataclass(frozen=True)
class Row:
    """What became of a family."""

    family: str
    outcome: str
    """all stages, refused (before anything is trained), failed, or not tried (no tiny model of it)."""
    why: str = ""
    stages: tuple[str, ...] = ()
    """Those that finished."""
    score_head: str = ""
    """stock, or ours where transformers has no sequence classifier."""
    padding_apart: float | None = None
    """Of scores: the largest difference that padding on the left or right makes, in their deviations."""
    seconds: float = 0.0


def tokenizer() -> Any:
    """Characters, as many as the tiny models have embeddings; padding, beginning and end are apart."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    characters = [chr(code) for code in range(32, 127)][: VOCABULARY - len(special) - 1]
    vocabulary = {token: i for i, token in enumerate([*special.values(), "<unk>", *characters])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", padding_side="left", **special)


def write_data(folder: Path) -> tuple[Path, Path]:
    """Demonstrations and comparisons of twelve prompts, of several lengths."""
    demonstrations, comparisons = [], []
    for i, word in enumerate(
        ("pea", "egg", "fig", "ham", "jam", "nut", "oat", "yam", "rye", "tea", "bun", "pie")
    ):
        prompt = f"{word}{'!' * (i % 4)}"
        demonstrations.append({"prompt": prompt, "completion": " good"})
        comparisons.append({"prompt": prompt, "chosen": " good", "rejected": " bad"})
    paths = folder / "demonstrations.jsonl", folder / "comparisons.jsonl"
    for path, rows in zip(paths, (demonstrations, comparisons), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def train(folder: Path, lora_rank: int = 0) -> None:
    """All stages on the model in `folder`/base, a few updates each, into `folder`/run."""
    from lab import config
    from rlhf.config import RLHFRun
    from rlhf.pipeline import run_stages

    demonstrations, comparisons = write_data(folder)
    training = {"batch_size": 4, "learning_rate": 1e-3}
    values = {
        "model": {"path": str(folder / "base"), "lora_rank": lora_rank},
        "data": {
            "demonstrations": str(demonstrations),
            "comparisons": str(comparisons),
            "max_length": LONGEST,
            "max_new_tokens": 6,
        },
        "sft": training | {"epochs": 0.5},
        "reward": training | {"held_out": 0.3, "epochs": 0.5},
        "ppo": training | {"epochs": 1, "rollouts": 2, "rollout_size": 4, "micro_batch_size": 2},
        "eval": {"prompts": 2, "samples": 2, "best_of": 2, "labeler": {"name": "vader"}},
        "device": {"device": "cpu", "precision": "fp32", "threads": 1},
        "tracking": {"wandb": "disabled"},
    }
    run_stages(config.build(RLHFRun, values, {}, "families"), folder / "run")


def try_family(family: str, folder: Path, lora_rank: int = 0) -> Row:
    """What became of one family."""
    from rlhf import heads, models

    began = time.monotonic()

    def row(outcome: str, why: str = "", **more: Any) -> Row:
        finished = tuple(s for s in STAGES if _finished(folder / "run" / s))
        seconds = round(time.monotonic() - began, 1)
        return Row(family, outcome, why[:300], finished, seconds=seconds, **more)

    facts, refusals = None, []
    for variant in VARIANTS:  # as it is, not as a decoder that it is not by itself
        try:
            facts = heads.examine(tiny_config(family, *variant), family)
            break
        except LabError as error:
            refusals.append(("refused", str(error).removeprefix(f"{family}: ")))
        except Exception as error:  # whatever a config finds wrong with these sizes
            refusals.append(("not tried", first_line(error)))
    if facts is None:
        return row(*refusals[0])
    head = "stock" if facts.stock_score_head else "ours"
    try:
        model = tiny_model(family)
    except LabError as error:  # sizes that do not fit each other are no fault of the family's
        return row("not tried", str(error).removeprefix(f"{family}: "))
    try:
        model.save_pretrained(folder / "base")
        tokenizer().save_pretrained(folder / "base")
        del model
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(folder, lora_rank)
        for stage in ("sft", "ppo"):
            models.open_policy(folder / "run" / stage / "model")
        apart = padding_apart(folder / "run" / "reward" / "model")
        return row("all stages", score_head=head, padding_apart=apart)
    except LabError as error:
        begun = _finished(folder / "run" / "sft")
        why = first_line(error).replace(str(folder), "").removeprefix("/base: ")
        return row("failed" if begun else "refused", why, score_head=head)
    except Exception as error:
        return row("failed", f"{type(error).__name__}: {first_line(error)}", score_head=head)


def padding_apart(folder: Path) -> float:
    """How much padding changes what a reward model's own forward says, in deviations of the scores."""
    from rlhf import models

    model, reader = models.open_reward(folder)
    model.eval()
    rows = [[9, 10, 11, 12, 13, 14, 15], [20, 21, 22], [30, 31, 32, 33]]
    longest = max(map(len, rows))
    pad = reader.pad_token_id
    scores: dict[str, Any] = {}
    with torch.no_grad():
        scores["alone"] = torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
        for side in ("left", "right"):
            gaps = [[pad] * (longest - len(row)) for row in rows]
            pairs = list(zip(rows, gaps, strict=True))
            ids = torch.tensor([gap + row if side == "left" else row + gap for row, gap in pairs])
            scores[side] = model(input_ids=ids, attention_mask=(ids != pad).long()).logits[:, 0]
    deviation = scores["alone"].std().clamp_min(1e-6)
    return max(float((scores[side] - scores["alone"]).abs().max() / deviation) for side in ("left", "right"))


def _finished(folder: Path) -> bool:
    path = folder / "run.json"
    return path.is_file() and json.loads(path.read_text())["state"] == "finished"


def read(path: Path) -> dict[str, Any]:
    """The rows written so far, by family."""
    return {row["family"]: row for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}


def write(path: Path, rows: dict[str, Any], lora_rank: int) -> None:
    """Writes all rows, and what they were made by."""
    import transformers

    path.parent.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for entry in rows.values():
        counts[entry["outcome"]] = counts.get(entry["outcome"], 0) + 1
    command = "python -m benchmarks.family_stages" + (" --lora" if lora_rank else "")
    result = {"command": command, "transformers": transformers.__version__, "counts": counts}
    write_json(path, result | {"rows": [rows[name] for name in sorted(rows)], "machine": machine.describe()})


def main() -> None:
    """Trains what is missing, and writes after each family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--result", type=Path)
    chosen = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rank = 4 if chosen.lora else 0
    path = chosen.result or (RESULT.with_stem("family_stages_lora") if rank else RESULT)
    for family in chosen.only or families():
        if family in read(path) and not chosen.only:
            continue
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = asdict(try_family(family, Path(folder), rank))
        print(f"{family:24} {row['outcome']:11} {row['seconds']:6.1f} s  {row['why'][:160]}", flush=True)
        write(path, read(path) | {family: row}, rank)


if __name__ == "__main__":
    main()
