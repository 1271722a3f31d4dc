"""Policy, reference, reward model and critic over one base: each computes what a model of its own would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from lab import config
from lab.errors import LabError
from rlhf import models, reviews
from rlhf.config import ModelConfig, RLHFRun
from rlhf.policy_optimization import RewardOfIds, check_same_scores, in_reward_units
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ranking import init_head
from rlhf.roles import AdapterClassifier, active_adapter, own_parameters
from rlhf.scoring import RewardScorer
from rlhf.sequences import side_by_side
from rlhf.sft import lora

pytestmark = pytest.mark.filterwarnings(
    # TRL 1.16 and PEFT 0.21 still use what transformers 5.23 renamed.
    "ignore:`gradient_checkpointing:FutureWarning",
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
)

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
ANSWERS = [[12, 13, 1], [14], [15, 16]]
FAMILIES = ["llama", "gpt2", "labgpt"]
LORA = ModelConfig(lora_rank=4, lora_alpha=8)


def shake(model: Any, mark: str, seed: int) -> None:
    """Stands in for training: an adapter begins as nothing, and nothing could not be told from no adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if mark in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


@pytest.fixture(scope="module")
def reward_folder(
    save_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """What stage 2 leaves with LoRA: the whole reward model, and the adapter it was merged from."""
    from peft import get_peft_model

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            model, tokenizer = models.open_reward(save_tiny(family))
            init_head(model, seed=7)
            adapted: Any = get_peft_model(model, lora(LORA, "SEQ_CLS", model))
            shake(adapted, "lora_", seed=8)
            adapted.get_base_model().config.reward_shift = 0.25
            adapted.get_base_model().config.reward_scale = 1.5
            made[family] = tmp_path_factory.mktemp(f"{family}_reward_stage")
            models.save(adapted, tokenizer, made[family])
        return made[family]

    return make


@pytest.fixture
def roles(
    save_tiny: Callable[..., Path], reward_folder: Callable[[str], Path]
) -> Callable[[str], tuple[Any, AdapterClassifier, AdapterClassifier]]:
    """Policy (adapter switched on and trained), reward model and critic over one base."""

    def make(family: str) -> tuple[Any, AdapterClassifier, AdapterClassifier]:
        from peft import get_peft_model

        policy, _ = models.open_policy(save_tiny(family))
        policy = get_peft_model(policy, lora(LORA, "CAUSAL_LM", policy))
        shake(policy, "lora_", seed=9)
        judge, critic = (
            AdapterClassifier(policy, name, reward_folder(family)) for name in ("reward", "critic")
        )
        judge.set_trainable(False)
        critic.set_trainable(True)
        return policy, judge, critic

    return make


def scores(classifier: Any, tokenizer: Any) -> Tensor:
    return RewardScorer(classifier, tokenizer).score_ids(PROMPTS, ANSWERS)


def log_probabilities(model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([p + a])).logits.log_softmax(-1)
            for p, a in zip(PROMPTS, ANSWERS, strict=True)
        ]


# ---- every role is what a model of its own would be ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapters_scores_are_the_whole_reward_models(
    roles: Callable[..., Any], reward_folder: Callable[[str], Path], tokenizer: Any, family: str
) -> None:
    _, judge, critic = roles(family)
    whole = models.open_reward(reward_folder(family))[0]
    expected = scores(whole, tokenizer)
    assert expected.std() > 0.01
    torch.testing.assert_close(scores(judge, tokenizer), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores(critic, tokenizer), expected, rtol=1e-5, atol=1e-5)


