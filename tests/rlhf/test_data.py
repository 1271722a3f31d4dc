"""Data for the stages: every known form in, one form out, and every mistake one line that names its place."""

import contextlib
import hashlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import LabError
from rlhf import data, forms, sources
from rlhf.data import Dropped
from rlhf.forms import Row, Text
from rlhf.reviews import Split

Load = Callable[..., Dataset]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: Any) -> str:
    """A file of rows, in the format of its suffix; returns its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def error(load: Load, *arguments: Any, **options: Any) -> str:
    """The message it refuses with; always a single line that ends a sentence."""
    with pytest.raises(LabError) as caught:
        load(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message[-1] in ".?"
    return message


def transcript(*speeches: str) -> str:
    """hh-rlhf's way of writing a dialogue, which the human begins."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {speech}" for i, speech in enumerate(speeches))


# ---- demonstrations ----

COMPLETION = {"prompt": "2 + 2 =", "completion": " 4"}
CONVERSATION = {"prompt": [user("2 + 2?")], "completion": [assistant("4")]}
MESSAGES = {"messages": [user("2 + 2?"), assistant("4")]}
TEXT = {"text": "2 + 2 = 4"}
PREFERENCE = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
RANKING = {"prompt": "2 + 2 =", "completions": [" 5", " 4", " 3"], "ranks": [2, 1, 2]}
HH = {"chosen": transcript("2 + 2?", "4"), "rejected": transcript("2 + 2?", "5")}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (COMPLETION, COMPLETION),
        (CONVERSATION, CONVERSATION),
        (MESSAGES, MESSAGES),
        (TEXT, TEXT),
        (PREFERENCE, COMPLETION),
        (RANKING, COMPLETION),
        (HH, CONVERSATION),
    ],
    ids=["text", "conversation", "messages", "whole-text", "preference", "ranking", "hh"],
)
def test_demonstrations_come_in_trls_formats(tmp_path: Path, row: Row, expected: Row, suffix: str) -> None:
    source = write(tmp_path / f"a{suffix}", row | {"other": 7}, row)
    assert data.demonstrations(source).to_list() == [expected, expected]


def test_a_message_keeps_its_role_and_content_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"messages": [user("a") | {"weight": 1}, assistant("b")]})
    assert data.demonstrations(source).to_list() == [{"messages": [user("a"), assistant("b")]}]


def test_messages_go_before_a_copy_of_their_prompt(tmp_path: Path) -> None:
    """HuggingFaceH4/no_robots has both."""
    source = write(tmp_path / "a.jsonl", MESSAGES | {"prompt": "2 + 2?"})
    assert data.demonstrations(source).to_list() == [MESSAGES]
    assert data.prompts(source).to_list() == [{"prompt": [user("2 + 2?")]}]


# ---- comparisons ----


def comparison(prompt: Text, *completions: Text, ranks: list[int] | None = None, **others: Any) -> Row:
    """A row in the canonical form."""
    row = {"prompt": prompt, "completions": list(completions), "ranks": ranks or [1, 2]}
    return row | {"finished": [True] * len(completions), "source": "a"} | others


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PREFERENCE, comparison("2 + 2 =", " 4", " 5")),
        (PREFERENCE | {"source": "sums"}, comparison("2 + 2 =", " 4", " 5", source="sums")),
        (
            PREFERENCE | {"chosen_finished": True, "rejected_finished": False},
            comparison("2 + 2 =", " 4", " 5", finished=[True, False]),
        ),
        (
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            comparison([user("a")], [assistant("b")], [assistant("c")]),
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            comparison([user("a")], [assistant("b")], [assistant("c")]),
        ),
        (  # the one goes on where the other ends
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b"), assistant("c")]},
            comparison([user("a")], [assistant("b")], [assistant("b"), assistant("c")]),
        ),
        (  # UltraFeedback
            {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            comparison([user("a")], [assistant("b")], [assistant("c")]),
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            comparison("The sky is", " blue.", " black."),
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is blue. Or so."},
            comparison("The sky is", " blue.", " blue. Or so."),
        ),
        (HH, comparison([user("2 + 2?")], [assistant("4")], [assistant("5")])),
        (
            {"chosen": transcript("a", "b", "c", "d"), "rejected": transcript("a", "b", "c", "e\n\nf")},
            comparison([user("a"), assistant("b"), user("c")], [assistant("d")], [assistant("e\n\nf")]),
        ),
        (RANKING, comparison("2 + 2 =", " 5", " 4", " 3", ranks=[2, 1, 2])),
        (
            RANKING | {"finished": [True, True, False], "scores": [0, 1.5, 0], "source": "sums"},
            comparison(
                *("2 + 2 =", " 5", " 4", " 3"),
                **{"ranks": [2, 1, 2], "finished": [True, True, False], "source": "sums"},
                scores=[0.0, 1.5, 0.0],
            ),
        ),
    ],
)
def test_comparisons_come_in_one_form(tmp_path: Path, row: Row, expected: Row, suffix: str) -> None:
    found = data.comparisons(write(tmp_path / f"a{suffix}", row, row)).to_list()
    assert found == [expected, expected]


