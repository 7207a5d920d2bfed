"""Scheduled programs as the TPU compiler prints them, cut down to what the planner reads."""

from __future__ import annotations

CYCLES = 'backend_config={"flag_configs":[],"window_config":{"estimated_cycles":"%d"}}'

# A loop of four turns over a layer: its weights [64, 1024] of one chip are gathered by a SparseCore
# while a product runs, and its gradient is scattered behind another; a second gather is
# synchronous. Before the loop stands an asynchronous all-reduce of the TensorCore with nothing to
# hide it, after it a small all-reduce.
LAYERS = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[])->f32[]}

%called_computation (param_0.1: bf16[64,1024]) -> bf16[4096,1024] {
  %param_0.1 = bf16[64,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.7 = bf16[4096,1024]{1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=4, \
replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,\
30,31,32,33,34,35,36,37,38,39,40,41,42,43,44,45,46,47,48,49,50,51,52,53,54,55,56,57,58,59,60,61,\
62,63}}, dimensions={0}, metadata={op_name="jit(step)/while/body/shard_map/all_gather"}
}, execution_thread="sparsecore"

%called_computation.1 (param_0.2: bf16[4096,1024]) -> bf16[64,1024] {
  %param_0.2 = bf16[4096,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %reduce-scatter.7 = bf16[64,1024]{1,0:T(8,128)(2,1)} reduce-scatter(%param_0.2), \
channel_id=5, replica_groups=[1,64]<=[64], dimensions={0}, to_apply=%add, \
metadata={op_name="jit(step)/while/body/shard_map/reduce_scatter"}
}, execution_thread="sparsecore"

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%condition (state: (s32[], bf16[64,1024])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(4)
  %state = (s32[]{:T(128)}, bf16[64,1024]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %constant.1), direction=LT
}

%body (state.1: (s32[], bf16[64,1024])) -> (s32[], bf16[64,1024]) {
  %state.1 = (s32[]{:T(128)}, /*index=1*/bf16[64,1024]{1,0}) parameter(0)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %weights = bf16[64,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %all-gather.7.call-start = ((bf16[64,1024]{1,0}, token[]), bf16[4096,1024]{1,0}) \
call-start(%weights), async_execution_thread="sparsecore", to_apply=%called_computation
  %product = bf16[4096,1024]{1,0} fusion(%weights), kind=kOutput, calls=%add, CYCLES_1750000
  %all-gather.7.call-done = bf16[4096,1024]{1,0} call-done(%all-gather.7.call-start)
  %reduce-scatter.7.call-start = ((bf16[4096,1024]{1,0}, token[]), bf16[64,1024]{1,0}) \
call-start(%product), async_execution_thread="sparsecore", to_apply=%called_computation.1
  %product.1 = bf16[4096,1024]{1,0} fusion(%weights), kind=kOutput, calls=%add, CYCLES_1750000
  %reduce-scatter.7.call-done = bf16[64,1024]{1,0} call-done(%reduce-scatter.7.call-start)
  %all-gather.8 = bf16[4096,1024]{1,0} all-gather(%weights), channel_id=6, \
replica_groups=mesh['axis_0'=64,'axis_1'=1] {'axis_0'}, dimensions={0}, \
metadata={op_name="jit(step)/while/body/closed_call/dot_general"}
  ROOT %next = (s32[]{:T(128)}, bf16[64,1024]{1,0}) tuple(%counter.1, %weights)
}

ENTRY %main (param: f32[64,1024]) -> f32[] {
  %param = f32[64,1024]{1,0} parameter(0)
  %all-reduce-start = f32[64,1024]{1,0} all-reduce-start(%param), channel_id=1, \
replica_groups=[1,64]<=[64], to_apply=%add, metadata={op_name="jit(step)/shard_map/psum"}
  %all-reduce-done = f32[64,1024]{1,0} all-reduce-done(%all-reduce-start)
  %state.2 = (s32[]{:T(128)}, bf16[64,1024]{1,0}) tuple(%param, %param)
  %while.1 = (s32[]{:T(128)}, bf16[64,1024]{1,0}) while(%state.2), condition=%condition, body=%body
  %splash_mha_fwd.1 = bf16[1,32,3200,128]{3,2,1,0} custom-call(%param), \
custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[1,32,3200,128]{3,2,1,0}, \
bf16[1,8,3200,128]{3,2,1,0}, bf16[1,8,3200,128]{3,2,1,0}}, frontend_attributes={kernel_metadata={
"kernel": "splash"
}}, metadata={op_name="jit(step)/attention"}
  ROOT %all-reduce.2 = f32[] all-reduce(%param), replica_groups={}, to_apply=%add
}
"""


def layers() -> str:
    """``LAYERS`` with the compiler's estimates of its products."""
    return LAYERS.replace("CYCLES_1750000", CYCLES % 1_750_000)
