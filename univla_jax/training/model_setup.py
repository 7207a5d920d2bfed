"""Model of a training run: decoder, loss, sharded state and jitted steps; no data and no array."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from absl import flags
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univla_jax import checkpoints
from univla_jax.adapters import adapter_record, load_model_params
from univla_jax.assets import Assets
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.integrity import path_name
from univla_jax.models import decoder_config as axes
from univla_jax.models import quantized_weights
from univla_jax.models.action_expert import (
    DECODER,
    EXPERT,
    ActionExpert,
    ActionExpertConfig,
    params_init,
)
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import DecoderConfig, preset
from univla_jax.models.lora import HEAD, LORA_A, LoraConfig, is_adapter
from univla_jax.models.placement import LOCAL, Placement
from univla_jax.pipeline.batch import Batch
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.sequences.tokens import labeled_roles
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import hardware, sharding
from univla_jax.training.compiler_options import compiler_options
from univla_jax.training.losses import LabelWeights, LossFn, make_loss
from univla_jax.training.mesh_choice import choose_remat, run_mesh
from univla_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from univla_jax.training.parameter_groups import check_matches
from univla_jax.training.train_config import ModelConfig, TrainConfig
from univla_jax.training.train_step import (
    IsTrained,
    Step,
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    state_from_params,
    trained_part,
)
from univla_jax.training.warm_start import (
    LAYERS,
    ROWS,
    TAKEN,
    RowMap,
    describe_transfers,
    plan_transfers,
    transfer_all,
)

# ----------------------------------------------------------------------------
# Embedding rows of visual ids that start where the vision tokenizer already knows likeness.
#
# A codebook row is a point in the tokenizer's latent space, where near points look alike. Projected
# into the decoder's width, near codes start with near embeddings, so that what is learned of one is
# learned of its neighbors too; from random rows each code is a stranger to all others.
#
# Axes: K codes, E latent channels, D model width.


def init_visual_embeddings(
    codebook_KE: np.ndarray, width: int, scale: float, seed: int
) -> np.ndarray:
    """Embeddings with the geometry of a codebook.

    Args:
      codebook_KE: float [K, E].
      width: D.
      scale: standard deviation of the result, the decoder's ``initializer_range``.
      seed: of the projection and of the small part that tells equal rows apart.

    Returns:
      float32 [K, D].
    """
    rng = np.random.default_rng(seed)
    spread = codebook_KE.std(axis=0)
    points_KE = (codebook_KE - codebook_KE.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    projection_ED = rng.normal(size=(codebook_KE.shape[1], width)) / codebook_KE.shape[1] ** 0.5
    own_KD = rng.normal(size=(len(codebook_KE), width))
    rows_KD = np.sqrt(0.8) * points_KE @ projection_ED + np.sqrt(0.2) * own_KD
    return (scale * rows_KD).astype(np.float32)


_FROM_VOCABULARY = ("vocab_size", "pad_id")


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """What a config says about computation, over a mesh; building it allocates nothing.

    Attributes:
      config: the run's.
      model: the decoder.
      expert: the action expert on top of it, or None.
      mesh: the devices, also those of a topology that is not here.
      optimizer: AdamW with the run's schedule.
      loss: of one batch, as sums.
      rules: sharding rules that fit decoder and expert.
      abstract: shapes, dtypes and shardings of the state.
      batch_sharding: of every array [B, S] of a batch.
      is_trained: which parameters are trained; None for all of them.
    """

    config: TrainConfig
    model: Decoder
    expert: ActionExpert | None
    mesh: Mesh
    optimizer: optax.GradientTransformation
    loss: LossFn
    rules: sharding.ShardingRules
    abstract: TrainState
    batch_sharding: NamedSharding
    is_trained: IsTrained | None = None

    @classmethod
    def build(cls, config: TrainConfig, vocabulary: Vocabulary, mesh: Mesh) -> TrainSetup:
        """Puts the parts together.

        Raises:
          UserError: the batch does not divide over the mesh, or the model is misconfigured.
        """
        data = config.data
        sharding.check_batch(
            mesh, data.batch_size, accumulation=config.accumulation, length=data.sequence_length
        )
        plain = decoder_config(dataclasses.replace(config.model, lora=LoraConfig()), vocabulary)
        model = Decoder(decoder_config(config.model, vocabulary))
        if model.config.lora is not None and model.config.lora.base:
            quantized_weights.check_installed()
        if model.config.quantization and importlib.util.find_spec("qwix") is None:
            raise UserError(
                f"model.overrides.quantization: {model.config.quantization!r} needs the package "
                "qwix; pip install 'univla_jax[int8]'"
            )
        expert = None
        if config.has_expert:
            expert = ActionExpert(expert_config(config.model, plain), plain)
            if mesh.shape["context"] > 1:
                raise UserError(
                    f"mesh.context: {mesh.shape['context']}, but chunks of the task "
                    f"{data.task!r} are not split along time; set it to 1"
                )
        optimizer = make_optimizer(config.optimizer, config.total_steps)
        init = run_init(model, expert)
        is_trained = trained_rule(init, model.config, config.optimizer)
        abstract = abstract_state(init, optimizer, mesh, is_trained)
        if config.optimizer.offload:
            sharding.check_host_memory(mesh, "optimizer.offload")
            host = sharding.on_host(abstract.opt_state)
            abstract = dataclasses.replace(abstract, opt_state=host)
        if model.config.remat in axes.OFFLOADED:
            sharding.check_host_memory(mesh, f"model.overrides.remat={model.config.remat}")
        chip = hardware.find_chip(mesh.devices.flat[0])
        if chip is not None:
            chosen = remat_for(config, model.config, chip, mesh, abstract, is_trained)
            model = Decoder(dataclasses.replace(model.config, remat=chosen))
        return cls(
            config=config,
            model=model,
            expert=expert,
            mesh=mesh,
            optimizer=optimizer,
            loss=make_loss(
                model,
                vocabulary,
                label_weights(data),
                max_labeled=config.loss.max_labeled,
                chunks=config.loss.chunks,
                flow_weight=config.loss.flow_weight,
                insulate=config.loss.insulate,
                vision_noise=config.loss.vision_noise,
                expert=expert,
                tasks=data.titles,
            ),
            rules=model_rules(model.config, mesh, expert),
            abstract=abstract,
            is_trained=is_trained,
            batch_sharding=sharding.batch_sharding(mesh, sequence=True),
        )

    @classmethod
    def on_devices(
        cls,
        config: TrainConfig,
        vocabulary: Vocabulary,
        devices: Sequence[jax.Device] | None = None,
    ) -> TrainSetup:
        """The setup on the mesh that config and chip ask for; all devices by default.

        Raises:
          UserError: see ``build``; or the mesh does not divide the devices.
        """
        mesh = run_mesh(
            config.mesh,
            devices,
            batch_size=config.data.batch_size // config.accumulation,
            length=config.data.sequence_length,
            kv_heads=decoder_config(config.model, vocabulary).num_kv_heads,
            split_sequence=not config.has_expert,
        )
        return cls.build(config, vocabulary, mesh)

    @property
    def flops_per_token(self) -> float:
        """Operations of a training step per token, by the count of ``hardware.py``.

        Of an expert those of its layers count, over [hidden ; actions].
        """
        length = self.config.data.sequence_length
        head_fraction = hardware.head_fraction(self.config.loss.max_labeled, length)
        count = hardware.training_flops(self.model.config, length, head_fraction)
        if self.expert is not None:
            joint = length + self.config.data.chunk_size
            stack = self.expert.config.stack(self.model.config)
            count += hardware.training_flops(stack, joint, 0.0) * joint / length
        return count

    @property
    def host_slice(self) -> sharding.HostSlice:
        """The part of every batch that this process reads."""
        data = self.config.data
        return sharding.HostSlice.of(self.batch_sharding, (data.batch_size, data.sequence_length))

    def check_batch(self, batch: Batch) -> None:
        """Checks on the host that the loss gathers all labels of a batch.

        Raises:
          UserError: an element labels more tokens than ``loss.max_labeled``.
        """
        if self.config.loss.max_labeled:
            label_weights(self.config.data).check_capacity(batch, self.config.loss.max_labeled)

    def train_step(self) -> Step:
        """``step(state, batch) -> (state, metrics)``, not compiled yet."""
        return make_train_step(
            self.loss,
            self.optimizer,
            self.abstract,
            self.batch_sharding,
            schedule=make_schedule(self.config.optimizer, self.config.total_steps),
            seed=self.config.seed,
            accumulation=self.config.accumulation,
            normalization=self.config.loss.normalization,
            rules=self.rules,
            compiler_options=compiler_options(self.mesh.devices.flat),
            is_trained=self.is_trained,
        )

    def eval_step(self) -> Step:
        """``step(state, batch) -> sums``, not compiled yet."""
        return make_eval_step(
            self.loss,
            self.abstract,
            self.batch_sharding,
            rules=self.rules,
            compiler_options=compiler_options(self.mesh.devices.flat),
        )

    def new_state(self, params: Any = None) -> TrainState:
        """The state at step 0, around ``params`` (donated) or random ones of the run's seed."""
        if params is not None:
            return state_from_params(params, self.optimizer, self.abstract, self.is_trained)
        init, seed = run_init(self.model, self.expert), self.config.seed
        return init_state(init, self.optimizer, seed, self.abstract, self.is_trained)

    def saved_part(self, state: TrainState) -> TrainState:
        """What of a state a checkpoint holds: all of it, or with LoRA all but the base."""
        if self.model.config.lora is None:
            return state
        params = without_none(trained_part(state.params, self.is_trained))
        return dataclasses.replace(state, params=params)

    def model_settings(self, base: epath.Path | None) -> dict[str, Any]:
        """What the assets of a checkpoint say of its model, by field of ``Assets``.

        Args:
          base: the checkpoint that adapters are trained beside, or None.
        """
        # Acting takes the adapters merged, so the model is that without them.
        model = dataclasses.asdict(dataclasses.replace(self.model.config, lora=None))
        del model["lora"]
        return {
            "model": model,
            "action_expert": dataclasses.asdict(self.expert.config) if self.expert else {},
            "adapter": {} if base is None else adapter_record(base, self.model.config.lora),
        }

    def with_base(self, state: TrainState, checkpoint: pathlib.Path) -> TrainState:
        """A state of ``saved_part`` around its base; the whole state where nothing was left out."""
        if self.model.config.lora is None:
            return state
        return dataclasses.replace(state, params=self.earlier_params(checkpoint, state.params))

    def earlier_params(self, checkpoint: pathlib.Path, own: Any = None) -> Any:
        """The parameters of an earlier stage; an expert or adapter that it lacks starts anew.

        Args:
          checkpoint: of the earlier stage.
          own: parameters that are there already and not read, a tree of a part of them.

        Raises:
          UserError: a checkpoint of another model.
        """
        # Arrays are read in the shapes they were saved in. A base that is to be quantized is as
        # soon as it was read, array by array.
        joint, lora = checkpoints.has_part(checkpoint, EXPERT), self.model.config.lora
        template = nn_shapes(self.model, self.expert, self.mesh)
        decoder = template if self.expert is None else template[DECODER]
        decoder = without_none(trained_part(decoder, lambda name: not is_adapter(name)))
        quantize = None
        if lora is not None and lora.base:
            quantize = functools.partial(quantize_base, kind=lora.base)
        load = functools.partial(checkpoints.load_params, checkpoint, convert=quantize)
        adapter = Assets.load(checkpoints.assets_folder(checkpoint)).adapter
        if adapter or (self.expert is not None and joint and own is None):
            both = joint and self.expert is not None
            wanted = {DECODER: decoder, EXPERT: template[EXPERT]} if both else decoder
            params = load_model_params(checkpoint, adapter, wanted, convert=quantize)
            params = params if both or self.expert is None else {DECODER: params}
        else:
            params = load(decoder, part=DECODER if joint else "")
            params = params if self.expert is None else {DECODER: params}
        if own is None:
            own = self._fresh(params)
        return merge_trees(params, own)

    def partial_params(self, checkpoint: epath.Path, assets: Assets) -> tuple[Any, str]:
        """The parameters of an earlier stage of other sizes, as far as they fit, and the table.

        Args:
          checkpoint: of the earlier stage.
          assets: of this run.

        Raises:
          UserError: nothing fits, or the earlier stage is an adapter.
        """
        earlier = Assets.load(checkpoints.assets_folder(checkpoint))
        if earlier.adapter:
            raise UserError(f"{checkpoint} is an adapter; a partial warm start takes whole models")
        # Both sides by the names of a decoder with an expert, whichever has one.
        arrays = {
            _joint_name(name.removeprefix("params/")): (name, array)
            for name, array in checkpoints.saved_arrays(checkpoint).items()
            if name.startswith("params/")
        }
        template = self.abstract.params if self.expert else {DECODER: self.abstract.params}
        wanted = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(template)}
        rows = RowMap.of(earlier, assets)
        table = plan_transfers(
            {name: array.shape for name, (_, array) in arrays.items()},
            {name: x.shape for name, x in wanted.items()},
            rows,
        )
        tree: dict[str, Any] = {}
        for line in table:
            if line.kind in (TAKEN, ROWS, LAYERS):
                name, array = arrays[line.name]
                whole = NamedSharding(self.mesh, PartitionSpec())
                split = wanted[line.name].sharding if line.kind == TAKEN else whole
                *parents, last = name.split("/")
                node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)
                node[last] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=split)
        read = checkpoints.load_arrays(checkpoint, tree)["params"]
        flat = jax.tree_util.tree_leaves_with_path(read)
        saved = {_joint_name(path_name(path)): x for path, x in flat}
        fresh = self._fresh({})
        fresh = fresh if self.expert else {DECODER: fresh}
        made = transfer_all(table, fresh, saved, rows, sharding.shardings(template))
        return (made if self.expert else made[DECODER]), describe_transfers(table)

    def _fresh(self, params: Any) -> Any:
        """Initial values of the run's parameters that ``params`` lacks."""
        template = self.abstract.params
        known = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        missing = functools.partial(trained_part, is_trained=lambda name: name not in known)
        shardings = without_none(missing(sharding.shardings(template)))
        if not jax.tree.leaves(shardings):
            return {}
        init = run_init(self.model, self.expert)
        draw = jax.jit(
            lambda key: without_none(missing(nn.unbox(init(key)))), out_shardings=shardings
        )
        return draw(jax.random.key(self.config.seed))

    def with_visual_init(self, state: TrainState, codebook: np.ndarray, first: int) -> TrainState:
        """``state`` (donated) with embeddings of visual ids made from the tokenizer's codebook.

        Args:
          state: at step 0.
          codebook: float [K, E].
          first: id of code 0.
        """
        shape = self.model.config
        rows = init_visual_embeddings(
            codebook, shape.hidden_size, shape.initializer_range, self.config.seed
        )

        def place(state: TrainState) -> TrainState:
            decoder = state.params if self.expert is None else state.params[DECODER]
            table = decoder["embedding"]
            table = table.at[first : first + len(rows)].set(rows.astype(table.dtype))
            decoder = {**decoder, "embedding": table}
            params = decoder if self.expert is None else {**state.params, DECODER: decoder}
            return dataclasses.replace(state, params=params)

        return jax.jit(place, out_shardings=sharding.shardings(self.abstract), donate_argnums=0)(
            state
        )


