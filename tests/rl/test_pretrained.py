"""A body that begins with what autoencoding taught it: same weights, same sight, and clear mistakes."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from lab import config
from lab.device import Compute
from lab.errors import LabError
from lab.run import Run
from rl import pretrained
from rl.config import RunConfig, run_config_class
from rl.evaluate import load_player
from rl.pipeline import RLPipeline
from rl.train import make_agent
from supervised import config as supervised_config
from supervised.objectives.autoencoding import Autoencoding
from supervised.pipeline import SupervisedPipeline

SIDE = 24
BODY = {
    "channels": [4, 4, 4],
    "kernels": [5, 4, 3],
    "strides": [2, 2, 2],
    "paddings": [2, 1, 1],
    "norm": "layer",
}
SPEC = {**BODY, "width": 16}
QUIET = {
    "device": {"device": "cpu", "precision": "fp32", "threads": 1},
    "tracking": {"wandb": "disabled"},
}


def pretrain(folder: Path, frames: int = 4, model: dict[str, Any] | None = None, **more: Any) -> Path:
    """A run of autoencoding on noise, in `folder`/run."""
    play = np.random.default_rng(0).integers(0, 256, (60, SIDE, SIDE), dtype=np.uint8)
    folder.mkdir(exist_ok=True)
    np.savez(folder / "frames.npz", frames=play, begins=np.arange(60) == 0, actions=np.zeros(60, np.uint8))
    values = {
        "objective": {"name": "autoencoding", "frames": frames, "foretell": 1, "decoder_width": 4},
        "data": {"source": str(folder / "frames.npz")},
        "model": {"backbone": "nature_cnn", "spec": SPEC, **(model or {})},
        "batch_size": 8,
        "max_steps": 3,
        **QUIET,
        **more,
    }
    cls = supervised_config.run_config_class(values, lambda _: "test")
    SupervisedPipeline().train(config.build(cls, values, {}, "test"), folder / "run", resume=False)
    return folder / "run"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(tmp_path_factory.mktemp("seen"))


def settings_of(algorithm: str, start_from: Path | None, **agent: Any) -> RunConfig:
    by_algorithm: dict[str, dict[str, Any]] = {
        "pqn": {"rollout_steps": 8, "minibatch_size": 16},
        "dqn": {"buffer_size": 500, "learning_starts": 40, "batch_size": 8},
        "drqn": {"buffer_size": 500, "learning_starts": 40, "batch_size": 2, "sequence_steps": 4},
    }
    memory = {"backbone": "lstm", "backbone_spec": {**SPEC, "hidden": 8}}
    values = {
        "env": {"game": "pong", "n_envs": 2, "image_size": SIDE, "num_threads": 1, "max_episode_frames": 200},
        "agent": {
            "algorithm": algorithm,
            "backbone_spec": SPEC,
            "start_from": None if start_from is None else str(start_from),
            **by_algorithm[algorithm],
            **(memory if algorithm == "drqn" else {}),
            **agent,
        },
        "total_steps": 64,
        "eval": {"every_steps": 64, "episodes": 1},
        "checkpoint": {"every_steps": 32},
        "film": {"max_steps": 0},
        **QUIET,
    }
    return config.build(run_config_class(values, lambda _: "test"), values, {}, "test")


def agent_of(settings: RunConfig, precision: str = "fp32") -> Any:
    return make_agent(settings, Compute(torch.device("cpu"), precision, 1, "test"))


def body_of(run: Path) -> dict[str, torch.Tensor]:
    mark = "model.backbone."
    weights = load_file(run / "checkpoints" / "best" / "model.safetensors")
    return {key.removeprefix(mark): value for key, value in weights.items() if key.startswith(mark)}


@pytest.mark.parametrize("algorithm", ["pqn", "dqn", "drqn"])
def test_the_body_lands_in_both_networks_bit_for_bit(algorithm: str, seen: Path, tmp_path: Path) -> None:
    run = seen if algorithm != "drqn" else pretrain(tmp_path, frames=1)
    agent, untouched = (agent_of(settings_of(algorithm, start)) for start in (run, None))
    parent = pretrained.begin(agent)
    assert parent["run_id"] == Run.open(run).info["id"]
    wanted = body_of(run)
    assert len(wanted) > 10
    prefix = "features_extractor.backbone." + ("eyes." if algorithm == "drqn" else "")
    for net, before in (
        (agent.policy.q_net, untouched.policy.q_net),
        (agent.policy.q_net_target, untouched.policy.q_net_target),
    ):
        state, old = net.state_dict(), before.state_dict()
        assert {key.removeprefix(prefix) for key in state if key.startswith(prefix)} == wanted.keys()
        for key, value in state.items():
            inside = key.startswith(prefix)
            assert torch.equal(value, wanted[key.removeprefix(prefix)] if inside else old[key]), key
    assert not torch.equal(untouched.policy.q_net.state_dict()[f"{prefix}fc.weight"], wanted["fc.weight"])
    # What the optimiser moves are these weights, not ones that they took the place of.
    moved = {id(p) for group in agent.policy.optimizer.param_groups for p in group["params"]}
    assert moved == {id(p) for p in agent.policy.q_net.parameters()}


def test_the_target_network_of_bf16_has_them_rounded(seen: Path) -> None:
    agent = agent_of(settings_of("dqn", seen), "bf16")
    pretrained.begin(agent)
    for name, value in body_of(seen).items():
        assert torch.equal(agent.policy.q_net.features_extractor.backbone.state_dict()[name], value)
        target = agent.policy.q_net_target.features_extractor.backbone.state_dict()[name]
        assert torch.equal(target, value.bfloat16())


def test_both_see_the_same_in_the_same_bytes(seen: Path) -> None:
    """Features of an agent's bytes are those of the images that pretraining shows, uncorrupted."""
    from supervised.evaluate import open_objective

    run = Run.open(seen)
    saved = pretrained.find(str(seen))[1]
    objective: Any = open_objective(run, saved, torch.device("cpu"))
    assert isinstance(objective, Autoencoding)
    batch = next(objective.batches("test", torch.device("cpu")).epoch(0))
    shown: list[torch.Tensor] = []
    backbone: Any = objective.players["model"].backbone
    backbone.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    features: list[torch.Tensor] = []
    backbone.register_forward_hook(lambda _, inputs, output: features.append(output))
    object.__setattr__(objective, "config", type(objective.config)(noise=0.0, mask=0.0, foretell=1))
    agent = agent_of(settings_of("pqn", seen))
    pretrained.begin(agent)
    with torch.no_grad():
        objective._parts(objective.players["model"], batch)
        q_net = agent.policy.q_net
        heard: list[torch.Tensor] = []
        q_net.features_extractor.register_forward_hook(lambda _, inputs, output: heard.append(output))
        q_net(batch["frames"][:, :4])
    assert shown[0].max() <= 1
    torch.testing.assert_close(heard[0], features[0], rtol=1e-4, atol=1e-5)
    assert features[0].std() > 0.1


