"""Data as people have it: each format with the rows it becomes, or the line it is refused with."""

import bz2
import contextlib
import csv
import gzip
import json
import lzma
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import Dataset, DatasetDict

from lab.errors import LabError
from rlhf import data, sources
from rlhf.data import Dropped


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def lines(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [user("a?"), bot("b.")]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]

# What a row is, and the demonstration it becomes.
DEMONSTRATIONS: dict[str, tuple[Any, Any]] = {
    "TRL, unpaired": (
        {"prompt": "a?", "completion": "b.", "label": True},
        {"prompt": "a?", "completion": "b."},
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"prompt": "Add.\n\n1, 2", "completion": "3"},
    ),
    "Alpaca, no input": (
        {"instruction": "Hi.", "input": "", "output": "Ho."},
        {"prompt": "Hi.", "completion": "Ho."},
    ),
    "Alpaca, LLaMA-Factory's": (
        {"instruction": "c?", "input": "", "output": "d.", "system": "Be brief.", "history": [["a?", "b."]]},
        {"prompt": [SYSTEM, *TALK, user("c?")], "completion": [bot("d.")]},
    ),
    "Dolly": (
        {"instruction": "Who?", "context": "It was Ann.", "response": "Ann", "category": "closed_qa"},
        {"prompt": "Who?\n\nIt was Ann.", "completion": "Ann"},
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b."}],
            "system": "Be brief.",
        },
        {"messages": [SYSTEM, *TALK]},
    ),
    "OpenAI chat": (
        {"messages": [{"role": "developer", "content": "Be brief."}, *TALK]},
        {"messages": [{"role": "developer", "content": "Be brief."}, *TALK]},
    ),
    "content as parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "?"}]},
                TALK[1],
            ]
        },
        {"messages": TALK},
    ),
    "tool calls": (
        {
            "messages": [
                user("1+1?"),
                {"role": "assistant", "content": None, "tool_calls": CALL},
                {"role": "tool", "content": "2", "tool_call_id": "x"},
                bot("2."),
            ],
            "tools": [{"name": "add"}],
        },
        {
            "messages": [
                user("1+1?") | {"tools": json.dumps([{"name": "add"}])},
                {"role": "assistant", "content": "", "tool_calls": json.dumps(CALL)},
                {"role": "tool", "content": "2", "tool_call_id": "x"},
                bot("2."),
            ]
        },
    ),
    "an answer of no weight": (
        {"messages": [*TALK[:1], bot("b.") | {"weight": 0}, user("c?"), bot("d.") | {"weight": 1}]},
        {"messages": [*TALK[:1], bot("b.") | {"weight": 0}, user("c?"), bot("d.")]},
    ),
    "UltraFeedback, whose messages repeat what was chosen": (
        {
            **{
                "prompt": "a?",
                "prompt_id": "9",
                "messages": TALK,
                "score_chosen": 8.0,
                "score_rejected": 3.0,
            },
            **{"chosen": TALK, "rejected": [user("a?"), bot("c.")]},
        },
        {"prompt": [user("a?")], "completion": [bot("b.")]},
    ),
    "LIMA": ({"conversations": ["a?", "b."], "source": "stackexchange"}, {"messages": TALK}),
    "Capybara": (
        {"source": "x", "conversation": [{"input": "a?", "output": "b."}, {"input": "c?", "output": "d."}]},
        {"messages": [*TALK, user("c?"), bot("d.")]},
    ),
    "XTuner": (
        {"conversation": [{"system": "Be brief.", "input": "a?", "output": "b."}]},
        {"messages": [SYSTEM, *TALK]},
    ),
    "Open-Orca": (
        {"id": "1", "system_prompt": "Be brief.", "question": "a?", "response": "b."},
        {"prompt": [SYSTEM, user("a?")], "completion": [bot("b.")]},
    ),
    "Open-Orca, no system prompt": (
        {"id": "1", "system_prompt": "", "question": "a?", "response": "b."},
        {"prompt": [user("a?")], "completion": [bot("b.")]},
    ),
    "a text with a system message": (
        {"system": "Be brief.", "prompt": "a?", "completion": "b."},
        {"prompt": [SYSTEM, user("a?")], "completion": [bot("b.")]},
    ),
    "Alpaca, no history yet": (
        {"instruction": "a?", "input": "", "output": "b.", "history": []},
        {"prompt": [user("a?")], "completion": [bot("b.")]},
    ),
    "Alpaca by pandas": (
        {"instruction": "Hi.", "input": float("nan"), "output": "Ho."},
        {"prompt": "Hi.", "completion": "Ho."},
    ),
    "a class and no feedback": (
        {"question": "a?", "answer": "b.", "label": 3},
        {"prompt": "a?", "completion": "b."},
    ),
    "input and output": ({"input": "a?", "output": "b."}, {"prompt": "a?", "completion": "b."}),
    "question and answer": ({"question": "a?", "answer": "b."}, {"prompt": "a?", "completion": "b."}),
    "xLAM": (
        {"query": "a?", "tools": "[]", "answers": '[{"name": "add", "arguments": {"x": 1}}]'},
        {
            "prompt": [user("a?")],
            "completion": [{"role": "assistant", "content": "", "tool_calls": json.dumps(CALL)}],
        },
    ),
    "Glaive's tool calls": (
        {"system": "SYSTEM: Be brief.", "chat": "USER: a?\n\n\nASSISTANT: b. <|endoftext|>\n\n\n"},
        {"messages": [SYSTEM, *TALK]},
    ),
    "what was thought": (
        {"messages": [user("a?"), bot("b.") | {"thinking": "Hm."}]},
        {"messages": [user("a?"), bot("b.") | {"reasoning_content": "Hm."}]},
    ),
    "what was thought, as a part": (
        {
            "messages": [
                user("a?"),
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "b."}],
                },
            ]
        },
        {"messages": [user("a?"), bot("b.") | {"reasoning_content": "Hm."}]},
    ),
    "distilabel's generations": (
        {"instruction": "a?", "generation": "b.", "model_name": "m"},
        {"prompt": "a?", "completion": "b."},
    ),
    "prompt and response": ({"prompt": "a?", "response": "b."}, {"prompt": "a?", "completion": "b."}),
}

