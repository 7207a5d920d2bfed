"""Model server for vla-eval: a checkpoint in another harness' benchmarks, without our evaluation.

    pip install vla-eval
    python -m univla_jax.serving.vla_eval_server --checkpoint=WORKDIR --port=8001 \\
        --views=image=agentview,wrist_image=wrist --gripper=sign

vla-eval (pypi.org/project/vla-eval, 0.8) runs a benchmark in a container of its own and asks this
server by its websocket protocol: ``images`` by camera, ``task_description``, ``states``. Simulators
that ask together are answered in one batch; each connection is an episode's history, emptied when
its next episode starts. Actions are those of ``Policy.act``: physical units of the training data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from univla_jax import cli
from univla_jax.data.action_conventions import sign_gripper
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.policy import Policy

CHECKPOINT = cli.string_flag("checkpoint", "policy checkpoint, or the workdir of its training")
CORPUS = cli.string_flag("corpus", "corpus whose cameras and statistics are used", required=False)
HOST = cli.string_flag("host", "address to listen on", default="127.0.0.1")
PORT = flags.DEFINE_integer("port", 8001, "port to listen on", allow_override=True)
VIEWS = flags.DEFINE_list(
    "views", [], "our camera=the benchmark's; by default the same name, else the same place"
)
GRIPPER = flags.DEFINE_enum(
    "gripper", "raw", ["raw", "sign"], "sign sends +1 above 0 and -1 else, as LIBERO and CALVIN do"
)
ROTATION = flags.DEFINE_enum(
    "rotation", "axis_angle", ["axis_angle", "euler_xyz"], "what the rotation of an action is"
)
BATCH = flags.DEFINE_integer("max_batch", 8, "simulators answered in one call, at most")


def camera_names(pairs: Sequence[str], views: Sequence[str]) -> dict[str, str]:
    """Our cameras and the benchmark's, from ``ours=theirs``.

    Raises:
      UserError: an entry of another form, or a camera that the policy does not have.
    """
    found = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals or ours not in views:
            raise UserError(f"--views: {pair!r}, expected one of {', '.join(views)}=THEIR_NAME")
        found[ours] = theirs
    return found


def observation_of(
    message: Mapping[str, Any], views: Sequence[str], names: Mapping[str, str]
) -> Observation:
    """A policy's observation from one of vla-eval.

    Args:
      message: ``images`` by camera (or one picture), ``task_description``, ``states`` or ``state``.
      views: cameras of the policy.
      names: our camera -> theirs; others take the same name, or the same place where none is named.

    Raises:
      UserError: a camera that the benchmark does not send.
    """
    images = message.get("images", {})
    images = images if isinstance(images, Mapping) else {views[0]: images}
    order, frames = list(images), {}
    for place, view in enumerate(views):
        theirs = names.get(view, view)
        if theirs not in images and not names and place < len(order):
            theirs = order[place]
        if theirs not in images:
            raise UserError(
                f"camera {theirs!r} is missing, the benchmark sends {', '.join(order) or 'none'}; "
                "give --views=OURS=THEIRS, or let it send the camera"
            )
        frames[view] = np.asarray(images[theirs])
    state = message.get("states", message.get("state"))
    state = None if state is None else np.asarray(state, np.float32)
    return Observation(str(message.get("task_description", "")), frames, state)


def make_server(
    policy: Policy,
    *,
    names: Mapping[str, str] | None = None,
    gripper: str = "raw",
    rotation: str = "axis_angle",
    max_batch: int = 8,
) -> Any:
    """A ``vla_eval.model_servers.base.ModelServer`` that answers with a policy.

    Args:
      policy: answers.
      names: our camera -> the benchmark's.
      gripper: ``"raw"``, or ``"sign"`` for +1 above 0 and -1 else.
      rotation: what the policy's rotations are, for the check of the benchmark's specification.
      max_batch: simulators answered in one call.

    Raises:
      UserError: vla-eval is not installed.
    """
    try:
        from vla_eval import specs
        from vla_eval.model_servers.predict import PredictModelServer
    except ImportError as error:
        raise UserError("vla-eval is not installed; pip install vla-eval") from error

    class UnivlaModelServer(PredictModelServer):
        """One policy, a session for each connection."""

        def __init__(self) -> None:
            super().__init__(chunk_size=policy.chunk_size, max_batch_size=max_batch)
            self._sessions: dict[str, Any] = {}
            policy.warmup(1)

        async def on_episode_start(self, config: dict[str, Any], ctx: Any) -> None:
            await super().on_episode_start(config, ctx)
            self._sessions[ctx.session_id] = policy.start()

        async def on_episode_end(self, result: dict[str, Any], ctx: Any) -> None:
            await super().on_episode_end(result, ctx)
            self._sessions.pop(ctx.session_id, None)

        def predict_batch(
            self, obs_batch: list[dict[str, Any]], ctx_batch: list[Any]
        ) -> list[dict[str, Any]]:
            observations = [observation_of(obs, policy.views, names or {}) for obs in obs_batch]
            sessions = [self._sessions[ctx.session_id] for ctx in ctx_batch]
            # The harness may execute only the beginning of a chunk before it asks again: the
            # history has to hold what was executed, as it does in our own evaluation, or the
            # policy is shown an episode that did not happen.
            for ctx, session in zip(ctx_batch, sessions, strict=True):
                taken = self._get_chunk_size(ctx)
                if session.returned is not None and taken is not None:
                    session.set_executed(min(taken, len(session.returned)))
            chunks = [chunk.actions for chunk in policy.act(observations, sessions)]
            return [{"actions": sign_gripper(a) if gripper == "sign" else a} for a in chunks]

        def get_action_spec(self) -> dict[str, Any]:
            size = policy.statistics.action_dim
            if size != 7:
                return {"actions": specs.DimSpec("actions", size, "raw")}
            turns = {"axis_angle": specs.ROTATION_AA, "euler_xyz": specs.ROTATION_EULER}[rotation]
            grip = specs.GRIPPER_CLOSE_POS if gripper == "sign" else specs.GRIPPER_RAW
            return {"position": specs.POSITION_DELTA, "rotation": turns, "gripper": grip}

        def get_observation_spec(self) -> dict[str, Any]:
            return {"image": specs.IMAGE_RGB, "language": specs.LANGUAGE}

        def get_observation_params(self) -> dict[str, Any]:
            # What LIBERO's and other benchmarks of the harness call it.
            wants = {"send_wrist_image": len(policy.views) > 1}
            return wants | {"send_state": policy.state_encoder.example() is not None}

    return UnivlaModelServer()


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    policy = Policy.load(CHECKPOINT.value, corpus=CORPUS.value)
    server = make_server(
        policy,
        names=camera_names(VIEWS.value, policy.views),
        gripper=GRIPPER.value,
        rotation=ROTATION.value,
        max_batch=BATCH.value,
    )
    from vla_eval.model_servers.serve import serve

    print(f"vla-eval's server at ws://{HOST.value}:{PORT.value}", flush=True)
    serve(server, host=HOST.value, port=PORT.value)


if __name__ == "__main__":
    cli.run(main)
