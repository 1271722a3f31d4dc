"""Our agents in SB3's hands: callbacks, zip files, `learn` more than once, and stock SB3 on an export."""

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import DQN as StockDQN
from stable_baselines3 import PPO as StockPPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecCheckNan, VecFrameStack, VecMonitor, VecNormalize

from lab.device import Compute
from lab.errors import LabError
from rl.agent import DQN, QLearner
from rl.config import DQNConfig, DRQNConfig, PQNConfig
from rl.drqn import DRQN
from rl.envs import AtariVecEnv
from rl.policy import BackboneQPolicy
from rl.pqn import PQN
from tests.rl.conftest import SMALL_NET

CPU = Compute(torch.device("cpu"), "fp32", 1, "test")
OFF_POLICY: dict[str, Any] = {
    **{
        "buffer_size": 500,
        "learning_starts": 16,
        "batch_size": 2,
        "target_update_steps": 32,
        "train_freq": 4,
    },
    **{"exploration_steps": 100, "backbone_spec": SMALL_NET},
}
AGENTS = ["dqn", "drqn", "pqn"]


def make_env(n_envs: int = 2, seed: int = 0, limit: int = 120) -> AtariVecEnv:
    return AtariVecEnv("pong", n_envs, seed, image_size=44, num_threads=1, max_episode_frames=limit)


def make(name: str, n_envs: int = 2, **env: Any) -> QLearner:
    games = make_env(n_envs, **env)
    if name == "dqn":
        return DQN(DQNConfig(**OFF_POLICY), games, CPU, 0)
    if name == "drqn":
        recurrent = {"backbone_spec": {**SMALL_NET, "hidden": 8}, "sequence_steps": 2, "burn_in_steps": 1}
        return DRQN(DRQNConfig(**(OFF_POLICY | recurrent)), games, CPU, 0)
    return PQN(PQNConfig(rollout_steps=8, minibatch_size=8, backbone_spec=SMALL_NET), games, CPU, 0)


class Noting(BaseCallback):
    """Writes down what it is told, and says stop at call `stop_at`, once."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.told: list[str] = []
        self.steps: list[int] = []
        self.seen: set[str] = set()
        self.stop_at = stop_at

    def _on_training_start(self) -> None:
        self.told.append("training starts")
        self.seen |= set(self.locals)

    def _on_rollout_start(self) -> None:
        self.told.append("rollout starts")

    def _on_step(self) -> bool:
        self.told.append("step")
        self.steps.append(self.num_timesteps)
        self.seen |= set(self.locals)
        for key in {"infos", "dones", "new_obs", "rewards", "actions"} & set(self.locals):  # a child has none
            assert len(self.locals[key]) == self.training_env.num_envs
        return self.n_calls != self.stop_at

    def _on_rollout_end(self) -> None:
        self.told.append("rollout ends")

    def _on_training_end(self) -> None:
        self.told.append("training ends")


def stock(name: str) -> Any:
    """SB3's own algorithm with rollouts as long as those of `make`, on the same environment."""
    kwargs = {"backbone_spec": SMALL_NET}
    if name == "pqn":
        ppo = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "device": "cpu"}
        return StockPPO(
            "CnnPolicy", make_env(), policy_kwargs={"features_extractor_class": FlattenExtractor}, **ppo
        )
    return StockDQN(
        BackboneQPolicy,
        make_env(),
        buffer_size=500,
        learning_starts=16,
        batch_size=2,
        train_freq=2,  # steps of both environments
        policy_kwargs=kwargs,
        device="cpu",
    )


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("stop_at", [None, 5])
def test_callbacks_are_told_what_stock_sb3_tells_them_and_when(name: str, stop_at: int | None) -> None:
    ours, theirs = Noting(stop_at), Noting(stop_at)
    agent, reference = make(name), stock(name)
    agent.learn(64, callback=ours)
    reference.learn(64, callback=theirs)
    assert ours.told == theirs.told
    assert ours.steps == theirs.steps
    assert agent.num_timesteps == reference.num_timesteps == (2 * stop_at if stop_at else 64)
    # The innards of PPO and of SB3's loop are missing: there is no actor, no rollout buffer, no noise.
    innards = {"obs_tensor", "log_probs", "rollout_buffer", "clipped_actions", "action_noise", "train_freq"}
    innards |= {"num_collected_steps", "num_collected_episodes", "learning_starts", "iteration"}
    innards |= {
        "n_steps",
        "n_rollout_steps",
        "idx",
        "done",
        "terminal_obs",
        "terminal_value",
        "continue_training",
    }
    assert theirs.seen - ours.seen - innards == set()


