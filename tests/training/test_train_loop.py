"""The loop's order and exact resume; whole runs in miniature, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import tiny_run, toy
from univla_jax import checkpoints, io
from univla_jax.assets import Assets
from univla_jax.checkpoints import CheckpointConfig, Checkpointer
from univla_jax.data.token_store import TokenStore
from univla_jax.errors import UserError
from univla_jax.training import run_assets, train_loop
from univla_jax.training.distributed import Preempted, SigtermHandler
from univla_jax.training.metrics import METRICS_FILE, MetricsLogger
from univla_jax.training.model_setup import TrainSetup
from univla_jax.training.sharding import MeshConfig, batch_sharding, make_mesh
from univla_jax.training.train_loop import fit

TOTAL = 10


def _fit(workdir, *, batches=None, every=3, **options):
    """Trains the toy in ``workdir``, from its newest checkpoint if there is one."""
    batches = batches or toy.Batches()
    state = toy.create()
    with Checkpointer(workdir, CheckpointConfig(every=every)) as saver:
        state = saver.restore(toy.template(state), batches) or state
        with MetricsLogger(
            workdir, start_step=int(state.step), total_steps=TOTAL, progress=False
        ) as log:
            return fit(
                state,
                toy.step,
                batches,
                total_steps=TOTAL,
                checkpointer=saver,
                logger=log,
                **options,
            )


def _lines(workdir):
    return io.read_jsonl(workdir / METRICS_FILE)


def _assert_same(folder, other, state, other_state):
    assert (folder / METRICS_FILE).read_bytes() == (other / METRICS_FILE).read_bytes()
    jax.tree.map(np.testing.assert_array_equal, state, other_state)


def test_trains_to_the_end_and_saves_it(tmp_path):
    state = _fit(tmp_path)
    assert int(state.step) == TOTAL
    assert [line["step"] for line in _lines(tmp_path)] == list(range(TOTAL))
    assert _lines(tmp_path)[-1]["loss"] < _lines(tmp_path)[0]["loss"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "9"]


@pytest.mark.parametrize("crash", [1, 3, 4, 7, 9])
def test_a_crash_and_a_resume_leave_no_trace(tmp_path, crash):
    """The data source breaks before batch ``crash``; the second start ends bit-equal."""
    whole = _fit(tmp_path / "whole")
    with pytest.raises(UserError, match=f"ended before step {crash}"):
        _fit(tmp_path / "cut", batches=toy.Batches(end=crash))
    _assert_same(tmp_path / "whole", tmp_path / "cut", whole, _fit(tmp_path / "cut"))


def test_sigterm_saves_the_step_at_hand(tmp_path):
    whole = _fit(tmp_path / "whole")

    class Shoot(toy.Batches):
        def __next__(self):
            if self.position == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    with SigtermHandler() as watch, pytest.raises(Preempted) as stopped:
        _fit(tmp_path / "cut", batches=Shoot(), stop=watch)
    assert stopped.value.step == 5
    assert (tmp_path / "cut" / "checkpoints" / "5").is_dir()
    _assert_same(tmp_path / "whole", tmp_path / "cut", whole, _fit(tmp_path / "cut"))


@pytest.mark.parametrize("poison", [5, 6])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, poison):
    """Also when the poisoned step is the one right before a checkpoint (step 6 saves state 6)."""
    with pytest.raises(UserError, match=f"loss is nan at step {poison}"):
        _fit(tmp_path, batches=toy.Batches(poison=poison))
    good = {5: "3", 6: "6"}[poison]
    assert max(p.name for p in (tmp_path / "checkpoints").iterdir()) == good
    assert [line["step"] for line in _lines(tmp_path)] == list(range(poison))


class _Evaluation:
    def due(self, step):
        return step > 0 and step % 4 == 0

    def __call__(self, state):
        return {"eval/norm": float((state.params["w"] ** 2).sum())}


def test_evaluation_lines_survive_a_crash(tmp_path):
    whole = _fit(tmp_path / "whole", evaluation=_Evaluation())
    evaluated = [line["step"] for line in _lines(tmp_path / "whole") if "eval/norm" in line]
    assert evaluated == [4, 8, 10]
    with pytest.raises(UserError):
        _fit(tmp_path / "cut", batches=toy.Batches(end=8), every=4, evaluation=_Evaluation())
    again = _fit(tmp_path / "cut", every=4, evaluation=_Evaluation())
    _assert_same(tmp_path / "whole", tmp_path / "cut", whole, again)


def test_global_batches_keep_position_and_values():
    class Source:
        position = 3

        def __next__(self):
            return {"x": np.arange(4.0, dtype=np.float32)}

        def get_state(self):
            return bytes([self.position])

        def set_state(self, state):
            self.position = state[0]

        def close(self):
            self.position = None

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    source = Source()
    checked = []
    wrapped = train_loop.GlobalBatches(source, batch_sharding(mesh), check=checked.append)
    batch = next(wrapped)
    assert len(checked) == 1
    assert isinstance(batch["x"], jax.Array)
    np.testing.assert_array_equal(batch["x"], jnp.arange(4.0))
    assert wrapped.get_state() == b"\x03"
    wrapped.set_state(b"\x07")
    assert source.position == 7
    with wrapped:
        pass
    assert source.position is None


# ----------------------------------------------------------------------------
# Whole runs.

pytestmark = pytest.mark.usefixtures("compilation_cache")
EVALUATED = {"evaluation__every": 3}


def _train(config, folder):
    train_loop.train(config, folder, progress=False)


def _params(folder: pathlib.Path, config):
    checkpoint = checkpoints.find_checkpoint(folder)
    assets = Assets.load(checkpoints.assets_folder(checkpoint))
    model = TrainSetup.build(config, assets.vocabulary, make_mesh(MeshConfig()))
    return checkpoints.load_params(checkpoint, model.abstract.params)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of an uninterrupted policy run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    _train(tiny_run.config(world, **EVALUATED), folder)
    return folder


def test_a_run_learns_and_leaves_a_checkpoint_that_is_enough(world, whole):
    lines = io.read_jsonl(whole / METRICS_FILE)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(6))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert steps[0]["action_loss"] == steps[0]["loss"] and "visual_loss" not in steps[0]
    assert [line["step"] for line in lines if "eval/loss" in line] == [3, 6]
    assets = Assets.load(checkpoints.assets_folder(whole / "checkpoints" / "6"))
    assert assets.model["hidden_size"] == 32
    assert assets.model["vocab_size"] == assets.vocabulary.size
    assert assets.task["views"] == ["image", "wrist_image"]
    assert assets.task["corpora"]["tabletop"] == {
        "control_hz": 5.0,
        "frame_spacing": 5,
        "grids": {"image": [3, 3], "wrist_image": [2, 2]},
    }
    assert set(assets.statistics) == {"tabletop"}
    assert (assets.continuations.table >= 0).any()


def test_the_record_says_whether_states_are_shown(world):
    """Only where they are: the record of a run without them keeps the keys it always had."""
    data = tiny_run.config(world).data
    stores = [TokenStore(folder) for folder in data.stores]
    plain = run_assets.task_record(data, stores).to_json()
    shown = run_assets.task_record(dataclasses.replace(data, state=True), stores).to_json()
    assert "state" not in plain and shown == {**plain, "state": True}
    assert plain["layout"] == "policy_video" and plain["action_frames"] == 3


def _interrupted_at(step):
    """``GlobalBatches.__next__`` that is interrupted before batch ``step``."""
    taken, following = [], train_loop.GlobalBatches.__next__

    def take(self):
        if len(taken) == step:
            raise KeyboardInterrupt
        taken.append(0)
        return following(self)

    return take


@pytest.mark.parametrize("crash", [1, 5])
def test_a_crash_and_a_resume_are_bit_equal_to_an_uninterrupted_run(
    world, whole, tmp_path, monkeypatch, crash
):
    config = tiny_run.config(world, **EVALUATED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_loop.GlobalBatches, "__next__", _interrupted_at(crash))
        _train(config, tmp_path)
    _train(config, tmp_path)
    assert (tmp_path / METRICS_FILE).read_bytes() == (whole / METRICS_FILE).read_bytes()
    left, right = _params(tmp_path, config), _params(whole, config)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_finished_run_says_so(world, whole, capsys):
    before = (whole / METRICS_FILE).read_bytes()
    _train(tiny_run.config(world, **EVALUATED), whole)
    assert "is trained to step 6 already" in capsys.readouterr().err
    assert (whole / METRICS_FILE).read_bytes() == before


def test_another_config_is_refused(world, whole):
    with pytest.raises(UserError, match=r"optimizer\.learning_rate was 0\.01, is 0\.02"):
        _train(tiny_run.config(world, **EVALUATED, optimizer__learning_rate=0.02), whole)


def test_a_run_goes_on_without_the_folders_it_was_made_from(world, whole, tmp_path):
    """Nor does it need its own copy of the assets: the newest checkpoint has them."""
    own = tmp_path / "world"
    shutil.copytree(world, own)
    config = tiny_run.config(own, total_steps=2)
    _train(config, tmp_path / "run")
    for gone in ("text", "vision", "action"):
        shutil.rmtree(own / gone)
    shutil.rmtree(tmp_path / "run" / "assets" / "text")
    _train(dataclasses.replace(config, total_steps=3), tmp_path / "run")
    assert checkpoints.find_checkpoint(tmp_path / "run").name == "3"
    shutil.rmtree(own / "store")
    tiny_run.make_store(own / "store", Assets.load(tmp_path / "run/assets").vision.fingerprint, 9)
    with pytest.raises(UserError, match="a token store was changed since the run was begun"):
        _train(dataclasses.replace(config, total_steps=4), tmp_path / "run")


def test_a_checkpoint_with_changed_assets_counts_as_damaged(whole, tmp_path, caplog):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    record = next((copy / "checkpoints" / "6" / "assets").glob("text/*.json"))
    record.write_text(record.read_text() + " ")
    with pytest.raises(UserError, match="was changed after the checkpoint was written"):
        Assets.load(checkpoints.assets_folder(copy / "checkpoints" / "6"))
    newest = checkpoints.intact_checkpoint(copy, Assets.load)
    assert newest.name == "4" and "was changed after the checkpoint was written" in caplog.text


def test_a_forced_change_is_recorded(world, whole, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    changed = tiny_run.config(
        world, **EVALUATED, total_steps=7, optimizer__learning_rate=0.02, data__seed=7
    )
    with pytest.raises(UserError, match=r"data\.seed was 42, is 7; optimizer\.learning_rate was"):
        _train(changed, copy)
    assert not (copy / train_loop.FORCED_FILE).exists()
    train_loop.train(changed, copy, progress=False, force=True)
    assert "warning: the data begins anew" in capsys.readouterr().err
    (change,) = io.read_json(copy / train_loop.FORCED_FILE)["changes"]
    assert change["step"] == 6 and len(change["config"]) == 2
    steps = [line["step"] for line in io.read_jsonl(copy / METRICS_FILE) if "loss" in line]
    assert steps == list(range(7))


@pytest.mark.slow
def test_what_leaves_the_mathematics_alone_may_change_between_starts(
    world, whole, tmp_path, monkeypatch
):
    """A smaller slice after a preemption needs less memory; disks and buckets come and go."""
    first = tiny_run.config(world, **EVALUATED, model__overrides={"remat": "full"})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_loop.GlobalBatches, "__next__", _interrupted_at(4))
        _train(first, tmp_path / "run")
    shutil.copytree(world / "store", tmp_path / "moved" / "store")
    settings = {
        "accumulation": 2,
        "loss__chunks": 2,
        "loss__max_labeled": 200,
        "optimizer__offload": True,
        "data__stores": (str(tmp_path / "moved" / "store"),),
        "init_from": "/nowhere",
        "model__overrides": {"remat": "attention", "attention": "plain", "scan_unroll": 2},
    }
    _train(tiny_run.config(world, **EVALUATED, **settings), tmp_path / "run")
    expected = [line.get("loss") for line in io.read_jsonl(whole / METRICS_FILE)]
    found = [line.get("loss") for line in io.read_jsonl(tmp_path / "run" / METRICS_FILE)]
    np.testing.assert_allclose(
        [loss for loss in found if loss], [loss for loss in expected if loss], rtol=1e-3
    )


@pytest.fixture(scope="module")
def world_model(world, tmp_path_factory):
    """Config and folder of a world-model run, the stage before a policy."""
    config = tiny_run.config(
        world,
        total_steps=2,
        data__task="world_model",
        data__frame_spacing=3,
        data__vision_weight=1.0,
        accumulation=2,
    )
    folder = tmp_path_factory.mktemp("runs") / "world_model"
    _train(config, folder)
    return config, folder


def test_a_policy_starts_from_a_world_model(world, world_model, tmp_path):
    earlier, folder = world_model
    line = io.read_jsonl(folder / METRICS_FILE)[0]
    assert line["visual_loss"] == pytest.approx(line["loss"], rel=0.1)
    config = tiny_run.config(
        world,
        total_steps=1,
        init_from=str(folder),
        tokenizers={},
        optimizer__warmup_steps=1,
    )
    _train(config, tmp_path)
    before, after = _params(folder, earlier), _params(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, before, after)  # the rate of step 0 is 0


def test_an_earlier_stage_with_other_tokenizers_is_refused(world, world_model, tmp_path):
    other = tmp_path / "action"
    shutil.copytree(world / "action", other)
    settings = json.loads((other / "processor_config.json").read_text())
    (other / "processor_config.json").write_text(json.dumps({**settings, "scale": 7}))
    config = tiny_run.config(world, init_from=str(world_model[1]), tokenizers__action=str(other))
    with pytest.raises(UserError, match="was made with another action tokenizer"):
        _train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_earlier_stage_of_another_size_is_refused(world, world_model, tmp_path):
    config = tiny_run.config(
        world, init_from=str(world_model[1]), model__overrides={"mlp_size": 128}
    )
    with pytest.raises(UserError, match="is of another model or optimizer: params/"):
        _train(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__batch_size": 3, "accumulation": 2}, "batch size: 3"),
        ({"mesh": {"fsdp": 7}}, "mesh: .* does not divide"),
        ({"data__stores": ()}, r"data\.stores: none named"),
        ({"data__stores": ("/nowhere",)}, "/nowhere"),
        ({"tokenizers__text": ""}, r"tokenizers\.text is empty"),
        ({"tokenizers__action": ""}, r"tokenizers\.action is empty"),
        ({"tokenizers__text": "/nowhere"}, "/nowhere"),
        ({"data__chunk_size": 2}, "fitted to chunks of 3 steps, data.chunk_size is 2"),
        ({"init_from": "/nowhere"}, "no complete checkpoint in /nowhere"),
        ({"model__preset": "huge"}, "model preset 'huge' is unknown"),
        ({"model__overrides": {"vocab_size": 3}}, "comes from the vocabulary"),
        ({"loss__max_labeled": 2}, "max_labeled=2, but element"),
        ({"data__held_out_every": 0, "evaluation__every": 2}, "nothing is held out"),
        ({"loss__normalization": "local"}, r"loss\.normalization: 'local'"),
        ({"optimiser": {}}, r"config\.optimiser: unknown key; did you mean 'optimizer'"),
    ],
)
def test_what_is_refused(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        _train(tiny_run.config(world, **changes), tmp_path / "run")


def test_a_store_of_another_vision_tokenizer_is_refused(world, tmp_path):
    tiny_run.make_store(tmp_path / "store", vision="another")
    config = tiny_run.config(world, data__stores=(str(tmp_path / "store"),))
    with pytest.raises(UserError, match="another vision tokenizer"):
        _train(config, tmp_path / "run")


def test_a_corpus_in_several_stores_gets_joint_statistics(world, tmp_path):
    from univla_jax.data.token_store import TokenStore
    from univla_jax.training import run_assets

    tiny_run.make_store(tmp_path / "more", vision="any", episodes=3, seed=1)
    stores = [TokenStore(world / "store"), TokenStore(tmp_path / "more")]
    joint = run_assets.statistics(stores)["tabletop"]
    assert joint.count == sum(store.statistics["tabletop"].count for store in stores)
    assert run_assets.statistics(stores[:1]) == stores[0].statistics


def test_the_config_of_a_workdir_can_be_read_back(world, whole):
    from univla_jax import run_dir
    from univla_jax.training.train_config import TrainConfig

    assert run_dir.read_config(whole, TrainConfig) == tiny_run.config(world, **EVALUATED)


def test_a_run_goes_on_with_another_vision_weight(world, tmp_path):
    """A number or a schedule: neither the data nor the run's identity depends on it."""
    settings = {"data__loss_on": "both", "data__vision_weight": 0.5}
    _train(tiny_run.config(world, **settings, total_steps=2), tmp_path)
    _train(tiny_run.config(world, **settings, total_steps=4), tmp_path)
    scheduled = settings | {"data__vision_weight": (1.0, 0.0, 4)}
    _train(tiny_run.config(world, **scheduled, total_steps=6), tmp_path)
    assert checkpoints.find_checkpoint(tmp_path).name == "6"
    steps = [line["step"] for line in io.read_jsonl(tmp_path / METRICS_FILE) if "loss" in line]
    assert steps == list(range(6))


