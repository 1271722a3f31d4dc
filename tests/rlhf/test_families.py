"""The recipe on tiny models of other families, each with a tokenizer as that family has it.

Data, tokenizers and random weights are made here; what the stages leave must be opened by stock transformers.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lab import config
from lab.run import Run
from rlhf import models
from rlhf.config import RLHFRun
from rlhf.decode import sample
from rlhf.pipeline import run_stages
from rlhf.scoring import RewardScorer

pytestmark = pytest.mark.filterwarnings(
    # TRL 1.16 and PEFT 0.21 still use what transformers 5.23 renamed.
    "ignore:`gradient_checkpointing:FutureWarning",
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|endoftext|>"
CHAT_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": END}


@dataclass(frozen=True)
class Family:
    """A family of models: its tiny config, its special tokens, and the form of its demonstrations."""

    make: Callable[[dict[str, Any]], Any]
    special: dict[str, str]
    form: str = "text"
    """text, or conversations: as prompt and completion (chat), or as a whole (messages)."""
    bos: bool = False
    """Whether the tokenizer puts its first token before a text."""
    end: str = ""
    """`model.eos_token`, where the tokenizer has none."""


def sizes(**more: Any) -> dict[str, Any]:
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    return common | {"max_position_embeddings": 96} | more


def hf(name: str, **options: Any) -> Callable[[dict[str, Any]], Any]:
    def make(tokens: dict[str, Any]) -> Any:
        import transformers

        return getattr(transformers, name)(**options, **tokens)

    return make


GPT2 = hf("GPT2Config", n_embd=32, n_layer=2, n_head=2, n_positions=96)
FAMILIES = {
    "gpt2": Family(GPT2, {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": "<pad>"}),
    "gpt2 without an end": Family(GPT2, {"unk_token": END}, end=END),
    "gpt2 of the Hub": Family(GPT2, {"bos_token": END, "eos_token": END, "unk_token": END}),
    "bloom": Family(
        hf("BloomConfig", hidden_size=32, n_layer=2, n_head=2),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
    "llama": Family(
        hf("LlamaConfig", **sizes(num_key_value_heads=1)),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        bos=True,
    ),
    "qwen2": Family(
        hf("Qwen2Config", **sizes(num_key_value_heads=1)),
        {"eos_token": "<|im_end|>", "pad_token": END},
        form="messages",
    ),
    "qwen3": Family(
        hf("Qwen3Config", **sizes(num_key_value_heads=1, head_dim=16, tie_word_embeddings=True)),
        {"eos_token": "<|im_end|>", "pad_token": END},
        form="chat",
    ),
    "smollm2": Family(
        hf("LlamaConfig", **sizes(num_key_value_heads=1, tie_word_embeddings=True)),
        {**CHAT_TOKENS, "pad_token": "<|im_end|>"},
        form="chat",
    ),
}
RUNS = [
    *((family, 0) for family in FAMILIES),
    *((family, 4) for family in ("gpt2", "bloom", "qwen3", "smollm2")),
]


def tokenizer_of(family: Family) -> Any:
    """Byte-level, without merges: 256 tokens and the special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [AddedToken(token, special=True) for token in dict.fromkeys(family.special.values())]
    )
    if family.bos:
        first = family.special["bos_token"]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, inner.token_to_id(first))]
        )
    chat = {"chat_template": CHATML} if family.form != "text" else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **family.special, **chat)


