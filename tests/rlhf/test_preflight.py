"""The dry pass: quick, the same as before it was, and with an estimate of memory."""

import json
from pathlib import Path
from typing import Any

import pytest

from lab import config
from lab.errors import LabError
from rlhf import data, memory, preflight, tokenization
from rlhf.config import STAGES, RLHFRun
from tests.rlhf.test_refusals import furnish, values, write
from tests.rlhf.test_tokenization import CHATML, build

GB = 10**9


def talk(*said: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(said)]


# ---- time ----


def test_many_rows_are_rendered_at_once_and_count_as_each_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside one that the template cannot render, which alone is named."""
    refusing = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no') }}{% endif %}",
        1,
    )
    tokenizer = build("<|im_start|>", "<|im_end|>", template=refusing, eos_token="<|endoftext|>")
    rows = [
        {
            "prompt": talk(f"word {i}", "yes", "and"),
            "chosen": talk("", "a" * (1 + i % 7))[1:],
            "rejected": talk("", "no")[1:],
        }
        for i in range(40)
    ]
    rows[17]["prompt"] = talk("a bad word", "yes", "and")
    loaded = data.load("comparisons", str(write(tmp_path / "c.jsonl", rows)))
    calls: list[int] = []
    original = type(tokenizer).apply_chat_template

    def counting(self: Any, conversation: Any, **options: Any) -> Any:
        calls.append(len(conversation) if isinstance(conversation[0], list) else 1)
        return original(self, conversation, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counting)
    monkeypatch.setattr(tokenization, "BATCH", 10)
    found = list(tokenization.counted("comparisons", loaded.rows, tokenizer))
    assert max(calls) == 20, "ten rows of two answers"
    alone = [tokenization._count_or_why("comparisons", row, tokenizer) for row in loaded.rows.to_list()]
    assert found == alone
    assert [i for i, count in enumerate(found) if isinstance(count, str)] == [17]
    lengths = preflight.measure("comparisons", loaded, tokenizer, 60)
    assert lengths.unfit_places == [f"{tmp_path / 'c.jsonl'}, line 18"]
    assert lengths.longest == max(count for count in alone if isinstance(count, int))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    furnish(tmp_path)
    return tmp_path


def test_rows_that_were_measured_are_not_measured_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.sources.WORTH_KEEPING", 0)
    settings = config.build(RLHFRun, values(), {}, "test")
    first = preflight.check(settings, STAGES, here / "run")
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "measure", None)
        again = preflight.check(settings, STAGES, here / "run")
        assert again.counts == first.counts
    with (here / "comparisons.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "new", "completions": [" a", " b"], "ranks": [1, 2]}) + "\n")
    after = preflight.check(settings, STAGES, here / "run").counts
    (grown,) = [one for one in after if after[one] != first.counts[one]]
    assert grown.kind == "comparisons"


# ---- memory ----


def device(monkeypatch: pytest.MonkeyPatch, there: int, free: int) -> None:
    monkeypatch.setattr(memory, "all_bytes", lambda _: there)
    monkeypatch.setattr(memory, "free_bytes", lambda _: free)


def test_what_the_stages_need_is_said_and_what_cannot_fit_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.build(RLHFRun, values(), {}, "test")

    def note() -> str:
        (line,) = [n for n in preflight.check(settings, STAGES, here / "run").notes if n.startswith("memory")]
        return line

    assert note().startswith("memory, estimated: sft 0.0 GB, collect 0.0 GB, reward 0.0 GB, ppo 0.0 GB, eval")
    device(monkeypatch, 16 * GB, 1_000)
    assert note().endswith("or free some")
    device(monkeypatch, 100_000, 100_000)
    with pytest.raises(
        LabError, match=r"^ppo needs 0\.0 GB of memory for weights and optimiser alone, and cpu"
    ):
        preflight.check(settings, STAGES, here / "run")
    assert not (here / "run").exists()


def test_memory_of_the_stages_by_hand() -> None:
    """GPT-2 XL on a GPU of 80 GB, as instructgpt.yaml has it."""
    from transformers import GPT2Config

    from tests.conftest import REPO

    file = config.read_yaml(REPO / "configs" / "rlhf" / "instructgpt.yaml")
    model, n = GPT2Config(n_embd=1600, n_layer=48, n_head=25), 1_557_611_200

    def found(**more: Any) -> dict[str, memory.Needs]:
        settings = config.build(RLHFRun, config.merge(file, more), {}, "x")
        return memory.needs(settings, model, n, {}, True, 80 * GB)

    whole = found()
    assert whole["sft"].kept == whole["reward"].kept == 16 * n  # weights, gradients, two moments
    assert whole["ppo"].kept == 40 * n  # policy and critic; reference and reward model
    assert whole["eval"].kept == 12 * n
    assert whole["ppo"].total < 80 * GB
    adapters = found(model={"lora_rank": 8}, ppo={"gradient_checkpointing": False})
    assert 2 * n < adapters["sft"].kept < 2.2 * n, "the base in bf16, and little more"
    assert adapters["ppo"].kept < 7 * n
    smaller = found(ppo={"micro_batch_size": 1, "sampling_batch_size": 1})
    assert smaller["ppo"].passing < whole["ppo"].passing
