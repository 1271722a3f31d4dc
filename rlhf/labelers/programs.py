"""Labelers that compute a score: sentiment, a function of the user's, another reward model."""

import importlib
import importlib.machinery
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from lab import trust
from lab.config import require
from lab.errors import LabError, did_you_mean
from lab.files import sha256_file
from lab.hub import from_pretrained
from rlhf.labelers.base import Answer, Prompt, Scorer, completion


@dataclass(frozen=True, kw_only=True)
class Vader(Scorer):
    """How pleasant an answer sounds: VADER's compound (-1 to 1, Hutto and Gilbert 2014), less penalties."""

    kind = "vader"

    tie_margin: float = 0.05
    unfinished_penalty: float = 0.0
    """Subtracted from answers that were cut off at the length limit."""
    min_words: int = 0
    max_words: int | None = None
    length_penalty: float = 0.05
    """Subtracted for every word below min_words or above max_words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("unfinished_penalty", "min_words", "length_penalty"):
            require(getattr(self, key) >= 0, key, f"{getattr(self, key)} must not be negative")
        require(
            self.max_words is None or self.max_words >= self.min_words,
            "max_words",
            f"{self.max_words} is less than min_words {self.min_words}",
        )

    @cached_property
    def _instrument(self) -> Any:
        try:
            from vaderSentiment.vaderSentiment import (  # pyright: ignore[reportMissingImports]
                SentimentIntensityAnalyzer,
            )
        except ImportError:
            raise LabError(
                "labeler 'vader': the package vaderSentiment is missing. Run `pip install vaderSentiment`."
            ) from None
        return SentimentIntensityAnalyzer()

    def _score(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        return [self._score_one(answer) for answer in answers]

    def _score_one(self, answer: Answer) -> float:
        words = len(answer.text.split())
        outside = max(self.min_words - words, words - self.max_words if self.max_words is not None else 0, 0)
        penalty = self.length_penalty * outside + self.unfinished_penalty * (not answer.finished)
        return self._instrument.polarity_scores(answer.text)["compound"] - penalty


@dataclass(frozen=True, kw_only=True)
class Function(Scorer):
    """A function of the user's: `(prompt, answer) -> number`, the answer being its text."""

    kind = "python"
    target = "function"

    function: str = ""
    """module.path:function, or path/to/file.py:function."""
    batch: bool = False
    """The function takes a list of prompts and one of answers, of equal length, and returns a list."""

    def require_consent(self, source: str) -> None:
        file = self._file()
        what = f"runs the Python code of {file or self.function.rpartition(':')[0]}"
        trust.require(f"{self.kind}:{self.function}", what, source, [file] if file else [])

    def code(self) -> dict[str, str] | None:
        file = self._file()
        name = f"{self.kind}:{self.function}"
        return {"code": name, "path": str(file), "sha256": sha256_file(file)} if file else None

    def _file(self) -> Path | None:
        """Where its code is, found without running any; None if there is no such file."""
        where = self.function.rpartition(":")[0]
        return (Path(where) if Path(where).is_file() else None) if where.endswith(".py") else _file_of(where)

    @cached_property
    def _instrument(self) -> Callable[..., Any]:
        where, _, attribute = self.function.rpartition(":")
        if not where or not attribute:
            raise LabError(
                f"labeler {self.name!r}: names no function. "
                "Write python:module.path:function or python:path/to/file.py:function."
            )
        module = self._import(where)
        found = getattr(module, attribute, None)
        if not callable(found):
            hint = did_you_mean(attribute, (name for name, value in vars(module).items() if callable(value)))
            raise LabError(
                f"labeler {self.name!r}: there is no function {attribute!r} in {where}.{hint} "
                "Name a function of (prompt, answer)."
            )
        return found

    def _import(self, where: str) -> ModuleType:
        is_file = where.endswith(".py")
        if is_file and not Path(where).is_file():
            raise LabError(f"labeler {self.name!r}: there is no file {where}. Correct the path.")
        try:
            return _load_file(Path(where)) if is_file else _load_module(where)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and f"{where}.".startswith(f"{error.name}."):
                raise LabError(
                    f"labeler {self.name!r}: there is no module {error.name!r}. Correct the name; modules "
                    "are looked for in this folder and among the installed packages."
                ) from None
            raise LabError(f"labeler {self.name!r}: importing {where} failed: {_told(error)}.") from error

    def _score(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[Any]:
        texts = [answer.text for answer in answers]
        function = self._instrument
        try:
            if self.batch:
                return list(function(list(prompts), texts))
            return [function(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        except (Exception, SystemExit) as error:  # sys.exit() in it would end the lab without a word
            raise LabError(f"labeler {self.name!r}: failed: {_told(error)}. Correct the function.") from error


def _see_this_folder() -> None:
    """The command `lab` has its own folder first on the path, not the one it is called from."""
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))


def _load_module(name: str) -> ModuleType:
    _see_this_folder()
    return importlib.import_module(name)


def _file_of(module: str) -> Path | None:
    """The file of a module that may not be imported yet; importlib.util would import its packages."""
    _see_this_folder()
    places, name, found = None, "", None
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        found = importlib.machinery.PathFinder.find_spec(name, places)
        if found is None:
            return None
        places = found.submodule_search_locations
    return Path(found.origin) if found and found.origin and Path(found.origin).is_file() else None


def _load_file(path: Path) -> ModuleType:
    import importlib.util

    name = f"lab_labeler_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look their module up there
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True, kw_only=True)
class RewardModel(Scorer):
    """Another reward model: a folder that transformers loads as a sequence classifier, or an adapter's.

    One that was not trained here knows conversations whole, as its chat template writes them, with what that
    puts behind the end of a turn (Qwen's a line break): there its score is read, as its makers read it.
    """

    kind = "reward"
    target = "folder"
    unnamed = ("device",)

    folder: str = ""
    device: str = "cpu"
    """Where it computes: cpu, cuda, mps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.folder), "folder", "names no reward model. Write reward:FOLDER")

    @cached_property
    def _instrument(self) -> Any:
        folder = Path(self.folder)
        if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            raise LabError(
                f"{self.folder}: no reward model: there is no config.json in it. Correct the path."
            )
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        import rlhf.labgpt  # noqa: F401 (registers our own models)
        from rlhf import models
        from rlhf.scoring import RewardScorer

        adapts = models.is_adapter(folder)
        try:
            model, report = from_pretrained(
                AutoModelForSequenceClassification,
                models.base_of(folder) if adapts else self.folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **({"num_labels": 1} if adapts else {}),
            )
            if adapts:
                adapted = models.with_adapter(folder, model)
                if "score" in (adapted.peft_config["default"].modules_to_save or ()):
                    report["missing_keys"] = set(report["missing_keys"]) - {"score.weight"}
                model = adapted.merge_and_unload()
            own = (folder / "tokenizer_config.json").exists() or not adapts
            place = self.folder if own else models.base_of(folder)
            tokenizer = from_pretrained(AutoTokenizer, place, local_files_only=True)
            model = model.to(self.device).eval()
        except LabError:
            raise
        except Exception as error:  # transformers, tokenizers, safetensors and torch raise what they like
            raise LabError(f"{self.folder}: cannot be loaded as a reward model: {_told(error)}.") from error
        # transformers would fill what is missing with random numbers, and they would rank.
        if report["missing_keys"] or model.config.num_labels != 1:
            raise LabError(f"{self.folder}: holds no reward model. Name a classifier with one label.")
        if not hasattr(model, "score"):
            raise LabError(
                f"{self.folder}: {type(model).__name__} reads in both directions, and reward models that do "
                "are not supported. Name one made of a causal model (Llama, Qwen, Gemma ...)."
            )
        return RewardScorer(model, tokenizer)

    def _score(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        from rlhf.tokenization import tokenize_whole

        completions = [completion(*each) for each in zip(prompts, answers, strict=True)]
        scorer = self._instrument
        if not hasattr(scorer.config, "reward_scale"):  # which `rlhf.reward` leaves
            whole = [
                tokenize_whole([*prompt, *answer], scorer.tokenizer)
                for prompt, answer in zip(prompts, completions, strict=True)
                if not isinstance(prompt, str) and not isinstance(answer, str)
            ]
            if len(whole) == len(answers):
                return scorer.score_ids([[]] * len(whole), whole).tolist()
        finished = [answer.finished for answer in answers]
        return scorer.score_texts(list(prompts), completions, finished).tolist()


def _told(error: BaseException) -> str:
    """What somebody else's code raised, and where, in one line."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:200]
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return f"{what} ({Path(at.filename).name}, line {at.lineno})"
