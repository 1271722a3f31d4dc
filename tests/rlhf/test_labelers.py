"""Labelers rank as they say, name what decides their rankings, and fail in one clear line."""

import contextlib
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.errors import LabError
from rlhf.labelers import Answer, Quit, Scorer, Skip, Undo, completion, make
from rlhf.labelers.base import prompt_text, ranking_from_scores, ranks_from_groups
from rlhf.labelers.human import Human, parse_order
from rlhf.labelers.judge import Judge

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How was it?"}]


def answers(*texts: str) -> list[Answer]:
    return [Answer(text) for text in texts]


def refuses(spec: Any) -> str:
    with pytest.raises(LabError) as caught:
        make(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def scorer(spec: Any) -> Scorer:
    made = make(spec)
    assert isinstance(made, Scorer)
    return made


def test_importing_labelers_and_collection_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'rich', 'jsonargparse', 'vaderSentiment'}"
    code = f"import sys, rlhf.labelers, rlhf.collect; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


# ---- ranks ----


@pytest.mark.parametrize(
    ("scores", "margin", "ranks"),
    [
        ([], 0.0, []),
        ([0.3, 0.1, 0.2], 0.0, [1, 3, 2]),
        ([0.5, 0.5, 0.1, 0.9], 0.0, [2, 2, 3, 1]),
        ([1.0, 0.96, 0.5, 0.0], 0.05, [1, 1, 2, 3]),
        ([0.10, 0.06, 0.02], 0.05, [1, 1, 1]),  # ties chain
        ([0.25, 0.5], 0.25, [1, 1]),  # exactly the margin is still a tie
        ([-1.0, -2.0], 0.05, [1, 2]),
    ],
)
def test_ranks_of_scores(scores: list[float], margin: float, ranks: list[int]) -> None:
    assert ranking_from_scores(scores, margin) == ranks


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=9), st.sampled_from([0.0, 0.05, 0.5]))
def test_no_difference_within_the_margin_becomes_a_preference(scores: list[float], margin: float) -> None:
    ranks = ranking_from_scores(scores, margin)
    assert set(ranks) == set(range(1, max(ranks) + 1)), "no rank is left out"
    for score, rank in zip(scores, ranks, strict=True):
        for other, other_rank in zip(scores, ranks, strict=True):
            if rank < other_rank:
                assert score - other > margin
            if score == other:
                assert rank == other_rank


def test_ranks_of_groups() -> None:
    assert ranks_from_groups([[2], [1, 3], [4]], 4) == [2, 1, 2, 3]
    assert ranks_from_groups([[2], [], [1]], 2) == [2, 1], "an empty group is no rank"
    for groups, complaint in (
        ([[1]], "answer 2 is missing"),
        ([[1], [2], [1]], "answer 1 is named twice"),
        ([[1], [3]], "there is no answer 3"),
        ([[0], [1]], "there is no answer 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            ranks_from_groups(groups, 2)


# ---- what is built from what ----


def test_a_name_tells_the_options_that_decide_rankings_and_no_others() -> None:
    assert make("vader").name == "vader"
    assert make({"name": "vader", "min_words": 0}).name == "vader"
    assert make({"name": "vader", "min_words": 4}).name == "vader(min_words=4)"
    judge = {"name": "judge:http://host/v1", "model": "m"}
    assert make(judge).name == make({**judge, "timeout_seconds": 5, "retries": 1}).name
    assert make(judge).name == "judge:http://host/v1(model='m')"
    one, other = (make({**judge, "template": f"{{prompt}}{{answers}}{'?' * n}"}).name for n in (80, 81))
    assert one != other
    assert max(len(one), len(other)) < 120, "a long template is told by its hash"


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("vadr", "labeler: no labeler 'vadr'. Did you mean 'vader'? Known: vader, python:FUNCTION,"),
        ({}, "labeler: no labeler ''."),
        ("human:me", "labeler: human takes nothing behind a colon."),
        ({"name": "vader", "min_word": 3}, "labeler: unknown key 'min_word'. Did you mean 'min_words'?"),
        ({"name": "vader", "min_words": "x"}, "labeler: min_words = 'x' is not valid. Expected int."),
        ({"name": "vader", "min_words": 9, "max_words": 3}, "labeler: max_words: 3 is less than min_words 9"),
        ({"name": "vader", "length_penalty": -1}, "labeler: length_penalty: -1.0 must not be negative"),
        ({"name": "vader", "tie_margin": -1}, "labeler: tie_margin: -1.0 must not be negative"),
        ("reward", "labeler: folder: names no reward model. Write reward:FOLDER"),
        ("reward:nowhere", "nowhere: no reward model: there is no config.json in it."),
        ("judge:host/v1", "labeler: url: is no address. Write judge:http://HOST/v1"),
        ("judge:ftp://host/v1", "labeler: url: is no address."),
        ("judge:http://host:x/v1", "labeler: url: is no address."),
        ("judge:http://host/v1", "labeler: model: is missing"),
        ({"name": "judge:http://h", "model": "m", "template": "{prompt}"}, "template: has no {answers}"),
    ],
)
def test_a_mistake_in_a_spec_is_one_line(spec: Any, complaint: str) -> None:
    assert complaint in refuses(spec)


