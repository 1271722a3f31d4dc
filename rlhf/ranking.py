"""The reward model's stage: TRL's `RewardTrainer`, with the K-wise loss that InstructGPT was trained by.

A row of a comparison data set is a prompt and any number of ranked answers to it:

    prompt        text, or messages
    completions   list of texts, or of lists of messages
    ranks         list of int: 1 is the best; equal ranks are a tie, which says nothing
    finished      list of bool: False if the answer was cut off at a limit of length; it gets no end token
    source        where it is from, for reports; training does not read it
"""

import functools
import logging
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from lab.errors import LabError, did_you_mean
from rlhf.checkpoints import PlainCheckpoints
from rlhf.data import ordered_pairs
from rlhf.randomness import switch_off_randomness
from rlhf.scoring import (
    RewardScorer,
    last_token_scores,
    pad_right,
    score_reading_of,
    sequence_classifier,
)
from rlhf.tokenization import TooLong, tokenize

Loss = Literal["pairwise", "ranking"]
OnTooLong = Literal["error", "drop", "truncate_prompt"]

_COLUMNS = ("prompt", "completions", "ranks", "finished")
_log = logging.getLogger(__name__)


def pair_weights(ranks: Tensor, group: Tensor) -> Tensor:
    """How much each pair of answers counts, (answers, answers): row the better, column the worse.

    The pairs of a prompt share one weight, however many they are, and so do the prompts; all sum to 1. Pairs
    of two prompts and ties weigh nothing, and prompts that have no other pairs do not count.

    Args:
        ranks: (answers,); the smaller is the better.
        group: (answers,) the prompt each is an answer to.
    """
    same = group[:, None] == group
    pairs = (same & (ranks[:, None] < ranks)).float()
    pairs_of_prompt = (same * pairs.sum(1)).sum(1, keepdim=True)
    weights = pairs / pairs_of_prompt.clamp_min(1)
    return weights / weights.sum().clamp_min(1)  # the sum is the number of prompts


def ranking_loss(rewards: Tensor, weights: Tensor) -> Tensor:
    """-1 / C(K, 2) times the sum of log sigmoid(r_w - r_l) over a prompt's pairs, averaged over prompts.

    Ouyang et al. 2022 (arXiv 2203.02155), section 3.5, eq. 1: all pairs of a prompt's K answers are one
    element of the batch. Split up among batches, each answer would be trained on K - 1 times an epoch, and
    the model would overfit; it would take K (K - 1) forward passes instead of K as well. With ties, C(K, 2)
    is the number of pairs that are none. With K = 2 this is the Bradley-Terry loss of pairs.

    Args:
        rewards: (answers,) of all prompts.
        weights: (answers, answers), the `pair_weights` of these answers.

    Returns:
        A scalar; 0 if there is no pair.
    """
    margins = rewards[:, None] - rewards
    return -(weights * F.logsigmoid(margins)).sum()


