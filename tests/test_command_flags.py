"""Every flag of every command, changed, arrives where it acts.

A command's module is run on real command lines; what it hands its work to is replaced by recorders,
which bind the arguments to the signature of what they replace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from absl import flags

from tests.conftest import REPOSITORY

QUICKSTART = "configs/quickstart.py"
Table = dict[str, tuple[str, str, Any] | tuple[str, str, Any, str]]
"""Flag → value on the command line, where it arrives and with which value, further arguments."""

SAMPLING: Table = {
    "temperature": ("0.5", "sampling.temperature", 0.5),
    "top_k": ("7", "sampling.top_k", 7),
    "top_p": ("0.5", "sampling.top_p", 0.5),
    "seed": ("9", "sampling.seed", 9),
}
MESH: Table = {
    "mesh.tensor": ("2", "place.tensor", 2),
    "mesh.fsdp": ("4", "place.fsdp", 4),
}


def shared(work: str, *tables: Table, arguments: str = "") -> Table:
    """Flags that several commands have, arriving in ``work``."""
    rows = {name: row for table in tables for name, row in table.items()}
    return {n: (row[0], f"{work}.{row[1]}", row[2], arguments) for n, row in rows.items()}


class Arrived(dict):
    """What reached the parts of a command, by ``part.argument`` and ``part.argument.field``."""

    def recorder(self, part: str, replaced: Callable[..., Any], result: Any = None) -> Any:
        """Stands for ``replaced``, whose arguments it takes; returns ``result``."""
        signature = inspect.signature(replaced)

        def call(*args: Any, **options: Any) -> Any:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            self[part] = True
            for name, value in bound.arguments.items():
                self._add(f"{part}.{name}", value)
            return result

        return call

    def _add(self, name: str, value: Any) -> None:
        self[name] = value
        if dataclasses.is_dataclass(value):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        elif isinstance(value, functools.partial):
            value = value.keywords
        if isinstance(value, Mapping):
            for key, inner in value.items():
                self._add(f"{name}.{key}", inner)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, what it needs at least, and where each of its flags arrives.

    Attributes:
      base: arguments without which it does not run.
      replace: puts recorders into the command's module.
      table: all of its flags.
    """

    base: str
    replace: Callable[[Any, Arrived, pytest.MonkeyPatch], None]
    table: Table


def namespace(module: Any, **values: Any) -> types.SimpleNamespace:
    """A module with some of its names replaced."""
    return types.SimpleNamespace(**{**vars(module), **values})


