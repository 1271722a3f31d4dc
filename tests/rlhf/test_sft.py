"""What supervised fine-tuning learns from: the answers and their ends, nothing else, packed or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from lab import config
from lab.device import DeviceConfig, resolve
from lab.errors import LabError
from lab.run import Run
from rlhf import reviews
from rlhf.config import RLHFRun
from rlhf.pipeline import run_stages
from rlhf.sft import Fit, describe_fits, make_trainer, tokenized
from tests.rlhf.test_families import FAMILIES, save
from tests.rlhf.test_tokenization import prepared

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

TINY = {"width": 16, "n_layer": 1, "n_head": 2, "mlp_width": 32, "max_positions": 96}
CHAT = [
    ("Name a fruit.", "Apple."),
    ("And a colour, any you like?", "Blue, or green."),
    ("Add 2 and 2.", "4"),
]


def trainer_of(
    folder: Path, rows: list[dict[str, Any]], model: dict[str, Any], data: Any = None, **sft: Any
) -> Any:
    values = {
        "model": model,
        "data": {"max_length": 96, "max_new_tokens": 8} | (data or {}),
        "sft": {"batch_size": len(rows), **sft},
        "device": {"device": "cpu", "precision": "fp32", "threads": 1},
    }
    settings = config.build(RLHFRun, values, {}, "test")
    compute = resolve(DeviceConfig(device="cpu", precision="fp32", threads=1))
    dataset = Dataset.from_list(rows)
    trainer = make_trainer(settings, compute, folder, dataset, dataset)
    trainer.model.eval()
    return trainer


def learned(trainer: Any) -> list[str]:
    """The text of every stretch of tokens that has labels, special tokens shown, in the order of the data."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    stretches = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        marked = labels != -100
        assert torch.equal(labels[marked], ids[marked])
        begin = [i for i in range(len(ids)) if marked[i] and (i == 0 or not marked[i - 1])]
        end = [i for i in range(len(ids)) if marked[i] and (i + 1 == len(ids) or not marked[i + 1])]
        stretches += [
            trainer.processing_class.decode(ids[a : b + 1]) for a, b in zip(begin, end, strict=True)
        ]
    return stretches


def test_of_prompt_and_completion_the_completion_and_its_end_are_learned(tmp_path: Path) -> None:
    rows = reviews.demonstrations(1)[:5]
    trainer = trainer_of(tmp_path, rows, {"labgpt": TINY})
    tokenizer = trainer.processing_class
    expected = [tokenizer.decode(tokenizer(r["completion"])["input_ids"]) + " <eos>" for r in rows]
    assert learned(trainer) == expected