def remat_for(
    config: TrainConfig,
    decoder: DecoderConfig,
    chip: hardware.Chip,
    mesh: Mesh,
    abstract: TrainState,
    is_trained: IsTrained | None,
) -> str:
    """The remat preset that a run takes on a chip: the config's, or one chosen by memory."""
    if "remat" in config.model.overrides:
        return decoder.remat
    # The gradients stand beside the parameters that are trained.
    moments, _ = sharding.split_memory(abstract.opt_state)
    state = (abstract.params, trained_part(abstract.params, is_trained), moments)
    return choose_remat(
        decoder,
        chip,
        mesh,
        sequences=config.data.batch_size // config.accumulation,
        length=config.data.sequence_length,
        state_bytes=sharding.shard_bytes(state),
    )


def run_init(model: Decoder, expert: ActionExpert | None) -> Callable[[jax.Array], Any]:
    """``params_init``, its base quantized where the adapters' config says so."""
    init, lora = params_init(model, expert), model.config.lora
    if lora is None or not lora.base:
        return init

    def quantized(key: jax.Array) -> Any:
        params = init(key)
        if expert is None:
            return quantized_weights.quantize_params(params, lora.base)
        decoder = quantized_weights.quantize_params(params[DECODER], lora.base)
        return {**params, DECODER: decoder}

    return quantized