def _train(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    for name in ("train", "join", "inspect_data"):
        setattr(module, name, arrived.recorder(name, getattr(module, name)))
    module.leave_at_once = contextlib.nullcontext


def _fit_tokenizer(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    module.fit_tokenizer = arrived.recorder("fit", module.fit_tokenizer, {})


def _tokenize_dataset(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    load = arrived.recorder("load", module.VisionTokenizer.load)
    module.VisionTokenizer = types.SimpleNamespace(load=load)
    module.tokenize = arrived.recorder("tokenize", module.tokenize, {})
    result = types.SimpleNamespace(shards=0, episodes=0, equal=1.0)
    module.verify_store = arrived.recorder("verify", module.verify_store, result)


def _demonstrate(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    tabletop = importlib.import_module(module.DEMONSTRATIONS["tabletop"])
    write = arrived.recorder("write", tabletop.write_demonstrations, "folder")

    def import_module(name: str) -> Any:
        arrived["module"] = name
        config = tabletop.DemonstrationsConfig
        return types.SimpleNamespace(DemonstrationsConfig=config, write_demonstrations=write)

    module.importlib = types.SimpleNamespace(import_module=import_module)


def _evaluate(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    closed_loop, offline, report = module.closed_loop, module.offline, module.report
    found = {"benchmark": "", "throughput": {}, "protocol": {"conditions": ["policy"]}}
    scored = {"task": "", "episodes": 0, "store": ""}
    module.closed_loop = namespace(
        closed_loop,
        evaluate=arrived.recorder("evaluate", closed_loop.evaluate, found),
        compare=arrived.recorder("compare", closed_loop.compare, {}),
        finished=lambda out: False,
        read_episodes=lambda out, condition: [],
    )
    module.offline = namespace(
        offline,
        evaluate=arrived.recorder("offline", offline.evaluate, scored),
        table=lambda found: "",
    )
    module.report = namespace(
        report,
        summary_table=lambda found: "",
        comparison_table=lambda found: "",
        series_of=lambda found: ([], []),
        save_plot=arrived.recorder("plot", report.save_plot),
    )
    combined = module.combined
    module.combined = namespace(
        combined,
        join_parts=arrived.recorder("join", combined.join_parts, found),
        over_seeds=arrived.recorder("seeds", combined.over_seeds, {}),
        seeds_table=lambda found: "",
    )
    module.export_predictions = arrived.recorder("export", module.export_predictions, 0)
    grounded, values = module.grounded_frames, module.value_scores
    module.grounded_frames = namespace(
        grounded,
        evaluate=arrived.recorder("grounding", grounded.evaluate, scored),
        table=lambda found: "",
    )
    imagined = module.imagined_rollouts
    module.imagined_rollouts = namespace(
        imagined,
        rank_policies=arrived.recorder("rank", imagined.rank_policies, {"chunks": 0, **scored}),
        table=lambda found: "",
    )
    module.diagnosis = namespace(
        module.diagnosis,
        evaluate_setup=arrived.recorder("diagnose", module.diagnosis.evaluate_setup, {}),
        table=lambda found: "",
    )
    scores = {"area_under_curve": 1.0, "calibration_error": 0.0}
    judged = {"successes": 0, "all_moments": scores, "first_moment": scores, **scored}
    module.value_scores = namespace(
        values, score_values=arrived.recorder("judge", values.score_values, judged)
    )


def _ask(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    answer = functools.partial(module.Answerer.answer, None)
    answers = [types.SimpleNamespace(text="there", places=("a place",))]
    answerer = types.SimpleNamespace(
        views=lambda question: ("image",),
        asks_for_places=lambda question: True,
        answer=arrived.recorder("answer", answer, answers),
    )
    load = arrived.recorder("load", module.Answerer.load, answerer)
    module.Answerer = types.SimpleNamespace(load=load)
    module.read_picture = arrived.recorder("picture", module.read_picture)
    module.absolute_path = str
    module.draw_answer = arrived.recorder("draw", module.draw_answer)


def _improve(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    report = {
        "attempts": {"successes": 0, "episodes": 0},
        "advantages": {"steps": 0, "good_from": 0.0},
        "policy": "",
    }
    module.improve = arrived.recorder("improve", module.improve, report)


def _study(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    module.study_runs = namespace(
        module.study_runs,
        run_study=arrived.recorder("study", module.study_runs.run_study),
        table=lambda report: "",
    )


def _imagine(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    imagined, obeyed = module.imagined_episodes, module.obeyed_episodes
    right = {"successes": 0, "episodes": 0, "low": 0, "high": 0, "rate": 0}
    module.imagined_episodes = namespace(
        imagined,
        imagine=arrived.recorder("imagine", imagined.imagine, {"episodes": 0, "frames": 0}),
        imagine_picture=arrived.recorder("picture", imagined.imagine_picture),
        finished=lambda out: False,
    )
    module.obeyed_episodes = namespace(
        obeyed, obey=arrived.recorder("obey", obeyed.obey), table=lambda out: ""
    )
    steering = module.steered_imagination
    module.steered_imagination = namespace(
        steering,
        imagine_steering=arrived.recorder("steer", steering.imagine_steering, {"right": right}),
    )
    other = module.counterfactuals
    module.counterfactuals = namespace(
        other,
        imagine_counterfactuals=arrived.recorder("counterfactual", other.imagine_counterfactuals),
        table=lambda report: "",
    )
    module.table = lambda report: ""


def _plan(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    plan = types.SimpleNamespace(to_dict=dict, describe=lambda: "text", fits=True)
    module.jax = types.SimpleNamespace(config=types.SimpleNamespace(update=lambda *_: None))
    module.find_topology = arrived.recorder("topology", module.find_topology)
    module.plan_training = arrived.recorder("training", module.plan_training, plan)
    module.plan_decoding = arrived.recorder("decoding", module.plan_decoding, plan)
    module.search_plans = arrived.recorder("search", module.search_plans, [plan])
    module.plan_device = arrived.recorder("device", module.plan_device, plan)
    module.search_device = arrived.recorder("device_search", module.search_device, [plan])
    module.search_table = module.device_table = lambda plans: ""
    module.print = lambda text: arrived.update(printed=text)


def _convert(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    hub = types.SimpleNamespace(left_out=(), config={})
    module.from_hf = arrived.recorder("from_hf", module.from_hf, hub)
    module.to_hf = arrived.recorder("to_hf", module.to_hf)
    module.HfFolder = types.SimpleNamespace(open=lambda folder: None)
    module._size = lambda hub: ""


def _inspect(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    report = types.SimpleNamespace(rows=lambda: [["a"]])
    for name in ("inspect_store", "inspect_source"):
        setattr(module, name, arrived.recorder(name, getattr(module, name), (report, [])))
    module.render_report = lambda report, strips: ""
    load = arrived.recorder("load", module.VisionTokenizer.load)
    module.VisionTokenizer = types.SimpleNamespace(load=load)
    page = types.SimpleNamespace(
        parent=types.SimpleNamespace(mkdir=lambda **_: None), write_text=lambda text: None
    )
    module.absolute_path = arrived.recorder("page", module.absolute_path, page)


def _summarize(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    module.write_summary = arrived.recorder("summary", module.write_summary, {"files": {}})
    module.summary_table = lambda report: ""


class _ServedPolicy:
    """Stands for a loaded policy."""

    chunk_size, history_window, max_committed = 10, 1, 3

    def memory(self, batch_size: int) -> dict[str, int]:
        return {"budget of caches kept": 0}

    def set_cache_budget(self, num_bytes: int) -> None:
        pass


def _serve(module: Any, arrived: Arrived, patch: pytest.MonkeyPatch) -> None:
    from univla_jax.inference import policy
    from univla_jax.serving import startup
    from univla_jax.training import model_setup

    async def run(executor, config, tls, report, *, further=(), reloads=None):
        record = lambda execution, config, tls, reloads, replicas: None  # noqa: E731
        arrived.recorder("serve", record)(
            executor.execution, config, tls, reloads, 1 + len(further)
        )
        return True

    load = arrived.recorder("load", policy.Policy.load, _ServedPolicy())
    patch.setattr(policy.Policy, "load", load)
    patch.setattr(startup, "serve", run)
    patch.setattr(startup, "warmup", lambda policy, max_batch, report: max_batch)
    patch.setattr(startup, "check_port", lambda host, port: None)
    patch.setattr(model_setup, "replica_devices", lambda sizes, replicas: [[]] * replicas)
    for name in ("tls_context", "enable_compilation_cache", "plan_memory"):
        patch.setattr(startup, name, arrived.recorder(name, getattr(startup, name)))


COMMANDS: dict[str, Command] = {
    "train": Command(
        f"--config={QUICKSTART}:policy --workdir=w",
        _train,
        {
            "config": (f"{QUICKSTART}:world_model", "train.config.total_steps", 900),
            "workdir": ("there", "train.workdir", "there"),
            "distributed": ("true", "join", True),
            "coordinator": ("a:1", "join.group.coordinator", "a:1", "DISTRIBUTED"),
            "processes": ("3", "join.group.processes", 3, "DISTRIBUTED"),
            "process": ("1", "join.group.process", 1, "DISTRIBUTED"),
            "force": ("true", "train.force", True),
            "inspect": ("5", "inspect_data.count", 5),
            "profile": ("3:5", "train.profile.start", 3),
            "wandb": ("p", "train.wandb", "p"),
        },
    ),
    "fit_tokenizer": Command(
        f"--config={QUICKSTART}:text --source=s --workdir=w",
        _fit_tokenizer,
        {
            "config": (f"{QUICKSTART}:action", "fit.values.kind", "action"),
            "source": ("there", "fit.source", "there"),
            "workdir": ("there", "fit.workdir", "there"),
        },
    ),
    "tokenize_dataset": Command(
        f"--config={QUICKSTART}:tokens --source=s --vision=v --out=o",
        _tokenize_dataset,
        {
            "config": ("configs/tokens.py:bridge", "tokenize.config.corpus", "bridge"),
            "source": ("there", "tokenize.source", "there"),
            "vision": ("there", "load.folder", "there"),
            "out": ("there", "tokenize.out", "there"),
            "part": ("1/4", "tokenize.part.index", 1),
            "verify": ("true", "verify", True),
        },
    ),
    "demonstrate": Command(
        f"--config={QUICKSTART}:demonstrations --out=o",
        _demonstrate,
        {
            "config": (
                "configs/quickstart_tiny.py:demonstrations",
                "write.config.train_episodes",
                12,
            ),
            "out": ("there", "write.out", "there"),
            "benchmark": (
                "libero",
                "module",
                "univla_jax.simulators.libero.libero_demonstrations",
            ),
            "assets": ("there", "write.assets", "there"),
        },
    ),
    "evaluate": Command(
        f"--config={QUICKSTART}:evaluate --checkpoint=c --out=o",
        _evaluate,
        {
            "config": (f"{QUICKSTART}:attempts", "evaluate.config.episodes", 1200),
            "checkpoint": ("there", "evaluate.policy", "there"),
            "out": ("there", "evaluate.out", "there"),
            "policy": ("ws://a:1", "evaluate.policy", "ws://a:1"),
            "api_key_file": ("FILE", "evaluate.api_key", "from the file"),
            "export": ("there", "export.folder", "there"),
            "offline": ("there", "offline.store", "there"),
            "compare": ("true", "compare", True, "A B"),
            "join": ("true", "join", True, "A B"),
            "seeds": ("true", "seeds", True, "A B"),
            "plot": ("there.png", "plot.path", "there.png"),
            "diagnose": ("true", "diagnose.checkpoint", "c", "--source=there"),
            "source": ("there", "diagnose.source", "there", "--diagnose --source=here"),
            "split": ("train", "diagnose.split", "train", "--diagnose --source=there"),
            "benchmark": ("libero", "evaluate.config.benchmark", "libero"),
            "suite": ("s", "evaluate.config.suite", "s"),
            "renderer": ("r", "evaluate.config.renderer", "r"),
            "simulator_python": ("p", "evaluate.config.simulator_python", "p"),
            "tasks": ("1,2", "evaluate.config.tasks", (1, 2)),
            "episodes": ("7", "evaluate.config.episodes", 7),
            "episodes_per_task": ("7", "evaluate.config.episodes_per_task", 7),
            "max_steps": ("7", "evaluate.config.max_steps", 7),
            "execute": ("7", "evaluate.config.execute", 7),
            "latency": ("0.5", "evaluate.config.latency", 0.5),
            "execution": ("naive", "evaluate.config.execution", "naive"),
            "assets": ("there", "evaluate.config.assets", "there"),
            "conditions": ("zero,random", "evaluate.config.conditions", ("zero", "random")),
            "plan": ("4", "evaluate.config.plan", 4),
            "plan_by": ("random", "evaluate.config.plan_by", "random"),
            "rollouts": ("true", "evaluate.config.rollouts", True),
            "corpus": ("c", "evaluate.config.corpus", "c"),
            "workers": ("7", "evaluate.config.batch", 7),
            "hang_seconds": ("7", "evaluate.config.hang_seconds", 7.0),
            "videos": ("7", "evaluate.config.video_episodes", 7),
            **shared("evaluate", SAMPLING, MESH),
        },
    ),
    "evaluate --offline": Command(
        "--offline=s --checkpoint=c --out=o",
        _evaluate,
        {
            "checkpoint": ("there", "offline.checkpoint", "there"),
            "out": ("there", "offline.out", "there"),
            "episodes": ("7", "offline.episodes", 7),
            **shared("offline", MESH),
        },
    ),
    "evaluate --grounding": Command(
        "--grounding=s --checkpoint=c --out=o",
        _evaluate,
        {
            "checkpoint": ("there", "grounding.checkpoint", "there"),
            "grounding": ("there", "grounding.store", "there"),
            "out": ("there", "grounding.out", "there"),
            "episodes": ("7", "grounding.episodes", 7),
            **shared("grounding", MESH),
        },
    ),
    "evaluate --imagined": Command(
        "--imagined=s --world_model=w --checkpoint=c --out=o",
        _evaluate,
        {
            "checkpoint": ("there", "rank.checkpoints", ["there"]),
            "imagined": ("there", "rank.store", "there"),
            "world_model": ("there", "rank.world_model", "there"),
            "out": ("there", "rank.out", "there"),
            "episodes": ("7", "rank.episodes", 7),
        },
    ),
    "evaluate --judge": Command(
        "--judge=s --checkpoint=c --out=o",
        _evaluate,
        {
            "checkpoint": ("there", "judge.checkpoint", "there"),
            "judge": ("there", "judge.store", "there"),
            "out": ("there", "judge.out", "there"),
        },
    ),
    "ask": Command(
        "--checkpoint=c --image=i --out=o where is it?",
        _ask,
        {
            "checkpoint": ("there", "load.checkpoint", "there"),
            "image": ("there", "picture.path", "there"),
            "out": ("there", "draw.path", "there"),
            "corpus": ("there", "load.corpus", "there"),
            "view": ("wrist", "answer.view", "wrist"),
            "free": ("true", "answer.constrained", False),
            **shared("load", MESH),
        },
    ),
    "improve": Command(
        f"--config={QUICKSTART}:improve --checkpoint=c --stores=s --held_out=h --out=o",
        _improve,
        {
            "config": ("configs/quickstart_tiny.py:improve", "improve.config.attempts.episodes", 5),
            "checkpoint": ("there", "improve.checkpoint", "there"),
            "stores": ("there,too", "improve.stores", ["there", "too"]),
            "held_out": ("there,too", "improve.held_out", ["there", "too"]),
            "out": ("there", "improve.out", "there"),
        },
    ),
    "study": Command(
        "--config=configs/study.py:short --workdir=w --out=o",
        _study,
        {
            "config": ("configs/study.py:history", "study.config.policy.total_steps", 3600),
            "workdir": ("there", "study.workdir", "there"),
            "out": ("there", "study.out", "there"),
        },
    ),
    "imagine": Command(
        f"--config={QUICKSTART}:imagine --checkpoint=c --source=s --out=o",
        _imagine,
        {
            "config": ("configs/road.py:imagine", "steer", True),
            "checkpoint": ("there", "imagine.checkpoint", "there"),
            "source": ("there", "imagine.source", "there"),
            "actions": ("recorded", "obey.actions", "recorded"),
            "out": ("there", "imagine.out", "there"),
            **shared("imagine", SAMPLING, MESH),
        },
    ),
    "imagine --image": Command(
        f"--config={QUICKSTART}:imagine --checkpoint=c --image=i --out=o",
        _imagine,
        {
            "checkpoint": ("there", "picture.checkpoint", "there"),
            "image": ("there", "picture.image", "there"),
            "instruction": ("go", "picture.instruction", "go"),
            "out": ("there", "picture.out", "there"),
            **shared("picture", SAMPLING, MESH),
        },
    ),
    "imagine --actions": Command(
        f"--config={QUICKSTART}:imagine --checkpoint=c --source=s --actions=recorded --out=o",
        _imagine,
        {
            "checkpoint": ("there", "obey.checkpoint", "there"),
            "source": ("there", "obey.source", "there"),
            "out": ("there", "obey.out", "there"),
            **shared("obey", SAMPLING, MESH),
        },
    ),
    "imagine --config=configs/quickstart.py:counterfactuals": Command(
        "--config=configs/quickstart.py:counterfactuals --checkpoint=c --out=o",
        _imagine,
        {
            "checkpoint": ("there", "counterfactual.checkpoint", "there"),
            "out": ("there", "counterfactual.out", "there"),
            **shared("counterfactual", SAMPLING, MESH),
        },
    ),
    "imagine --config=configs/road.py:imagine": Command(
        "--config=configs/road.py:imagine --checkpoint=c --out=o",
        _imagine,
        {
            "checkpoint": ("there", "steer.checkpoint", "there"),
            "out": ("there", "steer.out", "there"),
            **shared("steer", SAMPLING, MESH),
        },
    ),
    "plan": Command(
        f"--config={QUICKSTART}:policy --topology=v5e:2x2",
        _plan,
        {
            "config": (f"{QUICKSTART}:world_model", "training.config.total_steps", 900),
            "topology": ("v6e:1x1", "topology.name", "v6e:1x1"),
            "json": ("true", "printed", "{}"),
            "full_logits": ("true", "training.full_logits", True),
            "decode": ("true", "decoding", True),
            "batch_size": ("16", "decoding.batch_size", 16, "--decode"),
            "block": ("16", "decoding.blocks", [16], "--decode"),
            "int8": ("true", "decoding.int8", True, "--decode"),
            "search": ("true", "search", True),
            "limit": ("3", "search.limit", 3, "--search"),
        },
    ),
    "plan one device": Command(
        f"--config={QUICKSTART}:policy --device=v5e",
        _plan,
        {
            "device": ("h100", "device.chip.name", "h100"),
            "search": ("true", "device_search", True),
        },
    ),
    "convert": Command(
        "--from_hf=f --to=t",
        _convert,
        {
            "config": (
                "configs/official.py:libero_video",
                "from_hf.config.corpus",
                "libero",
            ),
            "from_hf": ("there", "from_hf.source", "there"),
            "to": ("there", "from_hf.to", "there"),
            "weights_only": ("true", "from_hf.weights_only", True),
        },
    ),
    "convert --to_hf": Command(
        "--from=f --to_hf=t",
        _convert,
        {
            "from": ("there", "to_hf.source", "there"),
            "to_hf": ("there", "to_hf.to", "there"),
            "dtype": ("float32", "to_hf.dtype", "float32"),
        },
    ),
    "inspect": Command(
        "--store=s",
        _inspect,
        {
            "store": ("there", "inspect_store.folder", "there"),
            "vision": ("there", "load.folder", "there"),
            "out": ("there", "page.path", "there"),
            "episodes": ("7", "inspect_store.episodes", 7),
            "strips": ("7", "inspect_store.strips", 7),
        },
    ),
    "inspect --source": Command(
        "--source=s --corpus=bridge",
        _inspect,
        {
            "source": ("there", "inspect_source.folder", "there"),
            "corpus": ("aloha", "inspect_source.config.corpus", "aloha"),
            "split": ("val", "inspect_source.config.split", "val"),
            "episodes": ("7", "inspect_source.config.max_episodes", 7),
            "strips": ("7", "inspect_source.strips", 7),
        },
    ),
    "summarize": Command(
        "--workdir=w", _summarize, {"workdir": ("there", "summary.workdir", "there")}
    ),
    "serve": Command(
        "--checkpoint=c",
        _serve,
        {
            "checkpoint": ("there", "load.checkpoint", "there"),
            "corpus": ("c", "load.corpus", "c"),
            "host": ("0.0.0.0", "serve.config.host", "0.0.0.0"),
            "port": ("1234", "serve.config.port", 1234),
            "api_key": ("k", "serve.config.api_key", "k"),
            "api_key_file": ("FILE", "serve.config.api_key", "from the file"),
            "tls_cert": ("cert", "tls_context.certificate", "cert"),
            "tls_key": ("key", "tls_context.key", "key"),
            "execution": ("realtime", "serve.execution.mode", "realtime"),
            "execute_steps": ("3", "serve.execution.steps", 3),
            "ensemble_decay": ("0.5", "serve.execution.decay", 0.5),
            "replicas": ("3", "serve.replicas", 3),
            "cache_gib": ("1.5", "plan_memory.cache_gib", 1.5),
            "int8": ("true", "load.int8", True),
            "max_batch": ("3", "serve.config.max_batch", 3),
            "window_ms": ("7", "serve.config.window_seconds", 0.007),
            "queue": ("5", "serve.config.queue", 5),
            "max_connections": ("6", "serve.config.max_connections", 6),
            "max_message_mb": ("2", "serve.config.max_message_bytes", 2**21),
            "drain_seconds": ("4", "serve.config.drain_seconds", 4.0),
            "idle_seconds": ("8", "serve.config.idle_seconds", 8.0),
            "forget_after_seconds": ("9", "serve.config.forget_after_seconds", 9.0),
            "reload_seconds": ("11", "serve.reloads.seconds", 11.0),
            "camera_sizes": ("image=4x6", "serve.config.camera_sizes", {"image": (4, 6)}),
            "max_instruction_tokens": ("12", "load.max_instruction_tokens", 12),
            "compiled": ("folder", "enable_compilation_cache.folder", "folder"),
            **shared("load", SAMPLING, MESH),
        },
    ),
}
GROUPS = {"DISTRIBUTED": "--distributed --coordinator=b:2 --processes=2 --process=0"}


@contextlib.contextmanager
def own_flags():
    """No flags but absl's own inside; the flags that other tests' commands defined afterwards."""
    kept = [(name, flag, _definer(name)) for name, flag in _of_commands()]
    values = [(flag, flag.value, flag.present) for flag in flags.FLAGS._flags().values()]
    for name, _, _ in kept:
        delattr(flags.FLAGS, name)
    try:
        yield
    finally:
        for name, _ in _of_commands():
            delattr(flags.FLAGS, name)
        for name, flag, definer in kept:
            flags.FLAGS[name] = flag
            flags.FLAGS.register_flag_by_module(definer, flag)
        for flag, value, present in values:
            flag.value, flag.present = value, present


def _of_commands() -> list[tuple[str, flags.Flag]]:
    """The flags that commands define, with their names."""
    ours = ("univla_jax", "command_", "ml_collections")
    return [i for i in flags.FLAGS._flags().items() if _definer(i[0]).startswith(ours)]


def _definer(name: str) -> str:
    return flags.FLAGS.find_module_defining_flag(name) or "univla_jax"


def load(command: str) -> Any:
    """The module of a command, as a process of its own would have it."""
    name = command.split()[0]
    path = REPOSITORY / "univla_jax" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"command_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # flags are kept by the module that defines them
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def own_names(module: Any) -> set[str]:
    """The flags that a command's module defines or asks for."""
    names = {
        value.name for value in vars(module).values() if isinstance(value, flags.FlagHolder)
    } | {holder.name for holder in getattr(module, "_FIELDS", {}).values()}
    for attribute, table in (("SAMPLING", SAMPLING), ("MESH", MESH)):
        names |= set(table) if hasattr(module, attribute) else set()
    return names


def run(module: Any, arrived: Arrived, arguments: str) -> Arrived:
    """What arrives on one command line."""
    arrived.clear()
    flags.FLAGS.unparse_flags()
    for name in list(flags.FLAGS._flags()):
        if name.startswith("config."):  # made by the config before
            delattr(flags.FLAGS, name)
        else:
            flags.FLAGS[name].unparse()
    module.main(flags.FLAGS(["command", *arguments.split()]))
    return Arrived(arrived)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_arrives(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "key").write_text("from the file\n")
    command = COMMANDS[name]
    with own_flags():
        module, arrived = load(name), Arrived()
        command.replace(module, arrived, monkeypatch)
        for flag, (value, where, expected, *further) in command.table.items():
            more = " ".join(GROUPS.get(part, part) for part in further)
            value = tmp_path / "key" if value == "FILE" else value
            bare = run(module, arrived, f"{command.base} {more}") if "A B" not in further else {}
            assert bare.get(where) != expected, f"--{flag}: the value tested is the default"
            found = run(module, arrived, f"{command.base} {more} --{flag}={value}")
            assert found.get(where) == expected, f"--{flag}"


def test_the_tables_have_every_flag_of_every_command():
    files = (REPOSITORY / "univla_jax").glob("*.py")
    commands = {path.stem for path in files if "\n    cli.run(main" in path.read_text()}
    assert commands == {name.split()[0] for name in COMMANDS}
    for command in sorted(commands):
        with own_flags():
            defined = own_names(load(command))
        tables = [c.table for name, c in COMMANDS.items() if name.split()[0] == command]
        assert defined == set().union(*tables), command