PAIR = {"prompt": "a?", "completions": ["b.", "c."], "ranks": [1, 2]}
CHAT_PAIR = {"prompt": [user("a?")], "completions": [[bot("b.")], [bot("c.")]], "ranks": [1, 2]}
COMPARISONS: dict[str, tuple[Any, Any]] = {
    "UltraFeedback": (DEMONSTRATIONS["UltraFeedback, whose messages repeat what was chosen"][0], CHAT_PAIR),
    "LLaMA-Factory's ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "a?"}],
            "chosen": {"from": "gpt", "value": "b."},
            "rejected": {"from": "gpt", "value": "c."},
        },
        CHAT_PAIR,
    ),
    "LLaMA-Factory's Alpaca": ({"instruction": "a?", "input": "", "chosen": "b.", "rejected": "c."}, PAIR),
    "whole conversations behind a conversation": (
        {"prompt": [user("a?")], "chosen": TALK, "rejected": [user("a?"), bot("c.")]},
        CHAT_PAIR,
    ),
    "scores": ({"prompt": "a?", "completions": ["b.", "c."], "scores": [0.9, 0.1]}, PAIR),
    "SHP": (
        {"history": "a?", "human_ref_A": "c.", "human_ref_B": "b.", "labels": 0, "score_A": 1},
        PAIR | {"completions": ["c.", "b."], "ranks": [2, 1]},
    ),
    "PKU-SafeRLHF": ({"prompt": "a?", "response_0": "b.", "response_1": "c.", "better_response_id": 0}, PAIR),
    "Chatbot Arena": (
        {"conversation_a": TALK, "conversation_b": [user("a?"), bot("c.")], "winner": "model_a"},
        CHAT_PAIR,
    ),
    "Nectar": (
        {"prompt": "a?", "answers": [{"answer": "b.", "rank": 1.0}, {"answer": "c.", "rank": 2.0}]},
        PAIR,
    ),
    "Nectar, with its sources": (
        {
            **{"prompt": "a?", "source": ["sharegpt", "flan"]},
            "answers": [{"answer": "b.", "rank": 1.0}, {"answer": "c.", "rank": 2.0}],
        },
        PAIR | {"source": "sharegpt, flan"},
    ),
    "MT-bench, the first of two turns": (
        {
            **{"turn": 1, "winner": "model_a", "conversation_a": [*TALK, user("and?"), bot("x.")]},
            "conversation_b": [user("a?"), bot("c."), user("and?"), bot("y.")],
        },
        CHAT_PAIR,
    ),
    "MT-bench, both turns": (
        {
            **{"turn": 2, "winner": "model_b", "conversation_a": [*TALK, user("and?"), bot("x.")]},
            "conversation_b": [user("a?"), bot("c."), user("and?"), bot("y.")],
        },
        {
            "prompt": [user("a?")],
            "completions": [[bot("b."), user("and?"), bot("x.")], [bot("c."), user("and?"), bot("y.")]],
            "ranks": [2, 1],
        },
    ),
    "Chatbot Arena, Kaggle's": (
        {
            **{"prompt": '["a?"]', "response_a": '["b."]', "response_b": '["c."]'},
            **{"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        },
        CHAT_PAIR,
    ),
    "HelpSteer3": (
        {"context": [user("a?")], "response1": "c.", "response2": "b.", "overall_preference": 1},
        CHAT_PAIR | {"completions": [[bot("c.")], [bot("b.")]], "ranks": [2, 1]},
    ),
    "OpenAI's summaries": (
        {
            **{"info": {"subreddit": "aww", "title": "Cat", "post": "It sat."}, "choice": 1},
            "summaries": [{"text": " Sat."}, {"text": " A cat sat."}],
        },
        {
            "prompt": "SUBREDDIT: r/aww\n\nTITLE: Cat\n\nPOST: It sat.\n\nTL;DR:",
            **{"completions": [" Sat.", " A cat sat."], "ranks": [2, 1]},
        },
    ),
    "AlpacaFarm": (
        {"instruction": "a?", "input": "", "output_1": "b.", "output_2": "c.", "preference": 1},
        PAIR,
    ),
    "distilabel, ratings": (
        {"instruction": "a?", "generations": ["b.", "c."], "ratings": [5.0, 2.0], "rationales": ["x", "y"]},
        PAIR | {"scores": [5.0, 2.0]},
    ),
    "distilabel, math": (
        {
            **{"instruction": "a?", "chosen_response": "b.", "rejected_response": "c."},
            **{"chosen_rating": 5.0, "rejected_rating": 4.0},
        },
        PAIR | {"scores": [5.0, 4.0]},
    ),
    "UltraFeedback, raw": (
        {
            "instruction": "a?",
            "completions": [{"response": "b.", "overall_score": 8}, {"response": "c.", "overall_score": 5.5}],
        },
        PAIR,
    ),
    "Intel's Orca pairs": (
        {"system": "Be brief.", "question": "a?", "chosen": "It is b.", "rejected": "It is c."},
        {
            "prompt": [SYSTEM, user("a?")],
            "completions": [[bot("It is b.")], [bot("It is c.")]],
            "ranks": [1, 2],
        },
    ),
    "distilabel's Orca pairs": (
        {"system": None, "input": "a?", "chosen": "b.", "rejected": "c.", "rating": [9.0, 7.0]},
        CHAT_PAIR,
    ),
    "axolotl's": (
        {"messages": [user("a?")], "chosen": bot("b."), "rejected": bot("c.")},
        CHAT_PAIR,
    ),
    "argilla's Capybara pairs": (
        {
            **{"conversation": [{"input": "a?", "output": "x."}], "messages": [user("a?"), bot("x.")]},
            **{"chosen": TALK, "rejected": [user("a?"), bot("c.")]},
            **{"rating_chosen": 5, "rating_rejected": 3},
        },
        CHAT_PAIR | {"scores": [5.0, 3.0]},
    ),
    "whole conversations, the system beside": (
        {"system": "Be brief.", "chosen": TALK, "rejected": [user("a?"), bot("c.")]},
        CHAT_PAIR | {"prompt": [SYSTEM, user("a?")]},
    ),
    "a ranking with a system message": (
        {"system": "Be brief.", "prompt": "a?", "completions": ["b.", "c."], "ranks": [1, 2]},
        CHAT_PAIR | {"prompt": [SYSTEM, user("a?")]},
    ),
    "HelpSteer2, preferences": (
        {"prompt": "a?", "response_1": "c.", "response_2": "b.", "preference_strength": 2},
        PAIR | {"completions": ["c.", "b."], "ranks": [2, 1]},
    ),
    "WebGPT": (
        {
            **{"question": {"dataset": "eli5", "id": "1", "full_text": "a?"}, "quotes_0": {}, "quotes_1": {}},
            **{"answer_0": "c.", "answer_1": "b.", "score_0": -0.5, "score_1": 0.5},
        },
        PAIR | {"completions": ["c.", "b."], "ranks": [2, 1]},
    ),
    "Stack Exchange, preferences": (
        {
            **{"qid": 7, "question": "a?", "metadata": ["x"], "date": "2020"},
            "answers": [{"pm_score": 1, "text": "c."}, {"pm_score": 5, "text": "b.", "selected": True}],
        },
        PAIR | {"completions": ["c.", "b."], "ranks": [2, 1]},
    ),
    "Stack Exchange, paired": (
        {"qid": 7, "question": "a?", "response_j": "b.", "response_k": "c.", "date": "2020"},
        PAIR,
    ),
    "OpenAI preferences": (
        {
            "input": {"messages": [user("a?")]},
            "preferred_output": [bot("b.")],
            "non_preferred_output": [bot("c.")],
        },
        CHAT_PAIR,
    ),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations(tmp_path: Path, name: str) -> None:
    row, expected = DEMONSTRATIONS[name]
    (found,) = data.demonstrations(lines(tmp_path / "a.jsonl", row)).to_list()
    for column, value in found.items():
        if isinstance(value, list):
            found[column] = [{k: v for k, v in turn.items() if v is not None} for turn in value]
    assert found == expected
    prompt = expected.get("prompt") or expected["messages"][:-1]
    (asked,) = data.prompts(lines(tmp_path / "b.jsonl", row)).to_list()
    asked = asked["prompt"]
    if isinstance(asked, list):
        asked = [{k: v for k, v in turn.items() if v is not None} for turn in asked]
    assert asked == prompt


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(tmp_path: Path, name: str) -> None:
    row, expected = COMPARISONS[name]
    (found,) = data.comparisons(lines(tmp_path / "a.jsonl", row)).to_list()
    assert {key: found[key] for key in expected} == expected


def test_a_ranks_nan_in_a_tree_is_no_rank(tmp_path: Path) -> None:
    def message(key: str, parent: str | None, role: str, rank: float | None = None) -> Any:
        return {"message_id": key, "parent_id": parent, "role": role, "text": key, "rank": rank}

    rows = [
        message("q", None, "prompter"),
        message("second", "q", "assistant", 1.0),
        message("unranked", "q", "assistant", float("nan")),
        message("first", "q", "assistant", 0.0),
    ]
    source = tmp_path / "a.parquet"
    Dataset.from_list(rows).to_parquet(source)
    (found,) = data.comparisons(str(source)).to_list()
    assert (found["completions"], found["ranks"]) == ([[bot("second")], [bot("first")]], [2, 1])


def test_openassistants_trees_by_message_and_whole(tmp_path: Path) -> None:
    def message(key: str, parent: str | None, role: str, rank: int | None = None, **more: Any) -> Any:
        return {
            "message_id": key,
            "parent_id": parent,
            "role": role,
            "text": key,
            "rank": rank,
            "deleted": False,
        } | more

    rows = [
        message("q", None, "prompter"),
        message("good", "q", "assistant", 0),
        message("bad", "q", "assistant", 1),
        message("spam", "q", "assistant", 2, review_result=False),
        message("more?", "good", "prompter"),
        message("yes", "more?", "assistant"),
    ]
    whole = {
        "message_tree_id": "q",
        "prompt": rows[0]
        | {"replies": [rows[1] | {"replies": [rows[4] | {"replies": [rows[5]]}]}, rows[2], rows[3]]},
    }
    for source in (lines(tmp_path / "flat.jsonl", *rows), lines(tmp_path / "trees.jsonl", whole)):
        (found,) = data.demonstrations(source).to_list()[:1]
        assert found == {"prompt": [user("q")], "completion": [bot("good")]}
        assert data.demonstrations(source)[1] == {
            "prompt": [user("q"), bot("good"), user("more?")],
            "completion": [bot("yes")],
        }
        (pair,) = data.comparisons(source, strict=False, dropped=Dropped()).to_list()
        assert (pair["completions"], pair["ranks"]) == ([[bot("good")], [bot("bad")]], [1, 2])


# ---- files ----

ROWS = [{"prompt": f"{i}?", "completion": f"{i}."} for i in range(3)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(raw: bytes) -> bytes:
    import pyarrow

    return pyarrow.Codec("zstd").compress(raw, asbytes=True)


FILES: dict[str, bytes] = {
    "a.jsonl.gz": gzip.compress(JSONL),
    "a.jsonl.zst": zstd(JSONL),
    "two frames.jsonl.zst": zstd(JSONL[:36]) + zstd(JSONL[36:]),
    "a.jsonl.bz2": bz2.compress(JSONL),
    "a.JSONL.xz": lzma.compress(JSONL),
    "a.ndjson": JSONL,
    "a browser unpacked it.jsonl.gz": JSONL,
    "packed by its bytes.jsonl": gzip.compress(JSONL),
    "a.json": json.dumps(ROWS).encode(),
    "data.json": json.dumps({"data": ROWS}).encode(),
    "a.json.gz": gzip.compress(json.dumps(ROWS, indent=1).encode()),
    "lines.json": JSONL,
    "bom.jsonl": b"\xef\xbb\xbf" + JSONL,
    "crlf.jsonl": JSONL.replace(b"\n", b"\r\n"),
    "a.csv": b"prompt,completion\r\n0?,0.\r\n1?,1.\r\n2?,2.\r\n",
    "a.csv.gz": gzip.compress(b'\xef\xbb\xbfprompt,completion\n"0?",0.\n1?,1.\n2?,2.\n'),
    "a.tsv": b"prompt\tcompletion\n0?\t0.\n1?\t1.\n2?\t2.\n",
    "a german Excel's.csv": b"\xef\xbb\xbfprompt;completion\r\n0?;0.\r\n1?;1.\r\n2?;2.\r\n",
    "a sheet's empty cells.csv": b"prompt,completion,,\r\n0?,0.,,\r\n1?,1.,,\r\n2?,2.,,\r\n,,,\r\n,,,\r\n",
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert data.demonstrations(str(tmp_path / name)).to_list() == ROWS
    assert data.demonstrations(str(tmp_path)).to_list() == ROWS


def test_what_datasets_saves_to_disk(tmp_path: Path) -> None:
    splits: Any = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert data.demonstrations(str(tmp_path / "saved")).to_list() == ROWS
    assert data.demonstrations(str(tmp_path / "saved"), "eval").to_list() == ROWS[:1]


def test_prompts_as_a_list_of_texts_and_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["0?", "1?"]')
    (tmp_path / "a.txt").write_text("0?\n\n1?\n")
    for name in ("a.json", "a.txt"):
        assert data.prompts(str(tmp_path / name))["prompt"][:] == ["0?", "1?"]


def test_only_ends_of_lines_part_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\u2028two\x0cthree\x85four?\r\nb?\n".encode())
    assert data.prompts(str(tmp_path / "a.txt"))["prompt"][:] == ["one\u2028two\x0cthree\x85four?", "b?"]
    (tmp_path / "a.csv").write_bytes("prompt,completion\na\u2028b?,c\x0cd\n".encode())
    assert data.demonstrations(str(tmp_path / "a.csv")).to_list() == [
        {"prompt": "a\u2028b?", "completion": "c\x0cd"}
    ]


def test_numbers_and_feedback_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,chosen_rating,rejected_rating\na?,b.,c.,4.5,3\n")
    assert data.comparisons(str(path))["scores"][:] == [[4.5, 3.0]]
    path.write_text("history,human_ref_A,human_ref_B,labels\na?,c.,b.,0\n")
    assert data.comparisons(str(path))["ranks"][:] == [[2, 1]]
    path.write_text("prompt,response,label\na?,b.,TRUE\nc?,d.,FALSE\n")
    assert data.demonstrations(str(path)).to_list() == [{"prompt": "a?", "completion": "b."}]
    path.write_text("system,prompt,completion\nBe brief.,a?,b.\n,c?,d.\n")
    assert data.demonstrations(str(path))["prompt"][:] == [[SYSTEM, user("a?")], [user("c?")]]


def test_conversations_in_a_table(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(TALK)]])
    assert data.demonstrations(str(tmp_path / "a.csv")).to_list() == [{"messages": TALK}]


def _with_pandas(path: Path, rows: list[Any]) -> None:
    pandas.DataFrame(rows).to_csv(path, index=False)


def _with_pandas_from_parquet(path: Path, rows: list[Any]) -> None:
    pandas.DataFrame(rows).to_parquet(path.with_suffix(".bin"))
    pandas.read_parquet(path.with_suffix(".bin")).to_csv(path)  # with its index


def _with_datasets(path: Path, rows: list[Any]) -> None:
    Dataset.from_list(rows).to_csv(path)


def _as_lines_of_texts(path: Path, rows: list[Any]) -> None:
    lines(path, *({name: json.dumps(value) for name, value in row.items()} for row in rows))


WRITERS = [_with_pandas, _with_pandas_from_parquet, _with_datasets, _as_lines_of_texts]


@pytest.mark.parametrize("write", WRITERS)
def test_conversations_written_into_texts_are_conversations(write: Any, tmp_path: Path) -> None:
    """Else an answer would be learned with the brackets and the roles around it."""
    path = tmp_path / ("a.jsonl" if write is _as_lines_of_texts else "a.csv")
    good, bad = bot('It\'s "b"\n\\ }\n {'), bot("[c]")
    write(path, [{"chosen": [user("a?"), good], "rejected": [user("a?"), bad]}] * 2)
    (found, _) = data.comparisons(str(path)).to_list()
    assert (found["prompt"], found["completions"]) == ([user("a?")], [[good], [bad]])
    write(path, [{"prompt": [user("a?")], "completion": [good]}] * 2)
    assert data.demonstrations(str(path))[0] == {"prompt": [user("a?")], "completion": [good]}


def test_lists_in_a_table_are_read_where_lists_are_meant(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    _with_pandas(path, [{"prompt": "a?", "completions": ["b.", "c."], "scores": [2.5, 1.0]}])
    (found,) = data.comparisons(str(path)).to_list()
    assert (found["completions"], found["scores"]) == (["b.", "c."], [2.5, 1.0])
    answers = [{"prompt": "Sort.", "completion": "[1, 2]"}, {"prompt": "As JSON.", "completion": '{"a": 1}'}]
    _with_pandas(path, answers)
    assert data.demonstrations(str(path)).to_list() == answers
    path.write_text(
        'prompt,completion\na?,"[{""role"": ""assistant"", ""content"": ""cut at a cell\'s lim"\n'
    )
    with pytest.raises(LabError, match="completion begins like a list of messages and cannot be read as"):
        data.demonstrations(str(path))


@pytest.mark.parametrize("piece", [" ", "[", "[{", "['a' ", "{'role': "])
def test_what_looks_like_a_conversation_takes_no_time(piece: str, tmp_path: Path) -> None:
    text = "[{'role': '" + piece * 50_000
    for said in (piece * 50_000 + "x", piece * 50_000 + "]", text, text + "'}]"):
        source = lines(tmp_path / "a.jsonl", {"prompt": "a?", "completion": said})
        began = time.monotonic()
        with contextlib.suppress(LabError):
            data.demonstrations(source)
        assert time.monotonic() - began < 5


def test_openassistants_messages_in_a_table(tmp_path: Path) -> None:
    columns = ("message_id", "parent_id", "text", "role", "rank", "deleted", "review_result")
    rows = [
        ("1", None, "a?", "prompter", None, False, True),
        ("2", "1", "spam", "assistant", 0.0, False, False),
        ("3", "1", "c.", "assistant", 2.0, False, True),
        ("4", "1", "b.", "assistant", 1.0, False, True),
        ("5", "1", "gone", "assistant", 3.0, True, True),
    ]
    _with_pandas(tmp_path / "a.csv", [dict(zip(columns, row, strict=True)) for row in rows])
    (found,) = data.comparisons(str(tmp_path / "a.csv")).to_list()
    assert (found["completions"], found["ranks"]) == ([[bot("c.")], [bot("b.")]], [2, 1])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_call_has_no_arguments_of_other_tools(name: str, tmp_path: Path) -> None:
    """Arrow gives every struct the fields of all."""

    def row(tool: str, **arguments: Any) -> Any:
        function = {"name": tool, "arguments": arguments}
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
        return {"messages": [user("a?"), call], "tools": [{"name": tool, "parameters": arguments}]}

    rows = Dataset.from_list([row("add", x=1), row("ask", who="Ann")])
    if name == "a.parquet":
        rows.to_parquet(tmp_path / name)
        source = tmp_path / name
    else:
        rows.save_to_disk(tmp_path / "a")
        source = tmp_path / "a"
    first, second = (turns for turns in data.demonstrations(str(source))["messages"])
    assert json.loads(first[1]["tool_calls"]) == [{"function": {"name": "add", "arguments": {"x": 1}}}]
    assert json.loads(second[0]["tools"]) == [{"name": "ask", "parameters": {"who": "Ann"}}]


def test_ranks_that_pandas_made_floats(tmp_path: Path) -> None:
    row = {"prompt": "a?", "completions": ["b.", "c."], "ranks": [2.0, 1.0]}
    assert data.comparisons(lines(tmp_path / "a.jsonl", row))["ranks"][:] == [[2, 1]]


COLUMNS = {"prompt": [row["prompt"] for row in ROWS], "completion": [row["completion"] for row in ROWS]}
OBJECTS: dict[str, Any] = {
    "lists": COLUMNS,
    **{
        orient: json.loads(pandas.DataFrame(ROWS).to_json(orient=orient))  # type: ignore[arg-type]
        for orient in ("columns", "index", "split", "table", "records")
    },
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", OBJECTS)
def test_a_table_in_one_json_value(name: str, indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(OBJECTS[name], indent=indent))
    assert data.demonstrations(str(path)).to_list() == ROWS


def test_one_row_in_a_file_is_no_table_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for row in ({"prompt": [user("a?")], "completion": [bot("b.")]}, {"prompt": "a?", "completion": "b."}):
        path.write_text(json.dumps(row, indent=1))
        assert data.demonstrations(str(path)).to_list() == [row]


def test_droppings_and_descriptions_are_no_data(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", *ROWS)
    for name in ("__MACOSX/._train.jsonl", "._train.jsonl", "dataset_info.json", "LICENSE.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    assert data.demonstrations(str(tmp_path)).to_list() == ROWS
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(JSONL))
    with pytest.raises(LabError, match=r"holds train\.jsonl and train\.jsonl\.gz, which may be the same"):
        data.demonstrations(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "raw", "problem"),
    [
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-9], "damaged"),
        ("a.jsonl.xz", lzma.compress(JSONL)[:-9], "damaged"),
        ("a.jsonl.zst", zstd(JSONL)[:-9], "damaged"),
        ("a.jsonl.gz", b"\x1f\x8b" + JSONL, "damaged"),
        ("a.csv", b"prompt,prompt\na,b\n", "names of columns must be there, and differ"),
        ("a.csv", b"prompt,completion\na,b,c\n", "line 2: has 3 cells for 2 columns"),
        ("a.csv", b"prompt,completion\n\xe9,b\n", "no UTF-8 text"),
        ("a.json", b'{"prompt": "a"}', "Name them as in one of"),
        ("a.json", b'{"prompt": "a", "label": 1, "x": 2}', "prompt + completion; "),
        (
            "a.json",
            b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}',
            "several lists of rows (train, test)",
        ),
        ("a.jsonl", b'{"input_ids": [1, 2]}\n', "token ids of some tokenizer"),
        ("a.jsonl", b'{"prompt": "a", "completions": ["b"], "labels": [true]}\n', "process reward models"),
        ("a.parquet", b"PAR1", "not readable as Parquet"),
        ("a.arrow", b"ARROW1 or not", "not a readable Arrow file"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, raw: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(LabError) as caught:
        data.demonstrations(str(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- what rows mean ----


def test_feedback_that_is_negative_is_not_imitated(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": f"{i}.", "label": i < 2} for i in range(5)]
    source, dropped = lines(tmp_path / "a.jsonl", *rows), Dropped()
    found = data.demonstrations(source, dropped=dropped)
    assert found["completion"][:] == ["0.", "1."]
    assert dropped.notes() == ["3 feedback whose label is false left out"]
    assert len(data.prompts(source)) == 5  # they may be asked all the same
    with pytest.raises(LabError, match="does not say which of two answers is better"):
        data.comparisons(source)
    with pytest.raises(LabError, match=r"line 1: label is None|line 1: label is null"):
        data.demonstrations(lines(tmp_path / "b.jsonl", rows[0] | {"label": None}))
    with pytest.raises(LabError, match="holds nothing to learn from"):
        data.demonstrations(lines(tmp_path / "c.jsonl", rows[4]))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "label": False},
        {
            "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b."}],
            "kto_tag": False,
        },
        {"instruction": "a?", "input": "", "output": "b.", "kto_tag": "false"},
        {"prompt": "a?", "response": "b.", "label": False},
    ],
)
def test_feedback_is_heard_in_all_forms_that_have_it(tmp_path: Path, row: Any) -> None:
    name = "label" if "label" in row else "kto_tag"
    source, dropped = lines(tmp_path / "a.jsonl", row, row | {name: True}), Dropped()
    assert len(data.demonstrations(source, dropped=dropped)) == 1
    assert dropped.notes() == [f"1 feedback whose {name} is false left out"]
    assert len(data.prompts(source)) == 1


def test_what_has_a_picture_is_no_text(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "<image>\na?"}, {"from": "gpt", "value": "b."}]}
    source = lines(tmp_path / "a.jsonl", row | {"images": []}, row | {"image": "a.jpg"})
    with pytest.raises(LabError, match=r"line 2: has image, which nobody here sees; text alone"):
        data.demonstrations(source)