def test_a_reward_model_merged_into_bf16_is_the_adapter_but_for_rounding(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Where all is computed in fp32, too; else PPO is refused after the stages before have trained."""
    from peft import get_peft_model

    base, left = tmp_path / "base", tmp_path / "reward"
    model, tokenizer = models.open_policy(save_tiny("llama"))
    model.saved_format = torch.bfloat16
    models.save(model, tokenizer, base)
    reward, _ = models.open_reward(base)
    init_head(reward, seed=7)
    adapted: Any = get_peft_model(reward, lora(LORA, "SEQ_CLS", reward))
    shake(adapted, "lora_", seed=8)
    models.save(adapted, tokenizer, left)
    policy: Any = get_peft_model(models.open_policy(base)[0], lora(LORA, "CAUSAL_LM", reward))
    judge = RewardScorer(AdapterClassifier(policy, "reward", left), tokenizer)
    whole = RewardScorer(models.open_reward(left)[0], tokenizer)
    assert (judge.score_ids(PROMPTS, ANSWERS) - whole.score_ids(PROMPTS, ANSWERS)).abs().max() > 1e-4
    check_same_scores(whole, judge, left)
    shake(policy, "q_proj.base_layer", seed=1)
    with pytest.raises(LabError, match="scores otherwise than by itself"):
        check_same_scores(whole, judge, left)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_adapters_the_policy_is_the_sft_policy(
    roles: Callable[..., Any], save_tiny: Callable[..., Path], family: str
) -> None:
    policy, _, _ = roles(family)
    expected = log_probabilities(models.open_policy(save_tiny(family))[0].eval())
    with policy.disable_adapter():
        reference = log_probabilities(policy.eval())
    for got, wanted in zip(reference, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for own, wanted in zip(log_probabilities(policy), expected, strict=True):
        assert (own - wanted).abs().max() > 1e-3, "the policy's adapter is on again, and is something"


def test_a_critic_is_scaled_to_the_scores_it_predicts(roles: Callable[..., Any], tokenizer: Any) -> None:
    """PPO sees scores times reward_scale; the constant shift is learned at once."""
    _, judge, critic = roles("llama")
    in_reward_units(critic)
    raw = RewardScorer(critic, tokenizer, shift=0.0, scale=1.0).score_ids(PROMPTS, ANSWERS)
    seen = scores(judge, tokenizer)
    torch.testing.assert_close(raw - raw[0], seen - seen[0], rtol=1e-5, atol=1e-5)


# ---- no role moves another ----


@pytest.mark.parametrize("moved", ["default", "critic", "reward"])
def test_training_a_role_moves_no_other(roles: Callable[..., Any], tokenizer: Any, moved: str) -> None:
    policy, judge, critic = roles("llama")
    policy.eval()

    def seen() -> dict[str, Tensor]:
        with policy.disable_adapter():
            reference = torch.cat(log_probabilities(policy), 1)
        return {
            "default": torch.cat(log_probabilities(policy), 1),
            "reward": scores(judge, tokenizer),
            "critic": scores(critic, tokenizer),
            "reference": reference,
        }

    before = seen()
    shake(policy, f".{moved}.", seed=1)
    after = seen()
    for role, value in before.items():
        assert torch.equal(after[role], value) == (role != moved), role


def test_gradients_reach_the_adapter_that_computed_and_its_head_alone(roles: Callable[..., Any]) -> None:
    policy, _, critic = roles("llama")
    ids = torch.tensor([[5, 6, 7]])
    critic.score(critic.base_model(input_ids=ids).last_hidden_state).square().sum().backward()
    touched = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched
    assert all(".critic." in name for name in touched)
    assert critic.score.weight.grad is not None
    policy.zero_grad()
    policy(input_ids=ids).logits.square().sum().backward()
    touched = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched
    assert all(".default." in name for name in touched)


def test_what_is_trained_is_the_policys_adapter_and_the_critic(roles: Callable[..., Any]) -> None:
    policy, judge, critic = roles("llama")
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {"default", "critic"}
    assert critic.score.weight.requires_grad
    assert not judge.score.weight.requires_grad


def test_the_switch_is_put_back_whatever_happens_within(roles: Callable[..., Any]) -> None:
    policy, judge, _ = roles("llama")
    policy.eval()
    before = log_probabilities(policy)
    with pytest.raises(RuntimeError, match="within"), active_adapter(policy, "reward"):
        raise RuntimeError("within")
    assert all(torch.equal(a, b) for a, b in zip(before, log_probabilities(policy), strict=True))
    with policy.disable_adapter():
        off = log_probabilities(policy)
        judge.base_model(input_ids=torch.tensor([[5, 6]]))
        assert all(torch.equal(a, b) for a, b in zip(off, log_probabilities(policy), strict=True))


# ---- one base in memory ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_the_base_are_there_once(
    roles: Callable[..., Any], save_tiny: Callable[..., Path], family: str
) -> None:
    policy, judge, critic = roles(family)
    base = sum(p.numel() for p in models.open_policy(save_tiny(family))[0].parameters())
    held = {
        p.untyped_storage().data_ptr(): p.numel()
        for model in (policy, judge, critic)
        for p in (*model.parameters(), *own_parameters(model).values())
    }
    adapters = {
        p.untyped_storage().data_ptr(): p.numel() for n, p in policy.named_parameters() if "lora_" in n
    }
    heads = judge.score.weight.numel() + critic.score.weight.numel()
    assert sum(held.values()) == base + sum(adapters.values()) + heads
    assert list(judge.state_dict()) == ["score.weight"], "what is shared is no part of a role's state"


def test_a_role_owns_its_adapter_and_head(roles: Callable[..., Any]) -> None:
    policy, judge, critic = roles("llama")
    mine = own_parameters(critic)
    assert {name for name in mine if name != "score.weight"} == {
        name for name, _ in policy.named_parameters() if ".critic." in name
    }
    assert mine["score.weight"] is critic.score.weight
    theirs = {p.data_ptr() for p in own_parameters(judge).values()}
    assert not theirs & {p.data_ptr() for p in mine.values()}


# ---- in PPO ----


@pytest.fixture
def ppo(
    tmp_path: Path, save_tiny: Callable[..., Path], reward_folder: Callable[[str], Path], tokenizer: Any
) -> Callable[..., PPOTrainer]:
    """PPO on roles, put together as the stage does it."""

    def make(**changes: Any) -> PPOTrainer:
        reward_of_ids: Any = RewardOfIds(
            RewardScorer(models.open_reward(reward_folder("llama"))[0], tokenizer), 4
        )

        def shared(owner: Any) -> Any:
            judge = AdapterClassifier(owner, "reward", reward_folder("llama"))
            judge.set_trainable(False)
            reward_of_ids.scorer = RewardScorer(judge, tokenizer)
            critic = AdapterClassifier(owner, "critic", reward_folder("llama"))
            critic.set_trainable(True)
            return critic

        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1, "num_rollouts": 2, "num_ppo_epochs": 2,
            "max_completion_length": 6, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
            "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
            "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 3,
        }  # fmt: skip
        model, _ = models.open_policy(save_tiny("llama"))
        trainer = PPOTrainer(
            model=model,
            reward_funcs=reward_of_ids,
            args=PPOConfig(**(settings | changes)),
            train_dataset=Dataset.from_list([{"prompt": p} for p in reviews.prompts()[:5]]),
            processing_class=tokenizer,
            peft_config=lora(LORA, "CAUSAL_LM", model),
            critic=shared,
        )
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


def parts(trainer: PPOTrainer) -> dict[str, Tensor]:
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return weights | {"head": trainer.critic_model.score.weight.detach().clone()}  # type: ignore[union-attr]


def test_ppo_trains_policy_and_critic_and_leaves_reward_model_and_base(
    ppo: Callable[..., PPOTrainer],
) -> None:
    # reveals: PEFT's switch to the reference and back freezes the critic's adapter; its head alone moves.
    trainer = ppo()
    before = parts(trainer)
    trainer.train()
    moved = {name for name, value in parts(trainer).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".default." in name or ".critic." in name} | {"head"}


@pytest.mark.parametrize(
    ("rate", "critic_rate", "moving"), [(1e-2, 0.0, ".default."), (0.0, 1e-2, ".critic.")]
)
def test_policy_and_critic_have_a_learning_rate_each(
    ppo: Callable[..., PPOTrainer], rate: float, critic_rate: float, moving: str
) -> None:
    # reveals: as above.
    trainer = ppo(learning_rate=rate, critic_learning_rate=critic_rate)
    before = parts(trainer)
    trainer.train()
    moved = {name for name, value in parts(trainer).items() if not torch.equal(value, before[name])}
    assert moved == {n for n in before if moving in n} | ({"head"} if moving == ".critic." else set())


def test_activations_are_not_computed_again_where_the_critic_is_an_adapter(
    ppo: Callable[..., PPOTrainer],
) -> None:
    # They would be with the policy's adapter on, and the critic's gradients those of something else.
    with pytest.raises(LabError, match="set gradient_checkpointing=False"):
        ppo(gradient_checkpointing=True)


def test_ppos_reference_is_the_sft_policy(
    ppo: Callable[..., PPOTrainer], save_tiny: Callable[..., Path], tokenizer: Any
) -> None:
    trainer = ppo()
    trainer.train()
    trainer.model.eval()
    packed = side_by_side(PROMPTS, ANSWERS, tokenizer.pad_token_id, torch.device("cpu"))
    with torch.no_grad():
        reference, _ = trainer._reference(packed)
        policy, _ = trainer._policy(trainer.model, packed)
    sft = log_probabilities(models.open_policy(save_tiny("llama"))[0].eval())
    for row, (whole, prompt, answer) in enumerate(zip(sft, PROMPTS, ANSWERS, strict=True)):
        n = len(answer)
        wanted = whole[0, len(prompt) - 1 : -1][torch.arange(n), torch.tensor(answer)]
        torch.testing.assert_close(reference[row, :n], wanted, rtol=1e-5, atol=1e-5)
        assert (policy[row, :n] - wanted).abs().max() > 1e-3


def test_the_merged_policy_is_the_trained_one(
    ppo: Callable[..., PPOTrainer], tmp_path: Path, tokenizer: Any
) -> None:
    """Of three adapters only the policy's goes into what the stage leaves."""
    trainer = ppo()
    trainer.train()
    expected = log_probabilities(trainer.model.eval())
    models.save(trainer.model, tokenizer, tmp_path / "model")
    opened = models.open_policy(tmp_path / "model")[0].eval()
    for got, wanted in zip(log_probabilities(opened), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "model" / "adapter" / "adapter_config.json").exists()
    assert not any("critic" in str(path) for path in (tmp_path / "model").rglob("*"))


def test_resume_with_roles_is_exact(ppo: Callable[..., PPOTrainer], tmp_path: Path) -> None:
    # reveals: loading the adapters freezes the critic's, so the optimiser of the resumed run lacks it.
    changes = {"num_rollouts": 3, "save_strategy": "steps", "save_steps": 2}
    whole = ppo(output_dir=str(tmp_path / "whole"), **changes)
    whole.train()
    resumed = ppo(output_dir=str(tmp_path / "resumed"), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for (name, wanted), got in zip(parts(whole).items(), parts(resumed).values(), strict=True):
        assert torch.equal(got, wanted), name


# ---- refused ----


def test_recomputed_activations_would_be_another_roles() -> None:
    """The backward pass computes the critic's activations again when the policy's adapter is on by then."""
    values = {"model": {"lora_rank": 4}, "ppo": {"epochs": 2, "gradient_checkpointing": True}}
    with pytest.raises(LabError, match=r"ppo\.gradient_checkpointing"):
        config.build(RLHFRun, values, {}, "test.yaml")


def test_full_fine_tuning_may_recompute_activations() -> None:
    config.build(RLHFRun, {"ppo": {"epochs": 2, "gradient_checkpointing": True}}, {}, "test.yaml")


def test_a_reward_model_without_an_adapter_is_refused(
    roles: Callable[..., Any], save_tiny: Callable[..., Path]
) -> None:
    policy, _, _ = roles("llama")
    with pytest.raises(LabError, match=r"has no adapter/.*Train it again with model.lora_rank above 0"):
        AdapterClassifier(policy, "other", save_tiny("llama", reward=True))


def test_an_adapter_for_other_modules_is_refused(
    roles: Callable[..., Any], reward_folder: Callable[[str], Path]
) -> None:
    policy, _, _ = roles("llama")
    # reveals: PEFT's own error comes through.
    with pytest.raises(LabError) as caught:
        AdapterClassifier(policy, "other", reward_folder("gpt2"))
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_size_is_refused(
    tmp_path: Path, roles: Callable[..., Any], save_tiny: Callable[..., Path], tokenizer: Any
) -> None:
    """Made from a base of other width: the names fit, the shapes do not."""
    import transformers as hf
    from peft import get_peft_model

    common: dict[str, Any] = {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": 0}
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    wide = hf.AutoModelForSequenceClassification.from_config(
        hf.LlamaConfig(hidden_size=32, **sizes, **common)
    )
    models.save(get_peft_model(wide, lora(LORA, "SEQ_CLS", wide)), tokenizer, tmp_path)
    policy, _, _ = roles("llama")
    # reveals: torch's own error of many lines comes through.
    with pytest.raises(LabError, match="does not fit the policy"):
        AdapterClassifier(policy, "other", tmp_path)


def test_an_adapter_without_its_score_layer_is_refused(
    tmp_path: Path, roles: Callable[..., Any], reward_folder: Callable[[str], Path]
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(reward_folder("llama"), tmp_path / "reward"))
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "score" not in k}, path)
    policy, _, _ = roles("llama")
    with pytest.raises(LabError, match="holds no score layer"):
        AdapterClassifier(policy, "other", folder)
