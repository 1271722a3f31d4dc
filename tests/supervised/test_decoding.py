"""Greedy and beam search: against all targets there are, for both kinds of translators."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from supervised.backbones.encoder_decoder import Transformer
from supervised.backbones.seq2seq import Seq2Seq
from supervised.decoding import beam_search, greedy, length_penalty

BOS, EOS, VOCAB, MAX_LENGTH = 0, 1, 4, 4
ENDS: dict[str, Any] = {"bos_id": BOS, "eos_id": EOS, "max_length": MAX_LENGTH}
SOURCE = torch.tensor([[2, 3, 2, 1], [3, 1, 0, 0], [3, 3, 2, 1]])
MASK = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])


def translator(kind: str, seed: int = 0) -> tuple[Any, torch.nn.Linear]:
    """A random model with strong opinions."""
    torch.manual_seed(seed)
    if kind == "transformer":
        model = Transformer(VOCAB, width=8, n_layer=1, n_head=2)
    else:
        model = Seq2Seq(VOCAB, width=8, input_feeding=kind == "fed")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    head = torch.nn.Linear(8, VOCAB)
    torch.nn.init.normal_(head.weight)
    torch.nn.init.constant_(head.bias[EOS], -(seed % 4))  # so that targets differ in length
    return model.eval(), head


def by_brute_force(model: Any, head: Any, row: int, alpha: float) -> list[int]:
    """The best of all targets that end within the limit, by one pass over each."""
    others = [token for token in range(VOCAB) if token != EOS]
    scored = []
    for length in range(1, MAX_LENGTH + 1):
        targets = torch.tensor([[*t, EOS] for t in itertools.product(others, repeat=length - 1)])
        log_probs = one_pass(model, head, row, targets)
        scored += zip((log_probs / length_penalty(length, alpha)).tolist(), targets.tolist(), strict=True)
    return max(scored)[1][:-1]


def one_pass(model: Any, head: Any, row: int, targets: Tensor) -> Tensor:
    """Log-probability of each whole target (n, time) of the source `row`."""
    source, mask = (tensor[row : row + 1].expand(len(targets), -1) for tensor in (SOURCE, MASK))
    inputs = torch.cat((torch.full((len(targets), 1), BOS), targets[:, :-1]), 1)
    log_probs = head(model(source, inputs, mask)).log_softmax(-1)
    return log_probs.gather(2, targets[..., None]).sum((1, 2))


@pytest.mark.parametrize("kind", ["lstm", "fed", "transformer"])
def test_a_wide_beam_finds_the_best_target_there_is(kind: str) -> None:
    lengths = set()
    for seed, alpha in itertools.product(range(10), (0.0, 0.6, 2.0)):
        model, head = translator(kind, seed)
        expected = [by_brute_force(model, head, row, alpha) for row in range(3)]
        assert beam_search(model, head, SOURCE, MASK, beam=128, alpha=alpha, **ENDS) == expected
        lengths |= {len(target) for target in expected}
    assert len(lengths) > 1, "targets of one length would not try the length penalty"


@pytest.mark.parametrize("kind", ["lstm", "fed", "transformer"])
def test_greedy_takes_the_likeliest_token_and_so_does_a_beam_of_one(kind: str) -> None:
    for seed in range(4):
        model, head = translator(kind, seed)
        targets = []
        for row in range(3):
            target: list[int] = []
            while len(target) < MAX_LENGTH:
                inputs = torch.tensor([[BOS, *target]])
                token = head(model(SOURCE[row, None], inputs, MASK[row, None]))[0, -1].argmax().item()
                if token == EOS:
                    break
                target.append(token)
            targets.append(target)
        assert greedy(model, head, SOURCE, MASK, **ENDS) == targets
        assert beam_search(model, head, SOURCE, MASK, beam=1, alpha=0.0, **ENDS) == targets


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_a_source_is_translated_alone_as_in_a_batch(kind: str) -> None:
    model, head = translator(kind, 1)
    batched = beam_search(model, head, SOURCE, MASK, beam=3, **ENDS)
    alone = [
        beam_search(model, head, SOURCE[row, None], MASK[row, None], beam=3, **ENDS)[0] for row in range(3)
    ]
    assert batched == alone


def test_what_never_ends_is_cut_and_a_wider_beam_finds_no_less() -> None:
    model, head = translator("transformer")
    with torch.no_grad():
        head.bias[EOS] = -torch.inf
    scores = []
    for beam in (1, 2, 3**MAX_LENGTH):
        targets = beam_search(model, head, SOURCE, MASK, beam=beam, **ENDS)
        assert [len(target) for target in targets] == [MAX_LENGTH] * 3
        scores.append([one_pass(model, head, row, torch.tensor([t])).item() for row, t in enumerate(targets)])
    best = [
        one_pass(model, head, row, torch.tensor(list(itertools.product((0, 2, 3), repeat=MAX_LENGTH))))
        .max()
        .item()
        for row in range(3)
    ]
    assert scores[-1] == pytest.approx(best)
    assert greedy(model, head, SOURCE, MASK, **ENDS) == beam_search(model, head, SOURCE, MASK, beam=1, **ENDS)


class Countdown:
    """Translates n tokens to n times token 2, and is nearly sure of it; counts its steps."""

    steps = 0

    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        assert source_mask is not None
        return source_mask.sum(1)

    def start(self, memory: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(memory), None

    def step(self, memory: Tensor, state: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        self.steps += 1
        answer = torch.where(state[0] == memory, EOS, 2)  # and would go on after its end
        return torch.nn.functional.one_hot(answer, VOCAB).float() * 10, (state[0] + 1, None)


def test_the_search_stops_when_nothing_better_can_come() -> None:
    targets = [[2] * 4, [2] * 2, [2] * 4]
    never_cut: dict[str, Any] = {"bos_id": BOS, "eos_id": EOS, "max_length": 50}
    model = Countdown()
    assert greedy(model, lambda features: features, SOURCE, MASK, **never_cut) == targets
    assert model.steps == 5
    model = Countdown()
    assert beam_search(model, lambda features: features, SOURCE, MASK, beam=3, **never_cut) == targets
    assert model.steps == 5


def test_length_penalty_is_gnmts() -> None:
    assert length_penalty(1, 0.6) == 1
    assert length_penalty(7, 0.6) == pytest.approx(2**0.6)
    assert length_penalty(7, 0.0) == 1


@pytest.mark.parametrize("options", [{"beam": 0}, {"alpha": -0.1}])
def test_impossible_searches_are_refused(options: dict[str, Any]) -> None:
    model, head = translator("lstm")
    with pytest.raises(ValueError, match="must be at least 1 and alpha"):
        beam_search(model, head, SOURCE, MASK, **options, **ENDS)
