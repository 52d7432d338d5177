"""Simplification of a traced graph that neither reads nor moves a weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

_RULES = (
    rules.cast_cast_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.div_by_1_rule,
    rules.dropout_inference_rule,
    rules.dropout_zero_rule,
    rules.flatten_to_reshape_rule,
    rules.materialize_reshape_shape_rule,
    rules.no_op_cast_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_expand_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.no_op_transpose_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.sub_0_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
)
"""What a diffusion network's trace has; backends fuse the rest themselves.

`onnxscript.optimizer.optimize_ir` has `slice_split_rule` too, which compares every node with every
other: on a network of full size (20,000 nodes) it does not end in minutes, the rest takes seconds.
"""

_ROUNDS = 2  # what folding leaves is rewritten, and what that leaves is folded


def optimize(model: ir.Model) -> None:
    """Fold constants, drop what does nothing, and merge equal nodes.

    The optimiser would fold transposes of weights, copying them into the graph, read small ones
    to infer shapes, and merge equal ones. So the weights are inputs while it works, about which it
    can know nothing.
    """
    with _weights_as_inputs(model.graph):
        passes.InlinePass()(model)
        for _ in range(_ROUNDS):
            fold_constants(model, onnx_shape_inference=True)
            RewritePass(_RULES)(model)
            passes.RemoveUnusedNodesPass()(model)
        _clean(model)


@contextmanager
def _weights_as_inputs(graph: ir.Graph) -> Iterator[None]:
    weights = {
        value: value.const_value
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    for value in weights:
        del graph.initializers[value.name or ""]
        value.const_value = None
    graph.inputs.extend(weights)
    yield
    for value, tensor in weights.items():
        graph.inputs.remove(value)
        value.const_value = tensor
        graph.register_initializer(value)


def _clean(model: ir.Model) -> None:
    for clean in (
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        clean(model)
