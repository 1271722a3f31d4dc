"""PPO on TRL: its arithmetic against hand-computed values, and every trap of the road there."""

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from lab.errors import LabError
from rlhf import models, reviews
from rlhf.logprobs import add_logprob_head
from rlhf.ppo import (
    Critic,
    PPOConfig,
    PPOTrainer,
    PromptStream,
    adapt_kl_coef,
    generalized_advantages,
    masked_mean,
    token_rewards,
    whiten,
)
from rlhf.sequences import side_by_side
from tests.host_reads import HostReads

pytestmark = pytest.mark.filterwarnings(
    # TRL 1.16 still sets what transformers 5.23 renamed.
    "ignore:`gradient_checkpointing:FutureWarning",
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
)


class CountingReward:
    """Rewards the share of the first so many tokens in an answer, and keeps what it was asked."""

    __name__ = "counting"

    def __init__(self, below: int = 30) -> None:
        self.below = below
        self.asked: list[tuple[list[int], list[int]]] = []

    def score_ids(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
        self.asked += [(list(p), list(a)) for p, a in zip(prompts, answers, strict=True)]
        return torch.tensor([sum(t < self.below for t in a) / len(a) for a in answers])

    def __call__(self, **_: Any) -> list[float]:
        raise AssertionError("must be asked by token ids")


@pytest.fixture
def make(tmp_path: Path, save_tiny: Callable[..., Path], tokenizer: Any) -> Callable[..., PPOTrainer]:
    """A trainer on a tiny model; keyword arguments change the config or, by their names, the models."""

    def make(
        family: str = "llama",
        policy: Any = None,
        critic: Any = None,
        reward: Any = None,
        n_prompts: int = 7,
        processing_class: Any = None,
        ptx_dataset: Any = None,
        **changes: Any,
    ) -> PPOTrainer:
        folder = save_tiny(family)
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_mini_batches": 1,
            "num_rollouts": 2,
            "num_ppo_epochs": 2,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "top_k": 0,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "seed": 3,
        }
        if policy is None:
            policy, _ = models.open_policy(folder)
        trainer = PPOTrainer(
            model=policy,
            reward_funcs=reward or CountingReward(),
            args=PPOConfig(**(settings | changes)),
            train_dataset=Dataset.from_list([{"prompt": p} for p in reviews.prompts()[:n_prompts]]),
            processing_class=processing_class or tokenizer,
            critic=critic or models.open_reward(save_tiny(family, reward=True))[0],
            ptx_dataset=ptx_dataset,
        )
        trainer.remove_callback(transformers_printer())
        return trainer

    return make


def transformers_printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    policy = {f"policy.{k}": v.clone() for k, v in trainer.model.state_dict().items()}
    return policy | {f"critic.{k}": v.clone() for k, v in trainer.critic_model.state_dict().items()}


