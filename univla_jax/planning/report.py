"""Plans as text."""

from __future__ import annotations

from univla_jax.planning.topologies import GIB
from univla_jax.planning.training_plan import TrainingPlan


def describe(plan: TrainingPlan) -> str:
    """A plan in a dozen lines."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one chip"
    fits = "fits" if plan.fits else "DOES NOT FIT"
    share = plan.useful_tokens / plan.tokens
    lines = [
        ("slice", f"{plan.topology}, {plan.chips} chips, mesh {mesh}"),
        (
            "step",
            f"{plan.batch_size} rows x {plan.sequence_length} tokens in {plan.accumulation} "
            f"micro-batch(es), remat {plan.remat!r}",
        ),
        ("parameters", gib(plan.parameters)),
        ("optimizer", gib(plan.optimizer)),
        ("activations", f"{gib(plan.activations)} with gradients, gathered weights and program"),
        ("total per chip", f"{gib(plan.total)} of {gib(plan.usable)} usable: {fits}"),
        (
            "operations",
            f"{plan.flops:.3g} per step by our count, {plan.recomputed_flops:.3g} recomputed",
        ),
        ("tokens", f"{plan.tokens:,} per step, {plan.useful_tokens:,} useful ({share:.0%})"),
        (
            "step time",
            f"at least {plan.time.lower_bound:.3f} s (arithmetic {plan.time.compute_seconds:.3f}, "
            f"memory {plan.time.memory_seconds:.3f})",
        ),
        (
            "compilation",
            f"{plan.compile_seconds:.0f} s ({plan.compile_processor_seconds:.0f} s of processor "
            f"time), {plan.host_gigabytes:.1f} GB of this machine",
        ),
    ]
    if plan.full_logits_total is not None:
        usable = "" if plan.full_logits_total <= plan.usable else ", more than the chip has"
        lines.append(("full-logit loss", f"{gib(plan.full_logits_total)} in total{usable}"))
    return "\n".join(f"{name:<16}{value}" for name, value in lines)


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f} GiB"
