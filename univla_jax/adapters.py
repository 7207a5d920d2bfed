"""Adapter checkpoints: a folder with adapters alone, its base, and both read as one model.

The assets of such a checkpoint name the checkpoint it belongs to and that one's identity, a hash
(``checkpoints.checkpoint_identity``); an adapter never meets another base.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from univla_jax import checkpoints
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.io import PathLike
from univla_jax.models.action_expert import DECODER, EXPERT
from univla_jax.models.lora import Adapter, LoraConfig, is_adapter

BASE_VARIABLE = "UNIVLA_JAX_BASE"  # names the base of an adapter where it was moved to


def adapter_record(base: epath.Path, lora: LoraConfig) -> dict[str, Any]:
    """What the assets of an adapter checkpoint say of it."""
    return {
        "base": os.fspath(base),
        "identity": checkpoints.checkpoint_identity(base),
        "lora": dataclasses.asdict(lora),
    }


def find_base(record: Mapping[str, Any], other: PathLike = "") -> epath.Path:
    """The checkpoint that an adapter belongs to.

    Args:
      record: from ``adapter_record``.
      other: where the base may have been moved to; asked after the recorded place, as is what the
        environment variable ``UNIVLA_JAX_BASE`` names.

    Raises:
      UserError: none of these is the base.
    """
    seen = []
    for place in (record["base"], other, os.environ.get(BASE_VARIABLE, "")):
        if not place:
            continue
        try:
            found = checkpoints.find_checkpoint(place)
        except UserError:
            seen.append(f"{place} holds no checkpoint")
            continue
        if checkpoints.checkpoint_identity(found) == record["identity"]:
            return found
        seen.append(f"{found} is another checkpoint")
    raise UserError(
        f"the base of this adapter ({record['identity'][:12]}) is not there: {'; '.join(seen)}; "
        f"put it back, or name its place in the environment variable {BASE_VARIABLE}"
    )


def load_model_params(
    folder: epath.Path,
    record: Mapping[str, Any],
    template: Any,
    *,
    averaged: bool = True,
    convert: Callable[[str, jax.Array], Any] | None = None,
) -> Any:
    """Parameters of a checkpoint; those of an adapter are merged into its base as it is read.

    Args:
      folder: the checkpoint.
      record: ``Assets.adapter`` of it; empty for a whole model.
      template: of the plain decoder, or of decoder and expert: ``jax.ShapeDtypeStruct``.
      averaged: as for ``checkpoints.load_params``; a base has acted by its averages ever since.
      convert: likewise, after merging.

    Raises:
      UserError: another model, or the base is not there.
    """
    if not record:
        return checkpoints.load_params(folder, template, averaged=averaged, convert=convert)
    base, joint = find_base(record), isinstance(template, Mapping) and EXPERT in template
    adapter = load_adapter(folder, record, template, averaged=averaged)

    def merge(name: str, x: jax.Array) -> Any:
        own = name.removeprefix("params/").removeprefix(f"{DECODER}/")
        x = adapter.merge(own, x)
        return x if convert is None else convert(name, x)

    part = DECODER if checkpoints.has_part(base, EXPERT) else ""
    decoder = template[DECODER] if joint else template
    decoder = checkpoints.load_params(base, decoder, part=part, convert=merge)
    if not joint:
        return decoder
    # An expert is trained as a whole beside the adapters, and lies with them.
    expert = checkpoints.load_params(
        folder, template[EXPERT], part=EXPERT, averaged=averaged, convert=convert
    )
    return {DECODER: decoder, EXPERT: expert}


def load_adapter(
    folder: epath.Path, record: Mapping[str, Any], template: Any, *, averaged: bool = True
) -> Adapter:
    """The adapters of a checkpoint, whole on all devices of ``template``, or the default one."""
    lora = build_config(LoraConfig, record["lora"], where="assets.adapter.lora")
    saved = {
        name: array
        for name, array in checkpoints.saved_arrays(folder).items()
        if name.startswith("params/") and is_adapter(name)
    }
    whole = functools.partial(jax.ShapeDtypeStruct, sharding=_whole(template))
    averages = checkpoints.acting_names(folder) if averaged else {}
    own = {averages.get(name, name): name for name in saved}
    wanted = {place: whole(saved[name].shape, saved[name].dtype) for place, name in own.items()}
    read = checkpoints.load_arrays(folder, checkpoints.nested(wanted))
    flat, _ = jax.tree_util.tree_flatten_with_path(read)
    names = {path: own[_name(path)].removeprefix("params/") for path, _ in flat}
    return Adapter(lora, {names[path].removeprefix(f"{DECODER}/"): x for path, x in flat})


def _whole(template: Any) -> Any:
    """Not split, over the mesh of the template; None for the default device."""
    leaves = jax.tree.leaves(template)
    sharding = leaves[0].sharding if leaves else None
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
