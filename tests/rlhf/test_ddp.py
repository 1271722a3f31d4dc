"""PPO on two processes: one policy and one critic, whatever each process saw.

The test starts this very file twice, with the environment that `torchrun` gives; the processes talk by gloo.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Not from tests.conftest, which clears the environment that the processes started here need.
REPO = Path(__file__).parents[2]

# PEFT 0.21 still asks for what transformers 5.23 renamed.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

SCENARIOS = ("full", "lora", "ptx", "resume full", "resume lora")
"""Run one after the other by one pair of processes: importing takes longer than training."""
PER_DEVICE, ROLLOUTS, EPOCHS = 4, 2, 2


class ShareBelow:
    """Rewards the share of the first 30 tokens of the vocabulary in an answer."""

    __name__ = "share_below"

    def score_ids(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([sum(t < 30 for t in a) / len(a) for a in answers])

    def __call__(self, **_: Any) -> list[float]:
        raise AssertionError("must be asked by token ids")


# ---- what each of the two processes does ----


def make_trainer(scenario: str, policy: Path, reward: Path, out: Path) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback

    from rlhf import models, reviews
    from rlhf.config import ModelConfig
    from rlhf.ppo import PPOConfig, PPOTrainer
    from rlhf.roles import AdapterClassifier
    from rlhf.sft import lora

    adapters = "lora" in scenario

    def shared(owner: Any) -> Any:
        AdapterClassifier(owner, "reward", reward).set_trainable(False)
        critic = AdapterClassifier(owner, "critic", reward)
        critic.set_trainable(True)
        return critic

    model, tokenizer = models.open_policy(policy)
    trainer = PPOTrainer(
        model=model,
        reward_funcs=ShareBelow(),  # type: ignore[arg-type]
        args=PPOConfig(
            output_dir=str(out / scenario),
            per_device_train_batch_size=PER_DEVICE // 2,
            gradient_accumulation_steps=2,
            num_rollouts=ROLLOUTS,
            num_ppo_epochs=EPOCHS,
            max_completion_length=6,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            ptx_coef=1.0 if scenario == "ptx" else 0.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="steps" if scenario in ("full", "lora") else "no",
            save_steps=EPOCHS,  # after the first rollout
            logging_steps=1,
            seed=3,
            ddp_timeout=60,
        ),
        train_dataset=Dataset.from_list([{"prompt": p} for p in reviews.prompts()[:7]]),
        processing_class=tokenizer,
        critic=shared if adapters else models.open_reward(reward)[0],
        ptx_dataset=[{"input_ids": [5, 6, 7, 8, 9, 1], "completion_mask": [0, 0, 0, 1, 1, 1]}],
        peft_config=lora(ModelConfig(lora_rank=2 if adapters else 0), "CAUSAL_LM", model),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights(trainer: Any) -> dict[str, Tensor]:
    """All of the policy's, the critic's adapter among them if it is one, and the critic's own."""
    own = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    policy = {f"policy.{name}": p.detach().clone() for name, p in own}
    return policy | {f"critic.{n}": p.detach().clone() for n, p in trainer.critic_model.named_parameters()}