@pytest.mark.parametrize("url", ["http://me:hidden@host/v1", "https://host/v1?key=hidden"])
def test_credentials_in_an_address_are_refused_and_not_repeated(url: str) -> None:
    line = refuses({"name": f"judge:{url}", "model": "m"})
    assert "must hold no credentials" in line
    assert "hidden" not in line


def test_a_scorer_ranks_a_batch_as_it_ranks_one_by_one() -> None:
    vader = scorer("vader")
    groups = [answers("great", "awful"), answers("fine", "awful", "superb"), []]
    together = vader.rank_batch(["p", CHAT, "q"], groups)
    assert together == [vader.rank("p", group) for group in groups]
    assert [ranking.ranks for ranking in together] == [[1, 2], [2, 3, 1], []]


# ---- vader ----


def test_vader_gives_its_published_score() -> None:
    """The first example in the README of vaderSentiment."""
    [score] = scorer("vader").scores(["p"], answers("VADER is smart, handsome, and funny."))
    assert score == 0.8316


def test_vader_subtracts_its_penalties() -> None:
    spec = {"name": "vader", "unfinished_penalty": 0.5, "min_words": 2, "max_words": 4, "length_penalty": 0.1}
    texts = [("stone", True), ("stone wall", True), ("a b c d e f", True), ("a b c d", False), ("", False)]
    scores = scorer(spec).scores(["p"] * 5, [Answer(*text) for text in texts])
    assert scores == pytest.approx([-0.1, 0.0, -0.2, -0.5, -0.7])


def test_vader_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "vaderSentiment.vaderSentiment", None
    )  # what an absent package looks like
    assert refuses("vader").endswith("Run `pip install vaderSentiment`.")


# ---- a function ----

FUNCTIONS = """
import math
from dataclasses import dataclass

@dataclass
class Weights:
    word: "float" = 1.0

def length(prompt, answer):
    return len(answer) + Weights().word

def lengths(prompts, answers):
    assert isinstance(prompts, list) and len(prompts) == len(answers)
    return [len(prompt) - len(answer) for prompt, answer in zip(prompts, answers)]

def text(prompt, answer): return "7"
def nothing(prompt, answer): pass
def nan(prompt, answer): return math.nan
def breaks(prompt, answer):
    raise KeyError("rating\\nof answer")
def too_few(prompts, answers): return [1.0]

CONSTANT = 3

def leaves(prompt, answer):
    raise SystemExit(3)
"""


