"""What each stage is said to read, against what it does read; and what follows: runs that share stages."""

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lab import config
from lab.cli import main
from lab.run import Run
from rlhf.config import STAGES, RLHFRun
from rlhf.stage_keys import CHANGES_NOTHING, READS, WATCHES, relevant
from tests.rlhf.test_refusals import furnish, values, write

pytestmark = pytest.mark.filterwarnings(
    # TRL 1.16 and PEFT 0.21 still use what transformers 5.23 renamed.
    "ignore:`gradient_checkpointing:FutureWarning",
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
)

COLLECTED: dict[str, Any] = {"data": {"comparisons": "collect"}, "eval": {"labeler": {}}}


def changed(**changes: Any) -> dict[str, Any]:
    """`values` of a recipe that collects, with more changes."""
    return values(**{key: COLLECTED.get(key, {}) | changes.get(key, {}) for key in {*COLLECTED, *changes}})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    return tmp_path


Lab = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lab(here: Path, capsys: pytest.CaptureFixture[str]) -> Lab:
    """Runs `lab rlhf config.yaml ...`; returns the exit code, stdout and the last line of stderr."""

    def run(*arguments: str, **changes: Any) -> tuple[int, str, str]:
        start_from = changes.pop("start_from", "")
        (here / "config.yaml").write_text(yaml.safe_dump(changed(**changes) | {"start_from": start_from}))
        capsys.readouterr()
        code = main(["rlhf", "config.yaml", "--trust", *arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, (captured.err.strip().splitlines() or [""])[-1]

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished recipe, runs/a."""
    root = tmp_path_factory.mktemp("shared")
    furnish(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        (root / "config.yaml").write_text(yaml.safe_dump(changed()))
        assert main(["rlhf", "config.yaml", "--trust", "--out", "runs/a"]) == 0
    return root


@pytest.fixture
def a(finished: Path, here: Path) -> Path:
    """A copy of the finished recipe, below the folder `lab` runs in."""
    shutil.copytree(finished / "runs", here / "runs", symlinks=True)
    return here / "runs" / "a"


# ---- what is read ----


class Recorder:
    """Makes configs whose reads are noted, by dotted key, while a stage runs."""

    def __init__(self) -> None:
        self.stage = ""
        self.read: dict[str, set[str]] = {stage: set() for stage in STAGES}

    def of(self, original: Any, path: str = "") -> Any:
        """A copy of a config dataclass, of a subclass of its class: `replace` and `asdict` work on it."""
        recorder, cls = self, type(original)
        fields = {field.name for field in dataclasses.fields(original)}

        def getattribute(self: Any, name: str) -> Any:
            value = object.__getattribute__(self, name)
            if name in fields and recorder.stage and not dataclasses.is_dataclass(value):
                recorder.read[recorder.stage].add(path + name)
            return value

        made = object.__new__(type(cls.__name__, (cls,), {"__getattribute__": getattribute}))
        for name in fields:
            value = getattr(original, name)
            inner = self.of(value, f"{path}{name}.") if dataclasses.is_dataclass(value) else value
            object.__setattr__(made, name, inner)
        return made


@pytest.fixture
def recorded(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, set[str]]]:
    """Runs a recipe and returns the keys that each stage read."""
    from rlhf import pipeline, work

    def run(**changes: Any) -> dict[str, set[str]]:
        recorder = Recorder()
        for stage, do in work._STAGES.items():

            def watched(*arguments: Any, stage: str = stage, do: Any = do) -> Any:
                recorder.stage = stage
                try:
                    return do(*arguments)
                finally:
                    recorder.stage = ""

            monkeypatch.setitem(work._STAGES, stage, watched)
        settings = config.build(RLHFRun, changes, {}, "test")
        pipeline.run_stages(recorder.of(settings), here / "run")
        return recorder.read

    return run


def test_each_stage_reads_the_keys_of_the_table_and_no_others(
    recorded: Callable[..., dict[str, set[str]]],
) -> None:
    write(Path("eval.jsonl"), [{"prompt": word} for word in ("rye", "tea")])
    settings = changed(
        model={"lora_rank": 2},
        data={"eval_prompts": "eval.jsonl"},
        ppo={"ptx_coef": 0.5},
        eval={"labeler": {"name": "python:judge.py:count", "tie_margin": 0.5}},
    )
    read = recorded(**settings)
    never = ("tracking.", "keep_checkpoints", "name", "start_from", "pipeline", "device.")
    for stage in STAGES:
        declared = relevant(config.build(RLHFRun, settings, {}, "test"), stage).keys()
        # data.prompts falls back on the demonstrations, and eval.labeler on whoever collects.
        falls_back = {"data.demonstrations", "data.comparisons", "collect.labeler"}
        watched = {*WATCHES.get(stage, ())}
        computes = {
            key
            for key in read[stage]
            if not key.startswith(never) and key.rpartition(".")[2] not in CHANGES_NOTHING
        }
        # Of all data SFT asks whether they are conversations, which decides what token ends an answer.
        falls_back = {*falls_back, *(["data.prompts"] if stage == "sft" else [])}
        undeclared = computes - declared - watched - falls_back
        assert not undeclared, f"{stage} depends on {sorted(undeclared)}; say so in READS"
        idle = {key for key in declared if not key.startswith(f"{stage}.")} - read[stage]
        assert not idle, f"{stage} reads no {sorted(idle)}"


def test_a_key_in_the_table_is_one_of_the_config() -> None:
    known = set(relevant_names())
    for stage, names in READS.items():
        for name in (*names, *WATCHES.get(stage, ())):
            group, _, key = name.partition(".")
            assert name in known or (key == "*" and any(one.startswith(f"{group}.") for one in known)), name


def relevant_names() -> Iterator[str]:
    for key, value in config.to_dict(RLHFRun()).items():
        yield from (f"{key}.{inner}" for inner in value) if isinstance(value, dict) else [key]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_begun_before_a_key_was_there_had_its_default(stage: str) -> None:
    """Any key, and whole groups: what a newer version adds keeps no older run from being resumed."""
    now, whole = RLHFRun(), config.to_dict(RLHFRun())
    for name in relevant_names():
        group, _, key = name.partition(".")
        older = json.loads(json.dumps(whole))
        del (older[group] if key else older)[key or group]
        for earlier in (older, {k: v for k, v in whole.items() if k != group}):
            assert relevant(earlier, stage, watched=True) == relevant(now, stage, watched=True), name


@pytest.mark.parametrize(
    ("arguments", "concerned"),
    [
        (["--ppo.kl_coef=0.5"], ["ppo"]),
        (["--data.eval_prompts=more.jsonl"], ["eval"]),
        (["--data.prompts=more.jsonl"], ["collect", "ppo", "eval"]),
        (["--data.max_new_tokens=9"], ["collect", "ppo", "eval"]),
        (["--data.max_length=31"], list(STAGES)),
        (["--reward.held_out=0.2"], ["reward"]),
        (["--reward.epochs=2"], ["reward"]),
        (["--collect.answers=3"], ["collect"]),
        (["--collect.labeler={name: vader}"], ["collect", "eval"]),
        (["--eval.labeler={name: vader}"], ["eval"]),
        (["--eval.samples=3"], ["eval"]),
        (["--seed=1"], list(STAGES)),
        (["--model.labgpt.width=32"], ["sft"]),
        (["--model.lora_rank=1"], ["sft", "reward", "ppo"]),
        (["--ppo.ptx_coef=1", "--data.demonstrations=more.jsonl"], list(STAGES)),
        (["--sft.save_every_steps=1", "--device.threads=2", "--keep_checkpoints=1", "--name=x"], []),
    ],
)
def test_a_key_concerns_the_stages_that_read_it(arguments: list[str], concerned: list[str]) -> None:
    """Whatever is changed later, only these ask to be done again."""
    before = config.build(RLHFRun, changed(), {}, "test")
    after = config.build(RLHFRun, changed(), config.split_overrides(arguments), "test")
    assert [s for s in STAGES if relevant(before, s) != relevant(after, s)] == concerned


# ---- later changes ----


def test_a_key_that_no_finished_stage_reads_may_change_later(lab: Lab, a: Path) -> None:
    write(a.parent.parent / "more.jsonl", [{"prompt": word} for word in ("rye", "tea")])
    shutil.rmtree(a / "eval")
    code, said, _ = lab(*("--out", "runs/a", "--data.eval_prompts=more.jsonl", "--sft.save_every_steps=7"))
    assert code == 0
    assert said.count("finished before") == 4
    assert json.loads((a / "eval" / "evaluation.json").read_text())["per_prompt"][0]["prompt"] == "rye"


def test_a_refused_command_has_moved_nothing(lab: Lab, a: Path, here: Path) -> None:
    before = tree(here)
    for arguments, words in (
        (["--from", "ppo", "--sft.epochs=2"], "sft.epochs = 1.0"),
        (["--from", "ppo", "--data.prompts=none.jsonl"], "none.jsonl"),
        (["--from", "ppo", "--eval.labeler={name: vadr}"], "vadr"),
        (["--from", "ppo", "--device.device=cuda"], "not available here"),
        (["--from", "eval", "--data.eval_prompts=none.jsonl"], "none.jsonl"),
        (["--from", "sft", "--start_from=runs/none"], "runs/none"),
    ):
        code, _, line = lab("--out", "runs/a", *arguments)
        assert (code, tree(here)) == (2, before), arguments
        assert words in line
    weights = a / "sft" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    before = tree(here)
    code, _, line = lab("--out", "runs/a", "--from", "ppo")
    assert (code, tree(here)) == (2, before)
    assert "altered since it was written" in line


def test_a_stage_that_another_process_runs_is_not_put_aside(lab: Lab, a: Path, here: Path) -> None:
    from lab import locks

    before = tree(here)
    with (a / "ppo" / ".lock").open("w") as file:
        assert locks.lock(file)
        code, _, line = lab("--out", "runs/a", "--from", "reward")
    assert (code, tree(here)) == (2, before)
    assert "is running just now" in line


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file of a folder with what is in it, but for the config that the test wrote."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.is_file() or path.is_symlink()) and path.name != "config.yaml" and path.suffix != ".pyc"
    }


def test_a_finished_stage_keeps_its_model_and_no_checkpoints(a: Path) -> None:
    for stage in ("sft", "reward", "ppo"):
        assert list((a / stage / "checkpoints").iterdir()) == []
        assert (a / stage / "model" / "model.safetensors").exists()
        assert not list((a / stage).rglob("optimizer*"))


def test_a_finished_recipe_says_so_without_reading_its_data(
    lab: Lab, a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf import data

    read: list[Any] = []
    load = data.load
    monkeypatch.setattr(data, "load", lambda *all_, **named: read.append(all_) or load(*all_, **named))
    code, said, _ = lab("--out", "runs/a")
    assert (code, said.count("finished before")) == (0, 5)
    assert read == []


def test_a_model_that_is_fine_tuned_already_is_taken_as_it_is(lab: Lab, a: Path, here: Path) -> None:
    model = {"model": {"path": "runs/a/sft/model", "labgpt": {}}, "sft": {"epochs": 0}}
    assert lab("--out", "runs/b", "--stage", "sft", **model)[0] == 0
    one, other = (load_file(here / "runs" / name / "sft" / "model" / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    assert "eval/loss" in Run.open(here / "runs" / "b" / "sft").info["summary"]


def test_an_evaluation_says_where_the_data_have_changed_since(a: Path, here: Path, capsys: Any) -> None:
    """Which prompts are unseen follows from the data."""
    rows = (here / "demonstrations.jsonl").read_text().splitlines()
    said = "demonstrations.jsonl held other rows when the stages were trained"
    for kept, found in ((rows, False), (rows[1:], True)):
        (here / "demonstrations.jsonl").write_text("".join(f"{row}\n" for row in kept))
        capsys.readouterr()
        assert main(["evaluate", "runs/a", "--prompts", "1", "--samples", "2", "--json", "--trust"]) == 0
        warnings = json.loads(capsys.readouterr().out)["warnings"]
        assert any(said in line for line in warnings) == found


def test_options_that_mean_nothing_here_are_refused(lab: Lab, a: Path, capsys: Any) -> None:
    for arguments, word in (
        (["evaluate", "runs/a", "--checkpoint", "latest"], "--checkpoint"),
        (["evaluate", "runs/a", "--epsilon", "0.1"], "--epsilon"),
        (["rlhf", "config.yaml", "--smoke", "--stage", "sft"], "--smoke runs all stages"),
        (["collect", "config.yaml", "--smoke"], "--smoke runs all stages"),
    ):
        (a.parent.parent / "config.yaml").write_text(yaml.safe_dump(changed()))
        assert main(arguments) == 2
        assert word in capsys.readouterr().err


# ---- shared stages ----


def test_another_recipe_takes_what_it_has_in_common(lab: Lab, a: Path, here: Path) -> None:
    code, said, _ = lab("--out", "runs/b", ppo={"kl_coef": 0.5}, start_from="runs/a")
    assert code == 0
    for stage in ("sft", "collect", "reward"):
        assert f"{stage:8} taken from runs/a/{stage}" in said
        assert not (here / "runs" / "b" / stage).exists()
    b = here / "runs" / "b"
    parents = {p["stage"]: p for p in Run.open(b / "ppo").info["parents"] if "stage" in p}
    for stage in ("sft", "reward"):
        record = Run.open(a / stage).info
        assert parents[stage]["sha256"] == record["summary"]["result"]["sha256"]
        assert parents[stage]["run_id"] == record["id"]
    # It goes on, is evaluated and talked to like any other.
    assert lab("--out", "runs/b", ppo={"kl_coef": 0.5}, start_from="runs/a")[1].count("finished before") == 5
    assert lab("--out", "runs/b", ppo={"kl_coef": 0.5})[1].count("finished before") == 5
    assert main(["evaluate", "runs/b", "--prompts", "1", "--samples", "2", "--trust"]) == 0
    assert main(["chat", "runs/b", "--prompt", "pea", "--max_new_tokens", "2"]) == 0
    assert main(["compare", "runs", "--metric", "eval/win_rate", "--by", "ppo.kl_coef"]) == 0
    # And a third takes of it what it took itself.
    code, said, _ = lab("--out", "runs/c", "--stage", "ppo", ppo={"kl_coef": 0.1}, start_from="runs/b")
    assert code == 0
    assert said.count("taken from runs/a/") == 3


def test_the_same_seed_trains_the_same_policy_from_taken_stages(lab: Lab, a: Path, here: Path) -> None:
    assert lab("--out", "runs/b", start_from="runs/a")[0] == 0
    one, other = (
        json.loads((here / "runs" / name / "ppo" / "model" / "manifest.json").read_text()) for name in "ab"
    )
    assert one["files"]["model.safetensors"] == other["files"]["model.safetensors"]


def test_what_differs_is_done_here_and_said(lab: Lab, a: Path, here: Path) -> None:
    code, said, _ = lab("--out", "runs/b", "--stage", "reward", reward={"epochs": 2.0}, start_from="runs/a")
    assert code == 0
    assert "reward   not taken: reward.epochs is 2.0 here and 1.0 there (in runs/a)" in said
    assert [path.name for path in sorted((here / "runs" / "b").iterdir())] == ["reward", "taken.json"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sft": {"epochs": 2.0}}, ["sft.epochs is 2.0 here and 1.0 there"]),
        ({"start_from": "runs/aa"}, ["start_from = 'runs/aa'", "'runs/a'?"]),
        ({"start_from": "."}, ["start_from = '.': holds no run"]),
        ({"start_from": "runs/b"}, ["is this recipe itself"]),
    ],
)
def test_a_recipe_that_has_nothing_in_common_is_refused(
    lab: Lab, a: Path, here: Path, changes: dict[str, Any], words: list[str]
) -> None:
    code, _, line = lab("--out", "runs/b", **{"start_from": "runs/a", **changes})
    assert code == 2
    assert all(word in line for word in words), line
    assert not (here / "runs" / "b").exists()


def test_other_rows_in_the_same_file_are_not_the_same_data(lab: Lab, a: Path, here: Path) -> None:
    rows = (here / "demonstrations.jsonl").read_text().splitlines()
    (here / "demonstrations.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    code, _, line = lab("--out", "runs/b", start_from="runs/a")
    assert code == 2
    assert "other rows in demonstrations.jsonl" in line


def test_a_taken_stage_that_is_gone_or_altered_is_refused_and_found_again(
    lab: Lab, a: Path, here: Path
) -> None:
    assert lab("--out", "runs/b", "--stage", "ppo", start_from="runs/a")[0] == 0
    weights = a / "sft" / "model" / "model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + b"x")
    code, _, line = lab("--out", "runs/b")
    assert code == 2
    assert "runs/a/sft/model: altered since it was written" in line
    weights.write_bytes(right)
    (here / "archive").mkdir()
    a.rename(here / "archive" / "a")
    for command in (["rlhf", "config.yaml", "--trust", "--out", "runs/b"], ["evaluate", "runs/b", "--trust"]):
        assert main(command) == 2
    code, _, line = lab("--out", "runs/b")
    assert code == 2
    assert "its sft stage is that of runs/a/sft, which was deleted, moved or made again" in line
    assert lab("--out", "runs/b", start_from="archive/a")[0] == 0
    assert lab("--out", "runs/b")[1].count("finished before") == 5  # it was noted


def test_from_makes_a_taken_stage_the_recipes_own(lab: Lab, a: Path, here: Path) -> None:
    assert lab("--out", "runs/b", "--stage", "ppo", start_from="runs/a")[0] == 0
    assert lab("--out", "runs/b", "--from", "reward", start_from="runs/a")[0] == 0
    b = here / "runs" / "b"
    assert sorted(path.name for path in b.iterdir()) == ["eval", "ppo", "ppo.old1", "reward", "taken.json"]
    shutil.rmtree(b / "reward")
    shutil.rmtree(b / "ppo")
    shutil.rmtree(b / "eval")
    assert "reward   taken" not in lab("--out", "runs/b", "--stage", "reward", start_from="runs/a")[1]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 9, "stages": {}, "own": []}', '{"format": 1, "stages": {"sft": 1}}']
)
def test_a_damaged_list_of_taken_stages_is_one_line(lab: Lab, a: Path, text: str) -> None:
    (a / "taken.json").write_text(text)
    code, _, line = lab("--out", "runs/a")
    assert code == 2
    assert "taken.json: damaged" in line


@pytest.mark.parametrize("group", ["eval", "model"])
def test_a_recorded_config_whose_groups_are_none_is_one_line(lab: Lab, a: Path, group: str) -> None:
    path = a / "sft" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"config": record["config"] | {group: "=1+1"}}))
    code, _, line = lab("--out", "runs/a")
    assert code == 2
    assert f"config.{group} holds no keys. Restore the file from a copy." in line
    assert line.count("\n") <= 1


def test_recipes_in_one_folder_share_what_they_have_in_common(lab: Lab, a: Path, here: Path) -> None:
    """As the runs of a sweep do."""
    code, said, _ = lab("--out", "runs/b", "--stage", "ppo", ppo={"kl_coef": 0.5}, start_from="siblings")
    assert (code, said.count("taken from runs/a/")) == (0, 3)
    code, said, _ = lab("--out", "runs/c", "--stage", "sft", "--seed=1", start_from="siblings")
    assert code == 0
    assert "taken" not in said
    assert (here / "runs" / "c" / "sft" / "model").exists()


def test_of_siblings_that_begin_at_once_one_trains_and_the_others_wait(lab: Lab, here: Path) -> None:
    from rlhf import sharing
    from rlhf.pipeline import Recipe

    settings = config.build(RLHFRun, changed() | {"start_from": "siblings"}, {}, "test")
    here_is_one = threading.Event()
    trained = []

    def train() -> bool:
        here_is_one.set()
        time.sleep(0.3)
        assert lab("--out", "runs/a", "--stage", "sft")[0] == 0
        trained.append("a")
        return True

    def first() -> None:
        sharing.claim(Recipe(settings, here / "runs" / "a"), "sft", train)

    thread = threading.Thread(target=first)
    thread.start()
    assert here_is_one.wait(10)
    b = Recipe.open(settings, here / "runs" / "b")
    assert sharing.claim(b, "sft", lambda: pytest.fail("it was to wait"))
    thread.join()
    assert trained == ["a"]
    assert b.result("sft") == here / "runs" / "a" / "sft" / "model"