@pytest.mark.slow
def test_the_run_names_its_parent_and_goes_on_without_it(tmp_path: Path) -> None:
    parent = pretrain(tmp_path / "first")
    identity = Run.open(parent).info["id"]
    settings = settings_of("pqn", parent)
    RLPipeline().train(settings, tmp_path / "whole", resume=False)
    run = Run.open(tmp_path / "whole")
    assert [found["run_id"] for found in run.info["parents"]] == [identity]
    manifest = json.loads((parent / "checkpoints" / "best" / "manifest.json").read_text())
    assert run.info["parents"][0]["sha256"] == manifest["files"]["model.safetensors"]["sha256"]
    killed = Path(shutil.copytree(tmp_path / "whole", tmp_path / "killed", symlinks=True))
    shutil.rmtree(killed / "checkpoints" / f"step_{64:012d}")
    (killed / "run.json").write_text((killed / "run.json").read_text().replace('"finished"', '"running"'))
    shutil.rmtree(parent)
    RLPipeline().train(settings, killed, resume=True)
    one, other = (load_file(r / "checkpoints" / "latest" / "model.safetensors") for r in (run.folder, killed))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert Run.open(killed).info["parents"] == run.info["parents"]


def test_without_a_checkpoint_a_resumed_run_begins_with_them_again(seen: Path, tmp_path: Path) -> None:
    settings = settings_of("pqn", seen)
    RLPipeline().train(settings, tmp_path / "whole", resume=False)
    killed = Path(shutil.copytree(tmp_path / "whole", tmp_path / "killed", symlinks=True))
    for path in (killed / "checkpoints").glob("*"):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    (killed / "run.json").write_text((killed / "run.json").read_text().replace('"finished"', '"running"'))
    RLPipeline().train(settings, killed, resume=True)
    one, other = (
        load_file(tmp_path / r / "checkpoints/latest/model.safetensors") for r in ("whole", "killed")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def refused(settings: RunConfig, folder: Path) -> str:
    with pytest.raises(LabError) as caught:
        RLPipeline().train(settings, folder / "agent", resume=False)
    assert not (folder / "agent").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        ({"backbone_spec": {**SPEC, "width": 32}}, "has width = 16, the agent's 32. Make model.spec and"),
        ({"backbone_spec": {**SPEC, "strides": [2, 2, 1]}}, "has strides = [2, 2, 2], the agent's [2, 2, 1]"),
        (
            {"backbone": "impala_cnn", "backbone_spec": {}},
            "its backbone is nature_cnn, the agent's impala_cnn",
        ),
    ],
)
def test_another_backbone_is_refused(agent: dict[str, Any], said: str, seen: Path, tmp_path: Path) -> None:
    assert said in refused(settings_of("pqn", seen, **agent), tmp_path)