@pytest.fixture
def scoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with scoring.py in it, which is the current one."""
    (tmp_path / "scoring_example.py").write_text(FUNCTIONS)
    (tmp_path / "broken_example.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "scoring_example", raising=False)
    return tmp_path


@pytest.mark.parametrize("where", ["scoring_example", "scoring_example.py", "{folder}/scoring_example.py"])
def test_a_function_is_found_in_a_module_or_a_file(scoring: Path, where: str) -> None:
    made = scorer(f"python:{where.format(folder=scoring)}:length")
    assert made.scores(["p", CHAT], answers("abc", "abcde")) == [4.0, 6.0]
    assert made.rank("p", answers("abc", "abcde", "xyz")).ranks == [2, 1, 2]


def test_a_function_may_take_a_batch(scoring: Path) -> None:
    made = scorer({"name": "python:scoring_example.py:lengths", "batch": True})
    assert made.scores(["pp", "q"], answers("abc", "a")) == [-1.0, 0.0]
    assert made.name == "python:scoring_example.py:lengths(batch=True)"


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("length", "names no function. Write python:module.path:function"),
        ("nowhere.py:length", "there is no file nowhere.py"),
        ("no_such.module:length", "there is no module 'no_such'"),
        ("scoring_example:lenght", "no function 'lenght' in scoring_example. Did you mean 'length'?"),
        ("scoring_example.py:CONSTANT", "there is no function 'CONSTANT' in scoring_example.py"),
        (
            "broken_example.py:f",
            "importing broken_example.py failed: ModuleNotFoundError: No module named 'no_such_package' "
            "(broken_example.py, line 1)",
        ),
        ("broken_example:f", "importing broken_example failed: ModuleNotFoundError"),
    ],
)
def test_a_function_that_cannot_be_had_is_one_line(scoring: Path, function: str, complaint: str) -> None:
    assert complaint in refuses(f"python:{function}")


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("text", "scored 'one' with '7'. Return a finite number."),
        ("nothing", "scored 'one' with None."),
        ("nan", "scored 'one' with nan."),
        ("breaks", "failed: KeyError: 'rating\\nof answer' (scoring_example.py, line 20). Correct the"),
        ("leaves", "failed: SystemExit: 3 (scoring_example.py, line"),
        ("too_few", "returned 1 scores for 2 answers."),
    ],
)
def test_a_function_that_does_not_score_is_one_line(scoring: Path, function: str, complaint: str) -> None:
    made = scorer({"name": f"python:scoring_example.py:{function}", "batch": function == "too_few"})
    with pytest.raises(LabError) as caught:
        made.rank("p", answers("one", "two"))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- a reward model ----


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real tiny Llama: `reward` scores, `language` generates, `two_labels` classifies."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("models")
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "the": 3, "pizza": 4, "was": 5, "great": 6, "awful": 7}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    ids: dict[str, Any] = {"vocab_size": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    for name, cls, labels in (
        ("reward", LlamaForSequenceClassification, 1),
        ("two_labels", LlamaForSequenceClassification, 2),
        ("language", LlamaForCausalLM, 1),
    ):
        config = LlamaConfig(**sizes, **ids)
        config.num_labels = labels
        cls(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_a_reward_model_scores_the_last_token_of_prompt_and_answer(tiny_models: Path) -> None:
    import torch
    from transformers import LlamaForSequenceClassification

    made = scorer(f"reward:{tiny_models / 'reward'}")
    scores = made.scores(["the pizza"] * 2, [Answer("was great"), Answer("was great", finished=False)])
    model = LlamaForSequenceClassification.from_pretrained(tiny_models / "reward")
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits.item() for ids in ([3, 4, 5, 6, 1], [3, 4, 5, 6])]
    assert scores == pytest.approx(expected, abs=1e-6)
    assert scores[0] != pytest.approx(scores[1], abs=1e-3), "whether an answer ended makes a difference"


def test_a_strangers_reward_model_is_read_where_its_chat_template_ends(
    tiny_models: Path, tmp_path: Path
) -> None:
    """Behind what follows the end of a turn (here "was"), as its makers use it; one of ours at that end."""
    import json
    import shutil

    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    folder = tmp_path / "reward"
    shutil.copytree(tiny_models / "reward", folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}the {{ m.content }} <eos> was {% endfor %}"
        "{% if add_generation_prompt %}the {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder)
    asked = [{"role": "user", "content": "pizza"}]
    answers = [Answer("great"), Answer("awful", finished=False)]
    talks = [[*asked, {"role": "assistant", "content": answer.text}] for answer in answers]
    with torch.no_grad():
        whole = [
            model(torch.tensor([tokenizer.apply_chat_template(talk, return_dict=False)])).logits.item()
            for talk in talks
        ]
    assert scorer(f"reward:{folder}").scores([asked] * 2, answers) == pytest.approx(whole, abs=1e-6)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"reward_shift": 0.0, "reward_scale": 1.0}))
    with torch.no_grad():
        cut = model(torch.tensor([[3, 4, 1, 5, 3, 6, 1]])).logits.item()
    assert scorer(f"reward:{folder}").scores([asked], answers[:1]) == pytest.approx([cut], abs=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by PEFT
def test_a_reward_models_adapter_scores_on_its_base(tiny_models: Path, tmp_path: Path) -> None:
    import peft
    import torch
    from transformers import LlamaForSequenceClassification

    base = LlamaForSequenceClassification.from_pretrained(tiny_models / "language", num_labels=1)
    told = {"modules_to_save": ["score"], "task_type": "SEQ_CLS", "init_lora_weights": False}
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], **told))  # type: ignore[arg-type]
    adapted.save_pretrained(str(tmp_path))
    with torch.no_grad():
        expected = adapted.eval()(input_ids=torch.tensor([[3, 4, 5, 6, 1]])).logits.item()
    scores = scorer(f"reward:{tmp_path}").scores(["the pizza"], [Answer("was great")])
    assert scores == pytest.approx([expected], abs=1e-6)


def test_a_reward_model_that_reads_both_ways_is_refused_by_name(tmp_path: Path) -> None:
    import transformers as hf

    config = hf.BertConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=8,
    )
    config.num_labels = 1
    hf.BertForSequenceClassification(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc\n")
    hf.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    assert "BertForSequenceClassification reads in both directions" in refuses(f"reward:{tmp_path}")


@pytest.mark.parametrize("name", ["language", "two_labels"])
def test_a_folder_without_a_scoring_layer_is_refused(tiny_models: Path, name: str) -> None:
    """transformers would draw the missing layer at random and let it rank."""
    folder = tiny_models / name
    assert (
        refuses(f"reward:{folder}") == f"{folder}: holds no reward model. Name a classifier with one label."
    )


def test_damaged_weights_are_one_line(tiny_models: Path, tmp_path: Path) -> None:
    for file in (tiny_models / "reward").iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    assert f"{tmp_path}: cannot be loaded as a reward model: " in refuses(f"reward:{tmp_path}")


def test_an_answer_takes_the_form_of_its_prompt() -> None:
    assert completion("p", Answer("Fine.")) == "Fine."
    assert completion(CHAT, Answer("Fine.")) == [{"role": "assistant", "content": "Fine."}]
    assert prompt_text(CHAT) == "system: Be kind.\n\nuser: How was it?"


# ---- a judge ----

Reply = tuple[int, Any, dict[str, str]]


@dataclass
class Request:
    """What the client sent."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def shown(self) -> list[str]:
        """The answers in the question, in the order shown."""
        [message] = self.body["messages"]
        return re.findall(r"<answer number=\"\d+\"[^>]*>\n(.*?)\n</answer>", message["content"], re.DOTALL)


