"""What can be set of an Atari run. The defaults of `DQNConfig` are those of Mnih et al. 2015.

Imports nothing heavy: a mistake in a config is reported before torch is loaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lab.config import ConfigError, require
from lab.device import DeviceConfig
from lab.errors import LabError, did_you_mean
from lab.tracking import TrackingConfig
from supervised.backbones import RECURRENT

OPTIMIZERS = ("adam", "radam", "rmsprop")
EVALUATION_SEEDS = 2**30
"""Seeds of evaluations lie below this, those of training games from here to 2^31 - 1 (`rl.envs`)."""
UNSEEN_SEED = 20_000
"""First seed of `lab evaluate`, whose games choose no checkpoint; it moves where eval.seed is in its way."""
_STEPS = 10**12


def _between(low: float, high: float, prefix: str, owner: Any, *keys: str) -> None:
    """Requires `low` <= owner.key <= `high` of each key; what is far outside is a slip of the keyboard."""
    for key in keys:
        value = getattr(owner, key)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{prefix}{key}", f"{value} must be from {low:,} to {high:,}")


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """The game and how it is shown to the agent."""

    game: str
    """One of `lab list games`."""
    n_envs: int = 8
    """Games played side by side. The number of updates per agent step does not depend on it."""
    image_size: int = 84
    """Side of the square grey image, pixels. An update at 44 costs a quarter of one at 84."""
    frame_skip: int = 4
    """Emulator frames per agent step."""
    sticky_actions: float = 0.0
    """Probability that the emulator repeats the last action: 0 as in 2015, 0.25 as in Machado et al. 2018."""
    noop_max: int = 30
    """Each game begins with a number of no-ops drawn from 0 to below this."""
    fire_reset: bool = True
    """Begin each game with FIRE where the game has it, as ale-py does; DQN of 2015 did not. After a lost life
    the agent itself has to press it."""
    life_loss: bool = False
    """End the learner's episode at each lost life; the game itself goes on."""
    clip_rewards: bool = True
    """Learn from the sign of each reward. Scores are reported unclipped either way."""
    max_episode_frames: int = 108_000
    """Emulator frames until a game is cut off; 108,000 is 30 minutes. A cut is no end: what is learned there
    counts the value of the last observation (Pardo et al. 2018)."""
    full_action_space: bool = False
    """All 18 actions instead of those the game uses."""
    num_threads: int = 0
    """Emulator threads; 0 takes one per core. Results do not depend on it."""
    restart_every_steps: int = 0
    """Agent steps after which all games are cut off and new ones begin; 0 lets each be played to its end."""

    def __post_init__(self) -> None:
        _between(1, 4096, "env.", self, "n_envs")
        _between(8, 210, "env.", self, "image_size")
        _between(1, 60, "env.", self, "frame_skip")
        _between(1, 1000, "env.", self, "noop_max")
        _between(0, 1024, "env.", self, "num_threads")
        _between(0, _STEPS, "env.", self, "restart_every_steps")
        _between(self.frame_skip, 2**31 - 2, "env.", self, "max_episode_frames")
        require(
            0 <= self.sticky_actions < 1,
            "env.sticky_actions",
            f"{self.sticky_actions} is a probability: 0 to below 1",
        )


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What every Q-learner has."""

    algorithm: str
    """dqn, drqn (also where dqn is given a recurrent backbone) or pqn."""
    backbone: str = "nature_cnn"
    """One of `lab list backbones`."""
    backbone_spec: dict[str, Any] = field(default_factory=dict)
    """The backbone's own arguments, e.g. {width: 256}."""
    start_from: str | None = None
    """A run whose weights this one begins with: another agent's (all of its best network, or that of the
    checkpoint folder named; optimiser, replay memory and exploration begin as ever), or a finished run of
    autoencoding (the backbone; of drqn the eyes)."""
    dueling: bool = False
    """Split the head into state value and advantages (Wang et al. 2016)."""
    gamma: float = 0.99
    """Discount per agent step."""
    learning_rate: float = 2.5e-4
    learning_rate_decay_steps: int = 0
    """Agent steps over which the learning rate falls linearly to a tenth; 0 keeps it constant."""
    optimizer: str = "adam"
    """adam, radam, or rmsprop as DeepMind wrote it in 2015."""
    optimizer_eps: float = 1e-8
    max_grad_norm: float | None = 10.0
    """Clip the gradient's norm to this; null for no clipping, as in 2015."""
    exploration_initial: float = 1.0
    """Probability of a random action at the start."""
    exploration_final: float = 0.1
    exploration_steps: int = 1_000_000
    """Agent steps over which it falls linearly from the one to the other, counted from step 0: at the end of
    dqn's learning_starts it has fallen already (in Mnih et al. 2015 it begins to fall only there)."""
    exploration_ladder: float | None = None
    """Ape-X (Horgan et al. 2018): environment i of N explores at least ladder^(1 + 7i/(N-1)), there 0.4."""

    def __post_init__(self) -> None:
        require(0 < self.gamma <= 1, "agent.gamma", f"{self.gamma} must be above 0 and at most 1")
        require(self.learning_rate > 0, "agent.learning_rate", f"{self.learning_rate} must be positive")
        require(self.optimizer_eps > 0, "agent.optimizer_eps", f"{self.optimizer_eps} must be positive")
        _between(0, _STEPS, "agent.", self, "learning_rate_decay_steps", "exploration_steps")
        require(
            self.optimizer in OPTIMIZERS,
            "agent.optimizer",
            f"{self.optimizer!r} is none of {', '.join(OPTIMIZERS)}",
        )
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "agent.max_grad_norm",
            "must be positive, or null for no clipping",
        )
        for key in ("exploration_initial", "exploration_final"):
            require(0 <= getattr(self, key) <= 1, f"agent.{key}", f"{getattr(self, key)} is a probability")
        require(
            self.exploration_ladder is None or 0 < self.exploration_ladder < 1,
            "agent.exploration_ladder",
            f"{self.exploration_ladder} must be between 0 and 1, or null",
        )
        require(
            not {"in_chans", "img_size"} & set(self.backbone_spec),
            "agent.backbone_spec",
            "in_chans and img_size follow from env; leave them out",
        )


