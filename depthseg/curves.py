"""The log of a training run: JSON lines, TensorBoard where it is installed, and the curves as a picture."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from depthseg.formats import atomic

LOG = "log.jsonl"
_LEFT_OUT = ("step", "minutes", "done")


class Log:
    """Lines of numbers by step. Of a run that goes on, lines behind the step that it goes on from are dropped."""

    def __init__(self, folder: Path, step: int):
        self.folder = folder
        self.lines = [line for line in _read(folder / LOG) if line["step"] <= step]
        with atomic(folder / LOG) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self._board: Any = None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._board:
            for name, value in line.items():
                if name not in _LEFT_OUT and isinstance(value, int | float):
                    self._board.add_scalar(name, value, line["step"])

    def draw(self) -> bool:
        """Write curves.png; False where matplotlib is not installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return False
        names = list(dict.fromkeys(k for line in self.lines for k, v in line.items() if isinstance(v, int | float) and k not in _LEFT_OUT))
        if not names:
            return True
        across = 4
        down = -(-len(names) // across)
        figure = Figure((4 * across, 2.6 * down), layout="constrained")
        for axes, name in zip(figure.subplots(down, across, squeeze=False).flat, names):
            points = [(line["step"], line[name]) for line in self.lines if isinstance(line.get(name), int | float)]
            axes.plot(*zip(*points, strict=True), linewidth=1, marker="." if len(points) < 30 else "")
            axes.set_title(name, fontsize=10)
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=8)
        for axes in figure.axes[len(names) :]:
            axes.remove()
        with atomic(self.folder / "curves.png") as part:
            figure.savefig(part, format="png", dpi=80)
        return True

    def close(self) -> None:
        if self._board:
            self._board.close()


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; the last one may be cut off."""
    lines = []
    with suppress(OSError, UnicodeError):
        for text in path.read_text().splitlines():
            with suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
    return lines
