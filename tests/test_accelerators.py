"""How GPU kernels are counted in the text of a compiled program; compiling one takes an environment of its own.

What any JAX can do is to lower a program for a GPU. There the operations count that XLA does not join with each other.
"""

from typing import Any

import jax
import pytest
from cost import Cost
from hlo import Launches, Loop, count_cycle, count_launches, read_program

import purejaxppo as pjp

SEPARATE = {"dot_general", "convolution", "reduce", "gather", "scatter", "sort", "dynamic_update_slice"}

# A training of 10 cycles: 2 rollout steps in an iteration of the rollout's loop, a loop of unknown length, minibatches.
TRAINING = """HloModule jit_train, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

FileNames
1 "ppo.py"

%fused (param.0: f32[4], /*index=1*/param.1: f32[4]) -> f32[4] {
  %tanh.1 = f32[4]{0} tanh(%param.0)
  ROOT %add.1 = f32[4]{0} add(%tanh.1, %param.1)
}

%rollout (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %gte.1 = f32[4]{0} get-tuple-element(%state), index=1
  %fusion.1 = f32[4]{0} fusion(%gte.1, %gte.1), kind=kLoop, calls=%fused
  %start = ((f32[4]{0}, s32[]), f32[4]{0}, u32[]) fusion-start(%fusion.1), kind=kLoop, calls=%fused
  %copy.1 = f32[4]{0:T(128)S(5)} copy(%gte.1)
  %done = f32[4]{0} fusion-done(%start)
  ROOT %tuple.1 = (s32[], f32[4]{0}) tuple(%gte.1, /*index=1*/%done)
}

%gae (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %fusion.2 = (s32[], f32[4]{0}) fusion(%state), kind=kLoop, calls=%fused
}

%look (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %call.1 = f32[4]{0} call(%state), to_apply=%gae
  ROOT %gemm.1 = (s32[], f32[4]{0}) custom-call(%call.1), custom_call_target="__cublas$gemm"
}

%minibatch (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %fusion.3 = f32[4]{0} fusion(%state), kind=kInput, calls=%fused
  %conditional.1 = f32[4]{0} conditional(%flag, %state, %state), branch_computations={%gae, %look}
  ROOT %sort.1 = (s32[], f32[4]{0}) sort(%state), dimensions={0}, to_apply=%less
}

%less (a: s32[], b: s32[]) -> pred[] {
  ROOT %compare.1 = pred[] compare(%a, %b), direction=LT
}

%cycle (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %while.1 = (s32[], f32[4]{0}) while(%state), condition=%less, body=%rollout, backend_config={KNOWN_4}
  %while.2 = (s32[], f32[4]{0}) while(%while.1), condition=%less, body=%look
  %while.3 = (s32[], f32[4]{0}) while(%while.2), condition=%less, body=%gae, backend_config={KNOWN_8}
  %while.4 = (s32[], f32[4]{0}) while(%while.3), condition=%less, body=%minibatch, backend_config={KNOWN_4}
  ROOT %copy.2 = (s32[], f32[4]{0}) copy(%while.4)
}

ENTRY %main (arg: f32[4]) -> f32[4] {
  %copy.3 = f32[4]{0} copy(%arg)
  ROOT %while.5 = (s32[], f32[4]{0}) while(%copy.3), condition=%less, body=%cycle, backend_config={KNOWN_10}
}
"""
for number in (4, 8, 10):
    TRAINING = TRAINING.replace(f"KNOWN_{number}}}", f'"known_trip_count":{{"n":"{number}"}}}}')


def test_loops_are_multiplied_out_and_one_iteration_of_an_unknown_loop_is_counted():
    program = read_program(TRAINING)
    (cycle,) = program.loops
    assert [loop.trip_count for loop in cycle.loops] == [4, None, 8, 4]
    # A look: the call, the product, and the condition, which is evaluated on the device.
    assert [loop.iteration.kernels for loop in cycle.loops] == [3, 3, 1, 4]
    assert (program.own.kernels, cycle.own.kernels, cycle.unknown_loops) == (1, 1, 1)
    assert program.total.kernels == 1 + 10 * (4 * 3 + 3 + 8 * 1 + 4 * 4 + 1)


