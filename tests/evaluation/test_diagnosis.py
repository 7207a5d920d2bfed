"""The doctor, asked about a policy that knows the recorded episodes by heart."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
from etils import epath

from univla_jax.benchmarks import injected_faults
from univla_jax.episode import ActionChunk
from univla_jax.evaluation.diagnosed_setup import Setup
from univla_jax.evaluation.diagnosis import diagnose, table
from univla_jax.normalization import stream_statistics
from univla_jax.simulators import make_benchmark
from univla_jax.simulators.tabletop.tabletop_env import FAMILIES
from univla_jax.simulators.tabletop.tabletop_expert import demonstrate

SIZE = 5
EPISODES = tuple(demonstrate(seed, family=FAMILIES[seed % 5]) for seed in range(10))
STATISTICS = stream_statistics(lambda: [e.actions for e in EPISODES])


def _key(instruction, frames):
    return instruction, frames["image"].tobytes(), frames["wrist_image"].tobytes()


def _by_heart():
    """Normalized chunk of every step of the episodes, by what is seen there."""
    known = {}
    for episode in EPISODES:
        for step in range(len(episode) - SIZE + 1):
            frames = {view: f[step] for view, f in episode.frames.items()}
            chunk = STATISTICS.normalize(episode.actions[step : step + SIZE])
            known.setdefault(_key(episode.instruction, frames), chunk)
    return known


@dataclasses.dataclass(frozen=True)
class _Record:
    frames: int = 2
    chunk_size: int = SIZE
    corpora: dict = dataclasses.field(
        default_factory=lambda: {"tabletop": types.SimpleNamespace(control_hz=5.0)}, hash=False
    )


class _Policy:
    """Answers what was recorded where it recognizes what it sees, else the middle of the range."""

    views, chunk_deltas, absolute_dims = ("image", "wrist_image"), None, (6,)

    def __init__(self, known, record, statistics):
        self._known, self.statistics, self.loaded = known, statistics, _Policies.loaded
        self.chunk_size, self._right = record.chunk_size, record == _Record()

    def start(self, seed=0):
        return types.SimpleNamespace(set_executed=lambda actions: None)

    def act(self, observations, sessions):
        chunks = []
        for observation in observations:
            found = self._known.get(_key(observation.instruction, observation.frames))
            if found is None or not self._right:
                found = np.zeros((self.chunk_size, 7))
            chunks.append(ActionChunk(self.statistics.unnormalize(found)))
        return chunks


class _Policies:
    """Stands for ``PolicyVariants``."""

    corpus = "tabletop"
    loaded = types.SimpleNamespace(
        record=_Record(),
        assets=types.SimpleNamespace(statistics={}, action=None),
        task=types.SimpleNamespace(needs=types.SimpleNamespace(action_tokens=False)),
    )

    def __init__(self, known, record=_Record(), statistics=STATISTICS):
        self._known, self._record, self._statistics = known, record, statistics
        self.loaded = types.SimpleNamespace(**{**vars(type(self).loaded), "record": record})

    def make(self, *, statistics=None, **settings):
        record = dataclasses.replace(self._record, **settings)
        return _Policy(self._known, record, statistics or self._statistics)

    def but_with(self, *, statistics=None, **settings):
        record = dataclasses.replace(self._record, **settings)
        return _Policies(self._known, record, statistics or self._statistics)


@pytest.fixture(scope="module")
def setup():
    benchmark = make_benchmark("tabletop", episodes=5)
    return Setup(_Policies(_by_heart()), EPISODES, benchmark, rollouts=5)


FAULTS = {
    fault.name: fault
    for fault in injected_faults.all_faults()
    if fault.convention
    not in ("tokenizer", "resize", "time shift")  # which it cannot know by heart
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(setup, name, tmp_path):
    fault = FAULTS[name]
    report = diagnose(fault.inject(setup), epath.Path(tmp_path))
    first = report["findings"][0]
    assert (first["convention"], first["where"]) == (fault.convention, fault.where)
    assert first["field"] and first["saw"] and first["sure"] > 0.5
    assert first["saw"] in table(report)


def test_nothing_is_found_where_nothing_is_wrong(setup, tmp_path):
    alone = dataclasses.replace(setup, episodes=EPISODES[:5])
    report = diagnose(alone, epath.Path(tmp_path))
    assert report["findings"] == []
    assert report["simulator"]["runs"]["replayed as recorded"]["rate"] == 1.0
    assert "no convention was found to be wrong" in table(report)


def test_data_alone_are_enough(setup, tmp_path):
    upside_down = FAULTS["data upside down"].inject(setup)
    alone = dataclasses.replace(upside_down, benchmark=None, episodes=upside_down.episodes[:5])
    report = diagnose(alone, epath.Path(tmp_path))
    assert [found["convention"] for found in report["findings"]] == ["flipped view"]
    assert report["findings"][0]["change"] == "all views upside down"
    assert report["simulator"] == {}
