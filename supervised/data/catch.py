"""A made game: a ball bounces off walls and a paddle that actions move. No emulator is needed for it."""

import numpy as np

from supervised.data.config import DataConfig
from supervised.data.raw import Raw

SIDE, PADDLE, STEPS, GAMES = 16, 4, 64, 60
BALL, WOOD = 255, 160
"""How bright they are."""
ACTIONS = ("NOOP", "RIGHT", "LEFT")
STICK = 0.4
"""Probability that the player does again what he did last."""


def catch(config: DataConfig) -> Raw:
    """60 games of 64 steps of 16 x 16 pixels: the ball is one pixel, and an action moves the paddle by one.

    A game ends when the ball is missed, and the next begins.
    """
    rng = np.random.default_rng(0)
    frames = np.zeros((GAMES * STEPS, SIDE, SIDE), np.uint8)
    actions = np.zeros(GAMES * STEPS, np.int64)
    begins = np.zeros(GAMES * STEPS, bool)
    action, over = 0, True
    ball, way, paddle = np.zeros(2, np.int64), np.zeros(2, np.int64), 0
    for step in range(GAMES * STEPS):
        over = over or step % STEPS == 0
        if over:
            ball = np.array([1, rng.integers(1, SIDE - 1)])
            way = np.array([1, rng.choice((-1, 1))])
            paddle = int(rng.integers(SIDE - PADDLE + 1))
        begins[step] = over
        frames[step, SIDE - 1, paddle : paddle + PADDLE] = WOOD
        frames[step, ball[0], ball[1]] = BALL
        if rng.random() > STICK:
            follow = int(np.sign(ball[1] - paddle - PADDLE // 2))
            action = (0, 1, 2)[follow] if rng.random() < 0.9 else int(rng.integers(3))
        actions[step] = action
        paddle = min(max(paddle + (0, 1, -1)[action], 0), SIDE - PADDLE)
        over = False
        if ball[0] == SIDE - 2 and way[0] == 1:
            over = not paddle <= ball[1] < paddle + PADDLE
            way[0] = -1
        elif ball[0] == 0:
            way[0] = 1
        if not 0 <= ball[1] + way[1] < SIDE:
            way[1] = -way[1]
        ball = ball + way
    columns = {"frames": frames, "actions": actions, "begins": begins}
    return Raw(kind="frames", parts={"train": columns}, classes=ACTIONS)
