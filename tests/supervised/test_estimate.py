"""`lab estimate`: published sizes and costs, and arithmetic done by hand."""

import json
from typing import Any

import pytest

from lab import cli
from lab.errors import LabError
from supervised.estimate import GPUS, PUBLISHED, describe, estimate


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("gpt1", 116_534_784),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("gpt3-125m", 125_226_240),
        ("gpt3-350m", 355_871_744),
        ("gpt3-760m", 760_300_032),
        ("gpt3-1.3b", 1_315_723_264),
        ("gpt3-2.7b", 2_651_553_280),
        ("gpt3-6.7b", 6_658_404_352),
        ("gpt3-13b", 12_853_386_240),
        ("gpt3-175b", 174_604_259_328),
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-65b", 65_285_660_672),
        ("llama2-70b", 68_976_648_192),
        ("ddpm-cifar10", 35_746_307),
        ("transformer-base", 63_082_496),
        ("transformer-big", 214_245_376),
        ("lenet1", 3_246),
        ("lenet4", 51_050),
        ("lenet5", 61_706),
        ("resnet8", 78_042),
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
        ("nature_cnn", 1_684_128),
        ("impala_cnn", 1_089_232),
        ("drqn", 7_547_040),
    ],
)
def test_published_parameter_counts(model: str, parameters: int) -> None:
    assert estimate(model)["parameters"] == parameters


def test_every_published_model_is_counted_here_or_with_bloom() -> None:
    counted: Any = next(mark for mark in test_published_parameter_counts.pytestmark)  # type: ignore[attr-defined]
    assert {*PUBLISHED} - {model for model, _ in counted.args[1]} == {"bloom-176b"}


@pytest.mark.parametrize(
    ("model", "spec", "parameters"),
    [
        ("googlenet", {"aux": True}, 13_378_280),
        ("googlenet_bn", {"aux": True}, 13_004_888),
        ("inception_v3", {}, 23_834_568),
        ("inception_v3", {"aux": True}, 27_161_264),
    ],
)
def test_auxiliary_classifiers_count_and_a_backbones_own_image_size_is_taken(
    model: str, spec: dict[str, Any], parameters: int
) -> None:
    result = estimate(model, spec)
    assert result["parameters"] == parameters
    assert result["training_flops_each"]["flops"] > 3 * 2 * 1.4e9  # both papers' 1.5 and 5 billion products


def test_gpt3_costs_what_was_published() -> None:
    result = estimate("gpt3-175b")
    assert result["memory_bytes"]["fp32"]["hold"] == 698_417_037_312  # "700 GB"
    assert result["memory_bytes"]["bf16"] == {"hold": 349_208_518_656, "train": 1_396_834_074_624}
    assert result["memory_bytes"]["int8"] == {"hold": 174_604_259_328, "train": None}
    assert (
        result["memory_bytes"]["fp32"]["train"]
        == result["memory_bytes"]["mixed"]["train"]
        == 2_793_668_149_248
    )
    assert result["training"]["flops"] == pytest.approx(3.14e23, rel=0.002)  # arXiv 2005.14165, table D.1
    lambdas = result["on"]["V100-2020"]
    assert (lambdas["tflops"], lambdas["utilisation"], lambdas["price_per_hour"]) == (28, 1, 1.5)
    assert lambdas["gpu_hours"] / 24 / 365 == pytest.approx(355, rel=0.005)
    assert lambdas["dollars"] == pytest.approx(4.6e6, rel=0.02)
    text = describe(result)
    for said in (
        "174,604,259,328",
        "698.4 GB",
        "3.14e+23 FLOPs",
        "3e+11 tokens",
        "355.9 years",
        "$4.68M",
        "2020",
    ):
        assert said in text


def test_time_and_price_by_hand() -> None:
    given: dict[str, Any] = {"samples": 1e9, "gpu": "A100", "gpus": 8, "utilisation": 0.5, "price": 2.0}
    result = estimate("gpt2", **given)
    assert result["training"]["flops"] == 6 * 124_439_808 * 1e9
    seconds = 6 * 124_439_808 * 1e9 / (312e12 * 0.5)
    assert list(result["on"]) == ["A100"]
    assert result["on"]["A100"]["hours"] == pytest.approx(seconds / 3600 / 8)
    assert result["on"]["A100"]["dollars"] == pytest.approx(seconds / 3600 * 2)
    assert estimate("gpt3-175b")["on"]["A100"]["gpus_to_train"] == 35  # 2,794 GB in 80 GB each