@dataclass(frozen=True, kw_only=True)
class DQNConfig(AgentConfig):
    """Deep Q-learning with replay memory and target network (Mnih et al. 2015)."""

    algorithm: str = "dqn"
    double: bool = False
    """Choose the next action by the online network (van Hasselt et al. 2016)."""
    n_step: int = 1
    """Length of the returns, agent steps."""
    batch_size: int = 32
    buffer_size: int = 1_000_000
    """Transitions in the replay memory; 1,000,000 of 84x84 take 7.2 GB once it is full."""
    replay_device: str = "cpu"
    """Where the frames lie: cpu, or cuda if it has the room."""
    learning_starts: int = 50_000
    """Agent steps of random play before the first update."""
    train_freq: int = 4
    """Agent steps per update, whatever the number of environments."""
    target_update_steps: int = 40_000
    """Agent steps between copies to the target network (Nature's 10,000 updates)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _between(1, 1000, "agent.", self, "n_step")
        _between(1, 65_536, "agent.", self, "batch_size")
        _between(1, 10**10, "agent.", self, "buffer_size")
        _between(1, _STEPS, "agent.", self, "train_freq", "target_update_steps", "learning_starts")
        require(
            self.batch_size <= self.buffer_size,
            "agent.batch_size",
            f"{self.batch_size} is more than buffer_size {self.buffer_size}",
        )


@dataclass(frozen=True, kw_only=True)
class DRQNConfig(DQNConfig):
    """DQN that sees one frame at a time and remembers (Hausknecht and Stone 2015, arXiv 1507.06527).

    Learns from sequences of single frames, behind steps that only bring the memory up to date (burn-in,
    Kapturowski et al. 2019, section 3). Batches are of `batch_size` sequences.
    """

    algorithm: str = "drqn"
    backbone: str = "lstm"
    """lstm, gru or rnn; before it sees what `backbone_spec` describes."""
    backbone_spec: dict[str, Any] = field(default_factory=lambda: {"hidden": 512, "width": None})
    """hidden and n_layer of the memory; eyes (nature_cnn), any backbone for images, and its arguments."""
    sequence_steps: int = 10
    """Agent steps of a sequence that are learned from."""
    burn_in_steps: int = 10
    """Agent steps before them, fewer where the game began later."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "algorithm", "drqn")  # also where dqn was given a backbone that remembers
        super().__post_init__()
        _between(1, 10_000, "agent.", self, "sequence_steps")
        _between(0, 10_000, "agent.", self, "burn_in_steps")
        known = ", ".join(RECURRENT)
        require(
            self.backbone in RECURRENT, "agent.backbone", f"{self.backbone!r}: of drqn it is one of {known}"
        )


