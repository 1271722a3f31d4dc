"""Films of an agent at play: the screen as a person sees it, the agent's Q-values beside it."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lab.errors import LabError, first_line
from lab.files import written_aside
from rl.config import EnvConfig
from rl.evaluate import Player, make_env

CONSOLE_FRAMES_PER_SECOND = 60
_SCALE = 2
_SCREEN = (160 * _SCALE, 210 * _SCALE)
_PANEL = 304
_SIZE = (_SCREEN[0] + _PANEL, _SCREEN[1] + 12)  # both sides multiples of 16, which H.264 likes
_INK, _DIM, _BAR, _CHOSEN, _GROUND = (
    (235, 235, 235),
    (140, 140, 150),
    (70, 90, 130),
    (240, 160, 40),
    (18, 18, 24),
)


def film(
    player: Player,
    path: Path,
    seed: int,
    epsilon: float,
    max_steps: int,
) -> dict[str, Any]:
    """Plays one game and writes it as an H.264 mp4.

    The agent's grey frames and the film's colour frames come from two emulators with one seed and the same
    actions, which play the same game.

    Args:
        player: who plays.
        path: the film; written aside and renamed when whole.
        seed: of the game.
        epsilon: probability of a random action.
        max_steps: agent steps to show at most; the game may be longer.

    Returns:
        return, steps, and whether the game ended within the film.

    Raises:
        LabError: the film cannot be written.
    """
    env = make_env(player.env, 1, seed, training=False)
    screen = make_env(player.env, 1, seed, training=False, color=True)
    rng = np.random.default_rng(seed)
    observations, picture = env.reset(), screen.reset()
    player.begin(1)
    names = env.action_meanings
    total, steps, ended = 0.0, 0, False
    spread = 1e-6
    try:
        with written_aside(path) as aside, contextlib.closing(_writer(aside, player.env)) as writer:
            writer.send(None)
            while steps < max_steps and not ended:
                of_actions = player.q_values(observations, np.zeros(1, np.int64))
                actions = player.choose(of_actions, epsilon, rng)
                q = of_actions[0].cpu().numpy()
                spread = max(spread, float(q.max() - q.min()))
                frame = _compose(picture[0, -1], q, int(actions[0]), names, spread, total, steps)
                writer.send(np.ascontiguousarray(frame))
                observations, rewards, dones, _ = env.step(actions)
                picture, *_ = screen.step(actions)
                total += float(rewards[0])
                steps += 1
                ended = bool(dones[0])
    except OSError as error:
        raise LabError(
            f"{path}: cannot be written: {error.strerror or first_line(error)}. Free some space, or "
            "name another file with --out."
        ) from None
    finally:
        env.close()
        screen.close()
    return {"return": total, "steps": steps, "ended": ended, "path": str(path)}


def _writer(path: Path, env: EnvConfig) -> Any:
    """Starts ffmpeg; it is sent None, then the frames."""
    import imageio_ffmpeg

    return imageio_ffmpeg.write_frames(
        str(path),
        _SIZE,
        fps=CONSOLE_FRAMES_PER_SECOND / env.frame_skip,  # type: ignore[arg-type]  (it takes any)
        codec="libx264",
        quality=7,
        macro_block_size=4,
        output_params=["-movflags", "+faststart"],
        ffmpeg_log_level="error",
    )


def _compose(
    screen: np.ndarray,
    q: np.ndarray,
    chosen: int,
    names: list[str],
    spread: float,
    total: float,
    steps: int,
) -> np.ndarray:
    """One frame, uint8 (height, width, 3). A bar is full for the best action and shorter by what another
    gives away, measured by the widest spread of Q-values so far: short bars mean the choice matters."""
    image = Image.new("RGB", _SIZE, _GROUND)
    image.paste(Image.fromarray(screen).resize(_SCREEN, Image.Resampling.NEAREST), (0, 6))
    draw = ImageDraw.Draw(image)
    font, large = _font(13), _font(18)
    left = _SCREEN[0] + 14
    draw.text((left, 14), f"score {total:g}", fill=_INK, font=large)
    draw.text((left, 40), f"agent step {steps}   state value {q.max():+.2f}", fill=_DIM, font=font)
    top, row = 72, min(28, (_SIZE[1] - 84) // len(q))
    room = _PANEL - 14 - 118 - 62
    for i, (name, value) in enumerate(zip(names, q, strict=True)):
        y = top + i * row
        color = _CHOSEN if i == chosen else _BAR
        share = 1 - (q.max() - value) / spread
        draw.text((left, y), name.lower(), fill=_INK if i == chosen else _DIM, font=font)
        draw.rectangle((left + 118, y + 2, left + 118 + max(2, share * room), y + row - 9), fill=color)
        draw.text((left + 122 + room, y), f"{value:+.2f}", fill=_INK if i == chosen else _DIM, font=font)
    return np.asarray(image)


_FONTS: dict[int, Any] = {}


def _font(size: int) -> Any:
    if size not in _FONTS:
        _FONTS[size] = ImageFont.load_default(size)
    return _FONTS[size]