def test_scores_may_be_there_for_some_rows_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", RANKING, RANKING | {"scores": [0, 1, 0]})
    assert data.comparisons(source)["scores"][:] == [None, [0.0, 1.0, 0.0]]


def test_rankings_in_which_all_tie_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tie = RANKING | {"ranks": [1, 1, 1]}
    source = write(tmp_path / "a.jsonl", tie, RANKING, tie)
    dropped = Dropped()
    assert len(data.comparisons(source, dropped=dropped)) == 1
    assert (dropped.ties, dropped.bad_rows, caplog.records) == (2, 0, [])
    data.comparisons(source)  # nobody asks: never silently
    assert f"{source}: left out 2 ties" in caplog.text
    assert "all completions tie" in error(data.comparisons, write(tmp_path / "b.jsonl", tie))
    assert len(data.prompts(source)) == 1  # a tie has a prompt all the same


def test_a_sampled_completion_may_be_its_end_alone(tmp_path: Path) -> None:
    """A policy can stop at once. Where nobody says that it did, an empty completion is a mistake."""
    row = {"prompt": "a", "completions": ["", "b"], "ranks": [2, 1]}
    finished = write(tmp_path / "a.jsonl", row | {"finished": [True, True]})
    assert data.comparisons(finished)[0]["completions"] == ["", "b"]
    for mistake in (row, row | {"finished": [False, True]}):
        assert "line 1: completion 1 is empty" in error(
            data.comparisons, write(tmp_path / "b.jsonl", mistake)
        )


def test_a_file_called_by_its_split_alone_is_named_after_its_folder(tmp_path: Path) -> None:
    for name in ("helpful/train", "helpful/test", "sums"):
        write(tmp_path / f"{name}.jsonl", PREFERENCE)
    assert set(data.comparisons(str(tmp_path))["source"]) == {"helpful", "sums"}
    assert set(data.comparisons(str(tmp_path), "eval")["source"]) == {"helpful"}


# ---- pairs ----


def pairs_of(rows: list[Row]) -> list[Row]:
    return [pair for row in rows for pair in data.pairs_of(row)]


def test_pairs_are_trls_preference_rows(tmp_path: Path) -> None:
    row = RANKING | {"finished": [True, True, False]}
    shared = {"prompt": "2 + 2 =", "chosen": " 4", "chosen_finished": True, "source": "a"}
    assert pairs_of(data.comparisons(write(tmp_path / "a.jsonl", row)).to_list()) == [
        shared | {"rejected": " 5", "rejected_finished": True},
        shared | {"rejected": " 3", "rejected_finished": False},
    ]


texts = st.text(min_size=1, max_size=8).filter(str.strip)