def test_a_vision_weight_schedule_sets_the_loss_of_each_step(world, tmp_path):
    """At a weight of 0 visual ids are not labeled at all."""
    settings = {"total_steps": 2, "data__loss_on": "both"}
    losses = {}
    for name, weight in {"one": 1.0, "none": 0.0, "line": (1.0, 0.0, 1)}.items():
        _train(tiny_run.config(world, **settings, data__vision_weight=weight), tmp_path / name)
        lines = io.read_jsonl(tmp_path / name / METRICS_FILE)
        losses[name] = [line["loss"] for line in lines if "loss" in line]
        counted = ["visual_loss" in line for line in lines if "loss" in line]
        assert counted == {"one": [True, True], "none": [False, False], "line": [True, False]}[name]
    assert losses["line"][0] == losses["one"][0] != losses["none"][0]


def test_a_policy_may_keep_the_statistics_it_was_trained_with(world, policy_checkpoint):
    options = {"init_from": str(policy_checkpoint), "tokenizers": {"statistics": "init_from"}}
    config = tiny_run.config(world, **options)
    before = Assets.load(policy_checkpoint / "checkpoints" / "7" / "assets")
    assets = run_assets.build_assets(config, None)
    assert assets.statistics == before.statistics
    assert assets.tokenizer_fingerprints == before.tokenizer_fingerprints
    tokenizers = dataclasses.replace(config.tokenizers, statistics="stores")
    own = run_assets.build_assets(dataclasses.replace(config, tokenizers=tokenizers), None)
    assert own.statistics == TokenStore(world / "store").statistics != before.statistics
    with pytest.raises(
        UserError, match=r"'init_from', but config\.init_from names no earlier stage"
    ):
        tiny_run.config(world, tokenizers__statistics="init_from")
    with pytest.raises(UserError, match=r"tokenizers\.statistics: 'none'; expected one of"):
        tiny_run.config(world, tokenizers__statistics="none")
