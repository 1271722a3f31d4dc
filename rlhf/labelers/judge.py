"""A language model as judge, behind an OpenAI-compatible service."""

import contextlib
import http.client
import ipaddress
import json
import os
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab import trust
from lab.config import require
from lab.errors import LabError
from rlhf.labelers.base import (
    Answer,
    Configured,
    Prompt,
    Ranking,
    Skip,
    brief,
    prompt_text,
    rank_distinct,
    ranks_from_groups,
)

QUESTION = """\
Several answers to one prompt follow. Rank them by how well they serve whoever wrote the prompt.

<prompt>
{prompt}
</prompt>

{answers}

Reply with JSON only, in this form: {"ranking": [[2], [1, 3]]}
It lists the numbers of all {count} answers, the best first; answers equally good share a list.
"""


@dataclass(frozen=True, kw_only=True)
class Judge(Configured):
    """A language model behind an OpenAI-compatible service.

    The answers are shuffled before every question, so that the judge's liking for a position averages out.
    """

    kind = "judge"
    target = "url"
    unnamed = ("api_key_env", "timeout_seconds", "retries", "backoff_seconds")

    url: str = ""
    """Where the service is, e.g. http://localhost:8000/v1."""
    model: str = ""
    """The judge's name there."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; without it, none is sent."""
    template: str = QUESTION
    """The question; {prompt}, {answers} and {count} are filled in."""
    temperature: float | None = 0.0
    """null leaves it to the service; some models accept nothing else."""
    seed: int = 0
    """Of the shuffling."""
    timeout_seconds: float = 60.0
    retries: int = 4
    """How often a question is asked again that got no answer, or one that cannot be read."""
    backoff_seconds: float = 1.0
    """The wait before the first retry; it doubles with each."""

    def __post_init__(self) -> None:
        parts = _split_url(self.url)
        require(parts is not None, "url", "is no address. Write judge:http://HOST/v1")
        assert parts is not None
        # It is recorded with every ranking, so nothing secret may be in it; nor does the error repeat it.
        require(
            parts.username is None and not parts.query,
            "url",
            "must hold no credentials. Put the key into an environment variable and name it in api_key_env",
        )
        require(bool(self.model), "model", "is missing: the judge's name at the service")
        for blank in ("{prompt}", "{answers}"):
            require(blank in self.template, "template", f"has no {blank}")
        require(self.timeout_seconds > 0, "timeout_seconds", f"{self.timeout_seconds} must be positive")
        require(self.retries >= 0, "retries", f"{self.retries} must not be negative")
        require(self.backoff_seconds >= 0, "backoff_seconds", f"{self.backoff_seconds} must not be negative")

    def require_consent(self, source: str) -> None:
        name, host = f"{self.kind}:{self.url}", _split_url(self.url)
        if self._key:
            assert host is not None
            if host.scheme != "https" and not _is_loopback(host.hostname or ""):
                raise LabError(
                    f"{source}: the key in {self.api_key_env} would go unencrypted to {self.url}. Use https, "
                    f"or unset {self.api_key_env}."
                )
            what = f"sends the key in {self.api_key_env}, and prompts and answers, to {self.url}"
            trust.require(f"{name}#{self.api_key_env}", what, source)
        elif trust.from_record():
            trust.require(name, f"sends prompts and answers to {self.url}", source)

    def prepare(self) -> None:
        if not re.fullmatch(r"[!-~]*", self._key):  # http.client would print it in its complaint
            raise LabError(f"the key in {self.api_key_env} has characters that no key has. Correct it.")

    def rank(self, prompt: Prompt, answers: Sequence[Answer]) -> Ranking:
        """Asks the judge, again in another order if its reply cannot be read.

        Raises:
            Skip: no reply could be read.
            LabError: the service is not there, or refuses.
        """
        return Ranking(rank_distinct(answers, lambda distinct: self._rank(prompt, distinct)))

    def _rank(self, prompt: Prompt, answers: Sequence[Answer]) -> list[int]:
        problem = ""
        for attempt in range(self.retries + 1):
            # Seeded by the question, not by a count of calls: a resumed collection shuffles alike. And by
            # the attempt, for at temperature 0 the same question would get the same reply.
            draw = random.Random(
                json.dumps([self.seed, attempt, prompt, [answer.text for answer in answers]])
            )
            order = draw.sample(range(len(answers)), len(answers))
            reply = self._ask(self._question(prompt, [answers[index] for index in order]))
            try:
                shuffled = ranks_from_groups(_ranking_in(reply), len(answers))
            except ValueError as error:
                problem = str(error)
                continue
            return [shuffled[order.index(index)] for index in range(len(answers))]
        raise Skip(f"the judge's reply cannot be read: {problem}")

    def _question(self, prompt: Prompt, answers: Sequence[Answer]) -> str:
        shown = "\n\n".join(
            f'<answer number="{number}"{"" if answer.finished else " cut_off"}>\n{answer.text}\n</answer>'
            for number, answer in enumerate(answers, 1)
        )
        blanks = {"prompt": prompt_text(prompt), "answers": shown, "count": str(len(answers))}
        # In one pass: neither the JSON in the template nor braces in an answer are taken for blanks.
        return re.sub(r"\{(prompt|answers|count)\}", lambda blank: blanks[blank[1]], self.template)

    @property
    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "").strip()

    @property
    def _endpoint(self) -> str:
        base = self.url.rstrip("/")
        if base.endswith("/chat/completions"):
            return base
        return f"{base}/chat/completions" if base.endswith("/v1") else f"{base}/v1/chat/completions"

    def _ask(self, question: str) -> str:
        """One question, one reply; waits and asks again while the service is busy or broken."""
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._endpoint, json.dumps(body).encode(), headers)
        opener = urllib.request.build_opener(_NoRedirect)
        problem = ""
        for attempt in range(self.retries + 1):
            wait = self.backoff_seconds * 2**attempt
            try:
                with opener.open(request, timeout=self.timeout_seconds) as response:
                    return self._content(response.read())
            except urllib.error.HTTPError as error:
                problem = self._refusal(error)
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                problem = f"cannot be reached ({reason})"
                if not isinstance(reason, TimeoutError | ConnectionResetError | http.client.HTTPException):
                    remedy = "Start the service, or correct its url."
                    raise LabError(f"{self._endpoint}: {problem}. {remedy}") from None
            if attempt < self.retries:
                time.sleep(min(wait, 60.0))
        raise LabError(
            f"{self._endpoint}: {problem}, also after {self.retries} retries. Start again later: "
            "what was ranked is kept."
        )

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        """What a service says that may answer later; raises for one that will not."""
        text = ""
        with error, contextlib.suppress(OSError, http.client.HTTPException):
            text = " ".join(error.read(2_000).decode("utf-8", "replace").split())
        if error.code in (401, 403):  # whose text may repeat the key
            key = (
                f"the key in {self.api_key_env}"
                if self._key
                else f"a call without key: {self.api_key_env} is empty"
            )
            raise LabError(f"{self._endpoint}: refuses {key}. Set {self.api_key_env} to a valid one.")
        text = text.replace(self._key, "<redacted>") if self._key else text
        problem = f"answers {error.code} {error.reason}" + (f": {text[:200]}" if text else "")
        if error.code not in (408, 429) and error.code < 500:
            raise LabError(f"{self._endpoint}: {problem}. Check the judge's url and model.")
        return problem

    def _content(self, body: bytes) -> str:
        try:
            content = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise LabError(
                f"{self._endpoint}: the reply is no chat completion. Check the judge's url."
            ) from None
        return content if isinstance(content, str) else ""  # null: it refused, or thought to the limit


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: urllib would take the key along to whatever host it is sent to."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _ranking_in(reply: str) -> list[list[int]]:
    """The groups of the last {"ranking": ...} in a reply: models think, talk and fence before they obey."""
    decoder, found = json.JSONDecoder(), None
    for brace in re.finditer(r"\{", reply):
        try:
            value = decoder.raw_decode(reply, brace.start())[0]
        except (ValueError, RecursionError):
            continue
        found = value.get("ranking", found)
    if not isinstance(found, list):
        raise ValueError(f"no ranking in {brief(reply)}")
    groups = [group if isinstance(group, list) else [group] for group in found]
    if not all(type(number) is int for group in groups for number in group):
        raise ValueError(f"not numbers of answers: {brief(found)}")
    return groups


def _split_url(url: str) -> urllib.parse.SplitResult | None:
    """The parts of a web address, None if it is none."""
    try:
        parts = urllib.parse.urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port or an IPv6 address that cannot be
        return None
    return parts if whole and re.fullmatch(r"[!-~]+", url) else None


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _seconds(header: str | None) -> float:
    """A Retry-After in seconds; its other form, a date, is not worth parsing."""
    return float(header) if header and header.isdecimal() else 0.0