@pytest.mark.parametrize("name", AGENTS)
def test_sb3s_own_callbacks_work(name: str, tmp_path: Path) -> None:
    agent = make(name)
    best = Noting()
    evaluation = EvalCallback(
        make_env(1, 3),
        n_eval_episodes=1,
        eval_freq=20,
        best_model_save_path=str(tmp_path),
        log_path=str(tmp_path),
        callback_on_new_best=CallbackList([best, StopTrainingOnRewardThreshold(1000.0)]),
        callback_after_eval=StopTrainingOnNoModelImprovement(max_no_improvement_evals=50),
        verbose=0,
    )
    callbacks = [
        CheckpointCallback(20, str(tmp_path), save_replay_buffer=True),
        evaluation,
        EveryNTimesteps(40, CheckpointCallback(1, str(tmp_path), name_prefix="every")),
        LogEveryNTimesteps(48),
        StopTrainingOnMaxEpisodes(3),  # 30 steps each, in two environments: six of them in 180 steps
    ]
    agent.learn(400, callback=callbacks)
    assert agent.num_timesteps == 180, "three games in each of two environments"
    assert best.told
    assert evaluation.evaluations_timesteps == [40, 80, 120, 160]
    assert (tmp_path / "rl_model_40_steps.zip").exists()
    assert (tmp_path / "every_40_steps.zip").exists()
    loaded = type(agent).load(tmp_path / "best_model.zip", device="cpu")
    observations = np.random.default_rng(0).integers(0, 256, (5, 4, 44, 44)).astype(np.uint8)
    actions, _ = loaded.predict(observations, deterministic=True)
    assert actions.shape == (5,)
    single, _ = loaded.predict(observations[0], deterministic=True)
    assert single == actions[0]
    assert single.shape == ()


@pytest.mark.parametrize("name", AGENTS)
def test_progress_bar_and_wandb_callbacks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.integration.sb3 import WandbCallback

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of wandb and of tqdm, about themselves
        with wandb.init(project="x", dir=tmp_path):
            callback = WandbCallback(
                model_save_path=str(tmp_path / "saved"), model_save_freq=10, gradient_save_freq=4
            )
            agent = make(name)
            agent.learn(64, callback=callback, progress_bar=True)
    assert type(agent).load(tmp_path / "saved/model.zip", device="cpu").num_timesteps == 64


@pytest.mark.parametrize("name", AGENTS)
def test_saved_and_loaded_it_goes_on_learning(name: str, tmp_path: Path) -> None:
    agent = make(name)
    agent.learn(96)
    buffer = io.BytesIO()
    agent.save(buffer)
    buffer.seek(0)
    loaded = type(agent).load(buffer, env=make_env(4), device="cpu", custom_objects={"seed": 7})
    assert loaded.seed == 7
    assert loaded.config == agent.config
    assert loaded.num_timesteps == agent.num_timesteps
    for key, value in agent.policy.state_dict().items():
        torch.testing.assert_close(loaded.policy.state_dict()[key], value, rtol=0, atol=0)
    moments, same = (a.policy.optimizer.state_dict()["state"] for a in (agent, loaded))
    assert moments.keys() == same.keys()
    assert moments
    for index, values in moments.items():
        for key, value in values.items():
            torch.testing.assert_close(same[index][key], value, rtol=0, atol=0)
    before = {key: value.clone() for key, value in loaded.policy.q_net.state_dict().items()}
    loaded.learn(96, reset_num_timesteps=False)
    assert loaded.num_timesteps >= 192
    if name != "pqn":
        assert loaded.epsilon() == pytest.approx(0.1), "exploration goes on from where it was"
    assert any(not torch.equal(before[key], value) for key, value in loaded.policy.q_net.state_dict().items())
    loaded.set_parameters(agent.get_parameters())  # type: ignore[arg-type]  (as SB3 documents)
    agent.save(tmp_path / "agent.zip")
    loaded.set_parameters(str(tmp_path / "agent.zip"), device="cpu")
    for key, value in agent.policy.state_dict().items():
        torch.testing.assert_close(loaded.policy.state_dict()[key], value, rtol=0, atol=0)