def quantize_base(name: str, x: jax.Array, *, kind: str) -> Any:
    """A parameter of a checkpoint in few bits; those of an expert stay as they are."""
    if EXPERT in name.split("/"):
        return x
    return quantized_weights.quantize_leaf(name, x, kind)


def nn_shapes(model: Decoder, expert: ActionExpert | None, mesh: Mesh) -> Any:
    """Shapes and shardings of the parameters before a base is quantized."""
    boxed = jax.eval_shape(params_init(model, expert), jax.random.key(0))
    return sharding.with_shardings(boxed, mesh)


def trained_rule(
    init: Callable[[jax.Array], Any], config: DecoderConfig, optimizer: OptimizerConfig
) -> IsTrained | None:
    """Which parameters a run trains: with LoRA the adapters and the whole of an expert.

    Args:
      init: of the run's parameters.
      config: of the decoder.
      optimizer: says what is frozen.

    Raises:
      UserError: a regular expression that matches no parameter.
    """
    boxed = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(boxed)
    shapes = {path_name(path): x.shape for path, x in leaves}
    for where, patterns in optimizer.expressions.items():
        check_matches(patterns, shapes, where)
    frozen = {name for name, shape in shapes.items() if not optimizer.factors(name, shape).any()}
    if config.lora is None:
        return (lambda name: name not in frozen) if frozen else None
    if config.lora.rank and not any(name.endswith(LORA_A) for name in shapes):
        matrices = [name.removesuffix("/kernel") for name in shapes if name.endswith("/kernel")]
        raise UserError(
            f"model.lora.targets: {config.lora.targets!r} matches no matrix; they are "
            f"{', '.join([*(m for m in matrices if EXPERT not in m), HEAD])}"
        )
    return lambda name: name not in frozen and (is_adapter(name) or EXPERT in name.split("/"))


