"""The recipe with W&B at hand: one group, a job type a stage, and artifacts that tell what came of what.

The command and the client are real; only the server is a stand-in.
"""

from pathlib import Path

import torch
from safetensors.torch import load, load_file

from lab.run import Run
from tests.conftest import LabCommand
from tests.lab.wandb_stand_in import WandbStandIn
from tests.lab.wandb_world import KEY
from tests.rlhf.test_recipe import CONFIG, SMALL, STAGES


def test_wandb_has_every_stage_its_checkpoints_and_what_it_started_from(
    lab_command: LabCommand, tmp_path: Path
) -> None:
    with WandbStandIn() as server:
        # HOME, too, which makes it no fork: W&B's client looks at the environment when it is imported.
        env = {"HOME": str(tmp_path), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        done = lab_command(
            "rlhf",
            CONFIG,
            "--out",
            "run",
            *SMALL,
            "--tracking.wandb=online",
            cwd=tmp_path,
            env=env,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    infos = {stage: Run.open(tmp_path / "run" / stage).info for stage in STAGES}
    by_id = {run.name: run for run in server.runs.values()}
    kinds = ["sft", "collect", "rm", "ppo", "eval"]
    assert [by_id[infos[stage]["id"]].settings["jobType"] for stage in STAGES] == kinds
    assert len({run.settings["groupName"] for run in by_id.values()}) == 1

    group = infos["sft"]["group"]
    left = {
        name: server.aliases["deep-rl-lab", f"{group}-{name}:latest"]
        for name in ("sft", "collect", "reward", "ppo")
    }
    used = {stage: {id_ for run, id_ in server.uses if run == infos[stage]["id"]} for stage in STAGES}
    assert used["reward"] == {left["sft"].id, left["collect"].id}
    assert used["ppo"] == {left["sft"].id, left["reward"].id}

    for stage in ("sft", "reward", "ppo"):
        info = infos[stage]
        version = server.aliases["deep-rl-lab", f"{info['name']}-{info['id']}:latest"]
        sent = load(version.files["model.safetensors"])
        kept = load_file(tmp_path / "run" / stage / "model" / "model.safetensors")
        # The last checkpoint, which a finished stage no longer keeps; its names are those in memory.
        numbers = [
            torch.cat([tensor.flatten() for tensor in of.values()]).sort().values for of in (sent, kept)
        ]
        assert torch.equal(*numbers)
        assert not [name for name in version.files if "optimizer" in name]