def history(trainer: PPOTrainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


# ---- arithmetic ----


def test_generalized_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0, 9.0]])
    values = torch.tensor([[0.5, -1.0, 3.0, 7.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    gamma, lam = 0.9, 0.8
    d2 = 4.0 - 3.0
    d1 = 2.0 + gamma * 3.0 + 1.0
    d0 = 1.0 + gamma * -1.0 - 0.5
    a1 = d1 + gamma * lam * d2
    a0 = d0 + gamma * lam * a1
    got = generalized_advantages(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(got, torch.tensor([[a0, a1, d2, 0.0]]))


def test_with_lambda_and_gamma_1_advantages_are_returns_less_values() -> None:
    rewards, values = torch.randn(3, 5), torch.randn(3, 5)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] + [0] * 4])
    expected = ((rewards * mask).flip(1).cumsum(1).flip(1) - values) * mask
    torch.testing.assert_close(generalized_advantages(rewards, values, mask, 1.0, 1.0), expected)


def test_the_score_comes_with_the_last_token_and_the_kl_with_each() -> None:
    kl = torch.tensor([[0.5, -0.25, 0.0], [1.0, 2.0, 3.0]])
    got = token_rewards(torch.tensor([10.0, -1.0]), kl, torch.tensor([2, 3]), kl_coef=0.1)
    expected = torch.tensor([[-0.05, 10.025, 0.0], [-0.1, -0.2, -1.3]])
    torch.testing.assert_close(got, expected)


def test_whitening_sees_only_real_tokens() -> None:
    x = torch.tensor([[1.0, 3.0, 100.0], [5.0, -50.0, 100.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    real = torch.tensor([1.0, 3.0, 5.0])
    expected = (real - 3) / real.var(unbiased=False).sqrt()
    got = whiten(x, mask)
    torch.testing.assert_close(got[mask.bool()], expected)
    assert not got[~mask.bool()].any()
    kept = whiten(x, mask, shift=False)[mask.bool()]
    torch.testing.assert_close(kept, expected + 3)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.1), (12.0, 0.1 * (1 + 0.2 * 0.5)), (0.0, 0.1 * (1 - 0.2 * 0.5)), (6.6, 0.105)],
)
def test_the_kl_controller_by_hand(kl: float, expected: float) -> None:
    got = adapt_kl_coef(0.1, kl, target=6.0, episodes=500, horizon=1000)
    assert got == pytest.approx(expected)


def test_prompt_stream_has_no_epochs_and_repeats_each_batch() -> None:
    stream = PromptStream(5, batch_size=3, repeats=2, batches=5, seed=1)
    indices = list(stream)
    assert len(indices) == len(stream) == 30
    batches = [indices[i : i + 3] for i in range(0, 30, 3)]
    assert batches[0::2] == batches[1::2]
    drawn = [index for batch in batches[0::2] for index in batch]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == [0, 1, 2, 3, 4]
    assert drawn[:5] != drawn[5:10], "every pass has an order of its own"
    assert list(stream) == indices


# ---- log-probabilities, values, positions ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen2", "labgpt"])
def test_log_probabilities_are_those_of_each_answer_alone(
    make: Callable[..., PPOTrainer], family: str
) -> None:
    """Whatever stands beside it in the batch, and for learned positions too."""
    trainer = make(family)
    prompts, answers = [[5, 6, 7, 8, 9], [10], [11, 12]], [[13, 14], [15, 16, 17, 1], [18]]
    packed = side_by_side(prompts, answers, 0, torch.device("cpu"))
    with torch.no_grad():
        logps, entropies = trainer._policy(trainer.model, packed)
        values = trainer._values(packed)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = torch.tensor([prompt + answer])
            logits = trainer.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)
            n = len(answer)
            torch.testing.assert_close(
                logps[i, :n], expected[torch.arange(n), torch.tensor(answer)], rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                entropies[i, :n], -(expected.exp() * expected).sum(-1), rtol=1e-4, atol=1e-5
            )
            critic: Any = trainer.critic_model
            hidden = critic.base_model(input_ids=ids).last_hidden_state
            alone = critic.score(hidden)[0, len(prompt) - 1 : -1, 0]
            torch.testing.assert_close(values[i, :n], alone, rtol=1e-4, atol=1e-5)


def test_log_probabilities_in_blocks_are_the_same_with_their_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rlhf import logprobs

    head = torch.nn.Linear(8, 50, bias=False)
    hidden, tokens = torch.randn(21, 8, requires_grad=True), torch.randint(50, (21,))
    results = []
    for at_once in (2**24, 50 * 4):
        monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", at_once)
        logps, _ = logprobs.token_logprobs(hidden, head, tokens, 0.7, 50)
        grads = torch.autograd.grad(logps.square().sum(), (hidden, head.weight))
        results.append((logps, *grads))
    for whole, in_blocks in zip(*results, strict=True):
        torch.testing.assert_close(whole, in_blocks)


# ---- training ----