def _joint_name(name: str) -> str:
    """The path of a parameter as it is where there is an expert too."""
    return name if name.split("/")[0] in (DECODER, EXPERT) else f"{DECODER}/{name}"


def without_none(tree: Any) -> Any:
    """A tree of dicts without its empty places."""
    if not isinstance(tree, Mapping):
        return tree
    kept = {key: without_none(value) for key, value in tree.items()}
    return {key: value for key, value in kept.items() if jax.tree.leaves(value)}


def merge_trees(first: Any, second: Any) -> Any:
    """Two trees of dicts in one; a leaf is in one of them only."""
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return first
    merged = {key: merge_trees(first[key], second[key]) for key in first.keys() & second.keys()}
    return {**first, **second, **merged}


def label_weights(data: DataConfig) -> LabelWeights:
    """The loss weights of a run's tasks."""
    labeled = [labeled_roles(part.labels) for part in data.parts]
    vision, value = zip(*[(part.vision_schedule, part.value_weight) for part in data.parts])
    return LabelWeights(labeled, vision, value)


def decoder_config(model: ModelConfig, vocabulary: Vocabulary) -> DecoderConfig:
    """The preset with its overrides, sized for the vocabulary.

    Raises:
      UserError: an unknown preset or field, or one that the vocabulary decides.
    """
    for name in _FROM_VOCABULARY:
        if name in model.overrides:
            raise UserError(f"model.overrides.{name}: comes from the vocabulary; remove it")
    made = preset(
        model.preset, **model.overrides, vocab_size=vocabulary.size, pad_id=vocabulary.pad
    )
    if not model.lora.enabled:
        return made
    # A frozen base is stored in the type it is computed in: the cast at every use is made once.
    blocks = {
        "action": (vocabulary.action_first, vocabulary.action_last + 1),
        "visual": (vocabulary.visual_start, vocabulary.visual_start + vocabulary.visual_size),
    }
    lora = model.lora.with_rows(blocks, vocabulary.size)
    return dataclasses.replace(made, lora=lora, param_dtype=made.dtype)