def test_an_observation_of_another_shape_is_refused_as_by_sb3() -> None:
    with pytest.raises(ValueError, match="shape"):
        make("dqn").predict(np.zeros((3, 7, 7), np.uint8))


@pytest.mark.parametrize("name", ["dqn", "drqn"])
@pytest.mark.parametrize("reset", [True, False])
def test_learning_twice_mixes_no_two_games_in_memory(name: str, reset: bool) -> None:
    """SB3 issue 46. Each stack in memory is one that an environment has shown."""
    agent = make(name, limit=108_000)
    shown: set[bytes] = set()
    step_wait, restart = agent.env.step_wait, agent.env.restart

    def noting_step() -> Any:
        result = step_wait()
        shown.update(row.tobytes() for row in result[0])
        shown.update(info["terminal_observation"].tobytes() for info in result[3] if info)
        return result

    def noting_restart(*seed: int | None) -> np.ndarray:
        shown.update(row.tobytes() for row in restart(*seed))
        return agent.env._observation

    agent.env.step_wait, agent.env.restart = noting_step, noting_restart  # type: ignore[method-assign]
    agent.learn(40)
    if name == "drqn":
        assert not agent._begins.any()  # type: ignore[attr-defined]
    agent.learn(40, reset_num_timesteps=reset)
    assert isinstance(agent, DQN)
    assert agent.replay.size() == 80
    batch = agent.replay.sample(400)
    assert isinstance(batch, ReplayBufferSamples)
    for stacks in (batch.observations, batch.next_observations):
        assert all(stack.numpy().tobytes() in shown for stack in stacks)


def test_a_hidden_state_does_not_run_on_into_fresh_games() -> None:
    agent = make("drqn", limit=108_000)
    assert isinstance(agent, DRQN)
    agent.learn(40)
    begun: list[np.ndarray] = []
    q_values = agent.q_values
    agent.q_values = lambda seen: (begun.append(agent._begins.copy()), q_values(seen))[1]  # type: ignore[method-assign]
    agent.learn(8, reset_num_timesteps=False)
    assert not begun[0].any(), "the same games go on"
    agent.config = DRQNConfig(
        **(OFF_POLICY | {"learning_starts": 1, "backbone_spec": agent.config.backbone_spec})
    )
    agent.num_timesteps = 0
    agent.begin_games()
    next(iter(agent.iterate(10**6)))
    next(iter(agent.iterate(10**6)))
    assert begun[-1].all(), "fresh ones do not"


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lab.run import Run
    from rl.export import export_sb3

    return export_sb3(Run.open(finished_run), "best", tmp_path_factory.mktemp("exported") / "agent.zip")


def test_stock_sb3_trains_an_export_further(exported: Path) -> None:
    side = StockDQN.load(exported, device="cpu").observation_space.shape[-1]  # type: ignore[index]
    env = AtariVecEnv("pong", 2, 1, image_size=side, num_threads=1)
    model = StockDQN.load(exported, env=env, device="cpu", learning_starts=10, buffer_size=200)
    before = {key: value.clone() for key, value in model.q_net.state_dict().items()}
    model.learn(60)
    assert any(not torch.equal(before[key], value) for key, value in model.q_net.state_dict().items())
    assert model.exploration_rate < 0.1, "it does not begin with random play again"


