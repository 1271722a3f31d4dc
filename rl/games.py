"""The 104 Atari games by name, and the published scores to hold an agent against."""

from dataclasses import dataclass

from lab.errors import LabError, did_you_mean

# In ale-py's list but only for two players; gymnasium registers none of them.
_TWO_PLAYER = {"combat", "joust", "maze_craze", "warlords"}


@dataclass(frozen=True)
class Scores:
    """Mean returns of whole games, unclipped (Mnih et al. 2015, extended data table 2)."""

    random: float
    human: float
    nature_dqn: float


# Nature 518 (2015): random play, a professional human games tester, and DQN (30 no-ops, epsilon 0.05).
NATURE_TABLE = "Mnih et al. 2015, extended data table 2"
NATURE_SCORES = {
    "beam_rider": Scores(363.9, 5775.0, 6846.0),
    "breakout": Scores(1.7, 31.8, 401.2),
    "enduro": Scores(0.0, 309.6, 301.8),
    "freeway": Scores(0.0, 29.6, 30.3),
    "ms_pacman": Scores(307.3, 15693.0, 2311.0),
    "pong": Scores(-20.7, 9.3, 18.9),
    "qbert": Scores(163.9, 13455.0, 10596.0),
    "seaquest": Scores(68.4, 20182.0, 5286.0),
    "space_invaders": Scores(148.0, 1652.0, 1976.0),
}


def names() -> list[str]:
    """The single-player games ale-py ships, in snake_case."""
    from ale_py import roms

    return sorted(set(roms.get_all_rom_ids()) - _TWO_PLAYER)


def check(game: str) -> str:
    """Returns the game's canonical name; `MsPacman`, `ms-pacman` and `ALE/MsPacman-v5` are understood.

    Raises:
        LabError: there is no such game; the nearest is named.
    """
    known = names()
    flat = {name.replace("_", ""): name for name in known}
    plain = game.split("/")[-1].lower().removesuffix("-v5").removesuffix("noframeskip-v4")
    plain = plain.replace("-", "").replace("_", "").replace(" ", "")
    if plain in flat:
        return flat[plain]
    hint = did_you_mean(game.lower(), known)
    raise LabError(f"env.game = {game!r}: no such game.{hint} `lab list games` shows all {len(known)}.")


def human_normalized(game: str, score: float) -> float | None:
    """(score - random) / (human - random) by `NATURE_TABLE`, 1.0 is human; None for a game not in it."""
    table = NATURE_SCORES.get(game)
    return None if table is None else (score - table.random) / (table.human - table.random)