PQN_SPEC = {"norm": "layer"}
"""What PQN, which has no target network, needs of the networks made for Atari."""


@dataclass(frozen=True, kw_only=True)
class PQNConfig(AgentConfig):
    """Parallelised Q-learning (Gallici et al. 2024, arXiv 2407.04811): no replay, no target network."""

    algorithm: str = "pqn"
    backbone_spec: dict[str, Any] = field(default_factory=lambda: dict(PQN_SPEC))
    optimizer: str = "radam"
    rollout_steps: int = 32
    """Steps of every environment between two phases of learning."""
    epochs: int = 2
    """Passes over each rollout."""
    minibatch_size: int = 128
    td_lambda: float = 0.65
    """Mixes returns of all lengths: 0 is one-step, 1 the return of the whole rollout."""
    exploration_final: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        _between(1, 100_000, "agent.", self, "rollout_steps")
        _between(1, 1000, "agent.", self, "epochs")
        _between(1, 10**7, "agent.", self, "minibatch_size")
        require(0 <= self.td_lambda <= 1, "agent.td_lambda", f"{self.td_lambda} must be between 0 and 1")
        if self.backbone_spec == PQN_SPEC and self.backbone not in ("nature_cnn", "impala_cnn"):
            object.__setattr__(self, "backbone_spec", {})  # others normalise in their own way


MOST_EPISODES = 10_000
"""Games of one evaluation: each has an emulator of its own, about 2 MB."""


def check_seed(key: str, seed: int, games: int) -> None:
    """Raises `ConfigError` unless the seeds `seed` to `seed + games - 1` are those of evaluations."""
    last = EVALUATION_SEEDS - games
    require(0 <= seed <= last, key, f"{seed} must be from 0 to {last:,} for {games:,} games")


def unseen_seed(settings: "EvalConfig", episodes: int) -> int:
    """The first seed of `episodes` games that neither training nor the choice of `best` plays."""
    seed = UNSEEN_SEED
    if not is_unseen(settings, seed, episodes):
        seed = settings.seed + settings.episodes
    return seed if seed + episodes <= EVALUATION_SEEDS else 0