def test_nothing_of_the_emulators_is_pickled(tmp_path: Path) -> None:
    for name in AGENTS:
        agent = make(name)
        agent.learn(32)
        left_out = set(agent._excluded_save_params())
        assert {"env", "compute", "_callback"} <= left_out
        agent.save(tmp_path / name)
        assert (tmp_path / f"{name}.zip").stat().st_size < 2_000_000


def test_a_memory_that_holds_nothing_says_so() -> None:
    agent = make("dqn")
    assert isinstance(agent, DQN)
    with pytest.raises(LabError, match="replay memory: empty"):
        agent.replay.sample(4)


def test_our_agents_are_made_as_any_of_sb3s_is(make_dqn: Callable[..., DQN]) -> None:
    """With nothing but an environment: the defaults are those of the config."""
    agent = PQN(env=make_env(4), device="cpu")
    assert agent.config == PQNConfig()
    assert agent.device.type == "cpu"
    assert DQN(DQNConfig(**OFF_POLICY), make_env(), device="cpu").compute.precision == "fp32"


def test_what_another_class_saved_is_refused(tmp_path: Path, exported: Path) -> None:
    for name in AGENTS:
        make(name).save(tmp_path / name)
    StockDQN("CnnPolicy", make_env(), buffer_size=8, device="cpu").save(tmp_path / "stock")
    StockPPO("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "ppo")
    for cls, others in ((DQN, "drqn pqn"), (DRQN, "dqn pqn"), (PQN, "dqn drqn")):
        for other in (*others.split(), "stock", "ppo"):
            with pytest.raises(LabError, match=rf"^{cls.__name__}\.load: the file holds a .* Open it with"):
                cls.load(tmp_path / f"{other}.zip", device="cpu")
    assert PQN.load(exported, device="cpu").policy.q_net is not None


def test_an_export_of_another_version_of_sb3_is_opened(tmp_path: Path, exported: Path) -> None:
    """Fields of `data` come and go between versions."""
    old = tmp_path / "old.zip"
    with zipfile.ZipFile(exported) as read, zipfile.ZipFile(old, "w") as written:
        for name in read.namelist():
            data = read.read(name)
            if name == "data":
                fields = json.loads(data)
                del fields["n_steps"], fields["replay_buffer_class"]
                data = json.dumps(fields | {"create_eval_env": False, "_episode_storage": None}).encode()
            written.writestr(name, b"1.8.0" if name == "_stable_baselines3_version" else data)
    observations = np.random.default_rng(0).integers(0, 256, (3, 4, 44, 44)).astype(np.uint8)
    wanted, _ = StockDQN.load(exported, device="cpu").predict(observations, deterministic=True)
    for cls in (StockDQN, DQN):
        found, _ = cls.load(old, device="cpu").predict(observations, deterministic=True)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`:UserWarning")
@pytest.mark.parametrize("agent_class", [DQN, PQN])
def test_an_environment_that_is_not_seen_as_it_is_stored_is_refused(agent_class: Any) -> None:
    """A memory of single frames would make stacks that were never seen, and not know of scaled rewards."""
    for wrapper, said in (
        (lambda env: VecFrameStack(env, 2), "VecFrameStack changes what is seen"),
        (VecNormalize, "VecNormalize changes what is seen"),
        (VecMonitor, "VecMonitor changes what is seen, earned or reported"),
        (lambda env: VecCheckNan(VecMonitor(env)), "VecMonitor"),
        (lambda _: make_vec_env("CartPole-v1"), "is a DummyVecEnv, and agents here learn from rl"),
        (lambda _: "CartPole-v1", "agents here learn from rl.envs.AtariVecEnv alone"),
    ):
        with pytest.raises(LabError, match=said):
            agent_class(env=wrapper(make_env()), device="cpu")
    agent = agent_class(env=VecCheckNan(make_env()), device="cpu")
    with pytest.raises(LabError, match="VecMonitor changes"):
        agent.set_env(VecMonitor(make_env()))