def test_the_rollout_and_the_minibatches_are_found_even_where_the_rollout_is_unrolled():
    counts = count_cycle(read_program(TRAINING), num_updates=10, num_steps=8, num_minibatches=4)
    found = [counts[name] for name in ("rollout_step", "minibatch", "rest", "cycle", "unknown_loops")]
    assert found == [1.5, 4, 12, 40, 1]


# As XLA prints it for the training above: the rollout in a graph, the other loops launched from the host.
THUNKS = """
000: kCopy
001: kWhile
    condition:
        000: kKernel
    body:
        000: kCommandBuffer
            000: kWhile
                body:
                    000: kKernel
                    001: kKernel
        001: kWhile
            body:
                000: kKernel
        002: kWhile
            body:
                000: kKernel
                001: kAsyncStart
        003: kWhile
            body:
                000: kCommandBuffer
                    000: kKernel
                    001: kGemm
        004: kCopy
"""


def test_launches_are_those_of_the_host_with_loops_multiplied_out():
    """The rollout's graph once, 1 + 8 kernels of the next two loops, 4 graphs of minibatches, and a copy."""
    assert count_launches(THUNKS, read_program(TRAINING)) == [Launches(graphs=1 + 4, plain=1 + 8 + 1)]


def test_minibatches_may_be_a_loop_within_a_loop_of_epochs():
    epochs = Loop(4, Cost(2), (Loop(4, Cost(5), ()),))
    program = Loop(1, Cost(0), (Loop(10, Cost(1), (Loop(8, Cost(3), ()), epochs)),))
    counts = count_cycle(program, num_updates=10, num_steps=8, num_minibatches=16)
    assert (counts["rollout_step"], counts["minibatch"]) == (3, (4 * 2 + 16 * 5) / 16)
    assert (counts["rest"], counts["cycle"]) == (1, 1 + 8 * 3 + 4 * 2 + 16 * 5)


def test_a_program_without_such_loops_is_refused():
    with pytest.raises(ValueError, match="no loop of 10 updates that holds a loop of 8 steps .* of 3 minibatches"):
        count_cycle(read_program(TRAINING), num_updates=10, num_steps=8, num_minibatches=3)


# A slice of 8 numbers out of 1000, a product [4, 8] x [8, 2], and a row of 8 written in place.
MOVING = """HloModule jit_train

%sliced (param.0: f32[1000], param.1: s32[]) -> f32[8] {
  %param.0 = f32[1000]{0} parameter(0)
  %bitcast.1 = f32[1000]{0} bitcast(%param.0)
  %param.1 = s32[] parameter(1)
  %slice.1 = f32[8]{0} dynamic-slice(%bitcast.1, %param.1), dynamic_slice_sizes={8}
  ROOT %tanh.1 = f32[8]{0} tanh(%slice.1)
}

%product (param.0: f32[4,8], param.1: f32[8,2]) -> f32[4,2] {
  %param.0 = f32[4,8]{1,0} parameter(0)
  %param.1 = f32[8,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,2]{1,0} dot(%param.0, %param.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%updated (param.0: bf16[50,8], param.1: bf16[1,8], param.2: s32[]) -> bf16[50,8] {
  %param.0 = bf16[50,8]{1,0} parameter(0)
  %param.1 = bf16[1,8]{1,0} parameter(1)
  %param.2 = s32[] parameter(2)
  %constant.1 = s32[] constant(0)
  ROOT %update.1 = bf16[50,8]{1,0} dynamic-update-slice(%param.0, %param.1, %param.2, %constant.1)
}

ENTRY %main (a: f32[1000], b: f32[4,8], c: f32[8,2], d: bf16[50,8], e: bf16[1,8], i: s32[]) -> f32[4,2] {
  %a = f32[1000]{0} parameter(0)
  %b = f32[4,8]{1,0} parameter(1)
  %c = f32[8,2]{1,0} parameter(2)
  %d = bf16[50,8]{1,0} parameter(3)
  %e = bf16[1,8]{1,0} parameter(4)
  %i = s32[] parameter(5)
  %fusion.1 = f32[8]{0} fusion(%a, %i), kind=kLoop, calls=%sliced
  %fusion.2 = f32[4,2]{1,0} fusion(%b, %c), kind=kCustom, calls=%product
  %fusion.3 = bf16[50,8]{1,0} fusion(%d, %e, %i), kind=kLoop, calls=%updated
  %labels = f32[2,3,3,5]{3,2,1,0} convolution(%x, %y), window={size=2x2}, dim_labels=b01f_01io->b01f
  %gathered.1 = f32[8]{0} dynamic-slice(%a, %i), dynamic_slice_sizes={8}
  %placed.1 = bf16[50,8]{1,0} dynamic-update-slice(%d, %e, %i, %i)
  ROOT %copy.1 = f32[4,2]{1,0} copy(%fusion.2)
}
"""


