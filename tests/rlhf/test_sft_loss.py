"""The loss of SFT is the model's own: where TRL computes another, the model's forward takes its place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from benchmarks.families import tiny_model
from lab.errors import LabError
from rlhf import reviews
from rlhf.sft_loss import settle_loss
from tests.rlhf.test_families import END, Family, hf, save, sizes
from tests.rlhf.test_sft import trainer_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def with_trls_head(family: str, name: str = "", known: float | None = None, true: float = 1) -> Any:
    """A tiny model with TRL's head, made when its config had another value: as if TRL knew no such name."""
    model = tiny_model(family)
    if name:
        setattr(model.config, name, known)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if name:
        setattr(model.config, name, true)
    return model


def settle(model: Any, packing: bool = False) -> str:
    return settle_loss(model, DataCollatorForLanguageModeling(0, padding_free=packing), [], packing)


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "llama", "mixtral"])
def test_trls_head_is_kept_where_it_is_right(family: str, packing: bool, number_format: str) -> None:
    model = with_trls_head(family)
    forward, state = model.forward, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=number_format == "bf16"):
        assert settle(model, packing) == ""
    assert model.forward == forward
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "unknown"),
    [
        ("gemma2", ("final_logit_softcapping", None, 30.0)),
        ("cohere", ("logit_scale", None, 0.0625)),
        ("granite", ("logits_scaling", 1.0, 8.0)),
        ("modernbert-decoder", ()),  # a layer between body and output that TRL passes over
        ("recurrent_gemma", ()),  # a cap under another name
        ("llama4_text", ()),  # the body is not where TRL looks for it
    ],
)
def test_a_forgotten_cap_scale_or_layer_is_found_and_the_loss_is_the_models_own(
    family: str, unknown: Any, number_format: str
) -> None:
    model = with_trls_head(family, *unknown)
    with torch.autocast("cpu", torch.bfloat16, enabled=number_format == "bf16"):
        assert settle(model)
    rows = [[5, 9, 7, 11, 6, 8], [5, 9, 12]]
    labels = torch.tensor([[-100, -100, 7, 11, 6, 8], [-100, 9, 12, -100, -100, -100]])
    batch = DataCollatorForLanguageModeling(0)([{"input_ids": row} for row in rows]) | {"labels": labels}
    output = model(**batch, use_cache=False, fused_lm_head=True)
    for row, own_labels, logprobs, entropy, best in zip(
        rows, labels, output.log_probs, output.entropy, output.is_top1, strict=True
    ):
        own = type(model).forward(model, input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1]
        own = own.log_softmax(-1)
        for at, token in enumerate(row[1:]):
            if own_labels[at + 1] == -100:
                assert logprobs[at] == entropy[at] == best[at] == 0
            else:
                assert float(logprobs[at]) == pytest.approx(float(own[at, token]), abs=1e-4)
                assert float(entropy[at]) == pytest.approx(float(-(own[at].exp() * own[at]).sum()), abs=1e-4)
                assert bool(best[at]) == (int(own[at].argmax()) == token)
    output.log_probs.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("family", ["opt", "bloom", "mamba"])
def test_packing_is_refused_where_packed_rows_see_each_other(family: str) -> None:
    """OPT counts positions and BLOOM distances over the whole row, Mamba's state goes through all of it."""
    assert settle(with_trls_head(family)) == ""
    with pytest.raises(LabError, match=r"sft\.packing: .* reads packed rows as something else"):
        settle(with_trls_head(family), packing=True)


MODERN = Family(
    hf("ModernBertDecoderConfig", **sizes(layer_types=["full_attention"] * 2, sliding_window=32)),
    {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": "<pad>"},
)


def test_what_the_trainer_reports_is_the_models_own_loss(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, reviews.demonstrations(1)[:5], {"path": str(save(MODERN, tmp_path / "m"))})
    assert any("its own forward is taken" in note for note in trainer.notes)
    total, n_tokens = 0.0, 0
    with torch.no_grad():
        for row in trainer.train_dataset:
            ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])[1:]
            logits = type(trainer.model).forward(trainer.model, input_ids=ids[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            n_tokens += int((labels != -100).sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / n_tokens, rel=1e-4)