def is_unseen(settings: "EvalConfig", seed: int, episodes: int) -> bool:
    """Whether no game of these seeds is one of those that choose the best checkpoint."""
    return seed + episodes <= settings.seed or settings.seed + settings.episodes <= seed


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation apart from training: own games and seeds, whole games, raw scores."""

    every_steps: int = 250_000
    """Agent steps between evaluations; the last one is always made."""
    episodes: int = 10
    epsilon: float = 0.001
    """Probability of a random action: 0.001, or 0.05 as in Mnih et al. 2015."""
    seed: int = 10_000
    """First seed of the evaluation games; game i has seed + i. They choose the best checkpoint, so `lab
    evaluate` plays others. Without sticky actions a seed decides no more than the number of no-ops, and games
    differ by that and by their random actions."""
    stop_at: float | None = None
    """Finish the run once an evaluation's mean return reaches this; null trains to total_steps."""

    def __post_init__(self) -> None:
        _between(1, _STEPS, "eval.", self, "every_steps")
        _between(1, MOST_EPISODES, "eval.", self, "episodes")
        check_seed("eval.seed", self.seed, self.episodes)
        require(0 <= self.epsilon <= 1, "eval.epsilon", f"{self.epsilon} is a probability")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often to save, and how much to keep. None of it changes what is learned."""

    every_steps: int = 250_000
    """Agent steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints that stay; the best by evaluation stays besides."""

    def __post_init__(self) -> None:
        _between(1, _STEPS, "checkpoint.", self, "every_steps")
        _between(1, 10**6, "checkpoint.", self, "keep")


@dataclass(frozen=True, kw_only=True)
class FilmConfig:
    """Films of the agent at play, in media/ and in W&B."""

    every_steps: int = 1_000_000
    """Agent steps between films; 0 makes only the one at the end."""
    max_steps: int = 1_000
    """Agent steps a film shows at most."""

    def __post_init__(self) -> None:
        _between(0, _STEPS, "film.", self, "every_steps")
        _between(0, 10**6, "film.", self, "max_steps")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run on one Atari game."""

    env: EnvConfig
    agent: AgentConfig
    pipeline: str = "rl"
    name: str | None = None
    """Name of the run and, unless --out says otherwise, of its folder below runs/."""
    seed: int = 0
    total_steps: int = 10_000_000
    """Agent steps in all, rounded up to whole steps of all environments (of pqn to whole rollouts)."""
    log_every_steps: int = 5_000
    """Agent steps between rows of metrics."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    film: FilmConfig = field(default_factory=FilmConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "seed", f"{self.seed} must be between 0 and 2^31 - 1")
        _between(1, _STEPS, "", self, "total_steps", "log_every_steps")
        require(
            self.agent.exploration_ladder is None or self.env.n_envs > 1,
            "agent.exploration_ladder",
            "has a rung for each environment, and env.n_envs = 1; set it to null, or take several",
        )

    @property
    def run_name(self) -> str:
        """`name`, or {task}__{algo}__s{seed}."""
        return self.name or f"{self.env.game}__{self.agent.algorithm}__s{self.seed}"


@dataclass(frozen=True, kw_only=True)
class DQNRun(RunConfig):
    """A run of DQN."""

    agent: DQNConfig = field(default_factory=DQNConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        c = self.agent
        require(
            c.learning_starts < self.total_steps,
            "agent.learning_starts",
            f"{c.learning_starts:,} is not below total_steps {self.total_steps:,}: nothing would be learned",
        )
        require(
            self.env.n_envs <= c.buffer_size,
            "agent.buffer_size",
            f"{c.buffer_size} is less than one transition of each of env.n_envs = {self.env.n_envs}",
        )


@dataclass(frozen=True, kw_only=True)
class DRQNRun(DQNRun):
    """A run of DRQN."""

    agent: DRQNConfig = field(default_factory=DRQNConfig)


@dataclass(frozen=True, kw_only=True)
class PQNRun(RunConfig):
    """A run of PQN."""

    agent: PQNConfig = field(default_factory=PQNConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        samples = self.agent.rollout_steps * self.env.n_envs
        require(
            samples % self.agent.minibatch_size == 0,
            "agent.minibatch_size",
            f"{self.agent.minibatch_size} does not divide rollout_steps x n_envs = {samples}",
        )


_RUNS: dict[str, type[RunConfig]] = {"dqn": DQNRun, "drqn": DRQNRun, "pqn": PQNRun}


def algorithms() -> list[str]:
    """The values of agent.algorithm."""
    return sorted(_RUNS)


def run_config_class(values: Mapping[str, Any], source_of: Callable[[str], str]) -> type[RunConfig]:
    """The config class for these values, which `agent.algorithm` decides (dqn if it is left out).

    Args:
        values: the raw config.
        source_of: where a dotted key was set, for errors.

    Raises:
        LabError: no such algorithm.
    """
    agent = values.get("agent")
    algorithm = agent.get("algorithm", "dqn") if isinstance(agent, Mapping) else "dqn"
    if not isinstance(algorithm, str) or algorithm not in _RUNS:
        raise LabError(
            f"{source_of('agent.algorithm')}: agent.algorithm = {algorithm!r}: no such algorithm."
            f"{did_you_mean(str(algorithm), _RUNS)} Known: {', '.join(algorithms())}."
        )
    if algorithm == "dqn" and isinstance(agent, Mapping) and agent.get("backbone") in RECURRENT:
        return DRQNRun
    return _RUNS[algorithm]
