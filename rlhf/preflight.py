"""The dry pass: what can be known of a recipe before anything is trained, all of it at once.

Every source is opened, every row parsed, rendered by the chat template and tokenised; the model's
configuration, its positions and the disk are looked at. What is found is one error that names everything to
put right. What takes long is kept by hash (see `sources.cache_folder`): the next start does not do it again.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from lab.errors import LabError
from lab.files import write_atomic
from rlhf import data, sources, splits
from rlhf.config import RLHFRun
from rlhf.reviews import Split

Result = TypeVar("Result")

WHAT = {"demonstrations": "demonstrations", "comparisons": "comparisons", "prompts": "prompts"}
TRAINED = ("sft", "reward", "ppo")


@dataclass
class Lengths:
    """What tokenising the rows of a source found."""

    rows: int = 0
    longest: int = 0
    too_long: int = 0
    places: list[str] = field(default_factory=list)
    """Of the first that are too long."""
    unfit: dict[str, int] = field(default_factory=dict)
    """Rows that the chat template cannot render, by why; the rarest reasons as one."""
    unfit_places: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Needed:
    """Rows that a recipe will read."""

    kind: str
    source: str
    split: Split = "train"

    def __str__(self) -> str:
        return f"{self.source}{' (its part to evaluate on)' if self.split == 'eval' else ''}"


@dataclass(frozen=True)
class Found:
    """What the dry pass found."""

    notes: list[str]
    """What is to be said, a line each: rows left out, columns not used, room that is scarce."""
    counts: dict[Needed, dict[str, Any]]
    """Of what a recipe reads, its rows and how many of them are not used as they are, by reason."""

    def of(self, settings: RLHFRun, stage: str) -> dict[str, dict[str, Any]]:
        """The counts of what a stage reads, for its summary."""
        return {
            f"{one.kind}{' to evaluate on' if one.split == 'eval' else ''}": {"source": one.source, **counts}
            for one in _needed(settings, [stage])
            if (counts := self.counts.get(one))
        }


def check(settings: RLHFRun, stages: Sequence[str], folder: Path, policy: Path | None = None) -> Found:
    """Looks at all that these stages will need.

    Args:
        settings: the recipe.
        stages: those that will run.
        folder: of the recipe; it need not be there.
        policy: the model of the first stage, if that is finished.

    Raises:
        LabError: all that must be put right before a stage can begin.
    """
    problems: list[str] = []
    notes: list[str] = []

    def attempt(function: Callable[[], Result]) -> Result | None:
        try:
            return function()
        except LabError as error:
            if str(error) not in problems:
                problems.append(str(error))
            return None

    needed = list(_needed(settings, stages))
    found = {
        one: rows
        for one in needed
        if (rows := attempt(lambda one=one: _load(settings, one, problems))) is not None
    }
    for one, loaded in found.items():
        if said := loaded.left_out.notes():
            notes.append(f"{one}, as {one.kind}: {'; '.join(said)}")
    notes += mixed_forms(found)
    whole = len(found) == len(needed)
    if whole and not problems and "eval" in stages:
        unseen = attempt(lambda: splits.unseen_prompts(settings))
        if unseen and unseen[1]:
            notes.append(
                f"{unseen[1]:,} prompts to evaluate on are trained on, and left out of the evaluation"
            )
    test_part = found.get(Needed("demonstrations", settings.data.demonstrations, "eval"))
    if whole and not problems and test_part:
        held_out = attempt(lambda: splits.demonstrations(settings)[1])
        if held_out is not None and (shared := len(test_part.rows) - len(held_out)):
            notes.append(
                f"{shared:,} held-out demonstrations have prompts that are trained on, and are left out"
            )
    if "ppo" in stages and settings.ppo.ptx_coef:
        demonstrations = found.get(Needed("demonstrations", settings.data.demonstrations))
        if demonstrations and "completion" not in demonstrations.rows.column_names:
            problems.append("ppo.ptx_coef needs demonstrations of prompt and completion. Set it to 0.")
    positions, size, _ = attempt(lambda: _facts(settings, policy)) or (None, 0, None)
    if positions is not None and settings.data.max_length > positions:
        problems.append(
            f"data.max_length: {settings.data.max_length} is more than the model's {positions} positions. "
            "Lower it."
        )
    counts: dict[Needed, dict[str, Any]] = {}
    longest: dict[str, int] = {}
    tokenizer = None
    if whole:
        tokenizer = attempt(lambda: _tokenizer(settings, policy, notes))
        for one, loaded in found.items():
            if tokenizer is not None:
                lengths = _kept_lengths(settings, one, loaded, tokenizer)
                _judge(settings, one, lengths, problems, notes)
                counts[one] = _counts(loaded.left_out, lengths)
                longest[one.kind] = max(longest.get(one.kind, 0), lengths.longest)
    _look_at_room(settings, stages, folder, size, problems, notes)
    if size and tokenizer is not None:
        _, size, model = _facts(settings, policy, len(tokenizer))
        attempt(lambda: _look_at_memory(settings, stages, model, size, longest, notes))
    if len(problems) == 1:
        raise LabError(problems[0])
    if problems:
        listed = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise LabError(f"{len(problems)} things must be put right before a stage can begin:{listed}")
    return Found(notes, counts)


def mixed_forms(found: Mapping[Needed, data.Loaded]) -> Iterator[str]:
    """Says where some data are texts and others conversations: the stages then speak two languages."""
    form: dict[bool, dict[str, str]] = {False: {}, True: {}}
    for one, loaded in found.items():
        first = next(iter(loaded.rows[0].values()))
        form[not isinstance(first, str)].setdefault(one.source, one.kind)
    if form[False] and form[True]:
        texts, talks = (
            " and ".join(f"{source} ({kind})" for source, kind in form[converses].items())
            for converses in (False, True)
        )
        yield (
            f"warning: texts in {texts}, conversations in {talks}: texts are asked and learned without "
            "the chat template, so that what one teaches may not hold for the other. Write all in one form"
        )


def _counts(left_out: data.Dropped, lengths: Lengths) -> dict[str, Any]:
    reasons = {"bad_rows": left_out.reasons, "not_meant": left_out.not_meant, "not_rendered": lengths.unfit}
    numbers = {"ties": left_out.ties, "too_long": lengths.too_long}
    return {"rows": left_out.rows} | {k: v for k, v in (reasons | numbers).items() if v}


def _needed(settings: RLHFRun, stages: Sequence[str]) -> Iterator[Needed]:
    d, wanted = settings.data, set(stages)
    asked = d.prompts or d.demonstrations
    if wanted & {*TRAINED, "eval"}:
        yield Needed("demonstrations", d.demonstrations)
    if "sft" in wanted and _has_eval(d.demonstrations):
        yield Needed("demonstrations", d.demonstrations, "eval")
    if wanted & {"collect", "ppo", "eval"}:
        yield Needed("prompts", asked)
    if "eval" in wanted:
        if d.eval_prompts:
            yield Needed("prompts", d.eval_prompts)
        elif _has_eval(asked):
            yield Needed("prompts", asked, "eval")
    if wanted & {"reward", "eval"} and d.comparisons != "collect":
        yield Needed("comparisons", d.comparisons)


def _has_eval(source: str) -> bool:
    try:
        return sources.has_eval(source)
    except LabError:  # reading its rows says why
        return False


def _load(settings: RLHFRun, one: Needed, problems: list[str]) -> data.Loaded:
    """The rows that can be used; that others cannot is a problem where they are an error."""
    loaded = data.load(one.kind, one.source, one.split, strict=False)
    if loaded.left_out.bad_rows and settings.data.bad_rows == "error":
        problem = str(loaded.left_out.refusal(one.source))
        problems += [] if problem in problems else [problem]
    return loaded


# ---- the model ----


def _facts(
    settings: RLHFRun, policy: Path | None, vocabulary: int | None = None
) -> tuple[int | None, int, Any]:
    """Positions of the model (None: any number), how many weights it has, and its configuration.

    Args:
        vocabulary: tokens of a LabGPT that is not there yet.
    """
    from rlhf import labgpt, models

    found = models.examine(replace(settings.model, path=str(policy)) if policy else settings.model)
    if found is not None:
        return found.positions, found.parameters, found.config
    import torch

    try:
        config = labgpt.LabGPTConfig(vocab_size=vocabulary or models.BPE_SIZE, **settings.model.labgpt)
        with torch.device("meta"):
            model = labgpt.LabGPTForCausalLM(config)
    except (TypeError, ValueError) as error:
        raise LabError(f"model.labgpt = {settings.model.labgpt}: {error}") from None
    size = sum(parameter.numel() for parameter in model.parameters())
    return config.max_position_embeddings, size, config


def _tokenizer(settings: RLHFRun, policy: Path | None, notes: list[str]) -> Any:
    """The tokenizer as all stages will have it."""
    from rlhf import models
    from rlhf.tokenization import prepare

    if policy is not None:
        return models.open_tokenizer(str(policy))
    source = settings.data.demonstrations
    tokenizer = models.start_tokenizer(settings.model, splits.demonstrations(settings)[0], source)
    notes += prepare(tokenizer, settings.model, splits.converses(settings), source)
    return tokenizer


def _look_at_room(
    settings: RLHFRun,
    stages: Sequence[str],
    folder: Path,
    size: int,
    problems: list[str],
    notes: list[str],
) -> None:
    """Compares what weights and optimisers need with the disk, in fp32, as they are trained and written."""
    trained = [stage for stage in stages if stage in TRAINED]
    if not trained or not size:
        return
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    results = 4 * size * len(trained)
    checkpoint = 0 if settings.model.lora_rank else 12 * size  # weights and Adam's two means
    least, usual = results + checkpoint, results + checkpoint * (settings.keep_checkpoints + 1)
    told = (
        f"{folder}: {' and '.join(trained)} need about {usual / 1e9:.1f} GB of disk, "
        f"{free / 1e9:.1f} GB are free"
    )
    if least > free:
        problems.append(f"{told}. Free some, or name another folder with --out.")
    elif usual > free:
        notes.append(f"{told}; keep_checkpoints {settings.keep_checkpoints} may be too many")


def _look_at_memory(
    settings: RLHFRun,
    stages: Sequence[str],
    model: Any,
    size: int,
    longest: dict[str, int],
    notes: list[str],
) -> None:
    """Compares what each stage needs with what the device has.

    Raises:
        LabError: no such device, or it has no room for the weights and the optimiser alone.
    """
    from lab.device import resolve
    from rlhf import memory

    # One thread: to find how many are idle takes half a second, and is done when a stage begins.
    compute = resolve(replace(settings.device, threads=settings.device.threads or 1))
    free, there = memory.free_bytes(compute.device), memory.all_bytes(compute.device)
    found = memory.needs(settings, model, size, longest, compute.precision == "bf16", free)
    found = {stage: needs for stage, needs in found.items() if stage in stages}
    told = ", ".join(f"{stage} {needs.total / 1e9:.1f} GB" for stage, needs in found.items())
    most = max(found, key=lambda stage: found[stage].total)
    hungriest = max(found, key=lambda stage: found[stage].kept)
    has = f"{compute.device} has {there / 1e9:.1f} GB, {free / 1e9:.1f} of them free"
    remedy = (
        "Lower ppo.micro_batch_size and data.max_length"
        if most == "ppo"
        else f"Lower {most}.micro_batch_size"
    )
    if found[hungriest].kept > there:
        raise LabError(
            f"{hungriest} needs {found[hungriest].kept / 1e9:.1f} GB of memory for weights and optimiser "
            f"alone, and {has}. Take a smaller model, model.lora_rank, or another device."
        )
    short = f"; that may be too little. {remedy}, or free some" if found[most].total > free else ""
    notes.append(
        f"memory, estimated: {told} ({found[most].kept / 1e9:.1f} of {most}'s are weights and optimiser); "
        f"{has}{short}"
    )


# ---- lengths ----


def _limit(settings: RLHFRun, kind: str) -> int:
    d = settings.data
    return d.max_length - d.max_new_tokens if kind == "prompts" else d.max_length


def _judge(settings: RLHFRun, one: Needed, lengths: Lengths, problems: list[str], notes: list[str]) -> None:
    """Says what must be done about rows that are too long or cannot be rendered."""
    what, limit, d = WHAT[one.kind], _limit(settings, one.kind), settings.data
    unfit = sum(lengths.unfit.values())
    for reason, count in lengths.unfit.items():
        told = f"{one}: {count:,} of {lengths.rows:,} {what}: {reason.rstrip('.')}"
        if d.bad_rows == "skip" and unfit < lengths.rows:
            notes.append(f"{told}; left out")
        else:
            where = data.named(lengths.unfit_places, count)
            remedy = "" if unfit == lengths.rows else " Correct or remove them, or set data.bad_rows to skip."
            problems.append(f"{told} ({where}).{remedy}")
    if not lengths.too_long:
        return
    less = f" less data.max_new_tokens {d.max_new_tokens}" if one.kind == "prompts" else ""
    allowed = f"{limit:,} tokens (data.max_length {d.max_length}{less})"
    many = f"{lengths.too_long:,} of {lengths.rows:,} {what}"
    told = f"{one}: {many} have more than {allowed}, the longest {lengths.longest:,}"
    if d.too_long == "error":
        problems.append(
            f"{told}: {data.named(lengths.places, lengths.too_long)}. Raise data.max_length, or set "
            "data.too_long to drop or truncate_prompt."
        )
    elif d.too_long == "drop" and lengths.too_long == lengths.rows:
        problems.append(f"{told}, so that nothing is left. Raise data.max_length.")
    else:
        notes.append(f"{told}; data.too_long: {d.too_long}")


def _kept_lengths(settings: RLHFRun, one: Needed, loaded: data.Loaded, tokenizer: Any) -> Lengths:
    """`measure`, or what it found before of the same rows with the same tokenizer."""
    limit = _limit(settings, one.kind)
    mark = loaded.mark
    if not mark:
        return measure(one.kind, loaded, tokenizer, limit)
    own = [tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else "", tokenizer.chat_template]
    code = [Path(__file__).read_bytes(), Path(__file__).with_name("tokenization.py").read_bytes()]
    key = json.dumps([mark, own, tokenizer.eos_token, limit]).encode() + b"".join(code)
    path = sources.cache_folder() / f"{hashlib.sha256(key).hexdigest()[:32]}.lengths.json"
    with suppress(OSError, ValueError, TypeError):
        return Lengths(**json.loads(path.read_text()))
    lengths = measure(one.kind, loaded, tokenizer, limit)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(asdict(lengths)).encode())
    return lengths


def measure(kind: str, loaded: data.Loaded, tokenizer: Any, limit: int) -> Lengths:
    """Tokenises all rows.

    Args:
        kind: demonstrations, comparisons or prompts.
        loaded: the rows.
        limit: tokens that a row may have; of a comparison, its longest answer with the prompt.
    """
    from rlhf.tokenization import counted, in_parallel

    lengths, unfit = Lengths(rows=len(loaded.rows)), Counter[str]()
    with in_parallel():
        for index, count in enumerate(counted(kind, loaded.rows, tokenizer)):
            if isinstance(count, str):
                unfit[count] += 1
                if len(lengths.unfit_places) < data.NAMED:
                    lengths.unfit_places.append(loaded.place(index))
                continue
            lengths.longest = max(lengths.longest, count)
            if count > limit:
                lengths.too_long += 1
                if len(lengths.places) < data.NAMED:
                    lengths.places.append(loaded.place(index))
    lengths.unfit = dict(unfit.most_common(5))
    if rest := unfit.total() - sum(lengths.unfit.values()):
        lengths.unfit["the chat template cannot render them for other reasons"] = rest
    return lengths
