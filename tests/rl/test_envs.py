"""Each trap of ale-py's vector environment, pinned."""

from typing import Any

import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import LabError
from rl import envs, games
from rl.config import EVALUATION_SEEDS, EnvConfig
from rl.envs import AtariVecEnv


def raw_env(game: str, n_envs: int, **kwargs: Any) -> AtariVectorEnv:
    """ale-py's own environment with whole games and raw rewards, to compare with."""
    return AtariVectorEnv(
        game,
        n_envs,
        num_threads=1,
        autoreset_mode=AutoresetMode.SAME_STEP,
        reward_clipping=False,
        **kwargs,
    )


def random_actions(seed: int, steps: int, n_envs: int, n_actions: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(n_actions, size=(steps, n_envs))


@pytest.mark.parametrize("limit", [200, 202])
def test_terminal_observation_is_the_last_frame_of_that_game_and_no_stale_memory(limit: int) -> None:
    # A game cut off at 200 frames in one environment, and the same actions with no cut in another: the
    # terminal observation must be what the uncut game shows at that step. (ale-py's own limit breaks off
    # within the step.)
    cut = AtariVecEnv("pong", 3, seed=5, max_episode_frames=limit, num_threads=1)
    whole = raw_env("pong", 3)
    cut.reset()
    whole.reset(seed=5)
    checked = 0
    for actions in random_actions(0, 60, 3, 6):
        observation, _, dones, infos = cut.step(actions)
        expected, *_ = whole.step(actions)
        for i in np.flatnonzero(dones):
            last = infos[i]["terminal_observation"]
            np.testing.assert_array_equal(last, expected[i])
            assert infos[i]["episode"]["l"] == -(-limit // 4)
            assert not np.array_equal(observation[i], last), "the new game's first observation"
            checked += 1
        if dones.any():
            break
    assert checked > 0


def test_a_time_limit_is_a_truncation_and_a_lost_game_is_not() -> None:
    env = AtariVecEnv("pong", 2, max_episode_frames=200, num_threads=1)
    env.reset()
    seen = []
    for actions in random_actions(0, 60, 2, 6):
        _, _, dones, infos = env.step(actions)
        seen += [infos[i] for i in np.flatnonzero(dones)]
    assert seen
    assert all(info["TimeLimit.truncated"] and info["game_over"] for info in seen)

    env = AtariVecEnv("breakout", 4, num_threads=1)
    env.reset()
    seen = []
    for actions in random_actions(0, 400, 4, 4):
        _, _, dones, infos = env.step(actions)
        seen += [infos[i] for i in np.flatnonzero(dones)]
    assert seen
    assert not any(info["TimeLimit.truncated"] for info in seen)


def test_a_lost_life_ends_the_learners_episode_but_not_the_game() -> None:
    env = AtariVecEnv("breakout", 4, seed=3, life_loss=True, num_threads=1)
    whole = raw_env("breakout", 4)
    observation = env.reset()
    lives_before = whole.reset(seed=3)[1]["lives"]
    lost = over = 0
    for actions in random_actions(1, 500, 4, 4):
        observation, _, dones, infos = env.step(actions)
        expected, _, terminated, truncated, info = whole.step(actions)
        np.testing.assert_array_equal(observation, expected)  # the game itself is never touched
        game_over = terminated | truncated
        np.testing.assert_array_equal(dones, game_over | (info["lives"] < lives_before))
        for i in np.flatnonzero(dones):
            assert infos[i]["game_over"] == game_over[i]
            over += game_over[i]
            if not game_over[i]:
                lost += 1
                # final_obs is not written for such a row: the observation itself is the last one
                np.testing.assert_array_equal(infos[i]["terminal_observation"], expected[i])
                assert "episode" not in infos[i]
        lives_before = info["lives"]
    assert lost > 5
    assert over > 1


def test_a_new_game_after_game_over_counts_as_no_lost_life() -> None:
    # In SAME_STEP mode `lives` is the value after the reset: 5 again, or for a one-life game unchanged.
    env = AtariVecEnv("breakout", 4, life_loss=True, num_threads=1)
    env.reset()
    dones_per_game: list[int] = []
    count = np.zeros(4, int)
    for actions in random_actions(2, 600, 4, 4):
        _, _, dones, infos = env.step(actions)
        count += dones
        for i in np.flatnonzero(dones):
            if infos[i]["game_over"]:
                dones_per_game.append(int(count[i]))
                count[i] = 0
    assert dones_per_game
    assert set(dones_per_game) == {5}, "Breakout has five lives: four lost ones and the end of the game"


def test_raw_and_clipped_returns_are_both_kept() -> None:
    env = AtariVecEnv("space_invaders", 4, num_threads=1, clip_rewards=True)
    whole = raw_env("space_invaders", 4)
    env.reset()
    whole.reset(seed=0)
    returns, clipped, lengths = np.zeros(4), np.zeros(4), np.zeros(4, int)
    games_seen = 0
    for actions in random_actions(3, 700, 4, 6):
        _, rewards, dones, infos = env.step(actions)
        _, raw, *_ = whole.step(actions)
        np.testing.assert_array_equal(rewards, np.sign(raw))
        returns += raw
        clipped += np.sign(raw)
        lengths += 1
        for i in np.flatnonzero(dones):
            assert infos[i]["episode"] == {"r": returns[i], "clipped_r": clipped[i], "l": lengths[i]}
            games_seen += 1
            returns[i] = clipped[i] = lengths[i] = 0
    assert games_seen > 0
    assert returns.max() > clipped.max(), "invaders are worth more than one point"


def test_unclipped_rewards_reach_the_learner_if_asked_for() -> None:
    env = AtariVecEnv("space_invaders", 2, num_threads=1, clip_rewards=False)
    env.reset()
    rewards = [env.step(actions)[1] for actions in random_actions(0, 300, 2, 6)]
    assert np.max(rewards) >= 5


def test_no_step_is_a_mere_reset() -> None:
    # NEXT_STEP autoreset would emit steps whose reward and action mean nothing; here every step advances
    # some game by frame_skip frames, so two games' lengths add up to the steps taken.
    env = AtariVecEnv("breakout", 1, num_threads=1)
    env.reset()
    lengths: list[int] = []
    for steps, actions in enumerate(random_actions(0, 800, 1, 4), start=1):
        _, _, dones, infos = env.step(actions)
        if dones[0]:
            lengths.append(infos[0]["episode"]["l"])
            assert sum(lengths) == steps
    assert len(lengths) >= 2


@pytest.mark.parametrize("sticky", [0.0, 0.25])
def test_playing_the_actions_again_restores_emulators_that_cannot_be_saved(
    sticky: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment, however often each copy was seeded again by then; and both go on alike."""
    monkeypatch.setattr(envs, "RESEED_STEPS", 150)

    def make(seed: int, num_threads: int) -> AtariVecEnv:
        return AtariVecEnv(
            "breakout", 3, seed=seed, sticky_actions=sticky, life_loss=True, num_threads=num_threads
        )

    first, second = make(7, 1), make(99, 2)
    first.reset()
    where, log = first.capture()
    for number, actions in enumerate(random_actions(0, 500, 3, 4)):
        first.step(actions)
        if number not in (149, 499):
            continue
        where, log = first.capture()
        second.reset()
        np.testing.assert_array_equal(second.replay(where, log), first._observation)
        again, log_again = second.capture()
        assert again == where
        np.testing.assert_array_equal(log_again, log)
    assert min(where["seedings"]) > 1
    assert len(log) < 500
    for actions in random_actions(1, 200, 3, 4):
        a, b = first.step(actions), second.step(actions)
        for left, right in zip(a[:3], b[:3], strict=True):
            np.testing.assert_array_equal(left, right)
        assert [info.get("episode") for info in a[3]] == [info.get("episode") for info in b[3]]


def test_what_is_kept_to_play_again_stays_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "RESEED_STEPS", 100)
    env = AtariVecEnv("breakout", 2, num_threads=1)
    env.reset()
    longest = 0
    for actions in random_actions(0, 1_500, 2, 4):
        *_, infos = env.step(actions)
        longest = max([longest, *(info["episode"]["l"] for info in infos if "episode" in info)])
    assert len(env.capture()[1]) <= 100 + longest
    assert len(env._actions) <= 2 * (100 + longest)


def test_fresh_games_are_other_games_unless_a_seed_is_named() -> None:
    env = AtariVecEnv("breakout", 4, seed=3, sticky_actions=0.25, num_threads=1)

    def game(first: np.ndarray) -> bytes:
        return first.tobytes() + b"".join(env.step(a)[0].tobytes() for a in random_actions(0, 30, 4, 4))

    one, other = game(env.reset()), game(env.reset())
    assert one != other
    env.seed(3)
    assert game(env.reset()) == one


def test_training_and_evaluation_never_play_the_same_seed() -> None:
    highest = envs.MAX_SEED - EnvConfig(game="pong", n_envs=4096).n_envs
    for seed in (0, 1, 10_000, 20_000, 2**31 - 1):
        assert EVALUATION_SEEDS <= envs.TRAINING_SEEDS <= envs.training_seed(seed) <= highest
    env = AtariVecEnv("breakout", 2, seed=envs.training_seed(0), num_threads=1)
    taken: list[int] = []
    reset = env._atari.reset
    env._atari.reset = lambda seed, options: (taken.extend(seed.tolist()), reset(seed=seed, options=options))[
        1
    ]
    for _ in range(5):
        env.reset()
    assert len(set(taken)) == 10
    assert all(envs.TRAINING_SEEDS <= seed <= envs.MAX_SEED for seed in taken)


@pytest.mark.parametrize("seed", [-1, 2**31 - 2, 2**40])
def test_a_seed_that_no_emulator_takes_is_refused(seed: int) -> None:
    with pytest.raises(LabError, match=f"seed = {seed}"):
        AtariVecEnv("pong", 3, num_threads=1).seed(seed)


def test_sticky_actions_change_the_game_and_none_is_the_default() -> None:
    def play(**kwargs: Any) -> np.ndarray:
        env = AtariVecEnv("pong", 1, seed=1, num_threads=1, **kwargs)
        env.reset()
        return np.stack([env.step(a)[0][0] for a in random_actions(0, 60, 1, 6)])

    np.testing.assert_array_equal(play(), play(sticky_actions=0.0))
    assert not np.array_equal(play(), play(sticky_actions=0.25))


def test_noops_make_games_begin_differently() -> None:
    def beginnings(noop_max: int) -> int:
        env = AtariVecEnv("pong", 16, num_threads=1, noop_max=noop_max)
        observations = env.reset()
        for _ in range(20):
            observations = env.step(np.zeros(16, int))[0]
        return len({observation[-1].tobytes() for observation in observations})

    assert beginnings(30) > 8
    assert beginnings(1) == 1


def test_film_emulator_plays_the_same_game_in_colour() -> None:
    grey = AtariVecEnv("breakout", 1, seed=4, num_threads=1, clip_rewards=False)
    colour = AtariVecEnv("breakout", 1, seed=4, num_threads=1, clip_rewards=False, color=True)
    grey.reset()
    assert colour.reset().shape == (1, 1, 210, 160, 3)
    for actions in random_actions(5, 300, 1, 4):
        a, b = grey.step(actions), colour.step(actions)
        assert a[1] == b[1]
        assert a[2] == b[2]


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_every_game_plays(every: int) -> None:
    names = games.names()
    assert len(names) == 104
    for name in names[::every]:
        env = AtariVecEnv(name, 1, image_size=16, num_threads=1)
        assert env.reset().shape == (1, 4, 16, 16)
        env.step(np.array([env.action_space.n - 1]))  # type: ignore[attr-defined]
        assert len(env.action_meanings) == env.action_space.n  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["MsPacman", "ms-pacman", "ALE/MsPacman-v5", "MsPacmanNoFrameskip-v4"])
def test_common_spellings_are_understood(name: str) -> None:
    assert games.check(name) == "ms_pacman"


@pytest.mark.parametrize("name", ["Pong-ram-v4", "ALE/Pong-ram-v5", "pong_ram"])
def test_a_game_by_its_memory_is_not_the_game_by_its_screen(name: str) -> None:
    with pytest.raises(LabError, match=r"memory, and agents here see the screen\. Set env\.game=pong"):
        games.check(name)


def test_an_unknown_game_names_the_nearest() -> None:
    with pytest.raises(LabError, match="Did you mean 'breakout'"):
        games.check("brakeout")


@given(score=st.floats(-1e5, 1e5))
@settings(max_examples=20)
def test_human_normalised_score_is_linear(score: float) -> None:
    table = games.published("pong")
    assert table is not None
    assert table.table == games.NATURE_TABLE
    assert games.human_normalized("pong", table.random) == 0
    assert games.human_normalized("pong", table.human) == pytest.approx(1)
    expected = (score + 20.7) / 30.0
    assert games.human_normalized("pong", score) == pytest.approx(expected, abs=1e-9)


def test_the_table_of_a_human_score_is_named_and_games_without_one_say_so() -> None:
    alien = games.published("alien")
    assert alien is not None
    assert (alien.random, alien.human, alien.nature_dqn) == (227.8, 7127.7, None)
    assert alien.table == games.LATER_TABLE
    assert games.human_normalized("tetris", 1.0) is None
    assert games.landmarks("tetris") == []
    assert sum(games.published(name) is not None for name in games.names()) == 57