def test_what_was_asked_is_not_guessed_from_how_answers_begin(tmp_path: Path) -> None:
    row = {"trajectory": "What is two and two?", "chosen": "The answer is 4", "rejected": "The answer is 5"}
    with pytest.raises(LabError, match=r"there is no prompt, and trajectory may be it: name it prompt"):
        data.comparisons(lines(tmp_path / "a.jsonl", row))


def test_equal_scores_tie_and_lower_ones_are_a_mistake(tmp_path: Path) -> None:
    row = {"prompt": "a?", "chosen": "b.", "rejected": "c."}
    rows = [row | {"score_chosen": a, "score_rejected": b, "margin": a - b} for a, b in ((5, 5), (5, 3))]
    dropped = Dropped()
    found = data.comparisons(lines(tmp_path / "a.jsonl", *rows), dropped=dropped)
    assert (len(found), dropped.ties, dropped.unused) == (1, 1, ["margin"])
    assert found["scores"][:] == [[5.0, 3.0]]
    with pytest.raises(LabError, match="the score of rejected, 5, is higher than that of chosen, 3"):
        data.comparisons(lines(tmp_path / "b.jsonl", row | {"score_chosen": 3, "score_rejected": 5}))


def test_all_bad_rows_are_counted_by_reason_and_named_at_once(tmp_path: Path) -> None:
    good = {"prompt": "a?", "chosen": "b.", "rejected": "c."}
    rows = [good, *[good | {"chosen": ""}] * 12, *[good | {"rejected": "b."}] * 3]
    source = lines(tmp_path / "a.jsonl", *rows)
    with pytest.raises(LabError) as caught:
        data.comparisons(source)
    message = str(caught.value)
    assert message.startswith(
        f"{source}: 15 of 16 rows cannot be used: 12 chosen is empty, 3 chosen and rejected"
    )
    assert f"They are {source}, lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 5 more." in message
    assert message.endswith("set data.bad_rows to skip.")
    dropped = Dropped()
    assert len(data.comparisons(source, strict=False, dropped=dropped)) == 1
    assert dropped.reasons == {
        "chosen is empty": 12,
        "chosen and rejected are the same, so none is better": 3,
    }