def expert_config(model: ModelConfig, decoder: DecoderConfig) -> ActionExpertConfig:
    """The expert's settings: the decoder's heads and the config's changes.

    Raises:
      UserError: an unknown field, or sizes that do not fit the decoder.
    """
    heads = {"num_heads": decoder.num_heads, "num_kv_heads": decoder.num_kv_heads}
    fields = {**heads, **model.action_expert}
    settings = build_config(ActionExpertConfig, fields, where="config.model.action_expert")
    settings.stack(decoder)
    return settings


def model_rules(
    config: DecoderConfig, mesh: Mesh, expert: ActionExpert | None = None
) -> sharding.ShardingRules:
    """Sharding rules without what the heads and widths of decoder and expert do not allow."""
    sizes = {
        axes.ACTIVATION_HEADS: config.num_heads,
        axes.ACTIVATION_KV_HEADS: config.num_kv_heads,
        axes.ACTIVATION_MLP: config.mlp_size,
        axes.ACTIVATION_VOCAB: config.padded_vocab_size,
        axes.LOOKUP_EMBED: config.hidden_size,
    }
    if expert is not None:
        stack = expert.config.stack(config)
        others = {
            axes.ACTIVATION_HEADS: stack.num_heads,
            axes.ACTIVATION_KV_HEADS: stack.num_kv_heads,
            axes.ACTIVATION_MLP: stack.mlp_size,
        }
        sizes |= {name: math.gcd(sizes[name], size) for name, size in others.items()}
    return sharding.activation_rules(mesh, sizes)