class RankingTrainer(PlainCheckpoints, RewardTrainer):
    """Trains a reward model on ranked answers; otherwise TRL's `RewardTrainer`.

    What it does differently, whatever the loss: end tokens only where answers are finished, scores read at
    the last token even if padding and end are one token (stock transformers opens such a model too, but
    reads it before the end token; give the tokenizer a pad_token of its own), metrics that do not make the
    host wait at every step, and evaluation metrics that are means over all of the data set's elements.

    Logged, in training and with the prefix eval_: loss; accuracy, the share of pairs in the right order;
    margin, the mean difference of their rewards, both weighted as in the loss; mean_reward, min_reward and
    max_reward of a batch. HF's callbacks, W&B's too, name them train/accuracy, eval/accuracy and so on.

    Args:
        model: a causal sequence classifier with one label, or its folder.
        args: of TRL. A batch counts prompts for `ranking` (with all of their answers), pairs for `pairwise`;
            `max_length` is tokens of prompt and answer.
        train_dataset: comparisons, see the module; `eval_dataset` likewise, or a dict of them.
        loss: "ranking", see `ranking_loss`; or "pairwise", the same with each pair as an element of its own,
            which is TRL's Bradley-Terry loss.
        on_too_long: what to do about an answer that is, with its prompt, longer than `max_length`: raise an
            "error", "drop" it, or "truncate_prompt" from the left.
        more: `RewardTrainer`'s other arguments.

    Raises:
        LabError: no such loss, no reward model, or data that cannot be trained on; it names the row.
    """

    args: RewardConfig
    model: Any
    train_dataset: Any

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        args: RewardConfig,
        train_dataset: Dataset,
        *,
        loss: Loss = "ranking",
        on_too_long: OnTooLong = "error",
        **more: Any,
    ) -> None:
        for key, value, known in (
            ("loss", loss, get_args(Loss)),
            ("on_too_long", on_too_long, get_args(OnTooLong)),
        ):
            if value not in known:
                raise LabError(
                    f"{key} = {value!r} is none of {', '.join(known)}.{did_you_mean(value, known)}"
                )
        self.loss = loss
        self.on_too_long = on_too_long
        collator = functools.partial(collate, multiple_of=int(args.pad_to_multiple_of or 1))
        super().__init__(model, args, data_collator=collator, train_dataset=train_dataset, **more)
        if args.disable_dropout:
            switch_off_randomness(self.model)
        score_reading_of(sequence_classifier(self.model))
        _let_forward_go_by_length(self.model)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RewardConfig,
        dataset_name: str,
    ) -> Dataset:
        """Tokenises comparisons to `answer_ids` and `ranks`, one row per element of a batch."""
        if not isinstance(dataset, Dataset):
            raise LabError(f"{dataset_name} data: comparisons must be a datasets.Dataset, not a stream.")
        if "answer_ids" in dataset.column_names:  # `evaluate` may be given what was prepared before
            return dataset
        if missing := sorted(set(_COLUMNS) - set(dataset.column_names)):
            raise LabError(
                f"{dataset_name} data: no column {missing[0]!r}; comparisons have {', '.join(_COLUMNS)}."
            )
        with args.main_process_first():  # the others find it in the cache
            prepared = dataset.map(
                _tokenize_rows,
                batched=True,
                with_indices=True,
                remove_columns=dataset.column_names,
                num_proc=args.dataset_num_proc,
                desc=f"Tokenizing {dataset_name} dataset",
                fn_kwargs={
                    "name": dataset_name,
                    "tokenizer": processing_class,
                    "max_length": args.max_length,
                    "on_too_long": self.on_too_long,
                    "pairwise": self.loss == "pairwise",
                },
            )
        if not len(prepared):
            raise LabError(f"{dataset_name} data: no prompt has two answers of different rank.")
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["answer_ids", "ranks"]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch from `collate`; see `ranking_loss`."""
        outputs = model(input_ids=inputs["input_ids"], lengths=inputs["lengths"])
        rewards = outputs.logits[:, 0].float()
        sizes = inputs["sizes"]
        weights = pair_weights(inputs["ranks"], torch.repeat_interleave(sizes, output_size=len(rewards)))
        loss = ranking_loss(rewards, weights)
        if self.args.center_rewards_coefficient is not None:  # arXiv 2312.09244, eq. 2, as in TRL
            sums = rewards[:, None] + rewards
            loss = loss + self.args.center_rewards_coefficient * (weights * sums**2).sum()
        self._note(rewards.detach(), weights, len(sizes))
        return (loss, outputs) if return_outputs else loss

    def _note(self, rewards: Tensor, weights: Tensor, n_elements: int) -> None:
        """Keeps a batch's metrics, on the device, until `log` averages them."""
        margins = rewards[:, None] - rewards
        metrics = {
            "accuracy": (weights * (margins > 0)).sum(),
            "margin": (weights * margins).sum(),
            "mean_reward": rewards.mean(),
            "min_reward": rewards.min(),
            "max_reward": rewards.max(),
        }
        of_processes: Any = self.accelerator.gather(torch.stack([*metrics.values()])[None])
        mode = "train" if self.model.training else "eval"
        for name, value in zip(metrics, of_processes.mean(0), strict=True):
            # Once per element, so that the smaller last batch of an evaluation does not count too much.
            self._metrics[mode][name] += [value] * n_elements

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the averages of the metrics since the last call."""
        for values in self._metrics["train" if self.model.training else "eval"].values():
            values[:] = torch.stack(values).tolist()
        super().log(logs, start_time)


def _tokenize_rows(
    rows: dict[str, list[Any]],
    indices: list[int],
    *,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    on_too_long: OnTooLong,
    pairwise: bool,
) -> dict[str, list[Any]]:
    """Rows of comparisons as elements of batches: ids of all answers to a prompt, or of two, and ranks."""
    elements: dict[str, list[Any]] = {"answer_ids": [], "ranks": []}
    dropped = 0
    for index, prompt, *answers in zip(indices, *(rows[column] for column in _COLUMNS), strict=True):
        where = f"{name} data, row {index}"
        if len(set(map(len, answers))) > 1:
            counts = ", ".join(f"{len(a)} {c}" for c, a in zip(_COLUMNS[1:], answers, strict=True))
            raise LabError(f"{where}: has {counts}; there must be as many of each.")
        ids: list[list[int]] = []
        ranks: list[int] = []
        for completion, rank, finished in zip(*answers, strict=True):
            try:
                truncate = on_too_long == "truncate_prompt"
                ids.append(tokenize(prompt, completion, finished, tokenizer, max_length, truncate))
                ranks.append(rank)
            except LabError as error:
                if not (isinstance(error, TooLong) and on_too_long == "drop"):
                    raise LabError(f"{where}: {error}") from error
                dropped += 1
        pairs = ordered_pairs(ranks)
        if pairwise:
            elements["answer_ids"] += [[ids[better], ids[worse]] for better, worse in pairs]
            elements["ranks"] += [[1, 2]] * len(pairs)
        elif pairs:
            elements["answer_ids"].append(ids)
            elements["ranks"].append(ranks)
    if dropped:
        _log.warning(
            "%s data, rows %d to %d: %d answers longer than max_length = %s tokens were dropped",
            *(name, indices[0], indices[-1], dropped, max_length),
        )
    return elements


def collate(elements: Sequence[Mapping[str, Any]], multiple_of: int = 1) -> dict[str, Any]:
    """A batch: each answer of each element is one row of `input_ids`, so it takes one forward pass.

    Returns:
        input_ids (answers, time), see `pad_right`; lengths, a list, of their tokens; ranks (answers,); sizes
        (elements,), the number of answers of each element.
    """
    answers = [ids for element in elements for ids in element["answer_ids"]]
    return {
        "input_ids": pad_right(answers, multiple_of),
        "lengths": [len(ids) for ids in answers],
        "ranks": torch.tensor([rank for element in elements for rank in element["ranks"]]),
        "sizes": torch.tensor([len(element["ranks"]) for element in elements]),
    }


def _let_forward_go_by_length(model: nn.Module) -> None:
    """Lets `model(input_ids=..., lengths=...)` compute `last_token_scores`.

    Being the model's own forward, it runs below the wrappers around it: DDP, autocast, PEFT.
    """

    def forward(self: Any, *args: Any, lengths: Sequence[int] | None = None, **kwargs: Any) -> Any:
        if lengths is None:
            return type(self).forward(self, *args, **kwargs)
        scores = last_token_scores(self, kwargs["input_ids"], lengths)
        return SequenceClassifierOutputWithPast(logits=scores)  # type: ignore[arg-type]

    classifier = sequence_classifier(model)
    classifier.forward = types.MethodType(forward, classifier)


def init_head(model: nn.Module, seed: int) -> None:
    """Draws the `score` layer of d inputs with standard deviation 1 / sqrt(d + 1).

    As arXiv 2403.17031, section 4.1, detail 11: rewards then start with a variance of about 1, whatever d.
    """
    weight = sequence_classifier(model).score.weight
    # On the CPU, so that a seed means the same numbers everywhere.
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight.copy_(values / math.sqrt(weight.shape[1] + 1))


def center(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Iterable[Any],
    batch_size: int = 32,
) -> float:
    """Makes demonstrations score 0 on average, as before RL in Ouyang et al. 2022 (section 3.5).

    The mean goes into the model's config, and from there into config.json, as `reward_shift`, which
    `RewardScorer` takes off. Stock transformers opens such a folder and ignores the key: its scores differ by
    that constant, which no comparison of answers notices. The weights have no place for it: `score` has no
    bias, and nothing that follows from an RMS norm is constant. (GPT-2's last layer norm has a bias that
    could take it; one way for all models is easier to know about.)

    Args:
        demonstrations: rows of `prompt` and `completion`, all of them finished answers.

    Returns:
        The shift: the mean output of the model.

    Raises:
        LabError: no demonstrations, or see `RewardScorer.score_texts`.
    """
    rows = list(demonstrations)
    if not rows:
        raise LabError("demonstrations: there are none to centre the reward model on.")
    scores = RewardScorer(model, tokenizer, shift=0.0, scale=1.0).score_texts(
        [row["prompt"] for row in rows],
        [row["completion"] for row in rows],
        [True] * len(rows),
        batch_size,
    )
    shift = scores.double().mean().item()
    sequence_classifier(model).config.reward_shift = shift
    return shift