def test_other_images_are_refused(seen: Path, tmp_path: Path) -> None:
    other = config.to_dict(settings_of("pqn", seen))
    other["env"]["image_size"] = 28
    settings = config.build(run_config_class(other, lambda _: "test"), other, {}, "test")
    assert "img_size = [24, 24], the agent's [28, 28]. Record frames of env.image_size" in refused(
        settings, tmp_path
    )
    assert "in_chans = 4, the agent's 1. Let it see as many" in refused(settings_of("drqn", seen), tmp_path)


def test_batch_norms_which_agents_do_without_are_refused(tmp_path: Path) -> None:
    run = pretrain(tmp_path / "first", model={"backbone": "resnet8", "spec": {"width": 4}})
    settings = settings_of("pqn", run, backbone="resnet8", backbone_spec={"width": 4})
    assert "its backbone is another one" in refused(settings, tmp_path)


def test_runs_that_are_none_are_refused(seen: Path, tmp_path: Path) -> None:
    assert "nowhere': no run: there is no run.json" in refused(
        settings_of("pqn", tmp_path / "nowhere"), tmp_path
    )
    run = Path(shutil.copytree(seen, tmp_path / "run", symlinks=True))
    settings, record = settings_of("pqn", run), (run / "run.json").read_text()
    (run / "run.json").write_text(record.replace('"finished"', '"interrupted"'))
    assert "the run is interrupted, not finished" in refused(settings, tmp_path)
    (run / "run.json").write_text(record.replace('"autoencoding"', '"classification"'))
    assert "a run of classification, whose network does not see pixels as" in refused(settings, tmp_path)
    (run / "run.json").write_text(record.replace('"pipeline": "supervised"', '"pipeline": "rl"'))
    assert "run.json: unknown key 'objective'" in refused(settings, tmp_path)
    (run / "run.json").write_text(record.replace('"pipeline": "supervised"', '"pipeline": "rlhf"'))
    assert "a run of rlhf" in refused(settings, tmp_path)
    (run / "run.json").write_text(record)
    weights = run / "checkpoints" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "truncated" in refused(settings, tmp_path)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    assert "no checkpoint 'best'" in refused(settings, tmp_path)


