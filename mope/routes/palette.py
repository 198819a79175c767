"""Colors of heat map cells for light and dark screens, each with a readable text color."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex

from .pictures import HEAT

# Number of the color for the largest value; 0 is the color for a value of 0.
STEPS = 32
# Lightness increases monotonically, the reverse of HEAT.
GLOW = LinearSegmentedColormap.from_list("glow", ["#1c222c", "#1d5f58", "#43b3a4", "#c4f5ec"])


def step(part: float) -> int:
    """Return the number of the color for a value, given as a fraction of the largest one. NaN has the color of 0."""
    return 0 if np.isnan(part) else round(float(part) * STEPS)


def style() -> str:
    """Return a style sheet with the classes h0, h1, ..., which set the variables --ground (background) and --ink (text)."""
    return f"{_rules(HEAT)}\n@media screen and (prefers-color-scheme: dark) {{\n{_rules(GLOW)}\n}}\n"


def _rules(colors: Colormap) -> str:
    grounds = [colors(i / STEPS)[:3] for i in range(STEPS + 1)]
    return "\n".join(f".h{i} {{ --ground: {to_hex(c)}; --ink: {_ink(c)}; }}" for i, c in enumerate(grounds))


def _ink(ground: tuple[float, ...]) -> str:
    """Return black or white, whichever contrasts more with a color. The WCAG contrast ratio is at least 4.5."""
    color = np.array(ground)
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ [0.2126, 0.7152, 0.0722])
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