def test_lines_that_are_no_json_have_one_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0], indent=2))
    with pytest.raises(LabError, match=r"4 of 4 rows cannot be used: 4 not JSON \(one row a line, or"):
        data.demonstrations(str(path))
    path.write_bytes(JSONL.decode().encode("utf-16"))  # the first line of which `json` would take
    with pytest.raises(LabError, match=r"4 of 4 rows cannot be used"):
        data.demonstrations(str(path))


def test_tables_that_are_none_say_where_and_what(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\n0?,0.\n\xe9,b\n")
    with pytest.raises(LabError, match=r"line 3: no UTF-8 text: .*Save it as UTF-8\.$"):
        data.demonstrations(str(path))
    path.write_bytes(b"PK\3\4\x14\0\6\0\x08\0\0\0!\0\xff\xfe")
    with pytest.raises(LabError, match=r"is a zip archive, .*UTF-8\.$"):
        data.demonstrations(str(path))


def test_a_line_that_is_no_json_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL + b'{"prompt": "half')
    assert len(data.demonstrations(str(path), strict=False, dropped=Dropped())) == 3


# ---- what is kept of large files ----


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "WORTH_KEEPING", 0)
    return lines(tmp_path / "a.jsonl", *ROWS, {"prompt": "bad"})


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.arrow"))