@pytest.mark.parametrize(
    "algorithm", ["pqn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dqn", "drqn"))]
)
def test_a_run_begins_with_all_the_weights_of_another_agents(tmp_path: Path, algorithm: str) -> None:
    """With another learning rate, too; the optimiser, the memory and exploration begin as ever."""
    first = settings_of(algorithm, None)
    RLPipeline().train(first, tmp_path / "first", resume=False)
    for named in (tmp_path / "first", tmp_path / "first/checkpoints/latest"):
        agent = agent_of(settings_of(algorithm, named, learning_rate=1e-5))
        before = load_file(named / "model.safetensors") if "latest" in named.name else None
        parent = pretrained.begin(agent)
        assert parent["stage"] == "agent"
        weights = before or load_file(tmp_path / "first/checkpoints/best/model.safetensors")
        for net in (agent.policy.q_net, agent.policy.q_net_target):
            for key, value in net.state_dict().items():
                torch.testing.assert_close(value, weights[key], rtol=0, atol=0)
        assert agent.num_timesteps == 0
        assert agent.epsilon() == 1.0
        assert not agent.policy.optimizer.state
    RLPipeline().train(settings_of(algorithm, tmp_path / "first"), tmp_path / "second", resume=False)
    record = json.loads((tmp_path / "second/run.json").read_text())
    assert record["parents"][0]["run_id"] == json.loads((tmp_path / "first/run.json").read_text())["id"]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of pqn."""
    folder = tmp_path_factory.mktemp("played") / "first"
    RLPipeline().train(settings_of("pqn", None), folder, resume=False)
    return folder


def test_another_agent_whose_network_is_another_is_refused(played: Path, tmp_path: Path) -> None:
    for change, said in (
        ({"dueling": True}, "Different: agent.dueling. Make it the same"),
        ({"backbone_spec": {**SPEC, "width": 8}}, "Different: agent.backbone_spec."),
        ({"backbone": "impala_cnn", "backbone_spec": {}}, "Different: agent.backbone, agent.backbone_spec"),
    ):
        assert said in refused(settings_of("pqn", played, **change), tmp_path)
    other = settings_of("pqn", played)
    other = replace(other, env=replace(other.env, full_action_space=True))
    assert "Different: actions (NOOP FIRE RIGHT LEFT RIGHTFIRE LEFTFIRE, here" in refused(other, tmp_path)


def test_another_agents_other_game_is_said(played: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights fit, and may be meant, but see and do other things."""
    same = settings_of("pqn", played)
    other = replace(same, env=replace(same.env, game="bowling", frame_skip=2, image_size=SIDE + 1))
    capsys.readouterr()
    pretrained.begin(agent_of(same))
    assert not capsys.readouterr().err
    pretrained.begin(agent_of(other))
    assert capsys.readouterr().err == (
        f"note: agent.start_from = {played}: its agent had another env.game (pong, here "
        "bowling), env.image_size (24, here 25), env.frame_skip (4, here 2), actions (NOOP FIRE RIGHT "
        "LEFT RIGHTFIRE LEFTFIRE, here NOOP FIRE UP DOWN UPFIRE DOWNFIRE).\n"
    )


def exchange(checkpoint: Path, data: bytes) -> None:
    """Puts other weights into a checkpoint, with a manifest that vouches for them."""
    (checkpoint / "model.safetensors").write_bytes(data)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_other_weights_under_a_right_manifest_are_one_line(played: Path, tmp_path: Path) -> None:
    shutil.copytree(played, tmp_path / "first", symlinks=True)
    best = tmp_path / "first/checkpoints/best"
    weights = load_file(best / "model.safetensors")
    name = next(iter(weights))
    settings = settings_of("pqn", tmp_path / "first")
    for data, said in (
        (
            save(weights | {name: weights[name] * np.nan}),
            f"{name} is not finite: the run diverged, or it",
        ),
        (save({"x": weights[name]}), "Its run.json describes another network than its weights. Restore"),
        (
            b"version https://git-lfs.github.com/spec/v1",
            "model.safetensors: Error while deserializing header",
        ),
    ):
        exchange(best, data)
        assert said in refused(settings, tmp_path)
        with pytest.raises(LabError, match=r"Restore|Name another checkpoint") as caught:
            load_player(Run.open(tmp_path / "first"), "best")
        assert "\n" not in str(caught.value)