@st.composite
def rankings(draw: st.DrawFn) -> Row:
    """A row in the canonical form, with different completions not all of which tie."""
    prompt, completions = draw(texts), draw(st.lists(texts, min_size=2, max_size=5, unique=True))
    k = len(completions)
    ranks = st.lists(st.integers(1, k), min_size=k, max_size=k).filter(lambda ranks: len(set(ranks)) > 1)
    finished = draw(st.lists(st.booleans(), min_size=k, max_size=k))
    score = st.floats(-10, 10)
    scores = draw(st.lists(score, min_size=k, max_size=k))
    return comparison(prompt, *completions, ranks=draw(ranks), finished=finished, scores=scores)


@given(st.lists(rankings(), min_size=1, max_size=4))
@settings(max_examples=50)
def test_rankings_come_back_from_a_file_as_they_were(rows: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert data.comparisons(write(Path(folder) / "b.jsonl", *rows)).to_list() == rows


@given(st.lists(rankings(), min_size=1, max_size=4))
@settings(max_examples=50)
def test_every_pair_of_different_rank_is_there_once_and_the_better_is_chosen(rows: list[Row]) -> None:
    pairs = pairs_of(rows)
    untied = sum(a != b for row in rows for a, b in combinations(row["ranks"], 2))
    assert len(pairs) == untied
    found = {(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs}
    for row in rows:
        ranked = sorted(zip(row["ranks"], row["completions"], strict=True))
        for (better, chosen), (worse, rejected) in combinations(ranked, 2):
            assert better == worse or (row["prompt"], chosen, rejected) in found


def test_pairs_are_read_back_as_comparisons_of_two(tmp_path: Path) -> None:
    row = RANKING | {"finished": [True, True, False], "source": "sums"}
    pairs = pairs_of(data.comparisons(write(tmp_path / "a.jsonl", row)).to_list())
    assert pairs_of(data.comparisons(write(tmp_path / "b.jsonl", *pairs)).to_list()) == pairs


# ---- prompts ----


@pytest.mark.parametrize("row", [COMPLETION, PREFERENCE, RANKING, {"prompt": "2 + 2 ="}])
def test_prompts_of_texts(tmp_path: Path, row: Row) -> None:
    source = write(tmp_path / "a.jsonl", row, row | {"prompt": "first"}, row, row | {"prompt": "last"})
    assert data.prompts(source).to_list() == [{"prompt": "2 + 2 ="}, {"prompt": "first"}, {"prompt": "last"}]


@pytest.mark.parametrize("row", [CONVERSATION, MESSAGES, HH])
def test_prompts_of_conversations(tmp_path: Path, row: Row) -> None:
    assert data.prompts(write(tmp_path / "a.jsonl", row, row)).to_list() == [{"prompt": [user("2 + 2?")]}]


def test_whole_texts_have_no_prompts(tmp_path: Path) -> None:
    assert "line 1: has the columns text." in error(data.prompts, write(tmp_path / "a.jsonl", TEXT))


# ---- splits ----


def test_a_folder_has_the_splits_that_its_files_and_folders_speak_of(tmp_path: Path) -> None:
    for name in (
        "train-00000-of-00002",
        "train-00001-of-00002",
        "more",
        "test",
        "deep/validation/x",
        ".hidden",
    ):
        write(tmp_path / f"{name}.jsonl", {"prompt": name})
    (tmp_path / "README.md").write_text("not data")
    source = str(tmp_path)
    train = data.prompts(source)["prompt"][:]
    assert train == ["more", "train-00000-of-00002", "train-00001-of-00002"]
    assert data.prompts(source, "eval")["prompt"][:] == ["deep/validation/x"]  # not yet the test
    assert sources.has_eval(source)


def test_a_file_is_all_training(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", TEXT)
    assert not sources.has_eval(source)
    assert f"{source}: has no eval split, only train. Hold out" in error(data.demonstrations, source, "eval")


def test_a_folder_of_tests_alone_is_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", TEXT)
    assert "has no train split, only test. Name the file itself." in error(data.demonstrations, str(tmp_path))


def test_files_of_a_folder_must_agree(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", TEXT)
    write(tmp_path / "b.jsonl", COMPLETION)
    message = error(data.demonstrations, str(tmp_path))
    assert (
        f"{tmp_path}/b.jsonl, line 1: has prompt as a text, while {tmp_path}/a.jsonl, line 1 has" in message
    )


@pytest.mark.parametrize(("split", "count"), [("train", 76), ("eval", 20)])
def test_the_built_in_task(split: Split, count: int) -> None:
    prompts = data.prompts("reviews", split)["prompt"][:]
    assert len(prompts) == count
    assert sources.has_eval("reviews")
    demonstrations = data.demonstrations("reviews", split)
    assert demonstrations.column_names == ["prompt", "completion"]
    assert len(demonstrations) == 40 * count
    assert set(demonstrations["prompt"]) == set(prompts)


def test_comparisons_of_the_built_in_task_are_made_not_read() -> None:
    assert "Let a labeler rank" in error(data.comparisons, "reviews")


# ---- the Hub ----


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A Hub of one data set, and the list of what was asked of it."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str | None) -> Any:
        asked.append((name, config, split))
        rows = Dataset.from_list([PREFERENCE, PREFERENCE | {"prompt": "a"}])
        return DatasetDict({"train": rows, "test": rows.select([1])}) if split is None else rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_a_data_set_of_the_hub_has_its_own_splits(hub: list[tuple[Any, ...]]) -> None:
    assert data.comparisons("hub:me/sums")["source"][:] == ["me/sums"] * 2
    assert len(data.prompts("hub:me/sums", "eval")) == 1
    assert sources.has_eval("hub:me/sums")
    assert hub == [("me/sums", None, None)] * 3


@pytest.mark.parametrize("source", ["hub:me/sums@train[:9]#easy", "hub:me/sums#easy@train[:9]"])
def test_a_split_of_the_hub_is_all_training(hub: list[tuple[Any, ...]], source: str) -> None:
    assert len(data.demonstrations(source)) == 2
    assert hub == [("me/sums", "easy", "train[:9]")]
    assert "has no eval split, only train. Hold out" in error(data.demonstrations, source, "eval")


@pytest.mark.parametrize("source", ["hub:sums", "hub:", "hub:me/sums@", "hub:../x/y"])
def test_a_name_the_hub_cannot_have(hub: list[tuple[Any, ...]], source: str) -> None:
    assert f"{source}: not understood. A data set on the Hub is hub:OWNER/NAME" in error(data.prompts, source)
    assert hub == []


def test_a_hub_out_of_reach_is_one_line() -> None:
    """The real client, told to stay offline."""
    code = (
        "from rlhf import data\nfrom lab.errors import LabError\n"
        "try: data.prompts('hub:me/sums')\nexcept LabError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    message = run_python(code, **environment).splitlines()
    assert len(message) == 1
    assert message[0].startswith("hub:me/sums: cannot be loaded: Couldn't reach 'me/sums'")
    assert message[0].endswith("Check its name and the network, or name a file.")


def run_python(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


# ---- what is refused ----


def refused(load: Load, good: Row, rows: dict[str, Any]) -> list[Any]:
    """Test cases: what is wrong, and a row of which that is true, behind a good one of the same form."""
    return [pytest.param(load, good, row, problem, id=problem) for problem, row in rows.items()]


BAD_DEMONSTRATIONS = {
    "the row is a list, no object with columns": ["a", "b"],
    "prompt is missing": {"completion": "a"},
    "completion is null": COMPLETION | {"completion": None},
    "completion is a number; it must be a text or a list of messages": COMPLETION | {"completion": 4},
    "completion is empty": COMPLETION | {"completion": " \n"},
    "prompt is empty": COMPLETION | {"prompt": ""},
    "prompt holds half a surrogate pair": COMPLETION | {"prompt": "a\ud800"},
    "completion is a conversation, but the prompt a text": COMPLETION | {"completion": [assistant("4")]},
    "has prompt as a conversation, while": CONVERSATION,
}
BAD_CONVERSATIONS = {
    "prompt is empty": CONVERSATION | {"prompt": []},
    "completion is empty": CONVERSATION | {"completion": []},
    "prompt ends with a turn of assistant; the last turn must be the user's": (
        CONVERSATION | {"prompt": [user("a"), assistant("b")]}
    ),
    "completion begins with a turn of user": CONVERSATION | {"completion": [user("a"), assistant("b")]},
    "completion ends with a turn of user": CONVERSATION | {"completion": [assistant("a"), user("b")]},
    "prompt, message 2 has the role 'usr'; known are system, developer, user, assistant, tool. Did you": (
        CONVERSATION | {"prompt": [user("a"), {"role": "usr", "content": "b"}]}
    ),
    "prompt, message 1 has the role ['user']; known are": (
        CONVERSATION | {"prompt": [{"role": ["user"], "content": "b"}]}
    ),
    'prompt, message 1 is no object with "role" and "content"': (
        CONVERSATION | {"prompt": [{"speaker": "human", "words": "b"}]}
    ),
    "content of prompt, message 1 is null; it must be a text": (
        CONVERSATION | {"prompt": [{"role": "user", "content": None}]}
    ),
}
BAD_MESSAGES = {
    "messages is a text; it must be a list of messages": {"messages": "a"},
    "messages is empty": {"messages": []},
    "messages ends with a turn of user": {"messages": [user("a")]},
}
BAD_PREFERENCES = {
    "chosen and rejected are the same": PREFERENCE | {"rejected": " 4"},
    "rejected is null": PREFERENCE | {"rejected": None},
    "rejected is empty": PREFERENCE | {"rejected": ""},
    "source is a number; it must be a text": PREFERENCE | {"source": 3},
    "finished is [True, 'no']": PREFERENCE | {"chosen_finished": True, "rejected_finished": "no"},
    "one of chosen and rejected is a text, the other a conversation": (
        {"chosen": "4", "rejected": [assistant("5")]}
    ),
    "prompt is a text, chosen a conversation without it": (
        {"prompt": "b", "chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("y")]}
    ),
    "chosen and rejected have no common beginning": {"chosen": "black", "rejected": "blue"},
    "chosen and rejected are the same. Correct": {"chosen": "blue", "rejected": "blue"},
    "prompt ends with a turn of assistant": {
        "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
        "rejected": [user("a"), assistant("b"), user("e"), assistant("f")],
    },
}
BAD_TRANSCRIPTS = {
    "rejected is a transcript that does not begin with 'Human:'": HH | {"rejected": "\n\nAssistant: a"},
    "chosen is a transcript that does not begin with 'Human:'": HH | {"chosen": "Hi!" + HH["chosen"]},
    "chosen is a transcript that does not end with a turn of 'Assistant:'": (
        HH | {"chosen": transcript("a", "b", "c")}
    ),
    "chosen is empty": HH | {"chosen": transcript("2 + 2?", "")},
    "chosen and rejected differ before the last reply": HH | {"chosen": transcript("3 + 3?", "6")},
    "prompt ends with a turn of assistant": {
        key: f"{transcript('a', 'b')}\n\nAssistant: {key}" for key in HH
    },
    "chosen and rejected are the same": dict.fromkeys(HH, HH["chosen"]),
}
BAD_RANKINGS = {
    "ranks is missing": {key: RANKING[key] for key in ("prompt", "completions")},
    "ranks is a text; it must be a list": RANKING | {"ranks": "213"},
    "ranks has 2 entries for 3 completions": RANKING | {"ranks": [2, 1]},
    "ranks is [0, 1, 2]; it must be of 1, the best, to 3": RANKING | {"ranks": [0, 1, 2]},
    "ranks is [7, 9, 8]; it must be of 1, the best, to 3": RANKING | {"ranks": [7, 9, 8]},
    "ranks is [True, 2, 2]; it must be of 1, the best, to 3": RANKING | {"ranks": [True, 2, 2]},
    "ranks is [1.5, 2, 2]; it must be of 1, the best, to 3": RANKING | {"ranks": [1.5, 2, 2]},
    "completions holds 1; a ranking is of two or more": RANKING | {"completions": ["a"], "ranks": [1]},
    "completion 2 is null": RANKING | {"completions": ["a", None, "c"]},
    "completion 3 is empty": RANKING | {"completions": ["a", "b", ""]},
    "completion 1 and completion 2 are the same, so none is better": (
        RANKING | {"completions": ["a", "a"], "ranks": [1, 2]}
    ),
    "finished has 1 entries for 3 completions": RANKING | {"finished": [True]},
    "finished is [1, 1, 0]; it must be of true and false": RANKING | {"finished": [1, 1, 0]},
    "scores is [1, None, 2]; it must be of finite numbers": RANKING | {"scores": [1, float("nan"), 2]},
    "scores is a number; it must be a list": RANKING | {"scores": 1},
}


@pytest.mark.parametrize(
    ("load", "good", "row", "problem"),
    [
        *refused(data.demonstrations, COMPLETION, BAD_DEMONSTRATIONS),
        *refused(data.demonstrations, CONVERSATION, BAD_CONVERSATIONS),
        *refused(data.demonstrations, MESSAGES, BAD_MESSAGES),
        *refused(
            data.demonstrations, TEXT, {"text is empty": {"text": " "}, "text is a list": {"text": ["a"]}}
        ),
        *refused(data.comparisons, PREFERENCE, BAD_PREFERENCES),
        *refused(data.comparisons, HH, BAD_TRANSCRIPTS),
        *refused(data.comparisons, RANKING, BAD_RANKINGS),
        *refused(
            data.prompts,
            {"prompt": "a"},
            {"prompt is a number": {"prompt": 1}, "prompt is null": {"prompt": None}},
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_or_skipped_and_counted(
    tmp_path: Path, load: Load, good: Row, row: Any, problem: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n")  # a blank line is no row, but it counts
    message = error(load, str(path))
    assert message.startswith(f"{path}, line 3: {problem}")
    assert message.endswith("Correct the row, remove it, or set data.bad_rows to skip.")
    dropped = Dropped()
    assert len(load(str(path), strict=False, dropped=dropped)) == 1
    assert (dropped.bad_rows, dropped.rows, dropped.places) == (1, 2, [f"{path}, line 3"])
    assert dropped.first.startswith(f"{path}, line 3: {problem}"[: len(dropped.first)])


def test_a_row_of_a_table_is_named_by_its_number(tmp_path: Path) -> None:
    rows = [COMPLETION, COMPLETION | {"completion": ""}]
    for name in ("a.json", "a.parquet"):
        source = write(tmp_path / name, *rows)
        assert error(data.demonstrations, source).startswith(f"{source}, row 2: completion is empty")


def test_what_is_skipped_is_logged_where_nobody_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "a.jsonl", HH, {"chosen": "no transcript", "rejected": "no transcript either"})
    with caplog.at_level(logging.WARNING):
        assert len(data.comparisons(source, strict=False)) == 1
    assert (
        f"{source}: left out 0 ties and 1 rows that cannot be used (the first: {source}, line 2"
        in caplog.text
    )


def test_nothing_but_bad_rows_is_an_error_even_where_these_are_skipped(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", COMPLETION | {"prompt": ""})
    assert f"{source}, line 1: prompt is empty" in error(data.demonstrations, source, strict=False)


@pytest.mark.parametrize(
    ("load", "row", "hint"),
    [
        (data.demonstrations, {"promt": "a", "completion": "b"}, "Did you mean 'prompt'?"),
        (data.demonstrations, {"prompt": "a", "Completion": "b"}, "Did you mean 'completion'?"),
        (data.comparisons, {"prompt": "a", "choosen": "b", "rejected": "c"}, "Did you mean 'chosen'?"),
        (data.prompts, {"prompts": "a"}, "Did you mean 'prompt'?"),
    ],
)
def test_wrong_columns_are_listed_beside_the_known(tmp_path: Path, load: Load, row: Row, hint: str) -> None:
    source = write(tmp_path / "a.jsonl", row)
    message = error(load, source)
    assert message.startswith(f"{source}, line 1: has the columns {', '.join(row)}. Name them as in one of: ")
    assert "chosen + rejected" in message
    assert message.endswith(hint)


def test_json_that_does_not_parse_is_named_by_its_line(tmp_path: Path) -> None:
    lines, whole, latin = tmp_path / "a.jsonl", tmp_path / "a.json", tmp_path / "b.jsonl"
    lines.write_text('{"text": "a"}\n\n{"text": "b"\n')
    assert f"{lines}, line 3: not JSON: Expecting ',' delimiter at column 13." in error(
        data.demonstrations, str(lines)
    )
    whole.write_text('[{"text": "a"},\n{"text" "b"}]\n')
    assert f"{whole}, line 2: not JSON: Expecting ':' delimiter at column 9." in error(
        data.demonstrations, str(whole)
    )
    latin.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    assert f"{latin}, line 2: not JSON: 'utf-8' codec can't decode" in error(data.demonstrations, str(latin))


def test_a_file_that_is_missing_empty_or_no_data(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl")
    assert error(data.demonstrations, source) == f"{source}: is empty. Name data with rows in it."
    missing = str(tmp_path / "trian.jsonl")
    assert f"{missing!r}: no such file or folder. Did you mean 'train.jsonl'?" in error(data.prompts, missing)
    assert "'reveiws': no such file or folder. Did you mean 'reviews'?" in error(data.prompts, "reveiws")
    assert "or folder. A source is a .jsonl, .json, .csv" in error(data.prompts, "")  # not this folder
    (tmp_path / "notes.docx").touch()
    assert "notes.docx: not a kind of file" in error(data.prompts, str(tmp_path / "notes.docx"))
    (tmp_path / "empty").mkdir()
    assert "empty: holds no file of rows" in error(data.prompts, str(tmp_path / "empty"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is how it should begin and end")
    assert "a.parquet: not readable as Parquet: " in error(data.prompts, str(tmp_path / "a.parquet"))
    assert "cannot be read: File name too long" in error(data.prompts, "a" * 300)


def test_a_split_that_there_cannot_be_is_a_mistake_in_the_code(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        data.prompts(write(tmp_path / "a.jsonl", COMPLETION), "validation")  # type: ignore[arg-type]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["user", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
        | st.fixed_dictionaries({"role": st.sampled_from(forms.ROLES) | inner, "content": inner})
    ),
    max_leaves=8,
)
columns = ["prompt", "completion", "messages", "text", "chosen", "rejected", "completions", "ranks", "source"]
columns += ["scores", "finished", "chosen_finished"]


good_rows = st.sampled_from([COMPLETION, CONVERSATION, MESSAGES, TEXT, PREFERENCE, RANKING, HH])
almost_good_rows = st.builds(
    lambda good, column, value: good | {column: value}, good_rows, st.sampled_from(columns), values
)
any_rows = st.dictionaries(st.sampled_from(columns), values) | values


@given(st.lists(good_rows | almost_good_rows | any_rows, max_size=2), st.booleans())
@settings(max_examples=200)
def test_whatever_a_file_holds_is_data_or_one_clear_line(rows: list[Any], strict: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder) / "a.jsonl", *rows)
        for load in (data.demonstrations, data.comparisons, data.prompts):
            with contextlib.suppress(LabError):
                assert len(load(source, strict=strict, dropped=Dropped())) >= 1
                continue
            assert error(load, source, strict=strict).startswith(source)


# ---- holding out ----

some_prompts = st.lists(texts, min_size=2, max_size=30).filter(lambda found: len(set(found)) > 1)
fractions = st.floats(0.01, 0.99)


@given(some_prompts, fractions, st.integers(0, 5))
@settings(max_examples=50)
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(
    prompts: list[str], fraction: float, seed: int
) -> None:
    rows = [{"prompt": prompt, "number": i} for i, prompt in enumerate(prompts)]
    train, held_out = (side.to_list() for side in data.hold_out(Dataset.from_list(rows), fraction, seed))
    assert train
    assert held_out
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert sorted(train + held_out, key=lambda row: row["number"]) == rows
    for side in (train, held_out):
        assert [row["number"] for row in side] == sorted(row["number"] for row in side)


def test_the_same_prompts_are_held_out_whatever_else_there_is() -> None:
    """So that what is evaluated on was seen by none of the stages."""
    few, many = ([{"prompt": f"{i}"} for i in range(n)] for n in (200, 2_000))
    _, of_few = data.hold_out(Dataset.from_list(few), 0.2, seed=1)
    _, of_many = data.hold_out(Dataset.from_list(many), 0.2, seed=1)
    assert set(of_few["prompt"]) == {prompt for prompt in of_many["prompt"] if int(prompt) < 200}
    assert 0.17 < len(of_many) / 2_000 < 0.23
    assert set(data.hold_out(Dataset.from_list(few), 0.2, seed=2)[1]["prompt"]) != set(of_few["prompt"])
    assert of_few["prompt"][:4] == ["9", "15", "16", "19"]  # in every process


def test_of_conversations_the_prompt_is_all_but_the_last_turn() -> None:
    rows = [{"messages": [user(f"{i % 5}"), assistant(f"{i}")]} for i in range(20)]
    train, held_out = data.hold_out(Dataset.from_list(rows), 0.3, seed=0)
    asked = [{messages[0]["content"] for messages in side["messages"]} for side in (train, held_out)]
    assert not asked[0] & asked[1]
    _, same = data.hold_out(Dataset.from_list([{"prompt": row["messages"][:1]} for row in rows]), 0.3, seed=0)
    assert {prompt[0]["content"] for prompt in same["prompt"]} == asked[1]


def test_what_cannot_be_held_out() -> None:
    with pytest.raises(LabError, match="no two rows have different prompts"):
        data.hold_out(Dataset.from_list([COMPLETION, COMPLETION]), 0.5, seed=0)
    with pytest.raises(ValueError, match=r"fraction 1\.0 is not between 0 and 1"):
        data.hold_out(Dataset.from_list([COMPLETION]), 1.0, seed=0)


# ---- fingerprint, speed, imports ----


def test_the_fingerprint_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", TEXT, TEXT)
    sha256 = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    assert sources.fingerprint(source) == {"source": source, "sha256": sha256}


def test_the_fingerprint_of_a_folder_changes_with_any_file(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", TEXT)
    write(tmp_path / "test.json", TEXT, TEXT)
    before = sources.fingerprint(str(tmp_path))
    write(tmp_path / "test.json", TEXT, {"text": "2 + 2 = 5"})
    assert sources.fingerprint(str(tmp_path))["sha256"] != before["sha256"]


def test_rows_that_come_from_no_file_have_a_fingerprint_too(hub: list[tuple[Any, ...]]) -> None:
    assert sources.fingerprint("hub:me/sums")["sha256"]
    again = sources.fingerprint("reviews")
    assert again == {"source": "reviews", "sha256": REVIEWS_SHA256}


REVIEWS_SHA256 = "dccb1448af1875004ea571f77c88db03eb527d6d0e505bdad21c17adc1c9edd7"


def test_a_large_file_is_read_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = 20_000
    path.write_text((json.dumps(HH) + "\n") * rows)
    began = time.process_time()
    assert len(data.comparisons(str(path))) == rows
    assert time.process_time() - began < 5  # takes 0.5; quadratic code would take minutes


def test_importing_it_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time\nbegan = time.process_time()\nimport rlhf.data\n"
        "print(time.process_time() - began)\n"
        "print(*{'torch', 'datasets', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules))"
    )
    seconds, heavy = run_python(code).split("\n")[:2]
    assert float(seconds) < 0.2
    assert heavy == ""
