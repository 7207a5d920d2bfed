"""Run with eight virtual devices: a policy split in every way answers as on one device.

python -m tests.inference.sharded_program WORKDIR      prints what it found as one line of JSON
"""

from __future__ import annotations

import functools
import json
import sys

import jax
import numpy as np

from tests.inference import tiny_checkpoint
from univla_jax.benchmarks.serving_speed import Fleet, answers_alone, num_differing
from univla_jax.episode import Observation
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.memory import device_bytes
from univla_jax.inference.policy import Policy
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.training.model_setup import inference_placement, replica_devices

CALLS, ROBOTS = 3, 4
WORDS = ("push the red block to the left", "touch green")


def _observation(call, robot):
    rng = np.random.default_rng([call, robot])
    frames = {
        view: rng.integers(0, 256, (8 * h, 8 * w, 3), np.uint8)
        for view, (h, w) in tiny_checkpoint.GRIDS.items()
    }
    return Observation(WORDS[robot % 2], frames)


def _answers(policy, compiled):
    """Ids of all chunks of robots that come and go, alone and together; the bytes of a cache."""
    policy.warmup(ROBOTS)
    compiled.clear()
    sessions, ids = [policy.start(i) for i in range(ROBOTS)], []
    for call in range(CALLS):
        for group in ([0], range(ROBOTS)):
            policy.act([_observation(call, robot) for robot in group], [sessions[i] for i in group])
            ids.append([sessions[i].last_ids.tolist() for i in group])
        policy.prefill_ahead()
        sessions[call] = policy.start(call)
    return ids, device_bytes(sessions[-1].cached_prefix.cache)


def main(workdir):
    """Compares answers, and where parameters and caches lie."""
    compiled, found = [], {}
    listen = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    ways = {
        "one": {},
        "tensor 2": {"tensor": 2},
        "tensor 4": {"tensor": 4},
        "tensor 2, fsdp 2": {"tensor": 2, "fsdp": 2},
    }
    for name, sizes in ways.items():
        place = functools.partial(inference_placement, **sizes)
        options = {"batch_size": ROBOTS, "max_instruction_tokens": 24}
        policy = Policy.load(workdir, place=place, block=3 if sizes else 1, **options)
        ids, kept = _answers(policy, compiled)
        sampler = policy.action_decoder._sampler
        found[name] = {
            "ids": ids,
            "late": len(compiled),
            "devices": len(sampler.params["head"].sharding.device_set),
            "weights": device_bytes(sampler.params),
            "cache": policy.memory(1)["cache of a robot"],
            "kept": kept,
        }
        if sizes:
            int8 = Policy.load(workdir, place=place, int8=True)
            found[name]["int8"] = device_bytes(int8.loaded.params)
    print(json.dumps(found))


def imagine(workdir):
    """Codes of a world model on one device without drafts, and split with them."""
    codes = []
    for tensor, block in ((1, 1), (4, 12)):
        place = functools.partial(inference_placement, tensor=tensor)
        model = WorldModel.load(workdir, place=place)
        context = np.arange(9).reshape(1, 1, 3, 3) % 16
        imagine = functools.partial(model.imagine, ["touch green"], context, 2, block=block)
        ways = (GREEDY, 1.0), (GREEDY, 1.5), (Sampling(1.0), 1.0), (Sampling(1.0), 1.5)
        codes.append([imagine(sampling=own, guidance=by).tolist() for own, by in ways])
    print(json.dumps(codes))


ROBOTS_SERVED = 8


def serve(workdir, requests):
    """Answers of robots at a server of split policies, beside those of one device alone."""
    found, options = {}, {"batch_size": ROBOTS_SERVED, "max_new_tokens": 12}
    alone = Policy.load(workdir, **options)
    expected = [answers_alone(alone, robot, int(requests)) for robot in range(ROBOTS_SERVED)]
    with Fleet(ROBOTS_SERVED) as fleet:
        for name, tensor, replicas in (("tensor 2", 2, 1), ("tensor 4", 4, 1), ("2 of 2", 2, 2)):
            policy, *further = [
                Policy.load(
                    workdir,
                    place=functools.partial(inference_placement, tensor=tensor, devices=devices),
                    **options,
                )
                for devices in replica_devices({"tensor": tensor}, replicas)
            ]
            run = fleet.run(policy, int(requests), max_batch=ROBOTS_SERVED, further=further)
            found[name] = {
                "answers": sum(map(len, run.chunks)),
                "differing": num_differing(run, expected),
                "devices": [
                    sorted(d.id for d in p.loaded.params["head"].sharding.device_set)
                    for p in (policy, *further)
                ],
            }
    print(json.dumps(found))


PROGRAMS = {"imagine": imagine, "serve": serve}


if __name__ == "__main__":
    PROGRAMS.get(sys.argv[1], main)(*(sys.argv[2:] if sys.argv[1] in PROGRAMS else sys.argv[1:]))