def test_rows_are_parsed_once(large: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.load("demonstrations", large, strict=False)
    monkeypatch.setattr(data, "_parsed", None)
    again = data.load("demonstrations", large, strict=False)
    assert again.rows.to_list() == first.rows.to_list() == ROWS
    assert again.left_out == first.left_out
    assert again.place(2) == f"{large}, line 3"
    with pytest.raises(LabError, match="line 4: completion is missing"):  # what is wrong is kept, too
        data.demonstrations(large)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no check", "a folder"])
def test_a_damaged_copy_is_made_again(large: str, tmp_path: Path, damage: str) -> None:
    data.load("demonstrations", large, strict=False)
    (path,) = kept(tmp_path)
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(raw[:-40])
    elif damage == "flipped":
        raw[raw.rindex(b"2.")] ^= 1
        path.write_bytes(raw)
    elif damage == "no check":
        path.with_suffix(".json").write_text("{")
    else:
        path.unlink()
        path.mkdir()
    assert data.load("demonstrations", large, strict=False).rows.to_list() == ROWS


def test_another_file_of_that_name_is_parsed(large: str) -> None:
    data.load("demonstrations", large, strict=False)
    lines(Path(large), *ROWS[1:])
    assert data.load("demonstrations", large).rows.to_list() == ROWS[1:]


def test_without_a_place_to_keep_rows_they_are_read_all_the_same(
    large: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert data.load("demonstrations", large, strict=False).rows.to_list() == ROWS