@pytest.mark.parametrize("family", ["qwen3", "smollm2"])
def test_of_a_chat_the_answer_and_its_end_are_learned(family: str, tmp_path: Path) -> None:
    """SmolLM2's padding is its end token, too: it must be learned all the same."""
    rows = [
        {
            "prompt": [{"role": "user", "content": ask}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for ask, answer in CHAT[::2]
    ]
    trainer = trainer_of(tmp_path, rows, {"path": str(save(FAMILIES[family], tmp_path / "model"))})
    assert [text.rstrip("\n") for text in learned(trainer)] == ["Apple.<|im_end|>", "4<|im_end|>"]


def test_of_a_conversation_all_answers_and_no_question_are_learned(tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": text}
        for ask, answer in CHAT[::2]
        for role, text in (("user", ask[:6]), ("assistant", answer))
    ]
    model = {"path": str(save(FAMILIES["smollm2"], tmp_path / "model"))}
    trainer = trainer_of(tmp_path, [{"messages": turns}] * 2, model)
    assert learned(trainer) == ["Apple.<|im_end|>", "4<|im_end|>"] * 2


def test_packed_examples_do_not_see_each_other(tmp_path: Path) -> None:
    """The packed batch has the loss of the same examples, each in a row of its own."""
    rows = reviews.demonstrations(1)[:6]
    plain, packed = (
        trainer_of(tmp_path, rows, {"labgpt": TINY}, packing=packing) for packing in (False, True)
    )
    assert len(packed.train_dataset) < len(plain.train_dataset) == 6

    def loss(trainer: Any) -> tuple[float, int]:
        data = trainer.train_dataset
        batch = trainer.data_collator([data[i] for i in range(len(data))])
        n_tokens = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            return float(trainer.model(**batch).loss), n_tokens

    torch.manual_seed(1)
    for parameter in plain.model.parameters():  # at its start the model hardly looks back
        parameter.data.normal_(std=0.5)
    packed.model.load_state_dict(plain.model.state_dict())
    (one, n_one), (other, n_other) = loss(plain), loss(packed)
    assert n_one == n_other
    assert other == pytest.approx(one, rel=1e-5)


def test_with_lora_only_adapters_are_trained(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, reviews.demonstrations(1)[:4], {"labgpt": TINY, "lora_rank": 2})
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


SHORT, LONG_ANSWER, LONG_PROMPT = (
    {"prompt": "pea", "completion": " good"},  # with its end, a byte being a token, 9 tokens
    {"prompt": "egg", "completion": " very" * 8},
    {"prompt": "fig?" * 10, "completion": " good"},
)


def write_rows(path: Path, *rows: tuple[dict[str, str], int]) -> None:
    """So many copies of each row, told apart by a number and the file's name."""
    mark = path.stem[1]
    lines = [row | {"prompt": f"{mark}{i}{row['prompt'][1:]}"} for row, count in rows for i in range(count)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def lengths(trainer: Any) -> list[int]:
    return [len(ids) for ids in trainer.train_dataset["input_ids"]]


def settings_of(tmp_path: Path, too_long: str, packing: bool = False) -> RLHFRun:
    write_rows(tmp_path / "data" / "train.jsonl", (SHORT, 8), (LONG_ANSWER, 3), (LONG_PROMPT, 2))
    write_rows(tmp_path / "data" / "test.jsonl", (SHORT, 4), (LONG_ANSWER, 1))
    data = {"demonstrations": str(tmp_path / "data"), "max_length": 32, "max_new_tokens": 8}
    values = {
        "model": {"path": str(save(FAMILIES["gpt2"], tmp_path / "base"))},
        "data": data | {"too_long": too_long},
        "sft": {"batch_size": 4, "packing": packing},
        "device": {"device": "cpu", "precision": "fp32", "threads": 1},
        "tracking": {"wandb": "disabled"},
    }
    return config.build(RLHFRun, values, {}, "test")


@pytest.mark.parametrize(
    ("too_long", "packing", "cut"),
    [("drop", False, 0), ("drop", True, 0), ("truncate_prompt", False, 2)],
)
def test_what_max_length_takes_away_is_told_before_training_and_kept_in_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], too_long: str, packing: bool, cut: int
) -> None:
    run_stages(settings_of(tmp_path, too_long, packing), tmp_path / "run", only="sft")
    said = capsys.readouterr().err
    line = (
        f"more than data.max_length 32 tokens: 5 of 13 demonstrations ({cut} with their prompt cut, "
        f"{5 - cut} left out), 1 of 5 held-out demonstrations (0 with their prompt cut, 1 left out)"
    )
    assert said.count(line) == 1
    assert said.index("starting in") < said.index(line) < said.index("finished in")
    nothing = {"last_turn_only": 0, "unlearned": 0, "unlike_trl": 0}
    assert Run.open(tmp_path / "run" / "sft").info["summary"]["demonstrations"] == {
        "train": {"rows": 13, "too_long": 5, "cut": cut, **nothing},
        "eval": {"rows": 5, "too_long": 1, "cut": 0, **nothing},
    }


def test_a_prompt_is_cut_at_its_beginning_and_its_answer_is_whole(tmp_path: Path) -> None:
    model = {"path": str(save(FAMILIES["gpt2"], tmp_path / "base"))}
    data = {"max_length": 32, "too_long": "truncate_prompt"}
    trainer = trainer_of(tmp_path, [SHORT, LONG_PROMPT], model, data)
    assert lengths(trainer) == [9, 32]
    assert learned(trainer) == [" good<|endoftext|>"] * 2


def test_where_all_demonstrations_fit_nothing_is_said(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, reviews.demonstrations(1)[:4], {"labgpt": TINY})
    assert [*trainer.fits.values()] == [Fit(4)] * 2
    assert describe_fits(trainer.fits, 96) == []


def test_conversations_that_teach_nothing_are_counted() -> None:
    tokenizer = prepared("llama 3")
    asked = {"role": "user", "content": "a film?", "weight": None}
    rows = [
        {"messages": [asked, {"role": "assistant", "content": "good", "weight": weight}]}
        for weight in (1, 0, 0)
    ]
    learned, fit = tokenized(Dataset.from_list(rows), tokenizer, 64, "error")
    assert (len(learned), fit) == (1, Fit(3, unlearned=2))
    (said,) = describe_fits({"train": fit}, 64)
    assert said == "2 conversations left out, of which no answer is to be learned (weight 0)"
    with pytest.raises(LabError, match="no answer of any demonstration is to be learned: weight is 0"):
        tokenized(Dataset.from_list(rows[1:]), tokenizer, 64, "error")