def test_it_learns_what_it_is_rewarded_for(make: Callable[..., PPOTrainer]) -> None:
    trainer = make(
        num_rollouts=40,
        kl_coef=0.0,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        max_grad_norm=1.0,
    )
    trainer.train()
    scores = history(trainer, "objective/scores")
    assert sum(scores[:3]) / 3 < 0.4
    assert sum(scores[-3:]) / 3 > 0.8


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "labgpt"])
def test_the_first_update_starts_at_ratio_1_and_kl_0(
    make: Callable[..., PPOTrainer], family: str, epochs: int
) -> None:
    """The reference is the policy itself, and old log-probabilities are there even if steps align."""
    trainer = make(family, num_ppo_epochs=epochs, num_rollouts=1)
    trainer.train()
    assert history(trainer, "val/ratio")[0] == pytest.approx(1, abs=1e-4)
    assert history(trainer, "objective/kl")[0] == pytest.approx(0, abs=1e-4)
    assert history(trainer, "policy/approxkl_avg")[0] == pytest.approx(0, abs=1e-6)


def test_the_critics_gradients_do_not_accumulate(make: Callable[..., PPOTrainer]) -> None:
    """With learning rates of 0 both epochs see the same: so must the norms of their gradients."""
    trainer = make(num_rollouts=1, learning_rate=0.0, critic_learning_rate=0.0, max_grad_norm=1e9)
    trainer.train()
    first, second = history(trainer, "val/critic_grad_norm")
    assert first > 0
    assert second == pytest.approx(first, rel=1e-4)


def test_micro_batches_change_nothing(make: Callable[..., PPOTrainer]) -> None:
    """A mini-batch's loss is the mean over its tokens, however it is cut."""
    norms = []
    for micro, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = make(
            num_rollouts=1,
            learning_rate=0.0,
            max_grad_norm=1e9,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        norms.append((history(trainer, "val/critic_grad_norm")[0], history(trainer, "grad_norm")[0]))
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=1e-3)


def test_gradients_of_policy_and_critic_are_clipped(make: Callable[..., PPOTrainer]) -> None:
    trainer = make(num_rollouts=1, max_grad_norm=1e-3)
    seen: list[tuple[float, float]] = []

    class Watch(trainer_callback()):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            norm = [
                torch.stack([p.grad.norm() for p in m.parameters() if p.grad is not None]).norm().item()
                for m in (trainer.model, trainer.critic_model)
            ]
            seen.append((norm[0], norm[1]))

    trainer.add_callback(Watch())
    trainer.train()
    assert len(seen) == 2
    assert all(norm <= 1e-3 * 1.01 for pair in seen for norm in pair)


def trainer_callback() -> Any:
    from transformers import TrainerCallback

    return TrainerCallback


def test_rewards_see_the_very_tokens_end_included(make: Callable[..., PPOTrainer], tokenizer: Any) -> None:
    reward = CountingReward()
    trainer = make(reward=reward, num_rollouts=1, max_completion_length=24)
    trainer.train()
    prompts = {tuple(tokenizer(p).input_ids) for p in reviews.prompts()[:7]}
    assert all(tuple(prompt) in prompts for prompt, _ in reward.asked)
    ends = [
        answer.index(tokenizer.eos_token_id) for _, answer in reward.asked if tokenizer.eos_token_id in answer
    ]
    whole = [len(a) - 1 for _, a in reward.asked if tokenizer.eos_token_id in a]
    assert ends
    assert ends == whole, "an answer ends with its first end token"
    assert all(len(a) == 24 for _, a in reward.asked if tokenizer.eos_token_id not in a)


def test_callable_rewards_as_in_grpo_work_beside(make: Callable[..., PPOTrainer]) -> None:
    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text.split())) for text in completions]

    trainer = make(reward=[length, CountingReward()], num_rollouts=1)
    trainer.train()
    assert history(trainer, "objective/scores")[0] > 1


def test_end_tokens_are_trained_on_where_padding_is_the_end_token(
    make: Callable[..., PPOTrainer], tokenizer: Any
) -> None:
    import copy

    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    trainer = make(processing_class=same, num_rollouts=1, max_completion_length=24)
    trainer.train()
    reward: Any = trainer.reward_funcs[0]
    packed = trainer._buffered_inputs["packed"]
    assert packed.mask.sum() == sum(len(answer) for _, answer in reward.asked)
    ended = [answer[-1] == same.eos_token_id for _, answer in reward.asked]
    assert any(ended)
    last = packed.answers[packed.rows.counts.cumsum(0) - 1]
    assert (last == same.eos_token_id).tolist() == ended