def test_a_kernel_moves_what_it_takes_of_an_array_and_a_product_has_two_operations_a_weight():
    whole, conv = MOVING.splitlines(), "  %labels"
    program = read_program("\n".join(line for line in whole if not line.startswith(conv)))
    sliced, product, updated, copied = 4 * (8 + 1 + 8), 4 * (32 + 16 + 8), 2 * (8 + 8) + 4, 4 * (8 + 8)
    alone = 4 * (8 + 1 + 8), 2 * (8 + 8) + 4 + 4  # the same slice and update, not fused
    moved = sliced + product + updated + copied + sum(alone)
    assert program.own[:3] == (6, moved, 2 * 4 * 8 * 2)
    assert program.own.seconds == pytest.approx(moved / 3.35e12)


def test_a_convolution_has_two_operations_for_each_weight_of_a_feature_and_each_number_that_it_returns():
    inputs = "  %x = f32[2,4,4,7]{3,2,1,0} parameter(6)\n  %y = f32[2,2,7,5]{3,2,1,0} parameter(7)\n  %labels"
    program = read_program(MOVING.replace("  %labels", inputs))
    assert program.own.operations - 2 * 4 * 8 * 2 == 2 * (2 * 3 * 3 * 5) * (2 * 2 * 7)


def loops_lowered_for(platform, ppo):
    """For each loop of a training: the operations of an iteration, without those of inner loops, that take a kernel."""
    state = jax.eval_shape(ppo.init, jax.random.key(0))
    lowered = jax.jit(ppo.train).trace(state).lower(lowering_platforms=(platform,))
    module: Any = lowered.compiler_ir("stablehlo")
    functions = {function.attributes["sym_name"].value: function for function in module.body.operations}
    loops = []

    def count(operation):
        inside = [inner for region in operation.regions for block in region for inner in block.operations]
        return sum(map(count_one, inside))

    def count_one(operation):
        name = operation.operation.name.removeprefix("stablehlo.")
        if name == "func.call":
            return count(functions[operation.attributes["callee"].value])
        if name == "while":
            loops.append(count(operation))
            return 0
        return 1 if name in SEPARATE else count(operation)

    count(functions["main"])
    return sorted(loops)


def test_a_cycle_lowered_for_a_gpu_stays_within_its_budget():
    """The loops with the most: 8 steps of the rollout, the cycle itself, a minibatch."""
    ppo = pjp.make_ppo("CartPole-v1", pjp.Config(num_envs=4, num_steps=128, num_minibatches=4, num_updates=10))
    *_, minibatch, cycle, rollout = loops_lowered_for("cuda", ppo)
    assert minibatch <= 34 and cycle <= 47 and rollout / 8 <= 7.75
    assert loops_lowered_for("cpu", ppo)[-1] == 57  # of a minibatch, whose kernels cost a CPU nothing