def test_unpublished_tokens_are_twenty_a_parameter() -> None:
    result = estimate("gpt", {"vocab_size": 50, "width": 32, "n_head": 2})
    assert result["training"]["samples"] == 20 * result["parameters"]


def test_flops_of_an_image_are_counted() -> None:
    result = estimate("mlp", {"in_chans": 1, "img_size": 28, "hidden": [16, 16]}, classes=10, samples=100)
    assert result["parameters"] == 13_002
    products = 784 * 16 + 16 * 16 + 16 * 10
    assert result["training_flops_each"] == {
        "unit": "image",
        "formula": "3 x forward, counted",
        "flops": 3 * 2 * products,
    }
    nature = estimate("nature_cnn", {"in_chans": 4, "img_size": 84}, classes=6)
    assert nature["parameters"] == 1_687_206
    products = 20**2 * 32 * 4 * 64 + 9**2 * 64 * 32 * 16 + 7**2 * 64 * 64 * 9 + 3136 * 512 + 512 * 6
    assert nature["training_flops_each"]["flops"] == 3 * 2 * products


def test_other_inputs_need_a_number() -> None:
    result = estimate("lstm", {"in_features": 28, "hidden": 128}, classes=10)
    assert result["parameters"] == 4 * 128 * (28 + 128 + 2) + 128 * 10 + 10
    assert "on" not in result
    assert "Give --samples" in describe(result)
    assert estimate("lstm", {"in_features": 28}, samples=1e6)["training"]["samples"] == 1e6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt3-175"], "Did you mean 'gpt3-175b'?"),
        (["gpt2", "--gpu=A10"], "Did you mean 'A100'?"),
        (["gpt2", "--n_layers=3"], "Did you mean 'n_layer'?"),
        (["gpt2", "--n_layer=three"], "n_layer = 'three' is not valid. Expected int."),
        (["gpt2", "--n_head=5"], "width 768 must be divisible by n_head 5"),
        (["gpt2", "--classes=3"], "--classes is for classifiers, not for gpt2"),
        (["ddpm_256", "--classes=3"], "--classes is for classifiers, not for ddpm_256"),
        (["gpt2", "--tokens=-1"], "'-1' is no number above 0"),
        (["gpt2", "--gpus=0"], "'0' is no whole number of at least 1"),
        (["gpt2", "--utilisation=1.5"], "'1.5' is no share above 0 and at most 1"),
        (["gpt2", "--width=768e15"], "cannot be built"),
        (["gpt"], "gpt needs --vocab_size=VALUE"),
        (["nature_cnn", "--img_size=big"], "img_size = 'big' is not valid"),
        (["resnet18", "--img_size=1e9"], "takes no image of img_size"),
        (["resnet18", "--in_chans=1e30"], "Overflow"),
        (["gpt3-175b", "--n_layer=9999999"], "above 10,000"),
        (["resnet18", "--classes=" + 20 * "9"], "is more than 1,000,000,000"),
        (["drqn", "--classes=3"], "--classes is for classifiers, not for drqn"),
        (["impala_cnn", "--channels=[]"], "channels [] must be positive"),
        (["nature_cnn", "--width=0"], "width 0 must be positive"),
        (["nature_cnn", "--strides=[0,2,1]"], "strides [0, 2, 1] must be positive"),
        (["transformer", "--vocab_size=50", "--n_decoder_layer=1e9"], "above 10,000"),
        (["srresnet", "--scale=1099511627776"], "srresnet"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_the_command_prints_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "gpt", "--vocab_size=5e4", "--width", "64", "--tokens=1e9"]) == 0
    assert "gpt(vocab_size=50000, width=64)" in capsys.readouterr().out
    assert cli.main(["estimate", "gpt2", "--json", "--gpu=H100", "--price=1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["on"]["H100"]["dollars"] == pytest.approx(result["on"]["H100"]["gpu_hours"])


def test_a_model_name_is_not_guessed() -> None:
    with pytest.raises(LabError, match="Known: gpt1"):
        estimate("")
    assert all(gpu.utilisation <= 1 and gpu.note for gpu in GPUS.values())
