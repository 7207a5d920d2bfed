"""Trains on TPU slices of a GKE cluster: builds the image, applies a JobSet, shows logs, deletes.

    python launch/gke.py build --image=REGION-docker.pkg.dev/PROJECT/REPO/univla_jax
    python launch/gke.py apply NAME --image=... --topology=v6e:8x8 --claim=PVC \\
        -- train --config=configs/libero.py:video --workdir=/mnt/shared/libero
    python launch/gke.py logs NAME
    python launch/gke.py delete NAME

The cluster needs the JobSet controller and a persistent volume that many pods can write
(Filestore), mounted at /mnt/shared. A preempted pod saves its step (SIGTERM, exit status 83); the
JobSet then restarts all pods, which resume from the newest checkpoint. With --dry_run every command
and the manifest are printed and nothing is run.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import string
import sys

from shell import Shell, fail, split_command

FOLDER = pathlib.Path(__file__).resolve().parent
ACCELERATORS = {  # node label, chips per host
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
}


def manifest(options: argparse.Namespace) -> str:
    """The JobSet manifest that the command line asks for."""
    chip, _, shape = options.topology.partition(":")
    if chip not in ACCELERATORS or not shape:
        fail(
            f"--topology={options.topology!r}; expected CHIP:SHAPE such as v6e:8x8, with a "
            f"chip of {', '.join(ACCELERATORS)}"
        )
    if not options.command:
        fail("no command; write it behind --, for example -- train --config=...")
    # One pod per host of the slice. Slices of fewer chips than a full host are one pod that asks
    # for all of them.
    accelerator, per_host = ACCELERATORS[chip]
    chips = math.prod(int(size) for size in shape.split("x"))
    module, *rest = options.command
    template = string.Template((FOLDER / "gke_jobset.yaml").read_text(encoding="utf-8"))
    return template.substitute(
        name=options.name,
        image=options.image,
        arguments=json.dumps([f"univla_jax.{module}", "--distributed", *rest]),
        accelerator=accelerator,
        topology=shape,
        slices=options.slices,
        hosts=max(1, chips // per_host),
        chips_per_host=min(chips, per_host),
        restarts=options.restarts,
        claim=options.claim,
    )


def build(options: argparse.Namespace, shell: Shell) -> None:
    """Builds and pushes the image."""
    file = ["-f", str(FOLDER / "Dockerfile"), "--build-arg", f"EXTRA={options.extra}"]
    shell.run(["docker", "build", *file, "-t", options.image, str(FOLDER.parent)])
    shell.run(["docker", "push", options.image])


def apply(options: argparse.Namespace, shell: Shell) -> None:
    """Starts the run, or restarts it with a changed manifest."""
    shell.run(["kubectl", "apply", "-f", "-"], stdin=manifest(options))


def logs(options: argparse.Namespace, shell: Shell) -> None:
    """Follows the output of the first pod of the first slice."""
    pods = (
        f"jobset.sigs.k8s.io/jobset-name={options.name},batch.kubernetes.io/job-completion-index=0"
    )
    shell.run(["kubectl", "logs", "--follow", "--tail=-1", "-l", pods], check=False)


def delete(options: argparse.Namespace, shell: Shell) -> None:
    """Ends the run; its workdir is kept."""
    shell.run(["kubectl", "delete", "jobset", options.name])


ACTIONS = {"build": build, "apply": apply, "logs": logs, "delete": delete}


def main() -> None:
    """Runs the action of the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("gke.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("action", choices=list(ACTIONS))
    parser.add_argument("name", nargs="?", default="univla", help="name of the JobSet")
    parser.add_argument("--image", default="univla_jax", help="image name, with its registry")
    parser.add_argument("--extra", default="tpu", help="extra of setup.py: tpu or cuda")
    parser.add_argument("--topology", default="v6e:8x8", help="of one slice, such as v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1, help="also set --config.mesh.replica")
    parser.add_argument("--claim", default="shared", help="persistent volume claim of /mnt/shared")
    parser.add_argument("--restarts", type=int, default=1000, help="most restarts of the JobSet")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run none")
    own, command = split_command(sys.argv[1:])
    options = parser.parse_args(own, argparse.Namespace(command=command))
    ACTIONS[options.action](options, Shell(options.dry_run))


if __name__ == "__main__":
    main()