@dataclass
class JudgeStandIn:
    """A real HTTP server on a loopback port that stands in for the model service, which cannot be run here.

    `reply(request)` gives the status, the body and headers; a body that is a string is what the model says.
    """

    reply: Callable[[Request], Reply]
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    @contextlib.contextmanager
    def serving(self) -> "Iterator[JudgeStandIn]":
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(Request(self.path, dict(self.headers), body))
                status, content, headers = outer.reply(outer.requests[-1])
                if isinstance(content, str):
                    content = {"choices": [{"message": {"role": "assistant", "content": content}}]}
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                with contextlib.suppress(OSError):  # the client may have lost patience
                    self.send_response(status)
                    for key, value in {**headers, "Content-Length": str(len(data))}.items():
                        self.send_header(key, value)
                    self.end_headers()
                    self.wfile.write(data)

            do_GET = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                """Stays silent."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., JudgeStandIn]]:
    """Starts stand-ins that give `replies` in turn, the last of them for ever; or `reply(request)`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with contextlib.ExitStack() as stack:

        def start(*replies: Reply, reply: Callable[[Request], Reply] | None = None) -> JudgeStandIn:
            left = list(replies)
            in_turn: Callable[[Request], Reply] = lambda _: left.pop(0) if len(left) > 1 else left[0]  # noqa: E731
            return stack.enter_context(JudgeStandIn(reply or in_turn).serving())

        yield start


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between retries, which are not waited."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def judge(server: JudgeStandIn, **options: Any) -> Judge:
    made = make({"name": f"judge:{server.url}/v1", "model": "judge-1", **options})
    assert isinstance(made, Judge)
    return made


