"""The 104 Atari games by name, and the published scores to hold an agent against."""

import difflib
import re
from dataclasses import dataclass

from lab.errors import LabError

# In ale-py's list but only for two players; gymnasium registers none of them.
_TWO_PLAYER = {"combat", "joust", "maze_craze", "warlords"}


NATURE_TABLE = "Mnih et al. 2015, extended data table 2"
LATER_TABLE = "DeepMind's papers after 2015 (Wang et al. 2016), no-op starts"


@dataclass(frozen=True)
class Scores:
    """Mean returns of whole games, unclipped, and the table they stand in.

    `nature_dqn` is DQN in Mnih et al. 2015, None where this file does not have it.
    """

    random: float
    human: float
    nature_dqn: float | None
    table: str


# Two human testers are in use: that of the Nature paper, and that of the papers after it (Pong 9.3 and 14.6).
# Where the Nature paper's DQN is listed here, its own random and human scores go with it.
_NATURE = {
    "beam_rider": (363.9, 5775.0, 6846.0),
    "breakout": (1.7, 31.8, 401.2),
    "enduro": (0.0, 309.6, 301.8),
    "freeway": (0.0, 29.6, 30.3),
    "ms_pacman": (307.3, 15693.0, 2311.0),
    "pong": (-20.7, 9.3, 18.9),
    "qbert": (163.9, 13455.0, 10596.0),
    "seaquest": (68.4, 20182.0, 5286.0),
    "space_invaders": (148.0, 1652.0, 1976.0),
}
# (random, human)
_LATER = {
    "alien": (227.8, 7127.7),
    "amidar": (5.8, 1719.5),
    "assault": (222.4, 742.0),
    "asterix": (210.0, 8503.3),
    "asteroids": (719.1, 47388.7),
    "atlantis": (12850.0, 29028.1),
    "bank_heist": (14.2, 753.1),
    "battle_zone": (2360.0, 37187.5),
    "berzerk": (123.7, 2630.4),
    "bowling": (23.1, 160.7),
    "boxing": (0.1, 12.1),
    "centipede": (2090.9, 12017.0),
    "chopper_command": (811.0, 7387.8),
    "crazy_climber": (10780.5, 35829.4),
    "defender": (2874.5, 18688.9),
    "demon_attack": (152.1, 1971.0),
    "double_dunk": (-18.6, -16.4),
    "fishing_derby": (-91.7, -38.7),
    "frostbite": (65.2, 4334.7),
    "gopher": (257.6, 2412.5),
    "gravitar": (173.0, 3351.4),
    "hero": (1027.0, 30826.4),
    "ice_hockey": (-11.2, 0.9),
    "jamesbond": (29.0, 302.8),
    "kangaroo": (52.0, 3035.0),
    "krull": (1598.0, 2665.5),
    "kung_fu_master": (258.5, 22736.3),
    "montezuma_revenge": (0.0, 4753.3),
    "name_this_game": (2292.3, 8049.0),
    "phoenix": (761.4, 7242.6),
    "pitfall": (-229.4, 6463.7),
    "private_eye": (24.9, 69571.3),
    "riverraid": (1338.5, 17118.0),
    "road_runner": (11.5, 7845.0),
    "robotank": (2.2, 11.9),
    "skiing": (-17098.1, -4336.9),
    "solaris": (1236.3, 12326.7),
    "star_gunner": (664.0, 10250.0),
    "surround": (-10.0, 6.5),
    "tennis": (-23.8, -8.3),
    "time_pilot": (3568.0, 5229.2),
    "tutankham": (11.4, 167.6),
    "up_n_down": (533.4, 11693.2),
    "venture": (0.0, 1187.5),
    "video_pinball": (16256.9, 17667.9),
    "wizard_of_wor": (563.5, 4756.5),
    "yars_revenge": (3092.9, 54576.9),
    "zaxxon": (32.5, 9173.3),
}


def names() -> list[str]:
    """The single-player games ale-py ships, in snake_case."""
    from ale_py import roms

    return sorted(set(roms.get_all_rom_ids()) - _TWO_PLAYER)


def check(game: str) -> str:
    """Returns the game's canonical name.

    `MsPacman`, `ms-pacman`, `ALE/MsPacman-v5`, `MsPacmanNoFrameskip-v4` and `MsPacmanDeterministic-v4` are
    understood. The protocol is that of the config's keys, whatever name is used; see `sticky_actions_of`.

    Raises:
        LabError: there is no such game, or it is no Atari game for one player; what is supported is said.
    """
    known = names()
    flat = {_plain(name): name for name in known}
    base, _, version = game.split("/")[-1].rpartition("-v") if re.search(r"-v\d+$", game) else (game, "", "")
    plain = _plain(re.sub(r"(noframeskip|deterministic|[-_]ram)$", "", base.lower()))
    here = f"env.game = {game!r}:"
    if plain in flat and re.search(r"[-_]ram$", base.lower()):
        raise LabError(
            f"{here} shows the console's memory, and agents here see the screen. Set env.game={flat[plain]}."
        )
    if plain in flat and version in ("", "4", "5"):
        return flat[plain]
    if plain in flat:
        raise LabError(
            f"{here} of version {version} only the names -v4 and -v5 are known. Name the game, "
            f"env.game={flat[plain]}, and set what differs: env.sticky_actions, env.frame_skip."
        )
    if plain in {_plain(name) for name in _TWO_PLAYER}:
        raise LabError(f"{here} is for two players; the lab trains one. `lab list games` shows {len(known)}.")
    near = difflib.get_close_matches(plain, flat, n=1, cutoff=0.7)
    if near:
        raise LabError(
            f"{here} no such game. Did you mean {flat[near[0]]!r}? `lab list games` shows all {len(known)}."
        )
    other = "is no Atari game, and other environments are not supported" if version else "no such game"
    raise LabError(f"{here} {other}. `lab list games` shows the {len(known)} there are.")


def sticky_actions_of(game: str) -> float | None:
    """The probability of a repeated action in Gymnasium's game of this name; None: it has no version."""
    return {"-v4": 0.0, "-v5": 0.25}.get(game[-3:])


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def published(game: str) -> Scores | None:
    """The published scores of a game, None where there are none (57 games have some)."""
    if game in _NATURE:
        return Scores(*_NATURE[game], NATURE_TABLE)
    return Scores(*_LATER[game], None, LATER_TABLE) if game in _LATER else None


PUBLISHED_MAX_FRAMES = 18_000
"""Five minutes at 60 frames a second: what Mnih et al. 2015 played at most; later work plays 108,000."""


def human_normalized(game: str, score: float) -> float | None:
    """(score - random) / (human - random) by the table of `published`, 1.0 is human; None without one."""
    table = published(game)
    return None if table is None else (score - table.random) / (table.human - table.random)


def landmarks(game: str) -> list[tuple[str, float]]:
    """(who, score) of random play, the human tester and Nature's DQN, as far as published."""
    table = published(game)
    if table is None:
        return []
    known = [("random", table.random), ("human", table.human)]
    return known if table.nature_dqn is None else [*known, ("Nature DQN", table.nature_dqn)]