def work(policy: Path, rewards: dict[str, Path], out: Path) -> None:
    rank = int(os.environ["RANK"])
    for scenario in SCENARIOS:
        trainer = make_trainer(scenario, policy, rewards["lora" if "lora" in scenario else "full"], out)
        prompts: list[list[str]] = []
        scores: list[list[float]] = []
        generate = trainer._generate_and_score_completions

        def watched(
            inputs: Any,
            trainer: Any = trainer,
            generate: Any = generate,
            prompts: Any = prompts,
            scores: Any = scores,
        ) -> Any:
            output = generate(inputs)
            prompts.append(trainer.rollout["prompts"])
            scores.append(trainer.rollout["scores"])
            packed = output["packed"]
            own = [
                ShareBelow().score_ids([[]], [answer.tolist()]).item()
                for answer in packed.answers.split(packed.answer_lengths)
            ]
            assert own == pytest.approx(scores[-1]), "each process gets the scores of its own answers"
            return output

        trainer._generate_and_score_completions = watched
        save_file(weights(trainer), out / f"{scenario} {rank} start.safetensors")
        checkpoint = None
        if scenario.startswith("resume"):
            checkpoint = str(out / scenario.removeprefix("resume ") / f"checkpoint-{EPOCHS}")
        trainer.train(resume_from_checkpoint=checkpoint)
        save_file(weights(trainer), out / f"{scenario} {rank} end.safetensors")
        history = [row["objective/scores"] for row in trainer.state.log_history if "objective/scores" in row]
        norms = [row["val/critic_grad_norm"] for row in trainer.state.log_history if "objective/kl" in row]
        told = {"prompts": prompts, "scores": scores, "history": history, "norms": norms}
        told["world"] = trainer.accelerator.num_processes
        (out / f"{scenario} {rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


# ---- the tests ----


@pytest.fixture(scope="module")
def adapted_reward(save_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that was trained as an adapter."""
    from peft import get_peft_model

    from rlhf import models
    from rlhf.config import ModelConfig
    from rlhf.sft import lora

    torch.manual_seed(1)
    model, tokenizer = models.open_reward(save_tiny("llama"))
    folder = tmp_path_factory.mktemp("adapted")
    models.save(get_peft_model(model, lora(ModelConfig(lora_rank=2), "SEQ_CLS", model)), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def trained(
    save_tiny: Callable[..., Path], adapted_reward: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder in which both processes left what they ended with."""
    out = tmp_path_factory.mktemp("ddp")
    rewards = {"full": str(save_tiny("llama", reward=True)), "lora": str(adapted_reward)}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "tests.rlhf.test_ddp", str(save_tiny("llama"))]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes, logs = [], [out / f"rank {rank}.log" for rank in range(2)]
    for rank, log in enumerate(logs):
        with log.open("w") as said:
            processes.append(
                subprocess.Popen(
                    [*command, json.dumps(rewards), str(out)],
                    cwd=REPO,
                    env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    (out / "codes.json").write_text(json.dumps(codes))
    return out


def told(folder: Path, scenario: str) -> list[dict[str, Any]]:
    """What both processes said of a scenario; fails with their last words if one did not get there."""
    paths = [folder / f"{scenario} {rank}.json" for rank in range(2)]
    if not all(path.exists() for path in paths):
        words = "\n".join((folder / f"rank {rank}.log").read_text()[-1500:] for rank in range(2))
        pytest.fail(f"{scenario!r} did not end:\n{words}")
    return [json.loads(path.read_text()) for path in paths]


def at(folder: Path, scenario: str, rank: int, when: str) -> dict[str, Tensor]:
    return load_file(folder / f"{scenario} {rank} {when}.safetensors")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_both_processes_end_with_the_same_policy_and_critic(trained: Path, scenario: str) -> None:
    assert [said["world"] for said in told(trained, scenario)] == [2, 2]
    first, second = (at(trained, scenario, rank, "end") for rank in range(2))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_policy_and_critic_have_moved(trained: Path, scenario: str) -> None:
    # reveals: with LoRA the critic's adapter has not; see test_roles.
    told(trained, scenario)
    start, end = (at(trained, scenario, 0, when) for when in ("start", "end"))
    moved = {name for name, tensor in end.items() if not torch.equal(tensor, start[name])}
    adapters = "lora" in scenario
    expected = {
        name for name in start if not adapters or ".default." in name or ".critic." in name or "score" in name
    }
    assert moved == expected


@pytest.mark.parametrize("scenario", ["full", "lora"])
def test_each_process_answers_prompts_of_its_own(trained: Path, scenario: str) -> None:
    """So equal weights above mean that gradients were averaged, not that both computed the same."""
    first, second = told(trained, scenario)
    assert len(first["prompts"]) == len(second["prompts"]) == ROLLOUTS
    for mine, other in zip(first["prompts"], second["prompts"], strict=True):
        assert len(mine) == len(other) == PER_DEVICE
        assert mine != other
    assert first["scores"] != second["scores"]
    drawn = [*first["prompts"][0], *second["prompts"][0]]
    assert len(set(drawn)) == 7, "a pass over the 7 prompts before the first comes again"


@pytest.mark.parametrize("scenario", ["full", "lora"])
def test_logged_scores_are_means_over_both(trained: Path, scenario: str) -> None:
    both = told(trained, scenario)
    expected = [
        sum(one + other) / (2 * PER_DEVICE)
        for one, other in zip(*(said["scores"] for said in both), strict=True)
    ]
    assert both[0]["history"] == pytest.approx(expected)


@pytest.mark.parametrize("scenario", ["full", "lora"])
def test_the_critics_gradients_are_one_on_both(trained: Path, scenario: str) -> None:
    first, second = told(trained, scenario)
    assert min(first["norms"]) > 0
    assert first["norms"] == pytest.approx(second["norms"], rel=1e-5)


@pytest.mark.parametrize("scenario", ["full", "lora"])
def test_a_resumed_run_ends_as_one_never_stopped(trained: Path, scenario: str) -> None:
    # reveals: with LoRA it cannot be resumed; see test_roles.
    told(trained, f"resume {scenario}")
    whole, resumed = (at(trained, name, 1, "end") for name in (scenario, f"resume {scenario}"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


if __name__ == "__main__":
    policy_folder, reward_folders, out_folder = sys.argv[1:]
    folders = {name: Path(path) for name, path in json.loads(reward_folders).items()}
    work(Path(policy_folder), folders, Path(out_folder))
