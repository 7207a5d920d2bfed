"""Opens ``hf-libero``: its files, its assets, its renderer; nothing is asked or downloaded."""

from __future__ import annotations

import atexit
import importlib.util
import os
import pathlib
import shutil
import tempfile
from typing import Any

from univla_jax.errors import UserError

_DRAWING = (
    "drawing without a display needs EGL (Debian: apt-get install libegl1 libgl1 libgl1-mesa-dri) "
    "or MUJOCO_GL=osmesa (libosmesa6)"
)


def open_suite(suite: str, assets: str | None) -> Any:
    """LIBERO's suite object; nothing is written outside a temporary folder.

    Args:
      suite: its name.
      assets: folder with meshes and textures; by default the one of
        ``$LIBERO_CONFIG_PATH/config.yaml``, or of the package.

    Raises:
      UserError: the package or the assets are missing.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    spec = importlib.util.find_spec("libero")
    if spec is None:
        raise UserError("LIBERO needs the package hf-libero: pip install .[libero]")
    root = pathlib.Path(next(iter(spec.submodule_search_locations or ()))) / "libero"
    folder = pathlib.Path(assets or _configured_assets() or root / "assets")
    if not (folder / "scenes").is_dir():
        raise UserError(
            f"no LIBERO assets: {str(folder / 'scenes')!r} is no folder; give the folder of "
            "LIBERO's assets with --assets, or as 'assets' in $LIBERO_CONFIG_PATH/config.yaml"
        )
    home = tempfile.mkdtemp(prefix="libero-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    _write_config(pathlib.Path(home), root, folder)
    os.environ["LIBERO_CONFIG_PATH"] = home
    import libero.libero
    from libero.libero import benchmark as suites

    libero.libero._assets_path_cache = str(folder)  # it reads no config and would download
    return suites.get_benchmark(suite)()


def open_environment(bddl: str, side: int, gpu: int) -> Any:
    """LIBERO's environment of one task.

    Args:
      bddl: file that describes the task.
      side: of both cameras, in pixels.
      gpu: index of the device that draws; -1 leaves it to the renderer.

    Raises:
      UserError: a mesh or texture is missing, or nothing can draw here.
    """
    try:
        from libero.libero.envs import OffScreenRenderEnv

        return OffScreenRenderEnv(
            bddl_file_name=bddl, camera_heights=side, camera_widths=side, render_gpu_device_id=gpu
        )
    except FileNotFoundError as error:
        raise UserError(
            f"LIBERO task {pathlib.Path(bddl).stem}: {error.filename!r} is missing; give the "
            "folder of LIBERO's assets with --assets"
        ) from error
    except ValueError as error:  # MuJoCo's own, which names the file
        reason = " ".join(str(error).split())
        raise UserError(
            f"LIBERO task {pathlib.Path(bddl).stem}: {reason}; give the folder of LIBERO's assets "
            "with --assets"
        ) from error
    except (AttributeError, ImportError, OSError) as error:
        raise UserError(
            f"MUJOCO_GL={os.environ['MUJOCO_GL']}: {type(error).__name__}: {error}; {_DRAWING}"
        ) from error


def _configured_assets() -> str | None:
    import yaml

    home = os.environ.get("LIBERO_CONFIG_PATH", os.path.expanduser("~/.libero"))
    path = pathlib.Path(home) / "config.yaml"
    if not path.exists():
        return None
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("assets")


def _write_config(home: pathlib.Path, root: pathlib.Path, assets: pathlib.Path) -> None:
    """The file without which importing LIBERO asks questions."""
    import yaml

    paths = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": assets,
    }
    text = yaml.safe_dump({name: str(path) for name, path in paths.items()})
    (home / "config.yaml").write_text(text, encoding="utf-8")