def fails(made: Judge) -> str:
    with pytest.raises(LabError) as caught:
        made.rank("p", answers("a", "b"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def longest_first(request: Request) -> Reply:
    order = sorted(range(len(request.shown)), key=lambda index: -len(request.shown[index]))
    return 200, json.dumps({"ranking": [[index + 1] for index in order]}), {}


FOUR = answers("a", "bb", "ccc", "dddd")


def test_a_judge_ranks_whatever_the_order_it_sees(serve: Callable[..., JudgeStandIn]) -> None:
    server = serve(reply=longest_first)
    for number in range(10):
        assert judge(server).rank(f"prompt {number}", FOUR).ranks == [4, 3, 2, 1]
    assert len({tuple(request.shown) for request in server.requests}) > 5, "the answers are shuffled"
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}
    body = server.requests[0].body
    assert body["model"] == "judge-1"
    assert body["temperature"] == 0.0
    question = body["messages"][0]["content"]
    assert "<prompt>\nprompt 0\n</prompt>" in question
    assert '{"ranking": [[2], [1, 3]]}' in question
    assert "all 4 answers" in question


def test_a_judge_who_likes_a_position_ranks_at_random(serve: Callable[..., JudgeStandIn]) -> None:
    """It always prefers what it sees first; over many prompts no answer gains by where the sampler put it."""
    made = judge(serve((200, '{"ranking": [1, 2, 3, 4]}', {})))
    ranks = [made.rank(f"prompt {number}", FOUR).ranks for number in range(200)]
    means = [sum(column) / len(ranks) for column in zip(*ranks, strict=True)]
    assert means == pytest.approx([2.5] * 4, abs=0.24)  # three standard errors of 200 draws


def test_a_judge_is_asked_the_same_way_again_unless_the_seed_differs(
    serve: Callable[..., JudgeStandIn],
) -> None:
    server = serve(reply=longest_first)
    eight = answers(*(str(10**n) for n in range(8)))
    for seed in (0, 0, 1):
        judge(server, seed=seed).rank(CHAT, eight)
    first, again, other = server.requests
    assert first.body == again.body
    assert first.shown != other.shown
    assert sorted(first.shown) == sorted(other.shown)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/chat/completions"])
def test_every_way_to_write_the_address(serve: Callable[..., JudgeStandIn], suffix: str) -> None:
    server = serve(reply=longest_first)
    made = make({"name": f"judge:{server.url}{suffix}", "model": "m", "temperature": None})
    assert made.rank("p", answers("a", "bb")).ranks == [2, 1]
    [request] = server.requests
    assert request.path == "/v1/chat/completions"
    assert "temperature" not in request.body
    assert "Authorization" not in request.headers


@pytest.mark.parametrize(
    "words",
    [
        '{"ranking": [[1, 2]]}',
        '```json\n{"ranking": [[1, 2]]}\n```',
        'The form is {"ranking": [[2], [1]]}, {so}: {"why": "equal", "ranking": [[2, 1]]} I think.',
    ],
)
def test_a_ranking_is_found_in_what_models_write(serve: Callable[..., JudgeStandIn], words: str) -> None:
    assert judge(serve((200, words, {}))).rank("p", answers("a", "b")).ranks == [1, 1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("Both are good.", "no ranking in 'Both are good.'"),
        ('{"ranking": "1, 2"}', "no ranking"),
        ('{"ranking": [[1]]}', "answer 2 is missing"),
        ('{"ranking": [[1], [2], [3]]}', "there is no answer 3"),
        ('{"ranking": [["A"], ["B"]]}', "not numbers of answers"),
        ('{"ranking": [[true], [2]]}', "not numbers of answers"),
        ("", "no ranking"),
        ({"choices": [{"message": {"content": None}}]}, "no ranking"),
    ],
)
def test_a_reply_that_cannot_be_read_is_asked_for_again_and_then_skipped(
    serve: Callable[..., JudgeStandIn], words: Any, reason: str
) -> None:
    server = serve((200, words, {}))
    with pytest.raises(Skip, match=re.escape(reason)):
        judge(server, retries=5).rank("p", answers("a", "b"))
    assert len(server.requests) == 6
    assert len({tuple(request.shown) for request in server.requests}) == 2, "not always the same question"


