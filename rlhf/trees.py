"""OpenAssistant's trees of messages: as whole trees (`prompt` with `replies` in it), or a message a row.

Every message of a user that was answered becomes a row: the conversation up to it is the prompt, and its
answers are a ranking where people ranked two or more of them, or else the first of them is a demonstration.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from rlhf import forms

_ROLES = {"prompter": "user", "assistant": "assistant"}


def is_message(row: Any) -> bool:
    """Whether a row is one message of a tree."""
    return isinstance(row, dict) and row.keys() >= {"message_id", "parent_id", "text", "role"}


def is_tree(row: Any) -> bool:
    """Whether a row is a whole tree."""
    return isinstance(row, dict) and "message_tree_id" in row and isinstance(row.get("prompt"), dict)


def rows_of_messages(rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """The rows that messages make together, each with the number of its first answer."""
    roots: list[dict[str, Any]] = []
    known: dict[Any, dict[str, Any]] = {}
    for number, row in rows:
        if not is_message(row):
            yield number, row
            continue
        node = {**row, "replies": [], "number": number}
        known[row["message_id"]] = node
    for node in known.values():
        parent = known.get(node["parent_id"])
        (roots if parent is None else parent["replies"]).append(node)
    for root in roots:
        if root["parent_id"] is None:  # else the beginning of its conversation is not there
            yield from _walk(root, [], root["number"])


def rows_of_tree(row: dict[str, Any], number: int) -> Iterator[tuple[int, Any]]:
    """The rows of one tree."""
    yield from _walk(row["prompt"], [], number)


def _walk(node: dict[str, Any], before: list[dict[str, Any]], number: int) -> Iterator[tuple[int, Any]]:
    """Rows for the answers below a message and for what was asked after these; without recursion."""
    todo = [(node, before)]
    while todo:
        message, earlier = todo.pop()
        role = _ROLES.get(str(message.get("role")), message.get("role"))
        path = [*earlier, {"role": role, "content": message.get("text")}]
        replies = [reply for reply in message.get("replies") or [] if _counts(reply)]
        todo += [(reply, path) for reply in reversed(replies)]
        if role != "user" or not replies:
            continue
        answers = [[{"role": "assistant", "content": reply.get("text")}] for reply in replies]
        place = replies[0].get("number", number)
        given = [forms.number(reply.get("rank")) for reply in replies]
        ranked = [i for i, rank in enumerate(given) if forms.is_finite(rank)]
        if len(ranked) > 1:
            values = [given[i] for i in ranked]
            ranks = [1 + sum(other < value for other in values) for value in values]
            yield place, {"prompt": path, "completions": [answers[i] for i in ranked], "ranks": ranks}
        else:
            yield place, {"prompt": path, "completion": answers[0]}


def _counts(reply: Any) -> bool:
    """Not deleted, and not found to be spam."""
    if not isinstance(reply, dict):
        return False
    return not forms.opinion(reply.get("deleted")) and forms.opinion(reply.get("review_result")) is not False