def mesh_flags() -> Callable[[], Callable[..., Placement]]:
    """Defines ``--mesh.tensor`` and ``--mesh.fsdp`` of a command that runs a trained model.

    Returns:
      to be called inside ``main``: ``inference_placement`` with what they say.
    """
    again = {"allow_override": True}  # several commands in one process may define them
    holders = {
        "tensor": flags.DEFINE_integer(
            "mesh.tensor", 1, "chips over which heads and MLP are split", **again
        ),
        "fsdp": flags.DEFINE_integer(
            "mesh.fsdp", 1, "chips over which parameters are split further", **again
        ),
    }
    return lambda: functools.partial(
        inference_placement, **{name: holder.value for name, holder in holders.items()}
    )


def replica_devices(sizes: Mapping[str, int], replicas: int) -> list[list[jax.Device]]:
    """Devices of this host for each replica of a model that is split for inference.

    Args:
      sizes: of the mesh of one replica, as ``inference_placement`` takes them.
      replicas: how many; 0 for as many as there are devices for.

    Raises:
      UserError: there are too few devices, or other hosts share the model's program.
    """
    devices, count = _own_devices(), max(1, math.prod(sizes.values()))
    replicas = replicas or max(1, len(devices) // count)
    if replicas < 0 or (replicas > 1 and replicas * count > len(devices)):
        raise UserError(
            f"--replicas={replicas} of {count} chip(s) each: this host has {len(devices)}; take "
            "fewer, or 0 for as many as there are chips for"
        )
    return [devices[i * count : (i + 1) * count] for i in range(replicas)]


def _own_devices() -> list[jax.Device]:
    """The devices of this host, which inference runs on.

    Raises:
      UserError: the process is one of several, as on every host of a larger TPU slice.
    """
    # Requests come to one host; the others would have to be told of every call before they could
    # take their part in it. A replica on each host needs none of that.
    if jax.process_count() > 1:
        raise UserError(
            f"this is one of {jax.process_count()} hosts of one slice, but a model runs on the "
            "chips of one host: take slices of one host, such as v5e-8 or v6e-8, and run a server "
            "on each"
        )
    return jax.local_devices()


def inference_placement(
    config: DecoderConfig,
    *,
    tensor: int = 1,
    fsdp: int = 1,
    expert: ActionExpert | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Placement:
    """Places a decoder over ``tensor * fsdp`` devices for inference.

    Heads, MLP and vocabulary are split over ``tensor``, and so are the key heads of caches where
    they divide; the parameters are split once more over ``fsdp`` and gathered when they are used.
    A batch is not split: it is small, and every part of the model works on all of it.

    Args:
      config: of the decoder.
      tensor: parts of heads, MLP and vocabulary.
      fsdp: parts of the parameters.
      expert: on top of the decoder.
      devices: the first of these are taken; all of this host by default.

    Raises:
      UserError: fewer devices, query heads that do not divide, or several hosts.
    """
    devices = _own_devices() if devices is None else devices
    count = tensor * fsdp
    if min(tensor, fsdp) < 1 or count > len(devices):
        raise UserError(
            f"--mesh.tensor={tensor} --mesh.fsdp={fsdp}: expected at least 1 each, and a product "
            f"of at most {len(devices)}, the devices there are; a model is split over the chips "
            "of one host: take one with more (serve --int8 halves the weights)"
        )
    if config.num_heads % tensor:
        raise UserError(
            f"--mesh.tensor={tensor}: does not divide the {config.num_heads} heads of the model; "
            "take a number that does"
        )
    if count == 1 and devices[0] == jax.devices()[0]:
        return LOCAL
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=fsdp, tensor=tensor), devices[:count])
    rules = tuple(
        (name, () if name == axes.BATCH else wanted)
        for name, wanted in model_rules(config, mesh, expert)
    )
    return Placement(mesh, functools.partial(sharding.with_shardings, mesh=mesh), rules)