def test_an_answer_given_twice_is_judged_once(serve: Callable[..., JudgeStandIn]) -> None:
    server = serve(reply=longest_first)
    twice = [Answer("aa"), Answer("b"), Answer("aa"), Answer("b", finished=False)]
    assert judge(server).rank("p", twice).ranks[0] == judge(server).rank("p", twice).ranks[2] == 1
    assert sorted(server.requests[0].shown) == ["aa", "b", "b"]
    assert server.requests[0].body["messages"][0]["content"].count(" cut_off>") == 1
    assert judge(server).rank("p", answers("a", "a", "a")).ranks == [1, 1, 1]
    assert len(server.requests) == 2, "what is all the same needs no judge"


def test_braces_in_answers_and_template_are_left_alone(serve: Callable[..., JudgeStandIn]) -> None:
    server = serve((200, '{"ranking": [1, 2]}', {}))
    template = 'Form: {"ranking": [..]}. {prompt} | {answers}'
    judge(server, template=template).rank("{answers} {x}", answers("{prompt}", "b"))
    [request] = server.requests
    assert request.body["messages"][0]["content"].startswith(
        'Form: {"ranking": [..]}. {answers} {x} | <answer'
    )
    assert "{prompt}" in request.shown


def test_a_busy_service_is_asked_again_with_growing_waits(
    serve: Callable[..., JudgeStandIn], waits: list[float]
) -> None:
    good: Reply = (200, '{"ranking": [[1, 2]]}', {})
    server = serve((429, b"slow down", {"Retry-After": "7"}), (503, b"", {}), (500, b"", {}), good)
    assert judge(server).rank("p", answers("a", "b")).ranks == [1, 1]
    assert waits == [7.0, 2.0, 4.0]
    assert all(request.body == server.requests[0].body for request in server.requests)


def test_a_service_that_stays_busy_is_one_line(
    serve: Callable[..., JudgeStandIn], waits: list[float]
) -> None:
    server = serve((429, {"error": {"message": "insufficient\nquota"}}, {"Retry-After": "86400"}))
    line = fails(judge(server, retries=2))
    assert line.startswith(f"{server.url}/v1/chat/completions: answers 429 Too Many Requests: ")
    assert "insufficient" in line
    assert line.endswith("also after 2 retries. Start again later: what was ranked is kept.")
    assert waits == [60.0, 60.0], "nobody waits for a day"


