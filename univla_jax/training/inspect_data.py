"""What a run would train on, as a page to look at."""

from __future__ import annotations

import os
import pathlib

from univla_jax.sequences.inspection import write_page
from univla_jax.training.run_assets import build_assets
from univla_jax.training.train_config import TrainConfig


def inspect_data(config: TrainConfig, workdir: str | os.PathLike[str], count: int) -> pathlib.Path:
    """Writes ``count`` training examples of a run to ``inspect.html`` in its workdir.

    Returns:
      the page.

    Raises:
      UserError: something in the config or the data to mend.
    """
    folder = pathlib.Path(workdir)
    page = write_page(config.data, build_assets(config, folder), count)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "inspect.html"
    path.write_text(page, encoding="utf-8")
    return path