def save(family: Family, folder: Path) -> Path:
    """Random weights and the tokenizer, as a folder of the Hub has them."""
    import transformers

    tokenizer = tokenizer_of(family)
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    tokens = {name: getattr(tokenizer, name) for name in names} | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(family.make(tokens)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(form: str, folder: Path) -> tuple[Path, Path]:
    """Demonstrations and comparisons of eight prompts."""

    def said(role: str, text: str) -> Any:
        return text if form == "text" else [{"role": role, "content": text}]

    demonstrations, comparisons = [], []
    for i, word in enumerate(("pea", "egg", "fig", "ham", "jam", "nut", "oat", "yam")):
        prompt = said("user", f"{word}{'!' * (i % 3)}")  # of several lengths
        good, bad = said("assistant", " good"), said("assistant", " bad")
        if form == "messages":
            demonstrations.append({"messages": [*prompt, *good]})
        else:
            demonstrations.append({"prompt": prompt, "completion": good})
        comparisons.append({"prompt": prompt, "completions": [bad, good], "ranks": [2, 1]})
    paths = folder / "demonstrations.jsonl", folder / "comparisons.jsonl"
    for path, rows in zip(paths, (demonstrations, comparisons), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The folder of a family's finished recipe; every one is run once."""
    finished: dict[tuple[str, int], Path] = {}

    def run(name: str, rank: int) -> Path:
        if (name, rank) not in finished:
            root = tmp_path_factory.mktemp(name.replace(" ", "_"))
            family = FAMILIES[name]
            demonstrations, comparisons = write_data(family.form, root)
            training = {"batch_size": 4, "learning_rate": 1e-2}
            values = {
                "model": {
                    "path": str(save(family, root / "base")),
                    "lora_rank": rank,
                    "eos_token": family.end,
                },
                "data": {
                    "demonstrations": str(demonstrations),
                    "comparisons": str(comparisons),
                    "max_length": 64,
                    "max_new_tokens": 6,
                },
                "sft": training,
                "reward": training | {"held_out": 0.3},
                "ppo": training | {"epochs": 1, "rollouts": 2, "rollout_size": 4, "micro_batch_size": 2},
                "eval": {"prompts": 2, "samples": 2, "best_of": 2, "labeler": {"name": "vader"}},
                "device": {"device": "cpu", "precision": "fp32", "threads": 1},
                "tracking": {"wandb": "disabled"},
            }
            run_stages(config.build(RLHFRun, values, {}, "test.yaml"), root / "run")
            finished[name, rank] = root
        return finished[name, rank]

    return run


@pytest.mark.parametrize(("name", "rank"), RUNS)
def test_the_recipe_finishes_and_leaves_what_stock_transformers_opens(
    recipe: Callable[[str, int], Path], name: str, rank: int
) -> None:
    # reveals: "gpt2 of the Hub" has no special token to spare for padding and is refused.
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    root = recipe(name, rank)
    run = root / "run"
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    for stage in ("sft", "reward", "ppo", "eval"):
        assert Run.open(run / stage).info["state"] == "finished"
    opened: dict[str, Any] = {}
    for stage in ("sft", "reward", "ppo"):
        auto: Any = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
        opened[stage], report = auto.from_pretrained(run / stage / "model", output_loading_info=True)
        assert not any(report.values()), (stage, report)
        assert opened[stage].config.model_type == base.config.model_type
        assert (run / stage / "model" / "adapter").is_dir() == bool(rank)
        tokenizer = AutoTokenizer.from_pretrained(run / stage / "model")
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        assert tokenizer.eos_token == (FAMILIES[name].end or FAMILIES[name].special["eos_token"])
        assert opened[stage].config.pad_token_id == tokenizer.pad_token_id
    assert type(opened["ppo"]) is type(base)
    before, after = (opened[stage].base_model.state_dict() for stage in ("sft", "ppo"))
    assert any(not torch.equal(after[key], before[key]) for key in before), "PPO has trained"
    assert any("lora" in key for key in before) is False


@pytest.mark.parametrize(("name", "rank"), [("gpt2", 0), ("bloom", 4), ("llama", 0), ("smollm2", 4)])
def test_stock_transformers_reads_our_scores_from_the_reward_model(
    recipe: Callable[[str, int], Path], name: str, rank: int
) -> None:
    """Also of answers that end: padding is not the end token any more."""
    from transformers import AutoModelForSequenceClassification

    folder = recipe(name, rank) / "run" / "reward" / "model"
    model, tokenizer = models.open_reward(folder)
    rows = [[70, 71, 72, tokenizer.eos_token_id], [73, 74], [75, 76, 77]]
    ours = RewardScorer(model, tokenizer, shift=0.0, scale=1.0).score_ids([[]] * 3, rows)
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (4 - len(row)) for row in rows])
    with torch.no_grad():
        theirs = stock(ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    scorer = RewardScorer(model, tokenizer)
    assert scorer.scale != 1, "the stage left the scale of its scores in config.json"


@pytest.mark.parametrize(("name", "rank"), [("llama", 0), ("qwen2", 0), ("smollm2", 0)])
def test_what_is_learned_is_to_answer_and_to_end(
    recipe: Callable[[str, int], Path], name: str, rank: int
) -> None:
    """The end token got likelier behind an answer, whether or not padding was the same token at first."""
    from rlhf.scoring import tokenize

    root = recipe(name, rank)
    form = FAMILIES[name].form
    question, answer = "egg!", " good"
    prompt: Any = question if form == "text" else [{"role": "user", "content": question}]
    completion: Any = answer if form == "text" else [{"role": "assistant", "content": answer}]
    chances = []
    for folder in (root / "base", root / "run" / "sft" / "model"):
        model, tokenizer = models.open_policy(folder)
        ids = tokenize(prompt, completion, True, tokenizer)
        assert ids[-1] == tokenizer.eos_token_id
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0, -2]
        chances.append(logits.log_softmax(-1)[ids[-1]].item())
    assert chances[1] > chances[0] + 0.1