@pytest.mark.parametrize("status", [401, 403])
def test_a_bad_key_is_named_by_its_variable_and_never_shown(
    serve: Callable[..., JudgeStandIn], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    server = serve((status, {"error": "Incorrect API key: sk-hidden"}, {}))
    assert "refuses a call without key: MY_KEY is empty" in fails(judge(server, api_key_env="MY_KEY"))
    monkeypatch.setenv("MY_KEY", "sk-hidden\n")
    made = judge(server, api_key_env="MY_KEY")
    line = fails(made)
    assert "refuses the key in MY_KEY. Set MY_KEY to a valid one." in line
    assert "hidden" not in line + made.name + repr(made)
    assert len(server.requests) == 2, "a bad key does not get better"
    assert server.requests[-1].headers["Authorization"] == "Bearer sk-hidden"


def test_a_key_that_no_header_can_hold_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hid\nden")
    line = refuses({"name": "judge:http://host/v1", "model": "m"})
    assert "OPENAI_API_KEY" in line
    assert "hid" not in line


def test_a_refusal_is_quoted_without_the_key(
    serve: Callable[..., JudgeStandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hidden")
    line = fails(judge(serve((404, {"error": "no model judge-1 for sk-hidden"}, {}))))
    assert "answers 404 Not Found: " in line
    assert "no model judge-1 for <redacted>" in line
    assert line.endswith("Check the judge's url and model.")


def test_the_key_does_not_follow_a_redirection(
    serve: Callable[..., JudgeStandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hidden")
    elsewhere = serve(reply=longest_first)
    assert "answers 302 Found" in fails(judge(serve((302, b"", {"Location": elsewhere.url}))))
    assert elsewhere.requests == []


def test_a_page_that_is_no_completion_is_one_line(serve: Callable[..., JudgeStandIn]) -> None:
    server = serve((200, b"<html>welcome</html>", {}))
    assert "the reply is no chat completion. Check the judge's url." in fails(judge(server))
    assert len(server.requests) == 1


def test_a_service_that_is_not_there_is_one_line(waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = fails(judge(JudgeStandIn(longest_first, url=f"http://127.0.0.1:{port}")))
    assert re.search(r"cannot be reached \(.*Connection refused\)\. Start the service", line)
    assert waits == []


def test_a_silent_service_is_given_up(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = JudgeStandIn(longest_first, url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        line = fails(judge(server, timeout_seconds=0.05, retries=2))
    assert "cannot be reached (timed out), also after 2 retries" in line
    assert waits == [1.0, 2.0]


# ---- a person ----


@pytest.fixture
def person(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, str]]:
    """Types the lines for a ranking; returns what came of it (ranks, or what was raised) and the screen."""

    def types(*lines: str, shown: Sequence[Answer] = FOUR, prompt: Any = "How was it?") -> tuple[Any, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        try:
            result: Any = Human().rank(prompt, shown).ranks
        except (Skip, Undo, Quit) as said:
            result = type(said)
        return result, capsys.readouterr().out

    return types


@pytest.mark.parametrize(
    ("typed", "ranks"),
    [("2 1=3 4", [2, 1, 2, 3]), (" 4,3 , 2,1", [4, 3, 2, 1]), ("1 > 2 = 3=4", [1, 2, 2, 2])],
)
def test_a_person_gives_an_order(
    person: Callable[..., tuple[Any, str]], typed: str, ranks: list[int]
) -> None:
    result, screen = person(typed)
    assert result == ranks
    assert "How was it?" in screen
    assert all(text in screen for text in ("answer 1", "dddd"))


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("", "a number is missing"),
        ("2 1", "answer 3 is missing"),
        ("1 2 3 4 5", "there is no answer 5, only 1 to 4"),
        ("1 2 2 3 4", "answer 2 is named twice"),
        ("1 2 x 4", "'x' is no number of an answer"),
        ("1 = 2 3=", "a number is missing"),
        ("-1 2 3 4", "'-1' is no number of an answer"),
    ],
)
def test_wrong_input_is_explained_and_asked_for_again(
    person: Callable[..., tuple[Any, str]], typed: str, complaint: str
) -> None:
    result, screen = person(typed, "1 2 3 4")
    assert result == [1, 2, 3, 4]
    assert f"{complaint}. Write for example: 1 2 3 4" in screen


def test_bytes_that_are_no_text_are_asked_for_again(
    person: Callable[..., tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a terminal set to another encoding."""
    lines = iter([b"\xff", b"2 1"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines).decode())
    result, screen = person(shown=answers("a", "b"))
    assert result == [2, 1]
    assert "is no number of an answer" in screen


def test_a_person_may_skip_undo_quit_and_ask_for_help(person: Callable[..., tuple[Any, str]]) -> None:
    assert person("s")[0] is Skip
    assert person("u")[0] is Undo
    assert person("q")[0] is Quit
    assert person()[0] is Quit, "the end of the input"
    result, screen = person("?", "1=2=3=4")
    assert result == [1, 1, 1, 1]
    assert "= makes a tie" in screen


def test_what_a_model_writes_does_not_command_the_terminal(person: Callable[..., tuple[Any, str]]) -> None:
    shown = [Answer("\x1b]0;owned\x07[bold]hi[/bold]\x9b2J"), Answer("", finished=False)]
    _, screen = person("1 2", shown=shown, prompt=CHAT)
    assert "\x1b" not in screen
    assert "\x9b" not in screen
    assert "\\x1b]0;owned\\x07[bold]hi[/bold]" in screen
    assert "(empty)" in screen
    assert "answer 2 (cut off at the length limit)" in screen
    assert "user: How was it?" in screen


def test_what_is_all_the_same_is_not_asked(person: Callable[..., tuple[Any, str]]) -> None:
    assert person(shown=answers("a", "a"))[0] == [1, 1]
    assert person("2 1", shown=answers("a", "b", "a"))[0] == [2, 1, 2]


def test_orders_are_read() -> None:
    assert parse_order("2 1=3 4") == [[2], [1, 3], [4]]
    with pytest.raises(ValueError, match="missing"):
        parse_order("1==2")