def test_a_reward_of_token_ids_needs_no_more_than_score_ids(make: Callable[..., PPOTrainer]) -> None:
    class Short:
        def score_ids(
            self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
        ) -> list[float]:
            return [-float(len(answer)) for answer in answers]

    trainer = make(reward=Short(), num_rollouts=1)
    trainer.train()
    assert trainer.reward_func_names == ["Short"]
    answers = trainer._buffered_inputs["packed"].answer_lengths
    assert sorted(trainer.rollout["scores"]) == sorted(-float(length) for length in answers)


@pytest.mark.parametrize(("penalty", "score"), [(None, None), (2.0, None), (None, -1.0)])
def test_answers_that_do_not_end_are_penalised(
    make: Callable[..., PPOTrainer], penalty: float | None, score: float | None
) -> None:
    trainer = make(
        num_rollouts=1,
        missing_eos_penalty=penalty,
        missing_eos_score=score,
        max_completion_length=2,
        kl_coef=0.0,
    )
    trainer.train()
    raw = torch.tensor(trainer.rollout["scores"])
    ended = torch.tensor(trainer.rollout["ended"])
    expected = raw.clone()
    if penalty is not None:
        expected = torch.where(ended, raw, raw - penalty)
    if score is not None:
        expected = torch.where(ended, raw, torch.tensor(score))
    assert not ended.all()
    assert history(trainer, "objective/rlhf_reward")[0] == pytest.approx(expected.mean().item(), abs=1e-5)