def test_the_adapters_of_a_stage_are_small_and_merged_into_its_model(
    recipe: Callable[[str, int], Path],
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    root = recipe("qwen3", 4)
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    adapted = PeftModel.from_pretrained(base, root / "run" / "sft" / "model" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(root / "run" / "sft" / "model").eval()
    ids = torch.tensor([[70, 71, 72]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    weights = load_file(root / "run" / "ppo" / "model" / "adapter" / "adapter_model.safetensors")
    assert weights
    assert not any("critic" in name or "reward" in name or "score" in name for name in weights)


def test_ppo_on_adapters_interrupted_and_resumed_ends_as_one_never_stopped(tmp_path: Path) -> None:
    """The labeler, who watches PPO, asks for the stop: by the signal a user's Ctrl+C sends."""
    judge, flag = tmp_path / "judge.py", tmp_path / "stop"
    judge.write_text(
        "import signal\nfrom pathlib import Path\n\n"
        "def score(prompt, answer):\n"
        f"    flag = Path({str(flag)!r})\n"
        "    if flag.exists():\n"
        "        flag.unlink()\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    return float(sum(map(ord, answer)))\n"
    )
    demonstrations, _ = write_data("text", tmp_path)
    training = {"batch_size": 4, "learning_rate": 1e-2}
    values = {
        "model": {"path": str(save(FAMILIES["llama"], tmp_path / "base")), "lora_rank": 4},
        "data": {"demonstrations": str(demonstrations), "max_length": 64, "max_new_tokens": 6},
        "sft": training,
        "collect": {"labeler": {"name": f"python:{judge}:score"}, "answers": 2},
        "reward": training | {"held_out": 0.3},
        "ppo": training | {"epochs": 2, "rollouts": 3, "rollout_size": 4},
        "device": {"device": "cpu", "precision": "fp32", "threads": 1},
        "tracking": {"wandb": "disabled"},
    }
    settings = config.build(RLHFRun, values, {}, "test.yaml")
    for stage in ("sft", "collect", "reward"):
        run_stages(settings, tmp_path / "whole", only=stage)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", symlinks=True)
    run_stages(settings, tmp_path / "whole", only="ppo")
    flag.touch()
    run_stages(settings, tmp_path / "parts", only="ppo")
    assert Run.open(tmp_path / "parts" / "ppo").info["state"] == "interrupted"
    run_stages(settings, tmp_path / "parts", only="ppo")
    # reveals: of a critic that is an adapter, the resumed optimiser knows the head alone.
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        whole, parts = (load_file(tmp_path / run / "ppo" / "model" / name) for run in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(parts[key], tensor) for key, tensor in whole.items()), name


# ---- positions ----

PROMPTS = [[70, 71, 72, 73, 74, 75, 76], [80], [90, 91, 92]]


@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama", "qwen3"])
def test_answers_to_short_prompts_are_those_without_padding(tmp_path: Path, name: str) -> None:
    """Short prompts are padded on the left for sampling; learned positions must not count the padding."""
    model, tokenizer = models.open_policy(save(FAMILIES[name], tmp_path))
    # Random weights say the same whatever the position, unless these are large.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.eval()

    def greedy(prompts: list[list[int]]) -> list[list[int]]:
        options: Any = {"max_new_tokens": 8, "eos_ids": {tokenizer.eos_token_id}, "temperature": 0}
        return sample(model, prompts, pad_id=tokenizer.pad_token_id, **options)

    together = greedy(PROMPTS)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        for token in answer:
            with torch.no_grad():
                assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "smollm2"])
def test_log_probabilities_of_a_rollout_are_those_of_each_answer_alone(tmp_path: Path, name: str) -> None:
    """What PPO's ratios are made of: policy, reference and critic, of prompts of several lengths."""
    from datasets import Dataset

    from rlhf.ppo import PPOConfig, PPOTrainer

    def length(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    folder = save(FAMILIES[name], tmp_path / "base")
    policy, tokenizer = models.open_policy(folder)
    rows = [{"prompt": text} for text in ("pear and plum", "x", "fig!")]
    trainer: Any = PPOTrainer(
        model=policy,
        reward_funcs=length,
        args=PPOConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=3,
            num_rollouts=1,
            max_completion_length=5,
            temperature=0.7,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        critic=models.open_reward(folder)[0],
    )
    rollout = trainer._generate_and_score_completions(rows)
    packed, stock = rollout["packed"], models.open_policy(folder)[0].eval()
    assert len(set(packed.prompt_lengths)) == 3
    for row, (begin, n) in enumerate(zip(packed.prompt_lengths, packed.answer_lengths, strict=True)):
        ids = packed.ids[row : row + 1, : begin + n]
        with torch.no_grad():
            logits = stock(ids).logits[0, begin - 1 : -1] / 0.7
            hidden = trainer.critic_model.base_model(input_ids=ids).last_hidden_state[0, begin - 1 : -1]
            values = trainer.critic_model.score(hidden)[:, 0]
        expected = logits.log_softmax(-1).gather(1, ids[0, begin:, None])[:, 0]
        torch.testing.assert_close(rollout["old_logps"][row, :n], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rollout["values"][row, :n], values, rtol=1e-4, atol=1e-5)
    assert trainer.rollout["kl"] == pytest.approx([0, 0, 0], abs=1e-4), "the reference is the policy itself"