def test_ptx_trains_on_completions_of_the_pretraining_mix(make: Callable[..., PPOTrainer]) -> None:
    """With nothing else to learn, the ptx completion gets likelier; its prompt does not count."""
    example = {"input_ids": [5, 6, 7, 8, 9, 1], "completion_mask": [0, 0, 0, 1, 1, 1]}

    def constant(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    trainer = make(
        reward=constant,
        num_rollouts=10,
        ptx_coef=10.0,
        ptx_dataset=[example],
        whiten_advantages=False,
        vf_coef=0.0,
        kl_coef=0.0,
    )
    packed = side_by_side([[5, 6, 7]], [[8, 9, 1]], 0, torch.device("cpu"))
    before = trainer._policy(trainer.model, packed)[0].sum()
    trainer.train()
    losses = history(trainer, "loss/ptx_avg")
    assert losses[0] == pytest.approx(-before.item() / 3, rel=1e-4)
    assert losses[-1] < losses[0] / 2


def test_ptx_without_data_is_refused(make: Callable[..., PPOTrainer]) -> None:
    with pytest.raises(LabError, match="ptx_coef needs ptx_dataset"):
        make(ptx_coef=1.0)


def test_a_policy_that_differs_from_itself_is_stopped(make: Callable[..., PPOTrainer]) -> None:
    trainer = make(num_rollouts=2)
    sampled = trainer._generate_and_score_completions

    def shifted(inputs: Any) -> dict[str, Any]:
        output = sampled(inputs)
        output["sampled_logps"] = output["sampled_logps"] - 0.002
        return output

    trainer._generate_and_score_completions = shifted  # type: ignore[method-assign]
    with pytest.raises(
        LabError,
        match=r"LlamaForCausalLM \(llama\) in training differs .* 0.002 nats.* 0.001 are allowed in fp32",
    ):
        trainer.train()


def test_numbers_that_mean_nothing_for_single_answers_are_left_out(make: Callable[..., PPOTrainer]) -> None:
    trainer = make(num_rollouts=1)
    trainer.train()
    keys = {key for row in trainer.state.log_history for key in row}
    assert "frac_reward_zero_std" not in keys
    assert {
        "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
        "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg",
        "val/ratio",
    } <= keys  # fmt: skip


# ---- resume, saving ----


@pytest.mark.parametrize("stop_at", [2, 4])
def test_resume_is_exact_across_passes_over_the_prompts(
    make: Callable[..., PPOTrainer], tmp_path: Path, stop_at: int
) -> None:
    """7 prompts and rollouts of 8: every rollout crosses from one pass to the next."""
    changes = {
        "num_rollouts": 4,
        "kl_target": 1.0,
        "kl_horizon": 20,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make(output_dir=str(tmp_path / "whole"), **changes)
    whole.train()
    parts = make(output_dir=str(tmp_path / "parts"), **changes)
    parts.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop_at}"))
    assert whole.kl_coef == parts.kl_coef != whole.args.kl_coef
    for (name, a), b in zip(weights(whole).items(), weights(parts).values(), strict=True):
        assert torch.equal(a, b), name
    assert history(whole, "objective/scores")[-1] == history(parts, "objective/scores")[-1]


def test_the_critic_stays_out_of_the_policys_folder(make: Callable[..., PPOTrainer], tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    trainer = make(num_rollouts=1, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-2"
    names = load_file(folder / "model.safetensors").keys()
    assert not any("critic" in name or "score" in name for name in names)
    assert json.loads((folder / "ppo_state.json").read_text())["kl_coef"] == 0.05
    stock = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(stock(ids).logits, trainer.model.eval()(ids).logits)


# ---- TRL ----


def test_what_we_override_is_still_there_in_trl() -> None:
    """An upgrade of TRL that renames or changes any of these must fail here, loudly."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    expected = {
        "_generate": ["self", "prompts"],
        "_generate_single_turn": [
            "self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images",
        ],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_prepare_inputs": ["self", "generation_batch"],
        "_compute_loss": ["self", "model", "inputs"],
        "_get_train_sampler": ["self", "dataset"],
        "create_optimizer": ["self", "model"],
        "training_step": ["self", "model", "inputs", "num_items_in_batch"],
        "_clip_grad_norm": ["self", "model"],
        "_save_checkpoint": ["self", "model", "trial"],
        "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
        "log": ["self", "logs", "start_time"],
    }  # fmt: skip
    for name, parameters in expected.items():
        inherited = inspect.unwrap(getattr(GRPOTrainer, name))
        assert list(inspect.signature(inherited).parameters) == parameters, name


def test_masked_mean_of_nothing_is_0() -> None:
    assert masked_mean(torch.ones(2), torch.zeros(2)) == 0


# ---- ready for a GPU ----


def test_an_update_never_waits_for_the_device(make: Callable[..., PPOTrainer]) -> None:
    trainer = make("labgpt")  # transformers' own Llama reads a number in every forward without a mask
    trainer.train()
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([{"prompt": p} for p in reviews.prompts()[:8]])
    batch = trainer._micro_batch(rollout, [0, 1, 2, 3], 20.0)
    with HostReads() as reads:
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
    assert not reads.seen
    with HostReads() as reads:  # the detector detects
        loss.item()
    assert reads.seen


def test_rollout_and_losses_run_on_the_meta_device(save_tiny: Callable[..., Path]) -> None:
    """A tensor left on the CPU, or a number read back, would be an error there."""
    policy = models.open_policy(save_tiny("labgpt"))[0].to("meta")
    critic = Critic(models.open_reward(save_tiny("labgpt", reward=True))[0].to("meta"))
    add_logprob_head(policy)
    packed = side_by_side([[5, 6], [7]], [[8], [9, 10, 1]], 0, torch.device("meta"))
    logps, entropies = policy(logprobs_of=packed)
    values = critic(packed)
    scores = torch.zeros(2, device="meta")
    rewards = token_rewards(scores, logps.detach(), packed.rows.counts, 0.1)
    advantages = whiten(generalized_advantages(rewards, values, packed.mask, 1.0, 0.95), packed.mask)
    loss = masked_mean(advantages * logps + values.square() + entropies, packed.mask)
    loss.backward()
    assert loss.device.type == "meta"
    assert all(p.grad is not None for p in (*policy.parameters(), *critic.model.score.parameters()))
